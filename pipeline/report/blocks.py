"""The blocks of a report, and how they are written as Markdown and as HTML.

The HTML page has no script and loads nothing from the network. Text is escaped in this module
only: blocks hold plain text, and figures hold SVG from ``pipeline.report.plots``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from pipeline.io.storage import without_secrets

MARKS = {"wins": "▲", "loses": "▼", "not shown": "○", "too few to tell": "?"}
"""The sign of each verdict. A verdict is shown by its sign and its word, never by colour alone."""
DASH = "–"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph. ``kind`` is "", "lead", "note" or "warning"."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Value:
    """A table cell of one or more lines. The first line is prominent.

    ``tone`` is a verdict, which gives the last line its colour. ``shade`` colours the cell of a
    heat map: 1 is the best value, -1 the worst one.
    """

    lines: tuple[str, ...]
    tone: str = ""
    shade: float = 0.0


@dataclass(frozen=True)
class Table:
    """A table. The first ``text_columns`` columns hold text, the others numbers.

    ``heat`` is a heat map, whose cells have the shades of their values.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Value]]
    text_columns: int = 1
    heat: bool = False


@dataclass(frozen=True)
class Heatmap:
    """A table of shares from 0 to 1, shown in per cent. A larger share has a darker cell.

    ``names`` are the names of the rows, ``corner`` is the header above them.
    """

    corner: str
    header: Sequence[str]
    names: Sequence[str]
    shares: Sequence[Sequence[float]]
    caption: str = ""


@dataclass(frozen=True)
class KeyFigures:
    """The most important numbers of the report, as (number, label, tone)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Figure:
    """An SVG figure. Its ``numbers`` are folded below it in HTML, and Markdown has them alone."""

    svg: str
    caption: str = ""
    numbers: Block | None = None


@dataclass(frozen=True)
class Details:
    """Blocks below a title that are folded in HTML and always open in Markdown."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


Block = Heading | Text | Bullets | Code | Table | Heatmap | KeyFigures | Figure | Details


# ---------------------------------------------------------------- numbers


def decimal_places(intervals: Iterable[tuple[float | None, float | None]]) -> int:
    """Return how many decimals show two digits of the median interval's half width."""
    widths = [
        high - low for low, high in intervals if low is not None and high is not None and high > low
    ]
    if not widths:
        return 3
    half = median(widths) / 2
    return min(6, max(0, math.ceil(-math.log10(half)) + 1))


def format_interval(
    middle: float | None, low: float | None, high: float | None, decimals: int, sign: str = ""
) -> str:
    """Return "middle [low, high]" with so many decimals, without bounds where they are missing.

    ``sign`` is "+" to show the sign of positive numbers too.
    """
    if middle is None:
        return DASH
    shown = f"{middle:{sign}.{decimals}f}"
    if low is None or high is None:
        return shown
    return f"{shown} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"


def interval_lines(
    middle: float | None, low: float | None, high: float | None, decimals: int, sign: str = ""
) -> tuple[str, ...]:
    """Return the value of `format_interval`, and its interval as a line of its own."""
    first, _, interval = format_interval(middle, low, high, decimals, sign).partition(" ")
    return (first, interval) if interval else (first,)


def format_seconds(seconds: float | None) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_count(number: float | None) -> str:
    """Return a whole number with separators of thousands."""
    return DASH if number is None else f"{number:,.0f}"


def format_percent(share: float) -> str:
    """Return a share from 0 to 1 as whole per cent, "<1" or "·" for zero."""
    if share == 0:
        return "·"
    percent = f"{100 * share:.0f}"
    return "<1" if percent == "0" else percent


# ---------------------------------------------------------------- Markdown


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the whole report as Markdown."""
    return (
        f"# {_escape_markdown(title)}\n\n"
        + "\n\n".join(text for block in blocks if (text := _block_as_markdown(block)))
        + "\n"
    )


def _escape_markdown(text: str) -> str:
    """Return plain text as one line of Markdown, escaped.

    Characters without a meaning at their position are not escaped, such as an underscore inside a
    word or a bracket alone.
    """
    text = " ".join(without_secrets(str(text)).split())
    text = re.sub(
        r"[\\`*|~]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#+-](?= )", lambda m: "\\" + m[0], text
    )
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cell_as_markdown(value: str | Value) -> str:
    lines = value.lines if isinstance(value, Value) else [value]
    return "<br>".join(map(_escape_markdown, lines))


def _fence(text: str) -> str:
    text = without_secrets(text)
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, 1 + longest)
    return f"{ticks}\n{text.strip(chr(10))}\n{ticks}"


def _block_as_markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escape_markdown(block.text)}"
    if isinstance(block, Text):
        quote = "> " if block.kind in ("note", "warning") else ""
        return f"{quote}{_escape_markdown(block.text)}"
    if isinstance(block, Bullets):
        return "\n".join(f"- {_escape_markdown(item)}" for item in block.items)
    if isinstance(block, Code):
        return _fence(block.text)
    if isinstance(block, KeyFigures):
        return " · ".join(
            f"**{_escape_markdown(number)}** {_escape_markdown(what)}"
            for number, what, _ in block.items
        )
    if isinstance(block, Table):
        rule = [":--" if i < block.text_columns else "--:" for i in range(len(block.header))]
        lines = [
            [_escape_markdown(name) for name in block.header],
            rule,
            *([_cell_as_markdown(value) for value in row] for row in block.rows),
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if isinstance(block, Heatmap):
        body = [
            [name, *map(format_percent, line)]
            for name, line in zip(block.names, block.shares, strict=True)
        ]
        table = _block_as_markdown(Table([block.corner, *block.header], body))
        return f"{table}\n\n_{_escape_markdown(block.caption)}_" if block.caption else table
    if isinstance(block, Details):
        inner = "\n\n".join(text for part in block.blocks if (text := _block_as_markdown(part)))
        return f"**{_escape_markdown(block.title)}**\n\n{inner}" if inner else ""
    caption = f"_{_escape_markdown(block.caption)} Figure in report.html._"
    return f"{caption}\n\n{_block_as_markdown(block.numbers)}" if block.numbers else caption


# ---------------------------------------------------------------- HTML


def html_page(title: str, eyebrow: str, blocks: Sequence[Block]) -> str:
    """Return the whole report as an HTML page, without a script and without anything to load."""
    body = "\n".join(_html_block(block) for block in blocks)
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escape_html(eyebrow)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header><p class="eyebrow">{_escape_html(eyebrow)}</p>
<h1>{_breakable(title)}</h1></header>
{body}
</main>
</body>
</html>
"""


def _escape_html(text: str) -> str:
    return html.escape(without_secrets(str(text)), quote=True)


def with_minus_sign(text: str) -> str:
    """Return the text with a minus sign in place of the hyphen of each negative number."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def _breakable(text: str) -> str:
    """Return the HTML of a text that breaks into lines where a reader expects it.

    That is at spaces and behind the separators of names, inside a word only where it has more than
    20 characters (a checksum, say), and never inside an interval.
    """
    text = re.sub(r"(\[[^\s\[\]]+,) (?=[^\s\[\]]+\])", "\\1\u00a0", text)
    breaks = r"(?<=[_/=])(?=\w)|(?<=[.:])(?=[^\W\d_])|(?<=[^\W_]{20})(?=[^\W_])"
    return "<wbr>".join(map(_escape_html, re.split(breaks, without_secrets(text))))


def _html_cell(value: str | Value) -> str:
    if not isinstance(value, Value):
        return _breakable(with_minus_sign(value))
    first, *rest = (_breakable(with_minus_sign(line)) for line in value.lines)
    tones = [""] * (len(rest) - 1) + [f" {_css_class(value.tone)}"] if rest else []
    return f"<b>{first}</b>" + "".join(
        f'<span class="sub{tone}">{line}</span>' for line, tone in zip(rest, tones, strict=True)
    )


def _css_class(tone: str) -> str:
    return re.sub(r"[^a-z]+", "-", tone.lower()).strip("-")


MAX_NARROW_COLUMNS = 2
"""A table with more columns is shown on a phone as a list of rows, each value after its header.

A heat map may have one more: its cells are short.
"""


MAX_WIDE_COLUMNS = 10
"""A heat map of shares with more columns has small cells."""


MAX_UNBROKEN = 40
"""A longer text in a column of numbers is broken into lines."""


def _html_table(table: Table) -> str:
    def tag(
        i: int,
        name: str,
        inner: str,
        attributes: str = "",
        kind: str = "n",
    ) -> str:
        kind = "" if i < table.text_columns else f' class="{kind}"'
        return f"<{name}{attributes}{kind}>{inner}</{name}>"

    as_list = len(table.header) > MAX_NARROW_COLUMNS + table.heat
    head = "".join(
        tag(i, "th", _breakable(name), ' scope="col"') for i, name in enumerate(table.header)
    )

    def cell(i: int, value: str | Value) -> str:
        is_title = i < min(2, table.text_columns)
        name = _escape_html(table.header[i])
        attributes = f' data-name="{name}"' if as_list and not is_title else ""
        if isinstance(value, Value) and value.shade:
            colour = "wins" if value.shade > 0 else "loses"
            # 45 % at most: ink stays readable on it in light and dark
            attributes += (
                f' style="background:color-mix(in srgb,var(--{colour}) '
                f'{45 * abs(value.shade):.0f}%,transparent)"'
            )
        is_long = isinstance(value, str) and len(value) > MAX_UNBROKEN
        return tag(i, "td", _html_cell(value), attributes, "n long" if is_long else "n")

    rows = ["".join(cell(i, value) for i, value in enumerate(row)) for row in table.rows]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    header = f"<thead><tr>{head}</tr></thead>"
    kinds = ["heat", "gains"] * table.heat + ["list"] * as_list
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}>\n{header}\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_heatmap(heatmap: Heatmap) -> str:
    head = f'<th scope="col">{_breakable(heatmap.corner)}</th>' + "".join(
        f'<th scope="col" class=n>{_breakable(name)}</th>' for name in heatmap.header
    )
    # 55 % at most: ink stays readable on it in light and dark
    shade = "background:color-mix(in srgb,var(--s0) {:.0f}%,transparent)"
    lines = [
        "".join(
            f'<td class=n style="{shade.format(55 * share)}">'
            f"{_escape_html(format_percent(share))}</td>"
            for share in line
        )
        for line in heatmap.shares
    ]
    body = "\n".join(
        f'<tr><th scope="row">{_breakable(name)}</th>{line}</tr>'
        for name, line in zip(heatmap.names, lines, strict=True)
    )
    caption = f"<figcaption>{_escape_html(heatmap.caption)}</figcaption>" if heatmap.caption else ""
    kind = "heat dense" if len(heatmap.header) > MAX_WIDE_COLUMNS else "heat"
    return (
        '<figure><div class="scroll" tabindex="0"><table '
        f'class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        f"{caption}</figure>"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_breakable(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        kind = f' class="{_css_class(block.kind)}"' if block.kind else ""
        return f"<p{kind}>{_escape_html(block.text)}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_escape_html(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre>{_escape_html(block.text.strip(chr(10)))}</pre>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Heatmap):
        return _html_heatmap(block)
    if isinstance(block, KeyFigures):
        items = (
            f'<div class="{_css_class(tone)}"><dd>{_escape_html(number)}</dd>'
            f"<dt>{_escape_html(what)}</dt></div>"
            for number, what, tone in block.items
        )
        return f'<dl class="tally">{"".join(items)}</dl>'
    if isinstance(block, Details):
        inner = "\n".join(_html_block(part) for part in block.blocks)
        return f"<details><summary>{_breakable(block.title)}</summary>\n{inner}\n</details>"
    caption = f"<figcaption>{_escape_html(block.caption)}</figcaption>" if block.caption else ""
    figure = f'<figure><div class="scroll" tabindex="0">{block.svg}</div>{caption}</figure>'
    if block.numbers is None:
        return figure
    return figure + _html_block(Details("Numbers of the figure", [block.numbers]))
