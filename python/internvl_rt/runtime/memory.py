"""How much memory the machine has left."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30

# Of both versions of Linux's cgroups: the limit, what is used, and where that is taken apart.
_GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the machine's, or less under a cgroup's limit.

    Files that were read or written count as free: the kernel lets go of them where memory is
    wanted. root: where /proc and /sys are found.
    """
    found = []
    machine = _counts(root / "proc/meminfo")
    if "MemAvailable:" in machine:
        found.append(machine["MemAvailable:"] * 1024)
    for names in _GROUPS:
        limit, used, parts = (root / "sys/fs/cgroup" / name for name in names)
        if limit.exists() and used.exists() and limit.read_text().strip() != "max":
            files = _counts(parts)
            cached = files.get("inactive_file", 0) + files.get("active_file", 0)
            found.append(max(0, int(limit.read_text()) - int(used.read_text()) + cached))
    # Elsewhere than on Linux nothing is known: plan for a small machine.
    return min(found, default=4 * GIB)


def _counts(path: Path) -> dict[str, int]:
    """The first number of each line, by its first word; nothing where there is no such file."""
    if not path.exists():
        return {}
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
