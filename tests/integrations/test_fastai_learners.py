"""fastai's learners with our loss: training, callbacks, diagnostics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_wine

pytestmark = pytest.mark.filterwarnings("ignore")


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


def test_class_weights_follow_the_learner_to_its_device(fastai, ours):
    learn = learner(fastai, ours.CrossEntropyLossFlat(weight=torch.tensor([1.0, 5.0, 2.0])))
    learn.dls.device = torch.device("meta")  # as if it were a GPU
    learn.train_eval.before_fit()
    assert learn.loss_func.weight.device.type == "meta"
    assert {p.device.type for p in learn.model.parameters()} == {"meta"}


def test_an_exported_learner_keeps_its_weights_and_its_explanation(fastai, ours, tmp_path):
    weight = torch.tensor([1.0, 5.0, 2.0])
    loss = ours.CrossEntropyLossFlat(weight=weight, ignore_index=1)
    learn = fit(learner(fastai, loss, cbs=ours.CrossEntropyDiagnostics()), 1)
    learn.export(tmp_path / "learner.pkl")
    again = fastai.load_learner(tmp_path / "learner.pkl")
    assert torch.equal(again.loss_func.weight, weight)
    assert repr(again.loss_func) == repr(loss)
    assert again.explain().mean == learn.explain().mean
    row = load_wine(as_frame=True).data.iloc[0]
    torch.testing.assert_close(again.predict(row)[2], learn.predict(row)[2])


def volumes(fastai, target, loss, cbs):
    x = torch.randn(8, 2, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    rows = list(zip(x, target(x), strict=True))
    loaders = fastai.DataLoaders.from_dsets(rows, rows, bs=4, num_workers=0)
    torch.manual_seed(0)
    return fastai.Learner(loaders, torch.nn.Conv3d(2, 3, 1), loss_func=loss, cbs=cbs)


@pytest.mark.parametrize("whose", ["flat", "torch module", "torch function", "ours", "ours, last"])
def test_diagnostics_of_volumes_whoever_made_the_loss(fastai, ours, whose):
    """The classes are on axis 1 by torch's rule; the last axis has as many here."""
    import crossent

    loss = {
        "flat": ours.CrossEntropyLossFlat(axis=1),
        "torch module": torch.nn.CrossEntropyLoss(),
        "torch function": F.cross_entropy,
        "ours": crossent.CrossEntropyLoss(),
        "ours, last": crossent.CrossEntropyLoss(dim=-4),
    }[whose]
    learn = volumes(fastai, lambda x: (x[:, 0] > 0).long(), loss, ours.CrossEntropyDiagnostics())
    why = fit(learn, 1).explain()
    assert why.count == 8 * 4 * 5 * 3
    assert why.mean == pytest.approx(learn.recorder.values[-1][1], rel=1e-5)
    assert why.note == ""


def test_diagnostics_of_sequences_with_a_loss_that_flattens(fastai, ours):
    x = torch.randn(8, 6, 4)
    rows = list(zip(x, x.argmax(-1).clamp(max=2), strict=True))
    loaders = fastai.DataLoaders.from_dsets(rows, rows, bs=4, num_workers=0)

    def loss(z, t):
        return F.cross_entropy(z.flatten(0, 1), t.flatten())

    learn = fastai.Learner(
        loaders, torch.nn.Linear(4, 3), loss_func=loss, cbs=ours.CrossEntropyDiagnostics()
    )
    why = fit(learn, 1).explain()
    assert why.count == 48
    assert why.mean == pytest.approx(learn.recorder.values[-1][1], rel=1e-5)


@pytest.mark.filterwarnings("always::crossent.CrossentWarning")
def test_targets_that_are_probabilities_stop_no_training(fastai, ours):
    loss = ours.CrossEntropyLossFlat(axis=1)
    learn = volumes(fastai, lambda x: torch.rand(8, 3, 4, 5, 3).softmax(1), loss,
                    ours.CrossEntropyDiagnostics())  # fmt: skip
    with pytest.warns(UserWarning, match="expected targets that are classes"):
        fit(learn, 2)
    assert np.isnan(learn.recorder.values[-1][2:]).all()
    with pytest.raises(RuntimeError, match="expected a fitted learner"):
        learn.explain()
