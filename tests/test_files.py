"""Files and folders that are complete or absent."""

import pytest

from diffusers_sparse3d.files import PARTIAL, folder_beside, write_text, written_beside


def test_texts_replace_each_other(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("first, which is longer", "zweite, größer"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "mesh.glb"
    for content in (b"one", b"two"):
        with written_beside(path) as partial:
            assert partial.suffix == ".glb" and partial.parent == path.parent and partial != path
            partial.write_bytes(content)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("writes", [True, False])
def test_a_block_that_raises_changes_nothing(tmp_path, writes):
    path = tmp_path / "mesh.glb"
    path.write_bytes(b"old")
    with pytest.raises(KeyError, match="reason"), written_beside(path) as partial:
        if writes:
            partial.write_bytes(b"half")
        raise KeyError("reason")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyError, match="reason"), folder_beside(tmp_path / "model") as partial:
        if writes:
            (partial / "config.json").write_text("half")
        raise KeyError("reason")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_at_the_end_without_what_a_killed_process_left(tmp_path):
    left = tmp_path / f".model{PARTIAL}"
    (left / "part").mkdir(parents=True)
    (left / "part" / "weights").write_text("left")
    (tmp_path / "model").mkdir()
    with folder_beside(tmp_path / "model") as partial:
        assert list(partial.iterdir()) == []
        (partial / "config.json").write_text("{}")
        with pytest.raises(ValueError, match="another process"), folder_beside(tmp_path / "model"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
