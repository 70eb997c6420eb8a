"""What reads a group or other rewards: worked vectors, and the properties that the papers' entries name."""

from __future__ import annotations

import itertools

import pytest

from po.rewards import build_rewards
from po.rewards.group import (
    anchor_ranking,
    contrast_mask,
    contrastive_rewards,
    correct_length,
    first_pit,
    pairwise_ranking,
    rank_normalised,
    step_advantages,
)
from po.spec import RewardSpec


def test_contrast_mask() -> None:
    helps = ([1, 1, 0, 0], [True, True, False, False])
    hurts = ([0, 0, 1, 1], [True, True, False, False])
    neutral = ([1, 0, 1, 0], [True, True, False, False])
    alone = ([1, 0, 1, 0], [True] * 4)
    assert [contrast_mask(a, b, 0.1) for a, b in (helps, hurts, neutral, alone)] == [1, -1, 0, 0]
    for accuracy in itertools.product([0.0, 0.5, 1.0], repeat=4):
        for behaviour in itertools.product([True, False], repeat=4):
            mask = contrast_mask(accuracy, behaviour, 0.3)
            assert mask == -contrast_mask(accuracy, [not b for b in behaviour], 0.3)
            assert mask == 0 or len(set(behaviour)) == 2


def test_contrastive_rewards_vector() -> None:
    assert contrastive_rewards([1.2, 0.3], [[0.5, 0.1, 0.3], [1, 0.8, 0.9]]) == pytest.approx([0.9, -0.6])
    with pytest.raises(ValueError, match="expected a list of finite baseline rewards"):
        contrastive_rewards([1.0], [[]])


def test_steps_vector() -> None:
    values = [0.8, 0.4, 0.4, 0.0]
    assert step_advantages(0.6, values) == pytest.approx([0.2, -0.4, 0.0, -0.4])
    assert sum(step_advantages(0.6, values)) == pytest.approx(values[-1] - 0.6)
    assert first_pit(values) == 3  # step 4
    assert first_pit([0.8, 0.4, 0.4]) == 1


def test_correct_length() -> None:
    assert [correct_length(n, True, 10, 0.5) for n in (0, 5, 10, 99)] == [0, 0.25, 0.5, 0.5]
    assert correct_length(5, False, 10, 0.5) == 0


def test_anchor_ranking() -> None:
    assert rank_normalised([0.3, 0.9, 0.3, -1.0]) == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert rank_normalised([4.0]) == [0.5]
    first, second = [0.9, 0.2, 0.6, 0.5], [0.8, 0.1, 0.4, 0.5]
    rewards, alike = anchor_ranking(first, second)
    assert rewards == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert alike == [True, True, False, True]
    for order in itertools.permutations(range(4)):
        shuffled, _ = anchor_ranking([first[i] for i in order], [second[i] for i in order])
        assert shuffled == [rewards[i] for i in order]


def test_pairwise_ranking() -> None:
    judge = [[0, 0.9, 0.6], [0.2, 0, 0.3], [0.5, 0.8, 0]]  # [i][j]: i shown first
    rewards, agreement = pairwise_ranking(judge)
    assert rewards == [1.0, 0.0, 0.5]
    assert agreement == pytest.approx(2 / 3)  # of 0 and 2, one order says a tie
    for order in itertools.permutations(range(3)):
        shuffled, same = pairwise_ranking([[judge[i][j] for j in order] for i in order])
        assert (shuffled, same) == ([rewards[i] for i in order], agreement)


def test_shaping_reads_other_rewards_and_the_group() -> None:
    specs = [
        RewardSpec(verifier="exact", options={"pattern": r"\d+"}),
        RewardSpec(verifier="format", name="aux", weight=0.0, options={"pattern": "<aux>", "match": "anywhere"}),
        RewardSpec(verifier="group_contrast", weight=0.5, options={"accuracy": "exact", "behaviour": "aux"}),
        RewardSpec(verifier="correct_length", weight=2.0, options={"accuracy": "exact", "target": 4}),
        RewardSpec(verifier="contrastive"),
    ]
    rewards = build_rewards(specs)
    said = ["<aux> 18", "3", "<aux> 3", "18", "<aux> 18"]
    columns = {"answer": ["18"] * 4 + [None], "baseline_rewards": [[0, 1], [0, 1], None, [0.5], [1.0]]}
    scored = rewards(["p", "p", "r", "r", "p"], said, [[1], [1, 1], [1], [1, 1], [1]], columns)
    rewards.close()
    assert [s.parts["group_contrast"] for s in scored] == [1.0, 0.0, -1.0, 0.0, None]
    assert [s.parts["correct_length"] for s in scored] == [0.25, 0.0, 0.0, 0.5, None]
    assert [s.parts["contrastive"] for s in scored] == [-0.5, -0.5, None, -0.5, -1.0]
    assert [s.reward for s in scored] == [1 + 0.5 + 0.5 - 0.5, -0.5, -0.5, 1 + 1 - 0.5, -1.0]


def test_groups_are_the_callers_where_it_says() -> None:
    specs = [
        RewardSpec(verifier="exact", name="a", weight=0.0),
        RewardSpec(verifier="exact", name="b", weight=0.0, options={"column": "other"}),
        RewardSpec(verifier="anchor_rank", options={"first": "a", "second": "b"}),
    ]
    rewards = build_rewards(specs)
    columns = {"answer": ["1", "2", "1", "1"], "other": ["1", "2", "1", "2"]}
    found = rewards(["p"] * 4, ["1"] * 4, columns=columns, groups=[7, 7, 8, 8])
    assert [s.reward for s in found] == [1.0, 0.0, 1.0, 0.0]
    assert rewards.counts == {"anchor_rank/orders_disagree": 1}
    columns["other"] = ["1", "2", "1", None]
    found = rewards(["p"] * 4, ["1"] * 4, columns=columns, groups=[7, 7, 8, 8])
    assert [s.reward for s in found] == [1.0, 0.0, 0.5, None]
    rewards.close()


def test_shaping_over_a_failure_is_a_failure() -> None:
    specs = [
        RewardSpec(verifier="exact", weight=0.0),
        RewardSpec(verifier="correct_length", options={"accuracy": "exact", "target": 4}),
    ]
    rewards = build_rewards(specs)
    (scored,) = rewards(["p"], ["1"], [[1]])
    rewards.close()
    assert scored.reward is None
    assert scored.problems[1] == "correct_length/raised: the reward 'exact' that it reads failed"
