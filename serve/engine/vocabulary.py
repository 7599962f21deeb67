"""The base's tokenizer, read in the engine for grammars alone: texts are tokenised on the API side."""

from __future__ import annotations

from typing import Any

from onebase.serve.engine.config import EngineConfig
from onebase.serve.engine.grammar import Vocabulary
from onebase.serve.engine.messages import EngineInfo


def vocabulary_of(config: EngineConfig, info: EngineInfo) -> Vocabulary:
    """Without the end tokens that the tokenizer does not know. Blocking. Raises ValueError or OSError where there is no
    fast tokenizer, or none that grammars can use."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(
        config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("it has no tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    known = [token for token in info.eos_token_ids if backend.id_to_token(token) is not None]
    return Vocabulary(backend.to_str(), info.vocab_size, known)
