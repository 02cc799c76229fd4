"""Metrics by name, computed from gathered predictions.

A metric that is a ratio of sums over test units (accuracy, loss, perplexity) also gives each unit's
(numerator, denominator), and one that can be computed from how often each unit was drawn gives
``resampled``: both make bootstrap intervals cheap. The others are computed anew for every resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.config.registry import nearest
from pipeline.metrics import calibration, coco_ap
from pipeline.metrics.ranking import (
    Ranking,
    weighted_auroc,
    weighted_average_precision,
    weighted_min_precision_sensitivity,
)

Predictions = dict[str, np.ndarray]
"""Named arrays with the test units first: ``scores`` (n, classes) logits, ``label`` (n,), ``loss``
(n,), ``count`` (n,).

Of several labels a row: ``labels`` (n, L) 0 or 1 beside ``scores`` (n, L), and ``min_positives``
(n,), how many positives among the n rows a label needs to stand in a macro average (1 without it).
Of entities: ``hits``, ``guessed`` and ``actual`` (n, T) by type; of words: ``right`` of ``words``
(n,). Of answers: ``exact`` and ``f1`` (n,), 0 to 1. Of language models: ``bytes`` (n,) beside
``loss``, a sum of nats. Of transcripts: ``word_errors`` of ``words`` and ``char_errors`` of
``chars`` (n,). Of samples: ``count`` of them (n,) beside ``loss``, a sum of nats. Of policies:
``squared_error``, summed over ``action_numbers`` (n,), in their own units; of an episode of each
row ``success`` (n,) 0, 1 or NaN, ``return`` and ``steps``, beside those of the demonstration
(``expert_``) and of a random policy (``random_``) in the same world. Of rows that are judged at
several positions (every hour): ``scores`` (n, M, classes) and ``label`` (n, M), -1 where a row has
no more positions. Of two classes the second is the positive one; ``threshold`` (n,) the probability
from which rows are called so, where one was chosen.
"""


SHARES = frozenset(
    (
        "accuracy",
        "top5_accuracy",
        "macro_f1",
        "micro_f1",
        "balanced_accuracy",
        "auroc",
        "auprc",
        "min_precision_sensitivity",
        "ece",
        "precision_at_threshold",
        "sensitivity_at_threshold",
        "specificity_at_threshold",
        "macro_auroc",
        "macro_average_precision",
        "average_precision",
        "map",
        "map50",
        "miou",
        "pixel_accuracy",
        "entity_f1",
        "word_accuracy",
        "answer_f1",
        "exact_match",
        "success",
        "expert_success",
        "random_success",
    )
)
"""Metrics between 0 and 1: an interval that Student's t widens ends there."""
NOT_NEGATIVE = frozenset(("bits_per_sample", "bits_per_byte", "wer", "cer", "action_error"))
"""Errors: none is the least, and there is no greatest."""
STEPS = frozenset(("steps", "expert_steps", "random_steps"))
"""Lengths of episodes: at most the steps after which a world ends them (``most_steps``)."""


@dataclass(frozen=True)
class Metric:
    """``value`` of predictions; ``units`` (n, 2) numerators and denominators when value = final(sum
    / sum).

    ``resampled`` (predictions, counts) -> (R,) values: ``counts`` (R, n) says how often each unit
    was drawn in each of R resamples, so what does not change with the draw (sorting, matching) is
    done once. NaN where a resample has no value. ``each`` names the metric of one label
    (``of_label``) that this one averages.
    """

    name: str
    higher_is_better: bool
    value: Callable[[Predictions], float]
    units: Callable[[Predictions], np.ndarray] | None = None
    final: Callable[[float], float] = float
    resampled: Callable[[Predictions, np.ndarray], np.ndarray] | None = None
    each: str | None = None

    def bounds(self, p: Predictions) -> tuple[float, float]:
        """(least, greatest) value that the metric can have on rows such as these, so that no
        interval passes them.
        """
        name = self.name.partition("/")[0]
        if name in SHARES:
            return 0.0, 1.0
        if name == "kappa":
            return -1.0, 1.0
        if name == "brier":
            return 0.0, 1.0 if p["scores"].shape[-1] == 2 else 2.0
        if name == "perplexity":
            return 1.0, math.inf
        if name in STEPS:
            return 0.0, float(p["most_steps"].mean()) if len(p.get("most_steps", ())) else math.inf
        if (
            name == "loss"
            # of densities (policies that tell numbers) it may be negative, and then there is no
            # least value
        ):
            return (0.0 if p["loss"].min(initial=0) >= 0 else -math.inf), math.inf
        if name in NOT_NEGATIVE:
            return 0.0, math.inf
        return -math.inf, math.inf

    def of_units(self, units: np.ndarray) -> float:
        """The value from (n, 2) units; NaN when nothing was counted."""
        total = units.sum(0)
        return self.final(float(total[0] / total[1])) if total[1] else float("nan")


def _ratio(
    name: str,
    higher: bool,
    units: Callable[[Predictions], np.ndarray],
    final: Callable[[float], float] = float,
    each: str | None = None,
) -> Metric:
    def value(p: Predictions) -> float:
        total = units(p).sum(0)
        return final(float(total[0] / total[1])) if total[1] else float("nan")

    return Metric(name, higher, value, units, final, each=each)


def _summed(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n, 2) float64: each row's sum of values, and how many there are, of (n,) or of (n, M)
    positions.
    """
    n = len(values)
    return (
        np.stack(
            [np.where(known, values, 0).reshape(n, -1).sum(1), known.reshape(n, -1).sum(1)], axis=1
        ).astype(np.float64)
        if n
        else np.zeros((0, 2))
    )


def _hits(k: int):
    def units(p: Predictions) -> np.ndarray:
        scores, label = torch.as_tensor(p["scores"]), torch.as_tensor(p["label"])
        if not len(label):
            return np.zeros((0, 2))
        hits = (scores.topk(min(k, scores.shape[-1]), dim=-1).indices == label[..., None]).any(-1)
        return _summed(hits.numpy(), p["label"] >= 0)

    return units


def _brier_units(p: Predictions) -> np.ndarray:
    """Squared errors of probabilities: of two classes the positive one's, of more their sum over
    classes (Brier 1950).
    """
    chance, label = calibration.softmax(p["scores"]), p["label"]
    if chance.shape[-1] == 2:
        return _summed((chance[..., 1] - (label == 1)) ** 2, label >= 0)
    return _summed(
        ((chance - (label[..., None] == np.arange(chance.shape[-1]))) ** 2).sum(-1), label >= 0
    )


def _called(
    of: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> Callable[[Predictions], np.ndarray]:
    """Units of a share at the decision threshold: ``of`` (rows called positive, positive rows)
    gives what is right, and of which.
    """

    def units(p: Predictions) -> np.ndarray:
        known = p["label"] >= 0
        threshold = p["threshold"].reshape(-1, *[1] * (known.ndim - 1))
        right, among = of(
            (calibration.softmax(p["scores"])[..., 1] >= threshold) & known, p["label"] == 1
        )
        return _summed(right, among & known)

    return units


def _loss_units(p: Predictions) -> np.ndarray:
    count = p["count"] if "count" in p else np.ones(len(p["loss"]))
    return np.stack([p["loss"], count], axis=1).astype(np.float64)


def _bytes_units(p: Predictions) -> np.ndarray:
    """Bits and UTF-8 bytes: comparable between tokenizers, as perplexity is not. No value for rows
    whose bytes were not counted.
    """
    known = p["bytes"] if "bytes" in p else np.zeros(len(p["loss"]))
    return np.stack([p["loss"] / math.log(2), known], axis=1).astype(np.float64)


def _means(name: str) -> Callable[[Predictions], np.ndarray]:
    """Of the rows that have a value."""
    return lambda p: _summed(p[name], ~np.isnan(p[name]))


def _shares(part: str, whole: str) -> Callable[[Predictions], np.ndarray]:
    return lambda p: np.stack([p[part], p[whole]], axis=1).astype(np.float64)


def _sample_units(p: Predictions) -> np.ndarray:
    """Bits and samples (van den Oord et al. 2016 quantise them to 256 values, 8 bits each without a
    model).
    """
    return _loss_units(p) / np.array([math.log(2), 1.0])


def _entity_units(p: Predictions, kind: int | None = None) -> np.ndarray:
    """F1 = 2 hits / (found + true): a ratio of sums, over all types (micro) or of one."""
    hits, guessed, actual = (
        p[name].sum(1) if kind is None else p[name][:, kind]
        for name in ("hits", "guessed", "actual")
    )
    return np.stack([2 * hits, guessed + actual], axis=1).astype(np.float64)


def confusion(p: Predictions) -> np.ndarray:
    """(C, C) int64 rows of each true class (first axis) that were taken for each class (second
    axis).
    """
    classes = p["scores"].shape[1]
    return np.bincount(
        p["label"].astype(np.int64) * classes + p["scores"].argmax(1), minlength=classes * classes
    ).reshape(classes, classes)


# ---------------------------------------------------------------- from how often each row was drawn


def _columns(counts: np.ndarray) -> np.ndarray:
    """(n, R) float64 of counts (R, n): the draws of a row lie together, so rows are sorted and
    summed in long runs.
    """
    return np.ascontiguousarray(counts.T, dtype=np.float64)


def _mean_where(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(R,) means over the first axis of what is there; NaN where nothing is."""
    count = there.sum(0)
    return np.where(count > 0, np.where(there, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _f1(hits: np.ndarray, true: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    return 2 * hits / np.maximum(true + guessed, 1)


def _positions(p: Predictions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(K, C) scores, (K,) int64 labels and (K, R) how often each was drawn: of rows, or of every
    position of rows, drawn as often as its row.
    """
    scores, label, drawn = p["scores"], p["label"].astype(np.int64), _columns(counts)
    if label.ndim == 1:
        return scores, label, drawn
    row, place = np.nonzero(label >= 0)
    return scores[row, place], label[row, place], drawn[row]


def _class_counts(p: Predictions, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drawn rows of each class: hits, true ones and predicted ones, each (C, R)."""
    scores, label, drawn = _positions(p, counts)
    guess = scores.argmax(1)

    def by_class(of: np.ndarray, rows: np.ndarray) -> np.ndarray:
        out = np.zeros((scores.shape[1], drawn.shape[1]))
        order = rows[np.argsort(of[rows], kind="stable")]
        if len(order):
            found, starts = np.unique(of[order], return_index=True)
            out[found] = np.add.reduceat(drawn[order], starts, axis=0)
        return out

    every = np.arange(len(label))
    return (
        by_class(label, np.flatnonzero(label == guess)),
        by_class(label, every),
        by_class(guess, every),
    )


def _balanced(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that a draw has rows of."""
    hits, true, _ = _class_counts(p, counts)
    return _mean_where(hits / np.maximum(true, 1), true > 0)


def _macro_f1(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Of classes by the largest score; of label sets by probabilities above 0.5, over the
    ``scored`` labels.
    """
    if "labels" in p:
        kept, drawn = scored(p), _columns(counts)
        true, guess = p["labels"][:, kept].astype(bool), p["scores"][:, kept] > 0
        hits, true, guessed = (
            (part.T.astype(np.float64) @ drawn) for part in (true & guess, true, guess)
        )
        return _mean_where(_f1(hits, true, guessed), true > 0)
    hits, true, guessed = _class_counts(p, counts)
    return _mean_where(_f1(hits, true, guessed), true + guessed > 0)


def _once(
    resampled: Callable[[Predictions, np.ndarray], np.ndarray],
) -> Callable[[Predictions], float]:
    """The value of the rows themselves: each drawn once."""
    return lambda p: float(
        resampled(p, np.ones((1, len(next(iter(p.values())))), dtype=np.int64))[0]
    )


RANKINGS: dict[str, Ranking] = {
    "auroc": weighted_auroc,
    "average_precision": weighted_average_precision,
}
"""Metrics of one label, by the name that a results row ``auroc/Effusion`` begins with."""

RATIOS: dict[str, Callable[[Predictions, int | None], np.ndarray]] = {"entity_f1": _entity_units}
"""Those that are ratios of sums over test units (``entity_f1/person``): (n, 2) units of the label
in a column.
"""


def _macro(
    ranking: Ranking, scores: np.ndarray, positive: np.ndarray, drawn: np.ndarray
) -> np.ndarray:
    """(R,) means over the labels that have both classes in a draw; NaN where none has, or a score
    is NaN.
    """
    if np.isnan(scores).any():
        return np.full(drawn.shape[1], np.nan)
    values = np.array(
        [ranking(scores[:, k], positive[:, k], drawn) for k in range(scores.shape[1])]
    ).reshape(-1, drawn.shape[1])
    return _mean_where(values, ~np.isnan(values))


def _of_classes(ranking: Ranking) -> Callable[[Predictions, np.ndarray], np.ndarray]:
    """Of two classes the positive one's, by how far its score lies above the other's; of more each
    against the rest, by its probability, averaged.
    """

    def resampled(p: Predictions, counts: np.ndarray) -> np.ndarray:
        scores, label, drawn = _positions(p, counts)
        if scores.shape[1] == 2:
            return ranking(scores[:, 1].astype(np.float64) - scores[:, 0], label == 1, drawn)
        chance = torch.as_tensor(scores).double().softmax(1).numpy()
        return _macro(ranking, chance, label[:, None] == np.arange(scores.shape[1]), drawn)

    return resampled


def _calibration_error(p: Predictions, counts: np.ndarray) -> np.ndarray:
    scores, label, drawn = _positions(p, counts)
    return calibration.weighted_calibration_error(*calibration.confidence(scores, label), drawn)


def _kappa(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Cohen's kappa with linear weights: one less than the mean distance between classes, as a
    share of what chance gives (Cohen 1968; lengths of stay: Harutyunyan et al. 2019). NaN where
    only one class is there and called.
    """
    scores, label, drawn = _positions(p, counts)
    classes = scores.shape[1]
    cell = label * classes + scores.argmax(1)
    table = np.zeros((classes * classes, drawn.shape[1]))
    if len(cell):
        order = np.argsort(cell, kind="stable")
        there, starts = np.unique(cell[order], return_index=True)
        table[there] = np.add.reduceat(drawn[order], starts, axis=0)
    table = table.reshape(classes, classes, -1)
    apart = np.abs(np.arange(classes)[:, None] - np.arange(classes)).astype(np.float64)
    found = np.einsum("cd,cdr->r", apart, table)
    expected = np.einsum("cr,cd,dr->r", table.sum(1), apart, table.sum(0)) / np.maximum(
        table.sum((0, 1)), 1
    )
    return np.where(expected > 0, 1 - found / np.maximum(expected, 1e-300), np.nan)


# ---------------------------------------------------------------- several labels a row


def scored(p: Predictions, strict: bool = False) -> np.ndarray:
    """(L,) bool: labels that stand in macro averages, as they have a negative and ``min_positives``
    positives among these rows.

    It is counted once, over the rows that are scored, so it is the same for every run and every
    resample of them. A resample may still miss one class of a label: that label is left out of its
    average. Where no label has so many (a small validation split), those with one positive stand
    in, unless ``strict``, as for test rows. Raises ValueError when no label is left.
    """
    n, found = len(p["labels"]), p["labels"].sum(0, dtype=np.int64)
    least = max(1, int(p["min_positives"][0])) if n and "min_positives" in p else 1
    for enough in (least,) if strict else (least, 1):
        kept = (found >= enough) & (found < n)
        if kept.any():
            return kept
    raise ValueError(
        f"none of {len(found)} labels has {least if strict else 1} positive rows and a "
        f"negative one among these {n} rows (at most "
        f"{int(found.max(initial=0))} positive): "
        f"{'lower min_positives, or ' if strict else ''}give this split more rows"
    )


def _macro_of_labels(ranking: Ranking) -> Callable[[Predictions, np.ndarray], np.ndarray]:
    def resampled(p: Predictions, counts: np.ndarray) -> np.ndarray:
        kept = scored(p)
        return _macro(
            ranking, p["scores"][:, kept], p["labels"][:, kept].astype(bool), _columns(counts)
        )

    return resampled


def _micro_f1_units(p: Predictions) -> np.ndarray:
    true, guess = p["labels"].astype(bool), p["scores"] > 0
    return np.stack([2 * (true & guess).sum(1), true.sum(1) + guess.sum(1)], axis=1).astype(
        np.float64
    )


def of_label(name: str, column: int | None) -> Metric:
    """The metric of one label, such as ``auroc/Effusion`` or ``entity_f1/person``, from its column
    of the predictions' arrays.
    """
    of = name.partition("/")[0]

    def known() -> int:
        if column is None:
            raise ValueError(
                f"metric {name}: it is not known which column of the predictions is this label's"
            )
        return column

    if of in RATIOS:
        return _ratio(name, True, lambda p: RATIOS[of](p, known()))

    def resampled(p: Predictions, counts: np.ndarray) -> np.ndarray:
        return RANKINGS[of](
            p["scores"][:, known()], p["labels"][:, known()].astype(bool), _columns(counts)
        )

    return Metric(name, True, _once(resampled), resampled=resampled)


def per_label(name: str, p: Predictions, labels: Sequence[str]) -> dict[str, float]:
    """A metric of every label by itself; labels without both classes among the rows have no
    ranking, types that are neither there nor found no F1.
    """
    found = {label: of_label(f"{name}/{label}", k).value(p) for k, label in enumerate(labels)}
    return {label: value for label, value in found.items() if not math.isnan(value)}


# ---------------------------------------------------------------- boxes and masks


def _map(p: Predictions, counts: np.ndarray) -> np.ndarray:
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS, counts)


def _map50(p: Predictions, counts: np.ndarray) -> np.ndarray:
    return coco_ap.average_precision(p, coco_ap.IOU_THRESHOLDS[:1], counts)


def _miou(p: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean over classes of intersection over union, each summed over all images; a class that is
    neither there nor predicted is left out.
    """
    drawn = counts.astype(np.float64)
    inner, guessed, true = (
        drawn @ p[name].astype(np.float64) for name in ("intersection", "predicted", "actual")
    )
    union = guessed + true - inner
    return _mean_where((inner / np.maximum(union, 1)).T, (union > 0).T)


def _pixel_units(p: Predictions) -> np.ndarray:
    return np.stack([p["intersection"].sum(1), p["actual"].sum(1)], axis=1).astype(np.float64)


METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        _ratio("accuracy", True, _hits(1)),
        _ratio("top5_accuracy", True, _hits(5)),
        Metric("macro_f1", True, _once(_macro_f1), resampled=_macro_f1),
        _ratio("micro_f1", True, _micro_f1_units),
        Metric("balanced_accuracy", True, _once(_balanced), resampled=_balanced),
        Metric(
            "auroc", True, _once(_of_classes(weighted_auroc)), resampled=_of_classes(weighted_auroc)
        ),
        Metric(
            "auprc",
            True,
            _once(_of_classes(weighted_average_precision)),
            resampled=_of_classes(weighted_average_precision),
        ),
        Metric(
            "min_precision_sensitivity",
            True,
            _once(_of_classes(weighted_min_precision_sensitivity)),
            resampled=_of_classes(weighted_min_precision_sensitivity),
        ),
        Metric("kappa", True, _once(_kappa), resampled=_kappa),
        _ratio("brier", False, _brier_units),
        Metric("ece", False, _once(_calibration_error), resampled=_calibration_error),
        _ratio(
            "precision_at_threshold",
            True,
            _called(lambda called, positive: (called & positive, called)),
        ),
        _ratio(
            "sensitivity_at_threshold",
            True,
            _called(lambda called, positive: (called & positive, positive)),
        ),
        _ratio(
            "specificity_at_threshold",
            True,
            _called(lambda called, positive: (~called & ~positive, ~positive)),
        ),
        Metric(
            "macro_auroc",
            True,
            _once(_macro_of_labels(weighted_auroc)),
            resampled=_macro_of_labels(weighted_auroc),
            each="auroc",
        ),
        Metric(
            "macro_average_precision",
            True,
            _once(_macro_of_labels(weighted_average_precision)),
            resampled=_macro_of_labels(weighted_average_precision),
            each="average_precision",
        ),
        Metric("map", True, _once(_map), resampled=_map),
        Metric("map50", True, _once(_map50), resampled=_map50),
        Metric("miou", True, _once(_miou), resampled=_miou),
        _ratio("pixel_accuracy", True, _pixel_units),
        _ratio("entity_f1", True, _entity_units, each="entity_f1"),
        _ratio("word_accuracy", True, _shares("right", "words")),
        _ratio("answer_f1", True, _means("f1")),
        _ratio("exact_match", True, _means("exact")),
        _ratio("wer", False, _shares("word_errors", "words")),
        _ratio("cer", False, _shares("char_errors", "chars")),
        _ratio("action_error", False, _shares("squared_error", "action_numbers")),
        _ratio("success", True, _means("success")),
        _ratio("return", True, _means("return")),
        _ratio("steps", True, _means("steps")),
        _ratio("expert_success", True, _means("expert_success")),
        _ratio("expert_return", True, _means("expert_return")),
        _ratio("expert_steps", True, _means("expert_steps")),
        _ratio("random_success", True, _means("random_success")),
        _ratio("random_return", True, _means("random_return")),
        _ratio("random_steps", True, _means("random_steps")),
        _ratio("loss", False, _loss_units),
        _ratio("bits_per_sample", False, _sample_units),
        _ratio("bits_per_byte", False, _bytes_units),
        _ratio("perplexity", False, _loss_units, lambda mean: math.exp(min(mean, 700.0))),
    )
}


def metric(name: str, labels: Sequence[str] = ()) -> Metric:
    """A metric by name; ``auroc/Effusion`` is that of one label (or type of entity), whose column
    is its place in ``labels``.

    Raises ValueError with the nearest names.
    """
    of, _, label = name.partition("/")
    if label and (of in RANKINGS or of in RATIOS):
        return of_label(name, list(labels).index(label) if label in labels else None)
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; {nearest(name, METRICS)}")
    return METRICS[name]
