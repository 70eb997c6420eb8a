"""TRL's GRPO in po's terms: names that need each other, so that a table cannot translate them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from po.recipe.fields import shown
from po.recipe.losses import OFF, Tree, listed
from po.recipe.peers import Handler
from po.recipe.report import Report

THEIRS = ("num_generations", "reward_funcs", "reward_model_name_or_path")  # who writes these, means GRPO
_REGISTRY = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
_NO_SAMPLING = {
    "max_completion_length": "po limits prompt + response (data.max_length) and the prompt (data.max_prompt_length)",
}
_PLAIN = "it says how responses are sampled, and the recipe has no section `rollout`"


def _section(tree: Tree, name: str) -> Tree:
    tree[name] = dict(tree[name]) if isinstance(tree.get(name), dict) else {}
    section: Tree = tree[name]
    return section


def _put(tree: Tree, section: str, name: str, value: Any, key: str, report: Report, remark: str = "") -> None:
    if tree.get(section) is not None and not isinstance(tree[section], dict):
        return  # not a mapping: reported where sections are parsed
    given = _section(tree, section)
    if name in given:
        report.wrong((key,), f"is another name of {section}.{name}, which the recipe gives as well; keep one of them.")
        return
    given[name] = value
    report.origin[section, name] = f"given as {key}"
    report.note(f"{key}: translated to {section}.{name}: {shown(value)}{remark}")


def _sampling(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """temperature, top_p, top_k, max_completion_length, num_iterations, num_generations."""
    if not samples(tree, said):
        if value not in OFF and (key, value) not in (("temperature", 1), ("top_p", 1), ("num_iterations", 1)):
            report.wrong((key,), f"cannot be translated: {_NO_SAMPLING.get(key, _PLAIN)}.")
    elif value is not None:
        _put(tree, "rollout", key, value, key, report)
    if key == "num_generations":
        _batches(tree, value, said, report)


def samples(tree: Tree, said: Mapping[str, Any]) -> bool:
    """Whether the recipe samples: only then do names like `temperature` belong to the rollout."""
    return tree.get("rollout") is not None or any(said.get(k) is not None for k in THEIRS)


def _batches(tree: Tree, generations: Any, said: Mapping[str, Any], report: Report) -> None:
    """TRL counts completions on a device, and gathers groups over devices and accumulation; po counts prompts."""
    key, size, times = "per_device_train_batch_size", said.get("per_device_train_batch_size"), _accumulation(said)
    if not isinstance(size, int) or not isinstance(generations, int) or min(size, generations) < 1 or times is None:
        return  # not given, or reported where sections are parsed
    train = _section(tree, "train")
    whole, rest = divmod(size, generations)
    per_step, uneven = divmod(size * times, generations)
    if rest and uneven:
        report.wrong(
            (key,),
            f"cannot be translated: TRL's {size} completions x gradient_accumulation_steps {times} hold no whole "
            f"number of groups of {generations} per device; po's counts prompts. Write train.{key}.",
        )
        return
    prompts, steps = (whole, times) if not rest else (1, per_step)
    train |= {key: prompts, "gradient_accumulation_steps": steps}
    more = "; max_tokens_per_forward splits a prompt's samples where memory is short" if rest else ""
    report.note(
        f"{key}: TRL's {size} completions x {times} are {prompts} prompts of {generations} x {steps} in po, which "
        f"counts prompts (train.{key}, train.gradient_accumulation_steps){more}"
    )


def _accumulation(said: Mapping[str, Any]) -> int | None:
    times = said.get("gradient_accumulation_steps", 1)
    return times if isinstance(times, int) and times > 0 else None


def _steps(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """TRL's steps are micro-batches, po's are the optimizer's."""
    times = _accumulation(said)
    if value is None:
        return
    if not samples(tree, said):
        report.wrong((key,), f"cannot be translated: {_PLAIN}.")
    elif not isinstance(value, int) or times is None or value % times:
        report.wrong(
            (key,),
            f"cannot be translated: TRL's {shown(value)} micro-batches are no whole number of optimizer steps "
            f"(gradient_accumulation_steps {times}); write rollout.steps_per_generation, which counts these.",
        )
    else:
        remark = " (TRL counts micro-batches, po optimizer steps)"
        _put(tree, "rollout", "steps_per_generation", value // times, key, report, remark)


def _rewards(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """reward_model_name_or_path and reward_funcs in TRL's order, with reward_weights."""
    keys = [k for k in ("reward_model_name_or_path", "reward_funcs") if said.get(k) is not None]
    if not keys:
        if value not in OFF:
            report.wrong((key,), "weighs reward_funcs, which are missing; write `rollout: {rewards: ...}`.")
        return
    if key != keys[0]:
        return
    found = [_reward(one, k, report) for k in keys for one in listed(said[k])]
    weights = said.get("reward_weights")
    if weights is not None and len(listed(weights)) != len(found):
        report.wrong(("reward_weights",), f"expected a weight for each of {len(found)} rewards, got {shown(weights)}.")
        return
    for one, weight in zip(found, listed(weights) if weights is not None else (), strict=False):
        one["weight"] = weight
    _put(tree, "rollout", "rewards", found, key, report)


def _reward(one: Any, key: str, report: Report) -> Tree:
    if one == "get_soft_overlong_punishment":
        return {"verifier": "soft_overlong", "options": {"max_length": 1280, "cache": 256}}  # TRL's values
    if one in _REGISTRY:
        return {"function": f"trl.rewards:{one}"}
    if key == "reward_model_name_or_path" or (isinstance(one, str) and "/" in one and ":" not in one):
        return {"model": one}
    if isinstance(one, str) and ":" in one:
        return {"function": one}
    module, _, name = str(one).rpartition(".")
    if not module:
        report.wrong(
            (key,),
            f"cannot be translated: {shown(one)} is no function of TRL's and no import path. Write `rollout: "
            "{rewards: {verifier: ...}}`, or `function: rewards.py:name`; docs/rewards.md lists what there is.",
        )
    return {"function": f"{module}:{name}"}


def _server(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """use_vllm and vllm_mode with the address, as a URL or as host and port."""
    first = next(k for k in _SERVER if k in said)
    if key != first:
        return
    named = any(said.get(k) is not None for k in _SERVER[2:])
    if said.get("use_vllm") in OFF:
        report.note(f"{key}: {shown(value)}; without use_vllm the policy itself samples")
    elif said.get("vllm_mode", "server" if named else "colocate") != "server":
        report.wrong(
            ("use_vllm",),
            "cannot be translated: po shares no process with vLLM. Leave it out (the policy itself samples), or start "
            "a server and write `rollout: {server: http://localhost:8000}`.",
        )
    else:
        host, port = said.get("vllm_server_host") or "0.0.0.0", said.get("vllm_server_port") or 8000
        _put(tree, "rollout", "server", said.get("vllm_server_base_url") or f"http://{host}:{port}", key, report)


def _correction(tree: Tree, key: str, value: Any, said: Mapping[str, Any], report: Report) -> None:
    """TRL's truncated importance weights; its masks have no counterpart."""
    on, mode = said.get("vllm_importance_sampling_correction", True), said.get("vllm_importance_sampling_mode")
    cap = said.get("vllm_importance_sampling_clip_max", said.get("vllm_importance_sampling_cap", 3.0))
    if key != next(k for k in _CORRECTIONS if k in said):
        return
    server = said.get("use_vllm") not in OFF or (tree.get("rollout") or {}).get("server")
    if not on or not server:
        report.note(f"{key}: {shown(value)}; nothing is corrected (rollout.correction: none)")
    elif mode in ("token_truncate", "sequence_truncate") and cap is not None:
        _put(tree, "rollout", "correction", mode.partition("_")[0], key, report)
        _put(tree, "rollout", "correction_cap", cap, key, report)
    else:
        report.wrong(
            (key,),
            "cannot be translated: TRL's default mode masks responses, po's weights are truncated. Write "
            "`rollout: {correction: token}` or `sequence`, or vllm_importance_sampling_mode: token_truncate.",
        )


_SERVER = ("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port")
_CORRECTIONS = (
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
)
HANDLERS: dict[str, Handler] = {
    "reward_model_name_or_path": _rewards,
    "reward_funcs": _rewards,
    "reward_weights": _rewards,
    **dict.fromkeys(
        ("num_generations", "max_completion_length", "temperature", "top_p", "top_k", "num_iterations"), _sampling
    ),
    "steps_per_generation": _steps,
    **dict.fromkeys(_SERVER, _server),
    **dict.fromkeys(_CORRECTIONS, _correction),
}
