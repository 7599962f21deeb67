"""What a request must be before it may queue."""

from __future__ import annotations

from onebase.adapters.errors import RequestRejected
from onebase.serve.engine.classes import NO_HEAD
from onebase.serve.engine.combine import without_idle
from onebase.serve.engine.messages import Request


def check_request(request: Request, max_model_len: int, vocab_size: int) -> None:
    """Raises RequestRejected for one that can never run, whatever its adapters are."""
    _check_lengths(request, max_model_len)
    if (request.classifies or request.embeds) and request.sampling.max_tokens:
        verb = "classifies" if request.classifies else "embeds"
        raise RequestRejected(f"a request that {verb} generates nothing: max_tokens must be 0")
    if request.classifies and not without_idle(request).adapters:
        raise RequestRejected(NO_HEAD, param="model")
    if min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
        raise RequestRejected(f"prompt: token ids must be from 0 to {vocab_size - 1}", param="prompt")


def _check_lengths(request: Request, max_model_len: int) -> None:
    if not request.prompt:
        raise RequestRejected("the prompt has no tokens", param="prompt")
    if max_model_len - len(request.prompt) < min(request.sampling.max_tokens, 1):
        message = f"the prompt has {len(request.prompt)} tokens, the model's context {max_model_len}"
        raise RequestRejected(message, param="prompt")
