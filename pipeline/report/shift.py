"""Shift between a source and a target, and between the parts of a target, for the report.

It holds what runs record, the report's table, and sentences with the techniques that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.io.json_values import JsonObject
from pipeline.report import blocks
from pipeline.report.blocks import Block

CHANCE, LARGE_ACCURACY = 0.5, 0.6
"""Accuracy of a classifier that distinguishes two samples: that for two equal samples, and the one
above which a shift is named. The whole interval must lie above it.
"""
LARGE_SHARE, LARGE_LOSS, LARGE_DRIFT = 0.05, 0.05, 0.1
"""Change of a class's share, loss of accuracy of the source's head, and drift of a feature (0 to 1)
from which they are named. Intervals must lie beyond the first two; a drift must be significant.
"""
ALIGNING = ("dann", "cdan", "coral", "dan", "adabn")
REFITTING = ("lp_ft", "full", "lora")
AT_TEST = ("tent",)
UNALIGNED = ("mcc",)
NOT_BY_SHARE = (
    "The metrics balanced_accuracy and, for two classes, auroc do not depend on the shares. "
    "class_weight: balanced trains for balanced accuracy"
)
SHOWN = 5


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, decimals: int = 2, sign: str = "") -> str:
        return blocks.format_interval(self.value, self.low, self.high, decimals, sign)


@dataclass(frozen=True)
class Drift:
    """The difference of one feature between two samples."""

    feature: str
    size: float
    """From 0 to 1: the Kolmogorov-Smirnov statistic of numbers, the Jensen-Shannon divergence in
    bits of categories, the difference of the shares of rows without a number."""
    p: float
    """Corrected for the number of features (Benjamini and Hochberg 1995)."""
    kind: str
    """numbers, categories or missing"""

    @property
    def is_large(self) -> bool:
        return self.p < 0.05 and self.size >= LARGE_DRIFT

    @property
    def name(self) -> str:
        return f"{self.feature}, missing" if self.kind == "missing" else self.feature


@dataclass(frozen=True)
class Shift:
    """How rows of a target differ from others."""

    others: str
    """What they are compared with, such as "source photos"."""
    rows: str
    """Which rows of the target: "training rows" or "test rows"."""
    covariate: Estimate | None = None
    """Accuracy of a classifier that distinguishes both by their features; 0.5 is chance."""
    labels: dict[str, Estimate] = field(default_factory=dict[str, Estimate])
    """Share of each class in the target minus that in the others."""
    concept: Estimate | None = None
    """Accuracy on the target's rows of a head fitted to them minus that of the source's own, or of
    one fitted to the others."""
    drift: tuple[Drift, ...] = ()
    missing: dict[str, str] = field(default_factory=dict[str, str])
    """covariate, labels or concept to why it was not measured."""
    features_of: str = ""
    """The source in whose features the rows are compared, where it is not the others."""
    within_target: bool = False
    """Whether both are parts of the target, so that a source has no part in it."""
    counted: str = ""
    """A note on what one observation is, where it is not a row."""

    def to_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Shift:
        covariate, concept = (
            Estimate(**stored[name]) if stored[name] else None for name in ("covariate", "concept")
        )
        labels = {name: Estimate(**estimate) for name, estimate in stored["labels"].items()}
        drift = tuple(Drift(**column) for column in stored["drift"])
        return replace(
            cls(**stored), covariate=covariate, concept=concept, labels=labels, drift=drift
        )


def sentences(target: str, shift: Shift, techniques: Sequence[str]) -> list[str]:
    """Return a sentence for each shift that is large.

    Args:
        techniques: Names of those that there are; only these are recommended.
    """
    out: list[str] = []
    place = f"{target}: in the features of {shift.features_of}, " if shift.features_of else ""
    rows = f"{shift.rows} and {shift.others}"
    changed = [
        name for name, difference in shift.labels.items() if _is_beyond(difference, LARGE_SHARE)
    ]
    counted = f" ({shift.counted})" if shift.counted else ""
    if shift.covariate and shift.covariate.low > LARGE_ACCURACY:
        out.append(
            f"{place or f'{target}: '}{rows} look different (covariate shift): a classifier tells "
            f"them apart with an accuracy of {shift.covariate.text()}, where {CHANCE} is "
            f"chance{counted}" + _covariate_advice(shift, changed, techniques)
        )
    if changed:
        largest = sorted(changed, key=lambda name: -abs(shift.labels[name].value))
        named = ", ".join(f"{name} {shift.labels[name].text(sign='+')}" for name in largest[:SHOWN])
        whose = (
            "probabilities that were calibrated on validation rows: correct"
            if shift.within_target
            else "the source's probabilities: calibrate them on the target's validation rows, or "
            "correct"
        )
        out.append(
            f"{target}: {rows} have other shares of classes (label shift): {named}. Do not rely on "
            f"{whose} them by the shares of classes. {NOT_BY_SHARE}"
            + _label_advice(shift, techniques)
        )
    if shift.concept and shift.concept.low > LARGE_LOSS:
        out.append(f"{target}: {_concept_sentence(shift, changed, techniques)}")
    if large := [drift for drift in shift.drift if drift.is_large]:
        named = ", ".join(f"{drift.name} ({drift.size:.2f})" for drift in large[:SHOWN])
        more = f" and {len(large) - SHOWN} more" if len(large) > SHOWN else ""
        out.append(
            f"{target}: {rows}: {len(large)} of {len(shift.drift)} comparisons of features show "
            f"a difference: {named}{more}. Look whether their units and codes are the same"
        )
    return out


def _covariate_advice(shift: Shift, changed: list[str], techniques: Sequence[str]) -> str:
    """Return what to do about rows that look different.

    Args:
        changed: Classes of which the shares differ much.
    """
    if shift.within_target:
        able = [name for name in AT_TEST if name in techniques]
        at_test = f"; techniques that adapt to the test rows: {', '.join(able)}" if able else ""
        return f". Look at how the parts were divided{at_test}"
    if changed:
        return (
            ". The other shares of classes alone can do this; techniques that bring features "
            "together hurt then"
        )
    return _advice("techniques that bring their features together", ALIGNING, techniques)


def _label_advice(shift: Shift, techniques: Sequence[str]) -> str:
    """Return the techniques that fit other shares of classes than the source's."""
    if shift.within_target:
        return ""
    learning = "techniques that learn the shares from the target's labels"
    unaligned = (
        "without labels, where no class is rare, a technique that does not bring the domains "
        "together"
    )
    return _advice(learning, REFITTING, techniques) + _advice(unaligned, UNALIGNED, techniques)


def _concept_sentence(shift: Shift, changed: list[str], techniques: Sequence[str]) -> str:
    """Return what a head that loses accuracy may mean.

    Args:
        changed: Classes of which the shares differ much: a fitted head knows them.
    """
    assert shift.concept is not None
    whose = "a head of the training rows" if shift.within_target else "the source's head"
    shares = ", or it is the other shares of classes" if changed else ""
    fitting = "techniques that train on the target's labels"
    return (
        f"{whose} is less accurate on the {shift.rows} than a head fitted to them, by "
        f"{shift.concept.text()}. Either the labels mean something else there (concept shift), or "
        f"the source has not seen such inputs{shares}"
        + ("" if shift.within_target else _advice(fitting, REFITTING, techniques))
    )


def _is_beyond(estimate: Estimate, size: float) -> bool:
    return estimate.low > size or estimate.high < -size


def _advice(what: str, fitting: Sequence[str], techniques: Sequence[str]) -> str:
    able = [name for name in fitting if name in techniques]
    return f"; {what}: {', '.join(able)}" if able else ""


def blocks_of(shifts: Mapping[str, Sequence[Shift]], techniques: Sequence[str]) -> list[Block]:
    """Return the report's section on shift; nothing where none was measured.

    Args:
        shifts: What was measured, by target.
        techniques: Names of all techniques.
    """
    rows: list[list[str]] = []
    words: list[str] = []
    folded: list[Block] = []
    for target, of_target in shifts.items():
        for shift in of_target:
            rows.append([target, shift.others, *_cells(shift)])
            words += sentences(target, shift, techniques)
            folded += _details(target, shift)
    if not rows:
        return []
    header = [
        "Target",
        "Compared with",
        "Two-sample accuracy",
        "Largest change of a class's share",
        "Head is less accurate by",
        "Features that drift",
    ]
    return [
        blocks.Heading("Shift"),
        blocks.Text(
            "How the target's rows differ from those of its sources, and its test rows from its "
            "training rows. Two-sample accuracy: how well a classifier tells the two kinds of rows "
            f"apart, on rows that it was not fitted to; {CHANCE} is chance. Head: the source's "
            "head (for test rows: one fitted to the training rows) is compared with a head that is "
            "fitted to the same rows, on the same features. Brackets are 95 % intervals. Rows of "
            "one group count as one observation."
        ),
        blocks.Table(header, rows, 2),
        blocks.Bullets(words or ["No large shift was found."]),
        *folded,
    ]


def _cells(shift: Shift) -> list[str]:
    largest = max(
        shift.labels.items(),
        key=lambda label: abs(label[1].value),
        default=None,
    )
    large = sum(drift.is_large for drift in shift.drift)
    return [
        shift.covariate.text() if shift.covariate else blocks.DASH,
        f"{largest[0]} {largest[1].text(sign='+')}" if largest else blocks.DASH,
        shift.concept.text(sign="+") if shift.concept else blocks.DASH,
        f"{large} of {len(shift.drift)}" if shift.drift else blocks.DASH,
    ]


def _details(target: str, shift: Shift) -> list[Block]:
    """Return what was not measured, and every feature that drifts."""
    out: list[Block] = []
    if shift.drift:
        rows = [
            [drift.feature, drift.kind, f"{drift.size:.3f}", f"{drift.p:.2g}"]
            for drift in shift.drift
            if drift.p < 0.05
        ]
        header = ["Feature", "Kind", "Size", "p, corrected"]
        title = f"{target}: features of {shift.rows} against {shift.others}"
        if rows:
            out.append(blocks.Details(title, [blocks.Table(header, rows, 2)]))
    if shift.missing:
        lines = [f"{what}: {why}" for what, why in shift.missing.items()]
        title = f"{target}: what was not measured against {shift.others}, and why"
        out.append(blocks.Details(title, [blocks.Bullets(lines)]))
    return out
