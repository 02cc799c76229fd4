"""The figures of the report, as SVG elements of the HTML page.

They have the page's fonts and its light and dark colours, and refer to no other file. matplotlib
draws with placeholder colours, which are then replaced by the CSS variables of the page (``--ink``,
``--s0`` ...).
"""

# matplotlib does not type the keywords of its methods, so every call would be reported
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import html
import io
import math
import re
import warnings
import zlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.io.wording import plural
from pipeline.report.matrix import LOSES, NOT_SHOWN, SCRATCH, WINS, MatrixEntry, fraction_order
from pipeline.report.results import NO_BACKBONE, ResultRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[float, float]]
"""Points (step, value) of a line."""
Series = dict[tuple[str, str], Points]
"""Lines by (source, technique), see `line_key`."""

_INK, _SOFT, _LINE, _PAPER, _WINS, _LOSES = (f"#01010{i}" for i in range(1, 7))
_COLOURS = [f"#01020{i}" for i in range(8)]
_NAMES = {
    _INK: "ink",
    _SOFT: "soft",
    _LINE: "line",
    _PAPER: "paper",
    _WINS: "wins",
    _LOSES: "loses",
    **{colour: f"s{number}" for number, colour in enumerate(_COLOURS)},
}
"""The CSS variable of each placeholder colour."""
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
Style = dict[str, Any]
"""Keyword arguments of matplotlib for a line and its marks."""
Legend = list[tuple[str, Style]]
"""Names, each with the style that stands for it."""
_OPEN: Style = {"color": _SOFT, "marker": "o", "markerfacecolor": _PAPER}
_WIDTH = 5.4
"""Inches of a figure. It is 389 units wide, so that text of 9 pt has 11 px on a phone, and 15 px at
most elsewhere."""


def forest(entries: Sequence[MatrixEntry], title: str, limits: tuple[float, float]) -> str:
    """Draw the gain of each entry with its interval below its name, and the zero line.

    Figures with the same ``limits`` of the x axis are aligned.
    """
    with _plot_settings():
        height = 0.75 + 0.36 * len(entries)
        figure, (axes,) = _figure(height)
        figure.set_layout_engine("none")
        axes.set_position((0.01, 0.45 / height, 0.975, 1 - 0.75 / height))
        axes.axvline(0, color=_SOFT, linewidth=0.9, zorder=1)
        styles = {
            WINS: (_WINS, "^", _WINS),
            LOSES: (_LOSES, "v", _LOSES),
            NOT_SHOWN: (_SOFT, "o", _PAPER),
        }
        for y, entry in enumerate(entries):
            colour, marker, fill = styles.get(entry.verdict, styles[NOT_SHOWN])
            if entry.gain_low is not None and entry.gain_high is not None:
                axes.plot(
                    [entry.gain_low, entry.gain_high],
                    [y, y],
                    color=colour,
                    linewidth=1.6,
                    solid_capstyle="butt",
                    zorder=2,
                )
            axes.plot(
                [entry.gain or 0.0],
                [y],
                marker=marker,
                markersize=5.5,
                color=colour,
                markerfacecolor=fill,
                markeredgewidth=1.2,
                zorder=3,
            )
            axes.annotate(
                entry_label(entry),
                (0, y - 0.5),
                xycoords=axes.get_yaxis_transform(),
                color=_INK,
                fontsize=8.5,
                va="center",
            )
        axes.set_yticks([])
        axes.set_ylim(len(entries) - 0.5, -0.9)
        axes.set_xlim(*limits)
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        figure.text(
            0.01, 1 - 0.17 / height, title, color=_INK, fontsize=9.5, weight="bold", va="center"
        )
        return _svg(figure, f"Gain over scratch with 95 % intervals: {title}")


def forest_limits(groups: dict[str, list[MatrixEntry]]) -> dict[str, tuple[float, float]]:
    """Return the x limits of each group. Groups with the same metric have the same limits."""
    ends: dict[str, list[float]] = {}
    for entries in groups.values():
        for entry in entries:
            ends.setdefault(entry.metric, [0.0]).extend(
                v for v in (entry.gain, entry.gain_low, entry.gain_high) if v is not None
            )
    widths = {name: max(values) - min(values) for name, values in ends.items()}
    margins = {name: 0.06 * (width or 1.0) for name, width in widths.items()}
    return {
        group: (min(ends[m]) - margins[m], max(ends[m]) + margins[m])
        for group, entries in groups.items()
        for m in [entries[0].metric]
    }


def learning(panels: dict[str, Series], metric: str) -> str:
    """Draw the validation metric by step.

    There is one panel for each label fraction, and in it one line for each (source, technique).
    """
    with _plot_settings():
        names = sorted(panels, key=fraction_order)
        keys = _unique_pairs(key for series in panels.values() for key in series)
        legend = _legend_entries(keys)
        figure, grid = _panels(len(names), 2.2, 0.1 + _legend_inches(legend))
        for axes, name in zip(grid, names, strict=True):
            for key, points in panels[name].items():
                axes.plot(
                    *zip(*points, strict=True),
                    marker="o" if len(points) == 1 else None,
                    markersize=4,
                    **_line_style(key, keys),
                )
            axes.set_title(f"labels: {fraction_label(name)}", loc="left", fontsize=9, color=_SOFT)
            axes.grid(color=_LINE, linewidth=0.6)
            axes.set_xlabel("step")
        grid[0].set_ylabel(f"validation {metric}")
        _legend(figure, legend)
        return _svg(figure, f"Validation {metric} by training step")


def label_efficiency(entries: Sequence[MatrixEntry]) -> str:
    """Draw the test metric by number of labelled rows, with intervals.

    There is one line for each `line_key`. It is horizontal where no row was trained on.
    """
    several = has_several_scratch_networks(entries)

    def key_of(entry: MatrixEntry) -> tuple[str, str]:
        return line_key(entry.source, entry.technique, entry.backbone, several)

    with _plot_settings():
        shown = [entry for entry in entries if entry.mean is not None and entry.n_train]
        untrained = [entry for entry in entries if entry.mean is not None and entry.n_train == 0]
        keys = _unique_pairs(key_of(entry) for entry in [*shown, *untrained])
        legend = _legend_entries(keys)
        figure, (axes,) = _figure(2.9 + _legend_inches(legend))
        # those of one network are shown: a soup has the rows of all its trials
        shown_last = sorted(shown, key=lambda entry: not entry.combines_trials)
        sizes = {entry.label_fraction: entry.n_train or 0 for entry in shown_last}
        for i, key in enumerate(keys):
            line_entries = sorted(
                (entry for entry in shown if key_of(entry) == key),
                key=lambda entry: entry.n_train or 0,
            )
            # intervals of the same number of rows are plotted side by side
            offset = 1 + 0.12 / len(keys) * (i - (len(keys) - 1) / 2)
            x = [(entry.n_train or 0) * offset for entry in line_entries]
            y = [entry.mean or 0.0 for entry in line_entries]
            low = [e.low if e.low is not None else e.mean or 0.0 for e in line_entries]
            high = [e.high if e.high is not None else e.mean or 0.0 for e in line_entries]
            bars = np.clip([np.subtract(y, low), np.subtract(high, y)], 0.0, None)
            axes.errorbar(
                x, y, yerr=bars, marker="o", markersize=3.5, elinewidth=1, **_line_style(key, keys)
            )
        for entry in untrained:
            axes.axhline(entry.mean or 0.0, **_line_style(key_of(entry), keys))
        axes.set_xscale("log")
        ticks = sorted(set(sizes.values()))
        sizes_text = [
            ", ".join(
                fraction_label(f)
                for f in sorted(sizes, key=fraction_order)
                if sizes[f] == n and not f.endswith(" rows")
            )
            for n in ticks
        ]
        axes.set_xticks(
            ticks, [f"{n:,}\n{text}" for n, text in zip(ticks, sizes_text, strict=True)]
        )
        axes.set_xticks([], minor=True)
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_xlabel("labelled training rows")
        axes.set_ylabel(f"test {shown[0].metric}")
        _legend(figure, legend)
        return _svg(figure, f"Test {shown[0].metric} by number of labels")


def score_gain(panels: Mapping[str, Sequence[tuple[str, float, MatrixEntry]]], score: str) -> str:
    """Draw gains over scratch by a transferability score, one panel for each target.

    Args:
        panels: (source, value of the score, the source's entry) of each point, by target.
        score: Name of the score.
    """
    with _plot_settings():
        figure, grid = _panels(len(panels), 2.3, 0.1, share=False)
        for axes, target in zip(grid, panels, strict=True):
            axes.axhline(0, color=_SOFT, linewidth=0.9, zorder=1)
            for source, value, entry in panels[target]:
                gain = entry.gain or 0.0
                if entry.gain_low is not None and entry.gain_high is not None:
                    axes.plot(
                        [value, value],
                        [entry.gain_low, entry.gain_high],
                        color=_COLOURS[0],
                        linewidth=1.2,
                    )
                axes.plot([value], [gain], "o", markersize=5, color=_COLOURS[0])
                axes.annotate(
                    truncate(source, 16),
                    (value, gain),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=_INK,
                )
            axes.margins(x=0.3, y=0.15)
            axes.set_title(truncate(target, 28), loc="left", fontsize=9, color=_SOFT)
            axes.grid(color=_LINE, linewidth=0.6)
            axes.locator_params(axis="x", nbins=4)
            axes.set_xlabel(score)
            axes.set_ylabel(f"gain in {truncate(panels[target][0][2].metric, 20)}")
        return _svg(figure, f"Gain over scratch by {score}, for {', '.join(panels)}")


def pareto(
    entries: Sequence[MatrixEntry], fronts: Mapping[str, Sequence[int]], numbered: Sequence[int]
) -> str:
    """Draw gains over scratch by seconds and by trained parameters, and the fronts.

    Args:
        entries: The entries. Scratch is at zero and has an open mark.
        fronts: "seconds" and "parameters" to the indices of the entries on the front.
        numbered: Indices of the entries that are shown with a number, from 1.
    """
    with _plot_settings():
        legend = _technique_marks(entries)
        colours = {name: style["color"] for name, style in legend}
        panels = {name: front for name, front in fronts.items() if front}
        figure, grid = _figure(2.6 + _legend_inches(legend), 1, len(panels))
        costs = {
            "seconds": [entry.seconds or 0.0 for entry in entries],
            "parameters": [float(entry.params_trained or 0) for entry in entries],
        }
        for axes, (name, front) in zip(grid, panels.items(), strict=True):
            points = list(zip(costs[name], [entry.gain or 0.0 for entry in entries], strict=True))
            axes.axhline(0, color=_SOFT, linewidth=0.9, zorder=1)
            axes.plot(
                *zip(*(points[index] for index in front), strict=True),
                drawstyle="steps-post",
                color=_SOFT,
                linewidth=1.2,
                zorder=2,
            )
            for index, (point, entry) in enumerate(zip(points, entries, strict=True)):
                style: Style = {"marker": "o", "color": colours.get(truncate(entry.technique, 32))}
                if entry.source == SCRATCH:
                    style = _OPEN
                axes.plot([point[0]], [point[1]], markersize=5, zorder=3, **style)
                if index in numbered:
                    axes.annotate(
                        str(numbered.index(index) + 1),
                        point,
                        xytext=(-3, 5),
                        textcoords="offset points",
                        ha="right",
                        fontsize=8.5,
                        color=_INK,
                    )
            _cost_scale(axes, costs[name])
            axes.margins(x=0.12, y=0.12)
            axes.grid(color=_LINE, linewidth=0.6)
            axes.set_xlabel(
                "seconds of a final trial" if name == "seconds" else "parameters trained"
            )
        grid[0].set_ylabel(f"gain in {truncate(entries[0].metric, 24)}")
        _legend(figure, legend)
        return _svg(figure, f"Gain over scratch by {' and by '.join(panels)}")


def _technique_marks(entries: Sequence[MatrixEntry]) -> Legend:
    """Return a legend with a filled mark for each technique, and an open one for scratch."""
    keys = _unique_pairs((entry.source, entry.technique) for entry in entries)
    # one source for all: its dash pattern is not shown
    with_source = [("source", technique) for source, technique in keys if source != SCRATCH]
    marks: Legend = [
        (name, {"color": style["color"], "marker": "o", "linestyle": ""})
        for name, style in _legend_entries(with_source)
    ]
    return [*marks, ("scratch", {**_OPEN, "linestyle": ""})]


def _cost_scale(axes: Axes, costs: Sequence[float]) -> None:
    """Give an x axis of costs a logarithmic scale, which begins at 0 where a cost is zero."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    positive = [cost for cost in costs if cost > 0]
    axes.set_xscale("log")
    if positive and len(positive) < len(costs):
        axes.set_xscale("symlog", linthresh=min(positive))
    elif positive:
        decades = math.log10(max(positive) / min(positive))
        if decades < 0.3:
            axes.set_xscale("linear")
            axes.xaxis.set_major_locator(MaxNLocator(3))
        else:
            subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0,)
            axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def strips(episodes: dict[str, np.ndarray]) -> str:
    """Draw frames of episodes, one line for each name, time from left to right.

    Args:
        episodes: Frames by name, (F, H, W, 3) uint8.
    """
    with _plot_settings():
        frames = max(len(frames_of_episode) for frames_of_episode in episodes.values())
        figure, axes = _figure(1.25 * len(episodes), len(episodes), frames)
        for axis in axes:
            axis.set_axis_off()
        for line, (name, frames_of_episode) in enumerate(episodes.items()):
            axes[line * frames].set_title(truncate(name, 60), loc="left")
            for column, picture in enumerate(frames_of_episode):
                axes[line * frames + column].imshow(picture)
        return _svg(figure, f"Pictures of episodes: {', '.join(episodes)}")


def reliability(curves: dict[str, list[tuple[float, float, int]]], positive: str) -> str:
    """Draw a reliability diagram: the observed share of a class by its predicted probability.

    Args:
        curves: Name to points (probability, share, rows). The first curve is in colour, the second
            one, of scratch, is grey.
        positive: Name of the class.
    """
    most = max(max(point[:2]) for points in curves.values() for point in points)
    return _by_prediction(
        curves,
        (0.0, min(1.0, 1.08 * most)),
        (f"predicted probability of {truncate(positive, 40)}", "observed share"),
        f"Calibration: observed share of {positive} by predicted probability",
    )


def predicted_and_true(curves: dict[str, list[tuple[float, float, int]]], column: str) -> str:
    """Draw the mean of true numbers by predicted ones.

    Args:
        curves: Name to points (mean prediction, mean of the true numbers, rows), as `reliability`
            has them.
        column: Name of the number.
    """
    values = [value for points in curves.values() for point in points for value in point[:2]]
    margin = 0.05 * ((max(values) - min(values)) or 1.0)
    return _by_prediction(
        curves,
        (min(values) - margin, max(values) + margin),
        (f"predicted {truncate(column, 40)}", "mean of the true numbers"),
        f"Mean of {column} by its prediction",
    )


def _by_prediction(
    curves: dict[str, list[tuple[float, float, int]]],
    limits: tuple[float, float],
    axis_names: tuple[str, str],
    description: str,
) -> str:
    """Draw what was observed by what was predicted, and the line on which both are equal.

    Args:
        limits: Both ends of both axes.
        axis_names: Those of the x and the y axis.
    """
    with _plot_settings():
        styles: list[Style] = [
            {"color": _COLOURS[0], "linewidth": 1.8},
            {"color": _SOFT, "linestyle": _DASHES[2], "linewidth": 1.8},
        ]
        legend = [(truncate(name, 48), style) for name, style in zip(curves, styles, strict=False)]
        figure, (axes,) = _figure(3.4 + _legend_inches(legend))
        axes.plot(limits, limits, color=_LINE, linewidth=1.2, zorder=1)
        for points, (_, style) in zip(curves.values(), legend, strict=False):
            axes.plot(
                [predicted for predicted, _, _ in points],
                [observed for _, observed, _ in points],
                marker="o",
                markersize=4,
                **style,
            )
        axes.set_xlim(*limits)
        axes.set_ylim(*limits)
        axes.grid(color=_LINE, linewidth=0.6)
        axes.set_xlabel(axis_names[0])
        axes.set_ylabel(axis_names[1])
        _legend(figure, legend)
        return _svg(figure, description)


def entry_label(entry: MatrixEntry) -> str:
    """Return the source, technique and label fraction of an entry, shortened for a figure."""
    return (
        f"{truncate(entry.source, 24)} · {truncate(entry.technique, 28)} · "
        f"{fraction_label(entry.label_fraction)}"
    )


def fraction_label(label_fraction: str) -> str:
    """Return a label fraction as the report shows it.

    "0.05" becomes "5 %" and "0 rows" becomes "none"; "5/class" and "5 rows" stay as they are.
    """
    if label_fraction in ("0/class", "0 rows"):
        return "none"
    if label_fraction == "1 rows":
        return "1 row"
    try:
        return f"{100 * float(label_fraction):.4g} %"
    except ValueError:
        return label_fraction


def labels_text(label_fraction: str) -> str:
    """Return a label fraction in words.

    They are "5 % labels", "25 labels a class", "5 labelled rows", and "no labels" for "0 rows".
    """
    shown = fraction_label(label_fraction)
    if shown == "none":
        return "no labels"
    if shown.endswith("%"):
        return f"{shown} labels"
    if shown.endswith("/class"):
        return f"{plural(int(shown.removesuffix('/class')), 'label')} a class"
    return shown.replace(" ", " labelled ", 1)


def mean_curve(seeds: Sequence[Points]) -> Points:
    """Return the mean of the seeds' curves at the steps at which any of them was validated.

    At a step that a seed was not validated at, its value is interpolated. Steps before a seed's
    first validation or after its last one are left out, so that each point is of all seeds.
    """
    first = max(points[0][0] for points in seeds)
    last = min(points[-1][0] for points in seeds)
    steps = sorted({step for points in seeds for step, _ in points if first <= step <= last})
    values = [
        np.interp(steps, [step for step, _ in points], [value for _, value in points])
        for points in seeds
    ]
    return list(zip(steps, np.mean(values, 0).tolist(), strict=True))


def has_several_scratch_networks(trials: Iterable[MatrixEntry | ResultRow]) -> bool:
    """Return whether trials without a source are of several backbones; baselines have none."""
    backbones = {trial.backbone for trial in trials if trial.source == SCRATCH}
    return len(backbones - {NO_BACKBONE}) > 1


def line_key(source: str, technique: str, backbone: str, several: bool) -> tuple[str, str]:
    """Return the (source, technique) that a figure has a line for.

    Args:
        source: A source has one backbone.
        technique: The technique with its options.
        backbone: It is named with the technique of a line without a source.
        several: Whether there are `has_several_scratch_networks`.
    """
    if several and source == SCRATCH and backbone != NO_BACKBONE:
        return source, f"{technique} ({backbone})"
    return source, technique


def truncate(text: str, max_length: int) -> str:
    """Return a text of at most some characters, with an ellipsis where it was longer."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


# ---------------------------------------------------------------- styles


def _unique_pairs(keys: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (source, technique) pairs, each once, those of scratch last."""
    return sorted(set(keys), key=lambda key: (key[0] == SCRATCH, key))


def _line_style(key: tuple[str, str], keys: list[tuple[str, str]]) -> Style:
    """Return the colour of a technique and the dash pattern of a source.

    Scratch is grey. Other techniques without a source are grey too, each with its own dash pattern.
    """
    techniques = list(dict.fromkeys(technique for source, technique in keys if source != SCRATCH))
    sources = list(dict.fromkeys(source for source, _ in keys if source != SCRATCH))
    if key[0] == SCRATCH:
        plain = [technique for source, technique in keys if source == SCRATCH]
        return {
            "color": _SOFT,
            "linestyle": _DASHES[(2 + plain.index(key[1])) % 4],
            "linewidth": 1.8,
        }
    return {
        "color": _COLOURS[techniques.index(key[1]) % 8],
        "linestyle": _DASHES[sources.index(key[0]) % 4],
        "linewidth": 1.6,
    }


def _legend_entries(keys: list[tuple[str, str]]) -> Legend:
    """Return the (name, style) entries of a legend.

    They are the techniques and, where there are several sources, the dash pattern of each source.
    """
    styles = {key: _line_style(key, keys) for key in reversed(keys) if key[0] != SCRATCH}
    techniques = {technique: style for (_, technique), style in styles.items()}
    sources = {source: style for (source, _), style in styles.items()}
    several = len(sources) > 1
    out = [
        (truncate(name, 32), style | ({"linestyle": "-"} if several else {}))
        for name, style in sorted(techniques.items())
    ]
    out += [
        (truncate(name, 32), style | {"color": _INK})
        for name, style in sorted(sources.items())
        if several
    ]
    return out + [
        (truncate(technique, 48), _line_style((source, technique), keys))
        for source, technique in keys
        if source == SCRATCH
    ]


def _legend_columns(legend: Legend) -> int:
    longest = max((len(name) for name, _ in legend), default=1)
    return max(1, min(len(legend), int(13 * _WIDTH / (longest + 8))))


def _legend_inches(legend: Legend) -> float:
    return 0.1 + 0.19 * math.ceil(len(legend) / _legend_columns(legend))


def _legend(figure: Figure, legend: Legend) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **style) for _, style in legend]
    # matplotlib hides names that begin with an underscore
    names = [name.lstrip("_") or name for name, _ in legend]
    figure.legend(
        handles,
        names,
        loc="outside lower left",
        ncols=_legend_columns(legend),
        frameon=False,
        labelcolor=_INK,
        handlelength=2.6,
    )


@contextmanager
def _plot_settings() -> Generator[None]:
    import matplotlib

    matplotlib.use("Agg", force=False)
    settings: dict[Any, Any] = {
        "font.size": 9,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "text.parse_math": False,
        "axes.formatter.use_mathtext": False,
        "axes.unicode_minus": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "onetomany",
        "text.color": _INK,
        "axes.labelcolor": _SOFT,
        "axes.edgecolor": _LINE,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _SOFT,
        "ytick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # the browser of the reader has the glyph
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _figure(
    height: float, num_rows: int = 1, num_columns: int = 1, *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, made without pyplot and its global state.

    With ``share`` all axes have one y scale.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(num_rows, num_columns, sharey=share, squeeze=False).flat)


def _panels(
    count: int, row_height: float, more_height: float, *, share: bool = True
) -> tuple[Figure, list[Axes]]:
    """Return a figure and the axes of its panels, two a row, as `_figure`."""
    num_columns = min(count, 2)
    num_rows = math.ceil(count / num_columns)
    height = more_height + row_height * num_rows
    figure, axes = _figure(height, num_rows, num_columns, share=share)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def _svg(figure: Figure, description: str) -> str:
    """Return the figure as an <svg> element with the fonts and colours of the page.

    Its ids differ from those of other figures. The same figure always gives the same text.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # `Figure.savefig` would lay out and draw it twice
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->",
        "",
        text[text.index("<svg") :],
        flags=re.DOTALL,
    )
    prefix = f"f{zlib.crc32(text.encode()):08x}-"

    def tag(match: re.Match[str]) -> str:
        out = re.sub(r'\bid="', f'id="{prefix}', match[0].replace("xlink:href", "href"))
        out = re.sub(r'href="#|url\(#', lambda m: m[0] + prefix, out)
        out = re.sub(r"font-family: [^;\"]*;? ?", "", out)
        return re.sub(
            "#010[12]0[0-9]", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], out
        )

    text = re.sub(r"<[^>]*>", tag, text)  # tags only: the text between them is the user's
    box = re.search('viewBox="[^"]*"', text)
    opening = (
        f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
        f"{box[0] if box else ''}>"
    )
    return opening + text[text.index(">") + 1 :].strip()
