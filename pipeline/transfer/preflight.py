"""Checks of data files and techniques before a run, for ``--dry-run``.

They raise the errors that a run would end with, some of which it would raise only after training.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.core.contracts import Backbone
from pipeline.core.contracts.technique_capabilities import ChecksBackbone
from pipeline.data.stream import Decoder
from pipeline.io import storage
from pipeline.train import dry_checks
from pipeline.train.dry_checks import PlannedSource, Workload
from pipeline.train.experiment import technique_of
from pipeline.train.row_checks import Finding
from pipeline.transfer import grid, job_state, stages, targets
from pipeline.transfer.grid import BackboneGroup
from pipeline.transfer.job_state import JobState
from pipeline.transfer.targets import TargetStage

ESTIMATED = " (estimated: a run trains its tokenizer on more rows)"


Workloads = dict[str, list[Workload]]
"""What is trained, by its place in the job."""


def check_rows(state: JobState, workloads: Workloads | None = None) -> list[str]:
    """Describe sources and targets, from a sample of their rows.

    Args:
        workloads: Gets what is trained.

    Raises:
        ValueError: The message has all errors that a run would end with, one per line.
    """
    lines: list[str] = []
    problems: list[str] = []
    seen: dict[str, PlannedSource] = {}
    for name, stage in state.sources.items():
        place = f"sources.{name}"
        try:
            found = dry_checks.plan_without_training(stage)
        except (ValueError, storage.StorageError) as error:
            problems.append(stages.at_place(place, error))
            continue
        if found is None:
            lines.append(
                f"source {name}: not looked at: only a run fetches "
                f"{stage.spec.init or stage.spec.backbone.name}"
            )
            continue
        seen[name] = found
        if workloads is not None and found.workload is not None:
            workloads[place] = [found.workload]
        lines += _lines(f"source {name}", found.findings, found.is_estimated)
    groups = grid.backbone_groups(
        {name: (found.arch, found.modality) for name, found in seen.items()}
    )
    estimated = {source for source, found in seen.items() if found.is_estimated}
    for name in state.targets:
        try:
            lines += _target(state, name, groups, estimated, workloads)
        except (ValueError, storage.StorageError) as error:
            problems.append(stages.at_place(f"targets.{name}", error))
    if problems:
        raise ValueError("\n".join(problems))
    return lines


def _target(
    state: JobState,
    name: str,
    groups: list[BackboneGroup],
    estimated: set[str],
    workloads: Workloads | None,
) -> list[str]:
    """Describe a target's rows as each backbone group reads them, or raise the error of a run."""
    target, matching = state.targets[name], set(job_state.matching_sources(state, name))
    dry_checks.check_named_files(target.splits)
    batches = state.job.fanout.stated_search.get("global_batch", ())
    found = [*targets.unmet_requests(target, batches), *targets.missing_classes(target)]
    lines = _lines(f"target {name}", found, False)
    known: set[str] = set()
    for group in groups:
        if not matching & set(group.sources):
            continue
        _check_backbone(target, group)
        read = targets.plan_reading(target, group)
        decoder = Decoder(
            read.modality, target.spec.objective.name, read.state, target.spec.data.columns
        )
        if workloads is not None:
            load = Workload(read.arch, read.objective, decoder, target.splits.train, target.packed)
            workloads.setdefault(f"targets.{name}", []).append(load)
        key = targets.reading_key(target, group)
        if key in known:
            continue
        known.add(key)
        found = [finding for finding in targets.findings(target, read) if finding.in_terminal]
        for split, selection in target.splits.by_name().items():
            found += dry_checks.check_sample(
                split, selection, decoder, target.spec.data.max_bad_rows
            )
        lines += _lines(f"target {name}", found, bool(estimated & set(group.sources)))
    return list(dict.fromkeys(lines))


def _check_backbone(target: TargetStage, group: BackboneGroup) -> None:
    """Raise ValueError where a technique of the target cannot adapt the group's backbone."""
    backbone: Backbone | None = None
    for component in target.techniques:
        technique = technique_of(component)
        if not isinstance(technique, ChecksBackbone):
            continue
        if backbone is None:
            backbone = dry_checks.build_backbone(group.arch)
        try:
            technique.check_backbone(backbone)
        except ValueError as error:
            place = f"targets.{target.name_in_job}"
            raise ValueError(f"{place}: techniques: {component.name}: {error}") from None


def _lines(name: str, findings: Iterable[Finding], is_estimated: bool) -> list[str]:
    return [
        finding.line(name) + (ESTIMATED if is_estimated and "length" in finding.text else "")
        for finding in findings
        if finding.in_terminal
    ]
