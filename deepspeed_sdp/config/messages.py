"""What pydantic finds wrong in a block, in words: the key, what it got and what it takes."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.json_text import shown

_MAX_MESSAGES = 10
_LONGEST_KEY = 100

# Keys of a union report once for each of its members.
_UNIONS = {"coverage": 'a number above 0 and up to 1, as 0.5 or "1/2", or one for each kind of unit (mlp, attention)'}
# Keys of before, or that people look for here.
_ELSEWHERE = {
    "owners_per_unit": 'takes "coverage" K/N in its place',
    "block_unit": 'takes "granularity" "layer" or "branch" in its place',
    "reduction_dtype": 'takes "communication_data_type" of the DeepSpeed config in its place',
}


def in_words(error: ValidationError, name: str, model: type[BaseModel], block: Mapping[str, Any]) -> str:
    """A line for each of the first mistakes in ``block``, of the schema ``model``; ``name``: of the block, if any."""
    messages: dict[str, None] = {}
    for item in error.errors(include_url=False):
        messages[_describe(item, name, model, block)] = None
        if len(messages) == _MAX_MESSAGES:
            break
    return "\n".join(messages)


def _describe(item: Any, name: str, model: type[BaseModel], block: Mapping[str, Any]) -> str:
    raised = item.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        return str(raised)
    loc = item["loc"]
    first = str(loc[0]) if loc else ""
    got = shown(item.get("input"))
    if first in _UNIONS:
        return f"{name}.{first}: got {shown(block[first])}; takes {_UNIONS[first]}"
    key = ".".join([name] * bool(name) + [str(part)[:_LONGEST_KEY] for part in loc])
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key, got {got}; {_hint(loc, model)}"
    if item["type"] == "missing":
        return f"{key}: got nothing; takes {_block(loc[:-1], model).model_fields[str(loc[-1])].description}"
    if item["type"] == "model_type":
        return f"{key}: got {got}; takes an object with keys"
    if raised is not None:
        return f"{key}: {raised}"
    return f"{key}: got {got}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _hint(loc: tuple[Any, ...], model: type[BaseModel]) -> str:
    key = str(loc[-1])[:_LONGEST_KEY]
    if key in _ELSEWHERE:
        return _ELSEWHERE[key]
    keys = list(_keys(model))
    near = [path for path in keys if path.split(".")[-1] == key] or [
        path for path in keys if path.replace(".", "_") == key
    ]
    if not near:
        close = difflib.get_close_matches(key, [path.split(".")[-1] for path in keys], n=1)
        near = [path for path in keys if close and path.split(".")[-1] == close[0]]
    hint = f"did you mean {near[0]!r}? " if near else ""
    takes = _block(loc[:-1], model).model_fields
    return f"{hint}takes {', '.join(field.alias or name for name, field in takes.items())}"


def _block(loc: tuple[Any, ...], model: type[BaseModel]) -> type[BaseModel]:
    """The one at ``loc`` within ``model``."""
    for part in loc:
        model = block_of(model.model_fields[str(part)].annotation) or model
    return model


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The block that a key takes, be it optional."""
    options = (annotation, *get_args(annotation))
    return next((one for one in options if isinstance(one, type) and issubclass(one, BaseModel)), None)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name)
        if (block := block_of(field.annotation)) is not None:
            yield from _keys(block, f"{prefix}{name}.")
