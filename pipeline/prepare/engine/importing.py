"""What importers share: the index of a source's rows, small text files, options, help."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pydantic

from pipeline.config import listing, registry
from pipeline.config.registry import Options
from pipeline.data.to_parquet import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from pipeline.io import storage
from pipeline.prepare.readers.archives import Entry

Row = dict[str, Any]
"""A row: the values by the names of its columns."""
Notes = dict[str, Any]
"""What the summary says, by what it is of: counts, short texts, or counts by a name."""
Info = dict[str, Any]
"""What the columns mean, as plain values that the manifest keeps."""
FILE_COLUMNS = pa.schema(
    [
        ("_uri", pa.string()),
        ("_member", pa.string()),
        ("_offset", pa.int64()),
        ("_size", pa.int64()),
        ("path", pa.string()),
        ("split", pa.string()),
    ]
)
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "testa": "validation",
    "test": "test",
    "testing": "test",
    "testb": "test",
}
"""Publishers' names of splits, and the names that a job uses."""
HELD_OUT = re.compile(r"(?<![a-z])(eval|evaluation|(held|hold)[\W_]?out)(set)?(?![a-z])")
"""Names of held-out rows that are validation to some publishers and test to others."""
NO_SPLIT = "its split is not one of train, validation and test"
MAX_NAMED = 5
"""An error message names so many examples."""


class InvalidRow(TypedDict):
    """A row that was left out: where it is, its split and why.

    ``pieces``: how many rows its recording was cut into, where that was cut.
    """

    path: str
    split: str
    reason: str
    pieces: NotRequired[str]


def invalid_row(path: str, split: str, reason: str) -> InvalidRow:
    return {"path": path, "split": split, "reason": reason}


def invalid_rows(name: str, split: str, reasons: np.ndarray) -> list[InvalidRow]:
    """List the rows of a table that have a reason, (n,) texts, by their positions from 1."""
    places = np.flatnonzero(reasons != "")
    return [invalid_row(f"{name}:row {i + 1}", split, str(reasons[i])) for i in places]


def is_repeated(ids: np.ndarray) -> np.ndarray:
    """Return (n,) bool: ids that a row before has too."""
    repeated = np.ones(len(ids), dtype=bool)
    repeated[np.unique(ids, return_index=True)[1]] = False
    return repeated


def first_reason(*reasons: tuple[np.ndarray, str]) -> np.ndarray:
    """Return (n,) texts: of each row the first reason whose mask (n,) is true for it, else ""."""
    return np.select([mask for mask, _ in reasons], [text for _, text in reasons], "")


@dataclass(frozen=True)
class Index:
    """The rows of a source, before any file is read.

    Attributes:
        rows: FILE_COLUMNS and the importer's own columns; those that begin with an underscore are
            not written.
        fingerprint: changes when the files do.
        extra: columns that `postprocess` adds.
        notes: counts for the summary.
        info: what the columns mean, kept in the manifest.
        invalid: rows without a file (a transcript without its recording): path, split and reason.
    """

    rows: pa.Table
    fingerprint: str
    extra: tuple[pa.Field, ...] = ()
    notes: Notes = field(default_factory=dict)
    info: Info = field(default_factory=dict)
    invalid: list[InvalidRow] = field(default_factory=list)


def file_row(entry: Entry, split: str, **columns: Any) -> Row:
    """Make one row of an index."""
    return {
        "_uri": entry.uri,
        "_member": entry.member,
        "_offset": entry.offset,
        "_size": entry.size,
        "path": entry.name,
        "split": split,
        **columns,
    }


def index_table(
    rows: list[Row],
    columns: dict[str, pa.DataType],
    source: str,
    noun: str = "images",
) -> pa.Table:
    """Return the rows as a table. Raises ValueError if there are none."""
    if not rows:
        raise ValueError(
            f"{source}: no {noun} found in the layout that this importer reads; see onetomany "
            "prepare NAME --list"
        )
    return pa.Table.from_pylist(
        rows,
        schema=pa.schema(
            [*FILE_COLUMNS, *(pa.field(name, kind) for name, kind in columns.items())]
        ),
    )


def parse_names(text: str) -> list[str]:
    """Return the names that an option holds, with commas between them."""
    return [name for name in map(str.strip, text.split(",")) if name]


def chosen_names(option: str, text: str, known: Iterable[str], source: str) -> list[str]:
    """Return the names that an option holds. Raises ValueError for one that is not known."""
    names, known = parse_names(text), list(known)
    for name in names:
        if name not in known:
            nearest = registry.nearest(name, known) if known else "there is none"
            raise ValueError(f"--set {option}={text}: no {name} in {source}; {nearest}")
    return names


def first_few(names: Iterable[Any]) -> str:
    """Format the first few names, and how many there are."""
    names = list(names)
    return ", ".join(map(str, names[:MAX_NAMED])) + (
        f", ... ({len(names)} in all)" if len(names) > MAX_NAMED else ""
    )


def split_of_folder(folder: str) -> str:
    """Return the split that a folder's name is (val, Val2017), "" for none."""
    found = re.fullmatch(r"([a-z]+)[\W_\d]*", folder.lower())
    return SPLITS.get(found[1], "") if found else ""


def split_of_folders(name: str) -> str:
    """Return the split that the nearest folder of a file is called by, "" for none.

    Raises ValueError for a folder of held-out files that may be either (eval).
    """
    for folder in reversed(PurePosixPath(name).parent.parts):
        if split := split_of_folder(folder):
            return split
        if re.fullmatch(HELD_OUT.pattern + r"[\W_\d]*", folder.lower()):
            raise ValueError(
                f"{name}: are the images of {folder} for validation or for test? Rename the "
                "folder to val or test"
            )
    return ""


def split_of(name: str) -> str:
    """Return the split in a file's name, else in its nearest folder with one, else "".

    Any word tells it, and train counts last (train_dev): a test file that is taken for training is
    worse than the reverse.

    Examples: eng.testa, wnut17train.conll, dev-v2.0.json, testset.csv, val-shards/000.tar.
    """
    for part in reversed(name.split("/")):
        if splits := splits_in(part):
            return next((split for split in splits if split != "train"), "train")
    return ""


def splits_in(name: str) -> list[str]:
    """Return the split of each word of a file's name that means one."""
    words = [word.removesuffix("set") for word in re.split(r"[^a-z]+", name.lower())]
    return [SPLITS[word] for word in words if word in SPLITS]


def without_splits(name: str) -> str:
    """Return a file's name without the words that mean a split: ``imdb_.csv`` of imdb_test.csv."""

    def kept(word: re.Match[str]) -> str:
        return "" if word[0].removesuffix("set") in SPLITS else word[0]

    return re.sub("[a-z]+", kept, name.lower())


def split_of_file(name: str) -> str:
    """Return the split of a file by `split_of`, train where that finds none.

    Raises ValueError for a name that may mean validation or test (eval, holdout).
    """
    for part in reversed(name.split("/")):
        if split := split_of(part):
            return split
        if HELD_OUT.search(part.lower()):
            raise ValueError(
                f"{name}: are its rows for validation or for test? Put one of these words into "
                f"the name {part}, or, where the importer has it, give --set split=validation or "
                "split=test"
            )
    return "train"


def kind_of_files(names: Iterable[str]) -> str:
    """Return image or audio where nine of ten texts end like names of such files, else ""."""
    suffixes = [PurePosixPath(name.strip().lower()).suffix for name in names]
    for kind, known in (("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES)):
        if suffixes and sum(suffix in known for suffix in suffixes) >= 0.9 * len(suffixes):
            return kind
    return ""


def first_existing(source: str, *candidates: str) -> str | None:
    """Return the first of some names below `source` that exists."""
    return next(
        (uri for name in candidates if storage.exists(uri := storage.join(source, name))), None
    )


def read_text(uri: str) -> str:
    """Read a text file. Raises ValueError for one that is not UTF-8."""
    try:
        return storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{uri}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file"
        ) from None


def read_lines(uri: str) -> list[str]:
    """Read the non-blank lines of a text file. Raises ValueError for one that is not UTF-8."""
    return [line.strip() for line in read_text(uri).splitlines() if line.strip()]


def check_no_empty_classes(names: Iterable[str], source: str) -> None:
    """Raise ValueError if there are class folders without images: labels without rows."""
    names = sorted(names)
    if names:
        raise ValueError(
            f"{source}: class folders without images: {first_few(names)}; fill or remove them"
        )


def check_columns(place: str, names: Collection[str], *wanted: tuple[str, str]) -> None:
    """Raise ValueError for the first column that a table lacks.

    Args:
        place: where the table is, for the error.
        names: of the columns that are there.
        wanted: option and the column that it names, "" for none.
    """
    for option, name in wanted:
        if name and name not in names:
            raise ValueError(
                f"{place}: no column {name!r} for --set {option}; {registry.nearest(name, names)}"
            )


def check_one_split(options: Any) -> None:
    """Raise ValueError where both one split for all rows and a column of splits are given."""
    if options.split and options.split_column:
        raise ValueError(
            f"--set split={options.split}: --set split_column={options.split_column} gives each "
            "row its own; say one of them"
        )


def depth(name: str) -> int:
    return len(PurePosixPath(name).parts)


def options_of(name: str, pairs: list[str]) -> Any:
    """Parse an importer's options from `key=value` texts.

    Where it has an option `options`, that takes the keys that the importer does not know. Raises
    ValueError with the nearest key for a wrong one.
    """
    kind = registry.entry("importer", name).options
    given: dict[str, object] = {}
    of_task: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(
                f"--set {pair}: write KEY=VALUE; options of {name}: "
                f"{', '.join(kind.model_fields) or 'none'}"
            )
        if key == "options" and key in kind.model_fields:
            raise ValueError(
                f"--set {pair}: give the options of the task by their own names, such as --set "
                f"exclude=none; see onetomany prepare {name} --list"
            )
        if key not in kind.model_fields and "options" in kind.model_fields:
            of_task[key] = value
            given["options"] = of_task
            continue
        if key not in kind.model_fields:
            raise ValueError(
                f"--set {pair}: importer {name} has no option {key!r}; "
                f"{registry.nearest(key, kind.model_fields)}"
            )
        given[key] = value
    return validated(kind, given)


def validated(kind: type[Options], given: Mapping[str, object]) -> Any:
    """Make options of the values of `--set`. Raises ValueError for the first wrong one."""
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        first, message = error.errors()[0], registry.message_of(error)
        # what concerns several options has no place
        given_as = f" {first['loc'][0]}={first['input']}" if first["loc"] else ""
        raise ValueError(f"--set{given_as}: {message[:1].lower()}{message[1:]}") from None


def describe(name: str | None) -> str:
    """Describe what an importer reads, its columns and options, or list all importers.

    Raises ValueError for an unknown name.
    """
    if name is None:
        found = registry.entries("importer")
        lines = [
            f"{one:<16}{listing.first_sentence(entry)}" for one, entry in sorted(found.items())
        ]
        return "\n".join(
            [*lines, "", "onetomany prepare NAME --list explains one, with its options."]
        )
    entry = registry.entry("importer", name)
    out = [name, listing.explanation(entry), "", *_options(entry)]
    if name == "cohort":
        for task, definition in sorted(registry.entries("cohort").items()):
            text = textwrap.fill(listing.first_sentence(definition), 96)
            out += ["", f"With --set task={task}:", textwrap.indent(text, "  "), ""]
            out += _options(definition)
    return "\n".join(out).rstrip()


def _options(entry: registry.Entry) -> list[str]:
    """Return lines that explain the options of an importer, or of a task of ``prepare cohort``."""
    out: list[str] = []
    for key, info in entry.options.model_fields.items():
        if key == "options":  # those of a cohort's task, which are explained one by one
            continue
        default = str(info.default).lower() if isinstance(info.default, bool) else info.default
        description = textwrap.fill(info.description or "", 92)
        out += [f"  --set {key}={default}", textwrap.indent(description, "      ")]
    return out
