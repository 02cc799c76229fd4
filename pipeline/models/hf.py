"""Any encoder or decoder of transformers: texts, images, recordings, series, by one rule for all.

What a model is made of is found in the model itself: its input by its class, its layers by walking
its modules, and widths, feature maps, the order of its parts and parameters that nothing uses by
one pass over tensors without memory. `pipeline.models.transformers` has the families
that objectives know more of (packed documents in one pass, masked frames).
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pipeline.config import hf_config
from pipeline.config.registry import Options, register
from pipeline.core.contracts import Backbone, Batch, FeatureMapSpec, Features
from pipeline.core.contracts.backbone_capabilities import BERT_HEAD
from pipeline.core.inputs import Inputs
from pipeline.core.nn import auto_model, conv_arithmetic
from pipeline.core.nn.eager import eager
from pipeline.core.nn.masked import pool_tokens, row_norm
from pipeline.core.specs import Architecture

ARCHITECTURES = ("transformers", "models/auto/*.py", r'^ +\("([\w-]+)", "\w+Config"\)')
WANTS = {
    "hubert": {"features": "wave"},
    "wavlm": {"features": "wave"},
    "data2vec-audio": {"features": "wave"},
    "unispeech": {"features": "wave"},
    "unispeech-sat": {"features": "wave"},
    "wav2vec2": {"features": "wave"},
    "wav2vec2-conformer": {"features": "wave"},
    "whisper": {"features": "wave", "normalize": False},
    "wav2vec2-bert": {"features": "wave", "normalize": False},
    "audio-spectrogram-transformer": {"features": "wave", "normalize": False},
}
"""Samples for models of recordings: those that read spectrograms make their own of them."""

STAGES = 6
"""Most stages of a hierarchical model: longer lists are blocks."""
PROBE_TOKENS = 8
"""Tokens of the row that a model is tried on."""
SHORTEST_TOKENS = 16
"""Shorter documents are padded to this many tokens."""


class HuggingFaceOptions(Options):
    config: dict = Field(
        {},
        description="keys of the model's configuration, as config.json of transformers has them; "
        "those left out have transformers' defaults, or follow from the rows (vocabulary, image "
        "size)",
    )
    processor: dict | None = Field(
        None,
        description="models of recordings that read spectrograms: keys of their "
        "preprocessor_config.json; none: transformers' defaults",
    )
    pool: Literal["auto", "mean", "first", "last", "pooler"] = Field(
        "auto",
        description="how the tokens of a row become one feature. auto, for texts: the mean, or the "
        "last token of a causal model; for others: what the model itself pools, else the first "
        "token if it is no patch (a class token), else the mean. pooler: what the model itself "
        "pools",
    )


@register("model", "hf", options=HuggingFaceOptions)
class HuggingFace(Backbone):
    """Any model of transformers; of an encoder-decoder its encoder.

    Use it for checkpoints (``hf:FOLDER``, ``hf-hub:NAME``), and for families that library
    ``transformers`` does not build. Wolf et al. 2020, "Transformers: State-of-the-Art Natural
    Language Processing".

    ``model`` is transformers' own model, and its parameters keep their names. What it reads:

    - texts: ``tokens`` (B, N) with ``mask``, and ``types``, the token types of BERT
    - images: ``image`` (B, C, size, size)
    - recordings: ``wave`` (B, n) with ``mask``. If the model reads spectrograms, transformers'
      feature extractor makes them, on the CPU.
    - series: ``series`` (B, T, C) with ``known``. A token is a patch, with the states of all
      channels.

    A padded row has the same output as the row alone. (For the group norm of wav2vec 2.0's kind of
    model see ``row_norm``.)

    Packed rows, ``tokens`` with ``segments`` (B, N), are taken apart: each document is run as a
    padded row of its own, together with documents of about the same length. The families read masks
    and positions in different ways, and nobody would notice a wrong mask.

    Parameters that the family never trains (Whisper's positions) are buffers here. Parameters that
    a forward pass does not use (DINOv2's mask token) get a gradient of zero in training, since DDP
    waits for every parameter.
    """

    def __init__(self, architecture: str, options: HuggingFaceOptions, inputs: Inputs):
        super().__init__(architecture, options, inputs)
        name = f"hf/{architecture}"
        self.arch = Architecture(name, options.model_dump(), dict(inputs))
        self.options = options
        config = auto_model.configuration(architecture, options.config, inputs)
        probe = _probe(
            architecture,
            json.dumps(options.config, sort_keys=True),
            json.dumps(options.processor, sort_keys=True),
            json.dumps(inputs, sort_keys=True),
            options.pool == "pooler",
        )
        self.model: Any = auto_model.create(config, options.pool == "pooler")
        self.reads = probe.reads
        self.extractor = _extractor(architecture, config, options.processor, inputs)
        self.convolutions = _convolutions(config) if self.reads == "input_values" else None
        self.causal = probe.causal
        self.pool = _pool(name, options.pool, probe)
        self.pooled_dim, self.token_dim = probe.pooled_dim[self.pool], probe.token_dim
        self.feature_map_specs = probe.maps
        self.prefix = probe.prefix
        self.patch_steps = (
            _patch_steps(config, inputs) if self.reads == auto_model.SERIES_INPUT else None
        )
        self._layers, self._unused = probe.layers, probe.unused
        self._takes = frozenset(inspect.signature(self.model.forward).parameters)
        resized = _is_resized(config, inputs) and "interpolate_pos_encoding" in self._takes
        self.call_arguments: dict[str, Any] = {"interpolate_pos_encoding": True} if resized else {}
        self._row_norms = [] if self.convolutions is None else _use_row_norms(self.model)
        if self.reads == "input_ids":
            _check_text(name, self.model, inputs)
            self.padding: int = inputs["specials"][0]
            self.positions: int = auto_model.positions(self.model) or sys.maxsize
            self.activation, self.norm_eps = probe.masked_head
            self.ties_output = auto_model.output_is_embedding(config)
            self.logit_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.has_types = (
            getattr(config, "type_vocab_size", 0) or 0
        ) > 1 and "token_type_ids" in self._takes

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if token_mask is not None:
            raise ValueError(f"{self.arch.name} hides no positions: take another objective")
        if "segments" in batch.data:
            return self._packed(batch["tokens"], batch["segments"])
        arguments, mask = self._model_arguments(batch)
        if "stages" in want:
            arguments["output_hidden_states"] = True
        output = self.model(**arguments)
        hidden = auto_model.hidden_states(self.model, output)
        own = output.get("pooler_output")
        stages = _feature_maps(output, self.prefix) if "stages" in want else {}
        if self.training:
            zero = self._zero(hidden, own).to(hidden.dtype)
            hidden, own = hidden + zero, None if own is None else own + zero
            stages = {name: stage + zero for name, stage in stages.items()}
        if hidden.dim() == 3:
            mask = _token_mask(mask, hidden)
        if self.pool == "pooler":
            assert own is not None  # "pooler" is refused where the model has none
            pooled = own.flatten(1)
        elif hidden.dim() == 4:
            pooled = hidden.mean((2, 3))
        else:
            real = mask if mask is not None else hidden.new_ones(hidden.shape[:2]).bool()
            pooled = pool_tokens(hidden, real, self.pool)
        tokens = hidden if hidden.dim() == 3 else None
        return Features(pooled, tokens=tokens, mask=mask, stages=stages)

    def _packed(self, tokens: Tensor, segments: Tensor) -> Features:
        """Return features of (B, N) tokens of several documents a row; padding has states of 0."""
        flat = tokens.flatten()
        states: list[Tensor] = []
        pooler_outputs: list[Tensor | None] = []
        places: list[Tensor] = []
        for index, real in documents_by_length(segments):
            row = torch.where(real, flat[index], self.padding)
            output = self.model(input_ids=row, attention_mask=real.long())
            states.append(output.last_hidden_state[real])
            pooler_outputs.append(output.get("pooler_output"))
            places.append(index[real])
        joined = torch.cat(states)
        if self.training:
            joined = joined + self._zero(joined, *pooler_outputs).to(joined.dtype)
        hidden = joined.new_zeros(len(flat), joined.shape[1])
        hidden = hidden.index_copy(0, torch.cat(places), joined).view(*tokens.shape, -1)
        mask = segments > 0
        # the model's own pooling reads one document a row, so packed rows are averaged
        pooled = pool_tokens(hidden, mask, self.pool if self.pool in POOLS else "mean")
        return Features(pooled, tokens=hidden, mask=mask)

    def advance(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Continue a sequence, as `Continues` describes it (causal models only)."""
        arguments = {"position_ids": positions} if "position_ids" in self._takes else {}
        output = self.model(
            input_ids=tokens,
            attention_mask=mask.long(),
            past_key_values=past,
            use_cache=True,
            **arguments,
        )
        return output.last_hidden_state, output.past_key_values

    def _zero(self, *outputs: Tensor | None) -> Tensor:
        """Return 0, of which every parameter has a gradient.

        An objective reads tokens, a pooled feature or maps, and DDP waits for all parameters: for
        those that only the others depend on, too, and for those that nothing depends on.
        """
        parts = [one.float().mean() for one in outputs if one is not None]
        parts += [self.get_parameter(name).float().mean() for name in self._unused]
        return 0.0 * torch.stack(parts).sum()

    def _model_arguments(self, batch: Batch) -> tuple[dict[str, Any], Tensor | None]:
        """Return the model's arguments, and (B, M) which of its input's positions are real."""
        if self.reads == "pixel_values":
            return {"pixel_values": batch["image"], **self.call_arguments}, None
        if self.reads == auto_model.SERIES_INPUT:
            observed = {name: batch["known"] for name in self._takes if "observed_mask" in name}
            return {self.reads: batch["series"], **observed}, None
        if self.reads == "input_ids":
            tokens = batch["tokens"]
            mask = batch.data.get("mask", torch.ones_like(tokens, dtype=torch.bool))
            arguments = {"input_ids": tokens, "attention_mask": mask.long()}
            if self.has_types and "types" in batch.data:
                arguments["token_type_ids"] = batch["types"].long()
            return arguments, mask
        mask = batch["mask"]
        if self.extractor is not None:
            spectrogram, real = spectrograms(self.extractor, self.reads, batch["wave"], mask)
            takes = real is not None and "attention_mask" in self._takes
            return {self.reads: spectrogram, **({"attention_mask": real} if takes else {})}, real
        assert self.convolutions is not None
        least = conv_arithmetic.field(self.convolutions)
        missing = max(0, least - batch["wave"].shape[1])
        wave = F.pad(batch["wave"], (0, missing))
        lengths = mask.sum(1)
        for norm in self._row_norms:
            norm.lengths = conv_arithmetic.count(lengths, self.convolutions[:1])
        count = conv_arithmetic.count(wave.shape[1], self.convolutions)
        frames = conv_arithmetic.count(lengths, self.convolutions)
        real = torch.arange(count, device=mask.device) < frames[:, None]
        # a row without frames attends to its first one, so that no softmax is empty
        seen_lengths = lengths.clamp(min=least)
        seen = torch.arange(wave.shape[1], device=mask.device) < seen_lengths[:, None]
        return {"input_values": wave, "attention_mask": seen.long()}, real

    @classmethod
    def largest_options(
        cls, architecture: str, options: HuggingFaceOptions, inputs: Inputs
    ) -> dict[str, float]:
        """Return the longest recording that the feature extractor does not cut (`LimitsRows`)."""
        # the constructor says what the model reads in place of these rows
        if inputs.get("features") != "wave":
            return {}
        config = auto_model.configuration(architecture, options.config, inputs)
        reads: str = auto_model.model_class(config).main_input_name
        if MODALITIES.get(reads) != RECORDINGS:
            return {}
        extractor = _extractor(architecture, config, options.processor, inputs)
        longest = None if extractor is None else auto_model.longest_seconds(extractor)
        return {} if longest is None else {"max_seconds": longest}

    def model_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """Return the arguments of ``model`` for a batch."""
        return self._model_arguments(batch)[0]

    def embedding(self) -> nn.Embedding:
        if self.reads != "input_ids":
            return super().embedding()
        return self.model.get_input_embeddings()

    def layers(self) -> dict[str, list[str]]:
        return {name: list(names) for name, names in self._layers.items()}


# ---------------------------------------------------------------- texts and images


def _is_resized(config: Any, inputs: Inputs) -> bool:
    size = _side(config, "image_size")
    return "size" in inputs and size is not None and size != inputs["size"]


def _side(config: Any, name: str) -> Any:
    """Return a size that a configuration gives as one number or as height and width, or None."""
    size = getattr(config, name, None)
    return size[0] if isinstance(size, list | tuple) else size


def _check_text(name: str, model: Any, inputs: Inputs) -> None:
    """Raise ValueError where the tokenizer has more tokens, or rows more positions."""
    rows, longest = model.get_input_embeddings().num_embeddings, auto_model.positions(model)
    if inputs["vocabulary"] > rows:
        raise ValueError(
            f"the tokenizer has {inputs['vocabulary']} tokens, the embedding of {name} {rows}"
        )
    if longest is not None and inputs["length"] > longest:
        raise ValueError(
            f"rows of {inputs['length']} tokens are longer than the {longest} positions of {name}"
        )


@eager
def documents_by_length(segments: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return where the documents of packed rows are, those of about one length together.

    Lengths are rounded up to powers of two and to at least `SHORTEST_TOKENS`, so at most half of
    the positions of a document of `SHORTEST_TOKENS` tokens or more are padding.

    Args:
        segments: (B, N) the document's number in the row, 0 for padding.

    Returns:
        For each length n: (D, n) places of the documents' tokens in the flattened rows, and (D, n)
        which of them are the document's own.
    """
    width = segments.shape[1]
    real = segments > 0
    if not real.any():
        real = torch.ones_like(real)  # the model still has to run
    begins = torch.ones_like(real)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = (begins & real).flatten().nonzero()[:, 0]
    number = (begins & real).flatten().cumsum(0) - 1
    lengths = torch.bincount(number[real.flatten()], minlength=len(starts))
    sizes = 2 ** torch.log2(lengths).ceil().long()
    sizes = sizes.clamp(min=SHORTEST_TOKENS).clamp(max=width)
    out: list[tuple[Tensor, Tensor]] = []
    for size in sizes.unique().tolist():
        chosen = sizes == size
        steps = torch.arange(size, device=segments.device)
        is_own = steps < lengths[chosen, None]
        out.append((starts[chosen, None] + torch.where(is_own, steps, 0), is_own))
    return out


# ---------------------------------------------------------------- recordings


def _convolutions(config: Any) -> tuple[tuple[int, int, int], ...] | None:
    """Return the convolutions of wav2vec 2.0's kind of model.

    Raises ValueError for a model of another kind, or with an adapter that changes the stride.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels is None or strides is None:
        return None
    if getattr(config, "add_adapter", False):
        raise ValueError(
            f"{config.model_type}: the configuration says add_adapter: true, convolutions behind "
            "the encoder that change its stride: take a checkpoint without them"
        )
    return tuple((kernel, stride, 0) for kernel, stride in zip(kernels, strides, strict=True))


class RowGroupNorm(nn.GroupNorm):
    """A group norm with one channel a group, over the own frames of each row (``row_norm``)."""

    lengths: Tensor | None = None
    """(B,) frames of the rows of the next pass; None: all."""

    def forward(self, input: Tensor) -> Tensor:
        if self.lengths is None:
            return super().forward(input)
        return row_norm(input, self, self.lengths)


def _use_row_norms(model: Any) -> list[RowGroupNorm]:
    """Put norms over a row's own frames in the place of group norms over padded rows."""
    norms: list[RowGroupNorm] = []
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm) is nn.GroupNorm and norm.num_groups == norm.num_channels:
                new = RowGroupNorm(norm.num_groups, norm.num_channels, norm.eps)
                new.weight, new.bias = norm.weight, norm.bias
                setattr(module, name, new)
                norms.append(new)
    return norms


def _extractor(architecture: str, config: Any, given: dict[str, Any] | None, inputs: Inputs) -> Any:
    """Return transformers' feature extractor of a model that reads spectrograms, else None.

    Raises ValueError for keys that it does not take.
    """
    if "features" not in inputs or _convolutions(config) is not None:
        if given is not None:
            raise ValueError(f"hf/{architecture} reads no spectrograms: leave processor out")
        return None
    given = dict(given or {})
    kind = auto_model.extractor_class(config, given.pop(auto_model.EXTRACTOR_TYPE, None))
    plain = hf_config.plain_keys(architecture, given, auto_model.extractor_keys(kind))
    if unknown := sorted(set(given) - set(plain)):
        raise ValueError(
            f"hf/{architecture}: processor: {kind.__name__} has no {', '.join(unknown)}"
        )
    extractor = kind(**plain)
    if extractor.sampling_rate != inputs["rate"]:
        raise ValueError(
            f"hf/{architecture} reads {extractor.sampling_rate} samples a second, these rows have "
            f"{inputs['rate']}: set modality: {{audio: {{rate: {extractor.sampling_rate}}}}}"
        )
    return extractor


@eager
def spectrograms(
    extractor: Any, name: str, wave: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what a feature extractor makes of (B, n) samples, and (B, T) which frames are real.

    None instead where the extractor has no mask.

    Raises ValueError for a recording that the extractor would cut.
    """
    lengths = mask.sum(1).tolist()
    longest, seconds = auto_model.longest_seconds(extractor), max(lengths) / extractor.sampling_rate
    if longest is not None and seconds > longest:
        raise ValueError(
            f"a recording of {seconds:.4g} s: {type(extractor).__name__} cuts recordings after "
            f"{longest:g} s; `bundle.limit_modality` lowers max_seconds to that"
        )
    waves = wave.float().cpu()
    rows = [row[: max(1, n)].numpy() for row, n in zip(waves, lengths, strict=True)]
    output = extractor(
        rows,
        sampling_rate=extractor.sampling_rate,
        return_tensors="pt",
        return_attention_mask=True,
    )
    real = output.get("attention_mask")
    frames = output[name].to(wave.device, wave.dtype)
    return frames, None if real is None else real.to(wave.device).bool()


def _token_mask(mask: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Return (B, N) which tokens are real, of (B, M) positions of the input, M / N a token."""
    if mask is None or mask.shape[1] == hidden.shape[1]:
        return mask
    num_tokens = hidden.shape[1]
    positions_a_token = max(1, mask.shape[1] // num_tokens)
    return mask[:, ::positions_a_token][:, :num_tokens]


# ---------------------------------------------------------------- looking into a model


class Probe(NamedTuple):
    """What one pass over a model shows."""

    reads: str
    """Name of its input: input_ids, pixel_values, input_values, input_features, past_values."""
    causal: bool
    """Whether tokens see earlier ones only."""
    token_dim: int | None
    prefix: int
    """Tokens of an image or a series before those of its patches."""
    has_own_pool: bool
    pooled_dim: dict[str, int]
    maps: tuple[FeatureMapSpec, ...]
    layers: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]
    """Parameters that no output depends on."""
    has_plain_pool: bool
    """Whether the model pools by itself without parameters for it."""
    masked_head: tuple[str, float]
    """Activation and epsilon of the family's head for masked tokens."""


RECORDINGS = "features", "recordings (modality audio with features: wave)"
MODALITIES = {
    "input_ids": ("vocabulary", "texts"),
    "pixel_values": ("size", "images"),
    "input_values": RECORDINGS,
    "input_features": RECORDINGS,
    auto_model.SERIES_INPUT: ("steps", "regular series (modality series)"),
}
"""Inputs of models: a key of the modality's inputs, and its rows in words."""


@cache
def _probe(architecture: str, config: str, processor: str, inputs: str, pooler: bool) -> Probe:
    """Try the model on one row, without memory or arithmetic.

    Raises ValueError where it cannot read the rows, or is too large.
    """
    name, rows = f"hf/{architecture}", json.loads(inputs)
    configuration = auto_model.configuration(architecture, json.loads(config), rows)
    kind = auto_model.model_class(configuration)
    reads: str = kind.main_input_name
    if reads not in MODALITIES:
        raise ValueError(f"{name} reads {reads}: no modality gives that")
    key, what = MODALITIES[reads]
    if key not in rows or rows.get("features", "wave") != "wave":
        raise ValueError(
            f"{name} reads {what}; these rows are "
            f"{rows.get('features') or ', '.join(rows) or 'something else'}"
        )
    shape, dtype = _row_shape(architecture, configuration, json.loads(processor), rows, reads)
    arguments: dict[str, Any] = {"output_hidden_states": True} if reads == "pixel_values" else {}
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = auto_model.create(configuration, pooler).eval()
    with FAKE, torch.inference_mode(False), torch.enable_grad():
        _without_memory(model)
        count = _size(model)
        if count > hf_config.PARAMETERS:
            raise ValueError(
                f"{name}: the configuration describes a model of {count:.2g} parameters, more "
                f"than {hf_config.PARAMETERS:.2g}"
            )
        takes = inspect.signature(model.forward).parameters
        if _is_resized(configuration, rows) and "interpolate_pos_encoding" in takes:
            arguments["interpolate_pos_encoding"] = True
        try:
            with _called(model) as calls:
                output = model(
                    **{reads: torch.zeros(shape, dtype=dtype, device="meta")}, **arguments
                )
            return _probed(model, reads, output, calls, rows, configuration)
        except Exception as error:  # each family has its own way to refuse
            reason = (f"{error}".strip() or type(error).__name__).splitlines()[0][:200]
            raise ValueError(f"{name} cannot read these rows: {reason}") from error


FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""Mode of tensors without memory, on which code that looks at values takes its way for tracing.

There is one, on device meta: some models keep tensors for the next pass by their sizes and device.
"""


def _without_memory(model: nn.Module) -> None:
    """Put tensors of `FAKE`, which must be active, in the place of a model's on device meta."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(own) not in parameters:
                parameters[id(own)] = nn.Parameter(torch.empty_like(own, device="meta"))
            module.register_parameter(name, parameters[id(own)])
        for name, own in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(own, device="meta")


def _probed(
    model: Any, reads: str, output: Any, calls: dict[str, int], rows: dict[str, Any], config: Any
) -> Probe:
    """Return what a pass over a model showed."""
    hidden = auto_model.hidden_states(model, output)
    own = output.get("pooler_output")
    widths = {pool: hidden.shape[1] if hidden.dim() == 4 else hidden.shape[2] for pool in POOLS}
    unused = _unused(model, hidden)
    without_pool = unused
    if own is not None:
        widths["pooler"] = own.flatten(1).shape[1]
        unused = _unused(model, hidden, own)
    patch = _side(config, "patch_size")
    side = rows.get("size", 0) // (patch if isinstance(patch, int) and patch > 0 else 1)
    prefix = max(0, hidden.shape[1] - side**2) if hidden.dim() == 3 and "size" in rows else 0
    if reads == auto_model.SERIES_INPUT:
        prefix = int(getattr(config, "use_cls_token", False))
    maps = _feature_maps(output, prefix) if reads == "pixel_values" else {}
    head = auto_model.masked_head(config) if reads == "input_ids" else None
    return Probe(
        reads,
        any(getattr(module, "is_causal", False) for module in model.modules()),
        hidden.shape[2] if hidden.dim() == 3 else None,
        prefix,
        own is not None,
        widths,
        tuple(
            FeatureMapSpec(stage, one.shape[1], round(rows["size"] / one.shape[2]))
            for stage, one in maps.items()
        ),
        _layers(model, calls),
        unused,
        own is not None and unused == without_pool,
        BERT_HEAD if head is None else (head.activation, head.norm_eps),
    )


POOLS = ("mean", "first", "last")
"""Ways to pool tokens that need nothing of the model."""


def _pool(name: str, asked: str, probe: Probe) -> str:
    """Return how features are pooled. Raises ValueError for a way that the model has not."""
    if asked == "pooler" and not probe.has_own_pool:
        raise ValueError(f"{name} has no pooler: set pool to mean, first or last, or leave it out")
    if asked != "auto":
        return asked
    if probe.reads == "input_ids":
        # CLIP's pooler is the token at the end of the text; SigLIP's may read padding
        return "pooler" if probe.has_plain_pool else "last" if probe.causal else "mean"
    if probe.has_own_pool:
        return "pooler"
    return "first" if probe.prefix else "mean"


def _patch_steps(config: Any, inputs: Inputs) -> int | None:
    """Return the steps of a patch.

    None where the tokens are not the row's consecutive, non-overlapping patches (overlap, gaps, a
    class token). PatchTST and PatchTSMixer leave out the first steps of rows that are not whole
    number of patches.
    """
    steps: int = config.patch_length
    is_gapless = config.patch_stride == steps and inputs["steps"] % steps == 0
    return steps if is_gapless and not getattr(config, "use_cls_token", False) else None


def _row_shape(
    architecture: str, config: Any, processor: Any, rows: dict[str, Any], reads: str
) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and type of the model's input of one row."""
    if reads == "input_ids":
        return (1, min(PROBE_TOKENS, rows["length"])), torch.long
    if reads == "pixel_values":
        return (1, rows["channels"], rows["size"], rows["size"]), torch.float32
    if reads == auto_model.SERIES_INPUT:
        return (1, rows["steps"], rows["channels"]), torch.float32
    extractor = _extractor(architecture, config, processor, rows)
    longest = None if extractor is None else auto_model.longest_seconds(extractor)
    wave = torch.zeros(1, int(rows["rate"] * min(1.0, longest or 1.0)))
    if extractor is not None:
        wave, _ = spectrograms(extractor, reads, wave, torch.ones_like(wave, dtype=torch.bool))
    return tuple(wave.shape), torch.float32


def _unused(model: Any, *outputs: Tensor) -> tuple[str, ...]:
    """Return the parameters, as the backbone names them, that some outputs do not depend on."""
    named = dict(model.named_parameters())
    total = torch.stack([output.float().sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(
        total, list(named.values()), allow_unused=True, retain_graph=True
    )
    return tuple(f"model.{name}" for name, g in zip(named, gradients, strict=True) if g is None)


def _feature_maps(output: Any, prefix: int) -> dict[str, Tensor]:
    """Return (B, C, h, w) maps of the states between layers, by name, from input to output."""
    states = output.get("reshaped_hidden_states")
    if states is None:
        states = output.get("hidden_states") or ()
    maps: dict[str, Tensor] = {}
    for number, state in enumerate(states):
        if state.dim() == 3:
            patches = state[:, prefix:]
            side = math.isqrt(patches.shape[1])
            if side**2 != patches.shape[1] or not side:
                continue
            state = patches.transpose(1, 2).reshape(len(state), -1, side, side)
        maps[f"state{number:02d}"] = state
    return maps


@contextmanager
def _called(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yield the place of each module's first call among all calls, filled in by a pass."""
    calls: dict[str, int] = {}

    def note(name: str) -> Any:
        def called(module: nn.Module, args: Any) -> None:
            calls.setdefault(name, len(calls))

        return called

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module, calls: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the backbone's layers: embeddings, each block, and what comes after the last one.

    A parameter outside of the blocks goes with the block that was called before its module, with
    the embeddings where that was none, and with the last layer where that was the last one. A
    module that is never called, only read (DeBERTa's relative positions), counts as an embedding.
    """
    blocks = blocks_of(model)
    begins = [_first_call(calls, block) for block in blocks]
    layers: dict[str, list[str]] = {
        "embeddings": [],
        **{f"block{number:02d}": [] for number in range(len(blocks))},
        "top": [],
    }
    for name, _ in model.named_parameters():
        inside = [n for n, block in enumerate(blocks) if name.startswith(f"{block}.")]
        if inside:
            layer = f"block{inside[-1]:02d}"
        else:
            place = calls.get(name.rpartition(".")[0])
            before = 0 if place is None else sum(begin < place for begin in begins)
            middle = f"block{before - 1:02d}"
            layer = "embeddings" if not before else "top" if before == len(blocks) else middle
        layers[layer].append(f"model.{name}")
    return {layer: tuple(names) for layer, names in layers.items() if names}


def _first_call(calls: dict[str, int], block: str) -> int:
    """Return the first call of a block or of anything in it."""
    places = [p for name, p in calls.items() if name == block or name.startswith(f"{block}.")]
    return min(places, default=len(calls))


def blocks_of(model: nn.Module) -> list[str]:
    """Return the names of a model's blocks, in order.

    Of all lists of modules of one class that are in no other such list, the one with the most
    parameters holds them. Where it is a short list of stages, each mostly a list of modules of one
    class itself (Swin, ResNet), the blocks are those of all stages.
    """
    lists = _outermost_lists(model)
    if not lists:
        return [name for name, child in model.named_children() if _size(child)]
    name = max(lists, key=lambda one: _size(lists[one]))
    elements = {f"{name}.{own}": child for own, child in lists[name].named_children()}
    if len(elements) > STAGES:
        return list(elements)
    out: list[str] = []
    for place, element in elements.items():
        inner = {"": element} if _is_list(element) else _outermost_lists(element)
        largest = max(inner, key=lambda one: _size(inner[one]), default=None)
        if largest is None or 2 * _size(inner[largest]) <= _size(element):
            return list(elements)
        path = f"{place}.{largest}" if largest else place
        out += [f"{path}.{own}" for own, _ in inner[largest].named_children()]
    return out


def _outermost_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Return the lists of modules of one class by name, without those inside of another."""
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name and _is_list(module) and not any(name.startswith(f"{one}.") for one in lists):
            lists[name] = module
    return lists


def _is_list(module: nn.Module) -> bool:
    children = list(module.children())
    is_list = isinstance(module, nn.ModuleList | nn.Sequential) and bool(children)
    return is_list and len({type(child) for child in children}) == 1 and _size(module) > 0


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
