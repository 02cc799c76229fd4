"""Targets made ready for trials: their splits, their rows decoded once for every base, and what
both share with a source.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.checkpoints import bundle
from pipeline.config import provenance, registry
from pipeline.config.schema import (
    CHECKPOINT_PREFIXES,
    ComponentConfig,
    Job,
    Source,
    Target,
    spec_hash,
)
from pipeline.config.yaml_loader import PLACES
from pipeline.core.contracts import Modality, Objective, Task, Technique
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Splits
from pipeline.data.stream import Decoder, Rows
from pipeline.io import file_identity, storage
from pipeline.metrics.catalog import metric
from pipeline.report import stats, subgroups
from pipeline.train import config_checks, fit, row_checks, token_rows
from pipeline.train import source as train_source
from pipeline.train.row_checks import Finding
from pipeline.train.source import STAGE_FORMAT, data_key
from pipeline.transfer import leaks
from pipeline.transfer.grid import Base, fraction_text, techniques
from pipeline.transfer.trial import TargetData

MEMORY_BYTES = 2 << 30
CHECKED_ROWS, TRIED_ROWS = 1 << 16, 64
OF_CLASSES = (
    "top5_accuracy",
    "balanced_accuracy",
    "kappa",
    "auroc",
    "auprc",
    "min_precision_sensitivity",
    "brier",
    "ece",
)
"""Metrics that a target whose rows have one class may be judged by, beside those that its objective
gives.
"""


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
    root: str = ""
    """The job's folder, where packed rows are kept."""
    techniques: tuple[ComponentConfig, ...] = ()

    @property
    def key(self) -> str:
        return spec_hash(
            data_key(self.spec.data),
            self.splits.fingerprint,
            *([self.against] if self.against else []),
        )

    @property
    def split_origin(self) -> str:
        """Where the splits come from, as the results table says it."""
        drop = self.spec.drop_overlap
        return self.splits.origin + (
            f"; test rows that stand in a source left out ({drop})" if drop != "none" else ""
        )

    @property
    def scored(self) -> bool:
        """Whether transferability scores can be computed: of rows with one class, or with a set of
        labels.
        """
        objective = registry.get("objective", self.spec.objective.name)
        return "label" in objective.roles or (
            objective.roles == ("labels",) and objective.label_tensors == ("labels",)
        )

    @property
    def packed(self) -> bool:
        return registry.get("objective", self.spec.objective.name).packed

    def evidence(self) -> dict[str, stats.Evidence]:
        """Split to the units that tell two networks apart there, counted as for a verdict; nothing
        where documents will be packed into rows.
        """
        if self.packed:
            return {}
        objective, group = registry.get("objective", self.spec.objective.name), self.spec.data.group
        columns = [*_label_columns(self.spec), *([group] if group else [])]
        unit, out = "groups" if group else "rows", {}
        for name, selection in self.splits.by_name().items():
            table = manifests.read_columns(selection, list(dict.fromkeys(columns)))
            groups = manifests.group_numbers(table[group]) if group else None
            encoded = (
                objective.encode(table, self.spec.data.columns, self.state) if self.scored else {}
            )
            if "label" in encoded:
                out[name] = stats.class_evidence(encoded["label"], groups, unit)
            elif "labels" in encoded:
                out[name] = stats.label_set_evidence(encoded["labels"], groups, unit)
            else:
                out[name] = stats.Evidence(
                    stats.count_units(np.ones(len(selection), dtype=bool), groups),
                    stats.LEAST_UNITS,
                    unit,
                )
        return out

    def labelled(self, fraction: float | int) -> int:
        """How many training rows a label fraction stands for; where documents will be packed into
        rows, how many documents.
        """
        n = len(self.splits.train)
        if fraction == 1 and isinstance(fraction, float):
            return n
        labels = _classes(self.spec, self.splits, self.state)
        counts = np.array([n]) if labels is None else np.bincount(labels)
        return int(
            sum(
                min(c, fraction) if isinstance(fraction, int) else max(1, round(fraction * c))
                for c in counts
                if c
            )
        )


def stage(job: Job, name: str) -> TargetStage:
    """Raises ValueError for data that cannot be used or a metric that the objective does not
    give.
    """
    spec = job.targets[name]
    modality, objective = (
        registry.get("modality", spec.data.modality.name),
        registry.get("objective", spec.objective.name),
    )
    if not _for_targets(objective):
        usable = [
            one
            for one in registry.names("objective")
            if _for_targets(registry.get("objective", one))
        ]
        raise ValueError(
            f"targets.{name}.objective: {spec.objective.name} is for sources; a target's rows "
            "have labels, or are texts to model: "
            f"{', '.join(usable)}"
        )
    if objective.packed:
        config_checks.check_packed(f"targets.{name}", spec.data, spec.objective.name)
    config_checks.check_costs(f"targets.{name}", spec.data, spec.train, objective)
    whole = [fraction for fraction in spec.label_fractions if isinstance(fraction, int)]
    if whole and "label" not in objective.roles and not objective.whole_rows:
        raise ValueError(
            f"targets.{name}.label_fractions: {whole[0]} means {whole[0]} rows a class, and a "
            f"row of {spec.objective.name} has no single class: "
            "give shares, such as 0.1"
        )
    if spec.drop_overlap == "near" and modality.roles[0] != "image":
        raise ValueError(
            f"targets.{name}.drop_overlap: near duplicates are found among images, these rows "
            f"are {spec.data.modality.name}: say exact"
        )
    if spec.drop_overlap == "group" and not spec.data.group:
        raise ValueError(
            f"targets.{name}.drop_overlap: group leaves out rows whose group stands in a "
            "source, and data.group names no column: name the one "
            "that holds the patient or speaker, or say exact"
        )
    found = manifests.splits(
        spec.data,
        (*modality.roles, *objective.roles),
        f"targets.{name}",
        storage.join(job.root, "imports"),
        need_test=True,
    )
    try:
        state = fit_labels(spec, found)
    except ValueError as error:
        raise ValueError(f"targets.{name}.data, train split: {error}") from None
    options = objective.options_class(**spec.objective.options)
    known = (*objective.target_metrics(options, state), *objective.test_metrics(options, state))
    if spec.metric is not None and metric(spec.metric).name not in (
        *known,
        *(OF_CLASSES if "label" in objective.roles else ()),
    ):
        raise ValueError(
            f"targets.{name}.metric: {spec.metric} is not a metric of {spec.objective.name} "
            f"({', '.join(known)})"
        )
    if spec.subgroups and objective.packed:
        raise ValueError(
            f"targets.{name}.subgroups: the rows of {spec.objective.name} are packed from "
            "several: leave them out"
        )
    subgroups.read(found.test, spec.subgroups, f"targets.{name}.subgroups")
    kinds = modality, objective
    for split in (
        "train",
        "validation",
        "test",
    ):  # a label that training never sees is found now, not after the sources
        selection = getattr(found, split)
        table = manifests.read_columns(selection, _label_columns(spec))
        try:
            _try_rows(selection, spec, state, *kinds)
            for start in range(
                0, len(table), CHECKED_ROWS
            ):  # boxes and label sets of a large corpus would take gigabytes at once
                objective.encode(table.slice(start, CHECKED_ROWS), spec.data.columns, state)
            if split == "test":
                objective.check_test(
                    objective.options_class(**spec.objective.options),
                    table,
                    spec.data.columns,
                    state,
                )
        except ValueError as error:
            raise ValueError(f"targets.{name}.data, {split} split: {error}") from None
    return TargetStage(
        name, spec, found, state, root=job.root, techniques=tuple(techniques(job, spec))
    )


def _for_targets(objective: type[Objective]) -> bool:
    return not objective.couples_rows and (objective.packed or bool(objective.roles))


def _try_rows(
    selection: manifests.Selection,
    spec: Target,
    state: dict[str, Any],
    modality: type[Modality],
    objective: type[Objective],
) -> None:
    """A few rows with all their columns: an objective may compare its labels with the row's own
    text. Raises ValueError for columns of a wrong type.
    """
    mine = [
        role
        for role in (*modality.roles, *modality.optional_roles)
        if role not in modality.unfitted_roles
    ]
    roles = (*mine, *objective.roles, *objective.optional_roles)
    names = list(
        dict.fromkeys(spec.data.columns[role] for role in roles if role in spec.data.columns)
    )
    table = fit.sample(selection, names, TRIED_ROWS)
    try:
        objective.encode(table, spec.data.columns, state)
        objective.invalid_label_reasons(table, spec.data.columns, state)
    except (
        TypeError,
        AttributeError,
        pa.ArrowNotImplementedError,
        pa.ArrowTypeError,
    ) as error:  # a value was not what its column should hold
        held = ", ".join(
            f"{role}: {name} is {table.schema.field(name).type}"
            for role, name in spec.data.columns.items()
            if name in names
        )
        raise ValueError(
            f"{spec.objective.name} cannot read these columns ({held}): {error}; check data.columns"
        ) from error


def _label_columns(spec: Target) -> list[str]:
    objective = registry.get("objective", spec.objective.name)
    roles = (
        objective.fit_roles
        if objective.fit_roles is not None
        else (*objective.roles, *objective.optional_roles)
    )
    return [spec.data.columns[role] for role in roles if role in spec.data.columns]


def _classes(spec: Target, splits: Splits, state: dict[str, Any]) -> np.ndarray | None:
    """(n_train,) class numbers, for objectives whose rows have one class."""
    objective = registry.get("objective", spec.objective.name)
    if "label" not in objective.roles:
        return None
    return objective.encode(
        manifests.read_columns(splits.train, _label_columns(spec)), spec.data.columns, state
    )["label"]


def fit_labels(spec: Target, splits: Splits) -> dict[str, Any]:
    """What the objective learns of the training rows' own columns."""
    objective, needed = registry.get("objective", spec.objective.name), _label_columns(spec)
    return objective.fit(
        objective.options_class(**spec.objective.options),
        manifests.read_columns(splits.train, needed),
        spec.data.columns,
    )


def _modality(target: TargetStage, base: Base) -> tuple[dict[str, Any], str]:
    """The source's modality with the options that a target may set for itself, and completed by the
    target's own rows (`fitting.completed`).
    """
    component = target.spec.data.modality
    own = registry.get("modality", component.name).target_options
    named = fit.options_by_content(component)
    if problem := registry.get("modality", component.name).ineffective_options(
        named, base.modality["options"]
    ):
        raise ValueError(f"targets.{target.name}.data.modality: {problem}")
    _refuse(
        target,
        {
            k: component.options[k]
            for k, v in named.items()
            if k not in own and base.modality["options"].get(k) != v
        },
        base.modality["options"],
    )
    return fit.extend_modality(
        {**base.modality, "options": {**base.modality["options"], **named}},
        target.splits.train,
        registry.get("objective", target.spec.objective.name),
        target.spec.data.columns,
    )


def _refuse(target: TargetStage, differ: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError where options of the target's modality are others than its source's."""
    if differ:
        own = registry.get("modality", target.spec.data.modality.name).target_options
        raise ValueError(
            f"targets.{target.name}.data.modality: {differ} contradicts the source, whose rows "
            "are read with "
            f"{ {k: theirs.get(k) for k in differ} }; a target is read as its "
            "backbone was: leave the options out"
            + (f" ({', '.join(own)} may differ)" if own else "")
        )


class TargetReading(NamedTuple):
    """How a target's rows are read for one base, before any is decoded."""

    spec_of_modality: dict[str, Any]
    modality: Modality
    coverage: str
    """In words, what the source knows of these rows (`Modality.known`)."""
    arch: dict[str, Any]
    objective: dict[str, Any]

    @property
    def state(self) -> dict[str, Any]:
        return self.objective["state"]


def reading_of(target: TargetStage, base: Base) -> TargetReading:
    """Raises ValueError where rows, objective, techniques or backbone do not suit each other."""
    spec_of_modality, known = _modality(target, base)
    modality = bundle.build_modality(spec_of_modality)
    objective = registry.get("objective", target.spec.objective.name)
    try:
        modality.check(
            objective.roles
        )  # a source that is a checkpoint tells how its rows are read only now
    except ValueError as error:
        raise ValueError(f"data.modality: {error}") from None
    options = objective.options_class(**target.spec.objective.options)
    arch = train_source.adapt_arch_to_inputs(base.arch, modality.inputs() or base.arch["inputs"])
    state = train_source.bind_state(
        objective, target.state or fit_labels(target.spec, target.splits), arch
    )
    fitted = {"name": target.spec.objective.name, "options": options.model_dump(), "state": state}
    _check_base(target, base, arch, fitted)
    return TargetReading(spec_of_modality, modality, known, arch, fitted)


def findings(target: TargetStage, reading: TargetReading) -> list[Finding]:
    """What a look at a sample of the rows tells: texts that are cut, a feature that decides the
    label, names that one side lacks, null labels.
    """
    spec, objective = target.spec, registry.get("objective", target.spec.objective.name)
    splits, columns = target.splits.by_name(), target.spec.data.columns
    return [
        *row_checks.truncated_texts(reading.modality, objective, splits, columns),
        *leaks.find_leaks(reading.modality, spec, splits["train"], reading.state),
        *row_checks.null_labels(objective, splits, columns),
        *row_checks.unshared_names(reading.spec_of_modality, objective, splits["train"], columns),
    ]


def unmet_requests(target: TargetStage, searched: Sequence[float] = ()) -> list[Finding]:
    """Batches and label counts that the job asks for and the training rows do not give;
    ``searched``: batches that may be drawn.
    """
    train, out = target.spec.train, []
    rows = {fraction: target.labelled(fraction) for fraction in target.spec.label_fractions}
    batch = int(max(train.global_batch, *searched)) if searched else train.global_batch
    short = {fraction: count for fraction, count in rows.items() if count < batch}
    if short and train.batch_cost is None and not target.packed:
        description = ", ".join(
            f"{count:,} at {fraction_text(fraction, target.spec.objective.name)}"
            for fraction, count in short.items()
        )
        out.append(
            Finding(
                f"a batch of {batch} rows is more than the labelled training rows ({description}): "
                "there a step takes all of them"
            )
        )
    classes = _classes(target.spec, target.splits, target.state)
    counts = np.array([len(target.splits.train)]) if classes is None else np.bincount(classes)
    names = [str(name) for name in target.state.get("labels", ())] if classes is not None else []
    for wanted in (
        fraction for fraction in target.spec.label_fractions if isinstance(fraction, int)
    ):
        lacking = np.flatnonzero((counts < wanted) & (counts > 0))
        if len(lacking) and names:
            description = ", ".join(f"{names[k]} has {counts[k]}" for k in lacking)
            out.append(
                Finding(
                    f"{wanted} rows of each class were asked for (label_fractions), and "
                    f"{description}: all of these are taken"
                )
            )
        elif len(lacking):
            out.append(
                Finding(
                    f"{wanted} rows were asked for (label_fractions), and {counts[0]} are "
                    "there: all of them are taken"
                )
            )
    return out


def prepare(target: TargetStage, base: Base) -> TargetData:
    """Decode the three splits. Raises ValueError for a label that never stands in the training
    rows, or too many bad rows; ChangedFileError for a file that holds something else than when the
    run was planned.
    """
    spec, splits, columns = target.spec, target.splits, target.spec.data.columns
    read = reading_of(target, base)
    spec_of_modality, modality, known, arch, fitted = read
    objective, state = registry.get("objective", spec.objective.name), read.state
    selections, lost, text = [splits.train, splits.validation, splits.test], [], splits.sizes()
    if target.packed:
        made = [
            _packed(target, name, selection, spec_of_modality)
            for name, selection in zip(manifests.SPLITS, selections, strict=True)
        ]
        selections, columns = [one.rows for one in made], dict(token_rows.PACKED)
        lost = [(row["split"], row["place"], row["reason"]) for one in made for row in one.left_out]
        text += (
            "; packed into "
            + ", ".join(f"{len(one.rows)}" for one in made)
            + f" rows of {modality.inputs()['length']} tokens, which are the units"
        )
    elif known:
        text += f"; {known}"
    decoder = Decoder(modality, spec.objective.name, state, columns)
    parts = [
        Rows(selection, replace(decoder, training=name == "train"))
        for name, selection in zip(manifests.SPLITS, selections, strict=True)
    ]
    wanted = sum(decoder.size(selection) for selection in selections)
    if spec.data.decode == "memory" or (spec.data.decode == "auto" and wanted <= MEMORY_BYTES):
        parts = [rows.in_memory(spec.data.max_bad_rows) for rows in parts]
    streamed = parts[0].arrays is None  # rows in memory have been looked through
    if spec.train.batch_cost is not None or (
        streamed and train_source.checks_labels_before_decoding(objective, modality, columns)
    ):
        parts[0] = parts[0].with_costs()
        if streamed:
            parts[0], short = train_source.drop_untrainable(parts[0], spec.data.max_bad_rows)
            parts[0] = (
                parts[0] if spec.train.batch_cost is not None else replace(parts[0], costs=None)
            )
            lost += [("train", selections[0].manifest.place(row), reason) for row, reason in short]
    held = parts[0].arrays
    labels = (
        _classes(spec, splits, state)
        if held is None
        else held.get("label")
        if "label" in objective.roles
        else None
    )
    bad = lost + [
        (split, rows.selection.manifest.place(row), why)
        for split, rows in zip(manifests.SPLITS, parts, strict=True)
        for row, why in rows.bad
    ]
    text += (
        f"; {len(bad)} rows left out: " + "; ".join(f"{s} {p}: {w}" for s, p, w in bad[:3])
        if bad
        else ""
    )
    groups = None
    if spec.data.group and not target.packed:
        groups = manifests.group_numbers(
            manifests.read_columns(parts[2].selection, [spec.data.group])[spec.data.group]
        )
    file_identity.check_unchanged(splits.reads)
    is_held = all(rows.arrays is not None for rows in parts)
    return TargetData(
        spec,
        fitted,
        parts[0],
        parts[1],
        parts[2],
        labels,
        groups,
        text,
        arch,
        spec_of_modality,
        spec_hash(target.key, spec_of_modality),
        () if is_held else splits.reads,
        tuple(findings(target, read)),
    )


def _packed(
    target: TargetStage, split: str, selection: manifests.Selection, modality: dict[str, Any]
) -> token_rows.TokenRows:
    """The split's documents packed into rows, once for all bases that read alike. Raises ValueError
    where none is left.
    """
    work = token_rows.TextWork(modality, target.spec.data.columns, "packed", ())
    made = provenance.made_by(
        ("pipeline.train.token_rows",), (("modality", modality["name"]),)
    )  # texts that other code has packed are not used again
    folder = storage.join(
        target.root,
        "packed",
        f"{target.name}-{split}-{spec_hash(STAGE_FORMAT, target.key, modality, made.hash, made.versions)}",
    )
    made = token_rows.make(
        folder, split, selection, work, target.spec.data.max_bad_rows, (len(selection),)
    )
    if not len(made.rows):
        raise ValueError(
            f"data: the {split} split holds no text to pack ({len(selection)} rows, all of "
            "them left out)"
        )
    return made


def reading_key(target: TargetStage, base: Base) -> str:
    """What the decoded rows of a target depend on: bases that read them alike share them."""
    objective = registry.get("objective", target.spec.objective.name)
    suits = (
        objective.bind_to_backbone.__func__ is not Objective.bind_to_backbone.__func__
    )  # which rows can be used follows from the backbone too
    return spec_hash(base.modality, *([base.arch] if suits else []))


def for_base(data: TargetData, base: Base) -> TargetData:
    """The same rows for another base that reads them alike. Raises ValueError where its backbone
    does not suit them.
    """
    arch = train_source.adapt_arch_to_inputs(
        base.arch, bundle.build_modality(data.modality).inputs() or base.arch["inputs"]
    )
    _build(base, arch, data.objective)
    return replace(data, arch=arch)


def _build(base: Base, arch: dict[str, Any], objective: dict[str, Any]) -> Task:
    """The task with random weights, which the source's would fit. Raises ValueError where objective
    or rows do not suit the backbone: more tokens than it has positions, an objective that needs
    another kind of backbone.
    """
    try:
        task = bundle.build_task(arch, objective, seed=0)
        if arch["inputs"] != base.arch["inputs"]:
            bundle.transfer(
                task.backbone,
                bundle.build_backbone(base.arch, seed=0).state_dict(),
                f"the backbone of {', '.join(base.sources)}",
            )
    except ValueError as error:
        read = {name: value for name, value in arch["inputs"].items() if isinstance(value, int)}
        raise ValueError(
            f"the backbone {base.label} does not suit {objective['name']} on these rows "
            f"({read}): {error}"
        ) from None
    return task


def _check_base(
    target: TargetStage, base: Base, arch: dict[str, Any], objective: dict[str, Any]
) -> None:
    """As `_build`, and raises ValueError for a technique that would train nothing: a head alone
    where the objective has none of its own.
    """
    task = _build(base, arch, objective)
    for component in target.techniques:
        kind = registry.get("technique", component.name)
        one = kind(kind.options_class(**component.options))
        layers = task.layers()
        if not kind.needs_training and not type(task.objective).transfers_head:
            raise ValueError(
                f"techniques: {component.name} tries the source's own head, and "
                f"{objective['name']} "
                "starts with a new one: leave it out, or give "
                f"targets.{target.name} techniques of its own"
            )
        if (
            (one.frozen or not kind.needs_training)
            and kind.from_source
            and (why := type(task.objective).unseen_inputs(base.arch["inputs"], arch["inputs"]))
        ):
            raise ValueError(
                f"techniques: {component.name} takes the source's network as it is, and {why}: "
                "give "
                f"targets.{target.name} techniques of its own, such "
                "as [scratch, full]"
            )
        if kind.wrap is not Technique.wrap:
            continue  # what it adds is trained
        for phase in one.phases(10):
            if not any(
                layers[name] for name, rate in one.rates(layers, phase.name).items() if rate
            ):
                raise ValueError(
                    f"techniques: {component.name} trains the head alone, and {objective['name']} "
                    "has none (its output is the backbone's own "
                    f"embedding): give targets.{target.name} techniques of its own, such as "
                    "[scratch, full, lora]"
                )


def check_modality(target: TargetStage, source: Source) -> None:
    """Raises ValueError where the target's objective does not suit how its rows would be read: with
    its source's options and its own.
    """
    component, place = target.spec.data.modality, f"targets.{target.name}"
    if source.data is None:
        return
    if problem := registry.get("modality", component.name).ineffective_options(
        component.options, source.data.modality.options
    ):
        raise ValueError(f"{place}.data.modality: {problem}")
    config_checks.check_modality(
        place,
        component.name,
        {**source.data.modality.options, **component.options},
        target.spec.objective.name,
    )
    kind = registry.get("modality", component.name)
    theirs = kind.options_class(**source.data.modality.options)
    if not source.init and not source.backbone.name.startswith(
        CHECKPOINT_PREFIXES
    ):  # a checkpoint brings its own options, and a tokenizer counts by what it holds
        fixed = [
            k
            for k in component.options
            if k not in kind.target_options and k not in PLACES.get(component.name, ())
        ]
        _refuse(
            target,
            {
                k: component.options[k]
                for k in fixed
                if getattr(kind.options_class(**component.options), k) != getattr(theirs, k)
            },
            theirs.model_dump(),
        )
    room, wanted = (
        source.backbone.options.get("positions") or getattr(theirs, "length", None),
        component.options.get("length"),
    )
    if (
        wanted
        and room
        and wanted > room
        and source.backbone.name.startswith("transformers/")
        and not source.backbone.options.get("config")
    ):
        raise ValueError(
            f"{place}.data.modality: length {wanted} is longer than the {room} positions of "
            f"{source.backbone.name} as its source is trained: "
            f"raise positions there ({{{source.backbone.name}: {{positions: {wanted}}}}}), or "
            "shorten length here"
        )


def weights(uri: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """A bundle's backbone and its head as arrays (for the object store), and its manifest."""
    found = bundle.load(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone, head = (
            {name: tensor.numpy() for name, tensor in part.items()}
            for part in (found.backbone_tensors(), found.head_tensors())
        )
        return backbone, head, found.manifest
