"""Texts of single tokens, over byte-level and byte-fallback vocabularies."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from onebase.serve.api.logprobs import LegacyWriter
from onebase.serve.api.token_texts import TokenTexts
from onebase.serve.engine.logprobs import TokenLogprob


def _fallback() -> Tokenizer:
    """As Llama 2: spaces are written as underlines, the first one is stripped, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁hello", "▁world", "s", "!"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


def test_byte_level_tokens(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("hello é 😀").ids
    assert b"".join(texts.raw(token) for token in ids) == "hello é 😀".encode()
    half = [token for token in ids if not texts.is_whole(token)]
    assert len(half) == 6
    assert texts.name(half[0]) == "bytes:\\xc3"
    assert texts.is_special(0)
    assert texts.name(0) == "<s>"


def test_byte_fallback_tokens_keep_their_space() -> None:
    tokenizer = _fallback()
    texts = TokenTexts(tokenizer)
    hello, world, half = (tokenizer.token_to_id(name) for name in ("▁hello", "▁world", "<0xC3>"))
    assert [texts.text(hello), texts.text(world)] == [" hello", " world"]
    assert (texts.raw(half), texts.name(half)) == (b"\xc3", "bytes:\\xc3")
    assert texts.name(tokenizer.token_to_id("<0x41>")) == "A"


def test_offsets_of_an_echo_follow_its_text() -> None:
    tokenizer = _fallback()
    texts = TokenTexts(tokenizer)
    names = ["<s>", "▁hello", "▁world", "<0xC3>", "<0xA9>", "!", "<0xC3>", "!", "s"]
    tokens = [tokenizer.token_to_id(name) for name in names]
    text = texts.shown(tokens)
    assert text == "hello worldé!\ufffd!s"
    writer = LegacyWriter(texts)
    writer.starts_text(tokens)
    said = writer.write([TokenLogprob(token, -1.0) for token in tokens])
    assert said["text_offset"] == [0, 0, 5, 11, 11, 12, 13, 14, 15]


def test_the_likelier_of_two_tokens_with_one_name_stays() -> None:
    tokenizer = _fallback()
    one, other = tokenizer.token_to_id("s"), tokenizer.token_to_id("<0x73>")
    writer = LegacyWriter(TokenTexts(tokenizer))
    said = writer.write([TokenLogprob(other, -3.0, 5, ((one, -1.0), (other, -3.0)))])
    assert said["top_logprobs"] == [{"s": -1.0}]
