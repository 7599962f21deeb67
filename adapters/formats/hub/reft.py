"""AdapterHub's representation fine-tuning: LoReFT, NoReFT, DiReFT. Wu et al. (2404.03592).

At the output h of a layer, on the first ``prefix_positions`` and the last ``suffix_positions`` tokens of a prompt:

    h + R^T (act(W h + b) - R h)    LoReFT: the rows of R are orthonormal; NoReFT: they are not
    h + R^T (act(W h + b))          DiReFT: subtract_projection is false

Untied weights have a unit for each end; where the ends overlap, the last tokens' counts. Generated tokens are not
changed, as in the paper. The library agrees with that on a prompt's full forward, and on generated tokens without a
cache where suffix_positions is 0. Its suffix moves along with the generated tokens; with a cache it takes every
generated token for a first one, and fails where there is a suffix.

The library does not save subtract_projection, so that it reads its own DiReFT files as NoReFT. So does this, unless the
field was added to the file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.activations import take_activation
from onebase.adapters.formats.fields import MAX_NAMES, MAX_RANK, Fields, refused
from onebase.adapters.formats.hub.keys import Group, HubFile
from onebase.adapters.formats.register import Compiled
from onebase.adapters.program import SiteOps, Window
from onebase.kernels.ops.reft import Intervention, Part

MAX_POSITIONS = 1 << 20
_HARMLESS = ("dropout", "dtype", "init_weights_seed")
_KIND = "reft_layer.refts"


@dataclass(frozen=True, slots=True)
class ReftSettings:
    """layers: None for all."""

    layers: frozenset[int] | None
    window: Window
    r: int
    orthogonal: bool
    tied: bool
    subtracts: bool
    activation: str


def read_reft(fields: Fields) -> ReftSettings:
    """Raises AdapterRejected naming the field."""
    fields.ignore(_HARMLESS)
    fields.choice("output_reft", (True,), True, "without it the adapter is nowhere")
    return ReftSettings(
        layers=_read_layers(fields),
        window=_read_window(fields),
        r=fields.integer("r", 1, MAX_RANK),
        orthogonal=fields.flag("orthogonality"),
        tied=fields.flag("tied_weights"),
        subtracts=fields.flag("subtract_projection", default=True),
        activation=_read_activation(fields),
    )


def _read_layers(fields: Fields) -> frozenset[int] | None:
    value = fields.take("layers", "all")
    if value == "all":
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_NAMES or not all(type(item) is int for item in value):
        raise refused("layers", value, f"it must be 'all' or a list of 1 to {MAX_NAMES} layer numbers")
    return frozenset(item for item in value if type(item) is int)


def _read_window(fields: Fields) -> Window:
    first = fields.integer("prefix_positions", 0, MAX_POSITIONS)
    last = fields.integer("suffix_positions", 0, MAX_POSITIONS)
    if not first + last:
        raise refused("prefix_positions", first, "with suffix_positions 0 as well the adapter acts nowhere")
    return Window(first, last, shortest=last if first else 0)


def _read_activation(fields: Fields) -> str:
    value = fields.take("non_linearity")
    return "identity" if value is None else take_activation(Fields({"non_linearity": value}), "non_linearity", "")


def compile_reft(file: HubFile, settings: ReftSettings) -> Compiled:
    """Raises AdapterRejected naming the key, or the layer that has no tensors."""
    layers = file.base.layers
    chosen = frozenset(range(len(layers))) if settings.layers is None else settings.layers
    groups = _by_layer(file)
    ops: dict[str, SiteOps] = {}
    for at in sorted(chosen):
        path = layers[at].path if 0 <= at < len(layers) else None
        if path is None:
            raise AdapterRejected(f"The config adapts layer {at}, and the base has no such layer.", param="layers")
        if at not in groups:
            raise AdapterRejected(f"The config adapts layer {at}, and no tensor is there.", param="layers")
        ops[path] = SiteOps(extra=_interventions(file, groups[at], settings, path))
    return Compiled(ops, window=settings.window)


def _by_layer(file: HubFile) -> dict[int, Group]:
    groups: dict[int, Group] = {}
    for module, group in file.groups(_KIND).items():
        key = next(iter(group.values()))
        at = file.layer_of(key, module)
        if at in groups:
            raise AdapterRejected(f"The tensor {key!r} adapts layer {at}, and others do so too.", param=key)
        groups[at] = group
    return groups


def _interventions(file: HubFile, group: Group, settings: ReftSettings, path: str) -> tuple[Intervention, ...]:
    """A unit for an end without positions is saved too: it is checked, and dropped."""
    if settings.tied:
        return (_unit(file, group, settings, "units.0", path),)
    first, last = (_unit(file, group, settings, f"units.{at}", path) for at in (0, 1))
    window = settings.window
    parts: list[tuple[Intervention, Part, int]] = [(first, "first", window.first), (last, "last", window.last)]
    return tuple(replace(unit, part=part) for unit, part, length in parts if length)


def _unit(file: HubFile, group: Group, settings: ReftSettings, prefix: str, path: str) -> Intervention:
    r, width = settings.r, file.base.sites[path].out_features
    source = file.take(group, f"{prefix}.learned_source.weight", (r, width), path)
    bias = file.take(group, f"{prefix}.learned_source.bias", (r,), path)
    projection = _projection(file, group, settings, f"{prefix}.projection", path)
    if settings.subtracts and settings.activation == "identity":
        return Intervention(source - projection, bias, projection)
    return Intervention(source, bias, projection, settings.activation, settings.subtracts)


def _projection(file: HubFile, group: Group, settings: ReftSettings, prefix: str, path: str) -> Tensor:
    """[r, width]"""
    r, width = settings.r, file.base.sites[path].out_features
    if not settings.orthogonal:
        return file.take(group, f"{prefix}.weight", (r, width), path)
    size, at = max(r, width), f"{prefix}.parametrizations.weight"
    original = file.take(group, f"{at}.original", (r, width), path)
    return _orthonormal(original, file.take(group, f"{at}.0.base", (size, size), path))


def _orthonormal(original: Tensor, base: Tensor) -> Tensor:
    """What torch.nn.utils.parametrizations.orthogonal makes of its saved tensors: the base times a product of
    Householder reflections, or the exponential of a skew matrix where the matrix is square."""
    wide = original.shape[0] < original.shape[1]
    x = (original.mT if wide else original).double()  # [longer side, shorter side]
    if x.shape[0] == x.shape[1]:
        lower = x.tril()
        turned = torch.linalg.matrix_exp(lower - lower.mT)
    else:
        below = x.tril(-1)
        turned = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(0))) * x.diagonal().int()
    matrix: Tensor = (base.double() @ turned).float()
    return (matrix.mT if wide else matrix).contiguous()
