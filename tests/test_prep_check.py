"""data_prep/check.py and show.py: each finding on rows that were made to have it, and no more."""

from __future__ import annotations

import json
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_model

from po.data.overlong import Limits
from po.data.read import Record
from po.errors import UserError
from po.prep import near
from po.prep.check import Check, Moments
from po.prep.figures import histograms, statistics
from po.prep.findings import Finding, findings
from po.prep.kept import Kept
from po.prep.measure import Measure, Measured
from po.prep.page import page
from po.prep.run_check import Asked, allowed, check_rows
from po.prep.shown import shown
from po.spec import Source

SCRIPTS = Path(__file__).parents[1] / "data_prep"
WORDS = [f"word{i}" for i in range(500)]


def pair(prompt: str, chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def text(seed: object, n: int = 30) -> str:
    rng = random.Random(str(seed))
    return " ".join(rng.choices(WORDS, k=n))


def plain(n: int) -> list[dict[str, Any]]:
    return [pair(text(("p", i)), text(("c", i)), text(("r", i)), id=f"r{i}") for i in range(n)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def checked(tmp_path: Path, rows: list[Any], **asked: Any) -> Check:
    if "tests" in asked:
        asked["tests"] = [Source(str(write(tmp_path / "test.jsonl", asked["tests"])))]
    return check_rows([Source(str(write(tmp_path / "x.jsonl", rows)))], Asked(**{"language": False} | asked))


def found(check: Check, **options: Any) -> dict[str, Finding]:
    return {f.name: f for f in findings(check, **options) if f.count}


def test_good_rows_have_no_findings(tmp_path: Path) -> None:
    check = checked(tmp_path, plain(50), tests=[{"prompt": text("t")}])
    assert found(check) == {}
    assert all(f.fine for f in findings(check))


def test_bad_rows_and_ids(tmp_path: Path) -> None:
    rows = plain(4)
    rows[3]["id"] = "r0"
    f = found(checked(tmp_path, [*rows, "nonsense\n", {"prompt": "a", "chosen": "b"}]))
    assert set(f) == {"bad", "duplicate_ids"}
    assert (f["bad"].count, f["bad"].share) == (2, 2 / 6)
    assert f["bad"].examples[1] == "x.jsonl:6: rejected: expected text or messages, got nothing"
    assert f["duplicate_ids"].examples == ("x.jsonl:4: x.jsonl:1",)


def test_duplicates_whatever_case_and_spaces(tmp_path: Path) -> None:
    rows = plain(3)
    again = {k: v.upper().replace(" ", "  ") for k, v in rows[1].items() if k != "id"}
    f = found(checked(tmp_path, [*rows, again]))
    assert set(f) == {"duplicates"}
    assert f["duplicates"].examples == ("x.jsonl:4: x.jsonl:2",)


def test_near_duplicates(tmp_path: Path) -> None:
    """A word changed in 90 leaves about 93 % of the triples; half of the text another leaves far less than 80 %."""
    rows = plain(60)
    near_one = {**rows[7], "id": "near", "prompt": rows[7]["prompt"].replace(rows[7]["prompt"].split()[0], "other", 1)}
    far = {**rows[8], "id": "far", "chosen": text("new"), "prompt": text("new2")}
    check = checked(tmp_path, [*rows, near_one, far])
    f = found(check)
    assert set(f) == {"near_duplicates"}
    assert f["near_duplicates"].examples == ("x.jsonl:61: x.jsonl:8",)
    assert "near_duplicates" not in found(check, threshold=1.0)


def test_minhash_finds_what_exact_similarity_finds() -> None:
    """Over many pairs of known similarity: the estimate is right within four standard errors, and on average."""
    rng, errors = random.Random(0), []
    for n in range(60):
        shared, own = rng.sample(range(10**6), 100), rng.sample(range(10**6), 2 * (n % 10) * 10)
        sides = [{str(x) for x in (*shared, *own[i::2])} for i in range(2)]
        a, b = (list(memoryview(near.signature(s)).cast("I")) for s in sides)
        estimate = sum(x == y for x, y in zip(a, b)) / len(a)
        errors.append(estimate - near.jaccard(*sides))
        assert abs(errors[-1]) < 0.25
    assert abs(sum(errors) / len(errors)) < 0.02


def test_identical_and_nearly_identical_pairs(tmp_path: Path) -> None:
    one = text("one", 60)
    rows = [*plain(2), pair("a b c", one, one.upper()), pair("d e f", one, one + " end")]
    f = found(checked(tmp_path, rows, near=False))
    assert set(f) == {"identical_pairs", "nearly_identical_pairs"}
    assert f["identical_pairs"].examples == ("x.jsonl:3: 100% alike",)
    assert f["nearly_identical_pairs"].examples[0].startswith("x.jsonl:4: 98%")


def test_contradictions(tmp_path: Path) -> None:
    """The same two answers the other way round, in whatever form, and the same answer labelled otherwise."""
    p, good, bad = text("p"), text("good"), text("bad")
    rows = [
        *(pair(p, good, bad), pair(p + " more", bad, good)),
        {"prompt": p.upper(), "responses": [{"content": good, "reward": 0}, {"content": bad, "reward": 3}]},
        *({"prompt": p, "completion": good, "label": True}, {"prompt": p, "completion": good, "label": False}),
        *(pair(p, good, text("third")), {"prompt": p, "completion": bad, "label": False}),
    ]
    f = found(checked(tmp_path, rows, near=False))
    assert set(f) == {"contradictions"}
    assert f["contradictions"].count == 4
    assert f["contradictions"].examples == ("x.jsonl:3: x.jsonl:1", "x.jsonl:5: x.jsonl:4")


def test_leakage_and_contamination(tmp_path: Path) -> None:
    test, rows = text("t", 40), plain(5)
    rows[1]["prompt"] = test.upper()
    rows[2]["prompt"] = text("before") + " " + " ".join(test.split()[10:18]) + " " + text("after", 2)
    rows[3]["prompt"] = text("before") + " " + " ".join(test.split()[10:17])
    rows[4]["prompt"] = [{"role": "system", "content": test}, {"role": "user", "content": "short one"}]
    tests = [{"question": test, "answer": "4"}, {"prompt": "short one"}]
    f = found(checked(tmp_path, rows, tests=tests))
    assert f["test_prompts"].examples == (
        "x.jsonl:2: the prompt of test.jsonl:1",
        "x.jsonl:5: the prompt of test.jsonl:2",
    )
    assert [line.partition(": ")[0] for line in f["contaminated"].examples] == ["x.jsonl:2", "x.jsonl:3"]
    gram = " ".join(test.split()[10:18])
    assert f["contaminated"].examples[1] == f"x.jsonl:3: {gram!r}, as in test.jsonl:1 (20% of the prompt)"
    assert "x.jsonl:4" in str(found(checked(tmp_path, rows, tests=tests, ngram=7))["contaminated"].examples)


def test_tests_that_cannot_be_read_stop_the_check(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test\.jsonl:1: prompt: expected text or messages"):
        checked(tmp_path, plain(1), tests=[{"nothing": 1}])


def test_length_and_reward(tmp_path: Path) -> None:
    """Longer responses are preferred in three of four pairs; rewards by source; one reward against the choice."""
    rows = [
        pair(
            "p", "longer one " * k, "short", chosen_reward=k, rejected_reward=0.5, chosen_model="a", rejected_model="b"
        )
        for k in (1, 2, 3)
    ]
    rows.append(pair("p", "short", "a longer one", chosen_reward=0, rejected_reward=1))
    check = checked(tmp_path, rows, near=False)
    assert found(check)["reward_against_choice"].examples == ("x.jsonl:4: chosen is rewarded 1 less than rejected",)
    both = statistics(check)["length_and_preference"]
    assert (both["pairs"], both["share_longer_preferred"]) == (4, 0.75)
    assert both["mean_better"] == pytest.approx((11 + 22 + 33 + 5) / 4)
    expected = np.corrcoef([11, 22, 33, 5, 5, 5, 5, 12], [1, 2, 3, 0.5, 0.5, 0.5, 0, 1])[0, 1]
    assert both["correlation_reward_length"] == pytest.approx(expected)
    margins = [(b["from"], b["margin"]) for b in both["margin_by_length_gap"]]
    assert margins == [(-7, -1), (6, 0.5), (17, 1.5), (28, 2.5)]
    rewards = statistics(check)["rewards"]
    assert rewards["a"] == {"n": 3, "mean": 2, "std": pytest.approx((2 / 3) ** 0.5), "min": 1, "max": 3}
    assert set(rewards) == {"a", "b", "(no source)"}


def test_languages(tmp_path: Path) -> None:
    rows = [
        pair("x", "The weather is going to be wonderful tomorrow, said the old man.", "no"),
        pair("y", "Das Wetter wird morgen bestimmt sehr angenehm, sagte der alte Mann.", "no"),
        pair("z", "4", "5"),
    ]
    assert statistics(checked(tmp_path, rows, language=True))["languages"] == {
        **{"en": pytest.approx(1 / 3), "de": pytest.approx(1 / 3)},
        "?": pytest.approx(1 / 3),
    }


def test_tokens(tmp_path: Path) -> None:
    """The tiny tokenizer puts BOS in front; a row too long is lost, and one with its own BOS has two."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    rows = [pair("w1 w2 ", "w3", "w4"), pair("w1 ", "w2 " * 30, "w3"), pair("w1 ", "<s> w2", "w3")]
    rows.append(pair("w1 ", "w2 </s> w5", "w6"))
    check = checked(tmp_path, rows, near=False, tokenizer=tokenizer, limits=Limits(16, None, "drop"))
    f = found(check)
    assert set(f) == {"text_lost", "bos", "eos_inside"}
    assert (f["text_lost"].count, f["text_lost"].examples[0].partition(": ")[0]) == (2 + 31 + 2, "x.jsonl:2")
    assert f["text_lost"].share == pytest.approx(35 / (35 + 7 + 7 + 8))
    assert (f["bos"].count, f["eos_inside"].count) == (1, 1)
    check = checked(tmp_path, rows[:2], near=False, tokenizer=tokenizer, limits=Limits(16, None, "truncate_response"))
    f = found(check)
    assert set(f) == {"text_lost", "no_end"}
    assert (f["text_lost"].count, f["no_end"].count) == (17, 1)


def test_processes_change_nothing(tmp_path: Path) -> None:
    rows = [*plain(150), *plain(20), "nonsense\n"]
    one, two = (checked(tmp_path, rows, num_proc=n) for n in (1, 2))
    assert findings(one) == findings(two)
    assert statistics(one) == statistics(two)
    assert histograms(one) == histograms(two)


def test_the_page_holds_findings_and_plots_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    check = checked(tmp_path, [*plain(20), pair("p", "<script>", "<SCRIPT>")])
    html = page("Check of <x>", findings(check), statistics(check), histograms(check))
    assert html.count("<svg") == len(histograms(check)) == 4
    assert "<script" not in html.lower()
    assert "Check of &lt;x&gt;" in html
    assert not re.search(r"(src|href)=|https?://", html)
    heights = [float(h) for h in re.findall(r"<rect [^>]*height='([\d.]+)'", html)]
    assert max(heights) == 140


def test_empty_files(tmp_path: Path) -> None:
    check = checked(tmp_path, [])
    assert found(check) == {}
    assert statistics(check)["rows"] == {"in": 0, "read": 0}
    assert histograms(check) == {}


def test_limits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown finding 'duplicate'\. Did you mean 'duplicates'"):
        allowed(["duplicate=1"])
    check = checked(tmp_path, [*plain(3), {**plain(1)[0], "id": "again"}])
    assert not found(check)["duplicates"].fine
    assert found(check, allow=allowed(["duplicates=0.25"]))["duplicates"].fine


@pytest.mark.slow
def test_the_scripts(tmp_path: Path) -> None:
    """Exit code 2 beyond a limit; JSON and page; show prints the scored tokens, and what becomes of other rows."""
    write(tmp_path / "x.jsonl", [*plain(3), {**plain(1)[0], "id": "again"}])

    def run(script: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / script), "x.jsonl", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = run("check.py", "--json", "c.json", "--html", "c.html", "--no-language")
    assert done.returncode == 2
    assert "beyond their limits: duplicates" in done.stderr
    assert "x.jsonl:4: x.jsonl:1" in done.stdout
    verdict = json.loads((tmp_path / "c.json").read_text())
    assert verdict["fine"] is False
    assert [f["name"] for f in verdict["findings"] if not f["fine"]] == ["duplicates"]
    assert (tmp_path / "c.html").read_text().startswith("<!doctype html>")
    assert run("check.py", "--allow", "duplicates=0.5", "--dry-run", "--json", "d.json").returncode == 0
    assert not (tmp_path / "d.json").exists()


def test_rows_are_left_out_by_finding(tmp_path: Path) -> None:
    """--drop with --output: the rest as it was, each dropped row under its reason, and exit code 0."""
    rows = [*plain(5), {**plain(1)[0], "id": "again"}, pair("a b", "Same", "same"), *plain(0)]
    rows.append(pair(rows[1]["prompt"], rows[1]["rejected"], rows[1]["chosen"], id="denies"))
    write(tmp_path / "x.jsonl", rows)
    write(tmp_path / "t.jsonl", [{"prompt": rows[3]["prompt"]}])
    names = ["duplicates", "identical_pairs", "test_prompts", "contradictions", "contaminated"]
    command = [sys.executable, str(SCRIPTS / "check.py"), "x.jsonl", "--tests", "t.jsonl", "--no-language", "--no-near"]
    command += ["-o", "clean.jsonl", "--drop", *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == [rows[0], rows[2], rows[4]]
    report = json.loads((tmp_path / "clean.jsonl.report.json").read_text())
    assert report["dropped"] == {"contradictions": 2, "test_prompts": 1, "duplicates": 1, "identical_pairs": 1}
    assert report["options"]["tests"][0]["name"] == "t.jsonl"
    assert found(check_rows([Source(str(tmp_path / "clean.jsonl"))], Asked(language=False))) == {}
    done = subprocess.run([*command[:-6], "-o", "other.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "--drop and --output go together" in done.stderr) == (2, True)


def test_an_interrupted_check_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("po.prep.kept._LEAST", 0.0)
    monkeypatch.setattr("po.prep.kept._SHARE", 0)
    source = [Source(str(write(tmp_path / "x.jsonl", [*plain(30), "nonsense\n", *plain(10)])))]
    real, seen = Measure.__call__, []

    def stumbles(self: Measure, record: Record) -> Measured:
        seen.append(record.where)
        if len(seen) == 21:
            raise UserError("the disk is gone")
        return real(self, record)

    monkeypatch.setattr(Measure, "__call__", stumbles)
    asked = Asked(language=False)
    with pytest.raises(UserError, match="the disk is gone"):
        check_rows(source, asked, Kept(tmp_path / "c.json", {"a": 1}, False))
    with pytest.raises(UserError, match="a different command"):
        check_rows(source, asked, Kept(tmp_path / "c.json", {"a": 2}, False))
    check = check_rows(source, asked, Kept(tmp_path / "c.json", {"a": 1}, False))
    assert seen == [f"x.jsonl:{n}" for n in (*range(1, 22), *range(21, 42))]
    whole = check_rows(source, asked)
    assert repr(check) == repr(whole)
    assert findings(check) == findings(whole)
    again = check_rows(source, asked, Kept(tmp_path / "c.json", {"a": 1}, False))
    assert repr(again) == repr(whole)
    assert len(seen) == 42 + 41, "nothing was left to measure"


@pytest.mark.slow
def test_a_killed_check_goes_on(tmp_path: Path) -> None:
    """kill -9 while it measures: the same verdict as one that was left alone, and no row is measured twice."""
    rng = random.Random(0)
    rows = [pair(text(i, 8), text((i, "c"), 12), text((i, "r"), 12)) for i in range(9000)]
    rows += [rows[rng.randrange(9000)] for _ in range(300)]
    lines = [json.dumps(row) + "\n" for row in rows]
    lines[4000] = "nonsense\n"
    (tmp_path / "x.jsonl").write_text("".join(lines))
    state, measured = tmp_path / "c.json.check.partial", tmp_path / "measured"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import check, po.prep.measure as m; real = m.Measure.__call__\n"
        "log = open(sys.argv[2], 'a', buffering=1)\n"
        "m.Measure.__call__ = lambda self, r: (log.write(r.where.split(':')[1] + '\\n'), real(self, r))[1]\n"
        "sys.exit(check.arguments.end(check.main, sys.argv[3:]))"
    )
    command = [sys.executable, "-c", code, str(SCRIPTS), str(measured), "x.jsonl", "--no-language", "--allow", "bad=1"]

    def run(name: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "--json", name, *more], cwd=tmp_path, capture_output=True, text=True)

    process = subprocess.Popen([*command, "--json", "c.json"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    while process.poll() is None and not state.exists():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    with open(state, "rb") as f:
        f.readline()
        kept = pickle.load(f).counts["in"]
    assert 0 < kept < len(rows)
    before = len(measured.read_text().splitlines())
    done = run("c.json", "--ngram", "9")
    assert (done.returncode, "a different command (options: was" in done.stderr) == (2, True)
    done = run("c.json")
    assert done.returncode == 2, done.stderr
    assert not list(tmp_path.glob("*.partial*"))
    again = measured.read_text().splitlines()[before:]
    assert again == [str(n) for n in range(kept + 1, len(rows) + 1)]
    run("d.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("c.json", "d.json"))
    assert {k: v for k, v in one.items() if k != "command"} == {k: v for k, v in two.items() if k != "command"}
    assert one["statistics"]["rows"] == {"in": 9300, "read": 9299}


def test_what_is_kept_of_a_check_makes_nothing_else(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "c.json", {"a": 1}, False)
    kept.path.write_bytes(b'{"a": 1}\n' + pickle.dumps(Path("x")))
    with pytest.raises(UserError, match=r"cannot be read \(holds a pathlib.*\); remove it, or give --force"):
        kept.load()
    kept.path.write_bytes(b'{"a": 1}\n' + pickle.dumps(Check())[:40])
    with pytest.raises(UserError, match="cannot be read"):
        kept.load()
    check = Check(counts=Counter(bad=2), rewards={"x": Moments(1, 2.0)}, signatures=bytearray(b"abc"))
    check.hashes["id"].append(2**63)
    kept.save(check, last=True)
    assert Kept(tmp_path / "c.json", {"a": 1}, False).load() == check
    assert Kept(tmp_path / "c.json", {"a": 2}, True).load() is None


def test_show(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    rows = [pair("w1 w2 ", "w3", "w4", id="a"), pair("w1 ", "w2 " * 30, "w3", id="b"), {"prompt": "w1"}]
    sources = [Source(str(write(tmp_path / "x.jsonl", rows)))]
    limits = Limits(16, None, "drop", least=1)
    texts = list(shown(sources, tokenizer, limits, (), 0, 3))
    assert "x.jsonl:1 (id a)" in texts[0]
    assert "response 0, 2 tokens, scored, label +1:\n   w3| </s>" in texts[0]
    assert texts[1].startswith("overlong, nothing is scored:\nx.jsonl:2: ")
    assert texts[2].startswith("bad: x.jsonl:3: ")
    assert list(shown(sources, tokenizer, limits, ["x.jsonl:2"], 0, 3)) == [texts[1]]
    with pytest.raises(UserError, match=r"no row has the id \(or file:line\) c"):
        list(shown(sources, tokenizer, limits, ["a", "c"], 0, 3))
