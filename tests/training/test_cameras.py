"""Cameras of pictures: what a dataset says of them, and the loss of those that a transformer predicts."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn
from transformers import Dinov2WithRegistersModel

from diffusers_sparse3d import DenseDiT
from diffusers_sparse3d.models.pixel_alignment import project
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor
from diffusers_sparse3d.training import dit
from diffusers_sparse3d.training.cameras import DEVIATIONS, NEEDED_COLUMNS, PictureCameras, camera_errors
from diffusers_sparse3d.training.configuration import build_config
from diffusers_sparse3d.training.images import ConditionedLatentDataset
from diffusers_sparse3d.training.noise import Draw, uniform
from diffusers_sparse3d.training.orientations import Orientation
from diffusers_sparse3d.training.preparation.pictures import Camera
from diffusers_sparse3d.training.sampler import SampleKey
from tests.training.test_flow_matching import IMAGE_ENCODER


# Three views, of which the second is from the right and the third is not known; and a picture that was given.
VIEWS = [
    (0.0, 20.0, 4.0, 3.5, 0.9, 0.1, -0.2),
    (90.0, -10.0, 0.0, 6.0, 1.1, 0.0, 0.05),
    (0.0, math.nan, 0, 5, 1, 0, 0),
]
PROCESSOR = Sparse3DImageProcessor(112, 14, padding=8)


def table(names=NEEDED_COLUMNS):
    columns = {name: [list(column)] for name, column in zip(NEEDED_COLUMNS, zip(*VIEWS))}
    return pa.table({name: pa.array(columns[name], pa.list_(pa.float32())) for name in names})


def cameras(**kwargs) -> PictureCameras:
    return PictureCameras(SimpleNamespace(table=table(**kwargs)), PROCESSOR)


def test_cameras_of_a_dataset():
    zoom = 112 / 128
    expected = [math.radians(20), math.radians(4), math.log(3.5), math.log(0.9 * zoom), 0.1 * zoom, -0.2 * zoom]
    torch.testing.assert_close(cameras().get(0, 0), torch.tensor(expected))
    # From the right, unless the shape is turned; not known; a picture without a camera.
    for view, turns in ((1, 0), (1, 1), (0, -1), (2, 0), (3, 0)):
        assert cameras().get(0, view, turns).isnan().all()
    turned = cameras().get(0, 1, -1)
    torch.testing.assert_close(turned[:3], torch.tensor([math.radians(-10), 0, math.log(6.0)]))
    for missing in NEEDED_COLUMNS:
        assert cameras(names=[name for name in NEEDED_COLUMNS if name != missing]).get(0, 0).isnan().all()


def test_cameras_of_renders_frame_what_they_show():
    """The projected surface fills the square exactly along its longer side, and is in the middle of it."""
    points = np.random.default_rng(0).uniform(-0.9, 0.4, (50, 3, 3)).astype(np.float32)
    surface = SimpleNamespace(triangles=points * np.array([1.0, 0.5, 0.8], np.float32))
    for view in ((0.0, 30.0, 35.0, 5.0), (0.0, -10.0, 200.0, -20.0)):
        camera = Camera(*view).around(surface)
        values = [math.radians(view[1]), math.radians(view[3]), math.log(camera.distance), math.log(camera.scale)]
        cameras = torch.tensor([[*values, camera.right_shift, camera.down_shift]])
        pixels = project(torch.from_numpy(surface.triangles).flatten(0, 1), cameras)[0]
        low, high = pixels.amin(0), pixels.amax(0)
        torch.testing.assert_close((high - low).max(), torch.tensor(2.0), atol=1e-5, rtol=0)
        torch.testing.assert_close(low + high, torch.zeros(2), atol=1e-5, rtol=0)
        assert (high - low).min() < 1.95 and abs(camera.right_shift) > 0.04 and abs(camera.down_shift) > 0.04


def test_mirrored_cameras_see_mirrored_shapes():
    points = torch.randn(20, 3)
    plain, mirrored = (
        project(points * sides, cameras().get(0, 0, 0, is_mirrored)[None])[0]
        for sides, is_mirrored in ((torch.ones(3), False), (torch.tensor([-1.0, 1, 1]), True))
    )
    torch.testing.assert_close(mirrored, plain * torch.tensor([-1.0, 1]))


def test_items_have_the_camera_of_their_image():
    data = SimpleNamespace(num_images=torch.tensor([4]).numpy(), azimuths=lambda index: [0.0, 90.0, 0.0, math.nan])
    orientations = itertools.product((0, -1), (False, True))
    latents = {(0, Orientation(*orientation)): [{"mean": torch.zeros(1)}] for orientation in orientations}
    images = SimpleNamespace(view=lambda index, view: torch.full((4, 2, 2), view, dtype=torch.uint8))
    dataset = ConditionedLatentDataset(latents, images, data, cameras())
    for choice in range(8):
        item = dataset[SampleKey(0, 0, choice, 0.5)]
        view = int(item["image"][0, 0, 0])
        expected = cameras().get(0, view, -1 if view == 1 else 0, choice % 2 == 1)
        torch.testing.assert_close(item["camera"], expected, equal_nan=True)
        assert item["camera"].isnan().all() == (view in (2, 3))
    assert "camera" not in ConditionedLatentDataset(latents, images, data)[SampleKey(0, 0, 0, 0.5)]


def test_errors():
    true = torch.randn(4, 6)
    true[2, 3] = math.nan
    off = true + torch.tensor(DEVIATIONS) * torch.tensor([[0.0], [2.0], [1.0], [0.0]])
    off[3, 1] += 10 * DEVIATIONS[1]
    predicted = torch.where(true.isnan(), 7.0, off).requires_grad_()
    errors = camera_errors(predicted, true)
    # Beyond four deviations the tangent goes on: 16 + 8 (10 - 4).
    torch.testing.assert_close(errors, torch.tensor([0.0, 4.0, 0.0, 64 / 6]), atol=1e-4, rtol=1e-4)
    errors.sum().backward()
    assert predicted.grad.isfinite().all() and not predicted.grad[2].any() and predicted.grad[3].any()


def make_task(**options) -> tuple[dit.DiTTask, dict]:
    """A task of a tiny aligned transformer, and a batch of which the third camera is not known."""
    torch.manual_seed(0)
    values = {"data": "", "output_dir": "", "vae": "x", "max_train_steps": 1, "train_image_encoder": True}
    values |= {"image_encoder_model": IMAGE_ENCODER, "camera_weight": 0.03, **options}
    config = build_config(dit.DiTConfig, values)
    sizes = {"sample_size": 2, "in_channels": 2, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 12}
    transformer = DenseDiT(**sizes, cross_attention_dim=32, pixel_aligned=True)
    vae = nn.Module()
    vae.config = FrozenDict(shift_factor=0.0, scaling_factor=1.0)
    encoder: Dinov2WithRegistersModel = dit.load_image_encoder(config)
    camera = torch.tensor([0.4, 0.0, 1.5, -0.2, 0.05, 0.0]) + 0.1 * torch.randn(6, 6)
    camera[2, 4] = math.nan
    batch = {
        "image": torch.randint(256, (6, 4, 28, 28), dtype=torch.uint8),
        "mean": torch.randn(6, 2, 2, 2, 2),
        "logvar": torch.full((6, 2, 2, 2, 2), -9.0),
        "camera": camera,
        "seed": torch.arange(6) + 50,
    }
    return dit.DiTTask(transformer, encoder, vae, config), batch


def predicted(task: dit.DiTTask, batch: dict) -> torch.Tensor:
    tokens, _ = task.condition(batch["image"])
    return task.transformer.pixel_alignment.camera(tokens).detach()


def test_the_true_camera_has_no_loss():
    task, batch = make_task(conditioning_dropout=0.0)
    nn.init.normal_(task.transformer.pixel_alignment.camera.proj_out.weight, std=0.1)
    assert task(batch)["camera"].mean > 0.01
    batch["camera"] = torch.where(batch["camera"].isnan(), torch.nan, predicted(task, batch))
    assert task(batch)["camera"].mean < 1e-9


def test_cameras_that_are_absent_or_dropped_are_left_out():
    """The mean is over those that are known and that keep their picture, in training; its count is known before."""
    task, batch = make_task(conditioning_dropout=0.5)
    kept = uniform(batch["seed"], Draw.CONDITIONING)[:, 0] >= 0.5
    known = torch.arange(6) != 2
    assert 0 < (kept & known).sum() < known.sum()
    for training, used in ((True, kept & known), (False, known)):
        loss = task.train(training)(batch)["camera"]
        expected = camera_errors(predicted(task, batch), batch["camera"])[used].mean()
        torch.testing.assert_close(loss.mean, expected)
        assert loss.number == task.counts(batch)["camera"] == used.sum()
    batch["camera"][:] = math.nan
    loss = task(batch)["camera"]
    assert loss.number == 0 and loss.mean == 0
    assert task(batch).keys() == make_task()[0](batch).keys()


def test_cameras_without_a_weight_are_none():
    task, batch = make_task(camera_weight=0.0)
    assert "camera" not in task(batch) and "camera" not in task.counts(batch) and task.loss_weights == {"loss": 1.0}


def test_the_head_learns_a_camera_of_each_image():
    """Far better than one camera for all images would be."""
    task, batch = make_task(conditioning_dropout=0.0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=5e-3)
    for _ in range(60):
        losses = task.train()(batch)
        (losses["camera"].mean + losses["loss"].mean).backward()
        optimizer.step()
        optimizer.zero_grad()
    known = batch["camera"].isfinite().all(1)
    true, deviations = batch["camera"][known], torch.tensor(DEVIATIONS)
    error, of_one_camera = predicted(task, batch)[known] - true, true.mean(0) - true
    assert (error / deviations).abs().mean() < 0.25 * (of_one_camera / deviations).abs().mean()


def test_what_does_not_go_with_cameras():
    for change in ({"camera_weight": -0.1}, {"stage": "sparse"}):
        with pytest.raises(ValueError, match="`camera_weight`"):
            make_task(**change)
    task, _ = make_task()
    task.transformer.pixel_alignment = None
    with pytest.raises(ValueError, match=r"`model\.pixel_aligned`"):
        dit.DiTTask(task.transformer, task.image_encoder, task.vae, task.config)
