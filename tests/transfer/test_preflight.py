"""A dry run looks at the files and says what the run would refuse, in the run's own words; it
writes nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import SMALL, image_files, sentences

from pipeline.config.schema import Job
from pipeline.io import storage
from pipeline.techniques.peft import Lora
from pipeline.train import dry_checks, source
from pipeline.transfer import dry_run, preflight, stages, targets
from pipeline.transfer.grid import backbone_groups
from pipeline.transfer.job_state import JobState

# fixtures
from tests.transfer.test_targets import Silent, job_of, models, saved, texts  # noqa: F401

COLUMNS = {"text": "words", "label": "kind"}
BERT = {"transformers/bert": SMALL}


def checked(job: Job) -> JobState:
    return stages.check(job, Silent())  # type: ignore[arg-type]


def refused(job: Job) -> str:
    with pytest.raises(ValueError) as caught:
        preflight.check_rows(checked(job))
    return str(caught.value)


def written(path: Path, nulls: int = 0, labelless: int = 0) -> str:
    found, labels = sentences(120, seed=3)
    split = ["train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test" for i in range(120)]
    pq.write_table(
        pa.table(
            {
                "words": [None if i < nulls else text for i, text in enumerate(found)],
                "split": split,
                "kind": [None if i < labelless else f"kind {k}" for i, k in enumerate(labels)],
            }
        ),
        path,
    )
    return str(path)


def with_source(
    folder: Path,
    corpus: str,
    objective: Any = "classification",
    backbone: Any = None,
    modality: Any = "text",
    **data: Any,
) -> Job:
    """A job whose source is trained on a corpus of texts."""
    columns = COLUMNS if objective == "classification" else {"text": "words"}
    spec = {
        "uri": corpus,
        "split_column": "split",
        "modality": modality,
        "columns": columns,
        **data,
    }
    part = {
        "data": spec,
        "backbone": backbone or BERT,
        "objective": objective,
        "train": {"steps": 2, "global_batch": 8},
    }
    return Job.model_validate(
        {"name": "toy", "storage": str(folder / "runs"), "sources": {"src": part}}
    )


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize("objective", ["mlm", "classification"])
def test_null_texts_of_a_source_are_refused_as_its_run_refuses_them(tmp_path, objective):
    job = with_source(tmp_path, written(tmp_path / "rows.parquet", nulls=30), objective)
    message = refused(job)
    assert message.startswith("sources.src: train split: ") and "data.max_bad_rows=0.01 " in message
    assert f"{tmp_path / 'rows.parquet'} row 0: the text is null" in message
    with pytest.raises(ValueError, match=r"data\.max_bad_rows=0\.01 "):
        source.prepare_source(checked(job).sources["src"])


def test_documents_that_do_not_fill_a_batch_are_reported(tmp_path):
    job = with_source(tmp_path, written(tmp_path / "rows.parquet"), "mlm")
    spec = job.sources["src"]
    large = spec.model_copy(update={"train": spec.train.model_copy(update={"global_batch": 512})})
    (line,) = preflight.check_rows(checked(job.model_copy(update={"sources": {"src": large}})))
    assert (
        line.startswith("warning: source src: about ")
        and "fewer than the 512 of a batch: lower train.global_batch" in line
    )
    assert not preflight.check_rows(checked(job))


def test_null_labels_of_a_source_are_refused_as_its_run_refuses_them(tmp_path):
    job = with_source(tmp_path, written(tmp_path / "rows.parquet", labelless=5))
    with pytest.raises(ValueError) as run:
        source.prepare_source(checked(job).sources["src"])
    assert refused(
        job
    ) == f"sources.src: {run.value}" and "3 of 72 rows have no label (null)" in str(run.value)


def test_few_rows_without_a_label_are_left_out_and_listed(tmp_path):
    job = with_source(tmp_path, written(tmp_path / "rows.parquet", labelless=1))
    stage = checked(job).sources["src"]
    assert stage.splits is not None
    assert stage.splits.sizes().startswith("train 71, validation 24, test 24 rows (")
    assert "1 row without a label left out" in stage.splits.sizes()
    fitted = source.prepare_source(stage)
    assert fitted.num_left_out == 1 and len(fitted.train) == 71
    assert list(fitted.left_out) == [
        (
            "train",
            0,
            f"{tmp_path / 'rows.parquet'} row 0",
            "it has no label (column kind is null or NaN)",
        )
    ]
    assert not preflight.check_rows(checked(job))


def test_a_folder_without_its_configuration_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    job = job_of(
        tmp_path,
        f"hf:{tmp_path / 'model'}",
        written(tmp_path / "rows.parquet"),
        "classification",
        COLUMNS,
    )
    assert refused(job).startswith(
        f"sources.src: hf:{tmp_path / 'model'}: no config.json in this folder"
    )


def test_weights_that_do_not_fit_are_refused(tmp_path, models):  # noqa: F811
    """A source with data goes on from a checkpoint of another width."""
    job = with_source(tmp_path, written(tmp_path / "rows.parquet"), "mlm")
    spec = job.sources["src"].model_copy(
        update={
            "init": models["bert"],
            "backbone": type(job.sources["src"].backbone)(
                name="transformers/bert", options={**SMALL, "hidden": 64}
            ),
        }
    )
    job = job.model_copy(update={"sources": {"src": spec}})
    with pytest.raises(ValueError) as run:
        source.prepare_source(checked(job).sources["src"])
    assert refused(job) == f"sources.src: {run.value}"


def test_a_model_of_a_hub_is_left_to_the_run(tmp_path):
    job = job_of(
        tmp_path,
        "hf-hub:nobody/nothing",
        written(tmp_path / "rows.parquet"),
        "classification",
        COLUMNS,
    )
    assert (
        preflight.check_rows(checked(job))[0]
        == "source src: not looked at: only a run fetches hf-hub:nobody/nothing"
    )


def test_what_is_estimated_says_so_and_nothing_is_written(tmp_path):
    found, _ = sentences(60)
    long = written(tmp_path / "rows.parquet")
    pq.write_table(
        pq.read_table(long).set_column(0, "words", pa.array([" ".join(found)] * 120)), long
    )
    job = with_source(tmp_path, long, modality={"text": {"length": 16}})
    (line,) = preflight.check_rows(checked(job))
    assert line.startswith("warning: source src: texts are cut at length 16") and line.endswith(
        "(estimated: a run trains its tokenizer on more rows)"
    )
    made = (
        [file for file in Path(job.root).rglob("*") if file.is_file()]
        if Path(job.root).exists()
        else []
    )
    assert not made, "a dry run leaves nothing behind"


# ---------------------------------------------------------------- targets


def test_null_texts_of_a_target_are_refused_as_its_run_refuses_them(tmp_path, models):  # noqa: F811
    job = job_of(
        tmp_path,
        models["bert"],
        written(tmp_path / "rows.parquet", nulls=60),
        "classification",
        COLUMNS,
    )
    state = checked(job)
    with pytest.raises(ValueError) as run:
        stages.prepare_shared(state)
    message = refused(job)
    assert message.startswith("targets.task: train split: ") and "the text is null" in message
    assert "data.max_bad_rows=0.05 " in message and "data.max_bad_rows=0.05 " in str(run.value)


def test_a_few_bad_rows_are_reported(tmp_path, models):  # noqa: F811
    job = job_of(
        tmp_path,
        models["bert"],
        written(tmp_path / "rows.parquet", nulls=2),
        "classification",
        COLUMNS,
    )
    lines = preflight.check_rows(checked(job))
    assert any(
        "1 of 64 train rows of a sample cannot be used" in line or "2 of 64 train rows" in line
        for line in lines
    ), lines


def test_a_speaker_on_both_sides_of_a_random_split_is_reported(tmp_path, models):  # noqa: F811
    rows = written(tmp_path / "rows.parquet")
    table = pq.read_table(rows)
    pq.write_table(table.append_column("speaker", pa.array([i // 2 for i in range(120)])), rows)
    drawn = {"split_column": None, "validation_fraction": 0.2, "test_fraction": 0.3}
    job = job_of(tmp_path, models["bert"], rows, "classification", COLUMNS, data=drawn)
    (line,) = [one for one in preflight.check_rows(checked(job)) if "data.group: speaker" in one]
    assert line.startswith("warning: target task: ")
    job = with_source(tmp_path, rows, split_column=None, validation_fraction=0.2)
    (line,) = [one for one in preflight.check_rows(checked(job)) if "data.group: speaker" in one]
    assert line.startswith("warning: source src: ")


@pytest.mark.parametrize("at", ["source", "target"])
def test_files_that_a_column_names_and_that_are_not_there_are_refused(tmp_path, at):
    for i in range(30):
        PIL.Image.fromarray(np.full((8, 8), 8 * i, np.uint8)).save(tmp_path / f"{i}.png")
    split = ["train" if i % 3 == 0 else "validation" if i % 3 == 1 else "test" for i in range(30)]
    table = pa.table(
        {
            "image": [str(tmp_path / f"{i}.png") for i in range(30)],
            "label": [i % 2 for i in range(30)],
            "split": split,
        }
    )
    for name in ("whole", "lacking"):
        pq.write_table(
            table
            if name == "whole"
            else table.set_column(
                0,
                "image",
                pa.array(
                    [
                        str(tmp_path / f"{i}.png")
                        if i not in (7, 21)
                        else str(tmp_path / f"gone {i}.png")
                        for i in range(30)
                    ]
                ),
            ),
            tmp_path / f"{name}.parquet",
        )
    data = {
        "split_column": "split",
        "modality": {"image": {"size": 32, "channels": 1}},
        "columns": {"image": "image", "label": "label"},
    }
    uris = {
        part: str(tmp_path / ("lacking" if part == at else "whole")) + ".parquet"
        for part in ("source", "target")
    }
    train = {"steps": 2, "global_batch": 4}
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path / "runs"),
            "techniques": ["scratch"],
            "sources": {
                "src": {
                    "data": {**data, "uri": uris["source"]},
                    "backbone": "timm/resnet10t",
                    "objective": "classification",
                    "train": train,
                }
            },
            "targets": {
                "task": {
                    "data": {**data, "uri": uris["target"]},
                    "objective": "classification",
                    "train": train,
                }
            },
        }
    )
    place = "sources.src" if at == "source" else "targets.task"
    message = refused(job)
    assert (
        message.startswith(f"{place}: {tmp_path}/gone ")
        and "no such file, while a column of the rows names it, and 1 more" in message
        and "\n" not in message
    )


def test_a_length_beyond_the_positions_of_a_model_is_refused(tmp_path, models):  # noqa: F811
    """The model has 32: more are told before anything is trained, as the run tells them."""
    job = job_of(
        tmp_path,
        models["gpt2"],
        written(tmp_path / "rows.parquet"),
        "classification",
        COLUMNS,
        data={"modality": {"text": {"length": 64}}},
    )
    found = dry_checks.plan_without_training(checked(job).sources["src"])
    assert found is not None
    (group,) = backbone_groups({"src": (found.arch, found.modality)})
    with pytest.raises(ValueError) as run:
        targets.prepare(checked(job).targets["task"], group)
    assert refused(job) == f"targets.task: {run.value}" and "64" in str(run.value)


def test_all_problems_are_told_at_once(tmp_path, models):  # noqa: F811
    job = with_source(tmp_path, written(tmp_path / "a.parquet", nulls=30), "mlm")
    other = job_of(
        tmp_path,
        models["bert"],
        written(tmp_path / "b.parquet", nulls=60),
        "classification",
        COLUMNS,
    )
    job = job.model_copy(
        update={"sources": {**job.sources, "known": other.sources["src"]}, "targets": other.targets}
    )
    assert [line.partition(":")[0] for line in refused(job).splitlines()] == [
        "sources.src",
        "targets.task",
    ]


def test_storage_errors_are_problems_too(tmp_path, models, monkeypatch):  # noqa: F811
    def broken(*_: Any) -> Any:
        raise storage.StorageError("the disk is gone")

    job = job_of(
        tmp_path, models["bert"], written(tmp_path / "rows.parquet"), "classification", COLUMNS
    )
    state = checked(job)
    monkeypatch.setattr(dry_checks, "check_sample", broken)
    with pytest.raises(ValueError, match=r"targets\.task: the disk is gone"):
        preflight.check_rows(state)


def test_the_command_refuses_what_a_run_would_refuse(tmp_path, monkeypatch):
    """The stages are told, then what is wrong with the rows; the exit code is that of a mistake."""
    import yaml
    from typer.testing import CliRunner

    from pipeline import cli

    monkeypatch.chdir(tmp_path)
    for name, nulls in (("bad", 30), ("good", 0)):
        written(tmp_path / "rows.parquet", nulls=nulls)
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {
                    "name": name,
                    "sources": {
                        "src": {
                            "data": {
                                "uri": "rows.parquet",
                                "split_column": "split",
                                "modality": "text",
                                "columns": {"text": "words"},
                            },
                            "backbone": BERT,
                            "objective": "mlm",
                            "train": {"steps": 2, "global_batch": 8},
                        }
                    },
                }
            )
        )
        done = CliRunner().invoke(cli.app, ["run", f"{name}.yaml", "--dry-run"])
        assert done.exit_code == (2 if name == "bad" else 0), done.output
        assert "source src: transformers/bert" in done.output and (
            "the text is null" in done.output
        ) == (name == "bad")


# ---------------------------------------------------------------- techniques


def adapted(folder: Path, models: dict[str, str], *techniques: Any) -> Job:  # noqa: F811
    job = job_of(
        folder,
        models["bert"],
        written(folder / "rows.parquet"),
        "classification",
        COLUMNS,
        techniques=["scratch", *techniques],
    )
    return job.model_copy(update={"targets": {**job.targets, "again": job.targets["task"]}})


def test_modules_that_the_backbone_lacks_are_refused_for_each_target(tmp_path, models):  # noqa: F811
    job = adapted(tmp_path, models, {"lora": {"modules": ["query", "qkv"]}})
    lines = refused(job).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "targets.task: techniques: lora: transformers/bert has no module ending with qkv."
    )
    preflight.check_rows(checked(adapted(tmp_path, models, {"lora": {"modules": ["query"]}})))


def test_a_backbone_is_checked_without_its_weights(tmp_path, models, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr(Lora, "check_backbone", lambda self, backbone: seen.append(backbone))
    preflight.check_rows(checked(adapted(tmp_path, models, {"lora": {"modules": ["query"]}})))
    assert seen and all(one.is_meta for backbone in seen for one in backbone.parameters())


@pytest.mark.parametrize(("patience", "idle"), [(3, False), (4, True)])
def test_patience_that_ends_no_run_is_reported(tmp_path, models, texts, patience, idle):  # noqa: F811
    """The run is validated after every second step, and ends with the fifth validation."""
    job = job_of(
        tmp_path,
        models["bert"],
        texts,
        "classification",
        COLUMNS,
        train={"steps": 10, "global_batch": 4, "patience": patience},
    )
    line = (
        "warning: target task at 100 % labels: train.patience: 4 ends no run early, as 10 steps "
        "have 5 validations: lower it or train.eval_every_steps"
    )
    found = [one for one in dry_run.describe(checked(job)) if "train.patience" in one]
    assert found == ([line] if idle else [])


@pytest.mark.parametrize("patience", [2, None])
def test_patience_warns_where_the_last_weights_are_kept(tmp_path, patience):
    paths = image_files(tmp_path, {"train": 12, "validation": 4})
    data = {"train": paths["train"], "validation": paths["validation"], "modality": "image"}
    source = {
        "data": {**data, "columns": {"image": "picture"}},
        "backbone": "timm/test_vit",
        "objective": "simclr",
        "train": {"steps": 100, "global_batch": 4, "patience": patience},
    }
    job = {"name": "toy", "storage": str(tmp_path / "runs"), "sources": {"a": source}}
    found = dry_run.describe(checked(Job.model_validate(job)))
    line = "warning: source a: train.patience is ignored, as the last weights are always taken"
    assert [one for one in found if "train.patience" in one] == ([line] if patience else [])


@pytest.mark.parametrize(("average", "is_slow"), [(0.99, True), (0.7, False)])
def test_a_weight_average_that_is_mostly_the_start_is_a_warning(
    tmp_path,
    models,  # noqa: F811
    texts,  # noqa: F811
    average,
    is_slow,
):
    train = {"steps": 10, "global_batch": 4, "ema": average}
    job = job_of(tmp_path, models["bert"], texts, "classification", COLUMNS, train=train)
    found = [one for one in dry_run.describe(checked(job)) if "train.ema" in one]
    line = "warning: target task at 100 % labels: train.ema: 0.99 is slow for 10 steps: 90 % of the"
    assert [one[: len(line)] for one in found] == ([line] if is_slow else [])


def test_4_bits_without_their_library_are_refused_once(tmp_path, models, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError) as error:
        checked(adapted(tmp_path, models, {"lora": {"quantize": "nf4"}}))
    assert str(error.value) == (
        "techniques: lora: quantize: nf4 needs bitsandbytes, which is not installed: uv pip "
        "install -e '.[quantized]' (without a GPU add --torch-backend cpu; without a clone: pip "
        "install 'onetomany[quantized]'), or leave quantize out"
    )
