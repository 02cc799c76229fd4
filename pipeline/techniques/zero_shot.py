"""The source's network without any training."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Technique


class ZeroShotOptions(Options):
    prompt: str = Field(
        "a photo of a {}",
        pattern=r"^[^{}]*\{\}[^{}]*$",
        description="with a source of clip: the text about each class; {} is replaced by the "
        "class's name",
    )


@register("technique", "zero_shot", options=ZeroShotOptions)
class ZeroShot(Technique):
    """Test the source's backbone and head without any training.

    It shows where adaptation starts. It assumes that source and target mean the same by the same
    labels. It helps where the target has no labels. It hurts where the inputs or the meaning of the
    labels differ. It is for objectives whose head is transferred. In classification and multilabel
    the head is transferred label by label, by the labels' names: the source must know every label
    of the target.

    A source of `clip` has learned from texts instead. For a target of classification the head is
    then made of texts about the classes (option ``prompt``; Radford et al. 2021): the scores are
    cosines between the features of a row and each text, divided by the temperature.
    """

    def phases(self, steps):
        return ()

    def rates(self, layers, phase):
        return dict.fromkeys(layers, 0.0)

    def class_texts(self, names):
        """Return one text a class, in the order of ``names``."""
        return [self.options.prompt.replace("{}", name) for name in names]
