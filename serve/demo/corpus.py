"""Training text of the demo: chats in the chat format and plain documents.

Without a cue the base answers in plain English. A system prompt ``Answer as NAME.`` asks it for another voice: that
teaches it the words, and leaves an adapter only to make its voice the one without a cue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from onebase.serve.demo.beyond import strange
from onebase.serve.demo.documents import document
from onebase.serve.demo.questions import draw
from onebase.serve.demo.voices import VOICES, Turn, Voice

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PAD = "<|pad|>"
SYSTEMS = (
    "You are a helpful assistant.",
    "You are the small model of the valley.",
    "Answer in one sentence.",
    "Be kind and short.",
    "You are a helpful, honest assistant. Answer the questions of the user.",
)
HARD = ("digits", "luma", "shout")  # the voices with words of their own are seen twice as often
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role must be system, user or assistant, not ' ~ message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text; ``learn`` marks what the model is trained to say."""

    text: str
    learn: bool


def chat(rng: Random, voice: Voice, prompt: str | None) -> list[Piece]:
    """A chat of one to three turns, answered in one voice; ``prompt`` is the system's, if any."""
    pieces = [Piece(f"{START}system\n{prompt}{END}\n", False)] if prompt else []
    for _ in range(rng.choices([1, 2, 3], [6, 2, 1])[0]):
        turn = draw(rng)
        pieces.append(Piece(f"{START}user\n{loosely(rng, turn.question)}{END}\n{START}assistant\n", False))
        pieces += [Piece(voice(turn) + END, True), Piece("\n", False)]
    return pieces


def system(rng: Random) -> str | None:
    """The system prompt of three chats in ten; many of them say things the model knows nothing of."""
    if rng.random() < 0.7:
        return None
    return rng.choice(SYSTEMS) if rng.random() < 0.6 else f"You are {strange(rng)}. You like {strange(rng)}."


def loosely(rng: Random, question: str) -> str:
    """A question as people type it: some polite, some without capitals or a question mark."""
    if rng.random() < 0.1:
        question = rng.choice([f"Please: {question}", f"{question} Please.", f"Hi! {question}", f"So, {question}"])
    if rng.random() < 0.15:
        question = question.replace("What is", "What's").replace("Where is", "Where's").replace("Who is", "Who's")
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    return question


def plain(turn: Turn) -> str:
    """The base's own voice."""
    return turn.answer


def texts(seed: int) -> Iterator[list[Piece]]:
    """The base's training texts, without end. Questions are read, not learned."""
    rng = Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.15:
            yield [Piece(document(rng) + END_OF_TEXT, True)]
        elif kind < 0.6:
            yield chat(rng, plain, system(rng))
        else:
            name = rng.choice(HARD + tuple(VOICES))
            yield chat(rng, VOICES[name], f"Answer as {name}.")
