"""Use of a bundle after training: predictions on new files, and export."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save as safetensors_bytes

from pipeline import bundle, folders, hugging_face, registry, storage
from pipeline.bundle import BundleError
from pipeline.contracts import Arrays, Objective
from pipeline.data import manifest as manifests
from pipeline.data.manifest import Selection
from pipeline.data.plan import Item
from pipeline.data.stream import DataWorkers, Decoder, Rows, eval_batches, map_blocks
from pipeline.job import spec_hash
from pipeline.train import evaluate, launch
from pipeline.train.loop import Ranks
from pipeline.train.progress import Progress

ROWS_A_PART = 1024
EXPORTED = "onetomany.json"
"""Of an exported folder: where it is from, and each file's checksum."""


class _Predictor:
    """A bundle in a data worker: rows of an item to columns. Opened at the first item, once a process."""

    def __init__(self, uri: str, selection: Selection, columns: dict[str, str]):
        self.uri, self.selection, self.columns = uri, selection, columns
        self._task: Any = None

    def __getstate__(self):
        return {**self.__dict__, "_task": None}

    def __call__(self, item: Item) -> Arrays:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self._task is None:
            found = bundle.load(self.uri)
            self._task, self._modality = found.task().to(device), found.modality()
        ids = self.selection.ids(np.arange(item.start, item.stop))
        rows = Rows(Selection(self.selection.manifest, ids), Decoder(self._modality, None, {}, self.columns)).in_memory(1.0, cpus=0, keep_bad=True)
        found = evaluate.predictions(self._task, eval_batches(rows, 128), evaluate.ready_for(rows), Ranks(device=device), torch.no_grad())
        found.pop("row")
        return _table(ids, self._task.objective.written(found, evaluate.Completer(rows).origin(ids)), dict(rows.bad))


def _table(ids: np.ndarray, found: Arrays, reasons: dict[int, str]) -> Arrays:
    """One line a row, in order; a row that cannot be decoded was predicted from zeros: it has its reason and no prediction."""
    bad = np.array([int(i) in reasons for i in ids], dtype=bool)
    out: Arrays = {"row": ids, "error": np.array([reasons.get(int(i), "") for i in ids], dtype=object)}
    for name, array in found.items():
        if array.dtype == object:
            for place in np.flatnonzero(bad):
                array[place] = type(array[place])()  # an empty one of its kind, so that all parts have one schema
        else:
            array[bad] = np.nan if array.dtype.kind == "f" else -1
        out[name] = array
    return out


def check(uri: str) -> dict[str, Any]:
    """The manifest of a bundle that predictions can be made with. Raises BundleError or StorageError, a damaged file named."""
    found = bundle.load(uri)
    if found.manifest["objective"]["name"] == "none":
        raise BundleError(f"{uri}: this bundle is a backbone without a head; fine-tune it first")
    if registry.get("objective", found.manifest["objective"]["name"]).views is not Objective.views:
        raise BundleError(f"{uri}: {found.manifest['objective']['name']} compares views of a row and predicts nothing; fine-tune it first")
    return found.manifest


def predict(uri: str, data: list[str], output: str, columns: dict[str, str], form: str, progress: Progress) -> str:
    """Predict files with Ray Data into ``output``/part-NNNNN.parquet, in row order; parts that are there already are kept.

    Raises BundleError for a bundle without a head, ValueError for a missing column or an output of something else.
    """
    manifest = check(uri)
    found = manifests.build(data, form, storage.join(output, ".imports"))
    modality = bundle.build_modality(manifest["modality"])
    objective, known = registry.get("objective", manifest["objective"]["name"]), manifest.get("columns", {})
    labels = (*objective.roles, *objective.optional_roles)  # what rows to predict need not have
    needed = [*modality.roles, *(role for role in modality.optional_roles if role not in labels and (role in known or role in columns))]
    columns = {**{role: known.get(role, role) for role in needed}, **columns}
    for role in needed:
        if columns[role] not in found.schema.names:
            raise ValueError(f"{found.files[0]} has no column {columns[role]!r} for {role}; "
                             f"columns are {', '.join(found.schema.names)}; say --column {role}=NAME")
    selection = Selection(found)
    key = spec_hash(manifest["files"], found.fingerprint, columns)
    begun = storage.join(output, "_predictions.json")
    if storage.exists(begun) and storage.read_json(begun)["key"] != key:
        raise ValueError(f"{output} holds predictions of another bundle or of other files; give an empty folder")
    storage.write_json(begun, {"key": key, "bundle": uri, "files": list(found.files), "rows": found.rows,
                               "labels": manifest["objective"]["state"].get("labels")})
    items = [Item(-1, i, min(i + ROWS_A_PART, found.rows)) for i in range(0, found.rows, ROWS_A_PART)]
    todo = [item for item in items if not storage.exists(_part(output, item))]
    have = launch.resources()
    gpus = have.get("GPU", 0.0)
    actors = int(max(1, gpus if gpus else have.get("CPU", 1) // 1))
    workers = DataWorkers(min(actors, max(1, len(todo))), 1.0, int(have.get("object_store_memory", 1 << 30) // 2), 1.0 if gpus else 0.0)
    work = _Predictor(uri, selection, columns)
    bad = 0
    for item, block in zip(todo, map_blocks(work, todo, workers), strict=True):
        bad += sum(1 for reason in block["error"] if reason)
        sink = io.BytesIO()
        pq.write_table(_arrow(block, objective.written_types), sink)
        storage.write_bytes(_part(output, item), sink.getvalue())
        progress.update(f"predict: rows {item.stop}/{found.rows}  {bad} could not be read", item.stop == found.rows)
    return f"{output}: {found.rows} rows in {len(items)} parts" + (f", {len(items) - len(todo)} of them from before" if len(todo) < len(items) else "") + (
        f"; {bad} rows could not be read, see column error" if bad else "")


def _part(output: str, item: Item) -> str:
    return storage.join(output, f"part-{item.start // ROWS_A_PART:05d}.parquet")


def _arrow(block: Arrays, types: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: pa.array(array.tolist() if array.ndim > 1 or array.dtype == object else array, types.get(name)) for name, array in block.items()})


def export(uri: str, output: str, kind: str, backbone_only: bool) -> str:
    """A verified copy of a bundle, its weights as one .safetensors or .pt file, or a folder that transformers (or timm) opens.

    Raises ValueError for another kind or suffix, and where an export is there already; BundleError for what the other library has no class for.
    """
    found = bundle.load(uri)
    if kind == "bundle":
        manifest = {k: v for k, v in found.manifest.items() if k != "files"}
        with tempfile.TemporaryDirectory() as scratch:
            folder = folders.fetch_folder(uri, Path(scratch, "copy"))
            folders.commit_folder(output, {"weights.safetensors": Path(folder, "weights.safetensors").read_bytes()}, manifest)
        return f"{output}: bundle of {found.manifest['arch']['name']}, {len(found.tensors)} tensors"
    if kind == "hugging-face":
        if storage.exists(storage.join(output, EXPORTED)) or (storage.exists(output) and not storage.is_dir(output)):
            raise ValueError(f"{output} is there already; give a new folder, or remove it first")
        facts = {"kind": "export", "bundle": uri, "sha256_of_bundle": found.manifest["sha256"], "backbone_only": backbone_only, "versions": bundle.versions()}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "folder")
            folder.mkdir()
            text = hugging_face.write(found, folder, backbone_only)
            folders.commit_folder(output, {path.name: path for path in sorted(folder.iterdir())}, facts, EXPORTED)
        return f"{output}: {text}"
    if kind != "state-dict":
        raise ValueError(f"--kind {kind}: kinds are bundle, hugging-face and state-dict")
    tensors = found.tensors
    if backbone_only:
        tensors = {name.removeprefix("model."): tensor for name, tensor in found.backbone_tensors().items()}
    if output.endswith(".safetensors"):
        data = safetensors_bytes({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
    elif output.endswith((".pt", ".pth")):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getvalue()
    else:
        raise ValueError(f"{output}: a state dict is a .safetensors, .pt or .pth file")
    storage.write_bytes(output, data)
    return f"{output}: {len(tensors)} tensors"
