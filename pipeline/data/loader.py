"""Rows of a manifest to arrays: what a data worker, wherever it runs, does with one item of a
plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.core.capabilities import (
    can_pack,
    columns_of,
    cost_column,
    decodes_on_device,
    is_costed,
)
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
    keep_encoded: bool = False
    """Inputs stay encoded, to be decoded on the device."""
    training: bool = True
    """Whether rows are for training. Rows that can only be evaluated are then bad ones."""
    relabel: Callable[[Arrays], Arrays] | None = None
    """Turns labels as the objective encodes them into another data set's label numbers; a function
    that can be pickled.
    """

    def column_names(self, roles: tuple[str, ...] | None = None) -> list[str]:
        """Return the columns of all roles, or of the given ones."""
        if roles is None:
            packed = self.modality.packed_roles if can_pack(self.modality) else ()
            roles = (*self.modality.roles, *self.modality.optional_roles, *packed)
            if self.objective:
                objective = registry.get("objective", self.objective)
                roles = (*roles, *objective.roles, *objective.optional_roles)
        return columns_of(roles, self.columns)

    def estimate_bytes(self, selection: Selection) -> int:
        """Estimate the bytes of the decoded selection from a few of its rows."""
        indices = evenly_spread(len(selection), 8)
        if not len(indices):
            return 0
        arrays, _ = self(
            Reader(selection.manifest, self.column_names()).take(selection.ids(indices))
        )
        return int(sum(map(num_bytes, arrays.values())) / len(indices) * len(selection))

    def __call__(self, table: pa.Table) -> tuple[Arrays, list[str]]:
        """Return the arrays of rows, and for each row why it is bad, or ""."""
        if self.keep_encoded:
            assert decodes_on_device(self.modality)
            files, bad = self.modality.encoded(table, self.columns)
            arrays = {"encoded": files}
        else:
            arrays, bad = self.modality.decode(table, self.columns)
        if self.objective:
            objective = registry.get("objective", self.objective)
            labels = objective.encode(table, self.columns, self.objective_state)
            arrays = arrays | (self.relabel(labels) if self.relabel else labels)
            rows = (table, self.columns, self.objective_state)
            reasons = [bad, invalid_label_reasons(objective, *rows)]
            if self.training:
                reasons.append(untrainable_reasons(objective, *rows, arrays))
            bad = [next(filter(None, of_row), "") for of_row in zip(*reasons, strict=True)]
        return arrays, bad


WINDOWS_BYTES = 512 << 20
"""Least cache of row groups where batches take rows from a whole window; `BucketPlan.held_rows` may
need more.
"""
RAGGED = "_ragged:"
HEADER_ROWS = 256
"""Rows whose headers are read at once."""


def row_bytes(selection: Selection) -> int:
    """Return the bytes of a selection's row groups, divided by its number of rows.

    A reader holds whole row groups, also where the selection has few of their rows.
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
    """The decoded rows of an item."""

    rows: np.ndarray
    """(n,) row ids."""
    epochs: np.ndarray
    arrays: Arrays
    bad: list[str]
    """Why each row is bad, or ""."""


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
        if item.shard < 0:
            indices = np.arange(item.start, item.stop)
            epochs = np.zeros(item.stop - item.start, dtype=np.int64)
        else:
            assert self.plan is not None
            indices, epochs = self.plan.sequence(item.shard, item.start, item.stop)
        rows = self.selection.ids(indices)
        with self._lock:
            self._reader = self._reader or Reader(
                self.selection.manifest, self.decoder.column_names(), self._cache_bytes()
            )
            table = self._reader.take(rows)
        arrays, bad = self.decoder(table)
        return Block(rows, epochs, arrays, bad)

    def _cache_bytes(self) -> int:
        if not isinstance(self.plan, BucketPlan):
            return READER_BYTES
        return max(WINDOWS_BYTES, self.plan.held_rows * row_bytes(self.selection))

    def columns(self, item: Item) -> Arrays:
        """Return the block as one set of columns, to be sent through the object store.

        Ray Data would make one array of ragged rows that happen to have equal lengths. So the names
        of ragged columns have a prefix.
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
    """Costs of the rows of an item (`Costed.costs`): from a column, or from the rows themselves."""

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
        costs = self._of(self._reader(column), ids, column)
        # the column is null there: read the cost from the row's own header
        without_cost = np.flatnonzero(costs == 0)
        reader = self._reader(self.columns)
        for start in range(0, len(without_cost), HEADER_ROWS):
            indices = without_cost[start : start + HEADER_ROWS]
            costs[indices] = self._of(reader, ids[indices], self.columns)
        return costs

    def _reader(self, columns: dict[str, str]) -> Reader:
        return Reader(self.selection.manifest, columns_of(self.roles, columns))

    def _of(self, reader: Reader, ids: np.ndarray, columns: dict[str, str]) -> np.ndarray:
        return np.array(self.modality.costs(reader.take(ids), columns))
