"""Batches by cost are for rows that differ in length, told before any row is read."""

import pytest

from pipeline.config.schema import Data, Source, Train
from pipeline.core.contracts import Objective
from pipeline.train import config_checks


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
        "events, trajectory); say global_batch"
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


def test_a_crop_share_is_for_a_crop():
    def images(**options) -> Source:
        data = {
            "uri": "rows.parquet",
            "modality": {"image": options},
            "columns": {"image": "image", "label": "label"},
        }
        return Source.model_validate(
            {"data": data, "objective": "classification", "backbone": "timm/test_resnet"}
        )

    config_checks.source("sources.a", images(crop_share=0.5))
    config_checks.source("sources.a", images(fit="squash"))
    with pytest.raises(
        ValueError,
        match=r"sources\.a\.data\.modality: crop_share 0\.5 has no effect with fit: pad, which "
        r"crops nothing",
    ):
        config_checks.source("sources.a", images(fit="pad", crop_share=0.5))
