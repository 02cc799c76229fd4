"""What some techniques can do, as protocols of one member each.

A class has a capability by defining its members; nothing is declared. Callers test for it with
``isinstance`` (runtime-checkable protocols). Where several callers need the test, it is a function
at the end of this file.

    `AddsPenalty`: something is added to the loss of a batch (L2-SP, distillation).
    `AddsModules`: the tensors of the backbone have other names in training (LoRA).
    `AdaptsWithoutLabels`: no label of the target is needed.
    `DescribesClasses`: the head is made of texts about the classes, where the source reads any.
    `GathersRows`: the penalty compares the rows of all ranks.
    `FollowsProgress`: the penalty changes with the steps.
    `PreparesOnTarget`: rows of the target are read once before anything is trained.
    `ReadsSource`: the source's network with its own head is read (distillation).
    `AveragesWeights`: the weights of many steps are averaged (SWA, EMA).
    `ChoosesOnValidation`: something is chosen on the validation rows after training (WiSE-FT).
    `TakesSomeTrials`: the finished trials of some techniques are combined (soups).
    `KeepsModules`: what ``wrap`` adds stays in the network (side-tuning).
    `ReadsGradients`: something is decided by gradients, or by the rows of all ranks (surgical).
    `SolvesHead`: the head of a frozen backbone is the solution of a convex problem.
    `SelectsFeatures`: such a head keeps some of its features only.
    `NeedsLibrary`: an option takes a library that is not always installed (QLoRA).
    `ChecksBackbone`: not every backbone can be adapted (adapters of named modules).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from typing_extensions import TypeIs

    from pipeline.core.batch import Batch
    from pipeline.core.contracts.backbone import Backbone
    from pipeline.core.contracts.modality import Modality
    from pipeline.core.contracts.objective import Objective
    from pipeline.core.contracts.task import Task

LABELLED_SOURCE = "labelled_source"
"""The stream of the source's rows with labels (``Technique.streams``)."""


@runtime_checkable
class AddsPenalty(Protocol):
    """A technique that adds something to the loss of every batch."""

    def penalty(self, task: Task, batch: Batch, streams: Mapping[str, Batch]) -> Tensor | None:
        """Return a scalar that is added to the mean loss of a batch, or None.

        Args:
            task: The task as ``wrap`` returned it.
            batch: The finished training batch (a micro-batch where there are several).
            streams: A batch of each of ``streams``, of about as many rows. None of the batches is
                empty: where one is, there is no penalty (but for `GathersRows`).
        """
        ...


@runtime_checkable
class AddsModules(Protocol):
    """A technique whose ``wrap`` puts modules into the backbone, which ``finish`` takes out again.

    Until then the tensors of the backbone have other names, so no copy of it can be loaded.
    """

    adds_modules: ClassVar[bool]


@runtime_checkable
class AdaptsWithoutLabels(Protocol):
    """A technique that needs no label of the target (``label_fractions: [0]``).

    It starts with the head of its source, label by label, by their names. At label fraction 0 the
    rows of the target are trained on by its penalty alone. The last weights are kept: the source's
    own rows are predicted best before anything is adapted. Hyper-parameters and calibration are
    chosen on the validation rows of the source.
    """

    def check_target(self, objective: type[Objective], modality: type[Modality]) -> None:
        """Raise ValueError where it does not suit an objective or a modality."""
        ...


@runtime_checkable
class DescribesClasses(Protocol):
    """A technique without training that can start with a head made of texts about the classes.

    That needs a source that reads texts (`ReadsTexts`); with another one the head is carried over.
    """

    def class_texts(self, names: Sequence[str]) -> list[str]:
        """Return a text about each class, given their names."""
        ...


@runtime_checkable
class GathersRows(Protocol):
    """A technique whose penalty compares the rows of a global batch, so it takes no micro-batches.

    ``penalty`` is called on every rank, with empty batches too, and gathers the rows itself
    (`pipeline.core.nn.all_gather`). The sum of the gradients of all ranks is that of the penalty.
    """

    gathers_rows: ClassVar[bool]


@runtime_checkable
class FollowsProgress(Protocol):
    """A technique whose penalty changes in the course of training (a ramp)."""

    def at_step(self, step: int, steps: int) -> None:
        """Take note of the step, from 0, before ``penalty`` is called in it."""
        ...


@runtime_checkable
class PreparesOnTarget(Protocol):
    """A technique that reads rows of the target once, before anything is trained or validated."""

    def prepare(self, task: Task, batches: Callable[[], Iterator[Batch]]) -> Task:
        """Return the task to train or to test.

        Args:
            task: What ``wrap`` returned, on its device.
            batches: Starts a pass over the unlabelled rows of the target, which yields finished
                batches in order and the same on every rank.
        """
        ...


@runtime_checkable
class ReadsSource(Protocol):
    """A technique that reads the source's network with the head that it was pretrained with."""

    def read_source(self, source: Task | None) -> None:
        """Take the source, once, before ``wrap``; again after a restart.

        Args:
            source: Backbone and objective of the source on the CPU, the backbone for the target's
                input. None where the source has no head (a checkpoint).

        Raises:
            ValueError: the technique needs a head, or one of another kind.
        """
        ...


@runtime_checkable
class AveragesWeights(Protocol):
    """A technique whose result is a running average of the weights of its steps.

    The average is what is validated, tested and saved. Norm statistics are averaged too. It is part
    of the resume point.
    """

    def averaging(self, step: int, steps: int) -> float:
        """Return the share of the newest weights in the average, in (0, 1].

        After a step the average is (1 - share) times what it was, plus share times the weights. A
        share of 1 makes the average the newest weights: they are validated, but never kept as the
        best ones, unless the run ends with them.

        Args:
            step: Number of the step, from 0.
            steps: Steps of the whole run.
        """
        ...


@runtime_checkable
class ChoosesOnValidation(Protocol):
    """A technique that tries several networks on the validation rows when training is over."""

    def choose(
        self,
        task: Task,
        goodness: Callable[[Task], float],
    ) -> tuple[Task, dict[str, Any]]:
        """Return the network to go on with, and what was chosen, for the record.

        Called once, before ``finish``. The validation metrics of the trial are those of the network
        that is returned.

        Args:
            task: As ``wrap`` returned it, with the weights that were kept.
            goodness: Returns the primary metric of a network on the validation rows; larger is
                better, and undefined values are minus infinity. The same on every rank. Raises
                ValueError where there are no validation rows.
        """
        ...


@runtime_checkable
class TakesSomeTrials(Protocol):
    """A technique that combines finished trials, of some techniques only."""

    def takes(self, technique: str) -> bool:
        """Return whether ``after_fanout`` reads the trials of a technique, given its name.

        Other trials are not handed to it, and it is not made anew when they change.
        """
        ...


@runtime_checkable
class KeepsModules(Protocol):
    """A technique whose ``finish`` leaves the modules that ``wrap`` has added.

    The bundle names the technique with its options, and ``wrap`` rebuilds the network.
    """

    keeps_modules: ClassVar[bool]


@runtime_checkable
class ReadsGradients(Protocol):
    """A technique that decides something by gradients, or by what all ranks have read in a step."""

    def read_gradients(self, task: Task, phase: str, step: int) -> None:
        """Look at ``grad`` of the task's parameters before an optimiser step.

        It is called on every rank, also on one without rows, so it may add up over ranks what
        ``penalty`` has seen (`pipeline.core.nn.all_gather.all_reduce_sum`). Gradients are the same
        on every rank. They are those of the summed loss, not of its mean.
        What is decided must be in a buffer of the task, so that resume points have it.

        Args:
            task: The task as ``wrap`` returned it.
            phase: Name of the phase.
            step: Step of the phase, from 0.
        """
        ...


@runtime_checkable
class SolvesHead(Protocol):
    """A frozen technique whose head is the solution of a convex problem on kept features."""

    def penalties(self) -> tuple[float, ...]:
        """Return the L2 penalties of which one is chosen on validation rows.

        () where the head trains by steps. It does so too where features are not kept.
        ``search_space`` is that of the steps: where the head is solved, ``lr`` is not searched.
        """
        ...


@runtime_checkable
class SelectsFeatures(Protocol):
    """A technique that solves its head (`SolvesHead`) on some of the features only.

    Its backbone does not depend on its options. Where the head trains by steps nothing is selected,
    and of ``search_space`` only ``lr`` is searched.
    """

    def selection(self) -> tuple[float, tuple[float, ...]]:
        """Return the weight of the group lasso by which features are ranked, and shares to keep.

        One of the shares is chosen on validation rows.
        """
        ...

    def describe_features(self, backbone: Backbone, features: Tensor) -> str:
        """Describe which features there are, for the trial's record.

        Args:
            backbone: That of the task as ``wrap`` returned it.
            features: (n, D) its pooled features of the training rows.
        """
        ...


@runtime_checkable
class NeedsLibrary(Protocol):
    """A technique with an option that takes a library which is not always installed."""

    def check_library(self) -> None:
        """Raise ValueError, with how to install it, where the library is needed and lacking."""
        ...


@runtime_checkable
class ChecksBackbone(Protocol):
    """A technique that cannot adapt every backbone."""

    def check_backbone(self, backbone: Backbone) -> None:
        """Raise ValueError where ``wrap`` would raise it for the backbone."""
        ...


def averages_weights(technique: Any) -> TypeIs[AveragesWeights]:
    """Return whether a technique's result is an average of the weights of its steps."""
    return isinstance(technique, AveragesWeights)


def adapts_without_labels(technique: Any) -> TypeIs[AdaptsWithoutLabels]:
    """Return whether a technique needs no label of the target."""
    return isinstance(technique, AdaptsWithoutLabels)


def describes_classes(technique: Any) -> TypeIs[DescribesClasses]:
    """Return whether a head can be made of texts about the classes."""
    return isinstance(technique, DescribesClasses)


def adds_penalty(technique: Any) -> TypeIs[AddsPenalty]:
    """Return whether a technique adds something to the loss of every batch."""
    return isinstance(technique, AddsPenalty)


def gathers_rows(technique: Any) -> TypeIs[GathersRows]:
    """Return whether the penalty compares the rows of all ranks."""
    return isinstance(technique, GathersRows)


def prepares_on_target(technique: Any) -> TypeIs[PreparesOnTarget]:
    """Return whether rows of the target are read before anything is trained."""
    return isinstance(technique, PreparesOnTarget)


def reads_source(technique: Any) -> TypeIs[ReadsSource]:
    """Return whether a technique reads the source's network with its own head."""
    return isinstance(technique, ReadsSource)


def keeps_modules(technique: Any) -> TypeIs[KeepsModules]:
    """Return whether what ``wrap`` adds stays in the network."""
    return isinstance(technique, KeepsModules)


def reads_gradients(technique: Any) -> TypeIs[ReadsGradients]:
    """Return whether a technique decides something by the gradients of training."""
    return isinstance(technique, ReadsGradients)


def solves_head(technique: Any) -> TypeIs[SolvesHead]:
    """Return whether the head of a frozen technique may be solved, not trained by steps."""
    return isinstance(technique, SolvesHead)


def selects_features(technique: Any) -> TypeIs[SelectsFeatures]:
    """Return whether a solved head keeps some of its features only."""
    return isinstance(technique, SelectsFeatures)
