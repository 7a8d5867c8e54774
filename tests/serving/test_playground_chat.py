"""Chatting on the page."""

import copy

from playground_page import open_chunk, say, set_fields
from playwright.sync_api import expect
from serving_client import serving, slow_down_steps, wait_until


def test_conversation_on_the_page(server, visit):
    _, client, url = server
    page = visit(url)
    set_fields(page, tokens=12, seed=3)
    page.get_by_text("Chat", exact=True).click()
    page.get_by_text("System prompt").first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    answers = page.locator("#turns .assistant .bubble")
    for number, message in enumerate(("Hello <i>you</i>", "And then?"), start=1):
        messages.append({"role": "user", "content": message})
        say(page, message, number)
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, seed=3, temperature=1
        ).choices[0].message.content  # fmt: skip
        messages.append({"role": "assistant", "content": answer})
        assert answers.nth(number - 1).text_content() == answer.lstrip()
    expect(page.locator("#chat .hint")).to_be_visible()
    assert page.locator("#turns .user .bubble").all_text_contents() == ["Hello <i>you</i>", "And then?"]
    with page.expect_request("**/v1/calm/pool") as pool_request:
        open_chunk(page, 1, "#turns li:nth-child(2)")
    body = pool_request.value.post_data_json
    assert body["messages"] == messages[:2] and len(body["written"]) == 4
    assert page.locator("#chunk-title").text_content() == "Chunk 2 of 3"
    page.locator("#turns .copy").nth(1).click()
    page.get_by_text("Copied").first.wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == messages[-1]["content"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#turns li")).to_have_count(0)
    expect(page.locator("#chunk")).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.get_by_text("Say something to begin")).to_be_visible()


def test_failed_or_stopped_answer_loses_nothing(model, tokenizer, visit, monkeypatch):
    with serving(model, tokenizer, temperature=1.0) as (engine, _, url):
        page = visit(url)
        page.get_by_text("Chat", exact=True).click()
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#message-wrong")).to_have_text("Write a message first.")
        page.get_by_label("Message").fill("a" * 10_000)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#chat .failure")).to_contain_text("cannot fit in the context")
        expect(page.get_by_label("Message")).to_have_value("a" * 10_000)
        expect(page.locator("#turns li")).to_have_count(0)
        slow_down_steps(monkeypatch, 0.1)
        page.get_by_label("Message").fill("Hello")
        page.keyboard.press("Control+Enter")
        page.locator("#turns [role=button]").nth(1).wait_for()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#turns .done")).to_contain_text("stopped")
        wait_until(lambda: engine.num_rows == 0)
        monkeypatch.undo()
        set_fields(page, tokens=8)
        with page.expect_request("**/v1/chat/completions") as request:
            say(page, "Again", 2)
        messages = request.value.post_data_json["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"]


def test_chat_is_hidden_without_a_chat_template(model, tokenizer, visit):
    without_template = copy.deepcopy(tokenizer)
    without_template.chat_template = None
    with serving(model, without_template) as (_, _, url):
        page = visit(url)
        expect(page.locator("#modes")).to_be_hidden()
