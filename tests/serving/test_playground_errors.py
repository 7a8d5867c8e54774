"""Errors on the page are shown where they belong."""

import pytest
from playground_page import set_fields, write
from playwright.sync_api import expect
from serving_client import serving, slow_down_steps, wait_until

from calm.models.calm import CalmForCausalLM
from calm.models.generation.batching import ChunkBatch

INVALID = {
    "no tokens": ("tokens", 0, "A whole number from 1 to 4,096."),
    "many tokens": ("tokens", 5000, "A whole number from 1 to 4,096."),
    "half a token": ("tokens", 1.5, "A whole number from 1 to 4,096."),
    "nothing": ("tokens", "", "A whole number from 1 to 4,096."),
    "many draws": ("draws", 1001, "A whole number from 1 to 1,000."),
    "half a seed": ("seed", 0.5, "A whole number of up to 15 digits, or empty for a random one."),
    "too few draws": ("draws", 2, "A temperature of 0.3 needs at least 4 draws, got max_draws=2."),
}


@pytest.mark.parametrize(("field", "value", "sentence"), INVALID.values(), ids=INVALID)
def test_error_is_shown_at_its_field(field, value, sentence, server, visit):
    """Whether the page or the server finds it; collapsed settings open."""
    _, _, url = server
    page = visit(url)
    set_fields(page, temperature=0.3, **{field: value})
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Write").click()
    expect(page.locator(f"#{field}-wrong")).to_have_text(sentence)
    expect(page.locator(f"#{field}")).to_be_focused()
    assert page.locator(f"#{field}").get_attribute("aria-invalid") == "true"
    assert page.locator(f"#{field}").get_attribute("aria-describedby") == f"{field}-wrong"
    page.locator(f"#{field}").fill("8")
    expect(page.locator(f"#{field}-wrong")).to_be_hidden()
    page.get_by_role("button", name="Write").click()
    page.locator("#continue .foot").wait_for()


def test_overlong_prompt_is_refused_at_its_field(server, visit):
    _, _, url = server
    page = visit(url)
    page.get_by_label("Prompt", exact=True).fill("a" * 10_000)
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#prompt-wrong")).to_contain_text("cannot fit in the context")
    expect(page.get_by_text("Nothing written yet")).to_be_visible()


def test_key_is_asked_for_and_generation_can_be_stopped(model, tokenizer, visit, monkeypatch):
    slow_down_steps(monkeypatch, 0.1)
    with serving(model, tokenizer, api_key="k", temperature=1.0) as (engine, _, url):
        page = visit(url)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#key-wrong")).to_contain_text("API key is missing or wrong")
        set_fields(page, key="k", tokens=200)
        page.get_by_role("button", name="Write").click()
        page.locator("#text [role=button]").nth(2).wait_for()
        assert page.get_by_role("button", name="Write").count() == 0
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#continue .done")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Write")).to_be_focused()
        wait_until(lambda: engine.num_rows == 0)


def test_lost_server_is_reported(model, tokenizer, visit):
    """Before a pool, before a text, and in the middle of a text."""
    gone = "The server does not answer. Is calm serve still running?"
    with serving(model, tokenizer, temperature=1.0) as (_, _, url):
        page = visit(url)
        write(page)
        page.route("**/v1/calm/pool", lambda route: route.abort())
        page.locator("#text [role=button]").first.click()
        expect(page.locator("#pool-failure")).to_have_text(gone)
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#continue .failure")).to_have_text(gone)
    event = (
        'data: {"choices": [{"text": "Half", "finish_reason": null, "chunks": [{"token_ids": [5, 6, 7, 8], '
    )
    event += '"tokens": ["a", "b", "c", "d"], "num_draws": 1, "agreement": 1, "fell_back": false}]}]}\n\n'
    page.route("**/v1/completions", lambda route: route.fulfill(body=event, content_type="text/event-stream"))
    page.get_by_role("button", name="Write").click()
    expect(page.locator("#continue .failure")).to_contain_text("broke in the middle of the text")
    expect(page.locator("#text")).to_contain_text("Half")


def test_failure_within_a_text_is_reported_below_it(model, tokenizer, visit, monkeypatch):
    step, steps = ChunkBatch.step, iter(range(3))

    def three_steps(self):
        next(steps)  # The fourth raises StopIteration.
        return step(self)

    monkeypatch.setattr(ChunkBatch, "step", three_steps)
    with serving(model, tokenizer, temperature=1.0) as (_, _, url):
        page = visit(url)
        page.get_by_role("button", name="Write").click()
        expect(page.locator("#continue .failure")).to_contain_text("The generation of the text failed")
        assert page.locator("#text [role=button]").count() == 3
        monkeypatch.setattr(CalmForCausalLM, "draw_chunks", lambda *_: 1 / 0)
        page.locator("#text [role=button]").first.click()
        expect(page.locator("#pool-failure")).to_contain_text("Internal server error; see req_")
