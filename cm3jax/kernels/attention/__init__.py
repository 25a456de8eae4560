"""Causal attention: what may be seen (`mask`), the readable form (`dense`), its fast twins, and the choice of one."""

from cm3jax.kernels.attention.dispatch import attention
from cm3jax.kernels.attention.mask import Mask

__all__ = ["Mask", "attention"]
