"""Logs of sensors, with one row a step, to windows of steps for modality ``series``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.config.registry import SplitOptions, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import dictionary_codes
from pipeline.prepare.engine.importing import (
    Notes,
    check_columns,
    check_one_split,
    first_few,
    split_of_folder,
)
from pipeline.prepare.engine.inputs import InputSplit, SplitReader, find_inputs, whole_files
from pipeline.prepare.engine.table_importer import (
    InferredSchema,
    Scan,
    TableImporter,
    first_invalid,
)
from pipeline.prepare.readers import logs
from pipeline.prepare.readers.archives import Opener
from pipeline.prepare.readers.csv_blocks import SUFFIXES, Column, read_schema

BLOCK_STEPS = 1 << 18
"""About how many steps of windows are made at a time."""
MICROSECONDS_PER_SECOND = 1e6
"""Times are read as microseconds."""
RATE_TOLERANCE = 0.01
"""Share of a step by which times may differ from equal ones."""
NO_NUMBER = "windows without any number, left out"
NO_LABEL = "windows without a label or value, left out"
SEVERAL = "windows with several labels or values, left out"
TOO_SHORT = "steps in no window"
INFINITE = "infinite numbers, taken as missing"
GAPS = "gaps, which no window crosses"
SAME_NAMES = "names of recordings in several files, for which all rows have FILE/NAME"
NO_SUBJECT = "recordings without a subject, whose windows no group of subjects keeps in one split"


class SeriesOptions(SplitOptions):
    channels: str = Field(
        "",
        description="columns of the sensors: x,y,z or S1..S24 or acc_*; NaN and null are missing, "
        "and so is a text that is no number (counted)",
    )
    recording: str = Field(
        "",
        description="the column that says which recording a step is of; empty: a file is one "
        "recording",
    )
    order: str = Field(
        "", description="the column of steps or times, which must ascend within a recording"
    )
    step: float = Field(
        0.0,
        ge=0,
        description="what order rises by from one step to the next one (seconds, where it holds "
        "times), so that recordings at several rates get one, not above that of the slowest. The "
        "numbers of a step are the means of its rows, label and value those of its last row. 0: "
        "each row is a step",
    )
    window: int = Field(
        128,
        ge=0,
        description="steps of a window; 0: one row for each recording, or for each part of it, "
        "where gaps or splits cut it",
    )
    stride: int = Field(
        0,
        ge=0,
        description="steps from the beginning of a window to that of the next one; 0: those of a "
        "window, so that none overlap",
    )
    gap: float = Field(
        1.5,
        ge=0,
        description="a step of order longer than this many median steps is a gap, and no window "
        "crosses it; 0: no gaps",
    )
    label: str = Field("", description="the column of classes: texts or codes")
    value: str = Field("", description="the column of numbers to estimate")
    take: Literal["last", "most", "same"] = Field(
        "last",
        description="label and value of a window. last: those of its last step; most: the most "
        "common label; same: those that all its steps share (other windows are left out)",
    )
    label_folders: bool = Field(
        False,
        description="the label is the name of the nearest folder that is no split's: walk/07.csv",
    )
    subject: str = Field(
        "", description="the column of the patient or robot that a recording is of, kept for splits"
    )
    test_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each recording's steps, from its end, that are test rows",
    )
    validation_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of each recording's steps, before the test rows, for validation",
    )


class Segment(NamedTuple):
    """Rows of a recording in one split, and the windows that are cut from them.

    Attributes:
        recording: its name.
        split: its split; "" for that of the file.
        rows: its steps.
        starts, stops: (n,) of windows, in its rows.
        subject: the patient or robot; None: not known.
    """

    recording: str
    split: str
    rows: pa.Table
    starts: np.ndarray
    stops: np.ndarray
    subject: str | None


@register("importer", "series", options=SeriesOptions)
class Series(TableImporter):
    """Logs of sensors, cut into windows.

    It reads logs with one row a step (CSV, also .gz or .zst, or Parquet; a file or a folder), and
    writes windows for modality series: --set channels=S1..S24 --set window=64 --set stride=16.

    Columns: recording, subject, start (the window's first step, counted from 0 in the recording, or
    in its part of a split), step (what --set order= rises by from one step to the next, in seconds
    where it holds times), series (a struct with a list of numbers for each channel), label, value,
    split. A job that names the step compares sampling rates: columns: {series: series, step: step}.

    - Name the recording in the job's `group` (or the subject), so that windows of one never stand
      on both sides of a split. With --set test_share= each recording is cut by time instead: no
      window crosses the cut, and each side has a name of its own.
    - A recording ends with its file. Where a name stands in several files, recordings are named
      FILE/NAME.
    - Steps are taken to be equally far apart: numbers are resampled by --set step= alone. A window
      does not cross a gap in --set order=.
    - Left out and counted: windows without a number or label, steps that fill no window.
    - Invalid: recordings whose order does not ascend, with two subjects, or at a lower rate than
      --set step=.
    - One task reads a whole file: split very large files.
    """

    def __init__(self, options: Any = None):
        super().__init__(options)
        o = self.options
        if not o.channels:
            raise ValueError(
                "--set channels= is missing: name the columns of the sensors, such as --set "
                "channels=S1..S24"
            )
        self.rules = logs.CutRules(0, o.validation_share, o.test_share)
        check_one_split(o)
        if self._shares and (o.split_column or o.split):
            raise ValueError(
                "--set split= or split_column=, and test_share= or validation_share=, both say "
                "what a step's split is; give one of them"
            )
        if o.label and o.label_folders:
            raise ValueError("--set label= and label_folders= are both labels; give one of them")
        if o.value and o.take == "most":
            raise ValueError("--set take=most is for classes; take=last or same suits a value")
        if o.stride and not o.window:
            raise ValueError("--set stride= has no effect with window=0; leave it out")
        if o.step and not o.order:
            raise ValueError("--set step= is a step of the column order; name that: --set order=")
        if 0 < o.gap <= 1:
            raise ValueError(
                f"--set gap={o.gap:g}: give more than 1 (the median step itself is no gap), or 0 "
                "for none"
            )
        self.label = "label" if o.label or o.label_folders else ""
        self.roles = logs.ColumnRoles(())

    @property
    def _shares(self) -> bool:
        return self.options.test_share + self.options.validation_share > 0

    def input_splits(self, source: str, part_bytes: int) -> tuple[list[InputSplit], str, Notes]:
        o = self.options
        listed = find_inputs(
            source, SUFFIXES, o.split or ("all" if o.split_column or self._shares else "")
        )
        files = whole_files(listed)
        with Opener() as opener:
            self.roles = self._roles(files[0], opener)
        for file in files if o.label_folders else ():
            _folder(file)
        # rows of an order have a column more than those of earlier versions
        fingerprint = f"{listed.fingerprint} step" if o.order else listed.fingerprint
        return files, fingerprint, listed.notes

    def _roles(self, input_split: InputSplit, opener: Opener) -> logs.ColumnRoles:
        """Return what the columns are, by the first file, in terms of trajectories.

        An episode is a recording, observations are channels, and the reward is the value.
        """
        o = self.options
        names = [name.strip() for name in read_schema(input_split.entry, opener).names]
        own = {
            option: getattr(o, option)
            for option in ("recording", "order", "label", "value", "subject", "split_column")
        }
        check_columns(input_split.name, names, *own.items())
        taken = set(filter(None, own.values()))
        channels = logs.named_columns(o.channels, names, "channels", input_split.name, taken)
        others = taken - {o.order, o.value}
        if twice := next((name for name in channels if name in others), ""):
            raise ValueError(
                f"--set channels={o.channels} names column {twice!r}, which another option names "
                "too; leave it out of one of them"
            )
        order = {o.order} - {""}
        types, first = logs.column_types(input_split, opener, order)
        moments = logs.holds_moments(o.order, types, first)
        return logs.ColumnRoles(
            channels,
            episode=o.recording,
            order=o.order,
            moments=moments,
            reward=o.value,
            split=o.split_column,
            noun="recording",
        )

    def _columns(self) -> dict[str, Column]:
        """Return the columns to read."""
        o = self.options
        texts = {name: Column("text") for name in (o.label, o.subject) if name}
        return {**self.roles.columns(), **texts}

    # ------------------------------------------------------------ the two passes

    def _segments(
        self,
        reading: SplitReader,
        episodes: list[logs.EpisodeRows],
        counts: Counter[str],
    ) -> Iterator[Segment]:
        """Yield the valid segments of a file; the others go to `reading.bad`."""
        is_cut = self._shares or bool(self.options.split_column)
        tables = logs.read_tables(reading.input_split, self._columns(), reading.opener, counts)
        recordings = [list(parts) for _, parts in groupby(episodes, lambda episode: episode.log)]
        whole = [ones[0]._replace(stop=ones[-1].stop) for ones in recordings]
        for ones, rows in zip(recordings, logs.read_episodes(whole, tables), strict=True):
            first = ones[0].start
            try:
                logs.check_order(rows, self.roles)
                is_faster = self._is_faster(rows)
                subject = self._subject(rows, counts)
            except logs.UnusableError as error:
                # without the recording's name, which may be a patient's
                reading.bad(f"rows {first + 1} to {ones[-1].stop}", str(error))
                continue
            for episode in ones:
                try:
                    split = logs.checked_split(episode)
                except logs.UnusableError as error:
                    reading.bad(f"rows {episode.start + 1} to {episode.stop}", str(error))
                    continue
                name = f"{episode.log}-{episode.number:05d}" if is_cut else episode.log
                steps = rows.slice(episode.start - first, episode.stop - episode.start)
                steps = self._resampled(steps, counts) if is_faster else steps
                yield Segment(name, split, steps, *self._cut(steps, counts), subject)

    def _subject(self, rows: pa.Table, counts: Counter[str]) -> str | None:
        """Return the patient or robot of a recording, None where no step has one.

        Raises UnusableError, without names, where there are several.
        """
        subjects = _codes(rows, self.options.subject)[1] if self.options.subject else []
        if len(subjects) > 1:
            raise logs.UnusableError(f"its rows have {len(subjects)} values of subject")
        if self.options.subject and not subjects:
            counts[NO_SUBJECT] += 1
        return subjects[0] if subjects else None

    @property
    def _step(self) -> float:
        """What order rises by in a step; 0: each row is a step."""
        return self.options.step * (MICROSECONDS_PER_SECOND if self.roles.moments else 1)

    def _step_of(self, rows: pa.Table) -> float | None:
        """Return the time between two steps of a segment, null where it is not known."""
        o = self.options
        if o.step or not o.order or len(rows) < 2:
            return o.step or None
        unit = MICROSECONDS_PER_SECOND if self.roles.moments else 1
        return float(f"{np.median(np.diff(rows[o.order].to_numpy())) / unit:.6g}")

    def _is_faster(self, rows: pa.Table) -> bool:
        """Return whether a recording has a higher rate than option `step`.

        Raises UnusableError for one with a lower rate.
        """
        if not self._step or len(rows) < 2:
            return False
        ratio = float(np.median(np.diff(rows[self.options.order].to_numpy()))) / self._step
        if ratio > 1 + RATE_TOLERANCE:
            raise logs.UnusableError(
                f"its median step of {self.options.order} is {ratio:.4g} times that of --set step="
            )
        return ratio < 1 - RATE_TOLERANCE

    def _resampled(self, rows: pa.Table, counts: Counter[str]) -> pa.Table:
        """Return a row for each step of option `step`: the mean of its rows, the label of the last.

        A step without rows is left out, and so is part of a gap.
        """
        order = rows[self.options.order].to_numpy()
        # the tolerance is for rounding: 0.3 / 0.1 is less than 3
        step_of_row = np.floor((order - order[0]) / self._step + RATE_TOLERANCE)
        first = np.flatnonzero(np.append(True, np.diff(step_of_row) > 0))
        last = np.append(first[1:], len(rows)) - 1
        columns: dict[str, Any] = {
            name: rows[name].take(pa.array(last)) for name in rows.column_names
        }
        for name in self.roles.observations:
            values = rows[name].to_numpy()
            counts[INFINITE] += int(np.isinf(values).sum())
            is_known = np.isfinite(values)
            total = np.add.reduceat(np.where(is_known, values, 0.0), first)
            known = np.add.reduceat(is_known.astype(np.int64), first)
            columns[name] = np.where(known > 0, total / np.maximum(known, 1), np.nan)
        columns[self.options.order] = order[0] + step_of_row[first] * self._step
        return pa.table(columns)

    def _cut(
        self,
        rows: pa.Table,
        counts: Counter[str],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first steps of windows, and those after their last ones, both (n,)."""
        o = self.options
        bounds = [0, len(rows)]
        if o.order and o.gap and len(rows) > 2:
            steps = np.diff(rows[o.order].to_numpy())
            gaps = np.flatnonzero(steps > o.gap * np.median(steps)) + 1
            counts[GAPS] += len(gaps)
            bounds = [0, *gaps.tolist(), len(rows)]
        starts, stops = list[int](), list[int]()
        for first, end in pairwise(bounds):
            window = o.window or end - first
            first_steps = range(first, end - window + 1, o.stride or window)
            starts += first_steps
            stops += [start + window for start in first_steps]
        covered = np.zeros(len(rows) + 1, dtype=np.int64)
        np.add.at(covered, starts, 1)
        np.add.at(covered, stops, -1)
        counts[TOO_SHORT] += int((covered.cumsum()[:-1] == 0).sum())
        return np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64)

    def scan(self, reading: SplitReader) -> Scan:
        file, counts = reading.input_split, Counter[str]()
        episodes = logs.find_episodes(
            file, logs.log_name(file), self.roles, self.rules, reading.opener
        )
        num_finite = dict.fromkeys(self.roles.observations, 0)
        rows, longest = 0, 0
        median_steps = list[float]()
        for segment in self._segments(reading, episodes, counts):
            longest = max(longest, len(segment.rows))
            for name in num_finite:
                values = segment.rows[name].to_numpy()
                num_finite[name] += int(np.isfinite(values).sum())
                counts[INFINITE] += int(np.isinf(values).sum())
            if self.roles.order and len(segment.rows) > 1:
                order = segment.rows[self.roles.order].to_numpy()
                median_steps.append(float(np.median(np.diff(order))))
            rows += len(self._kept(segment, counts))
        return {
            "rows": rows,
            "episodes": episodes,
            "num_finite": num_finite,
            "counts": counts,
            "median_steps": [min(median_steps), max(median_steps)] if median_steps else [],
            "longest": longest,
        }

    def why_no_rows(self, scans: list[Scan]) -> str:
        counts = sum((Counter(file["counts"]) for file in scans), Counter[str]())
        reasons = ", ".join(f"{what}: {count}" for what, count in counts.items())
        steps = self.options.window
        return (
            f"no {f'window of {steps} steps' if steps else 'recording'} is left; the longest "
            "recording, or part of one in a split, has "
            f"{max(file['longest'] for file in scans)} steps ({reasons})"
        )

    def infer_schema(self, input_splits: list[InputSplit], scans: list[Scan]) -> InferredSchema:
        o = self.options
        counts = sum((Counter(scan["counts"]) for scan in scans), Counter[str]())
        channels, invalid = self.roles.observations, sum(scan["broken"] for scan in scans)
        first = f"; invalid: {invalid}, the first one: {first_invalid(input_splits, scans)}"
        if not any(scan["rows"] for scan in scans):  # then some are invalid
            is_any = any(scan["longest"] for scan in scans)
            why = self.why_no_rows(scans) if is_any else "no recording is valid"
            raise ValueError(f"{why}{first}")
        if empty := [name for name in channels if not any(f["num_finite"][name] for f in scans)]:
            raise ValueError(
                f"{input_splits[0].name}: channels without any number: {first_few(empty)}; leave "
                f"them out of --set channels={first if invalid else ''}"
            )
        lists = pa.struct([pa.field(name, pa.list_(pa.float64())) for name in channels])
        columns = [
            pa.field("recording", pa.string()),
            *([pa.field("subject", pa.string())] if o.subject else []),
            pa.field("start", pa.int64()),
            *([pa.field("step", pa.float64())] if o.order else []),
            pa.field("series", lists),
            *([pa.field("label", pa.string())] if self.label else []),
            *([pa.field("value", pa.float64())] if o.value else []),
        ]
        notes: Notes = {"channels": len(channels), **counts}
        files = Counter(name for scan in scans for name in {log for log, *_ in scan["episodes"]})
        if doubled := sum(count > 1 for count in files.values()):
            notes[SAME_NAMES] = doubled
        scan_results = [
            [(f"{file.name}/{log}" if doubled else log, *rest) for log, *rest in scan["episodes"]]
            for file, scan in zip(input_splits, scans, strict=True)
        ]
        if median_steps := [step for file in scans for step in file["median_steps"]]:
            unit = MICROSECONDS_PER_SECOND if self.roles.moments else 1
            low, high = min(median_steps) / unit, max(median_steps) / unit
            is_one_rate = high < (1 + RATE_TOLERANCE) * low
            notes[f"median step of {o.order}{' in seconds' if self.roles.moments else ''}"] = (
                f"{low:.4g}"
                if is_one_rate
                else f"{low:.4g} to {high:.4g}: a network assumes one sampling rate"
            )
        info = {
            "channels": list(channels),
            "window": o.window,
            "stride": o.stride or o.window,
            "label": o.label,
            "value": o.value,
        }
        return InferredSchema(columns, scan_results, notes, info)

    def rows(self, reading: SplitReader) -> Iterator[pa.Table]:
        episodes = [logs.EpisodeRows(*fields) for fields in reading.scan_result]
        for segment in self._segments(reading, episodes, Counter()):
            kept = self._kept(segment, Counter())
            block = max(1, BLOCK_STEPS // max(1, self.options.window))
            for first in range(0, len(kept), block):
                yield self._table(segment, kept[first : first + block], reading.input_split)

    # ------------------------------------------------------------ the windows of a segment

    def _kept(self, segment: Segment, counts: Counter[str]) -> np.ndarray:
        """Return the windows that become rows; the others are counted."""
        o, last = self.options, segment.stops - 1
        finite = [np.isfinite(segment.rows[name].to_numpy()) for name in self.roles.observations]
        numbers = np.append(0, np.any(finite, axis=0).cumsum())
        empty = numbers[segment.stops] == numbers[segment.starts]
        counts[NO_NUMBER] += int(empty.sum())
        good = ~empty
        for column in filter(None, (o.label, o.value)):
            if o.take == "most":
                lacking = _most_common(segment, column) < 0
            else:
                lacking = (_codes(segment.rows, column)[0] < 0)[last]
            counts[NO_LABEL] += int((good & lacking).sum())
            good &= ~lacking
            if o.take == "same":
                codes = _codes(segment.rows, column)[0]
                changes = np.append(0, (np.diff(codes) != 0).cumsum())
                several = changes[last] != changes[segment.starts]
                counts[SEVERAL] += int((good & several).sum())
                good &= ~several
        return np.flatnonzero(good)

    def _table(self, segment: Segment, kept: np.ndarray, input_split: InputSplit) -> pa.Table:
        o, count = self.options, len(kept)
        starts, stops = segment.starts[kept], segment.stops[kept]
        lengths = stops - starts
        offsets = np.append(0, lengths.cumsum())
        steps = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, lengths)
        lists = []
        for name in self.roles.observations:
            values = segment.rows[name].to_numpy()[steps]
            finite = pa.array(values, mask=~np.isfinite(values))
            lists.append(pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), finite))
        columns: dict[str, Any] = {
            "recording": [segment.recording] * count,
            "subject": [segment.subject] * count,
            "start": starts,
            "step": [self._step_of(segment.rows)] * count,
            "series": pa.StructArray.from_arrays(lists, list(self.roles.observations)),
        }
        if o.label:
            codes, names = _codes(segment.rows, o.label)
            chosen = _most_common(segment, o.label)[kept] if o.take == "most" else codes[stops - 1]
            columns["label"] = [names[code] for code in chosen]
        elif o.label_folders:
            columns["label"] = [_folder(input_split)] * count
        if o.value:
            columns["value"] = segment.rows[o.value].to_numpy()[stops - 1]
        for name, option in (("subject", o.subject), ("step", o.order)):
            if not option:
                columns.pop(name)
        return pa.table({**columns, "split": [segment.split or input_split.split] * count})


def _folder(file: InputSplit) -> str:
    """Return the name of the nearest folder that is no split's, which is a file's label."""
    folders = [one for one in file.entry.name.split("/")[:-1] if not split_of_folder(one)]
    if not folders:
        raise ValueError(
            f"{file.name}: it lies in no folder below the source that is not called like a split, "
            "and --set label_folders=true takes the folder's name as the label: give the folder "
            "that holds the folders of labels"
        )
    return folders[-1]


def _codes(rows: pa.Table, column: str) -> tuple[np.ndarray, list[Any]]:
    """Return ((steps,) the index of each step's value, -1 for none; the distinct values)."""
    values = rows[column].combine_chunks()
    if pa.types.is_string(values.type):
        values = pc.utf8_trim_whitespace(values)
        values = pc.if_else(pc.equal(values, ""), None, values)
    else:
        values = pc.if_else(pc.is_finite(values), values, None)
    codes, distinct = dictionary_codes(values)
    return codes, distinct.to_pylist()


def _most_common(segment: Segment, column: str) -> np.ndarray:
    """Return (windows,) the number of the value that most steps of a window have, -1 for none."""
    codes, names = _codes(segment.rows, column)
    counts = [np.append(0, (codes == code).cumsum()) for code in range(len(names))]
    if not counts:
        return np.full(len(segment.starts), -1)
    inside = np.array([count[segment.stops] - count[segment.starts] for count in counts])
    return np.where(inside.any(axis=0), inside.argmax(axis=0), -1)
