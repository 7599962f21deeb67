"""What single tokens read like: text, bytes, and the name that answers give them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one visible character: Latin-1's own, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    shown = {chr(byte): byte for byte in visible}
    return shown | {chr(256 + at): byte for at, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


class TokenTexts:
    """Texts of single tokens of one tokenizer. A token's text is what it adds to the text before it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._texts: dict[int, str] = {}

    def is_special(self, token: int) -> bool:
        """Whether answers leave it out of their text."""
        return token in self._special

    def text(self, token: int) -> str:
        """With replacement characters where the token holds only a part of a character."""
        if token not in self._texts:
            self._texts[token] = self._decode(token)
        return self._texts[token]

    def is_whole(self, token: int) -> bool:
        """Whether it is made of whole characters."""
        return REPLACEMENT not in self.text(token)

    def raw(self, token: int) -> bytes:
        """UTF-8, or the part of it that the token holds."""
        text = self.text(token)
        if self.is_whole(token):
            return text.encode()
        name = self._tokenizer.id_to_token(token) or ""
        if match := _BYTE.fullmatch(name):
            return bytes([int(match[1], 16)])
        return bytes(_ALPHABET[char] for char in name) if _ALPHABET.keys() >= set(name) else text.encode()

    def name(self, token: int) -> str:
        r"""The text, or ``bytes:\x..`` where it is no whole characters: different tokens then have different names."""
        if self.is_whole(token):
            return self.text(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.raw(token))

    def shown(self, tokens: Sequence[int], skips_special: bool = True) -> str:
        """The text of a sequence as answers have it."""
        (text,) = self._tokenizer.decode_batch([list(tokens)], skip_special_tokens=skips_special)  # see _encode_long
        return str(text)

    def _decode(self, token: int) -> str:
        """Between two of itself the token is not the first one, which some decoders strip of its space."""
        one, two = (str(self._tokenizer.decode([token] * n, skip_special_tokens=False)) for n in (1, 2))
        return two[len(one) :] if two.startswith(one) else one
