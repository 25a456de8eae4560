"""metrics.jsonl: what is written is what is read, also after a crash and a resume."""

import json
import math

import numpy as np
import pytest

from cm3jax.metrics import Meter, MetricsWriter, TensorBoardSink, read_metrics


def write_steps(path, steps, **options):
    with MetricsWriter(path, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": 1.0 / step})


def test_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": np.float32(0.5), "rate": 3})
        writer.write(2, {"loss": 0.25})
        assert set(writer.read()) == {"loss", "rate"}
    metrics = read_metrics(path)
    np.testing.assert_array_equal(metrics["loss"][0], [1, 2])
    np.testing.assert_array_equal(metrics["loss"][1], [0.5, 0.25])
    np.testing.assert_array_equal(metrics["rate"][1], [3.0])
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == ["step", "time", "loss", "rate"]


def test_values_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf})
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["a"] is None and line["b"] is None
    assert np.isnan(read_metrics(path)["b"][1]).all()


def test_every_line_is_on_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(1, {"loss": 1.0})
    assert read_metrics(path)["loss"][0].tolist() == [1]
    writer.close()


def test_resume_removes_later_steps_and_keeps_the_rest(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    before = path.read_text().splitlines()
    write_steps(path, [5, 6], resume_step=4)
    assert path.read_text().splitlines()[:4] == before[:4]
    assert read_metrics(path)["loss"][0].tolist() == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_without_resume_step_everything_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    write_steps(path, [3])
    assert read_metrics(path)["loss"][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("torn", ['{"step": 3, "ti', '{"step": 3}', "\udcff"])
def test_a_last_line_cut_short_is_left_out_and_then_removed(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with open(path, "ab") as file:
        file.write(torn.encode(errors="surrogateescape"))
    assert read_metrics(path)["loss"][0].tolist() == [1, 2]
    write_steps(path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["not json", "[1]", '{"loss": 1.0}', '{"step": "2"}'])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.0, "loss": 1.0}\n' + damage + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: expected a JSON object"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        MetricsWriter(path, resume_step=1)


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer, pytest.raises(ValueError, match="'time'"):
        writer.write(1, {"time": 2.0})


def test_a_step_written_twice_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(1, {"loss": 2.0})
    assert [column.tolist() for column in read_metrics(path)["loss"]] == [[1], [2.0]]


def test_sinks_get_every_line_with_its_values_as_they_are(tmp_path):
    class Recorder:
        def __init__(self):
            self.calls = []

        def write(self, step, values):
            self.calls.append((step, values))

        def close(self):
            self.calls.append("closed")

    sink = Recorder()
    with MetricsWriter(tmp_path / "metrics.jsonl", sinks=[sink]) as writer:
        writer.write(1, {"loss": np.float32(math.inf)})
    assert sink.calls == [(1, {"loss": math.inf}), "closed"]


def test_tensorboard_sink_writes_events_or_names_the_extra(tmp_path):
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        with pytest.raises(RuntimeError, match=r"cm3jax\[tensorboard\]"):
            TensorBoardSink(tmp_path)
        return
    with MetricsWriter(tmp_path / "metrics.jsonl", sinks=[TensorBoardSink(tmp_path / "events")]) as writer:
        writer.write(1, {"loss": 0.5})
    (events,) = (tmp_path / "events").iterdir()
    assert b"loss" in events.read_bytes()


def test_meter_weighs_batches_by_their_weight():
    meter = Meter()
    meter.add({"loss": (6.0, 3), "empty": (0.0, 0)})
    meter.add({"loss": (np.float32(2.0), 1)})
    means = meter.means()
    assert means["loss"] == 2.0
    assert math.isnan(means["empty"])
