"""Token by token after prompts that are computed once: keys and values in place, no work for rows that have ended."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from po.rollout.choose import Choose

_LOOK = 4  # steps between two looks at which rows have ended, for which a GPU must be waited for
_ROOM = 128  # tokens that keys and values get room for at a time
_ENDED = 8  # one row in so many must have ended before the keys and values of the others are copied


def copies(net: Any) -> bool:
    """Whether generation can start from copies of a prompt's keys and values."""
    if getattr(net, "_is_stateful", False) or not net._supports_default_dynamic_cache():
        return False
    layers = DynamicCache(config=net.config.get_text_config(decoder=True)).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def decode(
    net: Any, ids_NL: Tensor, mask_NL: Tensor, of_row: Tensor, choose: Choose, stops: Collection[int], most: int
) -> tuple[Tensor, Tensor]:
    """Rows after left-padded prompts, of_row saying whose: tokens and their log-probs, (B, most). What stands after a
    row's first stop token means nothing."""
    step = _Step(net)
    cache = DynamicCache(config=net.config.get_text_config(decoder=True))
    if ids_NL.shape[1] > 1:
        step(ids_NL[:, :-1], mask_NL[:, :-1], cache)
        for i, layer in enumerate(cache.layers):
            layer.batch_select_indices(of_row)
            cache.layers[i] = _roomy(layer)
    row_R, last_R, mask_RL = torch.arange(len(of_row), device=ids_NL.device), ids_NL[of_row, -1], mask_NL[of_row]
    token_BT, logp_BT = last_R.new_zeros(len(of_row), most), torch.zeros(len(of_row), most, device=ids_NL.device)
    stop_E, ended_R = last_R.new_tensor(sorted(stops)), torch.zeros_like(row_R, dtype=torch.bool)
    for t in range(most):
        last_R, logp_R = choose(step(last_R[:, None], mask_RL, cache), t, row_R)
        token_BT[row_R, t], logp_BT[row_R, t] = last_R, logp_R
        mask_RL, ended_R = pad(mask_RL, (0, 1), value=1), ended_R | torch.isin(last_R, stop_E)
        if t % _LOOK == 0:
            (left_R,) = torch.where(~ended_R)
            if not len(left_R):
                break
            if len(left_R) <= len(row_R) * (1 - 1 / _ENDED):
                cache.batch_select_indices(left_R)
                row_R, last_R, mask_RL, ended_R = (x[left_R] for x in (row_R, last_R, mask_RL, ended_R))
    return token_BT, logp_BT


class _Step:
    """A forward whose keys and values join a cache; gives the logits after the last token."""

    def __init__(self, net: Any) -> None:
        self._net, accepts = net, signature(net.forward).parameters
        self._call: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
        self._positions = "position_ids" in accepts

    def __call__(self, ids_RL: Tensor, mask_RL: Tensor, cache: DynamicCache) -> Tensor:
        call = dict(self._call)
        if self._positions:
            call["position_ids"] = (mask_RL.cumsum(-1) - 1).clamp_min(0)[:, -ids_RL.shape[1] :]
        out = self._net(input_ids=ids_RL, attention_mask=mask_RL, past_key_values=cache, use_cache=True, **call)
        logits: Tensor = out.logits[:, -1]
        return logits


def _roomy(layer: Any) -> Any:
    return _Roomy(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer


class _Roomy(DynamicLayer):
    """A layer's keys and values with room for those that follow: to grow them would copy all of them at every token."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self._all = [layer.keys, layer.values]
        self._show(layer.keys.shape[-2])

    def _show(self, size: int) -> None:
        self.keys, self.values = (x[:, :, :size] for x in self._all)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """These keys and values behind the others; all of them."""
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if end > self._all[i].shape[-2]:
                self._all[i] = pad(self._all[i], (0, 0, 0, end - start + _ROOM))
            self._all[i][:, :, start:end] = new
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._all = [x[indices] for x in self._all]
        self._show(self.keys.shape[-2])
