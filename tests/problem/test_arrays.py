"""Arrays of any library and form hold the same numbers, or are refused by name."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F

import crossent
from crossent.integrations.sklearn import log_loss


def forms():
    """Logits and targets that hold the same numbers in other forms."""
    g = torch.Generator().manual_seed(0)
    z, t = 3 * torch.randn(30, 4, generator=g), torch.randint(0, 4, (30,), generator=g)
    a, n = z.numpy(), t.numpy()
    return (z, t), {
        "logits": {
            "big-endian": a.astype(">f4"),
            "big-endian float64": a.astype(">f8"),
            "DataFrame": pandas.DataFrame(a),
            "nullable": pandas.DataFrame(a).astype("Float32"),
            "objects": a.astype(object),
            "nothing masked": np.ma.masked_array(a, mask=False),
            "backwards": np.flip(np.flip(a, 0).copy(), 0),
            "read-only": np.broadcast_to(a, a.shape),
            "with a gradient": z.clone().requires_grad_(),
        },
        "target": {
            "big-endian": n.astype(">i8"),
            "big-endian int16": n.astype(">i2"),
            "Series": pandas.Series(n),
            "nullable": pandas.Series(n).astype("Int64"),
            "nullable UInt8": pandas.Series(n).astype("UInt8"),
            "objects": n.astype(object),
            "list": n.tolist(),
            "uint16": n.astype(np.uint16),
        },
    }


@pytest.mark.parametrize("what", ["logits", "target"])
def test_the_same_numbers_in_any_form(what):
    (z, t), made = forms()
    expected = F.cross_entropy(z.double(), t).item()
    for name, form in made[what].items():
        given = {"logits": z, "target": t, what: form}
        why = crossent.explain(given["logits"], given["target"])
        assert why.mean == pytest.approx(expected, rel=1e-6), name
        assert len(why.hardest(2)) == 2, name
        loss = log_loss(given["target"], logits=given["logits"])
        assert loss == pytest.approx(expected, rel=1e-6), name
        if what == "logits":
            weight = np.arange(30.0).astype(">f4")
            truth = F.cross_entropy(z.double(), t, reduction="none") @ torch.arange(30.0).double()
            loss = log_loss(t, logits=form, sample_weight=weight, normalize=False)
            assert loss == pytest.approx(truth.item(), rel=1e-6), name


def refused():
    z = torch.randn(6, 4)
    masked = np.ma.masked_array(z.numpy(), mask=np.arange(24).reshape(6, 4) % 3 == 0)
    return {
        "sparse": (z.to_sparse(), r"layout torch.sparse_coo; convert with NAME.to_dense\(\)"),
        "compressed": (z.to_sparse_csr(), r"convert with NAME.to_dense\(\)"),
        "mkldnn": (z.to_mkldnn(), r"convert with NAME.to_dense\(\)"),
        "nested": (
            torch.nested.nested_tensor([z[:2], z[2:]]),
            "nested one; convert with torch.nest",
        ),
        "jagged": (
            torch.nested.nested_tensor([z[:2], z[2:]], layout=torch.jagged),
            "to_padded_tensor",
        ),
        "quantised": (
            torch.quantize_per_tensor(z, 0.1, 0, torch.qint8),
            r"torch.qint8; convert with NAME.dequantize\(\)",
        ),
        "float8": (z.to(torch.float8_e4m3fn), r"float8_e4m3fn; convert with NAME.float\(\)"),
        "float8 of another kind": (z.to(torch.float8_e5m2), r"convert with NAME.float\(\)"),
        "meta": (z.to("meta"), "NAME: expected numbers, got a tensor on the meta device"),
        "masked": (masked, rf"got {masked.mask.sum()} of them; .* NAME.filled"),
        "scipy": (scipy.sparse.csr_matrix(z.numpy()), r"csr_matrix; convert with NAME.toarray\(\)"),
        "extended": (z.numpy().astype(np.longdouble), r"convert with NAME.astype\('float64'\)"),
        "text": (z.numpy().astype(str), "NAME: expected numbers"),
        "words": (np.array([["a", 1.0, 2, 3]] * 6, dtype=object), r"NAME.fillna\(...\)"),
        "complex": (z.to(torch.complex64), "NAME: expected"),
    }


@pytest.mark.filterwarnings("ignore")  # torch's own about layouts that are young or old
def test_what_is_no_plain_array_is_refused_by_name():
    t = torch.tensor([0, 1, 2, 3, 0, 1])
    for form, match in refused().values():
        with pytest.raises((TypeError, ValueError), match=match.replace("NAME", "logits")):
            crossent.explain(form, t)
        for argument in ("logits", "y_proba"):
            with pytest.raises(TypeError, match=match.replace("NAME", argument)):
                log_loss(t, **{argument: form})
    for name in ("sparse", "float8", "masked", "extended", "meta"):
        form, match = refused()[name]
        column = form[:, 0] if name != "sparse" else torch.arange(6).to_sparse()
        if name == "masked":
            match = "NAME.filled"
        with pytest.raises(TypeError, match=match.replace("NAME", "target")):
            crossent.explain(torch.zeros(6, 4), column)
        with pytest.raises(TypeError, match=match.replace("NAME", "sample_weight")):
            log_loss(t, logits=torch.zeros(6, 4), sample_weight=column)


def test_targets_that_are_missing_are_said():
    gaps = pandas.Series([0, None, 1], dtype="Int64")
    with pytest.raises(TypeError, match=r"target: .*one is missing, put 255, which is ignored"):
        crossent.explain(torch.zeros(3, 2), gaps, ignore_index=255)
    for labels in (gaps, ["a", None, "b"], [0.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="y_true: expected labels of one kind"):
            log_loss(labels, logits=torch.zeros(3, 2))
    filled = crossent.explain(torch.zeros(3, 2), gaps.fillna(255), ignore_index=255)
    assert filled.count == 2


def without_figures(why):
    """The page; matplotlib draws names of its own by chance."""
    return re.sub(r"base64,[^\"]*", "", why.to_html())


@pytest.mark.parametrize("shape", [(40, 5), (6, 9, 5)])
def test_a_default_device_changes_nothing(shape):
    z, t = torch.randn(shape), torch.randint(0, 5, shape[:-1])
    t.view(-1)[1] = -100
    views = (z, z.numpy(), np.asfortranarray(z.numpy()))
    expected = crossent.explain(z, t, class_prior=[0.2] * 5)
    loss = log_loss(t.flatten()[2:].clamp(min=0), logits=z.reshape(-1, 5)[2:], labels=range(5))
    try:
        torch.set_default_device("meta")
        for logits in views:
            why = crossent.explain(logits, t.numpy(), class_prior=[0.2] * 5)
            assert why.to_json() == expected.to_json()
            assert why.by_position().equals(expected.by_position())
            assert why.to_dataframe().equals(expected.to_dataframe())
            assert without_figures(why) == without_figures(expected)
            assert str(why) == str(expected)
        y, rows = t.flatten()[2:].clamp(min=0).numpy(), z.reshape(-1, 5)[2:].numpy()
        weight = np.ones(len(y))
        assert log_loss(y, logits=rows, labels=range(5), sample_weight=weight) == loss
        p = np.full((2, 2), 0.5)
        assert log_loss([0, 1], p.tolist()) == pytest.approx(math.log(2))
        assert log_loss([0, 1], logits=[0.0, 0.0]) == pytest.approx(math.log(2))
    finally:
        torch.set_default_device(None)
