"""Ingest of JPEG Parquet: the stream against torch DataLoader with 2 workers and the same
decode; and the decode + resize kernel.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/ingest.py --json ingest.json     # about 7 minutes on 2 quiet cores; --quick: 30 s

Photos of coco128 and clothing_small are cut to 224 px and to 64 px, encoded anew (JPEG q85) and
written as Parquet with row groups of 256 rows. Every side gives the same batches (the plan's rows
in the plan's order, the image modality's decode, its collate) to a consumer that does nothing.
Steady state: each turn starts its side anew, leaves the warm-up batches out and stops long before
the end of what it was asked for, so that nothing that was made beforehand is counted.

``workers``: Ray Data with 2 actors. ``train``: 2 threads in this process. ``dataloader``: the
encoded table in memory, 2 forked processes, a batch sampler with the plan's batches, whole batches
decoded by one call. Beside each rate: processor time a row, in this process and in all others,
which names what limits it. Targets: 0.9 at 224 px, 0.8 (aiming at 0.9) at 64 px.

Kernel: torchvision decode + the modality's resize against PIL decode + PIL resize (bilinear, which
antialiases), one thread, 500 x 375 JPEG to 224. Targets: 1.7x, 60 dB PSNR.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timing

from pipeline.core.specs import ModalitySpec

SIZES = {
    224: {"rows": 8000, "batch": 128, "warm": 24, "steps": 64, "target": 0.9},
    64: {"rows": 20000, "batch": 256, "warm": 48, "steps": 160, "target": 0.8},
}
QUICK = {"rows": 512, "batch": 64, "warm": 2, "steps": 8}
GROUP_ROWS = 256


def photos() -> list[Any]:
    """Real photos as PIL images: 128 of at most 320 px, 600 of at most 96 px."""
    import PIL.Image
    import pyarrow.parquet as pq

    folder = timing.data_folder() / "vision"
    out = []
    for file, most in (
        ("coco128_detection/train.parquet", 128),
        ("clothing_small/train.parquet", 600),
    ):
        for data in pq.read_table(folder / file, columns=["image"])["image"].to_pylist()[:most]:
            out.append(
                PIL.Image.open(
                    io.BytesIO(data["bytes"] if isinstance(data, dict) else data)
                ).convert("RGB")
            )
    return out


def jpeg(image: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def make_parquet(images: list[Any], size: int, rows: int, path: Path) -> None:
    """Random crops of the photos whose shorter side is scaled to 1.0 to 1.3 x size, with a label
    each.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(size)
    large = [image for image in images if min(image.size) >= 0.7 * size]
    encoded = []
    for i in range(rows):
        image = large[i % len(large)]
        scale = size * random.uniform(1.0, 1.3) / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
        )
        x, y = (
            int(random.integers(0, image.width - size + 1)),
            int(random.integers(0, image.height - size + 1)),
        )
        encoded.append(jpeg(image.crop((x, y, x + size, y + size))))
    table = pa.table(
        {"image": pa.array(encoded, pa.binary()), "label": pa.array(random.integers(0, 10, rows))}
    )
    pq.write_table(table, path, row_group_size=GROUP_ROWS, compression="none", use_dictionary=False)
    print(f"  {size} px: {rows} rows, {path.stat().st_size / rows / 1000:.1f} kB a row", flush=True)


def rows_of(path: Path, size: int) -> Any:
    from pipeline.checkpoints import bundle
    from pipeline.data import manifests
    from pipeline.data.stream import Decoder, Rows

    modality = bundle.build_modality(
        ModalitySpec("image", {"size": size}, {"mean": [0.5] * 3, "std": [0.25] * 3})
    )
    decoder = Decoder(
        modality,
        "classification",
        {"values": list(range(10)), "labels": [str(i) for i in range(10)]},
        {"image": "image", "label": "label"},
    )
    return Rows(manifests.Selection(manifests.build(str(path), "parquet", "")), decoder)


class Table:
    """A map-style data set over the encoded table; ``__getitems__`` decodes a whole batch, as
    torch's fetcher prefers.
    """

    def __init__(self, path: Path, rows: Any):
        import pyarrow.parquet as pq

        self.table, self.rows = pq.read_table(path).combine_chunks(), rows

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, ids: list[int]) -> dict[str, Any]:
        arrays, _ = self.rows.decoder(self.table.take(ids))
        return self.rows.modality.collate(arrays)


def _same(batch: Any) -> Any:
    return batch


class Steady:
    """Rows/s of one side after its warm-up, and the processor seconds a row while it ran."""

    def __init__(self, batches: Callable[[], Iterator[Any]], spec: dict[str, Any]):
        self.batches, self.spec = batches, spec
        self.here: list[float] = []
        self.elsewhere: list[float] = []

    def __call__(self) -> float:
        stream = self.batches()
        for _ in range(self.spec["warm"]):
            next(stream)
        before, began = processor_seconds(), time.perf_counter()
        for _ in range(self.spec["steps"]):
            next(stream)
        took, after = time.perf_counter() - began, processor_seconds()
        stream.close()  # type: ignore[attr-defined]
        rows = self.spec["steps"] * self.spec["batch"]
        self.here.append(1e3 * (after[0] - before[0]) / rows)
        self.elsewhere.append(1e3 * (after[1] - before[1]) / rows)
        time.sleep(1.0)  # what the side started has ended before the next one begins
        return rows / took


def processor_seconds() -> tuple[float, float]:
    """Processor seconds of this process and of all that it started."""
    import psutil

    def of(process: Any) -> float:
        try:
            times = process.cpu_times()
            return times.user + times.system
        except psutil.NoSuchProcess:
            return 0.0

    me = psutil.Process()
    return of(me), sum(of(child) for child in me.children(recursive=True))


def sides(path: Path, size: int, spec: dict[str, Any]) -> dict[str, Steady]:
    from torch.utils.data import DataLoader

    from pipeline.data.plan import Plan
    from pipeline.data.stream import DataWorkers, rows_per_item, train_batches

    rows, batch = rows_of(path, size), spec["batch"]
    plan = Plan(len(rows), 0, batch, item_rows=rows_per_item(rows, 8))
    # Twice what is read: no side comes near its end
    span = range(2 * (spec["warm"] + spec["steps"]))

    def ours(place: str) -> Callable[[], Iterator[Any]]:
        def make() -> Iterator[Any]:
            stream = train_batches(
                rows,
                plan,
                span,
                decode=place,
                threads=2,
                workers=DataWorkers(actors=2, cpus_per_actor=0.5),
            )  # type: ignore[arg-type]
            try:
                for loaded in stream:
                    yield loaded.batch
            finally:
                stream.close()  # type: ignore[attr-defined]

        return make

    def dataloader() -> Iterator[Any]:
        order = [plan.batch(step)[0].tolist() for step in span]
        yield from DataLoader(
            Table(path, rows), batch_sampler=order, num_workers=2, collate_fn=_same
        )  # type: ignore[arg-type]

    check = next(dataloader()), next(ours("train")())
    assert all((check[0][name] == check[1].data[name]).all() for name in ("image", "label")), (
        "the sides give different batches"
    )
    return {
        "workers": Steady(ours("workers"), spec),
        "dataloader": Steady(dataloader, spec),
        "train": Steady(ours("train"), spec),
    }


def kernel(images: list[Any], quick: bool, repeats: int) -> tuple[dict[str, list[float]], float]:
    """Seconds an image by both ways, in turns, and the PSNR between their pixels in dB."""
    import numpy as np
    import PIL.Image
    import torch

    from pipeline.modalities.image import resize

    torch.set_num_threads(1)
    wide = [image for image in images if image.width > image.height and image.width >= 300][
        : 8 if quick else 64
    ]
    encoded = [jpeg(image.resize((500, 375), PIL.Image.Resampling.BICUBIC)) for image in wide]

    from torchvision.io import ImageReadMode, decode_image

    def ours() -> list[Any]:
        return [
            resize(
                decode_image(
                    torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
                ),
                224,
            ).numpy()
            for data in encoded
        ]

    def pil() -> list[Any]:
        out = []
        for data in encoded:
            image = PIL.Image.open(io.BytesIO(data)).convert("RGB")
            image = image.resize(
                (max(224, round(500 * 224 / 375)), 224), PIL.Image.Resampling.BILINEAR
            )
            left = (image.width - 224) // 2
            out.append(np.asarray(image.crop((left, 0, left + 224, 224))).transpose(2, 0, 1))
        return out

    error = np.mean((np.stack(ours()).astype(np.float64) - np.stack(pil())) ** 2)
    times = timing.interleaved(
        {
            name: lambda side=side: timing.seconds(side) / len(encoded)
            for name, side in (("ours", ours), ("pil", pil))
        },
        repeats,
    )
    return times, float(10 * np.log10(255**2 / error))


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=5,
        size={"type": int, "choices": [*SIZES], "help": "one size only (--quick: 64)"},
    )
    found, results = timing.describe(args), {}
    images, lines = photos(), []
    size_only = args.size or (64 if args.quick else None)
    sizes = {
        size: {**spec, **(QUICK if args.quick else {})}
        for size, spec in SIZES.items()
        if size_only in (None, size)
    }
    turns = 1 if args.quick else args.repeats  # every turn of Ray Data starts its processes anew
    with tempfile.TemporaryDirectory() as folder:
        for size, spec in sizes.items():
            make_parquet(images, size, spec["rows"], Path(folder, f"{size}.parquet"))
        # the kernel first: it needs no Ray beside it
        results["kernel"], quality = kernel(images, args.quick, 2 * args.repeats)
        speed = timing.ratio(results["kernel"]["pil"], results["kernel"]["ours"])
        from pipeline.train import launch

        launch.start(None, verbose=False)
        for size, spec in sizes.items():
            print(
                f"  {size} px: rows/s, {spec['steps']} batches of {spec['batch']} a turn after "
                f"{spec['warm']} of warm-up"
            )
            made = sides(Path(folder, f"{size}.parquet"), size, spec)
            rates = timing.interleaved(made, turns)
            for name, side in made.items():
                results[f"{size} px, {name}"] = {
                    "rows_per_second": rates[name],
                    "here_ms": side.here,
                    "elsewhere_ms": side.elsewhere,
                }
                against = timing.ratio(rates[name], rates["dataloader"])
                met = timing.verdict(against.median >= spec["target"], f"at least {spec['target']}")
                spreads = [
                    timing.Spread.of(values).text(4)
                    for values in (rates[name], side.here, side.elsewhere)
                ]
                lines.append(
                    [
                        f"{size} px",
                        name,
                        *spreads,
                        "" if name == "dataloader" else against.text(),
                        met if name == "workers" else "",
                    ]
                )
        launch.stop()
    timing.table(
        "Ingest, steady state, median [min, max]",
        [
            "data",
            "side",
            "rows/s",
            "CPU ms a row here",
            "CPU ms a row elsewhere",
            "ratio to dataloader",
            "target",
        ],
        lines,
    )
    each = {
        name: timing.Spread.of([1e3 * t for t in values]).text()
        for name, values in results["kernel"].items()
    }
    timing.table(
        "JPEG 500 x 375 decode + resize to 224, one thread",
        ["side", "ms an image", "pil / ours", "PSNR", "target"],
        [
            [
                "ours",
                each["ours"],
                speed.text(),
                f"{quality:.1f} dB",
                timing.verdict(speed.median >= 1.7 and quality >= 60, "1.7x and 60 dB"),
            ],
            ["pil", each["pil"], "", "", ""],
        ],
    )
    timing.write(args, found, {**results, "psnr_db": quality})


if __name__ == "__main__":
    main()
