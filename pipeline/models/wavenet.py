"""WaveNet (van den Oord et al. 2016): dilated causal convolutions over mu-law samples, and frames
for speech recognition (section 3.4).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchaudio.functional import mu_law_encoding

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import AudioInputs
from pipeline.core.nn import conv_arithmetic
from pipeline.core.specs import Architecture

ARCHITECTURES = ["wavenet"]
MODALITY = "audio"

WANTS = {"wavenet": {"features": "wave", "normalize": False}}
"""Samples between -1 and 1, as mu-law takes them."""

LEVELS = 256
"""Number of mu-law levels: mu = 255, the continuous form of ITU-T G.711 (section 2.2)."""


class WaveNetOptions(Options):
    layers: int = Field(
        10,
        ge=1,
        le=16,
        description="dilated layers of a stack, with dilations 1, 2, 4, ...; 10 end with 512, as "
        "published",
    )
    stacks: int = Field(2, ge=1, description="how often the dilations are run through")
    kernel: int = Field(2, ge=2, description="taps of a dilated convolution")
    residual: int = Field(64, ge=1, description="channels from layer to layer, and of the gates")
    skip: int = Field(
        128,
        ge=1,
        description="channels of the summed skip connections: the width of tokens and latent",
    )
    pool: int = Field(
        160, ge=1, description="samples that one token is the mean of; 160 are 10 ms at 16 kHz"
    )
    frame_layers: int = Field(
        3,
        ge=0,
        description="non-causal convolutions over the tokens; next_sample does not train them",
    )
    frame_kernel: int = Field(9, ge=1, description="tokens that one of them sees, an odd number")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout within the non-causal convolutions"
    )
    recompute: bool = Field(
        False,
        description="compute a layer's activations again for its gradients in the place of "
        "keeping them: slower, less memory",
    )


@register("model", "wavenet", options=WaveNetOptions)
class WaveNet(Backbone):
    """WaveNet over the samples of a recording (van den Oord et al. 2016).

    Use it to pretrain on the samples themselves (``next_sample``). It is slow: a second
    of sound has thousands of positions.

    Input: ``wave`` (B, n) float32 in [-1, 1] with ``mask`` (B, n).

    Each sample becomes one of 256 mu-law levels, and each level has a vector (a 1 x 1 convolution
    of its one-hot code). ``stacks`` times ``layers`` gated causal convolutions follow (equation 2),
    with residual and skip connections.

    - ``latent`` (B, n, skip, wanted as "latent"): the sum of the skip connections, one vector for
      each sample. It depends on the last ``receptive_field`` samples, the sample itself among them.
    - ``tokens`` (B, n // pool, skip), for speech recognition (section 3.4): the mean of the
      rectified sum over ``pool`` samples, normed, then ``frame_layers`` non-causal convolutions.
      These are residual and start at 0: weights that were pretrained without them are used
      unchanged. The last samples of a row that do not fill a token are dropped.

    Raises ValueError for rows other than plain waves.
    """

    def __init__(self, architecture: str, options: WaveNetOptions, inputs: AudioInputs):
        super().__init__(architecture, options, inputs)
        name = f"wavenet/{architecture}"
        if inputs.get("features") != "wave":
            raise ValueError(
                f"{name} reads the samples of audio (features wave); these rows are "
                f"{inputs.get('features') or ', '.join(inputs) or 'something else'}"
            )
        if "scale" in inputs:
            raise ValueError(
                f"{name} reads samples between -1 and 1, as mu-law wants them; these are scaled to "
                f"{inputs['scale']}: set normalize: false in data.modality"
            )
        if options.frame_kernel % 2 == 0:
            raise ValueError(
                f"{name}: frame_kernel {options.frame_kernel} must be odd: a token sees as "
                "many before it as behind"
            )
        self.options = options
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.pooled_dim = self.token_dim = options.skip
        self.receptive_field: int = 1 + options.stacks * (options.kernel - 1) * (
            2**options.layers - 1
        )
        """Samples that ``latent`` of a sample depends on: itself and those before it."""
        half = options.frame_kernel // 2
        self.own: tuple[tuple[int, int, int], ...] = (
            (options.pool, options.pool, 0),
            *[(options.frame_kernel, 1, half)] * options.frame_layers,
        )
        self.convolutions = self.own
        self.embed = nn.Embedding(LEVELS, options.residual)
        count = options.stacks * options.layers
        self.blocks = nn.ModuleList(
            _Gated(options, 2 ** (i % options.layers), last=i == count - 1) for i in range(count)
        )
        self.norm = nn.LayerNorm(options.skip)
        self.frames = nn.ModuleList(_Frames(options) for _ in range(options.frame_layers))

    @staticmethod
    def levels(wave: Tensor) -> Tensor:
        """Return (B, n) int64 mu-law levels, 0 to 255; samples beyond -1 and 1 are clipped."""
        return mu_law_encoding(wave.float().clamp(-1, 1), LEVELS)

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if token_mask is not None:
            raise ValueError(
                f"{self.arch.name} cannot leave tokens out: next_sample pretrains it, masking "
                "does not"
            )
        wave, mask = batch["wave"], batch["mask"]
        short = max(0, self.options.pool - wave.shape[1])
        levels = self.levels(F.pad(wave, (0, short)))
        skip = self._skip(self.embed(levels).transpose(1, 2))
        valid = conv_arithmetic.count(mask.sum(1), self.own)
        x = F.avg_pool1d(skip.relu(), self.options.pool)
        real = torch.arange(x.shape[2], device=x.device) < valid[:, None]
        x = self.norm(x.transpose(1, 2)) * real[:, :, None]
        for block in self.frames:
            x = block(x, real)
        pooled = x.sum(1) / valid.clamp(min=1)[:, None]
        latent = skip[:, :, : wave.shape[1]].transpose(1, 2) if "latent" in want else None
        return Features(pooled, tokens=x, mask=real, latent=latent)

    def _skip(self, x: Tensor) -> Tensor:
        """Sum the skip connections in float32: (B, skip, n) from (B, residual, n) vectors of the
        samples.
        """
        out = torch.zeros(
            x.shape[0],
            self.options.skip,
            x.shape[2],
            device=x.device,
        )
        for block in self.blocks:
            output: Any = (
                checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                if self.options.recompute
                else block(x)
            )
            x, skip = output
            out = out.add_(skip)
        return out

    def renew_frames(self) -> None:
        """Initialise the convolutions over tokens again where they were never trained.

        Their output weights are then 0, and weight decay has shrunk the others, which had no
        gradient. The numbers come from a fixed seed.
        """
        for number, block in enumerate(self.frames):
            assert isinstance(block, _Frames)
            if not block.out.weight.any():
                with torch.random.fork_rng(devices=[]):
                    # torch.manual_seed would seed the GPUs too, which are not forked
                    torch.default_generator.manual_seed(number)
                    fresh = nn.Conv1d(
                        self.options.skip, self.options.skip, self.options.frame_kernel
                    )
                block.wide.load_state_dict(fresh.state_dict())

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            part, number, *_ = name.split(".")
            layer = {"blocks": f"block{number.zfill(2)}", "frames": f"frames{number.zfill(2)}"}.get(
                part, part
            )
            out.setdefault(layer, []).append(name)
        return out


class _Gated(nn.Module):
    """A residual layer (figure 4) that sees ``dilation * (kernel - 1)`` earlier samples.

    The residual of the last layer would not be used, so it has none.
    """

    def __init__(self, options: WaveNetOptions, dilation: int, last: bool):
        super().__init__()
        self.reach, self.width = dilation * (options.kernel - 1), 0 if last else options.residual
        self.dilated = nn.Conv1d(
            options.residual, 2 * options.residual, options.kernel, dilation=dilation
        )
        self.out = nn.Conv1d(options.residual, self.width + options.skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, residual, n) for the next layer and (B, skip, n)."""
        padded = F.pad(x, (self.reach, 0))  # on the left: no sample sees a later one
        filtered, gate = self.dilated(padded).chunk(2, dim=1)
        out = self.out(filtered.tanh() * gate.sigmoid())
        return (x + out[:, : self.width] if self.width else x), out[:, self.width :]


class _Frames(nn.Module):
    """Compute x + W ReLU(convolution(norm(x))) over the real tokens of (B, N, D); W starts at 0."""

    def __init__(self, options: WaveNetOptions):
        super().__init__()
        self.norm = nn.LayerNorm(options.skip)
        self.wide = nn.Conv1d(
            options.skip, options.skip, options.frame_kernel, padding=options.frame_kernel // 2
        )
        self.drop = nn.Dropout(options.dropout)
        self.out = nn.Linear(options.skip, options.skip)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """``real`` (B, N): the other tokens are 0 before and after, whatever the norm's bias is."""
        real = real[:, :, None]
        normed = (self.norm(x) * real).transpose(1, 2)
        inner = self.wide(normed).relu().transpose(1, 2)
        return (x + self.out(self.drop(inner))) * real
