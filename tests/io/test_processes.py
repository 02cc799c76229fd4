"""Which machine this is, and whether a process of it has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
from faults import run_python

from pipeline.io import processes


def test_a_machine_has_another_name_after_it_was_started_again(monkeypatch):
    """Two machines of one host name have started at different times, and so have different ids of
    their start.
    """
    here = processes.machine()
    assert here == processes.machine() and len(here) == 16
    other = run_python("from pipeline.io import processes; print(processes.machine())")
    assert other.stdout.strip() == here, "another process of this machine"
    monkeypatch.setattr(processes.Path, "read_text", lambda path, encoding: "another start\n")
    assert processes.machine() != here


def test_a_process_has_ended_when_it_is_gone_a_zombie_or_another_one():
    began = psutil.Process().create_time()
    assert not processes.has_ended(os.getpid()) and not processes.has_ended(
        os.getpid(), began + 0.3
    )
    assert processes.has_ended(os.getpid(), began - 5000)
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert processes.has_ended(child.pid), "its parent has not asked for it"
    assert processes.has_ended(child.pid)
