"""What Ray prints and is no error is kept from the terminal, and nothing else is."""

import os
import subprocess
import sys

NOISE = (
    "[2026-11-30 18:12:25,563 E 3228 3228] core_worker.cc:2465: Actor with class name: "
    "'MapWorker(MapBatches(_Worker))' and ID: '7f0af3a9' has constructor arguments in the object "
    "store and max_restarts > 0. If the arguments in the object store go out of scope or are "
    "lost, the actor restart will fail."
)
PROGRAM = """
import os, sys
from pipeline.io.ray_environment import without_noise

with without_noise():
    os.write(2, b"{noise}\\n[... E 1 2] core_worker.cc:9: the raylet has died\\n")
    print("from Python", file=sys.stderr)
    {ending}
os.write(2, b"afterwards\\n")
"""


def printed(ending: str, **env: str) -> list[str]:
    program = PROGRAM.format(noise=NOISE, ending=ending)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **env}
    )
    return sorted(done.stderr.splitlines())


def test_only_what_is_no_error_is_left_out():
    died = "[... E 1 2] core_worker.cc:9: the raylet has died"
    assert printed("pass") == sorted([died, "from Python", "afterwards"])


def test_the_last_words_of_a_process_that_crashes_are_printed():
    died = "[... E 1 2] core_worker.cc:9: the raylet has died"
    assert printed("os.abort()") == sorted([died, "from Python"])


def test_characters_that_the_terminal_has_not_are_written_as_their_numbers():
    ending = "print('\\u00b5 \\udcff', file=sys.stderr)"
    found = printed(ending, PYTHONIOENCODING="ascii:backslashreplace")
    assert r"\xb5 \udcff" in found and "afterwards" in found


def test_that_objects_were_lost_is_printed():
    lost = "[... E 1 2] core_worker.cc:609: :info_message: Attempting to recover 6 lost objects"
    assert lost in printed(f"os.write(2, b'{lost}\\n')")
