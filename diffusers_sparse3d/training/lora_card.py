"""The model card of a fine-tuning, and its upload."""

import argparse
from pathlib import Path

from huggingface_hub import create_repo, upload_folder

from .files import write_text


def write_card(args: argparse.Namespace) -> None:
    """Writes OUTPUT_DIR/README.md: what the weights are of, how they were trained, and how they are used."""
    base = args.pretrained_model_name_or_path
    kind = "DoRA" if args.use_dora else "LoRA"
    # A hub id; a folder on the author's machine would be no link.
    link = f"base_model: {base}\n" if not Path(base).exists() else ""
    source = args.hub_model_id or args.output_dir.name
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    card = f"""---
library_name: diffusers
pipeline_tag: image-to-3d
{link}tags: [image-to-3d, direct3d-s2, lora, diffusers-training]
---
# {args.output_dir.name}

{kind} weights of {", ".join(f"`{name}`" for name in args.components)} of {base}, trained with
`training/train_lora.py` of diffusers_sparse3d.

```python
from diffusers import DiffusionPipeline

import diffusers_sparse3d

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{source}")
mesh = pipe("picture.png").meshes[0]
```

| | |
| --- | --- |
| rank, alpha | {args.rank}, {alpha:g} |
| layers | {", ".join(args.lora_layers)} |
| steps of each transformer | {args.max_train_steps} |
| samples per process and forward pass | {args.train_batch_size} |
| learning rate | {args.learning_rate:g}, {args.lr_scheduler} |
| average | decay {args.ema_decay:g} |
| seed | {args.seed} |
"""
    write_text(args.output_dir / "README.md", card)


def push_to_hub(args: argparse.Namespace) -> None:
    """Uploads the result of a fine-tuning, without its data, caches, checkpoints and logs, to the hub."""
    name = args.hub_model_id or args.output_dir.name
    repository = create_repo(name, private=args.hub_private_repo or None, exist_ok=True, token=args.hub_token).repo_id
    folder = args.output_dir / "pipeline" if args.full else args.output_dir
    patterns = None if args.full else ["*.safetensors", "README.md", "*/pictures/*"]
    upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="End of training",
        allow_patterns=patterns,
        ignore_patterns=["data/*", "cache/*", "*/checkpoint-*"],
        token=args.hub_token,
    )
