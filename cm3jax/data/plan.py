"""The plan of an epoch: what stands in every training sequence, decided before any token is read.

For each sequence the plan lists its pieces (record, first token, length) and how many masked spans it will have. It is
a pure function of (record lengths, configuration, seed, epoch), a small table and not a second copy of the tokens; what
sequence i holds is therefore known without reading sequences 0 ... i - 1, on any host.
"""

import dataclasses
import logging
import math
from typing import Literal

import numpy as np
from jaxtyping import Integer, UInt16

from cm3jax.data.framing import frame_samples
from cm3jax.data.packing import MARKS_PER_SPAN, Plan, pack_cut, pack_whole
from cm3jax.data.rng import Purpose, generator
from cm3jax.data.samples import Samples

logger = logging.getLogger(__name__)

# The marks of masked spans take at most one in so many tokens of a sequence.
MARKS_SHARE = 4


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """How sequences are made.

    Attributes:
      length: positions the model sees; a sequence has one token more (inputs and targets overlap).
      packing: `cut` concatenates everything and cuts anywhere (the paper); `whole` never splits a sample and pads.
      spans: masked spans of a sequence. `paper`: Poisson(span_rate), none allowed; `fim`: one; `causal`: none.
      span_rate: mean of the Poisson distribution.
      max_spans: no sequence has more; the rest of the distribution falls on it.
    """

    length: int
    packing: Literal["cut", "whole"] = "cut"
    spans: Literal["paper", "fim", "causal"] = "paper"
    span_rate: float = 1.0
    max_spans: int = 512

    def __post_init__(self):
        if self.length < MARKS_PER_SPAN * MARKS_SHARE:
            raise ValueError(f"length {self.length}, expected at least {MARKS_PER_SPAN * MARKS_SHARE}")
        if not 0 < self.span_rate <= 100:
            raise ValueError(f"span_rate {self.span_rate}, expected 0 < span_rate <= 100")
        if self.max_spans < 1:
            raise ValueError(f"max_spans {self.max_spans}, expected at least 1")


def plan_epoch(
    samples: Samples, lengths: Integer[np.ndarray, " R"], config: PlanConfig, sentinels: int, seed: int, epoch: int
) -> Plan:
    """Packs the samples of one epoch into sequences of `config.length` + 1 tokens.

    With `cut`, each token of each sample is in exactly one sequence; with `whole`, each sample that fits in a sequence
    is in exactly one, and the others are counted in `skipped`.

    Args:
      lengths: tokens of all records.
      sentinels: most spans that the vocabulary can mark in a sequence.
    """
    documents = frame_samples(samples, lengths)
    tokens = config.length + 1
    most = min(config.max_spans, sentinels, tokens // (MARKS_PER_SPAN * MARKS_SHARE))
    rng = generator(Purpose.SPAN_COUNTS, seed, epoch)
    if config.packing == "cut":
        shortest = tokens - MARKS_PER_SPAN * most
        bound = math.ceil(int(documents.lengths.sum()) / shortest)
        return pack_cut(documents, tokens, span_counts(bound, config, most, rng))
    counts = span_counts(len(samples), config, most, rng)
    plan = pack_whole(samples, documents, tokens, counts, generator(Purpose.SEQUENCE_ORDER, seed, epoch))
    if plan.skipped:
        logger.warning(
            "epoch %d leaves out %d of %d documents: their samples are longer than a sequence of %d tokens",
            epoch,
            plan.skipped,
            len(documents.records),
            tokens,
        )
    return plan


def span_counts(count: int, config: PlanConfig, most: int, rng: np.random.Generator) -> UInt16[np.ndarray, " N"]:
    """Masked spans of `count` sequences, each at most `most`."""
    if config.spans == "causal":
        return np.zeros(count, np.uint16)
    if config.spans == "fim":
        return np.ones(count, np.uint16)
    # By the inverse of the distribution function: uniform draws stay the same in every NumPy version.
    k = np.arange(1, most)
    cumulative = np.cumsum(np.exp(-config.span_rate) * np.cumprod(np.append(1.0, config.span_rate / k)))
    return np.searchsorted(cumulative, rng.random(count), side="right").astype(np.uint16)
