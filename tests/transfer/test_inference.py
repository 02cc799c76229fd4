"""Predictions on files: one line a row, whatever cannot be read, and parts that can be read as one
table.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from toys import SMALL, label_state, sentences, task_of, text_modality, weights
from typer.testing import CliRunner

from pipeline import cli
from pipeline.checkpoints import (
    bundle,
    classifier_export,
    export,
    export_folder,
    exported_classifier,
    pretrained,
)
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.specs import ModalitySpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.plan import Item
from pipeline.io import atomic_folder, storage
from pipeline.transfer import inference

BOXES = {
    "values": [0, 1],
    "labels": ["a", "b"],
    "box_format": "xyxy",
    "relative": True,
    "max_boxes": 10,
}
HEADS = {
    "classification": ({}, label_state()),
    "multilabel": ({}, {"labels": ["a", "b"], "separator": "|", "positives": [1, 1], "rows": 2}),
    "segmentation": ({"classes": 3}, {"labels": ["a", "b", "c"], "ignore": 255}),
    "detection": ({"channels": 64, "convs": 1}, BOXES),
    "instance_segmentation": ({"channels": 64, "mask_convs": 1}, BOXES),
}


def encoded(number: int) -> bytes:
    sink = io.BytesIO()
    PIL.Image.fromarray(
        np.random.default_rng(number).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    ).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("name", HEADS)
def test_a_row_that_cannot_be_read_has_its_reason_and_no_prediction(name, tmp_path):
    options, state = HEADS[name]
    task = task_of("timm/test_resnet", {"channels": 3, "size": 64}, name, state, options=options)
    state = {"mean": [0.5] * 3, "std": [0.2] * 3}
    modality = ModalitySpec("image", {"size": 64, "fit": "pad"}, state)
    bundle.save(str(tmp_path / "bundle"), task, modality)
    files = [encoded(0), b"no image", encoded(1), *[b"none of these"] * 2]
    pq.write_table(pa.table({"image": files}), tmp_path / "rows.parquet")
    selection = Selection(
        manifests.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports"))
    )
    work, types = (
        inference.Predictor(str(tmp_path / "bundle"), selection, {"image": "image"}),
        registry.get("objective", name).output_types,
    )
    (tmp_path / "out").mkdir()
    for start, stop in ((0, 3), (3, 5)):
        pq.write_table(
            inference.to_table(work(Item(-1, start, stop)), types),
            tmp_path / f"out/part-{start}.parquet",
        )
    parts = [pq.read_table(file) for file in sorted((tmp_path / "out").iterdir())]
    assert parts[0].schema == parts[1].schema and "null" not in str(parts[0].schema)
    rows = pa.concat_tables(parts).to_pylist()
    assert [row.pop("row") for row in rows] == list(range(5)) and [
        bool(row.pop("error")) for row in rows
    ] == [False, True, False, True, True]
    for row in (rows[1], rows[3], rows[4]):
        assert all(not value or np.isnan(value).all() for value in row.values())
    if name == "segmentation":
        assert [PIL.Image.open(io.BytesIO(rows[i]["mask"])).size for i in (0, 2)] == [(64, 32)] * 2
    if name == "classification":
        assert all(
            row["prediction"] == f"class {np.argmax(row['probabilities'])}"
            for row in (rows[0], rows[2])
        )


# ---------------------------------------------------------------- export

IMAGES = ModalitySpec(
    "image",
    {"size": 64, "fit": "squash", "crop_share": 0.9},
    {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
)


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory):
    modality = text_modality()
    uri = str(tmp_path_factory.mktemp("text") / "bundle")
    bundle.save(
        uri,
        task_of("transformers/bert", modality.inputs(), "mlm", **SMALL),
        ModalitySpec("text", modality.options.model_dump(), modality.state),
    )
    return uri


def image_bundle(
    folder,
    name: str = "timm/test_resnet",
    options=None,
    objective: str = "classification",
    **backbone,
):
    state = label_state() if objective == "classification" else HEADS[objective][1]
    task = task_of(
        name, {"channels": 3, "size": 64}, objective, state, options=options, **backbone
    ).eval()
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    bundle.save(str(folder / "bundle"), task, IMAGES)
    return task, str(folder / "bundle")


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "objective", "more"),
    [
        ("timm/test_resnet", "classification", {}),
        ("timm/test_vit", "multilabel", {"drop_path": 0.1}),
        ("timm/test_vit", "classification", {"patch_size": 8}),
    ],
)
def test_timm_gives_the_bundles_scores_and_its_folder_starts_again(name, objective, more, tmp_path):
    import timm

    task, uri = image_bundle(tmp_path, name, {"norm": False}, objective, **more)
    text = export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert text.startswith(f"{tmp_path / 'out'}: {name} with ")
    assert (
        f", {len(task.objective.state['labels'])} labels; compared with the bundle on 4 random "
        "rows: largest difference of scores " in text
    )
    x = torch.randn(2, 3, 64, 64)
    batch = Batch(np.arange(2), torch.arange(2), {"image": x})
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = task.objective.predict(task.backbone, batch)["scores"]
    assert (model(x) - ours).abs().max() < 1e-5 < ours.std()
    config = timm.data.resolve_model_data_config(model)
    assert [*config["mean"], *config["std"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] and config[
        "input_size"
    ] == (3, 64, 64)
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == (
        "bilinear",
        1.0,
        "squash",
    )
    start = pretrained.read(f"hf:{tmp_path / 'out'}")
    twin = bundle.build_backbone(start.arch).eval()
    assert not start.load_into(twin).new and torch.equal(
        twin(batch).pooled, task.backbone(batch).pooled
    )
    assert start.modality.state == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert start.modality.options == {
        "size": 64,
        "channels": 3,
        "fit": "squash",
        "interpolation": "bilinear",
    }


def opened_here(folder, module: str, images: torch.Tensor, *place: str) -> torch.Tensor:
    """Logits of an exported classifier, whose code cannot import this package."""
    spec = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert spec is not None and spec.loader is not None
    loader = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "pipeline"]:
            patch.delitem(sys.modules, name)
        patch.setitem(sys.modules, "pipeline", None)
        spec.loader.exec_module(loader)
        return loader.load(*place)(images)


OPEN_ALONE = """
import json, sys
import torch
from safetensors.torch import load_file
sys.path.insert(0, sys.argv[1])
loader = __import__(sys.argv[2])
assert not [name for name in sys.modules if name.split(".")[0] == "pipeline"], "the exported code needs nothing of this package"
model = loader.load(*sys.argv[5:])
with torch.no_grad():
    torch.save(model(load_file(sys.argv[3])["image"]), sys.argv[4])
assert not [name for name in sys.modules if name.split(".")[0] == "pipeline"]
"""


def opened_alone(folder, module: str, images: torch.Tensor, *place: str) -> torch.Tensor:
    """Logits of an exported classifier in a Python of its own that cannot import this package, by
    timm and torch alone.
    """
    save_file({"image": images}, folder / "rows.safetensors")
    out = folder / "logits.pt"
    work = folder / "elsewhere"
    work.mkdir()
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            OPEN_ALONE,
            str(folder),
            module,
            str(folder / "rows.safetensors"),
            str(out),
            *place,
        ],
        cwd=work,
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


SLOW = pytest.mark.slow
"""VGG has half a gigabyte of weights; its pre-logits are layers of their own. A Python of its own
takes seconds to import torch and timm.
"""
SMALL_PATCHES = {"patch_size": 8}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "suffix", "name", "objective", "more", "opened"),
    [
        ("hugging-face", "", "timm/test_resnet", "classification", {}, opened_here),
        ("state-dict", ".safetensors", "timm/test_vit", "multilabel", SMALL_PATCHES, opened_here),
        pytest.param(
            "state-dict", ".pt", "timm/test_resnet", "classification", {}, opened_alone, marks=SLOW
        ),
        pytest.param(
            "hugging-face",
            "",
            "timm/test_vit",
            "multilabel",
            SMALL_PATCHES,
            opened_alone,
            marks=SLOW,
        ),
        pytest.param(
            "hugging-face", "", "timm/vgg11", "classification", {}, opened_alone, marks=SLOW
        ),
    ],
)
def test_a_classifier_trained_with_defaults_is_exported_with_its_norm(
    kind, suffix, name, objective, more, opened, tmp_path
):
    """The layer norm before the linear layer has no parameters: weights alone gave other classes in
    timm.
    """
    task, uri = image_bundle(tmp_path, name, None, objective, **more)
    assert task.objective.options.norm
    out = tmp_path / "export"
    target = out / f"weights{suffix}" if suffix else out
    text = export.export_bundle(uri, str(target), kind, False)
    assert "compared with the bundle on 4 random rows: largest difference of scores " in text
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours = task.objective.predict(
        task.backbone, Batch(np.arange(3), torch.arange(3), {"image": x})
    )["scores"]
    module, place = ("weights_classifier", [str(target)]) if suffix else ("classifier", [])
    assert (opened(out, module, x, *place) - ours).abs().max() < 1e-4 * ours.abs().max()
    spec = json.loads((out / f"{module}.json").read_text())
    assert spec["labels"] == task.objective.state["labels"] and spec["norm"] is True
    assert [*spec["input"]["mean"], *spec["input"]["std"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    start = pretrained.read(f"hf:{out}") if not suffix else pretrained.read(f"file:{target}", name)
    arch = start.arch or task.backbone.arch
    twin = bundle.build_backbone(
        replace(arch, inputs=task.backbone.arch.inputs, options=task.backbone.arch.options)
    )
    assert not start.load_into(twin).new and all(
        torch.equal(t, weights(task.backbone)[n]) for n, t in weights(twin).items()
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hugging-face", "state-dict"])
@pytest.mark.parametrize("norm", [True, False])
def test_an_exported_classifier_gives_calibrated_scores(norm, kind, tmp_path):
    """A temperature that was fitted is part of what predict writes, so the exported linear layer
    holds it. A threshold stands beside.
    """
    import timm

    task, uri = image_bundle(tmp_path, options={"norm": norm, "calibrate": "temperature"})
    task.objective.state = {**task.objective.state, "temperature": 2.5, "threshold": 0.125}
    bundle.save(uri, task, IMAGES)
    out = tmp_path / "export"
    target = out if kind == "hugging-face" else out / "weights.safetensors"
    said = export.export_bundle(uri, str(target), kind, False)
    in_timm = kind == "hugging-face" and not norm
    beside = "classifier" if kind == "hugging-face" else "weights_classifier"
    described = json.loads((out / f"{'config' if in_timm else beside}.json").read_text())
    assert described["threshold"] == 0.125 and "called class 1" in described["threshold_of"]
    assert ("threshold in config.json" in said) == in_timm
    x = torch.randn(2, 3, 64, 64)
    ours = task.objective.predict(
        task.backbone, Batch(np.arange(2), torch.arange(2), {"image": x})
    )["scores"]
    model = (
        timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        if in_timm
        else exported_classifier.load(target)
    )
    theirs = model(x)
    assert (theirs - ours).abs().max() < 1e-5 < ours.std()


def test_an_export_that_differs_from_its_bundle_is_refused(tmp_path, monkeypatch):
    """Whatever goes wrong in writing is found by running what was written."""
    _, uri = image_bundle(tmp_path)
    plain = classifier_export.linear_tensors
    monkeypatch.setattr(
        classifier_export,
        "linear_tensors",
        lambda task: {part: 1.01 * tensor for part, tensor in plain(task).items()},
    )
    for kind, name in (("hugging-face", "out"), ("state-dict", "out.safetensors")):
        with pytest.raises(
            BundleError,
            match=r"scores differ by up to .*; nothing was written",
        ):
            export.export_bundle(uri, str(tmp_path / name), kind, False)
        assert not (tmp_path / name).exists()


def test_a_state_dict_of_another_head_says_how_it_is_built(tmp_path):
    task, uri = image_bundle(tmp_path, objective="segmentation")
    text = export.export_bundle(uri, str(tmp_path / "weights.pt"), "state-dict", False)
    assert (
        "weights_model.json beside it" in text and "largest difference of features 0.0e+00" in text
    )
    message = json.loads((tmp_path / "weights_model.json").read_text())
    assert message["objective"]["name"] == "segmentation"
    assert message["arch"] == task.backbone.arch.to_json()
    held = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(torch.equal(tensor, held[name]) for name, tensor in task.state_dict().items())
    text = export.export_bundle(uri, str(tmp_path / "copy"), "bundle", False)
    assert (
        "compared with the bundle on 4 random rows: largest difference of features 0.0e+00" in text
    )
    text = export.export_bundle(uri, str(tmp_path / "plain.safetensors"), "state-dict", True)
    assert "largest difference of features 0.0e+00" in text


@pytest.mark.parametrize("taken", ["weights.pt", "weights_model.json"])
def test_a_state_dict_replaces_no_file(taken, tmp_path):
    """Labels of an earlier file stand in the second one."""
    _, uri = image_bundle(tmp_path, objective="segmentation")
    (tmp_path / taken).write_text("mine")
    with pytest.raises(ValueError, match=f"{taken} is there already; give another name"):
        export.export_bundle(uri, str(tmp_path / "weights.pt"), "state-dict", False)
    assert (tmp_path / taken).read_text() == "mine"
    assert len(list(tmp_path.glob("weights*"))) == 1, "nothing was written"


def test_a_head_that_timm_has_not_is_refused_and_its_backbone_written(tmp_path):
    task, uri = image_bundle(tmp_path, objective="segmentation")
    with pytest.raises(
        BundleError,
        match="timm has no head for segmentation; --backbone-only writes the plain model",
    ):
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
    assert not (tmp_path / "out").exists()
    assert ", 0 labels; compared with the bundle" in export.export_bundle(
        uri, str(tmp_path / "out"), "hugging-face", True
    )
    start = pretrained.read(f"hf:{tmp_path / 'out'}")
    assert all(torch.equal(t, start.tensors[name]) for name, t in weights(task.backbone).items())


def test_an_export_is_whole_or_absent_and_never_over_another_folder(
    text_bundle, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        plain = Path.write_text

        def broken(path, text):
            plain(path, text)
            raise OSError("the disk is full")

        patch.setattr(Path, "write_text", broken)
        with pytest.raises(OSError, match="the disk is full"):
            export.export_bundle(text_bundle, str(out), "hugging-face", False)
        assert not list(tmp_path.iterdir())
    export.export_bundle(text_bundle, str(out), "hugging-face", False)
    metadata = atomic_folder.open_folder(out, export_folder.EXPORTED)
    atomic_folder.verify_folder(out, metadata)
    assert (
        metadata["bundle"] == os.path.basename(text_bundle)
        and metadata["sha256_of_bundle"] == bundle.load(text_bundle).manifest.sha256
    )
    with pytest.raises(
        ValueError, match=r"out is there already; give a new folder, or remove it first"
    ):
        export.export_bundle(text_bundle, str(out), "hugging-face", False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        storage.StorageError,
        match=r"mine has files but no onetomany\.json; replacing it could lose work",
    ):
        export.export_bundle(text_bundle, str(tmp_path / "mine"), "hugging-face", False)
    with pytest.raises(ValueError, match=r"thesis\.txt is there already"):
        export.export_bundle(
            text_bundle, str(tmp_path / "mine" / "thesis.txt"), "hugging-face", False
        )
    with pytest.raises(ValueError, match=r"pickle.*bundle, hugging-face, lerobot, onnx"):
        export.export_bundle(text_bundle, str(tmp_path / "x"), "pickle", False)


def test_a_folder_is_exported_and_read_on_s3_too(text_bundle, root):
    export.export_bundle(text_bundle, f"{root}/out", "hugging-face", False)
    start, here = pretrained.read(f"hf:{root}/out"), bundle.load(text_bundle)
    assert all(
        torch.equal(tensor, start.tensors[name]) for name, tensor in here.backbone_tensors().items()
    )
    assert (
        pretrained.fingerprint(f"hf:{root}/out").count(" ") == 4
    )  # config, tokenizer with its two descriptions, weights
    with pytest.raises(ValueError, match="out is there already"):
        export.export_bundle(text_bundle, f"{root}/out", "hugging-face", True)


def test_the_command_writes_a_folder_that_transformers_opens(text_bundle, tmp_path):
    import transformers

    said = CliRunner().invoke(
        cli.app, ["export", text_bundle, str(tmp_path / "out"), "--kind", "hugging-face"]
    )
    assert said.exit_code == 0 and "BertForMaskedLM with " in said.output
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")
    assert fill(f"{sentences(1)[0][0][:20]} [MASK]")[0]["token_str"]
    assert (
        CliRunner()
        .invoke(cli.app, ["export", text_bundle, str(tmp_path / "out"), "--kind", "hugging-face"])
        .exit_code
        == 2
    )
    message = CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert all(kind in message for kind in ("bundle:", "hugging-face:", "state-dict:"))
