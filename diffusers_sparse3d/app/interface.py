"""What is on the page, and what its buttons do."""

from __future__ import annotations

import html
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import trimesh
from PIL import Image

from ..checks import check_packages
from ..cli.errors import out_of_memory
from ..geometry.clean_up import MeshCleanUp
from ..geometry.render.pictures import AZIMUTHS, view_pictures
from ..pipelines.background import BackgroundRemover
from ..pipelines.inputs import stage_setting
from . import choices
from .choices import FinishedMesh, Meshes
from .files import FileStore
from .generation import GenerationError, Generator, Request
from .photos import PhotoReader


logger = logging.getLogger(__name__)

MAX_MESHES = 8
MAX_SEEDS = 4
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
        max_seeds: of each photo.
        max_meshes: at a time, of all photos.
    """

    examples: tuple[Path, ...] = ()
    max_pixels: int = 64_000_000
    max_seeds: int = MAX_SEEDS
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
        self.photos = PhotoReader(remover, settings.max_pixels, settings.max_meshes)
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
                    with gr.Accordion("More photos", open=False):
                        more = gr.File(
                            label="More photos, a mesh of each",
                            height=140,
                            file_count="multiple",
                            file_types=["image"],
                            elem_id="more-photos",
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
                    cuts = gr.Gallery(
                        label="The others without theirs",
                        height=180,
                        columns=3,
                        format="png",
                        interactive=False,
                        visible=False,
                        elem_id="cut-outs",
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
                    tiles = self._add_tiles(viewer, meshes)
                    export_inputs, export, download = self._add_export()
            photos = [photo, more, keep]
            show = {"fn": self.show_cut_outs, "inputs": photos, "outputs": [cut, cuts, status], "concurrency_limit": 2}
            gr.on([photo.change, more.change, keep.change], **show, show_progress="minimal", api_name="cut_out")
            outputs = [status, viewer, *tiles, meshes, download]
            event = generate.click(
                self.generate, [*photos, *settings], outputs, concurrency_limit=1, concurrency_id="pipeline",
                show_progress="hidden", api_name="generate",
            )  # fmt: skip
            stop = cancel.click(None, cancels=[event], queue=False, api_visibility="private")
            stop.then(self.stopped, [meshes], [status, *tiles], queue=False, api_visibility="private")
            export.click(self.export, [meshes, *export_inputs], [download, status], api_name="export")
        return blocks

    def _add_tiles(self, viewer: gr.Model3D, meshes: gr.State) -> list[Any]:
        """The pictures of the meshes of several photos or seeds, then the buttons below them."""
        pictures, buttons = [], []
        with gr.Row():
            for index in range(self.settings.max_meshes):
                with gr.Column(min_width=160):
                    label = f"Mesh {index + 1}"
                    pictures.append(gr.Image(label=label, height=200, visible=False, interactive=False, buttons=[]))
                    buttons.append(gr.Button("Keep this one", visible=False, size="sm"))
        for index, button in enumerate(buttons):
            button.click(
                lambda given, index=index: self._keep(given, index),
                [meshes], [viewer, meshes, *pictures, *buttons], api_visibility="private",
            )  # fmt: skip
        return pictures + buttons

    def _keep(self, meshes: Meshes, place: int) -> tuple[Any, ...]:
        """Updates after the choice of a mesh: it is shown, and the only one of its photo."""
        meshes = choices.keep(meshes, place)
        chosen = meshes[place]
        assert chosen is not None  # otherwise `keep` has raised
        is_only = len(choices.kept(meshes)) == 1
        there = [mesh is not None and not is_only for mesh in self._by_place(meshes)]
        pictures = [gr.skip() if shown else gr.update(visible=False) for shown in there]
        return self._file(chosen.mesh), meshes, *pictures, *self._buttons(meshes)

    def _buttons(self, meshes: Meshes) -> list[Any]:
        """Updates of the buttons: several meshes are kept or not, and one of each photo is shown."""
        undecided = choices.undecided(meshes)
        is_only = len(choices.kept(meshes)) == 1
        return [
            gr.update(
                visible=mesh is not None and not is_only,
                value="Keep this one" if mesh is not None and mesh.photo in undecided else "Show this one",
            )
            for mesh in self._by_place(meshes)
        ]

    def _by_place(self, meshes: Meshes) -> list[FinishedMesh | None]:
        """The mesh of each place on the page."""
        return [*meshes, *[None] * (self.settings.max_meshes - len(meshes))]

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

        resolutions = [str(resolution) for resolution in pipe.resolutions]
        with gr.Accordion("Settings", open=False):
            with gr.Row():
                resolution = gr.Radio(resolutions, value=resolutions[-1], label="Resolution", info="samples per axis")
                count = gr.Slider(
                    1,
                    self.settings.max_seeds,
                    value=1,
                    step=1,
                    label="Meshes",
                    info="seeds of each photo, side by side",
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
                wanted = ["Floating bits"] if pipe.config.default_remove_floaters else []
                clean_up = gr.CheckboxGroup(list(CLEAN_UPS), value=wanted, label="Clean up")
                num_faces = gr.Number(0, label="Triangles", info="0: all", precision=0, minimum=0)
        dice.click(lambda: random.randint(0, MAX_SEED), None, seed, queue=False, api_visibility="private")
        return [resolution, count, seed, dense_steps, steps, dense_scale, scale, level, clean_up, num_faces]

    def _file(self, mesh: trimesh.Trimesh) -> str:
        """A file for the viewer, in a grey that shows its shape on white."""
        shown = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=GREY, metallicFactor=0.0, roughnessFactor=0.9)
        shown.visual = trimesh.visual.TextureVisuals(material=material)
        return self.store.write(shown, "mesh.glb")

    def show_cut_outs(self, photo: Image.Image | None, more: Sequence[str] | None, keep: bool) -> tuple[Any, ...]:
        """The photo without its background, an update of the gallery of the others, and the status."""
        if photo is None and not more:
            return None, gr.update(value=None, visible=False), _status("Waiting for a photo")
        pictures = self.photos.read(photo, more, keep)
        first = None if photo is None else pictures.pop(0)
        return first, gr.update(value=pictures, visible=bool(pictures)), _status("Ready")

    def stopped(self, meshes: Meshes) -> tuple[Any, ...]:
        """Updates after a stop, once no news of the running step can follow: finished meshes can be kept."""
        time.sleep(0.5)
        self.generator.wait(timeout=10.0)
        text = "Stopped" if len(choices.kept(meshes)) < 2 else f"Stopped: {choices.summary(meshes, [])}"
        return _status(text), *[gr.skip()] * self.settings.max_meshes, *self._buttons(meshes)

    def generate(
        self, photo: Image.Image | None, more: Sequence[str] | None, keep: bool, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Runs a generation and yields what changes on the page: see `outputs` in `build`."""
        request = self._request(self.photos.read(photo, more, keep), *values)
        count = len(request.pictures) * len(request.seeds)
        finished: list[FinishedMesh] = []
        failures: list[str] = []
        places = self.settings.max_meshes
        same = [gr.skip()] * (2 * places)
        yield _status("Waiting for the model"), None, *[gr.update(visible=False)] * (2 * places), [], None
        try:
            for news in self.generator.run(request):
                label = f"Mesh {min(len(finished) + len(failures) + 1, count)} of {count}: " * (count > 1)
                shape = gr.skip() if news.shape is None else self._file(news.shape)
                if not news.finished:
                    yield _status(label + news.text, news.share), shape, *same, gr.skip(), gr.skip()
                elif news.shape is None:
                    failures.append(f"photo {news.photo + 1}, seed {news.seed}: {news.text}")
                else:
                    finished.append(FinishedMesh(news.photo, news.seed, news.shape, news.score))
                    tiles = self._new_tile(finished, request) if count > 1 else same
                    yield _status(label + news.text, news.share), shape, *tiles, [*finished], gr.skip()
        except GenerationError as error:
            failures.append(str(error))
        except Exception as error:
            # What it says may hold paths of the server: it goes to the log alone.
            logger.exception("A generation failed")
            memory = out_of_memory(error)
            text = f"Out of {memory}: try a lower resolution." if memory else "The generation failed. Try again."
            raise gr.Error(text, print_exception=False) from error
        if not finished:
            raise gr.Error("; ".join(failures), print_exception=False)
        done = _status(f"Done: {choices.summary(finished, failures)}", 1.0)
        yield done, gr.skip(), *[gr.skip()] * places, *self._buttons(finished), finished, gr.skip()

    def _new_tile(self, finished: list[FinishedMesh], request: Request) -> list[Any]:
        """Updates of the pictures and the buttons, where the last of several meshes is new.

        A picture of each: browsers draw few 3D views at a time. Buttons come at the end, with all that can be chosen.
        """
        new = len(finished) - 1
        picture = view_pictures(finished[new].mesh, AZIMUTHS[:1], CHOICE_SIZE, "shaded")[0]
        label = choices.title(finished, new, len(request.pictures), len(request.seeds))
        tiles = [gr.skip()] * (2 * self.settings.max_meshes)
        tiles[new] = gr.update(value=picture, visible=True, label=label)
        return tiles

    def _request(
        self,
        pictures: Sequence[Image.Image],
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
            if not (1 <= count <= self.settings.max_seeds and 0 <= seed <= MAX_SEED):
                raise ValueError(f"Meshes are 1 to {self.settings.max_seeds}, seeds 0 to {MAX_SEED}.")
            if count * len(pictures) > self.settings.max_meshes:
                raise ValueError(f"At most {self.settings.max_meshes} meshes at a time: of fewer photos or seeds.")
            if count * len(pictures) > 1:
                check_packages("a choice of several meshes", "embreex")
            if not (1 <= dense_steps <= MAX_STEPS and 1 <= steps <= MAX_STEPS):
                raise ValueError(f"Steps are 1 to {MAX_STEPS}.")
            cleaning = MeshCleanUp(**{CLEAN_UPS[name]: True for name in clean_up}, num_faces=int(num_faces) or None)
            seeds = tuple((int(seed) + index) % (MAX_SEED + 1) for index in range(int(count)))
            chosen_steps, scales = (int(dense_steps), int(steps)), (float(dense_scale), float(scale))
            return Request(tuple(pictures), seeds, int(resolution), chosen_steps, scales, float(level), cleaning)
        except (ValueError, TypeError, KeyError, ImportError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def export(self, meshes: Meshes, file_format: str, up_axis: str, size: float) -> tuple[Any, str]:
        """The file to download, or those of several photos, and the status."""
        chosen = choices.kept(meshes)
        if not chosen:
            raise gr.Error("Generate a mesh first.", print_exception=False)
        if choices.undecided(meshes):
            raise gr.Error("Choose the mesh to keep first.", print_exception=False)
        if file_format not in FORMATS or up_axis not in ("y", "z") or not 0 <= (size or 0) <= 1e6:
            raise gr.Error("There is no such format, axis or size.", print_exception=False)
        paths = []
        for item in chosen:
            name = "mesh" if len(chosen) == 1 else f"mesh_{item.photo + 1}"
            scale = float(size) / float(item.mesh.extents.max()) if size else 1.0
            try:
                paths.append(self.store.write(item.mesh, f"{name}.{file_format}", up_axis, scale))
            except ImportError as error:
                raise gr.Error(f"The server cannot write .{file_format} files.", print_exception=False) from error
        if len(paths) == 1:
            return paths[0], _status("The file is ready")
        return paths, _status(f"{len(paths)} files are ready")


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
