"""Averages, interpolations, soups and ensembles are what their formulas say, for every modality."""

import copy
import itertools
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import stage_runs
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from stage_runs import primary, run_through, saved_vit, trials_in_this_process
from toys import (
    furthest,
    image_rows,
    image_splits,
    job_of,
    kill_at,
    make_run,
    net_task,
    result_row,
    shared_of,
    take,
    trial_of,
    weights,
)

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Ensemble, FinishedTrial, Task, Technique
from pipeline.core.metrics import calibration
from pipeline.core.specs import Architecture, ObjectiveSpec
from pipeline.train import experiment, loop
from pipeline.transfer import grid, planned_trials, stages, trial

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}
EACH = pytest.mark.parametrize("kind", KINDS)


def technique(name: str, **options) -> Technique:
    kind = registry.get("technique", name)
    return kind(kind.options_class(**options))


def shaken(task: Task, seed: int, size: float = 0.05) -> dict[str, torch.Tensor]:
    """The weights of a task as if it had been trained, without changing it."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in weights(task).items()
    }


def finished(name: str, seed: int, found: dict[str, torch.Tensor]) -> FinishedTrial:
    return FinishedTrial(name, seed, {}, {}, lambda: found)


def trained(name: str, folder=None, stop: int | None = None, norm: str = "batch", **options):
    """A technique, its task after 12 steps, and what it chose; killed once where ``stop`` says."""
    rows, validation = image_rows(48), image_rows(24, seed=3)

    def made():
        used = technique(name, **options)
        run = make_run(
            rows,
            used.wrap(net_task(norm=norm, dropout=0.3)),
            steps=12,
            technique=used,
            validation=validation,
            lr=0.02,
            eval_every_steps=4,
            checkpoint_every_steps=3,
            checkpoints=None if folder is None else str(folder),
        )
        return used, run

    if stop is not None:
        kill_at(made()[1], stop)
        torch.manual_seed(12345)
    used, run = made()
    outcome = loop.fit(run)
    task, chosen = run.task, {}
    if hasattr(used, "choose"):
        assert run.evaluate is not None
        task, chosen = used.choose(task, lambda one: run.evaluate(one)["accuracy"])
    return used.finish(task), chosen, outcome


@pytest.mark.parametrize("stop", [5, 10])
@pytest.mark.parametrize("name", ["swa", "ema", "wise_ft"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, name, stop):
    whole, chosen, want = trained(name)
    again, chosen_again, found = trained(name, tmp_path, stop)
    assert found.resumed_from == stop // 3 * 3
    assert furthest(weights(again), weights(whole)) == 0.0
    assert chosen == chosen_again and found.curve == want.curve


# ---------------------------------------------------------------- averages along a run


def followed(name: str, steps: int = 12, **options):
    """Weights after every step of a run on one row order, and its task at the end."""
    used = technique(name, **options)
    run = make_run(image_rows(48), net_task(norm="batch"), steps=steps, technique=used, lr=0.02)
    found = []
    run.on_log = lambda log: found.append(weights(run.task))
    loop.fit(run)
    return found, weights(run.task)


def test_swa_is_the_mean_of_the_last_weights_at_a_constant_rate():
    found, average = followed("swa", last_share=0.5)
    plain = [one["backbone.stem.weight"] for one in followed("full")[0]]
    assert not torch.equal(plain[-1], found[-1]["backbone.stem.weight"]), "another schedule"
    for name, tensor in average.items():
        if tensor.is_floating_point():
            mean = torch.stack([one[name].double() for one in found[-6:]]).mean(0)
            assert (tensor - mean).abs().max() < 1e-6, name
    last = technique("swa", last_share=0.5)
    assert [last.averaging(step, 12) for step in range(12)] == pytest.approx(
        [1.0] * 7 + [1 / 2, 1 / 3, 1 / 4, 1 / 5, 1 / 6]
    )
    assert technique("swa", last_share=0.01).averaging(0, 1) == 1.0


def test_the_moving_average_has_its_closed_form():
    """Up to the span the plain mean, then sum of d^(t-k) (1-d) w_k (Polyak and Juditsky 1992)."""
    found, average = followed("ema", span=0.25)
    span, decay = 3, 1 - 1 / 3
    name = "backbone.stem.weight"
    tensors = [one[name].double() for one in found]
    want = decay ** (12 - span) * sum(tensors[:span]) / span
    for k in range(span, 12):
        want = want + decay ** (11 - k) * (1 - decay) * tensors[k]
    assert (average[name] - want).abs().max() < 1e-6
    assert torch.equal(average["backbone.norm.num_batches_tracked"], torch.tensor(12))


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_a_batch_that_is_not_finite_does_not_enter_the_average(name):
    used = technique(name)
    run = make_run(image_rows(48), net_task(norm="batch"), steps=8, technique=used, lr=0.02)
    bad = next(iter(run.batches(range(4, 5)))).batch.rows[0]
    ready = run.preprocess

    def spoiled(batch, training):
        batch = ready(batch, training)
        image = batch["image"].clone()
        image[batch.rows == bad] = float("nan")
        return batch.replace(image=image)

    run.preprocess = spoiled
    assert loop.fit(run).skipped_steps >= 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(run.task).values())


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_what_is_validated_is_the_average(name):
    run = make_run(
        image_rows(48),
        net_task(norm="batch"),
        steps=8,
        technique=technique(name),
        validation=image_rows(24, seed=3),
        keep="last",
        lr=0.05,
    )
    outcome = loop.fit(run)
    assert run.evaluate is not None
    assert run.evaluate(run.task)["loss"] == pytest.approx(outcome.curve[-1]["loss"], abs=1e-6)


def test_weights_from_before_the_average_are_never_kept():
    """The first validations are the best; only the last two are of an average."""
    run = make_run(
        image_rows(48),
        net_task(norm="batch"),
        steps=12,
        technique=technique("swa", last_share=0.5),
        eval_every_steps=2,
        keep="best",
        lr=0.02,
    )
    seen, values = {}, iter([0.9, 0.8, 0.7, 0.4, 0.6, 0.5])

    def check(task):
        seen[2 * len(seen) + 2] = weights(task)
        return {"accuracy": next(values)}

    run.evaluate = check
    outcome = loop.fit(run)
    assert [point["accuracy"] for point in outcome.curve] == [0.9, 0.8, 0.7, 0.4, 0.6, 0.5]
    assert run.keeper.step == 10 and run.keeper.metrics == {"accuracy": 0.6}
    assert furthest(weights(run.task), seen[10]) == 0.0


def test_a_run_that_ends_before_any_average_keeps_its_last_weights():
    """One step is averaged with none."""
    run = make_run(
        image_rows(48),
        net_task(),
        steps=2,
        technique=technique("swa"),
        validation=image_rows(24, seed=3),
        keep="best",
        eval_every_steps=1,
    )
    loop.fit(run)
    assert run.keeper.step == 2 and run.keeper.metrics


def test_two_averages_at_once_are_refused():
    run = make_run(image_rows(48), net_task(), technique=technique("swa"), ema=0.9)
    with pytest.raises(ValueError, match=r"swa averages the weights itself: leave train\.ema out"):
        loop.fit(run)


# ---------------------------------------------------------------- WiSE-FT


@EACH
def test_wise_ft_goes_from_the_source_to_the_tuned_network(kind):
    task, _ = classified(KINDS[kind])
    source = weights(task)
    used = technique("wise_ft")
    wrapped = used.wrap(task)
    wrapped.anchor()
    tuned = shaken(task, 1)
    task.load_state_dict(tuned)
    seen = []

    def goodness(one: Task) -> float:
        seen.append(weights(one))
        return -abs(len(seen) - 1 - 3.0)  # best at the fourth

    ended, chosen = used.choose(wrapped, goodness)
    assert chosen == {"coefficient": 0.3} and type(used.finish(ended)) is Task
    assert len(seen) == 11
    assert furthest(seen[0], {**source, **whole_numbers(tuned)}) == 0.0
    assert furthest(seen[10], tuned) == 0.0
    for name, tensor in weights(ended).items():
        if tensor.is_floating_point():
            want = 0.7 * source[name].double() + 0.3 * tuned[name].double()
            assert (tensor - want).abs().max() < 1e-5, name


def whole_numbers(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if not tensor.is_floating_point()}


def test_the_head_at_the_source_s_end_is_the_one_trained_on_the_source():
    used = technique("wise_ft", probe_share=0.5, coefficient=0.0)
    task = net_task(norm="batch")
    before, states = weights(task), []
    run = make_run(image_rows(48), used.wrap(task), steps=8, technique=used, lr=0.02, keep="last")
    run.on_log = lambda log: states.append(weights(task))
    outcome = loop.fit(run)
    assert outcome.params_trained == sum(p.numel() for p in task.parameters())
    ended, _ = used.choose(run.task, lambda one: pytest.fail("the coefficient is given"))
    found = weights(ended)
    for name in before:
        want = states[3] if name.startswith("objective.") else before
        if before[name].is_floating_point():
            assert torch.equal(found[name], want[name]), name
    assert not torch.equal(states[-1]["objective.head.weight"], found["objective.head.weight"])


def test_among_equals_the_coefficient_is_a_half():
    used = technique("wise_ft")
    wrapped = used.wrap(net_task())
    assert used.choose(wrapped, lambda one: 1.0)[1] == {"coefficient": 0.5}


paths = image_splits(30, 12, 20)


def test_the_coefficient_is_chosen_without_the_test_rows(tmp_path, paths):
    """Other test rows, the same choice and weights; the validation metrics are those of the
    choice.
    """
    found = []
    other = str(shutil.copy(paths["train"], tmp_path / "other.parquet"))
    for number, test in enumerate((paths["test"], other)):
        mine = {**paths, "test": test}
        job = job_of(tmp_path, mine)
        shared = shared_of(tmp_path, job, mine, root=f"root{number}", keep_bundles=True)
        found.append(trial.run(trial_of(job, shared, "wise_ft"), shared))
    rows = [record.rows[0] for record in found]
    assert rows[0].settings["coefficient"] == rows[1].settings["coefficient"] in np.arange(11) / 10
    assert found[0].validation == found[1].validation and rows[0].value != rows[1].value
    task = bundle.load(str(rows[0].bundle_uri)).task()
    check = make_run(image_rows(8), net_task(), validation=data_of(shared).validation)
    assert check.evaluate is not None
    assert check.evaluate(task)["accuracy"] == pytest.approx(found[0].validation["accuracy"])


def data_of(shared):
    return next(iter(shared.targets.values()))


# ---------------------------------------------------------------- soups


@EACH
def test_a_uniform_soup_is_the_mean_and_of_equal_weights_that_weight(kind):
    task, _ = classified(KINDS[kind])
    one, two = shaken(task, 1), shaken(task, 2)
    soup = technique("uniform_soup")
    found = soup.after_fanout([finished("full", 0, one), finished("full", 1, one)])
    assert furthest(found, one) == 0.0
    other = finished("lora", 0, shaken(task, 3))
    found = soup.after_fanout([finished("full", 1, two), other, finished("full", 0, one)])
    task.load_state_dict(found)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert (tensor - (one[name].double() + two[name].double()) / 2).abs().max() < 1e-6


def test_a_greedy_soup_leaves_out_what_makes_it_worse():
    """By a goodness that knows the best weights; the order of the trials does not matter."""
    task = net_task()
    goal = shaken(task, 9)
    near = {name: tensor + 0.01 for name, tensor in goal.items()}
    beyond = {name: tensor - 0.012 for name, tensor in goal.items()}
    far = {name: tensor + 3.0 for name, tensor in goal.items()}
    trials = [finished("full", seed, one) for seed, one in enumerate((far, beyond, near))]

    def goodness(one: Task) -> float:
        return -furthest(weights(one), goal)

    for order in itertools.permutations(trials):
        used = technique("greedy_soup")
        start = copy.deepcopy(task)
        start.load_state_dict(used.after_fanout(list(order)))
        ended, chosen = used.choose(start, goodness)
        assert chosen == {"soup": ["full 2", "full 1"]}
        assert goodness(ended) == pytest.approx(-0.001, abs=1e-6)


def test_a_broken_network_is_no_ingredient_of_a_greedy_soup():
    """Its metric is NaN, which counts as worst."""
    task = net_task()
    good, broken = shaken(task, 1), shaken(task, 2)

    def check(one: Task) -> dict[str, float]:
        is_broken = furthest(weights(one), good) > 0
        return {"accuracy": math.nan if is_broken else 0.1}

    used = technique("greedy_soup")
    used.after_fanout([finished("full", 0, broken), finished("full", 1, good)])
    _, chosen = used.choose(task, experiment.goodness_of(used, check, "accuracy"))
    assert chosen == {"soup": ["full 1"]}


@pytest.mark.parametrize("seed", range(5))
def test_a_greedy_soup_is_never_worse_on_validation_than_its_best_member(seed):
    validation = image_rows(24, seed=3)
    task = net_task(seed)
    check = make_run(validation, task, validation=validation).evaluate
    assert check is not None
    members = [shaken(task, 10 * seed + i, size=0.3) for i in range(4)]
    single = []
    for one in members:
        task.load_state_dict(one)
        single.append(check(task)["accuracy"])
    used = technique("greedy_soup")
    used.after_fanout([finished("full", i, one) for i, one in enumerate(members)])
    ended, chosen = used.choose(task, lambda one: check(one)["accuracy"])
    assert chosen["soup"][0] == f"full {int(np.argmax(single))}"
    assert check(ended)["accuracy"] >= max(single)


def planned(tmp_path, paths, techniques, seeds: int = 3, **target) -> dict[str, list[grid.Trial]]:
    """The final trials of a job by their techniques."""
    job = job_of(tmp_path, paths, **target)
    dumped = job.model_dump(mode="json") | {"techniques": techniques}
    dumped["fanout"] |= {"keep_bundles": "all", "seeds": seeds}
    dumped["sources"]["src"]["train"] = {"global_batch": 8}
    state = stages.check(Job.model_validate(dumped), stage_runs.Silent())
    arch = Architecture("timm/test_vit", {}, {"channels": 3, "size": 32})
    group = grid.BackboneGroup(arch, stage_runs.MODALITY, "net", ("src",))
    out: dict[str, list[grid.Trial]] = {}
    for one in planned_trials.final_trials(state, [group], {"task": {"src"}}, {}):
        out.setdefault(one.technique.name, []).append(one)
    return out


def test_one_row_a_class_and_all_rows_are_not_mixed(tmp_path, paths):
    """Label fractions 1 and 1.0 are equal numbers."""
    found = planned(tmp_path, paths, ["full", "uniform_soup"], label_fractions=[1, 1.0])
    assert len(found["uniform_soup"]) == 2
    for soup in found["uniform_soup"]:
        kinds = {type(one.label_fraction) for one in soup.members}
        assert kinds == {type(soup.label_fraction)}


@pytest.mark.parametrize("name", ["uniform_soup", "greedy_soup", "ensemble"])
def test_what_combines_trials_is_made_anew_by_its_ingredients_alone(tmp_path, paths, name):
    """Another technique of the job, or other options of it, changes no soup."""
    plain = planned(tmp_path, paths, ["full", name])
    beside = planned(tmp_path, paths, ["full", "lora", name])
    changed = planned(tmp_path, paths, [{"full": {"layer_decay": 0.8}}, name])
    assert beside[name] == plain[name] != changed[name]
    assert [*beside[name][0].members] == beside["full"]
    both = planned(tmp_path, paths, ["full", "lora", {name: {"of": ["full", "lora"]}}])
    members = {one.id for one in both[name][0].members}
    assert members == {one.id for one in (*both["full"], *both["lora"])}


@pytest.mark.parametrize("name", ["uniform_soup", "greedy_soup", "ensemble"])
def test_what_is_to_be_combined_must_be_there(tmp_path, paths, name):
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    message = r"trials of full, and there are 0: raise fanout\.seeds, or name"
    with pytest.raises(ValueError, match=message):
        trial.build_task(trial_of(job, shared, name), shared)


@pytest.mark.parametrize("name", ["uniform_soup", "greedy_soup", "ensemble"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("ful", "of: ful: unknown technique 'ful'; did you mean full"),
        ("scratch", "of: scratch does not start from a source"),
        ("greedy_soup", "of: greedy_soup does not start from a source"),
        ("bottleneck", "of: bottleneck leaves modules of its own in the network"),
        ("side_tuning", "of: side_tuning leaves modules of its own in the network"),
    ],
)
def test_what_cannot_be_combined_is_refused_before_anything_is_trained(
    tmp_path, paths, name, other, message
):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, paths, ["full", {name: {"of": ["full", other]}}])


@pytest.mark.parametrize("name", ["uniform_soup", "greedy_soup", "ensemble"])
@pytest.mark.parametrize(("seeds", "of", "count"), [(1, ["full"], 1), (3, ["lora"], 0)])
def test_fewer_than_two_trials_are_refused_before_anything_is_trained(
    tmp_path, paths, name, seeds, of, count
):
    techniques = ["full", {name: {"of": of}}]
    message = rf"{name} combines at least two trials, and this job has {count} that it takes"
    with pytest.raises(ValueError, match=message):
        planned(tmp_path, paths, techniques, seeds)


def test_a_soup_has_learned_from_the_labels_of_all_its_trials(tmp_path, paths, monkeypatch):
    """Each seed has another quarter of the rows; a trial that failed is left out."""
    job = job_of(tmp_path, paths)
    shared = shared_of(tmp_path, job, paths)
    members = tuple(trial_of(job, shared, "full", fraction=0.25, seed=seed) for seed in range(3))
    soup = replace(trial_of(job, shared, "uniform_soup", fraction=0.25), members=members)
    rows_of_each = [{*trial.labelled_rows(one, shared).tolist()} for one in members]
    together = trial.labelled_rows(soup, shared)
    assert {*together.tolist()} == set.union(*rows_of_each)
    assert not len(trial.labelled_rows(trial_of(job, shared, "zero_shot"), shared))

    def record(one):
        row = result_row("src", "full", one.seed, bundle_uri="weights")
        failed = one.seed == 1
        return SimpleNamespace(rows=[row], failed=failed, status="done", validation={})

    records = {one.id: record(one) for one in members}
    by_folder = {one.folder: records[one.id] for one in members}
    start = weights(trial.build_task(members[0], shared)[0])
    monkeypatch.setattr(trial, "read_record", lambda root, folder: by_folder[folder])
    monkeypatch.setattr(trial.bundle, "load", lambda uri: SimpleNamespace(tensors=start))
    most = max(map(len, rows_of_each))
    assert trial.build_task(soup, shared)[1].endswith(
        f"(3 of full; {len(together)} labelled rows in all, at most {most} of one trial)"
    )
    monkeypatch.setattr(trial, "read_records", lambda *_: records)
    rest, notes = trial.without_failed_members(soup, shared)
    assert [one.seed for one in rest.members] == [0, 2]
    assert notes == ["left out, as they failed: full seed 1"]
    pair = replace(soup, members=members[:2])
    with pytest.raises(
        ValueError,
        match=r"^uniform_soup combines at least two trials, and 1 of the 2 that it takes ended well "
        r"\(failed or diverged: full seed 1\)$",
    ):
        trial.without_failed_members(pair, shared)
    diverged = replace(records[members[1].id].rows[0], split="validation", value=math.nan)
    records[members[1].id] = SimpleNamespace(rows=[diverged], failed=False)
    assert trial.without_failed_members(soup, shared)[0] == rest


# ---------------------------------------------------------------- ensembles


@EACH
def test_an_ensemble_predicts_the_mean_probability(kind):
    task, rows = classified(KINDS[kind])
    found = [shaken(task, seed) for seed in (1, 2, 3)]
    used = technique("ensemble")
    task.load_state_dict(
        used.after_fanout([finished("full", i, one) for i, one in enumerate(found)])
    )
    ended, chosen = used.choose(task, lambda one: pytest.fail("nothing is chosen"))
    assert chosen == {"ensemble": ["full 0", "full 1", "full 2"]} and isinstance(ended, Ensemble)
    batch = take(rows, range(4))
    ended.eval()
    with torch.no_grad():
        got = ended.objective.predict(ended.backbone, batch)
        single = []
        for one in found:
            task.load_state_dict(one)
            single.append(task.eval().objective.predict(task.backbone, batch)["scores"])
    mean = torch.stack([scores.double().softmax(-1) for scores in single]).mean(0)
    assert (got["scores"].softmax(-1) - mean).abs().max() < 1e-6
    want = -mean.log()[range(4), batch["label"]]
    assert (got["loss"] - want).abs().max() < 1e-5


def test_an_ensemble_of_labels_averages_each_label():
    task, rows = OBJECTIVES["multilabel"].build("multilabel")[:2]
    found = [shaken(task, seed) for seed in (1, 2)]
    members = [copy.deepcopy(task) for _ in found]
    for member, one in zip(members, found, strict=True):
        member.load_state_dict(one)
    batch, ended = take(rows, range(6)), Ensemble(members).eval()
    with torch.no_grad():
        got = ended.objective.predict(ended.backbone, batch)
        single = [one.objective.predict(one.backbone, batch)["scores"] for one in members]
    mean = torch.stack([scores.double().sigmoid() for scores in single]).mean(0)
    assert (got["scores"].sigmoid() - mean).abs().max() < 1e-6
    assert set(got) == {"scores", "labels", "loss", "min_positives"}


def test_the_average_is_calibrated_and_no_member():
    _, rows = classified("timm/test_vit")
    inputs = rows.modality.inputs()
    members = [
        bundle.build_task(
            Architecture("timm/test_vit", {}, inputs),
            ObjectiveSpec("classification", {"calibrate": "temperature"}, dict(STATE)),
            seed,
        )
        for seed in (1, 2)
    ]
    ended = Ensemble(members).eval()
    assert ended.objective.needs_calibration
    batch = take(rows, range(8))
    with torch.no_grad():
        before = ended.objective.predict(ended.backbone, batch)
        held = {name: tensor.numpy() for name, tensor in before.items()}
        ended.objective.calibrate(held)
        after = ended.objective.predict(ended.backbone, batch)
    fitted = calibration.temperature(held["scores"], held["label"])
    assert ended.objective.state["temperature"] == fitted != 1.0
    assert torch.allclose(after["scores"], before["scores"] / fitted)
    assert all("temperature" not in one.objective.state for one in members)


STATE = {"values": [0, 1, 2], "labels": ["a", "b", "c"]}


def test_objectives_whose_predictions_have_no_mean_are_refused():
    task = OBJECTIVES["mlm"].build("mlm").task
    with pytest.raises(ValueError, match="the predictions of mlm cannot be averaged"):
        Ensemble([task, task])


# ---------------------------------------------------------------- in a job


def scores_of_test_rows(job, row) -> np.ndarray:
    found = trial.read_predictions(job.root, row.folder, row.seed)
    assert found is not None
    return found.predictions["scores"]


def test_a_job_combines_its_trials_and_says_of_what(tmp_path, paths, monkeypatch):
    """Two seeds; a soup has a bundle, an ensemble has none and predicts what its members do."""
    ran = trials_in_this_process(monkeypatch)
    names = ["full", "uniform_soup", "greedy_soup", "ensemble"]
    job = stage_runs.job_of(
        tmp_path, {"src": saved_vit(tmp_path / "src")}, paths, names, keep_bundles="all"
    )
    _, rows = run_through(job)
    mine = {(row.technique, row.seed): row for row in primary(rows, source="src")}
    assert list(mine) == [("full", 0), ("full", 1), *((name, 0) for name in names[1:])]
    assert all(row.status == "done" for row in mine.values())
    assert set(mine["greedy_soup", 0].settings["soup"]) <= {"full 0", "full 1"}
    assert mine["ensemble", 0].settings["ensemble"] == ["full 0", "full 1"]
    record = trial.read_record(job.root, mine["uniform_soup", 0].folder)
    assert record is not None
    assert record.transfer == "weights made of finished trials (2 of full)"
    assert mine["ensemble", 0].bundle_uri is None and mine["uniform_soup", 0].bundle_uri
    assert all(mine[name, 0].params_trained == 0 for name in names[1:])
    assert {row.n_train for row in mine.values()} == {mine["full", 0].n_train} != {0}
    full, other, both = (
        calibration.softmax(scores_of_test_rows(job, mine[key]))
        for key in (("full", 0), ("full", 1), ("ensemble", 0))
    )
    assert np.allclose(both, (full + other) / 2, atol=1e-5)
    before = list(ran)
    run_through(job)
    assert list(ran) == before, "a second run makes nothing again"
