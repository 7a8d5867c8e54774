"""The page fits on phones, can be read in both modes, and shows where the focus is."""

import pytest
from playground_page import open_chunk, say, served, set_fields, write
from playwright.sync_api import expect

# The contrast of every text with what is painted behind it, where it is below WCAG AA.
FAINT_TEXTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colors) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const colorsOf = (element) => getComputedStyle(element);
  const faint = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest(".unseen")) continue;
    if (element.closest("[aria-disabled=true], :disabled, option")) continue;
    const behind = [];
    for (let one = element; one; one = one.parentElement) behind.unshift(colorsOf(one).backgroundColor);
    const texts = [luminance(paint(behind)), luminance(paint([...behind, colorsOf(element).color]))];
    seen += 1;
    if ((Math.max(...texts) + 0.05) / (Math.min(...texts) + 0.05) < 4.5) faint.push(walker.currentNode.data);
  }
  return { faint, seen, ground: luminance(paint([getComputedStyle(document.body).backgroundColor])) };
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_it_fits_and_can_be_read(width, scheme, tokenizer, visit):
    """In every state: nothing wider than the window, and contrast of WCAG AA."""
    with served(tokenizer, "sequential", temperature=0.5) as (_, _, url):
        page = visit(url, viewport={"width": width, "height": 844}, color_scheme=scheme)

        def look():
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            found = page.evaluate(FAINT_TEXTS)
            assert found["faint"] == [] and found["seen"] > 10
            assert (found["ground"] < 0.05) if scheme == "dark" else (found["ground"] > 0.8)

        look()
        set_fields(page, tokens=0)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#tokens-wrong")).to_be_visible()
        look()
        write(page, "a" * 60, tokens=120, temperature=0.85)
        look()
        open_chunk(page, 3)
        look()
        chunk = page.locator("#text [aria-expanded=true]").bounding_box()
        sheet = page.locator("aside").bounding_box()
        assert width == 1280 or chunk["y"] + chunk["height"] <= sheet["y"], "the text stays in view"
        page.keyboard.press("Escape")
        page.get_by_text("Chat", exact=True).click()
        look()
        say(page, "Hello " + "a" * 60, 1)
        look()


def test_motion_is_for_those_who_do_not_mind(server, visit):
    _, _, url = server
    durations = "[...document.querySelectorAll('*')].map((one) => getComputedStyle(one))"
    durations += (
        ".filter((style) => style.transitionDuration !== '0s' || style.animationName !== 'none').length"
    )
    assert visit(url).evaluate(durations) > 0
    assert visit(url, reduced_motion="reduce").evaluate(durations) == 0


def test_focus_is_seen(server, visit):
    """At every stop of the Tab key there is a ring."""
    _, _, url = server
    page = visit(url)
    write(page)
    page.locator("#modes input:checked").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    seen = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.textContent")
        if name in seen or name == page.locator("body").text_content():
            break
        seen.append(name)
        assert page.evaluate(outline) == "solid", name
    assert {"temperature", "more", "prompt"} <= set(seen) and len(seen) > 8
