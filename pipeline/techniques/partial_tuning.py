"""Training some of the parameters of every layer: biases (BitFit) or norms."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from pydantic import Field
from torch import nn

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Task, Technique
from pipeline.core.nn.norms import norm_parameters

BIAS = re.compile(r"(^|_)bias(_[ih]h_l\d+(_reverse)?)?$")
"""Names of bias terms in their modules: ``bias``, ``in_proj_bias``, ``bias_hh_l0_reverse``."""


class PartialOptions(LayerOptions):
    lr_scale: float = Field(
        10.0,
        gt=0,
        description="learning rate of the trained parameters of the backbone, relative to lr",
    )


class PartedTask(Task):
    """A task whose layers are divided: the parameters that train, and the others.

    Args:
        task: The plain task.
        part: What the parameters that train are called.
        chosen: Their names.
    """

    def __init__(self, task: Task, part: str, chosen: set[str]):
        super().__init__(task.backbone, task.objective)
        self.part, self.chosen = part, chosen

    def layers(self) -> dict[str, list[str]]:
        divided: dict[str, list[str]] = {}
        for layer, names in super().layers().items():
            divided[layer] = [name for name in names if name not in self.chosen]
            own = [name for name in names if name in self.chosen]
            if own:
                divided[f"{layer}/{self.part}"] = own
        return divided


class PartialTechnique(Technique, ABC):
    """Train one kind of parameters of the backbone and the head, nothing else."""

    part: str

    def search_space(self):
        return {"lr": (0.1, 10.0), "lr_scale": (1.0, 100.0)}

    @abstractmethod
    def names(self, backbone: nn.Module) -> set[str]:
        """Return the names of the parameters that train."""

    def wrap(self, task):
        """Raises ValueError where the backbone has no such parameters."""
        chosen = {f"backbone.{name}" for name in self.names(task.backbone)}
        if not chosen:
            raise ValueError(
                f"{self.registered_name}: {task.backbone.arch.name} has no {self.part}: leave the "
                "technique out, or take lora"
            )
        return PartedTask(task, self.part, chosen)

    def finish(self, task):
        return Task(task.backbone, task.objective) if isinstance(task, PartedTask) else task

    def rates(self, layers, phase):
        return {
            name: self.options.lr_scale if name.endswith(f"/{self.part}") else float(name == "head")
            for name in layers
        }


@register("technique", "bitfit", options=PartialOptions)
class BitFit(PartialTechnique):
    """Train the bias terms and the head (Ben Zaken et al. 2022).

    Biases of norms are among them, as in the paper; batch norms also follow the statistics of the
    target's rows (``freeze_norm_stats`` keeps the source's). A bias takes a larger rate than a
    weight: the paper searched 1e-4 to 4e-3.

    It assumes that the source's features need only be shifted. It helps on few rows, where it
    regularises, and where many tasks share one backbone. It hurts where the inputs differ or rows
    are many, and then falls behind full fine-tuning.
    """

    part = "biases"

    def names(self, backbone):
        return {
            name for name, _ in backbone.named_parameters() if BIAS.search(name.rpartition(".")[2])
        }


@register("technique", "norm_tuning", options=PartialOptions)
class NormTuning(PartialTechnique):
    """Train scale and shift of the norms, and the head (Frankle et al. 2021; Zhao et al. 2024).

    Batch norms also follow the statistics of the target's rows (``freeze_norm_stats`` keeps the
    source's).

    It assumes that source and target differ in the scale of features: other devices, other
    hospitals, other noise. It helps on few rows and costs few parameters. It hurts where new
    features are needed. Backbones without norms are refused.
    """

    part = "norms"

    def names(self, backbone):
        return norm_parameters(backbone)
