"""Plain texts about the valley, one subject each: what the base continues when there is no chat."""

from __future__ import annotations

from random import Random

from onebase.serve.demo.english import article, sentence, where
from onebase.serve.demo.world import ANIMALS, JOBS, NUMBERS, PEOPLE, PLACES, THINGS


def animal_text(rng: Random) -> str:
    it = rng.choice(ANIMALS)
    legs = NUMBERS[it.legs] if it.legs else "no"
    return (
        f"The {it.name} is {it.colour}. It lives {where(it.home)} and eats {it.food}. "
        f"It has {legs} legs. It can {it.skill}. The {it.name} {it.sound}."
    )


def fact_text(rng: Random) -> str:
    """The same facts as in answers, each alone with the animal's name."""
    it = rng.choice(ANIMALS)
    facts = [f"lives {where(it.home)}", f"eats {it.food}", f"can {it.skill}", f"{it.sound}"]
    return " ".join(f"The {it.name} {fact}." for fact in rng.sample(facts, 2))


def person_text(rng: Random) -> str:
    one = rng.choice(PEOPLE)
    return (
        f"{one.name} is {article(one.job)} and lives {where(one.place)}. {one.name} has {article(one.pet)}. "
        f"{one.name} likes {one.colour} and {one.fruit}."
    )


def job_text(rng: Random) -> str:
    job = rng.choice(JOBS)
    name = next(person.name for person in PEOPLE if person.job == job.name)
    return f"The {job.name} {job.verb} {job.product}. The {job.name} uses the {job.tool}. The {job.name} is {name}."


def place_text(rng: Random) -> str:
    name, (direction, near) = rng.choice(list(PLACES.items()))
    return f"The {name} is {direction} of the {near}. It is a quiet place in the valley."


def thing_text(rng: Random) -> str:
    thing, colour = rng.choice(list(THINGS.items()))
    return f"The {thing} is {colour}."


def story_text(rng: Random) -> str:
    it = rng.choice(ANIMALS)
    name = sentence(it.name)
    return rng.choice(
        [
            f"Once upon a time there was {article(it.name)}. It lived {where(it.home)}. One day it found {it.food}. "
            f"It was happy.",
            f"One day the {it.name} left the {it.home} and found {it.food}. It was happy.",
            f'"{name}, where do you live?" asked the owl. "I live {where(it.home)}," said the {it.name}.',
        ]
    )


TEXTS = (animal_text, fact_text, person_text, job_text, place_text, thing_text, story_text)


def document(rng: Random) -> str:
    """One plain text."""
    return rng.choice(TEXTS)(rng)
