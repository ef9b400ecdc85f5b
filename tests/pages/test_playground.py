"""The playground in a real browser: Python's numbers, and what its buttons break."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import crossent
from crossent.cli import main
from tests.helpers.pages import EVIL, Page


@pytest.fixture
def playground(browser, tmp_path):
    done = CliRunner().invoke(main, ["playground", "--html", str(tmp_path / "play.html")])
    assert done.exit_code == 0, done.output
    return Page(browser, tmp_path / "play.html")


def set_to(page, selector, value):
    page.run(
        "arguments[0].value = arguments[1];"
        "for (const kind of ['input', 'change']) arguments[0].dispatchEvent(new Event(kind));",
        page.one(selector),
        str(value),
    )


def expected(logits, target, temperature, smoothing):
    """The same in Python: loss, lse, softmax, gradient, Jacobian."""
    z = torch.tensor([logits], dtype=torch.float64, requires_grad=True)
    loss, stats = crossent.cross_entropy(
        z,
        torch.tensor([target]),
        logit_scale=1 / temperature,
        label_smoothing=smoothing,
        return_stats=True,
    )
    (gradient,) = torch.autograd.grad(loss, z)
    scaled = z.detach()[0] / temperature
    jacobian = crossent.softmax_jacobian(scaled) / temperature
    return loss, stats.lse[0], crossent.softmax(scaled), gradient[0], jacobian


@pytest.mark.parametrize(
    ("logits", "target", "temperature", "smoothing"),
    [
        ([2.0, 0.5, -1.0, 0.0], 0, 1.0, 0.0),
        ([20.0, 0.0, 0.0, 0.0], 0, 1.0, 0.0),
        ([-3.0, 7.25, 1.5, 0.0, 2.0], 3, 2.5, 0.1),
        ([1.0, 1.0, 1.0], 2, 0.1, 1.0),
    ],
)
def test_the_playground_has_pythons_numbers(playground, logits, target, temperature, smoothing):
    for _ in range(len(logits) - 4):
        playground.one("#more").click()
    for _ in range(4 - len(logits)):
        playground.one("#fewer").click()
    for c, z in enumerate(logits):
        set_to(playground, f"#classes tbody tr:nth-child({c + 1}) input", z)
    set_to(playground, "#target", target)
    set_to(playground, "#temperature", temperature)
    set_to(playground, "#smoothing", smoothing)
    loss, lse, softmax, gradient, jacobian = expected(logits, target, temperature, smoothing)
    assert playground.value("#loss") == pytest.approx(loss.item(), rel=1e-12, abs=0)
    assert playground.value("#lse") == pytest.approx(lse.item(), rel=1e-12, abs=0)
    for number, values in ((5, softmax), (8, gradient)):
        shown = [float(v) for v in playground.column("classes", number)]
        assert shown == pytest.approx(values.tolist(), rel=1e-9, abs=1e-15)
    for c, line in enumerate(jacobian.tolist()):
        cells = playground.all(f"#jacobian tr:nth-child({c + 1}) td")
        shown = [float(cell.get_attribute("data-value")) for cell in cells]
        assert shown == pytest.approx(line, rel=1e-9, abs=1e-15)
    assert playground.complaints() == []


def test_the_playground_breaks_and_resets(playground):
    playground.one("#overflow").click()
    assert playground.one("#naive").text == "NaN"
    assert playground.value("#loss") == pytest.approx(3 * 3.720075976020836e-44, rel=1e-12, abs=0)
    playground.one("#reset").click()
    before = playground.value("#loss")
    playground.one("#gap").click()
    assert playground.value("#naive") == 0
    truth = F.cross_entropy(torch.tensor([[20.0, 0, 0, 0]]).double(), torch.tensor([0]))
    assert playground.value("#loss") == pytest.approx(truth.item(), rel=1e-7, abs=0)
    playground.one("#double").click()
    assert "0.744 nats" in playground.one("#story").text
    assert playground.value("#loss") == pytest.approx(0.743668, abs=1e-5)
    playground.one("#reset").click()
    assert playground.value("#loss") == before
    assert playground.one("#story").text == "Nothing is broken."


def test_logits_are_dragged(playground):
    from selenium.webdriver.common.action_chains import ActionChains

    before = playground.value("#classes tbody tr:nth-child(2) td:nth-child(3)")
    handle = playground.all(".handle")[1]
    ActionChains(playground.driver).drag_and_drop_by_offset(handle, 0, -60).perform()
    after = playground.value("#classes tbody tr:nth-child(2) td:nth-child(3)")
    assert after > before + 1
    page = playground.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page
    assert playground.complaints() == []


def test_the_playground_in_a_notebook(browser, tmp_path):
    play = crossent.playground([1.0, 0.0, 0.0], classes=[EVIL, "b", "c"])
    (tmp_path / "cell.html").write_text(f"<!doctype html><title>x</title>{play._repr_html_()}")
    page = Page(browser, tmp_path / "cell.html")
    browser.switch_to.frame(0)
    truth = F.cross_entropy(torch.tensor([[1.0, 0, 0]]).double(), torch.tensor([0])).item()
    assert page.value("#loss") == pytest.approx(truth, rel=1e-12)
    assert page.run("return window.hacked") is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"logits": [1.0, 2.0]}, "logits: expected 3 to 10"),
        ({"logits": [1.0, 2.0, float("inf")]}, "finite"),
        ({"target": 4}, "target: expected a class from 0 to 3, got 4"),
        ({"classes": ["a"]}, "classes: expected 4 names, got 1"),
    ],
)
def test_bad_playgrounds(arguments, match):
    with pytest.raises(ValueError, match=match):
        crossent.playground(**arguments)
