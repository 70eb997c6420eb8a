"""CoPG's three-armed bandit: regret of the paper's five methods, and of the mistake in beta, as a table and a plot.

    python benchmarks/copg_bandit.py                    # about 4 minutes on one core; needs `pip install -e .[bench]`
    python benchmarks/copg_bandit.py --seeds 2 --longer 1    # a quick look, the paper's 100 epochs alone

Flet-Berliac et al. 2024 (arXiv:2406.19185). Rewards 2.5, 2 and 1; the arms of 10,000 pairs are drawn by (0.1, 0.2, 0.7)
and (0.05, 0.05, 0.9); beta 0.5, a uniform reference, which is where the logits start; Adam, learning rate 1e-3, batches
of 512, 100 epochs (2,000 steps), and ten times as many. CoPG and IPO are po's own heads (harness/bandit.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.bandit import BEST_A, Method, fixed_point, largest_pair_gradient, methods, regret, train
from torch import Tensor

ROOT = Path(__file__).parents[1]
EPOCHS = 100


@dataclass(frozen=True)
class Curve:
    """What a method did: regret of each seed at the start and after each epoch."""

    steps: Sequence[int]
    regret_ES: Tensor
    last_A: Tensor  # mean policy after the paper's epochs
    rest_A: Tensor  # the logits where the expected gradient is zero
    noise: float  # the largest gradient of a single pair at pi*


def follow(method: Method, seeds: int, epochs: int) -> Curve:
    """Train all seeds and note the regret."""
    steps: list[int] = []
    logits: list[Tensor] = []

    def look(done: int, logits_SA: Tensor) -> None:
        steps.append(done)
        logits.append(logits_SA)

    train(method, seeds, epochs, look)
    last_A = logits[min(EPOCHS, epochs)].softmax(-1).mean(0)
    regrets = torch.stack([regret(x) for x in logits])
    return Curve(steps, regrets, last_A, fixed_point(method), largest_pair_gradient(method, BEST_A.log()))


def markdown(curves: Mapping[str, Curve], longer: int) -> str:
    """The table: mean and range over seeds."""
    seeds = next(iter(curves.values())).regret_ES.shape[1]
    head = ("method", f"regret after {EPOCHS} epochs", "mean pi then", f"after {EPOCHS * longer} epochs")
    head += ("fixed point of the expected gradient: pi", "its regret", "largest gradient of a pair at pi*")
    rows = [
        f"The reference's regret is {next(iter(curves.values())).regret_ES[0, 0]:.4f}; pi* = {_three(BEST_A)}. "
        f"Mean [least, most] over {seeds} seeds.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for name, curve in curves.items():
        cells = (_range(curve.regret_ES[EPOCHS]), _three(curve.last_A), _range(curve.regret_ES[-1]))
        cells += (_three(curve.rest_A.softmax(-1)), f"{regret(curve.rest_A[None])[0]:.5f}", f"{curve.noise:.2g}")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _three(p_A: Tensor) -> str:
    return " ".join(f"{p:.3f}" for p in p_A.tolist())


def _range(regret_S: Tensor) -> str:
    return f"{regret_S.mean():.5f} [{regret_S.min():.5f}, {regret_S.max():.5f}]"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--longer", type=int, default=10, help="times the paper's epochs (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "copg_bandit", help="default: runs/copg_bandit")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, curves = time.process_time(), {}
    for name, method in methods().items():
        curves[name] = follow(method, args.seeds, EPOCHS * args.longer)
        print(
            f"{name}: regret {curves[name].regret_ES[-1].mean():.5f}, {time.process_time() - start:.0f} s", flush=True
        )
    args.out.mkdir(parents=True, exist_ok=True)
    text = markdown(curves, args.longer)
    (args.out / "copg_bandit.md").write_text(text, "utf-8")
    print("\n" + text)
    try:
        from harness.plot_bandit import draw
    except ImportError:
        print("no plot: it needs matplotlib (pip install -e .[bench])")
        return 0
    draw(
        {name: (c.steps, c.regret_ES, regret(c.rest_A[None]).item()) for name, c in curves.items()},
        args.out / "copg_bandit.png",
    )
    print(f"{args.out / 'copg_bandit.md'} and copg_bandit.png written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
