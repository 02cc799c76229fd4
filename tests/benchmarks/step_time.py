"""Step time of the loop against HF Trainer and a bare torch loop, on a small BERT and a
ResNet-18, in this process.

    .venv/bin/python tests/benchmarks/step_time.py --json step_time.json      # about 5 minutes on 2 quiet cores; --quick: 20 s

All three train the same module (backbone and objective of the library) with fused AdamW, clip 1.0,
warm-up and cosine, equal threads, no evaluation and no checkpoint. ``loop``: train/loop.fit on rows
in memory (gather, collate, normalise and, every 10 steps, a log record are inside). ``trainer``:
transformers.Trainer with its default DataLoader over the same rows as ready tensors, no logging.
``bare``: ready batches, forward, backward, clip, step, schedule. The warm-up steps of every turn
are not counted. Targets: at least 1.0x HF Trainer, within 3 % of the bare loop.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timing

from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec

WARM_STEPS = 5


@dataclass
class Case:
    """A task with its rows; ``ready`` are the same rows as device-ready tensors, for the two other
    loops.
    """

    name: str
    task: Any
    rows: Any
    batch: int
    ready: dict[str, Any]
    metric: str


def bert(quick: bool) -> Case:
    """4 layers, 256 wide, length 128, batch 16, masked language modelling on packed documents."""
    import numpy as np

    length, vocabulary, n = (32, 512, 128) if quick else (128, 8192, 2048)
    sizes = (
        {"layers": 1, "hidden": 32, "heads": 2}
        if quick
        else {"layers": 4, "hidden": 256, "heads": 4}
    )
    inputs = {"vocabulary": vocabulary, "length": length, "specials": [0, 1, 2, 3, 4]}
    random = np.random.default_rng(0)
    arrays = {
        "tokens": random.integers(5, vocabulary, (n, length)).astype(np.uint16),
        "segments": (1 + (np.arange(length)[None] >= random.integers(1, length, (n, 1)))).astype(
            np.uint32
        ),
    }
    arch = Architecture("transformers/bert", sizes, inputs)
    text = ModalitySpec(
        "text", {"length": length}, {"vocabulary": vocabulary, "specials": inputs["specials"]}
    )
    return _case(
        "BERT 4 x 256, length 128, batch 16, MLM",
        arch,
        ObjectiveSpec("mlm", {}, {}),
        text,
        arrays,
        16,
        "perplexity",
    )


def resnet(quick: bool) -> Case:
    """ResNet-18 at 32 px, batch 32, 10 classes."""
    import numpy as np

    n = 128 if quick else 2048
    random = np.random.default_rng(0)
    arrays = {
        "image": random.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8),
        "label": random.integers(0, 10, n),
    }
    arch = Architecture(
        "timm/resnet10t" if quick else "timm/resnet18", {}, {"channels": 3, "size": 32}
    )
    image = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.25] * 3})
    objective = ObjectiveSpec(
        "classification", {}, {"values": list(range(10)), "labels": [str(i) for i in range(10)]}
    )
    return _case(
        "ResNet-18, 32 px, batch 32", arch, objective, image, arrays, 8 if quick else 32, "accuracy"
    )


def _case(
    name: str, arch: dict, objective: dict, modality: dict, arrays: dict, batch: int, metric: str
) -> Case:
    import numpy as np
    import pyarrow as pa
    import torch

    from pipeline.checkpoints import bundle
    from pipeline.core.rng import row_keys
    from pipeline.data.manifests import Manifest, RowGroup, Selection
    from pipeline.data.stream import Decoder, Rows
    from pipeline.train.evaluate import device_preprocessing

    task = bundle.build_task(arch, objective, seed=0)
    made, n = bundle.build_modality(modality), len(next(iter(arrays.values())))
    manifest = Manifest(
        ("memory",),
        (RowGroup(0, 0, n, sum(a.nbytes for a in arrays.values())),),
        pa.schema([]),
        "memory",
    )
    rows = Rows(Selection(manifest), Decoder(made, objective.name, objective.state, {}), arrays)
    from pipeline.core.contracts import Batch

    keys = torch.from_numpy(row_keys(0, np.zeros(n, dtype=np.int64), np.arange(n)))
    whole = device_preprocessing(rows)(Batch(np.arange(n), keys, made.collate(arrays)), False)
    return Case(name, task, rows, batch, {"keys": keys, **whole.data}, metric)


def _spec(case: Case, steps: int) -> Any:
    from pipeline.config.schema import Train

    return Train(
        steps=steps,
        global_batch=case.batch,
        lr=1e-4,
        augment=False,
        log_every_steps=10,
        precision="fp32",
    )


def mean_step(times: list[float]) -> float:
    """Mean seconds of a step from the moments between steps, the first WARM_STEPS left out."""
    return (times[-1] - times[WARM_STEPS]) / (len(times) - 1 - WARM_STEPS)


def loop_side(case: Case, steps: int) -> Callable[[], float]:
    """train/loop.fit; a step lasts from one request for a batch to the next."""
    from pipeline.data.plan import Plan
    from pipeline.data.stream import train_batches
    from pipeline.techniques.full import Full
    from pipeline.train import loop
    from pipeline.train.evaluate import device_preprocessing

    task, total = copy.deepcopy(case.task), WARM_STEPS + steps + 1
    plan = Plan(len(case.rows), 0, case.batch)

    def side() -> float:
        times: list[float] = []

        def batches(span: range) -> Iterator[Any]:
            stream = train_batches(case.rows, plan, span)
            for _ in span:
                times.append(time.perf_counter())
                yield next(stream)

        loop.fit(
            loop.TrainingRun(
                task=task,
                technique=Full(),
                train=_spec(case, total),
                steps=total,
                seed=0,
                batches=batches,
                preprocess=device_preprocessing(case.rows),
                keeper=loop.KeepBest(case.metric, "best"),
            )
        )
        return mean_step(times)

    return side


def bare_side(case: Case, steps: int) -> Callable[[], float]:
    import numpy as np
    import torch

    from pipeline.core.contracts import Batch

    task, total = copy.deepcopy(case.task).train(), WARM_STEPS + steps
    n = len(case.rows) // case.batch
    keys = case.ready["keys"]
    parts = [slice(i * case.batch, (i + 1) * case.batch) for i in range(n)]
    batches = [
        Batch(
            np.arange(p.start, p.stop),
            keys[p],
            {name: t[p].contiguous() for name, t in case.ready.items() if name != "keys"},
        )
        for p in parts
    ]

    def side() -> float:
        optimizer = torch.optim.AdamW(_decayed(task), lr=1e-4, betas=(0.9, 0.999), fused=True)
        warm = round(0.1 * total)

        def factor(step: int) -> float:
            return (
                (step + 1) / warm
                if step < warm
                else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        times = []
        for step in range(total):
            times.append(time.perf_counter())
            loss, count, _ = task(batches[step % n])
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        return mean_step(times)

    return side


def _decayed(task: Any) -> list[dict[str, Any]]:
    parameters = list(task.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def trainer_side(case: Case, steps: int, folder: str) -> Callable[[], float]:
    """transformers.Trainer; a step lasts from the end of one to the end of the next."""
    import numpy as np
    import transformers
    from torch import nn

    from pipeline.core.contracts import Batch

    transformers.utils.logging.set_verbosity_error()
    task, total = copy.deepcopy(case.task), WARM_STEPS + steps + 1
    names = [name for name in case.ready if name != "keys"]
    n = len(case.rows)
    # "label" is a special word there
    data = [
        {"keys": case.ready["keys"][i], **{f"row_{name}": case.ready[name][i] for name in names}}
        for i in range(n)
    ]

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.task = task

        def forward(self, keys, row_image=None, row_label=None, row_tokens=None, row_segments=None):
            given = {
                "image": row_image,
                "label": row_label,
                "tokens": row_tokens,
                "segments": row_segments,
            }
            loss, count, _ = self.task(
                Batch(np.arange(len(keys)), keys, {name: given[name] for name in names})
            )
            return {"loss": loss / count}

    class Clock(transformers.TrainerCallback):
        times: list[float] = []

        def on_step_end(self, args, state, control, **kw):
            self.times.append(time.perf_counter())

    model = Wrapped()

    def side() -> float:
        clock = Clock()
        clock.times = []
        arguments = timing.trainer_arguments(
            folder, case.batch, total, use_cpu=True, remove_unused_columns=False
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return mean_step(clock.times)

    return side


def main() -> None:
    args = timing.options(
        __doc__,
        repeats=7,
        case={"choices": ["bert", "resnet"], "help": "one case only"},
        threads={"type": int, "default": os.cpu_count(), "help": "torch threads of all three"},
    )
    import torch

    torch.set_num_threads(1 if args.quick else args.threads)
    found, results = timing.describe(args), {}
    steps = 6 if args.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        for make in (bert, resnet):
            if args.case in (None, make.__name__):
                case = make(args.quick)
                print(
                    f"  {case.name}: seconds a step, {steps} steps a turn after {WARM_STEPS} "
                    "of warm-up"
                )
                sides = {
                    "loop": loop_side(case, steps),
                    "trainer": trainer_side(case, steps, folder),
                    "bare": bare_side(case, steps),
                }
                results[case.name] = timing.interleaved(sides, args.repeats)
    lines = []
    for name, times in results.items():
        against = {
            other: timing.ratio(times[other], times["loop"]) for other in ("trainer", "bare")
        }
        lines += [
            [
                name,
                side,
                timing.Spread.of([1e3 * t for t in values]).text(4),
                "" if side == "loop" else against[side].text(4),
                {
                    "loop": "",
                    "trainer": timing.verdict(against["trainer"].median >= 1.0, "at least 1.0"),
                    "bare": timing.verdict(
                        against["bare"].median >= 1 / 1.03, "at least 0.971 (within 3 %)"
                    ),
                }[side],
            ]
            for side, values in times.items()
        ]
    timing.table(
        "Step time",
        ["case", "side", "ms a step, median [min, max]", "speed of the loop / side", "target"],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
