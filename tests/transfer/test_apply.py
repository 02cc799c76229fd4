"""Predictions on files: one line a row, whatever cannot be read, and parts that can be read as one table."""

import io

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import label_state, task_of

from pipeline import bundle, registry
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
