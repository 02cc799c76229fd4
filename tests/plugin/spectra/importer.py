"""Files of spectra: a line a row, intensities parted by blanks, then a class."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.prepare.engine.inputs import find_inputs, whole_files
from pipeline.prepare.engine.table_importer import InferredSchema, TableImporter


class SpectraOptions(Options):
    split: str = Field("", description="the split of all files; empty: from the file's name")


@register("importer", "spectra", options=SpectraOptions)
class Spectra(TableImporter):
    """Text files (.spectra), one row a line: intensities and a class, parted by blanks.

    Columns: ``spectrum`` (list of numbers), ``value`` (their mean) and ``label``.
    """

    label = "label"

    def input_splits(self, source, part_bytes):
        listed = find_inputs(source, (".spectra",), self.options.split)
        return whole_files(listed), listed.fingerprint, {}

    def rows(self, reading):
        for number, _, line in reading.numbered():
            *numbers, label = (line or b"").decode().split() or [""]
            if not numbers:
                reading.bad(number, "no intensities")
                continue
            spectrum = [float(text) for text in numbers]
            yield {"spectrum": spectrum, "value": float(np.mean(spectrum)), "label": label}

    def infer_schema(self, input_splits, found):
        columns = [
            pa.field("spectrum", pa.list_(pa.float32())),
            pa.field("value", pa.float64()),
            pa.field("label", pa.string()),
        ]
        return InferredSchema(columns, [{}] * len(input_splits))
