#!/usr/bin/env python
"""Takes the pictures of the web app for the documents, with the small pipeline and a headless Chromium.

    python docs/figures/screenshots.py [--dense-steps 6] [--steps 2] [--seeds 2]

It takes the extras `app` and `dev`, and a browser called `chromium`. Fewer steps are quicker and look worse.
"""

import argparse
import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from diffusers_sparse3d.app.server import ServerSettings, start_app
from diffusers_sparse3d.cli.models import load_pipeline, resolve_model


ROOT = Path(__file__).resolve().parents[2]
WAIT = 3_600_000


def save(page: Page, name: str) -> None:
    """Writes what is on the page, with few colours, since documents are read over the network."""
    picture = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(128).save(ROOT / "docs" / name, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photo", type=Path, default=ROOT / "examples" / "sofa.png")
    parser.add_argument("--dense-steps", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()

    blocks, address = start_app(load_pipeline(resolve_model(None), "cpu", "float32"), ServerSettings(), block=False)
    flags = ("--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-background-networking")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1180, "height": 860})
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.locator("#photo input[type=file]").set_input_files(str(args.photo))
        page.locator("#cut-out img").wait_for()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("number input for Steps, rough shape").fill(str(args.dense_steps))
        page.get_by_label("number input for Steps, detail").fill(str(args.steps))
        page.get_by_label("number input for Meshes").fill(str(args.seeds))
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name="Generate").click()
        page.locator("#status", has_text="Adding detail").first.wait_for()
        page.wait_for_timeout(4000)
        save(page, "app_progress.png")
        page.locator("#status", has_text="Done: ").wait_for()
        page.wait_for_timeout(8000)
        save(page, "app.png")
        browser.close()
    blocks.close()


if __name__ == "__main__":
    main()
