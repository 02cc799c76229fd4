"""Language modelling on packed documents or on texts: masked (Devlin et al. 2019; dynamic masks,
Liu et al. 2019) and causal (Radford et al. 2019).

``predict`` gives for each row ``loss`` (the sum over what was predicted, in nats) and ``count``; on
packed rows also ``bytes``, the UTF-8 bytes of what was predicted, for bits per byte: unlike
perplexity it does not depend on how the tokenizer cuts the text. A row's bytes are those of all its
tokens (``bytes`` of the batch, spread evenly over each document's tokens), of which the predicted
share counts.
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
from pipeline.core.contracts import Backbone, Batch, Objective, RawRows
from pipeline.core.rng import uniform

NEVER = 2.0
"""Above every uniform number: the place of tokens that are not to be chosen."""


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
        "length; fewer where the model "
        "ends the text",
    )
    temperature: float = Field(
        0.0, ge=0, description="of what generate draws from; 0: always the likeliest token"
    )
    top_k: int | None = Field(
        None, ge=1, description="generate draws from so many likeliest tokens; none: from all"
    )


@register("objective", "mlm", options=MaskedOptions)
class MaskedLM(Objective):
    """Every row predicts at most the same number of positions, so shapes are fixed and only those
    go through the vocabulary. Padding takes no share: a short text beside long ones has as many of
    its tokens masked as alone, and the same ones.

    With ``whole_word`` (Devlin's whole-word masking of 2019) words are drawn, all tokens of a drawn
    word are predicted, and the word that no longer fits whole is left out. A word is a token and
    those that go on it (``continuing`` of the modality), within one document's part of a row; words
    longer than a row's number of positions are never drawn.

    Bits per byte is here an estimate of the pseudo-likelihood (Salazar et al. 2020), not comparable
    with a causal model's: each token is seen from both sides. A row's bytes count by the share of
    its tokens that were predicted among those that stand for text. Unknown words are never
    predicted, and a row's bytes are spread over its tokens, long unknown words among them: it
    compares tokenizers that spell (nearly) everything.

    Raises ValueError for a causal backbone, for one whose pooler would never be trained, for a
    tokenizer without a mask of its own, and where ``whole_word`` lacks ``continuing``.
    """

    metrics = ("perplexity", "bits_per_byte", "loss")
    log_names = ("accuracy",)
    packed = True

    def __init__(self, backbone: Backbone, options: MaskedOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        from transformers.activations import ACT2FN

        embedding, name, inputs = (
            backbone.embedding(),
            backbone.arch["name"],
            backbone.arch["inputs"],
        )
        if backbone.causal:
            raise ValueError(
                f"{name} is causal: masked prediction needs a bidirectional backbone "
                "(transformers/bert), or use clm"
            )
        if backbone.arch["options"].get("pool") == "pooler":
            raise ValueError(
                f"{name}: mlm never reads the pooler, so it would not be trained; leave out "
                "pool: pooler"
            )
        self.mask_id, others = inputs["specials"][-1], inputs["specials"][:-1]
        if self.mask_id in others:
            raise ValueError(
                f"{name}: mlm puts the mask in the place of tokens, and token {self.mask_id} "
                "is this tokenizer's mask and its "
                f"{('pad', 'unk', 'cls', 'sep')[others.index(self.mask_id)]} too (GPT-2's has "
                "one special token for all): give a tokenizer "
                "with a mask of its own, or use clm with transformers/gpt2"
            )
        width = embedding.embedding_dim
        activation, eps = (
            getattr(backbone, "activation", "gelu"),
            getattr(backbone, "norm_eps", 1e-12),
        )
        self.transform = nn.Sequential(
            nn.Linear(width, width), ACT2FN[activation], nn.LayerNorm(width, eps=eps)
        )
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))
        self.vocabulary: int = inputs["vocabulary"]
        self.register_buffer(
            "specials", torch.tensor(sorted(set(inputs["specials"]))), persistent=False
        )
        self.register_buffer(
            "silent",
            torch.tensor(sorted({id_ for i, id_ in enumerate(inputs["specials"]) if i != 1})),
            persistent=False,
        )
        if options.whole_word:
            self.register_buffer(
                "continuing", _continuing(name, inputs, embedding.num_embeddings), persistent=False
            )

    def _chosen(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, k) positions, (B, k) whether they count, (B, N) tokens with the masks put in; all
        from the rows' keys.
        """
        tokens = batch["tokens"]
        k = max(1, round(self.options.mask_share * tokens.shape[1]))
        places, valid = self._words(batch, k) if self.options.whole_word else self._tokens(batch, k)
        how, other = uniform(batch.keys, k, stream=1), uniform(batch.keys, k, stream=2)
        random = (
            (other * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        )  # the product may be rounded up
        old = tokens.gather(1, places)
        new = torch.where(how < 0.8, self.mask_id, torch.where(how < 0.9, random, old))
        return places, valid, tokens.scatter(1, places, torch.where(valid, new, old))

    def _most(self, batch: Batch, k: int) -> Tensor:
        """(B, 1) how many of the k positions each row may use: the share of its tokens, padding not
        counted, and one at least.
        """
        real = (
            batch["segments"] > 0
            if "segments" in batch.data
            else batch.data.get("mask", torch.ones_like(batch["tokens"], dtype=torch.bool))
        )
        return (self.options.mask_share * real.sum(1, keepdim=True)).round().long().clamp(1, k)

    def _tokens(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """(B, k) positions and (B, k) whether they count."""
        tokens = batch["tokens"]
        u = torch.where(self._text(tokens), uniform(batch.keys, tokens.shape[1]), NEVER)
        values, places = u.topk(k, dim=1, largest=False)
        return places, (values < NEVER) & (
            torch.arange(k, device=tokens.device) < self._most(batch, k)
        )

    def _text(self, tokens: Tensor) -> Tensor:
        """(B, N) true for the tokens that may be chosen."""
        return ~torch.isin(tokens, self.specials)  # type: ignore[arg-type]

    def _words(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """(B, k) positions of whole words and (B, k) whether they count.

        A word's tokens share the number drawn for its first one, so sorting by it keeps them
        together; only the last word can be cut.
        """
        tokens = batch["tokens"]
        able, most = self._text(tokens), self._most(batch, k)
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        begins = torch.ones_like(able)
        begins[:, 1:] = ~(self.continuing[tokens[:, 1:]] & able[:, :-1])  # type: ignore[index]
        if "segments" in batch.data:
            begins[:, 1:] |= batch["segments"][:, 1:] != batch["segments"][:, :-1]
        word = torch.where(begins, places, 0).cummax(1).values
        size = (
            torch.zeros_like(tokens).scatter_add(1, word, torch.ones_like(tokens)).gather(1, word)
        )
        u = torch.where(
            able & (size <= most), uniform(batch.keys, tokens.shape[1]).gather(1, word), NEVER
        )
        values, order = u.sort(dim=1, stable=True)
        word = word.gather(1, order)
        last, behind = word.gather(1, most - 1), word.gather(1, most.clamp(max=tokens.shape[1] - 1))
        cut = torch.where((last == behind) & (most < tokens.shape[1]), last, -1)
        return order[:, :k], (values[:, :k] < NEVER) & (places[:, :k] < most) & (word[:, :k] != cut)

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B, k) losses, (B, k) weights, (B, k) hits."""
        places, valid, tokens = self._chosen(batch)
        hidden = backbone(batch.replace(tokens=tokens), want=("tokens",)).tokens
        assert hidden is not None
        hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
        scores = F.linear(self.transform(hidden), backbone.embedding().weight, self.bias)
        target = batch["tokens"].gather(1, places)
        losses = F.cross_entropy(
            scores.flatten(0, 1).float(), target.flatten(), reduction="none"
        ).view_as(target)
        weight = valid.to(losses.dtype)
        return losses * weight, weight, (scores.argmax(-1) == target) & valid

    def loss(self, backbone: Backbone, batch: Batch):
        losses, weight, hits = self._rows(backbone, batch)
        return losses.sum(), weight.sum(), {"accuracy": hits.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``loss`` and ``count`` (B,), and ``bytes`` (B,) where the batch has them: those of the
        predicted share of the tokens that stand for text, unknown words among them, which are never
        predicted.
        """
        losses, weight, _ = self._rows(backbone, batch)
        out = {"loss": losses.sum(1), "count": weight.sum(1)}
        if "bytes" in batch.data:
            spelt = ~torch.isin(batch["tokens"], self.silent)  # type: ignore[arg-type]
            out["bytes"] = batch["bytes"] * out["count"] / spelt.sum(1).clamp(min=1)
        return out

    def output_columns(
        self, found: dict[str, np.ndarray], raw_rows: RawRows
    ) -> dict[str, np.ndarray]:
        """With ``perplexity`` of each row (NaN where nothing was predicted)."""
        return _with_perplexity(found)


@register("objective", "clm", options=CausalOptions)
class CausalLM(Objective):
    """Next-token prediction within each document; the output is tied to the input embedding.

    Of a packed row's bytes, those of the predicted tokens count: all but, where the row goes on a
    document begun in the row before, its first one.

    With ``generate``, ``predict`` also writes ``generated``: what the model says behind each text,
    without the text's own end. A text longer than the modality's ``length`` is cut there first: it
    is gone on with from the cut, where its loss counts an end of text. Of what is left and leaves
    too few positions the last tokens are the prompt. Draws follow from the row's key alone, so they
    are the same in any batch. Packed rows (those that a target is evaluated on while it trains) are
    not gone on with.

    Raises ValueError for a backbone that sees the future, or that has no room for what is to be
    generated.
    """

    metrics = ("perplexity", "bits_per_byte", "loss")
    packed = True

    def __init__(self, backbone: Backbone, options: CausalOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        name = backbone.arch["name"]
        backbone.embedding()
        if not backbone.causal:
            raise ValueError(
                f"{name} sees the future: causal prediction needs transformers/gpt2, or use mlm"
            )
        self.positions = int(getattr(backbone, "positions", 0))
        if options.generate and options.generate >= self.positions:
            raise ValueError(
                f"clm: generate {options.generate} leaves no place for a text in the "
                f"{self.positions} positions of {name}"
            )
        if options.top_k and not options.temperature:
            raise ValueError(
                f"clm: top_k {options.top_k} draws from several tokens, temperature 0 always "
                "takes the likeliest: set temperature too (1.0)"
            )
        self.vocabulary: int = backbone.arch["inputs"]["vocabulary"]
        self.pad_id, _, self.begin_id, self.end_id, _ = backbone.arch["inputs"]["specials"]

    def _rows(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, N - 1) losses and weights of the tokens behind the first one."""
        hidden = backbone(batch, want=("tokens",)).tokens
        assert hidden is not None
        tokens = batch["tokens"]
        scores = F.linear(hidden[:, :-1], backbone.embedding().weight)
        if "segments" in batch.data:
            segments = batch["segments"]
            real = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        else:
            real = batch.data.get("mask", torch.ones_like(tokens, dtype=torch.bool))[:, 1:]
        target = torch.where(real, tokens[:, 1:], -100)
        losses = F.cross_entropy(
            scores.flatten(0, 1).float(), target.flatten(), reduction="none", ignore_index=-100
        ).view_as(target)
        return losses, real.to(losses.dtype)

    def loss(self, backbone: Backbone, batch: Batch):
        losses, weight = self._rows(backbone, batch)
        return losses.sum(), weight.sum(), {}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``loss`` and ``count`` (B,), ``bytes`` (B,) where the batch has them, ``generated`` (B,
        generate) ids, -1 behind their end.
        """
        losses, weight = self._rows(backbone, batch)
        out = {"loss": losses.sum(1), "count": weight.sum(1)}
        if "bytes" in batch.data:
            goes_on = ((batch["tokens"][:, 0] != self.begin_id) | (weight[:, 0] == 0)).to(
                weight.dtype
            )  # a first token has one behind it, an end none
            out["bytes"] = batch["bytes"] * out["count"] / (out["count"] + goes_on).clamp(min=1)
        if self.options.generate and "segments" not in batch.data:
            out["generated"] = self._generated(backbone, batch)
        return out

    def _prompts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, n) tokens that end at the right, and (B, n) true where they are: the texts without
        their end mark, their last tokens where they are long.
        """
        tokens = batch["tokens"]
        mask = batch.data.get("mask", torch.ones_like(tokens, dtype=torch.bool))
        lengths = mask.sum(1)
        last = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        lengths = lengths - ((last == self.end_id) & (lengths > 1)).long()
        n = min(max(1, int(lengths.max())), self.positions - self.options.generate)
        places = lengths[:, None] - n + torch.arange(n, device=tokens.device)
        return torch.where(
            places >= 0, tokens.gather(1, places.clamp(min=0)), self.pad_id
        ), places >= 0

    @torch.no_grad()
    def _generated(self, backbone: Backbone, batch: Batch) -> Tensor:
        """(B, generate) int64 ids that follow each text, -1 from its end on; keys and values of
        what stands before are kept.
        """
        tokens, mask = self._prompts(batch)
        positions, past = (mask.long().cumsum(1) - 1).clamp(min=0), None
        out = torch.full(
            (len(tokens), self.options.generate), -1, dtype=torch.int64, device=tokens.device
        )
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        u = uniform(batch.keys, self.options.generate, stream=3)
        advance: Any = backbone.advance
        for step in range(self.options.generate):
            hidden, past = advance(tokens, mask, positions, past)
            new = self._drawn(
                F.linear(hidden[:, -1], backbone.embedding().weight)[:, : self.vocabulary].float(),
                u[:, step],
            )
            ended = ended | (new == self.end_id)
            if bool(ended.all()):
                break
            out[:, step] = torch.where(ended, -1, new)
            tokens, positions = torch.where(ended, self.pad_id, new)[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return out

    def _drawn(self, scores: Tensor, u: Tensor) -> Tensor:
        """(B,) ids from scores (B, V): the likeliest, or that of the top ones in whose part of the
        whole probability u (B,) falls.
        """
        if not self.options.temperature:
            return scores.argmax(1)
        values, ids = scores.topk(
            min(self.options.top_k or scores.shape[1], scores.shape[1]), dim=1
        )
        below = (values / self.options.temperature).softmax(1).cumsum(1) <= u[:, None]
        return ids.gather(1, below.sum(1, keepdim=True).clamp(max=ids.shape[1] - 1))[:, 0]

    def output_columns(
        self, found: dict[str, np.ndarray], raw_rows: RawRows
    ) -> dict[str, np.ndarray]:
        """With ``perplexity`` of each row (NaN where nothing was predicted) and ``generated`` as
        text.
        """
        out = _with_perplexity(found)
        if "generated" in found:
            tokenizer: Any = raw_rows.modality.tokenizer  # type: ignore[attr-defined]
            texts = tokenizer.decode_batch(
                [row[row >= 0].tolist() for row in found["generated"]], skip_special_tokens=True
            )
            out["generated"] = np.array([*texts, None], dtype=object)[:-1]
        return out


def _with_perplexity(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = found["count"]
    mean = np.divide(
        found["loss"], count, out=np.full(len(count), np.nan, dtype=np.float32), where=count > 0
    )
    return {**found, "perplexity": np.exp(np.minimum(mean, 80.0)).astype(np.float32)}


def _continuing(name: str, inputs: dict[str, Any], size: int) -> Tensor:
    """(size,) bool: tokens that go on a word. Raises ValueError where the modality did not tell."""
    if "continuing" not in inputs:
        raise ValueError(
            f"{name}: whole_word needs the tokens that go on a word (continuing), and this "
            "modality or this older bundle does not tell them; "
            "leave whole_word out, or make the source anew"
        )
    bits = np.unpackbits(np.frombuffer(base64.b64decode(inputs["continuing"]), dtype=np.uint8))[
        : inputs["vocabulary"]
    ]
    out = torch.zeros(size, dtype=torch.bool)
    out[: len(bits)] = torch.from_numpy(bits.astype(bool))
    return out
