"""The benchmark of context parallelism runs on two processes, at a tiny size."""

import json
import multiprocessing

import pytest
import torch
import torch.distributed as dist

from benchmarks import context_parallel, report


def work(rank, store, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    context_parallel.main(context_parallel.parse_args(arguments))


def test_one_process_is_compared_with_two(tmp_path):
    arguments = ["--tiny", "--device", "cpu", "--dtype", "float32", "--cases", "2x37", "1x9", "--calls", "2"]
    arguments += ["--json", str(tmp_path / "report.json")]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, tmp_path / "store", arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(row["samples"], row["tokens"]) for row in found["rows"]] == [(2, 37), (1, 9)]
    # Sums of the two processes are rounded otherwise.
    assert all(0 < row["difference"] < 1e-5 for row in found["rows"]), found["rows"]
    assert all(0 < row["rounding"] < 1e-5 for row in found["rows"]), found["rows"]
    assert found["gpus"] == 2 and found["command"].startswith(
        "torchrun --nproc_per_node 2 benchmarks/context_parallel"
    )
    lines = report.SECTIONS["context_parallel"].render(found)
    assert len(lines) == 4 and lines[2].startswith("| 2 x 37 | ") and lines[0].endswith("latents |")


def test_cases_are_samples_and_tokens():
    assert context_parallel.parse_args(["--cases", "3x5"]).cases == [(3, 5)]
    for text in ("3", "x5", "0x5", "3x-1"):
        with pytest.raises(SystemExit):
            context_parallel.parse_args(["--cases", text])
