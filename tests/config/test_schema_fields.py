"""No field of a job is accepted and ignored: each is read where it has a meaning, by sources and by
targets, and refused where it has none.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from toys import image_files, shared_of, trial_of

from pipeline.config import schema as jobs
from pipeline.config import yaml_loader
from pipeline.config.schema import (
    Change,
    ComponentConfig,
    Data,
    Fanout,
    Finalists,
    Job,
    Select,
    Source,
    Target,
    Train,
)
from pipeline.data.stream import DataWorkers
from pipeline.train import launch, pretrain, source
from pipeline.train.ranks import Ranks
from pipeline.transfer import cached_heads, trial

ROOT = Path(__file__).parents[2]
LOOKS_ONLY = {"make_record", "check_costs", "source"}
"""Functions that write a field down or check it, and do nothing by it."""


PROPERTIES = {"weights", "values_of", "worker_range", "root"}
"""Members of specs through which the library reads their fields; what else stands in the schema
only checks them.
"""


@contextmanager
def reads(*kinds: type) -> Iterator[dict[type, set[str]]]:
    """Which fields of specs are read by the library's own code, but for what only checks, hashes or
    copies them.
    """
    seen: dict[type, set[str]] = defaultdict(set)
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "__getattribute__", _recording(kind, seen[kind]))
        yield seen


def _recording(kind: type, seen: set[str]):
    fields, plain = set(kind.model_fields), kind.__getattribute__

    def get(self: Any, name: str) -> Any:
        if name in fields:
            code = sys._getframe(1).f_code
            inside = "/pipeline/" in code.co_filename
            in_the_schema = code.co_filename in (jobs.__file__, yaml_loader.__file__)
            if (
                inside
                and code.co_name not in LOOKS_ONLY
                and (not in_the_schema or code.co_name in PROPERTIES)
            ):
                seen.add(name)
        return plain(self, name)

    return get


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """One file of rows that a column splits, and a file of each split."""
    folder = tmp_path_factory.mktemp("data")
    made = image_files(folder, {"train": 40, "validation": 24, "test": 24})
    parts = [
        pq.read_table(path).append_column("part", pa.array([split] * pq.read_table(path).num_rows))
        for split, path in made.items()
    ]
    pq.write_table(pa.concat_tables(parts), folder / "rows.parquet", row_group_size=16)
    return {"uri": str(folder / "rows.parquet"), "split_column": "part"}, made


def job_of(folder: Path, rows: dict[str, str], train: dict[str, Any]) -> Job:
    data = {**rows, "modality": "image", "columns": {"image": "picture", "label": "class"}}
    train = {"global_batch": 8, **train}
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "techniques": ["scratch", "linear_probe", "full"],
            "sources": {
                "src": {
                    "data": {**data, "modality": {"image": {"size": 32}}, "decode": "train"},
                    "backbone": "timm/test_vit",
                    "objective": "classification",
                    "train": train,
                }
            },
            "targets": {"task": {"data": data, "objective": "classification", "train": train}},
        }
    )


TRAINS = ({"steps": 2}, {"epochs": 0.1, "optimizer": "sgd"})
"""Between them every field of train is of use."""


def test_a_source_reads_every_field_of_data_and_train(paths, tmp_path):
    with reads(Data, Train, Source) as seen:
        for number, train in enumerate(TRAINS):
            job = job_of(tmp_path / str(number), paths[number], train)
            stage = source.plan_source(job, "src")
            fitted = source.prepare_source(stage)
            pretrain.train_rank(pretrain.rank_job(stage, fitted, DataWorkers(), 1), Ranks())
            launch.make_trainer(stage, launch.plan_resources(stage.spec, 2, 0), {}, False, 1)
    assert set(Data.model_fields) - seen[Data] == set()
    assert set(Train.model_fields) - seen[Train] == set()
    assert set(Source.model_fields) - seen[Source] == set()


@pytest.mark.parametrize(
    "technique", ["full", {"linear_probe": {"solver": "sgd"}}], ids=["full", "heads"]
)
def test_a_target_reads_every_field_of_data_and_train(paths, tmp_path, technique):
    """Heads that train together on cached features read what a trial alone reads."""
    with reads(Data, Train, Target) as seen:
        for number, train in enumerate(TRAINS):
            job = job_of(tmp_path / str(number), paths[number], train)
            shared = shared_of(tmp_path / str(number), job, {})
            one = trial_of(job, shared, technique)
            records = (
                cached_heads.run([one], shared) if technique != "full" else [trial.run(one, shared)]
            )
            assert records[0].status == "done"
    assert set(Data.model_fields) - seen[Data] == set()
    assert set(Train.model_fields) - seen[Train] == set()


# --------------------------------------------- the other parts of a job, in the text of the library

NAMES = {
    Source: {"spec", "stage.spec"},
    Target: {"spec", "target", "target.spec", "data.spec", "stage.spec"},
    Select: {"select", "job.fanout.select"},
    Finalists: {
        "finalists",
        "search_finalists",
        "fanout.search_finalists",
        "job.fanout.search_finalists",
        "self",
    },
    Fanout: {"fanout", "fan", "spec", "job.fanout", "state.job.fanout", "self.spec"},
    Job: {"job", "state.job", "stage.job", "spec", "self"},
}
"""What a spec is called where it is read."""


@cache
def accessed() -> set[tuple[str, str]]:
    """(what, attribute) of every attribute that the library reads, the last two names of what; but
    for the validators of a job.
    """
    out = set()
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        tree = ast.parse(file.read_text())
        if file == Path(jobs.__file__):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    node.body = [
                        item
                        for item in node.body
                        if not (isinstance(item, ast.FunctionDef) and item.name.startswith("_"))
                    ]
        out |= {
            (ast.unparse(node.value), node.attr)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    return out


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
def test_every_field_of_the_other_parts_is_read(kind):
    found = accessed()
    unread = [
        name
        for name in kind.model_fields
        if not any(
            attribute == name
            and any(of == known or of.endswith(f".{known}") for known in NAMES[kind])
            for of, attribute in found
        )
    ]
    assert unread == [], (
        f"{kind.__name__}: nothing reads these fields: read them, or refuse them and remove them"
    )


def test_every_part_of_a_job_is_looked_at():
    """A new model of the schema comes into one of these tests."""
    specs = {
        thing
        for thing in vars(jobs).values()
        if isinstance(thing, type) and issubclass(thing, jobs.Spec) and thing is not jobs.Spec
    }
    assert specs == {Change, ComponentConfig, Data, Train, *NAMES}


# -------------------------------------------------------------- refused where nothing would read it

FILES = {
    "train": "a.parquet",
    "modality": "image",
    "columns": {"image": "picture", "label": "class"},
}
CHECKPOINT = {"backbone": "bundle:somewhere"}


@pytest.mark.parametrize(
    ("kind", "words", "field", "why"),
    [
        (Train, {"momentum": 0.5}, "momentum", "the optimizer is adamw, which does not read it"),
        (
            Train,
            {"optimizer": "sgd", "beta2": 0.5},
            "beta2",
            "the optimizer is sgd, which does not read it",
        ),
        (
            Data,
            {**FILES, "validation": "b.parquet", "validation_fraction": 0.3},
            "validation_fraction",
            "nothing is held out where validation files are given",
        ),
        (
            Data,
            {**FILES, "test": "b.parquet", "test_fraction": 0.3},
            "test_fraction",
            "nothing is held out where test files are given",
        ),
        (
            Data,
            {**FILES, "split_values": {"train": ["a"]}},
            "split_values",
            "they are values of split_column, and there is none",
        ),
        (
            Source,
            {**CHECKPOINT, "train": {"steps": 5}},
            "train",
            "a source without data is a checkpoint as it is, and nothing is trained",
        ),
        (Source, {**CHECKPOINT, "objective": "classification"}, "objective", "nothing is trained"),
        (Source, {**CHECKPOINT, "workers": 2}, "workers", "nothing is trained"),
        (
            Source,
            {
                "data": FILES,
                "backbone": "timm/test_vit",
                "objective": "mae",
                "probe": {**FILES, "shuffle": "blocks"},
            },
            "probe.shuffle",
            "never shuffled",
        ),
        (
            Source,
            {
                "data": FILES,
                "backbone": "timm/test_vit",
                "objective": "mae",
                "probe": {**FILES, "decode": "train"},
            },
            "probe.decode",
            "into memory",
        ),
        (
            Fanout,
            {"scheduler": "asha"},
            "scheduler",
            "trials is 1, so that nothing is drawn, and asha stops draws alone",
        ),
        (
            Fanout,
            {"search_finalists": {"top": 5}},
            "search_finalists",
            "trials is 1, so that nothing is drawn",
        ),
        (
            Target,
            {"data": {**FILES, "weight": 2.0}, "objective": "classification"},
            "data.weight",
            "weights mix the corpora of a source",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_without_a_meaning_is_refused(kind, words, field, why):
    with pytest.raises(ValidationError) as error:
        kind.model_validate(words)
    problems = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.value.errors()]
    assert any(
        place == field and why in text and "leave it out" in text for place, text in problems
    ), problems


def test_what_asha_cannot_stop_is_refused():
    target = {"data": FILES, "objective": "classification", "workers": 2}
    fan = {"trials": 2, "search": {"lr": [1e-3, 1e-2]}, "scheduler": "asha"}
    words = {"name": "toy", "sources": {"a": CHECKPOINT}, "targets": {"t": target}, "fanout": fan}
    with pytest.raises(ValidationError, match="asha stops no trial of several ranks"):
        Job.model_validate(words)
    Job.model_validate({**words, "targets": {"t": {**target, "workers": 0}}})


def test_a_job_that_was_written_out_whole_is_read_again(paths, tmp_path):
    """Every field stands in it, with its default: none of them is refused."""
    job = job_of(tmp_path, paths[0], TRAINS[0])
    assert Job.model_validate(job.model_dump(mode="json")) == job
