"""Speech recognition by connectionist temporal classification (Graves et al. 2006): characters or
sub-words from the frames of a recording.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torchaudio.functional as audio
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.ragged import lengths, ragged
from pipeline.io import storage
from pipeline.media import transcripts
from pipeline.media.tagging_schemes import texts
from pipeline.nn import conv_arithmetic

BEAM_THRESHOLD = 50.0
"""A hypothesis whose logarithm is further below the best one's is dropped."""
SLACK = 0.02
"""Seconds by which a recording may be longer than is told: resampling and formats that tell
milliseconds round.
"""
SPACE = "|"
"""How a language model's file writes the space, which is no word of it."""


class CTCOptions(Options):
    units: Literal["characters", "subwords"] = Field(
        "characters",
        description="labels: the characters of the training transcripts, or sub-words of them "
        "(BPE)",
    )
    vocabulary: int = Field(
        256, ge=4, le=32767, description="subwords: how many labels at most, the blank with them"
    )
    case: Literal["upper", "lower", "keep"] = Field(
        "upper", description="transcripts are brought to this case, for training and for WER alike"
    )
    punctuation: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: marks and symbols go, but for apostrophes; dashes and slashes become "
        "spaces",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(False, description="layer norm without parameters before the linear layer")
    convolutions: int = Field(
        0,
        ge=0,
        le=16,
        description="convolutions of three frames before the linear layer, not causal, each with "
        "a ReLU (WaveNet's "
        "recogniser has a few, van den Oord et al. 2016)",
    )
    beam: int = Field(
        0,
        ge=0,
        le=10000,
        description="0: the likeliest label of each frame; else beam search over so many "
        "hypotheses, by flashlight-text",
    )
    lm: str | None = Field(
        None,
        description="beam search: an n-gram model of the labels, ARPA or KenLM's binary form, on "
        "this machine; each label is a word "
        "of it, the space is written |",
        json_schema_extra={"format": "uri-reference"},
    )
    lm_weight: float = Field(
        1.0,
        ge=0,
        description="beam search: weight of the language model's logarithms, which are of base 10",
    )
    word_score: float = Field(
        0.0,
        description="beam search: added to the score of a finished hypothesis for each of its "
        "words",
    )

    @model_validator(mode="after")
    def _lm_takes_part(self):
        if self.lm and not self.beam:
            raise ValueError(
                "lm: a language model takes part in beam search alone: set beam (100 is "
                "usual), or leave lm out"
            )
        return self


@register("objective", "ctc", options=CTCOptions)
class CTC(Objective):
    """A linear head on the tokens (frames) of a recording, trained by the sum over all alignments
    of its transcript.

    Columns: ``transcript``, a text. Tensors: ``transcript`` (B, L) int32 label numbers, from 1 on,
    and ``transcript_lengths`` (B,). Label 0 is the blank. The loss is summed over recordings and
    divided by their labels, so that it is nats a label whatever their lengths: each label weighs
    the same. A row without an alignment (more labels, and blanks between equal ones, than frames)
    counts for nothing; the log's ``dropped`` is how many labels such rows have, as a share of the
    others': rows are looked through before, so there are none but where speed perturbation
    shortened one.

    State: ``labels``, ``characters``, ``tokenizer`` (``transcripts.Alphabet``), ``normalization``
    (names of the rules), and of the backbone (``bind_to_backbone``) ``convolutions`` and ``rate``,
    from which a recording's frames follow.
    """

    roles = ("transcript",)
    fit_roles = ("transcript",)
    metrics = ("wer", "cer", "loss")
    log_names = ("dropped",)
    label_tensors = ("transcript", "transcript_lengths")
    raw_roles = ("transcript", "start")
    output_types = {
        "words": pa.list_(
            pa.struct({"word": pa.string(), "start": pa.float64(), "end": pa.float64()})
        )
    }

    @classmethod
    def fit(cls, options, table, columns):
        """Raises ValueError for a column of no texts, without any character, with more than 500 of
        them, or more than the vocabulary has room for.
        """
        rules = transcripts.rules_of(options.case, options.punctuation)
        found = [text for text in _normalised(table, columns, rules) if text]
        try:
            alphabet = (
                transcripts.Alphabet.of(found)
                if options.units == "characters"
                else transcripts.Alphabet.of_subwords(found, options.vocabulary)
            )
        except ValueError as error:
            raise ValueError(
                f"column {columns['transcript']}, the transcripts of {len(table)} training "
                f"rows: {error}"
            ) from None
        return {**alphabet.state(), "units": options.units, "normalization": rules}

    @classmethod
    def encode(cls, table, columns, state) -> Arrays:
        """``transcript``: (n,) ragged int32 label numbers; none for rows with characters that no
        training transcript has.
        """
        if columns.get("transcript") not in table.column_names:  # new rows to predict
            return {}
        alphabet = transcripts.Alphabet.from_state(state)
        read = _normalised(table, columns, state["normalization"])
        return {
            "transcript": ragged(
                alphabet.encode("" if alphabet.strange(text) else text) for text in read
            )
        }

    @classmethod
    def invalid_label_reasons(cls, table, columns, state):
        """Rows whose transcript is null or empty."""
        if columns.get("transcript") not in table.column_names:
            return [""] * len(table)
        return [
            "" if text else "the transcript is empty"
            for text in _normalised(table, columns, state["normalization"])
        ]

    @classmethod
    def bind_to_backbone(cls, state, backbone):
        """``convolutions`` and ``rate`` (samples a second). Raises ValueError for a backbone whose
        tokens are no frames of a recording.
        """
        _check(backbone)
        return {
            **state,
            "convolutions": [list(one) for one in backbone.convolutions or ()],
            "rate": int(backbone.arch["inputs"]["rate"]),
        }

    @classmethod
    def untrainable_reasons(cls, table, columns, state, arrays=None, seconds=None):
        """Rows whose transcript has characters that no training transcript has, and those with more
        labels than frames: each label takes one, and so does the blank between two equal ones.
        ``seconds`` are those of the recordings, give or take SLACK: what is closer is left to
        ``arrays``.
        """
        if columns.get("transcript") not in table.column_names:
            return None
        alphabet = transcripts.Alphabet.from_state(state)
        read = _normalised(table, columns, state["normalization"])
        samples = (
            lengths(arrays["audio"])
            if arrays is not None
            else np.where(seconds > 0, (seconds + SLACK) * state["rate"], 0).astype(np.int64)
        )
        out = [alphabet.strange(text) for text in read]
        labels: Any = (arrays or {}).get("transcript")  # what ``encode`` made of them
        if labels is None:
            labels = [
                alphabet.encode("" if strange else text)
                for text, strange in zip(read, out, strict=True)
            ]
        for i, (one, have, heard) in enumerate(
            zip(labels, conv_arithmetic.count(samples, state["convolutions"]), samples, strict=True)
        ):
            if heard and (need := len(one) + transcripts.repeats(one)) > have:
                out[i] = (
                    f"the transcript's {len(one)} labels need {need} frames, the recording has "
                    f"{have}"
                )
        return out

    def __init__(self, backbone: Backbone, options: CTCOptions, state: dict[str, Any]):
        super().__init__(backbone, options, state)
        width = _check(backbone)
        self.alphabet = transcripts.Alphabet.from_state(state)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=1) for _ in range(options.convolutions)
        )
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(width, len(state["labels"]))
        if options.beam:
            self._beam_search()

    def emissions(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, N, labels) float32 log probabilities and (B,) int64 how many frames of each row are
        its own.
        """
        features = backbone(batch, want=("tokens",))
        x, mask = features.tokens, features.mask
        assert x is not None and mask is not None
        if self.options.norm:
            x = F.layer_norm(x, x.shape[-1:])
        for convolution in self.convolutions:
            x = x.masked_fill(~mask[..., None], 0.0)  # what lies behind a row's end is not heard
            x = F.relu(convolution(x.transpose(1, 2)).transpose(1, 2))
        return self.head(self.dropout(x)).float().log_softmax(-1), mask.sum(1)

    def loss(self, backbone: Backbone, batch: Batch):
        log_probs, ends = self.emissions(backbone, batch)
        losses, counts, dropped = ctc_losses(
            log_probs, ends, batch["transcript"], batch["transcript_lengths"]
        )  # pyright: ignore[reportCallIssue]
        return losses.sum(), counts.sum().float(), {"dropped": dropped.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """``prediction`` (B, L) int32 label numbers, -1 behind them.

        With transcripts ``loss`` and its ``count`` (B,). Without them, for new recordings,
        ``confidence`` (B,), and ``first`` and ``last`` (B, L) int32, the frames that each label
        lies on in the likeliest alignment, -1 behind.
        """
        log_probs, ends = self.emissions(backbone, batch)
        labels = self._searched(log_probs, ends) if self.options.beam else greedy(log_probs, ends)
        out = {"prediction": labels}
        if "transcript" in batch.data:
            losses, counts, _ = ctc_losses(
                log_probs, ends, batch["transcript"], batch["transcript_lengths"]
            )  # pyright: ignore[reportCallIssue]
            return {**out, "loss": losses.masked_fill(counts == 0, 0.0), "count": counts.float()}
        count = (labels >= 0).sum(1)
        nats = ctc_losses(log_probs, ends, labels.clamp(min=0), count)[0]  # pyright: ignore
        first, last = aligned(log_probs, ends, labels)
        confidence = (-nats / count.clamp(min=1)).exp().masked_fill(ends == 0, float("nan"))
        return {**out, "confidence": confidence, "first": first, "last": last}

    def postprocess(self, found, raw_rows):
        """``word_errors``, ``words``, ``char_errors`` and ``chars`` (n,) against the rows' own
        normalised transcripts; without them as it is.
        """
        if raw_rows.columns.get("transcript") not in raw_rows.table.column_names:
            return found
        said = [self.alphabet.decode(labels) for labels in found["prediction"]]
        return {
            **found,
            **transcripts.errors(
                said, _normalised(raw_rows.table, raw_rows.columns, self.state["normalization"])
            ),
        }

    def output_columns(self, found, raw_rows):
        """``text``. ``confidence``: the probability that the model gives the text, over all its
        alignments, a label: the root of as many as it has labels. ``words``: lists of {word, start,
        end}, seconds of the recording; where a row is a piece of one (role ``start``), of the
        whole.
        """
        begins = np.zeros(len(found["prediction"]))
        if raw_rows.columns.get("start") in raw_rows.table.column_names:
            begins = np.array(
                [start or 0.0 for start in raw_rows.table[raw_rows.columns["start"]].to_pylist()],
                dtype=np.float64,
            )
            begins = np.where(np.isfinite(begins), begins, 0.0)
        said: Any = np.empty(len(begins), dtype=object)
        words: Any = np.empty(len(begins), dtype=object)
        for i, (labels, first, last) in enumerate(
            zip(found["prediction"], found["first"], found["last"], strict=True)
        ):
            there = labels >= 0
            placed = self.alphabet.words(labels[there], first[there], last[there])
            edges = (
                conv_arithmetic.seconds(
                    np.array([[a, b + 1] for _, a, b in placed]).reshape(-1, 2),
                    self.state["convolutions"],
                    self.state["rate"],
                )
                + begins[i]
            )
            said[i] = self.alphabet.decode(labels)
            words[i] = [
                {"word": word, "start": round(float(a), 4), "end": round(float(b), 4)}
                for (word, *_), (a, b) in zip(placed, edges, strict=True)
            ]
        return {"text": said, "confidence": found["confidence"], "words": words}

    # ---------------------------------------------------------------- beam search

    def _beam_search(self) -> _Search:
        return _search(
            self.alphabet.labels, self.options.beam, self.options.lm, self.options.lm_weight
        )

    def _searched(self, log_probs: Tensor, ends: Tensor) -> Tensor:
        """(B, L) int32, -1 behind: the best hypothesis of each row. Hypotheses are label sequences,
        each with the sum over its alignments in the beam.
        """
        found = []
        for emissions, end in zip(log_probs.cpu().contiguous(), ends.tolist(), strict=True):
            best: tuple[float, np.ndarray] = (float("-inf"), np.zeros(0, dtype=np.int32))
            ended = (
                self._beam_search().decoder.decode(emissions.data_ptr(), end, emissions.shape[1])
                if end
                else []
            )
            for one in ended:
                path = np.array(
                    one.tokens[1:-1], dtype=np.int32
                )  # without what stands before the first frame and behind the last one
                labels = path[np.append(True, path[1:] != path[:-1]) & (path > 0)]
                score = one.score + self.options.word_score * len(
                    self.alphabet.decode(labels).split()
                )
                best = max(best, (score, labels), key=lambda pair: pair[0])
            found.append(torch.from_numpy(best[1]))
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1).to(
            log_probs.device
        )


class _Search(NamedTuple):
    decoder: Any
    model: Any
    """The language model: the decoder does not keep it alive."""


@lru_cache(maxsize=4)
def _search(labels: tuple[str, ...], beam: int, lm: str | None, weight: float) -> _Search:
    """Once a process: a language model takes seconds to read. Raises ValueError without
    flashlight-text, for no such file or another kind of model.
    """
    try:
        from flashlight.lib.text import decoder as flashlight  # pyright: ignore
    except ImportError:
        raise ValueError(
            "objective.beam: beam search needs flashlight-text, which is not installed: uv "
            "sync --extra beam, or set beam: 0"
        ) from None
    model = _language_model(labels, lm) if lm else flashlight.ZeroLM()
    options = flashlight.LexiconFreeDecoderOptions(
        beam_size=beam,
        beam_size_token=len(labels),
        beam_threshold=BEAM_THRESHOLD,
        lm_weight=weight if lm else 0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=flashlight.CriterionType.CTC,
    )
    # no label is silence, which flashlight would take for one that was said before the first frame
    nothing = -1
    return _Search(flashlight.LexiconFreeDecoder(options, model, nothing, 0, []), model)


def _language_model(labels: tuple[str, ...], path: str) -> Any:
    from flashlight.lib.text.decoder.kenlm import KenLM  # pyright: ignore[reportMissingImports]
    from flashlight.lib.text.dictionary import Dictionary  # pyright: ignore[reportMissingImports]

    if storage.is_remote(path) or not storage.exists(path):
        raise ValueError(
            f"objective.lm: there is no file {path} on this machine; give the path of an ARPA "
            "or KenLM file, or leave lm out"
        )
    named = [SPACE if label == " " else label for label in labels]
    try:
        model = KenLM(path, Dictionary([*named, "\N{REPLACEMENT CHARACTER} no label"]))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"objective.lm: {path} is not readable as a language model: "
            f"{str(error).splitlines()[0]}"
        ) from None
    start = model.start(False)
    unknown = model.score(start, len(named))[1]
    strange = [
        name
        for number, name in enumerate(named)
        if number and model.score(start, number)[1] == unknown
    ]
    if len(strange) > len(labels) // 2:
        raise ValueError(
            f"objective.lm: {path} does not know {len(strange)} of {len(labels) - 1} labels "
            f"({', '.join(strange[:8])}): it must be a model of the "
            "labels, not of words; train it on the transcripts with a space between any two "
            f"labels, and {SPACE} for their own spaces"
        )
    return model


# ---------------------------------------------------------------- rows


def _check(backbone: Backbone) -> int:
    """The width of its tokens. Raises ValueError for a backbone whose tokens are no frames of a
    recording.
    """
    if backbone.token_dim is None or backbone.convolutions is None:
        raise ValueError(
            f"{backbone.arch['name']} gives no frames of a recording: ctc needs a backbone of "
            "speech (torchaudio/deepspeech, deepspeech2 or "
            "conformer, wavenet/wavenet, transformers/wav2vec2)"
        )
    return backbone.token_dim


def _normalised(table: pa.Table, columns: dict[str, str], rules: str) -> list[str]:
    """(n,) normalised transcripts, "" for nulls. Raises ValueError for a column of another type."""
    column = table[columns["transcript"]]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ):
        raise ValueError(
            f"column {columns['transcript']} holds {column.type}: transcripts are texts"
        )
    return [transcripts.normalised(text or "", rules) for text in texts(column)]


# ---------------------------------------------------------------- frames and labels


@torch.compiler.disable
def ctc_losses(
    log_probs: Tensor, ends: Tensor, labels: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) float32 nats, (B,) int64 labels that they are of, and (B,) int64 labels of rows that
    have no alignment: their loss and gradient are zero.

    log_probs: (B, N, C). ends: (B,) frames. labels: (B, L) whole numbers from 1 on. counts: (B,)
    labels.
    """
    labels, counts = labels.long(), counts.long()
    if not log_probs.shape[1]:
        log_probs = F.pad(log_probs, (0, 0, 0, 1))
    inside = torch.arange(labels.shape[1], device=labels.device) < counts[:, None]
    same = ((labels[:, 1:] == labels[:, :-1]) & inside[:, 1:]).sum(1)
    none = counts + same > ends
    with torch.autocast(log_probs.device.type, enabled=False):
        losses = F.ctc_loss(
            log_probs.float().transpose(0, 1),
            labels,
            ends,
            counts,
            reduction="none",
            zero_infinity=True,
        )
    return losses, counts.masked_fill(none, 0), counts.masked_fill(~none, 0)


def greedy(log_probs: Tensor, ends: Tensor) -> Tensor:
    """(B, L) int32 label numbers, -1 behind: the likeliest label of each frame, runs of one label
    taken once, blanks left out (best path decoding).
    """
    path = log_probs.argmax(-1)
    inside = torch.arange(path.shape[1], device=path.device) < ends[:, None]
    kept = (path != 0) & inside & (path != F.pad(path, (1, 0))[:, :-1])
    place = kept.cumsum(1) - 1
    out = torch.full(
        (len(path), int(kept.sum(1).max()) if path.numel() else 0),
        -1,
        dtype=torch.int32,
        device=path.device,
    )
    row, frame = kept.nonzero(as_tuple=True)
    out[row, place[row, frame]] = path[row, frame].to(torch.int32)
    return out


def aligned(log_probs: Tensor, ends: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """First and last frame of each label (B, L) int32 in the likeliest alignment (torchaudio's
    forced_align, a row at a time); -1 where no label is.
    """
    first, last = torch.full_like(labels, -1), torch.full_like(labels, -1)
    for i, (end, count) in enumerate(
        zip(ends.tolist(), (labels >= 0).sum(1).tolist(), strict=True)
    ):
        if count:
            path = audio.forced_align(
                log_probs[i : i + 1, :end].contiguous(), labels[i : i + 1, :count].contiguous()
            )[0][0]
            before, after = F.pad(path, (1, 0))[:-1], F.pad(path, (0, 1))[1:]
            first[i, :count] = ((path != 0) & (path != before)).nonzero()[:, 0].to(torch.int32)
            last[i, :count] = ((path != 0) & (path != after)).nonzero()[:, 0].to(torch.int32)
    return first, last
