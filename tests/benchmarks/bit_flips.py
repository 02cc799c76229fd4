"""Flips single bits in everything that a job, a source and `prepare` write, and reads it back: is
the damage found?

    python tests/benchmarks/bit_flips.py [flips] [seed]        500 flips take about ten minutes on two cores

A small job is run in this process into a temporary folder: a trained source, an imported text
corpus with its tokens, trials with predictions, bundles and cached features, the table, a resume
point, prepared parts. Then, again and again, one bit of one file is flipped and what reads that
kind of file is called. Its outcome is one of

  detected   an error of one line that names the file, or a line that says so and the thing is made again or counts as not done
  harmless   what is read is the same as before (white space, a field that nobody reads)
  silent     what is read is another value, and nothing is said
  traceback  an error of another kind

Logs and reports are for people; nothing reads them back. Exit code 1 when anything is silent or a
traceback.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import image_files, sentences  # the tests' own

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.config.schema import Job
from pipeline.data import duplicates, manifests
from pipeline.data.stream import DataWorkers
from pipeline.io import checksums, run_lock, storage
from pipeline.prepare.engine import importing, write
from pipeline.report import results
from pipeline.train import checkpoint, pretrain, source
from pipeline.train.progress import Progress
from pipeline.train.ranks import Ranks
from pipeline.transfer import cached_heads, existing_trials, fanout, pruning, stages, trial

OUTCOMES = ("detected", "harmless", "silent", "traceback")
COLUMNS = {"image": "picture", "label": "class"}
READ_BY_PEOPLE = "logs and reports"


class Silent(Progress):
    def update(self, line: str, final: bool = False) -> None:
        pass

    def note(self, line: str) -> None:
        pass


# ---------------------------------------------------------------- what is written


def make_job(folder: Path, images: dict[str, str], texts: str) -> Job:
    pictures = {
        **images,
        "modality": {"image": {"size": 32}},
        "columns": COLUMNS,
        "decode": "train",
    }
    train = {"steps": 2, "global_batch": 12, "eval_every_steps": 2}
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "techniques": ["scratch", "linear_probe", "full"],
            "sources": {
                "pictures": {
                    "data": pictures,
                    "backbone": "timm/test_vit",
                    "objective": "classification",
                    "train": train,
                },
                "texts": {
                    "data": {
                        "uri": texts,
                        "modality": {"text": {"length": 24, "vocabulary": 300}},
                        "columns": {"text": "text"},
                        "validation_fraction": 0.2,
                        "decode": "train",
                    },
                    "backbone": {"transformers/bert": {"layers": 1, "hidden": 16, "heads": 2}},
                    "objective": "mlm",
                    "train": train,
                },
            },
            "targets": {
                "task": {
                    "data": {**images, "modality": "image", "columns": COLUMNS},
                    "objective": "classification",
                    "drop_overlap": "exact",
                    "train": {**train, "lr": 0.01},
                }
            },
            "fanout": {"seeds": 2},
        }
    )


def run_here(
    name: str,
    wanted: list[Any],
    shared: Any,
    spec: Any,
    progress: Any,
    anew: Any = (),
    *resources: Any,
) -> list[Any]:
    """Trials one after the other in this process, as Ray would run them."""
    todo = [one for one in wanted if one.id in anew or fanout.unfinished(shared.root, one, spec)]
    for unit in fanout.group_into_work_items(todo, shared):
        if unit.is_stack:
            cached_heads.run(list(unit.trials), shared)
        else:
            trial.run(unit.first, shared, Ranks())
    return [trial.read_record(shared.root, one.folder) for one in wanted]


def run_job(job: Job) -> Any:
    """Everything that a job writes; what its trials shared."""
    state = stages.check(job, Silent())
    for stage in state.sources.values():
        source.begin(stage)
        fitted = source.prepare_source(stage)
        work = pretrain.rank_job(stage, fitted, DataWorkers(), 1)
        pretrain.train_rank(work, Ranks(), decoded_rows=pretrain.decode_once(work))
    shared = stages.prepare_shared(state)
    real, fanout.run = fanout.run, run_here
    try:
        rows = stages.collect(state, stages.finetune(state, shared))
    finally:
        fanout.run = real
    stages.write_report(state, rows)
    return shared


def write_all(folder: Path) -> dict[str, Callable[[], Any]]:
    """Write everything below ``folder``; for each kind of file what reads it back."""
    images = image_files(folder / "data", {"train": 36, "validation": 18, "test": 18})
    texts = folder / "data" / "texts.txt"
    texts.write_text("\n".join(sentences(160, seed=3)[0]))
    job = make_job(folder, images, str(texts))
    shared = run_job(job)
    points = str(folder / "runs" / "points")
    for step in (1, 2):
        checkpoint.save(points, Ranks(), {"step": step, "model": {"w": torch.arange(64.0) * step}})
    raw = folder / "data" / "raw.csv"
    raw.write_text("text,label\n" + "\n".join(f"row {i} of the table,{i % 3}" for i in range(200)))
    prepared = str(folder / "prepared")
    prepare = Prepare(str(raw), prepared)
    prepare()
    return {
        "record.json": lambda: read_job(job),
        "predictions.npz": lambda: read_job(job),
        "facts.json": lambda: read_job(job),
        "results.parquet": lambda: read_job(job),
        "imported table": lambda: read_texts(job),
        "tokens": lambda: read_texts(job),
        "fitted modality": lambda: [
            source.prepare_source(source.plan_source(job, name)).modality for name in job.sources
        ],
        "what began a source": lambda: begun(job),
        "what a job starts from": lambda: pruning.uses(storage.join(job.storage, "another"), {}),
        "bundle of a source": lambda: read_sources(job),
        "bundle of a trial": lambda: read_trials(job),
        "cached features": lambda: read_features(shared),
        "signs of rows": lambda: read_signs(job),
        "scores and shift": lambda: read_scores(job),
        "resume point": lambda: read_points(points),
        "prepared part": prepare,
        "prepare's own files": prepare,
        READ_BY_PEOPLE: lambda: None,
    }


def kind_of(path: Path, folder: Path) -> str:
    """What a file is, by its place."""
    text = "/" + str(path.relative_to(folder))
    for piece, kind in (
        ("/prepared/_", "prepare's own files"),
        ("/prepared/", "prepared part"),
        ("/points/", "resume point"),
        ("/imports/", "imported table"),
        ("/tokens/", "tokens"),
        ("/features/", "cached features"),
        ("/scores/", "scores and shift"),
        ("/log/", READ_BY_PEOPLE),
        ("/tensorboard/", READ_BY_PEOPLE),
        ("metrics.jsonl", READ_BY_PEOPLE),
        ("/report.", READ_BY_PEOPLE),
        ("record.json", "record.json"),
        ("facts.json", "facts.json"),
        ("predictions.npz", "predictions.npz"),
        ("results.parquet", "results.parquet"),
        ("trials.csv", READ_BY_PEOPLE),
        ("modality.json", "fitted modality"),
        ("made_by.json", "what began a source"),
        ("uses.json", "what a job starts from"),
    ):
        if piece in text:
            return kind
    if "/bundle/" in text:
        return "bundle of a source" if "/sources/" in text else "bundle of a trial"
    if "/overlap/" in text or "/signs/" in text:
        return "signs of rows"
    raise AssertionError(f"{text}: no reader is known for this file; add one")


# ---------------------------------------------------------------- what reads it back


def read_job(job: Job) -> Any:
    """What the table and the report are made of, and which trials need no run."""
    state = stages.check(job, Silent())
    done = {one.id: ended for one, ended in existing_trials.trial_status(state)}
    rows = stages.collect_existing_rows(state)
    runs = {
        row.trial_id: trial.read_predictions(job.root, row.folder, 0)
        for row in rows
        if row.trial_stage == "final"
    }
    arrays = {name: (run.rows, run.predictions) for name, run in runs.items() if run is not None}
    return done, rows, results.read(job.root), state.notes, state.scores, arrays


def read_texts(job: Job) -> Any:
    """The rows that a source of texts is trained on, and how they are read."""
    fitted = source.prepare_source(source.plan_source(job, "texts"))
    table = manifests.read_columns(fitted.train, fitted.train.manifest.schema.names)
    return fitted.modality, table.to_pylist(), fitted.objective


def begun(job: Job) -> Any:
    return [source.begin(source.plan_source(job, name)) for name in job.sources]


def read_sources(job: Job) -> Any:
    found = [bundle.load(source.plan_source(job, name).bundle_uri) for name in job.sources]
    return [(one.manifest, one.tensors) for one in found]


def read_trials(job: Job) -> Any:
    folders = sorted(Path(job.root, "trials").rglob("bundle"))
    return [(found.manifest, found.tensors) for found in map(bundle.load, map(str, folders))]


def read_features(shared: Any) -> Any:
    base = next(key for (_, key) in shared.targets)
    backbone = bundle.build_backbone(shared.targets["task", base].arch, seed=5)
    backbone.load_state_dict(
        {name: torch.from_numpy(array.copy()) for name, array in shared.weights["pictures"].items()}
    )
    device = torch.device("cpu")
    return [
        cached_heads.kept_features(backbone.eval(), shared, "pictures", base, "task", split, device)
        for split in ("train", "validation", "test")
    ]


def read_signs(job: Job) -> Any:
    """As the comparison of a target's test rows with those of a source reads them."""
    real, read = duplicates.row_signatures, []

    def remember(*words: Any, **named: Any) -> Any:
        read.append(real(*words, **named))
        return read[-1]

    duplicates.row_signatures = remember
    try:
        stages.prepare_shared(stages.check(job, Silent()))
    finally:
        duplicates.row_signatures = real
    assert read, "rows are compared"
    return [vars(one) for one in read]


def read_scores(job: Job) -> Any:
    """As a job whose trials are all done reads them; the seconds that they took do not count."""
    state = stages.check(job, Silent())
    shared = stages.prepare_shared(state)
    real, fanout.run = fanout.run, run_here
    try:
        stages.finetune(state, shared)
    finally:
        fanout.run = real
    return {
        pair: (one.scores, [shift.to_json() for shift in one.shifts])
        for pair, one in state.source_scores.items()
    }


def read_points(uri: str) -> Any:
    found = checkpoint.load(uri, Ranks())
    state, notes = found if isinstance(found, tuple) else (found, [])
    for line in notes:
        checksums.notify(line)
    return state


class Prepare:
    """`prepare` of a CSV, given again, and what a job reads of it."""

    def __init__(self, raw: str, output: str):
        self.raw, self.output = raw, output

    def __call__(self) -> Any:
        work = write.Preparation(
            "csv", self.raw, self.output, importing.options_of("csv", []), write.Settings()
        )
        done = work.run()
        rows = manifests.read_columns(
            manifests.Selection(manifests.build(self.output, "parquet", "")), ["text", "label"]
        ).to_pylist()
        return done, rows


# ---------------------------------------------------------------- flips


def outcome_of(read: Callable[[], Any], expected: bytes, path: Path) -> tuple[str, str]:
    description: list[str] = []
    try:
        with checksums.notifications_to(description.append):
            found = read()
    except (storage.StorageError, BundleError, ValueError, run_lock.BusyError) as error:
        text = str(error)
        is_clear = "Traceback" not in text and (path.name in text or path.parent.name in text)
        return ("detected", text) if is_clear else ("traceback", f"{type(error).__name__}: {text}")
    except Exception as error:  # of any kind: that is what is counted
        return "traceback", f"{type(error).__name__}: {error}"
    if description:
        return "detected", description[0]
    return ("harmless" if comparable(found) == expected else "silent"), ""


def comparable(value: Any) -> bytes:
    """Bytes that are equal for equal values, NaN included."""
    return pickle.dumps(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return (
            str(value.dtype),
            value.shape,
            value.tobytes() if value.dtype != object else repr(value.tolist()),
        )
    if isinstance(value, dict):
        return [(str(key), _plain(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return repr(value)


def flips(
    count: int, seed: int, folder: Path, tell: Callable[[str], object] = print
) -> dict[str, Counter[str]]:
    """Outcomes by kind of file; each kind is tried about equally often."""
    rng = np.random.default_rng(seed)
    live, kept = folder / "live", folder / "kept"
    live.mkdir()
    readers = write_all(live)
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(live.rglob("*")):
        if (
            path.is_file()
            and "data" not in path.relative_to(live).parts[:1]
            and path.stat().st_size
        ):
            files[kind_of(path, live)].append(path)
    missing = set(readers) - set(files)
    assert not missing, f"nothing of this kind was written: {missing}"
    expected = {kind: comparable(readers[kind]()) for kind in readers}
    again = {kind: comparable(readers[kind]()) for kind in readers}
    assert expected == again, [kind for kind in readers if expected[kind] != again[kind]]
    shutil.copytree(live, kept)
    table: dict[str, Counter[str]] = {kind: Counter() for kind in readers}
    kinds = list(readers)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path = files[kind][rng.integers(len(files[kind]))]
        data = bytearray(path.read_bytes())
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[place] ^= 1 << bit
        path.write_bytes(data)
        outcome, text = outcome_of(readers[kind], expected[kind], path)
        table[kind][outcome] += 1
        if outcome in ("silent", "traceback"):
            tell(f"{outcome}: bit {bit} of byte {place} of {path.relative_to(live)}: {text[:300]}")
        for part in ("runs", "prepared"):
            shutil.rmtree(live / part)
            shutil.copytree(kept / part, live / part)
    return table


def main() -> int:
    count, seed = (int(word) for word in (*sys.argv[1:], 500, 0)[:2])
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= dict.fromkeys(
            ("ONETOMANY_CACHE", "XDG_CACHE_HOME"), str(Path(folder, "cache"))
        )
        table = flips(count, seed, Path(folder))
    print(f"{'kind of file':24} {'tried':>6}" + "".join(f"{name:>11}" for name in OUTCOMES))
    for kind, found in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"{kind:24} {found.total():>6}" + "".join(f"{found[name]:>11}" for name in OUTCOMES))
    print(f"{READ_BY_PEOPLE}: nothing reads them back")
    total = sum(table.values(), Counter())
    return 1 if total["silent"] or total["traceback"] else 0


if __name__ == "__main__":
    sys.exit(main())
