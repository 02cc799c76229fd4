"""Label leaks: single features that nearly decide the label of the training rows.

Most often such a feature was computed from the label, or is known only after it. A feature is a
field of a table, or the count, first, last, smallest or largest value of a variable in a record.
Each feature alone predicts the class of one half of the rows from the other half, by the most
frequent class of its bin, so that a column of row numbers predicts nothing. For two classes the
best threshold on all rows is tried too.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.config import registry
from pipeline.config.schema import Target
from pipeline.core.capabilities import columns_of, has_single_features
from pipeline.core.contracts import Modality
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import State
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.train import fit_components
from pipeline.train.row_checks import Finding

DECIDES = 0.98
"""A feature with this balanced accuracy or more is reported. Honest features of published tables
are below: petal width of the irises reaches 0.96, radius of breast tumours 0.91, and the Glasgow
Coma Scale for death in intensive care 0.7. A column that was computed from the label reaches 0.99
to 1.
"""
MAX_ROWS = 4096
"""Rows of the sample, equally many of each class."""
NUM_BINS = 64
"""Bins of a number."""
MIN_CLASS_ROWS = 10
"""Fewest rows that a class, or each side of a label, must have to be checked."""
MAX_LABELS = 50
"""Where rows have label sets, only this number of labels is checked, the first ones."""
SHOWN = 5
"""Features that a warning names."""


def find_leaks(modality: Modality, spec: Target, rows: Selection, state: State) -> list[Finding]:
    """Return warnings about features that decide the label. Each label of a set is tried alone.

    Args:
        modality: The fitted modality, which knows the features.
        state: The fitted state of its objective.
    """
    objective = registry.get("objective", spec.objective.name)
    role = next((role for role in ("label", "labels") if role in objective.roles), None)
    if role is None or not has_single_features(modality) or not len(rows):
        return []
    columns = spec.data.columns
    label_columns = columns_of((*objective.roles, *objective.optional_roles), columns)
    indices = _sample(rows, label_columns, objective, columns, state, role)
    inputs = fit_components.fitted_columns(type(modality), objective, columns)
    table = manifests.Reader(rows.manifest, [*dict.fromkeys([*inputs, *label_columns])]).take(
        rows.ids(indices)
    )
    truth = objective.encode(table, columns, state)[role]
    tasks = {"the label": truth}
    if role == "labels":
        names = state["labels"][:MAX_LABELS]
        tasks = {f"label {label}": truth[:, k] for k, label in enumerate(names)}
    common = {
        name: _common_classes(np.asarray(labels, dtype=np.int64)) for name, labels in tasks.items()
    }
    usable = {name: classes for name, classes in common.items() if classes.max() >= 1}
    if not usable:  # no task has two classes with enough rows
        return []
    leaks: dict[str, list[tuple[float, str]]] = {}
    for feature, values in modality.single_features(table, columns):
        scores = balanced_accuracies(values, list(usable.values()))
        for name, score in zip(usable, scores, strict=True):
            if score >= DECIDES:
                leaks.setdefault(name, []).append((score, feature))
    return [_finding(name, scores, len(table)) for name, scores in leaks.items()]


def _finding(label: str, scores: list[tuple[float, str]], rows: int) -> Finding:
    """Return the warning about the (balanced accuracy, feature) pairs that decide a label."""
    best = sorted(scores, key=lambda pair: (-pair[0], pair[1]))
    shown = ", ".join(f"{feature} ({score:.3f})" for score, feature in best[:SHOWN])
    more = f" and {len(best) - SHOWN} more" if len(best) > SHOWN else ""
    verb = "nearly decides" if len(best) == 1 else "each nearly decide"
    return Finding(
        f"{shown}{more} alone {verb} {label} (balanced accuracy on {rows:,} training rows; "
        f"{DECIDES} and above is reported): is it made from the "
        "label, or known only after it? Then leave it out: results would mean nothing",
        is_warning=True,
    )


def _sample(
    rows: Selection,
    label_columns: list[str],
    objective,
    columns: dict[str, str],
    state: State,
    role: str,
) -> np.ndarray:
    """Return positions of at most MAX_ROWS rows: equally many of each class, or evenly spread."""
    count = len(rows)
    if count <= MAX_ROWS:
        return np.arange(count)
    if role != "label":
        return evenly_spread(count, MAX_ROWS)
    classes = objective.encode(manifests.read_columns(rows, label_columns), columns, state)["label"]
    order = np.random.default_rng(0).permutation(count)
    order = order[np.argsort(classes[order], kind="stable")]
    starts = np.searchsorted(classes[order], np.arange(classes.max() + 2))
    each = max(MIN_CLASS_ROWS, MAX_ROWS // len(np.unique(classes)))
    spans = pairwise(starts)
    kept = np.concatenate([order[start : min(stop, start + each)] for start, stop in spans])
    if len(kept) > MAX_ROWS:
        kept = np.random.default_rng(1).permutation(kept)[:MAX_ROWS]
    return np.sort(kept)


def _common_classes(classes: np.ndarray) -> np.ndarray:
    """Return (n,) classes numbered from 0; -1 for classes of fewer than MIN_CLASS_ROWS rows."""
    names, index, counts = np.unique(classes, return_inverse=True, return_counts=True)
    is_common = counts >= MIN_CLASS_ROWS
    numbers = np.where(is_common, np.cumsum(is_common) - 1, -1)
    return numbers[index.reshape(-1)] if len(names) else classes


def balanced_accuracies(values: np.ndarray, tasks: list[np.ndarray]) -> list[float]:
    """Return how well one feature predicts each task, a half of the rows from the other half.

    Args:
        values: (n,) float64, NaN where a row has none; or (n,) int64 numbers of categories.
        tasks: (n,) class numbers from 0 each; -1 for rows that do not count.

    Returns:
        Each task's mean recall over its classes.
    """
    half = np.random.default_rng(0).permutation(len(values)) % 2 == 0
    hits_of_tasks = [np.zeros(task.max() + 1) for task in tasks]  # by class
    for fitted, tested in ((half, ~half), (~half, half)):
        bins = _bins(values, fitted)
        for task, hits in zip(tasks, hits_of_tasks, strict=True):
            hits += _hits(bins, task, fitted, tested)
    scores = [
        float((hits / np.bincount(task[task >= 0], minlength=len(hits))).mean())
        for hits, task in zip(hits_of_tasks, tasks, strict=True)
    ]
    if np.issubdtype(values.dtype, np.integer):
        return scores
    return [
        max(score, _best_threshold(values, task)) if task.max() == 1 else score
        for score, task in zip(scores, tasks, strict=True)
    ]


def _hits(
    bins: np.ndarray,
    task: np.ndarray,
    fitted: np.ndarray,
    tested: np.ndarray,
) -> np.ndarray:
    """Return (C,) how many tested rows of each class are predicted right by their bin.

    A bin predicts the class of which it holds the largest share of the fitted rows.

    Args:
        bins: (n,) the bin of each row.
        task: (n,) class numbers; -1 for rows that do not count.
        fitted: (n,) bool, the rows that the prediction is made from.
        tested: (n,) bool, the rows that are predicted.
    """
    num_classes = task.max() + 1
    fitted = fitted & (task >= 0)
    tested = tested & (task >= 0)
    counts = np.bincount(
        bins[fitted] * num_classes + task[fitted], minlength=(bins.max() + 1) * num_classes
    ).reshape(-1, num_classes)
    shares = counts / np.maximum(1, counts.sum(0))
    predicted = np.where(counts.any(1), shares.argmax(1), -1)  # -1: no fitted row in this bin
    is_hit = predicted[bins[tested]] == task[tested]
    return np.bincount(task[tested], weights=is_hit, minlength=num_classes)


def _best_threshold(values: np.ndarray, task: np.ndarray) -> float:
    """Return the balanced accuracy of two classes by the best threshold on all rows.

    Rows without a value count as wrong. Half of few rows would have too few near the threshold to
    find it. With MIN_CLASS_ROWS rows of each class, chance alone does not reach DECIDES: it
    separates 10 from 10 rows in one of 90,000 features.
    """
    usable = np.isfinite(values) & (task >= 0)
    order = np.argsort(values[usable], kind="stable")
    ranked, truth = values[usable][order], task[usable][order]
    negatives, positives = np.bincount(task[task >= 0], minlength=2)
    ends = np.zeros(0, dtype=np.int64)
    if len(ranked):
        ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    # shares of each class up to each value
    below_0 = np.cumsum(truth == 0)[ends] / negatives
    below_1 = np.cumsum(truth == 1)[ends] / positives
    above_0 = below_0[-1:] - below_0
    above_1 = below_1[-1:] - below_1
    rising = np.max(below_0 + above_1, initial=0.0)
    falling = np.max(below_1 + above_0, initial=0.0)
    return float(max(rising, falling) / 2)


def _bins(values: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Return (n,) the bin of each row.

    Categories are bins. Numbers are cut at edges from the ``fitted`` rows, and missing ones have a
    bin of their own.
    """
    if np.issubdtype(values.dtype, np.integer):
        return values - values.min()
    is_present = np.isfinite(values)
    numbers = values[is_present & fitted]
    distinct = np.unique(numbers)
    if not len(distinct):
        return np.where(is_present, 1, 0)
    if len(distinct) > NUM_BINS:
        edges = np.unique(np.quantile(numbers, np.arange(1, NUM_BINS) / NUM_BINS))
    else:
        edges = (distinct[1:] + distinct[:-1]) / 2
    return np.where(is_present, np.searchsorted(edges, np.where(is_present, values, 0.0)) + 1, 0)
