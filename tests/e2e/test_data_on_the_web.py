"""A whole job whose data are on a web server; a second run, and one on the same data on disk, have
nothing to do.
"""

from __future__ import annotations

import pytest
from web_server import web_server

from tests.e2e.conftest import TINY


@pytest.mark.slow
def test_a_job_reads_its_data_from_a_web_server(tiny_data, onetomany_here, tmp_path):
    with web_server() as web:
        for file in tiny_data.iterdir():
            if file.is_file():
                web.put(file.name, file.read_bytes())
        words = ("run", TINY, "--only", "shoes", "--set", f"storage={tmp_path}/runs")
        done = onetomany_here(*words, cwd=tmp_path, env={"TINY_DATA": web.address})
        assert done.returncode == 0, done.stderr[-4000:]
        assert any(line.startswith("/images.parquet bytes=") for line in web.requests)
        again = onetomany_here(*words, cwd=tmp_path, env={"TINY_DATA": web.address})
        assert again.returncode == 0 and "nothing to run" in again.stderr
        # the same bytes on disk are the same data
        local = onetomany_here(*words, cwd=tmp_path)
        assert local.returncode == 0 and "nothing to run" in local.stderr
