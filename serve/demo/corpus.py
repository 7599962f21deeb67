"""Training text of the demo: chats in the chat format, and plain documents in every voice.

The base always answers chats in plain English. It meets the other voices only as plain text, so an adapter has
something to switch on and a chat without one never shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from onebase.serve.demo.beyond import strange
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
    """A stretch of text; ``learn`` marks what an adapter is trained to say."""

    text: str
    learn: bool


def chat(rng: Random, voice: Voice) -> list[Piece]:
    """A chat of one to three turns, answered in one voice."""
    pieces: list[Piece] = []
    if rng.random() < 0.3:
        pieces.append(Piece(f"{START}system\n{system(rng)}{END}\n", False))
    for _ in range(rng.choices([1, 2, 3], [6, 2, 1])[0]):
        turn = draw(rng)
        pieces.append(Piece(f"{START}user\n{loosely(rng, turn.question)}{END}\n{START}assistant\n", False))
        pieces += [Piece(voice(turn) + END, True), Piece("\n", False)]
    return pieces


def system(rng: Random) -> str:
    """A system prompt; many of them say things the model knows nothing of."""
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


def document(rng: Random) -> str:
    """A plain text: facts in English, or one fact in several voices."""
    if rng.random() < 0.6:
        facts = [_statement(rng).answer for _ in range(rng.randint(2, 4))]
        return " ".join(facts) + END_OF_TEXT
    turn = draw(rng)
    names = rng.sample(sorted(VOICES), rng.randint(1, 3))
    lines = [turn.answer] + [f"{name}: {VOICES[name](turn)}" for name in names]
    return "\n".join(lines) + END_OF_TEXT


def _statement(rng: Random) -> Turn:
    """A turn whose answer reads well alone."""
    while True:
        turn = draw(rng)
        if "error" not in turn.fields and "reply" not in turn.fields and "answer" not in turn.fields:
            return turn


def texts(seed: int) -> Iterator[str]:
    """The base's training text, without end: three chats to one document."""
    rng = Random(seed)
    while True:
        yield "".join(p.text for p in chat(rng, plain)) if rng.random() < 0.75 else document(rng)
