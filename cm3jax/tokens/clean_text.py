"""What CLIP does to text before it splits it: the repairs of ftfy's `fix_text`, HTML entities, spaces, lower case.

Of ftfy's repairs all are made but one: text that was decoded with a wrong codec ("cafÃ©") is left as it is.
"""

import html
import re
import unicodedata

_QUOTES = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)
_LIGATURES = str.maketrans(
    {
        **{chr(0x0132 + i): text for i, text in enumerate(("IJ", "ij"))},
        "\u0149": "\u02bcn",
        **{
            chr(0x01C4 + i): text
            for i, text in enumerate(("D\u017d", "D\u017e", "d\u017e", "LJ", "Lj", "lj", "NJ", "Nj", "nj"))
        },
        **{chr(0x01F1 + i): text for i, text in enumerate(("DZ", "Dz", "dz"))},
        **{chr(0xFB00 + i): text for i, text in enumerate(("ff", "fi", "fl", "ffi", "ffl", "\u017ft", "st"))},
    }
)
# Bytes of Windows-1252 that were read as Latin-1; five have no meaning there.
_C1 = {byte: bytes([byte]).decode("cp1252") for byte in range(0x80, 0xA0) if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)}
_ESCAPES = re.compile("\033\\[((?:\\d|;)*)([a-zA-Z])")
_LINE_ENDS = re.compile("\r\n|[\r\u2028\u2029\u0085]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_WIDE = re.compile("[\u3000\uff01-\uffef]")
# Unicode's White_Space: `str.split()` would also split at U+001C - U+001F.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


def clean(text: str) -> str:
    """Text as CLIP's tokenizer splits it: repaired, single spaces, lower case."""
    text = _repaired(text)
    text = html.unescape(html.unescape(text))
    return _SPACES.sub(" ", text).strip().lower()


def _repaired(text: str) -> str:
    if "<" not in text:
        text = html.unescape(text)
    text = _ESCAPES.sub("", text).translate(_C1).translate(_LIGATURES)
    text = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found.group()), text).translate(_QUOTES)
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return unicodedata.normalize("NFC", text)
