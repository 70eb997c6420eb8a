"""A command line's words: what `po` and its commands take, and which words are overrides of a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from po import keys
from po.errors import suggest

EXIT_CODES = """exit codes:
  0  fine
  1  a fault of po itself, or of the machine: a traceback follows
  2  the recipe, the data or the command line is wrong: the message says where and what to do
  3  out of memory: the message says what to change
  4  numerics: a NaN or Inf, or a check of the numbers failed
  75 asked to stop (SIGTERM, SIGUSR1, Ctrl-C): saved; the same command with resume=true goes on
"""
OVERRIDES = """A recipe's values can be changed behind it, the last word wins:
  po %(command)s recipe.yaml train.learning_rate=1e-5 loss.0.beta=0.2
  po %(command)s recipe.yaml --train.learning_rate 1e-5 --beta=0.2
"""
REWARD = """examples:
  po reward train recipe.yaml train.learning_rate=1e-5 objective.margin=margin
  po reward strength recipe.yaml -o judged.jsonl ensemble.members=4
  torchrun --nproc_per_node 8 -m po.cli reward train recipe.yaml
"""
COMMANDS = ("train", "check", "sample", "reward", "heads", "export", "likra", "compo")
FLAGS = {"check": {"--json", "--schema", "-h", "--help"}, "train": {"-h", "--help"}, "sample": {"-h", "--help"}}
FLAGS["reward"] = {"--output", "--force", "-h", "--help"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """argparse's own ending, exit code 2, with a suggestion where a word is misspelt."""
        if "invalid choice: " in message:
            word = message.split("invalid choice: ")[1].split("'")[1]
            message = f"there is no command {word!r}.{suggest(word, COMMANDS)} Commands: {', '.join(COMMANDS)}"
        if "unrecognized arguments: " in message:
            word = message.split("unrecognized arguments: ")[1].split()[0]
            options = [o for a in self._actions for o in a.option_strings]
            message += f".{suggest(word, options)}"
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """A command's words as a namespace. Overrides are taken out before (`separate`). Exits with 2 for unknown words."""
    top, commands = _parsers()
    args, extra = top.parse_known_args(words)
    if extra:
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(extra)}")
    return args


def _parsers() -> tuple[argparse.ArgumentParser, Any]:
    top = _Parser(
        prog="po",
        description="Preference optimization of language models from one recipe.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)

    def command(name: str, says: str, epilog: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=says,
            description=says,
            epilog=epilog.replace("%(command)s", name) + ("\n" if epilog else "") + EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    train = command("train", "train the model of a recipe", OVERRIDES)
    train.add_argument("recipe", help="a YAML file")
    check = command("check", "check a recipe and its data without loading a model", OVERRIDES + "\n" + keys.listing())
    check.add_argument("recipe", nargs="?", help="a YAML file")
    check.add_argument("--json", action="store_true", help="print what was found as JSON")
    check.add_argument("--schema", action="store_true", help="print the JSON schema of recipes, for editors")
    sample = command("sample", "write and reward responses to a recipe's prompts, without training", OVERRIDES)
    sample.add_argument("recipe", help="a YAML file with a `rollout` section")
    reward = command("reward", "train a reward model on pairs; judge pairs by models that did not see them", REWARD)
    reward.add_argument("action", choices=("train", "check", "strength"), help="strength: out-of-fold margins of rows")
    reward.add_argument("recipe", help="a YAML file; docs/reward_models.md")
    reward.add_argument("-o", "--output", type=Path, help="strength: the rows with margins, .jsonl or .parquet")
    reward.add_argument("--force", action="store_true", help="strength: overwrite a finished output")
    heads = command("heads", "list the heads, or explain one")
    heads.add_argument("head", nargs="?", help="e.g. dpo")
    export = command("export", "write a run's result for use elsewhere, reopen it and check it")
    export.add_argument("run", type=Path, help="a run's folder")
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--adapter", action="store_true", help="the LoRA adapter")
    form.add_argument("--merged", action="store_true", help="the whole model, the adapter merged in fp32 and cast last")
    export.add_argument("--out", type=Path, help="where to write (default: in the run's folder)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the merged weights")
    export.add_argument("--eval", metavar="FILE", help="rows on which the drift of log-probs is measured")
    likra = command("likra", "score multiple-choice rows by the likelihood ratio of two adapters")
    likra.add_argument("positive", type=Path, help="the run trained on right answers")
    likra.add_argument("negative", type=Path, help="the run trained on wrong answers")
    likra.add_argument("rows", help="questions with their answers; the right one has the top reward, or is `chosen`")
    compo = command("compo", "split pairs by the reference's margin; step on the output layer over the noisy ones")
    compo.add_argument("recipe", help="a YAML file: rows, reference, seed, and the model where there is no --policy")
    compo.add_argument("--out", type=Path, required=True, help="a new folder, for the whole model")
    compo.add_argument("--policy", type=Path, help="a finished run to start from")
    compo.add_argument("--split-only", action="store_true", help="count, and write the clean rows; no steps")
    compo.add_argument("--radius", type=float, help="r, how far a comparison looks (default: 0.0005)")
    compo.add_argument("--directions", type=int, help="m, comparisons for a step (default: 1600)")
    compo.add_argument("--lambda-g", type=float, help="smaller entries of the direction become 0 (default: 0.00022)")
    compo.add_argument("--threshold", type=float, help="lambda, good comparisons that a step needs (default: 0.2)")
    compo.add_argument("--gamma", type=float, help="length of a step, times the share of good ones (default: 1)")
    compo.add_argument("--sampling", choices=("sphere", "gaussian"), help="of directions (default: sphere)")
    compo.add_argument("--noisy", type=float, help="largest reference margin of a noisy pair, nats (default: 3)")
    compo.add_argument("--pairs", type=int, help="noisy pairs to step on, the first ones (default: 100)")
    return top, commands


def separate(words: Sequence[str], flags: set[str]) -> tuple[list[str], list[str]]:
    """Split a command's words into its own and overrides: key=value, --key=value, --key value, --key (true).

    The deepspeed launcher's --local_rank=N is dropped wherever it stands; `--config FILE` names the recipe.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        takes = not equals and rest and not rest[0].startswith("--") and not _is_override(rest[0])
        if name in ("--local_rank", "--local-rank"):
            if takes:
                rest.pop(0)
        elif name in ("--config", "--recipe"):
            own.append(value if equals else rest.pop(0) if rest else "")
        elif word in flags or not (word.startswith("--") or _is_override(word)):
            own.append(word)
        elif equals:
            overrides.append(word)
        else:
            overrides.append(f"{word}={rest.pop(0) if takes else 'true'}")
    return own, overrides


def _is_override(word: str) -> bool:
    return "=" in word and not Path(word).exists()
