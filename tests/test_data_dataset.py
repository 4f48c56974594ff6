"""LogitDataset on real stores: order, ranks, selection, columns, checks at opening."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import logitstore.store
from logitstore.data import LogitDataset, collate
from logitstore.record.selection import in_holdout
from logitstore.spec.errors import AlignmentError, FormatError, NotFoundError, UsageError
from logitstore.spec.header import TokenizerInfo
from logitstore.spec.tokenizer_table import TOKENIZER_TABLE, TokenizerTable
from logitstore.store import Store
from tests.data_stores import Sample, likely_samples, make_header, make_store, random_samples

SAMPLES = random_samples(61)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    location = tmp_path_factory.mktemp("dataset") / "store"
    make_store(location, SAMPLES, shards=5).close()
    return location


def keys(dataset: LogitDataset) -> list[str]:
    return [dataset[i].sample_key for i in range(len(dataset))]


def key_list(samples: list[Sample]) -> list[str]:
    return [s.key for s in samples]


@pytest.mark.parametrize("container", ["zarr", "arrow"])
@pytest.mark.parametrize("signal", ["topk:8", "topk:12,p=0.9", "topk:8,coding=q8"])
def test_storage_order_gives_back_what_was_written(tmp_path, container, signal):
    header = make_header(signal, container=container)
    make_store(tmp_path, SAMPLES, header=header).close()
    with LogitDataset(tmp_path) as dataset:
        assert len(dataset) == len(SAMPLES)
        for item, sample in zip(dataset, SAMPLES, strict=True):
            assert item.sample_key == sample.key
            assert item.tokens.tolist() == sample.tokens
            assert item.segment_ids.tolist() == sample.segments
            assert item.labels.tolist() == [t if t >= 0 else -100 for t in sample.labels()]
            assert item.targets.ids.shape[0] == len(sample.tokens)
        assert dataset[-1].sample_key == SAMPLES[-1].key


def test_a_place_beyond_the_end_is_an_error_with_a_name(folder):
    dataset = LogitDataset(folder)
    with pytest.raises(NotFoundError, match="sample-out-of-range"):
        dataset[len(dataset)]
    with pytest.raises(IndexError):
        dataset[-len(dataset) - 1]


def test_shuffle_is_deterministic_and_changes_by_epoch(folder):
    dataset = LogitDataset(folder, shuffle=True, seed=3)
    first = keys(dataset)
    assert sorted(first) == sorted(key_list(SAMPLES))
    assert first != key_list(SAMPLES)
    assert keys(LogitDataset(folder, shuffle=True, seed=3)) == first
    assert keys(LogitDataset(folder, shuffle=True, seed=4)) != first
    dataset.set_epoch(1)
    second = keys(dataset)
    assert second != first
    assert sorted(second) == sorted(first)
    assert keys(LogitDataset(folder, shuffle=True, seed=3, epoch=1)) == second


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_share_the_epoch(folder, world_size):
    parts = [
        keys(LogitDataset(folder, shuffle=True, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    together = [key for part in parts for key in part]
    assert len(together) == len(set(together)) == len(SAMPLES)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_rank_comes_from_torch_distributed(folder, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        dataset = LogitDataset(folder)
        assert (dataset.rank, dataset.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UsageError, match="bad-argument"):
        LogitDataset(folder, rank=1)


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "spawn")])
def test_a_plain_dataloader_gives_each_sample_once(folder, workers, start):
    dataset = LogitDataset(folder, shuffle=True)
    loader = DataLoader(
        dataset,
        batch_size=7,
        collate_fn=collate,
        num_workers=workers,
        multiprocessing_context=start,
        persistent_workers=workers > 0,
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)  # persistent workers must see it
        got = [key for batch in loader for key in batch.sample_keys]
        assert got == keys(dataset)
        assert sorted(got) == sorted(key_list(SAMPLES))


def test_batches_of_k_are_those_of_a_store_of_k(folder, tmp_path):
    make_store(tmp_path, SAMPLES, header=make_header("topk:3")).close()
    of_eight = collate([*LogitDataset(folder, k=3)])
    of_three = collate([*LogitDataset(tmp_path)])
    assert of_eight.targets.ids.equal(of_three.targets.ids)
    assert of_eight.targets.logprobs.equal(of_three.targets.logprobs)
    torch.testing.assert_close(
        of_eight.targets.log_tail, of_three.targets.log_tail, atol=5e-3, rtol=1e-3
    )
    with pytest.raises(UsageError, match="1 to 8"):
        LogitDataset(folder, k=9)


def test_columns_are_the_aux_fields_to_read(folder):
    item = LogitDataset(folder, columns=["entropy"])[0]
    assert item.targets.entropy is not None
    assert item.targets.lse is None
    assert item.targets.label_rank is None
    assert item.tokens is not None
    with pytest.raises(UsageError, match="unknown-aux"):
        LogitDataset(folder, columns=["entropi"])


# selection


def test_holdout_is_a_function_of_the_key(folder):
    train = LogitDataset(folder, holdout=0.3)
    validation = LogitDataset(folder, holdout=0.3, split="validation", seed=9)
    expected = [s.key for s in SAMPLES if in_holdout(s.key, 0.3)]
    assert keys(validation) == expected
    assert 8 < len(expected) < 30
    assert sorted(keys(train) + expected) == sorted(key_list(SAMPLES))
    # A larger share only adds to the validation split.
    assert set(expected) < set(keys(LogitDataset(folder, holdout=0.6, split="validation")))
    with pytest.raises(UsageError, match="holdout above 0"):
        LogitDataset(folder, split="validation")


def counted(sample: Sample) -> int:
    return sum(label >= 0 for label in sample.labels())


@pytest.mark.parametrize(
    ("conditions", "keeps"),
    [
        ([("length", ">=", 10)], lambda s, i: len(s.tokens) >= 10),
        ([("labels", "<", 5)], lambda s, i: counted(s) < 5),
        (
            [("labels", "!=", 4), ("length", "<=", 9)],
            lambda s, i: counted(s) != 4 and len(s.tokens) <= 9,
        ),
        (
            [("sample_key", "in", ["text0#3@0", "text0#5@0"])],
            lambda s, i: s.key in ("text0#3@0", "text0#5@0"),
        ),
        ([("sample_key", "!=", "text0#3@0")], lambda s, i: s.key != "text0#3@0"),
        (
            [("entropy.mean", ">", 2.0)],
            lambda s, i: counted(s) and values_of(i, "entropy").mean() > 2.0,
        ),
        (
            [("label_logprob.min", ">", -6.0)],
            lambda s, i: counted(s) and values_of(i, "label_logprob").min() > -6.0,
        ),
        (
            [("label_rank.max", "<=", 20)],
            lambda s, i: counted(s) and values_of(i, "label_rank").max() <= 20,
        ),
    ],
)
def test_filter_conditions(folder, conditions, keeps):
    everything = list(LogitDataset(folder))
    expected = [s.key for s, item in zip(SAMPLES, everything, strict=True) if keeps(s, item)]
    assert 0 < len(expected) < len(SAMPLES)
    assert keys(LogitDataset(folder, filter=conditions)) == expected


def values_of(item, name: str) -> np.ndarray:
    return getattr(item.targets, name)[item.loss_mask].double().numpy()


@pytest.mark.parametrize(
    "condition",
    [
        ("entropi.mean", ">", 1),
        ("entropy", ">", 1),
        ("entropy.mean", "=>", 1),
        ("entropy.mean", ">", "1"),
        ("length", "in", 3),
        ("sample_key", "==", 3),
        ("length", ">"),
        "length > 3",
        ("label", "==", 1),
    ],
)
def test_a_bad_condition_is_named(folder, condition):
    with pytest.raises(UsageError, match="bad-argument"):
        LogitDataset(folder, filter=[condition])


def test_max_samples_are_the_first_selected(folder):
    long = [s.key for s in SAMPLES if len(s.tokens) >= 10]
    limits = {"max_samples": 7, "filter": [("length", ">=", 10)]}
    assert keys(LogitDataset(folder, **limits)) == long[:7]
    assert sorted(keys(LogitDataset(folder, shuffle=True, **limits))) == sorted(long[:7])


def test_nothing_left_is_refused(folder):
    with pytest.raises(UsageError, match="fewer samples than ranks"):
        LogitDataset(folder, filter=[("length", ">", 1000)])
    with pytest.raises(UsageError, match="fewer samples than ranks"):
        LogitDataset(folder, max_samples=3, rank=0, world_size=4)


def test_classification_store(tmp_path):
    header = make_header(sample_kind="classification", aux=("entropy",))
    samples = [Sample(f"image{i}", [i % 40], label=i % 10) for i in range(50)]
    make_store(tmp_path, samples, header=header).close()
    dataset = LogitDataset(tmp_path, filter=[("label", "in", [1, 2])])
    batch = next(iter(DataLoader(dataset, batch_size=10, collate_fn=collate)))
    assert batch.labels.tolist() == [1, 2] * 5
    assert batch.targets.ids.shape == (10, 8)
    assert batch.tokens is None


# what opening refuses


SIGNALS = [
    "topk:8",
    "topk:8,coding=q8",
    "topk:12,p=0.9",
    "topk:2",
    "topk:40",
    "sampled:50",
    "sampled:50,power=0.8",
    "threshold:tau=1/40",
    "threshold:k=6",
    "dense",
]


@pytest.mark.parametrize("signal", SIGNALS)
def test_a_sound_store_is_accepted(tmp_path, signal):
    make_store(tmp_path / "likely", likely_samples(60), header=make_header(signal)).close()
    LogitDataset(tmp_path / "likely")
    # A teacher that cannot predict its text is no sign of a shift.
    make_store(tmp_path / "random", SAMPLES, header=make_header(signal)).close()
    LogitDataset(tmp_path / "random")


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("signal", SIGNALS)
def test_logits_given_one_position_off_are_refused(tmp_path, signal, shift):
    """Everything stored agrees with itself; only the text tells."""
    header = make_header(signal, chunk_positions=1024)
    make_store(tmp_path, likely_samples(200), header=header, shift=shift).close()
    with pytest.raises(AlignmentError, match="tokens are expected better"):
        LogitDataset(tmp_path)


@pytest.mark.parametrize("shift", [1, -1])
@pytest.mark.parametrize("signal", ["topk:8", "topk:8,coding=q8", "topk:2", "sampled:50", "dense"])
def test_columns_that_slipped_against_each_other_are_refused(tmp_path, monkeypatch, signal, shift):
    import tests.data_stores as stores

    plain = stores.make_record

    def slipped(header, samples, **options):
        """The signal of one row beside the label_logprob of another."""
        right, wrong = (plain(header, samples, shift=by) for by in (0, shift))
        wrong.arrays["label_logprob"] = right["label_logprob"]
        return wrong

    monkeypatch.setattr(stores, "make_record", slipped)
    header = make_header(signal, chunk_positions=1024)
    make_store(tmp_path, likely_samples(200), header=header).close()
    with pytest.raises(AlignmentError, match="label_logprob"):
        LogitDataset(tmp_path)


@pytest.mark.parametrize(
    "signal",
    ["topk:8", "topk:12,p=0.9", "topk:2", "topk:40", "sampled:50", "threshold:tau=1/40", "dense"],
)
def test_tokens_that_slipped_are_refused_for_any_text(tmp_path, monkeypatch, signal):
    """Even where the teacher cannot predict the text: label_logprob is of another token."""
    import tests.data_stores as stores

    plain = stores.make_record

    def slipped(header, samples, **options):
        record = plain(header, samples, **options)
        record.arrays["tokens"] = np.roll(record["tokens"], 1)
        return record

    monkeypatch.setattr(stores, "make_record", slipped)
    samples = random_samples(400, seed=4)
    header = make_header(signal, chunk_positions=1024)
    make_store(tmp_path, samples, header=header, shards=2).close()
    with pytest.raises(AlignmentError, match="label_logprob"):
        LogitDataset(tmp_path)


def table(*tokens: str) -> TokenizerTable:
    return TokenizerTable(tuple(t.encode() for t in tokens))


@pytest.fixture
def named(tmp_path) -> tuple[Path, TokenizerTable]:
    teacher = table(*(f"t{i}" for i in range(40)))
    info = TokenizerInfo(
        name="teacher", fingerprint=teacher.fingerprint, size=40, bos="none", table=TOKENIZER_TABLE
    )
    make_store(
        tmp_path / "named",
        SAMPLES,
        header=make_header(tokenizer=info),
        tables={TOKENIZER_TABLE: teacher.encode()},
    ).close()
    return tmp_path / "named", teacher


def test_the_same_tokenizer_and_an_extended_one_are_accepted(named):
    location, teacher = named
    LogitDataset(location, tokenizer=teacher)
    extended = TokenizerTable((*teacher.tokens, b"<new>"), frozenset({40}))
    LogitDataset(location, tokenizer=extended)


@pytest.mark.parametrize("change", ["other", "shorter"])
def test_another_tokenizer_is_refused_with_both_fingerprints(named, change):
    location, teacher = named
    tokens = list(teacher.tokens)
    if change == "other":
        tokens[17] = b"else"
    else:
        tokens.pop()
    student = TokenizerTable(tuple(tokens))
    with pytest.raises(AlignmentError, match="tokenizer-mismatch") as caught:
        LogitDataset(location, tokenizer=student)
    assert student.fingerprint in str(caught.value)
    assert teacher.fingerprint in str(caught.value)
    assert ("id 17" if change == "other" else "from 39 on") in str(caught.value)


def test_a_store_without_a_tokenizer_cannot_vouch_for_one(folder):
    with pytest.raises(AlignmentError, match="tokenizer-mismatch"):
        LogitDataset(folder, tokenizer=table("a"))


def test_a_transformers_tokenizer_is_compared_by_content(tiny_lm_dir, tmp_path):
    from transformers import AutoTokenizer

    from logitstore.spec.tokenizer_pieces import table_of

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    content = table_of(tokenizer.backend_tokenizer)
    info = TokenizerInfo(
        name="tiny", fingerprint=content.fingerprint, size=320, bos="none", table=TOKENIZER_TABLE
    )
    header = make_header(vocab_size=320, tokenizer=info)
    samples = random_samples(10, vocab_size=320)
    tables = {TOKENIZER_TABLE: content.encode()}
    make_store(tmp_path, samples, header=header, tables=tables).close()
    LogitDataset(tmp_path, tokenizer=tokenizer)
    tokenizer.add_tokens(["<extra>"])
    LogitDataset(tmp_path, tokenizer=tokenizer)


# the store underneath


def test_an_open_store_is_taken_with_its_snapshot(folder):
    with logitstore.store.open(folder) as store:
        with LogitDataset(store) as dataset:
            assert len(dataset) == len(SAMPLES)
        assert isinstance(store, Store)
        store.read_chunk(0, 0)  # still open: it belongs to the caller


def test_chunks_are_decoded_once_for_an_epoch(folder, monkeypatch):
    reads = []
    plain = Store.read_chunk

    def counting(self, shard, chunk, columns=None):
        reads.append((shard, chunk))
        return plain(self, shard, chunk, columns)

    dataset = LogitDataset(folder, shuffle=True)
    monkeypatch.setattr(Store, "read_chunk", counting)
    keys(dataset)
    assert (
        len(reads) == len(set(reads)) == sum(len(dataset.store.commit(i).chunks) for i in range(5))
    )
    # A cache that holds one chunk reads the same samples, only more often.
    small = LogitDataset(folder, shuffle=True, cache_bytes=0)
    before = len(reads)
    assert keys(small) == keys(dataset)
    assert len(reads) - before > len(set(reads))


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1},
        {"epoch": -1},
        {"tail": "pad"},
        {"holdout": 1.0},
        {"split": "test"},
        {"max_samples": 0},
        {"rank": 2, "world_size": 2},
        {"rank": 0},
    ],
)
def test_bad_arguments_are_named(folder, arguments):
    with pytest.raises(UsageError, match="bad-argument"):
        LogitDataset(folder, **arguments)


def test_not_a_store(tmp_path):
    with pytest.raises((NotFoundError, FormatError), match="not-a-store"):
        LogitDataset(tmp_path / "nothing")
