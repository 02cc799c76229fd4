"""Write a draft as a job file, with a comment on every line that a user may wish to change."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints import bundle
from pipeline.config.schema import CHECKPOINT_PREFIXES, HUBS
from pipeline.io import storage
from pipeline.prepare.engine.importing import first_few
from pipeline.prepare.new_job.columns import describe_counts
from pipeline.prepare.new_job.draft import Draft, draft_job, job_name
from pipeline.prepare.new_job.inspection import IN_FOLDERS, inspect, relative_to

WIDTH = 100
BESIDE = 44
"""A short comment stands beside its line from this column on, a long one above it."""
PLAIN = re.compile(r"(\.{1,2}/)*[A-Za-z_/]([A-Za-z0-9_./:-]*[A-Za-z0-9_./-])?")
WORDS = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n"}
HUB = {
    "text": ("hf-hub:sentence-transformers/all-MiniLM-L6-v2", "English; 90 MB"),
    "image": ("timm-hub:resnet18.a1_in1k", "ImageNet; 47 MB"),
    "audio": ("hf-hub:facebook/wav2vec2-base", "English speech; 380 MB"),
}
"""A published checkpoint of each modality, which a run would download."""
PLACE = "relative to this file, absolute, or s3://bucket/prefix"
GENERIC = {"", "model", "bundle", "checkpoint", "checkpoints"}
"""Names of folders that do not tell one checkpoint from another."""
NEW_ROWS = {"csv": "new.csv", "jsonl": "new.jsonl", "parquet": "new.parquet"}


class _Lines:
    """The lines of a YAML file."""

    def __init__(self):
        self.lines: list[str] = []

    def add(self, depth: int, text: str, comment: str = "") -> None:
        """Add a line with its comment: beside it where both are short, else above it."""
        comment = _one_line(comment)
        indent = "  " * depth
        line = indent + text
        if comment and max(len(line) + 2, BESIDE) + 2 + len(comment) <= WIDTH:
            self.lines.append(
                f"{line:<{BESIDE}}# {comment}" if len(line) < BESIDE else f"{line}  # {comment}"
            )
            return
        if comment:
            self.comment(comment, depth)
        self.lines.append(line)

    def comment(self, text: str, depth: int = 0, hang: str = "") -> None:
        """Add a comment of any length, whose further lines are indented by `hang`."""
        mark = "  " * depth + "# "
        self.lines += textwrap.wrap(
            _one_line(text),
            WIDTH,
            initial_indent=mark,
            subsequent_indent=mark + hang,
            break_long_words=False,
            break_on_hyphens=False,
        )

    def command(self, text: str) -> None:
        """Add a command as a comment that is not wrapped, so that it can be copied."""
        self.lines.append(f"# {_one_line(text)}")

    def blank(self) -> None:
        self.lines.append("#")


def _one_line(text: str) -> str:
    """Return a text without line breaks, which would end a comment: names may hold some."""
    return " ".join(text.splitlines())


def scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(key)}: {scalar(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(scalar, value)) + "]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def write(
    places: list[str],
    output: str,
    *,
    target_column: str | None = None,
    objective: str | None = None,
    sources: Sequence[str] = (),
    force: bool = False,
) -> list[str]:
    """Look at files and write a job for them.

    Args:
        places: files, folders or globs.
        output: the job file; "" for NAME.yaml in the current folder.
        target_column: the column to predict; None: the most plausible one.
        objective: classification or regression of that column; None: as its values look.
        sources: checkpoints to start from: folders of bundles or of Hugging Face, or names as a
            job has them (hf-hub:NAME).
        force: overwrite a job file that is there.

    Returns:
        What was found, the file that was written, and what to do next, in lines.

    Raises:
        ValueError: the file is there, the data cannot be read, or nothing can be the label.
    """
    path = Path(output or f"{job_name(places[0])}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"-o {path}: a job file ends in .yaml")
    if path.exists() and not force:
        raise ValueError(f"{path} is there already: give --force to overwrite it, or another -o")
    folder = str(path.parent)
    checkpoints = [checkpoint(place, folder) for place in sources]
    with storage.scratch_folder() as scratch:
        found = inspect(places, str(scratch))
        draft = draft_job(found, target_column, folder, str(scratch), objective)
        text = job_text(draft, path, places, checkpoints)
        lines = summary(draft, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return lines


def checkpoint(place: str, folder: str) -> str:
    """Return a checkpoint as a job in a folder names it.

    Raises:
        ValueError: it is no bundle and no folder of Hugging Face.
    """
    if place.startswith(CHECKPOINT_PREFIXES):
        prefix, _, rest = place.partition(":")
        return place if prefix in HUBS else f"{prefix}:{relative_to(rest, folder)}"
    if bundle.exists(place):
        return f"bundle:{relative_to(place, folder)}"
    if storage.exists(storage.join(place, "config.json")):
        return f"hf:{relative_to(place, folder)}"
    raise ValueError(
        f"--source {place}: neither a bundle (manifest.json) nor a folder of Hugging Face "
        "(config.json) is there; for a name of a hub write hf-hub:NAME or timm-hub:NAME, and for a "
        "file of weights add its network to the job: backbone: timm/NAME, init: file:PATH"
    )


# ---------------------------------------------------------------- the job


def job_text(draft: Draft, path: Path, places: list[str], checkpoints: list[str]) -> str:
    """Return the job file."""
    out = _Lines()
    name = path.stem if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", path.stem) else "first"
    target = _key(draft.label)
    _header(out, draft, path, name, target, places)
    out.add(0, f"name: {scalar(name)}", f"the results will be in runs/{name}")
    out.add(0, "storage: runs", "a folder below the current one, or s3://bucket/prefix")
    if checkpoints:
        _given_sources(out, draft, checkpoints)
    else:
        _own_source(out, draft, path)
    _target(out, draft, path, target, shared=not checkpoints, checkpoints=checkpoints)
    out.add(
        0,
        "techniques: [scratch, linear_probe, full]",
        "how the source's network is used: not at all, as it is, and trained on; "
        "`onetomany techniques` lists more",
    )
    out.add(0, "baselines: auto", "what has no network at all, to compare with")
    out.add(0, "fanout: {seeds: 3}", "each is trained three times; a verdict needs two")
    return "\n".join(out.lines) + "\n"


def _key(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "_", label).strip("_") or "target"


def _header(
    out: _Lines,
    draft: Draft,
    path: Path,
    name: str,
    target: str,
    places: list[str],
) -> None:
    found, job = draft.found, shlex.quote(str(path))
    commands = [
        draft.prepare,
        f"onetomany run {job} --dry-run",
        f"onetomany run {job}",
        draft.prepare_command_for_new_rows,
        f"onetomany predict runs/{name} {_new_rows(draft)} --target {target} -o predictions",
    ]
    for command in filter(None, commands):
        out.command(command)
    out.blank()
    out.comment(
        f"`onetomany init {shlex.join(places)}` wrote this job from what it found; change what you "
        "like. `onetomany schema` explains every field. "
        + ("prepare converts the files, once. " if draft.prepare else "")
        + "--dry-run says what would run and what is wrong with the rows; predict is for new rows."
    )
    out.blank()
    counts = {key: manifest.num_rows for key, manifest in found.manifests.items() if key != "uri"}
    parts = ", ".join(f"{key} {count}" for key, count in counts.items())
    out.comment(f"Found {found.rows} rows{f' ({parts})' if parts else ''} of {_what(draft)}.")
    for line in _facts(draft):
        out.comment(f"- {line}", hang="  ")
    out.lines.append("")


def _new_rows(draft: Draft) -> str:
    """Return an example of files to predict."""
    if draft.found.kind == "documents":
        return "new_files --input-format documents"
    if draft.found.kind in IN_FOLDERS:
        return "new_files"
    return shlex.quote(draft.prepared_new) if draft.prepare else NEW_ROWS[draft.found.kind]


def _what(draft: Draft) -> str:
    kinds = {
        "text": "texts",
        "image": "images",
        "audio": "recordings",
        "series": "series of numbers",
        "table": "a table",
    }
    return kinds[draft.modality]


def _facts(draft: Draft) -> list[str]:
    """Return what was found, in sentences without a full stop."""
    out = []
    if draft.modality == "text":
        out.append(f"95 % of the texts have at most about {draft.tokens:.0f} tokens")
    if draft.modality == "series":
        out.append(f"95 % of the series have at most {draft.steps_of_series} steps")
    if draft.media is not None and draft.media.sides:
        sides = sorted(draft.media.sides)
        grey = "grey" if draft.media.grey else "colour"
        out.append(f"images: {grey}, shorter side {sides[0]} to {sides[-1]} pixels")
    if draft.media is not None and draft.media.seconds:
        seconds, rates = sorted(draft.media.seconds), sorted(set(draft.media.rates))
        lengths = f"{seconds[0]:.1f} to {seconds[-1]:.1f} s"
        out.append(f"recordings: {lengths}, {first_few(rates)} samples a second")
    if draft.media is not None and draft.media.missing:
        out.append(
            f"{len(draft.media.missing)} of a sample of the files are not there, such as "
            f"{draft.media.missing[0]}: rows without a file are left out"
        )
    if draft.counts:
        what = {"multilabel": "labels", "tagging": "tags"}.get(draft.objective, "classes")
        shown = describe_counts(draft.counts_by_name or draft.counts)
        out.append(f"{len(draft.counts)} {what} of {draft.label}: {shown}")
    if draft.numbers:
        low, median, high = draft.numbers
        span = f"from {low:.4g} to {high:.4g}"
        out.append(f"{draft.label}: 90 % of the numbers lie {span}, the median is {median:.4g}")
    if draft.others:
        out.append(
            f"{draft.label} is the most plausible label; {first_few(draft.others)} could be it "
            "too: give --target-column"
        )
    return [*out, *draft.notes]


def _data(
    out: _Lines,
    draft: Draft,
    path: Path,
    depth: int,
    columns: dict[str, str],
    checkpoints: Sequence[str] = (),
) -> None:
    """Add the rows: places, splits, modality and columns."""
    folder = str(path.parent)
    if draft.prepared:
        out.add(
            depth, f"uri: {scalar(relative_to(draft.prepared, folder))}", "relative to this file"
        )
    else:
        for i, (key, listed) in enumerate(draft.found.places.items()):
            named_here = [relative_to(place, folder) for place in listed]
            value: Any = named_here[0] if len(named_here) == 1 else named_here
            why = draft.reasons.get("files", "") or PLACE
            out.add(depth, f"{key}: {scalar(value)}", "" if i else why)
        if draft.found.stated:
            is_text = draft.found.kind == "documents"
            why = "a row is a file, its label the name of its folder" if is_text else ""
            why = why or "there are files of other kinds, too"
            out.add(depth, f"format: {draft.found.kind}", why)
    for key, value in draft.fields.items():
        out.add(depth, f"{key}: {scalar(value)}", draft.reasons.get(key, ""))
    if draft.kept_classes:
        classes = scalar({draft.label: draft.kept_classes})
        out.add(depth, f"where: {classes}", draft.reasons["where"])
    # a checkpoint brings its own size and rate
    kept = {"text": {"length"}, "audio": {"max_seconds"}}.get(draft.modality, set[str]())
    options = {k: v for k, v in draft.options.items() if k in kept or not checkpoints}
    value = {draft.modality: options} if options else draft.modality
    why = _why_options(draft) if options or not checkpoints else "read as the checkpoint says"
    out.add(depth, f"modality: {scalar(value)}", why)
    if columns:
        out.add(depth, f"columns: {scalar(columns)}", "role: name of the column")


def _why_options(draft: Draft) -> str:
    return {
        "text": "length: tokens of a row; longer texts are cut",
        "image": "size: pixels a side; larger is slower and often better",
        "audio": "rate: samples a second",
        "series": "length: steps that the network reads",
    }.get(draft.modality, "")


def _own_source(out: _Lines, draft: Draft, path: Path) -> None:
    """Add the source that needs no checkpoint: it learns from the user's own rows."""
    backbone: Any
    train: dict[str, float] = {
        "steps": max(100, draft.steps),
        "global_batch": draft.batch,
        "lr": 1e-3,
    }
    columns = dict(draft.inputs)
    objective: Any = draft.objective
    learns = f"it learns {draft.label} from the training rows themselves, so its gain is that of "
    learns += "training longer: put other data with the same columns here to transfer from"
    if draft.modality == "text":
        backbone = {"transformers/bert": {"layers": 2, "hidden": 128, "heads": 4}}
        if draft.objective != "tagging" and "text_pair" not in draft.inputs:
            objective, learns = "mlm", "it learns to fill in masked words of the training texts"
            train["global_batch"] = draft.packed_batch
    elif draft.modality == "image":
        backbone, objective = "timm/resnet10t", "simclr"
        learns = "it learns to recognise two views of one training image, without labels"
    elif draft.modality == "audio":
        backbone = "torchaudio/deepspeech2"
        objective = {"wav2vec2": {"entries": 64, "code_width": 64, "width": 128, "mask_length": 5}}
        learns = "it learns to fill in hidden parts of the training recordings, without labels"
        train = {"steps": 100, "batch_cost": _cost(draft), "lr": 1e-3}
    elif draft.modality == "series":
        config = {"patch_length": draft.patch, "patch_stride": draft.patch, "scaling": None}
        config |= {"d_model": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 128}
        backbone, objective = {"hf/patchtst": {"config": config}}, "masked_series"
        learns = "it learns to fill in hidden patches of the training series, without labels"
    else:
        backbone = {"table/ft_transformer": {"width": 64, "layers": 2}}
    if objective == draft.objective:
        columns |= draft.labels
    out.comment("What to start from. `own` needs no download: " + learns + ".")
    out.add(0, "sources:")
    out.add(1, "own:")
    out.add(2, "data: &rows", "test rows are held out here as well")
    _data(out, draft, path, 3, columns)
    out.add(2, f"backbone: {scalar(backbone)}", "`onetomany backbones` lists others")
    out.add(2, f"objective: {scalar(objective)}", "`onetomany objectives NAME` explains it")
    out.add(2, f"train: {scalar(train)}", _why_train(draft))
    _hub(out, draft)


def _cost(draft: Draft) -> float:
    """Return the seconds of a step: as many recordings as a batch has rows, at most a minute."""
    seconds = draft.media.seconds if draft.media else (1.0,)
    mean = sum(seconds) / len(seconds)
    return float(round(min(60.0, max(8.0, 4 * max(seconds), draft.batch * mean))))


def _why_train(draft: Draft) -> str:
    return (
        "batch_cost: seconds of audio a step"
        if draft.modality == "audio"
        else "small, for a laptop"
    )


def _hub(out: _Lines, draft: Draft) -> None:
    """Add a published checkpoint as a comment."""
    if draft.modality not in HUB:
        return
    name, what = HUB[draft.modality]
    out.comment(f"A published checkpoint ({what}), often much better; the run downloads it:", 1)
    out.comment("published:", 1)
    out.comment(f"  backbone: {name}", 1)


def _given_sources(out: _Lines, draft: Draft, checkpoints: list[str]) -> None:
    out.comment("What to start from: the checkpoints that were given with --source.")
    out.add(0, "sources:")
    taken: set[str] = set()
    for place in checkpoints:
        parts = [part for part in re.split("[/:]", place) if part not in GENERIC]
        key = _key(parts[-1])
        while key in taken:
            key += "_"
        taken.add(key)
        out.add(1, f"{key}:")
        out.add(2, f"backbone: {scalar(place)}")
    _hub(out, draft)


def _target(
    out: _Lines,
    draft: Draft,
    path: Path,
    target: str,
    shared: bool,
    checkpoints: list[str],
) -> None:
    """Add the task."""
    out.comment("What to learn; there may be several targets.")
    out.add(0, "targets:")
    out.add(1, f"{target}:")
    out.add(2, "data:")
    columns = {**draft.inputs, **draft.labels}
    if shared:
        out.add(3, "<<: *rows", "the same rows as above")
        if draft.modality == "audio":
            out.add(3, "modality: audio", "at the rate of its source")
        out.add(3, f"columns: {scalar(columns)}", _label_comment(draft))
    else:
        _data(out, draft, path, 3, columns, checkpoints)
    out.add(2, f"objective: {draft.objective}", "`onetomany objectives` lists others")
    metric, why = _metric(draft)
    if metric:
        out.add(2, f"metric: {metric}", why)
    out.add(
        2,
        "label_fractions: [1.0]",
        "1.0 is all labels; [0.1, 1.0] also says what a tenth of them is enough for",
    )
    out.add(2, f"train: {scalar(_train(draft, checkpoints))}", _why_train(draft))


def _label_comment(draft: Draft) -> str:
    return f"{draft.label} is learned" + (
        f"; {first_few(draft.others)} could be it too" if draft.others else ""
    )


def _metric(draft: Draft) -> tuple[str, str]:
    """Return the metric to judge by, and why; "" for the objective's own."""
    if draft.objective == "regression":
        return "rmse", "the root of the mean squared error, in the unit of the column; or mae, r2"
    if draft.objective != "classification":
        return "", ""
    share = max(draft.counts.values()) / sum(draft.counts.values())
    if len(draft.counts) == 2 and share > 0.6:
        return "auroc", f"the larger class has {share:.0%} of the rows, so accuracy says little"
    ratio = max(draft.counts.values()) / min(draft.counts.values())
    if len(draft.counts) > 2 and ratio > 5:
        return "macro_f1", f"the largest class has {ratio:.0f} times the rows of the smallest"
    return "accuracy", "the classes are about equally large"


def _train(draft: Draft, checkpoints: list[str]) -> dict[str, float]:
    """Return how a fine-tune trains: published networks with a smaller rate."""
    lr = 1e-4 if checkpoints and draft.modality in ("text", "audio") else 1e-3
    if draft.objective == "ctc":
        return {"epochs": 20, "batch_cost": _cost(draft), "lr": lr}
    if draft.modality == "audio":
        return {"steps": draft.steps, "batch_cost": _cost(draft), "lr": lr}
    return {"steps": draft.steps, "global_batch": draft.batch, "lr": lr}


def summary(draft: Draft, path: Path) -> list[str]:
    """Return what was found and the commands that follow, for the terminal."""
    job = shlex.quote(str(path))
    first = [f"first: {draft.prepare}"] if draft.prepare else []
    return [
        f"{draft.found.rows} rows of {_what(draft)}; to learn: {draft.label} ({draft.objective})",
        *(f"- {line}" for line in _facts(draft)),
        f"wrote {path}",
        *first,
        f"next: onetomany run {job} --dry-run, then onetomany run {job}",
    ]
