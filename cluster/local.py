"""A Ray cluster of N nodes on one machine, for trying `onetomany submit` and for tests.

    python -P -m cluster.local 2     # two nodes, one CPU each; up in about 15 s, Ctrl-C stops it
    python -P -m cluster.local 4 --cpus-per-node 2 --no-token

`-P` keeps Python from taking another folder named `cluster` for this one.

Every node is a `ray start --block` of its own, so that a node can be killed like a machine that
fails. Stopping ends only the processes that were started here. `ray stop` is never used, since it
ends every Ray process of the user.

Whoever can reach a Ray port can run code as this user. On Linux Ray listens on every interface,
even when told to use 127.0.0.1 (seen: the GCS, raylets and agents on 0.0.0.0). Ray's switch for
macOS and Windows keeps it on loopback, and is used here; `tests/e2e/test_submitted.py` checks the
sockets. Any other address needs a token; on loopback too there is one unless `--no-token` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MARK = "ONETOMANY_LOCAL_CLUSTER"
START_SECONDS = 120.0
"""Limit. Two nodes take 15 to 20 s on two cores, 30 s on busy ones."""
STOP_SECONDS = 15.0

# `RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0` makes Ray resolve this machine to 127.0.0.1, but `ray start`
# then declines to join a head. So in the process of `ray start` (not in its children) the switch is
# on, and the address resolved here.
LOOPBACK_RAY = """
from ray._private import ray_constants, services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
ray_constants.ENABLE_RAY_CLUSTER = True
from ray.scripts.scripts import main
main()
"""
_PLAIN_RAY = "from ray.scripts.scripts import main; main()"


class ClusterError(RuntimeError):
    """The local cluster could not be started, or was asked for something unsafe."""


@dataclass
class Handle:
    """A running local cluster. `job_address` is for `onetomany submit`, `address` for `ray.init`.

    `env` has the environment variables that a client needs: `RAY_AUTH_MODE`, in token mode
    `RAY_AUTH_TOKEN_PATH`, and Ray's switch for loopback. A process that calls `ray.init(address)`
    must be started with them, since Ray reads the switch when it is imported. Submitted jobs
    inherit them from the cluster.
    """

    address: str
    job_address: str
    temp_dir: Path
    env: dict[str, str]
    mark: str
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def pids(self) -> list[int]:
        """The process id of each node's `ray start`, the head first."""
        return [node.pid for node in self.nodes]

    def processes(self) -> list[psutil.Process]:
        """Return every live process of this cluster, workers and job drivers too."""
        ours = {process for process in psutil.process_iter() if self._owns(process)}
        for process in list(ours):
            with contextlib.suppress(psutil.NoSuchProcess):
                ours.update(process.children(recursive=True))
        return sorted(ours, key=lambda process: process.pid)

    def _owns(self, process: psutil.Process) -> bool:
        """Return whether a process belongs to this cluster.

        Each node is a session of its own, and its processes stay in it when their parent dies. Job
        drivers open another session but keep the mark in their environment. Ray's workers and
        agents lose the mark, since their process title overwrites it.
        """
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return os.getsid(process.pid) in self.pids or process.environ().get(MARK) == self.mark
        except (psutil.Error, OSError):  # gone, or another user's
            return False

    def kill_node(self, index: int) -> None:
        """SIGKILL all processes of one node, as when a machine vanishes. Index 0 is the head."""
        node = self.nodes[index]
        if node.poll() is None:
            root = psutil.Process(node.pid)
            _kill([*root.children(recursive=True), root])
            node.wait(timeout=STOP_SECONDS)

    def stop(self) -> None:
        """Stop the cluster and remove its folder. Safe to call twice."""
        deadline = time.monotonic() + STOP_SECONDS
        for group in (self.nodes[1:], self.nodes[:1]):  # a raylet whose head has gone waits for it
            for node in group:
                node.terminate()
            for node in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(timeout=max(0.1, deadline - time.monotonic()))
        _kill(self.processes())
        for node in self.nodes:
            node.wait()
        self.nodes.clear()  # their ids may be given to others from now on
        shutil.rmtree(self.temp_dir, ignore_errors=True)


def start(
    nodes: int,
    cpus_per_node: int = 1,
    gpus_per_node: int = 0,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    dashboard_port: int = 0,
    token: bool = False,
    object_store_mib: int = 150,
    stopped: threading.Event | None = None,
) -> Handle:
    """Start a cluster, and wait until its job API answers and every node is alive.

    A free port is chosen in place of port 0.

    Raises:
        ClusterError: A port is taken, a node dies, `stopped` is set, or it takes longer than
            START_SECONDS. Nothing is left running then.
    """
    if nodes < 1:
        raise ClusterError(f"a cluster needs at least 1 node, not {nodes}")
    loopback = host == "127.0.0.1"
    if not token and not loopback:
        raise ClusterError(
            f"other machines can reach {host}: without a token they could run code as you"
        )
    port, dashboard_port = claim_port(host, port), claim_port(host, dashboard_port)
    # a short path: Ray's socket paths may have 107 characters
    temp_dir = Path(tempfile.mkdtemp(prefix="o2m"))
    mark = secrets.token_hex(8)
    env = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    if loopback:
        env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if token:
        token_file = temp_dir / "auth_token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
        env["RAY_AUTH_TOKEN_PATH"] = str(token_file)
    handle = Handle(f"{host}:{port}", f"http://{host}:{dashboard_port}", temp_dir, env, mark)
    common = [
        *(
            sys.executable,
            "-P",
            "-c",
            LOOPBACK_RAY if loopback else _PLAIN_RAY,
            "start",
            "--block",
        ),
        *("--node-ip-address", host, "--disable-usage-stats"),
        *("--num-cpus", str(cpus_per_node), "--num-gpus", str(gpus_per_node)),
        *("--object-store-memory", str(object_store_mib * 2**20)),
        # 0 chooses: at a fixed port a second cluster here could run no jobs
        *("--dashboard-agent-listen-port", "0"),
    ]
    head = [
        *(
            "--head",
            "--port",
            str(port),
            "--dashboard-host",
            host,
            "--dashboard-port",
            str(dashboard_port),
        ),
        # otherwise it is 10001, which another cluster may use
        *("--ray-client-server-port", str(claim_port(host, 0))),
    ]
    try:
        deadline = time.monotonic() + START_SECONDS
        launch_node(handle, [*common, *head], gpus_per_node)
        wait_until(handle, deadline, lambda: is_answering(handle), "the job API", stopped)
        for _ in range(1, nodes):
            launch_node(handle, [*common, "--address", handle.address], gpus_per_node)
        wait_until(
            handle, deadline, lambda: alive_nodes(handle) == nodes, f"{nodes} nodes", stopped
        )
    except BaseException:
        handle.stop()
        raise
    return handle


@contextlib.contextmanager
def local_cluster(nodes: int, cpus_per_node: int = 1, **options) -> Iterator[Handle]:
    """Run a cluster (`start`) during the block.

    The environment of this process does not change; `Handle.env` has the variables of clients.
    """
    handle = start(nodes, cpus_per_node, **options)
    try:
        yield handle
    finally:
        handle.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit code."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -P -m cluster.local",
        description=summary + "\n" + rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, default = parser.add_argument, " (default %(default)s)"
    add("nodes", type=int, metavar="N", help="number of nodes, the head included")
    add(
        "--cpus-per-node",
        type=int,
        default=1,
        metavar="C",
        help="CPUs that each node offers" + default,
    )
    add(
        "--gpus-per-node",
        type=int,
        default=0,
        metavar="G",
        help="GPUs for each node, dealt in order" + default,
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any other than this one needs a token" + default,
    )
    add("--port", type=int, default=0, help="port of the Ray address; 0 chooses one" + default)
    add(
        "--dashboard-port",
        type=int,
        default=8265,
        help="port of the dashboard and the job API" + default,
    )
    add(
        "--token",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let in only clients with the token",
    )
    options = parser.parse_args(arguments)
    stopped = threading.Event()
    handlers_before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        handle = start(**vars(options), stopped=stopped)
        try:
            print(_greeting(handle, options.nodes), flush=True)
            while not stopped.wait(1.0):
                if handle.nodes[0].poll() is not None:
                    raise ClusterError(f"the head ended:\n{_last_output(handle, 0)}")
        finally:
            print("stopping", flush=True)
            handle.stop()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
    return 0


def _greeting(handle: Handle, nodes: int) -> str:
    exports = "".join(f"    export {name}={value}\n" for name, value in handle.env.items())
    return (
        f"{nodes} nodes are up. Ctrl-C stops them.\n\n"
        f"  Ray address   {handle.address}\n  job API       {handle.job_address}\n\n"
        f"In another shell:\n{exports}    onetomany submit jobs/quickstart.yaml --set "
        f"storage=$PWD/runs --address {handle.job_address}\n"
    )


def launch_node(
    handle: Handle, command: list[str], gpus: int, settings: Mapping[str, str] | None = None
) -> None:
    """Start one node. Its output goes to a file, so that nobody has to read a pipe.

    Args:
        settings: Further environment variables.
    """
    index = len(handle.nodes)
    env = with_gpus(node_environment(handle), index, gpus) | dict(settings or {})
    with open(handle.temp_dir / f"node{index}.out", "wb") as log:
        handle.nodes.append(
            subprocess.Popen(
                # two nodes with one folder replace the working directory of each other's running
                # jobs (seen)
                [*command, "--temp-dir", str(handle.temp_dir / str(index))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                # Ctrl-C must reach this process only, which stops the nodes in order
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        )


def _die_with_parent() -> None:
    """Let Linux send SIGTERM to this process when its parent dies (PR_SET_PDEATHSIG is 1)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def wait_until(
    handle: Handle, deadline: float, ready, what: str, stopped: threading.Event | None
) -> None:
    """Wait until ``ready()`` is true. Raise ClusterError where that cannot be."""
    while not ready():
        for index, node in enumerate(handle.nodes):
            if node.poll() is not None:
                raise ClusterError(
                    f"node {index} ended while starting:\n{_last_output(handle, index)}"
                )
        if stopped is not None and stopped.is_set():
            raise ClusterError("stopped while starting")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"waited {START_SECONDS:.0f} s for {what} in vain; is this machine overloaded?"
            )
        time.sleep(0.25)


def _last_output(handle: Handle, index: int) -> str:
    """Return the end of a node's output."""
    return (handle.temp_dir / f"node{index}.out").read_text(errors="replace")[-2000:]


def is_answering(handle: Handle) -> bool:
    """Return whether the job API takes requests, at the address that clients will use."""
    return get_json(handle, "/api/jobs/") is not None


def alive_nodes(handle: Handle) -> int:
    """Return the number of nodes that are alive; 0 while the dashboard cannot answer."""
    reply = get_json(handle, "/api/v0/nodes?detail=0&limit=1000&timeout=5")
    rows = reply["data"]["result"]["result"] if reply else []
    return sum(row["state"] == "ALIVE" for row in rows)


def get_json(handle: Handle, path: str):
    """Return the JSON at a path of the dashboard, or None while it cannot answer.

    No proxy is used, since it is on this machine.
    """
    request = urllib.request.Request(handle.job_address + path)
    if token_path := handle.env.get("RAY_AUTH_TOKEN_PATH"):
        request.add_header("Authorization", "Bearer " + Path(token_path).read_text())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as reply:
            return json.load(reply)
    except (OSError, ValueError):  # HTTP errors are OSErrors too
        return None


def node_environment(handle: Handle) -> dict[str, str]:
    """Return the environment of the nodes.

    It is that of this process without the addresses of other clusters, and with this Python first
    on PATH, since a submitted job is started as `python`.
    """
    foreign = ("RAY_AUTH_", "RAY_ENABLE_", "RAY_ADDRESS", "RAY_API_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    env |= handle.env | {MARK: handle.mark}
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # else a busy node takes 30 s to stop
    env["RAY_USAGE_STATS_ENABLED"] = "0"
    # else workers of a submitted job start through `uv run` where this process did
    env["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    env["TMPDIR"] = str(handle.temp_dir)  # Ray's dashboard leaves folders behind
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def with_gpus(env: dict[str, str], index: int, gpus: int) -> dict[str, str]:
    """Return the environment of node `index` with GPUs of its own.

    If all nodes counted from 0 they would share the first GPUs.
    """
    if not gpus:
        return env
    visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    numbers = range(index * gpus, (index + 1) * gpus)
    own = visible[numbers.start : numbers.stop] if visible else list(map(str, numbers))
    if len(own) < gpus:
        raise ClusterError(
            f"too few GPUs for node {index}: CUDA_VISIBLE_DEVICES={env['CUDA_VISIBLE_DEVICES']}"
        )
    return env | {"CUDA_VISIBLE_DEVICES": ",".join(own)}


def claim_port(host: str, port: int) -> int:
    """Return a free port, or the given one if it is free.

    If another process takes it before Ray does, Ray fails.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"cannot use port {port} on {host} ({error.strerror}); choose another one"
            ) from None
        return probe.getsockname()[1]


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        # psutil checks the start time: a reused id is not hit
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
