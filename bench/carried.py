"""What bench/gpu_check.sh needs beside the machine's own packages: whether it is there and fits.

    python bench/carried.py            # on the machine: fails where the build would
    python bench/carried.py --dry-run  # before: a checkout that carries no wheels yet is fine

Runs before the package is built, so that it imports nothing of it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 64 << 20  # bytes that travel
HEADER = "cutlass_library/source/include/cutlass/cutlass.h"


def headers_wheel(root: Path) -> str:
    """The name of the wheel whose headers the build wants."""
    text = (root / "kernels/cuda/cutlass/headers.cmake").read_text(encoding="utf-8")
    found = re.search(r"set\(cutlass_version (\S+)\)", text)
    assert found is not None
    return f"nvidia_cutlass-{found[1]}-py3-none-any.whl"


def tree_bytes(root: Path) -> int:
    """Bytes of the files that git tracks or does not ignore; 0 where it cannot say, as in a copy
    that belongs to somebody else."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return 0
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        print(listed.stderr.strip())
        return 0
    files = [root / name for name in listed.stdout.split("\0") if name]
    return sum(f.stat().st_size for f in files if f.is_file())


def problems(root: Path, dry: bool) -> list[str]:
    """One line each; none where the build will find what it needs."""
    wheels = sorted((root / ".whl").glob("*.whl"))
    tree, carried = tree_bytes(root), sum(w.stat().st_size for w in wheels)
    print(f"tree {tree / 2**20:.1f} MiB, {len(wheels)} wheels {carried / 2**20:.1f} MiB")
    found = []
    if tree + carried > LIMIT:
        found.append(f"{(tree + carried) / 2**20:.1f} MiB travel, allowed: {LIMIT >> 20}")
    name = headers_wheel(root)
    wheel = root / ".whl" / name
    if wheels or not dry:
        if not wheel.exists():
            found.append(f".whl has no {name}: pip download --no-deps -d .whl nvidia-cutlass==...")
        elif not zipfile.is_zipfile(wheel) or HEADER not in zipfile.ZipFile(wheel).namelist():
            found.append(f".whl/{name} has no {HEADER}")
    return found


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true")
    found = problems(root, parser.parse_args(arguments).dry_run)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
