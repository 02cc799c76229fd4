"""Data directories of Kaldi: segments, transcripts and speakers, and lines that cannot be used."""

import unicodedata

import pytest
from prepare.conftest import prepare_and_read, write
from prepare.speech import bad, index, kaldi, samples, sound


def test_rows_have_their_segments_transcripts_and_speakers(tmp_path):
    wanted = kaldi(tmp_path / "in")
    rows, found = prepare_and_read("kaldi", tmp_path / "in", tmp_path / "out", max_bad=0)
    assert {
        row["utterance"]: (row["split"], row["transcript"], row["speaker"], row["gender"])
        for row in rows
    } == wanted
    by_name = {row["utterance"]: row for row in rows}
    recording = samples((tmp_path / "in/sound/talk.wav").read_bytes())
    first, rest = by_name["ann-talk-1"], by_name["bob-talk-2"]
    assert (samples(first["audio"]) == recording[4000:12000]).all()
    assert (samples(rest["audio"]) == recording[12800:]).all(), "-1 is the end of the recording"
    whole = tmp_path / "in/sound/c.flac"
    assert by_name["cid-1"]["audio"] == whole.read_bytes(), "of flac -c -d FILE | the file is taken"
    assert found["notes"]["sets"] == 3


def test_a_set_alone_and_chosen_ones(tmp_path):
    wanted = kaldi(tmp_path / "in")
    chosen, _ = index("kaldi", tmp_path / "in", "sets=data/test_clean")
    assert [row["utterance"] for row in chosen] == ["eve-1"]
    alone, _ = index("kaldi", tmp_path / "in/data/dev", f"root={tmp_path / 'in'}")
    assert [(row["utterance"], row["split"]) for row in alone] == [("dan-1", wanted["dan-1"][0])]
    with pytest.raises(ValueError, match=r"no data/tst/wav\.scp.*test_clean"):
        index("kaldi", tmp_path / "in", "sets=data/tst")
    with pytest.raises(ValueError, match=r"no wav\.scp there"):
        index("kaldi", tmp_path / "in/sound")


def test_without_texts_and_speakers_there_are_no_such_columns(tmp_path):
    write(tmp_path / "in/wav.scp", "a a.wav\n")
    write(tmp_path / "in/a.wav", sound(1, form="WAV"))
    rows, _ = index("kaldi", tmp_path / "in")
    assert rows[0]["utterance"] == "a" and rows[0]["split"] == "train"
    assert {"transcript", "speaker", "gender"}.isdisjoint(rows[0])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_dev", "validation"),
        ("test_dev93", "validation"),
        ("train_si284", "train"),
        ("test_clean", "test"),
        ("all", "train"),
        ("tr_no_dev", "train"),
        ("train_nodev", "train"),
        ("eval1", "test"),
        ("eval2000", "test"),
        ("ihm_eval", "test"),
        ("dt05_real", "validation"),
        ("et05_simu", "test"),
        ("test_tr", "test"),
        ("test/tr", "test"),
        ("train/et", "train"),
        ("tr", "train"),
        ("all_no_test", "train"),
        ("dump/raw/train/org", "train"),
    ],
)
def test_the_last_word_of_a_sets_name_tells_its_split(tmp_path, name, split):
    write(tmp_path / f"in/{name}/wav.scp", "a a.wav\n")
    write(tmp_path / "in/a.wav", sound(1, form="WAV"))
    rows, _ = index("kaldi", tmp_path / "in")
    assert rows[0]["split"] == split


def test_one_of_several_sets_needs_a_name_that_tells_its_split(tmp_path):
    for number, name in enumerate(("train_nodup", "rt03")):
        write(tmp_path / f"data/{name}/wav.scp", f"{name} {name}.wav\n")
        write(tmp_path / f"{name}.wav", sound(number, form="WAV"))
    with pytest.raises(ValueError, match=r"the name of data/rt03 tells no split.*--set split="):
        index("kaldi", tmp_path)
    rows, _ = index("kaldi", tmp_path, "sets=data/rt03", "split=test")
    assert [(row["utterance"], row["split"]) for row in rows] == [("rt03", "test")]


def test_lines_that_cannot_be_used_have_their_reason(tmp_path):
    write(tmp_path / "a.wav", sound(1, form="WAV"))
    scp = ["a a.wav", "b sph2pipe -f wav b.sph |", "c c.wav", "a a.wav", "d ../d.wav"]
    write(tmp_path / "wav.scp", "\n".join(scp))
    segments = [
        "u1 a 0 0.2",
        "u2 b 0 1",
        "u3 a 0.3 0.2",
        "u4 a 0.1",
        "u5 a 0.1 nan",
        "u6 a 0.3 0.4",
    ]
    write(tmp_path / "segments", "\n".join([*segments, "u7 a 0 0.2"]))
    write(tmp_path / "text", "u1 one\nu7 seven\nu9 nine\n")
    rows, found = index("kaldi", tmp_path)
    assert [(row["utterance"], row["transcript"]) for row in rows] == [("u1", "one")]
    assert {place: reason for place, (_, reason) in bad(found).items()} == {
        "wav.scp:2": "a command, and commands are not run: write its output to a file, and name that",
        "wav.scp:3": f"no recording c.wav in {tmp_path}",
        "wav.scp:4": "a second line for a, after wav.scp:1",
        "wav.scp:5": f"../d.wav leads outside of {tmp_path}; give a SOURCE that holds both, or --set "
        "root=",
        "segments:2": "segment of recording b, which is not in wav.scp or cannot be used",
        "segments:3": "a segment from 0.3 to 0.2 seconds",
        "segments:4": "not UTTERANCE RECORDING START END, in seconds",
        "segments:5": "not UTTERANCE RECORDING START END, in seconds",
        "a.wav": "occurs twice, with another transcript ('one')",
        "text:3": "a transcript without its recording",
    }


def test_fields_between_tabs_and_names_as_windows_and_macos_write_them(tmp_path):
    write(tmp_path / unicodedata.normalize("NFD", "wav/é.wav"), sound(1, form="WAV"))
    write(tmp_path / "wav.scp", "a \twav\\é.wav\n")
    write(tmp_path / "segments", "u1\ta\t0.0\t0.2\nu2  a\t0.2  0.4\n")
    write(tmp_path / "text", "u1\tone\nu2 \ttwo  three\n")
    rows, found = index("kaldi", tmp_path)
    assert not found.invalid
    assert [(row["utterance"], row["transcript"], row["_start"]) for row in rows] == [
        ("u1", "one", 0.0),
        ("u2", "two  three", 0.2),
    ]


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ("a.flac", "a.flac"),
        ("a name with spaces.wav", "a name with spaces.wav"),
        ("flac -c -d -s a.flac |", "a.flac"),
        ("flac -cds  a.flac|", None),
        ("flac -cds a.flac |", "a.flac"),
        ("flac -d -s a.flac |", None),
        ("flac -c -d -s a.flac | sox - -r 8000 - |", None),
        ("rm -rf a.flac |", None),
        ("sox a.wav -t wav - |", None),
    ],
)
def test_only_what_gives_the_files_own_samples_is_taken(entry, path):
    from pipeline.prepare.importers.kaldi import path_of_entry

    assert path_of_entry(entry) == path
