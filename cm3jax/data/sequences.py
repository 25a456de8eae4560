"""Training sequences by random access: fetch what the plan lists, then apply the objective."""

import numpy as np
from jaxtyping import Int32, Shaped

from cm3jax import config
from cm3jax.data.cm3 import CM3Config, transform
from cm3jax.data.framing import framed_ids, query_tokens
from cm3jax.data.plans import Plans
from cm3jax.data.rng import Purpose, generator


class Sequences:
    """Sequence `index` of the endless training stream, a pure function of (data, configuration, seed, index).

    Attributes:
      fingerprint: changes when any sequence would.
    """

    def __init__(self, plans: Plans, config_: CM3Config):
        self.plans, self.config = plans, config_
        self.mixture = plans.mixture
        self.fingerprint = config.fingerprint([plans.fingerprint, config.to_dict(config_)])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`tokens` int32 [length + 1] and `weights` float32 [length + 1], the weight of each token as a target.

        Raises:
          IndexError: a negative index.
          ValueError: a record is not what the plan was made for.
        """
        epoch, i = self.plans.locate(index)
        plan = self.plans.epoch(epoch)
        tokens, weights = transform(
            self.fetch(plan.pieces_of(i)),
            int(plan.spans[i]),
            self.plans.config.length,
            generator(Purpose.SPANS, self.plans.seed, epoch, i),
            self.config,
            self.mixture.vocabulary,
        )
        return {"tokens": tokens, "weights": weights}

    def fetch(self, pieces: Shaped[np.ndarray, " K"]) -> Int32[np.ndarray, " S"]:
        """The tokens of `pieces` (dtype `PIECE`), one after the other."""
        return np.concatenate([self._piece(*piece) for piece in pieces.tolist()])

    def _piece(self, record: int, first: int, length: int, frame: int) -> Int32[np.ndarray, " length"]:
        ids = self.mixture[record].ids
        if len(ids) != self.mixture.lengths[record]:
            raise ValueError(f"record {record} has {len(ids)} tokens, planned were {self.mixture.lengths[record]}")
        return framed_ids(ids, frame, self.mixture.vocabulary)[first : first + length]


class CausalSequences(Sequences):
    """Sequences as they stand, without masked spans, in which the tokens of the queries are known."""

    def __init__(self, plans: Plans, config_: CM3Config):
        """As `Sequences`.

        Raises:
          ValueError: the plans mask spans.
        """
        if plans.config.spans != "causal":
            raise ValueError(f"spans {plans.config.spans!r}: tokens that move are no longer known, expected 'causal'")
        super().__init__(plans, config_)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """As of `Sequences`, with `query` float32 [length + 1]: 1 for the tokens of queries (see `query_tokens`)."""
        epoch, i = self.plans.locate(index)
        marked = query_tokens(self.plans.epoch(epoch).pieces_of(i))
        query = np.zeros(self.plans.config.length + 1, np.float32)
        query[: len(marked)] = marked
        return super().__getitem__(index) | {"query": query}
