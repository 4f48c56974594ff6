"""A reader of stores written from `schemas/format-v1.md` alone: nothing of logitstore is imported.

Whole objects are read through stock zarr-python and pyarrow; only checksums and slices are done by
hand. It proves that the page is enough, not that it is fast.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import zarr

FRAME = re.compile(rb'\{"sha256":"([0-9a-f]{64})","body":(.*)\}\n', re.DOTALL)
COMMIT = re.compile(r"([0-9]{4}-[0-9]{6})\.([1-9][0-9]*)\.json")

Columns = dict[str, np.ndarray]


def document(path: Path) -> tuple[dict[str, Any], str]:
    """Body and digest (section 3)."""
    match = FRAME.fullmatch(path.read_bytes())
    assert match, path
    digest = hashlib.sha256(match[2]).hexdigest()
    assert digest == match[1].decode(), path
    return json.loads(match[2]), digest


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class IndependentStore:
    """`samples` holds every sample's columns, in reading order (section 8)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header, header_sha256 = document(folder / "store.json")
        assert self.header["format"] == "logitstore"
        assert self.header["format_version"] == 1
        assert set(self.header["reader_features"]) <= {"pairs", "rank-ids"}
        configuration = hashlib.sha256(canonical(self.header["configuration"])).hexdigest()
        assert configuration == self.header["configuration_sha256"]
        for table in self.header["tables"]:
            data = (folder / "tables" / table["name"]).read_bytes()
            if table["name"] == "id-ranks.u32":
                self.id_of_rank = np.frombuffer(data, "<u4")
            assert len(data) == table["bytes"]
            assert hashlib.sha256(data).hexdigest() == table["sha256"]
        self.plans = [self._plan(path) for path in sorted((folder / "plans").iterdir())]
        self.sealed = (folder / "index.json").exists()
        commits = self._sealed(header_sha256) if self.sealed else self._listed()
        self.samples: list[Columns] = []
        for commit in commits:
            for columns in self._shard(commit):
                self.samples += self._split(columns)

    def _plan(self, path: Path) -> dict[str, Any]:
        plan, _ = document(path)
        assert plan["store_uuid"] == self.header["store_uuid"]
        assert int(path.stem) == plan["number"]
        named = ("configuration_sha256", "number", "corpus", "shards")
        decided = {"corpus": None, **{key: plan[key] for key in named if key in plan}}
        assert hashlib.sha256(canonical(decided)).hexdigest() == plan["fingerprint"]
        return plan

    def _sealed(self, header_sha256: str) -> list[dict[str, Any]]:
        index, _ = document(self.folder / "index.json")
        assert index["header_sha256"] == header_sha256
        commits = []
        for row in index["shards"]:
            path = self.folder / "commits" / f"{row['shard']}.{row['generation']}.json"
            commit, digest = document(path)
            assert digest == row["commit_sha256"]
            assert commit["object"] == {
                "name": row["object"],
                "bytes": row["object_bytes"],
                "sha256": row["object_sha256"],
            }
            commits.append(commit)
        return commits

    def _listed(self) -> list[dict[str, Any]]:
        highest: dict[str, int] = {}
        for path in (self.folder / "commits").iterdir():
            match = COMMIT.fullmatch(path.name)
            if match:
                highest[match[1]] = max(highest.get(match[1], 0), int(match[2]))
        names = [f"{shard}.{generation}.json" for shard, generation in sorted(highest.items())]
        return [document(self.folder / "commits" / name)[0] for name in names]

    def _shard(self, commit: dict[str, Any]) -> list[Columns]:
        """Columns of every chunk."""
        assert commit["store_uuid"] == self.header["store_uuid"]
        [plan] = [plan for plan in self.plans if plan["number"] == commit["plan"]]
        assert commit["plan_fingerprint"] == plan["fingerprint"]
        path = self.folder / "shards" / commit["object"]["name"]
        data = path.read_bytes()
        assert len(data) == commit["object"]["bytes"]
        assert hashlib.sha256(data).hexdigest() == commit["object"]["sha256"]
        for row in commit["chunks"]:
            part = data[row["offset"] : row["offset"] + row["bytes"]]
            assert google_crc32c.value(part) == row["crc32c"]
        read = self._zarr if self.header["container"] == "zarr" else self._arrow
        chunks = read(path, data, commit["chunks"])
        for row, columns in zip(commit["chunks"], chunks, strict=True):
            assert len(columns["sample_lengths"]) == row["samples"]
            assert columns["sample_lengths"].sum() == row["positions"]
        return chunks

    @property
    def _columns(self) -> list[dict[str, Any]]:
        return self.header["schema"]["columns"]

    @property
    def _groups(self) -> dict[str, dict[str, Any]]:
        return {group["name"]: group for group in self.header["schema"]["groups"]}

    def _zarr(self, path: Path, data: bytes, rows: list[dict[str, Any]]) -> list[Columns]:
        """Section 7.1."""
        del data
        merged = {g["id_column"]: g for g in self._groups.values() if "pairs" in g}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # numcodecs codecs in Zarr v3
            with zarr.storage.ZipStore(path, mode="r") as store:
                group = zarr.open_group(store, mode="r")
                arrays = {name: array[:] for name, array in group.arrays()}
        positions = next(
            arrays[c["name"]].shape[1]
            for c in self._columns
            if c["axis"] == "position" and c["name"] in arrays
        )
        chunks = []
        for number, row in enumerate(rows):
            used = {"sample": row["samples"], "position": row["positions"]}
            columns: Columns = {}
            order = {}
            for group in merged.values():
                used[group["name"]] = int(arrays[f"num_{group['pairs']}"][number])
                pairs = arrays[group["pairs"]][number][: used[group["name"]]]
                id_of, position = np.divmod(pairs, positions)
                id_of = self._ids(group["id_column"], id_of)
                order[group["name"]] = np.lexsort((id_of, position))
                columns[group["id_column"]] = id_of[order[group["name"]]]
                counts = np.bincount(position.astype(np.int64), minlength=row["positions"])
                columns[f"num_{group['name']}"] = counts
            for name, group in self._groups.items():
                if name not in used:
                    counts = arrays[f"num_{name}"][number][: used[group["owner"]]]
                    used[name] = int(counts.sum())
            for column in self._columns:
                name = column["name"]
                if name not in columns:
                    values = arrays[name][number][: used[column["axis"]]]
                    columns[name] = self._ids(name, values[order.get(column["axis"], slice(None))])
            chunks.append(columns)
        return chunks

    def _ids(self, name: str, values: np.ndarray) -> np.ndarray:
        """Section 9: ids of what may be ranks."""
        ranked = "rank-ids" in self.header["reader_features"]
        if not ranked or name not in ("ids", "head_ids", "tail_ids"):
            return values
        return self.id_of_rank[values]

    def _arrow(self, path: Path, data: bytes, rows: list[dict[str, Any]]) -> list[Columns]:
        """Section 7.2."""
        schema = pa.ipc.open_file(io.BytesIO(data)).schema
        chunks = []
        for row in rows:
            part = data[row["offset"] : row["offset"] + row["bytes"]]
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(part), schema)
            batch.validate(full=True)
            columns: Columns = {}
            for column in self._columns:
                if column["name"] not in batch.schema.names:
                    continue
                array = batch.column(column["name"])
                group = self._groups.get(column["axis"])
                if group is not None and group["text"]:
                    texts = [text.encode() for text in array.to_pylist()]
                    columns[f"num_{group['name']}"] = np.array([len(text) for text in texts])
                    columns[column["name"]] = np.frombuffer(b"".join(texts), np.uint8)
                    continue
                if column["axis"] == "position" or (group and group["owner"] == "position"):
                    array = array.flatten()
                if group is not None:
                    columns[f"num_{group['name']}"] = array.value_lengths().to_numpy()
                    array = array.flatten()
                length = len(array)
                for _ in column["inner"]:
                    array = array.flatten()
                values = array.to_numpy(zero_copy_only=False)
                columns[column["name"]] = values.reshape(length, *column["inner"])
            chunks.append(columns)
        return chunks

    def _split(self, columns: Columns) -> list[Columns]:
        """A chunk's samples (section 5)."""
        edges = {"position": np.cumsum([0, *columns["sample_lengths"]])}
        edges["sample"] = np.arange(len(columns["sample_lengths"]) + 1)
        for name, group in self._groups.items():
            ends = np.cumsum([0, *columns[f"num_{name}"]])
            edges[name] = ends[edges[group["owner"]]]
        return [
            {
                c["name"]: columns[c["name"]][edges[c["axis"]][i] : edges[c["axis"]][i + 1]]
                for c in self._columns
            }
            for i in range(len(columns["sample_lengths"]))
        ]
