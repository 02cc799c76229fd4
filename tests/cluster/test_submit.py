"""Submitting: what is shipped, what is said, and what the exit code is. `e2e/test_submitted.py`
submits to a real cluster.
"""

from __future__ import annotations

import http.server
import json
import os
import random
import re
import shlex
import socket
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import package
from cluster import submit as submit_module
from cluster.package import collect, write_zip
from cluster.submit import SubmitError, entrypoint, parse_env, submit
from pipeline.cli import app
from pipeline.config.yaml_loader import relative_places

ROOT = Path(__file__).resolve().parents[2]
RAY_VERSION = submit_module.ray.__version__


@pytest.fixture(autouse=True)
def _no_cluster_in_the_environment(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture
def job(tmp_path):
    """A job folder: the job file, data beside it, and things that must not travel."""
    folder = tmp_path / "jobs"
    for name in (
        "job.yaml",
        "data/a.parquet",
        ".git/config",
        "runs/old.json",
        "data/runs/new.json",
        "w.pt",
        ".env",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"name: {name.replace('/', '-')}\nstorage: s3://bucket/runs\n")
    return folder / "job.yaml"


def test_the_entrypoint_survives_the_shell():
    command = entrypoint(
        Path("my jobs/vision/vision.yaml"), ["name=it's", "fanout.search={lr: [1e-4, $HOME]}"]
    )
    words = [
        "python",
        "-P",
        "-m",
        "pipeline.cli",
        "run",
        "my jobs/vision/vision.yaml",
        "--address",
        "auto",
    ]
    words += ["--set", "name=it's", "--set", "fanout.search={lr: [1e-4, $HOME]}"]
    assert shlex.split(command) == words
    assert (
        subprocess.check_output(["sh", "-c", "printf '%s\n' " + command], text=True).splitlines()
        == words
    )


@pytest.mark.parametrize(
    ("wait", "word"), [(True, "--wait-for-resources"), (False, "--no-wait-for-resources")]
)
def test_a_submission_says_whether_to_wait(wait, word):
    assert shlex.split(entrypoint(Path("a.yaml"), wait=wait))[-1] == word
    assert "wait" not in entrypoint(Path("a.yaml")), (
        "else the job finds out whether its cluster grows"
    )


def test_variables_are_named_or_given(monkeypatch):
    monkeypatch.setenv("HERE", "a=b")
    assert parse_env(["HERE", "THERE=c=d", "EMPTY="]) == {
        "HERE": "a=b",
        "THERE": "c=d",
        "EMPTY": "",
    }
    with pytest.raises(SubmitError, match="NOWHERE is not set here"):
        parse_env(["NOWHERE"])
    with pytest.raises(SubmitError, match="neither NAME nor NAME=VALUE"):
        parse_env(["not a name=1"])


def of_the_job(package) -> set[str]:
    """The names of a package's files beside this project's code."""
    return {name for name in package.files if not name.startswith(("pipeline/", "cluster/"))}


def test_the_package_is_what_the_job_names_and_the_code(job):
    shipped = collect(job, ["data/a.parquet"])
    assert of_the_job(shipped) == {"job.yaml", "data/a.parquet"}
    assert shipped.files["cluster/submit.py"] == ROOT / "cluster" / "submit.py"
    assert "pipeline/__init__.py" in shipped.files
    assert not any("__pycache__" in name for name in shipped.files)
    assert not any(name.startswith("cluster/") for name in collect(job, ship_code=False).files)


def test_folders_and_globs_that_the_job_names_are_shipped_with_what_is_in_them(job):
    (job.parent / "data" / "b.csv").write_text("b")
    assert of_the_job(collect(job, ["data/*.parquet"])) == {"job.yaml", "data/a.parquet"}
    shipped = collect(job, ["data"], include=["w.pt"], exclude=["*.csv"])
    assert of_the_job(shipped) == {"job.yaml", "data/a.parquet", "data/runs/new.json", "w.pt"}
    assert shipped.left_out == ["data/b.csv"]
    with pytest.raises(SubmitError, match=r"--include names no/\*\.csv, and nothing like it"):
        collect(job, include=["no/*.csv"])


def test_the_ignore_file_leaves_out_what_it_names(job):
    (job.parent / ".onetomanyignore").write_text("# results of other runs\ndata/runs/\n\n*.csv\n")
    (job.parent / "data" / "b.csv").write_text("b")
    shipped = collect(job, ["data"])
    assert of_the_job(shipped) == {"job.yaml", "data/a.parquet"}
    assert shipped.left_out == ["data/b.csv", "data/runs"]
    with pytest.raises(
        SubmitError,
        match=r"the job names data/b\.csv, and --exclude or \.onetomanyignore leaves data/b\.csv "
        r"out",
    ):
        collect(job, ["data/b.csv"])


SECRET_FILES = (
    *(
        ".env",
        ".env.local",
        ".envrc",
        ".aws/credentials",
        ".aws/config",
        ".ssh/config",
        "id_rsa",
        "id_ed25519",
        "key.pem",
    ),
    *(
        ".netrc",
        ".git-credentials",
        ".pypirc",
        "credentials.json",
        "credentials-prod.json",
        "service-account-1.json",
    ),
    *("secrets.yaml", "secrets.toml", "Secrets.JSON", ".kube/config", ".docker/config.json"),
)


PICTURES = """
name: pictures
sources:
  seen:
    data: {uri: DATA, modality: {image: {size: 16}}, columns: {image: image, label: label}}
    backbone: timm/test_resnet
    init: "file:weights/start.safetensors"
    objective: classification
    train: {steps: 1}
targets:
  wanted:
    data: {train: [a/1.parquet, "a/2*.parquet"], test: s3://bucket/test.parquet, modality: image, columns: {image: image, label: label}}
    objective: classification
  texts:
    data: {uri: /shared/texts.parquet, modality: {text: {tokenizer: words}}, columns: {text: text, label: label}}
    objective: classification
techniques: [scratch]
"""


@pytest.fixture
def pictures(tmp_path):
    """A job that names files in every way there is, and beside them files that it does not name."""
    for name in (
        "a/1.parquet",
        "a/2b.parquet",
        "a/3.parquet",
        "weights/start.safetensors",
        "words/tokenizer.json",
        "seen.parquet",
        ".env",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "job.yaml").write_text(PICTURES.replace("DATA", "seen.parquet"))
    return tmp_path / "job.yaml"


def test_the_files_that_a_job_names_are_its_data_its_checkpoints_and_its_tokenizers(pictures):
    """By relative paths: what is absolute or on S3 is where the cluster finds it."""
    assert relative_places(pictures) == [
        "seen.parquet",
        "weights/start.safetensors",
        "a/1.parquet",
        "a/2*.parquet",
        "words",
    ]
    assert "a/3.parquet" in relative_places(pictures, ["sources.seen.data.uri=a/3.parquet"])


def test_a_dry_run_lists_what_would_be_shipped_and_needs_no_cluster(pictures):
    done = CliRunner().invoke(app, ["submit", str(pictures), "--dry-run", "--include", "notes*"])
    assert done.exit_code == 0, done.output
    listed = {
        line.split()[-1]: line.split()[:-1]
        for line in done.output.splitlines()
        if not line.endswith("compression")
    }
    mine = {name for name in listed if not name.startswith(("pipeline/", "cluster/"))}
    assert mine == {
        "job.yaml",
        "seen.parquet",
        "weights/start.safetensors",
        "a/1.parquet",
        "a/2b.parquet",
        "words/tokenizer.json",
        "notes.txt",
    }
    assert listed["a/1.parquet"] == ["11", "B"] and "pipeline/cli.py" in listed
    assert CliRunner().invoke(app, ["submit", str(pictures)]).exit_code == 2, (
        "without --dry-run an address is needed"
    )


@pytest.mark.parametrize("name", SECRET_FILES)
def test_secrets_are_never_shipped(job, name):
    """Not from beside the job file, not from within a folder that the job names, and not by their
    own name.
    """
    for place in (job.parent / name, job.parent / "data" / "deep" / name):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("hush")
    shipped = (
        collect(job, ["data"], include=["*"], exclude=[".git", "runs"])
        if name[0] != "."
        else collect(job, ["data"])
    )
    assert not any(file.read_bytes() == b"hush" for file in shipped.files.values())
    assert any(name.startswith(left.removeprefix("data/deep/")) for left in shipped.left_out)
    with pytest.raises(SubmitError, match="looks like a secret, which is never shipped"):
        collect(job, [f"data/deep/{name}"])


def test_a_link_that_leaves_the_folder_is_refused(job, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.parquet").write_text("b")
    (job.parent / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert of_the_job(collect(job, ["data/a.parquet"])) == {"job.yaml", "data/a.parquet"}, (
        "a link that nobody names is nobody's concern"
    )
    for named in ("data", "data/linked", "data/linked/b.parquet"):
        with pytest.raises(
            SubmitError, match=r"is a link that leads to .*elsewhere.*, out of the folder"
        ):
            collect(job, [named])
    with pytest.raises(
        SubmitError, match=r"the job names .*elsewhere/b\.parquet, which is not below"
    ):
        collect(job, ["../elsewhere/b.parquet"])


def test_links_within_the_folder_are_followed_but_not_in_circles(job):
    (job.parent / "data" / "circle").symlink_to(job.parent / "data")
    (job.parent / "data" / "same.parquet").symlink_to(job.parent / "data" / "a.parquet")
    (job.parent / "data" / "dangling").symlink_to(job.parent / "nothing")
    files = of_the_job(collect(job, ["data"]))
    assert files == {"job.yaml", "data/a.parquet", "data/same.parquet", "data/runs/new.json"}


def test_a_namesake_of_the_code_is_refused_where_the_job_needs_it(job):
    (job.parent / "cluster").mkdir()
    (job.parent / "cluster" / "notes.txt").write_text("not ours")
    assert "cluster/notes.txt" not in collect(job).files
    with pytest.raises(SubmitError, match="would hide the Python package cluster"):
        collect(job, ["cluster/notes.txt"])


def test_the_listing_has_every_file_with_its_size(job):
    (job.parent / "data" / "a.parquet").write_bytes(bytes(3 * 2**20))
    (job.parent / "data" / ".env").write_text("hush")
    lines = list(collect(job, ["data"], ship_code=False).listing())
    assert [line.split() for line in lines[:3]] == [
        ["3.0", "MiB", "data/a.parquet"],
        ["51", "B", "data/runs/new.json"],
        ["41", "B", "job.yaml"],
    ]
    assert lines[3].split() == ["left", "out", "data/.env"]
    assert lines[4] == "   3.0 MiB  in 3 files, before compression"


def test_equal_files_make_equal_packages(job, tmp_path):
    first = write_zip(collect(job, ["data"]), tmp_path / "1.zip").read_bytes()
    for file in job.parent.rglob("*"):
        os.utime(file, (1e9, 1e9))
    second = write_zip(collect(job, ["data"]), tmp_path / "2.zip").read_bytes()
    assert first == second
    with zipfile.ZipFile(tmp_path / "1.zip") as opened:
        assert opened.read("job.yaml") == job.read_bytes()


def test_a_package_too_big_is_refused_with_its_size(job, tmp_path, monkeypatch):
    (job.parent / "data" / "big.bin").write_bytes(random.Random(0).randbytes(3 * 2**20))
    monkeypatch.setattr(package, "MAX_PACKAGE_MIB", 2)
    with pytest.raises(
        SubmitError, match=r"has \d MiB.*less than 2; .*data/big.bin \(3 MiB\).*s3://.*exclude"
    ):
        write_zip(collect(job, ["data"]), tmp_path / "big.zip")
    monkeypatch.setattr(package, "MAX_PACKAGE_MIB", 0.1)  # so far beyond that it is not even tried
    files = collect(job, ["data"])
    bare = sum(file.stat().st_size for file in files.files.values()) / 2**20
    with pytest.raises(SubmitError, match=rf"has {bare:.0f} MiB"):
        write_zip(files, tmp_path / "never.zip")
    assert not (tmp_path / "never.zip").exists()


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("http://head:8265", "head"),
        ("http://10.0.0.7:8265", "10.0.0.7"),
        ("https://head:8265", None),
        ("http://localhost:8265", None),
        ("http://127.0.0.1:8265", None),
        ("http://127.4.5.6:1", None),
        ("http://[::1]:8265", None),
        ("http://localhost.evil.org:1", "localhost.evil.org"),
    ],
)
def test_http_is_for_this_machine_alone(address, host):
    assert submit_module.unencrypted_host(address) == host


@pytest.mark.parametrize("seed", range(20))
def test_a_log_that_starts_over_is_printed_once(seed):
    draw, said = random.Random(seed), []
    log = "".join(draw.choice(["", "x", "line\n", "\n"]) for _ in range(30)) + "end"
    lines = submit_module.LogLines(said.append)
    for reach in [*sorted(draw.choices(range(len(log)), k=4)), len(log)]:
        lines.restart()
        at = 0
        while at < reach:
            step = draw.randint(1, 9)
            lines.feed(log[at : min(at + step, reach)])
            at += step
    lines.close()
    assert "\n".join(said) == log


def test_an_address_where_nothing_is(job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SubmitError, match=f"no Ray dashboard answered at http://127.0.0.1:{port}"):
        submit(job, f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "auto", "http://"])
def test_what_is_not_an_address(job, address):
    with pytest.raises(SubmitError, match="is not the address of a Ray dashboard"):
        submit(job, address)


@pytest.mark.slow
def test_an_address_that_takes_the_call_and_says_nothing(job):
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(SubmitError, match="no Ray dashboard answered"):
            submit(job, f"http://127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - started < 15


class FakeDashboard(http.server.BaseHTTPRequestHandler):
    """As much of Ray's job API as `submit` uses. Tests set `replies`; requests that came are in
    `requests`.
    """

    replies: dict[str, tuple[int, object]]
    requests: list[tuple[str, str, object]]
    address: str

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        is_json = self.headers.get("Content-Type") == "application/json"
        self.requests.append(
            (self.command, self.path, json.loads(body) if is_json else dict(self.headers))
        )
        path = self.path.partition("?")[0]
        status, reply = next(
            (value for key, value in self.replies.items() if re.fullmatch(key, path)), (404, "no")
        )
        reply = reply.pop(0) if isinstance(reply, list) else reply
        data = (json.dumps(reply) if not isinstance(reply, str) else reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - http.server names them

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dashboard():
    class Handler(FakeDashboard):
        pass

    Handler.requests = []
    Handler.replies = {
        "/api/version": (
            200,
            {"version": "4", "ray_version": RAY_VERSION, "ray_commit": "x", "session_name": "s"},
        ),
        "/api/packages/.*": (200, {}),
        "/api/v0/nodes": (
            200,
            {"data": {"result": {"result": [{"state": "ALIVE"}] * 2 + [{"state": "DEAD"}]}}},
        ),
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        Handler.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield Handler
        server.shutdown()


def _ends(dashboard, status: str, code: int | None, message: str = "why") -> None:
    details = {
        "type": "SUBMISSION",
        "status": status,
        "entrypoint": "e",
        "message": message,
        "driver_exit_code": code,
    }
    dashboard.replies |= {
        "/api/jobs/": (200, {"job_id": "id", "submission_id": "id"}),
        "/api/jobs/[^/]+": (200, details),
        # Without logs/tail: following falls back on it
        "/api/jobs/[^/]+/logs": (
            200,
            {"logs": "one\ntwo"},
        ),
    }


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 7, 7),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),  # the process never started
        ("FAILED", 0, 1),  # it ended well, but the cluster lost it
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_code_is_the_jobs(job, dashboard, status, code, expected):
    _ends(dashboard, status, code)
    said: list[str] = []
    assert submit(job, dashboard.address, echo=said.append) == expected
    assert said[-3:-1] == ["one", "two"]
    if expected == 1:
        assert "why" in said[-1]


def test_where_the_log_cannot_be_streamed_it_is_fetched(job, dashboard, monkeypatch):
    _ends(dashboard, "SUCCEEDED", 0)
    monkeypatch.setattr(submit_module, "RETRY_SECONDS", 0.05)
    ended = dashboard.replies["/api/jobs/[^/]+"][1]
    dashboard.replies["/api/jobs/[^/]+"] = (200, [ended | {"status": "RUNNING"}] * 2 + [ended])
    dashboard.replies["/api/jobs/[^/]+/logs"] = (
        200,
        [{"logs": logs} for logs in ("one\nt", "one\ntwo\n", "one\ntwo\n3")],
    )
    said: list[str] = []
    assert submit(job, dashboard.address, echo=said.append) == 0
    assert said[-4:-1] == ["one", "two", "3"]


def test_a_submission_says_how_to_come_back(job, dashboard):
    _ends(dashboard, "SUCCEEDED", 0)
    said: list[str] = []
    env = {"GREETING": "hi", "AWS_SECRET_ACCESS_KEY": "s"}
    options = {
        "submission_id": "mine",
        "follow": False,
        "overrides": ["seed=1"],
        "echo": said.append,
    }
    submit(job, dashboard.address, env=env, secrets_in_clear=True, **options)
    text = "\n".join(said)
    assert f"ray job logs --follow --address {dashboard.address} mine" in text
    assert f"ray job stop --address {dashboard.address} mine" in text
    assert f"{dashboard.address}/#/jobs/mine" in text
    assert "AWS_SECRET_ACCESS_KEY can be read" in text
    (request,) = [
        body
        for command, path, body in dashboard.requests
        if (command, path) == ("POST", "/api/jobs/")
    ]
    assert (
        request["entrypoint"]
        == "python -P -m pipeline.cli run job.yaml --address auto --set seed=1"
    )
    assert request["submission_id"] == "mine"
    assert request["runtime_env"]["env_vars"] == env
    assert request["runtime_env"]["working_dir"].startswith("gcs://_ray_pkg_")


def test_a_key_is_not_sent_as_a_variable_of_the_job(job, dashboard):
    """Variables of a job stand in clear in Ray's logs and in the job API."""
    _ends(dashboard, "SUCCEEDED", 0)
    env = {
        "GREETING": "hi",
        "AWS_SECRET_ACCESS_KEY": "hush",
        "AWS_SHARED_CREDENTIALS_FILE": "/etc/aws",
    }
    with pytest.raises(
        SubmitError, match=r"--env AWS_SECRET_ACCESS_KEY: .* stand in clear.*instance role"
    ) as caught:
        submit(job, dashboard.address, env=env, echo=lambda _: None)
    assert "hush" not in str(caught.value) and dashboard.requests == []
    del env["AWS_SECRET_ACCESS_KEY"]
    assert submit(job, dashboard.address, env=env, echo=lambda _: None) == 0


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["storage=s3://b/p"], None),
        (["storage=${BUCKET}/p"], None),
        (["storage=/mnt/runs"], "/mnt/runs must be one disk that all 2 nodes share"),
        (["storage=file:///mnt/runs"], "must be one disk"),
        (["storage=runs"], "temporary copy on the cluster, which is deleted later"),
    ],
)
def test_storage_that_the_nodes_do_not_share(job, dashboard, overrides, warning):
    _ends(dashboard, "SUCCEEDED", 0)
    said: list[str] = []
    submit(job, dashboard.address, overrides=["storage=ignored", *overrides], echo=said.append)
    found = [line for line in said if line.startswith("warning")]
    assert found == [] if warning is None else warning in found[0]


def test_variables_that_a_job_reads_on_the_cluster_are_named(job, dashboard):
    _ends(dashboard, "SUCCEEDED", 0)
    job.write_text(f"# ${{COMMENT}}\n{job.read_text()}\nseed: ${{TEAM}}-${{TASK}}\n")
    said: list[str] = []
    settings = ["storage=s3://${BUCKET}/p"]
    submit(job, dashboard.address, overrides=settings, env={"TASK": "a"}, echo=said.append)
    notes = [line for line in said if line.startswith("note: ")]
    assert len(notes) == 1 and notes[0].startswith("note: the job reads BUCKET, TEAM from the ")


def test_the_address_given_wins_over_the_environment(job, dashboard, monkeypatch):
    _ends(dashboard, "SUCCEEDED", 0)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert submit(job, dashboard.address, echo=lambda _: None) == 0
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_refusals_are_one_clear_line(job, dashboard):
    _ends(dashboard, "SUCCEEDED", 0)
    dashboard.replies["/api/jobs/"] = (
        500,
        "Traceback ...\nValueError: Job with submission_id mine already exists.\n",
    )
    with pytest.raises(SubmitError, match=r"did not accept the job: ValueError: .* already exists"):
        submit(job, dashboard.address, submission_id="mine", echo=lambda _: None)
    dashboard.replies["/api/version"] = (200, "<html>a router</html>")
    with pytest.raises(SubmitError, match="is not a Ray dashboard"):
        submit(job, dashboard.address)
    with pytest.raises(SubmitError, match="is not under the folder to ship"):
        submit(job, dashboard.address, working_dir=job.parent / "data")
    job.write_text("a: [")
    with pytest.raises(SubmitError, match="cannot read"):
        submit(job, dashboard.address)


def test_tokens(job, dashboard, monkeypatch, tmp_path):
    _ends(dashboard, "SUCCEEDED", 0)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    version = dashboard.replies["/api/version"]
    dashboard.replies["/api/version"] = (401, "Unauthorized: Missing authentication token")
    with pytest.raises(
        SubmitError,
        match=r"wants a token, and none is set here.*ray get-auth-token.*RAY_AUTH_TOKEN",
    ):
        submit(job, dashboard.address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    dashboard.replies["/api/version"] = (403, "Forbidden: Invalid authentication token")
    with pytest.raises(SubmitError, match="refused the one given"):
        submit(job, dashboard.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(SubmitError, match="cannot read the token"):
        submit(job, dashboard.address)
    (tmp_path / "token").write_text("right\n")
    dashboard.replies["/api/version"] = version
    dashboard.requests.clear()
    assert submit(job, dashboard.address, echo=lambda _: None) == 0
    assert dashboard.requests[0][2]["Authorization"] == "Bearer right"


def test_contact_lost_for_long(job, dashboard, monkeypatch):
    _ends(dashboard, "SUCCEEDED", 0)
    dashboard.replies["/api/jobs/[^/]+"] = (500, "gone")
    monkeypatch.setattr(submit_module, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(submit_module, "RETRY_SECONDS", 0.1)
    with pytest.raises(
        SubmitError, match=r"lost contact .*mine may still be running: ray job logs"
    ):
        submit(job, dashboard.address, submission_id="mine", echo=lambda _: None)
