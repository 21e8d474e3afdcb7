"""The states of all random generators of a training, as tensors."""

import random

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of this process's generators: Python's, NumPy's and torch's, of the GPU too if it has one."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    # 32-bit numbers, which float64 holds exactly, with the second half of the last pair of normal numbers.
    state = {
        "python": torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(keys).tolist(), position, has_gauss, cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Sets the generators of this process to states of `random_state`."""
    *words, has_gauss, gauss = state["python"].tolist()
    random.setstate((3, tuple(int(word) for word in words), gauss if has_gauss else None))
    *keys, position, has_gauss, cached = state["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
    # Torch reads the memory of the states as it is, which must be aligned: copies, not rows of another tensor.
    torch.set_rng_state(state["torch"].clone())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].clone(), device)


def gather_random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """Returns the states of all processes, stacked in their order, on the CPU."""
    device = accelerator.device
    return {name: accelerator.gather(part[None].to(device)).cpu() for name, part in random_state(device).items()}
