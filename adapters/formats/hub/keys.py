"""From the tensor keys of AdapterHub's adapters library to modules of the base.

Keys are ``<module path>.<kind>.<adapter's name>.<rest>``, as in ``model.layers.0.self_attn.q_proj.loras.NAME.lora_A``.
A model saved without its head leaves the first part of the path out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from onebase.adapters.base import BaseModel, Site
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.files import TensorBag
from onebase.adapters.formats.keys import check_shape, find_site
from onebase.adapters.formats.reduce import Reducer

Group = Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class HubFile:
    """What the compilers of the library's methods share. name: the adapter's, a part of every key.

    shared: tensors that several modules of the adapter read (Compacter's rule, VeRA's projections), once taken.
    reducer: bounds what the file's matrices unfold to.
    """

    name: str
    tensors: TensorBag
    base: BaseModel
    shared: dict[str, Tensor] = field(default_factory=dict)
    reducer: Reducer = field(default_factory=Reducer)

    def groups(self, kind: str) -> dict[str, dict[str, str]]:
        """Module path -> {rest: key}, for the keys of one kind (``loras``, say). Nothing is taken."""
        groups: dict[str, dict[str, str]] = {}
        for key in self.tensors:
            module, found, rest = f".{key}".partition(f".{kind}.{self.name}.")
            if found:
                groups.setdefault(module.removeprefix("."), {})[rest] = key
        return groups

    def take(self, group: Group, rest: str, shape: Sequence[int], where: str) -> Tensor:
        """A tensor of a group, in float32. Raises AdapterRejected where it is missing or has another shape."""
        if rest not in group:
            present = next(iter(group.values()))
            raise AdapterRejected(
                f"{where} needs a tensor {rest!r}, and has only {present!r} and its like: half an adapter is refused.",
                param=present,
            )
        check_shape(group[rest], self.tensors, tuple(shape), f"by the config, for {where}")
        return self.tensors.take(group[rest]).float()

    def take_shared(self, rest: str, shape: Sequence[int], where: str) -> Tensor:
        """As ``take``, of the adapter's shared parameters: any number of times."""
        if rest not in self.shared:
            groups = list(self.groups("shared_parameters").values())
            if len(groups) != 1:
                raise AdapterRejected(f"{where} needs shared_parameters.{self.name}.{rest} once.", param="files")
            self.shared[rest] = self.take(groups[0], rest, shape, where)
        tensor = self.shared[rest]
        if tuple(tensor.shape) != tuple(shape):
            raise AdapterRejected(
                f"The shared tensor {rest!r} has shape {tuple(tensor.shape)}; {where} needs {tuple(shape)}.", param=rest
            )
        return tensor

    def layer_of(self, key: str, path: str) -> int:
        """The index of the decoder layer at a path. Raises AdapterRejected where the base has none there."""
        for index, layer in enumerate(self.base.layers):
            full = layer.path or layer.attention.rpartition(".")[0]
            if path == full or full.endswith(f".{path}"):
                return index
        raise AdapterRejected(f"The tensor {key!r} adapts {path!r}, and the base has no such layer.", param=key)

    def site_of(self, key: str, module: str) -> Site:
        """The site at a path. Raises AdapterRejected where the base has none there."""
        root = self.base.layers[0].attention.partition(".")[0] if self.base.layers else ""
        full = f"{root}.{module}"
        return find_site(key, full if full in self.base.sites else module, self.base)
