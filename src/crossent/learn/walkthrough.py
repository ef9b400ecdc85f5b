"""The example that the note works through: six rows of activations, two classes.

The note shows its activations to four decimals and its results from more digits than it shows.
These activations round to the ones it shows and give every number that it prints.
"""

from __future__ import annotations

import torch

from .steps import Steps, steps

ACTIVATIONS = (
    (-1.645304, 1.889304),
    (1.979990, 1.768110),
    (2.818324, 4.664276),
    (-0.363525, -0.061376),
    (0.406442, -0.466841),
    (-3.380090, 3.248390),
)
TARGET = (0, 1, 0, 1, 1, 0)


def note() -> Steps:
    """The note's example, step by step.

    Example:
        >>> from crossent.learn.walkthrough import note
        >>> note().nll
        tensor([3.5634, 0.8047, 1.9925, 0.5534, 1.2222, 6.6298])
        >>> note().mean
        tensor(2.4610)
    """
    return steps(torch.tensor(ACTIVATIONS, device="cpu"), torch.tensor(TARGET, device="cpu"))
