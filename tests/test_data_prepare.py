"""From sources to examples: one report in which counts add up, thresholds, and a cache under a key of its content."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
from data_support import ALPACA, CHATML, LLAMA, SHARED, STORIES, assistant, tokenizer, user, write_jsonl
from transformers import AutoTokenizer

from po.data.build import Build
from po.data.prepare import Prepared, prepare
from po.data.report import DataReport
from po.data.store import EXAMPLES, Examples, write
from po.errors import UserError
from po.spec import DataSpec, Source

TOK = tokenizer()
GOOD = [{"prompt": f"prompt {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]


def run(path: Path, tok: Any = TOK, key: str = "k", source: dict[str, Any] | None = None, **spec: Any) -> Prepared:
    """Prepare a file with a cache beside it."""
    sources = (Source(str(path), **(source or {})),)
    return prepare(DataSpec(sources, **{"cache_dir": str(path.parent / "cache"), **spec}), sources, tok, key, "train")


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as e:
        run(path, **options)
    return str(e.value)


def balanced(report: DataReport) -> bool:
    c = report.counts
    return c["in"] == c["kept"] + c["bad"] + c["overlong"] + c["identical"] + c["empty"]


def test_examples_are_lazy_ordered_and_pickle_as_their_path(tmp_path: Path) -> None:
    got = run(write_jsonl(tmp_path / "t.jsonl", GOOD))
    assert len(got.examples) == 10
    assert isinstance(got.examples, Examples)
    assert [e.where for e in got.examples] == [f"t.jsonl:{i + 1}" for i in range(10)]
    again = pickle.loads(pickle.dumps(got.examples))
    assert len(pickle.dumps(got.examples)) < 300
    assert again[3] == got.examples[3] == got.examples[-7]
    assert again[2:4] == [got.examples[2], got.examples[3]]
    with pytest.raises(IndexError, match="example 10 of 10"):
        got.examples[10]
    assert (again[0].label, again[0].is_pair, again[0].reward, again[0].logps) == ((1, -1), True, None, None)


def test_the_store_returns_every_field_across_batches(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{i}", "prompt": "p", "responses": [
            {"text": "ab", "reward": i / 3, "logps": [-0.1, -1e-9, -3]}, {"text": "c", "reward": 2, "logps": [0, 0]}]}
        for i in range(1200)
    ]  # fmt: skip
    got = run(write_jsonl(tmp_path / "t.jsonl", rows)).examples
    for i in (0, 511, 512, 1199):
        assert (got[i].id, got[i].reward, got[i].chosen_first) == (f"r{i}", (i / 3, 2.0), False)
        assert got[i].logps == ((-0.1, -1e-9, -3.0), (0.0, 0.0))
    write(tmp_path / "copy.arrow", got)
    assert list(Examples(tmp_path / "copy.arrow")) == list(got)


def test_all_bad_rows_are_in_one_report_and_a_threshold_decides(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines: list[Any] = [json.dumps(r) for r in GOOD]
    lines[1] = '{"prompt": '
    lines[3] = json.dumps({"prompt": "a", "chosen": "b"})
    lines[5] = json.dumps({**GOOD[0], "id": "x"})
    lines[6] = json.dumps({**GOOD[0], "id": "x"})
    path.write_text("\n".join(lines))
    bad = (
        "  t.jsonl:2: expected one JSON object per line, got broken JSON: Expecting value (column 11)\n"
        "  t.jsonl:4: rejected: expected text or messages, got nothing\n"
        "  t.jsonl:7: id: expected an id that no other row has, got 'x', which t.jsonl:6 has too"
    )
    head = (
        "data.train: 3 of 10 rows are bad; data.max_bad = {} allows {}. Mend them, or raise data.max_bad "
        "(a share below 1, a count from 1 on).\n"
    )
    assert refused(path) == head.format(0, 0) + bad
    assert refused(path, max_bad=0.29) == head.format(0.29, 2) + bad
    assert refused(path, max_bad=2) == head.format(2, 2) + bad
    got = run(path, max_bad=0.3)
    assert (len(got.examples), got.report.counts["bad"], balanced(got.report)) == (7, 3, True)
    assert len(run(path, max_bad=3).examples) == 7


def test_long_listings_are_capped_with_a_count(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "p"}] * 600 + [{"prompt": "", "chosen": "", "rejected": "b"}])
    lines = refused(path).splitlines()
    assert (len(lines), lines[-1]) == (22, "  ... and 582 more")
    assert lines[0].startswith("data.train: 601 of 601 rows are bad;")


def test_a_truncated_gzip_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({**r, "n": i}) + "\n" for i in range(300) for r in GOOD).encode())
    path.write_bytes(whole[:-400])
    assert "expected a whole gzip file, got a truncated one; the rows from here on are lost" in refused(path)
    got = run(path, max_bad=1)
    assert len(got.examples) == got.report.counts["in"] - 1 > 1000


def test_every_row_has_one_fate_and_the_report_names_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p" * 30, "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "same beginning, a", "rejected": "same beginning, b"},
        {"prompt": "p", "chosen": "</s>", "rejected": "r"},
        {"prompt": "p", "chosen": "c" * 20, "rejected": "r"},
        {"prompt": "p", "rejected": "r"},
    ]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    got = run(path, max_length=12, overlong="truncate_response", max_bad=1, max_dropped=1)
    assert got.report.summary() == (
        "train: 6 rows in = 2 kept + 1 bad + 3 dropped (1 overlong, 1 identical, 1 empty)\n"
        "  format: preference, standard (5), preference (1)\n"
        "  responses kept: 4; dropped from kept rows: 0 too long, 0 identical, 0 empty; cut: 1\n"
        "  prompt + longest response, tokens: 50 % 20, 90 % 33, 99 % 33, longest 33\n"
        "  sample: t.jsonl:1: prefers 'c' over 'r'\n"
        "  sample: t.jsonl:2: prefers 'c' over 'r'\n"
        "  sample: t.jsonl:3: prefers 'same beginning, a' over 'same beginning, b'\n"
        "  bad rows: 1\n    t.jsonl:6: chosen: expected text or messages, got nothing\n"
        "  rows dropped as too long: 1\n    t.jsonl:2: the prompt has 31 tokens, room is 11\n"
        "  rows dropped because their responses became identical: 1\n"
        "    t.jsonl:3: responses[0, 1] of 18 tokens, cut to 10; responses[1] became identical to responses[0]\n"
        "  rows dropped because a response has no tokens: 1\n    t.jsonl:4: responses[0] has no tokens\n"
        "  rows that lost tokens or responses: 1\n    t.jsonl:5: responses[0] of 21 tokens, cut to 10\n"
        "  warning: only 75.0% of the responses end with a stop token; the model may not learn to stop"
    )
    assert balanced(got.report)
    assert DataReport.from_json(json.loads(json.dumps(got.report.to_json()))) == got.report


def test_a_row_that_only_the_template_refuses_is_bad_once(tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": [user(f"q{i}"), assistant("a")]} for i in range(3)]
    rows[1]["messages"].insert(0, {"role": "system", "content": "s"})
    got = run(write_jsonl(tmp_path / "t.jsonl", rows), tok=tokenizer(LLAMA), max_bad=1)
    assert (got.report.counts["bad"], got.report.counts["problems"], got.report.counts["kept"]) == (1, 1, 2)
    assert balanced(got.report)
    assert got.report.listings["bad"] == (
        "t.jsonl:2: messages: expected a conversation that the chat template accepts, "
        "got TemplateError: no system role",
    )


def test_losing_too_much_to_the_length_limit_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [*GOOD, {"prompt": "p" * 50, "chosen": "c", "rejected": "r"}])
    assert refused(path, max_length=40) == (
        "data.train: 1 of 11 rows (9.1%) were dropped or cut (1 too long); data.max_dropped = 0.05 allows 5.0%. "
        "Prompt + longest response in tokens: 50 % 16, 90 % 16, 99 % 53, longest 53. Raise data.max_length (40), "
        "choose another data.overlong (drop), or accept the loss with data.max_dropped: 0.1.\n"
        "  t.jsonl:11: the prompt has 51 tokens, room is 39"
    )
    assert len(run(path, max_length=40, max_dropped=0.1).examples) == 10
    assert refused(path, max_length=40, overlong="error", max_dropped=1).startswith(
        "data.train: 1 of 11 rows are too long and data.overlong = error. "
    )
    assert refused(path, max_length=5, max_dropped=1).startswith(
        "data.train: no row is left to train on\ntrain: 11 rows"
    )
    assert refused(path, max_length=1) == ("data.max_length: expected at least 2 tokens (prompt and response), got 1")


def test_identical_responses_are_not_called_too_long(tmp_path: Path) -> None:
    """Texts that differ and whose tokens do not: they are dropped whatever the lengths."""
    alike = {"prompt": "p", "responses": ["a", "a</s>", "b"], "rewards": [1, 2, 3]}
    path = write_jsonl(tmp_path / "t.jsonl", [*GOOD, {"prompt": "p", "chosen": "a", "rejected": "a</s>"}, alike])
    got = run(path, overlong="error", max_dropped=0.2)
    assert [got.report.counts[k] for k in ("kept", "identical", "cut")] == [11, 1, 1]
    said = "  t.jsonl:11: responses[1] became identical to responses[0]\n"
    said += "  t.jsonl:12: responses[1] became identical to responses[0]"
    assert refused(path, overlong="error") == (
        "data.train: 2 of 12 rows (16.7%) were dropped or cut (1 identical, 1 cut); data.max_dropped = 0.05 allows "
        "5.0%. Prompt + longest response in tokens: 50 % 16, 90 % 16, 99 % 16, longest 16. Mend the rows, or accept "
        f"the loss with data.max_dropped: 0.17.\n{said}"
    )
    long = {"prompt": "p", "responses": ["a" * 40, "b", "c"], "rewards": [1, 2, 3]}
    path = write_jsonl(tmp_path / "u.jsonl", [*GOOD, alike, long, {"prompt": "p" * 50, "chosen": "c", "rejected": "r"}])
    assert refused(path, overlong="error", max_length=20, max_dropped=1).splitlines() == [
        "data.train: 2 of 13 rows are too long and data.overlong = error. Prompt + longest response in tokens: "
        "50 % 16, 90 % 43, 99 % 53, longest 53. Raise data.max_length (20), or choose overlong: drop | truncate_prompt "
        "| truncate_response.",
        "  u.jsonl:13: the prompt has 51 tokens, room is 19",
        "  u.jsonl:12: responses[0] of 41 tokens, room is 18",
    ]


def test_ranks_without_a_direction_and_swapped_scores_are_refused_whatever_max_bad(tmp_path: Path) -> None:
    ranked = [{"prompt": f"p{i}", "answers": ["a", "b"], "ranks": [1, 2]} for i in range(3)]
    path = write_jsonl(tmp_path / "t.jsonl", [*ranked, GOOD[0]])
    assert refused(path, max_bad=99) == (
        "data.train: 3 rows have ranks, and the recipe does not say which end is better. Add rank_order: "
        "lower_is_better (1 is the best) or rank_order: higher_is_better to the source"
    )
    got = run(path, source={"rank_order": "lower_is_better"})
    assert got.report.samples[0] == "t.jsonl:1: prefers 'a' over 'b'"
    swapped = [{**r, "score_chosen": 1, "score_rejected": 2 + i % 2} for i, r in enumerate(GOOD)]
    path = write_jsonl(tmp_path / "u.jsonl", swapped)
    assert refused(path) == (
        "data.train: the chosen responses score lower than the rejected ones: -1.5 on average over 10 pairs. "
        "Are the columns or the scores' direction swapped?"
    )
    path = write_jsonl(tmp_path / "v.jsonl", [swapped[0], {**GOOD[1], "score_chosen": 9, "score_rejected": 2}])
    assert run(path).report.listings["gap"] == ("t.jsonl:1: chosen 1, rejected 2".replace("t.", "v."),)


def test_options_and_columns_that_nothing_needed_are_said(tmp_path: Path) -> None:
    begun = {**GOOD[0], "prompt": "<s>" + GOOD[0]["prompt"]}
    path = write_jsonl(tmp_path / "t.jsonl", [{**r, "rewrds": [1, 2]} for r in [begun, *GOOD[1:]]])
    got = run(path, tok=tokenizer(CHATML, bos=False), source={"separator": "A:", "rank_order": "lower_is_better"})
    assert got.report.warnings == (
        "10 rows are plain text: the tokenizer's chat template is not applied to them",
        "9 prompts do not begin with '<s>', and the tokenizer adds none: write it if the model wants it",
        "columns that nothing reads: rewrds",
        "separator was given, but no row needed it",
        "rank_order was given, but no row needed it",
    )


def test_the_cache_is_found_again_with_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [*GOOD, {"prompt": "p"}])
    first = run(path, max_bad=1)
    builds = []
    real = Build.examples
    monkeypatch.setattr(Build, "examples", lambda self: builds.append(1) or real(self))
    spec = {"max_bad": 0.5, "max_dropped": 0.5, "pairing": "all", "num_proc": 2}
    again = run(path, **spec)
    assert (builds, again.key, again.report, list(again.examples)) == (
        [],
        first.key,
        first.report,
        list(first.examples),
    )
    assert "1 of 11 rows are bad" in refused(path)
    assert builds == []
    (tmp_path / "x").mkdir()
    moved = run(path.rename(tmp_path / "x" / "t.jsonl"), cache_dir=str(tmp_path / "cache"), max_bad=1)
    assert (builds, moved.key) == ([], first.key)


def test_the_key_changes_with_everything_that_changes_the_examples(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    keys = {
        run(path).key,
        run(path, key="another tokenizer").key,
        run(path, max_length=100).key,
        run(path, max_prompt_length=50).key,
        run(path, overlong="truncate_prompt").key,
        run(path, source={"limit": 5}).key,
        run(path, source={"columns": {"chosen": "rejected", "rejected": "chosen"}}).key,
        run(write_jsonl(tmp_path / "u.jsonl", GOOD)).key,
        run(write_jsonl(tmp_path / "t.jsonl", GOOD[:9])).key,
    }
    assert len(keys) == 9


@pytest.mark.parametrize("damage", ["flip", "truncate", "no seal", "no examples", "empty folder", "rubbish seal"])
def test_a_damaged_cache_is_built_anew(tmp_path: Path, damage: str) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    first = run(path)
    want, folder = list(first.examples), tmp_path / "cache" / first.key
    data = bytearray((folder / EXAMPLES).read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            (folder / EXAMPLES).write_bytes(bytes(data))
        case "truncate":
            (folder / EXAMPLES).write_bytes(bytes(data[:-9]))
        case "no seal":
            (folder / "seal.json").unlink()
        case "no examples":
            (folder / EXAMPLES).unlink()
        case "rubbish seal":
            (folder / "seal.json").write_text("[1]")
        case _:
            for file in folder.iterdir():
                file.unlink()
    assert list(run(path).examples) == want
    assert sorted(p.name for p in folder.parent.iterdir()) == [first.key, f"{first.key}.lock"]


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"messages": [user("q"), assistant("a")]}])
    assert "has no chat template" in refused(path)
    assert "has no chat template" in refused(path, num_proc=2)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def _prepare_in_process(path: Path, queue: Any) -> None:
    got = run(path)
    queue.put((got.key, [e.id for e in got.examples]))


def test_several_processes_at_once_get_the_same_data_and_one_builds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{**r, "id": f"{i}-{k}"} for i, r in enumerate(GOOD) for k in range(30)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_prepare_in_process, args=(path, queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    got = [queue.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join(timeout=60)
    assert all(g == got[0] for g in got)
    assert len(got[0][1]) == 300
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [got[0][0], f"{got[0][0]}.lock"]


def test_more_processes_give_the_same_examples_and_report(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * (i % 90), "chosen": "c" * (i % 7 + 1), "rejected": "r"} for i in range(700)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    options: dict[str, Any] = {"max_length": 60, "max_bad": 1.0, "max_dropped": 1.0, "max_prompt_length": 50}
    options["max_bad"] = 500
    one = run(path, **options)
    two = run(path, cache_dir=str(tmp_path / "other"), num_proc=2, **options)
    assert list(one.examples) == list(two.examples)
    assert one.report == two.report
    assert balanced(one.report)
    assert "expected at least 1 process, got 0" in refused(path, cache_dir=str(tmp_path / "third"), num_proc=0)


def test_the_default_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "po"))
    path = write_jsonl(tmp_path / "t.jsonl", GOOD)
    got = run(path, cache_dir=None)
    assert (tmp_path / "po" / "data" / got.key / EXAMPLES).is_file()


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
def test_real_sets_with_a_real_tokenizer(tmp_path: Path) -> None:
    tok = AutoTokenizer.from_pretrained(STORIES, add_bos_token=True)
    sources = (Source(str(ALPACA), limit=60),)
    spec = DataSpec(sources, max_length=2048, max_dropped=0.9, cache_dir=str(tmp_path))
    got = prepare(spec, sources, tok, "stories", "train")
    assert balanced(got.report)
    assert (got.report.counts["in"], got.report.formats) == (60, {"set, completions": 60})
    assert got.report.counts["responses_overlong"] > 0
    assert all(e.reward and len(e.reward) == len(e.response_ids) >= 2 for e in got.examples)
    assert all(len(e.prompt_ids) + len(r) <= 2048 and r[-1] == 2 for e in got.examples for r in e.response_ids)
