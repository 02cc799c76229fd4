"""Contrastive pretraining on images without labels: SimCLR (Chen et al., ICML 2020)."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective, View
from pipeline.nn.all_gather import gather


class SimCLROptions(Options):
    temperature: float = Field(
        0.2,
        gt=0,
        description="divisor of the similarities; the paper: 0.1 for long runs and large batches, "
        "0.5 for short ones",
    )
    hidden: int | None = Field(
        None,
        ge=1,
        description="width of the projection head's middle; none: the backbone's, as in the paper",
    )
    width: int = Field(128, ge=1, description="width of the projections that are compared")
    area: float = Field(0.08, gt=0, le=1, description="smallest share of the image in a crop")
    jitter: float = Field(
        1.0, ge=0, description="strength of the colour jitter; 0.5 suits small images"
    )
    blur: float = Field(
        0.5, ge=0, le=1, description="how probable a blur is; the paper takes none at 32 px"
    )


@register("objective", "simclr", options=SimCLROptions)
class SimCLR(Objective):
    """Two views of a row are to be nearer to each other than to the views of all other rows of the
    global batch (NT-Xent), after an MLP that is dropped later. Of N rows there are 2 N terms;
    ``top1`` is the share of views whose nearest is the row's other view.

    In validation a row is compared with those of its evaluation batch only, so that loss depends on
    how the split is cut into batches.
    """

    metrics = ("loss",)
    log_names = ("top1",)
    couples_rows = True

    def __init__(self, backbone: Backbone, options: SimCLROptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs = backbone.arch["inputs"]
        if "size" not in inputs:
            raise ValueError(
                f"{backbone.arch['name']}: simclr compares views of images; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        hidden = options.hidden or backbone.pooled_dim
        self.head = nn.Sequential(
            nn.Linear(backbone.pooled_dim, hidden), nn.ReLU(), nn.Linear(hidden, options.width)
        )

    def views(self) -> tuple[View, ...]:
        o = self.options
        return (View(area=(o.area, 1.0), strength=o.jitter, blur=o.blur),) * 2

    def _projected(self, backbone: Backbone, batch: Batch) -> Tensor:
        """(B, 2, width) unit vectors of both views, which go through the backbone as one batch (its
        norm statistics are of both).
        """
        both = batch.replace(image=torch.cat([batch["view0"], batch["view1"]]))
        return (
            F.normalize(self.head(backbone(both).pooled).float(), dim=1)
            .view(2, len(batch), -1)
            .transpose(0, 1)
        )

    def _losses(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 2) losses and hits from (N, 2, width) unit vectors."""
        n = len(z)
        with torch.autocast(
            z.device.type, enabled=False
        ):  # a bfloat16 product has errors of the size of a temperature
            flat = z.reshape(2 * n, -1)
            logits = flat @ flat.T / self.options.temperature
        own = torch.arange(2 * n, device=z.device)
        logits = logits.masked_fill(
            torch.eye(2 * n, dtype=torch.bool, device=z.device), float("-inf")
        )
        positive = own ^ 1
        return F.cross_entropy(logits, positive, reduction="none").view(n, 2), (
            logits.argmax(1) == positive
        ).view(n, 2)

    def loss(self, backbone: Backbone, batch: Batch):
        everyone, first = gather(self._projected(backbone, batch))
        losses, hits = self._losses(everyone)
        mine = slice(first, first + len(batch))
        whole = losses.sum()
        total = losses[mine].sum().detach() + (
            whole - whole.detach()
        )  # the value of this rank's rows, the gradient of all rows' loss
        return total, total.new_full((), 2.0 * len(batch)), {"top1": hits[mine].sum()}

    def forward_without_rows(self, backbone: Backbone) -> None:
        gather(
            next(self.head.parameters()).new_zeros(0, 2, self.options.width, dtype=torch.float32)
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        losses, _ = self._losses(self._projected(backbone, batch))
        return {
            "loss": losses.sum(1),
            "count": torch.full((len(batch),), 2.0, device=losses.device),
        }
