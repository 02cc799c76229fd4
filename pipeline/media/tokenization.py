"""Tokenizers, trained on a corpus or read from a folder of transformers; texts of any length to ids
within a bounded memory.

A document is a buffer of UTF-8 bytes. Long ones are tokenised in pieces, each cut before a single
space between two characters that are not spaces. BERT's and GPT-2's pre-tokenizers start a new word
there whatever surrounds it, so the ids are those of the whole text. Only 256 KiB without such a
place are cut between two characters, which may change the ids at the cut.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipeline.io import storage

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_ALPHABET, CHARACTER_COVERAGE = 1000, 0.9995
"""A WordPiece vocabulary has this number of the most frequent characters. It has more where fewer
would cover less than this share of the text (SentencePiece's character_coverage), up to half of its
tokens, as in Chinese.
"""
USUAL = {
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "cls": ("[CLS]", "<s>", "<|endoftext|>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>", "<|endoftext|>"),
}
"""Names of the special tokens in BERT's, RoBERTa's and GPT-2's vocabularies; the last one has a
single token for all.
"""
PIECE_BYTES, GROUP_BYTES = 256 << 10, 4 << 20
"""A text is tokenised in pieces of at most the first, and so many bytes at once; a token takes 100
bytes until its id is taken from the tokenizer.
"""
FIRST_BYTES = 4 << 10
"""Smallest size of the first piece where only the first ids of a text are wanted."""
BEGINNINGS = tuple("ĠĉĊċČč")
"""How byte-level BPE writes ASCII white space, with which its tokens start a word."""
SPACES = np.array([code for code in range(0x3001) if chr(code).isspace()], dtype=np.uint32)

Buffer = bytes | memoryview


# ---------------------------------------------------------------- training


def train_tokenizer(texts: list[str], kind: str, vocabulary: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece as BERT's (Devlin et al. 2019) or byte-level BPE as GPT-2's (Radford et al.
    2019).

    Special tokens have ids 0 to 4. A pure function of the texts.
    """
    if kind == "wordpiece":
        return _train_wordpiece(texts, vocabulary, lowercase)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _alphabet(counts: Counter[str], vocabulary: int) -> list[str]:
    """Return the characters that a WordPiece vocabulary knows, the most frequent first."""
    characters = [character for character in counts if not character.isspace()]
    characters.sort(key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in characters])
    needed = (
        int(np.searchsorted(covered, CHARACTER_COVERAGE * covered[-1])) + 1 if characters else 0
    )
    return characters[: max(MIN_ALPHABET, min(needed, vocabulary // 2))]


def _train_wordpiece(texts: list[str], vocabulary: int, lowercase: bool) -> Tokenizer:
    """Train WordPiece in two passes, so that the result does not depend on a hash map.

    tokenizers 0.23 gives continuing characters ("##a") their ids in the order of a hash map,
    another one in every process, and ids break ties between merges. A first pass without merges
    finds these characters; the second starts with them in order.
    """
    normalizer, counts = normalizers.BertNormalizer(lowercase=lowercase), Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    alphabet = _alphabet(counts, vocabulary)
    continuing: list[str] = []
    tokenizer = _wordpiece({}, lowercase)
    for size in (0, vocabulary):
        tokenizer = _wordpiece({}, lowercase)
        tokenizer.train_from_iterator(
            texts,
            trainer=trainers.WordPieceTrainer(
                vocab_size=size,
                special_tokens=[*SPECIALS, *continuing],
                initial_alphabet=alphabet,
                limit_alphabet=len(alphabet),
                show_progress=False,
            ),
        )
        continuing = continuing or sorted(
            token for token in tokenizer.get_vocab() if token.startswith("##") and len(token) == 3
        )
    # The continuing characters are not special tokens of the result
    tokenizer = _wordpiece(tokenizer.get_vocab(), lowercase)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


# ---------------------------------------------------------------- a folder of transformers


def special_ids(tokenizer: Tokenizer, named: dict[str, str] | None = None) -> list[int | None]:
    """Return the ids of pad, unk, cls, sep and mask, in this order.

    Looked up by the names that are given for them, else by the usual ones, else by the name given
    for ``any``; None where none is in the vocabulary.
    """
    named = named or {}
    tried = (
        [*filter(None, [named.get(role)]), *usual, *filter(None, [named.get("any")])]
        for role, usual in USUAL.items()
    )
    ids_of_roles = ((tokenizer.token_to_id(name) for name in names) for names in tried)
    return [next((i for i in ids if i is not None), None) for ids in ids_of_roles]


def from_folder(folder: str) -> tuple[str, int, list[int]]:
    """Read ``tokenizer.json`` as transformers' save_pretrained writes it, from a local folder or
    S3.

    special_tokens_map.json and tokenizer_config.json name the special tokens where these files
    exist; else their usual names do. A tokenizer that declares an end of text and neither cls nor
    sep (GPT-2, Llama) uses it for every special token that it lacks, and its beginning of text for
    cls.

    Returns:
        The tokenizer as JSON without padding and truncation, the size of its vocabulary, and the
        ids of pad, unk, cls, sep and mask.

    Raises:
        ValueError: with the folder and what is missing.
    """
    path = storage.join(folder, "tokenizer.json")
    if not storage.exists(path):
        problem = "no such folder"
        if storage.exists(folder):
            problem = "no tokenizer.json in this folder"
        raise ValueError(
            f"{folder}: {problem}; a tokenizer is a folder with tokenizer.json, as "
            "tokenizer.save_pretrained(FOLDER) of transformers writes it (a fast tokenizer)"
        )
    try:
        tokenizer = Tokenizer.from_str(storage.read_bytes(path).decode())
    except Exception as error:  # the library raises plain Exception for what it cannot read
        if isinstance(error, storage.StorageError):
            raise
        raise ValueError(
            f"{path}: not a tokenizer that the package tokenizers can read: {error}"
        ) from None
    specials = special_ids(tokenizer, _declared(folder))
    missing = [role for role, special in zip(USUAL, specials, strict=True) if special is None]
    if missing:
        raise ValueError(
            f"{folder}: its tokenizer lacks special tokens: {', '.join(missing)}; name them in "
            "special_tokens_map.json "
            f"({', '.join(f'{role}_token' for role in missing)})"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return (
        tokenizer.to_str(),
        1 + max(tokenizer.get_vocab().values()),
        [i for i in specials if i is not None],
    )


def _declared(folder: str) -> dict[str, str]:
    """Return the special tokens by role, as named by the files beside tokenizer.json."""
    token_config: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = storage.join(folder, name)
        if storage.exists(path):
            content = storage.read_json(path)
            if not isinstance(content, dict):
                raise ValueError(
                    f"{path}: not a JSON object; write the tokenizer again with save_pretrained"
                )
            token_config |= {key: value for key, value in content.items() if value is not None}
    names = {role: token_config.get(f"{role}_token") for role in (*USUAL, "bos", "eos")}
    plain = {
        role: value["content"] if isinstance(value, dict) else value
        for role, value in names.items()
    }
    named = {role: str(value) for role, value in plain.items() if value is not None}
    if "eos" in named and not {"cls", "sep"} & set(named):
        named |= {"cls": named.get("bos", named["eos"]), "sep": named["eos"], "any": named["eos"]}
    return named


# ---------------------------------------------------------------- words


def _described(tokenizer: Tokenizer) -> str:
    parts = (tokenizer.pre_tokenizer, tokenizer.normalizer, tokenizer.decoder)
    return " ".join(part.__getstate__().decode() for part in parts if part is not None)


def marks_beginnings(tokenizer: Tokenizer) -> bool:
    """Tell whether tokens include the space before a word (byte-level BPE, SentencePiece).

    A word by itself is then tokenised with one, as RoBERTa's.
    """
    return not isinstance(tokenizer.model, models.WordPiece) and any(
        name in _described(tokenizer) for name in ("ByteLevel", "Metaspace", "▁")
    )


def space_before_words(tokenizer: Tokenizer) -> str:
    """Return what precedes a word that is tokenised by itself: " ", where tokens include the space
    before a word (`marks_beginnings`) and the tokenizer does not put one there itself.
    """
    if not marks_beginnings(tokenizer):
        return ""
    text = "a" if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str("a")
    if tokenizer.pre_tokenizer is not None:
        text = tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]
    return "" if text.startswith((" ", "▁", *BEGINNINGS)) else " "


def continuing(tokenizer: Tokenizer, vocabulary: int, specials: Sequence[int]) -> str | None:
    """Return a bitmap of the tokens that continue a word, as Base64 of numpy.packbits.

    WordPiece marks them ("##ing"); in byte-level BPE and SentencePiece they are those that do not
    start with a space, as for RoBERTa (punctuation continues the word before it). False for special
    tokens. None where tokens do not show it (BPE with a mark at the end of a word).
    """
    is_continuing = np.zeros(vocabulary, dtype=bool)
    tokens = tokenizer.get_vocab()
    if isinstance(tokenizer.model, models.WordPiece):
        prefix = tokenizer.model.continuing_subword_prefix
        goes_on = [i for token, i in tokens.items() if token.startswith(prefix)]
    elif marks_beginnings(tokenizer):
        beginnings = BEGINNINGS if "ByteLevel" in _described(tokenizer) else ("▁",)
        goes_on = [i for token, i in tokens.items() if not token.startswith(beginnings)]
    else:
        return None
    is_continuing[goes_on] = True
    is_continuing[
        [
            *specials,
            *(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special),
        ]
    ] = False
    return base64.b64encode(np.packbits(is_continuing).tobytes()).decode()


# ---------------------------------------------------------------- long texts


def not_utf8(document: Buffer) -> str:
    """Return "" or why, and where, a document is not UTF-8; read in pieces."""
    start = 0
    while start < len(document):
        stop = _boundary(document, start + PIECE_BYTES)
        try:
            str(document[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            place = start + error.start
            text = f"not UTF-8 text ({_reason(document[place : place + 4])} at byte {place})"
            around = bytes(document[max(0, place - 1) : place + LATIN_BYTES])
            return f"{text}{LATIN_ADVICE if _is_latin(around) else ''}"
        start = stop
    return ""


LATIN_BYTES = 256
"""So many bytes are looked at to recognise Latin-1."""
LATIN_ADVICE = "; it looks like Latin-1: convert the file (iconv -f LATIN1 -t UTF-8)"
LATIN_LETTER = re.compile(rb"[\xc0\xc1\xc4-\xd6\xd8-\xf6\xf8-\xfe]")
"""Letters of Latin-1, without 0xC2 and 0xC3, with which most characters of UTF-8 begin."""
IN_A_WORD = re.compile(rb"[A-Za-z][\xc0-\xfe]|[\xc0-\xfe][A-Za-z]")


def _is_latin(document: bytes) -> bool:
    """Return whether bytes that are not UTF-8 look like Latin-1: all that are not ASCII are its
    letters, and one of them is in a word.
    """
    beyond = [document[i : i + 1] for i, byte in enumerate(document) if byte > 0x7F]
    return bool(IN_A_WORD.search(document)) and all(map(LATIN_LETTER.match, beyond))


def _reason(document: Buffer) -> str:
    """Return why these bytes do not start with a character, or "" where one may be cut off by their
    end.
    """
    try:
        str(document, "utf-8")
    except UnicodeDecodeError as error:
        return error.reason
    raise AssertionError("these bytes are UTF-8")


def _boundary(document: Buffer, stop: int) -> int:
    """Return the last place up to ``stop`` that is not inside a character."""
    if stop >= len(document):
        return len(document)
    return next(
        (place for place in range(stop, stop - 4, -1) if document[place] & 0xC0 != 0x80), stop
    )


def piece(document: Buffer, start: int, size: int) -> tuple[str, int]:
    """Return the next piece of about ``size`` bytes, at most PIECE_BYTES, and the byte where it
    ends.
    """
    while True:
        stop = _boundary(document, start + size)
        text = str(document[start:stop], "utf-8")
        if stop == len(document):
            return text, stop
        at = text.rfind(" ", 0, len(text) - 1)
        while at > 0 and (text[at - 1].isspace() or text[at + 1].isspace()):
            at = text.rfind(" ", 0, at)
        if at > 0:
            return text[:at], stop - len(text[at:].encode())
        if size >= PIECE_BYTES:
            return text, stop
        size = min(PIECE_BYTES, 4 * size)


def pieces(document: Buffer) -> Iterator[str]:
    """Yield a whole document in pieces, in order; an empty one has one."""
    text, stop = piece(document, 0, PIECE_BYTES)
    yield text
    while stop < len(document):
        text, stop = piece(document, stop, PIECE_BYTES)
        yield text


def _groups(parts: Iterable[tuple[int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    """Yield (numbers, texts) of about GROUP_BYTES together."""
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    for number, text in parts:
        if texts and size + len(text) > GROUP_BYTES:
            yield numbers, texts
            numbers, texts, size = [], [], 0
        numbers.append(number)
        texts.append(text)
        size += len(text)
    if texts:
        yield numbers, texts


def encode(tokenizer: Tokenizer, documents: Sequence[Buffer], dtype: Any) -> list[np.ndarray]:
    """Return all ids of each document, without special tokens.

    Memory is needed for the ids and one group of pieces. A line of 100 MB of English has 24 million
    ids (2026-11-25): packing it takes 0.6 GB beside the line, its first 512 ids none.
    """
    ids_of: list[list[np.ndarray]] = [[] for _ in documents]
    for numbers, texts in _groups(
        (i, text) for i, document in enumerate(documents) for text in pieces(document)
    ):
        for number, encoding in zip(
            numbers, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            ids_of[number].append(np.array(encoding.ids, dtype=dtype))
    return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids_of]


class Beginning(NamedTuple):
    """The first ids (k,) of a document.

    ``offsets`` (k, 2) are [start, end) of each in characters, without surrounding spaces.
    ``whole``: these are all of its ids.
    """

    ids: np.ndarray
    offsets: np.ndarray
    whole: bool


def encode_first(
    tokenizer: Tokenizer, documents: Sequence[Buffer], most: int, dtype: Any, offsets: bool = False
) -> list[Beginning]:
    """Return at least the first ``most`` ids of each document; the rest is not read.

    With ``offsets`` the first piece has PIECE_BYTES, so that all ids of a document no longer than
    that are counted.
    """
    encoded: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in documents]
    counts, characters, stops = ([0] * len(documents) for _ in range(3))
    size = PIECE_BYTES if offsets else min(PIECE_BYTES, max(FIRST_BYTES, 16 * most))
    run = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    todo = list(range(len(documents)))

    def parts(numbers: list[int], size: int) -> Iterator[tuple[int, str]]:
        for number in numbers:
            text, stops[number] = piece(documents[number], stops[number], size)
            yield number, text

    while todo:
        for numbers, texts in _groups(parts(todo, size)):
            for number, text, encoding in zip(
                numbers, texts, run(texts, add_special_tokens=False), strict=True
            ):
                spans = (
                    _trimmed(text, encoding.offsets) + characters[number]
                    if offsets
                    else np.zeros((0, 2), dtype=np.int32)
                )
                encoded[number].append((np.array(encoding.ids, dtype=dtype), spans))
                counts[number] += len(encoding.ids)
                characters[number] += len(text)
        todo = [i for i in todo if counts[i] < most and stops[i] < len(documents[i])]
        size = min(PIECE_BYTES, 4 * size)
    joined = [
        tuple(
            parts[0] if len(parts) == 1 else np.concatenate(parts)
            for parts in zip(*of_document, strict=True)
        )
        for of_document in encoded
    ]
    return [
        Beginning(ids, spans, stop == len(document))
        for (ids, spans), stop, document in zip(joined, stops, documents, strict=True)
    ]


def _trimmed(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Return (k, 2) int32 offsets without spaces at their ends, which byte-level BPE includes."""
    if not offsets:
        return np.zeros((0, 2), dtype=np.int32)
    start, end = np.array(offsets, dtype=np.int32).T
    space = np.isin(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), SPACES)
    while (inner := (start < end) & space[np.minimum(start, len(space) - 1)]).any():
        start = start + inner
    while (inner := (start < end) & space[np.maximum(end, 1) - 1]).any():
        end = end - inner
    return np.stack([start, end], axis=1)


def encode_words(
    tokenizer: Tokenizer, rows: Sequence[Sequence[str]], most: int, dtype: Any
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokenise each word of each row by itself, at least up to the first ``most`` ids.

    Returns (ids, number of the word that each id belongs to) for each row.
    """
    space = space_before_words(tokenizer)
    encoded: list[tuple[np.ndarray, np.ndarray]] = [
        (np.zeros(0, dtype=dtype), np.zeros(0, dtype=np.int32))
    ] * len(rows)
    todo, count = list(range(len(rows))), most
    while todo:
        parts = [[space + word if word else "" for word in rows[i][:count]] for i in todo]
        for i, encoding in zip(
            todo,
            tokenizer.encode_batch(parts, is_pretokenized=True, add_special_tokens=False),
            strict=True,
        ):
            encoded[i] = (
                np.array(encoding.ids, dtype=dtype),
                np.array(encoding.word_ids, dtype=np.int32),
            )
        todo = [i for i in todo if len(encoded[i][0]) < most and count < len(rows[i])]
        count = 4 * count
    return encoded


def texts_of(documents: Iterable[Buffer]) -> list[str]:
    """Return all pieces of all documents, to train a tokenizer on."""
    return list(chain.from_iterable(map(pieces, documents)))
