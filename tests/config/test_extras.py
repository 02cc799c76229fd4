"""The extras that messages and pages name are those of pyproject.toml, and so are the versions of
Python.
"""

import re
import tomllib
from pathlib import Path

import pytest

from pipeline.config import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
INSTALL = (
    (Path(__file__).parents[2] / "jobs/running.md")
    .read_text()
    .split("## Install")[1]
    .split("\n## ")[0]
)
"""What the page says of the installation."""
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


def test_the_page_of_the_installation_names_every_extra():
    listed = INSTALL.partition("The extras:\n")[2].partition("\n- ")[0]
    heads = re.findall(r"^  - (`.*?): ", listed, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(heads)) == list(extras.EXTRAS)


def test_the_same_versions_of_python_are_named_everywhere():
    first, end = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    versions = [f"3.{minor}" for minor in range(int(first), int(end))]
    prefix = "Programming Language :: Python :: "
    classified = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if prefix in one]
    assert classified == versions == ["3.11", "3.12", "3.13", "3.14"]
    assert f"Python {', '.join(versions[:-1])} or {versions[-1]}, and uv" in INSTALL


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
