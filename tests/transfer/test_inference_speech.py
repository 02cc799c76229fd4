"""Predictions on recordings: pieces keep their place, broken rows their reason, and subtitles stand
where words were said.
"""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hf_families import FAMILIES
from stage_runs import Silent, without_ray
from toys import label_state, task_of
from typer.testing import CliRunner

from pipeline import cli
from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import BundleError
from pipeline.config import registry
from pipeline.config.schema import Job
from pipeline.core.contracts import Batch
from pipeline.core.specs import ModalitySpec
from pipeline.data import manifests
from pipeline.data.manifests import Selection
from pipeline.data.plan import Item
from pipeline.io import storage
from pipeline.modalities.audio import Audio, AudioOptions
from pipeline.objectives import ctc
from pipeline.objectives.ctc import CTC, CTCOptions
from pipeline.transfer import inference, prediction_files, preflight, publishing, stages

RATE, TONE, GAP, PAUSE = 16000, 0.12, 0.06, 0.3
"""A letter is a tone of its own, with silence behind it, and more behind a word."""
TONES = {"A": 400.0, "B": 800.0, "C": 1600.0, "D": 3200.0}
SMALL = {"hidden": 32, "channels": 32, "kernels": [11], "strides": [2], "layers": 1}
MELS = {"mels": 20}


def sound(
    text: str, seed: int = 0, lead: float = 0.2
) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
    """(n,) float32 of a text in tones, and each word with the seconds in which it sounds."""
    rng = np.random.default_rng(seed)
    parts, words, at = [np.zeros(int(lead * RATE))], [], lead
    for word in text.split():
        begin = at
        for letter in word:
            parts += [
                0.3 * np.sin(2 * np.pi * TONES[letter] * np.arange(int(TONE * RATE)) / RATE),
                np.zeros(int(GAP * RATE)),
            ]
            at += TONE + GAP
        words.append((word, begin, at - GAP))
        parts.append(np.zeros(int(PAUSE * RATE)))
        at += PAUSE
    samples = np.concatenate(parts)
    return (samples + 0.003 * rng.standard_normal(len(samples))).astype(np.float32), words


def texts(n: int, seed: int, words: int = 3) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(
            "".join(rng.choice(list(TONES), rng.integers(1, 4)))
            for _ in range(rng.integers(1, words + 1))
        )
        for _ in range(n)
    ]


def encoded(samples: np.ndarray, kind: str = "WAV") -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, RATE, format=kind)
    return sink.getvalue()


def save(folder, steps: int = 0) -> str:
    """A bundle that recognises tones, after so many steps of training."""
    said = texts(96, 1)
    heard = pa.table(
        {"sound": [encoded(sound(text, i)[0]) for i, text in enumerate(said)], "said": said}
    )
    options, columns = AudioOptions(**MELS), {"audio": "sound", "transcript": "said"}
    modality = Audio(
        options, Audio.fit(options, heard.slice(0, 32), columns, "torchaudio/deepspeech2")
    )
    state = CTC.fit(CTCOptions(), heard, columns)
    state = CTC.bind_to_backbone(
        state, task_of("torchaudio/deepspeech2", modality.inputs(), "ctc", state, **SMALL).backbone
    )
    task = task_of("torchaudio/deepspeech2", modality.inputs(), "ctc", state, **SMALL, dropout=0.0)
    optimizer = torch.optim.Adam(task.parameters(), 0.005)
    arrays = {**modality.decode(heard, columns)[0], **CTC.encode(heard, columns, state)}
    assert not any(CTC.invalid_label_reasons(heard, columns, state)) and not any(
        CTC.untrainable_reasons(heard, columns, state, arrays)
    )
    for step in range(steps):
        rows = np.random.default_rng(step).choice(len(said), 16, replace=False)
        batch = modality.finish(
            Batch(
                rows,
                torch.from_numpy(rows),
                modality.collate({name: array[rows] for name, array in arrays.items()}),
            )
        )
        optimizer.zero_grad()
        total, count, _ = task(batch)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    named = ModalitySpec("audio", options.model_dump(), modality.state)
    bundle.save(str(folder / "bundle"), task.eval(), named, columns=columns)
    return str(folder / "bundle")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("trained"), 200)


def found(uri: str, table: pa.Table, folder, **columns: str) -> list[pa.Table]:
    """What is written of the table, in items of three rows."""
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "rows.parquet")
    rows = manifests.build([str(folder / "rows.parquet")], "auto", str(folder / "imports"))
    kind, modality = registry.get("objective", "ctc"), bundle.load(uri).modality()
    columns = inference.columns_of_roles(
        modality, kind, bundle.load(uri).manifest.columns, columns, rows
    )
    work = inference.Predictor(
        uri, Selection(rows), columns, inference.recording_columns(modality, columns, rows)
    )
    return [
        inference.to_table(work(Item(-1, i, min(i + 3, rows.num_rows))), kind.output_types)
        for i in range(0, rows.num_rows, 3)
    ]


# ---------------------------------------------------------------- rows


def test_a_piece_has_its_own_place_and_a_broken_row_its_reason(untrained, tmp_path):
    samples = np.concatenate([sound("AB")[0], sound("CAD B")[0]])
    cut, length = len(sound("AB")[0]) / RATE, len(samples) / RATE
    data = encoded(samples)
    whole = found(
        untrained,
        pa.table(
            {"sound": [encoded(samples[: int(cut * RATE)]), encoded(samples[int(cut * RATE) :])]}
        ),
        tmp_path / "a",
    )
    table = {
        "sound": [data, data, b"no sound", b"", encoded(np.zeros(0, dtype=np.float32))],
        "start": [0.0, cut, None, 1.0, 0.0],
        "seconds": [cut, length - cut, None, 1.0, None],
        "take": ["x", "x", "y", "z", None],
    }
    pieces = found(
        untrained,
        pa.table(table),
        tmp_path / "b",
        recording="take",
        start="start",
        seconds="seconds",
    )
    assert pieces[0].schema == pieces[1].schema and "null" not in str(pieces[0].schema)
    rows, alone = pa.concat_tables(pieces).to_pylist(), pa.concat_tables(whole).to_pylist()
    assert [row["row"] for row in rows] == list(range(5)) and [
        bool(row["error"]) for row in rows
    ] == [False, False, True, True, True]
    assert [row["recording"] for row in rows] == [
        "x",
        "x",
        "y",
        "z",
        "",
    ] and "recording" not in alone[0]
    assert [row["text"] for row in rows[:2]] == [row["text"] for row in alone] and alone[0]["text"]
    for row in rows[2:]:
        assert (row["text"], row["words"]) == ("", []) and np.isnan(row["confidence"])
    assert (
        rows[1]["start"] == pytest.approx(cut)
        and rows[1]["seconds"] == pytest.approx(length - cut)
        and np.isnan(rows[2]["start"])
    )
    assert len(rows[1]["words"]) == len(alone[1]["words"]) > 0
    for here, there in zip(rows[1]["words"], alone[1]["words"], strict=True):
        assert here["word"] == there["word"] and here["start"] == pytest.approx(
            there["start"] + cut, abs=2e-4
        )
        assert cut <= here["start"] < here["end"] <= length


def test_a_start_that_is_no_number_is_that_of_the_whole_recording(untrained, tmp_path):
    data = encoded(sound("CAD B")[0])
    rows = found(
        untrained,
        pa.table({"sound": [data] * 3, "start": [None, float("nan"), 0.0]}),
        tmp_path,
        start="start",
    )[0].to_pylist()
    assert (
        rows[0]["words"]
        and rows[0]["words"] == rows[1]["words"] == rows[2]["words"]
        and not any(row["error"] for row in rows)
    )


def test_items_without_any_good_row_have_the_same_columns(untrained, tmp_path):
    broken = found(
        untrained, pa.table({"sound": [b"a", b"b", b"c", encoded(sound("A")[0])]}), tmp_path
    )
    assert (
        broken[0].schema == broken[1].schema
        and broken[0]["text"].to_pylist() == [""] * 3
        and all(broken[0]["error"].to_pylist())
    )


def test_columns_are_those_of_training_or_named_as_their_roles(untrained, tmp_path):
    kind, modality = registry.get("objective", "ctc"), bundle.load(untrained).modality()

    def columns(known, given, **table):
        pq.write_table(
            pa.table({name: pa.array([], kind) for name, kind in table.items()}),
            tmp_path / "rows.parquet",
        )
        rows = manifests.build([str(tmp_path / "rows.parquet")], "auto", str(tmp_path / "imports"))
        named = inference.columns_of_roles(modality, kind, known, given, rows)
        return named, inference.recording_columns(modality, named, rows)

    known, number = {"audio": "sound", "transcript": "said", "seconds": "length"}, pa.float64()
    assert columns(known, {}, sound=pa.binary(), said=pa.string()) == ({"audio": "sound"}, {})
    assert columns(known, {}, sound=pa.string(), length=number) == (
        {"audio": "sound", "seconds": "length"},
        {"seconds": "length", "recording": "sound"},
    )
    imported = dict(
        audio=pa.string(), label=pa.string(), recording=pa.string(), start=number, seconds=number
    )
    assert columns(known, {}, **imported) == (
        {"audio": "audio", "start": "start", "seconds": "seconds"},
        {"start": "start", "seconds": "seconds", "recording": "recording"},
    )
    assert columns({"audio": "a"}, {"audio": "b"}, a=pa.binary(), b=pa.binary())[0] == {
        "audio": "b"
    }
    for given, name in (
        ({}, "sound"),
        ({"audio": "voice"}, "voice"),
        ({"audio": "a", "start": "from"}, "from"),
        ({"audio": "a", "recording": "take"}, "take"),
    ):
        with pytest.raises(
            ValueError, match=f"rows.parquet has no column '{name}' for .*; columns are a, b"
        ):
            columns(known, given, a=pa.binary(), b=pa.binary())
    segments = dict(sound=pa.binary(), start=number, seconds=number)
    assert columns({"audio": "sound"}, {}, **segments) == ({"audio": "sound"}, {}), (
        "where a recording was cut from another one says nothing of it"
    )
    assert (
        columns({"audio": "sound", "start": "start"}, {}, **segments)[0]
        == columns({"audio": "sound"}, {"start": "start"}, **segments)[0]
        == {"audio": "sound", "start": "start"}
    )
    with pytest.raises(
        ValueError, match="--column transcript: rows to predict need no transcript; leave it out"
    ):
        columns(known, {"transcript": "said"}, sound=pa.binary(), said=pa.string())
    text, image = (registry.get("modality", name) for name in ("text", "image"))
    assert not set(manifests.SEGMENT_ROLES) & {*text.optional_roles, *image.optional_roles}


# ---------------------------------------------------------------- subtitles


def word(text: str, start: float, end: float):
    return {"word": text, "start": start, "end": end}


def test_subtitles_join_the_rows_of_a_recording_in_their_order(root):
    rows = [
        ("calls/a.wav", 30.0, [word("LAST", 30.5, 31.0)]),
        ("../../b", None, [word("OTHER", 0.25, 0.5)]),
        ("calls/a.wav", 0.0, [word("FIRST", 1.0, 2.5)]),
        ("calls/c.wav", np.nan, []),
        ("calls/c.wav", np.nan, []),
        ("calls/a.wav", 10.0, [word("THEN", 12.0, 12.2), word("MORE", 12.3, 14.0)]),
    ]
    parts = []
    for number, some in enumerate((rows[:3], rows[3:])):
        sink, parts = io.BytesIO(), [*parts, storage.join(root, f"part-0000{number}.parquet")]
        table = pa.table(
            {
                "row": [3 * number + i for i in range(len(some))],
                "recording": [name for name, *_ in some],
                "start": [at for _, at, _ in some],
                "words": pa.array([words for *_, words in some], CTC.output_types["words"]),
            }
        )
        pq.write_table(table, sink)
        storage.write_bytes(parts[-1], sink.getvalue())
    assert prediction_files.write_subtitles(root, parts) == 3
    written = {
        one.removeprefix(f"{root}/_subtitles/"): storage.read_bytes(one).decode()
        for one in storage.list_files(root)
        if one.endswith(".srt")
    }
    assert written == {
        "b.srt": "1\n00:00:00,250 --> 00:00:01,250\nOTHER\n\n",
        "calls/c.srt": "",
        "calls/a.srt": "1\n00:00:01,000 --> 00:00:02,500\nFIRST\n\n2\n00:00:12,000 --> "
        "00:00:14,000\nTHEN MORE\n\n3\n00:00:30,500 --> 00:00:31,500\nLAST\n\n",
    }
    sink = io.BytesIO()
    pq.write_table(
        pa.table(
            {"row": [7], "words": pa.array([[word("A", 0.0, 2.0)]], CTC.output_types["words"])}
        ),
        sink,
    )
    storage.write_bytes(storage.join(root, "alone", "part-00000.parquet"), sink.getvalue())
    assert (
        prediction_files.write_subtitles(
            storage.join(root, "alone"), [storage.join(root, "alone", "part-00000.parquet")]
        )
        == 1
    )
    assert storage.exists(storage.join(root, "alone", "_subtitles", "row-000007.srt"))


def test_subtitles_of_what_transcribes_nothing_are_refused(untrained, tmp_path):
    task = task_of("timm/test_resnet", {"channels": 3, "size": 32}, "classification", label_state())
    bundle.save(
        str(tmp_path / "bundle"),
        task,
        ModalitySpec("image", {"size": 32}, {"mean": [0.5] * 3, "std": [0.2] * 3}),
    )
    with pytest.raises(
        BundleError,
        match="--srt writes what was said and when, and this bundle's classification transcribes "
        "nothing; leave --srt out",
    ):
        inference.check(str(tmp_path / "bundle"), inference.OutputOptions(srt=True))
    message = CliRunner().invoke(
        cli.app,
        ["predict", str(tmp_path / "bundle"), "nowhere", "-o", str(tmp_path / "out"), "--srt"],
    )
    assert (
        message.exit_code == 2
        and "transcribes nothing" in message.output
        and not (tmp_path / "out").exists()
    )
    assert inference.check(untrained, inference.OutputOptions(srt=True)).objective.name == "ctc"


# ---------------------------------------------------------------- whole


@pytest.mark.slow
@pytest.mark.ray  # though it uses none: so it runs where the next test does, with the same network
def test_words_stand_where_they_sound(trained, tmp_path):
    said = texts(24, 2)
    heard = [sound(text, 500 + i) for i, text in enumerate(said)]
    table = pa.table({"sound": [encoded(samples) for samples, _ in heard]})
    rows = pa.concat_tables(found(trained, table, tmp_path)).to_pylist()
    right = [
        (row, words)
        for row, text, (_, words) in zip(rows, said, heard, strict=True)
        if row["text"] == text
    ]
    assert len(right) >= 20
    for row, words in right:
        for one, (text, start, end) in zip(row["words"], words, strict=True):
            assert (
                one["word"] == text
                and abs(one["start"] - start) < 0.15
                and abs(one["end"] - end) < 0.15
            )
    sure = [row["confidence"] for row, _ in right]
    assert 0.5 < np.mean(sure) <= 1


@pytest.mark.slow
@pytest.mark.ray
def test_a_folder_of_recordings_is_transcribed_with_subtitles(trained, ray_here, tmp_path):
    """One file is too long for a row: it is cut, its pieces are joined again, and its words keep
    their times.
    """
    (tmp_path / "calls").mkdir()
    text = " ".join(texts(40, 3, words=2))
    samples, words = sound(text, 9)
    assert len(samples) > 31 * RATE
    soundfile.write(tmp_path / "calls" / "long.wav", samples, RATE)
    soundfile.write(tmp_path / "short.flac", sound("DAB", 4)[0], RATE)
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    line = [
        "predict",
        trained,
        str(tmp_path),
        "-o",
        str(tmp_path / "out"),
        "--srt",
        "--input-format",
        "audio",
    ]
    message = CliRunner().invoke(cli.app, line)
    assert message.exit_code == 0, message.output
    assert "3 recordings as .srt" in message.output and "1 row could not be read" in message.output
    rows = pq.read_table(tmp_path / "out").to_pylist()  # the folder is one data set
    long = [row for row in rows if row["recording"] == "calls/long.wav"]
    assert len(long) > 1 and [row["start"] for row in long] == sorted(row["start"] for row in long)
    got = [one for row in long for one in row["words"]]
    near = [
        any(one["word"] == name and abs(one["start"] - start) < 0.15 for one in got)
        for name, start, _ in words
    ]
    assert np.mean(near) > 0.7
    subtitles = (tmp_path / "out" / "_subtitles" / "calls" / "long.srt").read_text()
    shown = " ".join(
        line for line in subtitles.splitlines() if line and "-->" not in line and not line.isdigit()
    )
    assert shown.split() == [one["word"] for one in got]
    assert (
        "DAB" in (tmp_path / "out" / "_subtitles" / "short.srt").read_text()
        and (tmp_path / "out" / "_subtitles" / "broken.srt").read_text() == ""
    )
    again = CliRunner().invoke(cli.app, line)
    assert again.exit_code == 0 and "earlier run" in again.output


# ---------------------------------------------------------------- what a network can read


WHISPER = FAMILIES["whisper"]
READS = {"config": WHISPER.config, "processor": WHISPER.processor}
"""Options of a Whisper that reads 1 s."""


def spoken(path, seconds: list[float]) -> str:
    split = [("train", "train", "validation", "test")[i % 4] for i in range(len(seconds))]
    waves = [
        0.1 * np.random.default_rng(i).standard_normal(int(s * RATE)) for i, s in enumerate(seconds)
    ]
    table = {"sound": [encoded(wave) for wave in waves], "split": split}
    pq.write_table(pa.table({**table, "label": [f"{i // 4 % 2}" for i in range(len(waves))]}), path)
    return str(path)


def job_of_long_rows(folder) -> Job:
    data = {
        "uri": spoken(folder / "rows.parquet", [*np.linspace(0.3, 1.0, 46), 1.2, 1.4]),
        "split_column": "split",
        "modality": {"audio": {"max_seconds": 20.0, "speed": 0.2}},
        "columns": {"audio": "sound", "label": "label"},
        "max_bad_rows": 0.2,
    }
    train = {"steps": 2, "global_batch": 12, "eval_every_steps": 2}
    part = {"data": data, "objective": "classification", "train": train}
    return Job.model_validate(
        {
            "name": "toy",
            "storage": str(folder / "runs"),
            "sources": {"src": {**part, "backbone": {"hf/whisper": READS}}},
            "targets": {"task": part},
            "techniques": ["scratch", "full"],
            "fanout": {"seeds": 1},
        }
    )


def lowered(lines: list[str]) -> list[str]:
    """Return of what it is said that rows are no longer than Whisper reads."""
    note = "max_seconds is 1 in place of 20, since hf/whisper reads no more; longer rows count as"
    return [line.partition(":")[0] for line in lines if note in line]


def test_max_seconds_is_lowered_to_what_the_network_reads(tmp_path):
    state = stages.check(job_of_long_rows(tmp_path), Silent())
    assert lowered(preflight.check_rows(state)) == ["source src", "target task"]


@pytest.mark.slow
def test_rows_are_no_longer_than_the_network_reads(tmp_path, monkeypatch):
    """In source and target; a change of speed makes no row longer either."""
    without_ray(monkeypatch)
    state = stages.check(job_of_long_rows(tmp_path), Silent())
    stages.pretrain(state)
    rows = stages.collect(state, stages.finetune(state, stages.prepare_shared(state)))
    assert {row.status for row in rows} == {"done"}
    assert {row.n_eval for row in rows if row.split == "test"} == {11}, "1.4 s is left out"
    assert lowered(state.progress.lines) == ["src", "task"]


LETTERS = """\\data\\
ngram 1=8
ngram 2=1

\\1-grams:
-99\t<s>\t-0.1
-1.2\t</s>
-2.5\t<unk>
-0.7\t|
-0.7\tA
-0.7\tB
-0.7\tC
-0.7\tD

\\2-grams:
-0.3\t<s> B

\\end\\
"""


@pytest.mark.usefixtures("beam_search")
def test_a_pushed_recogniser_decodes_with_the_language_model_that_it_was_trained_with(
    tmp_path, monkeypatch
):
    """Whatever file of that name lies where it is used."""
    place = tmp_path / "letters.arpa"
    place.write_text(LETTERS)
    loaded = bundle.load(save(tmp_path))
    task = loaded.task()
    options = CTCOptions(beam=20, lm=str(place), lm_weight=3.0)
    table = pa.table({"said": texts(96, 1)})
    said = CTC.fit(options, table, {"transcript": "said"})
    state = CTC.bind_to_backbone(said, task.backbone)
    task.objective = CTC(task.backbone, options, state)
    bundle.save(str(tmp_path / "searched"), task.eval(), loaded.manifest.modality)
    publishing.push(str(tmp_path / "searched"), str(tmp_path / "to"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in (place, tmp_path / "elsewhere" / "letters.arpa"):
        path.write_text("another file")
    ctc.beam_search_decoder.cache_clear()
    made_up = loaded.modality().random_rows(2, np.random.default_rng(0))
    batch = loaded.modality().finish(Batch(np.arange(2), torch.arange(2), made_up))
    right = task.objective.predict(task.backbone, batch)["prediction"]
    for pulled in (str(tmp_path / "searched"), str(tmp_path / "to")):
        inference.check(pulled)
        again = bundle.load(pulled).task()
        assert torch.equal(again.objective.predict(again.backbone, batch)["prediction"], right)


def bundle_with_language_model(folder) -> str:
    """A bundle of a network that was trained on another machine, beside a language model."""
    uri = save(folder)
    loaded = bundle.load(uri)
    task = loaded.task()
    searched = {"beam": 5, "lm": "/home/alice/secret/characters.arpa"}
    task.objective.options = task.objective.options.model_copy(update=searched)
    bundle.save(uri, task, loaded.manifest.modality, columns=loaded.manifest.columns)
    return uri


def test_a_pushed_recogniser_names_the_file_of_its_language_model_alone(tmp_path):
    publishing.push(bundle_with_language_model(tmp_path), str(tmp_path / "to"))
    options = bundle.read_manifest(str(tmp_path / "to")).objective.options
    assert options["lm"] == "characters.arpa" and options["beam"] == 5
    for path in (tmp_path / "to").iterdir():
        assert b"alice" not in path.read_bytes(), path


@pytest.mark.usefixtures("beam_search")
def test_a_language_model_that_is_not_here_is_told_before_ray_starts(tmp_path):
    """Nothing in a job can be set for predict."""
    uri = bundle_with_language_model(tmp_path)
    with pytest.raises(
        BundleError,
        match=r"objective.lm: there is no file /home/alice/\S+arpa on this machine, and the bundle "
        "holds no copy .*: put the file that the network was trained with there",
    ):
        inference.check(uri)


def test_an_old_bundle_whose_rows_may_be_too_long_predicts_the_others(tmp_path):
    options = AudioOptions(features="wave", max_seconds=40.0)
    modality = Audio(options, {"features": "wave", "normalize": False})
    task = task_of("hf/whisper", modality.inputs(), "classification", label_state(), **READS)
    spec = ModalitySpec("audio", options.model_dump(), modality.state)
    uri = str(tmp_path / "bundle")
    bundle.save(uri, task.eval(), spec, columns={"audio": "sound"})
    rows = manifests.build([spoken(tmp_path / "rows.parquet", [0.5, 1.5])], "auto", str(tmp_path))
    work = inference.Predictor(uri, Selection(rows), {"audio": "sound"})
    found = work(Item(-1, 0, 2))
    assert found["error"][0] == "" and "1.50 s long" in found["error"][1]
    assert bundle.load(uri).manifest.modality.options["max_seconds"] == 40.0
