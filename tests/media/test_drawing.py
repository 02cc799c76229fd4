"""Boxes and masks on pictures: where their colours lie, and what is written."""

import io

import numpy as np
import PIL.Image
import pytest

from pipeline.media import drawing


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, dtype=np.uint8)


def test_a_box_is_drawn_at_its_edges_in_the_colour_of_its_class():
    picture = grey(400, 600)
    corners = np.array([[0.25, 0.5, 0.75, 0.9]])
    drawn = drawing.draw_boxes(picture, corners, ["cat 0.90"], [3])
    assert drawn.shape == picture.shape
    middle, edges = drawn[280, 300], [drawn[280, 150], drawn[280, 450], drawn[360, 300]]
    assert middle.tolist() == [100, 100, 100], "what is found stays to be seen"
    assert all(tuple(edge) == drawing.colour(3) for edge in edges)
    assert (drawn[:100] == 100).all() and (picture == 100).all(), "the picture itself is kept"
    caption = drawn[180:199, 150:230].reshape(-1, 3)
    assert (caption == drawing.colour(3)).all(1).any() and (caption < 60).all(1).any()


def test_the_first_box_lies_on_top():
    corners = np.array([[0.2, 0.2, 0.8, 0.8]] * 2)
    drawn = drawing.draw_boxes(grey(500, 500), corners, ["a", "b"], [0, 1])
    assert tuple(drawn[300, 100]) == drawing.colour(0)


def test_boxes_beyond_the_picture_and_no_boxes_are_drawn():
    corners = np.array([[-0.5, -0.5, 1.5, 1.5], [0.5, 0.5, 0.5, 0.5]])
    drawn = drawing.draw_boxes(grey(500, 480), corners, ["all", "point"], [0, 1])
    assert tuple(drawn[499, 240]) != (100, 100, 100)
    nothing = drawing.draw_boxes(grey(500, 480), np.zeros((0, 4)), [], [])
    assert (nothing == 100).all()


def test_a_small_picture_is_enlarged_by_a_whole_number():
    picture = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    drawn = drawing.draw_boxes(picture, np.zeros((0, 4)), [], [])
    assert drawn.shape == (320, 480, 3) and (drawn[::16, ::16] == picture).all()


def test_a_mask_is_half_colour_half_picture_with_a_key_of_its_classes():
    mask = np.zeros((2, 4), dtype=np.uint8)
    mask[:, 3:] = 2
    drawn = drawing.draw_mask(grey(240, 480), mask, ["floor", "wall", "door"])
    for x, number in ((100, 0), (400, 2)):
        expected = 0.5 * 100 + 0.5 * np.array(drawing.colour(number))
        assert drawn[100, x] == pytest.approx(expected, abs=1)
    lines = (drawn.shape[0] - 240) // (drawing.TEXT_PIXELS + 2 * drawing.PADDING)
    assert lines == 2, "wall is not there"
    assert tuple(drawn[250, 5]) == drawing.colour(0) and tuple(drawn[270, 5]) == drawing.colour(2)
    assert (drawn[240:260, 25:].reshape(-1, 3) < 60).all(1).any(), "its name"


def test_many_classes_have_different_colours_and_a_short_key():
    assert len({drawing.colour(number) for number in range(60)}) == 60
    mask = np.arange(100, dtype=np.uint8).reshape(10, 10)
    drawn = drawing.draw_mask(grey(480, 480), mask, [f"class {i}" for i in range(100)])
    lines = (drawn.shape[0] - 480) // (drawing.TEXT_PIXELS + 2 * drawing.PADDING)
    assert lines == drawing.MAX_KEYS + 1


def test_a_picture_becomes_a_file():
    picture = grey(480, 480)
    with PIL.Image.open(io.BytesIO(drawing.jpeg(picture))) as image:
        assert image.format == "JPEG" and abs(np.asarray(image).astype(int) - 100).max() <= 2


def test_a_large_picture_is_made_smaller():
    drawn = drawing.draw_boxes(grey(3000, 2000), np.array([[0.5, 0.0, 1.0, 1.0]]), [""], [0])
    assert drawn.shape == (1600, 1067, 3) and tuple(drawn[800, 536]) == drawing.colour(0)
