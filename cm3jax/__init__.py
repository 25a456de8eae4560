"""cm3jax: retrieval-augmented text+image token transformers (the CM3Leon family) in JAX."""

__version__ = "0.1.0"
