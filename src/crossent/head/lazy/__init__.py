"""A head whose logits are made only if somebody needs them.

:class:`LazyLinear` is a linear layer that, while it trains, returns :class:`LazyLogits`: features
and weight that pass for their product. A cross-entropy of them, torch's or ours, becomes
:func:`crossent.linear_cross_entropy`, and the (N, V) logits never exist. What models do on the way
(rows taken or reordered, a scale, a bias, a soft cap, a log-softmax) is written down. Everything
else makes the logits, for good: from then on they are an ordinary tensor, the loss's too.

recipe    what the logits are, and under which circumstances they came about
tensor    the tensor that stands for them: a recipe, or made
gradient  what features and weight receive of it, and no numbers
nodes     what stands in autograd's graph on the way
maps, rows, scores, log_softmax, graph   what can be done to a recipe: the rules
watch     what was fused, what was made and who asked for it
linear    the layer
"""

from . import graph as _graph  # noqa: F401  (they register their rules)
from . import log_softmax as _log_softmax  # noqa: F401
from . import maps as _maps  # noqa: F401
from . import rows as _rows  # noqa: F401
from . import scores as _scores  # noqa: F401
from .linear import LazyHead, LazyLinear, lazy_linear
from .tensor import LazyLogits
from .watch import Report, Watch

__all__ = ["LazyHead", "LazyLinear", "LazyLogits", "Report", "Watch", "lazy_linear"]
