"""Data sets of Hugging Face: what was put into one stands in the prepared rows."""

import io
import sys

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from prepare.conftest import encoded, read, write
from toys import image_file

from pipeline.config.schema import Data
from pipeline.data import manifests
from pipeline.io import file_identity
from pipeline.media import audio_io
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.write import Preparation, Settings

datasets = pytest.importorskip("datasets")
ROWS = {"train": 20, "test": 5}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and nothing from the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def prepare(source, output, *pairs, **settings):
    preparation = Preparation(
        "hf",
        str(source),
        str(output),
        importing.options_of("hf", list(pairs)),
        Settings(**settings),
    )
    return preparation.run(), sorted(read(output), key=lambda row: (row["split"], row["n"]))


def cells(count):
    """Columns of every kind, the image last: row n has the picture `encoded(n)`."""
    return {
        "n": list(range(count)),
        "label": [n % 2 if n else -1 for n in range(count)],
        "scores": [[n / 2] * (n % 3) for n in range(count)],
        "objects": [
            {"bbox": [[0.0, 0.0, 1.0, n]] * (n % 3), "category": [n % 2] * (n % 3)}
            for n in range(count)
        ],
        "grid": [[[n, 1], [2, 3]] for n in range(count)],
        "split": ["theirs"] * count,
        "image": [{"bytes": encoded(n), "path": None} for n in range(count)],
    }


def features(**more):
    number = datasets.Value("float32")
    return datasets.Features(
        {
            "n": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "scores": datasets.Sequence(number),
            "objects": {
                "bbox": datasets.Sequence(datasets.Sequence(number, length=4)),
                "category": datasets.Sequence(datasets.ClassLabel(names=["a", "b"])),
            },
            "grid": datasets.Array2D((2, 2), "float32"),
            "split": datasets.Value("string"),
            "image": datasets.Image(),
        }
        | more
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same data set in a folder of save_to_disk, and as Parquet files."""
    root = tmp_path_factory.mktemp("hf")
    made = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(cells(count), features=features())
            for name, count in ROWS.items()
        }
    )
    made.save_to_disk(str(root / "saved"))
    (root / "files").mkdir()
    for name, one in made.items():
        one.to_parquet(str(root / "files" / f"{name}.parquet"))
    return root


@pytest.mark.parametrize(
    ("folder", "pairs"),
    [("saved", ()), ("files", ()), ("files", ("streaming=true",))],
    ids=["saved to disk", "files", "streamed"],
)
def test_every_row_and_kind_of_column(saved, tmp_path, folder, pairs):
    manifest, rows = prepare(saved / folder, tmp_path / "out", *pairs)
    assert manifest["rows"] == ROWS and len(rows) == sum(ROWS.values())
    assert manifest["about"]["classes"] == {"label": ["cat", "dog"]}
    for row in rows:
        n, count = row["n"], row["n"] % 3
        assert row["label"] == (("cat", "dog")[n % 2] if n else None)
        assert row["scores"] == [n / 2] * count and row["grid"] == [[n, 1], [2, 3]]
        assert row["objects_bbox"] == [[0, 0, 1, n]] * count
        assert row["objects_category"] == ["ab"[n % 2]] * count
        assert row["dataset_split"] == "theirs" and row["split"] in ROWS
        assert row["image"] == encoded(n) and (row["width"], row["height"]) == (40, 30)
    assert len({row["path"] for row in rows}) == len(rows)
    again = prepare(saved / folder, tmp_path / "out", *pairs)
    assert again == (manifest, rows), "a run that is complete does nothing"


def test_a_job_reads_it(saved, tmp_path):
    prepare(saved / "saved", tmp_path / "out")
    data = Data(
        uri=str(tmp_path / "out"),
        split_column="split",
        modality={"name": "image"},
        columns={"image": "image", "label": "label"},
    )
    manifest = manifests.build(data.uri, "auto", str(tmp_path))
    assert manifest.num_rows == 25 and {"image", "label", "objects_bbox"} <= set(
        manifest.schema.names
    )


def test_parts_are_the_same_whoever_writes_them_and_mixed(saved, tmp_path):
    for name in ("one", "two"):
        prepare(saved / "saved", tmp_path / name, rows_per_part=7)
    parts = sorted(path.name for path in (tmp_path / "one").glob("*.parquet"))
    assert parts == [
        "test-00000-of-00001.parquet",
        *(f"train-0000{part}-of-00003.parquet" for part in range(3)),
    ]
    for part in parts:
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    first = pq.read_table(tmp_path / "one" / parts[1])["n"].to_pylist()
    assert max(first) > 7 and first != sorted(first)


def test_images_are_resized_and_broken_ones_left_out(tmp_path):
    made = cells(5)
    made["image"][2] = {"bytes": b"no image", "path": None}
    made["image"][4] = {"bytes": None, "path": str(write(tmp_path / "a.jpg", encoded(4)))}
    datasets.Dataset.from_dict(made, features=features()).save_to_disk(str(tmp_path / "saved"))
    manifest, rows = prepare(tmp_path / "saved", tmp_path / "out", resize=16)
    assert manifest["broken"] == 1 and [row["n"] for row in rows] == [0, 1, 3, 4]
    for row in rows:
        with PIL.Image.open(io.BytesIO(row["image"])) as image:
            assert min(image.size) == 16 == min(row["width"], row["height"])
    with pytest.raises(ValueError, match=r"1 of 5 rows are broken.*train/2: not a JPEG"):
        prepare(tmp_path / "saved", tmp_path / "strict", max_bad=0)


def test_scans_of_12_bits_that_resize_makes_nearly_black_are_reported(tmp_path):
    made = cells(5)
    scan = np.linspace(0, 4095, 40 * 40).reshape(40, 40).astype(np.uint16)
    made["image"][2] = {"bytes": image_file(scan), "path": None}
    datasets.Dataset.from_dict(made, features=features()).save_to_disk(str(tmp_path / "saved"))
    manifest, _ = prepare(tmp_path / "saved", tmp_path / "out", resize=16)
    assert "written with 8 bits: train 1; they are" in manifest["warnings"][0]


def test_a_changed_image_that_is_named_by_its_path_is_noticed(tmp_path):
    root = tmp_path / "pictures"
    write(root / "metadata.csv", "file_name,n\na.jpg,0\nb.jpg,1\n")
    for n, name in enumerate(("a", "b")):
        write(root / f"{name}.jpg", encoded(n))
    manifest, rows = prepare(root, tmp_path / "out")
    assert [row["image"] for row in rows] == [encoded(0), encoded(1)]
    assert prepare(root, tmp_path / "out")[0] == manifest
    write(root / "a.jpg", encoded(5))
    with pytest.raises(ValueError, match="another source"):
        prepare(root, tmp_path / "out")
    _, rows = prepare(root, tmp_path / "new")
    assert [row["image"] for row in rows] == [encoded(5), encoded(1)]


def test_an_image_that_is_replaced_while_rows_are_written_is_an_error(tmp_path):
    root = tmp_path / "pictures"
    write(root / "metadata.csv", "file_name,n\na.jpg,0\nb.jpg,1\n")
    for n, name in enumerate(("a", "b")):
        write(root / f"{name}.jpg", encoded(n))
    preparation = Preparation("hf", str(root), str(tmp_path / "out"))
    write(root / "a.jpg", encoded(5))
    with pytest.raises(file_identity.ChangedFileError, match=r"a\.jpg was changed"):
        preparation.run()
    assert not (tmp_path / "out" / "_manifest.json").exists()
    with pytest.raises(ValueError, match="another source"):
        prepare(root, tmp_path / "out")


def test_two_columns_of_one_name_are_refused(tmp_path):
    made = {"n": [0], "objects": [{"bbox": [1.0]}], "objects_bbox": [[2.0]]}
    datasets.Dataset.from_dict(made).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="two of its columns would be called objects_bbox"):
        prepare(tmp_path / "saved", tmp_path / "out")


def test_recordings(tmp_path):
    wave = (np.sin(np.arange(8000) / 20) * 8000).astype(np.int16)
    made = {
        "n": [0, 1],
        "audio": [{"bytes": audio_io.encode(wave, 16_000), "path": None}] * 2,
        "text": ["one", "two"],
    }
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    kinds = {"n": datasets.Value("int64"), "audio": file, "text": datasets.Value("string")}
    plain = datasets.Dataset.from_dict(made, features=datasets.Features(kinds))
    sound = datasets.Features(kinds | {"audio": datasets.Audio(sampling_rate=8000)})
    plain.cast(sound).save_to_disk(str(tmp_path / "saved"))  # no encoder is needed
    _, rows = prepare(tmp_path / "saved", tmp_path / "out")
    assert [(row["text"], row["seconds"], row["rate"], row["channels"]) for row in rows] == [
        ("one", 0.5, 16_000, 1),
        ("two", 0.5, 16_000, 1),
    ]
    assert rows[0]["audio"] == made["audio"][0]["bytes"]


def test_splits_are_chosen_and_renamed(saved, tmp_path):
    made = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict({"n": [1, 2]})
            for name in ("train", "valid", "unsupervised")
        }
    )
    made.save_to_disk(str(tmp_path / "saved"))
    manifest, rows = prepare(tmp_path / "saved", tmp_path / "out")
    assert manifest["rows"] == {"train": 2, "unsupervised": 2, "validation": 2}
    assert set(rows[0]) == {"n", "split"}
    manifest, _ = prepare(tmp_path / "saved", tmp_path / "two", "splits=valid")
    assert manifest["rows"] == {"validation": 2}
    with pytest.raises(ValueError, match="no split 'validation'"):
        prepare(tmp_path / "saved", tmp_path / "three", "splits=validation")


def test_mistakes_are_named(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no streaming"):
        prepare(saved / "saved", tmp_path / "out", "streaming=true")
    with pytest.raises(ValueError, match="nobody/nothing: datasets cannot load it"):
        prepare("nobody/nothing", tmp_path / "out")
    with pytest.raises(ValueError, match=r"'n' is no column of images or recordings.*image"):
        prepare(saved / "saved", tmp_path / "out", "column=n")
    two = cells(2) | {"second": cells(2)["image"]}
    kinds = features(second=datasets.Image())
    datasets.Dataset.from_dict(two, features=kinds).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match=r"several columns have images.*column=NAME"):
        prepare(tmp_path / "two", tmp_path / "out")
    _, rows = prepare(tmp_path / "two", tmp_path / "out", "column=second")
    assert rows[1]["image"] == encoded(1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"uv pip install -e '\.\[datasets\]'"):
        prepare(saved / "saved", tmp_path / "none")
