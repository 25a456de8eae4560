"""OpenAI's byte-pair encoding for CLIP (Radford et al. 2021, released `simple_tokenizer.py`), with its exact ids.

The merges come from the released file `bpe_simple_vocab_16e6.txt.gz`. The id space: 256 bytes, 256 bytes that end a
word, one id for each merge, start, end.
"""

import functools
import gzip
import hashlib
import pathlib
import re
import unicodedata

from cm3jax.tokens.clean_text import clean

SIZE = 49_408
MERGES = SIZE - 2 * 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_WHOLE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
# Of the kinds of characters: letters stay together, other marks, too; every digit is alone.
_RUN = re.compile(r"L+|N|o+")


class ClipTokenizer:
    """Text to ids of CLIP's text encoder.

    Attributes:
      size: of the id space.
      start, end: ids around every text.
      pad: id behind the end; the text encoder never looks there.
      fingerprint: sixteen hex digits of the merges.
    """

    size = SIZE
    start, end, pad = SIZE - 2, SIZE - 1, 0

    def __init__(self, merges: str):
        """`merges`: the released file's text: a line of comment, then pairs, best first.

        Raises:
          ValueError: too few merges, or a line that is no pair.
        """
        pairs = [tuple(line.split()) for line in merges.split("\n")[1 : MERGES + 1]]
        bad = next((i for i, pair in enumerate(pairs) if len(pair) != 2), None)
        if len(pairs) < MERGES or bad is not None:
            found = f"{len(pairs)} merges" if bad is None else f"line {bad + 2} with {len(pairs[bad])} parts"
            raise ValueError(f"CLIP merges: found {found}, expected {MERGES} pairs after one line of comment")
        self.fingerprint: str = hashlib.sha256(merges.encode()).hexdigest()[:16]
        self._letters = _byte_letters()
        letters = sorted(self._letters.values())
        pieces = [*letters, *(c + _WORD_END for c in letters), *("".join(pair) for pair in pairs), START, END]
        self._ids = {piece: i for i, piece in enumerate(pieces)}
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        # Captions repeat their words.
        self._word_ids = functools.lru_cache(maxsize=1 << 16)(self._merge_word)
        self._merges = merges

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "ClipTokenizer":
        """Reads the merges, gzipped or not.

        Raises:
          FileNotFoundError, ValueError: as the constructor, with the file's name.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"CLIP merges: no file {path}")
        content = path.read_bytes()
        try:
            text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
            return cls(text)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __reduce__(self):
        return ClipTokenizer, (self._merges,)

    def encode(self, text: str) -> list[int]:
        """Ids without start and end; `<|startoftext|>` and `<|endoftext|>` in the text become their ids, as released.

        Raises:
          ValueError: a lone surrogate, which no UTF-8 text can hold.
        """
        return [i for word in split_words(clean(text)) for i in self._word_ids(word)]

    def _merge_word(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self._ids[word],)
        pieces = [self._letters[byte] for byte in word.encode()]
        pieces[-1] += _WORD_END
        while len(pieces) > 1:
            best = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: self._ranks.get(pair, MERGES))
            if best not in self._ranks:
                break
            pieces = _joined(pieces, best)
        return tuple(self._ids[piece] for piece in pieces)


def split_words(text: str) -> list[str]:
    """The pieces of cleaned text that are encoded apart: words, single digits, runs of other marks, 's and its like."""
    kinds = "".join(_kind(character) for character in text)
    words, at = [], 0
    while at < len(text):
        found = _WHOLE.match(text, at) or _RUN.match(kinds, at)
        end = found.end() if found else at + 1
        if found:
            words.append(text[at:end])
        at = end
    return words


def _kind(character: str) -> str:
    if character == " ":
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "o"


def _joined(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """Every occurrence of the pair, from the left, as one piece."""
    merged: list[str] = []
    at = 0
    while at < len(pieces):
        together = tuple(pieces[at : at + 2]) == pair
        merged.append("".join(pair) if together else pieces[at])
        at += 1 + together
    return merged


def _byte_letters() -> dict[int, str]:
    """A printable character for every byte: its own, or one from U+0100 on (as in GPT-2)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {byte: chr(256 + i) for i, byte in enumerate(others)}
