"""Ensembles: the predictions of several fine-tuned networks, averaged."""

from __future__ import annotations

import copy

from pydantic import Field

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Ensemble, Technique


class EnsembleOptions(Options):
    of: list[str] = Field(
        ["full"],
        min_length=1,
        description="techniques of the same job whose final trials, all seeds, predict together",
    )


@register("technique", "ensemble", options=EnsembleOptions)
class SeedEnsemble(Technique):
    """Average the probabilities of all seeds of a technique (Lakshminarayanan et al. 2017).

    For classification, multilabel and regression, of every modality. It assumes nothing of its
    members: unlike in a soup, their weights may be far apart. It nearly always helps, also the
    calibration. Each prediction costs the memory and the time of all members. It has no bundle of
    its own, because it is not one network; its members have theirs. Nothing is trained. Below a
    label fraction of 1 each seed has learned from other rows, and the ensemble from all of them.
    """

    starts_from = "trials"

    def phases(self, steps):
        return ()

    def takes(self, technique):
        return technique in self.options.of

    def after_fanout(self, trials):
        self.trials = [trial for trial in trials if self.takes(trial.technique)]
        if len(self.trials) < 2:
            raise ValueError(
                f"ensemble averages the trials of {', '.join(self.options.of)}, and there are "
                f"{len(self.trials)}: raise fanout.seeds, or name techniques of this job in its "
                "option of"
            )
        self.trials.sort(key=lambda trial: (trial.technique, trial.seed))
        return self.trials[0].weights()

    def choose(self, task, goodness):
        members = []
        for trial in self.trials:
            member = copy.deepcopy(task)
            member.load_state_dict(trial.weights())
            members.append(member)
        names = [f"{trial.technique} {trial.seed}" for trial in self.trials]
        return Ensemble(members), {"ensemble": names}
