"""Self-distillation on images without labels: DINO (Caron et al., ICCV 2021).

Shapes: B rows, D features, K prototypes, V views of a row (two large, then small ones).
"""

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
from pipeline.core.contracts.backbone_capabilities import patch_size
from pipeline.core.nn.all_gather import all_reduce_sum
from pipeline.core.specs import State


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
        description="of the teacher's weights at first, rising to 1 as a cosine; short runs need "
        "less (0.99)",
    )
    center_momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="of the mean that is subtracted from the teacher's output, against collapse "
        "onto one prototype",
    )
    freeze_prototypes: float = Field(
        0.01, ge=0, le=1, description="share of the steps in which the prototypes are frozen"
    )
    carry: Literal["teacher", "student"] = Field(
        "teacher", description="whose backbone the bundle holds"
    )

    @property
    def replaces_backbone(self) -> bool:
        """Whether the bundle holds the teacher's backbone."""
        return self.carry == "teacher"


class Head(nn.Module):
    """An MLP of three layers, then weight-normed prototypes of length one."""

    def __init__(self, width: int, options: DINOOptions):
        super().__init__()
        first = nn.Linear(width, options.hidden)
        second = nn.Linear(options.hidden, options.hidden)
        third = nn.Linear(options.hidden, options.bottleneck)
        for layer in (first, second, third):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)
        self.prototypes = nn.Parameter(torch.randn(options.prototypes, options.bottleneck))

    def forward(self, x: Tensor, train_prototypes: Tensor | float = 1.0) -> Tensor:
        """Return the cosines (B, K) of features (B, D) with the prototypes.

        ``train_prototypes`` 0 gives the prototypes a gradient of zero: DDP waits for one.
        """
        fixed = self.prototypes.detach()
        prototypes = fixed + train_prototypes * (self.prototypes - fixed)
        embeddings = F.normalize(self.mlp(x), dim=1)
        return F.linear(embeddings, F.normalize(prototypes, dim=1))


def as_buffers(module: nn.Module) -> Any:
    """Return a copy of the module whose parameters are buffers.

    They are saved, resumed and moved with the task, but no optimiser and no layer holds them.
    """
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return copied


@register("objective", "dino", options=DINOOptions)
class DINO(Objective):
    """DINO: train a student on what its moving average outputs for other views of a row.

    It needs images alone, the more the better, and memory for a second network (the teacher) and
    several views of each image. Use it to pretrain vision transformers or convolutional networks
    without labels. Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers".

    The student (the backbone) matches, from every view, the teacher's output for the row's other
    large view. The teacher's output is centred by its mean over the global batch and sharpened by
    a low temperature; both are needed against collapse. The teacher's batch norms use the batch,
    its dropout is off.

    Logged: ``teacher_entropy``, of the teacher's output for a row, and ``batch_entropy``, of its
    mean output over the global batch. The teacher has collapsed where the first approaches 0 or
    the logarithm of the number of prototypes, or the second approaches 0. A validation loss is
    between two moving networks: it shows collapse, not quality.
    """

    metrics = ("loss",)
    log_names = ("teacher_entropy", "batch_entropy")
    center: Tensor
    progress: Tensor

    def __init__(self, backbone: Backbone, options: DINOOptions, state: State):
        super().__init__(backbone, options, state)
        inputs = backbone.arch.inputs
        if "size" not in inputs:
            raise ValueError(
                f"{backbone.arch.name}: dino compares views of images; these rows are "
                f"{', '.join(inputs) or 'something else'}"
            )
        step = patch_size(backbone) or 1
        in_steps = round(inputs["size"] * 3 / 7 / step) * step
        self.local_size = options.local_size or max(step, 8, in_steps)
        self.head = Head(backbone.pooled_dim, options)
        self.teacher_backbone = as_buffers(backbone)
        self.teacher_head = as_buffers(self.head)
        self.register_buffer("center", torch.zeros(options.prototypes))
        self.register_buffer("progress", torch.zeros(()))
        self._is_teacher_set = False
        if options.local_crops:
            self._check_local_size(inputs["channels"])

    def _check_local_size(self, channels: int) -> None:
        """Raise ValueError for a backbone that cannot read small views."""
        image = torch.zeros(1, channels, self.local_size, self.local_size)
        row = np.zeros(1, dtype=np.int64)
        key = torch.zeros(1, dtype=torch.int64)
        try:
            with torch.no_grad():
                self.teacher_backbone.eval()(Batch(row, key, {"image": image}))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self.teacher_backbone.arch.name} does not take dino's small views of "
                f"{self.local_size} px ({str(error).splitlines()[0]}): set another "
                "dino.local_size, dino.local_crops: 0, or take a backbone for images of any size"
            ) from None

    def views(self) -> tuple[View, ...]:
        """Return two large views and ``local_crops`` small ones."""
        options = self.options
        large = (options.area, 1.0)
        small = (0.05, options.area)
        first = View(area=large, strength=0.5, blur=1.0)
        second = View(area=large, strength=0.5, blur=0.1, solarize=0.2)
        local = View(size=self.local_size, area=small, strength=0.5, blur=0.5)
        return first, second, *[local] * options.local_crops

    def _teacher_outputs(self, batch: Batch) -> Tensor:
        """Return the teacher's cosines (2, B, K) of the large views."""
        self.teacher_backbone.eval()
        for part in self.teacher_backbone.modules():
            # as in the paper; running statistics would lag behind in the first steps
            if isinstance(part, _BatchNorm):
                part.train(self.training)
        with torch.no_grad():
            both = batch.replace(image=torch.cat([batch["view0"], batch["view1"]]))
            outputs = self.teacher_head(self.teacher_backbone(both).pooled)
            return outputs.float().view(2, len(batch), -1)

    def _student_outputs(self, backbone: Backbone, batch: Batch) -> Tensor:
        """Return the student's log probabilities (V, B, K).

        Views of one size go through the backbone as one batch.
        """
        names = [f"view{i}" for i in range(2 + self.options.local_crops)]
        train_prototypes = (self.progress >= self.options.freeze_prototypes).float()
        outputs = []
        for of_one_size in (names[:2], names[2:]):
            if of_one_size:
                views = torch.cat([batch[name] for name in of_one_size])
                features = backbone(batch.replace(image=views)).pooled
                outputs.append(self.head(features, train_prototypes))
        logits = torch.cat(outputs).float() / self.options.student_temperature
        return logits.log_softmax(-1).view(len(names), len(batch), -1)

    def temperature(self) -> Tensor:
        """Return the teacher's temperature at this point of the run."""
        options = self.options
        share = torch.ones_like(self.progress)
        if options.temperature_warmup:
            share = (self.progress / options.temperature_warmup).clamp(max=1.0)
        rise = options.temperature_end - options.temperature_start
        return options.temperature_start + rise * share

    def _rows(self, target: Tensor, student: Tensor) -> Tensor:
        """Return (B,) cross entropies, the mean over pairs of a target and another view.

        Args:
            target: (2, B, K) probabilities of the large views, by the teacher.
            student: (V, B, K) log probabilities of all views.
        """
        both = target.sum(0)
        losses = []
        for view, log_probability in enumerate(student):
            others = both - target[view] if view < 2 else both
            losses.append(-(others * log_probability).sum(-1))
        num_pairs = 2 * (len(student) - 1)
        return torch.stack(losses).sum(0) / num_pairs

    def loss(self, backbone: Backbone, batch: Batch):
        self._set_teacher(backbone)
        teacher = self._teacher_outputs(batch)
        centred = teacher - self.center
        log_target = (centred / self.temperature()).log_softmax(-1)
        target = log_target.exp()
        student = self._student_outputs(backbone, batch)
        total = self._rows(target, student).sum()
        outputs = teacher.sum((0, 1))
        targets = target.sum((0, 1))
        mean = self._update_center(outputs, targets, 2 * len(batch))
        batch_entropy = -torch.special.xlogy(mean, mean).sum()
        entropies = -(target * log_target).sum(-1)
        logs = {
            "teacher_entropy": entropies.mean(0).sum(),
            "batch_entropy": batch_entropy * len(batch),
        }
        return total, total.new_full((), float(len(batch))), logs

    def forward_without_rows(self, backbone: Backbone) -> None:
        """Take part in the update of the centre without rows."""
        self._set_teacher(backbone)
        nothing = torch.zeros_like(self.center)
        self._update_center(nothing, nothing, 0)

    @torch.no_grad()
    def _set_teacher(self, backbone: Backbone) -> None:
        """Start the teacher from the student, once, at the first step of a run.

        Not when it is built: a checkpoint may be loaded into the student after that.
        """
        if not self._is_teacher_set and float(self.progress) == 0:
            self.teacher_backbone.load_state_dict(backbone.state_dict())
            self.teacher_head.load_state_dict(self.head.state_dict())
        self._is_teacher_set = True

    @torch.no_grad()
    def _update_center(self, outputs: Tensor, targets: Tensor, count: int) -> Tensor:
        """Move the centre, on every rank alike; return the global batch's mean target (K,).

        Args:
            outputs: (K,) sum of the teacher's outputs over this rank's large views.
            targets: (K,) sum of its probabilities.
            count: how many views those are.
        """
        k = len(outputs)
        own_count = outputs.new_full((1,), float(count))
        sums = all_reduce_sum(torch.cat([outputs, targets, own_count]))
        outputs, targets, counts = sums.tensor_split((k, 2 * k))
        mean = outputs / counts.clamp(min=1.0)
        is_usable = (counts > 0) & torch.isfinite(mean).all()
        moved = torch.lerp(mean, self.center, self.options.center_momentum)
        self.center.copy_(torch.where(is_usable, moved, self.center))
        return targets / counts.clamp(min=1.0)

    @torch.no_grad()
    def after_step(self, backbone: Backbone, step: int, steps: int) -> None:
        """Move the teacher towards the student."""
        falling = (math.cos(math.pi * step / steps) + 1) / 2
        momentum = 1 - (1 - self.options.momentum) * falling
        pairs = ((self.teacher_backbone, backbone), (self.teacher_head, self.head))
        for teacher, student in pairs:
            buffers = dict(teacher.named_buffers())
            new = dict(student.named_parameters())
            torch._foreach_lerp_(
                [buffers[name] for name in new],
                [parameter.detach() for parameter in new.values()],
                1 - momentum,
            )
        self.progress.fill_((step + 1) / steps)

    def after_training(self, backbone: Backbone) -> None:
        """Put the teacher's weights into the backbone, where it is the one to carry over."""
        if self.options.carry == "teacher":
            backbone.load_state_dict(self.teacher_backbone.state_dict())

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` (B,)."""
        centred = self._teacher_outputs(batch) - self.center
        target = (centred / self.temperature()).softmax(-1)
        return {"loss": self._rows(target, self._student_outputs(backbone, batch))}
