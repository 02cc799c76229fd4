"""What ranks are given of a cluster, what is refused before anything starts, and which cluster is
joined. No Ray runs here.
"""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private import services

from pipeline.config.schema import Source
from pipeline.data.stream import DataWorkers
from pipeline.io import ray_environment
from pipeline.train import launch
from pipeline.train.launch import ClusterError, RankResources, capacity, check_fits, plan_resources


def spec(workers: int | tuple[int, int] = 1, **more) -> Source:
    data = {
        "uri": "rows.parquet",
        "modality": "image",
        "columns": {"image": "image", "label": "label"},
    }
    trained = {"data": data, "objective": "classification", "backbone": "timm/resnet18"}
    return Source.model_validate({**trained, "workers": workers, **more})


@pytest.mark.parametrize(
    ("library", "keeps"),
    [
        (("glibc", "2.41"), True),
        (("glibc", "2.35"), True),
        (("glibc", "2.31"), False),
        (("", ""), False),
    ],
)
def test_only_a_c_library_that_takes_it_is_told_to_keep_memory(library, keeps, monkeypatch):
    """An older one refuses the one number and takes the other, and then maps every block above 128
    KiB anew.
    """
    monkeypatch.setattr("platform.libc_ver", lambda: library)
    for name in ray_environment.KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    ray_environment.prepare_ray()
    assert {name for name in ray_environment.KEEP_MEMORY if name in os.environ} == (
        set(ray_environment.KEEP_MEMORY) if keeps else set()
    )


@pytest.mark.ray
def test_workers_of_a_ray_that_is_started_here_have_the_priority_of_their_driver(ray_here):
    niceness = ray_here.remote(lambda: os.nice(0))
    assert ray_here.get(niceness.remote()) == os.nice(0)


# ---------------------------------------------------------------- capacity


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "room"),
    [
        ([(4.0, 0.0)] * 4, 6, 0, 0),  # 16 CPUs, and no node holds one such rank
        ([(4.0, 0.0)] * 4, 4, 0, 4),
        ([(4.0, 0.0)] * 4, 3, 0, 4),  # the fourth CPU of each node makes no fifth rank
        ([(4.0, 0.0), (9.0, 0.0)], 3, 0, 4),
        ([(2.0, 0.0)], 0.5, 0, 4),
        ([(0.3, 0.0)], 0.1, 0, 3),  # 0.3 / 0.1 is a little less than 3
        ([], 1, 0, 0),
        ([(8.0, 1.0)] * 2, 1, 2, 0),  # two GPUs on two nodes are no pair
        ([(8.0, 2.0)] * 2, 1, 2, 2),
        ([(8.0, 2.0)], 1, 0.5, 4),
        ([(8.0, 2.0)], 1, 0.75, 2),  # 2 / 0.75 is 2.67, and a share lies on one GPU
        ([(8.0, 3.0)], 1, 0.6, 3),  # 3 / 0.6 is 5
        ([(8.0, 2.0)], 1, 0.3333, 6),
        ([(2.0, 4.0)], 1, 0.5, 2),  # CPUs are what is scarce
        ([(8.0, 0.0), (8.0, 1.0)], 1, 1, 1),
        ([(0.0, 2.0)], 0, 0.5, 4),
    ],
)
def test_a_bundle_lies_on_one_node_and_a_share_of_a_gpu_on_one_gpu(nodes, cpus, gpus, room):
    assert capacity(nodes, cpus, gpus) == room


# ---------------------------------------------------------------- a rank's share


@given(st.integers(1, 64), st.floats(0.5, 512), st.integers(0, 16))
def test_ranks_and_their_data_workers_never_take_more_cpus_than_there_are(ranks, cpus, gpus):
    mine = plan_resources(spec(ranks), cpus, gpus)
    data = mine.data.actors * mine.data.cpus_per_actor
    assert mine.data.actors >= 1 and mine.data.cpus_per_actor > 0 and mine.threads >= 1
    assert ranks * mine.cpus <= cpus / 2 + 1e-9, (
        "half is left to Ray Data, which waits for ever without"
    )
    if cpus >= 0.02 * ranks:  # below, Ray has no part of a CPU that is small enough
        assert mine.cpus > 0 and ranks * (mine.cpus + data) <= cpus + 1e-6


@given(st.integers(1, 32), st.floats(0.5, 64), st.floats(0.05, 32))
def test_what_fits_by_the_check_leaves_cpus_to_the_data_workers(ranks, cpus, each):
    asked = spec(ranks, cpus_per_worker=each)
    mine = plan_resources(asked, cpus, 0)
    try:
        check_fits(asked, mine, [(cpus, 0.0)], "sources.a")
    except ClusterError:
        assert ranks * (each + 0.01) > cpus - 0.01 * ranks - 1e-6, (
            "refused though a hundredth of a CPU a rank was left"
        )
    else:
        assert (
            mine.cpus == each
            and ranks * (each + mine.data.actors * mine.data.cpus_per_actor) <= cpus + 1e-5
        )


@pytest.mark.parametrize(
    ("ranks", "gpus", "each", "backend"),
    [
        (1, 0, 0.0, None),
        (1, 1, 1.0, None),
        (2, 2, 1.0, None),
        (2, 8, 1.0, None),
        (2, 1, 0.5, "gloo"),
        (3, 2, 0.5, "gloo"),
        (3, 1, 0.3333, "gloo"),
        (7, 1, 0.1428, "gloo"),
        (7, 2, 0.25, "gloo"),
    ],
)
def test_ranks_that_share_a_gpu_talk_over_gloo(ranks, gpus, each, backend):
    mine = plan_resources(spec(ranks), 64, gpus)
    assert mine.gpus == each
    found = launch.backend_of(mine.gpus)
    assert backend == (found and found.backend)
    assert not gpus or capacity([(64.0, float(gpus))], mine.cpus, mine.gpus) >= ranks, (
        "what is given out can be placed"
    )


@given(st.integers(1, 64), st.integers(1, 16))
def test_every_number_of_ranks_can_be_placed_on_the_gpus_of_one_node(ranks, gpus):
    mine = plan_resources(spec(ranks), 256, gpus)
    assert 0 < mine.gpus <= 1 and capacity([(256.0, float(gpus))], mine.cpus, mine.gpus) >= ranks
    assert capacity([(256.0, float(gpus))], mine.cpus, mine.gpus) < ranks + gpus, (
        "and no GPU holds two ranks more than another"
    )


def test_what_the_job_says_of_a_rank_is_what_it_gets():
    mine = plan_resources(spec(2, cpus_per_worker=3, gpus_per_worker=0), 16, 4)
    assert (mine.cpus, mine.gpus) == (3, 0) and mine.data.actors == 5
    assert plan_resources(spec(2), 16, 0, object_store_bytes=1000).data.object_store_bytes == 250, (
        "half of the store, shared by the ranks"
    )
    assert plan_resources(spec((2, 8)), 8, 0).cpus == 0.5, "by the most ranks, not the fewest"


# ---------------------------------------------------------------- a cluster that grows

AWS = launch.Cluster([(0.0, 0.0)] + [(48.0, 4.0)] * 4 + [(32.0, 0.0)] * 4, 2 << 30, grows=True)
"""What aws.yaml declares: a head that does no work, four nodes with four GPUs each, four for
CPUs.
"""


@pytest.mark.parametrize(
    ("words", "planned"),
    [
        ({"workers": 1}, [(48.0, 4.0)]),
        ({"workers": 4}, [(48.0, 4.0)]),
        ({"workers": 5}, [(48.0, 4.0)] * 2),
        ({"workers": (2, 16)}, [(48.0, 4.0)] * 4),  # an elastic job is planned for all its ranks
        ({"workers": 4, "gpus_per_worker": 0}, [(32.0, 0.0)]),  # the job wants no GPUs
        ({"workers": 4, "gpus_per_worker": 0, "cpus_per_worker": 20}, [(32.0, 0.0)] * 4),
        ({"workers": 2, "gpus_per_worker": 4}, [(48.0, 4.0)] * 2),
    ],
    ids=str,
)
def test_a_source_is_planned_for_the_fewest_declared_nodes_that_hold_its_ranks(words, planned):
    """None of them is there yet: what happens to be there says nothing of a cluster that grows."""
    asked = spec(**words)
    assert launch.nodes_for(asked, AWS) == planned
    mine = launch.plan_on_cluster(asked, AWS)
    assert mine.cpus >= 1 and (mine.gpus > 0) == (words.get("gpus_per_worker") != 0)
    assert (
        check_fits(asked, mine, launch.nodes_for(asked, AWS), "sources.a", grows=True) is not None
    )


def test_of_a_cluster_of_fixed_size_all_nodes_are_planned_for():
    fixed = launch.Cluster([(4.0, 0.0)] * 3, 2 << 30)
    assert launch.nodes_for(spec(1), fixed) == fixed.nodes


@pytest.mark.parametrize("words", [{}, {"gpus_per_worker": 1, "cpus_per_worker": 6}])
def test_where_nobody_says_what_can_come_the_job_says_what_it_needs(words):
    unknown = launch.Cluster([(0.0, 0.0)], 2 << 30, grows=True, is_declared=False)
    asked = spec(3, **words)
    mine = launch.plan_on_cluster(asked, unknown)
    assert (mine.cpus, mine.gpus) == (
        words.get("cpus_per_worker", 1),
        words.get("gpus_per_worker", 0),
    )
    assert check_fits(asked, mine, launch.nodes_for(asked, unknown), "sources.a") == []


@given(
    st.integers(1, 8),
    st.lists(
        st.tuples(st.sampled_from([0.0, 2.0, 16.0]), st.sampled_from([0.0, 1.0, 4.0])), max_size=6
    ),
    st.booleans(),
)
def test_no_bundle_that_a_growing_cluster_is_asked_for_is_empty(ranks, nodes, is_declared):
    on = launch.Cluster(nodes, 2 << 30, grows=True, is_declared=is_declared)
    asked = spec(ranks)
    try:
        check_fits(
            asked,
            launch.plan_on_cluster(asked, on),
            launch.nodes_for(asked, on),
            "sources.a",
            grows=True,
        )
    except ClusterError:
        assert is_declared
        return
    bundles = launch.resource_requests(launch.plan_on_cluster(asked, on), ranks)
    assert len(bundles) >= 2 * ranks
    assert all(bundle.get("CPU", 0) > 0 and 0 not in bundle.values() for bundle in bundles)


def test_bundles_in_words():
    assert (
        launch.describe_requests([{"CPU": 1, "GPU": 0.5}, {"CPU": 1, "GPU": 0.5}, {"CPU": 2}])
        == "2 x 1 CPU + 0.5 GPU and 1 x 2 CPU"
    )


def test_what_no_declared_node_can_hold_is_refused_with_what_can_come():
    asked = spec(1, cpus_per_worker=64)
    with pytest.raises(
        ClusterError, match=r"the cluster can grow to 8 nodes of .* it can never be met"
    ):
        check_fits(
            asked,
            launch.plan_on_cluster(asked, AWS),
            launch.nodes_for(asked, AWS),
            "sources.a",
            grows=True,
        )


@pytest.fixture
def living(monkeypatch):
    """A cluster of which only the head is there, and what its autoscaler declares."""
    head = {"NodeID": "h", "Alive": True, "Resources": {"node:__internal_head__": 1.0}}
    monkeypatch.setattr(launch.ray, "nodes", lambda: [head])
    monkeypatch.setattr(launch.ray, "cluster_resources", lambda: {"object_store_memory": 1000.0})
    monkeypatch.setattr(
        launch.ray,
        "get_runtime_context",
        lambda: SimpleNamespace(gcs_address="a:1", get_node_id=lambda: "h"),
    )
    declared: list = [None]
    monkeypatch.setattr(launch.node_types, "read_declared_types", lambda address: declared[0])
    return declared


def test_a_cluster_that_declares_its_nodes_is_waited_for_unless_told_otherwise(living):
    assert launch.cluster() == launch.Cluster([(0.0, 0.0)], 1000.0)
    assert launch.cluster(True) == launch.Cluster(
        [(0.0, 0.0)], 1000.0, grows=True, is_declared=False
    )
    living[0] = [launch.node_types.NodeType("gpu", 48.0, 4.0, 2)]
    assert (
        launch.cluster()
        == launch.cluster(True)
        == launch.Cluster([(48.0, 4.0)] * 2, 1000.0, grows=True)
    )
    assert launch.cluster(False) == launch.Cluster([(0.0, 0.0)], 1000.0), "the nodes that are there"


# ---------------------------------------------------------------- refused, or warned of


def test_what_can_never_be_met_is_refused_with_what_is_asked_and_what_is_there():
    asked = spec(2, cpus_per_worker=6)
    with pytest.raises(ClusterError) as caught:
        check_fits(asked, plan_resources(asked, 16, 0), [(4.0, 0.0)] * 4, "sources.big")
    message = str(caught.value)
    assert message.startswith(
        "sources.big: the cluster has 4 nodes of 4 CPU + 0 GPU, the request is 2 ranks x (6 "
        "CPU + 0 GPU, each on one node) and 1 CPU of"
    )
    assert "it can never be met. Lower workers, cpus_per_worker or gpus_per_worker" in message


@pytest.mark.parametrize(
    ("workers", "words", "nodes"),
    [
        (1, {"cpus_per_worker": 2}, [(2.0, 0.0)]),  # no part of a CPU is left for data
        (2, {"gpus_per_worker": 1}, [(8.0, 1.0)]),
        (1, {"gpus_per_worker": 1}, [(8.0, 0.0)]),
        # 13.5 CPUs for 12, in pieces that hold three ranks
        (
            4,
            {"cpus_per_worker": 3},
            [(4.0, 0.0), (4.0, 0.0), (5.5, 0.0)],
        ),
        (1, {}, []),
    ],
    ids=str,
)
def test_requests_that_do_not_fit(workers, words, nodes):
    asked = spec(workers, **words)
    mine = plan_resources(asked, sum(n[0] for n in nodes), sum(n[1] for n in nodes))
    with pytest.raises(ClusterError, match="it can never be met"):
        check_fits(asked, mine, nodes, "sources.a")


def test_an_elastic_request_needs_its_fewest_ranks_only():
    asked = spec((2, 8), cpus_per_worker=1)
    assert check_fits(asked, plan_resources(asked, 3, 0), [(3.0, 0.0)], "sources.a") != [], (
        "eight ranks would share three CPUs: a warning"
    )
    whole = spec(8, cpus_per_worker=1)
    with pytest.raises(ClusterError, match="the request is 8 ranks"):
        check_fits(whole, plan_resources(whole, 3, 0), [(3.0, 0.0)], "sources.a")
    with pytest.raises(ClusterError, match="the request is 2 ranks"):
        check_fits(asked, plan_resources(asked, 2, 0), [(1.0, 0.0)] * 2, "sources.a")


@pytest.mark.parametrize(
    ("ranks", "cpus", "cores", "warned"),
    [(2, 2, 2, False), (3, 2, 2, True), (4, 2, 8, False), (80, 64, 2, True), (64, 64, 2, False)],
)
def test_more_ranks_than_cores_is_a_warning(monkeypatch, ranks, cpus, cores, warned):
    """Cores where the cluster is this machine, its CPUs where it is larger."""
    monkeypatch.setattr(launch.os, "cpu_count", lambda: cores)
    found = check_fits(
        spec(ranks), plan_resources(spec(ranks), cpus, 0), [(float(cpus), 0.0)], "sources.a"
    )
    assert found == (
        [f"warning: sources.a: {ranks} ranks are more than the {cpus} CPUs; they will share them"]
        if warned
        else []
    )


def test_ranks_that_share_gpus_are_a_warning():
    nodes = [(16.0, 1.0)]
    (line,) = check_fits(spec(2), plan_resources(spec(2), 16, 1), nodes, "sources.a")
    assert line.startswith(
        "warning: sources.a: 2 ranks share 1 GPUs; they reduce over gloo, which is slow"
    )
    assert check_fits(spec(1), plan_resources(spec(1), 16, 1), nodes, "sources.a") == []
    assert (
        check_fits(spec(1), RankResources(1, 0.25, DataWorkers(), 1), nodes, "sources.a") == []
    ), "one rank reduces over nothing"


def test_a_cluster_in_words():
    assert launch.describe_nodes([]) == "no nodes"
    assert launch.describe_nodes([(4.0, 0.0)]) == "1 node of 4 CPU + 0 GPU"
    assert (
        launch.describe_nodes([(8.0, 1.0), (4.0, 0.0), (4.0, 0.0)])
        == "3 nodes of 4 CPU + 0 GPU or 8 CPU + 1 GPU"
    )


# ---------------------------------------------------------------- which cluster


@pytest.fixture
def asked(monkeypatch):
    """What ``ray.init`` was called with; nothing starts."""
    calls = []

    def init(**words):
        calls.append(words)

    monkeypatch.setattr(launch.ray, "init", init)
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(launch, "prepare_ray", lambda: None)
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "ERROR")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_without_an_address_a_cluster_of_our_own_is_started(asked):
    """Never ``auto``, nor none at all: both join whatever cluster somebody has started on the
    machine.
    """
    launch.start(None, False)
    (call,) = asked
    assert (
        call["address"] == "local"
        and call["include_dashboard"] is False
        and call["log_to_driver"] is False
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Ray ends its processes by group")
def test_a_signal_to_our_process_group_does_not_end_the_processes_of_our_ray(asked, monkeypatch):
    started = []

    def start_process(**_):
        process = services.start_ray_process(["sleep", "60"], "raylet", fate_share=True).process
        started.append((process, os.getpgid(process.pid) == process.pid))

    try:
        start_process()
        monkeypatch.setattr(launch.ray, "init", start_process)
        launch.start(None, False)
        start_process()
    finally:
        for process, _ in started:
            process.kill()
            process.wait()
    assert [has_own_group for _, has_own_group in started] == [False, True, False]


@pytest.mark.parametrize(
    ("address", "variable", "joined"),
    [
        (None, "10.0.0.1:6379", "10.0.0.1:6379"),
        ("ray://head:10001", None, "ray://head:10001"),
        ("auto", None, "auto"),
        ("a:1", "b:2", "a:1"),
    ],
)
def test_a_cluster_that_is_named_is_joined(asked, monkeypatch, address, variable, joined):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    launch.start(address, True)
    (call,) = asked
    assert call["address"] == joined and call["log_to_driver"] is True
    assert "include_dashboard" not in call, "Ray refuses it for a cluster that runs already"


def test_a_session_that_runs_is_kept(asked, monkeypatch):
    monkeypatch.setattr(launch.ray, "is_initialized", lambda: True)
    launch.start("10.0.0.1:6379", False)
    assert asked == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("\n  Could not find any running Ray instance.\nmore"),
        RuntimeError("Version mismatch"),
        ValueError("bad address"),
        ConnectionError(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_that_does_not_answer_is_one_clear_error(asked, monkeypatch, error, address):
    def init(**words):
        raise error

    monkeypatch.setattr(launch.ray, "init", init)
    with pytest.raises(ClusterError) as caught:
        launch.start(address, False)
    message = str(caught.value)
    assert message.startswith(
        "no Ray cluster answers at 10.0.0.1:6379: " if address else "Ray does not start here: "
    )
    lines = [line for line in str(error).splitlines() if line.strip()]
    assert (
        (lines[0] if lines else "ConnectionError") in message
        and "\n" not in message
        and "check the address, the token" in message
    )


def test_a_start_of_ray_that_takes_too_long_is_one_clear_error(asked, monkeypatch):
    """Ray raises a plain exception then."""

    def init(**words):
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(launch.ray, "init", init)
    with pytest.raises(ClusterError, match=r"timed out during startup; .* run again$"):
        launch.start(None, False)


# ---------------------------------------------------------------- the error of a rank


def test_the_cause_of_an_error_is_told_without_the_way_it_took():
    from ray.exceptions import RayTaskError

    assert (
        launch.first_cause(RayTaskError("f", "traceback", ValueError("row 3 is bad")))
        == "row 3 is bad"
    )
    assert launch.first_cause(KeyError("x")) == "KeyError: 'x'"


def test_a_warning_of_the_ranks_is_told_once_and_their_last_step_is_left_to_the_end(monkeypatch):
    records = iter(
        [
            {},
            {"step": 1, "steps": 3},
            {"step": 2, "steps": 3, "warning": "the quantiser has collapsed"},
            {"step": 3, "steps": 3, "warning": "the quantiser has collapsed"},
        ]
    )
    shown = []
    monkeypatch.setattr(launch.ray, "get", lambda ref, timeout: (next(records), None))
    stop, lines = threading.Event(), []
    board = SimpleNamespace(read=SimpleNamespace(remote=lambda: None))
    progress = SimpleNamespace(note=lines.append, update=shown.append)
    monkeypatch.setattr(stop, "wait", lambda seconds: len(shown) == 3)
    launch.follow_ranks(board, "heard", progress, stop)
    assert lines == ["warning: heard: the quantiser has collapsed"]
    assert shown == [
        "heard: step 1/3",
        "heard: step 2/3",
        "heard: trained; validating and writing the bundle",
    ]


def test_where_a_source_goes_on_is_told_once_after_each_restart(monkeypatch):
    records = iter(
        [
            {"step": 10, "steps": 300},
            {"step": 160, "steps": 300, "resumed_from": 150},
            {"step": 170, "steps": 300, "resumed_from": 150},
            {"step": 180, "steps": 300, "validation_accuracy": 0.5},
            {"step": 190, "steps": 300, "resumed_from": 170},
        ]
    )
    monkeypatch.setattr(launch.ray, "get", lambda ref, timeout: (next(records), None))
    stop, lines = threading.Event(), []
    board = SimpleNamespace(read=SimpleNamespace(remote=lambda: None))
    progress = SimpleNamespace(
        note=lines.append, update=lambda line: stop.set() if "step 190" in line else None
    )
    monkeypatch.setattr(stop, "wait", lambda seconds: stop.is_set())
    launch.follow_ranks(board, "a", progress, stop)
    assert lines == ["a: goes on from step 150 of 300", "a: goes on from step 170 of 300"]
