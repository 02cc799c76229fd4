"""Rows of several ranks at hand on each of them: in order, at unequal numbers and with none, and
with the gradient of the whole.
"""

import pytest
import torch
from torch import Tensor

from pipeline.core.nn.all_gather import all_gather_rows, all_reduce_sum
from pipeline.train.ranks import Ranks

ROWS = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def coupled(rows: Tensor) -> Tensor:
    """A loss of all rows that no sum over parts of them gives."""
    flat = rows.flatten(1)
    return (flat @ flat.T).logsumexp(1).sum()


def gathered(ranks: Ranks, cut: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """All rows, where one's own begin, the gradient of the whole loss in one's own, and a sum."""
    mine = (ROWS[:cut] if ranks.rank == 0 else ROWS[cut:]).clone().requires_grad_()
    found, first = all_gather_rows(mine)
    # A rank without rows has nothing to send back, and the other does not wait for it
    if len(mine):
        coupled(found).backward()
    grad = mine.grad if mine.grad is not None else torch.zeros_like(mine)
    return found.detach(), first, grad, all_reduce_sum(mine.sum())


@pytest.mark.parametrize("cut", [3, 6, 0, 7])
def test_every_rank_has_all_rows_and_the_gradient_of_its_own(team, cut):
    whole = ROWS.clone().requires_grad_()
    coupled(whole).backward()
    (rows, first, grad, total), (other, second, rest, same) = team(gathered, cut)
    assert torch.equal(rows, ROWS) and torch.equal(other, ROWS) and (first, second) == (0, cut)
    assert torch.allclose(torch.cat([grad, rest]), whole.grad, atol=1e-12)
    assert torch.equal(total, same) and torch.allclose(total, ROWS.sum())


def nothing(ranks: Ranks) -> tuple[int, ...]:
    return tuple(all_gather_rows(torch.zeros(0, 5))[0].shape)


def test_no_rank_has_a_row(team):
    assert team(nothing) == [(0, 5), (0, 5)]


def test_one_process_has_its_own_rows():
    rows = torch.randn(4, 2, requires_grad=True)
    found, first = all_gather_rows(rows)
    assert found is rows and first == 0
    total = all_reduce_sum(rows.sum())
    assert not total.requires_grad and torch.equal(total, rows.sum().detach())
