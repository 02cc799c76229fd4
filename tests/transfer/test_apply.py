"""Predictions on files: one line a row, whatever cannot be read, and parts that can be read as one table."""

import io

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import SMALL, label_state, sentences, task_of, text_modality, weights
from typer.testing import CliRunner

from pipeline import bundle, cli, folders, hugging_face, registry, starts, storage
from pipeline.bundle import BundleError
from pipeline.contracts import Batch
from pipeline.data import manifest
from pipeline.data.manifest import Selection
from pipeline.data.plan import Item
from pipeline.transfer import apply

HEADS = {"classification": ({}, label_state()), "multilabel": ({}, {"labels": ["a", "b"], "separator": "|", "positives": [1, 1], "rows": 2}),
         "segmentation": ({"classes": 3}, {"labels": ["a", "b", "c"], "ignore": 255}),
         "detection": ({"channels": 64, "convs": 1}, {"values": [0, 1], "labels": ["a", "b"], "box_format": "xyxy", "relative": True, "max_boxes": 10})}


def encoded(number: int) -> bytes:
    sink = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 48, 3), dtype=np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.mark.parametrize("name", HEADS)
def test_a_row_that_cannot_be_read_has_its_reason_and_no_prediction(name, tmp_path):
    options, state = HEADS[name]
    task = task_of("timm/test_resnet", {"channels": 3, "size": 64}, name, state, options=options)
    fit = {"options": {"size": 64, "fit": "pad"}, "state": {"mean": [0.5] * 3, "std": [0.2] * 3}}
    bundle.save(str(tmp_path / "bundle"), task, {"name": "image", **fit})
    files = [encoded(0), b"no image", encoded(1), *[b"none of these"] * 2]
    pq.write_table(pa.table({"image": files}), tmp_path / "rows.parquet")
    selection = Selection(manifest.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports")))
    work, types = apply._Predictor(str(tmp_path / "bundle"), selection, {"image": "image"}), registry.get("objective", name).written_types
    (tmp_path / "out").mkdir()
    for start, stop in ((0, 3), (3, 5)):
        pq.write_table(apply._arrow(work(Item(-1, start, stop)), types), tmp_path / f"out/part-{start}.parquet")
    parts = [pq.read_table(file) for file in sorted((tmp_path / "out").iterdir())]
    assert parts[0].schema == parts[1].schema and "null" not in str(parts[0].schema)
    rows = pa.concat_tables(parts).to_pylist()
    assert [row.pop("row") for row in rows] == list(range(5)) and [bool(row.pop("error")) for row in rows] == [False, True, False, True, True]
    for row in (rows[1], rows[3], rows[4]):
        assert all(not value or np.isnan(value).all() for value in row.values())
    if name == "segmentation":
        assert [PIL.Image.open(io.BytesIO(rows[i]["mask"])).size for i in (0, 2)] == [(64, 32)] * 2
    if name == "classification":
        assert all(row["prediction"] == f"class {np.argmax(row['probabilities'])}" for row in (rows[0], rows[2]))


# ---------------------------------------------------------------- export

IMAGES = {"name": "image", "options": {"size": 64, "fit": "squash"}, "state": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory):
    modality = text_modality()
    uri = str(tmp_path_factory.mktemp("text") / "bundle")
    bundle.save(uri, task_of("transformers/bert", modality.inputs(), "mlm", **SMALL), {"name": "text", "options": modality.options.model_dump(),
                                                                                   "state": modality.state})
    return uri


def image_bundle(folder, name: str = "timm/test_resnet", options=None, objective: str = "classification", **backbone):
    state = label_state() if objective == "classification" else HEADS[objective][1]
    task = task_of(name, {"channels": 3, "size": 64}, objective, state, options=options, **backbone).eval()
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    bundle.save(str(folder / "bundle"), task, IMAGES)
    return task, str(folder / "bundle")


@torch.no_grad()
@pytest.mark.parametrize(("name", "objective", "more"), [("timm/test_resnet", "classification", {}), ("timm/test_vit", "multilabel", {"drop_path": 0.1}),
                                                         ("timm/test_vit", "classification", {"patch_size": 8})])
def test_timm_gives_the_bundles_scores_and_its_folder_starts_again(name, objective, more, tmp_path):
    import timm

    task, uri = image_bundle(tmp_path, name, {"norm": False}, objective, **more)
    text = apply.export(uri, str(tmp_path / "out"), "hugging-face", False)
    assert text.startswith(f"{tmp_path / 'out'}: {name} with ") and text.endswith(f", {len(task.objective.state['labels'])} labels")
    x = torch.randn(2, 3, 64, 64)
    batch = Batch(np.arange(2), torch.arange(2), {"image": x})
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = task.objective.predict(task.backbone, batch)["scores"]
    assert (model(x) - ours).abs().max() < 1e-5 < ours.std()
    config = timm.data.resolve_model_data_config(model)
    assert [*config["mean"], *config["std"]] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] and config["input_size"] == (3, 64, 64)
    assert (config["interpolation"], config["crop_pct"], config["crop_mode"]) == ("bilinear", 1.0, "squash")
    start = starts.read(f"hf:{tmp_path / 'out'}")
    twin = bundle.build_backbone(start.arch).eval()
    assert not start.onto(twin).new and torch.equal(twin(batch).pooled, task.backbone(batch).pooled)
    assert start.modality["state"] == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_a_head_that_timm_has_not_is_refused_and_its_backbone_written(tmp_path):
    _, uri = image_bundle(tmp_path, options={"norm": True})
    with pytest.raises(BundleError, match=r"timm's classifiers have none. Train with objective option norm: false .* or give --backbone-only"):
        apply.export(uri, str(tmp_path / "out"), "hugging-face", False)
    task, uri = image_bundle(tmp_path, objective="segmentation")
    with pytest.raises(BundleError, match="timm has no head for segmentation; --backbone-only writes the plain model"):
        apply.export(uri, str(tmp_path / "out"), "hugging-face", False)
    assert not (tmp_path / "out").exists()
    assert apply.export(uri, str(tmp_path / "out"), "hugging-face", True).endswith(", 0 labels")
    start = starts.read(f"hf:{tmp_path / 'out'}")
    assert all(torch.equal(t, start.tensors[name]) for name, t in weights(task.backbone).items())


def test_an_export_is_whole_or_absent_and_never_over_another_folder(text_bundle, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        plain = hugging_face._save_tokenizer

        def broken(*words):
            plain(*words)
            raise OSError("the disk is full")

        patch.setattr(hugging_face, "_save_tokenizer", broken)
        with pytest.raises(OSError, match="the disk is full"):
            apply.export(text_bundle, str(out), "hugging-face", False)
        assert not list(tmp_path.iterdir())
    apply.export(text_bundle, str(out), "hugging-face", False)
    facts = folders.open_folder(out, apply.EXPORTED)
    folders.verify_folder(out, facts)
    assert facts["bundle"] == text_bundle and facts["sha256_of_bundle"] == bundle.load(text_bundle).manifest["sha256"]
    with pytest.raises(ValueError, match=r"out is there already; give a new folder, or remove it first"):
        apply.export(text_bundle, str(out), "hugging-face", False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(storage.StorageError, match=r"mine has files but no onetomany\.json; replacing it could lose work"):
        apply.export(text_bundle, str(tmp_path / "mine"), "hugging-face", False)
    with pytest.raises(ValueError, match=r"thesis\.txt is there already"):
        apply.export(text_bundle, str(tmp_path / "mine" / "thesis.txt"), "hugging-face", False)
    with pytest.raises(ValueError, match="--kind onnx: kinds are bundle, hugging-face and state-dict"):
        apply.export(text_bundle, str(tmp_path / "x"), "onnx", False)


def test_a_folder_is_exported_and_read_on_s3_too(text_bundle, root):
    apply.export(text_bundle, f"{root}/out", "hugging-face", False)
    start, here = starts.read(f"hf:{root}/out"), bundle.load(text_bundle)
    assert all(torch.equal(tensor, start.tensors[name]) for name, tensor in here.backbone_tensors().items())
    assert starts.fingerprint(f"hf:{root}/out").count(" ") == 4  # config, tokenizer with its two descriptions, weights
    with pytest.raises(ValueError, match="out is there already"):
        apply.export(text_bundle, f"{root}/out", "hugging-face", True)


def test_the_command_writes_a_folder_that_transformers_opens(text_bundle, tmp_path):
    import transformers

    said = CliRunner().invoke(cli.app, ["export", text_bundle, str(tmp_path / "out"), "--kind", "hugging-face"])
    assert said.exit_code == 0 and "BertForMaskedLM with " in said.output
    fill = transformers.pipeline("fill-mask", model=str(tmp_path / "out"), device="cpu")
    assert fill(f"{sentences(1)[0][0][:20]} [MASK]")[0]["token_str"]
    assert CliRunner().invoke(cli.app, ["export", text_bundle, str(tmp_path / "out"), "--kind", "hugging-face"]).exit_code == 2
    told = CliRunner().invoke(cli.app, ["export", "--help"], env={"COLUMNS": "200"}).output
    assert all(kind in told for kind in ("bundle:", "hugging-face:", "state-dict:"))
