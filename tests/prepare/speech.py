"""Small publishers' layouts of recordings, written with soundfile; each is told what it holds."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from prepare.conftest import write

from pipeline.config import registry
from pipeline.prepare.engine import importing


def sound(
    number: int,
    seconds: float = 0.5,
    rate: int = 16000,
    form: str = "FLAC",
    subtype: str | None = None,
    channels: int = 1,
) -> bytes:
    """A recording that no other number gives: noise under a slow envelope."""
    samples = 0.3 * np.random.default_rng(number).standard_normal(
        (round(seconds * rate), channels)
    ).clip(-3, 3)
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=form, subtype=subtype)
    return sink.getvalue()


def wave(
    samples: np.ndarray, rate: int = 16000, form: str = "WAV", subtype: str = "PCM_16"
) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format=form, subtype=subtype)
    return sink.getvalue()


def samples(data: bytes) -> np.ndarray:
    """(n,) int16, by soundfile alone."""
    return soundfile.read(io.BytesIO(data), dtype="int16")[0]


def index(name: str, source, *pairs: str) -> tuple[list[dict], importing.Index]:
    found = registry.get("importer", name)(importing.options_of(name, list(pairs))).index(
        str(source)
    )
    return found.rows.to_pylist(), found


def bad(found: importing.Index) -> dict[str, tuple[str, str]]:
    return {row["path"]: (row["split"], row["reason"]) for row in found.invalid}


def manifest(root: Path, rows: list[dict], name: str = "train_manifest.json") -> Path:
    return write(root / name, "".join(json.dumps(row) + "\n" for row in rows))


def librispeech(root: Path) -> dict[str, tuple[str, str, str]]:
    """Three speakers: two chapters of one and one of another in train-clean-100, one in dev-clean;
    utterance to (subset, speaker, transcript).
    """
    out, number = {}, 0
    for subset, speaker, chapter, count in (
        ("train-clean-100", "103", "1240", 3),
        ("train-clean-100", "103", "1241", 2),
        ("train-clean-100", "26", "495", 3),
        ("dev-clean", "84", "121", 2),
    ):
        lines = []
        for i in range(count):
            name, text, number = (
                f"{speaker}-{chapter}-{i:04d}",
                f"CHAPTER {'ABCDEFGHIJ'[number]}",
                number + 1,
            )
            write(
                root / "LibriSpeech" / subset / speaker / chapter / f"{name}.flac",
                sound(number, 0.2 + 0.1 * i),
            )
            lines.append(f"{name} {text}\n")
            out[name] = subset, speaker, text
        write(
            root / "LibriSpeech" / subset / speaker / chapter / f"{speaker}-{chapter}.trans.txt",
            "".join(lines),
        )
    write(
        root / "LibriSpeech/SPEAKERS.TXT",
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n26   | M | train-clean-100  | 25.08 | "
        "Denny Sayers\n"
        "103  | F | train-clean-100  | 25.06 | Karen Savage\n84   | F | dev-clean        | "
        "8.02  | Christie Nowak\n",
    )
    return out


CLIPS = [
    ("train", 0, "a", 'It is "quoted", isn\'t it?'),
    ("train", 1, "a", "Zwei"),
    ("train", 2, "b", "Drei"),
    ("dev", 3, "c", "Vier"),
    ("test", 4, "d", "Fünf"),
]


def commonvoice(root: Path, language: str = "de") -> Path:
    """Five clips of four speakers as MP3, and one that no table of a split names."""
    folder = root / "cv-corpus-17.0" / language
    header = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tlocale"
    tables = {"train": [header], "dev": [header], "test": [header], "validated": [header]}
    for split, i, speaker, sentence in CLIPS:
        write(folder / f"clips/common_voice_{language}_{i}.mp3", sound(i, 0.5, 32000, "MP3"))
        line = f"{speaker * 8}\tcommon_voice_{language}_{i}.mp3\t{sentence}\t2\t{i % 2}\t{'twenties' if i else ''}\t\t\t{language}"
        tables[split].append(line)
        tables["validated"].append(line)
    write(folder / f"clips/common_voice_{language}_9.mp3", sound(9, 0.5, 32000, "MP3"))
    tables["validated"].append(
        f"{'e' * 8}\tcommon_voice_{language}_9.mp3\tNeun\t2\t0\t\t\t\t{language}"
    )
    for name, lines in tables.items():
        write(folder / f"{name}.tsv", "\n".join(lines) + "\n")
    return folder


def speech_commands(root: Path) -> Path:
    """Clips of three words and four speakers, one of them held out for validation and one for test,
    and three and a half seconds of noise.
    """
    speakers, number = ("0a7c2a8d", "1b63157b", "2fa39636", "3df9a3d4"), 0
    for word in ("yes", "no", "bed"):
        for speaker in speakers:
            number += 1
            write(root / word / f"{speaker}_nohash_0.wav", sound(number, 1.0, form="WAV"))
    write(
        root / "validation_list.txt",
        "".join(f"{word}/{speakers[2]}_nohash_0.wav\n" for word in ("yes", "no", "bed")),
    )
    write(
        root / "testing_list.txt",
        "".join(f"{word}/{speakers[3]}_nohash_0.wav\n" for word in ("yes", "no", "bed")),
    )
    write(root / "_background_noise_/white_noise.wav", sound(77, 10.5, form="WAV"))
    write(root / "_background_noise_/README.md", "noise")
    write(root / "README.md", "clips")
    return root


def an4(root: Path, form: str = "NIST", suffix: str = ".sph") -> dict[str, np.ndarray]:
    """Three utterances of train, two of test; name to samples."""
    out = {}
    for number, (split, folder, speaker, name, text) in enumerate(
        (
            ("train", "an4_clstk", "fash", "an251-fash-b", "<s> YES </s>"),
            ("train", "an4_clstk", "fash", "cen1-fash-b", "<s> H I N I C H </s>"),
            (
                "train",
                "an4_clstk",
                "mblw",
                "cen2-mblw-b",
                "<s> A(2) ++NOISE++ SEVEN <sil> TWO </s>",
            ),
            ("test", "an4test_clstk", "fcaw", "an406-fcaw-b", "RUBOUT G M E F"),
            ("test", "an4test_clstk", "menk", "an407-menk-b", "GO"),
        )
    ):
        values = samples(sound(number, 0.4))
        out[name] = values
        path = root / f"wav/{folder}/{speaker}/{name}{suffix}"
        write(
            path,
            values.astype(">i2").tobytes()
            if form == "big"
            else values.astype("<i2").tobytes()
            if form == "little"
            else wave(values, form=form),
        )
        for file, line in (
            (f"an4_{split}.fileids", f"{folder}/{speaker}/{name}"),
            (f"an4_{split}.transcription", f"{text} ({name})"),
        ):
            path = root / "etc" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    return out


def kaldi(root: Path) -> dict[str, tuple[str, str, str, str | None]]:
    """Three data directories: one of two segments and a whole recording, two of one recording;
    utterance to (split, transcript, speaker, gender).
    """
    write(root / "sound/talk.wav", sound(1, 2.0, form="WAV"))
    for number, name in enumerate("cde"):
        write(root / f"sound/{name}.flac", sound(number + 2))
    train = root / "data/train_small"
    write(
        train / "wav.scp",
        "talk sound/talk.wav\ncid-1 flac -c -d -s sound/c.flac |\n",
    )
    write(
        train / "segments", "ann-talk-1 talk 0.25 0.75\nbob-talk-2 talk 0.8 -1\ncid-1 cid-1 0 -1\n"
    )
    write(train / "text", "ann-talk-1 guten tag\nbob-talk-2\tja\ncid-1 one two\n")
    write(train / "utt2spk", "ann-talk-1 ann\nbob-talk-2 bob\ncid-1 cid\n")
    write(train / "spk2gender", "ann f\nbob m\n")
    for name, split in (("dan", "dev"), ("eve", "test_clean")):
        folder = root / "data" / split
        write(folder / "wav.scp", f"{name}-1 sound/{name[0]}.flac\n")
        write(folder / "text", f"{name}-1 text of {name}\n")
        write(folder / "utt2spk", f"{name}-1 {name}\n")
    return {
        "ann-talk-1": ("train", "guten tag", "ann", "f"),
        "bob-talk-2": ("train", "ja", "bob", "m"),
        "cid-1": ("train", "one two", "cid", None),
        "dan-1": ("validation", "text of dan", "dan", None),
        "eve-1": ("test", "text of eve", "eve", None),
    }
