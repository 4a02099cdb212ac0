"""Joins what the steps of bench/gpu_check.sh have written so far.

    python bench/gpu_parts.py check PARTS OUT  # OUT/check.json

The script calls it after every step, so that a run that is cut off leaves all that it had; it
imports nothing but the standard library, to be quick.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def write(file: Path, content: Any) -> None:
    """As JSON, and as a whole: whoever is killed meanwhile leaves the file as it was, and so do
    several at a time."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def read(file: Path, default: Any) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else default


def steps(parts: Path) -> list[dict[str, Any]]:
    lines = (parts / "steps.tsv").read_text(encoding="utf-8").splitlines()
    return [
        {"step": name, "code": int(code), "seconds": int(seconds)}
        for name, code, seconds in (line.split("\t") for line in lines)
    ]


def join(mode: str, parts: Path) -> dict[str, Any]:
    """The document of a run of "check" or "bench"."""
    document: dict[str, Any] = {
        "mode": mode,
        "machine": read(parts / "machine.json", {}),
        "steps": steps(parts),
        "probes": read(parts / "probes.json", {}),
    }
    if mode == "bench":
        whole = [read(file, {}) for file in sorted(parts.glob("models-*.json"))]
        document |= {"models": whole, "rows": [], "refused": [], "failed": []}
        # The rows of peers.json beside those of the ops that they belong to.
        for file in (*sorted(parts.glob("ops-*.json")), parts / "peers.json"):
            for kind, entries in read(file, {}).items():
                document[kind] += entries
        labels = [*dict.fromkeys(map(label, document["rows"]))]
        document["rows"].sort(key=lambda row: labels.index(label(row)))
    return document


def label(row: dict[str, Any]) -> tuple[str, ...]:
    return row["op"], row["case"], row["dtype"]


def main() -> int:
    mode, parts, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    write(out / f"{mode}.json", join(mode, parts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
