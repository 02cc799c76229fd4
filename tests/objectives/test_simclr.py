"""SimCLR: the loss is the paper's, over the rows of all ranks."""

import math

import pytest
import torch
from looks import Conv, check_ranks, check_resume, run_of, some, task
from torch.nn import functional as F

from pipeline.core.contracts.objective_capabilities import CouplesRows
from pipeline.core.specs import Architecture
from pipeline.objectives.simclr import SimCLR
from pipeline.train import loop


def as_written(first: torch.Tensor, second: torch.Tensor, temperature: float) -> tuple[float, int]:
    """Algorithm 1 of Chen et al. 2020, in loops: the sum over the 2 N views, and how many are
    nearest to their partner.
    """
    z = [*first, *second]
    n, total, hits = len(first), 0.0, 0
    for i in range(2 * n):
        similar = [float(F.cosine_similarity(z[i], z[k], dim=0)) for k in range(2 * n)]
        j = (i + n) % (2 * n)
        total -= math.log(
            math.exp(similar[j] / temperature)
            / sum(math.exp(similar[k] / temperature) for k in range(2 * n) if k != i)
        )
        hits += max((k for k in range(2 * n) if k != i), key=similar.__getitem__) == j
    return total, hits


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_the_loss_is_the_papers_formula(temperature):
    made = task("simclr", temperature=temperature, width=6)
    batch = some(7, made.objective.views())
    total, count, logs = made(batch)
    head, backbone = made.objective.head, made.backbone
    first, second = (
        head(backbone(batch.replace(image=batch[name])).pooled) for name in ("view0", "view1")
    )
    want, hits = as_written(first.detach(), second.detach(), temperature)
    assert (
        float(total.detach()) == pytest.approx(want, rel=1e-5)
        and count == 14
        and int(logs["top1"]) == hits
    )
    found = made.objective.predict(backbone, batch)
    assert (
        float(found["loss"].detach().sum()) == pytest.approx(want, rel=1e-5)
        and found["count"].tolist() == [2.0] * 7
    )


def test_views_that_are_the_same_are_found():
    made = task("simclr")
    batch = some(6, made.objective.views())
    _, count, logs = made(batch.replace(view1=batch["view0"]))
    assert int(logs["top1"]) == count == 12


def test_two_views_of_the_input_with_the_options_strengths():
    first, second = task("simclr", area=0.3, jitter=0.5, blur=0.0).objective.views()
    assert first == second and (first.size, first.area, first.strength, first.blur) == (
        None,
        (0.3, 1.0),
        0.5,
        0.0,
    )


def test_rows_that_are_no_images_are_refused():
    backbone = Conv()
    backbone.arch = Architecture("toys/words", {}, {"vocabulary": 9})
    with pytest.raises(ValueError, match="images"):
        SimCLR(backbone, SimCLR.options_class(), {})


def test_labels_are_not_asked_for():
    assert SimCLR.roles == () and isinstance(SimCLR, CouplesRows)


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(team):
    check_ranks(team, "simclr")


def test_a_run_that_was_stopped_ends_the_same(tmp_path):
    check_resume(tmp_path, "simclr")


def test_simclr_learns():
    run = run_of(task("simclr", temperature=0.5), steps=40, lr=0.02, log_every_steps=10)
    losses: list[float] = []
    run.on_log = lambda record: losses.append(record["loss"])
    loop.fit(run)
    assert losses[-1] < 0.9 * losses[0]
