"""Publishers' layouts of recordings: every row with its transcript, speaker and split, and what is
wrong in their files told.
"""

import gzip
import hashlib
import os
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from prepare.conftest import prepare_and_read, splits_of_a_job, tar, write
from prepare.speech import (
    CLIPS,
    an4,
    bad,
    commonvoice,
    index,
    kaldi,
    librispeech,
    samples,
    sound,
    speech_commands,
    wave,
)

LAYOUTS = {
    "librispeech": librispeech,
    "commonvoice": commonvoice,
    "speech_commands": speech_commands,
    "an4": an4,
    "kaldi": kaldi,
}


def packed(root: Path, target: Path, form: str) -> Path:
    """All files of a folder as one archive."""
    members = {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    if form == "zip":
        target.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(target, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return target
    return write(target, tar(members) if form == "tar" else gzip.compress(tar(members)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_archives_are_those_of_folders(name, tmp_path, monkeypatch):
    LAYOUTS[name](tmp_path / "in")
    drop = ("path",) if name == "an4" else ()
    kept = {
        form: [
            {key: value for key, value in row.items() if key not in drop}
            for row in prepare_and_read(
                name,
                tmp_path / "in"
                if form == "folder"
                else packed(tmp_path / "in", tmp_path / f"all.{form}", form),
                tmp_path / f"out-{form}",
                max_bad=0,
            )[0]
        ]
        for form in ("folder", "tar", "zip", "tar.gz")
    }
    ordered = {form: sorted(rows, key=lambda row: row["sha256"]) for form, rows in kept.items()}
    assert (
        ordered["tar"] == ordered["zip"] == ordered["tar.gz"] == ordered["folder"]
        and len(kept["folder"]) >= 5
    )
    assert kept["tar"] == kept["zip"] == kept["folder"], "in the same order, too"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_job_reads_what_every_importer_of_recordings_writes(name, tmp_path):
    LAYOUTS[name](tmp_path / "in")
    rows, _ = prepare_and_read(name, tmp_path / "in", tmp_path / "out", rows_per_part=3)
    found = splits_of_a_job(tmp_path, "audio", "audio")
    assert found == Counter(row["split"] for row in rows)
    assert all(row["seconds"] > 0.1 and row["audio"] for row in rows)


# ---------------------------------------------------------------- LibriSpeech


def test_librispeech_rows_have_their_transcripts_speakers_and_splits(tmp_path):
    wanted = librispeech(tmp_path)
    rows, found = prepare_and_read(
        "librispeech", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", max_bad=0
    )
    assert {
        row["utterance"]: (row["subset"], row["speaker"], row["transcript"]) for row in rows
    } == wanted
    assert Counter(row["split"] for row in rows) == {"train": 8, "validation": 2} and {
        row["gender"] for row in rows if row["speaker"] == "26"
    } == {"M"}
    for row in rows:
        assert row["audio"] == (tmp_path / "LibriSpeech" / row["path"]).read_bytes() and row[
            "path"
        ].split("/")[:3] == [row["subset"], row["speaker"], row["chapter"]]
    assert (
        found["classes"]["train"]["labels"] == {"train-clean-100": 8}
        and found["notes"]["files left out"] == {}
    )
    assert (
        found["recordings"]["train"]["rows_a_speaker"] == [3, 5]
        and found["speakers"]["in_two_splits"]["speakers"] == 0
    )


def test_librispeech_as_the_publisher_gives_it_in_archives_and_one_subset_alone(tmp_path):
    librispeech(tmp_path / "in")
    wanted, _ = index("librispeech", tmp_path / "in")
    for subset in ("train-clean-100", "dev-clean"):
        root = tmp_path / "in/LibriSpeech" / subset
        members = {
            f"LibriSpeech/{subset}/{path.relative_to(root)}": path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
        write(tmp_path / f"tars/{subset}.tar.gz", gzip.compress(tar(members)))

    def plain(rows):
        return sorted(
            (
                {
                    key: value
                    for key, value in row.items()
                    if not key.startswith("_") and key != "gender"
                }
                for row in rows
            ),
            key=lambda row: row["path"],
        )

    assert plain(index("librispeech", tmp_path / "tars")[0]) == plain(wanted)
    for source in (tmp_path / "in/LibriSpeech/dev-clean", tmp_path / "tars/dev-clean.tar.gz"):
        assert plain(index("librispeech", source)[0]) == [
            row for row in plain(wanted) if row["subset"] == "dev-clean"
        ]
    assert plain(index("librispeech", tmp_path / "in", "subsets=dev-clean")[0]) == [
        row for row in plain(wanted) if row["subset"] == "dev-clean"
    ]
    with pytest.raises(ValueError, match=r"no train-clean-360 in .*did you mean train-clean-100\?"):
        index("librispeech", tmp_path / "in", "subsets=train-clean-360")


def test_librispeech_with_what_is_wrong_in_it(tmp_path):
    librispeech(tmp_path)
    chapter = tmp_path / "LibriSpeech/train-clean-100/103/1240"
    texts = chapter / "103-1240.trans.txt"
    texts.write_bytes(
        b"\xef\xbb\xbf103-1240-0000 CHAPTER A\r\n103-1240-0001 CAF\xc9\r\n103-1240-0009 NOBODY\r\n103-1240-0009 NOBODY\r\n"
    )
    write(
        tmp_path / "LibriSpeech/train-clean-100/103/1241/103-1241.trans.txt",
        "103-1241-0000 CHAPTER D\n103-1241-0000 CHAPTER D\n103-1241-0001 ONE\n103-1241-0001 TWO\n",
    )
    (tmp_path / "LibriSpeech/train-clean-100/999/1").mkdir(parents=True)
    rows, found = index("librispeech", tmp_path)
    there = {row["utterance"]: row["transcript"] for row in rows}
    assert (
        there["103-1240-0000"] == "CHAPTER A"
        and there["103-1241-0000"] == "CHAPTER D"
        and len(rows) == 7
    )
    message = bad(found)
    assert message.keys() == {
        "train-clean-100/103/1240/103-1240-0001.flac",
        "train-clean-100/103/1240/103-1240-0002.flac",
        "train-clean-100/103/1241/103-1241-0001.flac",
        "LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt:3",
    }
    assert (
        "(LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt:2) is not UTF-8 text"
        in message["train-clean-100/103/1240/103-1240-0001.flac"][1]
    )
    assert (
        "a recording without a transcript"
        in message["train-clean-100/103/1240/103-1240-0002.flac"][1]
    )
    assert "two transcripts" in message["train-clean-100/103/1241/103-1241-0001.flac"][1]
    assert message["LibriSpeech/train-clean-100/103/1240/103-1240.trans.txt:3"] == (
        "train",
        "a transcript without its recording",
    )
    assert found.notes["empty folders"] == "LibriSpeech/train-clean-100/999/1"
    write(tmp_path / "LibriSpeech/train-clean-100/loose.flac", sound(1))
    with pytest.raises(ValueError, match=r"do not lie as SUBSET/SPEAKER/CHAPTER/FILE.*loose\.flac"):
        index("librispeech", tmp_path)


def test_a_folder_without_transcripts_or_of_another_layout_is_refused(tmp_path):
    write(tmp_path / "train-clean-100/1/2/1-2-0000.flac", sound(1))
    with pytest.raises(
        ValueError, match=r"no SPEAKER-CHAPTER\.trans\.txt there; .* importer manifest"
    ):
        index("librispeech", tmp_path)
    for name, said in (
        ("commonvoice", "no LANGUAGE/clips"),
        ("an4", r"no etc/an4_train\.fileids"),
        ("manifest", "no manifest"),
        ("speech_commands", "does not lie as WORD/FILE"),
    ):
        write(tmp_path / "b/b/x.flac", sound(1))
        with pytest.raises(ValueError, match=said):
            index(name, tmp_path)


def test_a_member_that_leads_outside_is_refused(tmp_path):
    for name in LAYOUTS:
        with pytest.raises(ValueError, match=r"member '\.\./up\.wav' leads outside of the archive"):
            index(name, write(tmp_path / f"{name}.tar", tar({"../up.wav": sound(1)})))


# ---------------------------------------------------------------- Common Voice


def test_commonvoice_rows_are_those_of_its_tables(tmp_path):
    folder = commonvoice(tmp_path)
    rows, found = prepare_and_read(
        "commonvoice", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", max_bad=0
    )
    splits = {"train": "train", "dev": "validation", "test": "test"}
    got = {
        (
            row["split"],
            int(Path(row["path"]).stem.rpartition("_")[2]),
            row["speaker"],
            row["transcript"],
        )
        for row in rows
    }
    assert got == {
        (splits[split], i, speaker * 8, sentence) for split, i, speaker, sentence in CLIPS
    }
    row = next(row for row in rows if row["transcript"] == "Zwei")
    assert (
        row["up_votes"],
        row["down_votes"],
        row["age"],
        row["gender"],
        row["language"],
        row["locale"],
    ) == (2, 1, "twenties", None, "de", "de")
    assert row["audio"] == (folder / "clips/common_voice_de_1.mp3").read_bytes() and (
        row["rate"],
        row["channels"],
    ) == (32000, 1)
    assert found["notes"]["clips that no table read names"] == 1
    alone, _ = index("commonvoice", folder)
    assert {row["path"] for row in alone} == {
        f"clips/common_voice_de_{i}.mp3" for i in range(5)
    } and {row["language"] for row in alone} == {"de"}


def test_commonvoice_resampled_is_flac_of_that_rate(tmp_path):
    commonvoice(tmp_path / "in")
    rows, found = prepare_and_read("commonvoice", tmp_path / "in", tmp_path / "out", "rate=16000")
    assert all(
        row["audio"].startswith(b"fLaC")
        and len(samples(row["audio"])) == round(row["seconds"] * 16000)
        for row in rows
    )
    assert found["notes"]["written anew as FLAC"] == {"train": 3, "validation": 1, "test": 1}


def test_commonvoice_validated_clips_stay_where_they_are_held_out(tmp_path):
    commonvoice(tmp_path)
    rows, found = index("commonvoice", tmp_path, "lists=train,dev,test,validated")
    assert (
        Counter(row["split"] for row in rows) == {"train": 4, "validation": 1, "test": 1}
        and not found.invalid
    )
    assert found.notes["rows of a table whose clip another one has"] == {"train": 5}
    with pytest.raises(
        ValueError,
        match=r"no cv-corpus-17\.0/de/other\.tsv; pass --set lists= with those that are there: "
        r"dev, test, train, validated",
    ):
        index("commonvoice", tmp_path, "lists=other")


def test_commonvoice_with_several_languages_and_releases(tmp_path):
    commonvoice(tmp_path)
    commonvoice(tmp_path, "nl")
    assert Counter(row["language"] for row in index("commonvoice", tmp_path)[0]) == {
        "de": 5,
        "nl": 5,
    }
    assert {row["language"] for row in index("commonvoice", tmp_path, "language=nl")[0]} == {"nl"}
    with pytest.raises(
        ValueError, match=r"--set language=ne: .*did you mean nl or de\?|--set language=ne: .*nl"
    ):
        index("commonvoice", tmp_path, "language=ne")
    shutil.copytree(tmp_path / "cv-corpus-17.0/nl", tmp_path / "cv-corpus-18.0/nl")
    with pytest.raises(
        ValueError, match=r"nl is there twice: cv-corpus-17\.0/nl and cv-corpus-18\.0/nl"
    ):
        index("commonvoice", tmp_path)


def test_commonvoice_with_what_is_wrong_in_it(tmp_path):
    table = commonvoice(tmp_path) / "train.tsv"
    first, second, third, fourth = table.read_text().splitlines()
    other = second.replace("de_0", "de_8").encode()
    up = second.replace("common_voice_de_0.mp3", "../../../../etc/passwd")
    table.write_bytes(
        f"{first}\r\n{second}\r\n{third}\tmore\r\n{fourth}\r\n".encode()
        + b"\xff\xfe"
        + other
        + b"\r\n"
        + other
        + b"\r\n"
        + up.encode()
        + f"\r\n{second}\r\n\r\n".encode()
    )
    dev = table.with_name("dev.tsv")
    dev.write_text(dev.read_text() + fourth + "\n")
    rows, found = index("commonvoice", tmp_path)
    assert {(row["path"].rpartition("_")[2], row["split"]) for row in rows} == {
        ("0.mp3", "train"),
        ("2.mp3", "validation"),
        ("3.mp3", "validation"),
        ("4.mp3", "test"),
    }
    assert {row["locale"] for row in rows} == {"de"}, "no carriage return in the last column"
    message = Counter(reason for _, reason in bad(found).values())
    place = "cv-corpus-17.0/de"
    assert (
        message["10 fields, where there are 9 columns"] == 1
        and message[f"a transcript without its recording: no {place}/clips/common_voice_de_8.mp3"]
        == 1
    )
    assert (
        message[f"a transcript without its recording: no {place}/clips/../../../../etc/passwd"] == 1
        and message["occurs twice"] == 1
    )
    assert (
        message["stands in validation too"] == 1
        and len(found.invalid) == 6
        and sum("not UTF-8" in reason for reason in message) == 1
    )
    table.write_text("client\tpath\n")
    with pytest.raises(ValueError, match=r"train\.tsv: no column 'client_id'"):
        index("commonvoice", tmp_path)
    table.write_text("")
    with pytest.raises(ValueError, match="an empty table"):
        index("commonvoice", tmp_path)


# ---------------------------------------------------------------- Speech Commands


def test_speech_commands_rows_follow_the_lists(tmp_path):
    speech_commands(tmp_path)
    rows, found = prepare_and_read(
        "speech_commands", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", max_bad=0
    )
    assert Counter((row["split"], row["label"]) for row in rows) == {
        (split, word): n
        for split, n in (("train", 2), ("validation", 1), ("test", 1))
        for word in ("yes", "no", "bed")
    }
    assert all(
        row["speaker"] == Path(row["path"]).name[:8]
        and row["word"] == row["label"] == row["path"].split("/")[0]
        for row in rows
    )
    assert (
        found["speakers"]["in_two_splits"]["speakers"] == 0
        and found["notes"]["files of background noise"] == 1
    )
    assert found["classes"]["test"]["labels"] == {"bed": 1, "no": 1, "yes": 1}


def test_speech_commands_silence_and_unknown_words(tmp_path):
    speech_commands(tmp_path / "in")
    rows, found = prepare_and_read(
        "speech_commands", tmp_path / "in", tmp_path / "out", "words=yes,no", "silence=_silence_"
    )
    labels = Counter((row["split"], row["label"]) for row in rows)
    assert {key: n for key, n in labels.items() if key[1] == "_silence_"} == {
        ("train", "_silence_"): 8,
        ("validation", "_silence_"): 1,
        ("test", "_silence_"): 1,
    }
    assert labels["train", "_unknown_"] == 2 and {
        row["word"] for row in rows if row["label"] == "_unknown_"
    } == {"bed"}
    noise = sorted(
        (row for row in rows if row["label"] == "_silence_"), key=lambda row: row["recording_start"]
    )
    whole = samples((tmp_path / "in/_background_noise_/white_noise.wav").read_bytes())
    assert [row["recording_start"] for row in noise] == list(range(10)) and (
        np.concatenate([samples(row["audio"]) for row in noise]) == whole[:160000]
    ).all()
    assert found["notes"]["cut out of longer recordings"] == {
        "train": 8,
        "validation": 1,
        "test": 1,
    }
    assert {
        row["label"]
        for row in prepare_and_read(
            "speech_commands", tmp_path / "in", tmp_path / "two", "words=yes,no", "unknown=none"
        )[0]
    } == {"yes", "no"}
    with pytest.raises(ValueError, match=r"--set words=yess: no yess in .*did you mean yes\?"):
        index("speech_commands", tmp_path / "in", "words=yess")


def which_set(filename: str, validation_percentage: float, testing_percentage: float) -> str:
    """As the data set's README.md has it."""
    import re

    max_num_wavs_per_class = 2**27 - 1
    hash_name = re.sub(r"_nohash_.*$", "", os.path.basename(filename))
    hash_name_hashed = hashlib.sha1(hash_name.encode()).hexdigest()
    percentage_hash = (int(hash_name_hashed, 16) % (max_num_wavs_per_class + 1)) * (
        100.0 / max_num_wavs_per_class
    )
    if percentage_hash < validation_percentage:
        return "validation"
    return "test" if percentage_hash < (testing_percentage + validation_percentage) else "train"


def test_speech_commands_without_lists(tmp_path):
    for i in range(60):
        write(tmp_path / f"yes/{i * 7919:08x}_nohash_{i % 3}.wav", b"")
        write(tmp_path / f"no/{i * 7919:08x}_nohash_0.wav", b"")
    with pytest.raises(
        ValueError, match=r"validation_list\.txt, testing_list\.txt not there; .*split=hash"
    ):
        index("speech_commands", tmp_path)
    rows, _ = index("speech_commands", tmp_path, "split=hash")
    assert {row["path"]: row["split"] for row in rows} == {
        row["path"]: which_set(row["path"], 10, 10) for row in rows
    }
    assert len({row["split"] for row in rows}) == 3
    assert {row["split"] for row in index("speech_commands", tmp_path, "split=test")[0]} == {"test"}


def test_speech_commands_with_what_is_wrong_in_them(tmp_path):
    speech_commands(tmp_path)
    with open(tmp_path / "testing_list.txt", "ab") as file:
        file.write(b"yes/ffffffff_nohash_0.wav\r\n../etc/passwd\r\n")
    rows, found = index("speech_commands", tmp_path)
    assert len(rows) == 12 and bad(found) == {
        "testing_list.txt:4": ("test", "no recording yes/ffffffff_nohash_0.wav"),
        "testing_list.txt:5": ("test", "no recording ../etc/passwd"),
    }
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="folders of words without recordings: cat"):
        index("speech_commands", tmp_path)
    shutil.rmtree(tmp_path / "cat")
    shutil.copy(tmp_path / "validation_list.txt", tmp_path / "testing_list.txt")
    with pytest.raises(ValueError, match="stands in both lists"):
        index("speech_commands", tmp_path)


# ---------------------------------------------------------------- AN4

TEXTS = {
    "an251-fash-b": "YES",
    "cen1-fash-b": "H I N I C H",
    "cen2-mblw-b": "A SEVEN TWO",
    "an406-fcaw-b": "RUBOUT G M E F",
    "an407-menk-b": "GO",
}


@pytest.mark.parametrize(
    ("form", "suffix", "pair"),
    [
        ("NIST", ".sph", "raw=auto"),
        ("WAV", ".wav", "raw=auto"),
        ("big", ".raw", "raw=auto"),
        ("little", ".raw", "raw=little"),
    ],
)
def test_an4_in_each_of_its_forms(tmp_path, form, suffix, pair):
    wanted = an4(tmp_path / "an4", form, suffix)
    rows, found = prepare_and_read(
        "an4", tmp_path, tmp_path.parent / f"{tmp_path.name}-out", pair, max_bad=0
    )
    assert {row["utterance"]: row["transcript"] for row in rows} == TEXTS
    assert {row["utterance"]: row["speaker"] for row in rows} == {
        name: name.split("-")[1] for name in TEXTS
    }
    assert Counter(row["split"] for row in rows) == {"train": 3, "test": 2}
    for row in rows:
        assert (samples(row["audio"]) == wanted[row["utterance"]]).all() and row["rate"] == 16000
        assert row["audio"].startswith(
            b"fLaC" if suffix == ".raw" else b"NIST" if suffix == ".sph" else b"RIFF"
        )
    assert found["notes"]["recordings that no list names"] == 0


def test_an4_raw_archives_are_told_by_their_name(tmp_path):
    for order, name in (("little", "an4_raw.littleendian"), ("big", "an4_raw.bigendian")):
        wanted = an4(tmp_path / order, order, ".raw")
        rows, _ = prepare_and_read(
            "an4",
            packed(tmp_path / order, tmp_path / f"{name}.tar.gz", "tar.gz"),
            tmp_path / f"{order}-out",
            max_bad=0,
        )
        assert all((samples(row["audio"]) == wanted[row["utterance"]]).all() for row in rows)


def test_an4_with_what_is_wrong_in_it(tmp_path):
    an4(tmp_path)
    (tmp_path / "wav/an4_clstk/fash/cen1-fash-b.sph").unlink()
    write(tmp_path / "wav/an4_clstk/zzzz/an1-zzzz-b.sph", wave(np.ones(100), form="NIST"))
    with open(tmp_path / "etc/an4_train.transcription", "ab") as file:
        file.write(b"<s> NOBODY </s> (an9-none-b)\r\nno name\r\n")
    ids = tmp_path / "etc/an4_train.fileids"
    ids.write_text(ids.read_text().replace("\n", "\r\n") + "an4_clstk/fash/an251-fash-b\r\n\r\n")
    text = tmp_path / "etc/an4_test.transcription"
    text.write_bytes(text.read_bytes().replace(b"GO", b"G\xd6"))
    rows, found = index("an4", tmp_path)
    assert {row["utterance"] for row in rows} == {"an251-fash-b", "cen2-mblw-b", "an406-fcaw-b"}
    message = bad(found)
    assert (
        message["etc/an4_train.fileids:2"][1].startswith(
            "no recording wav/an4_clstk/fash/cen1-fash-b"
        )
        and "occurs twice" in message["etc/an4_train.fileids:4"][1]
    )
    assert (
        message["etc/an4_train.transcription:4"] == ("train", "a transcript without its recording")
        and len(message) == 5
    )
    assert message["etc/an4_train.transcription:5"] == ("train", "no line that ends in (NAME)")
    assert (
        "is not UTF-8 text" in message["wav/an4test_clstk/menk/an407-menk-b.sph"][1]
        and found.notes["recordings that no list names"] == 1
    )


@pytest.mark.data
def test_an4_comes_back_as_it_was(tmp_path):
    """The real test utterances, as the publisher's files from the FLAC of the data folder."""
    if "ONETOMANY_DATA" not in os.environ:
        pytest.skip("ONETOMANY_DATA names no data folder")
    wanted = pq.read_table(
        Path(os.environ["ONETOMANY_DATA"]) / "speech/an4/test.parquet"
    ).to_pylist()
    lists = {"fileids": "", "transcription": ""}
    for row in wanted:
        name = f"an4test_clstk/{row['speaker']}/{row['utt_id'].rpartition('/')[2]}"
        write(tmp_path / f"in/wav/{name}.raw", samples(row["audio"]).astype(">i2").tobytes())
        lists["fileids"] += f"{name}\n"
        lists["transcription"] += f"{row['transcript']} ({name.rpartition('/')[2]})\n"
    for kind, text in lists.items():
        write(tmp_path / f"in/etc/an4_test.{kind}", text)
        write(tmp_path / f"in/etc/an4_train.{kind}", "")
    rows, found = prepare_and_read("an4", tmp_path / "in", tmp_path / "out", max_bad=0)
    got = {row["utterance"]: row for row in rows}
    assert len(got) == 130 and all(
        got[row["utt_id"].rpartition("/")[2]]["transcript"] == row["transcript"] for row in wanted
    )
    assert all(
        (samples(got[row["utt_id"].rpartition("/")[2]]["audio"]) == samples(row["audio"])).all()
        for row in wanted
    )
    assert found["recordings"]["test"] == {
        "hours": round(sum(row["duration_s"] for row in wanted) / 3600, 4),
        "speakers": 10,
        "rows_a_speaker": [13, 13],
        "seconds": found["recordings"]["test"]["seconds"],
    }
