"""Side-tuning starts as the source's network, keeps it, and is loaded again from its bundle."""

from dataclasses import replace

import pytest
import torch
from contract_rows import MODALITIES, OBJECTIVES, classified
from toys import image_files, job_of, make_run, shared_of, take, trial_of, weights

from pipeline.checkpoints import bundle
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Task
from pipeline.core.specs import Spec
from pipeline.train import loop, source
from pipeline.transfer import trial

KINDS = {name: backbone for name, (_, backbone) in MODALITIES.items()}


def scores(task: Task, batch) -> torch.Tensor:
    with torch.no_grad():
        return task.eval().objective.predict(task.backbone, batch)["scores"]


@pytest.mark.parametrize("kind", KINDS)
def test_side_tuning_starts_as_the_source_and_leaves_it_as_it_was(kind):
    task, rows = classified(KINDS[kind])
    batch = take(rows, range(4))
    plain, before = scores(task, batch), weights(task.backbone)
    used = registry.get("technique", "side_tuning")()
    wrapped = used.wrap(task)
    assert (scores(wrapped, batch) - plain).abs().max() < 1e-5
    run = make_run(
        rows, wrapped, steps=3, technique=used, global_batch=4, lr=1e-2, weight_decay=0.1
    )
    outcome = loop.fit(run)
    after = weights(wrapped.backbone)
    assert all(torch.equal(after[f"base.{name}"], tensor) for name, tensor in before.items())
    assert any(not torch.equal(after[f"side.{name}"], tensor) for name, tensor in before.items())
    assert after["mix"] != 0
    layers = wrapped.layers()
    named = dict(wrapped.named_parameters())
    moved = [one for name, ones in layers.items() if not name.startswith("base.") for one in ones]
    assert outcome.params_trained == sum(named[one].numel() for one in moved)
    assert list(layers)[-1] == "head"
    share = after["mix"].sigmoid()
    with torch.no_grad():
        both = [one.eval()(batch).pooled for one in (wrapped.backbone.base, wrapped.backbone.side)]
        found = wrapped.backbone.eval()(batch).pooled
    assert torch.allclose(found, share * both[0] + (1 - share) * both[1], atol=1e-5)


@pytest.mark.parametrize("name", ["hourly", "clm"])
def test_other_outputs_than_features_are_those_of_both(name):
    """The hours of tokens and whether they have events; the embedding of a tied output."""
    case = OBJECTIVES[name]
    built = replace(case, options={"generate": 3} if name == "clm" else {}).build(name)
    batch = take(built.rows, range(4))
    batch.data.pop("segments", None)  # rows of documents alone are continued
    built.task.eval()
    with torch.no_grad():
        plain = built.task.objective.predict(built.task.backbone, batch)
        wrapped = registry.get("technique", "side_tuning")().wrap(built.task).eval()
        wrapped.backbone.mix.fill_(0.7)
        found = wrapped.objective.predict(wrapped.backbone, batch)
    for key, tensor in plain.items():
        exact = dict(rtol=0, atol=0) if key in ("times", "label", "generated", "count") else {}
        torch.testing.assert_close(found[key], tensor, equal_nan=True, **exact)
    wrapped.train()(batch)[0].backward()
    assert all(p.grad is not None for p in wrapped.backbone.side.parameters())


def test_its_bundle_holds_both_networks_and_is_refused_as_a_source(tmp_path):
    paths = image_files(tmp_path, {"train": 16, "validation": 8, "test": 8})
    job = job_of(tmp_path, paths, train={"steps": 3})
    shared = shared_of(tmp_path, job, paths, keep_bundles=True)
    rows = {
        name: trial.run(trial_of(job, shared, name), shared).rows[0]
        for name in ("side_tuning", "full")
    }
    found = bundle.load(str(rows["side_tuning"].bundle_uri))
    assert found.manifest.technique == Spec("side_tuning")
    task = found.task()
    data = next(iter(shared.targets.values()))
    batch = take(data.test, range(8))
    hits = (scores(task, batch).argmax(-1) == batch["label"]).float().mean()
    assert float(hits) == pytest.approx(rows["side_tuning"].value)
    with pytest.raises(bundle.BundleError, match="does not fit timm/test_vit"):
        bundle.transfer(
            bundle.build_backbone(found.manifest.arch, seed=0), found.backbone_tensors(), "it"
        )

    def plan(row):
        spec = {"backbone": f"bundle:{row.bundle_uri}"}
        next_job = Job.model_validate({**job.model_dump(mode="json"), "sources": {"next": spec}})
        return source.plan_source(next_job, "next")

    assert plan(rows["full"]).is_existing_bundle
    message = r"sources\.next: bundle:.* fine-tuned with side_tuning"
    with pytest.raises(ValueError, match=message):
        plan(rows["side_tuning"])


def test_position_embeddings_of_the_side_network_have_no_weight_decay():
    task, _ = classified("timm/test_vit")
    wrapped = registry.get("technique", "side_tuning")().wrap(task)
    undecayed = wrapped.undecayed_parameters()
    assert {"backbone.side.model.pos_embed", "backbone.side.model.cls_token"} <= undecayed
