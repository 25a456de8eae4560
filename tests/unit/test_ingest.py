"""The ingest job: both ways of running keep the same documents, and a killed job ends as one that was not."""

import io
import json
import pathlib
import tarfile

import numpy as np
import PIL.Image
import pytest

from cm3jax import cli
from cm3jax.data.ingest import local, pipeline
from cm3jax.data.ingest.job import ingest, preview
from cm3jax.data.ingest.settings import IngestConfig, IngestError
from cm3jax.data.records import Records
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Reason
from cm3jax.data.tokenize import tokenize_source
from cm3jax.tokens.document import Text, pictures, texts
from cm3jax.tokens.image import decode_image, encode_png
from cm3jax.tokens.text import train_text_tokenizer
from cm3jax.tokens.vocabulary import Vocabulary

BEAM = "DirectRunner"
CONFIG = IngestConfig(min_short_side=16, max_short_side=48, shard_documents=7, picture_format="png")


@pytest.fixture(params=["none", BEAM], ids=["in_process", "beam"])
def runner(request) -> str:
    if request.param == BEAM:
        pytest.importorskip("apache_beam", reason="APACHE BEAM ABSENT: the pipeline was not run")
    return request.param


def picture(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    """Smooth random waves, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(small).resize((width, height), PIL.Image.Resampling.BICUBIC))


def as_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_lines(folder: pathlib.Path, rows: list[dict | str], files: dict[str, bytes]) -> str:
    """The source line of a jsonl file with these rows and the pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "raw.jsonl").write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return f"jsonl:{folder}/raw.jsonl,max_pixels=20000"


FILES = {f"{i}.png": encode_png(picture(i)) for i in range(8)} | {
    "0-again.png": encode_png(picture(0)),
    "1-jpeg.jpg": as_jpeg(picture(1), 40),
    "2-half.png": encode_png(np.asarray(PIL.Image.fromarray(picture(2)).resize((40, 32)))),
    "3-crop.png": encode_png(picture(3)[1:, 1:]),
    "4-dark.png": encode_png((picture(4) * 0.8).astype(np.uint8)),
    "cut.png": encode_png(picture(9))[:200],
    "small.png": encode_png(picture(10, 12, 30)),
    "long.png": encode_png(picture(11, 20, 100)),
    "huge.png": encode_png(picture(12, 200, 200)),
}
# (line of the source, why it is refused, the document that it repeats); the index is the place in the list.
CASES: list[tuple[dict | str, Reason | None, int | None]] = [
    ({"id": "d0", "caption": "picture number zero", "image": "0.png"}, None, None),
    ({"id": "d1", "caption": "picture number one", "image": "1.png"}, None, None),
    ({"id": "d2", "caption": "picture number two", "image": "2.png"}, None, None),
    ({"id": "cut", "caption": "a cut file", "image": "cut.png"}, Reason.BROKEN_IMAGE, None),
    ({"id": "huge", "caption": "too large", "image": "huge.png"}, Reason.IMAGE_TOO_LARGE, None),
    ({"id": "gone", "caption": "no such file", "image": "gone.png"}, Reason.MISSING_FILE, None),
    ({"id": "out", "caption": "a way out", "image": "../secret.png"}, Reason.UNSAFE_PATH, None),
    ({"id": "../../d0", "caption": "a key that leads out", "image": "5.png"}, Reason.UNSAFE_PATH, None),
    ({"id": "small", "caption": "a small one", "image": "small.png"}, Reason.IMAGE_TOO_SMALL, None),
    ({"id": "long", "caption": "a long one", "image": "long.png"}, Reason.EXTREME_ASPECT, None),
    ({"id": "url", "caption": "https://example.org/1", "image": "5.png"}, Reason.ONLY_URLS, None),
    ({"id": "few", "caption": "DSC_000123.JPG 4/5", "image": "5.png"}, Reason.FEW_LETTERS, None),
    ("{not json", Reason.MALFORMED, None),
    ({"id": "d0", "caption": "the id again", "image": "6.png"}, Reason.DUPLICATE_ID, 0),
    ({"id": "e0", "caption": "picture number zero", "image": "0-again.png"}, Reason.DUPLICATE_DOCUMENT, 0),
    ({"id": "f0", "caption": "another text", "image": "0.png"}, Reason.DUPLICATE_IMAGE, 0),
    ({"id": "g1", "caption": "compressed", "image": "1-jpeg.jpg"}, Reason.NEAR_DUPLICATE_IMAGE, 1),
    ({"id": "g2", "caption": "half the size", "image": "2-half.png"}, Reason.NEAR_DUPLICATE_IMAGE, 2),
    ({"id": "g3", "caption": "comes before the original", "image": "3-crop.png"}, None, None),
    ({"id": "d3", "caption": "picture number three", "image": "3.png"}, Reason.NEAR_DUPLICATE_IMAGE, 18),
    ({"id": "d4", "caption": "picture number four", "image": "4.png"}, None, None),
    ({"id": "g4", "caption": "darker", "image": "4-dark.png"}, Reason.NEAR_DUPLICATE_IMAGE, 20),
    ({"id": "text", "text": "only text, über alles 猫"}, None, None),
    ({"id": "text2", "text": "only text, über alles 猫"}, Reason.DUPLICATE_DOCUMENT, 22),
    ({"id": "mixed", "segments": [{"image": "5.png"}, {"text": " between "}, {"image": "6.png"}]}, None, None),
    ({"id": "h/7", "caption": "picture number seven", "image": "7.png"}, None, None),
]
KEPT = [i for i, (_, reason, _) in enumerate(CASES) if reason is None]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("raw")
    (folder / "secret.png").write_bytes(FILES["0.png"])
    return write_lines(folder / "inside", [row for row, *_ in CASES], FILES)


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory) -> dict[str, bytes]:
    """The files of a job that was never killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ingest(raw, out, CONFIG, runner="none")
    return contents(out)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def plain(segments) -> list:
    return [s.text if isinstance(s, Text) else s.pixels.tolist() for s in segments]


def test_what_is_kept_and_what_is_refused(raw, tmp_path, runner):
    manifest = ingest(raw, tmp_path, CONFIG, runner=runner)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    wanted = [(i, str(reason), winner) for i, (_, reason, winner) in enumerate(CASES) if reason is not None]
    assert [(r["index"], r["reason"]) for r in rejects] == [(i, reason) for i, reason, _ in wanted]
    for reject, (i, _, winner) in zip(rejects, wanted, strict=True):
        row = CASES[i][0]
        assert reject["key"] == (row["id"] if isinstance(row, dict) else str(i + 1))
        assert reject["detail"] and (winner is None or f"document {winner}" in reject["detail"])
    assert manifest.documents == len(KEPT) and manifest.source == len(CASES)
    assert sum(manifest.rejects.values()) == len(rejects)

    before, after = open_source(raw), open_source(str(tmp_path))
    assert [d.id for d in after] == [before[i].id for i in KEPT]
    for i, document in zip(KEPT, after, strict=True):
        assert [type(s) for s in document.segments] == [type(s) for s in before[i].segments]
        assert [s.text for s in document.segments if isinstance(s, Text)] == [
            s.text for s in before[i].segments if isinstance(s, Text)
        ]
        assert all(min(p.shape[:2]) == 48 for p in pictures(document))


def test_both_ways_write_the_same_bytes(raw, whole, tmp_path, runner):
    ingest(raw, tmp_path, CONFIG, runner=runner, workers=1)
    assert contents(tmp_path) == whole


def test_the_output_is_tokenized_as_it_is(raw, tmp_path):
    ingest(raw, tmp_path / "clean", CONFIG, runner="none")
    source = open_source(str(tmp_path / "clean"))
    vocabulary = Vocabulary(text_size=288, image_size=4, sentinels=8, size=320)
    lines = [text for document in source for text in texts(document)]
    tokenizer = train_text_tokenizer(lines, vocabulary.text_size, tmp_path / "text.model")
    manifest = tokenize_source(
        source,
        tmp_path / "records",
        "train",
        lambda images: np.zeros((len(images), 4), np.int32),
        tokenizer,
        vocabulary,
        16,
        image_tokens=4,
        image_tokenizer="zeros",
    )
    records = Records(tmp_path / "records")
    assert manifest.rejects == 0
    assert [records[i].id for i in range(len(records))] == [str(CASES[i][0]["id"]) for i in KEPT]


def test_small_pictures_keep_every_pixel(tmp_path):
    spec = write_lines(tmp_path / "raw", [{"caption": "as it was", "image": "a.png"}], {"a.png": FILES["1.png"]})
    ingest(spec, tmp_path / "out", IngestConfig(picture_format="png"), runner="none")
    assert plain(open_source(str(tmp_path / "out"))[0].segments) == ["as it was", decode_image(FILES["1.png"]).tolist()]


@pytest.mark.parametrize(("level", "kept"), [("none", 4), ("documents", 3), ("images", 2), ("near", 1)])
def test_each_level_also_removes_what_the_one_before_removes(tmp_path, level, kept):
    names = ["1.png", "1.png", "1.png", "1-jpeg.jpg", "2.png"]
    captions = ["a text", "a text", "another text", "another text", "a fifth, for its id"]
    rows = [{"id": f"{i % 4}", "caption": c, "image": n} for i, (c, n) in enumerate(zip(captions, names, strict=True))]
    config = IngestConfig(min_short_side=16, duplicates=level)
    assert ingest(write_lines(tmp_path, rows, FILES), tmp_path / "out", config, runner="none").documents == kept


class Killed(BaseException):
    """Like a signal: nothing catches it."""


@pytest.mark.parametrize("at", [2, 3])
def test_killed_and_started_again_gives_the_same_bytes(raw, whole, tmp_path, monkeypatch, runner, at):
    """Killed in the middle of writing a shard, then finished by either way of running."""
    module = local if runner == "none" else pipeline
    write = module.write_shard

    def fragile(out, settings, shard, items):
        def cut():
            for number, item in enumerate(items):
                if shard == at and number == 3:
                    raise Killed if runner == "none" else OSError("killed")
                yield item

        write(out, settings, shard, cut())

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_shard", fragile)
        with pytest.raises((Killed, OSError, RuntimeError)):
            ingest(raw, tmp_path, CONFIG, runner=runner, workers=2)
    assert not (tmp_path / "manifest.json").exists()
    assert len(list(tmp_path.glob("shard-*.tar"))) < 4
    with pytest.raises(ValueError, match="ingest is not finished"):
        open_source(f"webdataset:{tmp_path}")
    ingest(raw, tmp_path, CONFIG, runner=runner)
    assert contents(tmp_path) == whole


def test_one_way_finishes_what_the_other_began(raw, whole, tmp_path, runner):
    ingest(raw, tmp_path, CONFIG, runner="none")
    for name in ("manifest.json", "index-00001-of-00004.json", "shard-00003-of-00004.tar"):
        (tmp_path / name).unlink()
    ingest(raw, tmp_path, CONFIG, runner=runner)
    assert contents(tmp_path) == whole


def test_a_finished_job_reads_nothing_again(raw, whole, tmp_path, monkeypatch, runner):
    ingest(raw, tmp_path, CONFIG, runner="none")

    def refuse(*args):
        raise AssertionError("the job ran again")

    monkeypatch.setattr(local, "run", refuse)
    monkeypatch.setattr(pipeline, "run", refuse)
    assert ingest(raw, tmp_path, CONFIG, runner=runner).documents == len(KEPT)
    assert contents(tmp_path) == whole


def test_a_damaged_shard_is_written_again(raw, whole, tmp_path, caplog):
    ingest(raw, tmp_path, CONFIG, runner="none")
    (tmp_path / "shard-00001-of-00004.tar").write_bytes(b"cut")
    ingest(raw, tmp_path, CONFIG, runner="none")
    assert contents(tmp_path) == whole
    assert "shard 1 is written again" in caplog.text


def test_other_settings_in_the_same_directory(raw, tmp_path):
    ingest(raw, tmp_path, CONFIG, runner="none")
    with pytest.raises(IngestError, match=r"other settings: max_short_side 48, now 512; min_short_side 16, now 17"):
        ingest(raw, tmp_path, IngestConfig(min_short_side=17, shard_documents=7, picture_format="png"), runner="none")
    with pytest.raises(IngestError, match="source '[0-9a-f]*', now '[0-9a-f]*'; documents 26, now"):
        ingest(raw, tmp_path, CONFIG, runner="none", split="train")


def test_a_directory_of_something_else_is_left_alone(raw, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(IngestError, match="is not empty and has no settings.json"):
        ingest(raw, tmp_path, CONFIG, runner="none")


def test_nothing_good_is_an_error_that_says_why(raw, tmp_path):
    with pytest.raises(
        IngestError, match="all 26 documents were refused, see .*rejects.jsonl: {.*'text_too_short': 20"
    ):
        ingest(raw, tmp_path, IngestConfig(min_short_side=500, min_characters=100), runner="none")
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(IngestError, match="has no document"):
        ingest(write_lines(tmp_path / "empty", [], {}), tmp_path / "out", CONFIG, runner="none")


def test_a_cut_archive_is_named(tmp_path, runner):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(FILES["0.png"])
        tar.addfile(info, io.BytesIO(FILES["0.png"]))
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:2_000])
    with pytest.raises(ValueError, match="0.tar: not an uncompressed tar"):
        ingest(str(tmp_path / "0.tar"), tmp_path / "out", CONFIG, runner=runner)


def test_without_beam_the_extra_is_named(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(IngestError, match=r'pip install "cm3jax\[beam\]", or take --runner none'):
        ingest(raw, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_command_line(raw, tmp_path, capsys, runner):
    out = tmp_path / "out"
    sizes = ["--min-short-side", "16", "--max-short-side", "48", "--shard-documents", "7", "--picture-format", "png"]
    command = ["data", "ingest", "--source", raw, *sizes]
    assert cli.main([*command, "--dry-run"]) == 0
    fates = {line.split()[1]: int(line.split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert fates == preview(raw, CONFIG) and fates["kept"] == len(KEPT) and fates["near_duplicate_image"] == 4
    assert cli.main(command) == 2 and "--out is missing" in capsys.readouterr().err
    beam = [] if runner == "none" else ["--", "--direct_num_workers=1"]
    assert cli.main([*command, "--out", str(out), "--runner", runner, *beam]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["documents"] == len(KEPT)
    assert cli.main([*command, "--out", str(out), "--runner", "none", "--", "--flink_master=x"]) == 2
    assert "['--flink_master=x'] are Beam's, and the runner is 'none'" in capsys.readouterr().err
