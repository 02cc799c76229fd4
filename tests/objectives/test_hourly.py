"""Predictions at many times of a row: what each sees, what is refused, and metrics over all of
them.
"""

from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as theirs
import torch
from torch import nn
from torch.nn import functional as F
from toys import Net

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Job
from pipeline.core.contracts import Backbone, Batch, Features, Task
from pipeline.core.metrics.catalog import metric
from pipeline.core.ragged import ragged
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.objectives.hourly import Hourly, HourlyOptions
from pipeline.report import subgroups
from pipeline.train import dry_checks, evaluate, source
from pipeline.transfer import grid, targets
from pipeline.transfer import trial as one_trial

COLUMNS = {"label_times": "hours", "label_values": "dies"}
BINARY = HourlyOptions()
STATE = {"labels": ["0", "1"], "counts": [6, 2]}


class Monitor(Backbone):
    """A causal backbone of events: a token an hour with events, the running mean of all events up
    to its end (exclusive scan, one number), mixed up.
    """

    causal, token_dim, pooled_dim = True, 6, 6

    def __init__(self, width: int = 6):
        nn.Module.__init__(self)
        self.inner, self.arch = nn.Linear(2, width), Architecture("toys/monitor", {}, {})

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        assert set(want) == {"tokens", "stages"}
        values, ends, mask = batch["values"], batch["ends"], batch["ends"] >= -100
        seen = torch.cumsum(values * mask, 1) / mask.cumsum(1).clamp(min=1)
        tokens = torch.tanh(self.inner(torch.stack([seen, values], -1)))
        return Features(tokens.mean(1), tokens, mask, {"times": torch.where(mask, ends, 0.0)})

    def layers(self) -> dict[str, list[str]]:
        return {"inner": ["inner.weight", "inner.bias"]}


def task_of(seed: int = 0, state=None, **options) -> Task:
    torch.manual_seed(seed)
    backbone = Monitor()
    return Task(backbone, Hourly(backbone, HourlyOptions(**options), state or STATE))


def rows(n: int = 40, seed: int = 0, classes: int = 2) -> Batch:
    """Stays of 3 to 12 hours with a value an hour that drifts; the label at hour t says whether the
    mean so far is high. Empty tokens end at -1000.
    """
    rng = np.random.default_rng(seed)
    hours = rng.integers(3, 13, n)
    values = [rng.normal(rng.normal(), 1.0, h) for h in hours]
    ends = [np.arange(1, h + 1, dtype=np.float32) for h in hours]
    means = [np.cumsum(v) / np.arange(1, len(v) + 1) for v in values]
    labels = [
        np.clip(np.floor((m + 1) * classes / 2), 0, classes - 1).astype(np.int16) for m in means
    ]
    # Labels at some hours, at half past
    kept = [np.sort(rng.permutation(h)[: rng.integers(0, h + 1)]) for h in hours]
    data = {
        "label_times": ragged(
            (e[k] + 0.5).astype(np.float32) for e, k in zip(ends, kept, strict=True)
        ),
        "label_values": ragged(y[k] for y, k in zip(labels, kept, strict=True)),
    }
    tensors = {
        name: torch.from_numpy(np.stack([np.pad(row, (0, 12 - len(row))) for row in array]))
        for name, array in data.items()
    }
    tensors["label_times_lengths"] = torch.tensor([len(k) for k in kept])
    for name, array, fill in (("values", values, 0.0), ("ends", ends, -1000.0)):
        tensors[name] = torch.tensor(
            np.stack([np.pad(row, (0, 12 - len(row)), constant_values=fill) for row in array]),
            dtype=torch.float32,
        )
    return Batch(np.arange(n), torch.zeros(n, dtype=torch.int64), tensors)


def part(batch: Batch, places) -> Batch:
    places = np.asarray(places)
    return Batch(
        batch.rows[places],
        batch.keys[places],
        {name: tensor[places] for name, tensor in batch.data.items()},
    )


# ---------------------------------------------------------------- columns

TABLE = pa.table(
    {
        "hours": pa.array([[5.0, 6.0, 7.0], [], None, [5.0], [24.0, 24.0]]),
        "dies": pa.array([[0, 0, 1], [], None, [0], [1, 0]]),
    }
)


@pytest.mark.parametrize(
    "values", [pa.list_(pa.int64()), pa.large_list(pa.float32()), pa.list_(pa.bool_())]
)
@pytest.mark.parametrize("times", [pa.list_(pa.float32()), pa.large_list(pa.int32())])
def test_lists_of_any_numbers_are_read(values, times):
    def cast(name, kind):
        flat = [
            None if row is None else [bool(v) if kind.value_type == pa.bool_() else v for v in row]
            for row in TABLE[name].to_pylist()
        ]
        return pa.chunked_array([pa.array(flat, kind).slice(0, 2), pa.array(flat, kind).slice(2)])

    table = pa.table({"hours": cast("hours", times), "dies": cast("dies", values)})
    state = Hourly.fit(BINARY, table, COLUMNS)
    assert state == {"labels": ["0", "1"], "counts": [4, 2], "last_label": 24.0}
    found = Hourly.encode(table, COLUMNS, state)
    assert [row.tolist() for row in found["label_times"]] == [[5, 6, 7], [], [], [5], [24, 24]]
    assert [row.tolist() for row in found["label_values"]] == [[0, 0, 1], [], [], [0], [1, 0]]
    assert (
        found["label_times"][0].dtype == np.float32 and found["label_values"][0].dtype == np.int16
    )
    assert Hourly.invalid_label_reasons(table, COLUMNS, state) == [""] * 5
    assert len(Hourly.encode(table.slice(0, 0), COLUMNS, state)["label_times"]) == 0
    assert (
        Hourly.encode(table.select(["hours"]), COLUMNS, state) == {}
        and Hourly.invalid_label_reasons(table.select(["hours"]), COLUMNS, state) == [""] * 5
    )


@pytest.mark.parametrize(
    ("hours", "dies", "reason"),
    [
        ([5.0, 6.0], [0], "hours and dies are not equally many"),
        ([6.0, 5.0], [0, 1], "hours do not ascend"),
        ([5.0, None], [0, 1], "a time of hours is not a number"),
        ([5.0], [2], "a value of dies is not a class from 0 to 1"),
        ([5.0], [0.5], "a value of dies is not a class from 0 to 1"),
        ([5.0], [None], "a value of dies is not a class from 0 to 1"),
        (None, [1], "hours and dies are not equally many"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_without_their_values(hours, dies, reason):
    """A good row before and behind; a time that falls from one row to the next is no fault."""
    table = pa.table(
        {
            "hours": pa.array([[50.0], hours, [7.0]], pa.list_(pa.float64())),
            "dies": pa.array([[1], dies, [0]], pa.list_(pa.float64())),
        }
    )
    assert Hourly.invalid_label_reasons(table, COLUMNS, STATE) == ["", reason, ""]
    assert Hourly.fit(BINARY, table, COLUMNS)["counts"] == [1, 1]
    assert [len(row) for row in Hourly.encode(table, COLUMNS, STATE)["label_values"]] == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "hours", "dies", "message"),
    [
        ({"classes": 10}, [[1.0]], [[0]], "a binary task has 2 classes, not 10"),
        ({}, [[], None], [[], None], "none of 2 training rows has a label"),
        ({}, [1.0], [[0]], "column hours holds double: hourly reads a list of numbers a row"),
        (
            {},
            [[1.0]],
            [["no"]],
            r"column dies holds list<.*string>: hourly reads a list of numbers",
        ),
    ],
)
def test_columns_and_options_that_cannot_be_used_are_reported(options, hours, dies, message):
    with pytest.raises(ValueError, match=message):
        Hourly.fit(
            HourlyOptions(**options),
            pa.table({"hours": pa.array(hours), "dies": pa.array(dies)}),
            COLUMNS,
        )


def test_labels_after_the_last_hour_that_is_read_are_refused():
    """They would be predicted from old events. A label at that very hour is none of them."""
    assert len(Hourly.encode(TABLE, COLUMNS, {**STATE, "hours": 24.0})["label_times"]) == 5
    message = "3 times lie after hour 6, .*raise hours in data.modality"
    with pytest.raises(ValueError, match=message):
        Hourly.encode(TABLE, COLUMNS, {**STATE, "hours": 6.0})


def test_training_labels_after_the_last_hour_are_refused_before_any_row_is_decoded():
    """As soon as the backbone is known, in a dry run too; no bundle has the last label's hour."""
    state = Hourly.fit(BINARY, TABLE, COLUMNS)
    inputs = {"variables": 1, "numbers": 0, "codes": 0, "start": 0.0, "hours": 24.0}
    build = partial(bundle.build_backbone, seed=0)
    bound = Hourly.bind_to_backbone(state, build(Architecture("events/gru", {}, inputs)))
    assert bound == {"labels": ["0", "1"], "counts": [4, 2], "hours": 24.0}
    with pytest.raises(ValueError, match=r"training rows' times lie after hour 6, .*raise hours"):
        Hourly.bind_to_backbone(
            state, build(Architecture("events/gru", {}, {**inputs, "hours": 6.0}))
        )


def test_test_rows_of_one_class_are_reported():
    Hourly.check_test(BINARY, TABLE, COLUMNS, STATE)
    with pytest.raises(ValueError, match="these 3 rows hold labels of one class only"):
        Hourly.check_test(BINARY, TABLE.slice(1, 3), COLUMNS, STATE)


def test_a_backbone_that_looks_ahead_is_refused():
    with pytest.raises(
        ValueError,
        match="toys/net is not causal: a prediction at an hour would see what comes after it",
    ):
        Hourly(Net(), BINARY, STATE)
    ahead = Monitor()
    ahead.causal = False
    with pytest.raises(ValueError, match="toys/monitor is not causal"):
        Hourly(ahead, BINARY, STATE)


# ---------------------------------------------------------------- what a prediction sees


@torch.no_grad()
def test_a_label_reads_the_last_token_that_has_ended():
    """By hand: tokens end at hours 1, 2 and 4; labels at 0.5 (the start vector), 1.0, 3.9, 4.0 and
    100, told with the age of what they read.
    """
    task = task_of(norm=False).eval()
    head, backbone = task.objective, task.backbone
    batch = Batch(
        np.arange(1),
        torch.zeros(1),
        {
            "values": torch.tensor([[0.3, -1.0, 2.0, 0.0]]),
            "ends": torch.tensor([[1.0, 2.0, 4.0, -1000.0]]),
            "label_times": torch.tensor([[0.5, 1.0, 3.9, 4.0, 100.0, 0.0]]),
            "label_values": torch.tensor([[0, 1, 0, 1, 1, 0]], dtype=torch.int16),
            "label_times_lengths": torch.tensor([5]),
        },
    )
    tokens = backbone(batch, want=("tokens", "stages")).tokens[0]
    age = torch.tensor([0.5, 0.0, 1.9, 0.0, 96.0])
    want = head.head(
        torch.cat(
            [
                torch.stack([head.start, tokens[0], tokens[1], tokens[2], tokens[2]]),
                torch.log1p(age)[:, None],
            ],
            dim=1,
        )
    )
    found = head.predict(backbone, batch)
    torch.testing.assert_close(found["scores"][0, :5], want)
    assert found["label"].tolist() == [[0, 1, 0, 1, 1, -1]] and found["times"][
        0, :5
    ].tolist() == pytest.approx([0.5, 1.0, 3.9, 4.0, 100.0])
    assert found["times"][0, 5].isnan() and found["count"].tolist() == [5]
    assert found["loss"].item() == pytest.approx(
        F.cross_entropy(want, torch.tensor([0, 1, 0, 1, 1]), reduction="sum").item(), rel=1e-5
    )


@torch.no_grad()
def test_what_comes_later_changes_nothing():
    task, batch = task_of().eval(), rows()
    before = task.objective.predict(task.backbone, batch)["scores"]
    cut = 5.0
    changed = batch.replace(
        values=torch.where(
            batch["ends"] > cut, torch.randn_like(batch["values"]) * 9, batch["values"]
        )
    )
    after = task.objective.predict(task.backbone, changed)["scores"]
    early = (batch["label_times"] < cut + 1) & (
        torch.arange(12) < batch["label_times_lengths"][:, None]
    )
    late = (batch["label_times"] > cut + 1) & (
        torch.arange(12) < batch["label_times_lengths"][:, None]
    )
    assert torch.equal(before[early], after[early]) and early.sum() > 40
    assert not torch.isclose(before[late], after[late]).all(-1).any() and late.sum() > 40


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_and_parts_make_the_whole():
    task, batch = task_of().eval(), rows()
    total, count, logs = task(batch)
    parts = [task(one) for one in batch.split(7)]
    assert (
        sum(p[0].item() for p in parts) == pytest.approx(total.item(), rel=1e-5)
        and sum(p[1] for p in parts) == count == batch["label_times_lengths"].sum()
    )
    assert sum(p[2]["accuracy"] for p in parts) == logs["accuracy"]
    found, alone = (
        task.objective.predict(task.backbone, one) for one in (batch, part(batch, [7, 3]))
    )
    for name, tensor in alone.items():
        torch.testing.assert_close(tensor, found[name][[7, 3]], equal_nan=True)
    values = {name: tensor.numpy() for name, tensor in found.items()}
    assert metric("loss").value(values) == pytest.approx((total / count).item(), rel=1e-5)
    empty = task(
        part(
            batch.replace(
                label_times=batch["label_times"][:, :0],
                label_values=batch["label_values"][:, :0],
                label_times_lengths=batch["label_times_lengths"] * 0,
            ),
            [0, 1],
        )
    )
    assert empty[0] == 0 and empty[1] == 0


def test_training_weights_are_those_of_the_formula_and_evaluation_has_none():
    batch = rows()
    plain, weighted = task_of(), task_of(class_weight="balanced", focal=1.5)
    known = torch.arange(12) < batch["label_times_lengths"][:, None]
    label = batch["label_values"][known].long()
    chance = (
        plain.objective.predict(plain.backbone, batch)["scores"][known]
        .double()
        .softmax(-1)[torch.arange(len(label)), label]
    )
    weight = torch.tensor([8 / 12, 8 / 4]).double()[label]
    assert weighted.train()(batch)[0].item() == pytest.approx(
        (-weight * (1 - chance) ** 1.5 * chance.log()).sum().item(), rel=1e-4
    )
    assert weighted.eval()(batch)[0].item() == pytest.approx(
        plain.eval()(batch)[0].item(), rel=1e-6
    )


# ---------------------------------------------------------------- metrics and what is written


def learned(classes: int = 2, steps: int = 150, **options):
    state = {"labels": [str(k) for k in range(classes)], "counts": [1] * classes}
    task, batch = (
        task_of(
            1,
            state,
            task="binary" if classes == 2 else "multiclass",
            classes=classes,
            norm=False,
            **options,
        ),
        rows(80, 1, classes),
    )
    optimiser = torch.optim.AdamW(task.parameters(), 0.03)
    for _ in range(steps):
        total, count, _ = task.train()(batch)
        optimiser.zero_grad()
        (total / count).backward()
        optimiser.step()
    task.eval()
    fresh = rows(60, 2, classes)
    with torch.no_grad():
        parts = [
            {
                "row": one.rows,
                **{
                    name: tensor.numpy()
                    for name, tensor in task.objective.predict(task.backbone, one).items()
                },
            }
            for one in fresh.split(17)
        ]
    return task, fresh, evaluate.concatenate(parts)


@pytest.mark.parametrize("classes", [2, 4])
def test_hourly_learns_and_its_metrics_are_over_all_positions(classes):
    task, batch, found = learned(classes)
    known = (torch.arange(12) < batch["label_times_lengths"][:, None]).numpy()
    y, scores = batch["label_values"].numpy()[known], found["scores"][known]
    names = Hourly.target_metrics(task.objective.options, task.objective.state)
    values = {name: metric(name).value(found) for name in names}
    if classes == 2:
        assert names[:2] == ("auroc", "auprc") and values["auroc"] > 0.9
        chance = scores[:, 1] - scores[:, 0]
        assert values["auroc"] == pytest.approx(theirs.roc_auc_score(y, chance)) and values[
            "auprc"
        ] == pytest.approx(theirs.average_precision_score(y, chance))
    else:
        assert names[:3] == ("kappa", "macro_f1", "accuracy") and values["kappa"] > 0.5
        assert values["kappa"] == pytest.approx(
            theirs.cohen_kappa_score(y, scores.argmax(1), weights="linear")
        )
        assert values["macro_f1"] == pytest.approx(
            theirs.f1_score(y, scores.argmax(1), average="macro")
        )
        assert values["accuracy"] == pytest.approx((y == scores.argmax(1)).mean())
    assert set(names) <= registry.entries("metric").keys() and all(
        np.isfinite(list(values.values()))
    )


def test_calibration_takes_the_validation_labels_and_lowers_their_loss():
    task, batch, _ = learned(calibrate="temperature")
    wrong = torch.from_numpy(np.random.default_rng(0).random((60, 12)) < 0.2)
    batch = batch.replace(
        label_values=torch.where(wrong, 1 - batch["label_values"], batch["label_values"])
    )
    with torch.no_grad():
        task.objective.head.weight.mul_(5)
        task.objective.head.bias.mul_(5)
        sharp = {
            name: tensor.numpy()
            for name, tensor in task.objective.predict(task.backbone, batch).items()
        }
        before, state = metric("loss").value(sharp), task.objective.state
        task.objective.calibrate(sharp)
        after = {
            name: tensor.numpy()
            for name, tensor in task.objective.predict(task.backbone, batch).items()
        }
    assert (
        "temperature" not in state
        and task.objective.state["temperature"] > 2
        and task.objective.needs_calibration
    )
    assert metric("loss").value(after) < 0.8 * before and metric("auroc").value(
        after
    ) == pytest.approx(metric("auroc").value(sharp))
    assert not task_of().objective.needs_calibration


@torch.no_grad()
def test_rows_without_label_times_are_predicted_by_the_hour():
    """Every two hours up to the first at which the row's last token has ended; lists as long as
    that are written.
    """
    task, batch = task_of(every=2.0).eval(), rows()
    bare = Batch(batch.rows, batch.keys, {name: batch[name] for name in ("values", "ends")})
    found = {
        name: tensor.numpy() for name, tensor in task.objective.predict(task.backbone, bare).items()
    }
    out = task.objective.output_columns(found, None)
    assert set(found) == {"scores", "times"} and set(out) == set(Hourly.output_types)
    for times, prediction, chances, ends in zip(
        out["times"], out["prediction"], out["probabilities"], batch["ends"], strict=True
    ):
        last = int(ends.max())
        assert times == list(range(2, last + last % 2 + 1, 2)) and len(times) == len(
            prediction
        ) == len(chances)
        assert [int(c[1] > c[0]) for c in chances] == prediction and np.allclose(
            np.sum(chances, axis=1), 1
        )
    table = pa.table(
        {name: pa.array(array.tolist(), Hourly.output_types[name]) for name, array in out.items()}
    )
    assert table.num_rows == 40


# -------------------------------------------------------- with the project's own recurrent backbone


@pytest.mark.parametrize("classes", [2, 4])
def test_a_trial_on_a_recurrent_backbone_of_events(tmp_path, classes):
    """Stays of 6 to 40 hours of one heart rate an hour or so; the label at hour t is whether the
    mean of the last three lies high. From columns to rows of the table, with subgroups and
    intervals over patients.
    """
    rng = np.random.default_rng(0)

    def stays(split, count):
        rows = []
        for i in range(count):
            last = int(rng.integers(6, 40))
            times = np.sort(rng.uniform(0, last, last))
            values = 80 + 15 * np.cumsum(rng.normal(0, 0.6, last))
            hours = np.arange(5, last + 3, dtype=float)
            recent = [values[times < h][-3:].mean() if (times < h).any() else 80 for h in hours]
            bounds = [85] if classes == 2 else [70, 80, 90]
            row = {
                "times": times.tolist(),
                "variables": ["HR"] * last,
                "values": values.tolist(),
                "label_times": hours.tolist(),
                "label_values": np.digitize(recent, bounds).tolist(),
                "patient": f"{split}-p{i // 2}",
                "static": {"Gender": ("female", "male")[i % 2]},
            }
            rows.append(row)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
        return pa.Table.from_pylist(rows)

    counts = {"train": 120, "validation": 40, "test": 50}
    tables = {split: stays(split, count) for split, count in counts.items()}
    columns = {name: name for name in ("times", "variables", "values", "static")}
    kind = registry.get("modality", "events")
    options = kind.options_class()
    state = kind.fit(options, tables["train"], columns, "events/gru")
    modality = ModalitySpec("events", options.model_dump(), state)
    arch = Architecture("events/gru", {"width": 16}, bundle.build_modality(modality).inputs())
    data = {
        **{name: str(tmp_path / f"{name}.parquet") for name in tables},
        "modality": "events",
        "group": "patient",
        "columns": {**columns, "label_times": "label_times", "label_values": "label_values"},
    }
    options = (
        {"calibrate": "temperature"} if classes == 2 else {"task": "multiclass", "classes": classes}
    )
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path / "runs"),
            "techniques": ["scratch"],
            "sources": {"src": {"backbone": f"bundle:{tmp_path / 'none'}"}},
            "targets": {
                "task": {
                    "data": data,
                    "objective": {"hourly": options},
                    "subgroups": ["static.Gender"],
                    "train": {"steps": 60, "global_batch": 32, "lr": 0.02},
                }
            },
        }
    )
    base = grid.backbone_groups({"src": (bundle.build_backbone(arch).arch, modality)})[0]
    stage = targets.plan_target(job, "task")
    ready = targets.prepare(stage, base)
    shared = one_trial.Shared(
        "toy",
        str(tmp_path / "root"),
        0,
        {base.key: base},
        {},
        {},
        {("task", base.key): ready},
        keep_bundles=True,
    )
    entry = grid.PlannedEntry(base, grid.SCRATCH, ComponentConfig(name="scratch"), 1.0)
    one = grid.make_trial(job, "task", entry, {}, 0, "final", "", "")
    record = one_trial.run(one, shared)
    tested = {row.metric: row for row in record.rows if row.split == "test"}
    names = Hourly.metrics if classes == 2 else ("kappa", "macro_f1", "accuracy", "loss")
    assert tuple(tested) == names
    for row in tested.values():
        assert row.n_units == 25 and row.interval.endswith("groups")
    assert tested[names[0]].value > (0.85 if classes == 2 else 0.5)
    assert tested[names[0]].value_low < tested[names[0]].value
    run = one_trial.read_predictions(shared.root, one.folder, 0)
    label = [row[row >= 0].tolist() for row in run.predictions["label"]]
    assert label == tables["test"]["label_values"].to_pylist()
    by_gender = subgroups.read(stage.splits.test, ["static.Gender"], "p")
    message = subgroups.with_subgroups(run, stage.splits.test, by_gender)
    parts = [(row.metric, row.n_units) for row in subgroups.result_rows(message, record.rows[0])]
    assert parts == [(f"{names[0]}@Gender={gender}", 25) for gender in ("female", "male")]
    state = bundle.load(record.rows[0].bundle_uri).manifest.objective.state
    assert ("temperature" in state) == (classes == 2) and "last_label" not in state


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_labels_after_the_last_hour_are_refused_before_training(tmp_path, split):
    """Of targets and of sources, however rows are decoded, and by a dry run too."""
    columns = {"times": "times", "variables": "variables", "values": "values"}
    labels = {"label_times": "label_times", "label_values": "label_values"}
    for name in ("train", "validation", "test"):
        last = 60.0 if name == split else 48.0
        row = {"times": [1.0, 5.0], "variables": ["HR", "HR"], "values": [80.0, 90.0]}
        rows = [{**row, "label_times": [6.0, last], "label_values": [0, 1]}] * 12
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    data = {"modality": "events", "columns": {**columns, **labels}, "decode": "train"}
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "validation", "test")}
    train = {"steps": 1, "global_batch": 4}
    source_files = {"train": files["train"], "validation": files[split]}
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path / "runs"),
            "techniques": ["scratch"],
            "sources": {
                "src": {
                    "data": {**data, **source_files},
                    "backbone": {"events/gru": {"width": 16}},
                    "objective": "hourly",
                    "train": train,
                }
            },
            "targets": {"task": {"data": {**data, **files}, "objective": "hourly", "train": train}},
        }
    )
    late = "column label_times: 12 times lie after hour 48"
    source_stage = source.plan_source(job, "src")
    for prepare in (source.prepare_source, dry_checks.plan_without_training):
        with pytest.raises(ValueError, match=f"validation split: {late}"):
            prepare(source_stage)

    table = pq.read_table(files["train"])
    kind = registry.get("modality", "events")
    options = kind.options_class()
    modality = ModalitySpec(
        "events", options.model_dump(), kind.fit(options, table, columns, "events/gru")
    )
    arch = Architecture("events/gru", {"width": 16}, bundle.build_modality(modality).inputs())
    group = grid.backbone_groups({"src": (arch, modality)})[0]
    with pytest.raises(ValueError, match=f"{split} split: {late}"):
        targets.plan_reading(targets.plan_target(job, "task"), group)
