"""Records in shards: the format of datasets and of caches, on local disks and in object stores.

A *record* is what belongs to one sample: named *sections*, each a set of tensors that are read together, and the
values of some columns. In a folder (a local one, or an address that fsspec knows, such as `s3://bucket/data`) are

    shards/NAME-000000.bin       sections of records, one after the other, each at a multiple of 64 bytes: a complete
                                 safetensors file as it is, so that one ranged request reads a section
    shards/NAME-000000.parquet   the records of this shard: id, content hash, place of the record and of each section,
                                 further columns, and a picture for people
    index.parquet                the same for all shards in ascending order of their names, without the pictures

A shard is there from the moment that its Parquet file is: both are written beside their place, synced, and renamed,
the Parquet file last, and never changed. So many processes may write into one folder, each with a NAME of its own, and
a process that is killed leaves whole shards alone behind. `merge_index` makes index.parquet, which readers of a
dataset open; it can be made anew at any time.

| module | holds |
| --- | --- |
| `folder` | a folder, local or remote: complete files, ranged reads |
| `sections` | tensors to the bytes of a section and back, content hashes |
| `records` | `Record`, and the sections and columns of meshes: the one place that knows what a dataset has of a mesh |
| `writer` | `ShardWriter` |
| `index` | `merge_index`, and the columns of an index in memory |
| `reader` | `RecordReader`: any section of any record with one request |
| `range_cache` | sections of remote folders on the local disk, of bounded size |
| `record_cache` | caches of what is made of records, by the content of their inputs |
| `old_format` | datasets of the format before, and their conversion |
| `hub` | what Hugging Face `datasets` and the viewer of the hub need |
"""
