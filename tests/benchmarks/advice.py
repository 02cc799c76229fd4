"""The model behind `advise` on simulated gains: coverage of its 90 % intervals, and how often a
source is recommended where none has any true gain.

    .venv/bin/python tests/benchmarks/advice.py --json advice.json     # 6 minutes of processor time; --quick: 10 s

Coverage: sources, techniques and targets with normal effects of the given spreads, of which 70 % of
the pairs are measured with errors of 0.01 to 0.04. "new target" and "new source" have no
measurement at all. Without a gain: twelve measured gains of which a given share of the variance is
that of scratch and so the same for all; a source is recommended by the rule of
`pipeline.report.advice`. Targets: coverage of at least 88 %, at most 5 % false recommendations.

Measured on 2026-11-30 (100 simulations each, 300 without a gain), in its own table:

    sources x techniques x targets  spreads               tried  untried  new target  new source
    4 x 5 x 2                       .05 .04 .05 rest .02  89 %   91 %     99 %        89 %
    5 x 6 x 4                       .00 .04 .05 rest .00  95 %   97 %     94 %        100 %
    8 x 10 x 6                      .05 .04 .05 rest .03  91 %   90 %     92 %        91 %
    3 x 3 x 2                       .05 .02 .00 rest .02  91 %   92 %     100 %       90 %
    3 x 3 x 2                       .00 .00 .00 rest .00  96 %   100 %    100 %       100 %

    shared part of the error                       0      25 %   50 %   75 %
    recommended, 12 sources of one technique       0.0 %  0.3 %  0.7 %  2.0 %
    recommended, 3 sources of 4 techniques         0.0 %  0.7 %  1.7 %  3.0 %
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import timing

from pipeline.report import stats
from pipeline.report.gain_model import GainModel

CASES = (
    ((4, 5, 2), (0.05, 0.04, 0.05, 0.02)),
    ((5, 6, 4), (0.0, 0.04, 0.05, 0.0)),
    ((8, 10, 6), (0.05, 0.04, 0.05, 0.03)),
    ((3, 3, 2), (0.05, 0.02, 0.0, 0.02)),
    ((3, 3, 2), (0.0, 0.0, 0.0, 0.0)),
)
MOST_TRIED = 20
"""Measured pairs whose intervals are looked at, so that a simulation takes little time."""
ERROR = 0.02


def covered(
    sizes: tuple[int, int, int], spreads: tuple[float, float, float, float], rng
) -> dict[str, list[bool]]:
    """Return which 90 % intervals hold the true gain, by what is known of the pair."""
    sources, techniques, targets = sizes
    full = (sources + 1, techniques, targets + 1)  # one more of each that is never measured
    parts = [rng.normal(0, spread, n) for spread, n in zip(spreads[:3], full, strict=True)]
    gains = 0.05 + sum(np.ix_(*parts)) + rng.normal(0, spreads[3], full)
    known = [place for place in np.ndindex(sizes) if rng.random() < 0.7]
    variances = rng.uniform(0.01, 0.04, len(known)) ** 2
    measured = [
        gains[place] + rng.normal(0, v**0.5) for place, v in zip(known, variances, strict=True)
    ]
    model = GainModel(known, measured, list(variances))
    others = {
        "untried": [place for place in np.ndindex(sizes) if place not in set(known)][:5],
        "new target": [(0, 0, targets)],
        "new source": [(sources, 0, 0)],
    }
    tried = known[:MOST_TRIED]
    kinds = ["tried"] * len(tried) + [kind for kind, places in others.items() for _ in places]
    new = [place for places in others.values() for place in places]
    low, high = model.posterior(range(len(tried)), new).interval(0.9)
    found: dict[str, list[bool]] = defaultdict(list)
    for kind, place, least, most in zip(kinds, [*tried, *new], low, high, strict=True):
        found[kind].append(bool(least <= gains[place] <= most))
    return found


def is_recommended(shared: float, sources: int, techniques: int, rng) -> bool:
    """Return whether a pair is recommended though no pair has a gain."""
    places = [(source, technique, 0) for source, technique in np.ndindex(sources, techniques)]
    own = rng.normal(0, ERROR * (1 - shared) ** 0.5, len(places))
    gains = own + rng.normal(0, ERROR * shared**0.5)
    found = GainModel(places, list(gains), [ERROR**2] * len(places)).posterior(range(len(places)))
    half = stats.NORMAL_95 * np.sqrt(np.maximum(found.covariance.diagonal(), ERROR**2))
    return bool(((found.means > half) & (gains > stats.NORMAL_95 * ERROR)).any())


def main() -> None:
    args = timing.options(__doc__, repeats=100)
    found = timing.describe(args)
    repeats = 3 if args.quick else args.repeats
    rng, results = np.random.default_rng(0), []
    for sizes, spreads in CASES:
        held: dict[str, list[bool]] = defaultdict(list)
        for _ in range(repeats):
            for kind, inside in covered(sizes, spreads, rng).items():
                held[kind] += inside
        shares = {kind: float(np.mean(inside)) for kind, inside in held.items()}
        results.append({"sizes": sizes, "spreads": spreads, "coverage": shares})
        print(sizes, spreads, {kind: f"{share:.0%}" for kind, share in shares.items()}, flush=True)
    for shared in (0.0, 0.25, 0.5, 0.75):
        for sources, techniques in ((12, 1), (3, 4)):
            hits = [is_recommended(shared, sources, techniques, rng) for _ in range(3 * repeats)]
            share = float(np.mean(hits))
            results.append({"shared": shared, "pairs": (sources, techniques), "false": share})
            print(f"shared {shared:.0%}, {sources} x {techniques}: {share:.1%} recommended")
    timing.write(args, found, results)


if __name__ == "__main__":
    main()
