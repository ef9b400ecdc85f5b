"""What tests of reports share: a model's real logits."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict


@pytest.fixture(scope="session")
def digits():
    """Out-of-sample logits of a linear model on the digits, and the true labels."""
    x, y = load_digits(return_X_y=True)
    model = LogisticRegression(C=0.05, max_iter=300)
    scores = cross_val_predict(model, x / 16, y, cv=4, method="decision_function")
    return torch.tensor(scores).float(), torch.tensor(y)
