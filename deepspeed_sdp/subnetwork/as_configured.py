"""Whether a model does what its class and config say, and nothing beside.

Cutting replaces modules, evaluation and export build the full model anew from its config. What a user has put on top
(hooks, a patched ``forward``, a changed attribute) would be lost there, so it is refused at start and in words.
"""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from deepspeed_sdp.errors import ModelError
from deepspeed_sdp.subnetwork.full_model import skeleton_of

_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What may differ: it says nothing of what the full model computes from its weights. Sizes are checked by shapes;
# initial values, gradients of a padding token, and dropout are matters of training, which takes the module as it is.
_FREE = frozenset(
    {
        "_attn_implementation",
        "_compiled_call_impl",
        "_init_weights",
        "generation_config",
        "gradient_checkpointing",
        "pad_token_id",
        "padding_idx",
        "vocab_size",
    }
)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype)


def check_as_configured(model: nn.Module) -> None:
    """Compare ``model``, real or meta, with what its class makes of its config.

    transformers' own hooks (NEFTune, gradients of inputs, capture of outputs) act in training, or on the caller's word.
    A loss function of the model's own is carried over.

    Raises:
        ModelError: it cannot be built from its config alone; or names the module and what it has beside.
    """
    name = type(model).__name__
    try:
        built = skeleton_of(type(model), getattr(model, "config", None))
    except Exception as error:
        raise ModelError(
            f"model: {name} cannot be built from its config alone ({type(error).__name__}: {error}), which "
            "evaluate_full and save_hf need"
        ) from None
    for what in itertools.chain(_of_modules(model, built), _of_parameters(model, built), _of_buffers(model)):
        raise ModelError(
            f"model: {what}. The full model is evaluated and saved as {name} makes it from its config, where this "
            "would be lost; takes a model as its config describes it, and not one that is a subnetwork already. Hooks "
            "can be put on engine.module once it is there"
        )


def check_hooks(model: nn.Module, replaced: Iterable[str]) -> None:
    """Refuse hooks on gradients of parameters that others take the place of, here or on the way from the meta device.

    Raises:
        ModelError: names the parameter.
    """
    names = set(replaced)
    for name, parameter in model.named_parameters():
        hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        if hooks and (name in names or parameter.is_meta):
            raise ModelError(
                f"model: {name} has a hook on its gradient, and other parameters take its place; put it on those of "
                "engine.module once it is there"
            )


def _of_modules(model: nn.Module, skeleton: nn.Module) -> Iterator[str]:
    own, built = dict(model.named_modules()), dict(skeleton.named_modules())
    for name in own:
        if name not in built:
            yield f"{name} ({type(own[name]).__name__}) was added to it"
        else:
            yield from (f"{name or type(model).__name__} {what}" for what in _of_module(own[name], built[name]))
    for name in built.keys() - own.keys():
        yield f"{name} was taken out of it"


def _of_parameters(model: nn.Module, skeleton: nn.Module) -> Iterator[str]:
    shapes = [[(name, tuple(p.shape)) for name, p in m.named_parameters()] for m in (model, skeleton)]
    if shapes[0] != shapes[1]:
        yield f"{type(model).__name__} has other parameters than one built from its config"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            yield f"{name} is a {type(parameter.data).__name__} and no plain parameter"


def _of_module(own: nn.Module, built: nn.Module) -> Iterator[str]:
    if type(own) is not type(built):
        yield f"is {type(own).__name__}, where its config makes {type(built).__name__}"
        return
    for kind in _HOOKS:
        for hook in getattr(own, kind).values():
            if not _module_of(hook).startswith("transformers."):
                yield f"has a {kind.strip('_').removesuffix('s').replace('_', ' ')}, {_name_of(hook)}"
    expected = vars(built)
    for name, value in vars(own).items():
        if name in _OF_MODULES or name in _FREE or "dropout" in name or isinstance(own, nn.modules.dropout._DropoutNd):
            continue
        if name in expected:
            if not _is_same(value, expected[name]):
                yield f"has {name} {_shown(value)}, where its config makes {_shown(expected[name])}"
        elif callable(getattr(type(own), name, None)):
            yield f"has a {name} of its own, which is not its class's"
        elif not isinstance(own, PreTrainedModel) and not _is_same(value, getattr(type(own), name, value)):
            yield f"has {name} {_shown(value)}, where its class has {_shown(getattr(type(own), name))}"


def _of_buffers(model: nn.Module) -> Iterator[str]:
    """Those that are in no state dict: whoever loads the saved model has what the config makes of them."""
    own = {
        f"{name}.{local}".lstrip("."): buffer
        for name, module in model.named_modules()
        for local, buffer in module.named_buffers(recurse=False)
        if local in module._non_persistent_buffers_set and not buffer.is_meta
    }
    if not own:
        return
    config: Any = model.config
    from accelerate import init_empty_weights  # a slow import, which plan and estimate do without

    without_memory = init_empty_weights(include_buffers=False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), without_memory, no_init_weights():
        built = dict(type(model)(copy.deepcopy(config)).named_buffers())
    for name, buffer in own.items():
        if name not in built:
            yield f"{name} was added to it"
        elif not _is_close(buffer.cpu(), built[name]):
            yield f"{name}, a buffer that is not saved, has other values than its config makes"


def _is_close(own: torch.Tensor, built: torch.Tensor) -> bool:
    """Up to the dtype that the model was cast to, and the device its buffers were computed on."""
    if own.shape != built.shape:
        return False
    built = built.to(own.dtype)
    return torch.allclose(own.double(), built.double(), rtol=1e-5, atol=0.0, equal_nan=True)


def _is_same(own: Any, built: Any) -> bool:
    if isinstance(own, _PLAIN) or isinstance(built, _PLAIN):
        return bool(own == built)
    if isinstance(own, list | tuple) and isinstance(built, list | tuple):
        return len(own) == len(built) and all(map(_is_same, own, built))
    if isinstance(own, Mapping) and isinstance(built, Mapping):
        return own.keys() == built.keys() and all(_is_same(own[key], built[key]) for key in own)
    if isinstance(own, functools.partial) and isinstance(built, functools.partial):
        return own.func == built.func and own.args == built.args and own.keywords == built.keywords
    if hasattr(own, "to_dict") and hasattr(built, "to_dict"):
        kernels = [getattr(config, "_attn_implementation", None) for config in (own, built)]
        return bool(own.to_dict() == built.to_dict()) and kernels[0] == kernels[1]
    if callable(own) and hasattr(own, "__qualname__"):
        return bool(own == built)
    return type(own) is type(built)


def _module_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__name__)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, _PLAIN) else type(value).__name__
    return text if len(text) < 60 else f"{text[:57]}..."
