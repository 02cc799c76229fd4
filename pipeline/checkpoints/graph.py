"""The network of a bundle as one graph of tensors, traced by torch.export.

ONNX and PT2 files are both written from it. Inputs are the finished tensors of the modality that
the network reads, by their names in a batch; outputs are those of `GivesRawOutputs`, or the pooled
features of a backbone alone. The number of rows may differ from call to call, and the lengths of
texts, recordings and episodes too.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.checkpoints import export_check, recurrent_shapes
from pipeline.checkpoints.bundle import Bundle, BundleError, Manifest
from pipeline.config import registry
from pipeline.core.contracts import Batch, Modality, Task
from pipeline.core.contracts.objective_capabilities import gives_raw_outputs, output_scale
from pipeline.core.specs import NO_OBJECTIVE

SIZES = ((4, 1.0), (1, 1.0), (3, 0.5), (2, 1.5))
"""Rows and relative lengths that are compared; the first ones are what is traced.

A single row is among them: torch treats dimensions of size 1 in its own way. So are longer rows
than the traced ones: ONNX would keep the branch of a network that asks for its rows' length.
"""

MAX_MESSAGE = 300
"""Characters of torch's own reason that are repeated."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Graph:
    """A traced network.

    Attributes:
        program: What torch.export traced.
        samples: Inputs of each of `SIZES`, and what the bundle gives for them.
        dimensions: Of each input the names of its dimensions; None for one of a fixed size.
        outputs: The names of the outputs.
        meaning: What the outputs are, in words.
        scale: Deviation and mean of the unit that the outputs are in (`output_scale`).
    """

    program: Any
    samples: list[tuple[Tensors, Tensors]]
    dimensions: dict[str, tuple[str | None, ...]]
    outputs: tuple[str, ...]
    meaning: str
    scale: tuple[float, float] = export_check.PLAIN


class _Network(nn.Module):
    """A function of a batch as a module, from a mapping of tensors to a mapping of tensors."""

    def __init__(self, model: nn.Module, compute: Callable[[Batch], Tensors]):
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, inputs: Tensors) -> Tensors:
        return self._compute(as_batch(inputs))


class _Noted(dict[str, Tensor]):
    """Tensors of a batch that note which of them are read."""

    def __init__(self, tensors: Tensors):
        super().__init__(tensors)
        self.names_read: dict[str, None] = {}

    def __getitem__(self, name: str) -> Tensor:
        self.names_read[name] = None
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name in self:
            return self[name]  # which notes it
        return default


def as_batch(inputs: Tensors) -> Batch:
    """Return finished tensors as a batch; it has one row number and key, whatever its size."""
    return Batch(
        np.zeros(1, dtype=np.int64),
        torch.zeros(1, dtype=torch.int64),
        inputs,
    )


@torch.no_grad()
def trace(saved: Bundle, backbone_only: bool) -> Graph:
    """Trace the network of a bundle.

    Raises:
        BundleError: The objective has no outputs of this kind, the rows of the modality cannot be
            made up, or the network computes something that a graph cannot hold. The reason names
            the operator.
    """
    model, compute, meaning = _function(saved, backbone_only)
    batches = list(_batches(saved, saved.modality()))
    noted = _Noted(batches[0])
    try:
        first = compute(as_batch(noted))
    except ValueError as error:
        raise BundleError(f"{saved.uri}: {error}") from error
    names = [name for name in batches[0] if name in noted.names_read]
    inputs = [{name: one[name] for name in names} for one in batches]
    samples = [(one, compute(as_batch(one))) for one in inputs]
    dimensions = _dimensions(inputs)
    dynamic = {
        name: {place: torch.export.Dim.DYNAMIC for place, of in enumerate(dimensions[name]) if of}
        for name in names
    }
    try:
        with recurrent_shapes.known_shapes():
            program = torch.export.export(
                _Network(model, compute).eval(),
                (inputs[0],),
                dynamic_shapes=({name: dynamic[name] for name in names},),
                strict=False,
            )
    except Exception as error:  # torch raises many kinds; each says which operator it stopped at
        raise BundleError(
            f"{saved.uri}: torch.export cannot trace {saved.manifest.arch.name} with "
            f"{saved.manifest.objective.name}: {reason(error)}. Take --kind bundle or state-dict"
        ) from error
    for module in program.graph_module.modules():  # of branches too
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # places of this machine, which files would keep
    scale = export_check.PLAIN
    if isinstance(model, Task):
        scale = output_scale(model.objective)
    return Graph(program, samples, dimensions, tuple(first), meaning, scale)


def has_outputs(manifest: Manifest) -> bool:
    """Return whether the objective of a bundle has outputs for a graph.

    `trace` may still refuse the network.
    """
    name = manifest.objective.name
    return name == NO_OBJECTIVE.name or gives_raw_outputs(registry.get("objective", name))


def _function(
    saved: Bundle, backbone_only: bool
) -> tuple[nn.Module, Callable[[Batch], Tensors], str]:
    """Return the network, what is computed with it, and what that is in words."""
    objective_name = saved.manifest.objective.name
    if backbone_only or objective_name == NO_OBJECTIVE.name:
        backbone = saved.backbone()
        return (
            backbone,
            lambda batch: {"features": backbone(batch).pooled.float()},
            "`features` (B, D): one vector a row.",
        )
    task = saved.task()
    objective = task.objective
    if not (has_outputs(saved.manifest) and gives_raw_outputs(objective)):
        raise BundleError(
            f"{saved.uri}: {objective_name} has no outputs that a graph of tensors could give; "
            "--backbone-only writes the network that computes the features"
        )
    meaning = inspect.getdoc(type(objective).raw_outputs) or ""
    return task, lambda batch: objective.raw_outputs(task.backbone, batch), meaning


def _batches(saved: Bundle, modality: Modality) -> Iterator[Tensors]:
    """Yield finished rows of each of `SIZES`."""
    for rows, length in SIZES:
        batch = export_check.random_batch(modality, rows, length=length)
        if batch is None:
            raise BundleError(
                f"{saved.uri}: rows of modality {saved.manifest.modality.name} cannot be made up, "
                "so an export cannot be compared with the bundle"
            )
        yield _with_padding(batch.data)


def _with_padding(inputs: Tensors) -> Tensors:
    """Return rows of which one is padded: a file that leaves a mask out gives other numbers."""
    mask = inputs.get("mask")
    if mask is None or mask.dim() != 2 or len(mask) < 2 or not mask.all():
        return inputs
    mask = mask.clone()
    mask[-1, mask.shape[1] // 2 + 1 :] = False
    return {**inputs, "mask": mask}


def _dimensions(samples: list[Tensors]) -> dict[str, tuple[str | None, ...]]:
    """Name the dimensions that differ between the samples; those that differ alike are one."""
    dimensions: dict[str, tuple[str | None, ...]] = {}
    names: dict[tuple[int, ...], str] = {tuple(rows for rows, _ in SIZES): "batch"}
    for name in samples[0]:
        names_of_input: list[str | None] = []
        for place in range(samples[0][name].dim()):
            sizes = tuple(sample[name].shape[place] for sample in samples)
            if len(set(sizes)) == 1:
                names_of_input.append(None)
                continue
            names_of_input.append(
                names.setdefault(sizes, "length" if len(names) == 1 else f"{name}_length")
            )
        dimensions[name] = tuple(names_of_input)
    return dimensions


def reason(error: BaseException) -> str:
    """Return the lines of an error of torch that say what could not be traced or translated."""
    causes = [error]
    while (inner := causes[-1].__cause__) is not None:
        causes.append(inner)
    last_cause = str(causes[-1])
    lines = [line.strip() for line in last_cause.splitlines() if line.strip()]
    message = " ".join(lines[:2])[:MAX_MESSAGE] or type(causes[-1]).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/pipeline/" in frame.filename]
    line = own[-1].line if own else None
    if not line or line.startswith("raise") or "/checkpoints/" in own[-1].filename:
        return message
    return f"{message} (at {line} of {Path(own[-1].filename).name})"


def compare(graph: Graph, uri: str, run: Callable[[Tensors], Tensors]) -> export_check.Comparison:
    """Compare what a written file gives with what the bundle gives, on rows of all `SIZES`.

    Args:
        graph: The traced network.
        uri: Place of the bundle, for messages.
        run: Runs the file on inputs.

    Raises:
        BundleError: An output differs by more than rounding, or its shape does.
    """
    worst: export_check.Comparison | None = None
    for inputs, ours in graph.samples:
        try:
            exported = run(inputs)
        except Exception as error:  # torch and onnxruntime raise many kinds
            sizes = {name: tuple(array.shape) for name, array in inputs.items()}
            raise BundleError(
                f"{uri}: the export does not take inputs of {sizes}, which the bundle takes: "
                f"{reason(error)}; nothing was written. Take --kind bundle or state-dict"
            ) from error
        exported = export_check.in_order_of(ours, exported)
        for name, tensor in ours.items():
            comparison = export_check.compare_outputs(
                tensor, exported[name], name, scale=graph.scale
            )
            export_check.require(comparison, uri)
            if worst is None or comparison.difference > worst.difference:
                worst = comparison
    assert worst is not None
    batches = ", ".join(str(rows) for rows, _ in SIZES)
    what = f"{worst.what} in batches of {batches} rows"
    return replace(worst, rows=sum(rows for rows, _ in SIZES), what=what)
