"""The files that a command writes: their names, checked before any work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


NAME = "{name}"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TURNTABLE_SUFFIXES = (".gif", ".webp", ".mp4")


@dataclass(frozen=True)
class Job:
    """
    One mesh to generate.

    Attributes:
        pictures: of the object; one, or several.
        seeds: of the noise; of several, the best mesh is taken.
        name: what its files are called, unique among the jobs.
    """

    pictures: tuple[Path, ...]
    seeds: tuple[int, ...]
    name: str


def plan_jobs(
    pictures: Sequence[Path], seeds: Sequence[int], one_object: bool = False, select: bool = False
) -> list[Job]:
    """
    A job for each object and seed, named after the picture and, with several seeds, the seed.

    Args:
        pictures: files.
        seeds: seeds, each for every object.
        one_object: whether all pictures show the same object.
        select: whether there is one job for all seeds of an object, named after the picture alone.

    Raises:
        ValueError: if two jobs would have one name.
    """
    objects = [tuple(pictures)] if one_object else [(picture,) for picture in pictures]
    if select or len(seeds) == 1:
        jobs = [Job(views, tuple(seeds), views[0].stem) for views in objects]
    else:
        jobs = [Job(views, (seed,), f"{views[0].stem}-{seed}") for views in objects for seed in seeds]
    by_name: dict[str, Job] = {}
    for job in jobs:
        other = by_name.setdefault(job.name, job)
        if other is not job:
            both = f"{str(other.pictures[0])!r} and {str(job.pictures[0])!r}"
            raise ValueError(f"`image`: {both} would both be written as {job.name!r}; rename one")
    return jobs


def output_paths(
    option: str, path: Path, jobs: Sequence[Job], suffixes: Sequence[str], folder_suffix: str | None = None
) -> dict[str, Path]:
    """
    The file of each job, by the name of the job.

    Args:
        option: what to call the argument in errors.
        path: the file; with several jobs it holds "{name}", for which the name of the job is put in.
        jobs: the jobs.
        suffixes: those that the file may have, in lower case.
        folder_suffix: if given, `path` may be a folder as well, for files with this suffix in it.

    Raises:
        ValueError: if the file would have another suffix, one file would be written several times, a folder or a file
            is in the way, or the file cannot be written for want of permission.
    """
    if folder_suffix is not None and (path.is_dir() or not path.suffix):
        path = path / (NAME + folder_suffix)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"`{option}` must end in one of {', '.join(suffixes)}, got {str(path)!r}")
    if len(jobs) > 1 and NAME not in str(path):
        example = path.with_name(f"{path.stem}-{NAME}{path.suffix}")
        raise ValueError(f"`{option}` must hold {NAME} for {len(jobs)} results, for example {str(example)!r}")
    paths = {job.name: Path(str(path).replace(NAME, job.name)) for job in jobs}
    for file in paths.values():
        check_writable(option, file)
    return paths


def check_writable(option: str, path: Path) -> None:
    """Raises a ValueError that names the argument unless a file can be written at `path`, which may exist."""
    if path.is_dir():
        raise ValueError(f"`{option}` must be a file, {str(path)!r} is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"`{option}`: {str(path)!r} cannot be written, since {str(folder)!r} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"`{option}`: {str(path)!r} cannot be written, since {str(folder)!r} may not be written to")
