"""Regression: one number a row, standardised by the training rows, told in its own unit."""

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F
from toys import net_task

from pipeline.core.contracts import Batch, Task
from pipeline.objectives.regression import Regression

COLUMNS = {"value": "year"}
OPTIONS = Regression.options_class()


def table(values, kind=None) -> pa.Table:
    return pa.table({"year": pa.array(values, kind)})


@pytest.mark.parametrize(
    "kind", [pa.int16(), pa.float32(), pa.float64(), pa.decimal128(8, 2), "dictionary"]
)
def test_numbers_of_any_type_are_standardised_by_the_training_rows(kind):
    years = [1990, 2000, 2010, 2020]
    if kind == "dictionary":
        rows = pa.table({"year": pa.array(years, pa.int64()).dictionary_encode()})
    else:
        plain = [Decimal(year) for year in years] if pa.types.is_decimal(kind) else years
        rows = table(plain, kind)
    state = Regression.fit(OPTIONS, rows, COLUMNS)
    assert state == {"mean": 2005.0, "std": pytest.approx(np.std(years)), "labels": ["year"]}
    value = Regression.encode(rows, COLUMNS, state)["value"]
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, (np.array(years) - 2005) / np.std(years), rtol=1e-6)
    assert Regression.encode(rows.select([]), COLUMNS, state) == {}, "new rows to predict"


def test_numbers_beyond_those_that_floats_hold_exactly_are_rounded():
    """Nanoseconds since 1970, for example."""
    rows = table([2**60 + 1, 2**60 + 2**20], pa.int64())
    state = Regression.fit(OPTIONS, rows, COLUMNS)
    assert state["mean"] == pytest.approx(2**60 + 2**19)
    assert Regression.encode(rows, COLUMNS, state)["value"].tolist() == [-1.0, 1.0]


def test_rows_without_a_number_are_left_out():
    rows = table([1.0, float("nan"), 3.0, None, float("inf")])
    state = Regression.fit(OPTIONS, rows, COLUMNS)
    assert (state["mean"], state["std"]) == (2.0, 1.0)
    reasons = Regression.invalid_label_reasons(rows, COLUMNS, state)
    assert [bool(reason) for reason in reasons] == [False, True, False, True, True]
    assert reasons[1] == "year is not a finite number" and Regression.needed_roles == ("value",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([2000.0] * 3, r"column year: the training rows hold one number only \(2000\)"),
        ([float("nan")] * 3, "column year: the training rows hold no number"),
        (["1990", "2000"], "column year holds string: regression estimates numbers"),
        ([True, False], "column year holds bool"),
    ],
)
def test_columns_that_cannot_be_learned_are_reported(values, message):
    with pytest.raises(ValueError, match=message):
        Regression.fit(OPTIONS, table(values), COLUMNS)


def built(mean: float = 2005.0, std: float = 11.0, **options) -> tuple[Task, Batch]:
    """The objective on a tiny network, and a batch with standardised values."""
    backbone = net_task().backbone
    generator = torch.Generator().manual_seed(0)
    data = {
        "image": torch.randn(6, 1, 8, 8, generator=generator),
        "value": torch.randn(6, generator=generator),
    }
    state = {"mean": mean, "std": std, "labels": ["year"]}
    objective = Regression(backbone, Regression.options_class(**options), state)
    return Task(backbone, objective).eval(), Batch(np.arange(6), torch.arange(6), data)


@pytest.mark.parametrize(
    ("loss", "function"),
    [("squared", F.mse_loss), ("absolute", F.l1_loss), ("huber", F.huber_loss)],
)
def test_the_loss_is_that_of_the_standardised_number(loss, function):
    task, batch = built(loss=loss)
    with torch.no_grad():
        pooled = F.layer_norm(task.backbone(batch).pooled, (task.backbone.pooled_dim,))
        standardised = task.objective.head(pooled)[:, 0]
        total, count, logs = task(batch)
        found = task.objective.predict(task.backbone, batch)
    assert count == 6 and logs == {}
    torch.testing.assert_close(total, function(standardised, batch["value"], reduction="sum"))
    torch.testing.assert_close(found["prediction"], standardised.double() * 11 + 2005)
    torch.testing.assert_close(found["value"], batch["value"].double() * 11 + 2005)
    torch.testing.assert_close(found["loss"].sum().float(), total)
    new = Batch(batch.rows, batch.keys, {"image": batch["image"]})
    assert set(task.objective.predict(task.backbone, new)) == {"prediction"}


def test_a_number_that_is_large_beside_its_deviation_keeps_its_digits():
    """A float32 near 1e8 is a multiple of 8; the deviation here is 1."""
    task, batch = built(mean=1e8, std=1.0)
    with torch.no_grad():
        found = task.objective.predict(task.backbone, batch)
    torch.testing.assert_close((found["value"] - 1e8).float(), batch["value"], atol=1e-6, rtol=0)


def test_the_head_is_float32_under_autocast():
    """bfloat16 has 3 digits: the numbers of 200 rows near each other would be few."""
    task, _ = built()
    features = 3 + 0.01 * torch.randn(200, task.backbone.pooled_dim)
    with torch.no_grad():
        exact = task.objective.scores(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(task.objective.scores(features), exact)
            assert task.objective.scores(features.bfloat16()).dtype == torch.float32


def test_an_ensemble_predicts_the_mean_of_its_members():
    task, batch = built()
    first, second = (torch.randn(6, 1, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    each = [task.objective.predict_scores(scores, batch) for scores in (first, second)]
    both = task.objective.predict_scores((first.double() + second.double()) / 2, batch)
    found = task.objective.average(each)
    assert found.keys() == both.keys()
    for name in both:
        torch.testing.assert_close(found[name], both[name])


def test_written_predictions_are_numbers_in_their_own_unit():
    task, batch = built()
    with torch.no_grad():
        found = task.objective.predict(task.backbone, batch)
    arrays = {name: tensor.numpy() for name, tensor in found.items()}
    written = task.objective.output_columns(arrays, None)
    assert list(written) == ["prediction"] and written["prediction"].dtype == np.float64
