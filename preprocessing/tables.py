"""Records of tables: parquet files, and what `datasets` reads."""

from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import parquet


def records_of(data: datasets.Dataset | datasets.IterableDataset) -> list[dict]:
    """All of them. A float32 is the number that is written as it would be: 0.1, where Python has
    0.10000000149011612 for it."""
    tables = data.with_format("arrow").iter(batch_size=10_000)
    return [record for table in tables for record in _widened(table).to_pylist()]


def parquet_records(path: Path) -> list[dict]:
    """Those of a file. ValueError, OSError."""
    with open(path, "rb") as file:
        if file.read(4) != b"PAR1":
            raise ValueError("it is no parquet file (a Git LFS pointer? see data/README.md)")
        return _widened(parquet.ParquetFile(file).read()).to_pylist()


def _widened(table: pa.Table) -> pa.Table:
    """With a float64 in place of every float32: of its digits, as few as tell it apart."""
    schema = table.schema
    for number in (pa.string(), pa.float64()):
        wider = [(field.name, _wider(field.type, number)) for field in schema]
        if wider != [(field.name, field.type) for field in schema]:
            table = table.cast(pa.schema(wider))
    return table


def _wider(kind: pa.DataType, number: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_wider(kind.value_type, number))
    if pa.types.is_large_list(kind):
        return pa.large_list(_wider(kind.value_type, number))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_wider(kind.value_type, number), kind.list_size)
    return number if pa.types.is_float32(kind) else kind
