"""Augmentation of a batch on the device against torchvision's transforms one image at a time on
the CPU; a real-JPEG epoch against a synthetic one.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/augment.py --json augment.json     # some 10 minutes on 2 quiet cores; --quick: 1 min

Augmentation: a uint8 batch in memory to normalised floats, 224 px and 64 px. ``theirs`` is what a
user would write: torchvision.transforms.v2 on uint8 tensors, image by image, stacked; one thread,
as in a data worker. ``cpu`` is the image modality's augment (or views) and finish with one thread,
both in processor time; ``gpu`` the same on the GPU where there is one, by the clock. ``crop``:
random resized crop, flip. ``colour``: with jitter 0.4. ``randaugment``: with two operations of
magnitude 9. ``view``: SimCLR's (crop 0.2 to 1, flip, jitter 0.8, grey, blur).

Epoch: train/loop.fit with ResNet-18 (a GPU: ResNet-50 at 224 px) and augmentation over coco128's
photos as JPEG, read and decoded by the project's own loader as training goes, against the same over
random pixels that lie in memory. Target: at least 0.90 of its rate on a CPU, 0.95 on a GPU.
``--place`` is where rows are decoded: train (threads of this process), workers (Ray Data) or
device. The loop has all cores but one. ``CPU ms`` is processor time a row of this process: with
place train, its ratio is what is left of the rate where a single core does everything.

GPU decode (where there is a GPU): JPEGs to batches by ``unpack`` there, against ``decode`` in a
process for each of 16 cores.

Measured on 2 cores (load 2 before, one other process that mostly read), torch 2.11, no GPU, default
rows, 5 minutes. theirs / ours in processor time, median of 5 turns: at 64 px crop 2.4, colour 2.4,
randaugment 1.4, view 2.8; at 224 px 0.78, 0.93, 0.53 and 4.4 (torchvision resizes uint8 with vector
code of its own there). Epoch: JPEG / synthetic 0.912 [0.800, 0.988] by the clock, 0.911 in
processor time. Nothing of the GPU's was measured.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ingest
import timing

from pipeline.core.specs import Architecture, ObjectiveSpec

BATCHES = {224: 16, 64: 128}
KINDS: dict[str, dict[str, Any]] = {
    "crop": {},
    "colour": {"colour": 0.4},
    "randaugment": {"randaugment": 9},
    "view": {},
}
STATE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def batch_of(size: int, rows: int) -> Any:
    import numpy as np
    import torch

    from pipeline.core.contracts import Batch
    from pipeline.core.rng import row_keys

    soft = torch.nn.functional.interpolate(
        torch.rand(rows, 3, 8, 8), size=(size, size), mode="bicubic"
    ).clamp(0, 1)
    keys = torch.from_numpy(row_keys(0, np.zeros(rows, dtype=np.int64), np.arange(rows)))
    return Batch(np.arange(rows), keys, {"image": (soft * 255).to(torch.uint8)})


def ours(kind: str, size: int, batch: Any, device: Any, repeats: int) -> Callable[[], float]:
    """Milliseconds an image."""
    import torch

    from pipeline.core.contracts import View
    from pipeline.modalities.image import Image, ImageOptions

    modality = Image(ImageOptions(size=size, crop="resized", **KINDS[kind]), STATE)
    there = batch.to(device)

    def one() -> Any:
        return (
            modality.views(there, (View(),))
            if kind == "view"
            else modality.finish(modality.augment(there))
        )

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def side() -> float:
        one()
        began = clock()
        for _ in range(repeats):
            one()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (clock() - began) / repeats / len(batch)

    return side


def theirs(kind: str, size: int, batch: Any, repeats: int) -> Callable[[], float]:
    import torch
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.2 if kind == "view" else 0.35, 1.0), antialias=True)
    more = {
        "crop": [],
        "colour": [v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "randaugment": [v2.RandAugment(2, 9, interpolation=v2.InterpolationMode.BILINEAR)],
        "view": [
            v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(2 * max(1, size // 20) + 1, (0.1, 2.0))], 0.5),
        ],
    }[kind]
    work = v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(),
            *more,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(STATE["mean"], STATE["std"]),
        ]
    )

    def side() -> float:
        began = time.process_time()
        for _ in range(repeats):
            torch.stack([work(image) for image in batch["image"]])
        return 1e3 * (time.process_time() - began) / repeats / len(batch)

    return side


def augmentation(args: Any, results: dict[str, Any]) -> list[list[str]]:
    import torch

    torch.set_num_threads(1)
    lines, repeats = [], 1 if args.quick else 4
    for size, rows in BATCHES.items():
        batch = batch_of(size, rows)
        for kind in KINDS:
            sides = {
                "theirs": theirs(kind, size, batch, repeats),
                "cpu": ours(kind, size, batch, torch.device("cpu"), repeats),
            }
            if torch.cuda.is_available():
                sides["gpu"] = ours(kind, size, batch_of(size, 256), torch.device("cuda"), 20)
            print(f"  {size} px, {kind}: ms an image")
            found = timing.interleaved(sides, args.repeats)
            results[f"{size} px, {kind}"] = found
            for name in list(sides)[1:]:
                against = timing.ratio(found["theirs"], found[name])
                lines.append(
                    [
                        f"{size} px",
                        kind,
                        name,
                        *(timing.Spread.of(found[side]).text() for side in ("theirs", name)),
                        against.text(),
                    ]
                )
    return lines


# ---------------------------------------------------------------- epochs


def photos(path: Path, rows: int, side: int) -> None:
    """Parquet of coco128's photos as JPEG, the shorter side at most ``side`` px, as a prepared
    corpus has them.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [image for image in ingest.photos() if min(image.size) > 150]
    for image in images:
        image.thumbnail((side * 2, side * 2))
    encoded = [ingest.jpeg(image) for image in images]
    table = pa.table(
        {
            "image": pa.array([encoded[i % len(encoded)] for i in range(rows)], pa.binary()),
            "label": np.arange(rows) % 10,
        }
    )
    pq.write_table(table, path, row_group_size=256, compression="none", use_dictionary=False)
    print(
        f"  {rows} JPEG of {len(images)} photos, {path.stat().st_size / rows / 1000:.1f} kB a row",
        flush=True,
    )


def epoch(
    task: Any,
    rows: Any,
    spec: dict[str, Any],
    device: Any,
    place: str,
    threads: int,
    processor: list[float],
) -> Callable[[], float]:
    """Rows/s of one whole epoch of the loop, from its first request for a batch: decoding runs
    ahead, and what ran ahead before a count began would be left out of it. ``processor`` is given
    the milliseconds of processor time a row.
    """
    import torch

    from pipeline.config.schema import Train
    from pipeline.data.plan import Plan
    from pipeline.data.stream import DataWorkers, rows_per_item, train_batches
    from pipeline.techniques.full import Full
    from pipeline.train import loop
    from pipeline.train.evaluate import device_preprocessing

    steps = len(rows) // spec["batch"]
    plan = Plan(len(rows), 0, spec["batch"], item_rows=rows_per_item(rows, 8))
    train = Train(
        steps=steps, global_batch=spec["batch"], lr=1e-3, augment=True, log_every_steps=10
    )

    def side() -> float:
        began: list[tuple[float, float]] = []

        def batches(span: range) -> Iterator[Any]:
            stream = train_batches(
                rows,
                plan,
                span,
                decode=place,
                pin=device.type == "cuda",
                threads=threads,  # type: ignore[arg-type]
                workers=DataWorkers(actors=max(1, threads), cpus_per_actor=0.5),
                device=device,
            )
            for _ in span:
                began.append((time.perf_counter(), time.process_time()))
                yield next(stream)

        loop.fit(
            loop.TrainingRun(
                task=copy.deepcopy(task),
                technique=Full(),
                train=train,
                steps=steps,
                seed=0,
                batches=batches,
                preprocess=device_preprocessing(rows),
                keeper=loop.KeepBest("accuracy", "best"),
            )
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        clock, used = began[0]
        processor.append(1e3 * (time.process_time() - used) / len(rows))
        return len(rows) / (time.perf_counter() - clock)

    return side


def epochs(args: Any, results: dict[str, Any], folder: str) -> list[list[str]]:
    import numpy as np
    import torch

    from pipeline.checkpoints import bundle
    from pipeline.data.stream import Rows

    gpu = torch.cuda.is_available()
    cores = os.cpu_count() or 1
    torch.set_num_threads(max(1, cores - 1))
    spec: dict[str, Any] = (
        {"model": "resnet50", "size": 224, "batch": 256, "rows": 256 * 60, "target": 0.95}
        if gpu
        else {"model": "resnet18", "size": 112, "batch": 32, "rows": 32 * 24, "target": 0.90}
    )
    spec["rows"] = args.rows or (2 * spec["batch"] if args.quick else spec["rows"])
    photos(Path(folder, "photos.parquet"), spec["rows"], spec["size"] + 32)
    real = ingest.rows_of(Path(folder, "photos.parquet"), spec["size"])
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (spec["rows"], 3, spec["size"], spec["size"]), dtype=np.uint8)
    synthetic = Rows(
        real.selection, real.decoder, {"image": pixels, "label": np.arange(spec["rows"]) % 10}
    )
    device = torch.device("cuda" if gpu else "cpu")
    arch = Architecture(f"timm/{spec['model']}", {}, {"channels": 3, "size": spec["size"]})
    task = bundle.build_task(
        arch, ObjectiveSpec("classification", {}, real.decoder.objective_state), seed=0
    ).to(device)
    if args.place != "train":
        from pipeline.train import launch

        launch.start(None, verbose=False)
    threads = max(1, cores - 2)
    print(
        f"  {spec['model']} at {spec['size']} px, batch {spec['batch']}, {spec['rows']} rows: "
        "rows/s"
    )
    processor: dict[str, list[float]] = {"synthetic": [], "jpeg": []}
    found = timing.interleaved(
        {
            "synthetic": epoch(
                task, synthetic, spec, device, "train", threads, processor["synthetic"]
            ),
            "jpeg": epoch(task, real, spec, device, args.place, threads, processor["jpeg"]),
        },
        args.repeats,
    )
    if args.place != "train":
        launch.stop()  # pyright: ignore[reportPossiblyUnboundVariable]
    results["epoch"] = {"rows_per_second": found, "processor_ms": processor, "place": args.place}
    share, single = (
        timing.ratio(found["jpeg"], found["synthetic"]),
        timing.ratio(processor["synthetic"], processor["jpeg"]),
    )
    met = timing.verdict(share.median >= spec["target"], f"at least {spec['target']}")
    spreads = [
        timing.Spread.of(values).text(4)
        for pair in (found, processor)
        for values in (pair["synthetic"], pair["jpeg"])
    ]
    return [
        [
            f"{spec['model']}, {spec['size']} px",
            args.place,
            *spreads[:2],
            share.text(),
            *spreads[2:],
            single.text(),
            met,
        ]
    ]


# ---------------------------------------------------------------- decoding on a GPU


def decoding(args: Any, results: dict[str, Any]) -> list[list[str]]:
    """Rows/s of JPEGs to (B, 3, 224, 224): the GPU's decoder, and 16 processes on as many cores."""
    from multiprocessing import get_context

    import numpy as np
    import torch

    from pipeline.modalities.image import Image, ImageOptions

    images = [
        image.resize((500, 375))
        for image in ingest.photos()
        if image.width > image.height and image.width >= 300
    ]
    files = [ingest.jpeg(image) for image in images]
    rows = 128 if args.quick else 4096
    encoded = np.array([files[i % len(files)] for i in range(rows)], dtype=object)
    modality = Image(ImageOptions(size=224), STATE)

    def gpu() -> float:
        began = time.perf_counter()
        for start in range(0, rows, 256):
            modality.unpack(encoded[start : start + 256], torch.device("cuda"))
        torch.cuda.synchronize()
        return rows / (time.perf_counter() - began)

    parts = np.array_split(encoded, 64)
    with get_context("spawn").Pool(16) as pool:
        pool.map(_decoded, parts[:16])

        def cpu() -> float:
            return rows / timing.seconds(lambda: pool.map(_decoded, parts))

        gpu()
        found = timing.interleaved({"gpu": gpu, "cpu": cpu}, args.repeats)
    results["decode"] = found
    names = {"gpu": "GPU", "cpu": "16 processes"}
    return [
        [
            text,
            timing.Spread.of(found[name]).text(4),
            timing.ratio(found[name], found["cpu"]).text(),
        ]
        for name, text in names.items()
    ]


def _decoded(part: Any) -> int:
    """What a data worker does with a part; only its count comes back."""
    import pyarrow as pa
    import torch

    from pipeline.modalities.image import Image, ImageOptions

    torch.set_num_threads(1)
    arrays, _ = Image(ImageOptions(size=224), STATE).decode(
        pa.table({"image": pa.array(list(part), pa.binary())}), {"image": "image"}
    )
    return len(arrays["image"])


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=5,
        place={
            "choices": ["train", "workers", "device"],
            "default": "train",
            "help": "where JPEGs are decoded (train)",
        },
        rows={"type": int, "help": "rows of the epoch, a multiple of 32 (768; on a GPU 15360)"},
        only={"choices": ["augment", "epoch", "decode"], "help": "one part only"},
    )
    found, results = timing.describe(args), {}
    import torch

    if args.only in (None, "augment"):
        lines = augmentation(args, results)
        timing.table(
            "Augmentation, ms an image, median [min, max]",
            ["size", "kind", "side", "theirs", "ours", "theirs / ours"],
            lines,
        )
    if args.only in (None, "epoch"):
        with tempfile.TemporaryDirectory() as folder:
            lines = epochs(args, results, folder)
        header = [
            "model",
            "place",
            "synthetic rows/s",
            "JPEG rows/s",
            "JPEG / synthetic",
            "synthetic CPU ms",
            "JPEG CPU ms",
            "ratio",
            "target",
        ]
        timing.table("Epoch", header, lines)
    if args.only in (None, "decode") and torch.cuda.is_available():
        timing.table(
            "JPEG 500 x 375 to 224, rows/s",
            ["side", "rows/s", "ratio to 16 processes"],
            decoding(args, results),
        )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
