"""The caches of diffusers on both transformers of the pipeline, and guidance in an interval of the steps."""

from collections import Counter

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_sparse3d import DenseDiT, SparseDiT
from diffusers_sparse3d.pipelines.step_cache import steps_in_interval
from diffusers_sparse3d.sparse_tensor import CoordinateCache
from tests.pipelines.tiny import tiny_coords, tiny_image, tiny_pipeline


STEPS = 6
TRANSFORMERS = {"dense": "dense_transformer", "sparse": "transformer"}


@pytest.fixture(scope="module")
def pipe():
    # 25 % of the cells: a velocity from a cache changes which ones, and some must be left.
    return tiny_pipeline(occupancy_threshold=0.65)


@pytest.fixture
def cached(pipe):
    """Enables a cache on both transformers, which have none afterwards."""
    transformers = [getattr(pipe, name) for name in TRANSFORMERS.values()]

    def enable(make_config):
        for transformer in transformers:
            transformer.enable_cache(make_config(pipe))

    yield enable
    for transformer in transformers:
        if transformer.is_cache_enabled:
            transformer.disable_cache()


@torch.no_grad()
def generate(pipe, **kwargs):
    """Latents of the dense stage and of both cells, with the calls of an early and a late layer of each stage."""
    calls, dense, handles = Counter(), {}, []
    for stage, name in TRANSFORMERS.items():
        for place in (0, -1):
            block = getattr(pipe, name).transformer_blocks[place]
            for layer, module in {"attention": block.attn1.to_q, "ff": block.ff.net[2]}.items():
                handles.append(module.register_forward_hook(lambda *_, key=(stage, place, layer): calls.update([key])))

    def keep(pipeline, step, timestep, tensors):
        if pipeline.stage == "dense":
            dense["latents"] = tensors["latents"]
        return {}

    settings = {"dense_num_inference_steps": STEPS, "num_inference_steps": STEPS, "output_type": "latent"}
    output = pipe(
        tiny_image(),
        generator=torch.Generator().manual_seed(3),
        callback_on_step_end=keep,
        **{**settings, **kwargs},
    )
    for handle in handles:
        handle.remove()
    return dense["latents"], output.latents, calls


def timestep_of(pipe):
    return lambda: pipe.current_timestep


CONFIGS = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=10.0),
    "magnitudes": lambda pipe: MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=2),
    "taylor, lite": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
    "faster": lambda pipe: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 990),
        unconditional_batch_timestep_skip_range=(-1, 990),
        unconditional_batch_skip_range=3,
        current_timestep_callback=timestep_of(pipe),
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 990),
        current_timestep_callback=timestep_of(pipe),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_saves_calls_and_leaves_nothing_behind(pipe, cached, name):
    """Two calls are alike, so the first has left nothing; without the cache everything is as before."""
    *exact, calls = generate(pipe)
    assert set(calls.values()) == {STEPS}
    cached(CONFIGS[name])
    *first, first_calls = generate(pipe)
    *second, second_calls = generate(pipe)
    for stage, place, layer in calls:
        saved = STEPS - first_calls[stage, place, layer]
        expected = place == -1 or "first block" not in name
        if name in ("taylor", "faster", "pyramid"):
            expected = layer == "attention"
        assert (saved > 0) == expected, (stage, place, layer, saved)
    assert first_calls == second_calls
    for first_latents, second_latents in zip(first, second):
        assert torch.isfinite(first_latents).all()
        assert torch.equal(first_latents, second_latents)
    # The dense stage shows it; the cells of the next one may differ in number.
    assert not torch.allclose(exact[0], first[0], rtol=1e-6)
    for transformer in TRANSFORMERS.values():
        getattr(pipe, transformer).disable_cache()
        # Of a layer with anything left on it, replayed and fused calls would think that it is hooked.
        for module in getattr(pipe, transformer).modules():
            assert "forward" not in vars(module) and not hasattr(module, "_diffusers_hook")
    *again, _ = generate(pipe)
    assert all(torch.equal(*latents) for latents in zip(exact, again))


@pytest.mark.parametrize(
    "config",
    [
        lambda pipe: FirstBlockCacheConfig(threshold=0.0),
        lambda pipe: MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, retention_ratio=1.0),
        lambda pipe: TaylorSeerCacheConfig(disable_cache_before_step=STEPS),
        lambda pipe: PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 1000.0),
    ],
)
def test_a_cache_that_skips_nothing_changes_nothing(pipe, cached, config):
    """Up to rounding: with a cache, dense samples without the image have tokens, which are zeros."""
    exact = generate(pipe)[:2]
    cached(config)
    torch.testing.assert_close(generate(pipe)[:2], exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["first block", "pyramid", "taylor"])
def test_a_cache_of_guided_steps_is_not_used_without_guidance(pipe, cached, name):
    """The batch is half as large from the third step on."""
    cached(CONFIGS[name])
    intervals = {"dense_guidance_interval": (0.0, 0.5), "guidance_interval": (0.0, 0.5)}
    first, second = generate(pipe, **intervals), generate(pipe, **intervals)
    assert all(torch.equal(*latents) for latents in zip(first[:2], second[:2]))


@pytest.mark.parametrize("name", ["first block", "faster"])
def test_a_call_that_failed_leaves_nothing_behind(pipe, cached, name):
    cached(CONFIGS[name])
    expected = generate(pipe)

    def fail(pipeline, step, timestep, tensors):
        if step == 1:
            raise RuntimeError
        return {}

    with pytest.raises(RuntimeError):
        pipe(tiny_image("blue"), callback_on_step_end=fail)
    assert all(torch.equal(*latents) for latents in zip(expected[:2], generate(pipe)[:2]))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("magnitudes", {"num_inference_steps": 4}, "`num_inference_steps` of MagCacheConfig must be .*4, got 6"),
        ("magnitudes", {"guidance_interval": (0.0, 0.5)}, "takes no `guidance_interval`"),
        ("faster", {"guidance_scale": 1.0}, "FasterCacheConfig needs guidance in all steps"),
        ("faster", {"guidance_interval": (0.5, 1.0)}, "FasterCacheConfig needs guidance in all steps"),
    ],
)
def test_settings_that_a_cache_cannot_follow_are_refused(pipe, cached, config, settings, message):
    cached(CONFIGS[config])
    with pytest.raises(ValueError, match=message):
        generate(pipe, **settings)


@pytest.mark.parametrize("config", ["faster", "pyramid"])
def test_caches_of_attention_need_one_batch(pipe, cached, config):
    cached(CONFIGS[config])
    pipe.disable_guidance_batching()
    try:
        with pytest.raises(ValueError, match="call `enable_guidance_batching"):
            generate(pipe)
    finally:
        pipe.enable_guidance_batching()


def test_a_transformer_of_one_block_has_nothing_to_skip():
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 16}
    for transformer in (DenseDiT(sample_size=4, **sizes), SparseDiT(**sizes, attention_type="full")):
        with pytest.raises(ValueError, match="must not be a FirstBlockCacheConfig for a transformer with one block"):
            transformer.enable_cache(FirstBlockCacheConfig())
        assert not transformer.is_cache_enabled


@torch.no_grad()
@pytest.mark.parametrize("gives_cache", [True, False])
def test_faster_cache_of_packed_tokens(pipe, cached, gives_cache):
    """A skipped prediction without the image: the one with it, plus weighted low and high parts of the difference."""
    transformer, coords = pipe.transformer, tiny_coords((40, 9))
    both = torch.cat([coords, coords + torch.tensor([2, 0, 0, 0], dtype=torch.int32)])
    generator = torch.Generator().manual_seed(0)
    noise, tokens = torch.randn(49, 4, generator=generator), torch.randn(5, 16, generator=generator)
    token_coords = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 0], [1, 0, 0, 1], [1, 3, 1, 0], [1, 2, 1, 0]]).int()

    def call(rows, timestep):
        halves = len(rows) // len(coords)
        encoder_coords = torch.cat([token_coords, token_coords + torch.tensor([2, 0, 0, 0]).int()])[-5 * halves :]
        arguments = {
            "coords": both[: len(rows)],
            "timestep": torch.full((2 * halves,), timestep),
            "encoder_hidden_states": torch.cat([0 * tokens, tokens])[-5 * halves :],
            "encoder_coords": encoder_coords - torch.tensor([2 if halves == 1 else 0, 0, 0, 0]).int(),
        }
        if gives_cache:
            arguments["cache"] = caches[halves]
        return transformer(rows, **arguments).sample

    caches = {1: CoordinateCache(coords, 2), 2: CoordinateCache(both, 4)}
    first, second = noise, 0.8 * noise
    unconditional, conditional = call(torch.cat([first, first]), 900.0).chunk(2)
    later = call(second, 700.0)
    difference = unconditional - conditional
    blocks = torch.cat([coords[:, :1], coords[:, 1:] // 4], dim=1)
    low = torch.stack([difference[(blocks == block).all(dim=1)].mean(dim=0) for block in blocks])
    expected = later + 1.5 * low + 0.5 * (difference - low)

    transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, -1),
            unconditional_batch_timestep_skip_range=(-1, 800),
            low_frequency_weight_callback=lambda _: 1.5,
            high_frequency_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: timestep,
        )
    )
    timestep = 900.0
    torch.testing.assert_close(call(torch.cat([first, first]), 900.0), torch.cat([unconditional, conditional]))
    timestep = 700.0
    skipped = call(torch.cat([second, second]), 700.0)
    torch.testing.assert_close(skipped, torch.cat([expected, later]), rtol=1e-4, atol=1e-5)
    transformer._reset_stateful_cache()
    with pytest.raises(ValueError, match="`coords` must hold samples without the image"):
        call(second, 700.0)


def test_current_timestep_is_that_of_the_step(pipe):
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append((float(timestep), pipeline.current_timestep))
        return {}

    pipe(tiny_image(), generator=torch.Generator().manual_seed(3), callback_on_step_end=look, output_type="latent")
    assert len(seen) == 4
    assert all(given == current for given, current in seen)
    assert pipe.current_timestep is None


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_in_an_interval(pipe, batched):
    """Steps outside of the interval are those of a call without guidance."""
    interval, scale = (0.2, 0.7), 2.0
    assert list(steps_in_interval(interval, STEPS)) == [1, 2, 3]

    def choose(pipeline, step, timestep, tensors):
        # The scale of the next step.
        pipeline._guidance_scale = scale if step + 1 in (1, 2, 3) else 1.0
        return {}

    kwargs = {"dense_num_inference_steps": STEPS, "generator": torch.Generator(), "output_type": "latent"}
    if not batched:
        pipe.disable_guidance_batching()
    try:
        kwargs["generator"].manual_seed(5)
        expected = pipe(
            tiny_image(), dense_guidance_scale=1.0, guidance_scale=1.0, callback_on_step_end=choose, **kwargs
        )
        kwargs["generator"].manual_seed(5)
        output = pipe(
            tiny_image(),
            dense_guidance_scale=scale,
            dense_guidance_interval=interval,
            guidance_scale=scale,
            guidance_interval=(0.5, 1.0),
            **kwargs,
        )
    finally:
        pipe.enable_guidance_batching()
    assert torch.equal(output.coords, expected.coords)
    # Of two steps of the sparse stage, the second one is guided in both calls.
    torch.testing.assert_close(output.latents, expected.latents)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.7, 0.2), (0.5,)])
def test_intervals_that_are_none(pipe, interval):
    for name in ("dense_guidance_interval", "guidance_interval", "guidance_interval_1024"):
        with pytest.raises(ValueError, match=f"`{name}` must be \\(start, stop\\)"):
            pipe(tiny_image(), **{name: interval})
