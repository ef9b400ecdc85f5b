"""Random programs on lazy logits and on real ones: views, copies, edits, hooks, losses, gradients.

Whatever the order in which they meet, both end with the same numbers.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

import crossent
from crossent.head.lazy import LazyLinear, LazyLogits

B, T, D, V = 3, 4, 5, 7


def views(z, draw):
    """Something that moves rows, as the shape allows."""
    ways = [
        lambda: z[..., :-1, :] if z.dim() > 2 and z.shape[-2] > 1 else z[1:],
        lambda: z.reshape(-1, z.shape[-1]),
        lambda: z.flatten(0, -2) if z.dim() > 2 else z.unsqueeze(0),
        lambda: z[torch.arange(z.shape[0]).flip(0)],
        lambda: z[torch.arange(z.shape[0]) != 0],
        lambda: z.transpose(0, 1) if z.dim() > 2 else z[None],
        lambda: z.narrow(0, 0, max(1, z.shape[0] - 1)),
        lambda: z.chunk(2, 0)[0],
        lambda: z.permute(*reversed(range(z.dim() - 1)), z.dim() - 1),
    ]
    return draw.choice(ways)()


def copies(z, draw):
    """Something with memory of its own."""
    ways = [
        lambda: z * 0.5,
        lambda: z / -2,
        lambda: -z,
        lambda: z.clone(),
        lambda: z + torch.arange(float(V), dtype=z.dtype) / 10,
        lambda: z.double(),
        lambda: torch.tanh(z / 3) * 3,
        lambda: z.contiguous(),
        lambda: z.detach() * 1.0 + z,
    ]
    return draw.choice(ways)()


def edit(z, draw):
    """Something that changes it in place."""
    ways = [
        lambda: z.__setitem__((..., 0), 0.25),
        lambda: z.mul_(0.5),
        lambda: z.masked_fill_(z.detach() > 1, 1.0),
        lambda: z.clamp_(-1, 1),
        lambda: z.div_(2),
    ]
    draw.choice(ways)()


def score(z, draw):
    """A number of it."""
    rows = z.shape[:-1]
    target = torch.arange(rows.numel()).reshape(rows) % V
    flat, target_flat = z.reshape(-1, V), target.reshape(-1)
    ways = [
        lambda: F.cross_entropy(flat, target_flat),
        lambda: F.cross_entropy(flat, target_flat, reduction="sum", label_smoothing=0.1),
        lambda: F.nll_loss(F.log_softmax(flat, -1), target_flat),
        lambda: z.log_softmax(-1).gather(-1, target.unsqueeze(-1)).sum(),
        lambda: (-z.log_softmax(-1)).sum(-1).square().sum(),
        lambda: crossent.entropy(z).sum(),
        lambda: crossent.log_prob(z, target).sum(),
        lambda: crossent.cross_entropy(flat, target_flat, z_loss=0.1, reduction="none").sum(),
        lambda: F.cross_entropy(z.movedim(-1, 1), target) if z.dim() > 1 else z.sum(),
        lambda: z.square().mean(),
        lambda: z.argmax(-1).sum() * z.sum() * 0.1,
    ]
    return draw.choice(ways)()


def run(logits, seed):
    """The numbers that a program leaves."""
    draw = random.Random(seed)
    pool, seen, total, kept = [logits], [], 0.0, []
    # Of hooks and edits, one program has one: torch's own logits are a view (of a product of two
    # axes), whose hooks are lost or crash where the two meet.
    edited = hooked = False
    for _ in range(draw.randrange(3, 9)):
        z = draw.choice(pool)
        kind = draw.choices(
            ["view", "copy", "edit", "hook", "retain", "score", "look", "grad", "no_grad"],
            [6, 4, 2, 1, 1, 4, 1, 1, 1],
        )[0]
        if kind == "view":
            pool.append(views(z, draw))
        elif kind == "copy":
            pool.append(copies(z, draw))
        elif kind == "edit" and not hooked:
            edit(z, draw)
            edited = True
        elif kind == "hook" and z.requires_grad and not edited:
            scale = draw.choice([0.5, 2.0])
            z.register_hook(lambda g, s=scale: g * s)
            hooked = True
        elif kind == "retain" and z.requires_grad and not edited:
            z.retain_grad()
            hooked = True
            kept.append(z)
        elif kind == "score":
            total = total + score(z, draw)
        elif kind == "look":
            seen.append(z.detach().double().sum())
        elif kind == "no_grad":
            with torch.no_grad():
                seen.append(score(z, draw).double())
        elif kind == "grad" and z.requires_grad:
            (g,) = torch.autograd.grad(score(z, draw), z, allow_unused=True)
            seen.append(g.double().sum() if g is not None else torch.tensor(-1.0))
    total = total + score(draw.choice(pool), draw)
    return total, seen, kept


def outcome(head, features, seed, lazy):
    """Loss, what was looked at, and all gradients; or the error."""
    logits = head(features) if lazy else F.linear(features, head.weight, head.bias)
    assert isinstance(logits, LazyLogits) == lazy
    leaves = (features, head.weight, head.bias)
    try:
        total, seen, kept = run(logits, seed)
        found = torch.autograd.grad(total, leaves, allow_unused=True) if not kept else None
        if kept:
            for leaf in leaves:
                leaf.grad = None
            total.backward()
            found = [leaf.grad for leaf in leaves]
    except RuntimeError as error:
        return error
    return total.detach(), seen, [k.grad for k in kept], found


def same(one, other):
    if isinstance(one, Exception) or isinstance(other, Exception):
        assert type(one) is type(other), (one, other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif one is None or other is None:
        absent = other if one is None else one
        assert absent is None or not absent.any()
    else:
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("first", range(0, 400, 50))
def test_programs_end_alike(first):
    for seed in range(first, first + 50):
        torch.manual_seed(seed)
        head = LazyLinear(D, V).double()
        features = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
        truth = outcome(head, features, seed, lazy=False)
        if isinstance(truth, RuntimeError):
            continue  # what torch refuses (an edit of what backward needs) may work here
        try:
            same(outcome(head, features, seed, lazy=True), truth)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
