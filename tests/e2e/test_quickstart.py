"""The whole path as a user runs it, at the tiny size, on the embedded data set and on real photographs."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from cm3jax.data.records import Records
from cm3jax.evals.neighbour_pictures import load_neighbours
from cm3jax.metrics import read_metrics
from cm3jax.retrieval.neighbours import NeighbourTable
from cm3jax.tokens.image import decode_image

pytestmark = pytest.mark.e2e

STAGES = ("text_tokenizer", "image_tokenizer", "records", "decoder", "study")
RETRIEVAL = ("encoder", "memory")


@pytest.fixture(scope="session")
def cm3(repo_root, tmp_path_factory):
    """Runs a `cm3` command in a process of its own on one device; compiled programs are shared between the tests."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }

    def run(*arguments, check=True):
        done = subprocess.run(
            [sys.executable, "-m", "cm3jax.cli", *map(str, arguments)],
            cwd=repo_root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert not check or done.returncode == 0, done.stderr[-4000:]
        return done

    return run


@pytest.fixture(scope="session")
def scenes(cm3, tmp_path_factory):
    """A finished tiny quickstart on scenes."""
    workdir = tmp_path_factory.mktemp("scenes")
    cm3("quickstart", "--workdir", workdir, "--config", "configs/quickstart.py:tiny")
    return workdir


def check_run(workdir, embedded, retrieved=True):
    for stage in (*STAGES, *(RETRIEVAL if retrieved else ()), *(["reader"] if embedded else [])):
        assert json.loads((workdir / stage / "done.json").read_text())["numbers"], stage
    report = (workdir / "report.html").read_text()
    assert "Numbers" in report and "data:image/png;base64" in report
    decoder = json.loads((workdir / "decoder" / "done.json").read_text())["numbers"]
    assert decoder["trained"]["bits_per_token"] < decoder["untrained"]["bits_per_token"]
    assert ("attribute accuracy" in report) == embedded
    assert ("with retrieved documents" in report) == (workdir / "memory").exists() == ("alone" in decoder) == retrieved


def test_scenes_end_to_end(scenes):
    check_run(scenes, embedded=True)


def test_a_second_run_skips_every_stage(scenes, cm3):
    before = {path: path.stat().st_mtime_ns for path in scenes.rglob("done.json")}
    done = cm3("quickstart", "--workdir", scenes, "--config", "configs/quickstart.py:tiny")
    assert done.stderr.count("done before, skipped") == len(before) == len((*STAGES, *RETRIEVAL, "reader"))
    assert {path: path.stat().st_mtime_ns for path in scenes.rglob("done.json")} == before


def test_other_sizes_in_the_same_folder_are_refused(scenes, cm3):
    done = cm3(
        "quickstart",
        "--workdir",
        scenes,
        "--config",
        "configs/quickstart.py:tiny",
        "--config.lm.run.steps=7",
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"decoder was made with other settings", done.stderr)


def test_held_out_documents_retrieve_from_the_training_documents(scenes):
    table = NeighbourTable(scenes / "memory" / "neighbours" / "valid")
    assert table.manifest.memory == (Records(scenes / "records" / "train").fingerprint,)
    assert len(table) == len(Records(scenes / "records" / "valid").lengths)
    lm = json.loads((scenes / "decoder" / "config.json").read_text())["config"]["lm"]
    assert [data["repeat"] for data in lm["valid"]] == [0.0, 1.0]
    found = load_neighbours(scenes / "study")
    assert len(found) == 4
    for row, candidates in zip(found, table.rows(np.arange(4))["ids"], strict=True):
        assert row[0][1].startswith("query: ") and len(row) == 1 + (candidates >= 0).sum()


def test_two_runs_with_one_seed_have_identical_losses(scenes, cm3, tmp_path):
    config = json.loads((scenes / "decoder" / "config.json").read_text())["config"]
    arguments = [f"--config.lm.{key}={config['lm'][key]}" for key in ("image_tokenizer", "text_tokenizer")]
    records = scenes / "records"
    (tmp_path / "again.py").write_text(
        "import json\n"
        "from ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.loads({json.dumps(json.dumps(config))}))\n"
    )
    assert config["lm"]["train"][0]["path"] == str(records / "train")
    cm3("train", f"--config={tmp_path / 'again.py'}", f"--workdir={tmp_path / 'run'}", *arguments)
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (scenes / "decoder", tmp_path / "run"))
    for name in ("loss", "text_loss", "image_loss", "grad_norm", "eval/bits_per_token"):
        np.testing.assert_array_equal(first[name][1], second[name][1])


def test_generate_a_picture_and_a_caption(scenes, cm3, tmp_path):
    run, out = scenes / "decoder", tmp_path / "x.png"
    prompt = ("generate", "--workdir", run, "--prompt", "one red dog on the grass at night", "--seed", 3)
    cm3(*prompt, "--out", out)
    assert decode_image(out.read_bytes()).shape == (32, 32, 3)
    cm3(*prompt, "--out", tmp_path / "y.png")
    assert out.read_bytes() == (tmp_path / "y.png").read_bytes()
    cm3("generate", "--workdir", run, "--image", out, "--caption")
    (tmp_path / "broken.png").write_bytes(out.read_bytes()[:60])
    done = cm3("generate", "--workdir", run, "--image", tmp_path / "broken.png", "--caption", check=False)
    assert done.returncode == 2
    assert "broken.png" in done.stderr and "Traceback" not in done.stderr


def test_real_photographs_in_tar_files(cm3, shared_data, tmp_path):
    source = f"webdataset:{shared_data / 'clothing'}"
    arguments = ("--workdir", tmp_path, "--config", "configs/quickstart.py:tiny", "--config.lm.lm.retrieved=0")
    cm3("quickstart", *arguments, "--source", source)
    check_run(tmp_path, embedded=False, retrieved=False)
    records = json.loads((tmp_path / "records" / "done.json").read_text())["numbers"]
    assert records["train"]["records"] + records["valid"]["records"] == 3409


def test_real_photographs_with_coco_captions(cm3, shared_data, tmp_path):
    source = shared_data / "coco"
    cm3("quickstart", "--workdir", tmp_path, "--config", "configs/quickstart.py:tiny", "--source", source)
    check_run(tmp_path, embedded=False)
    records = json.loads((tmp_path / "records" / "done.json").read_text())["numbers"]
    assert records["train"]["records"] + records["valid"]["records"] == 259
