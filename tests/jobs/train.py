"""`cm3 train` with neighbours: every document is trained with the one that follows it in its data set before it.

Stands for retrieval, so that sequences hold several records, cut anywhere. What each training sequence is made of is
written to the file `CM3_SAMPLES`, if that is set.
"""

import json
import os
import sys

from cm3jax import cli
from cm3jax.data.plans import Plans
from cm3jax.tasks import lm


class NextRecord:
    fingerprint = "the next record"

    def __init__(self, records: int):
        self.records = records

    def __call__(self, queries, rng):
        return ((queries + 1) % self.records)[:, None]


class Plans_(Plans):
    def __init__(self, mixture, config, seed, neighbours=None):
        super().__init__(mixture, config, seed, neighbours=NextRecord(len(mixture)))


class Sequences(lm.Sequences):
    def __getitem__(self, index):
        epoch, i = self.plans.locate(index)
        if os.environ.get("CM3_SAMPLES") and self.plans.config.spans != "causal":
            with open(os.environ["CM3_SAMPLES"], "a") as file:
                file.write(json.dumps([index, self.plans.epoch(epoch).pieces_of(i).tolist()]) + "\n")
        return super().__getitem__(index)


lm.Plans, lm.Sequences = Plans_, Sequences
sys.exit(cli.main(["train", *sys.argv[1:]]))
