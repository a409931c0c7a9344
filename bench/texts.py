"""Collect the texts that the benchmarks read: manuals from Debian, and Python's own sources.

Debian's ``linux-doc-6.1`` and ``python3.11-doc`` hold the manuals, ``debian-reference-de``, ``-es`` and
``-fr`` a book in other languages. No text is both trained and tested on, and nothing Italian or Chinese is
trained on::

    python bench/texts.py /usr/share/doc/linux-doc-6.1/Documentation \\
        /usr/share/doc/python3.11/html/_sources /usr/lib/python3.11 \\
        --reference /usr/share/debian-reference --out texts

Without ``--reference``, ``train-mix`` and ``valid-mix`` are left out: other kinds of text than manuals, which
the language-model benchmarks also train on.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated

import typer

# Where a sequence of 128k tokens is cut from a text, more characters are kept.
SHORT, LONG = 220_000, 800_000
TRAIN = (
    "admin-guide", "networking", "driver-api", "userspace-api", "filesystems", "trace",
    "process", "RCU", "sound", "core-api", "scsi", "x86",
)  # fmt: skip
TRAIN_LONG = TRAIN[:3]
VALID = ("hwmon", "dev-tools")
MIX = {"packages": ("email", "unittest"), "languages": ("de", "fr")}
MIX_VALID = {"packages": ("http",), "languages": ("es",)}
"""Packages of Python's sources and languages of the book, all others than those tested on."""
KERNEL_TEST, PYTHON_TEST = ("virt", "gpu"), ("library", "c-api")

Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False)]


def collect(folder: Path, suffixes: tuple[str, ...], limit: int) -> str:
    """Return the texts under `folder`, or the one that it is, in order of name, up to `limit` characters."""
    parts, size = [], 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        if set(suffixes) & set(path.suffixes) and path.is_file() and size < limit:
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", errors="ignore") as file:
                parts.append(file.read())
            size += len(parts[-1]) + 2
    return "\n\n".join(parts)[:limit]


def main(
    kernel: Folder,
    python: Folder,
    sources: Folder,
    reference: Annotated[Path | None, typer.Option(exists=True, file_okay=False)] = None,
    out: Path = Path("texts"),
) -> None:
    """Write ``OUT/PART/NAME.txt.gz``; parts are those of `wanted`, before the slash."""
    rst = (".rst", ".txt")
    wanted = {
        **{f"train/{name}": (kernel / name, rst, SHORT) for name in TRAIN},
        **{f"valid/{name}": (kernel / name, rst, SHORT) for name in VALID},
        "valid-short/usb": (kernel / "usb", rst, SHORT),
        "valid-short/python-logging": (sources / "logging", (".py",), SHORT),
        **{f"test/{name}": (kernel / name, rst, SHORT) for name in KERNEL_TEST},
        **{f"test/python-{name}": (python / name, rst, SHORT) for name in PYTHON_TEST},
        **{f"train-long/{name}": (kernel / name, rst, LONG) for name in TRAIN_LONG},
        "test-long/virt": (kernel / "virt", rst, LONG),
        "test-long/python-library": (python / "library", rst, LONG),
        "shift/python-sources": (sources, (".py",), SHORT),
        "shift/italian": (kernel / "translations" / "it_IT", rst, SHORT),
        "shift/chinese": (kernel / "translations" / "zh_CN", rst, SHORT),
    }
    if reference is not None:
        for part, kinds in (("train-mix", MIX), ("valid-mix", MIX_VALID)):
            for name in kinds["packages"]:
                wanted[f"{part}/python-{name}"] = (sources / name, (".py",), SHORT)
            for name in kinds["languages"]:
                book = reference / f"debian-reference.{name}.txt.gz"
                wanted[f"{part}/debian-{name}"] = (book, (".txt",), SHORT)
    for name, (folder, suffixes, limit) in wanted.items():
        path = out / f"{name}.txt.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.GzipFile(path, "wb", mtime=0) as file:
            file.write(collect(folder, suffixes, limit).encode())
        print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
