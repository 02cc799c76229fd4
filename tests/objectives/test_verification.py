"""Verification: embeddings that are compared, also of identities that training never had."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import net_task

from pipeline.core.contracts import Batch, Task
from pipeline.core.identity_numbers import identity_number
from pipeline.objectives.verification import Verification, with_margin

COLUMNS = {"identity": "speaker"}
OPTIONS = Verification.options_class()


def table(values, kind=None) -> pa.Table:
    return pa.table({"speaker": pa.array(values, kind)})


def built(identities: int = 3, kind=torch.float64, **options) -> tuple[Task, Batch]:
    """The objective on a tiny network, and six rows, the last of an unknown identity."""
    torch.manual_seed(0)
    backbone = net_task().backbone
    state = {"identities": list(range(identities))}
    objective = Verification(backbone, Verification.options_class(width=5, **options), state)
    data = {
        "image": torch.randn(6, 1, 8, 8, dtype=kind),
        "identity": torch.tensor([0, 1, 2, 0, 1, 77]),
        "label": torch.tensor([0, 1, 2, 0, 1, -1]),
    }
    return Task(backbone, objective).to(kind).eval(), Batch(np.arange(6), torch.arange(6), data)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.int16(), "dictionary"])
def test_identities_have_the_same_number_in_every_split(kind):
    train, test = ["7", "12", "7"], ["12", "9", "9", "7"]
    made = []
    for values in (train, test):
        if kind == "dictionary":
            made.append(pa.table({"speaker": pa.array(values).dictionary_encode()}))
        else:
            made.append(table([int(v) for v in values] if kind == pa.int16() else values, kind))
    state = Verification.fit(OPTIONS, made[0], COLUMNS)
    assert state == {"identities": sorted(map(identity_number, ("7", "12")))}
    assert json.loads(json.dumps(state)) == state
    arrays = Verification.encode(made[1], COLUMNS, state)
    assert arrays["identity"].tolist() == [identity_number(name) for name in test]
    places = [state["identities"].index(identity_number(name)) for name in ("12", "7")]
    assert arrays["label"].tolist() == [places[0], -1, -1, places[1]], "unseen ones have no label"
    assert arrays["label"].dtype == arrays["identity"].dtype == np.int64
    assert Verification.encode(made[1].select([]), COLUMNS, state) == {}, "new rows to predict"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a"] * 3, "column speaker: verification needs .* the training rows have 1$"),
        ([1.0, 2.0], "column speaker holds double: identities are read from texts or"),
        ([True, False], "column speaker holds bool"),
    ],
)
def test_columns_that_cannot_be_learned_are_reported(values, message):
    with pytest.raises(ValueError, match=message):
        Verification.fit(OPTIONS, table(values), COLUMNS)


def test_rows_without_an_identity_are_left_out():
    assert Verification.needed_roles == ("identity",)
    rows = table(["a", None, "b"])
    state = Verification.fit(OPTIONS, rows, COLUMNS)
    assert len(state["identities"]) == 2
    with pytest.raises(ValueError, match="column speaker: 1 rows have no identity"):
        Verification.encode(rows, COLUMNS, state)


@pytest.mark.parametrize(("values", "fine"), [("aab", True), ("ab", False), ("aaa", False)])
def test_test_rows_must_have_both_kinds_of_pairs(values, fine):
    if fine:
        return Verification.check_test(OPTIONS, table(list(values)), COLUMNS, {})
    with pytest.raises(ValueError, match="two rows of one and a row of another"):
        Verification.check_test(OPTIONS, table(list(values)), COLUMNS, {})


@pytest.mark.parametrize(("scale", "margin"), [(30.0, 0.2), (12.0, 0.5), (1.0, 0.0)])
def test_the_loss_is_the_formula_of_the_additive_angular_margin(scale, margin):
    """Deng et al. 2019, equation 3, by angles, row by row."""
    task, batch = built(scale=scale, margin=margin)
    head = task.objective
    with torch.no_grad():
        pooled = task.backbone(batch).pooled.numpy()
        weight, bias = (one.detach().numpy() for one in head.projection.parameters())
        total, count, logs = task(batch)
        found = head.predict(task.backbone, batch)
    pooled = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-5)
    rows = pooled @ weight.T + bias
    centres = head.identities.detach().numpy()
    wanted, nearest = [], 0
    for row, label in zip(rows[:5], batch["label"][:5].tolist(), strict=True):
        cosines = centres @ row / np.linalg.norm(centres, axis=1) / np.linalg.norm(row)
        angles = np.arccos(cosines)
        nearest += int(angles.argmin() == label)
        assert angles[label] + margin < np.pi
        angles[label] += margin
        powers = np.exp(scale * np.cos(angles))
        wanted.append(-np.log(powers[label] / powers.sum()))
    assert count == 5 and logs["accuracy"] == nearest, "the sixth row's identity is unknown"
    assert float(total) == pytest.approx(sum(wanted), abs=1e-6)
    np.testing.assert_allclose(found["loss"].numpy(), [*wanted, 0], atol=1e-6)
    assert found["count"].tolist() == [1, 1, 1, 1, 1, 0]
    np.testing.assert_allclose(
        found["embedding"], rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=1e-6
    )


def test_gradients_are_those_of_finite_differences():
    task, batch = built()
    parameters = dict(task.objective.named_parameters())
    task(batch)[0].backward()
    for name, parameter in parameters.items():
        flat = parameter.detach().view(-1)
        for k in range(0, len(flat), max(1, len(flat) // 5)):
            before, sides = flat[k].item(), []
            for step in (1e-6, -1e-6):
                flat[k] = before + step
                with torch.no_grad():
                    sides.append(float(task(batch)[0]))
            flat[k] = before
            slope = (sides[0] - sides[1]) / 2e-6
            assert parameter.grad.view(-1)[k].item() == pytest.approx(slope, abs=1e-6, rel=1e-6), (
                name
            )


def test_the_margin_falls_over_all_angles_and_its_slope_is_finite():
    angles = torch.linspace(0, torch.pi, 2001, dtype=torch.float64)
    cosines = angles.cos()[:, None].clone().requires_grad_()
    moved = with_margin(cosines, torch.zeros(2001, dtype=torch.long), 0.5)
    usual = angles < torch.pi - 0.5
    torch.testing.assert_close(moved[usual, 0], (angles + 0.5)[usual].cos(), atol=2e-4, rtol=0)
    assert (moved.detach().diff(dim=0) < 0).all() and (moved < cosines).all()
    moved.sum().backward()
    assert torch.isfinite(cosines.grad).all() and (cosines.grad > 0).all()


def test_embeddings_are_float32_under_autocast():
    """bfloat16 has 3 digits: pairs of 200 rows near each other would have few scores."""
    task, batch = built(kind=torch.float32)
    features = 3 + 0.01 * torch.randn(200, task.backbone.pooled_dim)
    with torch.no_grad():
        exact = task.objective.embed(features)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(task.objective.embed(features), exact)
            assert task.objective.embed(features.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(exact.norm(dim=1), torch.ones(200))
    new = Batch(batch.rows, batch.keys, {"image": batch["image"]})
    with torch.no_grad():
        found = task.objective.predict(task.backbone, new)
        raw = task.objective.raw_outputs(task.backbone, new)
    assert set(found) == {"embedding"}, "new rows have no identity"
    columns = task.objective.output_columns({"embedding": found["embedding"].numpy()}, None)
    assert columns["embedding"].shape == (6, 5)
    torch.testing.assert_close(raw, found)
