"""Incremental text against the whole text: characters split across tokens, stop strings split across tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onebase.serve.api.detokenizer import Detokenizer, IncrementalDecoder, StopMatcher, TextOptions


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """One token per byte, so that every character outside ASCII is split. <s> is a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>"])
    return made


def pieces(tokenizer: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer, prompt)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@given(prompt=st.text(max_size=6), text=st.text(max_size=20))
def test_pieces_concatenate_to_the_text(plain: Tokenizer, prompt: str, text: str) -> None:
    made = pieces(plain, plain.encode(prompt).ids, plain.encode(text).ids)
    expected = text.rstrip("\ufffd") if text.endswith("\ufffd") else text
    assert "".join(made).rstrip("\ufffd") == expected.rstrip("\ufffd")
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in made)


def test_an_emoji_comes_whole_and_half_of_one_never(plain: Tokenizer) -> None:
    tokens = plain.encode("a😀b").ids
    assert pieces(plain, [], tokens) == ["a", "", "", "", "😀", "b", ""]
    assert pieces(plain, [], tokens[:3]) == ["a", "", "", ""]


def test_prompt_that_ends_within_a_character_is_not_repeated(plain: Tokenizer) -> None:
    prompt = plain.encode("xyz😀").ids[:-2]
    assert "xyz" not in "".join(pieces(plain, prompt, plain.encode("abc").ids))


def test_bytes_that_are_no_text_are_given_up_on_and_later_text_still_comes(plain: Tokenizer) -> None:
    broken = plain.encode("é").ids[:1] * 40
    made = pieces(plain, [], broken + plain.encode("fine").ids)
    assert "".join(made).endswith("fine")
    assert "".join(made).count("\ufffd") == 40


def test_special_tokens_are_silent(plain: Tokenizer) -> None:
    special = plain.token_to_id("<s>")
    made = pieces(plain, [special], [special] * 30 + plain.encode("ok").ids + [special])
    assert "".join(made) == "ok"


def test_sentencepiece_style_spaces_are_kept() -> None:
    vocab = {"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    assert "".join(pieces(made, [0], [1, 2, 0])) == " bc a"
    assert "".join(pieces(made, [], [1, 2, 0])) == "bc a"


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the stop string that is completed first; of those completed together, the longest."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


small = st.text(alphabet="abé", min_size=1, max_size=5)


@given(parts=st.lists(st.text(alphabet="abé", max_size=4), max_size=8), stops=st.lists(small, max_size=4))
def test_stop_matcher_agrees_with_a_search_of_the_whole(parts: list[str], stops: list[str]) -> None:
    matcher, out, stopped = StopMatcher(stops), "", False
    for part in parts:
        text, stopped = matcher.push(part)
        out += text
        assert "".join(parts).startswith(out)
        if stopped:
            break
    if not stopped:
        out += matcher.flush()
    assert (out, stopped) == naive("".join(parts), stops)


def test_text_that_can_no_longer_become_a_stop_string_is_let_go_at_once() -> None:
    matcher = StopMatcher(["aab"])
    assert matcher.push("xa") == ("x", False)
    assert matcher.push("aa") == ("a", False)
    assert matcher.push("b") == ("", True)


@given(text=st.text(alphabet="ab😀", max_size=12), stop=st.text(alphabet="ab😀", min_size=1, max_size=3))
def test_detokenizer_stops_inside_characters_split_over_tokens(plain: Tokenizer, text: str, stop: str) -> None:
    made, out = Detokenizer(plain, [], TextOptions(stops=(stop,))), ""
    for token in plain.encode(text).ids:
        piece = made.push(token)
        out += piece.text
        if piece.stopped:
            break
    else:
        last = made.finish()
        piece, out = last, out + last.text
    assert (out, piece.stopped) == naive(text, [stop]) if text else out == ""


def test_a_long_hostile_stop_list_costs_little(plain: Tokenizer) -> None:
    stops = ["a" * 999 + chr(98 + i) for i in range(16)]
    matcher: Any = StopMatcher(stops)
    kept = sum(len(matcher.push("aaaa")[0]) for _ in range(1000))
    assert kept == 4000 - 999


SCRIPTS = "aZ 09é ß中文字あいうقلبहिन्दी한국어🦊👩‍👩‍👧🏳️‍🌈\n\t"


@pytest.fixture(scope="module")
def merged() -> Tokenizer:
    """Byte-level BPE whose merges cut across characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([SCRIPTS, SCRIPTS[::-1], SCRIPTS[3:] + SCRIPTS], trainer)
    return made


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    """SentencePiece's kind, as Llama's: words, and a token for each byte of what is no word."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "é", "中", "▁🦊", "文字"]
    made = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>"])
    return made


@pytest.mark.parametrize("name", ["plain", "merged"])
@given(data=st.data(), skips=st.booleans())
def test_random_tokens_read_as_they_do_at_once(
    name: str, request: pytest.FixtureRequest, data: st.DataObject, skips: bool
) -> None:
    """But for bytes that are no characters, of which there may be more or fewer replacement characters."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    text = _streamed(tokenizer, ids, skips)
    whole = str(tokenizer.decode(ids, skip_special_tokens=skips))
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def _streamed(tokenizer: Tokenizer, ids: list[int], skips_special: bool) -> str:
    decoder = IncrementalDecoder(tokenizer, [], skips_special)
    return "".join([*(decoder.push(token) for token in ids), decoder.flush()])


@given(
    parts=st.lists(st.one_of(st.integers(258, 264), st.just(1), st.sampled_from(SCRIPTS)), max_size=20),
    skips=st.booleans(),
)
def test_characters_that_fall_back_to_bytes_read_as_they_do_at_once(
    fallback: Tokenizer, parts: list[int | str], skips: bool
) -> None:
    """Words, special tokens, and the bytes of characters, one token each."""
    spelt = [[part] if isinstance(part, int) else [2 + byte for byte in part.encode()] for part in parts]
    ids = [token for tokens in spelt for token in tokens]
    assert _streamed(fallback, ids, skips) == fallback.decode(ids, skip_special_tokens=skips)


@pytest.mark.parametrize("name", ["plain", "merged"])
@given(data=st.data(), text=st.text(alphabet=SCRIPTS, max_size=30))
def test_no_piece_has_half_a_character(
    name: str, request: pytest.FixtureRequest, data: st.DataObject, text: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text).ids
    made = pieces(tokenizer, [], ids[: data.draw(st.integers(0, len(ids)))])
    assert "\ufffd" not in "".join(made)
    assert text.startswith("".join(made))
