"""ChestX-ray14 (Wang et al. 2017, NIH): the CSV of findings, the official lists and the images."""

from __future__ import annotations

from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline import storage
from pipeline.data.prepare import files, importing
from pipeline.data.prepare.importing import Importer, Index, few, first_there, lines, place, table
from pipeline.registry import Options, nearest, register

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia", "Infiltration", "Mass", "Nodule",
            "Pleural_Thickening", "Pneumonia", "Pneumothorax")
NOTHING = "No Finding"
COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
KINDS = {"findings": pa.list_(pa.string()), "patient_id": pa.int64(), "follow_up": pa.int64(), "age": pa.int64(), "sex": pa.string(), "view": pa.string()}


class ChestXray14Options(Options):
    table: str = Field("", description="the CSV, below SOURCE; empty: Data_Entry_2017.csv or Data_Entry_2017_v2020.csv")
    lists: Literal["official", "none"] = Field(
        "official", description="official: split by train_val_list.txt and test_list.txt; none: all rows in train, for a job that splits them itself")
    missing: Literal["refuse", "skip"] = Field("refuse", description="skip: leave out and count rows of the CSV whose image is not there")


@register("importer", "chestxray14", options=ChestXray14Options)
class ChestXray14(Importer):
    """Data_Entry_2017.csv, train_val_list.txt and test_list.txt, and the PNGs in images_001 to images_012 or one folder, also as tar, tar.gz or zip.

    Columns: ``findings`` (list, empty for No Finding), ``patient_id`` (the group of a job), ``follow_up``, ``age``, ``sex``, ``view``. The official
    lists are the splits train and test; a job cuts its validation rows from train by patient (group: patient_id).
    """

    label = "findings"

    def index(self, source: str) -> Index:
        uri = storage.join(source, self.options.table) if self.options.table else first_there(source, "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
        if uri is None:
            raise ValueError(f"{source}: neither Data_Entry_2017.csv nor Data_Entry_2017_v2020.csv; say --set table=NAME")
        records = _records(uri)
        found = files.listing(source)
        images: dict[str, files.Entry] = {}
        for entry in found.images:
            name = entry.name.rpartition("/")[2]
            if name in images:
                raise ValueError(f"{source}: {name} is there twice: {images[name].name} and {entry.name}; remove one")
            images[name] = entry
        splits = self._splits(source, [record["path"] for record in records])
        missing = [record["path"] for record in records if record["path"] not in images]
        if missing and self.options.missing == "refuse":
            raise ValueError(f"{uri}: no image for {few(missing)} below {source}; get them, or leave them out with --set missing=skip")
        rows = [place(images[record["path"]], splits[record["path"]], **{k: v for k, v in record.items() if k != "path"})
                for record in records if record["path"] in images]
        _no_patient_in_both(rows)
        unlisted = set(images) - {record["path"] for record in records}
        return Index(table(rows, KINDS, source), found.mark, info={"labels": list(FINDINGS), "split": self.options.lists},
                     notes={"split": "the official lists" if self.options.lists == "official" else "none: all rows in train",
                            "patients": len({row["patient_id"] for row in rows}), "rows of the CSV without an image": len(missing),
                            "images that the CSV does not name": len(unlisted)})

    def _splits(self, source: str, names: list[str]) -> dict[str, str]:
        if self.options.lists == "none":
            return dict.fromkeys(names, "train")
        out: dict[str, str] = {}
        for split, name in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
            uri = first_there(source, name)
            if uri is None:
                raise ValueError(f"{source}: {name} is not there; put the official lists beside the CSV, or say --set lists=none to have all rows in train")
            listed = lines(uri)
            both = [image for image in listed if out.get(image, split) != split]
            if both:
                raise ValueError(f"{uri}: images that the other list names too: {few(both)}")
            out |= dict.fromkeys(listed, split)
        unnamed = [name for name in names if name not in out]
        if unnamed:
            raise ValueError(f"{source}: images of the CSV that neither official list names: {few(unnamed)}; use the lists of the same release")
        return out


def _records(uri: str) -> list[dict[str, Any]]:
    """Rows of the CSV. Raises ValueError naming the column, line or finding that is wrong."""
    out, seen = [], set()
    for number, row in enumerate(importing.records(uri, COLUMNS), 2):
        findings = sorted({text.strip() for text in (row["Finding Labels"] or "").split("|")} - {NOTHING})
        wrong = [name for name in findings if name not in FINDINGS]
        if wrong:
            raise ValueError(f"{uri}:{number}: {wrong[0]!r} is none of the 14 findings; {nearest(wrong[0], FINDINGS)}")
        name = row["Image Index"].strip()
        if name in seen:
            raise ValueError(f"{uri}:{number}: its Image Index has a row already; remove one")  # the name begins with the patient's number
        seen.add(name)
        patient = _number(row["Patient ID"])
        if patient is None:
            raise ValueError(f"{uri}:{number}: its Patient ID is no whole number")
        out.append({"path": name, "findings": findings, "patient_id": patient, "follow_up": _number(row.get("Follow-up #")),
                    "age": _years(row.get("Patient Age")), "sex": row.get("Patient Gender") or row.get("Patient Sex"), "view": row.get("View Position")})
    return out


def _number(text: str | None) -> int | None:
    digits = (text or "").strip()
    return int(digits) if digits.isdigit() else None


def _years(text: str | None) -> int | None:
    """Whole years: the 2017 table writes ages as DICOM does (PS3.5, 6.2: AS), 058Y, 007M or 013D, that of 2020 as numbers of years."""
    written = (text or "").strip()
    number = _number(written.rstrip("YMD"))
    return number and (0 if written.endswith("D") else number // 12 if written.endswith("M") else number)


def _no_patient_in_both(rows: list[dict[str, Any]]) -> None:
    seen: dict[int, str] = {}
    both = sorted({row["patient_id"] for row in rows if seen.setdefault(row["patient_id"], row["split"]) != row["split"]})
    if both:
        raise ValueError(f"patients in both official lists: {few(both)}; a patient's images must lie in one split")
