"""A JSON schema of the recipe, for editors."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from pydantic import PydanticSchemaGenerationError, TypeAdapter

from po.heads import HEADS
from po.keys import documentation
from po.recipe.arguments import known
from po.recipe.fields import arms, choices, hints
from po.spec import DataSpec, LoraSpec, ModelSpec, ReferenceSpec, RewardSpec, RolloutSpec, Source, Term


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe in po's own terms, shorthands of its sections included."""
    text = {"type": "string"}
    source = {"anyOf": [text, _section(Source)]}
    sources = {"anyOf": [source, {"type": "array", "items": source}]}
    data = _section(DataSpec)
    data["properties"] |= {"train": sources, "eval": sources}
    reference = _section(ReferenceSpec)
    reference["properties"] = {("from" if k == "source" else k): v for k, v in reference["properties"].items()}
    reward = {"anyOf": [text, _section(RewardSpec)]}
    rollout = _section(RolloutSpec)
    rollout["properties"]["rewards"] = {"anyOf": [reward, {"type": "array", "items": reward, "minItems": 1}]}
    terms = [_term(name, cls) for name, cls in HEADS.items()]
    loss = {"anyOf": [{"enum": list(HEADS)}, *terms]}
    properties: dict[str, dict[str, Any]] = {
        "model": {"anyOf": [text, _section(ModelSpec)]},
        "lora": {"anyOf": [_section(LoraSpec), {"type": "null"}]},
        "reference": {"anyOf": [text, reference]},
        "data": {"anyOf": [sources, data]},
        "rollout": {"anyOf": [rollout, {"type": "null"}]},
        "loss": {"anyOf": [loss, {"type": "array", "items": loss, "minItems": 1}]},
        "train": {
            "type": "object",
            "properties": {k: _json(h) for k, h in known().items()},
            "additionalProperties": False,
        },
        "max_tokens_per_forward": {"type": ["integer", "null"], "minimum": 1},
        "deepspeed": {"type": ["string", "object", "null"]},
        "output_dir": text,
        "resume": {"type": "boolean"},
        "seed": {"type": "integer", "minimum": 0},
    }
    comments = documentation()["Recipe"]
    for name, prop in properties.items():
        properties[name] = {**prop, "description": comments[name][1]} if comments[name][1] else prop
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "po recipe",
        "type": "object",
        "properties": properties,
        "required": ["model", "data", "loss", "output_dir"],
        "additionalProperties": False,
    }


def _section(cls: Any) -> dict[str, Any]:
    comments = documentation().get(cls.__name__, {})
    properties: dict[str, Any] = {}
    for f in fields(cls):
        properties[f.name] = _json(hints(cls)[f.name])
        if comments.get(f.name, ("", ""))[1]:
            properties[f.name]["description"] = comments[f.name][1]
        if f.default is not MISSING:
            properties[f.name]["default"] = list(f.default) if isinstance(f.default, tuple) else f.default
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return {"type": "object", "properties": properties, "required": missing, "additionalProperties": False}


def _term(name: str, cls: type) -> dict[str, Any]:
    term = _section(cls)
    weight = _section(Term)["properties"]["weight"]
    term["properties"] = {"head": {"const": name}, "weight": weight, **term["properties"]}
    term["required"] = ["head", *term["required"]]
    return term


def _json(hint: Any) -> dict[str, Any]:
    if choices(hint) and all(choices(a) or a is type(None) for a in arms(hint)):
        return {"enum": [*choices(hint), *([None] if type(None) in arms(hint) else [])]}
    try:
        return TypeAdapter(hint).json_schema()
    except PydanticSchemaGenerationError:
        return {}
