"""Every function with every option, written the obvious way: slow, in float64, independent of ours.

The oracle of the tests, under torch's own autograd. Formulas whose derivatives do not cancel are
used where the textbook's do: the tangent of a softcap, the log-softmax of the most probable class.
Options that only say how to compute (backend, chunk_rows, ...) are taken and have no effect.

``noise`` makes every intermediate number wrong by up to a relative ``eps``: what computing in a
dtype of that precision may do to a result, and so how closely the result can be asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_noise: list[tuple[float, torch.Generator]] = []


@contextlib.contextmanager
def noise(eps: float, seed: int) -> Iterator[None]:
    """Make each intermediate number of the naive formulas wrong by a relative ``eps``."""
    _noise.append((eps, torch.Generator().manual_seed(seed)))
    try:
        yield
    finally:
        _noise.pop()


def rounded(values: Tensor, size: Tensor | None = None) -> Tensor:
    """The values as a computation would have them: exact, or with noise relative to ``size``."""
    if not _noise:
        return values
    eps, generator = _noise[-1]
    share = torch.rand(values.shape, generator=generator, dtype=torch.float64) * 2 - 1
    if size is not None:
        return values + eps * share * size.detach()
    return values * (1 + eps * share)


def tanh(x: Tensor) -> Tensor:
    """tanh, with a derivative 4 e / (1 + e)**2 that keeps its digits near saturation."""
    small = x.abs() < 0.5
    large = x.masked_fill(small, 1.0)
    e = torch.exp(-2 * large.abs())
    return torch.where(small, torch.tanh(x.masked_fill(~small, 0.0)), x.sign() * (1 - e) / (1 + e))


def scored(z: Tensor, logit_scale: float | Tensor, softcap: float | None) -> Tensor:
    """The logits that are scored: scaled, then capped."""
    if isinstance(logit_scale, Tensor):
        z = rounded(z * logit_scale.double().reshape(()))
    elif logit_scale != 1:
        z = rounded(z * logit_scale)
    return z if softcap is None else rounded(softcap * rounded(tanh(z / softcap)))


def log_probabilities(z: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax and log-sum-exp over the last axis; the largest logit is left out of the sum."""
    top = F.one_hot(z.detach().argmax(-1), z.shape[-1]).bool()
    largest = z.masked_fill(~top, 0.0).sum(-1, keepdim=True)
    below = (z - largest).masked_fill(top, 0.0)
    rest = torch.log1p(torch.exp(below).masked_fill(top, 0.0).sum(-1, keepdim=True))
    return rounded(below) - rounded(rest), (largest + rounded(rest)).squeeze(-1)


def expected(factor: Tensor, values: Tensor) -> Tensor:
    """The sum of factor * values over classes, with 0 * inf = 0."""
    return (factor * values.masked_fill((factor == 0) & values.isinf(), 0.0)).sum(-1)


def entropies(logp: Tensor) -> Tensor:
    """-sum p log p over the last axis, with 0 log 0 = 0."""
    return -expected(rounded(torch.exp(logp)), logp)


def naive_loss(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
    """The loss, and ``(loss, six stats)`` where they are asked for."""
    dim = options.pop("dim", None)
    dim = min(input.dim() - 1, 1) if dim is None else int(dim)
    return _loss(input.double().movedim(dim, -1), None, None, target, weight, dim, **options)


def naive_linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    **options: Any,
) -> Any:
    """The loss of a linear head, several-dimensional ones too."""
    if options.get("ignore_index") is None:
        options["ignore_index"] = -100
    options.pop("dim", None)
    if linear_weight.dim() == 2:
        return _loss(input.double(), linear_weight, linear_bias, target, dim=-1, **options)
    z = torch.einsum("nd,v...d->nv...", input.double(), linear_weight.double())
    z = z if linear_bias is None else z + linear_bias.double()
    return naive_loss(z, target, **dict(options, dim=1))


def logits_of(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The logits of a head, or ``x`` itself where there is none."""
    if weight is None:
        return x
    weight = weight.double()
    z = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        z, size = z + bias.double(), size + bias.double().abs()
    return rounded(z, size)


def _loss(
    x: Tensor,  # logits, or features under a head, classes (features) last
    head: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None = None,
    dim: int = -1,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    sample_weight: Tensor | None = None,
    denominator: float | Tensor | None = None,
    shift: int = 0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    empty: str = "nan",
    return_stats: bool = False,
    **_how: Any,
) -> Any:
    by_index = not target.is_floating_point()
    rows = x.shape[:-1]
    target = target.to(torch.int64).reshape(rows) if by_index else target.double().movedim(dim, -1)
    s = torch.ones(rows, dtype=x.dtype) if sample_weight is None else sample_weight.double()
    valid = torch.ones(rows, dtype=torch.bool)
    if shift:
        target, s, valid = _shifted(target, s, valid, int(shift), by_index)
    if by_index:
        valid = valid & (target != int(ignore_index))
    z = scored(
        logits_of(x.masked_fill(~valid.unsqueeze(-1), 0.0), head, bias), logit_scale, softcap
    )
    classes = z.shape[-1]
    logp, lse = log_probabilities(z)
    w = torch.ones(classes, dtype=z.dtype) if weight is None else weight.double()
    y = target
    if by_index:
        y = F.one_hot(target.where(valid, 0), classes).double()
    smooth = (~z.detach().isneginf()).double()
    smooth = smooth / smooth.sum(-1, keepdim=True)
    q = (1 - label_smoothing) * y + label_smoothing * smooth
    losses = rounded(expected(rounded(w * q), -logp)) + z_loss * lse**2
    losses = (s * losses).masked_fill(~valid, 0.0)
    mass = s * ((w * y).sum(-1) if by_index else 1.0)
    mass = mass.masked_fill(~valid, 0.0) if by_index else mass[valid]
    loss = _reduced(losses, mass, reduction, denominator, empty)
    if not return_stats:
        return loss
    stats = (lse, expected(y, logp), entropies(logp), z.argmax(-1), z.argmax(-1) == y.argmax(-1))
    fill_values = (0, 0, 0, -1, False)
    stats = [a.detach().masked_fill(~valid, b) for a, b in zip(stats, fill_values, strict=True)]
    return loss, (*stats, valid)


def _shifted(
    target: Tensor, s: Tensor, valid: Tensor, shift: int, by_index: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Position i takes what i + shift holds; the last ones have no target."""
    axis = s.dim() - 1
    length = s.shape[-1]
    cut = min(shift, length)

    def moved(values: Tensor) -> Tensor:
        blank = values.narrow(axis, 0, cut) * 0
        return torch.cat([values.narrow(axis, cut, length - cut), blank], axis)

    keep = torch.arange(length) < length - cut
    return moved(target), moved(s), valid & keep


def _reduced(
    losses: Tensor, mass: Tensor, reduction: str, denominator: float | Tensor | None, empty: str
) -> Tensor:
    if denominator is None and reduction == "none":
        return losses
    if denominator is None and reduction == "sum":
        return rounded(losses.sum())
    divisor = mass.sum() if denominator is None else torch.as_tensor(denominator).double()
    divisor = rounded(divisor.reshape(()))
    nothing = divisor == 0
    mean = rounded(losses.sum() / divisor.masked_fill(nothing, 1.0))
    return mean.masked_fill(nothing, 0.0 if empty == "zero" else torch.nan)


def naive_log_prob(
    input: Tensor,
    index: Tensor,
    *,
    dim: int = -1,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    **_how: Any,
) -> Tensor:
    """log softmax at the indices, 0 where one is ignored."""
    single = index.dim() < input.dim()
    index = index.to(torch.int64)
    index = index.unsqueeze(-1) if single else index.movedim(dim, -1)
    wanted = index != int(ignore_index)
    x = input.double().movedim(dim, -1)
    x = x.masked_fill(~wanted.any(-1, keepdim=True), 0.0)
    logp, _ = log_probabilities(
        scored(logits_of(x, linear_weight, linear_bias), logit_scale, softcap)
    )
    values = logp.gather(-1, index.where(wanted, 0)).masked_fill(~wanted, 0.0)
    return values.squeeze(-1) if single else values.movedim(-1, dim)


def naive_linear_log_prob(
    input: Tensor, linear_weight: Tensor, index: Tensor, **options: Any
) -> Tensor:
    """log softmax of a head at the indices."""
    return naive_log_prob(input, index, linear_weight=linear_weight, **options)


def naive_entropy(
    input: Tensor,
    *,
    dim: int = -1,
    softcap: float | None = None,
    logit_scale: float | Tensor = 1.0,
    linear_weight: Tensor | None = None,
    linear_bias: Tensor | None = None,
    **_how: Any,
) -> Tensor:
    """-sum p log p of each row."""
    z = logits_of(input.double().movedim(dim, -1), linear_weight, linear_bias)
    return entropies(log_probabilities(scored(z, logit_scale, softcap))[0])


def naive_linear_entropy(input: Tensor, linear_weight: Tensor, **options: Any) -> Tensor:
    """-sum p log p of each row of a head."""
    return naive_entropy(input, linear_weight=linear_weight, **options)


def naive_log_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """log softmax."""
    return log_probabilities(logits.double().movedim(dim, -1))[0].movedim(-1, dim)


def naive_softmax(logits: Tensor, dim: int = -1) -> Tensor:
    """Probabilities of the classes."""
    return rounded(torch.exp(naive_log_softmax(logits, dim)))


def naive_jacobian(logits: Tensor, target: Tensor | None = None) -> Tensor:
    """diag(p) - p p^T, times the mass of probability targets, 0 without a target."""
    p = naive_softmax(logits)
    h = rounded(torch.diag_embed(p)) - rounded(p.unsqueeze(-1) * p.unsqueeze(-2))
    if target is None:
        return h
    if target.is_floating_point():
        return h * target.double().sum(-1)[..., None, None]
    return h * (target != -100)[..., None, None]


def naive_gradient(logits: Tensor, target: Tensor) -> Tensor:
    """Mass of the target times prediction, minus target."""
    p = naive_softmax(logits)
    if target.is_floating_point():
        y = target.double()
        return rounded(y.sum(-1, keepdim=True) * p) - y
    y = F.one_hot(target.to(torch.int64).clamp(min=0), logits.shape[-1]).double()
    g = rounded(p) - y
    exact = -p.masked_fill(y.bool(), 0.0).sum(-1, keepdim=True)  # p - 1 cancels
    return torch.where(y.bool(), exact, g).masked_fill((target == -100).unsqueeze(-1), 0.0)


def naive_log_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """Minus the sum of the losses."""
    return -naive_loss(logits, target, dim=-1, reduction="sum")


def naive_likelihood(logits: Tensor, target: Tensor) -> Tensor:
    """The product of the probabilities of the targets."""
    return torch.exp(rounded(naive_log_likelihood(logits, target)))
