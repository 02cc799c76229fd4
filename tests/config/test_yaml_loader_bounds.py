"""A hostile or careless job file: bounded in time and memory, one line each; values of variables
never stand in an error.
"""

import time

import pytest

from pipeline.config import yaml_loader
from pipeline.config.schema import JobError

SECRET = "hunter2-very-secret"


def refused(folder, text: str, *overrides: str) -> list[str]:
    (folder / "job.yaml").write_text(text)
    with pytest.raises(JobError) as caught:
        yaml_loader.load(folder / "job.yaml", overrides)
    return str(caught.value).splitlines()


def test_aliases_of_aliases_are_refused(tmp_path):
    """Nine lines stood for 10^8 values, and ran for ever."""
    began = time.monotonic()
    lines = [
        "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
    ]
    assert any(
        "more than 100000 values, once its aliases (*name) are written out" in line
        for line in refused(tmp_path, "\n".join(lines))
    )
    merges = [
        "a0: &a0 {x: 1}",
        *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)),
    ]
    assert any("more than 100000 values" in line for line in refused(tmp_path, "\n".join(merges)))
    assert time.monotonic() - began < 120, "it ends"


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: " + "{b: " * 5000, "a: " + "[" * 5000 + "]" * 5000]
)
def test_thousands_of_brackets_are_one_line(text, tmp_path):
    assert any("nested too deeply" in line for line in refused(tmp_path, text))
    assert any(
        "--set a: the value is nested too deeply" in line
        for line in refused(tmp_path, "name: x\n", "a=" + "[" * 5000)
    )


@pytest.mark.parametrize(
    "text",
    [
        "name: x\nsources: {a: {backbone: '${TOKEN}', init: 'file:${TOKEN}'}}",
        "name: x\nseed: ${TOKEN}\nstorage: 'gs://${TOKEN}/x'",
        "name: x\nsources: {a: {backbone: timm/resnet18, data: {uri: 'data/${TOKEN}.parquet', "
        "modality: image}, objective: '${TOKEN}'}}",
        "name: x\n'${TOKEN}': 1\nsources: {'${TOKEN}': {backbone: nothing}}",
        "name: x\ntechniques: ['${TOKEN}', {full: {'${TOKEN}': 1}}]",
    ],
)
def test_values_of_variables_never_stand_in_an_error(text, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    said = "\n".join(refused(tmp_path, text))
    assert SECRET not in said and "${TOKEN}" in said
    said = "\n".join(refused(tmp_path, "name: x\n", "seed=${TOKEN}", "sources.a.backbone=${TOKEN}"))
    assert SECRET not in said and "${TOKEN}" in said


def test_a_short_value_is_hidden_where_it_is_the_whole_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PIN", "x1")
    said = "\n".join(refused(tmp_path, "name: x\nseed: '${PIN}'\nsources: {}"))
    assert "(got '${PIN}')" in said and "x1" not in said
