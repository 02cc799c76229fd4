"""What modalities, backbones, objectives, techniques and baselines promise: a page for each.

Imports other files of ``core`` and lower layers, never an implementation of one.
"""

from pipeline.core.batch import Batch
from pipeline.core.contracts.backbone import Backbone, FeatureMapSpec, Features
from pipeline.core.contracts.baseline import Baseline, BaselineRows, LabelKind, Setting
from pipeline.core.contracts.modality import Arrays, Modality, View
from pipeline.core.contracts.objective import Loss, Objective, RawRows
from pipeline.core.contracts.task import Ensemble, Task
from pipeline.core.contracts.technique import (
    FinishedTrial,
    HeadFirst,
    Phase,
    Technique,
    adapts_at_test,
    backbone_layers,
    layer_rates,
    trains,
)

__all__ = [
    "Arrays",
    "Backbone",
    "Baseline",
    "BaselineRows",
    "Batch",
    "Ensemble",
    "FeatureMapSpec",
    "Features",
    "FinishedTrial",
    "HeadFirst",
    "LabelKind",
    "Loss",
    "Modality",
    "Objective",
    "Phase",
    "RawRows",
    "Setting",
    "Task",
    "Technique",
    "View",
    "adapts_at_test",
    "backbone_layers",
    "layer_rates",
    "trains",
]
