"""Run a job file on a Ray cluster through Ray Jobs, follow its log, and return its exit code.

    onetomany submit jobs/vision/vision.yaml --address http://head:8265 \\
        --set storage=s3://bucket/runs

One zip is shipped: the job file, the files that it names by relative paths, and this code. The
cluster then runs the code that is installed here, and needs only the dependencies. Ray's dashboard
takes at most 100 MiB in one request, so large data must be on shared storage. The driver runs on
the head node; tasks and trainers run where Ray places them.

Variables named with `env` reach every process of the job. They are in clear text in Ray's logs and
in the job API, so a name that looks like a secret is refused unless the caller insists. Keys belong
in the environment that the cluster itself is started with, or in an instance role.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.package import Package, SubmitError, collect, write_zip

CONNECT_SECONDS = 10.0
REQUEST_SECONDS = 30.0
UPLOAD_SECONDS = 300.0
QUIET_SECONDS = 30.0
"""After this long without a line, ask whether the job has ended: the connection may be dead."""
RETRY_SECONDS = 2.0
LOST_SECONDS = 180.0
"""After this long without an answer of the cluster, give up."""
_VARIABLE = re.compile(r"\$\{(\w+)\}")
"""How a job names a variable of the environment."""


def submit(
    job_file: Path,
    address: str,
    *,
    overrides: Sequence[str] = (),
    command: str = "run",
    env: Mapping[str, str] | None = None,
    follow: bool = True,
    submission_id: str | None = None,
    working_dir: Path | None = None,
    named: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    python_module: str = "pipeline.cli",
    ship_code: bool = True,
    secrets_in_clear: bool = False,
    wait: bool | None = None,
    echo: Callable[[str], object] = print,
) -> int:
    """Submit a job file to a Ray cluster, and follow its log.

    The job runs there as ``python -P -m python_module command JOB --address auto --set ...``.

    Args:
        job_file: The job file.
        address: Address of the cluster's dashboard, such as http://head:8265.
        overrides: Fields of the job to set, as after ``--set``.
        command: The command that runs there.
        env: Variables for all processes of the job.
        follow: Follow the log until the job ends. Ctrl-C then leaves the job running.
        submission_id: Name of the submission; None: one that is made up.
        working_dir: The folder that files are shipped from; None: that of the job file.
        named: Files that the job names, relative to it (see `package.collect`).
        include: Further files to ship.
        exclude: Files not to ship.
        python_module: The module that runs there.
        ship_code: Ship this code too.
        secrets_in_clear: Allow ``env`` to name secrets.
        wait: Whether the job waits for nodes that are not there yet. None: it waits where the
            cluster's autoscaler declares its nodes.
        echo: Called with every line of output, ours and the job's.

    Returns:
        The exit code of the job's process; 1 where the job was stopped or died without one; 130
        after Ctrl-C. Without ``follow`` it is 0 as soon as the cluster has accepted the job.

    Raises:
        SubmitError: The address does not answer within about 10 s or needs a token; the package is
            too large or something may not be shipped; ``env`` names a secret; the job file cannot
            be read; the cluster refuses the job; or contact is lost for 3 minutes.
    """
    job_file = Path(job_file).parent.resolve() / Path(job_file).name
    root = Path(working_dir or job_file.parent).resolve()
    if not job_file.is_relative_to(root):
        raise SubmitError(f"{job_file} is not under the folder to ship, {root}")
    if not secrets_in_clear:
        _refuse_secrets(env or {})
    job = _read(job_file)
    unsent = sorted({*_VARIABLE.findall(repr((job, overrides)))} - {*(env or {})})
    package = collect(
        job_file, named, root=root, include=include, exclude=exclude, ship_code=ship_code
    )
    submission_id = (
        submission_id or f"{re.sub(r'[^A-Za-z0-9_-]+', '-', job_file.stem)}-{secrets.token_hex(4)}"
    )
    for chatty in ("dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)
    with _without_ray_addresses(), tempfile.TemporaryDirectory(prefix="onetomany-") as folder:
        client = _connect(address)
        archive = write_zip(package, Path(folder) / "package.zip")
        storage = _storage(job, overrides)
        for line in _remarks(client, address, package, archive, storage, env or {}, unsent):
            echo(line)
        try:
            client.submit_job(
                entrypoint=entrypoint(
                    job_file.relative_to(root), overrides, command, python_module, wait
                ),
                submission_id=submission_id,
                runtime_env={"working_dir": str(archive), "env_vars": dict(env or {})},
                metadata={"job_file": job_file.name},
            )
        except (RuntimeError, AuthenticationError, requests.RequestException) as error:
            raise SubmitError(f"{address} did not accept the job: {_last_line(error)}") from error
        manage = f"--address {address} {submission_id}"
        echo(f"submitted {submission_id}; dashboard: {address}/#/jobs/{submission_id}")
        echo(f"  follow: ray job logs --follow {manage}")
        echo(f"  stop:   ray job stop {manage}")
        if not follow:
            return 0
        try:
            details = asyncio.run(_follow(client, submission_id, echo))
        except KeyboardInterrupt:
            echo(
                f"no longer following; {submission_id} goes on. Its log: ray job logs --follow "
                f"{manage}"
            )
            echo(f"To stop it: ray job stop {manage}")
            return 130
    return _exit_code(details, submission_id, echo)


def entrypoint(
    job: Path,
    overrides: Sequence[str] = (),
    command: str = "run",
    python_module: str = "pipeline.cli",
    wait: bool | None = None,
) -> str:
    """Return the shell command that the cluster runs in the shipped folder.

    Ray puts that folder on PYTHONPATH. `-P` keeps Python from looking for modules in the current
    folder.
    """
    words = ["python", "-P", "-m", python_module, command, job.as_posix(), "--address", "auto"]
    if wait is not None:
        words.append("--wait-for-resources" if wait else "--no-wait-for-resources")
    return shlex.join(words + [word for override in overrides for word in ("--set", override)])


def parse_env(items: Iterable[str]) -> dict[str, str]:
    """Return a dict from texts `NAME=VALUE`, or `NAME` for a variable of this process.

    Raises:
        SubmitError: There is no such variable.
    """
    env: dict[str, str] = {}
    for item in items:
        name, has_value, value = item.partition("=")
        if not name.isidentifier():
            raise SubmitError(f"{item!r} is neither NAME nor NAME=VALUE")
        if not has_value and name not in os.environ:
            raise SubmitError(f"{name} is not set here; set it, or write {name}=VALUE")
        env[name] = value if has_value else os.environ[name]
    return env


def secret_names(names: Iterable[str]) -> list[str]:
    """Return the names that look like those of secrets. That of a file with a secret does not."""
    looks_secret = re.compile("SECRET|TOKEN|PASSW|KEY|CREDENTIAL", re.IGNORECASE)
    names_a_file = re.compile("_(FILE|PATH)$", re.IGNORECASE)
    return [name for name in names if looks_secret.search(name) and not names_a_file.search(name)]


def _refuse_secrets(env: Mapping[str, str]) -> None:
    """Raise SubmitError where a variable for the job looks like a secret."""
    named = secret_names(env)
    if not named:
        return
    raise SubmitError(
        f"--env {', '.join(named)}: the variables of a job stand in clear in Ray's logs on every "
        "node and in the job API. Give the cluster its keys where it is started (an instance role, "
        "a Kubernetes Secret, the environment of `ray start`), or add --secrets-in-clear if "
        "everyone who can reach this cluster may read them"
    )


class _Client(JobSubmissionClient):
    """Ray's client with time limits: Ray's own waits for ever."""

    def __init__(self, address: str) -> None:
        super().__init__(address, headers=_auth_headers())
        self._ssl_context = True  # Ray's None means the same to aiohttp, with a DeprecationWarning

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        read_seconds = REQUEST_SECONDS
        if method in ("PUT", "POST"):
            read_seconds = UPLOAD_SECONDS
        elif endpoint == "/api/version":
            read_seconds = CONNECT_SECONDS
        return super()._do_request(
            method, endpoint, timeout=(CONNECT_SECONDS, read_seconds), **options
        )


def _connect(address: str) -> _Client:
    """Return a client of the dashboard. Raise SubmitError where it does not answer, or refuses."""
    if not re.match(r"https?://[^/]", address):
        raise SubmitError(
            f"{address!r} is not the address of a Ray dashboard, such as http://head:8265 (6379 "
            "and 10001 are other services). `ray dashboard CLUSTER.yaml` or `kubectl port-forward` "
            "brings that port here"
        )
    try:
        return _Client(address)
    except AuthenticationError as error:
        state = "refused the one given" if _auth_headers() else "none is set here"
        raise SubmitError(
            f"{address} wants a token, and {state}. Get it from the cluster (`ray get-auth-token` "
            "there, a Kubernetes Secret with KubeRay), then set RAY_AUTH_TOKEN to it or "
            "RAY_AUTH_TOKEN_PATH to a file with it, and RAY_AUTH_MODE, where it is set at all, to "
            "token"
        ) from error
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise SubmitError(
            f"no Ray dashboard answered at {address} within {CONNECT_SECONDS:.0f} s. Is the "
            "cluster up, and its port 8265 open or forwarded to this machine (`ray dashboard "
            "CLUSTER.yaml`, `kubectl port-forward`)?"
        ) from error
    except (RuntimeError, ValueError, KeyError, requests.RequestException) as error:
        raise SubmitError(
            f"what answers at {address} is not a Ray dashboard: {_last_line(error)}"
        ) from error


def _auth_headers() -> dict[str, str]:
    """Return the header with the token, which is looked up as Ray does.

    Ray itself sends it only if RAY_AUTH_MODE=token was set when Ray was imported.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token:
        named = os.environ.get("RAY_AUTH_TOKEN_PATH")
        file = Path(named) if named else Path.home() / ".ray" / "auth_token"
        if not named and not file.exists():
            return {}
        try:
            token = file.read_text()
        except OSError as error:
            raise SubmitError(f"cannot read the token at {file}: {error.strerror}") from None
    return {"Authorization": f"Bearer {token.strip()}"}


@contextlib.contextmanager
def _without_ray_addresses() -> Iterator[None]:
    """Unset RAY_ADDRESS and RAY_API_SERVER_ADDRESS in the block.

    Ray's client would use them in place of the address that it is given.
    """
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _read(job_file: Path) -> Any:
    """Return what a job file holds. The job itself is checked by the command line."""
    try:
        return yaml.safe_load(job_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SubmitError(f"cannot read {job_file}: {error}") from error


def _storage(job: Any, overrides: Sequence[str]) -> str:
    """Return the job's storage."""
    values = [
        override.partition("=")[2] for override in overrides if override.startswith("storage=")
    ]
    return str(
        values[-1] if values else job.get("storage", "runs") if isinstance(job, dict) else "runs"
    )


def _remarks(
    client: _Client,
    address: str,
    package: Package,
    archive: Path,
    storage: str,
    env: Mapping[str, str],
    unsent: Sequence[str],
) -> Iterator[str]:
    """Yield lines on what is shipped, and warnings.

    Args:
        unsent: Variables that the job names and that are not sent with it.
    """
    left_out = f"; left out: {', '.join(package.left_out[:8])}" if package.left_out else ""
    more = f" and {len(package.left_out) - 8} more" if len(package.left_out) > 8 else ""
    yield (
        f"shipping {len(package.files)} files, {archive.stat().st_size / 2**20:.1f} "
        f"MiB{left_out}{more}"
    )
    if host := unencrypted_host(address):
        yield (
            f"warning: what goes to {host} by http can be read and changed on the way: the token, "
            "the code, the data. Use a tunnel to a port of this machine (`ray dashboard "
            "CLUSTER.yaml`, `kubectl port-forward`) or https"
        )
    version = client._server_ray_version
    if version and version != ray.__version__:
        yield f"warning: the cluster runs Ray {version}, this machine {ray.__version__}"
    if secret := secret_names(env):
        yield (
            f"warning: {', '.join(secret)} can be read by everyone who may use this cluster's job "
            "API"
        )
    if unsent:
        yield (
            f"note: the job reads {', '.join(unsent)} from the environment, which is that of the "
            "cluster: set it there, or send the value from here with --env NAME"
        )
    if "://" in storage.removeprefix("file://") or storage.startswith("${"):
        return
    if not os.path.isabs(storage.removeprefix("file://")):
        yield (
            f"warning: storage is {storage!r}, a folder in the job's temporary copy on the "
            "cluster, which is deleted later, results and all. Use s3://bucket/prefix or an "
            "absolute path on a disk that every node shares"
        )
    elif (nodes := _count_nodes(client)) != 1:
        count = nodes or "of the"
        yield (
            f"warning: {storage} must be one disk that all {count} nodes share, or the run cannot "
            "find its own files"
        )


def unencrypted_host(address: str) -> str | None:
    """Return the host of an http address, or None for https and for this machine."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost" or host.endswith(".localhost")
    return None if parts.scheme != "http" or is_here else host


def _count_nodes(client: _Client) -> int | None:
    """Return how many nodes are alive now, or None where the cluster does not say."""
    try:
        reply = client._do_request("GET", "/api/v0/nodes?limit=1000").json()
        return sum(row["state"] == "ALIVE" for row in reply["data"]["result"]["result"])
    except (AuthenticationError, requests.RequestException, ValueError, KeyError, TypeError):
        return None


class LogLines:
    """Passes complete lines of a log to ``echo``.

    After `restart` the log comes again from its beginning, and text that was seen is skipped.
    """

    def __init__(self, echo: Callable[[str], object]) -> None:
        self.echo, self.seen, self.position, self.partial = echo, 0, 0, ""

    def restart(self) -> None:
        self.position = 0

    def feed(self, text: str) -> None:
        fresh = text[max(0, self.seen - self.position) :]
        self.position += len(text)
        self.seen = max(self.seen, self.position)
        *lines, self.partial = (self.partial + fresh).split("\n")
        for line in lines:
            self.echo(line)

    def close(self) -> None:
        if self.partial:
            self.echo(self.partial)


async def _follow(client: _Client, submission_id: str, echo: Callable[[str], object]) -> JobDetails:
    """Print the log until the job ends, each line once.

    A broken stream is opened again. Where there is no stream (a proxy without WebSockets), and
    once at the end, the complete log is fetched.
    """
    lines, last_answer = LogLines(echo), time.monotonic()
    while True:
        lines.restart()
        # whatever broke, the next request shows whether the job is still running
        with contextlib.suppress(Exception):
            await _tail(client, submission_id, lines)
        try:
            details = await asyncio.to_thread(client.get_job_info, submission_id)
            lines.restart()
            lines.feed(await asyncio.to_thread(client.get_job_logs, submission_id))
            if details.status.is_terminal():
                lines.close()
                return details
            last_answer = time.monotonic()
        except (
            RuntimeError,
            AuthenticationError,
            ConnectionError,
            requests.RequestException,
        ) as error:
            if time.monotonic() - last_answer > LOST_SECONDS:
                raise SubmitError(
                    f"lost contact with the cluster ({_last_line(error)}). {submission_id} may "
                    f"still be running: ray job logs --follow --address {client.get_address()} "
                    f"{submission_id}"
                ) from error
        await asyncio.sleep(RETRY_SECONDS)


async def _tail(client: _Client, submission_id: str, lines: LogLines) -> None:
    """Pass the log on as it comes, until the server ends it or the job has ended."""
    stream = client.tail_job_logs(submission_id)
    chunk: asyncio.Future[str] | None = None
    try:
        while True:
            chunk = chunk or asyncio.ensure_future(anext(stream))
            if not (await asyncio.wait({chunk}, timeout=QUIET_SECONDS))[0]:
                details = await asyncio.to_thread(client.get_job_info, submission_id)
                if details.status.is_terminal():
                    return
                continue
            try:
                lines.feed(chunk.result())
            except StopAsyncIteration:
                return
            chunk = None
    finally:
        if chunk is not None:
            chunk.cancel()


def _exit_code(details: JobDetails, submission_id: str, echo: Callable[[str], object]) -> int:
    """Return the exit code of the job's own process, such as 2 for bad input or 137 for killed.

    That of `ray job submit` is 1 for every failure.
    """
    if details.status == JobStatus.SUCCEEDED:
        echo(f"{submission_id} succeeded")
        return 0
    code = details.driver_exit_code
    ended = "was stopped" if details.status == JobStatus.STOPPED else "failed"
    echo(
        f"{submission_id} {ended} with exit code {code}"
        if code
        else f"{submission_id} {ended}: {details.message}"
    )
    return (128 - code if code < 0 else code) if code else 1


def _last_line(error: BaseException) -> str:
    """Return the last line of a server's traceback, which names the error."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else type(error).__name__
