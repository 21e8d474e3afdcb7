"""Sections: named tensors as the bytes of a safetensors file."""

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor


# Bytes of a content hash; its text has twice as many characters.
HASH_BYTES = 16


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Returns arrays as the bytes of a section; the same arrays give the same bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def decode(data: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a section.

    Raises:
        ValueError: if the bytes are no section.
    """
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"The bytes of a section must be a safetensors file, got others: {error}") from None


def content_hash(parts: Iterable[bytes | str]) -> str:
    """Returns the BLAKE2b hash of some bytes and texts in a row, as 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
