"""Settings and limits of the server of the web app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ..cli.models import CHECKPOINTS
from ..pipelines.background import BackgroundRemover
from ..pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline
from .generation import Generator
from .interface import CSS, NAME_EXAMPLES, AppSettings, Page


# Fonts of the system, for a page that asks nobody but its server.
FONTS = ["system-ui", "sans-serif"]


def make_theme() -> gr.Theme:
    """A theme whose text stands out from its background by at least 4.5 to 1."""
    theme = gr.themes.Soft(primary_hue="emerald", font=FONTS, font_mono=["monospace"])
    return theme.set(
        block_label_text_color="*primary_900",
        block_title_text_color="*primary_900",
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        button_primary_background_fill="*primary_800",
        button_primary_background_fill_hover="*primary_900",
        checkbox_label_background_fill_selected="*primary_800",
    )


@dataclass(frozen=True)
class ServerSettings:
    """
    Where the server listens, and what it refuses.

    Attributes:
        host: address to listen on; "0.0.0.0" for all.
        port: a free one from 7860 if None.
        max_upload: megabytes of an uploaded file.
        max_waiting: requests in the queue; more are refused.
        time_limit: seconds of one generation.
        open_browser: whether to open the page.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    max_upload: int = 20
    max_waiting: int = 16
    time_limit: float = 1800.0
    open_browser: bool = False


def start_app(
    pipeline: Direct3DS2Pipeline,
    settings: ServerSettings = ServerSettings(),
    remover: BackgroundRemover | None = None,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """
    Serves the web app.

    Args:
        pipeline: on its device.
        settings: address and limits.
        remover: tells objects from backgrounds; [`BackgroundRemover`] if None.
        block: whether to print the address and serve until the process is interrupted.

    Returns:
        The page, whose `close` ends the server, and its address.

    Raises:
        OSError: if the port, or each of the hundred from 7860, is taken.
    """
    pipeline.set_progress_bar_config(disable=True)
    examples = tuple(sorted((CHECKPOINTS.parent / "examples").glob("*.png")))
    generator = Generator(pipeline, settings.time_limit)
    page = Page(generator, remover or BackgroundRemover(), AppSettings(examples=examples))
    blocks = page.build().queue(max_size=settings.max_waiting, default_concurrency_limit=4)
    options: dict[str, Any] = {
        "server_name": settings.host,
        "server_port": settings.port,
        "max_file_size": f"{settings.max_upload}mb",
        "share": False,
        "inbrowser": settings.open_browser,
        "show_error": False,
        "prevent_thread_lock": True,
        "quiet": True,
        "ssr_mode": False,
        "footer_links": [],
        "theme": make_theme(),
        "css": CSS,
        "js": NAME_EXAMPLES,
    }
    _, address, _ = blocks.launch(**options)
    if block:
        # The port is known only now: ports from 7860 on may be taken.
        print(f"The app listens on {address}", flush=True)
        blocks.block_thread()
    return blocks, address
