"""Self-distillation on images without labels: DINO (Caron et al., ICCV 2021)."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, Objective, View
from pipeline.nn.all_gather import summed


class DINOOptions(Options):
    local_crops: int = Field(
        6, ge=0, description="small views of each row, beside the two large ones"
    )
    local_size: int | None = Field(
        None,
        ge=8,
        description="pixels a side of a small view; none: 3/7 of the input's, in whole patches",
    )
    area: float = Field(
        0.4,
        gt=0.05,
        lt=1,
        description="large views show more than this share of the image, small ones less",
    )
    prototypes: int = Field(
        4096, ge=2, description="width of the output; the paper: 65536, for ImageNet"
    )
    hidden: int = Field(
        1024, ge=1, description="width of the projection head's layers; the paper: 2048"
    )
    bottleneck: int = Field(256, ge=1, description="width before the prototypes")
    student_temperature: float = Field(0.1, gt=0, description="of the student's softmax")
    temperature_start: float = Field(
        0.04, gt=0, description="of the teacher's softmax at first; lower is sharper"
    )
    temperature_end: float = Field(
        0.07, gt=0, description="of the teacher's softmax after its warm-up"
    )
    temperature_warmup: float = Field(
        0.3, ge=0, le=1, description="share of the steps in which the teacher's temperature rises"
    )
    momentum: float = Field(
        0.996,
        ge=0,
        lt=1,
        description="of the teacher's weights at first, rising to 1 as a cosine; short runs want "
        "less (0.99)",
    )
    center_momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="of the mean that is taken off the teacher's output, against collapse onto "
        "one prototype",
    )
    freeze_prototypes: float = Field(
        0.01, ge=0, le=1, description="share of the steps in which the prototypes stand still"
    )
    carry: Literal["teacher", "student"] = Field(
        "teacher", description="whose backbone the bundle holds"
    )


class Head(nn.Module):
    """(B, D) to (B, prototypes) cosines: an MLP of three layers, then weight-normed prototypes of
    length one.
    """

    def __init__(self, width: int, options: DINOOptions):
        super().__init__()
        layers = [
            nn.Linear(width, options.hidden),
            nn.Linear(options.hidden, options.hidden),
            nn.Linear(options.hidden, options.bottleneck),
        ]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        self.prototypes = nn.Parameter(torch.randn(options.prototypes, options.bottleneck))

    def forward(self, x: Tensor, moving: Tensor | float = 1.0) -> Tensor:
        """``moving``: 0 gives the prototypes a gradient of zero (DDP waits for one)."""
        held = self.prototypes.detach()
        directions = F.normalize(held + moving * (self.prototypes - held), dim=1)
        return F.linear(F.normalize(self.mlp(x), dim=1), directions)


def as_buffers(module: nn.Module) -> Any:
    """A copy whose parameters are buffers: saved, resumed and moved with the task, seen by no
    optimiser, and no layer of the task.
    """
    made = copy.deepcopy(module)
    for part in made.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return made


@register("objective", "dino", options=DINOOptions)
class DINO(Objective):
    """The student (the backbone) matches, from every view of a row, what its moving average (the
    teacher) says of the row's other large view.

    The teacher's output is centred by its mean over the global batch and sharpened by a low
    temperature; against collapse both are needed. Logged: ``teacher_entropy``, of the teacher's
    answer to a row (towards 0 or the logarithm of the prototypes it has collapsed), and
    ``batch_entropy``, of its mean answer to the global batch (towards 0 it says the same of every
    row). Its batch norms use the batch, its dropout is off. A validation loss is between two moving
    networks: it tells of collapse, not of quality.
    """

    metrics = ("loss",)
    log_names = ("teacher_entropy", "batch_entropy")
    couples_rows = True
    center: Tensor
    progress: Tensor

    def __init__(self, backbone: Backbone, options: DINOOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        inputs = backbone.arch["inputs"]
        if "size" not in inputs:
            raise ValueError(
                f"{backbone.arch['name']}: dino compares views of images; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        step = getattr(backbone, "patch", None) or 1
        self.local_size = options.local_size or max(
            step, 8, round(inputs["size"] * 3 / 7 / step) * step
        )
        self.head = Head(backbone.pooled_dim, options)
        self.teacher_backbone, self.teacher_head = as_buffers(backbone), as_buffers(self.head)
        self.register_buffer("center", torch.zeros(options.prototypes))
        self.register_buffer("progress", torch.zeros(()))
        self._begun = False
        if options.local_crops:
            self._try_local(inputs["channels"])

    def _try_local(self, channels: int) -> None:
        """Raises ValueError for a backbone that does not take small views."""
        image = torch.zeros(1, channels, self.local_size, self.local_size)
        try:
            with torch.no_grad():
                self.teacher_backbone.eval()(
                    Batch(
                        np.zeros(1, dtype=np.int64),
                        torch.zeros(1, dtype=torch.int64),
                        {"image": image},
                    )
                )
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.teacher_backbone.arch['name']} does not take dino's small views of "
                f"{self.local_size} px ({str(error).splitlines()[0]}): "
                "set another dino.local_size, dino.local_crops: 0, or take a backbone for "
                "images of any size"
            ) from None

    def views(self) -> tuple[View, ...]:
        o = self.options
        large, small = (o.area, 1.0), (0.05, o.area)
        return (
            View(area=large, strength=0.5, blur=1.0),
            View(area=large, strength=0.5, blur=0.1, solarize=0.2),
            *[View(size=self.local_size, area=small, strength=0.5, blur=0.5)] * o.local_crops,
        )

    def _taught(self, batch: Batch) -> Tensor:
        """(2, B, K) the teacher's cosines of the large views."""
        self.teacher_backbone.eval()
        for part in self.teacher_backbone.modules():
            if isinstance(
                part, _BatchNorm
            ):  # as in the paper; running statistics would lag behind in the first steps
                part.train(self.training)
        with torch.no_grad():
            both = batch.replace(image=torch.cat([batch["view0"], batch["view1"]]))
            return (
                self.teacher_head(self.teacher_backbone(both).pooled)
                .float()
                .view(2, len(batch), -1)
            )

    def _learned(self, backbone: Backbone, batch: Batch) -> Tensor:
        """(2 + local crops, B, K) log-probabilities of the student; views of one size go through
        the backbone as one batch.
        """
        names = [f"view{i}" for i in range(2 + self.options.local_crops)]
        moving = (self.progress >= self.options.freeze_prototypes).float()
        found = [
            self.head(
                backbone(batch.replace(image=torch.cat([batch[name] for name in part]))).pooled,
                moving,
            )
            for part in (names[:2], names[2:])
            if part
        ]
        return (
            (torch.cat(found).float() / self.options.student_temperature)
            .log_softmax(-1)
            .view(len(names), len(batch), -1)
        )

    def temperature(self) -> Tensor:
        """The teacher's, at this point of the run."""
        o = self.options
        share = (
            (self.progress / o.temperature_warmup).clamp(max=1.0)
            if o.temperature_warmup
            else torch.ones_like(self.progress)
        )
        return o.temperature_start + (o.temperature_end - o.temperature_start) * share

    def _rows(self, target: Tensor, learned: Tensor) -> Tensor:
        """(B,) cross-entropies of (2, B, K) targets, each with all views but its own, the mean over
        pairs.
        """
        both = target.sum(0)
        losses = [
            -((both - target[v] if v < 2 else both) * learned[v]).sum(-1)
            for v in range(len(learned))
        ]
        return torch.stack(losses).sum(0) / (2 * (len(learned) - 1))

    def loss(self, backbone: Backbone, batch: Batch):
        self._begin(backbone)
        taught = self._taught(batch)
        logs = ((taught - self.center) / self.temperature()).log_softmax(-1)
        target = logs.exp()
        total = self._rows(target, self._learned(backbone, batch)).sum()
        mean = self._centered(taught.sum((0, 1)), target.sum((0, 1)), 2 * len(batch))
        of_batch = -torch.special.xlogy(mean, mean).sum()
        return (
            total,
            total.new_full((), float(len(batch))),
            {
                "teacher_entropy": -(target * logs).sum(-1).mean(0).sum(),
                "batch_entropy": of_batch * len(batch),
            },
        )

    def forward_without_rows(self, backbone: Backbone) -> None:
        self._begin(backbone)
        nothing = torch.zeros_like(self.center)
        self._centered(nothing, nothing, 0)

    @torch.no_grad()
    def _begin(self, backbone: Backbone) -> None:
        """The teacher starts as the student does, also where this one came from a checkpoint after
        the teacher was made.
        """
        if not self._begun and float(self.progress) == 0:
            self.teacher_backbone.load_state_dict(backbone.state_dict())
            self.teacher_head.load_state_dict(self.head.state_dict())
        self._begun = True

    @torch.no_grad()
    def _centered(self, outputs: Tensor, targets: Tensor, count: int) -> Tensor:
        """Move the centre by the sums of a rank's rows, on every rank alike; (K,) the mean target
        of the global batch.
        """
        outputs, targets, counts = summed(
            torch.cat([outputs, targets, outputs.new_full((1,), float(count))])
        ).tensor_split((len(outputs), 2 * len(outputs)))
        mean = outputs / counts.clamp(min=1.0)
        there = (counts > 0) & torch.isfinite(mean).all()
        self.center.copy_(
            torch.where(
                there, torch.lerp(mean, self.center, self.options.center_momentum), self.center
            )
        )
        return targets / counts.clamp(min=1.0)

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int, steps: int) -> None:
        momentum = 1 - (1 - self.options.momentum) * (math.cos(math.pi * step / steps) + 1) / 2
        for teacher, student in ((self.teacher_backbone, backbone), (self.teacher_head, self.head)):
            held, new = dict(teacher.named_buffers()), dict(student.named_parameters())
            torch._foreach_lerp_(
                [held[name] for name in new], [p.detach() for p in new.values()], 1 - momentum
            )
        self.progress.fill_((step + 1) / steps)

    def after_training(self, backbone: Backbone) -> None:
        if self.options.carry == "teacher":
            backbone.load_state_dict(self.teacher_backbone.state_dict())

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        target = ((self._taught(batch) - self.center) / self.temperature()).softmax(-1)
        return {"loss": self._rows(target, self._learned(backbone, batch))}
