"""The online probe: nearest neighbours as scikit-learn finds them, tried at every validation
without a trace in the run, and what it refuses.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from looks import SIZE, Conv
from sklearn.neighbors import KNeighborsClassifier
from toys import (
    SMALL,
    furthest,
    image_files,
    image_rows,
    rows_of,
    sentences,
    take,
    task_of,
    text_modality,
    weights,
)

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Batch, Task
from pipeline.data.stream import DataWorkers, TooManyBadRowsError
from pipeline.modalities.text import Text
from pipeline.train import online_probe, pretrain, source
from pipeline.train.progress import training_line
from pipeline.train.ranks import Ranks

PROBE = {"modality": "image", "columns": {"image": "picture", "label": "class"}}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_files(tmp_path_factory.mktemp("images"), {"train": 60, "validation": 24})


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return image_files(
        tmp_path_factory.mktemp("labelled"), {"train": 45, "validation": 21}, noise=0.4
    )


def job(folder, images, probed=None, objective="simclr", **train) -> Job:
    labels = {"label": "class"} if objective == "classification" else {}
    spec = {
        "data": {
            **images,
            "modality": {"image": {"size": 32}},
            "columns": {"image": "picture", **labels},
            "decode": "train",
        },
        "backbone": "timm/test_vit",
        "objective": objective,
        "probe": probed and {**PROBE, **probed},
        "train": {"steps": 6, "global_batch": 12, "eval_every_steps": 3, **train},
    }
    return Job.model_validate(
        {"name": "toy", "storage": str(folder / "runs"), "sources": {"src": spec}}
    )


def pretrained(spec: Job, on_progress=lambda record: None):
    stage = source.plan_source(spec, "src")
    fitted = source.prepare_source(stage)
    return (
        stage,
        fitted,
        pretrain.train_rank(
            pretrain.rank_job(stage, fitted, DataWorkers(), 1), Ranks(), on_progress
        ),
    )


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_scikit_learns(k):
    rng = np.random.default_rng(0)
    # More than one block of rows
    found, tried = (
        rng.normal(size=(300, 6)),
        rng.normal(size=(1100, 6)),
    )
    theirs = (
        KNeighborsClassifier(k, metric="cosine")
        .fit(found, np.zeros(300))
        .kneighbors(tried, return_distance=False)
    )
    assert np.array_equal(
        np.sort(online_probe.neighbours(found, k, tried).numpy()), np.sort(theirs)
    )
    own = online_probe.neighbours(found, k).numpy()
    assert own.shape == (300, k) and not (own == np.arange(300)[:, None]).any()
    assert online_probe.neighbours(found[:3], 50, tried).shape == (
        1100,
        3,
    ) and online_probe.neighbours(found[:3], 50).shape == (3, 2)


# ---------------------------------------------------------------- features


@torch.no_grad()
def test_features_of_a_text_in_windows_are_the_mean_of_its_windows(monkeypatch):
    monkeypatch.setattr(online_probe, "WINDOWS_AT_ONCE", 4)
    whole = text_modality()
    options = whole.options.model_copy(update={"length": 24, "windows": 20, "stride": 4})
    modality = Text(options, whole.state)
    contexts = [" ".join(sentences(1 + i, i)[0]) for i in range(5)]
    table = pa.table({"asked": ["was the book red?"] * 5, "context": contexts})
    arrays, bad = modality.decode(table, {"text": "asked", "text_pair": "context"})
    rows = rows_of(modality, arrays)
    backbone = task_of("transformers/bert", modality.inputs(), "qa", {}, **SMALL).backbone.eval()
    found, _ = online_probe.features(backbone, rows, torch.device("cpu"))
    batch = take(rows, range(5))
    counts = batch["mask"].any(-1).sum(1).tolist()
    assert not any(bad) and len(set(counts)) > 2 and found.shape == (5, backbone.pooled_dim)
    for i, count in enumerate(counts):
        windows = {name: batch[name][i, :count] for name in ("tokens", "mask", "types")}
        part = Batch(np.arange(count), torch.arange(count), windows)
        assert (found[i] - backbone(part).pooled.mean(0)).abs().max() < 1e-5
    arrays["lengths"][:] = 0  # no row could be decoded
    none, _ = online_probe.features(backbone, rows_of(modality, arrays), torch.device("cpu"))
    assert not none.any()


# ---------------------------------------------------------------- in a run


def test_the_probe_runs_at_every_validation_and_stays_with_the_bundle(tmp_path, images, labelled):
    seen = []
    stage, fitted, metadata = pretrained(
        job(tmp_path, images, labelled, objective="mae", keep="last"), seen.append
    )
    assert "probe of 45 training and 21 validation rows" in fitted.description
    lines = [
        json.loads(line) for line in Path(stage.uri, "log/metrics.jsonl").read_text().splitlines()
    ]
    logged = [line["probe_knn"] for line in lines if "probe_knn" in line]
    assert len(logged) == 2 and all(
        "validation_loss" in line for line in lines if "probe_knn" in line
    )
    assert [record["probe_knn"] for record in seen if "probe_knn" in record] == logged
    assert [point["probe_knn"] for point in metadata["curve"]] == logged
    manifest = bundle.load(stage.bundle_uri).manifest
    assert (
        manifest.metrics["probe_knn"] == logged[-1]
        and manifest.training["metrics"]["probe_knn"] == logged[-1]
    )
    # the last one again, from the bundle, by scikit-learn
    backbone, modality = (
        bundle.load(stage.bundle_uri).task().backbone,
        bundle.load(stage.bundle_uri).modality(),
    )
    found = {}
    for split in ("train", "validation"):
        table = pq.read_table(labelled[split])
        arrays, _ = modality.decode(table, {"image": "picture"})
        batch = modality.finish(
            Batch(np.arange(len(table)), torch.arange(len(table)), modality.collate(arrays))
        )
        with torch.no_grad():
            found[split] = backbone(batch).pooled.numpy(), table["class"].to_pylist()
    assert KNeighborsClassifier(5, metric="cosine").fit(*found["train"]).score(
        *found["validation"]
    ) == pytest.approx(logged[-1])


def test_a_run_is_the_same_with_a_probe_and_without(tmp_path, images, labelled):
    """Also one that was stopped: neither weights nor the order of random numbers follow from it."""
    options = {"checkpoint_every_steps": 4}
    stages = [
        pretrained(job(tmp_path / name, images, probed, **options))[0]
        for name, probed in (("with", labelled), ("without", None))
    ]
    with_, without = (bundle.load(stage.bundle_uri).tensors for stage in stages)
    assert furthest(with_, without) == 0.0 and stages[0].key != stages[1].key
    cut = source.plan_source(job(tmp_path / "cut", images, labelled, **options), "src")
    work = pretrain.rank_job(cut, source.prepare_source(cut), DataWorkers(), 1)

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise StopError

    with pytest.raises(StopError):
        pretrain.train_rank(work, Ranks(), stop)
    assert pretrain.train_rank(work, Ranks())["resumed_from"] == 4
    assert furthest(bundle.load(cut.bundle_uri).tensors, with_) == 0.0


def test_the_progress_line_tells_it():
    assert (
        training_line(
            "src", {"step": 3, "steps": 6, "validation_loss": 2.0, online_probe.METRIC: 0.625}
        )
        == "src: step 3/6  probe_knn 0.625"
    )


def test_undecodable_rows_are_listed_and_held_against_the_budget(tmp_path, images, labelled):
    table = pq.read_table(labelled["train"])
    pictures = [p if i != 7 else b"no picture" for i, p in enumerate(table["picture"].to_pylist())]
    pq.write_table(table.set_column(0, "picture", pa.array(pictures)), tmp_path / "broken.parquet")
    stage, _, _ = pretrained(
        job(tmp_path, images, {**labelled, "train": str(tmp_path / "broken.parquet")})
    )
    listed = [
        json.loads(line)
        for line in Path(stage.uri, "log/quarantine.jsonl").read_text().splitlines()
    ]
    assert [(row["split"], row["row"]) for row in listed] == [("probe train", 7)]
    pq.write_table(
        table.set_column(0, "picture", pa.array([b"no picture"] * 5 + pictures[5:])),
        tmp_path / "broken.parquet",
    )
    with pytest.raises(
        TooManyBadRowsError, match=r"6 of 45 rows cannot be used.*broken\.parquet row 0"
    ):
        pretrained(job(tmp_path, images, {**labelled, "train": str(tmp_path / "broken.parquet")}))


def test_many_rows_are_tried_on_an_even_part_of_them(tmp_path, images, labelled, monkeypatch):
    monkeypatch.setattr(online_probe, "PROBE_ROWS", (20, 10))
    stage = source.plan_source(job(tmp_path, images, labelled), "src")
    found = source.prepare_source(stage).probe
    assert [len(found.train), len(found.validation)] == [20, 10]
    assert found.train.ids(np.array([0, 19])).tolist() == [0, 44], "from end to end"
    monkeypatch.setattr(online_probe, "PROBE_BYTES", 5 * (3 * 32 * 32 + 8))
    found = online_probe.prepare(
        stage.spec.probe, stage.probe, bundle.build_modality(source.prepare_source(stage).modality)
    )
    assert [len(found.train), len(found.validation)] == [5, 5]


# ---------------------------------------------------------------- whose features


def teacher_task(carry: str) -> Task:
    torch.manual_seed(0)
    kind = registry.get("objective", "dino")
    backbone = Conv(norm="batch")
    made = Task(
        backbone,
        kind(
            backbone,
            kind.options_class(local_crops=0, prototypes=8, hidden=8, bottleneck=4, carry=carry),
            {},
        ),
    )
    with torch.no_grad():
        for name, buffer in made.objective.teacher_backbone.named_buffers():
            buffer += "weight" in name
    return made


def test_a_teacher_that_is_carried_over_is_what_is_tried():
    for carry in ("teacher", "student"):
        made = teacher_task(carry)
        before = weights(made)
        with online_probe.exported_backbone(made) as backbone:
            assert backbone is made.backbone
            found = weights(backbone)
        assert (
            furthest(
                found,
                weights(made.objective.teacher_backbone if carry == "teacher" else made.backbone),
            )
            == 0.0
        )
        assert furthest(before, weights(made)) == 0.0, "the student's own weights are back"
    assert (
        furthest(
            weights(teacher_task("teacher").backbone),
            weights(teacher_task("teacher").objective.teacher_backbone),
        )
        > 0.5
    )


# ---------------------------------------------------------------- several ranks


def tried(ranks: Ranks, n: int, m: int) -> float:
    torch.manual_seed(0)
    rows, other = image_rows(n, size=SIZE, noise=0.9), image_rows(m, size=SIZE, seed=1, noise=0.9)
    parts = iter((rows, other))
    with pytest.MonkeyPatch.context() as patch:  # rows in memory in the place of files
        patch.setattr(online_probe, "Rows", lambda selection, decoder: next(parts))
        made = online_probe.Probe(
            rows.selection, other.selection, {}, rows.decoder.objective_state, 0.0
        )
        check = online_probe.ProbeEvaluator(
            made, rows.modality, ranks, lambda: torch.autocast("cpu", enabled=False)
        )
    return check(
        Task(
            Conv(),
            registry.get("objective", "simclr")(
                Conv(), registry.get("objective", "simclr").options_class(), {}
            ),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "m"), [(40, 21), (30, 1)])
def test_every_rank_finds_the_same_as_one(team, n, m):
    """Also where a rank has no row to try."""
    one = tried(Ranks(), n, m)
    assert team(tried, n, m) == [one, one] and 0 <= one <= 1


# ---------------------------------------------------------------- what is refused


def write(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"columns": {"image": "picture"}},
            r"sources\.src\.probe\.columns: role 'label' has no column; add \{label: NAME\}",
        ),
        (
            {"columns": {"image": "picture", "label": "klass"}},
            r"sources\.src\.probe\.columns\.label: .* has no column 'klass'; did you mean class\?",
        ),
        (
            {"modality": {"image": {"size": 64}}},
            r"sources\.src\.probe\.modality: \{'size': 64\} contradicts the source's own",
        ),
        (
            {"validation_fraction": 0.0, "validation": None},
            r"sources\.src\.probe: its validation split is empty",
        ),
    ],
    ids=str,
)
def test_probes_that_cannot_be_tried_are_refused_at_once(
    tmp_path, images, labelled, change, message
):
    with pytest.raises(ValueError, match=message):
        source.plan_source(job(tmp_path, images, {**labelled, **change}), "src")


def test_labels_are_looked_at_before_anything_starts(tmp_path, images, labelled):
    table = pq.read_table(labelled["train"])
    several = write(
        tmp_path / "several.parquet",
        **{"picture": table["picture"], "class": [["a", "b"]] * len(table)},
    )
    with pytest.raises(
        ValueError,
        match=r"probe\.columns: label column 'class' holds list<.*a probe takes one label a row",
    ):
        source.plan_source(
            job(tmp_path, images, {"train": several, "validation_fraction": 0.3}), "src"
        )
    other = write(
        tmp_path / "other.parquet",
        **{"picture": table["picture"], "class": ["class 7"] * len(table)},
    )
    with pytest.raises(
        ValueError,
        match=r"sources\.src\.probe: column class: label 'class 7' is in no training row",
    ):
        source.plan_source(job(tmp_path, images, {**labelled, "validation": other}), "src")


def test_a_source_without_validations_has_no_probe(tmp_path, images, labelled):
    spec = job(tmp_path, {"train": images["train"], "validation_fraction": 0.0}, labelled)
    with pytest.raises(
        ValueError,
        match=r"sources\.src\.probe: it is tried at every validation, and this source has no "
        r"validation rows",
    ):
        source.plan_source(spec, "src")


def test_the_key_follows_the_probes_rows_and_not_where_they_lie(tmp_path, images, labelled):
    plain = source.plan_source(job(tmp_path, images), "src").key
    probed = source.plan_source(job(tmp_path, images, labelled), "src").key
    moved = {}
    for split, path in labelled.items():
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved[split] = str(tmp_path / "moved" / Path(path).name)
        Path(moved[split]).write_bytes(Path(path).read_bytes())
    assert plain != probed == source.plan_source(job(tmp_path, images, moved), "src").key
    assert (
        probed != source.plan_source(job(tmp_path, images, {"train": labelled["train"]}), "src").key
    )


@pytest.mark.parametrize("objective", ["simclr", "dino"])
def test_rows_without_views_are_refused_at_once(tmp_path, images, objective):
    spec = Job.model_validate(
        {
            "name": "toy",
            "storage": str(tmp_path),
            "sources": {
                "src": {
                    "data": {**images, "modality": "text", "columns": {"text": "class"}},
                    "backbone": "transformers/bert",
                    "objective": objective,
                }
            },
        }
    )
    with pytest.raises(
        ValueError,
        match=rf"sources\.src\.objective: {objective} compares random views of a row, and text "
        r"rows have none; it is for images",
    ):
        source.plan_source(spec, "src")


def test_the_last_weights_of_a_loss_that_couples_rows_are_kept(tmp_path, images):
    with pytest.raises(
        ValueError,
        match=r"sources\.src\.train\.keep: the validation loss of simclr .* leave it out: the "
        r"last weights are kept",
    ):
        source.plan_source(job(tmp_path, images, keep="best"), "src")
    source.plan_source(job(tmp_path, images, objective="mae", keep="best"), "src")
    # A rate at which validation gets worse
    _, _, metadata = pretrained(job(tmp_path, images, lr=0.5))
    assert metadata["kept_step"] == 6 and len(metadata["curve"]) == 2
