"""Converts a dataset of the format before records (index.csv and shard-00000.safetensors) to shards of records.

    python training/convert_dataset.py --input data/old --output data/new

Datasets of the old format can be trained on as they are; the new one streams from object stores, and its index needs
less memory. What was converted is skipped when the command is started again. The output may be an address that fsspec
knows, such as s3://bucket/data.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..command_parser import CommandParser
from ..data.folder import Folder
from ..data.old_format import OLD_INDEX, convert_dataset
from ..data.records import FORMAT_VERSION


def parse_arguments(arguments: Sequence[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """The arguments of the command line; `prog` is the name of the command in its help."""
    parser = CommandParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder of the old format")
    parser.add_argument("--output", required=True, help="folder of the new format, or its address")
    parser.add_argument("--shard_size", type=int, default=256, help="MB")
    args = parser.parse_args(arguments)
    if args.shard_size < 1:
        parser.error(f"--shard_size must be at least 1, got {args.shard_size}")
    if not (args.input / OLD_INDEX).is_file():
        parser.error(f"--input must be a dataset of the format before, got {args.input}, which has no {OLD_INDEX}")
    return args


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Command line of the conversion."""
    args = parse_arguments(arguments, prog)
    output = Folder(args.output)
    metadata = json.loads((args.input / "metadata.json").read_text(encoding="utf-8"))
    count = convert_dataset(args.input, output, metadata["resolutions"], shard_bytes=args.shard_size * 10**6)
    output.write_text("metadata.json", json.dumps({**metadata, "format_version": FORMAT_VERSION}, indent=2) + "\n")
    print(f"{count} meshes are in {output}.")
