"""Recall of images and texts against torchmetrics, where images have several captions."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate

from pipeline.core.metrics import retrieval
from pipeline.core.metrics.catalog import metric
from pipeline.report import stats

NAMES = [f"{way}_recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)]


def captioned(n=60, noise=1.0, seed=0):
    """Rows of 25 images with up to five captions, ten images without a number, and 40 texts."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 25, n) * 7919
    image[:10] = -1
    text = rng.integers(0, 40, n)
    of_image = rng.normal(size=(n, 6))
    of_text = of_image + noise * rng.normal(size=(n, 6))
    for vectors, numbers in ((of_image, image), (of_text, text)):
        for number in set(numbers.tolist()) - {-1}:
            vectors[numbers == number] = vectors[np.argmax(numbers == number)]
    return {
        "image_embedding": of_image.astype(np.float32),
        "caption_embedding": of_text.astype(np.float32),
        "image_number": image,
        "caption_number": text,
    }


def sides(p, name):
    """Query and candidate of each row, as names, and their vectors."""
    image = [f"row {i}" if one < 0 else one for i, one in enumerate(p["image_number"].tolist())]
    of_image = (image, p["image_embedding"])
    of_text = (p["caption_number"].tolist(), p["caption_embedding"])
    return (of_image, of_text) if name.startswith("image") else (of_text, of_image)


def hits(p, name) -> dict:
    """By query, whether torchmetrics finds a right candidate among the nearest."""
    (queries, query_vectors), (candidates, candidate_vectors) = sides(p, name)
    places = [candidates.index(one) for one in dict.fromkeys(candidates)]
    out = {}
    for row, query in enumerate(queries):
        right = {c for q, c in zip(queries, candidates, strict=True) if q == query}
        target = torch.tensor([candidates[place] in right for place in places])
        scores = torch.from_numpy(candidate_vectors[places] @ query_vectors[row])
        out[query] = float(retrieval_hit_rate(scores, target, top_k=int(name[-1])))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_values_equal_torchmetrics_also_on_resamples(name):
    p = captioned()
    of_query = hits(p, name)
    assert metric(name).value(p) == pytest.approx(np.mean(list(of_query.values())), abs=1e-9)
    assert 0.1 < metric(name).value(p) < 0.95
    counts = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=4)
    queries = sides(p, name)[0][0]
    share = np.array([1 / queries.count(one) for one in queries])
    found = np.array([of_query[one] for one in queries])
    wanted = [(row * share * found).sum() / (row * share).sum() for row in counts]
    values = metric(name).resampled
    assert values is not None
    np.testing.assert_allclose(values(p, counts), wanted, atol=1e-9)
    low, high = stats.interval(metric(name), p, draws=200)
    assert 0 < low < metric(name).value(p) < high < 1


@pytest.mark.parametrize("name", NAMES)
def test_other_captions_of_an_image_and_equal_texts_are_right(name):
    """All vectors of an image and its texts are the same: as single pairs half would be wrong."""
    corners = np.repeat(np.eye(8, dtype=np.float32), 2, axis=0)
    both = {"image_embedding": corners, "caption_embedding": corners}
    numbers, pairs = np.arange(16), np.arange(16) // 2
    of_captions = {**both, "image_number": pairs, "caption_number": numbers}
    of_texts = {**both, "image_number": numbers, "caption_number": pairs}
    assert [metric(name).value(p) for p in (of_captions, of_texts)] == [1.0, 1.0]
    apart = {**both, "image_number": numbers, "caption_number": numbers}
    assert metric(name).value(apart) == (0.0 if name.endswith("1") else 1.0), "ties are not hits"


def test_alike_rows_find_nothing_and_broken_ones_have_no_value(monkeypatch):
    p = captioned()
    same = {**p, **{name: np.ones_like(p[name]) for name in p if name.endswith("embedding")}}
    same["image_number"] = same["caption_number"] = np.arange(60)
    broken = {**p, "caption_embedding": np.full_like(p["caption_embedding"], np.nan)}
    few, none = ({name: array[:n] for name, array in same.items()} for n in (1, 0))
    unit = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    point = np.tile(unit / np.linalg.norm(unit), (60, 1))  # the same product is rounded differently
    wide = {**same, "image_embedding": point, "caption_embedding": point}
    for name in NAMES:
        assert metric(name).value(same) == metric(name).value(wide) == 0
        assert np.isnan([metric(name).value(rows) for rows in (broken, few, none)]).all()
        assert metric(name).higher_is_better and metric(name).fixed_bounds == (0.0, 1.0)
    whole = {name: metric(name).value(p) for name in NAMES}
    monkeypatch.setattr(retrieval, "SCORES_AT_ONCE", 100)
    assert {name: metric(name).value(p) for name in NAMES} == whole
    monkeypatch.setattr(retrieval, "MAX_ROWS", 20)
    some = {name: array[np.linspace(0, 59, 20).astype(int)] for name, array in p.items()}
    found = {name: metric(name).value(p) for name in NAMES}
    assert found == {name: metric(name).value(some) for name in NAMES} != whole
