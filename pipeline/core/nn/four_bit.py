"""Linear layers whose weights are held in 4 bits, by the library bitsandbytes.

The format is NF4 (Dettmers et al. 2023): each block of 64 weights is divided by its largest
magnitude, and a weight is the nearest of 16 quantiles of a normal distribution. The blocks'
magnitudes are float32, so a weight takes 4.5 bits. The paper quantises these too (4.1 bits).
"""

# torch declares any arguments for these two methods
# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import extras

BLOCK = 64
"""Weights that share a scale."""


def library() -> Any:
    """Return bitsandbytes.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return import_module("bitsandbytes")
    except ImportError:
        raise ValueError(
            "quantize: nf4 needs bitsandbytes, which is not installed: "
            f"{extras.install('quantized')}, or leave quantize out"
        ) from None


class FourBitLinear(nn.Linear):
    """A linear layer that does not train and holds its weight in 4 bits.

    bitsandbytes has such a layer too, ``Linear4bit``. Here the packed values are plain tensors, so
    that resume points, averages and copies read them as any others. Its layer packs them anew for
    evaluation on a CPU, in bfloat16, and its products there (0.50) are wrong where the rows of a
    weight do not end with blocks (of 96 inputs, say).

    Args:
        weight: (out, in) in full precision, an even number of weights.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None):
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.out_features, self.in_features = weight.shape
        values, state = library().functional.quantize_4bit(
            weight.detach().float().contiguous(), blocksize=BLOCK, quant_type="nf4"
        )
        self.values = nn.Parameter(values, requires_grad=False)
        self.scales = nn.Parameter(state.absmax, requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight (out, in) in full precision, computed anew."""
        functional = library().functional
        state = functional.QuantState(
            absmax=self.scales,
            # as one row: the CPU kernel assumes that blocks end where rows end
            shape=torch.Size((1, self.out_features * self.in_features)),
            dtype=torch.float32,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        flat: Tensor = functional.dequantize_4bit(self.values, state)
        return flat.reshape(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        product: Tensor = cast("Any", _Product).apply(input, self)
        bias: Tensor | None = self._parameters["bias"]
        return product if bias is None else product + bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """A product with a weight in 4 bits, which exists in full precision in neither pass for long.

    Autograd would keep the dequantised weights of all layers until the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: FourBitLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.weight.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.to(grad.dtype), None
