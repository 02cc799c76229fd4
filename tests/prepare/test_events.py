"""Long tables to one row an entity: the engine (parts, buckets, resuming, memory's bounds) and the
general importer; references by DuckDB and by hand.
"""

import gzip
import os
import zipfile
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
from prepare.conftest import (
    LONG_HEAD,
    entity_events,
    entity_rows,
    prepare,
    prepare_long,
    reasons,
    summary,
    write,
)

from pipeline.io import storage
from pipeline.prepare.clinical import plausible
from pipeline.prepare.engine import grouped, importing
from pipeline.prepare.engine.write import Preparation, Settings, verify
from pipeline.prepare.readers import csv_blocks, parquet
from pipeline.prepare.readers.archives import Entry, Opener

COLUMNS = ["entity=machine", "variable=what", "value=reading"]
TIMES = ("unit=timestamp", "start=begin")
KB = 1 / 1024


def as_parquet(folder: Path, *texts: str) -> None:
    """Write long.csv and people.csv as Parquet too, some of their columns as texts."""
    options = pcsv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
    for name in ("people", "long"):
        table = pcsv.read_csv(folder / f"{name}.csv", convert_options=options)
        pq.write_table(table, folder / f"{name}.parquet")


def dropped(output) -> dict[str, int]:
    return summary(output)["notes"]["events dropped by reason"]


def table(seed: int = 0, count: int = 20_000, machines: int = 300) -> pa.Table:
    """Events of machines, some of them twice."""
    random = np.random.default_rng(seed)
    take = random.integers(0, count, count + count // 20)
    take[:count] = np.arange(count)
    random.shuffle(take)
    full = pa.table(
        {
            "machine": random.integers(1000, 1000 + machines, count),
            "time": np.round(random.uniform(-5, 100, count), 2),
            "what": random.choice(["heat", "speed", "noise", "load"], count),
            "reading": np.round(random.normal(0, 100, count), 3),
        }
    )
    return full.take(pa.array(take))


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize("form", ["csv", "csv.gz", "csv.zst", "parquet"])
def test_streams_equal_sql(tmp_path, form):
    """Whatever the format: rows of DuckDB's own grouping, sorted, exact duplicates once."""
    data = table()
    file = tmp_path / f"long.{form}"
    if form == "parquet":
        pq.write_table(data, file, row_group_size=1000)
    else:
        with pa.output_stream(
            str(file), compression={"csv": None, "csv.gz": "gzip", "csv.zst": "zstd"}[form]
        ) as sink:
            pcsv.write_csv(data, sink)
    manifest = prepare("events", file, tmp_path / "out", *COLUMNS, part_mb=64 * KB)
    assert len(manifest["files"]) > 5
    found = {int(key): entity_events(row) for key, row in entity_rows(tmp_path / "out").items()}
    sql = duckdb.sql(
        "select machine, list((h, what, r) order by h, what, r) from (select distinct machine, "
        "time::float as h, what, reading::float as r from data) group by machine"
    ).fetchall()
    assert found == {
        machine: [tuple(one.values()) if isinstance(one, dict) else tuple(one) for one in listed]
        for machine, listed in sql
    }
    notes = summary(tmp_path / "out")["notes"]
    distinct = sum(map(len, found.values()))
    assert notes["rows of events read"] == len(data) and notes["events"] == {"train": distinct}
    assert notes["events dropped: duplicate"] == {"train": len(data) - distinct} and distinct < len(
        data
    )
    assert not list((tmp_path / "out").glob("_survey*")), "the scratch goes when all is done"
    verify(str(tmp_path / "out"))


def test_parquet_in_an_archive(tmp_path, monkeypatch):
    """It is read as outside of one, up to a size: all of it is unpacked in memory."""
    file, packed = tmp_path / "long.parquet", tmp_path / "long.zip"
    pq.write_table(table(count=200), file)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(file, file.name)
    for source in (file, packed):
        prepare("events", source, tmp_path / f"of_{source.name}", *COLUMNS)
    plain, unpacked = (entity_rows(tmp_path / f"of_{one.name}") for one in (file, packed))
    assert plain == unpacked
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 1 << 10)
    with pytest.raises(
        ValueError, match=r"long\.parquet: more than 0 MiB in an archive; unpack it"
    ):
        prepare("events", packed, tmp_path / "large", *COLUMNS)


def test_parts_do_not_change_rows(tmp_path):
    """Any size of parts, cuts and flushes gives the same rows."""
    pcsv.write_csv(table(), tmp_path / "long.csv")
    prepare("events", tmp_path / "long.csv", tmp_path / "one", *COLUMNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "FLUSH_EVENTS", 700)
        patch.setattr(csv_blocks, "BLOCK_BYTES", 5000)
        patch.setattr(grouped, "RANGE_BYTES", 50_000)
        options = importing.options_of("events", [*COLUMNS, "newlines=false"])
        places = (str(tmp_path / name) for name in ("long.csv", "many"))
        work = Preparation("events", *places, options, Settings(part_mb=20 * KB))
        assert len(work.task.sources.pieces) > 5
        many = work.run()
    assert len(many["files"]) > 10
    assert entity_rows(tmp_path / "one") == entity_rows(tmp_path / "many")


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    """Killed in the first pass and again in the second: what stands is not made again, and the
    bytes are those of a run that was never stopped.
    """
    source = tmp_path / "long"
    source.mkdir()
    for i in range(6):
        pcsv.write_csv(table(i, 2000), source / f"part{i}.csv")
    prepare("events", source, tmp_path / "whole", *COLUMNS, part_mb=64 * KB)
    done = Counter()
    real, make = grouped.partition_events, grouped._make

    def partition(*args):
        done["read"] += 1
        if done["read"] == 4:
            raise KeyboardInterrupt
        return real(*args)

    def made(*args):
        done["made"] += 1
        if done["made"] == 3:
            raise KeyboardInterrupt
        return make(*args)

    monkeypatch.setattr(grouped, "partition_events", partition)
    monkeypatch.setattr(grouped, "_make", made)
    for read, written in ((4, 0), (7, 3)):
        with pytest.raises(KeyboardInterrupt):
            prepare("events", source, tmp_path / "out", *COLUMNS, part_mb=64 * KB)
        assert done == Counter(read=read, made=written)
    prepare("events", source, tmp_path / "out", *COLUMNS, part_mb=64 * KB)
    parts = sorted(file.name for file in (tmp_path / "whole").glob("*.parquet"))
    assert done["read"] == 7 and done["made"] == 3 + len(parts) - 2
    for name in [*parts, "_summary.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_s3(tmp_path, s3_server):
    pcsv.write_csv(table(count=500), tmp_path / "long.csv")
    prepare("events", tmp_path / "long.csv", tmp_path / "out", *COLUMNS, part_mb=8 * KB)
    output = f"{s3_server}/events-out"
    storage.write_bytes(f"{s3_server}/events-in/long.csv", (tmp_path / "long.csv").read_bytes())
    prepare("events", f"{s3_server}/events-in", output, *COLUMNS, part_mb=8 * KB)
    for file in (tmp_path / "out").glob("*.parquet"):
        assert storage.read_bytes(f"{output}/{file.name}") == file.read_bytes()
    assert not [uri for uri in storage.list_files(output) if "_survey" in uri]


@pytest.mark.ray
def test_on_ray(ray_here, hide_ray, tmp_path):
    pcsv.write_csv(table(count=4000), tmp_path / "long.csv")
    words = ("events", tmp_path / "long.csv")
    with hide_ray():
        prepare(*words, tmp_path / "here", *COLUMNS, "newlines=false", part_mb=20 * KB)
    prepare(*words, tmp_path / "there", *COLUMNS, "newlines=false", part_mb=20 * KB)
    assert entity_rows(tmp_path / "here") == entity_rows(tmp_path / "there")


# ---------------------------------------------------------------- columns, times and values


def test_values_as_texts(tmp_path):
    """Bounds are taken and counted; what is no number is left out, by reason; order of columns and
    case of headers do not matter.
    """
    events = (
        "What,READING,Machine,Time\nheat,<0.1,7,1\nheat,> "
        "10,7,2\nheat,ERROR,7,3\nheat,120/80,7,4\nheat,,7,5\nheat,LESS THAN 3,7,6\n"
        'heat,"1,200",7,7\n,5,7,8\nheat,5,,9\nheat,5,7,\nheat,1e60,7,9\nspeed,+2.50,8,-1.5\nheat,5,7,10\nheat,5,7,10\n'
    )
    prepare_long(tmp_path, events, *COLUMNS)
    found = entity_rows(tmp_path / "out")
    near = np.float32(0.1).item()
    assert entity_events(found["7"]) == [
        (1, "heat", near),
        (2, "heat", 10),
        (6, "heat", 3),
        (10, "heat", 5),
    ]
    assert entity_events(found["8"]) == [(-1.5, "speed", 2.5)]
    assert dropped(tmp_path / "out") == {
        "events: no number": 2,
        "events: a pair of numbers": 1,
        "events: no value": 1,
        "events: no variable": 1,
        "events: no such entity": 1,
        "events: no time": 1,
        "events: out of range": 1,
        plausible.CENSORED: 3,
    }
    assert summary(tmp_path / "out")["notes"]["events dropped: duplicate"] == {"train": 1}


def test_numbers_equal_python():
    """Random texts against Python's own reading of them."""
    random = np.random.default_rng(0)
    texts = [
        f"{random.normal() * 10.0 ** random.integers(-5, 6):.{random.integers(0, 9)}{random.choice(['f', 'e', 'g'])}}"
        for _ in range(2000)
    ]
    assert plausible.numbers(pa.array(texts)).values.tolist() == [float(text) for text in texts]
    assert plausible.numbers(
        pa.array([f" <= {text.removeprefix('-')} " for text in texts])
    ).values.tolist() == [abs(float(text)) for text in texts]
    assert (
        not plausible.numbers(
            pa.array(["1.2.3", "--1", "1e", ".", "0x10", "１２", "nan", "-inf", "1 2"])
        )
        .reasons.tolist()
        .count(0)
    )
    pairs = pa.array(["120/80", " 7 / 8 ", "5"])
    assert [plausible.numbers(pairs, which).values.tolist() for which in (1, 2)] == [
        [120, 7, 5],
        [80, 8, 5],
    ]


@pytest.mark.parametrize(
    ("unit", "time", "hours"),
    [("hours", 1.5, 1.5), ("minutes", 90, 1.5), ("seconds", 5400, 1.5), ("days", 0.5, 12)],
)
def test_units(tmp_path, unit, time, hours):
    prepare_long(tmp_path, f"{LONG_HEAD}a,{time},x,1\n", f"unit={unit}")
    assert entity_events(entity_rows(tmp_path / "out")["a"]) == [(hours, "x", 1)]


def test_timestamps_keep_fractions_of_a_second(tmp_path):
    """Of a machine that measures ten times a second."""
    machines = "entity,begin\na,2101-06-01 00:00:00.050\n"
    lines = [f"a,2101-06-01 00:00:00.{i}5,speed,5\n" for i in range(1, 4)]
    prepare_long(tmp_path, LONG_HEAD + "".join(lines), *TIMES, people=machines)
    found = entity_events(entity_rows(tmp_path / "out")["a"])
    seconds = [3600 * hours for hours, _, _ in found]
    assert seconds == pytest.approx([0.1, 0.2, 0.3], rel=1e-5)


@pytest.mark.parametrize("beside", ["7,2101-10-20", "7.0,in the morning"])
def test_what_a_field_means_does_not_depend_on_the_others(tmp_path, beside):
    """Fields that Arrow can cast are read without a pattern, unless one of a block has none."""
    path = tmp_path / "rows.csv"
    odd = f"0x1F,2101-10-20 19\n007,2101-10-20T19:08\n{'0' * 20}5,2101-10-20\n"
    path.write_text(f"id,time\n{odd}{beside}\n")
    columns = {"id": csv_blocks.Column("id"), "time": csv_blocks.Column("time")}
    entry = Entry(path.name, str(path), "", -1, path.stat().st_size)
    found = csv_blocks.read_table("rows", entry, columns, Opener())
    assert found["id"].to_pylist() == [None, 7, 5, 7]
    assert found["time"].is_null().to_pylist() == [True, False, False, "morning" in beside]


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(
    "hour", ["06:30:00+02:00", "06:30:00.000 +0200", "04:30:00Z", "04:30Z", "05:30+01"]
)
def test_times_with_a_zone_are_read(tmp_path, form, hour):
    (tmp_path / "people.csv").write_text(
        "entity,begin\n1,2101-06-01T00:00:00+00:00\n2,2101-06-01T02:00:00+02:00\n"
    )
    (tmp_path / "long.csv").write_text(
        f"entity,time,variable,value\n1,2101-06-01T{hour},HR,80\n2,2101-06-01T{hour},HR,81\n"
    )
    if form == "parquet":
        as_parquet(tmp_path, "entity", "begin", "time")
    people = f"entities={tmp_path}/people.{form}"
    prepare("events", tmp_path / f"long.{form}", tmp_path / "out", people, *TIMES)
    found = entity_rows(tmp_path / "out")
    assert entity_events(found["1"]) == [(4.5, "HR", 80)]
    assert entity_events(found["2"]) == [(4.5, "HR", 81)]


@pytest.mark.parametrize(
    ("begin", "times", "message"),
    [
        (
            "2101-06-01 00:00:00",
            ["2101-06-01T06:30:00Z"],
            r"long\.csv, column 'time': its times have a zone .*, and those of people\.csv, column "
            r"'begin' have none",
        ),
        (
            "2101-06-01T00:00:00Z",
            ["2101-06-01 06:30:00"],
            r"people\.csv, column 'begin': its times have a zone .*, and those of long\.csv",
        ),
        (
            "2101-06-01T00:00:00Z",
            ["2101-06-01 06:30:00", "2101-06-01T06:30:00Z"],
            r"long\.csv: column 'time': some of its times have a zone .* and others none",
        ),
    ],
)
def test_times_with_and_without_a_zone_are_not_mixed(tmp_path, begin, times, message):
    events = LONG_HEAD + "".join(f"1,{time},HR,80\n" for time in times)
    with pytest.raises(ValueError, match=message):
        prepare_long(tmp_path, events, *TIMES, people=f"entity,begin\n1,{begin}\n")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_entities_with_facts_and_outcomes(tmp_path, form):
    """Timestamps of the years 2100 count from the entity's own start; facts are inputs, all else
    are outcomes; entities without events stay.
    """
    people = (
        "stay,person,begin,Age,Sex,died,note\n3,30,2150-01-01 12:00:00,50,F,0,x\n1,10,2101-06-01 "
        "00:00:00,70.5,M,1,y\n2,10,2101-08-01 00:00:00,,M,0,z\n"
    )
    long = (
        "stay,at,what,value\n1,2101-06-01 06:30:00,HR,80\n3,2150-01-01 "
        "11:00:00,HR,90\n1,2101-05-31 23:00:00,Temp,98.6\n9,2101-06-01 00:00:00,HR,1\n"
    )
    long += "1,soon,HR,1\n"
    (tmp_path / "people.csv").write_text(people)
    (tmp_path / "long.csv").write_text(long)
    if form == "parquet":
        as_parquet(tmp_path, "at")
    options = [
        f"entities={tmp_path}/people.{form}",
        "entity=stay",
        "time=at",
        "variable=what",
        "unit=timestamp",
        "start=begin",
        "static=Age,Sex",
        "group=person",
        "split=test",
        "clean=clinical",
    ]
    manifest = prepare("events", tmp_path / f"long.{form}", tmp_path / "out", *options)
    found = entity_rows(tmp_path / "out")
    ids = dict(zip((1, 2, 3), (1, 2, 3) if form == "parquet" else ("1", "2", "3"), strict=True))
    assert manifest["rows"] == {"test": 3} and set(found) == set(ids.values()), (
        "ids of CSV are texts, however they look"
    )
    found, person = {i: found[one] for i, one in ids.items()}, int if form == "parquet" else str
    assert (
        entity_events(found[1]) == [(-1, "Temp", 37), (6.5, "HR", 80)]
        and entity_events(found[3]) == [(-1, "HR", 90)]
        and entity_events(found[2]) == []
    )
    assert [found[i]["static"] for i in (1, 2, 3)] == [
        {"Age": 70.5, "Sex": "M"},
        {"Age": None, "Sex": "M"},
        {"Age": 50, "Sex": "F"},
    ]
    assert [
        (found[i]["patient"], found[i]["died"], found[i]["note"], found[i]["split"]) for i in (1, 3)
    ] == [(person(10), 1, "y", "test"), (person(30), 0, "x", "test")]
    assert dropped(tmp_path / "out") == {"events: no such entity": 1, "events: no time": 1}
    assert summary(tmp_path / "out")["notes"]["entities without events"] == {"test": 1}


def test_clinical_ranges(tmp_path):
    """Outside of the outlier bounds: left out; between those and the valid ones: set to the bound;
    fractions to percent, F to C, a pH without its point.
    """
    events = (
        "entity,time,variable,value\na,0,FiO2,0.5\na,1,FiO2,40\na,2,FiO2,105\na,3,Temp,20\na,4,Temp,100.4\na,5,pH,735\n"
        "a,6,HR,400\na,7,HR,360\na,8,Weight,0\na,9,own,1e9\na,10,SaO2,0.97\n"
    )
    prepare_long(tmp_path, events, "clean=clinical")
    f = {
        name: np.float32(value).item() for name, value in (("pH", 7.35), ("SaO2", 97), ("Temp", 38))
    }
    assert entity_events(entity_rows(tmp_path / "out")["a"]) == [
        (0, "FiO2", 50),
        (1, "FiO2", 40),
        (2, "FiO2", 100),
        (4, "Temp", f["Temp"]),
        (5, "pH", f["pH"]),
        (7, "HR", 350),
        (9, "own", 1e9),
        (10, "SaO2", f["SaO2"]),
    ]
    assert dropped(tmp_path / "out") == {"events: out of range": 3, plausible.CLAMPED: 2}


def test_clinical_files():
    """Every bound in order, every name of an item with a canonical unit, no item twice in a
    table.
    """
    ranges = list(plausible.rows_of("ranges.csv"))
    assert len({row["variable"] for row in ranges}) == len(ranges) > 40
    for row in ranges:
        low, valid_low, valid_high, high = (
            float(row[name]) for name in ("outlier_low", "valid_low", "valid_high", "outlier_high")
        )
        assert low <= valid_low < valid_high <= high, row
    items = list(plausible.rows_of("items.csv"))
    assert len({(row["table"], row["itemid"]) for row in items}) == len(items) > 200
    units = {row["variable"]: row["unit"] for row in ranges}
    assert not [row for row in items if units.get(row["variable"], row["unit"]) != row["unit"]]
    assert plausible.units()["FiO2"] == "%" and plausible.units()["INR"] == ""


# ---------------------------------------------------------------- bad input


def test_a_gzip_cut_short(tmp_path):
    data = gzip.compress(
        b"entity,time,variable,value\n"
        + b"".join(b"%d,%d,x,%d\n" % (i % 7, i, i * 977 % 1000) for i in range(50_000))
    )
    (tmp_path / "long.csv.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"long\.csv\.gz: damaged .*; download it again"):
        prepare("events", tmp_path / "long.csv.gz", tmp_path / "out")
    people = write(tmp_path / "people.csv", "entity,a\n1,1\n")
    with pytest.raises(ValueError, match=r"long\.csv\.gz: damaged .*; download it again"):
        prepare("events", tmp_path / "long.csv.gz", tmp_path / "out2", f"entities={people}")


def test_lines_that_are_no_rows(tmp_path):
    """Counted, named by their place alone, and held against the budget."""
    lines = [f"{i % 5},{i},x,{i}" for i in range(400)]
    lines[100] = "1,secret"
    prepare_long(tmp_path, LONG_HEAD + "\n".join(lines) + "\n")
    assert summary(tmp_path / "out")["notes"]["lines that are no rows, left out"] == 1
    assert sum(row["events"] for row in entity_rows(tmp_path / "out").values()) == 399
    lines[101:110] = ["1,secret"] * 9
    write(tmp_path / "long.csv", LONG_HEAD + "\n".join(lines) + "\n")
    with pytest.raises(
        ValueError,
        match=r"10 of 400 rows are broken.* long\.csv:line 102: another number of fields",
    ) as error:
        prepare("events", tmp_path / "long.csv", tmp_path / "worse")
    assert "secret" not in str(error.value)


def test_broken_entities_are_listed_by_place(tmp_path):
    lines = [f"secret{i},{i}" for i in range(300)] + ["secret7,1", ",2"]
    people = "entity,a\n" + "\n".join(lines) + "\n"
    prepare_long(tmp_path, LONG_HEAD + "secret7,1,x,1\n", people=people)
    assert reasons(summary(tmp_path / "out")) == {
        "people.csv:row 301": "the same entity id again",
        "people.csv:row 302": "no entity id",
    }
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("_*.*"))


def test_empty_tables(tmp_path):
    with pytest.raises(ValueError, match="no entities"):
        prepare_long(tmp_path, LONG_HEAD)
    prepare_long(tmp_path, LONG_HEAD, people="entity,a\n1,5\n")
    assert entity_events(entity_rows(tmp_path / "out")["1"]) == []
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(ValueError, match=r"nothing\.csv: an empty file"):
        prepare("events", tmp_path / "nothing.csv", tmp_path / "out2")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["entity=machin"], "no column 'machin' for --set entity; did you mean machine"),
        (["entity=machine", "time=tme"], "no column 'tme'; did you mean time"),
        (["entity=machine", "value=time"], "two of them are the same column"),
        (["entity=machine", "unit=timestamp"], "need start=COLUMN"),
        (["entity=machine", "static=Age"], "give that: --set entities=FILE"),
        (["entity=machine", "entities=/nowhere.csv"], "no such file for --set entities"),
    ],
)
def test_wrong_options(tmp_path, pairs, message):
    with pytest.raises(ValueError, match=message):
        prepare_long(tmp_path, "machine,time,variable,value\n1,1,x,1\n", *pairs)


def test_wrong_columns_of_entities(tmp_path):
    events, people = LONG_HEAD + "1,1,x,1\n", "entity,Age,split\n1,5,x\n"
    for pairs, message in (
        (["static=Ag"], "no column 'Ag' for --set static; did you mean Age"),
        ([], "an outcome is called 'split'"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_long(tmp_path, events, *pairs, people=people)
    with pytest.raises(ValueError, match="makes parts of about so much source text"):
        prepare_long(tmp_path, events, rows_per_part=10)


@pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)
def test_data_folder(tmp_path):
    """PhysioNet 2012 as long Parquet: counts and sums of each variable equal DuckDB's over the same
    file.
    """
    folder = Path(os.environ["ONETOMANY_DATA"], "healthcare", "physionet2012")
    prepare(
        "events",
        folder / "events_b.parquet",
        tmp_path / "out",
        "entity=recordid",
        "time=minute",
        "unit=minutes",
        "variable=parameter",
        f"entities={folder}/records_b.parquet",
        "static=Age,Gender",
        part_mb=2,
    )
    found = pa.concat_tables(
        [pq.read_table(file) for file in sorted((tmp_path / "out").glob("*.parquet"))]
    )
    assert len(found) == 4000 and {"In-hospital_death", "Survival", "ICUType"} <= set(
        found.column_names
    )
    ours = duckdb.sql(
        "select v, count(*), round(sum(x), 1), min(t), max(t) from (select unnest(variables) v, "
        "unnest(values)::double x, unnest(times) t from found) group by v order by v"
    ).fetchall()
    sql = duckdb.sql(
        "select parameter::varchar v, count(*), round(sum(value::double), 1), min(minute / "
        "60)::float, max(minute / 60)::float from (select distinct * from "
        f"'{folder}/events_b.parquet') group by v order by v"
    ).fetchall()
    assert ours == sql and len(sql) == 37
