"""Phases of a training: what their configuration says, and that trainings follow it."""

import pytest
import trimesh

from diffusers_sparse3d import SparseVAE
from diffusers_sparse3d.training import dense_vae, dit, sparse_vae
from diffusers_sparse3d.training.configuration import TrainingConfig, build_config
from diffusers_sparse3d.training.metrics import read_metrics
from diffusers_sparse3d.training.phases import phase_factor, phase_resolutions, read_phases
from diffusers_sparse3d.training.preparation import command


def config(**values):
    return build_config(TrainingConfig, {"data": "x", "output_dir": "x", **values})


def test_phases_by_hand():
    first = {
        "steps": 10,
        "resolutions": [256, 384],
        "batch_size": {256: 8, 384: 4},
        "max_tokens": {256: None, 384: 99},
    }
    second = {"steps": 5, "resolutions": [1024, 256], "learning_rate": "2e-5"}
    whole = config(phases=[first, second], batch_size=3, max_tokens=50, learning_rate=1e-4)
    one, two = read_phases(whole, [])
    assert (one.steps, one.resolutions, one.batch_sizes, one.max_tokens) == (10, [256, 384], [8, 4], [None, 99])
    assert (two.steps, two.resolutions, two.batch_sizes, two.max_tokens) == (5, [1024, 256], [3, 3], [50, 50])
    assert (one.learning_rate, two.learning_rate) == (1e-4, 2e-5)
    assert whole.max_train_steps == 15
    assert [phase_factor(whole, step) for step in (0, 9, 10, 14, 99)] == pytest.approx([1, 1, 0.2, 0.2, 0.2])
    assert phase_resolutions([one, two]) == [384, 1024, 256]
    (only,) = read_phases(config(max_train_steps=4, batch_size=3, max_tokens=50), [512])
    assert (only.steps, only.resolutions, only.batch_sizes, only.max_tokens) == (None, [512], [3], [50])
    assert phase_factor(config(max_train_steps=4), 3) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"`phases\[1\].steps` must be an integer of at least 1, got 0"),
        ({"steps": None}, r"`phases\[1\].steps`"),
        ({"resolutions": 256}, r"`phases\[1\].resolutions` must be a list of integers, got 256"),
        ({"resolutions": []}, r"`phases\[1\].resolutions`"),
        ({"batch_size": 0}, r"`phases\[1\].batch_size` must be integers of at least 1, got 0"),
        ({"batch_size": None}, r"`phases\[1\].batch_size`"),
        ({"batch_size": {512: 4}}, r"`phases\[1\].batch_size` must have the keys \[256\]"),
        ({"max_tokens": {256: "many"}}, r"`phases\[1\].max_tokens` must be integers"),
        ({"learning_rate": "fast"}, r"`phases\[1\].learning_rate` must be a number, got 'fast'"),
        ({"learning_rate": 0}, r"`phases\[1\].learning_rate` must be positive"),
        ({"epochs": 3}, r"`phases\[1\]` must be a mapping with steps, resolutions"),
    ],
)
def test_bad_phases(change, message):
    good = {"steps": 4, "resolutions": [256]}
    with pytest.raises(ValueError, match=message):
        config(phases=[good, {**good, **change}])
    with pytest.raises(ValueError, match="`max_train_steps` must be at most 8"):
        config(phases=[good, good], max_train_steps=9)
    assert config(phases=[good, good], max_train_steps=6).max_train_steps == 6


def test_dense_models_have_no_phases(tmp_path):
    phases = [{"steps": 4, "resolutions": [256]}]
    options = {"data": "x", "output_dir": str(tmp_path), "phases": phases}
    with pytest.raises(ValueError, match="`phases` must be empty for a dense VAE"):
        dense_vae.train(build_config(dense_vae.DenseVAEConfig, options))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three solids at 32^3 and 64^3, without a validation split."""
    root = tmp_path_factory.mktemp("meshes")
    for extent in (0.4, 0.7, 1.0):
        trimesh.creation.box((1.0, extent, 0.5)).export(root / f"box-{extent}.ply")
    arguments = ["--resolutions", "32", "64", "--num_views", "1", "--image_size", "56", "--num_workers", "0"]
    command.main(["--input", str(root), "--output", str(root / "data"), *arguments, "--val_fraction", "0"])
    return root / "data"


@pytest.fixture
def seen(monkeypatch):
    """Resolution, samples and tokens of every batch that a task sees."""
    batches = []
    for task in (sparse_vae.SparseVAETask, dit.DiTTask):
        forward = task.forward

        def record(self, batch, forward=forward):
            (resolution,) = set(batch["resolution"].tolist())
            batches.append((resolution, len(batch["resolution"]), len(batch["coords"])))
            return forward(self, batch)

        monkeypatch.setattr(task, "forward", record)
    return batches


PHASES = [
    {"steps": 4, "resolutions": [32, 64], "batch_size": {32: 3, 64: 1}},
    {"steps": 3, "resolutions": [64], "batch_size": 2, "learning_rate": 1e-3},
]


def test_vae_and_transformer_follow_their_phases(tmp_path, data, common_options, sparse_vae_model, seen):
    """Each step has the resolution, batch and learning rate of its phase, after a break in the midst, too."""
    options = {
        **common_options,
        "data": str(data),
        "phases": PHASES,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 3,
    }
    model = {**sparse_vae_model, "sample_size": 8}
    values = {**options, "model": model, "output_dir": str(tmp_path / "vae")}
    sparse_vae.train(build_config(sparse_vae.SparseVAEConfig, values))
    # One pass over the data: a batch of all at 32, one of each at 64; then 64 alone, two samples and one by turns.
    assert sorted(batch[:2] for batch in seen[:4]) == [(32, 3), (64, 1), (64, 1), (64, 1)]
    assert [batch[0] for batch in seen[4:7]] == [64] * 3 and sorted(batch[1] for batch in seen[4:6]) == [1, 2]
    rates = [entry["learning_rate"] for entry in read_metrics(tmp_path / "vae") if "loss" in entry]
    assert rates == pytest.approx([3e-3] * 4 + [1e-3] * 3)

    resumed = {
        **values,
        "output_dir": str(tmp_path / "resumed"),
        "resume_from_checkpoint": str(tmp_path / "vae" / "checkpoint-3"),
    }
    sparse_vae.train(build_config(sparse_vae.SparseVAEConfig, resumed))
    whole, rest = (
        [entry["loss"] for entry in read_metrics(tmp_path / name) if "loss" in entry] for name in ("vae", "resumed")
    )
    assert rest == whole[3:] and len(rest) == 4
    assert SparseVAE.from_pretrained(tmp_path / "vae" / "vae").config.sample_size == 8

    del seen[:]
    encoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    values = {
        **options,
        "stage": "sparse",
        "vae": str(tmp_path / "vae" / "vae"),
        "output_dir": str(tmp_path / "dit"),
        "image_encoder_model": encoder,
        "train_image_encoder": True,
        "max_tokens": 600,
        "model": {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_key_value_heads": 1,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
        },
    }
    dit.train(build_config(dit.DiTConfig, values))
    assert sorted(batch[:2] for batch in seen[:4]) == [(32, 3), (64, 1), (64, 1), (64, 1)]
    assert [batch[0] for batch in seen[4:]] == [64] * 3
    # Four times the tokens at twice the resolution.
    tokens = {resolution: sum(b[2] for b in seen[:4] if b[0] == resolution) for resolution in (32, 64)}
    assert 3 * tokens[32] < tokens[64] < 6 * tokens[32]
    small = {**values, "model": {**values["model"], "sample_size": 4}, "output_dir": str(tmp_path / "small")}
    with pytest.raises(ValueError, match=r"`model.sample_size` must be an eighth of the largest resolution, 64"):
        dit.train(build_config(dit.DiTConfig, small))
    limited = {**values, "max_tokens": 100, "output_dir": str(tmp_path / "limited")}
    with pytest.raises(ValueError, match=r"`max_tokens` must be at least .* at resolution 64.* 'box-1.0'"):
        dit.train(build_config(dit.DiTConfig, limited))
