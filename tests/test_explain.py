"""explain(): numbers are the loss's, shares sum to one, suspects are found and not invented."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import crossent
from crossent.cli import main
from crossent.metrics import log_loss


@pytest.fixture(scope="module")
def digits():
    """Out-of-sample logits of a linear model on the digits, and the true labels."""
    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(C=0.05, max_iter=300)
    scores = cross_val_predict(model, x / 16, y, cv=4, method="decision_function")
    return torch.tensor(scores).float(), torch.tensor(y)


def kinds(why):
    return {suspect.kind for suspect in why.suspects}


def found(why, kind):
    return next(suspect for suspect in why.suspects if suspect.kind == kind)


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
    assert {"by_class", "hardest", "suspects"} <= set(value)
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
    monkeypatch.setattr(sys.modules["crossent.report.measure"], "_BLOCK", 300)
    np.save(tmp_path / "z.npy", digits[0].half().numpy())
    mapped = np.load(tmp_path / "z.npy", mmap_mode="r")
    seen = []
    why = crossent.explain(mapped, digits[1].numpy(), progress=seen.append)
    assert why.mean == pytest.approx(crossent.explain(digits[0].half(), digits[1]).mean, rel=1e-6)
    assert len(seen) > 100
    assert seen[-1] == len(digits[1])


def test_clean_data_raises_no_alarm(digits):
    why = crossent.explain(*digits)
    assert kinds(why) <= {"wrong labels"}
    if "wrong labels" in kinds(why):  # a linear model does put some clear digits elsewhere
        assert len(found(why, "wrong labels").rows) < 0.03 * why.count
    little = crossent.explain(0.1 * torch.randn(50000, 10), torch.randint(0, 10, (50000,)))
    assert "worse than chance" not in kinds(little)  # only just: it knows nothing, and says so
    sequence = torch.randn(20, 16, 30)
    t = sequence.argmax(-1)
    assert kinds(crossent.explain(3 * sequence, t)) == set()


def test_what_is_ignored_breaks_no_page():
    z, t = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    t[0, :4] = 255
    z[0, 0], z[0, 1, 0], z[0, 2] = torch.nan, torch.inf, torch.tensor([1000.0, 0, 0, 0])
    z[1, 2] = torch.nan  # counted
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


@pytest.mark.filterwarnings("error")
def test_double_softmax_of_sequences_is_said_once():
    z = torch.randn(3, 6, 5).softmax(-1)
    assert "double softmax" in kinds(crossent.explain(z, torch.zeros(3, 6).long()))


def test_tables_as_pandas_writes_them(tmp_path, digits):
    z, t = digits[0][:50], digits[1][:50]
    expected = F.cross_entropy(z, t).item()
    frame = pandas.DataFrame(z.numpy())
    frame.to_csv(tmp_path / "plain.csv", index=False)
    frame.to_csv(tmp_path / "index.csv")
    frame.to_csv(tmp_path / "bare.csv", index=False, header=False, encoding="utf-8-sig")
    frame.assign(target=t.numpy()).to_csv(tmp_path / "both.csv", index=False)
    np.save(tmp_path / "t.npy", t.numpy())
    np.savetxt(tmp_path / "t.csv", t.numpy(), fmt="%d")
    for names in ("plain.csv t.npy", "index.csv t.npy", "bare.csv t.csv", "both.csv both.csv"):
        done = command(*(tmp_path / name for name in names.split()), "--json", "-")
        assert done.exit_code == 0, (names, done.output)
        assert json.loads(done.stdout)["mean"] == pytest.approx(expected, rel=1e-5), names
        assert json.loads(done.stdout)["classes"] == 10


def test_tables_of_nullable_numbers(tmp_path, digits):
    z, t = digits[0][:50], digits[1][:50]
    frame = pandas.DataFrame(z.numpy(), columns=list("abcdefghij")).astype("Float32")
    frame.to_parquet(tmp_path / "z.parquet")
    pandas.DataFrame({"target": t.numpy()}).astype("Int64").to_parquet(tmp_path / "t.parquet")
    done = command(tmp_path / "z.parquet", tmp_path / "t.parquet", "--json", "-")
    assert done.exit_code == 0, done.output
    expected = F.cross_entropy(z, t).item()
    assert json.loads(done.stdout)["mean"] == pytest.approx(expected, rel=1e-5)


def test_broken_archives_are_bad_input(tmp_path):
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    for name in ("empty.npz", "cut.npz", "none.npz"):
        done = command(tmp_path / name)
        assert done.exit_code == 2, done.output
        assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "names.txt").write_text("\ufeffa\x85b\nc\nd\n", encoding="utf-8")
    np.save(tmp_path / "z.npy", np.eye(3))
    np.save(tmp_path / "t.npy", np.arange(3))
    done = command(tmp_path / "z.npy", tmp_path / "t.npy", "--classes", tmp_path / "names.txt")
    assert done.exit_code == 0, done.output


def test_double_softmax(digits):
    why = crossent.explain(digits[0].softmax(-1), digits[1])
    assert "double softmax" in kinds(why)
    assert "1.461" in found(why, "double softmax").advice
    assert "log-probabilities" in kinds(crossent.explain(digits[0].log_softmax(-1), digits[1]))
    assert "log-probabilities" not in kinds(why)


def test_wrong_labels(digits):
    z, t = digits
    flipped = torch.randperm(len(t), generator=torch.Generator().manual_seed(1))[:90]
    wrong = t.clone()
    wrong[flipped] = (wrong[flipped] + 1 + torch.arange(90) % 9) % 10
    places = set(found(crossent.explain(z, wrong), "wrong labels").rows)
    hit = len(places & set(flipped.tolist()))
    assert hit / 90 > 0.85
    assert hit / len(places) > 0.7


def test_contradicting_duplicates(digits):
    z, t = digits[0].clone(), digits[1].clone()
    z[7], z[900] = z[3], z[3]
    t[3], t[7], t[900] = 1, 2, 1
    z[50], t[50] = z[49], t[49]  # a duplicate that agrees
    assert found(crossent.explain(z, t), "contradicting duplicates").rows == [3, 7, 900]


def test_rows_that_are_not_finite(digits):
    z = digits[0].clone()
    z[4, 2], z[9, digits[1][9]] = torch.nan, -torch.inf
    assert found(crossent.explain(z, digits[1]), "not finite").rows == [4, 9]


def test_worse_than_chance_and_dead(digits):
    assert "worse than chance" in kinds(crossent.explain(-digits[0], digits[1]))
    dead = crossent.explain(torch.zeros(40, 10), torch.arange(40) % 10)
    assert "dead model" in kinds(dead)
    assert "contradicting duplicates" not in kinds(dead)
    assert "worse than chance" not in kinds(dead)


def test_shifted_labels():
    ids = torch.randint(0, 12, (8, 20))
    z = 4 * F.one_hot(ids, 12).float() + torch.randn(8, 20, 12)
    assert kinds(crossent.explain(z, ids)) == set()
    later = torch.roll(ids, 1, 1)  # position i holds what the logits said at i - 1
    assert "next position" in found(crossent.explain(z, later), "shifted labels").evidence
    earlier = torch.roll(ids, -1, 1)
    assert "previous position" in found(crossent.explain(z, earlier), "shifted labels").evidence


def test_overconfidence_and_its_temperature(digits):
    z, t = digits
    noisy = t.clone()
    noisy[::5] = (noisy[::5] + 1) % 10
    why = found(crossent.explain(8 * z, noisy), "overconfident")
    assert "temperature" in why.advice
    before, after = (float(v) for v in why.advice.rsplit("from ", 1)[1].split(" to "))
    assert after < before
    assert "overconfident" not in kinds(crossent.explain(z, t))


def test_silent_classes_and_ignored_rows(digits):
    z, t = digits[0].clone(), digits[1].clone()
    z[:, 3] = -50
    assert "3" in found(crossent.explain(z, t), "classes never predicted").evidence
    t[t == 5] = 6
    assert "1 of 10" in found(crossent.explain(digits[0], t), "classes never present").evidence
    t[:1200] = -100
    assert "66.8%" in found(crossent.explain(digits[0], t), "mostly ignored").evidence
    t[:] = -100
    nothing = crossent.explain(digits[0], t)
    assert kinds(nothing) == {"nothing counted"}
    assert math.isnan(nothing.mean)
    assert json.loads(nothing.to_json())["mean"] is None
    assert "nothing counted" in str(nothing)


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


@pytest.fixture
def files(tmp_path, digits):
    z, t = digits[0][:200], digits[1][:200]
    np.save(tmp_path / "z.npy", z.numpy())
    np.save(tmp_path / "t.npy", t.numpy())
    np.savez(tmp_path / "both.npz", logits=z.numpy(), labels=t.numpy())
    np.savetxt(tmp_path / "z.csv", z.numpy(), delimiter=",")
    (tmp_path / "t.csv").write_text("target\n" + "\n".join(map(str, t.tolist())))
    torch.save(z, tmp_path / "z.pt")
    torch.save({"logits": z, "target": t}, tmp_path / "both.pt")
    save_file({"logits": z, "labels": t}, tmp_path / "both.safetensors")
    frame = pandas.DataFrame(z.numpy(), columns=[f"digit {i}" for i in range(10)])
    frame.to_parquet(tmp_path / "z.parquet")
    pandas.DataFrame({"id": range(200), "target": t.numpy()}).to_parquet(tmp_path / "t.parquet")
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    return tmp_path


def command(*arguments):
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


@pytest.mark.parametrize(
    "names",
    [
        ("z.npy", "t.npy"),
        ("both.npz",),
        ("z.csv", "t.csv"),
        ("z.pt", "t.npy"),
        ("both.pt", "both.pt"),
        ("both.safetensors", "both.safetensors"),
        ("z.parquet", "t.parquet"),
    ],
)
def test_command_line(files, names, digits):
    paths = [files / name for name in names]
    done = command(*paths, "--json", "-")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    expected = F.cross_entropy(digits[0][:200], digits[1][:200]).item()
    assert value["mean"] == pytest.approx(expected, rel=1e-5)
    shown = command(*paths, "--classes", files / "names.txt", "--top", 2)
    assert "digit" in shown.stdout
    assert "by class (2 of 10)" in shown.stdout


def test_command_line_bad_input(files):
    (files / "broken.npy").write_bytes(b"nonsense")
    np.save(files / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save(object, files / "pickled.pt")
    np.savez(files / "other.npz", a=np.zeros(2), b=np.zeros(2))
    (files / "z.txt").write_text("1")
    (files / "one.txt").write_text("one")
    t = files / "t.npy"
    for arguments, match in (
        ((files / "none.npy", t), "none.npy: no such file"),
        ((files / "z.npy",), "expected a second file"),
        ((files / "broken.npy", t), "broken.npy: cannot be read as .npy"),
        ((files / "pickled.npy", t), "never loaded"),
        ((files / "pickled.pt", t), "never loaded"),
        ((files / "other.npz", t), "expected an array named logits"),
        ((files / "z.txt", t), "expected one of .csv"),
        ((files / "t.npy", files / "z.npy"), "logits: expected shape"),
        ((files / "z.npy", files / "z.npy"), "target: expected class indices"),
        ((files / "z.npy", t, "--classes", files / "one.txt"), "classes: expected 10"),
    ):
        done = command(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert match in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_files_larger_than_the_memory_allowed(tmp_path):
    """900 MB of float16 logits within 1.5 GB of resident memory."""
    rows, classes = 7000, 64000
    mapped = np.lib.format.open_memmap(
        tmp_path / "z.npy", mode="w+", dtype=np.float16, shape=(rows, classes)
    )
    block = np.random.default_rng(0).normal(size=(100, classes)).astype(np.float16)
    for begin in range(0, rows, 100):
        mapped[begin : begin + 100] = block
    mapped.flush()
    del mapped
    np.save(tmp_path / "t.npy", np.arange(rows))
    code = (
        "import resource, sys\nfrom crossent.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print('KIB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "explain", tmp_path / "z.npy", tmp_path / "t.npy"],
        capture_output=True,
        text=True,
        check=True,
    )
    resident = int(done.stdout.rsplit("KIB", 1)[1])
    assert resident < 1.5 * 2**20
    assert "perplexity" in done.stdout
