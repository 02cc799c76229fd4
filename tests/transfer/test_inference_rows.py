"""What stands beside predictions (file, id, columns asked for, names of classes), and rows whose
columns have another type.
"""

import json
import os
import stat
from functools import partial

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import (
    SMALL,
    episodes,
    event_rows,
    label_state,
    table_rows,
    task_of,
    text_modality,
    trajectory_rows,
)
from typer.testing import CliRunner

from pipeline import cli
from pipeline.checkpoints import bundle, export
from pipeline.config import registry
from pipeline.core.specs import ModalitySpec
from pipeline.data import manifests
from pipeline.io import run_lock
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.modalities.image import Image, ImageOptions
from pipeline.train.progress import Progress
from pipeline.transfer import inference

PIXELS = ModalitySpec("image", {"size": 16, "channels": 1}, {"mean": [0.5], "std": [0.2]})


def image_bundle(folder) -> str:
    task = task_of("timm/test_resnet", {"channels": 1, "size": 16}, "classification", label_state())
    bundle.save(str(folder / "bundle"), task, PIXELS, columns={"image": "image", "label": "label"})
    return str(folder / "bundle")


def picture(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    ).save(path)


@pytest.mark.slow
@pytest.mark.ray
def test_predictions_of_a_folder_name_their_files_and_those_of_rows_keep_what_is_asked_for(
    ray_here, tmp_path
):
    """The way from a prediction to its file lay in a hidden folder."""
    uri = image_bundle(tmp_path)
    names = [f"ward/{letter}.png" for letter in "cab"]
    for seed, name in enumerate(names):
        picture(tmp_path / "photos" / name, seed)
    run = CliRunner()
    said = run.invoke(
        cli.app, ["predict", uri, str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    )
    assert said.exit_code == 0, said.output
    assert (
        "probabilities are of the classes, in this order: class 0, class 1, class 2"
        in said.output.replace("\n", " ")
    )
    found = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert found["file"].to_pylist() == sorted(str(tmp_path / "photos" / name) for name in names)
    assert json.loads(found.schema.metadata[b"classes"]) == ["class 0", "class 1", "class 2"]
    files = [(tmp_path / "photos" / name).read_bytes() for name in names]
    rows = pa.table(
        {
            "image": files,
            "id": pa.array([7, None, 9], pa.int64()),
            "seen": pa.array([1, 2, None], pa.timestamp("s")),
            "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
        }
    )
    pq.write_table(rows, tmp_path / "rows.parquet")
    rows = pq.read_table(tmp_path / "rows.parquet")
    words = ["predict", uri, str(tmp_path / "rows.parquet"), "-o", str(tmp_path / "kept")]
    assert run.invoke(cli.app, [*words, "--keep", "seen, tags"]).exit_code == 0
    kept = pq.read_table(tmp_path / "kept" / "part-00000.parquet")
    for name in ("id", "seen", "tags"):
        assert (
            kept.schema.field(name).type == rows.schema.field(name).type
            and kept[name].to_pylist() == rows[name].to_pylist()
        )
    assert "file" not in kept.column_names and {
        "row",
        "prediction",
        "probabilities",
        "error",
    } <= set(kept.column_names)
    assert run.invoke(cli.app, [*words, "--keep", "tags"]).exit_code == 2, (
        "other columns are other predictions"
    )
    pq.write_table(
        rows.append_column("prediction", pa.array(["a", "b", "c"])), tmp_path / "taken.parquet"
    )
    taken = run.invoke(
        cli.app,
        [
            "predict",
            uri,
            str(tmp_path / "taken.parquet"),
            "-o",
            str(tmp_path / "taken"),
            "--keep",
            "prediction",
        ],
    )
    assert taken.exit_code == 0, taken.output
    found = pq.read_table(tmp_path / "taken" / "part-00000.parquet")
    assert found["input_prediction"].to_pylist() == ["a", "b", "c"], (
        "the rows' own, beside the model's"
    )
    assert found["prediction"].to_pylist() == kept["prediction"].to_pylist()


@pytest.mark.ray
def test_an_error_in_a_data_worker_is_one_line(ray_here, tmp_path):
    """It came with Ray's account of the way that it took, 90 lines of it."""
    from pipeline.data.plan import Item
    from pipeline.data.stream import DataWorkers, map_blocks

    class Refusing:
        def __call__(self, item):
            raise ValueError("column x: what is wrong")

    with pytest.raises(ValueError, match=r"^column x: what is wrong$") as caught:
        list(map_blocks(Refusing(), [Item(-1, 0, 1)], DataWorkers(1)))
    assert type(caught.value) is ValueError


def modalities():
    return {
        "image": (Image(ImageOptions(**PIXELS.options), PIXELS.state), "timm/test_resnet"),
        "text": (text_modality(), "transformers/bert"),
        "audio": (
            Audio(
                AudioOptions(mels=20), {"features": "mel", "mean": [0.0] * 20, "std": [1.0] * 20}
            ),
            "torchaudio/deepspeech2",
        ),
        "table": (table_rows(8).modality, "table/ft_transformer"),
        "events": (event_rows(8).modality, "events/gru"),
        "trajectory": (trajectory_rows(4).modality, "policy/mlp"),
    }


NUMBERS = pa.array([1.5, 2.5])
LISTS = {"times": pa.array([[1.0]]), "variables": pa.array([["v0"]]), "values": pa.array([[1.0]])}


@pytest.mark.parametrize(
    ("name", "columns", "said"),
    [
        (
            "image",
            {"image": NUMBERS},
            r"column image holds double, and this bundle's image needs images: their files' "
            r"bytes \(binary\), their paths",
        ),
        (
            "image",
            {"image": pa.array([{"pixels": 1}])},
            r"column image holds struct<pixels: int64>, and this bundle's image needs images",
        ),
        (
            "text",
            {"text": pa.array([1, 2])},
            r"column text holds int64, and this bundle's text needs texts \(string or binary\) "
            r"or lists of words",
        ),
        (
            "audio",
            {"audio": NUMBERS},
            "column audio holds double, and this bundle's audio needs recordings",
        ),
        (
            "audio",
            {"audio": pa.array([b"x"]), "start": pa.array(["0"])},
            "column start holds string, and this bundle's start needs seconds, a number",
        ),
        (
            "table",
            {"features": pa.array([1, 2])},
            "column features holds int64, .* needs a struct .* onetomany prepare table "
            ".*rows.parquet -o FOLDER",
        ),
        (
            "table",
            {"features": pa.array([{"Age": "old"}])},
            "column features holds struct<Age: string>, and this bundle's features needs "
            "numbers in its field Age",
        ),
        (
            "table",
            {"Age": pa.array([50]), "Gender": pa.array(["male"])},
            "has no column 'features' with the features as a struct; columns are Age, Gender. "
            "Plain tables are brought into this form by: onetomany prepare table ",
        ),
        (
            "events",
            {**LISTS, "values": pa.array([["a"]])},
            "column values holds list<.*: string>, and this bundle's values needs lists of numbers",
        ),
        (
            "events",
            {**LISTS, "times": pa.array([1.0])},
            "column times holds double, and this bundle's times needs lists of numbers",
        ),
        (
            "trajectory",
            {"observations": pa.array([[1.0]])},
            "column observations holds list<.*double>, and this bundle's observations needs lists",
        ),
        ("text", {"text": pa.array([], pa.string())}, r"rows\.parquet: there are no rows in it"),
    ],
)
def test_a_column_of_another_type_is_one_line_before_anything_starts(name, columns, said, tmp_path):
    modality, backbone = modalities()[name]
    options = SMALL if name == "text" else {}
    task = task_of(backbone, modality.inputs(), "classification", label_state(), **options)
    roles = {
        role: role
        for role in (*modality.roles, *columns)
        if role in (*modality.roles, *modality.optional_roles)
    }
    bundle.save(
        str(tmp_path / "b"),
        task,
        ModalitySpec(name, modality.options.model_dump(), modality.state),
        columns=roles,
    )
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=said) as caught:
        inference.predict(
            str(tmp_path / "b"),
            [str(tmp_path / "rows.parquet")],
            str(tmp_path / "out"),
            {},
            "auto",
            Progress(),
        )
    assert "\n" not in str(caught.value) and str(tmp_path / "rows.parquet") in str(caught.value)
    assert not (tmp_path / "out" / "_predictions.json").exists()


@pytest.mark.parametrize(
    ("name", "file", "said"),
    [
        ("text", "a.png", "images were given, and this network reads plain texts, or tables"),
        ("table", "a.png", r"images were given, and this network reads tables \(.parquet, .csv"),
        ("image", "a.txt", "plain texts were given, and this network reads images, or tables"),
    ],
)
def test_files_of_another_kind_are_named_and_what_is_read(name, file, said, tmp_path):
    modality, backbone = modalities()[name]
    options = SMALL if name == "text" else {}
    task = task_of(backbone, modality.inputs(), "classification", label_state(), **options)
    spec = ModalitySpec(name, modality.options.model_dump(), modality.state)
    (role,) = modality.roles
    bundle.save(str(tmp_path / "b"), task, spec, columns={role: role})
    given = tmp_path / file
    if given.suffix == ".png":
        picture(given, 0)
    else:
        given.write_text("a line")
    with pytest.raises(ValueError, match=rf"{file}: {said}.* with a column '{role}'"):
        inference.predict(
            str(tmp_path / "b"), [str(given)], str(tmp_path / "out"), {}, "auto", Progress()
        )


def test_rows_of_a_table_are_the_same_for_another_version_of_pyarrow(tmp_path, monkeypatch):
    """Then the bytes of the converted rows are others, and the rest was refused as other files."""
    trained = bundle.read_manifest(image_bundle(tmp_path))
    given = tmp_path / "rows.csv"
    picture(tmp_path / "a.png", 0)

    def fingerprint(output: str, text: str) -> str:
        given.write_text(text)
        place = str(tmp_path / output)
        return inference._read_input(
            trained, [str(given)], place, {}, "auto", Progress()
        ).manifest.fingerprint

    text = f"image\n{tmp_path / 'a.png'}\n"
    before = fingerprint("a", text)
    other = partial(pq.ParquetWriter, compression="gzip")
    monkeypatch.setattr("pipeline.data.to_parquet.pq.ParquetWriter", other)
    assert fingerprint("b", text) == before
    assert fingerprint("c", text + text.splitlines()[1] + "\n") != before
    picture(tmp_path / "a.png", 1)
    assert fingerprint("d", text) != before


@pytest.mark.parametrize("command", [inference.predict, inference.embed_files])
def test_two_commands_do_not_write_into_one_folder_at_once(command, tmp_path):
    """The first to end removed the converted rows that the other still read."""
    uri, output = image_bundle(tmp_path), str(tmp_path / "out")
    picture(tmp_path / "a.png", 0)
    with run_lock.hold(output), pytest.raises(run_lock.BusyError, match="out: another run is at"):
        command(uri, [str(tmp_path / "a.png")], output, {}, "auto", Progress())
    assert os.listdir(output) == []


@pytest.mark.parametrize("command", [inference.predict, inference.embed_files])
def test_a_refused_command_leaves_no_folder_that_was_not_there(command, tmp_path):
    uri, given = image_bundle(tmp_path), tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a"]}), given)
    own = tmp_path / "own"
    own.mkdir()
    for output in (tmp_path / "new", own):
        with pytest.raises(ValueError, match="has no column 'image'"):
            command(uri, [str(given)], str(output), {}, "auto", Progress())
    assert not (tmp_path / "new").exists() and own.exists()


@pytest.mark.parametrize("name", ["image", "text", "audio", "table", "events", "trajectory"])
def test_columns_of_training_suit(name):
    modality, _ = modalities()[name]
    table = {
        "image": pa.table({"image": [b""]}),
        "text": pa.table({"text": [["a"]], "text_pair": ["b"]}),
        "audio": pa.table({"audio": [{"bytes": b"", "path": ""}], "start": [1], "seconds": [1.5]}),
        "table": None,
        "events": None,
        "trajectory": episodes(3),
    }[name]
    if table is None:
        from toys import stays

        table = stays(3)
        if name == "table":
            table = pa.table({"features": table["static"]})
    for role in (*modality.roles, *modality.optional_roles):
        if role in table.column_names:
            assert modality.required_type(role, table.schema.field(role).type) == ""


def test_what_is_to_be_kept_must_be_there(tmp_path):
    modality = modalities()["image"][0]
    pq.write_table(
        pa.table({"image": [b""], "id": [1], "error": [2], "weight": [0.5]}),
        tmp_path / "rows.parquet",
    )
    found = manifests.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports"))
    assert inference.kept_columns(modality, {"image": "image"}, found, ("weight",), "rows") == {
        "id": "id",
        "weight": "weight",
    }
    with pytest.raises(
        ValueError,
        match="--keep hospital: rows has no such column; columns are image, id, error, weight",
    ):
        inference.kept_columns(modality, {"image": "image"}, found, ("hospital",), "rows")
    assert inference.kept_columns(modality, {"image": "image"}, found, ("error",), "rows") == {
        "id": "id",
        "error": "error",
    }


def test_rows_of_a_prepared_table_keep_the_column_that_names_them(tmp_path):
    modality = modalities()["table"][0]
    table = pa.table({"stay": [11], "patient": [7], "features": [{"Age": 50.0}]})
    about = {"importer": "table", "id": "stay", "group": "patient"}
    pq.write_table(
        table.replace_schema_metadata({"onetomany": json.dumps(about)}), tmp_path / "rows.parquet"
    )
    found = manifests.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports"))
    columns = {"features": "features"}
    assert inference.kept_columns(modality, columns, found, (), "rows") == {"stay": "stay"}


def test_actions_are_read_where_they_are_given_and_by_embed_as_in_training(tmp_path):
    """A cloned policy that reads the actions before each step was embedded without them."""
    modality = trajectory_rows(4).modality
    pq.write_table(episodes(3), tmp_path / "rows.parquet")
    found = manifests.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports"))
    known = {"observations": "observations", "actions": "actions"}

    def columns(objective, given, **options):
        kind = registry.get("objective", objective)
        return inference.columns_of_roles(modality, kind, known, given, found, **options)

    observations = {"observations": "observations"}
    assert columns("behaviour_cloning", {}) == observations
    assert columns("behaviour_cloning", {"actions": "actions"}) == known
    assert columns("behaviour_cloning", {}, reads_labels=True) == known
    with pytest.raises(ValueError, match="--column label: rows to predict need no label"):
        columns("classification", {"label": "label"}, reads_labels=True)
    with pytest.raises(ValueError, match="--column image: no such role; trajectory reads observ"):
        columns("classification", {"image": "pixels"})


def test_a_kept_column_that_is_called_as_a_prediction_is_stands_as_an_input():
    """The transcript of a row stands beside the one that was heard; no block is computed first to
    find that the names are the same.
    """
    predictions = pa.table({"row": [0, 1], "text": ["herd", "word"], "error": ["", ""]})
    rows = pa.table({"text": ["heard", "word"], "input_text": ["a", "b"], "speaker": [5, 6]})
    found = inference.with_kept_columns(
        predictions, rows, {name: name for name in rows.column_names}
    )
    assert found.column_names == [
        "row",
        "input_input_text",
        "input_text",
        "speaker",
        "text",
        "error",
    ]
    assert found["input_input_text"].to_pylist() == ["heard", "word"] and found[
        "input_text"
    ].to_pylist() == ["a", "b"]
    assert found["text"].to_pylist() == ["herd", "word"]


@pytest.mark.parametrize(
    ("kind", "empty"), [("bool", False), ("uint8", -1), ("int32", -1), ("float32", None)]
)
def test_a_row_that_cannot_be_decoded_has_an_empty_value_of_each_type(kind, empty):
    """Such as an objective of somebody else's may write."""
    written = [
        inference._with_errors(np.arange(2), {"found": np.ones(2, kind)}, reasons)["found"]
        for reasons in ({}, {1: "unreadable"})
    ]
    assert written[0].dtype == written[1].dtype, "all files have one schema"
    found = written[1].tolist()
    assert found[0] == 1 and (np.isnan(found[1]) if empty is None else found[1] == empty)
    assert kind != "bool" or written[1].dtype == bool


def test_weights_are_readable_by_the_group(tmp_path):
    """safetensors writes 0600: a colleague could not open a bundle or an export."""
    before = os.umask(0o027)
    try:
        uri = image_bundle(tmp_path)
        export.export_bundle(uri, str(tmp_path / "out"), "hugging-face", False)
        export.export_bundle(uri, str(tmp_path / "weights.safetensors"), "state-dict", False)
        export.export_bundle(uri, str(tmp_path / "copy"), "bundle", False)
    finally:
        os.umask(before)
    places = [
        "bundle/weights.safetensors",
        "bundle/manifest.json",
        "out/model.safetensors",
        "out/head.safetensors",
        "weights.safetensors",
        "copy/weights.safetensors",
    ]
    assert {
        place: oct(stat.S_IMODE((tmp_path / place).stat().st_mode)) for place in places
    } == dict.fromkeys(places, "0o640")
