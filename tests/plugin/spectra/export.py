"""A bundle's weights as arrays of numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.checkpoints.bundle import Bundle
from pipeline.config.registry import register


@register("export", "arrays")
def export(found: Bundle, output: str, backbone_only: bool) -> str:
    """One .npz file: numpy.load."""
    tensors: dict[str, Tensor] = found.backbone_tensors() if backbone_only else found.tensors
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(Path(output), **arrays)
    return f"{output}: {len(arrays)} arrays"
