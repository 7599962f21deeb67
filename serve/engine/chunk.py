"""What a step computes of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

from onebase.serve.engine.sequence import Sequence


@dataclass(slots=True, eq=False, init=False)
class Chunk:
    """What one sequence computes in a step. samples: its last token is reached, so a new one is drawn. start: its first
    slot, the first that was not computed when the chunk was made; stop: the slot after its last one. drafts: its last
    tokens where they are guesses; a token is then drawn before each of them, too.

    Nobody changes one. It is not frozen because every step makes one for each row, and that would double its price."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...]
    start: int = field(init=False)
    stop: int = field(init=False)

    def __init__(self, sequence: Sequence, num_tokens: int, samples: bool, drafts: tuple[int, ...] = ()) -> None:
        self.sequence = sequence
        self.num_tokens = num_tokens
        self.samples = samples
        self.drafts = drafts
        self.start = sequence.num_computed
        self.stop = self.start + num_tokens

    def without_drafts(self) -> Chunk:
        """What is known of it; its sequence must stand where it stood."""
        return Chunk(self.sequence, self.num_tokens - len(self.drafts), self.samples)

    @property
    def num_draws(self) -> int:
        """How many of its last rows a token is drawn after."""
        return 1 + len(self.drafts) if self.samples else 0
