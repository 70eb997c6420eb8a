"""Groups -> Batch: what the heads see, ragged K, fillers, another row's response, and no casting."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from po.batch import Batch, Collate, Groups, Wanted
from po.data.edits import edited
from po.data.layout import arrange
from po.data.rows import Example, Item, Other
from po.forest import Forest, Padded
from po.logp_store import LogpStore
from po.logprob import score
from po.policy import load_frozen
from po.ref_cache import RefCache
from po.sharing import share
from po.spec import ModelSpec

EXAMPLES = [
    Example("a", "f:1", (5, 6, 7), ((8, 9), (10,), (11, 12, 13)), reward=(0.5, 7.0625, 7.07)),
    Example("b", "f:2", (5,), ((14,), (15, 16)), reward=(1.0, 2.0)),
]
ITEMS = [Item(0, (2, 0, 1)), Item(1, (0, 1))]


def groups(*picks: tuple[int, bool]) -> list[tuple[Example, Item, bool]]:
    data = Groups(EXAMPLES, ITEMS)
    return [data[p] for p in picks]


def test_ragged_sets_in_item_order() -> None:
    batch = Collate()(groups((0, True), (1, True)))
    assert isinstance(batch.stream, Forest)
    assert batch.stream.target_T.tolist() == [11, 12, 13, 8, 9, 10, 14, 15, 16]
    assert batch.seg.slot_T.tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4]
    assert batch.seg.valid_GK.tolist() == [[True] * 3, [True, True, False]]
    assert batch.seg.length_GK.tolist() == [[3, 2, 1], [1, 2, 0]]
    assert batch.reward_GK is not None
    assert batch.reward_GK[0].tolist() == torch.tensor([7.07, 0.5, 7.0625]).tolist()
    assert batch.ids == ("a", "b")


def test_padded_stream_holds_the_same_tokens() -> None:
    shared, plain = (Collate(share_prefix=s)(groups((0, True), (1, True))) for s in (True, False))
    assert isinstance(plain.stream, Padded)
    assert plain.stream.target_T.tolist() == shared.stream.target_T.tolist()
    assert plain.seg.slot_T.tolist() == shared.seg.slot_T.tolist()


def test_reference_log_probs_follow_the_stream() -> None:
    collate = Collate(reference=lambda prompt, response: [-float(t) for t in response])
    batch = collate(groups((0, True), (1, True)))
    assert batch.ref_T is not None
    assert batch.ref_T.tolist() == [-float(t) for t in batch.stream.target_T.tolist()]


def test_filler_counts_for_nothing() -> None:
    batch = Collate()(groups((1, False)))
    assert not batch.seg.valid_GK.any()
    assert batch.stream.target_T.numel() == 3


def test_moving_never_casts() -> None:
    batch = Collate(reference=lambda p, r: [-734.3] * len(r))(groups((0, True))).to("cpu")
    assert batch.ref_T is not None
    assert batch.ref_T.dtype == torch.float32
    assert abs(batch.ref_T[0].item() + 734.3) < 1e-4


# What few heads read

RICH = [
    replace(
        e,
        columns=(("value", 0.1 * i), ("consistency", 2.0)),
        embedding=tuple((float(i), float(k)) for k in range(len(e.response_ids))),
        prompt_embedding=(float(i), 9.0),
        label=tuple((1, -1, 0)[: len(e.response_ids)]),
        logps=tuple(tuple(-0.25 * t for t in r) for r in e.response_ids),
        teacher_ids=tuple(tuple((t, t + 1, t + 2)[: 1 + t % 3] for t in r) for r in e.response_ids),
        teacher_logps=tuple(tuple((-1.0, -2.0, -3.0)[: 1 + t % 3] for t in r) for r in e.response_ids),
    )
    for i, e in enumerate(EXAMPLES)
]
OTHERS = [replace(ITEMS[0], other=Other(1, 1, 2)), replace(ITEMS[1], other=Other(0, 2, 2))]
EVERY = Wanted(("consistency", "value"), True, True, True, mismatch=True, row=True)


def rich(*picks: tuple[int, bool], wanted: Wanted = EVERY, **options: object) -> Batch:
    data = Groups(RICH, OTHERS)
    return Collate(wanted=wanted, **options)([data[p] for p in picks])  # type: ignore[arg-type]


def values(x: Tensor | None) -> list[object]:
    assert x is not None
    return x.tolist()


def test_nothing_is_carried_that_nothing_wants() -> None:
    plain, full = rich((0, True), (1, True), wanted=Wanted()), rich((0, True), (1, True))
    assert plain.own_T is plain.other_U is plain.row_G is plain.embedding_GKE is plain.candidate_ids_TM is None
    assert dict(plain.columns) == {}
    assert plain.seg.slot_T is plain.stream.slot_T
    assert plain.stream.target_T.numel() + 4 == full.stream.target_T.numel()


def test_rows_columns_embeddings_and_labels_follow_the_item() -> None:
    batch = rich((0, True), (1, False))
    assert batch.row_G is not None
    assert (batch.row_G.tolist(), batch.row_G.dtype) == ([0, -1], torch.int64)
    x = batch.head_input(torch.zeros(batch.stream.target_T.numel()), None)
    assert x.column_G("value").tolist() == torch.tensor([0.0, 0.1]).tolist()
    assert x.column_G("consistency").tolist() == [2, 2]
    assert x.embedding_GKE.tolist() == [[[0, 2], [0, 0], [0, 1]], [[1, 0], [1, 1], [0, 0]]]
    assert x.prompt_embedding_GE.tolist() == [[0, 9], [1, 9]]
    assert x.label_GK.tolist() == [[0, 1, -1], [1, -1, 0]]
    assert x.row_G.tolist() == [0, -1]


def test_the_mismatched_response_is_a_branch_that_heads_do_not_see() -> None:
    batch = rich((0, True), (1, True), reference=lambda p, r: [-0.5 * t for t in r])
    alone = rich((0, True), (1, True), wanted=replace(EVERY, mismatch=False))
    assert isinstance(batch.stream, Forest)
    assert [len(t.branches) for t in batch.stream.trees] == [4, 3]
    assert batch.stream.target_T.tolist() == [11, 12, 13, 8, 9, 10, 15, 16, 14, 15, 16, 11, 12]
    assert values(batch.own_T) == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert (values(batch.other_U), values(batch.other_group_U)) == ([6, 7, 11, 12], [0, 0, 1, 1])
    policy_T = batch.stream.target_T.float().requires_grad_(True)
    gates = {"g": policy_T.detach() / 8}
    x = batch.head_input(policy_T, batch.ref_T, token_kl=2 * policy_T, collision=3 * policy_T, gates=gates)
    y = alone.head_input(alone.stream.target_T.float(), None)
    for name in ("policy_T", "old_T", "teacher_TM", "reward_GK", "label_GK", "embedding_GKE"):
        assert torch.equal(getattr(x, name), getattr(y, name)), name
    assert torch.equal(x.seg.slot_T, y.seg.slot_T)
    assert torch.equal(x.seg.valid_GK, y.seg.valid_GK)
    for got, factor in ((x.ref_T, -0.5), (x.token_kl_T, 2), (x.collision_T, 3), (x.gate_T("g"), 1 / 8)):
        assert torch.equal(got, factor * x.policy_T)
    assert x.mismatch_G.tolist() == [1.5 * (15 + 16), 1.5 * (11 + 12)]
    assert not x.mismatch_G.requires_grad
    assert x.policy_T.requires_grad
    with pytest.raises(LookupError, match="mismatch=True"):
        batch.head_input(policy_T, None).mismatch_G  # noqa: B018
    assert batch.head_input(torch.empty(0), None).seg.valid_GK.sum() == 5


def test_a_padded_stream_has_the_same_places() -> None:
    shared, plain = (rich((0, True), (1, True), share_prefix=s) for s in (True, False))
    for name in ("own_T", "other_U", "other_group_U", "old_T", "candidate_ids_TM", "teacher_TM"):
        assert torch.equal(getattr(shared, name), getattr(plain, name)), name
    assert torch.equal(shared.seg.slot_T, plain.seg.slot_T)


def test_a_teachers_numbers_follow_the_stream() -> None:
    batch = rich((0, True), (1, True))
    ids, logps, none = batch.candidate_ids_TM, batch.teacher_TM, -torch.inf
    assert ids is not None
    assert logps is not None
    assert (ids.dtype, logps.dtype, batch.teacher_ref_TM) == (torch.int64, torch.float32, None)
    assert ids[:3].tolist() == [[11, 12, 13], [12, -1, -1], [13, 14, -1]]
    assert logps[:3].tolist() == [[-1, -2, -3], [-1, none, none], [-1, -2, none]]
    assert ids[[6, 7, 11, 12]].unique().tolist() == [-1]
    assert logps[[6, 7, 11, 12]].unique().tolist() == [none]
    candidate_TM = ids.float()
    x = batch.head_input(torch.zeros(13), None, candidate=candidate_TM)
    assert torch.equal(x.candidate_TM, candidate_TM[batch.own_T])
    with_ref = [replace(e, teacher_ref_logps=e.teacher_logps) for e in RICH]
    data = Groups(with_ref, OTHERS)
    got = Collate(wanted=Wanted(teacher=True))([data[0, True]]).head_input(torch.zeros(6), None)
    assert torch.equal(got.teacher_ref_TM, got.teacher_TM)


def test_what_is_carried_moves_and_pickles() -> None:
    batch = rich((0, True), (1, True))
    again = pickle.loads(pickle.dumps(batch)).to("meta")
    assert again.columns["value"].device.type == again.teacher_TM.device.type == again.own_T.device.type == "meta"
    assert batch.to("cpu").columns["value"].tolist() == batch.columns["value"].tolist()


def test_sizes_count_the_mismatched_response() -> None:
    assert [a - b for a, b in zip(Groups(RICH, OTHERS).sizes(), Groups(RICH, ITEMS).sizes(), strict=True)] == [2, 2]


def test_edited_tokens_of_a_pair() -> None:
    assert edited((1, 2, 3, 4), (1, 9, 3, 4, 5)) == (
        (False, True, False, False),
        (False, True, False, False, True),
    )
    assert edited((1, 2), (3,)) == ((True, True), (True,))
    frequent = (7,) * 300  # difflib would take a frequent token for junk
    assert edited((*frequent, 1), (*frequent, 2)) == ((*(False,) * 300, True),) * 2
    pair = [Example("p", "f:1", (5,), ((1, 2, 3), (1, 3, 8)), label=(1, -1), chosen_first=True)]
    for wanted, more in ((Wanted(differs=True), 0), (Wanted(differs=True, mismatch=True), 1)):
        data = Groups([*pair, *RICH], [Item(0, (0, 1), Other(1, 1, 1))])
        batch = Collate(wanted=wanted)([data[0, True]])
        assert values(batch.differs_T) == [False, True, False, False, False, True, *[False] * more]
        x = batch.head_input(torch.zeros(6 + more), None)
        assert (x.differs_T.tolist(), x.differs_T.dtype) == ([False, True, False, False, False, True], torch.bool)


@pytest.mark.parametrize("shared", [True, False])
def test_mismatched_log_ratios_are_the_models(tmp_path: Path, shared: bool) -> None:
    """From a cache and from plain forwards of two models, in both streams; and the cache holds all of it."""
    specs = [ModelSpec(str(tiny.make_model(tmp_path / str(s), s))) for s in (0, 1)]
    items, _ = arrange(RICH, "labelled", "best_vs_worst", None, 0, mismatch=True)
    groups = Groups(RICH, items)
    nets = [load_frozen(spec) for spec in specs]
    want = []
    for item in items:
        assert item.other is not None
        prompt, other = RICH[item.example].prompt_ids, groups.ids_of(item.other)
        logp = [n(torch.tensor([[*prompt, *other]])).logits[0].float().log_softmax(-1) for n in nets]
        rows = range(len(prompt) - 1, len(prompt) + len(other) - 1)
        want.append(sum(float(logp[0][i, t] - logp[1][i, t]) for i, t in zip(rows, other, strict=True)))
    if shared:
        for net in nets:
            share(net)
    cache = RefCache(LogpStore(tmp_path / "store", {}), shared, None)
    todo = cache.missing([groups])
    assert [w.item.other is not None for w in todo] == [True, True]
    cache.fill(nets[1], [groups], todo, 0, 1)
    cache.store.refresh()
    assert cache.missing([groups]) == []
    batch = Collate(shared, cache.lookup, wanted=Wanted(mismatch=True))([groups[i, True] for i in range(2)])
    with torch.no_grad():
        x = batch.head_input(score(nets[0], batch.stream).logp_T, batch.ref_T)
    torch.testing.assert_close(x.mismatch_G, torch.tensor(want), rtol=0, atol=1e-4)
    cut = Groups(RICH, [replace(items[0], other=Other(1, 1, 1)), replace(items[1], other=Other(0, 2, 1))])
    assert {(w.item.responses, w.item.other) for w in cache.missing([cut])} == {((), i.other) for i in cut.items}
