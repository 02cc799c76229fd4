"""What adapting to a target without its labels gains over the source's network as it is.

At label fraction 0 there is no scratch network to compare with: it would have nothing to train on.
The reference is `zero_shot` of the same source and backbone. It is the same with every seed, so its
one trial is paired with each seed of the other technique.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pipeline.core.metrics import catalog
from pipeline.report import blocks, matrix, plots, stats
from pipeline.report.blocks import Block, Value
from pipeline.report.matrix import Cell, CellKey
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

ZERO_SHOT = "zero_shot"


def blocks_of(
    cells: Sequence[Cell],
    rows: Sequence[ResultRow],
    runs: Mapping[str, RunPredictions],
    decimals: Mapping[str, int],
) -> list[Block]:
    """Return a table of the techniques that used no label; nothing where zero_shot was not tried.

    Args:
        cells: Cells of all targets.
        rows: Results rows.
        runs: Trial id to test predictions.
        decimals: Target to the decimals of its metric.
    """
    trials: dict[CellKey, dict[str, None]] = defaultdict(dict)
    for row in rows:
        if row.trial_stage == "final" and row.status == "done" and row.split == "test":
            trials[matrix.cell_key(row)][row.trial_id] = None
    without = [cell for cell in cells if cell.n_seeds and _uses_no_label(cell)]
    references = {_place(cell): cell for cell in without if _name(cell) == ZERO_SHOT}
    body: list[list[str | Value]] = []
    for cell in without:
        reference = references.get(_place(cell))
        if reference is None or _name(cell) == ZERO_SHOT:
            continue
        ours, theirs = (
            [runs[one] for one in trials[_key(of)] if one in runs] for of in (cell, reference)
        )
        gain, word = _gain(cell, ours, theirs, decimals[cell.target])
        before, after = (
            blocks.format_interval(of.mean, of.low, of.high, decimals[cell.target], "")
            for of in (reference, cell)
        )
        shown = Value((gain, f"{blocks.MARKS.get(word, '')} {word}".strip()), word)
        body.append([cell.target, cell.source, cell.technique, before, after, shown])
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


def _uses_no_label(cell: Cell) -> bool:
    return cell.source != matrix.SCRATCH and plots.fraction_label(cell.label_fraction) == "none"


def _name(cell: Cell) -> str:
    """Return the technique without its options."""
    return cell.technique.partition(" (")[0]


def _place(cell: Cell) -> tuple[str, str, str]:
    return cell.source, cell.backbone, cell.target


def _key(cell: Cell) -> CellKey:
    return cell.source, cell.backbone, cell.target, cell.technique, cell.label_fraction


def _gain(
    cell: Cell, ours: list[RunPredictions], theirs: list[RunPredictions], decimals: int
) -> tuple[str, str]:
    """Return a gain with its interval, and its verdict."""
    metric = catalog.find(cell.metric)
    if metric is None or len(ours) != cell.n_seeds or not theirs:
        return blocks.DASH, matrix.UNCOMPARED
    repeated = [replace(theirs[0], seed=run.seed) for run in ours]
    try:
        found = stats.compare(metric, ours, repeated)
    except (KeyError, ValueError) as error:  # rows that cannot be paired
        return blocks.DASH, f"{matrix.UNCOMPARED}: {error}"
    enough = all(stats.evidence(run).enough for run in (*ours, *theirs))
    word = matrix.verdict(found.low, found.high, found.seeds, enough)
    return blocks.format_interval(found.value, found.low, found.high, decimals, "+"), word
