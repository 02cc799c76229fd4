"""Backbones of events: the grid against a loop, causality by shuffling the future, and what the
transformer must not depend on.
"""

import numpy as np
import pytest
import torch
from toys import event_rows, take, task_of

from pipeline.checkpoints import bundle
from pipeline.core.contracts import Batch
from pipeline.core.specs import Architecture
from pipeline.models.events import grid


def built(name: str, inputs, **options):
    return bundle.build_backbone(Architecture(f"events/{name}", options, inputs), seed=3).eval()


@pytest.fixture(scope="module")
def rows():
    return event_rows(8)


def test_the_grid_is_what_a_loop_makes(rows):
    batch = take(rows, np.arange(8))
    value, seen, steps = grid(batch, 5, 0.0, 2.0, 12)
    for i in range(8):
        parts = zip(
            *(batch[name][i].tolist() for name in ("times", "variables", "values", "mask")),
            strict=True,
        )
        events = [(t, v, x) for t, v, x, real in parts if real]
        assert steps[i] == max([int(t // 2) + 1 for t, _, _ in events], default=1)
        for step in range(value.shape[1]):
            for variable in range(5):
                here = [x for t, v, x in events if v == variable and 2 * step <= t < 2 * step + 2]
                assert bool(seen[i, step, variable]) == bool(here)
                assert value[i, step, variable].item() == pytest.approx(
                    float(np.mean(here)) if here else 0.0, abs=1e-6
                )


def future_changed(batch: Batch, hour: float, seed: int = 0) -> Batch:
    """The same rows with other variables and values at and after an hour."""
    g = torch.Generator().manual_seed(seed)
    later = batch["times"] >= hour
    order = torch.randperm(batch["times"].shape[1], generator=g)
    return batch.replace(
        values=torch.where(later, batch["values"][:, order] + 1, batch["values"]),
        variables=torch.where(later, (batch["variables"] + 1) % 5, batch["variables"]),
    )


@torch.no_grad()
def test_no_token_of_the_recurrent_network_knows_the_future(rows):
    batch, backbone = take(rows, np.arange(8)), built("gru", rows.modality.inputs(), width=16)
    one, two = backbone(batch), backbone(future_changed(batch, 12.0))
    past = (one.stages["times"] <= 12.0) & one.mask
    assert past.sum() > 40
    torch.testing.assert_close(one.tokens[past], two.tokens[past], rtol=0, atol=0)
    after = (one.stages["times"] > 13.0) & one.mask
    assert (one.tokens[after] - two.tokens[after]).abs().amax(1).gt(1e-6).float().mean() > 0.9


@torch.no_grad()
def test_values_are_carried_forward_and_their_age_is_reported(rows):
    """One measurement at the start: every later step has its value, and the steps differ by its age
    alone.
    """
    inputs = rows.modality.inputs()
    backbone = built("gru", inputs, width=16)
    data = {
        "times": torch.tensor([[0.5, 5.5]]),
        "variables": torch.tensor([[0, 1]]),
        "values": torch.tensor([[2.0, 1.0]]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
        "numbers": torch.zeros(1, inputs["numbers"]),
        "numbers_known": torch.zeros(1, inputs["numbers"], dtype=torch.bool),
        "codes": torch.zeros(1, 1, dtype=torch.long),
    }
    caught = {}
    hook = backbone.body.enter.register_forward_pre_hook(
        lambda module, args: caught.update(x=args[0])
    )
    backbone(Batch(np.arange(1), torch.zeros(1, dtype=torch.long), data))
    hook.remove()
    x = caught["x"][0].view(6, 3, inputs["variables"])
    assert x[:, 0, 0].tolist() == [2.0] * 6 and x[:, 1, 0].tolist() == [1.0] + [0.0] * 5
    torch.testing.assert_close(x[:, 2, 0], torch.arange(6) / 48)
    assert x[:5, 0, 1].tolist() == [0.0] * 5 and x[5, 0, 1] == 1.0
    # Never measured: since before the start
    torch.testing.assert_close(x[:5, 2, 1], torch.arange(1, 6) / 48)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "strats"])
def test_padding_and_a_row_without_events_change_nothing(rows, name):
    backbone = built(name, rows.modality.inputs(), width=16)
    whole = backbone(take(rows, np.arange(8)))
    assert torch.isfinite(whole.pooled).all() and not take(rows, [1])["mask"].any()
    for i in range(8):
        alone = backbone(take(rows, [i]))
        torch.testing.assert_close(whole.pooled[i], alone.pooled[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_transformer_reads_a_set(rows):
    backbone, batch = (
        built("strats", rows.modality.inputs(), width=16, layers=2),
        take(rows, np.arange(8)),
    )
    order = torch.randperm(batch["mask"].shape[1], generator=torch.Generator().manual_seed(1))
    moved = batch.replace(
        **{name: batch[name][:, order] for name in ("times", "variables", "values", "mask")}
    )
    torch.testing.assert_close(backbone(batch).pooled, backbone(moved).pooled, rtol=1e-5, atol=1e-5)
    for name, change in (("times", 3.0), ("values", 1.0)):
        other = batch.replace(**{name: batch[name] + change})
        assert (backbone(batch).pooled - backbone(other).pooled)[0].abs().max() > 1e-4


@torch.no_grad()
def test_hidden_values_are_not_read(rows):
    backbone, batch = built("strats", rows.modality.inputs(), width=16), take(rows, np.arange(8))
    hidden = torch.zeros_like(batch["mask"])
    hidden[:, ::2] = True
    other = batch.replace(values=torch.where(hidden, batch["values"] + 7, batch["values"]))
    torch.testing.assert_close(
        backbone(batch, token_mask=hidden).pooled, backbone(other, token_mask=hidden).pooled
    )
    assert not torch.allclose(backbone(batch).pooled, backbone(other).pooled)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gru", "strats"])
def test_static_facts_are_read(rows, name):
    backbone, batch = built(name, rows.modality.inputs(), width=16), take(rows, np.arange(8))
    for changed in (
        batch.replace(numbers=batch["numbers"] + 1),
        batch.replace(codes=torch.zeros_like(batch["codes"])),
    ):
        assert (backbone(batch).pooled - backbone(changed).pooled)[0].abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "inputs", "message"),
    [
        ("gru", {}, {"channels": 3, "size": 32}, "reads events"),
        ("strats", {"width": 30, "heads": 4}, None, "width 30 is not divided by heads 4"),
    ],
)
def test_what_does_not_fit_is_refused(rows, name, options, inputs, message):
    with pytest.raises(ValueError, match=message):
        built(name, inputs or rows.modality.inputs(), **options)
    with pytest.raises(ValueError, match="no token for each event"):
        built("gru", rows.modality.inputs())(
            take(rows, [0]), token_mask=torch.zeros(1, 1, dtype=torch.bool)
        )


@torch.no_grad()
@pytest.mark.parametrize("changed", ["other values", "none at all"])
def test_no_hourly_prediction_knows_the_future_nor_that_there_is_one(rows, changed):
    """With all events from an hour on changed, or left out, predictions up to then stay: that a
    stay goes on is the label itself.
    """
    made = task_of(
        "events/gru",
        rows.modality.inputs(),
        "hourly",
        {"labels": ["0", "1"], "counts": [5, 5]},
        seed=2,
        width=16,
    ).eval()
    clock = torch.arange(1.0, 24.0)
    batch = take(rows, np.arange(8)).replace(
        label_times=clock.expand(8, -1),
        label_times_lengths=torch.full((8,), 23),
        label_values=torch.zeros(8, 23, dtype=torch.int16),
    )
    whole = made.objective.predict(made.backbone, batch)["scores"]
    for hour in (3.0, 8.0, 15.0):
        other = (
            future_changed(batch, hour)
            if changed == "other values"
            else batch.replace(mask=batch["mask"] & (batch["times"] < hour))
        )
        found = made.objective.predict(made.backbone, other)["scores"]
        torch.testing.assert_close(found[:, clock <= hour], whole[:, clock <= hour], rtol=0, atol=0)
        assert (found[:, clock > hour + 2] - whole[:, clock > hour + 2]).abs().max() > 1e-4


def test_an_event_after_the_last_hour_stays_in_its_row_of_a_graph(rows, monkeypatch):
    """A graph has a fixed number of steps; a later event counts in the last of its own row."""
    batch = take(rows, np.arange(2))
    late = torch.where(torch.arange(2)[:, None] == 0, 30.0, batch["times"])
    alone = take(rows, np.arange(1, 2))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    value, seen, steps = grid(batch.replace(times=late), 5, 0.0, 2.0, 12)
    own_value, own_seen, _ = grid(alone, 5, 0.0, 2.0, 12)
    torch.testing.assert_close(value[1:], own_value)
    assert torch.equal(seen[1:], own_seen)
    assert seen[0, 11].any() and not seen[0, :11].any() and steps[0] == 12
