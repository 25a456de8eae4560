"""What a dual encoder is made of, and CLIP's named sizes."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """One transformer of the two; its feed-forward is four times as wide."""

    d_model: int
    n_layers: int
    n_heads: int

    def __post_init__(self):
        if min(self.d_model, self.n_layers, self.n_heads) < 1 or self.d_model % self.n_heads:
            raise ValueError(f"clip tower: expected sizes >= 1 and d_model a multiple of n_heads, found {self}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Image encoder (ViT) and text encoder with one space of features.

    Attributes:
      embed_dim: of the features.
      image_size, patch_size: sides in pixels.
      vocab_size, context: of the rows of the text encoder.
      end_id: the feature of a text is read where this id first stands.
      bias: of the similarities, as the sigmoid loss needs (SigLIP, arXiv 2303.15343, section 3.2).
      dtype: of computation; weights and features are float32.
    """

    embed_dim: int
    image: TowerConfig
    text: TowerConfig
    image_size: int = 224
    patch_size: int = 32
    vocab_size: int = 49_408
    context: int = 77
    end_id: int = 49_407
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    bias: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if self.embed_dim < 1 or self.context < 2:
            raise ValueError(f"clip: embed_dim {self.embed_dim} must be >= 1 and context {self.context} >= 2")
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise ValueError(f"clip: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if not 0 <= self.end_id < self.vocab_size:
            raise ValueError(f"clip: end_id {self.end_id}, expected 0 <= end_id < vocab_size {self.vocab_size}")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


PRESETS: dict[str, CLIPConfig] = {
    "vit-b-32": CLIPConfig(512, TowerConfig(768, 12, 12), TowerConfig(512, 12, 8)),
    "vit-l-14": CLIPConfig(768, TowerConfig(1024, 24, 16), TowerConfig(768, 12, 12), patch_size=14),
}


def small(image_size: int, vocab_size: int, end_id: int, context: int, width: int = 128, layers: int = 3) -> CLIPConfig:
    """An encoder that two CPU cores can train, for the project's own text tokenizer."""
    tower = TowerConfig(width, layers, width // 32)
    return CLIPConfig(
        embed_dim=width,
        image=tower,
        text=tower,
        image_size=image_size,
        patch_size=8,
        vocab_size=vocab_size,
        context=context,
        end_id=end_id,
        activation="gelu",
    )
