"""Backbones for irregular events: a recurrent network over an hourly grid, and a transformer over
the set of events (STraTS).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import EventInputs
from pipeline.core.specs import Architecture

ARCHITECTURES = ["gru", "strats"]
MODALITY = "events"
DAY = 24.0


class EventsModelOptions(Options):
    width: int = Field(128, ge=8, description="channels of tokens")
    layers: int = Field(
        1, ge=1, le=24, description="recurrent layers, or blocks of the transformer"
    )
    heads: int = Field(4, ge=1, description="strats: heads of attention")
    bin: float = Field(
        1.0,
        gt=0,
        le=24 * 31,
        description="gru: hours of a step; the values of a variable in one step are averaged",
    )
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout")


@register("model", "events", options=EventsModelOptions)
class EventsBackbone(Backbone):
    """Networks for records of events (modality ``events``).

    Use ``gru`` for predictions of each hour, and where only the past may be read; ``strats``
    where few of many variables are measured.

    ``gru``: a GRU over a grid of hours.

    - A step is ``bin`` hours long. It has three numbers for every variable: its last mean value,
      whether it was measured in this step, and the hours since it was measured. The static features
      are added to each step. GRU-D (Che et al. 2018) has the same input, and learned decays, which
      the GRU here has to find by itself.
    - ``tokens`` (B, T, width) are causal: a token depends only on the events before the end of its
      step. ``stages["times"]`` (B, T) float32 are these ends in hours, and ``stages["charted"]``
      (B, T) bool are the steps that have events. A row ends with the step of its last event.
    - ``pooled`` (B, 2 width): the last token, and the mean of all.

    ``strats``: a transformer over the set of events (STraTS, Tipirneni and Reddy 2022).

    - An event is the sum of three embeddings: of its variable, of its time and of its value. The
      last two are small networks of one number (d^1/2 tanh units).
    - ``tokens`` (B, N, width) are in the order of the events. ``token_mask`` (B, N) hides their
      values.
    - ``pooled`` (B, 2 width): the mean of the tokens, weighted by fusion attention, and the static
      features.

    ``inputs`` has ``variables``, ``numbers`` and ``codes`` (how many there are of each), ``start``
    and ``hours``.

    Raises ValueError for another architecture, and for rows without events.
    """

    def __init__(self, architecture: str, options: EventsModelOptions, inputs: EventInputs):
        super().__init__(architecture, options, inputs)
        name = f"events/{architecture}"
        if missing := {"variables", "numbers", "codes", "start", "hours"} - inputs.keys():
            raise ValueError(
                f"{name} reads events (modality events); these rows give no "
                f"{', '.join(sorted(missing))}"
            )
        if architecture == "strats" and options.width % options.heads:
            raise ValueError(
                f"{name}: width {options.width} is not divided by heads {options.heads}"
            )
        self.options = options
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.token_dim = options.width
        self.pooled_dim = 2 * options.width
        self.causal = architecture == "gru"
        self.static = Static(inputs["numbers"], inputs["codes"], options.width)
        self.body = Grid(options, inputs) if architecture == "gru" else Strats(options, inputs)

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if token_mask is not None and self.causal:
            raise ValueError(
                f"{self.arch.name} has no token for each event: forecast pretrains it, or mask "
                "events with events/strats"
            )
        return self.body(batch, self.static(batch), token_mask)

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for name, _ in self.named_parameters():
            top, part, number, *_ = [*name.split("."), "", ""]
            layer = f"block{number.zfill(2)}" if part == "blocks" else part
            out.setdefault("static" if top == "static" else layer, []).append(name)

        def place(name: str) -> tuple[object, ...]:
            return name != "static", name not in ("embed", "enter"), name == "fuse", name

        return {name: out[name] for name in sorted(out, key=place)}


class Static(nn.Module):
    """Embed a row's static features, (B, width): numbers with whether they are known, and the
    vectors of its texts, whose sum is divided by the square root of their number.
    """

    def __init__(self, numbers: int, codes: int, width: int):
        super().__init__()
        self.numbers = nn.Linear(2 * numbers, width)
        self.codes = nn.Embedding(codes + 1, width, padding_idx=0)

    def forward(self, batch: Batch) -> Tensor:
        codes = batch["codes"]
        count = (codes > 0).sum(1, keepdim=True).clamp(min=1)
        of_codes = self.codes(codes).sum(1) / count.sqrt()
        numbers = batch["numbers"]
        numbers = torch.cat([numbers, batch["numbers_known"].to(numbers.dtype)], 1)
        return torch.tanh(self.numbers(numbers) + of_codes)


def grid(
    batch: Batch, variables: int, start: float, step: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Put events on a grid of steps: up to the last event of a batch, or all in an export.

    Args:
        batch: Finished rows.
        variables: How many there are.
        start: Hour at which the grid begins.
        step: Hours of a step.
        most: Steps of the longest row that there can be.

    Returns:
        (B, T, V) float32 mean value in each step, (B, T, V) bool whether it was measured, and (B,)
        int64 steps of each row, up to that of its last event.
    """
    times, mask = batch["times"], batch["mask"]
    place = ((times - start) / step).floor().long().clamp(min=0)
    if torch.compiler.is_exporting():  # later events than a row may have count in its last step
        place = place.clamp(max=most - 1)
    steps = torch.where(mask, place + 1, 1).amax(1)
    rows = times.shape[0]
    # a graph of tensors has one number of steps
    length = most if torch.compiler.is_exporting() else int(steps.max()) if rows else 1
    row = torch.arange(rows, device=times.device)[:, None]
    index = (row * length + place) * variables + batch["variables"]
    index = torch.where(mask, index, 0).flatten()  # padding adds 0 to the first
    weight, values = (
        torch.where(mask, of_event, 0.0).flatten()
        for of_event in (torch.ones_like(times), batch["values"].float())
    )
    count = torch.zeros(rows * length * variables, device=times.device).index_add_(0, index, weight)
    total = torch.zeros_like(count).index_add_(0, index, values)
    shape = rows, length, variables
    return (total / count.clamp(min=1)).view(shape), (count > 0).view(shape), steps


def _running_max(x: Tensor) -> Tensor:
    """Return (B, T, V) the largest value up to each step."""
    if not torch.compiler.is_exporting():
        return x.cummax(1).values
    # ONNX has no cummax: after each round the maximum is over twice as many steps
    distance = 1
    while distance < x.shape[1]:
        later = torch.maximum(x[:, distance:], x[:, :-distance])
        x = torch.cat([x[:, :distance], later], 1)
        distance *= 2
    return x


class Grid(nn.Module):
    """The GRU over a grid of hours."""

    def __init__(self, options: EventsModelOptions, inputs: EventInputs):
        super().__init__()
        self.variables, self.start, self.step = inputs["variables"], inputs["start"], options.bin
        self.most = max(1, math.ceil((inputs["hours"] - self.start) / self.step))
        self.enter = nn.Linear(3 * self.variables, options.width)
        self.drop = nn.Dropout(options.dropout)
        self.gru = nn.GRU(
            options.width,
            options.width,
            options.layers,
            batch_first=True,
            dropout=options.dropout if options.layers > 1 else 0.0,
        )

    def forward(self, batch: Batch, static: Tensor, token_mask: Tensor | None) -> Features:
        value, seen, steps = grid(batch, self.variables, self.start, self.step, self.most)
        at = torch.arange(value.shape[1], device=value.device)
        last = _running_max(torch.where(seen, at[:, None], -1))
        value = value.gather(1, last.clamp(min=0)) * (last >= 0)
        steps_ago = torch.where(last >= 0, at[:, None] - last, at[:, None] + 1)
        ago = steps_ago * (self.step / (2 * DAY))
        ago = ago.to(value.dtype).clamp(max=2.0)
        x = torch.cat([value, seen.to(value.dtype), ago], 2)
        tokens, _ = self.gru(self.drop(torch.relu(self.enter(x) + static[:, None])))
        real = at < steps[:, None]
        tokens = tokens * real[..., None]
        rows = tokens.shape[0]
        end = tokens[torch.arange(rows, device=tokens.device), steps - 1]
        mean = tokens.sum(1) / steps[:, None]
        times = (self.start + (at + 1) * self.step).float().expand(rows, -1)
        return Features(
            torch.cat([end, mean], 1),
            tokens=tokens,
            mask=real,
            stages={"times": times, "charted": seen.any(2)},
        )


class NumberEmbedding(nn.Module):
    """Embed a number as (..., width) with d^1/2 tanh units (continuous value embedding of
    STraTS).
    """

    def __init__(self, width: int):
        super().__init__()
        self.enter = nn.Linear(1, math.isqrt(width))
        self.leave = nn.Linear(math.isqrt(width), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x[..., None])))


class EventEmbedding(nn.Module):
    """Embed events, (B, N, width): the sum of the embeddings of variable, time and value."""

    def __init__(self, options: EventsModelOptions, inputs: EventInputs):
        super().__init__()
        self.variable = nn.Embedding(inputs["variables"], options.width)
        self.time = NumberEmbedding(options.width)
        self.value = NumberEmbedding(options.width)

    def forward(self, batch: Batch, token_mask: Tensor | None) -> Tensor:
        value = self.value(batch["values"])
        if token_mask is not None:
            value = value * ~token_mask[..., None]
        return self.variable(batch["variables"]) + self.time(batch["times"] / DAY) + value


class FusionAttention(nn.Module):
    """Pool tokens by attention (STraTS, section 3.2.4); 0 for a row without tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        score = self.leave(torch.tanh(self.enter(tokens)))[..., 0].float()
        weight = score.masked_fill(~mask, -1e9).softmax(1) * mask
        return (weight[..., None].to(tokens.dtype) * tokens).sum(1)


class Strats(nn.Module):
    """STraTS: the transformer over a set of events."""

    def __init__(self, options: EventsModelOptions, inputs: EventInputs):
        super().__init__()
        width = options.width
        self.embed = EventEmbedding(options, inputs)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                options.heads,
                2 * width,
                options.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(options.layers)
        )
        self.fuse = FusionAttention(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: Batch, static: Tensor, token_mask: Tensor | None) -> Features:
        mask = batch["mask"]
        x = self.embed(batch, token_mask)
        # a row without events attends to its padding, whose tokens are set to 0 below
        seen = mask | ~mask.any(1, keepdim=True)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~seen)
        x = self.norm(x) * mask[..., None]
        return Features(
            torch.cat([self.fuse(x, mask), static], 1),
            tokens=x,
            mask=mask,
        )
