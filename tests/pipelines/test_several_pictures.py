"""Several pictures of one object: in turn or averaged, with transformers that take one."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from diffusers_sparse3d.models.transformer_sparse import SparseDiT
from diffusers_sparse3d.pipelines.several_pictures import MODES, group_pictures, picture_rounds
from tests.pipelines.tiny import tiny_components, tiny_coords, tiny_image, tiny_pipeline


FRONT, SIDE, BACK = tiny_image(), tiny_image("blue", (20, 4, 60, 30)), tiny_image("green", (30, 30, 60, 60))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe, image, counts=(7,), **kwargs):
    noise = generators(*range(len(counts)))
    return pipe(image, coords=tiny_coords(counts), generator=noise, output_type="latent", **kwargs).latents


def test_rounds():
    for mode in MODES:
        assert picture_rounds([1, 1], mode, 9) == [[0, 1]]
        assert picture_rounds([3], mode, 9) == [[0], [1], [2]]
    rounds = [[0, 1, 4], [0, 2, 5], [0, 3, 4], [0, 1, 5], [0, 2, 4], [0, 3, 5]]
    assert picture_rounds([1, 3, 2], "alternate", 9) == rounds
    assert picture_rounds([1, 3, 2], "alternate", 4) == rounds[:4]
    assert picture_rounds([1, 3, 2], "average", 1) == rounds[:3]
    assert [len(picture_rounds([7, 8, 9], mode, 50)) for mode in MODES] == [50, 9]
    assert group_pictures([FRONT, SIDE]) == ([FRONT, SIDE], None)
    pictures, counts = group_pictures([[FRONT, SIDE], BACK])
    assert counts == [2, 1] and [picture.tobytes() for picture in pictures] == [
        picture.tobytes() for picture in (FRONT, SIDE, BACK)
    ]


def test_pictures_take_turns(pipe, monkeypatch):
    """The tokens of step i are those of picture i, modulo their number."""
    seen = []
    forward = SparseDiT.forward

    def recorded(self, *args, **kwargs):
        seen.append(kwargs["encoder_hidden_states"].clone())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SparseDiT, "forward", recorded)
    alone = {}
    for name, picture in (("front", FRONT), ("side", SIDE), ("back", BACK)):
        latents_of(pipe, picture, num_inference_steps=1, guidance_scale=1.0)
        alone[name] = seen.pop()
    latents_of(pipe, [[FRONT, SIDE, BACK]], num_inference_steps=5, guidance_scale=1.0)
    for found, name in zip(seen, ("front", "side", "back", "front", "side"), strict=True):
        torch.testing.assert_close(found, alone[name])


@pytest.mark.parametrize("batched", [True, False])
def test_predictions_are_averaged(pipe, monkeypatch, batched):
    """With one step, the latents move by the mean of the moves that the pictures make alone."""
    if not batched:
        monkeypatch.setattr(pipe, "_batches_guidance", False)
    kwargs = {"num_inference_steps": 1, "guidance_scale": 3.0}
    alone = [latents_of(pipe, picture, **kwargs) for picture in (FRONT, SIDE, BACK)]
    together = latents_of(pipe, [[FRONT, SIDE, BACK]], multiple_images="average", **kwargs)
    torch.testing.assert_close(together, torch.stack(alone).mean(0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, alone[0], atol=1e-3)


@pytest.mark.parametrize("mode", ["alternate", "average"])
def test_equal_pictures_are_one_picture(pipe, mode):
    kwargs = {"num_inference_steps": 3, "multiple_images": mode}
    expected = latents_of(pipe, FRONT, **kwargs)
    torch.testing.assert_close(latents_of(pipe, [[FRONT, FRONT]], **kwargs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["alternate", "average"])
def test_batch_equals_single_runs(pipe, mode):
    """Objects with different numbers of pictures, none of which divides the others, in both stages."""
    objects = [[FRONT, SIDE], [BACK, FRONT, SIDE], [BACK]][: 2 + (mode == "average")]
    kwargs = {"output_type": "sdf", "multiple_images": mode, "dense_num_inference_steps": 4, "num_inference_steps": 4}
    batch = pipe(objects, generator=generators(*range(len(objects))), **kwargs).sdfs
    for index, pictures in enumerate(objects):
        (single,) = pipe([pictures], generator=generators(index), **kwargs).sdfs
        assert torch.equal(single.coords, batch[index].coords)
        torch.testing.assert_close(single.feats, batch[index].feats, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sparse_conditioning", [True, False])
def test_each_picture_is_encoded_once(monkeypatch, sparse_conditioning):
    """The meshes of an object share its pictures, which are those of single calls."""
    pipe, encoded = tiny_pipeline(**tiny_components(sparse_conditioning)), []
    hook = pipe.image_encoder.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    kwargs = {"num_inference_steps": 1, "guidance_scale": 1.0}
    objects = [[FRONT, SIDE], [BACK, FRONT, SIDE]]
    batch = latents_of(pipe, objects, (4, 4, 5, 5), num_meshes_per_image=2, multiple_images="average", **kwargs)
    assert encoded == [5]
    hook.remove()
    cells = tiny_coords((4, 4, 5, 5))
    for mesh, seed in ((1, 1), (3, 3)):
        rows = cells[:, 0] == mesh
        own = cells[rows] * torch.tensor([0, 1, 1, 1], dtype=torch.int32)
        call = {"coords": own, "output_type": "latent", **kwargs}
        alone = [pipe(picture, generator=generators(seed), **call).latents for picture in objects[mesh // 2]]
        torch.testing.assert_close(batch[rows], torch.stack(alone).mean(0), atol=1e-4, rtol=1e-4)


def test_pictures_that_no_step_sees_are_warned_of(pipe, caplog):
    pictures, call = [[FRONT, SIDE, BACK]], {"dense_num_inference_steps": 3, "output_type": "latent"}
    pipe(pictures, num_inference_steps=2, **call)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and 'multiple_images="average"' in record.message
    assert record.message.startswith("`num_inference_steps` is 2: of the 3 pictures") and "last 1." in record.message
    caplog.clear()
    pipe(pictures, num_inference_steps=3, **call)
    pipe(pictures, num_inference_steps=1, multiple_images="average", **call)
    latents_of(pipe, [[FRONT, SIDE]], num_inference_steps=2, dense_num_inference_steps=1)
    assert not caplog.records


def test_masks_meshes_and_callbacks(pipe):
    masks = [[picture.getchannel("A") for picture in (FRONT, SIDE)]]
    opaque = [[picture.convert("RGB") for picture in (FRONT, SIDE)]]
    two = {"counts": (4, 3), "num_meshes_per_image": 2}
    assert latents_of(pipe, opaque, mask_image=masks, **two).shape == (7, 4)

    shapes = []

    def zero_tokens(pipeline, step, timestep, tensors):
        shapes.append(tensors["encoder_hidden_states"].shape)
        return {"encoder_hidden_states": torch.zeros_like(tensors["encoder_hidden_states"])}

    callback = {"callback_on_step_end": zero_tokens, "callback_on_step_end_tensor_inputs": ["encoder_hidden_states"]}
    changed, other = (latents_of(pipe, [[FRONT, last]], num_inference_steps=2, **callback) for last in (SIDE, BACK))
    # The second step would show the second picture.
    assert torch.equal(changed, other)
    assert not torch.equal(changed, latents_of(pipe, [[FRONT, SIDE]], num_inference_steps=2))


def test_bad_arguments(pipe):
    for kwargs, argument in [
        ({"image": [[FRONT], []]}, "`image`"),
        ({"image": [[FRONT, SIDE]], "multiple_images": "mean"}, "`multiple_images`"),
        ({"image": [[FRONT, SIDE]], "mask_image": FRONT.getchannel("A")}, "`mask_image`"),
    ]:
        with pytest.raises(ValueError, match=argument):
            pipe(**kwargs, coords=tiny_coords())
    arguments = [{"encoder_hidden_states": torch.zeros(1, 21, 16)}] * 2
    with pytest.raises(ValueError, match="`picture_counts` must have a number for each of 1 samples"):
        options = {"multiple_images": "average", "picture_counts": [2, 2]}
        pipe.denoise(pipe.dense_stage, torch.zeros(1, 2, 4, 4, 4), arguments, 1, 1, 1.0, **options)
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    try:
        with pytest.raises(ValueError, match=r"`image` must hold one picture.*disable_cache"):
            latents_of(pipe, [[FRONT, SIDE]])
    finally:
        pipe.transformer.disable_cache()
