"""Generating text on the page and opening its chunks, by mouse and by keyboard."""

import re

import pytest
from playground_page import open_chunk, served, set_fields, write
from playwright.sync_api import expect
from serving_client import serving
from tiny import EOS, tiny_model


def test_text_and_the_pool_of_one_of_its_chunks(server, visit):
    _, client, url = server
    page = visit(url)
    expect(page.get_by_label("Key")).to_be_hidden()
    expect(page.get_by_text("Nothing written yet")).to_be_visible()
    expect(page.locator("#continue .guide")).to_contain_text("chunks of 4 tokens")
    write(page, "Once <b>upon</b>")
    text = client.completions.create(
        model="tiny", prompt="Once <b>upon</b>", max_tokens=12, seed=5, temperature=1
    ).choices[0].text  # fmt: skip
    assert page.locator("#text").text_content() == "Once <b>upon</b>" + text
    expect(page.locator("#continue .hint")).to_be_visible()
    expect(page.locator("#continue .done")).to_contain_text("3 chunks ·")
    open_chunk(page, 1)
    assert page.locator("#chunk-title").text_content() == "Chunk 2 of 3"
    assert page.locator("#chunk-tokens .token").count() == 4
    assert "200 fresh draws at T = 1 gave" in page.locator("#pool-facts").text_content()
    written = page.locator("#pool .written")
    expect(written).to_have_count(1)
    assert page.locator("#chunk-tokens").text_content() in written.locator("th").text_content()
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").first.wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "Once <b>upon</b>" + text


def test_text_is_a_single_tab_stop(server, visit):
    _, _, url = server
    page = visit(url)
    write(page)
    page.get_by_role("button", name="Write").focus()
    focused = "document.activeElement.className + ' ' + [...document.querySelectorAll('#text [role=button]')]"
    focused += ".indexOf(document.activeElement)"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "chunk 0"
    for key, number in (("ArrowRight", 1), ("End", 2), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0),
                        ("ArrowDown", 1)):  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused) == f"chunk {number}"
    page.keyboard.press("Enter")
    page.locator("#pool").wait_for()
    expanded = page.locator("#text [aria-expanded=true]")
    assert page.evaluate(focused) == "chunk 1" and expanded.count() == 1
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Copy"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focused) == "chunk 1", "the focus returns to where it was"
    page.get_by_role("button", name="Chunk after").click()
    assert page.locator("#chunk-title").text_content() == "Chunk 3 of 3"
    page.keyboard.press("Escape")
    expect(page.locator("#chunk")).to_be_hidden()
    assert expanded.count() == 0 and page.evaluate(focused) == "chunk 2"


@pytest.mark.parametrize("keys", ["Control+Enter", "Meta+Enter"])
def test_keyboard_shortcut_generates(keys, server, visit):
    _, _, url = server
    page = visit(url)
    set_fields(page, tokens=4)
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press(keys)
    expect(page.locator("#continue .done")).to_contain_text("1 chunk ·")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_screen_readers_hear_only_start_and_end(server, visit):
    """However many chunks there are."""
    _, _, url = server
    page = visit(url)
    page.evaluate("""() => {
      window.announcements = [];
      const watch = { childList: true, characterData: true, subtree: true };
      for (const region of document.querySelectorAll("[role=status], [role=alert], [aria-live]")) {
        new MutationObserver(() => window.announcements.push(region.textContent)).observe(region, watch);
      }
    }""")
    write(page, tokens=40)
    start, end = (text for text in page.evaluate("window.announcements") if text)
    assert start == "Writing." and end.startswith("10 chunks")
    assert page.locator("#text").locator("xpath=ancestor-or-self::*[@aria-live or @role='log']").count() == 0


ESTIMATED, EXACT = "are estimated from how often each was drawn", "are exact: the head computes them"
EXPLANATIONS = {
    "energy": ("energy", 4, 1, {}, r"A single draw of the head, at T = 1\.", ESTIMATED),
    "energy at low temperature": (
        "energy", 4, 0.95, {"draws": 1000},
        r"Decided at T = 0\.95 after \d+ draws?; \d+ of them (was|were) this chunk\.", ESTIMATED),
    "energy, draws spent": (
        "energy", 4, 0.5, {"draws": 3},
        r"3 draws gave no decision at T = 0\.5, so the most frequent ones decided; "
        r"1 of them was this chunk\.",
        ESTIMATED),
    "energy at zero": (
        "energy", 4, 0, {"draws": 2},
        r"The most frequent chunk of 2 draws: \d of them (was|were) this chunk\.",
        ESTIMATED),
    "energy, one draw": (
        "energy", 4, 0, {"draws": 1}, r"The only draw: with just one, .*", ESTIMATED),
    "sequential": ("sequential", 4, 1, {}, r"Drawn token by token at T = 1\.", EXACT),
    "sequential at low temperature": (
        "sequential", 4, 0.5, {},
        r"Drawn token by token at T = 0\.5: each token.s distribution is sharpened\.",
        EXACT),
    "sequential at zero": (
        "sequential", 4, 0, {}, r"At T = 0 the head takes the likeliest token at each place\.", EXACT),
    "one token a chunk": ("sequential", 1, 1, {}, r"Drawn at T = 1\.", EXACT),
    "categorical flow": (
        "categorical_flow", 4, 0.5, {}, r"A single draw of the head, at T = 0\.5\.",
        "applies the temperature in its own way"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("head", "size", "temperature", "fields", "chunk", "pool"), EXPLANATIONS.values(), ids=EXPLANATIONS
)
def test_explanations_fit_the_head_and_the_number_of_draws(
    head, size, temperature, fields, chunk, pool, tokenizer, visit
):
    with served(tokenizer, head, size) as (_, _, url):
        page = visit(url)
        chunk_size = f"{size} token{'' if size == 1 else 's'} per chunk"
        assert page.locator("#facts").text_content() == f"{head.replace('_', ' ')} head, {chunk_size}"
        write(page, temperature=temperature, tokens=4 * size, **fields)
        open_chunk(page)
        assert re.fullmatch(chunk, page.locator("#chunk-facts").text_content())
        assert pool in page.locator("#pool-facts").text_content()
        page_text = page.locator("body").inner_text()
        assert not re.search(r"\b1 (draws|tokens|chunks|different chunks)\b|NaN|undefined|null", page_text)
        is_single = head != "energy" or temperature == 1
        assert ("draws ·" in page.locator("#continue .done").text_content()) == (
            not is_single and fields.get("draws") != 1
        )
        assert page.get_by_label("Max draws").is_disabled() == is_single


@pytest.mark.parametrize("temperature", [1, 0.7, 0.5, 0.3, 0, 0.85])
def test_temperature_of_the_text_is_marked(temperature, tokenizer, visit):
    """Whatever is set afterwards."""
    with served(tokenizer, "sequential") as (_, _, url):
        page = visit(url)
        write(page, temperature=temperature)
        set_fields(page, temperature=0.1)
        open_chunk(page)
        heads = page.locator("#pool thead tr:last-child th")
        columns = [text.removesuffix("chosen") for text in heads.all_text_contents()]
        expected = sorted({1, 0.7, 0.5, 0.3, 0, temperature}, reverse=True)
        assert columns == [f"{value:g}" for value in expected]
        marked = page.locator("#pool th[aria-current=true]")
        assert marked.all_text_contents() == [f"{temperature:g}chosen"]
        index = expected.index(temperature)
        for row in page.locator("#pool tbody tr").all():
            classes = [cell.get_attribute("class") for cell in row.locator("td.share").all()]
            assert [("chosen" in names) for names in classes] == [
                number == index for number in range(len(expected))
            ]


def test_end_of_text_is_a_chunk_that_opens(tokenizer, visit):
    """Even if it contains no words."""
    model = tiny_model(4, vocab_size=320, head_config={"head_type": "sequential"})
    model.head.scores.bias.data[EOS] = 40.0
    with serving(model, tokenizer, temperature=1.0) as (_, _, url):
        page = visit(url)
        write(page)
        expect(page.locator("#continue .done")).to_contain_text("the model ended it")
        end = page.locator("#text .ends")
        assert end.bounding_box()["width"] > 10
        open_chunk(page)
        expect(page.locator("#pool .written .end")).to_have_text("end")
