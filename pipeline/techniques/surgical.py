"""Surgical fine-tuning: one block of the backbone is trained (Lee et al. 2023)."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.registry import LayerOptions, nearest, register
from pipeline.core.contracts import Phase, Task, Technique


class SurgicalOptions(LayerOptions):
    layers: list[str] | None = Field(
        None,
        min_length=1,
        description="names of the layers to train; none: the one with the largest gradient "
        "relative to its weights",
    )
    probe_share: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="share of the steps that train the head alone before gradients are measured",
    )
    measure_steps: int = Field(
        10, ge=1, description="steps over which gradients are measured; no weight changes in them"
    )


class MeasuredTask(Task):
    """A task that remembers how large the gradients of its layers were.

    Args:
        task: The plain task.
    """

    def __init__(self, task: Task):
        super().__init__(task.backbone, task.objective)
        names = [name for name in task.layers() if name != "head"]
        # in a buffer, so that resume points have it
        self.gradient_sums: Tensor
        self.register_buffer("gradient_sums", torch.zeros(len(names)))


@register("technique", "surgical", options=SurgicalOptions)
class Surgical(Technique):
    """Train the head and one block of the backbone (Lee et al. 2023).

    Unless `layers` names blocks, the block is the one with the largest relative gradient norm |g| /
    |w|. It is measured after the head was trained for some steps, because the gradients behind a
    random head say nothing about the backbone. No weight changes during the measurement. The
    paper's Auto-RGN uses the same measure in another way: it trains all blocks, at rates that it
    scales by the measure in every epoch.

    It assumes that source and target differ in one respect: in the input (low layers: other
    sensors, noise), in features (middle), or in the meaning of the output (high). It helps there
    with few rows. It hurts where they differ in many respects, and then falls behind full
    fine-tuning. A run too short to measure trains the last block.
    """

    _task: MeasuredTask | None = None
    _choice: str | None = None

    def wrap(self, task):
        """Raises ValueError where a layer that is named does not exist."""
        names = [name for name in task.layers() if name != "head"]
        for name in self.options.layers or ():
            if name not in names:
                raise ValueError(
                    f"surgical: layers: {task.backbone.arch.name} has no layer {name!r}; "
                    f"{nearest(name, names)}"
                )
        if self.options.layers:
            return task
        self._task, self._choice = MeasuredTask(task), None
        return self._task

    def finish(self, task):
        return Task(task.backbone, task.objective) if isinstance(task, MeasuredTask) else task

    def phases(self, steps):
        if self.options.layers:
            return (Phase("tune", steps),)
        measured = min(self.options.measure_steps, steps // 2)
        probed = min(round(self.options.probe_share * steps), steps - measured - 1)
        phases = (
            Phase("probe", probed),
            Phase("measure", measured, lr_scale=0.0),
            Phase("tune", steps - probed - measured),
        )
        return tuple(phase for phase in phases if phase.steps > 0)

    def rates(self, layers, phase):
        if phase == "probe":
            return {name: float(name == "head") for name in layers}
        if phase == "measure":
            return dict.fromkeys(layers, 1.0)
        chosen = self._chosen(list(layers))
        return {name: float(name == "head" or name in chosen) for name in layers}

    def _chosen(self, layers: list[str]) -> list[str]:
        """Return the layers that are named, or the one that was measured; else the last one."""
        if self.options.layers:
            return self.options.layers
        own = [name for name in layers if name != "head"]
        if self._choice is None and self._task is not None and self._task.gradient_sums.any():
            # kept here too: the weights that a run ends with may be older than the choice
            self._choice = own[int(self._task.gradient_sums.argmax())]
        return [self._choice or own[-1]]

    def read_gradients(self, task, phase, step):
        """Add the relative gradient norm of every layer (`ReadsGradients`)."""
        if phase != "measure":
            return
        named = dict(task.named_parameters())
        nothing = torch.zeros((), device=task.gradient_sums.device)  # of a layer without parameters
        norms = [
            _norm([named[name].grad for name in names]) / _norm([named[name] for name in names])
            if names
            else nothing
            for layer, names in task.layers().items()
            if layer != "head"
        ]
        relative_norms = torch.stack(norms)
        task.gradient_sums += torch.where(torch.isfinite(relative_norms), relative_norms, 0.0)


def _norm(tensors: list[Tensor | None]) -> Tensor:
    given = [tensor.detach() for tensor in tensors if tensor is not None]
    return torch.nn.utils.get_total_norm(given) if given else torch.zeros(())
