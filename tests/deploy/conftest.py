"""A private and a public store, and keys for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from logitstore_server.keys import create_key
from logitstore_server.settings import StoreEntry
from tests.data_stores import make_store, random_samples


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores `private` and `open`."""
    folder = tmp_path_factory.mktemp("deployed")
    for seed, name in enumerate(["private", "open"]):
        make_store(folder / name, random_samples(24, seed=seed), shards=2).close()
    return folder


@pytest.fixture(scope="session")
def entries(stores: Path) -> tuple[StoreEntry, ...]:
    return tuple(
        StoreEntry(name=name, location=str(stores / name), public=name == "open")
        for name in ["private", "open"]
    )


@pytest.fixture(scope="session")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="session")
def reader_key(keys_file: Path) -> str:
    """May read every store."""
    return create_key(keys_file, label="reader", stores=("*",), metrics=False, expires=None)[0]


@pytest.fixture(scope="session")
def metrics_key(keys_file: Path) -> str:
    """May read /metrics."""
    return create_key(keys_file, label="scraper", stores=(), metrics=True, expires=None)[0]
