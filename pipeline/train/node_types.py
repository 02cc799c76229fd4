"""The node types that a cluster's autoscaler may start, as the cluster declares them.

A cluster that grows has few nodes when a job begins, often only the head. So what a job can ask for
is read from the declaration of node types, never from the present nodes. On the head node it is

- the environment variable ONETOMANY_NODE_TYPES, as JSON: the `available_node_types` of Ray's
  cluster file, for clusters whose autoscaler has its settings elsewhere (Kubernetes);
- else the file that Ray's autoscaler was started with (`ray start --autoscaling-config`), as by
  `ray up`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

VARIABLE = "ONETOMANY_NODE_TYPES"
MAX_NODES = 1024
"""Most nodes of a declaration that are counted; a file may allow any number."""


class NodeTypesError(ValueError):
    """A declaration of node types cannot be read."""


@dataclass(frozen=True)
class NodeType:
    """A kind of node: its name, its logical CPUs and GPUs, and the most nodes of this kind."""

    name: str
    cpus: float
    gpus: float
    count: int


def read_declared_types(gcs_address: str) -> list[NodeType] | None:
    """Return the node types of the cluster whose head runs here; None: nothing declares them.

    Args:
        gcs_address: host:port of the cluster's control store, by which its autoscaler is found
            among those of other clusters.

    Raises:
        NodeTypesError: There is a declaration that cannot be read.
    """
    text = os.environ.get(VARIABLE)
    if text:
        try:
            types = json.loads(text)
        except ValueError as error:
            raise NodeTypesError(f"{VARIABLE} is not JSON: {error}") from None
        return from_config({"available_node_types": types})
    path = _autoscaler_file(gcs_address)
    return from_config(_read(path)) if path is not None else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise NodeTypesError(f"cannot read the autoscaler's file {path}: {error}") from None


def from_config(config: dict[str, Any]) -> list[NodeType]:
    """Return the node types of Ray's cluster file: the head, then those with most GPUs first.

    All together have at most the `max_workers` nodes of the file.

    Raises:
        NodeTypesError: The file does not follow Ray's schema.
    """
    head = config.get("head_node_type")
    remaining = config.get("max_workers", MAX_NODES)
    types = []
    try:
        for name, spec in config["available_node_types"].items():
            resources = spec.get("resources") or {}
            count = 1 if name == head else spec.get("max_workers", remaining)
            types.append(
                NodeType(
                    name, float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), int(count)
                )
            )
        remaining = int(remaining)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise NodeTypesError(
            f"the cluster's available_node_types have not the shape of Ray's: {error!r}"
        ) from None
    bounded = []
    for node_type in sorted(types, key=lambda kind: (kind.name != head, -kind.gpus)):
        count = node_type.count
        if node_type.name != head:
            count = min(count, remaining)
            remaining -= count
        if count > 0:
            bounded.append(replace(node_type, count=count))
    return bounded


def _autoscaler_file(gcs_address: str) -> Path | None:
    """Return the file that this cluster's autoscaler was started with, from its command line."""
    option = "--autoscaling-config="
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:  # it has ended, or is another user's
            continue
        is_ours = (
            any(word.endswith("monitor.py") for word in words)
            and f"--gcs-address={gcs_address}" in words
        )
        paths = [
            word.removeprefix(option)
            for word in words
            if word.startswith(option) and word != option
        ]
        if is_ours and paths:
            return Path(paths[0]).expanduser()
    return None
