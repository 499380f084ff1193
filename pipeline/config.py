"""Configuration: one YAML file plus a few `key.path=value` overrides, checked whole before anything starts.

`Strict` is the base of every `Config` in the house: frozen, unknown keys forbidden, no silent conversion of types.
`load` reports every mistake at once, each with its path and, for a misspelt name, the nearest known one.
"""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from pipeline.errors import ConfigError


class Strict(BaseModel):
    """A frozen configuration that forbids unknown keys and converts no types; every number comes back from JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), ser_json_inf_nan="constants")


StrictT = TypeVar("StrictT", bound=Strict)


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as YAML 1.2 and every reader expect (1.1 makes it a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|nan)$"),
    list("-+.0123456789"),
)


def load(schema: type[StrictT], path: Path | str | None, overrides: Sequence[str] = ()) -> StrictT:
    """Read a YAML file (None: an empty one), apply `key.path=value` overrides and check the whole against `schema`.

    Raises:
        ConfigError: with every mistake found, one line each.
    """
    raw: Any = {} if path is None else _read(Path(path))
    where = "command line" if path is None else str(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping of keys at the top, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse(schema, raw, where)


def changed(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a mapping with other values at some paths (`{"optim.lr": 0.01}`).

    Raises:
        ConfigError: a path leads through a value that is no mapping.
    """
    made: dict[str, Any] = copy.deepcopy(dict(raw))
    for path, value in changes.items():
        _put(made, path, value, f"'{path}'")
    return made


def parse(schema: type[StrictT], raw: Mapping[str, Any], where: str) -> StrictT:
    """Check a mapping against `schema`; `where` names its origin in errors."""
    try:
        return validate(schema, raw)
    except ValidationError as error:
        lines = [f"{where}: {_explain(schema, raw, detail)}" for detail in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def validate(schema: type[StrictT], raw: Mapping[str, Any]) -> StrictT:
    """Check without wrapping errors. JSON semantics: lists become tuples, text becomes paths, nothing else converts."""
    return schema.model_validate_json(json.dumps(raw, default=str), strict=True)


def dump(config: Strict) -> str:
    """The resolved configuration as YAML, every default spelt out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def flatten(config: Strict) -> dict[str, str]:
    """The resolved configuration as flat `key.path -> text`, for tables and MLflow parameters."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value)

    walk("", config.model_dump(mode="json"))
    return flat


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known one and the whole list."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}(known: {', '.join(known)})"


class Chooser:
    """A validator for fields whose schema is chosen by what is given."""

    def schema(self, node: Any, beside: Any) -> type[Strict] | None:
        """The schema of a given value, where it can be told; `beside` is the mapping that it lies in."""
        raise NotImplementedError


class ByName(Chooser):
    """A validator for fields whose schema is chosen by their own key `name`, one file per name.

    Use it as `Annotated[SerializeAsAny[Strict], BeforeValidator(ByName("model", names, schema_of))]`; error paths stay
    exact (`model.dropout`).
    """

    def __init__(self, kind: str, names: Callable[[], Sequence[str]], schema_of: Callable[[str], type[Strict]]) -> None:
        self.kind = kind
        self.names = names
        self.schema_of = schema_of

    def __call__(self, value: Any) -> Any:
        """Turn a mapping into the `Config` that its `name` selects; pass a ready one through."""
        if isinstance(value, Strict):
            return value
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str):
            known = ", ".join(self.names())
            raise PydanticCustomError(
                "no_name", "expected a mapping with a key 'name' (known: {known})", {"known": known}
            )
        if name not in self.names():
            message = f"unknown {self.kind} '{name}'; {nearest(name, self.names())}"
            raise PydanticCustomError("unknown_name", "{message}", {"message": message})
        return validate(self.schema_of(name), value)

    def schema(self, node: Any, beside: Any) -> type[Strict] | None:
        """That of the name."""
        return self.schema_of(node["name"]) if isinstance(node, dict) else None


def _read(path: Path) -> Any:
    try:
        raw = yaml.load(path.read_text(), _Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the configuration ({error.strerror}); give the path of a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return {} if raw is None else raw


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"override '{override}': expected key.path=value, for example optim.lr=0.01")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': not a YAML value: {' '.join(str(error).split())}") from None
    _put(raw, path, value, f"override '{override}'")


def _put(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    *keys, last = path.split(".")
    node = raw
    for key in keys:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: '{key}' holds {child!r}, not a mapping")
        node = child
    node[last] = value


def _explain(schema: type[BaseModel], raw: Mapping[str, Any], detail: ErrorDetails) -> str:
    path = ".".join(str(part) for part in detail["loc"]) or "(top)"
    if detail["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        known = _keys_at(schema, detail["loc"][:-1], raw)
        return f"{path}: unknown key; {nearest(str(detail['loc'][-1]), known)}"
    if detail["type"] == "missing":
        return f"{path}: missing, a value is required"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(detail["input"], dict | list) or detail["type"] in {"unknown_name", "no_name"}:
        return f"{path}: {message}"
    return f"{path}: {message}, got {detail['input']!r}"


def _keys_at(schema: type[BaseModel], loc: Sequence[int | str], raw: Mapping[str, Any]) -> list[str]:
    """The keys allowed at `loc`, found by walking down the schema beside the mapping that was given."""
    fields: Any = schema
    node: Any = raw
    for part in loc:
        if isinstance(part, int):  # an element of a list: its schema was found with the list
            node = node[part] if isinstance(node, list) else None
        else:
            beside, node = node, node.get(part) if isinstance(node, dict) else None
            fields = _schema_of_field(fields, part, node, beside)
    if hasattr(fields, "model_fields"):
        return list(fields.model_fields)
    return list(getattr(fields, "__dataclass_fields__", {}))


def _schema_of_field(schema: Any, part: int | str, node: Any, beside: Any) -> Any:
    field = getattr(schema, "model_fields", {}).get(part)
    if field is None:
        return None
    inside = (item for arg in get_args(field.annotation) for item in getattr(arg, "__metadata__", ()))  # of `X | None`
    for validator in (*field.metadata, *inside):
        chooser = getattr(validator, "func", None)
        if isinstance(chooser, Chooser) and (chosen := chooser.schema(node, beside)):
            return chosen
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if hasattr(candidate, "__dataclass_fields__") or (
            isinstance(candidate, type) and issubclass(candidate, BaseModel)
        ):
            return candidate
    return None
