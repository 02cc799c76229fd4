"""MLflow, by its client (`mlflow-skinny` is enough)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import extras
from pipeline.config.registry import Options, register
from pipeline.core.contracts.tracker import Point, RunDescription, RunStatus, Tracker

ENVIRONMENT = {
    # a server that is gone must not hold up the end of a job for the minutes that MLflow waits
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Settings of MLflow's client, where the user has made none."""
STATUSES = {"done": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "stopped": "KILLED"}
MAX_METRICS, MAX_PARAMETERS = 1000, 100
"""Most values of one request to MLflow."""
MAX_PARAMETER_CHARACTERS = 6000
"""Most characters of a parameter that MLflow stores."""
KEY = "onetomany.key"
"""Tag of a nested run with its key, by which one that was cut off is found."""


class MLflowOptions(Options):
    uri: str = Field(
        "",
        description="the tracking server (https://...) or database (sqlite:///runs.db); empty: "
        "MLFLOW_TRACKING_URI. A password or token belongs into MLFLOW_TRACKING_USERNAME, "
        "MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN",
    )
    experiment: str = Field("", description="the experiment; empty: the name of the job")
    bundles: bool = Field(False, description="whether the bundles that are kept are uploaded too")


@register("tracker", "mlflow", options=MLflowOptions, title="MLflow")
class MLflow(Tracker[MLflowOptions]):
    """MLflow: a run for the job, with nested runs for its sources and trials (extra `mlflow`)."""

    _client: Any = None
    _experiment = ""

    def check_library(self) -> None:
        if find_spec("mlflow") is None:
            raise ValueError(f"mlflow is not installed: {extras.install('mlflow')}")

    def _connected(self) -> Any:
        """Return the client, with the experiment there."""
        if self._client is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic", "urllib3.connectionpool"):
                logging.getLogger(name).setLevel(logging.ERROR)  # a failure is told once, by us
            client = MlflowClient(self.options.uri or None)
            name = self.options.experiment or self.job
            found = client.get_experiment_by_name(name)
            self._experiment = (
                client.create_experiment(name) if found is None else found.experiment_id
            )
            self._client = client
        return self._client

    def begin(self, run: RunDescription, replaces: str | None = None) -> str:
        from mlflow.entities import Param

        client = self._connected()
        for old in {*self._cut_off(run), *([replaces] if replaces else [])}:
            self._delete(old)
        tags = {KEY: run.key, "onetomany.kind": run.kind, "mlflow.source.name": "onetomany"}
        if run.parent is not None:
            tags["mlflow.parentRunId"] = run.parent
        made = client.create_run(self._experiment, round(1000 * run.began), tags, run.name)
        run_id = made.info.run_id
        parameters = [
            Param(_name(name), value[:MAX_PARAMETER_CHARACTERS])
            for name, value in run.parameters.items()
        ]
        for i in range(0, len(parameters), MAX_PARAMETERS):
            client.log_batch(run_id, params=parameters[i : i + MAX_PARAMETERS])
        return run_id

    def _cut_off(self, run: RunDescription) -> list[str]:
        """Return the ids of earlier attempts to log a nested run."""
        if run.parent is None:
            return []
        wanted = f"tags.`{KEY}` = '{run.key}' and tags.`mlflow.parentRunId` = '{run.parent}'"
        found = self._client.search_runs([self._experiment], wanted)
        return [one.info.run_id for one in found]

    def _delete(self, run_id: str) -> None:
        """Delete a run, unless somebody has already."""
        if self.exists(run_id):
            self._client.delete_run(run_id)

    def exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            found = self._connected().get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return found.info.lifecycle_stage == "active"

    def resume(self, run_id: str) -> bool:
        if not self.exists(run_id):
            return False
        self._client.update_run(run_id, "RUNNING")
        return True

    def log(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        for i in range(0, len(points), MAX_METRICS):
            part = points[i : i + MAX_METRICS]
            metrics = [
                Metric(_name(one.name), one.value, round(1000 * one.time), one.step) for one in part
            ]
            self._connected().log_batch(run_id, metrics=metrics)

    def upload(self, run_id: str, path: Path, folder: str = "") -> None:
        client = self._connected()
        add = client.log_artifacts if path.is_dir() else client.log_artifact
        add(run_id, str(path), folder or None)

    def end(self, run_id: str, status: RunStatus, ended: float) -> None:
        self._connected().set_terminated(run_id, STATUSES[status], round(1000 * ended))


def _name(text: str) -> str:
    """Return the name of a metric or parameter as MLflow allows it."""
    return re.sub(r"[^\w.\-/: ]", "_", text)[:250]
