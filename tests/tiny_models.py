"""Tiny real models, ragged groups, and one plain forward per response: what the packed forest must equal."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from po.forest import Group

V = 97
_SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": V, "n_positions": 128, "bos_token_id": 1}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOW = {"sliding_window": 6}
_QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}

# Config class and what differs from _SIZES. Windows are shorter than trunks and branches.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", _QWEN_WINDOW),
    "qwen3": ("Qwen3Config", {"head_dim": 12}),
    "mistral": ("MistralConfig", _WINDOW),
    "gemma2": ("Gemma2Config", {"head_dim": 12, **_WINDOW}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention"], **_WINDOW}),
    "gpt2": ("GPT2Config", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    # Heads and scales that are treated in a way of their own
    "phi": ("PhiConfig", {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),  # bias on the head
    "granite": ("GraniteConfig", {"logits_scaling": 8.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 12, **_MOE}),
}
REQUIRED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "olmo2", "smollm3")


def tiny(family: str, dtype: torch.dtype = torch.float64, **extra: Any) -> Any:
    """A random model whose weights are large enough that positions, windows and siblings matter."""
    torch.manual_seed(0)
    name, differs = FAMILIES[family]
    sizes = _GPT2 if family == "gpt2" else _SIZES
    config = getattr(transformers, name)(**{**sizes, **differs, **extra})
    experts = {"experts_implementation": "eager"} if family.endswith("moe") else {}  # grouped kernels lack float64
    model = AutoModelForCausalLM.from_config(config, **experts).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() == 1 else 0.15)
    return model.to(dtype).train()


def ragged(seed: int = 0, groups: int = 5, prompt: int = 14, response: int = 11, K: int = 4) -> list[Group]:
    """Groups of 1 to K responses; the first has a one-token prompt, the second one-token responses."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(3, V) for _ in range(n)]

    out: list[Group] = [(ids(1), [ids(4), ids(1), ids(7)]), (ids(9), [ids(1), ids(1)])]
    while len(out) < groups:
        out.append((ids(rng.randint(2, prompt)), [ids(rng.randint(1, response)) for _ in range(rng.randint(1, K))]))
    return out


def plain(model: Any, groups: Sequence[Group], temperature: float = 1.0) -> Tensor:
    """log pi of every response token, (T,), from one forward per response through the model's own head."""
    parts = []
    for prompt, responses in groups:
        for r in responses:
            logits = model(input_ids=torch.tensor([[*prompt, *r]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            parts.append((logits / temperature).log_softmax(-1).gather(-1, torch.tensor(r)[:, None])[:, 0])
    return torch.cat(parts)


def gradients(model: Any, logp_T: Tensor) -> list[Tensor]:
    """Of a fixed weighted sum of log-probs, for all trainable parameters that it depends on."""
    weight_T = torch.linspace(-1, 1, logp_T.numel(), dtype=logp_T.dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((weight_T * logp_T).sum(), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found)]


def furthest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest absolute difference."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


class Float64(TorchFunctionMode):
    """transformers computes norms, routers and softmaxes in fp32 even in a float64 model. This keeps them in float64,
    so that what remains of a difference between two ways of computing is not rounding."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
