"""A head that is split over processes by vocabulary keeps its logits, and says so."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import crossent
from crossent.integrations import huggingface
from tests.helpers.language_models import model_of, small_batch
from tests.helpers.processes import on_processes

pytestmark = [pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")]


def losses(_):
    """Of a plain model, of one whose head is split, of that one patched; and what was said."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    warnings.simplefilter("ignore")
    batch, found = small_batch(), []
    for split, patched in ((False, False), (True, False), (True, True)):
        model = model_of(vocab_size=98)
        if split:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
            parallelize_module(model, mesh, plan)
        if patched:
            huggingface.patch(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = model(**batch).loss
            loss.backward()
        said = [str(w.message) for w in caught if w.category is crossent.MadeLogitsWarning]
        norm = model.model.embed_tokens.weight.grad.norm()
        found.append((loss.detach(), norm.detach(), said))
    return found


def test_the_plain_path_and_one_warning():
    for plain, split, patched in on_processes(losses, None):
        torch.testing.assert_close(split[:2], plain[:2], rtol=1e-4, atol=0)
        torch.testing.assert_close(patched[:2], plain[:2], rtol=1e-4, atol=0)
        assert not split[2]
        (said,) = patched[2]
        assert "DTensor" in said
        assert "no memory is saved" in said
