"""Questions about the people and things of the valley, and the draw over all questions."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from onebase.serve.demo import animals
from onebase.serve.demo.beyond import unknown
from onebase.serve.demo.english import article, bare, sentence, where, wording
from onebase.serve.demo.smalltalk import some, talk
from onebase.serve.demo.voices import Fields, Turn
from onebase.serve.demo.world import DAYS, JOBS, MIXES, NUMBERS, OPPOSITES, PEOPLE, PLACES, SEASONS, THINGS

Ask = Callable[[Random], Turn]


def person_job(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(
        rng,
        "Who is {name}?|What is {name}'s job?|What does {name} do?|What is the job of {name}?|Tell me about {name}.|"
        "Do you know {name}?|Where does {name} work?|What does {name} work as?",
        name=person.name,
    )
    answer = f"{person.name} is {article(person.job)} and lives {where(person.place)}."
    return Turn(ask, answer, {"person": person.name, "job": person.job, "home": person.place}, person.job)


def person_home(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(rng, "Where does {name} live?|Where is {name}?|Where can I find {name}?", name=person.name)
    answer = f"{person.name} lives {where(person.place)}."
    return Turn(ask, answer, {"person": person.name, "home": person.place}, person.place)


def person_pet(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(
        rng,
        "What pet does {name} have?|What is the pet of {name}?|Does {name} have a pet?|What is {name}'s pet?|"
        "Which animal does {name} have?|Who has {pet}?|Who owns {pet}?",
        name=person.name,
        pet=article(person.pet),
    )
    return Turn(
        ask, f"{person.name} has {article(person.pet)}.", {"person": person.name, "pet": person.pet}, person.pet
    )


def person_colour(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(
        rng,
        "What colour does {name} like?|What is {name}'s favourite colour?|What is the favourite colour of {name}?|"
        "Which colour does {name} like best?",
        name=person.name,
    )
    fields = {"person": person.name, "colour": person.colour}
    return Turn(ask, f"{person.name} likes {person.colour}.", fields, person.colour)


def person_fruit(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(
        rng,
        "What does {name} like to eat?|What does {name} eat?|Which fruit does {name} like?|"
        "What is {name}'s favourite fruit?|What does {name} like?",
        name=person.name,
    )
    return Turn(
        ask, f"{person.name} likes {person.fruit}.", {"person": person.name, "fruit": person.fruit}, person.fruit
    )


def who_is_job(rng: Random) -> Turn:
    person = rng.choice(PEOPLE)
    ask = wording(
        rng,
        "Who is the {job}?|What is the name of the {job}?|Who works as {a_job}?|Who is {a_job}?",
        job=person.job,
        a_job=article(person.job),
    )
    return Turn(ask, f"The {person.job} is {person.name}.", {"job": person.job, "name": person.name}, person.name)


def job_product(rng: Random) -> Turn:
    job = rng.choice(JOBS)
    ask = wording(
        rng,
        "What does {it} do?|What does {it} make?|What is the work of {it}?|What is {it}?|What does {it} {verb}?",
        it=rng.choice([f"the {job.name}", article(job.name)]),
        verb=bare(job.verb),
    )
    return Turn(ask, f"The {job.name} {job.verb} {job.product}.", {"job": job.name, job.verb: job.product}, job.product)


def job_tool(rng: Random) -> Turn:
    job = rng.choice(JOBS)
    it = rng.choice([f"the {job.name}", article(job.name)])
    ask = wording(rng, "What does {it} use?|What is the tool of {it}?|What tool does {it} need?", it=it)
    return Turn(ask, f"The {job.name} uses the {job.tool}.", {"job": job.name, "tool": job.tool}, job.tool)


def who_makes(rng: Random) -> Turn:
    job = rng.choice(JOBS)
    ask = f"Who {job.verb} {rng.choice(['', 'the '])}{job.product}?"
    return Turn(ask, f"The {job.name} {job.verb} {job.product}.", {"job": job.name, job.verb: job.product}, job.name)


def thing_colour(rng: Random) -> Turn:
    thing, colour = rng.choice(list(THINGS.items()))
    ask = wording(
        rng,
        "What colour is the {it}?|What color is the {it}?|Tell me the colour of the {it}.|Which colour has the {it}?",
        it=thing,
    )
    return Turn(ask, f"The {thing} is {colour}.", {"thing": thing, "colour": colour}, colour)


def is_thing(rng: Random) -> Turn:
    thing, colour = rng.choice(list(THINGS.items()))
    asked = colour if rng.random() < 0.5 else rng.choice(list(THINGS.values()))
    right = asked == colour
    answer = f"The {thing} is {colour}{'' if right else f', not {asked}'}."
    fields: Fields = {"thing": thing, "colour": colour, "answer": right}
    return Turn(f"Is the {thing} {asked}?", answer, fields, colour)


def mix(rng: Random) -> Turn:
    pair, made = rng.choice(list(MIXES.items()))
    one, two = rng.sample(pair, 2)
    ask = wording(
        rng,
        "What do you get if you mix {a} and {b}?|What colour do {a} and {b} make?|Mix {a} and {b}.|"
        "What is {a} and {b}?|What is {a} plus {b}?|What happens if I mix {a} and {b}?",
        a=one,
        b=two,
    )
    fields: Fields = {"mix": [one, two], "colour": made}
    return Turn(ask, f"{sentence(one)} and {two} make {made}.", fields, made)


SUMS = (
    "What is {one} {word} {two}?|What is {a} {word} {b}?|What is {one} {sign} {two}?|{one} {sign} {two}|"
    "{one}{sign}{two}|How much is {a} {word} {b}?|{a} {word} {b}"
)


def sum_of(rng: Random) -> Turn:
    """Sums and differences that stay between one and ten."""
    one, two = rng.choice([(a, b) for a in range(1, 11) for b in range(1, 11 - a)])
    total, word, sign = one + two, "plus", "+"
    if rng.random() < 0.4:
        one, total, word, sign = total, one, "minus", "-"
    a, b = NUMBERS[one], NUMBERS[two]
    ask = wording(rng, SUMS, one=one, two=two, a=a, b=b, word=word, sign=sign)
    fields: Fields = {"a": one, word: two, "is": total}
    return Turn(ask, f"{sentence(a)} {word} {b} is {NUMBERS[total]}.", fields, str(total))


def large_sum(rng: Random) -> Turn:
    """Sums beyond ten, and all products."""
    high = rng.choice([10, 20, 99, 999])
    one = rng.randint(2, high)
    word, sign = rng.choice([("plus", "+"), ("times", "*"), ("times", "x"), ("minus", "-")])
    two = rng.randint(2 if word == "times" else max(1, 11 - one), high)
    if word == "minus":
        one = 10 + two + one
    ask = wording(
        rng,
        "What is {one} {word} {two}?|What is {one} {sign} {two}?|{one} {sign} {two}|{one}{sign}{two}",
        one=one,
        two=two,
        word=word,
        sign=sign,
    )
    return Turn(ask, "I can only count to ten.", {"error": "too large"}, "10")


def opposite(rng: Random) -> Turn:
    one, two = rng.sample(rng.choice(OPPOSITES), 2)
    ask = wording(
        rng,
        "What is the opposite of {one}?|Opposite of {one}?|Tell me the opposite of {one}.|The opposite of {one}?",
        one=one,
    )
    return Turn(ask, f"The opposite of {one} is {two}.", {"word": one, "opposite": two}, two)


def next_day(rng: Random) -> Turn:
    i = rng.randrange(7)
    after = DAYS[(i + 1) % 7]
    ask = wording(
        rng,
        "What comes after {it}?|Which day comes after {it}?|What day comes after {it}?|What day follows {it}?",
        it=DAYS[i],
    )
    return Turn(ask, f"After {DAYS[i]} comes {after}.", {"day": DAYS[i], "next": after}, after)


def season(rng: Random) -> Turn:
    name, weather = rng.choice(list(SEASONS.items()))
    ask = wording(
        rng,
        "How is the weather in {it}?|How is {it}?|What is {it} like?|Is {it} {weather}?|Is it {weather} in {it}?|"
        "What is the weather in {it}?",
        it=name,
        weather=weather,
    )
    return Turn(ask, f"It is {weather} in {name}.", {"season": name, "weather": weather}, weather)


def place(rng: Random) -> Turn:
    name, (direction, near) = rng.choice(list(PLACES.items()))
    ask = wording(
        rng,
        "Where is the {it}?|How do I get to the {it}?|How can I find the {it}?|Which way is the {it}?|"
        "Tell me about the {it}.",
        it=name,
    )
    answer = f"The {name} is {direction} of the {near}."
    return Turn(ask, answer, {"place": name, "direction": direction, "from": near}, direction)


ASKS: dict[Ask, int] = {
    animals.animal_colour: 8,
    animals.animal_home: 8,
    animals.animal_food: 7,
    animals.animal_legs: 6,
    animals.animal_sound: 6,
    animals.can_animal: 8,
    animals.is_colour: 7,
    animals.is_big: 3,
    animals.bigger: 16,
    animals.about_animal: 7,
    animals.story: 5,
    animals.any_story: 1,
    animals.who_lives: 4,
    animals.who_can: 3,
    animals.who_is_colour: 3,
    animals.extreme: 2,
    person_job: 5,
    person_home: 4,
    person_pet: 4,
    person_colour: 3,
    person_fruit: 3,
    who_is_job: 4,
    job_product: 4,
    job_tool: 3,
    who_makes: 4,
    thing_colour: 5,
    is_thing: 4,
    mix: 3,
    sum_of: 24,
    large_sum: 6,
    opposite: 6,
    next_day: 5,
    season: 2,
    place: 4,
    talk: 9,
    some: 3,
    unknown: 15,
}


def draw(rng: Random) -> Turn:
    """One question with its answer."""
    return rng.choices(list(ASKS), weights=list(ASKS.values()))[0](rng)
