"""Where a loss sits, drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .explanation import Explanation

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito
_CLASSES = 12
_INKED: tuple[Any, ...] = (  # matplotlib's types spell out every setting
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "axes.titlecolor",
    "xtick.color",
    "ytick.color",
)


def draw(why: Explanation) -> Figure:
    """The histogram of the losses, the classes that cost most, and the reliability curve."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, part in zip(figure.subplots(1, 3), (histogram, classes, reliability), strict=True):
        part(axes, why)
    return figure


def figure_of(part: Callable[[Axes, Explanation], None], why: Explanation, ink: str) -> Figure:
    """One of the parts alone, for paper on which ``ink`` can be read."""
    with rc_context(dict.fromkeys(_INKED, ink)):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        part(figure.subplots(), why)
    return figure


def histogram(axes: Axes, why: Explanation) -> None:
    """How often each loss occurs."""
    losses = why.loss[why.rows.valid]
    axes.hist(losses[losses.isfinite()].numpy(), bins=40, color=_BLUE)
    axes.axvline(why.mean, color=_ORANGE, label=f"mean {why.mean:.3f}")
    axes.axvline(why.chance, color=_GREY, linestyle="--", label=f"ln V {why.chance:.3f}")
    axes.set(xlabel="loss of a row (nats)", ylabel="rows", yscale="log", title="losses")
    _legend(axes)


def classes(axes: Axes, why: Explanation) -> None:
    """The classes that cost most."""
    table = why.by_class().head(_CLASSES)[::-1]
    # Names come from outside: a dollar sign is no mathematics.
    names = [str(name).replace("$", r"\$") for name in table["class"]]
    axes.barh(range(len(table)), table["share"], color=_BLUE)
    axes.set_yticks(range(len(table)), names)
    axes.set(xlabel="share of the total loss", title="classes that cost most")


def reliability(axes: Axes, why: Explanation) -> None:
    """Accuracy against confidence."""
    table = why.reliability()
    axes.plot((0, 1), (0, 1), "--", color=_GREY, label="as sure as right")
    axes.plot(table["confidence"], table["accuracy"], "o-", color=_BLUE, label="this model")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"calibration error {why.ece:.3f}")
    _legend(axes)


def positions(axes: Axes, why: Explanation) -> None:
    """The mean loss at each position of the sequences."""
    table = why.by_position()
    axes.plot(table["position"], table["loss"], color=_BLUE)
    axes.axhline(why.mean, color=_ORANGE, linestyle="--", label=f"mean {why.mean:.3f}")
    axes.set(xlabel="position", ylabel="mean loss (nats)", title="positions")
    _legend(axes)


def _legend(axes: Axes) -> None:
    axes.legend(framealpha=0.0)
