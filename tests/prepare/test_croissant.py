"""What is written of a prepared folder for others, and that our readers pass over it."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from prepare.conftest import prepare

from pipeline.config.schema import Data
from pipeline.data import manifests
from pipeline.prepare.engine import croissant

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("label", pa.int64()),
        ("score", pa.float32()),
        ("tags", pa.list_(pa.string())),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
    ]
)


def test_columns_are_described_with_their_types():
    files = {"train-0.parquet": {"sha256": "ab", "size": 12}}
    found = croissant.describe("my data", "images", {"train": 3, "test": 1}, SCHEMA, files)
    (records,) = found["recordSet"]
    kinds = {one["name"]: (one["dataType"], one.get("repeated", False)) for one in records["field"]}
    assert kinds == {
        "id": ("sc:Text", False),
        "image": ("sc:ImageObject", False),
        "label": ("sc:Integer", False),
        "score": ("sc:Float", False),
        "tags": ("sc:Text", True),
    }
    assert (
        "boxes" in found["description"] and "4 rows (3 of train, 1 of test)" in found["description"]
    )
    assert (
        found["conformsTo"] == "http://mlcommons.org/croissant/1.0" and found["name"] == "my_data"
    )


def test_a_prepared_folder_has_both_and_is_read_as_before(tmp_path):
    source = tmp_path / "people.csv"
    rows = "".join(f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(40))
    source.write_text("text,stars\n" + rows)
    output = tmp_path / "prepared"
    prepare("csv", source, output)
    found = json.loads((output / "_croissant.json").read_text())
    parts = sorted(path.name for path in output.glob("*.parquet"))
    listed = {one["name"]: one for one in found["distribution"] if one["@type"] == "cr:FileObject"}
    assert sorted(listed) == parts
    for name, one in listed.items():
        content = (output / name).read_bytes()
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert one["contentSize"] == f"{len(content)} B"
    card = DatasetCard((output / "_card.md").read_text())
    assert card.data.size_categories == ["n<1K"] and "| `stars` | string |" in card.text
    for name in ("_croissant.json", "_card.md"):
        text = (output / name).read_text()
        assert str(tmp_path) not in text and "text 7" not in text
    manifest = json.loads((output / "_manifest.json").read_text())
    assert sorted(manifest["files"]) == parts
    assert sum(pq.read_metadata(output / name).num_rows for name in parts) == 40
    data = Data.model_validate(
        {"uri": str(output), "modality": "text", "columns": {"text": "text"}}
    )
    splits = manifests.splits(data, ("text",), "sources.a", str(tmp_path / "imports"), False)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 40
    mlcroissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")
    data = mlcroissant.Dataset(jsonld=str(output / "_croissant.json"))
    assert len(list(data.records("rows"))) == 40
