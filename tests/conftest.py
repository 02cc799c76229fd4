"""Settings that must stand before anything imports ray, and an S3 server for the tests."""

import os
import tempfile
import uuid

for name, value in {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # else workers start through `uv run`, in an environment of their own
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "ONETOMANY_CACHE": os.path.join(
        tempfile.gettempdir(), f"onetomany-tests-{os.getuid()}"
    ),  # not the user's own
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402


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
