"""Model cards in Hugging Face's form, from what a bundle and its job's results hold.

A card is a README.md: a YAML header that model hubs read, and what a person must know before using
the network. It names no row, no person and no place on a disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.checkpoints import bundle
from pipeline.checkpoints.bundle import Manifest
from pipeline.io import places, storage
from pipeline.report import results, trial_folder
from pipeline.report.results import ResultRow

FILE = "README.md"
TAG = "onetomany"
"""The first tag of every card."""
LICENCE, UNKNOWN_LICENCE = "Licence of the weights", "unknown"
BUNDLE_MANIFEST, GRAPH = "manifest.json", "graph.json"
OPENED_BY = (
    (BUNDLE_MANIFEST, "", "onetomany predict FOLDER new_rows.parquet -o predictions"),
    (
        "classifier.py",
        "python",
        "from classifier import load  # in this folder\n\n"
        'model = load(".")  # its inputs and outputs: see the first lines of classifier.py',
    ),
    (
        "modules.json",
        "python",
        "from sentence_transformers import SentenceTransformer\n\n"
        'vectors = SentenceTransformer("FOLDER").encode(["A text."])',
    ),
)
"""How to open a folder, by a file that is in it: name of the file, language, code. The first that
is there counts.
"""
MIN_ROWS = 20
"""Subgroups with fewer test rows are left out: one of few rows tells of single persons."""
LIBRARIES = {"timm": "timm", "transformers": "transformers", "hf": "transformers"}
"""Libraries of backbones to those that model hubs know."""
TASKS = {
    ("image", "classification"): "image-classification",
    ("image", "multilabel"): "image-classification",
    ("image", "detection"): "object-detection",
    ("image", "segmentation"): "image-segmentation",
    ("image", "instance_segmentation"): "image-segmentation",
    ("text", "classification"): "text-classification",
    ("text", "multilabel"): "text-classification",
    ("text", "tagging"): "token-classification",
    ("text", "qa"): "question-answering",
    ("text", "lm"): "text-generation",
    ("audio", "classification"): "audio-classification",
    ("audio", "multilabel"): "audio-classification",
    ("audio", "ctc"): "automatic-speech-recognition",
    ("table", "classification"): "tabular-classification",
    ("table", "regression"): "tabular-regression",
    ("series", "classification"): "tabular-classification",
    ("series", "regression"): "tabular-regression",
    ("trajectory", "behaviour_cloning"): "robotics",
}
"""Modality and objective to the task as hubs name it; others are ``feature-extraction``.
Hubs count series as tables; forecasting is their only task of its own.
"""
TAGS = {"series": "time-series"}
"""Modalities to what hubs call them, where that is another word."""


def model_card(
    uri: str, licence: str = UNKNOWN_LICENCE, files: Collection[str] = (BUNDLE_MANIFEST,)
) -> str:
    """Return the card of a bundle.

    Args:
        uri: The bundle; one of a trial lies in its job's folder, whose results the card takes.
        licence: Of the weights, as hubs name it: apache-2.0, cc-by-4.0, ...
        files: Names of the files beside the card, which tell how the network is opened.
    """
    manifest = bundle.read_manifest(uri)
    rows = rows_of_bundle(uri, manifest)
    final = rows[0] if rows else None
    name = f"{manifest.arch.name}, {_words(manifest.objective.name)}"
    if final is not None:
        technique = _words(final.technique.partition("{")[0])
        name = f"{final.target}: {manifest.arch.name}, {technique}"
    header = _header(manifest, rows, licence, name)
    sections = [
        f"# {name}",
        _introduction(manifest, final),
        *_metrics(manifest, rows),
        *_subgroups(rows),
        *_making(manifest, final),
        *_data(manifest, rows, licence),
        *_limits(manifest, rows),
        *_use(manifest, files),
    ]
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def rows_of_bundle(uri: str, manifest: Manifest) -> list[ResultRow]:
    """Return the results rows of the trial that left a bundle; [] for a source's bundle."""
    place = trial_folder.split_bundle(uri)
    if place is None:
        return []
    root, trial_id = place
    if trial_id != manifest.spec_hash or not storage.exists(storage.join(root, results.FILE)):
        return []
    rows = [row for row in results.read(root) if row.trial_id == trial_id and row.metric]
    return sorted(rows, key=lambda row: (row.split != "test", row.is_of_subgroup))


def _words(name: str) -> str:
    return name.replace("_", " ")


def task_of(manifest: Manifest) -> str:
    """Return the task of a bundle as hubs name it."""
    return TASKS.get((manifest.modality.name, manifest.objective.name), "feature-extraction")


def _header(manifest: Manifest, rows: Sequence[ResultRow], licence: str, name: str) -> str:
    """Return the YAML header, with the metrics on test rows as hubs list them."""
    library = manifest.arch.name.partition("/")[0]
    listed = [row for row in rows if row.split == "test" and _is_whole(row)]
    found = [
        EvalResult(
            task_type=task_of(manifest),
            dataset_type=row.target,
            dataset_name=row.target,
            dataset_split="test",
            metric_type=str(row.metric),
            metric_value=float(f"{row.value:.6g}"),
            metric_name=_with_interval(row),
        )
        for row in listed
        if row.value is not None
    ]
    modality = manifest.modality.name
    data = ModelCardData(
        license=licence,
        library_name=LIBRARIES.get(library, TAG),
        pipeline_tag=task_of(manifest),
        tags=[TAG, "transfer-learning", TAGS.get(modality, modality), manifest.objective.name],
        model_name=name if found else None,
        eval_results=found or None,
    )
    return data.to_yaml().strip()  # pyright: ignore[reportUnknownMemberType]


def _is_whole(row: ResultRow) -> bool:
    """Return whether a row is of all test rows, not of a subgroup or a single label."""
    return not (row.is_of_subgroup or row.is_of_label)


def _with_interval(row: ResultRow) -> str:
    interval = _interval(row)
    return f"{row.metric} (95 % interval {interval})" if interval else str(row.metric)


def _interval(row: ResultRow) -> str:
    return _range(row.value_low, row.value_high)


def _range(low: float | None, high: float | None, sign: str = "") -> str:
    return "" if low is None or high is None else f"{low:{sign}.4g} to {high:{sign}.4g}"


def _introduction(manifest: Manifest, row: ResultRow | None) -> str:
    task = f"{_words(manifest.objective.name)} of {manifest.modality.name} rows"
    if row is None and "trial" in manifest.training:
        return (
            f"A `{manifest.arch.name}` for {task}, fine-tuned with One to Many. The results of its "
            "job were not beside it when this card was written."
        )
    if row is None:
        return (
            f"A `{manifest.arch.name}` for {task}, a source to adapt to further tasks. It was made "
            "with One to Many."
        )
    origin = "from random weights" if row.source == "none" else f"from the source `{row.source}`"
    return (
        f"A `{manifest.arch.name}` for {task}, trained {origin} on the target `{row.target}` by "
        f"the technique `{row.technique}`. It was made with One to Many."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(one) for one in line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _metrics(manifest: Manifest, rows: Sequence[ResultRow]) -> list[str]:
    tested = [row for row in rows if _is_whole(row) and row.value is not None]
    if not tested:
        listed = [[name, f"{value:.4g}"] for name, value in sorted(manifest.metrics.items())]
        return ["## Metrics", _table(["on validation rows", "value"], listed)] if listed else []
    cells = [
        [
            str(row.metric),
            f"{row.value:.4g}",
            _interval(row) or "none",
            str(row.split),
            "" if row.n_eval is None else str(row.n_eval),
            _gain(row),
        ]
        for row in tested
    ]
    head = ["metric", "value", "95 % interval", "rows of", "rows", "gain over scratch"]
    notes = [row.interval for row in tested if row.interval]
    out = ["## Metrics", _table(head, cells)]
    if notes:
        out.append(f"Intervals of one training run (one seed): {notes[0]}.")
    return out


def _gain(row: ResultRow) -> str:
    if row.gain is None:
        return ""
    interval = _range(row.gain_low, row.gain_high, "+")
    return f"{row.gain:+.4g} ({interval})" if interval else f"{row.gain:+.4g}"


def _subgroups(rows: Sequence[ResultRow]) -> list[str]:
    found = [row for row in rows if row.is_of_subgroup and (row.n_eval or 0) >= MIN_ROWS]
    if not found:
        return []
    cells = [
        [str(row.metric), f"{row.value:.4g}", _interval(row), str(row.n_eval)]
        for row in found
        if row.value is not None
    ]
    few = f"Subgroups of fewer than {MIN_ROWS} test rows are not listed."
    return ["## Subgroups", _table(["metric", "value", "95 % interval", "rows"], cells), few]


def _making(manifest: Manifest, row: ResultRow | None) -> list[str]:
    """Return how the network was made, and what it cost."""
    facts: dict[str, object] = {
        "backbone": manifest.arch.name,
        "objective": manifest.objective.name,
        "made": manifest.created,
    }
    if row is not None:
        settings = json.loads(row.hyper_parameters or "{}")
        plain = {k: v for k, v in settings.items() if isinstance(v, (int, float))}
        facts |= {
            "source": row.source,
            "technique": row.technique,
            "training rows": row.n_train,
            "label fraction": row.label_fraction,
            "seed": row.seed,
            "settings": ", ".join(f"{name} {value:g}" for name, value in plain.items()),
            "parameters trained": row.params_trained,
            "steps": None if "solver" in settings else row.steps,
            "cost": None if row.seconds is None else f"{row.seconds:.1f} s on {row.device}",
            "commit": row.git_sha,
        }
    else:
        training = manifest.training
        seconds = training.get("seconds")
        facts |= {
            "training rows": training.get("rows"),
            "parameters trained": training.get("params_trained"),
            "steps": training.get("steps"),
            "cost": f"{seconds:.1f} s on {training.get('device', 'an unnamed device')}"
            if isinstance(seconds, (int, float))
            else None,
        }
    if "threshold" in manifest.objective.state:
        chosen = manifest.objective.state["threshold"]
        facts["probability from which the second class is called"] = f"{chosen:.4g}"
    if manifest.technique is not None:
        facts["modules in the network"] = manifest.technique.name
    libraries = ("onetomany", "torch", "timm", "transformers", "peft")
    named = [f"{one} {manifest.versions[one]}" for one in libraries if one in manifest.versions]
    facts["versions"] = ", ".join(named)
    cells = [
        [name, places.without_places(str(value))]
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return ["## How it was made", _table(["", ""], cells)]


def _data(manifest: Manifest, rows: Sequence[ResultRow], licence: str) -> list[str]:
    """Return what is known of the rows, and of licences."""
    lines: list[str] = []
    if rows:
        first = rows[0]
        origin = places.without_places(first.split_origin or "")
        lines.append(
            f"Trained and tested on the target `{first.target}`: {first.n_train} training rows, "
            f"{first.n_eval} rows of {first.split}"
            + (f". Splits: {origin}" if origin else "")
            + "."
        )
    elif splits := manifest.training.get("splits"):
        lines.append(f"Rows: {places.without_places(str(splits))}.")
    if manifest.columns:
        columns = ", ".join(f"{role} (`{name}`)" for role, name in manifest.columns.items())
        lines.append(f"Columns that it was trained on: {columns}.")
    lines.append(
        f"{LICENCE}: {licence}. The licences of the data and of the checkpoint that "
        "it started from are not recorded: check them before the weights are passed on."
    )
    return ["## Data and licence", "\n\n".join(lines)]


def _limits(manifest: Manifest, rows: Sequence[ResultRow]) -> list[str]:
    lines = [
        "Metrics hold for rows like the test rows. Other sites, devices, languages or times may "
        "give other values.",
        "Nothing says how it does on groups of rows that are not listed under Subgroups.",
    ]
    if not any(row.split == "test" for row in rows):
        lines[0] = "It was not tested on rows that training and choice did not see."
    if manifest.modality.name == "events" or manifest.objective.name == "hourly":
        lines.append("It is no medical device and must not decide on the treatment of a person.")
    return ["## Limits", "\n".join(f"- {line}" for line in lines)]


def _use(manifest: Manifest, files: Collection[str]) -> list[str]:
    """Return how the network is opened, by the files beside the card."""
    for name, language, code in OPENED_BY:
        if name in files and (name != BUNDLE_MANIFEST or manifest.has_head):
            return ["## Use", f"```{language}\n{code}\n```"]
    if GRAPH in files:
        return ["## Use", "`README.md` beside this card has code that prepares rows and runs it."]
    return []


def is_card(text: str) -> bool:
    """Return whether a text is a card of `model_card`, by the tag in its header."""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return header is not None and f"- {TAG}" in header[1].splitlines()


def with_licence(card: str, licence: str) -> str:
    """Return a card of `model_card` with another licence of the weights, unless that is unknown."""
    if licence == UNKNOWN_LICENCE:
        return card
    changed = ModelCard(card, ignore_metadata_errors=True)
    header: Any = changed.data
    stated = f"{LICENCE}: {header.license}."
    header.license = licence
    return str(changed).replace(stated, f"{LICENCE}: {licence}.")
