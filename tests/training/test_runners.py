"""Pool, parts and Ray make the same shards; a folder has one preparation at a time; kills change nothing."""

import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
import trimesh

from diffusers_sparse3d.files import write_text
from diffusers_sparse3d.training.preparation import ray_runner
from diffusers_sparse3d.training.preparation.groups import Part
from diffusers_sparse3d.training.preparation.index import MeshIndex
from diffusers_sparse3d.training.preparation.jobs import Options, set_up
from diffusers_sparse3d.training.preparation.locks import beginning, locked
from diffusers_sparse3d.training.preparation.ray_runner import resources
from diffusers_sparse3d.training.preparation.report import read_rows
from diffusers_sparse3d.training.preparation.run import Preparation, prepare_group
from tests.training.prepared import prepare, settings


# Two meshes a shard, in shards of one resolution.
OPTIONS = ["--resolutions", "32", "--num_views", "1", "--meshes_per_shard", "2"]
# Parts that begin at the same time, and how often.
TOGETHER, ROUNDS = 6, 4


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Seven meshes, one of which is none, of different sizes, so that they do not finish in their order."""
    root = tmp_path_factory.mktemp("input")
    rows = ["id,mesh,license"]
    for number in range(7):
        path = root / f"{number}.ply"
        if number == 2:
            path.write_text("no mesh")
        else:
            trimesh.creation.torus(1, 0.3, major_sections=8 + 24 * (number % 3)).export(path)
        rows.append(f"mesh-{number},{path.name},CC0-1.0")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def expected(meshes, tmp_path_factory):
    """Hashes of the files of one run in this process."""
    output = tmp_path_factory.mktemp("output")
    prepare(meshes, output, *OPTIONS)
    return hashes(output)


def hashes(folder):
    """Hashes of all files but locks, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_one_run_makes_a_shard_for_each_group(expected):
    shards = [name for name in expected if name.endswith(".bin")]
    assert shards == [f"shards/00000{number}-000000.bin" for number in range(4)]


def test_processes_make_the_same_files(meshes, tmp_path, expected):
    prepare(meshes, tmp_path, *OPTIONS, "--num_workers", "2")
    assert hashes(tmp_path) == expected


def test_killed_processes_cost_nothing(meshes, tmp_path, expected, monkeypatch):
    """Every process is killed twice on the way: their meshes are tried again, and the files are the same."""
    finish, finished = Preparation._finish, []

    def kill(preparation, entry, failure):
        finish(preparation, entry, failure)
        finished.append((entry.id, failure and failure.cause))
        if len(finished) in (1, 3):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(Preparation, "_finish", kill)
    prepare(meshes, tmp_path, *OPTIONS, "--num_workers", "2")
    assert hashes(tmp_path) == expected
    assert [pair for pair in finished if pair[1] is not None] == [("mesh-2", "reading")]


def test_parts_make_the_same_files(meshes, tmp_path, expected):
    for part in ("2/3", "0/3", "1/3"):
        prepare(meshes, tmp_path, *OPTIONS, "--part", part)
    assert not (tmp_path / "index.parquet").exists()
    assert sorted(path.name for path in tmp_path.glob("failures*")) == [f"failures-{part}-3.csv" for part in range(3)]
    prepare(meshes, tmp_path, *OPTIONS, "--merge")
    assert hashes(tmp_path) == expected
    assert [path.name for path in tmp_path.glob(".lock*")] == [".lock"]


def begin(output, part, barrier, outcomes):
    """Begins a part of a run as soon as all others do, several times, each in a new folder."""
    for number in range(ROUNDS):
        barrier.wait()
        try:
            prepare(output / "meshes", output / str(number), *OPTIONS, "--part", part, "--splits", "none")
            outcomes.put("done")
        except Exception as error:
            outcomes.put(repr(error))


def test_parts_that_begin_together(meshes, tmp_path):
    """They write the same settings to one folder, and none of them takes another's half of a file, or its end."""
    context = multiprocessing.get_context("fork")
    barrier, outcomes = context.Barrier(TOGETHER), context.Queue()
    shutil.copytree(meshes, tmp_path / "meshes")
    parts = [f"{part}/{TOGETHER}" for part in range(TOGETHER)]
    processes = [
        context.Process(target=begin, args=(tmp_path, part, barrier, outcomes), daemon=True) for part in parts
    ]
    for process in processes:
        process.start()
    assert {outcomes.get(timeout=60) for _ in range(ROUNDS * TOGETHER)} == {"done"}
    for process in processes:
        process.join()
    assert not list(tmp_path.rglob("*.partial*"))
    prepare(meshes, tmp_path / "0", *OPTIONS, "--merge")
    assert not list((tmp_path / "0").glob(".lock-*"))


def write_together(path, number, barrier, outcomes):
    """Writes a file when all others do, several times."""
    for _ in range(10 * ROUNDS):
        barrier.wait()
        try:
            write_text(path, str(number) * 100_000)
            outcomes.put("done")
        except OSError as error:
            outcomes.put(repr(error))


def test_processes_that_write_one_file_together(tmp_path):
    """Where a file system has no locks, each of them still writes the whole of it."""
    context = multiprocessing.get_context("fork")
    barrier, outcomes = context.Barrier(TOGETHER), context.Queue()
    arguments = [(tmp_path / "metadata.json", number, barrier, outcomes) for number in range(TOGETHER)]
    processes = [context.Process(target=write_together, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    assert {outcomes.get(timeout=60) for _ in range(10 * ROUNDS * TOGETHER)} == {"done"}
    for process in processes:
        process.join()
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert text == text[0] * 100_000


def test_parts_begin_one_after_the_other(tmp_path):
    context = multiprocessing.get_context("fork")
    locked_here, entered = context.Event(), context.Event()
    # Forked first: a process forked later would have the lock, too.
    process = context.Process(target=begin_after, args=(tmp_path, locked_here, entered), daemon=True)
    process.start()
    with beginning(tmp_path, Part(0, 2)):
        locked_here.set()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    process.join(10)


def begin_after(output, locked_there, entered):
    locked_there.wait(10)
    with beginning(output, Part(1, 2)):
        entered.set()


@pytest.mark.parametrize("options", [[], ["--part", "0/2"]])
def test_partial_files_of_a_killed_process_are_deleted(meshes, tmp_path, options):
    """By the run that has the folder to itself: those of other parts may be about to take their places."""
    left = tmp_path / ".preparation-0123456789ab.partial.json"
    left.write_text("{")
    prepare(meshes, tmp_path, *OPTIONS, "--splits", "none", *options)
    assert left.exists() is bool(options)


@pytest.fixture(scope="module")
def cluster():
    """A Ray of this machine with room for two tasks at a time."""
    ray = pytest.importorskip("ray")
    # Sockets need a short path. The working directory and the path of modules are those of this process.
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    options = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(address="local", num_cpus=2, _temp_dir=folder, object_store_memory=80_000_000, **options)
    yield ray
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def fragile_prepare_group(group, options):
    """Prepares a group, but kills its process the first time that it is to prepare the second group."""
    path = options.output / f"killed-{group.number}"
    if group.number == 1 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return prepare_group(group, options)


def test_ray_makes_the_same_files(meshes, tmp_path, expected, cluster, monkeypatch):
    """Also where a process of Ray is killed, which costs another attempt of its group."""
    monkeypatch.setattr(ray_runner, "prepare_group", fragile_prepare_group)
    prepare(meshes, tmp_path, *OPTIONS, "--runner", "ray", "--num_workers", "1")
    (tmp_path / "killed-1").unlink()
    assert hashes(tmp_path) == expected


def test_processes_share_gpus(tmp_path, monkeypatch):
    """Those of a pool take turns, and a task of Ray says which fraction of a GPU it needs."""
    taken, threads = [], torch.get_num_threads()
    monkeypatch.setenv("IGL_NUM_THREADS", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for index in range(5):
        set_up("cuda", index)
    set_up("cpu", 0)
    torch.set_num_threads(threads)
    assert taken == [0, 1, 0, 1, 0]
    options = Options(tmp_path, settings(), device="cuda", num_workers=2)
    assert resources(options, 8) == {"num_cpus": 2, "num_gpus": 0.25}
    assert resources(options, 1) == {"num_cpus": 2, "num_gpus": 2}
    assert resources(replace(options, device="cpu"), 8) == {"num_cpus": 2, "num_gpus": 0}
    with pytest.raises(ValueError, match="`num_workers` must be a multiple of `workers_per_gpu`"):
        resources(replace(options, num_workers=3), 2)


def test_a_preparation_has_its_folder_to_itself(meshes, tmp_path):
    with locked(tmp_path, Part()):
        for options in ([], ["--part", "0/2"], ["--merge"]):
            with pytest.raises(ValueError, match=rf"`output` must be a folder that no other .*process {os.getpid()} "):
                prepare(meshes, tmp_path, *OPTIONS, *options)
    with locked(tmp_path, Part(0, 2)):
        with locked(tmp_path, Part(1, 2)):
            pass
        for options in ([], ["--part", "0/2"], ["--part", "1/3"], ["--merge"]):
            with pytest.raises(ValueError, match="`output` must be a folder that no other"):
                prepare(meshes, tmp_path, *OPTIONS, *options)
    assert not list(tmp_path.rglob("*.bin"))
    prepare(meshes, tmp_path, *OPTIONS, "--part", "1/3", "--limit", "1")


def test_a_kill_before_any_file_operation_changes_nothing(meshes, tmp_path):
    """See prepare_crash_points.py."""
    few = tmp_path / "few"
    shutil.copytree(meshes, few)
    (few / "index.csv").write_text("".join((meshes / "index.csv").open().readlines()[:4]))
    command = [sys.executable, "-m", "tests.training.prepare_crash_points", str(few), str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    whole, *killed = [json.loads(line) for line in run.stdout.splitlines()]
    assert whole["statuses"] == [0, 0] and len(whole["files"]) == 7
    assert len(killed) == len(whole["operations"]) + whole["operations"].count("os.rename") > 50
    for line in killed:
        assert line["statuses"] == [17, 0], line
        assert line["files"] == whole["files"], line


def test_objaverse(tmp_path, capsys):
    """A download as its package leaves it: licences are kept, and non-commercial ones and missing ones left out."""
    root = tmp_path / "hf-objaverse-v1"
    licenses = {"a": "by", "b": "by-nc", "c": "cc0", "d": "by-nc-sa", "e": None, "f": "by-sa", "g": "by-nc-nd"}
    for folder in ("000-000", "000-001"):
        (root / "glbs" / folder).mkdir(parents=True)
        facts = {}
        for name, license in licenses.items():
            trimesh.creation.box().export(root / "glbs" / folder / f"{folder}{name}.glb")
            facts[f"{folder}{name}"] = {
                "uid": f"{folder}{name}",
                "name": f"Box {name}",
                "license": license,
                "user": {"username": "ann", "displayName": "Ann A."},
                "categories": [{"name": "furniture-home"}],
            }
        facts["not-downloaded"] = {"license": "by"}
        (root / "metadata").mkdir(exist_ok=True)
        with gzip.open(root / "metadata" / f"{folder}.json.gz", "wt") as file:
            json.dump(facts, file)
    options = ["--num_views", "1", "--resolutions", "32", "--val_fraction", "0.5"]
    prepare(root, tmp_path / "free", *options)
    assert "6 meshes are left out for their licence" in capsys.readouterr().out
    rows = parquet.read_table(tmp_path / "free" / "index.parquet").to_pylist()
    assert {row["id"][-1]: row["license"] for row in rows} == {"a": "CC-BY-4.0", "c": "CC0-1.0", "f": "CC-BY-SA-4.0"}
    assert {(row["author"], row["category"], row["source"]) for row in rows} == {
        ("Ann A.", "furniture-home", "objaverse")
    }
    assert {row["split"] for row in rows} == {"train", "val"}
    assert "| objaverse | CC-BY-SA-4.0 | Ann A. | 2 |" in (tmp_path / "free" / "README.md").read_text()
    prepare(root, tmp_path / "all", *options, "--non_commercial", "--limit", "3")
    rows = parquet.read_table(tmp_path / "all" / "index.parquet").to_pylist()
    assert [row["license"] for row in rows] == ["CC-BY-4.0", "CC-BY-NC-4.0", "CC0-1.0"]
    prepare(root, tmp_path / "some", *options, "--licenses", "CC0-1.0")
    rows = parquet.read_table(tmp_path / "some" / "index.parquet").to_pylist()
    assert [row["license"] for row in rows] == ["CC0-1.0"] * 2
    (root / "metadata" / "000-001.json.gz").unlink()
    with pytest.raises(ValueError, match=r"`input` must be a download of Objaverse .*000-001.*load_annotations"):
        list(MeshIndex(root, {}, [], 0.0))
    # `load_objects` leaves no metadata at all; without them, no licence would keep a mesh out.
    shutil.rmtree(root / "metadata")
    with pytest.raises(ValueError, match=r"`input` must be a download of Objaverse .*000-000.*load_annotations"):
        prepare(root, tmp_path / "unknown", *options)
    # A folder of one's own that has the same name.
    (tmp_path / "own" / "glbs" / "chairs").mkdir(parents=True)
    trimesh.creation.box().export(tmp_path / "own" / "glbs" / "chairs" / "one.glb")
    assert [entry.id for entry in MeshIndex(tmp_path / "own", {}, [], 0.0)] == ["glbs-chairs-one"]


def test_input_that_has_changed_is_told(meshes, tmp_path):
    """What is prepared stays, and is not taken for what the input is now."""
    copy, output = tmp_path / "meshes", tmp_path / "data"
    shutil.copytree(meshes, copy)
    prepare(copy, output, *OPTIONS)
    before = hashes(output / "shards")
    trimesh.creation.box().export(copy / "0.ply")
    (copy / "1.ply").unlink()
    index = copy / "index.csv"
    index.write_text(index.read_text().replace("mesh-3,3.ply,CC0-1.0", "mesh-3,3.ply,CC-BY-4.0"))
    prepare(copy, output, *OPTIONS)
    assert hashes(output / "shards") == before
    failures = {row["id"]: row for row in read_rows(output / "failures.csv")}
    assert {name: row["cause"] for name, row in failures.items()} == {
        "mesh-0": "changed", "mesh-2": "reading", "mesh-3": "changed",
    }  # fmt: skip
    assert failures["mesh-0"]["reason"].startswith("mesh_bytes is ")
    assert failures["mesh-3"]["reason"].startswith("license is 'CC-BY-4.0', not 'CC0-1.0'; what is prepared stays")
    prepare(meshes, output, *OPTIONS)
    assert [row["id"] for row in read_rows(output / "failures.csv")] == ["mesh-2"]


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shards"])
def test_shards_of_another_origin_are_not_mixed_with(meshes, tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="`output` must be a new folder or one that a preparation began"):
        prepare(meshes, tmp_path, *OPTIONS)


def test_failures_stay_until_their_meshes_are_there(meshes, tmp_path):
    prepare(meshes, tmp_path, *OPTIONS)
    assert [row["id"] for row in read_rows(tmp_path / "failures.csv")] == ["mesh-2"]
    prepare(meshes, tmp_path, *OPTIONS, "--limit", "1")
    assert [row["id"] for row in read_rows(tmp_path / "failures.csv")] == ["mesh-2"]
    copy = tmp_path / "meshes"
    shutil.copytree(meshes, copy)
    trimesh.creation.box().export(copy / "2.ply")
    prepare(copy, tmp_path, *OPTIONS)
    assert read_rows(tmp_path / "failures.csv") == []
    assert parquet.read_table(tmp_path / "index.parquet")["id"].to_pylist().count("mesh-2") == 1
