"""Texts from the command line: corpora in, a results table of every kind of target, predictions and
a Hugging Face folder out.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toys import sentences

from pipeline.checkpoints import bundle
from tests.e2e.conftest import best_bundle, result_rows

JOB = Path(__file__).with_name("text.yaml")
NAMES = ("Ada", "Boole", "Curie", "Dirac")
TOWNS = ("London", "Paris", "Rome")


@pytest.fixture(scope="module")
def text_data(tmp_path_factory) -> Path:
    """Corpora and targets of made-up sentences: what runs, not what is learned, is looked at
    here.
    """
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    lines = sentences(300)[0]
    with gzip.open(folder / "corpus.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    with pa.CompressedOutputStream(str(folder / "corpus.jsonl.zst"), "zstd") as file:
        file.write(
            "\n".join(json.dumps({"text": line}) for line in sentences(120, seed=1)[0]).encode()
        )
    (folder / "stories.txt").write_text(
        "\n\n".join("\n".join(lines[i : i + 3]) for i in range(0, 240, 3))
    )
    split = np.array(["train"] * 60 + ["validation"] * 20 + ["test"] * 20)
    pairs = [(lines[i], lines[i + 3 if i % 2 else i + 1], int(i % 2)) for i in range(100)]
    pq.write_table(
        pa.table(
            {
                "one": [a for a, _, _ in pairs],
                "other": [b for _, b, _ in pairs],
                "same": [c for _, _, c in pairs],
                "split": split,
            }
        ),
        folder / "pairs.parquet",
    )
    who, where = rng.choice(NAMES, 100), rng.choice(TOWNS, 100)
    words = [[str(a), "went", "to", "old", str(b), "."] for a, b in zip(who, where, strict=True)]
    tags = [["B-person", "O", "O", "B-place", "I-place", "O"]] * 100
    pq.write_table(
        pa.table({"words": words, "tags": tags, "split": split}), folder / "entities.parquet"
    )
    contexts = [
        f"{' '.join(lines[i : i + 2])} In the end {a} went to {b}."
        for i, (a, b) in enumerate(zip(who, where, strict=True))
    ]
    answers = [[] if i % 5 == 0 else [str(b)] for i, b in enumerate(where)]
    pq.write_table(
        pa.table(
            {
                "question": [
                    "Who flew?" if i % 5 == 0 else f"Where did {a} go?" for i, a in enumerate(who)
                ],
                "context": contexts,
                "answers": pa.array(answers, pa.list_(pa.string())),
                "split": split,
                "starts": pa.array(
                    [[c.rindex(a[0])] if a else [] for c, a in zip(contexts, answers, strict=True)],
                    pa.list_(pa.int64()),
                ),
            }
        ),
        folder / "questions.parquet",
    )
    return folder


@pytest.fixture(scope="module")
def done(text_data, run_job) -> Path:
    """The folder of the job, run once."""
    return run_job(JOB, TEXT_DATA=text_data)[0]


pytestmark = pytest.mark.timeout(600)


def test_every_target_has_its_entries_and_metrics(done):
    tested = [row for row in result_rows(done) if row["split"] == "test"]
    assert all(row["status"] == "done" for row in result_rows(done))
    metrics = {
        name: {row["metric"] for row in tested if row["target"] == name}
        for name in ("pairs", "entities", "questions", "stories")
    }
    assert {"accuracy", "macro_f1", "loss"} <= metrics["pairs"]
    assert {"entity_f1", "entity_f1/person", "entity_f1/place"} <= metrics["entities"]
    assert {"answer_f1", "exact_match", "loss"} <= metrics["questions"]
    assert {"perplexity", "bits_per_byte", "loss"} <= metrics["stories"]
    entries = {(row["target"], row["technique"]) for row in tested}
    assert entries == {
        ("pairs", "scratch"),
        ("pairs", "linear_probe"),
        ("pairs", "lora"),
        ("entities", "scratch"),
        ("entities", "full"),
        ("entities", "lora"),
        ("questions", "scratch"),
        ("questions", "full"),
        ("stories", "scratch"),
        ("stories", "full"),
        ("stories", "lora"),
    }
    assert {
        row["n_eval"] for row in tested if row["target"] in ("pairs", "entities", "questions")
    } == {20}
    trained = {
        row["technique"]: row["params_trained"] for row in tested if row["target"] == "entities"
    }
    assert trained["lora"] < trained["full"] / 4


def test_perplexity_and_bits_per_byte_tell_the_same_loss(done):
    """A target's test rows hold a fixed number of bytes and predicted tokens: bits per byte over
    bits per token is their ratio, in every trial.
    """
    found = {}
    for row in result_rows(done):
        if row["target"] == "stories" and row["split"] == "test":
            found.setdefault(row["trial_id"], {})[row["metric"]] = row["value"]
    ratios = [one["bits_per_byte"] / (math.log2(one["perplexity"])) for one in found.values()]
    assert len(ratios) == 3 and max(ratios) - min(ratios) < 1e-5 and 0.1 < ratios[0] < 1
    assert all(one["loss"] == pytest.approx(math.log(one["perplexity"])) for one in found.values())


def test_the_report_tells_the_mixture_and_the_types(done):
    message = (done / "report.md").read_text()
    assert "person" in message and "place" in message and "0.7" in message


def predicted(uri: str, data: Path, command, where: Path, *words: str) -> pa.Table:
    ended = command("predict", uri, data, "-o", where / "out", *words, cwd=where)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return pq.read_table(where / "out" / "part-00000.parquet")


def test_entities_are_predicted_as_words_and_types(done, text_data, command, tmp_path):
    found = predicted(
        best_bundle(done, "entities", "lora"), text_data / "entities.parquet", command, tmp_path
    )
    assert len(found) == 100 and all(len(tags) == 6 for tags in found["tags"].to_pylist())
    assert {tag for tags in found["tags"].to_pylist() for tag in tags} <= {
        "O",
        "B-person",
        "I-person",
        "B-place",
        "I-place",
    }


def test_answers_stand_in_their_contexts(done, text_data, command, tmp_path):
    found = predicted(
        best_bundle(done, "questions", "full"), text_data / "questions.parquet", command, tmp_path
    )
    contexts = pq.read_table(text_data / "questions.parquet")["context"].to_pylist()
    given = [
        (row, context)
        for row, context in zip(found.to_pylist(), contexts, strict=True)
        if row["answer"]
    ]
    assert given, "some rows are answered"
    assert all(context[row["start"] : row["end"]] == row["answer"] for row, context in given)


def test_prompts_are_continued(done, command, tmp_path):
    (tmp_path / "prompts.txt").write_text("the old film was\na new play\n")
    found = predicted(
        best_bundle(done, "stories", "full"), tmp_path / "prompts.txt", command, tmp_path
    )
    texts = found["generated"].to_pylist()
    assert len(texts) == 2 and all(isinstance(text, str) for text in texts) and any(texts)


def test_a_language_model_leaves_as_a_folder_and_comes_back(done, command, tmp_path):
    """What transformers loads from the exported folder has the bundle's weights, adapters
    merged.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    uri = best_bundle(done, "stories", "lora")
    ended = command("export", uri, tmp_path / "hf", "--kind", "hugging-face", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, tensors = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        bundle.load(uri).backbone_tensors(),
    )
    for name, tensor in tensors.items():
        assert np.array_equal(
            model.state_dict()[f"transformer.{name.removeprefix('model.')}"].numpy(), tensor.numpy()
        ), name
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("the old film")["input_ids"]
