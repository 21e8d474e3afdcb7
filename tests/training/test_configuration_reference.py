"""The page on the training configuration says what the dataclasses say."""

import dataclasses
from pathlib import Path

import pytest

from diffusers_sparse3d.training.configuration_reference import SECTIONS, configuration_page, describe_fields


def test_the_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "training_configuration.md"
    assert page.read_text(encoding="utf-8") == configuration_page(), (
        "run: python -m diffusers_sparse3d.training.configuration_reference > docs/training_configuration.md"
    )


@pytest.mark.parametrize("config_class", [config_class for _, _, config_class in SECTIONS])
def test_every_field_is_described_where_it_is_declared(config_class):
    (base,) = config_class.__bases__
    inherited = {field.name for field in dataclasses.fields(base)} if base is not object else set()
    own = [field.name for field in dataclasses.fields(config_class) if field.name not in inherited]
    meanings = describe_fields(config_class)
    assert list(meanings) == own
    assert all(meaning[0].isupper() or meaning[0] == '"' for meaning in meanings.values())
    assert all(meaning.endswith(".") for meaning in meanings.values())


def test_rows_of_the_page():
    rows = [line for line in configuration_page().splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(describe_fields(config_class)) for _, _, config_class in SECTIONS)
    assert "| `data` | str | required | Folder of the dataset, as `prepare_data.py` writes it. |" in rows
    assert "| `kl_weight` | float | `0.001` | Weight of the Kullback-Leibler divergence in the loss. |" in rows
    assert any(row.startswith("| `max_tokens` | int \\| None | `null` | Largest number of tokens") for row in rows)
