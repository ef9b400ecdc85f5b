"""crossent: cross-entropy from activations to loss to gradient: exact, fused, lean, explained.

>>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], requires_grad=True)
>>> loss = crossent.cross_entropy(logits, torch.tensor([0, 1]))
>>> loss.backward()
>>> print(logits.grad)  # (softmax - one-hot) / N
tensor([[-0.0596,  0.0596],
        [ 0.1345, -0.1345]])
"""

import importlib
from types import ModuleType

from .backends.cpu import empty_cache
from .backends.dispatch import BackendError, Choice
from .backends.results import Stats
from .functional import backend_for, cross_entropy, entropy, log_prob
from .head.functional import linear_cross_entropy
from .head.row_values import linear_entropy, linear_log_prob
from .learn.calculus import (
    gradient,
    hessian,
    likelihood,
    log_likelihood,
    log_softmax,
    softmax,
    softmax_jacobian,
)
from .learn.playground import Playground, playground
from .learn.steps import Steps, steps
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss
from .patching import patch
from .problem.warnings import (
    ClassAxisWarning,
    CrossentWarning,
    DoubleSoftmaxWarning,
    MadeLogitsWarning,
)
from .report import Explanation, Finding, explain

__version__ = "0.1.0"

#: Set to False to silence the warning about logits that are probabilities already.
warn_double_softmax = True

__all__ = [
    "BackendError",
    "Choice",
    "ClassAxisWarning",
    "CrossEntropyLoss",
    "CrossentWarning",
    "DoubleSoftmaxWarning",
    "Explanation",
    "Finding",
    "LinearCrossEntropyLoss",
    "MadeLogitsWarning",
    "Playground",
    "Stats",
    "Steps",
    "backend_for",
    "cross_entropy",
    "empty_cache",
    "entropy",
    "explain",
    "gradient",
    "hessian",
    "likelihood",
    "linear_cross_entropy",
    "linear_entropy",
    "linear_log_prob",
    "log_likelihood",
    "log_prob",
    "log_softmax",
    "patch",
    "playground",
    "softmax",
    "softmax_jacobian",
    "steps",
    "warn_double_softmax",
]

_WHEN_USED = ("integrations", "testing")


def __getattr__(name: str) -> ModuleType:
    """Parts that only some need are imported when they are used: ``crossent.testing.budget``."""
    if name in _WHEN_USED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHEN_USED})
