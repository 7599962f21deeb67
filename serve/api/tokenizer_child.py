"""The process that opens an adapter's tokenizer: started by brought.py and by nobody else.

``python -m onebase.serve.api.tokenizer_child BASE OWN`` compares two tokenizer.json files, under limits on memory and
time, and writes ``{"same", "refused", "largest"}``. Normalizers, pre-tokenizers and decoders may hold regular
expressions, which run on every text: those have to be the base's. So does the model with its vocabulary; what an
adapter may bring is tokens added to it, and what is put around a text.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from tokenizers import Tokenizer

CPU_SECONDS = 60
MEMORY_BYTES = 4 << 30
MAX_ADDED = 1 << 16
MAX_TOKEN_CHARS = 1024
MAX_PUT_AROUND = 4096  # characters of JSON: what is put around a text is put around every text
_ALIKE = ("model", "normalizer", "pre_tokenizer", "decoder")
_ASIDE = ("version", "truncation", "padding")


def compare(base: str, own: str) -> dict[str, Any]:
    """refused: why it is not served, or None. largest: of the ids of its added tokens."""
    try:
        theirs, mine = _canonical(base), _canonical(own)
    except Exception as error:  # tokenizers raises a plain Exception for all that is wrong with a file
        return {"same": False, "refused": f"it cannot be read: {str(error)[:200]}", "largest": 0}
    added = mine["added_tokens"]
    largest = max((token["id"] for token in added), default=0)
    return {"same": mine == theirs, "refused": _refusal(theirs, mine, added), "largest": largest}


def _refusal(theirs: dict[str, Any], mine: dict[str, Any], added: list[dict[str, Any]]) -> str | None:
    differing = [part for part in _ALIKE if theirs[part] != mine[part]]
    if differing:
        return f"its {differing[0]} is not the base's, and only added tokens may differ"
    if len(added) > MAX_ADDED:
        return f"it has {len(added)} added tokens; at most {MAX_ADDED} are served"
    if any(len(token["content"]) > MAX_TOKEN_CHARS for token in added):
        return f"an added token has more than {MAX_TOKEN_CHARS} characters"
    if len(json.dumps(mine["post_processor"])) > MAX_PUT_AROUND:
        return f"its post_processor has more than {MAX_PUT_AROUND} characters"
    return None


def _canonical(path: str) -> dict[str, Any]:
    """As this version of tokenizers writes it, whichever wrote the file."""
    read: dict[str, Any] = json.loads(Tokenizer.from_file(path).to_str())
    return {key: value for key, value in read.items() if key not in _ASIDE}


def main() -> None:
    limits = ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, 0))
    for kind, most in (*limits, (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        lowered = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (lowered, lowered))
    sys.stdout.write(json.dumps(compare(*sys.argv[1:3])))


if __name__ == "__main__":
    main()
