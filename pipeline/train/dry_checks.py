"""What a run would make of a source and what it would refuse, found from a sample of the rows: for
``--dry-run``. Nothing is written or trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import beta

from pipeline.checkpoints import bundle, pretrained
from pipeline.config import registry
from pipeline.config.schema import CHECKPOINT_PREFIXES, HUBS
from pipeline.core.contracts import Modality, Objective, Task
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection, Splits
from pipeline.data.stream import Decoder, check_bad_row_budget
from pipeline.io import file_identity, storage
from pipeline.train import fit
from pipeline.train import source as train_source
from pipeline.train.row_checks import Finding
from pipeline.train.source import SourceStage
from pipeline.train.token_rows import EMPTY

SAMPLE_ROWS, SAMPLE_BYTES = 64, 8 << 20
"""Rows of a split that are decoded, and of large rows so many that their files hold about so many
bytes.
"""
FITTED_ROWS = 1024
"""Rows that a modality is fitted on to see how it would read: a run takes more."""
CONFIDENCE = 0.99
"""A split is refused by a sample where its share of bad rows is above the budget with this
confidence (Clopper and Pearson 1934); else it is told.
"""


class PlannedSource(NamedTuple):
    """A source as a run would make it: ``arch`` and ``modality`` of its bundle; ``is_estimated``
    where the modality was fitted on fewer rows.
    """

    arch: dict[str, Any]
    modality: dict[str, Any]
    findings: list[Finding]
    is_estimated: bool = False


def source(stage: SourceStage) -> PlannedSource | None:
    """What a run would make of the source; None where that needs a model from a hub, which only a
    run fetches.

    Raises ValueError or StorageError with what the run would say: a checkpoint that cannot be read
    or does not fit, labels that are missing, rows that cannot be decoded, more tokens than the
    model has positions.
    """
    if stage.done:
        found = storage.read_json(storage.join(stage.bundle_uri, "manifest.json"))
        return PlannedSource(found["arch"], found["modality"], [])
    text = stage.spec.init or (
        stage.spec.backbone.name
        if stage.spec.backbone.name.startswith(CHECKPOINT_PREFIXES)
        else None
    )
    if text and text.partition(":")[0] in HUBS:
        return None
    start = pretrained.read(text, stage.spec.backbone.name) if text else None
    return _checkpoint(stage, start) if stage.splits is None else _corpus(stage, start)


def _checkpoint(stage: SourceStage, start: pretrained.PretrainedCheckpoint | None) -> PlannedSource:
    """A source without data, as `train_source.import_checkpoint` reads it."""
    assert start is not None
    arch, modality = train_source.checkpoint_parts(stage.spec, start, f"sources.{stage.name}")
    start.load_into(bundle.build_backbone(arch, stage.seed))
    return PlannedSource(arch, modality, [])


def _corpus(stage: SourceStage, start: pretrained.PretrainedCheckpoint | None) -> PlannedSource:
    """A source with data, as `train_source.fit` makes it ready."""
    spec, splits = stage.spec, stage.splits
    assert spec.data is not None and splits is not None and spec.objective is not None
    check_named_files(splits)
    path = storage.join(stage.uri, "modality.json")
    modality, _ = fit.fit_modality(
        spec, splits.train, start, f"sources.{stage.name}", path, most_rows=FITTED_ROWS
    )
    objective = registry.get("objective", spec.objective.name)
    options = objective.options_class(**spec.objective.options)
    columns = dict(spec.data.columns)
    state = fit.fit_objective(spec, splits)
    reads = bundle.build_modality(modality)
    arch = train_source.arch_of(spec, start, reads.inputs())
    state = train_source.bind_state(objective, state, arch)
    fitted = {"name": spec.objective.name, "options": options.model_dump(), "state": state}
    if start:
        start.load_into(bundle.build_task(arch, fitted, seed=stage.seed).backbone)
    else:
        build(arch, fitted)
    found = train_source.findings_of(stage, modality)
    decoder = Decoder(reads, spec.objective.name, state, columns)
    for name in ("train", "validation"):
        found += rows(name, getattr(splits, name), decoder, spec.data.max_bad_rows)
    found += _packed_batches(stage, decoder)
    return PlannedSource(
        arch, modality, found, is_estimated=start is None and not storage.exists(path)
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
    packed = len(decoder.modality.pack(table, decoder.columns)[0])
    about = round(packed * len(rows_to_pack) / len(part))
    if about >= batch:
        return []
    return [
        Finding(
            f"about {about:,} rows are packed from {len(rows_to_pack):,} training documents, "
            f"fewer than the {batch} of a batch: lower "
            "train.global_batch, or give more text",
            True,
        )
    ]


def build(arch: dict[str, Any], objective: dict[str, Any]) -> Task:
    """The task without memory for its weights, where the backbone can be built so. Raises
    ValueError where its parts do not fit.
    """
    try:
        with torch.device("meta"):
            return bundle.build_task(arch, objective, seed=0)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # a backbone that computes with its own weights when it is built
        return bundle.build_task(arch, objective, seed=0)


def check_named_files(splits: Splits) -> None:
    """Raise StorageError, as the reading of a row would, for the first file that a column names and
    that is not there, with how many.
    """
    missing = [file.uri for file in splits.reads if file.content == file_identity.ABSENT]
    if missing:
        more = (
            f", and {len(missing) - 1} more that are not there either" if len(missing) > 1 else ""
        )
        raise storage.StorageError(
            f"{missing[0]}: no such file, while a column of the rows names it{more}"
        )


def rows(split: str, selection: Selection, decoder: Decoder, max_bad: float) -> list[Finding]:
    """Decode a sample of a split. Raises TooManyBadRowsError where more rows are bad than a run
    allows, StorageError for a file that cannot be read.
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
        Finding(f"{description}; the first one: {selection.manifest.place(row)}: {reason}", True)
    ]


def _places(selection: Selection) -> np.ndarray:
    """Evenly spread places of the sample."""
    each = max(1, selection.manifest.size // max(1, selection.manifest.rows))
    most = min(SAMPLE_ROWS, max(1, SAMPLE_BYTES // each), len(selection))
    return np.unique(np.linspace(0, len(selection) - 1, most).astype(np.int64))


def _bad_rows(part: Selection, decoder: Decoder) -> list[str]:
    """For each row "" or why it cannot be used."""
    objective = registry.get("objective", decoder.objective) if decoder.objective else Objective
    packs = objective.packed and type(decoder.modality).pack is not Modality.pack
    table = manifests.Reader(part.manifest, decoder.names()).take(part.ids(np.arange(len(part))))
    if packs:
        return decoder.modality.pack(table, decoder.columns)[1]
    return decoder(table)[1]
