"""Many threads at once: the same bits as one, forward and both backward passes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import crossent


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(8, 10), (300, 70)], ids=["small call", "sums"])
def test_threads_get_the_same_bits(shape, reduction):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, generator=draw)
    target = torch.randint(0, shape[1], shape[:1], generator=draw)
    weight = torch.rand(shape[1], generator=draw)

    def once(_):
        z = logits.clone().requires_grad_()
        loss = crossent.cross_entropy(z, target, weight=weight, reduction=reduction)
        first = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0]
        second = torch.autograd.grad(loss.sum(), z)[0]
        return loss.detach(), first, second

    wanted = once(0)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(once, range(64)):
            assert all(map(torch.equal, got, wanted))
    assert torch.equal(wanted[1], wanted[2])
