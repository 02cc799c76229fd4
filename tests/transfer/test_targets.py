"""Targets of texts: documents packed for language models, and what of rows, backbone and objective
does not fit, told before any training.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from stage_runs import Silent
from toys import SMALL, sentences, task_of, text_modality

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job, Target
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data import manifests
from pipeline.data.stream import TooManyBadRowsError
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.report import stats
from pipeline.train.ranks import Ranks
from pipeline.transfer import (
    dry_run,
    fanout,
    grid,
    job_state,
    overlap,
    planned_trials,
    stages,
    targets,
    trial,
)
from pipeline.transfer.trial import Shared

LENGTH = 32


def modality_of(backbone: str) -> dict[str, Any]:
    made = text_modality(backbone, LENGTH)
    return ModalitySpec("text", made.options.model_dump(), made.state)


def saved(path: Path, backbone: str, **options: Any) -> str:
    modality = modality_of(backbone)
    task = task_of(
        backbone,
        bundle.build_modality(modality).inputs(),
        "clm" if "gpt" in backbone else "mlm",
        seed=1,
        **SMALL,
        **options,
    )
    bundle.save(str(path), task.backbone, modality, training={"transfer": ""}, metrics={})
    return f"bundle:{path}"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: saved(folder / name, f"transformers/{name}") for name in ("gpt2", "bert")}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Documents with a class, three of them not readable, by split."""
    path = tmp_path_factory.mktemp("texts") / "texts.parquet"
    found, labels = sentences(240, seed=3)
    raw: list[Any] = [text.encode() for text in found]
    for i in (5, 100, 200):
        raw[i] = b"\xff broken"
    split = ["train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test" for i in range(240)]
    people = [f"{part} {i // 10}" for i, part in enumerate(split)]
    pq.write_table(
        pa.table(
            {"words": raw, "kind": [f"kind {i}" for i in labels], "split": split, "who": people}
        ),
        path,
    )
    return str(path)


def job_of(
    folder: Path,
    source: str,
    uri: str,
    objective: Any = "clm",
    columns: dict[str, str] | None = None,
    data: dict[str, Any] | None = None,
    techniques: Any = ("scratch", "full"),
    fan: dict[str, Any] | None = None,
    **target: Any,
) -> Job:
    spec = {
        "uri": uri,
        "split_column": "split",
        "modality": "text",
        "columns": columns or {"text": "words"},
        "max_bad_rows": 0.05,
        **(data or {}),
    }
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {"src": {"backbone": source}},
            "techniques": list(techniques),
            "targets": {
                "task": {
                    "data": spec,
                    "objective": objective,
                    "train": {"steps": 3, "global_batch": 8},
                    **target,
                }
            },
            "fanout": {"seeds": 1, **(fan or {})},
        }
    )


def shared_of(job: Job) -> tuple[job_state.JobState, Shared]:
    state = stages.check(job, Silent())
    return state, stages.prepare_shared(state)


def data_of(shared: Shared) -> trial.TargetData:
    (data,) = shared.targets.values()
    return data


# ---------------------------------------------------------------- packed targets


@pytest.mark.parametrize(("objective", "model"), [("clm", "gpt2"), ("mlm", "bert")])
def test_documents_of_a_target_are_packed_once_and_read_as_rows(
    tmp_path, models, texts, objective, model
):
    job = job_of(tmp_path, models[model], texts, objective)
    state, shared = shared_of(job)
    data = data_of(shared)
    files = sorted(Path(job.root, "packed").rglob("*.parquet"))
    assert len(files) == 3 and data.labels is None
    modality = bundle.build_modality(data.modality)
    for split in ("train", "validation", "test"):
        rows, documents = getattr(data, split), getattr(state.targets["task"].splits, split)
        assert rows.arrays is not None and {"tokens", "segments", "bytes"} <= set(rows.arrays)
        good = [
            text
            for text in manifests.read_columns(documents, ["words"])["words"].to_pylist()
            if text[:1] != b"\xff"
        ]
        assert len(rows) == len(rows.arrays["tokens"]) < len(documents)
        ids = [
            modality.tokenizer.encode(text.decode(), add_special_tokens=False).ids for text in good
        ]  # type: ignore[attr-defined]
        cls, sep = modality.state["specials"][2:4]
        flat = rows.arrays["tokens"][rows.arrays["segments"] > 0].tolist()
        assert flat == [token for one in ids for token in (cls, *one, sep)], (
            "every document whole and in order"
        )
        assert rows.arrays["bytes"].sum() == pytest.approx(sum(map(len, good)))
    assert (
        "3 rows left out" in data.split_text
        and "packed into" in data.split_text
        and "which are the units" in data.split_text
    )
    before = [path.stat().st_mtime_ns for path in files]
    again = data_of(shared_of(job)[1])
    assert [
        path.stat().st_mtime_ns for path in sorted(Path(job.root, "packed").rglob("*.parquet"))
    ] == before, "found again"
    assert (
        again.train.arrays["tokens"] == data.train.arrays["tokens"]
    ).all() and again.split_text == data.split_text  # type: ignore[index]


def test_a_causal_model_is_fine_tuned_on_documents_and_told_by_packed_rows(tmp_path, models, texts):
    job = job_of(tmp_path, models["gpt2"], texts, label_fractions=[0.5, 1.0])
    state, shared = shared_of(job)
    found = planned_trials.final_trials(
        state, list(shared.backbone_groups.values()), {"task": {"src"}}, {}
    )
    assert {one.label_fraction for one in found} == {0.5, 1.0} and len(found) == 4
    records = [trial.run(one, shared, Ranks()) for one in found]
    data = data_of(shared)
    for one, record in zip(found, records, strict=True):
        values = {(row.split, row.metric): row for row in record.rows}
        assert values["test", "perplexity"].value > 1 and values["test", "bits_per_byte"].value > 0
        assert values["test", "perplexity"].value == pytest.approx(
            np.exp(values["test", "loss"].value)
        )
        assert values["test", "loss"].n_train == round(one.label_fraction * len(data.train)), (
            "shares are shares of packed rows"
        )
        assert values["test", "loss"].n_units == values["test", "loss"].n_eval == len(data.test)
        kept = trial.read_predictions(shared.root, one.folder, 0)
        assert (
            kept is not None
            and len(kept.rows) == len(data.test)
            and {"loss", "count", "bytes"} <= set(kept.predictions)
        )
        manifest = bundle.load(record.rows[0].bundle_uri).manifest
        assert manifest.columns == {"text": "words"}, "what predict reads: rows as they are"
    assert not fanout.unfinished(shared.root, found[0], job.fanout)


def test_a_probe_of_a_masked_model_trains_the_head_alone(tmp_path, models, texts):
    job = job_of(tmp_path, models["bert"], texts, "mlm", techniques=("scratch", "linear_probe"))
    state, shared = shared_of(job)
    one = next(
        t
        for t in planned_trials.final_trials(
            state, list(shared.backbone_groups.values()), {"task": {"src"}}, {}
        )
        if t.technique.name == "linear_probe"
    )
    (unit,) = fanout.group_into_work_items([one], shared)
    assert not unit.is_stack, "its head reads tokens: no features are cached"
    record = trial.run(one, shared, Ranks())
    after, start = (
        bundle.load(record.rows[0].bundle_uri),
        bundle.load(models["bert"].partition(":")[2]),
    )
    assert all(
        (tensor == start.backbone_tensors()[name]).all()
        for name, tensor in after.backbone_tensors().items()
    )
    assert record.rows[0].params_trained == sum(
        p.numel() for p in after.task().objective.parameters()
    )


@pytest.mark.parametrize("technique", ["linear_probe", "random_probe", "lp_ft"])
def test_a_technique_that_would_train_nothing_is_refused(tmp_path, models, texts, technique):
    state = stages.check(
        job_of(tmp_path, models["gpt2"], texts, techniques=("scratch", technique)), Silent()
    )
    with pytest.raises(
        ValueError,
        match=rf"targets\.task: techniques: {technique} trains the head alone, and clm has none "
        r".* \[scratch, full, lora\]",
    ):
        stages.prepare_shared(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"columns": {"text": "words", "text_pair": "kind"}},
            r"targets\.task\.data\.columns\.text_pair: clm reads one text a row",
        ),
        (
            {"metric": "accuracy"},
            r"targets\.task\.metric: accuracy is not a metric of clm \(perplexity, "
            r"bits_per_byte, loss\)",
        ),
        (
            {"label_fractions": [4]},
            r"targets\.task\.label_fractions: 4 means 4 rows a class, and a row of clm has no "
            r"single class: give shares",
        ),
        (
            {"fan": {"select": {"score": "logme", "top": 1}}},
            r"fanout\.select: targets\.task is clm, and logme scores sources by classes",
        ),
        (
            {"techniques": ("scratch", "full", "ensemble")},
            r"targets\.task: techniques: ensemble averages the predictions of classification, .*"
            r"those of clm cannot be averaged: use uniform_soup",
        ),
    ],
)
def test_what_packed_rows_have_not_is_refused(tmp_path, models, texts, change, message):
    with pytest.raises(ValueError, match=message):
        stages.check(job_of(tmp_path, models["gpt2"], texts, **change), Silent())


def test_texts_beyond_the_budget_and_splits_without_a_text_leave_the_target_out(
    tmp_path, models, texts
):
    job = job_of(tmp_path, models["gpt2"], texts, data={"max_bad_rows": 0.0})
    stage = targets.plan_target(job, "task")
    (group,) = grid.backbone_groups(
        {
            "src": (
                bundle.load(models["gpt2"].partition(":")[2]).manifest.arch,
                modality_of("transformers/gpt2"),
            )
        }
    )
    with pytest.raises(
        TooManyBadRowsError, match=r"of 144 rows cannot be used.*texts\.parquet row 5"
    ):
        targets.prepare(stage, group)
    pq.write_table(
        pa.table(
            {
                "words": ["some text", "more text", "", ""],
                "split": ["train", "validation", "test", "test"],
            }
        ),
        tmp_path / "few.parquet",
    )
    with pytest.raises(
        ValueError, match=r"the test split holds no text to pack \(2 rows, all of them left out\)"
    ):
        targets.prepare(
            targets.plan_target(
                job_of(tmp_path, models["gpt2"], str(tmp_path / "few.parquet")), "task"
            ),
            group,
        )


def test_a_group_is_kept_out_of_other_splits_and_is_no_unit_of_packed_rows(tmp_path, models, texts):
    data = data_of(shared_of(job_of(tmp_path, models["gpt2"], texts, data={"group": "who"}))[1])
    assert data.groups is None and "no who in two splits" in data.split_text


# ---------------------------------------------------------------- what does not fit


def test_an_objective_for_another_kind_of_backbone_leaves_the_target_out(tmp_path, models, texts):
    state = stages.check(job_of(tmp_path, models["bert"], texts, "clm"), Silent())
    with pytest.raises(
        ValueError,
        match=r"targets\.task: the backbone transformers/bert does not suit clm on these rows "
        r".*bert sees the future",
    ):
        stages.prepare_shared(state)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [({"positions": 48}, ("64 tokens", "48 positions")), ({}, ("64 tokens", "32 positions"))],
)
def test_rows_longer_than_the_backbone_are_refused_before_training(
    tmp_path, texts, options, numbers
):
    """Also where the positions follow from the length that its source was read with."""
    source = saved(tmp_path / "short", "transformers/bert", **options)
    columns = {"text": "words", "label": "kind"}
    job = job_of(
        tmp_path, source, texts, "classification", columns, {"modality": {"text": {"length": 64}}}
    )
    with pytest.raises(
        ValueError,
        match=r"targets\.task: the backbone transformers/bert does not suit classification on "
        r"these rows .*64",
    ) as caught:
        stages.prepare_shared(stages.check(job, Silent()))
    assert all(number in str(caught.value) for number in numbers)
    fits = job_of(
        tmp_path, source, texts, "classification", columns, {"modality": {"text": {"length": 16}}}
    )
    assert data_of(shared_of(fits)[1]).arch.inputs["length"] == 16


def test_every_base_of_a_target_is_tried(tmp_path, models, texts):
    """The second backbone group reads its rows like the first one, from which they are taken."""
    job = job_of(tmp_path, models["bert"], texts, "mlm")
    both = job.model_dump(mode="json")
    task = task_of(
        "transformers/gpt2",
        bundle.build_modality(modality_of("transformers/bert")).inputs(),
        "clm",
        seed=1,
        **SMALL,
    )
    bundle.save(
        str(tmp_path / "gpt"),
        task.backbone,
        modality_of("transformers/bert"),
        training={"transfer": ""},
        metrics={},
    )
    both["sources"]["other"] = {"backbone": f"bundle:{tmp_path / 'gpt'}"}
    with pytest.raises(ValueError, match=r"the backbone .*gpt2 does not suit mlm"):
        shared_of(Job.model_validate(both))


@pytest.mark.parametrize(
    ("backbone", "refused"), [({"positions": 48}, True), ({}, True), ({"positions": 64}, False)]
)
def test_a_source_to_be_pretrained_with_too_few_positions_is_told_before_anything_runs(
    tmp_path, texts, backbone, refused
):
    source = {
        "data": {
            "uri": texts,
            "split_column": "split",
            "modality": {"text": {"length": 32, "vocabulary": 300}},
            "columns": {"text": "words"},
        },
        "backbone": {"transformers/bert": {**SMALL, **backbone}},
        "objective": "mlm",
        "train": {"steps": 2, "global_batch": 4},
    }
    job = job_of(
        tmp_path,
        "bundle:none",
        texts,
        "classification",
        {"text": "words", "label": "kind"},
        {"modality": {"text": {"length": 64}}},
    )
    job = Job.model_validate({**job.model_dump(mode="json"), "sources": {"src": source}})
    if not refused:
        assert stages.check(job, Silent()).targets
        return
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data\.modality: length 64 is longer than the "
        rf"{backbone.get('positions', 32)} positions of "
        r"transformers/bert.*positions: 64",
    ):
        stages.check(job, Silent())


def test_tags_of_a_text_that_is_no_list_of_words_are_refused_by_its_type(tmp_path, models):
    table = {
        "words": ["one two", "three", "four five"] * 4,
        "tags": [["O", "B-x"], ["O"], ["B-x", "O"]] * 4,
        "split": ["train", "validation", "test"] * 4,
    }
    pq.write_table(pa.table(table), tmp_path / "plain.parquet")
    columns = {"text": "words", "tags": "tags"}
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data, train split: column words holds string: tagging reads a list "
        r"of words",
    ):
        stages.check(
            job_of(tmp_path, models["bert"], str(tmp_path / "plain.parquet"), "tagging", columns),
            Silent(),
        )
    pq.write_table(
        pa.table({**table, "words": [text.split() for text in table["words"]]}),
        tmp_path / "lists.parquet",
    )
    job = job_of(
        tmp_path,
        models["bert"],
        str(tmp_path / "lists.parquet"),
        "tagging",
        columns,
        label_fractions=[0.5],
    )
    data = data_of(shared_of(job)[1])
    assert data.labels is None
    assert len(grid.label_subset(data.train, data.labels, 0.5, 0)) == 2, (
        "shares of all rows, which have no class"
    )


def test_answers_are_compared_with_their_context_before_anything_starts(tmp_path, models):
    rows = 12
    table = {
        "question": ["who was it"] * rows,
        "context": ["it was her"] * rows,
        "answers": [["her"]] * rows,
        "starts": [[7]] * rows,
        "split": ["train", "validation", "test"] * (rows // 3),
    }
    columns = {
        "text": "question",
        "text_pair": "context",
        "answers": "answers",
        "answer_start": "starts",
    }
    windows = {"modality": {"text": {"length": 24, "windows": 2, "stride": 4}}}
    pq.write_table(pa.table(table), tmp_path / "qa.parquet")
    data = data_of(
        shared_of(
            job_of(tmp_path, models["bert"], str(tmp_path / "qa.parquet"), "qa", columns, windows)
        )[1]
    )
    assert data.train.arrays is not None and data.train.arrays["tokens"].shape == (4, 2, 24)
    pq.write_table(pa.table({**table, "context": list(range(rows))}), tmp_path / "numbers.parquet")
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data, train split: qa cannot read these columns .*text_pair: "
        r"context is int64",
    ):
        stages.check(
            job_of(
                tmp_path, models["bert"], str(tmp_path / "numbers.parquet"), "qa", columns, windows
            ),
            Silent(),
        )


@pytest.mark.parametrize(
    ("train", "steps", "whole"),
    [
        (
            {"epochs": 2, "global_batch": 8},
            "2 epochs",
            "0 steps and those to be known after packing,",
        ),
        ({"steps": 5}, "5 steps", "10 steps,"),
    ],
)
def test_a_dry_run_does_not_count_documents_as_packed_rows(
    tmp_path, models, texts, train, steps, whole
):
    state = stages.check(job_of(tmp_path, models["gpt2"], texts, train=train), Silent())
    lines = dry_run.describe(state)
    assert (
        f": 2 final trials of {steps} on 144 documents" in lines[1]
        and f"in all: 2 trials, {whole}" in lines[-1]
    )


def pair_job(folder: Path, source: dict[str, str]) -> Job:
    """Pairs of which all share their first text, and a source that holds some of the test pairs."""
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "a": "a premise",
            "b": f"hypothesis {i}",
            "label": f"kind {i % 2}",
            "split": ("train", "validation", "test")[i % 3],
        }
        for i in range(36)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    pq.write_table(
        pa.Table.from_pylist([row for row in rows if row["split"] == "test"][:4] * 5),
        folder / "corpus.parquet",
    )
    data = {"modality": {"text": {"length": 16, "vocabulary": 256}}}
    bert = {"transformers/bert": {"layers": 1, "hidden": 16, "heads": 2}}
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {
                "src": {
                    "data": {
                        "uri": str(folder / "corpus.parquet"),
                        "columns": {**source, "label": "label"},
                        **data,
                    },
                    "backbone": bert,
                    "objective": "classification",
                    "train": {"steps": 1, "global_batch": 8},
                }
            },
            "targets": {
                "task": {
                    "data": {
                        "uri": str(folder / "pairs.parquet"),
                        "split_column": "split",
                        "columns": {"text": "a", "text_pair": "b", "label": "label"},
                        **data,
                    },
                    "objective": "classification",
                    "drop_overlap": "exact",
                }
            },
        }
    )


def test_pairs_are_test_rows_of_a_source_when_both_texts_are_there(tmp_path):
    state = stages.check(pair_job(tmp_path, {"text": "a", "text_pair": "b"}), Silent())
    found = overlap.find_overlap(state.targets["task"], state.sources, str(tmp_path / "signs"))
    left_out = "4 of 12 test rows left out because they are also in a source"
    assert (
        len(found.test) == 8
        and any(left_out in note for note in found.notes)
        and not any("its own" in note for note in found.notes)
    )
    single = stages.check(pair_job(tmp_path / "single", {"text": "b"}), Silent())
    assert overlap.find_overlap(
        single.targets["task"], single.sources, str(tmp_path / "signs")
    ).test.row_ids.tolist() == list(range(2, 36, 3))  # type: ignore[union-attr]
    assert overlap.key(single.targets["task"], single.sources) != overlap.key(
        state.targets["task"], state.sources
    )


def test_weights_of_corpora_are_for_sources(tmp_path, models, texts):
    more = [{"uri": texts, "split_column": "split", "modality": "text", "weight": 1.0}]
    with pytest.raises(ValueError, match=r"targets\.task\.data\.weight"):
        job_of(tmp_path, models["gpt2"], texts, data={"weight": 2.0, "more": more})


HOURS = {"label_times": "hours", "label_values": "died"}
ACTIONS = {"observations": "seen", "actions": "done"}


@pytest.mark.parametrize(
    ("objective", "metric", "columns", "count", "needed"),
    [
        ("hourly", None, HOURS, 1, 10),
        ("behaviour_cloning", None, ACTIONS, 1, 10),
        ("behaviour_cloning", "macro_f1", ACTIONS, 1, 10),
        ("behaviour_cloning", "return", ACTIONS, 3, 20),
    ],
)
def test_hours_and_actions_count_for_a_verdict_as_in_the_report(
    monkeypatch, objective, metric, columns, count, needed
):
    """Rows with an hour or action of a less frequent class, not all rows; of episodes all count."""
    table = pa.table(
        {
            "hours": [[1.0, 2.0], [1.0], [1.0, 2.0]],
            "died": [[0, 1], [0], [0, 0]],
            "done": [["go", "stop"], ["go"], ["go", "go"]],
        }
    )
    monkeypatch.setattr(targets.manifests, "read_columns", lambda *_: table)
    modality = "events" if objective == "hourly" else "trajectory"
    data = {"uri": "rows.parquet", "modality": modality, "columns": columns}
    spec = Target.model_validate({"data": data, "objective": objective, "metric": metric})
    splits = SimpleNamespace(by_name=lambda: {"test": table})
    state = {"labels": ["0", "1"]}
    if objective == "behaviour_cloning":
        kind = registry.get("objective", objective)
        state = kind.fit(kind.options_class(), table, columns)
    stage = targets.TargetStage("task", spec, splits, state)
    predictions = {"label": np.array([[0, 1], [0, -1], [0, 0]]), "scores": np.zeros((3, 2, 2))}
    found = stats.evidence(stats.RunPredictions(np.arange(3), predictions, 0), metric or "")
    assert stage.evidence() == {"test": found} and (found.count, found.needed) == (count, needed)


@pytest.mark.parametrize("train", [{"global_batch": 8}, {"batch_cost": 8}])
@pytest.mark.parametrize("decode", ["memory", "train"])
def test_transcripts_that_no_recording_holds_are_listed_however_rows_are_read(
    decode, train, tmp_path
):
    """Six of 24 have 40 labels for 25 frames; one recording that is broken is told by the trial
    where it is decoded there.
    """

    def sound(i: int) -> bytes:
        soundfile.write(
            sink := io.BytesIO(),
            np.random.default_rng(i).normal(0, 0.1, 16000),
            16000,
            format="FLAC",
        )
        return sink.getvalue()

    rows = [
        {
            "audio": sound(i),
            "seconds": 1.0,
            "text": "AB" * 20 if i in (0, 1, 2, 5, 6, 7) else "AB AB",
            "split": ("train", "train", "train", "validation", "test")[i % 5],
        }
        for i in range(40)
    ]
    rows[10]["audio"] = rows[10]["audio"][:200]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    heard = Audio(AudioOptions(mels=24), {"features": "mel", "mean": [0.0] * 24, "std": [1.0] * 24})
    arch = Architecture(
        "torchaudio/deepspeech2", {"layers": 1, "hidden": 8, "channels": 8}, heard.inputs()
    )
    bundle.save(
        str(tmp_path / "source"),
        bundle.build_backbone(arch, 0),
        ModalitySpec("audio", heard.options.model_dump(), heard.state),
        training={"transfer": ""},
        metrics={},
    )
    job = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path / "runs"),
            "sources": {"src": {"backbone": f"bundle:{tmp_path / 'source'}"}},
            "techniques": ["full"],
            "fanout": {"seeds": 1},
            "targets": {
                "task": {
                    "data": {
                        "uri": str(tmp_path / "rows.parquet"),
                        "split_column": "split",
                        "modality": "audio",
                        "max_bad_rows": 0.4,
                        "decode": decode,
                        "columns": {"audio": "audio", "seconds": "seconds", "transcript": "text"},
                    },
                    "objective": "ctc",
                    "train": {"steps": 6, **train},
                }
            },
        }
    )
    state = stages.check(job, Silent())
    shared = stages.prepare_shared(state)
    (data,) = shared.targets.values()
    assert (
        len(data.train) == (17 if decode == "memory" else 18)
        and f"{7 if decode == 'memory' else 6} rows left out" in data.split_text
    )
    assert "40 labels need 40 frames, the recording has 2" in data.split_text
    (one, *_) = planned_trials.final_trials(
        state, list(shared.backbone_groups.values()), {"task": {"src"}}, {}
    )
    record = trial.run(one, shared, Ranks())
    assert record.rows[0].n_train == 17 and ("1 training row left out" in record.transfer) == (
        decode == "train"
    )


def test_options_that_contradict_the_source_are_refused_before_it_is_trained(
    tmp_path, models, texts
):
    job = job_of(tmp_path, models["bert"], texts).model_dump(mode="json")
    data = {
        "uri": texts,
        "columns": {"text": "words"},
        "modality": {"text": {"length": 32, "vocabulary": 300}},
    }
    job["sources"] = {
        "src": {
            "data": data,
            "backbone": {"transformers/bert": {"layers": 1, "hidden": 16, "heads": 2}},
            "objective": "mlm",
            "train": {"steps": 1},
        }
    }
    job["targets"]["task"]["data"]["modality"] = {"text": {"vocabulary": 400}}
    with pytest.raises(
        ValueError,
        match=r"targets\.task\.data\.modality: \{'vocabulary': 400\} contradicts the source, "
        r"whose rows are read with \{'vocab",
    ):
        stages.check(Job.model_validate(job), Silent())
    job["targets"]["task"]["data"]["modality"] = {"text": {"vocabulary": 300}}
    stages.check(Job.model_validate(job), Silent())


# -------------------------------------------------------------- what is noticed before any training


def test_texts_that_are_cut_stand_in_the_report(tmp_path, models, texts):
    job = job_of(
        tmp_path,
        models["bert"],
        texts,
        "classification",
        {"text": "words", "label": "kind"},
        data={"modality": {"text": {"length": 8}}},
    )
    state, _ = shared_of(job)
    (found,) = [note for note in state.notes if "are cut at length 8" in note]
    assert found.startswith("warning: task: ") and "train " in found
    assert "validation " in found and "test " in found


def test_batches_and_label_counts_beyond_the_data_are_reported(tmp_path, models, texts):
    columns = {"text": "words", "label": "kind"}
    job = job_of(
        tmp_path,
        models["bert"],
        texts,
        "classification",
        columns,
        label_fractions=[0.1, 1.0],
        train={"steps": 3, "global_batch": 64},
    )
    state, _ = shared_of(job)
    rows = state.targets["task"].num_labelled_rows(0.1)
    expected = (
        f"a batch of 64 rows is more than the labelled training rows ({rows} at label fraction 0.1): each "
        "step then takes all of them"
    )
    assert f"task: {expected}" in state.notes
    job = job_of(
        tmp_path / "b",
        models["bert"],
        texts,
        "classification",
        columns,
        label_fractions=[5, 60],
        train={"steps": 3, "global_batch": 8},
    )
    state, _ = shared_of(job)
    counts = np.bincount(
        targets.classes_of_rows(
            job.targets["task"], state.targets["task"].splits.train, state.targets["task"].state
        )
    )
    message = ", ".join(f"kind {k} has {count}" for k, count in enumerate(counts) if count < 60)
    assert (
        f"task: 60 rows of each class were asked for (label_fractions), and {message}: all "
        "their rows are used" in state.notes
    )
    job = job_of(
        tmp_path / "c",
        models["bert"],
        texts,
        "classification",
        columns,
        train={"steps": 3, "global_batch": 8},
    )
    assert not [
        note
        for note in shared_of(job)[0].notes
        if "were asked for" in note or "is more than the labelled" in note
    ]


def test_null_labels_say_target_column_how_many_and_what_to_do(tmp_path, models):
    found, labels = sentences(60, seed=3)
    for split in ("train", "test"):
        parts = [
            "train" if i % 5 < 3 else "validation" if i % 5 == 3 else "test" for i in range(60)
        ]
        kinds = [
            None if part == split and i < 10 else f"kind {labels[i]}"
            for i, part in enumerate(parts)
        ]
        pq.write_table(
            pa.table({"words": found, "kind": kinds, "split": parts}), tmp_path / "nulls.parquet"
        )
        count = sum(kind is None for kind in kinds)
        message = (
            rf"targets\.task\.data, {split} split: column kind: {count} of {parts.count(split)} "
            r"rows have no label \(null\); write their labels, or leave"
        )
        with pytest.raises(ValueError, match=message):
            shared_of(
                job_of(
                    tmp_path,
                    models["bert"],
                    str(tmp_path / "nulls.parquet"),
                    "classification",
                    {"text": "words", "label": "kind"},
                )
            )


def test_kappa_refuses_texts_whose_order_is_alphabetical():
    columns = {"image": "image", "label": "stage"}
    data = {"uri": "x.parquet", "modality": "image", "columns": columns}
    spec = Target.model_validate({"data": data, "objective": "classification", "metric": "kappa"})
    kind = registry.get("objective", "classification")
    texts, numbers = (
        {"values": values, "labels": ["a", "b", "c"]} for values in ("abc", [1, 2, 3])
    )
    with pytest.raises(ValueError, match=r"targets\.t\.metric: kappa reads .* column stage holds"):
        targets.check_metric("targets.t", spec, kind, texts)
    targets.check_metric("targets.t", spec, kind, numbers)
    targets.check_metric(
        "targets.t", spec, kind, {"values": ["no", "yes"], "labels": ["no", "yes"]}
    )
