"""What a decoder-only transformer is made of, and the families and sizes that are named in papers.

One description covers CM3Leon (OPT without biases and norm parameters), Chameleon, Llama and OPT: the families are
functions that fill the same fields, so a small model of any of them is the same call with small numbers.
"""

import dataclasses
from typing import Literal

from cm3jax.kernels.attention.dispatch import Backend
from cm3jax.models.remat import Remat


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Decoder-only transformer.

    Attributes:
      norm: "layernorm_plain" is LayerNorm without scale and bias.
      norm_order: "pre" is x + f(norm(x)); "swin" is x + norm(f(x)) (Chameleon-34B, after Swin Transformer v2).
      qk_norm: LayerNorm over head_dim of queries and keys, before the rotation.
      bias: biases on every projection.
      init_std, init_cut: weights ~ normal(0, init_std) cut at `init_cut` standard deviations.
      zero_init_residual: both projections that end a residual branch start at zero, so each block starts as identity.
      dtype: of computation; weights are stored in float32.
      remat: what the backward pass recomputes, see `models.remat`.
      scan_layers: one loop over the layers, a small program that compiles quickly. Otherwise each layer is compiled by
        itself, which spares GPUs copies of what the backward pass needs. The weights are the same.
      attention_backend: the kernel for whole sequences, see `kernels.attention`; "auto" goes by the devices.

    Raises:
      ValueError: sizes that do not fit together.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_len: int
    norm: Literal["layernorm_plain", "layernorm", "rmsnorm"] = "layernorm_plain"
    norm_eps: float = 1e-5
    norm_order: Literal["pre", "swin"] = "pre"
    activation: Literal["relu", "gelu", "swiglu"] = "relu"
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    init_std: float = 0.006
    init_cut: float = 3.0
    position_std: float = 0.0002
    zero_init_residual: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    scan_layers: bool = True
    attention_backend: Backend = "auto"

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"transformer: {name} must be >= 1, found {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"transformer: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"transformer: rotary positions need an even head_dim, found {self.head_dim}")


def cm3leon(
    d_model: int, n_layers: int, n_heads: int, vocab_size: int = 65_536, max_len: int = 4096
) -> TransformerConfig:
    """CM3Leon (arXiv 2309.02591, section 3): OPT without biases, dropout and norm parameters.

    The paper does not say the activation nor whether the embeddings are tied; ReLU and tied are OPT's.
    """
    return TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model,
        max_len=max_len,
    )


def opt(d_model: int, n_layers: int, n_heads: int, vocab_size: int = 50_272, max_len: int = 2048) -> TransformerConfig:
    """OPT (arXiv 2205.01068), without its dropout and without the two unused rows of its position table."""
    return dataclasses.replace(
        cm3leon(d_model, n_layers, n_heads, vocab_size, max_len), norm="layernorm", bias=True, position_std=0.006
    )


def llama(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_ff: int,
    vocab_size: int = 128_256,
    max_len: int = 8192,
    rope_theta: float = 500_000.0,
) -> TransformerConfig:
    """Llama (arXiv 2407.21783): RMSNorm, SwiGLU, rotary positions, grouped keys and values, untied head."""
    return TransformerConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads,
        d_ff=d_ff,
        max_len=max_len,
        norm="rmsnorm",
        activation="swiglu",
        positions="rope",
        rope_theta=rope_theta,
        tie_embeddings=False,
        init_std=0.02,
        zero_init_residual=False,
    )


def chameleon(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    d_ff: int,
    vocab_size: int = 65_536,
    max_len: int = 4096,
    norm_order: Literal["pre", "swin"] = "pre",
) -> TransformerConfig:
    """Chameleon (arXiv 2405.09818): Llama 2 with query-key norm; the 34B model norms the branches' outputs."""
    return dataclasses.replace(
        llama(d_model, n_layers, n_heads, n_kv_heads, d_ff, vocab_size, max_len, rope_theta=10_000.0),
        qk_norm=True,
        norm_order=norm_order,
    )


PRESETS: dict[str, TransformerConfig] = {
    "cm3leon-350m": cm3leon(1024, 24, 16),
    "cm3leon-760m": cm3leon(1536, 24, 16),
    "cm3leon-7b": cm3leon(4096, 32, 32),
    "chameleon-7b": chameleon(4096, 32, 32, 32, 11_008),
    "chameleon-34b": chameleon(8192, 48, 64, 8, 22_016, norm_order="swin"),
    "llama3-8b": llama(4096, 32, 32, 8, 14_336),
    "opt-1.3b": opt(2048, 24, 32),
}
