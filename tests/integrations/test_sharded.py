"""A patched model under DDP, FSDP and ZeRO-3 trains as the plain one does, and without logits.

One pair of processes goes through all settings of all wrappers. A setting trains
twice from the same weights, plain and patched, and is held to the plain run rank by rank: losses,
gradients of the first step, weights after the second, each shard as it lies there.
"""

from __future__ import annotations

import functools
import math
import traceback
import warnings
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from crossent.head import chunked
from crossent.integrations import huggingface
from tests.helpers.processes import on_processes
from tests.helpers.sharding import WRAPPERS, local

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")]

V, D, T, B, STEPS = 97, 16, 11, 2, 2
ROWS = B * (T - 1)  # rows of logits that the loss is taken of
BUDGET = ROWS * V  # bytes of scratch memory: a chunk is a fourth of the logits or less


class Setting(NamedTuple):
    """One way to wrap a model; ``inside``: the model makes the loss itself."""

    name: str
    inside: bool = True
    tied: bool = False

    def __str__(self) -> str:
        where = "loss inside" if self.inside else "loss outside"
        return f"{self.name}, {where}" + (", tied" if self.tied else "")


# Operations on shapes and strides alone, which lazy logits go through on the meta device.
NO_NUMBERS = {
    f"aten::{name}"
    for name in (
        "view reshape slice select narrow transpose permute flatten unflatten unsqueeze squeeze "
        "empty empty_like empty_strided as_strided expand alias detach set_"
    ).split()
}


class WideTensors:
    """Which operations were given all logits, or something as wide.

    Read from torch's profiler: a mode of torch's dispatcher would turn the kernels off.
    """

    def __enter__(self) -> WideTensors:
        self.profile = torch.autograd.profiler.profile(record_shapes=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        events = self.profile.kineto_results.events()  # as they are: to sort them takes seconds
        self.seen = [
            event.name()
            for event in events
            if event.name().startswith("aten::")
            and event.name() not in NO_NUMBERS
            and any(map(wide, event.shapes()))
        ]


def wide(shape: Any) -> bool:
    """Whether it has a row of classes for each token."""
    return len(shape) > 1 and shape[-1] == V and math.prod(shape) >= ROWS * V


def model_of(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).train()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # away from equal probabilities
    return model


def both(names: list[str]) -> list[Setting]:
    return [Setting(name, inside) for name in names for inside in (True, False)]


SETTINGS = {
    "DDP": both(["plain", "unused", "static"]),
    "FSDP2": [
        *both(["root", "own unit", "root reshards", "root, bf16", "root, bf16, float32 output"]),
        Setting("own unit, bf16"),
        *both(["accelerate"]),
        Setting("accelerate", tied=True),
        Setting("root", tied=True),
    ],
    "FSDP1": both(["root, flat", "root, original", "own unit, flat", "own unit, original"]),
    "ZeRO-3": both(["modules"]),
}


def train(kind: str, setting: Setting, patched: bool) -> dict[str, Any]:
    """Two steps: losses, first gradients, last weights, operations that returned all logits."""
    model = model_of(setting.tied)
    if patched:
        huggingface.patch(model)
    wrapped = WRAPPERS[kind](model, setting.name)
    rank = dist.get_rank() if dist.is_initialized() else 0
    g = torch.Generator().manual_seed(1 + rank)
    losses, gradients, seen = [], {}, []
    for step in range(STEPS):
        ids = torch.randint(3, V, (B, T), generator=g)
        labels = ids.clone()
        labels[0, : 3 + rank] = -100
        with WideTensors() as wide:
            if setting.inside:
                loss = wrapped(input_ids=ids, labels=labels).loss
            else:
                logits = wrapped(input_ids=ids).logits
                shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
                loss = F.cross_entropy(logits.view(-1, V).float(), shifted)
            loss.backward()
        seen += wide.seen
        losses.append(loss.detach())
        parameters = dict(wrapped.named_parameters())
        if step == 0:
            gradients = {n: local(p.grad) for n, p in parameters.items() if p.grad is not None}
        for parameter in [p for p in parameters.values() if p.grad is not None]:
            if hasattr(model, "everything"):
                model.everything[parameter].sub_(parameter.grad, alpha=0.1)
            else:
                with torch.no_grad():
                    parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None
    everything = getattr(model, "everything", None)
    weights = {n: local(p if everything is None else everything[p]) for n, p in parameters.items()}
    return {"losses": losses, "gradients": gradients, "weights": weights, "wide": seen}


def go_through(kind: str) -> dict[Setting, Any]:
    """All settings of a kind on this rank: results of both runs, or the error of the second."""
    warnings.simplefilter("ignore")
    chunked.budget = lambda head: BUDGET
    results: dict[Setting, Any] = {}
    for setting in SETTINGS[kind]:
        plain = train(kind, setting, patched=False)
        try:
            results[setting] = plain, train(kind, setting, patched=True)
        except Exception:
            results[setting] = plain, traceback.format_exc()
    return results


def go_through_all(kinds: list[str]) -> dict[str, dict[Setting, Any]]:
    return {kind: go_through(kind) for kind in kinds}


@functools.cache
def all_results(alone: bool) -> list[dict[str, dict[Setting, Any]]]:
    """By rank; the processes start once, for importing takes longer than training."""
    if not alone:
        return on_processes(go_through_all, [kind for kind in SETTINGS if kind != "ZeRO-3"])
    before = chunked.budget
    try:
        return [go_through_all(["ZeRO-3"])]
    finally:
        chunked.budget = before


def results_of(kind: str) -> list[dict[Setting, Any]]:
    """By rank: what a plain and a patched model did in each setting."""
    return [results[kind] for results in all_results(kind == "ZeRO-3")]


CASES = [
    pytest.param(kind, setting, id=f"{kind}: {setting}")
    for kind in SETTINGS
    for setting in SETTINGS[kind]
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_trains_as_the_plain_model(kind, setting):
    for results in results_of(kind):
        plain, patched = results[setting]
        assert plain["wide"], "the watch for logits sees nothing"
        assert isinstance(patched, dict), patched
        half = "bf16" in setting.name
        rtol = 2e-2 if half else 1e-4
        torch.testing.assert_close(patched["losses"], plain["losses"], rtol=rtol / 10, atol=0)
        for what in ("gradients", "weights"):
            assert patched[what].keys() == plain[what].keys()
            size = max(float(v.abs().max()) for v in plain[what].values() if v.numel())
            atol = size * (2e-2 if half else 1e-5)
            torch.testing.assert_close(patched[what], plain[what], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_no_logits_are_made(kind, setting):
    for results in results_of(kind):
        patched = results[setting][1]
        assert isinstance(patched, dict), patched
        assert not patched["wide"]


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_ranks_see_their_own_rows_and_end_with_the_same_model(kind):
    """What the other tests compare is a sharded run: no rank trains alone."""
    one, other = results_of(kind)
    name = next(n for n in one[SETTINGS[kind][0]][0]["weights"] if "q_proj" in n)
    for setting in SETTINGS[kind]:
        (mine, _), (its, _) = one[setting], other[setting]
        assert not torch.equal(torch.stack(mine["losses"]), torch.stack(its["losses"]))
        same = torch.equal(mine["weights"][name], its["weights"][name])
        assert same == (kind == "DDP"), "replicas are the same, shards are not"
