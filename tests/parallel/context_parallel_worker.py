"""A tiny SparseDiT on two processes with context parallelism, beside the same on one: see test_context_parallel.py.

Prints one line of JSON for each case, on the first process.
"""

import json
import multiprocessing
import sys
import tempfile

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, TensorParallelConfig

from diffusers_sparse3d import SparseDiT


CASES = {
    "ssa": {},
    "window": {"attention_type": "window"},
    "full": {"attention_type": "full"},
    "norms": {"qk_norm": True, "qk_norm_cross": True, "share_mod": True},
    "heads of their own": {"attention_type": "full", "num_key_value_heads": None},
}


def make_model(**options) -> SparseDiT:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8}
    blocks = {"compression_block_size": 2, "selection_block_size": 4, "topk": 2, "window_size": 4}
    model = SparseDiT(cross_attention_dim=12, norm_num_groups=4, **sizes, **blocks, **options)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def make_inputs(counts: tuple[int, ...]) -> dict:
    """Rows in no order, of samples of which one may be on one process alone."""
    generator = torch.Generator().manual_seed(1)
    cells = [torch.randperm(8**3, generator=generator)[:count] for count in counts]
    coords = torch.cat(
        [torch.stack([torch.full_like(c, b), c // 64, c // 8 % 8, c % 8], dim=1) for b, c in enumerate(cells)]
    )
    coords = coords[torch.randperm(len(coords), generator=generator)].int()
    tokens = torch.tensor([[b, i, b, 0] for b in range(len(counts)) for i in range(3 + b)], dtype=torch.int32)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "hidden_states": random(len(coords), 4),
        "coords": coords,
        "timestep": 1000 * torch.rand(len(counts), generator=generator, dtype=torch.float64),
        "encoder_hidden_states": random(len(tokens), 12),
        "encoder_coords": tokens,
    }


def loss_of(model: SparseDiT, inputs: dict, **options) -> tuple[torch.Tensor, torch.Tensor]:
    sample = model(**inputs, **options).sample
    weights = torch.linspace(-1, 1, sample.numel(), dtype=sample.dtype).view_as(sample)
    return sample, (sample * weights).sum()


def compare(name: str, counts: tuple[int, ...], options: dict, checkpointing: bool) -> dict:
    """Relative differences of the result and of all gradients, added up over the processes."""
    expected, inputs = make_model(**options), make_inputs(counts)
    sample, loss = loss_of(expected, inputs)
    loss.backward()
    model = make_model(**options)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    if checkpointing:
        model.enable_gradient_checkpointing()
    own_rows = []
    model.transformer_blocks[0].ff.register_forward_pre_hook(lambda module, args: own_rows.append(len(args[0])))
    found, loss = loss_of(model, inputs, cache=model.plan(inputs["coords"], len(counts))[0])
    loss.backward()
    # Some gradients are zero but for rounding, such as those of biases of keys.
    worst, least = 0.0, 1e-6 * max(float(reference.grad.norm()) for reference in expected.parameters())
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        worst = max(worst, float((gradient - reference.grad).norm() / reference.grad.norm().clamp(min=least)))
    error = float((found - sample).norm() / sample.norm())
    return {"name": name, "rows": own_rows[0], "all_rows": len(sample), "error": error, "gradients": worst}


def message_of(function) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(rank: int) -> dict:
    """What is said of wrong configurations, and of processes that are given other rows."""

    def enable(config, prepare=lambda model: None, **options):
        model = make_model()
        prepare(model)
        return message_of(lambda: model.enable_parallelism(config=config, **options))

    twice = make_model()
    twice.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    inputs = make_inputs((5 + rank, 4))
    return {
        "ring": enable(ContextParallelConfig(ring_degree=2)),
        "degree": enable(ContextParallelConfig(ulysses_degree=3)),
        "tensor": enable(TensorParallelConfig(tp_degree=2)),
        "plan": enable(ContextParallelConfig(ulysses_degree=2), cp_plan={"proj_in": None}),
        "cache": enable(
            ContextParallelConfig(ulysses_degree=2), lambda model: model.enable_cache(FirstBlockCacheConfig(0.1))
        ),
        "processor": enable(
            ContextParallelConfig(ulysses_degree=2),
            lambda model: model.transformer_blocks[1].attn1.set_processor(lambda attn, x, coords=None, **_: x),
        ),
        "twice": message_of(lambda: twice.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))),
        "later cache": message_of(lambda: twice.enable_cache(FirstBlockCacheConfig(0.1))),
        "rows": message_of(lambda: twice(**inputs)),
    }


def work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name, options in CASES.items():
        # The second process has no row of a single one.
        for counts, checkpointing in (((37, 20), False), ((9,), True), ((1,), False)):
            facts = compare(name, counts, options, checkpointing)
            if rank == 0:
                print(json.dumps(facts), flush=True)
    messages = refusals(rank)
    if rank == 0:
        print(json.dumps({"name": "refusals", **messages}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=work, args=(rank, f"{folder}/store")) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    sys.exit(max(abs(process.exitcode) for process in processes))
