"""What each modality says of its rows (`Modality.inputs`), for backbones to be built from.

A backbone names the one that it reads in its constructor, and refuses rows of another kind. They
stand as JSON in every bundle, so they stay plain dicts. A plugin's modality has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

Inputs: TypeAlias = Mapping[str, Any]
"""Those of any modality."""


class ImageInputs(TypedDict):
    """Of ``image``."""

    channels: int
    """1 or 3."""
    size: int
    """Pixels a side."""


class AudioInputs(TypedDict):
    """Of ``audio``."""

    features: Literal["wave", "mel"]
    rate: int
    """Samples a second."""
    channels: int
    """Numbers a position: 1 of samples, or the mel bins."""
    convolutions: list[list[int]]
    """Those from samples to features (`pipeline.core.nn.conv_arithmetic`)."""
    scale: NotRequired[str]
    """Of samples that are not between -1 and 1."""


class TextInputs(TypedDict):
    """Of ``text``."""

    vocabulary: int
    """How many tokens there are."""
    length: int
    """Tokens a row."""
    specials: list[int]
    """Ids of pad, unk, cls, sep and mask, in this order."""
    continuing: NotRequired[str]
    """Which tokens continue a word, as a bitmap in base 64."""


class StaticInputs(TypedDict):
    """Of static features."""

    numbers: int
    """How many of them are numbers."""
    codes: int
    """How many texts there are."""


class TableInputs(StaticInputs):
    """Of ``table``."""

    features: Literal["table"]


class EventInputs(StaticInputs):
    """Of ``events``."""

    variables: int
    """How many variables there are."""
    start: float
    """First hour of a row."""
    hours: float
    """The hour at which a row ends."""


class SpaceInputs(TypedDict):
    """Of a robot's space of observations and actions."""

    observation: int
    """Numbers of an observation."""
    action: int
    """Numbers of an action, or classes."""
    discrete: bool
    """Whether actions are classes."""


class TrajectoryInputs(TypedDict):
    """Of ``trajectory``."""

    spaces: dict[str, SpaceInputs]
    tasks: int
    """How many tasks there are."""
    images: list[int] | None
    """Channels, height and width of frames; None: rows have none."""
