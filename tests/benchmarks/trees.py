"""(l) Gradient-boosted trees on summary features of PhysioNet 2012: what a user would pick in the place of a pretrained network for records.

    ONETOMANY_DATA=/path/to/data .venv/bin/python tests/benchmarks/trees.py --json trees.json     # about 6 minutes on 2 quiet cores; --quick: 20 s

scikit-learn's HistGradientBoostingClassifier with its defaults on, of each variable, mean, least, greatest, first, last, number and deviation over 48
hours and over the last 24, beside age, sex, height, weight and the kind of unit. Trained on a stratified share of set-a's labels (five draws), tested on
all of set-b: the shares and test rows of jobs/small/physionet2012.yaml, whose figures stand beside these in its header.
"""

from __future__ import annotations

import timing

SHARES = (0.02, 0.05, 0.1, 1.0)
STATISTICS = ("mean", "min", "max", "first", "last", "count", "std")


def features(letter: str):
    """(4000, F) float64 with NaN where nothing was measured, and (4000,) in-hospital death."""
    import numpy as np
    import pandas as pd
    import pyarrow.parquet as pq

    folder = timing.data_folder() / "healthcare/physionet2012"
    records = pq.read_table(folder / f"records_{letter}.parquet").to_pandas().set_index("recordid")
    events = pq.read_table(folder / f"events_{letter}.parquet").to_pandas().sort_values(["recordid", "minute"], kind="stable")
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
    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import average_precision_score, roc_auc_score
    from sklearn.model_selection import train_test_split

    (train, label), (test, truth) = features("a"), features("b")
    test = test.reindex(columns=train.columns)
    lines, results = [], {}
    for share in SHARES[:2] if args.quick else SHARES:
        scores = []
        for seed in range(1 if share == 1 else args.repeats):  # all rows are one draw
            rows = np.arange(len(train)) if share == 1 else train_test_split(np.arange(len(train)), train_size=share, stratify=label, random_state=seed)[0]
            kept = train.columns[train.iloc[rows].nunique() > 1]  # scikit-learn cannot bin a column of nothing, or of one value
            model = HistGradientBoostingClassifier(random_state=seed).fit(train.iloc[rows][kept], label[rows])
            chance = model.predict_proba(test[kept])[:, 1]
            scores.append((roc_auc_score(truth, chance), average_precision_score(truth, chance)))
            print(f"    share {share:g}, draw {seed + 1}: AUROC {scores[-1][0]:.3f}, AUPRC {scores[-1][1]:.3f}", flush=True)
        results[f"{share:g}"] = scores
        spreads = [timing.Spread.of([score[i] for score in scores]) for i in range(2)]
        lines.append([f"{share:g}", *(f"{np.mean([score[i] for score in scores]):.3f} ({spreads[i].low:.3f} to {spreads[i].high:.3f})" for i in range(2))])
    timing.table("Gradient-boosted trees on set-b, mean (least to greatest) over draws", ["share of labels", "AUROC", "AUPRC"], lines)
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
