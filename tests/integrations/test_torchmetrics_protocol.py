"""What torchmetrics asks of every metric: plots, copies, checkpoints, forward, merging."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")

torchmetrics = pytest.importorskip("torchmetrics")
metrics = pytest.importorskip("crossent.integrations.torchmetrics")

MADE = {
    "cross-entropy": lambda: metrics.CrossEntropy(),
    "smoothed": lambda: metrics.CrossEntropy(
        torch.arange(1.0, 6), options={"label_smoothing": 0.1}
    ),
    "perplexity": lambda: metrics.Perplexity(),
    "calibration error": lambda: metrics.CalibrationError(bins=7),
}


@pytest.fixture(params=MADE)
def make(request):
    return MADE[request.param]


def batches():
    g = torch.Generator().manual_seed(0)
    return [
        (3 * torch.randn(n, 5, generator=g), torch.randint(0, 5, (n,), generator=g))
        for n in (3, 9, 4)
    ]


def filled(make):
    metric = make()
    for z, t in batches():
        metric.update(z, t)
    return metric


def test_plots(make):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    metric = make()
    values = [metric(z, t) for z, t in batches()]
    drawn = {
        "computed": (metric.plot(), [metric.compute()]),
        "one": (metric.plot(values[1]), values[1:2]),
        "steps": (metric.plot(values), values),
    }
    for (figure, axes), wanted in drawn.values():
        seen = torch.cat([torch.as_tensor(line.get_ydata()).flatten() for line in axes.lines])
        torch.testing.assert_close(seen, torch.stack(wanted))
        assert axes.get_ylabel() == type(metric).__name__
        pyplot.close(figure)
    figure, axes = pyplot.subplots()
    assert metric.plot(values, axes) == (None, axes)
    pyplot.close(figure)
    collection = torchmetrics.MetricCollection({"a": make(), "b": make()})
    collection.update(*batches()[0])
    for figure, _ in collection.plot():
        pyplot.close(figure)


def test_forward_gives_the_batch_and_the_sums_keep_all(make):
    metric = make()
    for z, t in batches():
        alone = make()
        alone.update(z, t)
        assert metric(z, t) == alone.compute()
    assert metric.compute() == filled(make).compute()
    assert metric.update_count == 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()],
    ids=["deepcopy", "pickle", "clone"],
)  # fmt: skip
def test_copies_go_on_by_themselves(make, copied):
    metric = filled(make)
    before = metric.compute()
    other = copied(metric.bfloat16())
    assert other.compute() == before
    other.update(*batches()[0])
    metric.reset()
    metric.update(*batches()[0])
    other.reset()
    other.update(*batches()[0])
    assert other.compute() == metric.compute()
    assert other.compute().dtype == torch.float64


def test_a_checkpoint_keeps_the_sums(make):
    saved, loaded = (torch.nn.ModuleDict({"metric": m}) for m in (filled(make), make()))
    for module in (saved, loaded):
        module.metric.persistent(True)
    state = saved.bfloat16().state_dict()
    assert all(value.dtype == torch.float64 for value in state.values())
    loaded.load_state_dict(state)
    assert loaded.metric.compute() == saved.metric.compute()
    assert make().state_dict() == {}  # as of every metric: nothing is kept unless asked for


def test_merging_is_seeing_all_the_rows(make):
    first, second = make(), make()
    first.update(*batches()[0])
    for z, t in batches()[1:]:
        second.update(z, t)
    for incoming in (second, second.metric_state):
        merged = copy.deepcopy(first)
        merged.half().merge_state(incoming)
        torch.testing.assert_close(merged.compute(), filled(make).compute(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "cpu"])
def test_a_collection_that_is_cast_between_batches(cast):
    together = torchmetrics.MetricCollection({name: make() for name, make in MADE.items()})
    for z, t in batches():
        together.update(z, t)
        getattr(together, cast)()
    assert together.compute() == {name: filled(make).compute() for name, make in MADE.items()}


class Doubled(metrics.CrossEntropy):
    """A metric of somebody's own, made from ours."""

    def update(self, logits, target):
        super().update(2 * logits, target)


def test_a_collection_does_not_share_sums_with_a_subclass_that_sums_something_else():
    z, t = batches()[0]
    together = torchmetrics.MetricCollection({"plain": metrics.CrossEntropy(), "mine": Doubled()})
    together.update(0 * z, t)  # both see the same there
    together.update(z, t)
    alone = Doubled()
    alone.update(0 * z, t)
    alone.update(z, t)
    assert together.compute()["mine"] == alone.compute() != together.compute()["plain"]


@pytest.mark.parametrize("wrapper", ["MinMaxMetric", "MetricTracker", "Running"])
def test_inside_torchmetrics_wrappers(make, wrapper):
    wrapped = getattr(torchmetrics.wrappers, wrapper)(make())
    if wrapper == "MetricTracker":
        wrapped.increment()
    for z, t in batches():
        wrapped.update(z, t)
    value = wrapped.compute()
    value = value["raw"] if wrapper == "MinMaxMetric" else value
    torch.testing.assert_close(value, filled(make).compute(), rtol=1e-12, atol=0)
