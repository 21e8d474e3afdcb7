"""Trains tiny models on 1, 2 and 4 processes, whole and sharded: see test_processes.py.

A process that has never computed a gradient forks the processes of each group, which saves their imports. Each
training prints one line of JSON: its losses and gradient norms, the validation, and sums over its averaged weights.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from diffusers_sparse3d import DenseDiT, DenseVAE, SDFRefiner, SparseDiT, SparseVAE
from diffusers_sparse3d.data.records import pack_bits
from diffusers_sparse3d.training import checkpoints
from diffusers_sparse3d.training.balancing import make_schedule
from diffusers_sparse3d.training.batches import pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dense_vae import DenseVAEConfig, DenseVAETask
from diffusers_sparse3d.training.distributed import make_accelerator, on_main_process
from diffusers_sparse3d.training.dit import DiTConfig, DiTTask
from diffusers_sparse3d.training.lora import LoraWeights, add_adapter
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.phases import read_phases
from diffusers_sparse3d.training.refiner import RefinerConfig, RefinerTask
from diffusers_sparse3d.training.sampler import key_tensors
from diffusers_sparse3d.training.sparse_vae import SparseVAEConfig, SparseVAETask
from diffusers_sparse3d.training.task import Task
from diffusers_sparse3d.training.trainer import Trainer
from tests.training.tiny import DENSE_VAE, SPARSE_VAE


ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_register_tokens": 2,
}
# Matrices of 48 rows, which 4 processes share evenly, and of 24, 34 and others, which they do not.
TRANSFORMER = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_key_value_heads": 1,
    "cross_attention_dim": 32,
    "compression_block_size": 2,
    "selection_block_size": 2,
    "topk": 2,
    "window_size": 4,
    "norm_num_groups": 4,
}
DENSE_TRANSFORMER = {
    "sample_size": 2,
    "in_channels": 2,
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 24,
    "cross_attention_dim": 32,
    "pixel_aligned": True,
}
REFINER = {
    # A sixteenth of the channels of the VAE's decoder.
    "feature_channels": SPARSE_VAE["decoder_channels"] // 16,
    "block_out_channels": [4, 8],
    "mid_layers": 0,
    "norm_num_groups": 2,
    "sample_size": 32,
    "patch_size": 16,
}
OF_TRANSFORMER = {
    "vae": "x",
    "stage": "sparse",
    "model": TRANSFORMER,
    "image_encoder_model": ENCODER,
    "train_image_encoder": True,
    "num_inference_steps": 1,
    "color_jitter": 0.2,
}
ADAPTED = {**OF_TRANSFORMER, "image_encoder": "x", "image_encoder_model": {}, "train_image_encoder": False}
# The configuration of each kind of training. Transformers are sparse ones or, for "camera", a dense one with predicted
# cameras; for "lora" and "dora", adapters alone are trained.
CONFIGS = {
    "vae": (SparseVAEConfig, {"model": SPARSE_VAE}),
    "dense_vae": (DenseVAEConfig, {"model": DENSE_VAE, "dice_weight": 0.5}),
    "refiner": (RefinerConfig, {"vae": "x", "model": REFINER, "latent_noise": 0.1}),
    "dit": (DiTConfig, OF_TRANSFORMER),
    "lora": (DiTConfig, ADAPTED),
    "dora": (DiTConfig, ADAPTED),
    "camera": (
        DiTConfig,
        {
            **OF_TRANSFORMER,
            "stage": "dense",
            "model": DENSE_TRANSFORMER,
            "camera_weight": 0.5,
            "conditioning_dropout": 0.3,
        },
    ),
}
ADAPTERS = ["lora", "dora"] if importlib.util.find_spec("peft") else []
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    # The launcher's default: models are made in the main process alone and sent to the others in shards.
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


class Shapes(Dataset):
    """Ten samples of 3 to 40 blocks, as the datasets of both sparse models give them."""

    def __init__(self, blocks: bool):
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for size in (3, 40, 17, 8, 25, 5, 31, 12, 21, 9):
            places = torch.randperm(64, generator=generator)[:size].sort().values
            item = {"coords": torch.stack([places // 16, places // 4 % 4, places % 4], dim=1).int()}
            if blocks:
                values = torch.randn(size, 512, generator=generator)
                item.update(values=values.clamp(-1, 1).half(), sharp=pack_bits(values.abs() < 0.1 * size / 40))
            else:
                item["mean"] = (torch.randn(size, 4, generator=generator) + size / 20).half()
                item["logvar"] = torch.full((size, 4), -2.0).half()
                item["image"] = torch.randint(256, (4, 28, 28), dtype=torch.uint8, generator=generator)
            self.items.append(item)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key):
        return {"resolution": torch.tensor(32), **self.items[key.row], **key_tensors(key)}

    def sizes(self, resolution: int) -> np.ndarray:
        return np.array([len(item["coords"]) for item in self.items])


class Grids(Shapes):
    """Ten dense latents with images, six of them with cameras, as the dataset of the dense transformer gives them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for number in range(10):
            image = torch.randint(256, (4, 28, 28), dtype=torch.uint8, generator=generator)
            mean, camera = torch.randn(2, 2, 2, 2, generator=generator), torch.randn(6, generator=generator)
            item = {"mean": mean, "logvar": torch.full_like(mean, -2.0), "image": image}
            self.items.append({**item, "camera": camera if number in (0, 1, 2, 4, 7, 9) else camera * torch.nan})

    def sizes(self, resolution: int) -> np.ndarray:
        return np.ones(len(self), np.int64)


class Occupancies(Grids):
    """Ten occupancy grids, as the dataset of the dense VAE gives them."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        shares = torch.linspace(0.1, 0.9, 10)
        self.items = [{"occupancy": torch.rand(1, 4, 4, 4, generator=generator) < share} for share in shares]


def make_data(kind: str) -> Shapes:
    """Returns the samples of a kind of training."""
    if kind in ("camera", "dense_vae"):
        return Grids() if kind == "camera" else Occupancies()
    return Shapes(blocks=kind in ("vae", "refiner"))


def make_task(kind: str, config) -> Task:
    """Returns a tiny model with its losses."""
    if kind == "dense_vae":
        return DenseVAETask(DenseVAE(**DENSE_VAE), config)
    vae = DenseVAE(**DENSE_VAE) if kind == "camera" else SparseVAE(**SPARSE_VAE)
    if kind == "vae":
        return SparseVAETask(vae, config)
    if kind == "refiner":
        refiner = SDFRefiner(**REFINER)
        # Filters of random signs leave next to nothing of what they are given, and next to no gradient.
        for layer in (refiner.filter_in, refiner.filter_mid, refiner.filter_out):
            layer.conv_out.weight.data.abs_()
        return RefinerTask(refiner, vae, config)
    encoder = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**ENCODER))
    encoder.layernorm.requires_grad_(False)
    encoder.embeddings.mask_token.requires_grad_(False)
    transformer = DenseDiT(**config.model) if kind == "camera" else SparseDiT(**config.model)
    if kind in ADAPTERS:
        encoder.requires_grad_(False)
        # A last layer and gates of zero, as at the initialisation, would leave nothing before them a gradient.
        for parameter in transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        options = {"rank": 4, "lora_alpha": None, "lora_dropout": 0.0, "use_rslora": False}
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        add_adapter(transformer, argparse.Namespace(**options, lora_layers=layers, use_dora=kind == "dora"))
    return DiTTask(transformer, encoder, vae, config)


def make_trainer(kind: str, folder: Path, **options) -> Trainer:
    """Returns the trainer of a tiny model."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    values = {
        "data": "",
        "output_dir": str(folder),
        "cpu": True,
        "num_workers": 0,
        "batch_size": 2,
        "gradient_accumulation_steps": 4 // count,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_pictures": 1,
        "num_validation_samples": 3,
        "ema_decay": 0.9,
        "max_grad_norm": 0.5,
        # Of gradients that are zero but for rounding, AdamW would make steps of the learning rate.
        "adam_epsilon": 1e-3,
        **options,
    }
    config_class, more = CONFIGS[kind]
    config = build_config(config_class, {**values, **more})
    accelerator = make_accelerator(config)
    task, data = make_task(kind, config), make_data(kind)
    names, phases = [str(row) for row in range(len(data))], read_phases(config, [32])
    schedule = make_schedule(phases, data.sizes, names, 0, count, accelerator.gradient_accumulation_steps)
    validation_schedule = make_schedule(phases, data.sizes, names, 0)
    return Trainer(config, accelerator, task, data, pack, schedule, data, validation_schedule)


def save(kind: str, task: Task, folder: Path) -> None:
    """Saves what a training of a kind saves."""
    if kind in ADAPTERS:
        weights = LoraWeights()
        weights.add("transformer", task.transformer)
        weights.save(folder)
    else:
        task.save_pretrained(folder)


def report(name: str, trainer: Trainer, folder: Path, counts: dict[str, int]) -> None:
    """Prints the results of a training, in the main process."""
    entries = read_metrics(folder)
    weights = [parameter.detach() for _, parameter in sorted(trainer.task.named_parameters())]
    saved = checkpoints.list_checkpoints(folder)[-1]
    facts = {
        "name": name,
        **counts,
        "steps": [entry["step"] for entry in entries if "loss" in entry],
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "cameras": [entry["camera"] for entry in entries if "camera" in entry],
        "norms": [entry["grad_norm"] for entry in entries if "grad_norm" in entry],
        "validation": [entry["validation/loss"] for entry in entries if "validation/loss" in entry],
        "sums": [float(value.double().abs().sum()) for value in weights],
        "types": sorted({type(value).__name__ for value in weights}),
        "frozen": sum(key.startswith("vae.") for key in load_file(saved / "model.safetensors")),
        "pictures": len(list((folder / "pictures").glob("*.png"))),
        "models": sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("diffusion_pytorch_model.*")),
        "saved": {
            str(path.relative_to(folder)): {key: float(value.abs().sum()) for key, value in load_file(path).items()}
            for path in folder.rglob("*.safetensors")
            if not path.parent.name.startswith("checkpoint-")
        },
    }
    print(json.dumps(facts), flush=True)


def train(name: str, folder: Path, kind: str, sharded: bool, **options) -> None:
    """Trains a model and reports on it."""
    for key in (*FSDP, "FSDP_ACTIVATION_CHECKPOINTING"):
        os.environ.pop(key, None)
    if sharded:
        # Without, a small model is sharded as a whole, as the VAE of the published size.
        os.environ.update(FSDP, FSDP_ACTIVATION_CHECKPOINTING="false" if kind == "vae" else "true")
    AcceleratorState._reset_state()
    trainer = make_trainer(kind, folder, **options)
    accelerator = trainer.accelerator
    units = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
    # How many gradients are held, and in how many places of memory: those of DDP's buckets share one.
    held: dict[str, int] = {}

    def look_at_gradients(*_) -> None:
        gradients = [parameter.grad for parameter in trainer.task.parameters() if parameter.grad is not None]
        storages = {gradient.untyped_storage().data_ptr() for gradient in gradients}
        held.update(gradients=len(gradients), storages=len(storages))

    if not sharded:
        trainer.optimizer.optimizer.register_step_pre_hook(look_at_gradients)
    trainer.train()
    trainer.finish(lambda: on_main_process(accelerator, lambda: save(kind, trainer.task, folder)))
    # As the last to hold the group of processes, one would wait for its threads at the end, with Python's lock.
    assert not any(type(thing) is DistributedDataParallel for thing in gc.get_objects())
    on_main_process(accelerator, lambda: report(name, trainer, folder, {**held, "units": units}))
    # The group of processes is kept for the next training.
    if accelerator.output_folder is not None:
        accelerator.output_folder.release()


def run_group(root: Path, count: int, trainings: list[tuple]) -> None:
    """Runs trainings one after the other in `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if count > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
                    os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
                for name, kind, sharded, options in trainings:
                    train(f"{name}-{count}", root / f"{name}-{count}", kind, sharded, **options)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(statuses):
        sys.exit(f"processes of a group of {count} ended with {statuses}")


def main(root: Path) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # Imported here, they are not imported by each process again.
    for module in ("torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "matplotlib.figure"):
        importlib.import_module(module)
    # The searches for garbage of each process leave out what there is, rather than touch and thereby copy it.
    gc.freeze()
    short = {"max_train_steps": 2}
    vae = {**short, "more_ema_decays": [0.5]}
    # With a validation between the steps, which puts averages in the place of weights and back.
    dit = {**short, "optimizer": "muon", "validation_steps": 1}
    longer = {**dit, "max_train_steps": 3, "checkpointing_steps": 2}
    half = {"max_train_steps": 1, "mixed_precision": "bf16"}

    def checkpoint(name: str) -> dict:
        return {**dit, "max_train_steps": 3, "resume_from_checkpoint": str(root / name / "checkpoint-2")}

    trainings = [("vae", "vae", False, vae), ("dit", "dit", False, longer), ("half", "dit", False, half)]
    others = ["refiner", "dense_vae", *ADAPTERS]
    trainings += [(kind, kind, False, short) for kind in others]
    run_group(root, 1, [*trainings, ("camera", "camera", False, dit)])
    for count in (2, 4):
        trainings = [("vae-ddp", "vae", False, vae), ("dit-ddp", "dit", False, dit), ("dit-fsdp", "dit", True, dit)]
        if count == 2:
            # The transformer shows that shares of four are no other ones than of two.
            trainings.append(("vae-fsdp", "vae", True, vae))
            trainings += [("camera-ddp", "camera", False, dit), ("camera-fsdp", "camera", True, dit)]
            trainings += [("half-fsdp", "dit", True, half), ("resumed-fsdp", "dit", True, checkpoint("dit-1"))]
            for kind in others:
                trainings += [(f"{kind}-ddp", kind, False, short), (f"{kind}-fsdp", kind, True, short)]
            trainings.append(("resumed-ddp", "dit", False, checkpoint("dit-ddp-2")))
        run_group(root, count, trainings)
    run_group(root, 1, [("resumed", "dit", False, checkpoint("dit-fsdp-4"))])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
