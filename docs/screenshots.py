"""Pictures of a page, wide and narrow: `python docs/screenshots.py compare.html docs/page`."""

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZES = {"desktop": (1440, 900), "phone": (390, 844)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="a compare.html")
    parser.add_argument("out", help="what the names of the pictures start with")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--from", dest="start", default="h1", help="CSS selector of the top edge")
    parser.add_argument("--dataset", help="the data set to pick")
    parser.add_argument("--model", help="the model to pick")
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=root)
        for name, (width, height) in SIZES.items():
            size = {"width": width, "height": height}
            page = chromium.new_page(viewport=size, color_scheme=options.scheme)
            page.goto(options.page.resolve().as_uri())
            for pick in ("dataset", "model"):
                if getattr(options, pick):
                    page.select_option(f"[data-pick={pick}]", getattr(options, pick))
            page.locator(options.start).first.evaluate("element => element.scrollIntoView()")
            path = f"{options.out}-{name}.png"
            page.screenshot(path=path)
            print(path)
        chromium.close()


if __name__ == "__main__":
    main()
