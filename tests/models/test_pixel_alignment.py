"""Pixel-aligned conditioning: the geometry of the renderers, which cells see which patches, and DenseDiT with it."""

import math

import numpy as np
import pytest
import torch
import trimesh
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_sparse3d.geometry.render import render_mesh_views
from diffusers_sparse3d.geometry.render.rasterizer import Cameras
from diffusers_sparse3d.geometry.render.rasterizer.projection import camera_distance
from diffusers_sparse3d.geometry.render.rasterizer.projection import project as rasterizer_project
from diffusers_sparse3d.models.pixel_alignment import PixelAlignment, patch_grid_size, project
from diffusers_sparse3d.models.transformer_dense import DenseDiT
from tests.golden import relative_error
from tests.models.test_transformer_dense import check_cache_of_threshold_zero, tiny_inputs, tiny_model
from tests.pipelines.tiny import tiny_components, tiny_image, tiny_pipeline


@pytest.mark.parametrize("elevation", [-20.0, 0.0, 35.0])
def test_points_are_where_the_ray_caster_shows_them(elevation):
    """A red ball in a black frame, which gives it a place in the model cube; the whole sensor is the picture."""
    pytest.importorskip("embreex")
    place, size, focal_mm = np.array([0.5, 0.6, -0.3]), 128, 50.0
    corners = [trimesh.creation.icosphere(subdivisions=1, radius=0.01) for _ in range(2)]
    for ball, sign in zip(corners, (-1, 1)):
        ball.apply_translation(np.full(3, sign * 0.94))
        ball.visual.face_colors = (0, 0, 0, 255)
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.05)
    ball.apply_translation(place)
    ball.visual.face_colors = (255, 0, 0, 255)
    mesh = trimesh.util.concatenate([ball, *corners])
    (picture,) = render_mesh_views(mesh, [(0.0, elevation, focal_mm)], size, margin=1.0)
    pixels = np.asarray(picture).astype(float)
    rows, columns = np.nonzero((pixels[..., 0] > pixels[..., 1] + 60) & (pixels[..., 3] > 127))
    seen = np.array([columns.mean(), rows.mean()]) * 2 / size + 1 / size - 1

    distance = np.linalg.norm(mesh.vertices, axis=1).max() * math.hypot(1, focal_mm / 18)
    log_scale = math.log(focal_mm / 18 / distance)
    camera = torch.tensor([[math.radians(elevation), 0.0, math.log(distance), log_scale, 0.0, 0.0]])
    expected = project(torch.tensor(place[None]).float(), camera)[0, 0]
    assert np.abs(seen - expected.numpy()).max() < 0.01
    assert np.abs(seen).min() > 0.15


def test_points_are_where_the_rasterizer_puts_them():
    """With rolls and framed pictures: scale and shift are found from two points each, all others must agree."""
    torch.manual_seed(0)
    triangles = 1.8 * torch.rand(40, 3, 3, dtype=torch.float64) - 0.9
    angles = torch.tensor([[-10.0, 5.0], [0.0, 0.0], [25.0, -4.0], [60.0, 30.0]], dtype=torch.float64)
    focal_mm = torch.tensor([25.0, 50.0, 250.0, 80.0], dtype=torch.float64)
    radius = triangles.norm(dim=-1).max().expand(4)
    cameras = Cameras(torch.zeros(4, dtype=torch.float64), angles[:, 0], focal_mm, angles[:, 1])
    picture = torch.arange(4).repeat_interleave(40)
    screen, _ = rasterizer_project(triangles.repeat(4, 1, 1), picture, radius, cameras, 100, 1.2)
    places = screen.corners.view(4, -1, 2) / 50 - 1

    distance = camera_distance(radius, focal_mm)
    camera = torch.cat([angles.deg2rad(), distance.log()[:, None], torch.zeros(4, 3, dtype=torch.float64)], 1)
    unframed = project(triangles.flatten(0, 1), camera)
    scale = (places[:, 0] - places[:, 1]).norm(dim=1) / (unframed[:, 0] - unframed[:, 1]).norm(dim=1)
    camera[:, 3], camera[:, 4:] = scale.log(), scale[:, None] * unframed[:, 2] - places[:, 2]
    torch.testing.assert_close(project(triangles.flatten(0, 1), camera), places)
    assert camera[:, 4:].abs().amax(1).min() > 0.01


def test_points_behind_the_camera_do_not_change_sides():
    camera = torch.tensor([[0.0, 0.0, math.log(0.5), 0.0, 0.0, 0.0]])
    right, down = project(torch.tensor([[0.3, 0.4, 0.9]]), camera)[0, 0].tolist()
    assert right > 0 > down


def one_hot_alignment(grid_size: int, camera: list[float]) -> PixelAlignment:
    """An alignment with a given camera that adds up, in one channel, what the points of a cell see of channel 0."""
    alignment = PixelAlignment(1, 3, grid_size, channels=1)
    alignment.reset_output()
    alignment.camera.proj_out.bias.data = torch.tensor(camera) - alignment.camera(torch.zeros(1, 1, 3))[0].detach()
    alignment.proj_in.weight.data = torch.tensor([[1.0, 0.0, 0.0]])
    torch.nn.init.ones_(alignment.proj_out.weight)
    return alignment


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(1, 3), (4, 2), (3, 5)])
def test_a_patch_is_seen_by_the_cells_on_its_ray(row, column):
    """The cells with a point less than a patch away from the patch's middle, in both directions, and no others."""
    side, size = 7, 6
    elevation, roll, distance, scale, right, down = 0.4, 0.1, 3.5, 0.7, 0.12, -0.2
    alignment = one_hot_alignment(size, [elevation, roll, math.log(distance), math.log(scale), right, down])
    tokens = torch.zeros(1, 5 + side**2, 3)
    tokens[:, :5] = 1  # what comes before the patches is nothing of the picture
    tokens[0, 5 + row * side + column, 0] = 1
    seen = alignment(tokens)[0, :, 0].view(size, size, size)

    expected = np.zeros((size, size, size))
    for cell in np.ndindex(size, size, size):
        for part in np.ndindex(2, 2, 2):
            x, y, z = (2 * np.array(cell) + part + 0.5) / size - 1
            up, depth = (
                math.cos(elevation) * y - math.sin(elevation) * z,
                math.sin(elevation) * y + math.cos(elevation) * z,
            )
            turned = math.cos(roll) * x + math.sin(roll) * up, math.cos(roll) * up - math.sin(roll) * x
            size_here = scale * distance / (distance - depth)
            pixel = turned[0] * size_here - right, -turned[1] * size_here - down
            away = [abs((value + 1) * side / 2 - 0.5 - place) for value, place in zip(pixel, (column, row))]
            expected[cell] += max(0, 1 - away[0]) * max(0, 1 - away[1])
    assert 5 < (expected > 0).sum() < 80
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-5)


def test_order_of_points():
    """Which points the weights of checkpoints belong to: the eight of a cell one after the other, z fastest."""
    points = PixelAlignment(1, 1, 3).points(torch.device("cpu")).view(3, 3, 3, 8, 3)
    offsets = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 6
    torch.testing.assert_close(points[2, 0, 1], torch.tensor([2, -2, 0]) / 3 + offsets)


@torch.no_grad()
def test_pictures_are_right_side_up():
    """From straight ahead, the upper right patch is seen by the cells with the largest x and y, at all depths."""
    alignment = one_hot_alignment(4, [0.0, 0.0, math.log(1e3), 0.0, 0.0, 0.0])
    tokens = torch.zeros(1, 1 + 16, 3)
    tokens[0, 1 + 3, 0] = 1
    seen = alignment(tokens)[0, :, 0].view(4, 4, 4)
    assert (seen[3, 3] > 4).all() and (seen[:2].abs().max(), seen[:, :2].abs().max()) == (0, 0)


def aligned_model(**kwargs) -> DenseDiT:
    return tiny_model(pixel_aligned=True, **kwargs)


@torch.no_grad()
def test_a_new_aligned_model_predicts_what_the_plain_one_does():
    plain = tiny_model()
    aligned = DenseDiT.from_config(plain.config, pixel_aligned=True)
    result = aligned.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys and all(name.startswith("pixel_alignment.") for name in result.missing_keys)
    assert not result.unexpected_keys
    assert torch.equal(aligned(**tiny_inputs()).sample, plain(**tiny_inputs()).sample)


@torch.no_grad()
def test_the_image_reaches_the_tokens_where_it_is_seen():
    """Without cross-attention, only the cells on the ray of a patch change with it."""
    model, inputs = aligned_model(num_layers=0, sample_size=6), tiny_inputs(1, sample_size=6)
    inputs["encoder_hidden_states"] = torch.zeros(1, 1 + 9**2, 10)
    plain = model(**inputs).sample
    inputs["encoder_hidden_states"][0, 1 + 4 * 9 + 4] = 1
    changed = (model(**inputs).sample - plain).abs().amax((0, 1)) > 1e-6
    model.pixel_alignment = None
    assert torch.equal(model(**inputs).sample, plain), "tokens of zeros give zeros"
    assert 6 <= changed.sum() < 80 and changed.any(2).any(1).sum() < 6


def test_gradients_reach_the_camera():
    model = aligned_model()
    model(**tiny_inputs()).sample.square().mean().backward()
    for name, parameter in model.pixel_alignment.named_parameters():
        # All queries attend with the same weights where a key is added.
        if name != "camera.to_k.bias":
            assert parameter.grad.abs().max() > 0, name


def test_options_that_go_with_it(tmp_path):
    """Patches of latents, a round trip through a folder, and gradient checkpointing."""
    model, inputs = aligned_model(patch_size=2, share_mod=True), tiny_inputs()
    assert model.pixel_alignment.grid_size == 2
    sample = model(**inputs).sample
    sample.square().mean().backward()
    model.save_pretrained(tmp_path)
    loaded = DenseDiT.from_pretrained(tmp_path)
    assert loaded.config.pixel_aligned and loaded.state_dict().keys() == model.state_dict().keys()
    loaded.enable_gradient_checkpointing()
    again = loaded.train()(**inputs).sample
    torch.testing.assert_close(again, sample)
    again.square().mean().backward()
    for expected, parameter in zip(model.parameters(), loaded.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_names_of_the_weights():
    """Checkpoints have them."""
    names = {name for name in aligned_model().state_dict() if "pixel_alignment" in name}
    camera = {
        f"camera.{layer}.{kind}" for layer in ("to_k", "to_v", "proj_in", "proj_out") for kind in ("weight", "bias")
    }
    expected = {"camera.queries", *camera, "proj_in.weight", "proj_out.weight"}
    assert names == {f"pixel_alignment.{name}" for name in expected}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_half_precision_is_close(dtype, tolerance):
    model, inputs = aligned_model(), tiny_inputs()
    expected = model.pixel_alignment(inputs["encoder_hidden_states"])
    whole = model(**inputs).sample
    half = {name: tensor if name == "timestep" else tensor.to(dtype) for name, tensor in inputs.items()}
    model.to(dtype)
    sample = model(**half).sample
    assert sample.dtype == dtype and relative_error(sample, whole) < tolerance
    assert relative_error(model.pixel_alignment(half["encoder_hidden_states"]), expected) < tolerance


class NoConstants(TorchDispatchMode):
    """Refuses tensors that are made of numbers, which are copies from the host on a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "lift" not in func.name(), "CUDA graphs capture no copies from the host"
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_is_copied_from_the_host():
    alignment, tokens = aligned_model().pixel_alignment, tiny_inputs()["encoder_hidden_states"]
    with NoConstants():
        alignment(tokens)
        with pytest.raises(AssertionError, match="CUDA graphs"):
            torch.tensor([1.0, 2.0])


def test_a_cache_changes_nothing():
    check_cache_of_threshold_zero(aligned_model())


@torch.no_grad()
def test_adapters_of_its_layers():
    peft = pytest.importorskip("peft")
    model, inputs = aligned_model(), tiny_inputs()
    expected = model(**inputs).sample
    layers = ["pixel_alignment.proj_in", "pixel_alignment.proj_out", "camera.to_v"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    assert not torch.allclose(model(**inputs).sample, expected)
    torch.testing.assert_close(model(**inputs, attention_kwargs={"scale": 0.0}).sample, expected)


@pytest.mark.parametrize("num_tokens", [1374, 1370, 257, 256, 7, 1])
def test_patches_of_image_encoders(num_tokens):
    side = patch_grid_size(num_tokens)
    assert side == {1374: 37, 1370: 37, 257: 16, 256: 16, 7: 2, 1: 1}[num_tokens]


def test_what_is_no_square_is_refused():
    inputs = tiny_inputs()
    for tokens in (torch.zeros(2, 2 * 1374, 10), torch.zeros(2, 16 * 20, 10), torch.zeros(2, 0, 10)):
        with pytest.raises(ValueError, match="`encoder_hidden_states` must be the tokens of a square"):
            aligned_model()(**{**inputs, "encoder_hidden_states": tokens})
    with pytest.raises(ValueError, match="`pixel_aligned`"):
        DenseDiT(sample_size=4, num_layers=0, pixel_aligned="yes")


@torch.no_grad()
def test_guidance_by_one_call_or_by_two(monkeypatch):
    components = tiny_components()
    transformer = DenseDiT.from_config(components["dense_transformer"].config, pixel_aligned=True)
    torch.manual_seed(0)
    for parameter in transformer.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    pipe = tiny_pipeline(**{**components, "dense_transformer": transformer.eval()})
    pixel_values, mask = pipe.image_processor.preprocess([tiny_image(), tiny_image("blue", (4, 20, 60, 50))])
    dense = pipe.dense_stage
    (conditioning,) = pipe.encode_image(pixel_values, mask, stages=[dense])
    noise = dense.prepare_latents(2, "cpu", torch.Generator().manual_seed(0))
    samples = []
    forward = PixelAlignment.forward
    monkeypatch.setattr(
        PixelAlignment, "forward", lambda self, tokens: samples.append(len(tokens)) or forward(self, tokens)
    )
    together = pipe.denoise(dense, noise, conditioning, 2, 2, 2.0)
    assert samples == [2, 2], "samples without an image need none"
    pipe.disable_guidance_batching()
    torch.testing.assert_close(pipe.denoise(dense, noise, conditioning, 2, 2, 2.0), together, atol=1e-5, rtol=1e-5)
    assert samples[2:] == [2] * 4
    monkeypatch.setattr(PixelAlignment, "forward", lambda self, tokens: 0 * forward(self, tokens))
    assert not torch.allclose(pipe.denoise(dense, noise, conditioning, 2, 2, 2.0), together, atol=1e-3)
