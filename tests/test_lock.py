"""requirements.lock and pyproject.toml's constraints hold the same versions, and neither names
where packages come from.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def locked() -> set[str]:
    found = re.findall(
        r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==([^\s;\\]+)\s*(;[^\\\n]*)?",
        (ROOT / "requirements.lock").read_text(),
        re.MULTILINE,
    )
    return {
        f"{name}=={version}{' ' + marker.strip() if marker else ''}".replace('"', "'")
        for name, version, marker in found
    }


def test_constraints_are_what_is_locked():
    constraints = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"][
            "constraint-dependencies"
        ]
    )
    assert len(constraints) > 100 and constraints == locked()


def test_what_builds_this_package_is_locked():
    """hatchling and what it needs: used from the lock by --no-build-isolation, and by their
    versions where uv isolates the build.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {
        re.split(r"[><=]", requirement)[0] for requirement in project["build-system"]["requires"]
    }
    assert names == {"hatchling"}
    builders = set(project["tool"]["uv"]["build-constraint-dependencies"])
    assert builders <= locked() and {name.split("==")[0] for name in builders} >= names | {
        "editables",
        "pathspec",
        "pluggy",
        "trove-classifiers",
    }


def test_every_locked_version_has_a_hash_and_no_index():
    text = (ROOT / "requirements.lock").read_text()
    assert "--index-url" not in text and "://" not in text
    assert all(
        "--hash=sha256:" in entry
        for entry in re.split(r"\n(?=[A-Za-z0-9])", text.strip())
        if "==" in entry.splitlines()[0]
    )
