"""The page of a running job: what it shows, to whom, and how long."""

import http.client
import json
import math
import re
import socket
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import api
from pipeline.config.schema import ComponentConfig
from pipeline.io import storage
from pipeline.report.trial_record import CurvePoint, TrialRecord
from pipeline.train import launch
from pipeline.train.progress import Progress
from pipeline.transfer import existing_trials, fanout, live_page
from pipeline.transfer.grid import Trial
from tests.report.test_report import failure, trial
from tests.report.test_widths import CHROMIUM, DARK, DESK, PHONE, measure


class Lines(Progress):
    """Keeps its lines and prints nothing."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, line):
        self.notes.append(line)


def planned_trial(source, technique, seed, name, stage="final"):
    component = ComponentConfig(name=technique)
    return Trial(
        source,
        "key",
        "timm/resnet18",
        "clothing",
        component,
        {},
        1.0,
        seed,
        stage,
        name,
        f"trials/{name}",
    )


def record(one, rows, curve=(), **more):
    made = TrialRecord(one.id, rows=tuple(rows), curve=tuple(curve), **more)
    folder = f"{one.folder}/record.json"
    return folder, made.to_json()


@pytest.fixture
def running(tmp_path):
    """The state of a run of six trials, of which four are done, one failed and one is running."""
    root = str(tmp_path / "runs")
    job = SimpleNamespace(name="toy", root=root, targets={"clothing": None}, tracking=None)
    progress = Lines()
    planned = []
    levels = (("garments", "full", 0.8), ("none", "scratch", 0.6))
    for source, technique, level in levels:
        for seed in (0, 1):
            rows, _, curve = trial("clothing", source, technique, "1.0", seed, level)
            value = level + 0.01 * seed
            rows = [replace(row, split="validation", value=value) for row in rows[:1]]
            one = planned_trial(source, technique, seed, rows[0].trial_id)
            planned.append(one)
            points = [CurvePoint(p.step, dict(p.metrics)) for p in curve]
            path, found = record(one, rows, points)
            storage.write_json(storage.join(job.root, path), found)
    failed = planned_trial("garments", "lora", 0, "lost")
    rows = [failure("clothing", "<b>out of memory", "lost")]
    path, found = record(failed, rows, status="failed", error="<b>out of memory")
    storage.write_json(storage.join(job.root, path), found)
    now = planned_trial("garments", "lora", 1, "now")
    log = Path(job.root, "trials", "now", "metrics.jsonl")
    log.parent.mkdir(parents=True)
    line = {"time": time.time(), "step": 20, "steps": 100, "loss": 0.25}
    log.write_text(json.dumps(line) + '\n{"step": 3')
    progress.add_trials([*planned, failed, now])
    progress.newest = "fine-tune: trials 5/6  1 running, 1 failed"
    source = storage.join(job.root, "sources", "garments-1")
    for step in (10, 20, 30):
        log = Path(source, "log", "metrics.jsonl")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            file.write(json.dumps({"step": step, "steps": 90, "loss": 1 / step}) + "\n")
    sources = {"garments": SimpleNamespace(uri=source, splits=())}
    return SimpleNamespace(job=job, progress=progress, sources=sources, planned=planned)


def ask(port, path="/", **headers):
    """(status, text, headers) of a request to 127.0.0.1."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


@contextmanager
def served(state):
    with live_page.serve(state, 0):
        (line,) = (line for line in state.progress.notes if "live page" in line)
        yield int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])


def text_of(page):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))


def test_the_page_shows_trials_done_what_leads_and_curves(running):
    with served(running) as port:
        status, page, _ = ask(port)
    text = text_of(page)
    assert status == 200 and "5 of 6 trials ended" in text
    assert "4 done 6 planned so far 1 failed" in text
    assert "fine-tune: trials 5/6" in text and "1 running" in text
    first, second = text.index("0.805"), text.index("0.605")
    assert "garments · full ▲ leads 100 %" in text[:first] and first < second, "means of two seeds"
    assert "mean of 2 seeds" in text and "▲ leads" not in text[first:second]
    assert "clothing · garments · lora · 100 % labels · seed 1 20 of 100 loss 0.25" in text
    assert "garments: step 30 of 90, loss 0.03333" in text
    assert page.count("<polyline") == 3, "the loss of the source, and two entries"
    assert "&lt;b&gt;out of memory" in page and "<b>out of memory" not in page


def test_a_step_whose_loss_is_not_finite_is_no_point_of_the_curve(running):
    log = Path(running.sources["garments"].uri, "log", "metrics.jsonl")
    with open(log, "a") as file:
        file.write(json.dumps({"step": 40, "steps": 90, "loss": math.nan}) + "\n")
    with served(running) as port:
        _, page, _ = ask(port)
    curves = re.findall('<polyline points="([^"]*)"', page)
    assert len(curves) == 3 and "nan" not in " ".join(curves)


def test_the_best_search_trial_does_not_lead_a_mean_of_final_trials(running):
    """It is the best of several, and may be of fewer steps."""
    rows, _, _ = trial("clothing", "letters", "full", "1.0", 0, 0.9)
    rows = [replace(rows[0], split="validation", value=0.9, trial_stage="search")]
    one = planned_trial("letters", "full", 0, rows[0].trial_id, "search")
    path, found = record(one, rows)
    storage.write_json(storage.join(running.job.root, path), found)
    running.progress.trials = {one.id: one}
    with served(running) as port:
        alone = text_of(ask(port)[1])
        assert "letters · full 100 % 0.9 best of 1 search trial" in alone and "▲" not in alone
        running.progress.add_trials(running.planned)
        text = text_of(ask(port)[1])
    assert text.count("▲ leads") == 1 and "garments · full ▲ leads 100 % 0.805" in text
    assert text.index("0.605") < text.index("0.9 best of 1 search trial"), "after all final ones"


def end_scratch(running, seed, rows):
    """Write the record of a trial of scratch, as one that has ended."""
    one = planned_trial("none", "scratch", seed, rows[0].trial_id)
    path, found = record(one, rows)
    storage.write_json(storage.join(running.job.root, path), found)
    running.progress.add_trials([one])


def test_scratch_networks_of_two_backbones_are_two_lines(running):
    rows, _, _ = trial("clothing", "none", "scratch", "1.0", 7, 0.9)
    rows = [replace(rows[0], split="validation", value=0.5, backbone="timm/vit")]
    end_scratch(running, 7, rows)
    with served(running) as port:
        text = text_of(ask(port)[1])
    assert "none · scratch · timm/ resnet18 100 % 0.605 mean of 2 seeds" in text
    assert "none · scratch · timm/ vit 100 % 0.5 mean of 1 seed" in text


def test_the_most_labels_are_the_most_training_rows(running):
    """50 rows a class may be more than 1 %."""
    for fraction, num_rows in (("0.01", 100), ("50/class", 500)):
        rows, _, _ = trial("clothing", "none", "scratch", fraction, 0, 0.9)
        rows = [replace(rows[0], split="validation", n_train=num_rows, target="tops")]
        end_scratch(running, 0, rows)
    with served(running) as port:
        text = text_of(ask(port)[1])
    assert text.index("none · scratch 50/ class 0.5") < text.index("none · scratch 1 % 0.5")


def test_a_trial_that_is_made_again_counts_when_its_new_record_is_there(running, monkeypatch):
    """The page leaves out its old record, one that it has shown before too."""
    one, root = running.planned[0], running.job.root
    uri = storage.join(root, one.folder, "record.json")
    old = storage.read_json(uri)
    storage.write_json(uri, old | {"run": "old"})
    monkeypatch.setattr(fanout, "group_into_work_items", lambda todo, shared: [])  # trains nothing
    with served(running) as port:
        assert "5 of 6 trials ended" in ask(port)[1]
        fanout.run("toy", [one], SimpleNamespace(root=root), None, running.progress, {one.id})
        text = text_of(ask(port)[1])
        assert "4 of 6 trials ended" in text and "mean of 1 seed" in text
        storage.write_json(uri, old | {"run": "new"})
        assert "5 of 6 trials ended" in ask(port)[1]


def test_the_page_loads_nothing_and_follows_the_run(running):
    with served(running) as port:
        _, page, headers = ask(port)
        policy = headers["Content-Security-Policy"]
        nonce = re.search(r"'nonce-([^']+)'", policy)[1]
        assert "default-src 'none'" in policy and f'<script nonce="{nonce}">' in page
        assert not re.search(r"https?:|//[a-z]|@import|<link| src=", page)
        more = planned_trial("none", "scratch", 2, "later")
        running.progress.add_trials([more])
        assert "5 of 7 trials ended" in ask(port)[1]
        found = storage.read_json(storage.join(running.job.root, "trials/lost/record.json"))
        found |= {"status": "done", "error": None}
        storage.write_json(storage.join(running.job.root, "trials/lost/record.json"), found)
        assert "out of memory" not in text_of(ask(port)[1]), "it ran again"


def test_only_this_machine_is_answered_and_only_the_two_pages(running):
    storage.write_bytes(storage.join(running.job.root, "report.html"), b"the report")
    with served(running) as port:
        assert ask(port, "/report.html")[:2] == (200, "the report")
        assert ask(port, Host=f"localhost:{port}")[0] == 200
        assert ask(port, Host="evil.example")[0] == 403
        for path in ("/results.parquet", "/../report.html", "/trials/now/metrics.jsonl"):
            assert ask(port, path)[0] == 404
        for address in other_addresses():
            with pytest.raises(OSError), socket.create_connection((address, port), timeout=5):
                pass
    with pytest.raises(ConnectionError):
        ask(port)


def other_addresses():
    """Addresses of this machine other than 127.0.0.1; 127.0.0.2 is one on every Linux."""
    found = {"127.0.0.2"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            found.add(probe.getsockname()[0])
        except OSError:
            pass
    return found - {"127.0.0.1"}


def test_a_port_that_is_taken_is_named(running):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"--serve {port}: cannot listen on 127.0.0.1:{port}"),
            live_page.serve(running, port),
        ):
            pass


def test_a_number_that_is_no_port_is_named(running):
    with (
        pytest.raises(ValueError, match=r"--serve 70000: cannot listen .*0-65535.*; give another"),
        live_page.serve(running, 70000),
    ):
        pass


def test_a_run_serves_its_page_until_it_ends(running, monkeypatch):
    """Also where it fails; without a port nothing listens."""
    seen = []

    @contextmanager
    def checked(*given):
        yield running

    def run(state, wanted):
        (line,) = (line for line in state.progress.notes if "live page" in line)
        seen.append(int(line.rpartition(":")[2].strip("/")))
        assert ask(seen[-1])[0] == 200
        raise RuntimeError("the cluster is gone")

    monkeypatch.setattr(api, "open_job", checked)
    monkeypatch.setattr(api, "_run", run)
    monkeypatch.setattr(existing_trials, "trial_status", lambda state: [])
    monkeypatch.setattr(launch, "session", lambda *given: nullcontext())
    with pytest.raises(RuntimeError, match="the cluster is gone"):
        api.run_stages(running.job, ("finetune",), progress=running.progress, serve=0)
    with pytest.raises(ConnectionError):
        ask(seen[0])
    running.progress.notes.clear()
    with pytest.raises(ValueError):  # run() finds no line
        api.run_stages(running.job, ("finetune",), progress=running.progress)


def test_a_head_that_was_solved_has_no_curve_and_an_entry_alone_does_not_lead(running):
    """The step of its one validation counts the iterations of the solver."""
    rows, _, _ = trial("letters", "garments", "linear_probe", "1.0", 0, 0.9)
    rows = [replace(rows[0], split="validation", value=0.9)]
    probes = [planned_trial("garments", "linear_probe", seed, f"probe-{seed}") for seed in (0, 1)]
    for step, one in zip((900, 950), probes, strict=True):
        found = [replace(row, trial_id=one.id) for row in rows]
        path, found = record(one, found, [CurvePoint(step, {"accuracy": 0.9})])
        storage.write_json(storage.join(running.job.root, path), found)
    running.progress.trials = {one.id: one for one in probes}
    with served(running) as port:
        page = ask(port)[1]
    text = text_of(page)
    assert "letters: values so far" in text and "0.9 mean of 2 seeds" in text
    assert "step 950" not in page and "▲" not in text


@pytest.mark.skipif(not CHROMIUM, reason="neither chromium nor chrome is installed")
def test_the_page_fits_on_a_phone_and_can_be_read_in_the_dark(running, tmp_path):
    rows, _, _ = trial("clothing", "photographs_of_everyday_clothing_2024", "full", "1.0", 7, 0.9)
    rows = [replace(rows[0], split="validation", value=0.7, target="handwriting_of_2024")]
    one = planned_trial("photographs_of_everyday_clothing_2024", "full", 7, rows[0].trial_id)
    path, found = record(one, rows)
    storage.write_json(storage.join(running.job.root, path), found)
    running.progress.add_trials([one])
    with served(running) as port:
        page = ask(port)[1]
    dark = page.replace(DARK, "@media all")
    for measured in measure([(page, PHONE), (page, DESK), (dark, DESK)], tmp_path):
        assert measured["page"] <= measured["width"]
        assert measured["wide"] == [] and measured["broken"] == []
        assert measured["text_outside"] <= 1, "text of a figure is cut off"
        assert measured["contrast"]["ratio"] >= 4.5, measured["contrast"]
