"""Groups -> Batch: what the heads see, ragged K, fillers, and no casting."""

import torch

from po.batch import Collate, Groups
from po.data.rows import Example, Item
from po.forest import Forest, Padded

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
