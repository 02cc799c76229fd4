"""No error and no note names a patient: groups and ids are counted, rows are told by their
position, whatever the rows are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from toys import episodes, sentences, stays

from pipeline.config.schema import Job
from pipeline.transfer import targets

CANARY = "CANARY7731"
ROWS = 60


def png(i: int) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8), i, np.uint8)).save(out, "PNG")
    return out.getvalue()


def wav(i: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.sin(np.arange(1600) / (3 + i)), 16000, format="WAV")
    return out.getvalue()


def table_of(modality: str) -> tuple[pa.Table, dict[str, str], str]:
    """(rows of a modality, the columns of its input, the first of them)."""
    if modality == "events":
        made = stays(ROWS)
        return (
            made.select(["times", "variables", "values"]),
            {name: name for name in ("times", "variables", "values")},
            "times",
        )
    if modality == "trajectory":
        made = episodes(ROWS)
        return made, {name: name for name in ("observations", "actions")}, "observations"
    inputs: dict[str, Any] = {
        "image": [png(i) for i in range(ROWS)],
        "text": sentences(ROWS)[0],
        "audio": [wav(i) for i in range(ROWS)],
        "table": [{"age": float(i), "ward": "ab"[i % 2]} for i in range(ROWS)],
    }
    role = "features" if modality == "table" else modality
    return pa.table({"x": pa.array(inputs[modality])}), {role: "x"}, "x"


def job_of(folder: Path, modality: str, split: list[str], labels: list[Any], **data: Any) -> Job:
    made, columns, _ = table_of(modality)
    objective = "behaviour_cloning" if modality == "trajectory" else "classification"
    beside = {
        "who": [f"{CANARY}-{i // 4}" for i in range(ROWS)],
        "stay": [f"{CANARY}-row-{i}" for i in range(ROWS)],
        "split": split,
    }
    if objective == "classification":
        beside["label"], columns = labels, {**columns, "label": "label"}
    for name, values in beside.items():
        made = made.drop_columns([name]) if name in made.column_names else made
        made = made.append_column(name, pa.array(values))
    pq.write_table(made, folder / "rows.parquet")
    spec = {
        "uri": str(folder / "rows.parquet"),
        "split_column": "split",
        "modality": modality,
        "columns": columns,
        "group": "who",
        **data,
    }
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {"src": {"backbone": "timm-hub:none"}},
            "targets": {"task": {"data": spec, "objective": objective}},
        }
    )


def whole_groups() -> list[str]:
    return [("train", "train", "validation", "test")[i // 4 % 4] for i in range(ROWS)]


def cut_groups() -> list[str]:
    return [("train", "train", "validation", "test")[i % 4] for i in range(ROWS)]


KINDS = ["image", "text", "audio", "table", "events", "trajectory"]
LABELS = [f"kind {i % 2}" for i in range(ROWS)]


def message(job: Job) -> str:
    with pytest.raises(ValueError) as caught:
        targets.plan_target(job, "task")
    parts, error = [], caught.value
    while error is not None:
        parts, error = [*parts, str(error)], error.__cause__
    return "\n".join(parts)


@pytest.mark.parametrize("modality", KINDS)
def test_a_group_that_crosses_splits_is_told_by_counts_and_positions(tmp_path, modality):
    text = message(job_of(tmp_path, modality, cut_groups(), LABELS))
    assert (
        "15 of 15 values of who are in more than one split" in text
        and "row " in text
        and CANARY not in text
    )


@pytest.mark.parametrize("modality", KINDS)
@pytest.mark.parametrize("column", ["who", "stay"])
def test_where_on_a_group_or_an_id_tells_no_value(tmp_path, modality, column):
    text = message(job_of(tmp_path, modality, whole_groups(), LABELS, where={column: ["nobody"]}))
    assert (
        f"in column {column}; it holds " in text
        and " distinct values in 60 rows" in text
        and CANARY not in text
    )


@pytest.mark.parametrize("modality", [kind for kind in KINDS if kind != "trajectory"])
@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([None if i < 9 else kind for i, kind in enumerate(LABELS)], "have no label (null)"),
        (
            ["kind 9" if i == 15 else kind for i, kind in enumerate(LABELS)],
            "is in no training row",
        ),
        (["kind 0"] * ROWS, "hold one label only"),
    ],
)
def test_errors_about_labels_name_nobody(tmp_path, modality, labels, said):
    text = message(job_of(tmp_path, modality, whole_groups(), labels))
    assert said in text and text.startswith("targets.task.data, ") and CANARY not in text


def test_a_missing_or_repeated_image_of_a_patient_is_told_by_its_line(tmp_path):
    from pipeline.prepare.importers import chestxray14

    head = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View "
        "Position\n"
    )
    for rows in (
        f"{CANARY}_000.png,No Finding,0,1,50,M,PA\n" * 2,
        f"a.png,No Finding,0,{CANARY},50,M,PA\n",
    ):
        (tmp_path / "table.csv").write_text(head + rows)
        with pytest.raises(
            ValueError,
            match=r"table\.csv:[23]: its (Image Index has a row already|Patient ID is no whole "
            r"number)",
        ) as caught:
            chestxray14.read_records(str(tmp_path / "table.csv"))
        assert CANARY not in str(caught.value)
