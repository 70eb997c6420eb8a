"""THE log-prob routine: log pi(y_t | x, y_<t) of response tokens, in fp32, and never a (positions, vocabulary) tensor.

`install` teaches a causal language model to score: called with `at_T` and `target_T`, its forward runs the backbone,
keeps the hidden states that predict a response token, and walks the LM head over them in chunks (`po.head_chunks`).
The call goes through the wrapped module (DDP, DeepSpeed, PEFT), so their hooks fire. A plain call is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from po.attention import dropped, no_mask, watch
from po.errors import NumericsError
from po.forest import Forest, Padded
from po.head_chunks import score_linear, score_module
from po.scores import Against, Scores, Shape, Want

__all__ = ["Against", "Scores", "Shape", "Want", "against", "install", "layers", "score"]

GATES = "po_gates"  # where the model keeps the modules of `po.gates`


def _linear_forward(head: nn.Linear, x: Tensor, target_T: Tensor | None = None, **scoring: Any) -> Any:
    """An LM head's forward that can score in place, so that ZeRO-3 gathers its weight once for all chunks."""
    if target_T is None:
        return nn.functional.linear(x, head.weight, head.bias)
    return tuple(score_linear(head, x, target_T, **scoring))


def _logit_shape(config: Any, temperature: float) -> Shape:
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    return Shape(scale, getattr(text, "final_logit_softcapping", None), temperature)


def _scoring_forward(model: Any, *args: Any, at_T: Tensor | None = None, **kwargs: Any) -> Any:
    if at_T is None:
        return type(model).forward(model, *args, **kwargs)
    target_T, want = kwargs.pop("target_T"), kwargs.pop("want")
    call = {k: v for k, v in kwargs.items() if v is not None}  # PEFT fills in labels=None and the like
    with _hidden(model, at_T, want) as kept:
        hidden_NLD = model.base_model(*args, **call).last_hidden_state
    hidden_TD = hidden_NLD.flatten(0, 1)[at_T]
    head, shape = model.get_output_embeddings(), _logit_shape(model.config, want.temperature)
    if type(head) is nn.Linear:
        scores = Scores(*head(hidden_TD, target_T=target_T, want=want, shape=shape))
    else:
        scores = score_module(head, hidden_TD, target_T, want, shape)
    hidden_TLD = gates = None
    if kept:
        kept[-1] = hidden_TD if want.hidden_gradient else hidden_TD.detach()
        hidden_TLD = torch.stack(kept, 1)
    if want.gates:
        gates = getattr(model, GATES)(hidden_TLD, want.ref_hidden_TLD)
    return scores._replace(
        hidden_TLD=hidden_TLD if want.hidden else None,
        final_TD=hidden_TD.detach() if want.final else None,
        gates=gates,
    )


def layers(model: Any) -> nn.ModuleList:
    """The layers of a transformers causal language model. Raises ValueError where it has no list of them."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {count} layers whose hidden states could be read")


@contextmanager
def _hidden(model: Any, at_T: Tensor, want: Want) -> Iterator[list[Tensor]]:
    """What enters the first layer and what leaves each, at the scored positions alone, while a forward runs."""
    kept: list[Tensor] = []
    hooks = []

    def keep(x: Any) -> None:
        rows: Tensor = (x if isinstance(x, Tensor) else x[0]).flatten(0, 1)
        kept.append((rows if want.hidden_gradient else rows.detach())[at_T])

    if want.hidden or (want.gates and getattr(model, GATES).reads_policy):
        found = layers(model)
        first = lambda m, args, kwargs: keep(args[0] if args else kwargs["hidden_states"])  # noqa: E731
        hooks = [found[0].register_forward_pre_hook(first, with_kwargs=True)]
        hooks += [layer.register_forward_hook(lambda m, args, out: keep(out)) for layer in found]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def install(model: nn.Module) -> None:
    """Teach a `transformers` causal language model to score (before PEFT wraps it). Idempotent.

    Raises ValueError for a model without a backbone or an LM head that can be called apart.
    """
    base, head = getattr(model, "base_model", model), model.get_output_embeddings()  # type: ignore[operator]
    if base is model or head is None:
        raise ValueError(f"{type(model).__name__} has no backbone and LM head that can be called one after the other")
    if type(head) is nn.Linear:
        head.forward = MethodType(_linear_forward, head)  # type: ignore[method-assign]
    model.forward = MethodType(_scoring_forward, model)


def against(final_TD: Tensor, model: Any | None, temperature: float = 1.0) -> Against:
    """What KL(reference || policy) is taken against: the final hidden states that `Want.final` gave of the reference,
    and the reference (a transformers model, PEFT on it or not); None for the policy itself with its adapter off."""
    if model is None:
        return Against(final_TD)
    return Against(final_TD, model.get_output_embeddings(), _logit_shape(model.config, temperature))


def score(model: nn.Module, stream: Forest | Padded, want: Want | None = None, *, entropy: bool = False) -> Scores:
    """Log-probs of all response tokens of a stream, in its order, and what else is wanted. `model` is what the trainer
    holds, wrapped or not.

    Returns (T,) fp32 (float64 for a float64 model). `entropy` asks for the entropies too: one more pass over the
    logits of each chunk. Raises NumericsError where a forest does not reach the attention layers, UserError for a KL
    between vocabularies of different sizes.
    """
    want = want or Want()
    want = replace(want, entropy=True) if entropy else want
    call: dict[str, Any] = {"at_T": stream.at_T, "target_T": stream.target_T, "want": want, "use_cache": False}
    if isinstance(stream, Forest):
        mask = no_mask(stream.input_S.device)
        call |= {"input_ids": stream.input_S[None], "position_ids": stream.position_S[None], "forest": stream}
    else:
        mask = stream.mask_NL
        call |= {"input_ids": stream.input_NL}
    with watch() as seen:
        scores = cast(Scores, model(attention_mask=mask, **call))
    if isinstance(stream, Forest) and not seen.layers:
        raise NumericsError(dropped(model))
    return scores
