"""The preparation of groups of meshes by a Ray cluster."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..worker_pool import Failure
from .groups import Group
from .jobs import Options
from .run import Preparation, prepare_group


# Attempts of a group whose node or process is lost; what it has finished is not made again.
MAX_RETRIES = 2
# Groups per slot of the cluster that are handed to Ray at a time.
GROUPS_AHEAD = 2


def run_on_ray(preparation: Preparation, groups: Iterable[Group], workers_per_gpu: int) -> None:
    """Prepares what is missing of groups by tasks of a Ray cluster, a group each.

    A task has `Options.num_workers` processes, hence CPUs, and with the device "cuda" the same number of
    `workers_per_gpu`-th parts of a GPU. Ray starts on this machine unless `RAY_ADDRESS` names a cluster or it runs
    already. All machines need the folders of the meshes and of the dataset under the same paths.

    Args:
        preparation: The run; its failures and progress are those of all tasks.
        groups: Groups of meshes.
        workers_per_gpu: Processes that share one GPU.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)
    try:
        _run_tasks(ray, preparation, groups, workers_per_gpu)
    finally:
        if started:
            ray.shutdown()


def _run_tasks(ray: Any, preparation: Preparation, groups: Iterable[Group], workers_per_gpu: int) -> None:
    options = preparation.options
    needs = resources(options, workers_per_gpu)
    task = ray.remote(prepare_group).options(**needs, max_retries=MAX_RETRIES)
    running: dict[Any, Group] = {}
    source = groups if options.renders_only else preparation.unfinished(groups)
    source = iter(source)
    while True:
        # A cluster may grow. No more groups are in Ray's memory than are soon begun.
        slots = max(1, int(ray.cluster_resources().get("CPU", 1)) // needs["num_cpus"])
        while len(running) < GROUPS_AHEAD * slots and (group := next(source, None)) is not None:
            running[task.remote(group, options)] = group
        if not running:
            return
        ready, _ = ray.wait(list(running))
        for reference in ready:
            group = running.pop(reference)
            try:
                failures = ray.get(reference)
            except ray.exceptions.RayTaskError:  # an error of the code, or of a disk
                raise
            except ray.exceptions.RayError as error:
                reason = f"its group was given up: {type(error).__name__}: {str(error).splitlines()[0]}"
                failures = [(entry, Failure("ray", reason)) for entry in group.entries]
            preparation.failures += failures
            for _, failure in failures:
                preparation.progress(1, failure)
            preparation.progress(len(group.entries) - len(failures), None)


def resources(options: Options, workers_per_gpu: int) -> dict[str, Any]:
    """Returns what a task needs, as Ray names it: a CPU for each of its processes, and their share of the GPUs.

    Raises:
        ValueError: if the processes of a task need more than one GPU and not a whole number of them.
    """
    cpus = options.num_workers
    gpus = cpus / workers_per_gpu if options.device == "cuda" else 0
    if gpus > 1 and gpus % 1:
        raise ValueError(
            f"`num_workers` must be a multiple of `workers_per_gpu` or fit one GPU, got {cpus} and {workers_per_gpu}"
        )
    return {"num_cpus": cpus, "num_gpus": gpus}


def ray_options(options: Options) -> Options:
    """Returns options for a task of Ray, which has one process at least: what kills it must not kill the task."""
    return replace(options, num_workers=max(1, options.num_workers))
