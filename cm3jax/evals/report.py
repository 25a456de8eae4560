"""A report as one static HTML file: pictures and charts are inside it, no script runs, nothing is fetched."""

import base64
import datetime
import html
import io
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cm3jax import __version__
from cm3jax.evals.plots import Series, line_chart, series_colour
from cm3jax.files import write_atomic

Picture = UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W"]
Cell = str | int | float | None

# Pictures below this many pixels a side are magnified without smoothing, so that the pixels of a model show.
SMALL_PICTURE = 128

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{contents}</header>
<main>
{body}
</main>
<footer>cm3jax {version}, written {written}</footer>
</body>
</html>
"""


class Report:
    """Collects sections in reading order; `write` makes the file. All text given to it is escaped.

    Args:
      title: of the page.
    """

    def __init__(self, title: str):
        self.title = title
        self._sections: list[str] = []
        self._parts: list[str] = []
        self._chart_numbers = itertools.count()

    def section(self, title: str) -> None:
        """Begins a section, which the table of contents lists."""
        if self._sections:
            self._parts.append("</section>")
        self._sections.append(title)
        self._parts.append(f'<section id="section-{len(self._sections)}">\n<h2>{_escape(title)}</h2>')

    def text(self, text: str) -> None:
        """Paragraphs parted by blank lines; a paragraph of lines that begin "- " is a list; **bold** and `code`."""
        for block in re.split(r"\n\s*\n", text.strip()):
            lines = [line.strip() for line in block.splitlines()]
            if all(line.startswith("- ") for line in lines):
                items = "".join(f"<li>{_inline(line[2:])}</li>" for line in lines)
                self._parts.append(f"<ul>{items}</ul>")
            else:
                self._parts.append(f"<p>{_inline(' '.join(lines))}</p>")

    def highlights(self, numbers: Mapping[str, Cell]) -> None:
        """The few numbers that a reader looks for first, large: label -> value."""
        cards = "".join(
            f"<div><dt>{_escape(label)}</dt><dd>{_escape(_format(value))}</dd></div>"
            for label, value in numbers.items()
        )
        self._parts.append(f'<dl class="highlights">{cards}</dl>')

    def table(self, rows: Iterable[Sequence[Cell]], header: Sequence[str], caption: str = "") -> None:
        """Rows under a header; columns of numbers stand right, floats have four significant digits, None is a dash.

        Raises:
          ValueError: a row has more or fewer cells than the header.
        """
        rows = [list(row) for row in rows]
        for number, row in enumerate(rows):
            if len(row) != len(header):
                raise ValueError(f"table {caption!r}: row {number} has {len(row)} cells, the header {len(header)}")
        numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
        head = _table_row("th", header, numeric)
        body = "".join(_table_row("td", row, numeric) for row in rows)
        self._parts.append(
            f'<figure class="table">{_caption(caption)}<div class="scroll"><table>'
            f"<thead>{head}</thead><tbody>{body}</tbody></table></div></figure>"
        )

    def curves(self, curves: Mapping[str, Series], title: str, log: bool = False) -> None:
        """A line chart: name -> (steps [N], values [N]), as `read_metrics` returns them; series without values are
        left out.

        Args:
          log: logarithmic y axis.
        """
        drawn = {name: series for name, series in curves.items() if len(series[0])}
        if not drawn:
            self._parts.append(f'<figure class="chart">{_caption(title)}<p class="quiet">no values</p></figure>')
            return
        svg = line_chart(drawn, log=log, identity=f"chart-{next(self._chart_numbers)}")
        labelled = svg.replace("<svg", f'<svg role="img" aria-label="{_escape(title)}"', 1)
        self._parts.append(f'<figure class="chart">{_caption(title)}{labelled}{_legend(drawn)}</figure>')

    def shares(self, parts: Mapping[str, float], title: str) -> None:
        """One bar of which each part (name -> amount, not negative) takes its share; parts of 0 are left out."""
        total = sum(parts.values())
        drawn = {f"{name} {amount / total:.1%}": amount / total for name, amount in parts.items() if amount}
        bar = "".join(
            f'<span style="width:{share:.4%};background:{series_colour(index)}"></span>'
            for index, share in enumerate(drawn.values())
        )
        self._parts.append(
            f'<figure class="chart">{_caption(title)}<div class="shares" role="img" aria-label="{_escape(title)}">{bar}'
            f"</div>{_legend(drawn)}</figure>"
        )

    def image_grid(self, rows: Iterable[Sequence[tuple[Picture, str]]], title: str = "") -> None:
        """Rows of (picture uint8 [H, W, 3] or [H, W], caption).

        Raises:
          ValueError: a picture of another shape or type.
        """
        grids = "".join(
            f'<div class="grid">{"".join(_captioned_img(picture, caption) for picture, caption in row)}</div>'
            for row in rows
        )
        self._parts.append(f'<figure class="pictures">{_caption(title)}{grids}</figure>')

    def pairs(
        self,
        originals: Sequence[Picture] | UInt8[np.ndarray, "N H W 3"],
        reconstructions: Sequence[Picture] | UInt8[np.ndarray, "N H W 3"],
        title: str = "",
    ) -> None:
        """Originals, each beside its reconstruction.

        Raises:
          ValueError: their numbers differ, or a picture is not uint8 [H, W, 3] or [H, W].
        """
        if len(originals) != len(reconstructions):
            raise ValueError(f"pairs: {len(originals)} originals but {len(reconstructions)} reconstructions")
        pairs = "".join(
            f'<div class="pair">{_img(original, f"original {n}")}{_img(copy, f"reconstruction {n}")}</div>'
            for n, (original, copy) in enumerate(zip(originals, reconstructions, strict=True), start=1)
        )
        note = '<p class="quiet">left: original, right: reconstruction</p>'
        self._parts.append(f'<figure class="pictures">{_caption(title)}{note}<div class="grid">{pairs}</div></figure>')

    def details(self, title: str, text: str) -> None:
        """Preformatted text, folded away until asked for: a resolved configuration, a log."""
        self._parts.append(
            f"<details><summary>{_escape(title)}</summary><pre>{_escape(text)}</pre></details>",
        )

    def render(self) -> str:
        """The whole page."""
        entries = "".join(
            f'<li><a href="#section-{number}">{_escape(title)}</a></li>'
            for number, title in enumerate(self._sections, start=1)
        )
        return PAGE.format(
            title=_escape(self.title),
            css=resources.files("cm3jax.evals").joinpath("report.css").read_text(encoding="utf-8"),
            contents=f'<nav aria-label="Contents"><ol>{entries}</ol></nav>\n' if entries else "",
            body="\n".join([*self._parts, "</section>"] if self._sections else self._parts),
            version=_escape(__version__),
            written=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        )

    def write(self, path: Path) -> None:
        """Writes the page to `path`, whole or not at all."""
        write_atomic(Path(path), self.render().encode())


def _escape(text: str) -> str:
    # Characters that no HTML may hold (most controls, lone surrogates of undecodable file names) become U+FFFD.
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", "\ufffd", text), quote=True)


def _inline(text: str) -> str:
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)


def _format(value: Cell) -> str:
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "–"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _is_number(value: Cell) -> bool:
    return value is None or isinstance(value, int | float | np.number)


def _table_row(tag: str, values: Sequence[Cell], numeric: Sequence[bool]) -> str:
    cells = (
        f'<{tag} class="number">{_escape(_format(value))}</{tag}>'
        if right
        else f"<{tag}>{_escape(_format(value))}</{tag}>"
        for value, right in zip(values, numeric, strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _caption(text: str) -> str:
    return f"<figcaption>{_escape(text)}</figcaption>" if text else ""


def _legend(names: Iterable[str]) -> str:
    entries = "".join(
        f'<li><span style="background:{series_colour(index)}"></span>{_escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def _captioned_img(picture: Picture, caption: str) -> str:
    return f"<figure>{_img(picture, caption)}{_caption(caption)}</figure>"


def _img(picture: Picture, alt: str) -> str:
    picture = np.asarray(picture)
    colour = picture.ndim == 3 and picture.shape[2] == 3
    if picture.dtype != np.uint8 or not (colour or picture.ndim == 2) or not picture.size:
        raise ValueError(
            f"picture {alt!r}: expected uint8 [H, W, 3] or [H, W], found {picture.dtype} {list(picture.shape)}"
        )
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = picture.shape[:2]
    small = ' class="small"' if max(height, width) < SMALL_PICTURE else ""
    return f'<img{small} src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{_escape(alt)}">'
