"""A dataset in a bucket: the same batches as from a disk, and no worker that hangs after a fork."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.utils.data import DataLoader

from logitstore.data import LogitDataset, collate, loader
from logitstore.spec.errors import StorageError
from tests.data_stores import make_store, random_samples

# The server runs in a thread of this process, which the forked children never use.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import boto3
    from botocore.config import Config
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket="data")
    client.close()
    yield "s3://data/store"
    server.stop()


def test_a_bucket_gives_the_batches_of_a_disk_and_names_a_fork(bucket, tmp_path):
    samples = random_samples(30)
    make_store(tmp_path, samples, shards=2).close()
    make_store(bucket, samples, shards=2).close()
    expected = [b.sample_keys for b in loader(LogitDataset(tmp_path, shuffle=True), 7)]

    dataset = LogitDataset(bucket, shuffle=True)
    state = None
    for num_workers in (0, 2):  # the loader chooses how workers are started
        one = loader(dataset, 7, num_workers=num_workers)
        one.set_epoch(0)
        batches = list(one)
        assert [b.sample_keys for b in batches] == expected
        state = batches[1].state
    one.load_state_dict(state)
    assert [b.sample_keys for b in one] == expected[2:]

    dataset.set_epoch(0)
    fresh = LogitDataset(bucket, shuffle=True)  # nothing is cached that a child could inherit
    with pytest.raises(StorageError, match="fork-unsafe"):
        list(loader(fresh, 7, num_workers=1, multiprocessing_context="fork"))
    plain = DataLoader(
        fresh, batch_size=7, collate_fn=collate, num_workers=1, multiprocessing_context="fork"
    )
    with pytest.raises(RuntimeError, match="fork-unsafe"):
        list(plain)
