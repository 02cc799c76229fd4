"""The Challenge of 2012 in its own layout: small records by hand, and those of the data folder
written back as the publisher's files.
"""

import io
import os
import tarfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from prepare.conftest import entity_events, entity_rows, prepare, summary

from pipeline.prepare.clinical import plausible
from pipeline.prepare.importers import physionet2012

HEAD = "Time,Parameter,Value\n"
HEADER = "RecordID,SAPS-I,SOFA,Length_of_stay,Survival,In-hospital_death\n"
DATA = pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="needs the folder that ONETOMANY_DATA names"
)


def record(number: int, age=54, gender=0, height=-1, unit=4, weight=-1, more: str = "") -> str:
    return (
        f"{HEAD}00:00,RecordID,{number}\n00:00,Age,{age}\n00:00,Gender,{gender}\n"
        f"00:00,Height,{height}\n00:00,ICUType,{unit}\n00:00,Weight,{weight}\n{more}"
    )


@pytest.fixture
def challenge(tmp_path) -> Path:
    return write_challenge(tmp_path / "challenge")


def write_challenge(root: Path) -> Path:
    """Two records of set a, one of b, one of c (which has no outcomes)."""
    files = {
        "set-a/132539.txt": record(
            132539,
            more="00:00,Weight,81\n00:07,GCS,15\n00:07,HR,73\n00:07,HR,73\n47:30,FiO2,0.4\n10:15,Temp,-17.8\n10:15,pH,735\n"
            "11:00,HCT,-1\n11:00,,4\nbroken line\n12:00,Urine,none\n09:06,MechVent,1\n",
        ),
        "set-a/132540.txt": record(132540, 76, 1, 175.3, 2, 80.6),
        "set-b/142675.txt": record(142675, 70, -1, 1.8, 3, 0, "01:00,Weight,0\n01:00,Weight,70\n"),
        "set-c/152871.txt": record(152871, more="00:30,K,4.1\n"),
        "Outcomes-a.txt": f"{HEADER}132539,6,1,5,-1,0\n132540,16,8,8,31,1\n",
        "Outcomes-b.txt": f"{HEADER}142675,27,14,9,7,1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


EXPECTED = [
    (0, "Weight", 81),
    (7 / 60, "GCS", 15),
    (7 / 60, "HR", 73),
    (9.1, "MechVent", 1),
    (10.25, "pH", 7.35),
    (47.5, "FiO2", 40),
]


def check(output) -> None:
    found = entity_rows(output)
    assert set(found) == {132539, 132540, 142675, 152871}
    assert entity_events(found[132539]) == [
        (np.float32(t).item(), name, np.float32(v).item()) for t, name, v in EXPECTED
    ]
    assert (
        entity_events(found[142675]) == [(1, "Weight", 70)] and entity_events(found[132540]) == []
    )
    assert [found[i]["static"] for i in sorted(found)] == [
        {"Age": 54, "Gender": "female", "Height": None, "Weight": None, "CareUnit": "SICU"},
        {"Age": 76, "Gender": "male", "Height": 175.3, "Weight": 80.6, "CareUnit": "CSRU"},
        {"Age": 70, "Gender": None, "Height": None, "Weight": None, "CareUnit": "MICU"},
        {"Age": 54, "Gender": "female", "Height": None, "Weight": None, "CareUnit": "SICU"},
    ]
    names = (
        "in_hospital_death",
        "length_of_stay",
        "survival",
        "saps",
        "sofa",
        "icu_type",
        "set",
        "split",
    )
    assert [tuple(found[i][name] for name in names) for i in sorted(found)] == [
        (0, 5, None, 6, 1, 4, "a", "train"),
        (1, 8, 31, 16, 8, 2, "a", "train"),
        (1, 9, 7, 27, 14, 3, "b", "test"),
        (None, None, None, None, None, 4, "c", "test"),
    ]


def test_folder(challenge, tmp_path):
    manifest = prepare("physionet2012", challenge, tmp_path / "out")
    check(tmp_path / "out")
    assert manifest["rows"] == {"test": 2, "train": 2}
    notes = summary(tmp_path / "out")["notes"]
    assert notes["events dropped by reason"] == {
        "set-a: out of range": 1,
        "set-a: unknown (-1)": 1,
        "set-a: no variable": 1,
        "set-a: no number": 1,
        f"set-a: {physionet2012.LINE}": 1,
        "set-b: out of range": 1,
    }
    assert notes["events dropped: duplicate"] == {"train": 1}
    assert notes["sets without an Outcomes file, whose outcomes are null"] == "c"
    assert summary(tmp_path / "out")["classes"]["train"]["labels"] == {"0": 1, "1": 1}


@pytest.mark.parametrize("form", ["tar.gz", "zip", "tars"])
def test_archives(challenge, tmp_path, form):
    """As the publisher packs them: one archive of all, or set-a.tar.gz beside Outcomes-a.txt."""
    source = tmp_path / f"packed.{form}"
    if form == "zip":
        import shutil

        shutil.make_archive(str(tmp_path / "packed"), "zip", challenge)
    elif form == "tar.gz":
        with tarfile.open(source, "w:gz") as archive:
            archive.add(challenge, "challenge")
    else:
        source.mkdir()
        for name in "abc":
            with tarfile.open(source / f"set-{name}.tar.gz", "w:gz") as archive:
                archive.add(challenge / f"set-{name}", f"set-{name}")
        for name in "ab":
            (source / f"Outcomes-{name}.txt").write_bytes(
                (challenge / f"Outcomes-{name}.txt").read_bytes()
            )
    prepare("physionet2012", source, tmp_path / "out")
    check(tmp_path / "out")


def test_sets_and_splits(challenge, tmp_path):
    manifest = prepare("physionet2012", challenge, tmp_path / "out", "split=b:validation,a:train")
    assert manifest["rows"] == {"train": 2, "validation": 1}
    assert summary(tmp_path / "out")["notes"]["sets left out"] == "c"
    for pairs, message in (
        (["split=a:training"], "splits are train, validation, test"),
        (["split=d:train"], "there are a, b, c"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare("physionet2012", challenge, tmp_path / "out2", *pairs)
    with pytest.raises(ValueError, match=r"neither set-a/NUMBER\.txt nor"):
        prepare("physionet2012", challenge / "set-a", tmp_path / "out3")


def test_broken_records_are_named_by_place(challenge, tmp_path):
    """A record that is none is left out, without its number in any file or message."""
    for i in range(3):
        (challenge / f"set-a/77777{i}.txt").write_text(
            ["no table", record(132539), f"{HEAD}00:00,RecordID,777772\n00:00,Age,old\n"][i]
        )
    prepare("physionet2012", challenge, tmp_path / "out", max_bad=0.9)
    listed = summary(tmp_path / "out")["broken"]["files"]
    assert [(row["path"], row["reason"]) for row in listed] == [
        ("set-a: file 3 of 5", "no line Time,Parameter,Value at its begin"),
        ("set-a: file 4 of 5", "its RecordID is not that of its file's name"),
        ("set-a: file 5 of 5", "its Age is no number"),
    ]
    check(tmp_path / "out")
    assert "7777" not in "".join(
        file.read_text()
        for file in (tmp_path / "out").rglob("*.*")
        if file.suffix in (".json", ".md")
    )
    with pytest.raises(ValueError, match="3 of 7 rows are broken") as error:
        prepare("physionet2012", challenge, tmp_path / "out2")
    assert "7777" not in str(error.value)


def test_outcomes_in_another_order(challenge, tmp_path):
    text = (challenge / "Outcomes-a.txt").read_text().splitlines()
    order = [5, 0, 3, 1, 4, 2]
    lines = [",".join(line.split(",")[i] for i in order) for line in text]
    (challenge / "Outcomes-a.txt").write_text(
        "\r\n".join([lines[0], *reversed(lines[1:])]) + "\r\n"
    )
    prepare("physionet2012", challenge, tmp_path / "out")
    check(tmp_path / "out")
    (challenge / "Outcomes-a.txt").write_text("RecordID,SOFA\n1,2\n")
    with pytest.raises(ValueError, match=r"Outcomes-a\.txt: no column 'In-hospital_death'"):
        prepare("physionet2012", challenge, tmp_path / "out2")


# ---------------------------------------------------------------- the data folder


def written_back(folder: Path, root: Path, name: str, step: int) -> list[int]:
    """Every ``step``-th record of a set as the publisher's text files."""
    records = pq.read_table(folder / f"records_{name}.parquet").to_pylist()[::step]
    wanted = [row["recordid"] for row in records]
    lines: dict[int, io.StringIO] = {number: io.StringIO() for number in wanted}
    sql = (
        "select recordid, minute, parameter::varchar, value from "
        f"'{folder}/events_{name}.parquet' where recordid in {tuple(wanted)} "
        f"order by recordid, minute"
    )
    for number, minute, parameter, value in duckdb.sql(sql).fetchall():
        lines[number].write(f"{minute // 60:02d}:{minute % 60:02d},{parameter},{value:.9g}\n")
    (root / f"set-{name}").mkdir(parents=True)
    outcomes = [HEADER]
    for row in records:
        known = {key: -1 if row[key] is None else row[key] for key in row}
        text = record(
            row["recordid"],
            known["Age"],
            known["Gender"],
            known["Height"],
            known["ICUType"],
            known["Weight"],
            lines[row["recordid"]].getvalue(),
        )
        (root / f"set-{name}/{row['recordid']}.txt").write_text(text)
        outcomes.append(
            ",".join(
                str(row[key])
                for key in (
                    "recordid",
                    "SAPS-I",
                    "SOFA",
                    "Length_of_stay",
                    "Survival",
                    "In-hospital_death",
                )
            )
            + "\n"
        )
    (root / f"Outcomes-{name}.txt").write_text("".join(outcomes))
    return wanted


@pytest.mark.slow
@DATA
def test_text_files_equal_the_tables(tmp_path):
    """Records written back as .txt give the streams that the tables give, by this importer and by
    the general one.
    """
    folder = Path(os.environ["ONETOMANY_DATA"], "healthcare", "physionet2012")
    wanted = [
        number for name in "ab" for number in written_back(folder, tmp_path / "txt", name, 40)
    ]
    prepare("physionet2012", tmp_path / "txt", tmp_path / "from_txt", part_mb=0.2)
    prepare("physionet2012", folder, tmp_path / "from_tables")
    texts, tables = entity_rows(tmp_path / "from_txt"), entity_rows(tmp_path / "from_tables")
    assert (
        sorted(texts) == sorted(wanted)
        and len(tables) == 8000
        and {number: tables[number] for number in wanted} == texts
    )
    for name in "ab":
        prepare(
            "events",
            folder / f"events_{name}.parquet",
            tmp_path / name,
            "entity=recordid",
            "time=minute",
            "unit=minutes",
            "variable=parameter",
            f"entities={folder}/records_{name}.parquet",
            "static=Age,Gender",
            "clean=clinical",
        )
        general = entity_rows(tmp_path / name)
        assert len(general) == 4000 and all(
            entity_events(general[number]) == entity_events(tables[number]) for number in general
        )
        assert all(
            general[number]["In-hospital_death"] == tables[number]["in_hospital_death"]
            for number in general
        )


@DATA
def test_tables_equal_sql(tmp_path):
    """Deaths, and events of each variable, against DuckDB over the tables with the ranges of the
    data file.
    """
    folder = Path(os.environ["ONETOMANY_DATA"], "healthcare", "physionet2012")
    manifest = prepare("physionet2012", folder, tmp_path / "out", part_mb=8)
    assert manifest["rows"] == {"test": 4000, "train": 4000}
    found = f"read_parquet('{tmp_path}/out/*.parquet')"
    deaths = duckdb.sql(
        f"select set, sum(in_hospital_death), count(*) from {found} group by set order by set"
    ).fetchall()
    assert deaths == [("a", 554, 4000), ("b", 568, 4000)]
    # DuckDB reads this variable by its name.
    ranges = duckdb.sql(  # noqa: F841
        f"select * from read_csv('{plausible.CLINICAL}/ranges.csv', comment='#', header=true)"
    )
    sql = duckdb.sql(f"""
        with clean as (select recordid, minute, parameter::varchar p, case when parameter = 'FiO2' and value > 0 and value <= 1.1 then value::double * 100
                           when parameter = 'SaO2' and value > 0 and value <= 1.1 then value::double * 100
                           when parameter = 'Temp' and value >= 79 then (value::double - 32) * 5 / 9
                           when parameter = 'pH' and value between 630 and 850 then value::double / 100
                           when parameter = 'pH' and value between 63 and 85 then value::double / 10 else value::double end v
                       from '{folder}/events_*.parquet'),
        good as (select distinct recordid, minute, p, least(greatest(v, valid_low), valid_high)::float v from clean join ranges r on r.variable = p
                 where v >= outlier_low and v <= outlier_high)
        select p, count(*), round(sum(v::double), 0) from good group by p order by p""").fetchall()
    ours = duckdb.sql(
        "select p, count(*), round(sum(v::double), 0) from (select unnest(variables) p, "
        f"unnest(values) v from {found}) group by p order by p"
    ).fetchall()
    assert ours == sql and len(sql) == 37
