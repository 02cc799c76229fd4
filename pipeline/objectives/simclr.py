"""Contrastive pretraining on images without labels: SimCLR (Chen et al., ICML 2020).

Shapes: N rows of the global batch, B rows of this rank's part.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective, View
from pipeline.core.nn.all_gather import all_gather_rows, loss_of_own_rows
from pipeline.core.nn.losses import without_autocast
from pipeline.core.specs import State


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
        description="hidden width of the projection head; none: the backbone's, as in the paper",
    )
    width: int = Field(128, ge=1, description="width of the projections that are compared")
    area: float = Field(0.08, gt=0, le=1, description="smallest share of the image in a crop")
    jitter: float = Field(
        1.0, ge=0, description="strength of the colour jitter; 0.5 suits small images"
    )
    blur: float = Field(
        0.5, ge=0, le=1, description="probability of a blur; the paper takes 0 at 32 px"
    )


@register("objective", "simclr", options=SimCLROptions)
class SimCLR(Objective):
    """SimCLR: bring two views of a row nearer to each other than to other rows' views (NT-Xent).

    It needs images alone, and large batches: a view is compared with the views of all other rows of
    the step. Use it to pretrain any image backbone without labels. Chen et al. 2020, "A
    Simple Framework for Contrastive Learning of Visual Representations".

    Views are compared after a projection head, which is dropped later. N rows have 2 N terms, one
    a view. Logged: ``top1``, the share of views whose nearest view is the row's other one.

    In validation a row is compared with the rows of its evaluation batch only, so that loss
    depends on how the split is cut into batches.
    """

    metrics = ("loss",)
    log_names = ("top1",)

    def __init__(self, backbone: Backbone, options: SimCLROptions, state: State):
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        if "size" not in inputs:
            raise ValueError(
                f"{backbone.arch.name}: simclr compares views of images; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        hidden = options.hidden or backbone.pooled_dim
        self.head = nn.Sequential(
            nn.Linear(backbone.pooled_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, options.width),
        )

    def views(self) -> tuple[View, ...]:
        """Return two views of the same kind."""
        options = self.options
        view = View(area=(options.area, 1.0), strength=options.jitter, blur=options.blur)
        return view, view

    def _project(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Return (B, 2, width) unit vectors of both views.

        Both go through the backbone as one batch: its norm statistics are of both.
        """
        both = batch.replace(image=torch.cat([batch["view0"], batch["view1"]]))
        projected = self.head(backbone(both).pooled).float()
        unit = F.normalize(projected, dim=1)
        return unit.view(2, len(batch), -1).transpose(0, 1)

    def _losses(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, 2) losses and hits of (N, 2, width) unit vectors."""
        n = len(projected)
        with without_autocast(projected):
            flat = projected.reshape(2 * n, -1)
            logits = flat @ flat.T / self.options.temperature
        itself = torch.eye(2 * n, dtype=torch.bool, device=projected.device)
        logits = logits.masked_fill(itself, float("-inf"))
        other_view = torch.arange(2 * n, device=projected.device) ^ 1
        losses = F.cross_entropy(logits, other_view, reduction="none")
        hits = logits.argmax(1) == other_view
        return losses.view(n, 2), hits.view(n, 2)

    def loss(self, backbone: Backbone, batch: Batch):
        everyone, first = all_gather_rows(self._project(backbone, batch))
        losses, hits = self._losses(everyone)
        own_rows = slice(first, first + len(batch))
        total = loss_of_own_rows(losses, own_rows)
        count = total.new_full((), 2.0 * len(batch))
        return total, count, {"top1": hits[own_rows].sum()}

    def forward_without_rows(self, backbone: Backbone) -> None:
        """Gather no rows from this rank."""
        weight = next(self.head.parameters())
        all_gather_rows(weight.new_zeros(0, 2, self.options.width, dtype=torch.float32))

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, summed over both views, and ``count``, both (B,)."""
        losses, _ = self._losses(self._project(backbone, batch))
        count = torch.full((len(batch),), 2.0, device=losses.device)
        return {"loss": losses.sum(1), "count": count}
