"""Which adapters may be on one request, and with which scales: refusals in the names that the request used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onebase.adapters.errors import RequestRejected
from onebase.adapters.traits import Traits, why_not
from onebase.serve.engine.messages import AdapterUse, Request


def without_idle(request: Request) -> Request:
    """The request without adapters whose scale is 0: they are the base, so nobody loads or holds them."""
    active = tuple(use for use in request.adapters if use.scale != 0)
    return request if len(active) == len(request.adapters) else replace(request, adapters=active)


def check_combination(uses: Sequence[AdapterUse], traits: Sequence[Traits]) -> None:
    """Raises RequestRejected for a scale that an adapter cannot have, or two adapters that cannot act on one row."""
    refusal = why_not([(one, use.scale) for one, use in zip(traits, uses, strict=True)])
    if refusal is None:
        return
    places, reason = refusal
    names = [_name(uses[place]) for place in places]
    if len(names) == 1:
        message = f"adapter {names[0]} cannot have the scale {uses[places[0]].scale:g}: {reason}"
    else:
        message = f"adapters {' and '.join(names)} cannot be on one request: {reason}"
    raise RequestRejected(message, param="adapters")


def check_windows(prompt: Sequence[int], uses: Sequence[AdapterUse], traits: Sequence[Traits]) -> None:
    """Raises RequestRejected where the prompt is too short for an adapter that acts on its first and last tokens."""
    for use, one in zip(uses, traits, strict=True):
        if use.scale != 0 and one.window is not None and len(prompt) < one.window.shortest:
            raise RequestRejected(
                f"the prompt has {len(prompt)} tokens, and adapter {_name(use)} acts on its last {one.window.last}: on "
                "a shorter one the library that trains such adapters mixes its tokens up",
                param="prompt",
            )


def _name(use: AdapterUse) -> str:
    return repr(use.name or use.digest)
