"""Random rows of every modality, and what a comparison says of an export that is not the bundle."""

import numpy as np
import pytest
import torch
from toys import (
    EVENT_COLUMNS,
    event_rows,
    label_state,
    stays,
    table_rows,
    task_of,
    text_modality,
    trajectory_rows,
)

from pipeline.checkpoints import bundle, export_check
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.specs import ModalitySpec
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.modalities.events import Events, EventsOptions
from pipeline.modalities.image import Image, ImageOptions
from pipeline.modalities.trajectory import Trajectory


def modalities():
    with_facts = EventsOptions(hours=24, min_rows=1)
    return {
        "image": Image(ImageOptions(size=32, channels=1, fit="pad"), {"mean": [0.4], "std": [0.2]}),
        "audio": Audio(
            AudioOptions(mels=40), {"features": "mel", "mean": [0.0] * 40, "std": [1.0] * 40}
        ),
        "text": text_modality(),
        "events": event_rows(8).modality,
        "table": table_rows(8).modality,
        "trajectory": trajectory_rows(4).modality,
        "facts": Events(with_facts, Events.fit(with_facts, stays(20), EVENT_COLUMNS, "events/gru")),
    }


@pytest.mark.parametrize(
    "name", ["image", "audio", "text", "events", "table", "trajectory", "facts"]
)
def test_random_rows_are_of_the_right_form_and_follow_from_the_seed(name):
    modality = modalities()[name]
    one, same, other = (export_check.random_batch(modality, seed=seed) for seed in (0, 0, 1))
    assert (
        one is not None and same is not None and other is not None and len(one) == export_check.ROWS
    )
    assert all(torch.equal(tensor, same[key]) for key, tensor in one.data.items())
    assert any(
        not torch.equal(tensor, other[key])
        for key, tensor in one.data.items()
        if tensor.shape == other[key].shape
    )
    backbone = {
        "image": "timm/test_resnet",
        "audio": "torchaudio/deepspeech2",
        "text": "transformers/bert",
        "table": "table/ft_transformer",
        "trajectory": "policy/mlp",
    }.get(name, "events/gru")
    task = task_of(backbone, modality.inputs(), "classification", label_state()).eval()
    assert task.backbone(one).pooled.std(0).max() > 1e-4, "rows differ"


@pytest.mark.parametrize("name", ["audio", "text", "events", "trajectory"])
def test_random_rows_can_be_shorter(name):
    modality = modalities()[name]
    whole, half = (
        modality.random_rows(3, np.random.default_rng(0), length) for length in (1.0, 0.5)
    )
    longest = [
        max(tensor.shape[1] for tensor in one.values() if tensor.dim() > 1) for one in (whole, half)
    ]
    assert 0.4 * longest[0] <= longest[1] <= 0.6 * longest[0]


class WithoutRandomRows(Trajectory):
    random_rows = None


def test_a_modality_without_random_rows_is_compared_by_its_tensors(tmp_path, monkeypatch):
    made = trajectory_rows(4).modality
    modality = WithoutRandomRows(made.options, made.state)
    monkeypatch.setattr(bundle.Bundle, "modality", lambda found: modality)
    assert export_check.random_batch(modality) is None
    task = task_of("policy/mlp", modality.inputs(), "classification", label_state())
    bundle.save(
        str(tmp_path / "b"),
        task,
        ModalitySpec("trajectory", modality.options.model_dump(), modality.state),
    )
    found = bundle.load(str(tmp_path / "b"))
    assert (
        export_check.compare_tensors(found, found.tensors).text()
        == f"compared with the bundle: all {len(found.tensors)} tensors are the same bit for bit"
    )
    name = next(iter(found.tensors))
    with pytest.raises(
        BundleError, match=rf"1 tensors of the export differ from the bundle's \(first: {name}\)"
    ):
        export_check.compare_tensors(found, {**found.tensors, name: found.tensors[name] + 1})


@pytest.mark.parametrize(
    ("difference", "fits"),
    [(0.9e-4, True), (1.1e-4, False), (float("nan"), False), (float("inf"), False)],
)
def test_what_is_more_than_rounding_is_refused(difference, fits):
    found = export_check.Comparison(difference, 0.5, 4, "scores")
    if fits:
        assert export_check.require(found, "b") is found
        return
    with pytest.raises(BundleError, match="b: the export gives other numbers than the bundle"):
        export_check.require(found, "b")
    large = export_check.Comparison(1.1e-2, 200.0, 4, "scores")
    assert export_check.require(large, "b") is large and np.isfinite(large.largest)
