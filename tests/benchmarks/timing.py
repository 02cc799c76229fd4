"""What the benchmarks share: sides measured in turns (A, B, A, B, ...), medians with their spread,
paired ratios, one table.

Imports nothing heavy, so that a script may set its environment first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

QUIET = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Spread:
    """Median of several measurements with the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 3) -> str:
        return f"{self.median:.{digits}g} [{self.low:.{digits}g}, {self.high:.{digits}g}]"


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """Quotients of measurements of the same turn: what slows the machine for a while slows both."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def options(doc: str | None, repeats: int, **more: Any) -> argparse.Namespace:
    """``--quick``, ``--repeats``, ``--json`` and the script's own options (name to argparse
    keywords).
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes: shows that the script runs, its numbers mean nothing",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=None,
        help=f"turns of each side (default {repeats}, 2 with --quick)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all measurements here as well")
    for name, words in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **words)
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else repeats)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    return args


def interleaved(sides: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each side in turn, ``repeats`` times. A side leaves its own warm-up out of what it
    returns.
    """
    out: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, side in sides.items():
            out[name].append(side())
            print(f"    turn {turn + 1}/{repeats}  {name}: {out[name][-1]:.4g}", flush=True)
    return out


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in (header, ["-" * width for width in widths], *rows):
        print(
            "  "
            + "  ".join(
                text.ljust(width) for text, width in zip(line, widths, strict=True)
            ).rstrip(),
            flush=True,
        )


def verdict(met: bool, target: str) -> str:
    return ("met: " if met else "MISSED: ") + target


def machine() -> dict[str, Any]:
    """Where this was measured, and how busy it was before."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": gpu,
    }


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the machine; call it before measuring."""
    found = machine()
    print(
        f"{found['cpus']} CPUs, load {found['load']:.2f} before, torch {found['torch']}, "
        f"{found['gpu'] or 'no GPU'}"
        + ("; --quick: the numbers mean nothing" if args.quick else ""),
        flush=True,
    )
    return found


def write(args: argparse.Namespace, found: dict[str, Any], results: Any) -> None:
    """The JSON file, when one is asked for."""
    if args.json:
        plain = json.dumps(
            {"machine": found, "quick": args.quick, "results": results},
            indent=1,
            default=lambda o: asdict(o),
        )
        Path(args.json).write_text(plain + "\n")
        print(f"\nwritten: {args.json}")


def data_folder() -> Path:
    """The folder that ONETOMANY_DATA names. Exits with what to do when it names none."""
    folder = Path(os.environ.get("ONETOMANY_DATA", "ONETOMANY_DATA is not set"))
    if not (folder / "vision").is_dir():
        raise SystemExit(
            f"no data in {folder}: set ONETOMANY_DATA to the folder that holds "
            "vision/clothing_small"
        )
    return folder


def batches_and_scan(
    path: Path, megabytes: float, modality: dict[str, Any], columns: dict[str, str], batch: int
) -> dict[str, Callable[[], float]]:
    """``bare``, a scan of a Parquet file's columns in one thread, and ``stream``, its batches in
    the order of a plan: megabytes per second of this process's processor time.
    """
    import pyarrow.parquet as pq

    from pipeline.checkpoints import bundle
    from pipeline.data import manifests
    from pipeline.data.stream import Decoder, Rows, plan_of, train_batches

    rows = Rows(
        manifests.Selection(manifests.build(str(path), "parquet", "")),
        Decoder(bundle.build_modality(modality), None, {}, columns),
    )
    plan, steps = plan_of(rows, 0, batch, shuffle="blocks"), len(rows) // batch
    print(f"  {len(rows)} rows, {megabytes:.0f} MB in memory, {steps} batches", flush=True)

    def bare() -> None:
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            file.read_row_group(group, columns=list(columns), use_threads=False)

    def stream() -> None:
        assert (
            sum(
                len(loaded.batch)
                for loaded in train_batches(rows, plan, range(steps), decode="train", threads=1)
            )
            == steps * batch
        )

    def rate(work: Callable[[], None]) -> float:
        began = time.process_time()
        work()
        return megabytes / (time.process_time() - began)

    return {"bare": partial(rate, bare), "stream": partial(rate, stream)}


def trainer_arguments(folder: str, rows: int, steps: int, **more: Any) -> Any:
    """Arguments of transformers' Trainer for this project's default optimiser and schedule, with
    nothing written or logged.

    Args:
        rows: Rows of a step.
    """
    import transformers

    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows,
        max_steps=steps,
        learning_rate=1e-4,
        weight_decay=0.05,
        optim="adamw_torch_fused",
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * steps),
        max_grad_norm=1.0,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
