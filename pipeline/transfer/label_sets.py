"""Labels of a source and a target, compared by name: rows are relabelled, heads carried over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.config import registry
from pipeline.config.registry import LinearHeadOptions
from pipeline.core.contracts import Arrays, Objective
from pipeline.core.contracts.objective_capabilities import (
    names_labels,
    predicts_from_scores,
    reads_texts,
)
from pipeline.core.specs import NO_OBJECTIVE, ObjectiveSpec
from pipeline.data.manifests import Selection
from pipeline.io.wording import plural
from pipeline.train import fit_components

SHOWN = 8
"""Labels that a message names."""


@dataclass(frozen=True)
class LabelMatch:
    """The labels of a source and of a target, each in its own order."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    @property
    def shared(self) -> tuple[str, ...]:
        """Labels that both have, in the order of the target."""
        theirs = set(self.source)
        return tuple(name for name in self.target if name in theirs)

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Shared labels of which one side has several: ImageNet has two cranes."""
        ours, theirs = Counter(self.target), Counter(self.source)
        return tuple(name for name in ours if theirs[name] and ours[name] + theirs[name] > 2)

    @property
    def of_source_alone(self) -> tuple[str, ...]:
        ours = set(self.target)
        return tuple(name for name in self.source if name not in ours)

    @property
    def of_target_alone(self) -> tuple[str, ...]:
        theirs = set(self.source)
        return tuple(name for name in self.target if name not in theirs)

    def text(self) -> str:
        """Describe a partial or open label set; "" where both have the same labels."""
        parts = []
        if self.of_source_alone:
            parts.append(f"{_some(self.of_source_alone)} only in the source, left out here")
        if self.of_target_alone:
            parts.append(
                f"{_some(self.of_target_alone)} only in the target, where only the target's own "
                "labels can teach them"
            )
        if not parts:
            return ""
        verb = "is" if len(self.shared) == 1 else "are"
        return f"{plural(len(self.shared), 'label')} {verb} shared; {'; '.join(parts)}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def compare(source: Mapping[str, Any], target: Mapping[str, Any]) -> LabelMatch:
    """Compare the labels of two fitted objectives, given their states."""
    source_labels, target_labels = (tuple(map(str, state["labels"])) for state in (source, target))
    return LabelMatch(source_labels, target_labels)


@dataclass(frozen=True)
class Relabel:
    """Turns label numbers of a source into those of a target.

    Rows of a class that the target lacks must have been left out (`shared_rows`). A label of a set
    that the target lacks is dropped.
    """

    match: LabelMatch

    def __call__(self, labels: Arrays) -> Arrays:
        """Return ``label`` (n,) or ``labels`` (n, L) as the target numbers them."""
        out = dict(labels)
        if "label" in labels:
            known = {name: number for number, name in enumerate(self.match.target)}
            numbers = [known.get(name, -1) for name in self.match.source]
            out["label"] = np.array(numbers, dtype=np.int64)[labels["label"]]
        if "labels" in labels:
            columns = [self.match.source.index(name) for name in self.match.target]
            out["labels"] = np.ascontiguousarray(labels["labels"][:, columns])
        return out


def shared_rows(
    selection: Selection, columns: dict[str, str], source: ObjectiveSpec, match: LabelMatch
) -> Selection:
    """Return the rows of a source whose class the target has too; all rows where they have sets."""
    objective = registry.get("objective", source.name)
    if "label" not in objective.roles or not match.of_source_alone:
        return selection
    labels = fit_components.encode_labels(source.name, source.state, selection, columns)
    is_shared = np.array([name in match.target for name in match.source])
    return selection.keep(is_shared[labels["label"]])


def problem(
    source: str, theirs: ObjectiveSpec, ours: ObjectiveSpec, *, needs_all: bool = False
) -> str:
    """Describe why the labels of a source cannot serve a target; "" where they can.

    Args:
        source: Its name, for the message.
        theirs: The objective of the source, fitted.
        ours: That of the target.
        needs_all: Whether the source must have every label of the target, because no label of the
            target is used. Where a row has a set of labels it always must: a label that is not
            listed counts as absent.
    """
    if theirs.name != ours.name:
        return (
            f"the objective of source {source} is {theirs.name}, that of the target {ours.name}: "
            "their labels cannot be compared"
        )
    if not names_labels(registry.get("objective", ours.name)):
        return f"the labels of {ours.name} have no names by which two data sets could be compared"
    match = compare(theirs.state, ours.state)
    if not match.shared:
        return (
            f"source {source} and the target share no label ({_some(match.source)}; "
            f"{_some(match.target)}): give the same label the same name in both, by a column for "
            "the role label_name where numbers differ"
        )
    needs_all = needs_all or "labels" in registry.get("objective", ours.name).roles
    if needs_all and match.of_target_alone:
        return f"source {source} does not know the target's labels {_some(match.of_target_alone)}"
    return ""


def head_of_texts(
    objective: Objective, source: Objective, class_texts: Callable[[Sequence[str]], Sequence[str]]
) -> tuple[int, str]:
    """Make the head of a target of texts about its classes, by a source that reads texts.

    Args:
        class_texts: Names of classes to a text about each (`DescribesClasses`).

    Returns:
        How many classes have a text, and what was done in words.
    """
    options = objective.options
    has_classes = predicts_from_scores(objective) and objective.label_kind == "classes"
    if not has_classes or not isinstance(options, LinearHeadOptions):
        return 0, (
            f"new head: texts make a head for classification, and the target is "
            f"{objective.registered_name}"
        )
    if not options.norm:
        return 0, "new head: a head made of texts reads normalised features: leave norm: false out"
    assert reads_texts(source)
    texts = class_texts(objective.state["labels"])
    weight = source.head_of_texts(texts)
    objective.load_state_dict({"head.weight": weight, "head.bias": weight.new_zeros(len(weight))})
    return len(weight), f"head: {len(weight)} classes by texts such as {texts[0]!r}"


def carry_head(
    objective: Objective, source: ObjectiveSpec, tensors: Mapping[str, Tensor]
) -> tuple[int, str]:
    """Load the rows of a source's head for the labels that it shares with a target's.

    Returns:
        How many labels have been carried over, and what was done in words.
    """
    if source.name == NO_OBJECTIVE.name:
        return 0, "new head: the source has none"
    if source.name != objective.registered_name:
        return 0, f"new head: the source's objective was {source.name}"
    if not names_labels(objective):
        return 0, f"new head: heads of {source.name} have no named labels to be carried over by"
    differ = [
        name
        for name in objective.head_options
        if source.options.get(name) != getattr(objective.options, name)
    ]
    if differ:
        return 0, f"new head: the source's head was trained with another {', '.join(differ)}"
    match = compare(source.state, objective.state)
    if match.ambiguous:
        return 0, f"new head: several labels are called {_some(match.ambiguous)}"
    own = objective.state_dict()
    places = {name: place for place, name in enumerate(match.source)}
    ours = [place for place, name in enumerate(match.target) if name in places]
    theirs = [places[match.target[place]] for place in ours]
    for name, tensor in tensors.items():
        if name not in own or own[name].shape[1:] != tensor.shape[1:]:
            return 0, f"new head: {name} of the source's head has another shape"
        has_rows = tensor.dim() and len(own[name]) == len(match.target)
        if has_rows and len(tensor) == len(match.source):
            own[name][ours] = tensor[theirs].to(own[name])
        elif own[name].shape == tensor.shape:
            own[name].copy_(tensor)
    objective.load_state_dict(own)
    labels, detail = plural(len(match.shared), "label"), match.text()
    return len(match.shared), (
        f"head: {labels} carried over by name{f' ({detail})' if detail else ''}"
    )
