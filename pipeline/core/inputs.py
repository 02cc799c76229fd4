"""What each modality says of its rows (`Modality.inputs`), for backbones to be built from.

A backbone names the one that it reads in its constructor, and refuses rows of another kind. They
stand as JSON in every bundle, so they stay plain dicts. A plugin's modality has one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

Inputs: TypeAlias = Mapping[str, Any]
"""The inputs of any modality."""


class ImageInputs(TypedDict):
    """What modality ``image`` tells a backbone."""

    channels: int
    """1 or 3."""
    size: int
    """Pixels a side."""


class AudioInputs(TypedDict):
    """What modality ``audio`` tells a backbone."""

    features: Literal["wave", "mel"]
    rate: int
    """Samples a second."""
    channels: int
    """Numbers at each position: 1 for samples, or the number of mel bins."""
    convolutions: list[list[int]]
    """[kernel, stride, padding on each side] of each convolution from samples to features.

    `pipeline.core.nn.conv_arithmetic` computes lengths from them.
    """
    scale: NotRequired[str]
    """\"variance 1\": samples are standardised; absent: they are between -1 and 1."""


class TextInputs(TypedDict):
    """What modality ``text`` tells a backbone."""

    vocabulary: int
    """Number of tokens."""
    length: int
    """Tokens a row."""
    specials: list[int]
    """Ids of pad, unk, cls, sep and mask, in this order."""
    continuing: NotRequired[str]
    """Which tokens continue a word, as a bitmap in base 64."""


class SeriesInputs(TypedDict):
    """What modality ``series`` tells a backbone."""

    steps: int
    """Steps of a row."""
    channels: int
    """Numbers of a step."""


class StaticInputs(TypedDict):
    """What static features tell a backbone."""

    numbers: int
    """Number of features that are numbers."""
    codes: int
    """Number of distinct static texts."""


class TableInputs(StaticInputs):
    """What modality ``table`` tells a backbone."""

    features: Literal["table"]


class EventInputs(StaticInputs):
    """What modality ``events`` tells a backbone."""

    variables: int
    """Number of variables."""
    start: float
    """First hour of a row."""
    hours: float
    """The hour at which a row ends."""


class SpaceInputs(TypedDict):
    """A robot's space of observations and actions."""

    observation: int
    """Length of an observation."""
    action: int
    """Length of an action, or number of classes."""
    discrete: bool
    """Whether actions are classes."""


class TrajectoryInputs(TypedDict):
    """What modality ``trajectory`` tells a backbone."""

    spaces: dict[str, SpaceInputs]
    tasks: int
    """Number of tasks."""
    images: list[int] | None
    """Channels, height and width of frames; None: rows have none."""
