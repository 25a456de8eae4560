"""The CM3 objective: masked spans move to the end of the sequence (CM3, arXiv 2201.07520; CM3Leon, arXiv 2309.02591).

    a b c d e f   ->   a <sentinel:0> d <sentinel:1> f <sentinel:0> b c <eoss> <sentinel:1> e <eoss>

The loss stays plain next-token prediction; the model learns to continue and to fill in at once.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32, Integer

from cm3jax.data.packing import MARKS_PER_SPAN
from cm3jax.data.spans import choose_spans
from cm3jax.tokens.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class CM3Config:
    """What is masked and what is learnt.

    Attributes:
      whole_segment: probability that a sequence's spans are whole captions or images.
      loss_on_sentinels: False gives `<sentinel:i>` weight 0, as the CM3 and InCoder papers do.
    """

    whole_segment: float = 0.5
    loss_on_sentinels: bool = True

    def __post_init__(self):
        if not 0 <= self.whole_segment <= 1:
            raise ValueError(f"whole_segment {self.whole_segment}, expected a probability")


def transform(
    ids: Integer[np.ndarray, " S"],
    spans: int,
    length: int,
    rng: np.random.Generator,
    config: CM3Config,
    vocabulary: Vocabulary,
) -> tuple[Int32[np.ndarray, " T"], Float32[np.ndarray, " T"]]:
    """Masks `spans` spans of `ids` and pads to T = `length` + 1.

    Args:
      ids: packed documents, without padding, S <= length + 1 - 3 * spans.

    Returns:
      tokens, and the weight of each token as a target: 0 for padding, else 1 (but see `CM3Config`).

    Raises:
      ValueError: `ids` is too long for so many spans, or has `<eoss>` or a sentinel in it already.
    """
    if len(ids) + MARKS_PER_SPAN * spans > length + 1:
        raise ValueError(f"{len(ids)} ids and the marks of {spans} spans do not fit in {length + 1} tokens")
    marks = vocabulary.is_sentinel(ids) | (ids == vocabulary.eoss)
    if marks.any():
        place = int(np.argmax(marks))
        raise ValueError(f"{vocabulary.name(int(ids[place]))} at position {place}: only the objective may write that")
    parts, infills, at = [], [], 0
    for i, (start, end) in enumerate(choose_spans(ids, spans, config.whole_segment, rng, vocabulary)):
        sentinel = [vocabulary.sentinel(i)]
        parts += [ids[at:start], sentinel]
        infills += [sentinel, ids[start:end], [vocabulary.eoss]]
        at = end
    masked = np.concatenate([*parts, ids[at:], *infills])
    tokens = np.full(length + 1, vocabulary.pad, np.int32)
    tokens[: len(masked)] = masked
    return tokens, _weights(tokens, len(masked), config, vocabulary)


def _weights(
    tokens: Int32[np.ndarray, " T"], used: int, config: CM3Config, vocabulary: Vocabulary
) -> Float32[np.ndarray, " T"]:
    weights = np.zeros(len(tokens), np.float32)
    weights[:used] = 1
    if not config.loss_on_sentinels:
        weights[vocabulary.is_sentinel(tokens)] = 0
    return weights


def invert(tokens: Integer[np.ndarray, " T"], vocabulary: Vocabulary) -> Integer[np.ndarray, " S"]:
    """The ids that `transform` was given: infills back in their holes, padding off.

    Raises:
      ValueError: the tokens are no output of `transform`.
    """
    tokens = tokens[: int(np.max(np.flatnonzero(tokens != vocabulary.pad), initial=-1)) + 1]
    marks = np.flatnonzero(vocabulary.is_sentinel(tokens))
    if not len(marks):
        return tokens
    holes, infills = np.split(marks, [len(marks) // 2])
    ends = np.append(infills[1:], len(tokens)) - 1
    numbers = np.arange(len(infills)) + vocabulary.sentinel_start
    if not (
        np.array_equal(tokens[holes], numbers)
        and np.array_equal(tokens[infills], numbers)
        and np.all(tokens[ends] == vocabulary.eoss)
    ):
        raise ValueError(f"not a CM3 sequence: sentinels at {marks.tolist()} do not pair up and end in <eoss>")
    parts, at = [], 0
    for hole, infill, end in zip(holes, infills, ends, strict=True):
        parts += [tokens[at:hole], tokens[infill + 1 : end]]
        at = hole + 1
    return np.concatenate([*parts, tokens[at : infills[0]]])
