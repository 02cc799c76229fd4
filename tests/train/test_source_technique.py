"""A source that continues a checkpoint by a technique of its own."""

from __future__ import annotations

import pytest
import torch
from toys import furthest, image_files, label_state, task_of

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.core.contracts import Phase
from pipeline.core.specs import ModalitySpec
from pipeline.data.stream import DataWorkers
from pipeline.io import storage
from pipeline.techniques.full import Full
from pipeline.train import pretrain, source
from pipeline.train.ranks import Ranks
from pipeline.transfer import targets

MODALITY = ModalitySpec("image", {"size": 32, "channels": 3}, {"mean": [0.5] * 3, "std": [0.2] * 3})
LORA = {"lora": {"rank": 2, "modules": ["qkv"]}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_files(tmp_path_factory.mktemp("images"), {"train": 60, "validation": 24})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("start") / "bundle")
    inputs = {"channels": 3, "size": 32}
    task = task_of("timm/test_vit", inputs, "classification", label_state(), seed=5)
    bundle.save(folder, task, MODALITY)
    return f"bundle:{folder}"


def job_of(folder, images, **more) -> Job:
    spec = {
        "data": {
            **images,
            "modality": {"image": {"size": 32, "flip": False}},
            "columns": {"image": "picture", "label": "class"},
            "decode": "train",
        },
        "backbone": "timm/test_vit",
        "objective": "classification",
        "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3, "lr": 0.01},
        **more,
    }
    return Job.model_validate(
        {"name": "toy", "storage": str(folder / "runs"), "sources": {"src": spec}}
    )


def rank_job(job: Job):
    stage = source.plan_source(job, "src")
    return stage, pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)


def pretrained(job: Job):
    stage, work = rank_job(job)
    return stage, pretrain.train_rank(work, Ranks())


def changed(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def test_lora_moves_nothing_but_the_weights_that_it_is_merged_into(tmp_path, images, checkpoint):
    stage, facts = pretrained(job_of(tmp_path, images, init=checkpoint, technique=LORA))
    start, kept = (bundle.load(uri) for uri in (checkpoint.partition(":")[2], stage.bundle_uri))
    before, after = start.backbone_tensors(), kept.backbone_tensors()
    assert list(after) == list(before), "a whole backbone under the names of before"
    assert changed(after, before) == {name for name in before if name.endswith("qkv.weight")}
    assert changed(kept.head_tensors(), start.head_tensors()), "the head trains"
    assert facts["params_trained"] < sum(tensor.numel() for tensor in before.values()) / 2
    kept.task()
    assert set(targets.load_weights(stage.bundle_uri)[0]) == set(before), "as fine-tunes read it"


def test_full_moves_what_lora_leaves(tmp_path, images, checkpoint):
    stage, _ = pretrained(job_of(tmp_path, images, init=checkpoint))
    before = bundle.load(checkpoint.partition(":")[2]).backbone_tensors()
    after = bundle.load(stage.bundle_uri).backbone_tensors()
    others = {name for name in before if not name.endswith("qkv.weight")}
    assert others & changed(after, before)


def test_layer_wise_rates_are_those_of_the_technique(tmp_path, images, checkpoint, monkeypatch):
    """Here the first layer stands still in the second phase, and the rates name every layer."""

    class Decay(Full):
        def phases(self, steps):
            return Phase("first", 2), Phase("second", steps - 2)

        def rates(self, layers, phase):
            return {name: 0.5**depth for depth, name in enumerate(reversed(layers))}

    seen = []
    real = pretrain.experiment.loop.fit

    def fit(run):
        seen.append(run.technique)
        return real(run)

    monkeypatch.setattr(pretrain.experiment, "technique_of", lambda plug: Decay())
    monkeypatch.setattr(pretrain.experiment.loop, "fit", fit)
    stage, facts = pretrained(job_of(tmp_path, images, init=checkpoint, technique="full"))
    assert isinstance(seen[0], Decay) and facts["steps"] == 6 and stage.done


@pytest.mark.parametrize(
    "technique",
    [
        LORA,
        # these compare the weights with those of the checkpoint
        {"l2_sp": {"weight": 1.0}},
        {"delta": {"attention": False, "maps": 1}},
        {"wise_ft": {"coefficient": 0.5}},
    ],
    ids=str,
)
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, images, checkpoint, technique):
    words = {"init": checkpoint, "technique": technique}
    train = {
        "steps": 3,
        "global_batch": 12,
        "checkpoint_every_steps": 2,
        "keep": "last",
        "lr": 0.01,
    }
    whole, _ = pretrained(job_of(tmp_path / "whole", images, train=train, **words))
    stage, work = rank_job(job_of(tmp_path / "parts", images, train=train, **words))

    class KilledError(Exception):
        pass

    def kill(record):
        if record["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        pretrain.train_rank(work, Ranks(), kill)
    assert pretrain.train_rank(work, Ranks())["resumed_from"] == 2
    tensors = [bundle.load(uri).tensors for uri in (whole.bundle_uri, stage.bundle_uri)]
    assert furthest(*tensors) == 0.0
    assert not storage.exists(storage.join(stage.uri, "checkpoints"))


def test_a_technique_is_part_of_the_key_only_where_it_is_not_full(tmp_path, images, checkpoint):
    def key(**words) -> str:
        return source.plan_source(job_of(tmp_path, images, init=checkpoint, **words), "src").key

    assert key() == key(technique="full") != key(technique=LORA)
    assert key(technique=LORA) != key(technique={"lora": {"rank": 4, "modules": ["qkv"]}})


@pytest.mark.parametrize(
    ("technique", "continues", "message"),
    [
        (
            "linear_probe",
            False,
            "linear_probe freezes backbone weights, which are random here",
        ),
        ("lp_ft", False, "lp_ft freezes backbone weights"),
        ("lora", False, "lora freezes backbone weights"),
        ("random_probe", True, "random_probe starts from random weights"),
        ("scratch", True, "scratch starts from random weights"),
        ("zero_shot", True, "zero_shot trains nothing"),
    ],
)
def test_techniques_that_make_no_sense(tmp_path, images, checkpoint, technique, continues, message):
    more = {"init": checkpoint} if continues else {}
    with pytest.raises(ValueError, match=rf"^sources\.src\.technique: {message}"):
        source.plan_source(job_of(tmp_path, images, technique=technique, **more), "src")


def test_a_teacher_has_no_adapters(tmp_path, images, checkpoint):
    words = {"init": checkpoint, "technique": "lora", "objective": "dino"}
    with pytest.raises(ValueError, match=r"technique: lora adds modules to the backbone, and dino"):
        source.plan_source(job_of(tmp_path, images, **words), "src")


def test_a_checkpoint_without_data_has_no_technique(tmp_path, checkpoint):
    spec = {"backbone": checkpoint, "technique": "lora"}
    with pytest.raises(ValueError, match=r"sources\.src\.technique"):
        Job.model_validate({"name": "toy", "storage": str(tmp_path), "sources": {"src": spec}})
