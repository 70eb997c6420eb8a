"""Reward models: tiny real ones, against plain forwards of one sequence at a time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import WORDS, make_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from po.errors import UserError
from po.rewards import Rewards, build_rewards
from po.rewards.ordinal import expected_ratings
from po.spec import RewardSpec

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
EOS = 2


def classifier(folder: Path) -> Path:
    make_model(folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    classifier(root / "rm")
    for name, seed in (("policy", 1), ("reference", 2)):
        folder = make_model(root / name, seed=seed, initializer_range=0.3)
        assert folder.is_dir()
    return root


def rows(n: int = 9) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(2 * n)]
    return [t + " " for t in texts[:n]], texts[n:]


def build(model: Path, **options: Any) -> Rewards:
    return build_rewards([RewardSpec(model=str(model), name="m", options={"dtype": "float32"} | options)])


def numbers(rewards: Rewards, prompts: Any, completions: Any) -> list[float]:
    scored = rewards(prompts, completions)
    assert not rewards.counts, rewards.texts
    return [float(s.reward or 0) for s in scored]


def ids_of(folder: Path, text: str) -> list[int]:
    return [1, *AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]]


def test_classifier_whatever_the_batch(models: Path) -> None:
    prompts, completions = rows()
    net = AutoModelForSequenceClassification.from_pretrained(models / "rm").eval()
    plain = []
    with torch.no_grad():
        for p, c in zip(prompts, completions):
            ids = torch.tensor([[*ids_of(models / "rm", p + c), EOS]])
            plain.append(float(net(input_ids=ids).logits[0, 0]))
    assert max(plain) - min(plain) > 0.1
    for size in (1, 4, 16):
        assert numbers(build(models / "rm", batch_size=size), prompts, completions) == pytest.approx(plain, abs=1e-5)
    turned = numbers(build(models / "rm", batch_size=4), prompts[::-1], completions[::-1])
    assert turned[::-1] == pytest.approx(plain, abs=1e-5)


def test_classifier_without_a_padding_token(models: Path, tmp_path: Path) -> None:
    prompts, completions = rows(5)
    wanted = numbers(build(models / "rm"), prompts, completions)
    folder = shutil.copytree(models / "rm", tmp_path / "rm")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"pad_token_id": 0', '"pad_token_id": null'))
    assert numbers(build(folder), prompts, completions) == pytest.approx(wanted, abs=1e-5)


def test_classifier_renders_conversations_with_its_own_template(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "rm", tmp_path / "rm")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    net = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = tokenizer("user w1 w2 </s> assistant w3 </s>", add_special_tokens=False)["input_ids"]
        plain = float(net(input_ids=torch.tensor([ids])).logits[0, 0])
    prompt = [{"role": "user", "content": "w1 w2"}]
    assert numbers(build(folder), [prompt], [[{"role": "assistant", "content": "w3"}]]) == pytest.approx(
        [plain], abs=1e-5
    )


def test_too_long_is_not_scored(models: Path) -> None:
    rewards = build(models / "rm", max_length=5)
    scored = rewards(["w1 ", "w1 "], ["w2", "w2 w3 w4 w5"])
    assert scored[0].reward is not None
    assert scored[1].problems == ("m/overlong: 7 tokens; the model takes 5",)
    assert rewards.counts == {"m/overlong": 1, "unscored": 1}


def logp(net: Any, prompt: list[int], response: list[int]) -> float:
    logits = net(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum())


@torch.no_grad()
def test_implicit_reward(models: Path) -> None:
    prompts, completions = rows()
    policy, reference = (AutoModelForCausalLM.from_pretrained(models / n).eval() for n in ("policy", "reference"))
    plain = []
    for p, c in zip(prompts, completions):
        prompt, whole = ids_of(models / "policy", p), [*ids_of(models / "policy", p + c), EOS]
        response = whole[len(prompt) :]
        plain.append(0.3 * (logp(policy, prompt, response) - logp(reference, prompt, response)))
    assert max(map(abs, plain)) > 1
    for size in (1, 4):
        options = {"kind": "implicit", "beta": 0.3, "reference": str(models / "reference"), "batch_size": size}
        found = numbers(build(models / "policy", **options), prompts, completions)
        assert found == pytest.approx(plain, abs=1e-4)


def test_implicit_reward_of_an_adapter(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(models / "policy")
    net = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    net.save_pretrained(tmp_path / "adapter")
    merged = net.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(models / "policy").save_pretrained(tmp_path / "merged")
    prompts, completions = rows(4)
    wanted = {"kind": "implicit", "reference": str(models / "policy")}
    whole = numbers(build(tmp_path / "merged", **wanted), prompts, completions)
    found = numbers(build(models / "policy", kind="implicit", adapter=str(tmp_path / "adapter")), prompts, completions)
    assert found == pytest.approx(whole, abs=1e-4)
    assert max(map(abs, found)) > 0.01


@torch.no_grad()
def test_ordinal_reward(models: Path) -> None:
    ratings = ["w1", "w2", "w3"]
    options = {"kind": "ordinal", "ratings": ratings, "template": "w9 {prompt} w8 {completion} w7 "}
    prompts, completions = ["w20", "w21 w22 w23"], ["w30", "w31"]
    net = AutoModelForCausalLM.from_pretrained(models / "policy").eval()
    rated = ids_of(models / "policy", " ".join(ratings))[1:]
    plain = []
    for p, c in zip(prompts, completions):
        logits = net(input_ids=torch.tensor([ids_of(models / "policy", f"w9 {p} w8 {c} w7")])).logits[0, -1, rated]
        plain.append(float((logits.double().softmax(-1) * torch.tensor([1.0, 2.0, 3.0])).sum()))
    assert abs(plain[0] - plain[1]) > 0.01
    assert numbers(build(models / "policy", **options), prompts, completions) == pytest.approx(plain, abs=1e-5)


def test_expected_rating_vector() -> None:
    logits_NS = torch.tensor([[0.0, 0.8, -0.7], [0.0, -0.8, -0.9]], dtype=torch.float64)
    assert expected_ratings(logits_NS).tolist() == pytest.approx([1.864751, 1.680246], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("language", {}, "lack 'score.weight', which would start at random; expected a reward model"),
        ("policy", {}, r"has 2 labels; expected a reward model with one \(num_labels 1\)"),
        ("pickled", {}, "has only pickled weights"),
        ("absent", {}, r"rollout.rewards\[0\].model: there is no folder"),
        ("policy", {"kind": "implicit"}, "needs a reference: write options.reference"),
        ("policy", {"kind": "implicit", "reference": "small"}, "have different vocabularies"),
        ("policy", {"kind": "ordinal"}, "options.template: is missing"),
        ("policy", {"kind": "ordinal", "template": "{prompt}"}, "options.template: expected {prompt} and {completion}"),
        (
            "policy",
            {"kind": "ordinal", "template": "{prompt} {completion} ", "ratings": ["w1 w2"]},
            "'w1 w2' is not one token",
        ),
        ("policy", {"kind": "judge"}, "expected one of classifier, implicit, ordinal, got 'judge'"),
        ("rm", {"beta": 0.1}, "options.beta: unknown option"),
    ],
)
def test_models_that_cannot_work_are_refused(models: Path, name: str, options: dict[str, Any], message: str) -> None:
    if name == "language":
        shutil.copytree(models / "policy", models / name)
        shutil.copy(models / "rm" / "config.json", models / name)
    if name == "pickled":
        shutil.copytree(models / "rm", models / name)
        (models / name / "model.safetensors").rename(models / name / "pytorch_model.bin")
    if options.get("reference") == "small":
        net = AutoModelForCausalLM.from_pretrained(models / "reference")
        net.resize_token_embeddings(50)
        net.save_pretrained(models / "small")
        options = options | {"reference": str(models / "small")}
    with pytest.raises(UserError, match=message):
        build(models / name, **options)


def test_a_timeout_has_no_effect_on_a_model(models: Path) -> None:
    with pytest.raises(UserError, match="timeout: has no effect on a model"):
        build_rewards([RewardSpec(model=str(models / "rm"), timeout=5)])
