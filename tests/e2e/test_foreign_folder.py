"""A run in a folder that holds packages named like this project's: neither the command nor Ray's
workers take them.
"""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SMALL

SHARED = pytest.param("shared", marks=[pytest.mark.ray, pytest.mark.slow])
OWN = pytest.param("own", marks=[pytest.mark.ray(own=True), pytest.mark.slow])


@pytest.mark.parametrize("ray", [SHARED, OWN])
def test_a_folder_that_holds_a_pipeline_of_its_own(ray, onetomany_alone, request, tmp_path):
    for name in ("pipeline", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise SystemExit('the package in the current folder was taken')\n"
        )
    env = {"RAY_ADDRESS": request.getfixturevalue("ray_address")} if ray == "shared" else {}
    done = onetomany_alone("run", SMALL, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "runs/small/report.html").exists()
    assert "was taken" not in done.stdout + done.stderr
