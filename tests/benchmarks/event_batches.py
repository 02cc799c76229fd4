"""Event records: batches of the stream against a bare pyarrow scan of the same file, in
megabytes per second and core.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/event_batches.py --json events.json     # about a minute; --quick: 10 s

The 4000 stays of PhysioNet 2012's set-a (433 events each) are written several times over as
Parquet, one row a stay, in row groups of 512. ``bare`` reads their columns with
``pyarrow.parquet.ParquetFile.read_row_group`` in one thread and does nothing with them: no
shuffling, no names looked up, nothing standardised, padded or collated. ``stream`` is what training
reads: batches of 64 rows in the order of a plan (row groups permuted, rows permuted inside),
decoded by modality events in this process with one thread. Megabytes are those of the Arrow columns
in memory, the same on both sides; seconds are processor time of this process. Target: at
least 0.6 of the bare scan.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timing

from pipeline.core.specs import ModalitySpec

COPIES, QUICK_COPIES, GROUP, BATCH, TARGET = 6, 1, 512, 64, 0.6
COLUMNS = {role: role for role in ("times", "variables", "values")}


def make_parquet(path: Path, copies: int) -> float:
    """Writes the stays; returns the megabytes of their columns."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(timing.data_folder() / "healthcare/physionet2012/events_a.parquet")
    record, hours = table["recordid"].to_numpy(), table["minute"].to_numpy() / 60
    order = np.lexsort((hours, record))
    _, counts = np.unique(record, return_counts=True)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    names = (
        table["parameter"]
        .combine_chunks()
        .take(pa.array(order))
        .cast(pa.dictionary(pa.int32(), pa.string()))
    )
    parts = {
        "times": pa.array(hours[order].astype(np.float32)),
        "variables": names,
        "values": pa.array(table["value"].to_numpy()[order].astype(np.float32)),
    }
    stays = pa.table(
        {name: pa.ListArray.from_arrays(offsets, values) for name, values in parts.items()}
    )
    with pq.ParquetWriter(path, stays.schema) as writer:
        for _ in range(copies):
            writer.write_table(stays, row_group_size=GROUP)
    return stays.nbytes * copies / 1e6


def main() -> None:
    args = timing.options(__doc__, repeats=5)
    found = timing.describe(args)
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from pipeline.modalities.events import Events, EventsOptions

    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stays.parquet")
        megabytes = make_parquet(path, QUICK_COPIES if args.quick else COPIES)
        state = Events.fit(
            EventsOptions(), pq.read_table(path).slice(0, 2048), COLUMNS, "events/gru"
        )
        sides = timing.batches_and_scan(
            path, megabytes, ModalitySpec("events", {}, state), COLUMNS, BATCH
        )
        for side in sides.values():
            side()  # warm
        rates = timing.interleaved(sides, args.repeats)
    share = timing.ratio(rates["stream"], rates["bare"])
    lines = [
        [
            name,
            timing.Spread.of(values).text(4),
            share.text() if name == "stream" else "",
            timing.verdict(share.median >= TARGET, f"at least {TARGET}")
            if name == "stream"
            else "",
        ]
        for name, values in rates.items()
    ]
    timing.table(
        "Megabytes of event columns per second of one core, median [min, max]",
        ["side", "MB/s", "of bare", "target"],
        lines,
    )
    timing.write(args, found, rates)


if __name__ == "__main__":
    main()
