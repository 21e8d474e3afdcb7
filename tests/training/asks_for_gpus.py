"""A module whose import asks for GPUs, as that of other packages may, and what processes do that need one.

From then on PyTorch marks every process that is forked, and refuses it CUDA. PyTorch without CUDA sets no such mark,
so this module has its own, by a handler of forks as well.
"""

import os


MARKS: list[str] = []

os.register_at_fork(after_in_child=lambda: MARKS.append("Cannot re-initialize CUDA in forked subprocess"))


def take_device(device: str, index: int) -> None:
    """Stands for `set_up`, in which `torch.cuda.set_device` raises this error."""
    if MARKS:
        raise RuntimeError(MARKS[0])


def tell_device(job: object) -> None:
    """Stands for the job of a mesh: fails with a cause that tells whether the process may use a GPU."""
    raise MemoryError("the process may use no GPU") if MARKS else ValueError("the process may use a GPU")
