"""`po` against TRL's DPOTrainer: the same model, rows in the same order, hyperparameters and steps, side by side.

    python benchmarks/vs_trl.py                     # about 20 minutes on 2 CPU cores; needs `pip install -e .[trl]`
    python benchmarks/vs_trl.py --repeats 1         # a quick look
    python benchmarks/vs_trl.py --vocabulary 8192   # a small vocabulary, where TRL loses least

Each side runs in processes of its own, one after the other and in turns, under the same thread settings; timed is
`trainer.train()` alone. Model: a 7 M-parameter llama with random weights, full fine-tuning in fp32. Rows: 48 pairs,
prompts around 200 and responses around 120 tokens, log-normal. Reference: recomputed each step (a frozen copy on both
sides) or cached (TRL: precompute_ref_log_probs). `po` runs sets of K = 8 with InfoNCA as well: its time per unique
token (a prompt's tokens count once) grows with K only as the share of scored tokens does, which pay for the LM head.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

STEPS_OF = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
}
BETA = 0.1


# Hidden size, feed-forward size and heads of 7 M parameters: 6 layers, tied embeddings. 32000 is the usual
# vocabulary (LlamaConfig's default); TRL's cost grows with it, because it scores every position, prompts included.
SIZES = {32000: (160, 432, 5), 8192: (256, 688, 4)}


def make_world(folder: Path, rows: int, size: int) -> None:
    """A model, a tokenizer and rows that both sides read from disk."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(size - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder / "model")
    torch.manual_seed(0)
    hidden, inner, heads = SIZES[size]
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=6,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    print(f"model: llama, {model.num_parameters() / 1e6:.1f} M parameters, vocabulary {size}, fp32")
    generator = torch.Generator().manual_seed(1)

    def words(mean: float) -> str:
        length = (torch.randn((), generator=generator) * 0.4).exp() * mean
        return " ".join(
            f"w{i}" for i in torch.randint(size - 3, (int(length.clamp(8, 800)),), generator=generator).tolist()
        )

    for K in (2, 8):
        with (folder / f"k{K}.jsonl").open("w") as out:
            for i in range(rows):
                prompt, answers = words(200) + " ", [words(120) for _ in range(K)]
                row: dict[str, Any] = {"prompt": prompt, "id": str(i)}
                if K == 2:
                    row |= {"chosen": answers[0], "rejected": answers[1]}
                else:
                    row["responses"] = [{"content": a, "reward": (k * 7 % 8) / 8} for k, a in enumerate(answers)]
                out.write(json.dumps(row) + "\n")


def side_trl(folder: Path, reference: str, K: int) -> Any:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=reference == "cached",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        disable_tqdm=True,
        seed=0,
        **STEPS_OF,
    )
    rows = load_dataset("json", data_files=str(folder / f"k{K}.jsonl"), split="train", cache_dir=str(folder / "hf"))
    return DPOTrainer(model=str(folder / "model"), args=args, train_dataset=rows.remove_columns("id"))


def side_po(folder: Path, reference: str, K: int) -> Any:
    from po.recipe import load
    from po.run import build

    head = {"head": "dpo", "beta": BETA} if K == 2 else {"head": "infonca", "beta": BETA}
    recipe = folder / f"po-{reference}-{K}.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
                "data": {"train": str(folder / f"k{K}.jsonl"), "max_length": 4096, "cache_dir": str(folder / "cache")},
                "reference": {
                    "from": "init",
                    "kind": "cached" if reference == "cached" else "frozen",
                    "cache_dir": str(folder / "cache"),
                },
                "loss": [head],
                "train": {
                    "train_sampling_strategy": "sequential",
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "disable_tqdm": True,
                    **STEPS_OF,
                },
                "seed": 0,
                "output_dir": str(folder / f"po-{reference}-{K}-{os.getpid()}"),
            }
        )
    )
    return build(*load(recipe, [])).trainer


def run_side(side: str, folder: Path, reference: str, K: int) -> None:
    """In a process of its own: build, time train(), print one JSON line."""
    trainer = (side_trl if side == "trl" else side_po)(folder, reference, K)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps({"wall": wall, "cpu": cpu, "gib": peak, "losses": losses}), flush=True)


def measure(side: str, folder: Path, reference: str, K: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--folder",
        str(folder),
        "--reference",
        reference,
        "--k",
        str(K),
    ]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{side} ({reference}, K={K}) failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return dict(json.loads(lines[-1][7:]))


def tokens(folder: Path, K: int) -> tuple[int, int]:
    """Unique tokens (a prompt once) and scored tokens (those of responses, EOS included) of the rows."""
    unique = scored = 0
    for line in (folder / f"k{K}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = len(row["prompt"].split())
        answers = [row["chosen"], row["rejected"]] if K == 2 else [r["content"] for r in row["responses"]]
        lengths = [len(a.split()) + 1 for a in answers]
        unique, scored = unique + prompt + sum(lengths), scored + sum(lengths)
    return unique, scored


def table(folder: Path, repeats: int) -> None:
    """All measurements in turns, then medians and ratios."""
    cases = [("trl", "recompute", 2), ("po", "recompute", 2), ("trl", "cached", 2), ("po", "cached", 2)]
    cases += [("po", "recompute", 8), ("po", "cached", 8)]
    runs: dict[Any, list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case in cases:
            runs[case].append(measure(case[0], folder, *case[1:]))
    print(f"\n{'':24}{'wall s':>9}{'CPU s':>9}{'unique tok/s':>14}{'us/unique tok':>15}{'peak GiB':>10}")
    mid: dict[Any, dict[str, float]] = {}
    for case, found in runs.items():
        mid[case] = {key: median(r[key] for r in found) for key in ("wall", "cpu", "gib")}
        unique, _ = tokens(folder, case[2])
        wall, cpu, gib = mid[case].values()
        name = f"{case[0]} {case[1]} K={case[2]}"
        print(f"{name:24}{wall:9.1f}{cpu:9.1f}{unique / wall:14.0f}{1e6 * wall / unique:15.0f}{gib:10.2f}")
    print()
    for reference in ("recompute", "cached"):
        a, b = ("trl", reference, 2), ("po", reference, 2)
        gap = max(abs(x - y) for x, y in zip(runs[a][0]["losses"], runs[b][0]["losses"], strict=True))
        ratio = {key: mid[a][key] / mid[b][key] for key in mid[a]}
        print(
            f"reference {reference:9}  TRL/po: wall {ratio['wall']:.2f}x  CPU {ratio['cpu']:.2f}x  memory "
            f"{ratio['gib']:.2f}x  largest difference of the loss curves {gap:.1e}"
        )
    for reference in ("recompute", "cached"):
        per = [[mid[("po", reference, K)]["wall"] / n for n in tokens(folder, K)] for K in (2, 8)]
        print(
            f"reference {reference:9}  po, K = 8 against K = 2: time {per[1][0] / per[0][0]:.2f}x per unique token, "
            f"{per[1][1] / per[0][1]:.2f}x per scored token"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=32000, choices=list(SIZES))
    parser.add_argument("--side", choices=["trl", "po"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--reference", choices=["recompute", "cached"], help=argparse.SUPPRESS)
    parser.add_argument("--k", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        run_side(given.side, given.folder, given.reference, given.k)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), given.rows, given.vocabulary)
        table(Path(folder), given.repeats)


if __name__ == "__main__":
    main()
