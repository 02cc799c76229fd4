"""Speech from the command line: recordings in, a results table of every kind of target, transcripts
with times, subtitles and a Hugging Face folder out.
"""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from pipeline.checkpoints import bundle
from tests.e2e.conftest import best_bundle, result_rows

JOB = Path(__file__).with_name("speech.yaml")
WORDS = ("zero", "one", "two", "three")


def tone(word: int, seconds: float, rate: int, seed: int) -> np.ndarray:
    """A word is a pitch: what runs, not what is learned, is looked at here."""
    rng, t = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    return (
        0.3 * np.sin(2 * np.pi * (200 + 150 * word) * t) + 0.01 * rng.standard_normal(len(t))
    ).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, form: str = "FLAC") -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=form)
    return sink.getvalue()


@pytest.fixture(scope="module")
def speech_data(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("speech"), np.random.default_rng(0)
    rows = []
    for i in range(60):
        word, seconds, rate = i % 4, round(rng.uniform(0.6, 1.2), 3), (8000, 16000)[i % 2]
        split = ("train", "train", "train", "validation", "test")[i // 12]
        rows.append(
            {
                "audio": encoded(tone(word, seconds, rate, i), rate),
                "seconds": seconds,
                "text": f"{WORDS[word]} {WORDS[(word + 1) % 4]}",
                "digit": word,
                "speaker": f"s{i // 4}",
                "split": split,
            }
        )
    rows[3]["audio"] = rows[3]["audio"][:60]  # cut off
    # More letters than frames: not to be learned from, yet to be tested on
    rows[7]["text"] = rows[50]["text"] = " ".join(WORDS) * 9
    rows[51]["text"] = "zero \N{GREEK SMALL LETTER ALPHA}"  # a letter that training never has
    pq.write_table(pa.Table.from_pylist(rows), folder / "spoken.parquet", row_group_size=16)
    (folder / "recordings" / "a").mkdir(parents=True)
    for i in range(12):
        (folder / "recordings" / "a" / f"{i}.wav").write_bytes(
            encoded(tone(i % 4, 0.8, 16000, i), 16000, "WAV")
        )
    talk = np.concatenate(
        [
            np.concatenate([tone(i % 4, 2.0, 16000, i), np.zeros(8000, np.float32)])
            for i in range(16)
        ]
    )
    (folder / "recordings" / "talk.flac").write_bytes(encoded(talk, 16000))
    return folder


@pytest.fixture(scope="module")
def done(speech_data, run_job) -> Path:
    """The folder of the job, run once."""
    return run_job(JOB, SPEECH_DATA=speech_data)[0]


pytestmark = pytest.mark.timeout(600)


def test_every_target_has_its_entries_and_metrics(done):
    tested = [row for row in result_rows(done) if row["split"] == "test"]
    assert all(row["status"] == "done" for row in result_rows(done))
    metrics = {
        name: {row["metric"] for row in tested if row["target"] == name}
        for name in ("words", "letters", "digits")
    }
    assert (
        metrics["words"] == metrics["letters"] == {"wer", "cer", "loss"}
        and {"accuracy", "macro_f1", "loss"} <= metrics["digits"]
    )
    entries = {(row["target"], row["source"], row["technique"]) for row in tested}
    assert {
        ("words", "spoken", "linear_probe"),
        ("letters", "heard", "lora"),
        ("letters", "none", "scratch"),
        ("digits", "heard", "full"),
        ("digits", "spoken", "linear_probe"),
    } <= entries
    assert {row["n_eval"] for row in tested} == {12}


def test_the_table_tells_how_transcripts_were_normalised(done):
    message = {
        row["target"]: json.loads(row["hyper_parameters"]).get("normalization")
        for row in result_rows(done)
    }
    assert (
        message["digits"] is None
        and message["words"] != message["letters"]
        and "upper" in str(message["words"])
        and "lower" in str(message["letters"])
    )


def test_what_cannot_be_learned_from_is_left_out_and_listed(done):
    found = "".join(path.read_text() for path in (done / "sources").rglob("quarantine.jsonl"))
    assert "frames" in found, "a transcript longer than its recording"
    report = (done / "report.md").read_text()
    assert "frames" in report and "2 rows left out" in report


def test_batches_by_duration_tell_their_padding(done):
    """A source's bundle keeps what its line tells; only rows of many lengths have any."""
    found = {
        path.parent.parent.name.partition("-")[0]: json.loads(path.read_text())["training"]
        for path in (done / "sources").rglob("manifest.json")
        if "padding_share" in path.read_text()
    }
    assert set(found) == {"spoken", "heard"} and all(
        0 <= metadata["padding_share"] < 0.3 for metadata in found.values()
    )
    assert found["spoken"]["padding_share"] > 0.01
    shares = re.findall(
        r"batches an epoch of up to \d+ seconds, ([0-9.]+)% of them padding",
        " ".join(metadata["splits"] for metadata in found.values()),
    )
    assert [float(share) for share in shares] == [
        pytest.approx(100 * metadata["padding_share"], abs=0.06) for metadata in found.values()
    ]
    ran = [json.loads(row["hyper_parameters"]) for row in result_rows(done)]
    assert [one["padding_share"] for one in ran if one.get("batch_cost")] and all(
        0 <= one["padding_share"] < 0.3 for one in ran if one.get("batch_cost")
    )


def test_a_folder_of_recordings_is_transcribed_with_times_and_subtitles(
    done, speech_data, command, tmp_path
):
    ended = command(
        "predict",
        best_bundle(done, "words", "full"),
        speech_data / "recordings",
        "-o",
        tmp_path / "out",
        "--srt",
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = pq.read_table(tmp_path / "out").to_pylist()  # beside the folder of subtitles
    talk = [row for row in found if row["recording"].endswith("talk.flac")]
    assert len(found) == 12 + len(talk) and len(talk) >= 2, "forty seconds are cut into pieces"
    assert all(isinstance(row["text"], str) and row["error"] == "" for row in found)
    for row in found:
        ends = [word["end"] for word in row["words"]]
        assert ends == sorted(ends) and all(
            row["start"] <= word["start"] < word["end"] <= row["start"] + row["seconds"] + 0.1
            for word in row["words"]
        )
    subtitles = {path.name: path.read_text() for path in (tmp_path / "out").rglob("*.srt")}
    assert len(subtitles) == 13 and sum("talk" in name for name in subtitles) == 1


def test_wav2vec2_leaves_as_a_folder_and_comes_back(done, command, tmp_path):
    from transformers import Wav2Vec2ForCTC

    uri = best_bundle(done, "letters", "lora")
    ended = command("export", uri, tmp_path / "hf", "--kind", "hugging-face", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, held = Wav2Vec2ForCTC.from_pretrained(tmp_path / "hf").eval(), bundle.load(uri)
    task, modality = held.task().eval(), held.modality()
    audio = (tone(1, 0.9, 16000, 5) * 32767).astype(np.int16)
    from pipeline.core.contracts import Batch
    from pipeline.core.ragged import ragged

    batch = modality.finish(
        Batch(
            np.zeros(1, dtype=np.int64),
            torch.zeros(1, dtype=torch.int64),
            modality.collate({"audio": ragged([audio])}),
        )
    )
    with torch.no_grad():
        ours = task.objective.head(task.backbone(batch, want=("tokens",)).tokens)
        theirs = model(batch["wave"]).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
