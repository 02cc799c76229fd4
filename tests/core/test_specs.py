"""Specs and records as JSON: they come back as they were, and keys are what they were as dictionaries."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pipeline.config.schema import spec_hash
from pipeline.core.specs import Architecture, ModalitySpec, ObjectiveSpec
from pipeline.report.results import ResultRow
from pipeline.report.trial_record import CurvePoint, TrialRecord
from pipeline.transfer.grid import BackboneGroup

ARCH = Architecture("timm/resnet18", {"drop_rate": 0.1}, {"channels": 3, "size": 32})
IMAGE = ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3})
ROW = ResultRow(
    trial_id="one",
    seed=1,
    metric="accuracy",
    value=0.5,
    hyper_parameters='{"lr": 0.1, "steps": 3}',
    started_at=datetime(2025, 5, 1, 12, 30, 15, 250000, tzinfo=UTC),
)


@pytest.mark.parametrize("spec", [ARCH, IMAGE, ObjectiveSpec("ctc", {}, {"labels": ["a"]})])
def test_a_spec_comes_back_as_it_was(spec):
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"name": "image", "options": {}}, "options, state; state missing"),
        ({**IMAGE.to_json(), "inputs": {}}, "options, state; not inputs"),
        ({**IMAGE.to_json(), "state": []}, "state is .*JSON object was expected"),
        ({**IMAGE.to_json(), "name": 3}, "name is 3; a text"),
        ("image", "a JSON object with name, options, state was expected"),
    ],
)
def test_what_is_no_spec_is_refused(found, message):
    with pytest.raises(ValueError, match=f"ModalitySpec: .*{message}"):
        ModalitySpec.from_json(found)


def test_the_key_of_what_trials_start_from_is_that_of_plain_dictionaries():
    arch = {"name": ARCH.name, "options": ARCH.options, "inputs": ARCH.inputs}
    modality = {"name": IMAGE.name, "options": IMAGE.options, "state": IMAGE.state}
    assert BackboneGroup(ARCH, IMAGE, "resnet", ("a",)).key == spec_hash(arch, modality)


def test_a_record_comes_back_as_it_was():
    record = TrialRecord("one", rows=(ROW,), curve=(CurvePoint(3, {"accuracy": 0.5}),))
    found = json.loads(json.dumps(record.to_json()))
    assert TrialRecord.from_json(found) == record
    assert found["version"] == 1 and found["curve"] == [{"step": 3, "accuracy": 0.5}]
    assert found["rows"][0]["hyper_parameters"] == {"lr": 0.1, "steps": 3}, "as an object"
    assert not {"gain", "current", "drawn"} & found["rows"][0].keys(), "what all trials tell"


def test_a_record_of_before_it_had_a_version_is_read_and_a_newer_one_is_not():
    found = replace(TrialRecord("one", rows=(ROW,)), status="failed").to_json()
    old = {name: found[name] for name in ("trial_id", "status", "rows", "validation")}
    assert TrialRecord.from_json(old).failed and TrialRecord.from_json(old).files == {}
    with pytest.raises(ValueError, match="version 2, this program reads up to 1"):
        TrialRecord.from_json({**found, "version": 2})
    with pytest.raises(ValueError, match="no record of a trial"):
        TrialRecord.from_json({"trial_id": "one"})
