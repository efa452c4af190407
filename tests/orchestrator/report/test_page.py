"""The page in headless Chromium: content, no console errors, no network, hostile text stays text."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, sync_playwright

from orchestrator.cli import main
from orchestrator.report.command import make_report
from orchestrator.run_directory import RunDirectory

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIME_OUT_MS = 60_000.0

needs_browser = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_BROWSER" not in os.environ, reason="no Chromium: install Debian's package chromium"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page, with what the browser complained about and what it asked the network for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1200, scheme: Any = "light") -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page: Page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.page.set_default_timeout(TIME_OUT_MS)
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")

    def close(self) -> None:
        """The page was quiet to the end, and asked for nothing but itself and the pictures that it carries."""
        self.page.close()
        asked = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert self.complaints == []
        assert len(asked) == 1, asked

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def start_over(self) -> None:
        """As after loading, the filters empty."""
        self.page.set_viewport_size({"width": 1200, "height": 800})
        self.page.emulate_media(media="screen", color_scheme="light")
        self.page.click("#filters button[type=reset]")
        self.page.check("#mode-kind")


def write(run: RunDirectory) -> Path:
    result = CliRunner().invoke(main, ["report", str(run.path)])
    assert result.exit_code == 0, result.output
    return run.path / "report.html"


@pytest.fixture(scope="module")
def loaded(finished: RunDirectory, browser: Browser) -> Iterator[Opened]:
    """The page of a finished run; loading takes seconds on a small machine, so tests share it."""
    opened = Opened(browser, write(finished))
    yield opened
    opened.close()


@pytest.fixture
def opened(loaded: Opened) -> Opened:
    loaded.start_over()
    return loaded


@needs_browser
def test_the_page_tells_the_numbers_of_the_summary(finished: RunDirectory, opened: Opened) -> None:
    summary = json.loads(finished.summary.read_text())
    assert opened.text("#status") == summary["status"]
    assert opened.text("#tile-tokens-generated") == f"{summary['tokens']['generated']:,}"
    assert opened.text("#tile-tokens-trained") == f"{summary['tokens']['trained']:,}"
    assert opened.text("#tile-lag--mean") == f"{summary['lag_mean']:.2f}"
    assert opened.text("#tile-held-out-success") == "0.750"
    for name, count in (("dispatched", 14), ("trained", 12), ("dropped: stale", 1), ("live", 1)):
        assert opened.text(f'[data-ledger="{name}"]') == str(count)
    assert "useful work in 75.0 %" in opened.text("#idle-words")
    assert "20.0 %: the episodes were in their environments" in opened.text("#idle-words")
    assert "environment-0" in opened.text("#stalls")
    assert "engine-0.0 dead" in " ".join(opened.text("#fleet").split())
    assert "12 of 12 steps" in opened.text("#verdict")
    assert "1 actor died" in opened.text("#verdict")
    assert "0.250" in opened.text("#evaluations")
    assert "g11-1" in opened.text("#slowest")
    logs = opened.text("#logs")
    assert "<b>was slow</b>" in logs
    assert "2" in logs.split()
    for name in (
        "utilisation",
        "reward",
        "entropy",
        "weights",
        "throughput",
        "lag",
        "lag-by-step",
        "lengths",
        "ledger",
    ):
        assert opened.page.locator(f"#f-{name} .main-svg").count() > 0, name


@needs_browser
def test_the_trajectory_browser_works_by_click_and_keyboard(opened: Opened) -> None:
    page = opened.page
    rows = page.locator("#list [role=option]")
    total = rows.count()
    assert total > 20
    rows.nth(3).click()
    assert page.inner_text("#detail h3") == rows.nth(3).locator("span").first.inner_text()
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#detail h3") == rows.nth(4).locator("span").first.inner_text()
    page.keyboard.press("End")
    assert rows.nth(total - 1).get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#detail h3") == rows.nth(total - 2).locator("span").first.inner_text()
    page.keyboard.press("Home")
    assert rows.nth(0).get_attribute("aria-selected") == "true"

    page.fill("#filter-text", "needle")
    assert {name.split("-")[0] for name in rows.locator("span:first-child").all_inner_texts()} == {"g3"}
    assert page.inner_text("#detail h3").startswith("g3-")
    page.fill("#filter-text", "no such thing")
    assert rows.count() == 0
    assert "No trajectory matches" in opened.text("#detail")
    page.click("#filters button[type=reset]")
    page.wait_for_selector(f"#item-{total - 1}")
    assert rows.count() == total


@needs_browser
def test_filters_and_colours(opened: Opened) -> None:
    page = opened.page
    rows = page.locator("#list [role=option]")
    page.select_option("#filter-status", "dropped: stale")
    assert rows.count() == 1
    page.select_option("#filter-status", "")
    page.select_option("#filter-reward", "missing")
    assert rows.count() == 1
    page.select_option("#filter-reward", "")
    page.fill("#filter-from", "3")
    page.fill("#filter-to", "3")
    assert {name.split("-")[0] for name in rows.locator("span:first-child").all_inner_texts()} == {"g3"}
    assert page.locator("#detail .k2").count() > 0, "the tokens of lag 3 are beyond the bound of 2"
    page.check("#mode-lag")
    assert "lag 3" in opened.text("#detail .key")
    assert "hsl" in (page.locator("#detail .k2").first.get_attribute("style") or "")
    page.check("#mode-logprob")
    assert "log-probability -0.5" in (page.locator("#detail .k2").first.get_attribute("title") or "")
    page.fill("#filter-from", "")
    page.fill("#filter-to", "")
    page.click('#slowest a[data-open="g11-1"]')
    assert page.inner_text("#detail h3") == "g11-1/0"


@needs_browser
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(opened: Opened, width: int, scheme: Any) -> None:
    page = opened.page
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    light = page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    page.emulate_media(media="print")
    assert not page.is_visible("nav")


@needs_browser
def test_paper_is_white(opened: Opened) -> None:
    """Printed from the dark, the labels of the figures are dark on white, and light again afterwards."""
    page = opened.page
    page.emulate_media(color_scheme="dark")
    colour = "() => getComputedStyle(document.querySelector('#f-reward .xtick text')).fill"
    page.evaluate("() => window.dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(colour) == "rgb(27, 32, 39)"
    page.evaluate("() => window.dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(colour) == "rgb(230, 234, 239)"


@needs_browser
def test_hostile_text_stays_text(finished: RunDirectory, opened: Opened) -> None:
    """The observations of the run hold a script, the end of a script element, a comment and an image that fails."""
    path = finished.path / "report.html"
    opened.page.fill("#filter-text", "g5-0")
    assert "<script>window.hacked=true</script></script><!--<img/src=x" in opened.text("#detail")
    assert opened.page.evaluate("() => typeof window.hacked") == "undefined"
    assert opened.page.locator("main img, main script, main b").count() == 0
    assert "<script>window.hacked" not in path.read_text(encoding="utf-8")


@needs_browser
def test_headings_labels_and_captions_are_there_for_those_who_do_not_see(opened: Opened) -> None:
    page = opened.page
    assert page.locator("h1").count() == 1
    assert page.locator("section").count() == page.locator("section > h2").count() == 8
    assert page.locator("table").count() == page.locator("table > caption").count()
    for plot in page.locator(".plot").all():
        assert len(plot.get_attribute("aria-label") or "") > 20
    unlabelled = "() => [...document.querySelectorAll('input, select')].filter(e => !e.labels.length).map(e => e.id)"
    assert page.evaluate(unlabelled) == []


@needs_browser
def test_a_killed_run_without_summary_is_reported(run: RunDirectory, browser: Browser) -> None:
    run.summary.unlink()
    segment = sorted(run.journal.glob("*.journal"))[-1]
    segment.write_bytes(segment.read_bytes()[:-5])
    with run.metrics.open("a") as file:
        file.write('{"step": 13, "wal')
    lines = run.attempts.read_text().replace(f'"pid": {os.getpid()}', '"pid": 999999999')
    run.attempts.write_text(lines)
    opened = Opened(browser, write(run))
    assert opened.text("#status") == "killed"
    assert "ended without a word after 12 of 12 steps" in opened.text("#verdict")
    assert "unfinished record" in opened.text(".problems")
    assert opened.text('[data-ledger="trained"]') == "12"
    opened.close()


@needs_browser
def test_a_run_that_has_only_begun_is_reported(tmp_path: Path, browser: Browser) -> None:
    run = RunDirectory.create(tmp_path / "begun", "mode: async\n")
    opened = Opened(browser, write(run))
    assert "No learner step" in opened.text("#learning")
    assert "There is no trajectory" in opened.text("#trajectories")
    assert "No timeline" in opened.text("#time")
    opened.close()


def test_the_page_fits_in_a_mail(run: RunDirectory) -> None:
    page = make_report(run)
    assert len(page.encode()) < 12e6
    for outside in ('src="http', 'href="http', "@import", "url(http"):
        assert outside not in page.split("<script>")[0]


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not the directory of a run" in result.output


def test_a_place_that_cannot_be_written_is_named(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["report", str(run.path), "--out", str(tmp_path / "file" / "report.html")])
    assert result.exit_code == 1
    assert "cannot be written" in result.output
