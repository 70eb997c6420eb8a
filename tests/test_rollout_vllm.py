"""The sampler over a vLLM server, against a local server with a tiny real model that speaks vLLM's HTTP as TRL's client
expects it. Of the package vllm, which the client imports, only what carries tensors is replaced."""

from __future__ import annotations

import copy
import json
import math
import os
import runpy
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor

from po.errors import UserError
from po.forest import pad
from po.logprob import install, score
from po.rollout.hf import HFSampler
from po.rollout.sampler import Sampled, Sampling
from po.rollout.served import served
from po.rollout.vllm import VLLMSampler, _mixed, logprobs_mode
from po.scores import Want

pytest.importorskip("trl", reason="TRL's client is an extra: pip install 'po[trl]'")
ROOT = Path(__file__).parents[1]
STOP = (2, 3, 4, 7)
PROMPTS = [(5, 6, 7, 8), (20,), (30, 31, 32)]
SEEDS = [0, 1, 2]


class FakeVLLM:
    """What of vLLM the client sees. `mode` is its --logprobs-mode; `fail` makes an endpoint answer 500."""

    def __init__(self, mode: str = "processed_logprobs") -> None:
        self.mode, self.fail, self.well, self.transfer = mode, "", True, True
        self.net = tiny("llama", torch.float32).eval()
        self.paths: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.arriving: list[tuple[str, Tensor]] = []
        self.bad_logprob: float | None = None
        self.hang = threading.Event()
        self.lock = threading.Lock()

    def get(self, path: str) -> Any:
        return {
            "/health": {},
            "/v1/models": {"data": [{"id": "tiny"}]},
            "/server_info": {"vllm_config": {"weight_transfer_config": {"backend": "nccl"} if self.transfer else None}},
            "/get_world_size": {"world_size": 1},
        }[path.split("?")[0]]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with self.lock:
            self.paths.append(path)
            if path == "/v1/completions":
                self.asked.append(body)
                assert body["temperature"] > 0 or body["n"] == 1, "n must be 1 when using greedy sampling"
                return {"choices": [self.choice(body, p, i) for p in body["prompt"] for i in range(body["n"])]}
            if path == "/finish_weight_update":
                self.net.load_state_dict(dict(self.arriving), strict=True)
                self.arriving.clear()
            return {}

    @torch.no_grad()
    def choice(self, body: dict[str, Any], prompt: list[int], number: int) -> dict[str, Any]:
        noise = torch.Generator().manual_seed((body.get("seed") or 0) + number)
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body.get("stop_token_ids", [])):
            raw = self.net(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
            scaled = raw / (body["temperature"] or 1.0)
            p, order = scaled.softmax(-1).sort(descending=True)
            drop = (p.cumsum(0) - p >= body["top_p"]) | (torch.arange(len(p)) >= (body["top_k"] or len(p)))
            scaled[order[drop]] = -math.inf
            draw = torch.multinomial(scaled.softmax(-1), 1, generator=noise)
            ids.append(int(draw if body["temperature"] else scaled.argmax()))
            logps.append(float((raw if self.mode == "raw_logprobs" else scaled).log_softmax(-1)[ids[-1]]))
        if self.bad_logprob is not None and body["max_tokens"] > 1:
            logps[-1] = self.bad_logprob
        names = [f"token_id:{i}" for i in ids]
        top = [{name: p} for name, p in zip(names, logps)]
        found = {"tokens": names, "token_logprobs": logps, "top_logprobs": top}
        return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": found if "logprobs" in body else None}


def handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, what: Any, code: int = 200) -> None:
            text = json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self) -> None:
            if self.path == "/health" and not fake.well:
                return self.answer({}, 503)
            self.answer(fake.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if fake.fail == self.path:
                return self.answer({"error": "the engine is dead"}, 400)
            if fake.fail == "hang":
                fake.hang.wait()
            self.answer(fake.post(self.path, json.loads(body or "{}")))

        def log_message(self, *args: Any) -> None:
            pass

    return Handler


@pytest.fixture
def fake() -> FakeVLLM:
    return FakeVLLM()


@pytest.fixture
def url(fake: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server's address, with the parts of the package vllm that the client would import."""
    import trl.generation.vllm_client as client

    def send(iterator: Iterator[tuple[str, Tensor]], trainer_args: Any) -> None:
        fake.arriving += list(iterator)  # as the engine packs them: each may be read when later ones are made

    group = SimpleNamespace(store=None, socket=None)
    engine = SimpleNamespace(trainer_init=lambda info: SimpleNamespace(group=group), trainer_send_weights=send)
    monkeypatch.setattr(client, "is_vllm_available", lambda *a, **k: True)
    monkeypatch.setattr(client, "get_ip", lambda: "127.0.0.1", raising=False)
    monkeypatch.setattr(client, "NCCLWeightTransferEngine", engine, raising=False)
    monkeypatch.setattr(client, "NCCLTrainerSendWeightsArgs", SimpleNamespace, raising=False)
    monkeypatch.setattr(client, "_HAS_STATEFUL_TRAINER_ENGINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    fake.hang.set()
    server.shutdown()
    server.server_close()
    thread.join()


def sampler(url: str, max_tokens: int = 12, timeout: float = 60, **cut: Any) -> VLLMSampler:
    return VLLMSampler(url, Sampling(max_tokens, **cut), STOP, "cuda", timeout=timeout, start_timeout=0)


def policy(**adapter: Any) -> Any:
    """Other weights than the server starts with."""
    from peft import LoraConfig, get_peft_model

    net = tiny("llama", torch.float32)
    install(net)
    if not adapter:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(1.1)
        return net
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(r=4, init_lora_weights=False, **adapter)).train()


@torch.no_grad()
def scored(net: Any, prompt: tuple[int, ...], samples: list[Sampled], temperature: float) -> Tensor:
    net.eval()
    stream = pad([(list(prompt), [list(s.ids) for s in samples])], len(samples))
    return score(net, stream, Want(temperature)).logp_T


LORA: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q_proj", "down_proj"]},
    {"target_modules": "all-linear", "use_dora": True},
    {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
]
CUTS: list[tuple[str, dict[str, Any]]] = [
    ("processed_logprobs", {"temperature": 0.7}),
    ("raw_logprobs", {"top_p": 0.6, "top_k": 20}),
    ("raw_logprobs", {}),  # at temperature 1, with nothing cut, the two are the same
    ("processed_logprobs", {}),
    ("processed_logprobs", {"temperature": 0.0, "top_k": 3}),
]


@pytest.mark.parametrize("adapter", LORA)
@pytest.mark.parametrize(("mode", "cut"), CUTS[:2])
def test_samples_are_the_policys(fake: FakeVLLM, url: str, adapter: dict[str, Any], mode: str, cut: Any) -> None:
    """The served weights are the policy's, adapter merged, and the log-probs those that training computes."""
    fake.mode, net = mode, policy(**adapter)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    draw = sampler(url, **cut)
    draw.update(net)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())  # not even by rounding
    assert not any(getattr(m, "merged", False) is True for m in net.modules())
    out = draw.sample(PROMPTS, [2, 0, 3], SEEDS)
    assert [len(samples) for samples in out] == [2, 0, 3]
    for prompt, samples in zip(PROMPTS, out):
        if samples:
            found = torch.tensor([p for s in samples for p in s.logps])
            expected = scored(net, prompt, samples, cut.get("temperature", 1.0))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("mode", "cut"), CUTS)
def test_log_probs_are_of_the_whole_vocabulary(fake: FakeVLLM, url: str, mode: str, cut: dict[str, Any]) -> None:
    fake.mode, net = mode, policy()
    draw = sampler(url, **cut)
    draw.update(net)
    (samples,) = draw.sample(PROMPTS[:1], 4, [0])
    assert len(samples) == 4
    expected = scored(net, PROMPTS[0], samples, cut.get("temperature", 1.0) or 1.0)
    torch.testing.assert_close(torch.tensor([p for s in samples for p in s.logps]), expected, rtol=0, atol=1e-4)


def test_greedy_is_the_other_samplers(url: str) -> None:
    net = policy()
    draw = sampler(url, temperature=0.0)
    draw.update(net)
    here = HFSampler(net, Sampling(12, temperature=0.0), STOP, 0, "cpu").sample(PROMPTS, 1, SEEDS)
    for (there, again), (same,) in zip(draw.sample(PROMPTS, 2, SEEDS), here, strict=True):
        assert there == again
        assert (there.ids, there.ended) == (same.ids, same.ended)
        torch.testing.assert_close(torch.tensor(there.logps), torch.tensor(same.logps), rtol=0, atol=1e-4)


def test_merged_weights_are_pefts_own() -> None:
    net = policy(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    expected = copy.deepcopy(net).merge_and_unload().state_dict()
    found = {s.name: s.whole() for s in served(net)}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], p) for name, p in expected.items())
    assert [s.shape() for s in served(net)] == [list(p.shape) for p in found.values()]


ZERO3 = """
import copy, sys
import deepspeed, torch
sys.path.insert(0, {tests!r})
from test_rollout_vllm import policy
from po.forest import pad
from po.logprob import score
from po.rollout.served import served

net = policy(target_modules=["q_proj", "embed_tokens"])
expected = copy.deepcopy(net).merge_and_unload().state_dict()
config = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": 3,
           "stage3_param_persistence_threshold": 0}}, "zero_allow_untested_optimizer": True}}
optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
engine.eval()
assert all(p.numel() == 0 for p in net.parameters())  # in parts
stream = pad([([5, 6, 7], [[8, 9, 2], [30, 2]])], 2)
before = score(engine, stream).logp_T.detach()
sent = served(engine)
assert {{s.name: tuple(s.shape()) for s in sent}} == {{name: tuple(p.shape) for name, p in expected.items()}}
for s in sent:
    torch.testing.assert_close(s.whole(), expected[s.name], rtol=0, atol=1e-6)
assert all(p.numel() == 0 for p in net.parameters())
after = score(engine, stream).logp_T
assert torch.equal(before, after)
engine.backward(-after.mean())
engine.step()
assert score(engine, stream).logp_T.mean() > before.mean()
print("rank", torch.distributed.get_rank(), "agrees", flush=True)
"""


@pytest.mark.slow
def test_zero3_sends_whole_merged_weights_and_trains_on(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(ZERO3.format(tests=str(ROOT / "tests")))
    launcher = Path(sys.executable).parent / "deepspeed"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [str(launcher), "--num_accelerators", "2", "--master_port", port, str(script)]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    assert done.stdout.count("agrees") == 2


def test_a_tied_head_is_sent_once() -> None:
    net = tiny("llama", torch.bfloat16, tie_word_embeddings=True)
    names = [s.name for s in served(net)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_modules_of_heads_are_not_the_models(url: str) -> None:
    net = policy()
    net.po_gates = torch.nn.Linear(2, 2)
    assert not [s.name for s in served(net) if "po_gates" in s.name]


def test_four_bit_weights_cannot_be_sent() -> None:
    net = policy()
    net.lm_head.weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"4-bit weights .* set model.load_in_4bit: false"):
        served(net)


def test_an_update_is_one_and_forgets_what_was_computed(fake: FakeVLLM, url: str) -> None:
    draw = sampler(url)
    probe = ["/v1/completions"]
    assert fake.paths == probe
    draw.update(policy())
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache"]
    assert fake.paths == [*probe, "/init_weight_transfer_engine", *update]
    draw.update(policy())
    assert fake.paths[-4:] == update
    assert fake.paths.count("/init_weight_transfer_engine") == 1
    draw.close()


def test_a_request_says_all_that_a_server_may_have_defaults_for(fake: FakeVLLM, url: str) -> None:
    draw = sampler(url, 5, temperature=0.7)
    draw.update(policy())
    draw.sample(PROMPTS, [2, 1, 3], SEEDS)
    asked = sorted(fake.asked[1:], key=lambda body: body["n"])
    assert [body["prompt"] for body in asked] == [[list(PROMPTS[i])] for i in (1, 0, 2)]
    said = {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    said |= {"stop_token_ids": list(STOP), "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    for body, i in zip(asked, (1, 0, 2)):
        assert {key: body[key] for key in said} == said
        assert body["seed"] == _mixed(SEEDS[i])


def test_seeds_decide_the_samples(url: str) -> None:
    draw = sampler(url)
    draw.update(policy())
    first = draw.sample(PROMPTS, 3, SEEDS)
    assert draw.sample(PROMPTS, 3, SEEDS) == first
    assert draw.sample(PROMPTS, 3, [5, 6, 7]) != first
    assert draw.sample([PROMPTS[2]], 3, [SEEDS[2]]) == first[2:]
    neighbours = draw.sample([PROMPTS[0]] * 3, 4, [0, 1, 2])  # a server numbers samples on from a request's seed
    assert len({s.ids for some in neighbours for s in some}) == 12


def test_a_response_ends_with_its_stop_token(url: str) -> None:
    draw = sampler(url, 16)
    draw.update(policy())
    samples = [s for some in draw.sample(PROMPTS, 6, SEEDS) for s in some]
    assert {s.ended for s in samples} == {True, False}
    assert all(s.ended == (s.ids[-1] in STOP) and not set(s.ids[:-1]) & set(STOP) for s in samples)


def launched(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    main = runpy.run_path(str(ROOT / "launch/vllm_server.py"))["main"]
    code = main([str(ROOT / "recipes/grpo-math-qwen2.5-math-1.5b.yaml"), *arguments])
    seen = capsys.readouterr()
    return code, seen.out + seen.err


def test_the_command_that_starts_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    local = ("rollout.server=http://localhost:8123", "--print", "--tensor-parallel-size", "2")
    code, text = launched(capsys, *local)
    words = shlex.split(text.splitlines()[-1])
    assert (code, words[:4]) == (0, ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve", "Qwen/Qwen2.5-Math-1.5B"])
    flags = dict(zip(words[4::2], words[5::2], strict=True))
    assert flags == {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--dtype": "bfloat16",
        "--max-model-len": "5120",
        "--generation-config": "vllm",
        "--logprobs-mode": "processed_logprobs",
        "--weight-transfer-config": '{"backend": "nccl"}',
        "--tensor-parallel-size": "2",
    }
    assert "--logprobs-mode raw_logprobs" in launched(capsys, *local, "rollout.top_p=0.9")[1]
    assert "--host 0.0.0.0" in launched(capsys, "rollout.server=http://node7:8000", "--print")[1]


def test_a_recipe_that_no_server_can_serve(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = launched(capsys, "--print")
    assert code == 2
    assert "rollout.server: the recipe names no server" in text
    both = ("rollout.temperature=0.7", "rollout.top_p=0.9")
    code, text = launched(capsys, "rollout.server=http://localhost:8000", *both)
    assert code == 2
    assert "vLLM reports log-probs either without" in text


# What can be wrong


@pytest.mark.parametrize("cut", [{"temperature": 0.7}, {"top_p": 0.5}])
def test_a_server_with_the_other_log_probs_is_refused(fake: FakeVLLM, url: str, cut: dict[str, Any]) -> None:
    wrong, needed = ("raw", "processed") if "temperature" in cut else ("processed", "raw")
    fake.mode = f"{wrong}_logprobs"
    with pytest.raises(UserError, match=rf"reports {wrong}_logprobs; expected {needed}_logprobs .*--logprobs-mode"):
        sampler(url, **cut)


def test_what_vllm_cannot_report_is_refused_before_it_is_asked() -> None:
    with pytest.raises(UserError, match=r"temperature 0.7 with top_p 0.9 and top_k 0.*Set temperature: 1"):
        sampler("http://127.0.0.1:1", temperature=0.7, top_p=0.9)
    assert logprobs_mode(Sampling(1, 0.7)) == logprobs_mode(Sampling(1, 0.0, 0.5)) == "processed_logprobs"
    assert logprobs_mode(Sampling(1, 1.0, 0.5)) == logprobs_mode(Sampling(1, top_k=3)) == "raw_logprobs"


def test_no_server(fake: FakeVLLM, url: str) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:1: no answer .* after 0 s; .*launch/vllm_server.py RECIPE"):
        sampler("http://127.0.0.1:1")
    with pytest.raises(UserError, match="expected an address like http://localhost:8000, got 'localhost'"):
        sampler("localhost")
    fake.well = False
    with pytest.raises(UserError, match="it answers /health with 503"):
        sampler(url)


def test_no_vllm_beside_the_trainer(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.generation.vllm_client as client

    monkeypatch.setattr(client, "is_vllm_available", lambda *a, **k: False)
    with pytest.raises(UserError, match=r"vLLM is not installed.*pip install 'po\[trl\]' vllm"):
        sampler(url)


def test_a_server_without_weight_transfer(fake: FakeVLLM, url: str) -> None:
    fake.transfer = False
    with pytest.raises(UserError, match=r"init_communicator failed: .*Restart it with `--weight-transfer-config"):
        sampler(url).update(policy())


def test_nothing_is_sampled_from_weights_that_were_not_sent(fake: FakeVLLM, url: str) -> None:
    draw = sampler(url)
    with pytest.raises(AssertionError, match="call `update` first"):
        draw.sample(PROMPTS, 1, SEEDS)
    fake.fail = "/update_weights"
    with pytest.raises(UserError, match=r"update_named_params failed: .*the engine is dead"):
        draw.update(policy())
    with pytest.raises(AssertionError, match="call `update` first"):
        draw.sample(PROMPTS, 1, SEEDS)


def test_a_request_that_fails_or_never_ends(fake: FakeVLLM, url: str) -> None:
    draw = sampler(url, timeout=0.5)
    draw.update(policy())
    fake.fail = "/v1/completions"
    with pytest.raises(UserError, match=r"generate failed: Exception: Request failed: 400, .*the engine is dead"):
        draw.sample(PROMPTS, 1, SEEDS)
    fake.fail = "hang"
    with pytest.raises(UserError, match=r"generate failed: .*[Tt]ime"):
        draw.sample(PROMPTS[:1], 1, SEEDS[:1])


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_token_without_a_log_prob(fake: FakeVLLM, url: str, value: float) -> None:
    draw = sampler(url)
    draw.update(policy())
    fake.bad_logprob = value
    with pytest.raises(UserError, match="gave a token no finite log-prob"):
        draw.sample(PROMPTS, 1, SEEDS)
