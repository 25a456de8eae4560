"""Checks before a run: what is right passes, and what is wrong is found and named."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cm3jax import cli
from cm3jax.parallel.mesh import AXES, MeshConfig, make_mesh
from cm3jax.perf import findings, host_checks, links, rates
from cm3jax.perf.preflight import Limits, preflight

HOSTS = ["a", "b", "c"]
CUBE = MeshConfig(replica=1, data=2, fsdp=2, tensor=2)


def test_all_is_well_on_eight_devices_of_one_process(tmp_path):
    found = preflight(tmp_path / "run", CUBE, Limits(free_bytes=0))
    assert findings.failed(found) == []
    assert [finding.check for finding in found] == [
        *["versions", "clocks", "work directory", "shared", "free disk", "devices", "matrix products"],
        *["all-reduce data=2", "all-reduce fsdp=2", "all-reduce tensor=2"],
    ]
    assert f"jax {jax.__version__}" in found[0].found
    assert "8 x cpu" in found[5].found
    assert "CPUs have no links" in found[-1].expected
    assert list((tmp_path / "run").iterdir()) == []


def test_a_mesh_that_the_devices_do_not_fit_is_a_finding(tmp_path):
    found = preflight(tmp_path, MeshConfig(fsdp=3), Limits(free_bytes=0))
    assert findings.failed(found) == ["mesh"]
    assert "does not cover 8 devices" in found[-1].found


def test_another_version_is_named_with_its_process_and_machine():
    right = {"python": "3.12.1", "jax": "0.12.0", "flax": "0.12.12"}
    assert host_checks.judge_versions([right] * 3, HOSTS).passed
    finding = host_checks.judge_versions([right, right | {"jax": "0.11.2"}, right], HOSTS)
    assert not finding.passed
    assert finding.found == "process 1 (b): jax 0.11.2"
    assert "jax 0.12.0" in finding.expected


def test_a_clock_that_is_off_is_named_and_one_late_answer_is_forgiven():
    rounds = [[100.0, 100.1, 103.0], [200.0, 205.0, 203.1], [300.0, 300.2, 303.0]]
    finding = host_checks.judge_clocks(rounds, HOSTS, limit=1.0)
    assert not finding.passed
    assert finding.found == "process 2 (c): +3.000 s"
    assert host_checks.judge_clocks(rounds, HOSTS, limit=3.5).passed


GOOD = {"token": "t", "rate": 1e8, "free": 50e9}
SEEN = {"0": True, "1": True}


def test_storage_that_fails_is_named():
    written = [GOOD, {"error": "no space left"}, GOOD]
    (finding,) = host_checks.judge_storage(written, [SEEN] * 3, HOSTS, 0)
    assert (finding.check, finding.passed, finding.found) == ("work directory", False, "process 1 (b): no space left")


def test_a_directory_that_is_not_shared_is_found():
    seen = [SEEN, SEEN, {"0": False, "1": True}]
    found = host_checks.judge_storage([GOOD] * 3, seen, HOSTS, 0)
    assert findings.failed(found) == ["shared"]
    assert found[1].found == "process 2 (c): does not see the files of process 0"


def test_too_little_room_is_found():
    found = host_checks.judge_storage([GOOD, GOOD | {"free": 3e9}, GOOD], [SEEN] * 3, HOSTS, 20e9)
    assert findings.failed(found) == ["free disk"]
    assert found[2].found == "process 1 (b): 3.0 GB"


def test_a_work_directory_that_cannot_be_made_is_a_finding(tmp_path):
    (tmp_path / "file").touch()
    (finding,) = host_checks.check_storage(tmp_path / "file" / "run", ["a"], 60, 0)
    assert not finding.passed
    assert "Not a directory" in finding.found


def test_files_of_a_directory_that_is_not_renamed_are_not_taken_for_written(tmp_path, monkeypatch):
    """A bucket that cannot rename folders: checkpoints would never be finished."""

    def refuse(self, target):
        raise OSError("rename of a folder is not supported")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    (finding,) = host_checks.check_storage(tmp_path, ["a"], 60, 0)
    assert finding.found == "process 0 (a): rename of a folder is not supported"


def test_devices_of_another_number_or_kind_are_named():
    assert rates.judge_devices([["TPU v5"] * 4] * 3, HOSTS).passed
    fewer = rates.judge_devices([["TPU v5"] * 4, ["TPU v5"] * 4, ["TPU v5"] * 3], HOSTS)
    assert (fewer.passed, fewer.found) == (False, "process 2 (c): 3 x TPU v5")
    assert not rates.judge_devices([["NVIDIA H100", "NVIDIA A100"]] * 3, HOSTS).passed


def device(number, rate, right=True):
    return {"device": number, "rate": rate, "right": right}


def test_a_slow_chip_is_named(monkeypatch):
    everyone = [[device(0, 100e12), device(1, 99e12)], [device(2, 60e12), device(3, 101e12)]]
    # CPUs are not judged by their speed.
    assert rates.judge(everyone, HOSTS, None, 0.9).passed
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    finding = rates.judge(everyone, HOSTS, 200e12, 0.9)
    assert not finding.passed
    assert finding.found == "process 1 (b): device 2 at 60% of the median"
    assert finding.expected == "peak 200 TFLOP/s"
    fine = rates.judge(everyone, HOSTS, 200e12, 0.5)
    assert (fine.passed, fine.found) == (True, "60 to 101 TFLOP/s, 30% of the peak")


def test_a_chip_that_computes_wrongly_is_named():
    everyone = [[device(0, 1e12), device(1, 1e12, right=False)]]
    finding = rates.judge(everyone, HOSTS, None, 0.9)
    assert (finding.passed, finding.found) == (False, "process 0 (a): device 1 gives wrong products")


def test_one_wrong_entry_of_a_product_is_found(monkeypatch):
    assert rates.measure(jax.devices()[3]) | {"rate": 0} == {"device": 3, "rate": 0, "right": True}
    product = jnp.matmul
    monkeypatch.setattr(jnp, "matmul", lambda a, b, **options: product(a, b, **options).at[17, 40].add(1))
    assert not rates.measure(jax.devices()[3])["right"]


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor"])
def test_sums_over_an_axis_are_exact_and_wrong_ones_are_found(axis, monkeypatch):
    mesh = make_mesh(CUBE)
    right, rate = links.measure(mesh, axis)
    assert right and rate > 0
    other = {"data": "fsdp", "fsdp": "tensor", "tensor": "data"}[axis]
    psum = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, name: psum(x, other))
    assert not links.measure(mesh, axis)[0]


def test_links_are_judged_where_their_rate_is_known():
    everyone = [[True, 300e9], [True, 8e9]]
    slow = links.judge("all-reduce data=8", everyone, HOSTS, 450e9, "exact sums", 0.05)
    assert (slow.passed, slow.found) == (False, "process 1 (b): 8.00 GB/s")
    assert links.judge("all-reduce data=8", everyone, HOSTS, 450e9, "exact sums", 0.01).passed
    assert links.judge("all-reduce data=8", everyone, HOSTS, None, "exact sums", 0.05).passed
    wrong = links.judge("all-reduce data=8", [[True, 1.0], [False, 1.0]], HOSTS, None, "exact sums", 0.05)
    assert (wrong.passed, wrong.found) == (False, "process 1 (b): wrong sums")


def fake_mesh(kind, platform, slices, processes):
    devices = [
        SimpleNamespace(device_kind=kind, platform=platform, slice_index=s, process_index=p)
        for s, p in zip(slices, processes, strict=True)
    ]
    shape = (2, 1, len(devices) // 2, 1)
    return SimpleNamespace(devices=np.array(devices).reshape(shape), shape=dict(zip(AXES, shape, strict=True)))


def test_a_rate_is_expected_only_where_the_links_of_the_devices_reach():
    two_slices = fake_mesh("TPU v5p", "tpu", [0, 0, 1, 1], [0, 0, 1, 1])
    assert links._expected(two_slices, "fsdp", HOSTS)[0] == 600e9
    assert links._expected(two_slices, "replica", HOSTS)[0] is None
    two_nodes = fake_mesh("NVIDIA H100 80GB HBM3", "gpu", [0] * 4, [0, 0, 1, 1])
    assert links._expected(two_nodes, "fsdp", ["a", "b"])[0] == 450e9
    most, words = links._expected(two_nodes, "replica", ["a", "b"])
    assert most is None and "network" in words
    # One process for each GPU, both on one machine.
    assert links._expected(two_nodes, "replica", ["a", "a"])[0] == 450e9
    assert (
        "no link rate known for 'TPU v9'"
        in links._expected(fake_mesh("TPU v9", "tpu", [0] * 4, [0] * 4), "fsdp", HOSTS)[1]
    )


def test_the_table_has_a_line_for_each_finding_and_many_processes_are_cut_short():
    many = findings.named({i: "slow" for i in range(20)}, [f"h{i}" for i in range(20)])
    assert many.endswith("process 7 (h7): slow; and 12 more")
    lines = findings.table([findings.Finding("clocks", False, "x", "y"), findings.Finding("z", True, "w")]).splitlines()
    assert [line.split() for line in lines[1:]] == [["clocks", "FAILED", "x", "y"], ["z", "ok", "w"]]


def test_the_command_fails_and_names_what_failed(tmp_path, capsys):
    assert cli.main(["preflight", "--workdir", str(tmp_path), "--free-gb", "1e9"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "preflight: FAILED: free disk"
    assert cli.main(["preflight", "--workdir", str(tmp_path), "--free-gb", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "preflight: all is well"


def test_the_command_takes_the_mesh_of_a_run(tmp_path, capsys, repo_root):
    # The axis that launchers of several slices add is one that the experiment files name.
    axes = ["--config.run.mesh.replica=2", "--config.run.mesh.tensor=2"]
    config = ["--config", f"{repo_root}/configs/lm/350m.py", *axes]
    assert cli.main(["preflight", "--workdir", str(tmp_path), "--free-gb=0", *config]) == 0
    printed = capsys.readouterr().out
    assert all(f"all-reduce {axis}=2" in printed for axis in ("replica", "fsdp", "tensor"))


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["preflight", "--workdir", str(tmp_path), "--config.run.mesh.fsdp=2"])
    assert stop.value.code == 2


def launch(repo_root, *words):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CM3_", "XLA_", "JAX_"))}
    path = {"PYTHONPATH": str(repo_root)}
    return subprocess.run(
        [repo_root / "launch" / "local.sh", *words],
        capture_output=True, text=True, timeout=120, check=False, env=clean | path,
    )  # fmt: skip


def test_four_processes_find_the_same(tmp_path, repo_root):
    command = [sys.executable, "-m", "cm3jax.cli", "preflight", f"--workdir={tmp_path}", "--free-gb=0"]
    done = launch(repo_root, "--processes", "4", "--devices-per-process", "2", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line.removeprefix("[0] ") for line in done.stdout.splitlines() if line.startswith("[0] ")]
    assert printed[-1] == "preflight: all is well"
    assert any("4 process(es) with 2 x cpu" in line for line in printed)
    assert any(line.startswith("all-reduce data=8") for line in printed)
    assert sum("preflight: " in line for line in done.stdout.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_processes_that_do_not_share_the_work_directory_all_fail(tmp_path, repo_root):
    own = f'exec {sys.executable} -m cm3jax.cli preflight --free-gb=0 --workdir="$0/$CM3_PROCESS"'
    command = ["bash", "-c", own, str(tmp_path)]
    done = launch(repo_root, "--processes", "2", "--devices-per-process", "1", "--", *command)
    assert done.returncode == 1
    assert "[0] preflight: FAILED: shared" in done.stdout.splitlines()
    assert "does not see the files of process" in done.stdout
    assert all(f"process {i} failed with exit code 1" in done.stderr for i in (0, 1))
