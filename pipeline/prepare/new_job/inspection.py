"""Look into files: of which kind they are, their splits, their columns, and a sample of rows."""

from __future__ import annotations

import io
import math
import os
import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import filled
from pipeline.core.sampling import evenly_spread
from pipeline.data import manifests, to_parquet
from pipeline.data.manifests import Manifest, Selection
from pipeline.io import storage
from pipeline.media import image_io
from pipeline.prepare.engine.importing import first_few, split_of_file, split_of_folder
from pipeline.prepare.new_job.columns import Column, may_name_rows, names_files, profile

TABLES = ("parquet", "csv", "jsonl")
"""Kinds of tables, of which the first one is read where a folder holds several."""
SAMPLE_ROWS = 20_000
"""Rows of a sample, of tables."""
SAMPLE_ROW_GROUPS = 16
"""Most row groups that these rows are read from."""
SAMPLE_MEDIA_FILES = 48
"""Images or recordings of a sample."""
SAMPLE_SERIES = 256
"""Rows of a sample of series."""
SAMPLE_TEXT_FILES = 2_000
"""Files of text of a sample."""
IN_FOLDERS = {*to_parquet.NAMED_FILE_KINDS, "documents"}
"""Kinds of files whose folder is their class."""
MAX_PARENTS = 3
"""A path that leads so many folders up is no easier to read than an absolute one."""
DELIMITERS = (";", "\t", "|")
HEAVY = ("bytes", "file", "time", "other")
"""Kinds of columns of which no sample is read."""


@dataclass(frozen=True)
class Media:
    """A sample of images or recordings.

    Attributes:
        what: image or audio.
        column: the column that holds or names them.
        sides: of images, the shorter side of each in pixels.
        grey: of images, whether all are grey.
        seconds, rates: of recordings.
        missing: names of files that are not there.
        missing_share: about how many are not, as a share that may be bad.
        root: folder that relative names begin in; "" for absolute names, URIs and bytes.
    """

    what: str
    column: str = ""
    sides: tuple[int, ...] = ()
    grey: bool = False
    seconds: tuple[float, ...] = ()
    rates: tuple[int, ...] = ()
    missing: tuple[str, ...] = ()
    missing_share: float = 0.0
    root: str = ""


@dataclass(frozen=True)
class Inspection:
    """What is in the files.

    Attributes:
        kind: images, audio, documents (a text a file), parquet, csv or jsonl.
        places: files and folders by field of data: uri alone, or train, validation and test.
        manifests: rows by the same fields.
        table: a sample of the rows of uri or train, without images and recordings.
        columns: what its columns hold, and those that are not in it; what may name rows or groups
            (a patient) is counted in all rows.
        stated: whether a job must state its format: of texts, and where other kinds are there too.
        notes: sentences on what was left out.
        delimiter: of CSV, where it is no comma.
    """

    kind: str
    places: dict[str, list[str]]
    manifests: dict[str, Manifest]
    table: pa.Table
    columns: list[Column]
    stated: bool
    notes: list[str] = field(default_factory=list[str])
    delimiter: str = ""

    @property
    def main(self) -> Manifest:
        """The rows of uri, or of train."""
        return self.manifests.get("uri") or self.manifests["train"]

    @property
    def all_places(self) -> list[str]:
        """The files and folders of all fields."""
        return [place for listed in self.places.values() for place in listed]

    @property
    def rows(self) -> int:
        return sum(manifest.num_rows for manifest in self.manifests.values())

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.name == name)

    def whole(self, name: str) -> list[Any]:
        """Return a column of all rows."""
        return [
            value
            for manifest in self.manifests.values()
            for value in manifests.read_columns(Selection(manifest), [name])[name].to_pylist()
        ]


def inspect(places: Sequence[str], scratch: str) -> Inspection:
    """Look into files, folders and globs.

    Args:
        places: as the user gives them.
        scratch: a folder for conversions to Parquet.

    Raises:
        ValueError: no such place, nothing to read in it, or tables that do not go together.
    """
    found = to_parquet.expand(list(places), "auto")
    kinds = Counter(to_parquet.kind_of(file) for file, _ in found)
    if not set(kinds) - {"", "text"}:
        _check_texts([file for file, _ in found if to_parquet.kind_of(file)], places)
        kinds = Counter(documents=kinds["text"])
    left_out: list[str] = []
    for kind in _candidates(kinds):
        of_kind = "text" if kind == "documents" else kind
        files = [(file, root) for file, root in found if to_parquet.kind_of(file) == of_kind]
        is_media = kind in IN_FOLDERS
        fields = _split_folders(files) if is_media else _split_files(files, places)
        if kind == "documents":
            fields, left_out = _class_folders([file for file, _ in files], fields)
        delimiter = _delimiter(files[0][0]) if kind == "csv" else ""
        places_of_field = fields or {"uri": list(places)}
        by_field = {
            name: _manifest(uris, kind, scratch, delimiter)
            for name, uris in places_of_field.items()
        }
        first = by_field.get("uri") or by_field["train"]
        is_stray = not is_media and to_parquet.NAMED_FILE_KINDS & set(kinds)
        if is_stray and not first.num_rows:
            continue  # a table without rows names no image
        _check_rows(by_field, places_of_field)
        table, columns = _sample(first, kind)
        if (
            is_media
            or len(set(kinds) & to_parquet.NAMED_FILE_KINDS) == 0
            or any(map(names_files, columns))
        ):
            break
    else:
        raise AssertionError("images or sound are always taken")
    if kind == "csv":
        _check_utf8(files[0][0], columns)
    others = {other: count for other, count in kinds.items() if other not in (kind, "")}
    notes = [f"files of other kinds are left out: {_counted(others)}"] if others else []
    notes += left_out
    if is_media and not fields and (too_deep := _too_deep([file for file, _ in files])):
        notes.append(f"a file's class is its own folder, not one above it, as in {too_deep}")
    return Inspection(
        kind,
        places_of_field,
        by_field,
        table,
        _of_all_rows(first, columns, len(table)),
        bool(others) or kind == "documents",
        notes,
        delimiter,
    )


def _check_texts(texts: Sequence[str], places: Sequence[str]) -> None:
    """Raise ValueError where the only known files are texts that do not lie in class folders."""
    shown = ", ".join(places)
    if not texts:
        raise ValueError(
            f"{shown}: no file of a known kind; a first job is written for CSV, JSON Lines and "
            "Parquet, and for folders with one folder of images, recordings or texts a class"
        )
    if not _lie_in_classes(texts):
        raise ValueError(
            f"{shown}: plain text has no labels. Sort it into one folder a class, with a text "
            "a file (pos/1.txt, neg/1.txt), or write texts and labels as columns of a CSV "
            "file. Without labels, pretrain with a copy of jobs/text/gpt_small.yaml"
        )


def _check_utf8(file: str, columns: Sequence[Column]) -> None:
    """Raise ValueError for a column of a CSV file whose texts are no UTF-8."""
    not_utf8 = [column.name for column in columns if column.kind == "bytes"]
    if not_utf8:
        raise ValueError(
            f"{file}: column {not_utf8[0]} is no UTF-8 text (Excel often writes latin-1): write it "
            f"anew with iconv -f latin1 -t utf-8 {file} > utf8.csv"
        )


def _candidates(kinds: Counter[str]) -> list[str]:
    """Return the kinds to try, in order: a table that names images, then the images."""
    tables = [kind for kind in TABLES if kinds.get(kind)][:1]
    media = sorted(set(kinds) & IN_FOLDERS, key=lambda kind: -kinds[kind])[:1]
    return [*tables, *media]


def _counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _split_folders(files: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return the folders train, val and test of images or recordings; {} where there are none.

    Raises ValueError where all lie in one folder, which names no class.
    """
    folders = {posixpath.dirname(file) for file, _ in files}
    if len(folders) == 1:
        raise ValueError(
            f"{folders.pop()}: all {len(files)} files lie in one folder, so that nothing says "
            "their classes: sort them into one folder a class, or give a CSV with a column of "
            "file names and a column of labels"
        )
    shared = posixpath.commonpath([file.partition("://")[2] or file for file, _ in files])
    scheme = files[0][0].partition("://")[0] + "://" if "://" in files[0][0] else ""
    tops: dict[str, list[str]] = {}
    for file, _ in files:
        path = file.partition("://")[2] or file
        top = path[len(shared) :].lstrip("/").split("/")[0]
        split = split_of_folder(top)
        if not split:
            return {}
        folder = scheme + posixpath.join(shared, top)
        if folder not in tops.setdefault(split, []):
            tops[split].append(folder)
    return tops if "train" in tops else {}


def _lie_in_classes(files: Sequence[str]) -> bool:
    """Return whether at least two folders hold at least three of the files each."""
    counts = Counter(map(posixpath.dirname, files))
    return sum(count > 2 for count in counts.values()) > 1


def _class_folders(
    files: Sequence[str],
    fields: dict[str, list[str]],
) -> tuple[dict[str, list[str]], list[str]]:
    """Leave out texts that lie beside the folders of classes, and classes that a split lacks.

    For example urls.txt and ``train/unsup`` of the IMDB reviews.

    Args:
        files: All files of text.
        fields: Folders by split; {} where there are no splits.

    Returns:
        The folders by field of data (`fields` where nothing is left out), and a note.
    """
    counts = Counter(map(posixpath.dirname, files))
    kept = [one for one in counts if not any(other.startswith(f"{one}/") for other in counts)]
    splits = {
        name: [one for one in kept if one.startswith(tuple(f"{place}/" for place in listed))]
        for name, listed in fields.items()
    } or {"uri": kept}
    names = [{posixpath.basename(one) for one in folders} for folders in splits.values()]
    shared = set.intersection(*names)
    splits = {
        name: sorted(one for one in folders if posixpath.basename(one) in shared)
        for name, folders in splits.items()
    }
    used = {folder for folders in splits.values() for folder in folders}
    others = {folder: count for folder, count in counts.items() if folder not in used}
    if not others or len(shared) < 2:
        return fields, []
    shown = ", ".join(f"{folder} ({count})" for folder, count in sorted(others.items()))
    return splits, [f"left out, as their folder is no class of every split: {shown}"]


def _too_deep(files: Sequence[str]) -> str:
    """Return the folder of a file that lies deeper than in one folder a class, or ""."""
    shared = posixpath.commonpath(files)
    deep = (file for file in files if file[len(shared) :].strip("/").count("/") > 1)
    return posixpath.dirname(next(deep, ""))


def _split_files(files: Sequence[tuple[str, str]], places: Sequence[str]) -> dict[str, list[str]]:
    """Return the tables of each split where their names say it; {} where they do not.

    Raises ValueError for one of several whose name says held out, but not for what (eval.csv).
    """
    is_prepared = any(
        storage.exists(storage.join(place, to_parquet.PREPARED_MANIFEST))
        for place in places
        if storage.is_dir(place)
    )
    if len(files) == 1 or is_prepared:
        return {}
    by_split: dict[str, list[str]] = {}
    for file, root in files:
        name = file[len(root) :].lstrip("/") if root else PurePosixPath(file).name
        by_split.setdefault(split_of_file(name), []).append(file)
    return by_split if len(by_split) > 1 and "train" in by_split else {}


def _delimiter(file: str) -> str:
    """Return what stands between the fields of a CSV file, "" for a comma or tabs of a .tsv."""
    if ".tsv" in file.lower():
        return ""
    with to_parquet.open_decompressed(file) as handle:
        header = handle.readline(1 << 20).decode("utf-8", "replace")
    counts = {mark: header.count(mark) for mark in DELIMITERS}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] > header.count(",") else ""


def _manifest(uris: list[str], kind: str, scratch: str, delimiter: str) -> Manifest:
    """Return the rows of some files, converted below a scratch folder."""
    if delimiter:
        files = [file for file, _ in to_parquet.expand(uris, "csv")]
        uris, kind = _as_parquet(files, delimiter, scratch), "parquet"
    try:
        found, _ = manifests.build_with_files(uris, kind, scratch, "stat")
    except ValueError as error:
        if "differ" not in str(error):
            raise
        raise ValueError(f"{error}: these are several tables; name the files of one") from None
    return found


def _check_rows(
    by_field: Mapping[str, Manifest], places_of_field: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError where the files of a field of data have no row."""
    for name, manifest in by_field.items():
        if not manifest.num_rows:
            places = ", ".join(places_of_field[name])
            raise ValueError(f"{places}: no rows, a header at most: add rows")


def _as_parquet(files: list[str], delimiter: str, scratch: str) -> list[str]:
    paths = []
    for file, tables in to_parquet.csv_tables_of(files, delimiter):
        path = Path(scratch, f"{PurePosixPath(file).stem}-{abs(hash(file))}.parquet")
        pq.write_table(pa.concat_tables(tables), path)
        paths.append(str(path))
    return paths


def sample_row_ids(manifest: Manifest, most: int) -> np.ndarray:
    """Return the ids of a sample of rows, from row groups all over the files."""
    groups = evenly_spread(len(manifest.row_groups), SAMPLE_ROW_GROUPS)
    each = -(-most // len(groups))
    ids = [
        start + evenly_spread(rows, each)
        for start, rows in (
            (int(manifest.starts[group]), manifest.row_groups[group].num_rows) for group in groups
        )
    ]
    return np.concatenate(ids)


def _sample(manifest: Manifest, kind: str) -> tuple[pa.Table, list[Column]]:
    """Return a sample of the rows without heavy columns, and a description of every column."""
    empty = manifest.schema.empty_table()
    kinds = {name: profile(name, empty[name]) for name in manifest.schema.names}
    is_text = kind == "documents"
    light = [name for name, column in kinds.items() if column.kind not in HEAVY or is_text]
    ids = sample_row_ids(manifest, SAMPLE_TEXT_FILES if is_text else SAMPLE_ROWS)
    table = manifests.Reader(manifest, light).take(ids) if light else pa.table({})
    if is_text:
        texts = [text.decode("utf-8", "replace") for text in table["text"].to_pylist()]
        table = table.set_column(0, "text", pa.array(texts, pa.large_string()))
    return table, [
        profile(name, table[name]) if name in light else column for name, column in kinds.items()
    ]


def _of_all_rows(manifest: Manifest, columns: Sequence[Column], sampled: int) -> list[Column]:
    """Describe anew what may name rows or groups, from all rows: a sample may have one row each."""
    if sampled == manifest.num_rows:
        return list(columns)
    rows = Selection(manifest)
    return [
        profile(column.name, manifests.read_columns(rows, [column.name])[column.name])
        if may_name_rows(column)
        else column
        for column in columns
    ]


def series_steps(manifest: Manifest, column: str) -> int:
    """Return how many steps 95 % of the series of a column have at most, in a sample."""
    values = manifests.Reader(manifest, [column]).take(sample_row_ids(manifest, SAMPLE_SERIES))[
        column
    ]
    array = values.combine_chunks()
    if pa.types.is_struct(array.type):
        array = array.field(0)
    counts = filled(pc.list_value_length(array), 0)
    return int(np.quantile(counts, 0.95)) if len(counts) else 0


# ---------------------------------------------------------------- images and recordings


def media_of(found: Inspection) -> Media | None:
    """Look at a sample of the images or recordings that the rows hold or name; None for others."""
    for column in found.columns:
        if column.kind not in ("bytes", "file") and not names_files(column):
            continue
        ids = sample_row_ids(found.main, SAMPLE_MEDIA_FILES)
        cells = manifests.Reader(found.main, [column.name]).take(ids)[column.name].to_pylist()
        cells = [cell for cell in cells if cell]
        names = [cell for cell in cells if isinstance(cell, str)]
        root = _root(names, found)
        cells = [
            storage.join(root, cell) if root and isinstance(cell, str) else cell for cell in cells
        ]
        missing = [cell for cell in cells if isinstance(cell, str) and not storage.exists(cell)]
        here = [cell for cell in cells if cell not in missing]
        if missing and not here:
            raise ValueError(
                f"column {column.name} names files, and none of {len(missing)} that were looked "
                f"for is there: {first_few(missing[:2])}; relative names may begin in the folder "
                "of the table or in the current one"
            )
        media = _pictures(here) or _recordings(here)
        if media is not None:
            return replace(
                media,
                column=column.name,
                missing=tuple(missing),
                missing_share=math.ceil(200 * len(missing) / len(cells)) / 100,
                root=root,
            )
    return None


def _root(names: Sequence[str], found: Inspection) -> str:
    """Return the folder that relative names begin in: that of the table, or the current one."""
    relative = [name for name in names if not storage.is_absolute(name)]
    if not relative or found.kind in to_parquet.NAMED_FILE_KINDS:
        return ""
    file, _ = to_parquet.expand(next(iter(found.places.values())), found.kind)[0]
    beside = posixpath.dirname(file) or "."
    return next(
        (
            root
            for root in (beside, ".", *_folders(beside))
            if any(storage.exists(storage.join(root, name)) for name in relative[:8])
        ),
        beside,
    )


def _folders(place: str) -> list[str]:
    """Return the folders in a local one, where a table may keep the files that it names."""
    if storage.is_remote(place):
        return []
    return sorted(Path(place, one.name).as_posix() for one in os.scandir(place) if one.is_dir())


def _file_of(cell: Any) -> Any:
    """Return bytes or an open file of a cell."""
    value = (cell.get("bytes") or cell.get("path")) if isinstance(cell, dict) else cell
    return storage.read_bytes(value) if isinstance(value, str) else value


def _pictures(cells: Sequence[Any]) -> Media | None:
    """Describe images, without where they lie; None where most cells are none."""
    sizes = [size for cell in cells if (size := image_io.upright_size(cell))]
    if not sizes or len(sizes) < len(cells) / 2:
        return None
    modes: set[str] = set()
    for cell in cells:
        data = _file_of(cell)
        if data and image_io.upright_size(data):
            with PIL.Image.open(io.BytesIO(data)) as image:
                modes.add(image.mode)
    grey = modes <= {"L", "1", "LA", "I;16", "I"}
    return Media("image", sides=tuple(min(size) for size in sizes), grey=grey)


def _recordings(cells: Sequence[Any]) -> Media | None:
    """Describe recordings, without where they lie; None where most cells are none."""
    from pipeline.media import audio_io  # here: only sound needs its library

    infos = []
    for cell in cells:
        try:
            infos.append(audio_io.inspect(_file_of(cell)))
        except audio_io.BrokenAudioError:
            continue
    if not infos or len(infos) < len(cells) / 2:
        return None
    seconds = tuple(info.seconds for info in infos)
    return Media("audio", seconds=seconds, rates=tuple(info.rate for info in infos))


def relative_to(place: str, folder: str) -> str:
    """Return a place as a job file in a folder names it: far ones by their absolute path."""
    if storage.is_remote(place):
        return place
    relative = Path(os.path.relpath(place, folder)).as_posix()
    return os.path.abspath(place) if relative.startswith("../" * MAX_PARENTS) else relative
