"""Heads trained together on cached features are the heads that are trained one at a time."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from toys import SMALL, image_splits, job_of, sentences, shared_of, text_modality, trial_of

from pipeline.checkpoints import bundle
from pipeline.config import provenance
from pipeline.core.batch import Batch
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.techniques.linear_probe import LinearProbe
from pipeline.transfer import cached_heads, fanout
from pipeline.transfer import trial as one_trial

BY_STEPS = {"linear_probe": {"solver": "sgd"}}
LRS, SEEDS, FRACTIONS = (1e-3, 3e-2, 0.5), (0, 1), (0.5, 4)


paths = image_splits(64, 30, 36)


def both(
    folder,
    paths,
    hypers=({},),
    seeds=(0,),
    fractions=(1.0,),
    stage="final",
    train=None,
    technique=BY_STEPS,
    source=None,
    **target,
):
    """(trials, records together, records one at a time, the two Shared)."""
    job = job_of(folder, paths, {"eval_every_steps": 4, **(train or {})}, **target)
    shared = shared_of(folder, job, paths, root="together", keep_bundles=True, source=source)
    worlds = [shared, dataclasses.replace(shared, root=str(folder / "alone"))]
    group = [
        trial_of(job, worlds[0], technique, hyper, fraction, seed, stage)
        for hyper, seed, fraction in itertools.product(hypers, seeds, fractions)
    ]
    assert len({one.id for one in group}) == len(group) and cached_heads.can_stack(group, worlds[0])
    together = {record.trial_id: record for record in cached_heads.run(group, worlds[0])}
    alone = {one.id: one_trial.run(one, worlds[1]) for one in group}
    assert together.keys() == alone.keys()
    return group, together, alone, worlds


def check(group, together, alone, worlds, tolerance=1e-5):
    for one in group:
        a, b = together[one.id], alone[one.id]
        assert [(row.split, row.metric) for row in a.rows] == [
            (row.split, row.metric) for row in b.rows
        ]
        for x, y in zip(a.rows, b.rows, strict=True):
            assert x.value == pytest.approx(y.value, abs=tolerance)
            assert (x.value_low is None) == (y.value_low is None)
            if x.value_low is not None:
                bounds = x.value_low, x.value_high
                assert bounds == pytest.approx((y.value_low, y.value_high), abs=tolerance)
            theirs = y.columns()
            different = {name for name, value in x.columns().items() if value != theirs[name]}
            assert different <= {
                "value",
                "value_low",
                "value_high",
                "seconds",
                "started_at",
                "bundle_uri",
            }
        assert a.kept_step == b.kept_step and a.transfer == b.transfer
        for p, q in zip(a.curve, b.curve, strict=True):
            assert p.step == q.step and p.metrics == pytest.approx(q.metrics, abs=tolerance)
        if one.stage == "final":
            heads = [bundle.load(record.rows[0].bundle_uri).tensors for record in (a, b)]
            assert heads[0].keys() == heads[1].keys()
            for name in heads[0]:
                assert (heads[0][name].double() - heads[1][name].double()).abs().max() < tolerance
            runs = [
                one_trial.read_predictions(world.root, one.folder, one.seed) for world in worlds
            ]
            assert np.array_equal(runs[0].rows, runs[1].rows) and np.array_equal(
                runs[0].predictions["label"], runs[1].predictions["label"]
            )
            np.testing.assert_allclose(
                runs[0].predictions["scores"], runs[1].predictions["scores"], atol=5 * tolerance
            )


def test_heads_together_equal_one_at_a_time(paths, tmp_path):
    """Learning rates, decays, seeds and label fractions; the record, its rows, curve, predictions
    and bundle.
    """
    hypers = [{"lr": 1e-3, "weight_decay": 0.0}, {"lr": 0.5, "weight_decay": 0.3}]
    group, together, alone, worlds = both(tmp_path, paths, hypers, SEEDS, FRACTIONS)
    check(group, together, alone, worlds)
    values = {record.rows[2].value for record in together.values()}
    assert len(values) == len(group) == 8  # no two of them are copies


@pytest.mark.slow
def test_texts_are_cached_as_they_are_trained_on(tmp_path):
    """Of many widths, padded beside other texts in each place."""
    found, modality = {}, text_modality()
    for seed, (split, count) in enumerate({"train": 64, "validation": 30, "test": 36}.items()):
        texts, labels = sentences(count, seed)
        found[split] = str(tmp_path / f"{split}.parquet")
        pq.write_table(
            pa.table({"text": texts, "class": [f"c{label}" for label in labels]}), found[split]
        )
    source = (
        Architecture("transformers/bert", {**SMALL, "dropout": 0.1}, modality.inputs()),
        ModalitySpec("text", modality.options.model_dump(), modality.state),
    )
    data = {**found, "modality": "text", "columns": {"text": "text", "label": "class"}}
    check(
        *both(
            tmp_path,
            found,
            [{"lr": 0.003}, {"lr": 0.05}],
            (0, 1),
            (0.5, 1.0),
            source=source,
            data=data,
        )
    )
    assert (
        len({len(text.split()) for text in pq.read_table(found["train"])["text"].to_pylist()}) > 4
    )


def test_a_scaled_rate_is_that_rate_together_and_alone(paths, tmp_path):
    scaled = both(
        tmp_path / "scaled", paths, [{"lr": 0.003}], technique={"linear_probe": {"lr_scale": 10.0}}
    )
    check(*scaled)
    job = job_of(tmp_path, paths, {"eval_every_steps": 4})
    shared = scaled[3][0]
    plain = [trial_of(job, shared, BY_STEPS, {"lr": lr}) for lr in (0.03, 0.003)]
    scaled_loss, same, slower = (
        [point.metrics["loss"] for point in record.curve]
        for record in (*scaled[1].values(), *cached_heads.run(plain, shared))
    )
    assert scaled_loss == pytest.approx(same) and scaled_loss[-1] != pytest.approx(slower[-1])


def test_probes_of_random_weights_share_the_features_of_their_seed(paths, tmp_path):
    group, together, alone, worlds = both(
        tmp_path,
        paths,
        [{"lr": 0.05}],
        (1,),
        (0.5, 1.0),
        technique={"random_probe": {"solver": "sgd"}},
    )
    check(group, together, alone, worlds)
    other = trial_of(
        job_of(tmp_path, paths, {"eval_every_steps": 4}),
        worlds[0],
        {"random_probe": {"solver": "sgd"}},
        {"lr": 0.05},
        seed=2,
    )
    units = fanout.group_into_work_items([*group, other], worlds[0])
    assert [(len(unit.trials), unit.is_stack) for unit in units] == [
        (2, True),
        (1, True),
    ]  # another seed, other weights


@pytest.mark.parametrize(
    ("train", "fractions"),
    [
        ({"optimizer": "sgd", "keep": "last", "micro_batch": 5}, (0.5,)),
        ({"ema": 0.7, "clip_norm": 0.02}, (0.5,)),
        ({"clip_norm": None, "schedule": "constant", "epochs": 2, "steps": None}, (1.0, 0.5)),
        ({"patience": 1, "eval_every_steps": 1}, (0.5,)),
        ({"patience": 2, "eval_every_steps": 1, "keep": "last"}, (0.5,)),
    ],
    ids=str,
)
def test_settings_mean_the_same_for_heads_together(paths, tmp_path, train, fractions):
    check(*both(tmp_path, paths, [{"lr": 0.003}, {"lr": 0.05}], (0,), fractions, train=train))


def test_what_differs_in_more_than_rate_and_decay_is_trained_apart(paths, tmp_path):
    """Steps, batches and schedules that are searched over: stacks of their own, and none is
    lost.
    """
    hypers = [{"global_batch": 8}, {"global_batch": 16}, {"warmup": 0.5}, {"steps": 8}, {"lr": 0.1}]
    check(*both(tmp_path, paths, hypers))


def test_search_trials_read_no_test_rows(paths, tmp_path):
    group, together, alone, worlds = both(
        tmp_path, paths, [{"lr": 0.003}, {"lr": 0.05}], stage="search"
    )
    check(group, together, alone, worlds)
    assert {row.split for record in together.values() for row in record.rows} == {"validation"}


def test_label_smoothing_and_another_metric(paths, tmp_path):
    group, together, alone, worlds = both(
        tmp_path,
        paths,
        [{"lr": 0.003}, {"lr": 0.05}],
        metric="balanced_accuracy",
        objective={"classification": {"label_smoothing": 0.1, "norm": False}},
    )
    check(group, together, alone, worlds, tolerance=2e-5)
    assert next(iter(together.values())).rows[0].metric == "balanced_accuracy"


@pytest.fixture
def skewed(paths, tmp_path):
    """The files of ``paths``, but the third class has only four training rows."""
    table = pq.read_table(paths["train"])
    labels = np.array(table["class"].to_pylist())
    is_rare = labels == "class 2"
    kept = ~is_rare | (np.cumsum(is_rare) <= 4)
    pq.write_table(table.filter(pa.array(kept)), tmp_path / "train.parquet")
    return {**paths, "train": str(tmp_path / "train.parquet")}


def test_class_weights_count_the_labelled_rows_of_the_trial(skewed, tmp_path):
    """So heads with other label fractions, which share no weights, are not trained together."""
    balanced = {"classification": {"class_weight": "balanced"}}
    world = both(tmp_path, skewed, [{"lr": 0.05}], (0, 1), (3, 0.5, 1.0), objective=balanced)
    check(*world)
    group, _, _, (shared, _) = world
    data = next(iter(shared.targets.values()))
    for one in group:
        rows = one_trial.labelled_rows(one, shared)
        head = one_trial.build_task(one, shared)[0].objective
        assert head.state["counts"] == np.bincount(data.labels[rows]).tolist()
        if one.label_fraction == 3:
            assert head.state["counts"] == [3, 3, 3]


@pytest.mark.parametrize("technique", [BY_STEPS, "linear_probe"], ids=str)
def test_balanced_weights_of_equally_many_labels_per_class_change_nothing(
    skewed, tmp_path, technique
):
    """Also where the head is solved, and all training rows are skewed."""
    losses = []
    for weight in ("none", "balanced"):
        objective = {"classification": {"class_weight": weight}}
        job = job_of(tmp_path / weight, skewed, objective=objective)
        shared = shared_of(tmp_path / weight, job, skewed)
        trial = trial_of(job, shared, technique, fraction=3)
        (record,) = cached_heads.run([trial], shared)
        losses.append([row.value for row in record.rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [{"classification": {"dropout": 0.5}}, {"classification": {"dropout": 0.3, "norm": False}}],
    ids=str,
)
def test_heads_with_dropout_do_not_depend_on_those_beside_them(paths, tmp_path, objective):
    """Each draws its own random numbers, those that it draws alone: with others it would draw from
    one generator.
    """
    check(
        *both(
            tmp_path, paths, [{"lr": 0.003}, {"lr": 0.05}], (0, 1), (1.0, 0.5), objective=objective
        )
    )


def test_a_stack_refuses_random_numbers(paths, tmp_path):
    """What cannot be told apart is not trained together by mistake."""
    job = job_of(tmp_path, paths, objective={"classification": {"dropout": 0.5}})
    shared = shared_of(tmp_path, job, paths)
    heads = [
        one_trial.build_task(trial_of(job, shared, seed=seed), shared)[0].objective
        for seed in (0, 1)
    ]
    stack = cached_heads.HeadStack(heads, [])
    rows = (
        torch.randn(2, 4, heads[0].head.in_features),
        {"label": torch.zeros(2, 4, dtype=torch.long)},
    )
    batch = Batch(np.zeros(4, dtype=np.int64), torch.zeros(0), {"features": rows[0], **rows[1]})
    with pytest.raises(RuntimeError, match="randomness"):
        stack.train()(batch)
    stack.eval()(batch)


@pytest.mark.parametrize(
    "objective", ["classification", {"classification": {"dropout": 0.5}}], ids=str
)
def test_heads_that_were_killed_go_on_bit_for_bit(paths, tmp_path, objective):
    """Heads together have resume points as a trial alone has, and their rows are traced."""
    train = {"checkpoint_every_steps": 4, "eval_every_steps": 3, "trace_rows": True}
    job = job_of(tmp_path, paths, train, objective=objective)
    whole = shared_of(tmp_path, job, paths, root="whole", keep_bundles=True)
    parts = dataclasses.replace(whole, root=str(tmp_path / "parts"))
    group = [trial_of(job, whole, BY_STEPS, {"lr": lr}) for lr in LRS]
    want = cached_heads.run(group, whole)
    taken = iter(range(1, 10**6))

    def kill():
        if next(taken) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_heads.run(group, parts, kill)
    torch.manual_seed(12345)
    found = cached_heads.run(group, parts)
    assert max(record.resumed_from for record in found) == 4
    for a, b in zip(found, want, strict=True):
        assert a.curve == b.curve and a.kept_step == b.kept_step
        assert [row.value for row in a.rows] == [row.value for row in b.rows]
    for one in group:
        lines = [
            json.loads(line)
            for line in Path(one_trial.folder_uri(parts, one), "rows-rank0.jsonl")
            .read_text()
            .splitlines()
        ]
        assert {line["step"] for line in lines} == set(range(12)) and all(
            len(line["rows"]) == 16 for line in lines
        )
    assert not list(Path(parts.root).glob("stacks/*"))


@pytest.fixture
def killed(paths, tmp_path):
    """What heads that were killed at step 7, with a resume point at 4, read; and the heads."""
    job = job_of(tmp_path, paths, {"checkpoint_every_steps": 4, "eval_every_steps": 3})
    shared = shared_of(tmp_path, job, paths)
    shared.parent_weights = {"src": "first"}
    group = [trial_of(job, shared, BY_STEPS, {"lr": lr}) for lr in LRS]
    taken = iter(range(1, 10**6))

    def kill():
        if next(taken) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_heads.run(group, shared, kill)
    return shared, group


@pytest.fixture
def edited(monkeypatch):
    """As if the loop had been edited since."""
    real = provenance.code_of

    def code_of(modules, pieces):
        return {**real(modules, pieces), "pipeline.train.loop": "edited"}

    def edit():
        monkeypatch.setattr(provenance, "code_of", code_of)
        provenance.made_by.cache_clear()

    yield edit
    provenance.made_by.cache_clear()


def test_killed_heads_do_not_go_on_from_other_weights(killed):
    shared, group = killed
    anew = dataclasses.replace(shared, parent_weights={"src": "second"})
    found = cached_heads.run(group, anew)
    assert {record.resumed_from for record in found} == {0}
    assert {record.parent_weights for record in found} == {"second"}


def test_killed_heads_that_other_code_goes_on_with_say_so(killed, edited):
    shared, group = killed
    edited()
    found = cached_heads.run(group, shared)
    assert {record.resumed_from for record in found} == {4}
    assert all(len(record.begun_by) == 1 for record in found)


def test_killed_heads_of_other_code_are_made_anew_on_request(killed, edited):
    shared, group = killed
    edited()
    found = cached_heads.run(group, dataclasses.replace(shared, remake=True))
    assert {record.resumed_from for record in found} == {0}
    assert all(record.begun_by == () for record in found)


@pytest.fixture
def spoilt(monkeypatch):
    """The gradient of one head becomes NaN at some steps: the head whose rate is 0.02."""

    def install(steps, alone_too):
        original = cached_heads.HeadStack.clip_gradients
        counter = itertools.count()

        def clip(self, *args):
            if next(counter) in steps:
                for k, own in enumerate(self.trains):
                    if own.lr == 0.02:
                        self.stacked[0].grad[k] = math.nan
            return original(self, *args)

        monkeypatch.setattr(cached_heads.HeadStack, "clip_gradients", clip)
        if alone_too:
            run = one_trial.run

            def refuse(trial, *args, **words):
                if trial.hyper_parameters.get("lr") == 0.02:
                    raise one_trial.loop.NonFiniteError("loss or gradient was not finite")
                return run(trial, *args, **words)

            monkeypatch.setattr(one_trial, "run", refuse)

    return install


HYPERS = [{"lr": 0.003}, {"lr": 0.02}, {"lr": 0.05}]


def test_a_head_that_is_not_finite_disturbs_no_other_and_is_trained_again_alone(
    paths, tmp_path, spoilt
):
    spoilt({0, 3}, alone_too=False)
    check(*both(tmp_path, paths, HYPERS))


def test_a_head_that_fails_alone_too_is_one_failed_trial(paths, tmp_path, spoilt):
    """Promise 7: the heads beside it, before and after, are done and have their records."""
    job = job_of(tmp_path, paths, {"eval_every_steps": 4})
    shared = shared_of(tmp_path, job, paths)
    group = [trial_of(job, shared, BY_STEPS, hyper) for hyper in HYPERS]
    spoilt({3}, alone_too=True)
    records = cached_heads.run(group, shared)
    assert [record.status for record in records] == ["done", "failed", "done"]
    assert records[1].error.startswith("NonFiniteError: loss or gradient was not finite")
    assert [one_trial.read_record(shared.root, one.folder).status for one in group] == [
        "done",
        "failed",
        "done",
    ]


def test_a_huge_rate_disturbs_no_other(paths, tmp_path):
    """Nothing patched: a rate that blows up, beside two that do not."""
    hypers = [{"lr": 0.003}, {"lr": 3e38}, {"lr": 0.05}]
    job = job_of(
        tmp_path,
        paths,
        {"eval_every_steps": 4, "optimizer": "sgd", "clip_norm": None, "max_bad_steps": 3},
    )
    shared = shared_of(tmp_path, job, paths, root="together", keep_bundles=True)
    worlds = [shared, dataclasses.replace(shared, root=str(tmp_path / "alone"))]
    group = [trial_of(job, worlds[0], BY_STEPS, hyper) for hyper in hypers]
    records = {record.trial_id: record for record in cached_heads.run(group, worlds[0])}
    fine = [group[0], group[2]]
    check(fine, records, {one.id: one_trial.run(one, worlds[1]) for one in fine}, worlds)
    assert group[1].id in records


# ---------------------------------------------------------------- features, what may be batched


def test_the_backbone_is_built_once_for_all_heads(paths, tmp_path, monkeypatch):
    """A ViT-B takes a second, which 64 heads would wait for one after the other."""
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    group = [trial_of(job, shared, BY_STEPS, seed=seed) for seed in range(3)]
    built, build = [], bundle.build_backbone
    monkeypatch.setattr(bundle, "build_backbone", lambda *args: built.append(1) or build(*args))
    (unit,) = fanout.group_into_work_items(group, shared)
    cached_heads.run(list(unit.trials), shared)
    assert len(built) == 1
    common = one_trial.BuiltBackbone(one_trial.build_task(group[0], shared)[0].backbone)
    for trial in group:
        alone, _, own_hash = one_trial.build_task(trial, shared)
        beside, _, shared_hash = one_trial.build_task(trial, shared, built=common)
        assert own_hash == shared_hash
        heads = alone.objective.state_dict(), beside.objective.state_dict()
        assert heads[0].keys() == heads[1].keys()
        assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])


def test_features_are_the_backbones_in_evaluation_mode(paths, tmp_path):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    data = next(iter(shared.targets.values()))
    backbone = bundle.build_backbone(
        Architecture("timm/test_resnet", {"drop_rate": 0.5}, {"channels": 3, "size": 32}), seed=1
    )
    found, rest = cached_heads.features(backbone.train(), data.train, torch.device("cpu"))
    from toys import take

    with torch.no_grad():
        want = backbone.eval()(take(data.train, np.arange(64))).pooled
    assert found.shape == (64, backbone.pooled_dim) and (found - want).abs().max() < 1e-5
    assert list(rest) == ["label"] and np.array_equal(rest["label"].numpy(), data.labels)


def test_features_of_a_changed_backbone_are_those_of_its_options(paths, tmp_path, monkeypatch):
    """A technique that changes the backbone has features of its own, for each of its options."""
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    (data,) = shared.targets.values()
    shared = dataclasses.replace(
        shared,
        source_keys={"src": "key"},
        targets={name: dataclasses.replace(data, key="rows") for name in shared.targets},
    )

    def train_features(**options):
        used = {"linear_probe": {"solver": "sgd", **options}}
        found = cached_heads.shared_features([trial_of(job, shared, used)], shared)
        return found.splits["train"][0]

    def scaled(self, task):
        task.backbone.register_forward_hook(
            lambda module, inputs, found: dataclasses.replace(
                found, pooled=found.pooled * self.options.lr_scale
            )
        )
        return task

    plain = train_features()
    assert torch.equal(plain, train_features(lr_scale=2.0))
    monkeypatch.setattr(LinearProbe, "wrap", scaled)
    for scale in (2.0, 3.0):
        torch.testing.assert_close(train_features(lr_scale=scale), scale * plain)


def test_only_frozen_techniques_in_one_process_are_batched(paths, tmp_path):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    assert cached_heads.can_stack([trial_of(job, shared, BY_STEPS)], shared)
    assert not any(
        cached_heads.can_stack([trial_of(job, shared, technique)], shared)
        for technique in ("full", "lp_ft", "scratch")
    )
    spread = job_of(tmp_path, paths, workers=2)
    assert not cached_heads.can_stack(
        [trial_of(spread, other := shared_of(tmp_path, spread, paths), BY_STEPS)], other
    )


def test_the_source_is_left_as_it_was(paths, tmp_path):
    """Weights in the object store are read by every trial: training heads writes to none of
    them.
    """
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    before = {name: array.copy() for name, array in shared.weights["src"].items()}
    for array in shared.weights["src"].values():
        array.setflags(write=False)
    cached_heads.run([trial_of(job, shared, BY_STEPS, {"lr": lr}) for lr in LRS], shared)
    one_trial.run(trial_of(job, shared, "full"), shared)
    assert all(np.array_equal(before[name], array) for name, array in shared.weights["src"].items())
