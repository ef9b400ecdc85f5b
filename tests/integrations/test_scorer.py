"""The scorer in scikit-learn's cross-validation, grid search and metadata routing."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from crossent.integrations.sklearn import neg_log_loss

pytestmark = pytest.mark.filterwarnings("ignore")


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
    ours = cross_val_score(models()[name], x, y, scoring=neg_log_loss, cv=3)
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
        for scoring in (neg_log_loss, "neg_log_loss")
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
    model, scorer = LogisticRegression(max_iter=50), neg_log_loss
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
    assert (
        repr(again)
        == "crossent.integrations.sklearn.neg_log_loss.set_score_request(sample_weight=True)"
    )
    assert repr(scorer) == "crossent.integrations.sklearn.neg_log_loss"


def test_folds_that_lack_a_class_are_scored_all_the_same():
    model = LogisticRegression().fit([[0.0], [1.0], [2.0]], ["a", "b", "c"])
    x, y = [[0.0], [0.5]], ["a", "a"]
    expected = model.predict_log_proba(x)[:, 0].mean()
    assert neg_log_loss(model, x, y) == pytest.approx(expected)


def test_metrics_load_no_scikit_learn():
    code = (
        "import sys, crossent.integrations.sklearn as m; m.log_loss([0, 1], [[.5, .5]] * 2)"
        "; repr(m.neg_log_loss); sys.exit('sklearn' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Unnormalised(LogisticRegression):
    """A classifier whose probabilities sum to 0.9."""

    def predict_proba(self, X):
        return 0.9 * super().predict_proba(X)


class Single(LogisticRegression):
    """A classifier that is sure of all it says, in single precision."""

    def predict_proba(self, X):
        return (super().predict_proba(X) > 0.5).astype(np.float32)


@pytest.mark.parametrize("kind", [Unnormalised, Single])
@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_of_any_quality_are_scored_as_there(kind, classes):
    """Of two classes scikit-learn's scorer looks at the second alone."""
    x, y = load_wine(return_X_y=True)
    x, y = x[:, :4], np.minimum(y, classes - 1)
    ours, theirs = (
        cross_val_score(kind(max_iter=50), x, y, scoring=s, cv=3)
        for s in (neg_log_loss, "neg_log_loss")
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-7 if kind is Single else 1e-12)


@pytest.mark.parametrize("shape", ["one-hot", "column", "one-hot list"])
def test_targets_with_two_axes(shape):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.multiclass import OneVsRestClassifier

    x, y = load_wine(return_X_y=True)
    if shape == "column":
        model, y = RandomForestClassifier(5, random_state=0), y[:, None]
    else:
        model, y = OneVsRestClassifier(LogisticRegression(max_iter=50)), np.eye(3, dtype=int)[y]
    model.fit(x[::2], y[::2])
    rows = y[1::2].tolist() if shape == "one-hot list" else y[1::2]
    theirs = sklearn.metrics.get_scorer("neg_log_loss")(model, x[1::2], rows)
    assert neg_log_loss(model, x[1::2], rows) == pytest.approx(theirs, rel=1e-9)


def test_a_missing_request_names_the_scorer():
    with sklearn.config_context(enable_metadata_routing=True):
        model = LogisticRegression().set_fit_request(sample_weight=False)
        with pytest.raises(ValueError, match=r"crossent\.integrations\.sklearn\.neg_log_loss"):
            cross_val_score(
                model, np.eye(6), [0, 1] * 3, scoring=neg_log_loss, cv=2,
                params={"sample_weight": np.ones(6)},
            )  # fmt: skip
