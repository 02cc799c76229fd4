"""Text: a tokenizer trained on the source corpus (it travels in the bundle), rows of token ids, documents packed without padding."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from pipeline.contracts import Arrays, Modality
from pipeline.registry import Options, register

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000
"""Distinct characters that a WordPiece vocabulary keeps, the most frequent ones; the others are unknown."""


class TextOptions(Options):
    length: int = Field(128, ge=8, le=65536, description="tokens a row, with [CLS] and [SEP]; longer texts are cut")
    vocabulary: int = Field(8192, ge=256, le=1_000_000, description="largest vocabulary of the tokenizer that is trained")
    algorithm: Literal["auto", "wordpiece", "bpe"] = Field("auto", description="auto: byte-level BPE for GPT families, WordPiece for the others")
    lowercase: bool = Field(True, description="WordPiece only: lower case and strip accents")


@register("modality", "text", options=TextOptions)
class Text(Modality):
    """``tokens`` (B, N) ids with ``mask`` (B, N) or, for packed rows, ``segments`` (B, N): the document's number, 0 for padding."""

    roles = ("text",)
    packed_roles = ("tokens", "segments")

    @classmethod
    def fit(cls, options, table, columns, backbone):
        texts = [text for text, reason in _texts(table[columns["text"]]) if not reason]
        if not texts:
            raise ValueError(f"column {columns['text']}: no row holds text to train a tokenizer on")
        kind = options.algorithm if options.algorithm != "auto" else ("bpe" if "gpt" in backbone else "wordpiece")
        tokenizer = train_tokenizer(texts, kind, options.vocabulary, options.lowercase)
        return {"tokenizer": tokenizer.to_str(), "vocabulary": tokenizer.get_vocab_size(), "specials": list(range(len(SPECIALS)))}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.state["tokenizer"])

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "tokenizer"}

    def inputs(self) -> dict[str, Any]:
        """``specials`` holds the ids of pad, unk, cls, sep and mask, in this order."""
        return {"vocabulary": self.state["vocabulary"], "length": self.options.length, "specials": self.state["specials"]}

    @property
    def _dtype(self):
        return np.uint16 if self.state["vocabulary"] <= 1 << 16 else np.int32

    def _encode(self, column) -> tuple[list[list[int]], list[str]]:
        pairs = list(_texts(column))
        bad = [reason for _, reason in pairs]
        return [e.ids for e in self.tokenizer.encode_batch_fast([text for text, _ in pairs], add_special_tokens=False)], bad

    def _framed(self, column) -> tuple[list[list[int]], list[str]]:
        """``[CLS] ids [SEP]`` of every text, cut to ``length``."""
        encoded, bad = self._encode(column)
        _, _, cls, sep, _ = self.state["specials"]
        return [[cls, *ids[:self.options.length - 2], sep] for ids in encoded], bad

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        """Reads texts, rows that ``pack`` made (``columns`` names tokens and segments) and rows that ``tokenize`` made (tokens alone)."""
        length, bad = self.options.length, [""] * len(table)
        if "segments" in columns:
            return {name: _matrix(table[columns[name]], length) for name in ("tokens", "segments")}, bad
        if "tokens" in columns:
            column = table[columns["tokens"]].combine_chunks()
            lengths, values = pc.list_value_length(column).to_numpy(zero_copy_only=False), column.flatten().to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        else:
            rows, bad = self._framed(table[columns["text"]])
            lengths, values = np.array([len(row) for row in rows]), np.fromiter(chain.from_iterable(rows), dtype=np.int64)
        tokens = np.full((len(table), length), self.state["specials"][0], dtype=self._dtype)
        lengths = lengths.astype(np.int32)
        tokens[np.arange(length) < lengths[:, None]] = values
        return {"tokens": tokens, "lengths": lengths}, bad

    def tokenize(self, table, columns) -> tuple[pa.Table, list[str]]:
        """The good rows with ``tokens`` (a list of ids, ``[CLS] ids [SEP]`` cut to ``length``) in the place of the text."""
        name = columns["text"]
        if "tokens" in table.column_names and name != "tokens":
            raise ValueError("a column is called tokens, the name that token ids get; give it another name")
        rows, bad = self._framed(table[name])
        good = np.array([not reason for reason in bad], dtype=bool)
        tokens = pa.array([row for row, reason in zip(rows, bad, strict=True) if not reason], pa.list_(pa.uint32()))
        return table.filter(pa.array(good)).set_column(table.column_names.index(name), "tokens", tokens), bad

    def pack(self, table, columns) -> tuple[pa.Table, list[str]]:
        """Documents, each ``[CLS] ids [SEP]``, laid end to end into rows of ``length``; only the last row has padding."""
        length = self.options.length
        encoded, bad = self._encode(table[columns["text"]])
        bad = [reason or ("" if ids else "the text is empty") for ids, reason in zip(encoded, bad, strict=True)]
        pad, _, cls, sep, _ = self.state["specials"]
        pieces = [[cls, *ids, sep] for ids, reason in zip(encoded, bad, strict=True) if not reason]
        if not pieces:
            none = pa.array([], pa.list_(pa.uint32(), length))
            return pa.table({"tokens": none, "segments": none}), bad
        tokens = np.concatenate([np.array(piece, dtype=np.uint32) for piece in pieces])
        documents = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.uint32), [len(piece) for piece in pieces])
        rows = -(-len(tokens) // length)
        tokens, documents = (np.pad(a, (0, rows * length - len(a)), constant_values=end).reshape(rows, length)
                             for a, end in ((tokens, pad), (documents, 0)))
        first = documents[:, :1]
        segments = np.where(documents > 0, documents - first + 1, 0).astype(np.uint32)
        return pa.table({"tokens": pa.FixedSizeListArray.from_arrays(tokens.reshape(-1), length),
                         "segments": pa.FixedSizeListArray.from_arrays(segments.reshape(-1), length)}), bad

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        out = super().collate({k: v for k, v in arrays.items() if k not in ("tokens", "segments", "lengths")})
        tokens = arrays["tokens"]
        if "segments" in arrays:
            out["segments"] = torch.from_numpy(arrays["segments"].astype(np.int32))
        else:
            longest = int(arrays["lengths"].max(initial=1))
            longest = min(tokens.shape[1], -(-longest // 8) * 8)  # few distinct widths
            tokens = tokens[:, :longest]
            out["mask"] = torch.from_numpy(np.arange(longest)[None] < arrays["lengths"][:, None])
        out["tokens"] = torch.from_numpy(tokens.astype(np.int64))
        return out


def _texts(column):
    """(text, "") or ("", reason) of every value; bytes that are not UTF-8 spoil their own row alone."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        raw = column.cast(pa.large_binary()) if not pa.types.is_null(column.type) else column
    except pa.ArrowNotImplementedError:
        raise ValueError(f"the text column holds {column.type} values, not text; check data.columns") from None
    for value in raw:
        data = value.as_py()
        try:
            yield (data.decode("utf-8"), "") if data is not None else ("", "the text is null")
        except UnicodeDecodeError as error:
            yield "", f"not UTF-8 text ({error.reason} at byte {error.start})"


def _matrix(column, length: int) -> np.ndarray:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, length)


def train_tokenizer(texts: list[str], kind: str, vocabulary: int, lowercase: bool) -> Tokenizer:
    """WordPiece as BERT's (Devlin et al. 2019) or byte-level BPE as GPT-2's (Radford et al. 2019), specials at ids 0 to 4.

    A pure function of the texts.
    """
    if kind == "wordpiece":
        return _train_wordpiece(texts, vocabulary, lowercase)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def _wordpiece(vocabulary: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _train_wordpiece(texts: list[str], vocabulary: int, lowercase: bool) -> Tokenizer:
    """tokenizers 0.23 gives continuing characters ("##a") their ids in the order of a hash map, another one in every process, and ids
    break ties between merges. So a first pass without merges finds these characters, and the training starts with them in order."""
    normalizer, counts = normalizers.BertNormalizer(lowercase=lowercase), Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    alphabet = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))[:ALPHABET]
    continuing: list[str] = []
    tokenizer = _wordpiece({}, lowercase)
    for size in (0, vocabulary):
        tokenizer = _wordpiece({}, lowercase)
        tokenizer.train_from_iterator(texts, trainer=trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=[*SPECIALS, *continuing], initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False))
        continuing = continuing or sorted(token for token in tokenizer.get_vocab() if token.startswith("##") and len(token) == 3)
    tokenizer = _wordpiece(tokenizer.get_vocab(), lowercase)  # the continuing characters are no special tokens of the result
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer
