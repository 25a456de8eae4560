"""Embedding and neighbour jobs, their tables, and the samples that are drawn from them."""

import dataclasses
import importlib.util
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from cm3jax import cli, files
from cm3jax.config import ConfigError
from cm3jax.data.mixture import Mixture
from cm3jax.data.plan import PlanConfig
from cm3jax.data.plans import Plans
from cm3jax.data.records import Records
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.samples import epoch_samples
from cm3jax.data.sources.scenes import ScenesSource
from cm3jax.loop import RunConfig
from cm3jax.models.config import cm3leon
from cm3jax.retrieval.backends import BackendConfig
from cm3jax.retrieval.embeddings import Column, Embeddings, RetrievalError
from cm3jax.retrieval.find_neighbours import find_neighbours
from cm3jax.retrieval.neighbours import DrawnNeighbours, NeighbourTable
from cm3jax.tasks.clip import CLIPTaskConfig
from cm3jax.tasks.lm import DatasetConfig, LMConfig, LMTask
from cm3jax.train import Config, train

JOB = Path(__file__).parents[1] / "jobs" / "neighbours.py"
spec = importlib.util.spec_from_file_location("neighbours_job", JOB)
job = importlib.util.module_from_spec(spec)
spec.loader.exec_module(job)


class Killed(BaseException):
    """What no handler of the job may catch."""


@pytest.fixture(scope="module")
def tokenizer(scene_records) -> Path:
    return scene_records / "text.model"


@pytest.fixture(scope="module")
def records(scene_records) -> Path:
    return scene_records / "train"


@pytest.fixture(scope="module")
def done(records, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done")
    job.run(records, tokenizer, out)
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_vectors_have_length_one_and_queries_are_not_the_documents(done):
    rows = np.concatenate(Embeddings(done / "embeddings").shards)
    assert len(rows) == job.DOCUMENTS and np.all(rows["parts"] == 3)
    for part in ("document", "image", "text"):
        np.testing.assert_allclose(np.linalg.norm(rows[part], axis=1), 1, atol=1e-6)
    assert not np.allclose(rows["text"], rows["image"])


def test_a_document_is_the_mean_of_its_parts(done, tokenizer):
    encoder, source = job.small_encoder(tokenizer), ScenesSource("train", job.DOCUMENTS, 32)
    words, pixels = source[3].segments[0].text, source[3].segments[1].pixels
    text, image = encoder.texts(encoder.tokenizer([words])), encoder.images(pixels[None])
    mean = (text + image) / np.linalg.norm(text + image)
    row = np.concatenate(Embeddings(done / "embeddings").shards)[3]
    np.testing.assert_allclose(row["document"], mean[0], atol=1e-5)
    assert not np.allclose(row["text"], text[0], atol=1e-4), "a fifth of the query's tokens is dropped"
    assert not np.allclose(row["image"], image[0], atol=1e-4), "a fifth of the query's patches is dropped"


def test_candidates_keep_the_rules_and_are_never_the_record_itself(done):
    table = NeighbourTable(done / "neighbours")
    rows = table.rows(np.arange(len(table)))
    assert np.all(rows["ids"] != np.arange(len(table))[:, None])
    assert np.all((rows["scores"] <= job.RULES.max_score) | (rows["ids"] < 0))
    assert np.mean(rows["ids"] >= 0) > 0.8
    bank = np.concatenate(Embeddings(done / "embeddings").shards)
    scores = bank["text"] @ bank["document"].T
    at = rows["ids"][:, 2] >= 0
    expected = scores[np.flatnonzero(at), rows["ids"][at, 2]]
    np.testing.assert_allclose(rows["scores"][at, 2], expected, atol=1e-6)


def test_killed_at_random_and_run_again_gives_the_same_bytes(records, tokenizer, done, tmp_path, monkeypatch):
    replace, kills, rng = os.replace, 0, np.random.default_rng(0)

    def killed(source, target):
        """Dies before a file gets its name, every third time; half of the file is left."""
        nonlocal kills
        if rng.random() < 1 / 3:
            kills += 1
            with open(source, "rb+") as file:
                file.truncate(os.path.getsize(source) // 2)
            raise Killed
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    for _ in range(100):
        try:
            job.run(records, tokenizer, tmp_path)
            break
        except Killed:
            continue
    monkeypatch.undo()
    assert kills >= 3
    assert {k: v for k, v in contents(tmp_path).items() if not k.name.startswith(".")} == contents(done)


def test_damaged_shards_are_made_again(records, tokenizer, done, tmp_path, caplog):
    job.run(records, tokenizer, tmp_path)
    for name in ("embeddings/embeddings-00002-of-00005.npy", "neighbours/neighbours-00001-of-00005.npy"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:200])
    job.run(records, tokenizer, tmp_path)
    assert contents(tmp_path) == contents(done)
    assert "written again: missing or damaged shard" in caplog.text


def test_any_number_of_processes_gives_the_same_bytes(records, tokenizer, done, tmp_path):
    """Process 0 waits for the others, so alone in one process it must come last; it begins the directory."""
    for name in ("embeddings", "neighbours"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_bytes((done / name / "settings.json").read_bytes())
    for process in (2, 1, 0):
        job.embed_scenes(records, tokenizer, tmp_path, process, 3)
    for process in (2, 1, 0):
        job.find_scenes(tmp_path, process, 3)
    assert contents(tmp_path) == contents(done)


@dataclasses.dataclass
class OtherRecords:
    fingerprint: str
    lengths: np.ndarray


def test_samples_are_retrieved_documents_first_and_the_query_last(records, done):
    parts, table = [Records(records)], NeighbourTable(done / "neighbours")
    drawn = DrawnNeighbours(parts, [table], 3)
    candidates = table.rows(np.arange(len(table)))["ids"]
    epochs = []
    for epoch in range(20):
        samples = epoch_samples([len(table)], [2.0], 5, epoch, drawn)
        for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
            *retrieved, query = samples.records[start:end].tolist()
            assert query not in retrieved and len(set(retrieved)) == len(retrieved) <= 3
            assert set(retrieved) <= set(candidates[query])
        epochs.append(samples.records)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(epochs[1], epoch_samples([len(table)], [2.0], 5, 1, drawn).records)


def test_plans_draw_from_the_table(records, done):
    mixture = Mixture([(Records(records), 1.0)])
    table = NeighbourTable(done / "neighbours")
    plain = Plans(mixture, PlanConfig(64), 0)
    prints = {plain.fingerprint}
    for documents in (1, 2):
        plans = Plans(mixture, PlanConfig(64), 0, neighbours=DrawnNeighbours([Records(records)], [table], documents))
        tokens = [of.epoch(0).pieces["length"].sum() for of in (plain, plans)]
        assert 0.8 * documents < tokens[1] / tokens[0] - 1 <= documents + 0.1
        prints.add(plans.fingerprint)
        again = pickle.loads(pickle.dumps(plans))
        assert np.array_equal(again.epoch(1).pieces, plans.epoch(1).pieces)
    assert len(prints) == 3


def lm_config(records, neighbours, retrieved):
    vocabulary = Records(records).vocabulary
    dataset = DatasetConfig(str(records), neighbours=neighbours and str(neighbours))
    return LMConfig(
        model=cm3leon(32, 1, 2, vocabulary.size, 64),
        train=(dataset,),
        valid=(dataset,),
        image_tokenizer="none",
        text_tokenizer="none",
        plan=PlanConfig(64),
        vocabulary=vocabulary,
        batch_size=8,
        retrieved=retrieved,
    )


def test_the_decoder_reads_samples_with_retrieved_documents(records, done):
    """The length of the training stream says how many documents stand in front of each query."""
    tokens, prints = [], set()
    for retrieved in (0, 1, 2):
        task = LMTask(lm_config(records, done / "neighbours", retrieved), seed=0, steps=1)
        tokens.append(task.examples.plans.epoch(0).pieces["length"].sum() / Records(records).lengths.sum())
        prints.add(task.data_fingerprint())
        assert task.examples[0]["tokens"].shape == (65,)
    assert np.all(np.diff(tokens) > 0.8) and len(prints) == 3
    with pytest.raises(ConfigError, match="lm.retrieved is 2, but none of .* names its neighbours"):
        LMTask(lm_config(records, None, 2), seed=0, steps=1).examples  # noqa: B018


def test_from_the_command_line(records, tokenizer, tmp_path, capsys):
    """A run of the task `clip`, then embeddings, table, and a look at it."""
    config = CLIPTaskConfig(
        model=job.MODEL, tokenizer=str(tokenizer), source="scenes:count=16,size=32", batch_size=8, valid_pairs=8
    )
    train(Config(task="clip", run=RunConfig(steps=1), clip=config), tmp_path / "clip")
    source = ["--source", f"scenes:split=train,count={job.DOCUMENTS},size=32", "--batch-size", "8"]
    embedded = ["--records", str(records), *source, "--encoder", str(tmp_path / "clip"), "--out", str(tmp_path / "e")]
    assert cli.main(["retrieval", "embed", *embedded]) == 0
    rules = ["--max-score", "1", "--max-similarity", "1", "--by-image", "1", "--memory", str(tmp_path / "e")]
    found = ["--embeddings", str(tmp_path / "e"), *rules, "--out", str(tmp_path / "n")]
    assert cli.main(["retrieval", "neighbours", *found]) == 0
    capsys.readouterr()
    shown = ["--neighbours", str(tmp_path / "n"), "--records", str(records), "--index", "7"]
    assert cli.main(["retrieval", "show", *shown]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("record 7 (") and [line.split()[1] for line in lines[1:]] == ["image:", "text:", "text:"]
    assert cli.main(["retrieval", "neighbours", *found, "--max-score", "0.5"]) == 2
    assert "begun with other settings: selection" in capsys.readouterr().err


def test_ids_of_the_memory_become_ids_of_the_mixture(records, done):
    """The memory stands behind other records in the mixture."""
    table, own = NeighbourTable(done / "neighbours"), Records(records)
    other = OtherRecords("other", np.ones(100, np.int32))
    alone = DrawnNeighbours([own], [table], 2)
    behind = DrawnNeighbours([other, own], [None, table], 2)
    queries, rng = np.arange(len(table)), lambda: generator(Purpose.NEIGHBOURS, 0, 0)
    expected = alone(queries, rng())
    np.testing.assert_array_equal(behind(queries + 100, rng()), np.where(expected < 0, -1, expected + 100))
    assert np.all(behind(np.arange(100), rng()) == -1)


def test_tables_of_other_records_are_refused(records, done):
    table = NeighbourTable(done / "neighbours")
    with pytest.raises(RetrievalError, match=r"neighbours was made for records \w+ \(48\), these are other \(48\)"):
        DrawnNeighbours([OtherRecords("other", np.ones(48, np.int32))], [table], 2)
    moved = NeighbourTable(done / "neighbours")
    moved.manifest = dataclasses.replace(moved.manifest, memory=("elsewhere",))
    with pytest.raises(RetrievalError, match=r"retrieves from records \['elsewhere'\], which are not among"):
        DrawnNeighbours([Records(records)], [moved], 2)


def test_jobs_refuse_what_does_not_belong_together(records, tokenizer, done, tmp_path):
    memory = Embeddings(done / "embeddings")
    rules = dataclasses.replace(job.RULES, max_score=0.5)
    with pytest.raises(RetrievalError, match="begun with other settings: selection"):
        find_neighbours(memory, [memory], done / "neighbours", rules, BackendConfig(), None)
    rules = dataclasses.replace(job.RULES, query_dropout=0.5)
    with pytest.raises(RetrievalError, match="was embedded with query_dropout 0.2, the rules say 0.5"):
        find_neighbours(memory, [memory], tmp_path, rules, BackendConfig(), None)
    with pytest.raises(RetrievalError, match="has the fingerprint .* was made from scenes"):
        job.embed(
            Records(records), ScenesSource("train", 47, 32), job.small_encoder(tokenizer), tmp_path, query_dropout=0
        )
    with pytest.raises(RetrievalError, match=r"no .*manifest.json: no embeddings, or their job has not finished"):
        Embeddings(tmp_path)
    with pytest.raises(RetrievalError, match=r"no .*manifest.json: no neighbour table"):
        NeighbourTable(tmp_path)


def test_a_column_is_read_as_one_array(done):
    shards = Embeddings(done / "embeddings").shards
    whole, column = np.concatenate(shards)["text"], Column(shards, "text")
    assert column.shape == whole.shape and len(column) == len(whole)
    np.testing.assert_array_equal(column[7:33], whole[7:33])
    np.testing.assert_array_equal(column[np.array([47, 0, 10, 9])], whole[[47, 0, 10, 9]])
