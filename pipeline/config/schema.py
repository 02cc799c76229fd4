"""The parts of a job, typed and frozen, with what they refuse, and their JSON Schema.

`yaml_loader` reads a job from YAML and has the rules of the text. Nothing here imports torch or
Ray: every mistake in a job file is reported at once, before anything starts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from pipeline.config import registry
from pipeline.io import s3, storage
from pipeline.io.json_values import Json, JsonObject

CHECKPOINT_PREFIXES = ("bundle:", "file:", "file-by-order:", "hf:", "hf-hub:", "timm-hub:")
"""Prefixes of an existing checkpoint.

A bundle; a safetensors or state-dict file, by its names or by order and shape where they differ; a
Hugging Face folder; a name on a hub.
"""
COMPONENT_FIELDS = {
    "modality": "modality",
    "backbone": "model",
    "objective": "objective",
    "technique": "technique",
    "techniques": "technique",
    "baselines": "baseline",
    "tracking": "tracker",
}
"""Fields that name components, and of which kind."""
HUBS = ("hf-hub", "timm-hub")
"""Prefixes that name no place on a disk."""


class JobError(ValueError):
    """Everything that is wrong with a job file, one line a problem."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class Spec(registry.Strict):
    """Base of every part of a job.

    Undeclared fields are refused, true and false are no numbers.
    """


Whole = Annotated[int, BeforeValidator(registry.reject_bool)]
Number = Annotated[float, BeforeValidator(registry.reject_bool)]
"""A number in a list, where pydantic alone would read true as 1."""


class Problems(list[tuple[tuple[str | int, ...], str]]):
    """What is wrong with parts of a spec: the place of each within it, and a text."""

    def add(self, place: tuple[str | int, ...], text: str) -> None:
        self.append((place, text))


def _refuse(problems: list[tuple[tuple[str | int, ...], str]]) -> None:
    """Raise the problems of parts of a spec, each at its own place."""
    if problems:
        raise ValidationError.from_exception_data(
            "job",
            [
                InitErrorDetails(
                    type=PydanticCustomError("value_error", "{text}", {"text": text}),
                    loc=loc,
                    input={},
                )
                for loc, text in problems
            ],
        )


class ComponentConfig(Spec):
    """A registered name with its options: ``full`` or ``{lp_ft: {probe_share: 0.3}}``."""

    name: str = Field(description="a registered name")
    options: dict[str, Any] = Field(
        default_factory=dict, description="the options that this name declares"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Json) -> JsonObject:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            return {"name": name, "options": options or {}}
        if isinstance(value, dict) and set(value) <= {"name", "options"}:
            return value
        raise ValueError("write a name, or one name with its options: {name: {option: value}}")

    def __str__(self) -> str:
        return self.name + (json.dumps(self.options, sort_keys=True) if self.options else "")


FULL = ComponentConfig(name="full")
"""The technique of a source that names none: every layer trains from the first step."""


@dataclass(frozen=True)
class Registered:
    """Annotation of a text that is a registered name; the JSON Schema lists the names."""

    kind: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        def check(name: str) -> str:
            return registry.entry(self.kind, name).name

        return no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> Any:
        return {**handler(core), "enum": registry.names(self.kind)}


Uris = str | list[str]
DOMAINS = {
    "vision": ("image",),
    "text": ("text",),
    "speech": ("audio",),
    "healthcare": ("events", "table", "series"),
    "robotics": ("trajectory", "series"),
}
"""Each domain of jobs/ with its modalities; series are the sensors of patients and of robots."""


def _fraction(value: float | int) -> float | int:
    """Check a label fraction."""
    is_no_label = isinstance(value, int) and value == 0
    if not is_no_label and (not value > 0 or (isinstance(value, float) and value > 1)):
        raise ValueError(
            "a share is above 0 and at most 1.0; rows per class are an integer of at least 1, and "
            "the integer 0 is no label at all"
        )
    return value


DataFormat = Literal[
    "auto", "parquet", "images", "audio", "jsonl", "csv", "text", "paragraphs", "documents"
]
"""How files of data are read."""
OutputFormat = Literal["parquet", "csv", "jsonl"]
"""How predictions and features are written."""


class Data(Spec):
    """Where rows come from and what they mean.

    Either ``uri`` (split by a column or by fractions) or ``train`` with files of its own.
    """

    uri: Uris | None = Field(
        None,
        description="file, folder, glob or list of them, local, s3://, https://, hf://, gs:// or "
        "az://; split by split_column or by the fractions",
    )
    train: Uris | None = Field(
        None, description="files of the training split, if the data are already split"
    )
    validation: Uris | None = Field(
        None, description="files of the validation split; left out: validation_fraction of train"
    )
    test: Uris | None = Field(None, description="files of the test split")
    modality: ComponentConfig = Field(description="image, text, ...: how a row becomes tensors")
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="role to column name, e.g. {image: image, label: label}, for the roles that "
        "modality and objective read (onetomany modalities NAME and objectives NAME list them)",
    )
    format: DataFormat = Field(
        "auto",
        description="auto: by file name. Plain text: each line is a row (text), rows are "
        "separated by blank lines (paragraphs), or each file is a row (documents), whose folder "
        "is its label (column label). Recordings longer than 30 s are cut at silence (audio)",
    )
    identity: Literal["content", "stat"] = Field(
        "content",
        description="how a changed file is found. content: every file is read once and hashed, "
        "also those that rows name (on S3: by the ETag); stat: by size and time of change, for "
        "very large corpora",
    )
    where: dict[str, list[str | int | float | bool]] = Field(
        default_factory=dict, description="keep the rows whose column has one of these values"
    )
    split_column: str | None = Field(
        None, description="a column with each row's split; it is used as it is"
    )
    split_values: dict[Literal["train", "validation", "test"], list[str]] = Field(
        default_factory=lambda: {
            "train": ["train"],
            "validation": ["validation", "valid", "val", "dev"],
            "test": ["test"],
        },
        description="which values of split_column mean which split; a split that is not listed "
        "has the rows whose value is its own name, unless that value is listed for another split",
    )
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the training rows held out for validation (by hash of the row or "
        "group), if there is no other validation split",
    )
    test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the rows held out for the test, if there is no other test split. A "
        "target needs test rows: from this, test, split_column or folds",
    )
    split_seed: int = Field(
        0,
        ge=0,
        exclude_if=lambda seed: seed == 0,  # splits by seed 0 have the key that they always had
        description="another seed holds out other rows by validation_fraction and test_fraction: "
        "with a small test split, which rows are held out may matter more than the technique",
    )
    group: str | None = Field(
        None,
        description="a column (patient, speaker) whose values never cross splits; without it, the "
        "pieces of one recording and the rows of one image_id stay together in random splits and "
        "folds",
    )
    more: list[Data] = Field(
        default_factory=list["Data"],
        description="further corpora with columns of the same names and types; their splits are "
        "joined to these",
    )
    weight: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="for sources with several corpora: share of the training rows that is drawn "
        "from this one, relative to the weights of the others, whatever their sizes. Each corpus "
        "is read to its end before its next epoch. Give every corpus a weight, or none. "
        "Validation is unweighted",
    )
    max_bad_rows: float = Field(
        0.01,
        ge=0,
        le=1,
        description="the run stops if a larger share of the rows cannot be decoded or learned from",
    )
    decode: Literal["auto", "memory", "workers", "train", "device"] = Field(
        "auto",
        description="where rows are decoded. memory: once, into shared memory; workers: in Ray "
        "Data workers; train: in the training process; device: images, by the GPU's JPEG decoder; "
        "auto: sources in Ray Data workers, targets in memory if they fit. workers and device: "
        "sources only. A run goes on if it is changed, though a GPU's decoder gives slightly other "
        "pixels",
    )
    shuffle: Literal["auto", "rows", "blocks"] = Field(
        "auto",
        description="order of the training rows. rows: a full permutation; blocks: Parquet's row "
        "groups are permuted, and the rows within each; auto: rows for files of up to 256 MiB and "
        "for a target in memory, else blocks",
    )

    @model_validator(mode="after")
    def _one_origin(self):
        if (self.uri is None) == (self.train is None):
            raise ValueError(
                "give either uri (one set of files) or train (with validation and test), not both"
            )
        if self.train is None and (self.validation or self.test):
            raise ValueError(
                "validation and test files need train; with uri use split_column or the fractions"
            )
        problems = Problems()
        if self.validation is not None and self.validation_fraction:
            problems += _unused_field_problems(
                self,
                ["validation_fraction"],
                "nothing is held out where validation files are given",
            )
        if self.test is not None:
            problems += _unused_field_problems(
                self, ["test_fraction"], "nothing is held out where test files are given"
            )
        holds_out = (self.validation is None and self.validation_fraction) or (
            self.test is None and self.test_fraction
        )
        if not holds_out:
            problems += _unused_field_problems(
                self, ["split_seed"], "no rows are held out by validation_fraction or test_fraction"
            )
        if self.split_column is None:
            problems += _unused_field_problems(
                self, ["split_values"], "they are values of split_column, and there is none"
            )
        _refuse(problems)
        named = [value for values in self.split_values.values() for value in values]
        if twice := sorted({value for value in named if named.count(value) > 1}):
            raise ValueError(
                f"split_values: {', '.join(twice)} is named twice; a row is in one split"
            )
        return self

    @property
    def weights(self) -> tuple[float | None, ...]:
        """The weights of the first corpus and of each that is joined to it."""
        return (self.weight, *(part.weight for part in self.more))

    def values_of(self, split: str) -> list[str]:
        """Return the values of ``split_column`` that mean a split."""
        named: dict[Any, list[str]] = {**self.split_values}
        others = {value for name, values in named.items() if name != split for value in values}
        return named.get(split, [value for value in (split,) if value not in others])

    @model_validator(mode="after")
    def _joinable(self):
        problems = Problems()
        for i, part in enumerate(self.more):
            if part.more:
                problems.add(
                    ("more", i, "more"),
                    "corpora are joined to the first one alone: list all of them there",
                )
            if part.modality.name != self.modality.name or part.modality.options not in (
                {},
                self.modality.options,
            ):
                text = (
                    f"it is {part.modality}, that of the first rows {self.modality}; joined rows "
                    "are read alike, say the same"
                )
                problems.add(("more", i, "modality"), text)
            if part.columns not in ({}, self.columns):
                problems.add(
                    ("more", i, "columns"),
                    f"they are {part.columns}, those of the first rows {self.columns}: "
                    "leave them out, or say the same",
                )
        lacking = [i for i, weight in enumerate(self.weights) if weight is None]
        if 0 < len(lacking) <= len(self.more):
            problems += [
                (
                    (*(("more", i - 1) if i else ()), "weight"),
                    "other corpora of these rows have a weight: give this one its own, or none of "
                    "them any",
                )
                for i in lacking
            ]
        _refuse(problems)
        return self


class Change(Spec):
    """Settings that a training has from a step on."""

    step: int = Field(ge=1, description="number of the first step that has them, counted from 0")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate; left out: as in the step before"
    )
    weight_decay: float | None = Field(None, ge=0, description="left out: as in the step before")


class Train(Spec):
    """How long and how to train.

    The same loop reads it for pretraining and for every fine-tune.
    """

    steps: int | None = Field(None, ge=1, description="optimiser steps; give steps or epochs")
    epochs: float | None = Field(
        None,
        gt=0,
        description="passes over the training rows; give steps or epochs; left out: one epoch",
    )
    global_batch: int = Field(
        64, ge=1, description="rows in each step, over all ranks together, however many there are"
    )
    batch_cost: float | None = Field(
        None,
        gt=0,
        description="instead of global_batch: each step takes rows of similar length, as many as "
        "have this total cost when padded to the longest. The cost is in seconds (audio), events "
        "(events) or steps (trajectory); other modalities have none",
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="rows in each forward pass on one rank; gradients are accumulated; left out: "
        "all rows at once",
    )
    canonical_shards: int | None = Field(
        None,
        ge=1,
        description="parts of the training rows, each with a random order of its own, which are "
        "divided among the ranks: so the order of rows is the same for any number of ranks up to "
        "this; left out: 8, or the largest number of ranks if that is more; with mixup or cutmix "
        "at most half the rows of a forward pass",
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw (fused) or sgd with momentum (fused)"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd momentum")
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw beta 1")
    beta2: float = Field(0.999, ge=0, lt=1, description="adamw beta 2")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="decoupled, with sgd too (SGDW); not applied to norms, biases and other "
        "vectors",
    )
    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps with linear warm-up")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    changes: tuple[Change, ...] = Field(
        (),
        exclude_if=lambda changes: not changes,  # hashes are those from before there were any
        description="learning rate and weight decay from a step on, e.g. [{step: 40, lr: 3e-4}]; "
        "warm-up and schedule go on as if nothing had changed. searcher pbt finds such changes",
    )
    clip_norm: float | None = Field(
        1.0, gt=0, description="largest global gradient norm; null: off"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 autocast on a GPU that has it, else fp32"
    )
    compile: bool = Field(False, description="torch.compile the backbone and its objective")
    channels_last: bool = Field(
        False, description="channels-last memory format for convolutions (GPU)"
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the weights, used for evaluation "
        "and the bundle",
    )
    augment: bool = Field(
        True, description="the modality's augmentation, on the device, seeded by row"
    )
    eval_every_steps: int | None = Field(
        None, ge=1, description="steps between validations; left out: five validations in a run"
    )
    checkpoint_every_steps: int | None = Field(
        None, ge=1, description="steps between resume points; left out: 1000"
    )
    checkpoint_every_minutes: float | None = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="also write a resume point when the newest is this many minutes old; null: by "
        "steps alone",
    )
    log_every_steps: int = Field(10, ge=1, description="steps between lines of metrics in the log")
    keep: Literal["best", "last"] = Field(
        "best", description="which weights the bundle has: the best on validation, or the last"
    )
    patience: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda patience: patience is None,  # hashes are those from before there was one
        description="stop after this many validations in a row without a better primary metric; "
        "left out: never. The learning-rate schedule is made for all steps in any case. "
        "Techniques in phases stop in their last one. Ignored at label fraction 0 and by "
        "objectives that compare rows: they keep the last weights",
    )
    max_bad_steps: int = Field(
        5,
        ge=1,
        description="the run stops after this many non-finite steps in a row; each of them is "
        "skipped",
    )
    trace_rows: bool = Field(
        False,
        description="write the row ids of every step beside the metrics (an audit of the data "
        "order); local storage only",
    )

    @model_validator(mode="after")
    def _one_length(self):
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.batch_cost is not None and "global_batch" in self.model_fields_set:
            raise ValueError(
                "give global_batch (rows a step) or batch_cost (what the rows of a step cost "
                "in all), not both"
            )
        unread = ("momentum",) if self.optimizer == "adamw" else ("beta1", "beta2")
        _refuse(
            _unused_field_problems(
                self, unread, f"the optimizer is {self.optimizer}, which does not read it"
            )
        )
        _refuse(_change_problems(self))
        return self


def _change_problems(train: Train) -> Problems:
    """Return what is wrong with the changes of a training."""
    problems, before = Problems(), 0
    for number, change in enumerate(train.changes):
        place = ("changes", number)
        if change.step <= before:
            problems.add((*place, "step"), f"{change.step}: name the steps in rising order")
        before = change.step
        if train.steps is not None and change.step >= train.steps:
            problems.add((*place, "step"), f"{change.step}: the training has {train.steps} steps")
        if change.lr is None and change.weight_decay is None:
            problems.add(place, "say which lr or weight_decay the training has from this step on")
        if change.weight_decay is not None and not train.weight_decay:
            problems.add(
                (*place, "weight_decay"),
                "it changes only where the training begins with a weight_decay above 0",
            )
    return problems


_INTEGER: tuple[Any, ...] = (int, int | None)
_CHANGE_NOTHING = {"log_every_steps", "checkpoint_every_steps", "checkpoint_every_minutes"}
NUMERIC = tuple(
    name
    for name, field in Train.model_fields.items()
    if field.annotation in (*_INTEGER, float, float | None) and name not in _CHANGE_NOTHING
)
"""Fields of train that can be searched: numbers that change what is learned."""


def with_hyper_parameters(train: Train, hyper: Mapping[str, Any]) -> Train:
    """Return the train spec with some fields set.

    Steps replace epochs, and epochs replace steps.

    Raises:
        ValidationError: A field is unknown, or does not take its value.
    """
    lengths = ("steps", "epochs") if {"steps", "epochs"} & hyper.keys() else ()
    own = train.model_dump(exclude=None if train.batch_cost is None else {"global_batch"})
    return Train.model_validate({**own, **dict.fromkeys(lengths), **hyper})


def round_hyper_parameter(name: str, value: float) -> float:
    """Return a value of a search as it is drawn.

    It is whole for a field of whole numbers, else it has six digits.
    """
    return (
        round(value) if Train.model_fields[name].annotation in _INTEGER else float(f"{value:.6g}")
    )


def hyper_parameter_text(name: str, value: Any) -> str:
    """Return a hyper-parameter as texts show it; changes as ``from step 40 lr 0.003``."""
    if name != "changes":
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    changes: list[str] = []
    for change in value:
        changed = [f"{key} {one:.4g}" for key, one in change.items() if key != "step"]
        changes.append(f"from step {change['step']} {' and '.join(changed)}")
    return ", ".join(changes)


def search_problems(
    search: Mapping[str, list[float]], trains: Iterable[Train]
) -> list[tuple[str, str]]:
    """Return (field, what is wrong) of values of a search that a target's train spec does not take.

    The values are the ends of ranges, and the choices.
    """
    specs = list(trains) or [Train.model_validate({})]
    out: dict[tuple[str, str], None] = {}
    for name, values in search.items():
        for value in values:
            draw = round_hyper_parameter(name, value)
            for train in specs:
                try:
                    with_hyper_parameters(train, {name: draw})
                except ValidationError as error:
                    shown = f"{value}" if draw == value else f"{value} (drawn as {draw})"
                    out[name, f"{shown} is refused: {registry.message_of(error)}"] = None
    return list(out)


def changed_fields(spec: BaseModel) -> set[str]:
    """Return the names of the fields that do not have their default value.

    A field without a meaning at its position is rejected only when it is changed: a program may
    write out a spec with every field, and defaults do no harm.
    """
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(spec).model_fields.items()
    }
    return {name for name, default in defaults.items() if getattr(spec, name) != default}


def _unused_field_problems(
    spec: BaseModel, fields: Iterable[str], why: str, at: tuple[str | int, ...] = ()
) -> list[tuple[tuple[str | int, ...], str]]:
    """Return a problem for each of the fields that is changed although nothing would read it."""
    return [
        ((*at, name), f"{why}: leave it out") for name in sorted(changed_fields(spec) & set(fields))
    ]


def _weight_problems(
    data: Data | None, at: str, why: str
) -> list[tuple[tuple[str | int, ...], str]]:
    """Return a problem for every weight of a data spec whose corpora are not drawn by weights."""
    weights = data.weights if data is not None else ()
    return [
        (
            (at, *(("more", i - 1) if i else ()), "weight"),
            f"weights mix the corpora of a source; {why}: leave it out",
        )
        for i, weight in enumerate(weights)
        if weight is not None
    ]


class Source(Spec):
    """What to pretrain, or an existing checkpoint to start from.

    A checkpoint needs neither data nor train.
    """

    data: Data | None = Field(None, description="the source corpus")
    backbone: ComponentConfig = Field(
        description="library/model, e.g. timm/resnet18 or {transformers/bert: {layers: 4}}; or "
        "bundle:URI, hf:FOLDER, hf-hub:NAME, timm-hub:NAME"
    )
    init: str | None = Field(
        None,
        description="weights to start from: bundle:URI, file:PATH (safetensors or state dict), "
        "hf:FOLDER; file-by-order:PATH pairs tensors by order and shape, for files with other "
        "tensor names",
    )
    modality: ComponentConfig | None = Field(
        None,
        description="for a checkpoint without data: how its rows are read, e.g. {image: {mean: "
        "imagenet, std: imagenet, size: 224, crop_share: 0.9, "
        "interpolation: bicubic}}; left out: what the checkpoint says, else what timm says of its "
        "model (of these weights, if the backbone is timm/NAME.TAG)",
    )
    objective: ComponentConfig | None = Field(None, description="classification, mlm, clm, ...")
    technique: ComponentConfig = Field(
        FULL,
        # hashes of jobs and sources are those from before sources had techniques
        exclude_if=lambda technique: technique == FULL,
        description="how a source that continues a checkpoint is trained: full, lora, ...; "
        "modules that a technique adds are merged into the bundle's weights. A source with random "
        "weights always trains every layer",
    )
    probe: Data | None = Field(
        None,
        description="labelled rows for the kNN accuracy of the backbone's features at every "
        "validation: rows of the validation split are classified by the nearest training rows; "
        "columns: the input and label",
    )
    train: Train = Field(
        default_factory=lambda: Train.model_validate({}), description="how to pretrain"
    )
    workers: int | tuple[Whole, Whole] = Field(
        1,
        description="processes that train it together (ranks of DDP); [2, 8]: elastic, from 2 to 8",
    )
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="logical CPUs for each rank; left out: 1, or less if there are few CPUs",
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="GPUs for each rank; left out: 1 if there are GPUs, or an equal share if "
        "there are fewer GPUs than ranks",
    )
    max_failures: int = Field(
        3, ge=-1, description="restarts from the newest resume point before giving up; -1: no limit"
    )

    @model_validator(mode="after")
    def _check_fields_fit(self):
        self._check_start()
        self._check_probe()
        _refuse(self._unread_fields())
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(
                f"workers {self.workers} must be at least 1, and [fewest, most] when elastic"
            )
        return self

    def _check_start(self) -> None:
        """Raise ValueError unless the source has data, or one checkpoint to start from."""
        is_checkpoint = self.backbone.name.startswith(CHECKPOINT_PREFIXES)
        if self.data is not None and self.objective is None:
            raise ValueError(
                "a source with data needs an objective (classification, mlm, clm, ...)"
            )
        if self.data is not None and self.modality is not None:
            text = (
                "it is for a checkpoint without data; these data say how their rows are read "
                "(data.modality): leave it out"
            )
            _refuse([(("modality",), text)])
        if self.data is None and self.init is None and not is_checkpoint:
            raise ValueError(
                "a source needs data to pretrain on, or a checkpoint: init, or a backbone "
                f"that starts with {', '.join(CHECKPOINT_PREFIXES)}"
            )
        if self.init is not None and is_checkpoint:
            raise ValueError(
                f"init {self.init} and backbone {self.backbone.name} are both checkpoints: "
                "start from one of them; beside init the backbone is "
                "library/model"
            )

    def _check_probe(self) -> None:
        """Raise ValueError for a probe without data, or of another modality than the data."""
        if self.probe is not None and (
            self.data is None or self.probe.modality.name != self.data.modality.name
        ):
            raise ValueError(
                "a probe tries the backbone while it is pretrained: it needs data beside it, "
                "and the same modality"
            )

    def _unread_fields(self) -> list[tuple[tuple[str | int, ...], str]]:
        """Return the fields that are stated and that nothing would read, each with the reason."""
        problems = Problems()
        if self.data is not None and self.data.weight is not None and not self.data.more:
            text = (
                "it is the share of a corpus beside others (data.more), and there is only one "
                "corpus here: leave it out"
            )
            problems.add(("data", "weight"), text)
        if self.probe is not None:
            problems += _unused_field_problems(
                self.probe,
                ["decode", "shuffle"],
                "the rows of a probe are decoded into memory, and never shuffled",
                ("probe",),
            )
            problems += _unused_field_problems(
                self.probe,
                ["test_fraction"],
                "a probe has training and validation rows",
                ("probe",),
            )
        if self.data is None:
            only_with_data = (
                "objective",
                "technique",
                "train",
                "workers",
                "cpus_per_worker",
                "gpus_per_worker",
                "max_failures",
            )
            problems += _unused_field_problems(
                self,
                only_with_data,
                "a source without data is a checkpoint as it is, and nothing is trained",
            )
        problems += _weight_problems(self.probe, "probe", "the rows of a probe are read whole")
        return problems

    @property
    def modality_name(self) -> str | None:
        """The modality of its rows; None for a checkpoint whose job does not say it."""
        modality = self.data.modality if self.data is not None else self.modality
        return None if modality is None else modality.name

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest and the most ranks."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers


class Target(Spec):
    """One task to adapt the backbones to."""

    data: Data = Field(description="the target's rows")
    objective: ComponentConfig = Field(description="classification, ...")
    metric: Annotated[str, Registered("metric")] | None = Field(
        None, description="primary metric; left out: the objective's first"
    )
    label_fractions: list[
        Annotated[float | int, BeforeValidator(registry.reject_bool), AfterValidator(_fraction)]
    ] = Field(
        default_factory=lambda: [1.0],
        description="a number with a point: share of the training rows (stratified, nested), 1.0 "
        "is all; a whole number: rows of each class; 0: no label of the target, for the "
        "techniques that need none (dann, pseudo_labels, ...). Every choice is then made on the "
        "validation rows of the source",
    )
    unlabelled: Data | None = Field(
        None,
        # a target without any has the key that it always had
        exclude_if=lambda unlabelled: unlabelled is None,
        description="rows without labels, for techniques that adapt to them (dann, coral, "
        "pseudo_labels, adabn, ...); left out: the training rows, without their labels",
    )
    folds: int | None = Field(
        None,
        ge=2,
        exclude_if=lambda folds: folds is None,  # a target without any has the key it always had
        description="cross-validation with this number of folds, stratified by class; groups stay "
        "together. Each fold is the test split of trials of its own, whose validation split is "
        "validation_fraction of the other rows. The results are over the test rows of all folds. "
        "The data must have no validation or test rows of their own",
    )
    fold: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda fold: fold is None,
        description="run only this fold, with the same trials as in a job that runs all; left "
        "out: all folds",
    )
    sources: list[str] | None = Field(
        None, description="which sources to adapt; left out: all of the same modality"
    )
    techniques: list[ComponentConfig] | None = Field(
        None, description="techniques for this target alone; left out: the job's"
    )
    train: Train = Field(
        default_factory=lambda: Train.model_validate({}), description="how to fine-tune"
    )
    drop_overlap: Literal["none", "exact", "near", "group"] = Field(
        "none",
        description="leave out test rows that are also in a source's training rows. exact: the "
        "same content, or another cut of the same record; near: also nearly the same images, "
        "texts and recordings (perceptual hash, MinHash of words, perceptual hash of log-mels); "
        "group: also rows of the same group (patient, speaker). The report counts all of these in "
        "any case",
    )
    subgroups: list[str] = Field(
        default_factory=list,
        description="columns of the test rows (sex, age_band, static.CareUnit): "
        "the report and the results also give the primary metric for each of their values",
    )
    workers: int = Field(
        0,
        ge=0,
        description="processes that train a trial together (ranks of DDP); 0: the trial's own "
        "process alone. With another number the trials run again, because batch norm sees the rows "
        "of one process",
    )

    @model_validator(mode="after")
    def _one_row_beside_shares(self):
        """Refuse an integer 1 beside shares.

        It would be one row a class, and nearly always means all rows. Where 1.0 is in the list too,
        it is not refused.
        """
        fractions = self.label_fractions
        shares = [fraction for fraction in fractions if isinstance(fraction, float)]
        mistaken = [
            place
            for place, fraction in enumerate(fractions)
            if isinstance(fraction, int) and fraction == 1
        ]
        if shares and 1.0 not in shares and mistaken:
            problem = (
                "1 is one row of each class here, and values beside it are shares: write 1.0 "
                "for all rows (with 1.0 in the list, 1 is taken as one row "
                "of each class)"
            )
            _refuse([(("label_fractions", place), problem) for place in mistaken])
        return self

    @model_validator(mode="after")
    def _unweighted(self):
        _refuse(
            _weight_problems(
                self.data,
                "data",
                "a target's rows are trained on as they are, and its label fractions are "
                "shares of them",
            )
        )
        return self

    @model_validator(mode="after")
    def _cut_in_folds(self):
        """Refuse what folds have no use for: they make the splits, and test every row."""
        problems = Problems()
        if self.folds is None:
            nothing = "it is one of several folds, and folds is not given"
            _refuse(_unused_field_problems(self, ["fold"], nothing))
            return self
        if self.fold is not None and self.fold > self.folds:
            problems.add(("fold",), f"there are {self.folds} folds, numbered from 1")
        problems += _unused_field_problems(
            self.data,
            ["validation", "test", "split_column", "test_fraction"],
            "folds test every row once and hold out validation_fraction of the others (where: "
            "keeps the rows of one declared split)",
            ("data",),
        )
        problems += _unused_field_problems(
            self.data, ["more"], "folds are cut from one corpus: name its files in uri", ("data",)
        )
        problems += _unused_field_problems(
            self,
            ["unlabelled"],
            "its rows are read in each fold, and a fold's test rows may be among them",
        )
        _refuse(problems)
        return self

    @model_validator(mode="after")
    def _unlabelled_rows(self):
        """Refuse what means nothing for rows that are all read, and never scored."""
        given = self.unlabelled
        if given is None:
            return self
        place = "unlabelled"
        why = "unlabelled rows are read as they are"
        problems = Problems(_weight_problems(given, place, why))
        for name in ("validation", "test"):
            if getattr(given, name) is not None:
                problems.add(
                    (place, name), "all unlabelled rows are trained on: name the files in uri"
                )
        problems += _unused_field_problems(
            given,
            ["split_column", "validation_fraction", "test_fraction", "decode", "max_bad_rows"],
            "all unlabelled rows are trained on, as those of data are",
            (place,),
        )
        own = self.data.modality
        if given.modality.name != own.name or given.modality.options not in ({}, own.options):
            problems.add(
                (place, "modality"),
                f"it is {given.modality}, that of data {own}; unlabelled rows are read as the "
                "target's are: say the same",
            )
        _refuse(problems)
        return self


class Select(Spec):
    """Fan out only what promises most: the best-scored sources, the pairs that a budget finds."""

    score: Annotated[str, Registered("score")] = Field(
        "logme",
        description="transferability score of a source for the target's training rows, as "
        "`onetomany score` prints them; a source for which it is not defined comes last",
    )
    top: int | None = Field(
        2,
        ge=1,
        description="how many sources to keep for each target; null: all, as when only a budget "
        "is given",
    )
    budget: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda budget: budget is None,  # hashes are those from before there was one
        description="trials that the whole job may spend, divided among targets and label "
        "fractions by successive halving: every source is tried with every technique with a ninth "
        "of the steps, the better pairs with all steps, and the best with all seeds. A shorter "
        "trial counts by its share of the steps. Scratch counts and is never left out. Baselines "
        "and techniques that train nothing do not count. With score or top only the best-scored "
        "sources are tried",
    )

    @model_validator(mode="before")
    @classmethod
    def _all_sources(cls, given: Json) -> Json:
        """Keep all sources where a budget is given and no choice by score."""
        if not isinstance(given, dict) or given.get("budget") is None:
            return given
        return given if {"score", "top"} & given.keys() else {**given, "top": None}

    @model_validator(mode="after")
    def _chooses(self):
        if self.top is None and self.budget is None:
            why = "null keeps every source, so select does nothing: remove it, or set budget"
            _refuse([(("top",), why)])
        return self


class Finalists(Spec):
    """How the best draws of a search are tried again before one is chosen; the same for scratch."""

    top: int = Field(
        3,
        ge=1,
        description="how many of an entry's best draws are tried again; 1: none, the best draw "
        "with one seed is chosen",
    )
    seeds: int = Field(
        2,
        ge=0,
        description="further seeds for each of these draws; the one with the best mean over all "
        "its seeds on validation rows is chosen",
    )

    def further_trials(self, draws: int) -> int:
        """Return the number of further trials of an entry with this number of ``draws``."""
        tried_again = min(self.top, draws)
        return tried_again * self.seeds if tried_again > 1 else 0


def _searchable(name: str) -> str:
    """Check that a field of train can be searched."""
    if name not in Train.model_fields:
        raise ValueError(f"unknown field of train; {registry.nearest(name, NUMERIC)}")
    if name not in NUMERIC:
        raise ValueError(
            f"{name} of train is no number and cannot be searched; these can: {', '.join(NUMERIC)}"
        )
    return name


MIN_POPULATION_TRIALS = 7
"""The fewest trials of ``searcher: pbt``."""
POPULATION_CONSTANTS = (
    "steps",
    "epochs",
    "global_batch",
    "batch_cost",
    "eval_every_steps",
    "patience",
)
"""What ``searcher: pbt`` cannot search, since its members are compared at the same steps."""


class Fanout(Spec):
    """How the trials are drawn and run."""

    seeds: int = Field(
        3,
        ge=1,
        description="final runs of every entry; a seed decides initialisation, row order and the "
        "choice of labels",
    )
    trials: int = Field(
        1,
        ge=1,
        description="draws of hyper-parameters from search, for every entry and for scratch; the "
        "best ones on validation rows are tried again (search_finalists)",
    )
    search: Literal["auto"] | dict[Annotated[str, AfterValidator(_searchable)], list[Number]] = (
        Field(
            default_factory=dict,
            json_schema_extra={"propertyNames": {"enum": list(NUMERIC)}},
            description="numeric field of train to [low, high] (log-uniform), or to 3 or more "
            "values to choose from; needs trials above 1. Drawn steps replace a target's epochs, "
            "and drawn epochs its steps. auto: each technique draws from its own ranges of lr "
            "(relative to the target's) and of its options; options that the job states stay as "
            "they are, and the first draw is the job's own settings",
        )
    )
    searcher: Literal["random", "optuna", "hyperopt", "bayesopt", "pbt"] = Field(
        "random",
        # hashes of jobs are those from before there was a choice
        exclude_if=lambda value: value == "random",
        description="random: independent draws. optuna, hyperopt and bayesopt are searchers of "
        "Ray Tune, each with an extra of its name: the first quarter of the settings is random, "
        "and each further quarter is proposed from the validation values of the entry's earlier "
        "trials. optuna: tree-structured Parzen estimator over all settings together; hyperopt: "
        "the same estimator, each setting independently of the others; bayesopt: Gaussian process, "
        "for ranges alone (a technique whose own search has choices, as lora has, is refused). "
        "pbt: population-based training, which needs no extra. Settings are drawn as with random, "
        "and lr and weight_decay change in the course of a training (train.changes): three times, "
        "the worse members of a population are replaced by children of the better. Each child is "
        "one of the trials. "
        "A technique that searches neither lr nor weight_decay is searched as with random",
    )
    search_finalists: Finalists = Field(
        default_factory=lambda: Finalists.model_validate({}),
        description="the best few draws of a search are tried again with further seeds before one "
        "is chosen, because a choice by one seed is partly luck. top: 1 turns it off; no gain "
        "is then judged as won or lost",
    )
    scheduler: Literal["fifo", "asha"] = Field(
        "fifo", description="asha stops the worse search trials of an entry early"
    )
    gpus_per_trial: float | None = Field(
        None, ge=0, description="share of a GPU for one trial; left out: 0.25 if there are GPUs"
    )
    cpus_per_trial: float = Field(1.0, gt=0, description="logical CPUs of one trial")
    max_concurrent_trials: int | None = Field(
        None,
        ge=1,
        description="trials that run at the same time; left out: what the resources allow",
    )
    trial_timeout_minutes: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a trial that runs longer is ended and counts as failed, the others go on; "
        "left out: no limit. For a trial on several ranks the time begins when the first rank "
        "gets its resources",
    )
    silence_timeout_minutes: float | None = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="a trial that takes no step and reads no batch for so long is ended and "
        "counts as failed, the others go on; null: no limit",
    )
    select: Select | None = Field(
        None,
        description="keep only the best-scored sources of each target, or spend a budget of "
        "trials on the most promising pairs of source and technique; not with folds",
    )
    keep_bundles: Literal["best", "all", "none"] = Field(
        "best",
        description="fine-tuned bundles to keep: the best seed of each entry on validation rows, "
        "all, or none",
    )
    bundle_weights: Literal["whole", "changes"] = Field(
        "whole",
        # hashes of jobs are those from before there was a choice
        exclude_if=lambda value: value == "whole",
        description="whole: a fine-tuned bundle can be used alone; changes: it holds only what "
        "differs from its source's bundle, which it needs; onetomany export makes it whole",
    )

    @field_validator("search", mode="before")
    @classmethod
    def _ranges_are_lists(cls, search: object) -> object:
        """Refuse ranges that are not lists, such as loguniform(1e-4, 1e-2), with one message."""
        ranges = cast("dict[str, object]", search) if isinstance(search, dict) else {}
        for name, values in ranges.items():
            if not isinstance(values, list | tuple):
                raise ValueError(
                    f"{name} needs a range, [low, high], or three or more values to choose from, "
                    "e.g. {lr: [1e-4, 1e-2]}"
                )
        return cast("object", search)

    @model_validator(mode="after")
    def _ranges(self):
        problems = Problems()
        for name, values in self.stated_search.items():
            if not all(map(math.isfinite, values)):
                problems.add(("search", name), f"{values}: every value must be finite")
            elif len(values) == 2 and not 0 < values[0] <= values[1]:
                problems.add(("search", name), f"{values} must be [low, high] with 0 < low <= high")
            elif len(values) < 2:
                problems.add(("search", name), "give [low, high] or three or more values")
        if {"steps", "epochs"} <= self.stated_search.keys():
            problems.add(("search", "epochs"), "search steps or epochs, not both")
        if self.trials > 1 and not self.search:
            problems.add(
                ("trials",),
                "trials above 1 needs search: a field of train with its range, e.g. {lr: "
                "[1e-4, 1e-2]}, or auto",
            )
        if self.trials == 1 and self.search == "auto":
            problems.add(("search",), "search needs trials above 1, e.g. trials: 8")
        if self.trials == 1:
            nothing = "trials is 1, so that nothing is drawn"
            problems += _unused_field_problems(self, ["search_finalists", "searcher"], nothing)
            problems += _unused_field_problems(
                self, ["scheduler"], f"{nothing}, and asha stops draws alone"
            )
        if self.searcher != "random" and self.scheduler == "asha":
            problems.add(
                ("searcher",),
                f"{self.searcher} learns from trials that ran to their end, and asha stops some: "
                "say scheduler fifo, or searcher random",
            )
        if self.searcher == "pbt" and self.trials > 1:
            problems += self._population_problems()
        if self.trials > 1 and self.budget is not None:
            problems.add(
                ("select", "budget"),
                f"trials is {self.trials}, and a budget searches no hyper-parameters: its "
                "search trials compare sources and techniques. Leave trials and search out, or "
                "the budget",
            )
        _refuse(problems)
        return self

    def _population_problems(self) -> Problems:
        """Return what keeps searcher pbt from finding changes of lr and weight_decay."""
        problems = Problems()
        if self.trials < MIN_POPULATION_TRIALS:
            problems.add(
                ("trials",),
                f"searcher pbt needs at least {MIN_POPULATION_TRIALS}: a population of four, and a "
                "child at each of three points",
            )
        for name in POPULATION_CONSTANTS:
            if name in self.stated_search:
                text = "searcher pbt compares its members at the same steps: leave it out"
                problems.add(("search", name), text)
        if self.stated_search and not {"lr", "weight_decay"} & self.stated_search.keys():
            problems.add(
                ("search",), "searcher pbt changes lr or weight_decay: give a range of one of them"
            )
        return problems

    @property
    def by_score(self) -> Select | None:
        """How sources are chosen by their score; None where all of them are fanned out."""
        return None if self.select is None or self.select.top is None else self.select

    @property
    def budget(self) -> int | None:
        """The trials that the job may spend; None: those of the full matrix."""
        return None if self.select is None else self.select.budget

    @property
    def stated_search(self) -> dict[str, list[float]]:
        """The ranges that the job states; {} where techniques declare them."""
        return {} if self.search == "auto" else self.search


class Job(Spec):
    """One job file: sources x targets x techniques x seeds, as one table."""

    name: str = Field(
        description="names the folder under storage", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
    )
    storage: str = Field(
        "runs",
        description="a folder (relative to the current one), file:///folder or s3://bucket/prefix",
    )
    seed: int = Field(0, ge=0, description="decides everything random")
    plugins: list[str] = Field(
        default_factory=list,
        exclude_if=lambda listed: not listed,  # a job without any has the hash that it always had
        description="modules that add components (techniques, metrics, ...): a .py file or a "
        "package's folder, relative to the job file (a path has a slash or ends in .py), or the "
        "name of an installed module. Their code is run",
    )
    only: list[str] = Field(
        default_factory=list,
        exclude_if=lambda named: not named,  # a job without any has the hash that it always had
        description="run a part of the job (--only NAME): targets, sources, modalities or domains "
        "(vision: image; speech: audio; healthcare: events, table, series; robotics: trajectory, "
        "series; text). A target is run with its sources, a source with its targets",
    )
    sources: dict[str, Source] = Field(
        description="what to pretrain on, or existing checkpoints", min_length=1
    )
    targets: dict[str, Target] = Field(default_factory=dict, description="the tasks")
    techniques: list[ComponentConfig] = Field(
        default_factory=lambda: [
            ComponentConfig(name=n) for n in ("scratch", "linear_probe", "full")
        ],
        description="how to adapt; scratch is always added",
    )
    baselines: Literal["auto"] | list[ComponentConfig] = Field(
        default_factory=list[ComponentConfig],
        exclude_if=lambda named: named == [],  # a job without any has the hash that it always had
        description="models without a network, to compare with (bag_of_words, boosted_trees, "
        "...), each on the targets that it can read; auto: all",
    )
    fanout: Fanout = Field(
        default_factory=lambda: Fanout.model_validate({}), description="seeds, search and resources"
    )
    tracking: ComponentConfig | None = Field(
        None,
        exclude=True,  # it changes no result, so no hash; its address may have a password
        description="a program that records runs: mlflow, trackio, wandb",
    )

    @model_validator(mode="after")
    def _fits_together(self):
        problems = Problems()
        for name, target in self.targets.items():
            for i, source in enumerate(target.sources or ()):
                if source not in self.sources:
                    text = f"unknown source {source!r}; {registry.nearest(source, self.sources)}"
                    problems.add(("targets", name, "sources", i), text)
        parts = self._parts()
        for i, name in enumerate(self.only):
            if name not in parts:
                near = registry.nearest(name, parts)
                problems.add(("only", i), f"no part of this job is named {name!r}; {near}")
        if self.only and self.fanout.budget is not None:
            field = "select" if self.fanout.by_score is None else "select.budget"
            problems.add(
                ("only",),
                f"fanout.select.budget ({self.fanout.budget}) is shared out over the whole "
                "job, and a part would spend all of it: run the whole job, or the part without "
                f"a budget (--set fanout.{field}=null)",
            )
        for name, target in self.targets.items():
            at = ("targets", name)
            if self.fanout.budget is not None and 0 in target.label_fractions:
                text = (
                    "at 0 no label of the target may be used to choose by, and "
                    "fanout.select.budget chooses by its validation rows: leave the budget out, or "
                    "put 0 in a job of its own"
                )
                problems.add((*at, "label_fractions"), text)
            if self.fanout.budget is not None and target.train.changes:
                text = (
                    "fanout.select.budget also runs trials of a ninth of the steps, which would "
                    "not reach them: leave one of them out"
                )
                problems.add((*at, "train", "changes"), text)
            if self.fanout.budget is not None and target.folds is not None:
                text = (
                    "fanout.select.budget would keep other pairs of source and technique in each "
                    "fold, and a table over all folds needs the same: leave one of them out"
                )
                problems.add((*at, "folds"), text)
            if self.fanout.scheduler == "asha" and target.workers:
                text = (
                    "asha stops no trial of several ranks: say fanout.scheduler fifo, or workers 0"
                )
                problems.add((*at, "workers"), text)
            if self.fanout.select is not None and target.folds is not None:
                text = (
                    "fanout.select would choose other sources in each fold, so that no source is "
                    "tested on all rows: name the sources of the target instead"
                )
                problems.add((*at, "folds"), text)
        found = search_problems(
            self.fanout.stated_search, (target.train for target in self.targets.values())
        )
        _refuse(problems + [(("fanout", "search", field), text) for field, text in found])
        return self

    @property
    def root(self) -> str:
        """The absolute folder of this job's runs. Ray's workers have other current folders."""
        remote, path = s3.split(self.storage)
        return storage.join(self.storage if remote else os.path.abspath(path), self.name)

    def selected(self) -> Job:
        """Return the job with the sources and targets of ``only`` alone, or itself without it."""
        if not self.only:
            return self
        named_sources = {
            name for name, one in self.sources.items() if self.is_named(name, one.modality_name)
        }
        named_targets = {
            name
            for name, one in self.targets.items()
            if self.is_named(name, one.data.modality.name)
        }
        return self.restricted(
            named_sources.union(*(self.taken_by(one) for one in named_targets)),
            named_targets | {one for one in self.targets if named_sources & self.taken_by(one)},
        )

    def is_named(self, name: str, modality: str | None) -> bool:
        """Return whether ``only`` names a source or target itself, its modality or its domain."""
        return any(named == name or modality in DOMAINS.get(named, (named,)) for named in self.only)

    def restricted(self, sources: Collection[str], targets: Collection[str]) -> Job:
        """Return the job with these sources and targets alone."""
        kept: dict[str, Target] = {}
        for name, target in self.targets.items():
            if name in targets:
                taken = target.sources and [one for one in target.sources if one in sources]
                kept[name] = target.model_copy(update={"sources": taken})
        of_kept = {name: source for name, source in self.sources.items() if name in sources}
        return self.model_copy(update={"sources": of_kept, "targets": kept})

    def taken_by(self, target: str) -> set[str]:
        """Return the sources that a target may take; of some checkpoints the modality is not known
        yet.
        """
        spec = self.targets[target]
        named = self.sources if spec.sources is None else spec.sources
        modalities = (None, spec.data.modality.name)
        return {name for name in named if self.sources[name].modality_name in modalities}

    def _parts(self) -> set[str]:
        """Return what ``only`` may name."""
        declared = [source.modality_name for source in self.sources.values()]
        modalities = {target.data.modality.name for target in self.targets.values()}
        modalities.update(name for name in declared if name is not None)
        domains = {name for name, of in DOMAINS.items() if modalities & set(of)}
        return {*self.targets, *self.sources, *modalities, *domains}


def spec_hash(*parts: Any) -> str:
    """Return 12 hex digits of the SHA-256 over the canonical JSON of specs or plain values."""
    plain = [
        part.model_dump(mode="json") if isinstance(part, BaseModel) else part for part in parts
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def schema() -> dict[str, Any]:
    """Return the JSON Schema of a job with descriptions, for editors.

    Registered names are listed as enumerations.
    """
    out = Job.model_json_schema()
    component = out["$defs"].pop("ComponentConfig")
    del component

    def choice(kind: str) -> dict[str, Any]:
        names = registry.names(kind)
        text: dict[str, Any] = {"type": "string", "enum": names}
        if kind == "model":
            libraries = "|".join(names)
            prefixes = "|".join(prefix[:-1] for prefix in CHECKPOINT_PREFIXES)
            text = {"type": "string", "pattern": rf"^(({libraries})/.+|({prefixes}):.+)$"}
        options = {
            name: {
                "anyOf": [registry.entry(kind, name).options.model_json_schema(), {"type": "null"}]
            }
            for name in names
        }
        table: dict[str, Any] = {"type": "object", "minProperties": 1, "maxProperties": 1}
        if kind == "model":
            table["additionalProperties"] = False
            table["patternProperties"] = {f"^{name}/": value for name, value in options.items()}
            # The options of any library: the checkpoint says which one it is of
            table["patternProperties"][rf"^({'|'.join(p[:-1] for p in CHECKPOINT_PREFIXES)}):"] = {
                "anyOf": list(options.values())
            }
        else:
            table |= {"properties": options, "additionalProperties": False}
        return {"anyOf": [text, table]}

    def put(node: Json, field: str = "") -> Any:
        if isinstance(node, list):
            return [put(item, field) for item in node]
        if not isinstance(node, dict):
            return node
        if node.get("$ref") == "#/$defs/ComponentConfig":
            return {
                **choice(COMPONENT_FIELDS[field]),
                **{k: v for k, v in node.items() if k == "description"},
            }
        return {
            k: (
                {name: put(sub, name) for name, sub in v.items()}
                if k == "properties" and isinstance(v, dict)
                else put(v, field)
            )
            for k, v in node.items()
            if not (k == "default" and field in ("technique", "techniques", "baselines"))
        }

    out = put(out)
    for kind in ("importer", "cohort"):  # no fields of a job: what `prepare` offers
        for name, entry in registry.entries(kind).items():
            out["$defs"][f"{kind} {name}"] = entry.options.model_json_schema()
    out["$schema"], out["title"] = "https://json-schema.org/draft/2020-12/schema", "One to Many job"
    return out
