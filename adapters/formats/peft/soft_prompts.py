"""PEFT's soft prompts: trained rows before the prompt's embeddings.

PROMPT_TUNING, Lester et al. (2104.08691); P_TUNING, Liu et al. (2103.10385); CPT, Blau et al. (2410.17222);
MULTITASK_PROMPT_TUNING, Wang et al. (2303.02861). The file holds the rows themselves, [num_virtual_tokens, width]: PEFT
runs P-tuning's encoder, and adds CPT's projected deltas, when it saves. Multitask prompts are the shared rows times
``cols[task] rows[task]``; the task is an argument of PEFT's forward, and here the first one.
The rows take the place of what the embedding module gives, after any scale of it; they take positions as tokens do.
"""

from __future__ import annotations

from torch import Tensor

from onebase.adapters.base import BaseModel, Site, SiteKind
from onebase.adapters.errors import AdapterRejected
from onebase.adapters.formats.fields import Fields, refused
from onebase.adapters.formats.files import AdapterFiles, TensorBag
from onebase.adapters.formats.heads import HEAD_NAMES, take_head
from onebase.adapters.formats.keys import check_shape
from onebase.adapters.formats.register import Compiled, register
from onebase.adapters.program import Head, SiteOps
from onebase.kernels.ops.tokens import SoftPrompt

KEY = "prompt_embeddings"
MAX_VIRTUAL_TOKENS = 1 << 17
MAX_TASKS = 1 << 16

_INSTRUCTIONS = ("SoftPrompt",)
_COST = "none at linears; num_virtual_tokens more tokens in the context"
_SHAPES = ("num_attention_heads", "num_layers", "token_dim")  # of the base; the tensors have to fit it anyway
_TEXTS = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")
_ENCODER = (
    "encoder_dropout",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_reparameterization_type",
)
_SOURCE = ("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
_CPT = (
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "opt_weighted_loss_type",
    "tokenizer_name_or_path",
)


def read_prompt_length(fields: Fields) -> int:
    """num_virtual_tokens, and the fields that every prompt-learning family has."""
    fields.ignore(_SHAPES)
    saved = fields.names("modules_to_save")
    if not set(saved) <= set(HEAD_NAMES):
        raise refused("modules_to_save", list(saved), "full copies of modules beside a prompt are not served")
    fields.choice(
        "num_transformer_submodules", (1, None), None, "it must be 1 or null: an encoder-decoder has two prompts"
    )
    return fields.integer("num_virtual_tokens", 1, MAX_VIRTUAL_TOKENS)


def require_key(tensors: TensorBag, key: str) -> None:
    """Raises AdapterRejected where the folder has no such tensor."""
    if key not in list(tensors):
        raise AdapterRejected(f"The adapter has no tensor {key!r}, which holds its prompt.", param=key)


@register(
    "PROMPT_TUNING",
    title="Prompt tuning",
    paper="2104.08691",
    covers=("Prompt-tuning", "SPoT"),
    instructions=_INSTRUCTIONS,
    cost=_COST,
)
def compile_prompt_tuning(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(_TEXTS)
    return _compile(files, base)


@register(
    "P_TUNING",
    title="P-tuning",
    paper="2103.10385",
    covers=("P-tuning",),
    instructions=_INSTRUCTIONS,
    cost=_COST,
    note="PEFT saves what the prompt encoder gave, so the encoder itself is not needed",
)
def compile_p_tuning(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(_ENCODER)
    return _compile(files, base)


@register("CPT", title="Context-aware prompt tuning", paper="2410.17222", instructions=_INSTRUCTIONS, cost=_COST)
def compile_cpt(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    files.fields.ignore(_CPT)
    tokens = files.fields.take("cpt_token_ids")
    compiled = _compile(files, base)
    if isinstance(tokens, list) and len(tokens) != compiled.num_virtual_tokens:
        reason = f"PEFT makes a virtual token of each, and num_virtual_tokens is {compiled.num_virtual_tokens}"
        raise refused("cpt_token_ids", tokens, reason)
    return compiled


@register(
    "MULTITASK_PROMPT_TUNING",
    title="Multitask prompt tuning",
    paper="2303.02861",
    covers=("MPT",),
    instructions=_INSTRUCTIONS,
    cost=_COST,
    note="task 0 is served; an adapter of several tasks answers as its first",
)
def compile_multitask(files: AdapterFiles, base: BaseModel) -> Compiled:
    """Raises AdapterRejected naming the key or field."""
    fields, tensors = files.fields, files.tensors
    fields.ignore((*_TEXTS, *_SOURCE))
    num_tasks = fields.integer("num_tasks", 1, MAX_TASKS, default=1)
    length, site = read_prompt_length(fields), prompt_site(base)
    rank = fields.integer("num_ranks", 1, site.out_features, default=1)
    shared = _take(tensors, KEY, (length, site.out_features), "num_virtual_tokens, the embedding's width")
    shape = f"num_tasks {num_tasks}, num_virtual_tokens {length}, num_ranks {rank}, the embedding's width"
    cols = _take(tensors, "prefix_task_cols", (num_tasks, length, rank), shape)
    rows = _take(tensors, "prefix_task_rows", (num_tasks, rank, site.out_features), shape)
    return _compiled(site, shared * (cols[0] @ rows[0]), take_head(files, base))


def prompt_site(base: BaseModel) -> Site:
    """The embedding that reads the token ids: the first one over the vocabulary. Raises AdapterRejected without one."""
    vocabulary = base.config.get("vocab_size")
    for site in base.sites.values():
        if site.kind is SiteKind.EMBEDDING and site.in_features == vocabulary:
            return site
    message = "The base has no embedding over its vocabulary that a prompt could stand before."
    raise AdapterRejected(message, param="peft_type")


def _compile(files: AdapterFiles, base: BaseModel) -> Compiled:
    length, site = read_prompt_length(files.fields), prompt_site(base)
    rows = _take(files.tensors, KEY, (length, site.out_features), "num_virtual_tokens, the embedding's width")
    return _compiled(site, rows, take_head(files, base))


def _take(tensors: TensorBag, key: str, shape: tuple[int, ...], meaning: str) -> Tensor:
    require_key(tensors, key)
    check_shape(key, tensors, shape, meaning)
    return tensors.take(key).float()


def _compiled(site: Site, rows: Tensor, head: Head | None) -> Compiled:
    return Compiled({site.path: SiteOps(extra=(SoftPrompt(rows),))}, len(rows), first_position=len(rows), head=head)
