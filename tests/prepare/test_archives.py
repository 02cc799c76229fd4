"""Archives are read in place, and refused when they lead outside, are links, or are not whole."""

import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from prepare.conftest import tar, write
from prepare.speech import index
from web_server import web_server

from pipeline.io import storage
from pipeline.media import audio_io
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.picture_check import BrokenImageError


def contents(found: archives.Listing) -> dict[str, bytes]:
    with archives.Reader() as reader:
        return {entry.name: reader.entry(entry) for entry in found.entries}


def test_an_importer_that_ends_with_an_error_closes_its_archives(tmp_path, monkeypatch):
    opened, open_read = [], storage.open_read

    def remembered(*where):
        opened.append(open_read(*where))
        return opened[-1]

    monkeypatch.setattr(storage, "open_read", remembered)
    doubled = gzip.compress(tar({"a.txt": b"one", "a.TXT": b"two"}))
    with pytest.raises(ValueError, match="sample a has two parts txt"):
        index("webdataset", write(tmp_path / "shards/0.tar.gz", doubled))
    noise = gzip.compress(tar({"1.wav": b"no sound"}))
    write(tmp_path / "words/yes/1_nohash_0.wav", b"")
    write(tmp_path / "words/_background_noise_.tar.gz", noise)
    monkeypatch.setattr(audio_io, "inspect", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index("speech_commands", tmp_path / "words", "split=train", "silence=quiet")
    assert [handle.closed for handle in opened] == [True] * 4, "two to list, two to read"


def test_the_same_files_in_a_folder_a_tar_and_a_zip(tmp_path):
    held = {"train/cat/1.jpg": b"one", "train/dog/2.jpg": b"two" * 5000, "read.me": b""}
    for name, data in held.items():
        write(tmp_path / "plain" / name, data)
    write(tmp_path / "a.tar", tar(held))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)
    for place in ("plain", "a.tar", "a.zip"):
        found = archives.listing(str(tmp_path / place))
        assert contents(found) == held, place
        assert [entry.name for entry in found.images] == ["train/cat/1.jpg", "train/dog/2.jpg"]
        assert found.others() == {".me": 1}


def test_tars_in_a_tar_and_archives_in_a_folder_are_looked_into(tmp_path):
    inner = {"a/1.jpg": b"x" * 700, "2.jpg": b"y"}
    outer = write(
        tmp_path / "set/outer.tar",
        tar({"n1.tar": tar(inner), "n2.tar": tar({"3.jpg": b"z" * 513}), "4.jpg": b"four"}),
    )
    wanted = {"n1/a/1.jpg": b"x" * 700, "n1/2.jpg": b"y", "n2/3.jpg": b"z" * 513, "4.jpg": b"four"}
    assert contents(archives.listing(str(outer))) == wanted
    assert contents(archives.listing(str(tmp_path / "set"))) == {
        f"outer/{name}": data for name, data in wanted.items()
    }


def test_a_file_in_an_archive_and_in_a_folder_of_its_name_is_not_taken_twice(tmp_path):
    write(tmp_path / "set/cat.tar", tar({"1.jpg": b"x", "2.jpg": b"y"}))
    assert len(archives.listing(str(tmp_path / "set")).entries) == 2
    write(tmp_path / "set/cat/1.jpg", b"x")
    with pytest.raises(
        ValueError,
        match=r"set: cat/1\.jpg stands in it 2 times; such as in an archive and in a folder of "
        r"its name; remove one",
    ):
        archives.listing(str(tmp_path / "set"))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz"])
def test_on_a_web_server_they_are_the_same_with_a_query_too(suffix, tmp_path):
    packed = tar({"a/1.jpg": b"one", "a/2.jpg": b"two"})
    if suffix == "zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("a/1.jpg", b"one")
            archive.writestr("a/2.jpg", b"two")
        packed = sink.getvalue()
    packed = gzip.compress(packed, mtime=0) if suffix == "tar.gz" else packed
    local = archives.listing(str(write(tmp_path / f"data.{suffix}", packed)))
    with web_server() as web:
        found = archives.listing(web.put(f"data.{suffix}", packed) + "?download=1&key=a/b")
        with pytest.raises(ValueError, match="no such file or folder"):
            archives.listing(f"{web.address}/absent.{suffix}?download=1")
        with archives.Reader() as reader:
            assert [reader.entry(entry) for entry in found.entries] == [b"one", b"two"]
    assert found.fingerprint == local.fingerprint
    assert [entry.name for entry in found.entries] == ["a/1.jpg", "a/2.jpg"]


def test_on_s3_they_are_the_same(s3_server, tmp_path):
    root = f"{s3_server}/prepare-files"
    storage.write_bytes(f"{root}/a/1.jpg", b"one")
    storage.write_bytes(
        f"{root}/b.tar", tar({"n1.tar": tar({"2.jpg": b"two" * 999}), "3.jpg": b"three"})
    )
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("4.jpg", b"four")
    storage.write_bytes(f"{root}/c.zip", sink.getvalue())
    assert contents(archives.listing(root)) == {
        "a/1.jpg": b"one",
        "b/n1/2.jpg": b"two" * 999,
        "b/3.jpg": b"three",
        "c/4.jpg": b"four",
    }


@pytest.mark.parametrize(
    "name", ["../out.jpg", "a/../../out.jpg", "/etc/out.jpg", "C:/out.jpg", "..\\out.jpg"]
)
@pytest.mark.parametrize("form", ["tar", "inner", "zip"])
def test_names_that_lead_outside_are_refused(tmp_path, name, form):
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr(name, b"x")
        path = tmp_path / "bad.zip"
    else:
        data = tar({"fine.jpg": b"x", name: b"x"})
        path = write(tmp_path / "bad.tar", tar({"n1.tar": data}) if form == "inner" else data)
    with pytest.raises(ValueError, match="leads outside of the archive") as caught:
        archives.listing(str(path))
    assert str(path) in str(caught.value)
    assert ("n1.tar" in str(caught.value)) == (form == "inner")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("link.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"link\.jpg' is a link or special file"):
        archives.listing(str(tmp_path / "bad.tar"))


def test_links_in_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        info = zipfile.ZipInfo("link.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match=r"link\.jpg' is a link"):
        archives.listing(str(tmp_path / "bad.zip"))


@pytest.mark.parametrize("at", [100, 512, 512 + 300, 1536, 1536 + 100, 1536 + 512 + 2])
def test_a_tar_that_ends_early_is_refused_wherever_it_ends(tmp_path, at):
    """1536 is where the second header begins: tarfile itself takes that for a whole archive of one
    file.
    """
    data = tar({"1.jpg": b"a" * 600, "2.jpg": b"b" * 600})
    path = write(tmp_path / "cut.tar", data[:at])
    with pytest.raises(ValueError, match="not a whole tar file"):
        archives.listing(str(path))


def test_a_tar_with_a_damaged_header_is_refused(tmp_path):
    data = bytearray(tar({"1.jpg": b"a" * 600, "2.jpg": b"b" * 600}))
    data[1536 + 5] ^= 1
    with pytest.raises(ValueError, match=r"at byte 1536, after 1 files"):
        archives.listing(str(write(tmp_path / "bad.tar", bytes(data))))


def test_an_inner_tar_that_ends_early_is_named(tmp_path):
    path = write(tmp_path / "outer.tar", tar({"n1.tar": tar({"1.jpg": b"a" * 600})[:900]}))
    with pytest.raises(ValueError, match=r"outer\.tar:n1\.tar: not a whole tar file"):
        archives.listing(str(path))


def test_a_gzipped_tar_is_read_from_its_start_once(tmp_path, monkeypatch):
    held = {f"images/{i}.png": bytes([i]) * 40_000 for i in range(9)}
    write(tmp_path / "set/images_001.tar.gz", gzip.compress(tar(held)))
    write(tmp_path / "set/n1.tgz", gzip.compress(tar({"in.tar": tar(held)})))
    back, plain = [], gzip._GzipReader._rewind
    monkeypatch.setattr(gzip._GzipReader, "_rewind", lambda self: (back.append(1), plain(self))[1])
    found = archives.listing(str(tmp_path / "set"))
    assert (
        contents(found)
        == {
            f"{folder}/images/{i}.png": bytes([i]) * 40_000
            for folder in ("images_001", "n1/in")
            for i in range(9)
        }
        and not back
    )
    with archives.Reader() as reader:
        assert (
            reader.entry(found.entries[5]) + reader.entry(found.entries[2])
            == bytes([5]) * 40_000 + bytes([2]) * 40_000
        ), "back too, at a price"


def test_a_gzipped_tar_that_is_damaged_or_a_bomb_is_refused(tmp_path):
    data = gzip.compress(tar({"1.jpg": np.random.default_rng(0).bytes(9000)}))
    for broken in (data[:-3000], data[:5], b"no gzip" * 99):
        with pytest.raises(ValueError, match=r"a\.tar\.gz: not a whole tar file"):
            archives.listing(str(write(tmp_path / "a.tar.gz", broken)))
    info = tarfile.TarInfo("bomb.jpg")
    info.size = 1 << 40
    with pytest.raises(ValueError, match=r"bomb\.jpg' unpacks to 1099511627776 bytes"):
        archives.listing(
            str(write(tmp_path / "b.tar.gz", gzip.compress(info.tobuf() + bytes(1024))))
        )


def test_what_cannot_be_read_is_refused_with_what_to_do(tmp_path):
    data = tar({"1.jpg": b"x"})
    with pytest.raises(ValueError, match=r"only \.tar\.gz is read; decompress it first"):
        archives.listing(str(write(tmp_path / "a.tar.xz", lzma.compress(data))))
    with pytest.raises(ValueError, match="not a whole zip file"):
        archives.listing(str(write(tmp_path / "a.zip", b"PK\3\4 and then nothing")))
    with pytest.raises(ValueError, match="no such file or folder"):
        archives.listing(str(tmp_path / "nothing"))
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode="w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    with pytest.raises(ValueError, match=r"1\.jpg stands in it 2 times"):
        archives.listing(str(write(tmp_path / "twice.tar", twice.getvalue())))


def test_a_damaged_zip_member_is_one_broken_row(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.jpg", b"first" * 50)
        archive.writestr("2.jpg", b"second" * 50)
    data = bytearray(path.read_bytes())
    data[data.index(b"first") + 3] ^= 1
    path.write_bytes(bytes(data))
    one, two = archives.listing(str(path)).entries
    with pytest.raises(BrokenImageError, match="CRC"):
        archives.read_entry(one)
    assert archives.read_entry(two) == b"second" * 50


def test_a_member_larger_than_an_image_is_not_read(tmp_path):
    with pytest.raises(BrokenImageError, match="more than an image has"):
        archives.Reader()(
            str(tmp_path / "nothing.zip"), "bomb.jpg", -1, archives.MAX_FILE_BYTES + 1
        )


def test_the_fingerprint_changes_with_a_file(tmp_path):
    write(tmp_path / "a/1.jpg", b"one")
    first = archives.listing(str(tmp_path / "a")).fingerprint
    assert archives.listing(str(tmp_path / "a")).fingerprint == first
    write(tmp_path / "a/2.jpg", b"two")
    assert archives.listing(str(tmp_path / "a")).fingerprint != first


def test_empty_folders_are_reported(tmp_path):
    write(tmp_path / "a/cat/1.jpg", b"one")
    (tmp_path / "a/dog").mkdir()
    assert archives.listing(str(tmp_path / "a")).empty == ["dog"]
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a", arcname=".")
    assert archives.listing(str(tmp_path / "b.tar")).empty == ["dog"]
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("cat/1.jpg", b"x")
        archive.writestr("dog/", b"")
    assert archives.listing(str(tmp_path / "c.zip")).empty == ["dog"]
    assert archives.listing(
        str(write(tmp_path / "d.tar", tar({"n1.tar": tar({"1.jpg": b"x"}), "n2.tar": tar({})})))
    ).empty == ["n2"]


def test_a_member_of_a_zip_on_s3_costs_little_more_than_its_bytes(s3_server, monkeypatch):
    from pipeline.io import s3

    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for i in range(40):
            archive.writestr(f"{i:02d}.jpg", bytes([i]) * 200_000)
    storage.write_bytes(uri := f"{s3_server}/prepare-zip/a.zip", sink.getvalue())
    found, plain, taken = archives.listing(uri).entries, s3.Reader.readinto, []

    def counted(self, buffer):
        taken.append(plain(self, buffer))
        return taken[-1]

    monkeypatch.setattr(s3.Reader, "readinto", counted)
    with archives.Reader() as reader:
        for i in (30, 2, 25, 9):
            assert reader.entry(found[i]) == bytes([i]) * 200_000
    assert sum(taken) < 5 * (1 << 20) + 200_000, "a piece of 1 MiB each, and the directory"
