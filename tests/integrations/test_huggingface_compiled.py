"""A patched model under torch.compile: the body in graphs, the head's loss fused, or all in one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from crossent.head.lazy import LazyLogits
from crossent.integrations import huggingface
from tests.helpers.language_models import model_of, small_batch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def step(model, compiled, batch):
    model.zero_grad()
    out = compiled(**batch)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, out.loss.detach(), gradients


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_the_graph_ends_before_the_head(kind):
    torch._dynamo.reset()
    model, batch = model_of(kind), small_batch()
    _, *wanted = step(model, model, batch)
    with huggingface.patch(model) as patched:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            out, *found = step(model, compiled, batch)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert isinstance(out.logits, LazyLogits)
        report = patched.report()
        assert (report.fused, report.made) == (2, 0)


def test_a_whole_graph_holds_its_logits():
    torch._dynamo.reset()
    model, batch = model_of(), small_batch()
    _, *wanted = step(model, model, batch)
    with huggingface.patch(model) as patched:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        out, *found = step(model, compiled, batch)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert type(out.logits) is torch.Tensor
        assert not patched.report().forwards
