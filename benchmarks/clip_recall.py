"""How well an encoder that is trained here from nothing finds real photographs by their captions, and the reverse.

    JAX_PLATFORMS=cpu python benchmarks/clip_recall.py --coco FOLDER [--steps 300] [--valid-share 0.2]

FOLDER holds `captions.json` in COCO's format and `images`. `configs/clip.py:small` is trained on some photographs with
all their captions; recall at 1, 5 and 10 is measured on the photographs that were held out, and on as many of those it
was trained on. A caption finds if its photograph is among the k nearest, a photograph if one of its captions is. The
intervals hold 95 % of the means of 2,000 draws of as many photographs with replacement (bootstrap), for captions of one
photograph are not independent. Chance is a random order.

Writes benchmarks/results/clip_recall-DATE.json and .md.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from report import RESULTS, header, table, write

from cm3jax import cli
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Source
from cm3jax.metrics import read_metrics
from cm3jax.models.contrastive import chance_recall, recall
from cm3jax.parallel.mesh import one_device
from cm3jax.retrieval.encoder import DocumentEncoder, load_encoder
from cm3jax.tokens.document import pictures, texts
from cm3jax.tokens.image import fit
from cm3jax.tokens.text import train_text_tokenizer

CONFIG = Path(__file__).parents[1] / "configs" / "clip.py"
VOCABULARY = 512  # of configs/clip.py:small
RECALLS = (1, 5, 10)
DRAWS = 2_000
BATCH = 64


def trained(spec: str, steps: int, workdir: Path) -> tuple[DocumentEncoder, float]:
    """The encoder after `steps` updates on the split "train" of `spec`, and its last loss."""
    captions = [texts(document)[0] for document in open_source(spec, split="train")]
    tokenizer, run = workdir / "text.model", workdir / "run"
    train_text_tokenizer(captions, VOCABULARY, tokenizer)
    values = {"run.steps": steps, "clip.source": spec, "clip.tokenizer": tokenizer, "clip.batch_size": BATCH}
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    if cli.main(["train", f"--config={CONFIG}:small", f"--workdir={run}", *overrides]):
        raise SystemExit("the training did not finish")
    loss = read_metrics(run / "metrics.jsonl")["loss"][1][-1]
    return load_encoder(run, one_device(), batch_size=BATCH), float(loss)


def photographs(source: Source, count: int | None = None) -> list[tuple[np.ndarray, tuple[str, ...]]]:
    """The first `count` photographs of a source with all their captions, each once."""
    found: dict[Any, tuple[np.ndarray, tuple[str, ...]]] = {}
    for document in source:
        key = document.meta["image_id"]
        if key not in found:
            if len(found) == count:
                break
            found[key] = pictures(document)[0], document.meta["captions"]
    return list(found.values())


def recalls(encoder: DocumentEncoder, examples: list[tuple[np.ndarray, tuple[str, ...]]]) -> list[dict[str, Any]]:
    """Recall in both directions, with interval and chance."""
    images = encoder.images(np.stack([fit(pixels, encoder.config.image_size) for pixels, _ in examples]))
    captions = encoder.texts(encoder.tokenizer([caption for _, several in examples for caption in several]))
    owner = np.repeat(np.arange(len(examples)), [len(several) for _, several in examples])
    right = (owner[:, None] == np.arange(len(examples))).astype(np.float32)
    directions: tuple[tuple[Literal["text to image", "image to text"], Any, Any, Any, Any], ...] = (
        ("text to image", captions, images, right, owner),
        ("image to text", images, captions, right.T, np.arange(len(examples))),
    )
    rng, results = np.random.default_rng(0), []
    for name, queries, targets, pairs, of in directions:
        for k in RECALLS:
            rows = [np.flatnonzero(of == image) for image in range(len(examples))]
            shares = np.array([recall(queries[at], targets, pairs[at], k) for at in rows])
            means = shares[rng.integers(len(shares), size=(DRAWS, len(shares)))].mean(axis=1)
            results.append(
                {
                    "direction": name,
                    "k": k,
                    "recall": float(shares.mean()),
                    "interval": np.quantile(means, [0.025, 0.975]).tolist(),
                    "chance": chance_recall(pairs, k),
                }
            )
    return results


def cell(result: dict[str, Any]) -> str:
    low, high = result["interval"]
    return f"{result['recall']:.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, required=True, help="folder with captions.json and images")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--valid-share", type=float, default=0.2, help="of the photographs, held out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    spec = f"coco:{options.coco / 'captions.json'},{options.coco / 'images'},caption=all"
    spec += f",valid_share={options.valid_share}"
    with tempfile.TemporaryDirectory() as folder:
        encoder, loss = trained(spec, options.steps, Path(folder))
    held_out = photographs(open_source(spec, split="valid"))
    seen = photographs(open_source(spec, split="train"), len(held_out))
    report = header() | {"steps": options.steps, "last_loss": loss, "photographs": len(held_out)}
    report |= {"held_out": recalls(encoder, held_out), "seen": recalls(encoder, seen)}
    rows = [
        [result["direction"], str(result["k"]), f"{result['chance']:.1%}", cell(result), cell(trained_on)]
        for result, trained_on in zip(report["held_out"], report["seen"], strict=True)
    ]
    setting = (
        f"`configs/clip.py:small`, {options.steps} steps of {BATCH} pairs, last loss {loss:.2f}; {len(held_out)} "
        "photographs held out, as many of those trained on.\n\n"
    )
    columns = ["direction", "k", "chance", "held out, recall (95 %)", "trained on, recall (95 %)"]
    write("clip_recall", "Recall on real photographs", report, setting + table(columns, rows), options.out)


if __name__ == "__main__":
    main()
