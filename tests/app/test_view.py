"""The page of the command `view` in a real browser, without a server."""

import numpy as np
import trimesh
from PIL import Image

from diffusers_sparse3d import cli


def test_the_mesh_is_drawn_and_turns(browser, tmp_path):
    box = trimesh.creation.box(extents=(1, 2, 0.3))
    box.visual.face_colors = [200, 40, 40, 255]
    box.export(tmp_path / "box.glb")
    assert cli.main(["view", str(tmp_path / "box.glb"), "-o", str(tmp_path / "box.html"), "--no-browser"]) == 0
    page = browser.new_page(viewport={"width": 300, "height": 200})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "box.html").as_uri())
    page.wait_for_timeout(500)

    def picture(name):
        page.screenshot(path=str(tmp_path / name))
        return np.asarray(Image.open(tmp_path / name).convert("RGB"), dtype=int)

    before = picture("before.png")
    red = before[..., 0] - before[..., 1] > 40
    assert 0.02 < red.mean() < 0.6
    page.mouse.move(150, 100)
    page.mouse.down()
    page.mouse.move(230, 100, steps=3)
    page.mouse.up()
    page.wait_for_timeout(300)
    assert (abs(picture("after.png") - before).max(axis=-1) > 20).mean() > 0.02
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.close()
