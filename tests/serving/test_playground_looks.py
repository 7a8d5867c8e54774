"""The page fits on phones, is readable in light and dark mode, and shows where the focus is."""

import pytest
from playground_page import open_chunk, say, served, set_fields, write
from playwright.sync_api import expect

# Texts whose contrast with what is painted behind them is below WCAG AA, of how many, and the background.
FAINT_TEXTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const colorsOf = (element) => getComputedStyle(element);
  const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".unseen")) continue;
    if (element.closest("[aria-disabled=true], :disabled, option")) continue;
    const behind = [];
    for (let layer = element; layer; layer = layer.parentElement)
      behind.unshift(colorsOf(layer).backgroundColor);
    const texts = [luminance(paint(behind)), luminance(paint([...behind, colorsOf(element).color]))];
    seen += 1;
    if ((Math.max(...texts) + 0.05) / (Math.min(...texts) + 0.05) < 4.5) faint.push(walker.currentNode.data);
  }
  const background = luminance(paint([getComputedStyle(document.body).backgroundColor]));
  return { faint, seen, background };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_page_fits_and_has_enough_contrast(width, scheme, tokenizer, visit):
    """In every state: nothing wider than the window, and contrast of WCAG AA."""
    with served(tokenizer, "sequential", temperature=0.5) as (_, _, url):
        page = visit(url, viewport={"width": width, "height": 844}, color_scheme=scheme)

        def check_page():
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            contrast = page.evaluate(FAINT_TEXTS)
            assert contrast["faint"] == [] and contrast["seen"] > 10
            assert (contrast["background"] < 0.05) if scheme == "dark" else (contrast["background"] > 0.8)

        check_page()
        set_fields(page, tokens=0)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#tokens-wrong")).to_be_visible()
        check_page()
        write(page, "a" * 60, tokens=120, temperature=0.85)
        check_page()
        open_chunk(page, 3)
        check_page()
        chunk = page.locator("#text [aria-expanded=true]").bounding_box()
        sheet = page.locator("aside").bounding_box()
        assert width == 1280 or chunk["y"] + chunk["height"] <= sheet["y"], "the text stays in view"
        page.keyboard.press("Escape")
        page.get_by_text("Chat", exact=True).click()
        check_page()
        say(page, "Hello " + "a" * 60, 1)
        check_page()


def test_nothing_moves_if_reduced_motion_is_preferred(server, visit):
    _, _, url = server
    durations = "[...document.querySelectorAll('*')].map((element) => getComputedStyle(element))"
    durations += (
        ".filter((style) => style.transitionDuration !== '0s' || style.animationName !== 'none').length"
    )
    assert visit(url).evaluate(durations) > 0
    assert visit(url, reduced_motion="reduce").evaluate(durations) == 0


def test_focus_is_visible_at_every_tab_stop(server, visit):
    _, _, url = server
    page = visit(url)
    write(page)
    page.locator("#modes input:checked").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    visited = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        if name in visited or name == page.locator("body").text_content():
            break
        visited.append(name)
        assert page.evaluate(outline) == "solid", name
    assert {"temperature", "more", "prompt"} <= set(visited) and len(visited) > 8
