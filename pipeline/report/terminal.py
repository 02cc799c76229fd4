"""The table of results that a command prints at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.report import blocks, code_versions, plots
from pipeline.report.matrix import (
    FAILED,
    LOSES,
    SCRATCH,
    SCRATCH_TECHNIQUE,
    SEARCH_NOISE,
    SINGLE_SEED,
    TOO_FEW,
    WINS,
    EntryKey,
    GainEstimate,
    MatrixEntry,
    decimals_by_target,
    has_several_backbones,
)
from pipeline.report.results import NO_BACKBONE

if TYPE_CHECKING:
    import rich.table
    import rich.text

COLUMNS = (
    "source",
    "technique",
    "value [95 %]",
    "gain [95 %]",
    "verdict",
    "paired seeds",
    "training time",
)
_STYLES = {WINS: "bold green", LOSES: "bold red", FAILED: "bold red"}


def table(entries: Sequence[MatrixEntry]) -> rich.table.Table:
    """Return the matrix as a table, grouped by target and label fraction, the best value first.

    It fits 100 columns. The column "paired seeds" counts the seeds that an entry shares with the
    entry it is compared with, and those that were started where these are more. A gain is over the
    scratch network of the entry's own backbone. Where the target has a better scratch network or
    baseline, the gain over that one is on the next line.

    Args:
        entries: The entries as `matrix.matrix_entries` returns them.
    """
    from rich.table import Table
    from rich.text import Text as Rich

    out = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
        caption_justify="left",
        caption_style="dim",
    )
    for name in COLUMNS[:2]:
        out.add_column(name, overflow="fold")
    for name in COLUMNS[2:]:
        is_text = name == "verdict"
        # the last two names are longer than what stands below them
        heading = name if "[" in name else name.replace(" ", "\n")
        heading = f" {heading}" if is_text else heading  # as its cells (`_gain`)
        out.add_column(heading, justify="left" if is_text else "right", no_wrap=True)
    decimals = decimals_by_target(entries)
    others = _other_gains(entries)
    target = fraction = None
    several = False
    for entry in entries:
        labels = Rich(plots.labels_text(entry.label_fraction), "dim")
        if entry.target != target:
            target, fraction = entry.target, None
            of_target = [other for other in entries if other.target == target]
            several = has_several_backbones(of_target)
            out.add_row()
            out.add_row(Rich(target, "bold"), Rich(_metric(of_target), "dim"), labels)
        elif entry.label_fraction != fraction:
            out.add_row("", "", labels)
        fraction, digits = entry.label_fraction, decimals[entry.target]
        out.add_row(
            Rich(f" {_source(entry, several)}"),
            Rich(_technique(entry)),
            Rich(blocks.format_interval(entry.mean, entry.low, entry.high, digits)),
            Rich(_gain(entry.gain, entry.gain_low, entry.gain_high, digits)),
            Rich(f" {_verdict(entry)}", _STYLES.get(entry.verdict, "")),
            _seeds(entry),
            Rich(blocks.format_seconds(entry.seconds)),
        )
        other = others.get(entry.key)
        if other is not None:
            name, gain = other
            shown = _gain(gain.value, gain.low, gain.high, digits)
            line = (" over", name, "", shown, f" {gain.verdict}")
            out.add_row(*(Rich(text, "dim") for text in line))
    out.caption = _caption(entries, bool(others))
    return out


def _metric(entries: Sequence[MatrixEntry]) -> str:
    """Return the metric of a target with its direction; one of failed trials alone has none."""
    for entry in entries:
        if entry.metric:
            return f"{entry.metric} {'↑' if entry.higher_is_better else '↓'}"
    return ""


def _source(entry: MatrixEntry, several: bool) -> str:
    if several and entry.source == SCRATCH:
        return f"{entry.source} {entry.backbone.rpartition('/')[2]}"
    return entry.source


def _technique(entry: MatrixEntry) -> str:
    against = f" (against {entry.against})" if entry.against else ""
    mark = f" {code_versions.SIGNS[entry.code_mark]}" if entry.code_mark else ""
    return f"{entry.technique}{against}{mark}"


def _gain(gain: float | None, low: float | None, high: float | None, decimals: int) -> str:
    """Return a gain with a space before it, which keeps it apart from the value."""
    return f" {blocks.format_interval(gain, low, high, decimals, '+')}"


def _verdict(entry: MatrixEntry) -> str:
    return f"{entry.verdict} *" if entry.survives else entry.verdict


def _seeds(entry: MatrixEntry) -> rich.text.Text:
    """Return the paired seeds of an entry, "2 of 3" where more were started.

    Scratch is paired with nothing: for it they are all seeds that finished.
    """
    from rich.text import Text as Rich

    seeds = entry.n_seeds if entry.paired_seeds is None else entry.paired_seeds
    started = entry.n_seeds + entry.n_failed
    return Rich(str(seeds)) if seeds == started else Rich(f"{seeds} of {started}", "red")


def _other_gains(entries: Sequence[MatrixEntry]) -> dict[EntryKey, tuple[str, GainEstimate]]:
    """Return the gain of each entry over the best that its target has without a source.

    That is the best scratch network or the best baseline, whichever is better on validation rows.
    Entries whose own scratch it is are left out.

    Returns:
        (name of the network or model, gain over it) of each entry.
    """
    validation = {entry.key: entry.validation for entry in entries}

    def value(entry: MatrixEntry, backbone: str, technique: str) -> float:
        key = entry.key._replace(source=SCRATCH, backbone=backbone, technique=technique)
        of_entry = validation.get(key)
        return -math.inf if of_entry is None else of_entry

    out: dict[EntryKey, tuple[str, GainEstimate]] = {}
    for entry in entries:
        has_scratch = entry.over_best_scratch.value is not None
        has_baseline = entry.over_best_baseline.value is not None
        scratch = value(entry, entry.best_scratch, SCRATCH_TECHNIQUE)
        baseline = value(entry, NO_BACKBONE, entry.best_baseline)
        if has_baseline and (not has_scratch or baseline >= scratch):
            out[entry.key] = entry.best_baseline, entry.over_best_baseline
        elif has_scratch and entry.best_scratch != entry.backbone:
            out[entry.key] = "best scratch", entry.over_best_scratch
    return out


def _caption(entries: Sequence[MatrixEntry], has_others: bool) -> str:
    """Return what the words and signs of the table mean."""
    lines = [
        "gain: the gain over scratch, which is training with the same backbone, labels and seeds",
        "but without a source. Positive is better.",
        "wins, loses: the 95 % interval of the gain excludes zero; * also after Holm's correction",
        "for all comparisons. not shown: it contains zero.",
    ]
    verdicts = {entry.verdict for entry in entries}
    if SINGLE_SEED in verdicts:
        lines.append("one seed: a verdict needs two seeds that scratch has too (paired seeds).")
    if SEARCH_NOISE in verdicts:
        lines.append(
            "search noise: the interval excludes zero, but leaves out how much the choice of"
        )
        lines.append(
            "hyper-parameters varies: they were searched with one seed, or by another metric."
        )
    if TOO_FEW in verdicts:
        lines.append("too few to tell: too few test rows for a verdict; the report has the number.")
    if has_others:
        lines.append(
            "over: the gain of the line above over the target's best result without a source"
        )
        lines.append("(scratch of another backbone, or a baseline), chosen on validation rows.")
    marks = {entry.code_mark for entry in entries}
    signs = [f"{sign} {mark}" for mark, sign in code_versions.SIGNS.items() if mark in marks]
    if signs:
        lines.append(f"{', '.join(signs)} (than those of now).")
    return "\n" + "\n".join(lines)
