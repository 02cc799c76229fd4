"""Norms of every library: which modules they are, and their parameters."""

from __future__ import annotations

import re
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
NORM_NAME = re.compile(r"norm(?!al|ed|free)", re.IGNORECASE)
"""Found in the class names of other libraries' norms: RmsNorm2d and EvoNorm2dS0 of timm,
LlamaRMSNorm of transformers. NormFreeBlock (of NFNets), NormedEmbedding and normal distributions
are none.
"""


def norm_parameters(network: nn.Module) -> set[str]:
    """Return the names of the scales and shifts of all norms in a network."""
    modules: dict[str, nn.Module] = dict(cast("Any", network).named_modules())
    return {
        f"{name}.{own}"
        for name, module in modules.items()
        if isinstance(module, NORMS) or NORM_NAME.search(type(module).__name__)
        for own, _ in module.named_parameters(recurse=False)
    }
