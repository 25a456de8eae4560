"""One id space for text, image codes and the marks that structure a document.

Layout, in order (sizes of the paper's 2^16 table; every size is a field):

    [0, 4)                    control ids  <s> <pad> </s> <unk>
    [4, text_size)            text pieces
    [text_size, +image_size)  image codes
    then                      <break>, <eoss>, <sentinel:0> ... , reserved ids up to `size`

`<mask>` and `<infill>` of the CM3Leon paper are the first and the second appearance of one `<sentinel:i>`.
"""

import dataclasses

import numpy as np

CONTROL_IDS = 4


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Ranges of the unified id space. `text_size` counts the four control ids.

    Raises:
      ValueError: the parts do not fit in `size`.
    """

    text_size: int = 56_320
    image_size: int = 8_192
    sentinels: int = 512
    size: int = 65_536

    bos: int = dataclasses.field(default=0, init=False)
    pad: int = dataclasses.field(default=1, init=False)
    eos: int = dataclasses.field(default=2, init=False)
    unk: int = dataclasses.field(default=3, init=False)

    def __post_init__(self):
        if self.text_size < CONTROL_IDS or self.image_size < 1 or self.sentinels < 1:
            raise ValueError(
                f"vocabulary: text_size {self.text_size} must be >= {CONTROL_IDS}, "
                f"image_size {self.image_size} and sentinels {self.sentinels} >= 1"
            )
        if self.used > self.size:
            raise ValueError(f"vocabulary: {self.used} ids in use do not fit in size {self.size}")

    @property
    def image_start(self) -> int:
        return self.text_size

    @property
    def image_end(self) -> int:
        return self.text_size + self.image_size

    @property
    def break_id(self) -> int:
        return self.image_end

    @property
    def eoss(self) -> int:
        """End of an infilled span."""
        return self.image_end + 1

    @property
    def sentinel_start(self) -> int:
        return self.image_end + 2

    @property
    def used(self) -> int:
        """Ids with a meaning; `[used, size)` is reserved."""
        return self.sentinel_start + self.sentinels

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds every id: what records store."""
        return np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)

    def sentinel(self, i: int) -> int:
        if not 0 <= i < self.sentinels:
            raise ValueError(f"sentinel {i} out of range, expected 0 <= i < {self.sentinels}")
        return self.sentinel_start + i

    def image_id(self, codes):
        """Codes [...] in [0, image_size) to ids [...]."""
        return codes + self.image_start

    def image_code(self, ids):
        """Ids [...] of image tokens to codes [...]."""
        return ids - self.image_start

    def is_text(self, ids):
        """True where an id [...] is a text piece (control ids are not)."""
        return (ids >= CONTROL_IDS) & (ids < self.text_size)

    def is_image(self, ids):
        return (ids >= self.image_start) & (ids < self.image_end)

    def is_sentinel(self, ids):
        return (ids >= self.sentinel_start) & (ids < self.used)

    def is_boundary(self, ids):
        """True where a masked span must not pass: `<break>`, `</s>` and padding."""
        return (ids == self.break_id) | (ids == self.eos) | (ids == self.pad)

    def name(self, i: int) -> str:
        """Human-readable name of one id, for error messages and dumps."""
        control = {self.bos: "<s>", self.pad: "<pad>", self.eos: "</s>", self.unk: "<unk>"}
        if i in control:
            return control[i]
        if self.is_text(i):
            return f"text:{i}"
        if self.is_image(i):
            return f"image:{i - self.image_start}"
        if self.is_sentinel(i):
            return f"<sentinel:{i - self.sentinel_start}>"
        return {self.break_id: "<break>", self.eoss: "<eoss>"}.get(i, f"reserved:{i}")
