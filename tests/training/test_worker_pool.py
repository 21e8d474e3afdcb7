"""The pool survives what tasks do to its processes."""

import os
import time

import pytest

from diffusers_sparse3d.training.worker_pool import WorkerPool


def misbehave(kind):
    if kind == "crash":
        os._exit(3)
    if kind == "hang":
        time.sleep(600)
    if kind == "raise":
        raise ValueError("no good")


def test_crashes_and_hangs_cost_their_task_alone():
    pool = WorkerPool(misbehave, num_workers=2, timeout=2)
    kinds = ["hang", "crash", "fine", "raise", "fine"]
    outcomes = sorted((task[0], str(reason)) for task, reason in pool.run([(kind,) for kind in kinds]))
    assert outcomes == [
        ("crash", "the process died with exit code 3"),
        ("fine", "None"),
        ("fine", "None"),
        ("hang", "took longer than 2 s"),
        ("raise", "ValueError: no good"),
    ]
    assert not any(worker.process.is_alive() for worker in pool.workers)


def test_giving_up_stops_the_processes():
    pool = WorkerPool(misbehave, num_workers=2, timeout=600)
    outcomes = pool.run([("hang",), ("fine",), ("fine",)])
    assert next(outcomes) == (("fine",), None)
    outcomes.close()
    assert not any(worker.process.is_alive() for worker in pool.workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_task_is_run(num_workers):
    pool = WorkerPool(misbehave, num_workers, timeout=60)
    assert [reason for _, reason in pool.run([("fine",), ("raise",), ("fine",)])] == [
        None,
        "ValueError: no good",
        None,
    ]
    assert list(pool.run([])) == []
