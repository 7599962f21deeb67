"""From a body's fields to what the engine is told of drawing, of ends, and of who goes first."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from onebase.serve.api.errors import bad_request
from onebase.serve.api.generation_schemas import Generation
from onebase.serve.api.state import Loaded, Server
from onebase.serve.api.structured import grammar_of
from onebase.serve.engine.messages import Grammar, SamplingParams
from onebase.serve.tenants import Tenant

SEED_RANGE = 1 << 63


async def checked_grammar(server: Server, body: Generation, tenant: Tenant) -> Grammar | None:
    """What the answer has to match, tried off the event loop; None for free text. Raises ApiError 400."""
    asked = grammar_of(body.response_format, body.structured_outputs)
    return None if asked is None else await server.grammars.checked(*asked, tenant.name)


def sampling_params(
    body: Generation, limit: int, seed: int, vocab_size: int, grammar: Grammar | None
) -> SamplingParams:
    """limit: how many tokens may follow. Raises ApiError 400."""
    if (body.min_tokens or 0) > limit:
        raise bad_request(f"min_tokens is {body.min_tokens}, and at most {limit} tokens can follow.", "min_tokens")
    ranked = body.num_logprobs
    return SamplingParams(
        max_tokens=limit,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=0 if ranked is None and body.candidates > body.choices else ranked,
        prompt_logprobs=body.num_prompt_logprobs,
        logit_bias=_biases(body.logit_bias or {}, vocab_size),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        min_tokens=body.min_tokens or 0,
        grammar=grammar,
    )


def _biases(asked: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = tuple((int(token), bias) for token, bias in asked.items())
    worst = max((token for token, _ in biases), default=0)
    if worst >= vocab_size:
        raise bad_request(
            f"logit_bias: token id {worst} is not in the vocabulary: ids are 0 to {vocab_size - 1}.",
            f"logit_bias.{worst}",
        )
    return biases


def seed_of(asked: int | None, choice: int) -> int:
    """Of one sequence: random unless asked for, since equal prompts of one request must not draw the same."""
    return secrets.randbelow(SEED_RANGE) if asked is None else (asked + choice) % SEED_RANGE


def truncated(prompt: Sequence[int], body: Generation, loaded: Loaded, default: int | None) -> Sequence[int]:
    """The end of a prompt, where the body asks to cut long ones. ``default``: see generation.plan."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return prompt
    if keep < 0:
        asked = body.token_limit
        keep = loaded.info.max_model_len - ((default or 1) if asked is None else asked)
    return prompt[-keep:] if 0 < keep < len(prompt) else prompt
