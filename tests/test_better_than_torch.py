"""Where the loss is deliberately better than torch's: each test shows both."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import crossent
from tests.helpers.slopes import slope

INF, NAN = torch.inf, torch.nan


def test_confident_rows_keep_their_digits(backend):
    x, t = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    truth = math.log1p(math.exp(-20))
    assert F.cross_entropy(x, t) == 0
    assert slope(F.cross_entropy, x, t)[0, 0] == 0
    assert float(crossent.cross_entropy(x, t, backend=backend)) == pytest.approx(truth, rel=1e-6)
    g = slope(crossent.cross_entropy, x, t, backend=backend)
    p = math.exp(-20) / (1 + math.exp(-20))
    assert g[0].tolist() == pytest.approx([-p, p], rel=1e-6)


def test_one_hot_probabilities_keep_their_digits_too(backend):
    x, y = torch.tensor([[20.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert F.cross_entropy(x, y) == 0
    index = crossent.cross_entropy(x, torch.tensor([0]), backend=backend)
    assert crossent.cross_entropy(x, y, backend=backend) == index
    g = slope(crossent.cross_entropy, x, y, backend=backend)
    assert torch.equal(g, slope(crossent.cross_entropy, x, torch.tensor([0]), backend=backend))


def test_bfloat16_loss_can_stay_exact(backend):
    torch.manual_seed(0)
    x, t = (torch.randn(64, 1000) * 2).bfloat16(), torch.randint(0, 1000, (64,))
    truth = F.cross_entropy(x.double(), t)
    ours = crossent.cross_entropy(x, t, return_dtype=torch.float32, backend=backend)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(truth), rel=1e-6)
    assert abs(float(F.cross_entropy(x, t)) - float(truth)) > 1e-3
    assert crossent.cross_entropy(x, t, backend=backend) == ours.bfloat16()  # rounded once


def test_float16_stays_finite(backend):
    x, t = torch.tensor([[65504.0, -65504.0]]).half(), torch.tensor([1])
    assert F.cross_entropy(x, t).isinf()
    ours = crossent.cross_entropy(x, t, return_dtype=torch.float32, backend=backend)
    assert float(ours) == 2 * 65504
    many = torch.zeros(70000, 2).half()
    ones = torch.zeros(70000, dtype=torch.int64)
    assert crossent.cross_entropy(many, ones, backend=backend).isfinite()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_float32_class_weights_with_half_logits(half, backend):
    x, t, w = torch.randn(3, 5).to(half), torch.tensor([0, 1, 4]), torch.rand(5)
    with pytest.raises(RuntimeError):
        F.cross_entropy(x, t, w)
    ours = crossent.cross_entropy(x, t, w, backend=backend)
    assert ours.dtype == half
    torch.testing.assert_close(ours.float(), F.cross_entropy(x.float(), t, w), rtol=1e-2, atol=0)


@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@pytest.mark.parametrize(
    "options",
    [{}, dict(label_smoothing=0.1, z_loss=0.1), dict(softcap=2.0, logit_scale=0.5)],
    ids=["plain", "smoothing", "maps"],
)
def test_ignored_rows_are_not_read(poison, options, backend):
    x, t = torch.randn(3, 5), torch.tensor([0, -100, 2])
    x[1] = poison
    ours = slope(crossent.cross_entropy, x, t, backend=backend, **options)
    assert torch.equal(ours[1], torch.zeros(5))
    kept = slope(crossent.cross_entropy, x[[0, 2]], t[[0, 2]], backend=backend, **options)
    assert torch.equal(ours[[0, 2]], kept)
    if not options:
        assert slope(F.cross_entropy, x, t)[1].isnan().any()


def test_masked_classes_with_zero_target_probability(backend):
    x = torch.tensor([[1.0, -INF, 0.5]])
    y = torch.tensor([[0.25, 0.0, 0.75]])
    assert F.cross_entropy(x, y).isnan()
    expected = F.cross_entropy(x[:, [0, 2]], y[:, [0, 2]])
    torch.testing.assert_close(crossent.cross_entropy(x, y, backend=backend), expected)
    g = slope(crossent.cross_entropy, x, y, backend=backend)
    torch.testing.assert_close(g[:, [0, 2]], slope(F.cross_entropy, x[:, [0, 2]], y[:, [0, 2]]))
    assert g[0, 1] == 0
    y.requires_grad_()
    crossent.cross_entropy(x, y, backend=backend).backward()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("weighted", [False, True])
def test_smoothing_spreads_over_the_classes_left(kind, weighted, backend):
    x = torch.tensor([[1.0, -INF, 0.5, -1.0]])
    left = [0, 2, 3]
    w = torch.tensor([0.5, 3.0, 2.0, 1.0]) if weighted else None
    if kind == "index":
        y, y_left = torch.tensor([2]), torch.tensor([1])
    else:
        y, y_left = torch.tensor([[0.1, 0.0, 0.9, 0.0]]), torch.tensor([[0.1, 0.9, 0.0]])
    assert not F.cross_entropy(x, y, w, label_smoothing=0.1).isfinite()
    ours = crossent.cross_entropy(x, y, w, label_smoothing=0.1, backend=backend)
    expected = F.cross_entropy(x[:, left], y_left, w[left] if weighted else None,
                               label_smoothing=0.1)  # fmt: skip
    torch.testing.assert_close(ours, expected)
    g = slope(crossent.cross_entropy, x, y, w, label_smoothing=0.1, backend=backend)
    assert g.isfinite().all()
    assert g[0, 1] == 0


def test_a_masked_target_still_costs_infinity(backend):
    x = torch.tensor([[1.0, -INF]])
    assert crossent.cross_entropy(x, torch.tensor([1]), backend=backend) == INF
    assert crossent.cross_entropy(x, torch.tensor([[0.5, 0.5]]), backend=backend) == INF
    free = crossent.cross_entropy(
        x, torch.tensor([1]), torch.tensor([1.0, 0.0]), reduction="sum", backend=backend
    )
    assert free == 0


def test_out_of_range_targets_name_their_place(backend):
    x = torch.randn(4, 3)
    with pytest.raises(IndexError) as torchs:
        F.cross_entropy(x, torch.tensor([0, 1, 7, 2]))
    assert "0 to 2" not in str(torchs.value)
    with pytest.raises(IndexError, match=r"target\[2\] is 7 \(row 2\).*from 0 to 2.*-100.*1 of 4"):
        crossent.cross_entropy(x, torch.tensor([0, 1, 7, 2]), backend=backend)
    with pytest.raises(IndexError, match=r"target\[1, 0, 1\] is -5"):
        crossent.cross_entropy(
            torch.randn(2, 3, 2, 2), torch.tensor([[[0, 1]] * 2, [[2, -5]] * 2]), backend=backend
        )
    with pytest.raises(IndexError, match=r"target is 3: expected a class from 0 to 2"):
        crossent.cross_entropy(x[0], torch.tensor(3), backend=backend)


@pytest.mark.parametrize("dtype", "int8 int16 int32 int64 uint8 uint16 uint32 uint64".split())
def test_every_integer_dtype_is_an_index(dtype, backend):
    x, t = torch.randn(3, 5), torch.tensor([0, 1, 4])
    ours = crossent.cross_entropy(x, t.to(getattr(torch, dtype)), backend=backend)
    assert ours == crossent.cross_entropy(x, t, backend=backend)
    if dtype == "int32":
        with pytest.raises(RuntimeError):
            F.cross_entropy(x, t.to(torch.int32))


def test_ignore_index_of_unsigned_targets(backend):
    x, t = torch.randn(3, 5), torch.tensor([0, 255, 4], dtype=torch.uint8)
    ours = crossent.cross_entropy(x, t, ignore_index=255, backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(x[[0, 2]], t[[0, 2]].long()))


def test_double_softmax_warns(backend):
    p, t = torch.softmax(torch.randn(6, 5), 1), torch.randint(0, 5, (6,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(p, t)
        crossent.cross_entropy(p.log(), t, backend=backend)  # log-probabilities are fine logits
        crossent.cross_entropy(torch.rand(6, 5), t, backend=backend)
        crossent.cross_entropy(torch.zeros(6, 5), t, backend=backend)
    with pytest.warns(crossent.DoubleSoftmaxWarning, match="softmax applied twice") as record:
        crossent.cross_entropy(p, t, backend=backend)
    assert record[0].filename == __file__
    for other in (p.bfloat16(), p.half(), p.double(), p[0]):
        with pytest.warns(crossent.DoubleSoftmaxWarning):
            crossent.cross_entropy(other, t[0] if other.dim() == 1 else t, backend=backend)


def test_a_warning_names_the_line_that_caused_it(backend):
    p, t = torch.softmax(torch.randn(6, 5), 1), torch.randint(0, 5, (6,))
    x = torch.randn(4, 5, 5), torch.randint(0, 5, (4, 5))
    module = crossent.CrossEntropyLoss(backend=backend)
    for call in (
        lambda: crossent.cross_entropy(p, t, backend=backend),
        lambda: module(p, t),
        lambda: torch.nn.Sequential(torch.nn.Identity(), module)[1](p, t),
        lambda: module(*x),
    ):
        for device in ("cpu", None):
            torch.set_default_device(device)  # a mode of torch's between the caller and us
            try:
                with pytest.warns(crossent.CrossentWarning) as record:
                    call()
            finally:
                torch.set_default_device(None)
            assert record[0].filename == __file__


def test_double_softmax_warns_once_for_a_line(backend):
    p, t = torch.softmax(torch.randn(6, 5), 1), torch.randint(0, 5, (6,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            crossent.cross_entropy(p, t, backend=backend)
    assert len(seen) == 1


def test_double_softmax_warning_can_be_turned_off(backend, monkeypatch):
    p, t = torch.softmax(torch.randn(6, 5), 1), torch.randint(0, 5, (6,))
    monkeypatch.setattr(crossent, "warn_double_softmax", False)
    crossent.cross_entropy(p, t, backend=backend)  # a warning would be an error here


def test_double_softmax_check_looks_at_few_rows(monkeypatch):
    from crossent.problem import warnings

    looked_at = []
    first_rows = warnings._first_rows

    def watched(x):
        looked_at.append(first_rows(x))
        return looked_at[-1]

    monkeypatch.setattr(warnings, "warn", lambda *_: None)
    monkeypatch.setattr(warnings, "_first_rows", watched)
    x = torch.softmax(torch.randn(50, 7, 11), -1)
    warnings.warn_if_probabilities(x)
    assert looked_at[0].shape == (4, 11)
    assert looked_at[0].data_ptr() == x.data_ptr()  # a view, not a copy of a pass


def test_two_readings_of_a_square_warn(backend):
    x, t = torch.randn(2, 4, 4), torch.randint(0, 4, (2, 4))
    with pytest.warns(crossent.ClassAxisWarning, match="dim=-1"):
        ours = crossent.cross_entropy(x, t, backend=backend)
    assert ours == crossent.cross_entropy(x, t, dim=1, backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(x, t))
    last = crossent.cross_entropy(x, t, dim=-1, backend=backend)
    torch.testing.assert_close(last, F.cross_entropy(x.flatten(0, 1), t.flatten()))


def test_weighted_mean_of_probabilities_divides_by_rows_and_says_so(backend):
    x, t, w = torch.randn(3, 5), torch.tensor([0, 1, 4]), torch.tensor([0.1, 0.2, 1, 2, 3.0])
    y = F.one_hot(t, 5).float()
    by_rows = crossent.cross_entropy(x, y, w, backend=backend)
    torch.testing.assert_close(by_rows, F.cross_entropy(x, y, w))
    assert not torch.allclose(by_rows, F.cross_entropy(x, t, w))
    fixed = crossent.cross_entropy(x, y, w, denominator=w[t].sum(), backend=backend)
    torch.testing.assert_close(fixed, F.cross_entropy(x, t, w))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("classes", [2, 37, 4099, 70001])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_row_does_not_know_its_batch(threads, classes, layout, backend):
    x = torch.randn(5, classes) * 3
    if layout == "columns":
        x = x.t().contiguous().t()
    t = torch.randint(0, classes, (5,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = crossent.cross_entropy(x, t, reduction="none", backend=backend)
        g = slope(crossent.cross_entropy, x, t, reduction="none", backend=backend)
        torch.set_num_threads(threads)
        for k in range(5):
            one = (x[k : k + 1], t[k : k + 1])
            alone = crossent.cross_entropy(*one, reduction="none", backend=backend)
            assert torch.equal(whole[k : k + 1], alone)
            g_alone = slope(crossent.cross_entropy, *one, reduction="none", backend=backend)
            assert torch.equal(g[k : k + 1], g_alone)
    finally:
        torch.set_num_threads(before)


def test_torch_sums_do_depend_on_the_batch(on_threads):
    """Why the sums are taken in blocks: torch's own sum of one long row is split over threads."""
    x = torch.randn(5, 70001)
    ((together, alone),) = on_threads((2,), lambda: (x.sum(-1), [row.sum() for row in x]))
    assert any(a != b for a, b in zip(together, alone, strict=True))


def test_the_mean_does_not_depend_on_threads(backend, on_threads):
    x, t = torch.randn(100_000, 3), torch.randint(0, 3, (100_000,))
    one, two = on_threads((1, 2), lambda: crossent.cross_entropy(x, t, backend=backend))
    assert torch.equal(one, two)
