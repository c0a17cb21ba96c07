"""The report in a real browser: it opens in silence, asks no network for anything, works by hand and by keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from rayrlhf.evaluation.report import write_report
from tests.made_run import write_jsonl, write_run

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}: apt-get install chromium"),
]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'><b>bold</b>"


@dataclass
class Opened:
    """A page, and everything it said or asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "demo", prompts=512, steps=40)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=FLAGS, reduced_motion="reduce"
        )
        yield context
        context.close()


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    with show(browser, report) as seen:
        yield seen


@contextmanager
def show(browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> Iterator[Opened]:
    seen = Opened(browser.new_page())
    seen.page.set_viewport_size({"width": width, "height": 900})
    seen.page.emulate_media(color_scheme=scheme)
    seen.page.on("console", lambda message: seen.said.append(message.text))
    seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
    seen.page.on("request", lambda request: seen.asked.append(request.url))
    seen.page.goto(path.as_uri())
    seen.page.wait_for_selector("#warnings")
    yield seen
    seen.page.close()


def answers(page: Any) -> Any:
    return page.locator("#answers table.answers").first


def first_column(page: Any, arm: str, score: str) -> list[float]:
    """The score of an arm in each row that is shown."""
    cells = answers(page).locator(f'tbody td[data-column="{arm}"] .meta').all_inner_texts()
    found = [re.search(rf"{score}\s+([{MINUS}\d.]+)", text) for text in cells]
    return [float(match[1].replace(MINUS, "-")) for match in found if match]


def test_it_opens_without_an_error_and_without_a_request(opened: Opened, report: Path) -> None:
    assert opened.said == []
    assert {url for url in opened.asked if not url.startswith("data:")} == {report.as_uri()}
    titles = opened.page.locator("main > section > .section-head h2").all_inner_texts()
    assert titles == [
        "What came of it",
        "How it was made",
        "Training, step by step",
        "Where time and memory went",
        "What the distance bought",
        "Scores before and after",
        "The answers themselves",
        "Warnings",
    ]
    assert opened.page.locator("svg[role=img]:not([aria-label])").count() == 0
    assert (
        opened.page.locator("#plot-kl-mean svg[role=img]").get_attribute("aria-label").endswith("target 6 is marked.")
    )


def test_answers_are_searched_filtered_and_paged(opened: Opened, report: Path) -> None:
    page, status = opened.page, opened.page.locator("#answers .count").first
    assert status.inner_text() == f"1{DASH}20 of 512"
    page.get_by_role("button", name="Next").first.click()
    assert status.inner_text() == f"21{DASH}40 of 512"
    page.get_by_label("Search", exact=True).first.fill("barn")
    playwright.expect(status).to_contain_text("filtered from 512")
    rows = answers(page).locator("tbody tr").all_inner_texts()
    assert len(rows) == sum("barn" in line for line in report.with_name("answers.jsonl").read_text().splitlines())
    assert all("barn" in row for row in rows)
    page.get_by_label("Search", exact=True).first.fill("no such words")
    playwright.expect(status).to_have_text("none of 512")
    page.get_by_label("Search", exact=True).first.fill("")
    page.get_by_label("Who is better").select_option("better ppo")
    playwright.expect(status).to_contain_text("filtered")
    cells = answers(page).locator('td[data-column="PPO"]').all_inner_texts()
    assert len(cells) == 20
    assert all("better than SFT" in text for text in cells)
    page.get_by_label("Kind").select_option("sort")
    assert set(answers(page).locator("tbody .prompt .chip").all_inner_texts()) == {"sort"}
    page.get_by_label("Who is better").select_option("")
    page.get_by_label("Kind").select_option("")
    page.get_by_label("Marks").select_option("cut")
    rows = answers(page).locator("tbody tr").all_inner_texts()
    assert len(rows) == 20
    assert all("truncated" in row for row in rows)


def test_a_column_sorts_both_ways_and_says_so(opened: Opened) -> None:
    button = opened.page.get_by_role("button", name="Sort by PPO reward")
    head = answers(opened.page).locator("th", has=button)
    assert head.get_attribute("aria-sort") == "none"
    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    down = first_column(opened.page, "PPO", "reward")
    assert len(down) == 20
    assert down == sorted(down, reverse=True)
    button.click()
    assert head.get_attribute("aria-sort") == "ascending"
    up = first_column(opened.page, "PPO", "reward")
    assert up == sorted(up)
    assert up[0] < down[0]


def test_the_keyboard_reaches_the_sort_buttons_and_sorts(opened: Opened) -> None:
    page = opened.page
    page.get_by_label("Marks").focus()
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        if names[-1] == "Sort by PPO reward":
            break
    assert names[-1] == "Sort by PPO reward"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert answers(page).locator("th[aria-sort=descending]").count() == 1


def test_arrow_keys_read_a_plot_and_the_kl_of_a_token(opened: Opened) -> None:
    page = opened.page
    plot, other = page.locator("#plot-reward-mean .plot-body"), page.locator("#plot-kl-mean .plot-body")
    assert "step 40" in plot.inner_text()
    plot.focus()
    page.keyboard.press("Home")
    assert "step 1" in plot.locator("output").inner_text().splitlines()[0]
    assert plot.locator("output").inner_text().splitlines()[0] == other.locator("output").inner_text().splitlines()[0]
    answer = answers(page).locator('tbody td[data-column="PPO"] .tokens').first
    answer.focus()
    page.keyboard.press("ArrowRight")
    assert re.search(r"nats\s*token \d of \d", page.locator(".tip").inner_text())
    page.keyboard.press("Escape")
    assert page.locator(".tip").is_hidden()


def test_pointing_at_a_plot_marks_the_step_in_all_of_them(opened: Opened) -> None:
    stage = opened.page.locator("#plot-reward-mean .stage")
    stage.scroll_into_view_if_needed()
    stage.hover(position={"x": 120, "y": 60})
    assert opened.page.locator("#plot-value-loss .cursor line").count() == 1
    opened.page.get_by_label("Smoothing").fill("0.8")
    assert opened.page.locator("#plot-reward-mean path.raw").count() == 2  # the raw lines stay in sight
    opened.page.get_by_role("button", name="PPO-ptx", exact=True).click()
    assert opened.page.locator("#plot-reward-mean path.raw").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_system_and_its_own_switch(browser: Any, report: Path, scheme: str) -> None:
    with show(browser, report, scheme=scheme) as seen:

        def light() -> bool:
            red = seen.page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
            return int(red) > 128

        assert light() == (scheme == "light")
        seen.page.locator("#theme").click()
        assert light() == (scheme == "dark")
        seen.page.evaluate("localStorage.clear()")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    with show(browser, report, width=width) as seen:
        seen.page.locator("details").evaluate_all("all => all.forEach(each => { each.open = true; })")
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width


def test_512_prompts_are_filtered_and_sorted_at_once(opened: Opened) -> None:
    start = perf_counter()
    opened.page.get_by_role("button", name="Sort by PPO KL").click()
    opened.page.get_by_label("Who is better").select_option("better ppo")
    playwright.expect(opened.page.locator("#answers .count").first).to_contain_text("filtered")
    assert perf_counter() - start < 2


def test_markup_in_an_answer_is_shown_and_not_run(browser: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "evil", prompts=2, steps=3)
    answer = {"text": EVIL, "tokens": [EVIL, EVIL], "kl": [0.1, 0.2], "reward": 1.0, "flags": {EVIL: True}}
    write_jsonl(run / "answers.jsonl", [{"prompt": EVIL, "kind": EVIL, "answers": {"sft": answer, "ppo": answer}}])
    write_jsonl(run / "samples.jsonl", [{"step": 1, "prompt": EVIL, "response": EVIL}])
    with show(browser, write_report([run])) as seen:
        assert seen.page.evaluate("window.broken") is None
        assert seen.said == []
        assert seen.page.locator("main img, main b b").count() == 0
        assert "<b>bold</b>" in answers(seen.page).inner_text()


def test_a_comparison_and_a_run_in_ruins_open_in_silence(browser: Any, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 3, 4, ("ppo",), (), seed) for seed, name in enumerate(("one", "two"))]
    with show(browser, write_report(runs)) as seen:
        assert seen.said == []
        assert sorted(seen.page.locator("#plot-reward-mean .direct").all_text_contents()) == ["one", "two"]
    for name in ("answers.jsonl", "samples.jsonl", "summary.json", "metrics.jsonl"):
        (runs[0] / name).unlink()
    with show(browser, write_report(runs[:1])) as seen:
        assert seen.said == []
        assert "summary.json is missing" in seen.page.locator(".notice").inner_text()
