"""A part of many rows, without chance."""

from pipeline.core.sampling import evenly_spread


def test_the_first_the_last_and_what_lies_evenly_between():
    assert evenly_spread(9, 3).tolist() == [0, 4, 8]
    assert evenly_spread(3, 9).tolist() == [0, 1, 2]
    assert evenly_spread(5, 1).tolist() == [0]
    assert evenly_spread(0, 4).tolist() == []
