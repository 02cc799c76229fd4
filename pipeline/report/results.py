"""The results table: one row for each (trial, split, metric), in
``<storage>/<job>/results.parquet``.

Its columns are a public interface: they may be added to, never renamed. One process, the driver,
writes it.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.registry import nearest
from pipeline.io import checksums, storage

FILE = "results.parquet"
CHECKSUM = b"onetomany.sha256"
"""The field of the file's own metadata that holds the checksum of its rows."""

_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
SCHEMA = pa.schema(
    [
        ("job", _TEXT),
        ("source", _TEXT),
        ("backbone", _TEXT),
        ("target", _TEXT),
        ("objective", _TEXT),
        ("technique", _TEXT),
        ("hyper_parameters", _TEXT),
        ("seed", _INT),
        ("label_fraction", _TEXT),
        ("trial_id", _TEXT),
        ("trial_stage", _TEXT),
        ("status", _TEXT),
        ("error", _TEXT),
        ("metric", _TEXT),
        ("value", _FLOAT),
        ("value_low", _FLOAT),
        ("value_high", _FLOAT),
        ("interval", _TEXT),
        ("higher_is_better", pa.bool_()),
        ("split", _TEXT),
        ("n_train", _INT),
        ("n_eval", _INT),
        ("n_units", _INT),
        ("params_trained", _INT),
        ("steps", _INT),
        ("seconds", _FLOAT),
        ("device", _TEXT),
        ("bundle_uri", _TEXT),
        ("parent_uri", _TEXT),
        ("scratch_value", _FLOAT),
        ("gain", _FLOAT),
        ("gain_low", _FLOAT),
        ("gain_high", _FLOAT),
        ("score_name", _TEXT),
        ("score_value", _FLOAT),
        ("spec_hash", _TEXT),
        ("git_sha", _TEXT),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("split_origin", _TEXT),
        ("paired_seeds", _INT),
        ("gain_p_holm", _FLOAT),
        ("baseline_gain", _FLOAT),
        ("current", pa.bool_()),
        ("versions", _TEXT),
        ("made_by", _TEXT),
        ("drawn", _TEXT),
    ]
)
"""``split_origin`` says where the splits come from (a column, files, at random by which hash): rows
of one target that differ in it were tested on other rows. ``source`` is "none" for scratch;
``hyper_parameters`` is JSON; ``label_fraction`` is "1.0", "0.05", "5/class" or "5 rows"; a failed
trial leaves one row without split and metric. ``paired_seeds`` counts the seeds that a trial's cell
and its scratch both have, ``gain_p_holm`` is the p value of the cell's mean gain over these seeds,
corrected by Holm for all comparisons of the job (primary metric alone), ``baseline_gain`` the gain
over the target's best scratch network at the same label fraction and seed, chosen on validation
rows. ``current`` is true for the trials that the job, as it was when it last ran, consists of; rows
of others are kept until they are pruned. ``versions`` is JSON, library to version; ``made_by`` is
the hash of the code that made the trial (`config.provenance`); both are null for trials that were
run before they were recorded. ``drawn`` is JSON: the hyper-parameters that the search drew for the
trial, the same for all seeds of a setting; {} where there was no search (``hyper_parameters`` has
all that ran).
"""

_ALLOWED = {"trial_stage": ("search", "final"), "status": ("done", "failed", "pruned")}

Row = dict[str, Any]


def append(uri: str, rows: list[Row], current: Collection[str] | None = None) -> None:
    """Add rows to the table under the folder ``uri``; columns that a row lacks are null. The file
    is replaced whole, atomically.

    A row with the (trial_id, split, metric, trial_stage) of an earlier one takes its place. Earlier
    rows of a trial that ended otherwise than now (it failed then and is done now, or the other way
    round) go. Raises ValueError for an unknown column or a value of the wrong type.

    Args:
        current: Ids of every trial of the job as it is now. The column ``current`` of all rows, old
            ones too, is set by it; without it that column stays as it is.
    """
    if not rows and current is None:
        return
    new = _checked(rows)
    status_now = {(row["trial_id"], row["trial_stage"]): row["status"] for row in new}
    kept: dict[tuple, Row] = {}
    for row in _read_or_none(uri):
        ended_as = status_now.get((row["trial_id"], row["trial_stage"]), row["status"])
        if row["status"] == ended_as:
            kept[_key(row)] = row
    for row in new:
        kept[_key(row)] = row
    if not kept:
        return
    if current is not None:
        wanted = set(current)
        for row in kept.values():
            row["current"] = row["trial_id"] in wanted
    _write(uri, list(kept.values()))


def _read_or_none(uri: str) -> list[Row]:
    """The rows that are there; none of a damaged table, which is told: it is written anew with the
    rows that come.
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
    """Remove the rows of these trials from the table under the folder ``uri``; how many went."""
    gone = set(trial_ids)
    rows = read(uri)
    kept = [row for row in rows if row["trial_id"] not in gone]
    if len(kept) < len(rows):
        _write(uri, kept)
    return len(rows) - len(kept)


def _write(uri: str, rows: list[Row]) -> None:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    table = table.replace_schema_metadata({CHECKSUM: _checksum(table)})
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(storage.join(uri, FILE), sink.getvalue())


def read(uri: str) -> list[Row]:
    """The rows of the table under the folder ``uri``, oldest first; none when there is no table
    yet.

    Columns that an older file lacks are null. Raises ValueError when the file has columns that this
    version does not know, and DamagedError when it does not hold what was written. A table that was
    written before it had a checksum is taken as it is.
    """
    path = storage.join(uri, FILE)
    if not storage.exists(path):
        return []
    table = _parsed(path, storage.read_bytes(path))
    unknown = [name for name in table.column_names if name not in SCHEMA.names]
    if unknown:
        raise ValueError(
            f"{path} has columns that this version does not know: {', '.join(unknown)}; it was "
            "written by a newer one"
        )
    return with_all_columns(table.to_pylist())


def _parsed(path: str, data: bytes) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(data))
        stated = (table.schema.metadata or {}).get(CHECKSUM)
        if stated is None or stated == _checksum(table):
            return table
    except (
        Exception
    ) as error:  # of any kind: what a damaged file makes of the reader has no common base
        raise storage.DamagedError(
            f"{path} is damaged: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    raise storage.DamagedError(
        f"{path} is damaged: its rows do not have the SHA-256 that it states"
    )


def _checksum(table: pa.Table) -> bytes:
    """SHA-256 of names, types and values, however they are stored."""
    digest = hashlib.sha256(
        json.dumps([[field.name, str(field.type)] for field in table.schema]).encode()
    )
    for row in table.to_pylist():
        digest.update(json.dumps(list(row.values()), default=str).encode())
    return digest.hexdigest().encode()


def select(rows: Iterable[Row], trial_ids: Collection[str]) -> list[Row]:
    """The rows of these trials, in order."""
    wanted = set(trial_ids)
    return [row for row in rows if row["trial_id"] in wanted]


def with_all_columns(rows: Iterable[Row]) -> list[Row]:
    """The rows with every column of the table, None where they lack it."""
    return [{name: row.get(name) for name in SCHEMA.names} for row in rows]


def disambiguate_targets(rows: Iterable[Row]) -> list[Row]:
    """The rows; where those of one target were split in several ways, its name says which: an
    official split and a random one never share a table.
    """
    rows = list(rows)
    origins: dict[Any, set] = defaultdict(set)
    for row in rows:
        origins[row.get("target")].add(row.get("split_origin"))
    return [
        {**row, "target": f"{row['target']} [{row.get('split_origin') or 'splits not recorded'}]"}
        if len(origins[row.get("target")]) > 1
        else row
        for row in rows
    ]


def technique(row: Row) -> str:
    """A row's technique with the options it was given: ``lp_ft (probe_share 0.3)``; with other
    options it is another one.
    """
    ran = row.get("hyper_parameters") or "{}"
    options = (json.loads(ran) if isinstance(ran, str) else ran).get("technique") or {}
    description = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    return f"{row['technique']} ({description})" if description else row["technique"]


def _key(row: Row) -> tuple:
    return row["trial_id"], row["split"], row["metric"], row["trial_stage"]


def _checked(rows: list[Row]) -> list[Row]:
    """The rows with every column, of the schema's types."""
    for row in rows:
        for name in row:
            if name not in SCHEMA.names:
                raise ValueError(f"results have no column {name!r}; {nearest(name, SCHEMA.names)}")
        if not row.get("trial_id"):
            raise ValueError("a results row needs its trial_id")
        for name, allowed in _ALLOWED.items():
            if row.get(name) is not None and row[name] not in allowed:
                raise ValueError(
                    f"results column {name} is {row[name]!r}; use {', '.join(allowed)}"
                )
        started = row.get("started_at")
        if isinstance(started, datetime) and started.tzinfo is None:
            raise ValueError(f"started_at {started} has no time zone; give UTC")
    try:
        return pa.Table.from_pylist(rows, schema=SCHEMA).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ValueError(
            _misfit(rows) or f"results rows do not fit their columns: {error}"
        ) from error


def _misfit(rows: list[Row]) -> str | None:
    """The first value that its column cannot hold, for the error message."""
    for row in rows:
        for name, value in row.items():
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


def duplicates(rows: list[Row]) -> list[str]:
    """A sentence for each set of finished trials of one target with identical results under
    different settings.

    Such trials say that a setting had no effect (a source that was not loaded, a seed or learning
    rate that was not used). Identical means: the same loss to 12 digits, or where no loss was
    written at least two metrics that all agree to 12 digits; equal accuracies alone may be chance.
    A search trial and the final run of the same setting are no duplicates. Sources are compared
    with each other and with scratch, because weights that were never loaded show there.
    """
    measured: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    trials: dict[str, Row] = {}
    for row in rows:
        value = row.get("value")
        if (
            row["status"] == "done"
            and row.get("metric")
            and value is not None
            and math.isfinite(value)
        ):
            trials.setdefault(row["trial_id"], row)
            measured[row["target"], row["split"]][row["trial_id"]][row["metric"]] = value
    out: dict[frozenset[str], str] = {}
    for (target, split), by_trial in measured.items():
        alike: dict[tuple, list[str]] = defaultdict(list)
        for trial_id, values in by_trial.items():
            if "loss" in values:
                alike[("loss", f"{values['loss']:.12g}")].append(trial_id)
            elif len(values) > 1:
                alike[tuple((name, f"{values[name]:.12g}") for name in sorted(values))].append(
                    trial_id
                )
        for signature, ids in alike.items():
            found = [trials[i] for i in ids]
            differing = [
                name for name in _SETTINGS if len({_setting(row, name) for row in found}) > 1
            ]
            if differing and frozenset(ids) not in out:
                what = (
                    f"{split} loss {float(signature[1]):.6g}"
                    if signature[0] == "loss"
                    else f"every {split} metric"
                )
                out[frozenset(ids)] = _sentence(target, what, found, differing)
    return list(out.values())


def _setting(row: Row, name: str) -> Any:
    """A setting in a form that compares equal when it means the same."""
    value = row.get(name)
    if name != "hyper_parameters" or not value:
        return value
    try:
        return json.dumps(json.loads(value), sort_keys=True)
    except ValueError:
        return value


def _sentence(target: str, what: str, found: list[Row], differing: list[str]) -> str:
    shown = [
        f"{row['trial_id']} ({', '.join(str(row.get(name)) for name in differing)})"
        for row in found[:4]
    ]
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    names = ", ".join(name.replace("_", " ") for name in differing)
    return (
        f"{target}: {what} is identical in {len(found)} trials that differ in {names}: "
        f"{'; '.join(shown)}{more}."
    )
