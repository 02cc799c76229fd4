"""Tagging: one tag for each word of a row.

Named entities (BIO, BIOES), counted by span and type, or plain tags (part of speech). Shapes: B
rows of a batch, n rows of a table, N tokens, W = ``max_words`` words, L tags, T entity types.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, nearest, register
from pipeline.core.arrow_compute import pc
from pipeline.core.arrow_lists import is_list
from pipeline.core.contracts import Arrays, Backbone, Batch, Features, Objective
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.nn.linear_head import head_inputs
from pipeline.media.tagging_schemes import Tagset, check, scheme, texts

MAX_TAGS = int(np.iinfo(np.int16).max)


class TaggingOptions(Options):
    names: list[str] | dict[int | str, str] | None = Field(
        None,
        description="tags of a column of numbers: a list (by number from 0) or number: tag",
    )
    scheme: Literal["auto", "bio", "bioes", "none"] = Field(
        "auto",
        description="bio: B- opens an entity, I- continues it; bioes: E- ends it, S- is one of "
        "one word; none: tags are mere classes (part of speech); auto: what the training rows' "
        "tags are",
    )
    repair: bool = Field(
        False,
        description="rows whose tags break the scheme are read as conlleval reads them, an I- "
        "without a B- as a B- (so IOB1, the scheme of CoNLL-2003's own files, becomes BIO); "
        "false: such rows are left out and listed",
    )
    strict: bool = Field(
        False,
        description="only entities whose tags keep the scheme count (seqeval's strict mode); "
        "false: entities count as in conlleval",
    )
    max_words: int = Field(512, ge=1, le=16384, description="a row with more words is left out")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(
        False,
        description="layer norm without parameters before the linear layer; false: the head of "
        "Hugging Face's token classifiers, to which it is exported exactly",
    )


class TaggingState(TypedDict):
    """State of `Tagging`."""

    labels: list[str]
    """The tags, O first."""
    types: list[str]
    """Types of entities."""
    scheme: str
    """Option ``scheme``."""
    numbers: dict[str, str]
    """Number to tag, of a column of numbers."""
    repair: bool
    """Option ``repair``."""
    max_words: int
    """Option ``max_words``."""


@register("objective", "tagging", options=TaggingOptions)
class Tagging(Objective):
    """Tagging of words: a linear head on the first sub-token of each (Devlin et al. 2019).

    It needs lists of words with a tag for each. Use it to find names or other entities in
    texts, or parts of speech.

    The column ``tags`` is a list of texts or numbers, one for each word of the column ``text``,
    which is then a list of words.

    The loss is the cross entropy, summed over the words that have a position. Each word gets its
    likeliest tag by itself (no Viterbi). A word without a position (cut off, or nothing to the
    tokenizer) counts as predicted O: an entity there is missed. Without a scheme it counts as
    wrong.

    The primary metric follows from the scheme:

    - entity_f1, if tags open and close entities (CoNLL-2003). It is the micro average; words that
      were cut off lower its recall only.
    - word_accuracy, if tags are plain classes (part of speech, as Universal Dependencies counts
      it).

    entity_f1/NOUN is the value of one tag, NOUN.

    Tensors: ``words`` (B, N), the number of the word that begins at a position, else -1; ``tags``
    (B, W) int16, -1 where there is no word.
    """

    state: TaggingState
    roles = ("tags",)
    metrics = ("entity_f1", "word_accuracy", "loss")
    transformers_head = TransformersHead(
        "ForTokenClassification",
        tensors=(
            ("head.weight", "classifier.weight"),
            ("head.bias", "classifier.bias"),
        ),
        splits_words=True,
        linear_on="tokens",
    )
    log_names = ("accuracy",)
    raw_roles = ("text",)
    position_labels = ("classes",)
    label_kind = "position_classes"
    label_tensor = "tags"
    position_features = ("tokens",)
    output_types = {
        "tags": pa.list_(pa.string()),
        "entities": pa.list_(
            pa.struct(
                {
                    "type": pa.string(),
                    "first": pa.int32(),
                    "last": pa.int32(),
                    "text": pa.string(),
                    "start": pa.int32(),
                    "end": pa.int32(),
                }
            )
        ),
    }

    @classmethod
    def target_metrics(cls, options, state: TaggingState):
        """Judge plain classes by the share of words that are right, entities by their F1."""
        if state["scheme"] == "none":
            return ("word_accuracy", "entity_f1", "loss")
        return cls.metrics

    @classmethod
    def source_metrics(cls, options, state: TaggingState):
        return cls.target_metrics(options, state)

    @classmethod
    def fit(cls, options, table, columns) -> TaggingState:
        """Take the tags of the training rows, or those that option ``names`` names.

        Raises:
            ValueError: tags of no scheme, numbers without a name, names for a column of texts,
                or fewer than two tags.
        """
        name = columns["tags"]
        flat, _, is_numeric = _lists(table[name], name)
        tags = texts(pc.unique(flat).drop_null())
        numbers: dict[str, str] = {}
        if options.names is not None:
            if not is_numeric:
                raise ValueError(
                    f"objective.names: they are for a column of numbers, and column {name} holds "
                    "the tags themselves; leave them out"
                )
            numbers = _numbers(options.names, tags, name)
            tags = [*numbers.values()]
        try:
            kind = scheme(tags) if options.scheme == "auto" else options.scheme
            tagset = Tagset.of(tags, kind)
        except ValueError as error:
            raise ValueError(f"column {name}: {error}") from None
        if not 2 <= len(tagset.labels) <= MAX_TAGS:
            raise ValueError(
                f"column {name}: the training rows hold {len(tagset.labels)} different tags; "
                f"tagging needs 2 to {MAX_TAGS}"
            )
        return {
            "labels": [*tagset.labels],
            "types": [*tagset.types],
            "scheme": kind,
            "numbers": numbers,
            "repair": options.repair,
            "max_words": options.max_words,
        }

    @classmethod
    def encode(cls, table, columns, state: TaggingState) -> Arrays:
        """Return ``tags`` (n, W) int16, -1 where no word is, or its tag is null."""
        name = columns.get("tags", "")
        if name not in table.column_names:  # new rows to predict
            return {}
        most = state["max_words"]
        flat, lengths, _ = _lists(table[name], name)
        values = _label_numbers(flat, name, state)
        row = np.repeat(np.arange(len(table)), lengths)
        first_of_row = np.cumsum(lengths) - lengths
        word = np.arange(len(values)) - np.repeat(first_of_row, lengths)
        kept = word < most
        tags = np.full((len(table), most), -1, dtype=np.int16)
        tags[row[kept], word[kept]] = values[kept]
        if state["repair"]:
            longest = int(word[kept].max(initial=-1)) + 1
            tags[:, :longest] = _tagset(state).repaired(tags[:, :longest])
        return {"tags": tags}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: TaggingState):
        """Name rows with a null, other words than tags, too many words, or a broken scheme."""
        if columns.get("tags") not in table.column_names:
            return [""] * len(table)
        num_words: list[int | None] = [None] * len(table)
        if columns.get("text") in table.column_names:
            column = table[columns["text"]]
            if not is_list(column.type):
                raise ValueError(
                    f"column {columns['text']} holds {column.type}: tagging reads a list of "
                    "words, one for each tag"
                )
            num_words = pc.list_value_length(column).to_pylist()
        rows = texts(_lists(table[columns["tags"]], columns["tags"], flat=False)[0])
        pairs = zip(rows, num_words, strict=True)
        return [_invalid_tags_reason(tags, count, state) for tags, count in pairs]

    @classmethod
    def check_test(cls, options, table, columns, state: TaggingState):
        """With a scheme, some row must hold an entity."""
        if not len(table) or state["scheme"] == "none":
            return
        if cls.encode(table, columns, state)["tags"].max() <= 0:
            raise ValueError(
                f"column {columns['tags']}: none of these {len(table)} rows holds an entity, so "
                "entity_f1 has no value"
            )

    def __init__(self, backbone: Backbone, options: TaggingOptions, state: TaggingState):
        super().__init__(backbone, options, state)
        if backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch.name} gives no tokens: tagging needs a backbone of texts "
                "(transformers/bert)"
            )
        self.tagset = _tagset(state)
        self.head = nn.Linear(backbone.token_dim, len(state["labels"]))

    # ---------------------------------------------------------------- loss and predictions

    def head_scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Features]:
        """Return logits (B, N, L), and the features."""
        if "words" not in batch.data:
            raise ValueError(
                "tagging reads a list of words a row, and these rows are whole texts; name a "
                "column of lists (columns: {text: NAME})"
            )
        features = backbone(batch, want=("tokens",))
        return self._scores(features), features

    def _scores(self, features: Features) -> Tensor:
        assert features.tokens is not None
        tokens = head_inputs(features.tokens, self.options, self.training)
        return self.head(tokens).float()

    def logits(self, backbone, batch):
        return self._scores(backbone(batch, want=("tokens",)))

    def raw_outputs(self, backbone, batch):
        """`scores` (B, N, L): one for each of `labels`, at every token.

        The tag of a word is the one with the highest score at the word's first token.
        """
        return {"scores": self.logits(backbone, batch)}

    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, N) losses, and the tag numbers (B, N) of the words that begin there.

        -100 where no word begins.
        """
        truth = self._truth(batch)
        losses = F.cross_entropy(
            scores.flatten(0, 1), truth.flatten(), reduction="none", ignore_index=-100
        )
        return losses.view_as(truth), truth

    def _truth(self, batch: Batch) -> Tensor:
        """Return the tag numbers (B, N) of the words that begin at a position, else -100."""
        words, tags = batch["words"].long(), batch["tags"].long()
        begins = (words >= 0) & (words < tags.shape[1])
        truth = tags.gather(1, torch.where(begins, words, 0))
        return torch.where(begins & (truth >= 0), truth, -100)

    def labelled_positions(self, features: Features, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (m, D) tokens that begin a word, (m,) their tag numbers, and (m,) their rows.

        Rows are places in the batch.
        """
        truth, tokens = self._truth(batch), features.tokens
        assert tokens is not None
        is_word = truth >= 0
        return tokens[is_word].float(), truth[is_word], is_word.nonzero()[:, 0]

    def loss(self, backbone: Backbone, batch: Batch):
        scores, features = self.head_scores(backbone, batch)
        losses, truth = self._losses(scores, batch)
        # a pooler is part of the graph: DDP waits for every parameter's gradient
        unused = features.pooled.float().sum() * 0.0
        logs = {"accuracy": (scores.argmax(-1) == truth).sum()}
        return losses.sum() + unused, (truth >= 0).sum().float(), logs

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``prediction`` (B, W) int16 tag numbers, -1 where no word is known.

        With tags ``hits``, ``guessed`` and ``actual`` (B, T), entities by type; ``right`` of
        ``words`` (B,); and ``loss`` with its ``count`` (B,).
        """
        scores, _ = self.head_scores(backbone, batch)
        words = batch["words"].long()
        most = self.state["max_words"]
        has_word = (words >= 0) & (words < most)
        row, position = has_word.nonzero(as_tuple=True)
        guess = torch.full(
            (len(batch), most),
            -1,
            dtype=torch.int16,
            device=scores.device,
        )
        word = words[row, position]
        tag = scores.argmax(-1)[row, position]
        guess[row, word] = tag.to(torch.int16)
        if "tags" not in batch.data:
            return {"prediction": guess}
        tags = batch["tags"]
        is_word = tags >= 0
        if self.tagset.scheme != "none":
            guess = torch.where((guess < 0) & is_word, 0, guess)
        losses, truth = self._losses(scores, batch)
        known = {"loss": losses.sum(1), "count": (truth >= 0).sum(1).float()}
        return {**self._compare(guess, tags), **known}

    def predict_scores(self, scores: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return what `predict` does, of logits (B, W, L) of each word."""
        tags = batch["tags"].long()
        guess = torch.where(tags >= 0, scores.argmax(-1), -1).to(torch.int16)
        losses = F.cross_entropy(
            scores.flatten(0, 1), tags.flatten(), reduction="none", ignore_index=-1
        )
        loss = losses.view_as(tags).sum(1)
        known = {"loss": loss, "count": (tags >= 0).sum(1).float()}
        return {**self._compare(guess, batch["tags"]), **known}

    def _compare(self, guess: Tensor, tags: Tensor) -> dict[str, Tensor]:
        """Return the guessed tags (B, W), and what is right of them."""
        is_word = tags >= 0
        counts = self.tagset.counts(
            guess.cpu().numpy(),
            tags.cpu().numpy(),
            self.options.strict,
        )
        hits, guessed, actual = (torch.from_numpy(count).to(tags.device) for count in counts)
        return {
            "prediction": guess,
            "hits": hits,
            "guessed": guessed,
            "actual": actual,
            "right": ((guess == tags) & is_word).sum(1),
            "words": is_word.sum(1),
        }

    def output_columns(self, predictions, raw_rows):
        """Return ``tags``, the name of each word's tag, and with a scheme ``entities``.

        The tag of a word that has no position (cut off, or nothing to the tokenizer) is null.
        Entities are lists of {type, first, last, text, start, end}, words numbered from 0. Start
        and end are characters of the words joined by one space, as other tools mark spans.
        """
        texts_of_rows = [row or [] for row in texts(raw_rows.table[raw_rows.columns["text"]])]
        names = np.array([*self.state["labels"], None], dtype=object)
        tags: Any = np.empty(len(texts_of_rows), dtype=object)
        entities: Any = np.empty(len(texts_of_rows), dtype=object)
        pairs = zip(texts_of_rows, predictions["prediction"], strict=True)
        for row, (words, numbers) in enumerate(pairs):
            missing = max(0, len(words) - len(numbers))
            numbers = np.pad(numbers[: len(words)], (0, missing), constant_values=-1)
            tags[row] = names[numbers].tolist()
            entities[row] = []
        if self.tagset.scheme == "none":
            return {"tags": tags}
        chunks = self.tagset.chunks(predictions["prediction"], self.options.strict)
        for row, first, last, kind in zip(*chunks, strict=True):
            before = texts_of_rows[row][:first]
            text = " ".join(str(word) for word in texts_of_rows[row][first : last + 1])
            start = sum(len(str(word)) + 1 for word in before)
            entities[row].append(
                {
                    "type": self.state["types"][kind],
                    "first": int(first),
                    "last": int(last),
                    "text": text,
                    "start": start,
                    "end": start + len(text),
                }
            )
        return {"tags": tags, "entities": entities}


# ---------------------------------------------------------------- rows


def _tagset(state: TaggingState) -> Tagset:
    return Tagset(tuple(state["labels"]), tuple(state["types"]), state["scheme"])


def _numbers(
    names: list[str] | dict[int | str, str], of_rows: list[str], column: str
) -> dict[str, str]:
    """Return the tag of each number, as texts.

    Args:
        names: option ``names``.
        of_rows: the numbers that the training rows have.

    Raises:
        ValueError: a number without a name, or two of one name.
    """
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    numbers = {str(number): tag for number, tag in pairs}
    unknown = sorted((number for number in of_rows if number not in numbers), key=int)
    if unknown:
        raise ValueError(
            f"column {column}: tag {unknown[0]} of the training rows has no name in "
            f"objective.names ({len(numbers)} names)"
        )
    if len(set(numbers.values())) < len(numbers):
        raise ValueError("objective.names: two numbers have the same tag")
    return numbers


def _lists(
    column: pa.ChunkedArray, name: str, flat: bool = True
) -> tuple[pa.Array, np.ndarray, bool]:
    """Return the tags as texts, how many each row has (n,), and whether they were numbers.

    Args:
        flat: (m,) the tags of all rows one after the other; else a list a row.

    Raises:
        ValueError: a column of another type.
    """
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.string()))
    inner = column.type.value_type if is_list(column.type) else None
    if inner is not None and pa.types.is_dictionary(inner):
        inner = inner.value_type
    is_tag = (pa.types.is_integer, pa.types.is_null, pa.types.is_string, pa.types.is_large_string)
    if inner is None or not any(fits(inner) for fits in is_tag):
        raise ValueError(
            f"column {name} holds {column.type}: tags are a list of texts or whole numbers, one "
            "for each word"
        )
    array = column.cast(pa.large_list(pa.string())).combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(array), 0)
    lengths = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    tags = pc.list_flatten(array) if flat else array
    return tags, lengths, pa.types.is_integer(inner)


def _label_numbers(flat: pa.Array, name: str, state: TaggingState) -> np.ndarray:
    """Return (m,) label numbers of tags (m,), -1 for a null.

    Raises:
        ValueError: a tag that is not known.
    """
    known = state["numbers"] or {label: label for label in state["labels"]}
    positions = pc.index_in(
        flat,
        value_set=pa.array([*known], pa.string()),
        skip_nulls=True,
    )
    is_unknown = pc.and_(pc.is_null(positions), pc.is_valid(flat))
    if pc.any(is_unknown).as_py():
        value = texts(flat.filter(is_unknown).slice(0, 1))[0]
        raise ValueError(
            f"column {name}: tag {value!r} is in no training row, nor in objective.names "
            f"({len(known)} tags known); {nearest(value, known)}"
        )
    number_of_tags = [state["labels"].index(tag) for tag in known.values()]
    numbers = np.array([*number_of_tags, -1])
    indices = pc.fill_null(positions, -1)
    return numbers[indices.to_numpy(zero_copy_only=False)]


def _invalid_tags_reason(
    tags: list[str | None] | None, num_words: int | None, state: TaggingState
) -> str:
    """Return "" or why the tags of a row cannot be used."""
    if tags is None:
        return "its tags are null"
    if num_words is not None and num_words != len(tags):
        return f"{num_words} words, but {len(tags)} tags"
    if not tags:
        return "it has no words"
    if len(tags) > state["max_words"]:
        return f"{len(tags)} words, more than objective.max_words={state['max_words']}"
    if None in tags:
        return f"the tag of word {tags.index(None)} is null"
    if state["repair"]:
        return ""
    names = [state["numbers"].get(tag, tag) for tag in tags if tag is not None]
    broken = check(names, state["scheme"])
    return f"{broken}; objective.repair: true reads such rows" if broken else ""
