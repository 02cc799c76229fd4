"""FixMatch: predictions on weakly changed rows are labels of the strongly changed ones."""

from __future__ import annotations

from pydantic import Field
from torch.nn import functional as F

from pipeline.config.registry import AdaptationOptions, register
from pipeline.core.capabilities import makes_views
from pipeline.core.contracts import View
from pipeline.core.nn.domain_adaptation import DomainAdaptation, DomainFeatures, mean_over_ranks

STRONG = View(
    area=(0.3, 1.0),
    jitter=0.8,
    strength=1.0,
    grey=0.2,
    blur=0.5,
    solarize=0.2,
)


class FixMatchOptions(AdaptationOptions):
    threshold: float = Field(
        0.95, gt=0, lt=1, description="probability from which a prediction counts as a label"
    )


@register("technique", "fixmatch", options=FixMatchOptions)
class FixMatch(DomainAdaptation):
    """FixMatch: pseudo-labels from weakly augmented rows train strongly augmented ones.

    The weak view is the augmentation of the training rows, the strong one a random crop with
    colour jitter, grey, blur and solarisation (the paper has RandAugment and Cutout). Predictions
    on weak views count from a threshold on. (Sohn et al., FixMatch, NeurIPS 2020.)

    It assumes that the strong changes keep the class. It helps with few labels and many rows
    without any. It hurts where colour or fine detail is the class (lesions, species), and from a
    poor start.
    """

    compares_domains = False
    needs_one_class = True

    def check_target(self, objective, modality):
        super().check_target(objective, modality)
        if not makes_views(modality):
            raise ValueError(
                f"needs a weak and a strong view of a row, and {modality.registered_name} rows "
                "have no random views: use pseudo_labels"
            )

    def views(self):
        """Return the strong view (`ComparesViews`)."""
        return (STRONG,)

    def alignment(self, task, source, target):
        # no gradient flows through the weak view: free its activations before the strong one's
        target.pooled = target.pooled.detach()
        confidence, label = target.probabilities(task.objective).detach().max(-1)
        batch = target.batch
        if len(batch):
            batch = batch.replace(image=batch["view0"])
        scores = DomainFeatures.of(task, batch).scores(task.objective)
        losses = F.cross_entropy(scores, label, reduction="none")
        return mean_over_ranks(losses * (confidence >= self.options.threshold))
