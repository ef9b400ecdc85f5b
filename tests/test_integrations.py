"""fastai, torchmetrics, Lightning, scikit-learn: the real libraries, with our loss in them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

import crossent
import crossent.metrics

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def fastai():
    pytest.importorskip("fastai.tabular.all")
    import fastai.tabular.all as library

    return library


@pytest.fixture(scope="module")
def ours(fastai):
    from crossent.integrations import fastai as module

    return module


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 5), -1), ((2, 4, 5), -1), ((2, 5, 3, 4), 1)], ids=str
)
@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
def test_flat_losses_are_fastais(fastai, ours, name, shape, axis, reduction):
    from fastai import losses

    z = torch.randn(shape)
    t = torch.randint(0, 5, [n for i, n in enumerate(shape) if i != axis % len(shape)])
    mine = getattr(ours, name)(axis=axis, reduction=reduction)
    its = getattr(losses, name)(axis=axis, reduction=reduction)
    torch.testing.assert_close(mine(z, t), its(z, t).as_subclass(torch.Tensor))
    if axis == -1:
        torch.testing.assert_close(mine.activation(z), its.activation(z))
        assert torch.equal(mine.decodes(z), its.decodes(z))
    assert mine.y_int
    column = t.reshape(*t.shape, 1) if axis == -1 and len(shape) == 2 else t
    torch.testing.assert_close(mine(fastai.TensorBase(z), fastai.TensorBase(column)), mine(z, t))


def test_attributes_are_the_losses(ours):
    loss = ours.CrossEntropyLossFlat(weight=torch.ones(3), ignore_index=2)
    assert loss.ignore_index == 2
    loss.reduction = "none"
    assert loss.func.reduction == "none"
    assert loss(torch.zeros(2, 3), torch.tensor([0, 2])).tolist() == pytest.approx(
        [1.0986, 0], 1e-4
    )
    assert ours.LabelSmoothingCrossEntropyFlat(eps=0.3).eps == 0.3
    assert "ignore_index=2" in repr(loss)
    with pytest.raises(AttributeError):
        loss.nothing  # noqa: B018
    with pytest.raises(TypeError, match="z_los"):
        ours.CrossEntropyLossFlat(z_los=1.0)


def learner(fastai, loss, **more):
    data = load_wine(as_frame=True)
    frame = data.data.assign(kind=[data.target_names[i] for i in data.target])
    fastai.set_seed(0)
    loaders = fastai.TabularDataLoaders.from_df(
        frame,
        y_names="kind",
        cont_names=list(data.data.columns),
        procs=[fastai.Normalize],
        y_block=fastai.CategoryBlock(),
        valid_idx=list(range(0, len(frame), 4)),
        bs=32,
        num_workers=0,
    )
    fastai.set_seed(0)
    return fastai.tabular_learner(loaders, layers=[16], loss_func=loss, **more)


def fit(learn, epochs=3):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2)
    return learn


def test_a_learner_trains_as_with_fastais_loss(fastai, ours, tmp_path):
    from fastai import losses

    mine = fit(learner(fastai, ours.CrossEntropyLossFlat()))
    its = fit(learner(fastai, losses.CrossEntropyLossFlat()))
    np.testing.assert_allclose(mine.recorder.values, its.recorder.values, rtol=1e-4)
    with mine.no_bar():
        p, t, rows = mine.get_preds(with_loss=True)
        decoded = mine.get_preds(with_decoded=True)[2]
    torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))
    torch.testing.assert_close(
        rows, F.nll_loss(p.log(), t.flatten().long(), reduction="none"), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(decoded, p.argmax(-1))
    assert mine.loss_func.reduction == "mean"
    mine.export(tmp_path / "learner.pkl")
    again = fastai.load_learner(tmp_path / "learner.pkl")
    row = load_wine(as_frame=True).data.iloc[0]
    assert again.loss_func.y_int
    torch.testing.assert_close(again.predict(row)[2], mine.predict(row)[2])
    from fastai.interpret import Interpretation

    with mine.no_bar():
        worst = Interpretation.from_learner(mine).top_losses(3)[0]
    torch.testing.assert_close(worst, rows.sort(descending=True).values[:3])


def test_mixup(fastai, ours):
    from fastai.callback.mixup import MixUp

    x, y = (torch.tensor(values) for values in load_digits(return_X_y=True))
    rows = list(zip(x.float() / 16, y, strict=True))
    loaders = fastai.DataLoaders.from_dsets(rows[:1500], rows[1500:], bs=64, num_workers=0)
    loss = ours.LabelSmoothingCrossEntropyFlat()
    learn = fit(fastai.Learner(loaders, torch.nn.Linear(64, 10), loss_func=loss, cbs=MixUp(0.4)))
    assert learn.recorder.values[-1][1] < 2.3
    assert learn.loss_func.reduction == "mean"


def test_diagnostics(fastai, ours):
    callback = ours.CrossEntropyDiagnostics()
    learn = learner(fastai, ours.CrossEntropyLossFlat(), metrics=fastai.accuracy, cbs=callback)
    with pytest.raises(RuntimeError, match="expected a fitted learner"):
        callback.explain()
    fit(learn)
    assert list(learn.recorder.metric_names)[-3:-1] == ["calibration_error", "hardest_10%"]
    why = learn.explain()
    _, loss, accuracy, ece, tenth = learn.recorder.values[-1]
    assert why.mean == pytest.approx(loss, rel=1e-5)
    assert why.accuracy == pytest.approx(accuracy)
    assert why.ece == pytest.approx(ece)
    assert 0.1 <= tenth <= 1
    assert set(why.by_class()["class"]) == {"class_0", "class_1", "class_2"}
    assert len(learn.metrics) == 1


def batches(n=6):
    g = torch.Generator().manual_seed(0)
    for i in range(n):
        z, t = (
            3 * torch.randn(2 + i, 4, 7, generator=g),
            torch.randint(0, 7, (2 + i, 4), generator=g),
        )
        t[0, : i % 4] = -100
        yield z, t


def test_metrics_add_up_whatever_the_batches():
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    made = [CrossEntropy(), Perplexity(), CalibrationError(), CrossEntropy(torch.arange(1.0, 8))]
    for z, t in batches():
        for metric in made:
            metric.update(z, t)
    z, t = (torch.cat([x.flatten(0, 1) for x in part]) for part in zip(*batches(), strict=True))
    why = crossent.explain(z, t)
    assert made[0].compute().item() == pytest.approx(why.mean, rel=1e-6)
    assert made[1].compute().item() == pytest.approx(why.perplexity, rel=1e-6)
    assert made[2].compute().item() == pytest.approx(why.ece, rel=1e-6)
    weighted = F.cross_entropy(z.double(), t, torch.arange(1.0, 8).double()).item()
    assert made[3].compute().item() == pytest.approx(weighted, rel=1e-6)
    made[0].reset()
    assert made[0].compute().isnan()
    with pytest.raises(ValueError, match="bins"):
        CalibrationError(bins=0)


PROCESS = """
import os, sys
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2], GLOO_SOCKET_IFNAME="lo")
import torch, torch.distributed as dist
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)
from crossent.integrations.torchmetrics import CrossEntropy
metric = CrossEntropy()
g = torch.Generator().manual_seed(0)
z, t = torch.randn(10, 5, generator=g), torch.randint(0, 5, (10,), generator=g)
part = slice(0, 3) if rank == 0 else slice(3, 10)
metric.update(z[part], t[part])
print(metric.compute().item(), torch.nn.functional.cross_entropy(z.double(), t).item())
dist.destroy_process_group()
"""


def test_metrics_add_up_over_processes():
    pytest.importorskip("torchmetrics")
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    run = [sys.executable, "-W", "ignore", "-c", PROCESS]
    both = [
        subprocess.Popen([*run, str(rank), port], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in both:
        out = process.communicate(timeout=120)[0]
        mine, truth = (float(v) for v in out.split())
        assert mine == pytest.approx(truth, rel=1e-6)


def test_lightning_accumulates_exactly():
    pytest.importorskip("lightning")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "lightning_accumulation.py")],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(lines) == 4
    for line in lines:
        assert float(line[2]) == pytest.approx(float(line[6]), abs=2e-6)


def test_a_patched_step_takes_less_memory():
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / "huggingface_memory.py"), "--steps", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert float(lines["patched"][2]) == pytest.approx(float(lines["plain"][2]), rel=1e-5)
    plain, patched = (int(lines[name][4]) for name in ("plain", "patched"))
    assert patched < plain / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_loss_is_scikit_learns(dtype):
    g = np.random.default_rng(0)
    p = g.dirichlet([0.3] * 4, 50).astype(dtype)
    p[0] = [1, 0, 0, 0]
    y = np.array(["a", "b", "c", "d"])[g.integers(0, 4, 50)]
    y[0] = "d"  # a probability of 0 is clipped, as there
    w = g.random(50)
    for more in ({}, {"normalize": False}, {"sample_weight": w}):
        theirs = sklearn.metrics.log_loss(y, p, **more)
        assert crossent.metrics.log_loss(y, p, **more) == pytest.approx(theirs, rel=1e-5)
    labels = ["a", "b", "c", "d"]
    few = y == "a"
    theirs = sklearn.metrics.log_loss(y[few], p[few], labels=labels)
    assert crossent.metrics.log_loss(y[few], p[few], labels=labels) == pytest.approx(
        theirs, rel=1e-5
    )
    binary, q = g.integers(0, 2, 50), g.random(50).astype(dtype)
    theirs = sklearn.metrics.log_loss(binary, q)
    assert crossent.metrics.log_loss(binary, q) == pytest.approx(theirs, rel=1e-5)
    assert crossent.metrics.log_loss(binary, logits=np.log(q / (1 - q))) == pytest.approx(
        theirs, 1e-4
    )


def test_log_loss_of_any_array():
    z = torch.randn(9, 3, dtype=torch.float64)
    y = torch.arange(9) % 3
    truth = F.cross_entropy(z, y).item()

    class Foreign:
        __dlpack__, __dlpack_device__ = z.__dlpack__, z.__dlpack_device__

    for logits in (z, z.numpy(), z.tolist(), pandas.DataFrame(z.numpy()), Foreign()):
        for labels in (y, y.numpy(), y.tolist(), pandas.Series(y.numpy())):
            assert crossent.metrics.log_loss(labels, logits=logits) == pytest.approx(
                truth, rel=1e-12
            )


def test_scorer():
    x, y = load_breast_cancer(return_X_y=True)
    model = LogisticRegression(max_iter=50)
    ours = cross_val_score(model, x, y, scoring=crossent.metrics.neg_log_loss, cv=3)
    theirs = cross_val_score(model, x, y, scoring="neg_log_loss", cv=3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([0, 1],), TypeError, "one of y_proba and logits"),
        (([0, 1], [[0.5, 0.5]]), ValueError, r"y_true: expected shape \(1,\)"),
        (([0, 0], [[0.5, 0.5], [0.5, 0.5]]), ValueError, "say labels="),
        (([0, 1], torch.zeros(2, 2, 2)), ValueError, r"y_proba: expected shape \(N, V\)"),
    ],
)
def test_bad_log_loss(arguments, error, match):
    with pytest.raises(error, match=match):
        crossent.metrics.log_loss(*arguments)
    with pytest.raises(ValueError, match="expected one of labels, got"):
        crossent.metrics.log_loss(["a", "z"], [[0.5, 0.5]] * 2, labels=["a", "b"])
