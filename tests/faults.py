"""For the tests of s3, storage and folders: calls that fail some times, and Python in a process of
its own.
"""

import subprocess
import sys
import textwrap
from pathlib import Path


class Flaky:
    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self, value=1):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return value


def run_python(source: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(source), *arguments]
    return subprocess.run(
        command,
        check=False,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
