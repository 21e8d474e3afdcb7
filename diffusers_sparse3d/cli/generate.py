"""The command `generate`: pictures to meshes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checks import check_packages
from .errors import explain, out_of_memory
from .models import Lora, check_device, load_pipeline, resolve_loras, resolve_model
from .outputs import PICTURE_SUFFIXES, TURNTABLE_SUFFIXES, Job, output_paths, plan_jobs
from .parser import CLEAN_UP_OPTIONS
from .pictures import find_pictures


if TYPE_CHECKING:
    import trimesh
    from PIL import Image

    from ..pipelines.background import BackgroundRemover
    from ..pipelines.pipeline_direct3d_s2 import Direct3DS2Pipeline


def generate(args: argparse.Namespace) -> int:
    """Generates a mesh of every picture and seed; returns 1 if some of several could not be made, else 0."""
    from ..geometry.clean_up import MeshCleanUp
    from ..geometry.mesh import EXPORT_SUFFIXES, check_export_support
    from ..geometry.turntable import check_video_support
    from ..pipelines.background import BackgroundRemover

    # All that can be checked without the work, before it.
    pictures = find_pictures(args.image)
    if args.mask is not None and len(pictures) > 1:
        raise ValueError(f"`--mask` is of one picture, got {len(pictures)} pictures")
    if args.mask is not None:
        if args.mask.is_dir():
            raise ValueError(f"`--mask` must be a picture, {str(args.mask)!r} is a folder")
        find_pictures([args.mask], "--mask")
    if args.select is not None and len(args.seeds or []) < 2:
        raise ValueError("`--select` needs several `--seeds`, for example `--seeds 0-3`")
    jobs = plan_jobs(pictures, args.seeds or [args.seed], args.one_object, args.select is not None)
    meshes = output_paths("--output", args.output, jobs, EXPORT_SUFFIXES, f".{args.format}")
    check_export_support(next(iter(meshes.values())))
    previews = _optional_paths("--preview", args.preview, jobs, PICTURE_SUFFIXES)
    turntables = _optional_paths("--turntable", args.turntable, jobs, TURNTABLE_SUFFIXES)
    for option in ("preview", "turntable"):
        if getattr(args, option) is not None:
            check_packages(f"`--{option}`", "embreex")
    if args.turntable is not None:
        check_video_support(args.turntable.suffix)
    clean_up = {name: getattr(args, name) for name in CLEAN_UP_OPTIONS}
    MeshCleanUp(**{**clean_up, "remove_floaters": bool(args.remove_floaters)})
    model, loras, device = resolve_model(args.model), resolve_loras(args.lora), check_device(args.device)

    # The model waits for the first cut-out, which may fail and takes a second.
    pipeline = cache(lambda: _checked_pipeline(args, model, loras, device))
    remover = BackgroundRemover(args.background_remover)
    failed = 0
    for number, job in enumerate(jobs, start=1):
        if len(jobs) > 1:
            print(f"[{number}/{len(jobs)}] {job.name}", flush=True)
        try:
            mesh, photo = _generate_one(args, job, pipeline, remover, clean_up)
        except (ValueError, ImportError) as error:
            # One picture of several, which may be the only one that takes the network of the remover, must not stop
            # the others; anything else would happen to them too.
            model_fails = pipeline.cache_info().misses > pipeline.cache_info().currsize
            if len(jobs) == 1 or model_fails or out_of_memory(error):
                raise
            print(f"diffusers-sparse3d generate: {job.name}: {explain(error, ['generate'])}", file=sys.stderr)
            failed += 1
            continue
        _write(args, mesh, photo, meshes[job.name], previews.get(job.name), turntables.get(job.name))
    if failed:
        print(f"diffusers-sparse3d generate: {failed} of {len(jobs)} meshes could not be made", file=sys.stderr)
    return int(failed > 0)


def _optional_paths(option: str, path: Path | None, jobs: Sequence[Job], suffixes: Sequence[str]) -> dict[str, Path]:
    return {} if path is None else output_paths(option, path, jobs, suffixes)


def _checked_pipeline(args: argparse.Namespace, model: str, loras: Sequence[Lora], device: str) -> Direct3DS2Pipeline:
    pipe = load_pipeline(model, device, args.dtype, args.low_memory, loras)
    if args.resolution is not None and args.resolution not in pipe.resolutions:
        choices = " or ".join(map(str, pipe.resolutions))
        raise ValueError(f"`--resolution` must be {choices} with this model, got {args.resolution}")
    return pipe


def _generate_one(
    args: argparse.Namespace,
    job: Job,
    pipeline: Callable[[], Direct3DS2Pipeline],
    remover: BackgroundRemover,
    clean_up: dict[str, Any],
) -> tuple[trimesh.Trimesh, Image.Image]:
    """The mesh of a job, and its first picture without the background."""
    import torch

    from ..pipelines.background import cut_out
    from ..pipelines.image_loading import load_images

    mask = None if args.mask is None else load_images(args.mask)[0]
    photos = [cut_out(load_images(path)[0], mask, remover, args.keep_background) for path in job.pictures]
    # Opaque everywhere would count as a picture whose background is to be removed.
    masks = [photo.getchannel("A") for photo in photos]
    pipe = pipeline()
    start = time.perf_counter()
    output = pipe(
        [photos],
        mask_image=[masks],
        resolution=args.resolution,
        dense_num_inference_steps=args.dense_steps,
        num_inference_steps=args.steps,
        num_inference_steps_1024=args.steps_1024,
        dense_guidance_scale=args.dense_guidance_scale,
        guidance_scale=args.guidance_scale,
        guidance_scale_1024=args.guidance_scale_1024,
        level=args.level,
        max_opening=args.max_opening,
        **clean_up,
        num_meshes_per_image=len(job.seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in job.seeds],
        select=None if args.select is None else "ranked",
    )
    for score in output.scores or []:
        fit, bodies = f"{score.silhouette_iou:.3f} of the silhouette", f"{score.num_bodies:,} bodies"
        print(f"seed {job.seeds[score.candidate]}: score {score.score:.3f}, {fit}, {bodies}")
    mesh = output.meshes[0]
    if len(mesh.faces) == 0:
        raise ValueError("the model gave no surface; try another `--seed` or `--level`")
    print(f"generated in {time.perf_counter() - start:.0f} s", flush=True)
    return mesh, photos[0]


def _write(
    args: argparse.Namespace,
    mesh: trimesh.Trimesh,
    photo: Image.Image,
    output: Path,
    preview: Path | None,
    turntable: Path | None,
) -> None:
    """Writes the mesh and the pictures of it."""
    from ..files import written_beside
    from ..geometry.mesh import export_mesh

    export_mesh(mesh, output, args.up_axis)
    print(f"{output}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} triangles")
    if preview is not None:
        from ..geometry.render import preview as render_preview

        picture = render_preview(mesh, photo)
        with written_beside(preview) as partial:
            picture.save(partial)
        print(preview)
    if turntable is not None:
        from ..geometry.turntable import write_turntable

        print(write_turntable(mesh, turntable))
