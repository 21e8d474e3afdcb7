"""What is on the page, and what its buttons do."""

from __future__ import annotations

import html
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import trimesh
from PIL import Image

from ..cli.errors import out_of_memory
from ..geometry.clean_up import MeshCleanUp
from ..geometry.render.pictures import AZIMUTHS, view_pictures
from ..pipelines.background import BackgroundRemover, cut_out
from ..pipelines.inputs import stage_setting
from .files import FileStore
from .generation import GenerationError, Generator, Progress, Request


logger = logging.getLogger(__name__)

MAX_MESHES = 4
MAX_SEED = 2**31 - 1
MAX_STEPS = 100
# Of meshes in the viewer, whose light is bright; linear RGB and opacity of 255.
GREY = (70, 72, 76, 255)
CHOICE_SIZE = 320
FORMATS = ("glb", "obj", "stl", "ply", "3mf")
CLEAN_UPS = {"Inner parts": "remove_inner_parts", "Floating bits": "remove_floaters", "Holes": "fill_holes"}
# Names for the pictures of examples, which Gradio leaves without one; they may be put on the page late.
NAME_EXAMPLES = """() => {
    const name = () => document.querySelectorAll(".gallery-item:not([aria-label])").forEach(
        (item, index) => item.setAttribute("aria-label", "Example " + (index + 1)));
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
INTRODUCTION = """# Photo to mesh
Drop a photo of one object. Its background is removed by itself; then press **Generate**."""
CSS = """
.status {font-size: 1.05rem; padding: 0.4rem 0}
.status progress {width: 100%; height: 0.9rem; accent-color: #1f6f43}
"""


@dataclass(frozen=True)
class AppSettings:
    """
    Settings of the page.

    Attributes:
        examples: pictures to try.
        max_pixels: of an uploaded picture.
        max_meshes: seeds at a time.
    """

    examples: tuple[Path, ...] = ()
    max_pixels: int = 64_000_000
    max_meshes: int = MAX_MESHES


class Page:
    """
    The page of one pipeline.

    Args:
        generator: runs the requests.
        remover: tells objects from backgrounds.
        settings: limits and examples.
    """

    def __init__(self, generator: Generator, remover: BackgroundRemover, settings: AppSettings = AppSettings()):
        self.generator = generator
        self.remover = remover
        self.settings = settings
        self.store = FileStore()

    def build(self) -> gr.Blocks:
        """The page, for `launch`."""
        pipe = self.generator.pipeline
        with gr.Blocks(title="Photo to mesh", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.Markdown(INTRODUCTION)
            meshes = gr.State([])
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    photo = gr.Image(
                        label="Photo",
                        height=260,
                        type="pil",
                        image_mode=None,
                        sources=["upload", "clipboard"],
                        elem_id="photo",
                    )
                    keep = gr.Checkbox(label="Keep the background", info="The whole picture is the object")
                    cut = gr.Image(
                        label="Without its background",
                        height=260,
                        type="pil",
                        format="png",
                        image_mode="RGBA",
                        interactive=False,
                        elem_id="cut-out",
                    )
                    if self.settings.examples:
                        gr.Examples([[str(path)] for path in self.settings.examples], [photo], label="Examples")
                with gr.Column(scale=2, min_width=300):
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                        cancel = gr.Button("Stop", variant="stop", elem_id="stop")
                    settings = self._add_settings(pipe)
                    status = gr.HTML(_status("Waiting for a photo"), elem_id="status")
                    viewer = gr.Model3D(
                        label="Mesh", height=420, interactive=False, elem_id="mesh", clear_color=(1.0, 1.0, 1.0, 1.0)
                    )
                    kept = self._add_choices(viewer, meshes)
                    export_inputs, export, download = self._add_export()
            show = {"fn": self.show_cut_out, "inputs": [photo, keep], "outputs": [cut, status], "concurrency_limit": 2}
            gr.on([photo.change, keep.change], **show, show_progress="minimal", api_name="cut_out")
            outputs = [status, viewer, *kept["viewers"], *kept["buttons"], meshes, download]
            event = generate.click(
                self.generate, [photo, keep, *settings], outputs, concurrency_limit=1, concurrency_id="pipeline",
                show_progress="hidden", api_name="generate",
            )  # fmt: skip
            stop = cancel.click(None, cancels=[event], queue=False, api_visibility="private")
            stop.then(self.stopped, None, status, queue=False, api_visibility="private")
            export.click(self.export, [meshes, *export_inputs], [download, status], api_name="export")
        return blocks

    def _add_choices(self, viewer: gr.Model3D, meshes: gr.State) -> dict[str, list[Any]]:
        """The row of pictures of the meshes of several seeds, each with a button that keeps its mesh."""
        viewers, buttons = [], []
        with gr.Row():
            for index in range(self.settings.max_meshes):
                with gr.Column(min_width=160):
                    viewers.append(gr.Image(label=f"Mesh {index + 1}", height=200, visible=False, interactive=False))
                    buttons.append(gr.Button("Keep this one", visible=False, size="sm"))
        for index, button in enumerate(buttons):
            button.click(
                lambda given, index=index: self._keep(given[index]),
                [meshes], [viewer, meshes, *viewers, *buttons], api_visibility="private",
            )  # fmt: skip
        return {"viewers": viewers, "buttons": buttons}

    def _keep(self, mesh: trimesh.Trimesh) -> tuple[Any, ...]:
        """Updates after the choice of a mesh: it is shown and the only one, and the choices vanish."""
        return self._file(mesh), [mesh], *[gr.update(visible=False)] * (2 * self.settings.max_meshes)

    def _add_export(self) -> tuple[list[Any], gr.Button, gr.File]:
        with gr.Group(), gr.Row():
            file_format = gr.Dropdown(FORMATS, value="glb", label="Format")
            up_axis = gr.Radio(["y", "z"], value="y", label="Up axis", info="z for 3D printing")
            size = gr.Number(0, label="Longest side", info="in the file's units; 0: as it is", minimum=0)
        export = gr.Button("Make a file", elem_id="export")
        download = gr.File(label="File to download", interactive=False, height=90, elem_id="download")
        return [file_format, up_axis, size], export, download

    def _add_settings(self, pipe: Any) -> list[Any]:
        def default(stage: str, name: str) -> Any:
            return stage_setting(pipe.config, stage, name)

        choices = [str(resolution) for resolution in pipe.resolutions]
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                resolution = gr.Radio(choices, value=choices[-1], label="Resolution", info="samples per axis")
                count = gr.Slider(
                    1, self.settings.max_meshes, value=1, step=1, label="Meshes", info="seeds side by side"
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                dice = gr.Button("Another seed", size="sm")
            with gr.Row():
                dense_steps = gr.Slider(
                    1, MAX_STEPS, default("dense", "num_inference_steps"), step=1, label="Steps, rough shape"
                )
                steps = gr.Slider(
                    1, MAX_STEPS, default("sparse", "num_inference_steps"), step=1, label="Steps, detail"
                )
                dense_scale = gr.Slider(
                    1, 15, default("dense", "guidance_scale"), step=0.5, label="Guidance, rough shape"
                )
                scale = _guidance_slider(default("sparse", "guidance_scale"), "Guidance, detail")
            with gr.Row():
                level = gr.Slider(
                    0, 0.2, pipe.config.default_level, step=0.01, label="Iso-level", info="thicker with more"
                )
                clean_up = gr.CheckboxGroup(list(CLEAN_UPS), label="Clean up")
                num_faces = gr.Number(0, label="Triangles", info="0: all", precision=0, minimum=0)
        dice.click(lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private")
        return [resolution, count, seed, dense_steps, steps, dense_scale, scale, level, clean_up, num_faces]

    def _file(self, mesh: trimesh.Trimesh) -> str:
        """A file for the viewer, in a grey that shows its shape on white."""
        shown = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=GREY, metallicFactor=0.0, roughnessFactor=0.9)
        shown.visual = trimesh.visual.TextureVisuals(material=material)
        return self.store.write(shown, "mesh.glb")

    def _picture(self, photo: Image.Image | None, keep: bool) -> Image.Image:
        """The photo without its background.

        Raises:
            gr.Error: with a sentence for the user.
        """
        if photo is None:
            raise gr.Error("Give a photo first.", print_exception=False)
        if photo.width * photo.height > self.settings.max_pixels:
            limit = self.settings.max_pixels // 1_000_000
            raise gr.Error(f"The photo is too large: at most {limit} million pixels.", print_exception=False)
        try:
            return cut_out(photo, None, self.remover, keep)
        except (ValueError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def show_cut_out(self, photo: Image.Image | None, keep: bool) -> tuple[Image.Image | None, str]:
        """The photo without its background, and the status."""
        if photo is None:
            return None, _status("Waiting for a photo")
        return self._picture(photo, keep), _status("Ready")

    def stopped(self) -> str:
        """The status after a stop, once the running step is over and no news of it can follow."""
        time.sleep(0.5)
        self.generator.wait(timeout=10.0)
        return _status("Stopped")

    def generate(self, photo: Image.Image | None, keep: bool, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Runs a generation and yields what changes on the page: see `outputs` in `build`."""
        picture = self._picture(photo, keep)
        request = self._request(picture, *values)
        count = len(request.seeds)
        finished: list[trimesh.Trimesh] = []
        scores: list[float] = []
        places = self.settings.max_meshes
        hidden, same = [gr.update(visible=False)] * (2 * places), [gr.skip()] * (2 * places)
        yield _status("Waiting for the model"), None, *hidden, [], None
        try:
            for news in self.generator.run(request):
                if news.finished and news.shape is not None:
                    finished.append(news.shape)
                    scores += [] if news.score is None else [news.score]
                shape = gr.skip() if news.shape is None else self._file(news.shape)
                choices = self._choices(finished, scores) if count > 1 and news.finished else same
                label = f"Mesh {len(finished) + (not news.finished)} of {count}: " * (count > 1)
                yield _news(news, label), shape, *choices, gr.skip(), gr.skip()
        except GenerationError as error:
            raise gr.Error(str(error), print_exception=False) from error
        except Exception as error:
            # What it says may hold paths of the server: it goes to the log alone.
            logger.exception("A generation failed")
            memory = out_of_memory(error)
            text = f"Out of {memory}: try a lower resolution." if memory else "The generation failed. Try again."
            raise gr.Error(text, print_exception=False) from error
        best = 1 + max(range(len(scores)), key=scores.__getitem__, default=0)
        choice = f"choose the one to keep, mesh {best} fits best"
        result = f"{len(finished[-1].faces):,} triangles" if count == 1 else choice
        yield _status(f"Done: {result}", 1.0), gr.skip(), *same, finished, gr.skip()

    def _choices(self, finished: list[Any], scores: list[float]) -> list[Any]:
        """Updates of the pictures and the buttons of several meshes."""
        new = len(finished) - 1
        places = range(self.settings.max_meshes)
        # A picture of each: browsers draw few 3D views at a time.
        picture = view_pictures(finished[new], AZIMUTHS[:1], CHOICE_SIZE, "shaded")[0]
        shown = gr.update(value=picture, visible=True, label=f"Mesh {new + 1}, score {scores[new]:.3f}")
        viewers = [shown if i == new else gr.skip() for i in places]
        return viewers + [gr.update(visible=True) if i == new else gr.skip() for i in places]

    def _request(
        self,
        picture: Image.Image,
        resolution: str,
        count: int,
        seed: int,
        dense_steps: int,
        steps: int,
        dense_scale: float,
        scale: float,
        level: float,
        clean_up: list[str],
        num_faces: int,
    ) -> Request:
        """The request of the settings; they may come from another program than the page, so they are checked.

        Raises:
            gr.Error: with a sentence for the user.
        """
        try:
            if int(resolution) not in self.generator.pipeline.resolutions:
                raise ValueError("There is no such resolution.")
            if not (1 <= count <= self.settings.max_meshes and 0 <= seed <= MAX_SEED):
                raise ValueError(f"Meshes are 1 to {self.settings.max_meshes}, seeds 0 to {MAX_SEED}.")
            if not (1 <= dense_steps <= MAX_STEPS and 1 <= steps <= MAX_STEPS):
                raise ValueError(f"Steps are 1 to {MAX_STEPS}.")
            cleaning = MeshCleanUp(**{CLEAN_UPS[name]: True for name in clean_up}, num_faces=int(num_faces) or None)
            seeds = tuple((int(seed) + index) % (MAX_SEED + 1) for index in range(int(count)))
            chosen_steps, scales = (int(dense_steps), int(steps)), (float(dense_scale), float(scale))
            return Request(picture, seeds, int(resolution), chosen_steps, scales, float(level), cleaning)
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def export(self, meshes: list[Any], file_format: str, up_axis: str, size: float) -> tuple[str, str]:
        """The file to download, and the status."""
        if not meshes:
            raise gr.Error("Generate a mesh first.", print_exception=False)
        if len(meshes) > 1:
            raise gr.Error("Choose the mesh to keep first.", print_exception=False)
        if file_format not in FORMATS or up_axis not in ("y", "z") or not 0 <= (size or 0) <= 1e6:
            raise gr.Error("There is no such format, axis or size.", print_exception=False)
        mesh = meshes[0]
        scale = float(size) / float(mesh.extents.max()) if size else 1.0
        try:
            path = self.store.write(mesh, f"mesh.{file_format}", up_axis, scale)
        except ImportError as error:
            raise gr.Error(f"The server cannot write .{file_format} files.", print_exception=False) from error
        return path, _status("The file is ready")


def _steps_slider(value: int, label: str) -> gr.Slider:
    return gr.Slider(1, MAX_STEPS, value, step=1, label=label)


def _guidance_slider(value: float, label: str) -> gr.Slider:
    return gr.Slider(1, 15, value, step=0.5, label=label)


def _status(text: str, share: float | None = 0.0) -> str:
    """The line of progress, which screen readers speak; a bar without a value moves by itself."""
    value = "" if share is None else f' value="{share:.3f}"'
    label = html.escape(text)
    return (
        f'<div class="status" role="status" aria-live="polite">{label}'
        f'<progress max="1"{value} aria-label="{label}"></progress></div>'
    )


def _news(news: Progress, label: str) -> str:
    return _status(label + news.text, news.share)
