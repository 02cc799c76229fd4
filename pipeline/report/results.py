"""The results table: one row for each (trial, split, metric), in
``<storage>/<job>/results.parquet``.

Its columns are a public interface: columns may be added but never renamed. Only the driver process
writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.registry import nearest
from pipeline.io import checksums, csv_rows, storage
from pipeline.io.json_values import JsonObject, as_object
from pipeline.report.trial_folder import old_layout_folder, uri_of_bundle, uri_of_parent

FILE, INDEX = "results.parquet", "trials.csv"
"""The table, and a list of its trials for people, with the folder and bundle of each."""
NO_BACKBONE = "none"
"""The backbone of baselines, which are models without a network and without a source."""
CUT_BY_BUDGET = "cut by the budget"
"""How the reason (``error``) begins of a search trial after which its source and technique were cut
(``fanout.select.budget``).
"""
VALIDATION, SOURCE_VALIDATION = "validation", "source_validation"
"""Splits on which trials are chosen: validation rows of the target, or those of the source where no
label of the target may be read. Values of the two cannot be compared with each other.
"""
CHECKSUM = b"onetomany.sha256"
"""The field of the Parquet metadata that holds the checksum of the rows."""


@dataclass(frozen=True)
class ResultRow:
    """One row of the results table. The table has these columns, in this order.

    A failed trial has one row without split and metric. Unknown values are None, or an empty string
    in the columns that every row should have.
    """

    job: str = ""
    source: str = ""
    """``none`` for scratch."""
    backbone: str = ""
    target: str = ""
    objective: str = ""
    technique: str = ""
    hyper_parameters: str | None = None
    """JSON of all settings of the trial."""
    seed: int = 0
    label_fraction: str = ""
    """"1.0", "0.05", "5/class" or "5 rows"."""
    trial_id: str = ""
    trial_stage: str = ""
    """"search" or "final"."""
    status: str = ""
    """"done", "failed" or "pruned"."""
    error: str | None = None
    metric: str | None = None
    value: float | None = None
    value_low: float | None = None
    value_high: float | None = None
    interval: str | None = None
    """How the intervals of the row were made."""
    higher_is_better: bool | None = None
    split: str | None = None
    """"test", "validation" or "source_validation"."""
    n_train: int | None = None
    n_eval: int | None = None
    n_units: int | None = None
    params_trained: int | None = None
    steps: int | None = None
    seconds: float | None = None
    device: str | None = None
    bundle_uri: str | None = None
    """The URI of the bundle. `read` replaces the recorded one by that in the folder it reads."""
    parent_uri: str | None = None
    """The URI of the bundle of its source. `read` replaces one in the job's own folder as it does
    ``bundle_uri``.
    """
    scratch_value: float | None = None
    gain: float | None = None
    gain_low: float | None = None
    gain_high: float | None = None
    score_name: str | None = None
    score_value: float | None = None
    spec_hash: str | None = None
    git_sha: str | None = None
    started_at: datetime | None = None
    split_origin: str | None = None
    """Where the splits come from (a column, files, at random by which hash). Rows of a target with
    different values were measured on different test rows.
    """
    paired_seeds: int | None = None
    """Number of seeds that both the entry of the trial and its scratch have."""
    gain_p_holm: float | None = None
    """p value of the entry's mean gain over these seeds, corrected by Holm's method for all
    comparisons of the job. Only rows of the primary metric have it.
    """
    baseline_gain: float | None = None
    """Gain over the target's best scratch network at the same label fraction and seed, chosen on
    validation rows.
    """
    current: bool | None = None
    """Whether the trial belongs to the job as it was when it last ran. Rows of other trials are
    kept until they are pruned.
    """
    versions: str | None = None
    """JSON, library to version. Null for trials that were run before it was recorded."""
    made_by: str | None = None
    """Hash of the code that made the trial (`pipeline.config.provenance`). Null for trials that
    were run before it was recorded.
    """
    drawn: str | None = None
    """JSON of the hyper-parameters that the search drew for the trial, which are the same for all
    seeds of a setting. It is {} where there was no search.
    """
    layers_trained: str | None = None
    """The layers that were trained, by their names. Null for trials that were run before it was
    recorded.
    """
    modality: str | None = None
    """The modality of the target. Null for trials that were run before it was recorded."""
    source_scores: str | None = None
    """JSON, transferability score to ``value``, ``low`` and ``high`` of the source for the target,
    null where the score is not defined. Null where no scores were computed.
    """
    best_baseline: str | None = None
    """The baseline (a model without a network) of the target and label fraction that is the best on
    validation rows.
    """
    best_baseline_gain: float | None = None
    """Gain over it with the same seed."""
    best_baseline_low: float | None = None
    best_baseline_high: float | None = None
    fold: int | None = None
    """The fold, from 1, of whose rows the test split consists. Null where the target has none."""
    trial_name: str | None = None
    """What a person calls the trial: target/source/technique/label fraction/seed, and what a search
    drew. Null for trials that were collected before it was recorded.
    """
    trial_folder: str | None = None
    """The trial's folder, relative to that of the job. Null for trials of versions that laid all of
    them under their ids.
    """

    @property
    def folder(self) -> str:
        """The trial's folder, relative to that of the job."""
        return self.trial_folder or old_layout_folder(self.trial_id)

    def as_read_in(self, root: str, folder: str) -> Self:
        """Return the row with its bundles' places in the folder of the job that is read.

        They are the trial's own bundle, and that of its source where the job trained it. A trial
        whose own bundle was not kept has its source's as it was recorded.

        Args:
            root: The folder of the job.
            folder: That of the trial, relative to it.
        """
        if self.bundle_uri is None:
            return self
        parent_uri = self.parent_uri and uri_of_parent(root, self.bundle_uri, self.parent_uri)
        return replace(self, bundle_uri=uri_of_bundle(root, folder), parent_uri=parent_uri)

    @property
    def is_cut_by_budget(self) -> bool:
        """Whether its trial is the last search trial of a source and technique that were cut."""
        return self.status == "pruned" and (self.error or "").startswith(CUT_BY_BUDGET)

    @property
    def is_tested(self) -> bool:
        """Whether it is a test result of a finished final trial."""
        return self.trial_stage == "final" and self.status == "done" and self.split == "test"

    @property
    def is_of_subgroup(self) -> bool:
        """Whether it is of a subgroup of the rows: its metric is named ``auroc@sex=female``.

        A label that is named with @ makes none: ``auroc/a@b`` is of a single label.
        """
        return "@" in (self.metric or "").partition("/")[0]

    @property
    def is_of_label(self) -> bool:
        """Whether it is of a single label: its metric is named ``auroc/Effusion``."""
        return "/" in (self.metric or "").partition("@")[0]

    @property
    def is_validation(self) -> bool:
        """Whether it is a value on validation rows, by which trials are chosen."""
        return self.split in (VALIDATION, SOURCE_VALIDATION)

    @property
    def settings(self) -> JsonObject:
        """All settings of the trial, by name."""
        return json.loads(self.hyper_parameters or "{}")

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> Self:
        """Make a row from its columns.

        Raises:
            ValueError: The table has no such column.
        """
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"results have no column {name!r}; {nearest(name, COLUMNS)}")
        return cls(**{name: value for name, value in columns.items() if value is not None})

    def columns(self) -> dict[str, Any]:
        """Return the value of each column as the table holds it, with None for empty values."""
        return {
            name: None if value == "" and name in ALWAYS else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Self:
        """Make a row from a trial's record (`to_json`)."""
        settings, started = record.get("hyper_parameters"), record.get("started_at")
        changed = {
            "hyper_parameters": None if settings is None else json.dumps(settings, sort_keys=True),
            "started_at": None if started is None else datetime.fromtimestamp(started, UTC),
        }
        return cls.from_columns({**record, **changed})

    def to_json(self) -> JsonObject:
        """Return the row as a trial's record holds it.

        Settings are a JSON object and times are seconds since 1970.
        """
        changed = {
            "hyper_parameters": None
            if self.hyper_parameters is None
            else json.loads(self.hyper_parameters),
            "started_at": None if self.started_at is None else self.started_at.timestamp(),
        }
        return {
            name: value
            for name, value in {**self.columns(), **changed}.items()
            if name not in COMPARED
        }


COLUMNS = tuple(field.name for field in fields(ResultRow))
ALWAYS = tuple(field.name for field in fields(ResultRow) if field.default == "")
"""Text columns that every row has."""
COMPARED = (
    "scratch_value",
    "gain",
    "gain_low",
    "gain_high",
    "score_name",
    "score_value",
    "split_origin",
    "paired_seeds",
    "gain_p_holm",
    "baseline_gain",
    "best_baseline",
    "best_baseline_gain",
    "best_baseline_low",
    "best_baseline_high",
    "current",
    "versions",
    "made_by",
    "drawn",
    "source_scores",
    "trial_name",
)
"""Columns that need the other trials. They are filled in when the rows of all trials are collected.
"""

_ARROW = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "datetime": pa.timestamp("us", tz="UTC"),
}
SCHEMA = pa.schema(
    [(field.name, _ARROW[str(field.type).removesuffix(" | None")]) for field in fields(ResultRow)]
)

_ALLOWED = {"trial_stage": ("search", "final"), "status": ("done", "failed", "pruned")}


def append(
    uri: str,
    rows: list[ResultRow],
    current: Collection[str] | None = None,
    is_of_part: Callable[[ResultRow], bool] | None = None,
) -> None:
    """Add rows to the table in the folder ``uri``. The whole file is replaced, atomically.

    The rows of a trial replace all its earlier ones of the same stage: it may have failed then and
    be done now, or the job may name other subgroups. Of rows with the same (trial_id, split,
    metric, trial_stage) the last one is taken.

    Args:
        uri: The folder of the job.
        rows: The rows to add, all those of each trial.
        current: Ids of all trials of the job as it is now. The column ``current`` of all rows, also
            of old ones, is set from it. Without it that column does not change.
        is_of_part: Whether a row is of the part of the job that ran. The column of rows of the
            other parts does not change. Without it the whole job ran.

    Raises:
        ValueError: A value has the wrong type.
    """
    if not rows and current is None:
        return
    new = {(row.trial_id, row.split, row.metric, row.trial_stage): row for row in _validate(rows)}
    trials = {(row.trial_id, row.trial_stage) for row in new.values()}
    earlier = [row for row in _read_or_none(uri) if (row.trial_id, row.trial_stage) not in trials]
    out = [*earlier, *new.values()]
    if not out:
        return
    if current is not None:
        wanted = set(current)
        out = [
            row
            if is_of_part and row.trial_id not in wanted and not is_of_part(row)
            else replace(row, current=row.trial_id in wanted)
            for row in out
        ]
    _write(uri, out)


def _read_or_none(uri: str) -> list[ResultRow]:
    """Read the rows of the table, or none with a warning where the table is damaged.

    A damaged table is then written again from the new rows.
    """
    try:
        return read(uri)
    except storage.DamagedError as error:
        checksums.notify(
            f"{error}: it is written again from the records of the job's trials (those of "
            "trials that the job no longer has stay under trials/)"
        )
        return []


def remove(uri: str, trial_ids: Collection[str]) -> int:
    """Remove the rows of trials from the table in the folder ``uri``; return how many."""
    unwanted = set(trial_ids)
    rows = read(uri)
    kept = [row for row in rows if row.trial_id not in unwanted]
    if len(kept) < len(rows):
        _write(uri, kept)
    return len(rows) - len(kept)


def _write(uri: str, rows: list[ResultRow]) -> None:
    sink = io.BytesIO()
    table = pa.Table.from_pylist([row.columns() for row in rows], schema=SCHEMA)
    table = table.replace_schema_metadata({CHECKSUM: _checksum(table)})
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(storage.join(uri, FILE), sink.getvalue())
    storage.write_bytes(storage.join(uri, INDEX), _index(rows))


def _index(rows: Iterable[ResultRow]) -> bytes:
    """Return a CSV file with a line for each trial, sorted by name.

    Values are those of the primary metric, which is the first one of a trial.
    """
    trials: dict[tuple[str, str], list[ResultRow]] = defaultdict(list)
    for row in rows:
        trials[row.trial_id, row.trial_stage].append(row)
    head = ("name", "status", "current", "metric", "validation", "test", "folder", "bundle")
    lines: list[tuple[Any, ...]] = []
    for (trial_id, _), rows_of_trial in trials.items():
        first = rows_of_trial[0]
        values = {
            "validation" if row.is_validation else row.split: row.value
            for row in rows_of_trial
            if row.metric == first.metric
        }
        lines.append(
            (
                first.trial_name or trial_id,
                first.status,
                first.current,
                first.metric,
                values.get("validation"),
                values.get("test"),
                first.folder,
                first.bundle_uri,
            )
        )
    lines.sort(key=lambda line: str(line[0]))
    text = io.StringIO(newline="")
    csv_rows.write(text, [head, *lines])
    return text.getvalue().encode()


def read(uri: str) -> list[ResultRow]:
    """Read the rows of the table in the folder ``uri``, oldest first.

    Returns an empty list where there is no table yet. Columns that an older file lacks are None. A
    table without a checksum, which older versions wrote, is not checked. The columns ``bundle_uri``
    and ``parent_uri`` name bundles in this folder, which may have been moved or copied.

    Raises:
        ValueError: The file has columns that this version does not know.
        DamagedError: The file is not as it was written.
    """
    path = storage.join(uri, FILE)
    if not storage.exists(path):
        return []
    table = _parse(path, storage.read_bytes(path))
    unknown = [name for name in table.column_names if name not in SCHEMA.names]
    if unknown:
        raise ValueError(
            f"{path} has columns that this version does not know: {', '.join(unknown)}; it was "
            "written by a newer one"
        )
    root = storage.absolute(uri)
    rows = [ResultRow.from_columns(row) for row in table.to_pylist()]
    return [row.as_read_in(root, row.folder) for row in rows]


def _parse(path: str, data: bytes) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(data))
        metadata: dict[bytes, bytes] = table.schema.metadata or {}
        stated = metadata.get(CHECKSUM)
        if stated is None or stated == _checksum(table):
            return table
    except Exception as error:  # a damaged file can raise exceptions without a common base class
        raise storage.DamagedError(
            f"{path} is damaged: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    raise storage.DamagedError(
        f"{path} is damaged: its rows do not have the SHA-256 that it states"
    )


def _checksum(table: pa.Table) -> bytes:
    """Return the SHA-256 of names, types and values, which does not depend on the encoding."""
    digest = hashlib.sha256(
        json.dumps([[field.name, str(field.type)] for field in table.schema]).encode()
    )
    for row in table.to_pylist():
        digest.update(json.dumps(list(row.values()), default=str).encode())
    return digest.hexdigest().encode()


def disambiguate_targets(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the rows with the split in the target's name where a target has several splits.

    This keeps results on an official split and on a random split apart.
    """
    rows = list(rows)
    origins: dict[str, set[str | None]] = defaultdict(set)
    for row in rows:
        origins[row.target].add(row.split_origin)
    return [
        replace(row, target=f"{row.target} [{row.split_origin or 'splits not recorded'}]")
        if len(origins[row.target]) > 1
        else row
        for row in rows
    ]


def technique(row: ResultRow) -> str:
    """Return a row's technique with its options: ``lp_ft (probe_share 0.3)``.

    The same technique with other options counts as another technique.
    """
    options = as_object(row.settings.get("technique"))
    description = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    return f"{row.technique} ({description})" if description else row.technique


def _validate(rows: list[ResultRow]) -> list[ResultRow]:
    """Return the rows as they would be read from the table.

    Raises:
        ValueError: A value is not allowed in its column.
    """
    for row in rows:
        if not row.trial_id:
            raise ValueError("a results row needs its trial_id")
        for name, allowed in _ALLOWED.items():
            value = getattr(row, name)
            if value and value not in allowed:
                raise ValueError(f"results column {name} is {value!r}; use {', '.join(allowed)}")
        started = row.started_at
        if isinstance(started, datetime) and started.tzinfo is None:
            raise ValueError(f"started_at {started} has no time zone; give UTC")
    try:
        table = pa.Table.from_pylist([row.columns() for row in rows], schema=SCHEMA)
        return [ResultRow.from_columns(row) for row in table.to_pylist()]
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(
            _describe_mismatch(rows) or f"results rows do not fit their columns: {error}"
        ) from error


def _describe_mismatch(rows: list[ResultRow]) -> str | None:
    """Return an error message for the first value that its column cannot hold."""
    for row in rows:
        for name, value in row.columns().items():
            try:
                pa.array([value], SCHEMA.field(name).type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                return (
                    f"results column {name} holds {SCHEMA.field(name).type}, got {value!r} "
                    f"({type(value).__name__})"
                )
    return None


# ---------------------------------------------------------------- identical results

_SETTINGS = ("source", "backbone", "technique", "label_fraction", "seed", "hyper_parameters")
_SETTINGS_OF_SOLVED_HEADS = _SETTINGS[:-2]
"""Those that matter where a head was solved as a convex problem: its solution has no seed."""


def duplicates(rows: list[ResultRow]) -> list[str]:
    """Return a sentence for each set of trials with identical results under different settings.

    Models without a network (baselines) are left out: most of them are the same with every seed.

    Identical results are a sign that a setting had no effect: a source was not loaded, or a seed or
    learning rate was not used. Finished trials of one target are identical when they have the same
    loss to 12 digits. Where no loss was recorded, at least two metrics must agree to 12 digits,
    because equal accuracies alone may be chance. A search trial and the final run of the same
    setting are no duplicates, nor are the seeds of a head that was solved (``linear_probe``).
    Sources are compared with each other and with scratch, which shows weights that were never
    loaded.
    """
    measured: dict[tuple[str, str | None], dict[str, dict[str, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    trials: dict[str, ResultRow] = {}
    for row in rows:
        value = row.value
        if row.backbone == NO_BACKBONE:
            continue
        if row.status == "done" and row.metric and value is not None and math.isfinite(value):
            trials.setdefault(row.trial_id, row)
            measured[row.target, row.split][row.trial_id][row.metric] = value
    out: dict[frozenset[str], str] = {}
    for (target, split), by_trial in measured.items():
        identical: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for trial_id, values in by_trial.items():
            if "loss" in values:
                identical["loss", f"{values['loss']:.12g}"].append(trial_id)
            elif len(values) > 1:
                signature = tuple((name, f"{values[name]:.12g}") for name in sorted(values))
                identical[signature].append(trial_id)
        for signature, ids in identical.items():
            same_trials = [trials[i] for i in ids]
            is_solved = all("solver" in row.settings for row in same_trials)
            differing = [
                name
                for name in (_SETTINGS_OF_SOLVED_HEADS if is_solved else _SETTINGS)
                if len({_normalize_setting(row, name) for row in same_trials}) > 1
            ]
            if differing and frozenset(ids) not in out:
                what = (
                    f"{split} loss {float(str(signature[1])):.6g}"
                    if signature[0] == "loss"
                    else f"every {split} metric"
                )
                out[frozenset(ids)] = _describe_duplicates(target, what, same_trials, differing)
    return list(out.values())


def _normalize_setting(row: ResultRow, name: str) -> Any:
    """Return a setting in a form that is equal for equal settings."""
    value = getattr(row, name)
    if name != "hyper_parameters" or not value:
        return value
    try:
        return json.dumps(json.loads(value), sort_keys=True)
    except ValueError:
        return value


def _describe_duplicates(
    target: str, what: str, trials: list[ResultRow], differing: list[str]
) -> str:
    shown = [
        f"{row.trial_id} ({', '.join(str(getattr(row, name)) for name in differing)})"
        for row in trials[:4]
    ]
    more = f" and {len(trials) - 4} more" if len(trials) > 4 else ""
    names = ", ".join(name.replace("_", " ") for name in differing)
    return (
        f"{target}: {what} is identical in {len(trials)} trials that differ in {names}: "
        f"{'; '.join(shown)}{more}."
    )
