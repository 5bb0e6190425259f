"""YAML files and KEY=VALUE -> Config."""

import json
from pathlib import Path
from typing import Any

import yaml

from preprocessing.textfiles import read_text
from rules import make_config, not_for
from utils import FIELDS, REQUIRED, Config, UserError, holds_text


class _StrictLoader(yaml.SafeLoader):
    """A SafeLoader to whom a key written twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, str):
                problem = f"key {name!r} is not a word"
            elif name in seen:
                problem = f"key {name} stands there twice; keep one"
            else:
                seen.add(name)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)


for tag in ("merge", "value"):  # << and =, which are texts here
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{tag}", yaml.SafeLoader.construct_yaml_str)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # one line: PyYAML's own message spans several (ValueError: an impossible date, say)
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> dict:
    """Read a YAML mapping; UserError when the file is missing, unreadable or something else."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read this config: {error}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def _parse_override(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"{text!r} on the command line: expected KEY=VALUE")
    is_text = name in FIELDS and holds_text(name)
    try:
        parsed = _parse_yaml(value, f"{name}= on the command line")
    except UserError:
        if not is_text:
            raise
        return name, value
    # of a text, what is typed, quotes apart: no number, date or comment
    quoted = isinstance(parsed, str) and value.lstrip()[:1] in ("'", '"')
    is_null = value.strip().lower() in ("", "~", "null")
    return name, parsed if quoted or is_null or not is_text else value


def as_override(name: str, value: Any) -> str:
    """KEY=VALUE that is read as this value. JSON is YAML where it writes letters as they are."""
    return f"{name}={json.dumps(value, ensure_ascii=False)}"


def pieces(value: str) -> list[str]:
    """A value, or those that commas part: `1,2` is two, `[1, 2]` one. What is no YAML between
    brackets is one value as it stands, and run.py says what is wrong with it."""
    text = f"[{value}]"
    try:
        nodes = yaml.compose(text, yaml.SafeLoader).value
    except yaml.YAMLError:
        return [value]
    return [text[node.start_mark.index : node.end_mark.index] for node in nodes] or [""]


def own_config(folder: Path) -> Config | None:
    """That of a folder of this program; None where its config.yaml is another program's, or there
    is none. Raises UserError."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    values = read_yaml(path)
    return make_config(values, str(path)) if values.keys() >= {*REQUIRED} else None


def load_config(*arguments: str | Path) -> Config:
    """The config of YAML files, of which later ones win, and KEY=VALUE, which wins over all.

    A file that sets another method leaves out what the files before it set for their own alone
    (rules.not_for), so that args/rows/ go with every recipe.
    A run is named by KEY=VALUE or by the last file, else by the files' names joined by `-`: files
    listed together never write into the folder of one of them. Raises UserError with every
    problem found.
    """
    overrides = [text for text in map(str, arguments) if _is_override(text)]
    paths = [Path(text).expanduser() for text in map(str, arguments) if not _is_override(text)]
    if not paths:
        raise UserError("no config: give a YAML file, see args/")
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a YAML file (of a checkpoint: config.yaml)")
        if path.suffix not in (".yaml", ".yml") and not path.exists():
            raise UserError(f"{str(path)!r} on the command line: expected KEY=VALUE or a YAML file")
    values: dict[str, Any] = {"name": "-".join(path.stem for path in paths)}
    origins: dict[str, str] = {}
    for path in paths:
        keys = read_yaml(path)
        if path is not paths[-1]:
            keys.pop("name", None)
        for name in not_for(keys) & values.keys():
            del values[name]
        values.update(keys)
        origins.update(dict.fromkeys(keys, str(path)))
    for name, value in map(_parse_override, overrides):
        values[name], origins[name] = value, "the command line"
    return make_config(values, ", ".join(map(str, paths)), origins)


def _is_override(text: str) -> bool:
    name, equals, _ = text.partition("=")
    return bool(equals) and (name.isidentifier() or not text.endswith((".yaml", ".yml")))
