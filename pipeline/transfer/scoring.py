"""How transferability scores are computed: one pass of features for a source and a target, from
which every registered score is made. This module does not use Ray.
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
from pipeline.core.contracts.score import Score, ScoreTask, interval_of_halves
from pipeline.core.groups import num_units, random_half
from pipeline.core.metrics.calibration import softmax
from pipeline.core.rng import mix
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import NO_OBJECTIVE, State
from pipeline.data.manifests import Selection
from pipeline.data.stream import Decoder, Rows, eval_batches
from pipeline.io import checksums, storage
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
SCORING_CODE = ("pipeline.transfer.scoring", "pipeline.transfer.measured_shift")
DEFAULT_SCORE = "logme"
"""What sources are sorted by where no score chooses them."""
SCORE_ROWS = 2000
SOURCE_ROWS = 500
"""Training rows of a source that distances and shift read, evenly spread as the target's are: runs
of consecutive rows of sorted files would differ from them though nothing else does."""
FEWEST_ROWS = 10
"""Rows, or groups of rows, that an interval needs: it is made from halves of them."""


def scores() -> dict[str, Score]:
    """Return every registered score by its name; a plain function is one of classes and sets."""
    found = {name: registry.get("score", name) for name in registry.entries("score")}
    return {name: one if isinstance(one, Score) else Score(one) for name, one in found.items()}


def label_kinds(objective: type[Objective], state: State | None = None) -> tuple[ScoreTask, ...]:
    """Return what the labels of rows, or of their positions, can be.

    () where neither has features of its own (boxes, transcripts, answers): only scores without
    labels are defined there.

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


# ---------------------------------------------------------------- what is asked, what is found


@dataclass(frozen=True)
class Pair:
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


def score_pair(pair: Pair, shared: Shared) -> PairScores:
    """Return the scores of a source for a target. A failure is part of the answer.

    All scores of the same weights, rows, code and versions are computed once and kept in a file.
    """
    uri = _cache_uri(pair, shared)
    kept = checksums.document_or_none(uri, "scores are computed again") if uri else None
    if kept is not None:
        return PairScores.from_json(kept)
    wanted = scores() if pair.wants_scores else {}
    try:
        found, failed = _score_pair(pair, shared, wanted)
    except (ValueError, ArithmeticError, RuntimeError) as error:  # the other sources go on
        reason = f"{type(error).__name__}: {error}"
        none = {
            name: ScoreValue(None, higher_is_better=one.higher_is_better, reason=reason)
            for name, one in wanted.items()
        }
        return PairScores(pair.source, pair.target, none, error=reason)
    if uri and not failed:  # what broke once may work the next time
        checksums.write_document(uri, found.to_json())
    return found


def _cache_uri(pair: Pair, shared: Shared, kind: str = "") -> str:
    """Return the file of a pair's scores; "" where what they depend on has no key.

    Args:
        kind: What else is kept there than scores.
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
class _Inputs:
    """What scores read, and why something is missing."""

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    has_temporary_error: bool = False
    """Whether something is missing because of an error that need not come again."""
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
        found = {name: self.arrays[name] for name in score.inputs}
        if self._is_of_positions(score):
            assert self.position_features is not None
            found["features"] = self.position_features
        return found

    def groups_of(self, score: Score) -> dict[str, np.ndarray | None]:
        """Return the groups of the rows or positions that a score reads, where they have any."""
        of_target = self.position_groups if self._is_of_positions(score) else self.groups
        of_source = self.source_groups if "source_features" in score.inputs else None
        return {"groups": of_target, "source_groups": of_source}

    def _is_of_positions(self, score: Score) -> bool:
        return self.position_features is not None and {"features", "labels"} <= set(score.inputs)


def _score_pair(pair: Pair, shared: Shared, wanted: Mapping[str, Score]) -> tuple[PairScores, bool]:
    """Score on at most SCORE_ROWS training rows of the target, evenly spread.

    Only rows are read whose labels every trial may use (`rows_of_every_fraction`). A
    choice of sources by all labels would help trials that may use only 5 % of them.

    Returns:
        The scores, and whether one is missing because of an error that need not come again.

    Raises:
        ValueError: A feature is not finite.
    """
    began = time.perf_counter()
    data = shared.targets[pair.target, pair.backbone_key]
    given = _Inputs()
    if not label_kinds(registry.get("objective", data.objective.name)):
        given.missing["labels"] = (
            f"{data.objective.name} gives neither rows nor their positions labels that scores read"
        )
    if pair.source_rows is None:
        given.missing["source_features"] = "the source is a checkpoint, whose rows are not there"
    if wanted and all(set(one.inputs) & set(given.missing) for one in wanted.values()):
        undefined = {name: _value(one, given) for name, one in wanted.items()}
        return PairScores(pair.source, pair.target, undefined), False
    device = default_device()
    backbone = _backbone(pair, shared, data)
    _add_target(given, pair, shared, data, backbone, device)
    if not wanted or any("source_features" in one.inputs for one in wanted.values()):
        _add_source(given, pair, data, backbone, device)
    seconds = time.perf_counter() - began
    found = PairScores(
        pair.source,
        pair.target,
        {name: _value(one, given) for name, one in wanted.items()},
        len(given.arrays["features"]),
        len(given.arrays.get("source_features", ())),
        seconds,
        device_name(device),
        shifts=_shifts(pair, shared, data, given, backbone, device),
    )
    return found, given.has_temporary_error


def _shifts(
    pair: Pair,
    shared: Shared,
    data: TargetData,
    given: _Inputs,
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
        given.arrays.get("source_features"),
        given.source_groups,
        dict(pair.source_labels),
        pair.source_group_count,
        tuple(map(str, names)),
        given.arrays.get("probabilities"),
    )
    labels = given.arrays.get("labels")
    has_one_class = (
        labels is not None and kind_of(labels) == "classes" and given.position_features is None
    )
    labelled = LabelledRows(
        given.arrays["features"],
        labels if has_one_class else None,
        data.label_names,
        given.groups if has_one_class else None,
        given.missing.get("labels") or given.missing.get("probabilities", ""),
        given.ids,
    )
    try:
        return (measured_shift.shift_from_source(data, source, labelled, backbone, device),)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # scores go on
        given.has_temporary_error |= isinstance(error, RuntimeError)
        why = f"{type(error).__name__}: {error}"
        return (Shift(f"source {pair.source}", "training rows", missing={"shift": why}),)


def shift_of_test(pair: Pair, shared: Shared) -> Shift:
    """Return the shift of a target's test rows against its training rows, in a source's features.

    Labels of test rows are read: it is for when all trials have ended. It is computed once for the
    same weights, rows, code and versions and kept in a file.
    """
    uri = _cache_uri(pair, shared, "test")
    kept = checksums.document_or_none(uri, "shift is measured again") if uri else None
    if kept is not None:
        return Shift.from_json(kept)
    data = shared.targets[pair.target, pair.backbone_key]
    device = default_device()
    backbone = _backbone(pair, shared, data)
    try:
        found = measured_shift.train_test_shift(data, pair.source, backbone, device)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:  # the report goes on
        why = f"{type(error).__name__}: {error}"
        return Shift(
            "its own training rows", "test rows", missing={"shift": why}, within_target=True
        )
    if uri:
        checksums.write_document(uri, found.to_json())
    return found


def _backbone(pair: Pair, shared: Shared, data: TargetData) -> Backbone:
    """Return the source's network."""
    backbone = bundle.build_backbone(data.arch)
    weights = {name: torch.from_numpy(a) for name, a in shared.weights[pair.source].items()}
    bundle.transfer(backbone, weights, pair.source)
    return backbone


def _add_target(
    given: _Inputs,
    pair: Pair,
    shared: Shared,
    data: TargetData,
    backbone: Backbone,
    device: torch.device,
) -> None:
    """Add the features of the target's rows, their labels, and the source's classes for them."""
    objective = registry.get("objective", data.objective.name)
    allowed = rows_of_every_fraction(shared, data)
    if not len(allowed):  # with label fraction 0 alone, rows may be read without their labels
        given.missing["labels"] = "label_fractions: 0 allows no label"
        allowed = np.arange(len(data.train))
    rows = data.train.subset(allowed[evenly_spread(len(allowed), SCORE_ROWS)])
    labels, labelled, row = None, None, np.zeros(0, dtype=np.int64)
    if labels_positions(objective):
        options = objective.options_class(**data.objective.options)  # type: ignore[attr-defined]
        task = objective(backbone, options, data.objective.state)  # type: ignore[operator]
        given.ids, found, labelled, labels, row = _position_features(task, backbone, rows, device)
    else:
        given.ids, found, rest = features_of_ids(backbone, rows, device)
        labels = rest.get(_label_tensor(objective))  # of the rows that could be decoded
    for one in (found, labelled):
        wrong = 0 if one is None else int((~torch.isfinite(one).all(1)).sum())
        if one is not None and wrong:
            raise ValueError(
                f"targets.{pair.target}: the features of source {pair.source} are not finite for "
                f"{wrong} of {len(one)} rows; its weights are damaged, or it was trained until "
                "they overflowed"
            )
    given.arrays["features"] = found.cpu().numpy()
    groups = measured_shift.groups_of(
        data.train.selection, measured_shift.group_column(data), given.ids
    )
    given.groups = groups
    if labels is not None and "labels" not in given.missing:
        given.arrays["labels"] = labels.cpu().numpy()
    else:
        given.missing.setdefault("labels", "the target's rows have none")
    if labelled is not None:
        given.position_features = labelled.cpu().numpy()
        given.position_groups = row if groups is None else groups[row]
    probabilities = _source_probabilities(shared, pair, backbone, found)
    if labelled is not None:
        probabilities = "the source's classes are those of rows, the labels those of positions"
    if isinstance(probabilities, str):
        given.missing["probabilities"] = probabilities
    else:
        given.arrays["probabilities"] = probabilities


@torch.no_grad()
def _position_features(
    objective: Any, backbone: Backbone, rows: Rows, device: torch.device
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Return pooled features, and those of at most SCORE_ROWS positions with their labels.

    Args:
        objective: One whose labels belong to positions (`LabelsPositions`).

    Returns:
        (n,) ids of the rows and (n, D) pooled features, (m, D) features of positions and their
        labels, and the (m,) places of their rows among the n.
    """
    backbone.to(device).eval()
    objective.to(device).eval()
    preprocess = evaluate.device_preprocessing(rows)
    ids, pooled, labelled, labels, row = [], [], [], [], []
    before = 0
    for batch, _, _ in eval_batches(rows, FEATURE_ROWS):
        batch = preprocess(batch.to(device), False)
        found = backbone(batch, want=objective.position_features)
        ids.append(batch.rows)
        pooled.append(found.pooled.float())
        of_batch, theirs, place = objective.labelled_positions(found, batch)
        # a batch of long rows has very many positions
        some = evenly_spread(len(theirs), SCORE_ROWS)
        labelled.append(of_batch[torch.from_numpy(some)])
        labels.append(theirs[torch.from_numpy(some)])
        row.append(before + place.cpu().numpy()[some])
        before += len(batch)
    places = evenly_spread(sum(map(len, labels)), SCORE_ROWS)
    kept = torch.from_numpy(places)
    return (
        np.concatenate(ids),
        torch.cat(pooled),
        torch.cat(labelled)[kept],
        torch.cat(labels)[kept],
        np.concatenate(row)[places],
    )


def _predicts_one_class(objective: Any) -> bool:
    """Return whether a row has one class, which the head predicts from pooled features."""
    has_sets = "labels" in objective.roles
    return not has_sets and has_classes(objective) and has_cached_head(objective)


def _source_probabilities(
    shared: Shared, pair: Pair, backbone: Backbone, found: torch.Tensor
) -> np.ndarray | str:
    """Return (n, Z) probabilities of the source's own classes, or why there are none."""
    spec, tensors = shared.heads.get(pair.source, (None, {}))
    if spec is None or spec.name == NO_OBJECTIVE.name:
        return "the source is a checkpoint without classes of its own"
    kind: Any = registry.get("objective", spec.name)
    if not _predicts_one_class(kind):
        return f"the source predicts no single class of a row (it is of {spec.name})"
    head = kind(backbone, kind.options_class(**spec.options), spec.state)
    head.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in tensors.items()})
    head.to(found.device).eval()
    with torch.no_grad():
        none = Batch(np.arange(len(found)), torch.zeros(0), {})
        logits = head.head_predict(found, none)["scores"]
    return softmax(logits.double().cpu().numpy())


def _add_source(
    given: _Inputs,
    pair: Pair,
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
        ids, found, _ = features_of_ids(backbone, rows, device)
    except (ValueError, RuntimeError, OSError) as error:  # scores that do not read them go on
        given.has_temporary_error = not isinstance(error, ValueError)
        given.missing["source_features"] = f"{type(error).__name__}: {error}"
        return
    is_finite = torch.isfinite(found).all(1)
    fine = found[is_finite]
    if len(fine) < 2:
        given.missing["source_features"] = "fewer than two rows of the source can be used"
        return
    given.arrays["source_features"] = fine.cpu().numpy()
    given.source_groups = measured_shift.groups_of(
        selection, pair.source_group, ids[is_finite.cpu().numpy()]
    )


# ---------------------------------------------------------------- one score


def _value(score: Score, given: _Inputs) -> ScoreValue:
    """Return a score with its interval, or why it is not defined."""
    undefined = partial(ScoreValue, None, None, None, score.higher_is_better, None)
    for name in score.inputs:
        if name in given.missing:
            return undefined(given.missing[name])
    kind = kind_of(given.arrays["labels"]) if "labels" in score.inputs else None
    if kind is not None and kind not in score.tasks:
        return undefined(
            f"it is defined for {' and '.join(score.tasks)}, and the labels are {kind}"
        )
    if kind == "numbers" and not np.isfinite(given.arrays["labels"]).all():
        return undefined("the labels are not finite")
    began, read, groups = time.perf_counter(), given.arrays_for(score), given.groups_of(score)
    try:
        found = score.of({**read, **groups})
    except Exception as error:  # scores of plugins may raise anything; the others continue
        given.has_temporary_error |= not _is_deterministic(error)
        return undefined(f"{type(error).__name__}: {error}")
    value = found[0] if isinstance(found, tuple) else found
    if not np.isfinite(value):
        return undefined("too few rows, or rows that the score cannot distinguish")
    interval, reason = (np.nan, np.nan), ""
    least, unit = _fewest_units(read, groups)
    if least < FEWEST_ROWS:  # an interval that the score made itself is left out too
        reason = f"{least} groups; an interval needs {FEWEST_ROWS}" if unit == "groups" else ""
    elif isinstance(found, tuple):
        interval = found[1:]
    else:
        try:
            interval = _interval(score, read, groups, value)
        except Exception as error:  # the score of halves of the rows: that of all rows stays
            given.has_temporary_error |= not _is_deterministic(error)
            reason = f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - began
    value, low, high = (float(np.clip(part, *score.bounds)) for part in (value, *interval))
    if not np.isfinite([low, high]).all():
        return ScoreValue(value, None, None, score.higher_is_better, seconds, reason)
    return ScoreValue(value, low, high, score.higher_is_better, seconds)


def _is_deterministic(error: Exception) -> bool:
    """Return whether the same features and labels would raise this error again.

    Memory that ran out, for one, may suffice another time.
    """
    return isinstance(error, (ValueError, ArithmeticError))


def _interval(
    score: Score,
    read: Mapping[str, np.ndarray],
    groups: Mapping[str, np.ndarray | None],
    value: float,
) -> tuple[float, float]:
    """Return the 95 % interval over rows or groups."""
    n = len(read["features" if "features" in read else "labels"])
    m = len(read.get("source_features", ()))

    def score_random_half(rng: np.random.Generator) -> float:
        of_target = random_half(n, rng, groups["groups"])
        of_source = random_half(m, rng, groups["source_groups"])
        found = score.of(
            {
                name: rows[of_source if name.startswith("source_") else of_target]
                for name, rows in {**read, **groups}.items()
                if rows is not None
            }
        )
        return found[0] if isinstance(found, tuple) else found

    return interval_of_halves(value, score_random_half)


def _fewest_units(
    read: Mapping[str, np.ndarray], groups: Mapping[str, np.ndarray | None]
) -> tuple[int, str]:
    """Return the smaller side's number of units, and whether they are "rows" or "groups"."""
    sides = [(len(read["features" if "features" in read else "labels"]), groups["groups"])]
    if "source_features" in read:
        sides.append((len(read["source_features"]), groups["source_groups"]))
    return min((num_units(n, of), "rows" if of is None else "groups") for n, of in sides)
