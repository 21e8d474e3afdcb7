"""Arguments of a call that do not fit are named before any work; warnings before work that is in vain."""

import math

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.pipelines import guards
from tests.pipelines.tiny import LATENT_SIZE, tiny_coords, tiny_image, tiny_pipeline


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


DENSE_SHAPE = (1, 2, 4, 4, 4)
WRONG = {
    "dense_latents": [
        [1.0],
        torch.full(DENSE_SHAPE, math.nan),
        torch.ones(DENSE_SHAPE, dtype=torch.int32),
        torch.ones(3),
    ],
    "coords": [
        [[0, 1, 2, 3]],
        torch.rand(3, 4),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.zeros(1, 4, dtype=torch.int32, device="meta"),
    ],
    "num_inference_steps": [0, 10**7, 2.0, "5", True],
    "dense_guidance_scale": [math.nan, "7", [7], 1e308, -1e4],
    "guidance_interval": [None, "ab", (math.nan, 1), (0.5, 0.5), (0, 1, 1), ("0", "1"), 0.5],
    "level": [math.nan, -0.1, 0.3, "0"],
    "max_opening": [math.nan, -0.1, 0.6, "0"],
    "output_type": [None, [], "obj"],
    "generator": [3, [3], "0"],
    "attention_kwargs": [3, [1]],
    "callback_on_step_end": [3],
    "callback_on_step_end_tensor_inputs": [None, "latents", ["noise"], [[]]],
    "resolution": ["64", 63],
    "num_meshes_per_image": [0, 1.0, 10**6],
    "num_faces": [3, 3.5],
    "remove_floaters": ["no", 2],
    "multiple_images": ["sum", None],
    "select": ["worst", True, 1, []],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_calls_name_what_does_not_fit(pipe, name, value, monkeypatch):
    monkeypatch.setattr(type(pipe), "denoise", lambda *args, **kwargs: pytest.fail("the work has begun"))
    with pytest.raises((ValueError, TypeError), match=f"`{name}`"):
        pipe(tiny_image(), **{name: value})


def test_integers_of_numpy_are_integers(pipe):
    options = {"num_inference_steps": np.int64(1), "dense_num_inference_steps": np.int32(1)}
    pipe(tiny_image(), num_meshes_per_image=np.int64(1), output_type="latent", **options)


def test_tensors_of_callbacks_are_finite(pipe):
    nothing = torch.full(DENSE_SHAPE, math.nan)
    with pytest.raises(ValueError, match="`latents` of `callback_on_step_end` must be finite"):
        pipe(tiny_image(), callback_on_step_end=lambda *_: {"latents": nothing})


@pytest.mark.parametrize("returned", [torch.zeros(1), 3, None])
def test_tensors_of_callbacks_keep_their_shape(pipe, returned):
    with pytest.raises(ValueError, match=r"must return `latents` of shape \[1, 2, 4, 4, 4\]"):
        pipe(tiny_image(), callback_on_step_end=lambda *_: {"latents": returned})


def test_a_dense_stage_that_is_not_finite_says_so(pipe, monkeypatch):
    bias = pipe.dense_transformer.proj_out.bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias.data, math.nan))
    with pytest.raises(ValueError, match=r"dense stage gave latents that are not finite: are its weights damaged"):
        pipe(tiny_image(), dense_num_inference_steps=2)


def grid(size, samples=1):
    cells = torch.cartesian_prod(*[torch.arange(size)] * 3).int()
    return torch.cat([torch.nn.functional.pad(cells, (1, 0), value=sample) for sample in range(samples)])


def test_a_full_grid_is_warned_of(caplog):
    guards.warn_of_full_grid(grid(64)[: 16 * 64**2], 64)
    assert not caplog.records
    guards.warn_of_full_grid(torch.cat([grid(64)[:100], grid(64, 2)[64**3 :]]), 64)
    assert "262,144 of 262,144 cells" in caplog.text and "[1]" in caplog.text


def test_find_cells_warns_of_a_full_grid(pipe, monkeypatch, caplog):
    monkeypatch.setattr(guards, "MOST_CELLS", 4)
    vae = pipe.dense_vae
    monkeypatch.setattr(vae, "decode", lambda latents, return_dict: (torch.ones(1, 1, *[LATENT_SIZE] * 3),))
    assert len(pipe.dense_stage.find_cells(torch.zeros(DENSE_SHAPE))) == LATENT_SIZE**3
    assert "512 of 512 cells" in caplog.text


def test_estimates_of_memory_agree_with_what_was_measured(pipe):
    """The published decoder: 3.48 GiB for 56,056 latents, 1.19 in tiles, in 16 bits (benchmarks/results/vae.json)."""

    class Published:
        dtype = torch.bfloat16
        use_tiling = False

        class config:
            decoder_channels = 512
            num_attention_heads = 32
            attention_head_dim = 32
            mlp_ratio = 4.0

    assert abs(guards.memory_of_decoding(Published, 56_056) / 2**30 - 3.48) < 0.6
    # Counted: 0.9 GiB for 56,000 tokens (docs/log/2026-11-memory.md).
    assert abs(guards.memory_of_denoising(Published, 56_000) / 2**30 - 0.9) < 0.1
    Published.use_tiling = True
    assert abs(guards.memory_of_decoding(Published, 56_056) / 2**30 - 1.19) < 0.6


@pytest.mark.parametrize(("free", "steps"), [(2**40, []), (0, ["Denoising", "Decoding"]), (None, [])])
def test_a_stage_that_needs_more_memory_than_there_is(pipe, monkeypatch, caplog, free, steps):
    monkeypatch.setattr(guards, "free_memory", lambda device: free)
    pipe(tiny_image(), coords=tiny_coords(), num_inference_steps=1, output_type="latent")
    assert [record.message.split()[0] for record in caplog.records] == steps
    if steps:
        assert "disable_guidance_batching" in caplog.text and "enable_vae_tiling" in caplog.text
        assert f"{len(tiny_coords()):,} cells" in caplog.text


def test_free_memory_of_this_machine():
    free = guards.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
    assert guards.free_memory(torch.device("meta")) is None


def test_meshes_of_no_volume_are_warned_of(pipe, caplog, monkeypatch):
    flat = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]])
    meshes = [trimesh.creation.box(), trimesh.Trimesh(), flat]
    monkeypatch.setattr(type(pipe), "extract_meshes", lambda *_: meshes)
    output = pipe(tiny_image(), coords=tiny_coords(), num_inference_steps=1)
    assert output.meshes == meshes and "[1, 2]" in caplog.text
