"""The plan of steps on more GPUs, against numbers counted by hand."""

import pytest
import torch

import report_plan
from published import MODELS, count_parameters, read_published


ONE = {"model": "dit", "layout": "one", "gpus": 1, "seconds": 1.0, "peak_gib": 20.0, "communication": 0.0}
DDP = {"model": "dit", "layout": "ddp", "gpus": 2, "seconds": 1.25, "peak_gib": 22.0, "communication": 0.08}
FSDP = {"model": "dit", "layout": "fsdp", "gpus": 2, "seconds": 1.0, "peak_gib": 15.0, "communication": 0.1}


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_communication(layout):
    """A million parameters: 8 MB, times 1/2, 7/8 and 63/64, at 450 GB/s in a host and 50 GB/s between hosts."""
    wires = [report_plan.wire_bytes(layout, gpus, 1_000_000) for gpus in (1, 2, 8, 64)]
    assert wires == [0, 4e6, 7e6, 7.875e6]
    seconds = [report_plan.wire_seconds(layout, gpus, 1_000_000) for gpus in (1, 8, 64)]
    assert seconds == pytest.approx([0, 15.5556e-6, 157.5e-6], rel=1e-5)


def test_seconds():
    """A step on two GPUs takes 1.15 s besides 0.1 s of communication; it is never below that on one GPU."""
    assert report_plan.local_seconds(ONE, DDP) == pytest.approx(1.15)
    assert report_plan.local_seconds(ONE, FSDP) == 1.0
    # 1e9 parameters on 64 GPUs: 7.875 GB at 50 GB/s.
    assert report_plan.exposed_seconds("ddp", 64, 10**9, ONE, DDP) == pytest.approx(1.15 + 0.1 + 0.1575)
    assert report_plan.exposed_seconds("fsdp", 64, 10**9, ONE, FSDP) == pytest.approx(1.0 + 0.1 + 0.1575)


def test_memory():
    """2^26 parameters are 1 GiB of state, of which two GPUs have a half each, 8 an eighth, one all."""
    assert report_plan.memory_gib("ddp", 64, 2**26, DDP) == 22.0
    found = [report_plan.memory_gib("fsdp", gpus, 2**26, FSDP) for gpus in (1, 2, 8, 64)]
    assert found == pytest.approx([15.5, 15.0, 15 - 3 / 8, 15 - 31 / 64])


def test_table(monkeypatch):
    """Layouts that were not measured are left out; rows of more than two GPUs, and of failed runs, do not count."""
    monkeypatch.setattr(report_plan, "count_parameters", lambda model: 10**9)
    others = [{**DDP, "gpus": 4, "seconds": 9.0}, {"gpus": 2, "error": "x"}]
    lines = report_plan.plan_table({"rows": [ONE, DDP, *others]})
    assert [line.split(" | ")[1:] for line in lines[2:5]] == [
        ["1", "measured", "1.000", "2.0", "1.00", "20.0 |"],
        ["8", "DDP, plan", "1.150 to 1.266", "12.6 to 13.9", "0.79 to 0.87", "22.0 |"],
        ["64", "DDP, plan", "1.150 to 1.408", "90.9 to 111.3", "0.71 to 0.87", "22.0 |"],
    ]
    assert lines[5] == "" and "SparseDiT | DDP | 8.9 | 100.0 | - | - |" in lines[-1]


def test_parameters_and_batches_are_those_of_the_configurations():
    for model, samples in (("dit", 2), ("vae", 1)):
        published = read_published(model)
        assert published["batch_size"] == samples
        with torch.device("meta"):
            made = MODELS[model](**published["model"])
        assert count_parameters(model) == sum(parameter.numel() for parameter in made.parameters())
