"""A column that tells the label is told, in tables and in records; honest columns, and columns that
merely number rows, are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import datasets
from toys import stays

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.transfer import leaks, stages
from tests.transfer.test_targets import Silent


def message(values: Any, classes: Any) -> float:
    return leaks.balanced_accuracies(np.asarray(values), [np.asarray(classes, dtype=np.int64)])[0]


@pytest.mark.parametrize("rows", [40, 400, 5000])
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_a_number_that_was_cut_into_the_label_is_above_the_threshold(rows, share):
    number = np.random.default_rng(0).normal(size=rows)
    classes = (number > np.quantile(number, 1 - share)).astype(np.int64)
    if np.bincount(classes).min() < leaks.MIN_CLASS_ROWS:
        return
    assert message(number, classes) >= leaks.DECIDES and message(-number, classes) >= leaks.DECIDES
    noisy = np.where(np.random.default_rng(1).random(rows) < 0.2, 1 - classes, classes)
    assert message(noisy, classes) < leaks.DECIDES, "a column that is wrong in a fifth of the rows"


def test_missing_values_that_tell_the_label_count():
    classes = np.arange(200) % 2
    assert (
        message(np.where(classes == 1, np.nan, np.random.default_rng(0).normal(size=200)), classes)
        == 1.0
    )


def test_categories_tell_by_themselves_and_numbers_of_rows_tell_nothing():
    classes = np.random.default_rng(0).integers(0, 3, 600)
    assert message(classes * 10, classes) == 1.0 and message(np.arange(600), classes) == 0.0
    assert message(np.random.default_rng(1).integers(0, 5, 600), classes) < 0.5


@pytest.mark.parametrize(
    "load",
    [datasets.load_iris, datasets.load_breast_cancer, datasets.load_wine, datasets.load_digits],
)
def test_no_column_of_published_tables_is_reported(load):
    found = load()
    assert max(message(column, found.target) for column in found.data.T) < 0.95


# ---------------------------------------------------------------- in a job


def table(rows: int, leak: bool) -> pa.Table:
    random = np.random.default_rng(3)
    number, other = random.integers(0, 5, rows), random.normal(size=rows)
    label = (
        (number > 0).astype(np.int64)
        if leak
        else (other + random.normal(size=rows) > 0).astype(np.int64)
    )
    features = [
        {"num": float(a), "age": float(b), "ward": "ab"[i % 2]}
        for i, (a, b) in enumerate(zip(number, other, strict=True))
    ]
    split = ["train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test" for i in range(rows)]
    return pa.table({"features": pa.array(features), "sick": label, "split": split})


def records(rows: int, leak: bool) -> pa.Table:
    made, random = stays(rows), np.random.default_rng(0)
    label = random.integers(0, 2, rows)
    if leak:  # what is given to those who die alone
        dying = np.flatnonzero(label).tolist()
        columns = {role: made[role].to_pylist() for role in ("times", "variables", "values")}
        for row in dying:
            for role, first in (("times", 0.0), ("variables", "comfort care"), ("values", 1.0)):
                columns[role][row] = [first, *columns[role][row]]
        made = pa.table(
            {
                name: pa.array(columns[name], made[name].type) if name in columns else made[name]
                for name in made.column_names
            }
        )
    split = ["train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test" for i in range(rows)]
    return (
        made.select([name for name in made.column_names if name not in ("label", "split")])
        .append_column("label", pa.array(label))
        .append_column("split", pa.array(split))
    )


def notes_of(
    folder,
    made: pa.Table,
    modality: str,
    columns: dict[str, str],
    backbone: dict,
    known: pa.Table | None = None,
) -> list[str]:
    """Notes of the report of a job on these rows, with a source whose modality was fitted on them
    (or on ``coverage``).
    """
    from pipeline.config import registry

    pq.write_table(made, folder / "rows.parquet")
    kind = registry.get("modality", modality)
    options = kind.options_class()
    state = kind.fit(options, made if known is None else known, columns, "")
    fitted = ModalitySpec(modality, options.model_dump(), state)
    arch = Architecture(**backbone, inputs=kind(options, state).inputs())
    bundle.save(
        str(folder / "source"),
        bundle.build_backbone(arch, seed=0),
        fitted,
        training={"transfer": ""},
        metrics={},
    )
    data = {
        "uri": str(folder / "rows.parquet"),
        "split_column": "split",
        "modality": modality,
        "columns": columns,
    }
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {"src": {"backbone": f"bundle:{folder / 'source'}"}},
            "targets": {
                "task": {
                    "data": data,
                    "objective": "classification",
                    "train": {"steps": 2, "global_batch": 8},
                }
            },
            "techniques": ["scratch"],
            "fanout": {"seeds": 1},
        }
    )
    state = stages.check(job, Silent())  # type: ignore[arg-type]
    stages.prepare_shared(state)
    return state.notes


TABLE = {"features": "features", "label": "sick"}
EVENTS = {"times": "times", "variables": "variables", "values": "values", "label": "label"}
TRANSFORMER = {"name": "table/ft_transformer", "options": {"width": 16, "layers": 1, "heads": 2}}
RECURRENT = {"name": "events/gru", "options": {"width": 16}}


@pytest.mark.parametrize("leak", [True, False])
def test_a_column_of_a_table_that_tells_the_label_stands_in_the_report(tmp_path, leak):
    found = [
        note
        for note in notes_of(tmp_path, table(300, leak), "table", TABLE, TRANSFORMER)
        if "decide" in note
    ]
    assert len(found) == leak
    if leak:
        assert found[0].startswith(
            "warning: task: features.num (1.000) alone nearly decides the label (balanced "
            "accuracy on 180 training rows"
        )


@pytest.mark.parametrize("leak", [True, False])
def test_a_variable_of_a_record_that_tells_the_label_stands_in_the_report(tmp_path, leak):
    found = [
        note
        for note in notes_of(tmp_path, records(200, leak), "events", EVENTS, RECURRENT)
        if "decide" in note
    ]
    assert len(found) == leak
    if leak:
        assert "comfort care (how often) (1.000)" in found[0]


def test_a_field_that_the_source_does_not_know_is_no_leak(tmp_path):
    """It is not read."""
    known = pa.table(
        {"features": pa.array([{"age": float(i), "ward": "ab"[i % 2]} for i in range(50)])}
    )
    assert not [
        note
        for note in notes_of(tmp_path, table(300, True), "table", TABLE, TRANSFORMER, known)
        if "decide" in note
    ]


def test_all_names_that_one_side_lacks_stand_in_the_report(tmp_path):
    """Complete: the terminal names eight variables at most."""
    made = stays(120)
    names = [
        [f"variable {int(i):02d}" for i in np.random.default_rng(row).integers(0, 30, len(times))]
        for row, times in enumerate(made["times"].to_pylist())
    ]
    names = [["v0", *row[1:]] if row else row for row in names]
    theirs = pa.table(
        {
            "times": made["times"],
            "values": made["values"],
            "variables": pa.array(names, pa.list_(pa.string())),
        }
    )
    ours = records(200, False)
    found = notes_of(tmp_path, ours, "events", EVENTS, RECURRENT, theirs)
    known = bundle.load(str(tmp_path / "source")).manifest.modality.state["variables"]
    known = [name for name in known if name != "v0"]
    lacking = next(
        note for note in found if "variables that the source knows and its rows lack" in note
    )
    assert (
        lacking
        == f"task: variables that the source knows and its rows lack ({len(known)}): "
        f"{', '.join(known)}"
        and len(known) > 25
    )
    left_out = next(
        note
        for note in found
        if "variables that its rows have and the source does not know" in note
    )
    have = sorted({name for row in ours["variables"].to_pylist() for name in row} - {"v0"})
    assert (
        left_out == "task: variables that its rows have and the source does not know (left out) "
        f"({len(have)}): {', '.join(have)}"
    )


@pytest.mark.parametrize("name", ["audio", "image", "text", "trajectory"])
def test_rows_without_single_features_are_left_alone(name):
    """A modality of another kind may have anything under any name, as audio has ``features``."""
    from pipeline.config import registry
    from pipeline.core.capabilities import HasSingleFeatures

    kind = registry.get("modality", name)
    assert not isinstance(kind(kind.options_class(), {}), HasSingleFeatures)
