"""Matrices as decoding holds them, against the products they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.generate.weights import Int8Matrix, Matrix, product
from cm3jax.models.layers import project

# Shapes of weights, and how many axes are summed over.
SHAPES = {"up": ((24, 40), 1), "queries": ((24, 3, 8), 1), "out": ((3, 8, 24), 2)}


def drawn(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 2, 16, 70])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_multiplies_as_the_weight_that_it_was_made_of(shape, rows):
    sizes, inputs = SHAPES[shape]
    weight, x = drawn(*sizes), drawn(rows, 2, *sizes[:inputs])
    expected = np.tensordot(x.astype(np.float64), weight.astype(np.float64), inputs)
    found = jax.jit(project)(x, Matrix.of(jnp.asarray(weight), inputs))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, project(x, nnx.Param(jnp.asarray(weight))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_off_by_half_a_step_of_each_output_at_most(shape):
    sizes, inputs = SHAPES[shape]
    weight = drawn(*sizes)
    weight.reshape(-1, *sizes[inputs:])[:, 0] *= 100  # one output of another size, which must not coarsen the rest
    size = int(np.prod(sizes[:inputs]))
    unit = np.eye(size, dtype=np.float32).reshape(size, 1, *sizes[:inputs])
    kept = np.asarray(project(jnp.asarray(unit), Int8Matrix.of(jnp.asarray(weight), inputs)))[:, 0]
    flat = weight.reshape(size, *sizes[inputs:])
    half = np.abs(flat).max(axis=0) / 127 / 2
    assert np.all(np.abs(kept - flat) <= half * 1.001)
    assert np.any(np.abs(kept - flat) > half * 0.5)


def test_products_come_in_the_type_that_was_asked_for():
    x, rows = drawn(3, 8).astype(jnp.bfloat16), drawn(5, 8).astype(jnp.bfloat16)
    exact = x.astype(np.float64) @ rows.astype(np.float64).T
    found = product(jnp.asarray(x), jnp.asarray(rows), jnp.float32)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    assert product(jnp.asarray(x), jnp.asarray(rows), jnp.bfloat16).dtype == jnp.bfloat16


def test_on_cpus_the_rows_stand_on_the_left_of_the_product():
    x, rows = jax.ShapeDtypeStruct((16, 64), jnp.float32), jax.ShapeDtypeStruct((96, 64), jnp.float32)
    text = jax.jit(lambda x, rows: product(x, rows, jnp.float32)).trace(x, rows).lower(lowering_platforms=("cpu",))
    assert "tensor<96x64xf32>, tensor<64x16xf32>" in text.as_text()
    text = jax.jit(lambda x, rows: product(x, rows, jnp.float32)).trace(x, rows).lower(lowering_platforms=("tpu",))
    assert "tensor<16x64xf32>, tensor<64x96xf32>" in text.as_text()
