"""The local cluster: what it refuses, and the command. `e2e/test_submitted.py` runs one of two
nodes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster import local
from cluster.submit import SubmitError, submit

ROOT = Path(__file__).resolve().parents[2]


def test_other_machines_need_a_token():
    with pytest.raises(local.ClusterError, match="without a token"):
        local.start(1, host="0.0.0.0")
    before = signal.getsignal(signal.SIGINT)
    assert local.main(["1", "--host", "0.0.0.0", "--no-token"]) == 1
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C would not stop this process any more"


def test_a_taken_port_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(local.ClusterError, match=f"cannot use port {port}"):
            local.start(1, dashboard_port=port)


def test_nodes_get_different_gpus():
    assert local.with_gpus({}, 1, 2)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert local.with_gpus({"CUDA_VISIBLE_DEVICES": "4,6,7"}, 2, 1)["CUDA_VISIBLE_DEVICES"] == "7"
    assert local.with_gpus({"A": "b"}, 2, 0) == {"A": "b"}
    with pytest.raises(local.ClusterError, match="too few GPUs for node 1"):
        local.with_gpus({"CUDA_VISIBLE_DEVICES": "4,6,7"}, 1, 2)


def test_nodes_do_not_inherit_another_cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    handle = local.Handle(
        "127.0.0.1:1", "http://127.0.0.1:2", tmp_path, {"RAY_AUTH_MODE": "disabled"}, "mark"
    )
    env = local.node_environment(handle)
    assert "RAY_ADDRESS" not in env and "RAY_AUTH_TOKEN" not in env
    assert env["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0", "workers are not started through uv run"
    assert env[local.MARK] == "mark" and env["PATH"].startswith(str(Path(sys.executable).parent))


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as end:
        local.main(["--help"])
    assert end.value.code == 0
    assert "python -P -m cluster.local 2" in capsys.readouterr().out


def test_a_head_that_cannot_start_leaves_nothing(monkeypatch):
    monkeypatch.setattr(local, "LOOPBACK_RAY", "import sys; sys.exit('no such luck')")
    before = set(Path(local.tempfile.gettempdir()).glob("o2m*"))
    with pytest.raises(local.ClusterError, match="no such luck"):
        local.start(1)
    assert set(Path(local.tempfile.gettempdir()).glob("o2m*")) == before


@pytest.mark.ray(own=True)
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_asks_for_a_token_and_stops_on_sigterm(monkeypatch, tmp_path):
    (tmp_path / "job.yaml").write_text(f"name: tiny\nstorage: {tmp_path}\n")
    (tmp_path / "entry.py").write_text("print('let in')\n")
    command = [sys.executable, "-P", "-m", "cluster.local", "1", "--dashboard-port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        shown: list[str] = []
        while not shown or "onetomany submit" not in shown[-1]:
            shown.append(process.stdout.readline())
            assert shown[-1], "it ended before it was up"
        address = shown[-1].split()[-1]
        exports = dict(
            line.split()[1].split("=", 1) for line in shown if line.strip().startswith("export ")
        )
        nodes = psutil.Process(process.pid).children(recursive=True)
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            monkeypatch.delenv(name, raising=False)

        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        with pytest.raises(
            SubmitError, match=r"wants a token, and none is set here.*RAY_AUTH_TOKEN"
        ):
            submit(tmp_path / "job.yaml", address, python_module="entry", include=["entry.py"])

        assert exports["RAY_AUTH_MODE"] == "token"
        assert os.stat(exports["RAY_AUTH_TOKEN_PATH"]).st_mode & 0o077 == 0
        for name, value in exports.items():
            monkeypatch.setenv(name, value)
        said: list[str] = []
        assert (
            submit(
                tmp_path / "job.yaml",
                address,
                python_module="entry",
                include=["entry.py"],
                echo=said.append,
            )
            == 0
        )
        assert "let in" in said

        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not any(node.is_running() and node.status() != "zombie" for node in nodes)
    finally:
        process.terminate()
        process.wait(timeout=60)
