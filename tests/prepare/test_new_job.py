"""`onetomany init`: what it finds in all kinds of data, what it chooses, and that the job that it
writes is one.
"""

import io
import json
import os
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare import conftest
from prepare.conftest import encoded, write
from prepare.speech import sound
from typer.testing import CliRunner

import pipeline
from pipeline import cli
from pipeline.config import yaml_loader
from pipeline.prepare.new_job import columns as look
from pipeline.prepare.new_job import inspection
from pipeline.prepare.new_job.writing import scalar
from pipeline.transfer import time_estimate

WORDS = ("the film was fine", "a long and dull book", "we liked that song", "bread with butter")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, where storage and prepared data lie. Dry runs measure no steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time_estimate, "describe", lambda *_: [])
    return tmp_path


def command(*words) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    return done.exit_code, done.output


def init(*words, output="job.yaml") -> str:
    """The job that is written."""
    code, shown = command("init", *words, "-o", output)
    assert code == 0, shown
    with open(output) as file:
        return file.read()


def dry_run(job="job.yaml") -> str:
    code, shown = command("run", job, "--dry-run")
    assert code == 0, shown
    return shown


def target(job="job.yaml"):
    (found,) = yaml_loader.load(job).targets.values()
    return found


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [f"{WORDS[i % 4]} number {rng.integers(1e6)} of this list" for i in range(count)]


def csv(name: str, columns: dict[str, list], delimiter: str = ","):
    rows = [columns.keys(), *zip(*columns.values(), strict=True)]
    lines = [delimiter.join("" if one is None else str(one) for one in row) for row in rows]
    write(Path(name), "\n".join(lines) + "\n")


def prepare_as_told(text: str) -> None:
    """Run the command that the header of a job gives, without Ray."""
    line = next(one for one in text.splitlines() if "onetomany prepare" in one)
    words = shlex.split(line.removeprefix("#"))[2:]
    name, source, options = words[0], words[1], words[2:]
    pairs, settings, output = [], {}, ""
    for flag, value in zip(options[::2], options[1::2], strict=True):
        if flag == "-o":
            output = value
        elif flag == "--set":
            pairs.append(value)
        else:
            settings[flag.strip("-").replace("-", "_")] = (
                float(value) if "." in value else int(value)
            )
    conftest.prepare(name, source, output, *pairs, **settings)


def comments(text: str) -> str:
    """All comments as one line."""
    return " ".join(line.partition("#")[2].strip() for line in text.splitlines() if "#" in line)


# ---------------------------------------------------------------- all kinds of data


def test_a_csv_of_texts(here):
    csv(
        "data/reviews.csv",
        {"id": range(90), "review": texts(90), "stars": [i % 3 for i in range(90)]},
    )
    text = init("data/reviews.csv")
    found = target()
    assert found.data.modality.name == "text" and found.objective.name == "classification"
    assert found.data.columns == {"text": "review", "label": "stars"}
    assert "uri: data/reviews.csv" in text and "Found 90 rows of texts" in text
    assert "3 classes of stars: 0 (30 rows), 1 (30), 2 (30)" in comments(text)
    assert "columns that are not read: id" in comments(text)
    assert "review.csv" not in text and found.metric == "accuracy"
    assert "in all: 15 trials" in dry_run()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_texts_in_json_lines_and_parquet(form):
    rows = {
        "text": texts(60),
        "label": ["pos", "neg"] * 30,
        "split": (["train"] * 4 + ["dev", "test"]) * 10,
    }
    if form == "parquet":
        pq.write_table(pa.table(rows), "rows.parquet")
    else:
        listed = [dict(zip(rows, one, strict=True)) for one in zip(*rows.values(), strict=True)]
        write(Path("rows.jsonl"), "\n".join(map(json.dumps, listed)))
    text = init(f"rows.{form}")
    data = target().data
    assert data.split_column == "split" and "test_fraction" not in text
    assert "train (40 rows), dev (10), test (10)" in comments(text)
    assert "train 40, validation 10, test 10 rows" in dry_run()


def test_a_table_of_numbers_and_categories_is_prepared_first():
    rng = np.random.default_rng(0)
    csv(
        "people.csv",
        {
            "stay": range(100, 220),
            "patient_id": [i // 2 for i in range(120)],
            "age": rng.integers(20, 90, 120).tolist(),
            "pressure": [None if i % 7 == 0 else round(rng.normal(), 3) for i in range(120)],
            "unit": [("east", "west", "north")[i % 3] for i in range(120)],
            "died": [int(i % 5 == 0) for i in range(120)],
            "died_text": [("no", "yes")[i % 5 == 0] for i in range(120)],
        },
    )
    text = init("people.csv", "--target-column", "died")
    assert (
        "onetomany prepare table people.csv -o prepared/people --set label=died --set id=stay "
        "--set group=patient_id --set drop=died_text"
    ) in text
    assert (
        "prepare table new.csv -o prepared/people_new --set id=stay --set categorical=unit\n"
        in text
    )
    assert "died_text has another name for each value of died" in comments(text)
    prepare_as_told(text)
    found = target()
    assert found.data.group == "patient_id" and found.metric == "auroc"
    shown = dry_run()
    assert "no patient_id in two splits" in shown


def test_a_folder_of_images(tmp_path):
    for number in range(40):
        label = ("cat", "dog")[number % 2]
        write(tmp_path / f"photos/{label}/{number}.jpg", encoded(number, size=(70, 60)))
    write(tmp_path / "photos/README.txt", "where they are from")
    write(tmp_path / "photos/notes.csv", "file,note\n")  # a table without rows
    text = init("photos")
    data = target().data
    assert data.modality.options == {"size": 48, "channels": 3} and data.format == "images"
    assert "images: colour, shorter side 60 to 60 pixels" in text
    assert "files of other kinds are left out: 1 csv, 1 text" in text
    assert "train" in dry_run()


def test_folders_of_splits_of_images(folder):
    for name in ("cat", "dog"):
        for number in range(4):
            write(folder / "test" / name / f"{number}.jpg", encoded(900 + number, (40, 30)))
    init("folder")
    data = target().data
    assert (data.train, data.validation, data.test) == tuple(
        str(folder / name) for name in ("train", "val", "test")
    )
    assert "train 8, validation 4, test 8 rows" in dry_run()


@pytest.mark.parametrize("form", ["struct", "lists"])
def test_rows_that_hold_series(form):
    """The rows that `prepare series` writes, and lists of steps beside codes and embeddings."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal(32 - i % 3).tolist() for i in range(120)]
    signal = (
        [{"x": one, "y": one} for one in x] if form == "struct" else [[[v] for v in x[0]]] * 120
    )
    columns = {"series": signal, "label": ["go", "stop"] * 60, "start": list(range(120))}
    columns |= {"recording": [f"r{i // 6}" for i in range(120)], "embedding": [[0.5, 0.25]] * 120}
    columns["step"] = [0.02] * 120 if form == "struct" else list(range(120))
    pq.write_table(pa.table(columns), "windows.parquet")
    text = init("windows.parquet")
    data = target().data
    step = {"step": "step"} if form == "struct" else {}
    assert data.columns == {"series": "series", "label": "label", **step}, "a time, not a number"
    assert data.group == "recording"
    assert data.modality.name == "series" and data.modality.options == {"length": 32}
    source = yaml_loader.load("job.yaml").sources["own"]
    assert source.objective.name == "masked_series" and source.backbone.name == "hf/patchtst"
    config = source.backbone.options["config"]
    assert config["patch_length"] == config["patch_stride"] == 4 and config["scaling"] is None
    assert "95 % of the series have at most 32 steps" in comments(text)


def test_lists_of_numbers_beside_texts_are_no_series():
    columns = {"text": texts(60), "keypoints": [[0.5, 0.25]] * 60, "label": ["a", "b"] * 30}
    pq.write_table(pa.table(columns), "rows.parquet")
    init("rows.parquet")
    assert target().data.columns == {"text": "text", "label": "label"}


@pytest.mark.parametrize("places", [["reviews"], ["reviews/pos/*.txt", "reviews/neg/*.txt"]])
def test_a_folder_of_texts_for_each_class(places):
    for number, one in enumerate(texts(60)):
        write(Path(f"reviews/{('neg', 'pos')[number % 2]}/{number}.txt"), one)
    text = init(*places)
    found = target()
    assert (found.data.format, found.objective.name) == ("documents", "classification")
    assert found.data.columns == {"text": "text", "label": "label"}
    assert "2 classes of label: neg (30 rows), pos (30)" in comments(text)
    assert "predict runs/job new_files --input-format documents --target label" in text
    assert "train" in dry_run()


def test_texts_laid_out_as_the_reviews_of_imdb():
    """Each split has its folder; texts without a label lie among those of training."""
    for split in ("train", "test"):
        for number, one in enumerate(texts(40, len(split))):
            write(Path(f"imdb/{split}/{('neg', 'pos')[number % 2]}/{number}.txt"), one)
        write(Path(f"imdb/{split}/urls_pos.txt"), "https://example.org")
    for number in range(4):
        write(Path(f"imdb/train/unsup/{number}.txt"), "seen without a label")
    text = comments(init("imdb"))
    data = target().data
    here = Path.cwd()
    assert data.test == [f"{here}/imdb/test/neg", f"{here}/imdb/test/pos"]
    assert data.train == [f"{here}/imdb/train/neg", f"{here}/imdb/train/pos"]
    assert "imdb/test (1), imdb/train (1), imdb/train/unsup (4)" in text
    assert "Found 80 rows (test 40, train 40) of texts" in text


def test_a_folder_of_recordings(tmp_path):
    for number in range(36):
        write(
            tmp_path / f"calls/{('up', 'down', 'on')[number % 3]}/{number}.wav",
            sound(number, 0.3, 8000, "WAV"),
        )
    text = init("calls")
    found = yaml_loader.load("job.yaml")
    assert found.sources["own"].data.modality.options == {"rate": 8000}
    assert target().data.columns == {
        "audio": "audio",
        "start": "start",
        "seconds": "seconds",
        "label": "label",
    }
    assert "recordings: 0.3 to 0.3 s, 8000 samples a second" in text
    dry_run()


def test_bytes_of_images_and_sound_in_parquet():
    pq.write_table(
        pa.table(
            {
                "image": [encoded(i, (28, 28), "PNG", "L") for i in range(60)],
                "label": [i % 2 for i in range(60)],
                "label_name": [("boot", "bag")[i % 2] for i in range(60)],
            }
        ),
        "images.parquet",
    )
    init("images.parquet")
    data = target().data
    assert data.columns == {"image": "image", "label": "label", "label_name": "label_name"}
    assert data.modality.options == {"size": 32, "channels": 1}
    dry_run()
    sounds = [{"bytes": sound(i, 0.3), "path": None} for i in range(60)]
    pq.write_table(pa.table({"audio": sounds, "word": ["a", "b"] * 30}), "sounds.parquet")
    init("sounds.parquet", output="sounds.yaml")
    assert target("sounds.yaml").data.columns == {"audio": "audio", "label": "word"}
    dry_run("sounds.yaml")


def test_a_csv_that_names_files(tmp_path):
    for number in range(40):
        write(tmp_path / f"set/files/{number}.jpg", encoded(number))
    names = [f"files/{i}.jpg" for i in range(40)]
    csv("set/list.csv", {"file": names, "kind": ["a", "b"] * 20})
    text = init("set/list.csv")
    assert (
        "onetomany prepare files set/list.csv -o prepared/list --set column=file --set label=kind"
        in text
    )
    assert "onetomany prepare files new.csv -o prepared/list_new --set column=file\n" in text
    prepare_as_told(text)
    assert target().data.columns == {"image": "image", "label": "kind"}
    dry_run()
    # absolute names are read as they are
    csv("list.csv", {"file": [f"{tmp_path}/set/{name}" for name in names], "kind": [0, 1] * 20})
    text = init("list.csv", output="direct.yaml")
    assert "onetomany prepare" not in text
    assert target("direct.yaml").data.columns == {"image": "file", "label": "kind"}
    dry_run("direct.yaml")


def test_a_folder_of_a_table_and_the_files_that_it_names(tmp_path):
    for number in range(40):
        write(tmp_path / f"set/audio/{number}.flac", sound(number, 0.3))
    names = [f"audio/{i}.flac" for i in range(40)]
    csv(
        "set/list.csv",
        {
            "path": names,
            "rate": range(40),
            "split": ["train", "test"] * 20,
            "word": ["a", "a", "b", "b"] * 10,
        },
    )
    text = init("set")
    assert "--set column=path --set label=word --set split_column=split" in text
    prepare_as_told(text)
    rows = conftest.read("prepared/list")
    assert {row["table_rate"] for row in rows} == set(range(40)) and len(rows) == 40
    assert "test 20 rows" in dry_run()


def test_tables_of_each_split_and_another_delimiter():
    for split, count in (("train", 60), ("test", 40)):
        csv(f"set/{split}.csv", {"text": texts(count), "label": ["x", "y"] * (count // 2)})
    init("set")
    assert target().data.test.endswith("set/test.csv") and target().data.validation is None
    assert "test 40 rows" in dry_run()
    csv("set/eval.csv", {"text": texts(40), "label": ["x", "y"] * 20})
    code, shown = command("init", "set", "-o", "eval.yaml")
    assert code == 2 and "eval.csv: are its rows for validation or for test" in shown
    csv("other.csv", {"text": texts(60), "label": ["x", "y"] * 30}, delimiter=";")
    text = init("other.csv", output="other.yaml")
    assert "prepare csv other.csv -o prepared/other --set 'delimiter=;'" in text
    prepare_as_told(text)
    dry_run("other.yaml")


def test_lists_of_labels_and_tags_and_transcripts():
    rows = pa.table({"text": texts(60), "topics": [["a"], ["a", "b"], []] * 20})
    pq.write_table(rows, "sets.parquet")
    init("sets.parquet")
    assert target().objective.name == "multilabel"
    dry_run()
    rows = pa.table(
        {"tokens": [["the", "town", "Bonn"]] * 60, "ner_tags": [["O", "O", "B-place"]] * 60}
    )
    pq.write_table(rows, "tags.parquet")
    init("tags.parquet", output="tags.yaml")
    assert target("tags.yaml").data.columns == {"text": "tokens", "tags": "ner_tags"}
    dry_run("tags.yaml")
    said = [f"{WORDS[i % 4]} {WORDS[(i // 4) % 4]}" for i in range(60)]
    speakers = [f"s{i // 4}" for i in range(60)]
    rows = pa.table(
        {"audio": [sound(i, 2.5) for i in range(60)], "transcript": said, "speaker": speakers}
    )
    pq.write_table(rows, "said.parquet")
    init("said.parquet", output="said.yaml")
    assert target("said.yaml").objective.name == "ctc"
    assert target("said.yaml").data.group == "speaker"
    dry_run("said.yaml")


# ---------------------------------------------------------------- choices


def test_the_most_plausible_label_is_taken_and_the_others_are_named():
    csv(
        "rows.csv",
        {
            "text": texts(60),
            "domain": ["a", "b", "c"] * 20,
            "label": [0, 1] * 30,
            "sex": "mmff" * 15,
        },
    )
    text = init("rows.csv")
    assert target().data.columns["label"] == "label"
    assert "label is the most plausible label; sex, domain could be it too" in comments(text)
    init("rows.csv", "--target-column", "domain", output="domain.yaml")
    assert target("domain.yaml").data.columns["label"] == "domain"


@pytest.mark.parametrize(
    "name, values, said",
    [
        ("note", [f"note {i}" for i in range(60)], "nothing can be the label: note (text, 60"),
    ],
)
def test_no_label_is_one_clear_error(name, values, said):
    csv("rows.csv", {"text": texts(60), name: values})
    code, shown = command("init", "rows.csv")
    assert code == 2 and said in shown and "name one with --target-column" in shown
    assert not os.path.exists("rows.yaml")


def test_numbers_of_texts_are_estimated():
    """Rows without a number are left out; a median is no class."""
    price = [None if i % 20 == 7 else i / 7 for i in range(60)]
    csv("rows.csv", {"text": texts(60), "price": price})
    text = init("rows.csv")
    found = target()
    assert (found.objective.name, found.metric) == ("regression", "rmse")
    assert found.data.columns == {"text": "text", "value": "price"}
    low, high = np.nanquantile([np.nan if one is None else one for one in price], [0.05, 0.95])
    assert f"90 % of the numbers lie from {low:.4g} to {high:.4g}" in comments(text)
    assert found.data.max_bad_rows == 0.25 and "3 have no price" in comments(text)
    assert "in all: 15 trials" in dry_run()


def test_numbers_of_a_table_are_estimated():
    """Columns that hold no value twice determine each other, and none of them is dropped."""
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=80).round(4).tolist() for name in ("age", "bmi", "bp")}
    csv("rows.csv", {**columns, "sex": [1, 2] * 40, "target": range(25, 425, 5)})
    text = init("rows.csv")
    assert "prepare table rows.csv -o prepared/rows --set label=target\n" in text
    prepare_as_told(text)
    assert target().objective.name == "regression"
    assert target().data.columns == {"features": "features", "value": "target"}
    shown = dry_run()
    assert "baselines boosted_trees, majority, ridge: 9 final trials" in shown
    assert "in all: 18 trials" in shown


@pytest.mark.parametrize(
    ("name", "values", "is_number"),
    [
        ("target", list(range(0, 300, 5)), True),
        ("target", list(range(24)) * 5, False),
        ("target", list(range(24)) * 2, True),
        ("age", list(range(20, 80)) * 5, True),
        ("class_code", list(range(0, 300, 5)), False),
        ("species", list(range(200)) * 4, False),
        ("diagnosis", [250 + 7 * i for i in range(30)] * 3, False),
        ("word_count", list(range(5, 65)) * 3, True),
        ("event", list(range(0, 300, 5)), True),
        ("stars", [0, 10, 20] * 20, False),
        ("x", [0.5, 1.0, 2.0] * 20, True),
        ("x", [0.5, 1.0] * 30, False),
        ("x", [0.5, 1.0, 2.0] + [None] * 57, False),
        ("x", ["a"] * 60, False),
    ],
)
def test_numbers_are_estimated_and_codes_are_classes(name, values, is_number):
    column = look.profile(name, pa.chunked_array([values]))
    assert look.is_estimated(column) == is_number


def test_a_number_of_a_row_is_no_label_beside_classes_unless_its_name_says_so():
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=80).round(4).tolist() for name in ("weight", "event_time")}
    csv("rows.csv", {**columns, "sick": [0, 1] * 40})
    assert "label: sick" in init("rows.csv")
    sick = [0, 1] * 40
    csv("more.csv", {**columns, "sick": sick, "price": columns["weight"]})
    text = init("more.csv", output="more.yaml")
    assert "value: price" in text and "sick could be it too" in comments(text)
    csv("last.csv", {**columns, "price": columns["weight"], "sick": sick})
    text = init("last.csv", output="last.yaml")
    assert "label: sick" in text and "price could be it too" in comments(text)


@pytest.mark.parametrize(
    ("column", "objective", "values"),
    [
        ("target", "classification", [100 + 7 * i for i in range(30)] * 4),
        ("stars", "regression", [1, 2, 3, 4, 5, 6] * 20),
    ],
)
def test_the_user_says_whether_values_are_classes_or_numbers(column, objective, values):
    csv("rows.csv", {"text": texts(120), column: values})
    init("rows.csv", "--target-column", column)
    other = {"classification": "regression", "regression": "classification"}[objective]
    assert target().objective.name == other
    init("rows.csv", "--target-column", column, "--objective", objective, output="said.yaml")
    found = target("said.yaml")
    role = "label" if objective == "classification" else "value"
    assert found.objective.name == objective and found.data.columns[role] == column


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--objective", "regression"], "--objective regression: name its column with"),
        (["--target-column", "kind", "--objective", "mlm"], "choose classification or regression"),
        (["--target-column", "kind", "--objective", "regression"], "kind: it is kind (text, 2"),
        (["--target-column", "x", "--objective", "classification"], "x: it is x (number, 60"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(arguments, said):
    csv("rows.csv", {"text": texts(60), "kind": ["a", "b"] * 30, "x": [i / 7 for i in range(60)]})
    code, shown = command("init", "rows.csv", *arguments)
    assert code == 2 and said in shown


def test_a_named_column_that_cannot_be_the_label():
    csv("rows.csv", {"text": texts(60), "kind": [0, 1] * 30, "same": [7] * 60})
    code, shown = command("init", "rows.csv", "--target-column", "same")
    assert code == 2 and "same: it has 1 value in 60 rows, and a label has two" in shown
    code, shown = command("init", "rows.csv", "--target-column", "kinds")
    assert code == 2 and "--target-column kinds: did you mean kind?" in shown


def test_nothing_is_overwritten_without_force():
    csv("rows.csv", {"text": texts(60), "label": [0, 1] * 30})
    write(Path("rows.yaml"), "mine")
    code, shown = command("init", "rows.csv")
    assert code == 2 and "rows.yaml is there already: give --force" in shown
    with open("rows.yaml") as file:
        assert file.read() == "mine"
    assert command("init", "rows.csv", "--force")[0] == 0
    assert yaml_loader.load("rows.yaml").name == "rows"


def test_groups_keep_splits_apart_and_crossing_splits_are_named():
    rows = {
        "text": texts(120),
        "label": [0, 1] * 60,
        "author_id": [i // 6 for i in range(120)],
        "split": ["train"] * 90 + ["test"] * 30,
    }
    rows["split"][0] = "test"
    csv("rows.csv", rows)
    text = init("rows.csv")
    assert target().data.group is None and target().data.split_column == "split"
    assert "1 values of author_id stand in several of these splits" in comments(text)
    del rows["split"]
    csv("rows.csv", rows)
    init("rows.csv", output="grouped.yaml")
    assert target("grouped.yaml").data.group == "author_id"


def test_rare_classes_and_rows_without_a_label_are_left_out():
    labels = ["a", "b"] * 28 + ["c", None, None, "a"]
    csv("rows.csv", {"text": texts(60), "label": labels})
    text = init("rows.csv")
    assert target().data.where == {"label": ["a", "b"]}
    assert "2 rows without a label and 1 rows of 1 classes with fewer than 3 rows (c)" in comments(
        text
    )
    dry_run()


def test_every_class_stands_in_every_split():
    """Five rows of a class: the default seed would leave them out of a split now and then."""
    for shift in range(3):
        labels = ["a"] * 45 + ["b"] * 5
        csv(
            f"rows{shift}.csv", {"text": texts(50, shift), "label": labels[shift:] + labels[:shift]}
        )
        init(f"rows{shift}.csv", output=f"{shift}.yaml")
        dry_run(f"{shift}.yaml")


def test_data_and_job_in_different_folders():
    csv("data/rows.csv", {"text": texts(60), "label": [0, 1] * 30})
    text = init("data/rows.csv", output="jobs/own/first.yaml")
    assert "uri: ../../data/rows.csv" in text and "runs/first" in text
    dry_run("jobs/own/first.yaml")


def test_checkpoints_that_are_given(tmp_path):
    csv("rows.csv", {"text": texts(60), "label": [0, 1] * 30})
    write(tmp_path / "models/mini/config.json", "{}")
    write(tmp_path / "runs/a/bundle/manifest.json", "{}")
    text = init(
        "rows.csv", "--source", "models/mini", "--source", "runs/a/bundle", "--source", "hf-hub:b/c"
    )
    for place in ("hf:models/mini", "bundle:runs/a/bundle", "hf-hub:b/c"):
        assert f"backbone: {place}\n" in text
    assert "  mini:\n" in text and "  a:\n" in text and "  c:\n" in text
    assert "own:" not in text and "modality: {text: {length: 32}}" in text
    for number in range(24):
        write(tmp_path / f"photos/{'ab'[number % 2]}/{number}.jpg", encoded(number))
    text = init("photos", "--source", "runs/a/bundle", output="photos.yaml")
    assert target("photos.yaml").data.modality.options == {}  # the bundle knows its size
    code, shown = command("init", "rows.csv", "-o", "b.yaml", "--source", "nowhere")
    assert code == 2 and "--source nowhere: neither a bundle" in shown


def test_the_function_of_the_package():
    csv("rows.csv", {"text": texts(60), "label": [0, 1] * 30})
    lines = pipeline.init("rows.csv", "first.yaml")
    assert lines[0] == "60 rows of texts; to learn: label (classification)"
    assert lines[-2] == "wrote first.yaml"


@pytest.mark.parametrize(
    "value", ["a b", "yes", "1e-4", "a:b", "a#b", "ü", 1, True, {"a": ["x y"]}]
)
def test_values_are_read_back_as_they_were_written(value):
    write(
        Path("v.yaml"),
        f"name: v\nsources: {{a: {{backbone: timm/resnet18}}}}\nx: {scalar(value)}\n",
    )
    data, _ = yaml_loader.parse(Path("v.yaml").read_text(), [])
    assert data["x"] == value


@pytest.mark.parametrize(
    "values, kind",
    [
        ([1.0, 2.0, None], "whole"),
        ([1.5, 2.0, None], "number"),
        (["a", "", None], "text"),
        (["2020-01-01", "2020-01-02T03:04:05Z", None], "time"),
        ([True, False, None], "bool"),
        ([b"a", b"b", None], "bytes"),
        ([["a"], [], None], "list"),
    ],
)
def test_kinds_of_columns(values, kind):
    column = look.profile("x", pa.chunked_array([values]))
    assert column.kind == kind and column.rows == 3
    assert column.present == (1 if kind == "text" else 2)


def test_images_of_every_mode_are_looked_at():
    def picture(mode: str) -> bytes:
        sink = io.BytesIO()
        PIL.Image.new(mode, (33, 40)).save(sink, "PNG")
        return sink.getvalue()

    rows = {
        "picture": [picture(mode) for mode in ["L"] * 20 + ["RGB", "P"] * 5],
        "label": [0, 1] * 15,
    }
    pq.write_table(pa.table(rows), "rows.parquet")
    init("rows.parquet")
    assert target().data.modality.options == {"size": 32, "channels": 3}


@pytest.mark.parametrize(
    "columns, said",
    [
        (
            {"title": ["a", "b"] * 30, "question": texts(60), "answer_start": list(range(60))},
            "this is question answering; write its job after jobs/text/qa_small.yaml",
        ),
        (
            {
                "text": [f"Ada went to {town}." for town in ("Rome", "Oslo", "Lima")] * 2,
                "entities": [[{"start": 0, "end": 3, "label": "PER"}]] * 6,
            },
            "this is tagging, which reads the words of a text and a tag for each (make both of the "
            "spans); write its job after jobs/text/ner_small.yaml",
        ),
        (
            {"image": [encoded(i) for i in range(6)], "boxes": [[1.0]] * 6, "width": [40, 41] * 3},
            "this is detection; write its job after jobs/vision/detection_small.yaml",
        ),
        (
            {"observations": [[[1.0]]] * 6, "actions": [["go"]] * 6},
            "this is behaviour cloning; write its job after "
            "jobs/robotics/wall_following_small.yaml",
        ),
        (
            {"ecg": [[1, 2, 3]] * 60},
            "series without labels are for a source (objective masked_series)",
        ),
    ],
)
def test_data_of_another_task_are_reported(columns, said):
    pq.write_table(pa.table(columns), "rows.parquet")
    code, shown = command("init", "rows.parquet")
    assert code == 2 and said in shown


def test_several_tables_in_a_folder_are_reported():
    csv("set/a.csv", {"text": texts(60), "label": [0, 1] * 30})
    csv("set/b.csv", {"name": texts(60)})
    code, shown = command("init", "set")
    assert code == 2 and "these are several tables; name the files of one" in shown


def test_long_recordings_that_are_cut_stay_in_one_split(tmp_path):
    for number in range(24):
        write(tmp_path / f"long/{'ab'[number % 2]}/{number}.wav", sound(number, 31.0, 4000, "WAV"))
    init("long")
    assert target().data.group == "recording"


def test_a_file_without_the_label_is_left_out_and_texts_are_not_utf8():
    labels = {"text": texts(60), "label": [0, 1] * 30}
    csv("set/train.csv", labels)
    csv("set/test.csv", {"text": texts(40)})
    text = init("set")
    assert "set/test.csv: no column label, so it is left out" in comments(text)
    assert target().data.uri.endswith("set/train.csv") and target().data.test_fraction == 0.3
    dry_run()
    Path("latin.csv").write_bytes("text,label\nné,a\nnö,b\n".encode("latin-1") * 30)
    code, shown = command("init", "latin.csv")
    assert code == 2 and "latin.csv: column text is no UTF-8 text" in shown and "iconv" in shown


def test_a_first_line_that_is_a_row():
    write(Path("rows.csv"), "".join(f"{one},{'pn'[i % 2]}\n" for i, one in enumerate(texts(60))))
    code, shown = command("init", "rows.csv")
    assert code == 2 and "rows.csv: its first line seems to be a row, since 'p' stands" in shown


def test_eight_rows_are_too_few_and_twenty_are_enough(tmp_path):
    for count, code in ((8, 2), (24, 0)):
        for number in range(count):
            label = "ab"[number % 2]
            write(tmp_path / f"set{count}/{label}/{number}.jpg", encoded(number))
        done, shown = command("init", f"set{count}", "-o", f"{count}.yaml")
        assert done == code, shown
    assert "8 rows are too few" in command("init", "set8")[1]
    dry_run("24.yaml")


def test_files_in_a_folder_below_the_table_and_missing_ones(tmp_path):
    for number in range(38):
        write(tmp_path / f"set/jpg/{number}.jpg", encoded(number))
    csv("set.csv", {"file": [f"{i}.jpg" for i in range(40)], "kind": ["a", "b"] * 20})
    (tmp_path / "set.csv").rename(tmp_path / "set/list.csv")
    text = init("set/list.csv")
    assert "--set root=set/jpg --max-bad 0.1" in text
    prepare_as_told(text)
    dry_run()


# ---------------------------------------------------------------- groups


def test_groups_are_looked_for_in_all_rows_of_a_large_table(monkeypatch):
    """A sample of rows sorted by patient has one row of each, as an id would."""
    monkeypatch.setattr(inspection, "SAMPLE_ROWS", 20)
    patients = [i // 10 for i in range(200)]
    rows = {"note": texts(200), "patient_id": patients, "label": [0, 1] * 100}
    pq.write_table(pa.table(rows), "notes.parquet")
    init("notes.parquet")
    assert target().data.group == "patient_id"
    rng = np.random.default_rng(0)
    csv(
        "stays.csv",
        {
            "patientid": patients,
            "stay": range(500, 700),
            "pressure": rng.normal(size=200).round(3).tolist(),
            "result": [("low", "high")[i % 3 == 0] for i in range(200)],
            "fold": [i % 5 for i in range(200)],
        },
    )
    text = init("stays.csv", output="stays.yaml")
    assert "--set label=result --set id=stay --set group=patientid" in text


def test_of_several_groups_the_largest_is_taken():
    rows = {
        "session": [i // 3 for i in range(120)],
        "speaker_dialect": [i // 20 for i in range(120)],
        "subject": [i // 12 for i in range(120)],
        "text": texts(120),
        "label": [0, 1] * 60,
    }
    csv("rows.csv", rows)
    assert "session may stand" not in comments(init("rows.csv"))
    assert target().data.group == "subject"
    rows["session"] = [i % 30 for i in range(120)]  # several subjects in each
    csv("rows.csv", rows)
    text = init("rows.csv", output="crossed.yaml")
    assert "rows of one session may stand in several splits, as the group is subject" in comments(
        text
    )


def test_two_rows_of_one_patient_are_a_group():
    csv(
        "rows.csv",
        {
            "patient": [max(1, i) for i in range(120)],
            "text": texts(120),
            "label": [0, 1] * 60,
        },
    )
    init("rows.csv")
    assert target().data.group == "patient"


def test_splits_that_a_sample_does_not_have(monkeypatch):
    monkeypatch.setattr(inspection, "SAMPLE_ROWS", 20)
    splits = ["train"] * 150 + ["Test"] * 50
    splits[5:100:10] = ["dev"] * 10
    splits[7] = splits[17] = "unused"
    rows = {
        "text": texts(200),
        "label": [0, 1, 1, 0] * 50,
        "author_id": [i // 2 for i in range(200)],
        "split": splits,
    }
    pq.write_table(pa.table(rows), "rows.parquet")
    text = init("rows.parquet")
    assert target().data.split_values == {
        "train": ["train"],
        "test": ["Test"],
        "validation": ["dev"],
    }
    assert "rows in no split, by their split: unused (2 rows)" in comments(text)
    assert "validation_fraction" not in text
    assert "train 138, validation 10, test 50 rows" in dry_run()


# ---------------------------------------------------------------- the file


def test_the_commands_name_the_folder_of_the_new_rows():
    rows = {f"x{i}": np.random.default_rng(i).normal(size=60).tolist() for i in range(4)}
    csv("rows.csv", {**rows, "label": [0, 1] * 30})
    text = init("rows.csv", output="jobs/first.yaml")
    assert "prepare table new.csv -o jobs/prepared/rows_new" in text
    assert "predict runs/first jobs/prepared/rows_new --target label" in text


def test_a_line_break_in_a_name_stays_in_its_comment():
    rows = {"text": texts(60), "kind\nof": ["x", "y"] * 30, "label": [0, 0, 1] * 20}
    pq.write_table(pa.table(rows), "rows.parquet")
    text = init("rows.parquet")
    assert target().data.columns == {"text": "text", "label": "label"}
    assert "kind of could be it too" in text


def test_a_label_named_like_a_column_of_the_converted_files(tmp_path):
    for number in range(24):
        write(tmp_path / f"set/jpg/{number}.jpg", encoded(number))
    csv(
        "set/list.csv",
        {
            "file": [f"jpg/{i}.jpg" for i in range(24)],
            "width": ["wide", "slim"] * 12,
        },
    )
    text = init("set/list.csv", "--target-column", "width")
    assert "--set label=width" in text
    prepare_as_told(text)
    assert target().data.columns == {"image": "image", "label": "table_width"}
    dry_run()
