"""Text and tables: one engine for all importers of them, pieces of files, and bytes that are no
text.
"""

import gzip
import io
import json
import os
import random
import subprocess
import sys
import textwrap
import uuid
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare.conftest import (
    prepare,
    prepare_killed,
    question,
    read,
    reasons,
    splits_of_a_job,
    squad_file,
    summary,
    tar,
    write,
)
from typer.testing import CliRunner

from pipeline import cli
from pipeline.config import registry
from pipeline.io import storage
from pipeline.prepare.engine import importing, inputs, row_groups, table_importer, value_types
from pipeline.prepare.engine.write import MANIFEST, verify

SMALL = 200 / 2**20
"""MiB: parts of a few rows."""
CONLL = "-DOCSTART- -X- O O\n\nAnna B-PER\nsleeps O\n\nin O\nRome B-LOC\n\n".replace("-X- O O", "O")
SQUAD = squad_file(
    "The cat sat on the mat.", [question(f"q{i}", f"Where, {i}?", "mat", 19) for i in range(4)]
)


def parts(output) -> dict[str, bytes]:
    files = [
        uri
        for uri in storage.list_files(str(output))
        if uri.endswith(".parquet") and not uri.rpartition("/")[2].startswith("_")
    ]
    return {uri.rpartition("/")[2]: storage.read_bytes(uri) for uri in files}


@pytest.fixture
def text(tmp_path):
    """Two files of 40 lines of train, one of 10 of validation."""
    for name, count in (("train-a.txt", 40), ("train-b.jsonl", 40), ("dev.txt", 10)):
        lines = [f"{name} has a line {i} of words" for i in range(count)]
        write(
            tmp_path / "text" / name,
            "".join(
                json.dumps({"text": line}) + "\n" if name.endswith("jsonl") else f"{line}\n"
                for line in lines
            ),
        )
    return tmp_path / "text"


@pytest.fixture
def conll(tmp_path):
    for name in ("eng.train", "eng.testa", "eng.testb"):
        write(tmp_path / "conll" / name, CONLL * 3)
    return tmp_path / "conll"


@pytest.fixture
def squad(tmp_path):
    write(tmp_path / "squad/train-v1.1.json", json.dumps(SQUAD))
    write(tmp_path / "squad/dev-v1.1.json", json.dumps(SQUAD).replace('"id": "q', '"id": "d'))
    return tmp_path / "squad"


@pytest.fixture
def csv(tmp_path):
    for split, label in (("train", 0), ("test", 1)):
        write(
            tmp_path / f"csv/{split}.csv",
            "review,stars\n" + "".join(f'"the {split} review, {i}",{label}\n' for i in range(20)),
        )
    return tmp_path / "csv"


SOURCES = {
    "text": ("text", []),
    "conll": ("conll", []),
    "squad": ("squad", []),
    "csv": ("csv", ["columns=text=review,label=stars"]),
}


# ---------------------------------------------------------------- one engine


def test_all_importers_are_tested():
    images = {"imagefolder", "imagenet", "webdataset", "chestxray14", "coco", "voc", "yolo"}
    images |= {"cvat", "labelstudio"}
    sounds = {"librispeech", "commonvoice", "speech_commands", "manifest", "an4", "kaldi"}
    records = {"events", "physionet2012", "mimic3", "mimic4", "eicu", "meds", "omop"}
    records |= {"cohort", "table"}
    robots = {"series", "trajectories", "lerobot", "rollouts"}
    others = {"files", "hf", *SOURCES}
    assert set(registry.names("importer")) == images | sounds | records | robots | others


@pytest.mark.parametrize("name", SOURCES)
def test_a_job_reads_what_every_importer_of_tables_writes(name, request, tmp_path):
    fixture, pairs = SOURCES[name]
    done = prepare(name, request.getfixturevalue(fixture), tmp_path / "out", *pairs, part_mb=SMALL)
    role, modality = {"conll": "words", "squad": "context"}.get(name, "text"), "text"
    assert splits_of_a_job(tmp_path, modality, "text", role) == done["rows"]
    assert len(done["rows"]) > 1
    rows = read(tmp_path / "out")
    assert (
        len(rows) == sum(done["rows"].values()) == done["read"]
        and verify(str(tmp_path / "out")) == done
    )
    assert not (tmp_path / "out/_survey").exists()
    assert (
        prepare(name, request.getfixturevalue(fixture), tmp_path / "out", *pairs, part_mb=SMALL)
        == done
    ), "a run that is complete does nothing"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resize": 20}, "--resize 20: importer text reads text"),
        ({"quality": 90}, "--quality 90: importer text"),
        ({"rows_per_part": 9}, "--rows-per-part 9: .* pass --part-mb"),
    ],
)
def test_settings_of_images_are_refused(text, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        prepare("text", text, tmp_path / "out", **settings)


def test_parts_of_another_size_or_options_are_another_run(text, tmp_path):
    prepare("text", text, tmp_path / "out", part_mb=SMALL)
    for pairs, settings in (([], {}), (["dedup=exact"], {"part_mb": SMALL})):
        with pytest.raises(ValueError, match="another source"):
            prepare("text", text, tmp_path / "out", *pairs, **settings)


@pytest.mark.parametrize(
    "killed",
    ["table_importer.scan_shard", pytest.param("write.write_shard", marks=pytest.mark.slow)],
)
def test_a_run_killed_in_either_pass_goes_on_to_the_same_bytes(killed, text, tmp_path, monkeypatch):
    write(text / "train-c.txt", "train-a.txt has a line 7 of words\nand another one\n")
    whole = prepare("text", text, tmp_path / "whole", "dedup=near", part_mb=SMALL)
    assert len(whole["files"]) == 20
    writes = killed.startswith("write")
    prepare_killed(
        "text",
        text,
        tmp_path / "out",
        "dedup=near",
        at=5 if writes else 4,
        function=killed,
        part_mb=SMALL,
    )
    surveyed, kept = (
        sorted((tmp_path / "out/_survey").iterdir()),
        {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.parquet")},
    )
    assert (len(surveyed), len(kept), len(list(tmp_path.glob("out/_parts/*")))) == (
        (20, 5, 4) if writes else (4, 0, 0)
    )
    asked, real = [], table_importer.scan_shard
    monkeypatch.setattr(
        table_importer,
        "scan_shard",
        lambda importer, uri, pieces: asked.append(uri) or real(importer, uri, pieces),
    )
    done = prepare("text", text, tmp_path / "out", "dedup=near", part_mb=SMALL)
    assert done["files"] == whole["files"] and parts(tmp_path / "out") == parts(tmp_path / "whole")
    assert (tmp_path / "out/_dropped.parquet").read_bytes() == (
        tmp_path / "whole/_dropped.parquet"
    ).read_bytes()
    assert len(asked) == 20 - len(surveyed) and not set(asked) & set(map(str, surveyed)), (
        "what was surveyed is not surveyed again"
    )
    assert sum(kept[name] == (tmp_path / "out" / name).stat().st_mtime_ns for name in kept) == (
        4 if writes else 0
    ), "what was whole is not written again"


@pytest.mark.slow
def test_a_source_and_an_output_on_s3(text, conll, squad, csv, tmp_path, s3_server):
    root = f"{s3_server}/{uuid.uuid4().hex}"
    for name, (folder, pairs) in SOURCES.items():
        local = tmp_path / folder
        for file in local.iterdir():
            storage.write_bytes(f"{root}/{name}/{file.name}", file.read_bytes())
        there = prepare(name, f"{root}/{name}", f"{root}/out-{name}", *pairs, part_mb=SMALL)
        here = prepare(name, local, tmp_path / f"out-{name}", *pairs, part_mb=SMALL)
        assert there["files"] == here["files"] and parts(f"{root}/out-{name}") == parts(
            tmp_path / f"out-{name}"
        )
        assert verify(f"{root}/out-{name}") == there
    one = prepare("text", f"{root}/text/dev.txt", f"{root}/one")
    assert one["rows"] == {"validation": 10} and list(one["files"]) == [
        "validation-00000-of-00001.parquet"
    ]


# ---------------------------------------------------------------- files


def squeezed(data: bytes, suffix: str) -> bytes:
    return {
        "": lambda d: d,
        ".gz": gzip.compress,
        ".zst": lambda d: pa.compress(d, codec="zstd", asbytes=True),
    }[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", SOURCES)
def test_compressed_files_and_archives_give_the_same_rows(name, suffix, request, tmp_path):
    fixture, pairs = SOURCES[name]
    source = request.getfixturevalue(fixture)
    prepare(name, source, tmp_path / "plain", *pairs)
    wanted = [{**row, "id": ""} if name == "text" else row for row in read(tmp_path / "plain")]
    members = {
        f"{file.name}{suffix}": squeezed(file.read_bytes(), suffix)
        for file in sorted(source.iterdir())
    }
    write(tmp_path / "a.tar", tar(members))
    write(tmp_path / "a.tar.gz", gzip.compress(tar(members)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    for member, data in members.items():
        write(tmp_path / "folder" / member, data)
    for place in ("a.tar", "a.tar.gz", "a.zip", "folder", "folder/*"):
        out = tmp_path / f"out-{place.replace('/', '-').replace('*', 'glob')}"
        prepare(name, tmp_path / place, out, *pairs)
        assert [{**row, "id": ""} if name == "text" else row for row in read(out)] == wanted, place


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("testset.csv", "test"),
        ("my-devset/a.txt", "validation"),
        ("subset/asset.txt", "train"),
        ("eng.testa", "validation"),
        ("eng.testb", "test"),
        ("wnut17train.conll", "train"),
        ("emerging.dev.conll", "validation"),
        ("emerging.test.annotated", "test"),
        ("dev-v2.0.json", "validation"),
        ("train/part-1.csv", "train"),
        ("test/train.txt", "train"),
        ("eval/train-00.txt", "train"),
        ("dev-eval.txt", "validation"),
        ("medieval/a.txt", "train"),
        ("a/valid/x_1.txt", "validation"),
        ("latest.csv", "train"),
        ("contest/a.txt", "train"),
        ("train_dev.txt", "validation"),
        ("test-dev2017.json", "test"),
    ],
)
def test_names_say_splits(name, split):
    assert importing.split_of_file(name) == split


@pytest.mark.parametrize(
    ("name", "pairs", "said"),
    [
        ("blood_test_results.csv", (), "blood_test_results.csv (test)"),
        ("valid_users.csv", (), "valid_users.csv (validation)"),
        ("blood_test_results.csv", ("split=train",), None),
        ("test-00.csv", (), None),
        ("train_users.csv", (), None),
    ],
)
def test_a_word_that_may_mean_no_split_is_noted(tmp_path, name, pairs, said):
    prepare("csv", write(tmp_path / name, "a,b\n1,2\n"), tmp_path / "out", *pairs)
    notes = summary(tmp_path / "out")["notes"]
    noted = [text for what, text in notes.items() if "held out by a word" in what]
    assert noted == ([said] if said else [])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("imdb_train.csv", "imdb_test.csv"), ""),
        (("conll.train.csv", "conll.testa.csv", "conll.testb.csv"), ""),
        (("train_val.csv", "test.csv"), "train_val.csv (validation)"),
        (("imdb_train.csv", "blood_test.csv"), "blood_test.csv (test)"),
    ],
)
def test_the_other_files_tell_whether_a_word_means_a_split(tmp_path, names, said):
    for name in names:
        write(tmp_path / "raw" / name, f"a,b\n{name},2\n")
    prepare("csv", tmp_path / "raw", tmp_path / "out")
    notes = summary(tmp_path / "out")["notes"]
    noted = [text for what, text in notes.items() if "held out by a word" in what]
    assert noted == ([said] if said else [])


@pytest.mark.parametrize("name", ["a-eval.csv", "train/evalset-00.txt", "held_out/a.csv"])
def test_names_of_held_out_rows_say_for_what(name):
    with pytest.raises(ValueError, match=r"for validation or for test\? Put one .*--set split="):
        importing.split_of_file(name)


def test_other_files_are_left_out_and_counted(text, tmp_path):
    write(text / "README.md", "mine")
    write(text / "_summary.txt", "no text of the corpus")
    write(text / "_old/b.txt", "nor this")
    write(text / "_SUCCESS", "")
    done = prepare("text", text, tmp_path / "out")
    assert done["rows"] == {"train": 80, "validation": 10}
    assert summary(tmp_path / "out")["notes"]["files left out"] == {
        ".md": 1,
        "names that begin with _": 2,
    }
    with pytest.raises(
        ValueError, match=r"no files with \.csv, \.tsv, \.tab there; there are \.jsonl, \.md, \.txt"
    ):
        prepare("csv", text, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt.gz", gzip.compress(b"one\ntwo\n" * 1000, mtime=0)[:-20], "a.txt.gz: damaged"),
        ("a.txt.gz", b"no gzip at all", "a.txt.gz: damaged"),
        (
            "a.txt.zst",
            pa.compress(random.Random(0).randbytes(3000), codec="zstd", asbytes=True)[:-20],
            "a.txt.zst: damaged",
        ),
        ("a.txt.zst", b"no zstd at all", "a.txt.zst: damaged"),
        ("a.txt", "words".encode("utf-16"), "a.txt: UTF-16; convert"),
        ("a.parquet", b"PAR1 no", "a.parquet: not a whole Parquet file"),
        ("a.txt", b"\n\n", "no rows in the layout"),
        ("a.doc", b"x", "a.doc: unknown suffix; these are read: "),
    ],
)
def test_damaged_files_are_told_by_name(name, data, said, tmp_path):
    write(tmp_path / name, data)
    with pytest.raises(ValueError, match=said):
        prepare("text", tmp_path / name, tmp_path / "out")


# ---------------------------------------------------------------- bytes that are no text


def test_each_importer_lists_bytes_that_are_no_text_with_their_place(tmp_path):
    write(tmp_path / "a.txt", b"good\nb\xffd\nnul\0\n" + b"more\n" * 60)
    write(
        tmp_path / "a.jsonl",
        b'{"text": "good"}\n{"text": "b\xffd"}\n{"text": "nul\\u0000"}\n{"text": "\\ud800"}\n{"text": 5}\n[1]\n{"te\n{"text": null}\n'
        + b"[" * 100_000
        + b"\n"
        + b'{"text": "more"}\n' * 90,
    )
    write(
        tmp_path / "a.csv",
        b"text,label\ngood,1\nb\xffd,2\nnul\0,3\n,4\nfive,5,5\nsix\n" + b"more,7\n" * 60,
    )
    write(tmp_path / "a.conll", b"Good O\n\nb\xffd O\nmore O\n\nnul\0 O\n\n" + b"more O\n\n" * 60)
    questions = {"a": "b\udcffd?", "b": "nul\0?", **{f"c{i}": "good?" for i in range(60)}}
    bad = squad_file("The cat.", [question(*one, "cat", 4) for one in questions.items()])
    write(
        tmp_path / "a.json", json.dumps(bad, ensure_ascii=False).encode("utf-8", "surrogateescape")
    )
    wanted = {
        "a.txt": {"2": "not UTF-8", "3": "NUL"},
        "a.csv": {"3": "not UTF-8", "4": "NUL", "5": "no text", "6": "3 fields", "7": "1 fields"},
        "a.jsonl": {
            "2": "not UTF-8",
            "3": "NUL",
            "4": "not UTF-8",
            "5": "no text in field",
            "6": "no JSON object",
            "7": "not JSON",
            "8": "no text in field",
            "9": "not JSON",
        },
        "a.conll": {"3": "line 3: not UTF-8", "6": "line 6: a NUL"},
        "a.json": {"a": "the question is not UTF-8", "b": "NUL"},
    }
    importers = dict(zip(wanted, ("text", "csv", "text", "conll", "squad"), strict=True))
    for file, places in wanted.items():
        name = importers[file]
        done = prepare(name, tmp_path / file, tmp_path / f"out-{file}", max_bad=0.2)
        found = reasons(summary(tmp_path / f"out-{file}"))
        assert set(found) == {f"{file}:{place}" for place in places}, file
        assert done["broken"] == len(places), file
        assert all(reason in found[f"{file}:{place}"] for place, reason in places.items()), found
        with pytest.raises(
            ValueError,
            match=rf"{len(places)} of {done['read']} .*--max-bad 0\.01 .*: {file}:",
        ):
            prepare(name, tmp_path / file, tmp_path / f"none-{file}")
        assert not list((tmp_path / f"none-{file}").glob("*.parquet")), (
            "told before a part is written"
        )


def test_places_of_broken_rows_in_later_ranges_are_those_of_the_file(tmp_path):
    lines = [f"line {i} of many words" for i in range(1, 101)]
    write(tmp_path / "a.txt", "\n".join(lines).replace("line 77 of", "line\0").encode())
    with pytest.raises(
        ValueError, match=r"1 of 100 rows are broken.* First ones: a.txt:77: a NUL character"
    ):
        prepare("text", tmp_path / "a.txt", tmp_path / "none", part_mb=SMALL, max_bad=0)
    prepare("text", tmp_path / "a.txt", tmp_path / "out", part_mb=SMALL)
    assert list(reasons(summary(tmp_path / "out"))) == ["a.txt:77"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("text", "one\rtwo\r"),
        ("text", "one\rtwo"),
        ("csv", "text,label\ra,1\r"),
        ("conll", "Anna O\rRome O\r\r"),
    ],
)
def test_lines_that_end_with_a_carriage_return_alone_are_reported(name, text, tmp_path):
    suffix = {"text": "txt"}.get(name, name)
    with pytest.raises(
        ValueError,
        match=f"a.{suffix}: its lines end with a carriage return alone; convert the file",
    ):
        prepare(name, write(tmp_path / f"a.{suffix}", text), tmp_path / "out")


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path):
    write(tmp_path / "in[1]/a.txt", "one\n")
    assert prepare("text", tmp_path / "in[1]", tmp_path / "out")["rows"] == {"train": 1}


LONG = """
    import resource, sys
    from pipeline.prepare.engine.write import Preparation, Settings
    names = dict(line.split() for line in sys.stdin)
    for file, name in names.items():
        Preparation(name, f"small/{file}", f"small/{file}-out").run()  # what is imported is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for file, name in names.items():
        Preparation(name, file, f"{file}-out").run()
        print(file, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


LINES = {
    "a.txt": ("text", "{}\n", 2),
    "b.txt.gz": ("text", "{}\n", 2),
    "a.jsonl": ("text", '{{"text": "{}"}}\n', 2),
    "a.csv": ("csv", "{},1\n", 3),
    "a.conll": ("conll", "{} O\n\n", 3),
}


def with_a_line_of(size: int, folder, file: str):
    """A row, one whose text has that many characters, and another row."""
    name, row, _ = LINES[file]
    data = (
        ("text,label\n" if name == "csv" else "")
        + row.format("one")
        + row.format("x" * size)
        + row.format("two")
    ).encode()
    return write(folder / file, gzip.compress(data, 1) if file.endswith(".gz") else data)


def is_one_broken_row(file: str, output) -> bool:
    ((path, reason),) = reasons(summary(output)).items()
    is_named = path == f"{file}:{LINES[file][2]}" and "longer than" in reason
    return is_named and len(read(output)) == 2


@pytest.mark.parametrize("file", LINES)
def test_a_line_that_is_too_long_is_one_broken_row(file, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "ROW_BYTES", 1 << 20)
    prepare(LINES[file][0], with_a_line_of(3 << 20, tmp_path, file), tmp_path / "out")
    assert is_one_broken_row(file, tmp_path / "out")


def memory_taken(folder, files: dict[str, str]) -> dict[str, int]:
    """MiB that preparing each file (its importer by its name) takes, in a process of its own, beyond
    what those under `small/` took.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LONG)],
        cwd=folder,
        capture_output=True,
        text=True,
        input="".join(f"{file} {importer}\n" for file, importer in files.items()),
        env={**os.environ, "PYTHONPATH": storage.join(os.path.dirname(cli.__file__), "..")},
    )
    assert done.returncode == 0, done.stderr
    return {file: int(size) for file, size in map(str.split, done.stdout.splitlines())}


@pytest.mark.slow
def test_a_line_of_100_mb_takes_little_memory(tmp_path):
    """One process for all importers, whose start takes longer than the lines."""
    for file in LINES:
        with_a_line_of(100_000_000, tmp_path, file)
        with_a_line_of(10, tmp_path / "small", file)
    taken = memory_taken(tmp_path, {file: importer for file, (importer, *_) in LINES.items()})
    assert set(taken) == set(LINES) and max(taken.values()) < 250, taken
    assert all(is_one_broken_row(file, tmp_path / f"{file}-out") for file in LINES)


@pytest.mark.slow
def test_memory_is_that_of_a_row_group_not_of_a_file(tmp_path):
    """A compressed file is one part: 150 MB of text pass through."""
    block = b"".join(
        b"%d words" % i + b" that are repeated over and over in this line" * 6 + b"\n"
        for i in range(20_000)
    )
    write(tmp_path / "small/a.txt.gz", gzip.compress(block, 1))
    write(tmp_path / "a.txt.gz", gzip.compress(block, 1) * (150_000_000 // len(block)))
    taken = memory_taken(tmp_path, {"a.txt.gz": "text"})
    assert taken["a.txt.gz"] < 120, taken
    (path,) = (tmp_path / "a.txt.gz-out").glob("*.parquet")
    with pq.ParquetFile(path) as file:
        assert file.metadata.num_rows > 500_000
        assert (
            max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups))
            <= row_groups.GROUP_ROWS
        )


# ---------------------------------------------------------------- on Ray, from the command line


@pytest.mark.ray
def test_on_ray_every_importer_of_tables_writes_the_same_bytes(
    ray_here, hide_ray, request, tmp_path
):
    for name, (fixture, pairs) in SOURCES.items():
        source, pairs = (
            request.getfixturevalue(fixture),
            [*pairs, *(["dedup=near"] if name == "text" else [])],
        )
        with hide_ray():
            here = prepare(name, source, tmp_path / f"{name}-here", *pairs, part_mb=SMALL)
        line = [
            "prepare",
            name,
            str(source),
            "-o",
            str(tmp_path / f"{name}-ray"),
            "--part-mb",
            str(SMALL),
        ]
        done = CliRunner().invoke(
            cli.app, [*line, *(part for pair in pairs for part in ("--set", pair))]
        )
        assert done.exit_code == 0, done.output
        assert storage.read_json(tmp_path / f"{name}-ray" / MANIFEST)["files"] == here["files"]
        assert parts(tmp_path / f"{name}-ray") == parts(tmp_path / f"{name}-here")
    write(tmp_path / "bad.json", "{}")
    done = CliRunner().invoke(
        cli.app, ["prepare", "squad", str(tmp_path / "bad.json"), "-o", str(tmp_path / "bad-out")]
    )
    assert (
        done.exit_code == 2
        and "bad.json: not of SQuAD's layout" in done.output
        and "Traceback" not in done.output
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            ["prepare", "text", "a.txt", "-o", "b", "--resize", "64"],
            "--resize 64: importer text reads text",
        ),
        (["prepare", "csv", "a.csv", "-o", "b", "--set", "colums=a=b"], "did you mean columns?"),
        (["prepare", "csv", "nothing.csv", "-o", "b"], "nothing.csv: no such file or folder"),
        (["prepare", "text", "a.txt", "-o", "b", "--set", "threshold=2"], "--set threshold=2"),
        (
            ["prepare", "conll", "a.txt", "-o", "b", "--part-mb", "1", "--rows-per-part", "5"],
            "give one",
        ),
    ],
)
def test_the_command_line_tells_what_is_wrong(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "a\n")
    write(tmp_path / "a.csv", "a\n1\n")
    done = CliRunner().invoke(cli.app, line)
    assert done.exit_code == 2 and said in done.output and "Traceback" not in done.output


def test_the_command_line_lists_the_importers_of_text():
    wanted = {
        "text": ("dedup", "threshold", "min_letters"),
        "conll": ("scheme", "repair"),
        "squad": ("repair",),
        "csv": ("columns", "keep"),
    }
    for name, options in wanted.items():
        said = CliRunner().invoke(cli.app, ["prepare", name, "--list"]).output
        assert said.startswith(f"{name}\n") and all(
            f"--set {option}=" in said for option in options
        )


def test_types_of_values_have_a_common_one_that_holds_both():
    values = dict(enumerate([None, True, 5, 2**53 + 1, 0.5, "a"]))
    assert [value_types.type_of_value(value) for value in values.values()] == list(values)
    for a in values:
        for b in values:
            common = value_types.common_type(a, b)
            assert common == value_types.common_type(b, a)
            both = [value_types.convert(values[one], common) for one in (a, b)]
            column = pa.array(both, common.column_type)
            assert len(column) == 2 and (values[a] is None) == (column[0].as_py() is None)
            if isinstance(values[a], int) and common != value_types.ValueType.BOOL:
                assert int(json.loads(str(column[0].as_py()).lower())) == values[a]
    string = value_types.ValueType.STRING
    assert value_types.convert(True, string) == "true"
    assert value_types.convert({"a": [1]}, string) == '{"a": [1]}'
    assert value_types.type_of_value(1 << 70) == string


def test_an_s3_file_of_text_larger_than_a_request_is_streamed(tmp_path, s3_server):
    uri = f"{s3_server}/{uuid.uuid4().hex}/big.txt"
    data = b"".join(b"line %d %b\n" % (i, b"x" * 100) for i in range(30_000))
    storage.write_bytes(uri, data)
    done = prepare("text", uri, f"{uri}-out", part_mb=1)
    assert done["rows"] == {"train": 30_000} and len(done["files"]) == 3
    first = pq.read_table(
        io.BytesIO(parts(f"{uri}-out")["train-00001-of-00003.parquet"])
    ).to_pylist()[0]
    number = int(first["text"].split()[1])
    assert first["id"] == f"big.txt:{number + 1}"
