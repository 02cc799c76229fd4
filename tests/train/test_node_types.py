"""Declared node types: what a cluster file of Ray's says, where it is found, and what is wrong with
a bad one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.train import node_types
from pipeline.train.node_types import NodeType, NodeTypesError, from_config, read_declared_types

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


@pytest.fixture(autouse=True)
def _nothing_declared(monkeypatch):
    monkeypatch.delenv(node_types.VARIABLE, raising=False)


def test_the_clusters_that_ship_here_declare_gpus_and_cpus():
    google = from_config(yaml.safe_load((CLUSTER / "gcp.yaml").read_text()))
    assert google == [
        NodeType("head", 0, 0, 1),
        NodeType("gpu", 48, 4, 4),
        NodeType("cpu", 32, 0, 4),
    ]


def test_no_more_nodes_are_counted_than_the_file_allows_and_gpus_come_first():
    types = {
        "head": {"resources": {"CPU": 8}},
        "cpu": {"resources": {"CPU": 4}, "max_workers": 10},
        "gpu": {"resources": {"CPU": 16, "GPU": 2}, "max_workers": 3},
    }
    found = from_config({"head_node_type": "head", "max_workers": 5, "available_node_types": types})
    assert found == [NodeType("head", 8, 0, 1), NodeType("gpu", 16, 2, 3), NodeType("cpu", 4, 0, 2)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"available_node_types": []},
        {"available_node_types": {"a": 3}},
        {"available_node_types": {"a": {"resources": {"CPU": "many"}}}},
    ],
    ids=str,
)
def test_another_shape_is_one_clear_error(config):
    with pytest.raises(NodeTypesError, match="have not the shape of Ray's"):
        from_config(config)


def test_the_variable_declares_them_where_the_autoscaler_has_no_file(monkeypatch):
    monkeypatch.setenv(
        node_types.VARIABLE,
        json.dumps({"gpu": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 8}}),
    )
    assert read_declared_types("nowhere:1") == [NodeType("gpu", 16, 1, 8)]
    monkeypatch.setenv(node_types.VARIABLE, "{gpu: 1}")
    with pytest.raises(NodeTypesError, match="ONETOMANY_NODE_TYPES is not JSON"):
        read_declared_types("nowhere:1")


def test_the_file_of_this_clusters_autoscaler_is_found_and_no_other(tmp_path):
    """By the command line of the autoscaler's process, as Ray starts it."""
    (tmp_path / "monitor.py").write_text("input()")
    (tmp_path / "cluster.yaml").write_text(
        "available_node_types: {cpu: {resources: {CPU: 2}, max_workers: 3}}"
    )
    command = [
        sys.executable,
        str(tmp_path / "monitor.py"),
        "--gcs-address=127.0.0.1:7",
        f"--autoscaling-config={tmp_path / 'cluster.yaml'}",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        assert read_declared_types("127.0.0.1:7") == [NodeType("cpu", 2, 0, 3)]
        assert read_declared_types("127.0.0.1:8") is None
        (tmp_path / "cluster.yaml").unlink()
        with pytest.raises(
            NodeTypesError, match=r"cannot read the autoscaler's file .*cluster\.yaml"
        ):
            read_declared_types("127.0.0.1:7")
    finally:
        process.kill()
        process.wait()
