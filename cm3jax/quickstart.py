"""The whole path at a small size: from pictures and captions to generated pictures and captions and a report.

Each stage is the same call that a large run makes: text tokenizer, image tokenizer (VQGAN), records, encoder (CLIP),
memory (embeddings and neighbour tables), decoder, attribute reader, study, report. A finished stage is skipped when the
quickstart is given the same work directory again, and an interrupted one goes on where it stopped. A decoder that is
trained without retrieved documents needs neither encoder nor memory, and has neither.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from cm3jax.config import to_dict
from cm3jax.data.image_tokenizer import load_image_tokenizer
from cm3jax.data.records import Records
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Source, usable
from cm3jax.data.tokenize import tokenize_source
from cm3jax.evals.neighbour_pictures import save_neighbours
from cm3jax.evals.study import Models, Retrieval, StudyConfig, study
from cm3jax.evals.study_report import write_report
from cm3jax.generate.text_image import TextImageModel
from cm3jax.loop import evaluate, evaluate_untrained
from cm3jax.metrics import last_evaluation
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.retrieval.backends import BackendConfig
from cm3jax.retrieval.embed import embed
from cm3jax.retrieval.embeddings import Embeddings
from cm3jax.retrieval.encoder import load_encoder
from cm3jax.retrieval.find_neighbours import find_neighbours
from cm3jax.retrieval.memory import Memory
from cm3jax.retrieval.neighbours import NeighbourTable
from cm3jax.retrieval.places import Places, write_places
from cm3jax.retrieval.select import SelectionConfig
from cm3jax.stages import Stages
from cm3jax.tasks.lm import DatasetConfig
from cm3jax.tasks.reader import load_reader
from cm3jax.tokens.document import texts
from cm3jax.tokens.text import TextTokenizer, train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary
from cm3jax.train import Config, make_task, train

EMBEDDED = "scenes"
Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Sizes of every stage. Sources and paths inside the runs are filled in by the quickstart.

    Attributes:
      train_documents, valid_documents: of the embedded data set; another source brings what it has.
      text_documents: how many training documents the text tokenizer learns from.
      encoder: what finds the documents like a document; not trained where `lm.lm.retrieved` is 0.
      selection: which of them stand in front of it.
      reader: of the attributes of scenes; not trained for another source.
    """

    train_documents: int
    valid_documents: int
    text_documents: int
    vocabulary: Vocabulary
    vqgan: Config
    encoder: Config
    selection: SelectionConfig
    lm: Config
    reader: Config
    study: StudyConfig
    max_reject_share: float = 0.01


def quickstart(config: QuickstartConfig, source: str, workdir: Path) -> Path:
    """Runs every stage that is not done yet and returns the path of the report.

    Args:
      source: anything `open_source` takes. The embedded data set, "scenes", alone has the truth that attribute
        accuracies need.
    """
    job = _Quickstart(config, source, Path(workdir).resolve())
    stages = Stages(job.workdir)
    stages.run("text_tokenizer", [source, *job.specs.values(), config.vocabulary.text_size], job.text_tokenizer)
    stages.run("image_tokenizer", _decides(job.vqgan), lambda folder: _train(job.vqgan, folder))
    stages.run("records", [to_dict(config.vocabulary), config.max_reject_share], job.records)
    if job.retrieved:
        stages.run("encoder", _decides(job.encoder), lambda folder: _train(job.encoder, folder))
        stages.run("memory", to_dict(config.selection), job.memory)
    stages.run("decoder", _decides(job.lm), job.decoder)
    if job.embedded:
        stages.run("reader", _decides(job.reader), lambda folder: _train(job.reader, folder))
    stages.run("study", to_dict(config.study), job.study)
    write_report(stages.records, job.workdir, source, to_dict(config))
    return job.workdir / "report.html"


class _Quickstart:
    """What each stage does, with the sources and paths of one work directory."""

    def __init__(self, config: QuickstartConfig, source: str, workdir: Path):
        self.config, self.workdir = config, workdir
        self.embedded = source == EMBEDDED
        self.specs = {split: self._spec(source, split) for split in SPLITS}
        self.text_model = workdir / "text_tokenizer" / "text.model"
        assert config.vqgan.vqgan and config.encoder.clip and config.lm.lm and config.reader.reader
        images = dataclasses.replace(config.vqgan.vqgan.data, source=self.specs["train"], valid=self.specs["valid"])
        self.vqgan = dataclasses.replace(config.vqgan, vqgan=dataclasses.replace(config.vqgan.vqgan, data=images))
        sources: dict[str, Any] = {"source": self.specs["train"], "valid": self.specs["valid"]}
        clip = dataclasses.replace(config.encoder.clip, tokenizer=str(self.text_model), **sources)
        self.encoder = dataclasses.replace(config.encoder, clip=clip)
        self.retrieved = config.lm.lm.retrieved
        lm = dataclasses.replace(
            config.lm.lm,
            **self._datasets(),
            image_tokenizer=str(workdir / "image_tokenizer"),
            text_tokenizer=str(self.text_model),
        )
        self.lm = dataclasses.replace(config.lm, lm=lm)
        reader = dataclasses.replace(config.reader.reader, **sources)
        self.reader = dataclasses.replace(config.reader, reader=reader)

    def _datasets(self) -> dict[str, Any]:
        """Records to train on and to validate on; both retrieve from those to train on."""
        paths = {split: str(self.workdir / "records" / split) for split in SPLITS}
        if not self.retrieved:
            return {split: (DatasetConfig(path),) for split, path in paths.items()}
        train, valid = (DatasetConfig(paths[s], neighbours=str(self._neighbours(s))) for s in SPLITS)
        return {"train": (train,), "valid": (DatasetConfig(paths["train"], repeat=0.0), valid)}

    def _embeddings(self, split: Split) -> Path:
        return self.workdir / "memory" / "embeddings" / split

    def _neighbours(self, split: Split) -> Path:
        return self.workdir / "memory" / "neighbours" / split

    def _spec(self, source: str, split: Split) -> str:
        if source != EMBEDDED:
            return source
        count = getattr(self.config, f"{split}_documents")
        assert self.config.vqgan.vqgan
        return f"{EMBEDDED}:split={split},count={count},size={self.config.vqgan.vqgan.model.resolution},seed=0"

    def open(self, split: Split) -> Source:
        return open_source(self.specs[split], split=split)

    def text_tokenizer(self, folder: Path) -> dict[str, Any]:
        documents = usable(self.open("train"), self.config.text_documents)
        lines = (text for document in documents for text in texts(document))
        tokenizer = train_text_tokenizer(lines, self.config.vocabulary.text_size, self.text_model)
        return {"pieces": tokenizer.size}

    def records(self, folder: Path) -> dict[str, Any]:
        images = load_image_tokenizer(self.workdir / "image_tokenizer")
        numbers: dict[str, Any] = {}
        for split in SPLITS:
            manifest = tokenize_source(
                self.open(split),
                folder / split,
                split,
                images.encode,
                TextTokenizer.load(self.text_model),
                self.config.vocabulary,
                images.config.resolution,
                image_tokens=images.image_tokens,
                image_tokenizer=images.fingerprint,
                max_reject_share=self.config.max_reject_share,
            )
            numbers[split] = {name: getattr(manifest, name) for name in ("records", "tokens", "rejects")}
        return numbers

    def memory(self, folder: Path) -> dict[str, Any]:
        """Embeds all records; the neighbours of both splits are documents of the training split."""
        assert self.encoder.clip
        run, rules = self.workdir / "encoder", self.config.selection
        numbers: dict[str, Any] = {}
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        encoder = load_encoder(run, mesh, batch_size=self.encoder.clip.batch_size)
        for split in SPLITS:
            records, out = self.workdir / "records" / split, self._embeddings(split)
            embed(Records(records), self.open(split), encoder, out, query_dropout=rules.query_dropout)
            write_places(out, Places(str(records), str(run)))
        bank = Embeddings(self._embeddings("train"))
        for split in SPLITS:
            queries, out = Embeddings(self._embeddings(split)), self._neighbours(split)
            find_neighbours(queries, [bank], out, rules, BackendConfig(), mesh)
            table = NeighbourTable(out)
            found = (table.rows(np.arange(len(table)))["ids"] >= 0).sum(axis=1)
            numbers[split] = {"candidates": float(found.mean()), "without": int((found < self.retrieved).sum())}
        return numbers

    def decoder(self, folder: Path) -> dict[str, Any]:
        """Trains; with retrieval, the trained decoder is evaluated without it, too: each query alone."""
        lm = self.lm.lm
        assert lm
        if not self.retrieved:
            return _train(self.lm, folder)
        plan = dataclasses.replace(lm.plan, length=lm.plan.length // (1 + self.retrieved))
        alone = dataclasses.replace(self.lm, lm=dataclasses.replace(lm, retrieved=0, plan=plan))
        return _train(self.lm, folder, {"alone": alone})

    def study(self, folder: Path) -> dict[str, Any]:
        run = self.workdir / "decoder"
        trained = TextImageModel.load(run)
        retrieval = None
        if self.retrieved:
            memory = Memory.load(self._embeddings("train"), selection=self.config.selection)
            retrieval = Retrieval(memory, self.retrieved)
            self._show_neighbours(folder)
        models = Models(
            trained=trained,
            untrained=trained.untrained(),
            image_tokenizer=trained.image_tokenizer,
            reader=load_reader(self.workdir / "reader") if self.embedded else None,
            retrieval=retrieval,
        )
        fitting = (document for document in usable(self.open("valid")) if trained.fits(texts(document)[0]))
        documents = list(itertools.islice(fitting, self.config.study.documents))
        return study(models, documents, self.config.study, folder)

    def _show_neighbours(self, folder: Path) -> None:
        records = {split: (Records(self.workdir / "records" / split), self.open(split)) for split in SPLITS}
        table, size = NeighbourTable(self._neighbours("valid")), records["valid"][0].manifest.image_size
        save_neighbours(folder, table, records["valid"], records["train"], self.config.study.shown, size)


def _decides(config: Config) -> dict[str, Any]:
    """What of a run's configuration decides its result: not where and how often it logs or saves."""
    values = to_dict(config)
    values["run"] = {"steps": config.run.steps}
    return values


def _train(config: Config, folder: Path, others: Mapping[str, Config] | None = None) -> dict[str, Any]:
    """Trains, and evaluates the untrained model beside it.

    Args:
      others: under these configurations the trained model is evaluated, too.
    """
    task = make_task(config)
    untrained = evaluate_untrained(task, config.run, config.seed)
    state = train(config, folder, task)
    if int(state.step) < config.run.steps:
        raise SystemExit(f"{folder.name}: stopped after update {int(state.step)}; the same command goes on from there")
    numbers = {"trained": last_evaluation(folder / "metrics.jsonl"), "untrained": untrained}
    return numbers | {name: evaluate(make_task(c), c.run, state) for name, c in (others or {}).items()}
