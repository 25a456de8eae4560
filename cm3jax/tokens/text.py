"""Text as ids: sentencepiece BPE with byte fallback, exact for every string.

No symbol is defined for users, so "</s>" or "<break>" typed in a caption is ordinary text; normalisation is the
identity and nothing is prefixed, so `decode(encode(text)) == text`.
"""

import hashlib
import io
import logging
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from cm3jax.files import write_atomic

logger = logging.getLogger(__name__)

CONTROL_PIECES = ("<s>", "<pad>", "</s>", "<unk>")
SPACE = "\u2581"
# sentencepiece writes a space as U+2581 and ends strings at NUL in places: both go through byte pieces.
_AS_BYTES = re.compile(f"([{SPACE}\0]+)")
_PROBE = "  \u00c5\ufb01 \uff21 e\u0301\t<s></s> \n"
_LONGEST_TRAINING_LINE = 1 << 16  # bytes; the trainer drops longer lines


class TextTokenizer:
    """Text to ids of the unified vocabulary's text range, and back.

    Attributes:
      size: ids in use, control ids and byte pieces included.
      fingerprint: sixteen hex digits of the model's content.
    """

    def __init__(self, model: bytes):
        """`model`: a serialised sentencepiece model.

        Raises:
          ValueError: not a sentencepiece model, or one that cannot promise exact text.
        """
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"text tokenizer: not a sentencepiece model ({error})") from error
        self.size: int = len(self._processor)
        self.fingerprint: str = hashlib.sha256(model).hexdigest()[:16]
        control = tuple(self._processor.id_to_piece(i) for i in range(min(self.size, len(CONTROL_PIECES))))
        if control != CONTROL_PIECES:
            raise ValueError(f"text tokenizer: ids 0-3 are {control}, expected {CONTROL_PIECES}")
        self._content = [self._piece_content(i) for i in range(self.size)]
        self._byte_id = {self._content[i][0]: i for i in range(self.size) if self._processor.is_byte(i)}
        if len(self._byte_id) != 256:
            raise ValueError(f"text tokenizer: {len(self._byte_id)} byte pieces, expected 256 (byte_fallback)")
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError("text tokenizer: the model changes text (normalisation, or a space put in front)")

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "TextTokenizer":
        """Reads a `.model` file.

        Raises:
          FileNotFoundError, ValueError: as for the constructor, with the file's name.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"text tokenizer: no file {path}")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __reduce__(self):
        return TextTokenizer, (self._model,)

    def _piece_content(self, i: int) -> bytes:
        if i < len(CONTROL_PIECES):
            return b""
        piece = self._processor.id_to_piece(i)
        return bytes([int(piece[1:-1], 16)]) if self._processor.is_byte(i) else piece.replace(SPACE, " ").encode()

    def encode(self, text: str) -> list[int]:
        """Ids in [4, size); nothing is added at the ends.

        Raises:
          ValueError: a lone surrogate, which no UTF-8 text can hold.
        """
        _require_unicode(text)
        ids: list[int] = []
        for i, part in enumerate(_AS_BYTES.split(text)):
            ids += [self._byte_id[b] for b in part.encode()] if i % 2 else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (a model may write them) become U+FFFD.

        Raises:
          ValueError: an id that is no text piece.
        """
        for position, i in enumerate(ids):
            if not len(CONTROL_PIECES) <= i < self.size:
                raise ValueError(
                    f"text tokenizer: id {i} at position {position} is no text piece, "
                    f"expected {len(CONTROL_PIECES)} <= id < {self.size}"
                )
        return b"".join(self._content[i] for i in ids).decode("utf-8", errors="replace")


def train_text_tokenizer(lines: Iterable[str], vocab_size: int, path: str | pathlib.Path) -> TextTokenizer:
    """Trains BPE on `lines` and writes the model to `path`; the same lines give the same file.

    Text with fewer different pairs than asked for gives a smaller vocabulary, which the log says; the
    `Vocabulary` keeps the room.

    Raises:
      ValueError: no text, or a `vocab_size` with no room for the control ids, the bytes and one character.
    """
    smallest = len(CONTROL_PIECES) + 256 + 1
    if vocab_size < smallest:
        raise ValueError(f"text tokenizer: vocab_size {vocab_size}, expected at least {smallest}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            bos_piece=CONTROL_PIECES[0],
            pad_piece=CONTROL_PIECES[1],
            eos_piece=CONTROL_PIECES[2],
            unk_piece=CONTROL_PIECES[3],
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=_LONGEST_TRAINING_LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"text tokenizer: training for vocab_size {vocab_size} failed: {error}") from error
    tokenizer = TextTokenizer(model.getvalue())
    if tokenizer.size < vocab_size:
        logger.warning("text tokenizer: the text gave %d pieces of the %d asked for", tokenizer.size, vocab_size)
    write_atomic(pathlib.Path(path), model.getvalue())
    return tokenizer


def _training_lines(lines: Iterable[str]) -> Iterator[str]:
    """Lines without what the trainer misreads: line ends, NUL and U+2581; encoding gives those as bytes anyway."""
    for line in lines:
        _require_unicode(line)
        yield from (part for part in re.split(f"[\r\n\0{SPACE}]+", line) if part)


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        raise ValueError(f"text holds a lone surrogate U+{found:04X} at character {error.start}") from None
