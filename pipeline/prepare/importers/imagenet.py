"""ImageNet (ILSVRC 2012): training images by class, validation images with a ground truth."""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.io import storage
from pipeline.prepare.engine.images import ImageImporter
from pipeline.prepare.engine.importing import (
    Index,
    check_no_empty_classes,
    file_row,
    first_existing,
    first_few,
    index_table,
    read_lines,
)
from pipeline.prepare.readers import archives
from pipeline.prepare.readers.dialect import rows_of

BELOW = ("", "Data/CLS-LOC/", "ILSVRC/Data/CLS-LOC/")
TRAIN = ("train", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_train", "train.tar")
VALIDATION = ("val", "ILSVRC2012_img_val.tar", "ILSVRC2012_img_val", "val.tar", "validation")
NAMES = ("LOC_synset_mapping.txt", "synset_words.txt")
MAP = "map_clsloc.txt"
META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SOLUTION = "LOC_val_solution.csv"
DEVKIT = ("", "devkit/data/", "data/", "ILSVRC2012_devkit_t12/data/", "devkit/", "ILSVRC/")


WNID = re.compile(r"n\d{8}")


class ImageNetOptions(Options):
    train: str = Field(
        "",
        description="folder or tar below SOURCE; empty: train, ILSVRC2012_img_train.tar, "
        "Data/CLS-LOC/train; none: leave it out",
    )
    val: str = Field(
        "",
        description="the same for validation: val, ILSVRC2012_img_val.tar, Data/CLS-LOC/val; "
        "none: leave it out",
    )


@register("importer", "imagenet", options=ImageNetOptions)
class ImageNet(ImageImporter):
    """ImageNet (ILSVRC): images of 1000 classes.

    train: WNID/FILE folders, WNID.tar files, or ILSVRC2012_img_train.tar (a tar of tars), read
    in place; val: WNID folders, or flat files with LOC_val_solution.csv, or with
    ILSVRC2012_validation_ground_truth.txt and the devkit's meta.mat (2012) or map_clsloc.txt (later
    ones).

    Columns: `label` (index of the wnid among all sorted wnids: 0 to 999, as in published heads),
    `wnid`, `label_name` (the synset's words, from LOC_synset_mapping.txt or synset_words.txt, then
    the devkit; else the wnid). The ground truth counts classes from 1 in the devkit's order, which
    is not the sorted one.
    """

    label = "wnid"

    def index(self, source: str) -> Index:
        named = _names(source)
        train, validation = (
            _find(source, chosen, known)
            for chosen, known in ((self.options.train, TRAIN), (self.options.val, VALIDATION))
        )
        if train is None and validation is None:
            raise ValueError(
                f"{source}: neither training nor validation images; looked for "
                f"{', '.join((*TRAIN, *VALIDATION))}, also in {' and '.join(BELOW[1:])}; pass "
                "--set train=NAME"
            )
        rows, fingerprints, left = [], [], {}
        for split, uri in (("train", train), ("validation", validation)):
            if uri is None:
                continue
            listing = archives.listing(uri)
            fingerprints.append(listing.fingerprint)
            left[split] = listing.others()
            check_no_empty_classes(listing.empty, uri)
            wnids = {entry.name: _wnid(entry.name) for entry in listing.images}
            flat = [name for name, wnid in wnids.items() if wnid is None]
            if flat and (split == "train" or len(flat) < len(wnids)):
                raise ValueError(
                    f"{uri}: not in a folder called by a WordNet id (n and eight digits): "
                    f"{first_few(flat)}; use importer imagefolder for other layouts"
                )
            if flat:
                wnids = _truth(source, listing.images)
            rows += [file_row(entry, split, wnid=wnids[entry.name]) for entry in listing.images]
        classes = sorted(named) or sorted({row["wnid"] for row in rows})
        unknown = sorted({row["wnid"] for row in rows} - set(classes))
        if unknown:
            raise ValueError(
                f"{source}: classes that {' or '.join((*NAMES, MAP))} does not name: "
                f"{first_few(unknown)}; the file is not that of these images"
            )
        at = {wnid: i for i, wnid in enumerate(classes)}
        rows = [
            {**row, "label": at[row["wnid"]], "label_name": named.get(row["wnid"], row["wnid"])}
            for row in rows
        ]
        columns = {"label": pa.int64(), "wnid": pa.string(), "label_name": pa.string()}
        return Index(
            index_table(rows, columns, source),
            " ".join(fingerprints),
            notes={
                "classes": len(classes),
                "files left out": {k: n for part in left.values() for k, n in part.items()},
                "names from": "the wnids themselves" if not named else "a file of synset words",
            },
            info={"labels": [named.get(wnid, wnid) for wnid in classes], "wnids": classes},
        )


def _wnid(name: str) -> str | None:
    return next((part for part in name.split("/")[:-1] if WNID.fullmatch(part)), None)


def _find(source: str, chosen: str, known: tuple[str, ...]) -> str | None:
    if chosen == "none":
        return None
    if chosen:
        return storage.join(source, chosen)
    return first_existing(source, *(below + name for below in BELOW for name in known))


def _beside(source: str, *names: str) -> str | None:
    return first_existing(source, *(below + name for below in DEVKIT for name in names))


def _names(source: str) -> dict[str, str]:
    """Return the synset's words by wnid; empty where no file has them."""
    uri = _beside(source, *NAMES)
    if uri is None:
        return {wnid: name.replace("_", " ") for _, wnid, name in _map(source)}
    pairs = [line.partition(" ") for line in read_lines(uri)]
    return {wnid: words.strip().split(",")[0] for wnid, _, words in pairs}


def _map(source: str) -> list[tuple[int, str, str]]:
    """Return (number in the devkit, wnid, name) of map_clsloc.txt or meta.mat, if there is one."""
    uri = _beside(source, MAP)
    if uri is None and (meta := _beside(source, META)) is not None:
        return _meta(meta)
    out = []
    for number, line in enumerate(read_lines(uri) if uri else (), 1):
        found = re.fullmatch(r"(n\d{8})\s+(\d+)\s+(\S+)", line)
        if found is None:
            raise ValueError(f"{uri}:{number}: {line!r} is not WNID NUMBER NAME")
        out.append((int(found[2]), found[1], found[3]))
    return out


def _meta(uri: str) -> list[tuple[int, str, str]]:
    """Return the same of the 2012 devkit's meta.mat: its classes are synsets without children."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        data = io.BytesIO(storage.read_bytes(uri))
        found = loadmat(data, squeeze_me=True, variable_names=["synsets"])["synsets"]
        return [
            (int(s["ILSVRC2012_ID"]), str(s["WNID"]), str(s["words"]).split(",")[0])
            for s in np.atleast_1d(found)
            if int(s["num_children"]) == 0
        ]
    except (MatReadError, ValueError, LookupError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{uri}: not the devkit's meta.mat ({type(error).__name__}: {error})"
        ) from None


def _truth(source: str, images: list[archives.Entry]) -> dict[str, str]:
    """Return wnids of flat validation files by name.

    Raises ValueError when neither file with their classes is there, or it does not name them all.
    """
    solution, truth = _beside(source, SOLUTION), _beside(source, TRUTH)
    if solution is not None:
        wnid_of: dict[Any, str] = {
            row["ImageId"]: row["PredictionString"].split(" ")[0]
            for _, row in rows_of(solution, ("ImageId", "PredictionString"))
        }
        wrong = [f"{name}: {wnid!r}" for name, wnid in wnid_of.items() if not WNID.fullmatch(wnid)]
        if wrong:
            raise ValueError(
                f"{solution}: PredictionString begins with no WordNet id: {first_few(wrong)}"
            )
        keys = {entry.name: entry.name.rpartition("/")[2].partition(".")[0] for entry in images}
        where = solution
    elif truth is not None:
        wnids = {str(number): wnid for number, wnid, _ in _map(source)}
        if not wnids:
            raise ValueError(
                f"{truth}: its numbers are in the devkit's order, which {META} or {MAP} says: "
                f"put one of them, or {SOLUTION}, beside it"
            )
        numbers = read_lines(truth)
        outside = [number for number in numbers if number not in wnids]
        if outside:
            raise ValueError(
                f"{truth}: numbers that the devkit's {MAP} or {META} does not have: "
                f"{first_few(outside)}"
            )
        wnid_of = {i: wnids[number] for i, number in enumerate(numbers, 1)}
        keys = {entry.name: _serial(entry.name) for entry in images}
        where = truth
    else:
        raise ValueError(
            f"{source}: validation images without class folders need {SOLUTION}, or {TRUTH} "
            f"with {META} or {MAP}; or leave them out: val=none"
        )
    unnamed = [name for name, key in keys.items() if key not in wnid_of]
    if unnamed:
        raise ValueError(f"{where}: no class for {first_few(unnamed)}")
    return {name: wnid_of[key] for name, key in keys.items()}


def _serial(name: str) -> int | None:
    found = re.search(r"_(\d{8})\.\w+$", name)
    return int(found[1]) if found else None
