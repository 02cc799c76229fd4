"""The page of the Objective contract: its example is complete, and protocols are what they say."""

import inspect
import textwrap
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from toys import image_rows, take, task_of

from pipeline.config import registry
from pipeline.core.contracts import Objective, Task
from pipeline.core.contracts import objective as page
from pipeline.core.contracts import objective_capabilities as capabilities

PROTOCOLS = [
    kind
    for kind in vars(capabilities).values()
    if isinstance(kind, type)
    and getattr(kind, "_is_protocol", False)
    and kind.__module__ != "typing"
]


def example() -> type[Objective]:
    """The objective that the page shows, as a plugin's file would hold it."""
    code = textwrap.dedent(page.__doc__.partition("::\n")[2].partition("\nWhat only some")[0])
    names: dict[str, Any] = {}
    exec(code, names)
    return names["Number"]


def test_the_example_of_the_page_trains_and_predicts():
    kind = example()
    table = pa.table({"y": [1.0, 2.0, 3.0, 6.0]})
    options, state = kind.options_class(), kind.fit(None, table, {"target": "y"})
    assert state == {"mean": 3.0, "std": pytest.approx(1.8708, abs=1e-4)}
    target = kind.encode(table, {"target": "y"}, state)["target"]
    assert kind.encode(table, {}, state) == {}
    rows = image_rows(4, size=32, channels=3)
    backbone = task_of(
        "timm/test_vit",
        rows.modality.inputs(),
        "classification",
        {"values": [0, 1], "labels": ["a", "b"]},
        seed=1,
    ).backbone
    task = Task(backbone, kind(backbone, options, state))
    batch = take(rows, np.arange(4)).replace(target=torch.from_numpy(target))
    total, count, logs = task(batch)
    total.backward()
    assert count == 4 and logs == {}
    assert all(parameter.grad is not None for parameter in task.objective.parameters())
    new_rows = take(rows, np.arange(4))
    assert set(task.objective.predict(backbone, new_rows)) == {"value"}


def test_the_contract_is_small():
    """What few objectives need belongs into a protocol."""
    own = {name for name in vars(Objective) if not name.startswith("_") or name == "__init__"}
    assert len(own | set(inspect.get_annotations(Objective))) <= 12


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.__name__)
def test_each_capability_is_had_by_some_objective_and_not_by_all(protocol):
    kinds = [registry.get("objective", name) for name in registry.names("objective")]
    able = [  # by the objective itself or by its options
        kind
        for kind in kinds
        if isinstance(kind, protocol) or isinstance(kind.options_class, protocol)
    ]
    assert 0 < len(able) < len(kinds) and not isinstance(Objective, protocol)


def test_a_cached_head_of_numbers_has_no_classes():
    """Its tensor is kept beside the features, and transferability scores do not read it."""

    class Numbers:
        label_tensors = ("label", "weight")

        def head_loss(self, features, batch): ...

        def head_predict(self, features, batch): ...

    assert capabilities.has_cached_head(Numbers) and not capabilities.has_classes(Numbers)
    assert capabilities.tensors_beside_features(Numbers) == ("label", "weight")
    for name, tensor in (("classification", "label"), ("multilabel", "labels")):
        kind = registry.get("objective", name)
        assert capabilities.has_classes(kind) and kind.class_tensor == tensor
        assert capabilities.tensors_beside_features(kind) == (tensor,)
    assert not capabilities.has_classes(registry.get("objective", "segmentation"))
