"""Targets prepared for trials.

The splits of a target are read and checked against its sources, and its rows are decoded once for
every backbone group.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline.checkpoints import bundle
from pipeline.config import provenance, registry
from pipeline.config.schema import (
    CHECKPOINT_PREFIXES,
    ComponentConfig,
    Job,
    Source,
    Target,
    Train,
    spec_hash,
)
from pipeline.core.capabilities import (
    check_roles,
    columns_of,
    finds_near_rows,
    ineffective_options,
)
from pipeline.core.contracts import (
    Modality,
    Objective,
    Task,
    Technique,
    adapts_at_test,
    layer_rates,
    trains,
)
from pipeline.core.contracts.objective_capabilities import (
    ChecksTestRows,
    averages_predictions,
    balances_labels,
    binds_to_backbone,
    counts_rows,
    couples_rows,
    draws_by_class,
    has_classes,
    invalid_label_reasons,
    mixes_inputs,
    names_labels,
    needed_roles,
    rollout_metrics,
    target_metrics,
    transfers_head,
)
from pipeline.core.contracts.technique_capabilities import (
    LABELLED_SOURCE,
    adapts_without_labels,
    adds_penalty,
    gathers_rows,
    prepares_on_target,
)
from pipeline.core.groups import num_units
from pipeline.core.metrics import catalog
from pipeline.core.metrics.policies import OF_EPISODES
from pipeline.core.nn import action_heads
from pipeline.core.ragged import pad
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec, State
from pipeline.data import manifests
from pipeline.data.manifests import Fold, Selection, Splits
from pipeline.data.plan import Plan
from pipeline.data.stream import Decoder, Rows
from pipeline.io import file_identity, storage
from pipeline.io.wording import plural
from pipeline.report import stats, subgroups
from pipeline.train import config_checks, fit_components, row_checks, token_rows
from pipeline.train import source as train_source
from pipeline.train.experiment import technique_of
from pipeline.train.row_checks import Finding
from pipeline.train.source import STAGE_FORMAT, data_key
from pipeline.transfer import leaks
from pipeline.transfer.grid import (
    BackboneGroup,
    combines_trials,
    fold_suffix,
    needs_training,
    starts_random,
    takes,
    techniques,
)
from pipeline.transfer.trial import TargetData

MEMORY_BYTES = 2 << 30
"""Decoded rows of a target are held in memory up to this size (``data.decode: auto``)."""
CHECKED_ROWS = 1 << 16
"""Rows whose labels are encoded at once."""
TRIED_ROWS = 64
"""Rows that are encoded with all columns before any label is checked."""


@dataclass(frozen=True)
class TargetStage:
    """A target of a job before anything runs."""

    name: str
    spec: Target
    splits: Splits
    state: State = field(default_factory=dict)
    """The state that the objective fitted on the training rows, such as label names."""
    overlap_key: str = ""
    """Hash of all that decides which test rows are left out (`overlap.key`); "": none are."""
    root: str = ""
    """The folder of the job, where packed rows are kept."""
    techniques: tuple[ComponentConfig, ...] = ()
    unlabelled: Splits | None = None
    """Rows without labels beside the splits, all of them in ``train``."""

    @property
    def unlabelled_key(self) -> str:
        """Hash of the rows in ``targets.x.unlabelled``; "": there are none.

        Techniques that read them depend on it beside `key`.
        """
        data = self.spec.unlabelled
        if data is None or self.unlabelled is None:
            return ""
        return spec_hash(data_key(data), self.unlabelled.fingerprint)

    @property
    def key(self) -> str:
        """Hash of the rows of the splits and of how they are read."""
        return spec_hash(
            data_key(self.spec.data),
            self.splits.fingerprint,
            *([self.overlap_key] if self.overlap_key else []),
            *([self._fold_key] if self.spec.folds else []),
        )

    @property
    def _fold_key(self) -> list[Any]:
        """What identifies the fold.

        The ids of its test rows are part of it, since folds have nearly equal numbers of rows.
        """
        test = self.splits.test
        rows = test.all_ids.astype("<i8").tobytes()
        return [self.spec.folds, self.spec.fold, hashlib.sha256(rows).hexdigest()]

    @property
    def name_in_job(self) -> str:
        """The name of the target in the job, which all of its folds share."""
        return self.name.removesuffix(fold_suffix(self.spec.fold))

    @property
    def split_origin(self) -> str:
        """Where the splits come from, in the words of the results table."""
        drop = self.spec.drop_overlap
        return self.splits.origin + (
            f"; test rows that are in a source left out ({drop})" if drop != "none" else ""
        )

    @property
    def packed(self) -> bool:
        """Whether documents are packed into rows of equal length."""
        return registry.get("objective", self.spec.objective.name).packed

    @property
    def _judges_classes_of_actions(self) -> bool:
        """Whether actions are classes, and steps are judged rather than episodes."""
        objective = registry.get("objective", self.spec.objective.name)
        has_classes_of_actions = "actions" in objective.roles and "labels" in self.state
        return has_classes_of_actions and self.spec.metric not in OF_EPISODES

    def evidence(self) -> dict[str, stats.Evidence]:
        """Return for each split the number of units that count for a verdict.

        It is empty where documents will be packed into rows.
        """
        if self.packed:
            return {}
        objective, group = registry.get("objective", self.spec.objective.name), self.spec.data.group
        columns = [*fit_components.label_columns(self.spec), *([group] if group else [])]
        # of classes of rows, label sets, or classes of hours
        by_class = any((has_classes(objective), "label_values" in objective.roles))
        unit = "groups" if group else "rows"
        out: dict[str, stats.Evidence] = {}
        for name, selection in self.splits.by_name().items():
            table = manifests.read_columns(selection, list(dict.fromkeys(columns)))
            groups = manifests.group_numbers(table[group]) if group else None
            encoded = {}
            if by_class:
                encoded = objective.encode(table, self.spec.data.columns, self.state)
            elif self._judges_classes_of_actions:
                actions = table[self.spec.data.columns["actions"]]
                numbers = action_heads.class_numbers(actions, self.state["labels"])
                encoded = {"label": numbers}
            if "label" in encoded:
                out[name] = stats.class_evidence(encoded["label"], groups, unit)
            elif "label_values" in encoded:
                of_hours = pad(encoded["label_values"], fill=-1)
                out[name] = stats.class_evidence(of_hours, groups, unit)
            elif "labels" in encoded:
                out[name] = stats.label_set_evidence(encoded["labels"], groups, unit)
            else:
                count = num_units(len(selection), groups)
                out[name] = stats.Evidence(count, stats.MIN_UNITS, unit)
        return out

    @property
    def num_rows_without_labels(self) -> int:
        """The number of rows that techniques read without labels."""
        return len((self.unlabelled or self.splits).train)

    def num_labelled_rows(self, fraction: float | int) -> int:
        """Return the number of training rows of a label fraction.

        Where documents will be packed into rows it is the number of documents.
        """
        num_rows = len(self.splits.train)
        if fraction == 1 and isinstance(fraction, float):
            return num_rows
        labels = classes_of_rows(self.spec, self.splits.train, self.state)
        counts = [num_rows] if labels is None else np.bincount(labels).tolist()
        counts = [count for count in counts if count]
        if isinstance(fraction, int):
            return sum(min(count, fraction) for count in counts)
        return sum(max(1, round(fraction * count)) for count in counts)


def planned_steps(train: Train, rows: int, packed: bool) -> int | str:
    """Return the steps of a run, or a text where they are not known yet.

    Into how many rows documents are packed, and how many batches by cost there are, is known only
    during the run.
    """
    if train.steps is not None:
        return train.steps
    if packed:
        return "after packing"
    if train.batch_cost is not None:
        return "after sorting"
    return Plan(rows, 0, train.global_batch).steps(train.epochs or 1.0)


def plan_target(job: Job, name: str) -> TargetStage:
    """Read a target's splits and make all checks that need no trained source.

    Raises:
        ValueError: The data cannot be used, or the objective has no such metric.
    """
    spec = job.targets[name]
    place = f"targets.{name.removesuffix(fold_suffix(spec.fold))}"
    modality = registry.get("modality", spec.data.modality.name)
    objective = registry.get("objective", spec.objective.name)
    components = tuple(techniques(job, spec))
    _check_spec(place, spec, components, modality, objective)
    roles = (*modality.roles, *objective.roles)
    imports = storage.join(job.root, "imports")
    by_class = has_classes(objective)
    fold = Fold(spec.fold, spec.folds, by_class) if spec.fold and spec.folds else None
    splits = manifests.splits(
        spec.data,
        roles,
        place,
        imports,
        need_test=True,
        fold=fold,
        needed=needed_roles(objective),
    )
    unlabelled = _unlabelled(spec, modality, place, imports)
    try:
        state = fit_components.fit_objective(spec, splits)
    except ValueError as error:
        raise ValueError(f"{place}.data, train split: {error}") from None
    check_metric(place, spec, objective, state)
    subgroups.read(splits.test, spec.subgroups, f"{place}.subgroups")
    for split, selection in splits.by_name().items():
        try:
            _check_labels(split, selection, spec, state)
        except ValueError as error:
            raise ValueError(f"{place}.data, {split} split: {error}") from None
    combining = [component.name for component in components if combines_trials(component)]
    if combining and job.fanout.keep_bundles != "all":
        raise ValueError(
            f"{place}: techniques: {combining[0]} is made of the weights of finished trials, which "
            "must be kept: set fanout.keep_bundles: all"
        )
    _check_combinations(place, components, job.fanout.seeds)
    return TargetStage(
        name, spec, splits, state, root=job.root, techniques=components, unlabelled=unlabelled
    )


def _unlabelled(spec: Target, modality: type[Modality], place: str, imports: str) -> Splits | None:
    """Read the rows without labels that a target names.

    Raises:
        ValueError: They cannot be used.
    """
    if spec.unlabelled is None:
        return None
    place = f"{place}.unlabelled"
    roles = (*modality.roles, *modality.optional_roles)
    columns = {role: name for role, name in spec.data.columns.items() if role in roles}
    data = spec.unlabelled.model_copy(
        update={"validation_fraction": 0.0, "columns": spec.unlabelled.columns or columns}
    )
    try:
        return manifests.splits(data, modality.roles, place, imports, need_test=False)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{place}.data", place)) from None


def _check_spec(
    place: str,
    spec: Target,
    components: tuple[ComponentConfig, ...],
    modality: type[Modality],
    objective: type[Objective],
) -> None:
    """Raise ValueError for settings that contradict each other, before any row is read."""
    name = spec.objective.name
    if not _for_targets(objective):
        usable = config_checks.names_with("objective", _for_targets)
        raise ValueError(
            f"{place}.objective: {name} is for sources; a target's rows have labels, or are texts "
            f"to model: {', '.join(usable)}"
        )
    if objective.packed:
        config_checks.check_packed(place, spec.data, name)
    if objective.packed and spec.folds:
        raise ValueError(
            f"{place}.folds: the rows of {name} are packed from several documents: leave it out, "
            "and hold out test_fraction of them"
        )
    if spec.folds and _compares_rows(objective):
        raise ValueError(
            f"{place}.folds: {name} is tested on pairs of rows, and the networks of two folds have "
            "embeddings that cannot be compared: leave it out, and hold out test_fraction of the "
            "rows"
        )
    if any(one.name == "ensemble" for one in components):
        _check_ensemble(place, name)
    config_checks.check_costs(place, spec.data, spec.train, objective)
    _check_unlabelled(place, spec, components, modality, objective)
    counts = [count for count in spec.label_fractions if isinstance(count, int) and count]
    if counts and not draws_by_class(objective) and not counts_rows(objective):
        raise ValueError(
            f"{place}.label_fractions: {counts[0]} means {counts[0]} rows a class, and a row of "
            f"{name} has no single class: give shares, such as 0.1"
        )
    if spec.drop_overlap == "near" and not finds_near_rows(modality):
        able = config_checks.names_with("modality", finds_near_rows)
        raise ValueError(
            f"{place}.drop_overlap: near duplicates are found among rows of {', '.join(able)}, "
            f"these rows are {spec.data.modality.name}: use exact"
        )
    if spec.drop_overlap == "group" and not spec.data.group:
        raise ValueError(
            f"{place}.drop_overlap: group leaves out rows whose group is in a source, and "
            "data.group names no column: name the one that holds the patient or speaker, or use "
            "exact"
        )
    if spec.subgroups and objective.packed:
        raise ValueError(
            f"{place}.subgroups: the rows of {name} are packed from several: leave them out"
        )


def _check_ensemble(place: str, objective: str) -> None:
    """Raise ValueError where the predictions of several networks cannot be averaged."""
    able = config_checks.names_with("objective", averages_predictions)
    if objective not in able:
        raise ValueError(
            f"{place}: techniques: ensemble averages the predictions of {', '.join(able)}, and "
            f"those of {objective} cannot be averaged: use uniform_soup or greedy_soup"
        )


def _check_combinations(place: str, components: tuple[ComponentConfig, ...], seeds: int) -> None:
    """Raise ValueError where a technique would combine fewer than two trials of the job."""
    trained = [one for one in components if not (starts_random(one) or combines_trials(one))]
    for component in filter(combines_trials, components):
        taken = [one for one in trained if takes(component, one)]
        count = sum(seeds if needs_training(one) else 1 for one in taken)
        if count < 2:
            raise ValueError(
                f"{place}: techniques: {component.name} combines at least two trials, and this job "
                f"has {count} that it takes (fanout.seeds: {seeds}): raise fanout.seeds, or list "
                "more techniques of this job in its option `of`"
            )


def _check_unlabelled(
    place: str,
    spec: Target,
    components: tuple[ComponentConfig, ...],
    modality: type[Modality],
    objective: type[Objective],
) -> None:
    """Raise ValueError for techniques that do not suit the target, or rows that none would read."""
    named = [(component.name, technique_of(component)) for component in components]
    for name, technique in named:
        if adapts_without_labels(technique):
            try:
                technique.check_target(objective, modality)
            except ValueError as error:
                raise ValueError(f"{place}: techniques: {name} {error}") from None
        if spec.train.micro_batch and gathers_rows(technique):
            raise ValueError(
                f"{place}.train.micro_batch: {name} compares the rows of a whole batch, which "
                "micro-batches would cut: leave it out"
            )
        options = objective.options_class(**spec.objective.options)
        if LABELLED_SOURCE in technique.streams() and mixes_inputs(options):
            raise ValueError(
                f"{place}: techniques: {name} reads labelled rows of the source, which the options "
                f"mixup and cutmix of {spec.objective.name} do not mix: leave them out"
            )
        if LABELLED_SOURCE in technique.streams() and balances_labels(options):
            raise ValueError(
                f"{place}: techniques: {name} reads labelled rows of the source, and "
                f"{spec.objective.name} would weigh them by how frequent the target's labels are: "
                "leave the option balanced out, or give these techniques a target of their own"
            )
        if 0 in spec.label_fractions and adapts_without_labels(technique) and trains(technique):
            _check_trained_without_labels(place, spec, name, technique, options)
    without_labels = [
        name
        for name, technique in named
        if adapts_without_labels(technique) or not trains(technique)
    ]
    if 0 in spec.label_fractions and not without_labels:
        able = [
            name
            for name in registry.names("technique")
            if adapts_without_labels(technique_of(ComponentConfig(name=name)))
        ]
        raise ValueError(
            f"{place}.label_fractions: 0 means no label of the target, and none of the techniques "
            f"can do without: leave 0 out, or add one of {', '.join(able)}"
        )
    if 0 in spec.label_fractions and not names_labels(objective):
        trained = [
            name
            for name, technique in named
            if adapts_without_labels(technique) and trains(technique)
        ]
        if trained:
            raise ValueError(
                f"{place}.label_fractions: 0 means no label of the target, and {trained[0]} would "
                f"have none of the source either: those of {spec.objective.name} cannot be "
                "compared by name"
            )
    readers = [
        name for name, technique in named if reads_target(technique) or reads_source(technique)
    ]
    if objective.packed and (spec.unlabelled or readers):
        raise ValueError(
            f"{place}: rows without labels are not read for {spec.objective.name}, whose rows are "
            f"packed from several: leave {', '.join([*readers, 'unlabelled'])} out"
        )
    if spec.unlabelled and not any(reads_target(technique) for _, technique in named):
        raise ValueError(
            f"{place}.unlabelled: none of the techniques reads rows without labels: leave it out"
        )


def _check_trained_without_labels(
    place: str, spec: Target, name: str, technique: Technique, options: Any
) -> None:
    """Raise ValueError for a technique that cannot train at label fraction 0.

    Either it reads no labelled rows of the source, so that nothing keeps the classes apart, or rows
    of the source would be weighted by how frequent the labels of the target are.
    """
    streams = technique.streams()
    if not streams or "source" in streams:
        raise ValueError(
            f"{place}.label_fractions: 0 means no label of the target, and {name} reads none of "
            "the source either, so that nothing keeps the classes apart: give it a weight of the "
            "source's labelled rows above 0, or leave 0 out"
        )
    if balances_labels(options):
        raise ValueError(
            f"{place}.label_fractions: 0 means no label of the target, and {spec.objective.name} "
            f"would weigh rows for {name} by the target's labels: leave the option balanced out, "
            "or put 0 in a job of its own"
        )


def reads_target(technique: Technique) -> bool:
    """Return whether a technique reads rows of the target without labels."""
    return "target" in technique.streams() or prepares_on_target(technique)


def reads_source(technique: Technique) -> bool:
    """Return whether a technique reads rows of its source."""
    return bool({"source", LABELLED_SOURCE} & {*technique.streams()})


def check_metric(place: str, spec: Target, objective: type[Objective], state: State) -> None:
    """Raise ValueError where the target names a metric that its objective does not have."""
    if spec.metric is None:
        return
    options = objective.options_class(**spec.objective.options)
    known = (
        *target_metrics(objective, options, state),
        *rollout_metrics(objective, options, state),
    )
    further = [name for role in objective.roles for name in catalog.for_role(role)]
    if spec.metric not in (*known, *further):
        raise ValueError(
            f"{place}.metric: {spec.metric} is not a metric of {spec.objective.name} "
            f"({', '.join(known)})"
        )
    metric, classes = catalog.find(spec.metric), state.get("values", [])
    is_scale = metric is not None and metric.reads_order and len(classes) > 2
    if is_scale and isinstance(classes[0], str):
        raise ValueError(
            f"{place}.metric: {spec.metric} reads the order of the classes, and column "
            f"{spec.data.columns['label']} holds texts, which stand in alphabetical order: write "
            "its labels as whole numbers in their order (column label_name may give their names)"
        )


def _check_labels(split: str, selection: manifests.Selection, spec: Target, state: State) -> None:
    """Raise ValueError for labels of a split that training would not know, or could not score."""
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    table = manifests.read_columns(selection, fit_components.label_columns(spec))
    _try_rows(selection, spec, state)
    # boxes and label sets of a large corpus would take gigabytes at once
    for start in range(0, len(table), CHECKED_ROWS):
        objective.encode(table.slice(start, CHECKED_ROWS), columns, state)
    if split == "test":
        _check_test_rows(table, spec, state)


def _check_test_rows(table: pa.Table, spec: Target, state: State) -> None:
    """Raise ValueError for rows that would have no value (`ChecksTestRows`)."""
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class
    if isinstance(objective, ChecksTestRows):
        objective.check_test(options(**spec.objective.options), table, spec.data.columns, state)


def _for_targets(objective: type[Objective]) -> bool:
    has_labels = objective.packed or bool(objective.roles)
    return has_labels and not couples_rows(objective)


def _compares_rows(objective: type[Objective]) -> bool:
    metrics = (catalog.find(name) for name in objective.metrics)
    return any(metric is not None and metric.compares_rows for metric in metrics)


def _try_rows(selection: manifests.Selection, spec: Target, state: State) -> None:
    """Encode a few rows with all the columns that an objective may compare with its labels.

    Raises:
        ValueError: A column does not hold what its role needs.
    """
    modality = registry.get("modality", spec.data.modality.name)
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    roles = (*fit_components.fitted_roles(modality), *objective.roles, *objective.optional_roles)
    names = columns_of(roles, columns)
    table = fit_components.sample(selection, names, TRIED_ROWS)
    wrong_types = (TypeError, AttributeError, pa.ArrowNotImplementedError, pa.ArrowTypeError)
    try:
        objective.encode(table, columns, state)
        invalid_label_reasons(objective, table, columns, state)
    except wrong_types as error:
        types = ", ".join(
            f"{role}: {name} is {table.schema.field(name).type}"
            for role, name in columns.items()
            if name in names
        )
        raise ValueError(
            f"{spec.objective.name} cannot read these columns ({types}): {error}; check "
            "data.columns"
        ) from error


def classes_of_rows(spec: Target, rows: Selection, state: State) -> np.ndarray | None:
    """Return the (n,) class numbers of rows, for objectives whose rows have one class."""
    objective = registry.get("objective", spec.objective.name)
    if not draws_by_class(objective):
        return None
    table = manifests.read_columns(rows, fit_components.label_columns(spec))
    return objective.encode(table, spec.data.columns, state)["label"]


def _target_modality(target: TargetStage, group: BackboneGroup) -> tuple[ModalitySpec, str]:
    """Return the source's modality with the target's own options.

    It is extended by the rows of the target (`fit_components.extend_modality`).

    Returns:
        The modality, and a description of what the source knows of these rows.

    Raises:
        ValueError: Its options contradict the source, or the source knows nothing of its rows.
    """
    component = target.spec.data.modality
    kind = registry.get("modality", component.name)
    own = kind.target_options
    named = fit_components.options_by_content("modality", component)
    if problem := ineffective_options(kind, named, group.modality.options):
        raise ValueError(f"targets.{target.name_in_job}.data.modality: {problem}")
    _check_same_options(
        target,
        {
            k: component.options[k]
            for k, v in named.items()
            if k not in own and group.modality.options.get(k) != v
        },
        group.modality.options,
    )
    try:
        return fit_components.extend_modality(
            replace(group.modality, options={**group.modality.options, **named}),
            target.splits.train,
            registry.get("objective", target.spec.objective.name),
            target.spec.data.columns,
        )
    except ValueError as error:
        raise ValueError(f"targets.{target.name_in_job}.data: {error}") from None


def _check_same_options(
    target: TargetStage, differ: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Raise ValueError where the target's modality has other options than its source's."""
    if differ:
        own = registry.get("modality", target.spec.data.modality.name).target_options
        of_source = {name: theirs.get(name) for name in differ}
        may_differ = f" ({', '.join(own)} may differ)" if own else ""
        raise ValueError(
            f"targets.{target.name_in_job}.data.modality: {differ} contradicts the source, whose "
            f"rows are read with {of_source}; a target is read as its backbone was: leave the "
            f"options out{may_differ}"
        )


class TargetReading(NamedTuple):
    """How the rows of a target are read for one backbone group, before any is decoded."""

    modality_spec: ModalitySpec
    modality: Modality
    coverage: str
    """A description of what the source knows of these rows (`ReportsCoverage.coverage`)."""
    arch: Architecture
    objective: ObjectiveSpec
    limit_note: str
    """What `bundle.limit_modality` lowered, as a sentence, or an empty string."""

    @property
    def state(self) -> State:
        return self.objective.state


def plan_reading(target: TargetStage, group: BackboneGroup) -> TargetReading:
    """Return how a target is read for one backbone group.

    Raises:
        ValueError: Rows, objective, techniques and backbone are not compatible.
    """
    modality_spec, coverage = _target_modality(target, group)
    modality_spec, limit_note = bundle.limit_modality(modality_spec, group.arch)
    modality = bundle.build_modality(modality_spec)
    objective = registry.get("objective", target.spec.objective.name)
    try:
        # the options of a source that is a checkpoint are known only now
        check_roles(modality, objective.roles)
    except ValueError as error:
        raise ValueError(f"data.modality: {error}") from None
    options = objective.options_class(**target.spec.objective.options)
    arch = train_source.adapt_arch_to_inputs(group.arch, modality.inputs() or group.arch.inputs)
    state = train_source.bind_state(
        objective, target.state or fit_components.fit_objective(target.spec, target.splits), arch
    )
    train_source.check_labels_for_backbone(target.spec, target.splits, state)
    fitted = ObjectiveSpec(target.spec.objective.name, options.model_dump(), state)
    _check_group(target, group, arch, fitted)
    return TargetReading(modality_spec, modality, coverage, arch, fitted, limit_note)


def findings(target: TargetStage, reading: TargetReading) -> list[Finding]:
    """Return warnings from a sample of the rows.

    They are about lowered options, groups on both sides of a random split, texts that are truncated
    or unknown, a feature that decides the label, names that only the source or the target has, and
    null labels.
    """
    spec, objective = target.spec, registry.get("objective", target.spec.objective.name)
    splits, columns = target.splits.by_name(), target.spec.data.columns
    return [
        *([Finding(reading.limit_note)] if reading.limit_note else []),
        *(Finding(text, is_warning=True) for text in target.splits.shared_groups),
        *row_checks.text_findings(reading.modality, splits, columns, objective.packed),
        *leaks.find_leaks(reading.modality, spec, splits["train"], reading.state),
        *row_checks.null_labels(objective, splits, columns),
        *row_checks.picture_levels(spec.data.modality, splits["train"], columns),
        *row_checks.doubtful_steps(spec.metric, splits["test"], columns),
        *row_checks.doubtful_class_numbers(spec.objective, splits["train"], columns),
        *row_checks.unshared_names(reading.modality_spec, objective, splits["train"], columns),
        *(_pair_problems(target, reading.state) if _compares_rows(objective) else []),
    ]


def _pair_problems(target: TargetStage, state: State) -> list[Finding]:
    """Return a warning where the validation rows have no pairs to be judged by (`check_test`)."""
    spec, rows = target.spec, target.splits.validation
    table = manifests.read_columns(rows, fit_components.label_columns(spec))
    try:
        _check_test_rows(table, spec, state)
    except ValueError as error:
        text = f"validation split, by which steps and settings are chosen: {error}"
        return [Finding(text, is_warning=True)]
    return []


def unmet_requests(target: TargetStage, searched: Sequence[float] = ()) -> list[Finding]:
    """Return the batch sizes and label counts of the job that the training rows cannot provide.

    Args:
        searched: Batch sizes that the search may draw.
    """
    return [*_unmet_batch(target, searched), *_unmet_label_counts(target)]


def _unmet_batch(target: TargetStage, searched: Sequence[float]) -> list[Finding]:
    """Return a finding where a batch is larger than the labelled training rows."""
    train = target.spec.train
    if train.batch_cost is not None or target.packed:
        return []
    batch = int(max(train.global_batch, *searched)) if searched else train.global_batch
    too_few = [
        f"{count:,} at label fraction {fraction}"
        for fraction in filter(None, target.spec.label_fractions)
        if (count := target.num_labelled_rows(fraction)) < batch
    ]
    if not too_few:
        return []
    return [
        Finding(
            f"a batch of {batch} rows is more than the labelled training rows "
            f"({', '.join(too_few)}): each step then takes all of them"
        )
    ]


def _unmet_label_counts(target: TargetStage) -> list[Finding]:
    """Return a finding for each number of rows per class that some classes do not have."""
    fractions = [fraction for fraction in target.spec.label_fractions if fraction]
    classes = classes_of_rows(target.spec, target.splits.train, target.state)
    counts = np.array([len(target.splits.train)]) if classes is None else np.bincount(classes)
    names = [str(name) for name in target.state.get("labels", ())] if classes is not None else []
    out: list[Finding] = []
    for wanted in (fraction for fraction in fractions if isinstance(fraction, int)):
        too_few = np.flatnonzero((counts < wanted) & (counts > 0))
        if not len(too_few):
            continue
        if names:
            description = ", ".join(f"{names[k]} has {counts[k]}" for k in too_few)
            text = (
                f"{wanted} rows of each class were asked for (label_fractions), and {description}: "
                "all their rows are used"
            )
        elif classes is not None:
            text = (
                f"label_fractions: {wanted}: {len(too_few)} identities have fewer than {wanted} "
                "rows; all rows of these are used"
            )
        else:
            text = (
                f"{wanted} rows were asked for (label_fractions), and there are {counts[0]}: all "
                "are used"
            )
        out.append(Finding(text))
    return out


def missing_classes(target: TargetStage) -> list[Finding]:
    """Return the classes of which a fold has no test row: groups stay whole."""
    if not target.spec.folds:
        return []
    classes = classes_of_rows(target.spec, target.splits.test, target.state)
    if classes is None:
        return []
    present = set(classes.tolist())
    labels = enumerate(target.state.get("labels", ()))
    names = [str(name) for k, name in labels if k not in present]
    if not names:
        return []
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return [
        Finding(
            f"no test row of this fold has class {', '.join(names[:4])}{more}; the tables are over "
            "the rows of all folds"
        )
    ]


def prepare(target: TargetStage, group: BackboneGroup) -> TargetData:
    """Read the three splits as a backbone group reads them, decoded where they fit into memory.

    Raises:
        ValueError: A label is in no training row, or there are too many bad rows.
        ChangedFileError: A file has changed since the run was planned.
    """
    spec, splits = target.spec, target.splits
    reading = plan_reading(target, group)
    selected = _select_rows(target, reading)
    bad, notes = list(selected.left_out), list(selected.notes)
    decoder = Decoder(reading.modality, spec.objective.name, reading.state, selected.columns)
    parts = {
        name: Rows(selection, replace(decoder, training=name == "train"))
        for name, selection in selected.selections.items()
    }
    size = sum(decoder.estimate_bytes(selection) for selection in selected.selections.values())
    in_memory = spec.data.decode == "auto" and size <= MEMORY_BYTES
    num_left_out = Counter(row.split for row in splits.left_out)
    if in_memory or spec.data.decode == "memory":
        parts = {
            name: rows.in_memory(spec.data.max_bad_rows, num_left_out=num_left_out[name])
            for name, rows in parts.items()
        }
    parts["train"], untrainable = _trainable(target, parts["train"], num_left_out["train"])
    num_left_out["train"] += len(untrainable)
    bad += untrainable
    unlabelled, unreadable = _unlabelled_rows(target, reading)
    bad += unreadable
    for name, rows in parts.items():
        place = rows.selection.manifest.location
        bad += [(name, place(row), reason) for row, reason in rows.bad]
    if bad:
        first = "; ".join(f"{split} {place}: {reason}" for split, place, reason in bad[:3])
        notes.append(f"{plural(len(bad), 'row')} left out: {first}")
    file_identity.check_unchanged(splits.reads)
    are_in_memory = all(rows.arrays is not None for rows in parts.values())
    is_read_again = any(
        _reads_rows_again(technique_of(component)) for component in target.techniques
    )
    further_reads = target.unlabelled.reads if target.unlabelled else ()
    return TargetData(
        spec=spec,
        objective=reading.objective,
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        unlabelled=unlabelled,
        labels=_labels(target, parts["train"], reading.state),
        groups=None if target.packed else _groups(spec, parts["test"]),
        split_text="; ".join([splits.sizes(), *notes]),
        arch=reading.arch,
        modality=reading.modality_spec,
        key=spec_hash(target.key, reading.modality_spec.to_json()),
        reads=() if are_in_memory and not is_read_again else (*splits.reads, *further_reads),
        findings=tuple(findings(target, reading)),
        num_left_out=dict(num_left_out),
    )


def _unlabelled_rows(
    target: TargetStage, reading: TargetReading
) -> tuple[Rows | None, list[BadRow]]:
    """Return the rows of ``targets.x.unlabelled``, if any, and those of them that are left out."""
    spec, splits = target.spec, target.unlabelled
    if splits is None or spec.unlabelled is None:
        return None, []
    roles = (*reading.modality.roles, *reading.modality.optional_roles)
    own = {role: name for role, name in spec.data.columns.items() if role in roles}
    decoder = Decoder(reading.modality, None, {}, spec.unlabelled.columns or own)
    rows = Rows(splits.train, decoder)
    in_memory = spec.data.decode == "auto" and decoder.estimate_bytes(splits.train) <= MEMORY_BYTES
    if in_memory or spec.data.decode == "memory":
        rows = rows.in_memory(spec.data.max_bad_rows)
    if spec.train.batch_cost is not None:
        rows = rows.with_costs()
    place = splits.train.manifest.location
    return rows, [("unlabelled", place(row), reason) for row, reason in rows.bad]


BadRow = tuple[str, str, str]
"""Split, position and reason of a row that is left out."""


class _SelectedRows(NamedTuple):
    """The rows of a target before any is decoded."""

    selections: dict[str, manifests.Selection]
    """The rows of each split."""
    columns: dict[str, str]
    """The column of each role."""
    left_out: list[BadRow]
    notes: list[str]


def _select_rows(target: TargetStage, reading: TargetReading) -> _SelectedRows:
    """Return the rows of each split; where documents are packed, the packed rows."""
    splits = target.splits.by_name()
    if not target.packed:
        notes = [reading.coverage] if reading.coverage else []
        bad = [(row.split, row.place, row.reason) for row in target.splits.left_out]
        return _SelectedRows(splits, target.spec.data.columns, bad, notes)
    packed = {
        name: _packed(target, name, selection, reading.modality_spec)
        for name, selection in splits.items()
    }
    counts = ", ".join(str(len(of_split.rows)) for of_split in packed.values())
    length = reading.modality.inputs()["length"]
    note = f"packed into {counts} rows of {length} tokens, which are the units"
    bad = [
        (row.split, row.place, row.reason)
        for of_split in packed.values()
        for row in of_split.left_out
    ]
    selections = {name: of_split.rows for name, of_split in packed.items()}
    return _SelectedRows(selections, dict(token_rows.PACKED), bad, [note])


def _trainable(target: TargetStage, rows: Rows, num_left_out: int) -> tuple[Rows, list[BadRow]]:
    """Return the training rows without those that are too short to train on.

    Their costs are computed where batches are made by cost.

    Args:
        num_left_out: As in `check_bad_row_budget`.
    """
    spec = target.spec
    objective = registry.get("objective", spec.objective.name)
    is_streamed = rows.arrays is None  # rows in memory have been looked through
    has_costs = spec.train.batch_cost is not None
    is_checked = is_streamed and train_source.checks_labels_before_decoding(
        objective, rows.modality, rows.decoder.columns
    )
    if not (has_costs or is_checked):
        return rows, []
    rows = rows.with_costs()
    if not is_streamed:
        return rows, []
    kept, bad = train_source.drop_untrainable(rows, spec.data.max_bad_rows, num_left_out)
    place = rows.selection.manifest.location
    left_out = [("train", place(row), reason) for row, reason in bad]
    return kept if has_costs else replace(kept, costs=None), left_out


def _labels(target: TargetStage, rows: Rows, state: State) -> np.ndarray | None:
    """Return (n_train,) class numbers of the training rows, where rows have one class."""
    if rows.arrays is None:
        return classes_of_rows(target.spec, rows.selection, state)
    objective = registry.get("objective", target.spec.objective.name)
    return rows.arrays.get("label") if draws_by_class(objective) else None


def _groups(spec: Target, rows: Rows) -> np.ndarray | None:
    """Return (n,) group numbers of the rows, where the target names a column of groups."""
    if not spec.data.group:
        return None
    table = manifests.read_columns(rows.selection, [spec.data.group])
    return manifests.group_numbers(table[spec.data.group])


def _packed(
    target: TargetStage, split: str, selection: manifests.Selection, modality: ModalitySpec
) -> token_rows.TokenRows:
    """Pack the documents of a split into rows, once for all backbone groups that read them alike.

    Raises:
        ValueError: No row is left.
    """
    work = token_rows.TextWork(modality, target.spec.data.columns, "packed", ())
    # texts that other code has packed are not used again
    code = provenance.made_by(("pipeline.train.token_rows",), (("modality", modality.name),))
    key = spec_hash(STAGE_FORMAT, target.key, modality.to_json(), code.hash, code.versions)
    folder = storage.join(target.root, "packed", f"{target.name}-{split}-{key}")
    packed = token_rows.make_token_rows(
        folder, split, selection, work, target.spec.data.max_bad_rows, (len(selection),)
    )
    if not len(packed.rows):
        raise ValueError(
            f"data: the {split} split holds no text to pack ({len(selection)} rows, all of "
            "them left out)"
        )
    return packed


def reading_key(target: TargetStage, group: BackboneGroup) -> str:
    """Return a hash of how a group reads rows; groups with the same one share decoded rows."""
    objective = registry.get("objective", target.spec.objective.name)
    # which rows can be used may depend on the backbone too
    is_bound, largest = binds_to_backbone(objective), bundle.largest_options(group.arch)
    return spec_hash(
        group.modality.to_json(),
        *([group.arch.to_json()] if is_bound else []),
        *([largest] if largest else []),
    )


def data_for_group(data: TargetData, group: BackboneGroup) -> TargetData:
    """Return the same rows for another backbone group that reads them in the same way.

    Raises:
        ValueError: The group's backbone is not compatible with them.
    """
    arch = train_source.adapt_arch_to_inputs(
        group.arch, bundle.build_modality(data.modality).inputs() or group.arch.inputs
    )
    _build(group, arch, data.objective)
    return replace(data, arch=arch)


def _build(group: BackboneGroup, arch: Architecture, objective: ObjectiveSpec) -> Task:
    """Build the task of a trial with random weights.

    Raises:
        ValueError: Objective or rows are not compatible with the backbone: there are more tokens
            than it has positions, or the objective needs another kind of backbone.
    """
    try:
        task = bundle.build_task(arch, objective, seed=0)
        if arch.inputs != group.arch.inputs:
            bundle.transfer(
                task.backbone,
                bundle.build_backbone(group.arch, seed=0).state_dict(),
                f"the backbone of {', '.join(group.sources)}",
            )
    except ValueError as error:
        read = {name: value for name, value in arch.inputs.items() if isinstance(value, int)}
        raise ValueError(
            f"the backbone {group.label} does not suit {objective.name} on these rows ({read}): "
            f"{error}"
        ) from None
    return task


def _check_group(
    target: TargetStage, group: BackboneGroup, arch: Architecture, objective: ObjectiveSpec
) -> None:
    """Raise ValueError where a technique, the objective or the rows do not fit the backbone."""
    task = _build(group, arch, objective)
    layers = task.layers()
    head = task.objective if transfers_head(task.objective) else None
    unseen = head.unseen_inputs(group.arch.inputs, arch.inputs) if head else ""
    own_techniques = f"give targets.{target.name_in_job} techniques of its own"
    for component in target.techniques:
        technique, name = technique_of(component), component.name
        if technique.frozen and (unused := _unused_hooks(technique)):
            raise ValueError(
                f"techniques: {name} is frozen, so its {' and '.join(unused)} would not be used"
            )
        from_source = technique.starts_from == "source"
        is_named = names_labels(type(task.objective))
        if from_source and not trains(technique) and head is None and not is_named:
            raise ValueError(
                f"techniques: {name} tries the source's own head, and {objective.name} starts "
                f"with a new one: leave it out, or {own_techniques}"
            )
        is_unchanged = technique.frozen or not trains(technique)
        if from_source and is_unchanged and unseen:
            raise ValueError(
                f"techniques: {name} takes the source's network as it is, and {unseen}: "
                f"{own_techniques}, such as [scratch, full]"
            )
        if _trains_something(technique, layers):
            continue
        with torch.random.fork_rng(devices=[]):  # adapters draw their weights
            wrapped = technique.wrap(_build(group, arch, objective))
        if not _trains_something(technique, wrapped.layers()):
            raise ValueError(
                f"techniques: {name} trains the head alone, and {objective.name} has none (its "
                f"output is the backbone's own embedding): {own_techniques}, such as "
                "[scratch, full, lora]"
            )


def _unused_hooks(technique: Technique) -> list[str]:
    """Return the hooks of a frozen technique that are not called: its features are kept."""
    has = {
        "penalty": adds_penalty(technique),
        "streams": bool(technique.streams()),
        "at_test": adapts_at_test(technique),
    }
    return [hook for hook, is_defined in has.items() if is_defined]


def _reads_rows_again(technique: Technique) -> bool:
    """Return whether a technique reads rows from their files also where they are in memory.

    Rows of streams and of techniques that adapt before or after training are read so
    (`train.streams`).
    """
    is_read_once = prepares_on_target(technique) or adapts_at_test(technique)
    return bool(technique.streams()) or is_read_once


def _trains_something(technique: Technique, layers: dict[str, list[str]]) -> bool:
    """Return whether some parameter is trained in every phase."""
    for phase in technique.phases(10):
        rates = layer_rates(technique, layers, phase.name)
        if not any(layers[name] for name, rate in rates.items() if rate):
            return False
    return True


def check_modality(target: TargetStage, source: Source) -> None:
    """Raise ValueError where the objective does not suit the options by which rows would be read.

    They are the options of the source, and those that the target may set itself.
    """
    component, place = target.spec.data.modality, f"targets.{target.name_in_job}"
    if source.data is None:
        return
    kind, given = registry.get("modality", component.name), component.options
    theirs = source.data.modality.options
    continues = source.init or source.backbone.name.startswith(CHECKPOINT_PREFIXES)
    problem = ineffective_options(kind, given, theirs)
    # where a checkpoint is continued, `_target_modality` judges it with the checkpoint's options
    if problem and not continues:
        raise ValueError(f"{place}.data.modality: {problem}")
    name = target.spec.objective.name
    config_checks.check_modality(place, component.name, {**theirs, **given}, name)
    inherited = kind.options_class(**theirs)
    if not continues:  # a checkpoint brings its own options
        own = kind.options_class(**given)
        # a tokenizer is compared by what it holds
        free = (*kind.target_options, *registry.path_options("modality", component.name))
        fixed = [option for option in given if option not in free]
        differ = {k: given[k] for k in fixed if getattr(own, k) != getattr(inherited, k)}
        _check_same_options(target, differ, inherited.model_dump())
    _check_length(place, source, given.get("length"), getattr(inherited, "length", None))


def _check_length(place: str, source: Source, wanted: int | None, length: int | None) -> None:
    """Raise ValueError where rows are longer than the positions that the source is trained with."""
    backbone = source.backbone
    room = backbone.options.get("positions") or length
    has_positions = backbone.name.startswith("transformers/") and not backbone.options.get("config")
    if has_positions and wanted and room and wanted > room:
        raise ValueError(
            f"{place}.data.modality: length {wanted} is longer than the {room} positions of "
            f"{backbone.name} as its source is trained: raise positions there "
            f"({{{backbone.name}: {{positions: {wanted}}}}}), or shorten length here"
        )


def load_weights(uri: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bundle.Manifest]:
    """Return a bundle's backbone and head as arrays (for the object store), and its manifest."""
    loaded = bundle.load(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone, head = (
            {name: tensor.numpy() for name, tensor in tensors.items()}
            for tensors in (loaded.backbone_tensors(), loaded.head_tensors())
        )
        return backbone, head, loaded.manifest
