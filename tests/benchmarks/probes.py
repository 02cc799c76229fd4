"""64 linear probes x 10 epochs: features computed once and heads trained as one batch, against
64 runs that each recompute features.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/probes.py --json probes.json     # about 12 minutes on 2 quiet cores; --quick: 20 s

A timm ResNet-18 with random weights (their values do not change the time) at 64 px on the clothing
photos (3068 training, 341 validation, 372 test rows), batch 64, 64 trials that differ in seed and
learning rate, each validated five times and tested once, with its record written. ``together``:
transfer/probe.run over all 64. ``recompute``: transfer/trial.run, which is the loop on the frozen
backbone; each turn runs one of the 64 and counts it 64 times. ``one at a time``: the same cached
features, but stacks of one head (each turn 4 of the 64, counted 16 times), so its quotient to
``heads`` (all 64 in one stack on cached features) is what batching alone brings. Target: recompute
/ together at least 100. Metrics of both ways are compared as well.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import timing

from pipeline.core.specs import Architecture, ModalitySpec

HEADS, QUICK_HEADS = 64, 8
SOME = 4
"""Heads of a turn that are trained one at a time."""


def shared_of(root: str, quick: bool) -> tuple[Any, list[Any]]:
    """What trials read, as transfer/stages makes it of a job, and the trials; the backbone's
    weights are random.
    """
    from pipeline.checkpoints import bundle
    from pipeline.config.schema import ComponentConfig, Job
    from pipeline.transfer import grid, targets
    from pipeline.transfer.trial import Shared

    folder = timing.data_folder().resolve() / "vision" / "clothing_small"
    files = {split: str(folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    if quick:
        files = {
            "train": files["validation"],
            "validation_fraction": 0.2,
            "test": files["test"],
        }
    size, backbone = (32, "timm/resnet10t") if quick else (64, "timm/resnet18")
    columns = {"image": "image", "label": "label"}
    job = Job.model_validate(
        {
            "name": "probes",
            "storage": root,
            "sources": {"photos": {"backbone": backbone, "init": "file:none"}},
            "targets": {
                "clothing": {
                    "data": {**files, "modality": "image", "columns": columns},
                    "objective": "classification",
                    "train": {"epochs": 1 if quick else 10, "global_batch": 64},
                }
            },
        }
    )
    image = bundle.build_modality(ModalitySpec("image", {"size": size}, {}))
    modality = ModalitySpec(
        "image", image.options.model_dump(), {"mean": [0.5] * 3, "std": [0.25] * 3}
    )
    arch = Architecture(backbone, {}, image.inputs())
    base = grid.backbone_groups({"photos": (arch, modality)})[0]
    weights = {
        name: tensor.numpy()
        for name, tensor in bundle.build_backbone(arch, seed=0).state_dict().items()
    }
    stage = targets.plan_target(job, "clothing")
    held = {("clothing", base.key): targets.prepare(stage, base)}
    shared = Shared(
        job.name,
        job.root,
        0,
        {base.key: base},
        {"photos": weights},
        {"photos": "random"},
        held,
        False,
    )
    probe = ComponentConfig(name="linear_probe", options={"solver": "sgd"})
    entry = grid.PlannedEntry(base, "photos", probe, 1.0)
    made = [
        grid.make_trial(
            job, "clothing", entry, {"lr": 1e-3 * 1.1 ** (k % 8)}, k, "final", "random", stage.key
        )
        for k in range(QUICK_HEADS if quick else HEADS)
    ]
    return shared, made


def main() -> None:
    args = timing.options(__doc__, repeats=3)
    found = timing.describe(args)
    from pipeline.transfer import cached_heads, trial

    with tempfile.TemporaryDirectory() as root:
        shared, group = shared_of(root, args.quick)
        data, count = shared.targets[group[0].target, group[0].backbone_key], len(group)
        print(
            f"  {data.split_text}; {trial.resolve_training(group[0], shared)[2]} steps a probe; "
            f"seconds for {count} probes"
        )
        records: dict[str, list[Any]] = {"together": [], "recompute": []}
        turn = iter(range(10**6))

        def together() -> float:
            began = time.perf_counter()
            records["together"] = cached_heads.run(group, shared)
            return time.perf_counter() - began

        def recompute() -> float:
            one = group[next(turn) % count]
            began = time.perf_counter()
            records["recompute"].append(trial.run(one, shared))
            return (time.perf_counter() - began) * count

        began = time.perf_counter()
        cached = cached_features(group[0], shared)
        once = time.perf_counter() - began
        stack = partial(heads, shared, data, cached)
        sides: dict[str, Callable[[], float]] = {
            "together": together,
            "recompute": recompute,
            "heads": lambda: timing.seconds(lambda: stack([group])),
            "one at a time": lambda: (
                timing.seconds(lambda: stack([[one] for one in group[:SOME]])) * count / SOME
            ),
        }
        times = timing.interleaved(sides, args.repeats)
    gap = _gap(records["together"], records["recompute"])
    whole, alone = (
        timing.ratio(times["recompute"], times["together"]),
        timing.ratio(times["one at a time"], times["heads"]),
    )
    notes = {
        "together": [
            whole.text(4),
            timing.verdict(whole.median >= 100, "recompute / together at least 100"),
        ],
        "heads": [alone.text(), ""],
        "recompute": ["", f"1 of {count} a turn, times {count}"],
        "one at a time": ["", f"{SOME} of {count} a turn, times {count // SOME}"],
    }
    timing.table(
        f"{count} linear probes",
        ["side", "seconds for all, median [min, max]", "times as fast as the line below", "note"],
        [[name, timing.Spread.of(values).text(4), *notes[name]] for name, values in times.items()],
    )
    print(
        f"  features of all rows once: {once:.2f} s of together's time; largest difference of "
        f"a test metric between the two ways: {gap:.1e}"
    )
    timing.write(args, found, {**times, "features_seconds": once, "largest_metric_difference": gap})


def cached_features(first: Any, shared: Any) -> dict[str, Any]:
    """Pooled features of the three splits, as probe.run computes them."""
    import torch

    from pipeline.transfer import cached_heads, trial

    data, backbone = (
        shared.targets[first.target, first.backbone_key],
        trial.build_task(first, shared)[0].backbone,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: cached_heads.features(backbone, rows, device)
        for name, rows in (
            ("train", data.train),
            ("validation", data.validation),
            ("test", data.test),
        )
    }


def heads(shared: Any, data: Any, cached: dict[str, Any], stacks: list[list[Any]]) -> None:
    """Train stacks of heads on cached features, with everything that follows (validation, test,
    records).
    """
    from pipeline.io import heartbeat
    from pipeline.transfer import cached_heads, trial

    for stack in stacks:
        members = [
            cached_heads.StackedTrial(one, *trial.resolve_training(one, shared)) for one in stack
        ]
        backbone = trial.build_task(stack[0], shared)[0].backbone
        device = cached["train"][0].device
        features = cached_heads.SharedFeatures(data, backbone, cached, "", 0.0, device)
        cached_heads._run_stack(members, shared, features, heartbeat.beat)


def _gap(together: list[Any], alone: list[Any]) -> float:
    """Largest difference of a test metric of a trial between the two ways: they are meant to give
    the same results.
    """
    values = {
        (row.trial_id, row.metric): row.value
        for record in together
        for row in record.rows
        if row.split == "test"
    }
    return max(
        abs(values[row.trial_id, row.metric] - row.value)
        for record in alone
        for row in record.rows
        if row.split == "test"
    )


if __name__ == "__main__":
    main()
