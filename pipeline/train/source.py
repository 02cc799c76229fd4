"""The source stage: its key, and what is fitted on the corpus before the ranks start."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints import bundle, pretrained
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import provenance, registry
from pipeline.config.provenance import Provenance, ProvenanceRecord
from pipeline.config.schema import (
    CHECKPOINT_PREFIXES,
    Data,
    Job,
    Source,
    Target,
    Train,
    spec_hash,
)
from pipeline.core.capabilities import augment_options, columns_of, cost_column, is_costed
from pipeline.core.contracts import Modality, Objective
from pipeline.core.contracts.objective_capabilities import (
    binds_to_backbone,
    bounds_length,
    compares_views,
    needed_roles,
)
from pipeline.core.inputs import Inputs
from pipeline.core.rng import mix
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec, State
from pipeline.data import manifests
from pipeline.data.manifests import LeftOut, Selection, Splits
from pipeline.data.plan import Mixture, Plan
from pipeline.data.stream import Decoder, Rows, check_bad_row_budget
from pipeline.io import storage
from pipeline.io.file_identity import ChangedFileError, FileIdentity
from pipeline.io.wording import plural
from pipeline.train import (
    config_checks,
    fit_components,
    online_probe,
    resume_history,
    row_checks,
    streams,
    token_rows,
)
from pipeline.train.row_checks import Finding

STAGE_FORMAT = 8
"""The format of a stage's key and folder. A change of code that computes results does not raise it:
each bundle records the code that made it (`pipeline.config.provenance`).
"""
WORKING_PARTS = (
    "checkpoints",
    "initial",
    "tokens",
    "modality.json",
    "log",
    "ray",
    resume_history.FILE,
)
"""What a source's folder holds beside its bundle."""
MAX_STRETCH, ROUNDING_SECONDS = 1.1, 1.0
"""A recording lasts at most MAX_STRETCH times what its column says, plus ROUNDING_SECONDS."""
LOCATION_FIELDS = {"uri", "train", "validation", "test"}
"""Fields of `Data` that say where files are: their content enters a key instead."""
REPORTING_FIELDS = {
    "log_every_steps",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "trace_rows",
}
"""Fields of `Train` that do not change the weights."""


def train_key(train: Train) -> dict[str, Any]:
    """Return the training settings that enter the key of a source or trial.

    ``max_bad_steps`` decides whether a run ends with an error, and changes no weight of a run that
    does not. Its default stands in its place, as it always did, so a run goes on with another.
    """
    out = train.model_dump(mode="json", exclude=REPORTING_FIELDS)
    out["max_bad_steps"] = Train.model_fields["max_bad_steps"].default
    return out


def data_key(data: Data) -> dict[str, Any]:
    """Return the fields of a data spec that enter a stage's key.

    Paths of files are left out, and those of tokenizers are replaced by a hash of their content.
    The content of the rows enters the key elsewhere.
    """
    left_out = dict.fromkeys(LOCATION_FIELDS | {"decode", "max_bad_rows", "identity"}, True)
    out = data.model_dump(mode="json", exclude={**left_out, "more": {"__all__": left_out}})
    for fields, part in ((out, data), *zip(out["more"], data.more, strict=True)):
        fields["modality"]["options"] = fit_components.options_by_content("modality", part.modality)
    return out


@dataclass(frozen=True)
class SourceStage:
    """A source of a job before anything runs: its rows, its key and its folder."""

    job: Job
    name: str
    spec: Source
    splits: Splits | None
    """None for a source that is an existing checkpoint."""
    key: str
    probe: Splits | None = None
    checkpoint_fingerprint: str = ""
    """Fingerprint of the checkpoint that it starts from (`pretrained.fingerprint`), or ""."""
    remake: bool = False
    """Whether a bundle that other code or versions made is made again."""

    @property
    def reads(self) -> tuple[FileIdentity, ...]:
        """Files that are read in training, as they were when the stage was planned."""
        return tuple(
            file
            for splits in (self.splits, self.probe)
            if splits is not None
            for file in splits.reads
        )

    @property
    def checkpoint_name(self) -> str:
        """The checkpoint that the job names, or ""."""
        if self.spec.init:
            return self.spec.init
        name = self.spec.backbone.name
        return name if name.startswith(CHECKPOINT_PREFIXES) else ""

    @property
    def initial_bundle_uri(self) -> str:
        """Bundle with the weights that training starts from, written once from the checkpoint."""
        return storage.join(self.uri, "initial")

    def check_checkpoint(self) -> None:
        """Raise ChangedFileError when the checkpoint has changed since the stage was planned."""
        name = self.checkpoint_name
        if name and pretrained.fingerprint(name) != self.checkpoint_fingerprint:
            raise ChangedFileError(
                f"sources.{self.name}: {name} was changed while it was in use: it "
                "holds something else than when the run was planned; leave it alone until the run "
                "ends, and run again"
            )

    @property
    def uri(self) -> str:
        """The source's folder below that of the job."""
        return storage.join(self.job.root, "sources", f"{self.name}-{self.key}")

    @property
    def bundle_uri(self) -> str:
        """The source's bundle: in its folder, or the existing one that the job names."""
        if self.is_existing_bundle:
            return self.spec.backbone.name.partition(":")[2]
        return storage.join(self.uri, "bundle")

    @property
    def seed(self) -> int:
        """The seed of the source, from that of the job and the source's name."""
        return mix(self.job.seed, *self.name.encode())

    @property
    def is_existing_bundle(self) -> bool:
        """Whether the source is a bundle that the job names. It is used whatever code made it."""
        return self.splits is None and self.spec.backbone.name.startswith("bundle:")

    @property
    def has_bundle(self) -> bool:
        """Whether the bundle is complete."""
        return bundle.exists(self.bundle_uri)

    @property
    def done(self) -> bool:
        """Whether its bundle exists and need not be made again."""
        return self.has_bundle and not (self.remake and self.changes())

    def changes(self) -> tuple[str, ...]:
        """Describe how the present code and versions differ from those that made the bundle.

        () where they do not, or there is no bundle of ours.
        """
        if self.is_existing_bundle or not self.has_bundle:
            return ()
        manifest = bundle.read_manifest(self.bundle_uri)
        now = made_by(self.spec, manifest.arch, manifest.modality.name)
        begun_by = manifest.made_by.get("begun_by", ()) if manifest.made_by else ()
        present = made_by(self.spec)
        notes: list[str] = []
        for metadata in begun_by:
            reasons = provenance.changes(provenance.from_metadata(metadata), present)
            if reasons:
                notes.append(f"begun by other code or versions ({', '.join(reasons)})")
        return (*provenance.changes(manifest.made, now), *dict.fromkeys(notes))

    @property
    def packed(self) -> bool:
        """Whether the objective reads documents that are packed into rows of tokens."""
        return (
            self.spec.objective is not None
            and registry.get("objective", self.spec.objective.name).packed
        )


def plan_source(job: Job, name: str) -> SourceStage:
    """Read a source's splits and compute its key.

    Raises ValueError for data that cannot be used (missing column, empty split, different schemas).
    """
    spec = job.sources[name]
    splits = None
    if spec.data is not None:
        assert spec.objective is not None
        modality = registry.get("modality", spec.data.modality.name)
        objective = registry.get("objective", spec.objective.name)
        roles = (*modality.roles, *objective.roles)
        config_checks.check_source(f"sources.{name}", spec)
        splits = manifests.splits(
            spec.data,
            roles,
            f"sources.{name}",
            storage.join(job.root, "imports"),
            need_test=False,
            needed=needed_roles(objective),
        )
        if spec.train.patience and not len(splits.validation):
            raise ValueError(
                f"sources.{name}.train.patience: there are no validation rows to judge by: hold "
                "some out (data.validation_fraction), or leave it out"
            )
    probe = online_probe.read_probe_splits(
        spec,
        f"sources.{name}",
        bool(splits and len(splits.validation)),
        storage.join(job.root, "imports"),
    )
    key_fields = spec.model_dump(
        mode="json",
        exclude={
            "data",
            "probe",
            "workers",
            "cpus_per_worker",
            "gpus_per_worker",
            "max_failures",
            "train",
            "init",
        },
    )
    if spec.modality is None:
        del key_fields["modality"]
    # the key depends on the content of a checkpoint, not on its path
    fingerprint = pretrained.fingerprint(spec.init) if spec.init else None
    key_fields["start"] = fingerprint
    if spec.backbone.name.startswith(CHECKPOINT_PREFIXES):
        fingerprint = pretrained.fingerprint(spec.backbone.name)
        key_fields["backbone"]["name"] = fingerprint
    if spec.objective is not None:
        options = fit_components.options_by_content("objective", spec.objective)
        key_fields["objective"]["options"] = options
    key = spec_hash(
        STAGE_FORMAT,
        name,
        key_fields,
        train_key(spec.train),
        job.seed,
        [data_key(spec.data), splits.fingerprint, canonical_shards(spec)]
        if spec.data and splits
        else None,
        *([[data_key(spec.probe), probe.fingerprint]] if spec.probe and probe else []),
    )
    source_stage = SourceStage(job, name, spec, splits, key, probe, fingerprint or "")
    _check_plain_network(source_stage)
    if splits is not None and not source_stage.packed:
        check_plan(source_stage, splits.corpus_sizes)
    return source_stage


def _check_plain_network(stage: SourceStage) -> None:
    """Raise ValueError where the checkpoint is a bundle with modules of a technique in it.

    Its tensors are not those of the backbone that the bundle names.
    """
    text = stage.checkpoint_name
    if not text.startswith("bundle:"):
        return
    manifest = bundle.read_manifest(text.partition(":")[2])
    if manifest.technique is not None:
        parent = f", such as its own source ({manifest.parent})" if manifest.parent else ""
        raise ValueError(
            f"sources.{stage.name}: {text} was fine-tuned with {manifest.technique.name}, whose "
            f"modules are part of its network, so it serves `predict` and is no plain "
            f"{manifest.arch.name} to start from: name a bundle of another technique{parent}"
        )


def made_by(
    spec: Source, arch: Architecture | None = None, modality: str | None = None
) -> Provenance:
    """Return the code and versions that would make a source now.

    Args:
        arch: The backbone's architecture; None: as the job says.
        modality: The name of the modality of a checkpoint without data.
    """
    arch = arch or Architecture(
        pretrained.strip_weights_tag(spec.backbone.name), spec.backbone.options
    )
    imported = spec.init is not None or spec.backbone.name.startswith(CHECKPOINT_PREFIXES)
    modules = (
        *(provenance.SOURCE_CODE if spec.data else ()),
        *(provenance.CHECKPOINT_CODE if imported else ()),
    )
    modality = spec.data.modality.name if spec.data else modality
    objective = spec.objective.name if spec.objective and spec.data else None
    return provenance.made_by(
        modules,
        provenance.components_of(
            modality,
            arch.name,
            arch.options,
            objective,
            spec.technique.name if spec.data else None,
        ),
    )


def begin(stage: SourceStage) -> list[ProvenanceRecord]:
    """Record that the present code works on a source, and drop parts that must not be continued.

    A killed run is continued whatever code began it. Only with ``--remake changed`` are the parts
    that other code left removed. An existing bundle stays until the new one is complete.

    Returns:
        The other code and versions that worked on it before.
    """
    now = made_by(stage.spec)
    has_parts_of_other_code = bool(resume_history.changed_since(stage.uri, now)) or (
        stage.has_bundle and not resume_history.read_provenance(stage.uri)
    )
    if stage.remake and has_parts_of_other_code:
        for part in WORKING_PARTS:
            storage.remove_tree(storage.join(stage.uri, part))
        for file in storage.list_files(stage.uri, recursive=False):
            if file.rpartition("/")[2].startswith("rows-rank"):
                storage.remove_tree(file)
    return resume_history.record(stage.uri, now)


def check_plan(stage: SourceStage, corpus_sizes: tuple[int, ...]) -> None:
    """Raise ValueError when the rows do not fill a global batch, there are more ranks than shards,
    or a mixture weight is too small.
    """
    shards, most_ranks = canonical_shards(stage.spec), stage.spec.worker_range[1]
    if stage.spec.train.batch_cost is not None:
        # costs are not known yet, and decide the batches alone
        if most_ranks > shards:
            raise ValueError(
                f"sources.{stage.name}: {most_ranks} ranks are more than the {shards} canonical "
                "shards: raise train.canonical_shards, or use fewer workers"
            )
        return
    try:
        Plan(
            sum(corpus_sizes),
            0,
            stage.spec.train.global_batch,
            shards=shards,
            mixture=mixture(stage.spec, corpus_sizes),
        ).shards_of_rank(0, most_ranks)
    except ValueError as error:
        raise ValueError(f"sources.{stage.name}: {error}") from None


def mixture(spec: Source, corpus_sizes: tuple[int, ...]) -> Mixture | None:
    """Return ranges and weights of a source's corpora, given the number of rows of each.

    None where they have no weights: every row then comes once per epoch.
    """
    weights = [weight for weight in (spec.data.weights if spec.data else ()) if weight is not None]
    ends = np.cumsum(corpus_sizes).tolist()
    return tuple(zip([0, *ends[:-1]], ends, weights, strict=True)) if weights else None


def canonical_shards(spec: Source) -> int:
    """Return the number of canonical shards (`Plan`).

    It decides the order of rows, so it is part of the stage's key.
    """
    assert spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    return streams.canonical_shards(spec.train, spec.worker_range[1], options)


@dataclass(frozen=True)
class FittedSource:
    """What was fitted on the corpus, and the rows as training reads them."""

    arch: Architecture
    modality: ModalitySpec
    objective: ObjectiveSpec
    columns: dict[str, str]
    train: Selection
    validation: Selection
    checkpoint_name: str | None
    """The checkpoint that the job names."""
    initial_bundle_uri: str | None
    """Bundle with the weights that training starts from, written once from the checkpoint."""
    transfer_note: str
    """Which tensors came from the checkpoint, as a sentence."""
    left_out: tuple[LeftOut, ...]
    description: str
    """How many rows there are, and how they were chosen and prepared, in words."""
    corpus_sizes: tuple[int, ...]
    """Number of training rows of each corpus, in their order."""
    probe: online_probe.Probe | None = None
    costs: np.ndarray | None = None
    """Cost of each training row, where batches are cut by cost."""
    num_left_out: int = 0
    """Training rows that were left out before any was decoded. They count against the same budget
    as rows that cannot be decoded.
    """
    begun_by: tuple[ProvenanceRecord, ...] = ()
    """Other code and versions that made earlier parts of this source (`begin`)."""
    findings: tuple[Finding, ...] = ()
    """Findings on the rows before any training, for the terminal and the report."""


def prepare_source(stage: SourceStage) -> FittedSource:
    """Prepare what the ranks of a source read; once, since it is kept in the stage's folder.

    Modality and objective are fitted on the training rows, the checkpoint is read, texts are packed
    or tokenised, and rows that cannot be trained on are left out.

    Raises:
        BundleError: The checkpoint contradicts the job.
        TooManyBadRowsError: More rows cannot be used than the budget allows.
    """
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None
    begun_by = begin(stage)
    arch, modality, objective, transfer_note = _fit_network(stage)
    modality, limit_note = bundle.limit_modality(modality, arch)
    rows = _fit_rows(stage, modality, objective)
    notes = [splits.sizes(), *rows.notes, *_mixture_notes(spec, rows.corpus_sizes)]
    probe = None
    if spec.probe and stage.probe:
        probe = online_probe.prepare(spec.probe, stage.probe, bundle.build_modality(modality))
        sizes = f"{len(probe.train)} training and {len(probe.validation)} validation rows"
        notes.append(f"probe of {sizes}")
    if begun_by:
        notes.append("gone on with what other code or versions began")
    if rows.left_out:
        first, more = rows.left_out[0], ", ..." if len(rows.left_out) > 1 else ""
        example = f"{first.place}: {first.reason}{more}"
        notes.append(f"{plural(len(rows.left_out), 'row')} left out ({example})")
    return FittedSource(
        arch=arch,
        modality=modality,
        objective=objective,
        columns=rows.columns,
        train=rows.train,
        validation=rows.validation,
        checkpoint_name=stage.checkpoint_name or None,
        initial_bundle_uri=stage.initial_bundle_uri if stage.checkpoint_name else None,
        transfer_note=transfer_note,
        left_out=tuple(rows.left_out),
        description="; ".join(notes),
        corpus_sizes=rows.corpus_sizes,
        probe=probe,
        costs=rows.costs,
        num_left_out=rows.num_left_out,
        begun_by=tuple(begun_by),
        findings=tuple(findings_of(stage, modality, limit_note)),
    )


def _fit_network(
    stage: SourceStage,
) -> tuple[Architecture, ModalitySpec, ObjectiveSpec, str]:
    """Return architecture, modality and objective of the bundle, and the transfer note."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    checkpoint, arch, transfer_note, coverage = None, None, "", ""
    if stage.checkpoint_name and bundle.exists(stage.initial_bundle_uri):
        # an earlier run has read the checkpoint
        manifest = bundle.load(stage.initial_bundle_uri).manifest
        modality, arch = manifest.modality, manifest.arch
        transfer_note = manifest.training["transfer"]
    else:
        name = stage.checkpoint_name
        if name:
            checkpoint = pretrained.read(name, spec.backbone.name, spec.modality_name)
        path = storage.join(stage.uri, "modality.json")
        place = f"sources.{stage.name}"
        modality, coverage = fit_components.fit_modality(
            spec, splits.train, checkpoint, place, path
        )
    state = fit_components.fit_objective(spec, splits)
    if arch is None:
        arch = arch_of(spec, checkpoint, bundle.build_modality(modality).inputs())
    state = bind_state(objective, state, arch)
    check_labels_for_backbone(spec, splits, state)
    objective_spec = ObjectiveSpec(spec.objective.name, options.model_dump(), state)
    if checkpoint is not None:
        stage.check_checkpoint()
        uri = stage.initial_bundle_uri
        transfer_note = import_pretrained(
            stage, checkpoint, arch, modality, objective_spec, uri, coverage
        )
    return arch, modality, objective_spec, transfer_note


@dataclass
class _Rows:
    """The rows of a source, as far as they are prepared."""

    train: Selection
    validation: Selection
    columns: dict[str, str]
    corpus_sizes: tuple[int, ...]
    left_out: list[LeftOut]
    notes: list[str]
    costs: np.ndarray | None = None
    num_left_out: int = 0


def _fit_rows(stage: SourceStage, modality: ModalitySpec, objective: ObjectiveSpec) -> _Rows:
    """Pack or tokenise texts, then leave out the rows that cannot be trained on."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None
    kind, columns = registry.get("objective", objective.name), dict(spec.data.columns)
    rows = _Rows(
        train=splits.train,
        validation=splits.validation,
        columns=columns,
        corpus_sizes=splits.corpus_sizes,
        left_out=list(splits.left_out),
        notes=[],
        num_left_out=sum(row.split == "train" for row in splits.left_out),
    )
    roles = (*kind.roles, *kind.optional_roles)
    labels = tuple(columns_of(roles, columns))
    form = token_rows.row_form(kind, modality, rows.train, columns)
    if form:
        _tokenise(stage, rows, token_rows.TextWork(modality, columns, form, labels))
    built = bundle.build_modality(modality)
    decoder = Decoder(built, objective.name, objective.state, rows.columns)
    needs_costs = spec.train.batch_cost is not None
    if needs_costs or checks_labels_before_decoding(kind, built, rows.columns):
        _leave_out_untrainable(spec, rows, decoder)
    return rows


def _tokenise(stage: SourceStage, rows: _Rows, work: token_rows.TextWork) -> None:
    """Replace the rows by rows of tokens."""
    assert stage.spec.data is not None
    budget = stage.spec.data.max_bad_rows
    folder = storage.join(stage.uri, "tokens")
    train = token_rows.make_token_rows(
        storage.join(folder, "train"), "train", rows.train, work, budget, rows.corpus_sizes
    )
    validation = token_rows.make_token_rows(
        storage.join(folder, "validation"),
        "validation",
        rows.validation,
        work,
        budget,
        (len(rows.validation),),
    )
    rows.train, rows.validation, rows.corpus_sizes = train.rows, validation.rows, train.corpus_sizes
    rows.columns = work.output_columns
    rows.left_out += [*train.left_out, *validation.left_out]
    length = bundle.build_modality(work.modality).inputs()["length"]
    sizes = f"{len(rows.train)} and {len(rows.validation)} rows of {length} tokens"
    rows.notes.append(f"{work.form} into {sizes}")


def _leave_out_untrainable(spec: Source, rows: _Rows, decoder: Decoder) -> None:
    """Leave out training rows that can only be evaluated, and keep the costs of the others."""
    assert spec.data is not None
    with_costs = Rows(rows.train, decoder).with_costs()
    kept, bad = drop_untrainable(with_costs, spec.data.max_bad_rows, rows.num_left_out)
    place = rows.train.manifest.location
    rows.left_out += [LeftOut("train", row, place(row), reason) for row, reason in bad]
    bad_ids = [row for row, _ in bad]
    is_bad = np.isin(rows.train.all_ids, bad_ids)
    by_corpus = np.split(is_bad, np.cumsum(rows.corpus_sizes)[:-1])
    rows.corpus_sizes = tuple(len(part) - int(part.sum()) for part in by_corpus)
    rows.train = kept.selection
    rows.num_left_out += len(bad)
    if spec.train.batch_cost is not None:
        rows.costs = kept.costs


def _mixture_notes(spec: Source, corpus_sizes: tuple[int, ...]) -> list[str]:
    """Describe how often each corpus is drawn from, where corpora have weights."""
    ranges = mixture(spec, corpus_sizes)
    if not ranges:
        return []
    total = sum(weight for *_, weight in ranges)
    shares = [
        f"{weight / total:.3g} from corpus {number} ({stop - start} rows)"
        for number, (start, stop, weight) in enumerate(ranges, 1)
    ]
    drawn = f"drawn by weight, as shares of the training rows: {', '.join(shares)}"
    return [drawn, "validation is unweighted"]


def findings_of(stage: SourceStage, modality: ModalitySpec, limit_note: str) -> list[Finding]:
    """Return findings on a sample of a source's rows: cut texts, missing labels, unknown names.

    Args:
        limit_note: What `bundle.limit_modality` lowered, as a sentence, or an empty string.
    """
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    rows = {"train": splits.train, "validation": splits.validation}
    findings = [Finding(limit_note)] if limit_note else []
    if not len(splits.validation) and (reason := splits.empty_draws.get("validation")):
        text = (
            f"no validation row was drawn ({reason}), so no checkpoint is chosen by validation: "
            "give validation files, a split_column or another split_seed"
        )
        findings.append(Finding(text, is_warning=True))
    findings += [Finding(text, is_warning=True) for text in splits.shared_groups]
    built = bundle.build_modality(modality)
    findings += row_checks.text_findings(built, rows, columns, objective.packed)
    findings += row_checks.null_labels(objective, rows, columns)
    findings += row_checks.picture_levels(spec.data.modality, splits.train, columns)
    findings += row_checks.doubtful_class_numbers(spec.objective, splits.train, columns)
    findings += _unread_augmentation(spec.data, spec.objective.name)
    if stage.checkpoint_name:  # its modality was fitted on other rows
        findings += row_checks.unshared_names(modality, objective, splits.train, columns)
    return findings


def _unread_augmentation(data: Data, name: str) -> list[Finding]:
    """Report options that only augment rows, where the objective makes random views instead."""
    if not compares_views(registry.get("objective", name)):
        return []
    options = augment_options(registry.get("modality", data.modality.name))
    stated = [option for option in options if option in data.modality.options]
    if not stated:
        return []
    return [
        Finding(
            f"{name} makes its own random views of a row, so {', '.join(stated)} of data.modality "
            "only augment the rows of targets",
            is_warning=True,
        )
    ]


def checks_labels_before_decoding(
    objective: type[Objective], modality: Modality, columns: dict[str, str]
) -> bool:
    """Whether rows that are too short to train on (`LengthBound`) are left out before decoding.

    So it is where a column has their lengths. To read the header of every file for this is worth it
    only where batches are cut by length anyway.
    """
    return bounds_length(objective) and cost_column(modality, columns) is not None


def drop_untrainable(
    rows: Rows, max_bad: float, num_left_out: int = 0
) -> tuple[Rows, list[tuple[int, str]]]:
    """Leave out rows that are too short to train on (`LengthBound`), before any is decoded.

    Columns of lengths may be rounded, even to whole seconds. Each row is first judged by the
    shortest length that its column allows; of those that fail, the headers of the files are read.
    Segments are exactly as long as their column `seconds` says.

    Args:
        rows: Training rows with their costs.
        max_bad: Share of the rows that may be left out.
        num_left_out: As in `check_bad_row_budget`.

    Returns:
        The rows that are kept, and (row id, reason) of the others.

    Raises:
        TooManyBadRowsError: More rows than ``max_bad`` are too short.
    """
    decoder, costs = rows.decoder, rows.costs
    ids = rows.selection.all_ids
    objective = registry.get("objective", str(decoder.objective))
    roles: tuple[str, ...] = objective.roles
    if not bounds_length(objective) or not len(rows):
        return rows, []
    assert costs is not None and is_costed(decoder.modality)
    cost_role = decoder.modality.cost_role
    names = columns_of(roles, decoder.columns)
    table = manifests.read_columns(rows.selection, names)
    may_be_rounded = np.full(len(rows), cost_role in decoder.columns)
    if may_be_rounded.all() and "start" in decoder.columns:
        starts = manifests.read_columns(rows.selection, [decoder.columns["start"]]).column(0)
        may_be_rounded = starts.is_null(nan_is_null=True).to_numpy()
    rounded_down = np.maximum(costs / 2, (costs - ROUNDING_SECONDS) / MAX_STRETCH)
    shortest = np.where(may_be_rounded, rounded_down, costs)
    reasons = np.array(
        objective.untrainable_reasons(
            table, decoder.columns, decoder.objective_state, None, shortest
        ),
        dtype=object,
    )
    doubtful = np.flatnonzero((reasons != "") & may_be_rounded)
    if len(doubtful):
        columns = {role: name for role, name in decoder.columns.items() if role != cost_role}
        by_header = replace(rows.subset(doubtful), decoder=replace(decoder, columns=columns))
        header_seconds: Any = by_header.with_costs().costs
        # 0: the file cannot be read; it then counts with the longest length that its column allows
        longest = MAX_STRETCH * costs[doubtful] + ROUNDING_SECONDS
        seconds = np.where(header_seconds > 0, header_seconds, longest)
        reasons[doubtful] = objective.untrainable_reasons(
            table.take(doubtful), decoder.columns, decoder.objective_state, None, seconds
        )
    bad = [(int(row), reason) for row, reason in zip(ids, reasons, strict=True) if reason]
    check_bad_row_budget(bad, len(rows), max_bad, rows.selection, num_left_out)
    return rows.subset(np.flatnonzero(reasons == "")), bad


def bind_state(objective: type[Objective], state: State, arch: Architecture) -> State:
    """Return an objective's state with what it must know of the backbone (`BindsToBackbone`).

    Raises ValueError where the backbone does not fit the objective.
    """
    if not binds_to_backbone(objective):
        return state
    with torch.device("meta"):
        return objective.bind_to_backbone(state, bundle.build_backbone(arch, seed=0))


def check_labels_for_backbone(spec: Source | Target, splits: Splits, state: State) -> None:
    """Raise ValueError for labels of held-out rows that the backbone cannot predict.

    Otherwise they would be found during training, at the first evaluation. `bind_state` has checked
    those of the training rows. A source's test rows are not read.
    """
    assert spec.data is not None and spec.objective is not None
    name = spec.objective.name
    if not binds_to_backbone(registry.get("objective", name)):
        return
    unread = ("train", "test") if isinstance(spec, Source) else ("train",)
    for split, rows in splits.by_name().items():
        if split in unread:
            continue
        try:
            fit_components.encode_labels(name, state, rows, spec.data.columns)
        except ValueError as error:
            raise ValueError(f"{split} split: {error}") from None


def arch_of(
    spec: Source, checkpoint: pretrained.PretrainedCheckpoint | None, inputs: Inputs
) -> Architecture:
    """Return the architecture that the job names, or the checkpoint's.

    Raises BundleError where the two contradict each other.
    """
    if checkpoint is None or checkpoint.arch is None:
        return Architecture(spec.backbone.name, dict(spec.backbone.options), inputs)
    given = dict(spec.backbone.options)
    if (
        not spec.backbone.name.startswith(CHECKPOINT_PREFIXES)
        and pretrained.strip_weights_tag(spec.backbone.name) != checkpoint.arch.name
    ):
        raise BundleError(
            f"{checkpoint.origin} holds a {checkpoint.arch.name}, the job says "
            f"{spec.backbone.name}: name the same backbone"
        )
    fixed = [name for name in given if "config" in checkpoint.arch.options and name != "pool"]
    if fixed:
        raise BundleError(
            f"backbone options {', '.join(fixed)}: the configuration of {checkpoint.origin} "
            "decides them; leave them out"
        )
    return adapt_arch_to_inputs(
        replace(checkpoint.arch, options={**checkpoint.arch.options, **given}),
        {**checkpoint.arch.inputs, **inputs},
    )


def checkpoint_parts(
    spec: Source, checkpoint: pretrained.PretrainedCheckpoint, place: str
) -> tuple[Architecture, ModalitySpec]:
    """Return architecture and modality of a source without data.

    They are the checkpoint's, else timm's, with the modality options that the job states.

    Args:
        place: The source in the job file, for errors.

    Raises:
        BundleError: The job contradicts the checkpoint, or options contradict each other.
    """
    if checkpoint.arch is None or checkpoint.modality is None:
        arch, modality = pretrained.timm_input_spec(spec.backbone.name, dict(spec.backbone.options))
    else:
        arch, modality = arch_of(spec, checkpoint, {}), checkpoint.modality
    return pretrained.override_modality(arch, modality, spec.modality, f"{place}.modality")


def adapt_arch_to_inputs(arch: Architecture, inputs: Inputs) -> Architecture:
    """Return the architecture of existing weights for rows of another input (length, size).

    The number of positions stays that of the weights: where it followed from the old row length,
    that length is written into the options.
    """
    options = dict(arch.options)
    option_names = registry.entry("model", arch.name.partition("/")[0]).options.model_fields
    if (
        "positions" in option_names
        and not options.get("positions")
        and not options.get("config")
        and inputs.get("length") != arch.inputs.get("length")
    ):
        options["positions"] = arch.inputs["length"]
    return replace(arch, options=options, inputs=inputs)


def import_pretrained(
    stage: SourceStage,
    checkpoint: pretrained.PretrainedCheckpoint,
    arch: Architecture,
    modality: ModalitySpec,
    objective: ObjectiveSpec,
    uri: str,
    coverage: str,
) -> str:
    """Write the task with the checkpoint's weights as a bundle, once for all ranks and restarts.

    Returns:
        Which tensors came from the checkpoint, as a sentence with ``coverage``.
    """
    task = bundle.build_task(arch, objective, seed=stage.seed)
    backbone_note = checkpoint.load_into(task.backbone).text()
    head_note = checkpoint.load_head_into(task)
    transfer_note = "; ".join(filter(None, (backbone_note, head_note, coverage)))
    stage.check_checkpoint()  # its file is mapped: only now has all of it been read
    bundle.save(
        uri,
        task,
        modality,
        parent=checkpoint.origin,
        training={
            "transfer": transfer_note,
            "names_taken_over": sorted(task.objective.names_taken_over),
        },
        spec_hash=stage.key,
        metrics={},
    )
    return transfer_note
