"""A program of torch.export."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from pipeline.checkpoints import export_check, export_folder, graph, graph_readme
from pipeline.checkpoints.bundle import Bundle
from pipeline.config.registry import register

FILE = "model.pt2"

RUNNING = f"""
import torch

model = torch.export.load("{FILE}").module()
with torch.no_grad():
    found = model({{name: torch.from_numpy(inputs[name]) for name in graph["inputs"]}})
outputs = {{name: tensor.numpy() for name, tensor in found.items()}}
"""


@register("export", "torch-export")
def export(saved: Bundle, output: str, backbone_only: bool) -> str:
    """The network in `model.pt2`, how rows are prepared, and code that runs it: torch.export.load,
    without this program.
    """
    traced = graph.trace(saved, backbone_only)

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        path = folder / FILE
        torch.export.save(traced.program, path)
        with warnings.catch_warnings():
            # torch warns of its own buffers, which nothing writes to
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            model = torch.export.load(path).module()
        compared = graph.compare(traced, saved.uri, model)
        running = RUNNING
        if any(str(node.target).startswith("torchvision") for node in traced.program.graph.nodes):
            running = f"\nimport torchvision  # the graph has its operators{RUNNING}"
        graph_readme.write(saved, traced, folder, FILE, running)
        return f"{FILE} and what runs it ({graph_readme.README})", compared

    return export_folder.commit(saved, output, backbone_only, write)
