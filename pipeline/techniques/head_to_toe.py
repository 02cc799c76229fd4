"""Head2Toe: a head on chosen features of all layers (Evci et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config.registry import Options, register
from pipeline.core.batch import Batch
from pipeline.core.contracts import Backbone, Features, Task, Technique
from pipeline.core.contracts.objective_capabilities import has_cached_head
from pipeline.core.nn.filter_maps import FilterMap, FilterMaps, filter_counts

PENALTIES = tuple(10.0**power for power in range(-6, 2))
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)


class HeadToToeOptions(Options):
    lasso: float = Field(
        1e-3,
        gt=0,
        description="weight of the group lasso (the sum of the norms of all features' weights), "
        "added to the mean loss of the head that ranks the features",
    )
    share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the features that are kept; none: the best of 0.01, 0.03, 0.1, 0.3 "
        "and 1 on validation rows",
    )
    penalty: float | None = Field(
        None,
        gt=0,
        description="L2 penalty of the head on the kept features: factor of half the weights' "
        "squared norm, added to the mean loss; none: the best of 1e-6 to 10 on validation rows",
    )


class LayersBackbone(Backbone):
    """A backbone whose pooled features hold those of all its layers.

    They are the backbone's own, then the output of each weight matrix, convolution, recurrent or
    attention layer, averaged over the positions of a row. Each part is normalised by row, so that
    no layer outweighs another. Layers for one kind of rows (a robot's own encoder) are left out:
    others have no such features.

    A layer may return several entries for each row (PatchTST one for each channel, Swin one for
    each window); they are averaged. A part is zeros where the layer's real positions are unknown
    (audio's first convolutions), or where its output does not belong to rows (tables of relative
    positions), which the first call finds out.
    """

    def __init__(self, base: Backbone):
        nn.Module.__init__(self)
        self.base = base
        self.arch, self.token_dim, self.causal = base.arch, base.token_dim, base.causal
        self.feature_map_specs, self.convolutions = base.feature_map_specs, base.convolutions
        self.widths = filter_counts(base)
        self.pooled_dim = base.pooled_dim + sum(self.widths.values())
        self.maps = FilterMaps(base, list(self.widths))
        self.row_layers: set[str] | None = None
        """Layers that return entries for each row; None before the first call."""

    def forward(
        self, batch: Batch, *, token_mask: Tensor | None = None, want: tuple[str, ...] = ()
    ) -> Features:
        if self.row_layers is None:
            self.row_layers = self._find_row_layers(batch)
        tokens = ("tokens",) if self.token_dim is not None else ()
        wanted = tuple(dict.fromkeys((*want, *tokens)))  # tokens come with their mask
        features = self.base(batch, token_mask=token_mask, want=wanted)
        outputs, pooled = self.maps.take(), features.pooled.float()
        parts = [_normed(pooled)]
        for name, width in self.widths.items():
            part = None
            if name in outputs and name in self.row_layers:
                part = _row_means(outputs[name], len(pooled), features.mask)
            parts.append(pooled.new_zeros(len(pooled), width) if part is None else _normed(part))
        return replace(features, pooled=torch.cat(parts, 1))

    @torch.no_grad()
    def _find_row_layers(self, batch: Batch) -> set[str]:
        """Return the layers whose output grows with the rows, in the order of the rows.

        A row is given two and three times: the outputs for two are the first of those for three.
        """
        modes = {module: module.training for module in self.base.modules()}
        self.base.eval()
        try:
            outputs = []
            for count in (2, 3):
                self.base(_repeat_first_row(batch, count))
                outputs.append(self.maps.take())
        finally:
            for module, is_training in modes.items():
                module.training = is_training
        two, three = outputs
        return {name for name in two if _grows_with_rows(two[name].values, three[name].values)}

    def layers(self) -> dict[str, list[str]]:
        layers = self.base.layers().items()
        return {name: [f"base.{parameter}" for parameter in names] for name, names in layers}


def _repeat_first_row(batch: Batch, count: int) -> Batch:
    """Return a batch of its first row, ``count`` times."""
    shards = batch.shards
    return Batch(
        np.repeat(batch.rows[:1], count),
        batch.keys[:1].repeat(count),
        {name: torch.cat([tensor[:1]] * count) for name, tensor in batch.data.items()},
        None if shards is None else np.repeat(shards[:1], count),
    )


def _grows_with_rows(two: Tensor, three: Tensor) -> bool:
    """Return whether the output for a row three times begins with that for the row twice, and is
    half as long again.
    """
    if 2 * len(three) != 3 * len(two) or three.shape[1:] != two.shape[1:]:
        return False
    scale = float(two.abs().max()) if two.numel() else 0.0
    return torch.allclose(three[: len(two)], two, rtol=0.0, atol=1e-2 * scale)


def _normed(features: Tensor) -> Tensor:
    return F.layer_norm(features, features.shape[-1:])


def _row_means(output: FilterMap, rows: int, tokens: Tensor | None) -> Tensor | None:
    """Return the means (B, C) of an output over its real positions; None: they are unknown.

    Args:
        rows: How many rows the batch has.
        tokens: (B, N) which tokens of the backbone are real; None: every position of it is.
    """
    values = output.values.float()
    entries_per_row, remainder = divmod(len(values), rows)
    if remainder:
        return None
    # entries may be left out where they are padding
    if entries_per_row > 1 and tokens is not None:
        return None
    if entries_per_row > 1:  # of channels or windows
        values = values.unflatten(0, (rows, entries_per_row))
        output = FilterMap(values)
    if values.dim() == 2:
        return values
    mask = output.known_mask(tokens)
    if mask is not None:
        real = mask[..., None].to(values.dtype)
        return (values * real).sum(1) / real.sum(1).clamp(min=1.0)
    return values.flatten(1, -2).mean(1) if tokens is None else None


@register("technique", "head_to_toe", options=HeadToToeOptions)
class HeadToToe(Technique):
    """Train the head alone, on chosen features of all layers, which are computed once.

    First a head on all features is solved with a group lasso, and features are ranked by the norm
    of their weights. Then a head on the best features is solved with an L2 penalty (Evci et al.
    2022). How many are kept is chosen on validation rows. Outputs are averaged over the positions
    of a row; the paper keeps a few regions of a picture.

    It assumes that layers below the last one have features that the source's own task did not need.
    It helps where the target is far from the source, at the cost of a linear probe. It hurts on few
    rows, where many features are noise, and it cannot learn features that no layer has. It costs
    memory: a row has as many features as all layers have outputs, some ten thousand. More than 4
    GiB of features are refused. The trial's record names the layers without features.

    If features cannot be kept (streamed targets, heads with dropout) the head trains by steps on
    the features of all layers, and the options have no effect. ``predict`` reads its bundle, but
    the bundle cannot be the source of another job.

    Raises:
        ValueError: the head reads more than pooled features.
    """

    frozen = True
    keeps_modules = True

    def wrap(self, task):
        objective = task.objective
        if not has_cached_head(objective):
            raise ValueError(
                "head_to_toe gives the head pooled features of all layers, and that of "
                f"{objective.registered_name} reads more than pooled ones: use full"
            )
        backbone = LayersBackbone(task.backbone)
        head = type(objective)(backbone, objective.options, objective.state)
        return Task(backbone, head)

    def penalties(self):
        """Return the penalties to solve for (`SolvesHead`)."""
        return PENALTIES if self.options.penalty is None else (self.options.penalty,)

    def selection(self):
        """Return how features are chosen (`SelectsFeatures`)."""
        shares = SHARES if self.options.share is None else (self.options.share,)
        return self.options.lasso, shares

    def describe_features(self, backbone, features):
        """Name the layers without features (`SelectsFeatures`)."""
        parts = features.split([backbone.base.pooled_dim, *backbone.widths.values()], 1)[1:]
        layers = list(zip(backbone.widths, parts, strict=True))
        missing = [name for name, part in layers if not part.any()]
        text = f"features of {len(layers) - len(missing)} of {len(layers)} layers"
        if not missing:
            return text
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        return (
            f"{text}, none of {', '.join(missing[:3])}{more} (which of their positions are a row's "
            "own is not known)"
        )

    def search_space(self):
        """What is not chosen on validation rows anyway; ``lr`` where the head trains by steps."""
        return {"lasso": (1e-5, 1e-1), "lr": (1.0, 100.0)}

    def rates(self, layers, phase):
        return {name: float(name == "head") for name in layers}
