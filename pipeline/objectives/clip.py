"""Contrastive pretraining on rows with captions: CLIP (Radford et al., ICML 2021).

Shapes: N rows of the global batch, B rows of this rank's part, n rows of a table, L tokens of the
longest caption, D pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import is_bytes, is_text
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.identity_numbers import identity_number, identity_numbers
from pipeline.core.nn.all_gather import all_gather_rows, loss_of_own_rows
from pipeline.core.nn.losses import at_least_float32, without_autocast
from pipeline.core.ragged import lengths, pad, ragged
from pipeline.media import tokenization
from pipeline.media.tagging_schemes import texts

MAX_SCALE = 100.0
"""Cosines are multiplied by at most this (section 2.5 of the paper)."""


class CLIPOptions(Options):
    width: int = Field(256, ge=1, description="width of the text tower")
    layers: int = Field(4, ge=1, description="transformer layers of the text tower")
    heads: int = Field(4, ge=1, description="attention heads of each of them")
    length: int = Field(
        32, ge=3, description="tokens of a caption, with [CLS] and [SEP]; longer ones are cut"
    )
    vocabulary: int = Field(
        8192,
        ge=256,
        le=1_000_000,
        description="largest vocabulary of the tokenizer (WordPiece), trained on the captions",
    )
    lowercase: bool = Field(True, description="captions in lower case, without accents")
    temperature: float = Field(
        0.07,
        ge=0.01,
        description="divisor of the cosines at the start; it is learned, down to 0.01",
    )

    @model_validator(mode="after")
    def _heads_share_width(self):
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} must be a multiple of heads: {self.heads}")
        return self


class CLIPState(TypedDict):
    """State of `CLIP`."""

    tokenizer: str
    """JSON of the tokenizer."""
    vocabulary: int
    """How many tokens there are."""
    length: int
    """Tokens of the longest caption that is read."""


class TextTower(nn.Module):
    """A transformer that reads a caption from left to right, as the paper's: each layer normalises
    first, and the last token of a caption stands for all of it.
    """

    def __init__(self, vocabulary: int, options: CLIPOptions, out: int):
        super().__init__()
        width = options.width
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(options.length, width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        layers = (
            nn.TransformerEncoderLayer(
                width,
                options.heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(options.layers)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out, bias=False)

    def forward(self, tokens: Tensor, num_tokens: Tensor) -> Tensor:
        """Return (B, out) of (B, L) token ids and the (B,) tokens of each row."""
        places = tokens.shape[1]
        hidden = self.embedding(tokens) + self.positions[:places]
        mask = nn.Transformer.generate_square_subsequent_mask(
            places, device=tokens.device, dtype=hidden.dtype
        )
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.project(self.norm(hidden[rows, num_tokens - 1]))


def centred_unit(vectors: Tensor) -> Tensor:
    """Subtract the mean of each vector (..., D), and scale it to length 1."""
    vectors = at_least_float32(vectors)
    return F.normalize(vectors - vectors.mean(-1, keepdim=True), dim=-1)


@register("objective", "clip", options=CLIPOptions)
class CLIP(Objective):
    """CLIP: bring a row nearer to its own caption than to the other captions, and each caption
    nearer to its own row.

    It needs rows with captions, the more the better. Use it to pretrain without class labels,
    and to name classes by texts (``zero_shot``). Radford et al. 2021, "Learning Transferable
    Visual Models From Natural Language Supervision".

    Columns: ``caption``, a text, and where an image has several captions, each in a row of its own,
    ``image_id``, which is the same in its rows. Tensors: ``caption`` (B, L) int32 token ids,
    ``caption_lengths`` (B,), and ``caption_number`` and ``image_number`` (B,), the same where the
    tokens or the image are; an image without id has number -1. Rows are images, or whatever the
    backbone reads.

    A row's loss is the mean of two cross-entropies, over captions and over rows; the logits are
    cosines divided by a learned temperature. Other rows of the same image (``image_id``) are left
    out of both. The pooled features themselves are compared with the output of the text tower,
    without a projection, both without their mean. So texts about classes are the weights of a
    linear head on normalised features, by which `zero_shot` classifies. Only the backbone goes on
    to targets that are trained. Logged: ``top1``, the share of rows whose nearest caption is their
    own.

    In validation a row is compared with the rows of its evaluation batch only, so the validation
    loss depends on the batch size. Recalls compare all validation rows, 30,000 at most, evenly
    spread.
    """

    state: CLIPState
    roles = ("caption",)
    optional_roles = ("image_id",)
    metrics = (
        "loss",
        "image_to_text_recall_at_1",
        "image_to_text_recall_at_5",
        "text_to_image_recall_at_1",
        "text_to_image_recall_at_5",
    )
    log_names = ("top1",)

    @classmethod
    def fit(cls, options, table, columns) -> CLIPState:
        """Train the tokenizer on the captions of the training rows.

        Raises:
            ValueError: a column of no texts, or no caption at all.
        """
        captions = [text for text in _captions(table, columns) if text]
        if not captions:
            raise ValueError(f"column {columns['caption']}: no row holds a caption")
        tokenizer = tokenization.train_tokenizer(
            captions, "wordpiece", options.vocabulary, options.lowercase
        )
        return {
            "tokenizer": tokenizer.to_str(),
            "vocabulary": tokenizer.get_vocab_size(),
            "length": options.length,
        }

    @classmethod
    def encode(cls, table, columns, state: CLIPState) -> Arrays:
        """Return ``caption`` (n,) ragged int32 token ids, and the numbers of captions and images.

        Raises:
            ValueError: image ids that are neither texts nor whole numbers.
        """
        if columns.get("caption") not in table.column_names:  # new rows
            return {}
        tokens = _tokens(_captions(table, columns), state)
        numbers = [identity_number(row.tobytes()) for row in tokens]
        return {
            "caption": tokens,
            "caption_number": np.array(numbers, dtype=np.int64),
            "image_number": _image_numbers(table, columns),
        }

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: CLIPState):
        """Name rows whose caption is null or empty."""
        if columns.get("caption") not in table.column_names:
            return [""] * len(table)
        captions = _captions(table, columns)
        return ["" if text else "the caption is empty" for text in captions]

    def __init__(self, backbone: Backbone, options: CLIPOptions, state: CLIPState):
        super().__init__(backbone, options, state)
        self.text = TextTower(state["vocabulary"], options, backbone.pooled_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(options.temperature)))

    # ---------------------------------------------------------------- loss and predictions

    def _embeddings(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the (B, D) unit embeddings of rows and of captions."""
        captions = self.text(batch["caption"], batch["caption_lengths"])
        return centred_unit(backbone(batch).pooled), centred_unit(captions)

    def _pairs(self, rows: Tensor, captions: Tensor) -> Tensor:
        """Return (B, 2, D): embeddings of the rows, times the scale, and of their captions.

        The scale is multiplied in before rows are gathered. If it were done after that, each rank
        would count its gradient for all rows.
        """
        return torch.stack([self.log_scale.exp() * rows, captions], dim=1)

    @staticmethod
    def _losses(pairs: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) losses and hits of (N, 2, D) pairs, whose images have numbers (N,)."""
        with without_autocast(pairs):
            scores = pairs[:, 0] @ pairs[:, 1].T
        own = torch.arange(len(pairs), device=pairs.device)
        is_same_image = (images[:, None] == images) & (images >= 0)
        scores = scores.masked_fill(is_same_image.fill_diagonal_(False), -math.inf)
        of_rows = F.cross_entropy(scores, own, reduction="none")
        of_captions = F.cross_entropy(scores.T, own, reduction="none")
        return (of_rows + of_captions) / 2, scores.argmax(1) == own

    def loss(self, backbone: Backbone, batch: Batch):
        pairs, first = all_gather_rows(self._pairs(*self._embeddings(backbone, batch)))
        images, _ = all_gather_rows(batch["image_number"])
        losses, hits = self._losses(pairs, images)
        own_rows = slice(first, first + len(batch))
        total = loss_of_own_rows(losses, own_rows)
        return total, total.new_full((), float(len(batch))), {"top1": hits[own_rows].sum()}

    def forward_without_rows(self, backbone: Backbone) -> None:
        """Gather no rows from this rank."""
        all_gather_rows(self.log_scale.new_zeros(0, 2, backbone.pooled_dim))
        all_gather_rows(torch.zeros(0, dtype=torch.int64, device=self.log_scale.device))

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int, steps: int) -> None:
        """Keep the scale of the cosines at most 100."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return what the metrics read; of rows without captions ``embedding`` (B, D), of length 1.

        Returns:
            ``loss`` (B,), ``image_embedding`` and ``caption_embedding`` (B, D) of length 1, and
            ``image_number`` and ``caption_number`` (B,).
        """
        if "caption" not in batch.data:
            return {"embedding": centred_unit(backbone(batch).pooled)}
        rows, captions = self._embeddings(backbone, batch)
        losses, _ = self._losses(self._pairs(rows, captions), batch["image_number"])
        return {
            "loss": losses,
            "image_embedding": rows,
            "caption_embedding": captions,
            "image_number": batch["image_number"],
            "caption_number": batch["caption_number"],
        }

    # ---------------------------------------------------------------- classes by their names

    @torch.no_grad()
    def head_of_texts(self, texts: Sequence[str]) -> Tensor:
        # the head reads layer-normed features of length sqrt(D): divide by it to get cosines
        device = self.log_scale.device
        rows = _tokens(texts, self.state)
        tokens = torch.as_tensor(pad(rows), device=device)
        vectors = centred_unit(self.text(tokens, torch.as_tensor(lengths(rows), device=device)))
        return self.log_scale.exp() * vectors / math.sqrt(vectors.shape[1])


# ---------------------------------------------------------------- captions


def _captions(table: pa.Table, columns: dict[str, str]) -> list[str | None]:
    """Return the captions. Raises ValueError for a column of something else."""
    name = columns["caption"]
    kind = table[name].type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (is_text(values) or is_bytes(values) or pa.types.is_null(values)):
        raise ValueError(f"column {name}: it holds {kind} values; a caption is one text a row")
    return [text and text.strip() for text in texts(table[name])]


def _image_numbers(table: pa.Table, columns: dict[str, str]) -> np.ndarray:
    """Return (n,) int64 numbers of the images, -1 where a row has no image id."""
    numbers = np.full(len(table), -1, dtype=np.int64)
    name = columns.get("image_id", "")
    if name in table.column_names:
        has_id = table[name].is_valid().to_numpy()
        numbers[has_id] = identity_numbers(table[name].drop_null(), name)
    return numbers


def _tokens(captions: Sequence[str | None], state: CLIPState) -> np.ndarray:
    """Return (n,) ragged int32 token ids, ``[CLS] caption [SEP]``."""
    tokenizer = _tokenizer(state["tokenizer"])
    cls, sep = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    room = state["length"] - 2
    documents = [(text or "").encode() for text in captions]
    encoded = tokenization.encode_first(tokenizer, documents, room, np.int32)
    ids = ([cls, *one.ids[:room], sep] for one in encoded)
    return ragged(np.array(one, dtype=np.int32) for one in ids)


@lru_cache(maxsize=2)
def _tokenizer(text: str) -> Tokenizer:
    return Tokenizer.from_str(text)
