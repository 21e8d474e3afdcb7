"""The web app as a person uses it: a real browser, a real server, a tiny pipeline."""

import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from tests.pipelines.tiny import tiny_image


WAIT = 60_000


@pytest.fixture
def open_page(browser, address):
    """Opens pages; at the end, none of them may have asked another server or met an error in its scripts."""
    contexts, foreign, errors = [], [], []

    def open_new(width: int = 1280, height: int = 900):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: is_foreign(request.url) and foreign.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for(timeout=WAIT)
        return page

    def is_foreign(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    yield open_new
    for context in contexts:
        context.close()
    assert foreign == [] and errors == []


def upload(page, path):
    page.locator("#photo input[type=file]").set_input_files(str(path))
    page.locator("#cut-out img").wait_for(timeout=WAIT)


def status(page):
    return page.locator("#status").inner_text()


def wait_for_status(page, text):
    page.locator("#status", has_text=text).wait_for(timeout=WAIT)


def set_steps(page):
    page.get_by_role("button", name="Settings").click()
    for name in ("Steps, rough shape", "Steps, detail"):
        page.get_by_label(f"number input for {name}").fill("1")


def test_photo_to_a_mesh_that_turns_and_downloads(open_page, tmp_path):
    tiny_image().save(tmp_path / "photo.png")
    # Small, since the browser draws without a GPU.
    page = open_page(400, 700)
    assert status(page).startswith("Waiting")
    upload(page, tmp_path / "photo.png")
    wait_for_status(page, "Ready")
    set_steps(page)
    page.get_by_label("Triangles").fill("500")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "Done: ")
    faces = int(re.search(r"([\d,]+) triangles", status(page)).group(1).replace(",", ""))

    canvas = page.locator("#mesh canvas")
    canvas.wait_for(timeout=WAIT)
    page.wait_for_timeout(500)
    canvas.scroll_into_view_if_needed()
    before = np.asarray(Image.open(shot(canvas, tmp_path / "before.png")).convert("L"), dtype=int)
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y + 10, steps=2)
    page.mouse.up()
    page.wait_for_timeout(800)
    after = np.asarray(Image.open(shot(canvas, tmp_path / "after.png")).convert("L"), dtype=int)
    assert before.std() > 2 and (abs(before - after) > 8).mean() > 0.01

    page.get_by_role("button", name="Make a file").click()
    link = page.locator("#download a[download]").first
    link.wait_for(timeout=WAIT)
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "mesh.glb"
    download.value.save_as(tmp_path / "mesh.glb")
    assert len(trimesh.load(tmp_path / "mesh.glb", force="mesh").faces) == faces


def shot(locator, path):
    locator.screenshot(path=str(path))
    return path


def test_several_seeds_and_keep_this_one(open_page, tmp_path):
    tiny_image().save(tmp_path / "photo.png")
    page = open_page()
    upload(page, tmp_path / "photo.png")
    set_steps(page)
    page.get_by_label("number input for Meshes").fill("2")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "choose the one to keep")
    buttons = page.get_by_role("button", name="Keep this one")
    assert buttons.count() == 2
    page.get_by_role("button", name="Make a file").click()
    page.get_by_text("Choose the mesh to keep first").wait_for(timeout=WAIT)
    buttons.nth(1).click()
    buttons.first.wait_for(state="hidden", timeout=WAIT)
    page.get_by_role("button", name="Make a file").click()
    wait_for_status(page, "The file is ready")


def test_several_photos_with_a_mesh_of_each(open_page, tmp_path):
    for color in ("red", "blue"):
        tiny_image(color).save(tmp_path / f"{color}.png")
    page = open_page()
    page.get_by_role("button", name="More photos").click()
    files = [str(tmp_path / f"{color}.png") for color in ("red", "blue")]
    page.locator("#more-photos input[type=file]").set_input_files(files)
    page.locator("#cut-outs img").nth(1).wait_for(timeout=WAIT)
    set_steps(page)
    page.get_by_label("number input for Meshes").fill("2")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "choose the one to keep of each photo")
    buttons = page.get_by_role("button", name="Keep this one")
    assert buttons.count() == 4
    page.get_by_text("Photo 2, seed 1").first.wait_for(timeout=WAIT)
    buttons.nth(3).click()
    page.get_by_role("button", name="Show this one").wait_for(timeout=WAIT)
    buttons.nth(0).click()
    page.get_by_role("button", name="Show this one").nth(1).wait_for(timeout=WAIT)
    assert buttons.count() == 0
    page.get_by_role("button", name="Make a file").click()
    wait_for_status(page, "2 files are ready")
    links = page.locator("#download a[download]")
    assert [links.nth(index).get_attribute("download") for index in range(2)] == ["mesh_1.glb", "mesh_2.glb"]


def test_what_is_finished_can_be_kept_after_a_stop(open_page, tmp_path):
    tiny_image().save(tmp_path / "photo.png")
    page = open_page()
    upload(page, tmp_path / "photo.png")
    set_steps(page)
    page.get_by_label("number input for Steps, detail").fill("80")
    page.get_by_label("number input for Meshes").fill("4")
    page.get_by_role("button", name="Generate").click()
    # On a busy machine the page does not show every status.
    wait_for_status(page, re.compile("Mesh [34] of 4"))
    page.get_by_role("button", name="Stop").click()
    wait_for_status(page, "Stopped: choose the one to keep")
    buttons = page.get_by_role("button", name="Keep this one")
    buttons.nth(1).click()
    buttons.first.wait_for(state="hidden", timeout=WAIT)
    page.get_by_role("button", name="Make a file").click()
    wait_for_status(page, "The file is ready")


def test_stop_and_start_again(open_page, tmp_path):
    tiny_image().save(tmp_path / "photo.png")
    page = open_page()
    upload(page, tmp_path / "photo.png")
    set_steps(page)
    steps = [page.get_by_label(f"number input for Steps, {stage}") for stage in ("rough shape", "detail")]
    for field in steps:
        field.fill("100")
    page.get_by_label("number input for Meshes").fill("4")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, " of 4: ")
    page.get_by_role("button", name="Stop").click()
    wait_for_status(page, "Stopped")
    # The rest would take ten seconds and more.
    assert all(thread.name != "generation" for thread in threading.enumerate())
    for field in steps:
        field.fill("1")
    page.get_by_label("number input for Meshes").fill("1")
    page.get_by_role("button", name="Generate").click()
    wait_for_status(page, "Done: ")


def test_a_bad_file_and_no_file(open_page, tmp_path):
    page = open_page()
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("Give a photo first").wait_for(timeout=WAIT)
    (tmp_path / "text.png").write_text("no picture")
    page.locator("#photo input[type=file]").set_input_files(str(tmp_path / "text.png"))
    page.get_by_text(re.compile("Error|error|cannot identify")).first.wait_for(timeout=WAIT)
    for secret in (str(Path(__file__).parents[2]), sys.prefix, "Traceback", str(tmp_path)):
        assert secret not in page.content()
    # It works again with a good one.
    tiny_image().save(tmp_path / "photo.png")
    page.reload()
    upload(page, tmp_path / "photo.png")
    wait_for_status(page, "Ready")


def test_two_users_at_once(open_page, tmp_path):
    pages = [open_page(), open_page()]
    for page, color in zip(pages, ("red", "blue")):
        tiny_image(color).save(tmp_path / f"{color}.png")
        upload(page, tmp_path / f"{color}.png")
        set_steps(page)
    for page in pages:
        page.get_by_role("button", name="Generate").click()
    for page in pages:
        wait_for_status(page, "Done: ")


def test_keyboard_labels_and_small_screens(open_page):
    page = open_page(360, 740)
    # Nothing is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # The main button is reached by the Tab key and pressed by Enter.
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Generate":
            break
    page.keyboard.press("Enter")
    page.get_by_text("Give a photo first").wait_for(timeout=WAIT)
    # Everything that can be operated has a name.
    nameless = page.evaluate("""
        [...document.querySelectorAll("button, input, select, textarea")].filter(element =>
            element.offsetParent && !(element.ariaLabel || element.innerText.trim() || element.title
            || element.labels?.length || element.getAttribute("aria-labelledby"))
        ).map(element => element.outerHTML.slice(0, 120))
    """)
    assert nameless == []


# Text whose colour differs from its background by less than 4.5 to 1, the limit of WCAG AA for small text.
CONTRAST = """() => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    const over = (color, below) => {
        context.fillStyle = `rgb(${below})`;
        context.fillRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const background = element => over(
        getComputedStyle(element).backgroundColor,
        element.parentElement ? background(element.parentElement) : [255, 255, 255]);
    const luminance = color => color.map(value => value / 255)
        .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const weak = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].filter(node => node.nodeType === 3).map(node => node.data.trim()).join("");
        if (!own || !element.checkVisibility() || ["SCRIPT", "STYLE", "OPTION"].includes(element.tagName)) continue;
        const below = background(element), color = over(getComputedStyle(element).color, below);
        const [low, high] = [luminance(color), luminance(below)].sort((a, b) => a - b);
        const ratio = (high + 0.05) / (low + 0.05);
        if (ratio < 4.5) weak.push(`${ratio.toFixed(2)} ${own.slice(0, 40)}`);
    }
    return weak;
}"""


def test_text_stands_out(open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    assert page.evaluate(CONTRAST) == []
