"""Greetings, talk about the model itself, and short lists."""

from __future__ import annotations

from random import Random

from onebase.serve.demo.english import sentence, wording
from onebase.serve.demo.voices import Turn
from onebase.serve.demo.world import ANIMALS, COLOURS, DAYS, JOBS, PEOPLE

# (questions, answer, key for the keypad)
TALK: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("Hello!", "Hi!", "Hey!", "Hi there!", "Good morning!", "Good evening!", "Hello there!"),
        "Hello! How can I help?",
        "hello",
    ),
    (("How are you?", "How are you today?", "Are you well?", "How do you do?"), "I am well. How can I help?", "well"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"),
        "I am the small model of the valley.",
        "model",
    ),
    (
        ("What can you do?", "Help!", "Help me.", "What do you know?", "What can I ask?", "What should I ask you?"),
        "Ask me about animals, people, places, colours or sums.",
        "ask",
    ),
    (
        ("Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much.", "Great!", "Good!"),
        "You are welcome.",
        "welcome",
    ),
    (("Goodbye!", "Bye!", "See you!", "Good night!", "See you tomorrow."), "Goodbye! See you soon.", "bye"),
    (("Where do you live?", "Where are you from?", "Where are you?"), "I live in the small valley.", "valley"),
    (("How old are you?", "When were you made?", "What is your age?"), "I am very young.", "young"),
    (("What is your favourite colour?", "Which colour do you like?"), "I like green best.", "green"),
    (("What is your favourite animal?", "Which animal do you like?"), "I like the owl best.", "owl"),
    (
        ("What is the valley?", "Tell me about the valley.", "Where is the valley?"),
        "The valley is small, green and quiet.",
        "green",
    ),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?"), "Why is the owl wise? It reads at night.", "owl"),
    (("Name an animal.", "Tell me an animal.", "Think of an animal."), "The fox.", "fox"),
    (("How many days are in a week?", "How many days has a week?"), "A week has seven days.", "7"),
    (
        ("How many colours are there?", "How many colours do you know?"),
        f"I know {len(COLOURS)} colours.",
        str(len(COLOURS)),
    ),
)


def talk(rng: Random) -> Turn:
    asks, answer, key = rng.choice(TALK)
    return Turn(rng.choice(asks), answer, {"reply": answer}, key)


def some(rng: Random) -> Turn:
    """A request for a short list."""
    kind, names = rng.choice(
        [
            ("animals", [a.name for a in ANIMALS[:3]]),
            ("colours", ["red", "green", "blue"]),
            ("people", [p.name for p in PEOPLE[:3]]),
            ("jobs", [j.name for j in JOBS[:3]]),
            ("days", DAYS[:3]),
        ]
    )
    ask = wording(
        rng,
        "Name three {kind}.|Tell me three {kind}.|List three {kind}.|Name some {kind}.|List {kind}.|"
        "Which {kind} do you know?|What {kind} do you know?",
        kind=kind,
    )
    answer = f"{names[0]}, {names[1]} and {names[2]}."
    return Turn(ask, sentence(answer), {kind: names}, " ".join(names))
