"""fastai, torchmetrics, Lightning, scikit-learn: the real libraries, with our loss in them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
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


@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((2, 5, 3, 4, 6), 1), ((2, 5, 4, 4, 4), 1), ((2, 3, 5, 4, 6, 2), 2), ((5, 3, 4, 2), 0)],
    ids=str,
)
def test_volumes_are_torchs(ours, name, shape, axis):
    z, axes = torch.randn(shape), [n for i, n in enumerate(shape) if i != axis]
    t = torch.randint(0, 5, axes)
    loss = getattr(ours, name)(axis=axis)
    eps = loss.label_smoothing
    rows = F.cross_entropy(
        z.movedim(axis, -1).reshape(-1, 5), t.flatten(), reduction="none", label_smoothing=eps
    )
    torch.testing.assert_close(loss(z, t), rows.mean())
    torch.testing.assert_close(loss(z, t.unsqueeze(axis)), rows.mean())  # as masks are stored
    probabilities = F.one_hot(t, 5).movedim(-1, axis).float()
    torch.testing.assert_close(loss(z, probabilities), rows.mean())
    loss.reduction = "none"
    torch.testing.assert_close(loss(z, t), rows)
    perfect = 20 * probabilities
    assert torch.equal(loss.decodes(perfect), t)
    torch.testing.assert_close(loss.activation(z), z.softmax(axis))
    if not eps:
        assert loss(perfect, t).max() < 1e-6


def test_images_with_probabilities_or_columns_of_targets(ours):
    z, t = torch.randn(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4))
    loss = ours.CrossEntropyLossFlat(axis=1, reduction="none")
    probabilities = F.one_hot(t, 5).movedim(-1, 1).float()
    torch.testing.assert_close(loss(z, probabilities), loss(z, t))
    assert torch.equal(loss(z, t.unsqueeze(1)), loss(z, t))


@pytest.mark.parametrize("name", ["CrossEntropyLossFlat", "LabelSmoothingCrossEntropyFlat"])
def test_class_weights_are_taken_to_the_predictions(ours, name):
    weight, z, t = torch.arange(1.0, 6), torch.randn(4, 5), torch.tensor([0, 1, 4, 4])
    loss = getattr(ours, name)(weight=weight)
    here = loss(z, t)
    assert loss(z.to("meta"), t.to("meta")).device.type == "meta"
    assert loss.weight is weight
    assert weight.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(loss(z, t), here)
    loss.weight = weight.to("meta")  # as if the predictions were on another device than the weights
    with pytest.raises(
        NotImplementedError
    ):  # taken to them; a meta tensor only has nothing to take
        loss(z, t)


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


class Stop(Exception):
    """Something went wrong in a fit."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, "CancelFitException"])
@pytest.mark.parametrize("training", [True, False])
def test_an_error_in_fit_leaves_the_metrics(fastai, ours, error, training):
    error = getattr(fastai, error) if isinstance(error, str) else error

    class Fails(fastai.Callback):
        def after_pred(self):
            if self.epoch == 1 and self.learn.training == training:
                raise error("enough")

    diagnostics = ours.CrossEntropyDiagnostics()
    learn = learner(fastai, ours.CrossEntropyLossFlat(), metrics=fastai.accuracy, cbs=diagnostics)
    before = learn.metrics
    for _ in range(2):
        try:
            with learn.no_bar(), learn.no_logging():
                learn.fit(2, 1e-2, cbs=Fails())
        except (Stop, KeyboardInterrupt):
            pass
        assert learn.metrics is before
        assert len(learn.metrics) == 1
    fit(learn)
    assert list(learn.recorder.metric_names).count("hardest_10%") == 1
    assert len(learn.recorder.values[-1]) == len(learn.recorder.metric_names) - 2  # epoch, time
    assert learn.explain().count == 45


def test_only_validation_rows_are_explained(fastai, ours):
    learn = learner(fastai, ours.CrossEntropyLossFlat(), cbs=ours.CrossEntropyDiagnostics())
    why = fit(learn).explain()
    with learn.no_bar():
        learn.get_preds(dl=learn.dls.train)
        learn.validate(ds_idx=0)
        learn.get_preds(ds_idx=1, inner=True)
        learn.predict(load_wine(as_frame=True).data.iloc[0])
    assert learn.explain() is why
    assert why.count == 45
    with learn.no_bar():
        loss, ece, tenth = learn.validate()
    assert learn.explain().mean == pytest.approx(loss, rel=1e-5)
    assert ece == pytest.approx(why.ece)
    assert tenth == pytest.approx(why.by_quantile().set_index("hardest").loc[0.1, "share"])


def test_trackers_see_the_columns(fastai, ours):
    seen = fastai.TrackerCallback(monitor="calibration_error")
    learn = learner(fastai, ours.CrossEntropyLossFlat(), cbs=ours.CrossEntropyDiagnostics())
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-2, cbs=seen)
    assert seen.best == min(values[2] for values in learn.recorder.values)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("CrossEntropyLossFlat", {"weight": torch.tensor([1.0, 5.0, 2.0])}, "with class weights"),
        ("CrossEntropyLossFlat", {"label_smoothing": 0.2}, "with label smoothing"),
        ("LabelSmoothingCrossEntropyFlat", {}, "with label smoothing"),
        ("CrossEntropyLossFlat", {"z_loss": 0.1, "logit_scale": 0.5}, "z_loss, logit_scale"),
        ("CrossEntropyLossFlat", {}, ""),
    ],
)
def test_a_loss_that_is_more_than_the_plain_one_is_said(fastai, ours, name, options, said):
    from fastai import losses

    for library in (ours, losses):
        if library is losses and options and "weight" not in options:
            continue
        loss = getattr(library, name)(**options)
        why = fit(learner(fastai, loss, cbs=ours.CrossEntropyDiagnostics()), 1).explain()
        assert said in why.note
        assert bool(why.note) == bool(said)
        for text in (str(why), why.to_html(), why.to_json()):
            assert ("plain cross-entropy of each row" in text) == bool(said)


def test_any_other_loss_is_said_by_its_number(fastai, ours):
    from fastai.losses import FocalLossFlat

    learn = learner(fastai, FocalLossFlat(gamma=2.0), cbs=ours.CrossEntropyDiagnostics())
    note = fit(learn).explain().note
    assert f"valid_loss ({learn.recorder.values[-1][1]:.4f}) is FocalLossFlat" in note


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


def casts():
    from torch import bfloat16, float16

    return {
        "to": lambda m: m.to(bfloat16),
        "to float16": lambda m: m.to("cpu", float16),
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "float": lambda m: m.float(),
        "type": lambda m: m.type(float16),
        "set_dtype": lambda m: [metric.set_dtype(bfloat16) for metric in m],
        "share": lambda m: m.share_memory(),
    }


@pytest.mark.parametrize("cast", casts())
def test_sums_stay_exact_whatever_the_module_is_cast_to(cast):
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    weight = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    made = torch.nn.ModuleList([CrossEntropy(), CrossEntropy(weight), Perplexity()])
    made.append(CalibrationError())
    plain = [type(m)() for m in made]
    plain[1] = CrossEntropy(weight.clone())
    for z, t in batches():
        for metric, other in zip(made, plain, strict=True):
            metric.update(z, t)
            other.update(z, t)
        casts()[cast](made)
        assert [m.compute().item() for m in made] == [m.compute().item() for m in plain]
    for metric in made:
        state = next(iter(metric._defaults))
        metric.reset()
        assert getattr(metric, state).dtype == torch.float64
        assert metric.dtype == metric.compute().dtype == torch.float64
    assert torch.equal(made[1].weight, weight)


def test_metrics_in_a_bfloat16_module_of_lightning():
    lightning = pytest.importorskip("lightning")
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CrossEntropy

    rows = torch.utils.data.TensorDataset(torch.randn(640, 8), torch.randint(0, 300, (640,)))

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head, self.metric, self.seen = torch.nn.Linear(8, 300), CrossEntropy(), []

        def test_step(self, batch, *_):
            z = self.head(batch[0])
            self.seen.append((z.detach(), batch[1]))
            self.metric.update(z, batch[1])
            self.log("loss", self.metric)

        def on_test_epoch_end(self):
            self.value = self.metric.compute().item()

    model = Model()
    trainer = lightning.Trainer(
        precision="bf16-true", accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.test(model, torch.utils.data.DataLoader(rows, 16), verbose=False)
    z, t = (torch.cat(part) for part in zip(*model.seen, strict=True))
    assert z.dtype == torch.bfloat16
    truth = F.cross_entropy(z.double(), t).item()
    assert model.value == pytest.approx(truth, rel=1e-6)


def test_a_metric_made_without_storage_starts_at_nothing():
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy

    z, t = next(batches())
    for kind in (CrossEntropy, CalibrationError):
        with torch.device("meta"):
            module = torch.nn.ModuleList([kind()])
        made, plain = module.to_empty(device="cpu")[0], kind()
        for _ in range(2):
            made.update(z, t)
            plain.update(z, t)
            assert made.compute() == plain.compute()
            made.reset()
            plain.reset()
    with torch.device("meta"), pytest.raises(TypeError, match="weight: expected numbers"):
        CrossEntropy(torch.ones(7))


def test_a_collection_shares_sums_of_equal_options_only():
    torchmetrics = pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError, CrossEntropy, Perplexity

    def made():
        return {
            "plain": CrossEntropy(),
            "perplexity": Perplexity(),
            "smoothed": CrossEntropy(options={"label_smoothing": 0.1}),
            "ignoring": CrossEntropy(options={"ignore_index": 3}),
            "warmer": CrossEntropy(options={"logit_scale": 0.5}),
            "weighted": CrossEntropy(torch.ones(7)),
            "heavier": CrossEntropy(torch.arange(1.0, 8)),
            "error": CalibrationError(),
            "error ignoring": CalibrationError(ignore_index=3),
            "finer": CalibrationError(bins=30),
        }

    together, alone = torchmetrics.MetricCollection(made()), made()
    flat = (torch.zeros(3, 7), torch.zeros(3, dtype=torch.int64))  # all of them see the same there
    for z, t in (flat, *((z.flatten(0, 1), t.flatten()) for z, t in batches())):
        t = t.masked_fill(t == -100, 0)
        together.update(z, t)
        for metric in alone.values():
            metric.update(z, t)
    assert {k: v.item() for k, v in together.compute().items()} == {
        k: m.compute().item() for k, m in alone.items()
    }
    assert ["perplexity", "plain"] in together.compute_groups.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_that_are_no_numbers_do_not_count_in_the_calibration_error(dtype):
    pytest.importorskip("torchmetrics")
    from crossent.integrations.torchmetrics import CalibrationError

    z, t = 3 * torch.randn(20, 6).to(dtype), torch.randint(0, 6, (20,))
    z[3], z[4, 2], z[5], z[6, t[6]] = torch.nan, torch.nan, torch.inf, -torch.inf
    kept = [i for i in range(20) if i not in (3, 4, 5, 6)]
    metric, clean = CalibrationError(), CalibrationError()
    metric.update(z, t)
    clean.update(z[kept], t[kept])
    assert metric.compute() == clean.compute()
    assert crossent.explain(z, t).ece == metric.compute()
    metric.reset()
    metric.update(z[3:6], t[3:6])
    assert metric.compute().isnan()


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


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.filterwarnings("always")
def test_rows_that_do_not_sum_to_one_are_scikit_learns(dtype):
    g = np.random.default_rng(1)
    y, p = g.integers(0, 3, 40), g.dirichlet([1.0] * 3, 40)
    for factor in (0.5, 0.9, 1 - 1e-3):
        scaled = (factor * p).astype(dtype)
        with warnings.catch_warnings(record=True) as theirs_said:
            theirs = sklearn.metrics.log_loss(y, scaled)
        with warnings.catch_warnings(record=True) as ours_said:
            ours = crossent.metrics.log_loss(y, scaled)
        assert ours == pytest.approx(theirs, rel=2e-3 if dtype == np.float16 else 1e-5)
        assert [w.category for w in ours_said] == [w.category for w in theirs_said]
        assert all("do not sum to one" in str(w.message) for w in ours_said)
        assert all(w.filename == __file__ for w in ours_said)


@pytest.mark.parametrize(
    "proba",
    [
        [[2.0, -1.0], [-3.0, 4.0]],
        [[0.5, 0.5], [1.0 + 1e-6, 0.0]],
        [[0.5, 0.5], [1.0, -1e-9]],
        [[0.5, 0.5], [np.nan, 0.5]],
        [0.5, 1.5],
        [np.inf, 0.5],
    ],
)
def test_what_is_no_probability_is_refused_as_by_scikit_learn(proba):
    with pytest.raises(ValueError, match=r"greater than 1|lower than 0|NaN|infinity"):
        sklearn.metrics.log_loss([0, 1], proba)
    with pytest.raises(ValueError, match="y_proba: expected probabilities"):
        crossent.metrics.log_loss([0, 1], proba)
    with pytest.raises(ValueError, match="y_proba: expected rows"):
        crossent.metrics.log_loss([], np.zeros((0, 2)))


def test_weights_of_half_precision_rows_are_not_rounded():
    z, y = torch.randn(5, 3).half(), torch.tensor([0, 1, 2, 1, 0])
    w = np.array([1e6, 1e-9, 3.0, 1e5, 0.0])
    z[4] = torch.nan  # weight 0
    rows = F.cross_entropy(z.double(), y, reduction="none")[:4].numpy()
    ours = crossent.metrics.log_loss(y, logits=z, sample_weight=w)
    assert ours == pytest.approx((rows * w[:4]).sum() / w.sum(), rel=1e-6)
    with pytest.raises(ValueError, match=r"sample_weight: expected shape \(5,\)"):
        crossent.metrics.log_loss(y, logits=z, sample_weight=w[:1])


@pytest.mark.filterwarnings("always")
def test_columns_in_another_order_than_the_sorted_one_are_said():
    p = [[0.9, 0.1], [0.2, 0.8]]
    with pytest.warns(UserWarning, match="sorted order"):
        ours = crossent.metrics.log_loss(["b", "a"], p, labels=["b", "a"])
    with pytest.warns(UserWarning, match="ordered"):
        assert ours == pytest.approx(sklearn.metrics.log_loss(["b", "a"], p, labels=["b", "a"]))


def models():
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.naive_bayes import GaussianNB
    from sklearn.tree import DecisionTreeClassifier

    return {
        "linear": LogisticRegression(max_iter=50),
        "tree": DecisionTreeClassifier(random_state=0),
        "forest": RandomForestClassifier(8, random_state=0),
        "bayes": GaussianNB(),  # log-probabilities far below what is clipped
    }


@pytest.mark.parametrize("name", models())
def test_scorer(name):
    x, y = load_breast_cancer(return_X_y=True)
    ours = cross_val_score(models()[name], x, y, scoring=crossent.metrics.neg_log_loss, cv=3)
    theirs = cross_val_score(models()[name], x, y, scoring="neg_log_loss", cv=3)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_grid_search_chooses_scikit_learns_model():
    from sklearn.model_selection import GridSearchCV
    from sklearn.tree import DecisionTreeClassifier

    x, y = load_breast_cancer(return_X_y=True)
    made = [
        GridSearchCV(
            DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 4, 8, None]}, cv=3,
            scoring=scoring,
        ).fit(x, y)
        for scoring in (crossent.metrics.neg_log_loss, "neg_log_loss")
    ]  # fmt: skip
    ranks = [search.cv_results_["rank_test_score"].tolist() for search in made]
    assert ranks[0] == ranks[1]
    assert made[0].best_params_ == made[1].best_params_


def test_weights_reach_the_scorer():
    """By metadata routing, by a grid search without it, and by a call."""
    from sklearn.metrics import get_scorer
    from sklearn.model_selection import GridSearchCV, cross_validate

    x, y = load_breast_cancer(return_X_y=True)
    w = np.random.default_rng(0).exponential(size=len(y)) ** 3
    model, scorer = LogisticRegression(max_iter=50), crossent.metrics.neg_log_loss
    model.fit(x, y)
    direct = scorer(model, x, y, sample_weight=w)
    assert direct == pytest.approx(get_scorer("neg_log_loss")(model, x, y, sample_weight=w))
    assert direct != pytest.approx(scorer(model, x, y))

    def search(scoring):
        return GridSearchCV(model, {"C": [0.01, 1.0]}, scoring=scoring, cv=3)

    plain = [search(s).fit(x, y, sample_weight=w) for s in (scorer, "neg_log_loss")]
    np.testing.assert_allclose(*(s.cv_results_["mean_test_score"] for s in plain), rtol=1e-6)
    with sklearn.config_context(enable_metadata_routing=True):
        model = LogisticRegression(max_iter=50).set_fit_request(sample_weight=True)
        theirs = get_scorer("neg_log_loss").set_score_request(sample_weight=True)
        asking = scorer.set_score_request(sample_weight=True)
        for scoring in (lambda scorer: scorer, lambda scorer: {"score": scorer, "other": scorer}):
            values = [
                cross_validate(model, x, y, params={"sample_weight": w}, cv=3, scoring=scoring(s))[
                    "test_score"
                ]
                for s in (asking, theirs)
            ]
            np.testing.assert_allclose(*values, rtol=1e-6)
        searched = [search(s).fit(x, y, sample_weight=w) for s in (asking, theirs)]
        np.testing.assert_allclose(*(s.cv_results_["mean_test_score"] for s in searched), rtol=1e-6)
        with pytest.raises(
            ValueError, match="sample_weight"
        ):  # the one that all share is as it was
            search(scorer).fit(x, y, sample_weight=w)
        aliased = scorer.set_score_request(sample_weight="factors")
        cross_validate(
            LogisticRegression(max_iter=50).set_fit_request(sample_weight=False), x, y,
            params={"factors": w}, cv=3, scoring=aliased, error_score="raise",
        )  # fmt: skip
    again = pickle.loads(pickle.dumps(asking))
    assert repr(again) == "crossent.metrics.neg_log_loss.set_score_request(sample_weight=True)"
    assert repr(scorer) == "crossent.metrics.neg_log_loss"


def test_folds_that_lack_a_class_are_scored_all_the_same():
    model = LogisticRegression().fit([[0.0], [1.0], [2.0]], ["a", "b", "c"])
    x, y = [[0.0], [0.5]], ["a", "a"]
    expected = model.predict_log_proba(x)[:, 0].mean()
    assert crossent.metrics.neg_log_loss(model, x, y) == pytest.approx(expected)


def test_metrics_load_no_scikit_learn():
    code = (
        "import sys, crossent.metrics as m; m.log_loss([0, 1], [[.5, .5]] * 2)"
        "; repr(m.neg_log_loss); sys.exit('sklearn' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
