"""How a backbone is adapted to a target: the contract of every file in ``pipeline/techniques/``.

A technique is a set of hooks of the one training loop. By default each of them does nothing, which
is full fine-tuning. What few techniques need is in ``technique_capabilities``. The options class of
one that trains the backbone derives from `LayerOptions` (``layer_decay``, ``freeze``,
``freeze_norm_stats``), which `layer_rates` applies to its rates. Three complete ones::

    from pipeline.config.registry import register
    from pipeline.core.contracts import Technique


    @register("technique", "near_start")
    class NearStart(Technique):
        '''Fine-tune close to the starting point (after Li et al. 2018).'''

        def wrap(self, task):
            self.start = [p.detach().clone() for p in task.backbone.parameters()]
            return task

        def penalty(self, task, batch, streams):
            pairs = zip(task.backbone.parameters(), self.start, strict=True)
            return 0.01 * sum((now - start).square().sum() for now, start in pairs)


    @register("technique", "mean_alignment")
    class MeanAlignment(Technique):
        '''Align the means of source and target features (after Sun and Saenko 2016).'''

        def streams(self):
            return ("source",)

        def penalty(self, task, batch, streams):
            here, there = (task.backbone(rows).pooled for rows in (batch, streams["source"]))
            return (here.mean(0) - there.mean(0)).square().sum()


    @register("technique", "seed_soup")
    class SeedSoup(Technique):
        '''Average the weights of all seeds of full fine-tuning (Wortsman et al. 2022).'''

        starts_from = "trials"

        def phases(self, steps):
            return ()

        def after_fanout(self, trials):
            found = [trial.weights() for trial in trials if trial.technique == "full"]
            return {name: sum(w[name] for w in found) / len(found) for name in found[0]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from pipeline.config.registry import LayerOptions, Registered, nearest
from pipeline.core.batch import Batch
from pipeline.core.contracts.task import Task

if TYPE_CHECKING:
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own learning rates, schedule and optimiser."""

    name: str
    steps: int
    lr_scale: float = 1.0
    """0: gradients are computed (`ReadsGradients`) and nothing moves."""
    factor: Callable[[int, int], float] | None = None
    """Learning-rate factor of a step of the phase, given the number of its steps; None: as
    ``train.warmup`` and ``train.schedule`` say.
    """


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that has ended, for techniques that combine several."""

    technique: str
    """Name of its technique."""
    seed: int
    hyper_parameters: dict[str, Any]
    validation: dict[str, float]
    """Its validation metrics, the primary one first."""
    weights: Callable[[], dict[str, Tensor]]
    """Loads the weights of its task, by the task's names. Raises ValueError where there are none:
    it failed, or kept no bundle."""


class Technique(Registered):
    """How a backbone is adapted. Every hook has a default that changes nothing."""

    starts_from: ClassVar[Literal["source", "random", "trials"]] = "source"
    """The weights that a trial starts with: the source's, random ones (a baseline), or what
    ``after_fanout`` makes of finished trials."""
    frozen: ClassVar[bool] = False
    """Whether the backbone never changes, so that its features are computed once.

    Such a technique must not have ``penalty``, ``streams`` or ``at_test``: they would never be
    called.
    """

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.options_class()

    def wrap(self, task: Task) -> Task:
        """Return the task to train: the same one, or one with additional modules."""
        return task

    def finish(self, task: Task) -> Task:
        """Return the trained task as it is tested and saved, with the names that ``wrap`` got.

        Adapters are merged into the weights; helpers of training are dropped.
        """
        return task

    def steps(self, steps: int) -> int:
        """Return the number of training steps where the target is given ``steps``."""
        return steps

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Divide the steps into phases; () for a technique that trains nothing."""
        return (Phase("all", steps),)

    def rates(self, layers: dict[str, list[str]], phase: str) -> dict[str, float]:
        """Return the learning-rate multiplier of every layer in a phase; 0 freezes a layer.

        Args:
            layers: Layer name to parameter names, from input to output (`Task.layers`).
        """
        return dict.fromkeys(layers, 1.0)

    def search_space(self) -> Mapping[str, Sequence[float | str]]:
        """Return what ``fanout.search: auto`` draws from, by name; {}: nothing is worth searching.

        Two floats are the ends of a range (log-uniform), any other values are choices. ``lr`` is
        relative to the target's; any other name is an option. Options that depend on what the job
        states may depend on ``options``.
        """
        return {"lr": (0.1, 10.0)}

    def streams(self) -> tuple[str, ...]:
        """Name further streams of batches that ``penalty`` (`AddsPenalty`) reads.

        "target": all training rows of the target, whatever the label fraction is, or those of
        ``targets.x.unlabelled``; without labels.
        "source": the training rows of the source, read as the target's rows are, without labels.
        "labelled_source": those of them whose labels the target has too, by name, with labels that
        are numbered as the target's are.
        Each has its own reproducible order; batches are augmented as the training batch is.
        """
        return ()

    def after_fanout(self, trials: Sequence[FinishedTrial]) -> Mapping[str, Tensor]:
        """Return weights made of finished trials, where ``starts_from`` is "trials".

        Args:
            trials: Final trials of the same source, target and label fraction. Their bundles must
                have been kept (``fanout.keep_bundles: all``).
        """
        raise NotImplementedError


@runtime_checkable
class AdaptsAtTest(Protocol):
    """A technique that changes the finished task by the test rows, without their labels."""

    def at_test(self, task: Task, batches: Callable[[], Iterator[Batch]]) -> Task:
        """Adapt the finished task to the test rows before they are predicted.

        Args:
            task: What ``finish`` returned.
            batches: Starts a pass over the test rows, which yields finished batches without labels,
                in order and the same on every rank. Nothing is read unless it is called.
        """
        ...


def adapts_at_test(technique: Any) -> TypeIs[AdaptsAtTest]:
    """Return whether a technique changes the finished task by the test rows."""
    return isinstance(technique, AdaptsAtTest)


class HeadFirst(Technique):
    """Train the head alone for a share of the steps, the option ``probe_share``, then everything.

    Two phases, "probe" and "full". A share above 0 is one step at least, and leaves one.
    """

    def probe_steps(self, steps: int) -> int:
        """Return how many of the steps train the head alone."""
        share = self.options.probe_share
        return min(max(1, round(share * steps)), steps - 1) if share else 0

    def phases(self, steps: int) -> tuple[Phase, ...]:
        probe_steps = self.probe_steps(steps)
        phases = (Phase("probe", probe_steps), Phase("full", steps - probe_steps))
        return phases if probe_steps else phases[1:]

    def rates(self, layers: dict[str, list[str]], phase: str) -> dict[str, float]:
        return {name: float(phase == "full" or name == "head") for name in layers}


def layer_rates(
    technique: Technique,
    layers: dict[str, list[str]],
    phase: str,
) -> dict[str, float]:
    """Return the learning-rate multiplier of every layer, with the technique's `LayerOptions`.

    A layer named ``NAME/PART`` (the biases or the adapters of a layer) is as deep as ``NAME``.

    Raises:
        ValueError: The option ``freeze`` names no layer, or leaves no layer of the backbone.
    """
    rates = technique.rates(layers, phase)
    options = technique.options
    if not isinstance(options, LayerOptions):
        return rates
    own = backbone_layers(layers)
    depths = {name: depth for depth, name in enumerate(dict.fromkeys(map(whole_layer, own)))}
    frozen = _frozen_layers(technique.registered_name, options.freeze, list(depths))
    found: dict[str, float] = {}
    for name, rate in rates.items():
        depth = depths.get(whole_layer(name)) if name in own else None
        decay = 1.0 if depth is None else options.layer_decay ** (len(depths) - depth)
        found[name] = 0.0 if name in own and whole_layer(name) in frozen else rate * decay
    return found


def whole_layer(name: str) -> str:
    """Return the name of the layer that a layer or a part of one (``NAME/PART``) belongs to."""
    return name.partition("/")[0]


def backbone_layers(layers: dict[str, list[str]]) -> list[str]:
    """Return the layers of the backbone that have parameters, from input to output."""
    return [
        name
        for name, parameters in layers.items()
        if parameters and parameters[0].startswith("backbone.")
    ]


def _frozen_layers(technique: str, freeze: int | str | None, names: list[str]) -> list[str]:
    """Return the layers that the option ``freeze`` means, out of those of the backbone."""
    if freeze is None:
        return []
    if isinstance(freeze, str) and freeze not in names:
        raise ValueError(
            f"{technique}: freeze: the backbone has no layer {freeze!r}; {nearest(freeze, names)}"
        )
    count = names.index(freeze) + 1 if isinstance(freeze, str) else freeze
    if not 1 <= count < len(names):
        raise ValueError(
            f"{technique}: freeze: {freeze!r} must leave a layer of the backbone to train: it has "
            f"{len(names)}, {names[0]} to {names[-1]}; linear_probe trains the head alone"
        )
    return names[:count]


def trains(technique: Technique) -> bool:
    """Return whether a technique takes any training step; one that does not is tried once."""
    return bool(technique.phases(1))
