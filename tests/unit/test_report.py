"""The HTML report: whole, self-contained, and everything that is put in comes out as text."""

import base64
import html
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cm3jax.evals.plots import PALETTE, line_chart
from cm3jax.evals.report import Report
from cm3jax.evals.run_report import write_run_report
from cm3jax.metrics import MetricsWriter
from cm3jax.reliability.goodput import Ledger

HOSTILE = """<script>alert(1)</script> " onerror='x' <img src=http://a/b> &amp; {title} $\\frac \x00 \udcff"""
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\udcff", "\ufffd")
VOID = {"meta", "img", "br", "path", "use"}


class Page(HTMLParser):
    """Checks that tags nest; collects tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.tags, self.words = [], [], []
        self.feed(page)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def picture(seed=0, shape=(8, 12, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def decoded(img):
    kind, data = img["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def full_report(words):
    report = Report(words)
    report.section(words)
    report.text(words)
    report.highlights({words: words})
    report.table([[words, 1.0]], [words, "n"], words)
    report.curves({words: ([1, 2], [0.5, 0.25])}, words)
    report.image_grid([[(picture(), words)]], words)
    report.pairs([picture()], [picture(1)], words)
    report.details(words, words)
    return report


def test_hostile_text_stays_text_everywhere():
    page = Page(full_report(HOSTILE).render())
    harmless = Page(full_report("plain").render())
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attrs) for _, attrs in page.tags] == [set(attrs) for _, attrs in harmless.tags]
    # Title and heading of the page, contents, section, text, highlight (2), table (3), curves (2), pictures (2),
    # pairs, details (2).
    assert page.text.count(SHOWN) == 17
    assert [img["alt"] for img in page.all("img")] == [SHOWN, "original 1", "reconstruction 1"]


def test_page_fetches_nothing_and_runs_nothing():
    page = Page(full_report("plain").render())
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "form"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert re.findall(r"url\((?!#)", full_report("plain").render()) == []
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


def test_pictures_are_stored_exactly():
    report = Report("pictures")
    grey, colour, large = picture(shape=(5, 7)), picture(), picture(shape=(128, 64, 3))
    report.image_grid([[(grey, "grey"), (colour, "colour")], [(large, "large")]])
    images = Page(report.render()).all("img")
    for img, expected in zip(images, (grey, colour, large), strict=True):
        np.testing.assert_array_equal(decoded(img), expected)
    assert [img.get("class") for img in images] == ["small", "small", None]
    assert (images[0]["width"], images[0]["height"]) == ("7", "5")


def test_pairs_stand_side_by_side():
    originals, copies = picture(shape=(2, 8, 8, 3)), picture(1, shape=(2, 8, 8, 3))
    report = Report("pairs")
    report.pairs(originals, copies)
    images = Page(report.render()).all("img")
    for img, expected in zip(images, (originals[0], copies[0], originals[1], copies[1]), strict=True):
        np.testing.assert_array_equal(decoded(img), expected)
    with pytest.raises(ValueError, match="2 originals but 1 reconstructions"):
        report.pairs(originals, copies[:1])


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_named(bad):
    with pytest.raises(ValueError, match=r"picture 'the cat': expected uint8 \[H, W, 3\]"):
        Report("bad").image_grid([[(bad, "the cat")]])


def test_contents_lead_to_the_sections():
    report = Report("sections")
    report.text("before any section")
    report.section("One")
    report.section("Two")
    page = Page(report.render())
    anchors = [a["href"] for a in page.all("a")]
    assert anchors == ["#section-1", "#section-2"]
    assert [f"#{section['id']}" for section in page.all("section")] == anchors


def test_a_report_without_sections_has_no_contents():
    report = Report("short")
    report.text("all")
    assert not Page(report.render()).all("nav")


def test_text_marks():
    report = Report("text")
    report.text("one\nline with **bold** and `code <b>`\n\n- first\n- second **x**")
    body = report.render().split("<main>")[1]
    assert "<p>one line with <strong>bold</strong> and <code>code &lt;b&gt;</code></p>" in body
    assert "<ul><li>first</li><li>second <strong>x</strong></li></ul>" in body


def test_table_cells():
    report = Report("table")
    report.table(
        [["a", 0.123456, None, np.int64(1234567)], ["b", float("nan"), 2, np.float32(1e-7)]], ["n", "x", "y", "z"]
    )
    cells = re.findall(r"<td(?: class=\"(number)\")?>([^<]*)</td>", report.render())
    assert cells == [
        ("", "a"), ("number", "0.1235"), ("number", "–"), ("number", "1,234,567"),
        ("", "b"), ("number", "–"), ("number", "2"), ("number", "1e-07"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="row 1 has 1 cells, the header 2"):
        report.table([[1, 2], [3]], ["a", "b"])


def test_empty_table_and_empty_curves():
    report = Report("empty")
    report.table([], ["a"])
    report.curves({"loss": ([], [])}, "Loss")
    page = Page(report.render())
    assert "no values" in page.text
    assert not page.all("svg")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0, np.nan, 3.0], [np.nan] * 3, [-1.0, 0.0, -2.0], [np.inf, 1.0, 2.0]])
def test_any_values_can_be_drawn(values, log):
    svg = line_chart({"a": ([0, 1, 2], values)}, log=log, identity="x")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "nan" not in svg


def test_a_chart_draws_each_series_in_its_colour_and_the_page_colours_the_rest():
    svg = line_chart({"a": ([0, 1], [1, 2]), "b": ([0], [1.5])}, log=False, identity="x")
    assert svg.count(PALETTE[0]) == 1
    assert PALETTE[1] in svg and PALETTE[2] not in svg
    assert "currentColor" in svg and "#010203" not in svg


@pytest.mark.parametrize(("gap", "log"), [(np.nan, False), (np.inf, False), (0.0, True), (-1.0, True)])
def test_a_value_that_cannot_be_drawn_leaves_a_gap(gap, log):
    svg = line_chart({"a": ([0, 1, 2, 3, 4], [1.0, 2.0, gap, 2.0, 1.0])}, log=log, identity="x")
    line = svg[: svg.index(PALETTE[0])].rpartition('<path d="')[2]
    assert re.findall("[A-Z]", line) == ["M", "L", "M", "L"]


def test_charts_of_one_page_share_no_ids():
    report = Report("charts")
    for _ in range(2):
        report.curves({"loss": ([0, 1], [1.0, 2.0])}, "Loss")
    clips = re.findall(r'<clipPath id="([^"]+)"', report.render())
    assert len(clips) == len(set(clips)) == 2


def test_series_of_unequal_length_are_named():
    with pytest.raises(ValueError, match="curve 'loss': 2 steps but 1 values"):
        Report("bad").curves({"loss": ([1, 2], [1.0])}, "Loss")


def test_write_is_whole_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "out" / "report.html"
    report = full_report("plain")
    report.write(path)
    report.write(path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert html.unescape(path.read_text(encoding="utf-8")).startswith("<!DOCTYPE html>")
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def test_shares_fill_the_bar_and_are_named():
    report = Report("r")
    report.shares({"step": 3.0, HOSTILE: 1.0, "restart": 0.0}, "Time")
    page = Page(report.render())
    widths = [float(m) for m in re.findall(r"width:([\d.]+)%", report.render().split("</style>")[1])]
    assert widths == [75.0, 25.0]
    assert "step 75.0%" in page.text and f"{SHOWN} 25.0%" in page.text and "restart" not in page.text


def test_the_report_of_a_run_has_curves_and_time(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1 / step, "text_loss": 2 / step, "mfu": 0.5, "eval/psnr": step})
    seconds = iter([0.0, 1.0, 4.0, 4.0])
    ledger = Ledger(tmp_path / "goodput.jsonl", lambda: next(seconds))
    ledger.enter("step")
    ledger.enter("eval")
    ledger.close()
    page = Page(write_run_report(tmp_path).read_text())
    for text in ("loss", "text_loss", "evaluation: psnr", "init 25.0%", "step 75.0%", "updates", "goodput"):
        assert text in page.text
    assert len(page.all("svg")) == 3
