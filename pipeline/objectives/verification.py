"""Verification: are two rows of the same speaker, face or object? By the angle of embeddings.

Shapes: B rows of a batch, n rows of a table, D features, E width of an embedding, C identities of
the training rows.
"""

from __future__ import annotations

import math
from typing import TypedDict

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import LinearHeadOptions, register
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.identity_numbers import identity_numbers
from pipeline.core.nn import losses
from pipeline.core.nn.linear_head import head_inputs

MIN_SINE_SQUARED = 1e-7
"""Least squared sine of an angle.

The gradient of sqrt is infinite at 0, and 1 - x in float32 is exact only to about 1e-7.
"""


class VerificationOptions(LinearHeadOptions):
    width: int = Field(128, ge=2, description="width of an embedding")
    scale: float = Field(30.0, gt=0, description="what cosines are multiplied by in training")
    margin: float = Field(
        0.2,
        ge=0,
        lt=1.5,
        description="angle, in radians, that is added between a row and its own identity in "
        "training; 0.2 is usual for speakers, 0.5 for faces",
    )


class VerificationState(TypedDict):
    """State of `Verification`."""

    identities: list[int]
    """Numbers of the identities of the training rows (`identity_number`), in rising order."""


@register("objective", "verification", options=VerificationOptions)
class Verification(Objective):
    """Verification: embeddings of which the cosine tells whether two rows have the same identity.

    It needs rows with an identity, several of each. Use it where the question is whether two
    rows show the same person or thing, also of identities that training did not see; if all
    identities are known in training, take ``classification``.

    An embedding is a linear projection of the pooled features, of length 1. It is trained to tell
    the identities of the training rows apart, with an additive angular margin (ArcFace, Deng et al.
    2019; AAM-softmax of speakers). The weights of these identities are not needed afterwards.

    Rows of the validation and test splits may be of identities that no training row has. Equal
    error rate and detection cost compare all pairs of rows of a split. The loss is that of the rows
    whose identity is known from training.

    A target starts with the projection of a source that was trained for verification with the same
    options `width` and `norm`.
    """

    state: VerificationState
    roles = ("identity",)
    needed_roles = roles
    metrics = ("eer", "min_dcf", "loss")
    log_names = ("accuracy",)
    label_kind = "identities"
    label_tensor = "identity"
    output_types = {}

    @classmethod
    def target_metrics(cls, options, state: VerificationState):
        """Leave out the loss, which test rows of new identities do not have."""
        return ("eer", "min_dcf")

    @classmethod
    def fit(cls, options, table, columns) -> VerificationState:
        """Number the identities of the training rows.

        Raises:
            ValueError: there is one identity only, or the column holds no names or whole numbers.
        """
        name = columns["identity"]
        identities = np.unique(identity_numbers(table[name].drop_null(), name))
        if len(identities) < 2:
            raise ValueError(
                f"column {name}: verification needs rows of at least two identities, better of "
                f"many; the training rows have {len(identities)}"
            )
        return {"identities": identities.tolist()}

    @classmethod
    def encode(cls, table, columns, state: VerificationState) -> Arrays:
        """Return ``identity`` (n,) int64 numbers, and ``label`` (n,) int64.

        The label is the place of the identity among those of the training rows, or -1 where none of
        them has it.
        """
        name = columns.get("identity", "")
        if name not in table.column_names:  # new rows to predict
            return {}
        identity = identity_numbers(table[name], name)
        known = np.array(state["identities"], dtype=np.int64)
        place = np.searchsorted(known, identity).clip(max=len(known) - 1)
        return {"identity": identity, "label": np.where(known[place] == identity, place, -1)}

    @classmethod
    def check_test(cls, options, table, columns, state: VerificationState):
        """Raise ValueError where the rows have no pair of one identity, or none of two."""
        name = columns["identity"]
        rows_of_each = np.unique(identity_numbers(table[name], name), return_counts=True)[1]
        if len(rows_of_each) < 2 or rows_of_each.max() < 2:
            raise ValueError(
                f"column {name}: {len(table)} rows of {len(rows_of_each)} identities; verification "
                "compares rows of the same and of different identities, so it needs two rows of "
                "one and a row of another"
            )

    def __init__(self, backbone: Backbone, options: VerificationOptions, state: VerificationState):
        super().__init__(backbone, options, state)
        self.projection = nn.Linear(backbone.pooled_dim, options.width)
        self.identities = nn.Parameter(torch.empty(len(state["identities"]), options.width))
        nn.init.normal_(self.identities)  # of any direction; their length does not matter

    def is_transferable(self, options, name):
        """Return whether a tensor of a source's head can be used.

        The projection can, if `width` and `norm` are equal; the weights of identities never can.
        """
        source = VerificationOptions(**options)
        is_alike = (source.width, source.norm) == (self.options.width, self.options.norm)
        return name.startswith("projection.") and is_alike

    @classmethod
    def unseen_inputs(cls, source_inputs, target_inputs):
        """The projection reads pooled features, whatever the inputs are."""
        return ""

    def embed(self, pooled: Tensor) -> Tensor:
        """Return embeddings (B, E) of length 1 of pooled features (B, D).

        In float32 under autocast too: bfloat16 has 3 digits, and many pairs would be equal.
        """
        pooled = losses.at_least_float32(pooled)
        pooled = head_inputs(pooled, self.options, self.training)
        with losses.without_autocast(pooled):
            return F.normalize(self.projection(pooled), dim=-1)

    def _losses(self, embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Compare embeddings (B, E) with the identities of the training rows.

        Returns:
            (B,) losses, 0 for rows of unknown identity.
            (B,) bool, whether the nearest identity is the row's own.
        """
        with losses.without_autocast(embedding):
            cosines = embedding @ F.normalize(self.identities.to(embedding), dim=-1).T
        is_known = label >= 0
        known = label.clamp(min=0)
        scores = self.options.scale * with_margin(cosines, known, self.options.margin)
        row_losses = F.cross_entropy(scores, known, reduction="none")
        return row_losses * is_known, cosines.argmax(1) == label

    def loss(self, backbone: Backbone, batch: Batch):
        label = batch["label"]
        row_losses, is_nearest = self._losses(self.embed(backbone(batch).pooled), label)
        return row_losses.sum(), (label >= 0).sum().to(row_losses), {"accuracy": is_nearest.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``embedding`` (B, E), and with identities ``identity``, ``loss`` and ``count``."""
        embedding = self.embed(backbone(batch).pooled)
        if "identity" not in batch.data:
            return {"embedding": embedding}
        label = batch["label"]
        return {
            "embedding": embedding,
            "identity": batch["identity"],
            "loss": self._losses(embedding, label)[0],
            "count": (label >= 0).to(embedding.dtype),
        }

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``embedding`` (B, E), the scores at length 1, and with identities ``identity``."""
        predicted = {"embedding": F.normalize(scores, dim=-1)}
        if "identity" in batch.data:
            predicted["identity"] = batch["identity"]
        return predicted

    def raw_outputs(self, backbone, batch):
        """`embedding` (B, E) of length 1: the dot product of two is their cosine, which is larger
        for two rows of the same identity.
        """
        return {"embedding": self.embed(backbone(batch).pooled)}

    def output_columns(self, predictions, raw_rows):
        """Return ``embedding`` (n, E). The dot product of two is the score of a pair."""
        return {"embedding": predictions["embedding"]}


def with_margin(cosines: Tensor, label: Tensor, margin: float) -> Tensor:
    """Return the cosines (B, C) with that of each row's own identity at an angle larger by
    ``margin``.

    cos(angle + margin) would rise again where the sum is above pi: there the cosine itself is
    lowered, by margin * sin(margin), as in the authors' code.

    Args:
        cosines: Of rows and identities.
        label: (B,) number of each row's identity.
        margin: In radians.
    """
    own = cosines.gather(1, label[:, None])
    sine = (1 - own.square()).clamp(min=MIN_SINE_SQUARED).sqrt()
    moved = own * math.cos(margin) - sine * math.sin(margin)
    falls = own > -math.cos(margin)
    moved = torch.where(falls, moved, own - margin * math.sin(margin))
    return cosines.scatter(1, label[:, None], moved)
