"""Two ranks under gloo do what one does: the same weights, each row once, no hang on an empty part,
resume at another number of ranks.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from contract_rows import OBJECTIVES
from toys import (
    SMALL,
    furthest,
    image_rows,
    make_run,
    net_task,
    newest_resume_point,
    packed_rows,
    task_of,
    text_modality,
    weights,
)

from pipeline.config import registry
from pipeline.core.contracts import Batch
from pipeline.core.contracts.technique_capabilities import reads_source
from pipeline.data.stream import LoadedBatch
from pipeline.techniques.lp_ft import LPFT, LPFTOptions
from pipeline.train import evaluate, loop
from pipeline.train.loop import NonFiniteError
from pipeline.train.ranks import Ranks

pytestmark = pytest.mark.slow
ONE = Ranks()


# ---------------------------------------------------------------- the same weights


def train(ranks: Ranks, task=None, net: dict | None = None, **words):
    """Weights, curve, the rows of every step and the losses; of a network as ``net`` says."""
    run = make_run(
        image_rows(48),
        task or net_task(**(net or {})),
        ranks=ranks,
        validation=image_rows(21, seed=1),
        lr=0.01,
        **words,
    )
    trace: dict[int, list[int]] = {}
    run.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())
    logs: list = []
    run.on_log = logs.append
    outcome = loop.fit(run)
    return weights(run.task), outcome.curve, trace, [log["loss"] for log in logs], outcome


def joined(traces: list[dict[int, list[int]]]) -> dict[int, list[int]]:
    assert all(trace.keys() == traces[0].keys() for trace in traces)
    return {step: sorted(row for trace in traces for row in trace[step]) for step in traces[0]}


def check_same(two, one, tolerance=1e-5):
    assert furthest(two[0][0], two[1][0]) == 0.0  # bit for bit among themselves
    assert furthest(two[0][0], one[0]) < tolerance
    assert two[0][1] == two[1][1]
    for a, b in zip(two[0][1], one[1], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert joined([rank[2] for rank in two]) == joined([one[2]])
    assert two[0][3] == two[1][3] and two[0][3] == pytest.approx(one[3], abs=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"micro_batch": 2},
        {"ema": 0.8, "clip_norm": 0.05, "weight_decay": 0.3},
        {"optimizer": "sgd", "global_batch": 6},
        # One rank holds twice as many rows as the other
        {
            "global_batch": 6,
            "plan_shards": 3,
            "micro_batch": 1,
        },
        {"augment": True},
    ],
    ids=str,
)
def test_two_ranks_give_the_weights_of_one(team, words):
    check_same(team(train, **words), train(ONE, **words))


def test_a_layer_that_is_thawed_later_is_reduced_over_ranks(team):
    """DDP only reduces what was trainable when it was wrapped: the loop wraps anew at a phase."""
    words = {"technique": LPFT(LPFTOptions(probe_share=0.5, probe_lr_scale=1.0)), "warmup": 0.0}
    two, one = team(train, **words), train(ONE, **words)
    check_same(two, one)
    start = weights(net_task())
    assert not torch.equal(two[0][0]["backbone.block.weight"], start["backbone.block.weight"])


def train_by(ranks: Ranks, name: str, norm: str = "layer", **options):
    """As `train`, by a registered technique; a source with a head for two other labels is there."""
    kind = registry.get("technique", name)
    used, task = kind(kind.options_class(**options)), net_task(norm=norm)
    if reads_source(used):
        used.read_source(net_task(seed=3, classes=2))
    wrapped = used.wrap(task)
    _, *found = train(ranks, wrapped, technique=used)
    return weights(used.finish(wrapped)), *found[:3]


@pytest.mark.parametrize(
    "name",
    [
        "swa",
        "ema",
        "wise_ft",
        "l2_sp",
        "distillation",
        "lwf",
        "co_tuning",
        "side_tuning",
        "bottleneck",
    ],
)
def test_a_technique_gives_the_weights_of_one_rank(team, name):
    """Penalties are means and counts over the rows of all ranks, averages and remembered heads the
    same.
    """
    check_same(team(train_by, name), train_by(ONE, name))


def test_singular_values_are_those_of_the_rows_of_all_ranks(team):
    check_same(team(train_by, "bss", weight=1.0), train_by(ONE, "bss", weight=1.0))


def test_what_a_rank_makes_of_its_own_rows_ends_in_one_network(team):
    """Drawn channels are those of a rank's own rows."""
    two = team(train_by, "stoch_norm", norm="batch")
    assert two[0][1] == two[1][1] and two[0][3] == two[1][3]
    assert furthest(two[0][0], two[1][0]) == 0.0


def train_text(ranks: Ranks, objective: str, architecture: str):
    modality = text_modality(f"transformers/{architecture}")
    rows = packed_rows(40, modality, objective)
    run = make_run(
        rows,
        task_of(f"transformers/{architecture}", modality.inputs(), objective, **SMALL),
        steps=3,
        ranks=ranks,
        lr=1e-3,
        validation=packed_rows(12, modality, objective, seed=3),
    )
    outcome = loop.fit(run)
    return weights(run.task), outcome.curve


def train_images(ranks: Ranks, objective: str, architecture: str):
    torch.manual_seed(0)
    case = replace(OBJECTIVES[objective], backbone=f"timm/{architecture}")
    built = case.build(objective)
    words = {"steps": 2, "global_batch": 2, "optimizer": "sgd", "lr": 1e-3}
    run = make_run(built.rows, built.task, ranks=ranks, **words)
    outcome = loop.fit(run)
    return weights(run.task), outcome.curve


@pytest.mark.parametrize(
    ("work", "objective", "architecture"),
    [
        (train_text, "mlm", "bert"),
        (train_text, "clm", "gpt2"),
        (train_images, "instance_segmentation", "test_vit"),
    ],
)
def test_two_ranks_of_an_objective_give_the_weights_of_one(team, work, objective, architecture):
    """Ranks hold unequal numbers of tokens and of regions: the mean is over all of them. What is
    masked or sampled follows the rows, wherever they are.
    """
    (a, curve), (b, other) = team(work, objective, architecture)
    one, want = work(ONE, objective, architecture)
    assert furthest(a, b) == 0.0 and furthest(a, one) < 1e-5 and curve == other
    for point, single in zip(curve, want, strict=True):
        assert point == pytest.approx(single, rel=1e-4)


def test_norm_statistics_are_those_of_one_rank_everywhere(team):
    """Batch norm sees its own rank's rows, so weights differ from one rank's; both ranks still end
    with the same network.
    """
    two = team(train, net={"norm": "batch"}, eval_every_steps=2)
    assert two[0][1] == two[1][1] and two[0][3] == two[1][3]
    assert furthest(two[0][0], two[1][0]) == 0.0


# ---------------------------------------------------------------- evaluation


def everything(ranks: Ranks, n: int):
    """The predictions that the metrics of the loop's own evaluator see, and values of metrics."""
    rows, seen = image_rows(n), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "compute_metrics", lambda found, names: seen.append(found) or {})
        check = evaluate.evaluator(
            rows.part(ranks.rank, ranks.count),
            ("loss",),
            evaluate.device_preprocessing(rows),
            ranks,
            lambda: torch.autocast("cpu", enabled=False),
            4,
        )
        check(net_task())
    (found,) = seen
    return found, evaluate.compute_metrics(found, ("accuracy", "macro_f1", "loss"))


@pytest.mark.parametrize("n", [1, 3, 16, 37])
def test_evaluation_sees_each_row_once(team, n):
    """Also when a rank has none."""
    one, values = everything(ONE, n)
    for found, theirs in team(everything, n):
        assert found["row"].tolist() == one["row"].tolist() == list(range(1000, 1000 + n))
        assert all(
            np.array_equal(found[name], one[name]) or np.allclose(found[name], one[name], atol=1e-6)
            for name in one
        )
        assert theirs == pytest.approx(values, abs=1e-6)


# ---------------------------------------------------------------- empty parts and trouble


def drop(batch: Batch, keep: np.ndarray) -> Batch:
    where = torch.from_numpy(keep)
    return Batch(
        batch.rows[keep],
        batch.keys[where],
        {name: tensor[where] for name, tensor in batch.data.items()},
    )


def train_without(
    ranks: Ranks,
    lost: dict[int, list[int]],
    norm: str = "layer",
    micro_batch: int | None = None,
    technique: str = "full",
):
    """Some rows of some steps cannot be decoded."""
    used, task = registry.get("technique", technique)(), net_task(norm=norm)
    run = make_run(
        image_rows(48),
        used.wrap(task),
        steps=4,
        ranks=ranks,
        lr=0.01,
        micro_batch=micro_batch,
        technique=used,
    )
    whole = run.batches

    def batches(steps):
        for step, loaded in zip(steps, whole(steps), strict=True):
            yield LoadedBatch(
                drop(loaded.batch, ~np.isin(loaded.batch.rows, lost.get(step, []))), [], 0.0
            )

    run.batches = batches
    sizes = []
    run.on_rows = lambda step, ids: sizes.append(len(ids))
    outcome = loop.fit(run)
    return weights(run.task), sizes, outcome.skipped_steps


def parts(team) -> list[dict[int, list[int]]]:
    return [rank[2] for rank in team(train, steps=4)]


@pytest.mark.parametrize(
    "words", [{}, {"micro_batch": 2}, {"technique": "bss"}], ids=["whole", "micro", "gathered"]
)
def test_a_rank_with_an_empty_batch_does_not_hang(team, words):
    """Rank 1 has nothing in step 1, rank 0 in step 2, nobody in step 3."""
    first, second = parts(team)
    lost = {1: second[1], 2: first[2], 3: first[3] + second[3]}
    two = team(train_without, lost, **words)
    one = train_without(ONE, lost, **{**words, "micro_batch": None})
    assert two[0][1] == [4, 4, 0, 0] and two[1][1] == [4, 0, 4, 0] and one[1] == [8, 4, 4, 0]
    assert furthest(two[0][0], two[1][0]) == 0.0 and furthest(two[0][0], one[0]) < 1e-5
    assert two[0][2] == two[1][2] == 0


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_filters_weigh_by_the_rows_of_all_ranks(team, lost):
    """Also where a rank has none in the step that weighs them."""
    rows = {} if lost is None else {0: parts(team)[lost][0]}
    two = team(train_without, rows, technique="delta")
    one = train_without(ONE, rows, technique="delta")
    assert furthest(two[0][0], two[1][0]) == 0.0
    names = [name for name in one[0] if name.startswith("weights")]
    assert any(one[0][name].any() for name in names)
    for name in names:
        assert torch.allclose(two[0][0][name], one[0][name], atol=1e-6)


def test_buffers_do_not_hang_on_unequal_micro_batches(team):
    """DDP broadcasts norm statistics at a forward: once a step, however many micro-batches a rank
    has.
    """
    first, second = parts(team)
    two = team(train_without, {1: second[1], 2: first[2][:2]}, norm="batch", micro_batch=2)
    assert (
        furthest(
            two[0][0],
            {
                **two[1][0],
                **{
                    name: two[0][0][name]
                    for name in two[0][0]
                    if "running" in name or "tracked" in name
                },
            },
        )
        == 0.0
    )


def train_poisoned(ranks: Ranks, bad: list[int], steps: int, **words):
    """The rows ``bad`` give NaN, on whichever rank they are."""
    run = make_run(image_rows(48), net_task(), steps=steps, ranks=ranks, lr=0.01, **words)
    ready = run.preprocess

    def spoil(batch, training):
        batch = ready(batch, training)
        image = batch["image"].clone()
        image[torch.from_numpy(np.isin(batch.rows, bad))] = float("nan")
        return batch.replace(image=image)

    run.preprocess = spoil
    trace: dict[int, list[int]] = {}
    run.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())
    try:
        outcome = loop.fit(run)
    except NonFiniteError as error:
        return str(error), trace
    return weights(run.task), outcome.skipped_steps


def test_a_bad_row_on_one_rank_skips_the_step_on_all(team):
    first, second = parts(team)
    bad = [first[1][0], second[2][1]]
    two, one = team(train_poisoned, bad, 4), train_poisoned(ONE, bad, 4)
    assert two[0][1] == two[1][1] == one[1] == 2
    assert furthest(two[0][0], two[1][0]) == 0.0 and furthest(two[0][0], one[0]) < 1e-5


def test_every_rank_stops_and_names_its_own_rows(team):
    first, _ = parts(team)
    answers = team(train_poisoned, first[1] + first[2], 4, max_bad_steps=2)
    for rank, (message, trace) in enumerate(answers):
        assert (
            "2 steps in a row up to step 3; lower train.lr, check the inputs. Row ids of the "
            f"last batches (rank {rank}): {trace[1] + trace[2]}" in message
        )


# ---------------------------------------------------------------- resume


class Killed(Exception):  # noqa: N818 - a stand-in for a kill, not an error
    pass


def train_in_parts(ranks: Ranks, folder: str, stop: int | None = None, dropout: float = 0.0):
    """12 steps with resume points at 3, 6 and 9; ``stop``: the run ends there."""
    run = make_run(
        image_rows(48),
        net_task(dropout=dropout),
        steps=12,
        ranks=ranks,
        lr=0.01,
        ema=0.8,
        validation=image_rows(21, seed=1),
        eval_every_steps=4,
        augment=True,
        technique=LPFT(LPFTOptions(probe_share=0.5, probe_lr_scale=1.0)),
        checkpoint_every_steps=3,
        checkpoints=folder,
    )
    trace: dict[int, list[int]] = {}
    run.on_rows = lambda step, ids: trace.__setitem__(step, ids.tolist())

    def on_log(log):
        if log["step"] == stop:
            raise Killed

    run.on_log = on_log
    try:
        outcome = loop.fit(run)
    except Killed:
        return None, trace, 0
    return weights(run.task), trace, outcome.resumed_from, outcome.curve


@pytest.mark.parametrize(("stop", "resumed"), [(5, 3), (8, 6), (11, 9)])
def test_two_ranks_go_on_bit_for_bit(team, tmp_path, stop, resumed):
    """Each with its own random state: dropout differs between ranks, and is the same after a
    restart.
    """
    whole = team(train_in_parts, str(tmp_path / "whole"), dropout=0.4)
    team(train_in_parts, str(tmp_path / "parts"), stop, dropout=0.4)
    team(torch_seed, 5)
    again = team(train_in_parts, str(tmp_path / "parts"), dropout=0.4)
    for a, b in zip(again, whole, strict=True):
        assert furthest(a[0], b[0]) == 0.0 and a[2] == resumed and a[3] == b[3]


def train_with_patience(ranks: Ranks):
    """A rate at which the weights do not move: no validation is better than the first."""
    run = make_run(
        image_rows(48),
        net_task(),
        steps=12,
        ranks=ranks,
        lr=1e-12,
        validation=image_rows(21, seed=1),
        eval_every_steps=1,
        patience=2,
    )
    run.keeper = loop.KeepBest("accuracy", "best", 2)
    outcome = loop.fit(run)
    return outcome.stopped_at, outcome.steps, run.keeper.step


def test_all_ranks_lose_patience_at_the_same_step(team):
    assert team(train_with_patience) == [(3, 3, 1)] * 2


def train_by_the_clock(ranks: Ranks, folder: str):
    """Rank 0's clock says that a resume point is due at every step, that of the other rank says
    never. The newest one at each log line.
    """
    run = make_run(
        image_rows(48),
        net_task(),
        steps=12,
        ranks=ranks,
        lr=0.01,
        log_every_steps=3,
        checkpoints=folder,
    )
    minutes = iter(range(10**6))
    run.clock = lambda: 3600.0 * next(minutes) if ranks.is_first else 0.0
    seen, notes = [], []
    run.on_log = lambda log: seen.append(newest_resume_point(folder))
    run.on_start = lambda step, passed_over: notes.extend(passed_over)
    outcome = loop.fit(run)
    return weights(run.task), outcome.resumed_from, seen, notes


def test_ranks_with_other_clocks_agree_on_the_steps_of_resume_points(team, tmp_path):
    """Rank 0 decides, every third step here (they ask each other where they log); and on which of
    them to go on from.
    """
    first = team(train_by_the_clock, str(tmp_path))
    assert [part[2] for part in first] == [[0, 3, 6, 9]] * 2
    path = tmp_path / "step-0000000009" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    again = team(train_by_the_clock, str(tmp_path))
    assert [part[1] for part in again] == [6, 6]
    assert all("step 9 is damaged" in part[3][0] for part in again)
    assert furthest(again[0][0], first[0][0]) == furthest(again[1][0], first[0][0]) == 0.0


def torch_seed(ranks: Ranks, seed: int) -> None:
    torch.manual_seed(seed + ranks.rank)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(team, tmp_path, before, after):
    """The same global batches from there, each row of an epoch once, the weights of an
    uninterrupted run.
    """
    whole = train_in_parts(ONE, str(tmp_path / "whole"))
    runner = {1: lambda *args: [train_in_parts(ONE, *args)], 2: partial(team, train_in_parts)}
    first = runner[before](str(tmp_path / "parts"), 8)
    second = runner[after](str(tmp_path / "parts"))
    assert all(part[2] == 6 for part in second)
    assert all(furthest(part[0], whole[0]) < 1e-5 for part in second)
    committed = {
        step: rows for step, rows in joined([part[1] for part in first]).items() if step < 6
    } | joined([part[1] for part in second])
    assert committed == joined([whole[1]])
    counts = np.unique(np.concatenate(list(committed.values())), return_counts=True)[1]
    assert len(counts) == 48 and (counts == 2).all()


def test_more_ranks_than_shards_are_refused():
    run = make_run(image_rows(48), net_task(), ranks=replace(ONE, count=3), plan_shards=2)
    with pytest.raises(ValueError, match="3 ranks are more than the 2 canonical shards"):
        next(iter(run.batches(range(1))))
