"""Files to documents to plan units: exact places, strict reading, errors that say where."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitstore.corpora import Corpus, Document, describe_files, find_files, plan_units
from logitstore.spec.errors import CorpusError, NotFoundError, UsageError


def write(folder: Path, **files: str | bytes) -> list[str]:
    out = []
    for name, content in files.items():
        path = folder / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        out.append(str(path))
    return out


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def test_a_text_file_is_one_document_with_its_newlines_untouched(tmp_path):
    files = find_files(write(tmp_path, a_txt="one\r\ntwo\n", b_txt="drei\n"))
    corpus = Corpus(files)
    documents = list(corpus.documents())
    assert [d.text for d in documents] == ["one\r\ntwo\n", "drei\n"]
    assert [d.key for d in documents] == ["a.txt#0", "b.txt#0"]


def test_separators_split_text_and_are_dropped(tmp_path):
    files = find_files(write(tmp_path, a_txt="ä--b----c--"))
    documents = list(Corpus(files, document_separator="--").documents())
    assert [(d.number, d.text, d.offset) for d in documents] == [
        (0, "ä", 0),
        (1, "b", 4),
        (2, "", 7),
        (3, "c", 9),
    ]


@given(
    pieces=st.lists(st.text(alphabet="aé\n-", max_size=6), min_size=1, max_size=20),
    block=st.integers(1, 9),
)
def test_separators_are_found_across_read_blocks(tmp_path_factory, pieces, block):
    """The same pieces as `str.split`, however the file is cut into blocks."""
    import logitstore.corpora.documents as module

    text = "--".join(pieces)
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    previous = module._BLOCK_BYTES
    module._BLOCK_BYTES = block
    try:
        found = texts(Corpus(find_files([str(path)]), document_separator="--"))
    finally:
        module._BLOCK_BYTES = previous
    expected = text.split("--")
    assert found == (expected if expected[-1] else expected[:-1])


def test_names_are_below_the_shared_folder(tmp_path):
    for name in ("x/index.txt", "y/z/index.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(name)
    files = find_files([str(tmp_path / "**" / "*.txt")])
    assert [f.name for f in files] == ["x/index.txt", "y/z/index.txt"]


def test_patterns_are_sorted_and_a_file_named_twice_counts_once(tmp_path):
    write(tmp_path, b_txt="b", a_txt="a")
    files = find_files([str(tmp_path / "b.txt"), str(tmp_path / "*.txt")])
    assert [f.name for f in files] == ["b.txt", "a.txt"]


def test_a_name_with_brackets_is_a_name(tmp_path):
    (tmp_path / "notes [1].txt").write_text("x")
    assert find_files([str(tmp_path / "notes [1].txt")])[0].name == "notes [1].txt"


def test_jsonl_rows_are_numbered_by_line(tmp_path):
    rows = '{"text": "a"}\n\n{"text": "c\\u0000", "n": 1}'
    documents = list(Corpus(find_files(write(tmp_path, a_jsonl=rows))).documents())
    assert [(d.number, d.text) for d in documents] == [(0, "a"), (1, ""), (2, "c\0")]


def test_parquet_rows_and_spans_over_row_groups(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": [f"row {i} ü" for i in range(25)], "n": list(range(25))})
    pq.write_table(table, path, row_group_size=7)
    corpus = Corpus(find_files([str(path)]), text_key="body")
    documents = list(corpus.documents())
    assert [d.text for d in documents] == [f"row {i} ü" for i in range(25)]
    units = list(plan_units(documents, unit_tokens=4, tokens_of=lambda d: 1.0))
    again = [d for unit in units for span in unit.spans for d in corpus.span(span)]
    assert again == documents


@pytest.mark.parametrize(
    ("name", "content", "options", "kind", "says"),
    [
        ("a.txt", b"abc\xff\xfe", {}, "corpus-not-utf8", "byte 3"),
        (
            "a.txt",
            b"ok\n\n\xc3\xa9\nbad \xe9",
            {"document_separator": "\n"},
            "corpus-not-utf8",
            "byte 11",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', {}, "corpus-missing-key", "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', {}, "corpus-missing-key", "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', {}, "corpus-malformed", "int"),
        ("a.jsonl", b'{"text": "a"\n', {}, "corpus-malformed", "line 1"),
        ("a.jsonl", b'["text"]\n', {}, "corpus-malformed", "list"),
        ("a.jsonl", b'{"text": "\xff"}\n', {}, "corpus-not-utf8", "byte 10"),
        ("a.jsonl", b"[" * 100_000, {}, "corpus-malformed", "line 1"),
        ("a.parquet", b"PAR1 no", {}, "corpus-malformed", "a.parquet"),
    ],
)
def test_bad_files_are_refused_with_their_place(tmp_path, name, content, options, kind, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        texts(Corpus(find_files([str(path)]), **options))
    assert caught.value.kind == kind
    assert says in caught.value.message


def test_a_parquet_file_without_the_key_or_with_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(CorpusError, match="row 1") as caught:
        texts(Corpus(find_files([str(path)])))
    assert caught.value.kind == "corpus-missing-key"
    with pytest.raises(CorpusError, match="body") as caught:
        texts(Corpus(find_files([str(path)]), text_key="body"))
    assert caught.value.kind == "corpus-missing-key"


def test_missing_files_folders_and_mixed_formats(tmp_path):
    with pytest.raises(NotFoundError) as missing:
        find_files([str(tmp_path / "none.txt")])
    assert missing.value.kind == "file-not-found"
    with pytest.raises(UsageError, match="this is a folder"):
        find_files([str(tmp_path)])
    names = write(tmp_path, a_txt="a", b_jsonl="{}")
    with pytest.raises(UsageError, match="one format"):
        Corpus(find_files(names))
    with pytest.raises(UsageError, match="--text-key"):
        Corpus(find_files(names[:1]), text_key="x")
    with pytest.raises(UsageError, match="--document-separator"):
        Corpus(find_files(names[1:]), document_separator="x")


def test_a_changed_corpus_is_refused_by_name(tmp_path):
    names = write(tmp_path, a_txt="a", b_txt="b", c_txt="c")
    corpus = Corpus(find_files(names))
    planned = describe_files(corpus.files, 3)
    (tmp_path / "b.txt").write_text("B")
    found = describe_files(find_files([*names[:2]]), 2)
    with pytest.raises(CorpusError) as caught:
        corpus.check_unchanged(planned, found)
    assert caught.value.data["changes"] == ["b.txt: content changed", "c.txt: missing"]
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    with pytest.raises(CorpusError, match="while the capture was running"):
        texts(corpus)


def test_the_fingerprint_is_of_content_and_names_not_of_the_folder(tmp_path):
    prints = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        names = write(tmp_path / folder, a_txt="a", b_txt="b")
        prints.append(describe_files(find_files(names), 2).fingerprint)
    assert prints[0] == prints[1]
    reverse = describe_files(find_files(names[::-1]), 2).fingerprint
    assert reverse != prints[0]


@given(
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5),
    unit_tokens=st.integers(1, 30),
    max_tokens=st.none() | st.integers(1, 60),
)
def test_units_cover_every_document_once_and_in_order(sizes, unit_tokens, max_tokens):
    """Spans give back the documents in order; units reach their size; a limit is met exactly."""
    documents = [
        Document(file, number, f"{file}#{number}", "x" * size)
        for file, file_sizes in enumerate(sizes)
        for number, size in enumerate(file_sizes)
    ]
    units = list(
        plan_units(
            documents,
            unit_tokens=unit_tokens,
            tokens_of=lambda d: len(d.text),
            max_tokens=max_tokens,
        )
    )
    covered = [
        (span.file, span.first_document + i)
        for unit in units
        for span in unit.spans
        for i in range(span.documents)
    ]
    assert covered == [(d.file, d.number) for d in documents[: len(covered)]]
    total = sum(len(d.text) for d in documents)
    assert sum(unit.tokens for unit in units) == min(total, max_tokens or total)
    assert all(unit.tokens >= unit_tokens for unit in units[:-1])
    assert all(unit.max_tokens is None for unit in units[:-1])


def test_jsonl_spans_start_at_their_byte(tmp_path):
    rows = "".join(json.dumps({"text": f"té {i}"}) + "\n" for i in range(50))
    corpus = Corpus(find_files(write(tmp_path, a_jsonl=rows, b_jsonl=rows)))
    documents = list(corpus.documents())
    units = list(plan_units(documents, unit_tokens=7, tokens_of=lambda d: 1.0))
    again = [d for unit in units for span in unit.spans for d in corpus.span(span)]
    assert again == documents
    assert any(len(unit.spans) == 2 for unit in units)
