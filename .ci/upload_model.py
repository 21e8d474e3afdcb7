#!/usr/bin/env python3
"""Uploads a saved pipeline to the Hub, after a check that it is whole and has a card with a licence.

    python .ci/upload_model.py FOLDER OWNER/NAME [--private] [--yes]

Without `--yes` nothing is sent: the files and the head of the card are printed. Logging in is `hf auth login`'s.
"""

import argparse
import sys
from pathlib import Path

from diffusers_sparse3d.cli.information import card_licence, read_components


# Files of a pipeline that belong on the Hub.
SUFFIXES = (".json", ".safetensors", ".md", ".py", ".png", ".jpg", ".webp")


def check_model(folder: Path) -> list[Path]:
    """
    The files to upload.

    Raises:
        ValueError: if a component has no weights, the card names no licence, or a file is of another kind.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{str(folder)!r} has no model_index.json: it is no saved pipeline")
    for component in read_components(folder):
        if not component.parameters and not component.class_name.endswith("Scheduler"):
            raise ValueError(f"{component.name} has no safetensors file")
    licence = card_licence(folder)
    if licence in (None, "", "unknown"):
        raise ValueError("README.md must name the licence of the weights in its head: `license: apache-2.0`")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    strange = [path for path in files if path.suffix not in SUFFIXES]
    if strange:
        raise ValueError(f"files that are no part of a pipeline: {', '.join(map(str, strange))}")
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--yes", action="store_true", help="upload, rather than print what would be uploaded")
    args = parser.parse_args(arguments)
    try:
        files = check_model(args.folder)
    except ValueError as error:
        print(f"upload_model.py: {error}", file=sys.stderr)
        return 1
    for path in files:
        print(f"{path.stat().st_size:>12,}  {path.relative_to(args.folder)}")
    print("\n".join((args.folder / "README.md").read_text(encoding="utf-8").splitlines()[:8]))
    if args.yes:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(args.name, private=args.private, exist_ok=True)
        paths = [path.relative_to(args.folder).as_posix() for path in files]
        print(api.upload_folder(repo_id=args.name, folder_path=args.folder, allow_patterns=paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
