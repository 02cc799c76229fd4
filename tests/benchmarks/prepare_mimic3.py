"""`prepare mimic3` on synthetic CHARTEVENTS of 1x, 4x and 16x rows: rows a second and core, and
the peak memory of all its processes, which must stay flat.

    .venv/bin/python tests/benchmarks/prepare_mimic3.py --json prepare_mimic3.json      # 0.25, 1 and 4 M rows: about 3 minutes on 2 cores; --quick: 1 minute
    .venv/bin/python tests/benchmarks/prepare_mimic3.py --rows 625000                   # 16x is 10 M rows: at most 2 GB in all

Rows stand in random order (the worst for what goes by stay), under MIMIC's fifteen columns, six in
ten of them with an item that is known. ``ray``: the command as a user gives it, with Ray's own
processes and two workers; ``alone``: the same work in one process. Each size is a run of its own.
Memory: the sum over the process and all below it, every 0.1 s, of what each holds for itself plus
its share of what it shares (PSS), and of resident pages (RSS), which counts shared ones as often as
they are shared. Processor time is that of all these processes; the last column is what 16x costs
beyond 4x, so that starting counts for nothing.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing

SIZES, ROWS, QUICK_ROWS, A_STAY, BLOCK = (1, 4, 16), 250_000, 20_000, 5_000, 250_000
MOST_GB, FLAT = 2.0, 1.25
ALONE = """
import sys
from pipeline.prepare.engine.write import Preparation
Preparation("mimic3", sys.argv[1], sys.argv[2]).run()
"""


def make_tables(folder: Path, rows: int, squeezed: bool) -> int:
    """Small tables of as many stays as make ``A_STAY`` rows each, and CHARTEVENTS; the bytes of its
    text.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pcsv

    folder.mkdir()
    random, stays = np.random.default_rng(rows), max(10, rows // A_STAY)
    number, start = (
        np.arange(stays),
        np.datetime64("2100-01-01T08:00:00")
        + random.integers(0, 50 * 365 * 24, stays).astype("timedelta64[h]"),
    )

    def text(times: Any) -> Any:
        return pc.strftime(pa.array(times.astype("datetime64[s]")), "%Y-%m-%d %H:%M:%S")

    def write(name: str, **columns: Any) -> None:
        pcsv.write_csv(pa.table(columns), folder / f"{name}.csv")

    days = np.timedelta64(24, "h")
    write("PATIENTS", SUBJECT_ID=number, GENDER=["F"] * stays, DOB=["2040-01-01 00:00:00"] * stays)
    write(
        "ADMISSIONS",
        SUBJECT_ID=number,
        HADM_ID=100_000 + number,
        ADMITTIME=text(start),
        DISCHTIME=text(start + 9 * days),
        DEATHTIME=[""] * stays,
        HOSPITAL_EXPIRE_FLAG=number % 2,
        ADMISSION_TYPE=["URGENT"] * stays,
    )
    write(
        "ICUSTAYS",
        SUBJECT_ID=number,
        HADM_ID=100_000 + number,
        ICUSTAY_ID=200_000 + number,
        INTIME=text(start),
        OUTTIME=text(start + 5 * days),
    )
    write(
        "LABEVENTS",
        SUBJECT_ID=number,
        HADM_ID=100_000 + number,
        ITEMID=[50912] * stays,
        CHARTTIME=text(start + days),
        VALUENUM=[1.0] * stays,
    )
    known = np.array(
        [
            211,
            51,
            8368,
            52,
            618,
            646,
            678,
            190,
            811,
            220045,
            220179,
            220180,
            220210,
            220277,
            223761,
            198,
        ]
    )
    size, path = 0, folder / ("CHARTEVENTS.csv.gz" if squeezed else "CHARTEVENTS.csv")
    with pa.output_stream(str(path), compression="gzip" if squeezed else None) as sink:
        for begin in range(0, rows, BLOCK):
            count = min(BLOCK, rows - begin)
            who = random.integers(0, stays, count)
            value, hours = (
                np.round(random.uniform(30, 110, count), 1),
                random.uniform(0, 5 * 24, count),
            )
            when = text(start[who] + (hours * 60).astype(np.int64).astype("timedelta64[m]"))
            none = pa.nulls(count, pa.string())
            block = pa.table(
                {
                    "ROW_ID": np.arange(begin, begin + count),
                    "SUBJECT_ID": who,
                    "HADM_ID": 100_000 + who,
                    "ICUSTAY_ID": 200_000 + who,
                    "ITEMID": np.where(
                        random.random(count) < 0.6,
                        random.choice(known, count),
                        5000 + random.integers(0, 1000, count),
                    ),
                    "CHARTTIME": when,
                    "STORETIME": when,
                    "CGID": random.integers(14000, 21000, count),
                    "VALUE": pa.array(value).cast(pa.string()),
                    "VALUENUM": value,
                    "VALUEUOM": ["mmHg"] * count,
                    "WARNING": none,
                    "ERROR": none,
                    "RESULTSTATUS": none,
                    "STOPPED": ["NotStopd"] * count,
                }
            )
            buffer = pa.BufferOutputStream()
            pcsv.write_csv(block, buffer, pcsv.WriteOptions(include_header=begin == 0))
            size += len(data := buffer.getvalue())
            sink.write(data)
    return size


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds, and the greatest sums of PSS and RSS in GB of a command and all
    below it.
    """
    import psutil

    began = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    spent: dict[int, float] = {}
    pss = rss = 0
    while process.poll() is None:
        own, resident = 0, 0
        for one in [process, *process.children(recursive=True)]:
            try:
                memory, times = one.memory_full_info(), one.cpu_times()
            except psutil.Error:
                continue
            own, resident = own + memory.pss, resident + memory.rss
            spent[one.pid] = times.user + times.system
        pss, rss = max(pss, own), max(rss, resident)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(
            f"{' '.join(command)}: "
            f"{process.stderr.read().decode()[-2000:] if process.stderr else ''}"
        )
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": sum(spent.values()),
        "pss_gb": pss / 1e9,
        "rss_gb": rss / 1e9,
    }


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=1,
        rows={"type": int, "help": f"of CHARTEVENTS at 1x (default {ROWS})"},
        gzip={"action": "store_true", "help": "CHARTEVENTS.csv.gz, which one task reads"},
        side={"choices": ["ray", "alone"], "help": "one side only"},
    )
    found, results, lines = timing.describe(args), {}, []
    base = args.rows or (QUICK_ROWS if args.quick else ROWS)
    with tempfile.TemporaryDirectory() as folder:
        for times in SIZES:
            rows, source = base * times, Path(folder, f"{times}x")
            size = make_tables(source, rows, args.gzip)
            sides = {
                "alone": [sys.executable, "-c", ALONE],
                "ray": [str(Path(sys.executable).with_name("onetomany")), "prepare", "mimic3"],
            }
            for side, command in sides.items():
                if args.side in (None, side):
                    output = str(Path(folder, f"{times}x {side}"))
                    one = measured(
                        [*command, str(source), output]
                        if side == "alone"
                        else [*command, str(source), "-o", output]
                    )
                    results[f"{side}, {times}x"] = {**one, "rows": rows, "text_mb": size / 1e6}
                    print(f"    {side}, {times}x: {one}", flush=True)
    for side in ("alone", "ray"):
        mine = {
            times: results[f"{side}, {times}x"] for times in SIZES if f"{side}, {times}x" in results
        }
        for times, one in mine.items():
            rate = ""
            if times == SIZES[-1]:
                less = mine[SIZES[-2]]
                rate = f"{(one['rows'] - less['rows']) / max(1e-9, one['cpu_seconds'] - less['cpu_seconds']):,.0f}"
            flat = one["pss_gb"] / mine[SIZES[0]]["pss_gb"]
            target = (
                timing.verdict(
                    one["pss_gb"] <= MOST_GB and flat <= FLAT, f"{MOST_GB:g} GB, at most {FLAT}x"
                )
                if times == SIZES[-1]
                else ""
            )
            lines.append(
                [
                    side,
                    f"{one['rows']:,}",
                    f"{one['text_mb']:.0f}",
                    f"{one['seconds']:.1f}",
                    f"{one['rows'] / one['cpu_seconds']:,.0f}",
                    f"{one['pss_gb']:.2f}",
                    f"{one['rss_gb']:.2f}",
                    f"{flat:.2f}x",
                    rate,
                    target,
                ]
            )
    timing.table(
        "prepare mimic3 on CHARTEVENTS",
        [
            "side",
            "rows",
            "MB of text",
            "s",
            "rows/s and core",
            "peak GB (PSS)",
            "peak GB (RSS)",
            "memory to 1x",
            "rows/s and core beyond 4x",
            "target",
        ],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
