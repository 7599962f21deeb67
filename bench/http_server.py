"""The real server for a benchmark: its two processes, started as a user starts them, over a folder made on the spot."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

BASE = "base"  # what requests call the model
_COMMAND = (sys.executable, "-P", "-c", "from onebase.serve.cli import app; app()")


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """The model as a folder that can be served, with a tokenizer that gives every token but 128 a text of its own.

    Were tokens parts of characters, as byte pairs are, the server would hold many of them back: a piece of text would
    be of two or three, and a short answer of none at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    words = ("".join(word) for length in (2, 3) for word in itertools.product(signs, repeat=length))
    texts = itertools.islice(
        itertools.chain(sorted(pre_tokenizers.ByteLevel.alphabet()), words), model.config.vocab_size
    )
    raw = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready. process: the API's, whose one child is the engine's."""

    host: str
    port: int
    process: subprocess.Popen[str]

    def cpu_seconds(self) -> Mapping[str, float]:
        """CPU time of its processes so far. Linux."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return {"API": _cpu_seconds(pid), "engine": sum(_cpu_seconds(int(child)) for child in children)}


@contextmanager
def serving(model: Path, adapters: Mapping[str, Path], options: Sequence[str], data: Path) -> Iterator[Server]:
    """Start the server on a free port of this machine; it is ended in any case.

    adapters: name -> folder. options: further ones of `onebase serve`. data: its data folder, and the place of its log.
    Raises RuntimeError with the log where it does not start.
    """
    command = [*_COMMAND, "serve", str(model), "--served-model-name", BASE, "--port", "0", "--data-dir", str(data)]
    command += [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    log = data.with_suffix(".log")
    with log.open("w") as errors:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield Server(*_address(process, log), process)
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def _address(process: subprocess.Popen[str], log: Path) -> tuple[str, int]:
    """From the line by which the server says that it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if "OneBase serves" not in line:
        raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
    host, _, port = line.split()[-1].removeprefix("http://").rpartition(":")
    return host, int(port)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, dead threads included
