"""A training of process_worker.py on GPUs, by torchrun: gpu_worker NAME KIND ddp|fsdp|deepspeed OPTIMIZER FOLDER.

See test_two_gpus.py.
"""

import os
import sys
from pathlib import Path

import torch

from tests.training import process_worker


# What `accelerate launch --use_deepspeed --zero_stage 2` sets.
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


def main(name: str, kind: str, layout: str, optimizer: str, folder: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if os.environ["WORLD_SIZE"] == "1":
        # Without a group of processes, as a training that is started without a launcher.
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[key]
    if layout == "deepspeed":
        os.environ.update(DEEPSPEED)
    options = {"more_ema_decays": [0.5]} if kind == "vae" else {"validation_steps": 1}
    options |= {"optimizer": optimizer, "max_train_steps": 3, "cpu": not torch.cuda.is_available()}
    process_worker.train(name, Path(folder) / name, kind, layout == "fsdp", **options)
    # The threads of the group of processes would keep Python waiting.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
