"""What Hugging Face `datasets`, and the viewer of the hub, need to show a folder of shards."""

import json
from typing import Any

import pyarrow as pa


def with_hub_features(table: pa.Table) -> pa.Table:
    """Returns the index of a shard with the types of its columns as `datasets` names them.

    Without them, `datasets` would take the pictures for structures of bytes.
    """
    features = {field.name: _feature(field) for field in table.schema}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def card_header(license: str | None = None) -> str:
    """Returns the head of a dataset card, with which `datasets.load_dataset` reads the indices of all shards.

    Args:
        license: Identifier of the licence of the whole, as the hub lists it; "other" if None: each record has its own.
    """
    return (
        f"---\nlicense: {license or 'other'}\ntask_categories:\n- image-to-3d\nconfigs:\n- config_name: default\n"
        "  data_files:\n  - split: meshes\n    path: shards/*.parquet\n---\n\n"
    )


def _feature(field: pa.Field) -> dict[str, Any]:
    if pa.types.is_struct(field.type):
        return {"_type": "Image"}
    if pa.types.is_list(field.type):
        return {"_type": "Sequence", "feature": _feature(field.type.value_field), "length": -1}
    names = {pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64"}
    return {"_type": "Value", "dtype": names.get(field.type, str(field.type))}
