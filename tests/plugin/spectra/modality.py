"""Spectra: so many intensities a row."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Arrays, Batch, Modality


class SpectrumOptions(Options):
    bands: int = Field(8, ge=1, description="intensities of a row")
    noise: float = Field(0.0, ge=0, description="training: deviation of the noise that is added")


@register("modality", "spectrum", options=SpectrumOptions)
class Spectrum(Modality):
    """Rows whose ``spectrum`` is a list of ``bands`` numbers.

    Tensor: ``spectrum`` (B, bands) float32, standardised by band. State: ``mean`` and ``std``.
    """

    roles = ("spectrum",)

    @classmethod
    def fit(cls, options, table, columns, backbone):
        rows, bad = _read(table[columns["spectrum"]], options.bands)
        good = rows[[not reason for reason in bad]]
        return {"mean": good.mean(0).tolist(), "std": (good.std(0) + 1e-6).tolist()}

    def inputs(self):
        return {"features": "spectrum", "bands": self.options.bands}

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        rows, bad = _read(table[columns["spectrum"]], self.options.bands)
        mean, std = (np.array(self.state[name], dtype=np.float32) for name in ("mean", "std"))
        return {"spectrum": (rows - mean) / std}, bad

    def augment(self, batch: Batch) -> Batch:
        return batch


def _read(column, bands: int) -> tuple[np.ndarray, list[str]]:
    """(n, bands) float32, zeros for a bad row, and for each row "" or why it is bad."""
    rows, bad = np.zeros((len(column), bands), dtype=np.float32), []
    for place, values in enumerate(column.to_pylist()):
        is_good = isinstance(values, list) and len(values) == bands
        if is_good:
            rows[place] = values
        bad.append("" if is_good else f"no list of {bands} numbers")
    return rows, bad
