"""PEFT's PEANUT. Zhong et al., "PEANuT" (2410.01870).

The update is what a small network makes of the base's weight, column by column: ``delta W^T = s N(W^T) B^T``, where N
goes to r features by A, through ``depth`` encoders and as many decoders with the encoders' inputs added back. No x
passes through a non-linearity: it is linear in x and of rank r at any depth, so N(W^T) is computed once at load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from onebase.adapters.base import BaseModel
from onebase.adapters.formats.derived import base_weight
from onebase.adapters.formats.fields import MAX_RANK, Fields
from onebase.adapters.formats.files import AdapterFiles
from onebase.adapters.formats.reduce import Reducer
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.formats.saved import with_saved
from onebase.adapters.formats.targets import ignore_training, sites_with
from onebase.adapters.program import SiteOps

A, B = "peanut_A.weight", "peanut_B.weight"
MAX_DEPTH = 32
_tanh_gelu = partial(functional.gelu, approximate="tanh")
# transformers' names of activations without parameters.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_10": lambda z: functional.gelu(z).clamp(-10, 10),
    "gelu_accurate": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "gelu_python": functional.gelu,
    "gelu_python_tanh": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "hardswish": functional.hardswish,
    "laplace": lambda z: 0.5 * (1 + torch.erf((z - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": functional.leaky_relu,
    "linear": lambda z: z,
    "mish": functional.mish,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": functional.relu,
    "relu2": lambda z: functional.relu(z).square(),
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "sqrtsoftplus": lambda z: functional.softplus(z).sqrt(),
    "swish": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, slots=True)
class _Settings:
    r: int
    depth: int
    scaling: float
    activation: Callable[[Tensor], Tensor]


@register(
    "PEANUT",
    title="PEANuT",
    paper="2410.01870",
    instructions=("LowRank",),
    cost="4hr FLOPs, 2hr elements at any depth",
    note="its network runs over the base's weight once, at load; act_fn 'prelu', 'xielu' (unsaved weights) are refused",
)
def compile_peanut(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    settings = _read(files.fields)
    encoders = [f"peanut_encoders.{i}.weight" for i in range(settings.depth)]
    decoders = [f"peanut_decoders.{i}.weight" for i in range(settings.depth)]
    reducer, r = Reducer(), settings.r
    ops: dict[str, SiteOps] = {}
    for tensors in sites_with(files, base, (A, B, *encoders, *decoders)):
        site = tensors.site
        a = tensors.take(A, (r, site.out_features), "r and out_features")
        b = tensors.take(B, (site.out_features, r), "out_features and r")
        down, up = ([tensors.take(name, (r, r), "r") for name in names] for names in (encoders, decoders))
        features = _network(base_weight(base, site).T @ a.T, down, up, settings.activation)
        ops[site.path] = reducer.product(site, features.T, b.T, settings.scaling)
    return with_saved(ops, files, base)


def _read(fields: Fields) -> _Settings:
    ignore_training(fields)
    name = fields.choice("act_fn", tuple(_ACTIVATIONS), "relu", f"served are {', '.join(_ACTIVATIONS)}")
    return _Settings(
        r=fields.integer("r", 1, MAX_RANK),
        depth=fields.integer("depth", 0, MAX_DEPTH, default=0),
        scaling=fields.number("scaling", default=1.0),
        activation=_ACTIVATIONS[str(name)],
    )


def _network(z: Tensor, down: list[Tensor], up: list[Tensor], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """z: [in_features, r], W^T A^T -> what B reads, of the same shape."""
    z = activation(z)
    inputs: list[Tensor] = []
    for weight in down:
        inputs.append(z)
        z = activation(z @ weight.T)
    for weight in up:
        z = activation(z @ weight.T) + inputs.pop()
    return z
