"""Send what a job does to a tracker: a run for the job, nested runs for its sources and trials.

When a source or trial ends, a thread of the process that drives the job reads its files (bundle,
record, metrics log) and logs them. Workers are not involved and need no credentials. Where the
tracker fails there is one warning, and the job continues without it. The next run of the same job
logs what is then missing: ``tracking.json`` in the job's folder says what was logged.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Job, spec_hash
from pipeline.core.contracts.tracker import Point, RunDescription, RunStatus, Tracker
from pipeline.io import atomic_folder, checksums, storage
from pipeline.io.json_values import JsonObject
from pipeline.report.matrix import MatrixEntry
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import TrialRecord
from pipeline.train.log import NO_CURVES
from pipeline.train.source import SourceStage
from pipeline.transfer import trial
from pipeline.transfer.grid import Trial, folders
from pipeline.transfer.job_state import JobState

FILE = "tracking.json"
"""File of a job's folder with the ids of its runs in the tracker, and what they hold."""
JOB = "job"
"""Key of the job's own run."""
PATIENCE_SECONDS = 120.0
"""How long the end of a job waits for a tracker that accepts nothing."""
SLOWEST_UPLOAD = 1e6
"""Bytes per second. The wait for an upload is longer by its size divided by this."""
STATUSES: Mapping[str, RunStatus] = {"done": "done", "failed": "failed", "pruned": "pruned"}


def tracker_of(job: Job) -> Tracker[Any] | None:
    """Return the tracker that a job names; None where it names none.

    Raises:
        ValueError: Its library is not installed.
    """
    component = job.tracking
    if component is None:
        return None
    kind = registry.get("tracker", component.name)
    tracker: Tracker[Any] = kind(kind.options_class(**component.options), job.name)
    try:
        tracker.check_library()
    except ValueError as error:
        raise ValueError(f"tracking: {error}, or leave tracking out") from None
    return tracker


class UnreadableError(Exception):
    """A file of the job cannot be read: its content is left out, and all else is logged."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise any error of the block as an `UnreadableError` that names what was read."""
    try:
        yield
    except Exception as error:  # of storage, of JSON, of a record that another version wrote
        text = str(error) or type(error).__name__
        raise UnreadableError(f"{what}: {text.splitlines()[0]}") from error


class JobOutcome(Protocol):
    """The fields of `pipeline.api.Outcome` that are logged."""

    bundles: dict[str, str]
    rows: list[ResultRow]
    entries: list[MatrixEntry]
    report: str
    results: str


@contextmanager
def follow(
    state: JobState, patience: float = PATIENCE_SECONDS
) -> Iterator[Callable[[JobOutcome], None]]:
    """Log the sources and trials of a job until the block ends.

    Yields:
        A function that logs the results of the job, given its `Outcome`.
    """
    tracker = tracker_of(state.job)
    if tracker is None:
        yield lambda outcome: None
        return
    tracking = Tracking(state, tracker)
    state.progress.on_end = tracking.ended
    finished = False
    try:
        yield tracking.report
        finished = True
    finally:
        state.progress.on_end = lambda ended: None
        tracking.close("done" if finished else "stopped", patience if finished else 5.0)


class Tracking:
    """Logs the ended sources and trials of a job, one after the other, in a thread of its own."""

    def __init__(self, state: JobState, tracker: Tracker[Any]):
        self.state, self.tracker = state, tracker
        self.root, self.began = state.job.root, time.time()
        self.is_given_up = False
        self._logged: dict[str, dict[str, str]] = {}
        """For each key of a run its id in the tracker, and the versions of what was logged."""
        self._places: dict[str, dict[str, dict[str, str]]] = {}
        """Place (see `_identity`) to the runs that are logged there."""
        self._parent = ""
        self._taken = 0
        self._upload_bytes = 0
        """Size of the current upload."""
        self._is_stopped = False
        self._left_out: list[str] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------ called by the thread of the job

    def ended(self, ended: Sequence[SourceStage | Trial]) -> None:
        """Log sources and trials that have ended; those that are logged are not logged again."""
        trials = [item for item in ended if isinstance(item, Trial)]
        for item in ended:
            if isinstance(item, SourceStage):
                self._tasks.put(partial(self._log_source, item))
        if trials:
            self._tasks.put(partial(self._log_trials, trials))

    def report(self, outcome: JobOutcome) -> None:
        """Log the results of the job: gains, the report, the table, and bundles if wanted."""
        self._tasks.put(partial(self._log_outcome, outcome))

    def close(self, status: RunStatus, patience: float) -> None:
        """End the job's run, and wait for the tracker as long as it accepts something.

        Where the job was stopped, the next run logs what is not logged yet.

        Args:
            patience: Seconds without progress after which the rest is left to the next run.
        """
        self._is_stopped = status == "stopped"
        with suppress(queue.Empty):
            while self._is_stopped:
                self._tasks.get_nowait()
        self._tasks.put(partial(self._end, status))
        self._tasks.put(None)
        taken, waited = -1, patience
        while self._thread.is_alive() and self._taken != taken:
            taken = self._taken
            waited = (
                patience if self._is_stopped else patience + self._upload_bytes / SLOWEST_UPLOAD
            )
            self._thread.join(waited)
        if self._thread.is_alive():
            self._give_up(TimeoutError(f"it took nothing for {waited:g} seconds"))

    # ------------------------------------------------------------ called by the thread of tracking

    def _work(self) -> None:
        for task in itertools.chain([self._begin], iter(self._tasks.get, None)):
            if self.is_given_up:
                continue
            try:
                with self._one():
                    task()
            except Exception as error:  # whatever it is: a job does not end for its tracker
                self._give_up(error)
        if self._left_out and not self.is_given_up:
            first, more = self._left_out[0], len(self._left_out) - 1
            self.state.progress.note(
                f"warning: tracking: not logged, because it cannot be read: "
                f"{storage.without_secrets(first)[:300]}{f' (and {more} more)' if more else ''}"
            )

    @contextmanager
    def _one(self) -> Iterator[None]:
        """Note what cannot be read in the block, instead of raising the error."""
        try:
            yield
        except UnreadableError as error:
            self._left_out.append(str(error))

    def _give_up(self, error: Exception) -> None:
        if self.is_given_up:
            return
        self.is_given_up = True
        lines = str(error).splitlines() or [""]
        self.state.progress.note(
            f"warning: tracking: {self.tracker.registered_name} failed "
            f"({type(error).__name__}: {storage.without_secrets(lines[0])[:300]}); "
            "the job continues without it, and the same command logs the rest later"
        )

    def _begin(self) -> None:
        """Continue the job's run, or begin it."""
        place = _identity(self.state.job.tracking)
        remedy = "the job is logged as a new run"
        found = checksums.document_or_none(storage.join(self.root, FILE), remedy) or {}
        self._places = found.get("places", {})
        self._logged = self._places.get(place, {})
        known = self._logged.get(JOB, {}).get("id")
        if known is not None and self.tracker.resume(known):
            self._parent = known
            return
        parameters = flatten(_stated(self.state.job))
        job = self.state.job.name
        description = RunDescription(job, JOB, "job", None, job, self.began, parameters)
        self._parent = self.tracker.begin(description)
        self._logged = {JOB: {"id": self._parent}}
        self._save()

    def _save(self) -> None:
        if self.is_given_up:  # the run has ended, and another one may own the folder
            raise TimeoutError
        place = _identity(self.state.job.tracking)
        self._places[place] = self._logged
        checksums.write_document(storage.join(self.root, FILE), {"places": self._places})
        self._taken += 1

    def _log_run(
        self,
        key: str,
        version: str,
        name: str,
        began: float,
        parameters: Mapping[str, str],
        points: Sequence[Point],
        status: RunStatus,
    ) -> None:
        """Log a nested run, unless this version of it is logged.

        Args:
            version: Hash by which a source or trial is distinguished from an earlier one with the
                same key.
        """
        old = self._logged.get(key, {})
        if self._is_stopped or old.get("version") == version:
            return
        kind = "source" if key.startswith("source/") else "trial"
        description = RunDescription(
            name, key, kind, self._parent, self.state.job.name, began, parameters
        )
        run_id = self.tracker.begin(description, old.get("id"))
        self._logged[key] = {"id": run_id}
        self._save()
        self.tracker.log(run_id, points)
        self.tracker.end(run_id, status, max([began, *(point.time for point in points)]))
        self._logged[key] = {"id": run_id, "version": version}
        self._save()

    def _log_source(self, stage: SourceStage) -> None:
        key = f"source/{stage.name}-{stage.key}"
        with reading(f"source {stage.name}"):
            manifest = bundle.read_manifest(stage.bundle_uri)
            version = bundle.weights_sha256(stage.bundle_uri)
            if self._logged.get(key, {}).get("version") == version:
                return
            points = curve_points(storage.join(stage.uri, "log", "metrics.jsonl"))
        last = points[-1] if points else Point("", 0.0, 0, self.began)
        points += _points(
            {f"validation/{name}": value for name, value in manifest.metrics.items()},
            last.step,
            last.time,
        )
        began = min((point.time for point in points), default=self.began)
        parameters = flatten(stage.spec.model_dump(mode="json", exclude_defaults=True))
        self._log_run(key, version, stage.name, began, parameters, points, "done")

    def _log_trials(self, trials: Sequence[Trial]) -> None:
        with reading("records of trials"):
            records = trial.read_records(self.root, folders(trials))
        for one in trials:
            if one.id in records:
                with self._one():
                    self._log_trial(one, records[one.id])

    def _log_trial(self, one: Trial, record: TrialRecord) -> None:
        key, version = f"trial/{one.id}", spec_hash(record.to_json())
        if self._is_stopped or self._logged.get(key, {}).get("version") == version:
            return
        moments = [row.started_at.timestamp() for row in record.rows if row.started_at]
        began = min(moments, default=self.began)
        first = record.rows[0]
        ended = began + (first.seconds or 0.0)
        with reading(f"trial {one.name}"):
            points = curve_points(storage.join(self.root, one.folder, "metrics.jsonl"))
        if not points:  # heads that were trained together have no log
            for point in record.curve:
                values = {f"validation_{name}": value for name, value in point.metrics.items()}
                points += _points(values, point.step, ended)
        step = first.steps or 0
        for row in record.rows:
            points += _points(_measured(row), step, ended)
        cost = {"seconds": first.seconds, "params_trained": first.params_trained}
        points += _points(cost, step, ended)
        spec = self.state.job.targets[one.target]
        parameters = flatten(
            {
                "target": one.target,
                "source": one.source,
                "backbone": one.backbone,
                "objective": str(spec.objective),
                "technique": str(one.technique),
                "label_fraction": str(one.label_fraction),
                "seed": one.seed,
                "stage": one.stage,
                "train": spec.train.model_dump(mode="json", exclude_defaults=True),
                "drawn": one.hyper_parameters,
                **({"error": record.error} if record.error else {}),
            }
        )
        status = STATUSES[record.status]
        self._log_run(key, version, one.name, began, parameters, points, status)

    def _log_outcome(self, outcome: JobOutcome) -> None:
        """Log the gains of trials, the means of the matrix, and the files of the report."""
        by_trial: dict[str, dict[str, float | None]] = {}
        for row in outcome.rows:
            if row.split == "test" and row.metric and row.gain is not None:
                gains = by_trial.setdefault(f"trial/{row.trial_id}", {})
                gains |= _interval(f"gain/{row.metric}", row.gain, row.gain_low, row.gain_high)
        now = time.time()
        for key, values in by_trial.items():
            self._once(key, "gains", spec_hash(values), partial(self._log_values, values, now))
        means: dict[str, float | None] = {}
        for name, entry in zip(_names_of(outcome.entries), outcome.entries, strict=True):
            means |= _interval(f"{name}/{entry.metric}", entry.mean, entry.low, entry.high)
            means |= _interval(f"{name}/gain", entry.gain, entry.gain_low, entry.gain_high)
        self._once(JOB, "means", spec_hash(means), partial(self._log_values, means, now))
        files = [outcome.report, outcome.report.removesuffix(".html") + ".md", outcome.results]
        for uri in files if outcome.report else ():
            with self._one():
                self._upload_file(uri)
        if getattr(self.tracker.options, "bundles", False):
            self._upload_bundles(outcome)

    def _log_values(self, values: Mapping[str, float | None], now: float, run_id: str) -> None:
        self.tracker.log(run_id, _points(values, 0, now))

    def _upload_file(self, uri: str) -> None:
        name = uri.rpartition("/")[2]
        with reading(name):
            content = storage.read_bytes(uri)

        def upload(run_id: str) -> None:
            with storage.scratch_folder() as scratch:
                Path(scratch, name).write_bytes(content)
                self._upload(run_id, Path(scratch, name))

        self._once(JOB, name, hashlib.sha256(content).hexdigest(), upload)

    def _upload_bundles(self, outcome: JobOutcome) -> None:
        """Upload the bundles that are kept: those of sources, and of final trials."""
        places = {
            f"source/{name}-{self.state.sources[name].key}": uri
            for name, uri in outcome.bundles.items()
        }
        places |= {
            f"trial/{row.trial_id}": row.bundle_uri for row in outcome.rows if row.bundle_uri
        }
        for key, uri in places.items():
            if self._is_stopped:
                return
            with self._one():
                with reading(f"bundle of {key}"):
                    version = bundle.weights_sha256(uri) if bundle.exists(uri) else None
                if version is not None:
                    self._once(key, "bundle", version, partial(self._upload_bundle, uri))

    def _upload_bundle(self, uri: str, run_id: str) -> None:
        with storage.scratch_folder() as scratch:
            with reading(uri):
                folder = atomic_folder.fetch_folder(uri, Path(scratch, "bundle"))
            self._upload(run_id, folder, "bundle")

    def _upload(self, run_id: str, path: Path, folder: str = "") -> None:
        files = [file for file in (path, *path.rglob("*")) if file.is_file()]
        self._upload_bytes = sum(file.stat().st_size for file in files)
        self._taken += 1  # what comes now has a patience of its own
        try:
            self.tracker.upload(run_id, path, folder)
        finally:
            self._upload_bytes = 0

    def _once(
        self,
        key: str,
        what: str,
        version: str,
        log: Callable[[str], None],
    ) -> None:
        """Log something of a run, unless the same has been logged."""
        run = self._logged.get(key)
        if self._is_stopped or run is None or run.get(what) == version:
            return
        try:
            log(run["id"])
        except UnreadableError:
            raise
        except Exception:  # each tracker has its own error for a run that is gone
            if self.tracker.exists(run["id"]):
                raise
            del self._logged[key]  # somebody has deleted it: the next run logs it again
        else:
            run[what] = version
        self._save()

    def _end(self, status: RunStatus) -> None:
        self.tracker.end(self._parent, status, time.time())
        self.tracker.close()


def curve_points(uri: str) -> list[Point]:
    """Return the values of a metrics log, in the order of its steps; [] where there is none."""
    out: list[Point] = []
    for line in storage.read_bytes(uri).splitlines() if storage.exists(uri) else ():
        with suppress(ValueError):  # a last line that is cut off
            record = json.loads(line)
            values = {k: v for k, v in record.items() if k not in (*NO_CURVES, "time")}
            out += _points(values, int(record["step"]), float(record["time"]))
    return out


def _points(values: Mapping[str, Any], step: int, moment: float) -> list[Point]:
    """Return the finite numbers among values."""
    return [
        Point(name, float(value), step, moment)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ]


def _names_of(entries: Sequence[MatrixEntry]) -> list[str]:
    """Return target/source/technique/label fraction of each entry.

    The backbone follows the source where entries of several backbones are otherwise the same, as
    those of scratch are.
    """
    keys = [
        (entry.target, entry.source, entry.technique, entry.label_fraction) for entry in entries
    ]
    num_backbones = Counter(keys)
    names: list[str] = []
    for key, entry in zip(keys, entries, strict=True):
        target, source, *rest = key
        backbone = [entry.backbone] if num_backbones[key] > 1 else []
        names.append("/".join([target, source, *backbone, *rest]))
    return names


def _interval(
    name: str, value: float | None, low: float | None, high: float | None
) -> dict[str, float | None]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _measured(row: ResultRow) -> dict[str, float | None]:
    """Return the metric of a row with its interval."""
    if not row.metric or not row.split:
        return {}
    return _interval(f"{row.split}/{row.metric}", row.value, row.value_low, row.value_high)


def _stated(job: Job) -> JsonObject:
    """Return what a job states itself, without its defaults."""
    return job.model_dump(mode="json", exclude_defaults=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as texts, by their places with dots between: ``sources.a.train.lr``.

    A component (``{"name": ..., "options": ...}``) is one text, and so is a list. Passwords in the
    addresses of places are left out.
    """
    out: dict[str, str] = {}
    for name, value in values.items():
        place = f"{prefix}{name}"
        if isinstance(value, Mapping) and "name" in value and value.keys() <= {"name", "options"}:
            out[place] = str(ComponentConfig.model_validate(value))
        elif isinstance(value, Mapping):
            out |= flatten(value, f"{place}.")
        elif isinstance(value, list):
            out[place] = ", ".join(_text(one) for one in value)
        else:
            out[place] = _text(value)
    return {name: storage.without_secrets(text) for name, text in out.items()}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.keys() <= {"name", "options"}:
        return str(ComponentConfig.model_validate(value))
    return json.dumps(value, sort_keys=True)


def _identity(tracking: ComponentConfig | None) -> str:
    """Return a hash of the place of runs. Passwords are no part of it."""
    assert tracking is not None
    plain = {
        name: value for name, value in tracking.options.items() if name not in ("bundles", "uri")
    }
    address = urlsplit(str(tracking.options.get("uri", "")))
    where = [address.scheme, address.hostname or "", address.port or 0, address.path]
    return spec_hash(tracking.name, plain, where)
