"""Runs in a tracker: what they hold, that nothing is logged twice, and that a tracker ends no job."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import defaultdict
from contextlib import nullcontext, suppress
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from toys import task_of
from typer.testing import CliRunner

from pipeline import api, cli
from pipeline.checkpoints import bundle
from pipeline.config import yaml_loader
from pipeline.config.schema import ComponentConfig, Job, JobError, spec_hash
from pipeline.core.specs import ModalitySpec
from pipeline.io import storage
from pipeline.report import matrix
from pipeline.report.trial_record import CurvePoint, TrialRecord
from pipeline.train.source import SourceStage
from pipeline.transfer import tracking
from tests.report.test_report import failure, trial
from tests.transfer.test_live_page import Lines, planned_trial

SECRET = "hunter2-token"


def job_at(root, **config):
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(root),
            "sources": {"garments": {"backbone": "file:garments.pt"}},
            "targets": {
                "clothing": {
                    "data": {
                        "uri": f"https://me:{SECRET}@data.example/rows.parquet?sig={SECRET}",
                        "modality": "image",
                        "columns": {"image": "image", "label": "label"},
                    },
                    "objective": "classification",
                    "train": {"steps": 40, "lr": 0.01},
                }
            },
            **config,
        }
    )


needs_mlflow = pytest.mark.skipif(
    find_spec("mlflow") is None or find_spec("sqlalchemy") is None,
    reason="extra mlflow is not installed, or SQLAlchemy, which MLflow's database needs",
)


@pytest.fixture(scope="module")
def task():
    state = {"values": [0, 1], "labels": ["cat", "dog"]}
    return task_of("timm/test_vit", {"channels": 3, "size": 32}, "classification", state, seed=0)


@pytest.fixture
def ended(tmp_path, task, monkeypatch):
    """A job's state, two trials that ended well and one that failed, and its outcome."""
    monkeypatch.chdir(tmp_path)  # MLflow puts the files of a database's runs into mlruns/ here
    job = job_at(tmp_path, tracking={"mlflow": {"uri": f"sqlite:///{tmp_path}/runs.db"}})
    stage = SourceStage(job, "garments", job.sources["garments"], None, "key")
    modality = ModalitySpec("image", {"size": 32, "channels": 3}, {})
    bundle.save(stage.bundle_uri, task, modality, metrics={"accuracy": 0.75})
    log = Path(stage.uri, "log", "metrics.jsonl")
    log.parent.mkdir(parents=True)
    lines = [
        {"time": 1000.0 + step, "step": step, "steps": 30, "loss": 1 / step, "unit": "rows"}
        for step in (10, 20, 30)
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3')
    trials, rows = [], []
    for technique, level in (("scratch", 0.6), ("full", 0.8)):
        source = "none" if technique == "scratch" else "garments"
        made, _, curve = trial("clothing", source, technique, "1.0", 0, level)
        made = [replace(row, value_low=row.value - 0.1, value_high=row.value + 0.1) for row in made]
        one = planned_trial(source, technique, 0, made[0].trial_id)
        points = tuple(CurvePoint(p.step, dict(p.metrics)) for p in curve)
        write(job, one, TrialRecord(one.id, rows=tuple(made), curve=points, run="first"))
        trials.append(one)
        rows += [replace(row, gain=0.2, gain_low=0.1, gain_high=0.3) for row in made]
    lost = planned_trial("garments", "lora", 0, "lost")
    row = failure("clothing", "no memory", "lost")
    write(job, lost, TrialRecord("lost", status="failed", error="no memory", rows=(row,)))
    for name in ("report.html", "report.md", "results.parquet"):
        Path(job.root, name).write_text(name)
    outcome = api.Outcome(
        bundles={"garments": stage.bundle_uri},
        rows=rows,
        report=storage.join(job.root, "report.html"),
        results=storage.join(job.root, "results.parquet"),
    )
    state = SimpleNamespace(job=job, progress=Lines(), sources={"garments": stage})
    return SimpleNamespace(state=state, trials=[*trials, lost], outcome=outcome)


def write(job, one, record):
    storage.write_json(storage.join(job.root, f"{one.folder}/record.json"), record.to_json())


def run(ended, report=True):
    """A run of the job in which everything ends, or is found done."""
    with tracking.follow(ended.state) as track:
        ended.state.progress.on_end(list(ended.state.sources.values()))
        ended.state.progress.on_end(ended.trials[:1])
        ended.state.progress.on_end(ended.trials)
        if report:
            track(ended.outcome)


def client(ended):
    import mlflow

    return mlflow.MlflowClient(ended.state.job.tracking.options["uri"])


def runs(ended):
    """Name to run of all runs that are there."""
    found = client(ended)
    (experiment,) = (one for one in found.search_experiments() if one.name == "toy")
    listed = found.search_runs([experiment.experiment_id])
    assert len({one.info.run_name for one in listed}) == len(listed)
    return {one.info.run_name: one for one in listed}


@pytest.mark.slow
@needs_mlflow
def test_a_run_for_the_job_and_nested_ones_for_its_parts(ended):
    run(ended)
    assert ended.state.progress.notes == []
    found = runs(ended)
    names = {"toy", "garments", *(one.name for one in ended.trials)}
    assert found.keys() == names
    job, source = found["toy"], found["garments"]
    assert all(
        one.data.tags["mlflow.parentRunId"] == job.info.run_id
        for name, one in found.items()
        if name != "toy"
    )
    full = next(one for name, one in found.items() if "/full/" in name)
    params = full.data.params
    assert params["train.lr"] == "0.01" and params["technique"] == "full" and params["seed"] == "0"
    test_row = next(row for row in ended.outcome.rows if "full" in row.trial_id)
    metrics = full.data.metrics
    assert metrics["test/accuracy"] == test_row.value
    assert metrics["test/accuracy_low"] == test_row.value_low
    assert metrics["gain/accuracy_high"] == 0.3 and metrics["seconds"] == test_row.seconds
    curve = client(ended).get_metric_history(full.info.run_id, "validation_accuracy")
    assert [point.step for point in curve] == list(range(30, 301, 30))
    losses = client(ended).get_metric_history(source.info.run_id, "loss")
    assert [(one.step, one.value, one.timestamp) for one in losses] == [
        (step, 1 / step, 1_000_000 + 1000 * step) for step in (10, 20, 30)
    ]
    assert source.data.metrics["validation/accuracy"] == 0.75
    lost = next(one for name, one in found.items() if "/lora/" in name)
    assert lost.info.status == "FAILED" and lost.data.params["error"] == "no memory"
    assert job.info.status == full.info.status == "FINISHED"
    files = {one.path for one in client(ended).list_artifacts(job.info.run_id)}
    assert files == {"report.html", "report.md", "results.parquet"}


@needs_mlflow
def test_a_run_that_goes_on_continues_the_same_runs(ended, tmp_path):
    """And no secret is written or sent."""
    whole = ended.trials
    ended.trials = whole[:1]
    run(ended, report=False)
    before = {name: one.info.run_id for name, one in runs(ended).items()}
    ended.trials = whole
    run(ended)
    run(ended)
    found = runs(ended)
    assert (
        len(found) == 5 and before.items() <= {n: r.info.run_id for n, r in found.items()}.items()
    )
    source = found["garments"].info.run_id
    database = ended.state.job.tracking.options["uri"].removeprefix("sqlite:///")
    with sqlite3.connect(database) as tables:
        count = "select count(*) from metrics where run_uuid = ? and key = 'loss'"
        assert tables.execute(count, (source,)).fetchone() == (3,), "each step once"
    assert found["toy"].data.params["targets.clothing.data.uri"] == (
        "https://***@data.example/rows.parquet?***"
    )
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.slow
@needs_mlflow
def test_a_trial_that_was_made_anew_replaces_its_run(ended):
    run(ended)
    first = runs(ended)
    one = ended.trials[1]
    path = Path(ended.state.job.root, one.folder, "record.json")
    record = TrialRecord.from_json(json.loads(path.read_text()))
    write(ended.state.job, one, replace(record, run="second"))
    run(ended)
    second = runs(ended)
    changed = [name for name in first if first[name].info.run_id != second[name].info.run_id]
    assert first.keys() == second.keys() and changed == [one.name]
    assert second[one.name].data.metrics["gain/accuracy"] == 0.2


@pytest.mark.slow
@needs_mlflow
def test_what_was_cut_off_in_the_middle_is_logged_anew(ended, monkeypatch):
    from pipeline.transfer.trackers.mlflow import MLflow

    log = MLflow.log
    with monkeypatch.context() as patch:
        patch.setattr(
            MLflow, "log", lambda self, run_id, points: log(self, run_id, points[:1]) or 1 / 0
        )
        run(ended)
    assert (
        len(ended.state.progress.notes) == 1
        and "ZeroDivisionError" in ended.state.progress.notes[0]
    )
    cut = runs(ended)["garments"].info.run_id
    run(ended)
    found = runs(ended)
    assert len(found) == 5 and found["garments"].info.run_id != cut
    assert len(client(ended).get_metric_history(found["garments"].info.run_id, "loss")) == 3


@pytest.mark.slow
@needs_mlflow
def test_a_run_that_was_deleted_is_logged_anew(ended):
    run(ended)
    name = ended.trials[1].name
    client(ended).delete_run(runs(ended)[name].info.run_id)
    ended.outcome.rows = [replace(row, gain=0.25) for row in ended.outcome.rows]
    run(ended)
    assert ended.state.progress.notes == [] and name not in runs(ended)
    run(ended)
    found = runs(ended)
    assert ended.state.progress.notes == [] and len(found) == 5
    assert found[name].data.metrics["gain/accuracy"] == 0.25


class Recorder:
    """A tracker in memory."""

    registered_name = "recorder"
    options = SimpleNamespace(bundles=True)

    def __init__(self):
        self.begun, self.ended, self.files, self.points = [], [], [], []

    def begin(self, run, replaces=None):
        self.begun.append(run)
        return f"id of {run.key}"

    def exists(self, run_id):
        return True

    resume = exists

    def log(self, run_id, points):
        self.points += [(run_id, point.name, point.value) for point in points]

    def upload(self, run_id, path, folder=""):
        self.files.append((run_id, folder or path.name))

    def end(self, run_id, status, ended):
        self.ended.append((run_id, status))

    def close(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(tracking, "tracker_of", lambda job: made)
    return made


def test_what_cannot_be_read_is_left_out_and_all_else_is_logged(ended, recorder):
    bundle_uri = ended.outcome.bundles["garments"]
    Path(bundle_uri, "manifest.json").write_text("{")
    Path(ended.outcome.results).unlink()
    log = Path(ended.state.job.root, ended.trials[0].folder, "metrics.jsonl")
    log.mkdir()
    run(ended)
    assert [one.name for one in recorder.begun] == ["toy", *(one.name for one in ended.trials[1:])]
    assert {name for _, name in recorder.files} == {"report.html", "report.md"}
    assert recorder.ended[-1] == ("id of job", "done")
    (note,) = ended.state.progress.notes
    assert note.startswith(
        "warning: tracking: not logged, because it cannot be read: source garments: "
    )
    assert "more)" in note


def test_means_of_scratch_networks_of_two_backbones_are_all_logged(ended, recorder):
    rows, tested, _ = trial("clothing", "none", "scratch", "1.0", 0, 0.6)
    ended.outcome.entries = [
        entry
        for backbone in ("timm/resnet18", "timm/vit")
        for entry in matrix.matrix_entries(
            [replace(row, backbone=backbone) for row in rows], {rows[0].trial_id: tested}
        )
    ]
    run(ended)
    means = [name for _, name, _ in recorder.points if name.endswith("scratch/1.0/accuracy")]
    assert sorted(means) == [
        "clothing/none/timm/resnet18/scratch/1.0/accuracy",
        "clothing/none/timm/vit/scratch/1.0/accuracy",
    ]


def test_a_long_upload_has_a_longer_patience(ended, recorder, monkeypatch):
    began, may_end, waits = threading.Event(), threading.Event(), []
    join = threading.Thread.join

    def upload(run_id, path, folder=""):
        began.set()
        assert may_end.wait(60)

    def waited(self, timeout=None):
        if self.name != "tracking":
            return join(self, timeout)
        waits.append(timeout)
        if timeout < 100:
            return began.wait(timeout)
        may_end.set()
        return join(self, timeout)

    recorder.upload = upload
    monkeypatch.setattr(tracking, "SLOWEST_UPLOAD", 0.01)
    monkeypatch.setattr(threading.Thread, "join", waited)
    with tracking.follow(ended.state, patience=20) as track:
        track(ended.outcome)
    may_end.set()
    size = len("report.html")
    assert ended.state.progress.notes == [] and 20 + 100 * size in waits


def test_a_run_that_is_stopped_leaves_the_rest_to_the_next_one(ended, recorder, monkeypatch):
    began, may_end = threading.Event(), threading.Event()
    begin, join = recorder.begin, threading.Thread.join

    def first(run, replaces=None):
        if run.kind == "trial":
            began.set()
            assert may_end.wait(60)
        return begin(run, replaces)

    def waited(self, timeout=None):
        may_end.set()
        return join(self, 60)

    recorder.begin = first
    with pytest.raises(KeyboardInterrupt), tracking.follow(ended.state) as track:
        ended.state.progress.on_end(ended.trials)
        ended.state.progress.on_end(list(ended.state.sources.values()))
        track(ended.outcome)
        assert began.wait(60)
        monkeypatch.setattr(threading.Thread, "join", waited)
        raise KeyboardInterrupt
    monkeypatch.setattr(threading.Thread, "join", join)
    assert [one.name for one in recorder.begun] == ["toy", ended.trials[0].name]
    assert recorder.ended[-1] == ("id of job", "stopped") and recorder.files == []
    run(ended)
    assert ended.state.progress.notes == [] and len(recorder.begun) == 5


def test_a_job_that_returns_to_a_place_goes_on_with_its_runs_there(ended, recorder, monkeypatch):
    job, read = ended.state.job, []
    points = tracking.curve_points
    monkeypatch.setattr(tracking, "curve_points", lambda uri: read.append(uri) or points(uri))
    for place in ("a", "b", "a"):
        config = ComponentConfig(name="mlflow", options={"uri": f"https://{place}.example"})
        ended.state.job = job.model_copy(update={"tracking": config})
        run(ended)
    assert len(recorder.begun) == 2 * 5
    assert len(read) == 2 * 4, "what is logged is not read again"


class Broken:
    """A tracker that raises, or never answers."""

    registered_name = "broken"
    options = SimpleNamespace()

    def __init__(self, waits=None):
        self.waits, self.calls = waits, 0

    def begin(self, run, replaces=None):
        self.calls += 1
        if self.waits is not None:
            self.waits.wait(60)
        raise ConnectionError(f"https://me:{SECRET}@runs.example/?token={SECRET} refused\nmore")


def test_a_tracker_that_fails_is_one_warning(ended, monkeypatch):
    broken = Broken()
    monkeypatch.setattr(tracking, "tracker_of", lambda job: broken)
    run(ended)
    assert broken.calls == 1
    (note,) = ended.state.progress.notes
    assert "tracking: broken failed (ConnectionError: https://***@runs.example/?***" in note
    assert SECRET not in note and "more" not in note
    assert not storage.exists(storage.join(ended.state.job.root, tracking.FILE))


def test_a_tracker_that_hangs_holds_up_no_job(ended, monkeypatch):
    answers = threading.Event()
    monkeypatch.setattr(tracking, "tracker_of", lambda job: Broken(answers))
    began = time.monotonic()
    with tracking.follow(ended.state, patience=0.1):
        ended.state.progress.on_end(ended.trials)
    assert time.monotonic() - began < 30
    (note,) = ended.state.progress.notes
    assert "took nothing for 0.1 seconds" in note
    answers.set()


@pytest.mark.slow
@needs_mlflow
def test_an_error_of_the_job_stops_its_run(ended):
    with pytest.raises(RuntimeError, match="of the job"), tracking.follow(ended.state):
        raise RuntimeError("of the job")
    assert runs(ended)["toy"].info.status == "KILLED"


def test_tracking_changes_no_hash_and_is_not_dumped(tmp_path):
    without = job_at(tmp_path)
    tracked = job_at(tmp_path, tracking={"mlflow": {"uri": f"https://me:{SECRET}@runs.example"}})
    assert spec_hash(without) == spec_hash(tracked)
    assert SECRET not in tracked.model_dump_json(exclude={"targets"})


def test_a_dry_run_says_what_is_not_installed(tmp_path, monkeypatch):
    from pipeline.transfer.trackers import mlflow

    job = job_at(tmp_path, tracking="mlflow")
    monkeypatch.setattr(mlflow, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "load", lambda file, overrides, elsewhere: job)
    monkeypatch.setattr(api, "open_job", lambda *_: nullcontext(SimpleNamespace(job=job)))
    file = tmp_path / "job.yaml"
    file.write_text("name: toy\ntracking: mlflow\n")
    done = CliRunner().invoke(cli.app, ["run", str(file), "--dry-run"])
    assert done.exit_code == 2 and "uv pip install -e '.[mlflow]'" in done.output


def test_an_unknown_tracker_or_option_is_named_with_its_line(tmp_path):
    text = (Path(__file__).parents[2] / "jobs/text/first_steps.yaml").read_text()
    text = text.replace("../data", str(Path(__file__).parents[2] / "jobs/data"))
    for config, wanted in (("mlfow", "mlflow"), ("{mlflow: {experimnt: a}}", "experiment")):
        path = tmp_path / "job.yaml"
        path.write_text(f"{text}tracking: {config}\n")
        with pytest.raises(JobError, match=wanted):
            yaml_loader.load(path, [])


@pytest.fixture
def server(tmp_path):
    """The address of an MLflow server on this machine, with its own database."""
    pytest.importorskip("flask", reason="an MLflow server needs Flask")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--workers", "1"]
    words += ["--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port)]
    log = tmp_path / "server.log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", *words],
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
        yield SimpleNamespace(address=address, process=process)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@needs_mlflow
def test_a_real_server_on_this_machine_and_one_that_goes_away(ended, server):
    options = {"uri": server.address, "bundles": True}
    config = ComponentConfig(name="mlflow", options=options)
    ended.state.job = ended.state.job.model_copy(update={"tracking": config})
    whole = ended.trials
    ended.trials = whole[:1]
    run(ended, report=False)
    ended.trials = whole
    run(ended)
    assert ended.state.progress.notes == []
    found = runs(ended)
    assert len(found) == 5 and found["toy"].info.status == "FINISHED"
    files = {one.path for one in client(ended).list_artifacts(found["toy"].info.run_id)}
    assert files == {"report.html", "report.md", "results.parquet"}
    source = found["garments"].info.run_id
    assert {one.path for one in client(ended).list_artifacts(source, "bundle")} == {
        "bundle/manifest.json",
        "bundle/weights.safetensors",
    }
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    run(ended)
    (note,) = ended.state.progress.notes
    assert "tracking: mlflow failed" in note


class WandbServer:
    """What Weights & Biases' client and server do with runs and artifacts."""

    def __init__(self):
        self.runs, self.deleted, self.open, self.most_open = {}, set(), set(), 0
        self.artifacts = defaultdict(list)
        self.errors = ModuleType("wandb.errors")
        self.errors.UsageError = type("UsageError", (Exception,), {})
        self.client = ModuleType("wandb")
        self.client.__spec__ = ModuleSpec("wandb", None)
        self.client.init, self.client.Artifact = self.init, self.artifact

    def init(self, id, resume=None, name=None, **more):
        if id in self.deleted and resume is None:
            raise ConnectionError(f"run {id} was previously created and deleted")
        if resume == "must" and id not in self.runs:
            raise self.errors.UsageError(id)
        if resume is None:
            self.runs[id] = SimpleNamespace(name=name, summary={}, offline=False)
        made = self.runs[id]
        made.log = lambda values: None
        made.finish = lambda exit_code=0: self.open.remove(id)
        made.log_artifact = lambda one: self.artifacts[one.name].append(one) or one
        self.open.add(id)
        self.most_open = max(self.most_open, len(self.open))
        return made

    def artifact(self, name, type):
        made = SimpleNamespace(name=name, type=type, files=[], wait=lambda: None)
        made.add_file = lambda path, name: made.files.append(name)
        made.add_dir = lambda path: made.files.extend(one.name for one in Path(path).iterdir())
        return made

    def named(self, name):
        (found,) = (id for id, one in self.runs.items() if one.name == name)
        return found


@pytest.fixture
def wandb_server(ended, monkeypatch):
    made = WandbServer()
    monkeypatch.setitem(sys.modules, "wandb", made.client)
    monkeypatch.setitem(sys.modules, "wandb.errors", made.errors)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = ComponentConfig(name="wandb", options={"bundles": True})
    ended.state.job = ended.state.job.model_copy(update={"tracking": config})
    return made


def test_weights_and_biases_holds_no_run_open_and_a_bundle_is_one_artifact(ended, wandb_server):
    run(ended)
    assert ended.state.progress.notes == [] and len(wandb_server.runs) == 5
    assert wandb_server.open == set() and wandb_server.most_open == 2, "the job's and one more"
    one = wandb_server.runs[wandb_server.named(ended.trials[1].name)]
    assert one.summary["gain/accuracy"] == 0.2 and one.summary["status"] == "done"
    (artifact,) = wandb_server.artifacts[f"{wandb_server.named('garments')}-bundle"]
    assert sorted(artifact.files) == ["manifest.json", "weights.safetensors"]


def test_a_run_that_was_deleted_in_weights_and_biases_is_logged_anew(ended, wandb_server):
    run(ended)
    one = ended.trials[1]
    id = wandb_server.named(one.name)
    del wandb_server.runs[id]
    wandb_server.deleted.add(id)
    ended.outcome.rows = [replace(row, gain=0.25) for row in ended.outcome.rows]
    run(ended)
    run(ended)
    assert ended.state.progress.notes == []
    assert wandb_server.runs[wandb_server.named(one.name)].summary["gain/accuracy"] == 0.25
    id = wandb_server.named(one.name)
    del wandb_server.runs[id]
    wandb_server.deleted.add(id)
    path = Path(ended.state.job.root, one.folder, "record.json")
    record = TrialRecord.from_json(json.loads(path.read_text()))
    write(ended.state.job, one, replace(record, run="second"))
    run(ended)
    assert ended.state.progress.notes == [] and wandb_server.named(one.name) != id


def test_the_end_of_weights_and_biases_is_bounded():
    settings = pytest.importorskip("wandb", reason="extra wandb is not installed").Settings()
    from pipeline.transfer.trackers.wandb import ENVIRONMENT

    settings.update_from_env_vars(ENVIRONMENT)
    assert settings.finish_timeout == 60 and settings.finish_timeout_raises


@pytest.mark.slow
def test_weights_and_biases_offline(ended, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="extra wandb is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    config = ComponentConfig(name="wandb", options={"mode": "offline"})
    ended.state.job = ended.state.job.model_copy(update={"tracking": config})
    run(ended)
    run(ended)
    assert ended.state.progress.notes == []
    written = [path.name for path in (tmp_path / "wandb").rglob("*.wandb")]
    document = json.loads(Path(ended.state.job.root, tracking.FILE).read_text())
    (stored,) = document["places"].values()
    assert {name.removeprefix("run-").removesuffix(".wandb") for name in written} == {
        one["id"] for one in stored.values()
    }
    assert len(stored) == 5


def test_trackio_keeps_runs_on_this_machine(ended, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    config = ComponentConfig(name="trackio", options={"bundles": True})
    ended.state.job = ended.state.job.model_copy(update={"tracking": config})
    run(ended)
    run(ended)
    assert ended.state.progress.notes == [] and not capsys.readouterr().out
    found = {one.name.rpartition("-")[0]: one for one in trackio.Api().runs(ended.state.job.name)}
    assert len(found) == 5 and {one.config["_Group"] for one in found.values()} == {
        ended.state.job.name
    }
    one = found[ended.trials[1].name]
    values = SQLiteStorage.get_logs(ended.state.job.name, one.name, run_id=one.id)
    merged = {name: value for row in values for name, value in row.items()}
    assert merged["gain/accuracy"] == 0.2 and merged["status"] == "done"
