"""explain(): numbers are the loss's, and shares sum to one."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import crossent


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(50, 7), (6, 9, 7)])
def test_numbers_are_the_losses(dtype, shape):
    z, t = torch.randn(shape).to(dtype), torch.randint(0, 7, shape[:-1])
    t.view(-1)[3] = -100
    why = crossent.explain(z, t)
    flat, target = z.reshape(-1, 7).double(), t.flatten()
    losses = F.cross_entropy(flat, target, reduction="none")
    kept = target != -100
    torch.testing.assert_close(why.loss.double(), losses, rtol=1e-5, atol=1e-6)
    assert why.mean == pytest.approx(losses[kept].mean().item(), rel=1e-5)
    assert why.sum == pytest.approx(losses.sum().item(), rel=1e-5)
    assert why.bits == pytest.approx(why.mean / math.log(2))
    assert why.perplexity == pytest.approx(math.exp(why.mean))
    assert why.accuracy == pytest.approx((flat.argmax(-1) == target)[kept].double().mean().item())
    p = flat.softmax(-1)
    own = p[torch.arange(len(target)), target.clamp(min=0)]
    rank = (p > own.unsqueeze(-1)).sum(-1) + 1
    assert torch.equal(why.rows.rank[kept], rank[kept])
    assert why.top5 == pytest.approx((rank <= 5)[kept].double().mean().item())
    torch.testing.assert_close(why.rows.probability[kept].double(), own[kept], rtol=1e-5, atol=0)
    top = p.amax(-1)[kept]
    torch.testing.assert_close(why.rows.confidence[kept].double(), top, rtol=1e-5, atol=0)
    best_other = flat.scatter(-1, target.clamp(min=0).unsqueeze(-1), -torch.inf).amax(-1)
    margin = flat[torch.arange(len(target)), target.clamp(min=0)] - best_other
    torch.testing.assert_close(why.rows.margin[kept].double(), margin[kept], rtol=1e-5, atol=1e-6)
    entropy = torch.distributions.Categorical(logits=flat).entropy()
    torch.testing.assert_close(why.rows.entropy[kept].double(), entropy[kept], rtol=1e-5, atol=1e-6)
    frequency = torch.bincount(target[kept], minlength=7) / kept.sum()
    assert why.prior_loss == pytest.approx(-frequency[target[kept]].log().mean().item(), rel=1e-5)


def test_every_decomposition_is_exact(digits):
    why = crossent.explain(*digits)
    for table in (why.by_class(), why.by_pair(), why.by_position()):
        assert table["share"].sum() == pytest.approx(1)
        assert table["count"].sum() == why.count
        assert (table["count"] * table["loss"]).sum() == pytest.approx(why.sum)
    assert list(why.by_class().columns) == ["class", "count", "loss", "share", "accuracy"]
    assert why.by_quantile()["share"].is_monotonic_increasing
    assert why.by_quantile()["share"].iloc[-1] == pytest.approx(1)
    by_class = why.by_class().set_index("class")
    rows = why.to_dataframe()
    for name, group in rows.groupby("target"):
        assert by_class.loc[name, "loss"] == pytest.approx(group["loss"].mean(), rel=1e-5)
        right = (group["target"] == group["predicted"]).mean()
        assert by_class.loc[name, "accuracy"] == pytest.approx(right)


def test_positions_of_sequences():
    z, t = torch.randn(4, 6, 5), torch.randint(0, 5, (4, 6))
    why = crossent.explain(z, t, ids=["a", "b", "c", "d"])
    losses = F.cross_entropy(z.transpose(1, 2), t, reduction="none")
    np.testing.assert_allclose(why.by_position()["loss"], losses.mean(0), rtol=1e-5)
    worst = why.hardest(1).iloc[0]
    assert (worst["sequence"], worst["position"]) == divmod(int(losses.argmax()), 6)
    assert worst["id"] == "abcd"[worst["sequence"]]


def test_hardest_rows_and_names(digits):
    names = [f"digit {i}" for i in range(10)]
    why = crossent.explain(*digits, classes=names)
    table = why.hardest(5)
    order = F.cross_entropy(*digits, reduction="none").argsort(descending=True)[:5]
    assert table["row"].tolist() == order.tolist()
    assert set(table.columns) >= {"row", "loss", "target", "predicted", "probability"}
    first = table.iloc[0]
    assert first["target"] == names[digits[1][order[0]]]
    assert first["competitors"].startswith(first["predicted"])
    assert first["target"] not in first["competitors"]


def test_calibration_error_is_torchmetrics_formula():
    p = torch.tensor([0.9, 0.9, 0.6, 0.6, 0.99])
    z = torch.stack([p.log(), (1 - p).log()], -1)
    why = crossent.explain(z, torch.tensor([0, 1, 0, 0, 0]))
    expected = (2 * abs(0.9 - 0.5) + 2 * abs(0.6 - 1.0) + abs(0.99 - 1)) / 5
    assert why.ece == pytest.approx(expected, abs=1e-6)
    curve = why.reliability()
    assert curve["share"].sum() == pytest.approx(1)


def test_json_is_whole_and_finite(digits):
    z, t = digits[0].clone(), digits[1]
    z[3] = torch.nan
    value = json.loads(crossent.explain(z, t).to_json())
    assert list(value)[:5] == ["mean", "sum", "perplexity", "accuracy", "ece"]
    assert {"by_class", "hardest", "findings"} <= set(value)
    assert value["mean"] is None
    clean = json.loads(crossent.explain(*digits).to_json(top=3))
    assert len(clean["hardest"]) == 3
    assert sum(line["share"] for line in clean["by_class"]) == pytest.approx(1)


def test_shown_everywhere(digits):
    why = crossent.explain(*digits, classes=["<script>[red]"] * 10)
    text, html = str(why), why._repr_html_()
    assert "perplexity" in text
    assert "<script>[red]" in text  # names are no markup
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert len(why.plot().axes) == 3


def test_arrays_are_read_in_blocks(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(sys.modules["crossent.report.row_stats"], "_BLOCK", 300)
    np.save(tmp_path / "z.npy", digits[0].half().numpy())
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    seen = []
    why = crossent.explain(mapped, digits[1].numpy(), progress=seen.append)
    assert why.mean == pytest.approx(crossent.explain(digits[0].half(), digits[1]).mean, rel=1e-6)
    assert len(seen) > 100
    assert seen[-1] == len(digits[1])


def test_what_is_ignored_breaks_no_page():
    z, t = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    t[0, :4] = 255
    z[0, 0], z[0, 1, 0], z[0, 2] = torch.nan, torch.inf, torch.tensor([1000.0, 0, 0, 0])
    z[1, 2] = torch.nan  # valid
    why = crossent.explain(z, t, ignore_index=255, classes=list("abcd"))
    html = why.to_html()
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    tokens = [token for strip in data for token in strip]
    assert [None, None, []] in tokens
    assert ["nan", None, []] in tokens
    assert all(0 <= p <= 1 for _, _, best in tokens for _, p in best)


def test_a_wrong_target_is_named_by_its_place():
    z, t = torch.zeros(3000, 2000), torch.zeros(3000).long()
    t[2500] = 5000
    with pytest.raises(IndexError, match=r"target\[2500\] is 5000 \(row 2500\)"):
        crossent.explain(z, t)
    with pytest.raises(IndexError, match=r"target\[1, 2\] is 9"):
        crossent.explain(torch.zeros(2, 3, 4), torch.tensor([[0, 0, 0], [0, 0, 9]]))


def test_logits_that_are_no_rows_are_read_in_place():
    z, t = torch.randn(5, 9, 6), torch.randint(0, 6, (5, 8))
    same = crossent.explain(z[:, :-1].contiguous(), t)
    for logits in (z[:, :-1], np.asfortranarray(z[:, :-1].numpy())):
        why = crossent.explain(logits, t)
        assert why.source.logits is logits
        assert torch.equal(why.loss, same.loss)
        assert why.hardest(3).equals(same.hardest(3))


def test_classes_of_one_name_are_still_two(digits):
    why = crossent.explain(*digits, classes=["x"] * 10)
    wrong = int((digits[0].argmax(-1) != digits[1]).sum())
    assert why.by_pair(mistakes=True)["count"].sum() == wrong
    assert "by confusion" in str(why)


def test_what_is_not_a_number_is_not_good():
    why = crossent.explain(torch.full((20, 4), torch.nan), torch.zeros(20).long())
    assert math.isnan(why.perplexity)
    assert why.top5 == 0
    assert math.isnan(why.ece)
    assert why.hardest(-1).empty
    with pytest.raises(ValueError, match="class_prior: expected probabilities"):
        crossent.explain(torch.zeros(2, 3), torch.zeros(2).long(), class_prior=[3.0, 3.0, 3.0])
    names = ["\x1b]0;x"] * 3
    assert "\x1b" not in str(crossent.explain(torch.eye(3), torch.arange(3), classes=names))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits: expected shape \(N, V\)"),
        ({"logits": [1, 2]}, ValueError, "got list"),
        ({"logits": torch.zeros(4, 5).long()}, TypeError, "logits: expected floating point"),
        ({"target": torch.zeros(3).long()}, ValueError, r"target: expected shape \(4,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target: expected class indices"),
        ({"target": torch.tensor([0, 1, 2, 5])}, IndexError, "expected a class from 0 to 4"),
        ({"classes": ["a"]}, ValueError, r"classes: expected 5 \(one name a class\), got 1"),
        ({"ids": ["a"]}, ValueError, "ids: expected 4"),
        ({"class_prior": [0.5, 0.5]}, ValueError, "class_prior: expected shape"),
    ],
)
def test_bad_arguments(arguments, error, match):
    given = {"logits": torch.zeros(4, 5), "target": torch.zeros(4).long(), **arguments}
    with pytest.raises(error, match=match):
        crossent.explain(given.pop("logits"), given.pop("target"), **given)
