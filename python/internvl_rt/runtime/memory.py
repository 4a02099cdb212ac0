"""How much memory the machine has left."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or less under a cgroup's limit."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    # Elsewhere than on Linux nothing is known: plan for a small machine.
    return min(found, default=4 * GIB)
