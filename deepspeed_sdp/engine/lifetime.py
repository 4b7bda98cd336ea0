"""An engine that is destroyed takes no more calls."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from deepspeed_sdp.errors import StateError

_Method = TypeVar("_Method", bound=Callable[..., Any])


def while_alive(method: _Method) -> _Method:
    """A method of an engine that raises :class:`StateError` once ``_is_destroyed`` is set."""

    @functools.wraps(method)
    def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if engine._is_destroyed:
            raise StateError(
                f"engine.{method.__name__}: the engine is destroyed; takes a new one, from deepspeed_sdp.initialize()"
            )
        return method(engine, *args, **kwargs)

    return call  # type: ignore[return-value]
