"""Rows of a manifest to arrays: what a data worker, wherever it runs, does with one item of a
plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import registry
from pipeline.core.capabilities import can_pack, cost_column, decodes_on_device, is_costed
from pipeline.core.contracts import Arrays, Modality
from pipeline.core.contracts.objective_capabilities import (
    invalid_label_reasons,
    untrainable_reasons,
)
from pipeline.core.ragged import num_bytes, ragged
from pipeline.core.sampling import evenly_spread
from pipeline.core.specs import State
from pipeline.data.length_buckets import BucketPlan
from pipeline.data.manifests import READER_BYTES, Reader, Selection
from pipeline.data.plan import Item, Plan


@dataclass
class Decoder:
    """Decodes table rows to arrays: the modality's inputs and the objective's targets."""

    modality: Modality
    objective: str | None
    objective_state: State
    columns: dict[str, str]
    encoded: bool = False
    """Inputs stay encoded, to be decoded on the device."""
    training: bool = True
    """Rows are for training: those that can only be scored are left out."""
    relabel: Callable[[Arrays], Arrays] | None = None
    """Turns what the objective encodes into another data set's label numbers; can be pickled."""

    def names(self, roles: tuple[str, ...] | None = None) -> list[str]:
        """Return the columns of all roles, or of the given ones."""
        objective = registry.get("objective", self.objective) if self.objective else None
        packed = self.modality.packed_roles if can_pack(self.modality) else ()
        inputs = (*self.modality.roles, *self.modality.optional_roles, *packed)
        roles = (
            (*inputs, *((*objective.roles, *objective.optional_roles) if objective else ()))
            if roles is None
            else roles
        )
        return list(dict.fromkeys(self.columns[role] for role in roles if role in self.columns))

    def size(self, selection: Selection) -> int:
        """Estimate the bytes of the decoded selection from a few of its rows."""
        indices = evenly_spread(len(selection), 8)
        if not len(indices):
            return 0
        arrays, _ = self(Reader(selection.manifest, self.names()).take(selection.ids(indices)))
        return int(sum(map(num_bytes, arrays.values())) / len(indices) * len(selection))

    def __call__(self, table) -> tuple[Arrays, list[str]]:
        if self.encoded:
            assert decodes_on_device(self.modality)
            files, bad = self.modality.encoded(table, self.columns)
            arrays = {"encoded": files}
        else:
            arrays, bad = self.modality.decode(table, self.columns)
        if self.objective:
            objective = registry.get("objective", self.objective)
            labels = objective.encode(table, self.columns, self.objective_state)
            arrays = arrays | (self.relabel(labels) if self.relabel else labels)
            of_rows = (table, self.columns, self.objective_state)
            reasons = [bad, invalid_label_reasons(objective, *of_rows)]
            if self.training:
                reasons.append(untrainable_reasons(objective, *of_rows, arrays))
            bad = [next(filter(None, of_row), "") for of_row in zip(*reasons, strict=True)]
        return arrays, bad


WINDOWS_BYTES = 512 << 20
"""Least cache of row groups where batches take their rows from all of a window;
`BucketPlan.held_rows` may need more.
"""
RAGGED = "_ragged:"
SILENT_ROWS = 256
"""Rows whose headers are read at once."""


def row_bytes(selection: Selection) -> int:
    """Return the bytes that a reader holds for each row of a selection: those of its row groups,
    over the number of rows.
    """
    manifest = selection.manifest
    starts = manifest.starts
    if selection.row_ids is not None:
        starts = np.searchsorted(selection.row_ids, starts)
    numbers = np.flatnonzero(np.diff(starts)).tolist()
    num_bytes = sum(manifest.row_groups[number].num_bytes for number in numbers)
    return num_bytes // max(1, len(selection))


def _is_ragged(array: np.ndarray) -> bool:
    return array.dtype == object and bool(len(array)) and isinstance(array[0], np.ndarray)


class Block(NamedTuple):
    rows: np.ndarray
    epochs: np.ndarray
    arrays: Arrays
    bad: list[str]


class Loader:
    """Reads and decodes items; it is created again in each process that it is sent to."""

    def __init__(self, selection: Selection, decoder: Decoder, plan: Plan | None = None):
        self.selection, self.decoder, self.plan = selection, decoder, plan
        self._reader: Reader | None = None
        self._lock = threading.Lock()

    def __getstate__(self):
        return (self.selection, self.decoder, self.plan)

    def __setstate__(self, state):
        self.__init__(*state)

    def __call__(self, item: Item) -> Block:
        if item.shard < 0:  # a plain range, for evaluation
            indices = np.arange(item.start, item.stop)
            epochs = np.zeros(item.stop - item.start, dtype=np.int64)
        else:
            assert self.plan is not None
            indices, epochs = self.plan.sequence(item.shard, item.start, item.stop)
        rows = self.selection.ids(indices)
        with self._lock:
            self._reader = self._reader or Reader(
                self.selection.manifest, self.decoder.names(), self._kept()
            )
            table = self._reader.take(rows)
        arrays, bad = self.decoder(table)
        return Block(rows, epochs, arrays, bad)

    def _kept(self) -> int:
        return (
            max(WINDOWS_BYTES, self.plan.held_rows * row_bytes(self.selection))
            if isinstance(self.plan, BucketPlan)
            else READER_BYTES
        )

    def columns(self, item: Item) -> Arrays:
        """Return the block as one set of columns, to be sent through the object store.

        Ray Data would make one array of ragged rows that happen to be of equal length; the names of
        those columns tell them apart.
        """
        block = self(item)
        named = {
            f"{RAGGED}{name}" if _is_ragged(array) else name: array
            for name, array in block.arrays.items()
        }
        return {
            "_row": block.rows,
            "_epoch": block.epochs,
            "_bad": np.array(block.bad, dtype=object),
            **named,
        }

    @staticmethod
    def block(columns: Arrays) -> Block:
        """Rebuild the block that `columns` made."""
        rows, epochs, bad = columns.pop("_row"), columns.pop("_epoch"), columns.pop("_bad")
        arrays = {
            name.removeprefix(RAGGED): ragged(array) if name.startswith(RAGGED) else array
            for name, array in columns.items()
        }
        return Block(rows, epochs, arrays, bad.tolist())


class RowCosts:
    """Costs of the rows of an item (`Costed.costs`), from the column that holds them or from the
    rows themselves.
    """

    def __init__(self, selection: Selection, modality: Modality, columns: dict[str, str]):
        assert is_costed(modality), f"{modality.registered_name} rows have no costs"
        self.selection, self.modality, self.columns = selection, modality, columns
        self.roles = (*modality.roles, *modality.optional_roles)
        self.has_column = cost_column(modality, columns) is not None

    def __call__(self, item: Item) -> np.ndarray:
        ids = self.selection.ids(np.arange(item.start, item.stop))
        if not self.has_column:
            return self._of(self._reader(self.columns), ids, self.columns)
        column = {self.modality.cost_role: self.columns[self.modality.cost_role]}
        found = self._of(self._reader(column), ids, column)
        silent, reader = np.flatnonzero(found == 0), self._reader(self.columns)
        # The column is null: the row's own header tells
        for start in range(0, len(silent), SILENT_ROWS):
            some = silent[start : start + SILENT_ROWS]
            found[some] = self._of(reader, ids[some], self.columns)
        return found

    def _reader(self, columns: dict[str, str]) -> Reader:
        names = dict.fromkeys(columns[role] for role in self.roles if role in columns)
        return Reader(self.selection.manifest, list(names))

    def _of(self, reader: Reader, ids: np.ndarray, columns: dict[str, str]) -> np.ndarray:
        return np.array(self.modality.costs(reader.take(ids), columns))
