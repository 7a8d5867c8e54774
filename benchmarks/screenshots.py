"""Pictures of the playground for docs/serving.md: 1280 and 390 pixels wide, light and dark.

    python examples/conversations.py conversations.jsonl
    calm finetune --recipe full --model stories --examples.sources conversations.jsonl --output runs/chat
    python benchmarks/screenshots.py --chat runs/chat/model

It needs Chromium; fonts are those of the machine, Inter first.
"""

import argparse
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

SIZES = {"1280": (1280, 860), "390": (390, 844)}
MODES = ("light", "dark")
COLORS = 96  # Of a picture: flat surfaces and one accent need no more.
QUESTIONS = ("Tell me a story about a girl named Anna.", "What happened next?", "Who is the story about?")


@contextmanager
def served(model: str) -> Iterator[str]:
    """A server of a model; where its page is."""
    command = [sys.executable, "-m", "calm", "serve", model, "--port", "0", "--name", "stories"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[1] for line in process.stdout if line.startswith("playground:"))
        finally:
            process.terminate()


def set_up(page: Page, url: str, seed: int) -> None:
    """Open the page and choose what decides the text."""
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Most tokens").fill("160")
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Settings").click()


def write(page: Page, url: str) -> None:
    """A text with an opened chunk."""
    set_up(page, url, seed=3)
    page.get_by_role("button", name="Write").click()
    page.locator("#continue .foot").wait_for()
    open_chunk(page, "#text", 6)


def chat(page: Page, url: str) -> None:
    """A conversation; where there is room, with an opened chunk."""
    set_up(page, url, seed=1)
    page.get_by_text("Chat", exact=True).click()
    for number, question in enumerate(QUESTIONS):
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Control+Enter")
        page.locator("#turns .foot").nth(number).wait_for()
    if (page.viewport_size or {})["width"] > 1000:
        open_chunk(page, "#turns li:nth-child(2)", 6)


def open_chunk(page: Page, text: str, number: int) -> None:
    """See what else a chunk could have been."""
    page.locator(f"{text} [role=button]").nth(number).click()
    page.locator("#pool").wait_for()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="stories", help="what writes")
    parser.add_argument("--chat", required=True, help="what chats: a model with a chat template")
    parser.add_argument("--output", type=Path, default=Path("docs/plots"))
    arguments = parser.parse_args()
    with sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for name, model, act in (("write", arguments.model, write), ("chat", arguments.chat, chat)):
            with served(model) as url:
                for size, (width, height) in SIZES.items():
                    for mode in MODES:
                        context = browser.new_context(
                            viewport={"width": width, "height": height},
                            color_scheme=mode,  # type: ignore[arg-type]
                            reduced_motion="reduce",
                            device_scale_factor=2 if width < 1000 else 1.5,
                            is_mobile=width < 1000,
                            has_touch=width < 1000,
                        )
                        page = context.new_page()
                        act(page, url)
                        page.mouse.move(0, 0)
                        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
                        path = arguments.output / f"playground_{name}_{size}_{mode}.png"
                        picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
                        context.close()
        browser.close()


if __name__ == "__main__":
    main()
