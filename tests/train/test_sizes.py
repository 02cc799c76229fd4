"""Sizes that follow from the rows alone: texts a task, steps a run."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config.schema import Train
from pipeline.data import manifests
from pipeline.data.plan import Plan
from pipeline.train import pretrain, token_rows


def test_a_task_reads_a_bounded_number_of_bytes(tmp_path, monkeypatch):
    """Many short texts are one task; long ones are shared out by the bytes that the files tell, and
    all rows are there once, in order.
    """
    short, long, vast = ["a few words"] * 100, ["x" * 1000] * 100, ["y" * 9000] * 3
    made = pa.table({"words": [*short, *long, *vast]})
    pq.write_table(made, tmp_path / "texts.parquet", row_group_size=100, use_dictionary=False)
    selection = manifests.Selection(manifests.build(str(tmp_path / "texts.parquet"), "auto", ""))
    monkeypatch.setattr(token_rows, "TASK_BYTES", 8000)
    found = token_rows.task_ranges(selection, (100, 103))
    assert [row for _, start, stop in found for row in range(start, stop)] == list(range(203))
    assert found[0] == (0, 0, 100) and {corpus for corpus, *_ in found[1:]} == {1}
    assert (
        all(stop - start <= 8 for _, start, stop in found[1:])
        and len(found) >= 15
        and {start for _, start, _ in found} >= {201, 202}
    )
    part = manifests.Selection(selection.manifest, np.arange(100, 200, 2))
    assert [stop - start for _, start, stop in token_rows.task_ranges(part, (50,))] == [
        8,
        7,
        7,
        7,
        7,
        7,
        7,
    ], "of the rows that are selected"


def test_steps_of_epochs_are_rounded_up():
    def steps(rows: int, **train) -> int:
        return pretrain.steps_of(
            Train.model_validate({"global_batch": 32, **train}), Plan(rows, 0, 32)
        )

    assert [steps(100, epochs=epochs) for epochs in (0.001, 0.32, 0.33, 1, 2, 3.2)] == [
        1,
        1,
        2,
        4,
        7,
        10,
    ]
    assert steps(96) == steps(96, epochs=1) == 3 and steps(96, steps=9) == 9
    assert steps(96, epochs=1 / 3) == 1  # not 2 by a rounding error
