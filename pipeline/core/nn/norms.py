"""Norms of every library: which modules they are, and their parameters."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def norm_parameters(network: nn.Module) -> set[str]:
    """Return the names of the scales and shifts of all norms in a network."""
    modules: dict[str, nn.Module] = dict(cast("Any", network).named_modules())
    return {
        f"{name}.{own}"
        for name, module in modules.items()
        if _is_norm(module)
        for own, _ in module.named_parameters(recurse=False)
    }


def _is_norm(module: nn.Module) -> bool:
    # transformers and timm have norms of their own, such as LlamaRMSNorm
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")
