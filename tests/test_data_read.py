"""Files, folders and patterns give records with their place; what is broken is a record too."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from data_support import GSM8K, write_jsonl

from po.data.formats import convert
from po.data.read import Record
from po.data.sources import open_sources
from po.errors import UserError
from po.spec import Source

ROWS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)]


def records(path: Path | str, **options: object) -> list[Record]:
    return list(open_sources([Source(str(path), **options)], "train")[0].records())  # type: ignore[arg-type]


def places(path: Path | str, **options: object) -> list[str]:
    return [r.where if r.problem is None else str(r.problem) for r in records(path, **options)]


def test_every_kind_of_file_gives_the_same_records_and_its_own_places(tmp_path: Path) -> None:
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "f"))
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "g"))
    (tmp_path / "h.json").write_text(lines)
    names = ["a.jsonl", "b.jsonl.gz", "c.json", "d.json.gz", "e.parquet", "f", "g", "h.json"]
    got = {name: records(tmp_path / name) for name in names}
    assert all([r.data for r in rs] == ROWS for rs in got.values())
    third = [got[name][2].where for name in names]
    assert third == [
        "a.jsonl:3",
        "b.jsonl.gz:3",
        "c.json:12",
        "d.json.gz:1",
        "e.parquet:row 3",
        "f:row 3",
        "g:row 3",
        "h.json:3",
    ]


def test_a_pattern_reads_all_files_and_limit_counts_over_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "1.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "2.jsonl", ROWS[2:])
    assert places(tmp_path / "*.jsonl") == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:1", "2.jsonl:2", "2.jsonl:3"]
    assert places(tmp_path / "*.jsonl", limit=3) == ["1.jsonl:1", "1.jsonl:2", "2.jsonl:1"]


def test_files_of_one_name_are_called_by_their_path(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "t.jsonl", ROWS[:1])
    opened = open_sources([Source(str(tmp_path / "a/t.jsonl")), Source(str(tmp_path / "b/t.jsonl"))], "train")
    assert [r.where for o in opened for r in o.records()] == [f"{tmp_path}/a/t.jsonl:1", f"{tmp_path}/b/t.jsonl:1"]


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ROWS)
    rows = open_sources([Source(str(path))], "train")[0].records()
    next(rows)
    with open(path, "a") as f:  # beyond the reader's buffer
        f.write("\n" * 200_000 + json.dumps(ROWS[0]) + "\n")
    assert [r.where for r in rows][-1] == "t.jsonl:200006"


def test_broken_bytes_become_records_with_a_problem_and_the_rest_is_read(tmp_path: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + b"\n".join([good, b'{"prompt": "a', b"[1, 2]", b'{"a": "\xff"}', b"", b"1" * 5000, good])
    )
    assert places(path) == [
        "t.jsonl:1",
        "t.jsonl:2: expected one JSON object per line, got broken JSON: Unterminated string starting at (column 12)",
        "t.jsonl:3: expected a JSON object, got a list of 2",
        "t.jsonl:4: expected UTF-8, got byte 0xff at column 8",
        places(path)[4],
        "t.jsonl:7",
    ]
    assert places(path)[4].startswith(
        "t.jsonl:6: expected one JSON object per line, got JSON that Python refuses: Exceeds"
    )


def test_a_truncated_or_damaged_gzip_gives_what_it_has_and_then_a_problem(tmp_path: Path) -> None:
    whole = gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS * 2000).encode())
    (tmp_path / "t.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    got = places(tmp_path / "t.jsonl.gz")
    assert len(got) > 100
    assert got[-2] == f"t.jsonl.gz:{len(got) - 1}"
    assert got[-1] == (
        f"t.jsonl.gz:{len(got)}: expected a whole gzip file, got a truncated one; the rows from here on are lost"
    )
    (tmp_path / "u.jsonl.gz").write_bytes(b"no gzip at all")
    assert places(tmp_path / "u.jsonl.gz") == [
        "u.jsonl.gz:1: expected a whole gzip file, got a damaged one (Not a gzipped file (b'no')); "
        "the rows from here on are lost"
    ]
    flipped = bytearray(whole)
    flipped[-8] ^= 0xFF  # the checksum
    (tmp_path / "v.json.gz").write_bytes(bytes(flipped))
    assert "expected a whole gzip file, got a damaged one" in places(tmp_path / "v.json.gz")[-1]


def test_a_broken_json_array_keeps_the_records_before_the_break(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"a": 1},\n {"b": 2},\n {"c": }]')
    assert places(path) == [
        "t.json:1",
        "t.json:2",
        "t.json:3: expected a JSON object, got broken JSON: Expecting value (line 3); the rows from here on are lost",
    ]
    path.write_text('[{"a": 1}\n {"b": 2}]')
    assert places(path)[1] == "t.json:2: expected ',' or a final ']' in an array of records, got '{'"
    path.write_text('[{"a": 1}, 3')
    assert places(path)[1:] == [
        "t.json:1: expected a JSON object, got 3",
        "t.json:1: expected ',' or a final ']' in an array of records, got the end of the file",
    ]
    path.write_bytes(b'[{"a": "\xff"}, {"b": 1}]')
    assert places(path) == ["t.json:1: expected UTF-8, got byte 0xff", "t.json:1"]
    path.write_text(" [ ] ")
    assert places(path) == []


def test_a_broken_parquet_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    assert places(tmp_path / "t.parquet")[0].startswith(
        "t.parquet:row 1: expected a whole Parquet file, got ArrowInvalid: "
    )


def test_nulls_that_arrow_fills_in_are_taken_away(tmp_path: Path) -> None:
    rows = [{"m": [{"role": "user", "content": "a"}]}, {"m": [{"role": "tool", "content": "b", "name": "f"}]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    table = pa.Table.from_pylist([{"m": [{"role": "user", "content": "a", "name": None}]}, rows[1]])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert [r.data for r in records(tmp_path / "t.parquet")] == rows


def test_what_is_not_there_is_named_with_what_is_near(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError) as e:
        places(tmp_path / "trian.jsonl")
    assert str(e.value) == f"data.train: {tmp_path}/trian.jsonl not found in {tmp_path}. Did you mean 'train.jsonl'?"
    with pytest.raises(UserError, match=r"data.train: .*/no/t.jsonl not found: there is no folder .*/no$"):
        places(tmp_path / "no" / "t.jsonl")
    with pytest.raises(UserError, match=r"data.train: no file matches '.*\*.parquet'$"):
        places(tmp_path / "*.parquet")
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(
        UserError, match=r"t.csv: expected a file ending in .jsonl, .ndjson, .json, .parquet, .jsonl.gz"
    ):
        places(tmp_path / "t.csv")
    with pytest.raises(
        UserError, match=r"is a folder that `datasets` did not save \(no state.json\).*write a pattern: .*/\*.jsonl$"
    ):
        places(tmp_path)


def test_options_that_a_source_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ROWS)
    with pytest.raises(UserError, match=r"t.jsonl: split: a file has none; remove it, or name a hub dataset$"):
        places(path, split="train")
    with pytest.raises(UserError, match=r"data.train: limit: expected a positive number of rows, got 0$"):
        places(path, limit=0)
    two = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    two.save_to_disk(str(tmp_path / "d"))
    with pytest.raises(UserError, match=r"split: expected one of train, test; got none.$"):
        places(tmp_path / "d")
    with pytest.raises(UserError, match=r"split: expected one of train, test; got 'tset'. Did you mean 'test'\?$"):
        places(tmp_path / "d", split="tset")
    assert len(places(tmp_path / "d", split="test")) == 5


def test_the_fingerprint_is_of_content_and_name(tmp_path: Path) -> None:
    def mark(path: Path) -> str:
        return open_sources([Source(str(path))], "train")[0].fingerprint()

    (tmp_path / "x").mkdir()
    a = write_jsonl(tmp_path / "t.jsonl", ROWS)
    same = write_jsonl(tmp_path / "x" / "t.jsonl", ROWS)
    other = write_jsonl(tmp_path / "u.jsonl", ROWS[:4])
    assert mark(a) == mark(same) != mark(other)


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data")
def test_raw_rows_become_pairs_in_a_few_lines(tmp_path: Path) -> None:
    """The raw file is no standard format: that is said, and converting it is the user's few lines."""
    found = convert(records(GSM8K)[0], Source("x")).problems
    assert str(found[0]).startswith(
        "gsm8k_solutions.jsonl.gz:1: expected chosen and rejected, responses with rewards, completion with label, or "
        "messages, got fields question, ground_truth, 6b_finetuning"
    )
    rows = []
    for line in gzip.decompress(GSM8K.read_bytes()).decode().splitlines():
        data = json.loads(line)
        tries = [v for v in data.values() if isinstance(v, dict)]
        right = [t["solution"] for t in tries if t["is_correct"]]
        wrong = [t["solution"] for t in tries if not t["is_correct"]]
        rows += (
            [{"prompt": data["question"] + "\n", "chosen": right[0], "rejected": wrong[0]}] if right and wrong else []
        )
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    done = [convert(r, Source("x")) for r in records(path)]
    assert len(done) == len(rows) > 300
    assert {(c.format, c.row.kind) for c in done if c.row} == {("preference, standard", "pair")}
    assert not any(c.problems for c in done)
