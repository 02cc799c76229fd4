"""Words of any script, and what compares texts by them."""

import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from toys import text_modality

from pipeline.core.contracts import BaselineRows
from pipeline.media import minhash
from pipeline.media.words import WORD
from pipeline.transfer.baselines.bag_of_words import BagOfWords, BagOfWordsOptions
from pipeline.transfer.baselines.tag_of_word import TagOfWord

REVIEW = "這部電影的節奏很好，演員也很有感情，我和朋友都看得很開心，結局讓人意外，值得再看一次。"
NEAR = minhash.MinHashSearch(0.8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3.5m², x_y!", ["It", "s", "3", "5m²", "x_y"]),
        ("Straße, café; 한국어 문장", ["Straße", "café", "한국어", "문장"]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा"]),
        (
            "caf\N{LATIN SMALL LETTER E}\N{COMBINING ACUTE ACCENT}",
            ["cafe\N{COMBINING ACUTE ACCENT}"],
        ),
        ("很好看 iPhone15", ["很", "好", "看", "iPhone15"]),
        ("データ、です", ["デ", "ー", "タ", "で", "す"]),
        ("ดีมาก", ["ด", "ี", "ม", "า", "ก"]),
    ],
)
def test_words_of_several_scripts(text, words):
    assert WORD.findall(text) == words


def test_words_of_scripts_with_spaces_are_runs_of_letters():
    text = Path(__file__).parents[2].joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    assert WORD.findall(text) == re.findall(r"\w+", text)


def similarity(one: str, other: str) -> tuple[float, bool]:
    """The estimated Jaccard similarity of two texts, and whether they are near duplicates."""
    signatures = [{"minhash": s[None, None]} for s in minhash.signatures(iter([one, other]))]
    return (
        float(np.mean(signatures[0]["minhash"] == signatures[1]["minhash"])),
        bool(NEAR.alike(*signatures)[0]),
    )


def test_near_duplicates_are_found_in_chinese():
    """A clause without spaces is no single word."""
    text = REVIEW + REVIEW[::-1] + "".join(sorted(REVIEW))
    changed = text.replace("意外", "驚訝", 1)
    shared = minhash.shingles(text) & minhash.shingles(changed)
    jaccard = len(shared) / len(minhash.shingles(text) | minhash.shingles(changed))
    estimate, is_near = similarity(text, changed)
    assert jaccard > 0.85 and abs(estimate - jaccard) < 0.12 and is_near
    assert similarity(REVIEW, "".join(sorted(REVIEW)))[0] < 0.1


def test_composed_and_decomposed_letters_are_one_text():
    text = "Über die schönsten Gärten und Häuser der Städte erzählt dieser Führer für Gäste"
    decomposed = unicodedata.normalize("NFD", text)
    assert similarity(text, decomposed) == (1.0, True)
    rows = BaselineRows(2, {}, text_modality(), {"text": pa.array([text, decomposed])}.get)
    one, other = BagOfWords(BagOfWordsOptions()).inputs(rows)
    assert one == other == text
    column = {"text": pa.array([text.split(), decomposed.split()])}
    positions = [np.ones(len(text.split()), dtype=bool)] * 2
    words = TagOfWord(TagOfWord.options_class()).inputs(
        BaselineRows(2, {}, text_modality(), column.get, positions)
    )
    assert words == text.split() * 2


def test_prepared_folders_know_the_rule_by_which_words_are_cut():
    """Where this signature changes, raise `minhash.VERSION`."""
    (signature,) = minhash.signatures(iter([f"It's 3.5m², Café! {REVIEW} हिन्दी में ดีมาก"]))
    assert (minhash.VERSION, zlib.crc32(signature.tobytes())) == (2, 1920288095)


@pytest.mark.parametrize("language", ["chinese", "hindi"])
def test_a_bag_of_words_knows_a_word_inside_a_sentence(language):
    good, bad = {"chinese": ("這很好看。", "這難看。"), "hindi": ("यह अच्छी", "यह अच्छा")}[language]
    one = BagOfWords(BagOfWordsOptions(words=1))
    words = one.transformer()
    found = words.fit_transform([good, bad])
    assert (found[0] != found[1]).nnz
    name = {"chinese": "好", "hindi": "अच्छी"}[language]
    assert name in words.vocabulary_
