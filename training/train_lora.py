#!/usr/bin/env python
"""Fine-tunes the transformers of a pipeline on a folder of meshes: LoRA, DoRA or all weights.

    accelerate launch training/train_lora.py --pretrained_model_name_or_path checkpoints/direct3d-s2-small \
        --instance_data_dir meshes --output_dir outputs/style --max_train_steps 500

The same as `diffusers-sparse3d train lora`; `--help` describes all arguments.
"""

if __name__ == "__main__":
    # Imported here, as worker processes import this script too.
    from diffusers_sparse3d.training.lora import main

    main()
