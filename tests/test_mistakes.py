"""Mistakes of a new user: what was typed, and what is said. No mistake ends in a traceback.

Every row changes one thing of a job that is right, or of its files, and says which parts the message
must have. A message names the job file and the line wherever a field of the job is wrong.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from pipeline import cli

JOB = """\
name: mine
storage: runs
sources:
  reviews:
    data:
      uri: reviews.csv
      modality: {text: {length: 16, vocabulary: 300}}
      columns: {text: text, label: label}
    backbone: {transformers/bert: {layers: 1, hidden: 16, heads: 2}}
    objective: classification
    train: {steps: 4, global_batch: 8, lr: 1e-3}
targets:
  films:
    data:
      uri: films.csv
      test_fraction: 0.3
      modality: text
      columns: {text: text, label: label}
    objective: classification
    train: {steps: 4, global_batch: 8}
techniques: [scratch, full]
fanout: {seeds: 2}
"""

ROWS = [(f"a {word} film number {i}", word) for i in range(30) for word in ("good", "bad")]


def csv(
    rows: list[tuple[str, ...]] = ROWS, header: str = "text,label", delimiter: str = ","
) -> bytes:
    lines = [header.replace(",", delimiter), *(delimiter.join(row) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


class Mistake(NamedTuple):
    """One mistake, and what is said of it."""

    name: str
    typed: tuple[str, str] | None
    """(right, wrong) text of the job; None: the job is right."""
    said: tuple[str, ...]
    """What the message says."""
    files: dict[str, bytes] = {}
    """Files that are other than they should be, or are there besides."""
    words: tuple[str, ...] = ()
    """Further words of the command."""
    has_line: bool = True
    """Whether the message names the line of the job that is wrong."""
    aws: dict[str, str] | None = None
    """The AWS_* variables; None: those of the tests' S3 server."""


TRAIN = "    train: {steps: 4, global_batch: 8}"
TARGET_COLUMNS = (
    "      test_fraction: 0.3\n      modality: text\n      columns: {text: text, label: label}"
)
BACKBONE = "    backbone: {transformers/bert: {layers: 1, hidden: 16, heads: 2}}"
OBJECTIVE = "    objective: classification\n    train: {steps: 4, global_batch: 8}\n"
FILMS = "      uri: films.csv"
TECHNIQUES = "techniques: [scratch, full]"

KEYS = [
    Mistake(
        "batch_size",
        (TRAIN, "    train: {steps: 4, batch_size: 8}"),
        ("targets.films.train.batch_size: unknown field; did you mean global_batch?",),
    ),
    Mistake(
        "learning_rate",
        (TRAIN, "    train: {steps: 4, learning_rate: 0.1}"),
        ("targets.films.train.learning_rate: unknown field; did you mean lr?",),
    ),
    Mistake(
        "num_train_epochs",
        (TRAIN, "    train: {num_train_epochs: 3}"),
        ("targets.films.train.num_train_epochs: unknown field; did you mean epochs?",),
    ),
    Mistake(
        "early_stopping_patience",
        (TRAIN, "    train: {early_stopping_patience: 3}"),
        ("targets.films.train.early_stopping_patience: unknown field; did you mean patience?",),
    ),
    Mistake(
        "gradient_accumulation_steps",
        (TRAIN, "    train: {steps: 4, gradient_accumulation_steps: 2}"),
        (
            "targets.films.train.gradient_accumulation_steps: unknown field; did you mean "
            "micro_batch? (micro_batch is the number of rows of a pass, not of passes)",
        ),
    ),
    Mistake(
        "lr beside train",
        (TRAIN, TRAIN + "\n    lr: 1e-3"),
        ("targets.films.lr: unknown field; did you mean targets.films.train.lr?",),
    ),
    Mistake(
        "batch_size of the whole job",
        (TECHNIQUES, TECHNIQUES + "\nbatch_size: 8"),
        ("batch_size: unknown field; did you mean ", "targets.NAME.train.global_batch"),
    ),
    Mistake(
        "seeds of the whole job",
        ("fanout: {seeds: 2}", "seeds: 2"),
        ("seeds: unknown field; did you mean seed or fanout.seeds?",),
    ),
    Mistake(
        "model",
        (BACKBONE, BACKBONE.replace("backbone", "model")),
        ("sources.reviews.model: unknown field; did you mean backbone?",),
    ),
    Mistake(
        "num_labels",
        (OBJECTIVE, OBJECTIVE.replace("classification", "{classification: {num_labels: 2}}")),
        ("num_labels: unknown option of classification; classes are found in the training rows",),
    ),
    Mistake(
        "max_length",
        ("{length: 16, vocabulary: 300}", "{max_length: 16}"),
        ("max_length: unknown option of text; did you mean length?",),
    ),
    Mistake(
        "the rank of LoRA",
        (TECHNIQUES, "techniques: [scratch, {lora: {r: 8}}]"),
        ("techniques.1.lora.r: unknown option of lora; did you mean rank?",),
    ),
    Mistake(
        "label as AutoGluon has it",
        (OBJECTIVE, f"{OBJECTIVE}    label: label\n"),
        (
            "targets.films.label: unknown field; did you mean targets.films.data.columns? "
            "(columns: {text: NAME, label: NAME})",
        ),
    ),
    Mistake(
        "text_column of the data",
        (FILMS, f"{FILMS}\n      text_column: text"),
        ("targets.films.data.text_column: unknown field; did you mean columns? (columns: {text: ",),
    ),
    Mistake(
        "split of the data",
        (FILMS, f"{FILMS}\n      split: 0.2"),
        ("targets.films.data.split: unknown field; did you mean split_column or test_fraction?",),
    ),
    Mistake(
        "label_smoothing of train",
        (TRAIN, "    train: {steps: 4, label_smoothing_factor: 0.1}"),
        ("did you mean objective: {classification: {label_smoothing: ...}}",),
    ),
    Mistake(
        "max_length of the data",
        (FILMS, f"{FILMS}\n      max_length: 128"),
        ("data.max_length: unknown field; did you mean ", "modality: {text: {length: ...}}"),
    ),
    Mistake(
        "time_limit",
        (TECHNIQUES, f"{TECHNIQUES}\ntime_limit: 600"),
        ("time_limit: unknown field; train.steps or train.epochs limits a training, ",),
    ),
    Mistake(
        "presets",
        (TECHNIQUES, f"{TECHNIQUES}\npresets: best_quality"),
        ("presets: unknown field; sources, techniques and train say what is tried: leave it out",),
    ),
    Mistake(
        "report_to",
        (TECHNIQUES, f"{TECHNIQUES}\nreport_to: wandb"),
        ("report_to: unknown field; did you mean tracking?",),
    ),
]

NAMES = [
    Mistake(
        "a model of the Hugging Face hub",
        (BACKBONE, "    backbone: bert-base-uncased"),
        ("unknown backbone 'bert-base-uncased'; did you mean hf-hub:bert-base-uncased",),
    ),
    Mistake(
        "a model of timm",
        (BACKBONE, "    backbone: resnet50"),
        ("unknown backbone 'resnet50'; did you mean timm/resnet50 (random weights) or timm-hub:",),
    ),
    Mistake(
        "a model with its owner",
        (BACKBONE, "    backbone: google/bert_uncased_L-2_H-128_A-2"),
        ("did you mean hf-hub:google/bert_uncased_L-2_H-128_A-2 (published weights)?",),
    ),
    Mistake(
        "an objective",
        (OBJECTIVE, OBJECTIVE.replace("classification", "text-classification")),
        ("unknown objective 'text-classification'; did you mean classification?",),
    ),
    Mistake(
        "an objective that there is not",
        (OBJECTIVE, OBJECTIVE.replace("classification", "summarization")),
        ("unknown objective 'summarization'; no objective generates a text from an input",),
    ),
    Mistake(
        "a metric that there is not",
        (OBJECTIVE, f"{OBJECTIVE}    metric: bleu\n"),
        ("targets.films.metric: unknown metric 'bleu'; no metric compares written texts",),
    ),
    Mistake(
        "a metric",
        (OBJECTIVE, f"{OBJECTIVE}    metric: f1\n"),
        ("targets.films.metric: unknown metric 'f1'; did you mean macro_f1 or entity_f1"),
    ),
    Mistake(
        "a technique",
        (TECHNIQUES, "techniques: [scratch, finetune]"),
        ("techniques.1: unknown technique 'finetune'; did you mean full?",),
    ),
    Mistake(
        "a modality",
        ("      modality: text\n", "      modality: nlp\n"),
        ("targets.films.data.modality: unknown modality 'nlp'; did you mean text?",),
    ),
    Mistake(
        "a role",
        (TARGET_COLUMNS, TARGET_COLUMNS.replace("label: label", "target: label")),
        ("targets.films.data.columns.target: unknown role; did you mean label?",),
    ),
    Mistake(
        "a source",
        (OBJECTIVE, f"{OBJECTIVE}    sources: [review]\n"),
        ("unknown source 'review'; did you mean reviews?",),
    ),
    Mistake(
        "a technique in capitals",
        (TECHNIQUES, "techniques: [scratch, LoRA]"),
        ("techniques.1: unknown technique 'LoRA'; did you mean lora?",),
    ),
    Mistake(
        "a library of techniques",
        (TECHNIQUES, "techniques: [scratch, peft]"),
        ("techniques.1: unknown technique 'peft'; did you mean lora or bottleneck?",),
    ),
    Mistake(
        "multiclass",
        (OBJECTIVE, OBJECTIVE.replace("classification", "multiclass")),
        ("unknown objective 'multiclass'; did you mean classification?",),
    ),
    Mistake(
        "a baseline of scikit-learn",
        (TECHNIQUES, f"{TECHNIQUES}\nbaselines: [random_forest]"),
        ("baselines.0: unknown baseline 'random_forest'; did you mean boosted_trees?",),
    ),
    Mistake(
        "an address of the Hugging Face hub",
        (BACKBONE, "    backbone: https://huggingface.co/google-bert/bert-base-uncased"),
        ("did you mean hf-hub:google-bert/bert-base-uncased (published weights)?",),
    ),
    Mistake(
        "a folder of a model",
        (BACKBONE, "    backbone: ./bert"),
        (
            "unknown backbone './bert'; did you mean hf:./bert (a folder of Hugging Face) or bundle:",
        ),
    ),
    Mistake(
        "a checkpoint as a model of a library",
        (BACKBONE, "    backbone: transformers/bert-base-uncased"),
        ("unknown transformers model 'bert-base-uncased'; did you mean hf-hub:bert-base-uncased",),
    ),
]

TYPES = [
    Mistake(
        "one technique in the place of a list",
        (TECHNIQUES, "techniques: lora"),
        ("techniques: Input should be a valid list (got 'lora'); write [lora]",),
    ),
    Mistake(
        "a list of columns",
        (TARGET_COLUMNS, TARGET_COLUMNS.replace("{text: text, label: label}", "[text, label]")),
        ("targets.films.data.columns: Input should be a mapping; write columns: {text: NAME, ",),
    ),
    Mistake(
        "the file in the place of the data",
        (f"    data:\n{FILMS}\n{TARGET_COLUMNS}", "    data: films.csv"),
        ("targets.films.data: Input should be a mapping (got 'films.csv'); write data: {uri: ",),
    ),
    Mistake(
        "a list of seeds",
        ("fanout: {seeds: 2}", "fanout: {seeds: [0, 1]}"),
        ("fanout.seeds: Input should be a valid integer; write one value, not a list",),
    ),
    Mistake(
        "a share with a percent sign",
        ("test_fraction: 0.3", "test_fraction: 30%"),
        ("data.test_fraction: ", "(got '30%'); write 0.3"),
    ),
    Mistake(
        "a name of two words",
        ("name: mine", "name: my job"),
        ("name: Input should be a name (got 'my job'); use only letters, digits and . - _",),
    ),
    Mistake(
        "a rate with a comma",
        (TRAIN, "    train:\n      lr: 0,001"),
        ("targets.films.train.lr: Input should be a valid number", "'0,001'"),
    ),
    Mistake(
        "no seeds",
        ("fanout: {seeds: 2}", "fanout: {seeds: 0}"),
        ("fanout.seeds: Input should be greater than or equal to 1 (got 0)",),
    ),
    Mistake(
        "a label fraction in percent",
        (OBJECTIVE, f"{OBJECTIVE}    label_fractions: [5.0]\n"),
        ("targets.films.label_fractions.0: a share is above 0 and at most 1.0",),
    ),
    Mistake(
        "one beside shares",
        (OBJECTIVE, f"{OBJECTIVE}    label_fractions: [0.1, 1]\n"),
        ("label_fractions.1: 1 is one row of each class here", "write 1.0"),
    ),
    Mistake(
        "steps and epochs",
        (TRAIN, "    train: {steps: 4, epochs: 2}"),
        ("targets.films.train: give steps or epochs, not both",),
    ),
    Mistake(
        "a share in percent",
        ("test_fraction: 0.3", "test_fraction: 20"),
        ("targets.films.data.test_fraction: Input should be less than 1 (got 20)",),
    ),
    Mistake(
        "true in the place of a number",
        (TRAIN, "    train: {steps: true}"),
        ("targets.films.train.steps: true and false are no value here",),
    ),
    Mistake(
        "a range of Ray Tune",
        ("fanout: {seeds: 2}", "fanout: {search: {lr: loguniform(1e-4, 1e-2)}}"),
        ("fanout.search: lr needs a range, [low, high]", "e.g. {lr: [1e-4, 1e-2]}"),
    ),
    Mistake(
        "a search without trials",
        ("fanout: {seeds: 2}", "fanout: {search: {lr: [1e-4, 1e-2]}}"),
        ("fanout.search: search needs trials above 1, e.g. trials: 8",),
    ),
]

YAML = [
    Mistake(
        "a tab",
        (
            "    objective: classification\n    train: {steps: 4, global_batch: 8, lr: 1e-3}",
            "\tobjective: classification",
        ),
        ("not valid YAML: ", "YAML is indented by spaces, this line holds a tab"),
    ),
    Mistake(
        "a key twice",
        (TECHNIQUES, f"{TECHNIQUES}\n{TECHNIQUES}"),
        ("techniques: this key stands here twice; remove one",),
    ),
    Mistake(
        "an open bracket",
        (TECHNIQUES, "techniques: [scratch, full"),
        ("not valid YAML: ",),
        has_line=False,
    ),
    Mistake(
        "no mapping", (JOB, "- scratch\n"), ("a job is a mapping with name, sources and targets",)
    ),
    Mistake(
        "a variable that is not set",
        (FILMS, "      uri: ${NOT_SET_ANYWHERE}/films.csv"),
        ("targets.films.data.uri: environment variable NOT_SET_ANYWHERE is not set",),
    ),
]

FILES = [
    Mistake(
        "no such file",
        (FILMS, "      uri: movies.csv"),
        ("targets.films.data.uri: movies.csv: no such file, folder or glob (looked for ",),
    ),
    Mistake(
        "an empty file",
        None,
        ("targets.films: ", "films.csv: the file is empty (0 bytes)"),
        {"films.csv": b""},
    ),
    Mistake(
        "semicolons",
        None,
        ("films.csv: its fields are separated by semicolons", "--set delimiter=';'"),
        {"films.csv": csv(delimiter=";")},
    ),
    Mistake(
        "Latin-1",
        None,
        ("films.csv row ", "it looks like Latin-1: convert the file (iconv -f LATIN1 -t UTF-8)"),
        {
            "films.csv": csv([(f"{text}, très bien".replace(",", ""), y) for text, y in ROWS])
            .decode()
            .encode("latin-1")
        },
    ),
    Mistake(
        "a folder of texts in Latin-1",
        (FILMS, "      uri: letters\n      format: documents"),
        ("bad/0.txt: not UTF-8 text (", "it looks like Latin-1: convert the file (iconv -f LAT"),
        {
            f"letters/{word}/{i}.txt": f"c'est {word}, très bien".encode("latin-1")
            for word in ("good", "bad")
            for i in range(10)
        },
    ),
    Mistake(
        "one JSON list",
        (FILMS, "      uri: films.json"),
        ("films.json: it holds one JSON list, and JSON Lines has one object a line",),
        {"films.json": b'[{"text": "a", "label": "b"},\n {"text": "c", "label": "d"}]\n'},
        has_line=False,
    ),
    Mistake(
        "a spreadsheet",
        (FILMS, "      uri: films.xlsx"),
        ("films.xlsx: no files of a known kind (", "save the sheet as CSV"),
        {"films.xlsx": b"PK"},
        has_line=False,
    ),
    Mistake(
        "a spreadsheet called CSV",
        None,
        ("films.csv: its content is a spreadsheet or zip archive, not text: save the sheet as ",),
        {"films.csv": b"PK\x03\x04\x14\x00"},
    ),
    Mistake(
        "a path below the home folder",
        (FILMS, "      uri: ~/films.csv"),
        ("targets.films.data.uri: ~/films.csv: no such file", "; write ${HOME}/films.csv"),
    ),
    Mistake(
        "a path of Windows",
        (FILMS, "      uri: data\\films.csv"),
        ("targets.films.data.uri: ", "; write data/films.csv"),
    ),
    Mistake(
        "a data set of the hub",
        (FILMS, "      uri: stanfordnlp/imdb"),
        ("first run: onetomany prepare hf stanfordnlp/imdb -o FOLDER",),
    ),
    Mistake(
        "a blank in the header",
        None,
        ("targets.films.data.columns.label: ", "has no column 'label'; did you mean ' label'?"),
        {"films.csv": csv(header="text, label")},
    ),
    Mistake(
        "a number as a class",
        None,
        ("to estimate numbers, write objective: regression and columns: {value: label}",),
        {"films.csv": csv([(text, f"{i / 7:.6f}") for i, (text, _) in enumerate(ROWS)])},
    ),
    Mistake(
        "a stray file among images",
        (FILMS, "      uri: pictures"),
        (
            "pictures: files of several kinds (csv, images); ",
            "labels.csv is csv",
            "or set format: images, which leaves the other files of a folder out",
        ),
        {"pictures/cat/1.png": b"", "pictures/labels.csv": b"a\n1\n"},
        has_line=False,
    ),
    Mistake(
        "a column that is not there",
        (TARGET_COLUMNS, TARGET_COLUMNS.replace("text: text,", "text: texts,")),
        ("targets.films.data.columns.text: ", "has no column 'texts'; did you mean text?"),
    ),
    Mistake(
        "other names of splits",
        (FILMS, f"{FILMS}\n      split_column: part"),
        ("targets.films.data.split_column: no row of part is ['train']; it holds ", "split_values"),
        {
            "films.csv": csv(
                [(*row, ("learn", "probe")[i % 3 == 0]) for i, row in enumerate(ROWS)],
                "text,label,part",
            )
        },
    ),
    Mistake(
        "no test rows",
        ("      test_fraction: 0.3\n", ""),
        ("targets.films.data: the test split is empty (", "give test files, a split_column or"),
    ),
    Mistake(
        "one class",
        None,
        ("targets.films.data, train split: column label: the training rows hold one label only",),
        {"films.csv": csv([row for row in ROWS if row[1] == "good"])},
    ),
    Mistake(
        "a label that only the test rows have",
        (f"{FILMS}\n      test_fraction: 0.3", "      train: films.csv\n      test: other.csv"),
        ("column label: label 'fine' is in no training row (2 labels known); ",),
        {"other.csv": csv([*ROWS, ("a fine film", "fine")])},
    ),
    Mistake(
        "rows without a label",
        (FILMS, "      uri: films.jsonl"),
        ("column label: ", " have no label (null)", "data.where: {label: [bad, good]}"),
        {
            "films.jsonl": b"".join(
                json.dumps({"text": text, "label": label if i < 40 else None}).encode() + b"\n"
                for i, (text, label) in enumerate(ROWS)
            )
        },
        has_line=False,
    ),
    Mistake(
        "a group in two splits",
        (
            f"{FILMS}\n      test_fraction: 0.3",
            f"{FILMS}\n      group: person\n      split_column: part",
        ),
        ("targets.films.data.group: ", "of person are in more than one split"),
        {
            "films.csv": csv(
                [(*row, str(i % 4), ("train", "test", "dev")[i % 3]) for i, row in enumerate(ROWS)],
                "text,label,person,part",
            )
        },
    ),
    Mistake(
        "a share of test rows beside a column that names them",
        (FILMS, f"{FILMS}\n      split_column: part"),
        ("job.yaml:17: targets.films.data.test_fraction: column part names 20 test rows",),
        {
            "films.csv": csv(
                [(*row, ("train", "test", "dev")[i % 3]) for i, row in enumerate(ROWS)],
                "text,label,part",
            )
        },
    ),
    Mistake(
        "a batch of more rows than there are",
        ("global_batch: 8, lr: 1e-3", "global_batch: 512"),
        ("sources.reviews: ", "global_batch"),
    ),
]

FITS = [
    Mistake(
        "an objective of another modality",
        (OBJECTIVE, OBJECTIVE.replace("classification", "detection")),
        ("targets.films.data.columns: role 'boxes' has no column; say columns: {boxes: NAME}",),
    ),
    Mistake(
        "a backbone of another modality",
        (BACKBONE, "    backbone: timm/resnet18"),
        (
            "sources.reviews.backbone: timm/resnet18 reads rows of modality image, and "
            "data.modality is text: take one that reads text (transformers/bert, ",
        ),
    ),
    Mistake(
        "columns that are swapped",
        (
            TARGET_COLUMNS,
            TARGET_COLUMNS.replace("text: text, label: label", "text: label, label: text"),
        ),
        (
            "column text: a label is in no training row",
            "They look like sentences: if the columns of text and label are swapped, write",
        ),
    ),
    Mistake(
        "a folder that is no bundle",
        (BACKBONE, "    backbone: 'bundle:.'"),
        ("sources.reviews", "manifest.json"),
    ),
    Mistake(
        "a folder without a model",
        (BACKBONE, "    backbone: 'hf:.'"),
        ("sources.reviews", "config.json"),
    ),
]

COMMAND = [
    Mistake(
        "--set without a value",
        None,
        ("--set fanout.seeds: write --set a.b=value",),
        words=("--set", "fanout.seeds"),
        has_line=False,
    ),
    Mistake(
        "--set of a field that is not there",
        None,
        ("targets.films.train.stepz: unknown field; did you mean steps? (from --set ",),
        words=("--set", "targets.films.train.stepz=3"),
        has_line=False,
    ),
]

NO_KEYS = {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_SHARED_CREDENTIALS_FILE": "none",
    "AWS_CONFIG_FILE": "none",
    "AWS_EC2_METADATA_DISABLED": "true",
}
NO_SERVER = NO_KEYS | {"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "mine"}
"""No program listens on port 1."""

S3 = [
    Mistake(
        "rows on S3 without credentials",
        (FILMS, "      uri: s3://mine/films.parquet"),
        (
            "targets.films: cannot look at s3://mine/films.parquet: Unable to locate credentials; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        ),
        aws=NO_KEYS,
    ),
    Mistake(
        "results on S3 without credentials",
        ("storage: runs", "storage: s3://mine/runs"),
        ("storage: cannot write s3://mine/runs/mine/", "set AWS_ACCESS_KEY_ID and "),
        aws=NO_KEYS,
    ),
    Mistake(
        "an endpoint that does not answer",
        (FILMS, "      uri: s3://mine/films.parquet"),
        (
            "targets.films: cannot look at s3://mine/films.parquet: Could not connect to the "
            "endpoint URL: ",
            "check that AWS_ENDPOINT_URL is right and that its server runs and run again",
        ),
        aws=NO_SERVER,
    ),
    Mistake(
        "rows in a bucket that is not there",
        (FILMS, "      uri: s3://mine/films.parquet"),
        (
            "targets.films: cannot list s3://mine/films.parquet: The specified bucket does not "
            "exist; check the bucket, the key and AWS_ENDPOINT_URL",
        ),
    ),
    Mistake(
        "results in a bucket that is not there",
        ("storage: runs", "storage: s3://mine/runs"),
        (
            "storage: cannot write s3://mine/runs/mine/",
            "The specified bucket does not exist; check the bucket, the key and AWS_ENDPOINT_URL",
        ),
    ),
]

MISTAKES = [*KEYS, *NAMES, *TYPES, *YAML, *FILES, *FITS, *COMMAND, *S3]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(JOB)
    for name in ("reviews.csv", "films.csv"):
        (tmp_path / name).write_bytes(csv())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_variables(aws, request, monkeypatch):
    """Set these AWS_* variables alone, or with None those of the tests' S3 server."""
    if aws is None:
        request.getfixturevalue("s3_server")
        return
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in aws.items():
        monkeypatch.setenv(name, value)


def said_of(*words: str, code: int) -> str:
    """What the command says on the terminal, ended with a code."""
    ended = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert ended.exit_code == code, ended.output
    assert "Traceback" not in ended.output
    return ended.stderr


def test_the_job_without_a_mistake_is_right(folder):
    assert "error" not in said_of("run", "job.yaml", "--dry-run", code=0)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda one: one.name.replace(" ", "_"))
def test_what_is_said_of_a_mistake(folder, mistake, request, monkeypatch):
    text = JOB
    if mistake in S3:
        request.getfixturevalue("fast")
        set_variables(mistake.aws, request, monkeypatch)
    for name, content in mistake.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if mistake.typed:
        right, wrong = mistake.typed
        assert text.count(right) == 1, "the mistake is made in one place"
        text = text.replace(right, wrong)
        (folder / "job.yaml").write_text(text)
    message = said_of("run", "job.yaml", "--dry-run", *mistake.words, code=2)
    errors = [line for line in message.splitlines() if line.startswith("error: ")]
    assert errors, message
    line = next((one for one in errors if all(part in one for part in mistake.said)), "")
    assert line, message
    if mistake.has_line:
        found = re.match(r"error: job\.yaml:(\d+): ([^\s:,]+)", line)
        assert found, line
        named = text.splitlines()[int(found[1]) - 1]
        is_field = found[2].replace(".", "").isidentifier() and not line.count("not valid YAML")
        assert not is_field or any(part in named for part in found[2].split(".")), (line, named)


def test_there_are_forty_mistakes_and_more():
    assert len({one.name for one in MISTAKES}) == len(MISTAKES) >= 40


def test_an_error_of_a_run_names_the_line_that_was_read(folder, capsys):
    """The file may be edited or moved while the job runs."""
    with pytest.raises(typer.Exit), cli._exit_codes(job=Path("job.yaml")):
        Path("job.yaml").unlink()
        raise ValueError("targets.films.data.uri: there are no rows")
    line = JOB.splitlines().index("      uri: films.csv") + 1
    assert f"error: job.yaml:{line}: targets.films.data.uri: there are no rows" in (
        capsys.readouterr().err
    )


# ---------------------------------------------------------------- other commands


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("run", "jobs.yaml"), 2, "jobs.yaml: no such job file"),
        (("report", "job.yaml"), 1, "no results of this job yet; run it first"),
        (("init", "films.csv", "--label", "x"), 2, "--label. Did you mean --target-column?"),
        (
            ("predict", "nowhere", "films.csv", "-o", "out"),
            2,
            "nowhere: no such folder; `onetomany run JOB.yaml` makes the folder of a job",
        ),
        (
            ("predict", "runs/film", "films.csv", "-o", "out"),
            2,
            "runs/film: no such folder; did you mean runs/films?",
        ),
        (("predict", ".", "films.csv", "-o", "out"), 2, "manifest.json"),
        (("export", ".", "out"), 2, "manifest.json"),
        (("run", "films.csv"), 2, "not a job file (.yaml); `onetomany init films.csv` writes one"),
        (("run", "."), 2, ".: a folder; name the job file (.yaml)"),
        (("train", "job.yaml"), 2, "No such command 'train'. Did you mean 'run'?"),
        (("predict", "job.yaml", "films.csv", "-o", "out"), 2, "no trial has finished here"),
        (("techniques", "finetune"), 2, "unknown technique 'finetune'; did you mean full?"),
        (("prepare", "csvs", "films.csv", "-o", "out"), 2, "did you mean csv?"),
        (
            ("prepare", "mimic3", "records", "-o", "out"),
            2,
            "records: this is MIMIC-IV (icu/icustays.csv has a column stay_id), and mimic3 reads "
            "MIMIC-III; run onetomany prepare mimic4",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_what_other_commands_say(folder, words, code, said):
    (folder / "runs" / "films").mkdir(parents=True)
    for name, column in (("hosp/patients", "subject_id"), ("icu/icustays", "stay_id")):
        (folder / "records" / name).parent.mkdir(parents=True)
        (folder / "records" / f"{name}.csv").write_text(f"{column}\n1\n")
    assert said in said_of(*words, code=code)
