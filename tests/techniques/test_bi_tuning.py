"""Bi-tuning's losses are the paper's, of the rows of all ranks, and its projection is dropped."""

import numpy as np
import pytest
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from toys import furthest, image_rows, make_run, net_task, take, weights

from pipeline.config import registry
from pipeline.core.contracts import Batch, Task
from pipeline.techniques.bi_tuning import categorical_contrastive, contrastive_cross_entropy
from pipeline.train import loop
from pipeline.train.ranks import Ranks

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
EACH = pytest.mark.parametrize("kind", KINDS)


def bi_tuning(**options):
    kind = registry.get("technique", "bi_tuning")
    return kind(kind.options_class(**options))


def by_hand(scores, projections, label, temperature) -> tuple[float, float]:
    """Both losses, term by term."""
    rows = range(len(label))
    first, second = [], []
    unit = projections / np.linalg.norm(projections, axis=1, keepdims=True)
    for i in rows:
        own = scores[:, label[i]]
        members = [j for j in rows if label[j] == label[i]]
        first.append(np.mean([np.log(np.exp(own).sum()) - own[j] for j in members]))
        similar = unit @ unit[i] / temperature
        others = [j for j in rows if j != i]
        partners = [j for j in others if label[j] == label[i]]
        if partners:
            total = np.log(np.exp(similar[others]).sum())
            second.append(np.mean([total - similar[j] for j in partners]))
    return float(np.mean(first)), float(np.mean(second))


def test_both_losses_are_the_paper_s_and_so_are_their_gradients():
    torch.manual_seed(0)
    label = torch.tensor([0, 1, 1, 2, 0, 1, 3])
    scores, projections = (torch.randn(7, width, dtype=torch.float64) for width in (5, 4))
    first, second = by_hand(scores.numpy(), projections.numpy(), label.tolist(), 0.3)
    assert contrastive_cross_entropy(scores, label).item() == pytest.approx(first)
    assert categorical_contrastive(projections, label, 0.3).item() == pytest.approx(second)
    for tensor in (scores, projections):
        tensor.requires_grad_(True)
    check = torch.autograd.gradcheck
    assert check(lambda x: contrastive_cross_entropy(x, label), (scores,))
    assert check(lambda x: categorical_contrastive(x, label, 0.3), (projections,))
    alone = torch.arange(7)
    assert categorical_contrastive(projections, alone, 0.3).item() == 0.0


def test_cosines_are_float32_under_autocast():
    """They are divided by a small temperature, which makes a bfloat16 product's errors large."""
    projections, label = torch.randn(16, 32), torch.arange(16) % 4
    exact = categorical_contrastive(projections, label, 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(categorical_contrastive(projections, label, 0.02), exact)


@EACH
def test_the_penalty_is_of_the_features_that_the_loss_has_used(kind):
    task, rows = classified(KINDS[kind])
    batch = take(rows, range(8))
    used = bi_tuning(classifier=0.5, projector=2.0, temperature=0.3, width=6)
    wrapped = used.wrap(task).eval()
    wrapped(batch)
    value = used.penalty(wrapped, batch, {})
    with torch.no_grad():
        pooled = task.backbone(batch).pooled
        scores = task.objective.predict(task.backbone, batch)["scores"].double().numpy()
        projections = wrapped.added(pooled).double().numpy()
    first, second = by_hand(scores, projections, batch["label"].tolist(), 0.3)
    assert value.item() == pytest.approx(0.5 * first + 2.0 * second, rel=1e-4)
    value.backward()
    given = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"added.weight", "objective.head.weight"} <= given
    assert any(name.startswith("backbone.") for name in given)


@EACH
def test_rows_of_a_class_come_together_and_the_projection_is_dropped(kind):
    """More so than by the task's own loss alone."""
    found = []
    for weight in (0.0, 1.0):
        task, rows = classified(KINDS[kind])
        names, batch = list(task.state_dict()), take(rows, range(8))
        used = bi_tuning(classifier=weight, projector=weight)
        torch.manual_seed(0)
        run = make_run(
            rows, used.wrap(task), steps=10, technique=used, global_batch=8, lr=1e-3, keep="last"
        )
        loop.fit(run)
        assert list(run.task.layers())[-2:] == ["adaptation", "head"]
        ended = used.finish(run.task).eval()
        assert type(ended) is Task and list(ended.state_dict()) == names
        assert not ended.backbone._forward_hooks
        with torch.no_grad():
            pooled = ended.backbone(batch).pooled
            found.append(categorical_contrastive(pooled, batch["label"], 0.3).item())
    assert found[1] < found[0]


def trained(ranks: Ranks) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after a run."""
    used = bi_tuning(width=8)
    torch.manual_seed(5)
    task = used.wrap(net_task())
    before = weights(task)
    loop.fit(make_run(image_rows(32), task, steps=5, technique=used, global_batch=8, ranks=ranks))
    return before, weights(task)


def test_a_rank_without_rows_takes_part():
    """A batch without rows may hold no tensors at all."""
    used = bi_tuning(width=8)
    task = used.wrap(net_task())
    empty = Batch(np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64), {})
    value = used.penalty(task, empty, {})
    assert value.item() == 0.0


@pytest.mark.slow
def test_two_ranks_give_the_weights_of_one(team):
    (_, first), (_, second) = team(trained)
    before, one = trained(Ranks())
    assert furthest(before, one) > 1e-4
    assert furthest(first, second) == 0.0 and furthest(first, one) < 1e-5


def test_rows_need_a_single_class():
    labels = OBJECTIVES["multilabel"].build("multilabel").task
    with pytest.raises(ValueError, match="a row of multilabel has no single one: use it with cl"):
        bi_tuning().wrap(labels)
    mixing = net_task()
    mixing.objective.options = mixing.objective.options.model_copy(update={"mixup": 0.2})
    with pytest.raises(ValueError, match="bi_tuning needs the class of a row, and the options mix"):
        bi_tuning().wrap(mixing)
