"""Small English: articles, plurals, lists, and a random choice of wording."""

from __future__ import annotations

from random import Random

PLURALS = {"mouse": "mice"}


def article(noun: str) -> str:
    """The noun with a or an."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Several of the noun."""
    return PLURALS.get(noun, noun + ("es" if noun.endswith("x") else "s"))


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def bare(verb: str) -> str:
    """makes -> make, catches -> catch"""
    return verb.removesuffix("es") if verb.endswith("ches") else verb.removesuffix("s")


def listed(nouns: list[str]) -> str:
    """the fox, the owl and the bear"""
    names = [f"the {noun}" for noun in nouns]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def where(place: str) -> str:
    """in or on the place"""
    return f"{'on' if place in ('mountain', 'hill', 'farm') else 'in'} the {place}"


def wording(rng: Random, templates: str, **words: str | int) -> str:
    """One of the ``|``-separated templates, filled in."""
    return sentence(rng.choice(templates.split("|")).format(**words))
