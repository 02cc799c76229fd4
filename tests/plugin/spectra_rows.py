"""Rows of the plugin's components for the contract suite, as any plugin may add its own:

    PYTHONPATH=.:tests:tests/plugin ONETOMANY_PLUGINS=spectra \
        pytest -p spectra_rows tests/test_contracts.py
"""

import numpy as np
import pyarrow as pa
from contract_rows import BACKBONES, MODALITIES, OBJECTIVES, Case, N, Sample


def spectra() -> Sample:
    rows = np.random.default_rng(3).normal(size=(N, 4)).astype(np.float32)
    table = pa.table({"bands": rows.tolist(), "sum": rows.sum(1).astype(np.float64)})
    return Sample(table, {"spectrum": "bands"}, "spectrum", {"bands": 4})


def spectra_with_values() -> Sample:
    plain = spectra()
    return Sample(plain.table, {**plain.columns, "value": "sum"}, plain.modality, plain.options)


MODALITIES["spectrum"] = (spectra, "spectra/perceptron")
BACKBONES["spectra/perceptron"] = (spectra, {})
OBJECTIVES["brightness"] = Case(spectra_with_values, "spectra/perceptron")
