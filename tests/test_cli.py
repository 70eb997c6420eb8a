"""The command line: words, help, exit codes, the launchers' script."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from po.cli import main
from po.endings import ending
from po.errors import NumericsError, OutOfMemoryError, UserError, out_of_memory
from po.heads import HEADS
from po.words import separate

ROOT = Path(__file__).parents[1]
MINIMAL = "model: ./nowhere\ndata: pairs.jsonl\nloss: dpo\noutput_dir: runs/x\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.mark.parametrize(
    ("words", "own", "overrides"),
    [
        (["r.yaml", "a.b=1", "c=2"], ["r.yaml"], ["a.b=1", "c=2"]),
        (["r.yaml", "--beta", "0.2", "--lr=1e-5"], ["r.yaml"], ["--beta=0.2", "--lr=1e-5"]),
        (["--local_rank=1", "r.yaml"], ["r.yaml"], []),
        (["r.yaml", "--local-rank", "1", "a=b"], ["r.yaml"], ["a=b"]),
        (["--config", "r.yaml", "--resume", "--seed", "3"], ["r.yaml"], ["--resume=true", "--seed=3"]),
        (["r.yaml", "--json", "--use_peft"], ["r.yaml", "--json"], ["--use_peft=true"]),
        (["r.yaml", "--seed", "-1"], ["r.yaml"], ["--seed=-1"]),
        (["r.yaml", "--resume", "a=1"], ["r.yaml"], ["--resume=true", "a=1"]),
        (["--help"], ["--help"], []),
    ],
)
def test_words(words: list[str], own: list[str], overrides: list[str]) -> None:
    assert separate(words, {"--json", "--help"}) == (own, overrides)


def test_help_names_the_exit_codes_and_needs_no_torch() -> None:
    code = "import sys; from po.cli import main; c = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(c)"
    for words in (["--help"], ["check", "--help"], ["export", "--help"], ["train", "--help"]):
        run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        assert "2  the recipe, the data or the command line is wrong" in run.stdout
    assert "train.learning_rate=1e-5 loss.0.beta=0.2" in run.stdout


def test_check_help_lists_every_key(capsys: Capture) -> None:
    assert main(["check", "--help"]) == 0
    out = capsys.readouterr().out
    assert "max_length: Annotated[int, Ge(2)] = 2048  # prompt + response, tokens" in out
    assert "from: str = 'init'  # recipe key `from`: init | base | none | a path or hub name" in out


def test_heads(capsys: Capture) -> None:
    assert main(["heads"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(HEADS)]] == list(HEADS)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_explains_itself(name: str, capsys: Capture) -> None:
    assert main(["heads", name]) == 0
    out = capsys.readouterr().out
    for part in (
        "loss",
        "Hyperparameters:",
        "weight",
        "Needs:",
        "In a recipe:",
        f"- {{head: {name}",
        f"Source: {ROOT}/po",
    ):
        assert part in out


def test_head_dpo(capsys: Capture) -> None:
    main(["heads", "dpo"])
    out = capsys.readouterr().out
    assert "arXiv:2305.18290" in out
    assert "label_smoothing  a number >= 0 and < 0.5 (default: 0.0)" in out
    assert "reference log-probs (`reference:`)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian", "r.yaml"],
            "po: there is no command 'trian'. Did you mean 'train'? Commands: train, check, sample, reward, heads, "
            "export",
        ),
        ([], "the following arguments are required: command"),
        (["train"], "po train: the following arguments are required: recipe"),
        (["train", "nowhere.yaml"], "po: nowhere.yaml: No such file or directory; expected a recipe, a YAML file"),
        (["check"], "po: po check: which recipe? Expected a YAML file, e.g. po check recipes/quickstart.yaml"),
        (["heads", "dpoo"], "po: po heads: no head is called 'dpoo'. Did you mean 'dpo'? Heads: a_lol,"),
        (["export", "runs/x"], "po export: one of the arguments --adapter --merged is required"),
        (["export", "runs/x", "--merged", "--evla", "f"], "unrecognized arguments: --evla f. Did you mean '--eval'?"),
    ],
)
def test_wrong_words_end_with_2(words: list[str], message: str, capsys: Capture) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_wrong_recipe_ends_with_2_and_no_traceback(recipe: str, capsys: Capture) -> None:
    assert main(["train", "--local_rank=0", recipe, "loss.0.bta=1", "--seed", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"po: {recipe}: 2 problems\n")
    assert "loss[0].bta (given on the command line): head 'dpo' has no such hyperparameter" in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(recipe: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PO_DEBUG", "1")
    assert main(["check", recipe, "seed=x"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_schema(capsys: Capture) -> None:
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "po recipe"


# How commands end


def _ends(error: BaseException) -> int:
    def command() -> None:
        raise error

    return ending(command)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x.yaml: lora.r: expected"), 2, "po: x.yaml: lora.r: expected\n"),
        (OutOfMemoryError("batch 3"), 3, "po: batch 3\n"),
        (NumericsError("NaN in row 7"), 4, "po: NaN in row 7\n"),
        (MemoryError(), 3, "po: out of memory: MemoryError\nWhat to change, cheapest first:"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            3,
            "Tried to allocate 2 GiB\nWhat to change",
        ),
        (KeyboardInterrupt(), 130, "po: interrupted\n"),
        (SystemExit(75), 75, ""),
    ],
)
def test_exit_codes(error: BaseException, code: int, message: str, capsys: Capture) -> None:
    assert _ends(error) == code
    assert message in capsys.readouterr().err


def test_the_cpu_allocator_running_out_is_out_of_memory(capsys: Capture) -> None:
    assert ending(lambda: void(torch.empty(1 << 60, dtype=torch.uint8))) == 3
    err = capsys.readouterr().err
    assert "DefaultCPUAllocator: can't allocate memory" in err
    assert "train.per_device_train_batch_size: half, and train.gradient_accumulation_steps: double" in err


def void(_: object) -> None:
    """Turn a value into a command's nothing."""


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        _ends(RuntimeError("a fault of ours"))
    assert not out_of_memory(RuntimeError("a fault of ours"))


def test_only_rank_0_explains_a_wrong_recipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert _ends(UserError("long story")) == 2
    assert capsys.readouterr().err == "po: rank 1 stops for the reason that rank 0 gives\n"
    assert _ends(NumericsError("NaN in row 7")) == 4
    assert capsys.readouterr().err == "po: rank 1: NaN in row 7\n"


# The script for launchers


def test_launch_script_runs_from_the_checkout_without_an_installed_po(tmp_path: Path) -> None:
    code = f"import sys, runpy; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; sys.argv = \
        ['train.py', '--local_rank=0', 'nowhere.yaml']; runpy.run_path({str(ROOT / 'launch' / 'train.py')!r}, \
        run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.stderr == "po: nowhere.yaml: No such file or directory; expected a recipe, a YAML file\n"
    assert run.returncode == 2


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from po.cli import main; sys.exit(main(['heads', 'dpo']))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert run.stdout is not None
    run.stdout.close()
    assert run.wait(60) == 128 + signal.SIGPIPE
    assert run.stderr is not None
    assert run.stderr.read() == b""


def test_cluster_examples_are_well_formed() -> None:
    script = ROOT / "launch" / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    hosts = [
        line for line in (ROOT / "launch" / "hostfile.example").read_text().splitlines() if line and line[0] != "#"
    ]
    assert hosts
    assert all(line.split()[1].startswith("slots=") for line in hosts)


def test_check_reads_rows_and_says_what_it_found(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ROOT.parent / "shared" / "models" / "stories260k"
    if not model.is_dir():
        pytest.skip("the model stories260k is not beside the project")
    monkeypatch.setenv("PO_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i} cats ", "chosen": "sat down", "rejected": "ran away"} for i in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndata: {tmp_path}/pairs.jsonl\nloss: dpo\noutput_dir: {tmp_path}/run\nwarmup_ratio: 0.1\n"
    )
    assert main(["check", str(path), "train.per_device_train_batch_size=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"][0].startswith("warmup_ratio: translated to train.warmup_steps: 0.1")
    assert any("10 rows in = 10 kept" in line for line in found["found"])
    assert found["resolved"]["train"]["per_device_train_batch_size"] == 2
    assert main(["check", str(path), "loss=infonca"]) == 2
    err = capsys.readouterr().err
    assert "infonca" in err
    assert "reward" in err
    assert not (tmp_path / "run").exists()
