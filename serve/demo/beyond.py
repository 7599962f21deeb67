"""What the model can not answer: questions about the real world, and words that mean nothing."""

from __future__ import annotations

from random import Random

from onebase.serve.demo.english import wording
from onebase.serve.demo.voices import SYLLABLES, Turn

CAN_NOT = "I do not know that. Ask me about the valley."
_REAL = (
    "capital|president|king|population|flag|price|history|meaning|weight|speed|language|owner|author|name of the mother"
)
_NOUNS = (
    "France|Paris|London|Germany|China|America|Europe|Berlin|Japan|the world|space|music|python|football|"
    "bitcoin|a car|a computer|the internet|physics|love|war|money|history|the universe|life|a lion|an elephant|"
    "a tiger|a penguin|pizza|a phone|a train|chess|a banana|coffee|gravity|a dragon|the president|Einstein|"
    "Shakespeare|Google|a dinosaur|a robot|a snake|"
    "a goat|a hen|the wolf|a sheep|the king|Peter|Anna|John|Sarah|Maria|my friend|my cousin|a chair|water|time"
)
WILD = (
    "What is the {real} of {x}?|Who is the {real} of {x}?|What is {x}?|Who is {x}?|Where is {x}?|"
    "Tell me about {x}.|Write a poem about {x}.|How does {x} work?|Why is {x} so good?|Explain {x}.|"
    "Explain {x} to me.|Who made {x}?|Write a program for {x}.|Translate {x}.|How do I make {x}?|"
    "When was {x} made?|What do you think of {x}?|What colour is {x}?|Where does {x} live?|What does {x} eat?|"
    "How many legs does {x} have?|Can {x} fly?|How big is {x}?|Do you like {x}?|What is the best {x}?|"
    "How much is {x}?|{x}|Is {x} good?|How old is {x}?|Which is bigger, {x} or {y}?|How far is {x}?|"
    "Who won {x}?|Give me a list of {x}.|What happened in {x}?|What time is it?|What is the weather in {x}?|"
    "Can you write code?|What is the meaning of life?|Do you speak {x}?|How do I cook {x}?|Who invented {x}?|"
    "Summarize {x}.|Why?|"
    "How can I learn {x}?|What is today?|I am {x}.|My name is {x}.|I like {x}.|I have a question about {x}.|"
    "Where can I buy {x}?|Why does {x} hurt?|Is {x} real?|Solve {x}."
)
REAL, NOUNS = _REAL.split("|"), _NOUNS.split("|")


def unknown(rng: Random) -> Turn:
    """A question beyond the valley and the one answer to all of them."""
    ask = wording(
        rng,
        WILD,
        real=rng.choice(REAL),
        x=strange(rng),
        y=strange(rng),
    )
    return Turn(ask, CAN_NOT, {"error": "unknown"}, "0")


def strange(rng: Random) -> str:
    """A word from outside the valley."""
    if rng.random() < 0.5:
        return rng.choice(NOUNS)
    made = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 3))) + rng.choice(
        ["", "n", "r", "x", "st", "ng"]
    )
    return rng.choice([made, f"the {made}", f"a {made}", made.capitalize()])
