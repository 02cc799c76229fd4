"""A Ray cluster on this machine that grows and shrinks, for tests:
`ray.cluster_utils.AutoscalingCluster` made to work.

Ray's class reads a file that its wheel does not hold, and begins and ends with `ray stop`, which
would end every Ray process of the user. Its nodes share one folder, in which a node that starts
removes the running job's code.
"""

from __future__ import annotations

import functools
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FakeMultiNodeProvider,
)
from ray.cluster_utils import AutoscalingCluster

from cluster import local

FOLDER = "ONETOMANY_TEST_FOLDER"


class NodesWithFoldersOfTheirOwn(FakeMultiNodeProvider):
    """Ray's provider of fake nodes. Ray's autoscaler makes it in a process of its own."""

    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        plain = ray._private.parameter.RayParams
        folder = os.path.join(os.environ[FOLDER], str(self._next_node_id + 1))
        ray._private.parameter.RayParams = functools.partial(plain, temp_dir=folder)
        try:
            super()._create_node_with_resources_and_labels(
                node_config, tags, count, resources, labels
            )
        finally:
            ray._private.parameter.RayParams = plain


class GrowingCluster(AutoscalingCluster):
    """Ray's cluster that grows, started and stopped as `cluster.local` does it: on loopback, its
    own processes alone.
    """

    def _generate_config(
        self, head_resources, worker_node_types, autoscaler_v2=False, **config_kwargs
    ):
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        module = f"{Path(__file__).stem}.{NodesWithFoldersOfTheirOwn.__name__}"
        provider = {
            "type": "external",
            "module": module,
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        }
        return {
            "cluster_name": "growing",
            "max_workers": 8,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.25,
            "provider": provider,
            "auth": {},
            "head_node_type": "ray.head.default",
            "available_node_types": {**worker_node_types, "ray.head.default": head},
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "docker": {},
            **config_kwargs,
        }

    def start(self, _system_config=None, override_env=None):
        port, dashboard_port = local.claim_port("127.0.0.1", 0), local.claim_port("127.0.0.1", 0)
        folder = Path(tempfile.mkdtemp(prefix="o2m"))
        address = f"127.0.0.1:{port}"
        self._config["provider"]["gcs_address"] = address
        (folder / "autoscaler.json").write_text(json.dumps(self._config))
        env = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self.handle = local.Handle(
            address, f"http://127.0.0.1:{dashboard_port}", folder, env, secrets.token_hex(8)
        )
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        settings = {
            "PYTHONPATH": path,
            FOLDER: str(folder),
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        command = [
            *(sys.executable, "-P", "-c", local.LOOPBACK_RAY, "start", "--block", "--head"),
            *(
                "--node-ip-address",
                "127.0.0.1",
                "--port",
                str(port),
                "--num-cpus",
                "0",
                "--num-gpus",
                "0",
            ),
            *(
                "--dashboard-host",
                "127.0.0.1",
                "--dashboard-port",
                str(dashboard_port),
                "--disable-usage-stats",
            ),
            *(
                "--dashboard-agent-listen-port",
                "0",
                "--ray-client-server-port",
                str(local.claim_port("127.0.0.1", 0)),
            ),
            *(
                "--object-store-memory",
                str(200 << 20),
                f"--autoscaling-config={folder / 'autoscaler.json'}",
            ),
        ]
        local.launch_node(self.handle, command, 0, settings)
        try:
            local.wait_until(
                self.handle,
                time.monotonic() + 120,
                lambda: local.is_answering(self.handle),
                "the job API",
                None,
            )
        except BaseException:
            self.shutdown()
            raise

    def shutdown(self):
        self.handle.stop()

    def workers(self) -> list[str]:
        """ALIVE or DEAD of every node that there has been beside the head."""
        reply = None
        while reply is None:  # the dashboard answers late on a busy machine
            reply = local.get_json(self.handle, "/api/v0/nodes?detail=0&limit=1000&timeout=5")
        return [
            node["state"] for node in reply["data"]["result"]["result"] if not node["is_head_node"]
        ]
