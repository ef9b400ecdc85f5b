"""The pages in a real browser: nothing on the console, and they do what they offer."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

import crossent
from crossent.cli import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
EVIL = "<script>window.hacked = 1</script>"


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("NO BROWSER: chromium and chromedriver are missing, pages are NOT tested")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


class Page:
    """A page that is open."""

    def __init__(self, driver, path, width=1200, dark=False):
        self.driver = driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(path.as_uri())

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def value(self, selector):
        return float(self.one(selector).get_attribute("data-value"))

    def column(self, table, number):
        cells = self.all(f"#{table} tbody tr td:nth-child({number})")
        return [cell.get_attribute("data-value") for cell in cells]

    def complaints(self):
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    z = torch.randn(300, 10, generator=torch.Generator().manual_seed(0)).mul(3)
    t = z.argmax(-1)
    t[::4] = (t[::4] + 1) % 10
    why = crossent.explain(z, t, classes=[f"digit {i} {EVIL}" for i in range(10)])
    path = tmp_path_factory.mktemp("page") / "digits.html"
    why.to_html(path)
    return why, path


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    g = torch.Generator().manual_seed(1)
    z, t = 2 * torch.randn(4, 12, 30, generator=g), torch.randint(0, 30, (4, 12), generator=g)
    t[:, :2] = -100
    tokens = [[f" w{b}.{i}{EVIL}" for i in range(12)] for b in range(4)]
    why = crossent.explain(z, t, tokens=tokens, classes=[f"c{i}" for i in range(30)])
    path = tmp_path_factory.mktemp("page") / "sequences.html"
    why.to_html(path)
    return why, path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_it_opens_quietly_and_fits(browser, digits, width, dark):
    page = Page(browser, digits[1], width, dark)
    assert page.complaints() == []
    assert page.run("return document.documentElement.scrollWidth") <= width
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 22, 26)" if dark else "rgb(255, 255, 255)")
    assert page.run("return [...document.images].every((i) => i.naturalWidth > 0)")


def test_names_stay_text_and_foreign_scripts_do_not_run(browser, digits):
    page = Page(browser, digits[1])
    assert EVIL in page.one("#classes tbody td").text
    assert page.run("return window.hacked") is None
    page.run(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 2';"
        "document.body.append(s);"
    )
    assert page.run("return window.hacked") is None  # the policy forbids it
    assert any("Content Security Policy" in line["message"] for line in page.complaints())


def test_numbers_are_the_explanations(browser, digits):
    why, path = digits
    page = Page(browser, path)
    assert f"{why.mean:.4f}" in page.one(".tiles").text
    assert "wrong labels" in page.one(".suspect").text
    rows = [int(v) for v in page.column("hardest", 1)]
    assert rows == why.hardest(200)["row"].tolist()


def test_tables_sort_and_filter(browser, digits):
    page = Page(browser, digits[1])
    for table, number in (("classes", 2), ("hardest", 2), ("pairs", 4)):
        button = page.one(f"#{table} th:nth-child({number}) button")
        for state in ("descending", "ascending"):
            button.click()
            values = [float(v) for v in page.column(table, number)]
            assert values == sorted(values, reverse=state == "descending")
            heading = page.one(f"#{table} th:nth-child({number})")
            assert heading.get_attribute("aria-sort") == state
    page.one("#classes th:nth-child(1) button").click()
    names = page.column("classes", 1)
    assert names == sorted(names, reverse=True)
    page.one("#filter").send_keys("digit 3")
    shown = [row for row in page.all("#hardest tbody tr") if row.is_displayed()]
    assert 0 < len(shown) < 200
    assert all("digit 3" in row.text for row in shown)
    assert page.complaints() == []


def test_tokens_can_be_looked_into(browser, sequences):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    why, path = sequences
    page = Page(browser, path)
    strips = page.all(".strip")
    assert len(strips) == 4
    means = why.loss.reshape(4, 12)[:, 2:].mean(-1)
    first = int(means.argmax())
    tokens = strips[0].find_elements("css selector", ".token")
    assert tokens[0].get_attribute("class") == "token unscored"
    assert tokens[5].text.strip() == f"w{first}.5{EVIL}"
    ActionChains(browser).move_to_element(tokens[5]).perform()
    place = 12 * first + 5
    detail = page.one("#detail").text
    assert f"{float(why.loss[place]):.3f} nats" in detail
    assert f"rank {int(why.rows.rank[place])}" in detail
    best = int(why.source.rows(place, place + 1).argmax())
    assert detail.splitlines()[-1].startswith(f"c{best} ")
    page.run("arguments[0].focus()", tokens[0])
    for _ in range(3):
        page.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert page.driver.switch_to.active_element == tokens[3]
    assert f"w{first}.3" in page.one("#detail").text
    assert page.complaints() == []


def test_many_rows_make_a_small_page(tmp_path):
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(100_000, 50, generator=g), torch.randint(0, 50, (100_000,), generator=g)
    crossent.explain(z, t).to_html(tmp_path / "large.html")
    assert (tmp_path / "large.html").stat().st_size < 5e6


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


def test_the_playground_breaks_and_mends(playground):
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
