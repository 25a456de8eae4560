"""Launchers run as a user runs them, with stand-ins for the programs of clouds and clusters."""

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Words that a careless script would execute, split, expand or swallow.
HOSTILE = (
    "$(touch hacked)",
    "`touch hacked`",
    "it's; touch hacked",
    'a "quoted" && touch hacked',
    "| touch hacked",
    "*",
    "$HOME",
    "back\\slash",
    "%s %n",
    "käse",
    "-n",
    "$$(CM3_CLUSTER)",
    " spaces  at both ends ",
)


@pytest.fixture(scope="session")
def hostile():
    return HOSTILE


@pytest.fixture
def checkout(repo_root, tmp_path):
    """A copy of the launchers at a path with a space, without an environment."""
    root = tmp_path / "a checkout"
    shutil.copytree(repo_root / "launch", root / "launch")
    return root


@dataclasses.dataclass
class Shell:
    """Runs launchers in an empty directory, with stand-ins first in PATH."""

    checkout: Path
    cwd: Path
    programs: Path

    @property
    def environment(self):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("CM3_", "XLA_", "JAX_"))}
        return clean | {"PATH": f"{self.programs}:{os.environ['PATH']}"}

    def __call__(self, script, *words, **environment):
        done = subprocess.run(
            [self.checkout / "launch" / script, *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=self.cwd,
            env=self.environment | environment,
        )
        assert not (self.cwd / "hacked").exists(), "a word was executed"
        return done

    def dry(self, script, *words, **environment):
        """Standard output of a dry run, which must succeed and change nothing."""
        before = self.files()
        action = [word for word in words[:1] if not word.startswith("-")]
        done = self(script, *action, "--dry-run", *words[len(action) :], **environment)
        assert done.returncode == 0, done.stderr
        assert self.files() == before
        return done.stdout

    def files(self):
        return sorted([*self.checkout.rglob("*"), *self.cwd.rglob("*")])

    def fake(self, name, script=""):
        """A stand-in for a program: it notes its words, then does what `script` says."""
        path = self.programs / name
        note = f"{{ printf '%s\\0' {name} \"$@\"; printf '\\n\\0'; }} >>'{self.programs}/calls'\n"
        path.write_text(f"#!/usr/bin/env bash\n{note}{script}\n")
        path.chmod(0o755)

    def calls(self):
        """The words of every call of a stand-in, its name first."""
        path = self.programs / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("\n\0") if call]

    def bash(self, line):
        """The exit status of a line, with the stand-ins."""
        return subprocess.run(["bash", "-c", line], check=False, cwd=self.cwd, env=self.environment).returncode

    def words(self, line):
        """The words that bash makes of a line."""
        done = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True, cwd=self.cwd
        )
        assert not (self.cwd / "hacked").exists(), "a word was executed"
        return done.stdout.split("\0")[:-1]


@pytest.fixture
def shell(checkout, tmp_path):
    cwd, programs = tmp_path / "some where", tmp_path / "programs"
    cwd.mkdir()
    programs.mkdir()
    return Shell(checkout, cwd, programs)
