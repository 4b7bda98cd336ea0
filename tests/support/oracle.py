"""The reference simulator: one process, the full model, plain PyTorch. It shares no code with the package.

It follows the two formulas of the method word by word, so that its correctness is seen by reading:

    forward masking    g_u = 1/|S_u| * sum over w in S_u of  grad_u loss(theta_w; batch_w)

where ``theta_w`` is the full model with the activations of all units that worker ``w`` does not own set to zero, and

    backward masking   g_u = 1/|S_u| * sum over w in S_u of  grad_u loss(theta; batch_w)
"""

import contextlib
import math

import torch


def unit_owners_of(plan, blocks=False):
    """Owners of every unit, as plain data: {module name: [owners of unit 0, owners of unit 1, ...]}.

    ``blocks``: the one unit of a space is the whole module, marked by a trailing ``None``.
    """
    return {
        space.space.name: [plan.owners(space.space.name, u) for u in range(space.space.num_units)] + [None] * blocks
        for space in plan.spaces
    }


def _features_per_unit(model, module_name):
    """Width of one unit at the input of the module's last linear: 1 for a neuron, a KV group's queries otherwise."""
    module = model.get_submodule(module_name)
    if module_name.endswith("mlp"):
        return 1
    kv_heads = module.k_proj.out_features // module.head_dim
    return module.q_proj.out_features // kv_heads


def is_block(name, owners):
    """Whether the only unit is the whole module: a decoder layer, or a branch marked by a trailing ``None``."""
    return name.split(".")[-1].isdigit() or owners[-1] is None


def _block_hook(is_owned, scale):
    """What a block adds to the residual stream counts ``scale`` times, or not at all."""

    def hook(_, args, kwargs, output):
        factor = scale if is_owned else 0.0
        if isinstance(output, tuple):  # attention: (output, weights)
            return (output[0] * factor, *output[1:])
        if "position_embeddings" in kwargs:  # a layer, which adds its input itself
            residual = args[0] if args else kwargs["hidden_states"]
            return residual + factor * (output - residual)
        return output * factor

    return hook


@contextlib.contextmanager
def only_units_of(model, unit_owners, worker, scale):
    """The full model with the activations of units that ``worker`` does not own set to zero.

    ``scale``: what the others count; a number, or a function of the worker and the module's name.
    """
    handles = []
    for name, owners in unit_owners.items():
        module = model.get_submodule(name)
        factor = scale(worker, name) if callable(scale) else scale
        if is_block(name, owners):
            handles.append(module.register_forward_hook(_block_hook(worker in owners[0], factor), with_kwargs=True))
            continue
        last = module.down_proj if name.endswith("mlp") else module.o_proj
        mask = torch.tensor([float(worker in s) for s in owners]).repeat_interleave(_features_per_unit(model, name))

        def hook(_, inputs, mask=mask * factor):
            return (inputs[0] * mask,)

        handles.append(last.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def _branch_of(name):
    """The branch that a layer's input norm serves: the norm is part of it."""
    return name.replace("post_attention_layernorm", "mlp.norm").replace("input_layernorm", "self_attn.norm")


def _by_owners(unit_owners, name, parameter, num_workers, of):
    """``of(S_u)`` of every element of a parameter, in a shape that broadcasts to it."""
    for block, owners in unit_owners.items():
        if is_block(block, owners) and (f"{_branch_of(name)}.".startswith(f"{block}.")):
            return torch.tensor(float(of(owners[0])))
    parts = name.split(".")
    module, linear, kind = ".".join(parts[:-2]), parts[-2], parts[-1]
    if (
        module not in unit_owners
        or is_block(module, unit_owners[module])
        or linear
        not in (
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        )
    ):
        return torch.tensor(float(of(range(num_workers))))
    if linear in ("o_proj", "down_proj") and kind == "bias":
        return torch.tensor(float(of(range(num_workers))))
    dim = 1 if linear in ("o_proj", "down_proj") else 0
    counts = torch.tensor([float(of(owners)) for owners in unit_owners[module]])
    counts = counts.repeat_interleave(parameter.shape[dim] // len(counts))
    return counts.view(-1, *[1] * (parameter.dim() - 1)) if dim == 0 else counts.view(1, -1)


def train(model, unit_owners, num_workers, batches, optimizer, *, clip=0.0, scale=1.0, workers=None, masking="forward"):
    """Train the full model. ``batches[step][rank]`` is a list of micro-batches (``[B, T]`` token ids).

    Rank ``r`` trains subnetwork ``r % num_workers``, or ``workers[r]``.
    Returns the losses ``[step][rank]`` and gradient norms ``[step]``.
    """
    losses, norms = [], []
    for step in batches:
        ranks = len(step)
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        losses.append([])
        for rank, micro_batches in enumerate(step):
            model.zero_grad()
            worker = workers[rank] if workers else rank % num_workers
            loss_sum = 0.0
            for ids in micro_batches:
                cut = only_units_of(model, unit_owners, worker, scale)
                with cut if masking == "forward" else contextlib.nullcontext():
                    loss = model(input_ids=ids, labels=ids).loss / len(micro_batches)
                    loss.backward()
                loss_sum += float(loss.detach())
            losses[-1].append(loss_sum)
            for name, p in model.named_parameters():
                if p.grad is not None:
                    # Under forward masking zero already where worker does not own it.
                    total[name] += p.grad * _by_owners(unit_owners, name, p, num_workers, lambda s, w=worker: w in s)
        for name, p in model.named_parameters():
            replicas = ranks // num_workers
            p.grad = total[name] / (_by_owners(unit_owners, name, p, num_workers, len) * replicas)
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        norms.append(norm)
        if clip and norm > clip:
            for p in model.parameters():
                p.grad *= clip / (norm + 1e-6)
        optimizer.step()
    return losses, norms
