"""What a network is made of, as plain records: architecture, modality and objective.

They stand as JSON in every bundle, and keys of stages and trials are hashes of that JSON: a field
that is renamed or added changes all keys. The version of the JSON is that of the bundle that holds
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeAlias, cast

from pipeline.core.inputs import Inputs
from pipeline.io.json_values import JsonObject

State: TypeAlias = Mapping[str, Any]
"""What ``fit`` found in the training rows, as JSON, such as class names or means.

Each class of a modality or objective documents its keys (`ClassificationState`).
"""


@dataclass(frozen=True)
class Spec:
    """A registered component with the options that it was built with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> JsonObject:
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read what `to_json` gave. Raises ValueError where a field is missing, unknown or of
        another kind.
        """
        names = [one.name for one in fields(cls)]
        if not isinstance(found, Mapping):
            raise ValueError(
                f"{cls.__name__}: a JSON object with {', '.join(names)} was expected, not "
                f"{found!r:.80}"
            )
        values = dict(cast(Mapping[str, Any], found))
        if differing := sorted(set(names) ^ set(values)):
            raise ValueError(
                f"{cls.__name__}: its fields are {', '.join(names)}; {', '.join(differing)} "
                "should not be missing or are too many"
            )
        for name, value in values.items():
            if not isinstance(value, str if name == "name" else dict):
                raise ValueError(
                    f"{cls.__name__}: {name} is {value!r:.80}; a "
                    f"{'text' if name == 'name' else 'JSON object'} was expected"
                )
        return cls(**values)


@dataclass(frozen=True)
class Architecture(Spec):
    """What rebuilds a backbone offline. ``name`` is library/model, ``inputs`` what its modality
    says of the rows (channels and size, or vocabulary and length).
    """

    inputs: Inputs = field(default_factory=dict[str, Any])

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class ModalitySpec(Spec):
    """How rows become tensors. ``state`` is what was fitted on the training rows (means,
    vocabulary).
    """

    state: State = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class ObjectiveSpec(Spec):
    """The task that is trained. ``state`` is what was fitted on the training rows (label names)."""

    state: State = field(default_factory=dict[str, Any])


NO_OBJECTIVE = ObjectiveSpec("none")
"""Of the bundle of a backbone without a head."""
