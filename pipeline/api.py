"""The public functions, for notebooks and programs: the verbs of the command line.

    from pipeline import run, results, predict

    outcome = run("jobs/quickstart.yaml", overrides={"storage": "/tmp/runs"})
    outcome.table()                        # what the command prints; a notebook shows it
    outcome.report, outcome.bundles        # report.html; a bundle for every source
    results("/tmp/runs/quickstart").to_pandas()     # one row a trial, split and metric
    predict("/tmp/runs/quickstart", "photos", "predictions", target="clothing")

Each function that needs Ray joins the session that runs in this process, or starts one and ends it.
Bad input raises ValueError (`JobError`, `BundleError`) or `StorageError`, a failure of the cluster
or of a stage RuntimeError.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import registry, yaml_loader
from pipeline.config.plugins import use as use_plugins
from pipeline.config.schema import Job, OutputFormat

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import rich.table

    from pipeline.checkpoints.bundle import Bundle
    from pipeline.report.advice import Advice
    from pipeline.report.matrix import MatrixEntry
    from pipeline.report.results import ResultRow
    from pipeline.train.progress import Progress
    from pipeline.transfer.job_state import JobState

Stage = Literal["pretrain", "score", "finetune"]
Remake = Literal["none", "changed"]
Overrides = Mapping[str, Any] | Sequence[str]
"""Fields of a job file to set: a mapping, or texts as after ``--set``."""


@dataclass
class Outcome:
    """The results of a job's stages."""

    bundles: dict[str, str] = field(default_factory=dict)
    """URI of each source's bundle."""
    scores: list[dict[str, Any]] = field(default_factory=list)
    """A row for each source and target, best first: ``target``, ``source``, ``backbone``, a value
    for each transferability score (None where it is not defined), ``intervals`` and ``undefined``,
    score to (low, high) and to the reason.
    """
    rows: list[ResultRow] = field(default_factory=list)
    """The job's rows of the results table."""
    entries: list[MatrixEntry] = field(default_factory=list)
    """The matrix of the report: means, gains over scratch and their intervals."""
    report: str = ""
    """URI of report.html; report.md lies beside it."""
    results: str = ""
    """URI of the results table; `results` reads it."""
    notes: list[str] = field(default_factory=list)
    """What was made by other code or versions, and trials that the job no longer has."""
    warnings: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """A line for each target that was left out and each trial that failed."""

    def table(self) -> rich.table.Table:
        """Return the table that the command line prints. A notebook shows it."""
        from pipeline.report import terminal

        return terminal.table(self.entries)


def init(
    data: str | Sequence[str],
    output: str = "",
    *,
    target_column: str | None = None,
    objective: str | None = None,
    sources: Sequence[str] = (),
    force: bool = False,
) -> list[str]:
    """Look at data and write a first job for them, with a comment on every line.

    Args:
        data: Files, folders or globs.
        output: The job file; "" for NAME.yaml in the current folder.
        target_column: The column to predict. None: the most plausible one.
        objective: classification or regression of that column. None: as its values look.
        sources: Checkpoints to start from: folders, or names such as ``hf-hub:NAME``.
        force: Overwrite a job file that is there.

    Returns:
        What was found, the file that was written, and what to do next, in lines.

    Raises:
        ValueError: The file is there, the data cannot be read, or nothing can be the label.
    """
    from pipeline.prepare.new_job import writing

    return writing.write(
        _as_list(data),
        output,
        target_column=target_column,
        objective=objective,
        sources=sources,
        force=force,
    )


def load_job(path: str | Path, overrides: Overrides = (), elsewhere: bool = False) -> Job:
    """Read and check a job file.

    Args:
        path: The YAML file.
        overrides: Fields to set: ``{"sources.a.train.steps": 10}``, or texts such as
            ``sources.a.train.steps=10``.
        elsewhere: The job will run on other machines, so absolute paths need not exist here.

    Raises:
        JobError: every mistake, each with its file, line, field and the nearest right name.
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{name}={json.dumps(value)}" for name, value in overrides.items()]
    return yaml_loader.load(path, list(overrides), elsewhere)


def _as_job(job: Job | str | Path, overrides: Overrides) -> Job:
    """Return a job, read from its file where it is not read yet."""
    if not isinstance(job, Job):
        return load_job(job, overrides)
    if overrides:
        raise ValueError("overrides are for a job file; give them to load_job for this job")
    return job


def run(
    job: Job | str | Path,
    *,
    overrides: Overrides = (),
    address: str | None = None,
    wait: bool | None = None,
    remake: Remake = "none",
    verbose: bool = False,
    serve: int | None = None,
) -> Outcome:
    """Run a whole job: pretrain, fine-tune, report. What is done already is not done again.

    Args:
        job: A job file, or a job from `load_job`.
        overrides: Of a job file: fields to set, as for `load_job`.
        address: A Ray cluster to join, ``auto`` or host:port. None: RAY_ADDRESS, or a local one.
        wait: Whether to wait for nodes that are not there yet. None: on a cluster whose autoscaler
            declares its nodes.
        remake: ``changed`` makes anew what other code or library versions made.
        verbose: Show Ray's own messages too.
        serve: Show a live page on this port of 127.0.0.1 while the job runs; 0: any free one.
    """
    stages: tuple[Stage, ...] = ("pretrain", "finetune")
    job = _as_job(job, overrides)
    return run_stages(
        job, stages, address=address, wait=wait, remake=remake, verbose=verbose, serve=serve
    )


def pretrain(
    job: Job | str | Path,
    *,
    overrides: Overrides = (),
    address: str | None = None,
    wait: bool | None = None,
    remake: Remake = "none",
    verbose: bool = False,
) -> dict[str, str]:
    """Train every source. Returns the URI of each one's bundle. See `run`."""
    job = _as_job(job, overrides)
    done = run_stages(
        job, ("pretrain",), address=address, wait=wait, remake=remake, verbose=verbose
    )
    return done.bundles


def finetune(
    job: Job | str | Path,
    *,
    overrides: Overrides = (),
    address: str | None = None,
    wait: bool | None = None,
    remake: Remake = "none",
    verbose: bool = False,
) -> Outcome:
    """Fine-tune on every target from the pretrained bundles, then report. See `run`."""
    job = _as_job(job, overrides)
    return run_stages(
        job, ("finetune",), address=address, wait=wait, remake=remake, verbose=verbose
    )


def score(
    job: Job | str | Path,
    *,
    overrides: Overrides = (),
    address: str | None = None,
    verbose: bool = False,
) -> list[dict[str, Any]]:
    """Rank the pretrained sources for each target, without training. See `run`.

    Returns:
        Rows as in `Outcome.scores`, best first.
    """
    job = _as_job(job, overrides)
    return run_stages(job, ("score",), address=address, verbose=verbose).scores


def results(job: Job | str | Path) -> pa.Table:
    """Return the results of a job, its file or its folder: a row a trial, split and metric."""
    import pyarrow as pa

    from pipeline.report import results as results_table

    root = _root(job)
    rows = [row.columns() for row in results_table.read(root)]
    return pa.Table.from_pylist(rows, schema=results_table.SCHEMA)


def advise(places: Sequence[Job | str | Path], target: str | None = None) -> list[Advice]:
    """Say which source and technique each target should take, from results that are there.

    A label fraction of a job's target at which no trial has finished gets predictions from the
    other results.

    Args:
        places: Jobs, job files (.yaml), folders of jobs, or their results.parquet; local or on S3.
        target: Advise on this target alone.

    Raises:
        ValueError: A place has no results, or none of the target.
    """
    from pipeline.report import advice
    from pipeline.report import results as results_table
    from pipeline.transfer import grid, trial

    stores: dict[str, advice.Store] = {}
    new: list[advice.NewTarget] = []
    for place in places:
        job = _read_job(place)
        root = _root(job)
        rows = results_table.read(root)
        if isinstance(job, Job):
            finished = {
                (row.target, row.label_fraction)
                for row in rows
                if row.status == "done" and row.current is not False
            }
            planned = [
                advice.NewTarget(
                    name,
                    grid.fraction_text(fraction, spec.objective.name),
                    spec.data.modality.name,
                    spec.objective.name,
                    spec.metric,
                )
                for name, spec in job.targets.items()
                for fraction in spec.label_fractions
            ]
            new += [one for one in planned if (one.name, one.label_fraction) not in finished]
        if not rows and (isinstance(job, str) or len(places) == 1):
            raise ValueError(
                f"{root}: no {results_table.FILE} here; name a job that has run, its folder or "
                f"its {results_table.FILE}"
            )
        stores[root] = advice.Store(root, rows, trial.read_test_predictions(root, rows))
    return advice.advise(list(stores.values()), target, new)


def _read_job(place: Job | str | Path) -> Job | str:
    """Return a job, read where its file is named, or the place of other things."""
    if isinstance(place, Job):
        return place
    place = str(place)
    return load_job(place) if place.endswith((".yaml", ".yml")) else place


def _root(place: Job | str | Path) -> str:
    """Return the folder of a job, of a job file, or of a results table."""
    from pipeline.report import results as results_table

    place = _read_job(place)
    if isinstance(place, Job):
        return place.root
    folder, _, name = place.rpartition("/")
    if not name.endswith(".parquet"):
        return place
    if name != results_table.FILE:
        raise ValueError(f"{place}: a results table is named {results_table.FILE}")
    return folder or "."


def best_bundle(job: Job | str | Path, target: str | None = None) -> str:
    """Return the URI of the bundle that a job's report says to use for a target.

    Args:
        job: The job, its file, its folder or its results.parquet.
        target: Name of the target; may be left out where the job has one.

    Raises:
        ValueError: There is no such target, or the bundle of its best network was not kept.
    """
    from pipeline.report import results as results_table
    from pipeline.report import winners
    from pipeline.transfer import trial

    root = _root(job)
    rows = results_table.read(root)
    return winners.find_bundle(root, rows, trial.read_test_predictions(root, rows), target)


def load_bundle(uri: str | Path, *, plugins: Sequence[str] = ()) -> Bundle:
    """Read a bundle and verify it against its checksums.

    Args:
        uri: A folder or s3:// URI, such as those of `Outcome.bundles` and the column
            ``bundle_uri`` of `results`.
        plugins: Modules or paths that hold components it is made of.
    """
    from pipeline.checkpoints import bundle

    use_plugins(plugins)
    return bundle.load(str(uri))


def _resolve(bundle: str, target: str | None) -> str:
    """Return the bundle, or the best one for a target where a job (file or folder) is given.

    Raises:
        ValueError: There is no such folder here, no such target, or no bundle of its best network.
    """
    from pipeline.io import storage
    from pipeline.report import results as results_table
    from pipeline.report import trial_folder

    place = Path(bundle)
    is_file = place.suffix in (".yaml", ".yml")
    if not (is_file or storage.is_remote(bundle) or storage.exists(bundle)):
        names = [path.name for path in place.parent.glob("*/")]
        near = registry.close_names(place.name, names)
        advice = (
            f"did you mean {' or '.join(str(place.parent / name) for name in near)}?"
            if near
            else "`onetomany run JOB.yaml` makes the folder of a job, STORAGE/NAME"
        )
        raise ValueError(f"{bundle}: no such folder; {advice}")
    is_table = bundle.rpartition("/")[2] == results_table.FILE
    is_job = (
        is_table
        or bundle.endswith((".yaml", ".yml"))
        or any(
            storage.exists(storage.join(bundle, name))
            for name in (results_table.FILE, trial_folder.TRIALS)
        )
    )
    if target is None and not is_job:
        return bundle
    return best_bundle(bundle, target)


def predict(
    bundle: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    input_format: str = "auto",
    format: OutputFormat = "parquet",
    keep: Sequence[str] = (),
    srt: bool = False,
    draw: bool = False,
    plugins: Sequence[str] = (),
    address: str | None = None,
    verbose: bool = False,
) -> str:
    """Apply a fine-tuned bundle to new files, with Ray Data.

    Args:
        bundle: A fine-tuned bundle; or a job (file or folder), whose best network for ``target``
            is taken.
        data: Files, folders or globs, local or on S3.
        output: Folder for the files of predictions. Parts that are there already are kept.
        target: The target whose network is taken, for a job with several.
        columns: Role to column, where a column is named otherwise than in training.
        input_format: Of ``data``, as in a job's data.
        format: Of the predictions.
        keep: Columns of the rows that are written beside the predictions.
        srt: Of speech, also write one file of subtitles a recording.
        draw: Of boxes and masks, also write each image with its prediction drawn on it.
        plugins: Modules or paths that hold components the bundle is made of.
        address: A Ray cluster to join, as for `run`.
        verbose: Show Ray's own messages too.

    Returns:
        What was written, in words.
    """
    from pipeline.train import launch
    from pipeline.train.progress import Progress
    from pipeline.transfer import inference

    use_plugins(plugins)
    place, output = str(bundle), str(output)
    bundle = _resolve(place, target)
    options = inference.OutputOptions(format, tuple(keep), srt, draw)
    inference.check(bundle, options)
    with launch.session(address, verbose), Progress() as progress:
        if bundle != place:
            progress.note(f"bundle: {bundle}")
        files, named = _as_list(data), dict(columns or {})
        return inference.predict(bundle, files, output, named, input_format, progress, options)


def embed_files(
    bundle: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    target: str | None = None,
    columns: Mapping[str, str] | None = None,
    input_format: str = "auto",
    format: OutputFormat = "parquet",
    keep: Sequence[str] = (),
    plugins: Sequence[str] = (),
    address: str | None = None,
    verbose: bool = False,
) -> str:
    """Write the features that a bundle's backbone gives of new rows to files, with Ray Data.

    The column ``features`` has a list of numbers for each row; ids, texts and kept columns are
    those of `predict`.

    Args:
        bundle: A source's or a fine-tuned bundle; or a job (file or folder), whose best network for
            ``target`` is taken.
        data: Files, folders or globs, local or on S3.
        output: Folder for the files of features. Parts that are there already are kept.
        target: The target whose network is taken, for a job with several.
        columns: Role to column, where a column is named otherwise than in training.
        input_format: Of ``data``, as in a job's data.
        format: Of the features.
        keep: Columns of the rows that are written beside the features.
        plugins: Modules or paths that hold components the bundle is made of.
        address: A Ray cluster to join, as for `run`.
        verbose: Show Ray's own messages too.

    Returns:
        What was written, in words.
    """
    from pipeline.checkpoints import bundle as bundles
    from pipeline.train import launch
    from pipeline.train.progress import Progress
    from pipeline.transfer import inference

    use_plugins(plugins)
    place, output = str(bundle), str(output)
    bundle = _resolve(place, target)
    bundles.read_manifest(bundle)  # what is no bundle is refused before Ray starts
    options = inference.OutputOptions(format, tuple(keep))
    with launch.session(address, verbose), Progress() as progress:
        if bundle != place:
            progress.note(f"bundle: {bundle}")
        files, named = _as_list(data), dict(columns or {})
        return inference.embed_files(bundle, files, output, named, input_format, progress, options)


def embed(
    bundle: str | Path,
    data: str | Path | Sequence[str | Path],
    *,
    columns: Mapping[str, str] | None = None,
    input_format: str = "auto",
    plugins: Sequence[str] = (),
) -> np.ndarray:
    """Compute the features that a bundle's backbone gives of new rows, in this process.

    Args:
        bundle: URI of a source's or a fine-tuned bundle.
        data: Files, folders or globs, local or on S3.
        columns: Role to column, where a column is named otherwise than in training.
        input_format: Of ``data``, as in a job's data.
        plugins: Modules or paths that hold components the bundle is made of.

    Returns:
        (rows, D) float32 pooled features, in the order of the rows; NaN for a row that cannot be
        decoded.
    """
    from pipeline.train.progress import Progress
    from pipeline.transfer import inference

    use_plugins(plugins)
    with Progress() as progress:
        named = dict(columns or {})
        return inference.embed(str(bundle), _as_list(data), named, input_format, progress)


def export(
    bundle: str | Path,
    output: str | Path,
    *,
    target: str | None = None,
    kind: str = "bundle",
    backbone_only: bool = False,
    fps: float | None = None,
    plugins: Sequence[str] = (),
) -> str:
    """Write a bundle, or prepared episodes, as a folder or file that other libraries open.

    Args:
        bundle: A bundle; or a job (file or folder), whose best network for ``target`` is taken; or,
            for kind ``lerobot``, a folder of prepared episodes.
        output: Folder, or file for a state dict.
        target: The target whose network is taken, for a job with several.
        kind: A registered kind of export, in ``pipeline/checkpoints/exports``. ``bundle``: a
            verified copy; ``hugging-face``: a folder that transformers or timm opens; ``onnx`` and
            ``torch-export``: the network as a graph; ``state-dict``: one .safetensors or .pt file.
            ``lerobot``: a policy that LeRobot opens, or prepared episodes as its data set.
        backbone_only: Leave the head out.
        fps: Steps a second, for prepared episodes; None: what the folder says.
        plugins: Modules or paths that hold components the bundle is made of.

    Returns:
        What was written, in words; for a bundle with the largest difference to it.

    Raises:
        ValueError: There is an export already, or this kind does not read an option; or the job has
            no results, not this target, or several targets and none is named.
        BundleError: The bundle cannot be written so, or the export gives other numbers.
    """
    from pipeline.checkpoints.export import export_bundle
    from pipeline.prepare import lerobot_export
    from pipeline.transfer import publishing

    bundle, output = str(bundle), str(output)
    if kind == lerobot_export.KIND and lerobot_export.is_prepared(bundle):
        if target is not None or backbone_only or plugins:
            raise ValueError(
                f"export: {bundle} holds episodes and no network: leave --target, "
                "--backbone-only and --plugin out"
            )
        return lerobot_export.export(bundle, output, fps)
    if fps is not None:
        raise ValueError("export: a network has no steps a second: leave --fps out")
    use_plugins(plugins)
    bundle = _resolve(bundle, target)
    written = export_bundle(bundle, output, kind, backbone_only)
    publishing.write_card(bundle, output)
    return written


def push(
    place: str | Path, to: str | Path, *, licence: str = "unknown", private: bool = False
) -> str:
    """Put a bundle or an exported folder, with a model card, into a repository or a folder.

    Args:
        place: URI of a bundle, or of a folder that `export` wrote.
        to: ``hf-hub:USER/NAME``, a repository of the Hugging Face hub, or a folder.
        licence: Of the weights, for the card: apache-2.0, cc-by-4.0, ...
        private: Make a repository that is not there yet a private one.

    Returns:
        What was done, in words.
    """
    from pipeline.transfer import publishing

    return publishing.push(str(place), str(to), licence, private)


def prepare_data(
    name: str,
    source: str,
    output: str,
    *,
    options: Sequence[str] = (),
    resize: int | None = None,
    quality: int | None = None,
    rows_per_part: int | None = None,
    part_mb: float | None = None,
    max_bad: float = 0.01,
    plugins: Sequence[str] = (),
    address: str | None = None,
    verbose: bool = False,
) -> str:
    """Turn a publisher's raw files into Parquet files that a job reads.

    A stopped run goes on from its last file.

    Args:
        name: The importer: imagenet, coco, text, csv, ... (``onetomany prepare --list``).
        source: The publisher's folder, archive or file.
        output: Folder for the Parquet files.
        options: Options of the importer, such as ``["masks=semantic"]``.
        resize: Of images: the shorter side in pixels, only downwards.
        quality: Of images: write every one as JPEG anew, with this quality.
        rows_per_part: Rows of a file; None: as ``part_mb`` says.
        part_mb: Size of a file in MiB; None: 96.
        max_bad: Share of rows that may be broken.
        plugins: Modules or paths that hold importers.
        address: A Ray cluster to join, as for `run`.
        verbose: Show Ray's own messages too.

    Returns:
        What was written, in words.
    """
    from pipeline.io import checksums, file_identity, run_lock
    from pipeline.prepare.engine import importing, write
    from pipeline.train import launch
    from pipeline.train.progress import Progress

    use_plugins(plugins)
    settings = write.Settings(resize, quality, rows_per_part, max_bad, part_mb)
    with Progress() as progress, file_identity.progress_to(progress.update):
        given = importing.options_of(name, list(options))
        work = write.Preparation(name, source, output, given, settings)
    with (
        Progress() as progress,
        checksums.notifications_to(progress.note),
        run_lock.hold(output, progress.note),
        launch.session(address, verbose) if work.todo else nullcontext(),
    ):
        work.run(progress.update)
    return work.describe()


# ---------------------------------------------------------------- stages


def run_stages(
    job: Job,
    wanted: Sequence[Stage],
    *,
    address: str | None = None,
    wait: bool | None = None,
    remake: Remake = "none",
    verbose: bool = False,
    progress: Progress | None = None,
    serve: int | None = None,
) -> Outcome:
    """Run some stages of a job, and the report after ``finetune``. See `run`."""
    from pipeline.io import run_lock
    from pipeline.train import launch
    from pipeline.train.progress import Progress
    from pipeline.transfer import existing_trials, live_page, stages, tracking

    if not job.targets and "pretrain" not in wanted:
        raise ValueError("this job has no targets")
    new_or_given = Progress() if progress is None else nullcontext(progress)
    with (
        new_or_given as progress,
        open_job(job, wanted, progress, wait, remake, verbose) as state,
        run_lock.hold(job.root, progress.note),
        live_page.serve(state, serve),
        tracking.follow(state) as track,
    ):
        status = existing_trials.trial_status(state) if "finetune" in wanted else []
        if status and all(is_done for _, is_done in status):
            for name in state.sources:
                stages.report_done(state, name)
            progress.note(f"all {len(status)} trials are done; nothing to run")
            progress.on_end([*state.sources.values(), *(trial for trial, _ in status)])
            outcome = write_report(state, stages.collect_existing_rows(state))
        else:
            with launch.session(address, verbose):
                outcome = _run(state, wanted)
        track(outcome)
    return outcome


@contextmanager
def open_job(
    job: Job,
    wanted: Sequence[Stage],
    progress: Progress,
    wait: bool | None = None,
    remake: Remake = "none",
    verbose: bool = False,
) -> Iterator[JobState]:
    """Check a job before anything starts, and yield its state. See `run`."""
    from pipeline.io import checksums
    from pipeline.transfer import stages

    use_plugins(job.plugins)
    remade_by_stage = {"pretrain": "sources", "finetune": "trials"} if remake == "changed" else {}
    remade = tuple(remade_by_stage[stage] for stage in wanted if stage in remade_by_stage)
    with checksums.notifications_to(progress.note):
        yield stages.check(job, progress, verbose=verbose, wait=wait, remake=remade)


def _run(state: JobState, wanted: Sequence[Stage]) -> Outcome:
    """Run the wanted stages of a checked job."""
    from pipeline.train import launch
    from pipeline.transfer import fanout, stages

    if "finetune" in wanted:
        cluster = launch.cluster(state.wait)
        if cluster.is_declared:
            fanout.check_fits(state.job, cluster.nodes, cluster.grows)
    if "pretrain" in wanted:
        stages.pretrain(state)
    if not state.targets or tuple(wanted) == ("pretrain",):
        return Outcome(_bundles(state))
    shared = stages.prepare_shared(state)
    scores = stages.score(state, shared) if "score" in wanted else []
    if "finetune" not in wanted:
        return Outcome(_bundles(state), scores, failed=stages.failures(state, []))
    return write_report(state, stages.collect(state, stages.finetune(state, shared)))


def write_report(state: JobState, rows: list[ResultRow]) -> Outcome:
    """Write the report of a job's rows."""
    from pipeline.io import storage
    from pipeline.report import code_versions, results
    from pipeline.transfer import pruning, stages

    entries, (_, page) = stages.write_report(state, rows)
    pruned = pruning.describe_stale(results.read(state.job.root))
    return Outcome(
        bundles=_bundles(state),
        rows=rows,
        entries=entries,
        report=page,
        results=storage.join(state.job.root, results.FILE),
        notes=[*code_versions.describe_changes(state.trial_provenance), *pruned],
        warnings=list(results.duplicates(rows)),
        failed=stages.failures(state, rows),
    )


def _as_list(data: str | Path | Sequence[str | Path]) -> list[str]:
    """Return one place, or several, as a list."""
    return [str(data)] if isinstance(data, str | Path) else [str(place) for place in data]


def _bundles(state: JobState) -> dict[str, str]:
    """Return the URI of the bundle of each source that has one."""
    return {name: stage.bundle_uri for name, stage in state.sources.items() if stage.has_bundle}
