"""Prediction of the next audio sample, without labels: how WaveNet is pretrained.

After van den Oord et al. 2016, section 2. Shapes: B rows, n samples of a row.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.contracts.backbone_capabilities import predicts_samples
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

CROP_STREAM = 1 << 18
"""Random stream of the crops, apart from the modality's changes, which follow from the same
keys.
"""

LEVELS = 256


class NextSampleOptions(Options):
    crop: float | None = Field(
        0.5,
        gt=0,
        description="seconds of a row that are read at a time: a random crop in training, the "
        "middle in evaluation; none: whole rows, which takes memory",
    )
    hidden: int = Field(
        256, ge=1, description="channels between the two 1 x 1 convolutions of the head"
    )


@register("objective", "next_sample", options=NextSampleOptions)
class NextSample(PositionLosses):
    """Next-sample prediction: a softmax over the 256 mu-law levels of a sample (WaveNet).

    It needs recordings alone, and the backbone ``wavenet/wavenet``. Use it to pretrain that
    network without transcripts.

    The head reads the sum of the skip connections: ReLU, 1 x 1, ReLU, 1 x 1 (van den Oord et al.
    2016, section 2.2 and figure 4). The loss is in nats, in float32, summed over the samples that
    have one before them in their crop; ``bits_per_sample`` is logged.

    A crop begins where the row's key says. In evaluation it is the middle of the row: recordings
    begin and end in silence, which is easy to predict.
    """

    metrics = ("bits_per_sample", "loss")
    log_names = ("bits_per_sample", "accuracy")

    def __init__(self, backbone: Backbone, options: NextSampleOptions, state: State):
        """Raise ValueError for a backbone that is not causal at the rate of the samples."""
        super().__init__(backbone, options, state)
        if not predicts_samples(backbone):
            raise ValueError(
                f"{backbone.arch.name} cannot predict the next sample: that takes a causal "
                "backbone at the rate of the samples (wavenet/wavenet); for others use ctc, or "
                "wav2vec2 with transformers/wav2vec2, torchaudio/deepspeech2 or conformer"
            )
        assert backbone.token_dim is not None
        self.crop: int | None = None
        """Samples of a crop."""
        if options.crop is not None:
            self.crop = max(2, round(options.crop * backbone.arch.inputs["rate"]))
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Linear(backbone.token_dim, options.hidden),
            nn.ReLU(),
            nn.Linear(options.hidden, LEVELS),
        )

    def cropped(self, batch: Batch) -> Batch:
        """Return the batch with a crop of each row's ``wave`` and ``mask``.

        The crop of a row lies outside its padding; a shorter row is kept whole.
        """
        wave = batch["wave"]
        mask = batch["mask"]
        if self.crop is None or wave.shape[1] <= self.crop:
            return batch
        room = (mask.sum(1) - self.crop).clamp(min=0)
        if self.training:
            share = uniform(batch.keys, 1, CROP_STREAM)[:, 0].double()
            start = (share * (room + 1)).long()
        else:
            start = room // 2
        samples = start[:, None] + torch.arange(self.crop, device=wave.device)
        return batch.replace(wave=wave.gather(1, samples), mask=mask.gather(1, samples))

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return (B, n - 1) losses in nats, weights and hits of the samples behind the first."""
        batch = self.cropped(batch)
        features = backbone(batch, want=("latent",))
        assert features.latent is not None
        levels: Tensor = backbone.levels(batch["wave"])[:, 1:]  # type: ignore[operator]
        scores = self.head(features.latent[:, :-1])
        weight = batch["mask"][:, 1:]
        flat_scores = scores.flatten(0, 1).float()
        flat = F.cross_entropy(flat_scores, levels.flatten(), reduction="none")
        losses = flat.view_as(levels) * weight
        # the layers over tokens are part of the graph: DDP waits for every gradient
        losses = losses + 0.0 * features.pooled.sum()
        hits = (scores.argmax(-1) == levels) & weight
        return losses, weight.float(), {"accuracy": hits}

    def loss(self, backbone: Backbone, batch: Batch):
        total, count, logs = super().loss(backbone, batch)
        return total, count, {"bits_per_sample": total.detach() / math.log(2), **logs}

    def after_training(self, backbone: Backbone) -> None:
        """Initialise the layers over tokens anew: nothing trained them."""
        backbone.renew_frames()  # type: ignore[operator]
