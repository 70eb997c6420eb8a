"""Off-policy training from files of scored answers: CoPG, TOPR and A-LoL, beside plain policy gradient.

    python benchmarks/off_policy.py                     # both parts; goes on where it stopped
    python benchmarks/off_policy.py sandbox             # about 10 minutes on one core
    python benchmarks/off_policy.py verdicts            # about 6; needs real rows and a real model, see below

sandbox: scored answers of the sandbox's base model, many passes; the true reward of what the policy then says.
verdicts: `data/gsm8k_solutions.jsonl.gz` (solutions of other models with a verdict) on `models/stories260k`, both under
--shared; the margin between log-probs of right and wrong solutions to held-out questions, before and after. A part
whose files are not there is left out, and said to be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from claims.lab import Finding, Lab
from harness.off_policy_sandbox import off_policy
from harness.runs import environment
from harness.verdicts import missing, verdicts
from harness.world import open_world

ROOT = Path(__file__).parents[1]
PARTS = ("sandbox", "verdicts")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: both")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2; default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "off_policy", help="default: runs/off_policy")
    parser.add_argument("--sandbox", type=Path, default=ROOT / ".sandbox", help="default: .sandbox")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="default: beside the checkout")
    args = parser.parse_args(argv)
    if args.seeds < 2 and args.parts != ["verdicts"]:
        parser.error("--seeds: expected at least 2: the sandbox's intervals are over seeds")
    args.out.mkdir(parents=True, exist_ok=True)
    environment(args.out / "cache")
    for part in args.parts or PARTS:
        start = time.process_time()
        if part == "verdicts" and (lacking := missing(args.shared)):
            print(f"left out: verdicts: there is no {lacking}; --shared names the folder that has it")
            continue
        found = _run(part, args)
        seconds = time.process_time() - start
        said = f"`python benchmarks/off_policy.py {part} --seeds {args.seeds}`: {seconds:.0f} s of one core"
        text = f"{found.text()}\n{said}, without the runs that were there before.\n"
        (args.out / f"{part}.md").write_text(text, "utf-8")
        print("\n" + text, flush=True)
    return 0


def _run(part: str, args: argparse.Namespace) -> Finding:
    if part == "sandbox":
        return off_policy(Lab(open_world(args.sandbox), args.out), range(args.seeds))
    return verdicts(args.shared, args.out, range(args.seeds))


if __name__ == "__main__":
    sys.exit(main())
