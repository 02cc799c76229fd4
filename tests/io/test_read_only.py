"""Files that are only read: on web servers with and without ranges, on the hub, in buckets."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import run_python
from web_server import web_server

from pipeline.config import extras
from pipeline.data import manifests, to_parquet
from pipeline.io import (
    atomic_folder,
    checksums,
    file_identity,
    http_files,
    read_only,
    run_lock,
    storage,
)
from pipeline.io.storage import NotFoundError, StorageError

DATA = bytes(range(256)) * 40
AZURITE_KEY = (  # published by Azurite, the same for everybody
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)


@pytest.fixture
def web(fast):
    with web_server() as served:
        yield served


@pytest.fixture(params=[True, False], ids=["ranges", "whole"])
def either(request, web):
    """A server that answers ranges, and one that sends files only as a whole."""
    web.ranges = request.param
    return web


def test_files_are_read_as_local_ones_are(either):
    uri = either.put("a.bin", DATA)
    assert (storage.exists(uri), storage.is_dir(uri), storage.size(uri)) == (True, False, len(DATA))
    assert storage.read_bytes(uri) == DATA and storage.read_range(uri, 10, 20) == DATA[10:20]
    assert storage.read_range(uri, len(DATA) - 3, len(DATA) + 5) == DATA[-3:]
    assert storage.glob(f"{uri}?download=1") == [f"{uri}?download=1"]
    with storage.open_read(uri) as file:
        file.seek(-5, io.SEEK_END)
        assert file.read() == DATA[-5:] and file.seek(256) == 256 and file.read(2) == b"\0\1"
    assert storage.read_bytes(either.put("empty", b"")) == b""
    assert storage.read_bytes(either.put("one", b"1")) == b"1"


def test_large_files_come_in_ranges(web):
    uri = web.put("a.bin", DATA * 1000)
    with storage.open_read(uri) as file:
        file.seek(5_000_000)
        assert file.read(256) == DATA[5_000_000 % 256 :][:256]
    assert len(web.requests) == 2 and web.requests[-1].endswith("bytes=5000000-6048575")


def test_errors_that_pass_are_retried_and_others_say_what_to_do(web):
    uri = web.put("a.bin", DATA)
    web.failures = [503, 429, 500]
    assert storage.read_bytes(uri) == DATA
    web.failures = [503] * 99
    with pytest.raises(StorageError, match=r"the server answers 503.*tried 5 times"):
        storage.exists(uri)
    web.failures = []
    assert not storage.exists(f"{web.address}/absent")
    with pytest.raises(NotFoundError, match=r"the server answers 404.*check the address"):
        storage.read_bytes(f"{web.address}/absent")
    web.failures, before = [403], len(web.requests)
    with pytest.raises(StorageError, match=r"answers 403.*credentials"):
        storage.read_bytes(uri)
    assert len(web.requests) == before + 1


@pytest.mark.parametrize(
    "write",
    [
        lambda uri: storage.write_bytes(uri, b"x"),
        lambda uri: storage.create(uri, b"x"),
        lambda uri: storage.check_writable(uri),
        lambda uri: storage.remove_tree(uri),
        lambda uri: storage.keeps_conditions(uri),
        lambda uri: atomic_folder.commit_folder(uri, {"a": b"x"}, {}),
        lambda uri: run_lock.hold(uri).__enter__(),
    ],
    ids=["write", "create", "check", "remove", "conditions", "commit", "lock"],
)
def test_nothing_is_written(web, write):
    with pytest.raises(StorageError, match=r"http:// is only read.*use a folder or s3://"):
        write(f"{web.address}/folder")
    assert web.requests == []


def test_servers_list_no_files(web):
    with pytest.raises(StorageError, match="do not list files, so name each file"):
        storage.glob(f"{web.address}/*.parquet")
    with pytest.raises(StorageError, match=r"http:// is only read|a slash is lost"):
        storage.read_bytes("http:/host/a")


def test_a_mistyped_address_is_not_found(web):
    with pytest.raises(NotFoundError):
        to_parquet.expand([f"{web.address}/rows.parquet"], "auto")


def test_files_are_identified_by_their_bytes_wherever_they_are(either, tmp_path, monkeypatch):
    monkeypatch.setattr(file_identity, "PIECE_BYTES", 4000)
    monkeypatch.setattr(file_identity, "GRAIN_SECONDS", -1e6)  # no wait for a file to be older
    (tmp_path / "a.bin").write_bytes(DATA)
    (tmp_path / "b.bin").write_bytes(DATA[:100])
    for name, data in (("a.bin", DATA), ("b.bin", DATA[:100])):
        found = file_identity.fingerprint(either.put(name, data))
        assert found == file_identity.fingerprint(tmp_path / name)
    assert file_identity.identify([f"{either.address}/no"], absent_ok=True)[0].content == "absent"


def test_what_was_read_is_remembered_while_the_etag_is_the_same(web, monkeypatch, tmp_path):
    monkeypatch.setenv("ONETOMANY_CACHE", str(tmp_path))
    uri = web.put("a.bin", DATA)
    first = file_identity.identify([uri])[0]
    web.requests.clear()
    assert file_identity.identify([uri])[0] == first and len(web.requests) == 1
    web.put("a.bin", DATA[::-1])
    assert file_identity.identify([uri])[0].content != first.content
    with pytest.raises(file_identity.ChangedFileError, match="changed while it was in use"):
        file_identity.check_unchanged([first])
    with pytest.raises(file_identity.ChangedFileError):
        file_identity.open_unchanged(first)


def test_two_files_with_one_etag_are_two_files(web):
    """The ETag of many servers is made of size and time alone."""
    one, two = (
        file_identity.identify([web.put(name, DATA)], "stat")[0] for name in ("a.bin", "b.bin")
    )
    assert one.stamp == two.stamp and one.content != two.content


def test_a_file_that_is_replaced_while_it_is_open_is_not_read_on(either):
    uri = either.put("a.bin", DATA * 1000)
    with storage.open_read(uri) as file:
        either.put("a.bin", DATA[::-1] * 1000)
        with pytest.raises(StorageError, match="changed while it was read"):
            file.read(100)


def test_servers_that_do_not_tell_of_a_change(web):
    web.validators = False
    uri = web.put("a.bin", DATA)
    with pytest.raises(StorageError, match="neither ETag nor Last-Modified"):
        storage.read_bytes(uri)
    web.ranges = False  # the content itself tells it
    assert storage.read_bytes(uri) == DATA


def test_a_file_that_comes_only_as_a_whole_has_a_limit(web, monkeypatch):
    monkeypatch.setattr(http_files, "WHOLE_BYTES", 1000)
    web.ranges = False
    uri = web.put("a.bin", DATA)
    with pytest.raises(StorageError, match=r"only as a whole.*download it"):
        storage.read_bytes(uri)


def test_a_python_server_is_read():
    """Python's own server sends no ranges and no ETag, only times of change."""
    source = """
import functools, http.server, pathlib, sys, tempfile, threading
from pipeline.io import file_identity, storage
folder = tempfile.mkdtemp()
pathlib.Path(folder, "a.txt").write_bytes(b"hello")
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
uri = f"http://127.0.0.1:{server.server_port}/a.txt"
print(storage.read_bytes(uri), file_identity.fingerprint(uri)[:9])
"""
    found = run_python(source)
    assert found.stdout.strip() == "b'hello' 5-sha256:", found.stderr


def test_rows_are_read_by_other_processes(web, tmp_path):
    table = pa.table({"x": np.arange(1000), "text": [f"row {i}" for i in range(1000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100)
    uri = web.put("rows.parquet", buffer.getvalue())
    manifest = manifests.build([uri], "auto", str(tmp_path))
    assert manifest.num_rows == 1000
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found = pool.submit(_rows, manifest).result()
    assert found == ["row 0", "row 999"]


def _rows(manifest):
    reader = manifests.Reader(manifest, ["text"])
    return reader.take(np.array([0, 999])).column("text").to_pylist()


def rows_of_parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": [1, 2, 3]}), buffer)
    return buffer.getvalue()


SIGNED = pytest.mark.parametrize(
    ("name", "data"),
    [
        ("reviews.csv", b"text,stars\ngood,5\nbad,1\n"),
        ("reviews.tsv", b"text\tstars\ngood\t5\nbad\t1\n"),
        ("rows.parquet", rows_of_parquet()),
        ("cats/1.png", b"a picture"),
    ],
)


@SIGNED
def test_a_signature_is_no_part_of_a_fingerprint(web, tmp_path, name, data):
    """A server signs addresses anew each hour, and answers 403 for what was not signed."""
    web.missing = 403
    uri = web.put(name, data)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(data)
    found = [
        manifests.build([place], "auto", str(tmp_path / "imports"))
        for place in (str(file), uri, f"{uri}?Signature=a/b%3D", f"{uri}?Signature=c/d/e")
    ]
    assert len({manifest.fingerprint for manifest in found}) == 1
    assert "Signature" not in found[-1].name() + found[-1].location(0)
    labels = [
        manifests.Reader(manifest, ["label"]).take(np.array([0])).column(0).to_pylist()
        for manifest in found
        if "label" in manifest.schema.names
    ]
    assert labels in ([], [["cats"]] * 4)


@SIGNED
def test_a_signature_is_no_part_of_what_is_known_without_reading(web, tmp_path, name, data):
    """With `identity: stat` the address counts, as two files may have one ETag; its query not."""
    web.missing = 403
    uri = web.put(name, data)
    other = web.put(f"other/{name}", data)
    found = [
        manifests.build_with_files(place, "auto", str(tmp_path / "imports"), "stat")[0]
        for place in (uri, f"{uri}?Signature=one", f"{uri}?Signature=two", other)
    ]
    first, *same, apart = (manifest.fingerprint for manifest in found)
    assert set(same) == {first}
    kept = [file for file in tmp_path.rglob("*") if file.is_file()]
    if name.endswith("sv"):  # known by its rows once it is brought in: once for each of two files
        assert len([file for file in kept if file.suffix == ".parquet"]) == 2
    else:
        assert apart != first
    if not name.endswith(".png"):  # whose rows have the addresses to read
        assert not any(b"Signature" in file.read_bytes() for file in kept)


def test_a_folder_that_forbids_a_look_has_no_manifest_of_prepare(web, tmp_path):
    web.missing = 403
    uri = web.put("rows.parquet", rows_of_parquet())
    assert manifests.build([uri], "auto", str(tmp_path)).num_rows == 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("cannot read https://h/a?X=5%2F: gone", "cannot read https://h/a?***: gone"),
        ("https://u:p@ss@h/a, s3://b/part-?.csv", "https://***@h/a, s3://b/part-?.csv"),
        ("<code>https://h/a?x=1</code>", "<code>https://h/a?***</code>"),
        ('["https://h/a?x=1","me@h"]', '["https://h/a?***","me@h"]'),
        ("https://me:a@2@h/rows?sig=a, s3://b/a@b", "https://***@h/rows?***, s3://b/a@b"),
        ("mysql+pymysql://u:p@h/runs?key=a", "mysql+pymysql://***@h/runs?***"),
        ("hf://datasets/me/reviews@v1/a.csv", "hf://datasets/me/reviews@v1/a.csv"),
    ],
)
def test_secrets_of_addresses_are_left_out_of_texts(text, wanted):
    assert storage.without_secrets(text) == wanted


def test_committed_folders_are_fetched_and_checked(web, tmp_path):
    local = tmp_path / "bundle"
    manifest = atomic_folder.commit_folder(local, {"weights": DATA, "sub/b": b"x"}, {"n": 1})
    for file in storage.list_files(local):
        web.put(f"bundle/{file[len(str(local)) + 1 :]}", storage.read_bytes(file))
    uri = f"{web.address}/bundle"
    checksums.check_folder(uri, atomic_folder.open_folder(uri))
    copy = atomic_folder.fetch_folder(uri, tmp_path / "copy")
    assert storage.read_bytes(copy / "weights") == DATA
    assert json.loads((copy / "manifest.json").read_bytes()) == manifest
    web.put("bundle/weights", DATA[::-1])
    with pytest.raises(storage.DamagedError, match="weights is damaged"):
        checksums.check_folder(uri, atomic_folder.open_folder(uri))


# --- the hub ---

HUB = """
import json, sys
from pipeline.data import manifests
from pipeline.io import file_identity, storage
root, imports = "hf://datasets/me/reviews@v1", sys.argv[1]
found = {
    "glob": storage.glob(f"{root}/data/*.csv"),
    "folders": [storage.is_dir(uri) for uri in (root, f"{root}/data", f"{root}/data/a.csv")],
    "there": [storage.exists(f"{root}/data/{name}.csv") for name in "abc"],
    "rows": manifests.build([f"{root}/data"], "auto", imports).num_rows,
    "content": file_identity.fingerprint(f"{root}/data/a.csv"),
}
try:
    storage.write_bytes(f"{root}/data/c.csv", b"")
except storage.StorageError as error:
    found["write"] = str(error)
try:
    storage.read_bytes("hf://gpt2/config.json/")
except storage.StorageError as error:
    found["no repository"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_repositories_of_the_hub(web, tmp_path, monkeypatch):
    """In a process of its own, as the client of the hub reads HF_ENDPOINT when it is imported."""
    files = {"data/a.csv": b"text,stars\ngood,5\nbad,1\n", "data/b.csv": b"text,stars\nfair,3\n"}
    for name, data in files.items():
        web.put(f"datasets/me/reviews/resolve/v1/{name}", data)
    listed = [{"type": "file", "path": n, "size": len(d), "oid": n} for n, d in files.items()]
    folder = [{"type": "directory", "path": "data", "oid": "x"}]
    for path, recursive, answer in (
        ("", False, folder),
        ("", True, folder + listed),
        ("/data", False, listed),
        ("/data", True, listed),
    ):
        for query in (f"?recursive={recursive}", f"?recursive={str(recursive).lower()}"):
            for more in ("", "&expand=False", "&expand=false"):
                where = f"/api/datasets/me/reviews/tree/v1{path}{query}{more}"
                web.answers[where] = json.dumps(answer).encode()
    monkeypatch.setenv("HF_ENDPOINT", web.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    netrc = tmp_path / "netrc"  # git's login for large files; the token counts
    netrc.write_text("machine 127.0.0.1 login me password other\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    done = run_python(HUB, str(tmp_path))
    assert done.returncode == 0, (done.stderr, web.requests)
    found = json.loads(done.stdout)
    root = "hf://datasets/me/reviews@v1"
    assert found["glob"] == [f"{root}/{name}" for name in files]
    assert found["folders"] == [True, True, False] and found["there"] == [True, True, False]
    assert found["rows"] == 3
    (tmp_path / "a.csv").write_bytes(files["data/a.csv"])
    assert found["content"] == file_identity.fingerprint(tmp_path / "a.csv")
    assert "hf:// is only read" in found["write"]
    assert web.tokens == {"Bearer hf_secret"} and "hf_secret" not in done.stdout + done.stderr


# --- Google Cloud Storage and Azure Storage ---


@contextmanager
def google_bucket():
    """An emulator on loopback with an empty bucket; yield what puts an object there."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="rows")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        from gcsfs import core

        files = core.GCSFileSystem(token="anon", use_listings_cache=False, skip_instance_cache=True)
        yield lambda name, data: files.pipe_file(f"rows/{name}", data)
    server.stop()


@contextmanager
def azure_container():
    """Azurite, Azure's own emulator, with an empty container; yield what puts a blob there."""
    pytest.importorskip("adlfs")
    program = os.environ.get("AZURITE_BLOB") or shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no azurite-blob (npm install azurite) in PATH or AZURITE_BLOB")
    from azure.storage.blob import BlobServiceClient

    options = ["--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck"]
    command = [program, *options, "--disableTelemetry"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            said = next(line for line in server.stdout or () if "successfully listens on" in line)
            account, endpoint = "devstoreaccount1", said.split()[-1]
            login = (
                f"AccountName={account};AccountKey={AZURITE_KEY};BlobEndpoint={endpoint}/{account}"
            )
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", login)
            container = BlobServiceClient.from_connection_string(login).create_container("rows")
            yield lambda name, data: container.upload_blob(name, data, overwrite=True)
        finally:
            server.terminate()


@pytest.fixture(scope="module", params=["gs", pytest.param("az", marks=pytest.mark.slow)])
def bucket(request):
    """A store's scheme, and what puts an object into its bucket ``rows``."""
    make = {"gs": google_bucket, "az": azure_container}[request.param]
    read_only.store_of_module.cache_clear()
    with make() as put:
        yield request.param, put
    read_only.store_of_module.cache_clear()


def test_objects_of_a_bucket(bucket, tmp_path):
    scheme, put = bucket
    files = {
        "data/a.csv": b"text,stars\ngood,5\nbad,1\n",
        "data/deep/b #1.csv": b"text,stars\nfair,3\n",
    }
    beside = {"both": DATA, "both/d.bin": DATA, "both2/e.bin": DATA}
    for name, data in {**files, "other/c.bin": DATA, **beside}.items():
        put(name, data)
    for recursive in (True, False):  # where an object has the name of the folder too
        found = storage.list_files(f"{scheme}://rows/both", recursive)
        assert found == [f"{scheme}://rows/both/d.bin"]
    root, other = f"{scheme}://rows/data", f"{scheme}://rows/other/c.bin"
    assert storage.list_files(root) == [f"{scheme}://rows/{name}" for name in files]
    assert storage.list_files(root, recursive=False) == [f"{root}/a.csv"]
    assert storage.list_files(f"{root}/a.csv") == storage.glob(f"{root}/*.csv") == [f"{root}/a.csv"]
    assert storage.list_files(f"{scheme}://rows/dat") == []
    assert [storage.is_dir(uri) for uri in (root, f"{root}/a.csv")] == [True, False]
    assert storage.exists(f"{root}/a.csv") and not storage.exists(f"{root}/none.csv")
    with storage.open_read(other, 64) as file:
        file.seek(256)
        assert file.read(3) == DATA[:3] and storage.size(other) == len(DATA)
        if (
            scheme == "az"
        ):  # the emulator of Google's store ignores the generation that is asked for
            put("other/c.bin", DATA[::-1])
            with pytest.raises(StorageError, match="was changed while it was read"):
                file.read(100)
            put("other/c.bin", DATA)
    assert manifests.build([root], "auto", str(tmp_path)).num_rows == 3
    (tmp_path / "c.bin").write_bytes(DATA)
    first = file_identity.identify([other])[0]
    assert first.content == file_identity.fingerprint(tmp_path / "c.bin")
    put("other/c.bin", DATA[::-1])
    with pytest.raises(file_identity.ChangedFileError, match="was changed"):
        file_identity.open_unchanged(first)
    with pytest.raises(StorageError, match=f"{scheme}:// is only read"):
        storage.write_bytes(f"{root}/d.csv", b"")
    with pytest.raises(StorageError, match=f"names no place; write {scheme}://"):
        storage.exists(f"{scheme}://rows@account.example/a")


@pytest.mark.parametrize(
    ("uri", "module", "extra"),
    [
        ("gs://rows/a", "gcsfs", "gcs"),
        ("az://rows/a", "adlfs", "azure"),
        ("abfs://rows/a", "adlfs", "azure"),
    ],
)
def test_a_missing_client_of_buckets_is_named(monkeypatch, uri, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    read_only.store_of_module.cache_clear()
    with pytest.raises(StorageError) as raised:
        storage.exists(uri)
    assert extras.install(extra) in str(raised.value)
    read_only.store_of_module.cache_clear()
