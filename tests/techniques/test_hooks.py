"""Domain adaptation, test-time statistics and weight soups are techniques of one file each."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_runs import Silent, run_through, trials_in_this_process
from toys import image_splits, job_of, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import plugins, registry
from pipeline.config.schema import ComponentConfig, Job
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.stream import TooManyBadRowsError, eval_batches
from pipeline.io import file_identity
from pipeline.train.ranks import Ranks
from pipeline.transfer import stages, trial
from pipeline.transfer.grid import SCRATCH

RESNET = Architecture("timm/resnet10t", {}, {"channels": 3, "size": 32})
IMAGE = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3})


@pytest.fixture(autouse=True)
def adaptation():
    """The techniques of tests/plugin/adaptation."""
    plugins.use([str(Path(__file__).parents[1] / "plugin" / "adaptation")])
    yield
    plugins.use([])


paths = image_splits(30, 12, 20)


def source_rows(path: str) -> dict:
    return {"src": (Selection(manifests.build([path], "parquet", "")), {"image": "picture"})}


def weights_of(record) -> dict[str, torch.Tensor]:
    return bundle.load(record.rows[0].bundle_uri).tensors


# ---------------------------------------------------------------- streams


def test_a_penalty_reads_rows_of_source_and_target_without_their_labels(
    tmp_path, paths, monkeypatch
):
    seen = []
    kind = registry.get("technique", "mean_alignment")
    penalty = kind.penalty

    def watched(self, task, batch, streams):
        seen.append({name: (sorted(one.data), one.rows.tolist()) for name, one in streams.items()})
        return penalty(self, task, batch, streams)

    monkeypatch.setattr(kind, "penalty", watched)
    job = job_of(tmp_path, paths, train={"steps": 4})
    records = []
    for number, path in enumerate((paths["test"], paths["test"], paths["validation"])):
        shared = shared_of(tmp_path, job, paths, root=f"root{number}", keep_bundles=True)
        shared.source_rows = source_rows(path)
        records.append(trial.run(trial_of(job, shared, "mean_alignment"), shared))
    steps = len(seen) // 3
    assert steps == 4 and seen[:steps] == seen[steps : 2 * steps] != seen[2 * steps :]
    assert {tuple(names) for one in seen for names, _ in one.values()} == {("image",)}
    rows = {name: {row for one in seen[:steps] for row in one[name][1]} for name in seen[0]}
    assert rows == {"source": set(range(20)), "target": set(range(30))}, "every row of each"
    first, again, other = map(weights_of, records)
    name = next(name for name in first if name.endswith("weight"))
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("micro_batch", "num_rows", "sizes"),
    [
        (None, 30, [(16, 16, 16)] * 2),
        (5, 30, [(4, 4, 4)] * 8),
        (4, 2, [(4, 1, 4)] * 4),  # 2 of the 4 parts have no row, and so no penalty
    ],
)
def test_streams_are_cut_as_the_batch_is(
    tmp_path, paths, monkeypatch, micro_batch, num_rows, sizes
):
    found = []
    kind = registry.get("technique", "mean_alignment")
    penalty = kind.penalty

    def counted(self, task, batch, streams):
        found.append((len(batch), len(streams["source"]), len(streams["target"])))
        return penalty(self, task, batch, streams)

    monkeypatch.setattr(kind, "penalty", counted)
    rows = str(tmp_path / "rows.parquet")
    pq.write_table(pq.read_table(paths["train"]).slice(0, num_rows), rows)
    job = job_of(tmp_path, paths, train={"micro_batch": micro_batch, "steps": 2})
    shared = shared_of(tmp_path, job, paths)
    shared.source_rows = source_rows(rows)
    record = trial.run(trial_of(job, shared, "mean_alignment"), shared)
    assert record.skipped_steps == 0
    assert found == sizes


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_unreadable_rows_of_a_stream_are_listed_and_held_against_the_budget(tmp_path, paths, share):
    table = pq.read_table(paths["test"])
    pictures = table["picture"].to_pylist()
    pictures[3] = pictures[7] = b"no picture"
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "source.parquet")
    job = job_of(tmp_path, paths, train={"steps": 4})
    data = job.targets["task"].data.model_copy(update={"max_bad_rows": share})
    target = job.targets["task"].model_copy(update={"data": data})
    job = job.model_copy(update={"targets": {"task": target}})
    shared = shared_of(tmp_path, job, paths)
    shared.source_rows = source_rows(str(tmp_path / "source.parquet"))
    one = trial_of(job, shared, "mean_alignment")
    if share < 0.1:
        with pytest.raises(TooManyBadRowsError, match="2 of 20 rows cannot be used"):
            trial.run(one, shared)
        return
    record = trial.run(one, shared)
    assert record.rows[0].n_train == 30, "all rows of the target are there"
    text = Path(trial.folder_uri(shared, one), "quarantine.jsonl").read_text()
    listed = [json.loads(line) for line in text.splitlines()]
    assert sorted((row["split"], row["row"]) for row in listed) == [("source", 3), ("source", 7)]


@pytest.mark.parametrize("name", ["source.parquet", "train.parquet"])
def test_no_record_is_written_when_a_file_of_a_stream_has_changed(
    tmp_path, paths, monkeypatch, name
):
    """It changes after its last rows were read, when nothing opens it again."""
    mine = {split: str(tmp_path / f"{split}.parquet") for split in paths}
    for split, path in mine.items():
        shutil.copy(paths[split], path)
    source = str(shutil.copy(paths["test"], tmp_path / "source.parquet"))
    job = job_of(tmp_path, mine, train={"steps": 2}).model_copy(
        update={"techniques": [ComponentConfig(name="mean_alignment")]}
    )
    shared = shared_of(tmp_path, job, mine)
    shared.source_rows = source_rows(source)
    shared.source_reads = {"src": tuple(file_identity.identify([source]))}
    predict = trial.predict_test

    def meanwhile(*arguments):
        file = tmp_path / name
        pq.write_table(pq.read_table(file).slice(1), file)
        return predict(*arguments)

    monkeypatch.setattr(trial, "predict_test", meanwhile)
    with pytest.raises(file_identity.ChangedFileError, match=name):
        trial.run(trial_of(job, shared, "mean_alignment"), shared)


def test_a_frozen_technique_with_hooks_that_nothing_calls_is_refused(tmp_path, paths, monkeypatch):
    kind = registry.get("technique", "mean_alignment")
    monkeypatch.setattr(kind, "frozen", True)
    job = job_of(tmp_path, paths).model_copy(
        update={"techniques": [ComponentConfig(name="mean_alignment")]}
    )
    with pytest.raises(
        ValueError, match="mean_alignment is frozen, so its penalty and streams would not be used"
    ):
        shared_of(tmp_path, job, paths)
    monkeypatch.setattr(kind, "at_test", lambda self, task, batches: task, raising=False)
    with pytest.raises(ValueError, match="its penalty and streams and at_test would not be used"):
        shared_of(tmp_path, job, paths)


def test_a_source_without_rows_is_named(tmp_path, paths):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    with pytest.raises(
        ValueError, match=r"mean_alignment reads .* stream 'source', and there are only tar"
    ):
        trial.run(trial_of(job, shared, "mean_alignment"), shared)


# ---------------------------------------------------------------- at_test


@pytest.mark.slow
def test_statistics_are_those_of_the_test_rows(tmp_path, paths):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths, keep_bundles=True, source=(RESNET, IMAGE))
    plain, adapted = (
        weights_of(trial.run(trial_of(job, shared, name), shared))
        for name in ("full", "batch_statistics")
    )
    changed = {name for name in plain if not torch.equal(plain[name], adapted[name])}
    assert changed
    assert all(re.search(r"running_(mean|var)$|num_batches_tracked$", name) for name in changed)
    data = next(iter(shared.targets.values()))
    batch = next(iter(eval_batches(data.test, 256))).batch
    images = data.test.modality.finish(batch)["image"]
    task = bundle.build_task(RESNET, data.objective, seed=0)
    task.load_state_dict(adapted)
    first = task.backbone.model.conv1[0](images)
    norm = task.backbone.model.conv1[1]
    assert torch.allclose(norm.running_mean, first.mean((0, 2, 3)), atol=1e-5)


# ---------------------------------------------------------------- after_fanout


def soup_job(tmp_path, paths, keep: str) -> Job:
    job = job_of(tmp_path, paths, train={"steps": 3})
    backbone = bundle.build_backbone(
        Architecture("timm/test_vit", {}, {"channels": 3, "size": 32}), seed=1
    )
    bundle.save(str(tmp_path / "src"), backbone, IMAGE)
    plain = job.model_dump(mode="json")
    return Job.model_validate(
        {
            **plain,
            "sources": {"src": {"backbone": f"bundle:{tmp_path / 'src'}"}},
            "techniques": ["full", "soup"],
            "fanout": {"seeds": 2, "keep_bundles": keep},
        }
    )


def test_a_soup_is_the_mean_of_the_finished_trials(tmp_path, paths, monkeypatch):
    ran = trials_in_this_process(monkeypatch)
    job = soup_job(tmp_path, paths, "all")
    _, rows = run_through(job)
    tests = [row for row in rows if row.split == "test" and row.metric == "accuracy"]
    assert [(row.technique, row.seed) for row in tests if row.source != SCRATCH] == [
        ("full", 0),
        ("full", 1),
        ("soup", 0),
    ]
    found = {
        (row.technique, row.seed): bundle.load(row.bundle_uri).tensors
        for row in tests
        if row.source != SCRATCH
    }
    for name, tensor in found["soup", 0].items():
        mean = (found["full", 0][name] + found["full", 1][name]) / 2
        assert torch.allclose(tensor.float(), mean.float(), atol=1e-6), name
    soup = next(row for row in tests if row.technique == "soup")
    assert soup.steps == 0 and soup.params_trained == 0
    before = list(ran)
    run_through(job)
    assert list(ran) == before, "a second run makes nothing again"
    more = job.model_copy(update={"fanout": job.fanout.model_copy(update={"seeds": 3})})
    _, rows = run_through(more)
    fresh = {row.trial_id for row in rows if row.technique == "soup"}
    assert len(fresh) == 1 and soup.trial_id not in fresh, "another soup, of three"


def test_a_soup_wants_the_bundles_of_all_trials(tmp_path, paths):
    with pytest.raises(
        ValueError, match=r"targets\.task: techniques: soup .* set fanout\.keep_bundles: all"
    ):
        stages.check(soup_job(tmp_path, paths, "best"), Silent())


def test_files_of_the_plugin_are_as_many_as_its_techniques():
    folder = Path(__file__).parents[1] / "plugin" / "adaptation"
    files = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    ours = {name for name, one in registry.entries("technique").items() if not one.is_ours}
    assert files == ours == {"mean_alignment", "batch_statistics", "soup"}


# ---------------------------------------------------------------- test rows of several ranks


@pytest.mark.parametrize("others", [[], [(15, "no picture")]])
def test_unreadable_test_rows_of_all_ranks_are_held_against_the_budget(
    tmp_path, paths, monkeypatch, others
):
    """Each rank reads a part of them; one unreadable row is always allowed."""
    table = pq.read_table(paths["test"])
    pictures = table["picture"].to_pylist()
    pictures[3] = b"no picture"
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "test.parquet")
    job = job_of(tmp_path, {**paths, "test": str(tmp_path / "test.parquet")})
    data = job.targets["task"].data.model_copy(update={"decode": "train", "max_bad_rows": 0.01})
    target = job.targets["task"].model_copy(update={"data": data})
    job = job.model_copy(update={"targets": {"task": target}})
    shared = shared_of(tmp_path, job, paths)
    one = trial_of(job, shared, "full")
    task, held = trial.build_task(one, shared)[0], trial.data_of(one, shared)

    def all_gather_object(everyone, mine):
        everyone[:] = [mine, others if isinstance(mine, list) else {}]

    monkeypatch.setattr(trial.evaluate.dist, "all_gather_object", all_gather_object)
    arguments = (task, one.technique_object, held, target.train, Ranks(0, 2), False)
    if others:
        with pytest.raises(TooManyBadRowsError, match="2 of 20"):
            trial.predict_test(*arguments)
        return
    found = trial.predict_test(*arguments)[1]
    assert found["row"].tolist() == [row for row in range(10) if row != 3]
