"""A recipe's text: YAML 1.2's core schema, and `key=value` from the command line.

PyYAML reads YAML 1.1, where `1e-5` is a string, `no` is false, `010` is eight and a key may stand twice.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from po.errors import UserError

Keys = tuple[str | int, ...]  # where a value stands: ("loss", 0, "beta")

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"^[-+]?(?:(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
)
_CORE = (
    ("null", _NULL, "~nN"),
    ("bool", _BOOL, "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)

    def construct_document(self, node: yaml.Node) -> Any:
        """At once and not lazily, so that an anchor inside itself is an error."""
        return self.construct_object(node, deep=True)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name, got {key.value!r}", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is here for the second time; keep one of them", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", _pattern, [*_first, ""] if _name == "null" else [*_first]
    )
    _Dumper.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", _pattern, [*_first, ""] if _name == "null" else [*_first]
    )
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda _, node: float(re.sub(r"\.(?=[inIN])", "", node.value)))


def read(path: str | Path) -> dict[str, Any]:
    """The mapping that a recipe file holds. Raises UserError with file:line:column for anything that is not one."""
    try:
        text = Path(path).read_text("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{path}: expected a recipe, a YAML file; this is a folder") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text at byte {e.start}; save the recipe as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}; expected a recipe, a YAML file") from None
    try:
        tree = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as e:
        raise UserError(f"{path}{_at(e)}") from None
    if tree is None:
        raise UserError(f"{path}: the recipe is empty; it needs at least model, data, loss and output_dir")
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping (`key: value` lines), got {type(tree).__name__}")
    return tree


def _at(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "\\t" in said:
        said += "; YAML indents with spaces, so replace the tab"
    return f":{mark.line + 1}:{mark.column + 1}: {said}" if mark is not None else f": {said}"


def dump(tree: Any) -> str:
    """YAML text that `read` turns into the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=False)


def override(word: str) -> tuple[Keys, Any]:
    """`loss.0.beta=0.2`, `loss[0].beta=0.2` -> (("loss", 0, "beta"), 0.2). Raises UserError where it is neither."""
    key, equals, value = word.partition("=")
    key = key.removeprefix("--")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(?:\.[\w-]+|\[\d+\])*", key):
        raise UserError(f"command line: {word!r}: expected key=value, e.g. train.learning_rate=1e-5 or loss.0.beta=0.2")
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    return tuple(int(p) if p.isdigit() else p for p in parts), scalar(value)


def scalar(text: str) -> Any:
    """A value from the command line: a number, a bool, null, [a, list], {a: mapping}, else the text as it stands."""
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text  # e.g. a glob, *.jsonl
    return text if isinstance(value, str | list | dict) and text[:1] not in ("[", "{", "'", '"') else value


def show(path: Keys) -> str:
    """("loss", 0, "beta") -> 'loss[0].beta'."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
