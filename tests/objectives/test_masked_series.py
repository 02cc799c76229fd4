"""Masked pretraining on regular series: what is hidden, and what is told."""

import pytest
import torch
from contract_rows import HF_SERIES, OBJECTIVES, windows
from toys import take, task_of

from pipeline.models.hf import HuggingFace


def built(**options):
    task, rows, _, _ = OBJECTIVES["masked_series"].build("masked_series")
    task = task_of(
        "hf/patchtst", rows.modality.inputs(), "masked_series", options=options, config=HF_SERIES
    )
    return task.eval(), take(rows, range(8))


@torch.no_grad()
def test_the_loss_is_that_of_hidden_known_numbers():
    """A head of zeros predicts the mean of what is left of the channel."""
    task, batch = built(together=False)
    task.objective.head.weight.zero_()
    task.objective.head.bias.zero_()
    hidden = task.objective.hidden(batch)
    assert hidden.view(8, 4, 8, 3).float().mean(2).unique().tolist() == [0.0, 1.0]
    assert 0.3 < hidden.float().mean() < 0.5 and not torch.equal(hidden[..., 0], hidden[..., 1])
    losses = task.objective.predict(task.backbone, batch)["loss"]
    for row in range(8):
        differences = []
        for channel in range(3):
            x, known, gone = (
                one[row, :, channel] for one in (batch["series"], batch["known"], hidden)
            )
            left = x[known & ~gone]
            if len(left):
                differences.append(x[known & gone] - left.mean())
        expected = torch.cat(differences).square().mean()
        torch.testing.assert_close(losses[row], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_hidden_is_not_seen(monkeypatch):
    task, batch = built()
    hidden = task.objective.hidden(batch)
    assert torch.equal(hidden[..., 0], hidden[..., 2])
    seen = []
    forward = HuggingFace.forward
    monkeypatch.setattr(
        HuggingFace,
        "forward",
        lambda self, b, **words: (seen.append(b), forward(self, b, **words))[1],
    )
    # missing numbers are filled in from those of the row, hidden ones too
    unseen = hidden | ~batch["known"]
    assert (unseen & ~hidden).any()
    other = batch.replace(series=torch.where(unseen, 100.0, batch["series"]))
    for one in (batch, other):
        task.objective.predict(task.backbone, one)
    assert torch.equal(seen[0]["series"], seen[1]["series"])
    assert not (seen[0]["known"] & hidden).any()


def test_patches_that_are_no_tokens_are_refused():
    inputs = windows().fitted("hf/patchtst").inputs()
    with pytest.raises(ValueError, match="patch_stride equal to patch_length"):
        task_of("hf/patchtst", inputs, "masked_series", config={**HF_SERIES, "patch_stride": 4})
