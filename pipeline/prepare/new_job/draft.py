"""Choose what a first job does with some data: task, label, splits, sizes; with the reasons."""

from __future__ import annotations

import math
import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.config import registry
from pipeline.config.schema import Data
from pipeline.data import manifests, to_parquet
from pipeline.data.manifests import Selection, value_text
from pipeline.prepare.engine.importing import SPLITS, first_few
from pipeline.prepare.engine.value_types import ValueType
from pipeline.prepare.new_job import columns as guesses
from pipeline.prepare.new_job.columns import Column
from pipeline.prepare.new_job.inspection import (
    IN_FOLDERS,
    Inspection,
    Media,
    media_of,
    series_steps,
)
from pipeline.prepare.readers.dialect import type_of_field

SEEDS, MAX_ROWS = 20, 100_000
"""So many seeds of the splits are tried, with more rows only the first."""
FEW_ROWS = 500
"""With fewer rows larger shares are held out: twenty test rows are the least for a verdict."""
RARE, RARE_PREPARED = 3, 5
"""A class with fewer rows cannot stand in three splits; the second where splits are not known yet.
"""
LENGTHS = (32, 64, 128, 256)
SIZES = (32, 48, 64, 96)
BATCHES = (8, 16, 32, 64)
PATCHES, MAX_STEPS = (16, 8, 4, 2), 1024
"""Steps of a patch of a series, and of a row at most."""
TOKENS_PER_WORD, LETTERS_PER_TOKEN = 1.5, 4
MIN_NUMBERS = 4
"""A text column without a telling name is no input beside so many columns of numbers."""
SECONDS = {"seconds", "duration_s", "duration_seconds"}
ELSEWHERE = (
    ({"boxes", "bbox", "bboxes"}, "boxes", "detection", "jobs/vision/detection_small.yaml"),
    ({"mask", "segmentation"}, "masks", "segmentation", "jobs/vision/segmentation_small.yaml"),
    (
        {"times", "events"},
        "events",
        "records of events",
        "jobs/healthcare/physionet2012_small.yaml",
    ),
    ({"answer", "answers"}, "answers", "question answering", "jobs/text/qa_small.yaml"),
    (
        {"spans", "entities"},
        "spans",
        "tagging, which reads the words of a text and a tag for each (make both of the spans)",
        "jobs/text/ner_small.yaml",
    ),
    ({"actions"}, "actions", "behaviour cloning", "jobs/robotics/wall_following_small.yaml"),
)
"""Columns of tasks that a first job is not written for, and a job that shows how."""


@dataclass
class Draft:
    """A job for some data.

    Attributes:
        found: what the files hold.
        modality: text, image, audio, series or table.
        inputs: role to column of what the backbone reads.
        objective: classification, regression, multilabel, tagging or ctc.
        labels: role to column of what it learns.
        counts: rows of each class, or of each label of a set.
        counts_by_name: the same by the names of the classes, where they have some.
        numbers: quantiles 5 %, 50 % and 95 % of the label, where numbers are estimated.
        unlabelled_rows: rows without such a number.
        others: other columns that could be the label.
        media: a sample of the images or recordings.
        steps_of_series: 95 % of the series have at most this many steps.
        kept_classes: those to keep, where some rows have none or a rare one.
        fields: of data: split_column, group, validation_fraction and so on.
        reasons: a sentence for each field of the job, by its name.
        notes: sentences for the header: what was found and what was not used.
        prepare: the command that converts the files first, or "".
        prepare_command_for_new_rows: the one for rows without a label.
        prepared_new: the folder that it writes.
        label_copies: columns of a table that determine the label.
        categories: columns of a table that are texts or codes.
        prepared: the folder that `prepare` writes.
        train_rows: about how many rows are trained on.
    """

    found: Inspection
    modality: str
    inputs: dict[str, str]
    objective: str = "classification"
    labels: dict[str, str] = field(default_factory=dict[str, str])
    counts: dict[Any, int] = field(default_factory=dict[Any, int])
    counts_by_name: dict[Any, int] = field(default_factory=dict[Any, int])
    numbers: tuple[float, ...] = ()
    unlabelled_rows: int = 0
    others: list[str] = field(default_factory=list[str])
    media: Media | None = None
    steps_of_series: int = 0
    kept_classes: list[Any] = field(default_factory=list[Any])
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    notes: list[str] = field(default_factory=list[str])
    prepare: str = ""
    prepare_command_for_new_rows: str = ""
    prepared_new: str = ""
    label_copies: list[str] = field(default_factory=list[str])
    categories: list[str] = field(default_factory=list[str])
    prepared: str = ""
    train_rows: int = 0

    @property
    def label(self) -> str:
        """The column that is predicted."""
        return next(iter(self.labels.values()))

    @property
    def options(self) -> dict[str, float]:
        """Options of the modality that suit these rows."""
        if self.modality == "text":
            return {"length": self.length}
        if self.modality == "image":
            return {"size": self.size, "channels": 1 if self.media and self.media.grey else 3}
        if self.modality == "audio" and self.media is not None:
            slow = float(np.median(self.media.rates)) <= 8000
            longest = max(self.media.seconds)
            more = {"max_seconds": float(math.ceil(1.2 * longest))} if longest > 40 else {}
            return {"rate": 8000 if slow else 16000, **more}
        if self.modality == "series":
            patches = min(self.steps_of_series, MAX_STEPS) / self.patch
            return {"length": self.patch * max(2, math.ceil(patches))}
        return {}

    @property
    def patch(self) -> int:
        """Steps of a patch of a series: at least eight patches a row, where there are as many."""
        return next((one for one in PATCHES if 8 * one <= self.steps_of_series), PATCHES[-1])

    @property
    def length(self) -> int:
        """Tokens of a row: enough for most texts."""
        return next((one for one in LENGTHS if one >= self.tokens), LENGTHS[-1])

    @property
    def tokens(self) -> float:
        """About how many tokens 95 % of the texts have at most."""
        values = [
            " ".join(map(str, value)) if isinstance(value, list) else value
            for name in self.inputs.values()
            for value in self.found.table[name].to_pylist()
            if value
        ]
        counts = [max(TOKENS_PER_WORD * len(v.split()), len(v) / LETTERS_PER_TOKEN) for v in values]
        return 2 + len(self.inputs) * float(np.quantile(counts, 0.95))

    @property
    def size(self) -> int:
        """Pixels a side: those of the images, as far as a laptop can."""
        sides = self.media.sides if self.media else ()
        side = float(np.median(sides)) if sides else SIZES[-1]
        return max((one for one in SIZES if one <= side), default=SIZES[0])

    @property
    def batch(self) -> int:
        """Rows a step: about a tenth of the training rows, from 8 to 64."""
        found = max((one for one in BATCHES if one <= self.train_rows / 8), default=BATCHES[0])
        return min(found, self.train_rows)

    @property
    def packed_batch(self) -> int:
        """Rows a step of texts that are packed: at most half of them, with a third of `tokens`."""
        rows = self.train_rows * self.tokens / 3 / self.length
        return min(self.batch, 1 << max(0, int(math.log2(max(1.0, rows / 2)))))

    @property
    def steps(self) -> int:
        """Steps of a fine-tune: eight passes, from 40 to 200."""
        return int(np.clip(round(8 * self.train_rows / self.batch, -1), 40, 200))

    def data(self, places: dict[str, list[str]], seed: int = 0) -> Data:
        """Return the rows of the target, read from some places."""
        given: dict[str, Any] = {**places, "format": self.found.kind, "identity": "stat"}
        if self.kept_classes:
            given["where"] = {self.label: self.kept_classes}
        return Data.model_validate(
            {
                **given,
                **self.fields,
                **({"split_seed": seed} if seed else {}),
                "modality": self.modality,
                "columns": {**self.inputs, **self.labels},
            }
        )


def draft_job(
    found: Inspection,
    target_column: str | None,
    output: str,
    scratch: str,
    objective: str | None = None,
) -> Draft:
    """Choose what a job for some files does.

    Args:
        target_column: the label, where the user names it.
        output: the folder of the job file, below which prepared data would lie.
        scratch: a folder for conversions.
        objective: classification or regression, where the user says what to learn of the label;
            None: what its values look like.

    Raises:
        ValueError: nothing can be the label, or the column that was named cannot.
    """
    _check_named(found, target_column)
    draft = _input(found, target_column)
    _check_objective(draft, target_column, objective)
    draft.notes += found.notes
    splits = _split_column(draft)
    _label(draft, target_column, objective, splits)
    _check_header(draft)
    _leave_out_unlabelled(draft)
    _count(draft)
    _note_other_columns(draft, splits)
    _prepare(draft, output, splits)
    _split(draft, splits, scratch)
    return draft


# ---------------------------------------------------------------- input and label


def _check_named(found: Inspection, name: str | None) -> None:
    names = [column.name for column in found.columns]
    if name is not None and name not in names:
        raise ValueError(f"--target-column {name}: {registry.nearest(name, names)}")


def _check_objective(draft: Draft, target_column: str | None, objective: str | None) -> None:
    """Raise ValueError for an objective that cannot be chosen, or without a label."""
    if objective is None:
        return
    if objective not in ("classification", "regression"):
        raise ValueError(
            f"--objective {objective}: choose classification or regression; other objectives "
            "follow from the columns"
        )
    if target_column is None:
        raise ValueError(f"--objective {objective}: name its column with --target-column")
    if draft.objective == "tagging":
        raise ValueError(
            f"--objective {objective}: {target_column} has a tag for each word; leave --objective "
            "out"
        )


def _input(found: Inspection, target_column: str | None) -> Draft:
    """Return a draft that says what the backbone reads."""
    free = [column for column in found.columns if column.name != target_column]
    media = media_of(found)
    if media is not None:
        inputs = {media.what: media.column}
        if media.what == "audio":
            inputs |= {"start": "start"} if found.kind == "audio" else {}
            seconds = [one.name for one in found.columns if one.name.lower() in SECONDS]
            inputs |= {"seconds": seconds[0]} if seconds else {}
        return Draft(found, media.what, inputs, media=media)
    tags = guesses.tag_columns(found.table, free)
    if tags is not None and target_column in (None, tags[1]):
        return Draft(found, "text", {"text": tags[0]}, "tagging", {"tags": tags[1]})
    texts = guesses.text_columns(free)
    named = bool(texts) and bool(texts[0].parts & set(guesses.TEXTS))
    series = guesses.series_columns(found.main.schema, free, named)
    if series and not _other_task(found):
        steps = series_steps(found.main, series[0])
        inputs = {"series": series[0]}
        # the time between two steps, as `prepare series` writes it, and no number of a step
        if any(one.name == "step" and pa.types.is_floating(one.type) for one in found.main.schema):
            inputs |= {"step": "step"}
        return Draft(found, "series", inputs, steps_of_series=steps)
    struct = next((one for one in found.columns if one.name == "features"), None)
    if struct is not None and struct.kind == "other":
        return Draft(found, "table", {"features": "features"})
    numbers = [column for column in free if column.kind in ("whole", "number")]
    if texts and (named or len(numbers) < MIN_NUMBERS):
        pair = guesses.pair_of(texts[0], free)
        more = {"text_pair": pair.name} if pair else {}
        passed = [one.name for one in texts[1:] if one is not pair]
        draft = Draft(found, "text", {"text": texts[0].name, **more})
        if passed:
            draft.reasons["text"] = f"also texts: {', '.join(passed)}"
        return draft
    return Draft(found, "table", {"features": "features"})


def _split_column(draft: Draft) -> Column | None:
    """Return the column of each row's split, counted in all rows, or None.

    Of several it is one that no group crosses. A note tells of rows in no split.
    """
    if "uri" not in draft.found.places:
        return None
    listed = guesses.split_columns(draft.found.columns)
    groups = guesses.group_columns(draft.found.columns)
    chosen = min(
        listed,
        key=lambda one: bool(groups) and bool(_crossing(draft.found, one.name, groups[0].name)),
        default=None,
    )
    if chosen is None:
        return None
    values = [value for value in draft.found.whole(chosen.name) if value and value.strip()]
    counts = dict(Counter(values).most_common())
    known = {value: n for value, n in counts.items() if value.strip().lower() in SPLITS}
    odd = {value: n for value, n in counts.items() if value not in known}
    if odd:
        draft.notes.append(
            f"rows in no split, by their {chosen.name}: {guesses.describe_counts(odd)}"
        )
    return replace(chosen, present=len(values), counts=known)


def _crossing(found: Inspection, split: str, group: str) -> int:
    """Return how many values of a group stand in several splits."""
    seen: dict[Any, set[str]] = {}
    for value, part in zip(found.whole(group), found.whole(split), strict=True):
        name = SPLITS.get(str(part).strip().lower())
        if value is not None and name is not None:
            seen.setdefault(value, set()).add(name)
    return sum(len(parts) > 1 for parts in seen.values())


def _label(
    draft: Draft,
    target_column: str | None,
    objective: str | None,
    splits: Column | None,
) -> None:
    """Set objective and label.

    Raises:
        ValueError: there is none.
    """
    found = draft.found
    if draft.objective == "tagging":
        return
    used = {*draft.inputs.values(), *(one.name for one in guesses.split_columns(found.columns))}
    free = [column for column in found.columns if column.name not in used]
    groups = {column.name for column in guesses.group_columns(free)}
    ids = set(guesses.id_columns(free))
    listed = guesses.label_columns([one for one in free if one.name not in groups | ids])
    sets = guesses.label_set_columns(found.table, free)
    spoken = [one for one in free if one.name.lower() in guesses.TRANSCRIPTS and one.kind == "text"]
    numbers = guesses.number_columns([one for one in free if one.name not in groups | ids])
    has_named_number = bool(numbers) and guesses.is_named_number(numbers[0])
    if target_column is not None:
        chosen = found.column(target_column)
        if objective is None and target_column in sets:
            draft.objective, draft.labels = "multilabel", {"labels": target_column}
        elif objective is None and _is_transcript(draft, chosen, spoken):
            draft.objective, draft.labels = "ctc", {"transcript": target_column}
        elif objective == "regression" or (objective is None and guesses.is_estimated(chosen)):
            _check_number(chosen)
            draft.objective, draft.labels = "regression", {"value": target_column}
        else:
            _check_label(chosen)
            draft.labels = {"label": target_column}
    elif (
        draft.modality == "audio" and spoken and not (listed and guesses.is_named_label(listed[0]))
    ):
        draft.objective, draft.labels = "ctc", {"transcript": spoken[0].name}
    elif has_named_number and not _has_likelier_label(listed, free):
        draft.objective, draft.labels = "regression", {"value": numbers[0].name}
    elif listed and not guesses.is_likely_label(listed[0]) and (other := _other_task(found)):
        raise ValueError(other)
    elif listed:
        draft.labels = {"label": listed[0].name}
    elif sets:
        draft.objective, draft.labels = "multilabel", {"labels": sets[0]}
    elif groups and (again := guesses.label_columns([one for one in free if one.name in groups])):
        draft.labels = {"label": again[0].name}
    elif numbers and not _other_task(found):
        draft.objective, draft.labels = "regression", {"value": numbers[0].name}
    else:
        raise ValueError(_other_task(found) or _no_label(draft, free))
    copies = (
        guesses.label_copies(found.table, draft.label, listed) if "label" in draft.labels else []
    )
    named = [one for one in copies if found.column(one).kind == "text" and "name" in one.lower()]
    if named and found.column(draft.label).kind == "whole" and _is_read_without_conversion(draft):
        draft.labels["label_name"] = named[0]
    grouped = guesses.label_columns([one for one in free if one.name in groups])
    possible = [*listed, *(one for one in grouped if one.distinct <= guesses.MAX_GROUPS)]
    named_numbers = [one for one in numbers if guesses.is_named_number(one)]
    names = [one.name for one in (*possible, *named_numbers)]
    taken = {draft.label, *copies, *draft.inputs.values()}
    listed_names = [*names, *sets, *(one.name for one in spoken)]
    draft.others = [name for name in listed_names if name not in taken]


def _is_transcript(draft: Draft, column: Column, spoken: Sequence[Column]) -> bool:
    return draft.modality == "audio" and column in spoken and not guesses.can_be_label(column)


def _has_likelier_label(listed: Sequence[Column], free: Sequence[Column]) -> bool:
    """Tell whether a label of classes is likelier than a number with a telling name.

    It is if it has a telling name, too (a price may be a feature), or two classes and the last
    place.
    """
    if not listed:
        return False
    last = free[-1]
    has_two_classes_last = last in listed and last.distinct == 2 and guesses.is_likely_label(last)
    return guesses.is_named_label(listed[0]) or has_two_classes_last


def _check_number(column: Column) -> None:
    """Raise ValueError where no numbers can be estimated from the column that was named."""
    if not guesses.holds_numbers(column):
        raise ValueError(
            f"--target-column {column.name}: it is {column.describe()}: regression estimates "
            "numbers that differ; take --objective classification for classes"
        )


def _check_label(column: Column) -> None:
    """Raise ValueError where the column that was named as the label cannot be one."""
    if guesses.holds_classes(column):
        return
    if column.distinct < 2:
        reason = f"it has {column.distinct} value in {column.rows} rows, and a label has two"
    else:
        reason = (
            f"it is {column.describe()}: a label has 2 to {guesses.MAX_CLASSES} values, each in "
            "several rows"
        )
    raise ValueError(f"--target-column {column.name}: {reason}")


def _other_task(found: Inspection) -> str:
    """Return the message for data of a task that has no classes of rows, or ""."""
    names = {word for column in found.columns for word in column.parts}
    for words, what, task, job in ELSEWHERE:
        if names & words:
            return (
                f"{', '.join(found.all_places)}: there are columns of {what}, and no "
                f"column of classes: this is {task}; write its job after {job}, or name a label "
                "with --target-column"
            )
    return ""


def _no_label(draft: Draft, free: Sequence[Column]) -> str:
    """Return the message where nothing can be the label."""
    place = ", ".join(draft.found.all_places)
    held = ", ".join(column.describe() for column in free) or "no column beside the input"
    if draft.found.kind in IN_FOLDERS:
        return (
            f"{place}: all files are of one class ({held}): a label has at least two; give the "
            "folder that holds the folders of all classes"
        )
    without_labels = {
        "text": "; texts without labels are for a source (objective mlm), as in "
        "jobs/text/bert_small.yaml",
        "series": "; series without labels are for a source (objective masked_series), as "
        "jobs/data.md says",
    }
    more = "" if draft.modality == "text" and free else without_labels.get(draft.modality, "")
    return (
        f"{place}: nothing can be the label: {held}{more}. A label has 2 to "
        f"{guesses.MAX_CLASSES} values, each in several rows: add such a column, or name one with "
        "--target-column"
    )


def _check_header(draft: Draft) -> None:
    """Raise ValueError for a CSV file whose first line is a row."""
    column = draft.found.column(draft.label)
    if draft.found.kind == "csv" and column.name in map(str, column.counts):
        raise ValueError(
            f"{draft.found.all_places[0]}: its first line seems to be a row, since {column.name!r} "
            "stands below it too: write a line with the names of the columns above it"
        )


def _leave_out_unlabelled(draft: Draft) -> None:
    """Leave out files of a split that have no label, such as those of a competition's test rows."""
    found = draft.found
    for split, manifest in list(found.manifests.items()):
        if draft.label in manifest.schema.names:
            continue
        files = found.places.pop(split)
        found.manifests.pop(split)
        draft.notes.append(
            f"{', '.join(files)}: no column {draft.label}, so it is left out; predict it later"
        )
    if list(found.places) == ["train"]:
        found.places["uri"] = found.places.pop("train")
        found.manifests["uri"] = found.manifests.pop("train")


def _count(draft: Draft) -> None:
    """Count the rows of each class, and leave out rows without a class."""
    found, values = draft.found, draft.found.whole(draft.label)
    if draft.objective == "classification":
        counts = Counter(
            value for value in values if value is not None and value == value and value != ""
        )
        missing = len(values) - sum(counts.values())
        least = RARE if _is_read_without_conversion(draft) else RARE_PREPARED
        rare = {value: count for value, count in counts.items() if count < least}
        kept = {value: count for value, count in counts.items() if count >= least}
        if len(kept) < 2:
            raise ValueError(
                f"column {draft.label}: {len(kept)} of its {len(counts)} values stand in {least} "
                "rows or more, and a label has at least two such values"
            )
        draft.counts = dict(sorted(kept.items(), key=lambda one: -one[1]))
        if rare or missing:
            draft.kept_classes = [
                one if not isinstance(one, float) else int(one) for one in draft.counts
            ]
            reasons = [
                f"{missing} rows without a label" if missing else "",
                f"{sum(rare.values())} rows of {len(rare)} classes with fewer than {least} rows "
                f"({first_few(map(str, rare))})"
                if rare
                else "",
            ]
            draft.reasons["where"] = f"left out: {' and '.join(filter(None, reasons))}"
        if "label_name" in draft.labels:
            names = dict(zip(values, found.whole(draft.labels["label_name"]), strict=True))
            draft.counts_by_name = {names[value]: count for value, count in draft.counts.items()}
    elif draft.objective == "regression":
        numbers = np.array([math.nan if one is None else one for one in values], dtype=float)
        is_number = np.isfinite(numbers)
        draft.unlabelled_rows = int((~is_number).sum())
        draft.numbers = tuple(np.quantile(numbers[is_number], [0.05, 0.5, 0.95]).tolist())
        if draft.unlabelled_rows and _is_read_without_conversion(draft):
            # of a small split the share may be a few times that of all rows
            share = draft.unlabelled_rows / len(values)
            draft.fields["max_bad_rows"] = min(1.0, math.ceil(300 * share + 10) / 100)
            draft.reasons["max_bad_rows"] = (
                f"share of the rows that may be unusable: {draft.unlabelled_rows} have no "
                f"{draft.label}"
            )
    elif draft.objective in ("multilabel", "tagging"):
        draft.counts = dict(Counter(label for row in values for label in row or ()).most_common())


def _is_read_without_conversion(draft: Draft) -> bool:
    """Tell whether a job reads the files as they are."""
    is_raw_table = draft.modality == "table" and "features" not in {
        column.name for column in draft.found.columns if column.kind == "other"
    }
    return not (is_raw_table or draft.found.delimiter or (draft.media and draft.media.root))


def _note_other_columns(draft: Draft, splits: Column | None) -> None:
    if draft.modality == "table" or draft.found.kind in IN_FOLDERS:
        return
    used = {*draft.inputs.values(), *draft.labels.values()}
    if splits is not None:
        used.add(splits.name)
    rest = [column.name for column in draft.found.columns if column.name not in used]
    if rest:
        draft.notes.append(f"columns that are not read: {', '.join(rest)}")


# ---------------------------------------------------------------- prepare


def _prepare(draft: Draft, output: str, splits: Column | None) -> None:
    """Set the command that converts the files, where a job cannot read them as they are."""
    if _is_read_without_conversion(draft):
        return
    found = draft.found
    places = found.all_places
    source = places[0] if len(places) == 1 else posixpath.commonpath(places)
    stem = job_name(source)
    draft.prepared = Path(output, "prepared", stem).as_posix()
    pairs: dict[str, str] = {}
    settings: list[str] = []
    if draft.modality == "table":
        name, pairs = "table", _table_options(draft)
        labelled = sum(draft.counts.values())
        if draft.objective == "regression":
            labelled = found.rows - draft.unlabelled_rows
        dropped = found.main.num_rows and 1 - labelled / found.rows
        missing = found.column(draft.label).present < found.column(draft.label).rows
        settings += [f"--max-bad {math.ceil(100 * dropped) / 100:g}"] if missing else []
    elif draft.media is not None:
        name, pairs = "files", {"column": draft.media.column, "label": draft.label}
        listed = [file for file, _ in to_parquet.expand(places, found.kind)]
        source, places = listed[0], listed
        draft.prepared = Path(output, "prepared", job_name(source)).as_posix()
        beside = posixpath.dirname(source) or "."
        pairs |= {} if draft.media.root == beside else {"root": draft.media.root}
        if draft.media.what == "image" and min(draft.media.sides) > 256:
            settings.append("--resize 256")
        if draft.media.missing:
            settings.append(f"--max-bad {draft.media.missing_share:g}")
        draft.inputs = {draft.media.what: draft.media.what}
        draft.inputs |= {"seconds": "seconds"} if draft.media.what == "audio" else {}
    else:
        name = "csv"
        renamed = [n for n in (*draft.inputs.values(), *draft.labels.values()) if n == "split"]
        assert not renamed, "a split column is no input and no label"
    if len(places) > 1 and (draft.media is not None or "uri" in found.places):
        raise ValueError(
            f"{', '.join(places)}: these files are converted first, by a command that takes one "
            "place: join them into one table, or give the folder that holds them alone"
        )
    if found.delimiter:
        pairs["delimiter"] = "tab" if found.delimiter == "\t" else found.delimiter
    if splits is not None:
        pairs["split_column"] = splits.name
    draft.prepare = _command(name, source, draft.prepared, pairs, settings)
    new = {key: value for key, value in pairs.items() if key not in ("label", "group")}
    new.pop("split_column", None)
    kept = [one for one in new.pop("drop", "").split(",") if one and one not in draft.label_copies]
    new |= {"drop": ",".join(kept)} if kept else {}
    # a column of few new rows may be empty, or hold numbers alone; the list is cut at commas
    named = [name for name in draft.categories if "," not in name]
    new |= {"categorical": ",".join(named)} if named else {}
    suffix = "".join(PurePosixPath(source).suffixes[-1:]) or f".{found.kind}"
    draft.prepared_new = f"{draft.prepared}_new"
    resized = [one for one in settings if "resize" in one]
    draft.prepare_command_for_new_rows = _command(
        name, f"new{suffix}", draft.prepared_new, new, resized
    )


def _holds_texts(column: Column) -> bool:
    """Tell whether the importer `table` takes a column for a category, by its values."""
    missing = registry.get("importer", "table").options_class().missing.split(",")
    values = (str(value).strip() for value in column.counts)
    return any(type_of_field(value) == ValueType.STRING for value in values if value not in missing)


def _command(
    name: str,
    source: str,
    output: str,
    pairs: dict[str, str],
    settings: Sequence[str],
) -> str:
    """Return a command that converts files."""
    words = ["onetomany", "prepare", name, shlex.quote(source), "-o", shlex.quote(output)]
    words += [f"--set {shlex.quote(f'{key}={value}')}" for key, value in pairs.items()]
    return " ".join([*words, *settings])


def _table_options(draft: Draft) -> dict[str, str]:
    """Return the options of the importer `table`: label, id, group, and what is no feature."""
    found = draft.found
    if "" in {column.name for column in found.columns}:
        raise ValueError(
            f"{found.all_places[0]}: a column has no name (pandas writes its index "
            "so): write the table without it (index=False), or name it"
        )
    free = [column for column in found.columns if column.name != draft.label]
    ids = guesses.id_columns(free)
    groups = [one.name for one in guesses.group_columns(free)]
    # each of two columns of numbers determines the other, where no value occurs twice
    is_class = draft.objective != "regression"
    copies = guesses.label_copies(found.table, draft.label, free) if is_class else []
    draft.label_copies = copies = [name for name in copies if name not in groups]
    splits = {one.name for one in guesses.split_columns(found.columns)}
    long_texts = [
        column.name
        for column in free
        if column.kind in guesses.NO_VALUES
        or (column.kind == "text" and column.distinct > guesses.MAX_CLASSES)
    ]
    options = {"label": draft.label}
    if ids:
        options["id"] = ids[0]
    if groups:
        options["group"] = groups[0]
    dropped = [
        name
        for name in dict.fromkeys([*ids[1:], *copies, *long_texts, *groups[1:]])
        if name not in splits and name not in options.values()
    ]
    no_features = {*dropped, *options.values(), *splits}
    features = [column for column in found.columns if column.name not in no_features]
    if not features:
        raise ValueError(
            f"{found.all_places[0]}: no column is left for the features beside the "
            f"label {draft.label}"
        )
    if dropped:
        options["drop"] = ",".join(dropped)
    _note_dropped(draft, dropped)
    categories = _note_features(draft, features)
    codes = [column.name for column in features if _is_coded(column)]
    draft.categories = [*codes, *(name for name in categories if _holds_texts(found.column(name)))]
    if codes:
        options["categorical"] = ",".join(codes)
    return options


def _note_dropped(draft: Draft, dropped: Sequence[str]) -> None:
    """Note which columns are dropped, and why."""
    draft.notes += [
        f"{name} has another name for each value of {draft.label}: it would tell the label, and is "
        "dropped"
        for name in draft.label_copies
    ]
    names = [name for name in dropped if name not in draft.label_copies]
    unreadable = [name for name in names if draft.found.column(name).kind in guesses.NO_VALUES]
    draft.notes += [
        f"dropped, as they {why}: {', '.join(which)}"
        for why, which in (
            ("are neither numbers nor categories", unreadable),
            ("name rows or groups", [name for name in names if name not in unreadable]),
        )
        if which
    ]


def _note_features(draft: Draft, features: Sequence[Column]) -> list[str]:
    """Note which features are numbers and which are categories, and return the categories."""
    numbers = [column.name for column in features if column.kind in ("whole", "number")]
    categories = [column.name for column in features if column.name not in numbers]
    draft.notes += [
        f"{len(names)} features of {what}: {first_few(names)}"
        for what, names in (("numbers", numbers), ("categories", categories))
        if names
    ]
    return categories


def _is_coded(column: Column) -> bool:
    """Return whether the whole numbers of a column are codes of categories, by its name."""
    is_named_so = column.name.lower().endswith(("type", "code"))
    return column.kind == "whole" and 2 < column.distinct <= 10 and is_named_so


# ---------------------------------------------------------------- splits


def _split(draft: Draft, splits: Column | None, scratch: str) -> None:
    """Set where training, validation and test rows come from, and what must not cross."""
    found = draft.found
    few = found.rows < FEW_ROWS
    test, validation = (0.3, 0.2) if few else (0.2, 0.1)
    group = next(iter(_groups(draft)), "")
    have: set[str] = set(found.places) - {"uri"}
    if splits is not None:
        have = {SPLITS[value.strip().lower()] for value in splits.counts}
        crossing = _crossing(found, splits.name, group) if group else 0
        draft.fields["split_column"] = (
            splits.name if _is_read_without_conversion(draft) else "split"
        )
        shown = guesses.describe_counts(splits.counts)
        draft.reasons["split_column"] = f"the split that the data come with: {shown}"
        if _is_read_without_conversion(draft):
            _split_values(draft, splits)
        if group and crossing:
            draft.reasons["split_column"] += (
                f". {crossing} values of {group} stand in several of these splits, so test rows "
                f"are of a {group} that was trained on: leave split_column out and say group: "
                f"{group} to test on others"
            )
            group = ""
    elif "uri" not in found.places and not _is_read_without_conversion(draft):
        draft.fields["split_column"] = "split"
        draft.reasons["split_column"] = "prepare writes it, from the names of the files"
    if splits is None and group and "uri" not in found.places and _crosses_files(found, group):
        draft.reasons["files"] = f"values of {group} stand in several of these files"
        group = ""
    if "validation" not in have:
        draft.fields["validation_fraction"] = validation
        draft.reasons["validation_fraction"] = (
            "share of the training rows to choose the best weights and settings by"
        )
    if "test" not in have:
        draft.fields["test_fraction"] = test
        draft.reasons["test_fraction"] = "share of the rows that is only tested on"
        if few:
            draft.reasons["test_fraction"] += ": large, as a verdict needs enough test rows"
    if group:
        draft.fields["group"] = group
        draft.reasons["group"] = f"all rows of one {group} stay in one split"
    if draft.media is not None and draft.media.missing and _is_read_without_conversion(draft):
        least = draft.fields.get("max_bad_rows", 0.0)
        draft.fields["max_bad_rows"] = max(least, draft.media.missing_share)
        why = draft.reasons.get("max_bad_rows")
        files = "share of the rows whose file may be missing or broken"
        draft.reasons["max_bad_rows"] = f"{why}; files may be missing" if why else files
    held = sum(value for key, value in draft.fields.items() if key.endswith("_fraction"))
    rows = found.main.num_rows if splits is None else found.rows * _train_share(splits)
    draft.train_rows = max(1, round(rows * (1 - held)))
    if _is_read_without_conversion(draft):
        _choose_seed(draft, scratch)
    _note_other_groups(draft)
    _name_as_prepared(draft)


def _name_as_prepared(draft: Draft) -> None:
    """Name label and group as the importer `files` does, where it converts the files."""
    if draft.media is None or _is_read_without_conversion(draft):
        return
    from pipeline.prepare.importers.files import column_name  # here: it needs the media libraries

    what = draft.media.what
    draft.labels = {role: column_name(name, what) for role, name in draft.labels.items()}
    if "group" in draft.fields:
        draft.fields["group"] = column_name(draft.fields["group"], what)


def _train_share(splits: Column) -> float:
    train = sum(
        count for value, count in splits.counts.items() if SPLITS[value.strip().lower()] == "train"
    )
    return train / max(1, splits.present)


def _groups(draft: Draft) -> list[str]:
    """Return the columns whose rows belong together, the one to take first."""
    taken = {*draft.labels.values(), *draft.inputs.values()}
    if draft.found.kind == "audio":
        # pieces of one long recording
        pieces = draft.found.column("recording")
        return ["recording"] if pieces.distinct < pieces.present else []
    return [
        column.name
        for column in guesses.group_columns(draft.found.columns)
        if column.name not in taken
        and all(column.name in rows.schema.names for rows in draft.found.manifests.values())
    ]


def _note_other_groups(draft: Draft) -> None:
    """Name the groups that the chosen one does not keep together."""
    group, groups = draft.fields.get("group"), _groups(draft)
    if group is None:
        return
    chosen = draft.found.whole(group)
    for other in groups[groups.index(group) + 1 :]:
        values = draft.found.whole(other)
        pairs = {pair for pair in zip(values, chosen, strict=True) if pair[0] is not None}
        if len(pairs) > len({value for value, _ in pairs}):
            draft.notes.append(
                f"rows of one {other} may stand in several splits, as the group is {group}: put "
                f"{other} in its place if those belong together more"
            )


def _crosses_files(found: Inspection, group: str) -> bool:
    seen: dict[Any, str] = {}
    for name, manifest in found.manifests.items():
        for value in set(manifests.read_columns(Selection(manifest), [group])[group].to_pylist()):
            if value is not None and seen.setdefault(value, name) != name:
                return True
    return False


def _split_values(draft: Draft, splits: Column) -> None:
    """Name the values of each split, where they are not those that a job knows."""
    usual = Data.model_fields["split_values"].get_default(call_default_factory=True)
    named: dict[str, list[str]] = {}
    for value in splits.counts:
        named.setdefault(SPLITS[value.strip().lower()], []).append(value)
    if any(set(values) - set(usual[split]) for split, values in named.items()):
        draft.fields["split_values"] = named


def _choose_seed(draft: Draft, scratch: str) -> None:
    """Take the first seed by which every class stands in every split; else change the splits.

    Raises:
        ValueError: no seed gives training, validation and test rows of every class.
    """
    if not {"validation_fraction", "test_fraction"} & set(draft.fields):
        return
    best = _best_seed(draft, scratch)
    if best is None and "group" in draft.fields:
        group = draft.fields.pop("group")
        draft.reasons.pop("group")
        best = _best_seed(draft, scratch)
        draft.notes.append(
            f"group: {group} is not set, though rows of one {group} should stay in one split: with "
            f"{draft.found.column(group).distinct} of them no split has training, validation and "
            "test rows of every class"
        )
    if best is None:
        raise ValueError(
            f"{draft.found.all_places[0]}: {draft.found.rows} rows are too few to hold "
            f"out validation and test rows of every class of {draft.label}: "
            f"{guesses.describe_counts(draft.counts)}; add rows, or leave rare classes out"
        )
    if best:
        draft.fields["split_seed"] = best
        draft.reasons["split_seed"] = "the first one by which every class stands in every split"


def _best_seed(draft: Draft, scratch: str) -> int | None:
    """Return the first seed with every class in training, and best in all splits; None: no one."""
    places = draft.found.places
    fallback: int | None = None
    for seed in range(SEEDS if draft.found.rows <= MAX_ROWS else 1):
        try:
            parts = manifests.splits(
                draft.data(places, seed), tuple(draft.labels), "targets.x", scratch, True
            ).by_name()
        except ValueError:
            continue  # an empty split
        if len(parts["train"]) < BATCHES[0]:
            continue
        draft.train_rows = len(parts["train"])
        if draft.objective != "classification":
            return seed
        classes = {
            name: {
                value_text(one)
                for one in manifests.read_columns(part, [draft.label])[draft.label].to_pylist()
            }
            for name, part in parts.items()
        }
        if classes["train"] == classes["validation"] == classes["test"]:
            return seed
        if fallback is None and classes["train"] >= classes["validation"] | classes["test"]:
            fallback = seed
    return fallback


def job_name(place: str) -> str:
    """Return the name of a job for a file, folder or glob."""
    path = PurePosixPath(place.rstrip("/"))
    if path.name == to_parquet.PREPARED_MANIFEST or "*" in path.name or path.stem.lower() in SPLITS:
        path = path.parent
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.name.split(".")[0] or path.name).strip("-_.")
    return stem or "first"
