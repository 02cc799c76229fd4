"""The page that explains every field of a job file, as Markdown.

`onetomany schema --markdown` prints it, and `jobs/job_file.md` is what it prints. All of it but the
introduction and the examples is read from the classes that check a job file.
"""

from __future__ import annotations

import json
import re
import textwrap
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import listing, registry
from pipeline.config.schema import (
    COMPONENT_FIELDS,
    Change,
    Data,
    Fanout,
    Finalists,
    Job,
    Select,
    Source,
    Spec,
    Target,
    Train,
)
from pipeline.io.json_values import JsonObject, as_list, as_object

INTRODUCTION = """\
# The job file

`onetomany schema --markdown` prints this page; it is made from the classes that check a job file.
`onetomany schema` prints the same as a JSON Schema, with which an editor completes and checks a job
while you write it.

- **Components.** A modality, backbone, objective, technique or baseline is a name, or one name with
  its options: `full`, or `{full: {layer_decay: 0.8}}`. `onetomany techniques` lists the names, and
  `onetomany techniques full` explains one with its options and their defaults; so do `objectives`,
  `backbones`, `modalities`, `metrics`, `scores` and `baselines`.
- **Paths.** Paths of data are relative to the job file. `storage` is relative to the current
  folder. Both may be on S3 (`s3://bucket/prefix`; `AWS_*` variables, and `AWS_ENDPOINT_URL` for
  MinIO or Ceph). Data may also be `https://` addresses or on the Hugging Face hub
  (`hf://datasets/OWNER/NAME/PATH`), Google Cloud Storage (`gs://BUCKET/KEY`) or Azure Storage
  (`az://CONTAINER/PATH`), which are only read.
- **Models of Hugging Face.** `hf:FOLDER` is a folder on your disk, `hf-hub:NAME` a model on the hub
  (its newest revision; download another one to a folder), `hf/NAME` an architecture of transformers
  with random weights.
- **Variables.** `${NAME}` is replaced by the variable of the environment, in values and in keys.
- **Values.** `true` and `false`, and numbers as in `7`, `0.5` and `1e-4`, are what they look like.
  `no`, `on`, `007`, `12:30` and `2026-10-01` are texts.
- **Overrides.** `--set sources.a.train.steps=10` sets a field from the command line. Where the job
  gives a component by its name alone, its options are set by replacing the whole field:
  `--set 'targets.x.objective={ctc: {beam: 50}}'`.
- **Defaults.** A field that is neither `required` nor has a `default` here may be left out, or be
  `null`; `left out: ...` says what then happens. Where a field has a default, `null: ...` says what
  `null` means.
- **Mistakes.** A mistake is reported before anything starts, on one line with the file, the line,
  the value and the nearest valid name.
"""

PARTS: dict[type[Spec], tuple[str, str]] = {
    Job: (
        "The job",
        """\
name: clothing
sources:
  garments:
    backbone: timm/resnet10t
    data: {uri: garments.parquet, modality: image, columns: {image: image, label: label}}
    objective: classification
targets:
  photos:
    data: {uri: photos, test_fraction: 0.2, modality: image, columns: {image: image, label: label}}
    objective: classification
techniques: [scratch, linear_probe, {full: {layer_decay: 0.8}}]
baselines: [majority]
""",
    ),
    Source: (
        "A source",
        """\
data: {uri: garments.parquet, modality: image, columns: {image: image, label: label}}
backbone: timm/resnet10t
objective: classification
train: {steps: 2000, global_batch: 256, lr: 0.001}
workers: 2
""",
    ),
    Target: (
        "A target",
        """\
data: {uri: photos.parquet, split_column: split, modality: image, columns: {image: x, label: y}}
objective: {classification: {calibrate: temperature}}
metric: macro_f1
label_fractions: [10, 0.1, 1.0]   # ten rows a class, a tenth of the rows, all rows
train: {epochs: 5, global_batch: 64}
""",
    ),
    Data: (
        "Data",
        """\
uri: [s3://bucket/photos/2025, s3://bucket/photos/2026/*.parquet]
split_column: split
group: photographer               # a photographer's rows are never in two splits
where: {country: [de, fr]}
modality: {image: {size: 96}}
columns: {image: image, label: label}
""",
    ),
    Train: (
        "Training",
        """\
steps: 500
global_batch: 128
lr: 0.0005
weight_decay: 0.01
eval_every_steps: 100
""",
    ),
    Change: (
        "Changes in the course of a training",
        """\
step: 200
lr: 0.0003
weight_decay: 0.2
""",
    ),
    Fanout: (
        "The fan-out",
        """\
seeds: 3
trials: 8
search: {lr: [0.0001, 0.01], weight_decay: [0.001, 0.01, 0.1]}
scheduler: asha
""",
    ),
    Select: (
        "Selection of sources",
        """\
score: logme
top: 2
""",
    ),
    Finalists: (
        "Finalists of a search",
        """\
top: 3
seeds: 2
""",
    ),
}
"""Each part of a job, with its heading and an example."""

WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def page() -> str:
    """Return the page: the introduction, and a section for each part of a job."""
    whole: JsonObject = Job.model_json_schema()
    parts = as_object(whole["$defs"])
    lines = [INTRODUCTION]
    for kind, (heading, example) in PARTS.items():
        own = whole if kind is Job else as_object(parts[kind.__name__])
        lines += [f"## {heading}\n", *_wrap(_text(kind)), "", f"```yaml\n{example}```\n"]
        lines += [*_fields(kind, as_object(own["properties"])), ""]
    return "\n".join(lines).rstrip() + "\n"


def _text(kind: type[Spec]) -> str:
    """Return the docstring of a part, as one paragraph."""
    return " ".join(listing.plain(kind.__doc__ or "").split())


def _fields(kind: type[Spec], properties: JsonObject) -> list[str]:
    """Return the lines of a list with an item for each field."""
    lines: list[str] = []
    for name, field in kind.model_fields.items():
        takes = _takes(as_object(properties[name]), name)
        terms = "; ".join(filter(None, (takes, _default(field))))
        lines += _wrap(f"- **`{name}`** ({terms}): {field.description}")
    return lines


def _wrap(text: str) -> list[str]:
    """Return the lines of a paragraph or of an item of a list. Short code is not broken."""
    unbroken = re.sub(r"`[^`]{1,40}`", lambda code: code[0].replace(" ", "\0"), text)
    indent = "  " if text.startswith("- ") else ""
    lines = textwrap.wrap(
        unbroken, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace("\0", " ") for line in lines]


def _takes(node: JsonObject, field: str) -> str:
    """Return in words what a field takes.

    Args:
        node: JSON Schema of the field, or of a part of it.
        field: The field's name, which says of what kind a component is.
    """
    if "$ref" in node:
        return _part(str(node["$ref"]).rpartition("/")[2], field)
    if "anyOf" in node:
        choices = [as_object(choice) for choice in as_list(node["anyOf"])]
        given = [_takes(choice, field) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(given))
    if "enum" in node:
        return _names(as_list(node["enum"]))
    if "const" in node:
        return f"`{node['const']}`"
    if "prefixItems" in node:
        return f"list of {len(as_list(node['prefixItems']))} whole numbers"
    if node.get("type") == "array":
        item = _takes(as_object(node["items"]), field)
        return "list of " + re.sub(r"\b(text|number|component|name)\b", r"\1s", item)
    if node.get("type") == "object":
        return f"mapping, name to {_takes(as_object(node['additionalProperties']), field)}"
    bounds = [f"{words} {node[key]}" for key, words in BOUNDS.items() if key in node]
    return ", ".join([WORDS[str(node["type"])], *bounds])


def _part(name: str, field: str) -> str:
    """Return a link to the section of a part, or which command lists the components."""
    if name == "ComponentConfig":
        commands = {kind: command for command, kind in listing.KINDS.items()}
        return f"component, see `onetomany {commands[COMPONENT_FIELDS[field]]}`"
    (heading,) = (words for kind, (words, _) in PARTS.items() if kind.__name__ == name)
    return f"[{heading.lower()}](#{heading.lower().replace(' ', '-')})"


def _names(values: list[Any]) -> str:
    for command, kind in listing.KINDS.items():
        if values == registry.names(kind):
            return f"name, see `onetomany {command}`"
    return ", ".join(f"`{value}`" for value in values)


def _default(field: FieldInfo) -> str:
    """Return a field's default as a job file would have it, "" where it is not given."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, list):
        listed = ", ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
        return f"default `[{listed}]`"
    if isinstance(value, BaseModel):
        return f"default `{value}`" if "name" in type(value).model_fields else "its defaults"
    return f"default `{json.dumps(value).replace(chr(34), '')}`"
