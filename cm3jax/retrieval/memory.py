"""The memory as requests use it: a document, whole or in part, in; whole documents like it, as ids, out.

memory = Memory.load("embeddings/train")
found = memory.retrieve(Document((Text("one red dog on the grass"),)), 2)

The encoder, the search and the rules are those of training, with two differences: nothing of the query is dropped,
which in training makes it harder, and nothing is drawn: the best documents are taken.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from cm3jax.data.records import Records
from cm3jax.parallel.mesh import one_device
from cm3jax.retrieval.embeddings import Column, Embeddings, RetrievalError, complete
from cm3jax.retrieval.encoder import DocumentEncoder, averaged, load_encoder
from cm3jax.retrieval.hits import hits_by_part
from cm3jax.retrieval.places import read_places
from cm3jax.retrieval.search import ExactIndex
from cm3jax.retrieval.select import SelectionConfig, in_turns, select
from cm3jax.tokens.document import Document

# Documents that are encoded at once, at least: requests come in small numbers, and a batch is always filled up.
ENCODED = 8
RULES = SelectionConfig()


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieved:
    """A document of the memory.

    Attributes:
      record: its row.
      id: of the document in its source.
      score: inner product of its embedding with that of the part of the query that found it.
      ids: the record's: texts and images with `<break>` between them.
    """

    record: int
    id: str
    score: float
    ids: tuple[int, ...]


class Memory:
    """Records that can be searched by documents.

    Attributes:
      records: what is retrieved from.
      encoder: what the records were embedded with, and the queries are.
    """

    def __init__(
        self,
        embeddings: Embeddings,
        records: Records,
        encoder: DocumentEncoder,
        selection: SelectionConfig = RULES,
        mesh: jax.sharding.Mesh | None = None,
    ):
        """The bank goes to the devices of `mesh`, by default to the first one.

        Args:
          selection: thresholds, and how many hits are looked at; how many are taken is said with each query.

        Raises:
          RetrievalError: records or encoder are not those that the embeddings were made from.
        """
        made_from = embeddings.manifest
        for what, found, expected in (
            (f"the records {records.directory}", records.fingerprint, made_from.records),
            ("the encoder", encoder.fingerprint, made_from.encoder),
        ):
            if found != expected:
                raise RetrievalError(
                    f"{embeddings.directory}: made from {expected}, {what} has the fingerprint {found}"
                )
        self.records, self.encoder, self._selection = records, encoder, selection
        self._bank, self._complete = Column(embeddings.shards, "document"), complete(embeddings.shards)
        self._index = ExactIndex(self._bank, mesh or one_device())

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        records: str | os.PathLike[str] | None = None,
        encoder: DocumentEncoder | None = None,
        selection: SelectionConfig = RULES,
        mesh: jax.sharding.Mesh | None = None,
    ) -> "Memory":
        """A folder of embeddings with the records and the encoder that they were made from.

        Args:
          records, encoder: where they are not those that `places.json` in the folder names.

        Raises:
          RetrievalError: the embeddings, or what they were made from, are missing, damaged or others.
          RecordsError, ConfigError, ValueError: records or an encoder that cannot be read.
        """
        directory = pathlib.Path(directory)
        embeddings = Embeddings(directory)
        if records is None:
            records = read_places(directory).records
        if encoder is None:
            places = read_places(directory)
            encoder = request_encoder(places.encoder, size=places.size, tokenizer=places.tokenizer, mesh=mesh)
        return cls(embeddings, Records(records), encoder, selection, mesh)

    def retrieve(self, query: Document, n: int) -> list[Retrieved]:
        """At most `n` documents for one query; see `retrieve_each`."""
        return self.retrieve_each([query], n)[0]

    def retrieve_each(self, queries: Sequence[Document], n: int) -> list[list[Retrieved]]:
        """For each query at most `n` documents, best first, fewer where the rules leave fewer.

        Of a query with text and picture those found by its picture and by its text take turns.

        Args:
          queries: with text, or a picture of any size as pixels, or both.

        Raises:
          ValueError: n < 1, or a query with neither.
        """
        if n < 1:
            raise ValueError(f"retrieve: {n} documents, expected at least 1")
        if not queries:
            return []
        for number, query in enumerate(queries):
            if not self.understands(query):
                raise ValueError(f"retrieve: query {number} has neither text nor picture")
        images, texts = self.encoder.parts(queries)
        rules = dataclasses.replace(
            self._selection, by_image=n, by_text=n, searched=max(n, self._selection.searched), query_dropout=0.0
        )
        by_image, by_text = (hits_by_part(self._index, part, rules.searched) for part in (images, texts))
        own = np.full(len(queries), -1)
        found = select(by_image, by_text, averaged([texts, images]), self._bank, self._complete, own, rules)
        return [
            [self._document(int(found.ids[row, place]), float(found.scores[row, place])) for place in places]
            for row, places in enumerate(in_turns(found, n, rules))
        ]

    def understands(self, query: Document) -> bool:
        """Whether the query has a text that the encoder has ids for, or a picture."""
        ids, pixels = self.encoder.inputs(query)
        return bool(ids) or pixels is not None

    def _document(self, row: int, score: float) -> Retrieved:
        record = self.records[row]
        return Retrieved(row, record.id, score, tuple(record.ids.tolist()))


def request_encoder(
    path: str | os.PathLike[str],
    *,
    size: str | None = None,
    tokenizer: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> DocumentEncoder:
    """`load_encoder` for the few documents of requests, by default on the first device."""
    mesh = mesh or one_device()
    batch_size = -(-ENCODED // mesh.size) * mesh.size
    return load_encoder(pathlib.Path(path), mesh, size=size, tokenizer=tokenizer, batch_size=batch_size)
