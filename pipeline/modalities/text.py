"""Text as token ids, by a tokenizer that is trained on the source's corpus or given.

The tokenizer is stored in the bundle. Documents can be packed into rows without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.config.registry import Options, register, wanted_inputs
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_bytes, is_list, is_text
from pipeline.core.capabilities import UnreadText
from pipeline.core.contracts import Arrays, Batch, Modality
from pipeline.core.inputs import TextInputs
from pipeline.media import minhash, tokenization
from pipeline.media.tokenization import PIECE_BYTES, SPECIALS
from pipeline.media.words import plain_texts

MAX_WORD_NUMBER = 32767
"""Largest number of a word in its row (int16)."""
NEAR_JACCARD = 0.8
"""Least similarity of the word shingles of two texts that are nearly the same."""
PREPARATION = """
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({length}, strategy="{strategy}")
tokenizer.enable_padding(pad_id={pad})
rows = {texts}  # an example: replace it by your rows
found = tokenizer.encode_batch(rows, is_pretokenized={words})
inputs = {{
    "tokens": np.array([one.ids for one in found]),
    "mask": np.array([one.attention_mask for one in found], dtype=bool),
    "types": np.array([one.type_ids for one in found]),
}}
"""
"""Code that makes the inputs of a network outside of this package."""
TEXTS = '["A text.", "Another one."]'
QUESTIONS = '[("A question?", "Its context.")]'
WORDS = '[["A", "text", "."], ["Another", "one", "."]]'
FIRST_TOKENS = """
# the scores of word number w of a row are scores[row, first_tokens[row][w]]
first_tokens = []
for row in found:
    token_of_word = {}
    for token, word in enumerate(row.word_ids):
        if word is not None:
            token_of_word.setdefault(word, token)
    first_tokens.append(token_of_word)
"""
"""Code that finds the token of each word whose output counts."""
RANDOM_TOKENS = 24
"""Tokens of the longest row that is made up."""


class TextOptions(Options):
    length: int = Field(
        128, ge=8, le=65536, description="tokens a row, with [CLS] and [SEP]; longer texts are cut"
    )
    tokenizer: str | None = Field(
        None,
        description="folder with an existing tokenizer.json, as transformers saves it; none: one "
        "is trained on the corpus",
        json_schema_extra={
            "format": "uri-reference",
            "x-files": ["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"],
        },
    )
    vocabulary: int = Field(
        8192,
        ge=256,
        le=1_000_000,
        description="largest vocabulary of the tokenizer that is trained",
    )
    algorithm: Literal["auto", "wordpiece", "bpe"] = Field(
        "auto", description="auto: byte-level BPE for GPT families, WordPiece for the others"
    )
    lowercase: bool = Field(True, description="WordPiece only: lower case and strip accents")
    windows: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="question answering: most windows that a long text is read in; none: it is cut",
    )
    stride: int = Field(128, ge=0, le=65535, description="tokens that neighbouring windows share")


class _Rows(NamedTuple):
    """Token rows ``[CLS] a [SEP] b [SEP]``: padded ids (B, N), lengths (B,), token types (B, N)."""

    tokens: np.ndarray
    lengths: np.ndarray
    types: np.ndarray


class TextState(TypedDict):
    """State of `Text`."""

    tokenizer: str
    """JSON of the tokenizer."""
    vocabulary: int
    """How many tokens there are."""
    specials: list[int]
    """As `TextInputs` has them."""


@register("modality", "text", options=TextOptions)
class Text(Modality):
    """Texts as rows of at most ``length`` tokens: ``[CLS] text [SEP]``.

    Tensors: ``tokens`` (B, N) ids with ``mask`` (B, N), where N is the longest row of the batch.
    Beside these

    - pairs of texts, ``[CLS] a [SEP] b [SEP]``, have ``types`` (B, N), 1 for b (BERT's token
      types);
    - lists of words have ``words`` (B, N): the number of the word that begins with this token, else
      -1;
    - with ``windows`` W all of these are (B, W, N), and there is ``offsets`` (B, W, N, 2): the
      characters of each token of the text that is read in windows;
    - packed rows have ``segments`` (B, N), the document's number in the row (0 for padding), and
      ``bytes`` (B,), the UTF-8 bytes that the tokens encode.
    """

    state: TextState
    roles = ("text",)
    optional_roles = ("text_pair",)
    readable_roles = ("text", "text_pair")
    packed_roles = ("tokens", "segments", "bytes")
    near_search = minhash.MinHashSearch(NEAR_JACCARD)
    target_options = ("length", "stride", "windows")

    @classmethod
    def ineffective_options(cls, stated, inherited=None) -> str:
        options = TextOptions.model_construct(**{**(inherited or {}), **stated})
        if "stride" in stated and options.windows is None:
            return (
                f"stride {stated['stride']} has no effect without windows: leave it out, or give "
                "windows, in how many a long text is read"
            )
        return ""

    @classmethod
    def fit(cls, options, table, columns, backbone) -> TextState:
        if options.tokenizer is not None:
            beside = {"vocabulary", "algorithm", "lowercase"} & options.model_fields_set
            if beside:
                raise ValueError(
                    f"tokenizer: {options.tokenizer} is there already, so "
                    f"{', '.join(sorted(beside))} decide nothing; leave them out"
                )
            text, vocabulary, specials = tokenization.from_folder(options.tokenizer)
            return {"tokenizer": text, "vocabulary": vocabulary, "specials": specials}
        documents = [
            b" ".join(row) if isinstance(row, list) else row
            for role in ("text", "text_pair")
            if columns.get(role) in table.column_names
            for row, reason in zip(
                *(_words if is_list(table[columns[role]].type) else _documents)(
                    table[columns[role]], role
                ),
                strict=True,
            )
            if not reason
        ]
        if not documents:
            raise ValueError(f"column {columns['text']}: no row holds text to train a tokenizer on")
        algorithm = options.algorithm
        if algorithm == "auto":
            algorithm = wanted_inputs(backbone).get("tokenizer", "wordpiece")
        if algorithm == "bpe" and "lowercase" in options.model_fields_set and options.lowercase:
            raise ValueError(
                "lowercase: true has no effect with byte-level BPE, which keeps capitals: leave it "
                "out, or set algorithm: wordpiece"
            )
        tokenizer = tokenization.train_tokenizer(
            tokenization.texts_of(documents), algorithm, options.vocabulary, options.lowercase
        )
        return {
            "tokenizer": tokenizer.to_str(),
            "vocabulary": tokenizer.get_vocab_size(),
            "specials": list(range(len(SPECIALS))),
        }

    @classmethod
    def near_signatures(cls, table, columns):
        """Return MinHash signatures of the texts of each row, (n, texts, 128)."""
        names = [columns[role] for role in ("text", "text_pair") if role in columns]
        columns_of_texts = [plain_texts(table[name]) for name in names]
        texts = [text for row in zip(*columns_of_texts, strict=True) for text in row]
        signatures = np.array(list(minhash.signatures(iter(texts))), dtype=np.uint32)
        return {"minhash": signatures.reshape(len(table), len(names), minhash.NUM_PERM)}

    def required_type(self, role, kind) -> str:
        if role not in ("text", "text_pair"):
            return ""
        values = kind.value_type if is_list(kind) and role == "text" else kind
        if is_text(values) or is_bytes(values) or pa.types.is_null(values):
            return ""
        return "texts (string or binary)" + (" or lists of words" if role == "text" else "")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.state["tokenizer"])

    @cached_property
    def _continuing(self) -> str | None:
        return tokenization.continuing(
            self.tokenizer, self.state["vocabulary"], self.state["specials"]
        )

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "tokenizer"}

    def inputs(self) -> TextInputs:
        inputs: TextInputs = {
            "vocabulary": self.state["vocabulary"],
            "length": self.options.length,
            "specials": self.state["specials"],
        }
        if self._continuing:
            inputs["continuing"] = self._continuing
        return inputs

    def check(self, roles) -> None:
        options = self.options
        if options.windows is not None and "answers" not in roles:
            raise ValueError(
                "windows: a text is read in windows by objectives that look for answers (qa); "
                "leave windows out, or set it to null"
            )
        if options.windows is None and "answers" in roles:
            raise ValueError(
                "answers are looked for in windows of a long text; set modality: {text: "
                "{length: 384, windows: 8, stride: 128}}"
            )
        if options.windows is not None and options.stride > options.length - 4:
            raise ValueError(
                f"stride: windows of {options.length} tokens that share {options.stride} never "
                "move on; choose a smaller stride or more length"
            )

    @property
    def _dtype(self):
        return np.uint16 if self.state["vocabulary"] <= 1 << 16 else np.int32

    # ------------------------------------------------------------ rows

    def decode(self, table, columns) -> tuple[Arrays, list[str]]:
        """Decode texts, pairs, lists of words, and rows that ``pack`` or ``tokenize`` made.

        ``columns`` names tokens and segments of packed rows, and tokens alone of tokenised ones.
        """
        length, pair = self.options.length, "text_pair" in columns
        if "segments" in columns:
            return self._read_packed(table, columns), [""] * len(table)
        if "tokens" in columns:
            column = table[columns["tokens"]].combine_chunks()
            # pyright: ignore
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int32)
            tokens = np.full(
                (len(table), length),
                self.state["specials"][0],
                dtype=self._dtype,
            )
            tokens[np.arange(length) < lengths[:, None]] = column.flatten().to_numpy()
            return {"tokens": tokens, "lengths": lengths}, [""] * len(table)
        if is_list(table[columns["text"]].type):
            if pair or self.options.windows is not None:
                raise ValueError(
                    f"column {columns['text']} holds lists of words: these have no "
                    f"{'text_pair' if pair else 'windows'}; leave it out"
                )
            return self._encode_words(table[columns["text"]])
        if self.options.windows is not None:
            return self._encode_windows(table, columns)
        rows, bad = self._encode_texts(table, columns)
        return {
            "tokens": rows.tokens,
            "lengths": rows.lengths,
            **({"types": rows.types} if pair else {}),
        }, bad

    def _read_packed(self, table, columns) -> Arrays:
        arrays = {
            name: _to_matrix(table[columns[name]], self.options.length)
            for name in ("tokens", "segments")
        }
        if "bytes" in columns:
            arrays["bytes"] = table[columns["bytes"]].to_numpy().astype(np.float32)
        return arrays

    def _add_special_tokens(self, parts: Sequence[Sequence[np.ndarray]], length: int) -> _Rows:
        """Build rows of one or two lists of ids, which must leave room for the special tokens."""
        pad, _, cls, sep, _ = self.state["specials"]
        tokens = np.full((len(parts), length), pad, dtype=self._dtype)
        types = np.zeros((len(parts), length), dtype=np.uint8)
        lengths = np.zeros(len(parts), dtype=np.int32)
        for row, texts in enumerate(parts):
            tokens[row, 0], place = cls, 1
            for number, ids in enumerate(texts):
                end = place + len(ids)
                tokens[row, place:end] = ids
                tokens[row, end] = sep
                types[row, place : end + 1] = number
                place = end + 1
            lengths[row] = place
        return _Rows(tokens, lengths, types)

    def _encode_texts(self, table, columns) -> tuple[_Rows, list[str]]:
        """Encode texts or pairs; of a pair the longer text is cut first (transformers'
        longest_first).
        """
        roles = [role for role in ("text", "text_pair") if role in columns]
        room = self.options.length - 1 - len(roles)
        documents, reasons = zip(
            *(_documents(table[columns[role]], role) for role in roles), strict=True
        )
        texts = [
            [one.ids for one in tokenization.encode_first(self.tokenizer, some, room, self._dtype)]
            for some in documents
        ]
        if len(texts) == 1:
            parts = [(ids[:room],) for ids in texts[0]]
        else:
            parts = [
                (a[:n], b[:m])
                for a, b in zip(*texts, strict=True)
                for n, m in [_split_room(len(a), len(b), room)]
            ]
        return self._add_special_tokens(parts, self.options.length), [
            next(filter(None, row), "") for row in zip(*reasons, strict=True)
        ]

    def _encode_words(self, column) -> tuple[Arrays, list[str]]:
        lists, bad = _words(column, "text")
        room = self.options.length - 2
        words = [[word.decode() for word in row[: MAX_WORD_NUMBER + 1]] for row in lists]
        encoded = tokenization.encode_words(self.tokenizer, words, room, self._dtype)
        rows = self._add_special_tokens([(ids[:room],) for ids, _ in encoded], self.options.length)
        numbers = np.full(rows.tokens.shape, -1, dtype=np.int16)
        for row, (_, of) in enumerate(encoded):
            of = of[:room]
            firsts = np.flatnonzero(np.diff(of, prepend=-1))
            numbers[row, firsts + 1] = of[firsts]
        return {"tokens": rows.tokens, "lengths": rows.lengths, "words": numbers}, bad

    def _encode_windows(self, table, columns) -> tuple[Arrays, list[str]]:
        """Cut the last text into windows as transformers does, with the first text before each.

        That is ``return_overflowing_tokens`` with a stride.
        """
        length, most = self.options.length, self.options.windows
        roles = [role for role in ("text", "text_pair") if role in columns]
        documents, reasons = zip(
            *(_documents(table[columns[role]], role) for role in roles), strict=True
        )
        bad = [next(filter(None, row), "") for row in zip(*reasons, strict=True)]
        texts = tokenization.encode_first(
            self.tokenizer, documents[-1], length * most + 1, self._dtype, offsets=True
        )
        asked = (
            tokenization.encode_first(
                self.tokenizer, documents[0], length + 1, self._dtype, offsets=True
            )
            if len(roles) == 2
            else None
        )
        parts: list[tuple[np.ndarray, ...]] = []
        # row, window, first position of the text, offsets
        places: list[tuple[int, int, int, np.ndarray]] = []
        for row, text in enumerate(texts):
            question = (asked[row].ids,) if asked else ()
            before = 1 + sum(len(ids) + 1 for ids in question)
            starts, reason = self._window_starts(len(text.ids), text.whole, before)
            bad[row] = bad[row] or reason
            if not bad[row]:
                room = length - before - 1
                parts += [(*question, text.ids[start : start + room]) for start in starts]
                places += [
                    (row, window, before, text.offsets[start : start + room])
                    for window, start in enumerate(starts)
                ]
        rows = self._add_special_tokens(parts, length)
        out = {
            "tokens": np.full(
                (len(table), most, length), self.state["specials"][0], dtype=self._dtype
            ),
            "lengths": np.zeros((len(table), most), dtype=np.int32),
            "types": np.zeros((len(table), most, length), dtype=np.uint8),
        }
        offsets = np.full((len(table), most, length, 2), -1, dtype=np.int32)
        for i, (row, window, before, spans) in enumerate(places):
            for name, array in rows._asdict().items():
                out[name][row, window] = array[i]
            offsets[row, window, before : before + len(spans)] = spans
        return {**out, "offsets": offsets}, bad

    def _window_starts(self, tokens: int, whole: bool, before: int) -> tuple[range, str]:
        """Return the first token of each window of a text, or the reason why there are none.

        Args:
            tokens: Tokens of the text.
            whole: Whether these are all of its tokens.
            before: Tokens that precede the text in each window.
        """
        length, stride, most = self.options.length, self.options.stride, self.options.windows
        room, asked = length - before - 1, f"the question takes {before - 2} of {length} tokens"
        if room < 1:
            return range(0), asked
        if tokens > room and room <= stride:
            return range(
                0
            ), f"{asked} and leaves {room} for the text, of which windows share {stride}"
        count = 1 + max(0, -(-(tokens - room) // max(1, room - stride)))
        if count > most:
            return (
                range(0),
                f"the text takes {'' if whole else 'at least '}{count} windows of {length} "
                f"tokens, more than windows: {most}",
            )
        return range(0, count * max(1, room - stride), max(1, room - stride)), ""

    def unread_text(self, table, columns) -> UnreadText | None:
        """Count the words (of lists of words) or tokens beyond ``length``, and unknown ones.

        Nothing is cut where texts are read in windows: too long texts are rejected there. Tokens of
        a text longer than PIECE_BYTES are counted in its beginning and estimated for the rest.
        """
        if "tokens" in columns:
            return None
        if is_list(table[columns["text"]].type):
            return self._cut_words(table[columns["text"]])
        roles = [role for role in ("text", "text_pair") if role in columns]
        room = self.options.length - 1 - len(roles)
        counts, looked_at, unknown = [], 0, 0
        for role in roles:
            documents, _ = _documents(table[columns[role]], role)
            encoded = tokenization.encode_first(
                self.tokenizer, documents, room + 1, self._dtype, offsets=True
            )
            looked_at += sum(len(one.ids) for one in encoded)
            unknown += sum(int(self._is_unknown(one.ids).sum()) for one in encoded)
            counts.append(
                [
                    len(one.ids) if one.whole else round(len(one.ids) * len(document) / PIECE_BYTES)
                    for one, document in zip(encoded, documents, strict=True)
                ]
            )
        tokens = np.array(counts, dtype=np.int64).sum(0)
        reads_windows = self.options.windows is not None
        # Of a pair the longer text is cut first, until both have room
        lost = np.zeros_like(tokens) if reads_windows else np.maximum(0, tokens - room)
        return UnreadText(
            len(table),
            int(np.count_nonzero(lost)),
            int(tokens.sum()),
            int(lost.sum()),
            "tokens",
            unknown / max(1, looked_at),
        )

    def _is_unknown(self, ids: np.ndarray) -> np.ndarray:
        return ids == self.state["specials"][1]

    def _cut_words(self, column) -> UnreadText:
        """Count cut words: a word is cut off where its first token has no room."""
        lists, _ = _words(column, "text")
        room = self.options.length - 2
        words = [[word.decode() for word in row[: MAX_WORD_NUMBER + 1]] for row in lists]
        encoded = tokenization.encode_words(self.tokenizer, words, room + 1, self._dtype)
        total = np.array([len(row) for row in lists], dtype=np.int64)
        lost = np.zeros(len(lists), dtype=np.int64)
        looked_at = unknown = 0
        for i, (ids, of) in enumerate(encoded):
            looked_at += len(np.unique(of))
            unknown += len(np.unique(of[self._is_unknown(ids)]))
            if len(ids) > room:
                lost[i] = total[i] - (int(of[:room].max()) + 1)
        return UnreadText(
            len(lists),
            int(np.count_nonzero(lost)),
            int(total.sum()),
            int(lost.sum()),
            "words",
            unknown / max(1, looked_at),
        )

    def tokenize(self, table, columns) -> tuple[pa.Table, list[str]] | None:
        """Replace texts by ``tokens``, a list of ids ``[CLS] ids [SEP]`` cut to ``length``.

        None for pairs, lists of words and windows.
        """
        name = columns["text"]
        if "text_pair" in columns or self.options.windows is not None or is_list(table[name].type):
            return None
        if "tokens" in table.column_names and name != "tokens":
            raise ValueError(
                "a column is called tokens, the name that token ids get; give it another name"
            )
        rows, bad = self._encode_texts(table, columns)
        good = np.array([not reason for reason in bad], dtype=bool)
        tokens, lengths = rows.tokens[good], rows.lengths[good]
        ids = tokens[np.arange(self.options.length) < lengths[:, None]].astype(self._storage_dtype)
        column = pa.ListArray.from_arrays(
            np.append(0, np.cumsum(lengths)).astype(np.int32), pa.array(ids)
        )
        return table.filter(pa.array(good)).set_column(
            table.column_names.index(name), "tokens", column
        ), bad

    @property
    def _storage_dtype(self):
        return np.uint16 if self.state["vocabulary"] <= 1 << 16 else np.uint32

    # ------------------------------------------------------------ packing

    def pack(self, table, columns) -> tuple[pa.Table, list[str]]:
        """Concatenate documents, each ``[CLS] ids [SEP]``, into rows of ``length``.

        Only the last row is padded. A document that is cut by the end of a row continues in the
        next one as if it began there (GPT's rows, Radford et al. 2019): its rest does not attend to
        what came before, and its first token is not predicted. A document within one row has the
        same loss as alone.

        Column ``bytes``: the bytes of a document's text are spread evenly over its tokens but the
        first, which is not predicted.
        """
        length, stored = self.options.length, self._storage_dtype
        documents, bad = _documents(table[columns["text"]], "text")
        encoded = tokenization.encode(self.tokenizer, documents, stored)
        bad = [
            reason or ("" if len(ids) else "the text is empty")
            for ids, reason in zip(encoded, bad, strict=True)
        ]
        pad, _, cls, sep, _ = self.state["specials"]
        sizes = np.array(
            [len(document) for document, reason in zip(documents, bad, strict=True) if not reason],
            dtype=np.float64,
        )
        kept = [ids for ids, reason in zip(encoded, bad, strict=True) if not reason]
        counts = np.array([len(ids) + 2 for ids in kept], dtype=np.int64)
        rows = -(-int(counts.sum()) // length)
        ends = np.cumsum(counts)
        tokens = np.full(rows * length, pad, dtype=stored)
        numbers = np.zeros(rows * length, dtype=np.int32)
        for number, (ids, end) in enumerate(zip(kept, ends.tolist(), strict=True), 1):
            start = end - len(ids) - 2
            tokens[start] = cls
            tokens[start + 1 : end - 1] = ids
            tokens[end - 1] = sep
            numbers[start:end] = number
        numbers = numbers.reshape(rows, length)
        segments = np.where(numbers > 0, numbers - numbers[:, :1] + 1, 0).astype(np.uint16)
        return pa.table(
            {
                "tokens": _lists_of(tokens, length),
                "segments": _lists_of(segments.reshape(-1), length),
                "bytes": _bytes_of_rows(counts, ends, sizes, rows, length),
            }
        ), bad

    def random_rows(self, rows, rng, length=1.0):
        """Return rows of several lengths, of tokens that are not special, framed as others are."""
        pad, _, cls, sep, _ = self.state["specials"]
        special = {number for number in self.state["specials"] if number is not None}
        words = np.array(
            [number for number in range(self.state["vocabulary"]) if number not in special]
        )
        longest = max(2, int(length * min(RANDOM_TOKENS, self.options.length)))
        longest = min(longest, self.options.length)
        lengths = rng.integers(min(4, longest), longest + 1, rows)
        lengths[0] = longest
        tokens = np.full((rows, longest), pad, dtype=np.int64)
        for row, count in enumerate(lengths):
            tokens[row, :count] = rng.choice(words, count)
            tokens[row, 0], tokens[row, count - 1] = cls, sep
        places = np.arange(longest)
        mask, second = places < lengths[:, None], places >= lengths[:, None] // 2
        return {
            "tokens": torch.as_tensor(tokens),
            "mask": torch.as_tensor(mask),
            "types": torch.as_tensor((mask & second).astype(np.int64)),
        }

    def preparation_code(self) -> str:
        """Return code that makes token ids of texts, or of questions and contexts
        (`PreparesInputs`).
        """
        if self.options.windows is None:
            return self._preparation(TEXTS)
        return self._preparation(QUESTIONS, strategy="only_second")

    def preparation_code_of_words(self) -> str:
        """Return code that makes token ids of lists of words (`PreparesWords`)."""
        return self._preparation(WORDS, words=True) + FIRST_TOKENS.lstrip()

    def _preparation(self, rows: str, strategy: str = "longest_first", words: bool = False) -> str:
        return PREPARATION.format(
            length=self.options.length,
            strategy=strategy,
            pad=self.state["specials"][0],
            texts=rows,
            words=words,
        )

    throughput_unit = "tokens"

    def throughput(self, batch: Batch) -> float:
        """Return the number of tokens without padding."""
        is_token = batch["segments"] > 0 if "segments" in batch.data else batch["mask"]
        return float(is_token.sum())

    def collate(self, arrays: Arrays) -> dict[str, Tensor]:
        own = {"tokens", "types", "words", "offsets"} & set(arrays)
        out = super().collate(
            {k: v for k, v in arrays.items() if k not in (*own, "segments", "lengths")}
        )
        width = arrays["tokens"].shape[-1]
        if "segments" in arrays:
            out["segments"] = torch.from_numpy(arrays["segments"].astype(np.int32))
        else:
            # a multiple of 8, so that there are few different widths
            width = min(width, -(-int(arrays["lengths"].max(initial=1)) // 8) * 8)
            out["mask"] = torch.from_numpy(np.arange(width) < arrays["lengths"][..., None])
        for name in own:
            cut = arrays[name][..., :width, :] if name == "offsets" else arrays[name][..., :width]
            out[name] = torch.from_numpy(
                np.ascontiguousarray(cut) if name == "offsets" else cut.astype(np.int64)
            )
        return out


# ---------------------------------------------------------------- columns


def _documents(column, role: str) -> tuple[list[memoryview], list[str]]:
    """Return the bytes of every value, and "" or the reason why a value is not text (it is empty
    then).

    Bytes that are not UTF-8 make only their own row unusable.
    """
    if pa.types.is_null(column.type):
        column = pa.nulls(len(column), pa.large_binary())
    try:
        # Before chunks are joined: together they may hold more than 2 GiB
        raw = column.cast(pa.large_binary())
    except pa.ArrowNotImplementedError:
        raise ValueError(
            f"the {role} column holds {column.type} values, not text; check data.columns"
        ) from None
    raw = raw.combine_chunks() if isinstance(raw, pa.ChunkedArray) else raw
    offsets = (
        np.frombuffer(raw.buffers()[1], dtype=np.int64)[
            raw.offset : raw.offset + len(raw) + 1
        ].tolist()
        if len(raw)
        else [0]
    )
    data = memoryview(raw.buffers()[2] or b"")
    documents = [data[start:stop] for start, stop in pairwise(offsets)]
    bad = [""] * len(raw)
    for i in np.flatnonzero(raw.is_null().to_numpy(zero_copy_only=False)).tolist():
        documents[i], bad[i] = data[:0], f"the {role} is null"
    try:
        raw.cast(pa.large_string())  # Arrow checks a whole column in no time
    except pa.ArrowInvalid:
        for i, document in enumerate(documents):
            if reason := tokenization.not_utf8(document):
                documents[i], bad[i] = data[:0], reason
    return documents, bad


def _words(column, role: str) -> tuple[list[list[bytes]], list[str]]:
    """Return the words of every row, and "" or the reason why a row has none."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    documents, bad = _documents(column.flatten(), "word")
    rows, reasons, place = [], [], 0
    for count in pc.list_value_length(column).to_pylist():
        span = slice(place, place + (count or 0))
        place = span.stop
        row = [bytes(word) for word in documents[span]]
        reason = (
            f"the {role} is null" if count is None else "there are no words" if not count else ""
        )
        for number, (word, why) in enumerate(zip(row, bad[span], strict=True)):
            long = (
                f"it has {len(word)} bytes, more than {PIECE_BYTES}"
                if len(word) > PIECE_BYTES
                else ""
            )
            reason = reason or (f"word {number}: {why or long}" if why or long else "")
        rows.append([] if reason else row)
        reasons.append(reason)
    return rows, reasons


def _to_matrix(column, length: int) -> np.ndarray:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, length)


def _lists_of(values: np.ndarray, length: int) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values), length)


def _split_room(a: int, b: int, room: int) -> tuple[int, int]:
    """Return how many tokens of each of two texts are kept, of ``room`` in all.

    The longer text is cut first. Where both are cut, the longer one keeps the odd token, and the
    second of two that are equally long (as the library tokenizers does).
    """
    short = min(a, b, room // 2)
    long = min(max(a, b), room - short)
    return (short, long) if a <= b else (long, short)


def _bytes_of_rows(
    counts: np.ndarray, ends: np.ndarray, sizes: np.ndarray, rows: int, length: int
) -> pa.Array:
    """Return (rows,) float32 bytes of each packed row.

    Args:
        counts: (k,) tokens of each document.
        ends: (k,) where each document ends.
        sizes: (k,) bytes of each document.
    """
    if not rows:
        return pa.array([], pa.float32())
    edges = np.minimum(np.arange(rows + 1) * length, ends[-1])
    document = np.minimum(np.searchsorted(ends, edges, side="right"), len(ends) - 1)
    inside = np.maximum(0, edges - (ends - counts)[document] - 1)
    until = (np.cumsum(sizes) - sizes)[document] + sizes[document] * inside / (counts[document] - 1)
    return pa.array(np.diff(until).astype(np.float32))
