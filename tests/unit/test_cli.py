from types import SimpleNamespace

import numpy as np
import pytest

from cm3jax import cli
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.tokens.document import pictures, texts
from cm3jax.tokens.text import TextTokenizer


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_unknown_command_is_refused(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(command, capsys):
    try:
        status = cli.main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"cm3 {command}" in capsys.readouterr().out


def test_scenes_are_drawn_to_disk_and_opened_as_a_source(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--size", "32", "--train", "6", "--valid", "2"]
    assert cli.main(["data", "scenes", *arguments]) == 0
    spec = capsys.readouterr().out.strip().splitlines()[-1]
    stored, drawn = open_source(spec), ScenesSource("train", 6, 32)
    assert len(stored) == 6
    found = {texts(stored[i])[0]: pictures(stored[i])[0] for i in range(6)}
    expected = {texts(drawn[i])[0]: pictures(drawn[i])[0] for i in range(6)}
    assert found.keys() == expected.keys()
    for caption, picture in expected.items():
        np.testing.assert_array_equal(found[caption], picture)


def test_text_model_and_one_record_from_the_command_line(tmp_path, capsys):
    model = tmp_path / "text.model"
    source = "scenes:count=40,size=32"
    assert cli.main(["data", "train-text", "--source", source, "--vocab-size", "300", "--out", str(model)]) == 0
    tokenizer = TextTokenizer.load(model)
    line = "one red dog"
    assert tokenizer.decode(tokenizer.encode(line)) == line
    missing = ["--source", source, "--image-tokenizer", str(tmp_path / "none"), "--text-tokenizer", str(model)]
    assert cli.main(["data", "tokenize", *missing, "--out", str(tmp_path / "records")]) == 2
    assert "is not a run: it has no config.json" in capsys.readouterr().err
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("steps", "named", "status"),
    [(175_000, "85", 0), (20, "85", 85), (20, None, 0)],
    ids=["finished", "named", "plain"],
)
def test_train_tells_launchers_that_it_stopped_early(steps, named, status, tmp_path, monkeypatch, repo_root):
    """Launchers start a run again that left before its last update because a signal asked."""
    monkeypatch.setattr("cm3jax.commands.train.train", lambda config, workdir: SimpleNamespace(step=np.int32(steps)))
    if named:
        monkeypatch.setenv("CM3_EXIT_STOPPED", named)
    config = [f"--config={repo_root}/configs/lm/350m.py", "--config.run.mesh.fsdp=-1"]
    assert cli.main(["train", *config, f"--workdir={tmp_path}"]) == status


def test_train_names_the_machines_that_a_configuration_knows(tmp_path, repo_root, capsys):
    config = f"--config={repo_root}/configs/lm/350m.py"
    assert cli.main(["train", config, f"--workdir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("cm3 train: no machine rule for 8 x cpu; known: v4 from 16 on, ")
    assert "--config.run.mesh.fsdp=-1" in message
    assert not (tmp_path / "run").exists()
