"""DELTA: fine-tuning with feature maps that stay near the source's (Li et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Backbone, Batch, HeadFirst, Task
from pipeline.core.contracts.objective_capabilities import couples_rows
from pipeline.core.latest_call import LatestCall
from pipeline.core.nn.all_gather import all_reduce_sum
from pipeline.core.nn.filter_maps import FilterMap, FilterMaps, filter_count


class DeltaOptions(LayerOptions):
    weight: float = Field(
        1.0, ge=0, description="weight of the distance of feature maps to those of the source"
    )
    attention: bool = Field(
        True,
        description="whether a filter's weight depends on how much the loss grows when it is "
        "switched off; false: all filters have the same weight, and everything trains from the "
        "first step",
    )
    maps: int = Field(
        4, ge=1, description="how many layers are compared, evenly spread up to the last one"
    )
    rows: int = Field(
        16,
        ge=1,
        description="rows on which the filters' weights are measured, once, with one forward pass "
        "for each filter",
    )
    probe_share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of the steps that train the head alone, before the filters' weights "
        "are measured",
    )


def filter_distance(
    student: Tensor, teacher: Tensor, weights: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the squared distance of feature maps, weighted by filter, ().

    It is relative to the mean square of the teacher's map, so that one weight fits every network.

    Args:
        student: (..., C).
        teacher: (..., C).
        weights: (C,) of sum 1.
        mask: (...) which positions are real; None: all, or it is not known.
    """
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    squares = (student - teacher).square().mean(0)
    return (weights * squares).sum() / teacher.square().mean().clamp(min=1e-12)


# ---------------------------------------------------------------- the technique


class WeighedTask(Task):
    """A task that knows how much each filter of its backbone weighs.

    The weights are buffers, so that they are part of resume points.

    Args:
        filters: Number of filters of each module, by its name in the backbone.
    """

    def __init__(self, task: Task, filters: dict[str, int]):
        super().__init__(task.backbone, task.objective)
        self.names = list(filters)
        for number, count in enumerate(filters.values()):
            self.register_buffer(f"weights{number}", torch.zeros(count))

    def weights(self) -> dict[str, Tensor]:
        """Return the weights (C,) of sum 1 by module; zeros where it is not compared."""
        return {name: self.get_buffer(f"weights{i}") for i, name in enumerate(self.names)}

    def filter_weights(self) -> dict[str, Tensor]:
        """Return the weights of the modules that are compared; {}: nothing is weighed yet."""
        return {name: weights for name, weights in self.weights().items() if weights.any()}

    def is_probing(self) -> bool:
        """Return whether the head is trained alone."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())


@register("technique", "delta", options=DeltaOptions)
class Delta(HeadFirst):
    """Fine-tune everything, and keep the outputs of important filters near the source's.

    The penalty is the squared distance of feature maps to those of the source's network on the same
    rows, filter by filter (Li et al. 2019). A filter is an output of a layer's last weight matrix
    or convolution. Its weight is a softmax of how much the loss grows when this filter alone is
    switched off in the source's network. This is measured with a head that was trained first, on
    rows of its last batch. Distances are relative to the size of the source's map; in the paper
    they are not.

    It assumes that those filters of the source on which the target's loss depends are worth
    keeping. It helps with few labels: useful filters are kept, the others may change. It hurts
    where the target needs other features. Each step costs a forward pass of a second backbone, and
    its memory. Once it costs a forward pass of ``rows`` rows (of each rank) for every filter of
    ``maps`` layers.

    Raises:
        ValueError: filters shall be weighed, and the objective's loss compares the rows of all
            ranks.
    """

    def search_space(self):
        return {"lr": (0.1, 10.0), "weight": (0.1, 10.0)}

    def wrap(self, task):
        if self.options.attention and couples_rows(task.objective):
            raise ValueError(
                "delta weighs filters by the loss of some rows, and that of "
                f"{task.objective.registered_name} compares the rows of all ranks: set "
                "attention: false"
            )
        layers = task.layers().items()
        layer_of = {parameter: layer for layer, parameters in layers for parameter in parameters}
        self.layer_of: dict[str, str] = {}
        filters: dict[str, int] = {}
        for name, module in task.backbone.named_modules():
            count = filter_count(module)
            if count is None:
                continue
            first = next(iter(dict(module.named_parameters())))
            self.layer_of[name] = layer_of[f"backbone.{name}.{first}"]
            filters[name] = count
        self.teacher: Backbone = copy.deepcopy(task.backbone).eval().requires_grad_(False)
        self.compared: list[str] = []
        self.gains: dict[str, Tensor] = {}  # what the loss of this rank's rows grows by
        self.count = torch.zeros(())  # of its rows, as the loss counts them
        self.calls = LatestCall(task.backbone)
        self.maps = FilterMaps(task.backbone, list(filters))
        self.source_maps = FilterMaps(self.teacher, list(filters))
        return WeighedTask(task, filters)

    def probe_steps(self, steps):
        return super().probe_steps(steps) if self.options.attention else 0

    def at_step(self, step, steps):
        self.is_early = step < self.probe_steps(steps) - 1

    def finish(self, task):
        self.calls.remove()
        self.maps.remove()
        return Task(task.backbone, task.objective)

    def penalty(self, task, batch, streams):
        assert isinstance(task, WeighedTask)
        call, maps = self.calls.take(), self.maps.take()
        self.teacher.to(call.features.pooled.device)
        if task.is_probing():
            if not self.is_early and not task.filter_weights():
                self._weigh(task, batch)
            return None
        if not self.compared and not task.filter_weights():
            self._weigh(task, batch)
        # looked up once: it waits for the device
        compared = self.compared or list(task.filter_weights())
        with torch.no_grad():
            features = call.repeat(self.teacher)
        source_maps = self.source_maps.take()
        weights = task.weights()
        distances = [
            filter_distance(
                maps[name].values.float(),
                source_maps[name].values.float(),
                weights[name],
                source_maps[name].known_mask(features.mask),
            )
            for name in compared
            if name in maps  # a module may serve some kinds of rows alone
        ]
        if not distances:
            return None
        return self.options.weight * torch.stack(distances).mean()

    @torch.no_grad()
    def read_gradients(self, task, phase, step):
        """Weigh filters by the rows of all ranks (`ReadsGradients`).

        That is in the step in which each rank has weighed them by its own rows, if it had any.
        """
        assert isinstance(task, WeighedTask)
        if self.compared or self.is_early:
            return
        weights = task.weights()
        count = self.count.to(next(iter(weights.values())).device)
        share = count / all_reduce_sum(count).clamp(min=1e-12)
        for name, own in weights.items():
            gains = self.gains.get(name)
            is_chosen = all_reduce_sum(torch.full_like(own[:1], gains is not None))
            total = all_reduce_sum(torch.zeros_like(own) if gains is None else gains * share)
            if is_chosen:
                own.copy_(total.softmax(0))
        self.gains = {}
        self.compared = list(task.filter_weights())

    # ------------------------------------------------------------ which filters count

    @torch.no_grad()
    def _weigh(self, task: WeighedTask, batch: Batch) -> None:
        """Choose the modules to compare and weigh their filters, on rows of a batch."""
        rows = batch.split(self.options.rows)[0]
        weights = task.weights()
        with _evaluating(task.objective):
            for name in self._chosen(task, rows):
                own = weights[name]
                gains = torch.zeros_like(own)
                if self.options.attention:
                    plain = self._loss(task, rows)
                    for number in range(len(own)):
                        off = torch.tensor([number], device=own.device)
                        gains[number] = self._loss(task, rows, {name: off}) - plain
                self.gains[name] = gains
                own.copy_(gains.softmax(0))

    def _loss(self, task: Task, rows: Batch, off: dict[str, Tensor] | None = None) -> Tensor:
        """Return the mean loss on the source's network with some filters switched off."""
        self.source_maps.off = off or {}
        device = next(self.teacher.parameters()).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # what is drawn at random is the same every time
            total, count, _ = task.objective.loss(self.teacher, rows)
        self.source_maps.off = {}
        self.count = count.float()
        return total / count

    def _chosen(self, task: Task, rows: Batch) -> list[str]:
        """Return the last module of each layer that is compared."""
        self._loss(task, rows)
        plain = self.source_maps.take()
        inside: dict[str, list[str]] = {}
        for name in plain:
            inside.setdefault(self.layer_of[name], []).append(name)
        count = min(self.options.maps, len(inside))
        names = list(inside.values())
        spread = [names[-1 - len(names) * place // count] for place in reversed(range(count))]
        return [self._last(task, rows, one, plain) for one in spread]

    def _last(
        self,
        task: Task,
        rows: Batch,
        names: list[str],
        plain: dict[str, FilterMap],
    ) -> str:
        """Return the last module of a layer that reads what others of the layer return.

        The projection of a residual block's shortcut reads none, and may be called last.
        """
        for name in reversed(names):
            others = [other for other in names if other != name]
            off = {one: torch.arange(plain[one].values.shape[-1]) for one in others}
            self._loss(task, rows, off)
            if not torch.equal(self.source_maps.take()[name].values, plain[name].values):
                return name
        return names[-1]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Keep a module in evaluation mode inside the ``with`` block."""
    modes = {one: one.training for one in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for one, was_training in modes.items():
            one.training = was_training
