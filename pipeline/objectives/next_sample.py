"""Prediction of the next sample of audio, without labels: what WaveNet is pretrained with (van den
Oord et al. 2016, section 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.rng import uniform

CROP_STREAM = 1 << 18
"""Keeps the stretches apart from the modality's changes, which follow from the same keys."""

LEVELS = 256


class NextSampleOptions(Options):
    crop: float | None = Field(
        0.5,
        gt=0,
        description="seconds of a row that are read at a time: a random stretch in training, the "
        "middle one in "
        "evaluation; none: whole rows, which takes memory",
    )
    hidden: int = Field(
        256, ge=1, description="channels between the two 1 x 1 convolutions of the head"
    )


@register("objective", "next_sample", options=NextSampleOptions)
class NextSample(Objective):
    """Softmax over the 256 mu-law levels of the sample that follows (section 2.2), from the skip
    connections' sum: ReLU, 1 x 1, ReLU, 1 x 1 (figure 4). The loss is in nats, in float32, summed
    over the samples that have one before them in their stretch; ``bits_per_sample`` is logged.

    A stretch begins where the row's key says. In evaluation it is the middle of the row: recordings
    begin and end in silence, which is easily predicted.

    Raises ValueError for a backbone that does not see the past alone, sample by sample.
    """

    metrics = ("bits_per_sample", "loss")
    log_names = ("bits_per_sample", "accuracy")

    def __init__(self, backbone: Backbone, options: NextSampleOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        if (
            getattr(backbone, "levels", None) is None
            or getattr(backbone, "receptive_field", None) is None
        ):
            raise ValueError(
                f"{backbone.arch['name']} cannot predict the next sample: that takes a causal "
                "backbone at the rate of the samples "
                "(wavenet/wavenet); for others use ctc, or wav2vec2 with "
                "transformers/wav2vec2, torchaudio/deepspeech2 or conformer"
            )
        assert backbone.token_dim is not None
        self.crop: int | None = (
            None
            if options.crop is None
            else max(2, round(options.crop * backbone.arch["inputs"]["rate"]))
        )
        """Samples of a stretch."""
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Linear(backbone.token_dim, options.hidden),
            nn.ReLU(),
            nn.Linear(options.hidden, LEVELS),
        )

    def stretch(self, batch: Batch) -> Batch:
        """``wave`` and ``mask`` (B, at most crop samples): of each row a stretch without padding,
        or the whole of a shorter row.
        """
        wave, mask = batch["wave"], batch["mask"]
        if self.crop is None or wave.shape[1] <= self.crop:
            return batch
        room = (mask.sum(1) - self.crop).clamp(min=0)
        start = (
            (uniform(batch.keys, 1, CROP_STREAM)[:, 0].double() * (room + 1)).long()
            if self.training
            else room // 2
        )
        places = start[:, None] + torch.arange(self.crop, device=wave.device)
        return batch.replace(wave=wave.gather(1, places), mask=mask.gather(1, places))

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, n - 1) losses in nats, weights and hits of the samples behind the first one."""
        batch = self.stretch(batch)
        features = backbone(batch, want=("latent",))
        assert features.latent is not None
        levels: Tensor = backbone.levels(batch["wave"])[:, 1:]  # type: ignore[operator]
        scores = self.head(features.latent[:, :-1])
        weight = batch["mask"][:, 1:]
        losses = (
            F.cross_entropy(
                scores.flatten(0, 1).float(), levels.flatten(), reduction="none"
            ).view_as(levels)
            * weight
        )
        losses = (
            losses + 0.0 * features.pooled.sum()
        )  # the frames' layers take part: DDP waits for every parameter's gradient
        return losses, weight.float(), (scores.argmax(-1) == levels) & weight

    def loss(self, backbone: Backbone, batch: Batch):
        losses, weight, hits = self._rows(backbone, batch)
        total = losses.sum()
        return (
            total,
            weight.sum(),
            {"bits_per_sample": total.detach() / math.log(2), "accuracy": hits.sum()},
        )

    def after_training(self, backbone: Backbone) -> None:
        """The layers over tokens, which nothing trained, leave as they begin."""
        backbone.renew_frames()  # type: ignore[operator]

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``loss`` (B,) in nats and ``count`` (B,), the samples that were predicted."""
        losses, weight, _ = self._rows(backbone, batch)
        return {"loss": losses.sum(1), "count": weight.sum(1)}
