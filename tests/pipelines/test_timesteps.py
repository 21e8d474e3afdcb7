"""Schedulers that shift by the length of the samples, as they are saved by a training with such a shift."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)

from .tiny import LATENT_SIZE, tiny_components, tiny_coords, tiny_image, tiny_pipeline


def with_scheduler(name, kind, **options):
    pipe = tiny_pipeline()
    setattr(pipe, name, kind.from_config(pipe.scheduler.config, **options))
    return pipe


def test_a_multistep_solver_of_the_flow():
    """A solver that is told that predictions are velocities goes where Euler's steps go; otherwise it is refused."""
    call = {"coords": tiny_coords((7,)), "guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 40}
    expected = tiny_pipeline()(tiny_image(), **call, generator=torch.Generator().manual_seed(0)).latents
    pipe = with_scheduler(
        "scheduler", UniPCMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    found = pipe(tiny_image(), **call, generator=torch.Generator().manual_seed(0)).latents
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match=r"`scheduler` must be a scheduler of flow matching, got .*use_flow_sigmas"):
        with_scheduler("scheduler", UniPCMultistepScheduler)(tiny_image(), **call)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", ["scheduler", "dense_scheduler"])
def test_schedulers_of_other_predictions_are_refused(kind, name):
    with pytest.raises(ValueError, match=f"`{name}` must be a scheduler of flow matching"):
        with_scheduler(name, kind)(tiny_image(), output_type="latent")


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
NOISY = {
    "lcm": FlowMatchLCMScheduler(shift=2.0),
    "euler": FlowMatchEulerDiscreteScheduler(shift=2.0, stochastic_sampling=True),
    "sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
}


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# Of DPM-Solver, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", NOISY)
def test_noise_of_the_steps_comes_from_the_generator(name):
    """In both stages; each of a list draws that of its sample, which does not depend on the batch."""
    pipe = tiny_pipeline(scheduler=NOISY[name], dense_scheduler=NOISY[name])
    dense = []

    def latents(image, generator, **kwargs):
        return pipe(image, generator=generator, output_type="latent", guidance_scale=1.0, **kwargs).latents

    def keep(pipeline, step, timestep, callback_kwargs):
        if pipeline.stage == "dense" and step == 1:
            dense.append(callback_kwargs["latents"])
            pipeline._interrupt = True

    given = {"coords": tiny_coords((7,)), "num_inference_steps": 3}
    one, other = latents(tiny_image(), *seeded(0), **given), latents(tiny_image(), *seeded(1), **given)
    assert torch.equal(latents(tiny_image(), *seeded(0), **given), one) and not torch.equal(one, other)
    images = [tiny_image(), tiny_image("blue")]
    batch = latents(images, seeded(0, 1), coords=tiny_coords((7, 5)), num_inference_steps=3)
    single = latents(images[0], seeded(0), **given)
    torch.testing.assert_close(batch[:7], single, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(single, latents(images[0], seeded(1), **given), atol=1e-2)
    for image, generator in ((images, seeded(0, 1)), (images[0], seeded(0)), (images[0], seeded(0)[0])):
        latents(image, generator, callback_on_step_end=keep)
    torch.testing.assert_close(dense[0][:1], dense[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(dense[1], dense[2])


def test_a_list_of_generators_has_one_for_each_sample_of_a_stage():
    pipe = tiny_pipeline()
    dense = pipe.dense_stage
    conditioning = pipe.encode_image(*pipe.image_processor.preprocess(tiny_image()))[0]
    with pytest.raises(ValueError, match="`generator` is a list of 2 for a batch of 1 meshes"):
        pipe.denoise(dense, torch.zeros(1, 2, 4, 4, 4), conditioning, 1, 2, 1.0, generator=seeded(0, 1))


def test_schedulers_without_the_settings_of_a_shift_run():
    """Heun's method, as its constructor makes it, goes where Euler's goes in twice as many steps."""
    call = {"coords": tiny_coords((7,)), "guidance_scale": 1.0, "output_type": "latent"}
    heun = FlowMatchHeunDiscreteScheduler(shift=2.0)
    assert "use_dynamic_shifting" not in heun.config
    pipe, seen = tiny_pipeline(scheduler=heun), []

    def count(pipeline, step, timestep, callback_kwargs):
        seen.append((step, pipeline.num_timesteps))

    found = pipe(tiny_image(), **call, num_inference_steps=20, generator=seeded(0)[0], callback_on_step_end=count)
    expected = tiny_pipeline()(tiny_image(), **call, num_inference_steps=40, generator=seeded(0)[0]).latents
    assert seen == [(step, 39) for step in range(39)]
    assert (found.latents - expected).abs().max() < 0.05 * expected.abs().max()
    dense = tiny_pipeline(dense_scheduler=heun)(tiny_image(), output_type="latent", generator=seeded(0)[0])
    assert dense.latents.isfinite().all()


@pytest.mark.parametrize(
    ("scheduler", "lacks"),
    [
        (FlowMatchHeunDiscreteScheduler.from_config({"use_dynamic_shifting": True}), "`mu` of `set_timesteps`"),
        (UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW), "base_image_seq_len"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=None), "max_shift"),
    ],
)
def test_shifts_that_a_scheduler_cannot_make_are_refused_before_any_stage(scheduler, lacks, monkeypatch):
    pipe = tiny_pipeline(scheduler=scheduler)
    monkeypatch.setattr(pipe, "denoise", lambda *args, **kwargs: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=rf"`scheduler` must be made with `use_dynamic_shifting=False`.*{lacks}"):
        pipe(tiny_image(), output_type="latent")


def test_the_pipeline_shifts_by_the_number_of_cells():
    components = tiny_components()
    for name in ("scheduler", "dense_scheduler"):
        components[name] = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=math.log(2),
            max_shift=math.log(18),
            base_image_seq_len=4,
            max_image_seq_len=16,
        )
    pipe = tiny_pipeline(**components)
    images = [tiny_image(), tiny_image("blue")]
    pipe(images, coords=tiny_coords((13, 7)), num_inference_steps=4, guidance_scale=1.0, output_type="latent")
    # Ten cells a sample in the mean, halfway from 4 to 16: the shift is sqrt(2 * 18) = 6, of 1 to 1/1000.
    plain = torch.linspace(1, 0.001, 4)
    assert torch.allclose(pipe.scheduler.sigmas[:-1], 6 * plain / (1 + 5 * plain))
    pipe(images[0], dense_num_inference_steps=2, num_inference_steps=1, output_type="latent")
    shift = 2 * 9 ** (((LATENT_SIZE // 2) ** 3 - 4) / 12)
    plain = torch.tensor([1, 0.001])
    assert torch.allclose(pipe.dense_scheduler.sigmas[:-1], shift * plain / (1 + (shift - 1) * plain))
