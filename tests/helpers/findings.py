"""What an explanation found, and logits that cost or claim a given amount."""

from __future__ import annotations

import math

import torch

import crossent

LN2 = math.log(2)


def kinds(why):
    return {finding.kind for finding in why.findings}


def found(why, kind):
    return next(finding for finding in why.findings if finding.kind == kind)


def kinds_of(logits, target, **more):
    return kinds(crossent.explain(logits, target, **more))


def finding_of(kind, logits, target, **more):
    return found(crossent.explain(logits, target, **more), kind)


def costing(losses):
    """Two classes, target 0, each row with the loss that is said."""
    losses = torch.tensor(losses, dtype=torch.float64)
    return torch.stack([-torch.log(torch.expm1(losses)), torch.zeros_like(losses)], -1)


def sure(confidence, right, rows):
    """Two classes: predictions of one confidence, so many of which are right."""
    logits = torch.tensor([math.log(confidence / (1 - confidence)), 0.0]).expand(rows, 2)
    return logits.double(), (torch.arange(rows) >= right).long()
