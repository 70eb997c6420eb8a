"""The subcommands spar, self_rewarding, pu_rl and steps of contrast.py: their arguments, and their runs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from po.errors import UserError
from po.prep.anchors import PURL, Compare
from po.prep.arguments import positive, sources
from po.prep.chat import Chat
from po.prep.chat_arguments import chat, chat_options
from po.prep.contrast import Sampling
from po.prep.contrast_arguments import Command, add_asking, asking, said, sampling
from po.prep.partial import beside
from po.prep.pits import Steps, Verify
from po.prep.prompts import replaced
from po.prep.search_prompts import CONTINUE, EACH_OTHER, POINTS, SPAR_JUDGE, SPAR_REFINE, WITH_ANCHOR
from po.prep.second import Nobody, Two
from po.prep.self_rewarding import Agreement, Said, SelfRewarding
from po.prep.tree import Order, Spar
from po.rewards.build import build_rewards
from po.spec import RewardSpec


def _add_spar(p: argparse.ArgumentParser) -> None:
    add_asking(p)
    g = p.add_argument_group("the search")
    g.add_argument("--verdicts", type=positive, default=Spar.verdicts, metavar="N", help="of the judge on one answer")
    g.add_argument("--branch", type=positive, default=Spar.branch, metavar="N", help="refinements of one answer")
    g.add_argument("--keep", type=positive, default=Spar.keep, metavar="N", help="answers to go on with, by value")
    g.add_argument("--depth", type=positive, default=Spar.depth, metavar="N", help="refinements after one another")
    g.add_argument("--gate", type=float, default=Spar.gate, metavar="V", help="an answer above this value is accepted")
    g.add_argument("--order", choices=get_args(Order), default=Spar.order, help="breadth or depth first")
    g.add_argument("--budget", type=positive, default=Spar.budget, metavar="N", help="answers that a search may try")
    g.add_argument("--per-prompt", type=positive, metavar="N", help="at most so many searches")


def _spar(args: argparse.Namespace) -> None:
    prompts, how = replaced((SPAR_JUDGE, SPAR_REFINE), args.prompt_file), sampling(args)
    if not 0.5 <= args.gate < 1:
        raise UserError(f"--gate: expected 0.5 or more, and less than 1, got {args.gate:g}")
    names = ("verdicts", "branch", "keep", "depth", "gate", "order", "budget", "per_prompt")
    options = {name: getattr(args, name) for name in names}
    model = chat(args, args.output)
    asked: dict[str, Any] = {"judge": prompts[SPAR_JUDGE.id], "refine": prompts[SPAR_REFINE.id], "sampling": how}
    work = Spar(sources(args)[0], model.name, **asked, **options)
    asking(args, model, work, {**options, **asdict(how), **said(prompts.values())})


def _add_self_rewarding(p: argparse.ArgumentParser) -> None:
    add_asking(p, required=False)
    g = p.add_argument_group("ranking")
    g.add_argument("--verdicts", type=positive, default=SelfRewarding.verdicts, metavar="N", help="on one answer")
    g.add_argument("--now", metavar="FIELD", help="rank by this number of each answer (a list is summed)")
    g.add_argument("--now-less", metavar="FIELD", help="minus this one: with logps, DPO's reward")
    g = p.add_argument_group("consistency (CREAM)")
    g.add_argument("--before", metavar="FIELD", help="the ranking of the iteration before, by this number")
    g.add_argument("--before-less", metavar="FIELD", help="minus this one")
    g.add_argument("--previous-model", metavar="MODEL", help="or by the points that this model gives")
    g.add_argument("--previous-url", metavar="URL", help="of its server; none: it runs here")
    g.add_argument("--previous-key-env", metavar="VARIABLE", help="the variable with that server's key")
    g.add_argument("--agreement", choices=get_args(Agreement), default="kendall", help="top: same first and same last")
    g.add_argument("--consistency", type=float, metavar="C", help="write this in all rows: a first run's mean")


def _self_rewarding(args: argparse.Namespace) -> None:
    now, before = (_said(args, name) for name in ("now", "before"))
    if args.before and args.previous_model:
        raise UserError("--before and --previous-model: expected one of them")
    if bool(args.model) == bool(args.now):
        raise UserError("expected --model, which judges, or --now, by which the answers are ranked; and not both")
    if args.consistency is not None and not 0 <= args.consistency <= 1:
        raise UserError(f"--consistency: expected 0 to 1, got {args.consistency:g}")
    prompts, how = replaced([POINTS], args.prompt_file), sampling(args)
    ranked: Any = before or (None if args.previous_model else "nothing")
    work = SelfRewarding(
        sources(args)[0],
        now,
        ranked,
        args.agreement,
        args.consistency,
        args.verdicts,
        how,
        prompts[POINTS.id],
    )
    options: dict[str, Any] = {"now": now and now.names, "before": before and before.names}
    options |= {"agreement": args.agreement, "consistency": args.consistency}
    first: Chat | None = chat(args, args.output) if args.model else None
    model, more = _with_second(args, first, "previous")
    if model is not None:
        options |= {"verdicts": args.verdicts, **asdict(how), **said(prompts.values()), **more}
    asking(args, model or Nobody(), work, options)


def _said(args: argparse.Namespace, name: str) -> Said | None:
    """--now and --now-less, or the two of before."""
    field, less = getattr(args, name), getattr(args, f"{name}_less")
    if less and not field:
        raise UserError(f"--{name}-less: goes with --{name}")
    return Said((field, less) if less else (field,)) if field else None


def _with_second(args: argparse.Namespace, first: Chat | None, role: str) -> tuple[Chat | None, dict[str, Any]]:
    """The first model with a second one, and what of that decides the bytes. The first one's key is not sent to it."""
    if not getattr(args, f"{role}_model"):
        return first, {}
    other = copy.copy(args)
    other.model, other.url, other.key_env = (getattr(args, f"{role}_{name}") for name in ("model", "url", "key_env"))
    return Two(first, chat(other, beside(args.output, f".{role}"))), {role: chat_options(other)}


def _add_pu_rl(p: argparse.ArgumentParser) -> None:
    add_asking(p, Sampling(temperature=1.0))
    g = p.add_argument_group("the anchor")
    g.add_argument("--anchor", default="anchor", metavar="FIELD", help="that holds it; `chosen` of a pair")
    g.add_argument("--teacher-model", metavar="MODEL", help="is asked for it instead, once a prompt")
    g.add_argument("--teacher-url", metavar="URL", help="of its server; none: it runs here")
    g.add_argument("--teacher-key-env", metavar="VARIABLE", help="the variable with that server's key")
    g.add_argument("--anchor-weight", type=float, default=1.0, metavar="W", help="as a positive; 0 leaves it out")
    g = p.add_argument_group("the candidates")
    g.add_argument("--candidates", type=positive, metavar="N", help="from the model; otherwise the row's responses")
    g.add_argument("--compare", choices=get_args(Compare), default="anchor", help="with the anchor, or with each other")
    g.add_argument("--form", choices=("responses", "pair"), default="responses")


def _pu_rl(args: argparse.Namespace) -> None:
    if args.anchor_weight < 0:
        raise UserError(f"--anchor-weight: expected 0 or more, got {args.anchor_weight:g}")
    if args.candidates == 1:
        raise UserError("--candidates: expected two or more")
    prompts, how = replaced((WITH_ANCHOR, EACH_OTHER), args.prompt_file), sampling(args)
    student = chat(args, args.output)
    model, more = _with_second(args, student, "teacher")
    assert model is not None
    work = PURL(
        sources(args)[0],
        student.name,
        None if args.teacher_model else args.anchor,
        args.teacher_model,
        args.candidates or 0,
        args.compare,
        args.anchor_weight,
        args.form,
        how,
        prompts[WITH_ANCHOR.id],
        prompts[EACH_OTHER.id],
    )
    options = {"anchor": work.anchor, "candidates": args.candidates, "compare": args.compare, "form": args.form}
    options |= {"anchor_weight": args.anchor_weight, **asdict(how), **said(prompts.values()), **more}
    asking(args, model, work, options)


def _add_steps(p: argparse.ArgumentParser) -> None:
    add_asking(p, Sampling(temperature=1.0))
    g = p.add_argument_group("what is right")
    g.add_argument("--verifier", choices=("math", "exact"), required=True)
    g.add_argument("--answer", default="answer", metavar="FIELD", help="of the row, that the verifier compares with")
    g.add_argument("--after", metavar="TEXT", help="only what follows the last of these counts, e.g. </think>")
    g.add_argument("--pattern", help="exact: its last match (its first group, if it has one) is the answer")
    g = p.add_argument_group("steps")
    g.add_argument("--step-separator", default=r"\n", help=r"between two steps; \n is a line end")
    g.add_argument("--samples", type=positive, default=Steps.samples, metavar="N", help="solutions from each step on")
    g.add_argument("--best-of", type=positive, default=Steps.best_of, metavar="K", help="1: the value is the share")
    g.add_argument("--per-prompt", type=positive, default=Steps.per_prompt, metavar="N", help="wrong solutions at most")
    g.add_argument("--plain-text", action="store_true", help="continue text prompts as they are, without asking to")


def _steps(args: argparse.Namespace) -> None:
    if args.pattern is not None and args.verifier != "exact":
        raise UserError("--pattern: goes with --verifier exact")
    separator = args.step_separator.replace("\\n", "\n")
    if not separator:
        raise UserError("--step-separator: expected a text that is not empty")
    given = {"column": args.answer, "after": args.after, "pattern": args.pattern}
    reads = {k: v for k, v in given.items() if v is not None}
    prompts, how = replaced([CONTINUE], args.prompt_file), sampling(args)
    model = chat(args, args.output)
    rewards = build_rewards([RewardSpec(verifier=args.verifier, options=reads)], where="--verifier")
    options: dict[str, Any] = {"samples": args.samples, "best_of": args.best_of, "separator": separator}
    options |= {"per_prompt": args.per_prompt, "plain_text": args.plain_text}
    work = Steps(
        sources(args)[0],
        model.name,
        _verify(rewards),
        (args.answer,),
        sampling=how,
        go_on=prompts[CONTINUE.id],
        **options,
    )
    more = {"verifier": args.verifier, "verifier_options": reads, **asdict(how), **said(prompts.values())}
    try:
        asking(args, model, work, {**options, **more})
    finally:
        rewards.close()


def _verify(rewards: Any) -> Verify:
    def verify(prompt: Any, texts: Sequence[str], fields: Mapping[str, Any]) -> list[float | None]:
        columns = {name: [fields[name]] * len(texts) for name in rewards.columns}
        scored = rewards([prompt] * len(texts), list(texts), columns=columns, groups=[0] * len(texts))
        return [one.reward for one in scored]

    return verify


COMMANDS = {
    "spar": Command("failed answers, refined in a tree until a judge passes one", _add_spar, _spar),
    "self_rewarding": Command("the best of a set over the worst, by own points", _add_self_rewarding, _self_rewarding),
    "pu_rl": Command("candidates ranked by how they compare with a good answer", _add_pu_rl, _pu_rl),
    "steps": Command("wrong solutions up to their first pit, by the values of their steps", _add_steps, _steps),
}
