"""Rounds of several processes that start a run of one job in the same moment: exactly one may get
in.

    python tests/benchmarks/lease_rounds.py [rounds] [processes]        about a minute for 30 rounds locally and 30 on S3

Every second round finds the lease of a run that was killed. S3 is moto's server on this machine,
once with conditional writes and once with a server that ignores them, for which the lease has
another way. Prints a table; exit code 1 when a round let in none or more than one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline.io import run_lock, storage, write_fence

ROOT = Path(__file__).parents[2]
PROCESS = """
    import json, sys, time
    from pipeline.io import run_lock as lease; from pipeline.io import s3; from pipeline.io import storage

    if sys.argv[1] == "ignored":  # an old server, which takes the condition for nothing
        put = s3.client().call_s3
        s3.client().call_s3 = lambda method, **words: put(method, **{k: v for k, v in words.items() if k != "IfNoneMatch"})
    storage.exists(sys.argv[2])  # connections are open, modules are imported
    print("ready", flush=True)
    for line in sys.stdin:
        root, at = json.loads(line)
        while time.time() < at:
            pass
        try:
            with lease.hold(root):
                print("in", flush=True)
                sys.stdin.readline()  # until all have tried
                storage.write_bytes(root + "/result", b"x")
            print("out", flush=True)
        except lease.BusyError:
            print("busy", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\\n", " "), flush=True)
"""


def rounds(place: str, count: int, processes: int = 4, conditions: str = "kept") -> Counter[int]:
    """How many rounds let in how many processes, under fresh folders below ``place``."""
    import textwrap

    command = [sys.executable, "-c", textwrap.dedent(PROCESS), conditions, place]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    found: Counter[int] = Counter()
    try:
        for process in started:
            assert _answer(process) == "ready"
        for number in range(count):
            root = storage.join(place, uuid.uuid4().hex)
            if number % 2:
                storage.write_json(write_fence.lease_uri(root), _dead_lease())
            at = time.time() + 0.05
            for process in started:
                _tell(process, json.dumps([root, at]))
            answers = [_answer(process) for process in started]
            wrong = set(answers) - {"in", "busy"}
            assert not wrong, wrong
            entered = [
                process for process, answer in zip(started, answers, strict=True) if answer == "in"
            ]
            found[len(entered)] += 1
            for process in entered:
                _tell(process, "go on")
            ends = [_answer(process) for process in entered]
            if len(entered) == 1:
                assert ends == ["out"], ends
                assert not [name for name in storage.list_files(root) if "/.run" in name], (
                    "the lease and all claims are gone"
                )
    finally:
        for process in started:
            process.kill()
            process.wait()
    return found


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _dead_lease() -> dict[str, object]:
    """The lease of a run on another machine that nothing has renewed for long."""
    return {
        "id": uuid.uuid4().hex,
        "host": "elsewhere",
        "pid": 12,
        "time": time.time() - 2 * run_lock.CLOCK_SECONDS,
    }


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """A bucket on moto's server in this process; the AWS_* variables name it."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    boto3.client("s3").create_bucket(Bucket="bucket")
    try:
        yield "s3://bucket"
    finally:
        server.stop()


def main() -> int:
    count, processes = (int(word) for word in (*sys.argv[1:], 30, 4)[:2])
    table: dict[str, Counter[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        table["local"] = rounds(folder, count, processes)
    with moto_server() as bucket:
        table["S3 (moto)"] = rounds(f"{bucket}/kept", count, processes)
        table["S3 without conditional writes"] = rounds(
            f"{bucket}/ignored", count, processes, "ignored"
        )
    print(
        f"{'store':32} {'rounds':>6} {'none':>5} {'one':>5} {'more':>5}   ({processes} "
        "processes a round)"
    )
    for name, found in table.items():
        print(
            f"{name:32} {found.total():>6} {found[0]:>5} {found[1]:>5} "
            f"{found.total() - found[0] - found[1]:>5}"
        )
    return 0 if all(set(found) == {1} for found in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
