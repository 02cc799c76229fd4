"""What adapting to a target without its labels gains over the source's network as it is.

At label fraction 0 there is no scratch network to compare with: it would have nothing to train on.
The reference is `zero_shot` of the same source and backbone. It is the same with every seed, so its
one trial is paired with each seed of the other technique.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.core.metrics import catalog
from pipeline.report import blocks, matrix, per_label, plots, stats
from pipeline.report.blocks import Block, Value
from pipeline.report.matrix import MatrixEntry
from pipeline.report.stats import RunPredictions

ZERO_SHOT = "zero_shot"


def blocks_of(
    entries: Sequence[MatrixEntry],
    runs: Mapping[str, RunPredictions],
    decimals: Mapping[str, int],
) -> list[Block]:
    """Return a table of the techniques that used no label; nothing where zero_shot was not tried.

    Args:
        entries: Entries of all targets.
        runs: Test predictions by trial id, those of a target's folds pooled (`folds.pool`).
        decimals: Number of decimals of each target's metric.
    """
    without = [entry for entry in entries if entry.n_seeds and _uses_no_label(entry)]
    references = {_place(entry): entry for entry in without if entry.technique_name == ZERO_SHOT}
    body: list[list[str | Value]] = []
    for entry in without:
        reference = references.get(_place(entry))
        if reference is None or entry.technique_name == ZERO_SHOT:
            continue
        ours, theirs = (per_label.runs_of(of, runs) for of in (entry, reference))
        gain, word = _gain(entry, ours, theirs, decimals[entry.target])
        before, after = (
            blocks.format_interval(of.mean, of.low, of.high, decimals[entry.target], "")
            for of in (reference, entry)
        )
        shown = Value((gain, f"{blocks.MARKS.get(word, '')} {word}".strip()), word)
        body.append([entry.target, entry.source, entry.technique, before, after, shown])
    if not body:
        return []
    header = ["Target", "Source", "Technique", "zero_shot", "Adapted", "Gain over zero_shot"]
    return [
        blocks.Heading("Without labels of the target"),
        blocks.Text(
            "Techniques that read rows of the target but none of its labels, against the network "
            "of the same source as it is. A gain is won or lost by its plain 95 % interval, and "
            "is not among the comparisons with scratch."
        ),
        blocks.Table(header, body, 3),
    ]


def _uses_no_label(entry: MatrixEntry) -> bool:
    return entry.source != matrix.SCRATCH and plots.fraction_label(entry.label_fraction) == "none"


def _place(entry: MatrixEntry) -> tuple[str, str, str]:
    return entry.source, entry.backbone, entry.target


def _gain(
    entry: MatrixEntry, ours: list[RunPredictions], theirs: list[RunPredictions], decimals: int
) -> tuple[str, str]:
    """Return a gain with its interval, and its verdict."""
    metric = catalog.find(entry.metric)
    if metric is None or len(ours) != entry.n_seeds or not theirs:
        return blocks.DASH, matrix.UNCOMPARED
    repeated = [replace(theirs[0], seed=run.seed) for run in ours]
    try:
        comparison = stats.compare(metric, ours, repeated)
    except (KeyError, ValueError) as error:  # rows that cannot be paired
        return blocks.DASH, f"{matrix.UNCOMPARED}: {error}"
    enough = all(stats.evidence(run, entry.metric).enough for run in (*ours, *theirs))
    word = matrix.verdict(comparison.low, comparison.high, comparison.seeds, enough)
    return blocks.format_interval(
        comparison.value, comparison.low, comparison.high, decimals, "+"
    ), word
