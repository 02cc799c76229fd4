"""Optimisers, learning-rate schedules and parameter groups.

A technique's rates name every layer, and layers cover every parameter exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from pipeline.config.schema import Train
from pipeline.core.contracts import Task, Technique
from pipeline.core.contracts.technique_capabilities import averages_weights


def apply_rates(
    task: Task,
    layers: dict[str, list[str]],
    rates: dict[str, float],
    freeze_norm_stats: bool = False,
) -> dict[str, float]:
    """Freeze and thaw layers, and put frozen modules into evaluation mode.

    Args:
        layers: Layer name to parameter names (`Task.layers`).
        rates: Layer name to learning-rate multiplier; 0 freezes.
        freeze_norm_stats: Whether no norm updates its running statistics.

    Returns:
        Parameter name to learning-rate multiplier.

    Raises:
        ValueError: The layers do not cover every parameter exactly once, or the rates do not name
            every layer.
    """
    if set(layers) != set(rates):
        raise ValueError(f"rates name {sorted(rates)} but the layers are {sorted(layers)}")
    named = dict(task.named_parameters())
    owner: dict[str, str] = {}
    for layer, names in layers.items():
        for name in names:
            if name not in named:
                raise ValueError(f"layer {layer} names {name}, which is no parameter")
            if name in owner:
                raise ValueError(f"parameter {name} is in layer {owner[name]} and in {layer}")
            owner[name] = layer
    if missing := sorted(set(named) - set(owner)):
        raise ValueError(f"{len(missing)} parameters belong to no layer: {', '.join(missing[:5])}")
    for name, parameter in named.items():
        parameter.requires_grad_(rates[owner[name]] > 0)
    train_mode(task, freeze_norm_stats=freeze_norm_stats)
    return {name: rates[layer] for name, layer in owner.items()}


def train_mode(module: nn.Module, parent: bool = True, freeze_norm_stats: bool = False) -> None:
    """Set training mode where a module has trainable parameters, evaluation mode elsewhere.

    So frozen parts have no dropout and do not update norm statistics. With ``freeze_norm_stats``
    trained norms do not update theirs either, and normalise with them.
    """
    parameters = list(module.parameters())
    module.training = any(p.requires_grad for p in parameters) if parameters else parent
    for child in module.children():
        train_mode(child, module.training, freeze_norm_stats)
    if freeze_norm_stats and isinstance(module, nn.modules.batchnorm._NormBase):
        module.training = False


def describe_layers(layers: dict[str, list[str]], chosen: set[str]) -> str:
    """Describe layers as a table shows them: ``block02 to block05, head``.

    Args:
        layers: Layer name to parameter names, from input to output.
        chosen: Names of the layers to describe.
    """
    filled = [name for name, parameters in layers.items() if parameters]
    if all(name in chosen for name in filled):
        return "all layers"
    parts: dict[str, list[str]] = {}
    for name in filled:
        if name != "head":
            layer, _, part = name.partition("/")
            parts.setdefault(part, []).append(layer)
    described = []
    for part, names in parts.items():
        runs: list[list[str]] = [[]]
        for name in names:
            if (f"{name}/{part}" if part else name) in chosen:
                runs[-1].append(name)
            elif runs[-1]:
                runs.append([])
        ranges = ", ".join(
            run[0] if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs if run
        )
        if ranges:
            described.append(f"{part} of {ranges}" if part else ranges)
    if "head" in chosen:
        described.append("head")
    return ", ".join(described)


class ParameterGroup(TypedDict):
    """Parameters with one rate and decay, as torch's optimisers take them."""

    params: list[nn.Parameter]
    peak: float
    """Learning rate at the top of the schedule."""
    weight_decay: float
    train: Train
    """The settings of the training, or of one head of a stack."""


class Multipliers(NamedTuple):
    """What learning rate and weight decay of the start are multiplied by at a step."""

    lr: float
    weight_decay: float


def multipliers(train: Train, step: int) -> Multipliers:
    """Return what ``train.changes`` make of learning rate and weight decay at a step."""
    lr, weight_decay = train.lr, train.weight_decay
    for change in train.changes:
        if change.step <= step:
            lr = lr if change.lr is None else change.lr
            weight_decay = weight_decay if change.weight_decay is None else change.weight_decay
    at_start = train.weight_decay or 1.0  # one of 0 does not change
    return Multipliers(lr / train.lr, weight_decay / at_start)


def parameter_groups(task: Task, rates: dict[str, float], train: Train) -> list[ParameterGroup]:
    """Make optimiser groups of equal rate and decay.

    Vectors and scalars (norms, biases) have no weight decay, nor have `Task.undecayed_parameters`,
    as in timm (Wightman 2019).
    """
    undecayed = task.undecayed_parameters()
    out: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        if rates[name] > 0:
            is_decayed = parameter.dim() > 1 and name not in undecayed
            decay = train.weight_decay if is_decayed else 0.0
            out.setdefault((rates[name], decay), []).append(parameter)
    return [
        ParameterGroup(params=params, peak=rate * train.lr, weight_decay=decay, train=train)
        for (rate, decay), params in sorted(out.items(), key=lambda i: i[0])
    ]


def build_optimizer(groups: list[ParameterGroup], train: Train) -> torch.optim.Optimizer:
    """Return fused AdamW or SGDW with Nesterov momentum (both Loshchilov and Hutter 2019)."""
    with_rates = [
        {
            "params": group["params"],
            "peak": group["peak"],
            "weight_decay": group["weight_decay"],
            "lr": group["peak"],
        }
        for group in groups
    ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(
            with_rates, lr=train.lr, betas=(train.beta1, train.beta2), fused=True
        )
    sgd = SGDW(
        with_rates,
        lr=train.lr,
        momentum=train.momentum,
        nesterov=train.momentum > 0,
        fused=True,
    )
    # zeros from the start: torch 2.11 leaves the buffers unset when the first step is skipped
    if train.momentum:
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


class SGDW(torch.optim.SGD):
    """torch's fused SGD with decoupled weight decay (Loshchilov and Hutter, Decoupled Weight Decay
    Regularization, ICLR 2019).

    A step first shrinks a weight by lr times ``weight_decay`` of itself, as torch's AdamW does; the
    decay never enters the momentum. torch's own SGD adds it to the gradient (L2): with momentum m
    that decays about 1 / (1 - m) times as much. A step that is skipped (``found_inf``) shrinks
    nothing.
    """

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        found_inf = getattr(self, "found_inf", None)
        for group, decay in zip(self.param_groups, decays, strict=True):
            trained = [p for p in group["params"] if p.grad is not None]
            if decay == 0 or not trained:
                continue
            shrink = group["lr"] * decay
            if found_inf is None:
                torch._foreach_mul_(trained, 1 - shrink)
            else:  # found_inf stays on the device
                torch._foreach_mul_(trained, 1 - shrink * (1 - found_inf))
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def lr_factor(step: int, steps: int, train: Train) -> float:
    """Return the learning-rate factor of a phase's step.

    Linear warm-up, then cosine to zero (Loshchilov and Hutter 2017) or constant.
    """
    warm = round(train.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if train.schedule == "constant":
        return 1.0
    angle = math.pi * (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(angle))


def global_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the L2 norm over all gradients, on their device."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads, foreach=True) if grads else torch.zeros(())


class WeightAverage:
    """A running average of the trained weights; `swap` puts it into the model for a while.

    Args:
        share: Share of the newest weights in the average after a step.
        statistics: Whether norm statistics are averaged too, as timm's ModelEmaV3 does unless it is
            given ``exclude_buffers``. Otherwise they are the newest ones, as in torch's
            AveragedModel: they are running averages already, of the newest weights' activations.
    """

    def __init__(self, task: nn.Module, share: Callable[[int], float], statistics: bool = False):
        self.share, self.statistics = share, statistics
        self.average = {name: p.detach().clone() for name, p in self._tensors(task).items()}

    def _tensors(self, task: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = dict(task.named_parameters())
        if self.statistics:
            tensors |= {name: b for name, b in task.named_buffers() if b.is_floating_point()}
        return tensors

    def has_begun(self, step: int) -> bool:
        """Return whether the average after a step differs from the newest weights."""
        return self.share(step) < 1

    @torch.no_grad()
    def update(self, task: nn.Module, step: int) -> None:
        """Add the weights after a step."""
        newest = self._tensors(task)
        names = [
            name
            for name, tensor in newest.items()
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        ]
        averages = [self.average[name] for name in names]
        torch._foreach_lerp_(averages, [newest[name].detach() for name in names], self.share(step))

    @torch.no_grad()
    def swap(self, task: nn.Module) -> None:
        """Exchange the model's weights and the average, in place; a second call undoes it."""
        for name, tensor in self._tensors(task).items():
            newest = tensor.detach().clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(newest)


MAX_INITIAL_SHARE = 0.05
"""There is a warning where a larger share of ``train.ema`` is the weights before training."""


def describe_slow_average(train: Train, steps: int) -> str:
    """Return a warning where ``train.ema`` is too slow for a run of so many steps, or ""."""
    if train.ema is None or train.ema**steps <= MAX_INITIAL_SHARE:
        return ""
    share = train.ema**steps
    largest = math.floor(MAX_INITIAL_SHARE ** (1 / steps) * 1e4) / 1e4
    return (
        f"train.ema: {train.ema:g} is slow for {steps} steps: {100 * share:.0f} % of the average, "
        "which is validated and kept, is still the weights before training; set it to at most "
        f"{largest:g}, or train longer"
    )


def weight_average(
    task: nn.Module, technique: Technique, train: Train, steps: int
) -> WeightAverage | None:
    """Return the average of a technique, or of ``train.ema``, if there is one.

    Raises:
        ValueError: The technique averages, and ``train.ema`` is set.
    """
    if averages_weights(technique):
        if train.ema:
            name = technique.registered_name
            raise ValueError(f"technique {name} averages the weights itself: leave train.ema out")
        return WeightAverage(task, partial(technique.averaging, steps=steps), statistics=True)
    if train.ema:
        share = 1 - train.ema
        return WeightAverage(task, lambda step: share)
    return None
