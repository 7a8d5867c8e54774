"""The page at /: by itself over HTTP, and as a person sees it in Chromium where there is one."""

import re
import shutil
from collections import Counter

import httpx
import pytest
import torch
from serving_client import serving

from calm.core.temperature import distribution_of_pool, sample_from_pool

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_takes_nothing_from_elsewhere(server):
    _, _, url = server
    page = httpx.get(url)
    assert page.status_code == 200 and "default-src 'self'" in page.headers["content-security-policy"]
    parts = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
    assert sorted(parts) == ["/page/playground.css", "/page/playground.js"]
    texts = [page.text, *(httpx.get(url + part).text for part in parts)]
    assert not any("http://" in text or "https://" in text for text in texts)
    assert not any("innerHTML" in text for text in texts), "text of the model is never taken for HTML"
    assert httpx.get(f"{url}/page/app.py").status_code == 404


def pool_of(url, **changes):
    body = {"model": "tiny", "prompt": "Once upon", "num_draws": 64, "seed": 1, **changes}
    return httpx.post(f"{url}/v1/calm/pool", json=body, timeout=30)


def test_a_pool_is_what_the_head_draws(server, model, tokenizer):
    """The counts of draws behind the prompt and what was written, and the distribution of the pool rule."""
    _, _, url = server
    ids = tokenizer("Once upon")["input_ids"]
    written = [7, 8, 9, 10]
    pool = pool_of(url, written=written, temperatures=[1.0, 0.5, 0.0], num_draws=1000, most=1000).json()
    counts = [candidate["count"] for candidate in pool["candidates"]]
    assert sum(counts) == 1000 == pool["num_draws"] and pool["num_different"] == len(counts)
    assert counts == sorted(counts, reverse=True)
    for place, temperature in enumerate(pool["temperatures"]):
        distribution = distribution_of_pool(torch.tensor(counts), temperature)
        assert [c["chances"][place] for c in pool["candidates"]] == pytest.approx(distribution.tolist())
    front = -len(ids) % 4
    padded = torch.tensor([[0] * front + ids + written])
    mask = (torch.arange(padded.shape[1]) >= front).long().unsqueeze(0)
    hidden = model.hidden_states_of_chunks(padded, mask)[:, -1]
    drawn = Counter(map(tuple, model.draw_chunks(hidden, 4000)[:, 0].tolist()))
    for candidate in pool["candidates"][:3]:  # Standard errors of about 1.5%.
        share = drawn[tuple(candidate["token_ids"])] / 4000
        assert candidate["count"] / 1000 == pytest.approx(share, abs=0.07)


def test_the_distribution_of_a_pool_is_that_of_its_sampler():
    counts = torch.tensor([9, 5, 3, 2, 1])
    pool = torch.arange(5).repeat_interleave(counts).reshape(-1, 1, 1)
    for settings in ({"temperature": 0.5}, {"temperature": 0.4}, {"temperature": 1, "top_p": 0.6},
                     {"temperature": 0.7, "min_p": 0.3}, {"temperature": 0.0}):  # fmt: skip
        distribution = distribution_of_pool(counts, **settings)
        assert distribution.sum() == pytest.approx(1)
        generator = torch.Generator().manual_seed(0)
        wide = pool.expand(-1, 20_000, -1)
        chosen = sample_from_pool(wide, randomness=generator, **settings).chunks_RK.flatten()
        shares = torch.bincount(chosen, minlength=5) / 20_000
        assert (shares - distribution).abs().max() < 0.015


BAD = {
    "draws": ({"num_draws": 5000}, "may be 1000 at most"),
    "few draws": ({"num_draws": 1, "temperatures": [0.5]}, "needs at least 2 draws"),
    "temperature": ({"temperatures": [2.0]}, "between 0 and 1"),
    "written": ({"written": [5]}, "whole chunks of 4"),
    "ids": ({"prompt": [999]}, "token ids of 'prompt'"),
    "ids after": ({"written": [5, 6, 7, 999]}, "token ids of 'written'"),
    "not whole": ({"written": [5, 6.5]}, "written[1]: a token id is a whole number, got 6.5"),
    "many temperatures": ({"temperatures": [1] * 17}, "may hold 16 values at most"),
    "long": ({"prompt": [5] * 256}, "no room after"),
    "unknown": ({"color": 1}, "there is no argument 'color'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_pools(changes, message, server):
    _, _, url = server
    answer = pool_of(url, **changes)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-background-networking", "--disable-sync"],
        )
        yield browser
        browser.close()


def test_a_person_writes_and_looks_into_a_chunk(server, browser):
    _, client, url = server
    page = browser.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(url)
    assert not page.get_by_label("Key").is_visible()
    page.get_by_label("Prompt").fill("Once <b>upon</b>")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Most draws").fill("30")
    page.get_by_role("button", name="Write").click()
    page.get_by_text("3 chunks").wait_for()
    text = client.completions.create(
        model="tiny", prompt="Once <b>upon</b>", max_tokens=12, seed=5, temperature=1,
        extra_body={"max_draws": 30, "num_draws": 30},
    ).choices[0].text  # fmt: skip
    assert page.locator("#text").text_content() == "Once <b>upon</b>" + text
    chunks = page.locator("#text [role=button]")
    assert chunks.count() == 3
    chunks.nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#pool tr:nth-child(3)")
    assert page.locator("#chunk-title").text_content() == "Chunk 2"
    assert page.locator("#chunk-tokens .token").count() == 4
    assert "30 fresh draws gave" in page.locator("#pool-facts").text_content()
    heads = page.locator("#pool th").all_text_contents()
    assert heads == ["candidate", "draws", "", "T = 1", "T = 0.7", "T = 0.5", "T = 0.3", "T = 0"]
    assert chunks.nth(1).get_attribute("aria-pressed") == "true"
    assert problems == []


def test_a_person_is_told_what_is_wrong_and_may_stop(model, tokenizer, browser, monkeypatch):
    import time

    from calm.models.writing.batching import ChunkBatch

    step = ChunkBatch.step
    monkeypatch.setattr(ChunkBatch, "step", lambda self: (time.sleep(0.1), step(self))[1])
    with serving(model, tokenizer, api_key="k", temperature=1.0) as (engine, _, url):
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector("#state.wrong")
        assert "API key is missing or wrong" in page.locator("#state").text_content()
        page.get_by_label("Key").fill("k")
        page.get_by_label("Most tokens").fill("200")
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector("#text [role=button]:nth-of-type(3)")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text("stopped", exact=True).wait_for()
        deadline = time.monotonic() + 5
        while engine.num_rows and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.num_rows == 0
