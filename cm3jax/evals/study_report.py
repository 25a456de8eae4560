"""The quickstart's report: the numbers first, then what they are made of."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cm3jax.evals.neighbour_pictures import load_neighbours
from cm3jax.evals.report import Report
from cm3jax.evals.study import RETRIEVED
from cm3jax.metrics import read_metrics

COLUMNS = ("trained", "untrained", "chance")
MEANING = """
**trained** is the model of this run, **untrained** the same networks with the weights they start from (pictures are
drawn through the trained image tokenizer), **chance** what one gets without looking: the mean of the pictures
for PSNR, uniform guessing over the ids for bits, naming a value at random for attributes. All figures are of held-out
documents, not of what was retrieved for them; scenes hold out whole combinations of subject, color and place.
"""
READER = """
Attributes of pictures are told by a small network that was trained on true pictures. Its own accuracy on held-out true
pictures bounds what can be measured; its accuracy on reconstructions bounds what the decoder can reach with this image
tokenizer.
"""
NEIGHBOURS = """
Held-out documents and what stood in front of them when the decoder was evaluated: documents of the training split that
the encoder found like them, by their picture and by their text, with the encoder's score. Near-duplicates of the query
and of each other are passed over.
"""
ALONE = """
One decoder, evaluated on the same tokens: those of the held-out documents themselves, with retrieved documents in front
and alone. The neighbours of a held-out document are found by its own picture and text, as in training; when pictures
and captions are generated, by the prompt alone.
"""


def write_report(records: dict[str, Any], workdir: Path, source: str, config: dict[str, Any]) -> None:
    """Writes `workdir/report.html`.

    Args:
      records: of the stages, by name: numbers and seconds.
      config: resolved, as JSON values.
    """
    report = Report("cm3jax quickstart")
    study = records["study"]["numbers"].get("attributes", {})
    report.text(f"Text and image tokens in one model, trained on `{source}` from nothing.")
    report.highlights(_highlights(records, study))
    report.section("Numbers")
    report.text(MEANING)
    report.table(_figures(records, study, config), ("figure", *COLUMNS))
    if study:
        report.text(READER)
        report.table(_attributes(study), ("attribute accuracy", *_attribute_names(study), "mean", "95 % interval"))
    if "alone" in records["decoder"]["numbers"]:
        _retrieval(report, records, study, workdir / "study")
    _pictures(report, workdir / "study")
    report.section("Training")
    for stage, curves in _CURVES.items():
        if stage not in records:
            continue
        metrics = read_metrics(workdir / stage / "metrics.jsonl")
        for title, names, log in curves:
            report.curves({name: metrics[name] for name in names if name in metrics}, title, log=log)
    report.section("Run")
    report.table([(name, round(record["seconds"], 1)) for name, record in records.items()], ("stage", "seconds"))
    report.details("Resolved configuration", json.dumps(config, indent=2))
    report.write(workdir / "report.html")


_CURVES = {
    "image_tokenizer": (
        ("Image tokenizer: reconstruction", ("l1",), False),
        ("Image tokenizer: PSNR of training batches, dB", ("psnr",), False),
        ("Image tokenizer: codebook perplexity of a batch", ("codebook_perplexity",), False),
    ),
    "encoder": (("Encoder: contrastive loss, nats", ("loss",), False),),
    "decoder": (
        ("Decoder: loss, nats per token", ("loss", "text_loss", "image_loss"), False),
        ("Decoder: tokens per second", ("tokens_per_second",), False),
    ),
}


def _highlights(records: dict[str, Any], study: dict[str, Any]) -> dict[str, Any]:
    shown = {"PSNR, dB": round(records["image_tokenizer"]["numbers"]["trained"]["psnr"], 2)}
    shown["bits per image token"] = round(records["decoder"]["numbers"]["trained"]["bits_per_query_image_token"], 2)
    for label, name in (
        ("text to image, attributes right", "text to image"),
        ("captions, attributes right", "caption"),
    ):
        if study:
            shown[label] = f"{study[f'{name}, trained']['mean']:.0%} (chance {study['chance']['mean']:.0%})"
    return shown


def _figures(records: dict[str, Any], study: dict[str, Any], config: dict[str, Any]) -> list[tuple[Any, ...]]:
    images, decoder = records["image_tokenizer"]["numbers"], records["decoder"]["numbers"]
    average = records["study"]["numbers"]["psnr_of_mean_picture"]
    vocabulary = config["vocabulary"]
    uniform = {"text": math.log2(vocabulary["text_size"]), "image": math.log2(vocabulary["image_size"])}
    rows: list[tuple[Any, ...]] = [
        ("image tokenizer: PSNR, dB", images["trained"]["psnr"], images["untrained"]["psnr"], average),
        ("image tokenizer: codes in use", _share(images["trained"]), _share(images["untrained"]), None),
        ("image tokenizer: codebook perplexity", *(images[c]["codebook_perplexity"] for c in COLUMNS[:2]), None),
        *(
            (
                f"decoder: bits per {kind} token",
                *(decoder[c][f"bits_per_query_{kind}_token"] for c in COLUMNS[:2]),
                bits,
            )
            for kind, bits in uniform.items()
        ),
    ]
    for label in ("text to image", "caption"):
        if study:
            shares = [study[f"{label}, {column}"]["mean"] for column in COLUMNS[:2]]
            rows.append((f"{label}: attributes right", *map(_percent, (*shares, study["chance"]["mean"]))))
    return rows


def _retrieval(report: Report, records: dict[str, Any], study: dict[str, Any], folder: Path) -> None:
    report.section("Retrieval")
    report.text(ALONE)
    decoder = records["decoder"]["numbers"]
    rows: list[tuple[Any, ...]] = [
        (
            f"decoder: bits per {kind}token of the query",
            *(decoder[c][f"bits_per_query_{kind.replace(' ', '_')}token"] for c in ("trained", "alone")),
        )
        for kind in ("", "text ", "image ")
    ]
    for label in ("text to image", "caption"):
        if study:
            shares = (study[f"{label}, {name}"]["mean"] for name in (RETRIEVED, "trained"))
            rows.append((f"{label}: attributes right", *map(_percent, shares)))
    report.table(rows, ("figure", "with retrieved documents", "without"))
    encoder = records["encoder"]["numbers"]["trained"]
    report.table(
        [
            (
                way.replace("_", " "),
                *map(_percent, (encoder[f"{way}_recall_{k}"] for k in (1, 10))),
                _percent(encoder[f"{way}_chance_10"]),
            )
            for way in ("text_to_image", "image_to_text")
        ],
        ("encoder: held-out pairs", "recall at 1", "at 10", "at 10 by chance"),
    )
    report.text(NEIGHBOURS)
    report.image_grid(load_neighbours(folder))


def _attributes(study: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (
            row,
            *(_percent(values[name]) for name in (*_attribute_names(study), "mean")),
            " – ".join(map(_percent, values["interval"])) if "interval" in values else None,
        )
        for row, values in study.items()
    ]


def _attribute_names(study: dict[str, Any]) -> list[str]:
    return [name for name in study["chance"] if name not in ("mean", "interval")]


def _pictures(report: Report, folder: Path) -> None:
    texts = json.loads((folder / "texts.json").read_text())
    with np.load(folder / "pictures.npz", allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    report.section("Text to image")
    report.text("Pictures for captions of held-out documents: true picture, drawn by the trained and untrained model.")
    drawn = [name for name in ("trained", RETRIEVED, "untrained") if name in found]
    report.image_grid(
        [
            [(found["originals"][i], caption), *((found[name][i], name) for name in drawn)]
            for i, caption in enumerate(texts["captions"])
        ]
    )
    report.section("Image to text")
    report.image_grid(
        [
            [
                (picture, f"true: {caption}\n→ {written}")
                for picture, caption, written in zip(
                    found["originals"], texts["captions"], texts["trained"], strict=True
                )
            ]
        ]
    )
    report.section("Image tokenizer")
    report.pairs(found["originals"], found["reconstructions"], "Held-out pictures and their reconstructions")


def _share(numbers: dict[str, float]) -> str:
    return _percent(numbers["codebook_usage"])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
