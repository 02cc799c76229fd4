"""Rows that differ in length: the same batches wherever they are decoded; evaluated in batches of
like length, told in their order.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.core.contracts import Batch, Modality, Objective, Task
from pipeline.core.ragged import lengths, num_bytes, pad, ragged
from pipeline.data import manifests as m
from pipeline.data import stream
from pipeline.data.stream import DataWorkers, Decoder, Rows
from pipeline.train import evaluate
from pipeline.train.online_probe import features
from pipeline.train.ranks import Ranks

N = 90


class Ramps(Modality):
    """Column ``wave`` holds a number n; its row is n, n + 1, ... of n % 13 samples. ``seconds``
    tells half of what is in it.
    """

    roles = ("wave",)
    optional_roles = ("seconds",)
    cost_role = "seconds"
    cost_unit = "seconds"

    @classmethod
    def fit(cls, options, table, columns, backbone):
        return {}

    def decode(self, table, columns):
        numbers = table[columns["wave"]].to_pylist()
        return {"wave": ragged(np.arange(n, n + n % 13, dtype=np.int16) for n in numbers)}, [
            "bad" if n % 41 == 40 else "" for n in numbers
        ]

    def costs(self, table, columns):
        message = (
            np.nan_to_num(table[columns["seconds"]].to_numpy())
            if "seconds" in columns
            else np.zeros(len(table))
        )
        return np.where(
            message > 0,
            message,
            [n % 13 for n in table[columns["wave"]].to_pylist()] if "wave" in columns else 0.0,
        )


class Sums(Objective):
    """Adds up each row; ``each`` is as wide as the batch."""

    def __init__(self):
        nn.Module.__init__(self)

    def loss(self, backbone, batch):
        raise NotImplementedError

    def predict(self, backbone, batch):
        wide = batch["wave"].float()
        wide[torch.arange(wide.shape[1]) >= batch["wave_lengths"][:, None]] = float("nan")
        return {"sum": batch["wave"].sum(1), "each": wide, "whole": batch["wave"]}


@pytest.fixture
def rows(tmp_path) -> Rows:
    table = pa.table({"wave": list(range(N)), "seconds": [0.5 * (i % 13) for i in range(N)]})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=16)
    return Rows(
        m.Selection(m.build(str(tmp_path), "auto", str(tmp_path))),
        Decoder(Ramps(None, {}), None, {}, {"wave": "wave"}),
    )


def plain(loaded) -> list:
    return [
        (
            one.batch.rows.tolist(),
            one.batch["wave"].tolist(),
            one.batch["wave_lengths"].tolist(),
            one.bad,
        )
        for one in loaded
    ]


def test_ragged_arrays():
    rows = ragged(
        [
            np.array([1, 2], dtype=np.int16),
            np.zeros(0, dtype=np.int16),
            np.array([3], dtype=np.int16),
        ]
    )
    assert (
        lengths(rows).tolist() == [2, 0, 1]
        and num_bytes(rows) == 6
        and num_bytes(np.zeros((2, 3))) == 48
    )
    assert pad(rows).tolist() == [[1, 2], [0, 0], [3, 0]] and pad(rows).dtype == np.int16
    assert pad(rows, least=3, fill=-1).tolist() == [[1, 2, -1], [-1, -1, -1], [3, -1, -1]]
    assert ragged([np.zeros(4), np.zeros(4)]).shape == (2,), "rows of one length are ragged too"
    assert pad(rows[:0]).shape == (0, 0) and num_bytes(np.array([b"abc", b""], dtype=object)) == 3


@pytest.mark.parametrize("cost", [None, 40.0])
def test_batches_are_the_same_from_memory_and_from_files(rows, cost):
    rows = rows if cost is None else rows.with_costs(cpus=0)
    plan = stream.plan_of(rows, 3, 12, cost, item_rows=7)
    steps = range(int(2 * plan.batches_per_epoch))
    found = plain(stream.train_batches(rows, plan, steps))
    assert found == plain(
        stream.train_batches(rows.in_memory(1.0, cpus=0, keep_bad=True), plan, steps)
    )
    for ids, wave, many, _ in found:
        assert many == [i % 13 for i in ids] and all(
            row[:n] == list(range(i, i + n)) and not any(row[n:])
            for i, row, n in zip(ids, wave, many, strict=True)
        )
        assert cost is None or len(ids) * max(many) <= 40
    assert {row for *_, bad in found for row, _ in bad} == {40, 81}


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_workers_give_the_same_rows(ray_here, rows):
    """Also where all rows of a block are of one length, which Ray Data would make one array of."""
    for costs in (None, 13.0):
        rows = rows if costs is None else rows.with_costs(cpus=0)
        plan = stream.plan_of(rows, 3, 5, costs, item_rows=1)
        expected = plain(stream.train_batches(rows, plan, range(20)))
        assert (
            plain(
                stream.train_batches(
                    rows, plan, range(20), decode="workers", workers=DataWorkers(1, 0.5)
                )
            )
            == expected
        )


def test_costs_come_from_their_column_or_from_the_rows(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "COST_ROWS", 7)
    assert rows.with_costs(cpus=0).costs.tolist() == [i % 13 for i in range(N)]
    rows.decoder.columns["seconds"] = "seconds"
    message = rows.with_costs(cpus=0)
    assert message.costs.tolist() == [0.5 * (i % 13) for i in range(N)]
    assert message.subset(np.array([5, 3])).costs.tolist() == [1.5, 2.5]
    assert len(message.in_memory(1.0, cpus=0).costs) == N - 2, (
        "those of bad rows are gone with them"
    )
    half = pa.table(
        {"wave": list(range(N)), "seconds": [0.5 * (i % 13) if i % 2 else None for i in range(N)]}
    )
    pq.write_table(half, tmp_path / "half.parquet")
    silent = Rows(
        m.Selection(m.build(str(tmp_path / "half.parquet"), "auto", str(tmp_path))),
        Decoder(Ramps(None, {}), None, {}, rows.decoder.columns),
    )
    assert silent.with_costs(cpus=0).costs.tolist() == [
        (0.5 if i % 2 else 1) * (i % 13) for i in range(N)
    ], "null: the row itself tells"
    looked_at = np.linspace(0, N - 1, 8).astype(int) % 13
    assert rows.decoder.estimate_bytes(rows.selection) == 2 * looked_at.sum() * N // 8, (
        "by what the rows hold"
    )


@pytest.mark.parametrize("samples", [1 << 21, 40, 1])
def test_evaluation_puts_rows_of_like_length_together(rows, monkeypatch, samples):
    monkeypatch.setattr(stream, "EVAL_SAMPLES", samples)
    found = [one.batch for one in stream.eval_batches(rows.in_memory(1.0, cpus=0), 30)]
    assert all(len(batch) == 1 or batch["wave"].numel() <= samples for batch in found)
    assert sorted(row for batch in found for row in batch.rows) == [
        i for i in range(N) if i not in (40, 81)
    ]
    assert (len(found) == 3) == (samples == 1 << 21)
    task = Task(nn.Linear(1, 1), Sums())  # type: ignore[arg-type]
    out = evaluate.predictions(
        task, stream.eval_batches(rows, 30), lambda batch, training: batch, Ranks(), torch.no_grad()
    )
    assert out["row"].tolist() == [i for i in range(N) if i not in (40, 81)]
    assert out["sum"].tolist() == [sum(range(i, i + i % 13)) for i in out["row"]]
    assert [[int(x) for x in row[~np.isnan(row)]] for row in out["each"]] == [
        list(range(i, i + i % 13)) for i in out["row"]
    ]
    assert out["whole"].shape == (N - 2, 12) and set(out["whole"][0]) <= {0, -1}


def test_features_are_in_the_order_of_the_rows(rows, monkeypatch):
    monkeypatch.setattr(stream, "EVAL_SAMPLES", 40)

    class Sum(nn.Module):
        def forward(self, batch: Batch):
            return type("Features", (), {"pooled": batch["wave"].sum(1, keepdim=True)})

    pooled, _ = features(Sum(), rows, torch.device("cpu"))
    assert pooled[:, 0].tolist() == [
        sum(range(i, i + i % 13)) for i in range(N) if i not in (40, 81)
    ]


def test_labels_that_do_not_fit_their_row_are_bad(rows, monkeypatch):
    class Short(Objective):
        roles = ()

        @classmethod
        def untrainable_reasons(cls, table, columns, state, arrays=None, seconds=None):
            return [
                f"{len(row)} samples are too few" if len(row) < state["least"] else ""
                for row in arrays["wave"]
            ]

    monkeypatch.setattr("pipeline.config.registry.get", lambda kind, name: Short)
    rows.decoder.objective, rows.decoder.objective_state = "short", {"least": 3}
    found = dict(rows.in_memory(1.0, cpus=0).bad)
    assert (
        found[40] == "bad"
        and found[13] == "0 samples are too few"
        and set(found) == {i for i in range(N) if i % 13 < 3} | {40, 81}
    )
    rows.decoder.training = False
    assert set(dict(rows.in_memory(1.0, cpus=0).bad)) == {40, 81}, "they can be scored"
