"""The web app with a tiny pipeline, and a headless browser."""

import importlib.util
import shutil

import pytest


if importlib.util.find_spec("gradio") is None:
    collect_ignore_glob = ["test_generation.py", "test_server.py"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Without a sandbox, which root has not, and without the connections that Chromium opens by itself.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--enable-unsafe-swiftshader")  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium of the system."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is none of {', '.join(BROWSERS)}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def address():
    """Where the app of a tiny pipeline listens."""
    pytest.importorskip("gradio")
    from diffusers_sparse3d.app.server import ServerSettings, start_app
    from tests.app.boxy import boxy_pipeline

    blocks, address = start_app(boxy_pipeline(), ServerSettings(max_upload=1), block=False)
    yield address
    blocks.close()
