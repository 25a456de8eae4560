"""Parameters and model FLOPs of a transformer, by formula."""

from cm3jax.models.config import TransformerConfig


def param_count(config: TransformerConfig) -> int:
    """Number of trainable weights."""
    tables = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
    if config.positions == "learned":
        tables += config.max_len * config.d_model
    return tables + config.n_layers * _block_params(config) + _norm_params(config)


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Model FLOPs of forward + backward for one token of a causal sequence of `length` tokens.

    6 P + 6 n_layers d_attention length, where P leaves out the tables that are only looked up (positions; the input
    embedding unless it is also the output matrix) and d_attention = n_heads * head_dim. A weight costs 2 FLOPs forward
    and 4 backward; attention costs 4 d_attention per visible key forward, three times that in all, and a token sees
    length / 2 keys on average. Recomputation is not counted (PaLM, arXiv 2204.02311, appendix B).
    """
    output = config.vocab_size * config.d_model
    weights = output + config.n_layers * _block_params(config) + _norm_params(config)
    return 6.0 * weights + 6.0 * config.n_layers * config.n_heads * config.head_dim * length


def _block_params(config: TransformerConfig) -> int:
    d_model, width = config.d_model, config.head_dim
    projected = (config.n_heads + 2 * config.n_kv_heads) * width
    attention = d_model * projected + config.n_heads * width * d_model
    mlp = (3 if config.activation == "swiglu" else 2) * d_model * config.d_ff
    biases = projected + config.d_ff + 2 * d_model if config.bias else 0
    qk_norm = 2 * (config.n_heads + config.n_kv_heads) * width if config.qk_norm else 0
    return attention + mlp + biases + qk_norm + 2 * _norm_params(config)


def _norm_params(config: TransformerConfig) -> int:
    return {"layernorm_plain": 0, "rmsnorm": 1, "layernorm": 2}[config.norm] * config.d_model
