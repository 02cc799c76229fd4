"""The source stage: its key, what is fitted, how text and checkpoints are brought in, and a whole pretraining on one rank in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import image_files, label_state, sentences, task_of

from pipeline import bundle, storage
from pipeline.bundle import BundleError
from pipeline.data.stream import DataWorkers, TooManyBadRowsError
from pipeline.job import Job
from pipeline.train import pretrain, source
from pipeline.train.loop import Ranks

SMALL_BERT = {"transformers/bert": {"layers": 1, "hidden": 16, "heads": 2, "dropout": 0.0}}


def write_texts(path: Path, texts: list, labels: list) -> str:
    pq.write_table(pa.table({"words": pa.array(texts, pa.binary() if any(isinstance(t, bytes) for t in texts) else pa.string()), "kind": labels}), path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_files(tmp_path_factory.mktemp("images"), {"train": 60, "validation": 24})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    found, labels = sentences(120, seed=3)
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.parquet", found, [f"kind {i}" for i in labels])


def image_job(folder, images, name="src", **more) -> Job:
    columns = {"image": "picture", "label": "class"}
    spec = {"data": {**images, "modality": {"image": {"size": 32, "flip": False}}, "columns": columns, "decode": "train"},
            "backbone": "timm/test_resnet", "objective": "classification", "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3}}
    return Job.model_validate({"name": "toy", "storage": str(folder / "runs"), "sources": {name: {**spec, **more}}})


def text_job(folder, uri, objective="classification", **data) -> Job:
    columns = {"text": "words", "label": "kind"} if objective == "classification" else {"text": "words"}
    return Job.model_validate({"name": "toy", "storage": str(folder / "runs"), "sources": {"src": {
        "data": {"uri": uri, "modality": {"text": {"length": 24, "vocabulary": 300}}, "columns": columns, "decode": "train",
                 "validation_fraction": 0.2, **data},
        "backbone": SMALL_BERT, "objective": objective, "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3}}}})


def pretrained(job: Job, name="src"):
    """The stage run to its bundle on one rank, and its facts."""
    stage = source.stage(job, name)
    fitted = source.fit(stage)
    work = pretrain.rank_job(stage, fitted, DataWorkers(), 1)
    return stage, fitted, pretrain.train_rank(work, Ranks(), held=pretrain.decoded(work))


# ---------------------------------------------------------------- keys

def key(job: Job, name="src") -> str:
    return source.stage(job, name).key


def test_a_key_follows_the_name_since_the_seed_does(tmp_path, images):
    assert key(image_job(tmp_path, images, "a"), "a") != key(image_job(tmp_path, images, "b"), "b")


def test_a_key_does_not_follow_workers_until_they_change_the_order_of_rows(tmp_path, images):
    plain = key(image_job(tmp_path, images))
    assert plain == key(image_job(tmp_path, images, workers=8)) == key(image_job(tmp_path, images, workers=[2, 8]))
    assert plain != key(image_job(tmp_path, images, workers=12)), "16 ranks need more canonical shards than 8: another order"


def test_a_key_follows_what_a_checkpoint_holds_and_not_where_it_lies(tmp_path, images):
    def saved(path: Path, seed: int) -> str:
        bundle.save(str(path), task_of("timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state(), seed=seed), MODALITY)
        return f"bundle:{path}"

    first = key(image_job(tmp_path, images, init=saved(tmp_path / "a", 1)))
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b/a")
    assert key(image_job(tmp_path, images, init=f"bundle:{tmp_path / 'b/a'}")) == first
    assert key(image_job(tmp_path, images, init=saved(tmp_path / "b/a", 2))) != first


MODALITY = {"name": "image", "options": {"size": 32, "channels": 3}, "state": {"mean": [0.5] * 3, "std": [0.2] * 3}}


# ---------------------------------------------------------------- checkpoints

@pytest.fixture
def checkpoint(tmp_path):
    task = task_of("timm/test_resnet", {"channels": 3, "size": 32}, "classification", {"values": [f"class {i}" for i in range(3)],
                                                                                    "labels": [f"class {i}" for i in range(3)]}, seed=5)
    bundle.save(str(tmp_path / "start"), task, MODALITY)
    return f"bundle:{tmp_path / 'start'}", task


def test_ranks_start_from_the_checkpoint_that_was_read_once(tmp_path, images, checkpoint):
    uri, task = checkpoint
    stage = source.stage(image_job(tmp_path, images, init=uri), "src")
    fitted = source.fit(stage)
    start = bundle.load(fitted.initial)
    assert all(torch.equal(t, start.tensors[n]) for n, t in task.state_dict().items())
    assert "0 dropped; head kept: the same labels" in fitted.moved
    storage.remove_tree(uri.partition(":")[2])  # ranks and restarts do not read it again
    again = source.fit(stage)
    assert again.initial == fitted.initial and again.moved == fitted.moved and again.arch == fitted.arch
    facts = pretrain.train_rank(pretrain.rank_job(stage, again, DataWorkers(), 1), Ranks())
    assert facts["transfer"] == fitted.moved and not storage.exists(fitted.initial), "the bundle stands in its place"


def test_another_backbone_than_the_checkpoint_holds_is_refused(tmp_path, images, checkpoint):
    stage = source.stage(image_job(tmp_path, images, init=checkpoint[0], backbone="timm/test_vit"), "src")
    with pytest.raises(BundleError, match=r"holds a timm/test_resnet, the job says timm/test_vit: name the same backbone"):
        source.fit(stage)


def test_options_that_the_checkpoint_does_not_fix_are_the_jobs(tmp_path, images, checkpoint):
    stage = source.stage(image_job(tmp_path, images, init=checkpoint[0], backbone={"timm/test_resnet": {"drop_rate": 0.25}}), "src")
    fitted = source.fit(stage)
    assert fitted.arch["options"]["drop_rate"] == 0.25
    assert fitted.modality["options"]["flip"] is False, "the job's own, which the checkpoint says nothing of"
    assert fitted.modality["state"] == MODALITY["state"], "the checkpoint's"


# ---------------------------------------------------------------- text

def test_labelled_text_is_tokenised_once_and_trains(tmp_path, texts):
    stage, fitted, facts = pretrained(text_job(tmp_path, texts))
    assert fitted.columns == {"tokens": "tokens", "label": "kind"}
    shards = sorted(Path(stage.uri, "tokens").rglob("*.parquet"))
    assert len(shards) == 2 and "tokenised into" in fitted.text
    table = pq.read_table(shards[0])
    assert table.schema.names == ["kind", "tokens"] or set(table.schema.names) == {"kind", "tokens"}
    before = [path.stat().st_mtime_ns for path in shards]
    source.fit(source.stage(text_job(tmp_path, texts), "src"))
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert facts["steps"] == 6 and 0 <= facts["metrics"]["accuracy"] <= 1


def test_text_that_cannot_be_read_is_counted_listed_and_held_against_the_budget(tmp_path):
    found, labels = sentences(100, seed=3)
    broken = [t.encode() if i not in (7, 31, 58) else b"\xff\xfe broken" for i, t in enumerate(found)]
    broken[12] = b""
    uri = write_texts(tmp_path / "broken.parquet", broken, [f"kind {i}" for i in labels])
    with pytest.raises(TooManyBadRowsError, match=r"cannot be decoded, more than data\.max_bad_rows=0\.01"):
        pretrained(text_job(tmp_path, uri, "mlm"))
    stage, fitted, facts = pretrained(text_job(tmp_path, uri, "mlm", max_bad_rows=0.05))
    listed = [json.loads(line) for line in Path(stage.uri, "log/quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in listed) == [7, 12, 31, 58] and facts["bad_rows"] == 4
    assert {row["reason"] for row in listed if row["row"] == 12} == {source.EMPTY}
    assert all("not UTF-8" in row["reason"] and "broken.parquet row" in row["place"] for row in listed if row["row"] != 12)
    assert "4 rows left out" in fitted.text


# ---------------------------------------------------------------- images that cannot be decoded

@pytest.mark.parametrize("decode", ["train", "memory"])
def test_bad_images_are_listed_once_and_counted(tmp_path, images, decode):
    table = pq.read_table(images["train"])
    pictures = table["picture"].to_pylist()
    for i in (3, 40):
        pictures[i] = pictures[i][:40]
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "train.parquet")
    job = image_job(tmp_path, {**images, "train": str(tmp_path / "train.parquet")}, train={"steps": 12, "global_batch": 12, "checkpoint_every_steps": 5})
    job = job.model_copy(update={"sources": {"src": job.sources["src"].model_copy(update={
        "data": job.sources["src"].data.model_copy(update={"decode": decode, "max_bad_rows": 0.05})})}})
    stage, _, facts = pretrained(job)
    listed = [json.loads(line) for line in Path(stage.uri, "log/quarantine.jsonl").read_text().splitlines()]
    assert sorted((row["split"], row["row"]) for row in listed) == [("train", 3), ("train", 40)], "two epochs, each row once"
    assert facts["bad_rows"] == 2


def test_decoding_in_memory_or_as_rows_come_gives_the_same_weights(tmp_path, images):
    """Also where rows are bad: they keep their places in the plan."""
    table = pq.read_table(images["train"])
    pictures = table["picture"].to_pylist()
    pictures[11] = b"no picture"
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "train.parquet")
    found = {}
    for decode in ("train", "memory"):
        job = image_job(tmp_path / decode, {**images, "train": str(tmp_path / "train.parquet")})
        data = job.sources["src"].data.model_copy(update={"decode": decode, "max_bad_rows": 0.05})
        job = job.model_copy(update={"sources": {"src": job.sources["src"].model_copy(update={"data": data})}})
        stage, _, _ = pretrained(job)
        found[decode] = bundle.load(stage.bundle_uri).tensors
    assert all(torch.equal(t, found["memory"][n]) for n, t in found["train"].items())


def test_a_source_of_bad_images_stops_with_their_places(tmp_path, images):
    table = pq.read_table(images["train"])
    pictures = [p if i % 3 else b"no picture" for i, p in enumerate(table["picture"].to_pylist())]
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "train.parquet")
    with pytest.raises(TooManyBadRowsError, match=r"of 60 rows cannot be decoded.*train\.parquet row 0: "):
        pretrained(image_job(tmp_path, {**images, "train": str(tmp_path / "train.parquet")}, train={"epochs": 2, "global_batch": 12, "log_every_steps": 1}))


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bundle(tmp_path, images):
    train = {"steps": 9, "global_batch": 12, "checkpoint_every_steps": 4, "eval_every_steps": 3}
    stage, _, _ = pretrained(image_job(tmp_path / "whole", images, train=train))
    whole = bundle.load(stage.bundle_uri).tensors
    job = image_job(tmp_path / "cut", images, train=train)
    cut = source.stage(job, "src")
    work = pretrain.rank_job(cut, source.fit(cut), DataWorkers(), 1)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] >= 6:
            raise StopError

    with pytest.raises(StopError):
        pretrain.train_rank(work, Ranks(), stop)
    assert not bundle.exists(cut.bundle_uri)
    facts = pretrain.train_rank(work, Ranks())
    assert facts["resumed_from"] == 4
    assert all(torch.equal(t, whole[n]) for n, t in bundle.load(cut.bundle_uri).tensors.items())
    steps = [json.loads(line)["step"] for line in Path(cut.uri, "log/metrics.jsonl").read_text().splitlines()]
    assert steps == [3, 6, 9, 9], "validations at 3, 6 and 9 and the log line of the end: what came after step 4 was written once"
