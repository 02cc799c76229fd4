"""Labels of source and target compared by name: heads, rows of the source, and targets of which no
label is known.
"""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stage_runs import Silent
from toys import image_files, job_of, shared_of, trial_of

from pipeline.checkpoints import bundle
from pipeline.config.schema import ComponentConfig, Job
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.stream import eval_batches
from pipeline.objectives.classification import Classification, ClassificationOptions
from pipeline.techniques.full import Full
from pipeline.train import loop
from pipeline.transfer import (
    dry_run,
    fanout,
    grid,
    label_sets,
    overlap,
    planned_trials,
    stages,
    trial,
)

COLUMNS = {"image": "picture", "label": "class"}
STATE = {"values": ["class 2", "class 0", "class 1"], "labels": ["class 2", "class 0", "class 1"]}
"""The target's labels in another order."""
SHORT = {"steps": 3, "eval_every_steps": 1}
"""Training that shows which rows are read."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    sizes = {"train": 30, "validation": 12, "test": 20, "more": 14}
    return image_files(tmp_path_factory.mktemp("data"), sizes)


def splits_of(paths):
    return {name: paths[name] for name in ("train", "validation", "test")}


def world(tmp_path, paths, technique="dann", fractions=(0, 1.0), root="root", **target):
    """A job and what its trials read, with a source whose labels stand in another order."""
    job = job_of(tmp_path, splits_of(paths), label_fractions=list(fractions), **target)
    job = small(job, ["scratch", technique])
    shared = shared_of(tmp_path, job, paths, root=root, keep_bundles=True)
    theirs, head = shared.heads["src"]
    shared.heads["src"] = (ObjectiveSpec("classification", theirs.options, STATE), head)
    rows = {name: Selection(manifests.build([paths[name]], "parquet", "")) for name in paths}
    shared.source_rows = {"src": (rows["test"], COLUMNS)}
    shared.source_validation = {"src": rows["more"]}
    return job, shared


def small(job: Job, techniques, source=None) -> Job:
    """With these techniques, and a source whose batches its few rows can fill."""
    dumped = {**job.model_dump(mode="json"), "techniques": techniques}
    source = source or dumped["sources"]["src"]
    if "data" in source:
        source = {**source, "train": {"global_batch": 8}}
    dumped["sources"] = {"src": source}
    return Job.model_validate(dumped)


# ---------------------------------------------------------------- comparing


def test_partial_and_open_label_sets_are_named():
    match = label_sets.LabelMatch(("a", "b", "c"), ("b", "a", "d"))
    assert match.shared == ("b", "a")
    assert match.text() == (
        "2 labels are shared; c only in the source, left out here; d only in the target, where "
        "only the target's own labels can teach them"
    )
    assert label_sets.LabelMatch(("a", "b"), ("b", "a")).text() == ""


def test_labels_are_numbered_as_the_targets_are():
    match = label_sets.LabelMatch(("a", "b", "c"), ("c", "a", "d"))
    relabel = pickle.loads(pickle.dumps(label_sets.Relabel(match)))
    found = relabel({"label": np.array([2, 0, 0, 1]), "other": np.arange(4)})
    assert found["label"].tolist() == [0, 1, 1, -1] and found["other"].tolist() == [0, 1, 2, 3]
    match = label_sets.LabelMatch(("a", "b", "c"), ("c", "a"))
    sets = np.array([[1, 0, 0], [0, 1, 1]], dtype=np.uint8)
    assert label_sets.Relabel(match)({"labels": sets})["labels"].tolist() == [[0, 1], [1, 0]]


def test_rows_of_labels_that_the_target_lacks_are_left_out(paths):
    selection = Selection(manifests.build([paths["train"]], "parquet", ""))
    spec = ObjectiveSpec("classification", {}, STATE)
    match = label_sets.LabelMatch(tuple(STATE["labels"]), ("class 0", "class 2"))
    kept = label_sets.shared_rows(selection, COLUMNS, spec, match)
    names = manifests.read_columns(kept, ["class"])["class"].to_pylist()
    assert set(names) == {"class 0", "class 2"} and len(kept) == 20


@pytest.mark.parametrize(
    ("name", "source", "target", "needs_all", "message"),
    [
        ("mlm", {}, {"labels": ["a"]}, False, "the objective of source s is mlm"),
        ("classification", ["0", "1"], ["no", "yes"], False, r"share no label \(0, 1; no, yes\)"),
        ("classification", ["a", "b"], ["b", "c"], True, "does not know the target's labels c"),
        ("classification", ["a", "b"], ["b", "c"], False, ""),
        ("multilabel", ["a", "b"], ["b", "c"], False, "does not know the target's labels c"),
    ],
)
def test_what_cannot_be_compared_is_named(name, source, target, needs_all, message):
    ours = "classification" if name == "mlm" else name
    states = [{"labels": list(labels)} for labels in (source, target)]
    found = label_sets.problem(
        "s",
        ObjectiveSpec(name, {}, states[0]),
        ObjectiveSpec(ours, {}, states[1]),
        needs_all=needs_all,
    )
    assert bool(found) == bool(message)
    if message:
        with pytest.raises(ValueError, match=message):
            raise ValueError(found)


def test_only_tensors_with_a_row_a_label_are_put_in_order():
    """One that has as many rows as the source has labels by chance is taken as it is."""
    from toys import Net

    made = Classification(
        Net(), ClassificationOptions(), {"values": [0, 1, 2], "labels": ["a", "b", "c"]}
    )
    made.register_buffer("four", torch.zeros(4))
    theirs = ObjectiveSpec("classification", {"norm": True}, {"labels": ["d", "c", "b", "a"]})
    tensors = {"head.weight": torch.randn(4, 16), "four": torch.arange(4.0)}
    assert label_sets.carry_head(made, theirs, tensors)[0] == 3
    assert made.four.tolist() == [0, 1, 2, 3]
    assert torch.equal(made.head.weight, tensors["head.weight"][[3, 2, 1]])


def test_rows_of_a_head_go_to_labels_of_the_same_name():
    from toys import Net

    made = Classification(
        Net(), ClassificationOptions(), {"values": [0, 1, 2], "labels": ["a", "b", "d"]}
    )
    before = made.head.weight.detach().clone()
    theirs = ObjectiveSpec("classification", {"norm": True}, {"labels": ["c", "b", "a"]})
    tensors = {"head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)}
    count, text = label_sets.carry_head(made, theirs, tensors)
    assert count == 2 and text.startswith("head: 2 labels carried over by name (2 labels are share")
    assert torch.equal(made.head.weight[0], tensors["head.weight"][2])
    assert torch.equal(made.head.bias[1], tensors["head.bias"][1])
    assert torch.equal(made.head.weight[2], before[2])
    other = ObjectiveSpec("classification", {"norm": False}, theirs.state)
    assert label_sets.carry_head(made, other, tensors) == (
        0,
        "new head: the source's head was trained with another norm",
    )


@pytest.mark.parametrize("source", [["crane", "fox", "crane"], ["crane", "fox", "fox"]])
def test_a_label_that_a_head_has_twice_is_not_carried_over(source):
    """Which of both rows is meant, its name does not say; others may be there twice."""
    from toys import Net

    state = {"values": [0, 1], "labels": ["crane", "dog"]}
    made = Classification(Net(), ClassificationOptions(), state)
    theirs = ObjectiveSpec("classification", {"norm": True}, {"labels": source})
    tensors = {"head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)}
    refused = (0, "new head: several labels are called crane")
    found = label_sets.carry_head(made, theirs, tensors)
    assert found == refused if source[2] == "crane" else found[0] == 1


# ---------------------------------------------------------------- trials


def test_the_sources_network_is_tested_label_by_label(tmp_path, paths):
    job, shared = world(tmp_path, paths, "zero_shot", fractions=(1.0,))
    record = trial.run(trial_of(job, shared, "zero_shot", fraction=0), shared)
    assert "head: 3 labels carried over by name" in record.transfer
    tensors = bundle.load(record.rows[0].bundle_uri).tensors
    theirs = torch.from_numpy(shared.heads["src"][1]["head.weight"])
    order = [STATE["labels"].index(f"class {number}") for number in range(3)]
    assert torch.equal(tensors["objective.head.weight"], theirs[order])
    row = next(row for row in record.rows if row.split == "test")
    assert (row.steps, row.n_train, row.label_fraction) == (0, 0, "0/class")


def test_a_head_that_lacks_a_label_is_not_tested(tmp_path, paths):
    job, shared = world(tmp_path, paths, "zero_shot", fractions=(1.0,))
    theirs, head = shared.heads["src"]
    state = {name: [*values[:2], "class 9"] for name, values in STATE.items()}
    shared.heads["src"] = (ObjectiveSpec("classification", theirs.options, state), head)
    with pytest.raises(ValueError, match="it lacks some of the target's labels; head: 2 labels"):
        trial.build_task(trial_of(job, shared, "zero_shot", fraction=0), shared)


def wrong_labels(paths, folder):
    """The same files, every training and validation label of the target another one."""
    out = dict(paths)
    for name in ("train", "validation"):
        table = pq.read_table(paths[name])
        turned = [f"class {(int(one[-1]) + 1) % 3}" for one in table["class"].to_pylist()]
        out[name] = str(folder / f"{name}.parquet")
        pq.write_table(
            table.set_column(table.schema.get_field_index("class"), "class", pa.array(turned)),
            out[name],
            row_group_size=16,
        )
    return out


def test_without_labels_the_last_weights_are_kept(tmp_path, paths, monkeypatch):
    """The source's own rows would choose those that have adapted least."""
    kept = []

    class Watched(loop.KeepBest):
        def __init__(self, primary, keep, patience):
            kept.append((keep, patience))
            super().__init__(primary, keep, patience)

    monkeypatch.setattr(loop, "KeepBest", Watched)
    job, shared = world(
        tmp_path, paths, "dann", fractions=(0, 1.0), train={"steps": 2, "patience": 9}
    )
    for fraction in (0, 1.0):
        trial.run(trial_of(job, shared, "dann", fraction=fraction), shared)
    assert kept == [("last", None), ("best", 9)]


def test_no_label_of_the_target_calibrates_where_none_may_be_used(tmp_path, paths):
    """Those of the source's validation rows do, where the technique is chosen on them."""
    objective = {"classification": {"calibrate": "temperature"}}
    found = {}
    for name in ("zero_shot", "dann"):
        job, shared = world(tmp_path, paths, name, root=name, objective=objective, train=SHORT)
        record = trial.run(trial_of(job, shared, name, fraction=0), shared)
        found[name] = "temperature" in record.rows[0].settings
    assert found == {"zero_shot": False, "dann": True}


def test_scores_are_calibrated_after_the_network_has_adapted(tmp_path, paths, monkeypatch):
    seen = []

    class Adapting(Full):
        def at_test(self, task, batches):
            seen.append("temperature" in task.objective.state)
            return task

    used = Adapting(Full.options_class())
    monkeypatch.setattr(grid, "technique_of", lambda component: used)
    objective = {"classification": {"calibrate": "temperature"}}
    job, shared = world(tmp_path, paths, "full", (1.0,), objective=objective, train={"steps": 2})
    record = trial.run(trial_of(job, shared, "full"), shared)
    assert seen == [False] and "temperature" in record.rows[0].settings


def test_of_trials_without_labels_the_best_on_the_sources_rows_is_chosen(tmp_path, paths):
    """Its values are marked as those of the source, and the search reads them all the same."""
    job, shared = world(tmp_path, paths, "dann")
    group = next(iter(shared.backbone_groups.values()))
    entry = grid.PlannedEntry(group, "src", ComponentConfig(name="dann"), 0)
    tried = [
        grid.make_trial(job, "task", entry, {"lr": lr}, 0, "search", "", "", ())
        for lr in (1e-3, 1e-2)
    ]
    names = trial.data_of(tried[0], shared).metrics
    records = [
        trial.make_record(
            one, shared, None, 0.0, trial.TrialSummary(), dict.fromkeys(names, value), None
        )
        for one, value in zip(tried, (0.4, 0.6), strict=True)
    ]
    assert {row.split for record in records for row in record.rows} == {"source_validation"}
    assert planned_trials.winning_draws(tried, records) == {tried[0].entry: {"lr": 1e-2}}
    assert fanout.is_better(records[1], records[0]) and not fanout.is_better(*records)


def test_rows_of_a_source_that_cannot_be_read_fail_their_trial_alone(tmp_path, paths):
    """Its record is written without reading them again."""
    files = {**paths, "more": tmp_path / "more.parquet"}
    pq.write_table(pq.read_table(paths["more"]), files["more"])
    job, shared = world(tmp_path, files, "dann")
    theirs, head = shared.heads["src"]
    state = {name: [*values, "class 9"] for name, values in STATE.items()}
    shared.heads["src"] = (ObjectiveSpec("classification", theirs.options, state), head)
    files["more"].unlink()
    one = trial_of(job, shared, "dann", fraction=0)
    with pytest.raises(OSError) as error:
        trial.data_of(one, shared)
    record = trial.failed_record(one, shared, error.value)
    assert record.failed and "more.parquet" in record.error
    assert trial.read_record(shared.root, one.folder) == record


def test_a_trained_head_of_which_nothing_is_kept_is_refused_without_labels(tmp_path, paths):
    free = {"pseudo_labels": {"source_weight": 0.0}}
    job, shared = world(tmp_path, paths, free)
    shared.heads["src"] = (ObjectiveSpec("mlm", {}, {}), {})
    assert trial.build_task(trial_of(job, shared, free, fraction=1.0), shared)
    with pytest.raises(ValueError, match="pseudo_labels: nothing of the head of source src fits"):
        trial.build_task(trial_of(job, shared, free, fraction=0), shared)


def test_a_label_that_nothing_teaches_is_refused_without_labels(tmp_path, paths):
    """Rows of which no other class is sure would fall into it."""
    job, shared = world(tmp_path, paths, "dann")
    theirs, head = shared.heads["src"]
    state = {name: [*values[:2], "class 9"] for name, values in STATE.items()}
    shared.heads["src"] = (ObjectiveSpec("classification", theirs.options, state), head)
    assert trial.build_task(trial_of(job, shared, "dann", fraction=1.0), shared)
    with pytest.raises(ValueError, match=r"dann: nothing .*\(it lacks some of the target's labels"):
        trial.build_task(trial_of(job, shared, "dann", fraction=0), shared)


@pytest.mark.parametrize("technique", ["dann", "pseudo_labels"])
def test_without_labels_everything_is_chosen_on_the_source(tmp_path, paths, technique):
    """Wrong labels of training and validation rows change nothing, weights and validation."""
    found = []
    for number, files in enumerate((paths, wrong_labels(paths, tmp_path))):
        files = {**files, "more": paths["more"]}
        job, shared = world(tmp_path, files, technique, root=str(number), train=SHORT)
        record = trial.run(trial_of(job, shared, technique, fraction=0), shared)
        row = next(row for row in record.rows if row.split == "test")
        assert (row.n_train, row.label_fraction, row.status) == (0, "0/class", "done")
        validation = next(row for row in record.rows if row.is_validation)
        assert (validation.split, validation.n_eval) == ("source_validation", 14)
        found.append((bundle.load(row.bundle_uri).tensors, record.validation))
    (one, metrics), (other, others) = found
    assert metrics == others and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_without_labels_are_read_where_a_target_names_some(tmp_path, paths, monkeypatch):
    from pipeline.techniques.dann import DANN

    seen: set[tuple[int, ...]] = set()
    penalty = DANN.penalty

    def watched(self, task, batch, streams):
        seen.update((len(batch), *streams["target"].rows.tolist()) for _ in (0,))
        return penalty(self, task, batch, streams)

    monkeypatch.setattr(DANN, "penalty", watched)
    table = pq.read_table(paths["more"]).drop(["class"])
    pq.write_table(table, tmp_path / "unlabelled.parquet")
    data = {"uri": str(tmp_path / "unlabelled.parquet"), "modality": "image"}
    job, shared = world(tmp_path, paths, "dann", unlabelled=data, train=SHORT)
    for fraction in (1.0, 0):
        seen.clear()
        trial.run(trial_of(job, shared, "dann", fraction=fraction), shared)
        rows = {row for _, *one in seen for row in one}
        assert rows == set(range(14)), "every row of the file, and no other"
    keys = [
        stages.check(one, Silent()).targets["task"]
        for one in (job, world(tmp_path, paths, "dann", root="other", train=SHORT)[0])
    ]
    assert keys[0].key == keys[1].key and keys[0].unlabelled_key and not keys[1].unlabelled_key


def trial_ids(state, *techniques) -> dict[tuple[str, str], str]:
    """(technique, label fraction) to the id of its trial."""
    arch = Architecture("timm/test_vit", {}, {"channels": 3, "size": 32})
    group = grid.BackboneGroup(arch, ModalitySpec("image"), "net", ("src",))
    made = planned_trials.final_trials(state, [group], {"task": {"src"}}, {})
    return {
        (one.technique.name, grid.fraction_text(one.label_fraction)): one.id
        for one in made
        if one.technique.name in techniques and one.seed == 0
    }


def test_rows_without_labels_are_in_the_key_of_what_is_trained_for_as_many_steps(tmp_path, paths):
    """Without labels their number makes the steps, also of a technique that does not read them."""
    path, found = tmp_path / "unlabelled.parquet", []
    table = pq.read_table(paths["more"]).drop(["class"])
    for rows in (8, 14):
        pq.write_table(table.slice(0, rows), path)
        given = {"uri": str(path), "modality": "image"}
        state = checked(
            tmp_path,
            paths,
            ["scratch", "full", "pooled", "dann", "zero_shot"],
            unlabelled=given,
            label_fractions=[0, 1.0],
        )
        found.append(trial_ids(state, "full", "pooled", "dann", "zero_shot"))
    changed = {key for key in found[0] if found[0][key] != found[1][key]}
    assert changed == {("pooled", "0/class"), ("dann", "0/class"), ("dann", "1.0")}


@pytest.mark.parametrize(("decode", "in_memory"), [("auto", True), ("train", False)])
def test_rows_without_labels_are_decoded_where_the_others_are(tmp_path, paths, decode, in_memory):
    given = {"uri": paths["more"], "modality": "image"}
    data = {**splits_of(paths), "modality": "image", "columns": COLUMNS, "decode": decode}
    _, shared = world(tmp_path, paths, "dann", unlabelled=given, data=data)
    (read,) = shared.targets.values()
    assert read.unlabelled is not None
    assert (read.unlabelled.arrays is not None) == in_memory == (read.train.arrays is not None)


def test_adabn_measures_the_training_rows_and_tent_adapts_to_the_test_rows(tmp_path, paths):
    """Neither trains anything else of the source's network."""
    resnet = Architecture("timm/resnet10t", {}, {"channels": 3, "size": 32})
    image = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3})
    job = job_of(tmp_path, splits_of(paths))
    shared = shared_of(tmp_path, job, paths, keep_bundles=True, source=(resnet, image))
    found = {}
    for name in ("zero_shot", "adabn", "tent"):
        record = trial.run(trial_of(job, shared, name, fraction=0), shared)
        found[name] = bundle.load(record.rows[0].bundle_uri).tensors
    plain = found["zero_shot"]
    for name in ("adabn", "tent"):
        changed = {key for key in plain if not torch.equal(plain[key], found[name][key])}
        norms = {
            f"backbone.{at}.{own}"
            for at, one in bundle.build_backbone(resnet, seed=0).named_modules()
            if isinstance(one, torch.nn.BatchNorm2d)
            for own in one.state_dict()
        }
        assert changed and changed <= norms
        statistics = all(key.endswith(("_mean", "_var", "_tracked")) for key in changed)
        assert statistics == (name == "adabn")
    data = next(iter(shared.targets.values()))
    task = bundle.build_task(resnet, data.objective, seed=0)
    task.load_state_dict(plain)
    images = data.train.modality.finish(next(iter(eval_batches(data.train, 256))).batch)["image"]
    first = task.backbone.model.conv1[0](images)
    mean = found["adabn"]["backbone.model.conv1.1.running_mean"]
    assert torch.allclose(mean, first.mean((0, 2, 3)), atol=1e-5)


def test_a_batch_of_a_stream_is_not_as_small_as_the_labels_are(tmp_path, paths, monkeypatch):
    from pipeline.techniques.dann import DANN

    sizes = []
    monkeypatch.setattr(
        DANN,
        "penalty",
        lambda self, task, batch, streams: sizes.append(
            [len(batch), *(len(one) for one in streams.values())]
        ),
    )
    job, shared = world(tmp_path, paths, "dann", fractions=(1,), train={"steps": 2})
    shared.source_rows["src"] = (
        Selection(manifests.build([paths["train"]], "parquet", "")),
        COLUMNS,
    )
    trial.run(trial_of(job, shared, "dann", fraction=1), shared)
    assert sizes == [[3, 16, 16]] * 2


def test_entries_without_labels_are_those_of_techniques_that_need_none(tmp_path, paths):
    job = job_of(tmp_path, splits_of(paths), label_fractions=[0, 0.5])
    job = small(job, ["scratch", "full", "dann", "zero_shot", "adabn"])
    state = stages.check(job, Silent())
    text = "\n".join(dry_run.describe(state))
    assert "at no labels: 1 entry: 3 final trials of 12 steps on 30 rows" in text
    assert "at 50 % labels: 3 entries" in text and "without training: 2 final trials" in text
    arch = Architecture("timm/test_vit", {}, {"channels": 3, "size": 32})
    group = grid.BackboneGroup(arch, ModalitySpec("image"), "net", ("src",))
    entries = grid.planned_entries(job, "task", [group], {"src"})
    assert [
        (component.name, fraction) for _, _, component, fraction in entries if not fraction
    ] == [
        ("dann", 0),
        ("zero_shot", 0),
        ("adabn", 0),
    ]


# ---------------------------------------------------------------- what is refused before anything


def checked(tmp_path, paths, techniques, source=None, **target):
    job = job_of(tmp_path, splits_of(paths), **target)
    return stages.check(small(job, techniques, source), Silent())


def relabelled(paths, folder, rename):
    table = pq.read_table(paths["train"])
    names = pa.array([rename(one) for one in table["class"].to_pylist()])
    path = str(folder / "source.parquet")
    at = table.schema.get_field_index("class")
    pq.write_table(table.set_column(at, "class", names), path)
    data = {"train": path, "modality": {"image": {"size": 32}}, "columns": COLUMNS}
    return {"data": data, "backbone": "timm/test_vit", "objective": "classification"}


def test_label_sets_are_compared_before_anything_starts(tmp_path, paths):
    source = relabelled(paths, tmp_path, lambda name: name.replace("class 0", "class 7"))
    state = checked(tmp_path, paths, ["scratch", "dann"], source)
    assert state.notes == [
        "task: labels of source src, by name: 2 labels are shared; class 7 only in the source, "
        "left out here; class 0 only in the target, where only the target's own labels can teach "
        "them"
    ]
    with pytest.raises(
        ValueError,
        match=r"dann reads the head, at label fraction 0, of its source: source src does not know "
        "the target's labels class 0",
    ):
        checked(tmp_path, paths, ["scratch", "dann"], source, label_fractions=[0, 1.0])
    assert not checked(tmp_path, paths, ["scratch", "dann"]).notes
    source = relabelled(paths, tmp_path, lambda name: name.replace("class", "kind"))
    with pytest.raises(
        ValueError,
        match=r"targets\.task: techniques: dann reads the labelled rows of its source: source src "
        r"and the target share no label \(kind 0, kind 1, kind 2; class 0, class 1, class 2\)",
    ):
        checked(tmp_path, paths, ["scratch", "dann"], source)
    assert checked(tmp_path, paths, ["scratch", {"dann": {"source_weight": 0.0}}], source)
    free = {"pseudo_labels": {"source_weight": 0.0}}
    assert checked(tmp_path, paths, ["scratch", free], source)
    with pytest.raises(
        ValueError,
        match=r"pseudo_labels reads the head, at label fraction 0, of its source: source src and "
        "the target share no label",
    ):
        checked(tmp_path, paths, ["scratch", free], source, label_fractions=[0, 1.0])


def test_what_is_left_out_is_keyed_by_the_rows_it_was_compared_with(tmp_path, paths):
    keys = {
        overlap.key(state.targets["task"], state.sources)
        for fractions in ([1.0], [0.5], [0, 1.0])
        for state in [
            checked(tmp_path, paths, ["dann"], label_fractions=fractions, drop_overlap="exact")
        ]
    }
    assert len(keys) == 2


def test_validation_rows_of_the_source_are_there_wherever_they_choose(tmp_path, paths):
    free = ["scratch", {"pseudo_labels": {"source_weight": 0.0}}]
    for fractions, names in (([1.0], []), ([0, 1.0], ["src"])):
        state = checked(tmp_path, paths, free, label_fractions=fractions)
        assert list(stages.rows_of_sources(state)) == names


@pytest.mark.parametrize(
    ("techniques", "target", "message"),
    [
        (
            [{"dann": {"source_weight": 0.0}}],
            {"label_fractions": [0]},
            "dann reads none of the source either, so that nothing keeps the classes apart",
        ),
        (
            [{"pooled": {"weight": 0.0}}],
            {"label_fractions": [0]},
            "pooled reads none of the source either",
        ),
        (
            ["dann"],
            {"objective": {"classification": {"class_weight": "balanced"}}},
            "dann reads labelled rows of the source, and classification would weigh them by how "
            "frequent the target's labels are",
        ),
        (
            [{"pseudo_labels": {"source_weight": 0.0}}],
            {"label_fractions": [0], "objective": {"classification": {"class_weight": "balanced"}}},
            "classification would weigh rows for pseudo_labels by the target's labels",
        ),
        (
            ["dann"],
            {"objective": {"classification": {"mixup": 0.2}}},
            "dann reads labelled rows of the source, which the options mixup and cutmix of",
        ),
        (["full"], {"label_fractions": [0]}, r"label_fractions: 0 means no label of the target"),
        (
            ["full"],
            {"unlabelled": {"uri": "train", "modality": "image"}},
            r"unlabelled: none of the techniques reads rows without labels",
        ),
        (
            ["dann"],
            {"train": {"steps": 2, "micro_batch": 2}},
            r"train\.micro_batch: dann compares the rows of a whole batch",
        ),
        (
            ["dann"],
            {"unlabelled": {"uri": "train", "modality": "image", "columns": {"image": "pic"}}},
            r"targets\.task\.unlabelled\.columns\.image: .* no column 'pic'",
        ),
    ],
)
def test_what_would_not_be_read_is_refused(tmp_path, paths, techniques, target, message):
    if "unlabelled" in target:
        target["unlabelled"]["uri"] = paths["more"]
    with pytest.raises(ValueError, match=message):
        checked(tmp_path, paths, techniques, **target)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test": "b", "train": "a"}, "all unlabelled rows are trained on"),
        ({"uri": "a", "split_column": "split"}, "all unlabelled rows are trained on"),
        ({"uri": "a", "modality": "text"}, "unlabelled rows are read as the target's are"),
        ({"uri": "a", "weight": 2.0}, "unlabelled rows are read as they are"),
    ],
)
def test_unlabelled_rows_have_no_splits_of_their_own(tmp_path, paths, given, message):
    with pytest.raises(ValueError, match=message):
        job_of(tmp_path, splits_of(paths), unlabelled={"modality": "image", **given})


def test_test_rows_among_the_rows_without_labels_are_counted(tmp_path, paths):
    given = {"uri": paths["test"], "modality": "image"}
    state = checked(tmp_path, paths, ["dann"], unlabelled=given)
    found = overlap.find_overlap(state.targets["task"], {}, str(tmp_path / "signs"))
    assert "task: 20 of 20 test rows are also in its rows without labels" in found.notes


@pytest.mark.parametrize(("fractions", "kept"), [([1.0], 20), ([0, 1.0], 8)])
def test_test_rows_on_which_a_source_is_validated_are_left_out(tmp_path, paths, fractions, kept):
    """Their labels would choose and calibrate where no label of the target may be used."""
    rows = pq.read_table(paths["test"])
    pq.write_table(rows.slice(0, 12), tmp_path / "validation.parquet")
    data = {"train": paths["train"], "validation": str(tmp_path / "validation.parquet")}
    data |= {"modality": {"image": {"size": 32}}, "columns": COLUMNS}
    source = {"data": data, "backbone": "timm/test_vit", "objective": "classification"}
    given = {"train": paths["more"], "validation": paths["validation"], "test": paths["test"]}
    state = checked(
        tmp_path,
        given,
        ["dann"],
        source,
        label_fractions=fractions,
        drop_overlap="exact",
        train={"global_batch": 4, "steps": 2},
    )
    found = overlap.find_overlap(state.targets["task"], state.sources, str(tmp_path / "signs"))
    assert len(found.test) == kept
    note = "task: 12 of 20 test rows are also in the validation rows of source src"
    assert (note in found.notes) == (kept == 8)


def test_a_checkpoint_has_no_rows_to_read(tmp_path, paths):
    from toys import label_state, task_of

    task = task_of("timm/test_vit", {"channels": 3, "size": 32}, "classification", label_state())
    from stage_runs import MODALITY

    bundle.save(str(tmp_path / "given"), task, MODALITY)
    source = {"backbone": f"bundle:{tmp_path / 'given'}"}
    with pytest.raises(
        ValueError,
        match=r"targets\.task: techniques: dann reads the rows of its source, and src is a "
        "checkpoint without data",
    ):
        checked(tmp_path, paths, ["scratch", "dann"], source)
    free = {"pseudo_labels": {"source_weight": 0.0}}
    assert checked(tmp_path, paths, ["scratch", free], source, label_fractions=[0, 1.0])
