"""TRL's recipes for GRPO: names moved to the rollout, losses as heads, the rest refused with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from po.errors import UserError
from po.heads.cispo import CISPO
from po.heads.dapo import DAPO
from po.heads.dr_grpo import DrGRPO
from po.heads.grpo import GRPO
from po.heads.grpo_kl import GRPOKL
from po.heads.gspo import GSPO
from po.heads.luspo import LUSPO
from po.heads.rloo import RLOO
from po.heads.sapo import SAPO
from po.heads.vespo import VESPO
from po.recipe import load
from po.spec import RewardSpec, Term
from po.types import Head

BASE = "model: m\ndata: prompts.jsonl\noutput_dir: runs/x\n"
ONLINE = BASE + "num_generations: 8\nreward_funcs: [rewards.py:right]\nmax_completion_length: 512\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "theirs.yaml"
    path.write_text(text, "utf-8")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as e:
        load(path)
    return str(e.value)


def test_a_whole_recipe(tmp_path: Path) -> None:
    recipe, notes = load(
        write(
            tmp_path,
            """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/DeepMath-103K
loss_type: dapo
epsilon: 0.2
epsilon_high: 0.28
beta: 0.0
num_generations: 8
per_device_train_batch_size: 4
gradient_accumulation_steps: 4
steps_per_generation: 8
num_iterations: 2
max_completion_length: 1024
max_prompt_length: 512
temperature: 0.9
top_p: 0.95
top_k: 0
reward_model_name_or_path: org/rm
reward_funcs: [accuracy_reward, get_soft_overlong_punishment, my.rewards.polite]
reward_weights: [0.5, 1.0, 0.1, 0.2]
use_vllm: true
vllm_mode: server
vllm_server_host: 10.0.0.1
vllm_gpu_memory_utilization: 0.3
vllm_importance_sampling_correction: true
vllm_importance_sampling_mode: token_truncate
vllm_importance_sampling_clip_max: 3.0
scale_rewards: group
importance_sampling_level: token
sapo_temperature_pos: 1.0
mask_truncated_completions: false
log_completions: true
shuffle_dataset: false
output_dir: out
""",
        )
    )
    assert recipe.loss == (Term(DAPO(epsilon_low=0.2, epsilon_high=0.28, eps=1e-4)),)
    rollout = recipe.rollout
    assert rollout is not None
    assert rollout.rewards == (
        RewardSpec(model="org/rm", weight=0.5),
        RewardSpec(function="trl.rewards:accuracy_reward"),
        RewardSpec(verifier="soft_overlong", weight=0.1, options={"max_length": 1280, "cache": 256}),
        RewardSpec(function="my.rewards:polite", weight=0.2),
    )
    wanted = {"num_generations": 8, "max_completion_length": 1024, "temperature": 0.9, "top_p": 0.95, "top_k": 0}
    wanted |= {"steps_per_generation": 2, "num_iterations": 2, "server": "http://10.0.0.1:8000"}
    wanted |= {"correction": "token", "correction_cap": 3.0}
    assert {k: v for k, v in dataclasses.asdict(rollout).items() if k in wanted} == wanted
    train = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
    }
    assert {k: recipe.train[k] for k in train} == train
    assert recipe.data.max_prompt_length == 512
    for note in (
        "steps_per_generation: translated to rollout.steps_per_generation: 2 "
        "(TRL counts micro-batches, po optimizer steps)",
        "use_vllm: translated to rollout.server: 'http://10.0.0.1:8000'",
        "mask_truncated_completions: false asks for nothing and is left out",
        "log_completions: has no effect; po keeps every sample, with its rewards, in the run's folder rollouts",
    ):
        assert note in notes
    assert any(
        n.startswith("per_device_train_batch_size: TRL's 4 completions x 4 are 1 prompts of 8 x 2") for n in notes
    )


@pytest.mark.parametrize(
    ("text", "head"),
    [
        ("loss_type: grpo", GRPO(eps=1e-4)),
        ("loss_type: grpo\nbeta: 0.0\nepsilon: 0.1\ndelta: 4.0", GRPO(0.1, 0.1, delta=4.0, eps=1e-4)),
        ("loss_type: grpo\nbeta: 0.04\nscale_rewards: false", GRPOKL(beta=0.04, scale="none", eps=1e-4)),
        (
            "loss_type: grpo\nimportance_sampling_level: sequence\nepsilon: 3.0e-4\nepsilon_high: 4.0e-4",
            GSPO(epsilon_low=3e-4, epsilon_high=4e-4, eps=1e-4),
        ),
        ("loss_type: bnpo", DAPO(epsilon_high=0.2, eps=1e-4)),
        ("loss_type: dapo\nscale_rewards: true", DAPO(epsilon_high=0.2, eps=1e-4)),
        ("loss_type: [dapo]", DAPO(epsilon_high=0.2, eps=1e-4)),
        ("loss_type: dr_grpo\nscale_rewards: none", DrGRPO(max_completion_length=512)),
        ("loss_type: cispo\nepsilon_high: 5.0", CISPO(epsilon_low=1.0, epsilon_high=4.0, eps=1e-4)),
        ("loss_type: sapo\nsapo_temperature_neg: 1.1", SAPO(tau_neg=1.1, eps=1e-4)),
        (
            "loss_type: luspo\nimportance_sampling_level: sequence\nepsilon: 0.01",
            LUSPO(epsilon_low=0.01, epsilon_high=0.01, eps=1e-4),
        ),
        ("loss_type: vespo\nvespo_k_pos: 1.5\nepsilon: 0.2", VESPO(k_pos=1.5, eps=1e-4)),
        ("loss: rloo\nbeta: 0.1\nepsilon: 0.3", RLOO(beta=0.1, epsilon_low=0.3, epsilon_high=0.3)),
        ("loss: dapo\nepsilon: 0.1\nepsilon_high: 0.3", DAPO(epsilon_low=0.1, epsilon_high=0.3)),
        ("loss: dapo", DAPO()),
    ],
)
def test_losses(tmp_path: Path, text: str, head: Head) -> None:
    recipe, _ = load(write(tmp_path, f"{ONLINE}{text}\n"))
    assert recipe.loss == (Term(head),)


def test_where_a_loss_differs_the_note_says_how(tmp_path: Path) -> None:
    for text, said in (
        ("loss_type: bnpo", "po's mean over tokens is over the whole step, TRL's bnpo over each micro-batch alone"),
        ("loss_type: dr_grpo", "TRL does unless `scale_rewards: none` stands beside it"),
        ("loss_type: grpo\nbeta: 0.1", "TRL 1.16 multiplies it with the ratio unless `use_bias_correction_kl: false`"),
    ):
        assert any(said in n for n in load(write(tmp_path, f"{ONLINE}{text}\n"))[1])


@pytest.mark.parametrize(
    ("size", "accumulation", "ours"), [(16, 1, (2, 1)), (8, 3, (1, 3)), (2, 8, (1, 2)), (4, 2, (1, 1))]
)
def test_completions_are_counted_as_prompts(
    tmp_path: Path, size: int, accumulation: int, ours: tuple[int, int]
) -> None:
    text = f"loss_type: dapo\nper_device_train_batch_size: {size}\ngradient_accumulation_steps: {accumulation}\n"
    train = load(write(tmp_path, ONLINE + text))[0].train
    assert (train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == ours


def test_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, ONLINE + "loss_type: dapo\n")
    recipe, _ = load(path, ["temperature=0.7", "epsilon_high=0.3", "num_generations=4"])
    assert recipe.rollout is not None
    assert (recipe.rollout.temperature, recipe.rollout.num_generations) == (0.7, 4)
    assert recipe.loss == (Term(DAPO(epsilon_low=0.2, epsilon_high=0.3, eps=1e-4)),)


def test_names_of_sampling_do_not_make_a_recipe_sample(tmp_path: Path) -> None:
    recipe, _ = load(write(tmp_path, BASE + "loss: dpo\ntemperature: 1.0\ntop_p: 1.0\ntop_k: 0\n"))
    assert recipe.rollout is None
    for name, value in (("temperature", 0.7), ("top_p", 0.9), ("num_iterations", 2), ("steps_per_generation", 2)):
        said = refusal(write(tmp_path, f"{BASE}loss: dpo\n{name}: {value}\n"))
        assert f"{name}: cannot be translated: it says how responses are sampled, and the recipe has no sectio" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "loss_type: dapo\nmask_truncated_completions: true",
            "give them less reward, e.g. with `{verifier: soft_overl",
        ),
        ("loss_type: dapo\nuse_vllm: true", "use_vllm: cannot be translated: po shares no process with vLLM."),
        ("loss_type: dapo\nuse_vllm: true\nvllm_mode: colocate", "po shares no process with vLLM"),
        ("loss_type: dapo\nbeta: 0.1", "beta: cannot be translated: of po's heads only 'grpo_kl' has GRPO's KL term"),
        ("loss_type: cispo", "epsilon_high: is 0.2; TRL's cispo caps the weight itself there; expected e.g. 5.0."),
        ("loss_type: dr_grpo\nscale_rewards: group", "scale_rewards: cannot be translated: Dr. GRPO does not scale;"),
        ("loss_type: dapo\nscale_rewards: batch", "po scales within a prompt's samples or not at all, got 'batch'"),
        ("loss_type: dapo\nimportance_sampling_level: sequence", "with 'dapo' po has no head for the level 'sequence'"),
        ("loss_type: luspo\nimportance_sampling_level: token", "with 'luspo' po has no head for the level 'token'"),
        ("loss_type: sapo\nepsilon: 0.3", "epsilon: no head of the recipe (sapo) has such a hyperparameter of GRPO's."),
        (
            "loss: {head: dapo, epsilon_low: 0.1}\nepsilon: 0.3",
            "epsilon: is another name of loss[0].epsilon_low, which",
        ),
        (
            "loss_type: dapo\nsteps_per_generation: 3\ngradient_accumulation_steps: 2",
            "no whole number of optimizer step",
        ),
        (
            "loss_type: dapo\nper_device_train_batch_size: 3",
            "completions x gradient_accumulation_steps 1 hold no whole",
        ),
        ("loss_type: dapo\nreward_weights: [1, 2]", "reward_weights: expected a weight for each of 1 rewards, got"),
        ("loss_type: dapo\nrollout: {rewards: {verifier: math}}", "reward_funcs: is another name of rollout.rewards"),
        (
            "loss_type: dapo\nrollout: {server: u}\nvllm_importance_sampling_correction: true",
            "TRL's default mode masks responses, po's weig",
        ),
        ("loss_type: dapo\nentropy_coef: 0.01", "entropy_coef: cannot be translated: po's heads have no entropy term."),
        ("loss_type: dapo\nmin_p: 0.1", "min_p: cannot be translated: po samples from softmax(logits / temperature)"),
        ("loss_type: dapo\nmulti_objective_aggregation: normalize_then_sum", "po adds up weight x reward first"),
        ("rl: grpo", "rl: axolotl's grpo is TRL's trainer; write the loss itself"),
        ("advantage_estimator: gae", "advantage_estimator: cannot be translated: write the head: gae is `ppo`"),
    ],
)
def test_what_cannot_be_translated_says_why(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write(tmp_path, f"{ONLINE}{text}\n"))


def test_rewards_that_nobody_knows(tmp_path: Path) -> None:
    said = refusal(write(tmp_path, BASE + "num_generations: 2\nreward_funcs: [accuracy]\nloss_type: dapo\n"))
    assert "reward_funcs: cannot be translated: 'accuracy' is no function of TRL's and no import path." in said
    said = refusal(write(tmp_path, BASE + "num_generations: 2\nreward_weights: [1.0]\nloss_type: dapo\n"))
    assert "reward_weights: weighs reward_funcs, which are missing;" in said
