"""The rows' own columns beside their predictions: those of the same rows, however the rows are
held.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import SMALL, label_state, sentences, task_of, text_modality

from pipeline.core.contracts import Ensemble, Objective
from pipeline.core.contracts.objective_capabilities import rescales_scores
from pipeline.data import manifests
from pipeline.data.stream import Decoder, Rows, eval_batches
from pipeline.train import evaluate
from pipeline.train.ranks import Ranks


@pytest.fixture
def rows(tmp_path) -> Rows:
    """60 texts in two files, of which a column selects some; two of them cannot be read."""
    found = [f"{text} number {i}".encode() for i, text in enumerate(sentences(60, seed=1)[0])]
    found[7], found[50] = b"\xff", b"\xff"
    for part in (0, 1):
        pq.write_table(
            pa.table({"words": found[part * 30 : part * 30 + 30]}),
            tmp_path / f"{part}.parquet",
            row_group_size=8,
        )
    whole = manifests.Selection(manifests.build(str(tmp_path), "parquet", ""))
    modality = text_modality()
    return Rows(whole.keep(np.arange(60) % 3 != 1), Decoder(modality, None, {}, {"text": "words"}))


class Reads(Objective):
    """Predicts a sum of the tokens, and completes it by the sum that the row's own text gives."""

    raw_roles = ("text",)

    def __init__(self):
        torch.nn.Module.__init__(self)

    def loss(self, backbone, batch):
        raise NotImplementedError

    def predict(self, backbone, batch):
        return {"sum": (batch["tokens"] * batch["mask"]).sum(1)}

    def postprocess(self, found, raw_rows):
        assert len(raw_rows.table) == len(found["row"]) and raw_rows.table.column_names == ["words"]
        arrays, _ = raw_rows.modality.decode(raw_rows.table, raw_rows.columns)
        kept = np.arange(arrays["tokens"].shape[1]) < arrays["lengths"][:, None]
        return {**found, "again": (arrays["tokens"].astype(np.int64) * kept).sum(1)}


@pytest.mark.parametrize("held", ["files", "memory", "subset of memory", "subset of files"])
def test_predictions_are_completed_by_their_own_rows(rows, held):
    made = rows.in_memory(1.0, cpus=0) if "memory" in held else rows
    if "subset" in held:
        made = made.subset(np.array([9, 2, 31, 14, 3]))
    ids = made.selection.ids(np.arange(len(made)))
    task, got = type("T", (torch.nn.Module,), {"objective": Reads(), "backbone": None})(), []
    for rank in range(2):
        mine = made.part(rank, 2)
        preprocess = evaluate.device_preprocessing(made)
        batches = eval_batches(mine, 4)
        found = evaluate.predictions(task, batches, preprocess, Ranks(), torch.no_grad())
        got.append(evaluate.Postprocessor(mine)(task.objective, found))
    whole = evaluate.concatenate(got)
    assert (
        whole["row"].tolist() == [i for i in ids.tolist() if i not in (7, 50)]
        and len(set(whole["sum"].tolist())) > 4
    )
    assert whole["sum"].tolist() == whole["again"].tolist()


def test_a_rank_without_rows_completes_nothing(rows):
    assert evaluate.Postprocessor(rows)(Reads(), {}) == {}


class Large(Objective):
    """Predicts numbers that float32 rounds, with or without a unit of its own."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def loss(self, backbone, batch):
        raise NotImplementedError

    def predict(self, backbone, batch):
        number = 1e8 + batch["tokens"][:, 0].double() / 7
        return {"number": number, "half": number.half(), "count": batch["tokens"][:, 0]}


class InAUnit(Large):
    output_scale = (1.0, 1e8)

    def take_scale_of(self, state):
        raise NotImplementedError


@pytest.mark.parametrize(("objective", "kind"), [(InAUnit, np.float64), (Large, np.float32)])
def test_numbers_in_a_unit_of_their_own_keep_their_digits(rows, objective, kind):
    task = type("T", (torch.nn.Module,), {"objective": objective(), "backbone": None})()
    ready = evaluate.device_preprocessing(rows)
    found = evaluate.predictions(task, eval_batches(rows, 4), ready, Ranks(), torch.no_grad())
    assert found["number"].dtype == kind and found["half"].dtype == np.float32
    assert found["count"].dtype.kind in "iu"
    exact = 1e8 + found["count"] / 7
    assert np.array_equal(found["number"], exact) == (kind == np.float64)


def test_an_ensemble_of_regressions_keeps_its_digits(rows):
    """A float32 near 1e8 is a multiple of 8; the deviation here is 1."""
    inputs = text_modality().inputs()
    state = {"mean": 1e8, "std": 1.0, "labels": ["n"]}
    members = [
        task_of("transformers/bert", inputs, "regression", state, seed, **SMALL) for seed in (0, 1)
    ]
    ready = evaluate.device_preprocessing(rows)
    each, both = (
        [
            evaluate.predictions(task, eval_batches(rows, 4), ready, Ranks(), torch.no_grad())
            for task in tasks
        ]
        for tasks in (members, [Ensemble(members)])
    )
    mean = (each[0]["prediction"] + each[1]["prediction"]) / 2
    assert np.ptp(mean) > 0
    np.testing.assert_allclose(both[0]["prediction"] - 1e8, mean - 1e8, atol=1e-6)


def test_regression_has_a_unit_of_its_own_and_classification_none():
    inputs = text_modality().inputs()
    state = {"mean": 1e8, "std": 1.0, "labels": ["n"]}
    made = task_of("transformers/bert", inputs, "regression", state, **SMALL)
    assert rescales_scores(made.objective)
    made = task_of("transformers/bert", inputs, "classification", label_state(), **SMALL)
    assert not rescales_scores(made.objective)
