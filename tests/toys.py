"""Small rows, models and runs that tests share: the shapes of the real ones, no files and no
network.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.checkpoints import bundle
from pipeline.config.schema import Train
from pipeline.core.contracts import Backbone, Batch, Features, Modality, Objective, Task, Technique
from pipeline.core.metrics import catalog
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.data.manifests import Manifest, RowGroup, Selection
from pipeline.data.plan import Plan
from pipeline.data.stream import Decoder, Rows, train_batches
from pipeline.modalities.events import Events, EventsOptions
from pipeline.modalities.image import Image, ImageOptions
from pipeline.modalities.table import Table, TableOptions
from pipeline.modalities.text import Text, TextOptions
from pipeline.modalities.trajectory import Trajectory, TrajectoryOptions
from pipeline.objectives.classification import Classification
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions
from pipeline.techniques.full import Full
from pipeline.train import evaluate, loop
from pipeline.train.ranks import Ranks


def image_file(image: Any, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image's file."""
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rows_at(batch: Batch, places: Any) -> Batch:
    """The rows of a batch at these places."""
    tensors = {name: tensor[places] for name, tensor in batch.data.items()}
    return Batch(batch.rows[places], batch.keys[places], tensors)


FIRST_ID = 1000
"""Row ids start here, so that a place is never taken for an id."""

SUBJECTS = (
    "the old film",
    "a new play",
    "this small book",
    "her first song",
    "the long story",
    "my friend's poem",
)
VERBS = ("was", "seemed", "is", "remains", "felt", "became")
WORDS = (
    ("wonderful", "bright", "moving", "charming", "superb"),
    ("dreadful", "dull", "tedious", "hollow", "clumsy"),
    ("red", "square", "heavy", "wooden", "cold"),
)


# ---------------------------------------------------------------- rows


def result_row(source: str, technique: str, seed: int, **more: Any) -> ResultRow:
    """A row of the accuracy on test rows of a finished final trial."""
    columns = {
        "job": "j",
        "source": source,
        "backbone": "b",
        "target": "t",
        "technique": technique,
        "hyper_parameters": "{}",
        "seed": seed,
        "label_fraction": "1.0",
        "trial_id": f"{source}-{technique}-{seed}",
        "trial_stage": "final",
        "status": "done",
        "split": "test",
        "metric": "accuracy",
        "higher_is_better": True,
    }
    return ResultRow.from_columns({**columns, **more})


def result_rows(source: str, technique: str, run: RunPredictions, *metrics: str) -> list[ResultRow]:
    """Test rows of a finished trial, a row a metric, with values computed from its predictions."""
    return [
        result_row(
            source,
            technique,
            run.seed,
            n_eval=len(run.rows),
            metric=name,
            value=catalog.metric(name).value(run.predictions),
            higher_is_better=catalog.metric(name).higher_is_better,
        )
        for name in metrics
    ]


def selection(n: int) -> Selection:
    manifest = Manifest(
        ("memory.parquet",), (RowGroup(0, 0, FIRST_ID + n, 0),), pa.schema([]), "memory"
    )
    return Selection(manifest, np.arange(FIRST_ID, FIRST_ID + n))


def rows_of(
    modality: Modality,
    arrays: dict[str, np.ndarray],
    objective: str | None = None,
    state: dict[str, Any] | None = None,
) -> Rows:
    n = len(next(iter(arrays.values())))
    return Rows(selection(n), Decoder(modality, objective, state or {}, {}), arrays)


def stays(n: int, seed: int = 0, variables: int = 5, hours: float = 24.0) -> pa.Table:
    """Stays of some ten to forty events, one of them without any; facts with gaps. Lengths, times,
    variables and values are random.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        count = 0 if i == 1 else int(rng.integers(10, 40))
        rows.append(
            {
                "entity": i,
                "patient": f"p{i // 2}",
                "times": np.sort(rng.uniform(0, hours, count)).astype(np.float32),
                "variables": [f"v{k}" for k in rng.integers(0, variables, count)],
                "values": rng.normal(3, 2, count).astype(np.float32),
                "events": count,
                "static": {
                    "Age": None if i % 4 == 3 else float(rng.uniform(20, 90)),
                    "Gender": ("female", "male")[i % 2],
                    "codes": ["a", "b"][: i % 3],
                },
                "label": int(rng.integers(0, 2)),
            }
        )
    lists = {
        "times": pa.list_(pa.float32()),
        "variables": pa.list_(pa.string()),
        "values": pa.list_(pa.float32()),
        "events": pa.int32(),
        "label": pa.int64(),
        "entity": pa.int64(),
        "patient": pa.string(),
        "static": pa.struct(
            {"Age": pa.float64(), "Gender": pa.string(), "codes": pa.list_(pa.string())}
        ),
    }
    return pa.table(
        {name: pa.array([row[name] for row in rows], kind) for name, kind in lists.items()}
    )


EVENT_COLUMNS = {name: name for name in ("times", "variables", "values", "static")}


def event_rows(n: int, **options: Any) -> Rows:
    """Rows of ``stays`` with their labels."""
    table, chosen = stays(n), EventsOptions(hours=24, **{"min_rows": 1, **options})
    modality = Events(chosen, Events.fit(chosen, table, EVENT_COLUMNS, "events/gru"))
    arrays, bad = modality.decode(table, EVENT_COLUMNS)
    assert not any(bad)
    return rows_of(
        modality, {**arrays, "label": table["label"].to_numpy()}, "classification", label_state(2)
    )


def table_rows(n: int) -> Rows:
    """The static facts of ``stays`` as rows of a table."""
    table, columns = stays(n), {"features": "static"}
    modality = Table(TableOptions(), Table.fit(TableOptions(min_rows=1), table, columns, ""))
    arrays, _ = modality.decode(table, columns)
    return rows_of(
        modality, {**arrays, "label": table["label"].to_numpy()}, "classification", label_state(2)
    )


ROBOTS = {"arm": (3, 2), "cart": (2, 1)}
"""Numbers of an observation and of an action."""
TRAJECTORY_COLUMNS = {
    name: name for name in ("observations", "actions", "task", "embodiment", "steps")
}


def episodes(
    n: int, seed: int = 0, robots: tuple[str, ...] = ("arm", "cart"), least: int = 5, most: int = 12
) -> pa.Table:
    """Episodes of two robots in turn, of random lengths: the action is a linear function of the
    observation; two tasks, and every third row has none.
    """
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        robot, steps = robots[i % len(robots)], int(rng.integers(least, most + 1))
        seen = rng.normal(3.0, 2.0, (steps, ROBOTS[robot][0])).astype(np.float32)
        done = seen @ np.linspace(
            -1, 1, seen.shape[1] * ROBOTS[robot][1], dtype=np.float32
        ).reshape(seen.shape[1], -1)
        out.append(
            {
                "observations": seen.tolist(),
                "actions": done.tolist(),
                "task": ("push", "reach", "")[i % 3],
                "embodiment": robot,
                "steps": steps,
                "label": i % 2,
            }
        )
    kinds = {
        "observations": pa.list_(pa.list_(pa.float32())),
        "actions": pa.list_(pa.list_(pa.float32())),
        "task": pa.string(),
        "embodiment": pa.string(),
        "steps": pa.int64(),
        "label": pa.int64(),
    }
    return pa.table(
        {name: pa.array([row[name] for row in out], kind) for name, kind in kinds.items()}
    )


def trajectory_rows(
    n: int, table: pa.Table | None = None, modality: Modality | None = None
) -> Rows:
    """Rows of ``episodes`` with a label."""
    table = episodes(n) if table is None else table
    modality = modality or Trajectory(
        TrajectoryOptions(),
        Trajectory.fit(TrajectoryOptions(), table, TRAJECTORY_COLUMNS, "policy/mlp"),
    )
    arrays, bad = modality.decode(table, TRAJECTORY_COLUMNS)
    assert not any(bad)
    return rows_of(
        modality, {**arrays, "label": table["label"].to_numpy()}, "classification", label_state(2)
    )


def label_state(classes: int = 3) -> dict[str, Any]:
    return {"values": list(range(classes)), "labels": [f"class {i}" for i in range(classes)]}


def images(
    n: int, size: int = 8, channels: int = 1, classes: int = 3, seed: int = 0, noise: float = 0.6
) -> tuple[np.ndarray, np.ndarray]:
    """(n, C, size, size) uint8 and (n,) labels: a pattern a class, with noise. The patterns do not
    depend on the seed.
    """
    patterns = np.random.default_rng(99).integers(0, 256, (classes, channels, size, size))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    blurred = (1 - noise) * patterns[labels] + noise * rng.integers(
        0, 256, (n, channels, size, size)
    )
    return blurred.round().astype(np.uint8), labels.astype(np.int64)


def image_rows(
    n: int = 64,
    size: int = 8,
    channels: int = 1,
    classes: int = 3,
    seed: int = 0,
    noise: float = 0.6,
    **options,
) -> Rows:
    pixels, labels = images(n, size, channels, classes, seed, noise)
    modality = Image(
        ImageOptions(size=size, channels=channels, **options),
        {"mean": [0.5] * channels, "std": [0.25] * channels},
    )
    return rows_of(
        modality, {"image": pixels, "label": labels}, "classification", label_state(classes)
    )


def sentences(n: int, seed: int = 0, classes: int = 3) -> tuple[list[str], list[int]]:
    """Sentences of 4 to 30 words or so, and the class that their adjectives tell."""
    texts, labels = _sentences(n, seed, classes)
    return list(texts), list(labels)


@cache
def _sentences(n: int, seed: int, classes: int) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for i in range(n):
        label = i % classes
        parts = [
            f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(WORDS[label])}"
            for _ in range(rng.integers(1, 7))
        ]
        texts.append((", and ".join(parts) + ".").capitalize())
        labels.append(label)
    return texts, labels


def text_modality(backbone: str = "transformers/bert", length: int = 32) -> Text:
    """A modality with a vocabulary of its own, which is learnt once for all tests."""
    options = TextOptions(length=length, vocabulary=400)
    return Text(options, copy.deepcopy(_text_state(backbone, length)))


@cache
def _text_state(backbone: str, length: int) -> dict[str, Any]:
    options = TextOptions(length=length, vocabulary=400)
    table = pa.table({"text": sentences(200, seed=5)[0]})
    return Text.fit(options, table, {"text": "text"}, backbone)


def text_rows(n: int = 48, modality: Text | None = None, seed: int = 0) -> Rows:
    modality = modality or text_modality()
    texts, labels = sentences(n, seed)
    arrays, bad = modality.decode(pa.table({"text": texts}), {"text": "text"})
    assert not any(bad)
    return rows_of(
        modality,
        {**arrays, "label": np.array(labels, dtype=np.int64)},
        "classification",
        label_state(),
    )


def packed_rows(
    n: int = 60, modality: Text | None = None, objective: str = "mlm", seed: int = 0
) -> Rows:
    """Rows packed from ``n`` sentences."""
    modality = modality or text_modality()
    table, _ = modality.pack(pa.table({"text": sentences(n, seed)[0]}), {"text": "text"})
    arrays, _ = modality.decode(table, {name: name for name in table.column_names})
    return rows_of(modality, arrays, objective)


def take(
    rows: Rows, places, training: bool = False, seed: int = 0, objective: Objective | None = None
) -> Batch:
    """A batch of the rows at the given places, ready for the model, with the views that the
    objective compares.
    """
    from pipeline.core.rng import row_keys

    places = np.asarray(places)
    ids = rows.selection.ids(places)
    assert rows.arrays is not None
    keys = torch.from_numpy(row_keys(seed, np.zeros_like(ids), ids))
    batch = Batch(
        ids,
        keys,
        rows.modality.collate({name: array[places] for name, array in rows.arrays.items()}),
    )
    return evaluate.device_preprocessing(rows, objective)(batch, training)


# ---------------------------------------------------------------- models


class Net(Backbone):
    """Two layers for images; ``norm`` is "layer" or "batch"."""

    def __init__(
        self,
        size: int = 8,
        channels: int = 1,
        norm: str = "layer",
        dropout: float = 0.0,
        width: int = 16,
    ):
        nn.Module.__init__(self)
        self.stem = nn.Linear(channels * size * size, width)
        self.norm: nn.Module = nn.LayerNorm(width) if norm == "layer" else nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.block = nn.Linear(width, width)
        self.pooled_dim = width
        self.arch = Architecture("toys/net", {}, {"channels": channels, "size": size})

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        x = self.norm(self.stem(batch["image"].flatten(1)))
        return Features(F.gelu(self.block(self.drop(x))))

    def layers(self) -> dict[str, list[str]]:
        return {
            "stem": ["stem.weight", "stem.bias", "norm.weight", "norm.bias"],
            "block": ["block.weight", "block.bias"],
        }


def net_task(seed: int = 0, classes: int = 3, size: int = 8, **net) -> Task:
    torch.manual_seed(seed)
    backbone = Net(size=size, **net)
    return Task(
        backbone, Classification(backbone, Classification.options_class(), label_state(classes))
    )


def task_of(
    name: str,
    inputs: dict[str, Any],
    objective: str,
    state: dict[str, Any] | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    **backbone: Any,
) -> Task:
    """A task of registered parts."""
    return bundle.build_task(
        Architecture(name, backbone, inputs),
        ObjectiveSpec(objective, options or {}, state or {}),
        seed,
    )


SMALL = {"layers": 2, "hidden": 16, "heads": 2, "dropout": 0.0}
"""The smallest transformer."""


# ---------------------------------------------------------------- runs


def make_run(
    rows: Rows,
    task: Task,
    *,
    steps: int = 6,
    technique: Technique | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
    validation: Rows | None = None,
    plan_shards: int = 8,
    keep: str = "best",
    checkpoints: str | None = None,
    **train: Any,
) -> loop.TrainingRun:
    """A run on rows in memory, with the stream, the plan and the evaluation of the library."""
    ranks = ranks or Ranks()
    words = {"global_batch": 8, "augment": False, "log_every_steps": 1, **train}
    spec = Train(steps=steps, keep=keep, **words)  # type: ignore[arg-type]
    plan = Plan(len(rows), seed, spec.global_batch, shards=plan_shards)
    ready = evaluate.device_preprocessing(rows)
    names = task.objective.metrics
    check = None
    if validation is not None:
        mine = validation.part(ranks.rank, ranks.count)
        check = evaluate.evaluator(
            mine, names, ready, ranks, lambda: loop.autocast(spec, ranks.device), 16
        )
    return loop.TrainingRun(
        task=task,
        technique=technique or Full(),
        train=spec,
        steps=steps,
        seed=seed,
        batches=partial(train_batches, rows, plan, rank=ranks.rank, ranks=ranks.count),
        preprocess=ready,
        keeper=loop.KeepBest(names[0], keep),
        evaluate=check,
        ranks=ranks,
        checkpoint_folder=checkpoints,
    )


class Killed(Exception):  # noqa: N818 - a stand-in for a kill, not an error
    pass


def kill_at(run: loop.TrainingRun, stop: int) -> None:
    """Train to a step and stop there, as if the process had been killed."""

    def kill(log):
        if log["step"] == stop:
            raise Killed

    run.on_log = kill
    try:
        loop.fit(run)
    except Killed:
        return
    raise AssertionError(f"the run ended before step {stop}")


def assert_a_killed_run_ends_as_a_whole_one(run_in: Callable[[str], loop.TrainingRun]) -> None:
    """Kill a run at step 5, go on from its point at step 4, and compare the weights at the end.

    ``run_in`` makes the run with its points in a folder of this name.
    """
    whole, first = run_in("whole"), run_in("parts")
    loop.fit(whole)
    kill_at(first, 5)
    again = run_in("parts")
    assert loop.fit(again).resumed_from == 4
    ours, theirs = weights(whole.task), weights(again.task)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def newest_resume_point(folder: str) -> int:
    """Return the step of the newest complete resume point, 0 where there is none."""
    complete = Path(folder).glob("step-*/manifest.json")
    return max((int(file.parent.name.removeprefix("step-")) for file in complete), default=0)


def without_labels(rows: Rows) -> Rows:
    assert rows.arrays is not None
    arrays = {name: array for name, array in rows.arrays.items() if not name.startswith("label")}
    return Rows(rows.selection, rows.decoder, arrays)


def add_streams(
    run: loop.TrainingRun, rows: Rows, source: Rows, labelled: bool = True, seed: int = 5
) -> None:
    """Give a run the streams that its technique names, from rows in memory.

    ``labelled``: whether the run's own rows have labels, or are the target's without any.
    """
    parts = {"source": without_labels(source), "target": without_labels(rows)}
    parts["labelled_source"] = source
    for number, name in enumerate(run.technique.streams()):
        if name == "target" and not labelled:
            continue
        plan = Plan(len(parts[name]), seed + number, run.train.global_batch)
        run.streams[name] = partial(
            train_batches, parts[name], plan, rank=run.ranks.rank, ranks=run.ranks.count
        )
    run.has_labels = labelled
    run.preprocess = evaluate.training_preprocessing(rows, run.task.objective, run.technique)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two state dicts with the same names; NaN where one is NaN."""
    assert a.keys() == b.keys()
    return float(
        torch.stack([(a[name].double() - b[name].double()).abs().max() for name in a]).max()
    )


# ---------------------------------------------------------------- a target with its trials


def image_files(
    folder,
    sizes: dict[str, int],
    size: int = 16,
    channels: int = 3,
    classes: int = 3,
    noise: float = 0.75,
) -> dict[str, str]:
    """A Parquet file of PNG bytes and labels for each split; returns its paths."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for seed, (split, n) in enumerate(sizes.items()):
        pixels, labels = images(n, size, channels, classes, seed=100 + seed, noise=noise)
        encoded = [image_file(np.moveaxis(image, 0, -1).squeeze()) for image in pixels]
        paths[split] = str(folder / f"{split}.parquet")
        pq.write_table(
            pa.table({"picture": encoded, "class": [f"class {i}" for i in labels]}),
            paths[split],
            row_group_size=16,
        )
    return paths


def image_splits(train: int, validation: int, test: int, scope: Any = "module"):
    """A fixture ``paths`` of `image_files` with so many rows."""
    sizes = {"train": train, "validation": validation, "test": test}

    @pytest.fixture(scope=scope)
    def paths(tmp_path_factory):
        return image_files(tmp_path_factory.mktemp("data"), sizes)

    return paths


def job_of(folder, paths: dict[str, str], train: dict[str, Any] | None = None, **target: Any):
    """A job with one image source ``src`` and the target ``task`` on the given files."""
    from pipeline.config.schema import Job

    data = {**paths, "modality": "image", "columns": {"image": "picture", "label": "class"}}
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "techniques": ["scratch", "linear_probe", "full", "lp_ft"],
            "sources": {
                "src": {
                    "data": {**data, "modality": {"image": {"size": 32}}},
                    "backbone": "timm/test_vit",
                    "objective": "classification",
                }
            },
            "targets": {
                "task": {
                    "data": data,
                    "objective": "classification",
                    "train": {"steps": 12, "global_batch": 16, "lr": 0.01, **(train or {})},
                    **target,
                }
            },
        }
    )


def shared_of(
    folder,
    job,
    paths: dict[str, str],
    root: str = "trials-root",
    keep_bundles: bool = False,
    source: tuple[dict, dict] | None = None,
):
    """What the trials of ``job_of`` read, with one source whose weights are random but fixed: an
    image backbone, or what ``source`` (architecture, modality) says.
    """
    from pipeline.transfer import grid, targets
    from pipeline.transfer.trial import Shared

    arch, modality = source or (
        Architecture("timm/test_vit", {}, {"channels": 3, "size": 32}),
        ModalitySpec(
            "image", ImageOptions(size=32).model_dump(), {"mean": [0.5] * 3, "std": [0.2] * 3}
        ),
    )
    base = grid.backbone_groups({"src": (arch, modality)})[0]
    held = {
        name: tensor.numpy()
        for name, tensor in bundle.build_backbone(arch, seed=77).state_dict().items()
    }
    data = targets.prepare(targets.plan_target(job, "task"), base)
    head = {
        name: tensor.numpy()
        for name, tensor in bundle.build_task(arch, data.objective, seed=77)
        .objective.state_dict()
        .items()
    }
    return Shared(
        job="toy",
        root=str(folder / root),
        seed=job.seed,
        backbone_groups={base.key: base},
        weights={"src": held},
        parents={"src": "bundle:src"},
        targets={("task", base.key): data},
        keep_bundles=keep_bundles,
        heads={"src": (data.objective, head)},
    )


def trial_of(
    job,
    shared,
    technique: Any = "linear_probe",
    hyper: dict[str, float] | None = None,
    fraction: float | int = 1.0,
    seed: int = 0,
    stage: str = "final",
):
    from pipeline.config.schema import ComponentConfig
    from pipeline.transfer import grid

    base, component = (
        next(iter(shared.backbone_groups.values())),
        ComponentConfig.model_validate(technique),
    )
    source = grid.SCRATCH if grid.starts_random(component) else "src"
    return grid.make_trial(
        job,
        "task",
        grid.PlannedEntry(base, source, component, fraction),
        hyper or {},
        seed,
        stage,
        "source key",
        "data key",
    )


def task_from(start, objective: str, state=None, options=None, seed: int = 3):
    """A task whose backbone and head start from a checkpoint, and what became of the head."""
    task = bundle.build_task(
        start.arch, ObjectiveSpec(objective, options or {}, state or {}), seed=seed
    ).eval()
    start.load_into(task.backbone)
    return task, start.load_head_into(task)


def transformers_model(kind: str, folder):
    """A model of transformers with nothing missing and nothing left over."""
    import transformers as hf

    model, report = getattr(hf, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def sound_file(
    samples: np.ndarray, rate: int = 16000, form: str = "WAV", subtype: str | None = None
) -> bytes:
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()
