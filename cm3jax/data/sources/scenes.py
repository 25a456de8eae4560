"""The embedded scenes as a source of documents, drawn when asked for."""

from cm3jax import config
from cm3jax.data.scenes.language import long_caption, short_caption
from cm3jax.data.scenes.render import check_size, render
from cm3jax.data.scenes.space import Split, sample, triples
from cm3jax.data.sources.source import check_index
from cm3jax.tokens.document import Document, Image, Text

DRAWING_VERSION = 1  # goes up when the same scene gets other pixels or other words


class ScenesSource:
    """`count` scenes of a split: (short caption, picture) with the truth in `meta`.

    Each document is a pure function of (seed, split, index), so no two machines need to share a file.

    Args:
      split: "train", or "valid" with combinations of subject, color and place that "train" never shows.
      count: documents.
      size: side of the pictures, pixels.
      seed: other seeds give other scenes.

    Raises:
      ValueError: an unknown split, a negative count, a size that cannot be drawn.
    """

    name = "scenes"

    def __init__(self, split: Split, count: int, size: int = 64, seed: int = 0):
        triples(split)
        check_size(size)
        if count < 0:
            raise ValueError(f"scenes count: {count}, expected 0 or more")
        self.split, self.count, self.size, self.seed = split, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document:
        check_index(index, self.count)
        scene = sample(self.seed, self.split, index)
        return Document(
            segments=(Text(short_caption(scene)), Image(render(scene, self.size))),
            id=f"scenes/{self.split}/{self.seed}/{index}",
            meta={"attributes": scene.attributes, "long_caption": long_caption(scene)},
        )

    def fingerprint(self) -> str:
        """Sixteen hex digits; changes with the arguments and with the way scenes are drawn and told."""
        return config.fingerprint([self.name, DRAWING_VERSION, self.split, self.count, self.size, self.seed])
