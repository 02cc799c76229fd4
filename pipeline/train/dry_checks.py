"""Check a source for ``--dry-run`` from a sample of its rows.

Returned is what a run would build; raised are the errors that it would end with.

Nothing is written or trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.stats import beta

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
"""Rows of the sample of a split; fewer where rows are large, about so many bytes in Parquet."""
FITTED_ROWS = 1024
"""Rows that a modality is fitted on; a run takes more."""
CONFIDENCE = 0.99
"""A sample is an error where the split's share of bad rows is over the budget with this confidence
(Clopper and Pearson 1934); else it is a warning.
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
    """Whether the modality was fitted on fewer rows than a run takes."""
    workload: Workload | None = None
    """What is trained; None: nothing."""


def source(stage: SourceStage) -> PlannedSource | None:
    """Find what a run would make of the source; None where that needs a model from a hub.

    Raises:
        ValueError: the run would end with this error: a checkpoint does not fit, labels are
            missing, rows cannot be decoded, rows have more tokens than the model has positions.
        StorageError: a file or checkpoint cannot be read.
    """
    if stage.done:
        found = bundle.read_manifest(stage.bundle_uri)
        return PlannedSource(found.arch, found.modality, [])
    text = stage.checkpoint_text
    if text and text.partition(":")[0] in HUBS:
        return None
    spec = stage.spec
    start = (
        pretrained.read(text, spec.backbone.name, spec.modality_name, names_only=True)
        if text
        else None
    )
    return _checkpoint(stage, start) if stage.splits is None else _corpus(stage, start)


def _checkpoint(stage: SourceStage, start: pretrained.PretrainedCheckpoint | None) -> PlannedSource:
    """A source without data, as `pretrain.import_checkpoint` reads it."""
    assert start is not None
    arch, modality = train_source.checkpoint_parts(stage.spec, start, f"sources.{stage.name}")
    _check_fit(start, build_backbone(arch))
    return PlannedSource(arch, modality, [])


def _check_fit(start: pretrained.PretrainedCheckpoint, backbone: Backbone) -> None:
    """Raise BundleError where the checkpoint does not fit, from names and shapes alone.

    Its values are not read where the backbone is on the meta device.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        start.load_into(backbone)


def _corpus(stage: SourceStage, start: pretrained.PretrainedCheckpoint | None) -> PlannedSource:
    """A source with data, as `train_source.fit` makes it ready."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    check_named_files(splits)
    path = storage.join(stage.uri, "modality.json")
    modality, _ = fit_components.fit_modality(
        spec, splits.train, start, f"sources.{stage.name}", path, most_rows=FITTED_ROWS
    )
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    columns = dict(spec.data.columns)
    state = fit_components.fit_objective(spec, splits)
    arch = train_source.arch_of(spec, start, bundle.build_modality(modality).inputs())
    modality, limit_note = bundle.limit_modality(modality, arch)
    reads = bundle.build_modality(modality)
    state = train_source.bind_state(objective, state, arch)
    fitted = ObjectiveSpec(spec.objective.name, options.model_dump(), state)
    task = build(arch, fitted)
    if start:
        _check_fit(start, task.backbone)
    found = train_source.findings_of(stage, modality, limit_note)
    decoder = Decoder(reads, spec.objective.name, state, columns)
    for name in ("train", "validation"):
        found += rows(name, getattr(splits, name), decoder, spec.data.max_bad_rows)
    found += _packed_batches(stage, decoder)
    return PlannedSource(
        arch,
        modality,
        found,
        is_estimated=start is None and not storage.exists(path),
        workload=Workload(arch, fitted, decoder, splits.train, stage.packed),
    )


def _packed_batches(stage: SourceStage, decoder: Decoder) -> list[Finding]:
    """A warning where the documents will probably be packed into fewer rows than a batch takes: the
    run then refuses them.
    """
    assert stage.splits is not None
    rows_to_pack, batch = stage.splits.train, stage.spec.train.global_batch
    if not stage.packed or stage.spec.train.batch_cost is not None or not len(rows_to_pack):
        return []
    part = Selection(rows_to_pack.manifest, rows_to_pack.ids(_places(rows_to_pack)))
    table = manifests.Reader(part.manifest, decoder.names()).take(part.ids(np.arange(len(part))))
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


def build(arch: Architecture, objective: ObjectiveSpec) -> Task:
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


def rows(split: str, selection: Selection, decoder: Decoder, max_bad: float) -> list[Finding]:
    """Decode a sample of a split.

    Raises:
        TooManyBadRowsError: more rows are bad than a run allows.
        StorageError: a file cannot be read.
    """
    if not len(selection):
        return []
    places = _places(selection)
    part = Selection(selection.manifest, selection.ids(places))
    reasons = _bad_rows(part, replace(decoder, training=split == "train"))
    bad = [
        (int(row), reason)
        for row, reason in zip(part.ids(np.arange(len(part))), reasons, strict=True)
        if reason and reason != EMPTY
    ]
    is_whole = len(part) == len(selection)
    surely_bad = float(beta.ppf(1 - CONFIDENCE, len(bad), len(part) - len(bad) + 1)) if bad else 0.0
    if is_whole or surely_bad > max_bad:
        try:
            check_bad_row_budget(bad, len(part), max_bad, part)
        except ValueError as error:
            sampled = "" if is_whole else f" (of a sample of the {len(selection)})"
            raise type(error)(f"{split} split: {error}{sampled}") from None
    if not bad:
        return []
    row, reason = bad[0]
    description = f"{len(bad)} of {len(part)} {split} rows that were looked at cannot be used"
    return [
        Finding(f"{description}; the first one: {selection.manifest.location(row)}: {reason}", True)
    ]


def _places(selection: Selection) -> np.ndarray:
    """Evenly spread indices of the rows of the sample."""
    each = max(1, selection.manifest.num_bytes // max(1, selection.manifest.num_rows))
    return evenly_spread(len(selection), min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // each)))


def _bad_rows(part: Selection, decoder: Decoder) -> list[str]:
    """For each row an empty string, or why it cannot be used."""
    objective = registry.get("objective", decoder.objective) if decoder.objective else Objective
    table = manifests.Reader(part.manifest, decoder.names()).take(part.ids(np.arange(len(part))))
    if objective.packed and can_pack(decoder.modality):
        return decoder.modality.pack(table, decoder.columns)[1]
    return decoder(table)[1]
