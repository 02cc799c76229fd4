"""A target read in grey from a source of colours: the backbone takes one channel, its first layer's
colours summed, and from scratch as well.
"""

import torch

from pipeline.checkpoints import bundle
from pipeline.io import storage
from pipeline.transfer import planned_trials, stages, trial
from tests import toys
from tests.stage_runs import run_through
from tests.transfer import test_stages

here, bundles = test_stages.here, test_stages.bundles


def test_a_grey_target_of_a_source_of_colours(tmp_path, bundles, here):
    """One channel through the sums gives what the grey picture gave through all three, as the
    source's colours had one mean and deviation.
    """
    paths = toys.image_files(
        tmp_path / "data", {"train": 36, "validation": 18, "test": 18}, channels=1
    )
    job, features = test_stages.job_of(tmp_path, {"a": bundles["a"]}, paths), []
    for one in (job, test_stages.with_data(job, "task", modality={"image": {"channels": 1}})):
        state = test_stages.prepared(one)
        shared = stages.prepare_shared(state)
        (data,), (base,) = shared.targets.values(), shared.backbone_groups.values()
        last = planned_trials.final_trials(state, [base], {"task": {"a"}}, {})[-1]
        assert last.source == "a"
        task, moved, _ = trial.build_task(last, shared)
        modality, batch = bundle.build_modality(data.modality), toys.take(data.train, range(6))
        features.append(task.backbone.eval()(batch).pooled)
    assert "3 input channels summed into 1" in moved
    assert data.arch.inputs == {"channels": 1, "size": 32}
    assert batch["image"].shape[1] == 1
    assert modality.state == {"mean": [0.5], "std": [0.2]}
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)
    _, rows = run_through(one)
    assert {(row.source, row.technique) for row in rows} == {
        ("none", "scratch"),
        ("a", "full"),
    }
    assert len(here) == 2
    assert not stages.failures(state, rows) and storage.exists(job.root)
    kept = next(row.bundle_uri for row in rows if row.technique == "full" and row.bundle_uri)
    assert bundle.load(kept).manifest.arch.inputs["channels"] == 1
