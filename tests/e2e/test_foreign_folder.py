"""A run in a folder that holds packages named like this project's: neither the command nor Ray's
workers take them.
"""

from __future__ import annotations

import pytest

from tests.e2e.conftest import SMALL

pytestmark = pytest.mark.ray


def test_a_folder_that_holds_a_pipeline_of_its_own(onetomany, tmp_path):
    for name in ("pipeline", "cluster"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise SystemExit('the package in the current folder was taken')\n"
        )
    done = onetomany("run", SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "runs/small/report.html").exists()
    assert "was taken" not in done.stdout + done.stderr
