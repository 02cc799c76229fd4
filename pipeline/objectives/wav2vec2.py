"""Contrastive pretraining on speech without labels: wav2vec 2.0 (Baevski et al., NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.rng import uniform
from pipeline.nn import all_gather

SPANS, STARTS, NEGATIVES, NOISE = ((1 << 16) + use for use in range(4))
"""Streams of the rows' keys, apart from the modality's, which follow from the same keys."""
NEVER = 2.0
"""Above every uniform number: the place of frames where no span may begin."""
COLLAPSED = 3.0
"""Entries of a group: a codebook whose perplexity is smaller tells recordings apart no more; of few
entries, a tenth of the way from one to all.
"""


class Wav2Vec2Options(Options):
    groups: int = Field(2, ge=1, description="codebooks; a code is one entry of each")
    entries: int = Field(320, ge=2, description="entries of a codebook")
    code_width: int = Field(256, ge=1, description="width of a code, a multiple of groups")
    width: int = Field(256, ge=1, description="width of what is compared")
    negatives: int = Field(
        100,
        ge=1,
        description="distractors of each hidden frame, from the other hidden frames of its "
        "recording",
    )
    temperature: float = Field(0.1, gt=0, description="divisor of the cosines")
    mask_start: float = Field(
        0.065,
        gt=0,
        lt=1,
        description="share of a recording's frames at which a hidden span begins; one span at "
        "least",
    )
    mask_length: int = Field(10, ge=1, description="frames of a hidden span; spans may overlap")
    gumbel_start: float = Field(
        2.0, gt=0, description="temperature of the choice of entries at first"
    )
    gumbel_end: float = Field(
        0.5, gt=0, description="and at the end of the run, falling by the same factor at every step"
    )
    diversity: float = Field(
        0.1, ge=0, description="weight of the diversity loss, which wants all entries in use"
    )
    feature_penalty: float = Field(
        0.0,
        ge=0,
        description="weight of the mean square of what the convolutions give; the base models: 10 "
        "with group norm",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what the quantiser reads")


class Quantizer(nn.Module):
    """Product quantisation by a Gumbel softmax (Jang et al. 2017): (B, K, C) features to codes.
    Parameters have transformers' names.
    """

    def __init__(self, features: int, groups: int, entries: int, width: int):
        super().__init__()
        self.groups, self.entries = groups, entries
        self.codevectors = nn.Parameter(torch.rand(1, groups * entries, width // groups))
        self.weight_proj = nn.Linear(features, groups * entries)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(
        self, features: Tensor, noise: Tensor | None, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, K, width) codes, (B, K, G, V) logits and (B, K, G) the entries chosen: by the logits
        and the Gumbel ``noise`` of their shape, with the gradient of the softmax; without noise the
        likeliest ones.
        """
        logits = self.weight_proj(features).unflatten(-1, (self.groups, self.entries))
        soft = (logits if noise is None else (logits + noise) / temperature).softmax(-1)
        chosen = soft.argmax(-1)
        weights = F.one_hot(chosen, self.entries).to(soft.dtype)
        if noise is not None:
            weights = weights - soft.detach() + soft
        vectors = self.codevectors.view(self.groups, self.entries, -1)
        return torch.einsum("bkgv,gvd->bkgd", weights, vectors).flatten(2), logits, chosen


@dataclass(frozen=True)
class Compared:
    """Of the hidden frames, K places a row: ``losses``, ``hits`` and ``valid`` (B, K), the
    quantiser's ``logits`` (B, K, G, V); and of all frames the sum of the mean squares that the
    convolutions gave, and how many.
    """

    losses: Tensor
    hits: Tensor
    valid: Tensor
    logits: Tensor
    squares: Tensor
    frames: Tensor


@register("objective", "wav2vec2", options=Wav2Vec2Options)
class Wav2Vec2Pretraining(Objective):
    """At every hidden frame the context network is to tell the frame's own code from those of other
    hidden frames of the recording (equation 3; equal codes are no distractors). Spans, distractors
    and Gumbel noise follow from the row's key. A recording with fewer frames than a span, or with a
    single hidden frame, takes no part.

    In training the diversity loss (equation 4) of the codes of the *global* batch is added, and the
    feature penalty where asked for, both once for each hidden frame as fairseq and transformers do.
    For that the ranks sum their codes' shares, so parts of a batch are no batch: ``couples_rows``.
    Validation has the contrastive loss alone, with the likeliest entries and no noise, so that it
    does not depend on how the split is cut into batches. All of the head is float32 under autocast
    too.

    Logged: ``accuracy`` (hidden frames whose own code is the nearest), ``contrastive``,
    ``diversity`` (0: all entries in use, towards 1: one of each group), ``code_perplexity`` (of the
    entries that the global batch chose, summed over groups: at most groups x entries; near groups
    the quantiser has collapsed, which is warned of), ``prob_perplexity`` (of the softmax, which the
    diversity loss raises) and ``code_usage`` (share of the entries that the global batch chose at
    all; a batch of few hidden frames cannot choose them all).

    Raises ValueError for a backbone that cannot hide frames, and where groups do not divide
    code_width.
    """

    metrics = ("loss",)
    log_names = (
        "accuracy",
        "contrastive",
        "diversity",
        "code_perplexity",
        "prob_perplexity",
        "code_usage",
    )
    couples_rows = True
    progress: Tensor
    usage: Tensor

    def __init__(self, backbone: Backbone, options: Wav2Vec2Options, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        if not getattr(backbone, "hides_frames", False):
            raise ValueError(
                f"{backbone.arch['name']}: wav2vec2 hides frames between convolutions and a "
                "context network, which takes "
                "transformers/wav2vec2, torchaudio/deepspeech2 or torchaudio/conformer"
            )
        if options.code_width % options.groups:
            raise ValueError(
                f"wav2vec2.code_width {options.code_width} must be a multiple of "
                f"wav2vec2.groups {options.groups}"
            )
        features: Any = backbone.latent_dim
        self.quantizer = Quantizer(features, options.groups, options.entries, options.code_width)
        self.project_hid = nn.Linear(backbone.pooled_dim, options.width)
        self.project_q = nn.Linear(options.code_width, options.width)
        self.drop = nn.Dropout(options.dropout)
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("usage", torch.full((), float("inf")), persistent=False)
        self._has_warned = False

    def spans(self, keys: Tensor, real: Tensor) -> Tensor:
        """(B, N) true where a frame is hidden, from (B,) keys and (B, N) true where a row has
        frames. So many spans as a share of the row's own frames, rounded up or down at random,
        begin at different frames, each whole within the row.
        """
        length, n, span = real.sum(1), real.shape[1], self.options.mask_length
        room = (length - span + 1).clamp(min=0)
        rounding = uniform(keys, 1, stream=SPANS)[:, 0]
        count = (
            (self.options.mask_start * length.double() + rounding.double())
            .long()
            .clamp(min=1)
            .minimum(room)
        )
        places = torch.arange(n, device=keys.device)
        noise = torch.where(places < room[:, None], uniform(keys, n, stream=STARTS), NEVER)
        begun = noise.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
        so_far = begun.long().cumsum(1)
        return so_far > F.pad(so_far, (span, 0))[:, :n]

    def hidden(self, spans: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K) places of the hidden frames, in order, and whether they are some: K is how many
        there can be, so no shape waits for the device.
        """
        n, o = spans.shape[1], self.options
        most = min(n, max(1, int(o.mask_start * n + 1)) * o.mask_length)
        places = (~spans).byte().argsort(dim=1, stable=True)[:, :most]
        return places, torch.arange(most, device=spans.device) < spans.sum(1)[:, None]

    def distractors(self, keys: Tensor, valid: Tensor) -> Tensor:
        """(B, K, negatives) which of the row's hidden frames each one is compared with: any but
        itself, drawn with replacement.
        """
        k = valid.shape[1]
        others = valid.sum(1)[:, None, None] - 1
        drawn = (
            (
                uniform(keys, k * self.options.negatives, stream=NEGATIVES).view(len(keys), k, -1)
                * others
            )
            .long()
            .minimum(others - 1)
        )
        return (drawn + (drawn >= torch.arange(k, device=keys.device)[:, None])).clamp(0, k - 1)

    def noise(self, keys: Tensor, places: int) -> Tensor:
        """(B, places, G, V) Gumbel noise."""
        o = self.options
        u = uniform(keys, places * o.groups * o.entries, stream=NOISE).clamp(min=2.0**-25)
        return -(-u.log()).log().view(len(keys), places, o.groups, o.entries)

    def gumbel_temperature(self) -> Tensor:
        """The quantiser's, at this point of the run."""
        o = self.options
        return o.gumbel_start * (o.gumbel_end / o.gumbel_start) ** self.progress

    def _compared(self, backbone: Any, batch: Batch) -> Compared:
        o, real = self.options, backbone.frame_mask(batch)
        spans = self.spans(batch.keys, real)
        places, valid = self.hidden(spans)
        penalised = o.feature_penalty > 0 and self.training
        found = backbone(
            batch,
            token_mask=spans,
            want=("tokens", "latent", *(["convolved"] if penalised else [])),
        )
        with torch.autocast(batch.keys.device.type, enabled=False):
            latent, context = (
                _at(tensor, places).float() for tensor in (found.latent, found.tokens)
            )
            codes, logits, chosen = self.quantizer(
                self.drop(latent),
                self.noise(batch.keys, places.shape[1]) if self.training else None,
                self.gumbel_temperature(),
            )
            cosines = (
                F.normalize(self.project_hid(context), dim=-1)
                @ F.normalize(self.project_q(codes), dim=-1).transpose(1, 2)
                / o.temperature
            )
            places_drawn = self.distractors(batch.keys, valid)
            others = cosines.gather(2, places_drawn).masked_fill(
                _equal(chosen).gather(2, places_drawn), float("-inf")
            )
            own = cosines.diagonal(dim1=1, dim2=2)
            losses = torch.cat([own[:, :, None], others], dim=2).logsumexp(2) - own
            valid = valid & (valid.sum(1, keepdim=True) > 1)
            hits = (own > others.amax(2)) & (others.amax(2) > float("-inf")) & valid
            squares = (
                (found.stages["convolved"].float().square().mean(2) * real).sum()
                if penalised
                else losses.new_zeros(())
            )
        return Compared(torch.where(valid, losses, 0.0), hits, valid, logits, squares, real.sum())

    def loss(self, backbone: Backbone, batch: Batch):
        found = self._compared(backbone, batch)
        total, count = found.losses.sum(), found.valid.sum().float()
        logs = {"accuracy": found.hits.sum(), "contrastive": total.detach()}
        if not self.training:
            return (
                total,
                count,
                logs | {name: torch.zeros_like(total) for name in self.log_names[2:]},
            )
        o = self.options
        soft = (found.logits.softmax(-1) * found.valid[:, :, None, None]).sum((0, 1))
        hard = (F.one_hot(found.logits.argmax(-1), o.entries) * found.valid[:, :, None, None]).sum(
            (0, 1)
        )
        local = torch.cat(
            [
                soft.flatten(),
                hard.flatten(),
                torch.stack([count, found.squares, found.frames.float()]),
            ]
        )
        everyone = local + (
            all_gather.summed(local) - local.detach()
        )  # the value of all ranks, the gradient of this one's rows
        soft, hard, sums = everyone.split([o.groups * o.entries, o.groups * o.entries, 3])
        counted = sums[0].clamp(min=1.0)
        used, perplexity = (_perplexity(part.view(o.groups, -1) / counted) for part in (hard, soft))
        least, usage, perplexity, in_use = (
            used.min(),
            used.sum(),
            perplexity.sum(),
            (hard > 0).float().mean(),
        )
        diversity = (o.groups * o.entries - perplexity) / (o.groups * o.entries)
        extra = sums[0] * (
            o.diversity * diversity + o.feature_penalty * sums[1] / sums[2].clamp(min=1.0)
        )
        self.usage.copy_(
            torch.where(sums[0] >= 10 * COLLAPSED, least, self.usage).detach()
        )  # few frames cannot choose many entries
        logs |= {
            name: value.detach() * count
            for name, value in zip(
                self.log_names[2:], (diversity, usage, perplexity, in_use), strict=True
            )
        }
        return (
            total + (extra * count / counted).detach() + (extra - extra.detach()),
            count,
            logs,
        )  # each rank's share, the gradient of the whole

    def forward_without_rows(self, backbone: Backbone) -> None:
        if self.training:
            all_gather.summed(
                self.progress.new_zeros(2 * self.options.groups * self.options.entries + 3)
            )

    def after_step(self, backbone: Backbone, step: int, steps: int) -> str | None:
        self.progress.fill_((step + 1) / steps)
        if (
            self._has_warned
            or step < 0.2 * steps
            or step % max(1, steps // 20)
            or all_gather.ranks()[0]
        ):
            return None
        usage, least = float(self.usage), min(COLLAPSED, 1 + 0.1 * (self.options.entries - 1))
        if usage >= least:
            return None
        self._has_warned = True
        return (
            f"wav2vec2: the quantiser has collapsed: at step {step + 1} of {steps} the "
            f"perplexity of its codes is {usage:.1f} of "
            f"{self.options.entries} entries of a group, so frames are hardly told apart; "
            "lower train.lr, raise wav2vec2.diversity, take larger "
            "batches, or a longer warm-up"
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        found = self._compared(backbone, batch)
        return {"loss": found.losses.sum(1), "count": found.valid.sum(1).float()}


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """(B, K, D) of (B, N, D) at (B, K) places."""
    return tensor.gather(1, places[:, :, None].expand(-1, -1, tensor.shape[2]))


def _equal(chosen: Tensor) -> Tensor:
    """(B, K, K) true where two places have the same code, from (B, K, G) entries."""
    return (chosen[:, :, None] == chosen[:, None, :]).all(-1)


def _perplexity(shares: Tensor) -> Tensor:
    """(G,) the exponential of the entropy of (G, V) shares; finite, with its gradient, where an
    entry has none.
    """
    return (-(shares * shares.clamp(min=1e-20).log()).sum(-1)).exp()
