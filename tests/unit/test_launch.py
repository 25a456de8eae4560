"""The launch scripts, as far as they go without installing anything."""

import os
import shutil
import subprocess

import pytest

SCRIPTS = ("quickstart.sh", "test.sh")


@pytest.fixture
def checkout(repo_root, tmp_path):
    """A copy of what the scripts read, at a path with a space, without an environment."""
    root = tmp_path / "a checkout"
    shutil.copytree(repo_root / "launch", root / "launch")
    for name in ("setup.py", "pyproject.toml", "constraints-3.11.txt", "constraints-3.12.txt"):
        shutil.copy(repo_root / name, root)
    return root


def fake_python(path, minor):
    """A python that knows its version and refuses everything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {minor}\n')
    path.chmod(0o755)
    return path


def launch(checkout, script, *arguments, **environment):
    return subprocess.run(
        ["bash", checkout / "launch" / script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
        env=os.environ | environment,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(checkout, script):
    done = launch(checkout, script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: launch/{script}")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("minor", ["3.11", "3.12"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_shows_pinned_commands_and_changes_nothing(checkout, script, minor, tmp_path):
    python = fake_python(tmp_path / "bin" / "python", minor)
    before = sorted(checkout.rglob("*"))
    fake_python(tmp_path / "none" / "nvidia-smi", minor)  # a machine without GPU, whatever this one has
    path = f"{tmp_path / 'none'}:{os.environ['PATH']}"
    done = launch(checkout, script, "--dry-run", "an argument", PYTHON=str(python), PATH=path)
    assert done.returncode == 0, done.stderr
    assert sorted(checkout.rglob("*")) == before
    made, *between, started = done.stdout.splitlines()
    installed = [line for line in between if "pip install" in line]
    assert any("flags/cpu.sh" in line for line in between) == (script == "quickstart.sh")
    assert "-m venv" in made
    assert f"constraints-{minor}.txt" in installed[-1]
    assert started.endswith("an\\ argument ")
    assert ("pytest" if script == "test.sh" else "cm3 quickstart") in started


@pytest.mark.parametrize("minor", ["3.10", "2.7"])
def test_a_python_too_old_is_one_clear_error(checkout, minor, tmp_path):
    python = fake_python(tmp_path / "bin" / "python", minor)
    done = launch(checkout, "test.sh", PYTHON=str(python))
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"needs Python 3.11 or newer; {python} is {minor}." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_first_python_that_serves_is_taken(checkout, tmp_path):
    fake_python(tmp_path / "bin" / "python3", "3.10")
    fake_python(tmp_path / "bin" / "python3.12", "3.12")
    done = launch(checkout, "test.sh", "--dry-run", PYTHON="", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.stdout.startswith("python3.12 -m venv")


def test_an_environment_that_is_up_to_date_is_left_alone(checkout, tmp_path):
    fake_python(checkout / ".venv" / "bin" / "python", "3.12")
    first = launch(checkout, "test.sh", "--dry-run")
    key = subprocess.run(
        ["bash", "-c", 'cat setup.py pyproject.toml "$PWD/constraints-3.12.txt" | cksum'],
        capture_output=True, text=True, check=True, cwd=checkout,
    ).stdout.strip()  # fmt: skip
    (checkout / ".venv" / ".installed[test]").write_text(f"{checkout} {key}\n")
    second = launch(checkout, "test.sh", "--dry-run")
    assert [len(done.stdout.splitlines()) for done in (first, second)] == [3, 1]
    with open(checkout / "setup.py", "a") as file:
        file.write("# changed\n")
    assert launch(checkout, "test.sh", "--dry-run").stdout == first.stdout
