"""What operators ask of the device and of PyTorch's settings."""

import pytest
import torch

from diffusers_sparse3d.ops.runtime.dispatch import dot_precision


matmul = torch.backends.cuda.matmul
has_new_settings = hasattr(matmul, "fp32_precision")
needs_new_settings = pytest.mark.skipif(not has_new_settings, reason="needs torch 2.9, where settings have new names")


@pytest.fixture(autouse=True)
def settings_as_they_were():
    yield
    if has_new_settings:
        torch.backends.fp32_precision = matmul.fp32_precision = "none"
    # With the newer setting as it is here, the older ones can be read and written.
    torch.set_float32_matmul_precision("highest")
    if has_new_settings:
        matmul.fp32_precision = "none"


def test_products_are_exact_unless_somebody_allows_tf32():
    assert dot_precision(torch.float32) == dot_precision(torch.bfloat16) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert dot_precision(torch.float32) == "tf32" and dot_precision(torch.float16) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert dot_precision(torch.float32) == "ieee"
    matmul.allow_tf32 = True
    assert dot_precision(torch.float32) == "tf32"


@needs_new_settings
@pytest.mark.parametrize("owner", [matmul, torch.backends], ids=["of matrix products", "of all"])
def test_new_settings_say_the_same(owner):
    """PyTorch refuses to read its older settings once the newer ones were written."""
    owner.fp32_precision = "tf32"
    assert dot_precision(torch.float32) == "tf32"
    matmul.fp32_precision = "ieee"
    assert dot_precision(torch.float32) == "ieee"
