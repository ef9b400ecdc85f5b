"""Where a loss sits, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .explanation import Explanation

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito
_CLASSES = 12


def draw(why: Explanation) -> Figure:
    """The histogram of the losses, the classes that cost most, and the reliability curve."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    histogram, classes, reliability = figure.subplots(1, 3)
    _histogram(histogram, why)
    _classes(classes, why)
    _reliability(reliability, why)
    return figure


def _histogram(axes: Axes, why: Explanation) -> None:
    losses = why.loss[why.rows.counted]
    axes.hist(losses[losses.isfinite()].numpy(), bins=40, color=_BLUE)
    axes.axvline(why.mean, color=_ORANGE, label=f"mean {why.mean:.3f}")
    axes.axvline(why.chance, color=_GREY, linestyle="--", label=f"ln V {why.chance:.3f}")
    axes.set(xlabel="loss of a row (nats)", ylabel="rows", yscale="log", title="losses")
    axes.legend()


def _classes(axes: Axes, why: Explanation) -> None:
    table = why.by_class().head(_CLASSES)[::-1]
    # Names come from outside: a dollar sign is no mathematics.
    names = [str(name).replace("$", r"\$") for name in table["class"]]
    axes.barh(range(len(table)), table["share"], color=_BLUE)
    axes.set_yticks(range(len(table)), names)
    axes.set(xlabel="share of the total loss", title="classes that cost most")


def _reliability(axes: Axes, why: Explanation) -> None:
    table = why.reliability()
    axes.plot((0, 1), (0, 1), "--", color=_GREY, label="as sure as right")
    axes.plot(table["confidence"], table["accuracy"], "o-", color=_BLUE, label="this model")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"calibration error {why.ece:.3f}")
    axes.legend()
