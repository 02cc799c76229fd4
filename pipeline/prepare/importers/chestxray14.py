"""ChestX-ray14 (Wang et al. 2017, NIH): the CSV of findings, the official lists and the images."""

from __future__ import annotations

import posixpath
from typing import Literal, NamedTuple

import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, nearest, register
from pipeline.io import storage
from pipeline.prepare.engine import importing
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    Index,
    Row,
    file_row,
    first_existing,
    first_few,
    index_table,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.dialect import rows_of

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
NOTHING = "No Finding"
COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
COLUMN_TYPES = {
    "findings": pa.list_(pa.string()),
    "patient_id": pa.int64(),
    "follow_up": pa.int64(),
    "age": pa.int64(),
    "sex": pa.string(),
    "view": pa.string(),
}


class Record(NamedTuple):
    """A row of the CSV: the image's name, the line, and what is written of it (COLUMN_TYPES)."""

    path: str
    line: int
    findings: list[str]
    patient_id: int
    follow_up: int | None
    age: int | None
    sex: str | None
    view: str | None


class ChestXray14Options(Options):
    table: str = Field(
        "",
        description="the CSV, below SOURCE; empty: Data_Entry_2017.csv or "
        "Data_Entry_2017_v2020.csv",
    )
    lists: Literal["official", "none"] = Field(
        "official",
        description="official: split by train_val_list.txt and test_list.txt; none: all rows in "
        "train, for a job that splits them itself",
    )
    missing: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: leave out and count rows of the CSV whose image is not there"
    )


@register("importer", "chestxray14", options=ChestXray14Options)
class ChestXray14(ImageImporter):
    """ChestX-ray14 of the NIH: chest X-rays with 14 findings.

    It reads Data_Entry_2017.csv, train_val_list.txt and test_list.txt, and the PNGs in images_001
    to images_012 or in one folder, also as tar, tar.gz or zip.

    Columns: `findings` (a list, empty for No Finding), `patient_id` (the group of a job),
    `follow_up`, `age`, `sex`, `view`.

    The official lists are the splits train and test. A job cuts its validation rows from train by
    patient (`group: patient_id`).
    """

    label = "findings"
    shows_paths = False  # a name begins with the patient's number

    def index(self, source: str) -> Index:
        uri = (
            storage.join(source, self.options.table)
            if self.options.table
            else first_existing(source, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
        )
        if uri is None:
            raise ValueError(
                f"{source}: neither Data_Entry_2017.csv nor Data_Entry_2017_v2020.csv; pass "
                "--set table=NAME"
            )
        records = read_records(uri)
        listing = archives.listing(source)
        images: dict[str, archives.Entry] = {}
        for entry in listing.images:
            name = entry.name.rpartition("/")[2]
            if name in images:
                folders = [posixpath.dirname(one.name) for one in (images[name], entry)]
                first, second = (folder or "the folder itself" for folder in folders)
                raise ValueError(
                    f"{source}: an image is there twice, in {first} and in {second}; remove one"
                )
            images[name] = entry
        splits = self._splits(source, uri, records)
        present = [record for record in records if record.path in images]
        missing = [record.line for record in records if record.path not in images]
        if missing and self.options.missing == "refuse":
            raise ValueError(
                f"{uri}: the images of {_counted_lines(missing)} are not below {source}; get them, "
                "or leave them out with --set missing=skip"
            )
        _refuse_patients_in_both(uri, present, splits)
        rows = []
        for record in present:
            columns = {
                name: value for name, value in record._asdict().items() if name in COLUMN_TYPES
            }
            image, split = images[record.path], splits[record.path]
            rows.append(file_row(image, split, **columns, _line=record.line))
        unlisted = set(images) - {record.path for record in records}
        return Index(
            index_table(rows, {**COLUMN_TYPES, "_line": pa.int64()}, source),
            listing.fingerprint,
            info={"labels": list(FINDINGS), "split": self.options.lists},
            notes={
                "split": "the official lists"
                if self.options.lists == "official"
                else "none: all rows in train",
                "patients": len({row["patient_id"] for row in rows}),
                "rows of the CSV without an image": len(missing),
                "images that the CSV does not name": len(unlisted),
            },
        )

    def name_of(self, row: Row) -> str:
        return f"line {row['_line']} of the table"

    def _splits(self, source: str, table_uri: str, records: list[Record]) -> dict[str, str]:
        """Return the split of each image by its name.

        Names begin with the patient's number, so errors have line numbers instead.
        """
        if self.options.lists == "none":
            return {record.path: "train" for record in records}
        out: dict[str, str] = {}
        for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
            uri = first_existing(source, name)
            if uri is None:
                raise ValueError(
                    f"{source}: {name} is not there; put the official lists beside the CSV, or "
                    "pass --set lists=none to have all rows in train"
                )
            lines = map(str.strip, importing.read_text(uri).splitlines())
            listed = [(number, image) for number, image in enumerate(lines, 1) if image]
            both = [number for number, image in listed if out.get(image, split) != split]
            if both:
                raise ValueError(
                    f"{uri}: the other list names the images of {_counted_lines(both)} too; "
                    "remove them from one list"
                )
            out |= {image: split for _, image in listed}
        unnamed = [record.line for record in records if record.path not in out]
        if unnamed:
            raise ValueError(
                f"{table_uri}: neither official list names the images of "
                f"{_counted_lines(unnamed)}; use the lists of the same release"
            )
        return out


def read_records(uri: str) -> list[Record]:
    """Read the CSV.

    Raises ValueError naming the column, line or finding that is wrong.
    """
    out, seen = [], set()
    for number, row in rows_of(uri, COLUMNS):
        findings = sorted(
            {text.strip() for text in (row["Finding Labels"] or "").split("|")} - {NOTHING}
        )
        wrong = [name for name in findings if name not in FINDINGS]
        if wrong:
            raise ValueError(
                f"{uri}:{number}: {wrong[0]!r} is not one of the 14 findings; "
                f"{nearest(wrong[0], FINDINGS)}"
            )
        name = row["Image Index"].strip()
        if name in seen:
            # The name begins with the patient's number
            raise ValueError(f"{uri}:{number}: its Image Index has a row already; remove one")
        seen.add(name)
        patient = _number(row["Patient ID"])
        if patient is None:
            raise ValueError(f"{uri}:{number}: its Patient ID is no whole number")
        out.append(
            Record(
                name,
                number,
                findings,
                patient,
                _number(row.get("Follow-up #")),
                _years(row.get("Patient Age")),
                row.get("Patient Gender") or row.get("Patient Sex"),
                row.get("View Position"),
            )
        )
    return out


def _number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isdigit() else None


def _years(text: str | None) -> int | None:
    """Return whole years.

    The table of 2020 has years; that of 2017 has ages of DICOM (PS3.5, 6.2: AS): 058Y, 007M, 013D.
    """
    written = (text or "").strip()
    number = _number(written.rstrip("YMD"))
    return number and (
        0 if written.endswith("D") else number // 12 if written.endswith("M") else number
    )


def _refuse_patients_in_both(uri: str, records: list[Record], splits: dict[str, str]) -> None:
    """Raise ValueError, with line numbers alone, where patients have images in both lists."""
    splits_of_patient: dict[int, set[str]] = {}
    for record in records:
        splits_of_patient.setdefault(record.patient_id, set()).add(splits[record.path])
    in_both = {patient for patient, found in splits_of_patient.items() if len(found) > 1}
    if in_both:
        numbers = [record.line for record in records if record.patient_id in in_both]
        patients = "1 patient has" if len(in_both) == 1 else f"{len(in_both)} patients have"
        raise ValueError(
            f"{uri}: {patients} images in both official lists: those of "
            f"{_counted_lines(numbers)}; a patient's images must lie in one split"
        )


def _counted_lines(numbers: list[int]) -> str:
    return f"line {numbers[0]}" if len(numbers) == 1 else f"lines {first_few(numbers)}"
