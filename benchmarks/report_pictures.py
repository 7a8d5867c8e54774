"""Take pictures of reports: 1280 and 390 pixels wide, light and dark.

    calm demo --output runs/demo
    python benchmarks/report_pictures.py runs/demo/report.html --output pictures

It needs Chromium. With --height, only the top of each page is taken, else all of it.
"""

import argparse
import io
import itertools
import shutil
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

Mode = Literal["light", "dark"]
WIDTHS = (1280, 390)
MODES: tuple[Mode, ...] = ("light", "dark")
COLORS = 128  # Enough for flat surfaces and a few series.


def take(browser: Browser, report: Path, width: int, height: int | None, mode: Mode, path: Path) -> None:
    """Take one picture of a report."""
    context = browser.new_context(
        viewport={"width": width, "height": height or 800},
        color_scheme=mode,
        device_scale_factor=2 if width < 1000 else 1,
    )
    page = context.new_page()
    page.goto(report.absolute().as_uri())
    picture = Image.open(io.BytesIO(page.screenshot(full_page=height is None))).convert("RGB")
    picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    context.close()


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("reports", nargs="+", type=Path, help="files that calm demo or calm compare wrote")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    parser.add_argument("--height", type=int, help="pixels of the top that are shown")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for report, width, mode in itertools.product(arguments.reports, WIDTHS, MODES):
            path = arguments.output / f"{report.parent.name}_{report.stem}_{width}_{mode}.png"
            take(browser, report, width, arguments.height, mode, path)
            print(path)
        browser.close()


if __name__ == "__main__":
    main()
