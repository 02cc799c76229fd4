"""Turn the texts of a split into rows of tokens, once.

Documents for language models are packed, other texts are tokenised row by row. Ray tasks of some
thousand texts each write the rows as Parquet in a folder of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.checkpoints import bundle
from pipeline.core.capabilities import can_pack, columns_of
from pipeline.core.contracts import Objective
from pipeline.core.specs import ModalitySpec
from pipeline.data import manifests
from pipeline.data.manifests import LeftOut, Selection
from pipeline.data.stream import check_bad_row_budget, map_items
from pipeline.io import atomic_folder, checksums, s3, storage
from pipeline.train import fit_components

TASK_ROWS = 8192
"""Most texts of one task."""
TASK_BYTES = 16 << 20
"""About the most bytes of the texts of one task, in Parquet, uncompressed."""
PACKED = {name: name for name in ("tokens", "segments", "bytes")}
"""Columns of packed rows, by role."""
EMPTY = "the text is empty"
"""Why a text without a word is left out; it does not count against the budget of bad rows."""


@dataclass(frozen=True)
class TextWork:
    """How rows of tokens are made from texts; it can be sent to a Ray task."""

    modality: ModalitySpec
    columns: dict[str, str]
    """The column of each role, in the rows of texts."""
    form: str
    """"packed", "tokenised", or an empty string where rows stay as they are."""
    kept: tuple[str, ...]
    """Columns that stay beside the tokens."""

    @property
    def output_columns(self) -> dict[str, str]:
        """The column of each role, in the rows of tokens."""
        if self.form == "packed":
            return dict(PACKED)
        kept = {role: name for role, name in self.columns.items() if name in self.kept}
        return {**kept, "tokens": "tokens"}


@dataclass(frozen=True)
class TokenRows:
    """The rows of tokens of a split."""

    rows: Selection
    corpus_sizes: tuple[int, ...]
    """Number of rows of each corpus."""
    left_out: tuple[LeftOut, ...]
    """Texts that were left out."""


def row_form(
    objective: type[Objective],
    modality: ModalitySpec,
    rows: Selection,
    columns: dict[str, str],
) -> str:
    """Return the form (`TextWork.form`) of the rows that the objective reads.

    Rows are tokenised where the modality tokenises the first one.
    """
    if objective.packed:
        return "packed"
    built = bundle.build_modality(modality)
    if not can_pack(built) or not len(rows):
        return ""
    names = fit_components.fitted_columns(type(built), objective, columns)
    tokenised = built.tokenize(fit_components.sample(rows, names, 1), columns)
    return "" if tokenised is None else "tokenised"


def make_token_rows(
    folder: str,
    split: str,
    selection: Selection,
    work: TextWork,
    max_bad_rows: float,
    corpus_sizes: tuple[int, ...],
) -> TokenRows:
    """Pack or tokenise a split into a folder of its own; a second call reads that folder.

    Args:
        corpus_sizes: Number of the selection's rows in each corpus; no packed row has texts of two.

    Raises:
        TooManyBadRowsError: More texts than the budget allows cannot be read.
    """
    if checksums.intact_folder(folder, "these rows are made again") is None:
        _write(folder, split, selection, work, max_bad_rows, corpus_sizes)
    metadata = atomic_folder.open_folder(folder)
    left_out = metadata["left_out"]
    # the budget may have changed since they were written
    _check_budget([(row["row"], row["reason"]) for row in left_out], selection, max_bad_rows)
    files = [storage.join(folder, name) for name in sorted(metadata["files"])]
    rows = Selection(manifests.build(files, "parquet", "")) if files else selection
    return TokenRows(
        rows, tuple(metadata["corpora"]), tuple(LeftOut(split, **row) for row in left_out)
    )


def _write(
    folder: str,
    split: str,
    selection: Selection,
    work: TextWork,
    max_bad_rows: float,
    corpus_sizes: tuple[int, ...],
) -> None:
    """Pack or tokenise the texts in Ray tasks, and commit the folder."""
    tasks = task_ranges(selection, corpus_sizes)
    run_task = partial(_make_rows, selection, work)
    results = map_items(run_task, tasks) if len(tasks) > 1 else map(run_task, tasks)
    bad: list[tuple[int, str]] = []
    counts = [0] * len(corpus_sizes)
    with storage.scratch_folder() as scratch:
        files: dict[str, Path] = {}
        for number, (corpus, table, reasons) in enumerate(results):
            bad += reasons
            counts[corpus] += len(table)
            name = f"part-{number:05d}.parquet"
            files[name] = Path(scratch, name)
            with s3.naming("write", files[name]):
                pq.write_table(table, files[name], row_group_size=4096)
        _check_budget(bad, selection, max_bad_rows)
        location = selection.manifest.location
        left_out = [{"row": row, "place": location(row), "reason": why} for row, why in bad]
        metadata = {
            "split": split,
            "documents": len(selection),
            "corpora": counts,
            "left_out": left_out,
        }
        atomic_folder.commit_folder(folder, files, metadata)


def _check_budget(
    bad: Iterable[tuple[int, str]], selection: Selection, max_bad_rows: float
) -> None:
    """Raise TooManyBadRowsError where too many texts cannot be read; empty texts do not count."""
    unreadable = [(row, reason) for row, reason in bad if reason != EMPTY]
    check_bad_row_budget(unreadable, len(selection), max_bad_rows, selection)


class TextRange(NamedTuple):
    """The texts of one task, all of one corpus."""

    corpus: int
    start: int
    """Index of the first text in the selection."""
    stop: int
    """Index after the last one."""


def _make_rows(
    selection: Selection, work: TextWork, texts: TextRange
) -> tuple[int, pa.Table, list[tuple[int, str]]]:
    """Pack or tokenise some texts of one corpus, in a Ray task.

    Returns:
        The corpus, rows of tokens, and (row, reason) of each text that is left out.
    """
    modality = bundle.build_modality(work.modality)
    assert can_pack(modality)
    roles = (*modality.roles, *modality.optional_roles)
    read = columns_of(roles, work.columns)
    ids = selection.ids(np.arange(texts.start, texts.stop))
    columns = list(dict.fromkeys([*read, *work.kept]))
    table = manifests.Reader(selection.manifest, columns).take(ids)
    make_rows = modality.pack if work.form == "packed" else modality.tokenize
    result = make_rows(table, work.columns)
    assert result is not None
    rows, reasons = result
    bad = [(int(row), why) for row, why in zip(ids, reasons, strict=True) if why]
    return texts.corpus, rows, bad


def task_ranges(selection: Selection, corpus_sizes: tuple[int, ...]) -> list[TextRange]:
    """Return the texts of each task.

    They depend on the files alone and not on the cluster, since a packed row has texts of one task.
    """
    row_groups = selection.manifest.row_groups
    bytes_per_row = np.array([group.num_bytes / group.num_rows for group in row_groups])
    out: list[TextRange] = []
    start = 0
    for corpus, count in enumerate(corpus_sizes):
        end = start + count
        while start < end:
            stop = min(start + TASK_ROWS, end)
            ids = selection.ids(np.arange(start, stop))
            group_of = np.searchsorted(selection.manifest.starts, ids, side="right") - 1
            total_bytes = np.cumsum(bytes_per_row[group_of])
            num_tasks = int(-(-total_bytes[-1] // TASK_BYTES)) or 1
            shares = total_bytes[-1] * np.arange(1, num_tasks) / num_tasks
            last_place = len(total_bytes) - 1
            cuts = np.unique(np.searchsorted(total_bytes, shares) + 1).clip(max=last_place)
            edges = [start, *(start + cuts).tolist(), stop]
            out += [
                TextRange(corpus, first, last) for first, last in pairwise(edges) if first < last
            ]
            start = stop
    return out
