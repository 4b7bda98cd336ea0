"""How loud the parts of a model are, put together.

Under forward masking a subnetwork makes up for the units that it lacks (``output_scaling``), and the full model has
them all. What it adds to the residual stream is then too much: after training the units of a subnetwork pull together,
so that the full model wants about the mean of what its subnetworks add, ``coverage`` times the factor of a subnetwork.
One number says it, the *full scale*: what the full model's writes (``o_proj``, ``down_proj``) are multiplied by.
"""

import math
from collections.abc import Callable

# Of neighbours in the search, a quarter of an octave: between them a parabola is as good as the loss.
_STEP = 2.0**0.25
_LEAST, _MOST = 2.0**-6, 2.0**6


def best_scale(loss: Callable[[float], float], start: float) -> float:
    """The full scale with the least loss, from three neighbours on a logarithmic scale around it.

    Args:
        loss: of the full model at a scale; called four or five times if ``start`` is near.
        start: where the search begins; what is returned if the loss is not a number there.
    """
    known: dict[float, float] = {}

    def at(steps: int) -> float:
        scale = start * _STEP**steps
        if not _LEAST <= scale <= _MOST:
            return math.inf
        if steps not in known:
            found = loss(scale)
            known[steps] = found if math.isfinite(found) else math.inf
        return known[steps]

    if at(0) == math.inf:
        return start
    middle, way = 0, 1 if at(1) < at(-1) else -1
    while at(middle + way) < at(middle):
        middle += way
    below, here, above = at(middle - 1), at(middle), at(middle + 1)
    bend = below - 2 * here + above
    vertex = (below - above) / (2 * bend) if 0 < bend < math.inf else 0.0
    return float(start * _STEP ** (middle + vertex))
