"""What is cut off of texts is counted against plain tokenising, and told where it is much; null
labels are counted.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import image_file, sentences, table_rows, text_modality

from pipeline.config import registry
from pipeline.config.schema import ComponentConfig
from pipeline.core.specs import ModalitySpec
from pipeline.data.manifests import Selection, build
from pipeline.modalities.text import Text
from pipeline.train import fit_components, row_checks


def having(length: int, **options) -> Text:
    made = text_modality()
    return Text(
        type(made.options)(**{**made.options.model_dump(), "length": length, **options}), made.state
    )


def long_texts(rows: int, seed: int = 0) -> list[str]:
    random, plain = np.random.default_rng(seed), sentences(400, seed)[0]
    return [
        " ".join(plain[i] for i in random.integers(0, 400, random.integers(1, 5)))
        for _ in range(rows)
    ]


def tokens(modality: Text, text: str) -> int:
    return len(modality.tokenizer.encode(text, add_special_tokens=False).ids)


def test_a_source_that_knows_little_of_the_rows_is_a_warning_and_one_that_knows_nothing_an_error(
    tmp_path,
):
    """All trials trained without any input, and the verdict was that there is no gain."""
    rows = table_rows(8)
    spec = ModalitySpec("table", rows.modality.options.model_dump(), rows.modality.state)
    objective, columns = registry.get("objective", "classification"), {"features": "features"}

    def selection(name: str, **fields) -> Selection:
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"features": [fields] * 3}), path)
        return Selection(build(str(path), "auto", str(tmp_path / "imports")))

    others = {f"x{i}": 1.0 for i in range(11)}
    few = row_checks.unshared_names(spec, objective, selection("few", Age=1.0, **others), columns)
    assert (
        few[0].is_warning
        and "the source knows only 8.3% of the values in these rows" in few[0].text
    )
    more = {"x0": 1.0, "Age": 1.0}
    found = row_checks.unshared_names(spec, objective, selection("more", **more), columns)
    assert found and not any(one.is_warning for one in found)
    with pytest.raises(
        ValueError, match=r"the source knows none of the values .* age \(did you mean"
    ):
        fit_components.extend_modality(spec, selection("none", age=1.0), objective, columns)


@pytest.mark.parametrize("length", [8, 16, 4096])
def test_tokens_beyond_the_length_are_counted(length):
    modality, texts = having(length), long_texts(60)
    counts = np.array([tokens(modality, text) for text in texts])
    found = modality.unread_text(pa.table({"t": texts}), {"text": "t"})
    beyond = np.maximum(0, counts - (length - 2))
    assert found is not None
    assert found[:5] == (60, np.count_nonzero(beyond), counts.sum(), beyond.sum(), "tokens")


def test_of_pairs_both_texts_share_the_length():
    modality, a, b = having(24), long_texts(60), long_texts(60, 1)
    counts = np.array(
        [tokens(modality, x) + tokens(modality, y) for x, y in zip(a, b, strict=True)]
    )
    found = modality.unread_text(pa.table({"a": a, "b": b}), {"text": "a", "text_pair": "b"})
    assert (
        found is not None
        and found.lost == np.maximum(0, counts - 21).sum()
        and found.units == counts.sum()
    )


def test_words_without_a_place_are_counted():
    modality, rows = having(12), [text.split() for text in long_texts(60)]
    found = modality.unread_text(pa.table({"w": rows}), {"text": "w"})
    arrays, _ = modality.decode(pa.table({"w": rows}), {"text": "w"})
    placed = [int(row.max()) + 1 for row in arrays["words"]]
    assert found is not None and found[:5] == (
        60,
        sum(k < len(row) for k, row in zip(placed, rows, strict=True)),
        sum(map(len, rows)),
        sum(len(row) - k for k, row in zip(placed, rows, strict=True)),
        "words",
    )
    assert found.lost > 0


def test_a_text_of_several_pieces_is_estimated_and_windows_are_never_cut():
    modality, text = having(64), "a grey cat sat there. " * 60_000  # 1.3 MB
    found = modality.unread_text(pa.table({"t": [text]}), {"text": "t"})
    assert (
        found is not None
        and found.units == pytest.approx(tokens(modality, text), rel=0.02)
        and found.lost == found.units - 62
    )
    windowed = having(64, windows=4).unread_text(
        pa.table({"a": ["x"], "b": [text[:4000]]}), {"text": "a", "text_pair": "b"}
    )
    assert windowed is not None and windowed.lost == windowed.cut == 0


def selected(folder, name: str, table: pa.Table) -> Selection:
    pq.write_table(table, folder / f"{name}.parquet")
    return Selection(build(str(folder / f"{name}.parquet"), "auto", str(folder / "imports")))


def test_what_is_cut_is_told_by_split_and_above_one_per_cent_it_is_a_warning(tmp_path):
    texts = ["a cat"] * 400
    train, test = (
        selected(tmp_path, name, pa.table({"t": texts[: -len(extra)] + extra if extra else texts}))
        for name, extra in (("train", []), ("test", ["the cat sat " * 40]))
    )
    modality = having(100)
    both = {"train": train, "test": test}
    (found,) = row_checks.text_findings(modality, both, {"text": "t"}, False)
    assert found.is_warning and found.line("task").startswith(
        "warning: task: texts are cut at length 100, and what lies beyond is never read: test "
    )
    assert "in 1 of 400 rows)" in found.text and "train" not in found.text
    total = modality.unread_text(pa.table({"t": ["the cat sat " * 40]}), {"text": "t"})
    assert total is not None
    (found,) = row_checks.text_findings(having(total.units), {"test": test}, {"text": "t"}, False)
    assert not found.is_warning and "data.modality.text.length" not in found.text
    assert not row_checks.text_findings(having(4000), both, {"text": "t"}, False)
    assert not row_checks.text_findings(modality, both, {"text": "t"}, True), (
        "packed documents lose nothing"
    )


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_the_tokenizer_does_not_know_are_a_warning(tmp_path, packed):
    texts = ["a cat 日本語"] * 40
    rows = {
        name: selected(tmp_path, name, pa.table({"t": column}))
        for name, column in (("train", texts), ("test", ["a cat"] * 40), ("words", [["a", "日"]]))
    }
    modality = having(100)
    share = 3 / tokens(modality, texts[0])
    named = {name: rows[name] for name in ("train", "test")}
    (found,) = row_checks.text_findings(modality, named, {"text": "t"}, packed)
    assert found.is_warning and found.text.startswith(
        "the tokenizer does not know some of the tokens "
        f"(train {100 * share:.1f} %, test 0.0 %) and reads all of them as one token;"
    )
    assert not row_checks.text_findings(modality, {"test": rows["test"]}, {"text": "t"}, packed)
    (found,) = row_checks.text_findings(modality, {"new rows": rows["words"]}, {"text": "t"}, False)
    assert "does not know some of the words (new rows 50.0 %)" in found.text


def test_large_splits_are_estimated_from_some_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(row_checks, "SAMPLE_ROWS", 50)
    rows = selected(tmp_path, "rows", pa.table({"t": ["the cat sat " * 40] * 300}))
    (found,) = row_checks.text_findings(having(100), {"train": rows}, {"text": "t"}, False)
    assert "in 50 of 50 rows, estimated from 50 of 300 rows)" in found.text


@pytest.mark.parametrize(
    ("objective", "columns", "means"),
    [
        ("multilabel", {"labels": "l"}, "a row without any label"),
        ("qa", {"answers": "l"}, "a question that has no answer"),
    ],
)
def test_nulls_that_mean_something_are_counted(tmp_path, objective, columns, means):
    rows = selected(
        tmp_path,
        "rows",
        pa.table({"l": pa.array([["a"], None, [], ["b"], None], pa.list_(pa.string()))}),
    )
    (found,) = row_checks.null_labels(
        registry.get("objective", objective), {"train": rows}, columns
    )
    assert (
        found.text.startswith(f"column l is null in 2 of 5 train rows, which counts as {means}")
        and not found.is_warning
    )
    assert not row_checks.null_labels(
        registry.get("objective", "classification"), {"train": rows}, {"label": "l"}
    )


def png(mask: list[list[int]], kind=np.uint8) -> bytes:
    return image_file(np.array(mask, dtype=kind))


@pytest.mark.parametrize(
    ("masks", "ignore", "told"),
    [
        ([[0, 255], [0, 0]], 255, "hold class 0 alone, beside 255, which is neither"),
        ([[1, 0, 255]], 0, "hold class 1 alone, beside 255, which is neither"),
        ([[255]], 255, "hold no class to learn, beside 255, which is neither"),
        ([[0, 0], None], 255, "hold class 0 alone"),
        ([[0, 255], [1, 255]], 255, ""),
        ([None], 255, ""),
    ],
)
def test_masks_of_one_class_alone_are_a_warning(tmp_path, masks, ignore, told):
    """An object that is written as 255 would be left out, and all of the rest be right."""
    files = [None if mask is None else png([mask]) for mask in masks]
    rows = selected(tmp_path, "rows", pa.table({"m": pa.array(files, pa.binary())}))
    component = ComponentConfig(name="segmentation", options={"classes": 2, "ignore": ignore})
    found = row_checks.doubtful_class_numbers(component, rows, {"image": "i", "mask": "m"})
    assert [one.is_warning for one in found] == [True] * bool(told)
    for one in found:
        assert f"column m: the masks of {len(masks)} training rows {told}" in one.text


@pytest.mark.parametrize(
    ("highest", "kind", "told"),
    [
        (4095, np.uint16, "4095 of 65535: they are read as levels 0 to 16 of 255"),
        (16383, np.uint16, "16383 of 65535: they are read as levels 0 to 64 of 255"),
        (40000, np.uint16, ""),
        (200, np.uint8, ""),
        (0, np.uint16, ""),
    ],
)
def test_images_of_twelve_bits_in_sixteen_are_a_warning(tmp_path, highest, kind, told):
    """They would be nearly black, with 16 levels of the 4096."""
    files = [png([[0, high]], kind) for high in (highest // 2, highest)]
    files = [None, files[1][:50], *files]
    rows = selected(tmp_path, "rows", pa.table({"i": pa.array(files, pa.binary())}))
    component = ComponentConfig(name="image", options={})
    found = row_checks.picture_levels(component, rows, {"image": "i"})
    assert [one.is_warning for one in found] == [True] * bool(told)
    assert all(told in one.text for one in found)


@pytest.mark.parametrize(
    ("names", "labels", "is_told"),
    [
        (["ant", "cat", "bird"], [[1], [2, 1]], True),
        (["ant", "cat", "bird"], [[0], [2, 1]], False),
        ({1: "ant", 2: "cat"}, [[1], [2, 1]], False),
        (["ant", "cat"], [["cat"], ["ant"]], False),
        (None, [[1], [2, 1]], False),
    ],
)
def test_names_that_may_be_numbered_from_1_are_a_warning(tmp_path, names, labels, is_told):
    """Class 3, the last, has no training row here, so that no number is past the end."""
    rows = selected(tmp_path, "rows", pa.table({"l": labels}))
    component = ComponentConfig(name="detection", options={"names": names} if names else {})
    found = row_checks.doubtful_class_numbers(component, rows, {"boxes": "b", "labels": "l"})
    assert [one.is_warning for one in found] == [True] * is_told
    for one in found:
        assert "no training row has class 0 in column l (the lowest is 1): where" in one.text
        assert one.text.endswith("write the number of each name, {1: ant, ...}")


@pytest.mark.parametrize(
    ("metric", "success", "returns", "warned"),
    [
        ("steps", [True, True, False, None], None, "success"),  # it ends where it succeeds
        ("steps", [False, False, True, None], None, None),  # it ends where it falls
        ("steps", [True, True, True, None], [-10.0, -12.0, -50.0, None], "return"),
        ("steps", None, [10.0, 12.0, 50.0, 1.0], None),
        ("steps", None, None, None),
        ("success", [True, True, False, None], None, None),
    ],
)
def test_steps_as_metric_where_better_episodes_are_shorter(
    tmp_path, metric, success, returns, warned
):
    table = {"n": [10, 12, 50, None], "s": success, "r": returns, "n0": [50, 50, 50, 50]}
    present = {name: values for name, values in table.items() if values is not None}
    rows = selected(tmp_path, "rows", pa.table(present))
    columns = {"steps": "n", "success": "s", "return": "r", "random_steps": "n0"}
    columns = {role: name for role, name in columns.items() if table[name] is not None}
    found = row_checks.doubtful_steps(metric, rows, columns)
    assert [finding.is_warning for finding in found] == [True] * bool(warned)
    if warned:
        assert (
            f"those of higher {warned} are shorter (on average 11 steps, the others 50): set "
            in (found[0].text)
        )
