"""Launch on Ray Train: resources, ranks, restarts. Only this module starts Ray and Ray Train."""

from __future__ import annotations

import logging
import math
import os
import signal
import site
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray._private import services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, UserCodeException
from ray.job_config import JobConfig
from ray.util.client import ray as ray_client
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints import bundle
from pipeline.config import plugins
from pipeline.config.schema import Source
from pipeline.data.stream import DataWorkers, Rows
from pipeline.io import s3, signals, storage, write_fence
from pipeline.io.file_identity import ChangedFileError
from pipeline.io.ray_environment import prepare_ray, without_noise
from pipeline.train import node_types, pretrain, source
from pipeline.train.board import Board
from pipeline.train.log import LogRecord
from pipeline.train.loop import NonFiniteError
from pipeline.train.progress import Progress, duration, training_line
from pipeline.train.ranks import Ranks
from pipeline.train.row_checks import Finding, findings_from_metadata


class ClusterError(RuntimeError):
    """The cluster cannot provide the resources that the job needs."""


class StageError(RuntimeError):
    """A stage failed; the message is the rank's own error."""


class ImportThisPackage(JobConfig):
    """Let Ray's workers import this package from the same place as this process.

    Ray puts the driver's current folder first on the path of its workers. A package named
    ``pipeline`` there would hide this one, and every worker would die.
    """

    def __init__(self) -> None:
        code = str(Path(__file__).resolve().parents[2])
        is_installed = code in site.getsitepackages()
        super().__init__(_py_driver_sys_path=[] if is_installed else [code])

    def _runtime_env_has_working_dir(self) -> bool:
        """Ray adds the script's folder and the current one only where this is false."""
        return True


def _job_config(where: str) -> dict[str, Any]:
    """Return the argument ``job_config`` of ``ray.init``.

    A submitted job needs none: its code is in its working folder.
    """
    is_submitted = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
    is_ray_client = where.startswith("ray://")
    return {} if is_submitted or is_ray_client else {"job_config": ImportThisPackage()}


_is_ours = False
"""Whether `start` started or joined the Ray of this process."""


def start(address: str | None, verbose: bool) -> None:
    """Join the cluster of ``--address`` or RAY_ADDRESS, or start a local one.

    Where Ray runs in this process already, it is used. Plugins in use are sent to every worker.

    Raises:
        ClusterError: No cluster answers, Ray does not start, or it runs already without the plugins
            in use.
    """
    global _is_ours
    if ray.is_initialized():
        _check_plugins()
        return
    prepare_ray()
    level = logging.INFO if verbose else logging.ERROR
    # Ray Data sets its logger up when it is imported
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", logging.getLevelName(level))
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    extra: dict[str, Any] = {}
    if where == "local":
        extra = {"include_dashboard": False}
        # a local machine is not preempted; without the watcher a source starts a second sooner
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        # Ray installs a handler of its own
        with signals.keep_signal_handler(), _ray_outside_our_process_group():
            ray.init(
                address=where,
                logging_level=level,
                log_to_driver=verbose,
                runtime_env=plugins_env(),
                **extra,
                **_job_config(where),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        what = (
            f"no Ray cluster answers at {where}" if where != "local" else "Ray does not start here"
        )
        raise ClusterError(
            f"{what}: {lines[0] if lines else type(error).__name__}; check the address, the "
            "token (RAY_AUTH_TOKEN) and Ray's version"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises a plain one where its start takes too long
            raise
        raise ClusterError(
            f"Ray does not start here: {str(error).partition('. ')[0]}; where other programs keep "
            "this machine busy or fill its memory, wait for them and run again"
        ) from error
    _is_ours = True


@contextmanager
def _ray_outside_our_process_group() -> Iterator[None]:
    """Start each process of a local Ray in a process group of its own.

    ``timeout`` sends SIGTERM to the whole group of the command. Ray would end before the run has
    ended, which then waits for it for a minute.

    Ray 2.60 has no option for this on Linux. On Windows it does the same. Where the kernel does not
    end Ray's processes with this one (macOS), Ray finds them by their group.
    """
    if sys.platform != "linux":
        yield
        return
    name, popen = "ConsolePopen", services.ConsolePopen
    setattr(services, name, partial(popen, process_group=0))
    try:
        yield
    finally:
        setattr(services, name, popen)


@contextmanager
def session(address: str | None, verbose: bool) -> Iterator[None]:
    """Use the Ray session of this process, or one that ends with the block."""
    with nullcontext() if verbose else without_noise():
        start(address, verbose)
        try:
            yield
        finally:
            stop()


def plugins_env() -> dict[str, Any] | None:
    """Return the ``runtime_env`` of ``ray.init`` that brings the plugins in use to every worker."""
    listed = os.environ.get(plugins.VARIABLE)
    if not listed:
        return None
    code = [str(place) for place in plugins.shipped()]
    return {"env_vars": {plugins.VARIABLE: listed}, "py_modules": code}


def _check_plugins() -> None:
    """Raise ClusterError where this process's Ray was started without the plugins in use."""
    listed = os.environ.get(plugins.VARIABLE)
    if not listed:
        return
    runtime_env: Any = ray.get_runtime_context().runtime_env or {}
    started_with = runtime_env.get("env_vars", {}).get(plugins.VARIABLE)
    if started_with != listed:
        raise ClusterError(
            f"Ray runs in this process already, and its workers do not know the plugins {listed}: "
            "end it (ray.shutdown()) before the job runs"
        )


def stop() -> None:
    """End the Ray that `start` started or joined. One that ran before, as in a notebook, stays."""
    global _is_ours
    if _is_ours and ray.is_initialized():
        ray.shutdown()
    _is_ours = False


@dataclass(frozen=True)
class RankResources:
    """Logical resources of one rank and of its data workers."""

    cpus: float
    gpus: float
    data: DataWorkers
    threads: int


Nodes = list[tuple[float, float]]
"""Logical CPUs and GPUs of each node."""


@dataclass(frozen=True)
class Cluster:
    """The resources that work can be planned for."""

    nodes: Nodes
    """The present nodes, or of a cluster that grows, all that it can have."""
    object_store_bytes: float
    """Bytes of the object stores of the present nodes."""
    grows: bool = False
    """Whether nodes are added when resources are requested."""
    is_declared: bool = True
    """Whether it is known which nodes can be added; else ``nodes`` are the present ones."""

    @property
    def cpus(self) -> float:
        """Logical CPUs of all nodes."""
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        """Logical GPUs of all nodes."""
        return sum(gpus for _, gpus in self.nodes)


def cluster(wait: bool | None = None) -> Cluster:
    """Return the cluster that was joined or started.

    Args:
        wait: Whether to wait for nodes that are not there yet; None: where the cluster's autoscaler
            declares its nodes.

    Raises:
        ClusterError: The declaration of the nodes cannot be read.
    """
    alive = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
    store = ray.cluster_resources().get("object_store_memory", 1 << 30)
    if wait is False:
        return Cluster(alive, store)
    try:
        types = _types_declared_on_head()
    except node_types.NodeTypesError as error:
        raise ClusterError(
            f"{error}; with --no-wait-for-resources the nodes that are there are used"
        ) from error
    if types is None:
        return Cluster(alive, store, grows=bool(wait), is_declared=not wait)
    nodes = [(kind.cpus, kind.gpus) for kind in types for _ in range(kind.count)]
    return Cluster(nodes, store, grows=True)


def _types_declared_on_head() -> list[node_types.NodeType] | None:
    """Return the declared node types, read on the node of the autoscaler."""
    if ray_client.is_connected():
        return None  # with ray:// neither the address nor the head node is known
    gcs_address = ray.get_runtime_context().gcs_address
    head = next(
        (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]),
        None,
    )
    if head is None or head == ray.get_runtime_context().get_node_id():
        return node_types.read_declared_types(gcs_address)
    on_head = NodeAffinitySchedulingStrategy(node_id=head, soft=False)
    task = ray.remote(num_cpus=0)(node_types.read_declared_types).options(
        scheduling_strategy=on_head
    )
    try:
        return ray.get(task.remote(gcs_address))
    except RayTaskError as error:
        raise node_types.NodeTypesError(first_cause(error)) from error


def capacity(nodes: Nodes, cpus: float, gpus: float) -> int:
    """Return how many requests of so many CPUs and GPUs fit on the nodes at once.

    A request has to fit on one node, and a share of a GPU on one GPU.
    """
    return sum(_capacity_of_node(*node, cpus, gpus) for node in nodes)


def _capacity_of_node(node_cpus: float, node_gpus: float, cpus: float, gpus: float) -> int:
    """Return how many requests fit on one node."""
    by_cpu = math.floor(node_cpus / cpus + 1e-6) if cpus else 10**9
    if not gpus:
        return by_cpu
    if gpus >= 1:
        return min(by_cpu, math.floor(node_gpus / gpus + 1e-6))
    return min(by_cpu, int(node_gpus) * math.floor(1 / gpus + 1e-6))


def plan_resources(
    spec: Source, cpus: float, gpus: float, object_store_bytes: float = 2 << 30
) -> RankResources:
    """Return the part of a cluster that each rank gets; some CPUs stay for Ray Data."""
    ranks = spec.worker_range[1]
    rank_cpus = spec.cpus_per_worker
    if rank_cpus is None:
        half = math.floor(100 * cpus / (2 * ranks)) / 100
        rank_cpus = 1.0 if cpus >= 2 * ranks else half
    rank_gpus = spec.gpus_per_worker
    if rank_gpus is None:
        rank_gpus = _gpus_of_rank(gpus, ranks)
    left = max(0.01, math.floor(100 * (cpus - ranks * rank_cpus) / ranks) / 100)
    data = DataWorkers(
        max(1, int(left)),
        min(1.0, left),
        int(object_store_bytes * 0.5 / ranks),
    )
    cores = os.cpu_count() or 1
    threads = cores / ranks if cpus <= cores else rank_cpus
    return RankResources(rank_cpus, rank_gpus, data, max(1, int(threads)))


def _gpus_of_rank(gpus: float, ranks: int) -> float:
    """Return one GPU, or where there are fewer GPUs than ranks, an equal share of one."""
    if not gpus:
        return 0.0
    if gpus >= ranks:
        return 1.0
    return math.floor(1e4 / math.ceil(ranks / gpus)) / 1e4


def nodes_for(spec: Source, on: Cluster) -> Nodes:
    """Return the nodes that a source's ranks and their data workers share.

    In a cluster of fixed size these are all nodes. In one that grows they are the fewest nodes on
    which the most ranks fit, each with one data worker: a small job must not ask for every node
    that could be added. GPUs are used where the job says so, or where it says nothing and some node
    type has them.
    """
    if not on.grows:
        return on.nodes
    ranks = spec.worker_range[1]
    takes_gpus = on.gpus > 0 if spec.gpus_per_worker is None else spec.gpus_per_worker > 0
    gpus = spec.gpus_per_worker if spec.gpus_per_worker is not None else float(takes_gpus)
    cpus = (spec.cpus_per_worker or 1.0) + 1.0
    useful = [node for node in on.nodes if node[0] > 0]
    ordered = sorted(useful, key=lambda node: (bool(node[1]) != takes_gpus, node))
    if not on.is_declared and capacity(ordered, cpus, gpus) < ranks:
        # it is not known which nodes can be added: the job says what it needs
        return [*ordered, *[(cpus, gpus)] * ranks]
    for count in range(1, len(ordered) + 1):
        if capacity(ordered[:count], cpus, gpus) >= ranks:
            return ordered[:count]
    return ordered


def plan_on_cluster(spec: Source, on: Cluster) -> RankResources:
    """Return a rank's part of the nodes that a source uses (`nodes_for`)."""
    planned = nodes_for(spec, on)
    cpus, gpus = (sum(node[i] for node in planned) for i in (0, 1))
    return plan_resources(spec, cpus, gpus, on.object_store_bytes)


def resource_requests(rank_resources: RankResources, ranks: int) -> list[dict[str, float]]:
    """Return the requests of so many ranks and their data workers, without empty ones."""
    rank = {"CPU": rank_resources.cpus, "GPU": rank_resources.gpus}
    data = {"CPU": rank_resources.data.cpus_per_actor}
    requests = [rank] * ranks + [data] * (ranks * rank_resources.data.actors)
    return [
        {name: amount for name, amount in request.items() if amount > 0} for request in requests
    ]


def wait_for(requests: list[dict[str, float]], what: str, progress: Progress) -> None:
    """Request logical resources of a cluster that grows, and wait until it has them.

    The resources are then free again, and new nodes stay until the cluster's idle time is over.
    """
    keep_ray_data_actors_here()
    group = ray.util.placement_group(requests, strategy="PACK")
    asked = describe_requests(requests)
    began = time.monotonic()
    try:
        if group.wait(1):
            return
        progress.note(f"{what}: asks the cluster for {asked}, and waits until the nodes are there")
        while not group.wait(2):
            present = ray.cluster_resources()
            cpus, gpus = present.get("CPU", 0), present.get("GPU", 0)
            progress.update(
                f"{what}: waits for {asked}; the cluster has {len(ray.nodes())} nodes with "
                f"{cpus:g} CPU and {gpus:g} GPU  "
                f"{duration(time.monotonic() - began)}"
            )
        progress.note(f"{what}: the nodes are there after {duration(time.monotonic() - began)}")
    finally:
        ray.util.remove_placement_group(group)


def keep_ray_data_actors_here() -> None:
    """Start the actors that Ray Data shares over a cluster on this process's node.

    They outlive every job, and their node never counts as idle. Otherwise Ray Data would start them
    on the node of a rank, which (with its GPUs) could then never be released.
    """
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


def describe_requests(requests: list[dict[str, float]]) -> str:
    """Describe resource requests: ``2 x 1 CPU + 1 GPU and 4 x 1 CPU``."""
    counts = Counter(
        " + ".join(f"{amount:g} {name}" for name, amount in request.items()) for request in requests
    )
    return " and ".join(f"{count} x {text}" for text, count in counts.items())


def check_fits(
    spec: Source, rank_resources: RankResources, nodes: Nodes, place: str, grows: bool = False
) -> list[str]:
    """Return warnings on the ranks of a source and the nodes that they run on.

    Raises:
        ClusterError: The fewest ranks can never run on these nodes.
    """
    fewest, most = spec.worker_range
    cpus, gpus = (sum(node[i] for node in nodes) for i in (0, 1))
    if (
        capacity(nodes, rank_resources.cpus, rank_resources.gpus) < fewest
        or fewest * (rank_resources.cpus + rank_resources.data.cpus_per_actor) > cpus + 1e-6
    ):
        verb = "can grow to" if grows else "has"
        raise ClusterError(
            f"{place}: the cluster {verb} {describe_nodes(nodes)}, the request is {fewest} ranks x "
            f"({rank_resources.cpus:g} CPU + {rank_resources.gpus:g} GPU, each on one node) and "
            f"{rank_resources.data.cpus_per_actor:g} CPU of data workers per rank; it can never be "
            "met. Lower workers, cpus_per_worker or gpus_per_worker, or join a larger cluster "
            "(--address)"
        )
    cores = os.cpu_count() or 1
    warnings = []
    if gpus == 0 and most > max(cpus, cores if cpus <= cores else 0):
        warnings.append(
            f"warning: {place}: {most} ranks are more than the {cpus:g} CPUs; they will share them"
        )
    if 0 < rank_resources.gpus < 1 and most > 1:
        warnings.append(
            f"warning: {place}: {most} ranks share {gpus:g} GPUs; they reduce over gloo, which "
            "is slow. One rank a GPU is faster"
        )
    return warnings


def describe_nodes(nodes: Nodes) -> str:
    """Describe nodes: ``2 nodes of 4 CPU + 0 GPU or 8 CPU + 1 GPU``."""
    if not nodes:
        return "no nodes"
    kinds = [f"{cpus:g} CPU + {gpus:g} GPU" for cpus, gpus in sorted(set(nodes))]
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''} of {' or '.join(kinds)}"


@dataclass(frozen=True)
class _RankInputs:
    """What every rank is given."""

    work: pretrain.RankJob
    board: Any
    """The actor of the `Board`."""
    rows: Any
    """A reference to the decoded training rows in the object store, or None."""


def start_actor(kind: type) -> Any:
    """Start an actor that needs no CPU; its process imports the module that defines ``kind``."""
    return ray.remote(num_cpus=0)(kind).remote()


def _rank_main(config: dict[str, Any]) -> None:  # Ray Train passes a dict
    import ray.train
    import ray.train.torch

    inputs: _RankInputs = ray.get(config["inputs"])
    work, board = inputs.work, inputs.board
    if ray.get(board.read.remote())[1] is not None:
        return  # the run ended with an error that a restart would only repeat
    context = ray.train.get_context()
    torch.set_num_threads(work.threads)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    posted = 0.0
    newest: LogRecord | None = None

    def on_progress(record: LogRecord) -> None:
        nonlocal posted, newest
        # a record that is not posted at once is merged into the next one
        newest = {**newest, **record} if newest else record
        if time.monotonic() - posted > 0.3 or _is_of_last_step(record):
            posted = time.monotonic()
            board.post.remote(newest)
            newest = None

    try:
        rows: Any = None if inputs.rows is None else ray.get(inputs.rows)
        with write_fence.guarded_by(work.fences):
            pretrain.train_rank(work, ranks, on_progress, rows)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        NonFiniteError,
        write_fence.LostLeaseError,
        UserCodeException,
        ChangedFileError,
    ) as error:
        ray.get(board.fail.remote(first_cause(error)))
        raise
    except storage.StorageError as error:
        if s3.is_full(error):  # a restart would only fill the disk again
            ray.get(board.fail.remote(str(error)))
        raise


def first_cause(error: BaseException) -> str:
    """Return the message of the original error, without Ray's wrappers and traceback."""
    while isinstance(error, RayError) and (
        inner := getattr(error, "cause", None) or error.__cause__
    ):
        error = inner
    is_plain = isinstance(
        error, (ValueError, NonFiniteError, ChangedFileError, write_fence.LostLeaseError)
    )
    return str(error) if is_plain else f"{type(error).__name__}: {error}"


def follow_ranks(board: Any, name: str, progress: Progress, stop: threading.Event) -> None:
    """Show the progress that the ranks post on the board, until ``stop`` is set.

    Runs in a thread beside the trainer. Warnings and restarts are shown once, as notes.
    """
    last_warning, last_start = "", 0
    while not stop.wait(0.5):
        try:
            record, _ = ray.get(board.read.remote(), timeout=5)
        except (RayError, GetTimeoutError):
            continue
        if record:
            warning = record.get("warning", last_warning)
            if warning != last_warning:  # all later records have it too
                progress.note(f"warning: {name}: {warning}")
                last_warning = warning
            start = record.get("resumed_from", last_start)
            if start != last_start:  # after each restart
                progress.note(f"{name}: goes on from step {start} of {record['steps']}")
                last_start = start
            # `run_source` shows the last step once, with what is validated after it
            is_trained = _is_of_last_step(record)
            ending = f"{name}: trained; validating and writing the bundle"
            progress.update(ending if is_trained else training_line(name, record))


def _is_of_last_step(record: LogRecord) -> bool:
    return record["step"] == record["steps"] or "stopped" in record


def cluster_resources() -> dict[str, float]:
    """Logical ``CPU`` and ``GPU`` of the cluster, bytes of ``object_store_memory``, number of
    living ``nodes``.
    """
    have = ray.cluster_resources()
    return {
        "CPU": have.get("CPU", 0.0),
        "GPU": have.get("GPU", 0.0),
        "object_store_memory": have.get("object_store_memory", 1 << 30),
        "nodes": float(sum(node["Alive"] for node in ray.nodes())),
    }


def source_metadata(stage: source.SourceStage) -> dict[str, Any]:
    """Return the metadata of a source that is done, for the report."""
    manifest = bundle.read_manifest(stage.bundle_uri)
    return {
        **manifest.training,
        "source": stage.name,
        "bundle": stage.bundle_uri,
        "versions": manifest.versions,
        "changes": stage.changes(),
    }


def _report_findings(name: str, findings: Iterable[Finding], progress: Progress) -> None:
    """Show the findings that are meant for the terminal."""
    for finding in findings:
        if finding.in_terminal:
            progress.note(finding.line(name))


def run_source(
    stage: source.SourceStage, progress: Progress, verbose: bool, wait: bool | None = None
) -> dict[str, Any]:
    """Train a source until its bundle is written; an existing bundle is used.

    Args:
        verbose: Whether Ray's own messages are shown.
        wait: Whether to wait for nodes that are not there yet (`cluster`).

    Returns:
        The metadata of the source, for the report.

    Raises:
        ClusterError: The cluster can never run it; raised before anything starts.
        StageError: Training failed for good.
    """
    if stage.done:
        return {**source_metadata(stage), "cached": True}
    if stage.splits is None:
        metadata = pretrain.import_checkpoint(stage)
        _report_findings(stage.name, findings_from_metadata(metadata), progress)
        return {**metadata, "bundle": stage.bundle_uri}
    rank_resources, most = _plan_ranks(stage, progress, wait)
    progress.update(f"{stage.name}: reading rows to fit means, a vocabulary or labels")
    fitted = source.prepare_source(stage)
    work = pretrain.rank_job(stage, fitted, rank_resources.data, rank_resources.threads)
    progress.note(f"{stage.name}: {work.split_text}")
    _report_findings(stage.name, fitted.findings, progress)
    if work.place == "memory":
        progress.update(f"{stage.name}: decoding {len(fitted.train)} rows")
    rows = pretrain.decode_once(work)
    record = _train(stage, work, rows, rank_resources, most, progress, verbose)
    storage.remove_tree(storage.join(stage.uri, "ray"))
    if record:
        progress.update(training_line(stage.name, record), final=True)
    return source_metadata(stage)


def _plan_ranks(
    stage: source.SourceStage, progress: Progress, wait: bool | None
) -> tuple[RankResources, int]:
    """Return each rank's part of the cluster, and the most ranks; wait for nodes if it grows."""
    spec, on = stage.spec, cluster(wait)
    rank_resources, nodes = plan_on_cluster(spec, on), nodes_for(spec, on)
    for line in check_fits(spec, rank_resources, nodes, f"sources.{stage.name}", on.grows):
        progress.note(line)
    fewest, most = spec.worker_range
    cpus = sum(node[0] for node in nodes)
    # elastic ranks leave CPUs to Ray Data
    room = int((cpus + 1e-6) // (rank_resources.cpus + rank_resources.data.cpus_per_actor))
    if on.grows:
        wait_for(resource_requests(rank_resources, fewest), stage.name, progress)
    return rank_resources, max(fewest, min(most, room))


def _train(
    stage: source.SourceStage,
    work: pretrain.RankJob,
    rows: Rows | None,
    rank_resources: RankResources,
    most: int,
    progress: Progress,
    verbose: bool,
) -> LogRecord | None:
    """Train on all ranks, show their progress, and return their last log record.

    Raises:
        StageError: No bundle was written.
    """
    import ray.train

    board = start_actor(Board)
    ended = threading.Event()
    watched = (board, stage.name, progress, ended)
    watcher = threading.Thread(target=follow_ranks, args=watched, daemon=True)
    watcher.start()
    reference = ray.put(rows) if rows is not None else None
    # by reference: Ray Train's controller reads the config, and would import all modules of ranks
    inputs = ray.put(_RankInputs(work, board, reference))
    error: Exception | None = None
    try:
        _fit(make_trainer(stage, rank_resources, inputs, verbose, most))
    except ray.train.TrainingFailedError as failed:
        error = failed
    finally:
        ended.set()
        watcher.join()
    record, fatal = ray.get(board.read.remote())
    ray.kill(board)  # pyright: ignore[reportArgumentType] - Ray's stub of actors
    if fatal or error or not stage.has_bundle:
        write_fence.check(stage.uri)  # a lost lock explains any error of the ranks
        raise StageError(f"sources.{stage.name}: {fatal or _reason(error)}")
    return record


def _fit(trainer: Any) -> Any:
    """Run the trainer; Ctrl-C raises KeyboardInterrupt.

    Ray Train installs a handler that ends the process instead. It is removed again.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit as end:
        raise KeyboardInterrupt from end
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _reason(error: Exception | None) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = sorted(failures.items())[0]
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"training ended without a bundle: {error}"


def make_trainer(
    stage: source.SourceStage, rank_resources: RankResources, inputs: Any, verbose: bool, most: int
) -> Any:
    """Return Ray Train's trainer of a source.

    Args:
        inputs: What every rank is given (`_RankInputs`).
        most: The most ranks; the fewest are those that the job allows.
    """
    import ray.train

    low = stage.spec.worker_range[0]
    return _torch_trainer(
        _rank_main,
        {"inputs": inputs},
        low if low == most else (low, most),
        rank_resources.cpus,
        rank_resources.gpus,
        storage.join(stage.uri, "ray"),
        name=f"{stage.name}-{stage.key}",
        failure_config=ray.train.FailureConfig(max_failures=stage.spec.max_failures),
        logging_config=None if verbose else ray.train.LoggingConfig(log_level="ERROR"),
    )


def _torch_trainer(
    main: Callable[[dict[str, Any]], Any],
    config: dict[str, Any],
    ranks: int | tuple[int, int],
    cpus: float,
    gpus: float,
    uri: str,
    **run_config: Any,
) -> Any:
    """Return Ray Train's trainer of a function that runs on every rank.

    Args:
        config: What Ray Train passes to it.
        ranks: Their number, or for elastic ranks the fewest and the most.
        cpus: Logical CPUs of a rank.
        gpus: GPUs of a rank.
        uri: The folder that Ray Train writes to.
        run_config: Further arguments of ``ray.train.RunConfig``.
    """
    import ray.train
    import ray.train.torch

    path, filesystem = train_storage(uri)
    return ray.train.torch.TorchTrainer(
        main,
        train_loop_config=config,
        torch_config=backend_of(gpus),
        scaling_config=ray.train.ScalingConfig(
            num_workers=ranks,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            storage_path=path, storage_filesystem=filesystem, **run_config
        ),
    )


def backend_of(gpus: float) -> Any:
    """Return gloo for ranks that share a GPU, which NCCL does not allow, else Ray's choice."""
    import ray.train.torch

    return ray.train.torch.TorchConfig(backend="gloo") if 0 < gpus < 1 else None


def run_ranks(
    fn: Callable[[dict[str, Any], Ranks], Any],
    config: dict[str, Any],
    workers: int,
    cpus: float,
    gpus: float,
    uri: str,
    name: str,
) -> Any:
    """Call ``fn(config, ranks)`` on several ranks under Ray Train, inside a trial.

    The values of ``config`` are sent by reference. Each rank gets the values.

    Returns:
        The result of rank 0.

    Raises:
        StageError: A rank failed; with its error.
    """
    import ray.train
    import ray.train.torch

    fences = write_fence.current_fences()

    def main(config: dict[str, Any]) -> Any:
        context = ray.train.get_context()
        given = {name: ray.get(reference) for name, reference in config.items()}
        torch.set_num_threads(max(1, int(cpus)))
        device = ray.train.torch.get_device()
        ranks = Ranks(context.get_world_rank(), context.get_world_size(), device)
        with write_fence.guarded_by(fences):
            out = fn(given, ranks)
        return out if ranks.is_first else None

    references = {
        name: value if isinstance(value, ray.ObjectRef) else ray.put(value)
        for name, value in config.items()
    }
    trainer = _torch_trainer(main, references, workers, cpus, gpus, uri, name=name)
    try:
        return trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise StageError(_reason(error)) from error
    finally:
        storage.remove_tree(uri)


def train_storage(uri: str) -> tuple[str, Any]:
    """Return the path and pyarrow filesystem (or None) for Ray Train.

    S3 is used through the same s3fs as everywhere else.
    """
    if not storage.is_remote(uri):
        return os.path.abspath(uri), None
    import pyarrow.fs

    filesystem, path = storage.filesystem(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
