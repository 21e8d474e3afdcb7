"""Progress bars that have a name from their first line on."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline


def named_progress_bar(pipeline: DiffusionPipeline, name: str, total: int) -> Any:
    """
    The progress bar of a pipeline, for a `with` block, called `name` unless `set_progress_bar_config` says otherwise.

    Args:
        pipeline: whose settings count.
        name: shown before the bar. Setting it later would leave a line without a name in logs.
        total: steps.
    """
    settings = getattr(pipeline, "_progress_bar_config", {})
    pipeline._progress_bar_config = {"desc": name, **settings}
    try:
        return pipeline.progress_bar(total=total)
    finally:
        pipeline._progress_bar_config = settings
