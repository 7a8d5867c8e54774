"""Reports as a browser shows them: on a wide screen and on a phone, light and dark."""

import re

import pytest
from browser import chromium_if_any
from reports import STRONG, comparison_of, result_of, rising

from calm.evaluation.held_out import Scorecard
from calm.report.comparison import write_comparison
from calm.report.facts import LANGUAGE_MODEL, RunFacts, StageFacts
from calm.report.palette import DARK, LIGHT
from calm.report.run import RunReport, Sample, write_report

BASELINE = {"head": None, "chunk_size": 1, "checkpoints": rising(cross_entropy=3.0)}
LONG = "word" * 100
SCHEMES = {"light": LIGHT, "dark": DARK}


@pytest.fixture(scope="module")
def chromium():
    with chromium_if_any() as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    runs = [result_of("a_run"), result_of("another_run", texts=[LONG]), result_of("baseline", **BASELINE)]
    write_comparison(comparison_of(*runs, prompts=[LONG]), folder / "comparison.html")
    history = {LANGUAGE_MODEL: [{"step": step, "loss": 1.0 / step} for step in range(1, 40)]}
    facts = RunFacts(
        "CALM, K = 4, sequential head", {"head": 10**9}, [StageFacts(LANGUAGE_MODEL, 10, 10**9)], True
    )
    card = Scorecard("CALM", STRONG, floors={"3-gram": STRONG})
    report = RunReport(LONG, card, history, [Sample(LONG, LONG, LONG)], f"a: {LONG}\n" * 40, facts)
    write_report(folder / "run.html", report)
    return folder


@pytest.fixture
def visit(chromium, reports):
    opened = []

    def open_page(name, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.append(context)
        page = context.new_page()
        requested = []
        page.on("request", lambda request: requested.append(request.url))
        page.goto((reports / f"{name}.html").as_uri())
        assert [url[:5] for url in requested if not url.startswith("data:")] == ["file:"]
        return page

    yield open_page
    for context in opened:
        context.close()


def colour(rgb):
    return "#" + "".join(f"{int(share):02x}" for share in re.findall(r"\d+", rgb)[:3])


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(name, width, visit):
    page = visit(name, width)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in page.locator(".plots img, .key > div, h1, article, pre").all():
        bounds = box.bounding_box()
        assert bounds["x"] >= 0 and bounds["x"] + bounds["width"] <= width
    assert page.locator(".scroll").first.evaluate("element => getComputedStyle(element).overflowX") == "auto"


@pytest.mark.parametrize("name", ["run", "comparison"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_and_plots_follow_the_readers_colour_scheme(name, scheme, visit):
    page = visit(name, scheme=scheme)
    colours = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    palette = SCHEMES[scheme]
    assert [colour(rgb) for rgb in colours] == [palette.ink, palette.paper]
    images = page.locator(".plots img")
    assert images.count() > 0
    for image in images.all():
        assert image.evaluate("element => element.complete && element.naturalWidth") > 100
        source = "source" if scheme == "dark" else "img"
        shown, declared = image.evaluate(
            f"element => [element.currentSrc, element.parentElement.querySelector('{source}')"
            f".getAttribute('{'srcset' if scheme == 'dark' else 'src'}')]"
        )
        assert shown == declared


def test_a_printed_page_is_light(visit):
    page = visit("run", scheme="dark")
    page.emulate_media(media="print")
    assert colour(page.evaluate("getComputedStyle(document.body).backgroundColor")) == LIGHT.paper


def test_recipe_is_collapsed_until_clicked(visit):
    page = visit("run")
    assert page.locator("pre").is_hidden()
    page.get_by_text("All settings of this run").click()
    assert page.locator("pre").is_visible()


def test_prose_is_left_aligned_and_numbers_right_aligned(visit):
    page = visit("run")
    for text in page.locator("p, li, article, th[scope=row]").all():
        assert text.evaluate("element => getComputedStyle(element).textAlign") in ("left", "start")
    for number in page.locator("td.number").all():
        assert number.evaluate("element => getComputedStyle(element).textAlign") == "right"


def test_plots_are_readable_on_a_phone(visit):
    page = visit("comparison", 390)
    for image in page.locator(".plots img").all():
        bounds = image.bounding_box()
        full_width = image.evaluate("element => Number(element.getAttribute('width'))")
        assert 9 * 96 / 72 * bounds["width"] / full_width >= 10  # Size of 9-point text in pixels.
