"""The playground: a page where logits are dragged, and everything else follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..pages.html import framed, page

_LEAST, _MOST = 3, 10  # classes
_HEIGHT = 1150  # pixels of a frame in a notebook


@dataclass(frozen=True)
class Playground:
    """A page with sliders for the logits of a few classes; shows itself in a notebook."""

    logits: tuple[float, ...]
    target: int
    classes: tuple[str, ...]

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing but itself; also written to ``path`` if that is given."""
        start = {"logits": self.logits, "target": self.target, "classes": self.classes}
        limits = {"least": _LEAST, "most": _MOST}
        text = page("playground", title="From logits to gradient", data={**start, **limits})
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        return framed(self.to_html(), "playground", _HEIGHT)


def playground(
    logits: Tensor | Sequence[float] = (2.0, 0.5, -1.0, 0.0),
    target: int = 0,
    classes: Sequence[str] | None = None,
) -> Playground:
    r"""Drag the logits of three to ten classes and see softmax, loss and gradient follow.

    .. math:: p_c = \frac{e^{z_c / \tau}}{\sum_k e^{z_k / \tau}}, \qquad
        \ell = -\sum_c y_c \log p_c, \qquad
        \frac{\partial \ell}{\partial z_c} = \frac{p_c - y_c}{\tau}

    with a temperature :math:`\tau` and a smoothed target :math:`y`; the numbers are those of
    :func:`crossent.cross_entropy` with ``logit_scale=1/tau`` and ``label_smoothing``.

    Args:
        logits: the first ones, (V,) for V from 3 to 10.
        target: the class that is right at first.
        classes: V names.

    Returns:
        A :class:`Playground`: ``to_html(path)`` writes it, a notebook shows it.

    Raises:
        ValueError: too few or too many logits, a target that is no class, names of another number.

    Example:
        >>> page = crossent.playground([2.0, 0.0, -1.0], target=1, classes=["cat", "dog", "owl"])
        >>> "Content-Security-Policy" in page.to_html()
        True
    """
    values = torch.as_tensor(logits, dtype=torch.float64, device="cpu")
    if values.dim() != 1 or not _LEAST <= len(values) <= _MOST or not bool(values.isfinite().all()):
        raise ValueError(
            f"logits: expected {_LEAST} to {_MOST} finite numbers, got {tuple(values.shape)}"
        )
    if not 0 <= target < len(values):
        raise ValueError(f"target: expected a class from 0 to {len(values) - 1}, got {target}")
    names = [f"class {i}" for i in range(len(values))] if classes is None else list(classes)
    if len(names) != len(values):
        raise ValueError(f"classes: expected {len(values)} names, got {len(names)}")
    return Playground(tuple(values.tolist()), int(target), tuple(map(str, names)))
