"""The job file: what is read, what is refused, and that every mistake is told at once, with its
line and the nearest right name.
"""

import json
import os
import re
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pydantic
import pytest

from pipeline.config import registry, yaml_loader
from pipeline.config import schema as job
from pipeline.train.fit_components import options_by_content

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(job.__file__).parents[2]

GOOD = """\
name: vision
storage: runs
sources:
  garments:
    data:
      uri: rows.parquet
      modality: {image: {size: 32}}
      columns: {image: image, label: label}
      where: {kind: [1, a, true]}
    backbone: timm/resnet18
    objective: classification
    train: {steps: 20, global_batch: 16, lr: 1e-3}
    workers: [2, 8]
  words:
    data: {train: more/*.parquet, validation: [rows.parquet], modality: text, columns: {text: text}}
    backbone: {transformers/bert: {layers: 2, hidden: 32, heads: 2}}
    objective: {mlm: {mask_share: 0.2}}
targets:
  clothing:
    data: {uri: rows.parquet, modality: image, columns: {image: image, label: label}}
    objective: classification
    label_fractions: [0.05, 1.0, 4]
    sources: [garments]
    train:
      epochs: 2
techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]
fanout:
  seeds: 2
  trials: 4
  search: {lr: [1.0e-4, 1e-2]}
  select: {score: knn, top: 1}
"""


@pytest.fixture
def folder(tmp_path):
    """Where a job's data files are; loading a job looks at their names only."""
    (tmp_path / "more").mkdir()
    (tmp_path / "rows.parquet").write_bytes(b"not read while the job is checked")
    (tmp_path / "more" / "a.parquet").write_bytes(b"")
    return tmp_path


@pytest.fixture
def load(folder):
    """Load a job from text (by default the good one, with ``change`` made in it)."""

    def load(
        text: str = GOOD,
        *overrides: str,
        change: tuple[str, str] | None = None,
        elsewhere: bool = False,
    ) -> job.Job:
        if change:
            assert text.count(change[0]) >= 1, f"{change[0]!r} is not in the text"
            text = text.replace(*change, 1)
        (folder / "job.yaml").write_text(text)
        return yaml_loader.load(folder / "job.yaml", overrides, elsewhere)

    return load


@pytest.fixture
def problems(load, folder):
    """The problems of a job that must be refused, without the file's path: ``12: field: what`` or
    ``field: what``.
    """

    def problems(
        text: str = GOOD,
        *overrides: str,
        change: tuple[str, str] | None = None,
        elsewhere: bool = False,
    ) -> list[str]:
        with pytest.raises(job.JobError) as caught:
            load(text, *overrides, change=change, elsewhere=elsewhere)
        start = f"{folder / 'job.yaml'}:"
        assert caught.value.problems
        assert all(line.startswith(start) for line in caught.value.problems)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return [line.removeprefix(start).strip() for line in caught.value.problems]

    return problems


def line_of(text: str, within: str = GOOD) -> int:
    """Number of the first line of the good job that holds a text."""
    return next(number for number, line in enumerate(within.splitlines(), 1) if text in line)


# ---------------------------------------------------------------- what is read


def test_a_good_job_is_typed(load):
    got = load()
    garments, words = got.sources["garments"], got.sources["words"]
    assert got.name == "vision" and got.seed == 0
    assert garments.train.lr == 1e-3 and isinstance(garments.train.lr, float)
    assert garments.worker_range == (2, 8) and words.worker_range == (1, 1)
    assert garments.data.modality == job.ComponentConfig(name="image", options={"size": 32})
    assert garments.data.where == {"kind": [1, "a", True]}
    assert words.backbone == job.ComponentConfig(
        name="transformers/bert", options={"layers": 2, "hidden": 32, "heads": 2}
    )
    assert got.targets["clothing"].label_fractions == [0.05, 1.0, 4]
    assert [type(f) for f in got.targets["clothing"].label_fractions] == [float, float, int], (
        "shares and rows per class differ by type"
    )
    assert [str(t) for t in got.techniques] == ["scratch", "full", 'lp_ft{"probe_share": 0.5}']
    assert got.fanout.search == {"lr": [1e-4, 1e-2]}


def test_defaults_are_documented_ones(load):
    got = load(
        "name: x\nsources:\n  s: {data: {uri: rows.parquet, modality: image, columns: {image: "
        "i, label: l}}, "
        "backbone: timm/resnet18, objective: classification}\n"
    )
    assert got.storage == "runs"
    assert [t.name for t in got.techniques] == ["scratch", "linear_probe", "full"]
    assert got.fanout.seeds == 3
    assert got.targets == {}


@pytest.mark.parametrize(
    "written", ["full", "{full: }", "{full: {}}", "{name: full}", "{name: full, options: {}}"]
)
def test_a_plug_may_be_written_in_several_ways(load, written):
    assert load(
        change=("[scratch, full, {lp_ft: {probe_share: 0.5}}]", f"[{written}]")
    ).techniques == [job.ComponentConfig(name="full")]


def test_quoted_and_word_like_texts_stay_texts(load):
    got = load(
        change=("columns: {image: image, label: label}", 'columns: {image: "1e-4", label: e5}')
    )
    assert got.sources["garments"].data.columns == {"image": "1e-4", "label": "e5"}


def test_environment_variables_are_put_in(load, monkeypatch):
    monkeypatch.setenv("PLACE_OF_RUNS", "s3://bucket")
    monkeypatch.setenv("NUM_STEPS", "33")
    got = load(
        GOOD.replace("storage: runs", "storage: ${PLACE_OF_RUNS}/deep/${NUM_STEPS}").replace(
            "steps: 20", "steps: '${NUM_STEPS}'"
        )
    )
    assert got.storage == "s3://bucket/deep/33"
    assert got.sources["garments"].train.steps == 33


def test_environment_variables_are_put_into_keys(load, monkeypatch):
    """A backbone with options is a key: ``{bundle:${RUNS}/x: {...}}``."""
    monkeypatch.setenv("NAME_OF_TARGET", "coats")
    got = load(GOOD.replace("  clothing:", "  ${NAME_OF_TARGET}:"))
    assert [*got.targets] == ["coats"]


@pytest.mark.parametrize("written", ["[0.1, 1]", "[1, 0.5]", "[0.1, 5, 1]"])
def test_an_integer_one_beside_shares_is_refused(load, problems, written):
    text = GOOD.replace("[0.05, 1.0, 4]", written)
    (found,) = problems(text)
    place = written.strip("[]").split(", ").index("1")
    assert (
        f"targets.clothing.label_fractions.{place}: 1 is one row of each class here" in found
        and "write 1.0 for all rows" in found
    )
    assert load(text.replace(written, "[1, 5, 10]")).targets["clothing"].label_fractions == [
        1,
        5,
        10,
    ]
    kept = load(text.replace(written, "[1, 4, 1.0]")).targets["clothing"].label_fractions
    assert kept == [1, 4, 1.0] and list(map(type, kept)) == [int, int, float], (
        "where all rows are said too, 1 is one row a class"
    )


def test_anchors_may_be_used(load):
    got = load(change=("      epochs: 2", "      epochs: &two 2\n      lr: *two"))
    assert got.targets["clothing"].train.lr == 2.0


MERGED = """\
name: merged
sources:
  one:
    data: &rows {uri: rows.parquet, modality: image, columns: &roles {image: image, label: label}}
    backbone: timm/resnet18
    objective: classification
    train: &short
      steps: 20
      lr: 0.5
  two:
    data: {<<: *rows, columns: {<<: *roles, label: kind}}
    backbone: timm/resnet18
    objective: classification
    train: &slow {weight_decay: 0.5, <<: *short, steps: 30}
  three:
    data: *rows
    backbone: timm/resnet18
    objective: classification
    train:
      <<: [{lr: 0.25}, *slow]
"""


def test_mappings_may_be_merged_and_own_keys_win(load, folder):
    one, two, three = load(MERGED).sources.values()
    assert two.data.uri == str(folder / "rows.parquet") and two.data.columns == {
        "image": "image",
        "label": "kind",
    }
    assert one.data.columns == {"image": "image", "label": "label"} and one.train.steps == 20
    assert two.train == job.Train(steps=30, lr=0.5, weight_decay=0.5), (
        "also where the merge stands behind"
    )
    assert three.train == job.Train(steps=30, lr=0.25, weight_decay=0.5), "the first of a list wins"
    assert load(
        change=(
            "columns: {image: image, label: label}\n      where",
            "columns: {image: '<<', label: label}\n      where",
        )
    )


@pytest.mark.parametrize(
    ("right", "wrong", "found"),
    [
        (
            "label: kind}",
            "label: kind, label: kind}",
            ["11: sources.two.data.columns.label: this key stands here twice; remove one"],
        ),
        (
            "<<: *roles",
            "<<: *roles, <<: *roles",
            ["11: sources.two.data.columns.<<: this key stands here twice; write <<: [*one, *two]"],
        ),
        (
            "<<: [{lr: 0.25}, *slow]",
            "<<: [*slow, 3]",
            [
                "20: sources.three.train.<<: merges a mapping or a list of mappings, e.g. <<: "
                "*anchor"
            ],
        ),
        (
            "      lr: 0.5",
            "      lr: -1",
            [
                f"9: sources.{name}.train.lr: Input should be greater than 0 (got -1)"
                for name in ("one", "two")
            ],
        ),
        (
            "<<: *short, steps: 30",
            "<<: *slow",
            ["1: not valid YAML: nested too deeply, or an alias that merges itself"],
        ),
    ],
)
def test_mistakes_in_merges_have_their_lines(problems, right, wrong, found):
    assert MERGED.count(right) == 1
    assert problems(MERGED.replace(right, wrong)) == found


@pytest.mark.parametrize(
    "written",
    [
        "2026-10-01",
        "2020-13-45",
        "2001-12-14t21:59:43.10-05:00",
        *("NO", "no", "on", "off", "Yes"),
        *("007", "-012", "00", "12:30", "12:30:45", "="),
    ],
)
def test_dates_codes_times_and_words_are_text(load, written):
    """YAML 1.1 takes the country NO for false and 012 for 10."""
    got = (
        load(change=("where: {kind: [1, a, true]}", f"where: {{{written}: [{written}, 1]}}"))
        .sources["garments"]
        .data.where
    )
    assert got == {written: [written, 1]}
    setting = f"sources.garments.data.where.kind=[{written}]"
    assert load(GOOD, setting).sources["garments"].data.where == {"kind": [written]}
    assert (
        load(GOOD, "name=2020-13-45").name
        == load(change=("name: vision", "name: 2020-13-45")).name
        == "2020-13-45"
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("1e-4", 1e-4), ("1E+2", 100.0), ("1.e-3", 1e-3), (".5e1", 5.0), ("-.5", -0.5)),
        *(("1_000", 1000), ("+7", 7), ("0", 0), ("0x1F", 31), ("0b11", 3)),
        *(("true", True), ("False", False)),
    ],
)
def test_numbers_and_booleans(load, written, value):
    where = (
        load(GOOD, f"sources.garments.data.where.kind=[{written}]").sources["garments"].data.where
    )
    assert where == {"kind": [value]} and type(where["kind"][0]) is type(value)


def test_fields_that_are_on_or_off_take_words_too(load):
    settings = ("sources.garments.train.augment=off", "sources.garments.train.compile=yes")
    train = load(GOOD, *settings).sources["garments"].train
    assert (train.augment, train.compile) == (False, True)


@pytest.mark.parametrize(
    "written",
    [
        "0x_",
        "0b_",
        "!!int many",
        "!!int ''",
        "!!bool maybe",
        "!!timestamp 2020-13-45",
        "!!timestamp soon",
        "9" * 5000,
    ],
)
def test_a_text_that_is_not_what_it_looks_like_is_a_problem_with_its_line(problems, written):
    found = problems(
        change=(
            "columns: {image: image, label: label}\n      where",
            f"columns: {{image: image, label: {written}}}\n      where",
        )
    )
    assert len(found) == 1 and found[0].startswith(
        f"{line_of('columns:')}: sources.garments.data.columns.label: "
    )
    assert "put it in quotes if it is text" in found[0]
    found = problems(GOOD, f"name={written}")
    assert "put it in quotes" in found[0] and f"(from --set name={written})" in found[0]


def test_data_paths_are_relative_to_the_file_and_storage_is_left_alone(load, folder, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    got = load(change=("uri: rows.parquet\n", "uri: [rows.parquet, s3://bucket/more.parquet]\n"))
    assert got.sources["garments"].data.uri == [
        str(folder / "rows.parquet"),
        "s3://bucket/more.parquet",
    ]
    assert got.sources["words"].data.train == str(folder / "more" / "*.parquet")
    assert got.sources["words"].data.validation == [str(folder / "rows.parquet")]
    assert got.targets["clothing"].data.uri == str(folder / "rows.parquet")
    assert got.storage == "runs" and got.root == str(elsewhere / "runs" / "vision"), (
        "relative to the current folder"
    )


@pytest.mark.parametrize(
    ("storage", "root"),
    [
        ("file:///some/where", "/some/where/vision"),
        ("/some/where/", "/some/where/vision"),
        ("s3://bucket/deep", "s3://bucket/deep/vision"),
        ("~/runs", os.path.expanduser("~/runs/vision")),
    ],
)
def test_the_root_is_a_path_or_a_bucket(load, storage, root):
    assert load(GOOD, f"storage={storage}").root == root


def test_a_job_file_named_by_a_relative_path(folder, monkeypatch):
    (folder / "job.yaml").write_text(GOOD)
    monkeypatch.chdir(folder.parent)
    got = yaml_loader.load(Path(folder.name, "job.yaml"))
    assert got.sources["garments"].data.uri == str(folder / "rows.parquet")


def test_a_folder_a_glob_and_a_file_uri_are_found(load, folder):
    for uri in (
        "more",
        "more/",
        "more/*.parquet",
        f"file://{folder}/rows.parquet",
        str(folder / "more"),
    ):
        got = load(change=("uri: rows.parquet\n", f"uri: {uri}\n")).sources["garments"].data.uri
        assert str(folder) in got and got.removeprefix("file://").startswith("/")


@pytest.mark.parametrize(
    "written",
    [
        "init: file:weights.safetensors",
        "init: 'bundle:folder'",
        "init: hf:folder",
        "init: bundle:s3://bucket/a",
    ],
)
def test_checkpoints_are_relative_to_the_file(load, folder, written):
    (folder / "weights.safetensors").write_bytes(b"")
    (folder / "folder").mkdir()
    init = load(change=("    workers: [2, 8]", f"    {written}")).sources["garments"].init
    prefix, _, uri = init.partition(":")
    assert uri == "s3://bucket/a" or (Path(uri).is_absolute() and Path(uri).exists())
    assert prefix == written.removeprefix("init: ").strip("'").partition(":")[0]


JOINED = """\
name: ssl
sources:
  xray:
    data:
      uri: rows.parquet
      modality: {image: {size: 32}}
      columns: {image: image}
      more:
        - {uri: more/*.parquet, modality: image, split_column: split_by_patient}
        - {train: [rows.parquet], validation: more, modality: {image: {size: 32}}, columns: {image: image}, where: {view: [PA]}}
    probe: {train: rows.parquet, test: more, modality: image, columns: {image: image, label: label}, more: [{uri: more, modality: image}]}
    backbone: timm/resnet18
    init: file-by-order:weights.pth
    objective: simclr
    train: {steps: 2}
"""


def test_joined_corpora_and_the_probe_are_relative_to_the_file(load, folder):
    (folder / "weights.pth").write_bytes(b"x")
    source = load(JOINED).sources["xray"]
    assert source.init == f"file-by-order:{folder}/weights.pth"
    assert source.data and [part.uri or part.train for part in source.data.more] == [
        f"{folder}/more/*.parquet",
        [f"{folder}/rows.parquet"],
    ]
    assert source.data.more[1].validation == f"{folder}/more"
    assert source.probe and (source.probe.train, source.probe.test) == (
        f"{folder}/rows.parquet",
        f"{folder}/more",
    )
    assert source.probe.more[0].uri == f"{folder}/more"


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "modality: image, split_column",
            "modality: text, split_column",
            r"data\.more\.0\.modality: it is text, that of the first rows image",
        ),
        (
            "modality: image, split_column",
            "modality: {image: {size: 64}}, split_column",
            r"data\.more\.0\.modality: it is image\{.size.: 64\}, that of the first",
        ),
        (
            "modality: image, split_column",
            "split_column",
            r"data\.more\.0\.modality: this field is required",
        ),
        (
            "columns: {image: image}, where",
            "columns: {image: picture}, where",
            r"data\.more\.1\.columns: they are .*picture.*, those of the first",
        ),
        (
            "uri: more/*.parquet",
            "uri: nowhere",
            r"data\.more\.0\.uri: nowhere: no such file, folder or glob",
        ),
        (
            "uri: more/*.parquet",
            "uri: more/*.parquet, more: [{uri: more, modality: image}]",
            r"data\.more\.0\.more: corpora are joined to the first one alone",
        ),
        (
            "split_column: split",
            "decode: memory, split_column: split",
            r"data\.more\.0\.decode: said once, for all corpora that are joined",
        ),
        ("test: more, modality", "test: moer, modality", r"probe\.test: moer: no such file"),
        (
            "{image: image, label: label}",
            "{image: image}",
            r"probe\.columns: role 'label' has no column; say columns: \{label: NAME\}",
        ),
        (
            "modality: image, columns: {image: image, label: label}, more: [{uri: more, "
            "modality: image}]",
            "modality: text, columns: {text: text, label: a}",
            r"a probe tries the backbone while it is pretrained",
        ),
        (
            "init: file-by-order:weights.pth",
            "init: file-by-order:wieghts.pth",
            r"init: file-by-order wieghts\.pth: no such path",
        ),
    ],
)
def test_mistakes_in_joined_corpora_and_the_probe_have_their_place(
    problems, folder, right, wrong, message
):
    (folder / "weights.pth").write_bytes(b"x")
    assert right in JOINED
    found = problems(JOINED.replace(right, wrong, 1))
    assert any(re.match(rf"\d+: sources\.xray.*{message}", one) for one in found), found


WEIGHED = """\
name: text
sources:
  words:
    data:
      uri: rows.parquet
      modality: {text: {length: 32, tokenizer: more}}
      columns: {text: text}
      weight: 0.7
      more:
        - {uri: more, modality: text, weight: 2}
        - {uri: rows.parquet, modality: {name: text, options: {length: 32, tokenizer: more}}, weight: 1e-3}
    backbone: transformers/bert
    objective: mlm
    train: {steps: 2}
targets:
  task:
    data: {uri: rows.parquet, modality: {text: {tokenizer: more/../more}}, columns: {text: text, label: label}, format: paragraphs}
    objective: classification
"""


def test_corpora_have_weights_and_tokenizers_lie_relative_to_the_file(load, folder):
    got = load(WEIGHED)
    data = got.sources["words"].data
    assert data and data.weights == (0.7, 2.0, 1e-3)
    assert (
        data.modality.options["tokenizer"]
        == data.more[1].modality.options["tokenizer"]
        == f"{folder}/more"
    )
    assert (
        got.targets["task"].data.modality.options["tokenizer"] == f"{folder}/more"
        and got.targets["task"].data.format == "paragraphs"
    )
    away = load(WEIGHED, change=("tokenizer: more/../more", "tokenizer: s3://bucket/more"))
    assert away.targets["task"].data.modality.options["tokenizer"] == "s3://bucket/more"


def test_a_language_model_lies_relative_to_the_file_and_is_a_part_of_the_job(
    load, problems, folder
):
    (folder / "words.arpa").write_text("one")
    job = """\
name: speech
sources:
  said: {data: {uri: rows.parquet, modality: audio, columns: {audio: a, transcript: t}}, backbone: torchaudio/deepspeech2, objective: ctc, train: {steps: 2}}
targets:
  words:
    data: {uri: rows.parquet, modality: audio, columns: {audio: a, transcript: t}}
    objective: {ctc: {beam: 5, lm: words.arpa}}
"""
    objective = load(job).targets["words"].objective
    assert objective.options["lm"] == f"{folder}/words.arpa"
    before = options_by_content("objective", objective)
    (folder / "words.arpa").write_text("other words")
    assert (
        before["beam"] == 5
        and before["lm"] != options_by_content("objective", objective)["lm"]
        and "words.arpa" not in str(before)
    )
    (folder / "words.arpa").unlink()
    assert problems(job) == [
        "7: targets.words.objective.ctc.lm: words.arpa: no such file, folder or glob (looked "
        f"for {folder}/words.arpa)"
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "modality: text, weight: 2",
            "modality: text",
            r"\d+: sources\.words\.data\.more\.0\.weight: other corpora of these rows have a "
            r"weight: give this one",
        ),
        (
            "      weight: 0.7\n",
            "",
            r"\d+: sources\.words\.data\.weight: other corpora of these rows have a weight",
        ),
        ("weight: 0.7", "weight: 0", r"8: sources\.words\.data\.weight: .*greater than 0"),
        ("weight: 0.7", "weight: .inf", r"8: sources\.words\.data\.weight: .*finite"),
        (
            "format: paragraphs",
            "weight: 1",
            r"\d+: targets\.task\.data\.weight: weights mix the corpora of a source; a "
            r"target's rows are trained on as they are",
        ),
        (
            "format: paragraphs",
            "more: [{uri: more, modality: text, weight: 1}]",
            r"\d+: targets\.task\.data\.weight: other corpora",
        ),
        (
            "    backbone:",
            "    probe: {uri: more, modality: text, columns: {text: a, label: b}, weight: "
            "1}\n    backbone:",
            r"\d+: sources\.words\.probe\.weight: weights mix the corpora of a source; the "
            r"rows of a probe are read whole",
        ),
        (
            "tokenizer: more}}\n",
            "tokenizer: moer}}\n",
            r"6: sources\.words\.data\.modality\.text\.tokenizer: moer: no such file, folder "
            r"or glob",
        ),
        (
            "format: paragraphs",
            "format: paragraph",
            r"\d+: targets\.task\.data\.format: .*'documents'",
        ),
    ],
)
def test_mistakes_in_weights_and_tokenizers_have_their_place(problems, right, wrong, message):
    assert right in WEIGHED
    found = problems(WEIGHED.replace(right, wrong, 1))
    assert any(re.match(message, one) for one in found), found


def test_one_corpus_alone_has_no_weight(problems):
    start, end = WEIGHED.index("      more:\n"), WEIGHED.index("    backbone:")
    found = problems(WEIGHED[:start] + WEIGHED[end:])
    assert found == [
        "8: sources.words.data.weight: it is the share of a corpus beside others "
        "(data.more), and there is only one corpus here: leave it out"
    ]


def test_a_source_may_be_a_checkpoint_alone(load, folder):
    (folder / "folder").mkdir()
    text = (
        "name: x\nsources:\n  a: {backbone: bundle:folder}\n  b: {backbone: "
        "timm-hub:resnet18.a1_in1k}\n  c: {backbone: timm/resnet18, init: hf:folder}\n"
    )
    got = load(text)
    assert got.sources["a"].backbone.name == f"bundle:{folder / 'folder'}"
    assert got.sources["b"].backbone.name == "timm-hub:resnet18.a1_in1k"


@pytest.mark.parametrize(
    "written", ["{'hf:folder': {pool: pooler}}", "{name: 'hf:folder', options: {pool: pooler}}"]
)
def test_a_checkpoint_with_options_has_its_place_and_its_rules(load, problems, folder, written):
    (folder / "folder").mkdir()
    text = f"name: x\nsources:\n  a:\n    backbone: {written}\n"
    backbone = load(text).sources["a"].backbone
    assert (backbone.name, backbone.options) == (f"hf:{folder / 'folder'}", {"pool": "pooler"})
    (missing,) = problems(text.replace("hf:folder", "hf:nowhere"))
    assert missing.startswith(
        f"4: sources.a.backbone: hf nowhere: no such path (looked for {folder / 'nowhere'})"
    )
    (option,) = problems(text.replace("pool: pooler", "pol: pooler"))
    assert option.startswith("4: sources.a.backbone") and option.endswith(
        "pol: unknown option of a backbone; did you mean pool?"
    )


def test_a_source_starts_from_one_checkpoint(problems, folder):
    (folder / "folder").mkdir()
    found = problems("name: x\nsources:\n  a:\n    backbone: hf:folder\n    init: bundle:folder\n")
    assert (
        len(found) == 1
        and "init bundle:folder and backbone hf:folder are both checkpoints: start from one of them"
        in found[0]
    )


def test_a_job_is_frozen(load):
    got = load()
    for thing, field in (
        (got, "name"),
        (got.sources["garments"], "workers"),
        (got.sources["garments"].train, "lr"),
        (got.fanout, "seeds"),
    ):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(thing, field, getattr(thing, field))


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("name=other", ("name",), "other"),
        ("storage=s3://bucket/runs", ("storage",), "s3://bucket/runs"),
        ("seed=3", ("seed",), 3),
        ("sources.garments.train.lr=1e-4", ("sources", "garments", "train", "lr"), 1e-4),
        ("sources.garments.train.compile=true", ("sources", "garments", "train", "compile"), True),
        (
            "sources.garments.train.clip_norm=null",
            ("sources", "garments", "train", "clip_norm"),
            None,
        ),
        ("sources.garments.workers=[1, 4]", ("sources", "garments", "workers"), (1, 4)),
        # `train` is not in the file
        (
            "sources.words.train.steps=7",
            ("sources", "words", "train", "steps"),
            7,
        ),
        ("sources.words.data.max_bad_rows=0.5", ("sources", "words", "data", "max_bad_rows"), 0.5),
        (
            "targets.clothing.label_fractions.0=0.25",
            ("targets", "clothing", "label_fractions", 0),
            0.25,
        ),
        (
            "techniques.2.lp_ft.probe_share=0.7",
            ("techniques", 2),
            job.ComponentConfig(name="lp_ft", options={"probe_share": 0.7}),
        ),
        ("techniques.1=linear_probe", ("techniques", 1), job.ComponentConfig(name="linear_probe")),
        ("fanout.search.lr=[1e-5, 1e-3]", ("fanout", "search", "lr"), [1e-5, 1e-3]),
        (
            "sources.words.objective={mlm: {mask_share: 0.3}}",
            ("sources", "words", "objective"),
            job.ComponentConfig(name="mlm", options={"mask_share": 0.3}),
        ),
    ],
)
def test_set_overrides_any_field(load, setting, path, value):
    got = load(GOOD, setting)
    for part in path:
        got = got[part] if isinstance(got, (dict, list)) else getattr(got, part)
    assert got == value and type(got) is type(value)


def test_the_last_set_wins_and_several_are_taken(load):
    got = load(GOOD, "seed=1", "name=a", "seed=2")
    assert (got.seed, got.name) == (2, "a")


def test_set_reads_the_environment(load, monkeypatch, problems):
    monkeypatch.setenv("BUCKET", "s3://b")
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    assert load(GOOD, "storage=${BUCKET}/runs").storage == "s3://b/runs"
    assert any(
        "NOT_SET_ANYWHERE is not set" in line
        for line in problems(GOOD, "storage=${NOT_SET_ANYWHERE}")
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "unknown field; did you mean seed?"),
        ("sources.garments.tran.lr=1", "unknown field; did you mean train?"),
        ("sources.garments.train.lrr=1", "unknown field; did you mean lr?"),
        ("fanout.sed=1", "did you mean seeds?"),
        ("seed=abc", "valid integer"),
        ("sources.garments.train.lr=-1", "greater than 0"),
        ("techniques.1=ful", "unknown technique 'ful'; did you mean full?"),
        ("sources.garments.backbone=timm/resnet81", "did you mean resnet18"),
    ],
)
def test_a_wrong_set_is_named_with_the_nearest_field(problems, setting, message):
    assert any(
        message in line and f"(from --set {setting})" in line for line in problems(GOOD, setting)
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed", "write --set a.b=value"),
        ("=3", "write --set a.b=value"),
        ("sources..train=3", "write --set a.b=value"),
        ("techniques.9=full", "a list of 3; write its index"),
        ("techniques.first=full", "a list of 3; write its index"),
        ("techniques.1.a=1", "is the text 'full', it has no fields"),
        ("seed=[", "seed=["),  # not YAML
        ("sources.garments.workers.0.x=1", "workers"),  # into a number
        ("seed.x=1", "seed"),
    ],
)
def test_a_set_that_leads_nowhere_is_refused(problems, setting, message):
    assert any(message in line for line in problems(GOOD, setting))


def test_a_set_of_an_unknown_source_names_the_known_ones(problems):
    setting = "sources.garment.train.steps=5"
    unknown = f"--set {setting}: the file has no source garment; did you mean garments?"
    assert unknown in problems(GOOD, setting)


# ---------------------------------------------------------------- misspelt keys, at every depth

MISSPELT = [  # line of the good job, wrong line, the field as it is named, nearest
    ("storage: runs", "storag: runs", "storag", "storage"),
    ("    workers: [2, 8]", "    wrokers: [2, 8]", "sources.garments.wrokers", "workers"),
    ("      uri: rows.parquet", "      urii: rows.parquet", "sources.garments.data.urii", "uri"),
    (
        "    label_fractions: [0.05, 1.0, 4]",
        "    label_fraction: [0.05, 1.0, 4]",
        "targets.clothing.label_fraction",
        "label_fractions",
    ),
    ("      epochs: 2", "      epoch: 2", "targets.clothing.train.epoch", "epochs"),
    ("  seeds: 2", "  seed: 2", "fanout.seed", "seeds"),
    (
        "  select: {score: knn, top: 1}",
        "  select: {score: knn, topp: 1}",
        "fanout.select.topp",
        "top",
    ),
    ("fanout:", "fan_out:", "fan_out", "fanout"),
]


@pytest.mark.parametrize(
    ("right", "wrong", "field", "nearest"), MISSPELT, ids=[m[2] for m in MISSPELT]
)
def test_a_misspelt_key_is_named_with_its_line_and_the_nearest(
    problems, right, wrong, field, nearest
):
    found = [line for line in problems(change=(right, wrong)) if "unknown field" in line]
    assert found == [f"{line_of(right)}: {field}: unknown field; did you mean {nearest}?"] or (
        len(found) == 1
        and found[0].startswith(f"{line_of(right)}: {field}: unknown field; did you mean ")
        and nearest in found[0]
    )


OPTIONS = [
    (
        "      modality: {image: {size: 32}}",
        "      modality: {image: {sise: 32}}",
        "sources.garments.data.modality.image.sise",
        "unknown option of image; did you mean size?",
    ),
    (
        "    objective: {mlm: {mask_share: 0.2}}",
        "    objective: {mlm: {mask_share: 2}}",
        "sources.words.objective.mlm.mask_share",
        "less than 1 (got 2)",
    ),
    (
        "    backbone: {transformers/bert: {layers: 2, hidden: 32, heads: 2}}",
        "    backbone: {transformers/bert: {layer: 2}}",
        "sources.words.backbone.transformers/bert.layer",
        "unknown option of transformers/bert; did you mean layers?",
    ),
    (
        "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]",
        "techniques: [scratch, {lp_ft: {probe_shar: 0.5}}]",
        "techniques.1.lp_ft.probe_shar",
        "unknown option of lp_ft; did you mean probe_share?",
    ),
    (
        "      modality: {image: {size: 32}}",
        "      modality: {image: {size: big}}",
        "sources.garments.data.modality.image.size",
        "valid integer",
    ),
]


@pytest.mark.parametrize(
    ("right", "wrong", "field", "message"), OPTIONS, ids=[m[2] for m in OPTIONS]
)
def test_a_wrong_option_is_named_with_its_line(problems, right, wrong, field, message):
    found = problems(change=(right, wrong))
    assert len(found) == 1
    assert found[0].startswith(f"{line_of(right)}: {field}: ") and message in found[0]


NAMES = [
    (
        "    backbone: timm/resnet18",
        "    backbone: timm/resnet_18",
        "sources.garments.backbone",
        ("unknown timm model 'resnet_18'", "did you mean", "resnet18"),
    ),
    (
        "    backbone: timm/resnet18",
        "    backbone: tim/resnet18",
        "sources.garments.backbone",
        ("unknown backbone 'tim/resnet18'", "did you mean timm/resnet18 "),
    ),
    (
        "    backbone: timm/resnet18",
        "    backbone: resnet18",
        "sources.garments.backbone",
        ("library/model", "timm/resnet18"),
    ),
    (
        "    objective: classification",
        "    objective: clasification",
        "sources.garments.objective",
        ("unknown objective 'clasification'", "did you mean classification"),
    ),
    (
        "      modality: {image: {size: 32}}",
        "      modality: imgae",
        "sources.garments.data.modality",
        ("unknown modality 'imgae'", "did you mean image?"),
    ),
    (
        "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]",
        "techniques: [scratch, linearprobe]",
        "techniques.1",
        ("unknown technique 'linearprobe'", "did you mean linear_probe?"),
    ),
    (
        "    sources: [garments]",
        "    techniques: [fulll]",
        "targets.clothing.techniques.0",
        ("unknown technique 'fulll'", "did you mean full?"),
    ),
    (
        "    sources: [garments]",
        "    sources: [garmnets]",
        "targets.clothing.sources",
        ("unknown source 'garmnets'", "did you mean garments?"),
    ),
    (
        "  search: {lr: [1.0e-4, 1e-2]}",
        "  search: {lrr: [1.0e-4, 1e-2]}",
        "fanout.search.lrr",
        ("unknown field of train", "did you mean lr?"),
    ),
    (
        "    sources: [garments]",
        "    metric: acuracy",
        "targets.clothing.metric",
        ("unknown metric 'acuracy'", "did you mean", "accuracy"),
    ),
    (
        "  select: {score: knn, top: 1}",
        "  select: {score: logm}",
        "fanout.select.score",
        ("logme",),
    ),
]


@pytest.mark.parametrize(
    ("right", "wrong", "field", "messages"), NAMES, ids=[m[1].strip() for m in NAMES]
)
def test_an_unknown_name_is_told_with_the_nearest(problems, right, wrong, field, messages):
    found = problems(change=(right, wrong))
    assert len(found) == 1, found
    assert field in found[0] and all(message in found[0] for message in messages)


@pytest.mark.parametrize("called", ["data", "train", "targets", "select", "fanout"])
def test_a_source_may_have_the_name_of_a_field(load, problems, called):
    assert (
        called
        in load(
            GOOD.replace("  garments:", f"  {called}:").replace("[garments]", f"[{called}]")
        ).sources
    )
    found = problems(
        GOOD.replace("  garments:", f"  {called}:")
        .replace("[garments]", f"[{called}]")
        .replace("    workers:", "    worker:")
    )
    assert found == [
        f"{line_of('workers:')}: sources.{called}.worker: unknown field; did you mean workers?"
    ]


# ---------------------------------------------------------------- other mistakes


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("steps: 20", "steps: many", "train.steps: Input should be a valid integer"),
        (
            "steps: 20",
            "steps: 0",
            "train.steps: Input should be greater than or equal to 1 (got 0)",
        ),
        ("steps: 20", "steps: 2.5", "train.steps: "),
        ("steps: 20", "steps: true", "train.steps: "),
        ("steps: 20", "steps: 20, epochs: 1", "train: give steps or epochs, not both"),
        (
            "steps: 20",
            "steps: 20, batch_cost: 60",
            "train: give global_batch (rows a step) or batch_cost (what the rows of a step "
            "cost in all)",
        ),
        ("lr: 1e-3", "lr: .nan", "train.lr: "),
        (
            "lr: 1e-3",
            "precision: fp16",
            "train.precision: Input should be 'auto', 'fp32' or 'bf16' (got 'fp16')",
        ),
        ("workers: [2, 8]", "workers: [8, 2]", "workers (8, 2) must be at least 1"),
        ("workers: [2, 8]", "workers: 0", "workers 0 must be at least 1"),
        ("workers: [2, 8]", "workers: many", "sources.garments.workers: "),
        ("name: vision", "name: a/b", "name: Input should be a name (got 'a/b'); use only letters"),
        ("name: vision", "seed: 1", "name: this field is required"),
        (
            "    objective: classification\n    train: {steps",
            "    train: {steps",
            "a source with data needs an objective",
        ),
        (
            "      uri: rows.parquet",
            "      uri: rows.parquet\n      train: rows.parquet",
            "give either uri (one set of files) or train",
        ),
        ("      uri: rows.parquet", "      validation: rows.parquet", "give either uri"),
        (
            "  trials: 4\n  search: {lr: [1.0e-4, 1e-2]}",
            "  trials: 4",
            "trials above 1 needs search",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: {lr: [1.0e-2, 1e-4]}",
            "must be [low, high] with 0 < low <= high",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: {lr: [1e-4]}",
            "fanout.search.lr: give [low, high] or three or more",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: {lr: [1, 2, .inf]}",
            "fanout.search.lr: [1.0, 2.0, inf]: every value must be finite",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: {steps: [1, 2], epochs: [1, 2]}",
            "fanout.search.epochs: search steps or epochs, not both",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: aut",
            "fanout.search: Input should be 'auto' (got 'aut')",
        ),
        (
            "  trials: 4\n  search: {lr: [1.0e-4, 1e-2]}",
            "  search: auto",
            "fanout.search: search needs trials above 1",
        ),
        (
            "search: {lr: [1.0e-4, 1e-2]}",
            "search: {lr: [true, 1e-2]}",
            "fanout.search.lr.0: true and false are no value here (got True)",
        ),
        ("[0.05, 1.0, 4]", "[.nan]", "label_fractions.0: a share is above 0"),
        (
            "uri: rows.parquet",
            "uri: [rows.parquet, 5]",
            "sources.garments.data.uri.1: Input should be a valid string (got 5)",
        ),
        (
            "storage: runs",
            "storage: ftp://bucket",
            "2: storage: ftp://bucket: ftp:// is not supported",
        ),
        (
            "storage: runs",
            "storage: runs\n? [a, b]\n: 3",
            "3: the job: a key is a text, no list or mapping",
        ),
        ("[0.05, 1.0, 4]", "[1.5]", "label_fractions"),
        ("[0.05, 1.0, 4]", "[0.0]", "label_fractions"),
        ("[0.05, 1.0, 4]", "[some]", "targets.clothing.label_fractions.0: "),
        (
            "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]",
            "techniques: full",
            "techniques: Input should be a valid list (got 'full')",
        ),
        (
            "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]",
            "techniques: [{full: , scratch: }]",
            "write a name, or one name with its options",
        ),
        (
            "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]",
            "techniques: [{lp_ft: 3}]",
            "techniques.0",
        ),
        ("      uri: rows.parquet", "      uri: 5", "sources.garments.data.uri: "),
        ("      uri: rows.parquet", "      uri: ''", "sources.garments.data.uri: "),
        (
            "      uri: rows.parquet",
            "      uri: ftp://bucket/rows.parquet",
            "ftp:// is not supported",
        ),
        (
            "      uri: rows.parquet",
            "      uri: [rows.parquet, mor/*.parquet]",
            "mor/*.parquet: no such file, folder or glob",
        ),
        (
            "    workers: [2, 8]",
            "    init: weights.pt",
            "'weights.pt' is no checkpoint; write one of bundle:, file:, file-by-order:, hf:",
        ),
        ("    workers: [2, 8]", "    init: file:weights.pt", "no such path (looked for "),
        ("    workers: [2, 8]", "    init: 'bundle:'", "sources.garments.init: "),
        (
            "    backbone: timm/resnet18",
            "    backbone: bundle:garments",
            "bundle garments: no such path (looked for ",
        ),
        ("  garments:\n    data:", "  garments:\n  other:\n    data:", "sources.garments: "),
    ],
)
def test_mistakes_are_refused_by_one_line(problems, right, wrong, message):
    found = problems(change=(right, wrong))
    assert len(found) == 1, found
    assert message in found[0]


def test_missing_files_are_told_before_anything_starts_with_the_place_looked_at(problems, folder):
    found = problems(change=("      uri: rows.parquet", "      uri: nowhere/rows.parquet"))
    assert found == [
        f"{line_of('uri: rows')}: sources.garments.data.uri: nowhere/rows.parquet: no such file, "
        f"folder or glob (looked for {folder / 'nowhere/rows.parquet'})"
    ]


NO_ROLES = GOOD.replace("      columns: {image: image, label: label}\n", "")


def test_roles_are_those_of_the_modality_and_the_objective(load, problems):
    columns = "columns: {image: image, label: label}\n"
    assert (
        load(change=(columns, "columns: {image: image, label: label, label_name: names}\n"))
        .sources["garments"]
        .data.columns["label_name"]
        == "names"
    )
    at = f"{line_of('columns:')}: sources.garments.data.columns"
    assert problems(
        change=(columns, "columns: {image: image, label: label, label_nmae: label_name}\n")
    ) == [f"{at}.label_nmae: unknown role; did you mean label_name or label?"]
    assert problems(change=(columns, "columns: {image: image, text: text}\n")) == [
        f"{at}.text: unknown role; valid names: image, label, label_name, mask",
        f"{at}: role 'label' has no column; say columns: {{label: NAME}}",
    ]
    assert problems(NO_ROLES) == [
        f"5: sources.garments.data.columns: {text}"
        for text in (
            "role 'image' has no column; say columns: {image: NAME}",
            "role 'label' has no column; say columns: {label: NAME}",
        )
    ]
    assert problems(change=("columns: {text: text}", "columns: {text: text, label: label}")) == [
        f"{line_of('columns: {text')}: sources.words.data.columns.label: unknown role; valid names: text, text_pair"
    ], "mlm reads no label"
    target = "modality: image, columns: {image: image, label: label}"
    assert problems(change=(target, "modality: image, columns: {image: image}")) == [
        f"{line_of(target)}: targets.clothing.data.columns: role 'label' has no column; say "
        f"columns: {{label: NAME}}"
    ]


def test_roles_are_not_judged_by_names_that_are_unknown(problems):
    for change in (
        ("modality: {image: {size: 32}}", "modality: imgae"),
        ("    objective: classification\n    train: {", "    objective: clas\n    train: {"),
    ):
        assert len(problems(change=change)) == 1
    assert (
        len(problems(change=("columns: {image: image, label: label}\n", "columns: [image]\n"))) == 1
    )


def test_wrong_roles_and_searches_are_told_beside_other_mistakes(problems):
    text = (
        GOOD.replace("seed", "sed")
        .replace("steps: 20", "steps: x")
        .replace("label: label}\n", "label: label, lbl: x}\n", 1)
    )
    text = text.replace(
        "modality: image, columns: {image: image, label: label}", "modality: image, decode: workers"
    )
    text = (
        text.replace("trials: 4", "trials: 1")
        .replace("lr: [1.0e-4, 1e-2]", "warmup: [0.5, 2], keep: [1, 2]")
        .replace("storage: runs", "storag: runs")
    )
    found = problems(text)
    for number, message in (
        (2, "storag: unknown field"),
        (line_of("lbl", text), "columns.lbl: unknown role"),
        (line_of("steps: x", text), "train.steps: "),
        (line_of("decode", text), "role 'image' has no column"),
        (line_of("decode", text), "role 'label' has no column"),
        (line_of("decode", text), "data.decode: "),
        (line_of("search", text), "fanout.search.warmup: 2.0 is refused"),
        (line_of("search", text), "fanout.search: search needs trials above 1"),
        (line_of("search", text), "fanout.search.keep: keep of train is no number"),
        (line_of("seds", text), "fanout.seds: unknown field; did you mean seeds?"),
    ):
        assert any(line.startswith(f"{number}: ") and message in line for line in found), (
            number,
            message,
            found,
        )
    assert len(found) == 10


# ---------------------------------------------------------------- searches

SEARCH = "search: {lr: [1.0e-4, 1e-2]}"


def test_a_search_with_one_trial_is_refused(problems, load):
    at = line_of(SEARCH)
    for one in ("1", "'1'", "1.0"):
        assert problems(change=("  trials: 4\n", f"  trials: {one}\n")) == [
            f"{at}: fanout.search: search needs trials above 1, e.g. trials: 8"
        ]
    assert problems(change=("  trials: 4\n", "")) == [
        f"{at - 1}: fanout.search: search needs trials above 1, e.g. trials: 8"
    ]
    assert (
        load(
            change=(SEARCH, "search: {}"), text=GOOD.replace("trials: 4", "trials: 1")
        ).fanout.trials
        == 1
    )


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            "warmup: [0.5, 2]",
            "fanout.search.warmup: 2.0 is refused: Input should be less than or equal to 1",
        ),
        (
            "beta1: [0.5, 0.9, 1]",
            "fanout.search.beta1: 1.0 is refused: Input should be less than 1",
        ),
        (
            "weight_decay: [-1, 0, 1]",
            "fanout.search.weight_decay: -1.0 is refused: Input should be greater than or "
            "equal to 0",
        ),
        (
            "global_batch: [0.2, 8]",
            "fanout.search.global_batch: 0.2 (drawn as 0) is refused: Input should be greater "
            "than or equal to 1",
        ),
        (
            "beta2: [0.5, 0.99999999]",
            "fanout.search.beta2: 0.99999999 (drawn as 1.0) is refused: Input should be less "
            "than 1",
        ),
        (
            "optimizer: [adamw, sgd]",
            "fanout.search.optimizer: optimizer of train is no number and cannot be searched; "
            "these can: steps, epochs, ",
        ),
        ("augment: [0, 1, 1]", "fanout.search.augment: augment of train is no number"),
        ("compile: [true, false]", "fanout.search.compile: compile of train is no number"),
        ("precision: [1, 2]", "fanout.search.precision: precision of train is no number"),
    ],
)
def test_what_a_search_may_not_draw_is_one_error_with_its_line(problems, search, message):
    text = GOOD.replace(SEARCH, f"search:\n    lr: [1e-3, 1e-2]\n    {search}")
    found = problems(text)
    assert len(found) == 1 and found[0].startswith(f"{line_of(f'    {search}', text)}: {message}")
    with pytest.raises(pydantic.ValidationError, match=r"fanout\.search|no number"):
        data = yaml_loader.parse(GOOD, [])[0]
        job.Job.model_validate(
            {**data, "fanout": {"trials": 4, "search": yaml_loader.parse(f"{{{search}}}", [])[0]}}
        )


def test_a_search_is_checked_with_every_targets_train(load):
    for length in ("epochs: [1, 10]", "steps: [1, 10]", "epochs: [0.5, 1, 3]"):
        for own in ("epochs: 2", "steps: 20", "lr: 1"):
            assert load(
                GOOD.replace(SEARCH, f"search: {{{length}}}").replace(
                    "      epochs: 2", f"      {own}"
                )
            ).fanout.search
    assert load(
        GOOD.replace(
            SEARCH, "search: {micro_batch: [1, 8], ema: [0.9, 0.99], clip_norm: [0.5, 1, 2]}"
        )
    ).fanout.search


def test_what_is_drawn_takes_the_place_of_what_was_there():
    train = job.Train(steps=20, lr=0.5)
    assert job.with_hyper_parameters(train, {}) == train
    assert job.with_hyper_parameters(train, {"epochs": 1.5, "lr": 1}) == job.Train(
        epochs=1.5, lr=1.0
    )
    assert job.with_hyper_parameters(job.Train(epochs=2), {"steps": 3}) == job.Train(steps=3)
    assert train == job.Train(steps=20, lr=0.5)
    assert (
        job.with_hyper_parameters(job.Train(batch_cost=4.0), {"lr": 1}).batch_cost == 4.0
        and job.with_hyper_parameters(job.Train(batch_cost=4.0), {"batch_cost": 2}).batch_cost
        == 2.0
    )
    for wrong in (
        {"warmup": 2},
        {"lrr": 1},
        {"steps": 2, "epochs": 2},
        {"steps": 2.5},
        {"lr": True},
    ):
        with pytest.raises(pydantic.ValidationError):
            job.with_hyper_parameters(train, wrong)


def test_draws_are_rounded():
    assert [
        job.round_hyper_parameter(name, 2.6000000001)
        for name in ("steps", "micro_batch", "lr", "clip_norm")
    ] == [3, 3, 2.6, 2.6]
    assert type(job.round_hyper_parameter("steps", 2.6)) is int
    assert {"steps", "epochs", "lr", "micro_batch", "ema"} <= set(job.NUMERIC) and not {
        "optimizer",
        "augment",
        "keep",
        "trace_rows",
    } & set(job.NUMERIC)


# ---------------------------------------------------------------- where things are


def test_absolute_paths_of_a_job_that_runs_elsewhere_need_not_exist(load, problems):
    text = GOOD.replace(
        "uri: rows.parquet\n", "uri: [/on/the/cluster/*.parquet, file:///on/it/rows.parquet]\n"
    )
    text = text.replace("    workers: [2, 8]", "    init: bundle:/on/the/cluster/bundle")
    text = text.replace(
        "backbone: {transformers", "init: file:///on/it.pt\n    backbone: {transformers"
    )
    got = load(text, elsewhere=True)
    assert got.sources["garments"].data.uri == [
        "/on/the/cluster/*.parquet",
        "file:///on/it/rows.parquet",
    ]
    assert got.sources["garments"].init == "bundle:/on/the/cluster/bundle"
    assert len(problems(text)) == 4
    for right, wrong in (
        ("uri: rows.parquet\n", "uri: row.parquet\n"),
        ("    workers: [2, 8]", "    init: bundle:nowhere"),
        ("uri: rows.parquet\n", "uri: ftp://bucket/rows.parquet\n"),
    ):
        assert len(problems(change=(right, wrong), elsewhere=True)) == 1


def test_targets_are_not_decoded_in_data_workers(load, problems):
    target = "{uri: rows.parquet, modality: image, columns: {image: image, label: label}}"
    for place in ("auto", "memory", "train"):
        assert (
            load(change=(target, f"{target[:-1]}, decode: {place}}}"))
            .targets["clothing"]
            .data.decode
            == place
        )
    text = GOOD.replace(f"data: {target}", f"data:\n      <<: {target}\n      decode: workers")
    assert problems(text) == [
        f"{line_of('decode', text)}: targets.clothing.data.decode: targets are decoded in memory "
        "or in the train worker: say decode: memory, train or auto"
    ]
    assert (
        load(change=("      uri: rows.parquet", "      uri: rows.parquet\n      decode: workers"))
        .sources["garments"]
        .data.decode
        == "workers"
    )


def test_rows_are_traced_to_local_storage_only(load, problems):
    traced = "      epochs: 2\n      trace_rows: true"
    assert load(change=("      epochs: 2", traced)).targets["clothing"].train.trace_rows
    found = problems(GOOD.replace("      epochs: 2", traced), "storage=s3://bucket/runs")
    assert found == [
        f"{line_of('epochs: 2') + 1}: targets.clothing.train.trace_rows: rows are traced to local "
        "folders only, and storage is s3://bucket/runs; leave it out"
    ]
    assert (
        len(problems(GOOD, "storage=s3://bucket/runs", "sources.words.train.trace_rows=true")) == 1
    )
    assert load(GOOD, "storage=s3://bucket/runs", "sources.words.train.trace_rows=false")


def test_a_doubled_key_is_refused_at_any_depth(problems):
    text = GOOD.replace("storage: runs", "storage: runs\nname: again").replace(
        "epochs: 2", "epochs: 2\n      epochs: 3"
    )
    text = text.replace("lr: 1e-3}", "lr: 1e-3, steps: 20}")
    assert problems(text) == [
        "3: name: this key stands here twice; remove one",
        f"{line_of('lr: 1e-3', text)}: sources.garments.train.steps: this key stands here "
        "twice; remove one",
        f"{line_of('epochs: 3', text)}: targets.clothing.train.epochs: this key stands here "
        "twice; remove one",
    ]


@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ("storage: runs", "storage: ${NOT_SET_ANYWHERE}/runs", "2: storage"),
        ("  clothing:", "  ${NOT_SET_ANYWHERE}:", f"{line_of('  clothing:')}: targets"),
        (
            "backbone: timm/resnet18",
            "backbone: bundle:${NOT_SET_ANYWHERE}/bundle",
            f"{line_of('backbone:')}: sources.garments.backbone",
        ),
        (
            "train: more/*.parquet",
            "train: '${NOT_SET_ANYWHERE}/*.parquet'",
            f"{line_of('train: more')}: sources.words.data.train",
        ),
    ],
)
def test_an_unset_variable_is_one_problem(problems, monkeypatch, right, wrong, place):
    monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
    variable = "environment variable NOT_SET_ANYWHERE is not set; set it or write the value"
    assert problems(change=(right, wrong)) == [f"{place}: {variable}"]


def test_a_tab_is_named(problems):
    for wrong in ("\tworkers: [2, 8]", "   \tworkers: [2, 8]"):
        found = problems(change=("    workers: [2, 8]", wrong))
        assert len(found) == 1
        assert found[0].startswith(f"{line_of('workers:')}: not valid YAML") and "tab" in found[0]


def test_what_is_not_yaml_is_one_line_with_its_number(problems):
    found = problems(
        change=("steps: 20, global_batch: 16, lr: 1e-3}", "steps: 20, global_batch: 16, lr: 1e-3")
    )
    assert len(found) == 1 and "not valid YAML" in found[0] and found[0].split(":")[0].isdigit()


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just text\n", "3\n"])
def test_what_is_not_a_mapping_is_refused(problems, text):
    assert problems(text) == ["1: a job is a mapping with name, sources and targets"]


@pytest.mark.parametrize(
    "text",
    [
        "name: x\nsources: {}\n",
        "name: x\nsources:\n",
        "name: x\n",
        "name: x\nsources: [a]\n",
        "name: x\nsources: {s: 3}\n",
        "name: x\nsources: {s: {data: 3, backbone: 4}}\n",
        "name: x\nsources: {s: {backbone: }}\n",
        "a: &x [*x]\n" + GOOD,
        GOOD.replace("targets:", "target:"),
        GOOD.replace("fanout:", "fanout: 3\nx:"),
        "? [a, b]\n: 3\n" + GOOD,
    ],
)
def test_odd_shapes_are_refused_without_a_traceback(problems, text):
    assert problems(text)


def test_files_that_cannot_be_read(folder):
    for name, content, message in (
        ("absent.yaml", None, "no such job file"),
        ("latin.yaml", "name: \xe9".encode("latin-1"), "UTF-8"),
    ):
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(job.JobError) as caught:
            yaml_loader.load(folder / name)
        assert len(caught.value.problems) == 1
        assert str(folder / name) in str(caught.value) and message in str(caught.value)
    with pytest.raises(job.JobError):
        yaml_loader.load(folder)


def test_all_mistakes_are_told_at_once_in_the_order_of_lines(problems):
    text = GOOD
    wrong = {  # line of the good job -> (wrong line, what must be said of it)
        "storage: runs": ("storag: runs", "storag: unknown field; did you mean storage?"),
        "      uri: rows.parquet": ("      uri: row.parquet", "no such file, folder or glob"),
        "      modality: {image: {size: 32}}": (
            "      modality: {image: {siz: 32}}",
            "unknown option of image; did you mean size?",
        ),
        "    backbone: timm/resnet18": (
            "    backbone: timm/resnet_18",
            "unknown timm model 'resnet_18'",
        ),
        "    train: {steps: 20, global_batch: 16, lr: 1e-3}": (
            "    train: {steps: x, global_batch: 0, lrr: 1}",
            "train.steps: Input should be a valid integer",
        ),
        "    objective: {mlm: {mask_share: 0.2}}": (
            "    objective: mml",
            "unknown objective 'mml'; did you mean mlm?",
        ),
        "    label_fractions: [0.05, 1.0, 4]": (
            "    label_fraction: [1.0]",
            "did you mean label_fractions?",
        ),
        "      epochs: 2": ("      epochs: 2\n      epochs: 2", "this key stands here twice"),
        "techniques: [scratch, full, {lp_ft: {probe_share: 0.5}}]": (
            "techniques: [scratch, fill]",
            "unknown technique 'fill'; did you mean full?",
        ),
        "  seeds: 2": (
            "  seeds: 0",
            "fanout.seeds: Input should be greater than or equal to 1 (got 0)",
        ),
    }
    for right, (bad, _) in wrong.items():
        text = text.replace(right, bad, 1)
    found = problems(text)
    assert len(found) == len(wrong) + 2, "train holds three mistakes, every other line one"
    for bad, message in wrong.values():
        number = line_of(bad.rpartition("\n")[2], text) + bad.count("\n")
        assert any(line.startswith(f"{number}: ") and message in line for line in found), (
            number,
            message,
            found,
        )
    numbers = [int(line.split(":")[0]) for line in found]
    assert numbers == sorted(numbers)


# ---------------------------------------------------------------- before torch and Ray


def test_a_wrong_file_is_refused_in_under_two_seconds_without_torch_or_ray(folder):
    (folder / "job.yaml").write_text(
        GOOD.replace("timm/resnet18", "timm/resnet_18").replace("seeds: 2", "seed: 2")
    )
    program = textwrap.dedent("""
        import sys
        from pipeline.config import schema as job; from pipeline.config import yaml_loader as jobfile
        try:
            jobfile.load(sys.argv[1])
        except job.JobError as error:
            print(error)
        print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "ray", "timm", "transformers", "tokenizers", "pyarrow", "numpy", "pandas"}))
    """)
    # The processor's time: the machine is shared
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "job.yaml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    *message, loaded = done.stdout.splitlines()
    assert len(message) == 2 and "resnet18" in message[0] and "did you mean seeds" in message[1]
    assert loaded == "[]"
    assert spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime < 2


# ---------------------------------------------------------------- the hash of a spec


def test_spec_hash_is_the_same_in_every_process_and_order():
    a = {"x": [1, 2.5, None, True, "é"], "y": {"b": 1, "a": 2}}
    b = {"y": {"a": 2, "b": 1}, "x": [1, 2.5, None, True, "é"]}
    assert job.spec_hash(a) == job.spec_hash(b) == "397808bf26f6"
    assert job.spec_hash(job.Train()) == job.spec_hash(job.Train().model_dump(mode="json"))
    code = (
        "from pipeline.config import schema as job; print(job.spec_hash(job.Train(steps=3), 'a'))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    there = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == job.spec_hash(job.Train(steps=3), "a")


def test_a_technique_that_is_not_named_is_no_part_of_a_source(load):
    """Hashes of jobs are those from before sources had techniques."""
    plain, named = load(), load(GOOD, "sources.garments.technique=lora")
    assert "technique" not in plain.model_dump(mode="json")["sources"]["garments"]
    assert job.spec_hash(plain) != job.spec_hash(named)


def test_spec_hash_sees_every_field():
    base = job.Train(steps=5)
    other = {
        "steps": 6,
        "global_batch": 3,
        "micro_batch": 1,
        "canonical_shards": 2,
        "optimizer": "sgd",
        "lr": 2e-3,
        "momentum": 0.5,
        "beta1": 0.5,
        "beta2": 0.5,
        "weight_decay": 0.1,
        "warmup": 0.2,
        "schedule": "constant",
        "changes": (job.Change(step=3, lr=0.1),),
        "clip_norm": None,
        "precision": "fp32",
        "compile": True,
        "channels_last": True,
        "ema": 0.9,
        "augment": False,
        "eval_every_steps": 3,
        "checkpoint_every_steps": 3,
        "checkpoint_every_minutes": 7.0,
        "log_every_steps": 3,
        "keep": "last",
        "patience": 2,
        "max_bad_steps": 1,
        "trace_rows": True,
        "batch_cost": 2.0,
    }
    hashes = {job.spec_hash(base.model_copy(update={name: value})) for name, value in other.items()}
    assert len(hashes) == len(other) and job.spec_hash(base) not in hashes
    assert set(job.Train.model_fields) - set(other) == {"epochs"}, (
        "a new field of train: give it another value here"
    )
    parts = {
        job.spec_hash("a", "b"),
        job.spec_hash("b", "a"),
        job.spec_hash("ab"),
        job.spec_hash(["a", "b"]),
    }
    parts |= {job.spec_hash("a"), job.spec_hash(1), job.spec_hash("1")}
    assert len(parts) == 7


def test_a_comment_or_the_order_of_keys_changes_no_hash(load):
    text = GOOD.replace(
        "name: vision\nstorage: runs", "# a comment\nstorage: runs\nname: vision   # another"
    )
    assert job.spec_hash(load(text)) == job.spec_hash(load())
    assert job.spec_hash(load(GOOD, "seed=1")) != job.spec_hash(load())


# ---------------------------------------------------------------- the schema for editors


@pytest.fixture(scope="module")
def schema():
    return yaml_loader.schema()


@pytest.fixture(scope="module")
def validator(schema):
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_is_a_json_schema(schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert "ComponentConfig" not in json.dumps(schema)


def properties(node, path=()):
    """(path, property's schema) of every property at every depth."""
    if isinstance(node, dict):
        for name, inner in (
            node.get("properties", {}).items() if isinstance(node.get("properties"), dict) else ()
        ):
            yield (*path, name), inner
        for key, inner in node.items():
            yield from properties(inner, (*path, key))
    elif isinstance(node, list):
        for inner in node:
            yield from properties(inner, path)


def test_every_field_at_every_depth_has_a_description(schema):
    names = {kind: set(registry.names(kind)) for kind in registry.FOLDERS}
    plugs = set().union(*names.values())
    seen = {path: inner for path, inner in properties(schema)}
    assert len(seen) > 80
    bare = [
        ".".join(path)
        for path, inner in seen.items()
        if not inner.get("description") and path[-1] not in plugs
    ]
    assert bare == []
    for field in (
        "probe_share",
        "mask_share",
        "hidden",
        "drop_path",
        "vocabulary",
        "label_smoothing",
    ):
        assert any(path[-1] == field for path in seen), (
            f"{field}: the options of the registered names are part of the schema"
        )


def test_the_schema_takes_what_load_takes(validator):
    import yaml

    good = yaml.safe_load(GOOD.replace("1e-3", "1.0e-3").replace("1e-2", "1.0e-2"))
    assert list(validator.iter_errors(good)) == []
    good["techniques"] = ["full", {"full": None}, {"lp_ft": {"probe_share": 0.2}}]
    good["sources"]["more"] = {"backbone": "bundle:folder"}
    good["sources"]["pooled"] = {"backbone": {"hf:folder": {"pool": "pooler"}}}
    assert list(validator.iter_errors(good)) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"nam": "x"},
        {"techniques": ["fulll"]},
        {"techniques": [{"lp_ft": {"probe_shar": 0.1}}]},
        {"techniques": [{"lp_ftt": {}}]},
        {"fanout": {"sed": 1}},
        {"fanout": {"search": {"optimizer": [1, 2]}}},
        {"fanout": {"select": {"scor": "knn"}}},
        {"sources": {"s": {"backbone": "resnet18"}}},
        {"sources": {"s": {"backbone": "tim/resnet18"}}},
        {"sources": {"s": {"backbone": {"tim/resnet18": {}}}}},
        {"sources": {"s": {"backbone": {"hf:folder": {"pol": "x"}}}}},
        {"sources": {"s": {"backbone": {"timm/resnet18": {"x": 1}}}}},
        {"sources": {"s": {"backbone": "timm/resnet18", "objective": "clasification"}}},
        {
            "targets": {
                "t": {"objective": "classification", "data": {"uri": "a", "modality": "imgae"}}
            }
        },
        {
            "targets": {
                "t": {
                    "objective": "classification",
                    "data": {"uri": "a", "modality": "image", "colums": {}},
                }
            }
        },
        {
            "targets": {
                "t": {
                    "objective": "classification",
                    "data": {"uri": "a", "modality": "image"},
                    "train": {"learning_rate": 1},
                }
            }
        },
    ],
    ids=str,
)
def test_the_schema_refuses_what_load_refuses(validator, setting):
    import yaml

    good = yaml.safe_load(GOOD.replace("1e-3", "1.0e-3").replace("1e-2", "1.0e-2"))
    assert list(validator.iter_errors({**good, **setting}))
