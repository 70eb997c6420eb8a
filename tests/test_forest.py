"""The packing, against its definition."""

from __future__ import annotations

import pickle

import pytest
import torch
from tiny_models import ragged

from po.forest import pad, plant


def test_a_small_forest_in_full():
    f = plant([([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9]])], K=2)
    assert f.input_S.tolist() == [1, 2, 3, 4, 3, 7, 8]
    assert f.position_S.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert f.subtree_end_S.tolist() == [5, 5, 4, 4, 5, 7, 7]
    assert f.at_T.tolist() == [2, 3, 4, 5, 6]
    assert f.target_T.tolist() == [4, 5, 6, 8, 9]
    assert f.slot_T.tolist() == [0, 0, 1, 2, 2]
    assert [(t.trunk, t.branches) for t in f.trees] == [((0, 2), ((2, 4), (4, 5))), ((5, 5), ((5, 7),))]
    assert f.longest == 4


def test_padded_rows_in_full():
    p = pad([([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9]])], K=2)
    assert p.input_NL.tolist() == [[1, 2, 3, 4], [1, 2, 3, 0], [7, 8, 0, 0]]
    assert p.mask_NL.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert p.at_T.tolist() == [2, 3, 6, 8, 9]
    assert p.target_T.tolist() == [4, 5, 6, 8, 9]
    assert p.slot_T.tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("seed", range(5))
def test_every_token_sees_its_own_sequence_and_nothing_else(seed: int, window: int | None):
    groups = ragged(seed)
    f = plant(groups, 4)
    seen_SS = f.visible_SS(window)
    assert sum(len(b) for _, b in groups) == sum(len(t.branches) for t in f.trees)
    for tree, (prompt, responses) in zip(f.trees, groups, strict=True):
        for (start, end), response in zip(tree.branches, responses, strict=True):
            path = [*range(*tree.trunk), *range(start, end)]  # the stream positions of one plain sequence
            assert f.input_S[path].tolist() == [*prompt, *response][:-1]
            assert f.position_S[path].tolist() == list(range(len(path)))
            for n, i in enumerate(path):
                back = path[: n + 1] if window is None else path[max(0, n + 1 - window) : n + 1]
                assert seen_SS[i].nonzero()[:, 0].tolist() == back
    assert f.longest == max(len(p) + max(map(len, rs)) - 1 for p, rs in groups)


@pytest.mark.parametrize("seed", range(5))
def test_each_response_token_is_predicted_from_the_position_before_it(seed: int):
    groups = ragged(seed)
    for stream in (plant(groups, 4), pad(groups, 4)):
        tokens = stream.input_S if hasattr(stream, "input_S") else stream.input_NL.flatten()
        at = iter(zip(stream.at_T.tolist(), stream.target_T.tolist(), stream.slot_T.tolist(), strict=True))
        for g, (prompt, responses) in enumerate(groups):
            for k, response in enumerate(responses):
                for before, token in zip([prompt[-1], *response], response):
                    position, target, slot = next(at)
                    assert (int(tokens[position]), target, slot) == (before, token, g * 4 + k)
        assert next(at, None) is None


@pytest.mark.parametrize("lay", [plant, pad])
@pytest.mark.parametrize(
    ("group", "text"),
    [
        (([], [[1]]), "an empty prompt cannot be scored"),
        (([1], [[2], []]), "an empty response cannot be scored"),
        (([1], []), "0 responses where 1 to 2 are expected"),
        (([1], [[2], [3], [4]]), "3 responses where 1 to 2 are expected"),
    ],
)
def test_what_cannot_be_scored_is_refused(lay, group, text: str):
    with pytest.raises(AssertionError) as error:
        lay([group], 2)
    assert str(error.value) == text


def test_streams_travel_between_processes():
    groups = ragged()
    for stream in (plant(groups, 4), pad(groups, 4)):
        copy = pickle.loads(pickle.dumps(stream))
        assert torch.equal(copy.at_T, stream.at_T)
        assert copy != stream  # identity: masks are remembered per stream
