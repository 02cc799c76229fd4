"""What a run shows: without a terminal one line every few seconds, and nothing that makes a log
unreadable.
"""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from pipeline.train.progress import PLAIN_EVERY_SECONDS, Progress, duration, training_line

NOW = time.struct_time((2026, 1, 2, 9, 5, 7, 4, 2, 0))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shown():
    """(progress as a run makes it when its errors go to a file, its clock, the lines so far)."""
    file, clock = io.StringIO(), Clock()
    progress = Progress(clock=clock, now=lambda: NOW)
    progress.console.file = file

    def lines() -> list[str]:
        found = file.getvalue().splitlines()
        assert all(line.startswith("09:05:07 ") for line in found), "every line has its time"
        return [line.removeprefix("09:05:07 ") for line in found]

    return progress, clock, lines


def record(step: int, **more) -> dict:
    return {
        "step": step,
        "steps": 200,
        "loss": 1.23456,
        "accuracy": 0.5,
        "rows_per_second": 812.4,
        "wait_share": 0.034,
        "eta_seconds": 75.2,
        **more,
    }


# ---------------------------------------------------------------- when a line is written


def test_without_a_terminal_there_is_one_line_every_five_seconds(shown):
    progress, clock, lines = shown
    assert PLAIN_EVERY_SECONDS == 5.0
    with progress:
        for step in range(121):  # two minutes, one update a second
            progress.update(f"step {step}")
            clock.now += 1.0
    assert lines() == [f"step {step}" for step in range(0, 121, 5)]


def test_a_line_of_which_the_time_left_alone_changes_comes_every_thirty_seconds(shown):
    progress, clock, lines = shown
    for second in range(61):
        progress.update(f"trials {second // 60}/3  ETA {99 - second}s")
        clock.now += 1.0
    assert lines() == ["trials 0/3  ETA 99s", "trials 0/3  ETA 69s", "trials 1/3  ETA 39s"]


def test_the_first_line_comes_at_once_and_a_line_that_did_not_change_does_not_come_again(shown):
    progress, clock, lines = shown
    progress.update("waiting")
    assert lines() == ["waiting"]
    for _ in range(5):
        clock.now += 30
        progress.update("waiting")
    assert lines() == ["waiting"]
    progress.update("step 1")
    assert lines() == ["waiting", "step 1"]


def test_a_final_line_is_written_whenever_it_comes(shown):
    progress, clock, lines = shown
    progress.update("step 1")
    clock.now += 0.1
    progress.update("step 2")
    progress.update("step 3", final=True)
    assert lines() == ["step 1", "step 3"]
    progress.update("step 3", final=True)
    assert lines() == ["step 1", "step 3"], "once"


def test_a_note_is_written_always_and_takes_no_turn(shown):
    progress, clock, lines = shown
    progress.update("step 1")
    for _ in range(2):
        progress.note("warning: the same")
    clock.now += 5
    progress.update("step 2")
    assert lines() == ["step 1", "warning: the same", "warning: the same", "step 2"]


def test_lines_stand_as_they_are(shown):
    """Neither wrapped nor coloured, and brackets are no markup."""
    progress, _, lines = shown
    long = (
        "task: " + "a sentence of several words " * 20 + "[red]s3://bucket/a b[/red] [1, 2] 10% 'x'"
    )
    progress.note(long)
    progress.update(long + " and more", final=True)
    assert lines() == [long, long + " and more"]


def test_names_between_colons_are_no_emoji(shown):
    progress, _, lines = shown
    progress.note("hf:cat: no config.json in this folder")
    progress.update("bundle:key:1", final=True)
    assert lines() == ["hf:cat: no config.json in this folder", "bundle:key:1"]


def test_on_a_terminal_the_newest_line_is_live_and_wiped_in_the_end():
    file = io.StringIO()
    with Progress(Console(file=file, force_terminal=True, width=100)) as progress:
        progress.note("a note stays")
        for step in range(50):
            progress.update(f"step {step}.", final=step == 49)
    written = file.getvalue()
    assert written.count("a note stays") == 1 and "step 49." in written
    assert written.count("step ") < 10, "drawn now and then, however often it is told"
    assert written.rstrip().endswith("\x1b[2K"), "the line is wiped"


# ---------------------------------------------------------------- what a line says


def test_a_line_has_step_and_total_loss_rate_wait_and_eta():
    assert (
        training_line("garments", record(40))
        == "garments: step 40/200  loss 1.235  accuracy 0.5  812 rows/s  data wait 3%  ETA 1m15s"
    )


def test_a_line_shows_validation_metrics_without_their_loss_and_no_other_facts():
    line = training_line(
        "a",
        record(
            40,
            validation_accuracy=0.81239,
            validation_macro_f1=0.7,
            validation_loss=0.4,
            lr=1e-3,
            grad_norm=3.0,
            skipped_steps=0,
        ),
    )
    assert "val accuracy 0.8124  val macro_f1 0.7" in line
    assert (
        "val loss" not in line and "lr" not in line and "grad" not in line and "skipped" not in line
    )


def test_values_of_an_earlier_validation_are_told_with_their_step():
    validated = {"validation_accuracy": 0.8, "validated_step": 40}
    assert "val accuracy 0.8  812 rows/s" in training_line("a", record(40, **validated))
    line = training_line("a", record(60, **validated))
    assert "val accuracy 0.8  (val of step 40)  812 rows/s" in line


def test_skipped_steps_are_shown():
    assert training_line("a", record(40, skipped_steps=3)).endswith(
        "ETA 1m15s  3 steps skipped (not finite)"
    )


def test_a_line_counts_tokens_or_seconds_of_sound_where_they_are_the_unit():
    line = training_line("a", record(40, unit="tokens", units_per_second=51234.4))
    assert "51234 tokens/s" in line and "rows/s" not in line


def test_a_line_says_why_a_run_has_stopped():
    line = training_line("a", {"step": 150, "steps": 300, "stopped": "no better accuracy"})
    assert line == "a: step 150/300  stopped: no better accuracy"
    assert "ETA" not in training_line("a", record(40, stopped="no better accuracy"))


def test_a_line_is_made_of_whatever_is_known():
    assert (
        training_line("a", {"step": 3, "steps": 9, "validation_accuracy": 0.25})
        == "a: step 3/9  val accuracy 0.25"
    )
    assert "loss nan" in training_line("a", record(1, loss=float("nan")))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (61, "1m01s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (3600, "1h00m"),
        (3661, "1h01m"),
        (100 * 3600 + 59 * 60, "100h59m"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
