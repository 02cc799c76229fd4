"""Linear probes: only the head is trained, on a frozen backbone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.registry import Options, register
from pipeline.core.contracts import Phase, Technique

PENALTIES = tuple(10 ** (power / 2) for power in range(-12, 3))
"""1e-6 to 10, two a decade. In scikit-learn's terms C is 1 / (penalty x rows)."""


class ProbeOptions(Options):
    solver: Literal["lbfgs", "sgd"] | None = Field(
        None,
        description="lbfgs: the convex problem is solved without a learning rate (a squared error "
        "in closed form), and the penalty is chosen on validation rows. If features cannot be "
        "kept (streamed targets, heads that read tokens or have dropout) the head trains by steps "
        "all the same. sgd: by steps of the job's optimiser; none: lbfgs, or sgd if lr_scale is "
        "given",
    )
    penalty: float | None = Field(
        None,
        gt=0,
        description="with lbfgs, the L2 penalty: factor of half the weights' squared norm, added "
        "to the mean loss (for label sets, of each label); none: the best of 1e-6 to 10",
    )
    lr_scale: float | None = Field(
        None,
        gt=0,
        description="learning rate of a head that trains by steps, relative to lr; a head alone "
        "needs a larger one than a whole network; none: 1",
    )

    @model_validator(mode="after")
    def _check(self):
        if self.solver == "lbfgs" and self.lr_scale is not None:
            raise ValueError("lr_scale is for solver: sgd; lbfgs has no learning rate")
        if self.penalty is not None and (self.solver == "sgd" or self.lr_scale is not None):
            raise ValueError("penalty is for solver: lbfgs; with sgd train.weight_decay takes part")
        return self


@register("technique", "linear_probe", options=ProbeOptions)
class LinearProbe(Technique):
    """Train the head alone, on features that are computed once.

    The backbone stays in evaluation mode. The head is multinomial logistic regression, or one
    logistic regression for each label, solved with an L2 penalty (Kornblith et al. 2019, section 3;
    Radford et al. 2021, appendix A.3). For an objective with a squared error it is ridge regression
    (Hoerl and Kennard 1970).

    It assumes that the source's features separate the target's classes. It helps on few rows, and
    costs the least. It also shows how good the features are. It hurts where the inputs differ or
    the source lacks features that the target needs: fine-tuning then learns more.
    """

    frozen = True

    def penalties(self):
        """Return the penalties to solve for (`SolvesHead`); () where the head trains by steps."""
        options = self.options
        if options.solver == "sgd" or (options.solver is None and options.lr_scale is not None):
            return ()
        return PENALTIES if options.penalty is None else (options.penalty,)

    def search_space(self):
        """A head alone takes a larger rate than a network, which ``lr_scale`` may have said."""
        return {"lr": (1.0, 100.0) if self.options.lr_scale is None else (0.1, 10.0)}

    def phases(self, steps):
        return (Phase("all", steps, self.options.lr_scale or 1.0),)

    def rates(self, layers, phase):
        return {name: float(name == "head") for name in layers}


@register("technique", "random_probe", options=ProbeOptions)
class RandomProbe(LinearProbe):
    """Train the head on a backbone with random weights.

    It shows what the architecture alone gives (Jarrett et al. 2009). Pretraining has to do better
    than this. It assumes nothing of a source, since it reads none. It helps to judge
    `linear_probe`. It hurts as a network to use: pretrained features are nearly always better.
    """

    starts_from = "random"
