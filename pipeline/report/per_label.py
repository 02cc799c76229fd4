"""Report blocks on single classes and labels.

For the best entry of a target they show what share of each class is found, the calibration and the
confusion matrix, or the metrics of each label or entity type; for two classes all metrics.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pipeline.core.groups import count_units, unit_numbers
from pipeline.core.metrics import calibration, catalog, classes, coco_ap
from pipeline.core.metrics.metric import SHARE, Metric, Predictions, ratio, resampled
from pipeline.report import stats
from pipeline.report.blocks import (
    DASH,
    MARKS,
    Block,
    Figure,
    Heading,
    Heatmap,
    Table,
    Text,
    Value,
    decimal_places,
    interval_lines,
)
from pipeline.report.matrix import (
    REFERENCE,
    SCRATCH,
    MatrixEntry,
    best_on_validation,
    verdict,
)
from pipeline.report.plots import entry_label, predicted_and_true, reliability, truncate
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions

MAX_CLASSES = 20
"""Above this number of classes the most frequent confusions are listed instead of the matrix, which
would not be readable.
"""
MAX_NAMED_COLUMNS = 8
"""The columns of a confusion matrix of more classes have numbers in place of names."""
MAX_PAIRS = 10
MAX_LABELS = 60

GAIN_LEGEND = (
    " ▲ wins, ▼ loses, ○ not shown, ? too few test units for a verdict; not corrected for the "
    "number of comparisons."
)
"""What the signs mean in tables of gains other than the job's main one."""


@dataclass(frozen=True)
class LabelKind:
    """The texts and metrics of a table with a line for each label of the rows or each entity type.

    ``measures`` are pairs (metric of a single label, its name in the table).
    """

    heading: str
    first: str
    counted: str
    plural: str
    measures: tuple[tuple[str, str], ...]
    explanation: str = ""


@dataclass(frozen=True)
class ClassMeasure:
    """A number that each class has, and the texts of its table.

    ``of`` makes the metric of a class. ``count`` counts what each row has of each class (n, C), and
    a verdict needs ``min_units`` test units that have the class.
    """

    heading: str
    counted: str
    name: str
    meaning: str
    of: Callable[[int], Metric]
    count: Callable[[Predictions, int], np.ndarray]
    min_units: int


LABELS = LabelKind(
    "Label by label",
    "Label",
    "Test rows",
    "labels",
    (("auroc", "AUROC"), ("average_precision", "AP")),
    " AP: average precision.",
)
TYPES = LabelKind("Type by type", "Type", "Test entities", "types", (("entity_f1", "F1"),))


def label_blocks(
    target: str,
    done: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    runs: dict[str, RunPredictions],
) -> list[Block]:
    """Return the blocks on classes, labels or numbers of a target's best finished entry.

    It is the network with a source that is best on validation rows of the target, compared with
    scratch (`best_entry`). Where no entry has a value on these rows it is the best on test rows.
    Where there is no network it is the best model without one.

    Args:
        target: Name of the target.
        done: Entries of the target that have a mean.
        rows: Results rows, of any target: what was measured where there are two classes.
        runs: Trial id to test predictions.

    Returns:
        No block where test predictions are missing or have none of these.
    """
    shown = [(entry, seeds) for entry in done if (seeds := runs_of(entry, runs))]
    if not shown:
        return []
    compared = best_entry(done, runs)
    best, ours = compared[:2] if compared is not None else _best(shown)
    has_classes = all(map(_has_classes, ours))
    confused = _confusion(target, best, ours) if has_classes else []
    if all(map(_has_two_classes, ours)):
        return [*(_two_class_blocks(target, rows, *compared) if compared else []), *confused]
    if compared is None:
        return confused
    if has_classes:
        recalls = _class_table(RECALL, target, *compared)
        return [*confused, *recalls, *_reliability(target, *compared)]
    if all(map(_has_numbers, ours)):
        return _predicted_and_true(target, *compared)
    if all(map(_has_boxes, ours)):
        has_masks = all("mask_intersections" in run.predictions for run in ours)
        return _class_table(MASK_PRECISION if has_masks else BOX_PRECISION, target, *compared)
    if all(map(_has_pixels, ours)):
        return _class_table(PIXEL_IOU, target, *compared)
    if all(map(_has_label_sets, ours)):
        return _label_table(LABELS, target, *compared)
    if all(map(_has_type_counts, ours)):
        return _label_table(TYPES, target, *compared)
    return []


def best_entry(
    done: Sequence[MatrixEntry], runs: Mapping[str, RunPredictions]
) -> tuple[MatrixEntry, list[RunPredictions], list[RunPredictions]] | None:
    """Return the best finished network's entry with its runs and the runs of its scratch network.

    The best entry is taken from those with a source, or from all where there is none. The scratch
    network has the same backbone and labels; its list is empty where the best entry is scratch.
    Returns None where there are no test predictions.
    """
    networks = [entry for entry in done if not entry.is_baseline]
    shown = [(entry, seeds) for entry in networks if (seeds := runs_of(entry, runs))]
    if not shown:
        return None
    best, ours = _best([pair for pair in shown if pair[0].source != SCRATCH] or shown)
    if best.source == SCRATCH:
        return best, ours, []
    for entry, seeds in shown:
        is_alike = (entry.backbone, entry.label_fraction) == (best.backbone, best.label_fraction)
        if entry.verdict == REFERENCE and is_alike:
            return best, ours, seeds
    return best, ours, []


def _best(
    shown: list[tuple[MatrixEntry, list[RunPredictions]]],
) -> tuple[MatrixEntry, list[RunPredictions]]:
    """Return the entry that is best on validation rows of the target, with its runs.

    Where no entry has a value on these, it is the best on test rows. Its numbers are then too good,
    since it was chosen by the rows that they are of.
    """
    validated = [entry for entry, _ in shown if entry.validation is not None]
    if validated:
        best = best_on_validation(validated)
        return next(pair for pair in shown if pair[0] is best)
    return max(
        shown, key=lambda pair: (pair[0].mean or 0.0) * (1 if pair[0].higher_is_better else -1)
    )


def runs_of(entry: MatrixEntry, runs: Mapping[str, RunPredictions]) -> list[RunPredictions]:
    """Return the test predictions of an entry, one run for each seed."""
    return [runs[trial_id] for trial_id in entry.trial_ids if trial_id in runs]


def have_common_seed(ours: list[RunPredictions], scratch: list[RunPredictions]) -> bool:
    """Return whether there is a seed by which runs can be paired with those of scratch."""
    return bool({run.seed for run in ours} & {run.seed for run in scratch})


def _has_two_classes(run: RunPredictions) -> bool:
    """Return whether there are two classes, for each row or for each position of a row."""
    p = run.predictions
    return (
        {"scores", "label"} <= set(p)
        and len(run.labels) == 2
        and p["scores"].shape == (*p["label"].shape, 2)
    )


def _has_classes(run: RunPredictions) -> bool:
    p = run.predictions
    return (
        {"scores", "label"} <= set(p)
        and p["scores"].ndim == 2
        and p["label"].ndim == 1
        and p["scores"].shape[1] == len(run.labels)
    )


def _has_label_sets(run: RunPredictions) -> bool:
    p = run.predictions
    return {"scores", "labels"} <= set(p) and p["scores"].shape == p["labels"].shape == (
        len(run.rows),
        len(run.labels),
    )


def _has_type_counts(run: RunPredictions) -> bool:
    p = run.predictions
    return {"hits", "guessed", "actual"} <= set(p) and p["hits"].shape == p["actual"].shape == (
        len(run.rows),
        len(run.labels),
    )


def _has_boxes(run: RunPredictions) -> bool:
    needed = {"boxes", "scores", "classes", "true_boxes", "true_classes", "true_crowd"}
    return needed <= set(run.predictions) and bool(run.labels)


def _has_pixels(run: RunPredictions) -> bool:
    """Return whether the class of every pixel is predicted."""
    return {"intersection", "predicted", "actual"} <= set(run.predictions) and bool(run.labels)


def _has_numbers(run: RunPredictions) -> bool:
    """Return whether a number of each row is predicted."""
    return {"prediction", "value"} <= set(run.predictions) and len(run.labels) == 1


def _seeds(count: int) -> str:
    return f"{count} seeds together" if count > 1 else "one seed"


# ---------------------------------------------------------------- classes


def _confusion(target: str, entry: MatrixEntry, runs: list[RunPredictions]) -> list[Block]:
    names = runs[0].labels
    counts = sum(
        (classes.confusion(run.predictions) for run in runs),
        np.zeros((len(names), len(names)), np.int64),
    )
    sizes = counts.sum(1)
    shares = counts / np.maximum(sizes[:, None], 1)
    whose = f"{target}: {entry_label(entry)} of labels, {_seeds(len(runs))}"
    if "threshold" in runs[0].predictions:
        whose += ", at the decision threshold"
    if len(names) <= MAX_CLASSES:
        each = [f"{name} ({size // len(runs):,})" for name, size in zip(names, sizes, strict=True)]
        header = [truncate(name, 14) for name in names]
        if len(names) > MAX_NAMED_COLUMNS:
            each = [f"{number}: {name}" for number, name in enumerate(each, 1)]
            header = [str(number) for number in range(1, len(names) + 1)]
        caption = (
            f"{whose}. Per cent of the test rows of each true class (with their number) that were "
            "taken for each class."
        )
        return [
            Heading("Confusion matrix", 3),
            Heatmap("True class", header, each, shares.tolist(), caption),
        ]
    wrong = np.where(np.eye(len(names), dtype=bool), 0, counts)
    pairs = [
        divmod(int(flat), len(names))
        for flat in np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
    ]
    body = [
        [names[i], names[j], f"{counts[i, j] / len(runs):,.1f}", f"{100 * shares[i, j]:.1f} %"]
        for i, j in pairs
        if wrong[i, j]
    ]
    if not body:
        return []
    return [
        Heading("Commonest confusions", 3),
        Text(f"{whose}, averaged over seeds.", "note"),
        Table(["True class", "Taken for", "Test rows", "Of the true class"], body, 2),
    ]


def recall_of(column: int) -> Metric:
    """Return the share of the rows of a class that are taken for it."""

    def units(p: Predictions) -> np.ndarray:
        is_class = p["label"] == column
        return np.stack([is_class & (classes.predicted_class(p) == column), is_class], axis=1)

    return ratio(bounds=SHARE)(units)


def precision_of(column: int, masks: bool = False) -> Metric:
    """Return the average precision of a class's boxes, or of its masks, as COCO defines it."""

    def values(p: Predictions, counts: np.ndarray) -> np.ndarray:
        return coco_ap.average_precision(coco_ap.of_class(p, column), counts=counts, masks=masks)

    return resampled(bounds=SHARE)(values)


def iou_of(column: int) -> Metric:
    """Return the intersection over union of the pixels of a class, summed over all images."""
    of_class = catalog.per_label("iou")
    assert of_class is not None
    return of_class.of("", column)


def _images_by_class(p: Predictions, classes: int) -> np.ndarray:
    return (p["actual"][:, :classes] > 0).astype(np.int64)


def _rows_by_class(p: Predictions, classes: int) -> np.ndarray:
    return (p["label"][:, None] == np.arange(classes)).astype(np.int64)


def _boxes_by_class(p: Predictions, classes: int) -> np.ndarray:
    known = p["true_classes"][:, :, None] == np.arange(classes)
    return (known & ~p["true_crowd"].astype(bool)[:, :, None]).sum(1)


RECALL = ClassMeasure(
    "Class by class",
    "Test rows",
    "Found",
    "the share of each class's test rows that is found (recall)",
    recall_of,
    _rows_by_class,
    stats.MIN_RARER_UNITS,
)
BOX_PRECISION = ClassMeasure(
    "Average precision of each class",
    "Test boxes",
    "AP",
    "the average precision of each class (COCO: IoU 0.5 to 0.95)",
    precision_of,
    _boxes_by_class,
    stats.MIN_UNITS,
)
MASK_PRECISION = replace(
    BOX_PRECISION,
    counted="Test objects",
    meaning="the average precision of each class's masks (COCO: IoU 0.5 to 0.95)",
    of=partial(precision_of, masks=True),
)
PIXEL_IOU = ClassMeasure(
    "Intersection over union of each class",
    "Test images",
    "IoU",
    "the intersection over union of each class's pixels",
    iou_of,
    _images_by_class,
    stats.MIN_UNITS,
)


def _class_table(
    measure: ClassMeasure,
    target: str,
    entry: MatrixEntry,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
) -> list[Block]:
    """Return a measure of each class beside that of scratch, the largest gain first."""
    if not have_common_seed(ours, scratch):
        return []
    names = ours[0].labels
    counts = measure.count(ours[0].predictions, len(names))
    sizes = counts.sum(0)
    most_frequent_first: list[int] = np.argsort(-sizes, kind="stable").tolist()
    frequent = [k for k in most_frequent_first if sizes[k]]
    compared = [(k, compare(measure.of(k), ours, scratch)) for k in frequent[:MAX_LABELS]]
    compared.sort(key=lambda pair: pair[1].descending_gain)
    digits = decimal_places([bounds for _, one in compared for bounds in one.bounds])
    body: list[list[str | Value]] = []
    for k, comparison in compared:
        units = count_units(counts[:, k] > 0, ours[0].groups)
        enough = units >= measure.min_units
        cells = comparison.cells(digits, enough, entry)
        body.append([names[k], f"{sizes[k]:,}", *cells])
    caption = (
        f"{target}: {measure.meaning}, of {entry_label(entry)} of labels and of scratch, mean over "
        f"{_plural(len(ours))} with 95 % intervals; the largest gain first.{GAIN_LEGEND}"
    )
    if len(frequent) > MAX_LABELS:
        caption += f" The {MAX_LABELS} commonest of {len(frequent)} classes."
    head = ["Class", measure.counted, measure.name, f"{measure.name}, scratch", "Gain"]
    return [Heading(measure.heading, 3), Text(caption), Table(head, body)]


# ---------------------------------------------------------------- two classes


def _two_class_blocks(
    target: str,
    rows: Sequence[ResultRow],
    best: MatrixEntry,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
) -> list[Block]:
    """Return all metrics of the best entry with a source and of scratch, and a reliability diagram.

    The positions of a row count as rows of their own where each has a class.
    """
    measured = dict.fromkeys(
        row.metric
        for row in rows
        if row.target == best.target
        and row.split == "test"
        and row.metric
        and row.value is not None
    )
    # some metrics need a decision threshold
    has_threshold = all("threshold" in run.predictions for run in (*ours, *scratch))
    names = [
        name
        for name in measured
        if catalog.find(name) and (has_threshold or not name.endswith("_at_threshold"))
    ]
    paired = have_common_seed(ours, scratch)
    body: list[list[str | Value]] = []
    for name in names:
        metric = catalog.metric(name)
        comparison = compare(metric, ours, scratch if paired else [])
        bounds = comparison.bounds
        if comparison.gain is not None:
            bounds = [*bounds, (comparison.gain.low, comparison.gain.high)]
        enough = all(stats.evidence(run, name).enough for run in (*ours, *scratch))
        cells = comparison.cells(decimal_places(bounds), enough, best)
        body.append([f"{name} {'↑' if metric.higher_is_better else '↓'}", *cells])
    caption = (
        f"{target}: {entry_label(best)} of labels{' and scratch' if paired else ''}, mean "
        f"over {_plural(len(ours))} with 95 % intervals; the positive "
        f"class is {ours[0].labels[1]}. ↑ higher is better, ↓ lower is; a positive gain is "
        f"better.{GAIN_LEGEND if paired else ''}"
    )
    out: list[Block] = []
    if body:
        head = ["Metric", best.source, *(["scratch", "gain"] if paired else [])]
        out = [Heading("All metrics", 3), Text(caption), Table(head, body)]
    return out + _reliability(target, best, ours, scratch if paired else [])


def _binned(
    entry: MatrixEntry,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
    pairs_of: Callable[[RunPredictions], tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> dict[str, list[tuple[float, float, int]]]:
    """Return means of what was observed by what was predicted, for an entry and its scratch.

    Bins hold equally many predictions, and each holds at least 20 groups or rows, so that nothing
    about a single patient or row can be read from it.

    Args:
        pairs_of: Returns (k,) predictions of a run, what was observed, and the row of each.

    Returns:
        Name to points (predicted, observed, number); those with too few predictions are left out.
    """
    curves: dict[str, list[tuple[float, float, int]]] = {}
    for name, side in ((entry_label(entry), ours), ("scratch", scratch)):
        if not side:
            continue
        found = [pairs_of(run) for run in side]
        largest_units = [
            int(np.bincount(unit_numbers(run.groups, len(run.rows))[row]).max(initial=1))
            for run, (_, _, row) in zip(side, found, strict=True)
        ]
        predicted, observed, _ = (np.concatenate(parts) for parts in zip(*found, strict=True))
        least = 20 * max(largest_units) * len(side)
        if points := calibration.reliability(predicted, observed, least=least):
            curves[name] = points
    return curves


def _class_chances(run: RunPredictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the probability of a class at each labelled position, and whether it was right."""
    label = run.predictions["label"]
    known = label >= 0
    chances, is_right = calibration.confidence(run.predictions["scores"][known], label[known])
    return chances, is_right, known.nonzero()[0]


def _finite_numbers(run: RunPredictions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the predicted and the true numbers that are finite: a network may have diverged."""
    predicted, true = run.predictions["prediction"], run.predictions["value"]
    known = np.isfinite(predicted) & np.isfinite(true)
    return predicted[known], true[known], known.nonzero()[0]


def _reliability(
    target: str, entry: MatrixEntry, ours: list[RunPredictions], scratch: list[RunPredictions]
) -> list[Block]:
    """Return the reliability diagram of an entry and its scratch network."""
    curves = _binned(entry, ours, scratch, _class_chances)
    if not curves:
        return []
    listed = [
        [name, f"{100 * predicted:.3g} %", f"{100 * observed:.3g} %", f"{n:,}"]
        for name, points in curves.items()
        for predicted, observed, n in points
    ]
    positive = ours[0].labels[1] if len(ours[0].labels) == 2 else "the likeliest class"
    caption = (
        f"{target}: the share of rows that were {positive}, by the probability that was "
        "predicted, with transfer and from scratch. On the line both are equal. Bins hold equally "
        f"many predictions, {_seeds(len(ours))}."
    )
    points = Table(["Model", "Mean probability", "Observed share", "Predictions"], listed)
    return [
        Heading("Calibration", 3),
        Figure(reliability(curves, positive), caption, points),
        *_calibration_errors(entry, ours, scratch),
    ]


def _predicted_and_true(
    target: str, entry: MatrixEntry, ours: list[RunPredictions], scratch: list[RunPredictions]
) -> list[Block]:
    """Return the figure of true numbers by predicted ones, of an entry and its scratch network."""
    curves = _binned(entry, ours, scratch, _finite_numbers)
    if not curves:
        return []
    column = ours[0].labels[0]
    listed = [
        [name, f"{predicted:.4g}", f"{true:.4g}", f"{n:,}"]
        for name, points in curves.items()
        for predicted, true, n in points
    ]
    caption = (
        f"{target}: the mean of {column} by what was predicted, with transfer and from scratch. On "
        "the line both are equal; a curve that is flatter than the line predicts too extreme "
        f"numbers. Bins hold equally many predictions, {_seeds(len(ours))}."
    )
    points = Table(["Model", "Mean prediction", f"Mean {column}", "Predictions"], listed)
    return [
        Heading("Predicted and true", 3),
        Figure(predicted_and_true(curves, column), caption, points),
    ]


def _calibration_errors(
    entry: MatrixEntry, ours: list[RunPredictions], scratch: list[RunPredictions]
) -> list[Block]:
    """Return the calibration error and the Brier score of an entry beside those of scratch."""
    if not have_common_seed(ours, scratch):
        return []
    body: list[list[str | Value]] = []
    for name, words in (("ece", "expected calibration error ↓"), ("brier", "Brier score ↓")):
        comparison = compare(catalog.metric(name), ours, scratch)
        digits = decimal_places(comparison.bounds)
        enough = all(stats.evidence(run).enough for run in (*ours, *scratch))
        of_entry, of_scratch, gain = comparison.cells(digits, enough, entry)
        body.append([words, of_scratch, of_entry, gain])
    return [Table(["", "scratch", f"{entry.source} · {entry.technique}", "Gain"], body)]


# ---------------------------------------------------------------- labels and types


def _label_table(
    kind: LabelKind,
    target: str,
    entry: MatrixEntry,
    ours: list[RunPredictions],
    scratch: list[RunPredictions],
) -> list[Block]:
    names, p = ours[0].labels, ours[0].predictions
    positive = p["labels" if kind is LABELS else "actual"].sum(0, dtype=np.int64)
    most_frequent_first: list[int] = np.argsort(-positive, kind="stable").tolist()
    most = len(ours[0].rows) if kind is LABELS else np.inf  # every row has it: no AUROC
    often = [k for k in most_frequent_first if 0 < positive[k] < most]
    paired = have_common_seed(ours, scratch)
    compared: dict[int, list[Comparison]] = defaultdict(list)
    for k in often[:MAX_LABELS]:
        for name, _ in kind.measures:
            per_label_metric = catalog.per_label(name)
            assert per_label_metric is not None
            metric = per_label_metric.of(names[k], k)
            compared[k].append(compare(metric, ours, scratch if paired else []))
    digits = decimal_places([of_measures[0].bounds[0] for of_measures in compared.values()])
    body: list[list[str | Value]] = []
    for k, of_measures in compared.items():
        enough = _enough_of_label(kind, ours[0], k)
        cells = [cell for one in of_measures for cell in one.cells(digits, enough, entry)]
        body.append([names[k], f"{positive[k]:,}", *cells])
    head = [kind.first, kind.counted]
    for _, name in kind.measures:
        head += [name, f"{name}, scratch", f"{name}, gain"] if paired else [name]
    least = max(
        int(run.predictions.get("min_positives", np.ones(1)).max(initial=1)) for run in ours
    )
    if not body:
        return []
    caption = (
        f"{target}: {entry_label(entry)} of labels{' and scratch' if paired else ''}, mean over "
        f"{_plural(len(ours))} with 95 % intervals.{kind.explanation}"
    )
    if least > 1:
        caption += f" Macro averages are over the labels with at least {least} test rows."
    if len(often) > MAX_LABELS:
        caption += (
            f" The {MAX_LABELS} commonest of {len(often)} {kind.plural}; results.parquet has all."
        )
    if paired:
        caption += GAIN_LEGEND
    return [Heading(kind.heading, 3), Text(caption), Table(head, body)]


def _plural(seeds: int) -> str:
    return "one seed" if seeds == 1 else f"{seeds} seeds"


def _enough_of_label(kind: LabelKind, run: RunPredictions, column: int) -> bool:
    """Return whether there are enough test units for a verdict on one label or entity type.

    Counted are the units with the label or those without it, whichever are fewer; for an entity
    type the units that have such an entity.
    """
    if kind is LABELS:
        return (
            stats.rarer_side(run.predictions["labels"][:, column] > 0, run.groups)
            >= stats.MIN_RARER_UNITS
        )
    return count_units(run.predictions["actual"][:, column] > 0, run.groups) >= stats.MIN_UNITS


@dataclass(frozen=True)
class Comparison:
    """A metric of an entry, and of its scratch network where seeds can be paired."""

    means: list[tuple[float, float, float]]
    """Middle, low and high: of the entry, then of scratch."""
    gain: stats.Gain | None

    @property
    def bounds(self) -> list[tuple[float, float]]:
        return [(low, high) for _, low, high in self.means]

    @property
    def descending_gain(self) -> float:
        """What to sort by so that the largest gain comes first, and a missing one last."""
        value = math.nan if self.gain is None else self.gain.value
        return -value if math.isfinite(value) else math.inf

    def cells(self, digits: int, enough: bool, entry: MatrixEntry) -> list[Value | str]:
        """Return the table cells of the entry and, where there is scratch, of that and the gain.

        ``enough`` is that of `gain_estimate`.
        """
        cells = [estimate(mean, digits) for mean in self.means]
        if self.gain is not None:
            cells.append(gain_estimate(self.gain, digits, enough, entry))
        return cells


def compare(
    metric: Metric, ours: list[RunPredictions], scratch: list[RunPredictions]
) -> Comparison:
    """Compare runs of an entry with those of its scratch network, if there are any."""
    if not scratch:
        return Comparison([stats.mean_interval(metric, ours)], None)
    means = [stats.mean_interval(metric, side) for side in (ours, scratch)]
    return Comparison(means, stats.compare(metric, ours, scratch))


def estimate(mean_and_bounds: tuple[float, float, float], digits: int) -> Value | str:
    """Return a table cell of (middle, low, high) with the interval on its second line."""
    middle, low, high = (None if np.isnan(v) else v for v in mean_and_bounds)
    return DASH if middle is None else Value(interval_lines(middle, low, high, digits))


def gain_estimate(gain: stats.Gain, digits: int, enough: bool, entry: MatrixEntry) -> Value | str:
    """Return a table cell of a gain, and below it the interval and the sign of the verdict.

    A win or a loss needs ``enough`` test units, two paired seeds and a search of the ``entry``
    whose noise is known (`matrix.GainEstimate`).
    """
    middle, low, high = (None if np.isnan(v) else v for v in (gain.value, gain.low, gain.high))
    if middle is None:
        return DASH
    word = verdict(low, high, gain.seeds, enough, entry.over_scratch.unknown_choice)
    first, *interval = interval_lines(middle, low, high, digits, "+")
    second = " ".join(filter(None, (*interval, MARKS.get(word))))
    return Value((first, second) if second else (first,), word)
