"""What a document must be like, whatever its language: pure functions that raise `RejectError`."""

import collections
import re
import unicodedata

from cm3jax.data.ingest.settings import IngestConfig
from cm3jax.data.sources.source import Reason, RejectError
from cm3jax.tokens.document import Document, pictures, texts

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|www\.)\S+", re.IGNORECASE)
_COUNTED_WORDS = 8  # in shorter texts a word that comes twice says nothing
_ALLOWED_CONTROL = "\t\n\r"
_REPLACEMENT = "\ufffd"  # what decoders write for bytes that were no text


def check_document(document: Document, config: IngestConfig) -> None:
    """Refuses a document with an unsafe id, text or picture.

    Raises:
      RejectError: the first rule that it breaks.
    """
    check_key(document.id)
    check_text("\n".join(texts(document)), document.id, config)
    for picture in pictures(document):
        check_shape(picture.shape[0], picture.shape[1], document.id, config)


def check_key(key: str) -> None:
    """Refuses a key that, used as the name of a file, would lead out of its folder or could not be shown."""
    if key.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", key):
        raise RejectError(Reason.UNSAFE_PATH, f"key {key!r:.200} leads out of a folder", key)
    if any(unicodedata.category(character) == "Cc" for character in key):
        raise RejectError(Reason.UNSAFE_PATH, f"key {key!r:.200} has control characters", key)


def check_shape(height: int, width: int, key: str, config: IngestConfig) -> None:
    """Refuses a picture that is too small or too long."""
    short, long = sorted((height, width))
    if short < config.min_short_side:
        detail = f"{width} x {height} pixels, expected a short side >= {config.min_short_side}"
        raise RejectError(Reason.IMAGE_TOO_SMALL, detail, key)
    if long > config.max_aspect * short:
        detail = f"{width} x {height} pixels, expected sides of at most {config.max_aspect:g} to 1"
        raise RejectError(Reason.EXTREME_ASPECT, detail, key)


def check_text(text: str, key: str, config: IngestConfig) -> None:
    """Refuses text that is no caption in any language."""
    control = control_characters(text)
    if control:
        detail = f"{len(control)} control or replacement characters, the first U+{ord(control[0]):04X}"
        raise RejectError(Reason.CONTROL_CHARACTERS, detail, key)
    size = len("".join(text.split()))
    if size < config.min_characters:
        detail = f"{size} characters, expected >= {config.min_characters}: {text!r:.80}"
        raise RejectError(Reason.TEXT_TOO_SHORT, detail, key)
    if size > config.max_characters:
        detail = f"{size} characters, expected <= {config.max_characters}"
        raise RejectError(Reason.TEXT_TOO_LONG, detail, key)
    if text.strip() and not _URL.sub("", text).strip():
        raise RejectError(Reason.ONLY_URLS, f"nothing but addresses: {text!r:.80}", key)
    share = letter_share(text)
    if share < config.min_letter_share:
        detail = f"{share:.0%} letters, expected >= {config.min_letter_share:.0%}: {text!r:.80}"
        raise RejectError(Reason.FEW_LETTERS, detail, key)
    run = longest_run(text)
    if run > config.max_character_run:
        detail = f"one character {run} times in a row, expected <= {config.max_character_run}: {text!r:.80}"
        raise RejectError(Reason.REPEATED_TEXT, detail, key)
    share = top_word_share(text)
    if share > config.max_word_share:
        detail = f"one word is {share:.0%} of the text, expected <= {config.max_word_share:.0%}: {text!r:.80}"
        raise RejectError(Reason.REPEATED_TEXT, detail, key)


def control_characters(text: str) -> str:
    """The control characters of `text`, tab and line ends apart, and U+FFFD."""
    return "".join(
        character
        for character in text
        if character == _REPLACEMENT or (unicodedata.category(character) == "Cc" and character not in _ALLOWED_CONTROL)
    )


def letter_share(text: str) -> float:
    """Letters, with the marks that many scripts write vowels with, among all but white space; 1 for no text."""
    characters = "".join(text.split())
    letters = sum(unicodedata.category(character)[0] in "LM" for character in characters)
    return letters / len(characters) if characters else 1.0


def longest_run(text: str) -> int:
    """How often the same character stands in a row, at most; white space does not count."""
    return max((len(match.group()) for match in re.finditer(r"(\S)\1*", text)), default=0)


def top_word_share(text: str) -> float:
    """Share of the most frequent word, case ignored; 0 for texts of fewer than eight words."""
    words = text.casefold().split()
    if len(words) < _COUNTED_WORDS:
        return 0.0
    return collections.Counter(words).most_common(1)[0][1] / len(words)
