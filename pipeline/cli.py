"""The command line: each command calls a function of `pipeline.api`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from pipeline import __version__, api
from pipeline.config import familiar_names, job_page, listing, plugins, registry, samples
from pipeline.config.schema import DataFormat, Job, JobError, OutputFormat, schema
from pipeline.config.yaml_loader import field_lines, load, with_lines
from pipeline.io import signals
from pipeline.io.ray_environment import prepare_ray
from pipeline.io.wording import plural


class Commands(TyperGroup):
    """The commands. For a name that other tools use (``train``), the error suggests ours."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        meant = familiar_names.COMMANDS.get(args[0])
        if meant:
            ctx.fail(f"No such command '{args[0]}'. Did you mean '{meant}'?")
        name, command, rest = super().resolve_command(ctx, args)
        params = command.params if command else []
        if command and "--help" in rest:
            for param in _without_flag_types(command.get_params(ctx)):
                param.secondary_opts = []  # two long names of an option leave no room for its text
        known = {option for param in params for option in param.opts}
        for option in (word.partition("=")[0] for word in rest):
            meant = familiar_names.OPTIONS.get(option)
            if meant in known and option not in known:
                ctx.fail(f"No such option: {option}. Did you mean {meant}?")
        return name, command, rest

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_flag_types(super().get_params(ctx))


def _without_flag_types(params: list[Any]) -> list[Any]:
    """Return parameters whose flags show no type: typer's <bool> looks as if they took a value."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 110)
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

JobFile = Annotated[Path, typer.Argument(help="The job file (YAML).", metavar="JOB")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override any field, e.g. --set fanout.seeds=5.", metavar="A.B=C"),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help="Run a part of the job: a target (with its sources), a source (with its targets), a "
        "modality or a domain (vision, text, speech, healthcare, robotics). May be given several "
        "times. The report is of the part; other results stay.",
        metavar="NAME",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Join this Ray cluster (auto, or host:port); default: the one in RAY_ADDRESS, or else "
        "start Ray on this machine."
    ),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(
        help="A .py file, a package's folder or an installed module that adds components. Its "
        "code is run.",
        metavar="PATH",
    ),
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show Ray's own messages too.")]
Wait = Annotated[
    bool | None,
    typer.Option(
        "--wait-for-resources/--no-wait-for-resources",
        show_default=False,
        help="Wait until the cluster has added the nodes that the job needs. With "
        "--no-wait-for-resources it uses the nodes that are there now. Default: wait if the "
        "cluster's autoscaler declares nodes.",
    ),
]
RemakeOption = Annotated[
    api.Remake,
    typer.Option(
        "--remake",
        help="changed: run again what other versions of the code or of libraries made (--dry-run "
        "lists it). none: keep it, marked with †.",
    ),
]


def _fail(message: str, code: int) -> typer.Exit:
    for line in message.splitlines():
        err.print(f"error: {line}", markup=False)
    return typer.Exit(code)


def _job(file: Path, overrides: list[str] | None, elsewhere: bool = False) -> Job:
    try:
        return load(file, overrides or [], elsewhere)
    except JobError as error:
        raise _fail(str(error), 2) from None


@contextlib.contextmanager
def _exit_codes(
    stopped: str = "error: stopped; the same command goes on from here",
    job: Path | None = None,
) -> Iterator[None]:
    """Turn errors into messages and exit codes.

    The code is 2 for bad input, 1 for a failure, 130 for Ctrl-C and 143 for SIGTERM. An error in a
    field of the job file names its line.

    Args:
        stopped: What is printed after Ctrl-C or SIGTERM.
        job: The job file.
    """
    from pipeline.io import storage, write_fence
    from pipeline.train import launch

    lines = {} if job is None else field_lines(job)  # before somebody edits the file

    def located(error: Exception) -> str:
        return with_lines(job, str(error), lines) if job else str(error)

    try:
        yield
    except KeyboardInterrupt:
        err.print(stopped, markup=False)
        raise typer.Exit(signals.exit_code()) from None
    except (write_fence.LostLeaseError, launch.ClusterError, launch.StageError) as error:
        raise _fail(located(error), 1) from None
    except (storage.StorageError, ValueError) as error:
        raise _fail(located(error), 2) from None


def _run_stages(
    file: Path,
    overrides: list[str] | None,
    address: str | None,
    verbose: bool,
    wait: bool | None,
    stages: tuple[api.Stage, ...],
    remake: api.Remake = "none",
    serve: int | None = None,
) -> None:
    """Run some stages of a job and print what they left."""
    job = _job(file, overrides)
    if not job.targets and "pretrain" not in stages:
        raise _fail(f"{file}: this job has no targets", 2)
    with _exit_codes("stopped; what is finished is kept, the same command goes on from here", file):
        done = api.run_stages(
            job,
            stages,
            address=address,
            wait=wait,
            remake=remake,
            verbose=verbose,
            serve=serve,
        )
    if "score" in stages:
        _print_scores(done.scores)
    elif done.report:
        _print_outcome(done)
    raise typer.Exit(1 if done.failed else 0)


def _with_only(overrides: list[str] | None, only: list[str] | None) -> list[str]:
    """Return the overrides of a job, with those of --only."""
    return [*(overrides or []), *([f"only={json.dumps(only)}"] if only else [])]


def _dry_run(
    file: Path, overrides: list[str] | None, wait: bool | None, remake: api.Remake
) -> None:
    """Print what a run would do, and what of the data it would refuse."""
    job = _job(file, overrides)
    from pipeline.train.progress import Progress
    from pipeline.transfer import dry_run, preflight, time_estimate, tracking

    stages: tuple[api.Stage, ...] = ("pretrain", "finetune")
    with (
        _exit_codes(job=file),
        Progress() as progress,
        api.open_job(job, stages, progress, wait, remake) as state,
    ):
        tracking.tracker_of(state.job)  # an error where its library is missing
        out.print("\n".join(dry_run.describe(state)), markup=False, soft_wrap=True)
        workloads: preflight.Workloads = {}
        for line in preflight.check_rows(state, workloads):
            out.print(line, markup=False, soft_wrap=True)
        for line in time_estimate.describe(state, workloads):
            out.print(line, markup=False, soft_wrap=True)


def _print_outcome(done: api.Outcome) -> None:
    """Print the table, where the report is, and what failed."""
    out.print(done.table())
    for line in done.notes:
        err.print(f"note: {line}", markup=False)
    for line in done.warnings:
        err.print(f"warning: {line}", markup=False)
    out.print(f"report: {done.report}  results: {done.results}", markup=False, soft_wrap=True)
    for line in done.failed:
        err.print(f"failed: {line}", markup=False)


def _prune(state: Any, dry_run: bool) -> None:
    """List the stale trials, and remove them unless ``dry_run``."""
    from pipeline.io import run_lock
    from pipeline.transfer import existing_trials, pruning

    note = state.progress.note
    with contextlib.nullcontext() if dry_run else run_lock.hold(state.job.root, note):
        stale = existing_trials.stale(state)
        for line in stale.lines():
            out.print(line, markup=False, soft_wrap=True)
        if not stale.is_empty and not dry_run:
            pruning.prune(state.job.root, stale)
            out.print("removed", markup=False)


def _print_scores(rows: list[dict[str, Any]]) -> None:
    """Print a table for each target: a line for each score, a column for each source."""
    from pipeline.transfer import scoring

    scores, titles = scoring.scores(), registry.entries("score")
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        sources = [f"{row['source']}\n{row['backbone']}" for row in of_target]
        table = Table("score", *sources, title=f"Transferability to {target}, best source first")
        table.caption = "↑ higher is better, ↓ lower; [95 % interval over rows]"
        for name, score in scores.items():
            arrow = "↑" if score.higher_is_better else "↓"
            values = [_format_score(row, name) for row in of_target]
            table.add_row(f"{titles[name].title or name} {arrow}", *values)
        out.print(table)
        reasons = {
            f"{titles[name].title or name} of {row['source']}: {reason}"
            for row in of_target
            for name, reason in row["undefined"].items()
        }
        for reason in sorted(reasons):
            out.print(f"undefined: {reason}", markup=False, soft_wrap=True)


def _format_score(row: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "undefined"
    low, high = row["intervals"].get(name, (None, None))
    return f"{row[name]:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")


@app.command()
def init(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders or globs: CSV, JSON Lines, Parquet, a folder with a subfolder of "
            "images, recordings or texts (.txt) for each class, or a table that names images or "
            "recordings.",
            metavar="FOLDER|FILES...",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            help="The job file to write; default: named after the data, in the current folder.",
            metavar="JOB",
        ),
    ] = "",
    target_column: Annotated[
        str | None,
        typer.Option(help="Column to predict; default: the most plausible one.", metavar="NAME"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Learn classes or a number from --target-column; default: decided by its values.",
            metavar="classification|regression",
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(
            help="A checkpoint to start from: the folder of a bundle or of a Hugging Face model, "
            "or hf-hub:NAME, timm-hub:NAME; default: a network that learns from the data.",
            metavar="PLACE",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the job file.")] = False,
) -> None:
    """Look at data and write a first job for them, with a comment on every line.

    It says what was found (classes, lengths, splits, patients or speakers that must stay together)
    and why each choice was made. Tables of features, and tables that name files, must be converted
    first. For those it prints the `prepare` command.

    Example: `onetomany init reviews.csv --target-column stars`
    """
    with _exit_codes():
        lines = api.init(
            data,
            output,
            target_column=target_column,
            objective=objective,
            sources=source or (),
            force=force,
        )
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


@app.command()
def run(
    job: JobFile,
    set_: Set = None,
    only: Only = None,
    address: Address = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Print stages and trials, check the data, and estimate the time from a few "
            "measured steps. Data that must be converted (texts into tokens) are converted."
        ),
    ] = False,
    wait_for_resources: Wait = None,
    verbose: Verbose = False,
    remake: RemakeOption = "none",
    serve: Annotated[
        int | None,
        typer.Option(
            help="Show trials and learning curves on a local page while the job runs; 0: any free "
            "port. Other users of this machine can read it.",
            metavar="PORT",
            min=0,
            max=65535,
        ),
    ] = None,
) -> None:
    """Run a whole job: pretrain, fine-tune, report. What is done already is not done again.

    The page of `--serve PORT` is `http://127.0.0.1:PORT`. From another machine, first run
    `ssh -L PORT:127.0.0.1:PORT HOST`.

    Example: `onetomany run jobs/quickstart.yaml`
    """
    fields = _with_only(set_, only)
    if dry_run:
        return _dry_run(job, fields, wait_for_resources, remake)
    stages: tuple[api.Stage, ...] = ("pretrain", "finetune")
    _run_stages(job, fields, address, verbose, wait_for_resources, stages, remake, serve)


@app.command()
def quickstart(
    only: Only = None,
    set_: Set = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Print what would be run and at what cost; train and report nothing."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Run the small job that comes with this program: five domains on samples of real data.

    Job and samples are copied to the folder `quickstart`, where you may change them. Results are in
    `runs/quickstart`. It takes about four minutes on two CPU cores; `--only vision` takes one.
    """
    job = samples.quickstart()
    if not dry_run:
        job = samples.copy_quickstart(Path("quickstart"))
        out.print(f"job: {job}", markup=False, soft_wrap=True)
    run(job, set_, only, dry_run=dry_run, verbose=verbose)


@app.command()
def pretrain(
    job: JobFile,
    set_: Set = None,
    only: Only = None,
    address: Address = None,
    wait_for_resources: Wait = None,
    verbose: Verbose = False,
    remake: RemakeOption = "none",
) -> None:
    """Train the sources of a job.

    Each becomes a bundle: a folder with the weights and all that is needed to use them.
    """
    _run_stages(
        job, _with_only(set_, only), address, verbose, wait_for_resources, ("pretrain",), remake
    )


@app.command()
def score(
    job: JobFile,
    set_: Set = None,
    only: Only = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Rank the pretrained sources for each target by transferability scores (LogME, LEEP, ...),
    without training.

    The sources must be trained already (`onetomany pretrain JOB`). The best source comes first, by
    the score that `fanout.select.score` names (`logme` if it names none).

    Example: `onetomany score jobs/quickstart.yaml`
    """
    _run_stages(job, _with_only(set_, only), address, verbose, None, ("score",))


@app.command()
def finetune(
    job: JobFile,
    set_: Set = None,
    only: Only = None,
    address: Address = None,
    wait_for_resources: Wait = None,
    verbose: Verbose = False,
    remake: RemakeOption = "none",
) -> None:
    """Fine-tune on every target from the pretrained sources, then report.

    The sources must be trained already (`pretrain`).
    """
    _run_stages(
        job, _with_only(set_, only), address, verbose, wait_for_resources, ("finetune",), remake
    )


@app.command()
def report(
    job: JobFile,
    set_: Set = None,
    prune_stale: Annotated[
        bool,
        typer.Option(
            "--prune-stale",
            help="Also remove trials that the job no longer has. Trials from which another job in "
            "the same storage starts are kept.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="With --prune-stale: list the trials, remove nothing."),
    ] = False,
) -> None:
    """Print the table of results, and write report.html and report.md again. Nothing is trained."""
    spec = _job(job, set_)
    if dry_run and not prune_stale:
        raise _fail("--dry-run lists what --prune-stale would remove: give both", 2)
    from pipeline.train.progress import Progress
    from pipeline.transfer import stages

    with _exit_codes(job=job), api.open_job(spec, (), Progress()) as state:
        if prune_stale:
            _prune(state, dry_run)
            if dry_run:
                return
        rows = stages.collect_existing_rows(state)
        if not rows:
            raise _fail(f"{spec.root}: no results of this job yet; run it first", 1)
        done = api.write_report(state, rows)
    _print_outcome(done)
    raise typer.Exit(1 if done.failed else 0)


@app.command()
def advise(
    places: Annotated[
        list[str],
        typer.Argument(
            help="Job files, folders of jobs, or their results.parquet; local or s3://.",
            metavar="JOB|RESULTS...",
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Advise on this target; default: on all.", metavar="NAME"),
    ] = None,
    set_: Set = None,
) -> None:
    """Say which source and technique each target should take, and what to try next.

    It reads the results of one or several jobs, and trains nothing. There are three verdicts:

    - "use": the measured gain over scratch and the expected gain lie above zero, each with its
      whole 95 % interval. The expected gain is the measured one after a correction for luck.

    - "train from scratch": both lie below zero for every technique.

    - "not enough evidence": all other cases. A gain needs two seeds.

    Pairs of source and technique that were not tried get a predicted gain. So do the targets of a
    job that has not run.

    Example: `onetomany advise jobs/quickstart.yaml runs/other --target shoes`
    """
    from pipeline.report.advice import METHOD

    jobs = [
        _job(Path(place), set_) if place.endswith((".yaml", ".yml")) else place for place in places
    ]
    with _exit_codes():
        all_advice = api.advise(jobs, target)
    for advice in all_advice:
        out.print("\n".join(advice.lines()), markup=False, soft_wrap=True)
    out.print(METHOD, markup=False, soft_wrap=True)


BundleOrJob = Annotated[
    str,
    typer.Argument(
        help="A fine-tuned bundle (folder or s3://). Or a job (file or folder): then the network "
        "is taken that the report says to use for --target.",
        metavar="BUNDLE|JOB",
    ),
]
NewData = Annotated[list[str], typer.Argument(help="Files, folders or globs.", metavar="FILES...")]
OutputFolder = Annotated[str, typer.Option("-o", "--output", help="The folder to write to.")]
TargetName = Annotated[
    str | None,
    typer.Option(help="The target whose network is used, if the job has several.", metavar="NAME"),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="The column that has a role (image, text, ...), if it has another name than in "
        "training.",
        metavar="ROLE=NAME",
    ),
]
ReadAs = Annotated[
    DataFormat,
    typer.Option("--input-format", help="How FILES are read; auto: by their names."),
]
WriteAs = Annotated[OutputFormat, typer.Option("--format", help="The format to write.")]
Keep = Annotated[
    str | None,
    typer.Option(
        help="Further columns to copy into the output (as input_NAME if a prediction column has "
        "that name).",
        metavar="A,B",
    ),
]


def _new_row_arguments(
    column: list[str] | None, keep: str | None, read_as: DataFormat, plugin: list[str] | None
) -> dict[str, Any]:
    """Return the arguments that the functions of `predict` and `embed` share."""
    wrong = [text for text in column or () if not all(text.partition("="))]
    if wrong:
        raise _fail(f"--column {wrong[0]}: write ROLE=NAME, e.g. image=picture", 2)
    return {
        "columns": dict(text.split("=", 1) for text in column or ()),
        "keep": [name.strip() for name in (keep or "").split(",") if name.strip()],
        "input_format": read_as,
        "plugins": plugin or (),
    }


@app.command()
def predict(
    bundle: BundleOrJob,
    data: NewData,
    output: OutputFolder,
    target: TargetName = None,
    column: Columns = None,
    input_format: ReadAs = "auto",
    format: WriteAs = "parquet",
    keep: Keep = None,
    draw: Annotated[
        bool,
        typer.Option("--draw", help="Also draw boxes and masks on the images, in OUTPUT/_drawn."),
    ] = False,
    srt: Annotated[
        bool,
        typer.Option(
            "--srt",
            help="Also write subtitles for each recording of speech, in OUTPUT/_subtitles.",
        ),
    ] = False,
    plugin: Plugin = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Predict new files: classes with probabilities, boxes, masks, entities, texts with times, ...

    The output has a row for each row or file, in the same order. It also has the row's id, its
    text, its `file` (if a folder was given), and the columns that `--keep` names. The folder opens
    as one data set: `pandas.read_parquet(OUTPUT)`. In Parquet, `probabilities` is a list in the
    order of the classes, which is printed and is in the files' metadata. In CSV and JSON Lines each
    probability has the name of its class.

    Example: `onetomany predict runs/quickstart photos/ --target clothing -o out`
    """
    more = _new_row_arguments(column, keep, input_format, plugin)
    with _exit_codes():
        written = api.predict(
            bundle,
            data,
            output,
            target=target,
            format=format,
            srt=srt,
            draw=draw,
            address=address,
            verbose=verbose,
            **more,
        )
    out.print(written, markup=False, soft_wrap=True)


@app.command()
def embed(
    bundle: BundleOrJob,
    data: NewData,
    output: OutputFolder,
    target: TargetName = None,
    column: Columns = None,
    input_format: ReadAs = "auto",
    format: WriteAs = "parquet",
    keep: Keep = None,
    plugin: Plugin = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Write a vector of features for each row of new files, for search, clustering or a model of
    your own.

    Bundles of sources can be used too. Ids and copied columns are as in `predict`.

    Example: `onetomany embed runs/quickstart photos/ --target clothing -o features`
    """
    more = _new_row_arguments(column, keep, input_format, plugin)
    with _exit_codes():
        written = api.embed_files(
            bundle,
            data,
            output,
            target=target,
            format=format,
            address=address,
            verbose=verbose,
            **more,
        )
    out.print(written, markup=False, soft_wrap=True)


EXPORT_KINDS = (
    "bundle: a verified copy; hugging-face: a folder for transformers' Auto classes or timm; "
    "lerobot: a policy for LeRobot, or prepared episodes as its data set; onnx: a graph for "
    "onnxruntime (extra onnx); peft: an adapter alone; sentence-transformers: texts to vectors; "
    "state-dict: one .safetensors or .pt file; torch-export: a graph for torch.export.load."
)


@app.command()
def export(
    bundle: Annotated[
        str,
        typer.Argument(
            help="A bundle (folder or s3://). Or a job (file or folder), for the network that its "
            "report says to use for --target. For kind lerobot: a folder of prepared episodes.",
            metavar="BUNDLE|JOB",
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="The folder to write, or file of a state dict.", metavar="OUTPUT")
    ],
    target: TargetName = None,
    kind: Annotated[str, typer.Option(help=EXPORT_KINDS)] = "bundle",
    backbone_only: Annotated[
        bool,
        typer.Option(help="Leave the head out, and use the model library's parameter names."),
    ] = False,
    fps: Annotated[
        float | None,
        typer.Option(help="lerobot: steps per second, if prepared episodes do not say it."),
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Write a bundle in a form that other programs open.

    `--kind` names the form. What is written is compared with the bundle on random rows, and refused
    if it gives other numbers.

    A `hugging-face` folder of a timm network is opened by
    `timm.create_model("local-dir:OUTPUT", pretrained=True)`.

    Other `hugging-face` folders are opened by transformers' Auto classes. If timm or transformers
    has no class for the head, `hugging-face` adds the code that loads it
    (`from classifier import load`), and `state-dict` a file `NAME_classifier.py`. `onnx` and
    `torch-export` add a description of how rows are prepared, and code that runs the graph.

    Example: `onetomany export runs/quickstart model --target clothing --kind onnx`
    """
    with _exit_codes():
        text = api.export(
            bundle,
            output,
            target=target,
            kind=kind,
            backbone_only=backbone_only,
            fps=fps,
            plugins=plugin or (),
        )
    out.print(text, markup=False, soft_wrap=True)


@app.command()
def push(
    place: Annotated[
        str, typer.Argument(help="A bundle, or a folder that export wrote.", metavar="BUNDLE")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="hf-hub:USER/NAME, a repository of the Hugging Face hub, or a new folder.",
            metavar="PLACE",
        ),
    ],
    licence: Annotated[
        str,
        typer.Option("--licence", help="Licence of the weights, by its name on hubs: apache-2.0"),
    ] = "unknown",
    private: Annotated[
        bool, typer.Option(help="If the repository is new, make it private.")
    ] = False,
) -> None:
    """Put a bundle or an export on the Hugging Face hub or into a folder, with a model card.

    The card (README.md) has the metrics with their intervals, how the network was made, what is
    known of data and licence, and limits. Paths of this machine are not pushed. The hub's token
    comes from `hf auth login` or HF_TOKEN.
    """
    with _exit_codes():
        text = api.push(place, to, licence=licence, private=private)
    out.print(text, markup=False, soft_wrap=True)


@app.command()
def prepare(
    name: Annotated[
        str | None,
        typer.Argument(
            help="The format: imagenet, coco, librispeech, text, csv, mimic3, ...; see --list.",
            metavar="NAME",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Argument(
            help="The raw files (not a source of a job): a folder, archive or file, local, s3://, "
            "https:// or hf://.",
            metavar="SOURCE",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Folder for the Parquet files, local or s3://."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An option of the format; prepare NAME --list shows them.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            help="Images: shrink the shorter side to this many pixels. Smaller images stay as they "
            "are; the others become JPEG."
        ),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="Images: write all of them as JPEG with this quality (1 to 100)."),
    ] = None,
    rows_per_part: Annotated[
        int | None,
        typer.Option(help="Images, recordings: rows in a Parquet file; default: by --part-mb."),
    ] = None,
    part_mb: Annotated[
        float | None,
        typer.Option(help="MiB of images, recordings or text in a Parquet file; default: 96."),
    ] = None,
    max_bad: Annotated[
        float,
        typer.Option(
            help="Share of rows that may be broken. One broken row is always allowed, unless this "
            "is 0."
        ),
    ] = 0.01,
    list_: Annotated[
        bool,
        typer.Option(
            "--list", help="List the formats; with NAME, explain that one and its options."
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(help="Compare every file of --output with its checksum; write nothing."),
    ] = False,
    plugin: Plugin = None,
    address: Address = None,
    verbose: Verbose = False,
) -> None:
    """Turn raw files (as published) into Parquet that a job reads. `--list` lists the formats.

    Example: `onetomany prepare imagefolder photos -o prepared`

    One format alone, with its options: `onetomany prepare coco --list`
    """
    from pipeline.prepare.engine import importing

    with _exit_codes():
        plugins.use(plugin or ())
        if list_:
            return out.print(importing.describe(name), markup=False, soft_wrap=True)
        if verify and output:
            from pipeline.prepare.engine import write

            summary = write.verify(output)
            parts = plural(len(summary["files"]), "part")
            out.print(
                f"{output}: {parts} checked; nothing has changed since it was written",
                markup=False,
                soft_wrap=True,
            )
            return
        if not (name and source and output):
            raise ValueError(
                "write: onetomany prepare NAME SOURCE -o OUTPUT (--list shows the names), or "
                "--verify -o OUTPUT"
            )
        written = api.prepare_data(
            name,
            source,
            output,
            options=set_ or (),
            resize=resize,
            quality=quality,
            rows_per_part=rows_per_part,
            part_mb=part_mb,
            max_bad=max_bad,
            plugins=plugin or (),
            address=address,
            verbose=verbose,
        )
    out.print(written, markup=False, soft_wrap=True)


@app.command()
def submit(
    job: JobFile,
    address: Annotated[
        str | None,
        typer.Option(
            help="Job API of the cluster, e.g. http://head:8265. Needed unless --dry-run."
        ),
    ] = None,
    set_: Set = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            help="A variable of the job's environment: NAME (its value here), or NAME=VALUE. It is "
            "visible in the dashboard."
        ),
    ] = None,
    secrets_in_clear: Annotated[
        bool,
        typer.Option(
            "--secrets-in-clear",
            help="Let --env pass keys and tokens. Everyone who can reach the cluster can then read "
            "them.",
        ),
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="A further file, folder or glob in the job file's folder to send. What the job "
            "names is sent anyway."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Glob of files not to send. The file .onetomanyignore can list such globs too."
        ),
    ] = None,
    submission_id: Annotated[
        str | None, typer.Option(help="Name of the submission; default: a new one.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow/--no-follow",
            show_default=False,
            help="Follow the log, and exit with the job's own code; this is the default. With "
            "--no-follow the command ends when the job is sent.",
        ),
    ] = True,
    wait_for_resources: Wait = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="List the files that would be sent and their sizes; send nothing."
        ),
    ] = False,
) -> None:
    """Run a job on a Ray cluster, and follow its log.

    It sends the job file, the files that the job names by relative paths, and this program's code.
    `--dry-run` lists them.

    Example: `onetomany submit vision.yaml --address http://head:8265`
    """
    _job(job, set_, elsewhere=True)
    from cluster.package import SubmitError, collect
    from cluster.submit import parse_env
    from cluster.submit import submit as send
    from pipeline.config.yaml_loader import relative_places

    if address is None and not dry_run:
        raise _fail(
            "--address is needed: the job API of the cluster, e.g. http://head:8265 "
            "(--dry-run does without)",
            2,
        )
    shipped = {
        "named": relative_places(job, set_ or []),
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
    }
    try:
        if dry_run:
            out.print("\n".join(collect(job, **shipped).listing()), markup=False, soft_wrap=True)
            return
        code = send(
            job,
            str(address),
            overrides=set_ or [],
            env=parse_env(env or []),
            follow=follow,
            submission_id=submission_id,
            secrets_in_clear=secrets_in_clear,
            wait=wait_for_resources,
            **shipped,
        )
    except SubmitError as error:
        raise _fail(str(error), 1) from None
    raise typer.Exit(code)


@app.command()
def doctor(
    job: Annotated[
        Path | None,
        typer.Argument(help="Also check this job's data, storage and resources.", metavar="[JOB]"),
    ] = None,
    set_: Set = None,
    address: Address = None,
) -> None:
    """Check that this machine or cluster is ready, and say what is missing.

    Example: `onetomany doctor jobs/quickstart.yaml`
    """
    from pipeline.transfer.doctor import run_checks

    lines = run_checks(_job(job, set_) if job else None, address)
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for line in lines:
        table.add_row(line.mark, line.what, line.found, line.advice)
    out.print(table)
    raise typer.Exit(1 if any(line.mark == "FAIL" for line in lines) else 0)


def _add_listing(command: str, kind: str) -> Callable[..., None]:
    """Add the command that lists and explains the components of a kind."""

    @app.command(
        command,
        help=f"List the {command}, or explain one of them.",
        rich_help_panel="What a job may name",
    )
    def show(
        name: Annotated[
            str | None,
            typer.Argument(
                help="Explain this one: what it does, options, defaults.", metavar="[NAME]"
            ),
        ] = None,
        plugin: Plugin = None,
        list_: Annotated[bool, typer.Option("--list", hidden=True)] = False,  # as prepare has it
    ) -> None:
        with _exit_codes():
            plugins.use(plugin or ())
            if name:
                out.print(listing.describe(kind, name), markup=False, soft_wrap=True)
                return
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(no_wrap=True)
            table.add_column()
            for row in listing.names(kind):
                table.add_row(*map(escape, row))
        out.print(table)

    return show


LISTINGS = [_add_listing(command, kind) for command, kind in listing.KINDS.items()]
"""The commands that list components. Making the list registers them; nothing else reads it."""


@app.command("schema")
def print_schema(
    plugin: Plugin = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown page for people instead.")
    ] = False,
) -> None:
    """Print every field of a job file, its default and meaning, as a JSON Schema for editors.

    Example: `onetomany schema > schema.json`. A job file that begins with the comment
    `# yaml-language-server: $schema=schema.json` is then checked by editors while you write it.
    """
    with _exit_codes():
        plugins.use(plugin or ())
    if markdown:
        sys.stdout.write(job_page.page())
        return
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")


@app.command()
def version() -> None:
    """Print this program's version."""
    sys.stdout.write(__version__ + "\n")


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print this program's version.",
        ),
    ] = False,
) -> None:
    """Pretrain backbones on large source corpora, fine-tune them on many target tasks, and show
    what each gained over training from scratch: all from one job file.

    Start with `onetomany init YOUR_DATA`, or with `onetomany quickstart`.
    """


def main() -> None:
    plugins.ignore_inherited()
    prepare_ray()
    signals.install()
    app()


if __name__ == "__main__":
    main()
