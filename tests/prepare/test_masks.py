"""Masks bit by bit as pycocotools draws them."""

import numpy as np
import pytest
from pycocotools import mask as reference

from pipeline.media import instance_masks
from pipeline.prepare.importers import coco

CASES = range(60)


def random_mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 90, 2)
    blocks = rng.random((height // 7 + 1, width // 7 + 1)) < rng.uniform(0, 1)
    return np.kron(blocks, np.ones((7, 7)))[:height, :width].astype(np.uint8)


@pytest.mark.parametrize("seed", CASES)
def test_run_lengths_and_their_compressed_text(seed):
    mask = random_mask(seed)
    packed = reference.encode(np.asfortranarray(mask))
    assert (
        instance_masks.mask_of({"size": list(mask.shape), "counts": packed["counts"]}, *mask.shape)
        == mask
    ).all()
    assert (
        instance_masks.mask_of(
            {"size": list(mask.shape), "counts": packed["counts"].decode()}, *mask.shape
        )
        == mask
    ).all()
    plain = instance_masks.unpacked(packed["counts"]).tolist()
    assert (
        instance_masks.mask_of({"size": list(mask.shape), "counts": plain}, *mask.shape) == mask
    ).all()
    again = reference.frPyObjects(
        {"size": list(mask.shape), "counts": plain}, *map(int, mask.shape)
    )
    assert (reference.decode(again) == mask).all()


@pytest.mark.parametrize("seed", CASES)
def test_polygons(seed):
    """Also those that cross themselves, repeat a point, or reach out of the image."""
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(2, 120, 2))
    polygons = []
    for _ in range(rng.integers(1, 4)):
        points = rng.uniform(-0.2, 1.2, (rng.integers(3, 12), 2)) * (width, height)
        points = points.round(rng.integers(0, 3))
        polygons.append(
            [*points.reshape(-1).tolist(), *(points[0].tolist() if seed % 3 == 0 else [])]
        )
    wanted = reference.decode(reference.merge(reference.frPyObjects(polygons, height, width)))
    assert (instance_masks.mask_of(polygons, height, width) == wanted).all()


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a mask of 30 x 40 pixels for an image of 40 x 30"):
        instance_masks.mask_of({"size": [40, 30], "counts": [1200]}, 30, 40)
    with pytest.raises(ValueError, match="run lengths of 1100 pixels for an image of 1200"):
        instance_masks.mask_of({"size": [30, 40], "counts": [100, 1000]}, 30, 40)
    with pytest.raises(ValueError, match="a polygon of 4 numbers"):
        instance_masks.mask_of([[1, 2, 3, 4]], 30, 40)
    with pytest.raises(ValueError, match="not finite"):
        instance_masks.mask_of([[1, 2, 3, 4, float("nan"), 6]], 30, 40)
    with pytest.raises(ValueError, match="beyond 1048576 pixels"):
        instance_masks.mask_of([[1, 2, 3, 4, 1e12, 6]], 30, 40)
    with pytest.raises(ValueError, match="in the middle of a number"):
        instance_masks.unpacked(b"PSn")
    with pytest.raises(ValueError, match="a character outside ASCII 48 to 111"):
        instance_masks.unpacked(b"PS\x00")
    with pytest.raises(ValueError, match="more than 35 bits"):
        instance_masks.unpacked(b"o" * 20 + b"0")
    with pytest.raises(ValueError, match="run lengths of 5 pixels for an image of 1200"):
        instance_masks.mask_of({"size": [30, 40], "counts": b"5"}, 30, 40)
    with pytest.raises(ValueError, match="run lengths of"):  # their sum wraps around to 1200
        instance_masks.mask_of({"size": [30, 40], "counts": [2**62] * 4 + [1200]}, 30, 40)
    assert not instance_masks.mask_of([], 30, 40).any()


def test_small_objects_lie_over_large_ones_and_all_over_crowds():
    square = [[5, 5, 25, 5, 25, 25, 5, 25]]
    small = [[10, 10, 15, 10, 15, 15, 10, 15]]
    crowd = {"size": [30, 40], "counts": [0, 1200]}
    found = coco.semantic(
        [[7, False, 25.0, small], [3, False, 400.0, square], [1, True, 9.0, crowd]], 0, 30, 40
    )
    assert (found[10:15, 10:15] == 7).all()
    assert found[6, 6] == 3 and found[0, 0] == coco.IGNORED
    assert set(np.unique(found)) == {3, 7, coco.IGNORED}
    assert set(np.unique(coco.semantic([[0, False, 25.0, small]], 1, 30, 40))) == {0, 1}
