"""Gradient-boosted trees on summary features of PhysioNet 2012: what a user would pick in the
place of a pretrained network for records.

    onetomany prepare physionet2012 /path/to/data/healthcare/physionet2012 -o records/physionet2012
    RECORDS=$PWD/records ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/trees.py --json trees.json     # 6 minutes on 2 cores; --quick: 20 s

scikit-learn's HistGradientBoostingClassifier with its defaults on, of each variable, mean, least,
greatest, first, last, number and deviation over 48 hours and over the last 24, beside age, sex,
height, weight and the kind of unit. Trained on the very stays that the trials of
jobs/healthcare/physionet2012_small.yaml are (target mortality, by its shares and seeds), ``and
validation`` on those and the validation stays, which trials choose their step by; tested on all of
set-b. The job's figures stand beside these in its header.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timing

JOB, TARGET = Path(__file__).parents[2] / "jobs/healthcare/physionet2012_small.yaml", "mortality"
STATISTICS = ("mean", "min", "max", "first", "last", "count", "std")


def subsets() -> dict[str, list[np.ndarray]]:
    """Record ids that the job's trials learn from: of each share those of every seed, alone and
    with the validation stays; all labels are one draw.
    """
    from pipeline.config import yaml_loader
    from pipeline.core.rng import mix
    from pipeline.data.manifests import read_columns
    from pipeline.data.stream import Rows
    from pipeline.transfer import grid, targets

    job = yaml_loader.load(str(JOB), [])
    stage = targets.plan_target(job, TARGET)
    spec, splits = stage.spec, stage.splits
    train, held = (
        read_columns(rows, ["entity", spec.data.columns["label"]])
        for rows in (splits.train, splits.validation)
    )
    names, labels = (
        train["entity"].to_numpy(),
        train[spec.data.columns["label"]].to_numpy().astype(np.int64),
    )
    out: dict[str, list[np.ndarray]] = {}
    for fraction in spec.label_fractions:
        # type: ignore[arg-type]  # which rows there are is all that is asked
        rows = Rows(splits.train, None)
        drawn = [
            grid.label_subset(rows, labels, fraction, mix(job.seed, seed))
            for seed in range(job.fanout.seeds if fraction < 1 else 1)
        ]
        out[f"{fraction:g}"] = [names[places] for places in drawn]
        out[f"{fraction:g} and validation"] = [
            np.concatenate([names[places], held["entity"].to_numpy()]) for places in drawn
        ]
    return out


def features(letter: str):
    """(4000, F) float64 with NaN where nothing was measured, and (4000,) in-hospital death."""
    import pandas as pd
    import pyarrow.parquet as pq

    folder = timing.data_folder() / "healthcare/physionet2012"
    records = pq.read_table(folder / f"records_{letter}.parquet").to_pandas().set_index("recordid")
    events = (
        pq.read_table(folder / f"events_{letter}.parquet")
        .to_pandas()
        .sort_values(["recordid", "minute"], kind="stable")
    )
    events["parameter"] = events["parameter"].astype(str)
    parts = [records[["Age", "Gender", "Height", "Weight", "ICUType"]]]
    for name, part in (("all", events), ("late", events[events["minute"] >= 24 * 60])):
        wide = part.groupby(["recordid", "parameter"])["value"].agg(list(STATISTICS)).unstack()
        wide.columns = [f"{name} {statistic} {parameter}" for statistic, parameter in wide.columns]
        parts.append(wide)
    table = pd.concat(parts, axis=1).reindex(records.index)
    return table.reindex(columns=sorted(table.columns)), np.asarray(records["In-hospital_death"])


def main() -> None:
    args = timing.options(__doc__, repeats=5)
    found = timing.describe(args)
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import average_precision_score, roc_auc_score

    (train, label), (test, truth) = features("a"), features("b")
    test = test.reindex(columns=train.columns)
    lines, results = [], {}
    drawn = subsets()
    for share in list(drawn)[:2] if args.quick else drawn:
        scores = []
        for seed, names in enumerate(drawn[share][: args.repeats]):
            rows = train.index.get_indexer(names)
            # scikit-learn cannot bin a column of nothing, or of one value
            kept = train.columns[train.iloc[rows].nunique() > 1]
            model = HistGradientBoostingClassifier(random_state=seed).fit(
                train.iloc[rows][kept], label[rows]
            )
            chance = model.predict_proba(test[kept])[:, 1]
            scores.append((roc_auc_score(truth, chance), average_precision_score(truth, chance)))
            print(
                f"    share {share}, {len(names)} stays, draw {seed + 1}: AUROC "
                f"{scores[-1][0]:.3f}, AUPRC {scores[-1][1]:.3f}",
                flush=True,
            )
        results[share] = scores
        spreads = [timing.Spread.of([score[i] for score in scores]) for i in range(2)]
        lines.append(
            [
                share,
                *(
                    f"{np.mean([score[i] for score in scores]):.3f} ({spreads[i].low:.3f} to "
                    f"{spreads[i].high:.3f})"
                    for i in range(2)
                ),
            ]
        )
    timing.table(
        "Gradient-boosted trees on set-b, mean (least to greatest) over draws",
        ["share of labels", "AUROC", "AUPRC"],
        lines,
    )
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
