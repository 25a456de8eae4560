import types

import numpy as np
import pytest

from cm3jax import quickstart
from cm3jax.loop import RunConfig
from cm3jax.stages import Stages


def config(steps):
    return types.SimpleNamespace(run=RunConfig(steps=steps), seed=0)


@pytest.fixture
def trained_to(monkeypatch):
    """Stands for training that a signal may stop: the state is at the given step."""

    def set_step(step):
        state = types.SimpleNamespace(step=np.int32(step))
        monkeypatch.setattr(quickstart, "make_task", lambda _: None)
        monkeypatch.setattr(quickstart, "evaluate_untrained", lambda *_: {"loss": 2.0})
        monkeypatch.setattr(quickstart, "train", lambda *_: state)
        monkeypatch.setattr(quickstart, "last_evaluation", lambda _: {"loss": 1.0})

    return set_step


def run_stage(directory):
    return Stages(directory).run("decoder", {}, lambda folder: quickstart._train(config(10), folder))


def test_a_stage_whose_training_was_stopped_is_not_done(tmp_path, trained_to):
    trained_to(7)
    with pytest.raises(SystemExit, match="decoder: stopped after update 7"):
        run_stage(tmp_path)
    assert not (tmp_path / "decoder" / "done.json").exists()
    trained_to(10)
    assert run_stage(tmp_path) == {"trained": {"loss": 1.0}, "untrained": {"loss": 2.0}}
