"""The extras that messages name are those of pyproject.toml."""

import tomllib
from pathlib import Path

import pytest

from pipeline.config import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
PACKAGES = {
    "bayes_opt": "bayesian-optimization",
    "flashlight": "flashlight-text",
    "mujoco": "gymnasium[mujoco]",
    "stable_baselines3": "stable-baselines3",
}


def test_every_extra_and_each_of_its_modules_is_declared():
    declared = PROJECT["optional-dependencies"]
    assert declared.keys() == extras.EXTRAS.keys()
    for name, modules in extras.EXTRAS.items():
        for module in modules:
            package = PACKAGES.get(module, module)
            assert any(one.startswith(package) for one in declared[name]), (name, module)


def test_the_message_serves_with_and_without_a_clone():
    message = extras.install("robotics")
    assert "uv pip install -e '.[robotics]'" in message and "'onetomany[robotics]'" in message


@pytest.mark.parametrize("version", [(3, 12, 4), (3, 13, 0)])
def test_the_message_says_which_python_has_wheels(monkeypatch, version):
    monkeypatch.setattr(extras.sys, "version_info", version)
    message = extras.install("speech")
    assert message.startswith("uv pip install -e '.[speech]' (without a GPU ")
    assert message.endswith(" with Python 3.12, as there are no wheels for later ones") == (
        version > (3, 13)
    )
    assert PROJECT["optional-dependencies"]["speech"][0].endswith("python_version < '3.13'")
