"""Variables of the environment that Ray and the C library read when they start."""

import os
import platform

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
