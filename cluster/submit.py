"""Run a job file on a Ray cluster through Ray Jobs: ship it, start it there, follow its log, return
its exit code.

    onetomany submit jobs/vision/vision.yaml --address http://head:8265 --set
    storage=s3://bucket/runs

What travels is one zip: the job file, the files that it names by relative paths, and this code, so
that the cluster runs what is installed here; its own installation only has to bring the
dependencies. Ray's dashboard takes at most 100 MiB in one request, so data of any size belongs on
shared storage. The driver runs on the head; tasks and trainers go where Ray places them.

Variables named with `env` reach every process of the job. They stand in clear in Ray's logs and in
the job API, so a name that looks like a secret is refused unless the caller insists: keys belong in
the environment that the cluster itself is started with, or in an instance role.
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
QUIET_SECONDS = (
    30.0  # after this long without a line, ask whether the job has ended behind a dead connection
)
RETRY_SECONDS = 2.0
LOST_SECONDS = 180.0


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
    """Submit `job_file` to the Ray cluster whose dashboard is at `address`; return the exit code of
    the job's process.

    Shipped are the job file, the files that it names (`named`, relative to it), those of `include`,
    and this code, all from below `working_dir` (default: the job file's folder), less `exclude`:
    see `package.collect`. The job runs there as `python -P -m python_module command JOB --address
    auto --set ...`. Every line of output, ours and the job's, goes to `echo`.

    `wait` says whether the job waits for nodes that are not there yet; none leaves it to the job,
    which waits where the cluster's autoscaler declares its nodes.

    With `follow=False` the return value is 0 as soon as the cluster has accepted the job. Ctrl-C
    while following leaves the job running and returns 130. A job that was stopped, or died before
    its process had an exit code, gives 1.

    Raises SubmitError when the address does not answer within about 10 s or wants a token, when the
    package is too big or something may not be shipped, when `env` names a secret and
    `secrets_in_clear` is not set, when the job file is unreadable, when the cluster refuses the
    job, or when contact is lost for 3 minutes.
    """
    job_file = Path(job_file).parent.resolve() / Path(job_file).name
    root = Path(working_dir or job_file.parent).resolve()
    if not job_file.is_relative_to(root):
        raise SubmitError(f"{job_file} is not under the folder to ship, {root}")
    if not secrets_in_clear:
        _refuse_secrets(env or {})
    storage = _storage(job_file, overrides)
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
        for line in _remarks(client, address, package, archive, storage, env or {}):
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
    """The shell command that the cluster runs, in the shipped folder, which Ray has put on
    PYTHONPATH.

    `-P` keeps Python from looking for modules in the current folder, whatever else lies there.
    """
    words = ["python", "-P", "-m", python_module, command, job.as_posix(), "--address", "auto"]
    if wait is not None:
        words.append("--wait-for-resources" if wait else "--no-wait-for-resources")
    return shlex.join(words + [word for override in overrides for word in ("--set", override)])


def parse_env(items: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` and `NAME` (its value here) as a mapping; SubmitError for a name that is not set
    here.
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
    """Those of the names that look like a secret's; the name of a file that holds one is none
    itself.
    """
    looks_secret = re.compile("SECRET|TOKEN|PASSW|KEY|CREDENTIAL", re.IGNORECASE)
    names_a_file = re.compile("_(FILE|PATH)$", re.IGNORECASE)
    return [name for name in names if looks_secret.search(name) and not names_a_file.search(name)]


def _refuse_secrets(env: Mapping[str, str]) -> None:
    """Raise SubmitError where a variable for the job looks like a secret."""
    if not (found := secret_names(env)):
        return
    raise SubmitError(
        f"--env {', '.join(found)}: the variables of a job stand in clear in Ray's logs on every "
        "node and in the job API. Give the cluster its keys where it is started (an instance role, "
        "a Kubernetes Secret, the environment of `ray start`), or add --secrets-in-clear if "
        "everyone who can reach this cluster may read them"
    )


class _Client(JobSubmissionClient):
    """Ray's client waits without limit; this one does not."""

    def __init__(self, address: str) -> None:
        super().__init__(address, headers=_auth_headers())
        self._ssl_context = True  # Ray's None means the same to aiohttp, with a DeprecationWarning

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        slow = method in ("PUT", "POST")
        read_seconds = (
            UPLOAD_SECONDS
            if slow
            else CONNECT_SECONDS
            if endpoint == "/api/version"
            else REQUEST_SECONDS
        )
        return super()._do_request(
            method, endpoint, timeout=(CONNECT_SECONDS, read_seconds), **options
        )


def _connect(address: str) -> _Client:
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
    """The token, from Ray's sources in Ray's order. Ray sends it only if RAY_AUTH_MODE=token was
    set at its import.
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
    """RAY_ADDRESS and RAY_API_SERVER_ADDRESS would win over the address given: a job sent elsewhere
    without a word.
    """
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _storage(job_file: Path, overrides: Sequence[str]) -> str:
    """Where the job will write, as text; the job itself is checked by the CLI, here and on the
    cluster.
    """
    try:
        job = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SubmitError(f"cannot read {job_file}: {error}") from error
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
) -> Iterator[str]:
    """What is shipped, and what the user may not expect."""
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
    there = client._server_ray_version
    if there and there != ray.__version__:
        yield f"warning: the cluster runs Ray {there}, this machine {ray.__version__}"
    if secret := secret_names(env):
        yield (
            f"warning: {', '.join(secret)} can be read by everyone who may use this cluster's job "
            "API"
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
    """The host of an address that is spoken to in clear over a network, or none for https and for
    this machine.
    """
    parts = urlsplit(address)
    host = parts.hostname or ""
    try:
        is_here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = host == "localhost" or host.endswith(".localhost")
    return None if parts.scheme != "http" or is_here else host


def _count_nodes(client: _Client) -> int | None:
    """How many nodes are alive now, or None where the cluster does not tell."""
    try:
        reply = client._do_request("GET", "/api/v0/nodes?limit=1000").json()
        return sum(row["state"] == "ALIVE" for row in reply["data"]["result"]["result"])
    except (AuthenticationError, requests.RequestException, ValueError, KeyError, TypeError):
        return None


class _Lines:
    """Passes whole lines on. After `restart` the log comes again from its beginning, and what was
    seen is skipped.
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
    """Print the log until the job ends, nothing twice. A broken stream is opened again; where there
    is none (a proxy without WebSockets), and at the end to be sure, the whole log is fetched.
    """
    lines, heard = _Lines(echo), time.monotonic()
    while True:
        lines.restart()
        # Whatever broke, the next request tells whether the job is still there
        with contextlib.suppress(Exception):
            await _tail(client, submission_id, lines)
        try:
            details = await asyncio.to_thread(client.get_job_info, submission_id)
            lines.restart()
            lines.feed(await asyncio.to_thread(client.get_job_logs, submission_id))
            if details.status.is_terminal():
                lines.close()
                return details
            heard = time.monotonic()
        except (
            RuntimeError,
            AuthenticationError,
            ConnectionError,
            requests.RequestException,
        ) as error:
            if time.monotonic() - heard > LOST_SECONDS:
                raise SubmitError(
                    f"lost contact with the cluster ({_last_line(error)}). {submission_id} may "
                    f"still be running: ray job logs --follow --address {client.get_address()} "
                    f"{submission_id}"
                ) from error
        await asyncio.sleep(RETRY_SECONDS)


async def _tail(client: _Client, submission_id: str, lines: _Lines) -> None:
    """Feed the log as it comes, until the server ends it or the job is found to have ended."""
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
    """`ray job submit` makes every failure a 1; the job's own code says more (2: bad arguments,
    137: killed).
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
    """The end of a server's traceback: the line that names the error."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)]
    return lines[-1] if lines else type(error).__name__
