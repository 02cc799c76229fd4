"""The report of a job: the table for the terminal, report.md and report.html.

It shows where transfer paid, where it did not, and where the trials do not allow a conclusion. The
entries come from ``pipeline.report.matrix`` and the figures from ``pipeline.report.plots``;
``pipeline.report.blocks`` writes Markdown and HTML. This module decides what the report contains.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pipeline.config import provenance, registry
from pipeline.io import storage
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
    FAILED,
    LOSES,
    MIN_SEEDS,
    NOT_SHOWN,
    REFERENCE,
    SCRATCH,
    SIGNIFICANT,
    TOO_FEW,
    UNCOMPARED,
    WINS,
    MatrixEntry,
    fraction_order,
    matrix_entries,
    over_best_scratch,
)
from pipeline.report.results import ResultRow
from pipeline.report.shift import Shift
from pipeline.report.source_scores import PairScores
from pipeline.report.trial_record import CurvePoint

if TYPE_CHECKING:
    import rich.table
    import rich.text

__all__ = ["MatrixEntry", "matrix_entries", "table", "write"]

_DASH = blocks.DASH
SEARCH_NOISE = (
    "Where hyper-parameters were searched, the settings that were tried again with further "
    "seeds show how much the choice itself varies, and "
    "intervals of gains include that: in simulated comparisons without a difference 3 to 5 % "
    "were won or lost. A search whose settings were "
    "tried with one seed alone does not show it, and its intervals say so: there 6 to 12 % "
    "were won or lost. Neither does a search that "
    "was judged by another metric than the tested one, whose intervals say so too."
)


# ---------------------------------------------------------------- numbers


def _by_target(entries: Sequence[MatrixEntry]) -> dict[str, list[MatrixEntry]]:
    out: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        out[entry.target].append(entry)
    return out


def _decimals_by_target(shown: Sequence[MatrixEntry]) -> dict[str, int]:
    return {
        target: blocks.decimal_places([(c.low, c.high) for c in group])
        for target, group in _by_target(shown).items()
    }


def _format_mean(entry: MatrixEntry, decimals: int) -> str:
    return blocks.format_interval(entry.mean, entry.low, entry.high, decimals)


def _format_gain(entry: MatrixEntry, decimals: int) -> str:
    return blocks.format_interval(entry.gain, entry.gain_low, entry.gain_high, decimals, "+")


def _format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _format_count(number: float | None) -> str:
    return _DASH if number is None else f"{number:,.0f}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------- terminal


def table(entries: Sequence[MatrixEntry]) -> rich.table.Table:
    """Return the matrix as a table for the terminal, grouped by target.

    It fits 100 columns, and verdicts have signs as well as colours. The column ``seeds`` counts the
    seeds that an entry shares with the entry it is compared with, and those that were started where
    these are more. A gain is over the scratch network of the entry's own backbone. Where another
    scratch network of the target is better, the gain over that one is on the next line.
    """
    from rich.table import Table
    from rich.text import Text as Rich

    out = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        collapse_padding=True,
        caption_justify="left",
        caption_style="dim",
        caption=_table_caption(entries),
    )
    signs = [
        f"{sign} {mark}"
        for mark, sign in code_versions.SIGNS.items()
        if any(entry.code_mark == mark for entry in entries)
    ]
    if signs:
        out.caption = f"{out.caption}\n{', '.join(signs)} (than those of now)."
    out.add_column("source", overflow="fold")
    out.add_column("technique", overflow="fold")
    for name in ("labels", "mean [95 %]", "gain [95 %]", "seeds", "s/trial"):
        out.add_column(name, justify="right", no_wrap=True)
    decimals = _decimals_by_target(entries)
    styles = {WINS: "bold green", LOSES: "bold red", FAILED: "bold red"}
    target, several = None, False
    for entry in entries:
        if entry.target != target:
            target = entry.target
            several = _has_several_backbones(other for other in entries if other.target == target)
            arrow = "↑" if entry.higher_is_better else "↓"
            metric = f"{entry.metric} {arrow}" if entry.metric else ""
            out.add_row()
            out.add_row(Rich(entry.target, "bold"), Rich(metric, "dim"))
        digits = decimals[entry.target]

        source = (
            f"{entry.source} {entry.backbone.rpartition('/')[2]}"
            if several and entry.source == SCRATCH
            else entry.source
        )
        technique = (
            f"{entry.technique} (against {entry.against})" if entry.against else entry.technique
        )
        technique += f" {code_versions.SIGNS[entry.code_mark]}" if entry.code_mark else ""
        out.add_row(
            Rich(f" {source}"),
            Rich(technique),
            Rich(plots.fraction_label(entry.label_fraction)),
            Rich(_format_mean(entry, digits)),
            Rich(_terminal_gain(entry, digits), styles.get(entry.verdict, "")),
            _format_seeds(entry),
            Rich(_terminal_seconds(entry.seconds)),
        )
        if _has_other_baseline(entry):
            out.add_row(
                "",
                Rich("best scratch", "dim"),
                "",
                "",
                Rich(_format_baseline_gain(entry, digits), "dim"),
            )
        if entry.best_baseline_gain is not None:
            out.add_row(
                "",
                Rich(f"over {entry.best_baseline}", "dim"),
                "",
                "",
                Rich(_format_best_baseline_gain(entry, digits), "dim"),
            )
    return out


def _has_several_backbones(entries: Iterable[MatrixEntry]) -> bool:
    """Return whether the entries have several backbones; baselines have none."""
    return len({entry.backbone for entry in entries if not entry.is_baseline}) > 1


def _terminal_gain(entry: MatrixEntry, decimals: int) -> str:
    """Return the gain with the sign of its verdict, or the verdict where there is no gain."""
    if entry.verdict == REFERENCE:
        return "scratch"
    mark = blocks.MARKS.get(entry.verdict)
    if not mark:
        return entry.verdict
    return f"{mark} {_format_gain(entry, decimals)}{'*' if entry.survives else ''}"


def _terminal_seconds(seconds: float | None) -> str:
    if seconds is None:
        return _DASH
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"


def _table_caption(entries: Sequence[MatrixEntry]) -> str:
    """Return the meaning of the signs in the terminal's table."""
    lines = [
        "▲ wins, ▼ loses: the 95 % interval of the gain over scratch excludes zero;",
        "* also after Holm's correction for all comparisons. ○ not shown: it holds zero.",
        "Positive is better. seeds: those that scratch has too; a verdict needs two.",
    ]
    if any(entry.verdict == TOO_FEW for entry in entries):
        lines.append(
            "? too few to tell: too few test units for a verdict; the report has their number."
        )
    if any(_has_other_baseline(entry) for entry in entries):
        lines.append(
            "Gains are over the scratch network of the same backbone; below them those over "
            "the target's"
        )
        lines.append("best scratch network (by validation), where that is of another backbone.")
    if any(entry.best_baseline_gain is not None for entry in entries):
        lines.append("over NAME: the gain over the best model without a network (by validation).")
    return "\n" + "\n".join(lines)


def _format_seeds(entry: MatrixEntry) -> rich.text.Text:
    """Return the paired seeds of an entry, "2 of 3" where more were started.

    Scratch is paired with nothing: for it they are all seeds that finished.
    """
    from rich.text import Text as Rich

    seeds = entry.n_seeds if entry.paired_seeds is None else entry.paired_seeds
    started = entry.n_seeds + entry.n_failed
    return Rich(str(seeds)) if seeds == started else Rich(f"{seeds} of {started}", "red")


def _has_other_baseline(entry: MatrixEntry) -> bool:
    """Return whether the target's best scratch network has another backbone than the entry."""
    return (
        bool(entry.baseline)
        and entry.baseline != entry.backbone
        and entry.baseline_gain is not None
    )


def _format_baseline_gain(entry: MatrixEntry, decimals: int) -> str:
    return blocks.format_interval(
        entry.baseline_gain, entry.baseline_low, entry.baseline_high, decimals, "+"
    )


def _format_best_baseline_gain(entry: MatrixEntry, decimals: int) -> str:
    return blocks.format_interval(
        entry.best_baseline_gain, entry.best_baseline_low, entry.best_baseline_high, decimals, "+"
    )


# ---------------------------------------------------------------- the written report


def write(
    root_uri: str,
    *,
    job_name: str,
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    curves: Mapping[str, Sequence[CurvePoint]],
    pretraining: Sequence[dict[str, Any]],
    splits: dict[str, str],
    notes: Sequence[str],
    versions: dict[str, str],
    runs: dict[str, stats.RunPredictions] | None = None,
    code_notes: Sequence[str] = (),
    scores: dict[str, dict[str, Any]] | None = None,
    source_scores: Mapping[str, PairScores] | None = None,
    modalities: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Write report.md and report.html under ``root_uri``, each atomically.

    Args:
        root_uri: The folder of the job.
        job_name: Name of the job.
        entries: The entries of the matrix.
        rows: Results rows. Failures and totals are computed from them.
        curves: Trial id to its validations.
        pretraining: One dict for each source with ``source, backbone, objective, steps, rows,
            seconds, rows_per_second, metrics, transfer, bundle_uri, splits``, any of which may be
            missing.
        splits: Target to where its splits come from.
        notes: Sentences for the section on the method.
        versions: What identifies the job apart from the libraries, such as its hash. The versions
            of libraries are those that each trial ran with.
        runs: Trial id to test predictions, for the tables of classes, labels and subgroups.
        code_notes: Sentences on the trials that were made by other code or versions.
        scores: ``source|target`` to ``score_name`` and ``score_value``, also of sources that were
            left out because of their score. Without it only the scores in ``rows`` are shown.
        source_scores: ``source|target`` to every transferability score.
        modalities: Target to the name of its modality.

    Returns:
        The URIs of report.md and report.html.
    """
    groups, decimals = _by_target(entries), _decimals_by_target(entries)
    comparable, pooled = over_best_scratch(entries), folds.pool(rows, runs or {})
    content: list[Block] = [
        *gains.warnings(_by_target(comparable), decimals),
        *winners.blocks_of(root_uri, groups, rows, decimals),
        *_summary_blocks(entries, groups, rows, decimals),
        *gains.heat_maps(comparable, decimals),
        *_gain_blocks(groups, decimals),
        *without_labels.blocks_of(entries, *pooled, decimals),
    ]
    for target, group in groups.items():
        content += _best_baseline_blocks(target, group, decimals[target])
    for target, group in groups.items():
        content += _target_blocks(
            target, group, rows, curves, decimals[target], splits.get(target, ""), pooled
        )
    content += [
        *_budget_blocks(rows),
        *_cost_blocks(entries, rows),
        *gains.cost_figures(_by_target(comparable), decimals),
        *_score_blocks(rows, scores),
        *score_audit.blocks_of(
            entries,
            _scored(source_scores or {}),
            modalities or {},
            {(row.target, row.label_fraction) for row in rows if row.is_cut_by_budget},
        ),
        *gains.score_figures(
            comparable,
            _known_scores(rows, scores) | gains.all_scores(source_scores or {}),
            decimals,
        ),
        *shift.blocks_of(_shifts(source_scores or {}), registry.names("technique")),
        *_pretraining_blocks(pretraining),
        *_failure_blocks(rows),
        *_duplicate_blocks(rows),
    ]
    content += [
        *_split_blocks({t: s for t, s in splits.items() if t not in groups}),
        *_method_blocks(entries, rows, notes, versions, code_notes),
    ]
    title = _headline(entries)
    out = storage.join(root_uri, "report.md"), storage.join(root_uri, "report.html")
    storage.write_bytes(
        out[0], blocks.markdown(f"{job_name}: {title[0].lower()}{title[1:]}", content).encode()
    )
    storage.write_bytes(
        out[1], blocks.html_page(title, f"One to Many: job {job_name}", content).encode()
    )
    return out


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
    return f"Transfer paid in {surviving[WINS]} of {_plural(compared, 'comparison')}{lost}"


def _headline_without_comparisons(entries: Sequence[MatrixEntry]) -> str:
    """Return the title of a report without comparisons: why nothing was won or lost."""
    if entries and all(entry.verdict == FAILED for entry in entries):
        return "No trial finished"
    if any(entry.verdict == TOO_FEW for entry in entries):
        return "No verdict: there are too few test rows"
    if any(entry.paired_seeds == 1 for entry in entries):
        return f"No verdict: one seed cannot tell a gain from luck, {MIN_SEEDS} are needed"
    return "Nothing to compare with scratch yet"


def _describe_correction(entries: Sequence[MatrixEntry]) -> str:
    """Return a sentence on what the headline counts."""
    found, surviving = _count_verdicts(entries), _count_survivors(entries)
    family = sum(entry.gain_p_holm is not None for entry in entries)
    return (
        "The headline counts wins and losses that survive Holm's correction for all "
        f"{_plural(family, 'comparison')} of the job (corrected p below "
        f"{SIGNIFICANT}, marked *): {surviving[WINS]} of {_plural(found[WINS], 'win')} and "
        f"{surviving[LOSES]} of {found[LOSES]} "
        f"loss{'' if found[LOSES] == 1 else 'es'} by the plain interval."
    )


def _summary_blocks(
    entries: Sequence[MatrixEntry],
    groups: dict[str, list[MatrixEntry]],
    rows: Sequence[ResultRow],
    decimals: dict[str, int],
) -> list[Block]:
    found, surviving = _count_verdicts(entries), _count_survivors(entries)
    out: list[Block] = []
    if any(entry.transfers for entry in entries):
        out.append(
            Text(
                "A comparison is one source, technique and label fraction on one target "
                "against training from scratch with the same backbone, labels, "
                "seeds and search budget. It is won or lost where the 95 % interval of the "
                f"gain excludes zero. {_describe_correction(entries)}",
                "lead",
            )
        )
    tally = [(str(surviving[WINS]), "won", WINS), (str(surviving[LOSES]), "lost", LOSES)]
    corrected_away = found[WINS] + found[LOSES] - surviving[WINS] - surviving[LOSES]
    if corrected_away:
        tally.append((str(corrected_away), "by the plain interval alone", NOT_SHOWN))
    tally.append((str(found[NOT_SHOWN]), "not shown", NOT_SHOWN))
    others = ((TOO_FEW, TOO_FEW), (UNCOMPARED, UNCOMPARED), (FAILED, "without a result"))
    tally += [(str(found[name]), what, name) for name, what in others if found[name]]
    trials = {(row.trial_id, row.trial_stage) for row in rows}
    out.append(KeyFigures([*tally, (str(len(trials)), "trials", "")]))
    body: list[list[str | Value]] = []
    for target, group in groups.items():
        best = max(
            (c for c in group if c.gain is not None and c.source != SCRATCH),
            key=lambda c: c.gain or 0,
            default=None,
        )
        counts = _count_verdicts(group)
        value = (
            Value(
                (
                    f"{_format_gain(best, decimals[target])}",
                    f"{best.source} · {best.technique} · "
                    f"{plots.fraction_label(best.label_fraction)}",
                    f"{blocks.MARKS.get(best.verdict, '')} {best.verdict}",
                ),
                best.verdict,
            )
            if best
            else _DASH
        )
        numbers = [counts[WINS], counts[LOSES], counts[NOT_SHOWN], sum(c.n_failed for c in group)]
        body.append([target, group[0].metric or _DASH, value, *map(str, numbers)])
    if body:
        out.append(
            blocks.Table(
                [
                    "Target",
                    "Metric",
                    "Largest gain over scratch",
                    "Wins",
                    "Loses",
                    "Not shown",
                    "Failed trials",
                ],
                body,
                2,
            )
        )
        out.append(
            Text(
                "The largest gain of several is picked by its test value, so it is a little too "
                "large on average; the full matrix is below.",
                "note",
            )
        )
    return out


def _gain_blocks(groups: dict[str, list[MatrixEntry]], decimals: dict[str, int]) -> list[Block]:
    shown = {
        target: compared
        for target, group in groups.items()
        if (compared := [c for c in group if c.gain is not None and not c.against])
    }
    if not shown:
        return []
    limits = plots.forest_limits(shown)
    out: list[Block] = [Heading("Gain over scratch")]
    for target, group in shown.items():
        group = sorted(group, key=lambda c: (fraction_order(c.label_fraction), -(c.gain or 0)))
        svg = plots.forest(group, f"{target}, gain in {group[0].metric}", limits[target])
        listed = [
            [plots.entry_label(c), _format_gain(c, decimals[target]), *_comparison_columns(c)]
            for c in group
        ]
        out.append(
            Figure(svg, f"{target}: gain in {group[0].metric} over scratch, with 95 % intervals.")
        )
        out.append(
            blocks.Table(
                [target, f"Gain in {group[0].metric}", "Verdict", "Paired seeds", "p", "p (Holm)"],
                listed,
            )
        )
        out += _baseline_blocks(target, group, decimals[target])
    out.append(
        Text(
            "▲ wins, ▼ loses, ○ not shown: the interval holds zero, which does not say that "
            "there is no difference. ? too few to tell. * survives "
            "Holm's correction. Positive (right of the line) is better than scratch, "
            "whichever direction the metric has. "
            "Targets with the same metric share one scale.",
            "note",
        )
    )
    return out


def _comparison_columns(entry: MatrixEntry) -> list[str]:
    """Return the table columns of a comparison: verdict, paired seeds and both p values."""
    word = f"{blocks.MARKS.get(entry.verdict, '')} {entry.verdict} {_code_mark(entry)}".strip()
    corrected = _format_p_value(entry.gain_p_holm) + (" *" if entry.survives else "")
    return [word, _format_count(entry.paired_seeds), _format_p_value(entry.gain_p), corrected]


def _format_p_value(value: float | None) -> str:
    if value is None:
        return _DASH
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _baseline_blocks(target: str, group: Sequence[MatrixEntry], decimals: int) -> list[Block]:
    """Return the table of gains over the best scratch network, where there are several backbones.

    A note above it says that the other gains are measured against different networks. Baselines,
    which are no networks, are left out.
    """
    group = [entry for entry in group if not entry.is_baseline]
    if not _has_several_backbones(group):
        return []
    backbones = sorted({entry.backbone for entry in group})
    best = sorted(
        {
            f"{plots.fraction_label(entry.label_fraction)}: {entry.baseline}"
            for entry in group
            if entry.baseline
        }
    )
    note = (
        f"{target}: these gains are measured against {len(backbones)} different scratch "
        "networks, each against that of its own backbone "
        f"({', '.join(backbones)}), so they cannot be compared with each other. The target's "
        "best scratch network by validation: "
        f"{'; '.join(best) or 'unknown'}. Gains over it:"
    )
    listed = [
        [
            plots.entry_label(c),
            c.backbone,
            _format_gain(c, decimals),
            _format_baseline_gain(c, decimals),
        ]
        for c in group
    ]
    return [
        Text(note),
        blocks.Table(
            [target, "Backbone", "Gain over its own scratch", "Gain over the best scratch"],
            listed,
            2,
        ),
    ]


def _best_baseline_blocks(target: str, group: Sequence[MatrixEntry], decimals: int) -> list[Block]:
    """Return the table of gains over the best model without a network, where there is one."""
    compared = [entry for entry in group if entry.best_baseline_gain is not None]
    tried = sorted({entry.technique for entry in group if entry.is_baseline and entry.n_seeds})
    if not compared and len(tried) > 1 and not any(entry.best_baseline for entry in group):
        return [
            Text(
                f"{target}: the best of the baselines ({', '.join(tried)}) is not known, because "
                f"none has a {group[0].metric} on validation rows.",
                "note",
            )
        ]
    if not compared:
        return []
    order = sorted(
        compared,
        key=lambda c: (fraction_order(c.label_fraction), -(c.best_baseline_gain or 0)),
    )
    body = [
        [plots.entry_label(c), c.best_baseline, _format_best_baseline_gain(c, decimals)]
        for c in order
    ]
    found = Counter(entry.best_baseline_verdict for entry in compared)
    others = "".join(f", {found[name]} {name}" for name in (TOO_FEW, UNCOMPARED) if found[name])
    return [
        Heading(f"{target}: gain over the best baseline", 3),
        Text(
            "A baseline is a model without a network, fitted on the same labelled rows; the best "
            "one is chosen on validation rows. By the plain 95 % interval, which is not corrected "
            f"for the number of comparisons, {found[WINS]} of {len(compared)} networks are better "
            f"than it, {found[LOSES]} are worse{others}."
        ),
        blocks.Table([target, "Baseline", f"Gain in {compared[0].metric}"], body, 2),
    ]


# ---------------------------------------------------------------- one target


def _row_label(entry: MatrixEntry, backbones: bool) -> str:
    return f"{entry.source} · {entry.technique}" + (f" ({entry.backbone})" if backbones else "")


def _target_blocks(
    target: str,
    group: list[MatrixEntry],
    rows: Sequence[ResultRow],
    curves: Mapping[str, Sequence[CurvePoint]],
    decimals: int,
    split: str,
    pooled: tuple[Sequence[ResultRow], dict[str, stats.RunPredictions]],
) -> list[Block]:
    metric = next((c.metric for c in group if c.metric), "")
    done = [c for c in group if c.mean is not None]
    out: list[Block] = [Heading(target)]
    if done:
        sizes = sorted({c.n_test for c in done if c.n_test})
        seeds = sorted({c.n_seeds for c in done})
        better = "higher" if done[0].higher_is_better else "lower"
        averaged = (
            _plural(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        )
        rows_read = " or ".join(_format_count(n) for n in sizes) or "an unknown number of"
        out.append(
            Text(
                f"Test {metric} ({better} is better), mean over {averaged} on {rows_read} test "
                "rows, with 95 % intervals; "
                "below it the gain over scratch (▲ wins, ▼ loses, ○ not shown, ? too few to "
                "tell, * survives Holm's correction)."
            )
        )
    out.append(_matrix_table(group, decimals))
    if split:
        out.append(Text(f"Splits: {split}", "note"))
    followed = _curve_metric(metric, target, rows, curves)
    panels = learning_curves(target, followed, rows, curves)
    if panels:
        caption = f"{target}: validation {followed} while fine-tuning, mean over seeds."
        if any(row.target == target and row.split == results.SOURCE_VALIDATION for row in rows):
            caption += " With 0 labels it is that on the source's validation rows."
        out.append(Figure(plots.learning(panels, followed), caption))
        out.append(Details("Numbers of the figure", [_curve_table(panels, followed, decimals)]))
    if len({c.label_fraction for c in done if c.n_train}) > 1:
        out.append(
            Figure(
                plots.label_efficiency(done),
                f"{target}: test {metric} by number of labelled rows, with 95 % intervals.",
            )
        )
    return (
        out
        + per_label.blocks(target, done, *pooled)
        + subgroups.blocks(target, done, *pooled)
        + rollouts.blocks(target, done, *pooled)
    )


def _matrix_table(group: list[MatrixEntry], decimals: int) -> blocks.Table:
    fractions = sorted({c.label_fraction for c in group}, key=fraction_order)
    several = _has_several_backbones(group)
    lines: dict[tuple[str, str, str], dict[str, MatrixEntry]] = defaultdict(dict)
    for entry in sorted(
        group, key=lambda c: (c.source == SCRATCH, c.source, c.backbone, c.technique)
    ):
        lines[entry.source, entry.backbone, entry.technique][entry.label_fraction] = entry
    sizes = {c.label_fraction: c.n_train for c in group if c.n_train}
    header = ["Source · technique"]
    for fraction in fractions:
        name = plots.fraction_label(fraction)
        if fraction.replace(".", "").isdigit():
            name += " of labels"
        if fraction in sizes and not fraction.endswith(" rows"):
            name += f" ({_format_count(sizes[fraction])} rows)"
        header.append(name)
    body = [
        [
            _row_label(next(iter(line.values())), several),
            *(_matrix_value(line.get(f), decimals) for f in fractions),
        ]
        for line in lines.values()
    ]
    return blocks.Table(header, body)


def _code_mark(entry: MatrixEntry) -> str:
    """Return the sign and words for an entry whose trials were made by other code or versions."""
    return f"{code_versions.SIGNS[entry.code_mark]} {entry.code_mark}" if entry.code_mark else ""


def _matrix_value(entry: MatrixEntry | None, decimals: int) -> str | Value:
    if entry is None:
        return _DASH
    if entry.verdict == FAILED:
        return Value(("failed", _plural(entry.n_failed, "trial")), FAILED)
    lines = [blocks.format_interval(entry.mean, None, None, decimals)]
    if entry.low is not None and entry.high is not None:
        lines.append(_format_mean(entry, decimals).partition(" ")[2])
    if entry.code_mark:
        lines.append(_code_mark(entry))
    if entry.n_failed:
        lines.append(f"{_plural(entry.n_failed, 'trial')} failed")
    if entry.evidence:
        lines.append(entry.evidence)
    if entry.against:
        lines.append(f"against {entry.against}:")
    if entry.gain is not None:
        survives = " *" if entry.survives else ""
        mark = blocks.MARKS.get(entry.verdict, "")
        lines.append(f"{mark} {_format_gain(entry, decimals)}{survives}".strip())
    if entry.verdict == UNCOMPARED:
        seeds = (
            f" ({_plural(entry.paired_seeds, 'paired seed')})"
            if entry.paired_seeds is not None
            else ""
        )
        lines.append(f"{UNCOMPARED}{seeds}")
    return Value(tuple(lines), entry.verdict)


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
        Label fraction to (source, technique) to points (step, mean over seeds of the metric).
    """
    trials = {
        row.trial_id: row
        for row in rows
        if row.target == target and row.trial_stage == "final" and row.status == "done"
    }
    points: dict[tuple[str, str, str], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for trial_id, row in trials.items():
        for point in curves.get(trial_id, ()):
            value = point.metrics.get(metric)
            # step 0: a trial without training has no curve
            if value is None or not math.isfinite(value) or not point.step:
                continue
            line = points[row.label_fraction, row.source, results.technique(row)]
            line[point.step].append(value)
    out: dict[str, plots.Series] = defaultdict(dict)
    for (fraction, source, technique), by_step in points.items():
        out[fraction][source, technique] = [
            (step, fmean(values)) for step, values in sorted(by_step.items())
        ]
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
    return list({(row.trial_id, row.trial_stage): row for row in reversed(rows)}.values())[::-1]


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
        Heading("Cut by the budget"),
        Text(
            f"{_plural(len(cut), 'pair')} of source and technique did not promise enough in short "
            "runs (fanout.select.budget). They were not trained in full and their test rows were "
            "not read, so whether they would have won is unknown."
        ),
        blocks.Table(["Target", "Source · technique", "Labels", "Cut", "Validation then"], body, 4),
    ]


def _cost_blocks(entries: Sequence[MatrixEntry], rows: Sequence[ResultRow]) -> list[Block]:
    shown: dict[tuple[str, str, str, str], list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        if entry.seconds is not None:
            shown[entry.target, entry.source, entry.backbone, entry.technique].append(entry)
    if not shown:
        return []
    spent: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for row in _unique_trials(rows):
        spent[row.target, row.source, row.backbone, results.technique(row)].append(
            row.seconds or 0.0
        )
    several = {
        target
        for target, *_ in shown
        if _has_several_backbones(c for key in shown if key[0] == target for c in shown[key])
    }
    body: list[list[str]] = []
    for key, group in shown.items():
        seconds = sum((c.seconds or 0) * c.n_seeds for c in group) / sum(c.n_seeds for c in group)
        params = [c.params_trained for c in group if c.params_trained is not None]
        trials = spent.get(key, [])
        name = _row_label(group[0], key[0] in several)
        body.append(
            [
                key[0],
                name,
                _format_seconds(seconds),
                _format_count(max(params, default=None)),
                _format_count(len(trials)),
                _format_seconds(sum(trials)),
                "; ".join(dict.fromkeys(c.layers_trained for c in group)),
            ]
        )
    return [
        Heading("Cost"),
        blocks.Table(
            [
                "Target",
                "Source · technique",
                "Final trial",
                "Parameters trained",
                "Trials with search",
                "All trials",
                "Layers trained",
            ],
            body,
            2,
        ),
    ]


def _scored(source_scores: Mapping[str, PairScores]) -> dict[str, PairScores]:
    """Return the pairs that have scores: of a target with one source shift is measured alone."""
    return {name: pair for name, pair in source_scores.items() if pair.scores}


def _shifts(source_scores: Mapping[str, PairScores]) -> dict[str, list[Shift]]:
    """Return what was measured of each target's rows."""
    found: dict[str, list[Shift]] = defaultdict(list)
    for pair in source_scores.values():
        found[pair.target] += pair.shifts
    return found


def _known_scores(
    rows: Sequence[ResultRow], scores: dict[str, dict[str, Any]] | None
) -> dict[tuple[str, str, str], float]:
    """Return (target, source, name of the score) to its value, NaN where it is not defined."""
    found: dict[tuple[str, str, str], float] = {
        (r.target, r.source, gains.score_name(r.score_name)): r.score_value
        for r in rows
        if r.score_name and r.score_value is not None
    }
    for pair, scored in (scores or {}).items():
        source, _, target = pair.rpartition("|")
        value = scored["score_value"]
        found.setdefault(
            (target, source, gains.score_name(scored["score_name"])),
            math.nan if value is None else value,
        )
    return found


def _score_blocks(
    rows: Sequence[ResultRow], scores: dict[str, dict[str, Any]] | None
) -> list[Block]:
    """Return the table of transferability scores, also of sources left out because of theirs."""
    tried = {(row.target, row.source) for row in rows}
    found = _known_scores(rows, scores)
    if not found:
        return []
    body: list[list[str]] = []
    for (target, source, name), value in gains.best_scores_first(found):
        what = "fine-tuned" if (target, source) in tried else "left out"
        shown = "undefined" if math.isnan(value) else f"{value:.4g}"
        body.append([target, source, name, what, shown])
    return [
        Heading("Transferability scores"),
        blocks.Table(["Target", "Source", "Score", "What became of it", "Value"], body, 4),
    ]


def _pretraining_blocks(pretraining: Sequence[dict[str, Any]]) -> list[Block]:
    if not pretraining:
        return []
    body: list[list[str]] = []
    more: list[Block] = []
    for item in pretraining:
        metrics: dict[str, Any] = item.get("metrics") or {}
        measured = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, (int, float)) else f"{name} {value}"
            for name, value in metrics.items()
        )
        body.append(
            [
                str(item.get("source", _DASH)),
                str(item.get("backbone") or _DASH),
                str(item.get("objective") or _DASH),
                measured or _DASH,
                _format_count(item.get("steps")),
                _format_count(item.get("rows")),
                _format_seconds(item.get("seconds")),
                _format_count(item.get("rows_per_second")),
            ]
        )
        details = _source_details(item)
        if details:
            title = f"{item.get('source', 'source')}: where it comes from and what was carried over"
            more.append(Details(title, details))
    head = ["Source", "Backbone", "Objective", "Metrics", "Steps", "Rows read", "Time", "Rows/s"]
    return [Heading("Pretraining"), blocks.Table(head, body, 4), *more]


def _source_details(item: dict[str, Any]) -> list[Block]:
    """Return the code, versions, bundle, splits and copied tensors of a source."""
    details: list[Block] = []
    if item.get("changes"):
        changes = ", ".join(item["changes"])
        details.append(Text(f"Source {code_versions.OTHER}: {changes}", "warning"))
    versions: dict[str, str] = item.get("versions") or {}
    libraries = [
        f"{name} {version}" for name, version in versions.items() if name in provenance.LIBRARIES
    ]
    if libraries:
        details.append(Text(f"Versions: {', '.join(libraries)}"))
    for name, title in (("bundle_uri", "Bundle"), ("splits", "Splits")):
        if item.get(name):
            details.append(Text(f"{title}: {item[name]}"))
    if item.get("transfer"):
        details += [Text("Transfer of tensors:"), Code(str(item["transfer"]))]
    return details


def _failure_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    failed = [row for row in _unique_trials(rows) if row.status == "failed"]
    if not failed:
        return []
    by_error: dict[str, list[ResultRow]] = defaultdict(list)
    for row in failed:
        by_error[row.error or "no error was recorded"].append(row)
    out: list[Block] = [
        Heading("Failures"),
        Text(f"{_plural(len(failed), 'trial')} failed; the others went on without them."),
    ]
    for error, group in sorted(by_error.items(), key=lambda kv: -len(kv[1])):
        lines = error.strip().splitlines() or [error]
        which = [
            f"{r.trial_id}: {r.target} · {r.source} · {results.technique(r)} · labels "
            f"{r.label_fraction} · seed {r.seed} "
            f"({r.trial_stage}) {r.hyper_parameters or ''}".strip()
            for r in group[:20]
        ]
        which += [f"and {len(group) - 20} more"] if len(group) > 20 else []
        out.append(
            Details(
                f"{_plural(len(group), 'trial')}: {lines[-1][:160]}", [Bullets(which), Code(error)]
            )
        )
    return out


def _duplicate_blocks(rows: Sequence[ResultRow]) -> list[Block]:
    found = results.duplicates(list(rows))
    if not found:
        return []
    return [
        Heading("Identical results under different settings"),
        Text(
            "Trials that differ in a setting and still agree to 12 digits are a sign that the "
            "setting had no effect: look at these before you "
            "trust them.",
            "warning",
        ),
        Bullets(found),
    ]


def _split_blocks(splits: dict[str, str]) -> list[Block]:
    return (
        [Heading("Splits"), Bullets([f"{name}: {text}" for name, text in splits.items()])]
        if splits
        else []
    )


def _method_blocks(
    entries: Sequence[MatrixEntry],
    rows: Sequence[ResultRow],
    notes: Sequence[str],
    versions: dict[str, str],
    code_notes: Sequence[str],
) -> list[Block]:
    compared = sum(entry.gain_p_holm is not None for entry in entries)
    method = (
        "Intervals are 95 % and take seeds for the readers and test units for the cases of a "
        "multi-reader study (Obuchowski and Rockette, 1995; degrees "
        "of freedom as Hillis, 2007): the variance between seeds by Student's t, and the "
        "covariance over test units, whole groups where the data "
        f"declare them, by a paired bootstrap (Efron and Tibshirani, 1993) with {stats.DRAWS} "
        f"draws (down to {stats.RECOMPUTED_DRAWS} where rows are "
        "many and the metric is no sum over them). Of one seed they are percentile bootstraps "
        "over test units alone."
    )
    sentences = [
        method,
        "Gains are paired: the same seeds and the same test rows, sampled together for both "
        "sides. Positive is better. A verdict needs "
        f"{MIN_SEEDS} paired seeds, and {stats.MIN_RARER_UNITS} test units of the rarer "
        f"class ({stats.MIN_UNITS} test units where rows have no "
        "classes). No interval passes the bounds of its metric.",
    ]
    if compared:
        sentences.append(
            "The plain intervals are not corrected for the number of comparisons: of "
            f"{compared} comparisons without any true difference, about "
            f"{SIGNIFICANT * compared:.1f} would still be won or lost by them. Corrected p "
            "values are Holm's (1979)."
        )
    if any(row.trial_stage == "search" and row.drawn != "{}" for row in rows):
        sentences.append(SEARCH_NOISE)
    ways = Counter(entry.interval for entry in entries if entry.interval)
    sentences += [f"{way}: {_plural(count, 'result')}." for way, count in ways.items()]
    out: list[Block] = [Heading("How this was made"), Bullets(sentences)]
    if notes:
        out += [Heading("Notes", 3), Bullets(list(notes))]
    if code_notes:
        out += [
            Heading("Trials of other code or versions", 3),
            Text(code_notes[0], "warning"),
            Bullets(list(code_notes[1:])),
        ]
    made_with = [
        *code_versions.versions_table(rows),
        *([name, str(version)] for name, version in versions.items()),
    ]
    for column, what in (
        ("spec_hash", "spec hash"),
        ("git_sha", "git commit"),
        ("device", "device"),
    ):
        values = sorted({str(getattr(row, column)) for row in rows if getattr(row, column)})
        if values and not set(values) <= set(map(str, versions.values())):
            made_with.append(
                [
                    what,
                    ", ".join(values[:6])
                    + (f" and {len(values) - 6} more" if len(values) > 6 else ""),
                ]
            )
    times = [row.started_at for row in rows if row.started_at]
    made_with += [["first trial started", f"{min(times):%Y-%m-%d %H:%M} UTC"]] if times else []
    if made_with:
        out += [Heading("Versions", 3), blocks.Table(["What", "Which"], made_with, 2)]
    winners = [
        [
            c.target,
            _row_label(c, False),
            plots.fraction_label(c.label_fraction),
            _format_parameters(c.hyper_parameters),
        ]
        for c in entries
        if c.n_seeds
    ]
    if winners:
        out.append(
            Details(
                "Hyper-parameters of the final trials",
                [
                    blocks.Table(
                        ["Target", "Source · technique", "Labels", "Hyper-parameters"], winners, 4
                    )
                ],
            )
        )
    return out


def _format_parameters(text: str) -> str:
    try:
        named = json.loads(text).items()
        return ", ".join(f"{name} {value}" for name, value in named if value is not None) or _DASH
    except (ValueError, AttributeError):
        return text
