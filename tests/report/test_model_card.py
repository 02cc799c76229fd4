"""Model cards: what hubs read of them, and that they name no row, secret or place."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hub_server import hub_server
from huggingface_hub import ModelCard
from toys import task_of

from pipeline.checkpoints import bundle
from pipeline.core.specs import ModalitySpec
from pipeline.io import places
from pipeline.report import model_card, results, trial_folder
from pipeline.transfer import publishing
from tests.report.test_report import trial

MODALITY = ModalitySpec("image", {"size": 32, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})


@pytest.fixture(scope="module")
def task():
    names = ["patient-17", "patient-23"]
    state = {"values": [0, 1], "labels": names}
    return task_of("timm/test_vit", {"channels": 3, "size": 32}, "classification", state, seed=0)


@pytest.fixture
def job(tmp_path, task):
    """The folder of a job with one trial, its bundle and results; (bundle, rows)."""
    root = tmp_path / "secret place" / "toy"
    rows, _, _ = trial("clothing", "garments", "full", "1.0", 0, 0.8)
    one = "3f2a9c0b71de"
    folder = f"trials/clothing/garments/full/labels-1.0/seed0-{one}"
    rows = [replace(row, trial_id=one, trial_folder=folder) for row in rows]
    uri = str(root / folder / "bundle")
    parent = f"bundle:{root}/sources/garments-1/bundle"
    training = {"trial": "a|b", "seed": 0, "init": f"{root}/start.pt"}
    bundle.save(
        uri,
        task,
        MODALITY,
        spec_hash=one,
        parent=parent,
        training=training,
        columns={"image": "photo", "label": "label"},
    )
    made = datetime(2025, 6, 1, tzinfo=UTC)
    known = {"bundle_uri": uri, "current": True, "value_low": 0.7, "value_high": 0.9}
    rows = [replace(row, **known, started_at=made, gain=0.1) for row in rows]
    groups = [
        replace(rows[0], metric=f"accuracy@{name}", n_eval=count)
        for name, count in (("sex=f", 40), ("patient=17", 3))
    ]
    split_origin = f"column split of {root}/rows.parquet"
    rows = [replace(row, split_origin=split_origin) for row in (*rows, *groups)]
    results.append(str(root), rows, current={one})
    return uri, rows


def test_hubs_read_the_header(job):
    uri, rows = job
    card = ModelCard(model_card.model_card(uri, "apache-2.0"))
    assert card.data.license == "apache-2.0" and card.data.library_name == "timm"
    assert card.data.pipeline_tag == "image-classification"
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found.keys() == {"accuracy", "loss"}
    assert found["accuracy"].metric_value == pytest.approx(rows[0].value, abs=1e-6)
    assert found["accuracy"].metric_name == "accuracy (95 % interval 0.7 to 0.9)"
    assert found["accuracy"].dataset_name == "clothing"
    assert card.data.model_name == "clothing: timm/test_vit, full"


def test_a_small_number_keeps_its_digits(job):
    """An error in metres may be 3.2e-7."""
    uri, rows = job
    small = replace(rows[0], metric="rmse", value=3.2154321e-7)
    folder = trial_folder.split_bundle(uri)
    assert folder is not None
    results.append(folder[0], [*rows, small])
    (found,) = (
        one
        for one in ModelCard(model_card.model_card(uri)).data.eval_results
        if one.metric_type == "rmse"
    )
    assert found.metric_value == pytest.approx(3.21543e-7, rel=1e-9)


def test_people_read_intervals_subgroups_cost_and_limits(job):
    text = model_card.model_card(job[0])
    accuracy = next(line for line in text.splitlines() if line.startswith("| accuracy |"))
    assert "0.7 to 0.9" in accuracy and "+0.1" in accuracy and "| 400 |" in accuracy
    assert "| accuracy@sex=f |" in text and "41.0 s on cpu" in text and "| 300 |" in text
    assert "Licence of the weights: unknown" in text and "## Limits" in text
    assert "lr 0.001" in text and "ab12cd3" in text and "| steps |" in text
    assert "| seed | 0 |" in text


def test_a_head_that_was_solved_has_iterations_and_no_steps(job, monkeypatch):
    uri, rows = job
    settings = json.dumps({"solver": "lbfgs", "iterations": 57, "steps": None})
    solved = replace(rows[0], hyper_parameters=settings, steps=57)
    monkeypatch.setattr(model_card, "rows_of_bundle", lambda uri, manifest: [solved])
    text = model_card.model_card(uri)
    assert "iterations 57" in text and "| steps |" not in text


def test_no_person_and_no_place_is_named(job, tmp_path):
    text = model_card.model_card(job[0])
    assert "patient" not in text, "labels, and subgroups of few rows"
    assert str(tmp_path) not in text and "rows.parquet" in text


def test_a_label_that_is_named_with_an_at_sign_is_no_subgroup(job):
    uri, rows = job
    root, _ = trial_folder.split_bundle(uri)
    results.append(root, [*rows, replace(rows[0], metric="f1/me@home.org")])
    assert "me@home.org" not in model_card.model_card(uri)


def test_a_bundle_of_no_trial_has_its_validation_metrics(task, tmp_path):
    uri = str(tmp_path / "bundle")
    training = {"rows": 900, "seconds": 12.0, "device": "cpu", "steps": 60}
    bundle.save(uri, task, MODALITY, metrics={"accuracy": 0.875}, training=training)
    text = model_card.model_card(uri)
    assert "| accuracy | 0.875 |" in text and "| 900 |" in text and "12.0 s on cpu" in text
    assert "It was not tested on rows" in text and ModelCard(text).data.eval_results is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("see /data/x/y.parquet and s3://bucket/key/v", "see y.parquet and v"),
        ("timm/resnet18, 5 rows/s, and/or", "timm/resnet18, 5 rows/s, and/or"),
        ("bundle:/runs/toy/bundle", "bundle:bundle"),
        ("~/models/a.pt", "a.pt"),
        ("bundle:https://host/a/b.pt?X-Amz-Signature=5/e, 3", "bundle:b.pt, 3"),
        ("from https://user:p@ss@host and more", "from host and more"),
    ],
)
def test_places_are_cut_to_their_last_part(text, wanted):
    assert places.without_places(text) == wanted


# ---------------------------------------------------------------- push


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_bundle_can_be_read_and_names_no_place(job, tmp_path):
    uri, _ = job
    to = tmp_path / "pushed"
    said = publishing.push(uri, str(to), "cc-by-4.0")
    assert said == f"{to}: 3 files"
    assert files(to) == {"README.md", "manifest.json", "weights.safetensors"}
    found = bundle.load(str(to))
    before = bundle.load(uri)
    assert found.tensors.keys() == before.tensors.keys()
    assert found.manifest.modality == before.manifest.modality
    for path in to.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert ModelCard.load(to / "README.md").data.license == "cc-by-4.0"


def test_a_pushed_export_has_the_card_of_its_bundle(job, tmp_path):
    from pipeline import api

    uri, _ = job
    exported, to = tmp_path / "exported", tmp_path / "pushed"
    api.export(uri, str(exported), kind="hugging-face")
    card = (exported / "README.md").read_text()
    assert card == model_card.model_card(uri, files=["classifier.py"])
    assert "from classifier import load" in card and "onetomany predict" not in card
    written = files(exported)
    (exported / "notes.txt").write_text("mine")
    publishing.push(str(exported), str(to), "apache-2.0")
    assert files(to) == written, "what is not of the export stays here"
    assert ModelCard.load(to / "README.md").data.license == "apache-2.0"
    for path in to.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


@pytest.mark.parametrize("kind", ["hugging-face", "bundle"])
def test_an_export_keeps_its_card_where_its_bundle_is_gone(kind, job, tmp_path):
    """The folder was copied from another machine, or the job is deleted."""
    from pipeline import api

    uri, _ = job
    exported = tmp_path / "exported"
    api.export(uri, str(exported), kind=kind)
    for path in exported.iterdir() if kind != "bundle" else ():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    publishing.push(str(exported), str(tmp_path / "before"), "apache-2.0")
    shutil.rmtree(uri)
    publishing.push(str(exported), str(tmp_path / "after"), "apache-2.0")
    publishing.push(str(exported), str(tmp_path / "unknown"))
    before, after, unknown = (
        ModelCard.load(tmp_path / name / "README.md") for name in ("before", "after", "unknown")
    )
    assert after.data.to_dict() == before.data.to_dict() and after.text == before.text
    assert len(after.data.eval_results) == 2, "the metrics of the job"
    assert after.data.license == "apache-2.0" and "of the weights: apache-2.0." in after.text
    assert unknown.data.license == "unknown" and "of the weights: unknown." in unknown.text


def test_an_export_without_card_is_not_pushed(job, tmp_path):
    from pipeline import api

    uri, _ = job
    exported = tmp_path / "exported"
    api.export(uri, str(exported), kind="hugging-face")
    (exported / "README.md").unlink()
    with pytest.raises(ValueError, match=r"its model card README\.md is gone: export the "):
        publishing.push(str(exported), str(tmp_path / "to"))


def test_a_page_of_somebody_else_is_not_published(job, tmp_path):
    """Notes beside a bundle may not be for others."""
    uri, _ = job
    (Path(uri) / "README.md").write_text("---\ntags:\n- mine\n---\nthe ward of patient 17\n")
    publishing.push(uri, str(tmp_path / "pushed"), "cc-by-4.0")
    text = (tmp_path / "pushed/README.md").read_text()
    assert "patient 17" not in text and model_card.is_card(text)


def test_what_cannot_be_pushed_is_refused(job, tmp_path):
    uri, _ = job
    for repository in ("hf-hub:name", "hf:name", "hf-hub:me/", "hf-hub:", "hf://me/clothes"):
        with pytest.raises(ValueError, match="a repository is hf-hub:USER/NAME"):
            publishing.push(uri, repository)
    with pytest.raises(ValueError, match="no bundle"):
        publishing.push(str(tmp_path), str(tmp_path / "to"))
    with pytest.raises(ValueError, match="is there already"):
        publishing.push(uri, str(Path(uri).parent))


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf:"])
def test_a_repository_gets_the_folder_in_one_commit(job, hub, prefix):
    uri, _ = job
    said = publishing.push(uri, f"{prefix}me/clothes", private=True)
    assert said == f"http://127.0.0.1:{hub.server_port}/me/clothes: 3 files"
    created = {"name": "clothes", "organization": "me", "visibility": "private"}
    assert hub.seen["created"] == created
    sent = hub.seen["files"]
    assert sent.keys() == {"README.md", "manifest.json", "weights.safetensors"}
    assert ModelCard(sent["README.md"].decode()).data.library_name == "timm"
    assert hub.seen["token"] == "Bearer hf_for_this_test"


def test_a_hub_that_refuses_is_an_error_without_the_token(job, hub):
    hub.refuses = True
    with pytest.raises(ValueError, match=r"the hub did not take it \(.*403") as error:
        publishing.push(job[0], "hf-hub:me/clothes")
    assert "hf_for_this_test" not in str(error.value)


def test_a_backbone_of_any_family_is_one_of_transformers(tmp_path):
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    state = {"values": [0, 1], "labels": ["a", "b"]}
    inputs = {"channels": 3, "size": 32}
    made = task_of("hf/vit", inputs, "classification", state, config=config)
    bundle.save(str(tmp_path / "b"), made, MODALITY)
    card = ModelCard(model_card.model_card(str(tmp_path / "b")))
    assert card.data.library_name == "transformers"
