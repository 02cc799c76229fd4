"""What some objectives can do, as protocols of one or two members each.

A class has a capability by defining its members; nothing is declared. Callers test for it with
``isinstance`` (runtime-checkable protocols). Where several callers need the test, it is a function
at the end of this file.

Training and transfer:
    `CachedHead`, `MixesInputs`: the head needs pooled features alone, unless inputs are mixed.
    `DropsFeatures`: the head drops features in training, so its loss is random.
    `BalancesLabels`: rows weigh by the labels of the training rows.
    `CouplesRows`: rows of a global batch are compared.
    `ComparesViews`: random views of a row are compared.
    `UpdatesAfterStep`, `ReplacesBackbone`: something moves with the steps, such as a teacher;
    `MayReplaceBackbone` are options that decide the latter.
    `TransfersHead`: a target starts with its source's head.
    `NamesLabels`: a head can be carried over label by label, by their names.
    `CarriesLabels`: some of its labels can, since they mean the same everywhere (letters).
    `ReadsTexts`: it has learned to compare rows with texts, so texts about classes can be a head.

Rows and labels:
    `HasClasses`: a row has one class or one set of labels.
    `PredictsFromScores`: predictions follow from scores of any model, not of a network alone.
    `PredictsActions`: so do the actions of a policy, which acts in a simulator.
    `ChecksLabels`, `ChecksTestRows`, `AllowsNullLabels`, `NeedsLabels`: labels are looked through.
    `LengthBound`: rows can be too short to be trained on.
    `BindsToBackbone`: part of the state follows from the backbone.
    `CountsRows`: whole label fractions count rows.
    `LabelsPositions`: a label belongs to a word, an hour or a step, not to a row.

Predictions:
    `ChoosesTargetMetrics`, `ChoosesSourceMetrics`: metrics follow from the labels.
    `Calibrated`: scores are calibrated on the validation rows.
    `UsesRawRows`, `Postprocesses`, `WritesColumns`: stored columns are read beside predictions.
    `Draws`: predictions are drawn on pictures of the rows.
    `RollsOut`: a policy acts in a simulator.
    `GivesRawOutputs`: the network is a graph of tensors (ONNX).
    `ExportsHead`, `RescalesScores`: transformers has a class with the head.
    `AveragesPredictions`: several networks predict together.
"""

from __future__ import annotations

from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeGuard,
    runtime_checkable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import pyarrow as pa
    from torch import Tensor
    from typing_extensions import TypeIs

    from pipeline.core.batch import Batch
    from pipeline.core.contracts.backbone import Backbone, Features
    from pipeline.core.contracts.baseline import LabelKind
    from pipeline.core.contracts.modality import Arrays, View
    from pipeline.core.contracts.objective import Loss, Objective, RawRows
    from pipeline.core.inputs import Inputs
    from pipeline.core.specs import State

    Columns = dict[str, str]
    Predictions = dict[str, np.ndarray]


# ---------------------------------------------------------------- training


@runtime_checkable
class CachedHead(Protocol):
    """An objective whose head needs pooled features alone: cached ones serve all trials."""

    label_tensors: ClassVar[tuple[str, ...]]
    """Tensors that the head reads beside the features."""

    def head_loss(self, features: Tensor, batch: Batch) -> Loss:
        """Return ``Objective.loss`` from pooled features (B, D)."""
        ...

    def head_predict(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``Objective.predict`` from pooled features (B, D)."""
        ...


@runtime_checkable
class MixesInputs(Protocol):
    """Options of an objective that may mix the inputs of several rows (mixup, CutMix).

    Cached features cannot be used then.
    """

    @property
    def mixes_inputs(self) -> bool:
        """Whether inputs are mixed."""
        ...


@runtime_checkable
class DropsFeatures(Protocol):
    """Options of a head that may drop features in training, so that its loss is random."""

    @property
    def drops_features(self) -> bool:
        """Whether features are dropped."""
        ...


@runtime_checkable
class BalancesLabels(Protocol):
    """Options by which rows are weighted by the frequency of their labels in the training rows."""

    @property
    def balances_labels(self) -> bool:
        """Whether rows are weighted."""
        ...


@runtime_checkable
class CouplesRows(Protocol):
    """An objective whose loss compares the rows of a global batch: it takes no micro-batches."""

    def forward_without_rows(self, backbone: Backbone) -> None:
        """Take part in the loss's collective operations on a rank that has no rows."""
        ...


@runtime_checkable
class ComparesViews(Protocol):
    """An objective whose loss compares random views of a row, made instead of augmenting.

    A technique may have this too: the views are then added to the augmented training rows.
    """

    def views(self) -> tuple[View, ...]:
        """Return the views; batches hold them as ``view0``, ``view1``, ..., in evaluation too."""
        ...


@runtime_checkable
class UpdatesAfterStep(Protocol):
    """An objective of which something moves with the steps: a momentum teacher, a temperature."""

    def after_step(self, backbone: Backbone, step: int, steps: int) -> str | None:
        """Update after optimiser step ``step`` of ``steps``; return a warning, or None."""
        ...


@runtime_checkable
class ReplacesBackbone(Protocol):
    """An objective that keeps another backbone than the trained one (the teacher's, say)."""

    def after_training(self, backbone: Backbone) -> None:
        """Change the backbone in place, once, before the bundle is written."""
        ...


@runtime_checkable
class MayReplaceBackbone(Protocol):
    """Options by which an objective with `ReplacesBackbone` keeps the trained backbone or not."""

    @property
    def replaces_backbone(self) -> bool:
        """Whether another backbone than the trained one is kept."""
        ...


@runtime_checkable
class TransfersHead(Protocol):
    """An objective whose target starts with its source's head, tensor by tensor."""

    def is_transferable(self, options: Mapping[str, Any], name: str) -> bool:
        """Return whether tensor ``name`` of a head made with ``options`` means the same here."""
        ...

    @classmethod
    def unseen_inputs(cls, source_inputs: Inputs, target_inputs: Inputs) -> str:
        """Describe inputs of the target that the source never saw, or return "".

        Both are ``Modality.inputs`` as the backbones hold them.
        """
        ...


@runtime_checkable
class NamesLabels(Protocol):
    """An objective whose state lists the names of its ``labels``, one row of the head for each.

    So two data sets can be compared by name, and rows of the head carried over. What has a row a
    label is a tensor whose first dimension is the number of labels.
    """

    head_options: ClassVar[tuple[str, ...]]
    """Options that change what the weights of the head mean: with others they are not carried."""


@runtime_checkable
class CarriesLabels(Protocol):
    """An objective whose labels mean the same in any data set, as letters do.

    A source that begins with a checkpoint of other labels keeps the rows of those that both have.
    """

    labels_are_letters: ClassVar[bool]


@runtime_checkable
class ReadsTexts(Protocol):
    """An objective of a source that has learned which texts suit a row.

    Texts about the classes of a target make a head for it, without any label.
    """

    def head_of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the weights (len(texts), D) of a linear layer without biases.

        Its inputs are pooled features after a layer norm without parameters (`LinearHeadOptions`),
        its outputs are logits of the texts.
        """
        ...


# ---------------------------------------------------------------- rows and labels


@runtime_checkable
class HasClasses(Protocol):
    """An objective of which a row has one class or one set of labels, known before training.

    Transferability scores compare such rows by their features.
    """

    class_tensor: ClassVar[str]
    """Tensor of its batches that holds them: (B,) class numbers, or (B, L) 0 or 1."""


@runtime_checkable
class PredictsFromScores(Protocol):
    """An objective of which scores of any model become predictions, so that baselines can be tried.

    The scores, by ``label_kind``:

    - ``classes``: (B, C) logits of classes.
    - ``label_sets``: (B, L) logits of labels.
    - ``numbers``: (B, 1), the number itself.
    - ``identities``: (B, E) vectors whose cosines tell identities apart.
    - ``position_classes``: (B, M, C) logits of the classes of each position.
    - ``actions``: (B, M, A), the standardised actions themselves, or the shares of classes.
    """

    label_kind: ClassVar[LabelKind]
    label_tensor: ClassVar[str]
    """Tensor of its batches with the labels, as `LabelKind` says."""

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return ``Objective.predict`` from the scores."""
        ...


@runtime_checkable
class PredictsActions(PredictsFromScores, Protocol):
    """A `PredictsFromScores` of which the labels are actions: a policy without a network."""

    action_tensors: ClassVar[tuple[str, ...]]
    """Tensors of its batches that ``predict_scores`` reads beside the labels, rows first."""

    def rollout_scores(
        self,
        scores: Callable[[Arrays], np.ndarray],
        predictions: Predictions,
        rows: RawRows,
    ) -> tuple[Predictions, np.ndarray | None]:
        """Run what the scores tell to do in each row's world, as ``RollsOut`` does with a network.

        Args:
            scores: Decoded rows of one step each, without actions, to their scores (n, A).
        """
        ...


@runtime_checkable
class ChecksLabels(Protocol):
    """An objective of which some labels cannot be used (a box without area)."""

    @classmethod
    def invalid_label_reasons(cls, table: pa.Table, columns: Columns, state: State) -> list[str]:
        """Return for each row "" or why its labels cannot be used.

        Such a row is left out, listed, and counts against the budget of bad rows.
        """
        ...


@runtime_checkable
class ChecksTestRows(Protocol):
    """An objective whose metrics have no value on some splits (a single class)."""

    @classmethod
    def check_test(cls, options: Any, table: pa.Table, columns: Columns, state: State) -> None:
        """Check the test rows before anything is trained.

        Raises:
            ValueError: their labels cannot give the metrics that the options ask for.
        """
        ...


@runtime_checkable
class AllowsNullLabels(Protocol):
    """An objective for which a null in the column of its first role is an answer of its own."""

    null_label_means: ClassVar[str]
    """What it is taken for: "a row without any label"."""


@runtime_checkable
class NeedsLabels(Protocol):
    """An objective that can use no row with a null in the column of some role."""

    needed_roles: ClassVar[tuple[str, ...]]
    """Those roles. Such rows are left out, listed, and count against the budget of bad rows."""


@runtime_checkable
class LengthBound(Protocol):
    """An objective whose rows can be too short to be trained on, though they can be scored."""

    @classmethod
    def untrainable_reasons(
        cls,
        table: pa.Table,
        columns: Columns,
        state: State,
        arrays: Arrays | None = None,
        seconds: np.ndarray | None = None,
    ) -> list[str]:
        """Return for each row "" or why it cannot be trained on.

        Args:
            arrays: the decoded rows, whose lengths are exact; or
            seconds: (n,) their lengths as columns or headers have them.
        """
        ...


@runtime_checkable
class BindsToBackbone(Protocol):
    """An objective whose state follows in part from the backbone (how many tokens a row has)."""

    @classmethod
    def bind_to_backbone(cls, state: State, backbone: Backbone) -> State:
        """Return the state with what follows from the backbone, which may be on ``meta``.

        Raises:
            ValueError: the backbone is of another kind than the objective needs.
        """
        ...


@runtime_checkable
class CountsRows(Protocol):
    """An objective without classes: whole label fractions are rows (demonstrations)."""

    label_fraction_unit: ClassVar[str]
    """How a number of rows is written in tables: "rows"."""


@runtime_checkable
class LabelsPositions(Protocol):
    """An objective whose labels belong to positions of a row: a word, an hour, a step.

    Transferability scores read such labels with the features of their positions.
    """

    position_labels: ClassVar[tuple[str, ...]]
    """What they can be: "classes", "numbers"."""
    position_features: ClassVar[tuple[str, ...]]
    """What the backbone is asked for beside pooled features (``want``)."""

    def labelled_positions(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features, labels and rows of all labelled positions.

        Returns:
            (m, D) features, (m,) class numbers or (m, T) numbers, and (m,) places in the batch.
        """
        ...


# ---------------------------------------------------------------- predictions


@runtime_checkable
class ChoosesTargetMetrics(Protocol):
    """An objective whose target's metrics follow from the labels (how many classes) or options."""

    @classmethod
    def target_metrics(cls, options: Any, state: State) -> tuple[str, ...]:
        """Return the metrics of a target's rows, the primary one first."""
        ...


@runtime_checkable
class ChoosesSourceMetrics(Protocol):
    """An objective whose source's metrics follow from the labels; the first chooses the weights."""

    @classmethod
    def source_metrics(cls, options: Any, state: State) -> tuple[str, ...]:
        """Return the metrics of a source's validation rows, the primary one first."""
        ...


@runtime_checkable
class Calibrated(Protocol):
    """An objective that fits after training what turns scores into probabilities and decisions."""

    @property
    def needs_calibration(self) -> bool:
        """Whether the options ask for it: it costs the predictions of the validation rows."""
        ...

    def calibrate(self, predictions: Predictions) -> None:
        """Fit on predictions of the validation rows and keep the result in a new ``state``.

        Called once, after the best weights are chosen and before a test row is read; ``predict``
        uses it from then on.
        """
        ...


@runtime_checkable
class UsesRawRows(Protocol):
    """An objective that reads columns of the rows beside its predictions."""

    raw_roles: ClassVar[tuple[str, ...]]
    """Roles whose columns it reads."""


@runtime_checkable
class Postprocesses(Protocol):
    """An objective whose metrics need more than predictions: whether an answer is right."""

    def postprocess(self, predictions: Predictions, rows: RawRows) -> Predictions:
        """Return the predictions with what the metrics read; numbers, rows first, on the host."""
        ...


@runtime_checkable
class WritesColumns(Protocol):
    """An objective of which ``onetomany predict`` writes other columns than its predictions."""

    output_types: ClassVar[dict[str, pa.DataType]]
    """Types of the columns that hold lists: they do not follow from a file of empty lists."""

    def output_columns(self, predictions: Predictions, rows: RawRows) -> Predictions:
        """Return named columns, rows first; texts and lists as object arrays."""
        ...


@runtime_checkable
class Draws(Protocol):
    """An objective whose prediction can be drawn on the picture of its row."""

    def draw(self, picture: np.ndarray, columns: Mapping[str, Any]) -> np.ndarray:
        """Draw the prediction of a row.

        Args:
            picture: (H, W, 3) uint8, the row's own.
            columns: What ``WritesColumns.output_columns`` returns for the row.

        Returns:
            (h, w, 3) uint8.
        """
        ...


@runtime_checkable
class RollsOut(Protocol):
    """An objective that trains a policy, tried in the simulated worlds of the test rows."""

    @classmethod
    def rollout_metrics(cls, options: Any, state: State) -> tuple[str, ...]:
        """Return the metrics of its episodes; the first is primary unless the target names one."""
        ...

    def rollout_evaluation(
        self, backbone: Backbone, predictions: Predictions, rows: RawRows
    ) -> tuple[Predictions, np.ndarray | None]:
        """Run the policy in each row's world, once, after training.

        Returns:
            The predictions with what the metrics read, and (F, H, W, 3) uint8 pictures of the
            first world, None where none could be made.
        """
        ...


class TransformersHead(NamedTuple):
    """How transformers holds the head of an objective."""

    model: str
    """Name of the class behind that of its family: ForTokenClassification."""
    tensors: tuple[tuple[str, str], ...] = ()
    """Our names of the head's tensors, each with the name that all families have for it; none where
    families differ, or where the head is tied."""
    problem_type: str | None = None
    """The configuration's problem_type, for ForSequenceClassification."""
    splits_words: bool = False
    """Whether rows are words: the tokenizer is saved so that it takes them."""
    linear_on: Literal["pooled", "tokens"] | None = None
    """The features of which a linear layer ``head``, one row a label of the state, gives the
    scores, with or without a layer norm before it (option ``norm``); None for other heads."""


@runtime_checkable
class ExportsHead(Protocol):
    """An objective for whose head transformers has a class, in some families."""

    transformers_head: ClassVar[TransformersHead]

    def logits(self, backbone: Backbone, batch: Batch) -> Tensor | None:
        """Return what transformers calls logits: (B, L), or (B, N, L) of tokens.

        None where its class gives something else; the states of the backbone are then compared.
        """
        ...


@runtime_checkable
class RescalesScores(Protocol):
    """An objective whose head gives standardised scores, which have a unit of their own."""

    @property
    def output_scale(self) -> tuple[float, float]:
        """What a score is multiplied by, and what is added then."""
        ...

    def take_scale_of(self, state: State) -> None:
        """Convert a head loaded from an objective with ``state`` to this objective's scale.

        It then predicts the same numbers.
        """
        ...


@runtime_checkable
class GivesRawOutputs(Protocol):
    """An objective with outputs for a graph of tensors (ONNX, torch.export).

    The docstring of ``raw_outputs`` stands beside an export: it says what each output is.
    """

    def raw_outputs(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return tensors (B, ...) by name, before anything that is decided row by row.

        It reads neither labels nor values of tensors, and ``len(batch)`` is not that of the rows.

        Raises:
            ValueError: No graph can hold what this network computes.
        """
        ...


@runtime_checkable
class AveragesPredictions(Protocol):
    """An objective of which several networks can predict together (an ensemble)."""

    def average(self, predictions: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return one prediction of what several networks predict for the same rows.

        Args:
            predictions: ``Objective.predict`` of each, before any calibration. What was fitted on
                validation rows is that of this objective's own ``state``.
        """
        ...


# ---------------------------------------------------------------- asked by several callers


def has_cached_head(objective: Any) -> TypeIs[CachedHead]:
    """Return whether the head needs pooled features alone."""
    return isinstance(objective, CachedHead)


def drops_features(options: Any) -> bool:
    """Return whether the head of an objective with these options drops features in training."""
    return isinstance(options, DropsFeatures) and options.drops_features


def couples_rows(objective: Any) -> TypeIs[CouplesRows]:
    """Return whether the loss compares the rows of a global batch."""
    return isinstance(objective, CouplesRows)


def compares_views(objective: Any) -> TypeIs[ComparesViews]:
    """Return whether the loss compares random views of a row."""
    return isinstance(objective, ComparesViews)


def replaces_backbone(objective: Any) -> TypeIs[ReplacesBackbone]:
    """Return whether another backbone than the trained one is kept."""
    return isinstance(objective, ReplacesBackbone)


def keeps_trained_backbone(objective: Any, options: Any) -> bool:
    """Return whether an objective with these options keeps the backbone that is trained."""
    if isinstance(options, MayReplaceBackbone):
        return not options.replaces_backbone
    return not replaces_backbone(objective)


def averages_predictions(objective: Any) -> TypeIs[AveragesPredictions]:
    """Return whether several networks can predict together."""
    return isinstance(objective, AveragesPredictions)


def exports_head(objective: Any) -> TypeIs[ExportsHead]:
    """Return whether transformers has a class for the head of an objective."""
    return isinstance(objective, ExportsHead)


def transformers_head(objective: Any) -> TransformersHead | None:
    """Return how transformers holds the head of an objective; None where it has no class."""
    return objective.transformers_head if exports_head(objective) else None


def gives_raw_outputs(objective: Any) -> TypeIs[GivesRawOutputs]:
    """Return whether an objective has outputs for a graph; tracing may still refuse the network."""
    return isinstance(objective, GivesRawOutputs)


def rescales_scores(objective: Any) -> TypeIs[RescalesScores]:
    """Return whether the predictions of an objective are in a unit of their own."""
    return isinstance(objective, RescalesScores)


def output_scale(objective: Any) -> tuple[float, float]:
    """Return what the scores of a head are multiplied by, and what is added to them."""
    return objective.output_scale if rescales_scores(objective) else (1.0, 0.0)


def transfers_head(objective: Any) -> TypeIs[TransfersHead]:
    """Return whether a target starts with its source's head."""
    return isinstance(objective, TransfersHead)


def bounds_length(objective: Any) -> TypeIs[LengthBound]:
    """Return whether rows can be too short to be trained on."""
    return isinstance(objective, LengthBound)


def mixes_inputs(options: Any) -> bool:
    """Return whether an objective with these options mixes its inputs in training."""
    return isinstance(options, MixesInputs) and options.mixes_inputs


def balances_labels(options: Any) -> bool:
    """Return whether an objective with these options weighs rows by counted labels."""
    return isinstance(options, BalancesLabels) and options.balances_labels


def names_labels(objective: Any) -> TypeIs[NamesLabels]:
    """Return whether labels of two data sets can be compared by name."""
    return isinstance(objective, NamesLabels)


def carries_labels(objective: Any) -> TypeIs[CarriesLabels]:
    """Return whether rows of a head are kept by label although its other labels differ."""
    return isinstance(objective, CarriesLabels) and objective.labels_are_letters


def reads_texts(objective: Any) -> TypeIs[ReadsTexts]:
    """Return whether it has learned to compare rows with texts, so they can serve as a head."""
    return isinstance(objective, ReadsTexts)


def binds_to_backbone(objective: Any) -> TypeIs[BindsToBackbone]:
    """Return whether part of the state follows from the backbone."""
    return isinstance(objective, BindsToBackbone)


def counts_rows(objective: Any) -> TypeIs[CountsRows]:
    """Return whether whole label fractions count rows."""
    return isinstance(objective, CountsRows)


def rolls_out(objective: Any) -> TypeIs[RollsOut]:
    """Return whether a policy is trained, which can be tried in a simulator."""
    return isinstance(objective, RollsOut)


def writes_columns(objective: Any) -> TypeIs[WritesColumns]:
    """Return whether other columns than the predictions are written."""
    return isinstance(objective, WritesColumns)


def draws(objective: Any) -> TypeIs[Draws]:
    """Return whether predictions can be drawn on pictures of the rows."""
    return isinstance(objective, Draws)


def has_classes(objective: Any) -> TypeIs[HasClasses]:
    """Return whether a row has one class or one set of labels."""
    return isinstance(objective, HasClasses)


def has_one_class(objective: Any) -> bool:
    """Return whether a row has one class, rather than a set of labels."""
    return has_classes(objective) and objective.class_tensor == "label"


def draws_by_class(objective: Any) -> bool:
    """Return whether label fractions are drawn by class.

    A labelled row then has one class or identity, which ``encode`` numbers as ``label``.
    """
    return bool({"label", "identity"} & {*objective.roles})


def labels_positions(objective: Any) -> TypeIs[LabelsPositions]:
    """Return whether labels belong to positions of a row."""
    return isinstance(objective, LabelsPositions)


def predicts_from_scores(objective: Any) -> TypeIs[PredictsFromScores]:
    """Return whether scores of any model become predictions."""
    return isinstance(objective, PredictsFromScores)


def predicts_actions(objective: Any) -> TypeIs[PredictsActions]:
    """Return whether any model that knows the action of a step can take the policy's place."""
    return isinstance(objective, PredictsActions)


def tensors_beside_features(objective: Any) -> tuple[str, ...]:
    """Return the label tensors that are kept with pooled features."""
    read = objective.label_tensors if has_cached_head(objective) else ()
    classes = (objective.class_tensor,) if has_classes(objective) else ()
    return tuple(dict.fromkeys((*read, *classes)))


def target_metrics(objective: type[Objective], options: Any, state: State) -> tuple[str, ...]:
    """Return the metrics of a target's rows, the primary one first."""
    if isinstance(objective, ChoosesTargetMetrics):
        return objective.target_metrics(options, state)
    return objective.metrics


def source_metrics(objective: type[Objective], options: Any, state: State) -> tuple[str, ...]:
    """Return the metrics of a source's validation rows, the primary one first."""
    if isinstance(objective, ChoosesSourceMetrics):
        return objective.source_metrics(options, state)
    return objective.metrics


def rollout_metrics(objective: type[Objective], options: Any, state: State) -> tuple[str, ...]:
    """Return the metrics of a policy's own episodes; () for other objectives."""
    return objective.rollout_metrics(options, state) if rolls_out(objective) else ()


def needed_roles(objective: type[Objective]) -> tuple[str, ...]:
    """Return the roles of which a null makes a row unusable (`NeedsLabels`)."""
    return objective.needed_roles if isinstance(objective, NeedsLabels) else ()


def invalid_label_reasons(
    objective: type[Objective], table: pa.Table, columns: Columns, state: State
) -> list[str]:
    """Return for each row "" or why its labels cannot be used."""
    if isinstance(objective, ChecksLabels):
        return objective.invalid_label_reasons(table, columns, state)
    return [""] * len(table)


def is_calibrated(objective: Objective) -> TypeGuard[Calibrated]:
    """Return whether the objective is to be calibrated on the validation rows."""
    return isinstance(objective, Calibrated) and objective.needs_calibration


def untrainable_reasons(
    objective: type[Objective], table: pa.Table, columns: Columns, state: State, arrays: Arrays
) -> list[str]:
    """Return for each row "" or why it cannot be trained on, by its decoded arrays."""
    if bounds_length(objective):
        return objective.untrainable_reasons(table, columns, state, arrays)
    return [""] * len(table)


def output_types(objective: type[Objective]) -> dict[str, pa.DataType]:
    """Return the types of the columns of lists that are written of predictions."""
    return objective.output_types if writes_columns(objective) else {}
