"""Baselines: models without a network, on the rows of a target.

Each equals scikit-learn called on the same arrays; their results stand beside those of techniques.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from contract_rows import OBJECTIVES, recordings, windows
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as RidgeRegression
from sklearn.metrics import accuracy_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from toys import (
    event_rows,
    image_files,
    image_rows,
    job_of,
    label_state,
    result_rows,
    rows_of,
    sentences,
    shared_of,
    table_rows,
    take,
    text_modality,
    trial_of,
)
from written_reports import report_texts

from pipeline.config import plugins, registry
from pipeline.config.schema import ComponentConfig, Job, Target, schema
from pipeline.core.contracts import BaselineRows
from pipeline.core.metrics import catalog
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.media import spectrogram
from pipeline.report import matrix, stats, terminal
from pipeline.transfer import baseline_trials, comparison_columns, fanout, grid, trial
from pipeline.transfer.baseline_trials import SplitRows

SPECTRA = Path(__file__).parents[1] / "plugin" / "spectra"


def baseline(name: str, **options):
    kind = registry.get("baseline", name)
    return kind(kind.options_class(**options))


def inputs_of(name: str, rows, **options):
    """Inputs of decoded rows, as the baseline makes them."""
    arrays = {k: v for k, v in rows.arrays.items() if k != "label"}
    return baseline(name, **options).inputs(
        BaselineRows(len(rows), arrays, rows.modality, lambda role: None)
    )


def head(objective: str = "classification", state=None, **options):
    """An objective without a backbone, of which only the predictions are used."""
    kind = registry.get("objective", objective)
    backbone = type("Pooled", (), {"pooled_dim": 1})()
    return kind(backbone, kind.options_class(**options), state or label_state())


def part(inputs, labels, first: int = 0) -> SplitRows:
    return SplitRows(np.arange(first, first + len(labels)), inputs, np.asarray(labels), ())


@pytest.fixture(scope="module")
def image_job(tmp_path_factory):
    """A job with all baselines on images, and what its trials read."""
    folder = tmp_path_factory.mktemp("baselines")
    paths = image_files(folder / "data", {"train": 48, "validation": 24, "test": 30})
    job = job_of(folder, paths).model_copy(update={"baselines": "auto"})
    return job, shared_of(folder, job, paths)


def baseline_trial(job, shared, name: str, fraction: float | int = 1.0, seed: int = 0):
    group = next(iter(shared.backbone_groups.values()))
    found = grid.baseline_trials(job, "task", group, "data key")
    return next(
        one
        for one in found
        if (one.technique.name, one.label_fraction, one.seed) == (name, fraction, seed)
    )


# ---------------------------------------------------------------- equal to scikit-learn


def test_majority_is_the_share_of_each_class():
    labels = [0, 0, 0, 1, 1, 2]
    scores = baseline_trials.fit(
        baseline("majority"), {}, 0, "classes", np.zeros((6, 1)), np.array(labels), 3
    )
    found = torch.from_numpy(scores(np.zeros((2, 1)))).softmax(1)
    torch.testing.assert_close(found, torch.tensor([[3 / 6, 2 / 6, 1 / 6]] * 2))


def test_majority_of_label_sets_is_the_share_of_each_label():
    labels = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 1, 0]], dtype=np.uint8)
    scores = baseline_trials.fit(
        baseline("majority"), {}, 0, "label_sets", np.zeros((4, 1)), labels, 0
    )
    found = torch.from_numpy(scores(np.zeros((2, 1)))).sigmoid()
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.75, 1e-6]] * 2), rtol=1e-4, atol=1e-7)


def test_a_class_without_a_labelled_row_has_the_least_probability():
    inputs, labels = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([0, 0, 2, 2])
    scores = baseline_trials.fit(
        baseline("log_mel_statistics"), {"C": 1.0}, 0, "classes", inputs, labels, 3
    )
    model = LogisticRegression(C=1.0, max_iter=1000).fit(inputs, labels)
    np.testing.assert_allclose(
        np.exp(scores(inputs))[:, [0, 2]], model.predict_proba(inputs), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.exp(scores(inputs))[:, 1], baseline_trials.MIN_PROBABILITY, rtol=1e-5
    )


def test_bag_of_words_is_tf_idf_and_logistic_regression():
    texts, labels = sentences(60)
    new, of_new = sentences(30, seed=1)
    one = baseline("bag_of_words", penalties=[3.0])
    chosen = baseline_trials.choose(
        one, head(), part(texts, labels), part(new, of_new, 60), ("accuracy", "loss"), 0
    )
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    model = LogisticRegression(C=3.0, max_iter=1000).fit(words.fit_transform(texts), labels)
    expected = model.predict_proba(words.transform(new))
    np.testing.assert_allclose(np.exp(chosen.scores(new)), expected, rtol=1e-5)
    assert chosen.metrics["accuracy"] == accuracy_score(of_new, expected.argmax(1))


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.list_(pa.binary())], ids=str)
def test_texts_of_a_pair_are_one_text(kind):
    """Also where they are stored as bytes, or as lists of words."""
    texts, others = ["eins \u00fcber", "two"], ["a", None]
    if pa.types.is_list(kind):
        texts, others = ([one and one.split() for one in texts] for texts in (texts, others))
    columns = {"text": pa.array(texts, kind), "text_pair": pa.array(others, kind)}
    rows = BaselineRows(2, {}, text_modality(), columns.get)
    assert baseline("bag_of_words").inputs(rows) == ["eins \u00fcber a", "two"]


def test_nearest_pixels_are_those_of_the_images():
    rows, others = image_rows(48), image_rows(20, seed=1)
    inputs, labels = inputs_of("nearest_pixels", rows), rows.arrays["label"]
    flat = rows.arrays["image"].reshape(48, -1) / np.float32(255)
    np.testing.assert_array_equal(inputs, flat)
    scores = baseline_trials.fit(
        baseline("nearest_pixels"), {"neighbours": 5}, 0, "classes", inputs, labels, 3
    )
    model = KNeighborsClassifier(5).fit(flat, labels)
    expected = model.predict_proba(others.arrays["image"].reshape(20, -1) / np.float32(255))
    found = np.exp(scores(inputs_of("nearest_pixels", others)))
    np.testing.assert_allclose(found, expected.clip(1e-6, 1 - 1e-6), rtol=1e-5)
    few = baseline("nearest_pixels").estimator({"neighbours": 20}, 0, "classes")
    assert few.fit(inputs[:3], labels[:3]).predict_proba(inputs).shape[0] == 48


def test_large_images_are_averaged():
    rows = image_rows(4, size=8)
    pixels = rows.arrays["image"].astype(np.float32) / 255
    expected = pixels.reshape(4, 1, 4, 2, 4, 2).mean((3, 5)).reshape(4, -1)
    np.testing.assert_allclose(inputs_of("nearest_pixels", rows, size=4), expected, rtol=1e-5)


def test_log_mel_statistics_are_means_and_deviations_of_bands():
    sample = recordings()()
    modality = sample.fitted("torchaudio/conformer")
    arrays, bad = modality.decode(sample.table, sample.columns)
    assert not any(bad)
    found = inputs_of("log_mel_statistics", rows_of(modality, arrays), mels=20)
    rate = modality.options.rate
    sound = torch.from_numpy(arrays["audio"][1]).float()[None] / 32768
    mel = spectrogram.log_mel(sound, rate, round(0.025 * rate), round(0.01 * rate), 20)[0].numpy()
    np.testing.assert_allclose(found[1], [*mel.mean(0), *mel.std(0)], rtol=1e-4, atol=1e-5)
    one = baseline("log_mel_statistics")
    assert isinstance(one.transformer(), StandardScaler)


def test_discriminants_need_several_rows_of_an_identity():
    rows = np.random.default_rng(0).normal(size=(24, 4))
    setting, one = {"discriminants": 1.0}, baseline("log_mel_cosine")
    for identities in (np.arange(6), np.arange(6) // 2):
        few = baseline_trials.fit(one, setting, 0, "identities", rows[:6], identities, 0)
        np.testing.assert_array_equal(few(rows), rows.astype(np.float32))
    identities = np.arange(24) % 3
    found = baseline_trials.fit(one, setting, 0, "identities", rows, identities, 0)(rows)
    model = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto")
    np.testing.assert_allclose(found, model.fit(rows, identities).transform(rows), rtol=1e-5)


def test_boosted_trees_read_the_facts_of_a_table():
    rows = table_rows(40)
    inputs = inputs_of("boosted_trees", rows)
    sizes = rows.modality.inputs()
    assert inputs.shape == (40, sizes["numbers"] + sizes["codes"])
    unknown = ~rows.arrays["numbers_known"]
    assert unknown.any() and np.array_equal(np.isnan(inputs[:, : sizes["numbers"]]), unknown)
    for row, codes in enumerate(rows.arrays["codes"]):
        there = np.flatnonzero(inputs[row, sizes["numbers"] :]) + 1
        assert there.tolist() == codes.tolist()


def test_boosted_trees_summarise_events():
    rows = event_rows(30)
    inputs, sizes = inputs_of("boosted_trees", rows), rows.modality.inputs()
    facts = sizes["numbers"] + sizes["codes"]
    tables = inputs[:, facts:].reshape(30, 5, sizes["variables"])
    for row, variable in ((0, 0), (3, 2), (7, 4)):
        values = rows.arrays["values"][row][rows.arrays["variables"][row] == variable]
        expected = [len(values), values[-1], values.mean(), values.min(), values.max()]
        np.testing.assert_allclose(tables[row, :, variable], expected, rtol=1e-5, atol=1e-6)
    assert (tables[1, 0] == 0).all() and np.isnan(tables[1, 1:]).all(), "a stay without events"
    labels = rows.arrays["label"]
    one, setting = baseline("boosted_trees", trees=5), {"depth": 2, "leaf_rows": 5}
    scores = baseline_trials.fit(one, setting, 7, "classes", inputs, labels, 2)
    model = HistGradientBoostingClassifier(
        max_iter=5, max_depth=2, min_samples_leaf=5, random_state=7
    ).fit(inputs, labels)
    np.testing.assert_allclose(np.exp(scores(inputs)), model.predict_proba(inputs), rtol=1e-5)


def test_boosted_trees_summarise_the_channels_of_series():
    """They are standardised, as all that reads them."""
    sample = windows()
    modality = sample.fitted("hf/patchtst")
    scales = zip(modality.state["mean"], modality.state["std"], strict=True)
    scales = dict(zip(modality.state["names"], scales, strict=True))
    rows = rows_of(modality, modality.decode(sample.table, sample.columns)[0])
    inputs = inputs_of("boosted_trees", rows).reshape(len(sample.table), 3, 7)
    for found, row in zip(inputs, sample.table["signal"].to_pylist(), strict=True):
        for channel, name in enumerate(("heart", "pressure", "slope")):
            mean, std = scales[name]
            values = (pd.Series(row[name], dtype=float)[-modality.options.length :] - mean) / std
            known = values.dropna()
            expected = [len(known) / max(1, len(values))]
            if len(known):
                change = known.diff().abs().mean()
                expected += [known.iloc[-1], known.mean(), known.std(ddof=0)]
                expected += [known.min(), known.max(), change]
            else:
                expected += [np.nan] * 6
            np.testing.assert_allclose(found[channel], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cut", "steps"), [("first", [0, 1, 2]), ("middle", [2, 3, 4]), ("last", [4, 5, 6])]
)
def test_boosted_trees_read_the_steps_that_the_network_reads(cut, steps):
    table = pa.table({"signal": [[9.0, 8.0, 7.0, 5.0, 4.0, 2.0, 1.0], [3.0, 6.0]]})
    kind, columns = registry.get("modality", "series"), {"series": "signal"}
    options = kind.options_class(length=3, cut=cut)
    modality = kind(options, kind.fit(options, table, columns, {}))
    arrays = modality.decode(table, columns)[0]
    found = inputs_of("boosted_trees", rows_of(modality, arrays))
    (mean,), (std,) = modality.state["mean"], modality.state["std"]
    row = (np.array(table["signal"][0].as_py())[steps] - mean) / std
    np.testing.assert_allclose(found[0, 1:3], [row[-1], row.mean()], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[0, 4:6], [row.min(), row.max()], rtol=1e-5)
    np.testing.assert_allclose(found[1, :2], [1, (6 - mean) / std], rtol=1e-5)  # read whole


def test_boosted_trees_leave_out_what_no_labelled_row_has():
    """scikit-learn refuses a column without any value; here the new rows alone have some."""
    rng = np.random.default_rng(0)
    inputs, labels = rng.normal(size=(60, 3)).astype(np.float32), np.arange(60) % 2
    new = rng.normal(size=(20, 3)).astype(np.float32)
    inputs[:, 1] = np.nan
    one = baseline("boosted_trees", trees=3, depths=[2], leaf_rows=[5])
    validation = part(new, np.arange(20) % 2, 60)
    found = baseline_trials.choose(one, head(), part(inputs, labels), validation, ("accuracy",), 0)
    model = HistGradientBoostingClassifier(
        max_iter=3, max_depth=2, min_samples_leaf=5, random_state=0
    ).fit(inputs[:, [0, 2]], labels)
    expected = model.predict_proba(new[:, [0, 2]])
    np.testing.assert_allclose(np.exp(found.scores(new))[:, :2], expected, rtol=1e-5)


def test_texts_without_a_word_have_the_shares_of_the_classes():
    one = baseline("bag_of_words", penalties=[1.0])
    train = part(["!!", "??", "..", "--"], [0, 0, 0, 1])
    validation = part(["a word", "?"], [0, 1], 4)
    found = baseline_trials.choose(one, head(), train, validation, ("accuracy",), 0)
    shares = np.exp(found.scores(["new", "!"]))
    np.testing.assert_allclose(shares[:, :2], [[0.75, 0.25]] * 2, atol=1e-3)


def test_words_that_too_few_rows_have_are_no_words():
    """With few labels no word may be in as many rows as are asked for."""
    rows, new = ["good film", "bad play"], ["good play"]
    one = baseline("bag_of_words", min_rows=2)
    assert one.transformer().fit(rows).transform(new).tolist() == [[0.0]]
    assert one.transformer().fit([*rows, "good play"]).transform(new).shape == (1, 2)


def test_each_label_of_a_label_set_is_a_sign_of_life(monkeypatch):
    """A fit of many labels is not taken for a process that hangs."""
    beats = []
    monkeypatch.setattr(baseline_trials.heartbeat, "beat", lambda: beats.append(1))
    labels = np.eye(4, dtype=np.uint8)[np.arange(12) % 4]
    baseline_trials.fit(baseline("majority"), {}, 0, "label_sets", np.zeros((12, 1)), labels, 0)
    assert len(beats) == 4


def test_boosted_trees_are_fitted_on_all_of_many_rows():
    """Where scikit-learn would hold out rows by itself, and refuse a class of a single row."""
    inputs, labels = np.arange(10_002.0)[:, None] / 10_002, np.arange(10_002) % 2
    labels[-1] = 2
    one = baseline("boosted_trees", trees=2)
    scores = baseline_trials.fit(one, {"depth": 2, "leaf_rows": 1}, 0, "classes", inputs, labels, 3)
    model = HistGradientBoostingClassifier(
        max_iter=2, max_depth=2, min_samples_leaf=1, early_stopping=False, random_state=0
    ).fit(inputs, labels)
    expected = model.predict_proba(inputs).clip(1e-6, 1 - 1e-6)
    np.testing.assert_allclose(np.exp(scores(inputs)), expected, rtol=1e-5)


# ---------------------------------------------------------------- classes of positions


def positions_of(objective: str):
    """Rows of which each position has a class: their objective, and how a baseline reads them."""
    built = OBJECTIVES[objective].build(objective)
    column = built.sample.columns.get
    reader = {"text": built.sample.table[column("text")]}.get if column("text") else lambda _: None
    return built, reader


@pytest.mark.parametrize("objective", ["tagging", "hourly"])
def test_majority_of_positions_is_the_share_of_each_class(objective):
    built, _ = positions_of(objective)
    known = built.task.objective
    train = baseline_trials.read(built.rows, baseline("majority"), known)
    assert len(train.inputs) == (train.labels >= 0).sum() > len(built.rows)
    found = baseline_trials.choose(baseline("majority"), known, train, train, ("loss",), 0)
    labels = train.labels[train.labels >= 0]
    shares = np.bincount(labels, minlength=len(known.state["labels"])) / len(labels)
    shares = shares.clip(baseline_trials.MIN_PROBABILITY, 1)
    assert found.metrics["loss"] == pytest.approx(-np.log(shares)[labels].mean(), rel=1e-4)


@pytest.mark.parametrize("objective", ["tagging", "hourly"])
def test_positions_are_judged_as_those_of_a_network(objective):
    """The scores of a network, given as those of a baseline, have the same predictions."""
    built, _ = positions_of(objective)
    known, kind = built.task.objective.eval(), registry.get("objective", objective)
    batch = take(built.rows, np.arange(len(built.rows)))
    built.task.eval()
    part_of = baseline_trials.read(built.rows, baseline("majority"), known)
    with torch.no_grad():
        expected = known.predict(built.task.backbone, batch)
        if objective == "hourly":
            scores = expected["scores"][torch.from_numpy(part_of.labels >= 0)]
        else:
            of_tokens, _ = known.head_scores(built.task.backbone, batch)
            words = batch["words"].long()
            begins = (words >= 0).nonzero()
            by_word = of_tokens.new_zeros(*part_of.labels.shape, of_tokens.shape[-1])
            by_word[begins[:, 0], words[words >= 0]] = of_tokens[begins[:, 0], begins[:, 1]]
            scores = by_word[torch.from_numpy(part_of.labels >= 0)]
    found = baseline_trials.predict(known, scores.numpy(), part_of)
    assert kind.label_kind == "position_classes"
    for name in set(found) - {"row"}:
        np.testing.assert_allclose(found[name], expected[name].numpy(), rtol=1e-5, atol=1e-6)
    assert set(expected) - set(found) <= {"times"}


def test_a_word_has_the_tags_that_it_had():
    built, reader = positions_of("tagging")
    known = built.task.objective
    one = baseline("tag_of_word")
    tags = built.rows.arrays["tags"]
    rows = BaselineRows(int((tags >= 0).sum()), {}, built.rows.modality, reader, tags >= 0)
    words = one.inputs(rows)
    texts = built.sample.table[built.sample.columns["text"]].to_pylist()
    assert words == [word for row in texts for word in row]
    scores = baseline_trials.fit(
        one, {}, 0, "position_classes", ["a", "a", "a", "b", "c"], np.array([0, 0, 2, 1, 1]), 3
    )
    expected = [[2 / 3, 0, 1 / 3], [0, 1, 0], [0, 1, 0]]
    np.testing.assert_allclose(np.exp(scores(["a", "b", "new"])), expected, atol=2e-6)
    assert scores([]).shape == (0, 3), "a part of the rows may have no labelled word"
    train = SplitRows(np.arange(len(tags)), words, tags, ())
    chosen = baseline_trials.choose(one, known, train, train, ("word_accuracy",), 0)
    by_word: dict[str, list[int]] = {}
    for word, tag in zip(words, tags[tags >= 0].tolist(), strict=True):
        by_word.setdefault(word, []).append(tag)
    right = sum(max(map(found.count, found)) for found in by_word.values())
    assert chosen.metrics["word_accuracy"] == pytest.approx(right / len(words))


def test_numbers_are_predicted_by_their_mean_and_by_a_plugin():
    plugins.use([str(SPECTRA)])
    try:
        brightness = head("brightness", {"mean": 2.0, "std": 2.0})
        spectra = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
        values = np.linspace(0, 5, 20, dtype=np.float32)
        train, validation = part(spectra, values), part(spectra[:6], values[:6], 20)
        found = baseline_trials.choose(
            baseline("majority"), brightness, train, validation, ("brightness_error",), 0
        )
        np.testing.assert_allclose(found.scores(spectra)[:, 0], values.mean(), rtol=1e-6)
        rmse = np.sqrt(((values[:6] - values.mean()) ** 2).mean())
        assert found.metrics["brightness_error"] == pytest.approx(rmse, rel=1e-5)
        tree = baseline("brightest_band")
        rows = BaselineRows(20, {"spectrum": spectra}, None, lambda role: None)
        bands = part(tree.inputs(rows), values)
        found = baseline_trials.choose(tree, brightness, bands, bands, ("brightness_error",), 0)
        assert found.metrics["brightness_error"] == pytest.approx(0.0, abs=1e-6), (
            "a leaf for each row"
        )
    finally:
        plugins.use([])


@pytest.mark.parametrize(
    ("name", "setting", "theirs"),
    [
        ("ridge", {"alpha": 3.0}, RidgeRegression(alpha=3.0)),
        ("bag_of_words", {"C": 4.0}, RidgeRegression(alpha=1 / 8)),
        ("log_mel_statistics", {"C": 4.0}, RidgeRegression(alpha=1 / 8)),
        ("nearest_pixels", {"neighbours": 3}, KNeighborsRegressor(3)),
        ("nearest_pixels", {"neighbours": 90}, KNeighborsRegressor(40)),
        ("boosted_trees", {"depth": 2, "leaf_rows": 5}, None),
    ],
)
def test_numbers_are_those_of_scikit_learn(name, setting, theirs):
    """Where logistic regression has C, ridge regression of the same cost has alpha = 1 / (2 C)."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 5)).astype(np.float32)
    labels = (inputs[:, 0] + 0.1 * rng.normal(size=40)).astype(np.float32)
    theirs = theirs or HistGradientBoostingRegressor(
        max_iter=100, max_depth=2, min_samples_leaf=5, early_stopping=False, random_state=0
    )
    scores = baseline_trials.fit(baseline(name), setting, 0, "numbers", inputs, labels, 0)
    expected = theirs.fit(inputs, labels).predict(inputs)
    np.testing.assert_allclose(scores(inputs)[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_ridge_reads_numbers_texts_and_what_is_missing():
    """Age is missing in every fourth row; texts are the gender and the codes."""
    rows = table_rows(8)
    found = inputs_of("ridge", rows)
    sizes = rows.modality.inputs()
    assert found.shape == (8, 2 * sizes["numbers"] + sizes["codes"])
    known = rows.arrays["numbers_known"]
    np.testing.assert_array_equal(found[:, 0], np.where(known, rows.arrays["numbers"], 0)[:, 0])
    np.testing.assert_array_equal(found[:, sizes["numbers"]], ~known[:, 0])
    texts = found[:, 2 * sizes["numbers"] :]
    assert texts.sum(1).tolist() == [len(one) for one in rows.arrays["codes"]]
    for row, places in enumerate(rows.arrays["codes"]):
        assert (texts[row, places - 1] == 1).all()


# ---------------------------------------------------------------- a trial


def test_the_setting_is_chosen_on_validation_rows():
    inputs = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0], [5.4]])
    labels = np.array([0, 0, 0, 1, 1, 1, 1])
    near = part(np.array([[5.4], [5.5]]), [0, 0], 7)
    one = baseline("nearest_pixels", neighbours=[1, 3])
    chosen = baseline_trials.choose(
        one, head(state=label_state(2)), part(inputs, labels), near, ("accuracy", "loss"), 0
    )
    assert chosen.setting == {"neighbours": 3} and chosen.metrics["accuracy"] == 1.0


@pytest.mark.parametrize("name", ["majority", "nearest_pixels"])
def test_a_trial_writes_the_results_of_any_other(image_job, name):
    job, shared = image_job
    one = baseline_trial(job, shared, name, seed=1)
    record = baseline_trials.run(one, shared)
    other = trial.run(trial_of(job, shared, "full", seed=1), shared)
    assert trial.read_record(shared.root, one.folder).validation == record.validation
    ours, theirs = ([(r.split, r.metric, r.n_eval) for r in it.rows] for it in (record, other))
    assert ours == theirs
    found = trial.read_predictions(shared.root, one.folder, 1)
    network = trial.read_predictions(shared.root, other.rows[0].folder, 1)
    assert np.array_equal(found.rows, network.rows)
    assert found.predictions.keys() == network.predictions.keys()
    row = next(r for r in record.rows if r.split == "test" and r.metric == "accuracy")
    label, scores = found.predictions["label"], found.predictions["scores"]
    assert row.value == accuracy_score(label, scores.argmax(1))
    assert row.value_low <= row.value <= row.value_high and row.n_units == 30
    assert (row.source, row.backbone, row.technique, row.bundle_uri) == ("none", "none", name, None)
    settings = {} if name == "majority" else {"neighbours": 1}
    assert json.loads(row.hyper_parameters).keys() == settings.keys()
    assert "scikit-learn" in record.made_by["code"] and f"baseline {name}" in record.made_by["code"]


def test_a_baseline_has_the_labelled_rows_of_the_trials(image_job, monkeypatch):
    job, shared = image_job
    job = job.model_copy(
        update={
            "targets": {"task": job.targets["task"].model_copy(update={"label_fractions": [2]})}
        }
    )
    read, seen = baseline_trials.read, []
    monkeypatch.setattr(
        baseline_trials, "read", lambda *given: seen.append(read(*given)) or seen[-1]
    )
    for seed in (0, 1):
        one = baseline_trial(job, shared, "nearest_pixels", 2, seed)
        baseline_trials.run(one, shared)
        twin = trial_of(job, shared, "full", fraction=2, seed=seed)
        _, rows, _ = trial.resolve_training(twin, shared)
        assert np.array_equal(seen[-3].ids, rows.selection.ids(np.arange(len(rows))))
    assert not np.array_equal(seen[0].ids, seen[3].ids), "another seed has other rows"


def test_no_label_of_a_test_row_is_read_before_it_is_scored(image_job):
    job, shared = image_job
    one = baseline_trial(job, shared, "nearest_pixels")
    key = next(iter(shared.targets))
    data = shared.targets[key]
    arrays = {**data.test.arrays, "label": np.roll(data.test.arrays["label"], 1)}
    moved = dataclasses.replace(data, test=dataclasses.replace(data.test, arrays=arrays))
    scores = []
    for given in (data, moved):
        baseline_trials.run(one, dataclasses.replace(shared, targets={key: given}))
        scores.append(trial.read_predictions(shared.root, one.folder, 0).predictions["scores"])
    assert np.array_equal(*scores)


def test_texts_are_read_from_the_files(tmp_path):
    paths = {}
    for seed, (split, n) in enumerate({"train": 30, "validation": 12, "test": 12}.items()):
        texts, labels = sentences(n, seed=seed)
        table = pa.table({"text": texts, "label": [f"class {k}" for k in labels]})
        paths[split] = str(tmp_path / f"{split}.parquet")
        pq.write_table(table, paths[split], row_group_size=8)
    modality = text_modality()
    spec = ModalitySpec("text", modality.options.model_dump(), modality.state)
    arch = Architecture(
        "transformers/bert", {"layers": 1, "hidden": 16, "heads": 2}, modality.inputs()
    )
    job = job_of(tmp_path, paths)
    data = job.targets["task"].data.model_copy(
        update={
            "modality": ComponentConfig(name="text"),
            "columns": {"text": "text", "label": "label"},
        }
    )
    target = job.targets["task"].model_copy(update={"data": data})
    job = job.model_copy(update={"targets": {"task": target}, "baselines": "auto"})
    shared = shared_of(tmp_path, job, paths, source=(arch, spec))
    record = baseline_trials.run(baseline_trial(job, shared, "bag_of_words"), shared)
    row = next(r for r in record.rows if r.split == "test" and r.metric == "accuracy")
    assert row.value > 0.8, "adjectives tell the class"


def test_a_failed_baseline_has_a_row(image_job):
    job, shared = image_job
    one = baseline_trial(job, shared, "majority", seed=2)
    record = trial.failed_record(one, shared, "no memory")
    assert record.failed and record.rows[0].technique == "majority"


# ---------------------------------------------------------------- a job


def test_auto_takes_what_can_read_the_rows():
    def names(modality: str, objective: str, columns: dict[str, str]) -> list[str]:
        target = Target.model_validate(
            {"data": {"uri": "x", "modality": modality, "columns": columns}, "objective": objective}
        )
        job = Job.model_validate(
            {"name": "j", "sources": {"s": {"backbone": "bundle:b"}}, "baselines": "auto"}
        )
        return sorted(one.name for one in grid.baselines(job, target))

    image = {"image": "i", "label": "l"}
    assert names("image", "classification", image) == ["majority", "nearest_pixels"]
    text = {"text": "t", "labels": "l"}
    assert names("text", "multilabel", text) == ["bag_of_words", "majority"]
    audio = {"audio": "a", "label": "l"}
    assert names("audio", "classification", audio) == ["log_mel_statistics", "majority"]
    table = {"features": "f", "label": "l"}
    assert names("table", "classification", table) == ["boosted_trees", "majority"]
    events = {"times": "t", "variables": "v", "values": "w", "label": "l"}
    assert names("events", "classification", events) == ["boosted_trees", "majority"]
    series = {"series": "signal", "label": "label"}
    assert names("series", "classification", series) == ["boosted_trees", "majority"]
    assert names("text", "mlm", {"text": "t"}) == [], "its rows have no labels"


def test_a_job_without_baselines_has_the_hash_that_it_had():
    job = {"name": "j", "sources": {"s": {"backbone": "bundle:b"}}}
    assert "baselines" not in Job.model_validate(job).model_dump()
    listed = Job.model_validate({**job, "baselines": ["majority", {"bag_of_words": {"words": 1}}]})
    assert [str(one) for one in listed.baselines] == ["majority", 'bag_of_words{"words": 1}']
    shown = json.dumps(schema()["properties"]["baselines"])
    assert all(f'"{name}"' in shown for name in ("auto", "majority", "neighbours"))


def test_units_of_baselines_are_single_and_need_no_ranks(image_job):
    job, shared = image_job
    target = job.targets["task"].model_copy(update={"workers": 2})
    key, data = next(iter(shared.targets.items()))
    shared = dataclasses.replace(shared, targets={key: dataclasses.replace(data, spec=target)})
    found = [baseline_trial(job, shared, "majority"), trial_of(job, shared, "full")]
    work = fanout.by_num_workers(fanout.group_into_work_items(found, shared), shared)
    assert [unit.first.technique.name for unit in work[0]] == ["majority"]
    assert [unit.first.technique.name for unit in work[2]] == ["full"]


# ---------------------------------------------------------------- gain over the best baseline


def run_of(accuracy: float, seed: int, n: int = 60) -> stats.RunPredictions:
    """Predictions of two classes of which about a share is right."""
    rng = np.random.default_rng([seed, int(1000 * accuracy)])
    label = np.arange(n) % 2
    right = rng.random(n) < accuracy
    scores = np.where((label == 1) == right, 1.0, -1.0)[:, None] * np.array([-1.0, 1.0])
    arrays = {"label": label, "scores": scores.astype(np.float32)}
    return stats.RunPredictions(np.arange(n), arrays, seed)


def rows_and_runs(entries: dict[tuple[str, str, str], tuple[float, float]]):
    """Results and predictions of three seeds of entries with a test and a validation accuracy."""
    rows, runs = [], {}
    for (source, technique, backbone), (tested, validated) in entries.items():
        for seed in range(3):
            run = run_of(tested, seed)
            for row in result_rows(source, technique, run, "accuracy"):
                row = dataclasses.replace(row, backbone=backbone, label_fraction="1.0")
                rows.append(row)
                rows.append(dataclasses.replace(row, split="validation", value=validated))
                runs[row.trial_id] = run
    return rows, runs


ENTRIES = {
    ("src", "full", "net"): (0.95, 0.9),
    ("none", "scratch", "net"): (0.6, 0.6),
    ("none", "majority", "none"): (0.9, 0.5),
    ("none", "bag_of_words", "none"): (0.8, 0.8),
}


def test_the_gain_over_the_best_baseline_is_paired_as_the_gain_over_scratch():
    rows, runs = rows_and_runs(ENTRIES)
    found = {entry.technique: entry for entry in matrix.matrix_entries(rows, runs)}
    full, trees = found["full"], found["bag_of_words"]
    assert full.best_baseline == "bag_of_words", "by validation, not by test"
    sides = [[run_of(share, seed) for seed in range(3)] for share in (0.95, 0.8)]
    expected = stats.compare(catalog.metric("accuracy"), *sides)
    assert (
        full.over_best_baseline.value,
        full.over_best_baseline.low,
        full.over_best_baseline.high,
    ) == (
        expected.value,
        expected.low,
        expected.high,
    )
    assert trees.verdict == matrix.BASELINE and trees.best_baseline == "" and not trees.transfers
    assert found["scratch"].over_best_baseline.value < 0 < full.gain
    assert full.gain_p_holm == full.over_scratch.p_value, (
        "one comparison: gains over baselines are none"
    )
    from rich.console import Console

    console = Console(width=100, record=True)
    console.print(terminal.table(list(found.values())))
    gain = re.escape(f"{full.over_best_baseline.value:+.2f}")
    assert re.search(rf" over +bag_of_words +{gain}", console.export_text())


def test_a_soup_is_compared_with_every_seed_in_the_results_as_in_the_report():
    rows, runs = rows_and_runs({**ENTRIES, ("src", "uniform_soup", "net"): (0.95, 0.9)})
    rows = [row for row in rows if row.technique != "uniform_soup" or row.seed == 0]
    rows = [
        dataclasses.replace(row, params_trained=0 if row.technique == "uniform_soup" else 9)
        for row in rows
    ]
    entries = matrix.matrix_entries(rows, runs)
    run_of_folder = {row.folder: runs[row.trial_id] for row in rows}

    def predictions(folder: str, seed: int) -> stats.RunPredictions:
        assert run_of_folder[folder].seed == seed
        return run_of_folder[folder]

    filled = comparison_columns.fill_comparison(rows, entries)
    filled = comparison_columns.fill_best_baseline(filled, entries, predictions)
    tested = [row for row in filled if row.is_tested]
    (soup,) = (row for row in tested if row.technique == "uniform_soup")
    entry = next(one for one in entries if one.technique == "uniform_soup")
    over = entry.over_best_baseline
    found = soup.best_baseline_gain, soup.best_baseline_low, soup.best_baseline_high
    assert found == (over.value, over.low, over.high)
    assert soup.baseline_gain == pytest.approx(entry.over_best_scratch.value)
    scratch = [row for row in tested if row.technique == "scratch"]
    trials = [SimpleNamespace(id=row.trial_id, folder=row.folder, seed=row.seed) for row in scratch]
    records = {row.trial_id: SimpleNamespace(rows=[row]) for row in scratch}
    assert comparison_columns.gain_over_scratch(predictions, soup, trials, records) == {
        "scratch_value": pytest.approx(np.mean([row.value for row in scratch])),
        "gain": entry.gain,
        "gain_low": entry.gain_low,
        "gain_high": entry.gain_high,
    }
    second = next(row for row in tested if row.technique == "full" and row.seed == 1)
    value = next(row.value for row in scratch if row.seed == 1)
    assert second.baseline_gain == pytest.approx(second.value - value), "by its own seed"
    diverged = [
        dataclasses.replace(row, value=math.nan)
        if row.split == "test" and row.technique == "scratch" and row.seed == 1
        else row
        for row in rows
    ]
    filled = comparison_columns.fill_comparison(diverged, matrix.matrix_entries(diverged, runs))
    soup, second = (
        next(row for row in filled if row.is_tested and (row.technique, row.seed) == wanted)
        for wanted in (("uniform_soup", 0), ("full", 1))
    )
    values = [row.value for row in scratch if row.seed != 1]
    assert soup.baseline_gain == pytest.approx(soup.value - np.mean(values))
    assert second.baseline_gain is None, "a diverged network is no reference"


def test_a_label_that_is_named_with_an_at_sign_has_a_gain_as_other_labels_have():
    rows, runs = rows_and_runs(ENTRIES)
    entries = matrix.matrix_entries(rows, runs)
    labels = [
        dataclasses.replace(row, metric=f"f1/{name}")
        for row in rows
        if row.is_tested
        for name in ("a@b", "plain")
    ]
    filled = comparison_columns.fill_comparison(labels, entries)
    gains = {
        name: [row.baseline_gain for row in filled if row.metric == f"f1/{name}"]
        for name in ("a@b", "plain")
    }
    assert gains["a@b"] == gains["plain"] and any(gains["plain"])


def test_a_baseline_without_a_validation_value_is_never_the_best():
    entries = {**ENTRIES, ("none", "majority", "none"): (0.9, float("nan"))}
    found = matrix.matrix_entries(*rows_and_runs(entries))
    assert {entry.best_baseline for entry in found if not entry.is_baseline} == {"bag_of_words"}


def test_one_seed_is_not_counted_as_better_than_a_baseline(tmp_path):
    """The interval alone excludes zero; one seed does not show the spread between seeds."""
    rows, runs = rows_and_runs(ENTRIES)
    rows = [row for row in rows if row.seed == 0]
    entries = matrix.matrix_entries(rows, runs)
    full = next(entry for entry in entries if entry.technique == "full")
    assert full.over_best_baseline.low is not None and full.over_best_baseline.low > 0
    assert full.over_best_baseline.verdict == matrix.SINGLE_SEED
    text, _ = report_texts(tmp_path, rows, runs)
    assert "0 of 2 networks are better than it, 0 are worse, 2 with one seed" in text


def test_baselines_of_which_none_has_a_validation_value_are_named(tmp_path):
    unknown = float("nan")
    entries = {
        key: (test, unknown if key[2] == "none" else validation)
        for key, (test, validation) in ENTRIES.items()
    }
    rows, runs = rows_and_runs(entries)
    text, _ = report_texts(tmp_path, rows, runs)
    assert "best of the baselines (bag_of_words, majority) is not known" in text


def test_the_report_of_one_network_has_no_table_of_several(tmp_path):
    rows, runs = rows_and_runs(ENTRIES)
    for text in report_texts(tmp_path, rows, runs):
        assert "gain over the best baseline" in text and "1 of 2 networks are better" in text
        assert "different scratch networks" not in text, "a baseline is no network"


def test_a_baseline_that_suits_no_target_is_refused():
    from pipeline.transfer import job_checks

    target = {
        "data": {"uri": "x", "modality": "image", "columns": {"image": "i", "label": "l"}},
        "objective": "classification",
    }
    job = Job.model_validate(
        {
            "name": "j",
            "sources": {"s": {"backbone": "bundle:b"}},
            "targets": {"t": target},
            "baselines": ["majority", "bag_of_words"],
        }
    )
    (problem,) = job_checks.baseline_problems(job)
    assert "bag_of_words" in problem and "leave it out" in problem
