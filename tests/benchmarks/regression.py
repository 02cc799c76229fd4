"""Regression of a table as `onetomany init` writes it, beside scikit-learn on the same rows: the
progression of diabetes in 442 patients (Efron et al. 2004), which scikit-learn ships.

    .venv/bin/python tests/benchmarks/regression.py --json regression.json     # 3 minutes on 2 cores

The job pretrains on its own training rows, so its gain is that of training longer. scikit-learn's
Ridge (standardised columns, alpha 1) and HistGradientBoostingRegressor (defaults) are fitted on the
training rows of the job and tested on its test rows. The job's baselines choose their settings on
validation rows.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import timing

METRICS = ("rmse", "mae", "r2", "spearman")


def write_job(folder: Path, seeds: int) -> Path:
    """Write the table as CSV, convert it, and let `init` write the job; return its file."""
    from sklearn.datasets import load_diabetes

    import pipeline

    frame = load_diabetes(as_frame=True, scaled=False).frame
    frame = frame.rename(columns={"target": "progression"})
    frame.to_csv(folder / "diabetes.csv", index=False)
    job = folder / "diabetes.yaml"
    print("\n".join(pipeline.init(str(folder / "diabetes.csv"), str(job))), flush=True)
    pipeline.prepare_data(
        "table",
        str(folder / "diabetes.csv"),
        str(folder / "prepared/diabetes"),
        options=["label=progression"],
    )
    text = job.read_text(encoding="utf-8")
    job.write_text(text.replace("fanout: {seeds: 3}", f"fanout: {{seeds: {seeds}}}"))
    return job


def theirs(job: Path, storage: str) -> dict[str, dict[str, float]]:
    """Return the metrics of scikit-learn's models on the rows of the job's target."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from pipeline.config import yaml_loader
    from pipeline.core.metrics.catalog import metric
    from pipeline.data.manifests import read_columns
    from pipeline.transfer import targets

    stage = targets.plan_target(yaml_loader.load(str(job), [f"storage={storage}"]), "progression")
    parts = {}
    for name, rows in stage.splits.by_name().items():
        table = read_columns(rows, ["features", "progression"])
        columns = table["features"].combine_chunks().flatten()
        inputs = np.stack([one.to_numpy(zero_copy_only=False) for one in columns], axis=1)
        parts[name] = (inputs.astype(np.float64), table["progression"].to_numpy())
    models = {
        "scikit-learn Ridge": make_pipeline(StandardScaler(), Ridge()),
        "scikit-learn HistGradientBoosting": HistGradientBoostingRegressor(random_state=0),
    }
    (tests, truth), out = parts["test"], {}
    for name, model in models.items():
        predicted = model.fit(*parts["train"]).predict(tests)
        found = {"prediction": predicted, "value": truth}
        out[name] = {one: metric(one).value(found) for one in METRICS}
    return out


def ours(job: Path, storage: str) -> dict[str, dict[str, float]]:
    """Run the job; return the means over seeds of the metrics of each network and baseline."""
    import pipeline

    pipeline.run(str(job), overrides=[f"storage={storage}"])
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in pipeline.results(os.path.join(storage, job.stem)).to_pylist():
        if row["split"] == "test" and row["trial_stage"] == "final" and row["status"] == "done":
            values[f"{row['source']} {row['technique']}"][row["metric"]].append(row["value"])
    return {
        name: {one: float(np.mean(found[one])) for one in METRICS} for name, found in values.items()
    }


def main() -> None:
    args = timing.options(__doc__, repeats=3)
    found = timing.describe(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = write_job(folder, args.repeats)
        results = {**ours(job, str(folder / "runs")), **theirs(job, str(folder / "runs"))}
    timing.table(
        "Progression of diabetes, test rows of the job",
        ["model", *METRICS],
        [[name, *(f"{one[metric]:.3f}" for metric in METRICS)] for name, one in results.items()],
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
