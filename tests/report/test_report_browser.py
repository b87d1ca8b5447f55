"""The page in a real browser. Runs where Chromium and playwright's Python package are installed."""

import os
import shutil

import pytest
from run_folders import write_run

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the Python package playwright: pip install playwright"
)
pytest.importorskip("plotly", reason="plotly (extra `report`) is not installed: the page embeds its script")

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage")
PATIENCE = 120_000  # milliseconds: a busy machine takes its time over plotly's 5 MB

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium: apt-get install chromium, or set CHROMIUM to its path"
    ),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    from lightning_n2uq.report import write_report

    root = tmp_path_factory.mktemp("runs")
    runs = [write_run(root / "a", traffic=True), write_run(root / "b", seed=1, lr=0.001)]
    return write_report(runs, root / "page.html")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=["light", "dark"])
def opened(request, browser, page_file):
    """The page, what the console said and what was requested, in one of the two themes."""
    page = browser.new_page(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    messages, requests = [], []
    page.on("console", lambda message: messages.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: messages.append(f"pageerror: {error}"))
    page.on("request", lambda sent: requests.append(sent.url))
    page.goto(page_file.as_uri())
    yield page, messages, requests
    page.close()


@pytest.fixture(scope="module")
def page(browser, page_file):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(page_file.as_uri())
    yield page
    page.close()


def scroll_through(page):
    """Brings every plot near the window, so that it is drawn."""
    for plot in page.query_selector_all(".plot"):
        if plot.is_visible():
            plot.scroll_into_view_if_needed()
            page.wait_for_function("e => e.querySelector('.main-svg') !== null", arg=plot)


def test_every_plot_is_drawn_without_an_error_or_a_request(opened):
    page, messages, requests = opened
    scroll_through(page)
    page.select_option("#layer", index=1)
    scroll_through(page)
    marks = "e => e.querySelectorAll('.scatterlayer path, .barlayer path, .heatmaplayer image').length"
    visible = [plot for plot in page.query_selector_all(".plot") if plot.is_visible()]
    assert len(visible) > 15
    assert all(plot.evaluate(marks) > 0 for plot in visible)
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_the_theme_follows_the_system_and_the_button(opened):
    page, messages, _ = opened
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    back = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(back)
    assert (before == "rgb(255, 255, 255)") != dark
    page.click("#theme")
    assert page.evaluate(back) != before
    assert page.inner_text("#theme") == f"Switch to {'dark' if dark else 'light'} theme"
    assert messages == []


def test_the_keyboard_reaches_everything_in_order(page):
    reached = []
    name = "e => e.id || e.getAttribute('aria-label') || e.textContent.trim()"
    while "layer" not in reached and len(reached) < 100:
        page.keyboard.press("Tab")
        reached.append(page.eval_on_selector(":focus", name))
    assert reached[0] == "Skip to content"
    assert reached.index("theme") < reached.index("Runs") < reached.index("Zoom in") < reached.index("layer")
    assert not any("Share" in text for text in reached)  # nothing that would leave this machine
    page.focus("#layer")
    page.keyboard.press("ArrowDown")
    assert page.eval_on_selector("#layer", "e => e.value") == "layer1.0.conv2"
    assert page.is_visible('[data-layer="layer1.0.conv2"]')
    assert not page.is_visible('[data-layer="layer1.0.conv1"]')


def test_screen_readers_get_headings_names_and_words(page):
    broken = """() => [...document.querySelectorAll('[aria-labelledby],[aria-describedby]')].filter(e =>
        ['aria-labelledby', 'aria-describedby'].some(a =>
            e.getAttribute(a) && !document.getElementById(e.getAttribute(a))?.textContent.trim())).length"""
    assert page.evaluate(broken) == 0
    ids = page.eval_on_selector_all("[id]", "all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.locator("h1").count() == 1
    assert page.get_by_role("combobox", name="Layer").count() == 1
    assert page.get_by_role("figure", name="Validation accuracy").count() == 1


def test_a_run_is_hidden_and_shown_again_on_the_whole_page(page):
    lines = "document.querySelectorAll('[data-figure=\"curve-val/acc\"] .scatterlayer .trace').length"
    page.locator('[data-figure="curve-val/acc"]').scroll_into_view_if_needed()
    page.wait_for_function(f"() => {lines} === 2")
    page.click('button.run[data-run="1"]')
    page.wait_for_function(f"() => {lines} === 1")
    assert page.get_attribute('button.run[data-run="1"]', "aria-pressed") == "false"
    assert not page.is_visible('figure[data-run="1"]')
    page.click('button.run[data-run="1"]')
    page.wait_for_function(f"() => {lines} === 2")


WIDTHS = """() => {
    const right = (e) => e.getBoundingClientRect().right;
    return [...document.querySelectorAll('.plot')].filter(e => e.offsetParent).map(e =>
        [right(e.querySelector('.main-svg')) - right(e.closest('figure')),
         e.closest('main').getBoundingClientRect().width]);
}"""


def test_no_plot_is_cut_on_paper_and_the_page_is_as_before_afterwards(page):
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    found = page.evaluate(WIDTHS)
    assert len(found) > 10
    assert all(over <= 0 and width < 710 for over, width in found)
    styles = "getComputedStyle(document.querySelector('figure')).breakInside"
    assert page.evaluate(styles) == "avoid"
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert all(width > 1000 for _, width in page.evaluate(WIDTHS))


@pytest.mark.parametrize("width", [400, 820, 1440])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(
        "() => document.documentElement.scrollWidth <= innerWidth"
    )  # plots follow the window
    covered = """() => [...document.querySelectorAll('.plot')].some(e => e.querySelector('.legend'))"""
    assert not page.evaluate(covered)  # legends stand beside the plots


def test_the_browser_runs_no_script_but_the_pages_own(page):
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.foreign = true";
            document.body.append(script);
            const image = "<img src='data:,' onerror='window.foreign = true'>";
            document.body.insertAdjacentHTML("beforeend", image);
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.foreign") is None
    assert page.evaluate("typeof Plotly") == "object"
