"""The network of a reward model: a score on a language model's backbone, or a language model that rates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from po.adapter import add_adapter
from po.data.tokenize import Encoder
from po.errors import UserError
from po.merge import check_tensors, each_tensor, merge
from po.policy import load_policy
from po.reward_model.data import Batch
from po.reward_model.spec import BradleyTerry, Objective, Ordinal, RewardRecipe
from po.rewards.models import right_padded
from po.rewards.ordinal import Question, expected_ratings, ratings_of
from po.spec import ModelSpec
from po.weights import checkpoint_dtype, is_adapter, locate, weight_files


class Scored(NamedTuple):
    """What the network says of 2N sequences, in fp32."""

    score_2N: Tensor
    logp_2NS: Tensor | None = None  # of the ratings
    feature_2ND: Tensor | None = None  # at the last token


class Scorer:
    """Runs the network, wrapped or not, on batches; the same forwards as `po.rewards` uses to score later."""

    def __init__(self, objective: Objective, tokenizer: Any, rating_S: Sequence[int] = ()) -> None:
        self._objective, self._pad, self._rating_S = objective, int(tokenizer.pad_token_id), tuple(rating_S)

    def __call__(self, model: nn.Module, batch: Batch, features: bool = False) -> Scored:
        """Scores with gradient. features: of a classifier, as well."""
        device = batch.counts_N.device
        if isinstance(self._objective, Ordinal):
            logp_2NS = ratings_of(model, batch.sequences, self._rating_S, device)
            return Scored(expected_ratings(logp_2NS), logp_2NS)
        ids_NL, mask_NL = right_padded(batch.sequences, self._pad, device)
        out = model(input_ids=ids_NL, attention_mask=mask_NL, use_cache=False, output_hidden_states=features)
        score_2N = _up(out.logits[:, 0])
        if not features:
            return Scored(score_2N)
        last_N = mask_NL.sum(-1) - 1
        return Scored(score_2N, None, _up(out.hidden_states[-1][torch.arange(len(last_N), device=device), last_N]))


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def load(recipe: RewardRecipe, tokenizer: Any, *, checkpointing: bool = False) -> nn.Module:
    """The network to train. Raises UserError for weights that are missing or of the wrong kind."""
    if isinstance(recipe.objective, Ordinal):
        return load_policy(recipe.model, recipe.lora, activation_checkpointing=checkpointing)
    net: Any = _load_classifier(recipe.model, recipe.objective, tokenizer)
    if recipe.lora is not None:
        net = add_adapter(net, recipe.model, recipe.lora, "SEQ_CLS")
        if checkpointing:
            net.enable_input_require_grads()
    whole: nn.Module = net
    return whole


def _load_classifier(model: ModelSpec, objective: BradleyTerry, tokenizer: Any) -> Any:
    """One score on the backbone: the checkpoint's own where it is a reward model, else new. The padding token is in the
    configuration, since that is how the score's place, the last token that is not padding, is found."""
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    folder = locate(model.name_or_path, model.revision)
    if is_adapter(folder):
        raise UserError(f"model.name_or_path: {folder} is an adapter; expected whole weights")
    weight_files(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    _set_dropout(config, objective.dropout, str(folder))
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # a score that is new is no news
    try:
        net, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, checkpoint_dtype(folder) if model.dtype == "auto" else model.dtype),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, RuntimeError) as e:  # no such class for this architecture; a score for several labels
        raise UserError(f"model.name_or_path: {folder}: no reward model can be made of it: {e}") from e
    finally:
        logging.set_verbosity(before)
    backbone = [k for k in info["missing_keys"] if k.startswith(f"{net.base_model_prefix}.")]
    if backbone:
        raise UserError(
            f"model.name_or_path: the weights in {folder} lack {len(backbone)} tensors of {type(net).__name__}, first "
            f"{min(backbone)!r}; they would start at random"
        )
    return net


def _set_dropout(config: Any, p: float, where: str) -> None:
    """Every dropout rate of a configuration, and of those inside it. UserError where p is to be and none is there."""
    found = 0
    nodes = [config]
    while nodes:
        node = nodes.pop()
        nodes += [v for v in vars(node).values() if hasattr(v, "to_dict")]
        for name in [n for n, v in vars(node).items() if re.search("dropout|pdrop", n) and type(v) in (int, float)]:
            setattr(node, name, p)
            found += 1
    if p and not found:
        raise UserError(f"objective.dropout: the configuration in {where} has no dropout rate to set")


def rating_ids(recipe: RewardRecipe, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of the ratings; () for a classifier."""
    o = recipe.objective
    if not isinstance(o, Ordinal):
        return ()
    return Question(o.template, o.ratings, Encoder(tokenizer), "objective").rating_S


def write(net: Any, folder: Path, tokenizer: Any) -> int:
    """The trained network as a whole model that scoring loads, LoRA merged in fp32; how many tensors there are.

    For networks that are whole in this process; a LoRA network is of no use afterwards. NumericsError for a tensor that
    is not finite.
    """
    if hasattr(net, "get_base_model"):
        dtype = net.get_base_model().dtype
        net = merge(net.to(device="cpu", dtype=torch.float32)).to(dtype)
    _set_dropout(net.config, 0.0, str(folder))
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return check_tensors(each_tensor(folder), str(folder))
