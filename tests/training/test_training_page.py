"""The commands of docs/training.md as they stand, one after the other, with tiny models in the place of small ones."""

import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import trimesh
import yaml
from diffusers import DiffusionPipeline

from diffusers_sparse3d import cli
from diffusers_sparse3d.training.cameras import NEEDED_COLUMNS
from tests.training.tiny import SPARSE_VAE


ROOT = Path(__file__).parents[2]
# What is smaller here, by the file in training/configs/small; all other keys are those of the file.
COMMON = {"num_workers": 0, "mixed_precision": "no", "max_train_minutes": None, "batch_size": 3, "num_pictures": 1}
COMMON |= {
    "lr_warmup_steps": 2,
    "logging_steps": 1,
    "validation_steps": None,
    "num_validation_samples": 2,
    "cpu": True,
}
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
TINY = {
    "vae_sparse.yaml": {
        "max_train_steps": 8,
        "resolutions": [32],
        "model": {name: value for name, value in SPARSE_VAE.items() if name != "latent_channels"},
    },
    "vae_dense.yaml": {
        "max_train_steps": 5,
        "model": {"sample_size": 4, "encoder_block_out_channels": [4, 8], "decoder_block_out_channels": [8, 4]},
    },
    "dit_dense.yaml": {
        "max_train_steps": 3,
        "compile": False,
        "num_inference_steps": 1,
        "model": {**TRANSFORMER, "sample_size": 2},
        # A trained one would be downloaded.
        "image_encoder": None,
        "train_image_encoder": True,
        "image_encoder_model": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
    },
    "dit_sparse.yaml": {
        "max_train_steps": 3,
        "num_inference_steps": 1,
        "model": {
            **TRANSFORMER,
            "sample_size": 4,
            "num_key_value_heads": 1,
            "compression_block_size": 2,
            "selection_block_size": 2,
            "window_size": 2,
            "norm_num_groups": 4,
        },
    },
}
TINY["refiner.yaml"] = {
    "max_train_steps": 2,
    "model": {
        "feature_channels": 2,
        "block_out_channels": [4, 8],
        "mid_layers": 0,
        "norm_num_groups": 2,
        "sample_size": 32,
        "patch_size": 16,
    },
}
# Options that would take hours otherwise: the page has the resolution, the shapes of a mesh and the steps of the small
# pipeline.
REPLACED = {"256": "32", "4": "1", "500": "2", "checkpoints/direct3d-s2-small": "outputs/small/pipeline"}
PROGRAMS = {
    "training/prepare_data.py": ["prepare"],
    "training/train_dense_vae.py": ["train", "dense-vae"],
    "training/train_sparse_vae.py": ["train", "sparse-vae"],
    "training/train_dit.py": ["train", "dit"],
    "training/train_refiner.py": ["train", "refiner"],
    "training/train_lora.py": ["train", "lora"],
    "training/assemble_pipeline.py": ["assemble"],
    "training/evaluate.py": ["evaluate"],
}


def commands() -> list[list[str]]:
    """The commands in the blocks without a language of the numbered sections, as `cli.main` takes them.

    The evaluation has tests of its own.
    """
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    page = "\n".join(section for section in text.split("\n## ") if section[0].isdigit())
    blocks = "".join(text for tag, text in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.S | re.M) if not tag)
    result = []
    for line in blocks.replace("\\\n", " ").splitlines():
        words = [REPLACED.get(word, word) for word in shlex.split(line)]
        if "CONFIG" in words:  # how commands are launched on several GPUs, not a step of the way
            continue
        if words[0] == "diffusers-sparse3d":
            result.append(words[1:])
        else:
            start = {"python": 1, "accelerate": 2}[words[0]]
            result.append([*PROGRAMS[words[start]], *words[start + 1 :]])
    return [words for words in result if words[0] != "evaluate"]


def write_configs(folder: Path) -> None:
    """The small configurations with the tiny models, under the names that the page has them under."""
    folder.mkdir(parents=True)
    for name, changes in TINY.items():
        values = yaml.safe_load((ROOT / "training" / "configs" / "small" / name).read_text(encoding="utf-8"))
        nested = {key: {**values[key], **value} for key, value in changes.items() if isinstance(value, dict)}
        (folder / name).write_text(yaml.safe_dump({**values, **COMMON, **changes, **nested}), encoding="utf-8")


def test_from_a_folder_of_meshes_to_a_generated_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_configs(tmp_path / "training" / "configs" / "small")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "meshes").mkdir()
    # The drum is one of the twentieth of all names that are validation.
    trimesh.creation.cylinder(0.5, 1.0).export(tmp_path / "meshes" / "drum.ply")
    for name, size in (("box", (1, 2, 1)), ("plate", (2, 0.3, 1))):
        trimesh.creation.box(size).export(tmp_path / "meshes" / f"{name}.ply")
    monkeypatch.chdir(tmp_path)
    # By default, preparation has a process for each core, whose start takes longer than all the rest.
    monkeypatch.setattr(os, "cpu_count", lambda: 0)

    programs = [command[0] for command in commands()]
    assert programs[:7] == ["prepare", *["train"] * 4, "assemble", "generate"] and set(programs) <= {
        words[0] for words in (*PROGRAMS.values(), ["generate"])
    }
    for command in commands():
        assert cli.main(command) == 0, command

    assert len(trimesh.load(tmp_path / "sofa.glb", force="mesh").faces) > 0
    rows = parquet.read_table(tmp_path / "data" / "small" / "index.parquet").to_pylist()
    splits = {row["id"]: row["split"] for row in rows}
    assert splits == {"box~0": "train", "plate~0": "train", "drum": "val"}
    # Configurations of section 2 learn from the cameras of pictures, which look at the front of their shapes.
    assert all(set(NEEDED_COLUMNS) <= set(row) and set(row["azimuths"]) == {0} for row in rows)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "outputs" / "small" / "pipeline")
    weights = pipe.transformer.proj_out.weight.detach().numpy().copy()
    assert pipe.transformer.config.sample_size == 4 and np.abs(weights).max() > 0
    # What section 5 trains is what it says the pipeline takes.
    pipe.load_lora_weights(tmp_path / "outputs" / "style")
    assert set(pipe.get_list_adapters()) == {"transformer", "dense_transformer"}
