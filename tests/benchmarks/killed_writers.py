"""Kills writers at random moments with SIGKILL: what is visible must be whole or absent, and what
they left is swept.

    python tests/benchmarks/killed_writers.py [kills] [seed]        200 kills take about two minutes

Each writer writes into the same place over and over, in a process of its own that is forked, killed
after a random time, and looked after by another: the one file or folder that readers see must hold
what some write put there, and after `sweep` nothing else may lie around. Prints a table; exit code
1 when anything was torn or left.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.io import atomic_folder, checksums, storage
from pipeline.report import results
from pipeline.train import checkpoint
from pipeline.train.ranks import Ranks

OUTCOMES = ("whole", "absent", "torn", "left behind")


# ------------------------------------------------------- writers, and what looks at what they wrote


def content(number: int) -> bytes:
    """Up to 2 MiB, with their own SHA-256 at the end."""
    body = np.random.default_rng(number).bytes(1 + number * 7919 % (2 << 20))
    return body + hashlib.sha256(body).digest()


def is_content(data: bytes) -> bool:
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def write_file(place: str, number: int) -> None:
    storage.write_bytes(storage.join(place, "file"), content(number))


def check_file(place: str) -> bool:
    return is_content(storage.read_bytes(storage.join(place, "file")))


def write_document(place: str, number: int) -> None:
    checksums.write_document(
        storage.join(place, "record.json"), {"number": number, "rows": list(range(number % 5000))}
    )


def check_document(place: str) -> bool:
    found = checksums.read_document(storage.join(place, "record.json"))
    return found["rows"] == list(range(found["number"] % 5000))


def write_folder(place: str, number: int) -> None:
    with storage.scratch_folder() as scratch:
        large = scratch / "large"
        large.write_bytes(content(number))
        atomic_folder.commit_folder(
            storage.join(place, "folder"),
            {"large": large, "deep/small": content(number % 100)},
            {"number": number},
        )


def check_folder(place: str) -> bool:
    uri = storage.join(place, "folder")
    manifest = atomic_folder.open_folder(uri)
    atomic_folder.verify_folder(uri, manifest)
    return sorted(manifest["files"]) == ["deep/small", "large"]


def write_table(place: str, number: int) -> None:
    results.append(
        place,
        [
            results.ResultRow(
                trial_id=f"{number}-{i}",
                status="done",
                trial_stage="final",
                metric="accuracy",
                split="test",
            )
            for i in range(3)
        ],
    )


def check_table(place: str) -> bool:
    if not storage.exists(storage.join(place, results.FILE)):
        raise storage.NotFoundError(place)
    by_append = Counter(row.trial_id.split("-")[0] for row in results.read(place))
    return set(by_append.values()) == {3}


def write_point(place: str, number: int) -> None:
    checkpoint.save(
        storage.join(place, "checkpoints"),
        Ranks(),
        {"step": number, "model": torch.full((1 + number % 100_000,), number)},
    )


def check_point(place: str) -> bool:
    state, damaged = checkpoint.load(storage.join(place, "checkpoints"), Ranks())
    if state is None:
        raise storage.NotFoundError(place)
    return not damaged and bool((state["model"] == state["step"]).all())


WRITERS: dict[str, tuple[Callable[[str, int], None], Callable[[str], bool]]] = {
    "file": (write_file, check_file),
    "document": (write_document, check_document),
    "folder": (write_folder, check_folder),
    "results.parquet": (write_table, check_table),
    "resume point": (write_point, check_point),
}


# ---------------------------------------------------------------- kills


def forked(work: Callable[[], object]) -> int:
    """The process number of a child that does the work and ends with 0, or with 1 and its
    traceback.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill_one(name: str, place: str, seconds: float, seed: int) -> str:
    """Kill a writer after so many seconds; what was found then."""
    write, check = WRITERS[name]
    ready, begun = os.pipe()

    def write_on() -> None:
        for number in range(seed, seed + 100_000):
            if number == seed + 1:
                os.write(begun, b"x")
            write(place, number)

    pid = forked(write_on)
    if seed % 4:  # else it may be killed in its very first write
        os.read(ready, 1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(begun)

    def look() -> None:
        try:
            os._exit(10 if check(place) else 12)
        except storage.NotFoundError:
            os._exit(11)

    code = os.waitstatus_to_exitcode(os.waitpid(forked(look), 0)[1])
    outcome = {10: "whole", 11: "absent"}.get(code, "torn")
    storage.sweep(place, 3600)
    storage.sweep_scratch(3600)
    left = [
        *Path(place).rglob(".*.tmp-*"),
        *(
            path
            for path in Path(tempfile.gettempdir()).glob(".onetomany.tmp-*")
            if f"-{pid}-" in path.name
        ),
    ]
    return "left behind" if left else outcome


def kills(count: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Outcomes by writer, in turn; a writer goes on in the folder of its last kill."""
    rng = np.random.default_rng(seed)
    names = list(WRITERS)
    table: dict[str, Counter[str]] = {name: Counter() for name in names}
    for number in range(count):
        name = names[number % len(names)]
        place = folder / f"{name.replace(' ', '-')}-{number // 40}"
        place.mkdir(exist_ok=True)
        table[name][
            kill_one(name, str(place), float(rng.uniform(0, 0.15)), 1000 * number + number)
        ] += 1
    return table


def main() -> int:
    count, seed = (int(word) for word in (*sys.argv[1:], 200, 0)[:2])
    with tempfile.TemporaryDirectory() as folder:
        table = kills(count, seed, Path(folder))
    print(f"{'writer':18} {'kills':>6}" + "".join(f"{name:>13}" for name in OUTCOMES))
    for name, found in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(
            f"{name:18} {found.total():>6}"
            + "".join(f"{found[outcome]:>13}" for outcome in OUTCOMES)
        )
    total = sum(table.values(), Counter())
    return 1 if total["torn"] or total["left behind"] else 0


if __name__ == "__main__":
    sys.exit(main())
