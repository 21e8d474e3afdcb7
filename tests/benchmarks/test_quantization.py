"""The benchmark of quantised weights runs, on a pipeline of tiny models."""

import json
import time

import pytest
import torch

import cache_recipes
from benchmarks import quantization
from tests.pipelines.tiny import tiny_image, tiny_pipeline


def test_schemes_are_compared_with_the_run_without(tmp_path, monkeypatch):
    """A scheme that does not run is a row that says why."""

    def load(args, scheme):
        if scheme == "bitsandbytes, nf4":
            raise RuntimeError("No GPU found.\nA second line")
        settings = {"default_dense_num_inference_steps": 2, "default_num_inference_steps": 2}
        pipeline = tiny_pipeline(occupancy_threshold=0.65, **settings)
        return pipeline if scheme == "none" else pipeline.to(torch.float64)

    monkeypatch.setattr(quantization, "load", load)
    for module in (quantization, cache_recipes):
        monkeypatch.setattr(module, "compare", lambda mesh, exact: {"f1": len(exact.faces), "chamfer": 1.0})
    tiny_image().save(tmp_path / "disc.png")
    arguments = ["--images", str(tmp_path / "disc.png"), "--seeds", "3", "4", "--device", "cpu"]
    arguments += ["--schemes", "torchao, int8 weights", "bitsandbytes, nf4", "--json", str(tmp_path / "report.json")]
    quantization.main(quantization.parse_args(arguments))
    report = json.loads((tmp_path / "report.json").read_text())
    none, wide, failed = report["rows"]
    assert none["scheme"] == "none" and "f1" not in none and wide["mib"] == pytest.approx(2 * none["mib"], rel=0.1)
    faces = [run["f1"] for run in wide["runs"]]
    assert faces[0] != faces[1] and report["other_seed"]["f1"] == faces[0]
    assert failed == {"scheme": "bitsandbytes, nf4", "error": "RuntimeError: No GPU found."}


def test_schemes_run_in_processes_that_are_ended_in_time(tmp_path, monkeypatch):
    settings = {"default_dense_num_inference_steps": 2, "default_num_inference_steps": 2}
    tiny_pipeline(occupancy_threshold=0.65, **settings).save_pretrained(tmp_path / "pipeline")
    tiny_image().save(tmp_path / "disc.png")
    arguments = ["--model", str(tmp_path / "pipeline"), "--images", str(tmp_path / "disc.png"), "--seeds", "3"]
    args = quantization.parse_args([*arguments, "--device", "cpu", "--limit", "60"])
    row = quantization.measure_apart(args, "none", tmp_path)
    assert row["mib"] > 0 and row["process_seconds"] > row["seconds"] > 0 and (tmp_path / "disc-3.ply").exists()
    monkeypatch.setattr(args, "limit", 0.05)
    assert quantization.measure_apart(args, "bitsandbytes, nf4", tmp_path) == {"error": "not finished after 0.05 s"}
    monkeypatch.setattr(quantization.sys, "executable", "false")
    monkeypatch.setattr(args, "limit", 60)
    assert quantization.measure_apart(args, "bitsandbytes, nf4", tmp_path) == {"error": "the process ended with 1"}


def test_memory_of_a_quantised_tensor_is_that_of_its_parts():
    class Quantised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2**18, dtype=torch.float32))
            self.register_buffer("codes", torch.zeros(2**20, dtype=torch.int8))

    assert quantization.weight_mib(Quantised()) == 2.0


def test_a_process_says_what_it_is_doing(capsys):
    quantization.print_stack_after(0.01)
    time.sleep(0.1)
    assert "test_a_process_says_what_it_is_doing" in capsys.readouterr().err
