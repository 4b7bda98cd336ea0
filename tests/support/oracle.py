"""The reference simulator: one process, the full model, plain PyTorch. It shares no code with the package.

It follows the two formulas of the method word by word, so that its correctness is seen by reading:

    forward masking    g_u = 1/|S_u| * sum over w in S_u of  grad_u loss(theta_w; batch_w)

where ``theta_w`` is the full model with the activations of all units that worker ``w`` does not own set to zero, and

    backward masking   g_u = 1/|S_u| * sum over w in S_u of  grad_u loss(theta; batch_w)
"""

import contextlib
import copy
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


# The linear of a branch that writes to the residual stream, and those that units are the outputs of.
WRITES = {"mlp": ("down_proj", "dense_4h_to_h", "c_proj"), "attention": ("o_proj", "dense", "c_proj")}
READS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "query_key_value", "dense_h_to_4h", "c_attn", "c_fc")


def last_linear(module, name):
    """The linear of a branch that writes to the residual stream, and the number of its inputs."""
    names = WRITES["mlp" if name.endswith("mlp") else "attention"]
    linear = next(getattr(module, n) for n in names if hasattr(module, n))
    # GPT-2's linears hold their weights as [in, out].
    return linear, linear.weight.shape[0 if is_transposed(linear) else 1]


def is_transposed(linear):
    return type(linear).__name__ == "Conv1D"


def is_block(name, owners):
    """Whether the only unit is the whole module: a decoder layer, or a branch marked by a trailing ``None``."""
    return name.split(".")[-1].isdigit() or owners[-1] is None


def _block_hook(is_owned, scale, is_layer):
    """What a block adds to the residual stream counts ``scale`` times, or not at all."""

    def hook(_, args, kwargs, output):
        factor = scale if is_owned else 0.0
        if isinstance(output, tuple):  # attention: (output, weights)
            return (output[0] * factor, *output[1:])
        if is_layer:  # which adds its input itself
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
            handles.append(
                module.register_forward_hook(
                    _block_hook(worker in owners[0], factor, name.split(".")[-1].isdigit()), with_kwargs=True
                )
            )
            continue
        last, inputs = last_linear(module, name)
        mask = torch.tensor([float(worker in s) for s in owners]).repeat_interleave(inputs // len(owners))

        def hook(_, inputs, mask=mask * factor):
            return (inputs[0] * mask,)

        handles.append(last.register_forward_pre_hook(hook))
    yield
    for handle in handles:
        handle.remove()


def _branch_of(name):
    """The branch that a layer's input norm serves: the norm is part of it."""
    attention = (
        "attention" if name.startswith("gpt_neox") else "attn" if name.startswith("transformer") else "self_attn"
    )
    for norm, branch in {
        "post_attention_layernorm": "mlp",
        "input_layernorm": attention,
        "ln_2": "mlp",
        "ln_1": attention,
    }.items():
        name = name.replace(norm, f"{branch}.norm")
    return name


def _by_owners(model, unit_owners, name, parameter, num_workers, of):
    """``of(S_u)`` of every element of a parameter, in a shape that broadcasts to it."""
    for block, owners in unit_owners.items():
        if is_block(block, owners) and (f"{_branch_of(name)}.".startswith(f"{block}.")):
            return torch.tensor(float(of(owners[0])))
    parts = name.split(".")
    module, linear, kind = ".".join(parts[:-2]), parts[-2], parts[-1]
    writes = linear in (*WRITES["mlp"], *WRITES["attention"])
    if (
        module not in unit_owners
        or is_block(module, unit_owners[module])
        or not (linear in READS or writes)
        or (writes and kind == "bias")
    ):
        return torch.tensor(float(of(range(num_workers))))
    dim = 0 if kind == "bias" or writes == is_transposed(model.get_submodule(f"{module}.{linear}")) else 1
    counts = torch.tensor([float(of(owners)) for owners in unit_owners[module]])
    # In GPT-2 queries, keys and values of all heads lie one after the other.
    parts = 3 if linear == "c_attn" else 1
    counts = counts.repeat_interleave(parameter.shape[dim] // len(counts) // parts).repeat(parts)
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
                    total[name] += p.grad * _by_owners(
                        model, unit_owners, name, p, num_workers, lambda s, w=worker: w in s
                    )
        for name, p in model.named_parameters():
            replicas = ranks // num_workers
            p.grad = total[name] / (_by_owners(model, unit_owners, name, p, num_workers, len) * replicas)
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in model.parameters()))
        norms.append(norm)
        if clip and norm > clip:
            for p in model.parameters():
                p.grad *= clip / (norm + 1e-6)
        optimizer.step()
    return losses, norms


def train_apart(
    model, unit_owners, num_workers, batches, make_optimizer, interval, outer=None,
    *, clip=0.0, scale=1.0, workers=None, masking="forward", delay=0, with_moments=False,
):  # fmt: skip
    """Local steps. Every worker trains a model of its own, of which it changes what it owns; every ``interval`` steps
    each element becomes its owners' average ``m``, or with ``outer`` (``lr``, ``momentum``, ``nesterov``), by the
    change ``d = x - m`` since they last agreed on ``x``:

        v <- momentum * v + d,   x <- x - lr * (d + momentum * v if nesterov else v)

    ``with_moments``: owners average those too. ``delay``: they go on meanwhile, and so many steps later take over what
    that changes in the weights of then. Returns losses ``[step][rank]``, norms ``[step][worker]``; ``model`` is what
    they agree on.
    """
    own = [copy.deepcopy(model) for _ in range(num_workers)]
    optimizers = [make_optimizer(of_worker) for of_worker in own]
    owned = [
        {
            name: _by_owners(model, unit_owners, name, p, num_workers, lambda s, w=w: w in s).expand(p.shape)
            for name, p in model.named_parameters()
        }
        for w in range(num_workers)
    ]
    momentum = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    losses, norms = [], []
    for number, step in enumerate(batches, 1):
        losses.append([0.0] * len(step))
        norms.append([])
        for worker, mine in enumerate(own):
            ranks = [r for r in range(len(step)) if (workers[r] if workers else r % num_workers) == worker]
            mine.zero_grad()
            for rank in ranks:
                for ids in step[rank]:
                    cut = only_units_of(mine, unit_owners, worker, scale)
                    with cut if masking == "forward" else contextlib.nullcontext():
                        loss = mine(input_ids=ids, labels=ids).loss / len(step[rank])
                        (loss / len(ranks)).backward()
                    losses[-1][rank] += float(loss.detach())
            before = {name: p.detach().clone() for name, p in mine.named_parameters()}
            for name, p in mine.named_parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad * owned[worker][name]
            norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in mine.parameters()))
            norms[-1].append(norm)
            if clip and norm > clip:
                for p in mine.parameters():
                    p.grad *= clip / (norm + 1e-6)
            optimizers[worker].step()
            with torch.no_grad():
                for name, p in mine.named_parameters():
                    p.copy_(torch.where(owned[worker][name] > 0, p, before[name]))
        if number % interval == 0:
            then = copy.deepcopy(own)
            agreed = copy.deepcopy(own)
            _agree(model, agreed, owned, outer, momentum)
            if with_moments:
                _average_moments(own, owned, optimizers)
        if number % interval == delay and number >= interval:
            with torch.no_grad():
                for now, old, new in zip(own, then, agreed, strict=True):
                    for name, p in now.named_parameters():
                        p.add_(new.get_parameter(name) - old.get_parameter(name))
    if delay or number % interval:
        _agree(model, own, owned, None, momentum)
    return losses, norms


@torch.no_grad()
def _average_moments(own, owned, optimizers):
    for name, _ in own[0].named_parameters():
        states = [optimizer.state[of.get_parameter(name)] for of, optimizer in zip(own, optimizers, strict=True)]
        for key in [key for key, value in states[0].items() if value.dim()]:
            total = sum(state[key] * of[name] for state, of in zip(states, owned, strict=True))
            mean = total / sum(of[name] for of in owned)
            for state, of in zip(states, owned, strict=True):
                state[key].copy_(torch.where(of[name] > 0, mean, state[key]))


@torch.no_grad()
def _agree(model, own, owned, outer, momentum):
    for name, agreed in model.named_parameters():
        total = sum(mine.get_parameter(name) * of[name] for mine, of in zip(own, owned, strict=True))
        mean = total / sum(of[name] for of in owned)
        if outer is None:
            agreed.copy_(mean)
        else:
            change, v = agreed - mean, momentum[name]
            v.mul_(outer["momentum"]).add_(change)
            agreed -= outer["lr"] * (change + outer["momentum"] * v if outer["nesterov"] else v)
        for mine in own:
            mine.get_parameter(name).copy_(agreed)
