"""Which network to use for each target, and where its bundle is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.checkpoints.export import can_be_graph, usual_kind
from pipeline.core.contracts.technique_capabilities import keeps_modules
from pipeline.report import folds, matrix, plots, results, trial_folder
from pipeline.report.blocks import (
    DASH,
    MARKS,
    Block,
    Code,
    Heading,
    Table,
    Text,
    Value,
    format_interval,
)
from pipeline.report.matrix import LOSES, SCRATCH, WINS, EntryKey, MatrixEntry
from pipeline.report.results import ResultRow
from pipeline.report.stats import RunPredictions


def winner(
    entries: Sequence[MatrixEntry], candidates: Sequence[MatrixEntry] | None = None
) -> MatrixEntry | None:
    """Return the network that is best on the target's validation rows, scratch among them.

    It is one of those with the most labels, or one that uses none and trains nothing. Networks with
    fewer labels are tried to see what labels are worth: with few validation rows one of them may
    have the largest value by luck.

    Networks that a comparison has shown to be worse (after Holm's correction) are left out: one
    that loses against scratch, and the scratch network that another one wins against. Where that
    would leave out all of them, it leaves out none.

    A network of which a seed failed is left out where all seeds of another one finished: the mean
    of fewer seeds is noisier, and the largest of many means is often a noisy one. One that adapts
    to the test rows (``tent``) is left out where others do not: it has no validation value of its
    own.

    Args:
        entries: All entries of the target.
        candidates: Those to choose from; None: all.

    Returns:
        The entry, None where no network has a value on these rows.
    """
    among = entries if candidates is None else candidates
    validated = [entry for entry in among if not entry.is_baseline and entry.validation is not None]
    if not validated:
        return None
    validated = [entry for entry in validated if not entry.adapts_at_test] or validated
    with_labels = [candidate for candidate in validated if candidate.n_train]
    labels = matrix.most_labels_first(with_labels or validated)[0]
    validated = [
        candidate
        for candidate in validated
        if candidate.label_fraction == labels or _uses_no_label(candidate)
    ]
    largest_share = max(_finished(entry) for entry in validated)
    finished = [entry for entry in validated if _finished(entry) == largest_share]
    worse = _shown_to_be_worse(entries)
    remaining = [entry for entry in finished if entry.key not in worse] or finished
    return matrix.best_on_validation(remaining)


def _uses_no_label(entry: MatrixEntry) -> bool:
    """Return whether an entry uses no label and trains nothing (``zero_shot``).

    Its label fraction is 0, and it stands beside networks of any other. What combines trials uses
    the labels of these.
    """
    return entry.params_trained == 0 and not entry.n_train and not entry.combines_trials


def _shown_to_be_worse(entries: Sequence[MatrixEntry]) -> set[EntryKey]:
    keys = {entry.key for entry in entries if entry.verdict == LOSES and entry.survives}
    for entry in entries:
        if entry.verdict == WINS and entry.survives:
            keys.update(entry.compared_with[:1])
    return keys


def _finished(entry: MatrixEntry) -> float:
    """Return the share of an entry's seeds that finished."""
    return entry.n_seeds / max(entry.n_seeds + entry.n_failed, 1)


def with_bundle(entries: Sequence[MatrixEntry], rows: Sequence[ResultRow]) -> MatrixEntry | None:
    """Return the best network of which a bundle was kept (an ensemble has none)."""
    return winner(entries, [entry for entry in entries if bundle_of(entry, rows)])


def bundle_of(entry: MatrixEntry, rows: Sequence[ResultRow]) -> str | None:
    """Return the URI of the bundle of a network's best seed on validation rows.

    Where the target has folds a seed is judged by all of them, and the bundle is that of the first
    fold of which one was kept: validation rows of one fold may be easier than those of another.

    Args:
        entry: The network.
        rows: Results rows, those of a target's folds pooled (`folds.pool`).

    Returns:
        The URI, None where no bundle was kept (`fanout.keep_bundles`).
    """
    kept = [row for row in _validations(entry, rows) if row.bundle_uri]
    best = max(
        kept,
        key=lambda row: (row.value or 0.0) * (1 if row.higher_is_better else -1),
        default=None,
    )
    return best.bundle_uri if best else None


def _validations(entry: MatrixEntry, rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return the rows with the values that a network was chosen by, one for each seed that has one.

    A seed whose value is NaN has none: its network diverged. The metric is the first that was
    measured on validation rows. It is another one than the entry's where that needs a simulator,
    and so has values on test rows alone.
    """
    row_of_trial: dict[str, ResultRow] = {}
    for row in rows:
        if (
            row.trial_stage == "final"
            and row.split == results.VALIDATION
            and row.value is not None
            and not math.isnan(row.value)
            and matrix.entry_key(row) == entry.key
        ):
            row_of_trial.setdefault(row.trial_id, row)
    return list(row_of_trial.values())


def find_bundle(
    root: str,
    rows: Sequence[ResultRow],
    runs: dict[str, RunPredictions],
    target: str | None = None,
) -> str:
    """Return the URI of the bundle of a job's best network for a target.

    Args:
        root: The folder of the job, for messages.
        rows: Its results table.
        runs: Predictions on the test rows, by trial id.
        target: Name of the target; may be left out where the job has one.

    Raises:
        ValueError: There is no such target, several and none is named, or no bundle of its best
            network was kept.
    """
    current = [row for row in rows if row.current is not False and row.target]
    targets = sorted({row.target for row in current})
    if not targets:
        begun = len(trial_folder.find_all(root))
        if begun:
            raise ValueError(
                f"{root}: no results yet; trials that have begun: {begun}. Wait for the job to "
                "end. If it stopped, `onetomany report JOB.yaml` writes the table of the trials "
                "that finished"
            )
        raise ValueError(f"{root}: no trial has finished here; see onetomany run")
    if target is None and len(targets) > 1:
        raise ValueError(f"{root} has {len(targets)} targets: name one, --target {targets[0]}")
    name = targets[0] if target is None else target
    if name not in targets:
        raise ValueError(f"{root}: no target {name!r}; its targets are {', '.join(targets)}")
    of_target = [row for row in current if row.target == name]
    entries = [entry for entry in matrix.matrix_entries(current, runs) if entry.target == name]
    pooled, _ = folds.pool(of_target, {})
    best = winner(entries)
    if best is None:
        raise ValueError(f"{root}: no network of target {name} has a value on validation rows")
    uri = bundle_of(best, pooled)
    if uri is not None:
        return uri
    what = (
        f"{root}: the best network of target {name} is {best.source} with {best.technique} "
        f"({plots.labels_text(best.label_fraction)}), and "
    )
    other = with_bundle(entries, pooled)
    if other is None:
        raise ValueError(
            f"{what}its bundle was not kept; set fanout.keep_bundles: best and run the job again"
        )
    labels = plots.labels_text(other.label_fraction)
    raise ValueError(
        f"{what}it has no bundle; the best one that has is {other.source} with {other.technique} "
        f"({labels}): onetomany predict {bundle_of(other, pooled)} FILES"
    )


def blocks_of(
    root: str,
    groups: Mapping[str, Sequence[MatrixEntry]],
    rows: Sequence[ResultRow],
    decimals: Mapping[str, int],
) -> list[Block]:
    """Return what to use for each target, and the commands that use it."""
    in_folds = {row.target for row in rows if row.fold is not None}
    rows, _ = folds.pool(rows, {})
    lines: list[list[str | Value]] = []
    commands: list[str] = []
    for target, entries in groups.items():
        best = winner(entries)
        if best is None:
            continue
        usable = with_bundle(entries, rows)
        bundle = bundle_of(usable, rows) if usable else None
        notes = _notes_on_choice(best, entries)
        if usable and bundle:
            notes += _notes_on_bundle(best, usable, bundle, target in in_folds)
            commands += _commands(root, target, best, usable, bundle)
        value = format_interval(best.mean, best.low, best.high, decimals[target])
        lines.append(
            [
                target,
                _name(best, rows, notes),
                Value((value, best.metric)),
                gain_cell(best, decimals[target]),
                DASH if best.seconds is None else f"{best.seconds:.3g} s",
            ]
        )
    if not lines:
        return []
    head = ["Target", "Use", "On test rows", "Gain over scratch", "Training time"]
    text = (
        "For each target, of the networks that were trained with the most labels, the one that is "
        "best on the validation rows. Networks that are shown to be worse than scratch (after "
        "Holm's correction) are left out, unless all are. With few validation rows the choice is "
        "uncertain: onetomany advise weighs all comparisons. Values and gains are means over "
        "seeds, with 95 % intervals. A star (*) marks a gain that survives Holm's correction too. "
        "trials.csv beside this page lists every trial with its bundle."
    )
    if in_folds & groups.keys():
        text += (
            " A network of one fold was not trained on the fold's test rows: a job without folds "
            "gives one that is trained on more rows."
        )
    out: list[Block] = [Heading("What to use"), Text(text), Table(head, lines, 2)]
    if commands:
        out.append(Code("\n".join(commands)))
    return out


def _notes_on_choice(best: MatrixEntry, entries: Sequence[MatrixEntry]) -> list[str]:
    """Return what to know of the network that is best: fewer labels, seeds that failed."""
    notes: list[str] = []
    most_labels = matrix.most_labels_first(entries)[0]
    if best.label_fraction != most_labels and not _uses_no_label(best):
        labels = plots.labels_text(most_labels)
        notes.append(f"no network with {labels} has a value on validation rows")
    if best.n_failed:
        notes.append(f"{best.n_seeds} of {best.n_seeds + best.n_failed} seeds")
    return notes


def _notes_on_bundle(
    best: MatrixEntry, usable: MatrixEntry, bundle: str, is_in_folds: bool
) -> list[str]:
    """Return what to know of the bundle that the commands name.

    Args:
        best: The best network.
        usable: The best one of which a bundle was kept.
        bundle: The URI of that bundle.
        is_in_folds: Whether the target has folds.
    """
    notes: list[str] = []
    if usable is not best:
        labels = plots.labels_text(usable.label_fraction)
        notes.append(
            f"has no bundle: the commands take {usable.source} with {usable.technique}, {labels}"
        )
    if is_in_folds:
        notes.append("the commands take the network of one fold")
    technique = usable.registered_technique
    if technique is not None and keeps_modules(technique):
        as_graph = ", and --kind onnx writes it as a graph" if can_be_graph(bundle) else ""
        notes.append(
            f"{usable.technique} leaves modules of its own in the network: no class of another "
            f"library opens it, onetomany does{as_graph}"
        )
    return notes


def _commands(
    root: str, target: str, best: MatrixEntry, usable: MatrixEntry, bundle: str
) -> list[str]:
    """Return the commands that predict with a bundle, and export it."""
    place, option = (root, f" --target {target}") if usable is best else (bundle, "")
    return [
        f"onetomany predict {place} FILES{option} -o predictions/{target}",
        f"onetomany export {place} exported/{target}{option} --kind {usual_kind(bundle)}",
    ]


def gain_cell(entry: MatrixEntry, decimals: int) -> str | Value:
    """Return the table cell of a network's gain over scratch, with its verdict."""
    if entry.gain is None or entry.source == SCRATCH:
        return DASH
    gain = format_interval(entry.gain, entry.gain_low, entry.gain_high, decimals, "+")
    star = " *" if entry.survives else ""
    return Value((gain, f"{MARKS.get(entry.verdict, '')} {entry.verdict}{star}"), entry.verdict)


def _name(entry: MatrixEntry, rows: Sequence[ResultRow], notes: Sequence[str]) -> Value:
    labels = plots.labels_text(entry.label_fraction)
    counts = sorted({row.n_eval for row in _validations(entry, rows) if row.n_eval})
    chosen_on = f"chosen on {counts[0]:,} validation rows" if counts else ""
    if entry.source == SCRATCH:
        first, second = "training from scratch", f"{entry.backbone} · {labels}"
    else:
        first, second = f"{entry.source} with {entry.technique}", labels
    return Value(tuple(filter(None, (first, second, chosen_on, *notes))))
