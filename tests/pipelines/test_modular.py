"""The stages as blocks of diffusers' `ModularPipeline`: alone, in a row, and exchanged."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.modular_pipelines import InputParam, ModularPipelineBlocks, OutputParam, SequentialPipelineBlocks

from diffusers_sparse3d.pipelines.modular import (
    CellsToLatentsStep,
    Direct3DS2Blocks,
    Direct3DS2TwoStageBlocks,
    EncodeImageStep,
    ImageToCellsStep,
    LatentsToMeshStep,
    load_modular_pipeline,
)
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline, tiny_refiners, tiny_second_stage


IMAGES = [tiny_image(), tiny_image("blue", (20, 4, 60, 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(default_max_opening=0.25, default_remove_floaters=True).save_pretrained(path)
    return path


def load(blocks, folder):
    pipeline = load_modular_pipeline(blocks, folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded():
    return [torch.Generator().manual_seed(seed) for seed in (0, 1)]


def assert_same(meshes, others):
    assert len(meshes) == len(others) > 0
    for mesh, other in zip(meshes, others):
        assert len(mesh.faces) > 0
        assert np.array_equal(mesh.vertices, other.vertices) and np.array_equal(mesh.faces, other.faces)


def test_blocks_in_a_row_give_what_the_pipeline_gives(folder, caplog):
    pipeline = load(Direct3DS2Blocks(), folder)
    assert not caplog.records and pipeline.refiner is None
    meshes = pipeline(image=IMAGES[0], generator=seeded()[:1], output="meshes")
    assert_same(meshes, DiffusionPipeline.from_pretrained(folder)(IMAGES[0], generator=seeded()[:1]).meshes)


def test_stages_one_by_one(folder):
    """Each loads its own components; the state goes from one to the next."""
    settings = {"dense_num_inference_steps": 3, "guidance_scale": 1.5, "level": 0.1, "num_meshes_per_image": 2}
    expected = DiffusionPipeline.from_pretrained(folder)(IMAGES[1], generator=seeded(), **settings).meshes
    # Both stages draw from the generators, and a state is copied between pipelines.
    state, seeds = None, seeded()
    inputs = {"image": IMAGES[1], "generator": seeds, **settings}
    for blocks, components in [
        (EncodeImageStep(), {"image_encoder"}),
        (ImageToCellsStep(), {"dense_transformer", "dense_scheduler", "dense_vae"}),
        (CellsToLatentsStep(), {"transformer", "scheduler"}),
        (LatentsToMeshStep(), {"vae"}),
    ]:
        pipeline = load(blocks, folder)
        assert {name for name, part in pipeline.components.items() if part is not None} == components
        state = pipeline(state=state, **{name: inputs[name] for name in blocks.input_names if name in inputs})
    assert_same(state.get("meshes"), expected)


class GivenCells(ModularPipelineBlocks):
    """Takes the place of the dense stage: the cells of a shape of one's own."""

    model_name = "direct3d-s2"
    inputs: ClassVar = [InputParam("shape_seed", required=True)]
    intermediate_outputs: ClassVar = [OutputParam("coords")]

    def __call__(self, components, state):
        block = self.get_block_state(state)
        block.coords = tiny_coords((2,), seed=block.shape_seed)
        self.set_block_state(state, block)
        return components, state


def test_a_part_is_exchanged(folder):
    blocks = SequentialPipelineBlocks.from_blocks_dict(
        {"encode": EncodeImageStep, "cells": GivenCells, "latents": CellsToLatentsStep, "mesh": LatentsToMeshStep}
    )
    pipeline = load(blocks, folder)
    assert "dense_transformer" not in pipeline.components
    for seed in (3, 4):
        meshes = pipeline(image=IMAGES[0], shape_seed=seed, generator=seeded()[:1], output="meshes")
        expected = DiffusionPipeline.from_pretrained(folder)(
            IMAGES[0], coords=tiny_coords((2,), seed=seed), generator=seeded()[:1]
        )
        assert_same(meshes, expected.meshes)


def test_second_stage_and_refiner(tmp_path):
    """All blocks but the dense stage, in the place of which are cells."""
    tiny_pipeline(**tiny_second_stage(), refiner=tiny_refiners()["refiner"]).save_pretrained(tmp_path)
    sub_blocks = Direct3DS2TwoStageBlocks().sub_blocks
    blocks = {name: block for name, block in sub_blocks.items() if name != "cells"}
    pipeline = load(SequentialPipelineBlocks.from_blocks_dict(blocks), tmp_path)
    assert "dense_transformer" not in pipeline.components and pipeline.refiner is not None
    kwargs = {"num_inference_steps": 1, "num_inference_steps_1024": 2, "coords": tiny_coords((2,))}
    meshes = pipeline(image=IMAGES[0], output="meshes", generator=seeded()[0], **kwargs)
    expected = DiffusionPipeline.from_pretrained(tmp_path)(IMAGES[0], generator=seeded()[0], **kwargs)
    assert_same(meshes, expected.meshes)


def test_noise_of_the_steps_comes_from_the_generator(tmp_path):
    noisy = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    tiny_pipeline(scheduler=noisy, dense_scheduler=noisy).save_pretrained(tmp_path)
    pipeline = load(Direct3DS2Blocks(), tmp_path)
    meshes = pipeline(image=IMAGES[0], output="meshes", generator=seeded()[0])
    assert_same(meshes, DiffusionPipeline.from_pretrained(tmp_path)(IMAGES[0], generator=seeded()[0]).meshes)


def test_errors_name_the_argument(folder):
    with pytest.raises(ValueError, match=r"`folder`.*transformer_1024"):
        load_modular_pipeline(Direct3DS2TwoStageBlocks(), folder)
    tokens = {"image_tokens": torch.zeros(1, 21, 16), "image_mask": torch.ones(1, 1, 56, 56), "patch_size": 14}
    latents = load(CellsToLatentsStep(), folder)
    for kwargs, name in [
        ({}, "coords"),
        ({"coords": tiny_coords((3,)) + 10}, "`coords`"),
        ({"coords": tiny_coords((3,)), "num_inference_steps": 0}, "`num_inference_steps`"),
        ({"coords": tiny_coords((3,)), "latents": torch.zeros(2, 4)}, "`latents`"),
    ]:
        with pytest.raises(ValueError, match=name):
            latents(**tokens, **kwargs)
