"""What there is of each kind of component, as text for a terminal.

All of it is read from the sources: the first sentence and the rest of a component's docstring, and
the fields of its options class. Nothing is imported, so it takes less than a second.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from typing import Any

from pydantic_core import PydanticUndefined

from pipeline.config import registry
from pipeline.config.registry import Entry

KINDS: dict[str, str] = {
    "techniques": "technique",
    "objectives": "objective",
    "backbones": "model",
    "modalities": "modality",
    "metrics": "metric",
    "scores": "score",
    "baselines": "baseline",
    "trackers": "tracker",
}
"""The commands that list components, and the kind of each in the registry."""
IN_A_JOB: dict[str, str] = {
    "technique": "techniques: [{}]",
    "objective": "objective: {}",
    "model": "backbone: {}",
    "modality": "modality: {}",
    "metric": "metric: {}",
    "score": "fanout: {{select: {{score: {}, top: 2}}}}",
    "baseline": "baselines: [{}]",
    "tracker": "tracking: {}",
}
"""How a job file names a component of each kind."""
SENTENCE_END = re.compile(r"(?<!\bal)\.\s+(?=[A-Z`])")
"""A full stop that ends a sentence; "et al." does not."""
MAX_ARCHITECTURES = 40
"""Names of a backbone library that are printed before the rest is counted."""


def first_sentence(entry: Entry) -> str:
    """Return what a component is, in one line."""
    paragraph = " ".join(plain(entry.documentation).partition("\n\n")[0].split())
    text = SENTENCE_END.split(paragraph.removeprefix("Return "))[0].rstrip(".")
    is_word = text.partition(" ")[0].isalpha()
    return text[:1].upper() + text[1:] if is_word else text


def names(kind: str) -> list[tuple[str, str]]:
    """Return the name and the first sentence of every component of a kind.

    A backbone library also says how many networks it has.
    """
    rows: list[tuple[str, str]] = []
    for name, entry in sorted(registry.entries(kind).items()):
        text = first_sentence(entry)
        if kind == "model":
            count = len(registry.architectures(name))
            text += f" ({count} network{'s' if count > 1 else ''})"
        rows.append((name, text))
    return rows


def describe(kind: str, name: str) -> str:
    """Return a component's documentation, its options with defaults, and how a job names it.

    Of a backbone library the names of its networks are listed, too: ``timm/resnet`` for those whose
    name contains ``resnet``.

    Raises:
        ValueError: the name is unknown; the nearest valid names are given.
    """
    component, has_part, part = name.partition("/") if kind == "model" else (name, "", "")
    if kind == "model" and component not in registry.names(kind):
        raise ValueError(f"unknown backbone {name!r}{registry.backbone_advice(name)}")
    entry = registry.entry(kind, component)
    lines = [entry.title or component, explanation(entry), ""]
    if entry.roles or entry.optional_roles:
        needed, optional = ", ".join(entry.roles) or "none", ", ".join(entry.optional_roles)
        lines += [f"Columns: {needed}" + (f"; where given: {optional}" if optional else ""), ""]
    lines += _options(entry)
    if kind == "model":
        lines += _networks(component, part)
    example = part if has_part and part in registry.architectures(component) else ""
    shown = f"{component}/{example or 'NAME'}" if kind == "model" else component
    lines.append(f"In a job: {IN_A_JOB[kind].format(shown)}")
    own = inspect.get_annotations(entry.options)
    option = next(iter(own or entry.options.model_fields), None)
    if option is not None:
        lines.append(f"With an option: {IN_A_JOB[kind].format(f'{{{shown}: {{{option}: ...}}}}')}")
    return "\n".join(lines)


def explanation(entry: Entry) -> str:
    """Return a component's documentation, indented, without what concerns its Python code alone."""
    paragraphs = plain(entry.documentation).removeprefix("Return ").split("\n\n")
    text = "\n\n".join(
        paragraph
        for paragraph in paragraphs
        if not paragraph.startswith(("Args:", "Returns:", "Raises"))
    )
    return textwrap.indent(text[:1].upper() + text[1:], "  ")


def plain(text: str) -> str:
    """Return a docstring with one mark around code, as in Markdown."""
    return inspect.cleandoc(text).replace("``", "`")


def _options(entry: Entry) -> list[str]:
    fields = entry.options.model_fields
    if not fields:
        return ["No options.", ""]
    lines = ["Options:"]
    for name, field in fields.items():
        lines.append(f"  {name}: {_default(field)}")
        lines.append(textwrap.indent(textwrap.fill(field.description or "", 92), "      "))
    return [*lines, ""]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "no default; must be given"
    return "none" if field.default is None else json.dumps(field.default, default=str)


def _networks(library: str, part: str) -> list[str]:
    """Return lines with the names of a library's networks that contain ``part``."""
    found = sorted(name for name in registry.architectures(library) if part in name)
    if part and not found:
        near = registry.nearest(part, registry.architectures(library))
        raise ValueError(f"{library} has no network whose name contains {part!r}; {near}")
    text = ", ".join(found[:MAX_ARCHITECTURES])
    left = len(found) - MAX_ARCHITECTURES
    if left > 0:
        text += f" and {left} more: onetomany backbones {library}/PART lists those with PART"
    text = textwrap.fill(text, 92, break_on_hyphens=False)  # blenderbot-small is one name
    return [f"Networks ({len(found)}):", textwrap.indent(text, "  "), ""]
