"""SIGTERM is answered as Ctrl-C is, whatever a library installs meanwhile; whole commands in
tests/e2e/test_stops.py.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(source: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(source), *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_sigterm_is_a_keyboard_interrupt_with_an_exit_code_of_its_own():
    done = python("""
        import os, signal, sys
        from pipeline.io import signals as stopping
        stopping.install()
        assert stopping.exit_code() == 130
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the way out
            sys.exit(stopping.exit_code())
    """)
    assert done.returncode == 143, done.stderr


def test_a_command_that_ignores_ctrl_c_answers_sigterm():
    """As one that a script starts in its background: passing SIGTERM on as SIGINT would be lost."""
    done = python("""
        import os, signal, sys
        from pipeline.io import signals as stopping
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stopping.install()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            sys.exit(stopping.exit_code())
    """)
    assert done.returncode == 143, done.stderr


def test_whoever_answers_ctrl_c_answers_sigterm():
    """Ray Train's own way of ending its ranks is its handler of SIGINT."""
    done = python("""
        import os, signal, sys
        from pipeline.io import signals as stopping
        stopping.install()
        signal.signal(signal.SIGINT, lambda number, frame: sys.exit(7))
        os.kill(os.getpid(), signal.SIGTERM)
    """)
    assert done.returncode == 7, done.stderr


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_handler_that_a_library_installs_does_not_stay(when):
    """As ray.init does, whose handler ends the process with sys.exit(15)."""
    done = python(
        """
        import os, signal, sys
        from pipeline.io import signals as stopping
        stopping.install()
        try:
            with stopping.keep_signal_handler():
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
                if sys.argv[1] == "during":
                    os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            sys.exit(stopping.exit_code())
    """,
        when,
    )
    assert done.returncode == 143, done.stderr


@pytest.mark.slow
def test_outside_a_command_nothing_is_installed():
    """The library alone leaves the signals of its host as they are."""
    done = python("""
        import os, signal
        from pipeline.io import signals as stopping
        from pipeline.train import launch
        with stopping.keep_signal_handler():
            signal.signal(signal.SIGTERM, lambda number, frame: None)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    """)
    assert done.returncode == 0, done.stderr


def test_exit_codes_are_those_of_shells():
    from pipeline.io import signals

    assert (
        (signals.CTRL_C, signals.TERMINATED)
        == (128 + signal.SIGINT, 128 + signal.SIGTERM)
        == (130, 143)
    )
