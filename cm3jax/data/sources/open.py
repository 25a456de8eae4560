"""A source from one line of text, or from a path whose kind shows."""

import difflib
import glob
import pathlib
import re
from typing import Any, Literal

from cm3jax.data.sources.coco import CocoSource
from cm3jax.data.sources.folder import FolderSource
from cm3jax.data.sources.jsonl import JsonlSource
from cm3jax.data.sources.reading import IMAGE_SUFFIXES
from cm3jax.data.sources.source import Source
from cm3jax.data.sources.split import split_source
from cm3jax.data.sources.webdataset import WebDatasetSource

_FILE_OPTIONS: dict[str, type] = {"max_pixels": int}
_OPTIONS: dict[str, dict[str, type]] = {
    "scenes": {"split": str, "count": int, "size": int, "seed": int},
    "folder": _FILE_OPTIONS,
    "coco": {"caption": str, **_FILE_OPTIONS},
    "webdataset": _FILE_OPTIONS,
    "jsonl": _FILE_OPTIONS,
    "tfds": {"split": str, "image_key": str, "text_key": str, "data_dir": str, **_FILE_OPTIONS},
}
_SPLIT_OPTIONS: dict[str, type] = {"valid_share": float, "valid_count": int, "split_seed": int}
_SCENES_COUNT = 10_000


def open_source(spec: str, split: Literal["train", "valid"] | None = None) -> Source:
    """Opens what `spec` names:

        scenes[:split=train,count=10000,size=64,seed=0]
        folder:PATH     webdataset:TAR_FOLDER_OR_GLOB     jsonl:PATH
        coco:ANNOTATIONS,IMAGES[,caption=all]
        tfds:NAME_OR_DIRECTORY[,split=train,image_key=..,text_key=..,data_dir=..]
        PATH            one of the above, guessed from what lies there

    All but scenes take `max_pixels=`. With `split`, the part of the source of that name; scenes have their own, every
    other source is divided by `split_source` with the options `valid_share=`, `valid_count=`, `split_seed=`.

    Raises:
      ValueError: unknown kind, option or value.
      FileNotFoundError: nothing there.
    """
    kind, _, body = spec.partition(":")
    if kind in _OPTIONS:
        places, options = _parse(spec, kind, body)
    else:
        (kind, *places), options = _guess(spec), {}
    wanted = {"scenes": 0, "coco": 2}.get(kind, 1)
    if len(places) != wanted or not all(places):
        raise ValueError(f"source {spec!r}: {len(places)} places, {kind} takes {wanted}")
    if kind == "scenes":
        return _scenes(options, split)
    division = {name: options.pop(name) for name in _SPLIT_OPTIONS if name in options}
    source = _open(kind, places, options)
    if split is None:
        return source
    division["seed"] = division.pop("split_seed", 0)
    return split_source(source, split, **division)


def _scenes(options: dict[str, Any], split: str | None) -> Source:
    from cm3jax.data.sources.scenes import ScenesSource  # drawing is not needed to read files

    return ScenesSource(**{"split": "train", "count": _SCENES_COUNT, **options, **({"split": split} if split else {})})


def _open(kind: str, places: list[str], options: dict[str, Any]) -> Source:
    match kind:
        case "folder":
            return FolderSource(places[0], **options)
        case "coco":
            return CocoSource(places[0], places[1], **options)
        case "webdataset":
            return WebDatasetSource(places[0], **options)
        case "jsonl":
            return JsonlSource(places[0], **options)
        case _:
            from cm3jax.data.sources.tfds import TfdsSource  # tfds takes a while to import

            return TfdsSource(places[0], **options)


def _parse(spec: str, kind: str, body: str) -> tuple[list[str], dict[str, Any]]:
    """The places (paths, a name) and the options, typed, of what follows the kind."""
    known = _OPTIONS[kind] | ({} if kind == "scenes" else _SPLIT_OPTIONS)
    places, options = [], {}
    for part in body.split(",") if body else []:
        option = re.fullmatch(r"([a-z_]+)=(.*)", part)
        if not option:
            places.append(part)
            continue
        name, value = option.groups()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"source {spec!r}: unknown option {name!r}; {hint}")
        try:
            options[name] = known[name](value)
        except ValueError:
            raise ValueError(f"source {spec!r}: {name}={value!r}, expected {known[name].__name__}") from None
    return places, options


def _guess(text: str) -> list[str]:
    """The kind and the places of a path, by what lies there."""
    path = pathlib.Path(text)
    if path.suffix == ".jsonl" and path.is_file():
        return ["jsonl", text]
    if path.suffix == ".tar" and (path.is_file() or glob.glob(text)):
        return ["webdataset", text]
    if not path.exists():
        near = difflib.get_close_matches(text.partition(":")[0], _OPTIONS, n=1)
        hint = f"did you mean {near[0]}:?" if near else f"kinds are {', '.join(_OPTIONS)}"
        raise FileNotFoundError(f"source {text!r}: no such kind and no such path; {hint}")
    if (path / "dataset_info.json").is_file():
        return ["tfds", text]
    if (path / "captions.json").is_file() and (path / "images").is_dir():
        return ["coco", str(path / "captions.json"), str(path / "images")]
    if any(path.glob("*.tar")):
        return ["webdataset", text]
    lines = sorted(path.glob("*.jsonl"))
    if len(lines) == 1:
        return ["jsonl", str(lines[0])]
    if any(file.suffix[1:].lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        return ["folder", text]
    raise ValueError(
        f"source {text!r}: cannot tell what it is; looked for dataset_info.json, captions.json with images/, *.tar, "
        f"one *.jsonl, and pictures ({', '.join(IMAGE_SUFFIXES)})"
    )
