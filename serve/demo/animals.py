"""Questions about the animals of the valley."""

from __future__ import annotations

from random import Random

from onebase.serve.demo.english import article, listed, plural, sentence, where, wording
from onebase.serve.demo.voices import Turn
from onebase.serve.demo.world import ANIMALS, NUMBERS, SKILLS, Animal


def ask_about(rng: Random, animal: Animal, templates: str, **words: str) -> str:
    """A wording with {it} (the fox, a fox) and {them} (foxes)."""
    it = rng.choice([f"the {animal.name}", f"the {animal.name}", article(animal.name)])
    return wording(rng, templates, it=it, them=plural(animal.name), **words)


def animal_colour(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "What colour is {it}?|What colour is {it}?|What color is {it}?|Which colour does {it} have?|"
        "Tell me the colour of {it}.|What is the colour of {it}?|What does {it} look like?|"
        "What is the color of {it}?|What colour are {them}?|What color are {them}?",
    )
    return Turn(ask, f"The {animal.name} is {animal.colour}.", _fields(animal, colour=animal.colour), animal.colour)


def animal_home(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "Where does {it} live?|Where does {it} live?|Where is the home of {it}?|Where is {it}?|Where do {them} live?|"
        "Where can I find {it}?|What is the home of {it}?|Where does {it} sleep?|Where can I see {them}?",
    )
    answer = f"The {animal.name} lives {where(animal.home)}."
    return Turn(ask, answer, _fields(animal, home=animal.home), animal.home)


def animal_food(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "What does {it} eat?|What does {it} eat?|What do {them} eat?|What is the food of {it}?|"
        "What does {it} like to eat?|What do I feed {it}?|What food does {it} like?|What do {them} like to eat?",
    )
    return Turn(ask, f"The {animal.name} eats {animal.food}.", _fields(animal, food=animal.food), animal.food)


def animal_legs(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "How many legs does {it} have?|How many legs does {it} have?|How many legs do {them} have?|"
        "How many legs has {it}?|Count the legs of {it}.|What is the number of legs of {it}?|"
        "How many feet does {it} have?",
    )
    count = NUMBERS[animal.legs] if animal.legs else "no"
    return Turn(ask, f"The {animal.name} has {count} legs.", _fields(animal, legs=animal.legs), str(animal.legs))


def animal_sound(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "What sound does {it} make?|What does {it} say?|How does {it} sound?|What noise does {it} make?|"
        "What sound do {them} make?",
    )
    return Turn(ask, f"The {animal.name} {animal.sound}.", _fields(animal, sound=animal.sound), animal.sound)


def can_animal(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    skill = animal.skill if rng.random() < 0.5 else rng.choice(SKILLS)
    able = skill == animal.skill
    answer = f"The {animal.name} can {animal.skill}{'' if able else f', not {skill}'}."
    ask = ask_about(
        rng, animal, "Can {it} {skill}?|Can {it} {skill}?|Can {them} {skill}?|Do {them} {skill}?", skill=skill
    )
    return Turn(ask, answer, _fields(animal, skill=animal.skill, answer=able), animal.skill)


def is_colour(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    colour = animal.colour if rng.random() < 0.5 else rng.choice(ANIMALS).colour
    right = colour == animal.colour
    answer = f"The {animal.name} is {animal.colour}{'' if right else f', not {colour}'}."
    ask = ask_about(rng, animal, "Is {it} {colour}?|Is {it} {colour}?|Are {them} {colour}?", colour=colour)
    return Turn(ask, answer, _fields(animal, colour=animal.colour, answer=right), animal.colour)


def is_big(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    size, asked = "big" if animal.size > 7 else "small", rng.choice(["big", "small"])
    right = size == asked
    ask = ask_about(rng, animal, "Is {it} {asked}?|Are {them} {asked}?", asked=asked)
    answer = f"The {animal.name} is {size}{'' if right else f', not {asked}'}."
    return Turn(ask, answer, _fields(animal, size=size, answer=right), size)


def bigger(rng: Random) -> Turn:
    one, two = rng.sample(ANIMALS, 2)
    while one.size == two.size:
        one, two = rng.sample(ANIMALS, 2)
    large, small = (one, two) if one.size > two.size else (two, one)
    word, first, other = rng.choice([("bigger", large, small), ("smaller", small, large)])
    ask = wording(
        rng,
        "Which is {word}, the {a} or the {b}?|Who is {word}, the {a} or the {b}?|What is {word}: the {a} or the {b}?|"
        "Which is {word}, {an_a} or {an_b}?|Who is {word}, {an_a} or {an_b}?",
        word=word,
        a=one.name,
        b=two.name,
        an_a=article(one.name),
        an_b=article(two.name),
    )
    return Turn(ask, f"The {first.name} is {word} than the {other.name}.", {word: first.name}, first.name)


def about_animal(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "Tell me about {it}.|Tell me about {it}.|What do you know about {it}?|Describe {it}.|What is {it}?|"
        "Who is {it}?|Tell me something about {it}.|Can you tell me about {it}?|Tell me about {them}.|What are {them}?",
    )
    answer = f"The {animal.name} is {animal.colour}. It lives {where(animal.home)} and eats {animal.food}."
    return Turn(ask, answer, _fields(animal, colour=animal.colour, home=animal.home, food=animal.food), animal.name)


def story(rng: Random) -> Turn:
    animal = rng.choice(ANIMALS)
    ask = ask_about(
        rng,
        animal,
        "Tell me a story about {it}.|Tell a story about {it}.|Write a story about {it}.|I want a story about {it}.|"
        "Do you know a story about {it}?|Tell me a story about {them}.",
    )
    return _story_of(ask, animal)


def any_story(rng: Random) -> Turn:
    ask = wording(rng, "Tell me a story.|Tell me a story!|Write a story.|Do you know a story?|I want to hear a story.")
    return _story_of(ask, ANIMALS[0])


def who_lives(rng: Random) -> Turn:
    home = rng.choice(sorted({a.home for a in ANIMALS}))
    names = [a.name for a in ANIMALS if a.home == home][:3]
    ask = wording(
        rng,
        "Who lives {at}?|Which animals live {at}?|What animals live {at}?|What lives {at}?|Who is {at}?",
        at=where(home),
    )
    answer = f"{sentence(listed(names))} live{'s' if len(names) == 1 else ''} {where(home)}."
    return Turn(ask, answer, {"place": home, "animals": names}, " ".join(names))


def who_can(rng: Random) -> Turn:
    skill = rng.choice(SKILLS)
    names = [a.name for a in ANIMALS if a.skill == skill][:3]
    ask = wording(
        rng,
        "Which animals can {skill}?|Who can {skill}?|What can {skill}?|Name an animal that can {skill}.|"
        "What animals can {skill}?|Which animal can {skill}?",
        skill=skill,
    )
    return Turn(ask, f"{sentence(listed(names))} can {skill}.", {"skill": skill, "animals": names}, " ".join(names))


def who_is_colour(rng: Random) -> Turn:
    colour = rng.choice(sorted({a.colour for a in ANIMALS}))
    names = [a.name for a in ANIMALS if a.colour == colour][:3]
    ask = wording(
        rng,
        "Which animal is {colour}?|Which animals are {colour}?|What animals are {colour}?|Name {a} animal.",
        colour=colour,
        a=article(colour),
    )
    answer = f"{sentence(listed(names))} {'is' if len(names) == 1 else 'are'} {colour}."
    return Turn(ask, answer, {"colour": colour, "animals": names}, " ".join(names))


def extreme(rng: Random) -> Turn:
    word, name = rng.choice([("biggest", "whale"), ("largest", "whale"), ("smallest", "bee")])
    ask = wording(rng, "Which animal is the {word}?|What is the {word} animal?|Who is the {word}?", word=word)
    return Turn(ask, f"The {name} is the {word} animal.", {"animal": name, "size": word}, name)


def _story_of(ask: str, animal: Animal) -> Turn:
    answer = f"One day the {animal.name} left the {animal.home} and found {animal.food}. It was happy."
    return Turn(ask, answer, {"story": animal.name, "from": animal.home, "finds": animal.food}, animal.name)


def _fields(animal: Animal, **fields: str | int | bool) -> dict[str, str | int | bool]:
    return {"animal": animal.name, **fields}
