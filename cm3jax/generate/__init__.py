"""Decoding: cache, grammar, sampling, guidance, infilling."""
