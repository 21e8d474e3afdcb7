"""The pool survives what tasks do to its processes."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusers_sparse3d.training.worker_pool import WorkerPool


pytestmark = pytest.mark.usefixtures("fork_server")


def misbehave(kind, log=None):
    if log is not None:
        with log.open("a") as file:
            file.write(f"{kind} {time.monotonic()}\n")
    if kind == "crash":
        os._exit(3)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    if kind == "raise":
        raise ValueError("no good")
    if kind == "full":
        raise MemoryError("no room")
    if kind == "once" and log.read_text().count("once") == 1:
        os._exit(1)
    if log is not None:
        time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"end-of-{kind} {time.monotonic()}\n")


def die_at_first_start(path, index):
    """Ends process 0 if it is the first to come here, as a file tells."""
    if index == 0 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def die_at_start(index):
    os._exit(5)


def test_crashes_and_hangs_cost_their_task_alone():
    pool = WorkerPool(misbehave, num_workers=2, timeout=2)
    kinds = ["hang", "crash", "fine", "raise", "fine", "killed", "full"]
    outcomes = {(task[0], failure and failure.cause) for task, failure in pool.run([(kind,) for kind in kinds])}
    assert outcomes == {
        ("crash", "crash"),
        ("fine", None),
        ("hang", "timeout"),
        ("raise", "ValueError"),
        ("killed", "killed"),
        ("full", "memory"),
    }
    assert not any(worker.process.is_alive() for worker in pool.workers)


def test_reasons_are_sentences():
    pool = WorkerPool(misbehave, num_workers=1, timeout=0.5)
    reasons = [failure.reason for _, failure in pool.run([("raise",), ("hang",), ("crash",)])]
    assert reasons == ["ValueError: no good", "took longer than 0.5 s", "the process died with exit code 3"]


def test_a_task_whose_process_dies_is_tried_once_more_alone(tmp_path):
    log = tmp_path / "log"
    kinds = ["once", *["fine"] * 6, "crash"]
    outcomes = list(WorkerPool(misbehave, num_workers=2, timeout=60).run([(kind, log) for kind in kinds]))
    assert [task[0] for task, failure in outcomes if failure is not None] == ["crash"]
    assert len(outcomes) == len(kinds)
    events = [line.split()[0] for line in log.read_text().splitlines()]
    assert events.count("once") == events.count("crash") == 2
    # The second attempts begin when all others have ended, one after the other.
    assert events[-3:] in (["once", "end-of-once", "crash"], ["crash", "once", "end-of-once"])


def test_a_process_killed_at_its_start_is_replaced(tmp_path):
    setup = functools.partial(die_at_first_start, tmp_path / "killed")
    outcomes = WorkerPool(misbehave, num_workers=2, timeout=60, setup=setup).run([("fine",)] * 3)
    assert list(outcomes) == [(("fine",), None)] * 3
    assert (tmp_path / "killed").exists()


def test_processes_that_never_start_are_an_error():
    pool = WorkerPool(misbehave, num_workers=1, timeout=60, setup=die_at_start)
    with pytest.raises(RuntimeError, match=r"end before they start.*exit code 5"):
        list(pool.run([("fine",)] * 20))


def test_giving_up_stops_the_processes():
    pool = WorkerPool(misbehave, num_workers=2, timeout=600)
    outcomes = pool.run([("hang",), ("fine",), ("fine",)])
    assert next(outcomes) == (("fine",), None)
    outcomes.close()
    assert not any(worker.process.is_alive() for worker in pool.workers)


LEADER = """
import sys
from pathlib import Path
from diffusers_sparse3d.training.worker_pool import WorkerPool
from tests.training.test_worker_pool import announce_and_hang

if __name__ == "__main__":
    list(WorkerPool(announce_and_hang, 1, 600).run([(Path(sys.argv[1]),)]))
"""


def announce_and_hang(path):
    path.write_text(str(os.getpid()))
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc whether a process is there")
def test_workers_end_with_the_process_that_leads(tmp_path):
    (tmp_path / "leader.py").write_text(LEADER)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "leader.py"), str(tmp_path / "worker")]
    leader = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 60
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    leader.kill()
    leader.wait()
    status = Path("/proc", (tmp_path / "worker").read_text(), "status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Its imports are not those of its processes, which are new interpreters.
GPU_LEADER = """
if __name__ == "__main__":
    import functools
    import sys
    from pathlib import Path
    from diffusers_sparse3d.training.preparation import run
    from diffusers_sparse3d.training.preparation.command import make_settings, parse_arguments
    from diffusers_sparse3d.training.preparation.groups import Group
    from diffusers_sparse3d.training.preparation.index import MeshEntry
    from diffusers_sparse3d.training.preparation.jobs import Options
    from diffusers_sparse3d.training.worker_pool import WorkerPool
    from tests.training import asks_for_gpus
    from tests.training.test_worker_pool import misbehave

    modules, setup = ("tests.training.asks_for_gpus",), functools.partial(asks_for_gpus.take_device, "cuda")
    forked = WorkerPool(asks_for_gpus.tell_device, 1, 60, None, modules)
    print([failure.reason for _, failure in forked.run([(0,)])])
    pool = WorkerPool(misbehave, 2, 2, setup, modules, uses_gpu=True)
    kinds = ["hang", "fine", "killed", "fine"]
    print(sorted((kind, failure.cause if failure else "") for (kind,), failure in pool.run((kind,) for kind in kinds)))
    print(any(worker.process.is_alive() for worker in pool.workers))
    run.PRELOADED, run.set_up, run.perform = modules[0], asks_for_gpus.take_device, asks_for_gpus.tell_device
    settings = make_settings(parse_arguments(["--input", "x", "--output", "x"]))
    options = Options(Path(sys.argv[1]), settings, renders_only=True, device="cuda", num_workers=1)
    preparation = run.Preparation(options, lambda count, failure: None)
    preparation.run([Group(0, [MeshEntry("a", Path("a.ply"))])])
    print([failure.reason for _, failure in preparation.failures])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no process is forked")
def test_processes_on_a_gpu_are_not_forked_from_one_that_has_asked_for_gpus(tmp_path):
    """Also where the server that forks the processes of other pools runs already, and for meshes prepared on a GPU."""
    (tmp_path / "leader.py").write_text(GPU_LEADER)
    command = [sys.executable, str(tmp_path / "leader.py"), str(tmp_path / "output")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    leader = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert leader.returncode == 0, leader.stderr
    outcomes = [("fine", ""), ("fine", ""), ("hang", "timeout"), ("killed", "killed")]
    assert leader.stdout.splitlines() == [
        "['MemoryError: the process may use no GPU']",
        str(outcomes),
        "False",
        "['ValueError: the process may use a GPU']",
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_task_is_run(num_workers):
    pool = WorkerPool(misbehave, num_workers, timeout=60)
    outcomes = pool.run(iter([("fine",), ("raise",), ("fine",)]))
    assert next(outcomes) == (("fine",), None)
    pool.add_first(("full",))
    assert sorted(failure.cause if failure else "" for _, failure in outcomes) == ["", "ValueError", "memory"]
    assert list(pool.run([])) == []
