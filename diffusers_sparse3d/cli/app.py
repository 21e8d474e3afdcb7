"""The command `app`: the web app."""

from __future__ import annotations

import argparse

from ..checks import check_packages
from .models import check_device, load_pipeline, resolve_loras, resolve_model


def app(args: argparse.Namespace) -> None:
    """Serves the web app until it is interrupted."""
    check_packages("the app", "gradio")
    model, loras, device = resolve_model(args.model), resolve_loras(args.lora), check_device(args.device)
    from ..app.server import ServerSettings, start_app
    from ..pipelines.background import BackgroundRemover

    settings = ServerSettings(
        args.host, args.port, args.max_upload, args.max_waiting, args.time_limit, open_browser=args.open
    )
    pipe = load_pipeline(model, device, args.dtype, args.low_memory, loras)
    # The first visitor need not wait for it.
    pipe.compile_kernels()
    start_app(pipe, settings, BackgroundRemover(args.background_remover))
