"""Contrastive pretraining on speech without labels: wav2vec 2.0 (Baevski et al., NeurIPS 2020).

Shapes: B rows, N frames of a recording, K places for its hidden frames, G codebooks (groups), V
entries of a codebook, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective
from pipeline.core.contracts.backbone_capabilities import hides_frames
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.nn import all_gather
from pipeline.core.rng import uniform
from pipeline.core.specs import State

SPANS, STARTS, NEGATIVES, NOISE = ((1 << 16) + use for use in range(4))
"""Random streams of the rows' keys, apart from the modality's, which follow from the same keys."""
NEVER = 2.0
"""Above every uniform number: where no span may begin."""
COLLAPSED = 3.0
"""Perplexity of a codebook, in entries, below which the quantiser has collapsed.

Codebooks of few entries have collapsed at a tenth of the way from one entry to all.
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
        description="share of a recording's frames at which a hidden span begins; at least one "
        "span",
    )
    mask_length: int = Field(10, ge=1, description="frames of a hidden span; spans may overlap")
    gumbel_start: float = Field(
        2.0, gt=0, description="temperature of the choice of entries at first"
    )
    gumbel_end: float = Field(
        0.5, gt=0, description="and at the end of the run, falling by the same factor every step"
    )
    diversity: float = Field(
        0.1, ge=0, description="weight of the diversity loss, which wants all entries in use"
    )
    feature_penalty: float = Field(
        0.0,
        ge=0,
        description="weight of the mean square of the convolutions' output; the base models: 10 "
        "with group norm",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the quantiser's input")


class Quantizer(nn.Module):
    """Product quantisation by a Gumbel softmax (Jang et al. 2017).

    Parameters have the names that transformers gives them.
    """

    def __init__(self, features: int, groups: int, entries: int, width: int):
        super().__init__()
        self.groups = groups
        self.entries = entries
        self.codevectors = nn.Parameter(torch.rand(1, groups * entries, width // groups))
        self.weight_proj = nn.Linear(features, groups * entries)
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(
        self, features: Tensor, noise: Tensor | None, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise features.

        Args:
            features: (B, K, C).
            noise: (B, K, G, V) Gumbel noise; the choice then has the gradient of the softmax.
                None: the likeliest entries.
            temperature: () divisor of the noisy logits.

        Returns:
            (B, K, width) codes, (B, K, G, V) logits, and (B, K, G) the chosen entries.
        """
        logits = self.weight_proj(features).unflatten(-1, (self.groups, self.entries))
        noisy = logits if noise is None else (logits + noise) / temperature
        soft = noisy.softmax(-1)
        chosen = soft.argmax(-1)
        weights = F.one_hot(chosen, self.entries).to(soft.dtype)
        if noise is not None:
            weights = weights - soft.detach() + soft
        vectors = self.codevectors.view(self.groups, self.entries, -1)
        return torch.einsum("bkgv,gvd->bkgd", weights, vectors).flatten(2), logits, chosen


@dataclass(frozen=True)
class Compared:
    """Hidden frames compared with codes."""

    losses: Tensor
    """(B, K) contrastive losses."""
    hits: Tensor
    """(B, K) whether the frame's own code is the nearest."""
    valid: Tensor
    """(B, K) which places hold a hidden frame with a distractor."""
    logits: Tensor
    """(B, K, G, V) of the quantiser."""
    squares: Tensor
    """() sum over all frames of the mean squares of the convolutions' output."""
    frames: Tensor
    """() how many frames those are."""


@register("objective", "wav2vec2", options=Wav2Vec2Options)
class Wav2Vec2Pretraining(Objective):
    """wav2vec 2.0 pretraining: tell a hidden frame's code from those of other hidden frames.

    It needs recordings alone, hundreds of hours if possible, and ``transformers/wav2vec2``,
    ``torchaudio/deepspeech2`` or ``torchaudio/conformer``. Use it to pretrain a recogniser where
    few recordings have transcripts. Baevski et al. 2020, "wav2vec 2.0: A Framework for
    Self-Supervised Learning of Speech Representations".

    The context network predicts, at every hidden frame, the frame's own code (equation 3; equal
    codes are not distractors). Spans, distractors and Gumbel noise follow from the row's key. A
    recording with fewer frames than a span, or with a single hidden frame, takes no part.

    In training the diversity loss (equation 4) of the codes of the *global* batch is added, and
    the feature penalty where asked for, both once for each hidden frame as fairseq and
    transformers do. The ranks sum their codes' shares for that, so rows are coupled. Validation
    has the contrastive loss alone, with the likeliest entries and no noise, so that it does not
    depend on how the split is cut into batches. The head is float32 under autocast too.

    Logged:
        accuracy: share of hidden frames whose own code is the nearest.
        contrastive: the contrastive loss.
        diversity: 0 with all entries in use, towards 1 with one of each group.
        code_perplexity: of the entries that the global batch chose, summed over groups: at most
            groups x entries; near groups the quantiser has collapsed, which is warned of.
        prob_perplexity: of the softmax, which the diversity loss raises.
        code_usage: share of the entries that the global batch chose at all; a batch of few
            hidden frames cannot choose them all.
    """

    metrics = ("loss",)
    transformers_head = TransformersHead(
        "ForPreTraining",
        tensors=tuple(
            (name, name)
            for name in (
                "quantizer.codevectors",
                "quantizer.weight_proj.weight",
                "quantizer.weight_proj.bias",
                "project_hid.weight",
                "project_hid.bias",
                "project_q.weight",
                "project_q.bias",
            )
        ),
    )
    log_names = (
        "accuracy",
        "contrastive",
        "diversity",
        "code_perplexity",
        "prob_perplexity",
        "code_usage",
    )
    progress: Tensor
    usage: Tensor

    def __init__(self, backbone: Backbone, options: Wav2Vec2Options, state: State):
        """Raise ValueError for a backbone that cannot hide frames, or a width not divisible."""
        super().__init__(backbone, options, state)
        if not hides_frames(backbone):
            raise ValueError(
                f"{backbone.arch.name}: wav2vec2 hides frames between convolutions and a "
                "context network, which takes transformers/wav2vec2, torchaudio/deepspeech2 or "
                "torchaudio/conformer"
            )
        if options.code_width % options.groups:
            raise ValueError(
                f"wav2vec2.code_width {options.code_width} must be a multiple of wav2vec2.groups "
                f"{options.groups}"
            )
        self.quantizer = Quantizer(
            backbone.latent_dim, options.groups, options.entries, options.code_width
        )
        self.project_hid = nn.Linear(backbone.pooled_dim, options.width)
        self.project_q = nn.Linear(options.code_width, options.width)
        self.drop = nn.Dropout(options.dropout)
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("usage", torch.full((), float("inf")), persistent=False)
        self._has_warned = False

    # ---------------------------------------------------------------- what is random

    def spans(self, keys: Tensor, real: Tensor) -> Tensor:
        """Return (B, N) true where a frame is hidden.

        A share of the row's own frames, rounded up or down at random, begin a span; they are
        different frames, and each span lies whole within the row.

        Args:
            keys: (B,) the rows' keys.
            real: (B, N) true where a row has frames.
        """
        length = real.sum(1)
        n = real.shape[1]
        span = self.options.mask_length
        room = (length - span + 1).clamp(min=0)
        rounding = uniform(keys, 1, stream=SPANS)[:, 0].double()
        count = (self.options.mask_start * length.double() + rounding).long()
        count = count.clamp(min=1).minimum(room)
        frames = torch.arange(n, device=keys.device)
        can_begin = frames < room[:, None]
        noise = torch.where(can_begin, uniform(keys, n, stream=STARTS), NEVER)
        order = noise.argsort(dim=1, stable=True)
        rank = order.argsort(dim=1)
        begins = rank < count[:, None]
        begun = begins.long().cumsum(1)
        ended = F.pad(begun, (span, 0))[:, :n]
        return begun > ended

    def hidden(self, spans: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices (B, K) of the hidden frames, in order, and which of them are real.

        K is how many there can be, so no shape waits for the device.
        """
        n = spans.shape[1]
        options = self.options
        most_spans = max(1, int(options.mask_start * n + 1))
        most = min(n, most_spans * options.mask_length)
        hidden_first = (~spans).byte().argsort(dim=1, stable=True)
        frames = hidden_first[:, :most]
        num_hidden = spans.sum(1)[:, None]
        is_real = torch.arange(most, device=spans.device) < num_hidden
        return frames, is_real

    def distractors(self, keys: Tensor, valid: Tensor) -> Tensor:
        """Return (B, K, negatives) which hidden frames of the row each one is compared with.

        Any but itself, sampled with replacement.
        """
        k = valid.shape[1]
        negatives = self.options.negatives
        others = valid.sum(1)[:, None, None] - 1
        share = uniform(keys, k * negatives, stream=NEGATIVES)
        share = share.view(len(keys), k, -1)
        sampled = (share * others).long()
        sampled = sampled.minimum(others - 1)
        itself = torch.arange(k, device=keys.device)[:, None]
        skips_itself = sampled + (sampled >= itself)
        return skips_itself.clamp(0, k - 1)

    def noise(self, keys: Tensor, frames: int) -> Tensor:
        """Return (B, frames, G, V) Gumbel noise."""
        groups = self.options.groups
        entries = self.options.entries
        u = uniform(keys, frames * groups * entries, stream=NOISE)
        u = u.clamp(min=2.0**-25)
        gumbel = -(-u.log()).log()
        return gumbel.view(len(keys), frames, groups, entries)

    def gumbel_temperature(self) -> Tensor:
        """Return the quantiser's temperature at this point of the run."""
        options = self.options
        ratio = options.gumbel_end / options.gumbel_start
        return options.gumbel_start * ratio**self.progress

    # ---------------------------------------------------------------- loss

    def compare(self, backbone: Any, batch: Batch) -> Compared:
        options = self.options
        real = backbone.frame_mask(batch)
        spans = self.spans(batch.keys, real)
        frames, valid = self.hidden(spans)
        is_penalised = options.feature_penalty > 0 and self.training
        want = ("tokens", "latent", "convolved") if is_penalised else ("tokens", "latent")
        features = backbone(batch, token_mask=spans, want=want)
        with torch.autocast(batch.keys.device.type, enabled=False):
            latent = _at(features.latent, frames).float()
            context = _at(features.tokens, frames).float()
            noise = None
            if self.training:
                noise = self.noise(batch.keys, frames.shape[1])
            temperature = self.gumbel_temperature()
            codes, logits, chosen = self.quantizer(self.drop(latent), noise, temperature)
            predicted = F.normalize(self.project_hid(context), dim=-1)
            compared = F.normalize(self.project_q(codes), dim=-1)
            cosines = predicted @ compared.transpose(1, 2)
            scores = cosines / options.temperature

            distractors = self.distractors(batch.keys, valid)
            is_same_code = _equal(chosen).gather(2, distractors)
            others = scores.gather(2, distractors)
            others = others.masked_fill(is_same_code, float("-inf"))
            own = scores.diagonal(dim1=1, dim2=2)
            candidates = torch.cat([own[:, :, None], others], dim=2)
            losses = candidates.logsumexp(2) - own

            has_others = valid.sum(1, keepdim=True) > 1
            valid = valid & has_others
            best_other = others.amax(2)
            is_compared = best_other > float("-inf")
            hits = (own > best_other) & is_compared & valid
            squares = losses.new_zeros(())
            if is_penalised:
                convolved = features.stages["convolved"].float()
                of_frame = convolved.square().mean(2)
                squares = (of_frame * real).sum()
        losses = torch.where(valid, losses, 0.0)
        return Compared(losses, hits, valid, logits, squares, real.sum())

    def loss(self, backbone: Backbone, batch: Batch):
        compared = self.compare(backbone, batch)
        total = compared.losses.sum()
        count = compared.valid.sum().float()
        logs = {"accuracy": compared.hits.sum(), "contrastive": total.detach()}
        of_codes = self.log_names[2:]
        if not self.training:
            return total, count, logs | {name: torch.zeros_like(total) for name in of_codes}
        options = self.options
        size = options.groups * options.entries
        valid = compared.valid[:, :, None, None]
        soft = compared.logits.softmax(-1) * valid
        soft = soft.sum((0, 1))
        hard = F.one_hot(compared.logits.argmax(-1), options.entries) * valid
        hard = hard.sum((0, 1))
        counts = torch.stack([count, compared.squares, compared.frames.float()])
        local = torch.cat([soft.flatten(), hard.flatten(), counts])
        # the value of all ranks with the gradient of this one's rows
        of_other_ranks = all_gather.all_reduce_sum(local) - local.detach()
        everyone = local + of_other_ranks
        soft, hard, sums = everyone.split([size, size, 3])
        num_hidden, squares, num_frames = sums[0], sums[1], sums[2]
        hidden_frames = num_hidden.clamp(min=1.0)

        used = _perplexity(hard.view(options.groups, -1) / hidden_frames)
        of_groups = _perplexity(soft.view(options.groups, -1) / hidden_frames)
        perplexity = of_groups.sum()
        in_use = (hard > 0).float().mean()
        diversity = (size - perplexity) / size
        penalty = options.feature_penalty * squares / num_frames.clamp(min=1.0)
        extra = num_hidden * (options.diversity * diversity + penalty)
        # few frames cannot choose many entries
        has_enough_frames = num_hidden >= 10 * COLLAPSED
        usage = torch.where(has_enough_frames, used.min(), self.usage)
        self.usage.copy_(usage.detach())

        values = (diversity, used.sum(), perplexity, in_use)
        for name, value in zip(of_codes, values, strict=True):
            logs[name] = value.detach() * count
        # each rank's share of the value, with the gradient of the whole
        share = (extra * count / hidden_frames).detach()
        without_value = extra - extra.detach()
        return total + share + without_value, count, logs

    def forward_without_rows(self, backbone: Backbone) -> None:
        """Take part in the sum of the codes' shares without rows."""
        if self.training:
            size = 2 * self.options.groups * self.options.entries + 3
            all_gather.all_reduce_sum(self.progress.new_zeros(size))

    def after_step(self, backbone: Backbone, step: int, steps: int) -> str | None:
        """Move the Gumbel temperature; warn once, on the first rank, of a collapsed quantiser."""
        self.progress.fill_((step + 1) / steps)
        is_early = step < 0.2 * steps
        is_between_checks = step % max(1, steps // 20) != 0
        if self._has_warned or is_early or is_between_checks or all_gather.rank_and_count()[0]:
            return None
        usage = float(self.usage)
        if usage >= min(COLLAPSED, 1 + 0.1 * (self.options.entries - 1)):
            return None
        self._has_warned = True
        return (
            f"wav2vec2: the quantiser has collapsed: at step {step + 1} of {steps} the perplexity "
            f"of its codes is {usage:.1f} of {self.options.entries} entries of a group, so frames "
            "are hardly distinguished; lower train.lr, raise wav2vec2.diversity, take larger "
            "batches, or a longer warm-up"
        )

    def logits(self, backbone, batch):
        return None

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, summed over the hidden frames, and their ``count``, both (B,)."""
        compared = self.compare(backbone, batch)
        return {"loss": compared.losses.sum(1), "count": compared.valid.sum(1).float()}


def _at(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return (B, K, C) of (B, N, C) at the indices (B, K)."""
    index = indices[:, :, None].expand(-1, -1, tensor.shape[2])
    return tensor.gather(1, index)


def _equal(chosen: Tensor) -> Tensor:
    """Return (B, K, K) true where two frames have the same code, from (B, K, G) entries."""
    return (chosen[:, :, None] == chosen[:, None, :]).all(-1)


def _perplexity(shares: Tensor) -> Tensor:
    """Return (G,) exponentials of the entropies of shares (G, V).

    Finite, with its gradient, where an entry has no share.
    """
    logs = shares.clamp(min=1e-20).log()
    entropies = -(shares * logs).sum(-1)
    return entropies.exp()
