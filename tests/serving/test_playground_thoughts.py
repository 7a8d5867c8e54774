"""Continuous thoughts on the page, for a model that was trained to think."""

import json

import pytest
from playground_page import open_chunk, say, set_fields, write
from playwright.sync_api import expect
from serving_client import PROMPT, generate_text, serving
from tiny import thinking_model


@pytest.fixture(scope="module")
def thinker():
    return thinking_model(3, vocab_size=320)


@pytest.fixture(scope="module")
def thinking_server(thinker, tokenizer):
    with serving(thinker, tokenizer, max_thoughts=20, temperature=1.0) as server:
        yield server


def record_requests(page):
    """Paths and bodies of all POST requests from now on."""
    sent = []
    page.on(
        "request",
        lambda request: (
            sent.append((request.url.partition("/v1/")[2], json.loads(request.post_data)))
            if request.method == "POST"
            else None
        ),
    )
    return sent


@pytest.mark.parametrize(("chosen", "number"), [(None, 3), (0, 0), (12, 12)])
def test_number_of_thoughts_can_be_chosen(chosen, number, thinking_server, thinker, tokenizer, visit):
    """The default is the number that the model was trained with. Pools of a text use its number."""
    _, _, url = thinking_server
    page = visit(url)
    sent = record_requests(page)
    write(page, PROMPT, tokens=8, seed=5, **({} if chosen is None else {"thoughts": chosen}))
    assert page.get_by_label("Thoughts").input_value() == str(number)
    expected = generate_text(
        thinker, tokenizer, PROMPT, max_new_tokens=8, seed=5, temperature=1.0, num_thoughts=number
    )
    assert page.locator("#text").text_content() == PROMPT + expected
    status = page.locator("#continue .done").text_content()
    assert status.startswith(f"{number} thoughts · " if number else "2 chunks · ")
    set_fields(page, thoughts=7)  # For the next text, not for this one.
    open_chunk(page, 1)
    assert [(path, body["num_thoughts"]) for path, body in sent] == [
        ("completions", number),
        ("calm/pool", number),
    ]


def test_a_chat_thinks_before_each_answer(thinking_server, visit):
    _, _, url = thinking_server
    page = visit(url)
    page.get_by_text("Chat", exact=True).click()
    sent = record_requests(page)
    for turn, number in enumerate((3, 1)):
        set_fields(page, thoughts=number, tokens=8)
        say(page, "Hello", turn + 1)
    page.locator("#turns [role=button]").first.click()
    page.locator("#pool").wait_for()
    assert [body["num_thoughts"] for _, body in sent] == [3, 1, 3]
    expect(page.locator("#turns .done").last).to_contain_text("1 thought ·")


@pytest.mark.parametrize("value", [-1, 21, 1.5, ""])
def test_number_out_of_range_is_reported_at_its_field(value, thinking_server, visit):
    _, _, url = thinking_server
    page = visit(url)
    set_fields(page, thoughts=value)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#thoughts-wrong")).to_have_text("A whole number from 0 to 20.")
    expect(page.locator("#thoughts")).to_be_focused()
    page.locator("#thoughts").fill("2")
    expect(page.locator("#thoughts-wrong")).to_be_hidden()


def test_refusal_of_the_server_is_shown_at_the_field(thinking_server, visit):
    _, _, url = thinking_server
    page = visit(url)
    page.evaluate("document.getElementById('thoughts').max = 1000")
    set_fields(page, thoughts=30)
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#thoughts-wrong")).to_have_text("'num_thoughts' must be at most 20.")
    assert page.locator("#thoughts").get_attribute("aria-invalid") == "true"


def test_field_is_hidden_for_other_models(server, visit):
    _, _, url = server
    page = visit(url)
    sent = record_requests(page)
    write(page, tokens=4)
    open_chunk(page)
    assert page.locator("#thoughts").is_hidden()
    assert len(sent) == 2 and not any("num_thoughts" in body for _, body in sent)
    expect(page.locator("#continue .done")).to_contain_text("1 chunk ·")
