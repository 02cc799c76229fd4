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
class Tally:
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


Block = Heading | Text | Bullets | Code | Table | Heat | Tally | Figure | Details


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
    if isinstance(block, Tally):
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
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
        'name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light '
        f'dark">\n<title>{_h(eyebrow)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n'
        "<header><p "
        f'class="eyebrow">{_h(eyebrow)}</p>\n<h1>{_h(title)}</h1></header>\n{body}\n</main>\n</body>\n</html>\n'
    )


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
    return (
        '<div class="scroll" '
        f'tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
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
    if isinstance(block, Tally):
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


STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfb;--panel:#f4f4f1;--ink:#1c2330;--soft:#5b6472;--line:#dfe1e4;--wins:#1b7253;--loses:#ad3f2a;
--s0:#2f64a0;--s1:#b9622b;--s2:#2f7f68;--s3:#84569a;--s4:#96791a;--s5:#3f8aa3;--s6:#a24a67;--s7:#6c7079}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--panel:#1d2128;--ink:#e5e7ea;--soft:#a0a8b4;--line:#343a44;--wins:#62c79e;--loses:#f1907a;
--s0:#7dade4;--s1:#eb9d68;--s2:#70c3a6;--s3:#c49edb;--s4:#d6bd66;--s5:#7cc4d9;--s6:#e38ea8;--s7:#a6abb4}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:58rem;margin:0 auto;padding:3rem 1.5rem 5rem}
.eyebrow{margin:0 0 .5rem;color:var(--soft);font-size:.875rem;overflow-wrap:anywhere}
h1{font-size:clamp(1.6rem,4.5vw,2.3rem);line-height:1.18;letter-spacing:-.015em;margin:0 0 1rem;font-weight:650;text-wrap:balance;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.3;margin:3.25rem 0 .75rem;padding-top:1.1rem;border-top:1px solid var(--line);font-weight:650;overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:2rem 0 .4rem;font-weight:650;overflow-wrap:anywhere}
p,ul{margin:.6rem 0 1rem;max-width:44rem;overflow-wrap:anywhere}
ul{padding-left:1.2rem}li{margin:.25rem 0}
.lead{font-size:1.08rem}.note,figcaption{color:var(--soft);font-size:.875rem}
.warning{border-left:3px solid var(--loses);padding:.1rem 0 .1rem .8rem}
.tally{display:flex;flex-wrap:wrap;gap:.5rem 2.25rem;margin:1.25rem 0 1.75rem}
.tally div{display:flex;flex-direction:column}.tally dd{margin:0;font-size:1.9rem;line-height:1.15;font-weight:650;font-variant-numeric:tabular-nums}
.tally dt{color:var(--soft);font-size:.875rem}
.tally .wins dd,.sub.wins{color:var(--wins)}.tally .loses dd,.sub.loses,.sub.failed{color:var(--loses)}
.scroll{overflow-x:auto;margin:.75rem 0 1.25rem}
.scroll:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
table{border-collapse:collapse;font-size:.9rem;min-width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.5rem 1.1rem .5rem 0;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);font-size:.82rem;white-space:nowrap;vertical-align:bottom}
td:first-child{overflow-wrap:break-word;min-width:7rem;max-width:16rem}
.n{text-align:right;white-space:nowrap;padding:.5rem 0 .5rem 1.1rem}
.heat{min-width:0;margin-bottom:.5rem}.heat th,.heat td{padding:.35rem .6rem;vertical-align:middle}
td b{font-weight:600}.sub{display:block;color:var(--soft);font-size:.84rem}
figure{margin:1rem 0 1.5rem}figure .scroll{margin:0}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}figure svg{display:block;width:100%;min-width:30rem;height:auto}
pre{background:var(--panel);padding:.8rem 1rem;border-radius:6px;overflow-x:auto;font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
max-height:28rem;margin:.5rem 0 1rem}
details{margin:.6rem 0;border-bottom:1px solid var(--line);padding-bottom:.6rem}summary{cursor:pointer;overflow-wrap:anywhere}
@media (max-width:40rem){main{padding:1.75rem 1rem 3rem}h2{margin-top:2.4rem}th,td{padding-right:.8rem}.n{padding-left:.8rem}
td:first-child,th:first-child{position:sticky;left:0;background:var(--paper);min-width:6rem}}
@media print{main{max-width:none;padding:0}pre{max-height:none;white-space:pre-wrap}figure,tr{break-inside:avoid}}
"""
