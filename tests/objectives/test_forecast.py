"""Forecasts and hidden events: targets against a loop, nothing from after the hour, and that both
are learned.
"""

import numpy as np
import pytest
import torch
from toys import event_rows, take, task_of

from pipeline.objectives.forecast import MAX_ERROR
from tests.models.test_events import future_changed


@pytest.fixture(scope="module")
def rows():
    return event_rows(8)


def task(rows, objective, backbone="events/gru", seed=0, **options):
    return task_of(
        backbone, rows.modality.inputs(), objective, {}, seed=seed, options=options, width=16
    ).eval()


def test_what_is_ahead_is_what_a_loop_finds(rows):
    batch = take(rows, np.arange(8))
    hours = torch.arange(1, 21).float().expand(8, -1)
    mean, seen = task(rows, "forecast", horizon=4.0).objective.ahead(batch, hours)
    for i in range(8):
        for n in range(20):
            for v in range(5):
                here = [
                    float(x)
                    for t, k, x, m in zip(
                        batch["times"][i],
                        batch["variables"][i],
                        batch["values"][i],
                        batch["mask"][i],
                        strict=True,
                    )
                    if m and k == v and hours[i, n] <= t < hours[i, n] + 4
                ]
                assert bool(seen[i, n, v]) == bool(here)
                assert mean[i, n, v].item() == pytest.approx(
                    np.mean(here) if here else 0.0, abs=1e-5
                )


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["events/gru", "events/strats"])
def test_the_loss_is_the_formula_on_what_the_network_forecasts(rows, backbone):
    made, batch = (
        task(rows, "forecast", backbone, horizon=4.0, presence=0.5, after=2.0),
        take(rows, np.arange(8)),
    )
    objective = made.objective
    if backbone == "events/gru":
        found = made.backbone(batch)
        tokens, hours, real = found.tokens, found.stages["times"], found.mask
    else:
        cut, hours = objective.cut_at_an_hour(batch)
        assert (
            cut["times"][cut["mask"]] < hours.expand_as(cut["times"])[cut["mask"]]
        ).all() and cut["mask"].sum() < batch["mask"].sum()
        tokens, real = made.backbone(cut).pooled[:, None], cut["mask"].any(1)[:, None]
    mean, seen = objective.ahead(batch, hours)
    value, logit = objective.head(tokens).unflatten(-1, (2, 5)).unbind(-2)
    expected = count = 0.0
    # 4 hours before the window's end
    for i, n in (real & seen.any(2) & (hours <= 20.0)).nonzero().tolist():
        chance = torch.sigmoid(logit[i, n]).double()
        message = -torch.where(seen[i, n], chance, 1 - chance).log()
        squares = [
            min(abs(float(value[i, n, v] - mean[i, n, v])), MAX_ERROR) ** 2
            for v in range(5)
            if seen[i, n, v]
        ]
        expected, count = expected + sum(squares) / 5 + 0.5 * float(message.mean()), count + 1
    total, number, logs = made(batch)
    assert (
        number == count
        and total.item() == pytest.approx(expected, rel=1e-5)
        and set(logs) == {"error", "zero_error", "measured"}
    )


@torch.no_grad()
def test_a_cut_row_is_forecast_without_its_future(rows):
    """The prediction stays when all from the cut on is changed; the loss does not."""
    made, batch = task(rows, "forecast", "events/strats", after=2.0), take(rows, np.arange(8))
    cut, hours = made.objective.cut_at_an_hour(batch)
    earliest = float(hours[batch["mask"].any(1)].min())
    other = future_changed(batch, float(hours.max()))
    keep = [i for i in range(8) if batch["mask"][i].any()]
    again, _ = made.objective.cut_at_an_hour(other)
    torch.testing.assert_close(
        made.backbone(cut).pooled[keep], made.backbone(again).pooled[keep], rtol=0, atol=0
    )
    assert earliest > 2.0 and made(batch)[0] != made(other)[0]


@torch.no_grad()
def test_what_the_window_cuts_off_is_no_absence(rows):
    """Hours whose horizon reaches beyond the window are not forecast: nothing tells what is
    measured there.
    """
    made, batch = task(rows, "forecast", horizon=6.0), take(rows, np.arange(8))
    _, real, _ = made.objective.position_losses(made.backbone, batch)
    hours = made.backbone(batch).stages["times"]
    assert real[hours == 18.0].any() and not real[hours > 18.0].any() and (hours > 18.0).any()
    with pytest.raises(ValueError, match="24 hours ahead are as many as the window has"):
        task(rows, "forecast", horizon=24.0)


def test_rows_without_a_future_take_no_part(rows):
    made = task(rows, "forecast")
    total, count, _ = made(take(rows, [1]))
    assert total.item() == 0 and count.item() == 0
    total.backward()


@pytest.mark.parametrize(
    ("objective", "backbone"),
    [("forecast", "events/gru"), ("forecast", "events/strats"), ("masked_events", "events/strats")],
)
def test_forecast_learns_and_trains_every_part(rows, objective, backbone):
    torch.manual_seed(0)
    made, batch = task(rows, objective, backbone), take(rows, np.arange(8))
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        total, count, _ = made(batch)
        optimizer.zero_grad()
        (total / count).backward()
        assert not losses or all(p.grad is not None for p in made.parameters())
        optimizer.step()
        losses.append(float(total.detach() / count))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


@torch.no_grad()
def test_hidden_events_are_those_of_the_keys_and_none_is_read(rows):
    made, batch = (
        task(rows, "masked_events", "events/strats", values=0.5, events=0.3),
        take(rows, np.arange(8)),
    )
    caught = []
    hook = made.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append((args[0], kwargs["token_mask"])),
        with_kwargs=True,
    )
    total, count, _ = made(batch)
    assert (total, count) == made(batch)[:2] and count == 7  # the row without events
    hook.remove()
    (seen, hidden), _ = caught
    assert not (hidden & ~batch["mask"]).any() and (seen["values"][hidden] == 0).all()
    gone = batch["mask"] & ~seen["mask"]
    assert (
        0.4 < hidden.sum() / batch["mask"].sum() < 0.6
        and 0.1 < gone.sum() / batch["mask"].sum() < 0.25
        and not (hidden & gone).any()
    )
    features = made.backbone(seen, token_mask=hidden)
    values = made.objective.value(features.tokens)[..., 0]
    chance = torch.sigmoid(made.objective.left_out(features.pooled)).double()
    expected = 0.0
    for i in range(8):
        if batch["mask"][i].any():
            which = hidden[i].nonzero()[:, 0]
            expected += (
                float((values[i, which] - batch["values"][i, which]).square().mean())
                if len(which)
                else 0.0
            )
            message = torch.zeros(5, dtype=torch.bool)
            message[batch["variables"][i][gone[i]]] = True
            expected -= float(torch.where(message, chance[i], 1 - chance[i]).log().mean())
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_trained_is_refused(rows):
    with pytest.raises(
        ValueError, match="no token for each event: masked_events takes events/strats"
    ):
        task(rows, "masked_events")
    with pytest.raises(ValueError, match="both 0"):
        task(rows, "masked_events", "events/strats", values=0.0, events=0.0)


@torch.no_grad()
def test_events_that_augmentation_drops_are_forecast_and_left_out(rows):
    """The network must not learn that what it does not see is not measured."""
    batch = take(rows, np.arange(8))
    modality = type(rows.modality)(
        rows.modality.options.model_copy(update={"drop": 0.6}), rows.modality.state
    )
    dropped = modality.augment(batch)
    assert 0 < dropped["mask"].sum() < 0.6 * batch["mask"].sum()
    hours = torch.arange(1, 21).float().expand(8, -1)
    objective = task(rows, "forecast", horizon=4.0).objective
    for found, want in zip(
        objective.ahead(dropped, hours), objective.ahead(batch, hours), strict=True
    ):
        torch.testing.assert_close(found, want)
    seen = {}
    one = task(rows, "masked_events", "events/strats", values=0.5, events=0.0)
    hook = one.objective.left_out.register_forward_hook(
        lambda module, inputs, output: seen.update(logits=output.float())
    )
    _, entropy, _, _ = one.objective._rows(one.backbone, dropped)
    hook.remove()
    lost = batch["mask"] & ~dropped["mask"]
    counts = torch.zeros(8, rows.modality.inputs()["variables"])
    counts.scatter_add_(1, batch["variables"], lost.float())
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        seen["logits"], (counts > 0).float(), reduction="none"
    )
    torch.testing.assert_close(entropy, want.mean(1))
