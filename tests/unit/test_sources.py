"""Sources: what they list, what they refuse, and how they are divided and opened."""

import io
import json
import pathlib
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from cm3jax.data.sources.coco import CocoSource
from cm3jax.data.sources.folder import FolderSource
from cm3jax.data.sources.jsonl import JsonlSource
from cm3jax.data.sources.open import open_source
from cm3jax.data.sources.source import Reason, RejectError
from cm3jax.data.sources.split import split_source
from cm3jax.data.sources.tfds import TfdsSource
from cm3jax.data.sources.webdataset import WebDatasetSource
from cm3jax.tokens.document import Text
from cm3jax.tokens.image import encode_png


def png(value: int, side: int = 4) -> bytes:
    return encode_png(np.full((side, side, 3), value, np.uint8))


def plain(document) -> list:
    """Text as text, one-coloured pictures as their value."""
    return [s.text if isinstance(s, Text) else int(s.pixels[0, 0, 0]) for s in document.segments]


def refused(source, index) -> tuple[Reason, str]:
    with pytest.raises(RejectError) as caught:
        source[index]
    assert pickle.loads(pickle.dumps(caught.value)).detail == caught.value.detail
    return caught.value.reason, caught.value.detail


def write(folder: pathlib.Path, files: dict[str, bytes | str]) -> pathlib.Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


BROKEN = {  # file name: (content of the picture, of the caption, why it is refused)
    "b1": (png(1)[:40], "a", Reason.BROKEN_IMAGE),
    "b2": (png(1, 40), "a", Reason.IMAGE_TOO_LARGE),
    "b3": (png(1), b"\xff\xfe\xff", Reason.BAD_ENCODING),
    "b4": (png(1), " \n", Reason.NO_CAPTION),
    "b5": (b"text", "a", Reason.BROKEN_IMAGE),
}


class TestFolder:
    def test_pictures_with_captions_of_both_kinds(self, tmp_path):
        write(tmp_path, {
            "b.png": png(2), "b.txt": "  two\n", "a/x.png": png(1), "a/x.json": '{"caption": "one"}',
            "readme.md": "", ".hidden.png": png(9),
        })  # fmt: skip
        source = FolderSource(tmp_path)
        assert [(d.id, plain(d)) for d in source] == [("a/x", ["one", 1]), ("b", ["two", 2])]

    def test_broken_files_are_refused_with_the_reason(self, tmp_path):
        for stem, (picture, caption, _) in BROKEN.items():
            write(tmp_path, {f"{stem}.png": picture, f"{stem}.txt": caption})
        write(tmp_path, {"b6.png": png(1), "b7.png": png(1), "b7.json": "[1]", "b8.png": png(1), "b8.json": "{"})
        source = FolderSource(tmp_path, max_pixels=100)
        expected = [*(reason for *_, reason in BROKEN.values()), Reason.NO_CAPTION, Reason.MALFORMED, Reason.MALFORMED]
        found = [refused(source, i) for i in range(len(source))]
        assert [reason for reason, _ in found] == expected
        assert all(f"b{i + 1}." in detail for i, (_, detail) in enumerate(found))

    def test_listing_and_options_decide_the_fingerprint(self, tmp_path):
        write(tmp_path, {"a.png": png(1), "a.txt": "a"})
        first = FolderSource(tmp_path).fingerprint()
        assert FolderSource(tmp_path).fingerprint() == first
        assert FolderSource(tmp_path, max_pixels=10).fingerprint() != first
        write(tmp_path, {"b.png": png(1)})
        assert FolderSource(tmp_path).fingerprint() != first

    def test_empty_or_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no folder"):
            FolderSource(tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="no jpg/jpeg/png/webp file"):
            FolderSource(tmp_path)


class TestCoco:
    @staticmethod
    def make(folder: pathlib.Path, **options) -> CocoSource:
        images = [{"id": i, "file_name": f"{i}.png"} for i in (7, 3, 5)] + [{"id": 9, "file_name": "../9.png"}]
        captions = [(3, "three a"), (7, "seven "), (3, "three b"), (9, "out"), (8, "of no image")]
        annotations = [{"image_id": i, "caption": c, "id": n} for n, (i, c) in enumerate(captions)]
        write(folder, {f"images/{i}.png": png(i) for i in (3, 5, 7)} | {"9.png": png(9)})
        write(folder, {"captions.json": json.dumps({"images": images, "annotations": annotations})})
        return CocoSource(folder / "captions.json", folder / "images", **options)

    def test_first_caption(self, tmp_path):
        source = self.make(tmp_path)
        assert [plain(source[i]) for i in (0, 1)] == [["seven", 7], ["three a", 3]]
        assert source[1].id == "3" and source[1].meta == {"image_id": 3, "captions": ("three a", "three b")}
        assert refused(source, 2)[0] == Reason.NO_CAPTION
        assert refused(source, 3)[0] == Reason.UNSAFE_PATH

    def test_all_captions(self, tmp_path):
        source = self.make(tmp_path, caption="all")
        assert len(source) == 5 and source.groups.tolist() == [0, 1, 1, 2, 3]
        assert [(source[i].id, plain(source[i])) for i in (1, 2)] == [("3/0", ["three a", 3]), ("3/1", ["three b", 3])]
        assert source.fingerprint() != self.make(tmp_path).fingerprint()

    def test_missing_picture(self, tmp_path):
        source = self.make(tmp_path)
        (tmp_path / "images" / "7.png").unlink()
        assert refused(source, 0)[0] == Reason.MISSING_FILE

    def test_other_json_is_named(self, tmp_path):
        write(tmp_path, {"images/a.png": png(1), "captions.json": '{"images": []}'})
        with pytest.raises(ValueError, match="captions.json: not COCO captions"):
            CocoSource(tmp_path / "captions.json", tmp_path / "images")

    def test_real_photographs(self, shared_data):
        source = open_source(str(shared_data / "coco"))
        assert len(source) == 259
        assert source[0].segments[0] == Text("A dog sleeping on a show rack in the shoes.")
        assert source[0].segments[1].pixels.shape == (478, 640, 3)


def write_tar(path: pathlib.Path, members: list[tuple[str, bytes | str]], kind: str = "w") -> pathlib.Path:
    with tarfile.open(path, kind) as tar:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


class TestWebDataset:
    def test_samples_over_several_tars(self, tmp_path):
        first = [("d/a.png", png(1)), ("d/a.txt", "one"), ("b.json", '{"caption": "two"}'), ("b.png", png(2))]
        write_tar(tmp_path / "0.tar", first)
        write_tar(tmp_path / "1.tar", [("c.cls", "3"), ("c.PNG", png(3)), ("c.txt", "three")])
        source = WebDatasetSource(tmp_path)
        assert [(d.id, plain(d)) for d in source] == [("d/a", ["one", 1]), ("b", ["two", 2]), ("c", ["three", 3])]
        assert len(WebDatasetSource(str(tmp_path / "?.tar"))) == 3
        assert [plain(d) for d in pickle.loads(pickle.dumps(source))] == [plain(d) for d in source]

    def test_broken_samples_are_refused(self, tmp_path):
        members = [(f"{k}.{s}", c) for k, (p, t, _) in BROKEN.items() for s, c in (("png", p), ("txt", t))]
        write_tar(tmp_path / "0.tar", [*members, ("c1.png", png(1)), ("c2.txt", "a")])
        source = WebDatasetSource(tmp_path, max_pixels=100)
        expected = [*(reason for *_, reason in BROKEN.values()), Reason.NO_CAPTION, Reason.NO_IMAGE]
        assert [refused(source, i)[0] for i in range(len(source))] == expected

    def test_segments_name_members_of_their_sample(self, tmp_path):
        segments = [{"image": "1.png"}, {"text": " between "}, {"image": "0.png"}]
        members = [
            ("a.json", json.dumps({"id": "x/y.z", "segments": segments})),
            ("a.0.png", png(4)),
            ("a.1.png", png(5)),
        ]
        members += [("b.json", '{"segments": [{"image": "../0.png"}]}'), ("c.json", '{"segments": []}')]
        source = WebDatasetSource(write_tar(tmp_path / "0.tar", members))
        assert (source[0].id, plain(source[0])) == ("x/y.z", [5, " between ", 4])
        assert [refused(source, i)[0] for i in (1, 2)] == [Reason.MISSING_FILE, Reason.MALFORMED]

    def test_an_unfinished_ingest_is_not_opened(self, tmp_path):
        write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", "one")])
        write(tmp_path, {"settings.json": "{}"})
        with pytest.raises(ValueError, match="ingest is not finished"):
            open_source(str(tmp_path))
        write(tmp_path, {"manifest.json": "{}"})
        assert len(open_source(str(tmp_path))) == 1

    def test_links_are_not_followed(self, tmp_path):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            info = tarfile.TarInfo("a.txt")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(info)
        reason, detail = refused(WebDatasetSource(tmp_path), 0)
        assert reason == Reason.MALFORMED and detail.endswith("0.tar:a.txt: not a regular file")

    def test_repeated_keys_are_samples_of_their_own(self, tmp_path):
        write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", "1"), ("a.png", png(2)), ("a.txt", "2")])
        assert [plain(d) for d in WebDatasetSource(tmp_path)] == [["1", 1], ["2", 2]]

    def test_compressed_or_cut_tars_are_named(self, tmp_path):
        write_tar(tmp_path / "z.tar", [("a.txt", "1")], "w:gz")
        with pytest.raises(ValueError, match="z.tar: not an uncompressed tar"):
            WebDatasetSource(tmp_path)
        whole = write_tar(tmp_path / "z.tar", [("a.txt", "1" * 5000)]).read_bytes()
        (tmp_path / "z.tar").write_bytes(whole[:2000])
        with pytest.raises(ValueError, match="z.tar: not an uncompressed tar file .unexpected end of data"):
            WebDatasetSource(tmp_path)

    def test_real_photographs(self, shared_data):
        source = open_source(str(shared_data / "clothing"))
        assert len(source) == 3_409
        assert source[3_408].segments[1].pixels.shape == (128, 128, 3)
        assert source[0].id.startswith("train-dress-")


class TestJsonl:
    def test_both_forms(self, tmp_path):
        write(tmp_path, {"p/1.png": png(1), "2.png": png(2)})
        rows = [
            {"caption": " one ", "image": "p/1.png", "id": "x"},
            {"text": "only text"},
            {"segments": [{"image": "2.png"}, {"text": " in between "}, {"image": "p/1.png"}, {"text": ""}]},
        ]
        lines = [json.dumps(row) for row in rows]
        write(tmp_path, {"d.jsonl": f"{lines[0]}\n\n{lines[1]}\r\n \n{lines[2]}"})
        source = JsonlSource(tmp_path / "d.jsonl")
        assert [(d.id, plain(d)) for d in source] == [
            ("x", ["one", 1]), ("3", ["only text"]), ("5", [2, " in between ", 1, ""]),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"caption": "a", "image": "../secret.png"}', Reason.UNSAFE_PATH),
            ('{"caption": "a", "image": "/etc/hostname"}', Reason.UNSAFE_PATH),
            ('{"caption": "a", "image": "link.png"}', Reason.UNSAFE_PATH),
            ('{"caption": "a", "image": "no\\u0000.png"}', Reason.UNSAFE_PATH),
            ('{"caption": "a", "image": "no.png"}', Reason.MISSING_FILE),
            ('{"caption": "a", "image": "."}', Reason.MISSING_FILE),
            ('{"caption": "a", "image": 3}', Reason.MALFORMED),
            ('{"image": "1.png"}', Reason.NO_CAPTION),
            ('{"caption": ["a"]}', Reason.NO_CAPTION),
            ('{"caption": "\\ud800"}', Reason.BAD_ENCODING),
            ('{"caption": "a", "image": "\\ud800.png"}', Reason.BAD_ENCODING),
            ('{"segments": []}', Reason.MALFORMED),
            ('{"segments": [{"audio": "x"}]}', Reason.MALFORMED),
            ('{"segments": "abc"}', Reason.MALFORMED),
            ("[" * 100_000, Reason.MALFORMED),
            ("9" * 5_000, Reason.MALFORMED),
            ("{'caption'}", Reason.MALFORMED),
            ("3", Reason.MALFORMED),
        ],
    )
    def test_bad_lines_are_refused(self, tmp_path, line, reason):
        lines = f'{line}\n{{"text": "good"}}\n'
        folder = write(tmp_path, {"secret.png": png(1), "d/1.png": png(1), "d/a.jsonl": lines}) / "d"
        (folder / "link.png").symlink_to(tmp_path / "secret.png")
        source = JsonlSource(folder / "a.jsonl")
        assert refused(source, 0)[0] == reason
        assert plain(source[1]) == ["good"]


class TestTfds:
    @staticmethod
    def make(folder: pathlib.Path) -> pathlib.Path:
        features = tfds.features.FeaturesDict({
            "depth": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "title": tfds.features.Text(),
        })  # fmt: skip
        examples = [{"depth": png(99), "image": png(i), "label": i % 2, "title": f" number {i} "} for i in range(3)]
        examples.append({"depth": png(99), "image": png(3)[:30], "label": 0, "title": "cut"})
        writer = ArrayRecordWriter(str(folder / "toy-train.array_record-00000-of-00001"), "group_size:1")
        for example in examples:
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="toy", split="train", filetype_suffix="array_record"
        )
        split = tfds.core.SplitInfo(name="train", shard_lengths=[4], num_bytes=0, filename_template=template)
        tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], check_data=False)
        return folder

    def test_text_and_labels(self, tmp_path):
        source = TfdsSource(self.make(tmp_path))
        assert [plain(source[i]) for i in range(3)] == [[f"number {i}", i] for i in range(3)]
        assert refused(source, 3)[0] == Reason.BROKEN_IMAGE
        labels = open_source(f"tfds:{tmp_path},text_key=label,split=train[:2]")
        assert [(d.id, plain(d)) for d in labels] == [("train[:2]/0", ["cat", 0]), ("train[:2]/1", ["dog", 1])]
        assert labels.fingerprint() != source.fingerprint()

    def test_missing_parts_are_named(self, tmp_path):
        self.make(tmp_path)
        with pytest.raises(ValueError, match="no split 'test', found train"):
            TfdsSource(tmp_path, split="test")
        with pytest.raises(ValueError, match="feature 'caption' cannot be used, found depth: Image, image"):
            TfdsSource(tmp_path, text_key="caption")
        with pytest.raises(FileNotFoundError, match="no dataset no_such_dataset"):
            TfdsSource("no_such_dataset", data_dir=tmp_path)


class TestSplit:
    @staticmethod
    def texts(folder: pathlib.Path, count: int) -> JsonlSource:
        write(folder, {"d.jsonl": "".join(f'{{"text": "{i}"}}\n' for i in range(count))})
        return JsonlSource(folder / "d.jsonl")

    def test_parts_are_disjoint_and_complete(self, tmp_path):
        source = self.texts(tmp_path, 100)
        train, valid = (split_source(source, split, valid_share=0.1, seed=3) for split in ("train", "valid"))
        ids = [[d.id for d in part] for part in (train, valid)]
        assert len(valid) == 10 and sorted(ids[0] + ids[1]) == sorted(d.id for d in source)
        assert ids[1] == [d.id for d in split_source(source, "valid", valid_count=10, seed=3)]
        assert ids[1] != [d.id for d in split_source(source, "valid", valid_count=10, seed=4)]
        assert train.fingerprint() != valid.fingerprint() != source.fingerprint()

    def test_captions_of_one_picture_stay_together(self, tmp_path):
        source = TestCoco.make(tmp_path, caption="all")
        for seed in range(8):
            train, valid = (split_source(source, split, valid_count=2, seed=seed) for split in ("train", "valid"))
            groups = [set(source.groups[part._indices]) for part in (train, valid)]
            assert len(groups[1]) == 2 and not groups[0] & groups[1]

    def test_an_empty_part_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="5 of 5 documents for valid leaves a part empty"):
            split_source(self.texts(tmp_path, 5), "train", valid_count=5)
        with pytest.raises(ValueError, match="split 'test'"):
            split_source(self.texts(tmp_path, 5), "test")


class TestOpen:
    def test_specs_and_guesses_open_the_same(self, tmp_path):
        TestCoco.make(tmp_path / "coco")
        write(tmp_path / "folder", {"a.png": png(1), "a.txt": "a"})
        write(tmp_path / "lines", {"d.jsonl": '{"text": "a"}\n'})
        (tmp_path / "tars").mkdir()
        write_tar(tmp_path / "tars" / "0.tar", [("a.png", png(1)), ("a.txt", "a")])
        specs = {
            f"coco:{tmp_path}/coco/captions.json,{tmp_path}/coco/images": tmp_path / "coco",
            f"folder:{tmp_path}/folder": tmp_path / "folder",
            f"jsonl:{tmp_path}/lines/d.jsonl": tmp_path / "lines",
            f"webdataset:{tmp_path}/tars": tmp_path / "tars",
        }
        for spec, path in specs.items():
            spelled, guessed = open_source(spec), open_source(str(path))
            assert type(spelled) is type(guessed) and spelled.fingerprint() == guessed.fingerprint()

    def test_options_and_division(self, tmp_path):
        TestSplit.texts(tmp_path, 50)
        spec = f"jsonl:{tmp_path}/d.jsonl,valid_count=5,split_seed=1"
        train, valid = open_source(spec, "train"), open_source(spec, "valid")
        assert (len(train), len(valid), len(open_source(spec))) == (45, 5, 50)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("foldr:/tmp", "no such kind and no such path; did you mean folder:"),
            ("coco:a.json", "1 places, coco takes 2"),
            ("folder:", "0 places, folder takes 1"),
            ("scenes:here", "1 places, scenes takes 0"),
            ("scenes:cuont=3", "unknown option 'cuont'; did you mean count"),
            ("scenes:count=many", "count='many', expected int"),
            ("coco:a,b,caption=some", 'caption=\'some\', expected "first" or "all"'),
        ],
    )
    def test_bad_specs(self, spec, message):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(spec)

    def test_a_folder_of_nothing_known(self, tmp_path):
        with pytest.raises(ValueError, match="cannot tell what it is; looked for"):
            open_source(str(tmp_path))

    def test_scenes_have_their_own_split(self):
        train, valid = open_source("scenes:count=3,size=32", "train"), open_source("scenes:count=3,size=32", "valid")
        assert len(train) == len(valid) == 3 and train[0].id != valid[0].id


@pytest.mark.parametrize("index", [-1, 1])
def test_indices_beyond_the_source_end_it(tmp_path, index):
    write(tmp_path, {"a.png": png(1), "a.txt": "a"})
    with pytest.raises(IndexError, match=f"document {index} of 1"):
        FolderSource(tmp_path)[index]


def test_grey_photograph_becomes_rgb(tmp_path):
    buffer = io.BytesIO()
    PIL.Image.new("L", (4, 4), 7).save(buffer, "PNG")
    write(tmp_path, {"a.png": buffer.getvalue(), "a.txt": "a"})
    assert FolderSource(tmp_path)[0].segments[1].pixels.shape == (4, 4, 3)
