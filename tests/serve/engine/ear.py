"""What an engine says of log-probabilities."""

from __future__ import annotations

from typing import Any

from onebase.serve.engine.logprobs import TokenLogprob, unpack
from onebase.serve.engine.messages import TokenOutput


class Ear:
    """Collects it, by request."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.prompt: dict[str, list[TokenLogprob]] = {}
        self.drawn: dict[str, list[TokenLogprob]] = {}
        take = driver._take

        def hear(outputs: list[Any]) -> None:
            for output in outputs:
                if isinstance(output, TokenOutput):
                    self._hear(output)
            take(outputs)

        driver._take = hear

    def _hear(self, output: TokenOutput) -> None:
        if output.prompt_logprobs is not None:
            assert not output.tokens
            assert output.id not in self.drawn, "a prompt was told after its answer began"
            self.prompt.setdefault(output.id, []).extend(unpack(output.prompt_logprobs))
        if output.logprobs is not None:
            self.drawn.setdefault(output.id, []).extend(unpack(output.logprobs))
