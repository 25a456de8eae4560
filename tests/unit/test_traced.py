"""FLOPs of programs that run on every device, and of kernels."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import AXES, MeshConfig, make_mesh
from cm3jax.perf.traced import forward_flops


def test_what_runs_on_every_device_counts_for_each():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    a, b = jax.ShapeDtypeStruct((16, 3), jnp.float32), jax.ShapeDtypeStruct((3, 5), jnp.float32)
    product = jax.shard_map(lambda a, b: a @ b, mesh=mesh, in_specs=(P(AXES), P()), out_specs=P(AXES))
    assert forward_flops(product, a, b) == 2 * 16 * 3 * 5


def test_kernels_count_every_cell_of_their_grid():
    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...])

    a = jax.ShapeDtypeStruct((32, 16), jnp.float32)
    call = pl.pallas_call(
        kernel,
        grid=(4,),
        in_specs=[pl.BlockSpec((8, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((8, 16), lambda i: (i, 0)),
        out_shape=a,
        interpret=True,
    )
    assert forward_flops(call, a, jax.ShapeDtypeStruct((16, 16), jnp.float32)) == 2 * 32 * 16 * 16
