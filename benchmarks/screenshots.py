"""Take pictures of the playground for docs/serving.md: 1280 and 390 pixels wide, light and dark.

    python examples/conversations.py conversations.jsonl
    calm finetune --recipe full --model stories --examples.sources conversations.jsonl --output runs/chat
    python benchmarks/screenshots.py --chat runs/chat/model

It needs Chromium, and uses the fonts of the machine, Inter first.
"""

import argparse
import io
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

Mode = Literal["light", "dark"]
Action = Callable[[Page, str], None]
SIZES = ((1280, 860), (390, 844))
MODES: tuple[Mode, ...] = ("light", "dark")
COLORS = 96  # Enough for flat surfaces and one accent.
QUESTIONS = ("Tell me a story about a girl named Anna.", "What happened next?", "Who is the story about?")


@contextmanager
def served(model: str) -> Iterator[str]:
    """Serve a model, and provide the URL of its page."""
    command = [sys.executable, "-m", "calm", "serve", model, "--port", "0", "--name", "stories"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield next(line.split()[1] for line in process.stdout if line.startswith("playground:"))
        finally:
            process.terminate()


def set_up(page: Page, url: str, seed: int) -> None:
    """Open the page, and set the options that determine the text."""
    page.goto(url)
    page.wait_for_selector("#model:not(:empty)")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill("160")
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Settings").click()


def write(page: Page, url: str) -> None:
    """Generate a text, and open a chunk."""
    set_up(page, url, seed=3)
    page.get_by_role("button", name="Write").click()
    page.locator("#continue .foot").wait_for()
    open_chunk(page, "#text", 6)


def chat(page: Page, url: str) -> None:
    """Hold a conversation; on a wide screen, open a chunk."""
    set_up(page, url, seed=1)
    page.get_by_text("Chat", exact=True).click()
    for number, question in enumerate(QUESTIONS):
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Control+Enter")
        page.locator("#turns .foot").nth(number).wait_for()
    size = page.viewport_size
    if size is not None and not is_phone(size["width"]):
        open_chunk(page, "#turns li:nth-child(2)", 6)


def open_chunk(page: Page, text: str, number: int) -> None:
    """Show the alternatives of a chunk."""
    page.locator(f"{text} [role=button]").nth(number).click()
    page.locator("#pool").wait_for()


def is_phone(width: int) -> bool:
    """Whether a window is as narrow as that of a phone."""
    return width < 1000


def take(browser: Browser, action: Action, url: str, size: tuple[int, int], mode: Mode, path: Path) -> None:
    """Take one picture, after an action on the page."""
    phone = is_phone(size[0])
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme=mode,
        reduced_motion="reduce",
        device_scale_factor=2 if phone else 1.5,
        is_mobile=phone,
        has_touch=phone,
    )
    page = context.new_page()
    action(page, url)
    page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    context.close()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="stories", help="what writes")
    parser.add_argument("--chat", required=True, help="what chats: a model with a chat template")
    parser.add_argument("--output", type=Path, default=Path("docs/plots"))
    arguments = parser.parse_args()
    actions: dict[str, tuple[str, Action]] = {
        "write": (arguments.model, write),
        "chat": (arguments.chat, chat),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for name, (model, action) in actions.items():
            with served(model) as url:
                for size, mode in itertools.product(SIZES, MODES):
                    path = arguments.output / f"playground_{name}_{size[0]}_{mode}.png"
                    take(browser, action, url, size, mode, path)
        browser.close()


if __name__ == "__main__":
    main()
