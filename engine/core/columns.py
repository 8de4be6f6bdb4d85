"""Numbers of many rows as columns on disk: an Arrow stream with a batch for each step. Batches are found and read one by one,
and made as the bytes that stand in a stream. Which steps are in which file is segments.py's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

LEVEL = 3  # of zstd: a higher one takes longer and saves little
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # what Arrow ends a stream with, and no reader of one needs


class Batch(NamedTuple):
    """Where the columns of a step lie in their file."""

    step: int
    begin: int
    end: int


def read_batches(path: Path) -> Iterator[Batch]:
    """The whole batches of a file of columns, in order; what follows the last is not looked at. DataError where it is none."""
    import pyarrow as pa

    only_steps = pa.ipc.IpcReadOptions(included_fields=[0], use_threads=False)
    with pa.OSFile(str(path)) as file:
        try:
            reader = pa.ipc.open_stream(file, options=only_steps)
        except (pa.ArrowException, OSError):
            return  # killed before its first batch
        begin = file.tell()
        while True:
            try:
                batch = reader.read_next_batch()
            except (StopIteration, pa.ArrowException, OSError):
                return
            end = file.tell()
            yield Batch(batch.column(0)[0].as_py(), begin, end)
            begin = end


def read_columns(path: Path, batch: Batch) -> dict[str, list[np.ndarray]]:
    """The columns of a step by name, an array for each of its rows. DataError where they cannot be read."""
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as file:
            schema = pa.ipc.read_schema(file)
            file.seek(batch.begin)
            found = pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
            found.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}, step {batch.step}: columns must be as they were written; found others ({error}): use another file"
        ) from error
    columns = {}
    for name in schema.names[1:]:
        lists = found.column(name)
        offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy()
        columns[name] = [values[begin:end] for begin, end in pairwise(offsets)]
    return columns


def schema_of(columns: Mapping[str, str]) -> pa.Schema:
    """The schema of columns of these types, each "int32" or "float32"."""
    import pyarrow as pa

    kinds = {"int32": pa.int32(), "float32": pa.float32()}
    return pa.schema([("step", pa.int32()), *((name, pa.list_(kinds[kind])) for name, kind in columns.items())])


def batch_message(schema: pa.Schema, step: int, columns: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """A step's batch as it stands in a stream."""
    import numpy as np
    import pyarrow as pa

    count = len(next(iter(columns.values())))
    arrays = [pa.array(np.full(count, step, np.int32))]
    for name, parts in columns.items():
        assert len(parts) == count, (name, len(parts), count)
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)]).astype(np.int32)
        values = np.concatenate(parts).astype(schema.field(name).type.value_type.to_pandas_dtype(), copy=False)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))
    sink = pa.BufferOutputStream()
    packing = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=LEVEL), use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=packing) as stream:
        stream.write_batch(pa.record_batch(arrays, schema=schema))
    whole, head = sink.getvalue().to_pybytes(), schema.serialize().to_pybytes()
    assert whole.startswith(head) and whole.endswith(END_OF_STREAM)
    return whole[len(head) : -len(END_OF_STREAM)]
