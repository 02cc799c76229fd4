"""Transcripts: rules of normalisation, alphabets, edit distances against jiwer's and a plain loop,
subtitles and their names.
"""

import json
import random
import re
import unicodedata

import jiwer
import numpy as np
import pytest

from pipeline.media import transcripts
from pipeline.media.transcripts import Alphabet, Cue

UPPER = transcripts.rules_of("upper", "drop")


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(
        "".join(rng.choice("ab'é") for _ in range(rng.randint(1, 4))) for _ in range(words)
    )


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize(
    ("text", "upper", "kept"),
    [
        ("  Hello,\tworld!\n", "HELLO WORLD", "Hello, world!"),
        ("don’t `stop´", "DON'T 'STOP'", "don't 'stop'"),
        ("twenty-one and/or x_y—z", "TWENTY ONE AND OR X Y Z", "twenty-one and/or x_y—z"),
        ("ﬁve ①", "FIVE 1", "five 1"),
        ("cafe\u0301 £5…", "CAFÉ 5", "café £5..."),
        ("...", "", "..."),
        ("½ cup, 2\u20443 or 4\u22155", "1 2 CUP 2 3 OR 4 5", "1\u20442 cup, 2\u20443 or 4\u22155"),
        ("\ufeffco\u00adop\u200bera\u2060te", "COOPERATE", "cooperate"),
        ("می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष", "می\u200cخواهم क्\u200dष"),
        ("ŉ \uff40a\u1fef", "'N 'A'", "'n 'a'"),
        ("a.\u0301 e\u00ad\u0301", "Á É", "a.\u0301 é"),
        ("ｆｕｌｌ　width", "FULL WIDTH", "full width"),
    ],
)
def test_rules_do_what_their_names_say(text, upper, kept):
    assert transcripts.normalised(text, UPPER) == upper
    assert transcripts.normalised(text, transcripts.rules_of("keep", "keep")) == kept
    assert transcripts.normalised(text, transcripts.rules_of("lower", "drop")) == upper.lower()
    assert transcripts.normalised(upper, UPPER) == upper


@pytest.fixture(scope="module")
def all_characters() -> list[str]:
    """Words of every character, and of random ones side by side, marks and accents more often than
    chance has them. (Surrogates are no text.)
    """
    every = [
        chr(code)
        for code in range(0x110000)
        if not 0xD800 <= code < 0xE000 and unicodedata.category(chr(code)) not in ("Cn", "Co")
    ]
    rng, bounds = (
        random.Random(0),
        ((0x300, 0x370), (0x20, 0x250), (0x370, 0x400), (0x1F00, 0x2070)),
    )
    pools = [every, *([chr(code) for code in range(*pair)] for pair in bounds)]
    return [
        *(f"a{one}b {one}" for one in every),
        *("".join(rng.choice(rng.choice(pools)) for _ in range(6)) for _ in range(10_000)),
    ]


@pytest.mark.parametrize("case", ["upper", "lower", "keep"])
@pytest.mark.parametrize("punctuation", ["drop", "keep"])
def test_rules_applied_twice_give_the_same(case, punctuation, all_characters):
    rules, texts = transcripts.rules_of(case, punctuation), all_characters
    for start in range(0, len(texts), 100):  # together, which takes less time
        once = transcripts.normalised(" ".join(texts[start : start + 100]), rules)
        again = transcripts.normalised(once, rules)
        assert again == once, [
            (word, ascii(word))
            for word, other in zip(once.split(), again.split(), strict=False)
            if word != other
        ][:3]
        assert not set(once) & set("’‘ʼ‛`´")


def test_the_names_of_the_rules_tell_what_was_done():
    assert UPPER == "apostrophe nfkc upper no_punctuation spaces"
    assert transcripts.rules_of("keep", "keep") == "apostrophe nfkc spaces"
    with pytest.raises(
        ValueError, match=r"there is no rule 'shout'; rules are apostrophe, nfkc, upper"
    ):
        transcripts.normalised("a", "nfkc shout")


# ---------------------------------------------------------------- alphabets


def test_characters_are_sorted_behind_the_blank_and_come_back():
    alphabet = Alphabet.of(["BAD CAB", "A'B"])
    assert alphabet.labels == ("<blank>", " ", "'", "A", "B", "C", "D")
    again = Alphabet.from_state(json.loads(json.dumps(alphabet.state())))
    assert (
        again == alphabet
        and again.encode("CAB D").tolist() == [5, 3, 4, 1, 6]
        and again.encode("CAB D").dtype == np.int32
    )
    assert again.decode([1, 5, 3, 4, 1, 1, 6, -1, -1]) == "CAB D"
    assert (
        alphabet.describe_unknown("CAB") == ""
        and alphabet.describe_unknown("É7É CAB")
        == "no training transcript holds '7' (1x), 'É' (2x)"
    )


def test_subwords_come_back_and_are_no_more_than_asked_for():
    rng = random.Random(0)
    texts = [random_text(rng, 6) for _ in range(60)]
    alphabet = Alphabet.of_subwords(texts, 30)
    assert 20 < len(alphabet.labels) <= 30 and alphabet.labels[0] == "<blank>"
    again = Alphabet.from_state(json.loads(json.dumps(alphabet.state())))
    for text in texts:
        labels = again.encode(text)
        assert (
            labels.min() >= 1
            and labels.max() < 30
            and again.decode(labels) == text
            and len(labels) < len(text)
        )
    assert Alphabet.of_subwords(texts, 30).state() == alphabet.state()
    with pytest.raises(
        ValueError,
        match="they hold 5 different characters, so that vocabulary 6 has no room for sub-words: "
        "set vocabulary to 20",
    ):
        Alphabet.of_subwords(texts, 6)


def test_an_alphabet_of_too_many_characters_or_none_is_refused():
    many = ["".join(map(chr, range(0x4E00, 0x4E00 + 501)))]
    with pytest.raises(
        ValueError,
        match=r"501 different characters, more than 500 \(the first ones: '一.*set units: subwords",
    ):
        Alphabet.of(many)
    assert len(Alphabet.of([many[0][1:]]).labels) == 501
    for empty in ([], ["", ""], [" "]):
        with pytest.raises(ValueError, match="they hold no character"):
            Alphabet.of(empty)


@pytest.mark.parametrize("subwords", [False, True])
def test_words_lie_on_the_frames_of_their_letters(subwords):
    alphabet = Alphabet.of_subwords(["AB CAB"] * 9, 10) if subwords else Alphabet.of(["AB CAB"])
    labels = alphabet.encode("AB CAB")
    first = np.arange(len(labels)) * 10
    found = alphabet.words(labels, first, first + 3)
    assert [word for word, *_ in found] == ["AB", "CAB"]
    if not subwords:
        assert found == [("AB", 0, 13), ("CAB", 30, 53)]
    assert found[0][1] == 0 and found[-1][2] == first[-1] + 3 and found[0][2] < found[1][1]
    assert alphabet.words(labels[:0], first[:0], first[:0]) == []


def test_repeats_are_counted():
    assert [
        transcripts.repeats(np.array(row)) for row in ([], [1], [1, 1, 1, 2, 2], [1, 2, 1])
    ] == [0, 0, 3, 0]


# ---------------------------------------------------------------- edit distances


def plain(a, b) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_distances_are_those_of_a_plain_loop_whatever_stands_beside(monkeypatch):
    monkeypatch.setattr(transcripts, "ROWS_AT_ONCE", 16)
    rng = np.random.default_rng(0)
    a, b = ([rng.integers(0, 4, rng.integers(0, 12)) for _ in range(200)] for _ in range(2))
    found = transcripts.edit_distances(a, b)
    assert (
        found.tolist() == [plain(x.tolist(), y.tolist()) for x, y in zip(a, b, strict=True)]
        and found.dtype == np.int64
    )
    assert transcripts.edit_distances([], []).shape == (0,)


def test_word_and_character_error_rates_are_jiwers_on_200_random_pairs():
    rng = random.Random(1)
    right = [random_text(rng, rng.randint(1, 9)) for _ in range(200)]
    said = [
        "" if i % 17 == 0 else right[i] if i % 5 == 0 else random_text(rng, rng.randint(0, 9))
        for i in range(200)
    ]
    found = transcripts.errors(said, right)
    assert found["word_errors"].sum() / found["words"].sum() == jiwer.wer(right, said)
    assert found["char_errors"].sum() / found["chars"].sum() == jiwer.cer(right, said)
    for i in range(200):
        assert found["word_errors"][i] / found["words"][i] == jiwer.wer(right[i], said[i])
        assert found["char_errors"][i] / found["chars"][i] == jiwer.cer(right[i], said[i])
    assert found["words"][0] == found["word_errors"][0] and not found["word_errors"][5]


# ---------------------------------------------------------------- subtitles


def spoken(*words: tuple[str, float, float]):
    return [{"word": word, "start": start, "end": end} for word, start, end in words]


def test_cues_are_short_and_hold_every_word_in_order():
    rng = random.Random(2)
    at, words = 0.0, []
    for i in range(400):
        at += rng.choice([0.0, 0.1, 0.3, 2.0])
        words.append((f"{'x' * rng.choice([1, 5, 11, 50])}{i}", at, at + rng.uniform(0.05, 1.5)))
        at = words[-1][2]
    found = transcripts.cues(spoken(*words))
    assert " ".join(" ".join(cue.lines) for cue in found).split() == [word for word, *_ in words]
    for cue, after in zip(found, [*found[1:], None], strict=True):
        assert (
            0 < cue.end - cue.start <= 7.0
            and len(cue.lines) <= 2
            and (after is None or cue.end <= after.start)
        )
        assert all(len(line) <= 42 or " " not in line for line in cue.lines)
    assert (
        max(len(cue.lines) for cue in found) == 2 and max(cue.end - cue.start for cue in found) > 5
    )


def test_words_of_scripts_without_spaces_are_characters():
    """Else a transcript would be one word, from its beginning to its end."""
    text = "今天 好K歌 ที่นี่"
    alphabet = Alphabet.of([text])
    labels = alphabet.encode(text)
    found = alphabet.words(labels, np.arange(len(text)), np.arange(len(text)))
    assert [word for word, *_ in found] == ["今", "天", "好", "K", "歌", "ที่", "นี่"]
    assert found[1] == ("天", 1, 1) and found[5] == ("ที่", 7, 9)
    words = [(letter, i / 8, i / 8 + 0.125) for i, letter in enumerate("天" * 60)]
    shown = [cue.lines for cue in transcripts.cues(spoken(*words, ("OK", 7.5, 8.0)))]
    assert shown == [("天" * 42, "天" * 14), ("天" * 4 + "OK",)]


def test_words_of_segmented_transcripts_are_what_spaces_separate():
    text = "今天 我 用 K歌"
    alphabet = Alphabet.of([text])
    labels = alphabet.encode(text)
    found = alphabet.words(labels, np.arange(len(text)), np.arange(len(text)), segmented=True)
    assert [word for word, *_ in found] == text.split() and found[0] == ("今天", 0, 1)
    said = spoken(*((word, start / 8, end / 8) for word, start, end in found))
    assert [cue.lines for cue in transcripts.cues(said)] == [(text,)]
    thai = spoken(("น้ำ", 0.0, 0.1), ("ที่", 0.1, 0.2))
    assert [cue.lines for cue in transcripts.cues(thai)] == [("น้ำ ที่",)]


def test_a_pause_ends_a_cue_and_a_short_one_is_shown_for_a_second():
    assert transcripts.cues(spoken(("A", 0.0, 0.2), ("B", 0.5, 0.7), ("C", 9.0, 9.1))) == [
        Cue(0.0, 1.0, ("A B",)),
        Cue(9.0, 10.0, ("C",)),
    ]
    assert transcripts.cues(spoken(("A", 0.0, 0.2), ("B", 1.8, 7.9))) == [
        Cue(0.0, 1.0, ("A",)),
        Cue(1.8, 7.9, ("B",)),
    ]
    slow = spoken(*((letter, 2.0 * i, 2.0 * i + 1) for i, letter in enumerate("ABCDE")))
    assert transcripts.cues(slow) == [Cue(0.0, 7.0, ("A B C D",)), Cue(8.0, 9.0, ("E",))]
    assert transcripts.cues([]) == [] and transcripts.srt([]) == ""


def test_srt_is_written_as_players_read_it():
    text = transcripts.srt([Cue(0.0, 1.5, ("HELLO", "WORLD")), Cue(3599.9996, 7325.25, ("ÉTÉ",))])
    assert (
        text == "1\n00:00:00,000 --> 00:00:01,500\nHELLO\nWORLD\n\n2\n01:00:00,000 --> "
        "02:02:05,250\nÉTÉ\n\n"
    )


@pytest.mark.parametrize(
    ("recordings", "names"),
    [
        (["/a/b/x.wav", "/a/b/y.flac"], ["x.srt", "y.srt"]),
        (["/a/b/x.wav", "/a/b/x.flac", "/a/b/X"], ["X.srt", "x.flac.srt", "x.wav.srt"]),
        (["s3://bucket/d/x.wav", "s3://bucket/e/x.wav"], ["d/x.srt", "e/x.srt"]),
        (["../../etc/passwd", "/etc/passwd", "..\\..\\x"], None),
        (["an255-fash-b", "v1.2 take.3"], ["an255-fash-b.srt", "v1.2 take.3.srt"]),
        (["", "..", "a\nb:c", ".. /x", "\t../y", "... ", "/"], None),
        (["a" * 150 + "1", "a" * 150 + "2"], ["a" * 100 + ".srt", "a" * 100 + "-2.srt"]),
    ],
)
def test_names_of_files_differ_and_never_leave_their_folder(recordings, names):
    found = transcripts.file_names(recordings, ".srt")
    assert set(found) == set(recordings) and len(
        {name.casefold() for name in found.values()}
    ) == len(set(recordings))
    for name in found.values():
        assert (
            name.endswith(".srt")
            and not name.startswith(("/", "."))
            and ".." not in name.split("/")
            and not re.search(r"[\\\x00-\x1f:]", name)
        )
    if names:
        assert sorted(found.values()) == sorted(names)
