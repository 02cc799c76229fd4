"""A bundle of what differs from another one gives the same weights, takes little room, and says
when that other one is not as it was.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from toys import (
    SMALL,
    image_files,
    job_of,
    label_state,
    make_run,
    shared_of,
    task_of,
    text_modality,
    text_rows,
    trial_of,
    weights,
)

from pipeline.checkpoints import bundle, differences, export
from pipeline.config import registry
from pipeline.config.schema import Fanout
from pipeline.core.specs import ModalitySpec
from pipeline.io import storage
from pipeline.train import loop
from pipeline.transfer import trial

NETWORK = {**SMALL, "hidden": 64}


def tuned(name: str, **options):
    """A source's task and the same network after two steps of a technique."""
    modality = text_modality()
    tasks = [
        task_of(
            "transformers/bert", modality.inputs(), "classification", label_state(), 3, **NETWORK
        )
        for _ in range(2)
    ]
    kind = registry.get("technique", name)
    technique = kind(kind.options_class(**options))
    torch.manual_seed(1)
    wrapped = technique.wrap(tasks[1])
    rows = text_rows(16, modality)
    loop.fit(make_run(rows, wrapped, steps=2, technique=technique, lr=0.02, warmup=0.0))
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    return tasks[0], technique.finish(wrapped).eval(), spec


def saved(folder, name: str, **options):
    """Places of the source's bundle, of a whole one and of one of changes; and the tuned task."""
    source, task, spec = tuned(name, **options)
    places = [str(folder / place) for place in ("source", "whole", "changes")]
    bundle.save(places[0], source.backbone, spec)
    sha256 = bundle.weights_sha256(places[0])
    base = bundle.Base(places[0], sha256, weights(source.backbone))
    bundle.save(places[1], task, spec)
    bundle.save(places[2], task, spec, base=base, parent=places[0])
    return places, task


def size(place: str) -> int:
    return Path(place, "weights.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("name", "options", "share"),
    [
        ("lora", {"rank": 2}, 0.2),
        ("linear_probe", {"solver": "sgd"}, 0.02),
        ("bitfit", {}, 0.06),
        ("surgical", {"layers": ["block01"]}, 0.5),
        ("full", {}, 1.05),
    ],
)
def test_changes_give_the_same_weights_in_less_room(tmp_path, name, options, share):
    (_, whole, changes), task = saved(tmp_path, name, **options)
    found, expected = bundle.load(changes), weights(task)
    assert found.tensors.keys() == expected.keys()
    for one, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert (found.tensors[one] - tensor).abs().max() <= 1e-6 * scale, one
    if name != "lora":
        assert all(torch.equal(found.tensors[one], tensor) for one, tensor in expected.items())
    assert size(changes) < share * size(whole)
    assert found.manifest.base is not None and found.manifest.parent == found.manifest.base["uri"]
    assert not found.task().training


def test_a_whole_bundle_names_no_base(tmp_path):
    (_, whole, _), _ = saved(tmp_path, "bitfit")
    stated = Path(whole, "manifest.json").read_text()
    assert '"base"' not in stated and '"format_version": 1' in stated


def test_a_base_that_is_gone_or_changed_is_named(tmp_path):
    (source, _, changes), task = saved(tmp_path, "bitfit")
    shutil.move(source, tmp_path / "elsewhere")
    with pytest.raises(
        bundle.BundleError, match=r"changes holds what differs from .*source, which"
    ):
        bundle.load(changes)
    with torch.no_grad():
        next(task.backbone.parameters()).add_(1.0)
    bundle.save(source, task.backbone, bundle.load(str(tmp_path / "elsewhere")).manifest.modality)
    with pytest.raises(bundle.BundleError, match="whose weights have changed since"):
        bundle.load(changes)


def test_an_export_is_whole(tmp_path):
    (source, _, changes), _ = saved(tmp_path, "lora", rank=2)
    expected = bundle.load(changes).tensors
    copy = str(tmp_path / "copy")
    export.export_bundle(changes, copy, "bundle", False)
    shutil.rmtree(source)
    found = bundle.load(copy)
    assert found.manifest.base is None
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_only_changes_of_a_low_rank_are_factored():
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(40, 60, generator=generator)
    low = torch.randn(40, 3, generator=generator) @ torch.randn(3, 60, generator=generator)
    full = torch.randn(40, 60, generator=generator)
    kernel = torch.randn(8, 4, 3, 3, generator=generator)
    base = {"low": before, "full": before, "same": before, "kernel": kernel, "count": torch.ones(1)}
    after = {
        "low": before + low,
        "full": before + full,
        "same": before.clone(),
        "kernel": kernel + torch.ones(8, 1, 1, 1),
        "count": torch.zeros(1),
        "new": full,
    }
    kept = differences.reduce(after, base)
    assert set(kept) == {
        "low#left",
        "low#right",
        "full",
        "kernel#left",
        "kernel#right",
        "count",
        "new",
    }
    assert kept["low#left"].shape == (40, 3) and kept["kernel#right"].shape == (1, 36)
    found = differences.restore(kept, base)
    assert found.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=3e-6)
    assert torch.equal(found["full"], after["full"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_with_a_number_that_is_not_finite_is_kept_whole(value):
    base = {"weight": torch.randn(40, 60, generator=torch.Generator().manual_seed(0))}
    after = {"weight": base["weight"] + 1}
    after["weight"][3, 4] = value
    kept = differences.reduce(after, base)
    assert set(kept) == {"weight"}
    torch.testing.assert_close(differences.restore(kept, base), after, equal_nan=True)


def test_a_trial_s_bundle_is_read_with_its_source_s(tmp_path):
    paths = image_files(tmp_path / "data", {"train": 30, "validation": 12, "test": 20})
    job = job_of(tmp_path, paths, train={"steps": 2})
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    source = storage.join(shared.root, "sources", "src-1", "bundle")
    group = next(iter(shared.backbone_groups.values()))
    backbone = bundle.build_backbone(group.arch, seed=77)
    bundle.save(source, backbone, group.modality)
    shared.parents = {"src": source}
    shared.parent_weights = {"src": bundle.weights_sha256(source)}
    shared.keep_changes_alone = True
    record = trial.run(trial_of(job, shared, "bitfit"), shared)
    uri = record.rows[0].bundle_uri
    found = bundle.load(str(uri))
    assert found.manifest.base == {"uri": source, "sha256": shared.parent_weights["src"]}
    assert size(str(uri)) < 0.2 * size(source)
    found.task()
    side = trial.run(trial_of(job, shared, "side_tuning"), shared)
    whole = bundle.load(str(side.rows[0].bundle_uri))
    assert whole.manifest.base is None, "the source stands inside the network under other names"
    whole.task()
    scratch = trial.run(trial_of(job, shared, "scratch"), shared)
    assert bundle.load(str(scratch.rows[0].bundle_uri)).manifest.base is None
    moved = shutil.move(shared.root, tmp_path / "moved")
    read_again = bundle.load(str(uri).replace(shared.root, str(moved)))
    torch.testing.assert_close(read_again.tensors, found.tensors, rtol=0, atol=0)


def test_jobs_without_a_choice_hash_as_before():
    assert "bundle_weights" not in Fanout().model_dump()
    assert Fanout(bundle_weights="changes").model_dump()["bundle_weights"] == "changes"
