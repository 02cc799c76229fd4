"""The one loop against a bare torch loop, and its promises: global means, skipped steps, kept
weights, bitwise resume.

The golden losses are written anew by ``ONETOMANY_GOLDEN=write pytest tests/train/test_loop.py -k
golden``; a change that claims not to change numbers leaves them as they are.
"""

import copy
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from toys import (
    SMALL,
    furthest,
    image_rows,
    kill_at,
    make_run,
    net_task,
    newest_resume_point,
    packed_rows,
    task_of,
    text_modality,
    text_rows,
    weights,
)

from pipeline.config.registry import Options
from pipeline.config.schema import Change, Train
from pipeline.core.contracts import Batch, Task, Technique
from pipeline.data.stream import LoadedBatch
from pipeline.io import storage
from pipeline.techniques.linear_probe import LinearProbe
from pipeline.techniques.lp_ft import LPFT, LPFTOptions
from pipeline.train import checkpoint, evaluate, loop, optim
from pipeline.train.loop import NonFiniteError
from pipeline.train.ranks import Ranks

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": None}
"""One step moves the weights by the learning rate times the gradient."""


@pytest.fixture(scope="module")
def rows():
    return image_rows(48)


@pytest.fixture(scope="module")
def validation():
    return image_rows(20, seed=1)


# ---------------------------------------------------------------- a bare torch loop


def reference(run: loop.TrainingRun, skip: tuple[int, ...] = ()):
    """The same training as plain torch would do it; steps of ``skip`` are not taken. Returns
    weights and losses.
    """
    task, spec = copy.deepcopy(run.task), run.train
    task.train()
    matrices, vectors = (
        [p for p in task.parameters() if (p.dim() > 1) == big] for big in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": spec.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=spec.lr,
        betas=(spec.beta1, spec.beta2),
        foreach=False,
        fused=False,
    )
    warm = round(spec.warmup * run.steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / warm
            if s < warm
            else 0.5 * (1 + math.cos(math.pi * (s - warm) / (run.steps - warm)))
        ),
    )
    losses = []
    for step, loaded in enumerate(run.batches(range(run.steps))):
        for change in spec.changes:
            if change.step == step:
                decayed, _ = optimizer.param_groups
                decayed["weight_decay"] = change.weight_decay or decayed["weight_decay"]
                rate = change.lr or spec.lr
                for number, group in enumerate(optimizer.param_groups):
                    schedule.base_lrs[number] = rate
                    group["lr"] = rate * schedule.lr_lambdas[number](step)
        batch = run.preprocess(loaded.batch, spec.augment)
        total, count, _ = task(batch)
        loss = total / count
        loss.backward()
        if spec.clip_norm:
            torch.nn.utils.clip_grad_norm_(task.parameters(), spec.clip_norm)
        if step in skip:
            # Torch's schedulers want to see a step: this one moves nothing
            for p in task.parameters():
                p.grad = None
        optimizer.step()
        if step not in skip:
            losses.append(loss.item())
        optimizer.zero_grad()
        schedule.step()
    return weights(task), losses


@pytest.mark.parametrize("clip", [None, 0.05, 1.0])
def test_loop_equals_a_bare_torch_loop(rows, clip):
    run = make_run(rows, net_task(), steps=5, lr=0.01, warmup=0.4, weight_decay=0.1, clip_norm=clip)
    want, losses = reference(run)
    logs = []
    run.on_log = logs.append
    outcome = loop.fit(run)
    assert furthest(weights(run.task), want) < 1e-6
    assert [log["loss"] for log in logs] == pytest.approx(losses, abs=1e-6)
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5] and outcome.steps == 5
    assert [log["lr"] for log in logs] == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.0025])


def test_rates_that_change_in_a_training_equal_a_bare_torch_loop(rows):
    changes = ({"step": 2, "lr": 0.03}, {"step": 4, "lr": 0.002, "weight_decay": 0.5})
    spec = {"steps": 6, "lr": 0.01, "warmup": 0.2, "weight_decay": 0.1}
    run = make_run(rows, net_task(), **spec, changes=changes)
    want, losses = reference(run)
    logs = []
    run.on_log = logs.append
    loop.fit(run)
    assert furthest(weights(run.task), want) < 1e-6
    assert [log["loss"] for log in logs] == pytest.approx(losses, abs=1e-6)
    factors = [optim.lr_factor(step, 6, run.train) for step in range(6)]
    peaks = [0.01, 0.01, 0.03, 0.03, 0.002, 0.002]
    assert [log["lr"] for log in logs] == pytest.approx(np.multiply(factors, peaks))


def test_a_change_that_is_never_reached_is_refused(rows):
    run = make_run(rows, net_task(), steps=4)
    run.train = run.train.model_copy(update={"changes": (Change(step=4, lr=0.1),)})
    with pytest.raises(ValueError, match="step 4 is never reached: the training has 4 steps"):
        loop.fit(run)


def test_clipping_is_clip_grad_norm(rows):
    """One step of plain SGD shows the gradient itself."""
    run = make_run(rows, net_task(), steps=1, lr=1.0, warmup=0.0, **{**PLAIN, "clip_norm": 0.01})
    twin = copy.deepcopy(run.task).train()
    total, count, _ = twin(run.preprocess(next(iter(run.batches(range(1)))).batch, False))
    (total / count).backward()
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    assert norm > 0.1  # it clips
    want = {name: p.detach() - p.grad for name, p in twin.named_parameters()}
    logs = []
    run.on_log = logs.append
    loop.fit(run)
    assert furthest(weights(run.task), want) < 1e-8
    assert logs[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_weights_with_a_penalty_equal_the_bare_loop_at_any_micro_batch(rows):
    class Shrink(Technique):
        options_class = Options

        def penalty(self, task, batch, streams):
            return 0.3 * sum((p**2).sum() for p in task.parameters())

    want = None
    for micro in (None, 3, 1):
        run = make_run(
            rows,
            net_task(),
            steps=1,
            technique=Shrink(),
            micro_batch=micro,
            lr=0.1,
            warmup=0.0,
            **PLAIN,
        )
        if want is None:
            twin = copy.deepcopy(run.task)
            total, count, _ = twin(run.preprocess(next(iter(run.batches(range(1)))).batch, False))
            (total / count + 0.3 * sum((p**2).sum() for p in twin.parameters())).backward()
            want = {name: p.detach() - 0.1 * p.grad for name, p in twin.named_parameters()}
        loop.fit(run)
        assert furthest(weights(run.task), want) < 1e-6


# ---------------------------------------------------------------- global means


def gradients(run: loop.TrainingRun) -> list[dict[str, torch.Tensor]]:
    """The mean gradient of every step, as the optimiser is handed it."""
    found = []
    original = loop._step

    def watch(live, stats, ranks, train, task, *rest):
        found.append(
            {name: p.grad / stats[1] for name, p in task.named_parameters() if p.grad is not None}
        )
        return original(live, stats, ranks, train, task, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", watch)
        loop.fit(run)
    return found


def same_at_any_micro_batch(make, sizes=(1, 2, 4, 8), steps=3):
    runs = [make(micro) for micro in sizes]
    found = [gradients(run) for run in runs]
    for run, gradient in zip(runs[:-1], found[:-1], strict=True):
        for a, b in zip(gradient, found[-1], strict=True):
            assert furthest(a, b) < 2e-6 * max(1.0, *(float(g.abs().max()) for g in b.values()))
        assert furthest(weights(run.task), weights(runs[-1].task)) < 1e-5
    assert len(found[0]) == steps


@pytest.mark.parametrize(("ema", "is_slow"), [(0.99, True), (0.5, False)])
def test_an_average_that_is_mostly_the_start_is_told_in_the_log(rows, ema, is_slow):
    run = make_run(rows, net_task(), steps=5, ema=ema, lr=0.01, log_every_steps=5)
    logs = []
    run.on_log = logs.append
    loop.fit(run)
    text = (
        "train.ema: 0.99 is slow for 5 steps: 95 % of the average, which is validated and kept, is "
        "still the weights before training; set it to at most 0.5492, or train longer"
    )
    assert [log.get("warning") for log in logs] == [text if is_slow else None]


@pytest.mark.parametrize(
    ("rows", "size", "parts"),
    [(8, 2, [2, 2, 2, 2]), (7, 2, [2, 2, 3]), (3, 2, [3]), (4, 3, [2, 2]), (3, 1, [1, 1, 1])],
)
def test_no_micro_batch_has_a_single_row_for_batch_norm_unless_the_job_says_one(rows, size, parts):
    batch = Batch(np.arange(rows), torch.arange(rows), {})
    assert [len(part) for part in batch.split(size)] == parts


def test_eight_micro_batches_of_one_equal_two_of_four(rows):
    same_at_any_micro_batch(
        lambda micro: make_run(rows, net_task(), steps=3, micro_batch=micro, lr=0.01)
    )


def test_eight_micro_batches_of_one_equal_two_of_four_for_a_transformer():
    found = image_rows(16, size=32, channels=3)
    same_at_any_micro_batch(
        lambda micro: make_run(
            found,
            task_of(
                "timm/test_vit",
                {"channels": 3, "size": 32},
                "classification",
                found.decoder.objective_state,
            ),
            steps=3,
            micro_batch=micro,
            lr=1e-4,
        ),
        sizes=(1, 4, 8),
    )


@pytest.mark.parametrize(("objective", "architecture"), [("mlm", "bert"), ("clm", "gpt2")])
def test_token_counts_that_differ_by_row_do_not_weigh_the_mean(objective, architecture):
    """Rows of a language model hold unequal numbers of predictions: the sum is divided by the
    global count, once.
    """
    modality = text_modality(f"transformers/{architecture}")
    found = packed_rows(40, modality, objective)
    assert found.arrays is not None
    found.arrays = {name: array.copy() for name, array in found.arrays.items()}
    for i in range(len(found)):  # the second half of every third row is padding
        if i % 3 == 0:
            found.arrays["segments"][i, 16:] = 0
            found.arrays["tokens"][i, 16:] = modality.state["specials"][0]
    same_at_any_micro_batch(
        lambda micro: make_run(
            found,
            task_of(f"transformers/{architecture}", modality.inputs(), objective, **SMALL),
            steps=3,
            micro_batch=micro,
            lr=1e-3,
        ),
        sizes=(1, 4, 8),
    )


def test_a_short_batch_is_divided_by_what_it_holds(rows):
    """Undecodable rows leave a batch of 5: its mean is over 5, and a batch of none trains nothing
    and logs no number.
    """
    run = make_run(rows, net_task(), steps=2, lr=0.1, warmup=0.0, schedule="constant", **PLAIN)
    whole, message, logs = run.batches, [], []

    def short(steps):
        for step, loaded in zip(steps, whole(steps), strict=True):
            n, whole_batch = (5 if step == 0 else 0), loaded.batch
            kept = Batch(
                whole_batch.rows[:n],
                whole_batch.keys[:n],
                {name: tensor[:n] for name, tensor in whole_batch.data.items()},
            )
            yield LoadedBatch(
                kept, [(int(row), "broken") for row in loaded.batch.rows[len(kept) :]], 0.0
            )

    run.batches, run.on_bad_rows, run.on_log = (
        short,
        lambda split, bad: message.append((split, len(bad))),
        logs.append,
    )
    twin = copy.deepcopy(run.task)
    total, count, _ = twin(run.preprocess(next(short(range(1))).batch, False))
    (total / 5).backward()
    assert count == 5
    want = {name: p.detach() - 0.1 * p.grad for name, p in twin.named_parameters()}
    outcome = loop.fit(run)
    assert furthest(weights(run.task), want) < 1e-6
    assert message == [("train", 3), ("train", 8)] and outcome.skipped_steps == 0
    assert logs[0]["loss"] == pytest.approx(total.item() / 5, abs=1e-6) and math.isnan(
        logs[1]["loss"]
    )


# ---------------------------------------------------------------- what is not finite


def poisoned(run: loop.TrainingRun, steps: tuple[int, ...]) -> loop.TrainingRun:
    """NaN in one pixel of one row of the given steps."""
    bad = {int(next(iter(run.batches(range(step, step + 1)))).batch.rows[0]) for step in steps}
    ready = run.preprocess

    def spoil(batch, training):
        batch = ready(batch, training)
        image = batch["image"].clone()
        image[[int(row) in bad for row in batch.rows], 0, 0, 0] = math.nan
        return batch.replace(image=image)

    run.preprocess = spoil
    return run


@pytest.mark.parametrize("micro", [None, 2])
def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(rows, micro):
    steps = 6  # one epoch: no row comes twice
    clean = make_run(rows, net_task(), steps=steps, lr=0.01, warmup=0.0)
    want, losses = reference(clean, skip=(0, 3))
    run = poisoned(
        make_run(
            rows,
            net_task(),
            steps=steps,
            lr=0.01,
            warmup=0.0,
            micro_batch=micro,
            log_every_steps=steps,
        ),
        (0, 3),
    )
    logs = []
    run.on_log = logs.append
    outcome = loop.fit(run)
    assert furthest(weights(run.task), want) < 1e-6
    assert outcome.skipped_steps == 2 and logs[-1]["skipped_steps"] == 2
    # The mean of what was trained on
    assert logs[-1]["loss"] == pytest.approx(np.mean(losses), abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is(rows, optimizer):
    runs = []
    for spoil in (True, False):
        run = make_run(
            rows, net_task(), steps=4, lr=0.01, optimizer=optimizer, warmup=0.0, schedule="constant"
        )
        if spoil:
            calls = iter([math.inf, 1.0, -math.inf, 1.0])
            run.task.backbone.block.bias.register_hook(lambda g, calls=calls: g * next(calls))
        else:  # the same two steps alone
            batches = run.batches
            run.batches = lambda steps, batches=batches: (
                next(iter(batches(range(s, s + 1)))) for s in (1, 3)
            )
            run.steps = 2
        outcome = loop.fit(run)
        runs.append((outcome.skipped_steps, weights(run.task)))
    assert runs[0][0] == 2 and runs[1][0] == 0
    assert furthest(runs[0][1], runs[1][1]) < 1e-7


def test_a_loss_that_is_not_finite_skips_the_step_though_the_gradient_is(rows):
    """An overflow of the sum alone."""
    runs = []
    for add in (math.inf, 0.0):
        run = make_run(rows, net_task(), steps=1, lr=0.01, warmup=0.0)
        before, forward = weights(run.task), run.task.forward
        run.task.forward = lambda batch, add=add, forward=forward: (
            forward(batch)[0] + add,
            *forward(batch)[1:],
        )
        runs.append((loop.fit(run).skipped_steps, furthest(weights(run.task), before) > 0))
    assert runs == [(1, False), (0, True)]


def test_too_many_bad_steps_in_a_row_stop_the_run_with_their_rows(rows):
    run = poisoned(make_run(rows, net_task(), steps=6, max_bad_steps=3), (1, 2, 3))
    seen = {}
    run.on_rows = lambda step, ids: seen.__setitem__(step, ids.tolist())
    with pytest.raises(
        NonFiniteError, match=r"3 steps in a row up to step 4; lower train\.lr"
    ) as error:
        loop.fit(run)
    named = set(map(int, str(error.value).split("[")[1].rstrip("]").split(",")))
    assert named == {row for step in (1, 2, 3) for row in seen[step]}
    assert min(named) >= 1000  # ids of the manifest, not places


def test_bad_steps_apart_do_not_stop_the_run(rows):
    run = poisoned(make_run(rows, net_task(), steps=6, max_bad_steps=3), (0, 1, 3, 4))
    assert loop.fit(run).skipped_steps == 4


def test_a_skipped_step_does_not_poison_norm_statistics(rows, validation):
    """Else training goes on and every validation is NaN, for ever."""
    run = poisoned(
        make_run(rows, net_task(norm="batch"), steps=6, validation=validation, eval_every_steps=1),
        (2,),
    )
    outcome = loop.fit(run)
    assert outcome.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(run.task).values())
    assert all(math.isfinite(point["loss"]) for point in outcome.curve) and len(outcome.curve) == 6


# ---------------------------------------------------------------- which weights


def captured(run: loop.TrainingRun) -> list[dict[str, torch.Tensor]]:
    """The live weights after every step, filled while the run goes."""
    found: list[dict[str, torch.Tensor]] = []
    run.on_rows = lambda step, ids: found.append(weights(run.task))
    return found


def test_average_is_its_formula_and_is_what_remains(rows):
    run = make_run(rows, net_task(), steps=5, ema=0.7, lr=0.01)
    average = weights(run.task)
    found = captured(run)
    loop.fit(run)
    for after in found:
        average = {name: 0.7 * average[name] + 0.3 * after[name] for name in average}
    assert furthest(weights(run.task), average) < 1e-6
    assert furthest(found[-1], average) > 1e-3


def test_validation_sees_the_average_and_training_goes_on_with_the_live_weights(rows, validation):
    plain, run = (
        make_run(rows, net_task(), steps=5, ema=ema, lr=0.01, keep="last") for ema in (None, 0.7)
    )
    live, held = captured(plain), captured(run)
    loop.fit(plain)
    average, seen = weights(run.task), []
    run.evaluate = lambda task: seen.append(weights(task)) or {"accuracy": 0.0}
    run.train = run.train.model_copy(update={"eval_every_steps": 2})
    loop.fit(run)
    assert all(furthest(a, b) == 0.0 for a, b in zip(live, held, strict=True))
    assert len(seen) == 3
    for step, after in enumerate(held, start=1):
        average = {name: 0.7 * average[name] + 0.3 * after[name] for name in average}
        if step in (2, 4, 5):
            assert furthest(seen.pop(0), average) < 1e-6
    assert furthest(weights(run.task), average) < 1e-6


@pytest.mark.parametrize(
    ("metric", "values", "keep", "kept"),
    [
        ("accuracy", [0.1, 0.5, 0.5, 0.3], "best", 2),
        ("accuracy", [0.1, 0.5, 0.5, 0.3], "last", 4),
        ("loss", [3.0, 1.0, 2.0, 1.0], "best", 2),
        ("accuracy", [math.nan, 0.2, math.nan, 0.1], "best", 2),
        ("loss", [math.nan] * 4, "best", 4),
    ],
)
def test_the_best_or_the_last_weights_remain(rows, metric, values, keep, kept):
    run = make_run(rows, net_task(), steps=4, eval_every_steps=1, lr=0.01)
    run.keeper = loop.KeepBest(metric, keep)
    found, script = captured(run), iter(values)
    run.evaluate = lambda task: {metric: next(script), "other": 1.0}
    outcome = loop.fit(run)
    assert run.keeper.step == kept and furthest(weights(run.task), found[kept - 1]) == 0.0
    np.testing.assert_equal(run.keeper.metrics, {metric: values[kept - 1], "other": 1.0})
    np.testing.assert_equal(
        outcome.curve, [{"step": i + 1, metric: v, "other": 1.0} for i, v in enumerate(values)]
    )


@pytest.mark.parametrize(
    ("metric", "values", "patience", "stopped", "kept"),
    [
        ("accuracy", [0.1, 0.5, 0.4, 0.5, 0.9, 0.9, 0.9, 0.9], 2, 4, 2),
        ("accuracy", [0.1, 0.5, 0.4, 0.5, 0.6, 0.5, 0.5, 0.5], 3, 0, 5),
        ("loss", [3.0, 1.0, 2.0, 0.5, 0.5, 0.0, 0.0, 0.0], 1, 3, 2),
        ("accuracy", [math.nan, math.nan, 0.2, math.nan, 0.1, 0.9, 0.9, 0.9], 2, 5, 3),
    ],
)
def test_patience_ends_a_run_that_gets_no_better(rows, metric, values, patience, stopped, kept):
    run = make_run(rows, net_task(), steps=8, eval_every_steps=1, lr=0.01, patience=patience)
    run.keeper = loop.KeepBest(metric, "best", patience)
    found, script = captured(run), iter(values)
    run.evaluate = lambda task: {metric: next(script)}
    outcome = loop.fit(run)
    assert outcome.stopped_at == stopped and outcome.steps == (stopped or 8)
    assert run.keeper.step == kept and furthest(weights(run.task), found[kept - 1]) == 0.0


def test_patience_keeps_the_last_weights_where_they_are_asked_for(rows):
    run = make_run(rows, net_task(), steps=8, eval_every_steps=1, lr=0.01, patience=2)
    run.keeper = loop.KeepBest("accuracy", "last", 2)
    found, script = captured(run), iter([0.5, 0.4, 0.3, 0.9])
    run.evaluate = lambda task: {"accuracy": next(script)}
    assert loop.fit(run).stopped_at == 3
    assert run.keeper.step == 3 and furthest(weights(run.task), found[2]) == 0.0


def test_patience_ends_no_phase_but_the_last_and_counts_anew_there(rows):
    run = make_run(
        rows,
        net_task(),
        steps=8,
        eval_every_steps=1,
        patience=2,
        technique=LPFT(LPFTOptions(probe_share=0.5, probe_lr_scale=1.0)),
    )
    run.keeper = loop.KeepBest("accuracy", "best", 2)
    script = iter([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    run.evaluate = lambda task: {"accuracy": next(script)}
    assert loop.fit(run).stopped_at == 6


def test_rank_0_decides_for_all_ranks_that_patience_is_lost(rows, monkeypatch):
    """A rank that stopped on its own would leave the others waiting for its gradients."""
    run = make_run(rows, net_task(), steps=4, eval_every_steps=1, patience=1)
    run.keeper = loop.KeepBest("accuracy", "best", 1)
    run.evaluate = lambda task: {"accuracy": 0.5}
    asked = []

    def verdict(own, ranks):
        asked.append(own)
        return len(asked) == 3

    monkeypatch.setattr(loop, "_agree_with_rank_zero", verdict)
    assert loop.fit(run).stopped_at == 3 and asked == [False, True, True]


def test_a_resume_point_without_a_best_value_keeps_its_best_weights():
    """Resume points that were written before there was a patience have the metrics alone."""
    task, kept = net_task(), loop.KeepBest("accuracy", "best")
    kept.update(2, {"accuracy": 0.5}, task)
    state = kept.state_dict()
    del state["best"], state["stale"]
    again = loop.KeepBest("accuracy", "best")
    again.load_state_dict(state)
    again.update(3, {"accuracy": 0.4}, task)
    assert again.step == 2
    again.update(4, {"accuracy": 0.6}, task)
    assert again.step == 4


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_patience_counts_on_where_a_killed_run_goes_on(rows, tmp_path, stop):
    values = [0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.9, 0.9]

    def made(first: int) -> loop.TrainingRun:
        run = make_run(
            rows,
            net_task(),
            steps=8,
            eval_every_steps=1,
            patience=3,
            checkpoints=str(tmp_path),
            checkpoint_every_steps=1,
        )
        run.keeper, script = loop.KeepBest("accuracy", "best", 3), iter(values[first:])
        run.evaluate = lambda task: {"accuracy": next(script)}
        return run

    kill_at(made(0), stop + 1)
    run = made(stop)
    outcome = loop.fit(run)
    assert (outcome.resumed_from, outcome.stopped_at, run.keeper.step) == (stop, 6, 3)
    assert [point["accuracy"] for point in outcome.curve] == values[:6]


def test_validation_runs_at_its_steps_and_at_the_end_and_modes_are_put_back(rows):
    run = make_run(
        rows, net_task(dropout=0.5), steps=7, eval_every_steps=3, technique=LinearProbe()
    )
    modes = []

    def check(task):
        task.eval()
        return {"accuracy": 0.0}

    run.evaluate = check
    run.on_rows = lambda step, ids: modes.append(
        (run.task.objective.training, run.task.backbone.training)
    )
    assert [point["step"] for point in loop.fit(run).curve] == [3, 6, 7]
    assert modes == [(True, False)] * 7


def test_gathered_predictions_stand_in_the_order_of_rows():
    found = evaluate.gather_predictions(
        {"row": np.array([5, 2, 9]), "scores": np.array([[5.0], [2.0], [9.0]])}, Ranks()
    )
    assert found["row"].tolist() == [2, 5, 9] and found["scores"].tolist() == [[2.0], [5.0], [9.0]]
    assert evaluate.gather_predictions({}, Ranks()) == {}
    with pytest.raises(ValueError, match="no row of the split could be evaluated"):
        evaluate.compute_metrics({}, ("accuracy",))


# ---------------------------------------------------------------- phases


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_lp_ft_trains_the_head_first_and_then_everything(rows, norm):
    run = make_run(
        rows,
        net_task(norm=norm, dropout=0.3),
        steps=6,
        technique=LPFT(LPFTOptions(probe_share=0.5, probe_lr_scale=1.0, full_lr_scale=0.1)),
        lr=0.01,
        warmup=0.0,
        weight_decay=0.5,
    )
    before, found, logs, modes = weights(run.task), captured(run), [], []
    run.on_log = lambda log: (logs.append(log), modes.append(run.task.backbone.norm.training))
    outcome = loop.fit(run)
    backbone = {name for name in before if name.startswith("backbone.")}
    for after in found[:3]:  # bit for bit, running statistics too
        assert all(torch.equal(after[name], before[name]) for name in backbone)
        assert not torch.equal(after["objective.head.weight"], before["objective.head.weight"])
    assert all(not torch.equal(found[-1][name], before[name]) for name in backbone)
    assert [log["phase"] for log in logs] == ["probe"] * 3 + ["full"] * 3
    # Each phase its own cosine
    assert [log["lr"] for log in logs] == pytest.approx(
        [0.01, 0.0075, 0.0025, 0.001, 0.00075, 0.00025]
    )
    assert modes == [False] * 3 + [True] * 3
    assert outcome.params_trained == sum(p.numel() for p in run.task.parameters())


def test_a_frozen_backbone_does_not_move(rows):
    run = make_run(
        rows, net_task(norm="batch"), steps=4, technique=LinearProbe(), lr=0.1, weight_decay=0.5
    )
    before = weights(run.task)
    outcome = loop.fit(run)
    moved = {
        name for name, after in weights(run.task).items() if not torch.equal(after, before[name])
    }
    assert moved == {"objective.head.weight", "objective.head.bias"}
    assert outcome.params_trained == sum(p.numel() for p in run.task.objective.parameters())


def test_nothing_left_to_train_is_an_error(rows):
    class Nothing(Technique):
        registered_name, options_class = "nothing", Options

        def rates(self, layers, phase):
            return dict.fromkeys(layers, 0.0)

    with pytest.raises(ValueError, match="technique nothing, phase all: nothing is left to train"):
        loop.fit(make_run(rows, net_task(), technique=Nothing()))


# ---------------------------------------------------------------- resume


class Killed(Exception):  # noqa: N818 - a stand-in for a kill, not an error
    pass


def resumable(rows, validation, folder, kind: str, optimizer: str = "adamw") -> loop.TrainingRun:
    technique = LPFT(LPFTOptions(probe_share=0.5)) if kind == "lp_ft" else None
    return make_run(
        rows,
        net_task(norm="batch", dropout=0.4),
        steps=12,
        technique=technique,
        validation=validation,
        ema=0.8,
        augment=True,
        lr=0.01,
        optimizer=optimizer,
        changes=({"step": 4, "lr": 0.02}, {"step": 8, "weight_decay": 0.2})
        if kind == "changes"
        else (),
        eval_every_steps=4,
        checkpoint_every_steps=3,
        checkpoints=str(folder),
    )


def finish(run: loop.TrainingRun):
    trace: dict[int, list[int]] = {}
    run.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())
    outcome = loop.fit(run)
    state = torch.load(
        Path(run.checkpoint_folder or "", "step-0000000009", "state.pt"), weights_only=True
    )
    assert state.pop("seconds") > 0  # of both parts, and another number every time
    return weights(run.task), outcome, state, trace, (run.keeper.step, run.keeper.metrics)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(
    ("kind", "optimizer", "where", "stop", "resumed"),
    [
        ("full", "adamw", "log", 5, 3),
        ("full", "sgd", "log", 11, 9),
        ("full", "adamw", "eval", 4, 3),
        ("full", "adamw", "log", 2, 0),
        ("lp_ft", "adamw", "log", 5, 3),
        ("lp_ft", "adamw", "log", 7, 6),
        ("lp_ft", "sgd", "eval", 12, 9),
        ("changes", "adamw", "log", 7, 6),
        ("changes", "sgd", "log", 11, 9),
    ],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    rows, validation, tmp_path, kind, optimizer, where, stop, resumed
):
    """Weights, optimiser, average, kept weights, random state, curve and row order, as if it had
    never stopped.
    """
    want = finish(resumable(rows, validation, tmp_path / "whole", kind, optimizer))
    first = resumable(rows, validation, tmp_path / "parts", kind, optimizer)
    trace: dict[int, list[int]] = {}
    first.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())

    def kill(step):
        if step == stop:
            raise Killed

    if where == "log":
        first.on_log = lambda log: kill(log["step"])
    else:
        first.on_eval = lambda step, metrics: kill(step)
    with pytest.raises(Killed):
        loop.fit(first)
    torch.manual_seed(12345)  # the process that goes on has a random state of its own
    found = finish(resumable(rows, validation, tmp_path / "parts", kind, optimizer))
    assert found[1].resumed_from == resumed and found[1].steps == 12
    assert furthest(found[0], want[0]) == 0.0
    assert same(found[2], want[2]) and found[4] == want[4]
    assert found[1].curve == want[1].curve
    committed = {**{step: ids for step, ids in trace.items() if step < resumed}, **found[3]}
    assert committed == want[3] and set(found[3]) == set(range(resumed, 12))
    counts = np.unique(np.concatenate(list(committed.values())), return_counts=True)
    assert (counts[1] == 2).all() and len(counts[0]) == len(rows)  # two epochs of 48 rows


def test_a_resume_point_that_was_not_finished_is_passed_over(rows, validation, tmp_path):
    loop.fit(resumable(rows, validation, tmp_path, "full"))
    assert newest_resume_point(str(tmp_path)) == 9
    # Written last, so on S3 it is what a killed writer lacks
    os.remove(tmp_path / "step-0000000009" / "manifest.json")
    assert newest_resume_point(str(tmp_path)) == 6
    state, passed_over = checkpoint.load(str(tmp_path), Ranks())
    assert state is not None and state["step"] == 6 and passed_over == []


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_a_damaged_resume_point_gives_way_to_the_one_before(rows, validation, tmp_path, file):
    """The run goes on from the older one, says so in every record, and ends as if nothing had been
    damaged.
    """
    whole = resumable(rows, validation, tmp_path / "whole", "full")
    loop.fit(whole)
    loop.fit(resumable(rows, validation, tmp_path / "parts", "full"))
    flip_a_bit(tmp_path / "parts" / "step-0000000009" / file)
    again = resumable(rows, validation, tmp_path / "parts", "full")
    starts, logs = [], []
    again.on_start, again.on_log = lambda step, notes: starts.append((step, notes)), logs.append
    outcome = loop.fit(again)
    assert outcome.resumed_from == 6 and furthest(weights(again.task), weights(whole.task)) == 0.0
    ((step, notes),) = starts
    assert step == 6 and len(notes) == 1
    assert (
        "the resume point of step 9 is damaged" in notes[0]
        and file in notes[0]
        and "goes on from that of step 6" in notes[0]
    )
    assert all(notes[0] in log["warning"] for log in logs)
    assert newest_resume_point(str(tmp_path / "parts")) == 9, "written again, whole"
    assert checkpoint.load(str(tmp_path / "parts"), Ranks())[1] == []


def test_resume_points_that_are_all_damaged_are_refused(rows, validation, tmp_path):
    """Days of work are not thrown away in silence: the error names the folder to remove."""
    loop.fit(resumable(rows, validation, tmp_path, "full"))
    for step in (6, 9):
        flip_a_bit(tmp_path / f"step-{step:010d}" / "state.pt")
    with pytest.raises(
        storage.StorageError,
        match=r"no resume point in .* is intact.*step 9.*state\.pt.*Remove that folder",
    ):
        loop.fit(resumable(rows, validation, tmp_path, "full"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000000006", "step-0000000009"], (
        "the two newest are kept, and none was removed"
    )


def test_a_resume_point_of_other_parameter_groups_is_refused(
    rows, validation, tmp_path, monkeypatch
):
    """Moments of one parameter would go to another, or torch would not say what to do."""
    loop.fit(resumable(rows, validation, tmp_path, "full"))
    monkeypatch.setattr(Task, "undecayed_parameters", lambda self: {"objective.head.weight"})
    with pytest.raises(
        ValueError, match=r"written by another version of the code, .*--remake changed"
    ):
        loop.fit(resumable(rows, validation, tmp_path, "full"))


@pytest.mark.parametrize(
    "cause", [ConnectionError("down"), None], ids=["no answer", "a short answer"]
)
def test_a_resume_point_that_cannot_be_read_now_is_not_taken_for_damaged(
    rows, validation, tmp_path, monkeypatch, cause
):
    """A storage that does not answer, or not whole, must not cost the newest resume point."""
    loop.fit(resumable(rows, validation, tmp_path, "full"))

    read = storage.read_bytes

    def unreachable(uri):
        if "step-0000000009" not in uri:
            return read(uri)
        raise storage.StorageError(f"cannot read {uri}: the server is down") from cause

    monkeypatch.setattr(storage, "read_bytes", unreachable)
    with pytest.raises(storage.StorageError, match="the server is down"):
        checkpoint.load(str(tmp_path), Ranks())
    assert newest_resume_point(str(tmp_path)) == 9


def test_resume_points_come_by_time_too(rows, validation, tmp_path):
    """A short run of slow steps has one: here a step takes four minutes, and none is due by
    steps.
    """
    run = resumable(rows, validation, tmp_path, "full")
    run.train = run.train.model_copy(update={"checkpoint_every_steps": None, "ema": None})
    now, saved = [0.0], []
    run.clock = lambda: now[0]
    run.on_rows = lambda step, ids: now.__setitem__(0, now[0] + 240.0)
    run.on_log = lambda record: saved.append(newest_resume_point(str(tmp_path)))
    loop.fit(run)
    assert run.train.checkpoint_every_minutes == 10.0
    assert saved == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9], (
        "every 12 minutes: the first step after ten"
    )


def test_resume_points_by_steps_alone(rows, validation, tmp_path):
    run = resumable(rows, validation, tmp_path, "full")
    run.train = run.train.model_copy(
        update={"checkpoint_every_steps": None, "checkpoint_every_minutes": None}
    )
    seconds = iter(range(0, 10**9, 10**6))
    run.clock = lambda: float(next(seconds))
    loop.fit(run)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- switches and logs


def test_progress_is_told_by_the_clock_that_is_passed_in(rows):
    run = make_run(rows, net_task(), steps=6, log_every_steps=2)
    seconds = iter(range(100))
    run.clock = lambda: float(next(seconds))
    batches = run.batches
    run.batches = lambda steps: (LoadedBatch(loaded.batch, [], 0.25) for loaded in batches(steps))
    logs = []
    run.on_log = logs.append
    outcome = loop.fit(run)
    assert [log["rows_per_second"] for log in logs] == [16.0, 16.0, 16.0] and [
        log["eta_seconds"] for log in logs
    ] == [2.0, 1.0, 0.0]
    assert [log["wait_share"] for log in logs] == [0.5] * 3
    assert "unit" not in logs[0], "rows are not told twice"
    assert (
        outcome.seconds == 4.0
        and outcome.rows_per_second == 12.0
        and outcome.wait_share == pytest.approx(1.5 / 4)
    )


def test_the_log_counts_in_the_unit_that_it_is_given(rows):
    run = make_run(rows, net_task(), steps=4, log_every_steps=2)
    seconds = iter(range(100))
    run.clock = lambda: float(next(seconds))
    run.throughput_unit, run.count_units_of = "tokens", lambda batch: 10.0 * len(batch)
    logs = []
    run.on_log = logs.append
    loop.fit(run)
    assert [(log["unit"], log["units_per_second"]) for log in logs] == [("tokens", 160.0)] * 2


def test_bf16_that_a_gpu_only_emulates_is_not_taken(monkeypatch):
    def is_supported(including_emulation=True):
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match=r"train\.precision: this GPU has no bf16"):
        loop.autocast(Train(precision="bf16"), gpu)
    with loop.autocast(Train(precision="auto"), gpu):
        assert not torch.is_autocast_enabled("cuda")


def test_bf16_is_only_taken_where_it_is_asked_for_or_there(rows):
    cpu = torch.device("cpu")
    weight, x = torch.randn(4, 4), torch.randn(2, 4)
    kinds = {}
    for precision in ("auto", "fp32", "bf16"):
        with loop.autocast(Train(precision=precision), cpu):
            kinds[precision] = (x @ weight).dtype
    assert kinds == {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}
    runs = [
        make_run(rows, net_task(), steps=5, precision=precision, lr=0.01)
        for precision in ("fp32", "bf16")
    ]
    for run in runs:
        loop.fit(run)
    a, b = (weights(run.task) for run in runs)
    assert 0 < furthest(a, b) < 0.05 and all(tensor.dtype == torch.float32 for tensor in b.values())


def test_channels_last_changes_the_layout_and_not_the_result():
    found = image_rows(16, size=32, channels=3)
    tasks = [
        task_of(
            "timm/test_resnet",
            {"channels": 3, "size": 32},
            "classification",
            found.decoder.objective_state,
        )
        for _ in range(2)
    ]
    for task, switch in zip(tasks, (False, True), strict=True):
        loop.fit(make_run(found, task, steps=2, channels_last=switch, optimizer="sgd", lr=0.01))
    assert furthest(weights(tasks[0]), weights(tasks[1])) < 1e-5
    assert any(p.dim() == 4 and not p.is_contiguous() for p in tasks[1].parameters())


@pytest.mark.slow
def test_compiled_training_equals_eager_training(rows, validation, tmp_path):
    runs = [
        make_run(
            rows,
            net_task(),
            steps=4,
            compile=switch,
            lr=0.01,
            validation=validation,
            checkpoints=str(tmp_path / str(switch)),
            checkpoint_every_steps=2,
        )
        for switch in (False, True)
    ]
    for run in runs:
        loop.fit(run)
    assert furthest(weights(runs[0].task), weights(runs[1].task)) < 1e-5


@pytest.mark.slow
def test_rows_of_many_widths_compile_twice(monkeypatch):
    """Once for the first width and once for all others (torch gives up after eight)."""
    found, widths = text_rows(), set()
    task = task_of(
        "transformers/bert",
        found.modality.inputs(),
        "classification",
        found.decoder.objective_state,
        **SMALL,
    )
    run = make_run(found, task, steps=12, global_batch=2, compile=True)
    for loaded in run.batches(range(run.steps)):
        widths.add(loaded.batch["tokens"].shape[1])
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    loop.fit(run)
    assert len(widths) > 2 and counter.frame_count == 2


# ---------------------------------------------------------------- golden losses


def golden_image() -> list[float]:
    found = image_rows(64, size=32, channels=3, noise=0.8)
    task = task_of(
        "timm/resnet10t",
        {"channels": 3, "size": 32},
        "classification",
        found.decoder.objective_state,
        seed=7,
    )
    return ten_losses(
        make_run(
            found, task, steps=10, global_batch=16, augment=True, lr=0.02, optimizer="sgd", seed=7
        )
    )


def golden_text() -> list[float]:
    modality = text_modality()
    task = task_of(
        "transformers/bert",
        modality.inputs(),
        "mlm",
        seed=7,
        layers=2,
        hidden=32,
        heads=2,
        dropout=0.1,
    )
    return ten_losses(
        make_run(packed_rows(80, modality), task, steps=10, global_batch=8, lr=2e-3, seed=7)
    )


def ten_losses(run: loop.TrainingRun) -> list[float]:
    logs = []
    run.on_log = logs.append
    loop.fit(run)
    return [log["loss"] for log in logs]


@pytest.mark.parametrize(
    ("name", "make"), [("image_resnet10t", golden_image), ("text_bert_mlm", golden_text)]
)
def test_golden_losses(name, make):
    losses, path = make(), GOLDEN / f"{name}.txt"
    if os.environ.get("ONETOMANY_GOLDEN") == "write":
        lines = "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses, start=1))
        path.write_text(
            f"# Loss of the first ten steps of {make.__name__} in tests/train/test_loop.py, "
            f"whose first lines say how to write this anew.\n{lines}"
        )
    want = [
        float(line.split()[1]) for line in path.read_text().splitlines() if not line.startswith("#")
    ]
    assert losses == pytest.approx(want, abs=1e-4) and len(want) == 10


def test_optimiser_state_is_made_anew_for_a_phase(rows):
    """A moment of the head's first phase would else steer the second."""
    run = make_run(rows, net_task(), steps=4, technique=LPFT(LPFTOptions(probe_share=0.5)))
    made = []
    original = optim.build_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            optim, "build_optimizer", lambda *args: made.append(original(*args)) or made[-1]
        )
        loop.fit(run)
    assert [{int(s["step"]) for s in optimizer.state.values()} for optimizer in made] == [{2}, {2}]
    assert [len(optimizer.state) for optimizer in made] == [2, len(list(run.task.parameters()))]


def test_what_an_objective_warns_of_stands_in_every_record_from_then_on(rows):
    """Records are looked at now and then, so that one alone could be missed."""
    records: list[dict] = []
    run = make_run(rows, net_task(), steps=6, log_every_steps=2)
    run.on_log = records.append
    run.task.objective.after_step = lambda backbone, step, steps: "collapsed" if step == 2 else None
    loop.fit(run)
    assert [record.get("warning") for record in records] == [None, "collapsed", "collapsed"]
