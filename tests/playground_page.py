"""What a user does on the playground page, for tests in a browser."""

from serving_client import serving
from tiny import tiny_model


def served(tokenizer, head_type, size=4, **settings):
    model = tiny_model(size, vocab_size=320, head_config={"head_type": head_type})
    return serving(model, tokenizer, **{"temperature": 1.0, **settings})


def set_fields(page, temperature=None, **fields):
    if temperature is not None:
        page.get_by_label("Temperature").fill(str(temperature))
    names = {
        "tokens": "Max tokens",
        "draws": "Max draws per chunk",
        "thoughts": "Thoughts",
        "seed": "Seed",
        "key": "Key",
    }
    if page.locator("#settings").is_hidden():
        page.get_by_role("button", name="Settings").click()
    for name, value in fields.items():
        page.get_by_label(names[name]).fill(str(value))


def write(page, prompt="Once upon", tokens=12, seed=5, **fields):
    set_fields(page, tokens=tokens, seed=seed, **fields)
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Write").click()
    page.locator("#continue .foot").wait_for()


def open_chunk(page, number=0, text="#text"):
    page.locator(f"{text} [role=button]").nth(number).click()
    page.locator("#pool").wait_for()


def say(page, message, answers):
    page.get_by_label("Message").fill(message)
    page.keyboard.press("Control+Enter")
    page.locator("#turns .foot").nth(answers - 1).wait_for()
