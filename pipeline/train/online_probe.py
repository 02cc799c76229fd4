"""The online probe: how well nearest neighbours in a backbone's features predict labels.

It is computed at every validation while the backbone is pretrained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.config import registry
from pipeline.config.schema import Data, Source
from pipeline.core.contracts import Backbone, Batch, Modality, Task
from pipeline.core.contracts.objective_capabilities import (
    replaces_backbone,
    tensors_beside_features,
)
from pipeline.core.groups import unit_numbers
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import State
from pipeline.core.windows import WINDOWS_AT_ONCE, has_windows, windows_as_rows
from pipeline.data import manifests
from pipeline.data.manifests import LeftOut, Selection, Splits
from pipeline.data.stream import Decoder, Rows, check_bad_row_budget, eval_batches
from pipeline.train import evaluate
from pipeline.train.ranks import Ranks

FEATURE_ROWS = 256
KNN = 5
METRIC = "probe_knn"
LABELS = "classification"
"""The objective that reads the probe's labels."""
PROBE_ROWS, PROBE_BYTES = (4000, 1000), 512 << 20
"""Most training and validation rows of a probe, and most bytes of each of the two when decoded."""


@torch.no_grad()
def features(
    backbone: nn.Module, rows: Rows, device: torch.device, autocast: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the pooled features of rows, in evaluation mode.

    Returns:
        (n, D) features and the rows' label tensors, on the device, ordered by row id. A text that
        is read in windows has the mean of the windows' features.
    """
    return features_of_ids(backbone, rows, device, autocast)[1:]


@torch.no_grad()
def features_of_ids(
    backbone: nn.Module, rows: Rows, device: torch.device, autocast: Any = None
) -> tuple[np.ndarray, Tensor, dict[str, Tensor]]:
    """Compute features as `features` does.

    Returns:
        (n,) ids of the rows that could be decoded, sorted; then their features and label tensors.
    """
    backbone.to(device).eval()
    name = rows.decoder.objective
    objective = registry.get("objective", name) if name else None
    labels = tensors_beside_features(objective)
    preprocess = evaluate.device_preprocessing(rows)
    pooled, rest, ids = [], [], []
    for batch, _, _ in eval_batches(rows, FEATURE_ROWS):
        batch = preprocess(batch.to(device), False)
        with autocast or nullcontext():
            pooled.append(_pooled(backbone, batch))
        rest.append({name: tensor for name, tensor in batch.data.items() if name in labels})
        ids.append(batch.rows)
    row_ids = np.concatenate(ids)
    by_id = np.argsort(row_ids, kind="stable")
    order = torch.from_numpy(by_id).to(device)
    label_tensors = {name: torch.cat([part[name] for part in rest])[order] for name in rest[0]}
    return row_ids[by_id], torch.cat(pooled)[order], label_tensors


def _pooled(backbone: Any, batch: Batch) -> Tensor:
    """Return (B, D) float32 features; rows that are read in windows have the mean of theirs."""
    if not has_windows(batch):
        return backbone(batch).pooled.float()
    windows, real = windows_as_rows(batch)
    total = torch.zeros((len(batch), backbone.pooled_dim), device=real.device)
    if len(windows):
        of_windows = windows.predict_in_parts(
            lambda part: {"pooled": backbone(part).pooled.float()}, WINDOWS_AT_ONCE
        )
        total.index_add_(0, real.nonzero()[:, 0], of_windows["pooled"])
    return total / real.sum(1, keepdim=True).clamp(min=1)


def neighbours(
    candidates: np.ndarray,
    k: int,
    queries: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Tensor:
    """Find the nearest neighbours by cosine similarity.

    Args:
        candidates: (n, D) features among which neighbours are searched.
        k: Neighbours of each query; fewer where not every query has as many.
        queries: (m, D) features; None: the candidates themselves, where no row is its own
            neighbour.
        groups: (n,) group of each candidate; rows of one group are no neighbours either. None: each
            row is a group. Without effect where ``queries`` are given.

    Returns:
        (m, k) indices into ``candidates``.
    """
    normalized = _normalize(candidates)
    normalized_queries, group = normalized, None
    if queries is not None:
        normalized_queries = _normalize(queries)
    else:
        group = torch.from_numpy(unit_numbers(groups, len(normalized)))
        k = min(k, len(normalized) - int(group.bincount().max()))
    out = []
    for start in range(0, len(normalized_queries), 1024):
        similarity = normalized_queries[start : start + 1024] @ normalized.T
        if group is not None:
            similarity[group[start : start + 1024, None] == group] = -2.0
        out.append(similarity.topk(min(k, len(normalized)), dim=1).indices)
    return torch.cat(out)


def _normalize(features: np.ndarray) -> Tensor:
    return nn.functional.normalize(torch.from_numpy(features.astype(np.float32)), dim=1)


# ---------------------------------------------------------------- what the job says


def read_probe_splits(
    spec: Source, place: str, has_validation_rows: bool, imports_uri: str
) -> Splits | None:
    """Read the splits of a source's probe.

    Args:
        place: The source in the job file, for errors.
        has_validation_rows: Whether the source has any.

    Raises:
        ValueError: The probe's rows cannot be used.
    """
    data = spec.probe
    if data is None or spec.data is None:
        return None
    if not has_validation_rows:
        raise ValueError(
            f"{place}.probe: it is tried at every validation, and this source has no validation "
            "rows: give data.validation files, a split_column or a validation_fraction"
        )
    component, own = data.modality, spec.data.modality
    given = registry.get("modality", own.name).options_class(**own.options).model_dump()
    differ = {name: value for name, value in component.options.items() if given[name] != value}
    if differ:
        raise ValueError(
            f"{place}.probe.modality: {differ} contradicts the source's own ({own}); a probe "
            "is read as its source is: leave it out"
        )
    roles = (
        *registry.get("modality", component.name).roles,
        *registry.get("objective", LABELS).roles,
    )
    try:
        probe_splits = manifests.splits(data, roles, f"{place}.probe", imports_uri, need_test=False)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{place}.probe.data", f"{place}.probe")) from None
    kind = probe_splits.train.manifest.schema.field(data.columns["label"]).type
    if pa.types.is_nested(kind):
        raise ValueError(
            f"{place}.probe.columns: label column {data.columns['label']!r} holds {kind} "
            "values; a probe takes one label a row, not several"
        )
    if not len(probe_splits.validation):
        raise ValueError(
            f"{place}.probe: its validation split is empty ({probe_splits.sizes()}); give "
            "validation files, a split_column or a validation_fraction"
        )
    try:
        validation_labels = manifests.read_columns(probe_splits.validation, [data.columns["label"]])
        state = _fit_labels(probe_splits, data)
        registry.get("objective", LABELS).encode(validation_labels, data.columns, state)
    except ValueError as error:
        raise ValueError(f"{place}.probe: {error}") from None
    return probe_splits


def _fit_labels(probe_splits: Splits, data: Data) -> State:
    objective, column = registry.get("objective", LABELS), data.columns["label"]
    table = manifests.read_columns(probe_splits.train, [column])
    return objective.fit(objective.options_class(), table, {"label": column})


@dataclass(frozen=True)
class Probe:
    """The probe's rows, their columns and the fitted labels."""

    train: Selection
    validation: Selection
    columns: dict[str, str]
    state: State
    max_bad_rows: float

    def decoder(self, modality: Modality) -> Decoder:
        """Return the decoder of the probe's rows and labels."""
        return Decoder(modality, LABELS, self.state, self.columns)


def prepare(data: Data, probe_splits: Splits, modality: Modality) -> Probe:
    """Return a probe with up to PROBE_ROWS evenly spread rows, fewer where they are large."""
    state = _fit_labels(probe_splits, data)
    train, validation = probe_splits.train, probe_splits.validation
    probe = Probe(train, validation, dict(data.columns), state, data.max_bad_rows)
    sampled: list[Selection] = []
    for selection, most in zip((train, validation), PROBE_ROWS, strict=True):
        n = len(selection)
        bytes_per_row = max(1, probe.decoder(modality).estimate_bytes(selection) // n)
        indices = evenly_spread(n, max(1, min(most, PROBE_BYTES // bytes_per_row)))
        sampled.append(Selection(selection.manifest, selection.ids(indices)))
    return replace(probe, train=sampled[0], validation=sampled[1])


# ---------------------------------------------------------------- in a run


@contextmanager
def exported_backbone(task: Task) -> Iterator[Backbone]:
    """The backbone with the weights that a bundle written now would have.

    Those of a teacher are in the backbone only inside the ``with`` block.
    """
    if not replaces_backbone(task.objective):
        yield task.backbone
        return
    weights = {name: tensor.detach().clone() for name, tensor in task.backbone.state_dict().items()}
    task.objective.after_training(task.backbone)
    try:
        yield task.backbone
    finally:
        task.backbone.load_state_dict(weights)


class ProbeEvaluator:
    """Computes the probe's accuracy for a task, the same on every rank.

    The rows are decoded once, when it is made. At each call every rank computes the features of its
    part of them. Every rank must make it and call it at the same time.

    Args:
        on_bad: Called with the rows that cannot be decoded.

    Raises:
        TooManyBadRowsError: More rows are bad than allowed; on all ranks.
    """

    def __init__(
        self,
        probe: Probe,
        modality: Modality,
        ranks: Ranks,
        autocast: Callable[[], Any],
        on_bad: Callable[[list[LeftOut]], None] = lambda rows: None,
    ):
        self.ranks, self.autocast = ranks, autocast
        self.parts: list[Rows] = []
        """This rank's part of the training and of the validation rows."""
        selections = {"probe train": probe.train, "probe validation": probe.validation}
        for name, selection in selections.items():
            part = Rows(selection, probe.decoder(modality)).part(ranks.rank, ranks.count)
            part = part.in_memory(1.0, cpus=0)
            self.parts.append(part)
            bad = list(chain.from_iterable(evaluate.gather_objects(list(part.bad), ranks)))
            place = selection.manifest.location
            on_bad([LeftOut(name, row, place(row), reason) for row, reason in bad])
            check_bad_row_budget(bad, len(selection), probe.max_bad_rows, selection)

    def __call__(self, task: Task) -> float:
        """Return the share of validation rows whose neighbours' most frequent label is theirs."""
        with exported_backbone(task) as backbone:
            train, validation = (self._features_of_all_ranks(backbone, part) for part in self.parts)
        nearest = neighbours(train["features"], KNN, validation["features"])
        votes = torch.from_numpy(train["label"])[nearest].mode(1).values
        return float((votes.numpy() == validation["label"]).mean())

    def _features_of_all_ranks(self, backbone: Backbone, part: Rows) -> dict[str, np.ndarray]:
        mine: dict[str, np.ndarray] = {}
        if len(part):
            pooled, labels = features(backbone, part, self.ranks.device, self.autocast())
            mine = {
                "row": part.selection.all_ids,
                "features": pooled.cpu().numpy(),
                "label": labels["label"].cpu().numpy(),
            }
        return evaluate.gather_predictions(mine, self.ranks)
