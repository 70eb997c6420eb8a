"""Metrics: the numbers by hand, no host synchronisation, one exchange between ranks, honest rates."""

import math
import time
from pathlib import Path

import pytest
import torch
from forked import Job
from heads_support import change, random_input
from transformers import LlamaConfig, LlamaForCausalLM

from po.forest import pad, plant
from po.heads import HEADS
from po.logprob import Scores
from po.metrics import Meter, names, preference_metrics, sides
from po.objective import counted, objective, scope
from po.spec import Term
from po.speed import Cost, Speed, peak_flops, peak_gib
from po.types import HeadInput, Segments
from po.whole import moved


def seg(lengths: list[list[int]], device: str = "cpu") -> Segments:
    """Token counts per group and response; 0 marks no response."""
    K = max(map(len, lengths))
    slot = [g * K + k for g, row in enumerate(lengths) for k, n in enumerate(row) for _ in range(n)]
    valid = [[k < len(row) and row[k] > 0 for k in range(K)] for row in lengths]
    return Segments(torch.tensor(slot, device=device), torch.tensor(valid, device=device))


def read(x: HeadInput, heads: list[str], scores: Scores | None = None, **kw) -> dict[str, float]:
    terms = [Term(HEADS[h](**kw)) for h in heads]
    counts = {scope(t.head.needs): float(counted(x, scope(t.head.needs)).sum()) for t in terms}
    meter = Meter()
    for metric in preference_metrics(x, terms, objective(terms, x, counts), scores):
        meter.add(*metric)
    return meter.flush()


def test_pairs_by_hand():
    x = HeadInput(seg([[2, 1], [1, 2]]), torch.tensor([-1.0, -2, -4, -1, -3, -1]), ref=torch.full((6,), -2.0))
    got = read(x, ["dpo"], beta=0.5)
    # log-ratios: group 0: +1+0 = 1 and -2; group 1: +1 and -1+1 = 0
    assert got["rewards/chosen"] == 0.5
    assert got["rewards/rejected"] == -0.5
    assert got["rewards/margins"] == 1.0
    assert got["rewards/accuracies"] == 1.0
    assert got["rewards/ties"] == 0.0
    assert got["logps/chosen"] == -2.0
    assert got["logps/rejected"] == -4.0
    assert got["lengths/chosen"] == 1.5
    assert got["kl/seq"] == pytest.approx((1 - 2 + 1 + 0) / 4)
    assert got["kl/token"] == pytest.approx(0 / 6)
    assert got["loss/dpo"] == pytest.approx((math.log1p(math.exp(-1.5)) + math.log1p(math.exp(-0.5))) / 2)
    assert "sets/accuracy" not in got


def test_ties_count_one_half():
    x = HeadInput(seg([[1, 1], [1, 1]]), torch.tensor([-1.0, -1, -1, -2]), ref=torch.full((4,), -1.0))
    got = read(x, ["dpo"])
    assert got["rewards/accuracies"] == 0.75
    assert got["rewards/ties"] == 0.5


def test_sets_by_hand_with_a_missing_response():
    reward = torch.tensor([[0.0, 2, 1], [3, 3, 1e6]])
    x = HeadInput(
        seg([[1, 1, 1], [1, 1, 0]]), torch.tensor([-3.0, -1, -2, -1, -5]), torch.full((5,), -2.0), reward=reward
    )
    chosen_GK, rejected_GK = sides(x, [Term(HEADS["infonca"]())])
    assert chosen_GK.tolist() == [[False, True, False], [True, False, False]]
    assert rejected_GK.tolist() == [[True, False, False], [False, True, False]]
    got = read(x, ["infonca"], beta=1.0)
    assert got["sets/accuracy"] == 1.0  # 2 > 1, 2 > 0, 1 > 0; equal rewards order nothing
    assert got["rewards/margins"] == pytest.approx((2 + 4) / 2)
    assert got["lengths/mean"] == 1.0
    assert got["logps/rejected"] == pytest.approx((-3 - 5) / 2)


def test_fillers_count_for_nothing():
    x = HeadInput(seg([[1, 1], [1, 1]]), torch.tensor([-1.0, -2, -50, -60]), ref=torch.full((4,), -1.5))
    only = HeadInput(Segments(torch.tensor([0, 1]), torch.tensor([[True, True]])), x.policy_T[:2], ref=x.ref[:2])
    dead = HeadInput(Segments(x.seg.slot_T, torch.tensor([[True, True], [False, False]])), x.policy_T, ref=x.ref)
    assert read(dead, ["dpo"]) == read(only, ["dpo"])


def test_demonstrations_and_no_reference():
    x = HeadInput(seg([[2], [1]]), torch.tensor([-1.0, -2, -4]))
    scores = Scores(x.policy_T, torch.tensor([1.0, 2, 3]), torch.tensor([True, False, True]))
    got = read(x, ["sft"], scores)
    assert got == pytest.approx(
        {"logps/chosen": -3.5, "lengths/chosen": 1.5, "loss/sft": 7 / 3, "entropy": 2.0, "mean_token_accuracy": 2 / 3}
    )


def test_token_accuracy_is_of_the_chosen_like_trl():
    x = HeadInput(seg([[1, 2]]), torch.tensor([-1.0, -1, -1]), ref=torch.zeros(3))
    scores = Scores(x.policy_T, torch.ones(3), torch.tensor([True, False, False]))
    assert read(x, ["dpo"], scores)["mean_token_accuracy"] == 1.0


def test_head_metrics_carry_the_terms_name():
    terms = [Term(HEADS["ipo"]()), Term(HEADS["sft"]()), Term(HEADS["ipo"]())]
    assert names(terms) == ["ipo", "sft", "ipo_2"]
    x = HeadInput(seg([[1, 1]]), torch.tensor([-1.0, -2]), ref=torch.tensor([-1.0, -1]))
    got = read(x, ["ipo", "ipo"])
    assert got["ipo/target_gap"] == got["ipo_2/target_gap"]
    assert got["loss/ipo"] == got["loss/ipo_2"]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_no_host_synchronisation(name: str):
    """Meta tensors hold no values: any read of one on the host raises."""
    head = HEADS[name]()
    x = moved(random_input(head), "meta")
    T = x.policy_T.numel()
    scores = Scores(x.policy_T, x.policy_T, torch.empty(T, dtype=torch.bool, device="meta"))
    named = {kind: {f"0.{name}": gate for name, gate in getattr(x, kind).items()} for kind in ("gates", "old_gates")}
    y = change(x, **named)
    parts = objective([Term(head)], y, {scope(head.needs): 2.0}, [x.state])
    meter = Meter()
    for metric in preference_metrics(x, [Term(head)], parts, scores):
        meter.add(*metric)


def test_meter_weighs_by_count_and_keeps_totals_and_peaks():
    meter = Meter()
    meter.add("a", torch.tensor([1.0, 2, 3]))
    meter.add("a", torch.tensor([[10.0, float("nan")]]), torch.tensor([[True, False]]))
    meter.add("none", torch.tensor([5.0]), torch.tensor([False]))
    meter.total("n", 2)
    meter.total("n", 3)
    meter.peak("m", 7)
    meter.peak("m", 4)
    assert meter.flush() == {"a": 4.0, "m": 7, "n": 5}
    assert meter.flush() == {}


def two_ranks() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, meter = dist.get_rank(), Meter()
    meter.add("both", torch.tensor([1.0] if rank else [4.0, 4.0, 4.0]))
    meter.add(f"only{rank}", torch.tensor([float(rank)]))
    meter.total("n", 1 + rank)
    meter.peak("m", rank)
    assert meter.flush() == {"both": 13 / 4, "only0": 0.0, "only1": 1.0, "n": 3.0, "m": 1.0}, rank


def test_two_ranks_with_different_names(tmp_path: Path):
    job = Job(tmp_path / "log", two_ranks, world=2)
    assert job.wait(60) == [0, 0], job.said


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_flops_by_hand():
    model = tiny()
    body = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16) + 16  # attention, feed-forward, norms
    assert Cost.of(model) == Cost(6.0 * body, 6.0 * 50 * 16, 12.0 * 16 * 2)
    model.requires_grad_(False)
    assert Cost.of(model).position == 4.0 * body
    groups = [([1, 2, 3], [[4, 5], [6]])]
    # trunk of 2 sees 1 + 2; branches see 3 + 4 and 3
    assert Cost(1, 0, 0)(plant(groups, 2)) == 5
    assert Cost(0, 0, 1)(plant(groups, 2)) == 3 + 7 + 3
    assert Cost(0, 1, 0)(plant(groups, 2)) == 3
    assert Cost(1, 0, 0)(pad(groups, 2)) == 4 + 3
    assert Cost(0, 0, 1)(pad(groups, 2)) == 10 + 6


def test_speed_leaves_out_what_is_paused():
    meter, speed = Meter(), Speed(tiny(), torch.device("cpu"), torch.float32)
    stream = plant([([1, 2, 3], [[4, 5], [6]])], 2)
    speed.put(meter)
    meter.flush()
    speed.count([stream, stream])
    with speed.paused():
        time.sleep(0.3)
    speed.put(meter)
    found = meter.flush()
    assert found["perf/seconds"] < 0.2
    assert speed.rates(found) == 10
    assert sorted(found) == ["perf/mfu", "perf/peak_gib", "perf/tokens_per_s"]
    assert 0 < found["perf/mfu"] < 1
    assert found["perf/tokens_per_s"] > 50


def test_peaks_are_of_this_machine():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14
    assert 0.05 < peak_gib(torch.device("cpu")) < 64
