"""Launch on Ray Train: resources, ranks, restarts. The one place that starts Ray and runs Ray
Train.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import site
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
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
    """The cluster cannot give what the job asks for."""


class StageError(RuntimeError):
    """A stage failed; the message is the rank's own error."""


class OwnCode(JobConfig):
    """Let Ray's workers import this project from where this process has it, whatever lies in the
    current folder.

    Ray puts the driver's current folder first on the path of its workers. A package named
    ``pipeline`` there would hide this one, and every worker would die.
    """

    def __init__(self) -> None:
        code = str(Path(__file__).resolve().parents[2])
        is_installed = code in site.getsitepackages()
        super().__init__(_py_driver_sys_path=[] if is_installed else [code])

    def _runtime_env_has_working_dir(self) -> bool:
        """Ray adds the folder of the script and the current one only where this is false."""
        return True


def _job_config(where: str) -> dict[str, Any]:
    """The argument ``job_config`` of ``ray.init``; none for a submitted job, whose working folder
    holds its code.
    """
    is_submitted = RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ
    is_ray_client = where.startswith("ray://")
    return {} if is_submitted or is_ray_client else {"job_config": OwnCode()}


_is_ours = False
"""Whether `start` started or joined the Ray of this process."""


def start(address: str | None, verbose: bool) -> None:
    """Join the cluster that is named (``--address`` or RAY_ADDRESS), else start a local one.

    Ray that runs in this process already is used as it is. The plugins in use travel to every
    worker.

    Raises:
        ClusterError: no cluster answers, Ray does not start, or it runs already without the plugins
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
        # A local machine is not preempted; without the watcher each source starts a second sooner
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        with signals.keep_signal_handler():  # Ray installs a handler of its own
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
    session: Any = ray.get_runtime_context().runtime_env or {}
    known = session.get("env_vars", {}).get(plugins.VARIABLE)
    if known != listed:
        raise ClusterError(
            f"Ray runs in this process already, and its workers do not know the plugins {listed}: "
            "end it (ray.shutdown()) before the job runs"
        )


def stop() -> None:
    """End what `start` began. A Ray that ran before, as in a notebook, stays."""
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
    """What work can be planned for."""

    nodes: Nodes
    """The present nodes; of a cluster that grows, those that it can have."""
    object_store_bytes: float
    """Bytes of the object stores of the present nodes."""
    grows: bool = False
    """Whether nodes are added when resources are requested."""
    is_declared: bool = True
    """Whether it is known which nodes can be added; else ``nodes`` are the present ones."""

    @property
    def cpus(self) -> float:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(gpus for _, gpus in self.nodes)


def cluster(wait: bool | None = None) -> Cluster:
    """The cluster that was joined or started.

    Args:
        wait: whether to wait for nodes that are not there yet; none: on a cluster whose autoscaler
            declares its nodes.

    Raises:
        ClusterError: the declaration of the nodes cannot be read.
    """
    living = [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]
    store = ray.cluster_resources().get("object_store_memory", 1 << 30)
    if wait is False:
        return Cluster(living, store)
    try:
        types = _declared_on_the_head()
    except node_types.NodeTypesError as error:
        raise ClusterError(
            f"{error}; with --no-wait-for-resources the nodes that are there are used"
        ) from error
    if types is None:
        return Cluster(living, store, grows=bool(wait), is_declared=not wait)
    return Cluster(
        [(one.cpus, one.gpus) for one in types for _ in range(one.count)], store, grows=True
    )


def _declared_on_the_head() -> list[node_types.NodeType] | None:
    """The declared node types, read where the autoscaler runs."""
    if ray_client.is_connected():
        return None  # with ray:// neither the address nor the head node is known
    gcs_address = ray.get_runtime_context().gcs_address
    head = next(
        (node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]),
        None,
    )
    if head is None or head == ray.get_runtime_context().get_node_id():
        return node_types.declared(gcs_address)
    on_the_head = NodeAffinitySchedulingStrategy(node_id=head, soft=False)
    task = ray.remote(num_cpus=0)(node_types.declared).options(scheduling_strategy=on_the_head)
    try:
        return ray.get(task.remote(gcs_address))
    except RayTaskError as error:
        raise node_types.NodeTypesError(first_cause(error)) from error


def capacity(have: Nodes, cpus: float, gpus: float) -> int:
    """How many requests of so many CPUs and GPUs the nodes have room for at once.

    A request is met by one node, a share of a GPU by one GPU.
    """
    return sum(_room_on(*node, cpus, gpus) for node in have)


def _room_on(node_cpus: float, node_gpus: float, cpus: float, gpus: float) -> int:
    """How many requests one node has room for."""
    unlimited = 10**9
    by_cpu = math.floor(node_cpus / cpus + 1e-6) if cpus else unlimited
    if not gpus:
        return min(by_cpu, unlimited)
    if gpus >= 1:
        return min(by_cpu, math.floor(node_gpus / gpus + 1e-6))
    return min(by_cpu, int(node_gpus) * math.floor(1 / gpus + 1e-6))


def plan_resources(
    spec: Source, cpus: float, gpus: float, object_store_bytes: float = 2 << 30
) -> RankResources:
    """A rank's part of a cluster; some CPUs are always left for Ray Data, which needs them."""
    ranks = spec.worker_range[1]
    rank_cpus = spec.cpus_per_worker
    if rank_cpus is None:
        rank_cpus = 1.0 if cpus >= 2 * ranks else math.floor(100 * cpus / (2 * ranks)) / 100
    rank_gpus = spec.gpus_per_worker
    if rank_gpus is None:
        rank_gpus = _gpus_of_rank(gpus, ranks)
    left = max(0.01, math.floor(100 * (cpus - ranks * rank_cpus) / ranks) / 100)
    data = DataWorkers(max(1, int(left)), min(1.0, left), int(object_store_bytes * 0.5 / ranks))
    cores = os.cpu_count() or 1
    threads = cores / ranks if cpus <= cores else rank_cpus
    return RankResources(rank_cpus, rank_gpus, data, max(1, int(threads)))


def _gpus_of_rank(gpus: float, ranks: int) -> float:
    """One GPU; where there are fewer GPUs than ranks, an equal share of one."""
    if not gpus:
        return 0.0
    if gpus >= ranks:
        return 1.0
    return math.floor(1e4 / math.ceil(ranks / gpus)) / 1e4


def nodes_for(spec: Source, on: Cluster) -> Nodes:
    """The nodes that a source's ranks and their data workers share.

    In a cluster of fixed size that is all nodes. In one that grows it is the fewest nodes with room
    for the most ranks, each with one data worker, so that a small job does not ask for every node
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
    """A rank's part of a cluster, by `nodes_for` and `plan_resources`."""
    planned = nodes_for(spec, on)
    cpus, gpus = (sum(node[i] for node in planned) for i in (0, 1))
    return plan_resources(spec, cpus, gpus, on.object_store_bytes)


def resource_requests(mine: RankResources, ranks: int) -> list[dict[str, float]]:
    """What so many ranks and their data workers ask for, without empty requests."""
    rank = {"CPU": mine.cpus, "GPU": mine.gpus}
    data = {"CPU": mine.data.cpus_per_actor}
    asked = [rank] * ranks + [data] * (ranks * mine.data.actors)
    return [{name: amount for name, amount in one.items() if amount > 0} for one in asked]


def wait_for(requests: list[dict[str, float]], what: str, progress: Progress) -> None:
    """Ask a cluster that grows for logical resources, and wait until it has them.

    The resources are given back at the end; new nodes stay until the cluster's idle time is over.
    """
    keep_ray_datas_actors_here()
    group = ray.util.placement_group(requests, strategy="PACK")
    asked = describe_requests(requests)
    began = time.monotonic()
    try:
        if group.wait(1):
            return
        progress.note(f"{what}: asks the cluster for {asked}, and waits until the nodes are there")
        while not group.wait(2):
            there = ray.cluster_resources()
            progress.update(
                f"{what}: waits for {asked}; {len(ray.nodes())} nodes with {there.get('CPU', 0):g} "
                f"CPU and {there.get('GPU', 0):g} GPU are there  "
                f"{duration(time.monotonic() - began)}"
            )
        progress.note(f"{what}: the nodes are there after {duration(time.monotonic() - began)}")
    finally:
        ray.util.remove_placement_group(group)


def keep_ray_datas_actors_here() -> None:
    """Start the actors that Ray Data shares over a cluster on this process's node.

    They outlive every job, and their node never counts as idle. Ray Data starts them where it is
    first used, which would be a rank, whose node (with its GPUs) could then never be released.
    """
    from ray.data._internal.execution.node_trackers import get_or_create_actor_location_tracker
    from ray.data._internal.stats import get_or_create_stats_actor

    get_or_create_actor_location_tracker()
    get_or_create_stats_actor()


def describe_requests(requests: list[dict[str, float]]) -> str:
    """Describe resource requests: ``2 x 1 CPU + 1 GPU and 4 x 1 CPU``."""
    each = Counter(
        " + ".join(f"{amount:g} {name}" for name, amount in one.items()) for one in requests
    )
    return " and ".join(f"{count} x {text}" for text, count in each.items())


def check_fits(
    spec: Source, mine: RankResources, have: Nodes, place: str, grows: bool = False
) -> list[str]:
    """Return warnings.

    Raises:
        ClusterError: the fewest ranks can never run on these nodes.
    """
    fewest, most = spec.worker_range
    cpus, gpus = (sum(node[i] for node in have) for i in (0, 1))
    if (
        capacity(have, mine.cpus, mine.gpus) < fewest
        or fewest * (mine.cpus + mine.data.cpus_per_actor) > cpus + 1e-6
    ):
        verb = "can grow to" if grows else "has"
        raise ClusterError(
            f"{place}: the cluster {verb} {describe_nodes(have)}, the request is {fewest} ranks x "
            f"({mine.cpus:g} CPU + {mine.gpus:g} GPU, each on one node) and "
            f"{mine.data.cpus_per_actor:g} CPU of data workers a rank; it can never be met. Lower "
            "workers, cpus_per_worker or gpus_per_worker, or join a larger cluster (--address)"
        )
    cores = os.cpu_count() or 1
    warnings = []
    if gpus == 0 and most > max(cpus, cores if cpus <= cores else 0):
        warnings.append(
            f"warning: {place}: {most} ranks are more than the {cpus:g} CPUs; they will share them"
        )
    if 0 < mine.gpus < 1 and most > 1:
        warnings.append(
            f"warning: {place}: {most} ranks share {gpus:g} GPUs; they reduce over gloo, which "
            "is slow. One rank a GPU is faster"
        )
    return warnings


def describe_nodes(have: Nodes) -> str:
    """The cluster in words."""
    each = [f"{cpus:g} CPU + {gpus:g} GPU" for cpus, gpus in sorted(set(have))]
    return (
        f"{len(have)} node{'s' if len(have) != 1 else ''} of {' or '.join(each)}"
        if have
        else "no nodes"
    )


@dataclass(frozen=True)
class _RankInputs:
    """What every rank is given."""

    work: pretrain.RankJob
    board: Any
    """The actor of the `Board`."""
    rows: Any
    """A reference to the training rows that were decoded before, or None (`put_shared`)."""


def start_actor(kind: type) -> Any:
    """Start an actor that needs no CPU; its process imports the module that defines ``kind``."""
    return ray.remote(num_cpus=0)(kind).remote()


def _rank_main(config: dict[str, Any]) -> None:  # Ray Train passes a dict
    import ray.train
    import ray.train.torch

    inputs: _RankInputs = get_shared(config["inputs"])
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
        # what is not posted at once goes with the next one
        newest = {**newest, **record} if newest else record
        is_last = record["step"] == record["steps"] or "stopped" in record
        if time.monotonic() - posted > 0.3 or is_last:
            posted = time.monotonic()
            board.post.remote(newest)
            newest = None

    try:
        with write_fence.guarded_by(work.fences):
            pretrain.train_rank(
                work,
                ranks,
                on_progress,
                get_shared(inputs.rows) if inputs.rows is not None else None,
            )
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
    """The message of the error that began it, without Ray's account of the way it took."""
    while isinstance(error, RayError) and (
        inner := getattr(error, "cause", None) or error.__cause__
    ):
        error = inner
    is_plain = isinstance(
        error, (ValueError, NonFiniteError, ChangedFileError, write_fence.LostLeaseError)
    )
    return str(error) if is_plain else f"{type(error).__name__}: {error}"


def _watch(board: Any, name: str, progress: Progress, stop: threading.Event) -> None:
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
            progress.update(training_line(name, record))


def resources() -> dict[str, float]:
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
    """What the report says of a source that is done."""
    manifest = bundle.read_manifest(stage.bundle_uri)
    made = {"versions": manifest.versions, "changes": stage.changes()}
    return {**manifest.training, "source": stage.name, "bundle": stage.bundle_uri, **made}


def _report_findings(name: str, findings: Iterable[Finding], progress: Progress) -> None:
    """Show the findings that are meant for the terminal."""
    for finding in findings:
        if finding.in_terminal:
            progress.note(finding.line(name))


def run_source(
    stage: source.SourceStage, progress: Progress, verbose: bool, wait: bool | None = None
) -> dict[str, Any]:
    """Run a source stage to its bundle; a bundle that is there already is used.

    Args:
        verbose: Whether Ray's own messages are shown.
        wait: Whether to wait for nodes that are not there yet (`cluster`).

    Returns:
        What the report says of the source.

    Raises:
        ClusterError: the cluster can never run it; raised before anything starts.
        StageError: training failed for good.
    """
    if stage.done:
        return {**source_metadata(stage), "cached": True}
    if stage.splits is None:
        metadata = pretrain.import_checkpoint(stage)
        _report_findings(stage.name, findings_from_metadata(metadata), progress)
        return {**metadata, "bundle": stage.bundle_uri}
    mine, most = _plan_ranks(stage, progress, wait)
    progress.update(f"{stage.name}: reading rows to fit means, a vocabulary or labels")
    fitted = source.prepare_source(stage)
    work = pretrain.rank_job(stage, fitted, mine.data, mine.threads)
    progress.note(f"{stage.name}: {work.split_text}")
    _report_findings(stage.name, fitted.findings, progress)
    if work.place == "memory":
        progress.update(f"{stage.name}: decoding {len(fitted.train)} rows")
    rows = pretrain.decode_once(work)
    record = _train(stage, work, rows, mine, most, progress, verbose)
    storage.remove_tree(storage.join(stage.uri, "ray"))
    if record:
        progress.update(training_line(stage.name, record), final=True)
    return source_metadata(stage)


def _plan_ranks(
    stage: source.SourceStage, progress: Progress, wait: bool | None
) -> tuple[RankResources, int]:
    """Each rank's share of the cluster, and the most ranks; waits for nodes where it grows."""
    spec, on = stage.spec, cluster(wait)
    mine, nodes = plan_on_cluster(spec, on), nodes_for(spec, on)
    for line in check_fits(spec, mine, nodes, f"sources.{stage.name}", on.grows):
        progress.note(line)
    fewest, most = spec.worker_range
    cpus = sum(node[0] for node in nodes)
    # elastic ranks leave Ray Data its CPUs
    room = int((cpus + 1e-6) // (mine.cpus + mine.data.cpus_per_actor))
    if on.grows:
        wait_for(resource_requests(mine, fewest), stage.name, progress)
    return mine, max(fewest, min(most, room))


def _train(
    stage: source.SourceStage,
    work: pretrain.RankJob,
    rows: Rows | None,
    mine: RankResources,
    most: int,
    progress: Progress,
    verbose: bool,
) -> LogRecord | None:
    """Train on all ranks, show their progress, and return their last log record.

    Raises:
        StageError: no bundle was written.
    """
    import ray.train

    board = start_actor(Board)
    ended = threading.Event()
    watched = (board, stage.name, progress, ended)
    watcher = threading.Thread(target=_watch, args=watched, daemon=True)
    watcher.start()
    reference = put_shared(rows) if rows is not None else None
    # by reference: Ray Train's controller reads the config, and would import all that ranks do
    inputs = put_shared(_RankInputs(work, board, reference))
    error: Exception | None = None
    try:
        _fit(_trainer(stage, mine, inputs, verbose, most))
    except ray.train.TrainingFailedError as failed:
        error = failed
    finally:
        ended.set()
        watcher.join()
    record, fatal = ray.get(board.read.remote())
    ray.kill(board)  # pyright: ignore[reportArgumentType] - Ray's stub of actors
    if fatal or error or not stage.has_bundle:
        write_fence.check(stage.uri)  # a lost lock is the reason, whatever error the ranks raised
        raise StageError(f"sources.{stage.name}: {fatal or _reason(error)}")
    return record


def _fit(trainer: Any) -> Any:
    """Run the trainer; Ctrl-C raises KeyboardInterrupt.

    Ray Train installs a handler that ends the process instead; it is taken off again.
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


def _trainer(
    stage: source.SourceStage, mine: RankResources, inputs: Any, verbose: bool, most: int
) -> Any:
    import ray.train
    import ray.train.torch

    path, filesystem = train_storage(storage.join(stage.uri, "ray"))
    low = stage.spec.worker_range[0]
    return ray.train.torch.TorchTrainer(
        _rank_main,
        train_loop_config={"inputs": inputs},
        torch_config=_backend(mine.gpus),
        scaling_config=ray.train.ScalingConfig(
            num_workers=low if low == most else (low, most),
            use_gpu=mine.gpus > 0,
            resources_per_worker={"CPU": mine.cpus, **({"GPU": mine.gpus} if mine.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"{stage.name}-{stage.key}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=stage.spec.max_failures),
            logging_config=None if verbose else ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def put_shared(value: Any) -> Any:
    """Put a value into the object store once; return a reference for all that read it."""
    return ray.put(value)


def get_shared(reference: Any) -> Any:
    """The value behind a reference; its arrays are read where they lie, without a copy."""
    return ray.get(reference)


def _backend(gpus: float) -> Any:
    """NCCL does not allow two ranks on one GPU: ranks that share one use gloo; else Ray's
    choice.
    """
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
    """``fn(config, ranks)`` on several ranks under Ray Train, inside a trial; what rank 0 returns.
    References in config are resolved by each rank, and all else reaches them by reference, too.

    Raises StageError with the rank's error.
    """
    import ray.train
    import ray.train.torch

    fences = write_fence.current_fences()

    def main(config: dict[str, Any]) -> Any:
        context = ray.train.get_context()
        given = {name: get_shared(reference) for name, reference in config.items()}
        torch.set_num_threads(max(1, int(cpus)))
        with write_fence.guarded_by(fences):
            out = fn(
                given,
                Ranks(
                    context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
                ),
            )
        return out if context.get_world_rank() == 0 else None

    references = {
        name: value if isinstance(value, ray.ObjectRef) else put_shared(value)
        for name, value in config.items()
    }
    path, filesystem = train_storage(uri)
    trainer = ray.train.torch.TorchTrainer(
        main,
        train_loop_config=references,
        torch_config=_backend(gpus),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(name=name, storage_path=path, storage_filesystem=filesystem),
    )
    try:
        return trainer.fit().return_value
    except ray.train.TrainingFailedError as error:
        raise StageError(_reason(error)) from error
    finally:
        storage.remove_tree(uri)


def train_storage(uri: str) -> tuple[str, Any]:
    """(path, pyarrow filesystem or none) as Ray Train wants them; S3 goes through the same s3fs as
    everything else.
    """
    if not storage.is_remote(uri):
        return os.path.abspath(uri), None
    import pyarrow.fs

    filesystem, path = storage.filesystem(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
