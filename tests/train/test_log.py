"""The metrics log where the disk is full: what went wrong is told, and not what the log makes of
it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from toys import image_files

from pipeline.checkpoints import bundle
from pipeline.core.specs import ModalitySpec
from pipeline.data.stream import DataWorkers
from pipeline.io import storage
from pipeline.train import pretrain, source
from pipeline.train.log import MetricsLog
from pipeline.train.ranks import Ranks
from tests.train.test_source import image_job


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB; only root may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path) -> None:
    with (
        pytest.raises(OSError, match="No space left"),
        open(disk / "filler", "wb", buffering=0) as file,
    ):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_told_by_what_could_not_be_written(small_disk, tmp_path):
    """The log cannot be closed either, and says so in words that name no file: these must not take
    the place of the first error.
    """
    images = image_files(tmp_path / "data", {"train": 36})
    train = {"steps": 6, "global_batch": 12, "checkpoint_every_steps": 1, "log_every_steps": 100}
    stage = source.plan_source(image_job(small_disk, images, train=train), "src")
    work = pretrain.rank_job(stage, source.prepare_source(stage), DataWorkers(), 1)
    fill(small_disk)
    with pytest.raises(storage.StorageError) as caught:
        pretrain.train_rank(work, Ranks())
    assert str(caught.value).startswith("cannot ") and str(small_disk) in str(caught.value)
    assert "free space there or choose another storage" in str(caught.value) and "\n" not in str(
        caught.value
    )


def test_a_line_that_cannot_be_written_names_its_file(tmp_path):
    log = MetricsLog(str(tmp_path))
    (tmp_path / "metrics.jsonl").unlink()
    os.symlink("/dev/full", tmp_path / "metrics.jsonl")
    with pytest.raises(
        storage.StorageError,
        match=r"cannot write .*/metrics\.jsonl: No space left on device; free space there or "
        r"choose another storage$",
    ):
        log.write({"step": 1})


def test_a_log_is_given_up_before_its_first_value(tmp_path):
    """A run that ends with an error before anything was logged keeps its own error."""
    log = MetricsLog(str(tmp_path / "log"))
    log.abandon()
    assert (tmp_path / "log" / "metrics.jsonl").read_text() == ""


def test_tensorboard_draws_no_step_numbers(tmp_path, monkeypatch):
    log, drawn = MetricsLog(str(tmp_path)), []

    def add_scalar(writer, name, value, step):
        drawn.append(name)

    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", add_scalar)
    log.write({"step": 2, "steps": 4, "resumed_from": 1, "validated_step": 2, "loss": 1.0})
    log.abandon()
    assert drawn == ["loss"]


def test_a_tensorboard_writer_that_has_stopped_holds_nobody_up(tmp_path):
    """Its thread ends at the first error; what it is given then fills a queue that nobody
    empties.
    """
    log = MetricsLog(str(tmp_path))
    events = log._writer.file_writer.event_writer
    events._worker.stop()
    with pytest.raises(
        storage.StorageError,
        match=r"cannot write .*/tensorboard: its writer has stopped, .*; free space there",
    ):
        for step in range(50):
            log.write({"step": step, "loss": 1.0})
    log.abandon()


def test_a_bundle_and_a_resume_point_that_do_not_fit_say_so(small_disk, monkeypatch):
    """torch and safetensors make errors of their own of a full disk."""
    import tempfile

    import torch
    from toys import label_state, task_of

    from pipeline.train import checkpoint

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    clear = (
        r"^cannot write .*: No space left on device; free space there or choose another storage$"
    )
    with pytest.raises(storage.StorageError, match=clear):
        checkpoint.save(
            str(small_disk / "points"), Ranks(), {"step": 1, "model": torch.zeros(1_000_000)}
        )
    task = task_of("timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state())
    fill(small_disk)
    with pytest.raises(storage.StorageError, match=clear):
        bundle.save(str(small_disk / "bundle"), task, ModalitySpec("image", {}, {}))
    assert not list(small_disk.glob(".onetomany*"))
