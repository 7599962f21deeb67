"""Names of activations in configs -> what kernels/ops/bottleneck.py calls them."""

from __future__ import annotations

from collections.abc import Mapping

from onebase.adapters.formats.fields import Fields, refused
from onebase.kernels.ops.bottleneck import ACTIVATIONS

_ALIASES = {"gelu_pytorch_tanh": "gelu_new", "leaky_relu": "leakyrelu", "linear": "identity", "swish": "silu"}


def take_activation(fields: Fields, name: str, default: str, renamed: Mapping[str, str] = _ALIASES) -> str:
    """A key of ACTIVATIONS. renamed: what else a name may mean. Raises AdapterRejected for others."""
    value = fields.take(name, default)
    known = value.lower() if isinstance(value, str) else ""
    known = renamed.get(known, known)
    known = _ALIASES.get(known, known)
    if known not in ACTIVATIONS:
        raise refused(name, value, f"the activations served are {', '.join(sorted({*ACTIVATIONS, *_ALIASES}))}")
    return known
