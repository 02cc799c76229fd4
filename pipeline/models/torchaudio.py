"""Speech recognisers over log-mel frames, from torchaudio's layers, without their output layer.

Deep Speech (Hannun et al. 2014), Deep Speech 2 (Amodei et al. 2016), Conformer (Gulati et al.
2020).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torchaudio.models import Conformer, DeepSpeech

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import AudioInputs
from pipeline.core.nn import conv_arithmetic
from pipeline.core.specs import Architecture

ARCHITECTURES = ["deepspeech", "deepspeech2", "conformer"]
MODALITY = "audio"

DEFAULTS: dict[str, dict[str, Any]] = {
    "deepspeech": {"hidden": 512, "context": 7, "strides": [2], "dropout": 0.1},
    "deepspeech2": {
        "layers": 2,
        "hidden": 256,
        "convolution": "time",
        "channels": 256,
        "kernels": [11, 11],
        "strides": [2, 2],
        "dropout": 0.1,
    },
    "conformer": {
        "layers": 4,
        "hidden": 144,
        "heads": 4,
        "intermediate": 576,
        "kernel": 31,
        "channels": 32,
        "strides": [2, 2],
        "dropout": 0.1,
    },
}
"""Options of each architecture with their defaults; it has no others."""

CLIP = 20.0
"""Of the clipped ReLU min(max(x, 0), 20) in both Deep Speech papers."""


class TorchaudioOptions(Options):
    layers: int | None = Field(
        None,
        ge=1,
        description="deepspeech2: recurrent layers (none: 2); conformer: blocks (none: 4)",
    )
    hidden: int | None = Field(
        None,
        ge=2,
        description="deepspeech: width (none: 512; published: 2048); deepspeech2: units in each "
        "direction (none: 256); conformer: width (none: 144)",
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="share of activations that are dropped; none: 0.1"
    )
    strides: list[int] | None = Field(
        None,
        min_length=1,
        description="frames from one step to the next, for each convolution (none: [2, 2]). "
        "deepspeech has no convolutions and takes one number (none: [2], as published, section "
        "3.3)",
    )
    context: int | None = Field(
        None,
        ge=0,
        description="deepspeech: frames to each side that one step sees (none: 7; published: 5, 7 "
        "or 9)",
    )
    convolution: Literal["time", "time_frequency"] | None = Field(
        None,
        description="deepspeech2: convolutions over time, with all mel bins as channels, or over "
        "time and frequency, which are slower (section 3.5); none: time",
    )
    channels: int | None = Field(
        None,
        ge=1,
        description="channels of the convolutions: deepspeech2 (none: 256), conformer's "
        "subsampling (none: 32)",
    )
    kernels: list[int] | None = Field(
        None,
        min_length=1,
        description="deepspeech2: frames that each convolution sees, odd numbers; none: [11, 11]",
    )
    heads: int | None = Field(
        None, ge=1, description="conformer: attention heads; must divide hidden; none: 4"
    )
    intermediate: int | None = Field(
        None, ge=1, description="conformer: width of the feed-forward parts; none: 576"
    )
    kernel: int | None = Field(
        None,
        ge=1,
        description="conformer: steps that a depthwise convolution sees, an odd number; none: 31",
    )


@register("model", "torchaudio", options=TorchaudioOptions)
class Torchaudio(Backbone):
    """Speech recognisers over log-mel frames, without their output layer.

    Use it to train a recogniser of speech from the start. Deep Speech (Hannun et al. 2014),
    Deep Speech 2 (Amodei et al. 2016), Conformer (Gulati et al. 2020).

    - ``deepspeech``: torchaudio's modules, whose parameters keep their names. The neighbours of
      each frame are stacked here, as in its paper; torchaudio leaves that to the caller.
    - ``deepspeech2``: has layer norms instead of the paper's batch norms, whose statistics would
      include padding. It concatenates both directions; the paper adds them.
    - ``conformer``: torchaudio's modules, whose parameters keep their names.

    Input: ``mel`` (B, T, F) with ``mask`` (B, T), true for a row's own frames.

    - ``tokens`` (B, N, D), 0 after a row's end
    - ``latent`` (B, N, latent_dim, wanted as "latent"), not of ``deepspeech``: the output of the
      convolutions. ``token_mask`` (B, N) replaces steps of it by ``front.mask_embedding``, as
      wav2vec 2.0 does.

    The output of a row does not depend on the other rows of its batch: frames after its end are 0
    before every convolution, recurrent layers read packed rows, and norms are over the channels of
    one step, or over the row's own steps.

    Raises ValueError for inputs other than mel frames, and for options that the architecture lacks.
    """

    def __init__(self, architecture: str, options: TorchaudioOptions, inputs: AudioInputs):
        super().__init__(architecture, options, inputs)
        name = f"torchaudio/{architecture}"
        if inputs.get("features") != "mel":
            raise ValueError(
                f"{name} reads log-mel frames of audio (features mel); these rows are "
                f"{inputs.get('features') or ', '.join(inputs) or 'something else'}"
            )
        o = _resolved(architecture, options)
        self.architecture = architecture
        self.arch = Architecture(name, o, dict(inputs))
        bins, drop = inputs["channels"], o["dropout"]
        self.front: Front | None = None
        self.deepspeech: Any = None
        self.recurrent: nn.ModuleList | None = None
        self.conformer: Any = None
        if architecture == "deepspeech":
            self.context = o["context"]
            own: list[tuple[int, int, int]] = [
                (2 * self.context + 1, o["strides"][0], self.context)
            ]
            self.deepspeech = DeepSpeech(
                (2 * self.context + 1) * bins, n_hidden=o["hidden"], n_class=1, dropout=drop
            )
            del self.deepspeech.out
            width = o["hidden"]
        else:
            conformer = architecture == "conformer"
            plane = conformer or o["convolution"] == "time_frequency"
            kernels = [3] * len(o["strides"]) if conformer else o["kernels"]
            self.front = Front(
                bins, o["channels"], kernels, o["strides"], plane, wide=not conformer
            )
            self.latent_dim = self.front.width
            own = [
                (kernel, step, kernel // 2)
                for kernel, step in zip(kernels, o["strides"], strict=True)
            ]
            if conformer:
                width = o["hidden"]
                self.enter = nn.Sequential(nn.Linear(self.front.width, width), nn.Dropout(drop))
                self.conformer = Conformer(
                    width,
                    o["heads"],
                    o["intermediate"],
                    o["layers"],
                    o["kernel"],
                    dropout=drop,
                    use_group_norm=True,
                )
            else:
                width = 2 * o["hidden"]
                widths = [self.front.width, *[width] * (o["layers"] - 1)]
                self.recurrent = nn.ModuleList(
                    _Recurrent(n, o["hidden"], drop if i else 0.0) for i, n in enumerate(widths)
                )
        self.own = tuple(own)
        self.convolutions = (
            *((int(k), int(s), int(p)) for k, s, p in inputs["convolutions"]),
            *self.own,
        )
        self.pooled_dim = self.token_dim = width

    def frame_mask(self, batch: Batch) -> Tensor:
        """Return (B, N) bool, true for a row's own steps; N is 1 where no row has any."""
        count = max(1, conv_arithmetic.count(max(1, batch["mel"].shape[1]), self.own))
        return (
            torch.arange(count, device=batch["mask"].device)
            < conv_arithmetic.count(batch["mask"].sum(1), self.own)[:, None]
        )

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        mel, mask = batch["mel"], batch["mask"]
        if mel.shape[1] == 0:  # a batch whose rows all have no samples
            mel = F.pad(mel, (0, 0, 0, 1))
            mask = F.pad(mask, (0, 1))
        lengths = mask.sum(1)
        x = mel * mask[:, :, None]
        latent = None
        if self.front is not None:
            latent, lengths = self.front(x, lengths)
            hider = self.front.mask_embedding.to(latent.dtype)
            # the embedding takes part without a mask, too: DDP waits for its gradient
            x = latent + 0.0 * hider
            if token_mask is not None:
                x = torch.where(token_mask[:, :, None], hider, latent)
        elif token_mask is not None:
            raise ValueError(
                f"{self.arch.name} cannot leave tokens out; for masked pretraining take "
                "torchaudio/deepspeech2 or transformers/wav2vec2"
            )
        if self.deepspeech is not None:
            x, lengths = self._deepspeech(x, lengths)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        if self.recurrent is not None:
            for layer in self.recurrent:
                x = layer(x, lengths)
        if self.conformer is not None:
            x = self.enter(x)
            # a row without steps attends to its first one, so that no softmax is empty
            seen = real | (torch.arange(x.shape[1], device=x.device) == 0)
            for layer in self.conformer.conformer_layers:
                x = _conformer_layer(layer, x, real, seen)
        x = x * real[:, :, None]
        return Features(
            x.sum(1) / lengths.clamp(min=1)[:, None],
            tokens=x,
            mask=real,
            latent=latent if "latent" in want else None,
            stages={"convolved": latent} if "convolved" in want and latent is not None else {},
        )

    def _deepspeech(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (B, N, hidden) and (B,) lengths, without the output layer of torchaudio."""
        model: Any = self.deepspeech
        c = self.context
        # the earliest frame first
        windows = F.pad(x, (0, 0, c, c)).unfold(
            1,
            2 * c + 1,
            self.own[0][1],
        )
        x = windows.transpose(2, 3).flatten(2)
        lengths = conv_arithmetic.count(lengths, self.own)
        x = _packed(model.bi_rnn, model.fc3(model.fc2(model.fc1(x))), lengths)
        return model.fc4(x[:, :, : model.n_hidden] + x[:, :, model.n_hidden :]), lengths

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            part, *rest = name.split(".")
            number = next((word for word in rest if word.isdigit()), "0").zfill(2)
            layer = {
                "front": f"convolution{number}",
                "recurrent": f"recurrent{number}",
                "conformer": f"block{number}",
            }.get(part, part)
            out.setdefault(rest[0] if part == "deepspeech" else layer, []).append(name)
        return out


def _resolved(architecture: str, options: TorchaudioOptions) -> dict[str, Any]:
    """Return every option of the architecture with its value.

    Raises ValueError for an option that it lacks, or a value that does not fit.
    """
    name, defaults = f"torchaudio/{architecture}", DEFAULTS[architecture]
    given = {option: value for option, value in options.model_dump().items() if value is not None}
    for option in given.keys() - defaults.keys():
        raise ValueError(f"{name} has no {option}: leave it out")
    o = {**defaults, **given}
    for option in ("kernel", "kernels"):
        values = o.get(option, [])
        for value in values if isinstance(values, list) else [values]:
            if value < 1 or value % 2 == 0:
                raise ValueError(
                    f"{name}: {option} {o[option]} must be odd: a step sees as many frames "
                    "before it as behind"
                )
    for value in o["strides"]:
        if value < 1:
            raise ValueError(f"{name}: strides {o['strides']} must be 1 or more")
    if architecture == "deepspeech" and len(o["strides"]) != 1:
        raise ValueError(
            f"{name}: strides {o['strides']} must be one number, as it has no convolutions"
        )
    if "kernels" in o and len(o["strides"]) != len(o["kernels"]):
        raise ValueError(
            f"{name}: strides {o['strides']} and kernels {o['kernels']} must be as many, one "
            "of each for a convolution"
        )
    if "heads" in o and o["hidden"] % o["heads"]:
        raise ValueError(f"{name}: heads {o['heads']} must divide hidden {o['hidden']}")
    return o


class Front(nn.Module):
    """Strided convolutions over (B, T, F), each followed by a norm over a step's values and a ReLU.

    Padding is 0 before each convolution.

    Args:
        plane: Over time and frequency, with one input channel, keeping every second bin; else over
            time, with the bins as channels.
        wide: Kernels see 41 and then 21 bins, as in Deep Speech 2 (table 1), and ReLUs are clipped;
            else 3 bins, as in Conformer's subsampling.
    """

    def __init__(
        self,
        bins: int,
        channels: int,
        kernels: list[int],
        strides: list[int],
        plane: bool,
        wide: bool,
    ):
        super().__init__()
        self.plane, self.clip = plane, CLIP if wide else None
        self.shapes = [
            (kernel, step, kernel // 2) for kernel, step in zip(kernels, strides, strict=True)
        ]
        self.layers, width, depth = nn.ModuleList(), bins, 1
        self.depths: list[int] = []
        for number, (kernel, step, padding) in enumerate(self.shapes):
            self.depths.append(depth)
            if plane:
                high = (41 if number == 0 else 21) if wide else 3
                convolution: nn.Module = nn.Conv2d(
                    depth, channels, (kernel, high), (step, 2), (padding, high // 2)
                )
                width, depth = (width - 1) // 2 + 1, channels
            else:
                convolution, width = nn.Conv1d(width, channels, kernel, step, padding), channels
            self.layers.append(
                nn.ModuleDict({"convolution": convolution, "norm": nn.LayerNorm(width * depth)})
            )
        self.width = width * depth
        self.mask_embedding = nn.Parameter(torch.empty(self.width).uniform_())

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, N, width), 0 after each row's end, and (B,) lengths."""
        for number, layer in enumerate(self.layers):
            parts: Any = layer
            if self.plane:
                # an adapter may have replaced the convolution and lacks its attributes
                x = x.unflatten(2, (self.depths[number], -1)).transpose(1, 2)
                x = parts["convolution"](x).transpose(1, 2).flatten(2)
            else:
                x = parts["convolution"](_whole_strides(x, self.shapes[number][1])).transpose(1, 2)
            lengths = conv_arithmetic.count(lengths, self.shapes[number : number + 1])
            real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = parts["norm"](x).clamp(0.0, self.clip) * real[:, :, None]
        return x, lengths


def _whole_strides(x: Tensor, step: int) -> Tensor:
    """Return (B, D, T) of (B, T, D), with zeros at the end up to a multiple of ``step`` steps.

    A convolution with an odd kernel and half of it as padding has the same output for both. But
    where the stride does not divide the steps, oneDNN (3.10, brgconv_strided) computes the gradient
    of the input with a buffer that is one step too short for a kernel of 11: with two threads and
    as many steps as 23, 55 or 87, one thread writes into the buffer of the other, and the gradients
    of some rows are wrong, differently each time.
    """
    return F.pad(x.transpose(1, 2), (0, -x.shape[1] % step))


class _Recurrent(nn.Module):
    """A bidirectional GRU, then a norm over a step's units."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * hidden)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.norm(_packed(self.gru, self.drop(x), lengths))


def _packed(rnn: nn.RNNBase, x: Tensor, lengths: Tensor) -> Tensor:
    """Run a recurrent layer over each row alone: (B, N, D) to (B, N, directions * hidden).

    In float32 under autocast too: on the CPU autocast skips packed rows, and on CUDA it uses
    float16 for recurrent layers even when bfloat16 was asked for (ATen/cudnn/AutocastRNN.cpp),
    which overflows without a scaled loss.
    """
    if torch.compiler.is_exporting():
        return _unpacked(rnn, x, lengths)
    with torch.autocast(x.device.type, enabled=False):
        output, _ = rnn(
            pack_padded_sequence(
                x.float(), lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
            )
        )
    return pad_packed_sequence(output, batch_first=True, total_length=x.shape[1])[0]


def _conformer_layer(layer: Any, x: Tensor, real: Tensor, seen: Tensor) -> Tensor:
    """Run torchaudio's ConformerLayer on (B, N, D), with padding kept out of convolution and group
    norm.
    """
    x = layer.ffn1(x) * 0.5 + x
    hidden = layer.self_attn_layer_norm(x).transpose(0, 1)
    attended, _ = layer.self_attn(
        hidden, hidden, hidden, key_padding_mask=~seen, need_weights=False
    )
    x = layer.self_attn_dropout(attended).transpose(0, 1) + x
    x = x + _convolution(layer.conv_module, x, real)
    x = layer.ffn2(x) * 0.5 + x
    return layer.final_layer_norm(x)


def _convolution(module: Any, x: Tensor, real: Tensor) -> Tensor:
    """Run torchaudio's convolution module on (B, N, D).

    Steps after a row's end are 0 for the depthwise kernel; the group norm uses a row's own steps.
    """
    enter, gate, depthwise, norm, *rest = module.sequential
    own = real[:, None]
    x = depthwise(gate(enter(module.layer_norm(x).transpose(1, 2))) * own).float()
    count = (real.sum(1) * x.shape[1]).clamp(min=1)[:, None, None]
    mean = (x * own).sum((1, 2), keepdim=True) / count
    variance = ((x - mean).square() * own).sum((1, 2), keepdim=True) / count
    x = (x - mean) * (variance + norm.eps).rsqrt()
    x = x * norm.weight[:, None] + norm.bias[:, None]
    for part in rest:
        x = part(x)
    return x.transpose(1, 2)


def _unpacked(rnn: nn.RNNBase, x: Tensor, lengths: Tensor) -> Tensor:
    """Return what `_packed` gives, as a graph of tensors, which has no packed rows.

    The second direction reads each row from its own end. What it reads before that is padding.

    Raises:
        ValueError: The layer is no GRU.
    """
    if not isinstance(rnn, nn.GRU):
        raise ValueError(
            f"a layer {type(rnn).__name__} over rows of several lengths (pack_padded_sequence) is "
            "not a graph of tensors; torchaudio/deepspeech2 and conformer are"
        )
    step = torch.arange(x.shape[1], device=x.device)
    last = lengths[:, None] - 1
    is_real = step <= last
    reversed_step = torch.where(is_real, last - step, step)
    forward = _one_direction(rnn, x, "")
    backward = _one_direction(rnn, _picked(x, reversed_step), "_reverse")
    both = torch.cat([forward, _picked(backward, reversed_step)], 2)
    return both * is_real[:, :, None]


def _picked(x: Tensor, steps: Tensor) -> Tensor:
    """Return the ``steps`` (B, N) of each row of ``x`` (B, N, D)."""
    return x.gather(1, steps[:, :, None].expand(-1, -1, x.shape[2]))


def _one_direction(gru: nn.GRU, x: Tensor, suffix: str) -> Tensor:
    """Run one direction of a layer over the steps as they come: (B, N, D) to (B, N, hidden)."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [getattr(gru, name + suffix) for name in names]
    start = x.new_zeros(1, x.shape[0], gru.hidden_size)
    output, _ = torch.gru(x, start, weights, True, 1, 0.0, False, False, True)
    return output
