"""Typed, frozen configs. YAML only spells them; an unknown key is an error with a suggestion."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from temper.core.errors import ConfigError


class Config(BaseModel):
    """The base of every config: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


C = TypeVar("C", bound=Config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds, with `${key}` replaced by the top-level scalar of that name.

    Raises ConfigError where the file is missing, is not YAML, or holds no mapping.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give the path of a YAML file, for example configs/sft.yaml"
        raise ConfigError(f"config {path} does not exist", do=hint)
    try:
        loaded = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML", why=str(error), do="mend the line named above") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds {type(loaded).__name__}, not a mapping of keys", do="write one `key: value` a line")
    return loaded


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`values` with every `a.b=c` applied; the right side is read as YAML. Raises ConfigError on bad form."""
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} has no `key=value` form", do="write for example train.lr=1e-4")
        node = result
        *parents, leaf = key.split(".")
        for part in parents:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
        node[leaf] = yaml.safe_load(text)
    return result


def interpolate(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with `${key}` in any string replaced by the top-level scalar `key`. Raises ConfigError."""

    def fill(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: fill(value) for key, value in item.items()}
        if isinstance(item, list):
            return [fill(value) for value in item]
        if not isinstance(item, str):
            return item
        while "${" in item:
            head, _, tail = item.partition("${")
            name, closed, rest = tail.partition("}")
            if not closed or not isinstance(values.get(name), (str, int, float)):
                known = sorted(key for key, value in values.items() if isinstance(value, (str, int, float)))
                raise ConfigError(
                    f"{item!r} refers to ${{{name}}}", why="no top-level key of that name holds a value", do=f"use one of {known}"
                )
            item = head + str(values[name]) + rest
        return item

    return fill(values)


def load_config(cls: type[C], path: Path, overrides: list[str] | None = None) -> C:
    """Read `path`, apply `overrides`, and check the result against `cls`.

    Raises ConfigError naming file, line and key, with the nearest known key where one was misspelt.
    """
    values = interpolate(apply_overrides(read_yaml(path), overrides or []))
    return parse_config(cls, values, source=path)


def parse_config(cls: type[C], values: dict[str, Any], source: Path | None = None) -> C:
    """`values` as a `cls`. Raises ConfigError with one line for each fault."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        faults = [describe_fault(cls, fault, source) for fault in error.errors()]
        where = source or cls.__module__
        raise ConfigError(
            f"{where} is not a valid {cls.__module__.rpartition('.')[2]} config",
            why="; ".join(faults),
            do="see `temper config schema` for every key and its type",
        ) from error


def describe_fault(cls: type[BaseModel], fault: Any, source: Path | None) -> str:
    """One validation fault in words: where it is, what was wrong, and the nearest known key."""
    location = [part for part in fault["loc"] if isinstance(part, (str, int))]
    dotted = ".".join(map(str, location))
    line = line_of(source, location) if source else None
    place = f"line {line}: " if line else ""
    if fault["type"] != "extra_forbidden":
        return f"{place}{dotted}: {fault['msg']} (got {fault.get('input')!r})"
    known = keys_at(cls, location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"{place}unknown key {dotted!r}; {hint}"


def keys_at(cls: Any, location: list[Any]) -> list[str]:
    """The field names of the model that stands at `location` inside `cls`."""
    for part in location:
        if isinstance(cls, type) and issubclass(cls, BaseModel) and part in cls.model_fields:
            cls = cls.model_fields[part].annotation
        candidates = [cls, *get_args(cls), *(inner for arg in get_args(cls) for inner in get_args(arg))]
        models = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        cls = models[0] if models else cls
    return list(cls.model_fields) if isinstance(cls, type) and issubclass(cls, BaseModel) else []


def line_of(path: Path, location: list[Any]) -> int | None:
    """The 1-based line where the key at `location` stands in a YAML file; None for an override."""
    node = yaml.compose(path.read_text())
    line: int | None = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return line
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
