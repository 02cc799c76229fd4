"""Targets made ready for trials: their splits, their rows decoded once for every base, and what both share with a source."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline import bundle, registry, storage
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection, Splits
from pipeline.data.stream import Decoder, Rows
from pipeline.job import Job, Target, spec_hash
from pipeline.metrics import metric
from pipeline.train.source import data_key, sample
from pipeline.transfer.trial import TargetData
from pipeline.transfer.trials import Base

MEMORY_BYTES = 2 << 30
OVERLAP_ROWS = 200_000


@dataclass(frozen=True)
class TargetStage:
    """A target of a job before anything runs."""

    name: str
    spec: Target
    splits: Splits

    @property
    def key(self) -> str:
        return spec_hash(data_key(self.spec.data), self.splits.fingerprint)


def stage(job: Job, name: str) -> TargetStage:
    """Raises ValueError for data that cannot be used or a metric that the objective does not give."""
    spec = job.targets[name]
    modality, objective = registry.get("modality", spec.data.modality.name), registry.get("objective", spec.objective.name)
    if objective.packed:
        raise ValueError(f"targets.{name}.objective: {spec.objective.name} is for sources; targets here are classification")
    if spec.metric is not None and metric(spec.metric).name not in (*objective.metrics, "top5_accuracy", "balanced_accuracy", "auroc"):
        raise ValueError(f"targets.{name}.metric: {spec.metric} is not a metric of {spec.objective.name} ({', '.join(objective.metrics)})")
    found = manifests.splits(spec.data, (*modality.roles, *objective.roles), f"targets.{name}", storage.join(job.root, "imports"), need_test=True)
    return TargetStage(name, spec, found)


def _modality(target: TargetStage, base: Base) -> dict[str, Any]:
    plug = target.spec.data.modality
    differ = {k: v for k, v in plug.options.items() if base.modality["options"].get(k) != v}
    if differ:
        raise ValueError(f"targets.{target.name}.data.modality: {differ} contradicts the source, whose rows were read with "
                         f"{base.modality['options']}; a target is read as its backbone was: leave the options out")
    return base.modality


def prepare(target: TargetStage, base: Base) -> TargetData:
    """Decode the three splits. Raises ValueError for a label that never stands in the training rows, or too many bad rows."""
    spec, splits, columns = target.spec, target.splits, target.spec.data.columns
    modality = bundle.build_modality(_modality(target, base))
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    needed = [columns[role] for role in ("label", "label_name") if role in columns]
    table = manifests.read_columns(splits.train, needed) if needed else None
    state = objective.fit(options, table, columns) if table is not None else {}
    decoder = Decoder(modality, spec.objective.name, state, columns)
    parts = [Rows(selection, decoder) for selection in (splits.train, splits.validation, splits.test)]
    if spec.data.decode == "memory" or (spec.data.decode == "auto" and _decoded_bytes(splits, decoder) <= MEMORY_BYTES):
        parts = [rows.in_memory(spec.data.max_bad_rows) for rows in parts]
        labels = parts[0].arrays.get("label") if parts[0].arrays else None
    else:
        labels = objective.encode(table, columns, state).get("label") if table is not None else None
    bad = [(split, rows.selection.manifest.place(row), why)
           for split, rows in zip(("train", "validation", "test"), parts, strict=True) for row, why in rows.bad]
    text = splits.sizes() + (f"; {len(bad)} rows left out: " + "; ".join(f"{s} {p}: {w}" for s, p, w in bad[:3]) if bad else "")
    groups = None
    if spec.data.group:
        values = manifests.read_columns(parts[2].selection, [spec.data.group])[spec.data.group]
        groups = pc.dictionary_encode(values.combine_chunks()).indices.to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
    return TargetData(spec, {"name": spec.objective.name, "options": options.model_dump(), "state": state}, parts[0], parts[1], parts[2], labels, groups, text)


def _decoded_bytes(splits: Splits, decoder: Decoder) -> int:
    few = sample(splits.train, decoder.names(), 8)
    arrays, _ = decoder(few)
    each = sum(array.nbytes for array in arrays.values()) / max(1, len(few))
    return int(each * sum(len(s) for s in (splits.train, splits.validation, splits.test)))


def overlap(test: Selection, column: str, source: Selection, source_column: str) -> int | None:
    """How many test rows hold an input that also stands in a source's rows; none when the source is too large to scan here."""
    if len(source) > OVERLAP_ROWS or len(test) > OVERLAP_ROWS:
        return None
    seen = set(_digests(source, source_column))
    return sum(digest in seen for digest in _digests(test, column))


def _digests(selection: Selection, column: str) -> list[bytes]:
    values = manifests.read_columns(selection, [column])[column].to_pylist()
    return [hashlib.blake2b(v if isinstance(v, bytes) else str(v).encode(), digest_size=12).digest() for v in values]


def weights(uri: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A bundle's backbone as arrays (for the object store) and its manifest."""
    found = bundle.load(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tensor.numpy() for name, tensor in found.backbone_tensors().items()}, found.manifest
