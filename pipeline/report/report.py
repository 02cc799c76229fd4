"""The report of a job: report.md and report.html.

It shows where transfer paid, where it did not, and where the trials do not allow a conclusion. The
entries come from ``pipeline.report.matrix`` and the figures from ``pipeline.report.plots``;
``pipeline.report.blocks`` writes Markdown and HTML. This module decides what the report contains.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import provenance, registry
from pipeline.config.schema import hyper_parameter_text
from pipeline.io import storage
from pipeline.io.wording import plural
from pipeline.report import (
    blocks,
    code_versions,
    folds,
    gains,
    per_label,
    plots,
    results,
    rollouts,
    score_audit,
    shift,
    stats,
    subgroups,
    winners,
    without_labels,
)
from pipeline.report.blocks import (
    Block,
    Bullets,
    Code,
    Details,
    Figure,
    Heading,
    KeyFigures,
    Text,
    Value,
)
from pipeline.report.matrix import (
    BASELINE,
    FAILED,
    LOSES,
    MIN_SEEDS,
    NOT_SHOWN,
    REFERENCE,
    SCRATCH,
    SEARCH_NOISE,
    SIGNIFICANT,
    SINGLE_SEED,
    TOO_FEW,
    UNCOMPARED,
    WINS,
    EntryKey,
    GainEstimate,
    MatrixEntry,
    by_target,
    by_value,
    comparable_across_backbones,
    decimals_by_target,
    fraction_order,
    has_several_backbones,
    matrix_entries,
    most_labels_first,
)
from pipeline.report.results import ResultRow
from pipeline.report.shift import Shift
from pipeline.report.source_scores import PairScores, SelectionScore
from pipeline.report.source_summary import SourceSummary
from pipeline.report.trial_record import CurvePoint

__all__ = ["MatrixEntry", "ReportInputs", "matrix_entries", "write"]

_DASH = blocks.DASH
UNJUDGED = (TOO_FEW, SINGLE_SEED, SEARCH_NOISE, UNCOMPARED)
"""Words in place of a verdict where a comparison has none."""
MAX_NAMED_ENTRIES = 12
SEARCH_SENTENCES = (
    "Where hyper-parameters were searched, some settings were tried again with further seeds. They "
    "show how much the choice itself varies, and intervals of gains include that: in simulated "
    "comparisons without a true difference 3 to 5 % were won or lost. If the settings were tried "
    "with one seed alone, or the search was judged by another metric than the tested one, it is "
    "not known how much the choice varies. In the simulated comparisons 6 to 12 % of such "
    "intervals excluded zero, so the verdict is then search noise in place of a win or a loss."
)


# ---------------------------------------------------------------- the written report


@dataclass(frozen=True)
class ReportInputs:
    """What a report is made of."""

    job_name: str
    entries: Sequence[MatrixEntry]
    """The entries of the matrix."""
    rows: Sequence[ResultRow]
    """Results rows. Failures and totals are computed from them."""
    curves: Mapping[str, Sequence[CurvePoint]]
    """Validations of each trial, by its id."""
    pretraining: Sequence[SourceSummary]
    splits: dict[str, str]
    """Where the splits of each target come from."""
    notes: Sequence[str]
    """Sentences on what was found in the data."""
    versions: dict[str, str]
    """What identifies the job apart from the libraries, such as its hash. The versions of libraries
    are those that each trial ran with.
    """
    runs: dict[str, stats.RunPredictions] = field(default_factory=dict[str, stats.RunPredictions])
    """Test predictions by trial id, for the tables of classes, labels and subgroups."""
    code_notes: Sequence[str] = ()
    """Sentences on the trials that were made by other code or versions."""
    scores: Mapping[str, SelectionScore] = field(default_factory=dict[str, SelectionScore])
    """Score of each ``source|target``, also of sources that were left out because of theirs. Scores
    of trials are in ``rows`` too.
    """
    source_scores: Mapping[str, PairScores] = field(default_factory=dict[str, PairScores])
    """All transferability scores of each ``source|target``."""
    modalities: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of each target's modality."""
    left_out: Sequence[str] = ()
    """A line for each target that could not be prepared, and for test rows that were left out."""


def write(root_uri: str, inputs: ReportInputs) -> tuple[str, str]:
    """Write report.md and report.html into the folder of a job, each atomically.

    Returns:
        The URIs of report.md and report.html.
    """
    content = _content(root_uri, inputs)
    title = _headline(inputs.entries)
    markdown = blocks.markdown(f"{inputs.job_name}: {title[0].lower()}{title[1:]}", content)
    page = blocks.html_page(title, f"One to Many: job {inputs.job_name}", content)
    uris = storage.join(root_uri, "report.md"), storage.join(root_uri, "report.html")
    storage.write_bytes(uris[0], markdown.encode())
    storage.write_bytes(uris[1], page.encode())
    return uris


def _content(root_uri: str, inputs: ReportInputs) -> list[Block]:
    """Return the blocks of the report in their order."""
    entries, rows, splits = inputs.entries, inputs.rows, inputs.splits
    groups, decimals = by_target(entries), decimals_by_target(entries)
    comparable = comparable_across_backbones(entries)
    pooled = folds.pool(rows, inputs.runs)
    by_key = {entry.key: entry for entry in comparable}
    targets = [
        block
        for target, group in groups.items()
        for block in _target_blocks(inputs, target, group, by_key, decimals[target], pooled)
    ]
    return [
        *gains.warnings(by_target(comparable), decimals),
        *winners.blocks_of(root_uri, groups, rows, decimals),
        *_summary_blocks(entries, groups, rows, decimals),
        *gains.heat_maps(comparable, decimals),
        *_gain_blocks(groups),
        *without_labels.blocks_of(entries, pooled[1], decimals),
        *targets,
        *_missing_blocks(entries, rows, inputs.scores, inputs.left_out, inputs.notes),
        *_cost_blocks(entries, rows, inputs.pretraining),
        *gains.cost_figures(by_target(comparable), decimals),
        *_all_score_blocks(inputs, comparable, decimals),
        *shift.blocks_of(_shifts(inputs.source_scores), registry.names("technique")),
        *_pretraining_blocks(inputs.pretraining),
        *_split_blocks({name: text for name, text in splits.items() if name not in groups}),
        *_method_blocks(entries, rows, inputs.versions, inputs.code_notes),
        *_word_blocks(),
    ]


def _all_score_blocks(
    inputs: ReportInputs, comparable: Sequence[MatrixEntry], decimals: Mapping[str, int]
) -> list[Block]:
    """Return the sections on transferability scores, and what they were worth."""
    rows, source_scores = inputs.rows, inputs.source_scores
    cut = {(row.target, row.label_fraction) for row in rows if row.is_cut_by_budget}
    values = known_scores(rows, inputs.scores) | gains.all_scores(source_scores)
    # of a target with one source shift is measured alone
    scored = {name: pair for name, pair in source_scores.items() if pair.scores}
    return [
        *_score_blocks(rows, inputs.scores),
        *score_audit.blocks_of(inputs.entries, scored, inputs.modalities, cut),
        *gains.score_figures(comparable, values, decimals),
    ]


def _count_verdicts(entries: Iterable[MatrixEntry]) -> Counter[str]:
    """Return how many entries with a source have each verdict; failed ones of scratch count too."""
    return Counter(
        entry.verdict for entry in entries if entry.source != SCRATCH or entry.verdict == FAILED
    )


def _count_survivors(entries: Iterable[MatrixEntry]) -> Counter[str]:
    """Return how many wins and losses remain after Holm's correction."""
    return Counter(entry.verdict for entry in entries if entry.transfers and entry.survives)


def _headline(entries: Sequence[MatrixEntry]) -> str:
    """Return the title: the wins and losses that survive Holm's correction."""
    compared = sum(entry.transfers for entry in entries)
    if not compared:
        return _headline_without_comparisons(entries)
    surviving = _count_survivors(entries)
    lost = f", and lost in {surviving[LOSES]}" if surviving[LOSES] else ", and lost in none"
    return f"Transfer paid in {surviving[WINS]} of {plural(compared, 'comparison')}{lost}"


def _headline_without_comparisons(entries: Sequence[MatrixEntry]) -> str:
    """Return the title of a report without comparisons: why nothing was won or lost."""
    if entries and all(entry.verdict == FAILED for entry in entries):
        return "No trial finished"
    if any(entry.verdict == TOO_FEW for entry in entries):
        return "No verdict: there are too few test rows"
    if any(entry.paired_seeds == 1 for entry in entries):
        return f"No verdict: one seed cannot tell a gain from luck, {MIN_SEEDS} are needed"
    if any(entry.verdict == SEARCH_NOISE for entry in entries):
        return "No verdict: it is not known how much the search itself varies"
    if any(entry.source != SCRATCH and entry.gain is not None for entry in entries):
        return "No verdict: test predictions are missing"
    return "Nothing to compare with scratch yet"


def _describe_correction(entries: Sequence[MatrixEntry]) -> str:
    """Return a sentence on what the headline counts."""
    verdicts, surviving = _count_verdicts(entries), _count_survivors(entries)
    family = sum(entry.gain_p_holm is not None for entry in entries)
    return (
        "The headline counts only those that survive Holm's correction for all "
        f"{plural(family, 'comparison')} of the job (corrected p below "
        f"{SIGNIFICANT}, marked *): {surviving[WINS]} of "
        f"{plural(verdicts[WINS], 'win')} and {surviving[LOSES]} of {verdicts[LOSES]} "
        f"loss{'' if verdicts[LOSES] == 1 else 'es'} by the plain interval."
    )


def _summary_blocks(
    entries: Sequence[MatrixEntry],
    groups: dict[str, list[MatrixEntry]],
    rows: Sequence[ResultRow],
    decimals: dict[str, int],
) -> list[Block]:
    """Return what a comparison is, how many were won and lost, and each target's largest gain."""
    out: list[Block] = []
    if any(entry.transfers for entry in entries):
        out.append(
            Text(
                "A comparison is one source, technique and label fraction on one target "
                "against training from scratch: the same backbone, labels, seeds and search "
                "budget, with random weights at the start. It is won or lost where the 95 % "
                f"interval of the gain excludes zero. {_describe_correction(entries)}",
                "lead",
            )
        )
    out.append(_verdict_counts(entries, rows))
    if groups:
        out += [
            _largest_gains(groups, decimals),
            Text(
                "Wins and losses of this table are by the plain interval. The largest of several "
                "gains is also the luckiest: on average it is a little too large. All gains are "
                "below.",
                "note",
            ),
        ]
    return out


def _verdict_counts(entries: Sequence[MatrixEntry], rows: Sequence[ResultRow]) -> KeyFigures:
    """Return the number of comparisons with each verdict, and of trials."""
    verdicts, surviving = _count_verdicts(entries), _count_survivors(entries)
    counts = [(str(surviving[WINS]), "won", WINS), (str(surviving[LOSES]), "lost", LOSES)]
    corrected_away = verdicts[WINS] + verdicts[LOSES] - surviving[WINS] - surviving[LOSES]
    if corrected_away:
        counts.append((str(corrected_away), "by the plain interval alone", NOT_SHOWN))
    counts.append((str(verdicts[NOT_SHOWN]), "not shown", NOT_SHOWN))
    others = (*((name, name) for name in UNJUDGED), (FAILED, "without a result"))
    counts += [(str(verdicts[name]), what, name) for name, what in others if verdicts[name]]
    trials = {(row.trial_id, row.trial_stage) for row in rows}
    return KeyFigures([*counts, (str(len(trials)), "trials", "")])


def _largest_gains(
    groups: Mapping[str, Sequence[MatrixEntry]], decimals: Mapping[str, int]
) -> blocks.Table:
    """Return the largest gain of each target, and how many comparisons have each verdict."""
    body: list[list[str | Value]] = []
    for target, group in groups.items():
        verdicts = _count_verdicts(group)
        numbers = [
            *(verdicts[name] for name in (WINS, LOSES, NOT_SHOWN)),
            sum(verdicts[name] for name in UNJUDGED),
            sum(entry.n_failed for entry in group),
        ]
        gain = _largest_gain(group, decimals[target])
        body.append([target, _metric(group) or _DASH, gain, *map(str, numbers)])
    head = [
        "Target",
        "Metric",
        "Largest gain over scratch",
        "Wins",
        "Loses",
        "Not shown",
        "No verdict",
        "Failed trials",
    ]
    return blocks.Table(head, body, 2)


def _largest_gain(group: Sequence[MatrixEntry], decimals: int) -> str | Value:
    """Return the largest gain of a target with its interval, the entry that has it, its verdict."""
    compared = [entry for entry in group if entry.gain is not None and entry.source != SCRATCH]
    if not compared:
        return _DASH
    best = max(compared, key=lambda entry: entry.gain or 0)
    lines = (
        blocks.format_interval(best.gain, best.gain_low, best.gain_high, decimals, "+"),
        f"{best.source} · {best.technique} · {plots.fraction_label(best.label_fraction)}",
        _verdict_words(best.verdict, best.survives),
    )
    return Value(lines, best.verdict)


def _gain_blocks(groups: dict[str, list[MatrixEntry]]) -> list[Block]:
    """Return a forest plot of the gains over scratch for each target."""
    shown = {
        target: compared
        for target, group in groups.items()
        # not a random probe, whose gain is over a linear probe
        if (compared := [entry for entry in group if entry.gain is not None and not entry.against])
    }
    if not shown:
        return []
    limits = plots.forest_limits(shown)
    out: list[Block] = [
        Heading("Gain over scratch"),
        Text(
            "▲ wins, ▼ loses, ○ not shown: the interval contains zero, so there may or may not be "
            "a difference. Right of zero is better than scratch, also where a lower metric is "
            "better. Targets with the same metric share one scale. The numbers are in the sections "
            "of the targets."
        ),
    ]
    for target, group in shown.items():
        group = sorted(
            group, key=lambda entry: (fraction_order(entry.label_fraction), -(entry.gain or 0))
        )
        svg = plots.forest(group, f"{target}, gain in {group[0].metric}", limits[target])
        caption = f"{target}: gain in {group[0].metric} over scratch, with 95 % intervals."
        out.append(Figure(svg, caption))
    return out


def _several_networks_note(target: str, group: Sequence[MatrixEntry]) -> list[Block]:
    """Return a note where gains are measured against several scratch networks."""
    compared = [entry for entry in group if entry.gain is not None and not entry.is_baseline]
    if not has_several_backbones(compared):
        return []
    backbones = sorted({entry.backbone for entry in compared})
    best = sorted(
        {
            f"{plots.labels_text(entry.label_fraction)}: {entry.best_scratch}"
            for entry in compared
            if entry.best_scratch
        }
    )
    return [
        Text(
            f"{target}: gains over scratch are measured against {len(backbones)} different scratch "
            f"networks, each against that of its own backbone ({', '.join(backbones)}), so they "
            "cannot be compared with each other. The gain over best scratch can: it is over the "
            f"target's best scratch network by validation ({'; '.join(best) or 'unknown'}).",
            "note",
        )
    ]


def _best_baseline_note(target: str, group: Sequence[MatrixEntry]) -> list[Block]:
    """Return how many networks are better than the best model without a network."""
    compared = [entry for entry in group if entry.over_best_baseline.value is not None]
    tried = sorted({entry.technique for entry in group if entry.is_baseline and entry.n_seeds})
    if not compared and len(tried) > 1 and not any(entry.best_baseline for entry in group):
        return [
            Text(
                f"{target}: the best of the baselines ({', '.join(tried)}) is not known, because "
                f"none has a {_metric(group)} on validation rows.",
                "note",
            )
        ]
    if not compared:
        return []
    verdicts = Counter(entry.over_best_baseline.verdict for entry in compared)
    words = {SINGLE_SEED: "with one seed"}
    others = "".join(
        f", {verdicts[verdict]} {words.get(verdict, verdict)}"
        for verdict in UNJUDGED
        if verdicts[verdict]
    )
    best = ", ".join(dict.fromkeys(entry.best_baseline for entry in compared))
    return [
        Text(
            f"{target}: the gain over the best baseline is over {best}. A baseline is a model "
            "without a network, fitted on the same labelled rows; the best one is chosen on "
            "validation rows. By the plain 95 % interval, which is not corrected for the number "
            f"of comparisons, {verdicts[WINS]} of {len(compared)} networks are better than it, "
            f"{verdicts[LOSES]} are worse{others}.",
            "note",
        )
    ]


# ---------------------------------------------------------------- one target


def _metric(group: Sequence[MatrixEntry]) -> str:
    """Return the metric of a target. Entries whose trials all failed do not have it."""
    return next((entry.metric for entry in group if entry.metric), "")


def _row_label(entry: MatrixEntry, backbones: bool) -> str:
    return f"{entry.source} · {entry.technique}" + (f" ({entry.backbone})" if backbones else "")


def _target_blocks(
    inputs: ReportInputs,
    target: str,
    group: Sequence[MatrixEntry],
    comparable: Mapping[EntryKey, MatrixEntry],
    decimals: int,
    pooled: tuple[Sequence[ResultRow], dict[str, stats.RunPredictions]],
) -> list[Block]:
    """Return the section of a target.

    Args:
        inputs: What the report is made of.
        target: Name of the target.
        group: Its entries.
        comparable: The entries of `comparable_across_backbones`, by key.
        decimals: Decimals of the target's values.
        pooled: What `folds.pool` returns.
    """
    metric = _metric(group)
    done = [entry for entry in group if entry.mean is not None]
    out: list[Block] = [Heading(target)]
    if done:
        out.append(Text(_describe_values(metric, done)))
    out += _value_tables(group, comparable, decimals)
    out += [*_several_networks_note(target, group), *_best_baseline_note(target, group)]
    if split := inputs.splits.get(target):
        out.append(Text(f"Splits: {split}", "note"))
    out += _curve_blocks(target, metric, inputs.rows, inputs.curves, decimals)
    if len({entry.label_fraction for entry in done if entry.n_train}) > 1:
        caption = f"{target}: test {metric} by number of labelled rows, with 95 % intervals."
        out.append(Figure(plots.label_efficiency(done), caption))
    return (
        out
        + per_label.label_blocks(target, done, *pooled)
        + subgroups.subgroup_blocks(target, done, pooled[1])
        + rollouts.rollout_blocks(target, done, pooled[1])
    )


def _describe_values(metric: str, done: Sequence[MatrixEntry]) -> str:
    """Return what the values of a target's tables are."""
    sizes = sorted({entry.n_test for entry in done if entry.n_test})
    counts = sorted({entry.n_seeds for entry in done})
    seeds = f"{counts[0]} to {counts[-1]} seeds"
    if len(counts) == 1:
        seeds = plural(counts[0], "seed")
    better = "higher" if done[0].higher_is_better else "lower"
    rows_read = " or ".join(blocks.format_count(n) for n in sizes) or "an unknown number of"
    return (
        f"Test {metric} ({better} is better), mean over {seeds} on {rows_read} test "
        "rows, with 95 % intervals, the best value first. A gain is positive where it is "
        "better. ▲ wins, ▼ loses: its interval excludes zero, * also after Holm's "
        "correction. ○ not shown: it contains zero."
    )


def _curve_blocks(
    target: str,
    metric: str,
    rows: Sequence[ResultRow],
    curves: Mapping[str, Sequence[CurvePoint]],
    decimals: int,
) -> list[Block]:
    """Return the figure of a target's learning curves, nothing where there are none."""
    shown_metric = _curve_metric(metric, target, rows, curves)
    panels = learning_curves(target, shown_metric, rows, curves)
    if not panels:
        return []
    caption = (
        f"{target}: validation {shown_metric} while fine-tuning, mean over seeds up to the last "
        "step that all of them reached."
    )
    if any(row.target == target and row.split == results.SOURCE_VALIDATION for row in rows):
        caption += " With 0 labels it is that on the source's validation rows."
    numbers = _curve_table(panels, shown_metric, decimals)
    return [Figure(plots.learning(panels, shown_metric), caption, numbers)]


def _value_tables(
    group: Sequence[MatrixEntry], comparable: Mapping[EntryKey, MatrixEntry], decimals: int
) -> list[Block]:
    """Return a table for each label fraction of a target, the most labels first.

    Args:
        group: Entries of the target.
        comparable: The entries of `comparable_across_backbones`, by key.
        decimals: Decimals of the target's values.
    """
    fractions = most_labels_first(group)
    out: list[Block] = []
    for fraction in fractions:
        entries = sorted(
            (entry for entry in group if entry.label_fraction == fraction), key=by_value
        )
        if len(fractions) > 1:
            # a soup has the rows of all its trials
            networks = [entry for entry in entries if not entry.combines_trials]
            sizes = {entry.n_train for entry in networks or entries if entry.n_train}
            rows = f" ({blocks.format_count(max(sizes))} training rows)" if sizes else ""
            out.append(Heading(f"{plots.labels_text(fraction)}{rows}", 3))
        out.append(_value_table(entries, comparable, decimals))
    return out


def _value_table(
    entries: Sequence[MatrixEntry], comparable: Mapping[EntryKey, MatrixEntry], decimals: int
) -> blocks.Table:
    """Return the values of entries on test rows, and their gains."""
    several = has_several_backbones(entries)
    has_gain = any(entry.gain is not None for entry in entries)
    has_best_scratch = has_several_backbones(entry for entry in entries if entry.gain is not None)
    has_baseline = any(entry.over_best_baseline.value is not None for entry in entries)
    columns: list[tuple[str, Callable[[MatrixEntry], str | Value]]] = [
        ("Source · technique", lambda entry: _entry_name(entry, several)),
        ("Value", lambda entry: _mean_value(entry, decimals)),
    ]
    if has_gain or any(entry.verdict in UNJUDGED for entry in entries):
        columns.append(("Gain over scratch", lambda entry: _own_gain(entry, decimals)))
    if has_best_scratch:
        columns.append(
            (
                "Gain over best scratch",
                lambda entry: _gain_over_other(
                    entry.over_best_scratch, comparable[entry.key].survives, decimals
                ),
            )
        )
    if has_baseline:
        columns.append(
            (
                "Gain over best baseline",
                lambda entry: _gain_over_other(entry.over_best_baseline, False, decimals),
            )
        )
    columns.append(("Paired seeds", _seeds))
    if any(entry.over_scratch.p_value is not None for entry in entries):
        columns.append(("p (Holm)", _p_values))
    body = [[make(entry) for _, make in columns] for entry in entries]
    return blocks.Table([name for name, _ in columns], body)


def _entry_name(entry: MatrixEntry, several: bool) -> str | Value:
    """Return the name of an entry, below it its backbone where there are several."""
    lines = [f"{entry.source} · {entry.technique}"]
    if several and not entry.is_baseline:
        lines.append(entry.backbone)
    if entry.code_mark:
        lines.append(f"{code_versions.SIGNS[entry.code_mark]} {entry.code_mark}")
    return Value(tuple(lines))


def _mean_value(entry: MatrixEntry, decimals: int) -> str | Value:
    if entry.verdict == FAILED:
        return Value(("failed", plural(entry.n_failed, "trial")), FAILED)
    return Value(blocks.interval_lines(entry.mean, entry.low, entry.high, decimals))


def _own_gain(entry: MatrixEntry, decimals: int) -> str | Value:
    if entry.verdict in (REFERENCE, BASELINE, FAILED):
        return _DASH
    lines = blocks.interval_lines(entry.gain, entry.gain_low, entry.gain_high, decimals, "+")
    if entry.against:
        lines += (f"against {entry.against}",)
    if entry.over_scratch.evidence:
        lines += (entry.over_scratch.evidence,)
    return Value((*lines, _verdict_words(entry.verdict, entry.survives)), entry.verdict)


def _gain_over_other(gain: GainEstimate, survives: bool, decimals: int) -> str | Value:
    """Return a gain that is not over an entry's own scratch."""
    if gain.value is None:
        return _DASH
    lines = blocks.interval_lines(gain.value, gain.low, gain.high, decimals, "+")
    return Value((*lines, _verdict_words(gain.verdict, survives)), gain.verdict)


def _verdict_words(verdict: str, survives: bool) -> str:
    """Return a verdict with its sign, and a star where it survives Holm's correction."""
    return f"{blocks.MARKS.get(verdict, '')} {verdict}{' *' if survives else ''}".strip()


def _seeds(entry: MatrixEntry) -> str | Value:
    """Return the seeds that an entry shares with scratch, and how many trials failed."""
    seeds = entry.n_seeds if entry.paired_seeds is None else entry.paired_seeds
    if not entry.n_failed and seeds == entry.n_seeds:
        return str(seeds)
    lines = [f"{seeds} of {entry.n_seeds + entry.n_failed}"]
    if entry.n_failed:
        lines.append(f"{plural(entry.n_failed, 'trial')} failed")
    return Value(tuple(lines), FAILED if entry.n_failed else "")


def _format_p_value(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _p_values(entry: MatrixEntry) -> str | Value:
    """Return the p value after Holm's correction, and below it the one before."""
    if entry.over_scratch.p_value is None:
        return _DASH
    corrected = _format_p_value(entry.gain_p_holm) + (" *" if entry.survives else "")
    return Value((corrected, f"plain {_format_p_value(entry.over_scratch.p_value)}"))


def _curve_metric(
    metric: str, target: str, rows: Sequence[ResultRow], curves: Mapping[str, Sequence[CurvePoint]]
) -> str:
    """Return the metric that the learning curves show.

    It is the primary metric. Where that is computed on test rows only, it is the first metric of
    the validations.
    """
    validations = (
        point.metrics
        for row in rows
        if row.target == target
        for point in curves.get(row.trial_id, ())
    )
    names = list(next(validations, dict[str, float]()))
    return metric if metric in names or not names else names[0]


def learning_curves(
    target: str, metric: str, rows: Sequence[ResultRow], curves: Mapping[str, Sequence[CurvePoint]]
) -> dict[str, plots.Series]:
    """Return the learning curves of a target's final trials.

    Returns:
        A dict from each label fraction to its lines: a dict from (source, technique), as
        `plots.line_key` names them, to points (step, mean over seeds of the metric).
    """
    trials = {
        row.trial_id: row
        for row in rows
        if row.target == target and row.trial_stage == "final" and row.status == "done"
    }
    several = plots.has_several_scratch_networks(trials.values())
    seeds: dict[tuple[str, tuple[str, str]], list[plots.Points]] = defaultdict(list)
    for trial_id, row in trials.items():
        curve = curves.get(trial_id, ())
        points: plots.Points = [
            (float(point.step), point.metrics[metric])
            # a head that was solved has one point, whose step counts the solver's iterations
            for point in (curve if len(curve) > 1 else ())
            # step 0: a trial without training has no curve
            if point.step and math.isfinite(point.metrics.get(metric, math.nan))
        ]
        if points:
            line = plots.line_key(row.source, results.technique(row), row.backbone, several)
            seeds[row.label_fraction, line].append(points)
    out: dict[str, plots.Series] = defaultdict(dict)
    for (fraction, line), of_seeds in seeds.items():
        if mean := plots.mean_curve(of_seeds):
            out[fraction][line] = mean
    return dict(out)


def _curve_table(panels: dict[str, plots.Series], metric: str, decimals: int) -> blocks.Table:
    """Return the first, middle and last point of each learning curve."""
    body: list[list[str | Value]] = []
    for fraction in sorted(panels, key=fraction_order):
        for (source, technique), points in panels[fraction].items():
            picked = (points[0], points[len(points) // 2], points[-1])
            shown = [f"{value:.{decimals}f} (step {step:.0f})" for step, value in picked]
            body.append([f"{source} · {technique}", plots.fraction_label(fraction), *shown])
    head = ["Source · technique", "Labels", f"First {metric}", "In the middle", "Last"]
    return blocks.Table(head, body, 2)


# ---------------------------------------------------------------- the rest


def _unique_trials(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """Return one row for each trial and stage."""
    first = {(row.trial_id, row.trial_stage): row for row in reversed(rows)}
    return list(first.values())[::-1]


def _missing_blocks(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    scores: Mapping[str, SelectionScore],
    left_out: Sequence[str],
    notes: Sequence[str],
) -> list[Block]:
    """Return what the tables do not hold: what failed, was cut or left out, and what is unknown."""
    lines = [
        *left_out,
        *_sources_left_out(rows, scores),
        *_stopped_early(rows),
        *_unknown(entries),
    ]
    details = [*_failure_blocks(rows), *_budget_blocks(rows), *_duplicate_blocks(rows)]
    if not lines and not details:
        lines = ["No trial failed, none was cut, and no comparison lacks a verdict."]
    out: list[Block] = [Heading("What failed, was left out or is unknown")]
    if lines:
        out.append(Bullets(lines))
    out += details
    if notes:
        out += [Heading("Notes on the data", 3), Bullets(list(notes))]
    return out


def _sources_left_out(rows: Sequence[ResultRow], scores: Mapping[str, SelectionScore]) -> list[str]:
    """Return a line for each target with sources that were not fine-tuned because of a score."""
    tried = {(row.target, row.source) for row in rows}
    left_out: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target, source, name in known_scores(rows, scores):
        if (target, source) not in tried:
            left_out[target, name].append(source)
    return [
        f"{target}: sources not fine-tuned, because of their {name}: {', '.join(sources)}."
        for (target, name), sources in left_out.items()
    ]


def _stopped_early(rows: Sequence[ResultRow]) -> list[str]:
    """Return a line on the search trials that a scheduler stopped."""
    stopped = [
        row for row in _unique_trials(rows) if row.status == "pruned" and not row.is_cut_by_budget
    ]
    if not stopped:
        return []
    return [
        f"{plural(len(stopped), 'search trial')} stopped early (fanout.scheduler): others "
        "of the same search were better after as many steps."
    ]


def _unknown(entries: Sequence[MatrixEntry]) -> list[str]:
    """Return a line for each reason why comparisons have no verdict, and for what they lack."""
    reasons: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        if entry.source == SCRATCH:
            continue
        if entry.verdict == TOO_FEW:
            reasons[f"Too few to tell ({entry.over_scratch.evidence})"].append(entry)
        elif entry.verdict == SINGLE_SEED:
            reasons[f"One seed (a verdict needs {MIN_SEEDS})"].append(entry)
        elif entry.verdict == UNCOMPARED and entry.paired_seeds is None:
            reasons["Not compared (there is no scratch network to compare with)"].append(entry)
        elif entry.verdict == UNCOMPARED:
            reasons[
                "Not compared (no seed in common, the metric has no value, or test predictions are "
                "missing)"
            ].append(entry)
    reasons["No value on validation rows, so never chosen by it"] = [
        entry
        for entry in entries
        if entry.n_seeds and entry.validation is None and not entry.is_baseline
    ]
    reasons[
        "Intervals that leave out how much the search itself varies (its settings were tried with "
        "one seed, or judged by another metric)"
    ] = [entry for entry in entries if entry.over_scratch.unknown_choice]
    return [f"{reason}: {_names(lacking)}." for reason, lacking in reasons.items() if lacking]


def _names(entries: Sequence[MatrixEntry]) -> str:
    """Return the names of the first few of these entries, by target."""
    groups = {
        target: [plots.entry_label(entry) for entry in group]
        for target, group in by_target(entries[:MAX_NAMED_ENTRIES]).items()
    }
    text = "; ".join(f"{target}: {', '.join(names)}" for target, names in groups.items())
    rest = len(entries) - MAX_NAMED_ENTRIES
    return f"{text}, and {rest} more" if rest > 0 else text


def _budget_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    """Return the pairs of source and technique that a budget cut, with their rung."""
    cut = [
        row
        for row in _unique_trials([row for row in rows if row.is_validation])
        if row.is_cut_by_budget
    ]
    if not cut:
        return []
    body: list[list[str | Value]] = [
        [
            row.target,
            f"{row.source} · {results.technique(row)}",
            plots.fraction_label(row.label_fraction),
            (row.error or "").removeprefix(results.CUT_BY_BUDGET).strip(),
            _DASH if row.value is None else f"{row.metric} {row.value:.3f}",
        ]
        for row in cut
    ]
    return [
        Heading("Cut by the budget", 3),
        Text(
            f"{plural(len(cut), 'pair')} of source and technique did not promise enough in "
            "short runs (fanout.select.budget). They were not trained in full and their test rows "
            "were not read, so whether they would have won is unknown."
        ),
        blocks.Table(["Target", "Source · technique", "Labels", "Cut", "Validation then"], body, 4),
    ]


def _cost_blocks(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    pretraining: Sequence[SourceSummary],
) -> list[Block]:
    trials = _trial_costs(entries, rows)
    if not trials.rows:
        return []
    return [
        Heading("Cost"),
        Text(
            "The training time of an entry is the mean of its final trials. A source is pretrained "
            "once and serves every target. Parameters: the most that a technique trained."
        ),
        _backbone_costs(entries, rows, pretraining),
        Details("Training time of every source and technique", [trials]),
    ]


def _backbone_costs(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    pretraining: Sequence[SourceSummary],
) -> blocks.Table:
    """Return the cost of each source's backbone: pretraining once, and all of its trials.

    The time of scratch is that on the same targets with the same share of labels.
    """
    trained = {item.source: item.seconds for item in pretraining}
    timed = [entry for entry in entries if entry.seconds is not None and not entry.is_baseline]
    scratch: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in timed:
        if entry.verdict == REFERENCE:
            scratch[entry.backbone].append(entry)
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in _unique_trials(rows):
        spent[row.source, row.backbone].append(row.seconds or 0.0)
    body: list[list[str | Value]] = []
    for source, backbone in dict.fromkeys((entry.source, entry.backbone) for entry in timed):
        of_source = [
            entry for entry in timed if (entry.source, entry.backbone) == (source, backbone)
        ]
        sizes = [
            entry.params_trained
            for entry in timed
            if entry.backbone == backbone and entry.params_trained is not None
        ]
        compared = {(entry.target, entry.label_fraction) for entry in of_source}
        of_scratch = [
            entry for entry in scratch[backbone] if (entry.target, entry.label_fraction) in compared
        ]
        seconds = spent[source, backbone]
        body.append(
            [
                Value((source, backbone)),
                blocks.format_count(max(sizes, default=None)),
                _DASH if source == SCRATCH else blocks.format_seconds(trained.get(source)),
                str(len({entry.target for entry in of_source})),
                blocks.format_count(len(seconds)),
                blocks.format_seconds(sum(seconds)),
                _mean_time(of_source),
                _DASH if source == SCRATCH else _mean_time(of_scratch),
            ]
        )
    head = [
        "Source, backbone",
        "Parameters trained",
        "Pretraining, once",
        "Targets",
        "Trials",
        "All trials",
        "Training time, mean",
        "Scratch's training time",
    ]
    return blocks.Table(head, body)


def _mean_time(entries: Sequence[MatrixEntry]) -> str:
    """Return the mean training time of final trials."""
    count = sum(entry.n_seeds for entry in entries)
    if not count:
        return _DASH
    total = sum((entry.seconds or 0.0) * entry.n_seeds for entry in entries)
    return blocks.format_seconds(total / count)


def _trial_costs(entries: Sequence[MatrixEntry], rows: Sequence[ResultRow]) -> blocks.Table:
    """Return the cost of each source and technique on each target."""
    shown: dict[tuple[str, str, str, str], list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        if entry.seconds is not None:
            shown[entry.target, entry.source, entry.backbone, entry.technique].append(entry)
    spent: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in _unique_trials(rows):
        spent[row.target, row.source, row.backbone, results.technique(row)].append(
            row.seconds or 0.0
        )
    several = {
        target
        for target, *_ in shown
        if has_several_backbones(entry for key in shown if key[0] == target for entry in shown[key])
    }
    body: list[list[str]] = []
    for key, group in shown.items():
        params = [entry.params_trained for entry in group if entry.params_trained is not None]
        trials = spent.get(key, [])
        body.append(
            [
                key[0],
                _row_label(group[0], key[0] in several),
                _mean_time(group),
                blocks.format_count(max(params, default=None)),
                blocks.format_count(len(trials)),
                blocks.format_seconds(sum(trials)),
                "; ".join(dict.fromkeys(entry.layers_trained for entry in group)),
            ]
        )
    head = [
        "Target",
        "Source · technique",
        "Training time",
        "Parameters trained",
        "Trials with search",
        "All trials",
        "Layers trained",
    ]
    return blocks.Table(head, body, 2)


def _shifts(source_scores: Mapping[str, PairScores]) -> dict[str, list[Shift]]:
    """Return what was measured of each target's rows."""
    shifts: dict[str, list[Shift]] = defaultdict(list)
    for pair in source_scores.values():
        shifts[pair.target] += pair.shifts
    return shifts


def known_scores(
    rows: Sequence[ResultRow], scores: Mapping[str, SelectionScore]
) -> dict[tuple[str, str, str], float]:
    """Return the value of each (target, source, name of the score), NaN where it is not defined."""
    values: dict[tuple[str, str, str], float] = {
        (r.target, r.source, gains.score_name(r.score_name)): r.score_value
        for r in rows
        if r.score_name and r.score_value is not None
    }
    for pair, scored in scores.items():
        source, _, target = pair.rpartition("|")
        value = scored["score_value"]
        values.setdefault(
            (target, source, gains.score_name(scored["score_name"])),
            math.nan if value is None else value,
        )
    return values


def _score_blocks(rows: Sequence[ResultRow], scores: Mapping[str, SelectionScore]) -> list[Block]:
    """Return the table of transferability scores, also of sources left out because of theirs."""
    tried = {(row.target, row.source) for row in rows}
    values = known_scores(rows, scores)
    if not values:
        return []
    body: list[list[str]] = []
    for (target, source, name), value in gains.best_scores_first(values):
        what = "fine-tuned" if (target, source) in tried else "left out"
        shown = "undefined" if math.isnan(value) else f"{value:.4g}"
        body.append([target, source, name, what, shown])
    return [
        Heading("Transferability scores"),
        blocks.Table(["Target", "Source", "Score", "What became of it", "Value"], body, 4),
    ]


def _pretraining_blocks(pretraining: Sequence[SourceSummary]) -> list[Block]:
    if not pretraining:
        return []
    body: list[list[str]] = []
    more: list[Block] = []
    for item in pretraining:
        measured = ", ".join(f"{name} {value:.4g}" for name, value in item.metrics.items())
        body.append(
            [
                item.source,
                item.backbone or _DASH,
                item.objective or _DASH,
                measured or _DASH,
                blocks.format_count(item.steps),
                blocks.format_count(item.rows),
                blocks.format_seconds(item.seconds),
                blocks.format_count(item.rows_per_second),
            ]
        )
        details = _source_details(item)
        if details:
            title = f"{item.source}: where it comes from and what was carried over"
            more.append(Details(title, details))
    head = ["Source", "Backbone", "Objective", "Metrics", "Steps", "Rows read", "Time", "Rows/s"]
    return [Heading("Pretraining"), blocks.Table(head, body, 4), *more]


def _source_details(item: SourceSummary) -> list[Block]:
    """Return the code, versions, bundle, splits and copied tensors of a source."""
    details: list[Block] = []
    if item.changes:
        changes = ", ".join(item.changes)
        details.append(Text(f"Source {code_versions.OTHER}: {changes}", "warning"))
    libraries = [
        f"{name} {version}"
        for name, version in item.versions.items()
        if name in provenance.LIBRARIES
    ]
    if libraries:
        details.append(Text(f"Versions: {', '.join(libraries)}"))
    if item.bundle:
        details.append(Text(f"Bundle: {item.bundle}"))
    if item.splits:
        details.append(Text(f"Splits: {item.splits}"))
    if item.transfer:
        details += [Text("Transfer of tensors:"), Code(item.transfer)]
    return details


def _failure_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    failed = [row for row in _unique_trials(rows) if row.status == "failed"]
    if not failed:
        return []
    by_error: dict[str, list[ResultRow]] = defaultdict(list)
    for row in failed:
        by_error[row.error or "no error was recorded"].append(row)
    out: list[Block] = [
        Heading("Failures", 3),
        Text(f"{plural(len(failed), 'trial')} failed; the others went on without them."),
    ]
    for error, group in sorted(by_error.items(), key=lambda kv: -len(kv[1])):
        lines = error.strip().splitlines() or [error]
        which = [
            f"{r.trial_id}: {r.target} · {r.source} · {results.technique(r)} · "
            f"{plots.labels_text(r.label_fraction)} · seed {r.seed} "
            f"({r.trial_stage}) {r.hyper_parameters or ''}".strip()
            for r in group[:20]
        ]
        which += [f"and {len(group) - 20} more"] if len(group) > 20 else []
        out.append(
            Details(
                f"{plural(len(group), 'trial')}: {lines[-1][:160]}",
                [Bullets(which), Code(error)],
            )
        )
    return out


def _duplicate_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    sentences = results.duplicates(list(rows))
    if not sentences:
        return []
    return [
        Heading("Identical results under different settings", 3),
        Text(
            "Trials that differ in a setting and still agree to 12 digits are a sign that the "
            "setting had no effect: look at these before you "
            "trust them.",
            "warning",
        ),
        Bullets(sentences),
    ]


def _split_blocks(splits: dict[str, str]) -> list[Block]:
    if not splits:
        return []
    return [Heading("Splits"), Bullets([f"{name}: {text}" for name, text in splits.items()])]


WORDS = (
    ("Source", "source", "What a trial starts from; none: random weights, or a baseline."),
    ("Backbone", "backbone", "The network that is pretrained and then adapted."),
    ("Target", "target", "The task that is tested."),
    ("Technique", "technique, hyper_parameters", "How the network is adapted, with its options."),
    ("Labels", "label_fraction", "Share or number of the labelled training rows that are used."),
    ("Trial", "trial_id, trial_stage, seed", "One training run, of the search or a final one."),
    ("Value", "value", "The metric on test rows (split), the mean over seeds."),
    ("Scratch", "scratch_value", "Training the same backbone from random weights."),
    ("Gain over scratch", "gain", "How much better than scratch with the same backbone and seed."),
    (
        "Gain over best scratch",
        "baseline_gain",
        "Over the target's best scratch network of any backbone, by validation.",
    ),
    ("Baseline", "best_baseline", "A model without a network, such as majority."),
    (
        "Gain over best baseline",
        "best_baseline_gain",
        "Over the target's best baseline, by validation.",
    ),
    (
        "Verdict",
        "",
        "wins, loses, not shown, too few to tell, one seed, search noise or not compared.",
    ),
    ("Paired seeds", "paired_seeds", "Seeds that an entry and its scratch both have."),
    ("p (Holm)", "gain_p_holm", "p value, corrected for all comparisons of the job."),
    ("Training time", "seconds", "Of one trial; in tables the mean of the final ones."),
    ("Parameters trained", "params_trained", "Parameters that training changes."),
    ("Layers trained", "layers_trained", "The layers that training changes."),
    ("Test rows", "n_eval", "Rows that a value is of."),
    ("Training rows", "n_train", "Labelled rows that a trial trains on."),
    (
        "Score",
        "source_scores, score_name, score_value",
        "Estimate of how well a source transfers, made without fine-tuning.",
    ),
    ("Failed, stopped, cut", "status, error", "Why a trial has no value."),
)
"""Words of the report and the terminal: word, columns of the results table, meaning."""


def _word_blocks() -> list[Block]:
    """Return what the words mean, and how the results table calls the same things."""
    body = [[word, columns or _DASH, meaning] for word, columns, meaning in WORDS]
    table = blocks.Table(["Word", f"In {results.FILE}", "Meaning"], body, 3)
    return [Details("What the words mean, and the columns of the results table", [table])]


def _method_blocks(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    versions: dict[str, str],
    code_notes: Sequence[str],
) -> list[Block]:
    """Return how numbers were made: by which statistics, code, versions and hyper-parameters."""
    out: list[Block] = [Heading("How this was made"), Bullets(_describe_statistics(entries, rows))]
    if code_notes:
        out += [
            Heading("Trials of other code or versions", 3),
            Text(code_notes[0], "warning"),
            Bullets(list(code_notes[1:])),
        ]
    made_with = _versions(rows, versions)
    if made_with:
        out += [Heading("Versions", 3), blocks.Table(["What", "Which"], made_with, 2)]
    parameters = [
        [
            entry.target,
            _row_label(entry, False),
            plots.fraction_label(entry.label_fraction),
            _format_parameters(entry.hyper_parameters),
        ]
        for entry in entries
        if entry.n_seeds
    ]
    if parameters:
        head = ["Target", "Source · technique", "Labels", "Hyper-parameters"]
        table = blocks.Table(head, parameters, 4)
        out.append(Details("Hyper-parameters of the final trials", [table]))
    return out


def _describe_statistics(entries: Sequence[MatrixEntry], rows: Sequence[ResultRow]) -> list[str]:
    """Return sentences on intervals, verdicts and corrections."""
    sentences = [
        "Intervals are 95 %. They are those of a multi-reader study (Obuchowski and Rockette, "
        "1995; degrees of freedom as Hillis, 2007) in which the seeds are the readers, and the "
        "test units (groups where the data declare them, else rows) are the cases. The variance "
        "between seeds is by Student's t. The covariance over test units is by a paired bootstrap "
        f"(Efron and Tibshirani, 1993) with {stats.DRAWS} draws, or fewer (at least "
        f"{stats.RECOMPUTED_DRAWS}) where rows are many and the metric is no sum over them, or "
        "where it compares pairs of rows. Intervals of one seed are percentile bootstraps over "
        "test units alone.",
        "Gains are paired: the same seeds and the same test rows, sampled together for both "
        "sides. Positive is better. A verdict needs "
        f"{MIN_SEEDS} paired seeds, and {stats.MIN_RARER_UNITS} test units outside of the most "
        f"frequent class ({stats.MIN_UNITS} test units where rows have no "
        "classes). No interval exceeds the bounds of its metric. Where all test units are alike "
        "(20 right rows of 20), all draws are equal. The interval of a metric with bounds is then "
        "Clopper and Pearson's (1934). Other metrics keep an interval without width.",
    ]
    num_compared = sum(entry.gain_p_holm is not None for entry in entries)
    if num_compared:
        sentences.append(
            "The plain intervals are not corrected for the number of comparisons: of "
            f"{num_compared} comparisons without any true difference, about "
            f"{SIGNIFICANT * num_compared:.1f} would still be won or lost by them. Corrected p "
            "values are Holm's (1979)."
        )
    if any(row.trial_stage == "search" and row.drawn != "{}" for row in rows):
        sentences.append(SEARCH_SENTENCES)
    intervals = Counter(entry.interval for entry in entries if entry.interval)
    sentences += [f"{how}: {plural(count, 'result')}." for how, count in intervals.items()]
    return sentences


def _versions(rows: Sequence[ResultRow], versions: Mapping[str, str]) -> list[list[str]]:
    """Return lines (what, which) on the libraries, the job, the code, devices and the start."""
    out = [
        *code_versions.versions_table(rows),
        *([name, str(version)] for name, version in versions.items()),
    ]
    columns = {"spec_hash": "spec hash", "git_sha": "git commit", "device": "device"}
    for column, what in columns.items():
        values = sorted({str(getattr(row, column)) for row in rows if getattr(row, column)})
        if values and not set(values) <= set(map(str, versions.values())):
            more = f" and {len(values) - 6} more" if len(values) > 6 else ""
            out.append([what, ", ".join(values[:6]) + more])
    times = [row.started_at for row in rows if row.started_at]
    if times:
        out.append(["first trial started", f"{min(times):%Y-%m-%d %H:%M} UTC"])
    return out


def _format_parameters(text: str) -> str:
    """Return hyper-parameters as text, without the checksum of the weights at the start."""
    try:
        named = json.loads(text).items()
    except (ValueError, AttributeError):
        return text
    shown = [
        f"{name} {hyper_parameter_text(name, value)}"
        for name, value in named
        if value is not None and name != "start_weights"
    ]
    return ", ".join(shown) or _DASH
