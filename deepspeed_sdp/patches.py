"""Code of others that is replaced while this package runs. All of it passes through here, and can be undone.

==================================================  ============================================  =====================
what                                                why                                           for as long as
==================================================  ============================================  =====================
``deepspeed.DeepSpeedEngine``                       ``deepspeed.initialize`` builds what it       one call
                                                    finds there
``deepspeed.zero.GatheredParameters``               weights lie in shards of their owners         an engine lives
``deepspeed.initialize``, methods of ``Trainer``    the ways by which HuggingFace comes to        until ``disable()``
and ``Accelerator``                                 DeepSpeed
``HfDeepSpeedConfig``                               transformers would build sharded what is cut  the process, or undone
``F.scaled_dot_product_attention``                  on the meta device it is no fused kernel      a trace
``sys.excepthook``                                  one report of one rank                        the process, or undone
==================================================  ============================================  =====================
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Undo = Callable[[], None]


def patch(owner: Any, name: str, new: Any) -> Undo:
    """Let ``owner.name`` be ``new``; what is returned puts back what stood there, once."""
    standing = [(vars(owner)[name],)] if name in vars(owner) else [()]
    setattr(owner, name, new)

    def undo() -> None:
        for before in standing:
            setattr(owner, name, *before) if before else delattr(owner, name)
        standing.clear()

    return undo


@contextmanager
def patched(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Inside, ``owner.name`` is ``new``."""
    undo = patch(owner, name, new)
    try:
        yield
    finally:
        undo()
