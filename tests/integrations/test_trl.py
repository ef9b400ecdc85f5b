"""What trl computes of logits: log-probabilities of chosen tokens, and entropies."""

from __future__ import annotations

import pytest
import torch

from crossent.integrations import trl as functions

transformers = pytest.importorskip("transformers")
V = 97
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_what_trl_wants():
    g = torch.Generator().manual_seed(3)
    z = 3 * torch.randn(4, 7, V, generator=g)
    index = torch.randint(0, V, (4, 7), generator=g)
    mask = torch.rand(4, 7, generator=g) < 0.5
    reference = z.double().log_softmax(-1)
    truth = reference.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    ours = functions.selective_log_softmax(z, index)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    several = torch.randint(0, V, (4, 7, 3), generator=g)
    torch.testing.assert_close(
        functions.selective_log_softmax(z, several).double(),
        reference.gather(-1, several),
        rtol=1e-6,
        atol=1e-6,
    )
    warm = (z.double() / 2).log_softmax(-1)
    torch.testing.assert_close(
        functions.selective_log_softmax(z, index, 2.0, mask).double(),
        warm.gather(-1, index.unsqueeze(-1)).squeeze(-1) * mask,
        rtol=1e-6,
        atol=1e-6,
    )
    entropies = -(reference.exp() * reference).sum(-1)
    torch.testing.assert_close(functions.entropy_from_logits(z).double(), entropies)
    with pytest.raises(ValueError, match="temperature"):
        functions.entropy_from_logits(z, 0.0)
    trl = pytest.importorskip("trl.trainer.utils")
    torch.testing.assert_close(ours, trl.selective_log_softmax(z, index), rtol=1e-5, atol=1e-5)
    theirs = trl.entropy_from_logits(z)
    torch.testing.assert_close(functions.entropy_from_logits(z), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_unsigned_indices_are_masked_as_signed_ones(dtype):
    z = torch.randn(2, 5, 300, requires_grad=True)
    index = torch.arange(10).reshape(2, 5) * 25
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]])
    for chosen in (index, index.unsqueeze(-1).expand(2, 5, 3)):
        for kept in (mask, None):
            truth = functions.selective_log_softmax(z, chosen, 1.5, kept)
            ours = functions.selective_log_softmax(z, chosen.to(dtype), 1.5, kept)
            assert torch.equal(ours, truth)


def test_an_index_beyond_int64_is_out_of_range_unless_it_is_masked():
    z = torch.randn(2, 4)
    index = torch.tensor([1, -100]).view(torch.uint64)  # 2**64 - 100
    for mask in (None, torch.tensor([1, 1])):
        with pytest.raises(IndexError, match="from 0 to 3, got 18446744073709551516"):
            functions.selective_log_softmax(z, index, row_mask=mask)
    masked = functions.selective_log_softmax(z, index, row_mask=torch.tensor([1, 0]))
    assert masked.tolist() == pytest.approx([z.log_softmax(-1)[0, 1].item(), 0])
