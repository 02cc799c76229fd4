"""Exports of regression give the number in the unit of the label, in every family and library."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from contract_rows import wake
from toys import SMALL, image_rows, sentences, take, task_of, text_modality

from pipeline.checkpoints import (
    bundle,
    classifier_export,
    export,
    exported_classifier,
    pretrained,
)
from pipeline.checkpoints.bundle import BundleError
from pipeline.core.contracts import Batch
from pipeline.core.specs import ModalitySpec

STATE = {"mean": 2005.0, "std": 11.0, "labels": ["year"]}
POOLS = {"bert": "pooler", "roberta": "pooler", "distilbert": "first", "gpt2": "last"}


def bundled(folder, backbone: str, modality, *, state=STATE, **options):
    """A task with random weights, and its bundle's place."""
    norm = options.pop("norm", False)
    inputs = modality.inputs()
    task = task_of(backbone, inputs, "regression", state, options={"norm": norm}, **options).eval()
    wake(task)
    with torch.no_grad():
        task.objective.head.weight.mul_(10.0)
    spec = ModalitySpec(modality.registered_name, modality.options.model_dump(), modality.state)
    bundle.save(str(folder / "bundle"), task, spec)
    return task, str(folder / "bundle")


def texts(modality) -> Batch:
    import numpy as np
    import pyarrow as pa

    arrays, _ = modality.decode(pa.table({"text": sentences(5, seed=8)[0]}), {"text": "text"})
    batch = Batch(np.arange(5), torch.arange(5), modality.collate(arrays))
    return modality.finish(batch)


@torch.no_grad()
@pytest.mark.parametrize("family", POOLS)
def test_transformers_predicts_the_number(family, tmp_path):
    is_bpe = family in ("gpt2", "roberta")
    modality = text_modality(f"transformers/{'gpt2' if is_bpe else 'bert'}")
    sizes = {**SMALL, "pool": POOLS[family]}
    task, uri = bundled(tmp_path, f"transformers/{family}", modality, **sizes)
    out = tmp_path / "out"
    export.export_bundle(uri, str(out), "hugging-face", False)
    config = json.loads((out / "config.json").read_text())
    assert config["problem_type"] == "regression" and config["id2label"] == {"0": "year"}
    batch = texts(modality)
    ours = task.objective.predict(task.backbone, batch)["prediction"]
    model = hf.AutoModelForSequenceClassification.from_pretrained(out).eval()
    found = model(input_ids=batch["tokens"], attention_mask=batch["mask"].long()).logits
    assert found.shape == (5, 1) and (found[:, 0] - ours).abs().max() < 1e-3 < ours.std()
    assert "regression" not in pretrained.read(f"hf:{out}").heads, "it is fine-tuned anew"


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
def test_a_picture_has_its_number_in_timm_and_in_a_state_dict(norm, tmp_path):
    rows = image_rows(4, size=32, channels=3)
    task, uri = bundled(tmp_path, "timm/test_vit", rows.modality, norm=norm)
    batch = take(rows, range(4))
    ours = task.objective.predict(task.backbone, batch)["prediction"]
    places = [tmp_path / "weights.safetensors"]
    export.export_bundle(uri, str(places[0]), "state-dict", False)
    export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    if norm:
        places.append(tmp_path / "out")
    for place in places:
        found = exported_classifier.load(place)(batch["image"])
        assert (found[:, 0] - ours).abs().max() < 1e-3 < ours.std()
    if not norm:
        import timm

        model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert (model(batch["image"])[:, 0] - ours).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["hugging-face", "state-dict"])
def test_a_mean_that_float32_cannot_hold_is_refused(kind, tmp_path):
    """A float32 near 1e8 is a multiple of 8; the deviation here is 1."""
    rows = image_rows(4, size=32, channels=3)
    state = {**STATE, "mean": 1e8 + 3, "std": 1.0}
    _, uri = bundled(tmp_path, "timm/test_vit", rows.modality, state=state)
    with pytest.raises(
        BundleError, match=r"standard deviations of the label .* --kind bundle, onnx"
    ):
        export.export_bundle(uri, str(tmp_path / "out.safetensors"), kind, False)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_wrong_bias_of_small_numbers_is_refused(tmp_path, monkeypatch):
    rows = image_rows(4, size=32, channels=3)
    state = {**STATE, "mean": 0.0, "std": 1e-6}
    _, uri = bundled(tmp_path, "timm/test_vit", rows.modality, state=state)
    said = export.export_bundle(uri, str(tmp_path / "fine"), "hugging-face", False)
    assert "standard deviations" in said
    right = classifier_export.linear_tensors

    def wrong(task):
        return right(task) | {"bias": right(task)["bias"] + 1e-6}

    monkeypatch.setattr(classifier_export, "linear_tensors", wrong)
    with pytest.raises(BundleError, match="differ by up to 1 standard deviations of the label"):
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_keeps_the_digits_of_a_number_that_is_large_beside_its_deviation(tmp_path):
    rows = image_rows(4, size=32, channels=3)
    state = {**STATE, "mean": 1e8 + 3, "std": 1.0}
    task, uri = bundled(tmp_path, "timm/test_vit", rows.modality, state=state, norm=True)
    said = export.export_bundle(uri, str(tmp_path / "out"), "torch-export", False)
    assert "largest difference of prediction in batches of 4, 1, 3, 2 rows" in said
    assert "standard deviations" in said
    batch = take(rows, range(4))
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()({"image": batch["image"]})
    ours = task.objective.predict(task.backbone, batch)["prediction"]
    assert found["prediction"].dtype == torch.float64
    torch.testing.assert_close(found["prediction"] - 1e8, ours - 1e8, rtol=0, atol=1e-4)
    described = json.loads((tmp_path / "out" / "graph.json").read_text())
    assert described["outputs"] == {"prediction": {"type": "float64"}}
    assert described["labels"] == ["year"]


@torch.no_grad()
def test_a_head_that_is_kept_predicts_the_same_under_another_mean_and_deviation(tmp_path):
    rows = image_rows(4, size=32, channels=3)
    old, uri = bundled(tmp_path, "timm/test_vit", rows.modality)
    state = {**STATE, "mean": 1990.0, "std": 3.0}
    new = task_of(
        "timm/test_vit", rows.modality.inputs(), "regression", state, options={"norm": False}
    ).eval()
    new.backbone.load_state_dict(old.backbone.state_dict())
    assert bundle.carry_head(new, bundle.load(uri)) == "head kept: the same labels"
    batch = take(rows, range(4))
    ours, theirs = (
        task.objective.predict(task.backbone, batch)["prediction"] for task in (new, old)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert theirs.std() > 0.1
