"""F17: files with a pickle, or with code, in every place where something of others' is read.

Each payload would write a file of its own, the canary. The control unpickles one in the open, so
that a canary is known to appear where code does run.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from security_stores import forged, push

from logitstore.containers.arrow_message import record_batch_ranges
from logitstore.containers.protocol import crc32c
from logitstore.store import Store

__all__ = ["pickles"]

_LIMIT_S = 300
# Teachers of one's own, beside which the hostile files lie.
_TEACHERS = """
import numpy as np, torch
class Words:
    vocab_size, bos_id = 260, 256
    def __call__(self, tokens, segment_ids):
        return torch.zeros(*tokens.shape, 260)
class Images:
    num_classes = 3
    def __call__(self, inputs):
        return torch.zeros(len(inputs), 3)
"""
_WORDS = (
    "--no-bos-check",
    "--teacher",
    "py:harmless:Words",
    "--signal",
    "topk:4",
    "--seq-len",
    "16",
)
_IMAGES = ("--task", "classification", "--teacher", "py:harmless:Images", "--signal", "dense")
_CLI = "import sys; from logitstore_cli.main import run; sys.exit(run(sys.argv[1:]))"


class _Payload:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return (eval, (f"open({self.canary!r}, 'w').close()",))


class Case:
    """A folder to make files in, and its canary."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.canary = folder, folder / "canary"
        self.file("harmless.py", _TEACHERS)
        self.code = f"open({str(self.canary)!r}, 'w').close()"
        self.pickle = pickle.dumps(_Payload(self.canary))

    def file(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    def objects(self) -> np.ndarray[Any, Any]:
        return np.array([_Payload(self.canary)] * 4, dtype=object)


_V2_ARRAY = {
    "zarr_format": 2,
    "shape": [1],
    "chunks": [1],
    "dtype": "|O",
    "order": "C",
    "fill_value": None,
    "compressor": None,
    "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}],
}
Words = list[str]
Read = Callable[[Case], Words]


def _capture(case: Case, *words: object) -> Words:
    out = ["--out", str(case.folder / "out"), "--progress", "none"]
    return ["precompute", *map(str, words), *out]


def _classify(case: Case, inputs: Path, *words: object) -> Words:
    return _capture(case, *_IMAGES, "--corpus", inputs, *words)


def _npy(case: Case) -> Words:
    np.save(case.folder / "images.npy", case.objects(), allow_pickle=True)
    return _classify(case, case.folder / "images.npy")


def _npz(case: Case) -> Words:
    np.savez(case.folder / "images.npz", inputs=case.objects(), labels=case.objects())
    return _classify(case, case.folder / "images.npz")


def _labels(case: Case) -> Words:
    np.save(case.folder / "images.npy", np.zeros((4, 3), np.float32))
    np.save(case.folder / "labels.npy", case.objects(), allow_pickle=True)
    return _classify(case, case.folder / "images.npy", "--labels", case.folder / "labels.npy")


def _pickled_corpus(suffix: str) -> Read:
    def make(case: Case) -> Words:
        corpus = case.file(f"corpus{suffix}", case.pickle)
        return _capture(case, *_WORDS, "--corpus", corpus)

    return make


def _parquet(case: Case) -> Words:
    """pandas' and Arrow's metadata, a pickle each, and a Python extension type."""
    meta = {b"pandas": case.pickle, b"ARROW:extension:name": b"arrow.py_extension_type"}
    meta[b"ARROW:extension:metadata"] = case.pickle
    field = pa.field("text", pa.string(), metadata=meta)
    table = pa.table([["one", "two"]], schema=pa.schema([field], metadata=meta))
    pq.write_table(table, case.folder / "corpus.parquet")
    return _capture(case, *_WORDS, "--corpus", case.folder / "corpus.parquet", "--text-key", "text")


def _model(name: str, *, torch: bool = False, auto_map: bool = False) -> Read:
    """A model folder that loads but for one file, which is a payload; weights in another form are
    there in place of safetensors."""

    def make(case: Case) -> Words:
        model = case.folder / "model"
        _tiny_model(model)
        if name in ("pytorch_model.bin", "model.pt"):
            (model / "model.safetensors").unlink()
        if auto_map:
            config = json.loads((model / "config.json").read_text())
            config |= {"model_type": "odd", "auto_map": {"AutoConfig": "modeling_odd.Config",
                       "AutoModelForCausalLM": "modeling_odd.Odd"}}  # fmt: skip
            case.file("model/config.json", json.dumps(config))
        if torch:
            import torch as library

            library.save({"w": _Payload(case.canary)}, model / name)
        else:
            case.file(f"model/{name}", case.code if name.endswith(".py") else case.pickle)
        corpus = case.file("corpus.txt", "some text, long enough\n" * 20)
        return _capture(
            case,
            "--teacher",
            f"hf:{model}",
            "--no-bos-check",
            "--corpus",
            corpus,
            "--signal",
            "topk:4",
            "--seq-len",
            16,
        )

    return make


@cache
def _saved_model() -> dict[str, bytes]:
    """Files of a model that loads in a moment: without it, nothing reaches the hostile file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({each: i for i, each in enumerate(["<s>", *letters])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        GPT2LMHeadModel(config).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _tiny_model(folder: Path) -> None:
    folder.mkdir()
    for name, data in _saved_model().items():
        (folder / name).write_bytes(data)


def _zarr_codec(version: int) -> Read:
    """The object of a shard names a codec that unpickles: Zarr v3 metadata, or a v2 array."""

    def make(case: Case) -> Words:
        def changed(data: bytes) -> bytes:
            out = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
                for entry in old.infolist():
                    body = old.read(entry)
                    if version == 3:
                        body = body.replace(b"numcodecs.pcodec", b"numcodecs.pickle")
                    new.writestr(entry, body)
                if version == 2:
                    new.writestr("tokens/.zarray", json.dumps(_V2_ARRAY))
                    new.writestr("tokens/0", case.pickle)
            return out.getvalue()

        place = push(case.folder / "store")
        forged(place, object_=changed)
        return ["verify", str(place), "--full"]

    return make


def _chunk_is_pickle(container: str) -> Read:
    """A chunk's bytes are a pickle, and every digest is right."""

    def make(case: Case) -> Words:
        place = push(case.folder / "store", container=container)

        def replaced(part: bytes, opened: Store) -> bytes:
            return case.pickle.ljust(len(part), b".")[: max(len(part), len(case.pickle))]

        forged(place, chunk=replaced)
        return ["inspect", str(place), "--sample", "0"]

    return make


def _extension_type(case: Case) -> Words:
    """An Arrow shard whose schema carries a Python extension type."""
    place = push(case.folder / "store", container="arrow")
    meta = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    meta[b"ARROW:extension:metadata"] = case.pickle
    made = io.BytesIO()

    def changed(data: bytes) -> bytes:
        with pa.ipc.open_file(data) as reader:
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            schema = pa.schema([field.with_metadata(meta) for field in reader.schema])
        with pa.ipc.new_file(made, schema) as writer:
            for batch in batches:
                writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=schema))
        return made.getvalue()

    def committed(body: dict[str, Any]) -> None:
        for row, (at, size) in zip(body["chunks"], record_batch_ranges(made), strict=True):
            row |= {"offset": at, "bytes": size, "crc32c": crc32c(made.getvalue()[at : at + size])}

    forged(place, object_=changed, commit=committed)
    return ["verify", str(place), "--full"]


def _document(name: str) -> Read:
    """A document is a pickle."""

    def make(case: Case) -> Words:
        place = push(case.folder / "store")
        path = next(place.glob(name))
        path.unlink()
        path.write_bytes(case.pickle)
        return ["inspect", str(place), "--sample", "0"]

    return make


def _teacher_of_header(case: Case) -> Words:
    """A header that names a function of ours as its teacher; an audit must not run it."""
    case.file("hostile_teacher.py", f"{case.code}\ndef f(*a, **k): {case.code}\n")
    place = push(case.folder / "store")
    forged(place, header=lambda body: body["teacher"].update(name="py:hostile_teacher:f"))
    return ["inspect", str(place), "--sample", "0"]


def _yaml(case: Case) -> Words:
    tag = f"!!python/object/apply:builtins.eval [{json.dumps(case.code)}]"
    return ["config", "show", "--config", str(case.file("server.yaml", f"port: {tag}\n"))]


def _keys(case: Case) -> Words:
    path = case.file("keys.json", case.pickle)
    path.chmod(0o600)
    return ["keys", "list", "--keys-file", str(path)]


def _get(path: str) -> Read:
    """A page or answer asked for with a payload in its address."""

    def make(case: Case) -> Words:
        place = push(case.folder / "store")
        text = base64.urlsafe_b64encode(case.pickle).decode().rstrip("=")
        return ["view", str(place), "--get", path.format(text=text, code=case.code)]

    return make


CASES: dict[str, Read] = {
    "npy of objects as inputs": _npy,
    "npz of objects as inputs": _npz,
    "npy of objects as labels": _labels,
    **{
        f"corpus that is a pickle, {s}": _pickled_corpus(s)
        for s in (".txt", ".jsonl", ".parquet", ".pkl", ".arrow", ".npy")
    },
    "Parquet with pickled pandas metadata and extension type": _parquet,
    "torch pytorch_model.bin": _model("pytorch_model.bin", torch=True),
    "torch model.pt": _model("model.pt", torch=True),
    "torch training_args.bin": _model("training_args.bin", torch=True),
    "plain pickle as pytorch_model.bin": _model("pytorch_model.bin"),
    "pickle as model.safetensors": _model("model.safetensors"),
    "pickle as tokenizer.json": _model("tokenizer.json"),
    "code beside the weights (auto_map)": _model("modeling_odd.py", auto_map=True),
    "Zarr v3 metadata with a pickle codec": _zarr_codec(3),
    "Zarr v2 array with a pickle filter": _zarr_codec(2),
    "zarr chunk that is a pickle": _chunk_is_pickle("zarr"),
    "arrow chunk that is a pickle": _chunk_is_pickle("arrow"),
    "Arrow Python extension type in a shard": _extension_type,
    **{
        f"pickle as {name}": _document(name)
        for name in ("store.json", "index.json", "plans/*", "commits/*", "tables/*")
    },
    "header that names a function": _teacher_of_header,
    "YAML settings with a Python tag": _yaml,
    "keys file that is a pickle": _keys,
    "template code in a search": _get("/stores/store/find?text={{{{{code}}}}}"),
    "pickle as a number": _get("/stores/store/find?token={text}"),
}


def pickles(folder: Path, *, tiny: bool) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    control = Case(folder / "control")
    # Our own bytes, to see that a canary appears.
    command = [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"]
    subprocess.run(command, input=control.pickle, check=True)
    if not control.canary.exists():
        raise SystemExit("the payload does not work, so nothing would be measured")
    chosen = ["zarr chunk that is a pickle"] if tiny else list(CASES)
    rows = []
    for number, name in enumerate(chosen):
        case = Case(folder / f"case-{number}")
        words = CASES[name](case)
        done = subprocess.run(
            [sys.executable, "-c", _CLI, *words],
            cwd=case.folder,
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
        told = (done.stderr or done.stdout).replace(str(case.folder), "...").strip().splitlines()
        rows.append(
            {
                "file": name,
                "read_by": words[0],
                "executed": case.canary.exists(),
                "exit": done.returncode,
                "traceback": "Traceback" in done.stderr,
                "said": next((line for line in told if "[" in line), "nothing")[:140],
            }
        )
    return {"tried": len(rows), "executed": sum(row["executed"] for row in rows), "rows": rows}
