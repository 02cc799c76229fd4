"""Entities against seqeval on random taggings, broken ones too; answers against the rule of SQuAD's
official scripts.
"""

import re
import string
from collections import Counter

import numpy as np
import pytest
import seqeval.metrics as theirs
import seqeval.metrics.sequence_labeling as conll
from seqeval.scheme import IOB2, IOBES, Entities
from torchmetrics.functional.text.squad import (
    _compute_exact_match_score,
    _compute_f1_score,
    _normalize_text,
)

from pipeline.core.metrics.catalog import metric
from pipeline.media import tagging_schemes
from pipeline.media.tagging_schemes import Tagset

TYPES = ("loc", "org-unit", "person")
SETS = {
    scheme: Tagset.of([f"{letter}-{kind}" for letter in letters for kind in TYPES], scheme)
    for scheme, letters in tagging_schemes.LETTERS.items()
}
SCHEMES = pytest.mark.parametrize("scheme", ["bio", "bioes"])
STRICT = {"bio": IOB2, "bioes": IOBES}


def taggings(scheme: str, n: int, seed: int, kept: float = 0.5) -> np.ndarray:
    """(n, 12) tag numbers of rows of 1 to 12 words, any tag after any other; the share ``kept`` of
    the rows is then written by the rules.
    """
    rng, tagset = np.random.default_rng(seed), SETS[scheme]
    outside = rng.random((n, 12)) < rng.random((n, 1))
    tags = np.where(outside, 0, rng.integers(0, len(tagset.labels), (n, 12)))
    tags[np.arange(12) >= rng.integers(1, 13, n)[:, None]] = -1
    whole = rng.random(n) < kept
    tags[whole] = tagset.repaired(tags[whole])
    return tags


def named(tags: np.ndarray, scheme: str) -> list[list[str]]:
    return [[SETS[scheme].labels[k] for k in row if k >= 0] for row in tags]


def guesses(truth: np.ndarray, scheme: str, seed: int, wrong: float = 0.3) -> np.ndarray:
    other = taggings(scheme, len(truth), seed + 1000, kept=0.0)
    changed = np.random.default_rng(seed).random(truth.shape) < wrong
    return np.where(truth < 0, -1, np.where(changed, np.maximum(other, 0), truth))


# ---------------------------------------------------------------- entities


@SCHEMES
@pytest.mark.parametrize("strict", [False, True])
def test_counts_equal_seqeval_on_200_random_taggings(scheme, strict):
    """Sets of rows one by one, so that 200 scores are compared: micro, and of each type by
    itself.
    """
    words = {"mode": "strict", "scheme": STRICT[scheme]} if strict else {}
    tagset, scored = SETS[scheme], 0
    for seed in range(200):
        truth = taggings(scheme, 3, seed)
        guess = guesses(truth, scheme, seed)
        hits, guessed, actual = tagset.counts(guess, truth, strict)
        assert hits.shape == (3, 3) and (hits <= np.minimum(guessed, actual)).all()
        y, p = named(truth, scheme), named(guess, scheme)
        if not (guessed.sum() and actual.sum()):
            continue
        scored += 1
        found = {"hits": hits, "guessed": guessed, "actual": actual}
        assert hits.sum() / guessed.sum() == pytest.approx(
            theirs.precision_score(y, p, zero_division=0, **words), abs=1e-12
        )
        assert hits.sum() / actual.sum() == pytest.approx(
            theirs.recall_score(y, p, zero_division=0, **words), abs=1e-12
        )
        assert metric("entity_f1").value(found) == pytest.approx(
            theirs.f1_score(y, p, zero_division=0, **words), abs=1e-12
        )
        there = [k for k in range(3) if guessed[:, k].any() or actual[:, k].any()]
        each = [metric(f"entity_f1/{TYPES[k]}", TYPES).value(found) for k in there]
        assert each == pytest.approx(
            theirs.f1_score(y, p, average=None, zero_division=0, **words), abs=1e-12
        )
    assert scored > 150


@SCHEMES
def test_entities_are_seqeval_s_one_by_one(scheme):
    tags = taggings(scheme, 300, 7, kept=0.3)
    for strict in (False, True):
        row, first, last, kind = SETS[scheme].chunks(tags, strict)
        ours = [
            [
                (SETS[scheme].types[k], f, e)
                for r, f, e, k in zip(row, first, last, kind, strict=True)
                if r == i
            ]
            for i in range(len(tags))
        ]
        rows = named(tags, scheme)
        if strict:
            want = [
                [(e.tag, e.start, e.end - 1) for e in found]
                for found in Entities(rows, STRICT[scheme]).entities
            ]
        else:
            want = [[(kind, f, e) for kind, f, e in conll.get_entities(one)] for one in rows]
        assert ours == want


@SCHEMES
def test_a_row_keeps_the_scheme_when_repairing_changes_nothing(scheme):
    tags, tagset = taggings(scheme, 400, 3, kept=0.2), SETS[scheme]
    again = tagset.repaired(tags)
    good = [not tagging_schemes.check(row, scheme) for row in named(tags, scheme)]
    assert good == (again == tags).all(1).tolist() and 100 < sum(good) < 300
    assert not any(tagging_schemes.check(row, scheme) for row in named(again, scheme))
    # The entities are the same
    assert all(
        np.array_equal(a, b) for a, b in zip(tagset.chunks(again), tagset.chunks(tags), strict=True)
    )
    # And now they are whole
    assert all(
        np.array_equal(a, b)
        for a, b in zip(tagset.chunks(again, strict=True), tagset.chunks(tags), strict=True)
    )
    assert np.array_equal(again < 0, tags < 0)


def test_iob1_is_read_as_bio():
    """The files of CoNLL-2003: B- only where an entity of the same type stands just before."""
    tagset = Tagset.of(["I-PER", "B-PER", "I-ORG"], "bio")
    tags = ["I-PER", "I-PER", "B-PER", "I-ORG", "O", "I-ORG"]
    again = tagset.repaired(np.array([[tagset.labels.index(tag) for tag in tags]]))
    assert [tagset.labels[k] for k in again[0]] == [
        "B-PER",
        "I-PER",
        "B-PER",
        "B-ORG",
        "O",
        "B-ORG",
    ]


@pytest.mark.parametrize(
    ("scheme", "tags", "reason"),
    [
        ("bio", "O B-a I-a B-a O", ""),
        ("bio", "", ""),
        ("none", "NOUN I-a", ""),
        ("bioes", "B-a I-a E-a S-b O", ""),
        ("bioes", "S-a S-a", ""),
        ("bio", "I-a O", "tag I-a of word 0 has no B-a before it (it is the first word)"),
        ("bio", "B-a O I-a", "tag I-a of word 2 has no B-a before it (word 1 is O)"),
        ("bio", "B-a I-b", "tag I-b of word 1 has no B-b before it (word 0 is B-a)"),
        ("bioes", "O E-a", "tag E-a of word 1 has no B-a before it (word 0 is O)"),
        ("bioes", "S-a I-a E-a", "tag I-a of word 1 has no B-a before it (word 0 is S-a)"),
        ("bioes", "B-a I-a O", "tag I-a of word 1 opens an entity that no E-a closes (O follows)"),
        ("bioes", "B-a", "tag B-a of word 0 opens an entity that no E-a closes (no word follows)"),
        (
            "bioes",
            "B-a B-a E-a",
            "tag B-a of word 0 opens an entity that no E-a closes (B-a follows)",
        ),
    ],
)
def test_what_breaks_a_scheme_is_named(scheme, tags, reason):
    assert tagging_schemes.check(tags.split(), scheme) == reason


@pytest.mark.parametrize(
    ("tags", "scheme"),
    [
        ("O B-a I-a", "bio"),
        ("B-a O", "bio"),
        ("I-a O", "bio"),
        ("O B-a E-a", "bioes"),
        ("S-a O", "bioes"),
        ("O", "none"),
        ("NOUN VERB O", "none"),
        ("B-a-b I-a/b O", "bio"),
        ("ADJ-x NOUN", "none"),
    ],
)
def test_the_scheme_is_seen(tags, scheme):
    assert tagging_schemes.scheme(tags.split()) == scheme


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("B-a L-a O U-b", "tag 'L-a' is of the scheme BILOU; write it as BIOES"),
        ("B I O", "the tags B, I name no type of entity; write B-TYPE"),
        ("B-a I-a X", "tag 'X' has no prefix of a scheme, 'B-a' has one"),
    ],
)
def test_tags_of_no_scheme_are_reported(tags, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tagging_schemes.scheme(tags.split())


def test_all_tags_of_a_type_are_known():
    assert Tagset.of(["O", "I-b", "B-a"], "bio").labels == ("O", "B-a", "I-a", "B-b", "I-b")
    assert Tagset.of(["S-a"], "bioes") == Tagset(("O", "B-a", "I-a", "E-a", "S-a"), ("a",), "bioes")
    assert Tagset.of(["VERB", "NOUN"], "none") == Tagset(("NOUN", "VERB"), ("NOUN", "VERB"), "none")
    with pytest.raises(
        ValueError,
        match="tag 'E-a' is not of the scheme bio: O, or one of B-, I- followed by a type",
    ):
        Tagset.of(["E-a"], "bio")


def test_without_a_scheme_each_word_is_an_entity():
    tagset = Tagset.of(["A", "B", "C"], "none")
    truth, guess = np.array([[0, 0, 1], [2, 1, -1]]), np.array([[0, 1, 1], [2, -1, -1]])
    hits, guessed, actual = tagset.counts(guess, truth)
    assert (
        hits.tolist() == [[1, 1, 0], [0, 0, 1]]
        and guessed.tolist() == [[1, 2, 0], [0, 0, 1]]
        and actual.tolist() == [[2, 1, 0], [0, 1, 1]]
    )


@SCHEMES
def test_no_words_have_no_entities(scheme):
    for shape in ((0, 4), (2, 0), (2, 4)):
        none = np.full(shape, -1)
        assert all(
            not count.any() and count.shape == (shape[0], 3)
            for count in SETS[scheme].counts(none, none)
        )


# ---------------------------------------------------------------- answers


def official(prediction: str, golds: list[str]) -> tuple[float, float]:
    """The rule of evaluate-v2.0.py, written anew: lower, drop punctuation, articles, spaces; bags
    of words; the best of the golds.
    """

    def words(text):
        kept = re.sub("[" + re.escape(string.punctuation) + "]", "", text.lower())
        return re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", kept).split()

    def f1(guess, gold):
        if not (guess and gold):
            return float(guess == gold)
        left, same = list(gold), 0
        for word in guess:
            if word in left:
                left.remove(word)
                same += 1
        if not same:
            return 0.0
        precision, recall = same / len(guess), same / len(gold)
        return 2 * precision * recall / (precision + recall)

    golds = [gold for gold in golds if words(gold)] or [""]
    return max(float(words(prediction) == words(gold)) for gold in golds), max(
        f1(words(prediction), words(gold)) for gold in golds
    )


PIECES = (
    "the",
    "a",
    "An",
    "cat",
    "Cat,",
    "dog's",
    "dogs",
    "1,000",
    "1000",
    "U.S.",
    "us",
    "—",
    "…",
    "é",
    "É",
    "thé",
    "«x»",
    "x",
    "...",
    "北京",
    "theatre",
    "A's",
    "\t",
    "",
)


def answer(rng) -> str:
    return " ".join(rng.choice(PIECES, rng.integers(0, 6)))


def test_answers_are_scored_by_the_official_rule_on_200_random_pairs():
    rng, scores = np.random.default_rng(0), Counter()
    for _ in range(200):
        prediction, golds = answer(rng), [answer(rng) for _ in range(rng.integers(0, 4))]
        found = tagging_schemes.answer_scores(prediction, golds)
        assert found == pytest.approx(official(prediction, golds), abs=1e-12)
        scores[found[0], 0 < found[1] < 1] += 1
    assert min(scores[0.0, True], scores[0.0, False], scores[1.0, False]) > 10


def test_answers_with_words_are_scored_as_torchmetrics_scores_them():
    """Its SQuAD is the v1.1 script: the same where both sides keep a word."""
    rng, compared = np.random.default_rng(1), 0
    for _ in range(200):
        prediction, gold = answer(rng), answer(rng)
        if _normalize_text(prediction) and _normalize_text(gold):
            compared += 1
            assert tagging_schemes.normalised(prediction) == _normalize_text(prediction)
            assert tagging_schemes.exact_match(prediction, gold) == float(
                _compute_exact_match_score(prediction, gold)
            )
            assert tagging_schemes.answer_f1(prediction, gold) == pytest.approx(
                float(_compute_f1_score(prediction, gold)), abs=1e-6
            )
    assert compared > 100


@pytest.mark.parametrize(
    ("prediction", "golds", "exact", "f1"),
    [
        ("The  U.S. ", ["us"], 1, 1),
        ("a theatre", ["theatre!"], 1, 1),
        ("Anna", ["an na"], 0, 0),
        ("1,000 men", ["1000"], 0, 2 / 3),
        ("", [], 1, 1),
        ("", [""], 1, 1),
        ("x", [], 0, 0),
        ("", ["x"], 0, 0),
        ("the", [], 1, 1),
        ("", ["The", "!"], 1, 1),
        ("", ["The", "cat"], 0, 0),
        ("É", ["é"], 1, 1),
        ("é", ["e"], 0, 0),
        ("“cat”", ["cat"], 0, 0),
        ("cat cat dog", ["cat dog", "bird"], 0, 0.8),
        ("north-east", ["northeast"], 1, 1),
    ],
)
def test_answers_by_hand(prediction, golds, exact, f1):
    assert (
        tagging_schemes.answer_scores(prediction, golds)
        == (exact, pytest.approx(f1))
        == pytest.approx(official(prediction, golds))
    )
