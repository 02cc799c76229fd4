"""Which rows are the same and which images nearly so: against references, real images changed, and
real images that only look alike.
"""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn

from pipeline.config import registry
from pipeline.data import duplicates as d
from pipeline.data import manifests as m
from pipeline.data import to_parquet
from pipeline.io import storage
from pipeline.media import perceptual_hash

CLOTHING = Path(d.__file__).parents[2] / "jobs" / "data" / "clothing_48px.parquet"
WITH_DATA = pytest.mark.skipif(
    "ONETOMANY_DATA" not in os.environ, reason="ONETOMANY_DATA names no data folder"
)


ROLES = {"text": ("text", "text_pair"), "audio": ("audio", "start", "seconds")}


def near(rows: d.RowSignatures, others: d.RowSignatures, modality: str = "image") -> np.ndarray:
    return d.near_duplicates(rows, others, modality)


def by_role(modality: str, columns: tuple[str, ...]) -> dict[str, str]:
    roles = ROLES.get(modality) or registry.get("modality", modality).roles
    return dict(zip(roles, columns, strict=False))


@pytest.fixture
def signs(tmp_path):
    """Signs of files, folders or lists of values."""

    def signs(
        of,
        modality: str = "image",
        column: str | tuple[str, ...] = "image",
        form: str = "auto",
        rows: list[int] | None = None,
    ) -> d.RowSignatures:
        if isinstance(of, list):
            number = len(list(tmp_path.glob("made-*")))
            path = tmp_path / f"made-{number}.parquet"
            made = (
                {column: of}
                if isinstance(column, str)
                else dict(zip(column, map(list, zip(*of, strict=True)), strict=True))
            )
            pq.write_table(pa.table(made), path, row_group_size=50)
            of = path
        found = m.build(str(of), form, str(tmp_path / "imports"))
        return d.row_signatures(
            m.Selection(found, None if rows is None else np.array(rows)),
            modality,
            by_role(modality, (column,) if isinstance(column, str) else column),
            str(tmp_path / "signs"),
        )

    return signs


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(data: bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    with PIL.Image.open(io.BytesIO(data)) as image:
        (image if image.mode == "L" else image.convert("RGB")).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def resized(data: bytes, factor: float) -> bytes:
    buffer = io.BytesIO()
    with PIL.Image.open(io.BytesIO(data)) as image:
        (image if image.mode == "L" else image.convert("RGB")).resize(
            (round(image.width * factor), round(image.height * factor)), 3
        ).save(buffer, "PNG")
    return buffer.getvalue()


CHANGES = {
    "jpeg 75": lambda data: jpeg(data, 75),
    "jpeg 90": lambda data: jpeg(data, 90),
    "three quarters": lambda data: resized(data, 0.75),
    "twice, jpeg 75": lambda data: jpeg(resized(data, 2), 75),
}


def real(path: Path, n: int) -> list[bytes]:
    return pq.read_table(path, columns=["image"])["image"].to_pylist()[:n]


# ---------------------------------------------------------------- the hash and the search


def test_the_hash_is_that_of_the_paper():
    """Against SciPy's DCT: frequencies 1 to 8 of both axes, each above the median or not, in the
    order of rows.
    """
    grey = np.random.default_rng(0).integers(0, 256, (20, 32, 32)).astype(np.uint8)
    low = dctn(grey.astype(float), axes=(1, 2), norm="ortho")[:, 1:9, 1:9].reshape(20, 64)
    expected = low > np.median(low, axis=1, keepdims=True)
    found = perceptual_hash.phash(grey)
    assert (
        found.dtype == np.uint64
        and found.shape == (20,)
        and perceptual_hash.phash(grey[:0]).shape == (0,)
    )
    assert (np.unpackbits(found[:, None].view(np.uint8), axis=1).astype(bool) == expected).all()
    assert (expected.sum(1) == 32).all()


def made(hashes, thumbs, first: int) -> d.RowSignatures:
    digests = np.arange(first, first + len(hashes), dtype=np.uint64)
    return d.RowSignatures(
        digests,
        np.ones(len(hashes), bool),
        {"hash": np.array(hashes, np.uint64), "thumb": np.array(thumbs, np.uint8)},
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 1 << 20]))
def test_the_search_finds_what_comparing_all_pairs_finds(seed, pairs):
    """Hashes 0 to 8 bits apart, thumbnails with more or less noise, and some of each twice."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)
    thumbs = rng.integers(0, 256, (40, 256))
    chosen = rng.integers(0, 40, 60)
    flips = np.array(
        [
            sum(1 << int(b) for b in rng.choice(64, rng.integers(0, 9), replace=False))
            for _ in chosen
        ],
        dtype=np.uint64,
    )
    noise = rng.normal(0, 1, (60, 256)) * rng.choice([0, 5, 15, 60], 60)[:, None]
    rows = made(hashes[chosen] ^ flips, np.clip(thumbs[chosen] + noise, 0, 255), 0)
    others = made(hashes, thumbs, 1000)
    apart = np.bitwise_count(rows.near["hash"][:, None] ^ others.near["hash"][None])
    alike = np.corrcoef(rows.near["thumb"], others.near["thumb"])[:60, 60:]
    clear = np.abs(alike - perceptual_hash.NEAR_CORRELATION) > 1e-5
    expected = (apart <= perceptual_hash.NEAR_BITS) & (alike >= perceptual_hash.NEAR_CORRELATION)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(d, "PAIRS", pairs)
        found = near(rows, others)
    assert (found == expected.any(1))[clear.all(1)].all()
    assert found.any() and not found.all(), "both happen"


def test_bands_cover_the_hash_once():
    assert [bit for low, high in perceptual_hash.band_limits() for bit in range(low, high)] == list(
        range(64)
    ) and len(list(perceptual_hash.band_limits())) == perceptual_hash.NEAR_BITS + 1


# ---------------------------------------------------------------- real images


@pytest.mark.parametrize("change", CHANGES)
def test_photos_encoded_or_resized_are_found(signs, change):
    whole = real(CLOTHING, 400)
    photos = signs(whole)
    changed = signs([CHANGES[change](data) for data in whole[:150]])
    assert not d.exact_duplicates(changed, photos).any()
    assert near(changed, photos).mean() >= 0.98
    assert near(changed, signs(whole[150:])).mean() <= 0.01, "others are not taken for them"


def test_photos_that_are_cut_or_mirrored_are_other_ones(signs):
    """Said in the docstring: what the hash does not find."""
    whole = real(CLOTHING, 40)
    with_changes = [
        png(np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))[:, ::-1]) for data in whole
    ]
    assert near(signs(with_changes), signs(whole)).mean() < 0.3


def test_different_photos_are_not_near(signs):
    photos = real(CLOTHING, 2313)
    half = len(photos) // 2
    assert near(signs(photos[:half]), signs(photos[half:])).mean() < 0.003


def neighbours(found: d.RowSignatures) -> np.ndarray:
    """How many other rows each row is near to, by comparing every two."""
    close = (
        np.bitwise_count(found.near["hash"][:, None] ^ found.near["hash"][None])
        <= perceptual_hash.NEAR_BITS
    )
    alike = np.corrcoef(found.near["thumb"]) >= perceptual_hash.NEAR_CORRELATION
    return (close & alike).sum(1) - 1


@pytest.mark.data
@WITH_DATA
@pytest.mark.parametrize(
    ("place", "most"),
    [
        ("healthcare/nih_chestxray14_1000/nih1000.parquet", 0),
        ("healthcare/pneumoniamnist/train.parquet", 10),
    ],
)
def test_xrays_that_look_alike_are_not_near(signs, place, most):
    """Of pneumoniamnist 5 pairs have equal pixels, and no other pair is near; the hash alone takes
    far more for near.
    """
    path = Path(os.environ["ONETOMANY_DATA"]) / place
    found = signs(path)
    assert (neighbours(found) > 0).sum() <= most
    loose = np.bitwise_count(found.near["hash"][:, None] ^ found.near["hash"][None]) <= 6
    assert loose.sum() - len(found) > 10
    variants = signs([CHANGES["jpeg 75"](data) for data in real(path, 200)])
    assert near(variants, found).mean() >= 0.99


# ---------------------------------------------------------------- what is compared


def test_images_are_compared_by_their_bytes_wherever_they_lie(signs, tmp_path):
    rng = np.random.default_rng(0)
    pictures = [png(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)) for _ in range(9)]
    for name, places in (("a", range(6)), ("b", range(4, 9))):
        for i in places:
            (tmp_path / name / "cat").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "cat" / f"{name}{i}.png").write_bytes(pictures[i])
    a, b = (signs(tmp_path / name, form="images") for name in "ab")
    assert (
        d.exact_duplicates(a, b).tolist() == [False] * 4 + [True] * 2
        and d.exact_duplicates(b, a).tolist() == [True] * 2 + [False] * 3
    )
    assert d.exact_duplicates(signs(pictures), a).tolist() == [True] * 6 + [False] * 3, (
        "bytes of a column against files"
    )
    assert (near(a, b) == d.exact_duplicates(a, b)).all()


def test_a_large_image_folder_is_read_on_ray(signs, tmp_path, monkeypatch):
    """Its rows are paths: their bytes say nothing of what there is to decode."""
    for i in range(6):
        (tmp_path / "folder" / "kind").mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / "kind" / f"{i}.png").write_bytes(
            png(np.full((8, 8), 40 * i, np.uint8))
        )
    spread = []
    monkeypatch.setattr(
        d, "map_items", lambda fn, items: spread.append(len(items)) or map(fn, items)
    )
    monkeypatch.setattr(to_parquet, "GROUP_ROWS", 2)
    assert len(signs(tmp_path / "folder", rows=[0, 2, 4])) == 3 and not spread
    monkeypatch.setattr(d, "SPREAD_FILES", 5)
    assert len(signs(tmp_path / "folder")) == 6 and spread == [3]


def test_texts_are_compared_as_texts_and_repeats_count_each(signs, tmp_path):
    source, test = ["a", "b", "b", str(tmp_path), None], ["b", "b", "c", str(tmp_path), None]
    theirs = signs(source, "text", "words")
    assert d.exact_duplicates(signs(test, "text", "words"), theirs).tolist() == [
        True,
        True,
        False,
        True,
        False,
    ], "nothing is no text"
    assert near(signs(test, "text", "words"), theirs, "text").tolist() == [
        True,
        True,
        False,
        True,
        False,
    ]
    path = tmp_path / "made-1.parquet"
    assert d.exact_duplicates(signs(path, "text", "words", rows=[1, 2]), theirs).tolist() == [
        True,
        False,
    ], "of the selected rows alone"
    assert (
        len(signs(path, "text", "words", rows=[])) == 0
        and not d.exact_duplicates(theirs, signs(path, "text", "words", rows=[])).any()
    )


def test_a_text_that_is_not_utf8_is_compared_by_its_bytes(signs):
    """Some writers of Parquet leave Latin-1 in a column of texts."""
    found = []
    for values in ([b"caf\xe9", b"th\xe9", b"tea"], [b"tea", b"caf\xe9", b"milk"]):
        raw = pa.array(values)
        found.append(signs([*pa.StringArray.from_buffers(3, *raw.buffers()[1:])], "text", "words"))
    assert d.exact_duplicates(found[1], found[0]).tolist() == [True, True, False]


def test_pairs_are_the_same_when_both_texts_are(signs):
    both = ("text", "text_pair")
    train = signs([("a cat", "sleeps"), ("a cat", "runs"), ("a", "bc"), (None, "x")], "text", both)
    test = signs([("a cat", "runs"), ("a cat", "eats"), ("ab", "c"), (None, "x")], "text", both)
    assert d.exact_duplicates(test, train).tolist() == [True, False, False, False]


def sound(seed: int, seconds: float = 1.0) -> bytes:
    out = io.BytesIO()
    soundfile.write(
        out,
        np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 8000)),
        8000,
        format="FLAC",
    )
    return out.getvalue()


def test_recordings_are_compared_by_their_bytes_wherever_they_lie(signs, tmp_path):
    sounds = [sound(i) for i in range(9)]
    for name, places in (("a", range(6)), ("b", range(4, 9))):
        for i in places:
            (tmp_path / name / "cat").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "cat" / f"{name}{i}.flac").write_bytes(sounds[i])
    a, b = (signs(tmp_path / name, "audio", "audio", "audio") for name in "ab")
    assert (
        d.exact_duplicates(a, b).tolist() == [False] * 4 + [True] * 2
        and d.exact_duplicates(b, a).tolist() == [True] * 2 + [False] * 3
    )
    assert near(a, b, "audio").tolist() == d.exact_duplicates(a, b).tolist()
    assert (
        d.exact_duplicates(signs(sounds, "audio", "audio"), a).tolist() == [True] * 6 + [False] * 3
    ), "bytes of a column against files"
    structs = [
        {"bytes": sounds[0], "path": "elsewhere"},
        {"bytes": None, "path": str(tmp_path / "a/cat/a3.flac")},
        {"bytes": b"x", "path": "y"},
        None,
        {"bytes": None, "path": None},
    ]
    found = signs(structs, "audio", "audio")
    assert (
        d.exact_duplicates(found, a).tolist() == [True, True, False, False, False]
        and found.readable.tolist() == [True] * 3 + [False] * 2
    )
    (tmp_path / "a/cat/a3.flac").unlink()
    with pytest.raises(storage.StorageError, match=r"a3\.flac"):
        signs([*structs[:2], *structs[:2]], "audio", "audio")


def test_pieces_of_one_recording_are_rows_of_their_own(signs, tmp_path, monkeypatch):
    path, long = tmp_path / "long.flac", sound(1, 4.0)
    path.write_bytes(long)
    columns = ("audio", "from", "long")

    def made(*rows):
        pq.write_table(
            pa.table(
                {
                    name: pa.array([row[i] for row in rows], kind)
                    for i, (name, kind) in enumerate(
                        zip(columns, (None, pa.float64(), pa.float64()), strict=True)
                    )
                }
            ),
            tmp_path / "p.parquet",
        )
        return signs(tmp_path / "p.parquet", "audio", columns)

    opened, real = [], storage.open_read
    monkeypatch.setattr(storage, "open_read", lambda uri: opened.append(uri) or real(uri))
    theirs = made((str(path), 0.0, 1.0), (str(path), 1.0, 1.5), (str(path), 2.5, None))
    assert opened.count(str(path)) == 1 + 3, (
        "each file is read whole once a row group, and each piece is decoded"
    )
    assert len({*theirs.digest.tolist()}) == 3
    assert d.exact_duplicates(
        made(
            (long, 0.0, 1.0),
            (long, 1.0, 1.0),
            (long, 2.5, None),
            (long, None, 1.0),
            (sound(2, 4.0), 0.0, 1.0),
        ),
        theirs,
    ).tolist() == [True, False, True, False, False]
    whole = signs([long], "audio", "audio")
    assert d.exact_duplicates(
        made(
            (str(path), None, None),
            (str(path), 0.0, 4.0),
            (str(path), 0.0, None),
            (str(path), float("nan"), 3.0),
            (str(path), 0.0, 3.0),
        ),
        whole,
    ).tolist() == [True] * 4 + [False], "all of a recording is the recording"


def test_images_that_cannot_be_read_or_show_nothing_are_near_to_none(signs):
    grey, dark = (png(np.full((16, 16), level, np.uint8)) for level in (128, 3))
    broken = [b"no image", b"", None]
    mine = signs([grey, dark, *broken])
    assert mine.readable.tolist() == [True, True, True, False, False]
    assert near(mine, signs([jpeg(grey, 80), b"another one", b"", None])).tolist() == [False] * 5, (
        "flat ones have nothing to compare"
    )
    assert d.exact_duplicates(mine, mine).tolist() == [True, True, True, False, False]
    assert near(mine, signs([grey])).tolist() == [True, False, False, False, False]


def test_rows_are_read_once_and_again_when_they_change(signs, tmp_path, monkeypatch):
    path, whole = tmp_path / "rows.parquet", real(CLOTHING, 120)
    pq.write_table(pa.table({"image": whole}), path, row_group_size=50)
    # As a Ray task gets it
    there = pickle.loads(
        pickle.dumps(
            d.SignatureMaker(
                m.Selection(m.build(str(path), "auto", "")), "image", {"image": "image"}
            )
        )
    )
    assert (there((50, 100))["near_hash"] == signs(whole[50:100]).near["hash"]).all()
    calls, work = [], d.SignatureMaker.__call__
    monkeypatch.setattr(
        d.SignatureMaker, "__call__", lambda self, span: calls.append(span) or work(self, span)
    )
    first, again = signs(path), signs(path)
    assert calls == [(0, 50), (50, 100), (100, 120)], "row group by row group"
    for name in ("digest", "readable"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert {*first.near} == {"hash", "thumb"}
    assert all((first.near[name] == again.near[name]).all() for name in first.near)
    signs(path, rows=[3, 110])
    assert calls[3:] == [(0, 1), (1, 2)]
    pq.write_table(pa.table({"image": whole[::-1]}), path, row_group_size=120)
    assert (signs(path).digest == first.digest[::-1]).all() and len(calls) == 6


def test_records_are_the_same_by_all_their_events_and_those_without_any_are_no_twins(
    signs, tmp_path
):
    times, names = (
        [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [], []],
        [["a", "b"], ["a", "b"], ["a", "b"], [], []],
    )
    table = pa.table(
        {"times": times, "variables": names, "values": [[1.0, 2.0], [1.0, 2.0], [1.0, 3.0], [], []]}
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    found = signs(tmp_path / "rows.parquet", "events", ("times", "variables", "values"))
    assert found.digest[0] == found.digest[1] != found.digest[2] and found.readable.tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_numbers_stored_in_another_width_are_the_same(tmp_path):
    """0.1 as a double is another number than 0.1 as a float, and 12 another text than 12.0."""
    found = []
    for number, (kind, id_kind) in enumerate(
        [(pa.float64(), pa.int64()), (pa.float32(), pa.float64())]
    ):
        lists = pa.large_list(kind) if number else pa.list_(kind)
        times = pa.array([[0.1, 2.3], [0.1, 5.0]], lists)
        table = pa.table(
            {
                "times": times,
                "variables": [["a", "b"], ["a", "c"]],
                "values": pa.array([[0.7, 1.1], [0.3, 0.3]], lists),
                "entity": pa.array([12, 13], pa.int64()).cast(id_kind),
            }
        )
        if number:  # the second record was cut
            table = table.set_column(0, "times", pa.array([[0.1, 2.3], [0.1]], lists))
            table = table.set_column(1, "variables", pa.array([["a", "b"], ["a"]])).set_column(
                2, "values", pa.array([[0.7, 1.1], [0.3]], lists)
            )
        path = tmp_path / f"{number}.parquet"
        pq.write_table(table, path)
        rows = m.Selection(m.build(str(path), "auto", str(tmp_path)))
        found.append(
            d.row_signatures(
                rows,
                "events",
                by_role("events", ("times", "variables", "values")),
                str(tmp_path / "signs"),
                record="entity",
            )
        )
    assert d.exact_duplicates(*found).tolist() == [True, False]
    assert d.same_record(*found).tolist() == [True, True]


def test_lists_of_lists_of_doubles_are_those_of_floats(signs):
    assert d.with_canonical_numbers(pa.list_(pa.list_(pa.float64()))) == pa.large_list(
        pa.large_list(pa.float32())
    )
    assert d.with_canonical_numbers(pa.list_(pa.int64())) == pa.large_list(pa.float64())
    assert d.with_canonical_numbers(pa.string()) is None
    nested = pa.table({"a": pa.array([[[0.1]], None], pa.list_(pa.list_(pa.float64(), 1)))})
    assert d.canonical_numbers(nested, ("a",))["a"].to_pylist() == [
        [[float(np.float32(0.1))]],
        None,
    ]


def test_missing_numbers_are_the_same_as_nan_and_as_null(signs):
    nan = float("nan")
    rows = [{"x": [[1.0, None], None, []], "y": None}, None, {"x": None, "y": 2.0}]
    with_nan = [{"x": [[1.0, nan], None, []], "y": nan}, None, {"x": None, "y": 2.0}]
    table = pa.table({"a": with_nan}).slice(0, 3)
    assert d.canonical_numbers(table, ("a",))["a"].to_pylist() == rows
    assert d.canonical_numbers(table.slice(1), ("a",))["a"].to_pylist() == rows[1:]
    one, other = [[1.0, None], None, [2.0]], [[1.0, np.nan], None, [3.0]]
    found = [signs(rows, "series", "signal") for rows in (one, other)]
    assert d.exact_duplicates(*found).tolist() == [True, False, False]


def test_rows_of_tables_are_the_same_in_any_order_and_type_of_their_fields(tmp_path):
    here = pa.array(
        [{"age": 12, "dose": 0.1, "sex": "f"}, {"age": 12, "dose": 0.2, "sex": "f"}],
        pa.struct([("age", pa.int64()), ("dose", pa.float64()), ("sex", pa.string())]),
    )
    there = pa.array(
        [{"sex": "f", "dose": 0.1, "age": 12.0}, {"sex": "m", "dose": 0.2, "age": 12.0}],
        pa.struct([("sex", pa.string()), ("dose", pa.float32()), ("age", pa.float64())]),
    )
    found = []
    for name, column in (("here", here), ("there", there)):
        pq.write_table(pa.table({"features": column}), tmp_path / f"{name}.parquet")
        rows = m.Selection(m.build(str(tmp_path / f"{name}.parquet"), "auto", str(tmp_path)))
        columns = {"features": "features"}
        found.append(d.row_signatures(rows, "table", columns, str(tmp_path / "signs")))
    assert d.exact_duplicates(*found).tolist() == [True, False]
    assert near(*found, "table").tolist() == [True, False], "tables have no near rows"


# ---------------------------------------------------------------- nearly the same


WORDS = [f"word{i}" for i in range(400)]


def article(seed: int, length: int = 120) -> list[str]:
    return np.random.default_rng(seed).choice(WORDS, length).tolist()


def test_texts_with_a_word_changed_are_near_and_other_texts_are_not(signs):
    whole = [article(seed) for seed in range(40)]
    source = signs([" ".join(words) for words in whole], "text", "text")
    changed = [" ".join([*words[:60], "OTHER,", *words[61:]]).upper() for words in whole]
    half = [" ".join([*words[:60], *article(100 + i, 60)]) for i, words in enumerate(whole)]
    mine = signs([*changed, *half, None, ""], "text", "text")
    assert not d.exact_duplicates(mine, source).any()
    assert near(mine, source, "text").tolist() == [True] * 40 + [False] * 42


def test_pairs_of_texts_are_near_when_both_are(signs):
    """A paragraph with another question is another row."""
    first, second = " ".join(article(1)), " ".join(article(2))
    source = signs([(first, second)], "text", ("text", "text_pair"))
    rows = [(first + ".", second.upper()), (first, " ".join(article(3)))]
    assert near(signs(rows, "text", ("text", "text_pair")), source, "text").tolist() == [
        True,
        False,
    ]


def tune(seed: int) -> np.ndarray:
    """Return two seconds of notes of random pitch and length at 16 kHz."""
    draw = np.random.default_rng(seed)
    ends = np.sort(draw.integers(0, 32000, 7))
    pitch = np.repeat(draw.uniform(200, 3000, 8), np.diff([0, *ends, 32000]))
    return 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16000)


def written(samples: np.ndarray, rate: int = 16000, form: str = "WAV", **how) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, **how)
    return out.getvalue()


def test_recordings_stored_anew_are_near_and_others_are_not(signs):
    tunes = [tune(seed) for seed in range(12)]
    source = signs([written(one) for one in tunes], "audio", "audio")
    changed = {
        "compressed": [written(one, form="OGG", subtype="VORBIS") for one in tunes],
        "softer": [written(one / 4) for one in tunes],
        "half the rate": [written(one[::2], 8000) for one in tunes],
    }
    for what, recordings in changed.items():
        mine = signs(recordings, "audio", "audio")
        assert not d.exact_duplicates(mine, source).any()
        assert near(mine, source, "audio").all(), what
    others = signs([written(tune(100 + seed)) for seed in range(12)], "audio", "audio")
    silent = signs([written(np.zeros(16000)), b"no sound"], "audio", "audio")
    assert not near(others, source, "audio").any()
    assert not near(silent, signs([written(np.zeros(20000))], "audio", "audio"), "audio").any()
