"""What a request asks of its draws, told by its parameters alone."""

from __future__ import annotations

from onebase.serve.engine.messages import SamplingParams


def draws_the_largest(sampling: SamplingParams) -> bool:
    """Whether each of its tokens is that of the model's largest logit, and nothing more is to be told of it."""
    return sampling.temperature <= 0.0 and sampling.logprobs is None and not changes_logits(sampling)


def changes_logits(sampling: SamplingParams) -> bool:
    """Whether it is drawn from other logits than the model's; see adjust.py."""
    others = sampling.logit_bias or sampling.min_tokens or sampling.grammar
    return bool(others) or wants_penalties(sampling)


def wants_penalties(sampling: SamplingParams) -> bool:
    return bool(sampling.presence_penalty or sampling.frequency_penalty) or sampling.repetition_penalty != 1.0
