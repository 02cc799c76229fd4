"""Pretraining without labels raises the online probe over random weights, on real images, through
the whole source stage.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.checkpoints import bundle
from pipeline.config.schema import Job
from pipeline.data.stream import DataWorkers
from pipeline.train import online_probe, pretrain, source
from pipeline.train.ranks import Ranks

pytestmark = [pytest.mark.slow, pytest.mark.data, pytest.mark.timeout(900)]
FOLDER = Path(os.environ.get("ONETOMANY_DATA", ""), "vision/fashion_mnist")

CASES = {
    "simclr": (
        {"simclr": {"area": 0.2, "blur": 0.0, "jitter": 0.5}},
        "timm/test_resnet",
        32,
        {"steps": 120, "global_batch": 128},
        0.02,
    ),
    "dino": (
        {
            "dino": {
                "local_crops": 2,
                "prototypes": 512,
                "hidden": 256,
                "bottleneck": 64,
                "momentum": 0.97,
                "temperature_end": 0.04,
            }
        },
        "timm/test_resnet",
        32,
        {"steps": 160, "global_batch": 64},
        0.01,
    ),
    "mae": (
        {"mae": {"width": 64, "depth": 1, "heads": 2, "norm_pixels": False, "mask_ratio": 0.5}},
        "timm/test_vit",
        64,
        {"steps": 400, "global_batch": 64, "lr": 3e-3},
        0.01,
    ),
}
"""Objective, backbone, pixels, run, and by how much the accuracy of the 5 nearest rows must
rise.
"""


@pytest.mark.skipif(
    not (FOLDER / "train.parquet").is_file(),
    reason="ONETOMANY_DATA names no folder with vision/fashion_mnist",
)
@pytest.mark.parametrize("name", CASES)
def test_nearest_neighbours_get_better(tmp_path, name):
    objective, backbone, size, train, rise = CASES[name]
    train_file, test_file = str(FOLDER / "train.parquet"), str(FOLDER / "test.parquet")
    job = Job.model_validate(
        {
            "name": "ssl",
            "storage": str(tmp_path),
            "sources": {
                "garments": {
                    "data": {
                        "uri": train_file,
                        "modality": {"image": {"size": size, "channels": 1}},
                        "columns": {"image": "image"},
                        "decode": "memory",
                        "validation_fraction": 0.02,
                    },
                    "probe": {
                        "train": train_file,
                        "validation": test_file,
                        "modality": "image",
                        "columns": {"image": "image", "label": "label"},
                    },
                    "backbone": backbone,
                    "objective": objective,
                    "train": {"lr": 2e-3, "eval_every_steps": train["steps"], **train},
                }
            },
        }
    )
    stage = source.plan_source(job, "garments")
    fitted = source.prepare_source(stage)
    work = pretrain.rank_job(stage, fitted, DataWorkers(), 1)
    task = bundle.build_task(fitted.arch, fitted.objective, seed=work.seed)
    assert fitted.probe is not None
    tried = online_probe.ProbeEvaluator(
        fitted.probe,
        bundle.build_modality(fitted.modality),
        Ranks(),
        lambda: torch.autocast("cpu", enabled=False),
    )
    before = tried(task)
    metadata = pretrain.train_rank(work, Ranks(), decoded_rows=pretrain.decode_once(work))
    after = metadata["metrics"]["probe_knn"]
    print(
        f"{name}: {before:.3f} with random weights, {after:.3f} after {train['steps']} steps "
        f"of {train['global_batch']} rows"
    )
    assert after > before + rise
