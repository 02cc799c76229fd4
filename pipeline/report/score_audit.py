"""Compares the ranking of sources by each transferability score with that by fine-tuning.

A score is right where the sources that it puts first are those whose fine-tuned networks are best.
The result of fine-tuning a source is the mean of the primary metric on test rows, for each label
fraction, over the techniques that every source of the target was tried with.

- Weighted Kendall tau (Vigna 2015) of scores and means: 1 for the same order, -1 for the reverse;
  exchanges at the top count most. Averaged over label fractions, then over targets.
- Regret of top k: how much worse the best of the k sources that the score puts first is than the
  best of all, in units of the metric. 0 is the best. Where sources have equal scores it is the mean
  over the choices among them.
- The interval of tau draws targets with repetition and, where they are few, sources within each.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats as scipy_stats  # pyright: ignore[reportMissingTypeStubs]

from pipeline.config import registry
from pipeline.report import blocks, plots
from pipeline.report.blocks import Block, Bullets, Details, Heading, Text
from pipeline.report.matrix import SCRATCH, MatrixEntry
from pipeline.report.source_scores import PairScores, ScoreValue

DRAWS = 200
MIN_PAIRS = 8
"""Pairs of a source and a target that an interval of tau needs."""
MANY_TARGETS = 8
UNDEFINED = "undefined"


@dataclass(frozen=True)
class Outcome:
    """The results of fine-tuning the sources of a target at one label fraction.

    ``means`` are source to mean metric, larger is better; ``halves`` are half the widths of their
    intervals, 0 where there is none. ``metric`` is as it is shown, with its own direction.
    """

    target: str
    label_fraction: str
    metric: str
    higher_is_better: bool
    means: dict[str, float]
    halves: dict[str, float]

    @property
    def best(self) -> str:
        return max(self.means, key=self.means.__getitem__)

    def shown(self, source: str) -> float:
        """Return the mean metric of a source in its own direction."""
        return self.means[source] if self.higher_is_better else -self.means[source]


@dataclass(frozen=True)
class Audit:
    """The comparison of a score with fine-tuning, in one domain. Numbers may be unknown (None)."""

    domain: str
    score: str
    seconds: float | None
    """Seconds of the score for a source and a target, with the features that all scores share."""
    trial_seconds: float | None
    """Seconds of one fine-tuning trial."""
    tau: float | None = None
    low: float | None = None
    high: float | None = None
    top_1: float | None = None
    """Regret of the source that the score puts first."""
    top_3: float | None = None
    """Regret of the best of its first three, where there are more than three sources."""
    chance: float | None = None
    """Regret that a source drawn at random has on average."""
    pairs: int = 0
    """Pairs of a source and a target that have both."""
    misled: tuple[str, ...] = ()
    """A sentence for each target where following the score would have done harm."""


def outcomes(entries: Sequence[MatrixEntry]) -> list[Outcome]:
    """Return the results of fine-tuning, for targets with at least two sources.

    Techniques that train nothing are left out, and those that some source was not tried with.
    """
    tried: dict[tuple[str, str], dict[str, dict[str, MatrixEntry]]] = defaultdict(dict)
    for entry in entries:
        if entry.source != SCRATCH and entry.mean is not None and entry.params_trained:
            group = tried[entry.target, entry.label_fraction]
            group.setdefault(entry.source, {})[entry.technique] = entry
    out: list[Outcome] = []
    for (target, fraction), by_source in tried.items():
        techniques = [set(by_technique) for by_technique in by_source.values()]
        common = techniques[0].intersection(*techniques[1:])
        if len(by_source) < 2 or not common:
            continue
        first = next(iter(by_source.values()))[min(common)]
        sign = 1.0 if first.higher_is_better else -1.0
        means: dict[str, float] = {}
        halves: dict[str, float] = {}
        for source, by_technique in by_source.items():
            chosen = [by_technique[technique] for technique in sorted(common)]
            means[source] = sign * fmean(entry.mean or 0.0 for entry in chosen)
            halves[source] = fmean(_half_width(entry) for entry in chosen)
        out.append(Outcome(target, fraction, first.metric, first.higher_is_better, means, halves))
    return out


def _half_width(entry: MatrixEntry) -> float:
    return 0.0 if entry.low is None or entry.high is None else (entry.high - entry.low) / 2


# ---------------------------------------------------------------- one score


def tau(values: Sequence[float], means: Sequence[float]) -> float:
    """Return the weighted Kendall tau, NaN where all values or all means are equal."""
    if len(set(values)) < 2 or len(set(means)) < 2:
        return float("nan")
    statistics: Any = scipy_stats
    return float(statistics.weightedtau(values, means).statistic)


def ranked(scores: Mapping[str, ScoreValue], outcome: Outcome) -> dict[str, float]:
    """Return the defined score of each source, the best first; larger is better."""
    signed: dict[str, float] = {}
    for source in outcome.means:
        score = scores.get(source)
        if score is not None and score.value is not None:
            signed[source] = score.value if score.higher_is_better else -score.value
    return dict(sorted(signed.items(), key=lambda pair: -pair[1]))


def regret(order: Mapping[str, float], outcome: Outcome, top: int) -> float:
    """Return how much worse the best of the first ``top`` sources is than the best of all.

    Where the last of them has the same score as sources after it, it is the mean over all choices.

    Args:
        order: Score of each source, as `ranked` returns it.
        outcome: What fine-tuning showed.
        top: Number of sources.
    """
    if len(order) <= top:
        best = max(outcome.means[source] for source in order)
        return outcome.means[outcome.best] - best
    last = list(order.values())[top - 1]
    above = [outcome.means[source] for source, score in order.items() if score > last]
    tied = [outcome.means[source] for source, score in order.items() if score == last]
    choices = itertools.combinations(tied, top - len(above))
    best_of_choices = fmean(max(*above, *choice, -np.inf) for choice in choices)
    return outcome.means[outcome.best] - best_of_choices


def audit(
    domain: str,
    score: str,
    scores: Mapping[tuple[str, str], ScoreValue],
    shown: Sequence[Outcome],
    seconds: float | None = None,
    trial_seconds: float | None = None,
) -> Audit:
    """Compare a score with the results of fine-tuning.

    Args:
        scores: The score's value by (target, source).
        shown: Outcomes of the domain.
        seconds: See `Audit`.
        trial_seconds: See `Audit`.
    """
    orders: list[tuple[Outcome, dict[str, float]]] = []
    for outcome in shown:
        of_target = {
            source: v for (target, source), v in scores.items() if target == outcome.target
        }
        order = ranked(of_target, outcome)
        if len(order) > 1:
            orders.append((outcome, order))
    pairs = len({(outcome.target, source) for outcome, order in orders for source in order})
    if not orders:
        return Audit(domain, score, seconds, trial_seconds)
    low, high = _interval(orders) if pairs >= MIN_PAIRS else (None, None)
    of_many_sources = [(outcome, order) for outcome, order in orders if len(outcome.means) > 3]
    return Audit(
        domain,
        score,
        seconds,
        trial_seconds,
        _mean_by_target((outcome.target, _tau_of(outcome, order)) for outcome, order in orders),
        low,
        high,
        _mean_by_target((outcome.target, regret(order, outcome, 1)) for outcome, order in orders),
        _mean_by_target(
            (outcome.target, regret(order, outcome, 3)) for outcome, order in of_many_sources
        ),
        _mean_by_target((outcome.target, _chance(outcome)) for outcome, _ in orders),
        pairs,
        tuple(line for outcome, order in orders if (line := _misled(outcome, order))),
    )


def _tau_of(
    outcome: Outcome, order: Mapping[str, float], sources: Sequence[str] | None = None
) -> float:
    """Return the tau of those sources that have a score; None: of all."""
    scored = [source for source in sources or order if source in order]
    return tau([order[source] for source in scored], [outcome.means[source] for source in scored])


def _chance(outcome: Outcome) -> float:
    return outcome.means[outcome.best] - fmean(outcome.means.values())


def _mean_by_target(values: Iterable[tuple[str, float]]) -> float | None:
    """Return the mean over targets of each one's mean, without NaN; None where nothing is left."""
    by_target: dict[str, list[float]] = defaultdict(list)
    for target, value in values:
        if np.isfinite(value):
            by_target[target].append(value)
    return fmean(fmean(of_target) for of_target in by_target.values()) if by_target else None


def _interval(
    orders: Sequence[tuple[Outcome, dict[str, float]]],
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of tau over targets.

    Where there are fewer than `MANY_TARGETS`, sources are drawn within each target too.
    """
    rng = np.random.default_rng(0)
    by_target: dict[str, list[tuple[Outcome, dict[str, float]]]] = defaultdict(list)
    for outcome, order in orders:
        by_target[outcome.target].append((outcome, order))
    groups = list(by_target.values())
    if len(groups) >= MANY_TARGETS:
        taus = [
            _mean_by_target((outcome.target, _tau_of(outcome, order)) for outcome, order in group)
            for group in groups
        ]
        finite = np.array([value for value in taus if value is not None])
        if len(finite) < MANY_TARGETS:
            return None, None
        drawn = rng.integers(0, len(finite), (10 * DRAWS, len(finite)))
        means = finite[drawn].mean(1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(low), float(high)
    drawn_taus: list[float] = []
    for _ in range(DRAWS):
        of_targets: list[float] = []
        for index in rng.integers(0, len(groups), len(groups)):
            group = groups[int(index)]
            sources = list(dict.fromkeys(source for _, order in group for source in order))
            drawn = [sources[int(k)] for k in rng.integers(0, len(sources), len(sources))]
            taus = [_tau_of(outcome, order, drawn) for outcome, order in group]
            if finite := [value for value in taus if np.isfinite(value)]:
                of_targets.append(fmean(finite))
        if of_targets:
            drawn_taus.append(fmean(of_targets))
    if len(drawn_taus) < DRAWS / 2:
        return None, None
    low, high = np.percentile(drawn_taus, (2.5, 97.5))
    return float(low), float(high)


def _misled(outcome: Outcome, order: Mapping[str, float]) -> str:
    """Return a sentence where the first choice is worse than a random one, and by more than noise.

    The noise is half the widths of both intervals, added as for independent means. A score that
    puts several sources first chooses none of them.
    """
    first, best = next(iter(order)), outcome.best
    if sum(score == order[first] for score in order.values()) > 1:
        return ""
    lost = regret(order, outcome, 1)
    noise = float(np.hypot(outcome.halves[first], outcome.halves[best]))
    if lost <= max(_chance(outcome), noise) or lost <= 0:
        return ""
    return (
        f"on {outcome.target} ({plots.labels_text(outcome.label_fraction)}) its first "
        f"choice {first} reached {outcome.metric} {outcome.shown(first):.3g} where {best} reached "
        f"{outcome.shown(best):.3g}; a source drawn at random would have lost "
        f"{_chance(outcome):.2g} instead of {lost:.2g}"
    )


# ---------------------------------------------------------------- all scores of a job


def audits(
    entries: Sequence[MatrixEntry], scores: Mapping[str, PairScores], modalities: Mapping[str, str]
) -> list[Audit]:
    """Return an audit for each domain and score.

    Targets of a modality with different metrics are domains of their own: regrets are in units of
    the metric.

    Args:
        entries: The entries of the matrix.
        scores: All scores of each ``source|target``.
        modalities: Modality of each target. Targets that are not in it are a domain of their own.
    """
    shown = outcomes(entries)
    metrics: dict[str, set[str]] = defaultdict(set)
    for outcome in shown:
        metrics[modalities.get(outcome.target, "")].add(outcome.metric)
    by_domain: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in shown:
        domain = modalities.get(outcome.target, "")
        several = len(metrics[domain]) > 1
        by_domain[f"{domain} ({outcome.metric})" if several else domain].append(outcome)
    out: list[Audit] = []
    for domain, of_domain in by_domain.items():
        targets = {outcome.target for outcome in of_domain}
        pairs = [pair for pair in scores.values() if pair.target in targets]
        trial_seconds = [
            entry.seconds
            for entry in entries
            if entry.target in targets and entry.source != SCRATCH and entry.params_trained
            if entry.seconds is not None
        ]
        for name in dict.fromkeys(name for pair in pairs for name in pair.scores):
            values = {
                (pair.target, pair.source): pair.scores[name]
                for pair in pairs
                if name in pair.scores
            }
            seconds = [
                pair.seconds + (pair.scores[name].seconds or 0.0)
                for pair in pairs
                if name in pair.scores and pair.scores[name].value is not None
            ]
            out.append(
                audit(
                    domain,
                    name,
                    values,
                    of_domain,
                    fmean(seconds) if seconds else None,
                    fmean(trial_seconds) if trial_seconds else None,
                )
            )
    return out


def title(name: str) -> str:
    """Return how tables call a score; one of a plugin that is not there by its name."""
    scores = registry.entries("score")
    return (scores[name].title if name in scores else "") or name


def blocks_of_scores(scores: Mapping[str, PairScores]) -> list[Block]:
    """Return a table of every score of each target: scores by sources."""
    by_target: dict[str, list[PairScores]] = defaultdict(list)
    for pair in scores.values():
        by_target[pair.target].append(pair)
    tables: list[Block] = []
    for target, pairs in by_target.items():
        names = dict.fromkeys(name for pair in pairs for name in pair.scores)
        body = [
            [_title_with_arrow(name, pairs), *(_shown(pair, name) for pair in pairs)]
            for name in names
        ]
        tables.append(blocks.Table([target, *(pair.source for pair in pairs)], body))
    for heading, is_undefined in (("Undefined:", True), ("Without an interval:", False)):
        reasons = {
            f"{title(name)}, {pair.source} for {pair.target}: {score.reason}"
            for pair in scores.values()
            for name, score in pair.scores.items()
            if score.reason and (score.value is None) == is_undefined
        }
        if reasons:
            tables += [Text(heading), Bullets(sorted(reasons))]
    return [Details("Every score of every source", tables)] if tables else []


def _title_with_arrow(name: str, pairs: Sequence[PairScores]) -> str:
    higher = next(pair.scores[name].higher_is_better for pair in pairs if name in pair.scores)
    return f"{title(name)} {'↑' if higher else '↓'}"


def _shown(pair: PairScores, name: str) -> str:
    value = pair.scores.get(name)
    if value is None or value.value is None:
        return UNDEFINED
    if value.low is None or value.high is None:
        return f"{value.value:.4g}"
    return f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"


def blocks_of_audits(all_audits: Sequence[Audit]) -> list[Block]:
    """Return the table of the audits, and what it means in words."""
    judged = [audit for audit in all_audits if audit.tau is not None or audit.top_1 is not None]
    if not judged:
        return []
    body = [
        [
            audit.domain or blocks.DASH,
            title(audit.score),
            blocks.format_interval(audit.tau, audit.low, audit.high, 2, "+"),
            _number(audit.top_1),
            _number(audit.top_3),
            _number(audit.chance),
            _number(audit.seconds, "s"),
            _number(audit.trial_seconds, "s"),
        ]
        for audit in sorted(
            judged,
            key=lambda audit: (audit.domain, -(audit.tau if audit.tau is not None else -2)),
        )
    ]
    head = [
        "Domain",
        "Score",
        "Weighted tau",
        "Regret of top 1",
        "Regret of top 3",
        "Regret of chance",
        "Scoring",
        "One trial",
    ]
    few = [audit for audit in judged if audit.pairs < MIN_PAIRS]
    out: list[Block] = [
        Heading("What the scores were worth"),
        Text(
            "Each score's order of the sources beside that of fine-tuning, which is the mean of "
            "the primary metric on test rows over techniques. Weighted Kendall tau is 1 for the "
            "same order and -1 for the reverse; regret is what the first choice (the best of the "
            "first three) loses to the best source, and chance what a source drawn at random "
            "loses. The interval draws targets with repetition and, where they are few, their "
            "sources."
        ),
        blocks.Table(head, body, 2),
    ]
    if few:
        out.append(
            Text(
                "Too few pairs of a source and a target to tell how certain a tau is, an interval "
                f"needs {MIN_PAIRS}: {_pairs_of(few)}. With so few an order is right or wrong by "
                "luck.",
                "note",
            )
        )
    lines = [
        f"{title(audit.score)} would have misled: {line}."
        for audit in judged
        for line in audit.misled
    ]
    if lines:
        out.append(Bullets(lines))
    elif len(few) < len(judged):
        out.append(
            Text(
                "No score's first choice was worse than a random one by more than the noise of the "
                "metric."
            )
        )
    return out


def _pairs_of(few: Sequence[Audit]) -> str:
    """Return how many pairs each of some scores has: "LogME and kNN 4"."""
    by_count: dict[int, dict[str, None]] = defaultdict(dict)
    for audit in few:
        by_count[audit.pairs][title(audit.score)] = None
    return "; ".join(f"{', '.join(names)} {count}" for count, names in sorted(by_count.items()))


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return blocks.DASH
    return f"{value:.3g} {unit}".strip()


def blocks_of(
    entries: Sequence[MatrixEntry],
    scores: Mapping[str, PairScores],
    modalities: Mapping[str, str],
    cut: Collection[tuple[str, str]] = (),
) -> list[Block]:
    """Return the section on scores of a report; [] where none were computed.

    Args:
        entries: The entries of the matrix.
        scores: See `audits`.
        modalities: See `audits`.
        cut: (target, label fraction) where a budget cut pairs. These are not compared: a score that
            puts a source first that was cut would not count as wrong.
    """
    if not scores:
        return []
    entries = [entry for entry in entries if (entry.target, entry.label_fraction) not in cut]
    out = blocks_of_audits(audits(entries, scores, modalities))
    tried = {(outcome.target, source) for outcome in outcomes(entries) for source in outcome.means}
    targets = {target for target, _ in tried}
    untried = [
        f"{pair.source} for {pair.target}"
        for pair in scores.values()
        if pair.target in targets and (pair.target, pair.source) not in tried
    ]
    if untried and out:
        out.append(Text(f"Not fine-tuned, and so not compared: {', '.join(untried)}.", "note"))
    if cut:
        named = ", ".join(
            f"{target} at {plots.labels_text(fraction)}" for target, fraction in sorted(cut)
        )
        why = "a budget trained only some of its sources in full, chosen by validation"
        out.append(Text(f"What scores were worth is not known of {named}: {why}.", "note"))
    return [*out, *blocks_of_scores(scores)]
