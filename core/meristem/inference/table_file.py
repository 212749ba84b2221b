"""One table made of finished parts: CSV, TSV or Parquet."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from meristem.files import replacing
from meristem.inference.output import parts_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*DELIMITERS, ".parquet")


def write_table_file(parts: Path, output: Path, is_exploded: bool = False) -> None:
    """Write the rows of all parts to one file, which is there when it is whole.

    Args:
        output: its ending, one of `SUFFIXES`, says how; fp32 numbers in text have six digits, fp64 ones all.
        is_exploded: each entry of the lists in a row becomes a row of its own.
    """
    # a killed process leaves its half among the parts, which the next one clears away
    with replacing(output, parts) as temporary:
        if output.suffix == ".parquet":
            tables = _tables(parts, is_exploded)
            first = next(tables)
            with pq.ParquetWriter(temporary, first.schema) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table.cast(first.schema))
            return
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            lines = csv.writer(stream, delimiter=DELIMITERS[output.suffix], lineterminator="\n")
            for number, table in enumerate(_tables(parts, is_exploded)):
                if not number:
                    lines.writerow(table.column_names)
                lines.writerows(zip(*map(_texts, table.columns)))


def _tables(parts: Path, is_exploded: bool) -> Iterator[pa.Table]:
    for part in parts_of(parts):
        table = pq.read_table(part).replace_schema_metadata(None)
        if is_exploded:
            lists = [name for name, kind in zip(table.column_names, table.schema.types) if pa.types.is_list(kind)]
            parents = pc.list_parent_indices(table[lists[0]].combine_chunks())
            table = pa.table(
                {n: pc.list_flatten(table[n]) if n in lists else table[n].take(parents) for n in table.column_names}
            )
        yield table


def _texts(column: pa.ChunkedArray) -> list[object]:
    """The values of a column as the text of a table has them."""
    values: list[object] = column.to_pylist()
    if not pa.types.is_float32(column.type):
        return values
    return [f"{value:.6g}" if isinstance(value, float) else value for value in values]
