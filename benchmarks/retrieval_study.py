"""What retrieved documents are worth: bits per token of held-out documents, with 0, 1 and 2 of them in front.

Three kinds of decoder are trained on the same number of tokens of one quickstart's records: one on samples of a
document with two retrieved ones in front; one on documents that stand alone, three in a sequence; and, to tell what it
costs to look at other documents as such, one on the same three that see each other. All are then evaluated on the
tokens of the held-out documents themselves. Interrupted, the same command goes on.

    python benchmarks/retrieval_study.py --quickstart runs/quickstart [--steps 800] [--batch-size 6] [--seeds 3]

Writes benchmarks/results/retrieval_study-DATE.json and .md.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, header, write
from report import table as markdown

from cm3jax.config import build, to_dict
from cm3jax.loop import evaluate
from cm3jax.reliability.checkpoint import read_run_config
from cm3jax.stages import Stages
from cm3jax.tasks.lm import LMConfig, LMTask
from cm3jax.train import Config, make_task, train

RETRIEVED = 2
# Documents that are retrieved, and whether samples of one sequence are kept apart.
KINDS = {"with retrieval": (RETRIEVED, True), "without retrieval": (0, True), "strangers in sight": (0, False)}
FIGURES = ("bits_per_query_token", "bits_per_query_text_token", "bits_per_query_image_token")


def decoder(run: Config, kind: str, steps: int, batch_size: int, seed: int) -> Config:
    """The quickstart's decoder on sequences of three documents: a sample of as many, or as many samples of one."""
    assert run.lm
    documents, tokens = 1 + RETRIEVED, document_tokens(run.lm)
    retrieved, isolate = KINDS[kind]
    # One masked span a sequence at most, as the paper has on average: a picture that is moved behind all documents is
    # far from its caption, and in so short a training that would be measured in place of retrieval.
    plan = dataclasses.replace(run.lm.plan, length=documents * tokens, span_rate=1.0, max_spans=1, packing="whole")
    lm = dataclasses.replace(
        run.lm,
        model=dataclasses.replace(run.lm.model, max_len=plan.length),
        plan=plan,
        optim=dataclasses.replace(run.lm.optim, warmup_steps=steps // 20),
        isolate_samples=isolate,
        retrieved=retrieved,
        batch_size=batch_size,
    )
    loop = dataclasses.replace(
        run.run, steps=steps, checkpoint=dataclasses.replace(run.run.checkpoint, every=max(1, steps // 4))
    )
    return dataclasses.replace(run, run=loop, lm=lm, seed=seed)


def document_tokens(lm: LMConfig) -> int:
    """Room for one document in a sequence of the quickstart."""
    return lm.plan.length // (1 + lm.retrieved)


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """Trains; then bits of the held-out documents by how many retrieved ones stand in front of each."""
    assert config.lm
    state = train(config, folder)
    if int(state.step) < config.run.steps:
        raise SystemExit(f"{folder.name}: stopped after update {int(state.step)}; the same command goes on from there")
    found = {}
    for documents in range(1 + RETRIEVED):
        length = config.lm.plan.length * (1 + documents) // (1 + RETRIEVED)
        plan = dataclasses.replace(config.lm.plan, length=length)
        # One sample a sequence, so that the number of sequences is that of the documents, and all are evaluated.
        lm = dataclasses.replace(config.lm, retrieved=documents, plan=plan, batch_size=16, valid_batches=10_000)
        found[str(documents)] = evaluate(make_task(dataclasses.replace(config, lm=lm)), config.run, state)
    return {"documents in front": found}


def trained_on(task: LMTask, steps: int) -> dict[str, int]:
    """Of all batches of a training: tokens of documents, with their frames; documents; different ones among them."""
    plans = task.examples.plans
    places = map(plans.locate, range(steps * task.batch_size))
    pieces = np.concatenate([plans.epoch(epoch).pieces_of(place) for epoch, place in places])
    records = pieces["record"]
    return {"tokens": int(pieces["length"].sum()), "documents": len(records), "different": len(np.unique(records))}


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each kind of decoder and number of documents in front."""
    rows = []
    for kind, runs in found.items():
        tokens = f"{statistics.fmean(run['tokens'] for run in runs) / 1e6:.2f} M"
        different = f"{statistics.fmean(run['different'] for run in runs):.0f}"
        for documents in runs[0]["documents in front"]:
            figures = (spread([run["documents in front"][documents][name] for run in runs]) for name in FIGURES)
            rows.append([kind, tokens, different, documents, *figures])
    columns = ["trained", "tokens", "different documents", "documents in front", "bits per token", "text", "image"]
    return markdown(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/retrieval_study"))
    parser.add_argument("--steps", type=int, default=800, help="updates of each training")
    parser.add_argument("--batch-size", type=int, default=6, help="sequences of three documents")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    run = build(Config, read_run_config(options.quickstart / "decoder"))
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    seconds = 0.0
    for seed in range(options.seeds):
        for kind in KINDS:
            config = decoder(run, kind, options.steps, options.batch_size, seed)
            name = f"{kind.replace(' ', '_')}-{seed}"
            stage = Stages(options.workdir)  # of its own: no training depends on another
            bits = stage.run(name, to_dict(config), lambda folder, config=config: measure(config, folder))
            task = make_task(config)
            assert isinstance(task, LMTask)
            found[kind].append(bits | trained_on(task, options.steps))
            seconds += stage.records[name]["seconds"]
            print(name, json.dumps(found[kind][-1]), flush=True)
    setting = (
        f"{options.seeds} seeds, mean ± standard deviation; {options.steps} updates of {options.batch_size} sequences "
        f"each; {seconds / 60:.0f} minutes in all.\n\n"
    )
    write("retrieval_study", "Retrieval study", header() | {"found": found}, setting + table(found), options.out)


if __name__ == "__main__":
    main()
