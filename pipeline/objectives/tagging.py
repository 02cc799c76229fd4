"""Tagging: one tag for each word of a row; named entities (BIO, BIOES) counted by span and type, or
plain tags (part of speech).
"""

from __future__ import annotations

from typing import Any, Literal

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
from pipeline.media.tagging_schemes import Tagset, check, scheme, texts

MOST_TAGS = int(np.iinfo(np.int16).max)


class TaggingOptions(Options):
    names: list[str] | dict[int | str, str] | None = Field(
        None, description="tags of a column of numbers: a list (by number from 0) or number: tag"
    )
    scheme: Literal["auto", "bio", "bioes", "none"] = Field(
        "auto",
        description="bio: B- opens an entity, I- goes on with it; bioes: E- ends it, S- is one of "
        "one word; none: tags are mere classes (part of speech); auto: what the training "
        "rows' tags are",
    )
    repair: bool = Field(
        False,
        description="rows whose tags break the scheme are read as conlleval reads them, an I- "
        "without a B- as a B- (so IOB1, the "
        "scheme of CoNLL-2003's own files, becomes BIO); false: such rows are left out and listed",
    )
    strict: bool = Field(
        False,
        description="entities are counted where their tags keep the scheme (seqeval's strict "
        "mode); false: as conlleval counts them",
    )
    max_words: int = Field(512, ge=1, le=16384, description="a row with more words is left out")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(
        False,
        description="layer norm without parameters before the linear layer; false: the head of "
        "Hugging Face's token classifiers, to "
        "which it is exported exactly",
    )


@register("objective", "tagging", options=TaggingOptions)
class Tagging(Objective):
    """A linear head on the first sub-token of every word (Devlin et al. 2019); the likeliest tag of
    each word by itself (no Viterbi).

    Columns: ``tags``, a list of texts or numbers, one for each word of the modality's ``text``, a
    list of words. Tensors: ``words`` (B, N), the number of the word that begins at a position, else
    -1; ``tags`` (B, max_words) int16, -1 where no word is. The loss is the cross entropy summed
    over words that have a position. A word without one (cut off, or nothing to the tokenizer) is
    predicted O, so an entity there is missed; without a scheme it is wrong. The primary metric
    follows from the scheme: entity_f1 where tags open and close entities (CoNLL-2003),
    word_accuracy where they are plain classes (part of speech, as Universal Dependencies counts
    it). There entity_f1 is the micro average over words that have a position, which is no fair
    headline: words that were cut off lower its recall alone; entity_f1/NOUN is that of one tag.

    State: ``labels`` (the tags, O first), ``types``, ``scheme``, ``numbers`` (number to tag) and
    the options that ``encode`` reads.
    """

    roles = ("tags",)
    fit_roles = ("tags",)
    metrics = ("entity_f1", "word_accuracy", "loss")
    log_names = ("accuracy",)
    label_tensors = ("tags",)
    output_types = {
        "tags": pa.list_(pa.string()),
        "entities": pa.list_(
            pa.struct(
                {"type": pa.string(), "first": pa.int32(), "last": pa.int32(), "text": pa.string()}
            )
        ),
    }

    @classmethod
    def target_metrics(cls, options, state):
        """Plain classes are judged by the share of words that are right, entities by their F1."""
        return ("word_accuracy", "entity_f1", "loss") if state["scheme"] == "none" else cls.metrics

    @classmethod
    def source_metrics(cls, options, state):
        return cls.target_metrics(options, state)

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError for tags of no scheme, numbers without a name, names for a column of
        texts, fewer than two tags.
        """
        name = columns["tags"]
        flat, _, numeric = _lists(table[name], name)
        found = texts(pc.unique(flat).drop_null())
        numbers: dict[str, str] = {}
        if options.names is not None:
            if not numeric:
                raise ValueError(
                    f"objective.names: they are for a column of numbers, and column {name} "
                    "holds the tags themselves; leave them out"
                )
            pairs = (
                options.names.items()
                if isinstance(options.names, dict)
                else enumerate(options.names)
            )
            numbers = {str(number): tag for number, tag in pairs}
            unknown = sorted((value for value in found if value not in numbers), key=int)
            if unknown:
                raise ValueError(
                    f"column {name}: tag {unknown[0]} of the training rows has no name in "
                    f"objective.names ({len(numbers)} names)"
                )
            if len(set(numbers.values())) < len(numbers):
                raise ValueError("objective.names: two numbers have the same tag")
            found = [*numbers.values()]
        try:
            kind = scheme(found) if options.scheme == "auto" else options.scheme
            tagset = Tagset.of(found, kind)
        except ValueError as error:
            raise ValueError(f"column {name}: {error}") from None
        if not 2 <= len(tagset.labels) <= MOST_TAGS:
            raise ValueError(
                f"column {name}: the training rows hold {len(tagset.labels)} different tags; "
                f"tagging needs 2 to {MOST_TAGS}"
            )
        return {
            "labels": [*tagset.labels],
            "types": [*tagset.types],
            "scheme": kind,
            "numbers": numbers,
            **options.model_dump(include={"repair", "max_words"}),
        }

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """``tags`` (n, max_words) int16, -1 where no word is, or its tag is null."""
        if columns.get("tags") not in table.column_names:  # new rows to predict
            return {}
        flat, lengths, _ = _lists(table[columns["tags"]], columns["tags"])
        values = _numbered(flat, columns["tags"], state)
        row = np.repeat(np.arange(len(table)), lengths)
        word = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = word < state["max_words"]
        tags = np.full((len(table), state["max_words"]), -1, dtype=np.int16)
        tags[row[kept], word[kept]] = values[kept]
        if state["repair"]:
            longest = int(word[kept].max(initial=-1)) + 1
            tags[:, :longest] = _tagset(state).repaired(tags[:, :longest])
        return {"tags": tags}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Rows with a null, with other words than tags, with too many words, or whose tags break
        the scheme.
        """
        if columns.get("tags") not in table.column_names:
            return [""] * len(table)
        words: list[int | None] = [None] * len(table)
        if columns.get("text") in table.column_names:
            column = table[columns["text"]]
            if not is_list(column.type):
                raise ValueError(
                    f"column {columns['text']} holds {column.type}: tagging reads a list of "
                    "words, one for each tag"
                )
            words = pc.list_value_length(column).to_pylist()
        rows = texts(_lists(table[columns["tags"]], columns["tags"], flat=False)[0])
        return [_row_problem(tags, count, state) for tags, count in zip(rows, words, strict=True)]

    @classmethod
    def check_test(cls, options, table, columns, state):
        if (
            len(table)
            and state["scheme"] != "none"
            and cls.encode(table, columns, state)["tags"].max() <= 0
        ):
            raise ValueError(
                f"column {columns['tags']}: none of these {len(table)} rows holds an entity, "
                "so entity_f1 has no value"
            )

    def __init__(self, backbone: Backbone, options: TaggingOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        if backbone.token_dim is None:
            raise ValueError(
                f"{backbone.arch['name']} gives no tokens: tagging needs a backbone of texts "
                "(transformers/bert)"
            )
        self.tagset = _tagset(state)
        self.head = nn.Linear(backbone.token_dim, len(state["labels"]))

    def _scores(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Features]:
        """(B, N, L)."""
        if "words" not in batch.data:
            raise ValueError(
                "tagging reads a list of words a row, and these rows are whole texts; name a "
                "column of lists (columns: {text: NAME})"
            )
        features = backbone(batch, want=("tokens",))
        tokens = features.tokens
        assert tokens is not None
        if self.options.norm:
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return self.head(F.dropout(tokens, self.options.dropout, self.training)).float(), features

    def _losses(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, N) losses and the tag numbers (B, N) of the words that begin at each position, -100
        elsewhere.
        """
        words, tags = batch["words"].long(), batch["tags"].long()
        there = (words >= 0) & (words < tags.shape[1])
        truth = tags.gather(1, torch.where(there, words, 0))
        truth = torch.where(there & (truth >= 0), truth, -100)
        return F.cross_entropy(
            scores.flatten(0, 1), truth.flatten(), reduction="none", ignore_index=-100
        ).view_as(truth), truth

    def loss(self, backbone: Backbone, batch: Batch):
        scores, features = self._scores(backbone, batch)
        losses, truth = self._losses(scores, batch)
        unused = (
            features.pooled.float().sum() * 0.0
        )  # a pooler belongs to the graph too: DDP waits for every parameter
        return (
            losses.sum() + unused,
            (truth >= 0).sum().float(),
            {"accuracy": (scores.argmax(-1) == truth).sum()},
        )

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``prediction`` (B, max_words) int16 tag numbers, -1 where no word is known. With tags
        ``hits``, ``guessed``, ``actual`` (B, T) entities by type, ``right`` of ``words`` (B,), and
        ``loss`` with its ``count`` (B,).
        """
        scores, _ = self._scores(backbone, batch)
        words = batch["words"].long()
        row, place = ((words >= 0) & (words < self.state["max_words"])).nonzero(as_tuple=True)
        guess = torch.full(
            (len(batch), self.state["max_words"]), -1, dtype=torch.int16, device=scores.device
        )
        guess[row, words[row, place]] = scores.argmax(-1)[row, place].to(torch.int16)
        if "tags" not in batch.data:
            return {"prediction": guess}
        tags = batch["tags"]
        if self.tagset.scheme != "none":
            guess = torch.where((guess < 0) & (tags >= 0), 0, guess)
        losses, truth = self._losses(scores, batch)
        counted = self.tagset.counts(guess.cpu().numpy(), tags.cpu().numpy(), self.options.strict)
        hits, guessed, actual = (torch.from_numpy(count).to(scores.device) for count in counted)
        return {
            "prediction": guess,
            "hits": hits,
            "guessed": guessed,
            "actual": actual,
            "right": ((guess == tags) & (tags >= 0)).sum(1),
            "words": (tags >= 0).sum(1),
            "loss": losses.sum(1),
            "count": (truth >= 0).sum(1).float(),
        }

    def output_columns(self, found, raw_rows):
        """``tags``: the name of each word's tag (without a scheme null for a word that has no
        position). With a scheme ``entities``: lists of {type, first, last, text}, words numbered
        from 0.
        """
        rows = [row or [] for row in texts(raw_rows.table[raw_rows.columns["text"]])]
        plain = self.tagset.scheme == "none"
        named = np.array([*self.state["labels"], None if plain else "O"], dtype=object)
        tags: Any = np.empty(len(rows), dtype=object)
        entities: Any = np.empty(len(rows), dtype=object)
        for i, (words, numbers) in enumerate(zip(rows, found["prediction"], strict=True)):
            numbers = np.pad(
                numbers[: len(words)], (0, max(0, len(words) - len(numbers))), constant_values=-1
            )
            tags[i], entities[i] = named[numbers].tolist(), []
        if plain:
            return {"tags": tags}
        for row, first, last, kind in zip(
            *self.tagset.chunks(found["prediction"], self.options.strict), strict=True
        ):
            text = " ".join(str(word) for word in rows[row][first : last + 1])
            entities[row].append(
                {
                    "type": self.state["types"][kind],
                    "first": int(first),
                    "last": int(last),
                    "text": text,
                }
            )
        return {"tags": tags, "entities": entities}


# ---------------------------------------------------------------- rows


def _tagset(state: dict[str, Any]) -> Tagset:
    return Tagset(tuple(state["labels"]), tuple(state["types"]), state["scheme"])


def _lists(
    column: pa.ChunkedArray, name: str, flat: bool = True
) -> tuple[pa.Array, np.ndarray, bool]:
    """(m,) texts, the tags of all rows one behind the other (``flat``; else a list a row), (n,) how
    many each row has, and whether they were numbers.

    Raises ValueError for a column of another type.
    """
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.string()))
    inner = column.type.value_type if is_list(column.type) else None
    if inner is not None and pa.types.is_dictionary(inner):
        inner = inner.value_type
    numeric = inner is not None and pa.types.is_integer(inner)
    if inner is None or not (
        numeric
        or pa.types.is_null(inner)
        or pa.types.is_string(inner)
        or pa.types.is_large_string(inner)
    ):
        raise ValueError(
            f"column {name} holds {column.type}: tags are a list of texts or whole numbers, "
            "one for each word"
        )
    whole = column.cast(pa.large_list(pa.string())).combine_chunks()
    lengths = (
        pc.fill_null(pc.list_value_length(whole), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )  # pyright: ignore[reportAttributeAccessIssue]
    return (pc.list_flatten(whole) if flat else whole), lengths, numeric


def _numbered(flat: pa.Array, name: str, state: dict[str, Any]) -> np.ndarray:
    """(m,) label numbers, -1 for a null. Raises ValueError for a tag that is not known."""
    known = state["numbers"] or {label: label for label in state["labels"]}
    # pyright: ignore
    found = pc.index_in(flat, value_set=pa.array([*known], pa.string()), skip_nulls=True)
    lost = pc.and_(pc.is_null(found), pc.is_valid(flat))
    if pc.any(lost).as_py():
        value = texts(flat.filter(lost).slice(0, 1))[0]
        raise ValueError(
            f"column {name}: tag {value!r} never stands in the training rows (nor in "
            f"objective.names); {nearest(value, known)} "
            f"({len(known)} known)"
        )
    numbers = np.array([*(state["labels"].index(tag) for tag in known.values()), -1])
    return numbers[pc.fill_null(found, -1).to_numpy(zero_copy_only=False)]


def _row_problem(tags: list[str | None] | None, words: int | None, state: dict[str, Any]) -> str:
    if tags is None:
        return "its tags are null"
    if words is not None and words != len(tags):
        return f"{words} words, but {len(tags)} tags"
    if not tags:
        return "it has no words"
    if len(tags) > state["max_words"]:
        return f"{len(tags)} words, more than objective.max_words={state['max_words']}"
    if None in tags:
        return f"the tag of word {tags.index(None)} is null"
    broken = (
        ""
        if state["repair"]
        else check(
            [state["numbers"].get(tag, tag) for tag in tags if tag is not None], state["scheme"]
        )
    )
    return f"{broken}; objective.repair: true reads such rows" if broken else ""
