"""What the site changes in pages that are also read on GitHub: links out of docs/ lead to the repository."""

import re
from pathlib import Path
from typing import Any


# [text](target) and ![picture](target), but not addresses and anchors.
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(\))")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """The page with links to files that the site does not have made absolute; called by mkdocs for each page."""
    docs = Path(config["docs_dir"]).resolve()
    folder = Path(page.file.abs_src_path).resolve().parent

    def absolute(match: re.Match) -> str:
        start, target, anchor, end = match.group(1), match.group(2), match.group(3) or "", match.group(4)
        path = (folder / target).resolve()
        on_the_site = path.is_relative_to(docs) and path.is_file() and path.suffix != ".py"
        if on_the_site or not path.exists():
            return match.group(0)
        if path.is_relative_to(docs) and (path / "README.md").is_file():
            return f"{start}{target.rstrip('/')}/README.md{anchor}{end}"
        kind = "tree" if path.is_dir() else "blob"
        return f"{start}{config['repo_url']}/{kind}/main/{path.relative_to(docs.parent).as_posix()}{anchor}{end}"

    return LINK.sub(absolute, markdown)


# How docstrings of diffusers name other objects: [`~module.Name`], in text and, within code, in types.
IN_TEXT = re.compile(r"\[<code>~?([\w.]+)</code>\]")
IN_CODE = re.compile(r"\[`~?([\w.]+)`\]")


def on_page_content(html: str, **kwargs: Any) -> str:
    """The page with names of other objects without the brackets; called by mkdocs for each page."""

    def short(match: re.Match) -> str:
        return match.group(1).rpartition(".")[2]

    html = IN_TEXT.sub(lambda match: f"<code>{short(match)}</code>", html)
    return IN_CODE.sub(short, html)
