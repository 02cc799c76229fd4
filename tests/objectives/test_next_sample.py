"""Next-sample prediction: the paper's loss in a plain loop, from the past alone, on stretches that
follow from the rows' keys.
"""

import math

import numpy as np
import pytest
import torch
from torchaudio.functional import mu_law_encoding
from toys import task_of

from pipeline.core.contracts import Batch
from pipeline.core.contracts.objective_capabilities import CouplesRows
from pipeline.objectives.next_sample import NextSample

INPUTS = {"features": "wave", "rate": 100, "channels": 1, "convolutions": []}
SMALL = {
    "layers": 3,
    "stacks": 2,
    "residual": 6,
    "skip": 16,
    "pool": 10,
    "frame_layers": 1,
    "frame_kernel": 3,
}


def make(
    crop: float | None = None, seed: int = 2, inputs=None, name: str = "wavenet/wavenet", **backbone
):
    return task_of(
        name,
        inputs or INPUTS,
        "next_sample",
        seed=seed,
        options={"crop": crop, "hidden": 32},
        **(backbone or SMALL),
    )


def waves(*sizes: int, seed: int = 0, keys=None) -> Batch:
    mask = torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]
    wave = (torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * mask
    return Batch(
        np.arange(len(sizes)),
        torch.arange(len(sizes)) * 7919 + 5 if keys is None else keys,
        {"wave": wave, "mask": mask},
    )


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_next_level():
    """One sample after the other from the latent alone; the first one has nothing before it,
    padding is not counted.
    """
    task, sizes = make().eval(), (30, 1, 17, 0, 2)
    batch, head = waves(*sizes), task.objective.head
    latent = task.backbone(batch, want=("latent",)).latent
    totals = []
    for row, size in enumerate(sizes):
        level, own = mu_law_encoding(batch["wave"][row], 256), 0.0
        for t in range(1, size):
            hidden = (head[1].weight @ latent[row, t - 1].relu() + head[1].bias).relu()
            scores = (head[3].weight @ hidden + head[3].bias).double()
            own += float(scores.logsumexp(0) - scores[level[t]])
        totals.append(own)
    loss, count, logs = task(batch)
    assert float(loss) == pytest.approx(sum(totals), rel=1e-5) and count == 29 + 0 + 16 + 0 + 1
    assert float(logs["bits_per_sample"]) == pytest.approx(sum(totals) / math.log(2), rel=1e-5)
    found = task.objective.predict(task.backbone, batch)
    assert found["count"].tolist() == [29, 0, 16, 0, 1] and found["loss"].tolist() == pytest.approx(
        totals, rel=1e-5
    )


def test_a_prediction_sees_the_past_alone():
    """The loss about sample t has a gradient at the vectors of the samples before it, as far back
    as the receptive field reaches, at no other.
    """
    task, seen = make().eval(), []

    def watch(module, inputs, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    task.backbone.embed.register_forward_hook(watch)
    losses = task.objective.position_losses(task.backbone, waves(40))[0][0]
    field = task.backbone.receptive_field
    for t in range(1, 40):
        own = torch.autograd.grad(losses[t - 1], seen[0], retain_graph=True)[0][0].abs().sum(1)
        assert own.nonzero()[:, 0].tolist() == list(range(max(0, t - field), t)), t


def test_stretches_in_training_follow_the_rows_keys():
    task = make(crop=0.2).train()
    keys = torch.randint(-(2**62), 2**62, (500,), generator=torch.Generator().manual_seed(1))
    batch = waves(*[50] * 500, keys=keys)
    ramp = batch.replace(wave=(torch.arange(50.0) / 100).expand(500, -1))
    found = task.objective.cropped(ramp)
    starts = (found["wave"][:, 0] * 100).round().long()
    assert found["wave"].shape == found["mask"].shape == (500, 20) and found["mask"].all()
    assert torch.equal(found["wave"], (starts[:, None] + torch.arange(20)) / 100.0)
    assert set(starts.tolist()) == set(range(31)), "from the first to the last that is left"
    part = Batch(np.arange(7), keys[90:97], {name: t[90:97] for name, t in ramp.data.items()})
    assert torch.equal(task.objective.cropped(part)["wave"], found["wave"][90:97])


def test_stretches_in_evaluation_are_the_middle_and_hold_no_padding():
    objective = make(crop=0.2).eval().objective
    batch = waves(50, 30, 21, 20, 13, 0)
    found = objective.cropped(batch)
    for row, (start, size) in enumerate(((15, 20), (5, 20), (0, 20), (0, 20), (0, 13), (0, 0))):
        assert found["mask"][row].sum() == size
        assert torch.equal(found["wave"][row, :size], batch["wave"][row, start : start + size])
    assert objective.cropped(waves(15, 9))["wave"].shape == (2, 15), "shorter rows stay as they are"
    assert make(crop=None).objective.cropped(batch) is batch


@torch.no_grad()
def test_a_row_has_its_loss_in_any_batch():
    task = make(crop=0.4).eval()
    batch = waves(90, 25, 41, 0)
    found = task.objective.predict(task.backbone, batch)
    for row, size in enumerate((90, 25, 41)):
        one = Batch(
            np.arange(1),
            batch.keys[row : row + 1],
            {name: t[row : row + 1, :size] for name, t in batch.data.items()},
        )
        alone = task.objective.predict(task.backbone, one)
        assert (
            float(found["loss"][row]) == pytest.approx(float(alone["loss"][0]), rel=1e-5)
            and found["count"][row] == alone["count"][0] == min(size, 40) - 1
        )


def test_every_parameter_has_a_gradient():
    """DDP waits for each: also for the layers over tokens, which this loss does not read."""
    task = make()
    task(waves(40, 30))[0].backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    assert all(
        (p.grad == 0).all()
        for name, p in task.named_parameters()
        if name.startswith(("backbone.frames", "backbone.norm"))
    )


def test_layers_over_tokens_leave_as_they_begin():
    """They have no gradient, so that AdamW's decay shrinks them; what they begin as is put back
    before the bundle is written.
    """
    task = make(frame_layers=2, **{k: v for k, v in SMALL.items() if k != "frame_layers"})
    wide = [block.wide.weight for block in task.backbone.frames]
    size = [float(weight.detach().std()) for weight in wide]
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2, weight_decay=10.0)
    for _ in range(30):
        optimizer.zero_grad()
        task(waves(40, 30))[0].backward()
        optimizer.step()
    assert all(
        float(weight.detach().std()) < 0.1 * before
        for weight, before in zip(wide, size, strict=True)
    )
    others = {name: t.clone() for name, t in task.state_dict().items() if ".wide." not in name}
    task.objective.after_training(task.backbone)
    assert all(
        0.7 < float(weight.detach().std()) / before < 1.4
        for weight, before in zip(wide, size, strict=True)
    )
    assert all(torch.equal(task.state_dict()[name], t) for name, t in others.items())


def test_bf16_is_close():
    task = make().eval()
    batch = waves(200, 100)
    loss, count, _ = task(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, _, _ = task(batch)
    assert half.dtype == torch.float32 and float((half - loss).detach().abs() / count) < 0.05


def test_batches_of_nothing_are_stood():
    for batch in (waves(0, 0), waves(1)):
        loss, count, _ = make()(batch)
        loss.backward()
        assert loss == 0 and count == 0


def test_backbones_that_see_the_future_are_refused():
    inputs = {"features": "mel", "rate": 16000, "channels": 8, "convolutions": [[400, 160, 0]]}
    with pytest.raises(
        ValueError,
        match="torchaudio/deepspeech cannot predict the next sample: that takes a causal backbone",
    ):
        make(name="torchaudio/deepspeech", inputs=inputs, hidden=8)


def test_next_sample_learns_a_tone_without_labels():
    """The next level of a slow sine is near the last one: far below the 8 bits of a guess, on
    recordings not trained on.
    """
    assert NextSample.roles == () and not isinstance(NextSample, CouplesRows)

    def tones(n: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        phase, pitch = torch.rand(n, 1, generator=g) * 6, 0.05 + 0.1 * torch.rand(n, 1, generator=g)
        wave = 0.5 * torch.sin(phase + pitch * torch.arange(160))
        return Batch(
            np.arange(n),
            torch.arange(n),
            {"wave": wave, "mask": torch.ones_like(wave, dtype=torch.bool)},
        )

    task = make(crop=2.0, layers=4, stacks=1, residual=24, skip=24, pool=10, frame_layers=0)
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-2)
    for step in range(80):
        loss, count, _ = task(tones(8, seed=step))
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    task.eval()
    _, count, logs = task(tones(8, seed=10_000))
    assert float(logs["bits_per_sample"] / count) < 4
