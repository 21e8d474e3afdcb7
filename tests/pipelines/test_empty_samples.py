"""Batches in which a stage leaves nothing of some samples: the others are what they are without them."""

import pytest
import torch

from tests.pipelines.tiny import tiny_image, tiny_pipeline, tiny_second_stage


SEEDS = range(3)


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def case():
    """A pipeline whose dense stage leaves no cell of one of three meshes, and the index of that mesh."""
    pipe, last = tiny_pipeline(**tiny_second_stage()), {}

    def keep(pipeline, step, timestep, callback_kwargs):
        last[pipeline.stage] = callback_kwargs["latents"]

    call = {"generator": generators(), "resolution": pipe.resolutions[0], "output_type": "latent"}
    pipe(tiny_image(), num_meshes_per_image=len(SEEDS), callback_on_step_end=keep, **call)
    vae = pipe.dense_vae
    latents = last["dense"] / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        most = vae.decode(latents).sample.sigmoid().flatten(1).amax(1).tolist()
    first, second, _ = sorted(most)
    pipe.register_to_config(occupancy_threshold=(first + second) / 2)
    return pipe, most.index(first)


def call(pipe, seeds=SEEDS, **kwargs):
    return pipe(tiny_image(), num_meshes_per_image=len(seeds), generator=generators(seeds), **kwargs)


@pytest.mark.parametrize("stage", [0, 1])
def test_the_others_are_as_without_it(case, caplog, stage):
    pipe, empty = case
    kwargs = {"resolution": pipe.resolutions[stage]}
    others = [seed for seed in SEEDS if seed != empty]
    output = call(pipe, **kwargs, output_type="latent")
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == 1 + stage and all(f"for [{empty}] (index in the batch)" in text for text in warnings)
    expected = call(pipe, others, **kwargs, output_type="latent")
    assert torch.equal(output.coords[:, 0], torch.tensor(others, dtype=torch.int32)[expected.coords[:, 0].long()])
    assert torch.equal(output.coords[:, 1:], expected.coords[:, 1:])
    torch.testing.assert_close(output.latents, expected.latents, atol=1e-4, rtol=1e-4)


def test_its_place_is_kept_in_every_type_of_output(case, monkeypatch):
    """And nothing of it is decoded."""
    pipe, empty = case
    decode, decoded = pipe.vae.decode, []

    def recorded(latents, *args, **kwargs):
        decoded.append(len(latents))
        return decode(latents, *args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", recorded)
    first = {"resolution": pipe.resolutions[0]}
    packed, padded, sdfs = (call(pipe, **first, output_type=kind) for kind in ("latent", "pt", "sdf"))
    assert len(padded.coords) == len(sdfs.sdfs) == len(SEEDS)
    assert (padded.coords[empty] == -1).all() and (padded.latents[empty] == 0).all()
    counts = packed.coords[:, 0].bincount(minlength=len(SEEDS)).tolist()
    assert [len(sdf.feats) for sdf in sdfs.sdfs] == [512 * count for count in counts] and counts[empty] == 0
    assert decoded == [count for count in counts if count]


def test_it_is_the_last_of_a_selection(case):
    pipe, empty = case
    first = {"resolution": pipe.resolutions[0]}
    ranked, best = (call(pipe, **first, select=select, remove_floaters=True) for select in ("ranked", "best"))
    assert [len(mesh.faces) > 0 for mesh in ranked.meshes] == [True] * (len(SEEDS) - 1) + [False]
    assert ranked.scores[-1].candidate == empty and ranked.scores[-1].score == -1
    assert best.scores[0].candidate == ranked.scores[0].candidate


def test_nothing_at_all_is_an_error(case):
    pipe, empty = case
    with pytest.raises(ValueError, match=r"no occupied cell for \[0\] \(index in the batch\). Try another seed"):
        call(pipe, [empty])
