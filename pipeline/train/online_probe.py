"""The online probe: how well nearest neighbours in a backbone's features predict labels.

It is computed at every validation while the backbone is pretrained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
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
"""The most training and validation rows of a probe, evenly spread, and the most bytes that each of
both may take when decoded.
"""


@torch.no_grad()
def features(
    backbone: nn.Module, rows: Rows, device: torch.device, autocast: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the pooled features of rows, in evaluation mode.

    Returns:
        (n, D) features and the rows' label tensors, all on the device, in the order of row ids.
        The features of a text that is read in windows are the mean of its windows'.
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
    found = np.concatenate(ids)
    by_id = np.argsort(found, kind="stable")
    order = torch.from_numpy(by_id).to(device)
    labels_of_rows = {name: torch.cat([part[name] for part in rest])[order] for name in rest[0]}
    return found[by_id], torch.cat(pooled)[order], labels_of_rows


def _pooled(backbone: Any, batch: Batch) -> Tensor:
    """Return (B, D) float32; of a row that is read in windows the mean of its windows' features."""
    if not has_windows(batch):
        return backbone(batch).pooled.float()
    windows, real = windows_as_rows(batch)
    total = torch.zeros((len(batch), backbone.pooled_dim), device=real.device)
    if len(windows):
        found = windows.predict_in_parts(
            lambda part: {"pooled": backbone(part).pooled.float()}, WINDOWS_AT_ONCE
        )
        total.index_add_(0, real.nonzero()[:, 0], found["pooled"])
    return total / real.sum(1, keepdim=True).clamp(min=1)


def neighbours(
    found: np.ndarray,
    k: int,
    tried: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> Tensor:
    """Find the nearest neighbours by cosine similarity.

    Args:
        found: (n, D) features among which neighbours are looked for.
        k: Neighbours of each row, fewer where there are not as many for every row.
        tried: (m, D) features whose neighbours are wanted; None: those of ``found``, where no row
            is its own neighbour.
        groups: (n,) group of each row of ``found``, where rows of the same group are no neighbours
            either; None: each row is a group. Without effect where ``tried`` is given.

    Returns:
        (m, k) indices into ``found``.
    """
    f = nn.functional.normalize(torch.from_numpy(found.astype(np.float32)), dim=1)
    t, group = f, None
    if tried is not None:
        t = nn.functional.normalize(torch.from_numpy(tried.astype(np.float32)), dim=1)
    else:
        group = torch.from_numpy(unit_numbers(groups, len(f)))
        k = min(k, len(f) - int(group.bincount().max()))
    out = []
    for start in range(0, len(t), 1024):
        near = t[start : start + 1024] @ f.T
        if group is not None:
            near[group[start : start + 1024, None] == group] = -2.0
        out.append(near.topk(min(k, len(f)), dim=1).indices)
    return torch.cat(out)


# ---------------------------------------------------------------- what the job says


def splits(spec: Source, place: str, validated: bool, imports_uri: str) -> Splits | None:
    """Read the splits of a source's probe.

    Args:
        place: The source in the job file, for errors.
        validated: Whether the source has validation rows.

    Raises:
        ValueError: the probe's rows cannot be used.
    """
    data = spec.probe
    if data is None or spec.data is None:
        return None
    if not validated:
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
        found = manifests.splits(data, roles, f"{place}.probe", imports_uri, need_test=False)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{place}.probe.data", f"{place}.probe")) from None
    kind = found.train.manifest.schema.field(data.columns["label"]).type
    if pa.types.is_nested(kind):
        raise ValueError(
            f"{place}.probe.columns: label column {data.columns['label']!r} holds {kind} "
            "values; a probe takes one label a row, not several"
        )
    if not len(found.validation):
        raise ValueError(
            f"{place}.probe: its validation split is empty ({found.sizes()}); give validation "
            "files, a split_column or a validation_fraction"
        )
    try:
        _encoded(found.validation, data, _state(found, data))
    except ValueError as error:
        raise ValueError(f"{place}.probe: {error}") from None
    return found


def _state(found: Splits, data: Data) -> State:
    objective = registry.get("objective", LABELS)
    return objective.fit(
        objective.options_class(),
        manifests.read_columns(found.train, [data.columns["label"]]),
        {"label": data.columns["label"]},
    )


def _encoded(selection: Selection, data: Data, state: State) -> np.ndarray:
    return registry.get("objective", LABELS).encode(
        manifests.read_columns(selection, [data.columns["label"]]), data.columns, state
    )["label"]


@dataclass(frozen=True)
class Probe:
    """The rows that a probe reads, and how."""

    train: Selection
    validation: Selection
    columns: dict[str, str]
    state: State
    max_bad_rows: float

    def decoder(self, modality: Modality) -> Decoder:
        return Decoder(modality, LABELS, self.state, self.columns)


def prepare(data: Data, found: Splits, modality: Modality) -> Probe:
    """At most PROBE_ROWS rows of the probe's splits, fewer where they are large."""
    probe = Probe(
        found.train, found.validation, dict(data.columns), _state(found, data), data.max_bad_rows
    )
    kept: list[Selection] = []
    for selection, most in zip((found.train, found.validation), PROBE_ROWS, strict=True):
        n = len(selection)
        each = max(1, probe.decoder(modality).size(selection) // n)
        places = evenly_spread(n, max(1, min(most, PROBE_BYTES // each)))
        kept.append(Selection(selection.manifest, selection.ids(places)))
    return replace(probe, train=kept[0], validation=kept[1])


# ---------------------------------------------------------------- in a run


@contextmanager
def exported_backbone(task: Task) -> Iterator[Backbone]:
    """The backbone with the weights that a bundle written now would have.

    Where that is a teacher's, its weights are in the backbone inside the ``with`` block only.
    """
    if not replaces_backbone(task.objective):
        yield task.backbone
        return
    held = {name: tensor.detach().clone() for name, tensor in task.backbone.state_dict().items()}
    task.objective.after_training(task.backbone)
    try:
        yield task.backbone
    finally:
        task.backbone.load_state_dict(held)


def probe_evaluator(
    probe: Probe,
    modality: Modality,
    ranks: Ranks,
    autocast: Callable[[], Any],
    on_bad: Callable[[list[LeftOut]], None] = lambda rows: None,
) -> Callable[[Task], float]:
    """Return a function that computes the probe's accuracy, the same on every rank.

    The rows are decoded once, now; each rank computes the features of its part of them. Every rank
    must call both functions at the same time.

    Args:
        on_bad: Called with the rows that cannot be decoded.

    Raises:
        TooManyBadRowsError: on all ranks or on none.
    """
    parts = [
        Rows(selection, probe.decoder(modality))
        .part(ranks.rank, ranks.count)
        .in_memory(1.0, cpus=0)
        for selection in (probe.train, probe.validation)
    ]
    names = ("probe train", "probe validation")
    for name, rows, selection in zip(names, parts, (probe.train, probe.validation), strict=True):
        bad_of_ranks = evaluate.of_every_rank(list(rows.bad), ranks)
        everyone = [one for part in bad_of_ranks for one in part]
        on_bad(
            [
                LeftOut(name, row, selection.manifest.location(row), reason)
                for row, reason in everyone
            ]
        )
        check_bad_row_budget(everyone, len(selection), probe.max_bad_rows, selection)

    def tried(task: Task) -> float:
        found = []
        with exported_backbone(task) as backbone:
            for rows in parts:
                mine = {}
                if len(rows):
                    pooled, rest = features(backbone, rows, ranks.device, autocast())
                    mine = {
                        "row": rows.selection.ids(np.arange(len(rows))),
                        "features": pooled.cpu().numpy(),
                        "label": rest["label"].cpu().numpy(),
                    }
                found.append(evaluate.gather_predictions(mine, ranks))
        train, validation = found
        votes = (
            torch.from_numpy(train["label"])[
                neighbours(train["features"], KNN, validation["features"])
            ]
            .mode(1)
            .values
        )
        return float((votes.numpy() == validation["label"]).mean())

    return tried
