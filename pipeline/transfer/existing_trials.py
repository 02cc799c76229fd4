"""The trials of a job that exist: which are finished, what made them, which are stale."""

from __future__ import annotations

from dataclasses import replace

from pipeline.checkpoints import bundle
from pipeline.io import checksums
from pipeline.report import code_versions as origins
from pipeline.report.code_versions import TrialProvenance
from pipeline.report.trial_record import TrialRecord
from pipeline.transfer import fanout, grid, pruning, trial
from pipeline.transfer.grid import BackboneGroup, Trial
from pipeline.transfer.job_state import (
    JobState,
    backbone_groups,
    metadata_uri,
    read_metadata,
    stored_choice,
    used_places,
)
from pipeline.transfer.planned_trials import (
    decide_budget,
    failed_before,
    final_trials,
    finalist_trials,
    ranked_draws,
    search_trials,
    winning_draws,
)


def trial_status(state: JobState) -> list[tuple[Trial, bool]]:
    """Return each trial of the job and whether it is finished.

    The result is empty while a source has no bundle or the search is not finished.
    """
    if (
        not state.targets
        or not all(stage.done for stage in state.sources.values())
        or read_metadata(state).get("broken")
    ):
        return []  # a target that was left out is prepared again
    if checksums.is_damaged(metadata_uri(state)):
        return []  # the run goes through its stages once more, which makes them again
    groups, chosen = backbone_groups(state), stored_choice(state)
    if chosen is None:
        return []
    if state.job.fanout.budget is not None:
        decision = decide_budget(state, groups, chosen)
        failed = failed_before(state, groups, chosen)
        statuses = [
            (one, is_done or one.id in failed)
            for one, is_done in _trial_status(state, decision.search, groups)
        ]
        if not all(is_done for _, is_done in statuses):
            return []
        final = final_trials(state, groups, chosen, {}, decision.cut)
        return statuses + _trial_status(state, final, groups)
    draws = search_trials(state, groups, chosen)
    statuses = _trial_status(state, draws, groups)
    if not all(is_done for _, is_done in statuses):
        return []
    finalists = finalist_trials(state, groups, chosen, ranked_draws(draws, _records(state, draws)))
    statuses += _trial_status(state, finalists, groups)
    if not all(is_done for _, is_done in statuses):
        return []
    search = [*draws, *finalists]
    return statuses + _trial_status(
        state,
        final_trials(state, groups, chosen, winning_draws(search, _records(state, search))),
        groups,
    )


def _records(state: JobState, trials: list[Trial]) -> list[TrialRecord | None]:
    """Return the record of each trial, None for trials that have none."""
    records = trial.read_records(state.job.root, grid.folders(trials))
    return [records.get(one.id) for one in trials]


def _trial_status(
    state: JobState, trials: list[Trial], groups: list[BackboneGroup]
) -> list[tuple[Trial, bool]]:
    """Return each of these trials and whether it is finished and need not be made again."""
    rerun_ids = trials_to_remake(state, trials, groups)
    others = [one for one in trials if one.id not in rerun_ids]
    unfinished = fanout.unfinished_of(state.job.root, others, state.job.fanout)
    return [(one, one.id not in rerun_ids and one.id not in unfinished) for one in trials]


def provenance_of_trials(
    state: JobState, trials: list[Trial], groups: list[BackboneGroup]
) -> dict[str, TrialProvenance]:
    """Return a dict from the id of each trial that has ended to the code and versions that made it.

    A trial that combines others also lists what changed in those, so ``trials`` must hold them too.
    """
    by_key = {group.key: group for group in groups}
    weights = {
        name: bundle.weights_sha256(stage.bundle_uri)
        for name, stage in state.sources.items()
        if stage.has_bundle
    }
    out, records = {}, _records(state, trials)
    began = {record.trial_id: _began(record) for record in records if record is not None}
    for one, record in zip(trials, records, strict=True):
        if record is not None:
            target, group = state.job.targets[one.target], by_key[one.backbone_key]
            now = grid.trial_made_by(one, target, group)
            out[one.id] = origins.provenance_of_record(
                record, now, one.source, weights.get(one.source)
            )
    for one in trials:
        members = [member.id for member in one.members if member.id in out]
        if one.id not in out or not members:
            continue
        changes = [change for member in members for change in out[member].changes]
        if any(began[member] > began[one.id] for member in members):
            changes.append("trials that it combines were made anew since")
        all_changes = dict.fromkeys((*out[one.id].changes, *changes))
        out[one.id] = replace(out[one.id], changes=tuple(all_changes))
    return out


def _began(record: TrialRecord) -> float:
    """Return when a trial began, in seconds; 0 where its record does not say."""
    moments = [row.started_at.timestamp() for row in record.rows if row.started_at]
    return min(moments, default=0.0)


def trials_to_remake(state: JobState, trials: list[Trial], groups: list[BackboneGroup]) -> set[str]:
    """Return the ids of the trials that have ended and are to be made again."""
    if "trials" not in state.remake:
        return set()
    all_provenance = provenance_of_trials(state, trials, groups)
    return {trial_id for trial_id, made in all_provenance.items() if made.changes}


def reusable_results(
    state: JobState,
) -> tuple[dict[str, tuple[str, ...]], dict[str, TrialProvenance]]:
    """Return the existing results that would be used as they are.

    Where the search is not finished, or a source has no bundle, only the trials that are already
    known are returned.

    Returns:
        A dict from each source to the changes of code and versions since it was made, and a dict
        from the id of each known trial to what made it.
    """
    changed = {name: stage.changes() for name, stage in state.sources.items() if stage.has_bundle}
    chosen = stored_choice(state)
    if len(changed) < len(state.sources) or chosen is None:
        return changed, {}
    groups = backbone_groups(state)
    search, final = search_and_final_trials(state, groups, chosen)
    return changed, provenance_of_trials(state, [*search, *final], groups)


def search_and_final_trials(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> tuple[list[Trial], list[Trial]]:
    """Return the search trials that have ended, and the final trials that follow from them."""
    if state.job.fanout.budget is not None:
        decision = decide_budget(state, groups, chosen)
        return list(decision.tried), final_trials(state, groups, chosen, {}, decision.cut)
    search = _search(state, groups, chosen)
    records = _records(state, search)
    ended = [one for one, record in zip(search, records, strict=True) if record is not None]
    return ended, final_trials(state, groups, chosen, winning_draws(search, records))


def _search(
    state: JobState, groups: list[BackboneGroup], chosen: dict[str, set[str]]
) -> list[Trial]:
    """Return all draws of the search, and the best finished ones again with further seeds."""
    draws = search_trials(state, groups, chosen)
    return [
        *draws,
        *finalist_trials(state, groups, chosen, ranked_draws(draws, _records(state, draws))),
    ]


def all_ids(state: JobState) -> set[str]:
    """Return the ids of all trials of the job, whether they have run or not.

    Raises:
        ValueError: They cannot be known yet.
    """
    if state.job.only:
        raise ValueError("only: pruning needs the whole job; leave only out")
    if why := _why_unknown(state):
        raise ValueError(
            f"{state.job.root}: {why}, so it is not known which trials belong to the job; run it "
            "to its end first, then prune"
        )
    groups, chosen = backbone_groups(state), stored_choice(state)
    assert chosen is not None
    search, final = search_and_final_trials(state, groups, chosen)
    return {one.id for one in (*search, *final)}


def _why_unknown(state: JobState) -> str:
    """Return why the trials of the job cannot be known yet, "" where they can."""
    if lacking := [name for name, stage in state.sources.items() if not stage.has_bundle]:
        return f"sources {', '.join(lacking)} have no bundle yet"
    if broken := read_metadata(state).get("broken"):
        return f"targets {', '.join(broken)} were left out of the newest run"
    chosen = stored_choice(state)
    if chosen is None:
        return "which sources are fanned out is not known yet"
    groups = backbone_groups(state)
    if state.job.fanout.budget is not None:
        is_finished = not decide_budget(state, groups, chosen).waiting
    else:
        is_finished = None not in _records(state, _search(state, groups, chosen))
    return "" if is_finished else "its search is not finished"


def stale(state: JobState) -> pruning.StaleTrials:
    """Return the stored trials that are no longer part of the job.

    Raises:
        ValueError: The trials of the job cannot be known yet.
    """
    return pruning.find_stale(
        state.job.root, all_ids(state), pruning.uses(state.job.root, used_places(state))
    )
