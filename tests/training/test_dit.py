import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import Dinov2WithRegistersModel

from diffusers_sparse3d import DenseDiT, DenseVAE, SparseDiT, SparseVAE
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor
from diffusers_sparse3d.training import dit
from diffusers_sparse3d.training.batches import BlockDataset, OccupancyDataset, expand_blocks, pack
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.images import (
    ConditionedLatentDataset,
    cache_images,
    needed_orientations,
    normalize_images,
)
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.orientations import Orientation, facing
from diffusers_sparse3d.training.sampler import SampleKey


IMAGE_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "num_register_tokens": 2,
}
TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}


@pytest.fixture(scope="module")
def options(tmp_path_factory, common_options):
    return {
        **common_options,
        "max_train_steps": 40,
        "batch_size": 8,
        "num_inference_steps": 2,
        "shift": 2.0,
        "cache_dir": str(tmp_path_factory.mktemp("images")),
    }


def train(folder, options):
    dit.train(build_config(dit.DiTConfig, {**options, "output_dir": str(folder)}))
    curve = [entry["loss"] for entry in read_metrics(folder) if "loss" in entry]
    assert len(curve) == options["max_train_steps"]
    assert np.mean(curve[-8:]) < 0.93 * np.mean(curve[:8])
    found = {name for entry in read_metrics(folder) for name in entry if name.startswith("sigma/")}
    assert {f"sigma/{place / 10:.1f}" for place in range(3, 10)} <= found
    picture = Image.open(folder / "pictures" / f"{options['max_train_steps']:07d}.png")
    assert len(np.unique(np.array(picture))) > 10
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler").config.shift == 2.0


def test_train_both_stages(tmp_path, options, dense_vae_model, sparse_vae_model):
    torch.manual_seed(0)
    DenseVAE(**dense_vae_model).save_pretrained(tmp_path / "dense" / "vae")
    SparseVAE(**sparse_vae_model).save_pretrained(tmp_path / "sparse" / "vae")

    # The dense stage trains an image encoder along.
    dense = {
        **options,
        "stage": "dense",
        "vae": str(tmp_path / "dense" / "vae"),
        "model": {**TRANSFORMER, "sample_size": 2, "in_channels": 2, "share_mod": True, "pixel_aligned": True},
        "camera_weight": 0.03,
        "image_encoder_model": IMAGE_ENCODER,
        "train_image_encoder": True,
        "color_jitter": 0.2,
        "mirror": True,
        "face_camera": True,
        "sample_posterior": False,
    }
    train(tmp_path / "dense_dit", dense)
    DenseDiT.from_pretrained(tmp_path / "dense_dit" / "transformer")
    encoder = Dinov2WithRegistersModel.from_pretrained(tmp_path / "dense_dit" / "image_encoder")
    torch.manual_seed(dense.get("seed", 0))

    # The sparse stage takes it as it is.
    sparse = {
        **options,
        "stage": "sparse",
        "vae": str(tmp_path / "sparse" / "vae"),
        "model": {
            **TRANSFORMER,
            "sample_size": 4,
            "in_channels": 4,
            "num_key_value_heads": 1,
            "compression_block_size": 2,
            "selection_block_size": 2,
            "topk": 2,
            "window_size": 2,
            "norm_num_groups": 4,
        },
        "image_encoder": str(tmp_path / "dense_dit" / "image_encoder"),
        "latents_dir": str(tmp_path / "sparse" / "latents"),
        "mirror": True,
        "optimizer": "muon",
    }
    train(tmp_path / "sparse_dit", sparse)
    SparseDiT.from_pretrained(tmp_path / "sparse_dit" / "transformer")
    assert not (tmp_path / "sparse_dit" / "image_encoder").exists()

    # It was trained (in the dense stage), and what the conditioning does not use was not.
    torch.manual_seed(0)
    fresh = dit.load_image_encoder(build_config(dit.DiTConfig, {**dense, "output_dir": "."}))
    assert not torch.equal(encoder.encoder.layer[0].norm1.weight, fresh.encoder.layer[0].norm1.weight)
    assert torch.equal(encoder.layernorm.weight, fresh.layernorm.weight)


def test_unconditional_samples_are_zeros(options, tmp_path, dense_vae_model):
    DenseVAE(**dense_vae_model).save_pretrained(tmp_path / "vae")
    config = build_config(
        dit.DiTConfig,
        {
            **options,
            "output_dir": str(tmp_path),
            "vae": str(tmp_path / "vae"),
            "image_encoder_model": IMAGE_ENCODER,
            "train_image_encoder": True,
            "conditioning_dropout": 1.0,
        },
    )
    transformer = DenseDiT(**TRANSFORMER, sample_size=2, in_channels=2)
    vae = DenseVAE.from_pretrained(tmp_path / "vae")
    task = dit.DiTTask(transformer, dit.load_image_encoder(config), vae, config)
    seen = []
    transformer.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    batch = {
        "image": torch.randint(256, (3, 4, 56, 56), dtype=torch.uint8),
        "mean": torch.randn(3, 2, 2, 2, 2),
        "logvar": torch.zeros(3, 2, 2, 2, 2),
    }
    task.train()(batch)
    assert seen[-1].shape == (3, 19, 32) and not seen[-1].any()
    task.eval()(batch)
    assert seen[-1].flatten(1).any(1).all()


def test_posterior_is_sampled_or_not(options, tmp_path, dense_vae_model):
    vae = DenseVAE(**dense_vae_model)
    config = build_config(
        dit.DiTConfig,
        {
            **options,
            "output_dir": str(tmp_path),
            "vae": str(tmp_path),
            "image_encoder_model": IMAGE_ENCODER,
            "train_image_encoder": True,
        },
    )
    transformer = DenseDiT(**TRANSFORMER, sample_size=2, in_channels=2)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    task = dit.DiTTask(transformer, dit.load_image_encoder(config), vae, config).eval()
    shape = (64, 2, 2, 2, 2)
    images = torch.randint(256, (64, 4, 56, 56), dtype=torch.uint8)
    batch = {"image": images, "mean": torch.zeros(shape), "logvar": torch.full(shape, math.log(3.0))}
    # What is predicted is zero: the loss is the variance of noise minus latents.
    losses = []
    for config.sample_posterior in (True, False):
        torch.manual_seed(0)
        losses.append(task(batch)["loss"].mean.item())
    assert losses == pytest.approx([1 + 3, 1], rel=0.15)


def test_prepared_images_are_what_the_pipeline_sees(tmp_path, small_data):
    data, processor = SparseSDFDataset(small_data, "train"), Sparse3DImageProcessor(56, 14)
    images = cache_images(data, processor, tmp_path, Accelerator(cpu=True), 0)
    prepared = torch.stack([images.view(1, view) for view in range(2)])
    pixel_values, mask = normalize_images(prepared)
    expected_values, expected_mask = processor.preprocess([data.picture(1, view) for view in range(2)])
    assert torch.allclose(pixel_values, expected_values, atol=1e-5)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("orientation", [Orientation(0, True), Orientation(1), Orientation(-1, True), Orientation(2)])
def test_turned_and_mirrored_shapes(small_data, orientation):
    data = SparseSDFDataset(small_data, "train", 32)
    for index in range(len(data)):
        plain, turned = (pack([BlockDataset(data, which)[index, 32]]) for which in (Orientation(), orientation))
        grids = []
        for batch in (plain, turned):
            coords, target, _, _ = expand_blocks(batch)
            grids.append(torch.full((32, 32, 32), 2.0))
            grids[-1][tuple(coords[:, 1:].long().T)] = target[:, 0]
            keys = batch["coords"][:, 1:].long() @ torch.tensor([16, 4, 1])
            assert (keys.diff() > 0).all()
        assert torch.equal(orientation.apply_to_grid(grids[0]), grids[1])
        occupancies = [
            OccupancyDataset(data, which)[index, 0]["occupancy"][0] for which in (Orientation(), orientation)
        ]
        assert torch.equal(occupancies[1].nonzero(), turned["coords"][:, 1:].long())
        assert torch.equal(orientation.apply_to_grid(occupancies[0]), occupancies[1])


def test_turns_bring_the_camera_to_the_front():
    # A marker that is seen from an azimuth is seen from near the front once the shape faces the camera.
    for azimuth in (-90.0, -60.0, -44.0, 0.0, 30.0, 46.0, 90.0, 135.0, math.nan):
        grid, angle = torch.zeros(9, 9, 9), math.radians(0 if math.isnan(azimuth) else azimuth)
        grid[round(4 + 4 * math.sin(angle)), 4, round(4 + 4 * math.cos(angle))] = 1
        x, _, z = (Orientation(facing(azimuth)).apply_to_grid(grid).nonzero()[0] - 4).tolist()
        assert z > 0 and abs(x) <= z


def test_shapes_follow_the_views(small_data):
    data = SparseSDFDataset(small_data, "train", 32)
    latents = {
        (32, orientation): [{"orientation": orientation}] * len(data)
        for orientation in needed_orientations(data, True, True)
    }
    # Each view of each mesh has another picture, which is not its own mirror image.
    pictures = torch.arange(4 * data.num_images.sum(), dtype=torch.uint8).view(len(data), -1, 1, 2, 2)
    images = SimpleNamespace(view=lambda index, view: pictures[index, view])
    dataset = ConditionedLatentDataset(latents, images, data)
    azimuths = [data.azimuths(index) for index in range(len(data))]
    assert any(abs(azimuth) > 45 for views in azimuths for azimuth in views)
    for index, choice in itertools.product(range(len(data)), range(4)):
        item = dataset[SampleKey(index, 32, choice, 0.5)]
        assert item["orientation"] == (facing(azimuths[index][choice // 2]), choice % 2 == 1)
        assert torch.equal(
            item["image"], dataset[SampleKey(index, 32, choice - choice % 2, 0.5)]["image"].flip(-1)
        ) == (choice % 2 == 1)


def test_color_jitter_leaves_the_background_white():
    torch.manual_seed(0)
    images = torch.full((2, 4, 8, 8), 255, dtype=torch.uint8)
    images[:, :3, 2:6, 2:6] = torch.randint(60, 180, (2, 3, 4, 4), dtype=torch.uint8)
    images[:, 3] = 0
    images[:, 3, 2:6, 2:6] = 255
    plain, mask = normalize_images(images)
    jittered, _ = normalize_images(images, torch.tensor([[0.8, 1.2, 1.3], [1.2, 0.9, 0.7]]))
    background = mask.expand_as(plain) == 0
    assert torch.equal(jittered[background], plain[background])
    assert not torch.allclose(jittered[~background], plain[~background], atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": "middle"}, "stage"),
        ({"vae": ""}, "vae"),
        (
            {"gradient_checkpointing": True, "checkpointing_keeps_attention": True, "compile": True},
            "`checkpointing_keeps_attention` must be false with `compile`",
        ),
        ({"image_encoder": "x"}, "image_encoder"),
        ({"train_image_encoder": False}, "train_image_encoder"),
        ({"sigma_sampling": "cosine"}, "sigma_sampling"),
        ({"shift": 0.0}, "`shift` must be positive"),
        ({"shift_scaling": "linear"}, "shift_scaling"),
        ({"shift_scaling": "sqrt"}, "`shift_base_tokens` must be positive"),
        (
            {"shift_scaling": "exponential", "shift_base_tokens": 9, "shift_max_tokens": 10},
            "`max_shift` must be positive",
        ),
        (
            {"shift_scaling": "exponential", "shift_base_tokens": 9, "shift_max_tokens": 9, "max_shift": 2.0},
            "`shift_max_tokens` must be more",
        ),
        ({"phases": [{"steps": 2, "resolutions": [32]}]}, "`phases` must be empty in the dense stage"),
    ],
)
def test_bad_configuration(change, message):
    values = {"data": "x", "output_dir": "x", "max_train_steps": 1, "vae": "x", "train_image_encoder": True}
    with pytest.raises(ValueError, match=message):
        build_config(dit.DiTConfig, {**values, "image_encoder_model": IMAGE_ENCODER, **change})


def test_each_sample_is_drawn_from_its_own_cells(monkeypatch):
    drawn = []
    monkeypatch.setattr(dit, "sdf_reliefs", lambda sample, coords, *_: drawn.append((sample, coords)) or [])
    coords = torch.tensor([[0, 1, 1, 1], [1, 2, 2, 2], [0, 3, 3, 3]], dtype=torch.int32)
    decoded = SimpleNamespace(sample=torch.tensor([[0.0], [1.0], [0.5]]), coords=coords)
    task = SimpleNamespace(
        config=SimpleNamespace(stage="sparse"), vae=SimpleNamespace(decode=lambda *args, **kwargs: decoded)
    )
    batch = {"resolution": torch.tensor([64, 64]), "coords": coords, "image": torch.zeros(2, 4, 8, 8)}
    dit.DiTTask.reliefs(task, torch.zeros(3, 4), batch)
    assert [(sample.tolist(), cells.tolist()) for sample, cells in drawn] == [
        ([[0.0], [0.5]], [[1, 1, 1], [3, 3, 3]]),
        ([[1.0]], [[2, 2, 2]]),
    ]
