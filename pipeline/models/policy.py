"""Backbones of policies: an MLP over a window of observations, and a causal transformer (GPT-2)
over observations and actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import registry
from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Features
from pipeline.core.inputs import TrajectoryInputs
from pipeline.core.nn.action_heads import pick_space
from pipeline.core.specs import Architecture

ARCHITECTURES = ["mlp", "transformer"]
MODALITY = "trajectory"

PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of a frame's channels: ImageNet's, as published vision backbones
expect.
"""
PER_SPACE = ("encoders", "action_encoders")
ONLY_OF = {"window": "mlp", "heads": "transformer", "context": "transformer"}
"""Options that one architecture alone reads."""
MEMORY = {"mlp": "window", "transformer": "context"}
"""The option that says how many steps a token of an architecture knows."""


class PolicyOptions(Options):
    width: int = Field(128, ge=8, description="channels of tokens")
    layers: int = Field(2, ge=1, le=48, description="mlp: hidden layers; transformer: blocks")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout; the Decision Transformer has 0.1")
    window: int = Field(
        1, ge=1, le=1000, description="mlp: the last observations that a token knows"
    )
    heads: int = Field(4, ge=1, description="transformer: heads of attention; must divide width")
    context: int = Field(
        20,
        ge=1,
        le=8192,
        description="transformer: the last steps that a token knows; longer episodes are cut into "
        "pieces of so many steps",
    )
    vision: str | None = Field(
        None,
        description="the backbone that reads camera frames, as LIBRARY/MODEL, such as "
        "timm/resnet18; none: the rows have no frames",
    )


@register("model", "policy", options=PolicyOptions)
class Policy(Backbone):
    """Networks for episodes of observations and actions (modality ``trajectory``).

    Use ``mlp`` where the last observations suffice and demonstrations are few; ``transformer``
    where the policy needs a memory.

    ``mlp``: the encoded observations of the last ``window`` steps, concatenated (0 before the
    start), then ``layers`` times linear, GELU, dropout. It does not read actions.

    ``transformer``: transformers' GPT-2 over the encoded observations. To each of them the encoded
    action before it is added, as it was executed where that is recorded. Episodes longer than
    ``context`` are cut into parts of ``context`` steps. Each part begins at position 0, without the
    action before its first step, as the Decision Transformer is trained (Chen et al. 2021). A
    rollout reads the last ``context`` steps.

    Every space (the observations and actions of one robot) has its own linear encoders:
    ``encoders.<space>``, and for actions ``action_encoders.<space>``. All else is shared. An
    embedding of the task, and the projected features of the frame, are added to the encoded
    observation.

    - ``tokens`` (B, T, width), one for each step: token t depends on observations up to t and on
      actions before t. Padding is 0.
    - ``pooled`` (B, width) is their mean.

    ``inputs`` has ``spaces`` (widths of observations and actions of each robot), ``tasks`` (how
    many) and ``images`` (channels, height, width; or None).

    Raises ValueError for rows that are not trajectories, stated options of the other architecture,
    heads that do not divide the width, and frames without a vision backbone or the other way round.
    """

    causal = True

    def __init__(self, architecture: str, options: PolicyOptions, inputs: TrajectoryInputs):
        super().__init__(architecture, options, inputs)
        name, frames = f"policy/{architecture}", inputs.get("images")
        if not inputs.get("spaces"):
            raise ValueError(
                f"{name} reads trajectories (modality trajectory); these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        # a bundle states all of these, those that it does not read by their defaults
        stated, every = options.model_fields_set & ONLY_OF.keys(), PolicyOptions.model_fields
        foreign = sorted(
            option
            for option in stated
            if ONLY_OF[option] != architecture
            and (stated != ONLY_OF.keys() or getattr(options, option) != every[option].default)
        )
        if foreign:
            raise ValueError(
                f"{name} does not read {foreign[0]}: leave it out; {MEMORY[architecture]} says how "
                "many steps it knows"
            )
        if architecture == "transformer" and options.width % options.heads:
            raise ValueError(
                f"{name}: width {options.width} is not divided by heads {options.heads}"
            )
        if options.vision and not frames:
            raise ValueError(
                f"{name}: vision: {options.vision} has no frames to read: set {{trajectory: "
                f"{{images: 96}}}} and name column images"
            )
        if frames and not options.vision:
            raise ValueError(
                f"{name}: the rows have frames of {frames[1]} pixels that nothing reads: set "
                "vision: timm/resnet18, or leave column images out"
            )
        self.options = options
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.token_dim = self.pooled_dim = options.width
        self.spaces: tuple[str, ...] = tuple(inputs["spaces"])
        width = options.width
        if options.vision:
            self.vision = _vision(options.vision, list(frames or ()), name)
            self.project = nn.Linear(self.vision.pooled_dim, width)
        self.encoders = nn.ModuleDict(
            {
                space: nn.Linear(sizes["observation"], width)
                for space, sizes in inputs["spaces"].items()
            }
        )
        self.action_encoders: nn.ModuleDict | None = None
        if architecture == "transformer":
            self.action_encoders = nn.ModuleDict(
                {
                    space: nn.Linear(sizes["action"], width)
                    for space, sizes in inputs["spaces"].items()
                    if sizes["action"]
                }
            )
        self.tasks = nn.Embedding(inputs["tasks"] + 1, width, padding_idx=0)
        with torch.no_grad():
            self.tasks.weight.mul_(width**-0.5)
        self.body: StackedSteps | CausalTransformer = (
            StackedSteps(options) if architecture == "mlp" else CausalTransformer(options)
        )

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if token_mask is not None:
            raise ValueError(
                f"{self.arch.name} cannot hide steps: dynamics pretrains it without labels, "
                "behaviour_cloning with actions"
            )
        mask = batch["mask"]
        real = mask[..., None]
        x = (
            self._encode_by_space(self.encoders, batch["observations"], batch["space"])
            + self.tasks(batch["task"])[:, None]
        )
        if self.options.vision:
            x = x + self._frame_features(batch, mask)
        actions = None
        if self.action_encoders is not None:
            done = batch.data.get("executed", batch.data.get("actions"))
            if done is not None:
                actions = self._encode_by_space(self.action_encoders, done, batch["space"])
            else:
                x = self._connect_unused(x, self.action_encoders.values())
        tokens = self.body(x, actions, mask)
        tokens = torch.where(real, tokens, 0.0)
        return Features(
            tokens.sum(1) / real.sum(1).clamp(min=1),
            tokens=tokens,
            mask=mask,
        )

    def _encode_by_space(self, encoders: nn.ModuleDict, x: Tensor, space: Tensor) -> Tensor:
        """Encode (B, T, n) to (B, T, width) with the encoder of each row's space, 0 where there is
        none.
        """
        if torch.compiler.is_exporting() and len(self.spaces) > 1:  # a graph has no lists of rows
            encoded = {
                self.spaces.index(name): encoder(x[..., : encoder.in_features])
                for name, encoder in encoders.items()
            }
            zeros = x.new_zeros(*x.shape[:2], self.options.width)
            return pick_space(encoded, space, zeros)
        parts, rows_of_parts = [], []
        # Ascending, as `unique` sorts
        present: list[int] = space.unique().tolist() if len(self.spaces) > 1 else []
        present = present or [0]
        for number in present:
            rows = (space == number).nonzero()[:, 0] if len(present) > 1 else None
            of_space = x if rows is None else x[rows]
            encoder: Any = dict(encoders.items()).get(self.spaces[number])
            parts.append(
                encoder(of_space[..., : encoder.in_features])
                if encoder is not None
                else of_space.new_zeros(*of_space.shape[:2], self.options.width)
            )
            rows_of_parts.append(rows)
        out = parts[0]
        if rows_of_parts[0] is not None:
            out = torch.cat(parts)[torch.cat(rows_of_parts).argsort()]
        unused = [
            encoder for name, encoder in encoders.items() if self.spaces.index(name) not in present
        ]
        return self._connect_unused(out, unused)

    def _connect_unused(self, x: Tensor, unused: Iterable[nn.Module]) -> Tensor:
        """Return the input, connected in training to modules that no row of this batch uses.

        DDP waits for the gradient of every parameter.
        """
        if self.training:
            for parameter in (p for module in unused for p in module.parameters()):
                x = x + 0.0 * parameter.sum()
        return x

    def _frame_features(self, batch: Batch, mask: Tensor) -> Tensor:
        """Compute (B, T, width) features of the frames.

        Padding is left out, so that batch norms do not include it.
        """
        if "images" not in batch.data:
            raise ValueError(
                f"{self.arch.name} reads frames with {self.options.vision}, and these rows "
                "have none: name column images"
            )
        frames = batch["images"][mask]
        mean, std = (
            torch.tensor(values, device=frames.device).view(1, -1, 1, 1) for values in PIXELS
        )
        inputs = Batch(
            np.arange(len(frames)),
            frames.new_zeros(len(frames), dtype=torch.long),
            {"image": (frames / 255 - mean) / std},
        )
        features = self.project(self.vision(inputs).pooled)
        return features.new_zeros(*mask.shape, features.shape[-1]).masked_scatter(
            mask[..., None], features
        )

    def undecayed_parameters(self) -> set[str]:
        exempt = self.vision.undecayed_parameters() if self.options.vision else ()
        return {f"vision.{name}" for name in exempt}

    def layers(self) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        if self.options.vision:
            out = {
                f"vision.{name}": [f"vision.{p}" for p in names]
                for name, names in self.vision.layers().items()
            }
        out["encoders"], last = [], []
        for name, _ in self.named_parameters():
            part, *rest = name.split(".")
            if part == "body" and (number := self.body.block_of(".".join(rest))) is not None:
                out.setdefault(f"block{number:02d}", []).append(name)
            elif part != "vision":
                (last if name.startswith("body.model.ln_f.") else out["encoders"]).append(name)
        return out | ({"norm": last} if last else {})

    def convert_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Adapt encoders and task embeddings to these spaces and tasks.

        Encoders of new spaces keep their random weights, a new task starts as the mean of the known
        ones (0 where there is none); spaces that are not asked for are dropped.
        """
        own, out, notes = self.state_dict(), dict(tensors), []
        for part in PER_SPACE:
            own_spaces, their_spaces = (_by_space(part, names) for names in (own, tensors))
            for space in [*own_spaces, *(name for name in their_spaces if name not in own_spaces)]:
                if (
                    space in own_spaces
                    and space in their_spaces
                    and all(
                        n in tensors and tensors[n].shape == own[n].shape for n in own_spaces[space]
                    )
                ):
                    continue
                for name in their_spaces.get(space, ()):
                    del out[name]
                out |= {name: own[name] for name in own_spaces.get(space, ())}
                differ = [
                    (tensors[n].shape[-1], own[n].shape[-1])
                    for n in own_spaces.get(space, ())
                    if n.endswith("weight") and n in tensors
                ]
                description = "".join(f" ({had} numbers there, {has} here)" for had, has in differ)
                notes.append(
                    f"{part}.{space} {'new' if space in own_spaces else 'dropped'}{description}"
                )
        old, new = tensors.get("tasks.weight"), own["tasks.weight"]
        if old is not None and old.shape != new.shape and old.shape[1:] == new.shape[1:]:
            kept = min(len(old), len(new))
            known = torch.zeros_like(old[:1])
            if kept > 1:
                known = old[1:kept].mean(0, keepdim=True)
            added = known.expand(len(new) - kept, -1)
            out["tasks.weight"] = torch.cat([old[:kept], added]).to(new.dtype)
            rest = f"{len(new) - kept} new" if len(new) > kept else f"{len(old) - kept} dropped"
            notes.append(f"tasks: {kept - 1} kept, {rest}")
        return out, [*notes, "trunk kept"] if notes else []


def _by_space(part: str, names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Group the names of a part's tensors by space."""
    out: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(f"{part}."):
            out.setdefault(name.split(".")[1], []).append(name)
    return out


def _vision(name: str, frames: list[int], own_name: str) -> Backbone:
    """Build the vision backbone, with random weights.

    Raises ValueError where it is not known, or does not read such frames.
    """
    library, _, architecture = name.partition("/")
    libraries = registry.names("model")
    is_known = library in libraries
    known = registry.architectures(library) if is_known else libraries
    if not is_known or architecture not in known:
        raise ValueError(
            f"{own_name}: vision: {name} is not a LIBRARY/MODEL; "
            f"{registry.nearest(architecture or library, known)}"
        )
    kind = registry.get("model", library)
    try:
        return kind(architecture, kind.options_class(), {"channels": frames[0], "size": frames[1]})
    except ValueError as error:
        raise ValueError(f"{own_name}: vision: {error}") from None


class StackedSteps(nn.Module):
    """Layers over windows of (B, T, width)."""

    def __init__(self, options: PolicyOptions):
        super().__init__()
        self.window, width = options.window, options.width
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width if i else width * options.window, width),
                nn.GELU(),
                nn.Dropout(options.dropout),
            )
            for i in range(options.layers)
        )

    def forward(self, x: Tensor, actions: Tensor | None, mask: Tensor) -> Tensor:
        x = F.gelu(x)
        if self.window > 1:
            x = (
                F.pad(x, (0, 0, self.window - 1, 0))
                .unfold(1, self.window, 1)
                .transpose(2, 3)
                .flatten(2)
            )
        for block in self.blocks:
            x = block(x)
        return x

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to."""
        return int(name.split(".")[1])


class CausalTransformer(nn.Module):
    """GPT-2 over (B, T, width) of observations and, one step late, of actions.

    It needs no mask: padding follows a row's steps, which attend backwards only.
    """

    def __init__(self, options: PolicyOptions):
        super().__init__()
        import transformers as hf

        drop = options.dropout
        config = hf.GPT2Config(
            vocab_size=1,
            n_positions=options.context,
            n_embd=options.width,
            n_layer=options.layers,
            n_head=options.heads,
            resid_pdrop=drop,
            embd_pdrop=drop,
            attn_pdrop=drop,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.context = options.context
        self.model: Any = hf.GPT2Model(config)
        self.model.wte = nn.Identity()  # there are no words

    def forward(self, x: Tensor, actions: Tensor | None, mask: Tensor) -> Tensor:
        rows, steps, width = x.shape
        kept = None
        if steps > self.context:
            pieces = -(-steps // self.context)
            spare = pieces * self.context - steps
            # pieces that are only padding are left out
            kept = F.pad(mask, (0, spare)).view(rows * pieces, self.context).any(1)

            def cut(part: Tensor) -> Tensor:
                padded = F.pad(part, (0, 0, 0, spare))
                return padded.view(rows * pieces, self.context, width)[kept]

            x = cut(x)
            actions = None if actions is None else cut(actions)
        if actions is not None:
            x = x + F.pad(actions[:, :-1], (0, 0, 1, 0))
        hidden = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        if kept is None:
            return hidden
        out = hidden.new_zeros(len(kept), self.context, width)
        out[kept] = hidden
        return out.view(rows, -1, width)[:, :steps]

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a parameter belongs to; None for positions and last
        norm.
        """
        return int(name.split(".")[2]) if name.startswith("model.h.") else None
