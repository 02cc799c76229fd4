"""Regression as a job has it, on a real table: the diabetes progression of 442 patients (Efron et
al. 2004), which scikit-learn ships.
"""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from toys import job_of, shared_of, trial_of

from pipeline.config.schema import ComponentConfig
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.media.static_features import TAILS
from pipeline.modalities.table import Table, TableOptions
from pipeline.transfer import baseline_trials, cached_heads, grid, scoring, trial

SIZES = {"train": 290, "validation": 52, "test": 100}


@pytest.fixture(scope="module")
def rows():
    """Split to (features, progression), by one shuffle."""
    data = load_diabetes(scaled=False)
    order = np.random.default_rng(0).permutation(len(data.target))
    parts = np.split(order, np.cumsum([*SIZES.values()])[:-1])
    pairs = [(data.data[part], data.target[part]) for part in parts]
    return dict(zip(SIZES, pairs, strict=True))


@pytest.fixture(scope="module")
def world(rows, tmp_path_factory):
    """A job of regression on the table, and what its trials read."""
    folder, names = tmp_path_factory.mktemp("regression"), load_diabetes().feature_names
    paths = {}
    for split, (inputs, target) in rows.items():
        struct = pa.StructArray.from_arrays([pa.array(column) for column in inputs.T], names)
        paths[split] = str(folder / f"{split}.parquet")
        pq.write_table(pa.table({"features": struct, "progression": target}), paths[split])
    columns = {"features": "features", "value": "progression"}
    options = TableOptions()
    train = pq.read_table(paths["train"])
    modality = Table(options, Table.fit(options, train, columns, "table/ft_transformer"))
    arch = Architecture("table/ft_transformer", {"width": 16, "layers": 1}, modality.inputs())
    job = job_of(folder, paths)
    target = job.targets["task"].model_copy(
        update={
            "data": job.targets["task"].data.model_copy(
                update={"modality": ComponentConfig(name="table"), "columns": columns}
            ),
            "objective": ComponentConfig(name="regression"),
            "label_fractions": [60, 1.0],
        }
    )
    job = job.model_copy(update={"targets": {"task": target}, "baselines": "auto"})
    spec = ModalitySpec("table", options.model_dump(), modality.state)
    return job, shared_of(folder, job, paths, source=(arch, spec))


def values(record, split: str = "test") -> dict[str, float]:
    return {row.metric: row.value for row in record.rows if row.split == split}


def baseline(world, name: str, fraction: float | int = 1.0):
    job, shared = world
    group = next(iter(shared.backbone_groups.values()))
    found = grid.baseline_trials(job, "task", group, "data key")
    one = next(
        one
        for one in found
        if (one.technique.name, one.label_fraction, one.seed) == (name, fraction, 0)
    )
    return baseline_trials.run(one, shared)


def expected(rows, predicted: np.ndarray) -> dict[str, float]:
    truth = rows["test"][1]
    return {
        "rmse": root_mean_squared_error(truth, predicted),
        "mae": mean_absolute_error(truth, predicted),
        "r2": r2_score(truth, predicted),
    }


def test_baselines_have_the_figures_of_scikit_learn_on_the_same_split(world, rows):
    """The mean, ridge regression of the standardised columns, and trees, of all training rows."""
    (inputs, target), (tests, _) = rows["train"], rows["test"]
    usual = inputs.clip(*np.quantile(inputs, TAILS, axis=0))  # as modality table standardises
    mean, deviation = usual.mean(0), usual.std(0)
    ridge, trees, middle = (
        baseline(world, name) for name in ("ridge", "boosted_trees", "majority")
    )
    alpha = json.loads(ridge.rows[0].hyper_parameters)["alpha"]
    theirs = Ridge(alpha=alpha).fit((inputs - mean) / deviation, target)
    found = values(ridge)
    assert found["r2"] > 0.3, "the table can be learned from"
    wanted = expected(rows, theirs.predict((tests - mean) / deviation))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    setting = json.loads(trees.rows[0].hyper_parameters)
    model = HistGradientBoostingRegressor(
        max_depth=setting["depth"], min_samples_leaf=setting["leaf_rows"], early_stopping=False
    )
    # on the very arrays: rounding decides between equal splits
    data = next(iter(world[1].targets.values()))
    model.fit(data.train.arrays["numbers"], data.train.arrays["value"])
    predicted = model.predict(data.test.arrays["numbers"])
    wanted = expected(rows, predicted * target.std() + target.mean())
    assert {name: values(trees)[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert values(middle)["rmse"] == pytest.approx(
        expected(rows, np.full(len(tests), target.mean()))["rmse"], rel=1e-5
    )
    assert np.isnan(values(middle)["spearman"]), "one prediction for all rows ranks none"


def test_a_probe_is_ridge_regression_of_the_features(world, rows):
    """The penalty is chosen on validation rows; what is written is in the unit of the column."""
    job, shared = world
    one = trial_of(job, shared, "linear_probe")
    (record,) = cached_heads.run([one], shared)
    assert json.loads(record.rows[0].hyper_parameters)["solver"] == "ridge"
    written = trial.read_predictions(shared.root, one.folder, 0)
    np.testing.assert_allclose(written.predictions["value"], rows["test"][1], rtol=1e-6)
    found, wanted = values(record), expected(rows, written.predictions["prediction"])
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
    assert found["rmse"] < values(baseline(world, "majority"))["rmse"]
    by_name = {row.metric: row for row in record.rows if row.split == "test"}
    assert next(iter(by_name)) == "rmse"
    assert not by_name["rmse"].higher_is_better and by_name["r2"].higher_is_better
    for row in by_name.values():
        assert row.value_low <= row.value <= row.value_high and row.n_units == 100


def test_a_whole_fraction_counts_rows_and_every_technique_of_the_loop_learns(world):
    job, shared = world
    few = trial.run(trial_of(job, shared, "full", fraction=60), shared)
    assert few.rows[0].n_train == 60
    scratch = trial.run(trial_of(job, shared, "scratch"), shared)
    assert np.isfinite([values(one)["rmse"] for one in (few, scratch)]).all()
    assert scratch.rows[0].n_train == SIZES["train"]


def test_scores_of_numbers_are_defined(world):
    _, shared = world
    key = next(iter(shared.backbone_groups))
    found = scoring.score_pair(scoring.SourceTargetPair("src", key, "task"), shared).scores
    defined = {name for name, one in found.items() if one.value is not None}
    assert {"logme", "cka"} <= defined
    assert found["leep"].value is None and "regression" in found["leep"].reason
