"""Language modelling on packed documents or on texts, masked (mlm) and causal (clm).

Masked: Devlin et al. 2019, with the dynamic masks of Liu et al. 2019. Causal: Radford et al. 2019.

``predict`` returns for each row ``loss`` (the sum over what was predicted, in nats) and ``count``;
on packed rows also ``bytes``, the UTF-8 bytes of what was predicted, for bits per byte: unlike
perplexity it does not depend on how the tokenizer cuts the text. A row's bytes are those of all
its tokens (``bytes`` of the batch, spread evenly over each document's tokens), of which the
predicted share counts.

Shapes: B rows, N tokens of a row, k places to predict, V tokens of the vocabulary, D width
of the state of a token.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch
from pipeline.core.contracts.backbone_capabilities import (
    causal_head_settings,
    longest_continued,
    masked_head_settings,
)
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.inputs import Inputs
from pipeline.core.nn.position_losses import PositionLosses
from pipeline.core.rng import uniform
from pipeline.core.specs import State

NEVER = 2.0
"""Above every uniform number: the place of tokens that are not to be chosen."""
IGNORED = -100
"""Target of a place that is not predicted."""
OUTPUT_STD = 0.02
"""Standard deviation of a new output layer, as in GPT-2."""


class MaskedOptions(Options):
    mask_share: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="share of the positions to predict; 80 % masked, 10 % random, 10 % kept",
    )
    whole_word: bool = Field(False, description="mask all tokens of a word or none")


class CausalOptions(Options):
    generate: int = Field(
        0,
        ge=0,
        description="new tokens that predict writes behind each text, cut to the modality's "
        "length; fewer where the model ends the text",
    )
    temperature: float = Field(
        0.0, ge=0, description="of what generate draws from; 0: always the likeliest token"
    )
    top_k: int | None = Field(
        None, ge=1, description="generate draws from so many likeliest tokens; none: from all"
    )


@register("objective", "mlm", options=MaskedOptions)
class MaskedLM(PositionLosses):
    """Masked language modelling: predict hidden tokens from both sides.

    It needs texts and an encoder (BERT, RoBERTa and the like). Use it to pretrain, or to train
    a checkpoint further, on texts without labels. Devlin et al. 2019 (BERT), with the dynamic masks
    of Liu et al. 2019 (RoBERTa).

    Every row predicts at most the same number of positions. So shapes are fixed, and scores over
    the vocabulary are computed for these positions only. Padding does not count: in a batch with
    long texts the same tokens of a short text are masked as when it is alone.

    With ``whole_word`` (Devlin's whole-word masking of 2019) words are drawn, all tokens of a
    drawn word are predicted, and the word that no longer fits whole is left out. A word is a token
    and those that continue it (``continuing`` of the modality), within one document's part of a
    row; words longer than a row's number of positions are never drawn.

    Bits per byte is here an estimate of the pseudo-likelihood (Salazar et al. 2020), not comparable
    with a causal model's: each token is seen from both sides. A row's bytes count by the share of
    its tokens that were predicted among those that encode text. Unknown words are never predicted,
    and a row's bytes are spread over its tokens, long unknown words among them: it is for
    tokenizers with (nearly) no unknown words.
    """

    metrics = ("perplexity", "bits_per_byte", "loss")
    transformers_head = TransformersHead("ForMaskedLM")
    log_names = ("accuracy",)
    packed = True
    output_types = {}

    def __init__(self, backbone: Backbone, options: MaskedOptions, state: State):
        """Make the output layers; the output is tied to the input embedding.

        Raises:
            ValueError: a causal backbone, one whose pooler would never be trained, a tokenizer
                without a mask of its own, or ``whole_word`` without ``continuing``.
        """
        super().__init__(backbone, options, state)
        from transformers.activations import ACT2FN

        embedding = backbone.embedding()
        inputs = backbone.arch.inputs
        name = backbone.arch.name
        if backbone.causal:
            raise ValueError(
                f"{name} is causal: masked prediction needs a bidirectional backbone "
                "(transformers/bert, hf/modernbert), or use clm"
            )
        if backbone.arch.options.get("pool") == "pooler":
            raise ValueError(
                f"{name}: mlm never reads the pooler, so it would not be trained; leave out pool: "
                "pooler"
            )
        specials = inputs["specials"]
        *others, self.mask_id = specials
        if self.mask_id in others:
            other_use = ("pad", "unk", "cls", "sep")[others.index(self.mask_id)]
            raise ValueError(
                f"{name}: mlm puts the mask in the place of tokens, and token {self.mask_id} is "
                f"this tokenizer's mask and its {other_use} too (GPT-2's has one special token "
                "for all): give a tokenizer with a mask of its own, or use clm with "
                "transformers/gpt2"
            )
        assert backbone.token_dim is not None
        width = embedding.embedding_dim
        activation, eps = masked_head_settings(backbone)
        self.transform = nn.Sequential(
            nn.Linear(backbone.token_dim, width), ACT2FN[activation], nn.LayerNorm(width, eps=eps)
        )
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        self.vocabulary: int = inputs["vocabulary"]
        not_text = {token for i, token in enumerate(specials) if i != 1}  # unknown words are text
        self.register_buffer("specials", torch.tensor(sorted(set(specials))), persistent=False)
        self.register_buffer("silent", torch.tensor(sorted(not_text)), persistent=False)
        if options.whole_word:
            continuing = _continuing(name, inputs, embedding.num_embeddings)
            self.register_buffer("continuing", continuing, persistent=False)

    # ---------------------------------------------------------------- what is masked

    def chosen_positions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions (B, k), whether they count (B, k), and tokens (B, N) with masks.

        All of it follows from the rows' keys.
        """
        tokens = batch["tokens"]
        k = max(1, round(self.options.mask_share * tokens.shape[1]))
        if self.options.whole_word:
            positions, valid = self._words(batch, k)
        else:
            positions, valid = self._tokens(batch, k)
        how = uniform(batch.keys, k, stream=1)
        other = uniform(batch.keys, k, stream=2)
        random = (other * self.vocabulary).long()
        random = random.clamp(max=self.vocabulary - 1)  # the product may be rounded up
        old = tokens.gather(1, positions)
        new = torch.where(how < 0.9, random, old)
        new = torch.where(how < 0.8, self.mask_id, new)
        new = torch.where(valid, new, old)
        masked = tokens.scatter(1, positions, new)
        return positions, valid, masked

    def _most(self, batch: Batch, k: int) -> Tensor:
        """Return (B, 1) how many of the k positions each row may use.

        The share of its tokens without padding, at least one.
        """
        is_packed = "segments" in batch.data
        real = batch["segments"] > 0 if is_packed else _mask(batch)
        share = self.options.mask_share * real.sum(1, keepdim=True)
        return share.round().long().clamp(1, k)

    def _tokens(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Return positions (B, k) of tokens, and whether they count (B, k)."""
        tokens = batch["tokens"]
        u = uniform(batch.keys, tokens.shape[1])
        u = torch.where(self._is_text(tokens), u, NEVER)
        values, positions = u.topk(k, dim=1, largest=False)
        is_within_share = torch.arange(k, device=tokens.device) < self._most(batch, k)
        is_text = values < NEVER
        return positions, is_text & is_within_share

    def _is_text(self, tokens: Tensor) -> Tensor:
        """Return (B, N) true for the tokens that may be chosen."""
        return ~torch.isin(tokens, self.specials)  # type: ignore[arg-type]

    def _words(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """Return positions (B, k) of whole words, and whether they count (B, k).

        A word's tokens share the number sampled for its first one, so sorting by it keeps them
        together; only the last word can be cut.
        """
        tokens = batch["tokens"]
        n = tokens.shape[1]
        is_text = self._is_text(tokens)
        most = self._most(batch, k)
        positions = torch.arange(n, device=tokens.device).expand_as(tokens)

        # a word begins where a token does not continue the text before it
        begins = torch.ones_like(is_text)
        is_continuing = self.continuing[tokens[:, 1:]]  # type: ignore[index]
        begins[:, 1:] = ~(is_continuing & is_text[:, :-1])
        if "segments" in batch.data:
            segments = batch["segments"]
            begins[:, 1:] |= segments[:, 1:] != segments[:, :-1]
        word = torch.where(begins, positions, 0).cummax(1).values
        counts = torch.zeros_like(tokens)
        counts = counts.scatter_add(1, word, torch.ones_like(tokens))
        size = counts.gather(1, word)

        u = uniform(batch.keys, n).gather(1, word)
        can_be_masked = is_text & (size <= most)
        u = torch.where(can_be_masked, u, NEVER)
        values, order = u.sort(dim=1, stable=True)
        word = word.gather(1, order)
        last = word.gather(1, most - 1)
        next_one = word.gather(1, most.clamp(max=n - 1))
        is_cut = (last == next_one) & (most < n)
        cut_word = torch.where(is_cut, last, -1)
        valid = (values < NEVER) & (positions < most) & (word != cut_word)
        return order[:, :k], valid[:, :k]

    # ---------------------------------------------------------------- loss and predictions

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return losses, weights and hits of the tokens that may be hidden, (B, k) each."""
        positions, valid, tokens = self.chosen_positions(batch)
        masked = batch.replace(tokens=tokens)
        hidden = backbone(masked, want=("tokens",)).tokens
        assert hidden is not None
        index = positions[:, :, None].expand(-1, -1, hidden.shape[2])
        hidden = hidden.gather(1, index)
        scores = self._scores(backbone, hidden)
        target = batch["tokens"].gather(1, positions)
        flat_scores = scores.flatten(0, 1).float()
        losses = F.cross_entropy(flat_scores, target.flatten(), reduction="none")
        weight = valid.to(losses.dtype)
        hits = (scores.argmax(-1) == target) & valid
        return losses.view_as(target) * weight, weight, {"accuracy": hits}

    def _scores(self, backbone: Backbone, hidden: Tensor) -> Tensor:
        """Return (..., V) scores of the vocabulary for (..., D) states."""
        return F.linear(self.transform(hidden), backbone.embedding().weight, self.bias)

    def logits(self, backbone, batch):
        return self._scores(backbone, backbone(batch, want=("tokens",)).tokens)

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and ``count`` (B,), and ``bytes`` (B,) where the batch has them.

        Bytes are those of the predicted share of the tokens that encode text, unknown words
        among them, which are never predicted.
        """
        predictions = super().predict(backbone, batch)
        if "bytes" in batch.data:
            is_text = ~torch.isin(batch["tokens"], self.silent)  # type: ignore[arg-type]
            num_text = is_text.sum(1).clamp(min=1)
            predictions["bytes"] = batch["bytes"] * predictions["count"] / num_text
        return predictions

    def output_columns(self, predictions, raw_rows):
        """Return the predictions with ``perplexity``, NaN where nothing was predicted."""
        return _with_perplexity(predictions)


@register("objective", "clm", options=CausalOptions)
class CausalLM(PositionLosses):
    """Next-token prediction within each document.

    It needs texts and a decoder (``transformers/gpt2``, Llama, Qwen and the like). Use it to
    pretrain, or to train a checkpoint further, on texts without labels, or to write texts.
    Radford et al. 2018 (GPT) and 2019 (GPT-2).

    The output is the token embedding, or a layer ``output`` where the family has one (Llama).

    The bytes of a packed row are those of its predicted tokens: all tokens, or all but the first
    if the row continues a document of the row before.

    With ``generate``, ``predict`` also writes ``generated``: the model's continuation of each
    text, without the text's own end. A text longer than the modality's ``length`` is cut there
    first and continued from the cut, where its loss counts an end of text. Where what is left
    leaves too few positions, its last tokens are the prompt. Draws follow from the row's key
    alone, so they are the same in any batch. Packed rows (those that a target is evaluated on
    while it trains) are not continued.
    """

    metrics = ("perplexity", "bits_per_byte", "loss")
    transformers_head = TransformersHead("LMHeadModel")
    packed = True
    output_types = {}

    def __init__(self, backbone: Backbone, options: CausalOptions, state: State):
        """Raise ValueError for a backbone that sees the future, or has no room to generate."""
        super().__init__(backbone, options, state)
        name = backbone.arch.name
        embedding = backbone.embedding()
        if not backbone.causal:
            raise ValueError(
                f"{name} sees the future: causal prediction needs transformers/gpt2 or another "
                "causal model (hf/llama, hf/qwen3), or use mlm"
            )
        is_tied, self.softcap = causal_head_settings(backbone)
        self.output: nn.Linear | None = None
        if not is_tied:
            assert backbone.token_dim is not None
            self.output = nn.Linear(backbone.token_dim, embedding.num_embeddings, bias=False)
            nn.init.normal_(self.output.weight, std=OUTPUT_STD)
        elif embedding.embedding_dim != backbone.token_dim:
            raise ValueError(
                f"{name}: its states have {backbone.token_dim} numbers, its token embedding "
                f"{embedding.embedding_dim}, so it cannot be the output of clm: set "
                "tie_word_embeddings: false in its config"
            )
        self.positions = longest_continued(backbone)
        if options.generate and options.generate >= self.positions:
            raise ValueError(
                f"clm: generate {options.generate} leaves no place for a text in the "
                f"{self.positions} positions of {name}"
            )
        if options.top_k and not options.temperature:
            raise ValueError(
                f"clm: top_k {options.top_k} draws from several tokens, temperature 0 always takes "
                "the likeliest: set temperature too (1.0)"
            )
        self.vocabulary: int = backbone.arch.inputs["vocabulary"]
        self.pad_id, _, self.begin_id, self.end_id, _ = backbone.arch.inputs["specials"]

    def position_losses(self, backbone: Backbone, batch: Batch):
        """Return losses and weights (B, N - 1) of the tokens behind the first one."""
        hidden = backbone(batch, want=("tokens",)).tokens
        assert hidden is not None
        scores = self._scores(backbone, hidden[:, :-1])
        if "segments" in batch.data:
            segments = batch["segments"]
            real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        else:
            real = _mask(batch)[:, 1:]
        target = torch.where(real, batch["tokens"][:, 1:], IGNORED)
        losses = F.cross_entropy(
            scores.flatten(0, 1).float(),
            target.flatten(),
            reduction="none",
            ignore_index=IGNORED,
        )
        return losses.view_as(target), real.to(losses.dtype), {}

    def _scores(self, backbone: Backbone, hidden: Tensor) -> Tensor:
        """Return (..., V) scores of the vocabulary for (..., D) states."""
        output = backbone.embedding() if self.output is None else self.output
        scores = F.linear(hidden, output.weight)
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)

    def logits(self, backbone, batch):
        return self._scores(backbone, backbone(batch, want=("tokens",)).tokens)

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and ``count`` (B,), and ``bytes`` (B,) where the batch has them.

        With ``generate`` also ``generated`` (B, generate) ids, -1 behind their end.
        """
        losses, weight, _ = self.position_losses(backbone, batch)
        predictions = {"loss": losses.sum(1), "count": weight.sum(1)}
        if "bytes" in batch.data:
            # a document's first token is followed by another one, an end of text is not
            continues = (batch["tokens"][:, 0] != self.begin_id) | (weight[:, 0] == 0)
            num_tokens = predictions["count"] + continues.to(weight.dtype)
            predicted_bytes = batch["bytes"] * predictions["count"]
            predictions["bytes"] = predicted_bytes / num_tokens.clamp(min=1)
        if self.options.generate and "segments" not in batch.data:
            predictions["generated"] = self._generate(backbone, batch)
        return predictions

    # ---------------------------------------------------------------- generation

    def _prompts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, n) tokens that end at the right, and where they are real (B, n).

        The texts without their end mark; of long ones the last tokens.
        """
        tokens = batch["tokens"]
        lengths = _mask(batch).sum(1)
        last_position = (lengths - 1).clamp(min=0)[:, None]
        last = tokens.gather(1, last_position)[:, 0]
        has_end = (last == self.end_id) & (lengths > 1)
        lengths = lengths - has_end.long()
        longest = max(1, int(lengths.max()))
        n = min(longest, self.positions - self.options.generate)
        first = lengths[:, None] - n
        positions = first + torch.arange(n, device=tokens.device)
        real = positions >= 0
        prompts = tokens.gather(1, positions.clamp(min=0))
        return torch.where(real, prompts, self.pad_id), real

    @torch.no_grad()
    def _generate(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Return (B, generate) ids that follow each text, -1 from its end on.

        Keys and values of earlier tokens are kept.
        """
        count = self.options.generate
        tokens, mask = self._prompts(batch)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        past = None
        out = torch.full(
            (len(tokens), count),
            -1,
            dtype=torch.int64,
            device=tokens.device,
        )
        has_ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        u = uniform(batch.keys, count, stream=3)
        advance: Any = backbone.advance
        for step in range(count):
            hidden, past = advance(tokens, mask, positions, past)
            scores = self._scores(backbone, hidden[:, -1])
            scores = scores[:, : self.vocabulary].float()
            new = self.sample_tokens(scores, u[:, step])
            has_ended = has_ended | (new == self.end_id)
            if bool(has_ended.all()):
                break
            out[:, step] = torch.where(has_ended, -1, new)
            tokens = torch.where(has_ended, self.pad_id, new)[:, None]
            positions = positions[:, -1:] + 1
            one_more = torch.ones_like(mask[:, :1])
            mask = torch.cat([mask, one_more], dim=1)
        return out

    def sample_tokens(self, scores: Tensor, u: Tensor) -> Tensor:
        """Return (B,) ids: the likeliest, or one sampled from the top ones by probability.

        Args:
            scores: (B, V).
            u: (B,) uniform numbers, compared with the cumulated probabilities.
        """
        if not self.options.temperature:
            return scores.argmax(1)
        k = min(self.options.top_k or scores.shape[1], scores.shape[1])
        values, ids = scores.topk(k, dim=1)
        probabilities = (values / self.options.temperature).softmax(1)
        is_below = probabilities.cumsum(1) <= u[:, None]
        index = is_below.sum(1, keepdim=True).clamp(max=k - 1)
        return ids.gather(1, index)[:, 0]

    def output_columns(self, predictions, raw_rows):
        """Return the predictions with ``perplexity`` of each row, and ``generated`` as text."""
        columns = _with_perplexity(predictions)
        if "generated" in predictions:
            ids = [row[row >= 0].tolist() for row in predictions["generated"]]
            tokenizer: Any = raw_rows.modality.tokenizer  # type: ignore[attr-defined]
            generated = np.empty(len(ids), dtype=object)
            generated[:] = tokenizer.decode_batch(ids, skip_special_tokens=True)
            columns["generated"] = generated
        return columns


def _mask(batch: Batch) -> Tensor:
    """Return (B, N) true where a token is real."""
    everywhere = torch.ones_like(batch["tokens"], dtype=torch.bool)
    return batch.data.get("mask", everywhere)


def _with_perplexity(predictions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = predictions["count"]
    mean = np.full(len(count), np.nan, dtype=np.float32)
    np.divide(predictions["loss"], count, out=mean, where=count > 0)
    perplexity = np.exp(np.minimum(mean, 80.0)).astype(np.float32)
    return {**predictions, "perplexity": perplexity}


def _continuing(name: str, inputs: Inputs, size: int) -> Tensor:
    """Return (size,) bool: tokens that continue a word.

    Raises:
        ValueError: the modality gave none.
    """
    if "continuing" not in inputs:
        raise ValueError(
            f"{name}: whole_word needs the tokens that go on a word (continuing), and this "
            "modality or this older bundle does not tell them; leave whole_word out, or make the "
            "source anew"
        )
    data = np.frombuffer(base64.b64decode(inputs["continuing"]), dtype=np.uint8)
    bits = np.unpackbits(data)[: inputs["vocabulary"]].astype(bool)
    continuing = torch.zeros(size, dtype=torch.bool)
    continuing[: len(bits)] = torch.from_numpy(bits)
    return continuing
