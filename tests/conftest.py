"""How the tests run: the environment, a few processes for the whole of them, one Ray, and an S3
server.

The environment stands here since Ray, tokenizers and others read it when they are imported.
"""

import functools
import gc
import json
import logging
import os
import sys
import tempfile
import uuid
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import typer.testing

from pipeline.io.ray_environment import KEEP_MEMORY

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
"""The name of this process, where pytest-xdist started it beside others."""

for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # else workers start through `uv run`, in an environment of their own
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process less for each source
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # else workers of clusters that tests start have nice 15 and wait for the other tests
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # read by the processes that pytest-xdist starts: training in them is as quick as in Ray's workers
    **KEEP_MEMORY,
}.items():
    os.environ.setdefault(name, value)
# else each process of the tests, and each of Ray's, compiles the package anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.fsync = lambda descriptor: None  # no test cuts the power, and all of them wait for the disk
os.environ.setdefault(
    "ONETOMANY_TEST_GROUPS",
    os.path.join(tempfile.gettempdir(), f"onetomany-test-groups-{os.getpid()}.json"),
)
cache = os.path.join(tempfile.gettempdir(), f"onetomany-tests-{os.getuid()}")  # not the user's own
os.environ["ONETOMANY_CACHE"] = os.path.join(os.environ.get("ONETOMANY_CACHE", cache), WORKER)

import pytest  # noqa: E402

# what CliRunner calls: the command of an app is built once, and not for each call
typer.testing._get_command = functools.cache(typer.testing._get_command)

MOST_PROCESSES = 4
"""More gain little: the tests of Ray stay together in one process."""


# ---------------------------------------------------------------- processes


def pytest_xdist_auto_num_workers(config):
    """Processes for the whole suite; none (0) for named files, which are done sooner in the process
    that is there.

    They are one more than there are cores: the one with the tests of Ray waits most of its time. Of
    the long tests each fills a core or two, and Ray does not start where too many do.
    """
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    is_long_tier = config.option.markexpr == "slow"
    return min(MOST_PROCESSES, (os.cpu_count() or 1) + (not is_long_tier))


def pytest_collection_modifyitems(items):
    """Put the longest first, so that all processes end at about the same time, and tell the
    scheduler the groups of the tests of Ray: those that share one Ray, and those that start their
    own.

    Whole jobs are the longest, after the tests of Ray; of the other files, those of most bytes.
    The groups are told by a file, since pytest-xdist 3.8 cannot add them to the names of pytest 9.2.
    """
    sizes = {path: path.stat().st_size for path in {item.path for item in items}}

    def shortness(item):
        is_ray = item.get_closest_marker("ray") is not None
        return not is_ray, item.path.parent.name != "e2e", 0 if is_ray else -sizes[item.path]

    items.sort(key=shortness)
    if WORKER == "gw0":
        marks = {item.nodeid: item.get_closest_marker("ray") for item in items}
        groups = {
            name: "own ray" if mark.kwargs.get("own") else "ray"
            for name, mark in marks.items()
            if mark is not None
        }
        Path(os.environ["ONETOMANY_TEST_GROUPS"]).write_text(json.dumps(groups))
    _seed_quickly()
    gc.freeze()  # no later collection goes through what the imports made


def pytest_xdist_make_scheduler(config, log):
    """Hand out each group of Ray to one process, then whole files, which share their fixtures."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupsAndFiles(LoadScopeScheduling):
        @functools.cached_property
        def groups(self):
            file = Path(os.environ["ONETOMANY_TEST_GROUPS"])
            found = json.loads(file.read_text())
            file.unlink()
            return found

        def _split_scope(self, nodeid):
            return self.groups.get(nodeid) or nodeid.partition("::")[0]

    return GroupsAndFiles(config, log)


# ---------------------------------------------------------------- each test


class Log(logging.Handler):
    """What a test logs: warnings and worse, unless it sets the root logger's level."""

    def __init__(self):
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(self.format(record))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def clear(self) -> None:
        self.lines.clear()


LOG = Log()


@pytest.fixture
def caplog():
    """What the test has logged, as ``text``.

    Pytest's own fixture of that name, and its plugin, go through all loggers before each test.
    """
    return LOG


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Show what a test has logged where it fails."""
    report = yield
    if report.failed and LOG.lines:
        report.sections.append((f"Captured log {report.when}", LOG.text))
    return report


def pytest_runtest_setup(item):
    """A test without the mark sees no Ray: trials that can then run in this process do."""
    LOG.clear()
    logging.getLogger().addHandler(LOG)  # a library may have removed it
    _seed()  # for its fixtures
    if item.get_closest_marker("ray") is None:
        _stop_ray()


def pytest_runtest_call():
    LOG.clear()  # what fixtures have logged does not count, as with pytest's own caplog
    _seed()


def _seed():
    """Set torch's seed, so that what a test draws does not depend on the tests before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(0)


def _seed_quickly():
    """Keep no traceback of each ``torch.manual_seed`` for devices that are not there: that is most
    of its time.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            device.traceback = SimpleNamespace(format_stack=list)


# ---------------------------------------------------------------- Ray


def _stop_ray():
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def beam_search():
    """Skips a test of beam search where its library cannot be installed."""
    pytest.importorskip(
        "flashlight.lib.text.decoder", reason="flashlight-text has no wheel for this Python"
    )


@pytest.fixture(scope="session")
def start_ray(s3_server):
    """A function that starts the Ray that all tests share, unless it runs, and returns the module.

    It has two logical CPUs. The S3 server comes first, since Ray's processes have the environment
    of their start.
    """

    def start():
        import ray

        from pipeline.io.ray_environment import prepare_ray
        from pipeline.train.launch import ImportThisPackage

        if not ray.is_initialized():
            prepare_ray()
            ray.init(
                address="local",
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=400 << 20,
                log_to_driver=False,
                logging_level="ERROR",
                job_config=ImportThisPackage(),
            )
        return ray

    yield start
    _stop_ray()


@pytest.fixture
def ray_address(start_ray):
    """What processes join the shared Ray by, as ``--address`` or RAY_ADDRESS."""
    return start_ray().get_runtime_context().gcs_address


@pytest.fixture
def hide_ray():
    """A context in which nothing sees the shared Ray: work stays in this process."""

    @contextmanager
    def hidden():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ray.is_initialized", lambda: False)
            yield

    return hidden


@pytest.fixture
def ray_here(start_ray, request):
    """The shared Ray, whose workers get what the test's file defines by value, since they cannot
    import it.
    """
    ray = start_ray()
    ray.cloudpickle.register_pickle_by_value(request.module)
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(request.module)


# ---------------------------------------------------------------- ranks


@pytest.fixture(scope="session")
def team():
    """Call a function on two ranks of torch.distributed; ``team(f, ...)`` gives results by rank."""
    from rank_processes import Team

    ranks = Team(2)
    yield ranks
    ranks.stop()


# ---------------------------------------------------------------- storage


@pytest.fixture(scope="session")
def s3_server():
    """A bucket on moto's server at a real loopback port, so that subprocesses reach it too; yields
    s3://bucket.

    The AWS_* variables point to it until the session ends. Tests share the bucket: write below a
    prefix of your own.
    """
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "testing")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """An empty place of one's own, locally and on S3; on S3 the listing shows nothing there yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    return f"{request.getfixturevalue('s3_server')}/{uuid.uuid4().hex}"


@pytest.fixture
def fast(monkeypatch):
    """The pauses that the storage's own retries ask for, without waiting for them."""
    from pipeline.io import s3

    pauses, real = [], s3.retry
    monkeypatch.setattr(
        s3, "retry", lambda fn, *args, **kw: real(fn, *args, sleep=pauses.append, **kw)
    )
    return pauses
