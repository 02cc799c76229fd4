"""Averages of the weights along one run of full fine-tuning: SWA and EMA."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.registry import LayerOptions, register
from pipeline.core.contracts import Phase, Technique

WARMUP = 0.1


class SWAOptions(LayerOptions):
    last_share: float = Field(
        0.25, gt=0, le=1, description="share of the steps, at the end, whose weights are averaged"
    )


@register("technique", "swa", options=SWAOptions)
class SWA(Technique):
    """Fine-tune everything at a constant rate and keep the mean of the last weights.

    Stochastic weight averaging (Izmailov et al. 2018), over every step of the last part. The
    learning rate rises in the first tenth of the steps and then stays at its peak, because the mean
    replaces the decay; ``train.warmup`` and ``train.schedule`` are not used.

    It assumes that the last steps lie around one minimum. It helps where weights of single steps
    are noisy (small batches, few labels), and finds wider minima. It hurts where training has not
    settled before the last part, as in very short runs.

    Statistics of batch norms are averaged with the weights; the paper computes them again on the
    training rows. Weights from before the last part are no average, so they are never kept,
    whatever ``train.keep`` says.
    """

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "last_share": (0.1, 0.5),
        }

    def phases(self, steps):
        return (Phase("all", steps, factor=constant),)

    def averaging(self, step, steps):
        first = steps - max(1, round(self.options.last_share * steps))
        return 1.0 if step <= first else 1.0 / (step - first + 1)


def constant(step: int, steps: int) -> float:
    """Return the learning-rate factor of a step: 1 after a tenth of the steps."""
    warm = round(WARMUP * steps)
    return (step + 1) / warm if step < warm else 1.0


class EMAOptions(LayerOptions):
    span: float = Field(
        0.1,
        gt=0,
        le=1,
        description="length of the average as a share of the steps: the decay is 1 - 1 / (span * "
        "steps), which suits short and long runs",
    )


@register("technique", "ema", options=EMAOptions)
class EMA(Technique):
    """Fine-tune everything and keep an exponential moving average of the weights.

    See Polyak and Juditsky 1992, and for fine-tuning Wortsman et al. 2022, appendix. The decay
    depends on the length of the run; ``train.ema``, for any technique, is a fixed decay. During the
    first ``span`` the average is the plain mean, so that the start does not weigh too much.

    It assumes that the weights move around a minimum, or slowly towards one. It helps where single
    weights are noisy. It changes little under a schedule that ends at zero. It hurts where the span
    is long and the weights still move: the average lags behind them.
    """

    def search_space(self):
        return {
            "lr": (0.1, 10.0),
            "span": (0.03, 0.3),
        }

    def averaging(self, step, steps):
        return 1.0 / min(step + 1, max(1.0, self.options.span * steps))
