"""Masked columns: what is hidden is told from the rest of a row, and follows from its key."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import image_rows, rows_of, take, task_of

from pipeline.core.contracts import Batch, Task
from pipeline.modalities.table import Table, TableOptions
from pipeline.objectives.masked_columns import MaskedColumns


def rows(n: int = 64, seed: int = 0):
    """Rows whose `y` is twice `x`, and whose `sign` is that of `x`; `y` is missing in some."""
    x = np.random.default_rng(seed).normal(size=n)
    features = [
        {"x": a, "y": None if i % 8 == 7 else 2 * a, "sign": "plus" if a > 0 else "minus"}
        for i, a in enumerate(x.tolist())
    ]
    table, columns = pa.table({"features": features}), {"features": "features"}
    modality = Table(TableOptions(), Table.fit(TableOptions(), table, columns, ""))
    arrays, _ = modality.decode(table, columns)
    return rows_of(modality, arrays, "masked_columns", {})


def task(found, seed: int = 0, **options) -> Task:
    inputs = found.modality.inputs()
    sizes = {"width": 16, "layers": 1, "heads": 2, "attention_dropout": 0.0, "dropout": 0.0}
    return task_of(
        "table/ft_transformer", inputs, "masked_columns", {}, seed, options=options, **sizes
    )


@torch.no_grad()
def test_hidden_values_are_not_seen_and_are_what_is_predicted():
    """Another value in a hidden place changes the error of that row, and nothing else."""
    found = rows()
    one = task(found, share=0.5).eval()
    batch = take(found, range(64))
    seen: list[Batch] = []
    one.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    before = one.objective.predict(one.backbone, batch)
    hidden = batch["numbers_known"] & ~seen[0]["numbers_known"]
    gone = (batch["codes"] > 0) & (seen[0]["codes"] == 0)
    assert 0.35 < hidden.sum() / batch["numbers_known"].sum() < 0.65
    assert 0.35 < gone.sum() / (batch["codes"] > 0).sum() < 0.65
    assert not seen[0]["numbers"][hidden].any()
    assert torch.equal(before["count"].bool(), hidden.any(1) | gone.any(1))
    other = batch.replace(numbers=batch["numbers"] + 3.0 * hidden)
    after = one.objective.predict(one.backbone, other)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0].data)
    assert torch.equal(before["loss"] != after["loss"], hidden.any(1))


@torch.no_grad()
def test_the_loss_is_that_of_hidden_numbers_and_texts():
    found = rows()
    one = task(found, share=0.5, weight=0.25).eval()
    batch = take(found, range(16))
    seen: list[Batch] = []
    one.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    losses = one.objective.predict(one.backbone, batch)["loss"]
    output = one.objective.head(one.backbone(seen[0]).pooled)
    zero_error = 0.0
    for i in range(16):
        hidden = batch["numbers_known"][i] & ~seen[0]["numbers_known"][i]
        gone = batch["codes"][i][(batch["codes"][i] > 0) & (seen[0]["codes"][i] == 0)] - 1
        error = (output[i, :2] - batch["numbers"][i])[hidden].square()
        wanted = error.mean() if len(error) else torch.zeros(())
        if hidden.any():
            zero_error += batch["numbers"][i][hidden].square().mean().item()
        if hidden.any() or len(gone):
            chance = output[i, 2:].sigmoid()
            truth = torch.zeros(2)
            truth[gone] = 1.0
            entropy = -(truth * chance.log() + (1 - truth) * (1 - chance).log())
            wanted = wanted + 0.25 * entropy.mean()
        torch.testing.assert_close(losses[i], wanted, atol=1e-5, rtol=1e-5)
    logged = one.objective.loss(one.backbone, batch)[2]["zero_error"]
    assert logged.item() == pytest.approx(zero_error, rel=1e-5)


def test_columns_that_depend_on_each_other_are_learned():
    found = rows(128)
    one = task(found)
    optimizer = torch.optim.Adam(one.parameters(), 0.01)
    batch = take(found, range(128))
    for _ in range(150):
        optimizer.zero_grad()
        total, count, _ = one(batch)
        (total / count).backward()
        optimizer.step()
    with torch.no_grad():
        _, count, logs = one.eval()(take(rows(128, seed=1), range(128)))
    assert logs["number_error"] < 0.65 * logs["zero_error"]
    assert 0.7 < logs["zero_error"] / count < 0.85, "in some rows only texts are hidden"


def test_other_rows_are_refused():
    pictures = image_rows(2, size=32, channels=3)
    with pytest.raises(ValueError, match="timm/test_vit reads no rows of a table"):
        task_of("timm/test_vit", pictures.modality.inputs(), "masked_columns", {})
    assert MaskedColumns.roles == ()
