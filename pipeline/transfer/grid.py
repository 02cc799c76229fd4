"""The trials of a job: sources x targets x techniques x label fractions x seeds.

The id of a trial is a hash of its content.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np

from pipeline.config import provenance, registry
from pipeline.config.provenance import Provenance
from pipeline.config.registry import Options
from pipeline.config.schema import (
    ComponentConfig,
    Job,
    Target,
    hyper_parameter_text,
    round_hyper_parameter,
    spec_hash,
)
from pipeline.core.contracts import Technique, trains
from pipeline.core.contracts.objective_capabilities import (
    counts_rows,
    drops_features,
    has_cached_head,
    mixes_inputs,
    predicts_from_scores,
)
from pipeline.core.contracts.technique_capabilities import (
    TakesSomeTrials,
    adapts_without_labels,
    selects_features,
    solves_head,
)
from pipeline.core.rng import mix, row_keys
from pipeline.core.specs import Architecture, ModalitySpec
from pipeline.data.stream import Rows
from pipeline.report import trial_folder
from pipeline.report.results import NO_BACKBONE
from pipeline.train.experiment import technique_of
from pipeline.train.fit_components import options_by_content
from pipeline.train.source import train_key

TRIAL_FORMAT = 8
"""The format of a trial's id. A change of code that changes numbers does not raise it, because the
record of a trial has the code that made it (`pipeline.config.provenance`).
"""
SCRATCH = "none"
SEARCH_SEED = 1000
"""The seed of the draws of a search. The best of them are tried again with the next seeds. Final
trials, which read the test rows, have none of these seeds: if a setting was chosen because of a
lucky network, that luck must not be in its final values.
"""
OPTION = "technique."
"""Prefix of a drawn option of a technique among the hyper-parameters: ``technique.layer_decay``."""
SEARCH = 0x5EA7C4
"""Part of the seed of a search."""
Fraction = float | int
HyperParameters = dict[str, Any]
"""Drawn values by name: fields of ``train``, and options of the technique after `OPTION`."""


@dataclass(frozen=True)
class BackboneGroup:
    """An architecture with its fitted modality, and the sources whose weights fit it."""

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
    backbone_key: str
    backbone: str
    target: str
    technique: ComponentConfig
    hyper_parameters: HyperParameters
    label_fraction: Fraction
    seed: int
    stage: str
    id: str
    folder: str
    """Its folder, relative to that of the job (`trial_folder`)."""
    members: tuple[Trial, ...] = ()
    """The finished trials whose weights it combines (``Technique.after_fanout``)."""

    @property
    def entry(self) -> str:
        """The entry of the matrix: all settings of the trial except hyper-parameters and seed."""
        return "|".join(
            (
                self.source,
                self.backbone_key,
                self.target,
                str(self.technique),
                fraction_text(self.label_fraction),
            )
        )

    @property
    def name(self) -> str:
        """The trial's name for people: target, source, technique, label fraction and seed.

        Scratch has its backbone in place of a source. A search trial also has what was drawn:
        ``clothing/garments/full/0.05/seed1000/search/lr=0.003``.
        """
        source = self.backbone.replace("/", "-") if self.source == SCRATCH else self.source
        parts = [self.target, source, _named(self.technique.name, self.technique.options)]
        parts += [str(self.label_fraction), f"seed{self.seed}"]
        if self.stage == "search":
            drawn = [
                f"{name}={hyper_parameter_text(name, value)}"
                for name, value in sorted(self.hyper_parameters.items())
            ]
            parts += ["search", *filter(None, [",".join(drawn)])]
        return "/".join(parts)

    @property
    def drawn_technique(self) -> ComponentConfig:
        """The technique with the options of the job, and with those that were drawn."""
        drawn = {
            name.removeprefix(OPTION): value
            for name, value in self.hyper_parameters.items()
            if name.startswith(OPTION)
        }
        if not drawn:
            return self.technique
        options = {**self.technique.options, **drawn}
        return ComponentConfig(name=self.technique.name, options=options)

    @property
    def technique_object(self) -> Technique:
        return technique_of(self.drawn_technique)

    @property
    def train_settings(self) -> dict[str, float]:
        """The drawn fields of ``train``."""
        return {
            name: value
            for name, value in self.hyper_parameters.items()
            if not name.startswith(OPTION)
        }

    @property
    def combines_trials(self) -> bool:
        """Whether its weights are made of finished trials (``members``)."""
        return not self.is_baseline and combines_trials(self.technique)

    @property
    def is_baseline(self) -> bool:
        """Whether ``technique`` names a baseline: a model without a network."""
        return self.backbone == NO_BACKBONE


def _named(technique: str, options: Mapping[str, Any]) -> str:
    """Return a technique with its options: ``lp_ft(probe_share=0.3)``."""
    given = ",".join(f"{name}={value}" for name, value in sorted(options.items()))
    return f"{technique}({given})" if given else technique


def fraction_text(fraction: Fraction, objective: str = "") -> str:
    """Return a label fraction as tables show it: a share, or rows per class.

    It is a number of rows where the rows of the ``objective`` have no class (`CountsRows`).
    """
    kind = registry.get("objective", objective) if objective else None
    unit = f" {kind.label_fraction_unit}" if counts_rows(kind) else "/class"
    return (
        f"{fraction}{unit}"
        if isinstance(fraction, int)
        else f"{fraction:g}"
        if fraction < 1
        else "1.0"
    )


def expand_folds(job: Job) -> Job:
    """Return the job with a target of its own for each fold of a target (``targets.x.folds``).

    Raises:
        ValueError: Another target has the name of a fold.
    """
    if all(target.folds is None for target in job.targets.values()):
        return job
    out: dict[str, Target] = {}
    for name, target in job.targets.items():
        if target.folds is None:
            out[name] = target
            continue
        for number in range(1, target.folds + 1) if target.fold is None else [target.fold]:
            of_fold = f"{name}{fold_suffix(number)}"
            if of_fold in job.targets:
                raise ValueError(
                    f"targets.{of_fold}: a fold of {name} has this name: choose another one"
                )
            out[of_fold] = target.model_copy(update={"fold": number})
    return job.model_copy(update={"targets": out})


def fold_suffix(fold: int | None) -> str:
    """Return what follows a target's name in that of one of its folds; "" where it has none."""
    return "" if fold is None else f".fold{fold}"


def backbone_groups(stages: dict[str, tuple[Architecture, ModalitySpec]]) -> list[BackboneGroup]:
    """Group the sources by architecture and modality state. Scratch is trained once for each group.

    Groups with the same backbone name are distinguished by their first source.

    Args:
        stages: Source name to (architecture, modality).
    """
    sources: dict[str, list[str]] = {}
    kinds: dict[str, tuple[Architecture, ModalitySpec]] = {}
    for name, (arch, modality) in stages.items():
        key = spec_hash(arch.to_json(), modality.to_json())
        kinds.setdefault(key, (arch, modality))
        sources.setdefault(key, []).append(name)
    names = [arch.name for arch, _ in kinds.values()]
    out = []
    for key, (arch, modality) in kinds.items():
        label = arch.name if names.count(arch.name) == 1 else f"{arch.name}@{sources[key][0]}"
        out.append(BackboneGroup(arch, modality, label, tuple(sources[key])))
    return out


def draws(
    job: Job, target: Target, technique: ComponentConfig, in_memory: bool = True
) -> list[HyperParameters]:
    """Draw hyper-parameters for the entries of a technique on a target.

    A value is drawn log-uniformly from a pair [low, high], and chosen from a longer list. Where the
    job states the ranges, the draws are the same for every entry and for scratch. With ``search:
    auto`` each technique has as many draws, from the ranges that it declares for this target; the
    first of them is the job's own settings.

    Args:
        in_memory: Whether the rows of the target are held in memory.

    Returns:
        The draws; ``[{}]`` where there is nothing to search.
    """
    space = search_space(job, target, technique, in_memory)
    if not space.values:
        return [{}]
    generator = np.random.default_rng(space.seed)
    out: list[HyperParameters] = [] if space.is_stated else [{}]
    while len(out) < job.fanout.trials:
        drawn = {
            name: draw_value(values, space.is_range(name), generator)
            for name, values in sorted(space.values.items())
        }
        out.append(space.to_hyper_parameters(drawn))
    return out


def without_repeats(settings: Sequence[HyperParameters]) -> list[HyperParameters]:
    """Return each setting once: few choices are soon drawn again, which would be the same trial."""
    return [setting for i, setting in enumerate(settings) if setting not in settings[:i]]


@dataclass(frozen=True)
class SearchSpace:
    """What is searched of a technique on a target."""

    values: Mapping[str, Sequence[Any]]
    """For each name the ends of a range, or choices; {}: nothing is searched."""
    is_stated: bool
    """Whether the job states them, for fields of ``train``. Otherwise the technique declares them.
    """
    lr: float
    """The target's learning rate."""
    options: Options
    """Options of the technique, as the job has them."""
    seed: int

    def is_range(self, name: str) -> bool:
        """Return whether values are the ends of a range, not choices."""
        values = self.values[name]
        return len(values) == 2 if self.is_stated else _is_range(values)

    def to_hyper_parameters(self, values: Mapping[str, Any]) -> HyperParameters:
        """Return searched values as the hyper-parameters of a trial, rounded."""
        out: HyperParameters = {}
        for name, value in values.items():
            if self.is_stated:
                out[name] = round_hyper_parameter(name, value)
            elif name == "lr":
                out[name] = round_hyper_parameter(name, value * self.lr)
            else:
                out[OPTION + name] = float(f"{value:.6g}") if isinstance(value, float) else value
        return out

    def from_hyper_parameters(self, hyper: Mapping[str, Any]) -> dict[str, float]:
        """Undo `to_hyper_parameters`: return each searched value (for choices: its index).

        A name that is not given has the job's value. It is left out if the search could not have
        drawn that.
        """
        own = {} if self.is_stated else {**dict(self.options), "lr": 1.0}
        out: dict[str, float] = {}
        for name, values in self.values.items():
            ((key, _),) = self.to_hyper_parameters({name: values[0]}).items()
            if not self.is_range(name):
                choices = [self.to_hyper_parameters({name: value})[key] for value in values]
                value = hyper.get(key, own.get(name))
                if value in choices:
                    out[name] = choices.index(value)
                continue
            low, high = values
            if key in hyper:
                scale = self.lr if name == "lr" and not self.is_stated else 1.0
                # a rounded value may lie just outside of the range
                out[name] = min(max(hyper[key] / scale, low), high)
            elif isinstance(value := own.get(name), int | float) and low <= value <= high:
                out[name] = float(value)
        return out


def search_space(
    job: Job, target: Target, technique: ComponentConfig, in_memory: bool = True
) -> SearchSpace:
    """Return what is searched of a technique on a target (`draws`)."""
    spec, options = job.fanout, technique_of(technique).options
    if spec.search != "auto":
        values, seed = spec.search if spec.trials > 1 else {}, mix(job.seed, SEARCH)
        return SearchSpace(values, True, target.train.lr, options, seed)
    declared = _declared_space(technique)
    if in_memory and is_solved(target, technique_of(technique)):
        declared.pop("lr", None)  # a solver has none
    elif selects_features(technique_of(technique)):
        declared = {name: values for name, values in declared.items() if name == "lr"}
    seed = mix(job.seed, SEARCH, int(spec_hash(technique), 16))
    return SearchSpace(declared, False, target.train.lr, options, seed)


def _declared_space(technique: ComponentConfig) -> dict[str, Sequence[Any]]:
    """Return what a technique declares to be searched, without the options that the job states."""
    return {
        name: values
        for name, values in technique_of(technique).search_space().items()
        if name not in technique.options
    }


def search_problem(technique: ComponentConfig) -> str:
    """Describe a declared range or choice that is invalid for its technique; "" for none."""
    for name, values in _declared_space(technique).items():
        if _is_range(values) and not 0 < values[0] < values[1]:
            return f"{name}: {tuple(values)} must be (low, high) with 0 < low < high"
        for value in values if name != "lr" else ():
            drawn = ComponentConfig(name=technique.name, options={**technique.options, name: value})
            try:
                technique_of(drawn)
            except ValueError as error:
                return f"{name}: {value!r}: {registry.message_of(error)}"
    return ""


def is_solved(target: Target, technique: Technique) -> bool:
    """Return whether a technique solves the head of a target whose rows are held in memory.

    Where it does not, the head trains by steps (`pipeline.transfer.cached_heads`).
    """
    if not (solves_head(technique) and technique.penalties()):
        return False
    objective = registry.get("objective", target.objective.name)
    options = objective.options_class(**target.objective.options)
    is_random = mixes_inputs(options) or drops_features(options)
    return has_cached_head(objective) and not is_random and not target.workers


def _is_range(values: Sequence[Any]) -> bool:
    """Return whether declared values are the ends of a range, not choices."""
    return len(values) == 2 and all(isinstance(value, float) for value in values)


def draw_value(values: Sequence[Any], is_range: bool, generator: np.random.Generator) -> Any:
    """Draw from a range [low, high] (log-uniform), or choose one of the values."""
    if is_range:
        return float(np.exp(generator.uniform(*np.log(values))))
    return values[int(generator.integers(len(values)))]


def techniques(job: Job, target: Target) -> list[ComponentConfig]:
    """Return the techniques of the target or the job, scratch always first."""
    named = target.techniques if target.techniques is not None else job.techniques
    rest = [component for component in named if not starts_random(component)]
    unsourced = [component for component in named if starts_random(component)]
    plain = ComponentConfig(name="scratch")
    return [plain, *(component for component in unsourced if component != plain), *rest]


def needs_training(component: ComponentConfig) -> bool:
    """Return whether a technique takes any training step. One that takes none is tried once."""
    return trains(technique_of(component))


def is_tried_once(component: ComponentConfig) -> bool:
    """Return whether a technique tests the source's network as it is, at any label fraction."""
    return not needs_training(component) and not combines_trials(component)


def needs_labels(component: ComponentConfig) -> bool:
    """Return whether a technique needs labels of the target to train on."""
    return not adapts_without_labels(technique_of(component))


def starts_random(component: ComponentConfig) -> bool:
    """Return whether a technique starts from random weights, so that no source is needed."""
    return registry.get("technique", component.name).starts_from == "random"


def combines_trials(component: ComponentConfig) -> bool:
    """Return whether a technique makes its weights from finished trials."""
    return registry.get("technique", component.name).starts_from == "trials"


def takes(component: ComponentConfig, other: ComponentConfig) -> bool:
    """Return whether a technique that combines finished trials reads those of another one."""
    technique = technique_of(component)
    return not isinstance(technique, TakesSomeTrials) or technique.takes(other.name)


def baselines(job: Job, target: Target) -> list[ComponentConfig]:
    """Return the baselines that the job names, or all, that can read a target's rows and labels."""
    named = job.baselines
    if named == "auto":
        named = [ComponentConfig(name=name) for name in registry.entries("baseline")]
    return [component for component in named if is_suitable(component, target)]


def is_suitable(baseline: ComponentConfig, target: Target) -> bool:
    """Return whether a baseline can read a target's rows and predict its labels."""
    roles, _ = registry.roles("baseline", baseline.name)
    (first, *_), _ = registry.roles("modality", target.data.modality.name)
    objective = registry.get("objective", target.objective.name)
    if (roles and first not in roles) or not predicts_from_scores(objective):
        return False
    return objective.label_kind in registry.get("baseline", baseline.name).label_kinds


def baseline_trials(
    job: Job,
    target_name: str,
    group: BackboneGroup,
    data_key: str,
    ids_in_old_layout: Collection[str] = (),
) -> list[Trial]:
    """Return the trials of a target's baselines, with every seed and label fraction above 0.

    Args:
        group: The backbone group whose modality reads the rows.
        ids_in_old_layout: See `trial_folder.name_folder`.
    """
    target = job.targets[target_name]
    what = target.model_dump(mode="json", include={"objective", "metric"})
    what["objective"]["options"] = options_by_content("objective", target.objective)
    out: list[Trial] = []
    for component in baselines(job, target):
        for fraction in filter(None, target.label_fractions):
            for seed in range(job.fanout.seeds):
                identity = spec_hash(
                    "baseline",
                    TRIAL_FORMAT,
                    target_name,
                    group.modality.to_json(),
                    data_key,
                    what,
                    component,
                    fraction_text(fraction),
                    seed,
                    job.seed,
                )
                out.append(
                    Trial(
                        SCRATCH,
                        group.key,
                        NO_BACKBONE,
                        target_name,
                        component,
                        {},
                        fraction,
                        seed,
                        "final",
                        identity,
                        trial_folder.name_folder(
                            target_name,
                            "baseline",
                            _named(component.name, component.options),
                            fraction_text(fraction, target.objective.name),
                            seed,
                            "final",
                            identity,
                            ids_in_old_layout,
                        ),
                    )
                )
    return out


class PlannedEntry(NamedTuple):
    """An entry of the results table that a job is to fill."""

    group: BackboneGroup
    source: str
    technique: ComponentConfig
    label_fraction: Fraction


def planned_entries(
    job: Job, target_name: str, groups: list[BackboneGroup], chosen: set[str]
) -> list[PlannedEntry]:
    """Return the entries of a target.

    A technique that trains nothing has an entry at label fraction 0 only. Of the others, those that
    need labels have none there.

    Args:
        groups: The backbone groups with a source of the target.
        chosen: The sources that may be used.
    """
    target = job.targets[target_name]
    out: list[PlannedEntry] = []
    for group in groups:
        sources = [source for source in group.sources if source in chosen]
        if not sources:
            continue
        for fraction in target.label_fractions:
            for component in techniques(job, target):
                if is_tried_once(component) or (fraction == 0 and needs_labels(component)):
                    continue
                if starts_random(component):
                    out.append(PlannedEntry(group, SCRATCH, component, fraction))
                else:
                    out += [PlannedEntry(group, source, component, fraction) for source in sources]
        out += [
            PlannedEntry(group, source, component, 0)
            for component in techniques(job, target)
            if is_tried_once(component)
            for source in sources
        ]
    return out


def make_trial(
    job: Job,
    target_name: str,
    entry: PlannedEntry,
    hyper: HyperParameters,
    seed: int,
    stage: str,
    source_key: str,
    data_key: str,
    members: tuple[Trial, ...] = (),
    ids_in_old_layout: Collection[str] = (),
) -> Trial:
    """Make a trial of an entry.

    Args:
        ids_in_old_layout: See `trial_folder.name_folder`.
    """
    group, source, component, fraction = entry
    target = job.targets[target_name]
    what = [
        target.model_dump(mode="json", include={"objective", "metric", "workers"}),
        train_key(target.train),
    ]
    what[0]["objective"]["options"] = options_by_content("objective", target.objective)
    identity = spec_hash(
        TRIAL_FORMAT,
        source,
        target_name,
        group.arch.to_json(),
        group.modality.to_json(),
        source_key if source != SCRATCH else None,
        data_key,
        what,
        component,
        hyper,
        fraction_text(fraction),
        seed,
        stage,
        job.seed,
        *([[one.id for one in members]] if members else []),
    )
    folder = trial_folder.name_folder(
        target_name,
        group.arch.name if source == SCRATCH else source,
        _named(component.name, component.options),
        fraction_text(fraction, target.objective.name),
        seed,
        stage,
        identity,
        ids_in_old_layout,
    )
    return Trial(
        source,
        group.key,
        group.label,
        target_name,
        component,
        hyper,
        fraction,
        seed,
        stage,
        identity,
        folder,
        members,
    )


def folders(trials: Iterable[Trial]) -> dict[str, str]:
    """Return a dict from trial id to folder."""
    return {one.id: one.folder for one in trials}


def made_by(target: Target, group: BackboneGroup, technique: ComponentConfig) -> Provenance:
    """Return the code and library versions that would make a trial of a target now.

    The code is that of the trial's components and of the training loop.
    """
    frozen = registry.get("technique", technique.name).frozen
    modules = (
        *provenance.TRIAL_CODE,
        *registry.environment_plugins(),
        *(provenance.FROZEN_CODE if frozen else ()),
        *(provenance.OVERLAP_CODE if target.drop_overlap != "none" else ()),
    )
    pieces = provenance.components_of(
        target.data.modality.name,
        group.arch.name,
        group.arch.options,
        target.objective.name,
        technique.name,
    )
    return provenance.made_by(modules, pieces)


def trial_made_by(trial: Trial, target: Target, group: BackboneGroup) -> Provenance:
    """Return what would make a trial now (`made_by`); of a baseline also scikit-learn's version."""
    if not trial.is_baseline:
        return made_by(target, group, trial.technique)
    overlap = provenance.OVERLAP_CODE if target.drop_overlap != "none" else ()
    components = provenance.components_of(
        target.data.modality.name, NO_BACKBONE, {}, target.objective.name
    )
    made = provenance.made_by(
        (*provenance.BASELINE_CODE, *registry.environment_plugins(), *overlap),
        (*components, ("baseline", trial.technique.name)),
    )
    library = {"scikit-learn": metadata.version("scikit-learn")}
    return Provenance({**made.code, **library}, made.versions)


def label_subset(
    rows: Rows, labels: np.ndarray | None, fraction: Fraction, seed: int
) -> np.ndarray:
    """Return the positions of a stratified part of the training rows.

    With one seed the parts are nested: the 5 % set is part of the 25 % set. A float is a share of
    every class (at least one row), an integer is a number of rows per class. Without labels both
    count all rows.

    Raises:
        ValueError: A share is not in (0, 1].
    """
    n = len(rows)
    if isinstance(fraction, float) and not 0 < fraction <= 1:
        raise ValueError(
            f"label fraction {fraction} must be above 0 and at most 1.0; integers are rows per "
            "class"
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
