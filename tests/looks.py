"""What tests of self-supervision share: views and captions that need no modality, a backbone for
images of any size, and short runs on one rank or several.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from toys import furthest, image_rows, make_run, weights

from pipeline.config import registry
from pipeline.core.contracts import Backbone, Batch, Features, Task, View
from pipeline.core.contracts.objective_capabilities import compares_views
from pipeline.core.rng import uniform
from pipeline.core.specs import Architecture
from pipeline.data.stream import LoadedBatch
from pipeline.train import loop
from pipeline.train.ranks import Ranks

SIZE = 8
STATES = {"clip": {"tokenizer": "", "vocabulary": 11, "length": 6}}
"""States of objectives that have any."""


class Conv(Backbone):
    """Two convolutions and a mean over the map; ``norm`` is "group", by row, or "batch"."""

    def __init__(self, channels: int = 1, width: int = 8, norm: str = "group"):
        nn.Module.__init__(self)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.norm: nn.Module = nn.GroupNorm(2, width) if norm == "group" else nn.BatchNorm2d(width)
        self.block = nn.Conv2d(width, width, 3, padding=1)
        self.pooled_dim = width
        self.arch = Architecture("toys/conv", {}, {"channels": channels, "size": SIZE})

    def forward(self, batch: Batch, *, token_mask=None, want=()) -> Features:
        return Features(
            torch.tanh(self.block(torch.relu(self.norm(self.stem(batch["image"]))))).mean((2, 3))
        )

    def layers(self) -> dict[str, list[str]]:
        return {
            "stem": ["stem.weight", "stem.bias", "norm.weight", "norm.bias"],
            "block": ["block.weight", "block.bias"],
        }


def task(objective: str, seed: int = 0, norm: str = "group", **options: Any) -> Task:
    torch.manual_seed(seed)
    backbone, kind = Conv(norm=norm), registry.get("objective", objective)
    return Task(backbone, kind(backbone, kind.options_class(**options), STATES.get(objective, {})))


def views_of(made: Task) -> tuple[View, ...]:
    return made.objective.views() if compares_views(made.objective) else ()


def looks(batch: Batch, views: tuple[View, ...]) -> Batch:
    """Views from the rows' keys: a corner of the view's size, and noise; and a caption of three to
    six tokens, two captions an image.
    """
    image, made = batch["image"], {}
    for i, view in enumerate(views):
        size = view.size or image.shape[2]
        noise = uniform(batch.keys, image[0, :, :size, :size].numel(), stream=50 + i).view(
            len(batch), -1, size, size
        )
        made[f"view{i}"] = image[:, :, :size, :size] + noise
    numbers = uniform(batch.keys, 7, stream=40)
    made["caption"] = (11 * numbers[:, :6]).int()
    made["caption_lengths"] = 3 + (4 * numbers[:, 6]).long()
    made["caption_number"] = torch.arange(len(batch))
    made["image_number"] = torch.from_numpy(batch.rows // 2).long()
    return batch.replace(**made)


def some(n: int, views: tuple[View, ...], seed: int = 0) -> Batch:
    """A batch of noise with its views."""
    image = torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return looks(Batch(np.arange(n), torch.arange(n) * 7919 + seed, {"image": image}), views)


def run_of(
    made: Task, ranks: Ranks | None = None, lost: dict[int, list[int]] | None = None, **words: Any
) -> loop.TrainingRun:
    """A run on small rows; the rows ``lost`` of a step are taken out of whatever rank has them."""
    rows = image_rows(48, size=SIZE)
    run = make_run(rows, made, ranks=ranks, **{"steps": 4, "lr": 0.01, "global_batch": 8, **words})
    whole, views = run.batches, views_of(made)

    def ready(batch: Batch, training: bool) -> Batch:
        return looks(rows.modality.finish(batch), views) if len(batch) else batch

    def batches(steps):
        for step, loaded in zip(steps, whole(steps), strict=True):
            keep = ~np.isin(loaded.batch.rows, (lost or {}).get(step, []))
            where, batch = torch.from_numpy(keep), loaded.batch
            yield LoadedBatch(
                Batch(
                    batch.rows[keep],
                    batch.keys[where],
                    {n: t[where] for n, t in batch.data.items()},
                ),
                [],
                0.0,
            )

    run.preprocess, run.batches = ready, batches
    return run


def trained(
    ranks: Ranks,
    objective: str,
    options: dict[str, Any],
    lost: dict[int, list[int]] | None = None,
    **words: Any,
):
    """Weights, the rows of every step and what was logged."""
    run = run_of(task(objective, **options), ranks, lost, **words)
    rows: list[list[int]] = []
    logs: list[dict[str, float]] = []
    run.on_rows = lambda step, ids: rows.append(ids.tolist())
    run.on_log = lambda record: logs.append(
        {name: record[name] for name in ("loss", *run.task.objective.log_names)}
    )
    loop.fit(run)
    return weights(run.task), rows, logs


def check_ranks(team, objective: str, tolerance: float = 1e-5, **options: Any) -> None:
    """Two ranks end with the weights and the log of one: with even rows, with uneven ones, and
    where a rank or all of them have none.

    By SGD: AdamW makes a step of the learning rate's size of whatever rounding leaves of a gradient
    that is zero.
    """
    sgd = {"optimizer": "sgd", "lr": 0.2}
    whole = team(trained, objective, options, **sgd)
    first, second = (rank[1] for rank in whole)
    for lost in ({}, {0: first[0][:3], 1: second[1], 2: first[2], 3: first[3] + second[3]}):
        (a, _, description), (b, _, same) = (
            whole if not lost else team(trained, objective, options, lost, **sgd)
        )
        one, _, want = trained(Ranks(), objective, options, lost, **sgd)
        assert furthest(a, b) == 0.0 and description[:3] == same[:3]
        assert furthest(a, one) < tolerance
        start = weights(task(objective, **options))
        assert furthest(one, start) > 100 * tolerance, "it learned something"
        for mine, theirs in zip(description[:3] if lost else description, want, strict=False):
            assert all(abs(mine[name] - theirs[name]) < 1e-4 for name in mine)


def check_resume(folder, objective: str, **options: Any) -> None:
    """A run that was stopped goes on and ends with the same weights, bit for bit."""
    whole = run_of(task(objective, **options), steps=7, global_batch=8)
    loop.fit(whole)

    class StopError(Exception):
        pass

    def stop(step, ids):
        if step == 4:
            raise StopError

    words = {"steps": 7, "checkpoint_every_steps": 3, "checkpoints": str(folder / objective)}
    cut = run_of(task(objective, **options), **words)
    cut.on_rows = stop
    with suppress(StopError):
        loop.fit(cut)
    # All that counts is in the resume point
    rest = run_of(task(objective, seed=9, **options), **words)
    assert loop.fit(rest).resumed_from == 3
    assert furthest(weights(whole.task), weights(rest.task)) == 0.0
