"""The arrow container: read by other tools too, and hostile chunks are refused."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from logitstore.containers import container
from logitstore.record import Record
from logitstore.spec.errors import FormatError
from tests.container_contract import ContainerContract, chunk_bytes, recommitted
from tests.shard_records import SCHEMAS, random_record


class TestArrow(ContainerContract):
    name = "arrow"

    @pytest.fixture
    def file(self, tmp_path: Path) -> tuple[Path, list[Record]]:
        schema = SCHEMAS["threshold"]
        records = [random_record(schema, part, seed=20) for part in ([9, 30], [20, 3, 8])]
        data, _, _ = self.shard(schema, records)
        path = tmp_path / "shard.arrow"
        path.write_bytes(data)
        return path, records

    def test_stock_pyarrow_polars_pandas_duckdb_and_datasets_read_it(
        self, file: tuple[Path, list[Record]]
    ) -> None:
        import datasets
        import duckdb
        import polars

        path, records = file
        shard = pa.ipc.open_file(path).read_all()
        shard.validate(full=True)
        last = records[-1]
        tokens = last.sample(2)["tokens"].tolist()
        counts = last.sample(2)["num_tail"].tolist()
        keys = [key for record in records for key in record.sample_keys()]
        assert shard.column("sample_key").to_pylist() == keys
        assert shard.column("tokens")[4].as_py() == tokens
        assert [len(ids) for ids in shard.column("tail_ids")[4].as_py()] == counts
        logprobs = shard.column("head_logprobs")[4].as_py()

        frame = polars.read_ipc(path)
        assert frame["tokens"][4].to_list() == tokens
        assert frame["head_logprobs"][4].to_list() == logprobs
        pandas_frame = shard.to_pandas()
        assert pandas_frame["tokens"][4].tolist() == tokens
        # DuckDB knows no half floats: they are widened on the way in.
        single = pa.schema(
            [
                pa.field(f.name, pa.list_(pa.list_(pa.float32())))
                if f.name == "head_logprobs"
                else pa.field(f.name, pa.list_(pa.float32()))
                if f.name == "label_logprob"
                else f
                for f in shard.schema
            ]
        )
        with duckdb.connect() as connection:
            connection.register("shard", shard.cast(single))
            [row] = connection.sql(
                "select tokens, len(tail_ids), sample_key, head_logprobs from shard offset 4"
            ).fetchall()
        assert list(row[0]) == tokens
        assert row[1:3] == (len(tokens), keys[4])
        assert [list(part) for part in row[3]] == logprobs
        dataset = datasets.Dataset(shard)
        assert dataset[4]["tokens"] == tokens

    def test_arrays_are_views_of_the_range(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30], seed=21)])
        part = np.frombuffer(chunk_bytes(data, commit, 0), np.uint8)
        got = container("arrow").decode(part.data, head, commit, 0)
        for name in ("tokens", "ids", "logprobs", "lse"):
            assert np.shares_memory(got[name], part), name
            assert not got[name].flags.writeable

    def test_compressed_batches_are_refused_before_they_are_inflated(self) -> None:
        schema = SCHEMAS["fixed-k"]
        record = random_record(schema, [30], seed=22)
        data, commit, head = self.shard(schema, [record])
        batch = pa.ipc.open_file(data).get_batch(0)
        for codec in ("zstd", "lz4"):
            options = pa.ipc.IpcWriteOptions(compression=codec)
            stream = io.BytesIO()
            with pa.ipc.new_stream(stream, batch.schema, options=options) as writer:
                writer.write_batch(batch)
            part = stream.getvalue()[batch.schema.serialize().size : -8]
            with pytest.raises(FormatError, match="compressed"):
                container("arrow").decode(part, head, recommitted(commit, 0, part), 0)

    def test_a_footer_that_points_elsewhere_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        records = [random_record(schema, [8, 8], seed=i) for i in range(2)]
        data, commit, head = self.shard(schema, records)
        first, second = (struct.pack("<q", row.offset) for row in commit.chunks)
        footer = data.rindex(second)
        swapped = data[:footer] + first + data[footer + 8 :]
        with pytest.raises(FormatError, match="footer"):
            container("arrow").validate_object(io.BytesIO(swapped), head, commit)

    def test_an_offset_that_points_outside_is_refused(self) -> None:
        schema = SCHEMAS["fixed-k"]
        data, commit, head = self.shard(schema, [random_record(schema, [30, 5], seed=23)])
        part = bytes(chunk_bytes(data, commit, 0))
        offsets = struct.pack("<3i", 0, 30, 35)
        assert offsets in part
        hostile = part.replace(offsets, struct.pack("<3i", 0, 2_000_000_000, 35))
        with pytest.raises(FormatError, match="chunk-malformed"):
            container("arrow").decode(hostile, head, recommitted(commit, 0, hostile), 0)
