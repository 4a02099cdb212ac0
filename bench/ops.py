"""All real-model cases of the op catalogue beside torch, taking turns in one run.

    python bench/ops.py                        # every op, dtype and case
    python bench/ops.py --op linear,rms_norm --dtype bf16 --seconds 1

The columns are those of `internvl-rt bench` (python/internvl_rt/ops/bench.py says what they mean);
speedup is the peer's median over ours. An op or case without a peer has a row of its own alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_rt import set_num_threads
from internvl_rt.ops import bench, catalogue
from peers import OTHER_DRAWS, PEERS


def rows_of(names: Sequence[str], dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the ops' real-model cases; ours and then the peer's, with the speedup in ours."""
    wanted = [bench.DTYPES[d] for d in dtypes]
    rates, rows = bench.Rates(), []
    for op in (catalogue()[name] for name in names):
        for case in (c for c in op.cases if c.bench):
            for dtype in (d for d in case.dtypes if d in wanted):
                print(f"{op.name} {case.name} {dtype} ...", file=sys.stderr)
                peers = {}
                if op.name in PEERS:
                    label, prepare = PEERS[op.name]
                    if prepare(**case.arguments(op.name, dtype)) is not None:
                        peers[label] = prepare
                found = bench.time_case(
                    op,
                    case.name,
                    dtype,
                    lambda d, op=op, case=case: case.arguments(op.name, d),
                    ("cpu",),
                    rates,
                    peers,
                )
                for peer in found[1:]:
                    found[0]["speedup"] = peer["median_us"] / found[0]["median_us"]
                    if op.name in OTHER_DRAWS:
                        peer["max_error"] = None
                rows += found
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = bench.table(rows).splitlines()
    speedups = [f"{row['speedup']:.2f}x" if "speedup" in row else "" for row in rows]
    return "\n".join(
        f"{line:<{max(map(len, lines))}}  {extra}".rstrip()
        for line, extra in zip(lines, ["speedup", *speedups], strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", default=",".join(sorted(catalogue())), help="comma-separated")
    parser.add_argument("--dtype", default="bf16,f32")
    parser.add_argument("--threads", type=int, help="without it: all of the machine's")
    parser.add_argument("--seconds", type=float, default=bench.SECONDS, help="for each row")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    names, dtypes = options.op.split(","), options.dtype.split(",")
    for given, known in ((names, catalogue()), (dtypes, bench.DTYPES)):
        for name in given:
            if name not in known:
                parser.error(f"{name!r}, allowed: {', '.join(sorted(known))}")
    if options.threads is not None:
        set_num_threads(options.threads)
    bench.SECONDS = options.seconds
    with bench.same_threads():
        rows = rows_of(names, dtypes)
    print(table(rows))
    out = options.out or Path(__file__).parent / "results" / bench.machine_slug()
    out.mkdir(parents=True, exist_ok=True)
    file = out / "ops.json"
    file.write_text(json.dumps(bench.document(rows), indent=1) + "\n", encoding="utf-8")
    print(f"written to {file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
