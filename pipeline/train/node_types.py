"""The node types that a cluster's autoscaler may start, as the cluster declares them.

A cluster that grows has few nodes when a job begins, often none that does work. What a job can ask
for is therefore read from what is declared, never from the nodes that happen to be there. A
declaration is found, on the head node, in

- the environment variable ONETOMANY_NODE_TYPES, as JSON: the `available_node_types` of Ray's
  cluster file. It is for clusters whose autoscaler has its settings elsewhere (Kubernetes);
- else the file that Ray's autoscaler was started with (`ray start --autoscaling-config`), as `ray
  up` does it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

VARIABLE = "ONETOMANY_NODE_TYPES"
MOST_NODES = 1024
"""Nodes of a declaration that are counted: a file may allow any number."""


class NodeTypesError(ValueError):
    """A declaration of node types cannot be read."""


@dataclass(frozen=True)
class NodeType:
    """One kind of node: its name, its logical CPUs and GPUs, and how many of it there may be."""

    name: str
    cpus: float
    gpus: float
    count: int


def declared(gcs_address: str) -> list[NodeType] | None:
    """The node types of the cluster whose head runs here, or none where nothing declares them.

    Args:
        gcs_address: host:port of the cluster's control store, which tells its autoscaler from those
            of other clusters.

    Raises:
        NodeTypesError: the declaration is there and cannot be read.
    """
    text = os.environ.get(VARIABLE)
    if text:
        return _from_variable(text)
    path = _autoscaler_file(gcs_address)
    return from_config(_read(path)) if path is not None else None


def _from_variable(text: str) -> list[NodeType]:
    try:
        types = json.loads(text)
    except ValueError as error:
        raise NodeTypesError(f"{VARIABLE} is not JSON: {error}") from None
    return from_config({"available_node_types": types})


def _read(path: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise NodeTypesError(f"cannot read the autoscaler's file {path}: {error}") from None


def from_config(config: dict[str, Any]) -> list[NodeType]:
    """The node types of a cluster file of Ray's, at most its `max_workers` nodes in all, those with
    GPUs first.

    Raises:
        NodeTypesError: a part of it has another shape than Ray's schema says.
    """
    head = config.get("head_node_type")
    left = config.get("max_workers", MOST_NODES)
    found = []
    try:
        for name, spec in config["available_node_types"].items():
            resources = spec.get("resources") or {}
            count = 1 if name == head else spec.get("max_workers", left)
            found.append(
                NodeType(
                    name, float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), int(count)
                )
            )
        left = int(left)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise NodeTypesError(
            f"the cluster's available_node_types have not the shape of Ray's: {error!r}"
        ) from None
    bounded = []
    for one in sorted(found, key=lambda one: (one.name != head, -one.gpus)):
        count = one.count if one.name == head else min(one.count, left)
        left -= 0 if one.name == head else count
        if count > 0:
            bounded.append(NodeType(one.name, one.cpus, one.gpus, count))
    return bounded


def _autoscaler_file(gcs_address: str) -> Path | None:
    """The file that the autoscaler of this cluster was started with, from the command line of its
    process.
    """
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
