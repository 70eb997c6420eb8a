"""The reference: what it is, when its stored log-probs are reused, and how a wrong one is noticed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_policy import FOUR_BIT_SIZE, STORIES, needs_bitsandbytes

from po.batch import Collate, Groups
from po.data.rows import Example, Item
from po.errors import NumericsError, UserError
from po.heads import HEADS
from po.logp_store import LogpStore, response_key
from po.logprob import Want, score
from po.policy import load_frozen, load_policy
from po.ref_cache import RefCache, compute_dtype, tolerance
from po.reference import (
    AdapterOff,
    Cached,
    Frozen,
    build_reference,
    cache_folder,
    check_live,
    check_start,
    identity,
)
from po.sharing import share as share_prefix
from po.spec import DataSpec, LoraSpec, ModelSpec, Recipe, ReferenceSpec, Source, Term
from po.types import Head, HeadInput, HeadOutput, Needs

LORA = LoraSpec(r=4, alpha=8, target_modules=("q_proj", "v_proj"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models, and two adapters on the first that someone trained."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: str(tiny.make_model(folder / name, seed)) for seed, name in enumerate(("a", "b"))}
    for seed, name in enumerate(("sft", "sft2")):
        net = load_policy(ModelSpec(paths["a"]), LORA)
        disturb(net, seed)
        net.save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def disturb(net: torch.nn.Module, seed: int = 0) -> None:
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p)


def share(net: torch.nn.Module) -> None:
    share_prefix(net.get_base_model() if hasattr(net, "get_base_model") else net)


def rows(n: int, seed: int = 0) -> Groups:
    rng = random.Random(seed)
    examples = [
        Example(
            f"r{i}",
            f"rows.jsonl:{i + 1}",
            tuple(rng.randrange(3, 60) for _ in range(rng.randint(1, 9))),
            tuple(tuple(rng.randrange(3, 60) for _ in range(rng.randint(1, 7))) for _ in range(2 + i % 3)),
        )
        for i in range(n)
    ]
    return Groups(examples, [Item(i, tuple(range(len(e.response_ids)))) for i, e in enumerate(examples)])


def recipe(model: ModelSpec, cache: Path, **changes: object) -> Recipe:
    reference = ReferenceSpec(**{"cache_dir": str(cache)} | dict(changes.pop("reference", {})))
    data = DataSpec(train=(Source("rows.jsonl"),))
    base = Recipe(model, data, (Term(HEADS["dpo"]()),), str(cache / "run"), lora=LORA, reference=reference)
    return replace(base, **changes)


def batch_of(groups: Groups, look: object = None) -> object:
    return Collate(True, look)([(groups.examples[i.example], i, True) for i in groups.items])


def live(model: ModelSpec, groups: Groups) -> torch.Tensor:
    """One plain forward per response: no packing, no cache, no code of the routine."""
    net = load_frozen(model)
    out = []
    for example in groups.examples:
        for response in example.response_ids:
            ids = torch.tensor([[*example.prompt_ids, *response]])
            with torch.no_grad():
                logp = net(input_ids=ids).logits[0, -len(response) - 1 : -1].float().log_softmax(-1)
            out.append(logp.gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(out)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/part-*.parquet"))


# Identity


def test_identity(models: dict[str, str]) -> None:
    plain, sft = ModelSpec(models["a"]), ModelSpec(models["a"], adapter=models["sft"])

    def ident(model: ModelSpec, source: str) -> tuple[str | None, bool, bool, str]:
        what = identity(model, ReferenceSpec(source))
        return what.model.adapter, what.is_init, what.is_base, what.key

    assert ident(plain, "init")[:3] == (None, True, True)
    assert ident(plain, "base")[:3] == (None, True, True)
    assert ident(sft, "init")[:3] == (models["sft"], True, False)
    assert ident(sft, "base") == (None, False, True, ident(plain, "init")[3])
    assert ident(plain, models["sft"]) == (models["sft"], False, False, ident(sft, "init")[3])
    assert ident(sft, models["sft"])[1]  # named by its path, and still the start
    assert identity(plain, ReferenceSpec(models["b"])).model == ModelSpec(models["b"])
    assert len({ident(m, s)[3] for m in (plain, sft) for s in ("init", "base", models["b"], models["sft2"])}) == 4


# The cache holds the right numbers


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("source", ["init", "base", "b", "sft2"])
def test_cached_log_probs_are_the_models(models: dict[str, str], tmp_path: Path, source: str, shared: bool) -> None:
    model = ModelSpec(models["a"], adapter=models["sft"])
    r = recipe(model, tmp_path, lora=None, reference={"source": models.get(source, source)})
    groups = rows(7)
    reference = build_reference(r, [groups], share_prefix=shared)
    assert isinstance(reference, Cached)
    assert reference.lookup is not None
    batch = Collate(shared, reference.lookup)([(groups.examples[i.example], i, True) for i in groups.items])
    expected = {
        "init": model,
        "base": replace(model, adapter=None),
        "b": ModelSpec(models["b"]),
        "sft2": replace(model, adapter=models["sft2"]),
    }[source]
    torch.testing.assert_close(reference.logps(torch.nn.Identity(), batch), live(expected, groups), rtol=0, atol=1e-5)
    assert reference.starts_at_policy == (source == "init")


def test_nothing_to_do_without_a_head_that_needs_it(models: dict[str, str], tmp_path: Path) -> None:
    r = recipe(ModelSpec(models["a"]), tmp_path, loss=(Term(HEADS["sft"]()),), reference={"source": "none"})
    assert build_reference(r, [rows(2)]) is None


def test_parquet_is_portable(models: dict[str, str], tmp_path: Path) -> None:
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(3)
    reference = build_reference(r, [groups])
    (part,) = parts(tmp_path)
    table = pq.read_table(part)
    assert {f.name: str(f.type) for f in table.schema} == {"key": "string", "logps": "list<element: float>"}
    found = dict(zip(table["key"].to_pylist(), table["logps"].to_pylist()))
    e = groups.examples[2]
    key = response_key(e.prompt_ids, e.response_ids[1])
    np.testing.assert_array_equal(np.float32(found[key]), reference.lookup(e.prompt_ids, e.response_ids[1]))
    assert table.schema.metadata[b"model"] == models["a"].encode()
    assert len(found) == sum(len(e.response_ids) for e in groups.examples)


# Reuse: exactly where it is right


def work(r: Recipe, groups: Sequence[Groups]) -> int:
    """How many responses the recipe's cache would have to compute."""
    cache = RefCache(LogpStore(cache_folder(r, identity(r.model, r.reference)), {}), True, None)
    return sum(len(w.item.responses) for w in cache.missing(groups))


def test_reused_across_heads_betas_rates_folders_and_layouts(models: dict[str, str], tmp_path: Path) -> None:
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(6)
    build_reference(r, [groups])
    before = parts(tmp_path)
    moved = shutil.copytree(models["a"], tmp_path / "moved")
    others = [
        replace(r, loss=(Term(HEADS["dpo"](beta=0.7)),)),
        replace(r, loss=(Term(HEADS["infonca"]()), Term(HEADS["apo_zero"](), 0.5))),
        replace(r, train={"learning_rate": 1e-3, "num_train_epochs": 5}),
        replace(r, output_dir="elsewhere", seed=7, lora=LoraSpec(r=64)),
        replace(r, model=ModelSpec(str(moved))),
        replace(r, model=ModelSpec(models["a"], dtype="float32")),  # what `auto` means here
    ]
    pairs = Groups(groups.examples, [Item(5, (1, 0)), Item(2, (0, 3))])
    for other in others:
        assert work(other, [groups, pairs]) == 0
        build_reference(other, [pairs])
    assert parts(tmp_path) == before


def test_never_reused_across_weights_dtype_tokens_or_truncation(models: dict[str, str], tmp_path: Path) -> None:
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(6)
    build_reference(r, [groups])
    total = sum(len(i.responses) for i in groups.items)
    changed = shutil.copytree(models["a"], tmp_path / "changed")
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    for model in (
        ModelSpec(models["b"]),
        ModelSpec(str(changed)),
        ModelSpec(models["a"], adapter=models["sft"]),
        ModelSpec(models["a"], dtype="bfloat16"),
    ):
        assert work(replace(r, model=model), [groups]) == total
    assert cache_folder(r, identity(r.model, r.reference), torch.bfloat16) != cache_folder(
        r, identity(r.model, r.reference)
    )
    rng = random.Random(3)
    cache = RefCache(LogpStore(cache_folder(r, identity(r.model, r.reference)), {}), True, None)
    for _ in range(200):  # any other token ids: an edited row, another template, another truncation
        e = groups.examples[rng.randrange(6)]
        new = rng.choice([edit_prompt, cut_prompt, cut_response, move_boundary, edit_response])(e, rng)
        everything = tuple(range(len(e.response_ids)))
        before, after = ({(x.prompt_ids, x.response_ids[k]) for k in everything} for x in (e, new))
        todo = cache.missing([Groups([new], [Item(0, everything)])])
        assert sum(len(w.item.responses) for w in todo) == len(after - before)


def edit_prompt(e: Example, rng: random.Random) -> Example:
    i = rng.randrange(len(e.prompt_ids))
    return replace(e, prompt_ids=(*e.prompt_ids[:i], 60, *e.prompt_ids[i + 1 :]))


def cut_prompt(e: Example, rng: random.Random) -> Example:
    return replace(e, prompt_ids=e.prompt_ids[1:] or (61,))


def cut_response(e: Example, rng: random.Random) -> Example:
    return replace(e, response_ids=tuple(r[:-1] or (61,) for r in e.response_ids))


def move_boundary(e: Example, rng: random.Random) -> Example:
    """The same text, other tokens scored: prompt + response is equal."""
    first = e.response_ids[0]
    return replace(e, prompt_ids=(*e.prompt_ids, first[0]), response_ids=(first[1:] or (61,), *e.response_ids[1:]))


def edit_response(e: Example, rng: random.Random) -> Example:
    return replace(e, response_ids=((*e.response_ids[0][:-1], 61), *e.response_ids[1:]))


def test_only_what_is_missing_is_computed(models: dict[str, str], tmp_path: Path) -> None:
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(9)
    some = Groups(groups.examples, groups.items[:4])
    build_reference(r, [some])
    (first,) = parts(tmp_path)
    build_reference(r, [groups, some])
    (second,) = set(parts(tmp_path)) - {first}
    keys = [set(pq.read_table(p)["key"].to_pylist()) for p in (first, second)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == sum(len(e.response_ids) for e in groups.examples)


def test_long_sets_are_split_and_the_longest_come_first(models: dict[str, str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("po.ref_cache._TOKENS", 12)
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(8)
    cache = RefCache(LogpStore(tmp_path, {}), True, None)
    todo = cache.missing([groups])
    assert [w.tokens for w in todo] == sorted((w.tokens for w in todo), reverse=True)
    assert any(len(w.item.responses) > 1 for w in todo)
    assert all(len(w.item.responses) == 1 for w in todo if w.tokens > 12)
    reference = build_reference(r, [groups])
    batch = batch_of(groups, reference.lookup)
    torch.testing.assert_close(batch.ref_T, live(r.model, groups), rtol=0, atol=1e-5)


def test_ranks_share_the_work(models: dict[str, str], tmp_path: Path) -> None:
    groups = rows(9)
    net = load_frozen(ModelSpec(models["a"]))
    share(net)
    stores = [RefCache(LogpStore(tmp_path, {}), True, None) for _ in range(3)]
    todo = stores[0].missing([groups])
    for rank, cache in enumerate(stores):
        assert cache.missing([groups]) == todo  # they open the folder before anyone writes
        cache.fill(net, [groups], todo, rank, 3)
    stores[0].store.refresh()
    assert len(list(tmp_path.glob("part-*"))) == 3
    assert not stores[0].missing([groups])


@pytest.mark.slow
def test_two_processes_build_one_cache(models: dict[str, str], tmp_path: Path) -> None:
    code = """
import sys, torch
import test_reference as t
rank = int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/rendezvous", rank=rank, world_size=2)
r, groups = t.recipe(t.ModelSpec(sys.argv[1]), t.Path(sys.argv[2])), t.rows(9)
reference = t.build_reference(r, [groups], rank=rank, world=2)
torch.testing.assert_close(t.batch_of(groups, reference.lookup).ref_T, t.live(r.model, groups), rtol=0, atol=1e-5)
torch.distributed.destroy_process_group()
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, models["a"], str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(i)], env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    keys = [set(pq.read_table(p)["key"].to_pylist()) for p in parts(tmp_path)]
    assert len(keys) == 2
    assert not keys[0] & keys[1]
    assert "reference log-probs" in errors[0]
    assert "reference log-probs" not in errors[1]


def test_building_leaves_the_random_state_alone(models: dict[str, str], tmp_path: Path) -> None:
    """Or a warm cache would train another model than a cold one."""
    model = ModelSpec(models["a"], adapter=models["sft"])
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    build_reference(recipe(model, tmp_path, lora=None), [rows(3)])
    assert torch.equal(torch.random.get_rng_state(), before)


# Damage


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_file_is_named_set_aside_and_made_again(models: dict[str, str], tmp_path: Path, damage: str) -> None:
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(6)
    build_reference(r, [Groups(groups.examples, groups.items[:3])])
    build_reference(r, [groups])
    bad, _ = parts(tmp_path)
    data = bad.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    bad.write_bytes({"flip": bytes(flipped), "cut": data[:-9]}[damage])
    with pytest.warns(UserWarning, match=f"{bad.name} is damaged; it is set aside"):
        reference = build_reference(r, [groups])
    assert bad.with_name(bad.name + ".damaged").exists()
    torch.testing.assert_close(batch_of(groups, reference.lookup).ref_T, live(r.model, groups), rtol=0, atol=1e-5)


def test_kill_9_while_filling_loses_only_what_was_not_saved(models: dict[str, str], tmp_path: Path) -> None:
    code = """
import os, sys
import test_reference as t, po.ref_cache as c
c._SAVE_AFTER, c._TOKENS = -1, 12
real = c.RefCache.score
def score(self, *args):
    if len(list(self.store.folder.glob("part-*"))) == 3:
        os.kill(os.getpid(), 9)
    return real(self, *args)
c.RefCache.score = score
t.build_reference(t.recipe(t.ModelSpec(sys.argv[1]), t.Path(sys.argv[2])), [t.rows(8)])
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, models["a"], str(tmp_path)], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = parts(tmp_path)
    assert len(kept) == 3
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(8)
    assert 0 < work(r, [groups]) < sum(len(i.responses) for i in groups.items)
    reference = build_reference(r, [groups])
    assert set(kept) < set(parts(tmp_path))
    torch.testing.assert_close(batch_of(groups, reference.lookup).ref_T, live(r.model, groups), rtol=0, atol=1e-5)


def test_the_probe_finds_log_probs_of_another_model(models: dict[str, str], tmp_path: Path) -> None:
    """As if a store of one model lay where another's belongs: every file is sound, and the numbers are wrong."""
    r, groups = recipe(ModelSpec(models["a"]), tmp_path), rows(6)
    other = replace(r, model=ModelSpec(models["a"], adapter=models["sft"]), lora=None)
    build_reference(other, [groups])
    wrong = cache_folder(other, identity(other.model, other.reference))
    wrong.rename(cache_folder(r, identity(r.model, r.reference)))
    with pytest.raises(NumericsError) as e:
        build_reference(r, [groups])
    text = str(e.value)
    assert text.startswith(f"reference: the log-probs in {cache_folder(r, identity(r.model, r.reference))} are not the")
    assert "row rows.jsonl:" in text
    assert "Delete that folder to have them computed again" in text


def test_the_probe_allows_rounding(models: dict[str, str], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        net = load_frozen(ModelSpec(models["a"], dtype=dtype))
        share(net)
        cache, groups = RefCache(LogpStore(tmp_path / dtype, {}), True, None), rows(12)
        cache.fill(net, [groups], cache.missing([groups]), 0, 1)
        cache.store.refresh()
        assert cache.probe(net, [groups], random.Random(0), 12) <= tolerance(compute_dtype(net)).largest / 4


def test_log_probs_that_are_not_finite_are_not_stored(models: dict[str, str], tmp_path: Path) -> None:
    net = load_frozen(ModelSpec(models["a"]))
    share(net)
    net.lm_head.weight.data[7, 0] = torch.nan
    cache, groups = RefCache(LogpStore(tmp_path, {}), True, None), rows(3)
    with pytest.raises(NumericsError, match=r"the log-prob of token 0 of response 0 of row rows.jsonl:\d is nan"):
        cache.fill(net, [groups], cache.missing([groups]), 0, 1)
    assert not list(tmp_path.iterdir())


# The other kinds


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(r=4),
        LoraSpec(r=4, use_dora=True),
        LoraSpec(r=4, use_rslora=True, modules_to_save=("lm_head", "norm", "input_layernorm")),
        LoraSpec(r=4, modules_to_save=("embed_tokens",)),
    ],
    ids=["lora", "dora", "norms and head", "embedding"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapter_off_is_the_base_after_training(tmp_path: Path, lora: LoraSpec, tied: bool) -> None:
    """PEFT must give back the originals of everything that trained."""
    folder = str(tiny.make_model(tmp_path / "m", tie_word_embeddings=tied))
    r = recipe(ModelSpec(folder), tmp_path, lora=lora, reference={"kind": "adapter_off"})
    groups = rows(4)
    reference = build_reference(r, [groups])
    assert isinstance(reference, AdapterOff)
    policy = load_policy(r.model, lora).train()
    share(policy)
    disturb(policy)
    batch = batch_of(groups)
    moved = (score(policy, batch.stream).logp_T - live(r.model, groups)).abs().max()
    assert moved > 0.01
    ref_T = reference.logps(policy, batch)
    assert not ref_T.requires_grad
    torch.testing.assert_close(ref_T, live(r.model, groups), rtol=0, atol=1e-5)
    again = (score(policy, batch.stream).logp_T - live(r.model, groups)).abs().max()
    assert again == moved  # switched on again
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_adapter_off_is_refused_where_it_is_another_reference(models: dict[str, str], tmp_path: Path) -> None:
    sft = ModelSpec(models["a"], adapter=models["sft"])
    with pytest.raises(UserError) as e:
        build_reference(recipe(sft, tmp_path, lora=None, reference={"kind": "adapter_off"}), [])
    assert str(e.value) == (
        "reference.kind: adapter_off makes the base model the reference, but `from: init` is the base with the adapter "
        f"{models['sft']!r}. Use `kind: cached` (or frozen), or `from: base`"
    )
    with pytest.raises(UserError, match=r"adapter_off needs an adapter to switch off, and this run trains all weights"):
        build_reference(recipe(replace(sft, adapter=None), tmp_path, lora=None, reference={"kind": "adapter_off"}), [])
    base = recipe(sft, tmp_path, lora=None, reference={"kind": "adapter_off", "source": "base"})
    assert isinstance(build_reference(base, []), AdapterOff)


def test_frozen_is_a_constant(models: dict[str, str], tmp_path: Path) -> None:
    model = ModelSpec(models["a"], adapter=models["sft"])
    groups = rows(4)
    reference = build_reference(recipe(model, tmp_path, lora=None, reference={"kind": "frozen"}), [groups])
    assert isinstance(reference, Frozen)
    policy = load_policy(model, None).train()
    disturb(policy)
    ref_T = reference.logps(policy, batch_of(groups))
    assert not ref_T.requires_grad
    torch.testing.assert_close(ref_T, live(model, groups), rtol=0, atol=1e-5)


def test_a_reference_that_speaks_other_tokens_is_refused(models: dict[str, str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(models["b"], tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"reference.from: .* has another vocabulary than the policy's tokenizer"):
        build_reference(recipe(ModelSpec(models["a"]), tmp_path, reference={"source": str(other)}), [rows(2)])


# More than log-probs


@dataclass(frozen=True)
class ReadsKL(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", token_kl=True)

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.token_kl_T).sum(-1))


@dataclass(frozen=True)
class ReadsRefHidden(Head):
    needs: ClassVar[Needs] = Needs(layout="pair", hidden="ref")

    def __call__(self, x: HeadInput) -> HeadOutput:
        return HeadOutput(x.seg.sum(x.gate_T("gate")).sum(-1))


def live_more(model: ModelSpec, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probs over the vocabulary (T, V) and hidden states (T, L, D) by one plain forward per response."""
    net, logps, hidden = load_frozen(model), [], []
    for example in groups.examples:
        for response in example.response_ids:
            ids = torch.tensor([[*example.prompt_ids, *response]])
            with torch.no_grad():
                out = net(input_ids=ids, output_hidden_states=True)
            at = slice(-len(response) - 1, -1)
            logps.append(out.logits[0, at].float().log_softmax(-1))
            hidden.append(torch.stack(out.hidden_states, 2)[0, at])
    return torch.cat(logps), torch.cat(hidden)


@pytest.mark.parametrize("kind", ["frozen", "adapter_off"])
@pytest.mark.parametrize("head", [ReadsKL, ReadsRefHidden])
def test_hidden_states_and_kl(models: dict[str, str], tmp_path: Path, kind: str, head: type[Head]) -> None:
    """A head that reads these alone has a reference too. The adapter trains the LM head as well."""
    lora = LoraSpec(r=4, target_modules=("q_proj",), modules_to_save=("lm_head",))
    r = recipe(ModelSpec(models["a"]), tmp_path, lora=lora, loss=(Term(head()),), reference={"kind": kind})
    groups = rows(4)
    reference, batch = build_reference(r, [groups]), batch_of(groups)
    policy = load_policy(r.model, lora).train()
    share(policy)
    disturb(policy)
    assert (reference.net is None) == (kind == "adapter_off")
    found = reference.parts(policy, batch, hidden=True, kl=True)
    ref_TV, hidden_TLD = live_more(r.model, groups)
    torch.testing.assert_close(found.logp_T, live(r.model, groups), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.hidden_TLD, hidden_TLD, rtol=0, atol=1e-5)
    scores = score(policy, batch.stream, Want(kl_against=found.against))
    policy.save_pretrained(tmp_path / "policy")
    policy_TV, _ = live_more(ModelSpec(models["a"], adapter=str(tmp_path / "policy")), groups)
    expected_T = (ref_TV.exp() * (ref_TV - policy_TV)).sum(-1)
    assert expected_T.min() > 1e-3
    torch.testing.assert_close(scores.token_kl_T, expected_T, rtol=0, atol=1e-5)
    assert reference.parts(policy, batch)[1:] == (None, None)


def test_a_cache_is_refused_where_a_head_reads_more(models: dict[str, str], tmp_path: Path) -> None:
    for head, what in ((ReadsKL, "KL to the reference at every token"), (ReadsRefHidden, "hidden states of the ref")):
        r = recipe(ModelSpec(models["a"]), tmp_path, loss=(Term(HEADS["dpo"]()), Term(head())))
        expected = (
            rf"^reference\.kind: the head {head.__name__} reads the {what}.* Use `kind: adapter_off` .*`kind: frozen`"
        )
        with pytest.raises(UserError, match=expected):
            check_live(r.loss, r.reference)
        with pytest.raises(UserError, match=expected):
            build_reference(r, [rows(2)])
        check_live(r.loss, replace(r.reference, kind="frozen"))
    check_live((Term(HEADS["dpo"]()),), r.reference)


# The self-check of step 0


def test_check_start(models: dict[str, str]) -> None:
    groups = rows(5)
    batch = batch_of(groups)
    ref_T = live(ModelSpec(models["a"]), groups)
    policy = load_policy(ModelSpec(models["a"]), LORA).eval()
    share(policy)
    policy_T = score(policy, batch.stream).logp_T.detach()
    assert 0 <= check_start(policy_T, ref_T, batch) < 1e-5
    wrong_T = live(ModelSpec(models["a"], adapter=models["sft"]), groups)
    with pytest.raises(NumericsError) as e:
        check_start(policy_T, wrong_T, batch)
    t = int((policy_T - wrong_T).abs().argmax())
    slot = int(batch.seg.slot_T[t])
    K = batch.seg.valid_GK.shape[1]
    assert str(e.value).startswith("reference: the policy has not taken a step and yet differs from its reference by ")
    assert f"of response {slot % K} of row r{slot // K} (log pi {policy_T[t]:.4f}, log ref {wrong_T[t]:.4f}" in str(
        e.value
    )
    with pytest.raises(NumericsError):
        check_start(policy_T, ref_T.index_fill(0, torch.tensor([3]), torch.nan), batch)


def test_check_start_knows_the_dtype(models: dict[str, str]) -> None:
    groups = rows(40)
    batch = batch_of(groups)
    a, b = (live(ModelSpec(models[m], dtype="bfloat16"), groups) for m in "ab")
    net = load_frozen(ModelSpec(models["a"], dtype="bfloat16"))
    share(net)
    policy_T = score(net, batch.stream).logp_T
    assert compute_dtype(net) == torch.bfloat16
    check_start(policy_T, a, batch, torch.bfloat16)
    with pytest.raises(
        NumericsError, match=r"In torch.bfloat16 the same weights differ by 2 at most, 0.08 in the mean"
    ):
        check_start(policy_T, b, batch, torch.bfloat16)


@needs_bitsandbytes
def test_qlora_has_its_4_bit_base_as_reference(tmp_path: Path) -> None:
    folder = str(tiny.make_model(tmp_path / "m", **FOUR_BIT_SIZE))
    model = ModelSpec(folder, load_in_4bit=True)
    r, groups = recipe(model, tmp_path), rows(6)
    batch = batch_of(groups, build_reference(r, [groups]).lookup)
    policy = load_policy(model, LORA).eval()
    share(policy)
    assert compute_dtype(policy) == torch.bfloat16
    device = next(policy.parameters()).device
    policy_T = score(policy, batch.to(device).stream).logp_T.cpu()
    check_start(policy_T, batch.ref_T, batch, compute_dtype(policy))
    assert (batch.ref_T - live(ModelSpec(folder), groups)).abs().max() > 1e-3  # not the unquantized one's
    assert work(replace(r, model=ModelSpec(folder)), [groups]) > 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model stories260k is not here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tolerances_on_a_real_model(tmp_path: Path, dtype: str) -> None:
    """The same weights in other batches stay well inside; weights that one training step could make lie outside, as
    far as the dtype can tell. `pytest -s` prints the table of docs/reference.md."""
    rng = random.Random(0)

    def text(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 512) for _ in range(rng.randint(low, high)))

    examples = [
        Example(f"r{i}", f"r:{i}", (1, *text(20, 150)), tuple(text(10, 120) for _ in range(4))) for i in range(4)
    ]
    groups = Groups(examples, [Item(i, (0, 1, 2, 3)) for i in range(4)])
    r = recipe(ModelSpec(str(STORIES), dtype=dtype), tmp_path)
    cached_T = batch_of(groups, build_reference(r, [groups]).lookup).ref_T
    same_T = (cached_T - live(r.model, groups)).abs()
    limit = tolerance(getattr(torch, dtype))
    print(f"\n| {dtype} | {same_T.numel()} | {same_T.max():.2g} | {same_T.mean():.2g} |", end=" ")
    assert same_T.max() < limit.largest / 2
    assert same_T.mean() < limit.mean / 2
    moved = load_frozen(r.model)
    share(moved)
    generator = torch.Generator().manual_seed(0)
    scale = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}[dtype]  # of each tensor's standard deviation
    for p in moved.parameters():
        p.add_(torch.randn(p.shape, generator=generator).to(p) * p.std() * scale)
    batch = batch_of(groups)
    moved_T = score(moved, batch.stream).logp_T
    print(f"{scale:g} | {(moved_T - cached_T).abs().max():.2g} | {(moved_T - cached_T).abs().mean():.2g} |")
    with pytest.raises(NumericsError):
        check_start(moved_T, cached_T, batch, getattr(torch, dtype))


def test_compute_dtype(models: dict[str, str]) -> None:
    net = load_policy(ModelSpec(models["a"], dtype="bfloat16"), LORA)
    assert compute_dtype(net) == torch.bfloat16  # though the adapter is fp32
    net = load_policy(ModelSpec(models["a"]), LORA)
    assert compute_dtype(net) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(net) == torch.bfloat16
