"""Plugin of LeRobot that opens policies of One to Many. It was written by an export.

LeRobot finds the type ``onetomany`` in the folder's config.json once this package is installed, or
imported. One copy of it serves all exported policies. The policy acts, and cannot be trained.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedClassDecorator=false

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    RenameObservationsProcessorStep,
)
from lerobot.processor.factory import make_policy_processor_pipelines
from torch import Tensor

from .exported_policy import PolicySpec, PolicySteps, load_graph

ONLY_ACTS = "a policy of One to Many is a finished graph: LeRobot runs it, and cannot train it"
STATE = "observation.state"


@PreTrainedConfig.register_subclass("onetomany")
@dataclass
class OneToManyConfig(PreTrainedConfig):
    """What config.json says of a policy; see `PolicySpec`."""

    program_bytes: int = 0
    """Bytes of the program, which is a tensor of model.safetensors."""
    inputs: list[str] = field(default_factory=list)
    reach: int = 1
    ensemble: float | None = None
    chunk: int = 1
    tasks: list[str] = field(default_factory=list)
    observation_mean: list[float] = field(default_factory=list)
    observation_std: list[float] = field(default_factory=list)
    action_mean: list[float] = field(default_factory=list)
    action_std: list[float] = field(default_factory=list)

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError(ONLY_ACTS)

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Features are those of the export."""


class OneToManyPolicy(PreTrainedPolicy):
    """Acts by the exported graph, which standardises, remembers and ensembles as training did."""

    config_class = OneToManyConfig
    name = "onetomany"

    def __init__(self, config: OneToManyConfig, **_: Any):
        super().__init__(config)
        empty = torch.zeros(config.program_bytes, dtype=torch.uint8)
        self.register_buffer("program", empty)  # from_pretrained fills it
        self._steps: PolicySteps | None = None

    @property
    def steps(self) -> PolicySteps:
        if self._steps is None:
            names = PolicySpec.__annotations__
            spec: Any = {name: getattr(self.config, name) for name in names}
            self._steps = PolicySteps(load_graph(self.program), spec)
        return self._steps

    def reset(self) -> None:
        """Begin an episode."""
        if self._steps is not None:
            self._steps.reset()

    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the actions (B, A) of this step, in the robot's units. A call is a step."""
        return self.steps.act(*_read(batch)).to(batch[STATE].device)

    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """Return the next actions (B, H, A) as predicted at this step. A call is a step too."""
        return self.steps.chunk(*_read(batch)).to(batch[STATE].device)

    def forward(self, batch: dict[str, Any]) -> Any:
        raise NotImplementedError(ONLY_ACTS)

    def get_optim_params(self) -> Any:
        raise NotImplementedError(ONLY_ACTS)


def _read(batch: dict[str, Any]) -> tuple[Tensor, list[str]]:
    tasks = batch.get("task") or []
    return batch[STATE], [tasks] if isinstance(tasks, str) else list(tasks)


def make_onetomany_pre_post_processors(
    config: OneToManyConfig, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """Return processors that change no numbers: the policy standardises by itself."""
    return make_policy_processor_pipelines(
        input_steps=[
            RenameObservationsProcessorStep(rename_map={}),
            AddBatchDimensionProcessorStep(),
            DeviceProcessorStep(device=config.device),
        ],
        output_steps=[DeviceProcessorStep(device="cpu")],
    )
