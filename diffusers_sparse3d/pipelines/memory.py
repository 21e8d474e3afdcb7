"""What a pipeline with autoencoders and refiners has to take less memory, beside the offloading of diffusers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading


class MemorySavingMixin(DiffusionPipeline):
    """Tiling of all autoencoders and refiners at once, and group offloading to a folder."""

    def enable_vae_tiling(self) -> None:
        """
        Decode and refine in spatial chunks, where components can: the same result up to rounding, in less memory and
        more time. The size of the chunks is an argument of `enable_tiling` of each component.
        """
        for component in self._components_with("enable_tiling"):
            component.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode and refine in one piece again."""
        for component in self._components_with("disable_tiling"):
            component.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode one sample of a batch after the other, where components can: the same result in less memory."""
        for component in self._components_with("enable_slicing"):
            component.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode whole batches again."""
        for component in self._components_with("disable_slicing"):
            component.disable_slicing()

    def enable_group_offload(
        self,
        onload_device: torch.device,
        *args: Any,
        offload_to_disk_path: str | os.PathLike | None = None,
        exclude_modules: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Keep groups of layers elsewhere and load each for its call, see [`~diffusers.DiffusionPipeline`].

        Args:
            onload_device: where layers compute.
            offload_to_disk_path: keep the weights in this folder, in a subfolder for each component, rather than in
                memory. diffusers reads files that are there already, so the subfolders must be new or empty.
            exclude_modules: components that stay on `onload_device`.
            args, kwargs: as diffusers takes them.

        Raises:
            ValueError: if a subfolder holds files.
        """
        if offload_to_disk_path is None:
            super().enable_group_offload(onload_device, *args, exclude_modules=exclude_modules, **kwargs)
            return
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        parts: dict[str, Any] = self.components
        models = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
        # diffusers names files by the layer alone, which components have in common.
        folders = {name: Path(offload_to_disk_path, name) for name in models if name not in excluded}
        for folder in folders.values():
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(
                    f"`offload_to_disk_path` must have no files in {str(folder)!r}, whose weights are they?"
                )
        for name, model in models.items():
            if name not in folders:
                model.to(onload_device)
                continue
            folders[name].mkdir(parents=True, exist_ok=True)
            settings = {**kwargs, "offload_to_disk_path": str(folders[name])}
            # Models of transformers have no method for it.
            offload: Any = getattr(model, "enable_group_offload", partial(apply_group_offloading, model))
            offload(onload_device, *args, **settings)

    def _components_with(self, method: str) -> Iterator[Any]:
        return (part for part in self.components.values() if hasattr(part, method))
