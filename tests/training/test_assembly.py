"""Pipelines that are put together from trained parts and from parts of an existing pipeline."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_sparse3d import SparseDiT, SparseVAE
from diffusers_sparse3d.training.assembly import assemble, parse_arguments
from tests.pipelines.tiny import tiny_image, tiny_pipeline, tiny_refiners, tiny_second_stage


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, dict]:
    """The components of the tiny pipeline as the training commands leave them, and as they are."""
    root = tmp_path_factory.mktemp("parts")
    components = {**tiny_pipeline().components, **tiny_second_stage(), **tiny_refiners()}
    for name in ("image_encoder", "dense_vae", "vae", "vae_1024", "refiner", "refiner_1024"):
        components[name].save_pretrained(root / name)
    for stage, prefix, suffix in (
        ("dense_dit", "dense_", ""),
        ("sparse_dit", "", ""),
        ("sparse_dit_1024", "", "_1024"),
    ):
        for part in ("transformer", "scheduler"):
            components[f"{prefix}{part}{suffix}"].save_pretrained(root / stage / part)
    return root, components


FIRST = ("image_encoder", "dense_vae", "dense_dit", "vae", "sparse_dit")
SECOND = ("refiner", "vae_1024", "sparse_dit_1024", "refiner_1024")


def run(root: Path, output: Path, names: tuple[str, ...], *options: str) -> DiffusionPipeline:
    given = [text for name in names for text in (f"--{name}", str(root / name))]
    assemble(parse_arguments([*given, "--output", str(output), *options]))
    return DiffusionPipeline.from_pretrained(output)


def assert_same(component: object, expected: object) -> None:
    if isinstance(expected, torch.nn.Module):
        state = component.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())
    else:
        assert component.config.shift == expected.config.shift


def test_all_parts(parts, tmp_path):
    root, components = parts
    pipe = run(root, tmp_path, (*FIRST, *SECOND), "--config", "default_level=0.1", "default_guidance_scale_1024=2")
    for name, component in components.items():
        if component is not None:
            assert_same(pipe.components[name], component)
    assert (pipe.config.default_level, pipe.config.default_guidance_scale_1024) == (0.1, 2)
    assert pipe.resolutions == (64, 96)


def test_parts_of_an_existing_pipeline(parts, tmp_path):
    root, components = parts
    tiny_pipeline(default_level=0.15).save_pretrained(tmp_path / "base")
    pipe = run(
        root, tmp_path / "large", SECOND[1:], "--base", str(tmp_path / "base"), "--config", "default_guidance_scale=5"
    )
    assert (pipe.config.default_level, pipe.config.default_guidance_scale) == (0.15, 5)
    assert pipe.refiner is None
    for name in ("transformer", "dense_vae", "vae_1024", "transformer_1024", "scheduler_1024", "refiner_1024"):
        assert_same(pipe.components[name], components[name])

    # A part that was trained anew takes the place of the one of the pipeline.
    model = SparseDiT.from_config(components["transformer"].config)
    model.save_pretrained(tmp_path / "new" / "transformer")
    components["scheduler_1024"].save_pretrained(tmp_path / "new" / "scheduler")
    options = ("--sparse_dit", str(tmp_path / "new"), "--base", str(tmp_path / "large"), "--dtype", "float16")
    pipe = run(root, tmp_path / "other", (), *options)
    assert_same(pipe.transformer, model.half().float())
    assert pipe.scheduler.config.shift == 1.5 and pipe.transformer_1024 is not None


def test_parts_that_are_missing_or_do_not_fit(parts, tmp_path):
    root, components = parts
    narrow = SparseVAE.from_config({**components["vae_1024"].config, "latent_channels": 2})
    narrow.save_pretrained(tmp_path / "narrow")
    tiny_pipeline().save_pretrained(tmp_path / "base")
    base = ("--base", str(tmp_path / "base"))
    for names, options, message in (
        (FIRST[:3], (), r"--vae, --sparse_dit must be given, or `--base`"),
        ((*FIRST, "vae_1024"), (), r"`vae_1024` and `transformer_1024`"),
        (("sparse_dit_1024",), base, r"`vae_1024` and `transformer_1024`"),
        (("refiner_1024",), base, r"`refiner_1024`"),
        (
            ("sparse_dit_1024",),
            (*base, "--vae_1024", str(tmp_path / "narrow")),
            r"`transformer_1024` must have 2 channels",
        ),
        (FIRST, ("--config", "default_levle=0.1"), r"`config`.*default_levle"),
        (("vae_1024",), (*base, "--sparse_dit_1024", str(root / "sparse_dit")), r"higher resolution"),
    ):
        with pytest.raises(ValueError, match=message):
            run(root, tmp_path / "out", names, *options)
        assert not (tmp_path / "out").exists()


def test_a_pipeline_of_parts_generates(parts, tmp_path):
    root, _ = parts
    pipe = run(root, tmp_path, FIRST)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "dense_num_inference_steps": 2, "dense_guidance_scale": 2.0}
    pipe.register_to_config(occupancy_threshold=0.72)
    latents = pipe(tiny_image(), generator=torch.Generator().manual_seed(0), output_type="latent", **options).latents
    expected = tiny_pipeline()(
        tiny_image(), generator=torch.Generator().manual_seed(0), output_type="latent", guidance_scale=7.0, **options
    ).latents
    torch.testing.assert_close(latents, expected)
