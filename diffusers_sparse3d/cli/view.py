"""The command `view`: a mesh as a page of its own, which the browser shows without a server or a network."""

from __future__ import annotations

import argparse
import html
import tempfile
import webbrowser
from pathlib import Path

from .outputs import check_writable


def viewer_page(path: Path) -> str:
    """
    A page of HTML that holds a mesh and a viewer (three.js, which comes with trimesh) to turn and zoom it.

    Args:
        path: a mesh that trimesh can load; materials and textures are kept.

    Raises:
        ValueError: if it does not exist or has no triangles.
    """
    import trimesh
    from trimesh.viewer.notebook import scene_to_html

    if not path.is_file():
        raise ValueError(f"`mesh` {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        scene = trimesh.load_scene(path, process=False)
    except Exception as error:  # trimesh's readers raise anything on damaged files
        raise ValueError(f"`mesh` {str(path)!r} cannot be read: {error or type(error).__name__}") from error
    triangles = sum(len(part.faces) for part in scene.geometry.values() if isinstance(part, trimesh.Trimesh))
    if triangles == 0:
        raise ValueError(f"`mesh` {str(path)!r} has no triangles")
    return scene_to_html(scene).replace(
        "<title>trimesh: threejs viewer</title>", f"<title>{html.escape(path.name)}</title>"
    )


def view(args: argparse.Namespace) -> None:
    """Writes the page of a mesh and opens it in the browser."""
    from ..files import write_text

    if args.output is not None:
        if args.output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"`--output` must end in .html, got {str(args.output)!r}")
        check_writable("--output", args.output)
    page = viewer_page(args.mesh)
    # It must outlive this process, since the browser reads it later.
    output = args.output or Path(tempfile.mkdtemp(prefix="diffusers-sparse3d-")) / f"{args.mesh.stem}.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    print(output)
    if not args.no_browser and not webbrowser.open(output.absolute().as_uri()):
        print("no browser was found: open the page by hand")
