"""The specs of a network: architecture, modality and objective.

Every bundle has them as JSON, and keys of stages and trials are hashes of that JSON: a renamed or
added field changes all keys. The version of the JSON is that of the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeAlias, cast

from pipeline.core.inputs import Inputs
from pipeline.io.json_values import JsonObject

State: TypeAlias = Mapping[str, Any]
"""The result of ``fit`` on the training rows, as JSON, such as class names or means.

Each class of a modality or objective documents its keys (`ClassificationState`).
"""


@dataclass(frozen=True)
class Spec:
    """A registered component with the options that it was built with."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> JsonObject:
        return {spec_field.name: getattr(self, spec_field.name) for spec_field in fields(self)}

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Read the result of `to_json`.

        Raises ValueError where a field is missing, unknown or of another kind.
        """
        names = [spec_field.name for spec_field in fields(cls)]
        if not isinstance(document, Mapping):
            raise ValueError(
                f"{cls.__name__}: a JSON object with {', '.join(names)} was expected, not "
                f"{document!r:.80}"
            )
        values = dict(cast(Mapping[str, Any], document))
        missing = sorted(set(names) - set(values))
        unknown = sorted(set(values) - set(names))
        if missing or unknown:
            which = f"{', '.join(missing)} missing" if missing else f"not {', '.join(unknown)}"
            raise ValueError(f"{cls.__name__}: its fields are {', '.join(names)}; {which}")
        for name, value in values.items():
            if not isinstance(value, str if name == "name" else dict):
                raise ValueError(
                    f"{cls.__name__}: {name} is {value!r:.80}; a "
                    f"{'text' if name == 'name' else 'JSON object'} was expected"
                )
        return cls(**values)


@dataclass(frozen=True)
class Architecture(Spec):
    """The architecture of a backbone, from which it is built offline.

    ``name`` is library/model. ``inputs`` describes the rows for it, such as channels and size, or
    vocabulary and length.
    """

    inputs: Inputs = field(default_factory=dict[str, Any])

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class ModalitySpec(Spec):
    """How rows become tensors. ``state`` was fitted on the training rows (means, vocabulary)."""

    state: State = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class ObjectiveSpec(Spec):
    """The task that is trained. ``state`` was fitted on the training rows (label names)."""

    state: State = field(default_factory=dict[str, Any])


NO_OBJECTIVE = ObjectiveSpec("none")
"""Stands in the bundle of a backbone without a head."""
