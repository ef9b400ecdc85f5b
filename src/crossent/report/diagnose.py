"""What looks wrong about a loss: each finding with its rows, the evidence and a fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..functional import cross_entropy
from ..problem.warnings import are_distributions
from .calibration import calibration_error, fitted_temperature
from .row_stats import Rows, Source

_LOOKED_AT = 256  # rows whose logits are read again, evenly spread
_SHOWN = 8  # classes named in a line of evidence


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong."""

    kind: str
    rows: list[int] = field(repr=False)  # flattened; empty where it is about all of them
    evidence: str
    advice: str


def findings(rows: Rows, source: Source) -> list[Finding]:
    """All that looks wrong, the gravest first."""
    if not bool(rows.valid.any()):
        return [_nothing(source)]
    checks = (
        _not_finite,
        _probabilities,
        _worse_than_chance,
        _shifted,
        _contradictions,
        _wrong_labels,
        _overconfident,
        _silent_classes,
        _ignored,
    )
    return [found for check in checks for found in check(rows, source)]


def _nothing(source: Source) -> Finding:
    return Finding(
        "nothing valid",
        [],
        f"all {source.total} rows have the target {source.ignore_index}, which is ignored",
        "the loss is the mean of nothing: look at how the targets are masked",
    )


def _not_finite(rows: Rows, source: Source) -> Iterator[Finding]:
    bad = rows.valid & ~rows.loss.isfinite()
    if bad.any():
        yield Finding(
            "not finite",
            _places(bad),
            f"{_count(bad)} rows have a loss of inf or nan",
            "look for overflow before the logits (inf), for 0/0 or log 0 (nan), or for a target "
            "that is masked with -inf",
        )


def _probabilities(rows: Rows, source: Source) -> Iterator[Finding]:
    """Rows that are distributions, or their logarithms."""
    sample = _spread(source)
    # Two classes may sum to one by chance once; every row looked at does not.
    alike = bool(are_distributions(sample, tolerance=2e-2).all())
    if source.classes > 1 and len(sample) > 1 and alike:
        yield Finding(
            "double softmax",
            [],
            "every row looked at is non-negative and sums to one: the logits are probabilities",
            "pass the activations before the softmax; the loss applies it itself, and applied "
            "twice it keeps the loss above "
            f"{math.log(1 + (source.classes - 1) / math.e):.3f} nats",
        )
    lse = rows.lse[rows.valid]
    if source.classes > 1 and len(lse) > 1 and bool((lse.abs() < 1e-3).all()):
        yield Finding(
            "log-probabilities",
            [],
            "every row's log-sum-exp is 0: the logits are log-probabilities already",
            "harmless, for the softmax of log-probabilities changes nothing; the log-softmax "
            "before the loss can go",
        )


def _worse_than_chance(rows: Rows, source: Source) -> Iterator[Finding]:
    loss = rows.loss[rows.valid & rows.loss.isfinite()].double()
    chance = math.log(source.classes)
    mean, spread = loss.mean().item(), loss.std().item() if len(loss) > 1 else 0.0
    if abs(mean - chance) < 1e-4 * chance and spread < 1e-3:
        yield Finding(
            "dead model",
            [],
            f"every row costs {mean:.4f} nats, exactly ln {source.classes}: all logits are equal",
            "the model says nothing: look for weights that are zero, a head that is not trained, "
            "or inputs that are cut off",
        )
    elif mean > 1.05 * chance and mean - chance > 3 * spread / math.sqrt(len(loss)):
        yield Finding(
            "worse than chance",
            [],
            f"the mean loss {mean:.3f} is above ln {source.classes} = {chance:.3f}, what equal "
            f"probabilities cost",
            "look for labels in another order than the classes, a sign, or a learning rate that "
            "is too high",
        )


def _shifted(rows: Rows, source: Source) -> Iterator[Finding]:
    """Sequences whose logits fit the target of the next or the previous position."""
    if len(source.shape) < 2 or source.shape[1] < 4:
        return
    most = max(4, source.within_budget(_LOOKED_AT))  # positions
    length = min(source.shape[1], most)
    sequences = min(source.shape[0], most // length)
    starts = torch.arange(sequences, device="cpu")[:, None] * source.shape[1]
    logits = source.some(starts + torch.arange(length, device="cpu")).float().cpu()
    target = source.target[:sequences, :length].cpu()
    means = {}
    for shift in (-1, 0, 1):
        left, right = max(0, -shift), length - max(0, shift)
        z, t = logits[:, left:right], target[:, left + shift : right + shift]
        means[shift] = cross_entropy(z, t, dim=-1, ignore_index=source.ignore_index).item()
    best = min((-1, 1), key=lambda shift: means[shift])
    if means[best] < 0.7 * means[0] and means[0] - means[best] > 0.1:
        place = "next" if best == 1 else "previous"
        yield Finding(
            "shifted labels",
            [],
            f"the logits fit the {place} position's target better: {means[best]:.3f} nats instead "
            f"of {means[0]:.3f}",
            "shift the targets by one position" + ("; shift=1 does" if best == 1 else ""),
        )


def _contradictions(rows: Rows, source: Source) -> Iterator[Finding]:
    """The same row twice, with different targets."""
    # Rows that say nothing are equal without being duplicates.
    says = rows.entropy.double() < math.log(source.classes) - 1e-6
    (places,) = (rows.valid & rows.loss.isfinite() & says).nonzero(as_tuple=True)
    if len(places) < 2:
        return
    # A row's numbers are the same bits in every batch: equal rows have equal ones.
    keys = rows.lse.double().view(torch.int64) * 31 + rows.entropy.double().view(torch.int64)
    _, group, size = torch.unique(keys[places], return_inverse=True, return_counts=True)
    same: dict[bytes, list[int]] = {}
    for place in places[size[group] > 1].tolist():
        raw = source.rows(place, place + 1).cpu().float().numpy().tobytes()
        same.setdefault(raw, []).append(place)
    found = sorted(
        place
        for members in same.values()
        if len({int(rows.target[m]) for m in members}) > 1
        for place in members
    )
    if found:
        yield Finding(
            "contradicting duplicates",
            found,
            f"{len(found)} rows have the same logits as another row with a different target",
            "one of the labels is wrong, or the inputs do not hold what tells them apart",
        )


def _wrong_labels(rows: Rows, source: Source) -> Iterator[Finding]:
    """Confident learning: rows as sure of another class as that class's own rows are.

    Northcutt, Jiang and Chuang, "Confident Learning" (2021): class j's threshold is the mean
    probability of j over the rows labelled j. Of the rows with one label that reach the threshold
    of what is predicted, the share that is predicted to be something else says how many of all its
    rows are wrong. Over all labels that many rows are named, those of the largest margin.
    """
    (places,) = (rows.valid & rows.loss.isfinite()).nonzero(as_tuple=True)
    classes = source.classes
    if len(places) < 10:
        return
    label, predicted = rows.target[places], rows.predicted[places]
    probability, confidence = rows.probability[places].double(), rows.confidence[places].double()
    other = label != predicted
    if other.double().mean() > 0.5:  # a model that knows little accuses nobody
        return
    size = torch.bincount(label, minlength=classes).double()
    threshold = torch.bincount(label, weights=probability, minlength=classes) / size
    sure = confidence >= threshold[predicted]  # nan, of a class without rows: nobody reaches it
    known = torch.bincount(label[sure], minlength=classes)
    wrong = torch.bincount(label[sure & other], minlength=classes)
    expected = int((size * wrong / known.clamp(min=1)).sum().round())
    margin = (confidence - probability).masked_fill(~other, -1)
    order = margin.argsort(descending=True)[: min(expected, int(other.sum()))]
    if not len(order):
        return
    found = places[order].tolist()
    yield Finding(
        "wrong labels",
        found,
        f"{len(found)} rows ({len(found) / len(places):.1%}) are put into another class as surely "
        f"as that class's own rows",
        "look at them, the surest first; some will be hard rows, not wrong ones",
    )


def _overconfident(rows: Rows, source: Source) -> Iterator[Finding]:
    """A temperature that would lower the loss."""
    valid = rows.valid & rows.loss.isfinite()
    if int(valid.sum()) < 50:
        return
    error = calibration_error(rows)
    confidence = rows.confidence[valid].double().mean().item()
    accuracy = rows.correct[valid].double().mean().item()
    if error < 0.05 or confidence < accuracy:
        return
    temperature, before, after = fitted_temperature(rows, source)
    if temperature > 1.1 and after < 0.98 * before:
        yield Finding(
            "overconfident",
            [],
            f"predictions are {confidence:.1%} sure and {accuracy:.1%} right (calibration error "
            f"{error:.3f})",
            f"divide the logits by a temperature of {temperature:.2f} (logit_scale="
            f"{1 / temperature:.3f}): the loss goes from {before:.3f} to {after:.3f}",
        )


def _silent_classes(rows: Rows, source: Source) -> Iterator[Finding]:
    valid = rows.valid
    if source.classes > int(valid.sum()):
        return  # fewer rows than classes: some must be absent
    present = torch.bincount(rows.target[valid], minlength=source.classes) > 0
    named = torch.bincount(rows.predicted[valid], minlength=source.classes) > 0
    never = present & ~named
    if never.any():
        yield Finding(
            "classes never predicted",
            _places(valid & never[rows.target.where(valid, 0)]),
            f"{_count(never)} classes have rows but are never predicted: {_listed(never)}",
            "too few rows of them, or a weight or bias that is stuck",
        )
    absent = ~present
    if absent.any():
        yield Finding(
            "classes never present",
            [],
            f"{_count(absent)} of {source.classes} classes have no row: {_listed(absent)}",
            "the head may be wider than the data, or a class was lost on the way",
        )


def _ignored(rows: Rows, source: Source) -> Iterator[Finding]:
    share = 1 - rows.valid.double().mean().item()
    if share > 0.5:
        yield Finding(
            "mostly ignored",
            [],
            f"{share:.1%} of the rows have the target {source.ignore_index}, which is ignored",
            "meant for padding and prompts; else look at how the targets are masked",
        )


def _spread(source: Source) -> Tensor:
    """Some rows, evenly spread."""
    places = source.evenly(torch.arange(source.total, device="cpu"), _LOOKED_AT)
    return source.some(places).float().cpu()


def _places(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _listed(mask: Tensor) -> str:
    places = _places(mask)
    more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    return ", ".join(map(str, places[:_SHOWN])) + more
