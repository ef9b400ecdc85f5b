"""The page of an explanation in a real browser: quiet, and it does what it offers."""

from __future__ import annotations

import pytest
import torch

import crossent
from tests.helpers.pages import EVIL, Page


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
    assert "wrong labels" in page.one(".finding").text
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
