"""Small reproductions of what papers claim, on the sandbox: each ends in a table and in verdicts by 95 % intervals.

    python benchmarks/evidence.py                # all, one after the other: at most 3 minutes each on one core
    python benchmarks/evidence.py nca apo        # some
    python benchmarks/evidence.py --tune         # how the betas of more_answers were chosen

A verdict is by the differences between runs of the same seed: "holds" where the whole t interval is on the claim's
side. docs/evidence.md has what was found.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from claims import CLAIMS, Lab
from claims.sets import tune
from harness.runs import environment
from harness.world import open_world

ROOT = Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", choices=[*CLAIMS, []], help=f"of {', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "evidence", help="default: runs/evidence")
    parser.add_argument("--sandbox", type=Path, default=ROOT / ".sandbox", help="default: .sandbox")
    parser.add_argument("--tune", action="store_true", help="choose the betas of more_answers, and stop")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    environment(args.out / "cache")
    lab = Lab(open_world(args.sandbox), args.out)
    if args.tune:
        print(tune(lab))
        return 0
    for name in args.claims or CLAIMS:
        start = time.process_time()
        found = CLAIMS[name](lab)
        seconds = time.process_time() - start
        text = found.text() + f"\n`python benchmarks/evidence.py {name}`: {seconds:.0f} s of one core.\n"
        (args.out / f"{name}.md").write_text(text, "utf-8")
        (args.out / f"{name}.json").write_text(json.dumps(found.to_json() | {"seconds": seconds}, indent=2), "utf-8")
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
