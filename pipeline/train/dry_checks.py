"""What a run would build of a source, for ``--dry-run``, and its errors in a sample of rows.

Nothing is written or trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from scipy import special

from pipeline.checkpoints import bundle, pretrained
from pipeline.config import registry
from pipeline.config.schema import HUBS
from pipeline.core.capabilities import can_pack
from pipeline.core.contracts import Backbone, Objective, Task
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection, Splits
from pipeline.data.stream import Decoder, check_bad_row_budget
from pipeline.io import file_identity, storage
from pipeline.train import fit_components
from pipeline.train import source as train_source
from pipeline.train.row_checks import Finding
from pipeline.train.source import SourceStage
from pipeline.train.token_rows import EMPTY

SAMPLE_ROWS, SAMPLE_BYTES = 64, 8 << 20
"""Rows of the sample of a split; fewer where they take more bytes in Parquet, uncompressed."""
FITTED_ROWS = 1024
"""Rows that a modality is fitted on; a run uses more."""
CONFIDENCE = 0.99
"""Bad rows in a sample are an error where their share of the split is over the budget with this
confidence (Clopper and Pearson 1934); else they are a warning.
"""


class Workload(NamedTuple):
    """A network and the rows that it is trained on, as a run would have them."""

    arch: Architecture
    objective: ObjectiveSpec
    decoder: Decoder
    rows: Selection
    is_packed: bool = False
    """Whether the rows are documents, to be packed into rows of tokens."""

    def decoder_of(self, columns: dict[str, str]) -> Decoder:
        """Return the decoder of rows with other columns."""
        return replace(self.decoder, columns=columns)


class PlannedSource(NamedTuple):
    """Architecture and modality that the bundle of a source would have."""

    arch: Architecture
    modality: ModalitySpec
    findings: list[Finding]
    is_estimated: bool = False
    """Whether the modality was fitted on fewer rows than in a run."""
    workload: Workload | None = None
    """What is trained; None: nothing."""


def plan_without_training(stage: SourceStage) -> PlannedSource | None:
    """Return what a run would build of the source; None where that needs a model from a hub.

    Raises:
        ValueError: The run would end with this error: a checkpoint does not fit, labels are
            missing, rows cannot be decoded, rows have more tokens than the model has positions.
        StorageError: A file or checkpoint cannot be read.
    """
    if stage.done:
        manifest = bundle.read_manifest(stage.bundle_uri)
        return PlannedSource(manifest.arch, manifest.modality, [])
    spec, name = stage.spec, stage.checkpoint_name
    if name and name.partition(":")[0] in HUBS:
        return None
    checkpoint = None
    if name:
        checkpoint = pretrained.read(name, spec.backbone.name, spec.modality_name, names_only=True)
    if stage.splits is None:
        assert checkpoint is not None
        arch, modality = train_source.checkpoint_parts(spec, checkpoint, f"sources.{stage.name}")
        _check_fit(checkpoint, build_backbone(arch))
        return PlannedSource(arch, modality, [])
    return _plan_corpus(stage, checkpoint)


def _check_fit(checkpoint: pretrained.PretrainedCheckpoint, backbone: Backbone) -> None:
    """Raise BundleError where the checkpoint does not fit, from names and shapes alone.

    Its values are not read where the backbone is on the meta device.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        checkpoint.load_into(backbone)


def _plan_corpus(
    stage: SourceStage, checkpoint: pretrained.PretrainedCheckpoint | None
) -> PlannedSource:
    """Plan a source with data, as `train_source.prepare_source` prepares it."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    check_named_files(splits)
    path = storage.join(stage.uri, "modality.json")
    modality, _ = fit_components.fit_modality(
        spec, splits.train, checkpoint, f"sources.{stage.name}", path, most_rows=FITTED_ROWS
    )
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    columns = dict(spec.data.columns)
    state = fit_components.fit_objective(spec, splits)
    arch = train_source.arch_of(spec, checkpoint, bundle.build_modality(modality).inputs())
    modality, limit_note = bundle.limit_modality(modality, arch)
    state = train_source.bind_state(objective, state, arch)
    train_source.check_labels_for_backbone(spec, splits, state)
    objective_spec = ObjectiveSpec(spec.objective.name, options.model_dump(), state)
    task = build_task(arch, objective_spec)
    if checkpoint:
        _check_fit(checkpoint, task.backbone)
    findings = train_source.findings_of(stage, modality, limit_note)
    decoder = Decoder(bundle.build_modality(modality), spec.objective.name, state, columns)
    for name in ("train", "validation"):
        findings += check_sample(name, getattr(splits, name), decoder, spec.data.max_bad_rows)
    findings += _packed_batches(stage, decoder)
    return PlannedSource(
        arch,
        modality,
        findings,
        is_estimated=checkpoint is None and not storage.exists(path),
        workload=Workload(arch, objective_spec, decoder, splits.train, stage.packed),
    )


def _packed_batches(stage: SourceStage, decoder: Decoder) -> list[Finding]:
    """Warn where the packed documents will probably be fewer rows than a batch has.

    The run then refuses them.
    """
    assert stage.splits is not None
    rows_to_pack, batch = stage.splits.train, stage.spec.train.global_batch
    if not stage.packed or stage.spec.train.batch_cost is not None or not len(rows_to_pack):
        return []
    part = _sampled(rows_to_pack)
    table = manifests.Reader(part.manifest, decoder.column_names()).take(part.all_ids)
    assert can_pack(decoder.modality)
    packed = len(decoder.modality.pack(table, decoder.columns)[0])
    about = round(packed * len(rows_to_pack) / len(part))
    if about >= batch:
        return []
    return [
        Finding(
            f"about {about:,} rows are packed from {len(rows_to_pack):,} training documents, "
            f"fewer than the {batch} of a batch: lower train.global_batch, or give more text",
            True,
        )
    ]


def build_task(arch: Architecture, objective: ObjectiveSpec) -> Task:
    """Build the task, on the meta device where the backbone allows it.

    Raises:
        ValueError: backbone and objective do not fit together.
    """
    return _on_meta(partial(bundle.build_task, arch, objective, seed=0))


def build_backbone(arch: Architecture) -> Backbone:
    """Build a backbone, on the meta device (names and shapes alone) where it allows that."""
    return _on_meta(partial(bundle.build_backbone, arch, seed=0))


Built = TypeVar("Built")


def _on_meta(make: Callable[[], Built]) -> Built:
    try:
        with torch.device("meta"):
            return make()
    except (NotImplementedError, RuntimeError, TypeError):
        # some backbones compute with their new weights
        return make()


def check_named_files(splits: Splits) -> None:
    """Raise StorageError where files that a column names do not exist."""
    missing = [file.uri for file in splits.reads if file.content == file_identity.ABSENT]
    if missing:
        others = len(missing) - 1
        more = f", and {others} more that are not there either" if others else ""
        raise storage.StorageError(
            f"{missing[0]}: no such file, while a column of the rows names it{more}"
        )


def check_sample(
    split: str, selection: Selection, decoder: Decoder, max_bad: float
) -> list[Finding]:
    """Decode a sample of a split, and return a warning where some of its rows are bad.

    Raises:
        TooManyBadRowsError: More rows are bad than a run allows.
        StorageError: A file cannot be read.
    """
    if not len(selection):
        return []
    part = _sampled(selection)
    reasons = _bad_row_reasons(part, replace(decoder, training=split == "train"))
    bad = [
        (int(row), reason)
        for row, reason in zip(part.all_ids, reasons, strict=True)
        if reason and reason != EMPTY
    ]
    is_whole = len(part) == len(selection)
    # lower bound of the share of bad rows in the split
    lowest_share = 0.0
    if bad:
        num_good = len(part) - len(bad)
        lowest_share = float(special.betaincinv(len(bad), num_good + 1, 1 - CONFIDENCE))
    if is_whole or lowest_share > max_bad:
        try:
            check_bad_row_budget(bad, len(part), max_bad, part)
        except ValueError as error:
            sampled = "" if is_whole else f" (of a sample of the {len(selection)})"
            raise type(error)(f"{split} split: {error}{sampled}") from None
    if not bad:
        return []
    row, reason = bad[0]
    description = f"{len(bad)} of {len(part)} {split} rows of a sample cannot be used"
    return [
        Finding(f"{description}; the first one: {selection.manifest.location(row)}: {reason}", True)
    ]


def _sampled(selection: Selection) -> Selection:
    """Return a sample of the rows, evenly spread."""
    manifest = selection.manifest
    bytes_per_row = max(1, manifest.num_bytes // max(1, manifest.num_rows))
    rows = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // bytes_per_row))
    return Selection(manifest, selection.ids(evenly_spread(len(selection), rows)))


def _bad_row_reasons(part: Selection, decoder: Decoder) -> list[str]:
    """Return for each row why it cannot be used, or ""."""
    objective = registry.get("objective", decoder.objective) if decoder.objective else Objective
    table = manifests.Reader(part.manifest, decoder.column_names()).take(part.all_ids)
    if objective.packed and can_pack(decoder.modality):
        return decoder.modality.pack(table, decoder.columns)[1]
    return decoder(table)[1]
