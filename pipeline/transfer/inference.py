"""Use of a bundle after training: predictions on new files, and features."""

from __future__ import annotations

import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import OutputFormat, spec_hash
from pipeline.core import arrow_lists
from pipeline.core.arrow_compute import pc
from pipeline.core.capabilities import (
    columns_of,
    extends_state,
    file_columns,
    is_costed,
    readable_columns,
    reports_coverage,
    shows_pictures,
)
from pipeline.core.contracts import Arrays, Modality, Objective
from pipeline.core.contracts.objective_capabilities import (
    compares_views,
    draws,
    output_types,
    writes_columns,
)
from pipeline.data import manifests
from pipeline.data.manifests import SEGMENT_ROLES, Manifest, Selection
from pipeline.data.plan import Item
from pipeline.data.stream import DataWorkers, Decoder, Rows, eval_batches, map_blocks
from pipeline.data.to_parquet import ABOUT, TEXT_KINDS
from pipeline.io import checksums, file_identity, run_lock, storage
from pipeline.io.wording import plural
from pipeline.media import drawing, transcripts
from pipeline.media.tagging_schemes import texts
from pipeline.train import evaluate, fit_components, launch, row_checks
from pipeline.train.online_probe import features
from pipeline.train.progress import Progress
from pipeline.train.ranks import Ranks, default_device
from pipeline.transfer import prediction_files
from pipeline.transfer.prediction_files import DRAWN, PROBABILITIES

ROWS_PER_FILE, ROWS_PER_FILE_IF_LARGE = 1024, 128
"""Rows of a file of predictions. There are fewer for recordings and drawn pictures: a recording of
half a minute, or a picture, takes a megabyte of memory.
"""
LAYOUT = 2
"""Version of the output columns. An output folder of another version is refused."""
IDS = ("id", "image_id", "entity", "episode")
"""Columns with the id of a row, as importers write them. Predictions have them too."""
IMPORTS = ".imports"
"""Folder of the output in which files that are not Parquet are converted, until all is written."""
INPUT = "input_"
"""Prefix of a column of the rows that has the same name as a column of the predictions."""
PICTURE = "drawn"
"""Column with the picture of a row on which its prediction is drawn, by its name in the folder."""
MODALITY_OF_FILES = {"images": "image", "audio": "audio", **dict.fromkeys(TEXT_KINDS, "text")}
"""The modality that reads files of a kind, without a table that names them."""
FILE_NOUNS = {"image": "images", "audio": "recordings", "text": "plain texts"}
"""What messages call the files of such a modality."""
MAX_NAMED, MAX_TYPE_CHARACTERS = 20, 120
"""How many classes are printed by name, and how many characters of a type."""


@dataclass(frozen=True)
class OutputOptions:
    """How predictions or features are written, and what beside them."""

    format: OutputFormat = "parquet"
    keep: tuple[str, ...] = ()
    """Columns of the rows."""
    srt: bool = False
    """Whether a file of subtitles is written for each recording, of speech."""
    draw: bool = False
    """Pictures of the rows with the predictions drawn on them."""


class BundleWorker(ABC):
    """A bundle in a data worker, which computes columns for the rows of an item.

    It is opened at the first item, once per process. ``carried`` are columns of the rows that are
    copied to the predictions, by their names there.
    """

    output_types: dict[str, pa.DataType]
    """Types of the columns that hold lists."""

    def __init__(
        self,
        uri: str,
        selection: Selection,
        columns: dict[str, str],
        carried: dict[str, str] | None = None,
    ):
        self.uri, self.selection, self.columns = uri, selection, columns
        self.carried = carried or {}
        self._opened: Any = None

    def __getstate__(self):
        return {**self.__dict__, "_opened": None}

    def __call__(self, item: Item) -> Arrays:
        device = default_device()
        if self._opened is None:
            loaded = bundle.load(self.uri)
            self._opened, self._modality = self.open(loaded).to(device), loaded.modality()
        ids = self.selection.ids(np.arange(item.start, item.stop))
        rows = Rows(
            Selection(self.selection.manifest, ids), Decoder(self._modality, None, {}, self.columns)
        ).in_memory(1.0, cpus=0, keep_bad=True)
        columns = self.compute(self._opened, rows, ids, device)
        return {**_with_errors(ids, columns, dict(rows.bad)), **self._recording_columns(ids)}

    @abstractmethod
    def open(self, loaded: bundle.Bundle) -> torch.nn.Module:
        """Return the network, or the part of it that is needed."""

    @abstractmethod
    def compute(self, opened: Any, rows: Rows, ids: np.ndarray, device: torch.device) -> Arrays:
        """Return columns of the rows, in the order of their ids."""

    def _recording_columns(self, ids: np.ndarray) -> Arrays:
        """Return the recording, start and length of each row, (n,) each, by column name.

        Start and length are in seconds, NaN where the rows do not have them. The result is empty
        where rows are no pieces of recordings.
        """
        if not self.carried:
            return {}
        names = list(dict.fromkeys(self.carried.values()))
        table = manifests.Reader(self.selection.manifest, names).take(ids)
        out: Arrays = {}
        for name, column in self.carried.items():
            values = table[column].to_pylist()
            if name == "recording":
                texts_of_rows = ["" if value is None else str(value) for value in values]
                out[name] = np.array(texts_of_rows, dtype=object)
            else:
                numbers = [np.nan if value is None else value for value in values]
                out[name] = np.array(numbers, dtype=np.float64)
        return out


class Predictor(BundleWorker):
    """Predicts the rows of an item."""

    def __init__(
        self,
        uri: str,
        selection: Selection,
        columns: dict[str, str],
        carried: dict[str, str] | None = None,
        draw: bool = False,
    ):
        super().__init__(uri, selection, columns, carried)
        self.draw = draw

    def open(self, loaded: bundle.Bundle) -> torch.nn.Module:
        return loaded.task()

    def compute(self, opened: Any, rows: Rows, ids: np.ndarray, device: torch.device) -> Arrays:
        predictions = evaluate.predictions(
            opened,
            eval_batches(rows, 128),
            evaluate.device_preprocessing(rows),
            Ranks(device=device),
            torch.no_grad(),
        )
        predictions.pop("row")
        objective = opened.objective
        if not writes_columns(objective):
            return predictions
        raw_rows = evaluate.Postprocessor(rows).raw_rows(objective, ids)
        columns = objective.output_columns(predictions, raw_rows)
        if self.draw:
            columns[PICTURE] = self._drawn(objective, columns, ids)
        return columns

    def _drawn(self, objective: Any, columns: Arrays, ids: np.ndarray) -> np.ndarray:
        """Return (n,) JPEG files of the rows with their predictions, b"" where there is none."""
        out = np.full(len(ids), b"", dtype=object)
        names = list(file_columns(self._modality, self.columns))
        table = manifests.Reader(self.selection.manifest, names).take(ids)
        assert shows_pictures(self._modality) and draws(objective)
        for row, picture in enumerate(self._modality.pictures(table, self.columns)):
            if picture is not None:
                of_row = {name: values[row] for name, values in columns.items()}
                out[row] = drawing.jpeg(objective.draw(picture, of_row))
        return out


class Embedder(BundleWorker):
    """Computes the pooled features of the rows of an item."""

    output_types = {"features": pa.list_(pa.float32())}

    def open(self, loaded: bundle.Bundle) -> torch.nn.Module:
        return loaded.backbone()

    def compute(self, opened: Any, rows: Rows, ids: np.ndarray, device: torch.device) -> Arrays:
        return {"features": features(opened, rows, device)[0].cpu().numpy()}


def _with_errors(ids: np.ndarray, columns: Arrays, reasons: dict[int, str]) -> Arrays:
    """Return the columns with the ids of rows and, for rows that cannot be decoded, the reason.

    Such a row was predicted from zeros: its values are replaced by empty ones, which for numbers
    are NaN or -1, and False for what is true or false.
    """
    bad = np.array([int(i) in reasons for i in ids], dtype=bool)
    out: Arrays = {
        "row": ids,
        "error": np.array([reasons.get(int(i), "") for i in ids], dtype=object),
    }
    for name, array in columns.items():
        if array.dtype.kind == "u":
            array = array.astype(np.int64)  # in all files, for one schema; unsigned there is no -1
        if array.dtype == object:
            for index in np.flatnonzero(bad):
                # of the same type, so that all files have one schema
                array[index] = type(array[index])()
        else:
            array[bad] = {"f": np.nan, "b": False}.get(array.dtype.kind, -1)
        out[name] = array
    return out


def check(uri: str, options: OutputOptions | None = None) -> bundle.Manifest:
    """Return the manifest of a bundle after checking that it can make predictions.

    Raises:
        BundleError: The bundle has no head, or cannot make what the options ask for.
        StorageError: A file is missing or damaged.
    """
    options = options or OutputOptions()
    loaded = bundle.load(uri)
    name = loaded.manifest.objective.name
    if name == "none":
        raise BundleError(f"{uri}: this bundle is a backbone without a head; fine-tune it first")
    objective = registry.get("objective", name)
    if compares_views(objective):
        raise BundleError(
            f"{uri}: {name} compares views of a row and predicts nothing; fine-tune it first"
        )
    stated = loaded.manifest.objective.options
    if any(stated.get(option) for option in registry.path_options("objective", name)):
        try:
            loaded.task()  # a file that cannot be read is reported now, not by each data worker
        except ValueError as error:
            raise BundleError(f"{uri}: {error}") from None
    if options.srt and "words" not in output_types(objective):
        raise BundleError(
            f"{uri}: --srt writes what was said and when, and this bundle's {name} transcribes "
            "nothing; leave --srt out"
        )
    if options.draw and not (draws(objective) and shows_pictures(loaded.modality())):
        raise BundleError(
            f"{uri}: --draw draws boxes or masks on images, and this bundle's {name} finds none; "
            "leave --draw out"
        )
    return loaded.manifest


@dataclass(frozen=True)
class NewRows:
    """New rows, and the columns of them that are read."""

    places: list[str]
    """Files, folders or globs, as they were given."""
    manifest: Manifest
    selection: Selection
    columns: dict[str, str]
    """Role to column."""
    copied_columns: dict[str, str]
    """Columns that are copied, by their names in the output."""
    modality: Modality
    objective: type[Objective]
    files_read: list[file_identity.FileIdentity]
    """The files of the rows and those that they name, to check that none changes meanwhile."""


def _read_input(
    trained: bundle.Manifest,
    data: list[str],
    output: str,
    columns: dict[str, str],
    form: str,
    progress: Progress,
    keep: tuple[str, ...] = (),
    reads_labels: bool = False,
) -> NewRows:
    """Find new rows and their columns.

    Args:
        trained: The manifest of the bundle.
        data: Files, folders or globs.
        output: Folder in which files are first turned into Parquet.
        columns: Role to column, where it has another name than in training.
        form: The format of the files, as in a job.
        progress: Where the reading of files is shown.
        keep: Further columns to copy.
        reads_labels: Also read labels that are an input of the network, where the rows have them.

    Raises:
        ValueError: A column is missing or has another type than the bundle reads.
    """
    imports = storage.join(output, IMPORTS)
    modality = trained.build_modality()
    empty_texts = readable_columns(modality, {**trained.columns, **columns})
    with file_identity.progress_to(progress.update):
        rows, imported = manifests.build_with_files(data, form, imports, empty_texts=empty_texts)
        named_files = imported.named
        name = trained.objective.name
        objective = Objective if name == "none" else registry.get("objective", name)
        where = rows.files[0] if rows.files else data[0]
        if where.startswith(imports):
            where = data[0]
            rows = rows if named_files else _identified_by_content(rows)
        with _removed_where_refused(rows, imports):
            if rows.num_rows == 0:
                raise ValueError(f"{where}: there are no rows in it")
            columns = columns_of_roles(
                modality, objective, trained.columns, columns, rows, where, reads_labels
            )
            _check_types(modality, columns, rows, where)
            copied = kept_columns(modality, columns, rows, keep, where)
        files_read = [*(file for file in rows.identities if file is not None), *named_files]
        selection = Selection(rows)
        if not named_files:
            of_files = file_columns(modality, columns)
            (selection,), named_files = manifests.with_named_files([selection], of_files, "content")
            rows, files_read = selection.manifest, [*files_read, *named_files]
    return NewRows(data, rows, selection, columns, copied, modality, objective, files_read)


def _identified_by_content(rows: Manifest) -> Manifest:
    """Return the converted rows of tables and texts with the hash of those files as fingerprint.

    It names their folder. The bytes of the converted rows differ between versions of pyarrow, which
    must not make rows that are predicted already those of other files.
    """
    return replace(rows, fingerprint=posixpath.basename(posixpath.dirname(rows.files[0])))


@contextmanager
def _removed_where_refused(rows: manifests.Manifest, imports: str) -> Iterator[None]:
    """Remove converted rows where the command is refused: they have all columns."""
    try:
        yield
    except ValueError:
        for file in rows.files:
            if file.startswith(imports):
                storage.remove_tree(posixpath.dirname(file))
        storage.remove_empty_folder(imports)
        raise


@contextmanager
def _only_writer(output: str, progress: Progress) -> Iterator[None]:
    """Let no other command write into the output folder meanwhile.

    A new folder that stays empty, since the command is refused, is removed.

    Two of equal options would remove each other's converted rows, and two of others that begin
    together would write their parts side by side.

    Raises:
        run_lock.BusyError: Another command is writing there.
    """
    storage.refuse_read_only(output)
    is_new = not storage.exists(output)
    try:
        with run_lock.hold(output, progress.note):
            yield
    finally:
        if is_new:
            storage.remove_empty_folder(output)


def predict(
    uri: str,
    data: list[str],
    output: str,
    columns: dict[str, str],
    form: str,
    progress: Progress,
    options: OutputOptions | None = None,
) -> str:
    """Predict files with Ray Data into ``output``/part-NNNNN.parquet, in row order.

    Parts that exist already are kept. Predictions also have these columns, where the rows have
    them: ``file`` (path of the file, for folders of files), the id of the row (``IDS``), texts
    (`readable_columns`), the columns that are asked for, and for recordings ``recording``,
    ``start`` and ``seconds``. A kept column with the name of a prediction is written as
    ``input_NAME``. The names of the classes of ``probabilities`` are JSON in the metadata of
    Parquet files (``classes``) and in the returned value.

    With ``srt``, the folder ``_subtitles`` has an .srt file for each recording, of its rows in the
    order of ``start``. With ``draw``, the folder ``_drawn`` has a JPEG file for each row, which the
    column ``drawn`` names.

    Raises:
        BundleError: The bundle has no head, or cannot make what the options ask for.
        ValueError: A column is missing or has another type than the bundle reads, or the output
            folder belongs to other predictions.
    """
    options = options or OutputOptions()
    trained = check(uri, options)
    classes = trained.objective.state.get("labels")
    with _only_writer(output, progress):
        rows = _read_input(trained, data, output, columns, form, progress, options.keep)
        carried = recording_columns(rows.modality, rows.columns, rows.manifest)
        worker = Predictor(uri, rows.selection, rows.columns, carried, options.draw)
        worker.output_types = output_types(rows.objective)
        written, parts = _write(uri, trained, worker, rows, output, options, progress, classes)
        if options.srt:
            written += f"; {prediction_files.write_subtitles(output, parts)} recordings as .srt in "
            written += storage.join(output, prediction_files.SUBTITLES)
    if options.draw:
        written += f"; pictures in {storage.join(output, DRAWN)}"
    return written + _named_classes(classes, parts)


def embed_files(
    uri: str,
    data: list[str],
    output: str,
    columns: dict[str, str],
    form: str,
    progress: Progress,
    options: OutputOptions | None = None,
) -> str:
    """Write the features of new rows with Ray Data, in row order, as `predict` writes predictions.

    Raises:
        ValueError: A column is missing or has another type than the bundle reads, or the output
            folder belongs to something else.
    """
    options = options or OutputOptions()
    trained = bundle.load(uri).manifest
    with _only_writer(output, progress):
        rows = _read_input(
            trained, data, output, columns, form, progress, options.keep, reads_labels=True
        )
        carried = recording_columns(rows.modality, rows.columns, rows.manifest)
        worker = Embedder(uri, rows.selection, rows.columns, carried)
        return _write(uri, trained, worker, rows, output, options, progress)[0]


def _write(
    uri: str,
    trained: bundle.Manifest,
    worker: BundleWorker,
    rows: NewRows,
    output: str,
    options: OutputOptions,
    progress: Progress,
    classes: list[str] | None = None,
) -> tuple[str, list[str]]:
    """Write the columns that a worker computes for new rows.

    Returns:
        A description of what was written, and the URIs of the files.

    Raises:
        ValueError: The output folder belongs to something else.
    """
    count, name = rows.manifest.num_rows, type(worker).__name__
    choices = (name, options.format, options.draw)
    key = spec_hash(
        trained.files,
        rows.manifest.fingerprint,
        rows.columns,
        rows.copied_columns,
        LAYOUT,
        choices,
    )
    begun = storage.join(output, "_predictions.json")
    imports = storage.join(output, IMPORTS)
    with _removed_where_refused(rows.manifest, imports):
        if storage.exists(begun) and checksums.read_document(begun).get("key") != key:
            raise ValueError(
                f"{output} holds the output of another bundle, of other files, or with other "
                "options (--keep, --format, --draw); give an empty folder"
            )
    document = {
        "key": key,
        "bundle": uri,
        "files": rows.places,
        "rows": count,
        "labels": classes,
    }
    checksums.write_document(begun, document)
    is_large = is_costed(rows.modality) or options.draw
    step = ROWS_PER_FILE_IF_LARGE if is_large else ROWS_PER_FILE
    items = [Item(-1, i, min(i + step, count)) for i in range(0, count, step)]
    parts = {
        item: storage.join(output, f"part-{number:05d}.{options.format}")
        for number, item in enumerate(items)
    }
    done = {item: part for item, part in parts.items() if storage.exists(part)}
    todo = [item for item in items if item not in done]
    readable = readable_columns(rows.modality, rows.columns)
    reader = manifests.Reader(rows.manifest, list(dict.fromkeys(rows.copied_columns.values())))
    bad = sum(
        1
        for part in done.values()
        for row in prediction_files.read(part, ("error",))
        if row["error"]
    )
    for item, block in zip(todo, map_blocks(worker, todo, _data_workers(len(todo))), strict=True):
        bad += sum(1 for reason in block["error"] if reason)
        ids = rows.selection.ids(np.arange(item.start, item.stop))
        raw_rows = reader.take(ids) if rows.copied_columns else None
        pictures = block.pop(PICTURE, None)
        table = to_table(block, worker.output_types)
        table = with_kept_columns(table, raw_rows, rows.copied_columns, readable)
        if pictures is not None:
            names = _write_pictures(output, pictures, table)
            table = table.append_column(PICTURE, pa.array(names, pa.string()))
        data = prediction_files.encode(table, options.format, classes)
        storage.write_bytes(parts[item], data)
        progress.update(
            f"rows {item.stop}/{count}  {bad} could not be read",
            item.stop == count,
        )
    file_identity.check_unchanged(rows.files_read)
    names = [posixpath.basename(part) for part in parts.values()]
    where = names[0] if len(names) == 1 else f"{len(names)} files, {names[0]} to {names[-1]}"
    text = f"{output}: {plural(count, 'row')} in {where}"
    text += f" ({plural(len(done), 'file')} from an earlier run)" if done else ""
    text += f"; {plural(bad, 'row')} could not be read, see column error" if bad else ""
    text += _coverage(rows) + _unread_texts(rows)
    # the converted rows have all columns, also those that nobody asked to keep
    storage.remove_tree(imports)
    return text, list(parts.values())


def _coverage(rows: NewRows) -> str:
    """Describe how the names in a sample of the new rows differ from those of training.

    Returns an empty string where the modality has no names, or knows all of them.
    """
    modality, columns, count = rows.modality, rows.columns, len(rows.selection)
    if not reports_coverage(modality) or not count:
        return ""
    roles = fit_components.fitted_roles(type(modality))
    names = columns_of(roles, columns)
    table = fit_components.sample(rows.selection, names, fit_components.FIT_ROWS)
    coverage = modality.coverage(table, columns)
    sampled = f" (of {len(table):,} rows)" if len(table) < count else ""
    return f"; compared with the training rows: {coverage}{sampled}" if coverage else ""


def _unread_texts(rows: NewRows) -> str:
    """Return a sentence on how much of a sample of new texts the network does not read, or ""."""
    findings = row_checks.text_findings(
        rows.modality,
        {"new rows": rows.selection},
        rows.columns,
        packed=False,
        length_advice="cut the texts into rows",
    )
    return "".join(f"; {finding.text}" for finding in findings)


def _data_workers(items: int) -> DataWorkers:
    """Return how many processes work on so many items: one for each GPU, or each core."""
    have = launch.cluster_resources()
    gpus = have.get("GPU", 0.0)
    actors = int(max(1, gpus if gpus else have.get("CPU", 1) // 1))
    return DataWorkers(
        min(actors, max(1, items)),
        1.0,
        int(have.get("object_store_memory", 1 << 30) // 2),
        1.0 if gpus else 0.0,
    )


def _write_pictures(output: str, pictures: np.ndarray, table: pa.Table) -> list[str | None]:
    """Write the pictures of a part; return their names in the output folder, None for no picture.

    A name has the number of the row, so that none is taken twice, and the name of its file.
    """
    out: list[str | None] = []
    files = table["file"].to_pylist() if "file" in table.column_names else [None] * len(table)
    for data, row, file in zip(pictures, table["row"].to_pylist(), files, strict=True):
        stem = f"-{transcripts.file_names([file], '')[file]}" if file else ""
        name = f"{DRAWN}/{row:06d}{stem}.jpg"
        if data:
            storage.write_bytes(storage.join(output, *name.split("/")), data)
        out.append(name if data else None)
    return out


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
    trained = bundle.read_manifest(uri)
    with storage.scratch_folder() as scratch:
        rows = _read_input(trained, data, str(scratch), columns, form, progress, reads_labels=True)
        worker = Embedder(uri, rows.selection, rows.columns)
        starts = range(0, rows.manifest.num_rows, ROWS_PER_FILE)
        items = [Item(-1, i, min(i + ROWS_PER_FILE, rows.manifest.num_rows)) for i in starts]
        return np.concatenate([worker(item)["features"] for item in items])


def _named_classes(classes: list[str] | None, parts: list[str]) -> str:
    """Return a sentence on the class of each number in ``probabilities``.

    It is empty where the predictions do not have that column, or name the classes there.
    """
    if not classes or not parts or not parts[0].endswith(".parquet"):
        return ""
    with storage.open_read(parts[0]) as handle:
        names = pq.read_schema(handle).names
    if PROBABILITIES not in names:
        return ""
    first = ", ".join(classes[:MAX_NAMED])
    rest = (
        f" and {len(classes) - MAX_NAMED} more (all in the files' metadata, key classes)"
        if len(classes) > MAX_NAMED
        else ""
    )
    return f"; probabilities are of the classes, in this order: {first}{rest}"


def kept_columns(
    modality: Modality,
    columns: dict[str, str],
    manifest: manifests.Manifest,
    keep: tuple[str, ...],
    where: str,
) -> dict[str, str]:
    """Return the columns of the rows that are copied to the predictions, by their names there.

    Raises:
        ValueError: There is no such column.
    """
    names, out = manifest.schema.names, {}
    files = file_columns(modality, columns)
    if files and _has_path(manifest.schema.field(files[0]).type):
        out["file"] = files[0]
    out |= {name: name for name in (*IDS, *_prepared_id(manifest)) if name in names}
    out |= {name: name for name in readable_columns(modality, columns)}
    for name in keep:
        if name not in names:
            raise ValueError(
                f"--keep {name}: {where} has no such column; columns are {', '.join(names)}"
            )
        out[name] = name
    return out


def _prepared_id(manifest: manifests.Manifest) -> tuple[str, ...]:
    """Return the column that names the rows, as `onetomany prepare table --set id=` keeps it."""
    if not manifest.files:
        return ()
    with storage.open_read(manifest.files[0]) as handle:
        metadata = pq.read_schema(handle).metadata or {}
    name = json.loads(metadata.get(ABOUT.encode(), b"{}")).get("id")
    return (name,) if name else ()


def _has_path(kind: pa.DataType) -> bool:
    """Return whether a column of files has paths, as texts or in Hugging Face's structs."""
    if pa.types.is_struct(kind):
        return "path" in {field.name for field in kind}
    return arrow_lists.is_text(kind)


def with_kept_columns(
    predictions: pa.Table,
    rows: pa.Table | None,
    kept: dict[str, str],
    readable: Collection[str] = (),
) -> pa.Table:
    """Return predictions with the rows' own columns after ``row``.

    A column of the rows with the name of a prediction is written as ``input_NAME``: ``text`` of a
    transcribed recording is the transcript, ``input_text`` is the text of the rows. Columns that
    are ``readable`` are written as texts or lists of texts, whatever the rows have them in.
    """
    out, written_as = predictions, _names_of_kept(list(kept), predictions.column_names)
    for position, (name, column) in enumerate(kept.items(), 1):
        assert rows is not None
        values = rows[column]
        if name == "file" and pa.types.is_struct(values.type):
            values = pc.struct_field(values, "path")
        elif column in readable:
            is_words = arrow_lists.is_list(values.type)
            values = pa.array(texts(values), pa.list_(pa.string()) if is_words else pa.string())
        out = out.add_column(position, pa.field(written_as[name], values.type), values)
    return out


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
    modality: Modality, columns: dict[str, str], manifest: manifests.Manifest, where: str
) -> None:
    """Raise ValueError for a column of another type than the bundle reads, before rows are read.

    The message has the file, the column and both types.
    """
    for role, name in columns.items():
        if name not in manifest.schema.names:
            continue
        kind = manifest.schema.field(name).type
        needed = modality.required_type(role, kind)
        if not needed:
            continue
        is_plain_table = modality.registered_name == "table" and not pa.types.is_struct(kind)
        advice = _prepared(where) if is_plain_table else ""
        raise ValueError(
            f"{where}: column {name} holds {_short(kind)}, and this bundle's {role} needs "
            f"{needed}{advice}"
        )


def _short(kind: Any) -> str:
    """Return the text of a type, shortened where it is long (structs of many fields)."""
    text = str(kind)
    return text if len(text) <= MAX_TYPE_CHARACTERS else f"{text[:MAX_TYPE_CHARACTERS]}..."


def _prepared(where: str) -> str:
    """Return a sentence on how a plain table is converted."""
    return (
        f". Plain tables are brought into this form by: onetomany prepare table {where} -o FOLDER "
        "(with the options of the training rows)"
    )


def columns_of_roles(
    modality: Modality,
    objective: type[Objective],
    known: dict[str, str],
    given: dict[str, str],
    manifest: manifests.Manifest,
    where: str = "",
    reads_labels: bool = False,
) -> dict[str, str]:
    """Return the column of each role that rows to predict need.

    It is the one in ``given``, or the one of training, or one with the name of the role (as in an
    imported folder). The roles of a segment of a recording are taken where training had them, and
    for a folder of files, which may have been cut into segments. Labels that are an input of the
    network (a policy's actions before each step) are taken where they are given, and with
    ``reads_labels`` where training and the rows have them.

    Raises:
        ValueError: There is no such column, or a label is named, which rows to predict do not need.
    """
    out, where = dict(given), where or manifest.files[0]
    labels = (*objective.roles, *objective.optional_roles)
    all_roles = (*modality.roles, *modality.optional_roles)
    inputs = (*modality.roles, *(modality.fit_roles if extends_state(modality) else ()))
    named_labels = [role for role in given if role in labels and role not in inputs]
    has_segments = set(SEGMENT_ROLES) & set(modality.optional_roles)
    of_rows = (*all_roles, *(("recording",) if has_segments else ()))
    unknown = [role for role in given if role not in (*of_rows, *inputs, *labels)]
    if unknown:
        raise ValueError(
            f"--column {unknown[0]}: no such role; {modality.registered_name} reads "
            f"{', '.join(of_rows)}"
        )
    if named_labels:
        raise ValueError(
            f"--column {named_labels[0]}: rows to predict need no {named_labels[0]}; leave it out"
        )
    names = manifest.schema.names
    for role in all_roles:
        is_label = role in labels and role not in modality.roles
        takes_label = role in given or (reads_labels and role in known and role in inputs)
        if is_label and not takes_label:
            continue
        candidates = [given[role]] if role in given else [known.get(role, role), role]
        column = next((name for name in candidates if name in names), None)
        was_in_training = role in known
        is_segment = role in SEGMENT_ROLES
        is_optional_input = was_in_training and not is_segment and not is_label
        is_needed = role in given or role in modality.roles or is_optional_input
        if column is None:
            if is_needed:
                raise _missing_column(modality, role, candidates[0], manifest, where)
            continue
        may_be_segment = is_segment and (
            was_in_training or _names_files(manifest, out[modality.roles[0]])
        )
        if is_needed or is_label or may_be_segment:
            out[role] = column
    return out


def _missing_column(
    modality: Modality, role: str, name: str, manifest: Manifest, where: str
) -> ValueError:
    """Return the error for a role whose column is not there."""
    origin = manifest.origins[0] if manifest.origins else None
    given = MODALITY_OF_FILES.get(origin.kind) if origin else None
    own = modality.registered_name
    if given and given != own:
        files = f"{FILE_NOUNS[own]}, or " if own in FILE_NOUNS else ""
        return ValueError(
            f"{where}: {FILE_NOUNS[given]} were given, and this network reads {files}tables "
            f"(.parquet, .csv, .jsonl) with a column {name!r}"
        )
    names = manifest.schema.names
    if own == "table":
        return ValueError(
            f"{where} has no column {name!r} with the features as a struct; columns "
            f"are {', '.join(names)}{_prepared(where)}"
        )
    return ValueError(
        f"{where} has no column {name!r} for {role}; columns are "
        f"{', '.join(names)}; give --column {role}=NAME"
    )


def _names_files(manifest: manifests.Manifest, name: str) -> bool:
    """Return whether the column has paths of files, not their bytes."""
    return arrow_lists.is_text(manifest.schema.field(name).type)


def recording_columns(
    modality: Modality, columns: dict[str, str], manifest: manifests.Manifest
) -> dict[str, str]:
    """Return the columns that identify the recording of a row.

    A column of file names identifies recordings too.

    Raises:
        ValueError: There is no such column.
    """
    if not set(SEGMENT_ROLES) & set(modality.optional_roles):
        return {}
    out = {role: columns[role] for role in SEGMENT_ROLES if role in columns}
    recording = columns.get("recording", "recording")
    if recording not in manifest.schema.names and "recording" in columns:
        raise ValueError(
            f"{manifest.files[0]} has no column {recording!r} for recording; columns are "
            f"{', '.join(manifest.schema.names)}"
        )
    if (name := manifests.recording_column(modality, columns, manifest)) is not None:
        out["recording"] = name
    return out


def to_table(block: Arrays, types: dict[str, pa.DataType]) -> pa.Table:
    """Return a block of columns as a table; ``types`` are those of lists that may all be empty."""
    return pa.table(
        {
            name: pa.array(
                array.tolist() if array.ndim > 1 or array.dtype == object else array,
                types.get(name) or _type_of(array),
            )
            for name, array in block.items()
        }
    )


def _type_of(array: np.ndarray) -> pa.DataType | None:
    """Return the type of lists of an array with several dimensions; None: that of its values."""
    if array.dtype == object or array.ndim == 1:
        return None
    kind = pa.from_numpy_dtype(array.dtype)
    for _ in range(array.ndim - 1):
        kind = pa.list_(kind)
    return kind
