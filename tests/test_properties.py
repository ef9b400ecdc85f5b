"""Properties that hold for every batch (hypothesis)."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crossent
from tests.helpers.backends import serving
from tests.helpers.slopes import slope

total = functools.partial(crossent.cross_entropy, reduction="sum")

common = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def batches(draw, classes=st.integers(1, 40), rows=st.integers(1, 12), ignored=False):
    """Logits (N, V) and targets (N,), from a drawn seed, scale and offset."""
    n, v = draw(rows), draw(classes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 10.0, 50.0]))
    x = torch.randn(n, v, generator=generator, dtype=torch.float64) * scale
    t = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        t[torch.rand(n, generator=generator) < 0.3] = -100
    return x, t


@common
@given(batches(), st.integers(-1000, 1000))
def test_shift_invariance(backend, batch, offset):
    x, t = batch
    x = (x * 2**10).round() / 2**10  # so that the shifted logits are exact
    a = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    b = crossent.cross_entropy(x + offset, t, reduction="none", backend=backend)
    if backend == "lean":  # it subtracts a number near the maximum, which has its own rounding
        torch.testing.assert_close(a, b, rtol=8 * torch.finfo(x.dtype).eps, atol=0)
    else:
        assert torch.equal(a, b)


@common
@given(batches(ignored=True), st.sampled_from([0.0, 0.1]))
def test_gradient_rows_sum_to_zero(backend, batch, eps):
    x, t = batch
    g = slope(total, x, t, label_smoothing=eps, backend=backend)
    # Smoothed, an entry is a difference p - q of numbers up to 1, and may be much smaller.
    terms = g.abs().amax(1) + (t != -100) * (1 if eps else 0)
    assert (g.sum(1).abs() <= x.shape[1] * 2.0**-52 * terms).all()


def test_the_gradient_of_a_row_that_says_nearly_the_smoothed_target_sums_to_zero(backend):
    """p = (0.053, 0.947) for q = (0.05, 0.95): a bound by the largest entry would be too tight."""
    x = torch.tensor([[-13.1201, -10.2371]], dtype=torch.float64)
    g = slope(total, x, torch.tensor([1]), label_smoothing=0.1, backend=backend)
    p, q = x.softmax(1), torch.tensor([0.05, 0.95], dtype=torch.float64)
    assert g.abs().max() < 4e-3
    assert g.sum().abs() <= 2 * 2.0**-52
    torch.testing.assert_close(g, p - q, rtol=1e-12, atol=0)


@common
@given(batches(ignored=True))
def test_masked_is_sliced(backend, batch):
    x, t = batch
    kept = t != -100
    for reduction in ("sum", "none"):
        a = crossent.cross_entropy(x, t, reduction=reduction, backend=backend)
        b = crossent.cross_entropy(x[kept], t[kept], reduction=reduction, backend=backend)
        torch.testing.assert_close(a[kept] if reduction == "none" else a, b)
    assert torch.equal(
        slope(total, x, t, backend=backend)[kept], slope(total, x[kept], t[kept], backend=backend)
    )


@common
@given(batches(), st.floats(0.0, 1.0))
def test_smoothing_is_a_soft_target(backend, batch, eps):
    x, t = batch
    v = x.shape[1]
    soft = (1 - eps) * F.one_hot(t, v).double() + eps / v
    a = crossent.cross_entropy(x, t, label_smoothing=eps, reduction="none", backend=backend)
    b = crossent.cross_entropy(x, soft, reduction="none", backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@common
@given(batches())
def test_one_hot_probabilities_are_indices(backend, batch):
    x, t = batch
    y = F.one_hot(t, x.shape[1]).double()
    a = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    b = crossent.cross_entropy(x, y, reduction="none", backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        slope(total, x, t, backend=backend), slope(total, x, y, backend=backend), rtol=1e-14, atol=0
    )


@common
@given(batches(classes=st.just(2)))
def test_two_classes_are_binary(backend, batch):
    x, t = batch
    a = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    b = -F.logsigmoid((x[:, 1] - x[:, 0]) * (2 * t - 1))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@common
@given(batches(), st.randoms(use_true_random=False))
def test_classes_have_no_order(backend, batch, random):
    x, t = batch
    order = list(range(x.shape[1]))
    random.shuffle(order)
    order = torch.tensor(order)
    places = order.argsort()
    a = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    b = crossent.cross_entropy(x[:, order], places[t], reduction="none", backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


@common
@given(batches(ignored=True))
def test_a_row_does_not_know_its_batch(backend, batch):
    x, t = batch
    x = x.float()
    whole = crossent.cross_entropy(x, t, reduction="none", backend=backend)
    for k in range(len(t)):
        alone = crossent.cross_entropy(
            x[k : k + 1], t[k : k + 1], reduction="none", backend=backend
        )
        assert torch.equal(whole[k : k + 1], alone)


@common
@given(batches(ignored=True), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_sample_weights_repeat_rows(backend, batch, counts):
    x, t = batch
    counts = torch.tensor(counts[: len(t)])
    a = crossent.cross_entropy(x, t, sample_weight=counts, empty="zero", backend=backend)
    b = crossent.cross_entropy(
        x.repeat_interleave(counts, 0),
        t.repeat_interleave(counts),
        empty="zero",
        backend=backend,
    )
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@common
@given(batches())
def test_sample_weights_are_class_weights(backend, batch):
    x, t = batch
    w = torch.rand(x.shape[1], dtype=torch.float64) + 0.1
    a = crossent.cross_entropy(x, t, w, backend=backend)
    b = crossent.cross_entropy(x, t, sample_weight=w[t], backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@common
@given(batches())
def test_masked_classes_are_absent(backend, batch):
    x, t = batch
    masked = torch.cat([x, torch.full((len(x), 3), -torch.inf, dtype=x.dtype)], 1)
    for eps in (0.0, 0.2):
        options = dict(reduction="none", label_smoothing=eps, backend=backend)
        a = crossent.cross_entropy(x, t, **options)
        b = crossent.cross_entropy(masked, t, **options)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@common
@given(batches())
def test_log_prob_entropy_and_stats_agree_with_the_loss(backend, batch):
    x, t = batch
    loss, stats = crossent.cross_entropy(x, t, reduction="none", return_stats=True, backend=backend)
    assert torch.equal(crossent.log_prob(x, t, backend=backend), -loss)
    assert torch.equal(stats.target_log_prob, -loss)
    torch.testing.assert_close(
        crossent.entropy(x, backend=serving(backend)), stats.entropy, rtol=1e-14, atol=0
    )
    assert (loss >= 0).all()
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= math.log(x.shape[1]) * (1 + 1e-12) + 1e-15).all()
