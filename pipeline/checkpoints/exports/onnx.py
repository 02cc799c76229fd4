"""ONNX, for onnxruntime and what reads its format."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints import (
    export_check,
    export_folder,
    graph,
    graph_readme,
    recurrent_shapes,
)
from pipeline.checkpoints.bundle import Bundle, BundleError
from pipeline.config import extras
from pipeline.config.registry import register

FILE = "model.onnx"

RUNNING = f"""
import onnxruntime

session = onnxruntime.InferenceSession("{FILE}")
found = session.run(None, {{one.name: inputs[one.name] for one in session.get_inputs()}})
outputs = dict(zip([one.name for one in session.get_outputs()], found))
"""


@register("export", "onnx")
def export(saved: Bundle, output: str, backbone_only: bool) -> str:
    """The network in `model.onnx`, how rows are prepared, and code that runs it: onnxruntime."""
    onnx, onnxruntime, _ = (_library(name) for name in extras.EXTRAS["onnx"])
    traced = graph.trace(saved, backbone_only)

    def write(folder: Path) -> tuple[str, export_check.Comparison]:
        path = folder / FILE
        model = _translated(saved, traced)
        model.save(str(path), external_data=None)
        onnx.checker.check_model(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

        def run(inputs: graph.Tensors) -> graph.Tensors:
            arrays = session.run(None, {name: one.numpy() for name, one in inputs.items()})
            return {
                name: torch.as_tensor(array)
                for name, array in zip(traced.outputs, arrays, strict=True)
            }

        compared = graph.compare(traced, saved.uri, run)
        graph_readme.write(saved, traced, folder, FILE, RUNNING)
        return f"{FILE} and what runs it ({graph_readme.README})", compared

    return export_folder.commit(saved, output, backbone_only, write)


def _library(name: str) -> Any:
    """Return a package of the extra. Raises BundleError, with the install line, without it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BundleError(
            f"--kind onnx needs {name}, which is not installed: {extras.install('onnx')}"
        ) from error


def _translated(saved: Bundle, traced: graph.Graph) -> Any:
    """Return torch's ONNX program of a traced network, its dimensions under their names.

    Raises:
        BundleError: ONNX has no operator for one of the network's.
    """
    inputs = traced.samples[0][0]
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            recurrent_shapes.known_shapes(),
        ):
            warnings.simplefilter("ignore")
            untyped: Any = torch.onnx
            program = untyped.export(
                traced.program,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(traced.outputs),
                verbose=False,
            )
    except Exception as error:  # torch raises many kinds; each says which operator it stopped at
        raise BundleError(
            f"{saved.uri}: ONNX cannot hold {saved.manifest.arch.name} with "
            f"{saved.manifest.objective.name}: {graph.reason(error)}. Take --kind torch-export"
        ) from error
    names = {
        str(symbol): named
        for value in program.model.graph.inputs
        for symbol, named in zip(value.shape, traced.dimensions[value.name], strict=True)
        if named
    }
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        for place, symbol in enumerate(value.shape):
            if str(symbol) in names:
                value.shape[place] = names[str(symbol)]
    return program
