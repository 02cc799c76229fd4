"""Batches by cost are for rows that differ in length, told before any row is read."""

import re
from typing import Any, cast

import pytest

from pipeline.checkpoints.pretrained import PretrainedCheckpoint
from pipeline.config.schema import Data, Source, Train
from pipeline.core.contracts import Objective
from pipeline.train import config_checks, fit_components


def spec(**data) -> Data:
    return Data.model_validate(
        {"uri": "rows.parquet", "modality": "audio", "columns": {"audio": "audio"}, **data}
    )


def refused(data: Data, train: dict, objective: type = Objective) -> str:
    with pytest.raises(ValueError) as error:
        config_checks.check_costs("sources.a", data, Train.model_validate(train), objective)
    return str(error.value)


def test_batch_cost_is_for_rows_that_cost_differently():
    assert refused(spec(modality="image", columns={"image": "image"}), {"batch_cost": 9}) == (
        "sources.a.train.batch_cost: rows of image all cost the same here (it is for audio, "
        "events, trajectory); use global_batch"
    )
    assert "rows of audio all cost the same" in refused(
        spec(), {"batch_cost": 9}, type("Packed", (Objective,), {"packed": True})
    )
    config_checks.check_costs(
        "sources.a", spec(), Train.model_validate({"batch_cost": 9}), Objective
    )
    config_checks.check_costs(
        "sources.a", spec(modality="image", columns={"image": "image"}), Train(), Objective
    )


def test_batch_cost_takes_no_weights():
    assert "corpora with weights are drawn row by row" in refused(
        spec(weight=0.5, more=[{"uri": "other.parquet", "modality": "audio", "weight": 0.5}]),
        {"batch_cost": 9},
    )


def source_of(modality: str, options: dict[str, object]) -> Source:
    objective = {"audio": "classification", "text": "qa"}.get(modality, "classification")
    data = {
        "uri": "rows.parquet",
        "modality": {modality: options},
        "columns": {modality: modality, "label": "label"},
    }
    backbone = {"image": "timm/test_resnet", "text": "transformers/bert"}.get(
        modality, "wavenet/wavenet"
    )
    return Source.model_validate({"data": data, "objective": objective, "backbone": backbone})


@pytest.mark.parametrize(
    ("modality", "fine", "ignored", "reason"),
    [
        (
            "image",
            {"fit": "crop", "crop_share": 0.5},
            {"fit": "pad", "crop_share": 0.5},
            "crop_share 0.5 has no effect with fit: pad, which crops nothing",
        ),
        (
            "image",
            {"area": [0.1, 1.0]},
            {"size": 48, "area": [0.1, 1.0]},
            "area [0.1, 1.0] has no effect with crop: shift",
        ),
        (
            "image",
            {"size": 48, "crop": "resized", "scale": [0.5, 2.0]},
            {"crop": "none", "scale": [0.5, 2.0]},
            "scale [0.5, 2.0] has no effect with crop: none",
        ),
        (
            "audio",
            {"noise": 0.1, "noise_snr": [5.0, 9.0]},
            {"noise_snr": [5.0, 9.0]},
            "noise_snr [5.0, 9.0] has no effect without noise",
        ),
        (
            "audio",
            {"features": "wave", "time_masks": 0},
            {"features": "wave", "time_masks": 2},
            "time_masks 2 has no effect where the backbone reads samples",
        ),
        ("text", {"windows": 4, "stride": 8}, {"stride": 8}, "stride 8 has no effect without"),
    ],
)
def test_options_that_would_change_nothing_are_refused(modality, fine, ignored, reason):
    config_checks.check_source("sources.a", source_of(modality, fine))
    with pytest.raises(ValueError, match=re.escape(f"sources.a.data.modality: {reason}")):
        config_checks.check_source("sources.a", source_of(modality, ignored))


def test_of_weights_alone_an_option_that_would_change_nothing_is_refused(tmp_path):
    """A file of weights brings no options of its own, so only the job's count."""
    data = {"uri": "rows.parquet", "modality": {"image": {"size": 32, "area": [0.1, 1.0]}}}
    spec = Source.model_validate(
        {
            "data": {**data, "columns": {"image": "image", "label": "label"}},
            "objective": "classification",
            "backbone": "timm/test_resnet",
            "init": "file:w.safetensors",
        }
    )
    config_checks.check_source("sources.a", spec)
    weights = PretrainedCheckpoint("file:w.safetensors", {})
    with pytest.raises(ValueError, match=r"sources\.a\.data\.modality: area .* no effect with"):
        fit_components.fit_modality(
            spec, cast(Any, None), weights, "sources.a", str(tmp_path / "modality.json")
        )


def test_an_average_of_weights_that_the_teacher_replaces_is_refused():
    def spec(carry: str, **more) -> Source:
        data = {"uri": "rows.parquet", "modality": "image", "columns": {"image": "image"}}
        objective = {"dino": {"carry": carry}}
        return Source.model_validate(
            {"data": data, "objective": objective, "backbone": "timm/test_resnet", **more}
        )

    config_checks.check_source("sources.a", spec("student", train={"ema": 0.99}))
    config_checks.check_source("sources.a", spec("teacher"))
    with pytest.raises(ValueError, match=r"sources\.a\.train\.ema: the bundle of dino holds"):
        config_checks.check_source("sources.a", spec("teacher", train={"ema": 0.99}))
    averaging = {"technique": "ema", "init": "file:w.safetensors"}
    with pytest.raises(ValueError, match=r"sources\.a\.technique: the bundle of dino holds"):
        config_checks.check_source("sources.a", spec("teacher", **averaging))
