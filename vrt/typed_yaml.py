"""YAML files as typed, frozen sections, with errors that name the key: the one way in for params and data set descriptions."""

import difflib
import json
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ParamsError(ValueError):
    """A params file or data set description can't be used; the message names each key, what was found and what is allowed."""


class Section(BaseModel):
    """One level of such a file: immutable, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


SectionType = TypeVar("SectionType", bound=Section)


def read_yaml(path: Path) -> Any:
    """The content of a YAML 1.2 file (as DVC reads it: 1e-4 is a number). Raises ParamsError where it is not YAML."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path}: not readable as YAML: {error}") from None


def parse(model: type[SectionType], tree: Any, source: Path) -> SectionType:
    """`tree` as a `model`; ParamsError names `source` and every wrong key."""
    if not isinstance(tree, dict):
        raise ParamsError(f"{source}: found {_show(tree)} at the top; expected keys: {', '.join(model.model_fields)}")
    try:
        return model.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ParamsError("\n".join([f"{source}: {len(lines)} wrong value{'s' * (len(lines) > 1)}", *(f"  {line}" for line in lines)])) from None


def _explain(model: type[Section], problem: dict[str, Any]) -> str:
    path, allowed = _locate(model, problem["loc"])
    key = ".".join(path) or "the file as a whole"
    match problem["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], allowed, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            return f"{key}: found an unknown key{hint} allowed here: {', '.join(allowed)}"
        case "missing":
            return f"{key}: found nothing; expected a value (no knob has a hidden default)"
        case "union_tag_not_found":
            return f"{key}.kind: found nothing; expected one of the kinds of {key}"
        case "value_error":
            return f"{key}: {problem['ctx']['error']}"
        case _:
            return f"{key}: found {_show(problem['input'])}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _locate(model: type[Section], location: tuple) -> tuple[list[str], list[str]]:
    """The key path of a pydantic error location, and the keys allowed beside its last part.

    A tagged union puts the tag of the chosen kind into the location ("degradation", "noise", "sigma"): it is no key of the file.
    """
    path: list[str] = []
    here: Any = model
    allowed: list[str] = []
    for part in location:
        # Not by the origin alone: from Python 3.14 on, `int | Literal["auto"]` has the same.
        kinds = [kind for kind in get_args(here) if isinstance(kind, type) and issubclass(kind, Section)]
        if get_origin(here) is UnionType and kinds:
            here = next(kind for kind in kinds if part in get_args(kind.model_fields["kind"].annotation))
            continue
        path.append(str(part))
        if isinstance(here, type) and issubclass(here, Section):
            allowed = list(here.model_fields)
            here = here.model_fields[part].annotation if part in here.model_fields else None
    return path, allowed


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
