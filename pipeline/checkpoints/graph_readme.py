"""What stands beside an exported graph: its description, and a README with code that runs it."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoints import classifier_export, hf_text
from pipeline.checkpoints.bundle import Bundle, without_folders
from pipeline.checkpoints.graph import Graph
from pipeline.core.capabilities import preparation_code
from pipeline.media.language_model import FileCopy

TOKENIZER = "tokenizer"
"""What the state of a modality calls the tokenizer that it has."""
LANGUAGE_MODEL = "lm"
"""What the state and the options of an objective call the language model that it has."""
DESCRIPTION, README = "graph.json", "README.md"

ZEROS = """
inputs = {{
    name: np.zeros([{sizes}.get(size, size) for size in one["shape"]], one["type"])
    for name, one in graph["inputs"].items()
}}  # zeros: replace them by your rows, prepared as described below
"""

FRAME = """
inputs["frame"] = np.array([[width, height, left, top]], np.float32)  # of the picture in the input
"""


def write(saved: Bundle, graph: Graph, folder: Path, file: str, running: str) -> None:
    """Write the description and the README, for texts the tokenizer, for speech the language model.

    Args:
        saved: The bundle.
        graph: Its network.
        folder: Where to.
        file: The exported file.
        running: Python code that computes ``outputs`` from ``inputs``, both by name, as arrays.
    """
    manifest = saved.manifest
    first, state = graph.samples[0], saved.modality().state
    # the tokenizer is a file of its own, and so is the language model
    described_state = {name: value for name, value in state.items() if name != TOKENIZER}
    modality = replace(manifest.modality, state=described_state)
    objective = without_folders("objective", manifest.objective)  # an export may be published
    objective_state = dict(objective.state)
    if copy := objective_state.pop(LANGUAGE_MODEL, None):
        held = FileCopy(**copy).unpacked()
        if held is not None:
            (folder / objective.options[LANGUAGE_MODEL]).write_bytes(held)
    shapes = {
        name: [of or size for of, size in zip(graph.dimensions[name], one.shape, strict=True)]
        for name, one in first[0].items()
    }
    described: dict[str, object] = {
        "architecture": manifest.arch.name,
        "objective": manifest.objective.name,
        "inputs": {
            name: {"type": _type(one), "shape": shapes[name]} for name, one in first[0].items()
        },
        "outputs": {name: {"type": _type(one)} for name, one in first[1].items()},
        "labels": manifest.objective.state.get("labels"),
        "objective_options": objective.options,
        "objective_state": objective_state,
        "modality": without_folders("modality", modality).to_json(),
    }
    meaning = graph.meaning
    fitted = classifier_export.threshold(manifest.objective)
    if fitted is not None and "scores" in first[1]:  # features alone are not cut
        described["threshold"], described["threshold_of"] = fitted
        meaning += (
            f" `threshold` in `{DESCRIPTION}`, {fitted[0]:.4g}, is the {fitted[1]}. It was fitted "
            "on validation rows. Use it to choose the label, in place of the highest score."
        )
    text = json.dumps(described, indent=2, ensure_ascii=False)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    rows_are_words = hf_text.splits_words(manifest)
    if TOKENIZER in state:
        tokenizer, _ = hf_text.with_post_processor(state, rows_are_words)
        tokenizer.save(str(folder / "tokenizer.json"))
    names = sorted({of for shape in shapes.values() for of in shape if isinstance(of, str)})
    code = preparation_code(saved.modality(), rows_are_words)
    preparation: list[str] = []
    if code is None:
        code = ZEROS.format(sizes=dict.fromkeys(names, 2))
        docstring = inspect.getdoc(type(saved.modality())) or ""
        preparation = ["", "How rows become the inputs:", "", docstring.replace("``", "`")]
    elif "frame" in shapes:
        code = code.rstrip() + FRAME
    lines = [
        f"# {manifest.arch.name}, {manifest.objective.name}",
        "",
        f"`{file}` was exported by One to Many. `{DESCRIPTION}` has its inputs and outputs, the "
        "names of its labels, and how rows are prepared (`modality`).",
        "",
        "Outputs:",
        "",
        meaning,
        "",
        f"Sizes that may differ from call to call: {', '.join(names)}. From this folder:",
        "",
        "```python",
        "import json",
        "",
        "import numpy as np",
        "",
        f'graph = json.load(open("{DESCRIPTION}"))',
        code.rstrip(),
        running.rstrip(),
        "print({name: array.shape for name, array in outputs.items()})",
        "```",
        *preparation,
        "",
    ]
    (folder / README).write_text("\n".join(lines), encoding="utf-8")


def _type(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
