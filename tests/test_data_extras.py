"""What only some heads read of rows: unlabelled responses, columns, embeddings, a teacher; read only where wanted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from data_support import problems, row, settled, tokenizer, write_jsonl

from po.data.formats import check_columns
from po.data.layout import arrange, check_needs
from po.data.prepare import Prepared, prepare
from po.data.rows import Example, Item, Teacher
from po.data.store import light
from po.data.wanted import Wanted, wanted
from po.errors import UserError
from po.spec import DataSpec, Source, Term
from po.types import Head, HeadInput, HeadOutput, Needs

TOK = tokenizer()
P = {"prompt": "q"}
GROUPS = Wanted(unlabelled=True)
VECTORS = Wanted(embedding=True, prompt_embedding=True)
TEACHER = Wanted(teacher=True)
BESIDE = ", as on the row's other responses, got nothing"


def labels(data: dict[str, Any], want: Wanted = GROUPS) -> list[int | None]:
    return [r.label for r in row({**P, **data}, want).responses]


def teacher(tokens: int, **more: Any) -> dict[str, Any]:
    """One that scored ids 7 and 8 at the first token and 7 alone at the others."""
    ids = [[7, 8], *[[7]] * (tokens - 1)]
    return {"ids": ids, "logps": [[-0.5] * len(i) for i in ids], **more}


# Unlabelled responses


def test_a_null_label_is_an_unlabelled_response_where_heads_take_them() -> None:
    some = [{"content": "a", "label": True}, {"content": "b", "label": None}, {"content": "c", "label": 0}]
    assert labels({"responses": some}) == [1, 0, -1]
    assert labels({"responses": ["a", "b", "c"], "labels": [False, None, 1]}) == [-1, 0, 1]
    assert labels({"responses": [{"content": "a", "label": None}]}) == [0]
    assert labels({"responses": [{"content": x, "label": None} for x in "ab"]}) == [0, 0]
    assert labels({"completion": "a", "label": None}) == [0]
    assert labels({"completion": "a", "kto_tag": None}) == [0]
    assert labels({"completion": "a"}) == [None]
    assert row({**P, "completion": "a", "label": None}, GROUPS).kind == "unpaired"
    scored = [{"content": x, "reward": i} for i, x in enumerate("ab")]
    assert labels({"responses": scored}) == [None, None]


def test_a_label_that_is_missing_among_labelled_ones_is_a_fault() -> None:
    some = [{"content": "a", "label": True}, {"content": "b"}]
    missing = "t.jsonl:1: responses[1].label: expected true or false" + BESIDE
    assert problems({**P, "responses": some}, GROUPS) == [missing]
    some[1]["label"] = None
    assert problems({**P, "responses": some}, GROUPS) == []
    assert problems({**P, "responses": some}) == [missing]
    assert problems({**P, "completion": "a", "label": None}) == ["t.jsonl:1: label: expected true or false, got null"]


def test_groups_keep_all_responses_with_their_labels() -> None:
    data = {"responses": [{"content": x, "label": y} for x, y in zip("abc", (True, None, False))]}
    kept = settled({**P, **data}, TOK, wanted=GROUPS).example
    pair = settled({**P, "chosen": "a", "rejected": "b"}, TOK, wanted=GROUPS).example
    alone = settled({**P, "completion": "a", "label": None}, TOK, wanted=GROUPS).example
    assert kept is not None
    assert pair is not None
    assert alone is not None
    assert [e.label for e in (kept, pair, alone)] == [(1, 0, -1), (1, -1), (0,)]
    assert arrange([kept, pair, alone], "labelled", "best_vs_worst", None, 0) == (
        [Item(0, (0, 1, 2)), Item(1, (0, 1)), Item(2, (0,))],
        "3 groups of 1 to 3 responses: 2 desirable, 2 undesirable, 2 unlabelled",
    )


# The sampler's log-probs


def test_logps_stand_beside_the_responses_too() -> None:
    want = Wanted(logps=True)
    forms: list[tuple[dict[str, Any], list[Any]]] = [
        ({"completion": "a", "label": True, "logps": [-1, -2.0]}, [(-1.0, -2.0)]),
        ({"chosen": "a", "rejected": "b", "chosen_logps": [-1.0], "rejected_logps": [-2.0]}, [(-1.0,), (-2.0,)]),
        ({"responses": ["a", "b"], "rewards": [1, 2], "logps": [[-1.0], [-2.0]]}, [(-1.0,), (-2.0,)]),
    ]
    for data, logps in forms:
        assert [r.logps for r in row({**P, **data}, want).responses] == logps
        assert {r.logps for r in row({**P, **data}).responses} == {None}
    assert problems({**P, "chosen": "a", "rejected": "b", "rejected_logps": [-1.0, "x"]}, want) == [
        "t.jsonl:1: rejected_logps[1]: expected a finite number, got 'x'",
        "t.jsonl:1: chosen_logps: expected the sampler's log-probs" + BESIDE,
    ]


# Columns


@dataclass(frozen=True)
class Weighted(Head):
    needs: ClassVar[Needs] = Needs("pair", columns=("consistency", "value"))

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.column_G("consistency") + x.column_G("value"))


COLUMNS = wanted([Term(Weighted())])
PAIR = {**P, "chosen": "a", "rejected": "b"}


def test_declared_columns_are_read_and_no_others() -> None:
    assert Wanted(columns=("consistency", "value")) == COLUMNS
    data = {**PAIR, "consistency": 0.25, "value": 3, "other": 1}
    assert dict(row(data, COLUMNS).columns) == {"consistency": 0.25, "value": 3.0}
    assert row(data, COLUMNS).meta == {"other": 1}
    assert dict(row(data).columns) == {}
    assert dict(row({**data, "value": None}, COLUMNS).columns) == {"consistency": 0.25}
    renamed = row({**PAIR, "c": 1, "value": 2}, COLUMNS, columns={"consistency": "c"})
    assert dict(renamed.columns) == {"consistency": 1.0, "value": 2.0}
    example = settled(data, TOK, wanted=COLUMNS).example
    assert example is not None
    assert dict(example.columns) == {"consistency": 0.25, "value": 3.0}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "infinity"),
        ("0.5", "'0.5'"),
        (True, "true"),
        ([1], "a list of 1"),
    ],
)
def test_a_column_holds_a_finite_number(value: Any, said: str) -> None:
    assert problems({**PAIR, "consistency": value, "value": 1}, COLUMNS) == [
        f"t.jsonl:1: consistency: expected a finite number, got {said}"
    ]


def test_a_declared_column_may_be_renamed_and_another_may_not() -> None:
    check_columns(Source("t.jsonl", columns={"consistency": "c"}), COLUMNS)
    check_columns(Source("t.jsonl", columns={"chosen_embedding": "c"}), VECTORS)
    for columns, want in (({"consistency": "c"}, VECTORS), ({"chosen_embedding": "c"}, COLUMNS)):
        with pytest.raises(UserError, match="is no field that po reads"):
            check_columns(Source("t.jsonl", columns=columns), want)


def refused(head: Head, *examples: Example) -> str:
    with pytest.raises(UserError) as e:
        check_needs([Term(head)], examples, "data.train")
    return str(e.value)


def test_a_missing_column_is_said_with_head_column_and_row() -> None:
    one = Example("a", "t.jsonl:1", (1,), ((2,), (3,)), label=(1, -1), columns=(("consistency", 1.0), ("value", 0.0)))
    two = Example("b", "t.jsonl:2", (1,), ((2,), (3,)), label=(1, -1), columns=(("consistency", 1.0),))
    assert check_needs([Term(Weighted())], [one], "data.train") == "pair"
    assert refused(Weighted(), one, two) == (
        "data.train: head 'Weighted' needs a number in column 'value'; t.jsonl:2 has none. "
        "Add value: a number to the rows, or name their column in the source's `columns`."
    )


# Embeddings


def test_embeddings_of_responses_and_of_the_prompt() -> None:
    in_objects = {"responses": [{"content": "a", "label": True, "embedding": [1, 0.5]}]}
    forms: list[tuple[dict[str, Any], list[Any]]] = [
        (in_objects, [(1.0, 0.5)]),
        ({"responses": ["a", "b"], "rewards": [1, 2], "embeddings": [[1.0], [2.0]]}, [(1.0,), (2.0,)]),
        ({"chosen": "a", "rejected": "b", "chosen_embedding": [1.0], "rejected_embedding": [2.0]}, [(1.0,), (2.0,)]),
        ({"completion": "a", "label": True, "embedding": [1.0]}, [(1.0,)]),
    ]
    for data, want in forms:
        got = row({**P, **data, "prompt_embedding": [0.25]}, VECTORS)
        assert ([r.embedding for r in got.responses], got.prompt_embedding) == (want, (0.25,))
        unread = row({**P, **data, "prompt_embedding": [0.25]})
        assert ({r.embedding for r in unread.responses}, unread.prompt_embedding) == ({None}, None)


BAD_VECTORS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"responses": [{"content": "a", "reward": 1, "embedding": [1.0]}, {"content": "b", "reward": 2}]},
        ["responses[1].embedding: expected an embedding" + BESIDE],
    ),
    (
        {"chosen": "a", "rejected": "b", "chosen_embedding": [1.0, float("nan"), "x"]},
        [
            "rejected_embedding: expected an embedding" + BESIDE,
            "chosen_embedding[1]: expected a finite number, got NaN",
            "chosen_embedding[2]: expected a finite number, got 'x'",
        ],
    ),
    (
        {"completion": "a", "label": True, "embedding": 3, "prompt_embedding": []},
        [
            "embedding: expected a list of numbers, got 3",
            "prompt_embedding: expected a list of numbers, got an empty list",
        ],
    ),
    (
        {"responses": ["a", "b"], "rewards": [1, 2], "embeddings": [[1.0]]},
        ["embeddings: expected a list of 2, one per response, got a list of 1"],
    ),
]


@pytest.mark.parametrize(("data", "want"), BAD_VECTORS)
def test_bad_embeddings(data: dict[str, Any], want: list[str]) -> None:
    assert problems({**P, **data}, VECTORS) == [f"t.jsonl:1: {line}" for line in want]
    assert problems({**P, **data}) == []


@dataclass(frozen=True)
class Embedded(Weighted):
    needs: ClassVar[Needs] = Needs("set", embedding=True, prompt_embedding=True)


@dataclass(frozen=True)
class Taught(Weighted):
    needs: ClassVar[Needs] = Needs("best", teacher=True)


@dataclass(frozen=True)
class Grouped(Weighted):
    needs: ClassVar[Needs] = Needs("labelled", label=True)


def test_what_else_rows_lack_is_said() -> None:
    bare = Example("a", "t.jsonl:1", (1,), ((2,), (3,)))
    half = Example("a", "t.jsonl:1", (1,), ((2,), (3,)), embedding=((1.0,), (2.0,)))
    assert refused(Embedded(), bare) == (
        "data.train: head 'Embedded' needs an embedding of every response; t.jsonl:1 has none. "
        "Add embedding: [numbers] to them."
    )
    assert refused(Embedded(), half) == (
        "data.train: head 'Embedded' needs an embedding of the prompt; t.jsonl:1 has none. "
        "Add prompt_embedding: [numbers] to the rows."
    )
    assert refused(Taught(), bare) == (
        "data.train: head 'Taught' needs a teacher's log-probs of every response; t.jsonl:1 has none. "
        "Add teacher: {ids, logps} to them."
    )
    assert refused(Grouped(), bare) == (
        "data.train: head 'Grouped' needs a label on every response; t.jsonl:1 has none. "
        "Add label: true, false or null (unlabelled) to them."
    )
    groups = [Example("a", "t.jsonl:1", (1,), ((2,), (3,)), label=(1, 0)), Example("b", "w", (1,), ((2,),), label=(0,))]
    assert check_needs([Term(Grouped())], groups, "data.train") == "labelled"


# A teacher


def test_a_teachers_log_probs_are_kept_and_cut_with_their_tokens() -> None:
    full = teacher(3, ref_logps=[[-1, -2], [-3], [-4]])
    read = row({**P, "completion": "ab", "teacher": full}, TEACHER).responses[0].teacher
    assert read == Teacher(((7, 8), (7,), (7,)), ((-0.5, -0.5), (-0.5,), (-0.5,)), ((-1.0, -2.0), (-3.0,), (-4.0,)))
    assert row({**P, "completion": "ab", "teacher": full}).responses[0].teacher is None
    pair = {**P, "chosen": "ab", "rejected": "abcd", "chosen_teacher": teacher(1), "rejected_teacher": teacher(3)}
    out = settled(pair, TOK, wanted=TEACHER)
    assert str(out.problem) == (
        "t.jsonl:1: responses[0].teacher.ids: expected 3 lists, one per token with its end token, got 1"
    )
    pair |= {"chosen_teacher": teacher(2), "prompt": "pq", "chosen": "a", "rejected": "xbcd"}
    pair["rejected_teacher"] = teacher(5)
    cut = settled(pair, TOK, max_length=6, overlong="truncate_response", wanted=TEACHER).example
    assert cut is not None
    assert [len(ids) for ids in cut.response_ids] == [2, 3]
    assert cut.teacher_ids == (((7, 8), (7,)), ((7, 8), (7,), (7,)))
    assert cut.teacher_logps == (((-0.5, -0.5), (-0.5,)), ((-0.5, -0.5), (-0.5,), (-0.5,)))
    assert cut.teacher_ref_logps is None


BAD_TEACHERS: list[tuple[Any, list[str]]] = [
    (3, [": expected an object with ids and logps, a list per token each, got 3"]),
    ({"ids": [[1]]}, [".logps: expected a list per token, got nothing"]),
    ({"ids": [1], "logps": [[-1.0]]}, [".ids[0]: expected a list, got 1"]),
    ({"ids": [[1, 1], [-2]], "logps": [[-1.0, -1.0], [-1.0]]}, [
        ".ids[0]: expected different token ids, got [1, 1]", ".ids[1]: expected different token ids, got [-2]"]),
    ({"ids": [[1], [2]], "logps": [[-1.0]]}, [
        ".logps: expected a list of 2, one per token as in ids, got a list of 1"]),
    ({"ids": [[1, 2]], "logps": [[-1.0]]}, [".logps[0]: expected 2 numbers, one per id, got 1"]),
    ({"ids": [[1]], "logps": [[-1.0]], "ref_logps": [[]]}, [".ref_logps[0]: expected 1 numbers, one per id, got 0"]),
    ({"ids": [[1, 2]], "logps": [[-1.0, None]]}, [".logps[0][1]: expected a finite number, got null"]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "want"), BAD_TEACHERS)
def test_bad_teachers(value: Any, want: list[str]) -> None:
    assert problems({**P, "completion": "a", "teacher": value}, TEACHER) == [f"t.jsonl:1: teacher{w}" for w in want]


def test_a_teachers_ids_are_the_tokenizers() -> None:
    size = len(TOK)
    fine, wrong = (teacher(2, ids=[[1, 7], [last]]) for last in (size - 1, size))
    assert settled({**P, "completion": "a", "teacher": fine}, TOK, wanted=TEACHER).fate == "kept"
    out = settled({**P, "completion": "a", "teacher": wrong}, TOK, wanted=TEACHER)
    assert str(out.problem) == (
        f"t.jsonl:1: responses[0].teacher.ids[1]: expected ids below {size}, the size of the vocabulary, got {size}"
    )


# On disk


def run(path: Path, want: Wanted, columns: Mapping[str, str] | None = None) -> Prepared:
    sources = (Source(str(path), columns=columns or {}),)
    return prepare(DataSpec(sources, cache_dir=str(path.parent / "cache")), sources, TOK, "k", "train", want)


def test_everything_survives_the_store_and_makes_a_key_of_its_own(tmp_path: Path) -> None:
    said = {"embedding": [0.5, 1.0], "teacher": teacher(2, ref_logps=[[-1, -2], [-3]])}
    rows = [
        {**P, "responses": [{"content": x, "label": None, **said} for x in "ab"], "prompt_embedding": [2.0, 3.0],
         "value": i / 3} for i in range(3)]  # fmt: skip
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    every = Wanted(("value",), True, True, True, unlabelled=True)
    got = run(path, every)
    taught = ((7, 8), (7,)), ((-0.5, -0.5), (-0.5,)), ((-1.0, -2.0), (-3.0,))
    for i, e in enumerate(got.examples):
        assert (e.columns, e.label) == ((("value", i / 3),), (0, 0))
        assert (e.embedding, e.prompt_embedding) == (((0.5, 1.0), (0.5, 1.0)), (2.0, 3.0))
        assert (e.teacher_ids, e.teacher_logps, e.teacher_ref_logps) == tuple((t, t) for t in taught)
        few = light(got.examples)[i]
        assert (few.embedding, few.prompt_embedding, few.teacher_ids, few.response_ids) == ((), (), (), e.response_ids)
    assert light(run(path, GROUPS).examples)[0].embedding is None
    assert list(pickle.loads(pickle.dumps(light(got.examples)))) == list(light(got.examples))
    with pytest.raises(UserError, match="3 of 3 rows are bad"):
        run(path, Wanted())
    keys = {run(path, w).key for w in (GROUPS, every, Wanted(("value",), unlabelled=True))}
    assert len(keys) == 3
    in_batches = Wanted(unlabelled=True, differs=True, mismatch=True, row=True)
    assert run(path, in_batches).key == run(path, GROUPS).key in keys


def test_all_rows_are_alike(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**P, "completion": "a", "embedding": [1.0, 2.0], "teacher": teacher(2)}] * 5
    rows[1] = {**rows[1], "embedding": [1.0]}
    rows[2] = {**rows[2], "prompt_embedding": [1.0, 2.0, 3.0]}
    rows[3] = {**rows[3], "teacher": teacher(2, ref_logps=[[-1, -2], [-3]])}
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(UserError) as e:
        run(path, Wanted(embedding=True, prompt_embedding=True, teacher=True))
    assert str(e.value).splitlines()[1:] == [
        "  t.jsonl:2: responses[0].embedding: expected 2 numbers, as in t.jsonl:1, got 1",
        "  t.jsonl:3: prompt_embedding: expected 2 numbers, as in t.jsonl:1, got 3",
        "  t.jsonl:4: responses[0].teacher.ref_logps: expected nothing, as in t.jsonl:1, got a list per token",
    ]


def test_a_run_that_wants_nothing_reports_what_it_does_not_read(tmp_path: Path) -> None:
    rows = [{**P, "completion": "a", "embedding": [1.0], "value": "x", "teacher": 3}]
    got = run(write_jsonl(tmp_path / "t.jsonl", rows), Wanted())
    assert "columns that nothing reads: embedding, value, teacher" in got.report.warnings
    assert json.loads(json.dumps(got.report.to_json()))["counts"]["bad"] == 0
    assert got.examples[0].embedding is None
    assert got.examples[0].columns == ()


def test_the_union_of_what_heads_want() -> None:
    assert wanted([Term(Embedded()), Term(Weighted()), Term(Grouped())]) == Wanted(
        columns=("consistency", "value"), embedding=True, prompt_embedding=True, unlabelled=True
    )
    assert wanted([]) == Wanted()
