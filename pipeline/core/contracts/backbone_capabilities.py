"""What single objectives need of a backbone, as protocols of one to three members each.

A class has a capability by defining its members; nothing is declared. Callers test for it with
``isinstance`` (runtime-checkable protocols), by the function below each protocol.

    `CutsPatches`: an image is cut into patches that can be left out (``mae``, ``dino``).
    `CutsSeries`: a series is cut into patches, one a token (``masked_series``).
    `PredictsSamples`: it is causal at the rate of the samples (``next_sample``).
    `HidesFrames`: frames can be hidden from the context network (``wav2vec2``).
    `Continues`: a text can be continued token by token (``clm`` that generates).
    `ShapesMaskedHead`: the family has a head of its own for masked tokens (``mlm``).
    `ShapesCausalHead`: the family says how the next token's scores are made (``clm``).
    `NamesInputs`: the library's own model takes inputs by name (exports are compared with it).
    `LimitsRows`: it cannot read rows as large as the modality may make them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import TypeIs

    from pipeline.core.batch import Batch


@runtime_checkable
class CutsPatches(Protocol):
    """A backbone that may be a plain vision transformer, whose patches can be left out."""

    patch: int | None
    """Pixels a side of a patch; None: this architecture has no such patches."""


def patch_size(backbone: Any) -> int | None:
    """Return the pixels a side of patches that can be left out, None where there are none."""
    return backbone.patch if isinstance(backbone, CutsPatches) else None


@runtime_checkable
class CutsSeries(Protocol):
    """A backbone that may have one token for each patch of a series, from the first to the last."""

    patch_steps: int | None
    """Steps of a patch.

    None where the tokens are not the row's consecutive, non-overlapping patches (overlap, gaps, a
    class token).
    """


def patch_steps(backbone: Any) -> int | None:
    """Return the steps of a series that a token stands for, None where there are no such tokens."""
    return backbone.patch_steps if isinstance(backbone, CutsSeries) else None


@runtime_checkable
class PredictsSamples(Protocol):
    """A causal backbone at the rate of the samples.

    Its output "latent" (B, n, D) at a sample depends on that sample and earlier ones.
    """

    receptive_field: int
    """Samples that "latent" of a sample depends on: itself and those before it."""

    def levels(self, wave: Tensor) -> Tensor:
        """Return (B, n) int64 levels of samples, what is predicted."""
        ...

    def renew_frames(self) -> None:
        """Initialise the layers over tokens again where they were never trained."""
        ...


def predicts_samples(backbone: Any) -> TypeIs[PredictsSamples]:
    """Return whether the backbone is causal at the rate of the samples."""
    return isinstance(backbone, PredictsSamples)


@runtime_checkable
class HidesFrames(Protocol):
    """A backbone with convolutions below a context network: ``token_mask`` hides frames between.

    Its output "latent" (B, N, latent_dim) is that of the convolutions.
    """

    latent_dim: int

    def frame_mask(self, batch: Batch) -> Tensor:
        """Return (B, N) bool, true for a row's own frames; N is 1 where no row has any."""
        ...


def hides_frames(backbone: Any) -> TypeIs[HidesFrames]:
    """Return whether frames can be hidden from the backbone's context network."""
    return isinstance(backbone, HidesFrames)


@runtime_checkable
class Continues(Protocol):
    """A backbone of text that can go on from where it was, where it is causal."""

    positions: int
    """Tokens of the longest row."""

    def advance(
        self, tokens: Tensor, mask: Tensor, positions: Tensor, past: Any = None
    ) -> tuple[Tensor, Any]:
        """Continue a sequence.

        Args:
            tokens: (B, n) ids.
            mask: (B, past + n) bool, true for what may be attended to.
            positions: (B, n) positions of ``tokens``.
            past: Keys and values of the earlier tokens; None: there are none.

        Returns:
            States (B, n, D), and the new past.
        """
        ...


def longest_continued(backbone: Any) -> int:
    """Return the tokens of the longest row that can be continued, 0 where none can."""
    return backbone.positions if isinstance(backbone, Continues) else 0


@runtime_checkable
class ShapesMaskedHead(Protocol):
    """A backbone of a family whose head for masked tokens has its own activation and norm."""

    activation: str
    """A name of transformers.activations."""
    norm_eps: float


BERT_HEAD = ("gelu", 1e-12)
"""Activation and epsilon of the norm of BERT's head for masked tokens."""


def masked_head_settings(backbone: Any) -> tuple[str, float]:
    """Return activation and epsilon of the norm, those of BERT where the family names none."""
    if isinstance(backbone, ShapesMaskedHead):
        return backbone.activation, backbone.norm_eps
    return BERT_HEAD


@runtime_checkable
class ShapesCausalHead(Protocol):
    """A backbone of a family that says how the scores of the next token are made."""

    ties_output: bool
    """Whether the output layer is the token embedding."""
    logit_softcap: float | None
    """Scores s become softcap * tanh(s / softcap), as Gemma 2's; None: they stay."""


def causal_head_settings(backbone: Any) -> tuple[bool, float | None]:
    """Return whether the output is the embedding, and the softcap: those of GPT-2 by default."""
    if isinstance(backbone, ShapesCausalHead):
        return backbone.ties_output, backbone.logit_softcap
    return True, None


@runtime_checkable
class NamesInputs(Protocol):
    """A backbone over a model of a library that takes its inputs by name."""

    def model_inputs(self, batch: Batch) -> Mapping[str, Any]:
        """Return the arguments of the library's own model for a batch."""
        ...


def model_inputs(backbone: Any, batch: Batch) -> Mapping[str, Any] | None:
    """Return the arguments of the library's own model, None where the backbone does not say."""
    return backbone.model_inputs(batch) if isinstance(backbone, NamesInputs) else None


@runtime_checkable
class LimitsRows(Protocol):
    """A backbone that cannot read rows as large as the modality may make them."""

    @classmethod
    def largest_options(
        cls, architecture: str, options: Any, inputs: Mapping[str, Any]
    ) -> dict[str, float]:
        """Return the largest values of the modality's options that it reads, by name.

        The arguments are those of the backbone's constructor.
        """
        ...


def limits_rows(kind: Any) -> TypeIs[type[LimitsRows]]:
    """Return whether a class of backbones says how large rows may be."""
    return isinstance(kind, LimitsRows)
