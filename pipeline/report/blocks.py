"""A report as blocks, written twice: as Markdown and as one HTML page that needs no network and no
script.

Text is escaped here and nowhere else: blocks hold plain text, and figures hold SVG made by
``transfer.plots``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

MARKS = {"wins": "▲", "loses": "▼", "not shown": "○", "too few to tell": "?"}
"""Verdicts are told by sign and word, never by colour alone."""
DASH = "–"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """``kind``: "" or "lead" or "note" or "warning"."""

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
    """A table cell of one or more lines, the first one prominent; ``tone`` colours the last (a
    verdict).
    """

    lines: tuple[str, ...]
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """``text_columns`` leading columns are text, the others numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | Value]]
    text_columns: int = 1


@dataclass(frozen=True)
class Heat:
    """A table of shares between 0 and 1, shown in per cent and shaded by them; ``names`` are the
    rows' names.
    """

    corner: str
    header: Sequence[str]
    names: Sequence[str]
    shares: Sequence[Sequence[float]]
    caption: str = ""


@dataclass(frozen=True)
class KeyFigures:
    """Numbers to see first: (number, what, tone)."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Figure:
    """``instead``: what Markdown shows, where there is no figure."""

    svg: str
    caption: str = ""
    instead: Block | None = None


@dataclass(frozen=True)
class Details:
    """Blocks behind a title: folded in HTML, plain in Markdown."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)


Block = Heading | Text | Bullets | Code | Table | Heat | KeyFigures | Figure | Details


# ---------------------------------------------------------------- numbers


def places(intervals: Iterable[tuple[float | None, float | None]]) -> int:
    """Decimals that show two digits of a typical interval's half width."""
    widths = [
        high - low for low, high in intervals if low is not None and high is not None and high > low
    ]
    return min(6, max(0, math.ceil(-math.log10(median(widths) / 2)) + 1)) if widths else 3


def spread(
    middle: float | None, low: float | None, high: float | None, places: int, sign: str = ""
) -> str:
    if middle is None:
        return DASH
    bounds = (
        "" if low is None or high is None else f" [{low:{sign}.{places}f}, {high:{sign}.{places}f}]"
    )
    return f"{middle:{sign}.{places}f}{bounds}"


def percent(share: float) -> str:
    return "·" if share == 0 else "<1" if share < 0.005 else f"{100 * share:.0f}"


# ---------------------------------------------------------------- Markdown


def markdown(title: str, blocks: Sequence[Block]) -> str:
    return (
        f"# {_md(title)}\n\n"
        + "\n\n".join(text for block in blocks if (text := _md_block(block)))
        + "\n"
    )


def _md(text: str) -> str:
    """Plain text in one line of Markdown. What means nothing where it stands is left: underscores
    in words, lone brackets.
    """
    text = " ".join(str(text).split())
    text = re.sub(
        r"[\\`*|~]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|^[#+-](?= )", lambda m: "\\" + m[0], text
    )
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_cell(value: str | Value) -> str:
    return (
        "<br>".join(_md(line) for line in value.lines) if isinstance(value, Value) else _md(value)
    )


def _fence(text: str) -> str:
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}\n{text.strip(chr(10))}\n{ticks}"


def _md_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_md(block.text)}"
    if isinstance(block, Text):
        return f"> {_md(block.text)}" if block.kind in ("note", "warning") else _md(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_md(item)}" for item in block.items)
    if isinstance(block, Code):
        return _fence(block.text)
    if isinstance(block, KeyFigures):
        return " · ".join(f"**{_md(number)}** {_md(what)}" for number, what, _ in block.items)
    if isinstance(block, Table):
        rule = [":--" if i < block.text_columns else "--:" for i in range(len(block.header))]
        lines = [
            [_md(name) for name in block.header],
            rule,
            *([_md_cell(value) for value in row] for row in block.rows),
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if isinstance(block, Heat):
        body = [
            [name, *map(percent, line)]
            for name, line in zip(block.names, block.shares, strict=True)
        ]
        return _md_block(Table([block.corner, *block.header], body)) + (
            f"\n\n_{_md(block.caption)}_" if block.caption else ""
        )
    if isinstance(block, Details):
        inner = "\n\n".join(text for part in block.blocks if (text := _md_block(part)))
        return f"**{_md(block.title)}**\n\n{inner}" if inner else ""
    return (
        _md_block(block.instead)
        if block.instead
        else f"_{_md(block.caption)} Figure in report.html._"
    )


# ---------------------------------------------------------------- HTML


def page(title: str, eyebrow: str, blocks: Sequence[Block]) -> str:
    """The whole page. It has no script, and loads nothing."""
    body = "\n".join(_html_block(block) for block in blocks)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_h(eyebrow)}</title>
<style>
{_style()}</style>
</head>
<body>
<main>
<header><p class="eyebrow">{_h(eyebrow)}</p>
<h1>{_h(title)}</h1></header>
{body}
</main>
</body>
</html>
"""


def _h(text: str) -> str:
    return html.escape(str(text), quote=True)


def typographic(text: str) -> str:
    """A number as HTML shows it: with a minus sign for the hyphen."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def _html_cell(value: str | Value) -> str:
    if not isinstance(value, Value):
        return _h(typographic(value))
    first, *rest = (_h(typographic(line)) for line in value.lines)
    tones = [""] * (len(rest) - 1) + [f" {_slug(value.tone)}"] if rest else []
    return f"<b>{first}</b>" + "".join(
        f'<span class="sub{tone}">{line}</span>' for line, tone in zip(rest, tones, strict=True)
    )


def _slug(tone: str) -> str:
    return re.sub(r"[^a-z]+", "-", tone.lower()).strip("-")


def _html_table(table: Table) -> str:
    def tag(i: int, name: str, inner: str, scope: str = "") -> str:
        return f"<{name}{scope}{'' if i < table.text_columns else ' class=n'}>{inner}</{name}>"

    head = "".join(tag(i, "th", _h(name), ' scope="col"') for i, name in enumerate(table.header))
    rows = [
        "".join(tag(i, "td", _html_cell(value)) for i, value in enumerate(row))
        for row in table.rows
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    header = f"<thead><tr>{head}</tr></thead>"
    return (
        f'<div class="scroll" tabindex="0"><table>\n{header}\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_heat(heat: Heat) -> str:
    head = f'<th scope="col">{_h(heat.corner)}</th>' + "".join(
        f'<th scope="col" class=n>{_h(name)}</th>' for name in heat.header
    )
    # 55 % at most: ink stays readable on it in light and dark
    shade = "background:color-mix(in srgb,var(--s0) {:.0f}%,transparent)"
    lines = [
        "".join(
            f'<td class=n style="{shade.format(55 * share)}">{_h(percent(share))}</td>'
            for share in line
        )
        for line in heat.shares
    ]
    body = "\n".join(
        f'<tr><th scope="row">{_h(name)}</th>{line}</tr>'
        for name, line in zip(heat.names, lines, strict=True)
    )
    caption = f"<figcaption>{_h(heat.caption)}</figcaption>" if heat.caption else ""
    return (
        '<figure><div class="scroll" tabindex="0"><table '
        f'class="heat">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
        f"{caption}</figure>"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_h(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return (
            f'<p class="{_slug(block.kind)}">{_h(block.text)}</p>'
            if block.kind
            else f"<p>{_h(block.text)}</p>"
        )
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_h(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Code):
        return f"<pre>{_h(block.text.strip(chr(10)))}</pre>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Heat):
        return _html_heat(block)
    if isinstance(block, KeyFigures):
        items = (
            f'<div class="{_slug(tone)}"><dd>{_h(number)}</dd><dt>{_h(what)}</dt></div>'
            for number, what, tone in block.items
        )
        return f'<dl class="tally">{"".join(items)}</dl>'
    if isinstance(block, Details):
        inner = "\n".join(_html_block(part) for part in block.blocks)
        return f"<details><summary>{_h(block.title)}</summary>\n{inner}\n</details>"
    caption = f"<figcaption>{_h(block.caption)}</figcaption>" if block.caption else ""
    return f'<figure><div class="scroll" tabindex="0">{block.svg}</div>{caption}</figure>'


def _style() -> str:
    """Return the page's style sheet."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")
