"""Computes the transferability scores of a source for a target.

The features are computed once, and every registered score is made from them. This module does not
use Ray.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints import bundle
from pipeline.config import provenance, registry
from pipeline.config.schema import spec_hash
from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Objective
from pipeline.core.contracts.objective_capabilities import (
    has_cached_head,
    has_classes,
    labels_positions,
    tensors_beside_features,
)
from pipeline.core.contracts.score import Estimate, Score, ScoreTask, interval_of_halves
from pipeline.core.groups import num_units, random_half
from pipeline.core.metrics.calibration import softmax
from pipeline.core.rng import mix
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import NO_OBJECTIVE, State
from pipeline.data.manifests import Selection
from pipeline.data.stream import Decoder, Rows, eval_batches
from pipeline.io import checksums, storage
from pipeline.io.wording import plural
from pipeline.report.shift import Shift
from pipeline.report.source_scores import PairScores, ScoreValue
from pipeline.train import evaluate
from pipeline.train.online_probe import FEATURE_ROWS, features_of_ids
from pipeline.train.pretrain import device_name
from pipeline.train.ranks import default_device
from pipeline.transfer import measured_shift
from pipeline.transfer.grid import label_subset
from pipeline.transfer.measured_shift import LabelledRows, SourceSide
from pipeline.transfer.trial import Shared, TargetData

SCORES_FORMAT = 4
"""Version of the files of scores: with another one they are computed again."""
SCORING_CODE = ("pipeline.transfer.scoring", "pipeline.transfer.measured_shift")
"""Modules whose changes make scores be computed again."""
DEFAULT_SCORE = "logme"
"""The score by which sources are sorted where none chooses them."""
SCORE_ROWS = 2000
"""Training rows of a target, or positions of its rows, that scores read."""
SOURCE_ROWS = 500
"""Training rows of a source that distances and shift read. They are evenly spread, as those of the
target are: consecutive rows of a sorted file would differ from the target's for that reason alone.
"""
MIN_UNITS = 10
"""Rows, or groups of rows, that an interval needs: it is made from halves of them."""


def scores() -> dict[str, Score]:
    """Return every registered score by its name.

    A plain function is a score for classes and label sets.
    """
    registered = {name: registry.get("score", name) for name in registry.entries("score")}
    return {
        name: score if isinstance(score, Score) else Score(score)
        for name, score in registered.items()
    }


def label_kinds(objective: type[Objective], state: State | None = None) -> tuple[ScoreTask, ...]:
    """Return the kinds of labels that scores can read: of rows, or of positions of rows.

    It is () where the labels belong to neither (boxes, transcripts, answers). Only scores that read
    no labels are defined then.

    Args:
        objective: That of the target.
        state: What it fitted on the target's rows, with the names of labels that are classes.
            None: it is not known.
    """
    if labels_positions(objective):
        kinds: Any = objective.position_labels
        if state is None or len(kinds) < 2:
            return kinds
        return tuple(kind for kind in kinds if (kind == "classes") == ("labels" in state))
    if has_classes(objective):
        return ("classes",) if objective.class_tensor == "label" else ("label sets",)
    return ("numbers",) if len(tensors_beside_features(objective)) == 1 else ()


def _label_tensor(objective: type[Objective]) -> str:
    """Return the batch's tensor that holds the labels of rows; "" where they have none."""
    if has_classes(objective):
        return objective.class_tensor
    return next(iter(tensors_beside_features(objective)), "") if label_kinds(objective) else ""


def kind_of(labels: np.ndarray) -> ScoreTask:
    """Return which kind of labels an array holds."""
    if np.issubdtype(labels.dtype, np.floating):
        return "numbers"
    return "classes" if labels.ndim == 1 else "label sets"


# ---------------------------------------------------------------- pairs and their rows


@dataclass(frozen=True)
class SourceTargetPair:
    """A source to be scored for a target."""

    source: str
    backbone_key: str
    target: str
    source_rows: tuple[Selection, dict[str, str]] | None = None
    """Training rows of the source with their columns, where it has any (`sample`)."""
    source_labels: Mapping[str, int] = field(default_factory=dict)
    """Class to number of all training rows of the source, where its rows have one class."""
    source_group: str | None = None
    """Column of the source's rows that names their group."""
    source_group_count: int | None = None
    """Number of groups of all training rows of the source, where it names any."""
    wants_scores: bool = True
    """Whether scores are wanted; otherwise shift is measured alone."""


def sample(selection: Selection) -> Selection:
    """Return at most SOURCE_ROWS rows of a selection, evenly spread."""
    n = len(selection)
    if n <= SOURCE_ROWS:
        return selection
    return Selection(selection.manifest, selection.ids(evenly_spread(n, SOURCE_ROWS)))


# ---------------------------------------------------------------- one source for one target


def rows_of_every_fraction(shared: Shared, data: TargetData) -> np.ndarray:
    """Return the positions of the training rows whose labels every trial of seed 0 may use.

    They are in the subsets of all label fractions above 0. The smallest subset may have more rows
    of a class than another one, where some fractions are shares and others rows per class.
    """
    fractions = [fraction for fraction in data.spec.label_fractions if fraction]
    if not fractions:
        return np.zeros(0, dtype=np.int64)
    seed = mix(shared.seed, 0)
    subsets = [label_subset(data.train, data.labels, fraction, seed) for fraction in fractions]
    return reduce(partial(np.intersect1d, assume_unique=True), subsets)


def score_pair(pair: SourceTargetPair, shared: Shared) -> PairScores:
    """Return the scores of a source for a target; after an error, with the error.

    All scores of the same weights, rows, code and versions are computed once and kept in a file.
    """
    uri = _cache_uri(pair, shared)
    stored = checksums.document_or_none(uri, "scores are computed again") if uri else None
    if stored is not None:
        return PairScores.from_json(stored)
    wanted = scores() if pair.wants_scores else {}
    try:
        computed, has_temporary_error = _score_pair(pair, shared, wanted)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # the other sources go on
        reason = f"{type(error).__name__}: {error}"
        undefined = {
            name: ScoreValue(None, higher_is_better=score.higher_is_better, reason=reason)
            for name, score in wanted.items()
        }
        return PairScores(pair.source, pair.target, undefined, error=reason)
    if uri and not has_temporary_error:
        checksums.write_document(uri, computed.to_json())
    return computed


def _cache_uri(pair: SourceTargetPair, shared: Shared, kind: str = "") -> str:
    """Return the file of a pair's scores; "" where what they depend on has no key.

    Args:
        kind: What the file holds if not scores.
    """
    data = shared.targets[pair.target, pair.backbone_key]
    if pair.source not in shared.source_keys or not data.key:
        return ""
    arch = shared.backbone_groups[pair.backbone_key].arch
    components = provenance.components_of(
        data.spec.data.modality.name, arch.name, arch.options, data.objective.name
    )
    of_scores = tuple(("score", name) for name in registry.entries("score"))
    made = provenance.made_by(SCORING_CODE, (*components, *of_scores))
    key = spec_hash(
        SCORES_FORMAT,
        shared.source_keys[pair.source],
        [shared.parent_weights.get(pair.source), made.hash, made.versions],
        pair.backbone_key,
        data.key,
        [data.objective.name, data.objective.state],
        [shared.seed, *data.spec.label_fractions],
        pair.source_rows is not None,
        [pair.wants_scores, kind, data.spec.data.group, pair.source_group],
    )
    return storage.join(shared.root, "scores", f"{pair.target}-{pair.source}-{key}.json")


@dataclass
class ScoreInputs:
    """The arrays that scores read, and why some are missing."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    has_temporary_error: bool = False
    """Whether something is missing because of an error that may not come again."""
    position_features: np.ndarray | None = None
    """(m, D) features of labelled positions, where labels belong to positions of rows."""
    position_groups: np.ndarray | None = None
    """(m,) group of each labelled position: that of its row, or the row itself."""
    groups: np.ndarray | None = None
    """(n,) group of each row of ``features``, None where the rows name none (`GROUPS`)."""
    source_groups: np.ndarray | None = None
    """The same of ``source_features``."""
    ids: np.ndarray | None = None
    """(n,) ids of the rows of ``features``."""

    def arrays_for(self, score: Score) -> dict[str, np.ndarray]:
        """Return the arrays that a score reads."""
        arrays = {name: self.arrays[name] for name in score.inputs}
        if self._is_of_positions(score):
            assert self.position_features is not None
            arrays["features"] = self.position_features
        return arrays

    def groups_of(self, score: Score) -> dict[str, np.ndarray | None]:
        """Return the groups of the rows or positions that a score reads, where they have any."""
        of_target = self.position_groups if self._is_of_positions(score) else self.groups
        of_source = self.source_groups if "source_features" in score.inputs else None
        return {"groups": of_target, "source_groups": of_source}

    def _is_of_positions(self, score: Score) -> bool:
        return self.position_features is not None and {"features", "labels"} <= set(score.inputs)


def _score_pair(
    pair: SourceTargetPair, shared: Shared, wanted: Mapping[str, Score]
) -> tuple[PairScores, bool]:
    """Score on at most SCORE_ROWS training rows of the target, evenly spread.

    Only rows are read whose labels every trial may use (`rows_of_every_fraction`). A
    choice of sources by all labels would help trials that may use only 5 % of them.

    Returns:
        The scores, and whether one is missing because of an error that may not come again.

    Raises:
        ValueError: A feature is not finite.
    """
    began = time.perf_counter()
    data = shared.targets[pair.target, pair.backbone_key]
    inputs = ScoreInputs()
    if not label_kinds(registry.get("objective", data.objective.name)):
        inputs.missing["labels"] = (
            f"{data.objective.name} gives neither rows nor their positions labels that scores read"
        )
    if pair.source_rows is None:
        inputs.missing["source_features"] = "the source is a checkpoint, whose rows are not there"
    if wanted and all(set(score.inputs) & set(inputs.missing) for score in wanted.values()):
        undefined = {name: value_of(score, inputs) for name, score in wanted.items()}
        return PairScores(pair.source, pair.target, undefined), False
    device = default_device()
    backbone = _backbone(pair, shared, data)
    _add_target(inputs, pair, shared, data, backbone, device)
    if not wanted or any("source_features" in score.inputs for score in wanted.values()):
        _add_source(inputs, pair, data, backbone, device)
    seconds = time.perf_counter() - began
    computed = PairScores(
        pair.source,
        pair.target,
        {name: value_of(score, inputs) for name, score in wanted.items()},
        len(inputs.arrays["features"]),
        len(inputs.arrays.get("source_features", ())),
        seconds,
        device_name(device),
        shifts=_shifts(pair, shared, data, inputs, backbone, device),
    )
    return computed, inputs.has_temporary_error


def _shifts(
    pair: SourceTargetPair,
    shared: Shared,
    data: TargetData,
    inputs: ScoreInputs,
    backbone: Backbone,
    device: torch.device,
) -> tuple[Shift, ...]:
    """Measure shift with the features that the scores have read, and those of test rows."""
    head, _ = shared.heads.get(pair.source, (None, {}))
    names = head.state.get("labels", ()) if head is not None else ()
    source = SourceSide(
        pair.source,
        pair.source_rows,
        pair.source_group,
        inputs.arrays.get("source_features"),
        inputs.source_groups,
        dict(pair.source_labels),
        pair.source_group_count,
        tuple(map(str, names)),
        inputs.arrays.get("probabilities"),
    )
    labels = inputs.arrays.get("labels")
    has_one_class = (
        labels is not None and kind_of(labels) == "classes" and inputs.position_features is None
    )
    labelled = LabelledRows(
        inputs.arrays["features"],
        labels if has_one_class else None,
        data.label_names,
        inputs.groups if has_one_class else None,
        inputs.missing.get("labels") or inputs.missing.get("probabilities", ""),
        inputs.ids,
    )
    try:
        return (measured_shift.shift_from_source(data, source, labelled, backbone, device),)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # scores go on
        inputs.has_temporary_error |= isinstance(error, RuntimeError)
        why = f"{type(error).__name__}: {error}"
        return (Shift(f"source {pair.source}", "training rows", missing={"shift": why}),)


def shift_of_test(pair: SourceTargetPair, shared: Shared) -> Shift:
    """Return the shift of a target's test rows against its training rows, in a source's features.

    Labels of test rows are read, so call it only when all trials have ended. It is computed once
    for the same weights, rows, code and versions and kept in a file.
    """
    uri = _cache_uri(pair, shared, "test")
    stored = checksums.document_or_none(uri, "shift is measured again") if uri else None
    if stored is not None:
        return Shift.from_json(stored)
    data = shared.targets[pair.target, pair.backbone_key]
    device = default_device()
    backbone = _backbone(pair, shared, data)
    try:
        shift = measured_shift.train_test_shift(data, pair.source, backbone, device)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # the report goes on
        why = f"{type(error).__name__}: {error}"
        return Shift(
            "its own training rows", "test rows", missing={"shift": why}, within_target=True
        )
    if uri:
        checksums.write_document(uri, shift.to_json())
    return shift


def _backbone(pair: SourceTargetPair, shared: Shared, data: TargetData) -> Backbone:
    """Return the source's backbone with its weights, for the input of the target."""
    backbone = bundle.build_backbone(data.arch)
    weights = {name: torch.from_numpy(a) for name, a in shared.weights[pair.source].items()}
    bundle.transfer(backbone, weights, pair.source)
    return backbone


def _add_target(
    inputs: ScoreInputs,
    pair: SourceTargetPair,
    shared: Shared,
    data: TargetData,
    backbone: Backbone,
    device: torch.device,
) -> None:
    """Add the features of the target's rows, their labels, and the source's classes for them."""
    objective = registry.get("objective", data.objective.name)
    allowed = rows_of_every_fraction(shared, data)
    if not len(allowed):  # with label fraction 0 alone, rows may be read without their labels
        inputs.missing["labels"] = "label_fractions: 0 allows no label"
        allowed = np.arange(len(data.train))
    rows = data.train.subset(allowed[evenly_spread(len(allowed), SCORE_ROWS)])
    of_positions: torch.Tensor | None = None
    row_of_position = np.zeros(0, dtype=np.int64)
    if labels_positions(objective):
        options = objective.options_class(**data.objective.options)  # type: ignore[attr-defined]
        task = objective(backbone, options, data.objective.state)  # type: ignore[operator]
        inputs.ids, features, of_positions, labels, row_of_position = features_of_positions(
            task, backbone, rows, device
        )
    else:
        inputs.ids, features, others = features_of_ids(backbone, rows, device)
        labels = others.get(_label_tensor(objective))  # of the rows that could be decoded
    for tensor in (features, of_positions):
        num_bad = 0 if tensor is None else int((~torch.isfinite(tensor).all(1)).sum())
        if tensor is not None and num_bad:
            raise ValueError(
                f"targets.{pair.target}: the features of source {pair.source} are not finite for "
                f"{num_bad} of {len(tensor)} rows; its weights are damaged, or it was trained "
                "until they overflowed"
            )
    inputs.arrays["features"] = features.cpu().numpy()
    groups = measured_shift.groups_of(
        data.train.selection, measured_shift.group_column(data), inputs.ids
    )
    inputs.groups = groups
    if labels is not None and "labels" not in inputs.missing:
        inputs.arrays["labels"] = labels.cpu().numpy()
    else:
        inputs.missing.setdefault("labels", "the target's rows have none")
    if of_positions is not None:
        inputs.position_features = of_positions.cpu().numpy()
        inputs.position_groups = row_of_position if groups is None else groups[row_of_position]
    probabilities = _source_probabilities(shared, pair, backbone, features)
    if of_positions is not None:
        probabilities = "the source's classes are those of rows, the labels those of positions"
    if isinstance(probabilities, str):
        inputs.missing["probabilities"] = probabilities
    else:
        inputs.arrays["probabilities"] = probabilities


@torch.no_grad()
def features_of_positions(
    objective: Any, backbone: Backbone, rows: Rows, device: torch.device
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Return pooled features, and those of at most SCORE_ROWS positions with their labels.

    Args:
        objective: One whose labels belong to positions (`LabelsPositions`).

    Returns:
        (n,) ids of the rows, (n, D) pooled features, (m, D) features of positions, their labels,
        and (m,) the index of each position's row among the n.
    """
    backbone.to(device).eval()
    objective.to(device).eval()
    preprocess = evaluate.device_preprocessing(rows)
    ids, pooled, of_positions, labels, rows_of_positions = [], [], [], [], []
    num_rows_before = 0
    for batch, _, _ in eval_batches(rows, FEATURE_ROWS):
        batch = preprocess(batch.to(device), False)
        features = backbone(batch, want=objective.position_features)
        ids.append(batch.rows)
        pooled.append(features.pooled.float())
        of_batch, labels_of_batch, row_in_batch = objective.labelled_positions(features, batch)
        # a batch of long rows has very many positions
        kept = evenly_spread(len(labels_of_batch), SCORE_ROWS)
        of_positions.append(of_batch[torch.from_numpy(kept)])
        labels.append(labels_of_batch[torch.from_numpy(kept)])
        rows_of_positions.append(num_rows_before + row_in_batch.cpu().numpy()[kept])
        num_rows_before += len(batch)
    kept = evenly_spread(sum(map(len, labels)), SCORE_ROWS)
    return (
        np.concatenate(ids),
        torch.cat(pooled),
        torch.cat(of_positions)[torch.from_numpy(kept)],
        torch.cat(labels)[torch.from_numpy(kept)],
        np.concatenate(rows_of_positions)[kept],
    )


def _predicts_one_class(objective: Any) -> bool:
    """Return whether a row has one class, which the head predicts from pooled features."""
    has_sets = "labels" in objective.roles
    return not has_sets and has_classes(objective) and has_cached_head(objective)


def _source_probabilities(
    shared: Shared, pair: SourceTargetPair, backbone: Backbone, features: torch.Tensor
) -> np.ndarray | str:
    """Return (n, Z) probabilities of the source's own classes, or why there are none.

    Args:
        features: (n, D) pooled features.
    """
    spec, tensors = shared.heads.get(pair.source, (None, {}))
    if spec is None or spec.name == NO_OBJECTIVE.name:
        return "the source is a checkpoint without classes of its own"
    kind: Any = registry.get("objective", spec.name)
    if not _predicts_one_class(kind):
        return f"the source predicts no single class of a row (it is of {spec.name})"
    head = kind(backbone, kind.options_class(**spec.options), spec.state)
    head.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in tensors.items()})
    head.to(features.device).eval()
    with torch.no_grad():
        without_tensors = Batch(np.arange(len(features)), torch.zeros(0), {})
        logits = head.head_predict(features, without_tensors)["scores"]
    return softmax(logits.double().cpu().numpy())


def _add_source(
    inputs: ScoreInputs,
    pair: SourceTargetPair,
    data: TargetData,
    backbone: Backbone,
    device: torch.device,
) -> None:
    """Add the features of the source's own rows, which are decoded as the target's are."""
    if pair.source_rows is None:
        return
    selection, columns = pair.source_rows
    rows = Rows(selection, Decoder(data.train.modality, None, {}, columns))
    try:
        ids, features, _ = features_of_ids(backbone, rows, device)
    except (ValueError, RuntimeError, OSError) as error:  # scores that do not read them go on
        inputs.has_temporary_error = not isinstance(error, ValueError)
        inputs.missing["source_features"] = f"{type(error).__name__}: {error}"
        return
    is_finite = torch.isfinite(features).all(1)
    usable = features[is_finite]
    if len(usable) < 2:
        inputs.missing["source_features"] = "fewer than two rows of the source can be used"
        return
    inputs.arrays["source_features"] = usable.cpu().numpy()
    inputs.source_groups = measured_shift.groups_of(
        selection, pair.source_group, ids[is_finite.cpu().numpy()]
    )


# ---------------------------------------------------------------- one score


def value_of(score: Score, inputs: ScoreInputs) -> ScoreValue:
    """Return a score with its interval, or why it is not defined."""
    undefined = partial(ScoreValue, None, None, None, score.higher_is_better, None)
    for name in score.inputs:
        if name in inputs.missing:
            return undefined(inputs.missing[name])
    kind = kind_of(inputs.arrays["labels"]) if "labels" in score.inputs else None
    if kind is not None and kind not in score.tasks:
        return undefined(
            f"it is defined for {' and '.join(score.tasks)}, and the labels are {kind}"
        )
    if kind == "numbers" and not np.isfinite(inputs.arrays["labels"]).all():
        return undefined("the labels are not finite")
    began = time.perf_counter()
    arrays, groups = inputs.arrays_for(score), inputs.groups_of(score)
    try:
        result = _compute(score, {**arrays, **groups})
    except Exception as error:  # scores of plugins may raise anything; the others continue
        inputs.has_temporary_error |= not _is_deterministic(error)
        return undefined(f"{type(error).__name__}: {error}")
    value = result[0] if isinstance(result, tuple) else result
    if not np.isfinite(value):
        return undefined("too few rows, or rows that the score cannot distinguish")
    interval, reason = (np.nan, np.nan), ""
    num_units, unit = _fewest_units(arrays, groups)
    if num_units < MIN_UNITS:  # an interval that the score made itself is left out too
        reason = f"{plural(num_units, unit)}; an interval needs {MIN_UNITS}"
    elif isinstance(result, tuple):
        interval = result[1:]
    else:
        try:
            interval = _interval(score, arrays, groups, value)
        except Exception as error:  # of the score of half of the rows: that of all rows is kept
            inputs.has_temporary_error |= not _is_deterministic(error)
            reason = f"{type(error).__name__}: {error}"
        else:
            if np.isnan(interval).any():
                reason = (
                    "undefined on a random half of the rows: labels of one class alone, or rows "
                    "that the score cannot distinguish"
                )
    seconds = time.perf_counter() - began
    value, low, high = (float(np.clip(number, *score.bounds)) for number in (value, *interval))
    if not np.isfinite([low, high]).all():
        return ScoreValue(value, None, None, score.higher_is_better, seconds, reason)
    return ScoreValue(value, low, high, score.higher_is_better, seconds)


def _compute(score: Score, given: Mapping[str, Any]) -> float | Estimate:
    """Return a score, NaN where all labels are of one class: they tell nothing of the features."""
    labels = given["labels"] if "labels" in score.inputs else None
    if labels is not None and kind_of(labels) == "classes" and (labels == labels[:1]).all():
        return float("nan")
    return score.of(given)


def _is_deterministic(error: Exception) -> bool:
    """Return whether the same features and labels would raise this error again.

    Memory that ran out, for one, may suffice another time.
    """
    return isinstance(error, (ValueError, ArithmeticError))


def _interval(
    score: Score,
    arrays: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray | None],
    value: float,
) -> tuple[float, float]:
    """Return the 95 % interval over rows or groups."""
    n = len(arrays["features" if "features" in arrays else "labels"])
    m = len(arrays.get("source_features", ()))

    def score_random_half(rng: np.random.Generator) -> float:
        of_target = random_half(n, rng, groups["groups"])
        of_source = random_half(m, rng, groups["source_groups"])
        result = _compute(
            score,
            {
                name: rows[of_source if name.startswith("source_") else of_target]
                for name, rows in {**arrays, **groups}.items()
                if rows is not None
            },
        )
        return result[0] if isinstance(result, tuple) else result

    return interval_of_halves(value, score_random_half)


def _fewest_units(
    arrays: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray | None]
) -> tuple[int, str]:
    """Return the smaller side's number of units, and what one is: "row" or "group"."""
    sides = [(len(arrays["features" if "features" in arrays else "labels"]), groups["groups"])]
    if "source_features" in arrays:
        sides.append((len(arrays["source_features"]), groups["source_groups"]))
    return min(
        (num_units(count, of_side), "row" if of_side is None else "group")
        for count, of_side in sides
    )
