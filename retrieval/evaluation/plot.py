"""A picture of a report: recall by depth for every ranker, with intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from retrieval.evaluation.offline import Report

__all__ = ["plot_recall"]

_COLOURS = ("#1f5fa8", "#5aa0e0", "#9a9a9a", "#c26a2d")


def plot_recall(
    report: Report, path: Path, *, title: str, ks: Sequence[int], possible: Mapping[int, float] | None = None
) -> None:
    """Draw recall@K as bars with 95% intervals and write a PNG.

    Args:
        report: what to draw.
        path: file to write.
        title: what was measured.
        ks: depths to show.
        possible: the best recall that the data allow at each depth, where it is known.
    """
    figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(report.rows)
    for index, row in enumerate(report.rows):
        estimates = [row.metrics[f"recall@{k}"] for k in ks]
        places = [place - 0.4 + width * (index + 0.5) for place in range(len(ks))]
        means = [estimate.mean for estimate in estimates]
        errors = [
            [max(0.0, estimate.mean - estimate.low) for estimate in estimates],
            [max(0.0, estimate.high - estimate.mean) for estimate in estimates],
        ]
        colour = _COLOURS[index % len(_COLOURS)]
        bars = axes.bar(places, means, width * 0.92, yerr=errors, capsize=3, label=row.ranker, color=colour)
        axes.bar_label(bars, [f"{mean:.3f}" for mean in means], fontsize=8, padding=2)
    if possible is not None:
        levels = [possible[k] for k in ks]
        left, right = [place - 0.42 for place in range(len(ks))], [place + 0.42 for place in range(len(ks))]
        axes.hlines(levels, left, right, colors="#222222", linestyles="dashed", label="possible")
        for level, place in zip(levels, right, strict=True):
            axes.annotate(f"{level:.3f}", (place, level), fontsize=8, ha="right", va="bottom")
    axes.set_xticks(range(len(ks)), [f"recall@{k}" for k in ks])
    axes.set_ylim(0, min(1.05, 1.15 * axes.get_ylim()[1]))
    axes.set_ylabel("share of users")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path)
