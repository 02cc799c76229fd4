"""Predictions and features as files that other programs read: Parquet, CSV, JSON Lines, pictures."""

import base64
import csv
import io
import json
from datetime import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask
from stage_runs import without_ray
from toys import SMALL, label_state, table_rows, task_of, text_modality
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.checkpoints import bundle
from pipeline.core.specs import ModalitySpec
from pipeline.transfer import prediction_files

CLASSES = ["a, b", "ü"]
ROWS = pa.table(
    {
        "row": [0, 1],
        "prediction": ['say "a, b"\nand\u2028more', None],
        "probability": pa.array([0.1, np.nan], pa.float32()),
        "probabilities": pa.array([[0.1, 0.9], [np.nan, np.nan]], pa.list_(pa.float32())),
        "mask": [b"\x89PNG", None],
        "boxes": pa.array([[[0.5, 1.0]], []], pa.list_(pa.list_(pa.float64()))),
        "words": [[{"word": "x", "start": float("inf")}], None],
        "seen": [datetime(2024, 5, 1, 12), None],
        "is_new": [True, None],
    }
)


def test_json_lines_hold_what_parquet_holds():
    found = prediction_files.encode(ROWS, "jsonl", CLASSES)
    first, second = map(json.loads, found.decode().split("\n")[:-1])
    assert first == {
        "row": 0,
        "prediction": 'say "a, b"\nand\u2028more',
        "probability": 0.1,
        "probabilities": {"a, b": 0.1, "ü": 0.9},
        "mask": base64.b64encode(b"\x89PNG").decode(),
        "boxes": [[0.5, 1.0]],
        "words": [{"word": "x", "start": None}],
        "seen": "2024-05-01T12:00:00",
        "is_new": True,
    }
    assert second == {**dict.fromkeys(first), "row": 1, "boxes": []}
    table = pa.json.read_json(io.BytesIO(found))
    assert table.num_rows == 2 and table.column_names == ROWS.column_names


def test_csv_has_a_cell_for_each_value():
    found = prediction_files.encode(ROWS, "csv", CLASSES)
    first, second = csv.DictReader(io.StringIO(found.decode(), newline=""))
    assert first["prediction"] == 'say "a, b"\nand\u2028more' and first["probability"] == "0.1"
    assert json.loads(first["probabilities"]) == {"a, b": 0.1, "ü": 0.9}
    assert json.loads(first["boxes"]) == [[0.5, 1.0]] and first["is_new"] == "true"
    assert first["seen"] == "2024-05-01T12:00:00"
    assert second == {**dict.fromkeys(first, ""), "row": "1", "boxes": "[]"}
    options = pa.csv.ParseOptions(newlines_in_values=True)
    table = pa.csv.read_csv(io.BytesIO(found), parse_options=options)
    assert table["probability"].to_pylist() == [0.1, None] and table.num_rows == 2


@pytest.mark.parametrize("break_", ["\r", "\n", "\r\n"])
def test_a_line_break_in_a_cell_ends_no_row_of_a_csv_file(break_):
    """A lone carriage return too, which csv of Python before 3.13 does not quote by itself."""
    table = pa.table({"text": [f"a{break_}b", "c"], "row": [0, 1]})
    found = prediction_files.encode(table, "csv").decode()
    assert found == f'text,row\n"a{break_}b",0\nc,1\n'
    assert pd.read_csv(io.StringIO(found, newline=""))["row"].tolist() == [0, 1]


def test_a_decimal_keeps_its_digits_as_a_text():
    table = pa.table({"price": pa.array([Decimal("0.10")], pa.decimal128(5, 2))})
    assert prediction_files.encode(table, "jsonl").decode() == '{"price": "0.10"}\n'
    assert prediction_files.encode(table, "csv").decode() == "price\n0.10\n"


@pytest.mark.slow
def test_a_cell_of_any_length_is_read(tmp_path):
    long = "x" * (csv.field_size_limit() + 1)
    part = str(tmp_path / "part-00000.csv")
    with open(part, "wb") as file:
        file.write(prediction_files.encode(pa.table({"row": [0], "audio": [long]}), "csv"))
    before = csv.field_size_limit()
    assert prediction_files.read(part, ("row",)) == [{"row": "0"}]
    assert csv.field_size_limit() == before, "it is one of the whole process"


def test_features_of_a_row_that_cannot_be_read_are_null():
    features = pa.array([[np.nan, np.nan], [0.5, np.nan], []], pa.list_(pa.float32()))
    found = prediction_files.encode(pa.table({"features": features}), "jsonl").decode()
    assert [json.loads(line)["features"] for line in found.splitlines()] == [None, [0.5, None], []]


def test_lists_that_are_of_no_classes_stay_lists():
    table = pa.table({"probabilities": [[[0.5, 0.5]], [[0.25, 0.75], [1.0, 0.0]]]})
    found = prediction_files.encode(table, "jsonl", CLASSES).decode().splitlines()
    assert json.loads(found[0]) == {"probabilities": [[0.5, 0.5]]}
    assert json.loads(found[1]) == {"probabilities": [[0.25, 0.75], [1.0, 0.0]]}


def test_bytes_that_are_no_utf8_stop_no_file():
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    table = pa.table({"text": text})
    assert prediction_files.encode(table, "jsonl").decode() == '{"text": "caf\ufffd"}\n'


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_subtitles_are_made_of_any_format_and_lie_apart(format, tmp_path):
    words = pa.array([[{"word": "HI", "start": 1.0, "end": 2.0}], []])
    table = pa.table(
        {"row": [0, 1], "recording": ["a.wav", "b.wav"], "start": [np.nan, 2.0], "words": words}
    )
    part = str(tmp_path / f"part-00000.{format}")
    with open(part, "wb") as file:
        file.write(prediction_files.encode(table, format))
    assert prediction_files.write_subtitles(str(tmp_path), [part]) == 2
    written = (tmp_path / "_subtitles" / "a.srt").read_text()
    assert written == "1\n00:00:01,000 --> 00:00:02,000\nHI\n\n"
    if format != "jsonl":  # pyarrow.dataset has no such format for folders
        assert pa.dataset.dataset(str(tmp_path), format=format).to_table().num_rows == 2


# ---------------------------------------------------------------- the commands


def image_bundle(folder, name: str, options, state) -> str:
    task = task_of("timm/test_resnet", {"channels": 3, "size": 64}, name, state, options=options)
    modality = ModalitySpec(
        "image", {"size": 64, "fit": "pad"}, {"mean": [0.5] * 3, "std": [0.2] * 3}
    )
    bundle.save(str(folder / name), task, modality, columns={"image": "image"})
    return str(folder / name)


def photos(folder):
    (folder / "photos" / "trip").mkdir(parents=True)
    for name, seed in (("trip/a.png", 0), ("b.png", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "photos" / name)
    (folder / "photos" / "c.png").write_bytes(b"no image")
    return folder / "photos"


def ran(*words) -> str:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_predictions_as_csv_name_file_class_and_probability(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    uri = image_bundle(tmp_path, "classification", {}, label_state())
    said = ran("predict", uri, photos(tmp_path), "-o", tmp_path / "out", "--format", "csv")
    assert "of the classes, in this order" not in said, "each has its name in its cell"
    with open(tmp_path / "out" / "part-00000.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"].removeprefix(str(tmp_path)) for row in rows] == [
        "/photos/b.png",
        "/photos/c.png",
        "/photos/trip/a.png",
    ]
    assert rows[1]["error"] and not rows[1]["prediction"] and not rows[1]["probability"]
    for row in (rows[0], rows[2]):
        of_classes = json.loads(row["probabilities"])
        assert list(of_classes) == ["class 0", "class 1", "class 2"]
        assert of_classes[row["prediction"]] == float(row["probability"])
        assert float(row["probability"]) == max(of_classes.values())
    words = ["predict", uri, tmp_path / "photos", "-o", tmp_path / "out"]
    other = CliRunner().invoke(cli.app, list(map(str, words)))
    assert other.exit_code == 2 and "with other options (--keep, --format" in other.output
    assert not (tmp_path / "out" / ".imports").exists()
    unknown = ["predict", uri, str(tmp_path / "photos"), "-o", str(tmp_path / "no")]
    refused = CliRunner().invoke(cli.app, [*unknown, "--column", "recording=name"])
    assert refused.exit_code == 2 and "--column recording: no such role" in refused.output
    assert not list(tmp_path.glob("no/.imports")), "no copy of the rows stays"
    wrong = CliRunner().invoke(cli.app, [*map(str, words), "--format", "xlsx"])
    assert wrong.exit_code == 2 and "parquet" in wrong.output and "jsonl" in wrong.output


@pytest.mark.parametrize("name", ["detection", "segmentation", "instance_segmentation"])
def test_pictures_are_drawn_beside_the_predictions(name, tmp_path, monkeypatch):
    """They lie in a folder that pyarrow passes over, and a column names each."""
    without_ray(monkeypatch)
    options = {
        "detection": {"channels": 64, "convs": 1, "score_threshold": 0.0},
        "segmentation": {"classes": 3},
        "instance_segmentation": {"channels": 64, "mask_convs": 1, "score_threshold": 0.0},
    }[name]
    boxes = {
        "values": [0, 1],
        "labels": ["cat", "dog"],
        "box_format": "xyxy",
        "relative": True,
        "max_boxes": 10,
    }
    state = {
        "detection": boxes,
        "instance_segmentation": boxes,
        "segmentation": {"labels": ["a", "b", "c"], "ignore": 255},
    }[name]
    uri = image_bundle(tmp_path, name, options, state)
    said = ran("predict", uri, photos(tmp_path), "-o", tmp_path / "out", "--draw")
    assert f"pictures in {tmp_path / 'out' / '_drawn'}" in said.replace("\n", "")
    found = pq.read_table(tmp_path / "out")  # the folder is one data set
    assert found["drawn"].to_pylist() == ["_drawn/000000-b.jpg", None, "_drawn/000002-a.jpg"]
    for place in found["drawn"].drop_null().to_pylist():
        with PIL.Image.open(tmp_path / "out" / place) as image:
            assert image.width == 480 and image.height >= 240, "24 x 48, ten times as large"
    if name == "instance_segmentation":
        first, _, _ = found.to_pylist()
        sizes = {tuple(coco_mask.decode(rle).shape) for rle in first["masks"]}
        assert len(first["masks"]) == len(first["boxes"]) > 0 and sizes == {(24, 48)}
    if name == "segmentation":
        with PIL.Image.open(tmp_path / "out" / "_drawn/000000-b.jpg") as image:
            assert image.height > 240, "the key of the colours"


def test_detections_are_drawn_where_they_are(tmp_path):
    state = {
        "values": [0, 1],
        "labels": ["cat", "dog"],
        "box_format": "xyxy",
        "relative": True,
        "max_boxes": 10,
    }
    options = {"channels": 64, "convs": 1}
    task = task_of(
        "timm/test_resnet", {"channels": 3, "size": 64}, "detection", state, options=options
    )
    picture = np.full((500, 500, 3), 100, dtype=np.uint8)
    columns = {
        "boxes": [[0.2, 0.4, 0.8, 0.8], [0.1, 0.1, 0.3, 0.3]],
        "scores": [0.9, 0.05],
        "labels": ["dog", "cat"],
    }
    drawn = task.objective.draw(picture, columns)
    changed = (drawn != picture).any(-1)
    assert changed[300, 100] and changed[400, 250] and not changed[300, 250]
    assert not changed[:150, :].any(), "a box that is hardly sure is not drawn"
    empty = task.objective.draw(picture, {"boxes": [], "scores": [], "labels": []})
    assert (empty == picture).all()


def test_what_finds_no_boxes_draws_nothing(tmp_path):
    uri = image_bundle(tmp_path, "classification", {}, label_state())
    words = ["predict", uri, "nowhere", "-o", str(tmp_path / "out"), "--draw"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 2 and "this bundle's classification finds none" in done.output
    assert not (tmp_path / "out").exists()


def test_texts_stand_beside_their_predictions(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    modality = text_modality()
    task = task_of("transformers/bert", modality.inputs(), "classification", label_state(), **SMALL)
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    uri = str(tmp_path / "text")
    bundle.save(uri, task, spec, columns={"text": "review"})
    texts = ["the film was good", None, "a “play”", "cat " * 40]
    pq.write_table(pa.table({"review": texts, "stars": [1, 2, 3, 4]}), tmp_path / "rows.parquet")
    words = ("-o", tmp_path / "out", "--format", "jsonl", "--keep", "stars")
    said = " ".join(ran("predict", uri, tmp_path / "rows.parquet", *words).split())
    assert "texts are cut at length 32, and what lies beyond is never read: new rows" in said
    assert "tokens, in 1 of 4 rows)" in said
    lines = (tmp_path / "out" / "part-00000.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["review"] for row in rows] == texts
    assert [row["stars"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["prediction"] in label_state()["labels"]


def test_predict_says_what_the_network_knows_of_the_rows(tmp_path, monkeypatch):
    """A renamed column was read as missing in every row, without a word."""
    without_ray(monkeypatch)
    modality = table_rows(8).modality
    task = task_of("table/ft_transformer", modality.inputs(), "classification", label_state())
    spec = ModalitySpec("table", modality.options.model_dump(), modality.state)
    uri = str(tmp_path / "table")
    bundle.save(uri, task, spec, columns={"features": "features"})
    rows = [{"age": 50.0, "Gender": "m"}, {"age": 60.0, "Gender": "male"}]
    pq.write_table(pa.table({"features": rows}), tmp_path / "rows.parquet")
    said = ran("predict", uri, tmp_path / "rows.parquet", "-o", tmp_path / "out")
    assert (
        "compared with the training rows: numbers of features left out: age; not there: Age; 1 of 2 "
        "texts of features are unknown"
    ) in " ".join(said.split())


def test_embed_writes_the_features_of_each_row(tmp_path, monkeypatch):
    """The same numbers as the function for notebooks, with file and what is kept."""
    without_ray(monkeypatch)
    uri = image_bundle(tmp_path, "classification", {}, label_state())
    said = ran("embed", uri, photos(tmp_path), "-o", tmp_path / "out")
    assert "3 rows in part-00000.parquet" in said and "1 row could not be read" in said
    found = pq.read_table(tmp_path / "out")
    assert found.column_names == ["row", "file", "error", "features"]
    assert found.schema.field("features").type == pa.list_(pa.float32())
    features = np.array(found["features"].to_pylist(), dtype=np.float32)
    again = ran("embed", uri, tmp_path / "photos", "-o", tmp_path / "out")
    assert "(1 file from an earlier run)" in again and "1 row could not be read" in again
    assert not (tmp_path / "out" / ".imports").exists()  # it has all columns of the rows
    expected = pipeline.embed(uri, str(tmp_path / "photos"))
    assert np.isnan(features[1]).all() and np.isfinite(features[[0, 2]]).all()
    assert np.array_equal(features, expected, equal_nan=True)
    task = bundle.load(uri).task()
    assert features.shape == (3, task.backbone.pooled_dim)
    other = CliRunner().invoke(
        cli.app, ["predict", uri, str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    )
    assert other.exit_code == 2 and "holds the output of another bundle" in other.output


def test_a_backbone_without_a_head_has_features_too(tmp_path, monkeypatch):
    without_ray(monkeypatch)
    modality = text_modality()
    task = task_of("transformers/bert", modality.inputs(), "mlm", **SMALL)
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    bundle.save(str(tmp_path / "mlm"), task, spec, columns={"text": "text"})
    (tmp_path / "new.txt").write_text("the old film\na new play\n")
    words = ("-o", tmp_path / "out", "--format", "csv")
    said = ran("embed", tmp_path / "mlm", tmp_path / "new.txt", *words)
    assert "texts are cut" not in said
    with open(tmp_path / "out" / "part-00000.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["the old film", "a new play"]
    assert len(json.loads(rows[0]["features"])) == task.backbone.pooled_dim
