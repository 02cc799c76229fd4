"""What Ray and the C library read when they start, and what they print."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # else a job under `uv run` builds an environment anew for each of its workers
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    # else workers of a Ray that is started here run at nice 15, behind all else on the machine
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
    "TOKENIZERS_PARALLELISM": "false",
}

KEEP_MEMORY = {
    # glibc hands blocks above 32 MiB back to the system whenever they are freed, and the next
    # tensor's pages are then made anew, one by one: WaveNet's step on a CPU took 3.5 s so, and
    # takes 1.2 s. Its arenas of 64 MiB a thread would each be wasted on one large tensor (2.7 GB in
    # the place of 1.9). What a trial took goes back at its end (`fanout.release_memory`).
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_ARENA_MAX": "1",
}


def prepare_ray() -> None:
    """Set what Ray, Tune, the tokenizers and the C library of Ray's workers read.

    Most of it is read when they are imported. The user's own values stay. On a cluster that is
    joined, workers have their nodes' environment.
    """
    library, version = platform.libc_ver()
    # glibc before 2.35 refused a threshold above 32 MiB
    keeps = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
    for name, value in (RAY_SETTINGS | (KEEP_MEMORY if keeps else {})).items():
        os.environ.setdefault(name, value)


NOISE = (
    # of each process of a Ray Data pool that is started from here: Ray Data holds the arguments
    "has constructor arguments in the object store and max_restarts > 0",
)
"""Lines that Ray's C++ code prints as errors (regular expressions of grep) and that are none."""


@contextmanager
def without_noise() -> Iterator[None]:
    """Keep the lines of NOISE out of the terminal while the block runs.

    Ray's C++ code writes them to file descriptor 2, whatever its level of logging. A process beside
    this one passes on all other lines, so that a crash of this one loses none. What Python writes
    to ``sys.stderr`` goes to the terminal as before.
    """
    grep = shutil.which("grep")
    if grep is None:
        yield
        return
    sys.stderr.flush()
    terminal, python_stderr = os.dup(2), sys.stderr
    words = [word for line in NOISE for word in ("-e", line)]
    passing_on = subprocess.Popen(
        [grep, "--text", "--line-buffered", "--invert-match", *words],
        stdin=subprocess.PIPE,
        stdout=terminal,
        start_new_session=True,  # Ctrl-C ends the run, which then has more to say
    )
    assert passing_on.stdin is not None
    os.dup2(passing_on.stdin.fileno(), 2)
    passing_on.stdin.close()
    is_real = False
    with suppress(OSError, ValueError):  # a stand-in, in tests and notebooks
        is_real = python_stderr.fileno() == 2
    if is_real:
        sys.stderr = open(  # noqa: SIM115
            terminal,
            "w",
            buffering=1,
            closefd=False,
            encoding=python_stderr.encoding,
            errors="backslashreplace",
        )
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        if is_real:
            sys.stderr = python_stderr
        else:
            os.close(terminal)  # else a handler of logging may hold the stream that writes to it
        # it ends with the last process that has its input, which may be one that outlives the block
        with suppress(subprocess.TimeoutExpired):
            passing_on.wait(timeout=1)
