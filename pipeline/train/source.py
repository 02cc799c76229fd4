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
from pipeline.config.schema import CHECKPOINT_PREFIXES, Data, Job, Source, spec_hash
from pipeline.core.capabilities import augment_options, cost_column, is_costed
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
"""The format of a stage's key and folder. Code that makes other numbers does not raise it: what
made a bundle is recorded in it (`pipeline.config.provenance`).
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
WHERE_NOT_WHAT = {"uri", "train", "validation", "test"}
HOW_NOT_WHAT = {
    "log_every_steps",
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "trace_rows",
}


def data_key(data: Data) -> dict[str, Any]:
    """The part of a data spec that a key depends on: not where files and tokenizers lie (what they
    hold counts).
    """
    left_out = dict.fromkeys(WHERE_NOT_WHAT | {"decode", "max_bad_rows", "identity"}, True)
    out = data.model_dump(mode="json", exclude={**left_out, "more": {"__all__": left_out}})
    for one, part in ((out, data), *zip(out["more"], data.more, strict=True)):
        one["modality"]["options"] = fit_components.options_by_content("modality", part.modality)
    return out


@dataclass(frozen=True)
class SourceStage:
    """A source of a job before anything runs: its rows, its key and its folder. ``splits`` is none
    for a checkpoint.
    """

    job: Job
    name: str
    spec: Source
    splits: Splits | None
    key: str
    probe: Splits | None = None
    start: str = ""
    """What identifies the checkpoint that it starts from (`pretrained.fingerprint`), or nothing."""
    remake: bool = False
    """Whether a bundle that other code or versions made is made anew."""

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
    def checkpoint_text(self) -> str:
        """The checkpoint that the job names, or nothing."""
        return self.spec.init or (
            self.spec.backbone.name
            if self.spec.backbone.name.startswith(CHECKPOINT_PREFIXES)
            else ""
        )

    @property
    def initial_uri(self) -> str:
        """Where the task as it starts lies, once its checkpoint has been read."""
        return storage.join(self.uri, "initial")

    def check_checkpoint(self) -> None:
        """Raise ChangedFileError when the checkpoint holds something else than when the stage was
        planned.
        """
        if self.checkpoint_text and pretrained.fingerprint(self.checkpoint_text) != self.start:
            raise ChangedFileError(
                f"sources.{self.name}: {self.checkpoint_text} was changed while it was in use: it "
                "holds something else than when the run was planned; leave it alone until the run "
                "ends, and run again"
            )

    @property
    def uri(self) -> str:
        return storage.join(self.job.root, "sources", f"{self.name}-{self.key}")

    @property
    def bundle_uri(self) -> str:
        start = self.spec.backbone.name
        if self.splits is None and start.startswith("bundle:"):
            return start.partition(":")[2]
        return storage.join(self.uri, "bundle")

    @property
    def seed(self) -> int:
        return mix(self.job.seed, *self.name.encode())

    @property
    def is_given(self) -> bool:
        """Whether the job names the bundle itself: then it is what it is, whatever made it."""
        return self.splits is None and self.spec.backbone.name.startswith("bundle:")

    @property
    def has_bundle(self) -> bool:
        return bundle.exists(self.bundle_uri)

    @property
    def done(self) -> bool:
        """Whether its bundle is there, and is not to be made anew."""
        return self.has_bundle and not (self.remake and self.changes())

    def changes(self) -> tuple[str, ...]:
        """In words, how code and versions differ now from what made its bundle; empty where nothing
        does, or where there is no bundle of ours yet.
        """
        if self.is_given or not self.has_bundle:
            return ()
        manifest = bundle.read_manifest(self.bundle_uri)
        now = made_by(self.spec, manifest.arch, manifest.modality.name)
        found = provenance.changes(manifest.made, now)
        earlier = [
            provenance.from_metadata(metadata)
            for metadata in (manifest.made_by.get("begun_by", ()) if manifest.made_by else ())
        ]
        since = [provenance.changes(before, made_by(self.spec)) for before in earlier]
        return (
            *found,
            *dict.fromkeys(
                f"begun by other code or versions ({', '.join(reasons)})"
                for reasons in since
                if reasons
            ),
        )

    @property
    def packed(self) -> bool:
        return (
            self.spec.objective is not None
            and registry.get("objective", self.spec.objective.name).packed
        )


def stage(job: Job, name: str) -> SourceStage:
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
        config_checks.source(f"sources.{name}", spec)
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
    probe = online_probe.splits(
        spec,
        f"sources.{name}",
        bool(splits and len(splits.validation)),
        storage.join(job.root, "imports"),
    )
    what = spec.model_dump(
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
        del what["modality"]
    what["start"] = start = pretrained.fingerprint(spec.init) if spec.init else None
    if spec.objective is not None:
        what["objective"]["options"] = fit_components.options_by_content(
            "objective", spec.objective
        )
    # Where a checkpoint lies does not count, what it holds does
    if spec.backbone.name.startswith(CHECKPOINT_PREFIXES):
        what["backbone"]["name"] = start = pretrained.fingerprint(spec.backbone.name)
    key = spec_hash(
        STAGE_FORMAT,
        name,
        what,
        spec.train.model_dump(mode="json", exclude=HOW_NOT_WHAT),
        job.seed,
        [data_key(spec.data), splits.fingerprint, canonical_shards(spec)]
        if spec.data and splits
        else None,
        *([[data_key(spec.probe), probe.fingerprint]] if spec.probe and probe else []),
    )
    made = SourceStage(job, name, spec, splits, key, probe, start or "")
    _check_plain_network(made)
    if splits is not None and not made.packed:
        check_plan(made, splits.corpus_sizes)
    return made


def _check_plain_network(stage: SourceStage) -> None:
    """Raise ValueError where the checkpoint is a bundle with modules of a technique in it.

    Its tensors are not those of the backbone that the bundle names.
    """
    text = stage.checkpoint_text
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
    """What makes a source now.

    Args:
        arch: The backbone's architecture, where a checkpoint tells it; without it, as the job says.
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
    if stage.spec.train.batch_cost is not None:
        return
    try:
        Plan(
            sum(corpus_sizes),
            0,
            stage.spec.train.global_batch,
            shards=canonical_shards(stage.spec),
            mixture=mixture(stage.spec, corpus_sizes),
        ).owned(0, stage.spec.worker_range[1])
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
    start: str | None
    """The checkpoint that the job names."""
    initial: str | None
    """The bundle that was made of it, for the ranks to start from."""
    moved: str
    """In words, which of its tensors were carried over."""
    left_out: tuple[LeftOut, ...]
    text: str
    """In words, how many rows there are and what became of them."""
    corpus_sizes: tuple[int, ...]
    """How many of the training rows each corpus has, in their order."""
    probe: online_probe.Probe | None = None
    costs: np.ndarray | None = None
    """What each training row costs, where batches are cut by it."""
    lost: int = 0
    """Training rows that were left out before any was decoded; they count against the same budget
    as those that cannot be decoded."""
    begun_by: tuple[ProvenanceRecord, ...] = ()
    """What made earlier parts of this source, where that was other code or versions (`begin`)."""
    findings: tuple[Finding, ...] = ()
    """What was noticed in the rows before any training, for terminal and report."""


def fit(stage: SourceStage) -> FittedSource:
    """Make a source ready for its ranks: once, kept in the stage's folder.

    Modality and objective are fitted on the training rows, the checkpoint is read, texts are packed
    or tokenised, rows that cannot be trained on are left out.

    Raises:
        BundleError: the checkpoint does not fit what the job says.
        TooManyBadRowsError: more rows cannot be used than the budget allows.
    """
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None
    begun_by = begin(stage)
    arch, modality, objective, moved = _fit_network(stage)
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
        notes.append(f"{len(rows.left_out)} rows left out ({example})")
    return FittedSource(
        arch=arch,
        modality=modality,
        objective=objective,
        columns=rows.columns,
        train=rows.train,
        validation=rows.validation,
        start=stage.checkpoint_text or None,
        initial=stage.initial_uri if stage.checkpoint_text else None,
        moved=moved,
        left_out=tuple(rows.left_out),
        text="; ".join(notes),
        corpus_sizes=rows.corpus_sizes,
        probe=probe,
        costs=rows.costs,
        lost=rows.lost,
        begun_by=tuple(begun_by),
        findings=tuple(findings_of(stage, modality, limit_note)),
    )


def _fit_network(
    stage: SourceStage,
) -> tuple[Architecture, ModalitySpec, ObjectiveSpec, str]:
    """Architecture, modality and objective of the bundle, and in words what a checkpoint gave."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    start, arch, moved, coverage = None, None, "", ""
    if stage.checkpoint_text and bundle.exists(stage.initial_uri):  # an earlier try has read it
        manifest = bundle.load(stage.initial_uri).manifest
        modality, arch = manifest.modality, manifest.arch
        moved = manifest.training["transfer"]
    else:
        if stage.checkpoint_text:
            start = pretrained.read(stage.checkpoint_text, spec.backbone.name, spec.modality_name)
        path = storage.join(stage.uri, "modality.json")
        place = f"sources.{stage.name}"
        modality, coverage = fit_components.fit_modality(spec, splits.train, start, place, path)
    state = fit_components.fit_objective(spec, splits)
    if arch is None:
        arch = arch_of(spec, start, bundle.build_modality(modality).inputs())
    state = bind_state(objective, state, arch)
    described = ObjectiveSpec(spec.objective.name, options.model_dump(), state)
    if start is not None:
        stage.check_checkpoint()
        moved = import_pretrained(
            stage, start, arch, modality, described, stage.initial_uri, coverage
        )
    return arch, modality, described, moved


@dataclass
class _Rows:
    """The rows of a source on their way to training."""

    train: Selection
    validation: Selection
    columns: dict[str, str]
    corpus_sizes: tuple[int, ...]
    left_out: list[LeftOut]
    notes: list[str]
    costs: np.ndarray | None = None
    lost: int = 0


def _fit_rows(stage: SourceStage, modality: ModalitySpec, objective: ObjectiveSpec) -> _Rows:
    """Pack or tokenise texts, then leave out the rows that cannot be trained on."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None
    kind, columns = registry.get("objective", objective.name), dict(spec.data.columns)
    left_out = list(splits.left_out)
    lost = sum(row.split == "train" for row in splits.left_out)
    rows = _Rows(
        splits.train, splits.validation, columns, splits.corpus_sizes, left_out, [], lost=lost
    )
    roles = (*kind.roles, *kind.optional_roles)
    labels = tuple(columns[role] for role in roles if role in columns)
    form = token_rows.form_of(kind, modality, rows.train, columns)
    if form:
        _tokenise(stage, rows, token_rows.TextWork(modality, columns, form, labels))
    reads = bundle.build_modality(modality)
    decoder = Decoder(reads, objective.name, objective.state, rows.columns)
    if spec.train.batch_cost is not None or checks_labels_before_decoding(
        kind, reads, rows.columns
    ):
        _leave_out_untrainable(spec, rows, decoder)
    return rows


def _tokenise(stage: SourceStage, rows: _Rows, work: token_rows.TextWork) -> None:
    """Replace the rows by rows of tokens."""
    assert stage.spec.data is not None
    budget = stage.spec.data.max_bad_rows
    folder = storage.join(stage.uri, "tokens")
    train = token_rows.make(
        storage.join(folder, "train"), "train", rows.train, work, budget, rows.corpus_sizes
    )
    validation = token_rows.make(
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
    """Drop training rows that can be scored but not learned from; note what the others cost."""
    assert spec.data is not None
    costed = Rows(rows.train, decoder).with_costs()
    kept, lost = drop_untrainable(costed, spec.data.max_bad_rows)
    place = rows.train.manifest.location
    rows.left_out += [LeftOut("train", row, place(row), reason) for row, reason in lost]
    is_lost = np.isin(rows.train.ids(np.arange(len(rows.train))), [row for row, _ in lost])
    by_corpus = np.split(is_lost, np.cumsum(rows.corpus_sizes)[:-1])
    rows.corpus_sizes = tuple(len(part) - int(part.sum()) for part in by_corpus)
    rows.train, rows.lost = kept.selection, rows.lost + len(lost)
    if spec.train.batch_cost is not None:
        rows.costs = kept.costs


def _mixture_notes(spec: Source, corpus_sizes: tuple[int, ...]) -> list[str]:
    """In words, how often each corpus is drawn from, where corpora have weights."""
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
    """What a sample of a source's rows shows: texts that are cut, missing labels, unknown names.

    Args:
        limit_note: What `bundle.limit_modality` lowered, as a sentence, or an empty string.
    """
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    objective, columns = registry.get("objective", spec.objective.name), spec.data.columns
    rows = {"train": splits.train, "validation": splits.validation}
    found = [Finding(limit_note)] if limit_note else []
    if not len(splits.validation) and (reason := splits.empty_draws.get("validation")):
        text = (
            f"no validation row was drawn ({reason}), so no checkpoint is chosen by validation: "
            "give validation files, a split_column or another split_seed"
        )
        found.append(Finding(text, is_warning=True))
    text_modality = bundle.build_modality(modality)
    found += row_checks.text_findings(text_modality, rows, columns, objective.packed)
    found += row_checks.null_labels(objective, rows, columns)
    found += _unread_augmentation(spec.data, spec.objective.name)
    if stage.checkpoint_text:  # its modality was fitted on other rows
        found += row_checks.unshared_names(modality, objective, splits.train, columns)
    return found


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
    """Whether rows that can be scored but not learned from (`LengthBound`) are
    found before any is decoded: where a column tells how long they are. Else only batches that are
    cut by it are worth a look into every file.
    """
    return bounds_length(objective) and cost_column(modality, columns) is not None


def drop_untrainable(rows: Rows, max_bad: float) -> tuple[Rows, list[tuple[int, str]]]:
    """Leave out rows that are too short to train on (`LengthBound`), before any is decoded.

    Columns of lengths may be rounded, even to whole seconds. Each row is first judged by the
    shortest length that its column allows; of those that fail, the headers of the files are read.
    Segments are exactly as long as their column `seconds` says.

    Args:
        rows: Training rows with their costs.
        max_bad: Share of the rows that may be left out.

    Returns:
        The rows that are kept, and (row id, reason) of the others.

    Raises:
        TooManyBadRowsError: More rows than ``max_bad`` are too short.
    """
    decoder, ids, costs = rows.decoder, rows.selection.ids(np.arange(len(rows))), rows.costs
    objective = registry.get("objective", str(decoder.objective))
    roles: tuple[str, ...] = objective.roles
    if not bounds_length(objective) or not len(rows):
        return rows, []
    assert costs is not None and is_costed(decoder.modality)
    cost_role = decoder.modality.cost_role
    table = manifests.read_columns(
        rows.selection,
        [decoder.columns[role] for role in roles if role in decoder.columns],
    )
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
    check_bad_row_budget(bad, len(rows), max_bad, rows.selection)
    return rows.subset(np.flatnonzero(reasons == "")), bad


def bind_state(objective: type[Objective], state: State, arch: Architecture) -> State:
    """What an objective learned, with what it must know of the backbone (`BindsToBackbone`). Raises
    ValueError where that is not for it.
    """
    if not binds_to_backbone(objective):
        return state
    with torch.device("meta"):
        return objective.bind_to_backbone(state, bundle.build_backbone(arch, seed=0))


def arch_of(
    spec: Source, start: pretrained.PretrainedCheckpoint | None, inputs: Inputs
) -> Architecture:
    """Return the architecture that the job names, or the checkpoint's.

    Raises BundleError where the two contradict each other.
    """
    if start is None or start.arch is None:
        return Architecture(spec.backbone.name, dict(spec.backbone.options), inputs)
    given = dict(spec.backbone.options)
    if (
        not spec.backbone.name.startswith(CHECKPOINT_PREFIXES)
        and pretrained.strip_weights_tag(spec.backbone.name) != start.arch.name
    ):
        raise BundleError(
            f"{start.origin} holds a {start.arch.name}, the job says {spec.backbone.name}: "
            "name the same backbone"
        )
    fixed = [name for name in given if "config" in start.arch.options and name != "pool"]
    if fixed:
        raise BundleError(
            f"backbone options {', '.join(fixed)}: the configuration of {start.origin} decides "
            "them; leave them out"
        )
    return adapt_arch_to_inputs(
        replace(start.arch, options={**start.arch.options, **given}),
        {**start.arch.inputs, **inputs},
    )


def checkpoint_parts(
    spec: Source, start: pretrained.PretrainedCheckpoint, place: str
) -> tuple[Architecture, ModalitySpec]:
    """Arch and modality of a source without data: what its checkpoint tells, else timm's own, with
    what the job states of its rows.

    Args:
        place: the source in the job file, for errors.

    Raises BundleError where the job contradicts the checkpoint, and for options that do not go
    together.
    """
    if start.arch is None or start.modality is None:
        arch, modality = pretrained.timm_input_spec(spec.backbone.name, dict(spec.backbone.options))
    else:
        arch, modality = arch_of(spec, start, {}), start.modality
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
    start: pretrained.PretrainedCheckpoint,
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
    moved = "; ".join(
        filter(None, (start.load_into(task.backbone).text(), start.load_head_into(task), coverage))
    )
    stage.check_checkpoint()  # its file is mapped: only now has all of it been read
    bundle.save(
        uri,
        task,
        modality,
        parent=start.origin,
        training={"transfer": moved},
        spec_hash=stage.key,
        metrics={},
    )
    return moved
