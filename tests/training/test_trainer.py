import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.autograd import DeviceType

from diffusers_sparse3d import DenseDiT, DenseVAE, SparseDiT, SparseVAE
from diffusers_sparse3d.models.checkpointing import checkpoint_keeping_attention
from diffusers_sparse3d.training import dense_vae, dit, refiner, sparse_vae
from diffusers_sparse3d.training.checkpoints import list_checkpoints
from diffusers_sparse3d.training.configuration import (
    VAETrainingConfig,
    build_config,
    check_model_config,
    load_config,
    parse_config,
    shipped_configs,
)
from diffusers_sparse3d.training.distributed import SHARDED_IN_BLOCKS, _block_names
from diffusers_sparse3d.training.gradient_checkpointing import set_gradient_checkpointing
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.profiling import EARLIER_STEPS, PARTS, describe
from diffusers_sparse3d.training.schedule import learning_rate_factor
from tests.training.tiny import cached_latents


def train(folder, options, **changes):
    dense_vae.train(build_config(dense_vae.DenseVAEConfig, {**options, "output_dir": str(folder), **changes}))


def test_resumed_training_is_the_same(tmp_path, common_options, dense_vae_model):
    options = {
        **common_options,
        "model": dense_vae_model,
        "max_train_steps": 8,
        "gradient_accumulation_steps": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 3,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
    }
    train(tmp_path / "whole", options)
    assert [path.name for path in list_checkpoints(tmp_path / "whole")] == [f"checkpoint-{n}" for n in (4, 6, 8)]

    # A break after step 5: the checkpoint of step 4 is the last, the log has one more entry.
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", broken / "checkpoint-4")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join(lines[:5]))
    train(broken, {**options, "validation_steps": 6}, resume_from_checkpoint="latest")

    keys = ("step", "loss", "kl", "grad_norm", "learning_rate")
    whole, resumed = (
        [[entry[key] for key in keys] for entry in read_metrics(folder) if "loss" in entry]
        for folder in (tmp_path / "whole", broken)
    )
    assert [entry[0] for entry in resumed] == list(range(1, 9))
    assert resumed == whole
    first, second = (
        load_file(f / "vae" / "diffusion_pytorch_model.safetensors") for f in (tmp_path / "whole", broken)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)

    with pytest.raises(ValueError, match="resume_from_checkpoint"):
        train(broken, options, resume_from_checkpoint=str(tmp_path / "nowhere"))


def test_checkpointing_as_configured(tmp_path, dense_vae_model, sparse_vae_model):
    """None, that of PyTorch, and that which keeps attention, in models that have it."""
    values = {"data": "", "output_dir": str(tmp_path), "max_train_steps": 1}

    def functions(model, **options):
        set_gradient_checkpointing(model, build_config(sparse_vae.SparseVAEConfig, {**values, **options}))
        parts = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
        return {part._gradient_checkpointing_func for part in parts}

    keeping = {"gradient_checkpointing": True, "checkpointing_keeps_attention": True}
    assert not functions(SparseVAE(**sparse_vae_model))
    (plain,) = functions(DenseVAE(**dense_vae_model), gradient_checkpointing=True)
    assert plain is not checkpoint_keeping_attention
    assert functions(SparseVAE(**sparse_vae_model), **keeping) == {checkpoint_keeping_attention}
    with pytest.raises(ValueError, match="`checkpointing_keeps_attention` must be false for DenseVAE"):
        functions(DenseVAE(**dense_vae_model), **keeping)
    with pytest.raises(ValueError, match="`checkpointing_keeps_attention` needs `gradient_checkpointing`"):
        functions(DenseVAE(**dense_vae_model), checkpointing_keeps_attention=True)


def test_large_models_are_sharded_in_blocks(sparse_vae_model):
    """And smaller ones as a whole: a name is that of a class of blocks."""
    model = SparseVAE(**sparse_vae_model)
    count = sum(parameter.numel() for parameter in model.parameters())
    names = _block_names(model, count)
    assert names and set(names) <= {type(part).__name__ for part in model.modules()}
    assert _block_names(model, count + 1) == _block_names(model.encoder, 0) == []
    assert 40e6 < SHARDED_IN_BLOCKS < 500e6, "between the published SparseVAE and SparseDiT"


def test_training_stops_on_time(tmp_path, common_options, dense_vae_model):
    options = {**common_options, "model": dense_vae_model, "max_train_minutes": 0.02, "lr_scheduler": "cosine"}
    train(tmp_path, options)
    entries = [entry for entry in read_metrics(tmp_path) if "loss" in entry]
    assert 0.02 <= entries[-1]["minutes"] < 0.2 and entries[-1]["step"] % 10 == 0
    assert entries[-1]["learning_rate"] < entries[0]["learning_rate"] == options["learning_rate"]
    assert (tmp_path / "vae" / "config.json").exists()


def test_a_model_that_is_not_there_is_named(tmp_path, common_options):
    """The setting and the folder are in the error, which is otherwise about a hub that cannot be reached."""
    options = {**common_options, "output_dir": str(tmp_path / "out"), "max_train_steps": 1}
    for name in ("vae", "pretrained"):
        (tmp_path / name).mkdir()
    sizes = {"block_out_channels": [2, 4], "norm_num_groups": 2}
    refiner_options = {**options, "vae": str(tmp_path / "vae"), "model": sizes}
    with pytest.raises(OSError, match=f"`vae` cannot be loaded from '{tmp_path / 'vae'}'"):
        refiner.train(build_config(refiner.RefinerConfig, refiner_options))
    pretrained = {"pretrained": str(tmp_path / "pretrained")}
    with pytest.raises(OSError, match="`pretrained` cannot be loaded from"):
        sparse_vae.train(build_config(sparse_vae.SparseVAEConfig, {**options, **pretrained}))


@pytest.mark.parametrize(("total", "profiled"), [(EARLIER_STEPS + 3, 2), (EARLIER_STEPS + 1, 1), (EARLIER_STEPS, 0)])
def test_profile_of_some_steps(tmp_path, common_options, dense_vae_model, total, profiled):
    """The page and the trace have the steps asked for, or those that there are, with their parts and operators."""
    train(tmp_path, {**common_options, "model": dense_vae_model, "max_train_steps": total, "profile_steps": 2})
    files = [tmp_path / "profile.txt", tmp_path / "profile.json"]
    assert [file.exists() for file in files] == [profiled > 0] * 2
    if profiled:
        page, trace = files[0].read_text(), json.loads(files[1].read_text())
        assert page.startswith(f"{profiled} steps of ")
        assert all(f"\n{name} " in page for name in PARTS) and "convolution" in page
        names = [event.get("name") for event in trace["traceEvents"] if event.get("ph") == "X"]
        assert names.count("step: forward") == names.count("step: averages") == profiled


def test_page_of_a_profile_on_a_gpu():
    """Kernels alone make the GPU busy: neither operators of the host nor marks that the GPU repeats."""

    def row(key, device, device_time=0.0, host_time=0.0, count=4, mark=False):
        values = {"key": key, "device_type": device, "self_device_time_total": device_time, "count": count}
        return SimpleNamespace(**values, cpu_time_total=host_time, is_user_annotation=mark)

    rows = [
        row("aten::mm", DeviceType.CPU, 6000.0, 9000.0),
        row("step: forward", DeviceType.CPU, 0.0, 8000.0),
        row("step: forward", DeviceType.CUDA, 7000.0, mark=True),
        row("small kernel", DeviceType.CUDA, 1000.0, count=8),
        row("large kernel", DeviceType.CUDA, 5000.0),
    ]
    page = describe(SimpleNamespace(key_averages=lambda: rows), 0.02, 2, True).splitlines()
    assert page[0].startswith("2 steps of 10.0 ms") and "30% of the time, with 6 kernels" in page[2]
    assert "forward          4.0" in page
    assert [line.split() for line in page[-2:]] == [
        ["2.50", "83.3%", "2.0", "large", "kernel"],
        ["0.50", "16.7%", "4.0", "small", "kernel"],
    ]


def test_two_processes(tmp_path, common_options, dense_vae_model):
    """One training on two processes, started as a user does, with data loading processes."""
    config = {**common_options, "output_dir": str(tmp_path), "model": dense_vae_model, "max_train_steps": 8}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "num_workers": 1}))
    root = Path(__file__).parents[2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = [str(root / "training" / "train_dense_vae.py"), "--config", str(tmp_path / "config.yaml")]
    result = subprocess.run(
        [*launch, *script, "--override", "learning_rate=4e-3"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    curve = [entry["loss"] for entry in read_metrics(tmp_path) if "loss" in entry]
    assert len(curve) == 8 and curve[-1] < 0.9 * curve[0]
    # Each process has written a shard of its own.
    assert len(list(tmp_path.glob("latents/*/shards/*.bin"))) == 2
    assert len(cached_latents(tmp_path / "latents", config["data"])) == 4


def test_learning_rate():
    def config(**values):
        return build_config(VAETrainingConfig, {"data": "x", "output_dir": "x", "lr_warmup_steps": 4, **values})

    constant = config(max_train_steps=100)
    assert [learning_rate_factor(constant, step, 0) for step in (0, 1, 3, 50)] == [0.25, 0.5, 1, 1]
    cosine = config(max_train_steps=100, max_train_minutes=10, lr_scheduler="cosine", lr_min_ratio=0.1)
    assert learning_rate_factor(cosine, 50, 0) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 20, 5) == pytest.approx(0.55)
    assert learning_rate_factor(cosine, 100, 1) == pytest.approx(0.1)


def test_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: x\noutput_dir: y\nmax_train_steps: 5\nlearning_rate: 1e-4\nmodel: {latent_channels: 2}\n")
    overrides = ["model.mid_layers=3", "batch_size=2", "mixed_precision=no"]
    arguments = ["--config", str(path), "--override", *overrides, "--max_train_steps", "7"]
    config = parse_config(VAETrainingConfig, "", arguments)
    assert config.mixed_precision == "no"
    assert (config.learning_rate, config.batch_size, config.max_train_steps) == (1e-4, 2, 7)
    assert config.model == {"latent_channels": 2, "mid_layers": 3}
    for override, message in (
        ("learning_rte=1", "learning_rte"),
        ("batch_size=many", "batch_size"),
        ("batch_size=0", "batch_size"),
        ("lr_scheduler=linear", "lr_scheduler"),
        ("mixed_precision=fp8", "mixed_precision"),
        ("max_train_steps=null", "max_train_steps"),
        ("seed", "key=value"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config(VAETrainingConfig, path, [override])
    with pytest.raises(ValueError, match="channels"):
        check_model_config(DenseVAE, {"channels": 3})


@pytest.mark.parametrize("name", ["vae_dense", "vae_sparse", "dit_dense", "dit_sparse"])
def test_shipped_configurations_are_valid(name):
    config_class, model_class = {
        "vae_dense": (dense_vae.DenseVAEConfig, DenseVAE),
        "vae_sparse": (sparse_vae.SparseVAEConfig, SparseVAE),
        "dit_dense": (dit.DiTConfig, DenseDiT),
        "dit_sparse": (dit.DiTConfig, SparseDiT),
    }[name]
    for path in shipped_configs().glob(f"*/{name}.yaml"):
        config = load_config(config_class, path)
        check_model_config(model_class, config.model)
        with torch.device("meta"):
            model_class(**config.model)
