"""Rows of a plain table: numbers and categories without times."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Arrays, Modality
from pipeline.core.inputs import TableInputs
from pipeline.core.ragged import pad
from pipeline.core.specs import State
from pipeline.media.static_features import StaticFeatures, StaticState, check_share


class TableOptions(Options):
    min_rows: int = Field(
        10,
        ge=1,
        description="rows of the fitted sample that must have a number, or a text, for it to be "
        "known",
    )


@register("modality", "table", options=TableOptions)
class Table(Modality):
    """Rows whose ``features`` are a struct of numbers, texts (categories) and lists of texts.

    ``onetomany prepare table`` writes them.

    - Fields are matched by name. Another table shares the fields that it has in common with the
      table that the state was fitted on.
    - A category is one value however it is written: 1.0 is 1, True is true.
    - If 410 and 410.0 are two different codes, write them as a list of texts: these are not
      changed.

    Tensors:

    - ``numbers`` (B, K) float32, standardised, 0 where missing; ``numbers_known`` (B, K) bool
    - ``codes`` (B, C) int64: 1 + the index of each text among the known ones, padded with 0
    """

    state: StaticState
    roles = ("features",)

    def __init__(self, options: Any, state: State):
        super().__init__(options, state)
        self.static_features = StaticFeatures(self.state or StaticFeatures.empty_state())

    @classmethod
    def fit(cls, options, table, columns, backbone) -> StaticState:
        """Find the fields and texts that enough rows have.

        Raises ValueError for a column that is not a struct, and where no number or text is left.
        """
        state = StaticFeatures.fit(
            table[columns["features"]], columns["features"], options.min_rows
        )
        if not state["numbers"] and not state["codes"]:
            raise ValueError(
                f"column {columns['features']}: no field holds a number, or a text that "
                f"{options.min_rows} of {len(table)} rows have"
            )
        return state

    def required_type(self, role, kind) -> str:
        return self.static_features.required_type(kind)

    def inputs(self) -> TableInputs:
        return {"features": "table", **self.static_features.sizes()}

    def coverage(self, table, columns) -> str:
        """Describe which fields and texts of these rows are not known; "" where all are."""
        return self.static_features.coverage(table[columns["features"]], columns["features"])

    def check_known_share(self, table, columns) -> float:
        name = columns["features"]
        known, total = self.static_features.known_values(table[name], name)
        names = [field.name for field in table.schema.field(name).type]
        return check_share(
            known, total, f"column {name}", names, self.static_features.field_names()
        )

    def name_differences(self, table, columns):
        return self.static_features.name_differences(
            table[columns["features"]], columns["features"], self.options.min_rows
        )

    def single_features(self, table, columns):
        yield from self.static_features.features(
            table[columns["features"]], columns["features"], self.options.min_rows
        )

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        column = table[columns["features"]]
        return self.static_features.decode(column, len(table), columns["features"]), [
            "" if value.is_valid else "the features are null" for value in column
        ]

    def preparation_code(self) -> str:
        """Return code that prepares rows as `decode` and `collate` do (`PreparesInputs`)."""
        return (
            f"rows = [{self.static_features.example_row()!r}]"
            "  # an example: replace it by your rows\n"
            'state = graph["modality"]["state"]\n'
            + self.static_features.preparation_code()
            + 'inputs = {name: inputs[name] for name in graph["inputs"]}\n'
        )

    def random_rows(self, rows, rng, length=1.0):
        table = pa.table({"features": self.static_features.random_rows(rows, rng)})
        return self.collate(self.decode(table, {"features": "features"})[0])

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        codes = torch.from_numpy(pad(arrays["codes"], 1))
        return {
            "codes": codes,
            **super().collate({name: array for name, array in arrays.items() if name != "codes"}),
        }
