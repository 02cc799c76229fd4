"""Report blocks on where transfer pays, where it hurts and what a gain costs.

They are the warning on the first screen, the heat map of sources and targets, gains beside
transferability scores, and the Pareto front of gain and cost. All compare gains of different
sources, and so they are given entries of `matrix.comparable_across_backbones`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from pipeline.config import registry
from pipeline.report import plots, score_audit
from pipeline.report.blocks import (
    DASH,
    MARKS,
    Block,
    Details,
    Figure,
    Heading,
    Table,
    Text,
    Value,
    format_interval,
    with_minus_sign,
)
from pipeline.report.matrix import (
    LOSES,
    MIN_SEEDS,
    REFERENCE,
    SCRATCH,
    WINS,
    MatrixEntry,
    best_on_validation,
    most_labels_first,
)
from pipeline.report.source_scores import PairScores

Scores = Mapping[tuple[str, str, str], float]
"""Value of each (target, source, name of the score), NaN where it is not defined."""


def chosen(entries: Sequence[MatrixEntry]) -> MatrixEntry:
    """Return the entry that a user would take: the best on validation rows.

    Where an entry has no validation value it is the one with the largest gain on test rows.
    """
    if all(entry.validation is not None for entry in entries):
        return best_on_validation(entries)
    return max(entries, key=lambda entry: entry.gain or 0.0)


def _compared(entries: Sequence[MatrixEntry]) -> list[MatrixEntry]:
    """Return the entries with a source and a gain over scratch."""
    return [entry for entry in entries if entry.source != SCRATCH and entry.gain is not None]


def gain_text(entry: MatrixEntry, decimals: int) -> str:
    """Return the gain of an entry over scratch with its interval."""
    return format_interval(entry.gain, entry.gain_low, entry.gain_high, decimals, "+")


def _over(entries: Sequence[MatrixEntry]) -> str:
    """Return a sentence on the scratch network that gains are over, where there are several."""
    if all(entry.best_scratch in ("", entry.backbone) for entry in entries):
        return ""
    return (
        " Where a target has several scratch networks, gains are over the one that is best on "
        "validation rows."
    )


def _by_fraction(entries: Sequence[MatrixEntry]) -> dict[str, list[MatrixEntry]]:
    """Return the entries of each label fraction, the most labels first."""
    out: dict[str, list[MatrixEntry]] = {name: [] for name in most_labels_first(entries)}
    for entry in entries:
        out[entry.label_fraction].append(entry)
    return out


# ---------------------------------------------------------------- where it hurts


def warnings(
    groups: Mapping[str, Sequence[MatrixEntry]], decimals: Mapping[str, int]
) -> list[Block]:
    """Return a warning for each target and label fraction where a source was worse than scratch.

    It names the sources and techniques, the largest loss, and what to use instead. Only wins and
    losses count that survive Holm's correction: among many comparisons a few are lost by luck.
    """
    return [
        Text(_warning(target, fraction, entries, decimals[target]), "warning")
        for target, group in groups.items()
        for fraction, entries in _by_fraction(_compared(group)).items()
        if any(_is_worse(entry) for entry in entries)
    ]


def _is_worse(entry: MatrixEntry) -> bool:
    return entry.verdict == LOSES and entry.survives


def _warning(target: str, fraction: str, entries: Sequence[MatrixEntry], decimals: int) -> str:
    by_source: dict[str, list[MatrixEntry]] = defaultdict(list)
    for entry in entries:
        by_source[entry.source].append(entry)
    losses: list[str] = []
    for source, tried in by_source.items():
        lost = sorted(
            (entry for entry in tried if _is_worse(entry)), key=lambda entry: entry.gain or 0.0
        )
        if not lost:
            continue
        names = " and ".join(dict.fromkeys(entry.technique for entry in lost))
        with_all = f"any of {len(tried)} techniques" if len(tried) > 2 else names
        how = with_all if len(lost) == len(tried) else names
        most = "at worst " if len(lost) > 1 else ""
        losses.append(f"{source} with {how} ({most}{gain_text(lost[0], decimals)})")
    labels = plots.labels_text(fraction)
    scratch = (
        "the target's best network from scratch" if _over(entries) else "training from scratch"
    )
    return with_minus_sign(
        f"For target {target} ({labels}), fine-tuning {'; '.join(losses)} is worse than "
        f"{scratch}: {_alternative(entries, decimals)}."
    )


def _alternative(entries: Sequence[MatrixEntry], decimals: int) -> str:
    """Return what to use where some sources lose: what wins, or scratch."""
    winners = [entry for entry in entries if entry.verdict == WINS]
    if not winners:
        return "use scratch"
    surviving = [entry for entry in winners if entry.survives]
    best = chosen(surviving or winners)
    text = (
        f"better than scratch is {best.source} with {best.technique} ({gain_text(best, decimals)})"
    )
    return text if surviving else f"{text}, though not after Holm's correction"


# ---------------------------------------------------------------- sources by targets


def heat_maps(entries: Sequence[MatrixEntry], decimals: Mapping[str, int]) -> list[Block]:
    """Return the gains of sources by targets, with the best technique and with each technique.

    There is a table for each label fraction. The one with the most labels is open.
    """
    compared = _compared(entries)
    pairs = {(entry.source, entry.target) for entry in compared}
    if len(pairs) < 2:
        return []
    by_validation = all(entry.validation is not None for entry in compared)
    how = "its validation rows" if by_validation else "test rows, which flatters it"
    out: list[Block] = [
        Heading("Sources by targets"),
        Text(
            "Gain over scratch of each source on each target, with the technique that is best by "
            f"{how}. Green is better than scratch and red is worse. The larger the difference, the "
            "stronger the colour, within each target. ▲ wins, ▼ loses, ○ not shown, * also after "
            f"Holm's correction for all comparisons of the job.{_over(compared)}"
        ),
    ]
    for number, (fraction, group) in enumerate(_by_fraction(compared).items()):
        labels = plots.labels_text(fraction)
        is_folded = number > 0
        table = heat_map("" if is_folded else labels, group, decimals)
        out.append(Details(labels, [table]) if is_folded else table)
    techniques = list(dict.fromkeys(entry.technique for entry in compared))
    for technique in techniques if len(techniques) > 1 else ():
        alone = [entry for entry in compared if entry.technique == technique]
        tables = [
            heat_map(plots.labels_text(fraction), group, decimals)
            for fraction, group in _by_fraction(alone).items()
        ]
        out.append(Details(f"{technique} alone", tables))
    return out


MAX_TARGETS_ACROSS = 7
"""Of more targets a heat map has a line each, where its sources are fewer: it stays narrow."""


def heat_map(corner: str, entries: Sequence[MatrixEntry], decimals: Mapping[str, int]) -> Table:
    """Return the gains of sources by targets, each with the technique that `chosen` takes.

    Args:
        corner: The header above the names.
        entries: Entries of one label fraction with a gain.
        decimals: Number of decimals of each target.
    """
    sources, targets = (
        sorted({getattr(entry, name) for entry in entries}) for name in ("source", "target")
    )
    best: dict[tuple[str, str], MatrixEntry] = {}
    for source in sources:
        for target in targets:
            tried = [entry for entry in entries if (entry.source, entry.target) == (source, target)]
            if tried:
                best[source, target] = chosen(tried)
    largest = {
        target: max(abs(entry.gain or 0.0) for (_, of), entry in best.items() if of == target)
        for target in targets
    }
    body: list[list[str | Value]] = []
    for source in sources:
        line: list[str | Value] = [source]
        for target in targets:
            entry = best.get((source, target))
            if entry is None:
                line.append(DASH)
                continue
            gain = format_interval(entry.gain, None, None, decimals[target], "+")
            mark = f"{MARKS.get(entry.verdict, '')}{' *' if entry.survives else ''}"
            shade = (entry.gain or 0.0) / (largest[target] or 1.0)
            line.append(Value((f"{gain} {mark}".strip(), entry.technique), shade=shade))
        body.append(line)
    if len(targets) > max(MAX_TARGETS_ACROSS, len(sources)):
        columns = [line[1:] for line in body]
        sideways = [list(line) for line in zip(targets, *columns, strict=True)]
        return Table([corner, *sources], sideways, heat=True)
    return Table([corner, *targets], body, heat=True)


# ---------------------------------------------------------------- scores


LESS = " (less is better)"


def score_name(name: str, higher_is_better: bool | None = None) -> str:
    """Return how figures and tables call a score: that of which less is better says so.

    Args:
        name: Its registered name.
        higher_is_better: Its direction; None: that of the registered score.
    """
    if higher_is_better is None and name in registry.entries("score"):
        higher_is_better = getattr(registry.get("score", name), "higher_is_better", True)
    title = score_audit.title(name)
    return f"{title}{LESS}" if higher_is_better is False else title


def _best_first(name: str, value: float) -> float:
    """Return a sort key that puts the best value of a score (`score_name`) first."""
    return value if name.endswith(LESS) else -value


def best_scores_first(scores: Scores) -> list[tuple[tuple[str, str, str], float]]:
    """Return the scores by target and name, the best source first and what is not defined last."""

    def sort_key(item: tuple[tuple[str, str, str], float]) -> tuple[object, ...]:
        (target, _, name), value = item
        return target, name, math.isnan(value), _best_first(name, value)

    return sorted(scores.items(), key=sort_key)


def all_scores(source_scores: Mapping[str, PairScores]) -> dict[tuple[str, str, str], float]:
    """Return the value of each (target, source, `score_name`) whose score is defined."""
    return {
        (pair.target, pair.source, score_name(name, score.higher_is_better)): score.value
        for pair in source_scores.values()
        for name, score in pair.scores.items()
        if score.value is not None
    }


def score_figures(
    entries: Sequence[MatrixEntry], scores: Scores, decimals: Mapping[str, int]
) -> list[Block]:
    """Return a figure and a table for each score: its values beside the gains of the sources.

    Those of more than two scores are folded.

    The gain of a source is that with the technique that is best on validation rows, at the most
    labels that it was compared at.
    """
    by_pair: dict[tuple[str, str], list[MatrixEntry]] = defaultdict(list)
    for entry in _compared(entries):
        by_pair[entry.target, entry.source].append(entry)
    out: list[Block] = []
    names = sorted({name for _, _, name in scores})
    for name in names:
        panels: dict[str, list[tuple[str, float, MatrixEntry]]] = defaultdict(list)
        for (target, source), compared in sorted(by_pair.items()):
            value = scores.get((target, source, name), math.nan)
            if math.isfinite(value):
                with_most_labels = next(iter(_by_fraction(compared).values()))
                panels[target].append((source, value, chosen(with_most_labels)))
        shown = {target: points for target, points in panels.items() if len(points) > 1}
        if not shown:
            continue
        listed: list[list[str | Value]] = [
            [target, source, f"{value:.4g}", gain_text(entry, decimals[target])]
            for target, points in shown.items()
            for source, value, entry in sorted(
                points, key=lambda point: _best_first(name, point[1])
            )
        ]
        caption = (
            f"Gain over scratch by {name} of the source, one panel for each target. Where more is "
            "better, a score that tells good sources from bad ones rises to the right."
            f"{_over([entry for points in shown.values() for _, _, entry in points])}"
        )
        table = Table(["Target", "Source", name, "Gain over scratch"], listed, 2)
        figure = Figure(plots.score_gain(shown, name), caption, table)
        out.append(Details(f"Gain beside {name}", [figure]) if len(names) > 2 else figure)
    return out


# ---------------------------------------------------------------- cost


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points (cost, gain) that no other point beats, cheapest first.

    A point is beaten by one that costs no more and gains no less, and is better in one of both. Of
    equal points the first is taken.
    """
    front: list[int] = []
    highest = -math.inf
    by_cost = sorted((cost, -gain, index) for index, (cost, gain) in enumerate(points))
    for _, loss, index in by_cost:
        if -loss > highest:
            front.append(index)
            highest = -loss
    return front


def _has_own_cost(entry: MatrixEntry) -> bool:
    """Return whether an entry's seconds are all of its cost, and it has the seeds for a verdict.

    Those of an average or an ensemble leave out the trials that it is made of.
    """
    if entry.source == SCRATCH:
        return True
    return not entry.combines_trials and (entry.paired_seeds or 0) >= MIN_SEEDS


def _left_out(timed: Sequence[MatrixEntry], shown: Sequence[MatrixEntry]) -> str:
    """Return a sentence on the entries that no cost is shown of, where there are any."""
    names = [f"{entry.source} · {entry.technique}" for entry in timed if entry not in shown]
    if not names:
        return ""
    return (
        f" Left out, because they have one seed, or do not count the cost of the trials that they "
        f"are made of: {', '.join(names)}."
    )


def cost_figures(
    groups: Mapping[str, Sequence[MatrixEntry]], decimals: Mapping[str, int]
) -> list[Block]:
    """Return for each target the gain by seconds and by trained parameters, and the fronts.

    The entries are those of the most labels. Scratch has a gain of zero. Sources' own training is
    not counted, and entries whose seconds leave out the trials that they combine are left out.
    """
    return [
        block
        for target, group in groups.items()
        for block in _cost_figure(target, group, decimals[target])
    ]


def _cost_figure(target: str, group: Sequence[MatrixEntry], decimals: int) -> list[Block]:
    """Return a target's figure and the table of its fronts; nothing of fewer than three entries."""
    by_fraction = _by_fraction(_compared(group))
    if not by_fraction:
        return []
    fraction, compared = next(iter(by_fraction.items()))
    baselines = {entry.best_scratch for entry in compared}
    scratch = [
        entry
        for entry in group
        if entry.verdict == REFERENCE
        and entry.label_fraction == fraction
        and entry.n_seeds
        and entry.backbone in baselines
    ]
    timed = [
        entry for entry in (*compared, *scratch) if entry.seconds is not None and entry.seconds > 0
    ]
    shown = [entry for entry in timed if _has_own_cost(entry)]
    if len(shown) < 3:
        return []
    fronts = {
        "seconds": pareto_front([(entry.seconds or 0.0, entry.gain or 0.0) for entry in shown]),
        "parameters": pareto_front(
            [(float(entry.params_trained or 0), entry.gain or 0.0) for entry in shown]
        )
        if all(entry.params_trained is not None for entry in shown)
        else [],
    }
    numbered = list(dict.fromkeys(index for front in fronts.values() for index in front))
    body: list[list[str | Value]] = []
    for number, index in enumerate(numbered, 1):
        entry = shown[index]
        on = " and ".join(name for name, front in fronts.items() if index in front)
        gain = "0 (scratch)" if entry.verdict == REFERENCE else gain_text(entry, decimals)
        params = DASH if entry.params_trained is None else f"{entry.params_trained:,}"
        name = f"{number}: {entry.source} · {entry.technique}"
        body.append([name, on, gain, f"{entry.seconds:.3g} s", params])
    head = ["On the front", "By", "Gain over scratch", "Final trial", "Parameters trained"]
    labels = plots.labels_text(fraction)
    caption = (
        f"{target}: gain by the cost of a final trial, with {labels}. The line is the "
        "Pareto front: no other entry gains as much for less. Numbers are those of the table. "
        f"The training of sources is not counted.{_over(compared)}{_left_out(timed, shown)}"
    )
    table = Table(head, body, 2)
    return [Figure(plots.pareto(shown, fronts, numbered), caption), table]
