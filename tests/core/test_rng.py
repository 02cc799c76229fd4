"""Random numbers are pure functions of a key: checked against SplitMix64 in plain integers, and by
their statistics.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import rng

MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


def splitmix(state: int, index: int) -> int:
    """The index-th output (from 1) of SplitMix64 started at ``state``, as in the paper: state +
    index * gamma, then mix13.
    """
    z = (state + index * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mix_of_one_number_is_splitmix64():
    # first outputs of Vigna's splitmix64.c for these seeds; mix drops the lowest bit
    published = {0: 0xE220A8397B1DCDAF, 1234567: 6457827717110365317}
    for seed, output in published.items():
        assert splitmix(seed, 1) == output
        assert rng.mix(seed) == output >> 1


@given(st.lists(INT64, min_size=1, max_size=4), st.lists(INT64, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_mix_is_63_bit_and_depends_on_every_part(a, b):
    assert 0 <= rng.mix(*a) < 1 << 63
    assert (rng.mix(*a) == rng.mix(*b)) == (a == b)


def test_mix_depends_on_the_order_of_its_parts():
    assert rng.mix(1, 2) != rng.mix(2, 1)
    assert rng.mix(0) != rng.mix(0, 0) != rng.mix(0, 0, 0)


@given(st.lists(INT64, min_size=1, max_size=5), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_uniform_equals_splitmix64_in_plain_integers(keys, count, stream):
    got = rng.uniform(torch.tensor(keys, dtype=torch.int64), count, stream)
    want = [
        [(splitmix(key & MASK, k + (stream << 40)) >> 40) / (1 << 24) for k in range(1, count + 1)]
        for key in keys
    ]
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), np.array(want, dtype=np.float32))


@given(
    st.integers(0, 1 << 40),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1000)), min_size=1, max_size=8),
)
@settings(max_examples=100, deadline=None)
def test_row_keys_equal_plain_integers_one_row_at_a_time(seed, pairs):
    rows, epochs = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    keys = rng.row_keys(seed, epochs, rows)
    assert keys.dtype == np.int64
    for key, row, epoch in zip(keys.tolist(), rows.tolist(), epochs.tolist(), strict=True):
        start = rng.mix(seed) + row * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9
        assert key & MASK == splitmix(start, 0)


def test_golden_values():
    """A change of these would change the order of every run in progress: resume would silently read
    other rows.
    """
    assert rng.mix(7, 3) == 8835240932735106016
    assert rng.row_keys(7, np.array([0, 1]), np.array([5, 5])).tolist() == [
        -7662620211709035832,
        -6169271869612216039,
    ]
    keys = torch.tensor([1, -1])
    assert (rng.uniform(keys, 2) * (1 << 24)).long().tolist() == [
        [9505325, 12512141],
        [14997873, 15310840],
    ]


def test_keys_of_rows_and_epochs_never_meet():
    rows, epochs = np.meshgrid(np.arange(20_000), np.arange(10))
    keys = rng.row_keys(3, epochs.ravel(), rows.ravel())
    assert len(np.unique(keys)) == keys.size
    assert not np.isin(rng.row_keys(4, epochs.ravel(), rows.ravel()), keys).any()


def test_numbers_of_a_row_do_not_depend_on_its_batch():
    keys = torch.from_numpy(rng.row_keys(0, np.zeros(100, dtype=np.int64), np.arange(100)))
    whole = rng.uniform(keys, 8)
    assert torch.equal(rng.uniform(keys[37:40], 8), whole[37:40])
    assert torch.equal(rng.uniform(keys.flip(0), 8), whole.flip(0))
    # Asking for fewer numbers gives the same first ones
    assert torch.equal(rng.uniform(keys, 3), whole[:, :3])


def test_streams_are_separate():
    keys = torch.from_numpy(rng.row_keys(0, np.zeros(1000, dtype=np.int64), np.arange(1000)))
    a, b = rng.uniform(keys, 4, stream=0), rng.uniform(keys, 4, stream=1)
    assert not torch.isin(a, b).all()
    # 4000 pairs: standard error 0.016
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.06


def test_uniform_is_uniform_over_rows_and_over_draws():
    scipy = pytest.importorskip("scipy.stats")
    keys = torch.from_numpy(rng.row_keys(11, np.zeros(4096, dtype=np.int64), np.arange(4096)))
    x = rng.uniform(keys, 16).numpy()
    assert x.min() >= 0.0 and x.max() < 1.0
    assert scipy.kstest(x.ravel(), "uniform").pvalue > 1e-3
    # neighbours: the next row's number, the next epoch's, the next draw's
    later = rng.uniform(
        torch.from_numpy(rng.row_keys(11, np.ones(4096, dtype=np.int64), np.arange(4096))), 16
    ).numpy()
    for a, b in ((x[:-1], x[1:]), (x, later), (x[:, :-1], x[:, 1:])):
        # 60,000 pairs: standard error 0.004
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


@pytest.mark.gpu
def test_same_on_a_gpu_as_on_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    keys = torch.from_numpy(rng.row_keys(0, np.zeros(100, dtype=np.int64), np.arange(100)))
    assert torch.equal(rng.uniform(keys.cuda(), 8, 1).cpu(), rng.uniform(keys, 8, 1))
