"""Speech recognition by connectionist temporal classification (CTC; Graves et al. 2006).

Characters or sub-words from the frames of a recording. Shapes: B rows of a batch, n rows of a
table, N frames, L labels of a transcript, C different labels.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
import torchaudio.functional as audio
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import extras
from pipeline.config.registry import Options, register
from pipeline.core.arrow_lists import is_bytes, is_text
from pipeline.core.contracts import Arrays, Backbone, Batch, Objective
from pipeline.core.contracts.objective_capabilities import TransformersHead
from pipeline.core.nn import conv_arithmetic
from pipeline.core.nn.eager import eager
from pipeline.core.ragged import lengths, ragged
from pipeline.media import language_model, transcripts
from pipeline.media.tagging_schemes import texts
from pipeline.media.words import UNSPACED, are_segmented

BEAM_THRESHOLD = 50.0
"""A hypothesis whose log score is further below the best one's is dropped."""
SLACK = 0.02
"""Seconds by which a recording may be longer than its column says.

Resampling, and formats that keep milliseconds, round.
"""


class CTCOptions(Options):
    units: Literal["characters", "subwords"] = Field(
        "characters",
        description="what a label is: a character of the training transcripts, or a sub-word (BPE)",
    )
    vocabulary: int = Field(
        256, ge=4, le=32767, description="subwords: how many labels at most, the blank included"
    )
    case: Literal["upper", "lower", "keep"] = Field(
        "upper",
        description="transcripts are brought to this case, for training and for WER alike",
    )
    punctuation: Literal["drop", "keep"] = Field(
        "drop",
        description="drop: marks and symbols are removed, but for apostrophes; dashes and slashes "
        "become spaces",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the linear layer")
    norm: bool = Field(False, description="layer norm without parameters before the linear layer")
    convolutions: int = Field(
        0,
        ge=0,
        le=16,
        description="convolutions of three frames before the linear layer, not causal, each with "
        "a ReLU (WaveNet's recogniser has a few, van den Oord et al. 2016)",
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
        description="beam search: an n-gram model of the labels, ARPA or KenLM's binary form; each "
        "label is a word of it, the space is written |. Bundles hold a file of up to 16 MiB, of a "
        "larger one the checksum: it must then be on each machine",
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
    def _lm_needs_beam(self):
        if self.lm and not self.beam:
            raise ValueError(
                "lm: a language model takes part in beam search alone: set beam (100 is usual), "
                "or leave lm out"
            )
        return self


class TranscriptState(transcripts.AlphabetState):
    """What the transcripts say."""

    units: str
    """Option ``units``."""
    normalization: str
    """Names of the rules."""
    segmented: NotRequired[bool]
    """True where transcripts in a script without spaces have spaces between words, else absent."""
    lm: NotRequired[dict[str, Any]]
    """`language_model.FileCopy` of option ``lm``; bundles of earlier versions have none."""


class CTCState(TranscriptState):
    """State of `CTC`: also what the backbone says, from which a recording's frames follow."""

    convolutions: list[list[int]]
    rate: int
    """Samples a second."""


class TimedWord(TypedDict):
    """A word that was recognised, and the seconds between which it was said."""

    word: str
    start: float
    end: float


@register("objective", "ctc", options=CTCOptions)
class CTC(Objective):
    """Speech recognition with CTC: a linear head on frames, over all alignments of a transcript.

    It needs recordings with transcripts. Use it to recognise speech; no times of words or
    letters are needed. Graves et al. 2006, "Connectionist Temporal Classification".

    Columns: ``transcript``, a text. Tensors: ``transcript`` (B, L) int32 label numbers, from 1
    on, and ``transcript_lengths`` (B,). Label 0 is the blank.

    The loss is summed over recordings and divided by the number of their labels. So it is in nats
    per label, and each label has the same weight. A row without an alignment (fewer frames than
    labels, with the blanks between equal ones) has no weight. Such rows are left out before
    training, so in training they occur only where speed perturbation shortened a row. Logged:
    ``dropped``, the number of their labels as a share of the others'.
    """

    state: CTCState
    roles = ("transcript",)
    metrics = ("wer", "cer", "loss")
    transformers_head = TransformersHead(
        "ForCTC",
        tensors=(
            ("head.weight", "lm_head.weight"),
            ("head.bias", "lm_head.bias"),
        ),
    )
    log_names = ("dropped",)
    labels_are_letters = True
    raw_roles = ("transcript", "start")
    output_types = {
        "words": pa.list_(
            pa.struct({"word": pa.string(), "start": pa.float64(), "end": pa.float64()})
        )
    }

    @classmethod
    def target_metrics(cls, options, state: TranscriptState):
        """Judge by the character error rate where no space is between words, as in Chinese: each
        transcript would be one word.
        """
        has_words = state.get("segmented") or not UNSPACED.search(state["characters"])
        return cls.metrics if has_words else ("cer", "wer", "loss")

    @classmethod
    def source_metrics(cls, options, state: TranscriptState):
        return cls.target_metrics(options, state)

    @classmethod
    def fit(cls, options, table, columns) -> TranscriptState:
        """Take the labels of the training transcripts.

        Raises:
            ValueError: a column of no texts, no character at all, more than 500 of them, or more
                than the vocabulary has room for.
        """
        rules = transcripts.rules_of(options.case, options.punctuation)
        known_texts = [text for text in _normalised(table, columns, rules) if text]
        try:
            if options.units == "characters":
                alphabet = transcripts.Alphabet.of(known_texts)
            else:
                alphabet = transcripts.Alphabet.of_subwords(known_texts, options.vocabulary)
        except ValueError as error:
            raise ValueError(
                f"column {columns['transcript']}, the transcripts of {len(table)} training rows: "
                f"{error}"
            ) from None
        state: TranscriptState = {
            **alphabet.state(),
            "units": options.units,
            "normalization": rules,
        }
        if are_segmented(known_texts):
            state["segmented"] = True
        if options.lm:
            state["lm"] = language_model.copy_file(options.lm)._asdict()
        return state

    @classmethod
    def encode(cls, table, columns, state: CTCState) -> Arrays:
        """Return ``transcript`` (n,) ragged int32 label numbers.

        Empty for rows with characters that no training transcript has.
        """
        if columns.get("transcript") not in table.column_names:  # new rows to predict
            return {}
        alphabet = transcripts.Alphabet.from_state(state)
        normalised = _normalised(table, columns, state["normalization"])
        known = ["" if alphabet.describe_unknown(text) else text for text in normalised]
        return {"transcript": ragged(alphabet.encode(text) for text in known)}

    @classmethod
    def invalid_label_reasons(cls, table, columns, state: CTCState):
        """Name rows whose transcript is null or empty."""
        if columns.get("transcript") not in table.column_names:
            return [""] * len(table)
        normalised = _normalised(table, columns, state["normalization"])
        return ["" if text else "the transcript is empty" for text in normalised]

    @classmethod
    def bind_to_backbone(cls, state: TranscriptState, backbone) -> CTCState:
        """Add ``convolutions`` and ``rate`` (samples a second).

        Raises:
            ValueError: a backbone whose tokens are not frames of a recording.
        """
        _check_backbone(backbone)
        convolutions = [list(one) for one in backbone.convolutions or ()]
        rate = int(backbone.arch.inputs["rate"])
        return {**state, "convolutions": convolutions, "rate": rate}

    @classmethod
    def untrainable_reasons(cls, table, columns, state: CTCState, arrays=None, seconds=None):
        """Name rows with unknown characters, and those with more labels than frames.

        Each label takes a frame, and so does the blank between two equal ones. ``seconds`` are
        taken as up to SLACK too short: what is closer is left to ``arrays``.
        """
        if columns.get("transcript") not in table.column_names:
            return [""] * len(table)
        alphabet = transcripts.Alphabet.from_state(state)
        normalised = _normalised(table, columns, state["normalization"])
        reasons = [alphabet.describe_unknown(text) for text in normalised]
        if arrays is not None:
            samples = lengths(arrays["audio"])
        else:
            assert seconds is not None
            longest = (seconds + SLACK) * state["rate"]
            samples = np.where(seconds > 0, longest, 0).astype(np.int64)
        labels: Any = (arrays or {}).get("transcript")  # as ``encode`` made them
        if labels is None:
            known = [
                "" if reason else text for text, reason in zip(normalised, reasons, strict=True)
            ]
            labels = [alphabet.encode(text) for text in known]
        num_frames = conv_arithmetic.count(samples, state["convolutions"])
        for row, of_row in enumerate(labels):
            needed = len(of_row) + transcripts.repeats(of_row)
            if samples[row] and needed > num_frames[row]:
                reasons[row] = (
                    f"the transcript's {len(of_row)} labels need {needed} frames, the recording "
                    f"has {num_frames[row]}"
                )
        return reasons

    def __init__(self, backbone: Backbone, options: CTCOptions, state: CTCState):
        super().__init__(backbone, options, state)
        width = _check_backbone(backbone)
        self.alphabet = transcripts.Alphabet.from_state(state)
        layers = (nn.Conv1d(width, width, 3, padding=1) for _ in range(options.convolutions))
        self.convolutions = nn.ModuleList(layers)
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(width, len(state["labels"]))
        if options.beam:
            self._decoder()  # fails now where it cannot be made

    # ---------------------------------------------------------------- loss and predictions

    def emissions(self, backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (B, N, C) float32 log probabilities and (B,) int64 frames of each row."""
        features = backbone(batch, want=("tokens",))
        x = features.tokens
        mask = features.mask
        assert x is not None and mask is not None
        if self.options.norm:
            x = F.layer_norm(x, x.shape[-1:])
        for convolution in self.convolutions:
            x = x.masked_fill(~mask[..., None], 0.0)  # padding is silence
            x = F.relu(convolution(x.transpose(1, 2)).transpose(1, 2))
        scores = self.head(self.dropout(x)).float()
        return scores.log_softmax(-1), mask.sum(1)

    def logits(self, backbone, batch):
        return self.head(backbone(batch, want=("tokens",)).tokens)

    def raw_outputs(self, backbone, batch):
        """`log_probabilities` (B, N, C): one for each of `labels`, at every frame.

        Label 0 is the blank. `frames` (B,) says the number of frames of each row without padding.
        """
        log_probs, ends = self.emissions(backbone, batch)
        return {"log_probabilities": log_probs, "frames": ends}

    def loss(self, backbone: Backbone, batch: Batch):
        log_probs, ends = self.emissions(backbone, batch)
        said = batch["transcript"], batch["transcript_lengths"]
        losses, counts, dropped = ctc_losses(log_probs, ends, *said)
        return losses.sum(), counts.sum().float(), {"dropped": dropped.sum()}

    def predict(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return ``prediction`` (B, L) int32 label numbers, -1 behind them.

        With transcripts ``loss`` and its ``count`` (B,). Without them, for new recordings,
        ``confidence`` (B,), and ``first`` and ``last`` (B, L) int32, the frames that each label
        lies on in the likeliest alignment, -1 behind.
        """
        log_probs, ends = self.emissions(backbone, batch)
        if self.options.beam:
            labels = self._beam_search(log_probs, ends)
        else:
            labels = greedy(log_probs, ends)
        if "transcript" in batch.data:
            said = batch["transcript"], batch["transcript_lengths"]
            losses, counts, _ = ctc_losses(log_probs, ends, *said)
            losses = losses.masked_fill(counts == 0, 0.0)
            return {"prediction": labels, "loss": losses, "count": counts.float()}
        count = (labels >= 0).sum(1)
        nats = ctc_losses(log_probs, ends, labels.clamp(min=0), count)[0]
        confidence = (-nats / count.clamp(min=1)).exp()
        first, last = aligned(log_probs, ends, labels)
        return {
            "prediction": labels,
            "confidence": confidence.masked_fill(ends == 0, float("nan")),
            "first": first,
            "last": last,
        }

    def postprocess(self, predictions, raw_rows):
        """Add ``word_errors``, ``words``, ``char_errors`` and ``chars`` (n,).

        Against the rows' own normalised transcripts; nothing is added to rows without them.
        """
        if raw_rows.columns.get("transcript") not in raw_rows.table.column_names:
            return predictions
        recognised = [self.alphabet.decode(labels) for labels in predictions["prediction"]]
        right = _normalised(raw_rows.table, raw_rows.columns, self.state["normalization"])
        return {**predictions, **transcripts.errors(recognised, right)}

    def output_columns(self, predictions, raw_rows):
        """Return ``text``, ``confidence`` and ``words``.

        ``confidence`` is the probability that the model gives the text, over all its alignments,
        per label: the root of as many as it has labels. ``words`` are lists of {word, start, end},
        in seconds of the recording; where a row is a piece of one (role ``start``), of the whole.
        """
        begins = np.zeros(len(predictions["prediction"]))
        if raw_rows.columns.get("start") in raw_rows.table.column_names:
            column = raw_rows.table[raw_rows.columns["start"]].to_pylist()
            begins = np.array([start or 0.0 for start in column], dtype=np.float64)
            begins = np.where(np.isfinite(begins), begins, 0.0)
        text: Any = np.empty(len(begins), dtype=object)
        words: Any = np.empty(len(begins), dtype=object)
        names = ("prediction", "first", "last")
        arrays = (predictions[name] for name in names)
        for row, (labels, first, last) in enumerate(zip(*arrays, strict=True)):
            text[row] = self.alphabet.decode(labels)
            real = labels >= 0
            words[row] = self._timed_words(labels[real], first[real], last[real], begins[row])
        return {"text": text, "confidence": predictions["confidence"], "words": words}

    def _timed_words(
        self, labels: np.ndarray, first: np.ndarray, last: np.ndarray, begin: float
    ) -> list[TimedWord]:
        """Return the words of labels on frames ``first`` to ``last``, from ``begin`` seconds on."""
        segmented = self.state.get("segmented", False)
        placed = self.alphabet.words(labels, first, last, segmented)
        edges = np.array([[start, end + 1] for _, start, end in placed]).reshape(-1, 2)
        seconds = (
            conv_arithmetic.seconds(edges, self.state["convolutions"], self.state["rate"]) + begin
        )
        return [
            {"word": word, "start": round(float(start), 4), "end": round(float(end), 4)}
            for (word, *_), (start, end) in zip(placed, seconds, strict=True)
        ]

    # ---------------------------------------------------------------- beam search

    def _decoder(self) -> _Decoder:
        options = self.options
        held = self.state.get("lm")
        copy = language_model.FileCopy(**held) if held else None
        return beam_search_decoder(
            self.alphabet.labels, options.beam, options.lm, copy, options.lm_weight
        )

    def _beam_search(self, log_probs: Tensor, ends: Tensor) -> Tensor:
        """Return (B, L) int32, -1 behind: the best hypothesis of each row.

        Hypotheses are label sequences, each with the sum over its alignments in the beam.
        """
        rows = zip(log_probs.cpu().contiguous(), ends.tolist(), strict=True)
        hypotheses = [torch.from_numpy(self._best_hypothesis(row, end)) for row, end in rows]
        padded = nn.utils.rnn.pad_sequence(hypotheses, batch_first=True, padding_value=-1)
        return padded.to(log_probs.device)

    def _best_hypothesis(self, log_probs: Tensor, end: int) -> np.ndarray:
        """Return (L,) int32 labels of one row, of which ``end`` frames are real."""
        best_score = float("-inf")
        best_labels = np.zeros(0, dtype=np.int32)
        if not end:
            return best_labels
        decoder = self._decoder().decoder
        for hypothesis in decoder.decode(log_probs.data_ptr(), end, log_probs.shape[1]):
            # without the tokens before the first frame and behind the last one
            path = np.array(hypothesis.tokens[1:-1], dtype=np.int32)
            is_new = np.append(True, path[1:] != path[:-1])
            labels = path[is_new & (path > 0)]
            num_words = len(self.alphabet.decode(labels).split())
            score = hypothesis.score + self.options.word_score * num_words
            if score > best_score:
                best_score = score
                best_labels = labels
        return best_labels


class _Decoder(NamedTuple):
    decoder: Any
    model: Any
    """The language model: the decoder does not keep it alive."""


@lru_cache(maxsize=4)
def beam_search_decoder(
    labels: tuple[str, ...],
    beam: int,
    lm: str | None,
    copy: language_model.FileCopy | None,
    weight: float,
) -> _Decoder:
    """Return a decoder, made once a process: a language model takes seconds to read.

    Raises:
        ValueError: flashlight-text is not installed, or the model is not there or of another kind.
    """
    try:
        flashlight = import_module("flashlight.lib.text.decoder")
    except ImportError:
        raise ValueError(
            "objective.beam: beam search needs flashlight-text, which is not installed: "
            f"{extras.install('speech')}, or set beam: 0"
        ) from None
    model = language_model.read(lm, copy, labels) if lm else flashlight.ZeroLM()
    options = flashlight.LexiconFreeDecoderOptions(
        beam_size=beam,
        beam_size_token=len(labels),
        beam_threshold=BEAM_THRESHOLD,
        lm_weight=weight if lm else 0.0,
        sil_score=0.0,
        log_add=True,
        criterion_type=flashlight.CriterionType.CTC,
    )
    # no label is silence, which flashlight would take for one before the first frame
    silence = -1
    blank = 0
    decoder = flashlight.LexiconFreeDecoder(options, model, silence, blank, [])
    return _Decoder(decoder, model)


# ---------------------------------------------------------------- rows


def _check_backbone(backbone: Backbone) -> int:
    """Return the width of its tokens; raise ValueError where they are not frames of a recording."""
    if backbone.token_dim is None or backbone.convolutions is None:
        raise ValueError(
            f"{backbone.arch.name} gives no frames of a recording: ctc needs a backbone of "
            "speech (torchaudio/deepspeech, deepspeech2 or conformer, wavenet/wavenet, "
            "transformers/wav2vec2)"
        )
    return backbone.token_dim


def _normalised(table: pa.Table, columns: dict[str, str], rules: str) -> list[str]:
    """Return (n,) normalised transcripts, "" for nulls.

    Raises:
        ValueError: a column of another type.
    """
    column = table[columns["transcript"]]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f"column {columns['transcript']} holds {column.type}: transcripts are texts"
        )
    return [transcripts.normalised(text or "", rules) for text in texts(column)]


# ---------------------------------------------------------------- frames and labels


@eager
def ctc_losses(
    log_probs: Tensor, ends: Tensor, labels: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the CTC loss of each row, and the number of labels that it is of.

    Args:
        log_probs: (B, N, C).
        ends: (B,) frames of each row.
        labels: (B, L) whole numbers from 1 on.
        counts: (B,) labels of each row.

    Returns:
        (B,) float32 nats; (B,) int64 labels that they are of; and (B,) int64 labels of rows that
        have no alignment, whose loss and gradient are zero.
    """
    labels = labels.long()
    counts = counts.long()
    if not log_probs.shape[1]:
        log_probs = F.pad(log_probs, (0, 0, 0, 1))
    inside = torch.arange(labels.shape[1], device=labels.device) < counts[:, None]
    is_repeated = labels[:, 1:] == labels[:, :-1]
    repeats = (is_repeated & inside[:, 1:]).sum(1)
    has_no_alignment = counts + repeats > ends
    with torch.autocast(log_probs.device.type, enabled=False):
        losses = F.ctc_loss(
            log_probs.float().transpose(0, 1),
            labels,
            ends,
            counts,
            reduction="none",
            zero_infinity=True,
        )
    counted = counts.masked_fill(has_no_alignment, 0)
    return losses, counted, counts.masked_fill(~has_no_alignment, 0)


def greedy(log_probs: Tensor, ends: Tensor) -> Tensor:
    """Decode by the likeliest label of each frame (best path decoding).

    Args:
        log_probs: (B, N, C).
        ends: (B,) frames of each row.

    Returns:
        (B, L) int32 label numbers, -1 behind: runs of one label taken once, blanks left out.
    """
    path = log_probs.argmax(-1)
    inside = torch.arange(path.shape[1], device=path.device) < ends[:, None]
    before = F.pad(path, (1, 0))[:, :-1]
    kept = (path != 0) & inside & (path != before)
    position = kept.cumsum(1) - 1
    longest = 0
    if path.numel():
        longest = int(kept.sum(1).max())
    labels = torch.full((len(path), longest), -1, dtype=torch.int32, device=path.device)
    row, frame = kept.nonzero(as_tuple=True)
    column = position[row, frame]
    labels[row, column] = path[row, frame].to(torch.int32)
    return labels


def aligned(log_probs: Tensor, ends: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Align labels with frames, by torchaudio's forced_align, a row at a time.

    Returns:
        First and last frame of each label (B, L) int32 in the likeliest alignment, -1 where no
        label is.
    """
    first = torch.full_like(labels, -1)
    last = torch.full_like(labels, -1)
    counts = (labels >= 0).sum(1).tolist()
    for row, (end, count) in enumerate(zip(ends.tolist(), counts, strict=True)):
        if not count:
            continue
        emissions = log_probs[row : row + 1, :end].contiguous()
        of_row = labels[row : row + 1, :count].contiguous()
        alignment, _ = audio.forced_align(emissions, of_row)
        path = alignment[0]
        before = F.pad(path, (1, 0))[:-1]
        after = F.pad(path, (0, 1))[1:]
        is_label = path != 0
        begins = is_label & (path != before)
        ends_here = is_label & (path != after)
        first[row, :count] = begins.nonzero()[:, 0].to(torch.int32)
        last[row, :count] = ends_here.nonzero()[:, 0].to(torch.int32)
    return first, last
