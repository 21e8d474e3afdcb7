"""The page of the command `view`."""

import re

import trimesh

from diffusers_sparse3d import cli


def test_page_is_complete_and_asks_for_nothing(tmp_path, capsys):
    trimesh.creation.box().export(tmp_path / "box<1>.ply")
    page = tmp_path / "page.html"
    assert cli.main(["view", str(tmp_path / "box<1>.ply"), "-o", str(page), "--no-browser"]) == 0
    assert capsys.readouterr().out.strip() == str(page)
    text = page.read_text(encoding="utf-8")
    assert "<title>box&lt;1&gt;.ply</title>" in text and "THREE" in text
    assert not re.search(r"(src|href)=.https?:", text) and "import(" not in text


def test_the_browser_is_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    trimesh.creation.box().export(tmp_path / "box.stl")
    assert cli.main(["view", str(tmp_path / "box.stl")]) == 0
    assert opened[0].startswith("file://") and opened[0].endswith("box.html")
