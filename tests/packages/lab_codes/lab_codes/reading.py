"""Files of codes: `NAME: FIRST > SECOND [GROUP]` a line, `#` before remarks."""

import re
from collections.abc import Iterator

import pyarrow as pa

from meristem.data.reading.open import open_source
from meristem.data.reading.reader import Reader
from meristem.data.records import GROUP, LABEL_PREFIX, ReadOptions, Refusal, Source, batch_of
from meristem.errors import DataError

LINE = re.compile(r"(?P<id>\S+): (?P<first>[A-Za-z]+) > (?P<second>[A-Za-z]+)(?: \[(?P<instrument>\w+)\])?")


class CodeReader(Reader):
    """Reads the lines of a file; letters may be of either case."""

    def read(self, source: Source, options: ReadOptions) -> Iterator[pa.RecordBatch]:
        columns = {
            name: column or ("first" if name == options.main else name) for name, column in options.columns.items()
        }
        labels = [*options.label_columns, *([options.group_column] if options.group_column else [])]
        for column in (*columns.values(), *labels):
            if column not in LINE.groupindex:
                raise DataError(
                    f"{source.name}: columns of a file of codes are {', '.join(LINE.groupindex)}; got {column!r}"
                )
        rows, lines = [], []
        with open_source(source) as stream:
            for line, raw in enumerate(stream, start=1):
                text = raw.decode("utf-8", "replace").partition("#")[0].strip()
                if not text:
                    continue
                match = LINE.fullmatch(text)
                if match is None:
                    options.refuse(
                        Refusal(source.name, line, f"line{line}", "is no code: NAME: FIRST > SECOND [GROUP]")
                    )
                    continue
                rows.append(match.groupdict())
                lines.append(line)
        if not rows:
            return
        extra = {
            LABEL_PREFIX + name: pa.array([row[name] for row in rows], pa.string()) for name in options.label_columns
        }
        if options.group_column:
            extra = {GROUP: pa.array([row[options.group_column] or "" for row in rows]), **extra}
        inputs = {
            name: pa.array([row[column].upper() for row in rows], pa.large_string()) for name, column in columns.items()
        }
        yield batch_of(pa.array([row["id"] for row in rows]), inputs, source.name, lines, extra)

    def canonical(self, payload: str) -> bytes:
        """A code read from either end is one code."""
        return min(payload, payload[::-1]).encode()
