"""Loads the frozen base with transformers' own modelling code and makes it ready for packed, paged forwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from onebase.adapters.base import Experts, Layer, Site, SiteKind
from onebase.adapters.errors import ModelRejected
from onebase.kernels.attention import select_attention
from onebase.serve.engine.config import EngineConfig
from onebase.serve.model.attention import ATTENTION_NAME, AttentionContext
from onebase.serve.model.dtypes import pick_dtype
from onebase.serve.model.experts import ProbedExperts
from onebase.serve.model.fused import fuse, input_groups
from onebase.serve.model.packed import PackedLinear, pack_linears
from onebase.serve.model.probe import PROBE_TOKENS, ProbeResult, probe, prove
from onebase.serve.model.quantised import dense_weight, is_quantised, plain_parts
from onebase.serve.model.sites import ProbedBlock, ProbedNorm, ProbedSite

_FP8_CUDA = (8, 9)  # the first compute capability that converts e4m3
# Rotary tables that change with the longest sequence of a batch: exact only while no sequence passes this length.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(slots=True, eq=False)
class LoadedModel:
    """The frozen base: weights, adaptable sites, attention context. Implements adapters.base.BaseModel."""

    model: PreTrainedModel
    context: AttentionContext
    probed: list[ProbedSite]
    norms: list[ProbedNorm]
    blocks: list[ProbedBlock]
    layers: Sequence[Layer]
    sites: Mapping[str, Site]
    refused: Mapping[str, str]
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    packed: Mapping[nn.Module, PackedLinear]
    ties: Mapping[str, tuple[str, ...]]

    @property
    def config(self) -> Mapping[str, Any]:
        """See BaseModel."""
        config: dict[str, Any] = self.model.config.get_text_config().to_dict()
        return config

    @property
    def experts(self) -> Mapping[str, Experts]:
        """See BaseModel."""
        return {entry.site.path: entry.experts for entry in self.blocks if isinstance(entry, ProbedExperts)}

    def tied(self, path: str) -> tuple[str, ...]:
        """See BaseModel."""
        return self.ties.get(path, ())

    def bias(self, path: str) -> Tensor | None:
        """See BaseModel."""
        bias = getattr(self.model.get_submodule(path), "bias", None)
        return bias.detach() if isinstance(bias, Tensor) and self.sites[path].kind in _BIASED else None

    def weight(self, path: str) -> Tensor:
        """See BaseModel."""
        module = self.model.get_submodule(path)
        if module in self.packed:
            return self.packed[module].dense()
        if is_quantised(module):
            return dense_weight(module, self.dtype)
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(module, Conv1D) else weight


_BIASED = (SiteKind.LINEAR, SiteKind.NORM)


def pick_device(name: str) -> torch.device:
    """auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelRejected(
            "device: cuda was asked for, but torch sees no CUDA device; allowed here: cpu", param="device"
        )
    return torch.device(name)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load, check and probe. Raises ModelRejected with the reason when the base cannot be served exactly."""
    device = pick_device(config.device)
    hub: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(config.model, **hub)
    except (OSError, ValueError) as error:
        raise ModelRejected(f"model {config.model!r} cannot be read: {error}", param="model") from error
    if model_config.is_encoder_decoder:
        raise ModelRejected(f"{model_config.model_type} is an encoder-decoder; only causal decoders are served")
    dtype = pick_dtype(config.dtype, model_config, device)
    quantised = getattr(model_config.get_text_config(), "quantization_config", None) or getattr(
        model_config, "quantization_config", None
    )
    if quantised is None:
        return prepare(_from_pretrained(config.model, dtype, hub).to(device).eval().requires_grad_(False), config)
    return prepare(_quantised(config.model, dtype, device, hub, dict(quantised)), config)


def prepare(model: PreTrainedModel, config: EngineConfig) -> LoadedModel:
    """Make a loaded model ready: attach the attention context, probe it, find its limits."""
    identity = fingerprint(model)
    model.set_attn_implementation(ATTENTION_NAME)
    text = model.config.get_text_config()
    body = select_attention(model.device, "blocks") if config.deterministic else select_attention(model.device)
    fp8 = pick_fp8(config.kv_dtype, model.device)
    context = AttentionContext(body, config.page_size, num_pages=-(-PROBE_TOKENS // config.page_size), fp8=fp8)
    context.attach(model)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    result: ProbeResult = probe(model, context)
    ties = _ties(result.sites)  # before fuse: weights of a joint product are views of memory of its own
    if not config.deterministic:
        fuse(model, context, result)
    prove(model, context, result)
    entries: list[ProbedSite | ProbedNorm | ProbedBlock] = [*result.sites, *result.norms, *result.blocks]
    return LoadedModel(
        model=model,
        context=context,
        probed=result.sites,
        norms=result.norms,
        blocks=result.blocks,
        layers=result.layers,
        ties=ties,
        sites=_in_module_order(model, [entry.site for entry in entries]),
        refused=result.refused,
        fingerprint=identity,
        device=model.device,
        dtype=model.dtype,
        vocab_size=vocab_size,
        max_model_len=pick_max_model_len(text, config.max_model_len, context.windows),
        eos_token_ids=_eos_ids(model.generation_config, text),
        packed=pack_linears(input_groups(result.sites)),  # last: the plain weights are gone after it
    )


def _in_module_order(model: nn.Module, sites: Sequence[Site]) -> dict[str, Site]:
    """By path. Some formats number their targets in the order in which the model lists its modules."""
    by_path = {site.path: site for site in sites}
    return {path: by_path[path] for path, _ in model.named_modules() if path in by_path}


def _ties(probed: Sequence[ProbedSite]) -> dict[str, tuple[str, ...]]:
    """Site path -> the other sites whose weight is the same memory."""
    holders: dict[int, list[str]] = {}
    for entry in probed:
        if is_quantised(entry.module):
            continue
        assert isinstance(entry.module.weight, Tensor)
        holders.setdefault(entry.module.weight.data_ptr(), []).append(entry.site.path)
    return {
        path: tuple(p for p in paths if p != path) for paths in holders.values() for path in paths if len(paths) > 1
    }


def pick_fp8(kv_dtype: str, device: torch.device) -> bool:
    """Whether the pages hold fp8. Raises ModelRejected where the device cannot convert it."""
    if kv_dtype == "fp8_e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CUDA:
        raise ModelRejected(
            f"kv_dtype: fp8_e4m3 needs a GPU of compute capability 8.9 or later; this is "
            f"{torch.cuda.get_device_name(device)}; allowed here: auto",
            param="kv_dtype",
        )
    return kv_dtype == "fp8_e4m3"


def _from_pretrained(path: str, dtype: torch.dtype, hub: dict[str, Any]) -> PreTrainedModel:
    disable_progress_bar()  # a bar among a server's log lines helps nobody
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME, **hub)
    except KeyError as error:
        message = f"model {path!r} has an attention table of its own without {error}: it cannot be paged"
        raise ModelRejected(message, param="model") from error
    except (OSError, ValueError) as error:
        raise ModelRejected(f"model {path!r} cannot be loaded: {error}", param="model") from error
    assert isinstance(model, PreTrainedModel)
    return model


def _quantised(
    path: str, dtype: torch.dtype, device: torch.device, hub: dict[str, Any], quantised: dict[str, Any]
) -> PreTrainedModel:
    """A checkpoint in few bits, by the library that it names. It is placed while it is loaded: most of these weights
    cannot be moved later. Integer weights need no requires_grad_."""
    try:
        return _from_pretrained(path, dtype, hub | {"device_map": {"": device}}).eval()
    except (ImportError, RuntimeError) as error:
        method = quantised.get("quant_method", "in an unknown way")
        message = f"model {path!r} is quantised ({method}), and cannot be loaded on {device.type}: {error}"
        raise ModelRejected(message, param="model") from error


def pick_max_model_len(config: PreTrainedConfig, asked: int | None, windows: Collection[int | None] = (None,)) -> int:
    """The longest sequence that is served exactly: what was asked for, within the limits of the architecture.

    windows: the sliding windows that the layers passed to attention. One that they keep to the mask is not seen by
    paged attention, which is exact only up to its length.
    """
    limits = [(int(config.max_position_embeddings), "max_position_embeddings")]
    for rope in _rope_parameters(config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE and original:
            limits.append((int(original), f"beyond it the {rope['rope_type']} rope depends on the other sequences"))
    for name in ("sliding_window", "attention_chunk_size"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0 and length not in windows:
            limits.append((length, f"{name}, which the layers do not pass to attention"))
    limit, reason = min(limits)
    if asked is not None and asked > limit:
        raise ModelRejected(f"max_model_len: {asked} is over the model's {limit} ({reason})", param="max_model_len")
    return limit if asked is None else asked


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_type" in rope:
        return [rope | {"original_max_position_embeddings": _original_length(config, rope)}]
    return [value for value in rope.values() if isinstance(value, dict)]


def _original_length(config: PreTrainedConfig, rope: dict[str, Any]) -> int | None:
    value = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return None if value is None else int(value)


def _eos_ids(generation: GenerationConfig | None, config: PreTrainedConfig) -> tuple[int, ...]:
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over the config and, of every weight, a sum of all its bits and a strided sample: cheap, and different for
    different bases. To be taken before the first forward: some libraries repack their weights in it."""
    state = model.config.to_diff_dict()  # not to_dict: new releases add fields, with defaults
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        state.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode())
    for name, weight in _weights(model):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        for part in plain_parts(weight.detach()):
            flat = part.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)].bfloat16().float().cpu()  # the same under every --dtype
            digest.update(sample.numpy().tobytes() + str(_sum(flat)).encode())
    return digest.hexdigest()


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what quantised modules keep in buffers instead."""
    yield from model.named_parameters()
    for path, module in model.named_modules():
        if is_quantised(module):
            yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False))


def _sum(flat: Tensor) -> int:
    """Of all bits, in words of eight bytes: in whole numbers the order does not matter. Floating point is rounded to
    bfloat16, in which every --dtype agrees."""
    total = 0
    for start in range(0, flat.numel(), _SUMMED_AT_ONCE):
        part = flat[start : start + _SUMMED_AT_ONCE]
        raw = (part.bfloat16() if part.is_floating_point() else part).view(torch.uint8)
        raw = raw.clone() if raw.storage_offset() % 8 else raw  # words are read at their own borders
        words = raw.numel() // 8 * 8
        total += int(raw[:words].view(torch.int64).sum()) + int(raw[words:].sum())
    return total


_SUMMED_AT_ONCE = 1 << 24
