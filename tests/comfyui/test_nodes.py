"""The ComfyUI nodes against ComfyUI's node interface, and what they compute against the pipeline."""

import importlib.util
import json
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from tests.app.boxy import boxy_pipeline
from tests.pipelines.tiny import LATENT_SIZE, SECOND_LATENT_SIZE, tiny_image, tiny_pipeline, tiny_second_stage


PACK = Path(__file__).parents[2] / "comfyui"
# What ComfyUI itself brings; the others come from nodes of this pack.
BASIC_TYPES = {"IMAGE", "MASK", "INT", "FLOAT", "STRING", "BOOLEAN"}


@pytest.fixture(scope="module")
def nodes():
    """The nodes by name, loaded as ComfyUI loads a pack: from its folder, under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        "sparse3d_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["sparse3d_pack"] = module
    spec.loader.exec_module(module)
    assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
    yield module.NODE_CLASS_MAPPINGS
    del sys.modules["sparse3d_pack"], sys.modules["sparse3d_pack.nodes"]


def run(node, **inputs):
    """Calls a node as ComfyUI does: a new instance, its function by name, inputs by keyword."""
    result = getattr(node(), node.FUNCTION)(**inputs)
    result = result["result"] if isinstance(result, dict) else result
    assert isinstance(result, tuple) and len(result) == len(node.RETURN_TYPES)
    return result


def test_interface(nodes):
    produced = {kind for node in nodes.values() for kind in node.RETURN_TYPES}
    for node in nodes.values():
        inputs = node.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        names = [name for group in inputs.values() for name in group]
        assert set(signature(getattr(node, node.FUNCTION)).parameters) - {"self"} == set(names)
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) and node.CATEGORY.startswith("3d/")
        for kind, *options in (value for group in inputs.values() for value in group.values()):
            if isinstance(kind, list):  # a menu
                assert options[0]["default"] in kind
            else:
                assert kind in BASIC_TYPES | produced
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"]
    assert [node.__name__ for node in nodes.values() if getattr(node, "OUTPUT_NODE", False)] == ["Sparse3DSaveMesh"]


@pytest.fixture(scope="module")
def workflow():
    """The steps of the workflow by their number, in the order in which they run."""
    return json.loads((PACK / "photo_to_glb.json").read_text(encoding="utf-8"))


def test_the_workflow_fits_the_nodes(nodes, workflow):
    """Each node of the workflow exists, has all its inputs, and each link leads to an output of the right type."""
    outputs = {"LoadImage": ("IMAGE", "MASK"), **{name: node.RETURN_TYPES for name, node in nodes.items()}}
    for step in workflow.values():
        if step["class_type"] == "LoadImage":
            continue
        inputs = nodes[step["class_type"]].INPUT_TYPES()
        known = {**inputs["required"], **inputs.get("optional", {})}
        assert set(inputs["required"]) <= set(step["inputs"]) <= set(known)
        for name, value in step["inputs"].items():
            if isinstance(value, list):
                source, index = value
                assert outputs[workflow[source]["class_type"]][index] == known[name][0]
            elif known[name][1:]:
                assert value == known[name][1]["default"]


@pytest.fixture(scope="module")
def picture():
    """An image and a mask in ComfyUI's form."""
    rgba = np.asarray(tiny_image(), dtype=np.float32) / 255
    return torch.from_numpy(rgba[None, ..., :3].copy()), torch.from_numpy(rgba[None, ..., 3].copy())


def test_stages_give_the_mesh_of_the_pipeline(nodes, picture):
    """The nodes one after the other make what one call of the pipeline makes with the same noise."""
    image, mask = picture
    pipe = boxy_pipeline()
    pipe.register_to_config(default_level=0.2)
    settings = {"steps": 0, "guidance_scale": 0.0}
    (cells,) = run(nodes["Sparse3DImageToCells"], pipeline=pipe, image=image, mask=mask, seed=3, **settings)
    (sdf,) = run(nodes["Sparse3DCellsToSDF"], pipeline=pipe, cells=cells, seed=5, **settings)
    (mesh,) = run(nodes["Sparse3DSDFToMesh"], sdf=sdf, level=0.0)

    dense = torch.randn(
        pipe.dense_stage.prepare_latents(1, "cpu", None).shape, generator=torch.Generator().manual_seed(3)
    )
    whole = pipe(tiny_image(), dense_latents=dense, output_type="latent", generator=torch.Generator())
    assert torch.equal(whole.coords, cells.coords) and len(cells.coords) > 1
    generator = torch.Generator().manual_seed(5)
    expected = pipe(tiny_image(), coords=cells.coords, level=0.0, generator=generator).meshes[0]
    np.testing.assert_array_equal(mesh.vertices, expected.vertices)
    # Other settings are heeded.
    other = run(nodes["Sparse3DCellsToSDF"], pipeline=pipe, cells=cells, seed=5, steps=1, guidance_scale=1.0)[0]
    assert not torch.equal(other.sdf.feats, sdf.sdf.feats)


def test_the_workflow_gives_the_mesh_of_the_pipeline(nodes, workflow, picture):
    """With all settings as they come: at the level of the checkpoint, with cavities filled and without floaters."""
    surface = {"default_level": 0.1, "default_max_opening": 0.0625, "default_remove_floaters": True}
    pipe = tiny_pipeline(occupancy_threshold=0.8, **surface)
    results = {"2": (pipe,), "3": picture}
    for number in ("4", "5", "6", "7"):
        step = workflow[number]
        inputs = {name: results[v[0]][v[1]] if isinstance(v, list) else v for name, v in step["inputs"].items()}
        results[number] = run(nodes[step["class_type"]], **inputs)

    # The seed is of the noise of each stage.
    dense = pipe.dense_stage.prepare_latents(1, "cpu", torch.Generator().manual_seed(workflow["4"]["inputs"]["seed"]))
    generator = torch.Generator().manual_seed(workflow["5"]["inputs"]["seed"])
    expected = pipe(tiny_image(), dense_latents=dense, generator=generator).meshes[0]
    (mesh,) = results["7"]
    np.testing.assert_array_equal(mesh.vertices, expected.vertices)
    np.testing.assert_array_equal(mesh.faces, expected.faces)
    # Without the filling, which the user may ask for, there is more surface.
    (torn,) = run(nodes["Sparse3DSDFToMesh"], sdf=results["5"][0], level=0.1, max_opening=0.0)
    sdf = results["5"][0].sdf
    raw = sparse_sdf_to_mesh(sdf.feats, sdf.coords, pipe.resolutions[0], level=0.1)
    np.testing.assert_array_equal(torn.vertices, raw.vertices)
    assert torn.area > 1.001 * results["6"][0].area


def test_load_a_pipeline_with_lora_weights(nodes, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    own = pipe.transformer.proj_out.weight.clone()
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False), "x")
    pipe.save_lora_weights(tmp_path / "style", peft.get_peft_model_state_dict(pipe.transformer, adapter_name="x"))
    layer = pipe.transformer.proj_out
    added = layer.lora_B["x"].weight @ layer.lora_A["x"].weight
    settings = {"model": str(tmp_path / "model"), "dtype": "float32", "low_memory": False}
    for lora, factor in ((f"{tmp_path / 'style'}:0.5\n\n{tmp_path / 'style'}:0.25\n", 0.75), ("", 0.0)):
        (loaded,) = run(nodes["Sparse3DLoadPipeline"], **settings, lora=lora)
        torch.testing.assert_close(loaded.transformer.proj_out.weight.cpu(), own + factor * added)


def test_refine(nodes):
    cells = sys.modules["sparse3d_pack.nodes"].Cells(
        torch.zeros(1, 4).int(), tiny_image().convert("RGB"), tiny_image().getchannel("A")
    )
    mesh = trimesh.creation.icosphere(1)
    settings = {"mesh": mesh, "cells": cells, "seed": 0, "steps": 1, "guidance_scale": 1.0}
    with pytest.raises(ValueError, match="second"):
        run(nodes["Sparse3DRefine"], pipeline=boxy_pipeline(), **settings)
    (sdf,) = run(nodes["Sparse3DRefine"], pipeline=tiny_pipeline(**tiny_second_stage()), **settings)
    assert sdf.resolution == 8 * SECOND_LATENT_SIZE != 8 * LATENT_SIZE
    # Cells near the sphere, normalised to a longest side of 1.9.
    places = sdf.sdf.coords[:, 1:].float() / (sdf.resolution - 1) * 2 - 1
    distance = (places.norm(dim=1) - 0.95).abs()
    assert distance.median() < 0.15 and distance.max() < 0.45


def test_remove_background_and_masks(nodes):
    image = torch.ones(2, 20, 30, 3)
    image[:, 5:15, 10:20] = torch.tensor([1.0, 0.0, 0.0])
    cut, mask = run(nodes["Sparse3DRemoveBackground"], image=image, network="u2netp")
    assert cut.shape == (1, 20, 30, 3) and mask.shape == (1, 20, 30)
    assert mask[0, 5:15, 10:20].min() == 1 and mask.sum() == 100
    torch.testing.assert_close(cut, image[:1])


def test_clean_up_and_save(nodes, tmp_path, monkeypatch):
    mesh = trimesh.creation.icosphere(3) + trimesh.creation.icosphere(1, 0.01).apply_translation((3, 0, 0))
    settings = {"remove_inner_parts": False, "fill_holes": False, "num_faces": 0}
    assert run(nodes["Sparse3DCleanUp"], mesh=mesh, remove_floaters=False, **settings)[0].body_count == 2
    (clean,) = run(nodes["Sparse3DCleanUp"], mesh=mesh, remove_floaters=True, **settings)
    assert clean.body_count == 1

    def get_save_image_path(prefix, output):
        assert output == str(tmp_path)
        return str(tmp_path / "mesh"), "sparse3d", 7, "mesh", prefix

    paths = SimpleNamespace(get_output_directory=lambda: str(tmp_path), get_save_image_path=get_save_image_path)
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    node = nodes["Sparse3DSaveMesh"]
    result = node().save(clean, "mesh/sparse3d", "stl", "z")
    assert result["ui"]["3d"] == [{"filename": "sparse3d_00007_.stl", "subfolder": "mesh", "type": "output"}]
    assert len(trimesh.load(result["result"][0]).faces) == len(clean.faces)
