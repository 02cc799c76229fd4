"""Use of a bundle after training: predictions on new files, and features."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import file_columns, is_costed
from pipeline.core.contracts import Arrays, Modality, Objective
from pipeline.core.contracts.objective_capabilities import (
    compares_views,
    output_types,
    writes_columns,
)
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.plan import Item
from pipeline.data.stream import DataWorkers, Decoder, Rows, eval_batches, map_blocks
from pipeline.io import checksums, file_identity, storage
from pipeline.media import transcripts
from pipeline.train import evaluate, launch
from pipeline.train.loop import Ranks
from pipeline.train.online_probe import features
from pipeline.train.progress import Progress

ROWS_A_PART, PIECES_A_SHARD = 1024, 128
"""Rows of a file of predictions. There are fewer for recordings, because a row of half a minute
takes a megabyte of memory.
"""
PIECE = ("start", "seconds")
"""Roles of a row that is a piece of a longer recording. Rows to predict may have them or not,
whatever the training rows had.
"""
IDS = ("id", "image_id", "entity")
"""Columns with the id of a row, as importers write them. Predictions have them too."""
INPUT = "input_"
"""Prefix of a column of the rows that has the same name as a column of the predictions."""
MOST_NAMED, MOST_LETTERS = 20, 120
"""How many classes are printed by name, and how many letters of a type."""


class Predictor:
    """A bundle in a data worker, which predicts the rows of an item.

    It is opened at the first item, once per process. ``carried`` are columns of the rows that are
    copied to the predictions, by their names there.
    """

    def __init__(
        self,
        uri: str,
        selection: Selection,
        columns: dict[str, str],
        carried: dict[str, str] | None = None,
    ):
        self.uri, self.selection, self.columns, self.carried = (
            uri,
            selection,
            columns,
            carried or {},
        )
        self._task: Any = None

    def __getstate__(self):
        return {**self.__dict__, "_task": None}

    def __call__(self, item: Item) -> Arrays:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._task is None:
            found = bundle.load(self.uri)
            self._task, self._modality = found.task().to(device), found.modality()
        ids = self.selection.ids(np.arange(item.start, item.stop))
        rows = Rows(
            Selection(self.selection.manifest, ids), Decoder(self._modality, None, {}, self.columns)
        ).in_memory(1.0, cpus=0, keep_bad=True)
        found = evaluate.predictions(
            self._task,
            eval_batches(rows, 128),
            evaluate.device_preprocessing(rows),
            Ranks(device=device),
            torch.no_grad(),
        )
        found.pop("row")
        return {
            **_table(
                ids,
                self._output_columns(found, rows, ids),
                dict(rows.bad),
            ),
            **self._pieces(ids),
        }

    def _output_columns(self, predictions: Arrays, rows: Rows, ids: np.ndarray) -> Arrays:
        """Return the columns that are written of predictions."""
        objective = self._task.objective
        if not writes_columns(objective):
            return predictions
        raw_rows = evaluate.Postprocessor(rows).raw_rows(objective, ids)
        return objective.output_columns(predictions, raw_rows)

    def _pieces(self, ids: np.ndarray) -> Arrays:
        """Return the recording, start and length of each row, (n,) each, by column name.

        Start and length are in seconds, NaN where the rows do not have them. The result is empty
        where rows are no pieces of recordings.
        """
        if not self.carried:
            return {}
        table = manifests.Reader(
            self.selection.manifest, list(dict.fromkeys(self.carried.values()))
        ).take(ids)
        held = {name: table[column].to_pylist() for name, column in self.carried.items()}
        return {
            name: np.array(
                [str(value) if value is not None else "" for value in values], dtype=object
            )
            if name == "recording"
            else np.array(
                [np.nan if value is None else value for value in values], dtype=np.float64
            )
            for name, values in held.items()
        }


def _table(ids: np.ndarray, found: Arrays, reasons: dict[int, str]) -> Arrays:
    """Return one line for each row, in order.

    A row that cannot be decoded was predicted from zeros: its line has the reason and no
    prediction.
    """
    bad = np.array([int(i) in reasons for i in ids], dtype=bool)
    out: Arrays = {
        "row": ids,
        "error": np.array([reasons.get(int(i), "") for i in ids], dtype=object),
    }
    for name, array in found.items():
        if array.dtype == object:
            for place in np.flatnonzero(bad):
                array[place] = type(
                    array[place]
                )()  # an empty one of its kind, so that all parts have one schema
        else:
            array[bad] = np.nan if array.dtype.kind == "f" else -1
        out[name] = array
    return out


def check(uri: str, srt: bool = False) -> bundle.Manifest:
    """Return the manifest of a bundle after checking that it can make predictions.

    ``srt`` is whether subtitles are wanted too.

    Raises:
        BundleError: The bundle has no head, or makes no transcripts for subtitles.
        StorageError: A file is missing or damaged.
    """
    found = bundle.load(uri)
    name = found.manifest.objective.name
    if name == "none":
        raise BundleError(f"{uri}: this bundle is a backbone without a head; fine-tune it first")
    objective = registry.get("objective", name)
    if compares_views(objective):
        raise BundleError(
            f"{uri}: {name} compares views of a row and predicts nothing; fine-tune it first"
        )
    if srt and "words" not in output_types(objective):
        raise BundleError(
            f"{uri}: --srt writes what was said and when, and this bundle's {name} transcribes "
            "nothing; leave --srt out"
        )
    return found.manifest


def predict(
    uri: str,
    data: list[str],
    output: str,
    columns: dict[str, str],
    form: str,
    progress: Progress,
    srt: bool = False,
    keep: tuple[str, ...] = (),
) -> str:
    """Predict files with Ray Data into ``output``/part-NNNNN.parquet, in row order.

    Parts that exist already are kept. Predictions also have these columns, where the rows have
    them: ``file`` (path of the file, for folders of files), the id of the row (``IDS``), the
    columns that ``keep`` names, and for recordings ``recording``, ``start`` and ``seconds``. A kept
    column with the name of a prediction is written as ``input_NAME``. The names of the classes of
    ``probabilities`` are JSON in the metadata of the Parquet files (``classes``) and in the
    returned value.

    With ``srt``, each recording also has an .srt file of its rows in the order of ``start``.

    Raises:
        BundleError: The bundle has no head, or makes no transcripts where subtitles are wanted.
        ValueError: A column is missing or has another type than the bundle reads, or the output
            folder belongs to other predictions.
    """
    manifest = check(uri, srt)
    with file_identity.progress_to(progress.update):
        found, named = manifests.build_with_named(data, form, storage.join(output, ".imports"))
    modality = bundle.build_modality(manifest.modality)
    objective = registry.get("objective", manifest.objective.name)
    where = (
        data[0]
        if found.files and found.files[0].startswith(storage.join(output, ".imports"))
        else found.files[0]
    )
    columns = columns_of_roles(modality, objective, manifest.columns, columns, found, where)
    _check_types(modality, columns, found, where)
    carried = recording_columns(modality, columns, found)
    kept = kept_columns(modality, columns, found, keep, where)
    reads = [*(file for file in found.identities if file is not None), *named]
    selection = Selection(found)
    if not named:
        files = file_columns(modality, columns)
        (selection,), more = manifests.with_named_files([selection], files, "content")
        found, reads = selection.manifest, [*reads, *more]
    key = spec_hash(manifest.files, found.fingerprint, columns, kept)
    begun = storage.join(output, "_predictions.json")
    if storage.exists(begun) and checksums.read_document(begun).get("key") != key:
        raise ValueError(
            f"{output} holds predictions of another bundle, of other files or with other "
            "columns of the rows (--keep); give an empty folder"
        )
    classes = manifest.objective.state.get("labels")
    checksums.write_document(
        begun,
        {
            "key": key,
            "bundle": uri,
            "files": list(found.files),
            "rows": found.rows,
            "labels": classes,
        },
    )
    step = PIECES_A_SHARD if is_costed(modality) else ROWS_A_PART
    items = [Item(-1, i, min(i + step, found.rows)) for i in range(0, found.rows, step)]
    parts = {
        item: storage.join(output, f"part-{number:05d}.parquet")
        for number, item in enumerate(items)
    }
    todo = [item for item in items if not storage.exists(parts[item])]
    have = launch.resources()
    gpus = have.get("GPU", 0.0)
    actors = int(max(1, gpus if gpus else have.get("CPU", 1) // 1))
    workers = DataWorkers(
        min(actors, max(1, len(todo))),
        1.0,
        int(have.get("object_store_memory", 1 << 30) // 2),
        1.0 if gpus else 0.0,
    )
    work = Predictor(uri, selection, columns, carried)
    bad, reader = 0, manifests.Reader(found, list(dict.fromkeys(kept.values())))
    for item, block in zip(todo, map_blocks(work, todo, workers), strict=True):
        bad += sum(1 for reason in block["error"] if reason)
        sink = io.BytesIO()
        rows = reader.take(selection.ids(np.arange(item.start, item.stop))) if kept else None
        pq.write_table(
            with_kept_columns(to_table(block, output_types(objective)), rows, kept, classes), sink
        )
        storage.write_bytes(parts[item], sink.getvalue())
        progress.update(
            f"predict: rows {item.stop}/{found.rows}  {bad} could not be read",
            item.stop == found.rows,
        )
    file_identity.check_unchanged(reads)
    return (
        f"{output}: {found.rows} rows in {len(items)} parts"
        + (f", {len(items) - len(todo)} of them from before" if len(todo) < len(items) else "")
        + (f", {write_subtitles(output, list(parts.values()))} recordings as .srt" if srt else "")
        + (f"; {bad} rows could not be read, see column error" if bad else "")
        + _named_classes(classes, list(parts.values()))
    )


def embed(
    uri: str, data: list[str], columns: dict[str, str], form: str, progress: Progress
) -> np.ndarray:
    """Compute the features of new rows in this process.

    Args:
        uri: A bundle, with or without a head.
        data: Files, folders or globs.
        columns: Role to column, where it has another name than in training.
        form: The format of the files, as in a job.

    Returns:
        (rows, D) float32; NaN for a row that cannot be decoded.

    Raises:
        ValueError: A column is missing or has another type than the bundle reads.
    """
    found = bundle.load(uri)
    modality, backbone = found.modality(), found.backbone()
    name = found.manifest.objective.name
    objective = Objective if name == "none" else registry.get("objective", name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with storage.scratch_folder() as scratch, file_identity.progress_to(progress.update):
        manifest, _ = manifests.build_with_named(data, form, str(scratch))
        known = found.manifest.columns
        named = columns_of_roles(modality, objective, known, columns, manifest, data[0])
        _check_types(modality, named, manifest, data[0])
        rows = Rows(Selection(manifest), Decoder(modality, None, {}, named))
        held = rows.in_memory(1.0, cpus=0, keep_bad=True)
        pooled = features(backbone, held, device)[0].cpu().numpy()
    pooled[[place for place, _ in held.bad]] = np.nan
    return pooled


def _named_classes(classes: list[str] | None, parts: list[str]) -> str:
    """Return a sentence on the class of each number in ``probabilities``.

    It is empty where the predictions do not have that column.
    """
    if not classes or not parts:
        return ""
    with storage.open_read(parts[0]) as handle:
        names = pq.read_schema(handle).names
    if "probabilities" not in names:
        return ""
    first = ", ".join(classes[:MOST_NAMED])
    more = (
        f" and {len(classes) - MOST_NAMED} more (all in the files' metadata, key classes)"
        if len(classes) > MOST_NAMED
        else ""
    )
    return f"; probabilities are of the classes, in this order: {first}{more}"


def kept_columns(
    modality: Modality,
    columns: dict[str, str],
    found: manifests.Manifest,
    keep: tuple[str, ...],
    where: str,
) -> dict[str, str]:
    """Return the columns of the rows that are copied to the predictions, by their names there.

    Raises:
        ValueError: There is no such column.
    """
    names, out = found.schema.names, {}
    files = file_columns(modality, columns)
    if files and _tells_place(found.schema.field(files[0]).type):
        out["file"] = files[0]
    out |= {name: name for name in IDS if name in names}
    for name in keep:
        if name not in names:
            raise ValueError(
                f"--keep {name}: {where} has no such column; columns are {', '.join(names)}"
            )
        out[name] = name
    return out


def _tells_place(kind: pa.DataType) -> bool:
    """Return whether a column of files has paths, as texts or in Hugging Face's structs."""
    if pa.types.is_struct(kind):
        return "path" in {field.name for field in kind}
    return arrow_lists.is_text(kind)


def with_kept_columns(
    found: pa.Table, rows: pa.Table | None, kept: dict[str, str], classes: list[str] | None
) -> pa.Table:
    """Return predictions with the rows' own columns after ``row``, and class names in the metadata.

    A column of the rows with the name of a prediction is written as ``input_NAME``: ``text`` of a
    transcribed recording is the transcript, ``input_text`` is the text of the rows.
    """
    place, written_as = 1, _names_of_kept(list(kept), found.column_names)
    for name, column in kept.items():
        assert rows is not None
        values = rows[column]
        if name == "file" and pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        found = found.add_column(place, pa.field(written_as[name], values.type), values)
        place += 1
    if classes:
        found = found.replace_schema_metadata(
            {**(found.schema.metadata or {}), "classes": json.dumps(classes, ensure_ascii=False)}
        )
    return found


def _names_of_kept(kept: list[str], of_predictions: list[str]) -> dict[str, str]:
    """Return the name of each kept column of the rows in the predictions.

    It is the column's own name where no prediction has that name.
    """
    taken, out = {*of_predictions, *kept}, {}
    for name in kept:
        out[name] = name
        if name in of_predictions:
            while out[name] in taken:
                out[name] = INPUT + out[name]
            taken.add(out[name])
    return out


def _check_types(
    modality: Modality, columns: dict[str, str], found: manifests.Manifest, where: str
) -> None:
    """Raise ValueError for a column of another type than the bundle reads, before rows are read.

    The message has the file, the column and both types.
    """
    for role, name in columns.items():
        kind = found.schema.field(name).type if name in found.schema.names else None
        needed = modality.required_type(role, kind) if kind is not None else ""
        if kind is not None and needed:
            raise ValueError(
                f"{where}: column {name} holds {_short(kind)}, and this bundle's {role} needs "
                f"{needed}"
                + (
                    _prepared(where)
                    if modality.registered_name == "table" and not pa.types.is_struct(kind)
                    else ""
                )
            )


def _short(kind: Any) -> str:
    """Return the text of a type, shortened where it is long (structs of many fields)."""
    text = str(kind)
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}..."


def _prepared(where: str) -> str:
    return (
        f". Plain tables are brought into this form by: onetomany prepare table {where} -o FOLDER "
        "(with the options of the training rows)"
    )


def columns_of_roles(
    modality: Modality,
    objective: type[Objective],
    known: dict[str, str],
    given: dict[str, str],
    found: manifests.Manifest,
    where: str = "",
) -> dict[str, str]:
    """Return the column of each role that rows to predict need.

    It is the one in ``columns``, or the one of training, or one with the name of the role (as in an
    imported folder). The roles of a piece of a recording are taken where training had them, and
    from a folder of files, which was cut into pieces.

    Raises:
        ValueError: There is no such column, or a label is named, which rows to predict do not need.
    """
    labels, out, where = (
        (*objective.roles, *objective.optional_roles),
        dict(given),
        where or found.files[0],
    )
    if known_labels := [
        role
        for role in given
        if role in labels and role not in (*modality.roles, *modality.optional_roles)
    ]:
        raise ValueError(
            f"--column {known_labels[0]}: rows to predict need no {known_labels[0]}; leave it out"
        )
    names = found.schema.names
    for role in (
        *modality.roles,
        *(role for role in modality.optional_roles if role not in labels),
    ):
        candidates = [given[role]] if role in given else [known.get(role, role), role]
        there = next((name for name in candidates if name in names), None)
        needed = role in given or role in modality.roles or (role in known and role not in PIECE)
        if there is not None and (
            needed
            or (role in PIECE and (role in known or _are_places(found, out[modality.roles[0]])))
        ):
            out[role] = there
        elif needed:
            if modality.registered_name == "table":
                raise ValueError(
                    f"{where} has no column {candidates[0]!r} with the features as a struct; "
                    "columns "
                    f"are {', '.join(names)}{_prepared(where)}"
                )
            raise ValueError(
                f"{where} has no column {candidates[0]!r} for {role}; columns are "
                f"{', '.join(names)}; say --column {role}=NAME"
            )
    return out


def _are_places(found: manifests.Manifest, name: str) -> bool:
    """Return whether the column has paths of files, not their bytes."""
    kind = found.schema.field(name).type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def recording_columns(
    modality: Modality, columns: dict[str, str], found: manifests.Manifest
) -> dict[str, str]:
    """Return the columns that identify the recording of a row.

    A column of file names identifies recordings too.
    """
    if not set(PIECE) & set(modality.optional_roles):
        return {}
    out = {role: columns[role] for role in PIECE if role in columns}
    recording, first = columns.get("recording", "recording"), columns[modality.roles[0]]
    if recording not in found.schema.names and "recording" in columns:
        raise ValueError(
            f"{found.files[0]} has no column {recording!r} for recording; columns are "
            f"{', '.join(found.schema.names)}"
        )
    if recording in found.schema.names or _are_places(found, first):
        out["recording"] = recording if recording in found.schema.names else first
    return out


def write_subtitles(output: str, parts: list[str]) -> int:
    """Write one .srt file for each recording and return their number.

    The rows of a recording are held in memory until its last one is read.
    """

    def read(part: str, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
        with storage.open_read(part) as handle:
            file = pq.ParquetFile(handle)
            return file.read(
                [name for name in wanted if name in file.schema_arrow.names]
            ).to_pylist()

    def name(row: dict[str, Any]) -> str:
        return row.get("recording") or f"row-{row['row']:06d}"

    def begin(row: dict[str, Any]) -> float:
        start = row.get("start")
        return 0.0 if start is None or math.isnan(start) else start

    ends = {
        name(row): number
        for number, part in enumerate(parts)
        for row in read(part, ("row", "recording"))
    }
    files, held = transcripts.file_names(ends, ".srt"), {}
    for number, part in enumerate(parts):
        for row in read(part, ("row", "recording", "start", "words")):
            held.setdefault(name(row), []).append(row)
        for recording in [one for one in held if ends[one] == number]:
            rows = sorted(held.pop(recording), key=begin)
            said = transcripts.cues(word for row in rows for word in row["words"] or ())
            storage.write_bytes(
                storage.join(output, *files[recording].split("/")), transcripts.srt(said).encode()
            )
    return len(files)


def to_table(block: Arrays, types: dict[str, pa.DataType]) -> pa.Table:
    return pa.table(
        {
            name: pa.array(
                array.tolist() if array.ndim > 1 or array.dtype == object else array,
                types.get(name),
            )
            for name, array in block.items()
        }
    )
