"""Which trials a job means: sources x targets x techniques x label fractions x seeds, each with an
id that names its content.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.config import provenance, registry
from pipeline.config.provenance import Provenance
from pipeline.config.schema import ComponentConfig, Job, Target, round_hyper_parameter, spec_hash
from pipeline.core.contracts import Technique, trains
from pipeline.core.contracts.objective_capabilities import CountsRows
from pipeline.core.rng import mix, row_keys
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data.stream import Rows
from pipeline.train.experiment import technique_of
from pipeline.train.fit import options_by_content
from pipeline.train.source import HOW_NOT_WHAT

TRIAL_FORMAT = 8
"""The format of a trial's id. Code that makes other numbers does not raise it: what made a trial
stands in its record (`pipeline.config.provenance`).
"""
SCRATCH = "none"
FURTHER_SEARCH_SEEDS = 1000
"""Seeds with which the best draws of a search are tried again count from here: none of them is a
seed of the final trials, which read the test rows.
"""
Fraction = float | int


@dataclass(frozen=True)
class Base:
    """What trials start from: an architecture with its fitted modality, and the sources whose
    weights fit it.
    """

    arch: Architecture
    modality: ModalitySpec
    label: str
    sources: tuple[str, ...]

    @property
    def key(self) -> str:
        return spec_hash(self.arch.to_json(), self.modality.to_json())


@dataclass(frozen=True)
class Trial:
    """One (source, backbone, target, technique, hyper-parameters, label fraction, seed)."""

    source: str
    base: str
    backbone: str
    target: str
    technique: ComponentConfig
    hyper_parameters: dict[str, float]
    label_fraction: Fraction
    seed: int
    stage: str
    id: str
    members: tuple[str, ...] = ()
    """Ids of the finished trials that its weights are made of (``Technique.after_fanout``)."""

    @property
    def cell(self) -> str:
        """What is compared with scratch: everything but hyper-parameters and seed."""
        return "|".join(
            (
                self.source,
                self.base,
                self.target,
                str(self.technique),
                fraction_text(self.label_fraction),
            )
        )

    @property
    def technique_object(self) -> Technique:
        return technique_of(self.technique)


def fraction_text(fraction: Fraction, objective: str = "") -> str:
    """A label fraction as tables have it: a share, or rows a class; rows alone where the
    ``objective`` says that its rows have no class (`CountsRows`).
    """
    kind = registry.get("objective", objective) if objective else None
    unit = f" {kind.label_fraction_unit}" if isinstance(kind, CountsRows) else "/class"
    return (
        f"{fraction}{unit}"
        if isinstance(fraction, int)
        else f"{fraction:g}"
        if fraction < 1
        else "1.0"
    )


def bases(stages: dict[str, tuple[Architecture, ModalitySpec]]) -> list[Base]:
    """Sources grouped by architecture and modality state: scratch is trained once for each group.

    ``stages``: source name to (arch, modality). Groups of one backbone name are told apart by their
    first source.
    """
    found: dict[str, list[str]] = {}
    parts: dict[str, tuple[Architecture, ModalitySpec]] = {}
    for name, (arch, modality) in stages.items():
        key = spec_hash(arch.to_json(), modality.to_json())
        parts.setdefault(key, (arch, modality))
        found.setdefault(key, []).append(name)
    labels = [arch.name for arch, _ in parts.values()]
    out = []
    for key, (arch, modality) in parts.items():
        label = arch.name if labels.count(arch.name) == 1 else f"{arch.name}@{found[key][0]}"
        out.append(Base(arch, modality, label, tuple(found[key])))
    return out


def draws(job: Job) -> list[dict[str, float]]:
    """Hyper-parameter draws, the same for every cell (scratch too): [low, high] is log-uniform, a
    longer list is a choice.
    """
    fan = job.fanout
    if fan.trials == 1:
        return [{}]
    generator = np.random.default_rng(mix(job.seed, 0x5EA7C4))
    out = []
    for _ in range(fan.trials):
        draw = {}
        for name, values in sorted(fan.search.items()):
            value = (
                float(np.exp(generator.uniform(*np.log(values))))
                if len(values) == 2
                else values[int(generator.integers(len(values)))]
            )
            draw[name] = round_hyper_parameter(name, value)
        out.append(draw)
    return out


def techniques(job: Job, target: Target) -> list[ComponentConfig]:
    """The target's or the job's techniques, scratch first and always."""
    named = target.techniques if target.techniques is not None else job.techniques
    rest = [component for component in named if not starts_random(component)]
    unsourced = [component for component in named if starts_random(component)]
    plain = ComponentConfig(name="scratch")
    return [plain, *(component for component in unsourced if component != plain), *rest]


def needs_training(component: ComponentConfig) -> bool:
    """Tell whether a technique takes any training step; one that does not is tried once."""
    return trains(technique_of(component))


def is_tried_once(component: ComponentConfig) -> bool:
    """Tell whether a technique tests the source's network as it is, whatever the label fraction."""
    return not needs_training(component) and not combines_trials(component)


def starts_random(component: ComponentConfig) -> bool:
    """Tell whether a technique starts from random weights, so that no source is needed."""
    return registry.get("technique", component.name).starts_from == "random"


def combines_trials(component: ComponentConfig) -> bool:
    """Tell whether a technique makes its weights of finished trials."""
    return registry.get("technique", component.name).starts_from == "trials"


def planned_cells(
    job: Job, target_name: str, found: list[Base], chosen: set[str]
) -> list[tuple[Base, str, ComponentConfig, Fraction]]:
    """(base, source, technique, label fraction) of a target; ``chosen`` are the sources that may be
    used. What learns nothing stands at no rows, 0.
    """
    target = job.targets[target_name]
    out: list[tuple[Base, str, ComponentConfig, Fraction]] = []
    for base in found:
        sources = [s for s in base.sources if s in chosen]
        if not sources:
            continue
        for fraction in target.label_fractions:
            for component in techniques(job, target):
                if is_tried_once(component):
                    continue
                if starts_random(component):
                    out.append((base, SCRATCH, component, fraction))
                else:
                    out += [(base, source, component, fraction) for source in sources]
        out += [
            (base, source, component, 0)
            for component in techniques(job, target)
            if is_tried_once(component)
            for source in sources
        ]
    return out


def make_trial(
    job: Job,
    target_name: str,
    cell: tuple[Base, str, ComponentConfig, Fraction],
    hyper: dict[str, float],
    seed: int,
    stage: str,
    source_key: str,
    data_key: str,
    members: tuple[str, ...] = (),
) -> Trial:
    base, source, component, fraction = cell
    target = job.targets[target_name]
    what = [
        target.model_dump(mode="json", include={"objective", "metric", "workers"}),
        target.train.model_dump(mode="json", exclude=HOW_NOT_WHAT),
    ]
    what[0]["objective"]["options"] = options_by_content("objective", target.objective)
    identity = spec_hash(
        TRIAL_FORMAT,
        source,
        target_name,
        base.arch.to_json(),
        base.modality.to_json(),
        source_key if source != SCRATCH else None,
        data_key,
        what,
        component,
        hyper,
        fraction_text(fraction),
        seed,
        stage,
        job.seed,
        *([members] if members else []),
    )
    return Trial(
        source,
        base.key,
        base.label,
        target_name,
        component,
        hyper,
        fraction,
        seed,
        stage,
        identity,
        members,
    )


def made_by(target: Target, base: Base, technique: ComponentConfig) -> Provenance:
    """What makes a trial of a target now: the code of its pieces and of the loop, and the versions
    of libraries.
    """
    frozen = registry.get("technique", technique.name).frozen
    modules = (
        *provenance.TRIAL_CODE,
        *(provenance.FROZEN_CODE if frozen else ()),
        *(provenance.OVERLAP_CODE if target.drop_overlap != "none" else ()),
    )
    pieces = provenance.components_of(
        target.data.modality.name,
        base.arch.name,
        base.arch.options,
        target.objective.name,
        technique.name,
    )
    return provenance.made_by(modules, pieces)


def label_subset(
    rows: Rows, labels: np.ndarray | None, fraction: Fraction, seed: int
) -> np.ndarray:
    """Places of a stratified, nested part of the training rows: for one seed, the 5 % set is part
    of the 25 % set.

    Floats are shares of every class (at least one row), integers are rows a class; without labels,
    of all rows. Raises ValueError for a share outside (0, 1].
    """
    n = len(rows)
    if isinstance(fraction, float) and not 0 < fraction <= 1:
        raise ValueError(
            f"label fraction {fraction} must be above 0 and at most 1.0; integers are rows a class"
        )
    if isinstance(fraction, float) and fraction == 1:
        return np.arange(n)
    labels = np.zeros(n, dtype=np.int64) if labels is None else labels
    ids = rows.selection.ids(np.arange(n))
    order = row_keys(mix(seed, 0x1ABE1), np.zeros(1, dtype=np.int64), ids)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = members[np.argsort(order[members], kind="stable")]
        count = fraction if isinstance(fraction, int) else max(1, round(fraction * len(members)))
        chosen.append(members[:count])
    return np.sort(np.concatenate(chosen))
