"""Targets made ready for trials: their splits, their rows decoded once for every base, and what both share with a source."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline import bundle, registry, storage
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Splits
from pipeline.data.stream import Decoder, Rows
from pipeline.job import Job, Source, Target, spec_hash
from pipeline.metrics import metric
from pipeline.train import source as train_source
from pipeline.train.source import data_key
from pipeline.transfer.trial import TargetData
from pipeline.transfer.trials import Base

MEMORY_BYTES = 2 << 30
CHECKED_ROWS = 1 << 16


@dataclass(frozen=True)
class TargetStage:
    """A target of a job before anything runs."""

    name: str
    spec: Target
    splits: Splits
    state: dict[str, Any] = field(default_factory=dict)
    """What the objective learned of the training rows: label names."""
    against: str = ""
    """What the test rows that are left out depend on (`overlap.key`)."""

    @property
    def key(self) -> str:
        return spec_hash(data_key(self.spec.data), self.splits.fingerprint, *([self.against] if self.against else []))

    @property
    def split_origin(self) -> str:
        """Where the splits come from, as the results table says it."""
        drop = self.spec.drop_overlap
        return self.splits.origin + (f"; test rows that stand in a source left out ({drop})" if drop != "none" else "")

    @property
    def scored(self) -> bool:
        """Whether transferability scores can be computed: of rows with one class, or with a set of labels."""
        objective = registry.get("objective", self.spec.objective.name)
        return "label" in objective.roles or (objective.roles == ("labels",) and objective.label_tensors == ("labels",))

    def labelled(self, fraction: float | int) -> int:
        """How many training rows a label fraction stands for."""
        n = len(self.splits.train)
        if fraction == 1 and isinstance(fraction, float):
            return n
        labels = _classes(self.spec, self.splits, self.state)
        counts = np.array([n]) if labels is None else np.bincount(labels)
        return int(sum(min(c, fraction) if isinstance(fraction, int) else max(1, round(fraction * c)) for c in counts if c))


def stage(job: Job, name: str) -> TargetStage:
    """Raises ValueError for data that cannot be used or a metric that the objective does not give."""
    spec = job.targets[name]
    modality, objective = registry.get("modality", spec.data.modality.name), registry.get("objective", spec.objective.name)
    if objective.packed or objective.couples_rows or not objective.roles:
        usable = [one for one in registry.names("objective") if registry.entry("objective", one).roles]
        raise ValueError(f"targets.{name}.objective: {spec.objective.name} is for sources; a target's rows have labels: {', '.join(usable)}")
    whole = [fraction for fraction in spec.label_fractions if isinstance(fraction, int)]
    if whole and "label" not in objective.roles:
        raise ValueError(f"targets.{name}.label_fractions: {whole[0]} means {whole[0]} rows a class, and a row of {spec.objective.name} has no single class: "
                         "give shares, such as 0.1")
    more = ("top5_accuracy", "balanced_accuracy", "auroc") if "label" in objective.roles else ()
    if spec.drop_overlap == "near" and modality.roles[0] != "image":
        raise ValueError(f"targets.{name}.drop_overlap: near duplicates are found among images, these rows are {spec.data.modality.name}: say exact")
    if spec.metric is not None and metric(spec.metric).name not in (*objective.metrics, *more):
        raise ValueError(f"targets.{name}.metric: {spec.metric} is not a metric of {spec.objective.name} ({', '.join(objective.metrics)})")
    found = manifests.splits(spec.data, (*modality.roles, *objective.roles), f"targets.{name}", storage.join(job.root, "imports"), need_test=True)
    state = fit_labels(spec, found)
    for split in ("train", "validation", "test"):  # a label that training never sees is found now, not after the sources
        table = manifests.read_columns(getattr(found, split), _label_columns(spec))
        try:
            for start in range(0, len(table), CHECKED_ROWS):  # boxes and label sets of a large corpus would take gigabytes at once
                objective.encode(table.slice(start, CHECKED_ROWS), spec.data.columns, state)
            if split == "test":
                objective.check_test(objective.options_class(**spec.objective.options), table, spec.data.columns, state)
        except ValueError as error:
            raise ValueError(f"targets.{name}.data, {split} split: {error}") from None
    return TargetStage(name, spec, found, state)


def _label_columns(spec: Target) -> list[str]:
    objective = registry.get("objective", spec.objective.name)
    roles = objective.fit_roles if objective.fit_roles is not None else (*objective.roles, *objective.optional_roles)
    return [spec.data.columns[role] for role in roles if role in spec.data.columns]


def _classes(spec: Target, splits: Splits, state: dict[str, Any]) -> np.ndarray | None:
    """(n_train,) class numbers, for objectives whose rows have one class."""
    objective = registry.get("objective", spec.objective.name)
    if "label" not in objective.roles:
        return None
    return objective.encode(manifests.read_columns(splits.train, _label_columns(spec)), spec.data.columns, state)["label"]


def fit_labels(spec: Target, splits: Splits) -> dict[str, Any]:
    """What the objective learns of the training rows' own columns."""
    objective, needed = registry.get("objective", spec.objective.name), _label_columns(spec)
    return objective.fit(objective.options_class(**spec.objective.options), manifests.read_columns(splits.train, needed), spec.data.columns)


def _modality(target: TargetStage, base: Base) -> dict[str, Any]:
    """The source's modality, with the options that a target may set for itself."""
    plug = target.spec.data.modality
    own = registry.get("modality", plug.name).target_options
    differ = {k: v for k, v in plug.options.items() if k not in own and base.modality["options"].get(k) != v}
    if differ:
        raise ValueError(f"targets.{target.name}.data.modality: {differ} contradicts the source, whose rows were read with "
                         f"{base.modality['options']}; a target is read as its backbone was: leave the options out"
                         + (f" ({', '.join(own)} may differ)" if own else ""))
    return {**base.modality, "options": {**base.modality["options"], **plug.options}}


def prepare(target: TargetStage, base: Base) -> TargetData:
    """Decode the three splits. Raises ValueError for a label that never stands in the training rows, or too many bad rows."""
    spec, splits, columns = target.spec, target.splits, target.spec.data.columns
    spec_of_modality = _modality(target, base)
    modality = bundle.build_modality(spec_of_modality)
    objective = registry.get("objective", spec.objective.name)
    try:
        modality.check(objective.roles)  # a source that is a checkpoint tells how its rows are read only now
    except ValueError as error:
        raise ValueError(f"data.modality: {error}") from None
    options = objective.options_class(**spec.objective.options)
    state = target.state or fit_labels(spec, splits)
    decoder = Decoder(modality, spec.objective.name, state, columns)
    parts = [Rows(selection, decoder) for selection in (splits.train, splits.validation, splits.test)]
    wanted = sum(decoder.size(selection) for selection in (splits.train, splits.validation, splits.test))
    if spec.data.decode == "memory" or (spec.data.decode == "auto" and wanted <= MEMORY_BYTES):
        parts = [rows.in_memory(spec.data.max_bad_rows) for rows in parts]
        labels = parts[0].arrays.get("label") if parts[0].arrays else None
    else:
        labels = _classes(spec, splits, state)
    bad = [(split, rows.selection.manifest.place(row), why)
           for split, rows in zip(("train", "validation", "test"), parts, strict=True) for row, why in rows.bad]
    text = splits.sizes() + (f"; {len(bad)} rows left out: " + "; ".join(f"{s} {p}: {w}" for s, p, w in bad[:3]) if bad else "")
    groups = None
    if spec.data.group:
        values = manifests.read_columns(parts[2].selection, [spec.data.group])[spec.data.group]
        groups = pc.dictionary_encode(values.combine_chunks()).indices.to_numpy(zero_copy_only=False)  # pyright: ignore[reportAttributeAccessIssue]
    return TargetData(spec, {"name": spec.objective.name, "options": options.model_dump(), "state": state}, parts[0], parts[1], parts[2], labels, groups, text,
                      {**base.arch, "inputs": modality.inputs() or base.arch["inputs"]}, spec_of_modality, spec_hash(target.key, spec_of_modality))


def for_base(data: TargetData, base: Base) -> TargetData:
    """The same rows for another base that reads them alike."""
    return replace(data, arch={**base.arch, "inputs": bundle.build_modality(data.modality).inputs() or base.arch["inputs"]})


def check_modality(target: TargetStage, source: Source) -> None:
    """Raises ValueError where the target's objective does not suit how its rows would be read: with its source's options and its own."""
    plug = target.spec.data.modality
    if source.data is not None:
        train_source.check_modality(f"targets.{target.name}", plug.name, {**source.data.modality.options, **plug.options}, target.spec.objective.name)


def weights(uri: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A bundle's backbone as arrays (for the object store) and its manifest."""
    found = bundle.load(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tensor.numpy() for name, tensor in found.backbone_tensors().items()}, found.manifest
