import json

import pytest

from cm3jax.config import ConfigError
from cm3jax.stages import Stages


def run(directory, calls, sizes):
    stages = Stages(directory)
    for name, size in sizes.items():
        stages.run(name, {"size": size}, lambda folder, name=name: calls.append(name) or {"folder": folder.name})
    return stages


def test_a_finished_stage_is_skipped_and_its_numbers_kept(tmp_path):
    calls: list[str] = []
    run(tmp_path, calls, {"a": 1, "b": 2})
    again = run(tmp_path, calls, {"a": 1, "b": 2})
    assert calls == ["a", "b"]
    assert again.records["b"]["numbers"] == {"folder": "b"}


def test_an_interrupted_stage_runs_again(tmp_path):
    stages = Stages(tmp_path)

    def fail(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run("a", 1, fail)
    assert Stages(tmp_path).run("a", 1, lambda folder: {"found": (folder / "half").exists()}) == {"found": True}


@pytest.mark.parametrize("changed", [{"a": 2, "b": 2}, {"a": 1, "b": 3}])
def test_other_settings_in_the_same_folder_are_an_error(tmp_path, changed):
    run(tmp_path, [], {"a": 1, "b": 2})
    with pytest.raises(ConfigError, match="was made with other settings"):
        run(tmp_path, [], changed)


def test_a_change_upstream_reaches_every_later_stage(tmp_path):
    run(tmp_path, [], {"a": 1, "b": 2})
    (tmp_path / "a" / "done.json").unlink()
    with pytest.raises(ConfigError, match="b was made with other settings"):
        run(tmp_path, [], {"a": 5, "b": 2})


def test_the_record_says_how_long_it_took(tmp_path):
    run(tmp_path, [], {"a": 1})
    record = json.loads((tmp_path / "a" / "done.json").read_text())
    assert set(record) == {"inputs", "seconds", "numbers"}
    assert record["seconds"] >= 0
