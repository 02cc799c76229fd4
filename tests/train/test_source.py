"""The source stage: its key, what is fitted, how text and checkpoints are brought in, and a whole
pretraining on one rank in this process.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from safetensors.torch import save, save_file
from toys import image_files, label_state, sentences, task_of, text_modality

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.checkpoints.pretrained import PretrainedCheckpoint
from pipeline.config import registry
from pipeline.config.schema import ComponentConfig, Job, Train
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data import manifests
from pipeline.data.stream import DataWorkers, Rows, TooManyBadRowsError
from pipeline.io import storage
from pipeline.io.file_identity import ChangedFileError
from pipeline.train import pretrain, source, token_rows
from pipeline.train.ranks import Ranks
from pipeline.transfer import grid, targets

SMALL_BERT = {"transformers/bert": {"layers": 1, "hidden": 16, "heads": 2, "dropout": 0.0}}


def write_texts(path: Path, texts: list, labels: list) -> str:
    kind = pa.binary() if any(isinstance(text, bytes) for text in texts) else pa.string()
    pq.write_table(pa.table({"words": pa.array(texts, kind), "kind": labels}), path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_files(tmp_path_factory.mktemp("images"), {"train": 60, "validation": 24})


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    found, labels = sentences(120, seed=3)
    return write_texts(
        tmp_path_factory.mktemp("texts") / "texts.parquet", found, [f"kind {i}" for i in labels]
    )


def image_job(folder, images, name="src", **more) -> Job:
    columns = {"image": "picture", "label": "class"}
    spec = {
        "data": {
            "modality": {"image": {"size": 32, "flip": False}},
            "columns": columns,
            "decode": "train",
            **images,
        },
        "backbone": "timm/test_resnet",
        "objective": "classification",
        "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3},
    }
    return Job.model_validate(
        {"name": "toy", "storage": str(folder / "runs"), "sources": {name: {**spec, **more}}}
    )


def text_job(folder, uri, objective="classification", **data) -> Job:
    columns = (
        {"text": "words", "label": "kind"} if objective == "classification" else {"text": "words"}
    )
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {
                "src": {
                    "data": {
                        "uri": uri,
                        "modality": {"text": {"length": 24, "vocabulary": 300}},
                        "columns": columns,
                        "decode": "train",
                        "validation_fraction": 0.2,
                        **data,
                    },
                    "backbone": SMALL_BERT,
                    "objective": objective,
                    "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3},
                }
            },
        }
    )


def changed_source(job: Job, data: dict | None = None, **fields) -> Job:
    """The job with other fields of its source, and of the source's data."""
    spec = job.sources["src"]
    if data:
        assert spec.data is not None
        fields["data"] = spec.data.model_copy(update=data)
    return job.model_copy(update={"sources": {"src": spec.model_copy(update=fields)}})


def with_bad_pictures(path: str, out: Path, rows: Iterable[int]) -> str:
    """Write the images of a file again, some of which cannot be decoded."""
    table = pq.read_table(path)
    pictures = table["picture"].to_pylist()
    for row in rows:
        pictures[row] = b"no picture"
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), out)
    return str(out)


def lines_of(stage, name: str) -> list[dict]:
    """The records of a file of JSON lines in a source's folder."""
    return [json.loads(line) for line in Path(stage.uri, name).read_text().splitlines()]


def pretrained(job: Job, name="src"):
    """The stage run to its bundle on one rank, and its facts."""
    stage = source.plan_source(job, name)
    fitted = source.prepare_source(stage)
    work = pretrain.rank_job(stage, fitted, DataWorkers(), 1)
    return (
        stage,
        fitted,
        pretrain.train_rank(work, Ranks(), decoded_rows=pretrain.decode_once(work)),
    )


# ---------------------------------------------------------------- keys


def key(job: Job, name="src") -> str:
    return source.plan_source(job, name).key


def test_a_key_follows_the_name_since_the_seed_does(tmp_path, images):
    assert key(image_job(tmp_path, images, "a"), "a") != key(image_job(tmp_path, images, "b"), "b")


@pytest.mark.parametrize(("objective", "is_told"), [("simclr", True), ("classification", False)])
def test_augmentation_that_views_do_not_read_is_reported(tmp_path, images, objective, is_told):
    job = image_job(tmp_path, images, objective=objective)
    data = job.sources["src"].data
    assert data is not None
    data.modality.options.update(crop="resized", colour=0.8)
    stage = source.plan_source(job, "src")
    modality = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.5] * 3})
    texts = [finding.text for finding in source.findings_of(stage, modality, "")]
    message = "makes its own random views of a row, so crop, colour of data.modality only augment"
    assert any(message in text for text in texts) == is_told


def test_a_source_without_a_drawn_validation_row_is_warned_of(tmp_path, images):
    stage = source.plan_source(image_job(tmp_path, images), "src")
    assert stage.splits is not None
    rows = stage.splits.validation
    none = rows.keep(np.zeros(len(rows), dtype=bool))
    reasons = {"validation": "the rows have 1 value of recording"}
    splits = dataclasses.replace(stage.splits, validation=none, empty_draws=reasons)
    modality = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.5] * 3})
    found = source.findings_of(dataclasses.replace(stage, splits=splits), modality, "")
    warned = [finding for finding in found if reasons["validation"] in finding.text]
    assert len(warned) == 1 and warned[0].is_warning


def test_a_key_does_not_follow_workers_until_they_change_the_order_of_rows(tmp_path, images):
    plain = key(image_job(tmp_path, images))
    assert (
        plain
        == key(image_job(tmp_path, images, workers=8))
        == key(image_job(tmp_path, images, workers=[2, 8]))
    )
    assert plain != key(image_job(tmp_path, images, workers=12)), (
        "16 ranks need more canonical shards than 8: another order"
    )


def test_a_run_that_may_skip_more_steps_goes_on_where_it_stopped(tmp_path, images):
    train = {"steps": 6, "global_batch": 12}
    plain = image_job(tmp_path, images, train=train)
    patient = image_job(tmp_path, images, train={**train, "max_bad_steps": 50})
    assert key(plain) == key(patient)


def test_more_ranks_than_shards_are_refused_before_rows_are_costed(tmp_path, images):
    stage = source.plan_source(image_job(tmp_path, images), "src")

    def with_workers(workers: int):
        train = Train(batch_cost=2.0, canonical_shards=2)
        return dataclasses.replace(
            stage, spec=stage.spec.model_copy(update={"train": train, "workers": workers})
        )

    source.check_plan(with_workers(2), (60,))
    with pytest.raises(ValueError, match="4 ranks are more than the 2 canonical shards") as error:
        source.check_plan(with_workers(4), (60,))
    assert "global_batch" not in str(error.value)


def test_a_key_follows_what_a_checkpoint_holds_and_not_where_it_lies(tmp_path, images):
    def saved(path: Path, seed: int) -> str:
        bundle.save(
            str(path),
            task_of(
                "timm/test_resnet",
                {"channels": 3, "size": 32},
                "classification",
                label_state(),
                seed=seed,
            ),
            MODALITY,
        )
        return f"bundle:{path}"

    first = key(image_job(tmp_path, images, init=saved(tmp_path / "a", 1)))
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b/a")
    assert key(image_job(tmp_path, images, init=f"bundle:{tmp_path / 'b/a'}")) == first
    assert key(image_job(tmp_path, images, init=saved(tmp_path / "b/a", 2))) != first


# ---------------------------------------------------------------- files that change


def named_images(folder: Path, count: int = 36) -> dict[str, str]:
    """A table whose rows name image files."""
    table = pq.read_table(image_files(folder, {"held": count})["held"])
    paths = []
    for i, data in enumerate(table["picture"].to_pylist()):
        paths.append(str(folder / f"{i}.png"))
        Path(paths[-1]).write_bytes(data)
    pq.write_table(pa.table({"picture": paths, "class": table["class"]}), folder / "train.parquet")
    return {"train": str(folder / "train.parquet"), "first": paths[0]}


def test_a_key_follows_the_files_that_rows_name(tmp_path):
    made = named_images(tmp_path)
    job = image_job(tmp_path, {"train": made["train"]})
    first = key(job)
    assert key(job) == first
    Path(made["first"]).write_bytes(Path(tmp_path / "5.png").read_bytes())
    assert key(job) != first


def test_a_file_that_changes_in_training_leaves_no_bundle(tmp_path, monkeypatch):
    made = named_images(tmp_path)
    stage = source.plan_source(
        image_job(tmp_path, {"train": made["train"], "validation_fraction": 0.2}), "src"
    )
    work = pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)
    real = pretrain.loop.fit

    def fit(run):
        out = real(run)
        Path(made["first"]).write_bytes(Path(tmp_path / "5.png").read_bytes())
        return out

    monkeypatch.setattr(pretrain.loop, "fit", fit)
    with pytest.raises(ChangedFileError, match=f"^{made['first']} was changed"):
        pretrain.train_rank(work, Ranks())
    assert not stage.done
    monkeypatch.undo()
    again = source.plan_source(stage.job, "src")
    assert again.key != stage.key
    pretrain.train_rank(
        pretrain.rank_job(again, source.prepare_source(again), DataWorkers(), 1), Ranks()
    )
    assert again.done


def test_a_table_that_changes_in_training_is_an_error(tmp_path, images):
    train = tmp_path / "train.parquet"
    train.write_bytes(Path(images["train"]).read_bytes())
    stage = source.plan_source(
        image_job(tmp_path, {"train": str(train), "validation": images["validation"]}), "src"
    )
    work = pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)
    table = pq.read_table(train)
    pq.write_table(table.take(np.arange(len(table))[::-1]), train)
    with pytest.raises(ChangedFileError, match=f"^{train} was changed"):
        pretrain.train_rank(work, Ranks())
    assert not stage.done


def test_a_checkpoint_that_changes_before_it_is_read_is_an_error(tmp_path, images, checkpoint):
    stage = source.plan_source(image_job(tmp_path, images, init=checkpoint[0]), "src")
    storage.remove_tree(str(tmp_path / "start"))
    bundle.save(
        str(tmp_path / "start"),
        task_of(
            "timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state(), seed=9
        ),
        MODALITY,
    )
    with pytest.raises(ChangedFileError, match=r"^sources.src: bundle:.* was changed"):
        source.prepare_source(stage)


def test_a_checkpoint_that_changes_while_it_is_read_leaves_no_bundle(tmp_path, images, monkeypatch):
    """Its file is mapped into memory, and the values are read where they are copied."""
    file = tmp_path / "start.safetensors"
    arch = Architecture("timm/test_resnet", {}, {"channels": 3, "size": 32})
    values = bundle.build_backbone(arch).state_dict()
    values = {name.removeprefix("model."): tensor for name, tensor in values.items()}
    load_into = PretrainedCheckpoint.load_into

    def written_over(start, backbone):
        file.write_bytes(save({name: tensor + 1 for name, tensor in values.items()}))
        return load_into(start, backbone)

    save_file(values, file)
    stage = source.plan_source(image_job(tmp_path, images, init=f"file:{file}"), "src")
    monkeypatch.setattr(PretrainedCheckpoint, "load_into", written_over)
    with pytest.raises(ChangedFileError, match="was changed while it was in use"):
        source.prepare_source(stage)
    assert not bundle.exists(stage.initial_bundle_uri)


def test_how_files_are_identified_is_no_part_of_the_key_but_what_it_gives_is(tmp_path, images):
    plain = source.plan_source(image_job(tmp_path, images), "src")
    by_stat = source.plan_source(image_job(tmp_path, {**images, "identity": "stat"}), "src")
    assert (
        source.data_key(plain.spec.data) == source.data_key(by_stat.spec.data)
        and plain.key != by_stat.key
    )
    assert all("-stat:" in file.content for file in by_stat.reads)


MODALITY = ModalitySpec("image", {"size": 32, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    task = task_of(
        "timm/test_resnet",
        {"channels": 3, "size": 32},
        "classification",
        {"values": [f"class {i}" for i in range(3)], "labels": [f"class {i}" for i in range(3)]},
        seed=5,
    )
    bundle.save(str(tmp_path / "start"), task, MODALITY)
    return f"bundle:{tmp_path / 'start'}", task


def test_ranks_start_from_the_checkpoint_that_was_read_once(tmp_path, images, checkpoint):
    uri, task = checkpoint
    stage = source.plan_source(image_job(tmp_path, images, init=uri), "src")
    fitted = source.prepare_source(stage)
    start = bundle.load(fitted.initial_bundle_uri)
    assert all(torch.equal(t, start.tensors[n]) for n, t in task.state_dict().items())
    assert "0 dropped; head kept: the same labels" in fitted.transfer_note
    ranks = pretrain.rank_job(stage, fitted, DataWorkers(), 1)
    objective = pretrain.initial_task(ranks).objective
    assert objective.names_taken_over == {*objective.state_dict()}, "which `l2_sp` keeps near them"
    storage.remove_tree(uri.partition(":")[2])  # ranks and restarts do not read it again
    again = source.prepare_source(stage)
    assert (
        again.initial_bundle_uri == fitted.initial_bundle_uri
        and again.transfer_note == fitted.transfer_note
        and again.arch == fitted.arch
    )
    metadata = pretrain.train_rank(pretrain.rank_job(stage, again, DataWorkers(), 1), Ranks())
    assert metadata["transfer"] == fitted.transfer_note and not storage.exists(
        fitted.initial_bundle_uri
    ), "the bundle stands in its place"


def test_another_backbone_than_the_checkpoint_holds_is_refused(tmp_path, images, checkpoint):
    stage = source.plan_source(
        image_job(tmp_path, images, init=checkpoint[0], backbone="timm/test_vit"), "src"
    )
    with pytest.raises(
        BundleError,
        match=r"holds a timm/test_resnet, the job says timm/test_vit: name the same backbone",
    ):
        source.prepare_source(stage)


def test_options_that_the_checkpoint_does_not_fix_are_the_jobs(tmp_path, images, checkpoint):
    stage = source.plan_source(
        image_job(
            tmp_path, images, init=checkpoint[0], backbone={"timm/test_resnet": {"drop_rate": 0.25}}
        ),
        "src",
    )
    fitted = source.prepare_source(stage)
    assert fitted.arch.options["drop_rate"] == 0.25
    assert fitted.modality.options["flip"] is False, (
        "the job's own, which the checkpoint says nothing of"
    )
    assert fitted.modality.state == MODALITY.state, "the checkpoint's"


# ---------------------------------------------------------------- text


def test_labelled_text_is_tokenised_once_and_trains(tmp_path, texts):
    stage, fitted, metadata = pretrained(text_job(tmp_path, texts))
    assert fitted.columns == {"tokens": "tokens", "label": "kind"}
    shards = sorted(Path(stage.uri, "tokens").rglob("*.parquet"))
    assert len(shards) == 2 and "tokenised into" in fitted.description
    table = pq.read_table(shards[0])
    assert table.schema.names == ["kind", "tokens"] or set(table.schema.names) == {"kind", "tokens"}
    before = [path.stat().st_mtime_ns for path in shards]
    source.prepare_source(source.plan_source(text_job(tmp_path, texts), "src"))
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert metadata["steps"] == 6 and 0 <= metadata["metrics"]["accuracy"] <= 1
    saved = bundle.load(stage.bundle_uri).manifest.columns
    assert saved == {"text": "words", "label": "kind"}, "those of the rows, not of the tokens"


def test_parts_of_another_packing_are_no_rows_and_the_budget_is_that_of_now(tmp_path, texts):
    stage = source.plan_source(
        text_job(
            tmp_path,
            write_texts(
                tmp_path / "bad.parquet", [b"some words", b"\xff", b"more"] * 20, ["a"] * 60
            ),
            "mlm",
            max_bad_rows=1.0,
        ),
        "src",
    )
    fitted = source.prepare_source(stage)
    folder = Path(stage.uri, "tokens", "train")
    # On S3 a killed packing may leave one
    Path(folder, "part-00009.parquet").write_bytes(Path(folder, "part-00000.parquet").read_bytes())
    assert len(source.prepare_source(stage).train) == len(fitted.train)
    strict = source.plan_source(
        text_job(tmp_path, str(tmp_path / "bad.parquet"), "mlm", max_bad_rows=0.01), "src"
    )
    assert strict.key == stage.key
    with pytest.raises(TooManyBadRowsError, match=r"max_bad_rows=0\.01"):
        source.prepare_source(strict)


@pytest.mark.parametrize(("length", "fits"), [(16, True), (24, True), (32, False)])
def test_a_source_goes_on_from_a_bundle_with_rows_of_another_length(tmp_path, texts, length, fits):
    first, *_ = pretrained(text_job(tmp_path / "first", texts, "mlm"))
    job = text_job(tmp_path, texts, "mlm", modality={"text": {"length": length}})
    job = changed_source(job, backbone=ComponentConfig(name=f"bundle:{first.bundle_uri}"))
    if not fits:
        with pytest.raises(ValueError, match="32 tokens are longer than the 24 positions"):
            pretrained(job)
        return
    stage, fitted, metadata = pretrained(job)
    held = bundle.load(stage.bundle_uri)
    assert (
        held.tensors["backbone.model.embeddings.position_embeddings.weight"].shape[0] == 24
        and "tensors kept, 0 new" in metadata["transfer"]
    )
    assert held.modality().inputs()["length"] == length
    assert (fitted.arch == bundle.load(first.bundle_uri).manifest.arch) == (length == 24), (
        "the same network is one base"
    )


def test_text_that_cannot_be_read_is_counted_listed_and_held_against_the_budget(tmp_path):
    found, labels = sentences(100, seed=3)
    broken = [
        t.encode() if i not in (7, 31, 58) else b"\xff\xfe broken" for i, t in enumerate(found)
    ]
    broken[12] = b""
    uri = write_texts(tmp_path / "broken.parquet", broken, [f"kind {i}" for i in labels])
    with pytest.raises(TooManyBadRowsError, match=r"max_bad_rows=0\.01"):
        pretrained(text_job(tmp_path, uri, "mlm"))
    stage, fitted, metadata = pretrained(text_job(tmp_path, uri, "mlm", max_bad_rows=0.05))
    listed = lines_of(stage, "log/quarantine.jsonl")
    assert sorted(row["row"] for row in listed) == [7, 12, 31, 58] and metadata["bad_rows"] == 4
    assert {row["reason"] for row in listed if row["row"] == 12} == {token_rows.EMPTY}
    assert all(
        "not UTF-8" in row["reason"] and "broken.parquet row" in row["place"]
        for row in listed
        if row["row"] != 12
    )
    assert "4 rows left out" in fitted.description


def test_pairs_stay_as_they_are_and_keep_their_second_text(tmp_path, texts):
    table = pq.read_table(texts)
    pq.write_table(table.append_column("other", table["words"]), tmp_path / "pairs.parquet")
    job = text_job(
        tmp_path,
        str(tmp_path / "pairs.parquet"),
        columns={"text": "words", "text_pair": "other", "label": "kind"},
    )
    stage, fitted, metadata = pretrained(job)
    assert (
        fitted.columns == {"text": "words", "text_pair": "other", "label": "kind"}
        and not Path(stage.uri, "tokens").exists()
    )
    assert metadata["steps"] == 6 and "tokenised" not in fitted.description
    assert bundle.load(stage.bundle_uri).manifest.columns == fitted.columns


def test_a_packed_source_has_one_text_and_rows_that_can_be_packed(tmp_path, texts, images):
    with pytest.raises(
        ValueError, match=r"sources\.src\.data\.columns\.text_pair: mlm reads one text a row"
    ):
        source.plan_source(
            text_job(tmp_path, texts, "mlm", columns={"text": "words", "text_pair": "kind"}), "src"
        )
    with pytest.raises(
        ValueError,
        match=r"sources\.src\.objective: clm reads packed documents, and image rows cannot be "
        r"packed: it is for text",
    ):
        source.plan_source(image_job(tmp_path, images, objective="clm"), "src")


# ---------------------------------------------------------------- tokenizers of other hands


@pytest.fixture
def tokenizer(tmp_path):
    """A folder of a tokenizer, as transformers writes it."""
    text = Path(tmp_path, "tokenizer", "tokenizer.json")
    text.parent.mkdir()
    text.write_text(text_modality().state["tokenizer"])
    return text.parent


def tokenizer_job(folder: Path, uri: str, held: Path, **target) -> Job:
    job = text_job(
        folder, uri, modality={"text": {"length": 24, "tokenizer": str(held)}}
    ).model_dump(mode="json")
    data = {
        "uri": uri,
        "modality": {"text": target},
        "columns": {"text": "words", "label": "kind"},
        "test_fraction": 0.2,
    }
    return Job.model_validate(
        {
            **job,
            "targets": {
                "task": {
                    "data": data,
                    "objective": "classification",
                    "train": {"steps": 2, "global_batch": 8},
                }
            },
        }
    )


def test_a_tokenizer_counts_by_what_it_holds_and_not_by_its_place(tmp_path, texts, tokenizer):
    job = tokenizer_job(tmp_path, texts, tokenizer)
    stage, fitted, metadata = pretrained(job)
    assert (
        fitted.modality.state["tokenizer"] == text_modality().state["tokenizer"]
        and metadata["steps"] == 6
    )
    assert str(tmp_path) not in json.dumps(fitted.modality.to_json()), (
        "no place of this machine travels"
    )
    moved = tokenizer.rename(tmp_path / "elsewhere")
    assert key(tokenizer_job(tmp_path, texts, moved)) == stage.key
    (base,) = grid.backbone_groups({"src": (fitted.arch, fitted.modality)})
    same = tokenizer_job(tmp_path, texts, moved, tokenizer=str(moved))
    assert targets.prepare(targets.plan_target(same, "task"), base).modality == fitted.modality, (
        "the same tokenizer named once more"
    )
    Path(moved, "special_tokens_map.json").write_text('{"mask_token": "[MASK]"}')
    assert key(tokenizer_job(tmp_path, texts, moved)) != stage.key, (
        "which tokens are special is part of it"
    )
    with pytest.raises(ValueError, match=r"contradicts the source"):
        targets.prepare(targets.plan_target(same, "task"), base)
    Path(moved, "tokenizer.json").unlink()
    with pytest.raises(storage.StorageError, match=r"tokenizer\.json"):
        key(tokenizer_job(tmp_path, texts, moved))


def test_a_checkpoint_brings_its_own_tokenizer(tmp_path, texts, tokenizer):
    stage, *_ = pretrained(text_job(tmp_path / "first", texts))
    job = text_job(tmp_path, texts, modality={"text": {"tokenizer": str(tokenizer)}})
    job = changed_source(job, init=f"bundle:{stage.bundle_uri}")
    with pytest.raises(
        ValueError, match=r"sources\.src\.data\.modality: .*tokenizer.* contradicts bundle:"
    ):
        source.prepare_source(source.plan_source(job, "src"))


# ---------------------------------------------------------------- weighted corpora


def corpora(folder: Path, sizes=(70, 30, 20)) -> list[str]:
    """Files whose texts each have a word of their own corpus; one text of the second cannot be
    read.
    """
    folder.mkdir(exist_ok=True)
    words, out = ("alpha", "beta", "gamma"), []
    for i, (word, size) in enumerate(zip(words, sizes, strict=True)):
        found, labels = sentences(size, seed=i)
        texts = [" ".join(f"{word} {part}" for part in text.split()).encode() for text in found]
        if i == 1:
            texts[3] = b"\xff broken"
        out.append(write_texts(folder / f"{word}.parquet", texts, [f"kind {i}" for i in labels]))
    return out


def mixed_job(
    folder: Path, files: list[str], weights=(0.5, 0.2, 0.3), objective="mlm", **train
) -> Job:
    job = text_job(
        folder, files[0], objective, validation_fraction=0.1, max_bad_rows=0.05
    ).model_dump(mode="json")
    data = job["sources"]["src"]["data"]
    data |= {
        "weight": weights[0],
        "more": [
            {"uri": uri, "modality": "text", "weight": weight, "validation_fraction": 0.1}
            for uri, weight in zip(files[1:], weights[1:], strict=True)
        ],
    }
    job["sources"]["src"]["train"] |= train
    return Job.model_validate(job)


def drawn(stage) -> list[list[int]]:
    by_step = {line["step"]: line["rows"] for line in lines_of(stage, "rows-rank0.jsonl")}
    return [rows for _, rows in sorted(by_step.items())]


@pytest.mark.parametrize("objective", ["mlm", "classification"])
def test_corpora_are_drawn_by_their_weights_and_no_row_holds_two_of_them(tmp_path, objective):
    job = mixed_job(
        tmp_path,
        corpora(tmp_path / "texts"),
        objective=objective,
        steps=40,
        global_batch=20,
        trace_rows=True,
    )
    stage, fitted, metadata = pretrained(job)
    assert (
        stage.splits is not None
        and len(fitted.corpus_sizes) == 3
        and sum(fitted.corpus_sizes) == len(fitted.train)
    )
    assert sum(stage.splits.corpus_sizes) == len(stage.splits.train)
    if objective == "classification":
        assert fitted.corpus_sizes == (
            stage.splits.corpus_sizes[0],
            stage.splits.corpus_sizes[1] - 1,
            stage.splits.corpus_sizes[2],
        ), "a row less, in its own corpus"
    modality = bundle.build_modality(fitted.modality)
    ends = np.cumsum(fitted.corpus_sizes)
    corpus_of = np.searchsorted(ends, np.arange(len(fitted.train)), side="right")
    tokens = manifests.read_columns(fitted.train, ["tokens"])["tokens"].to_pylist()
    own = [
        {word for word in ("alpha", "beta", "gamma") if word in modality.tokenizer.decode(row)}
        for row in tokens
    ]  # type: ignore[attr-defined]
    assert own == [{("alpha", "beta", "gamma")[c]} for c in corpus_of]
    rows = np.array(drawn(stage))
    assert rows.shape == (40, 20)
    assert (
        np.abs(
            np.bincount(corpus_of[rows.ravel()], minlength=3) / rows.size - (0.5, 0.2, 0.3)
        ).max()
        < 0.02
    )
    message = ", ".join(
        f"{w} from corpus {i} ({n} rows)"
        for i, (w, n) in enumerate(zip((0.5, 0.2, 0.3), fitted.corpus_sizes, strict=True), 1)
    )
    assert (
        f"drawn by weight, as shares of the training rows: {message}; validation is unweighted"
        in metadata["splits"]
    )
    for c in range(
        3
        # at any moment the rows of a corpus were drawn equally often, but for its newest epoch and
        # what shards are ahead
    ):
        counts = np.bincount(rows.ravel(), minlength=len(corpus_of))[corpus_of == c]
        assert counts.max() - counts.min() <= 2


def stopped_and_gone_on(stage):
    """Stopped after step 6, which leaves no bundle, and run again: the facts of the second run."""
    work = pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] >= 6:
            raise StopError

    with pytest.raises(StopError):
        pretrain.train_rank(work, Ranks(), stop)
    assert not bundle.exists(stage.bundle_uri)
    return pretrain.train_rank(work, Ranks())


def test_a_run_on_a_mixture_that_was_stopped_ends_with_the_same_bundle_and_rows(tmp_path):
    files = corpora(tmp_path / "texts")
    train = {"steps": 12, "checkpoint_every_steps": 4, "trace_rows": True}
    whole, _, _ = pretrained(mixed_job(tmp_path / "whole", files, **train))
    cut = source.plan_source(mixed_job(tmp_path / "cut", files, **train), "src")
    metadata = stopped_and_gone_on(cut)
    assert metadata["resumed_from"] == 4 and drawn(cut) == drawn(whole)
    one, other = (bundle.load(stage.bundle_uri).tensors for stage in (whole, cut))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_weights_are_part_of_the_key_and_must_be_drawable(tmp_path):
    files = corpora(tmp_path / "texts")
    first = key(mixed_job(tmp_path, files))
    assert first != key(mixed_job(tmp_path, files, weights=(0.5, 0.3, 0.2))) and first != key(
        mixed_job(tmp_path, files, weights=(None, None, None))
    )
    with pytest.raises(
        ValueError,
        match=r"sources\.src: the weight 1e-06 of corpus 3 .* 1 of 4096",
    ):
        source.plan_source(
            mixed_job(tmp_path, files, weights=(0.5, 0.5, 1e-6), objective="classification"), "src"
        )
    job = mixed_job(tmp_path, files).model_dump(mode="json")
    job["sources"]["src"]["data"]["more"][1]["where"] = {"kind": ["no such kind"]}
    with pytest.raises(
        ValueError,
        match=r"sources\.src\.data\.more\.1\.where: no row of \S+ has the value asked for in "
        r"column kind; it holds kind 0",
    ):
        source.plan_source(Job.model_validate(job), "src")


@pytest.mark.parametrize("decode", ["train", "memory"])
def test_bad_rows_leave_the_corpora_of_images_where_they_are(tmp_path, images, decode):
    more = with_bad_pictures(images["validation"], tmp_path / "more.parquet", [2])
    job = image_job(
        tmp_path, images, train={"steps": 12, "global_batch": 12, "trace_rows": True}
    ).model_dump(mode="json")
    job["sources"]["src"]["data"] |= {
        "weight": 1.0,
        "decode": decode,
        "max_bad_rows": 0.1,
        "more": [
            {
                "train": more,
                "modality": "image",
                "weight": 2.0,
                "validation_fraction": 0.0,
            }
        ],
    }
    stage, fitted, _ = pretrained(Job.model_validate(job))
    assert fitted.corpus_sizes == (60, 24)
    rows = np.concatenate(drawn(stage))
    assert (rows == 62).sum() == 0 and abs((rows >= 60).mean() - 2 / 3) < 0.05


def test_transcripts_that_no_recording_holds_are_known_before_training_whatever_cuts_the_batches(
    tmp_path,
):
    """By rows here, drawn from two corpora by weight: the rows that stay are still those of their
    corpus.
    """
    for name, said in (
        ("a", ["AB", "BA"] * 6),
        ("b", ["AB", "AB" * 90, "BA", "AB" * 80, *["AB"] * 8]),
    ):
        sounds = []
        for i in range(12):
            soundfile.write(
                sink := io.BytesIO(),
                np.random.default_rng(i).normal(0, 0.1, 8000),
                16000,
                format="FLAC",
            )
            sounds.append(sink.getvalue() if (name, i) != ("b", 9) else b"broken")
        pq.write_table(
            pa.table({"sound": sounds, "said": said, "long": [0.5] * 12}),
            tmp_path / f"{name}.parquet",
        )
    data = {
        "train": str(tmp_path / "a.parquet"),
        "weight": 0.5,
        "modality": "audio",
        "columns": {"audio": "sound", "transcript": "said", "seconds": "long"},
        "max_bad_rows": 0.1,
        "decode": "memory",
        "validation": str(shutil.copy(tmp_path / "a.parquet", tmp_path / "c.parquet")),
        "more": [
            {
                "train": str(tmp_path / "b.parquet"),
                "modality": "audio",
                "weight": 0.5,
                "validation_fraction": 0.0,
            }
        ],
    }
    source_ = {
        "data": data,
        "backbone": {"torchaudio/deepspeech": {"hidden": 16}},
        "objective": "ctc",
        "train": {"steps": 2, "global_batch": 4},
    }
    stage = source.plan_source(
        Job.model_validate(
            {"name": "toy", "storage": str(tmp_path / "runs"), "sources": {"src": source_}}
        ),
        "src",
    )
    fitted = source.prepare_source(stage)
    assert (
        fitted.corpus_sizes == (12, 10)
        and fitted.train.ids(np.arange(22)).tolist() == [*range(13), 14, *range(16, 24)]
        and fitted.costs is None
    )
    assert [(row.row, "labels need" in row.reason) for row in fitted.left_out] == [
        (13, True),
        (15, True),
    ] and fitted.num_left_out == 2
    with pytest.raises(TooManyBadRowsError, match=r"3 of 24 rows cannot be used.*b\.parquet row 9"):
        pretrain.decode_once(pretrain.rank_job(stage, fitted, DataWorkers(), 1))
    assert stage.splits is not None
    rows = Rows(stage.splits.train, pretrain.decoder_of(fitted)).with_costs()
    assert len(source.drop_untrainable(rows, 0.1)[1]) == 2
    with pytest.raises(TooManyBadRowsError, match="3 of 25 rows cannot be used"):
        source.drop_untrainable(rows, 0.1, num_left_out=1)


# ---------------------------------------------------------------- images that cannot be decoded


@pytest.mark.parametrize("decode", ["train", "memory"])
def test_bad_images_are_listed_once_and_counted(tmp_path, images, decode):
    train = with_bad_pictures(images["train"], tmp_path / "train.parquet", [3, 40])
    job = image_job(
        tmp_path,
        {**images, "train": train, "decode": decode, "max_bad_rows": 0.05},
        train={"steps": 12, "global_batch": 12, "checkpoint_every_steps": 5},
    )
    stage, _, metadata = pretrained(job)
    listed = lines_of(stage, "log/quarantine.jsonl")
    assert sorted((row["split"], row["row"]) for row in listed) == [("train", 3), ("train", 40)], (
        "two epochs, each row once"
    )
    assert metadata["bad_rows"] == 2


def test_decoding_in_memory_or_as_rows_come_gives_the_same_weights(tmp_path, images):
    """Also where rows are bad: they keep their places in the plan."""
    train = with_bad_pictures(images["train"], tmp_path / "train.parquet", [11])
    found = {}
    for decode in ("train", "memory"):
        files = {**images, "train": train, "decode": decode, "max_bad_rows": 0.05}
        stage, _, _ = pretrained(image_job(tmp_path / decode, files))
        found[decode] = bundle.load(stage.bundle_uri).tensors
    assert all(torch.equal(t, found["memory"][n]) for n, t in found["train"].items())


def test_a_source_of_bad_images_stops_with_their_places(tmp_path, images):
    train = with_bad_pictures(images["train"], tmp_path / "train.parquet", range(0, 60, 3))
    with pytest.raises(
        TooManyBadRowsError, match=r"of 60 rows cannot be used.*train\.parquet row 0: "
    ):
        pretrained(
            image_job(
                tmp_path,
                {**images, "train": train},
                train={"epochs": 2, "global_batch": 12, "log_every_steps": 1},
            )
        )


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_bundle(tmp_path, images):
    train = {"steps": 9, "global_batch": 12, "checkpoint_every_steps": 4, "eval_every_steps": 3}
    stage, _, _ = pretrained(image_job(tmp_path / "whole", images, train=train))
    whole = bundle.load(stage.bundle_uri).tensors
    job = image_job(tmp_path / "cut", images, train=train)
    cut = source.plan_source(job, "src")
    metadata = stopped_and_gone_on(cut)
    assert metadata["resumed_from"] == 4
    assert all(torch.equal(t, whole[n]) for n, t in bundle.load(cut.bundle_uri).tensors.items())
    steps = [line["step"] for line in lines_of(cut, "log/metrics.jsonl")]
    assert steps == [3, 6, 9, 9], (
        "validations at 3, 6 and 9 and the log line of the end: what came after step 4 was "
        "written once"
    )


def test_what_the_objective_warns_of_is_a_fact_of_the_source(tmp_path, images, monkeypatch):
    monkeypatch.setattr(
        registry.get("objective", "classification"),
        "after_step",
        lambda self, backbone, step, steps: "collapsed" if step == 1 else None,
        raising=False,
    )
    stage, _, metadata = pretrained(
        image_job(tmp_path, images, train={"steps": 4, "global_batch": 12, "log_every_steps": 2})
    )
    assert (
        metadata["warning"] == "collapsed"
        and bundle.load(stage.bundle_uri).manifest.training["warning"] == "collapsed"
    )
