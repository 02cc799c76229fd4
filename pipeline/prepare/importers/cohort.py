"""Rows of events to a cohort with labels, without later events and outcomes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config import registry
from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import is_list
from pipeline.prepare.cohorts import definition
from pipeline.prepare.engine.importing import Notes, first_few, validated
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, find_inputs
from pipeline.prepare.engine.table_importer import InferredSchema, Scan, TableImporter
from pipeline.prepare.readers import parquet

ROWS = {
    "entity": "the id of a stay",
    "times": "hours of events",
    "variables": "names of events",
    "values": "numbers of events",
}
"""Columns that every definition needs."""


class CohortOptions(Options):
    task: str = Field(
        "",
        description="the definition, one of those below, or one of your own (a file in "
        "pipeline/prepare/cohorts or in a plugin)",
    )
    history: bool = Field(
        True,
        description="false: events from before the entity's start are no inputs, as in "
        "Harutyunyan et al. 2019",
    )
    options: dict[str, str] = Field(
        {},
        description="the task's own options; --set gives each by its own name",
    )


@register("importer", "cohort", options=CohortOptions)
class Cohort(TableImporter):
    """A clinical task (who dies, who comes back, ...) from rows of patients' events.

    It makes the rows of a cohort from rows of events (of prepare mimic3, mimic4, eicu,
    physionet2012, omop or events): --set task=mortality.

    Columns: `entity`, `patient`, `hospital` (of eICU), `times`, `variables`, `values`, `events`,
    `static` and `split`, without events after the prediction time; labels: `label` (mortality,
    readmission), `label_times` and `label_values` (decompensation, length_of_stay), `labels`
    (phenotyping); subgroups: `sex`, `age_band`, `care_unit`, `dbsource` where known. All other
    columns are outcomes and are not written. Stays that do not belong to the cohort are counted by
    reason. Each task has further options (--set exclude=none), which are listed below its name.
    """

    amounts = {"events": "times"}

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.task = self.options.task
        if not self.task:
            if self.options.options:
                raise ValueError(
                    f"--set {next(iter(self.options.options))}=...: an option of no task; pass "
                    f"--set task={'|'.join(registry.names('cohort'))}"
                )
            return
        kind = registry.get("cohort", self.task)
        self.definition: definition.CohortDefinition = kind(
            _options(self.task, self.options.options)
        )
        self.label = self.definition.label
        self.schema: pa.Schema | None = None

    @property
    def components(self):
        return (*super().components, ("cohort", self.task))

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        if not self.task:
            raise ValueError(
                f"--set task=NAME is needed; tasks: {', '.join(registry.names('cohort'))}"
            )
        listed = find_inputs(source, parquet.SUFFIXES)
        input_splits = parquet.split_files(listed, part_bytes)
        first = {input_split.name: input_split for input_split in input_splits}
        schemas = {name: parquet.read_schema(input_split) for name, input_split in first.items()}
        self.schema = next(iter(schemas.values()))
        for name, schema in schemas.items():
            if schema != self.schema:
                raise ValueError(
                    f"{name}: other columns than {next(iter(schemas))}; give one kind of event rows"
                )
        self._check(source)
        return input_splits, listed.fingerprint, listed.notes

    def _check(self, source: str) -> None:
        """Raise ValueError for a needed column that is missing."""
        assert self.schema is not None
        names = definition.names_of(self.schema)
        for name, what in {**ROWS, **self.definition.needs(names)}.items():
            if name not in names:
                raise ValueError(
                    f"{source}: no column {name} ({what}), which task {self.task} needs; "
                    f"columns there: {', '.join(names)}"
                )
        for name in definition.LISTS:
            kind = self.schema.field(name).type
            if not is_list(kind):
                raise ValueError(
                    f"{source}: column {name} is {kind}, no list; give event rows, one an "
                    "entity (onetomany prepare events)"
                )

    def _selected(self, reading: SplitReader) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Yield (rows of the cohort, for each valid row "" or why it is left out) in batches."""
        for before, table in parquet.batches(reading):
            reasons = definition.invalid_row_reasons(table)
            for i in np.flatnonzero(reasons != ""):
                reading.bad(before + int(i) + 1, reasons[i])
            yield definition.select(
                self.definition, table.filter(pa.array(reasons == "")), self.options.history
            )

    def scan(self, reading: SplitReader) -> Scan:
        counts: Counter[str] = Counter()
        for _, reasons in self._selected(reading):
            counts.update(reasons.tolist())
        return {"rows": counts.total(), "reasons": dict(counts)}

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        assert self.schema is not None
        counts: Counter[str] = Counter()
        for scan in scans:
            counts.update(scan["reasons"])
        left = dict(sorted((reason, n) for reason, n in counts.items() if reason))
        if not counts[""]:
            raise ValueError(
                f"no row belongs to the cohort {self.task}: "
                f"{', '.join(f'{reason} {n}' for reason, n in left.items())}; "
                "other rows, or another --set exclude="
            )
        selected, _ = definition.select(
            self.definition, self.schema.empty_table(), self.options.history
        )
        columns = [field for field in selected.schema if field.name != "split"]
        outcomes = [name for name in self.schema.names if name not in selected.column_names]
        notes = {
            "rows of the cohort": counts[""],
            "rows left out": left,
            "columns not written (outcomes)": first_few(outcomes) if outcomes else "none",
        }
        about = {
            "task": self.task,
            "options": self.definition.options.model_dump(mode="json"),
            "history": self.options.history,
            "labels": inspect.cleandoc(type(self.definition).__doc__ or ""),
        }
        return InferredSchema(columns, [None] * len(input_splits), notes, about)

    def rows(self, reading: SplitReader) -> Iterator[pa.Table]:
        for rows, _ in self._selected(reading):
            yield rows


def _options(task: str, given: dict[str, str]) -> Any:
    """Parse a definition's options. Raises ValueError with the nearest name for a wrong one."""
    kind = registry.entry("cohort", task).options
    for name, value in given.items():
        if name not in kind.model_fields:
            known = [*CohortOptions.model_fields, *kind.model_fields]
            raise ValueError(
                f"--set {name}={value}: neither prepare cohort nor its task {task} has an "
                f"option {name!r}; {registry.nearest(name, known)}"
            )
    return validated(kind, given)
