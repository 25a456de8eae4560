"""The image tokenizer's model: shapes, orders, sizes of the presets, precision, sharding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.models.vqgan import PRESETS, VQGAN, VQGANConfig
from cm3jax.models.vqgan_layers import depth_to_space, space_to_depth
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import shardings, weight_specs
from cm3jax.perf.traced import forward_flops

TINY = PRESETS["tiny"]


@functools.cache
def abstract(config):
    """(graph, shapes of the params)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def random_params(shapes):
    """Weights of plausible size for a tree of shapes, without compiling an initialiser."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        spread = math.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.2
        values = rng.standard_normal(leaf.shape).astype(np.float32) * np.float32(spread)
        return jnp.asarray(values + ("scale" in jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def tiny():
    """(graph, params) of the tiny preset."""
    graph, shapes = abstract(TINY)
    return graph, random_params(shapes)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (8, 16, 16, 3)).astype(np.float32)


def run(graph, method):
    """A jitted method of the model as a function of (params, input)."""
    return jax.jit(lambda params, x: getattr(nnx.merge(graph, params), method)(x))


def test_codes_are_the_grid_in_raster_order(tiny, images):
    graph, params = tiny
    reconstructions, quantized = run(graph, "__call__")(params, images)
    codes = run(graph, "encode_codes")(params, images)
    assert reconstructions.shape == images.shape and reconstructions.dtype == jnp.float32
    assert codes.shape == (8, TINY.tokens) and codes.dtype == jnp.int32
    assert np.array_equal(codes.reshape(8, TINY.grid, TINY.grid), quantized.codes)
    np.testing.assert_allclose(run(graph, "decode_codes")(params, codes), reconstructions, atol=2e-5)


def test_other_sides_work_if_they_divide(tiny):
    graph, params = tiny
    encode = run(graph, "encode")
    assert encode(params, np.zeros((1, 8, 24, 3), np.float32)).shape == (1, 2, 6, TINY.embed_dim)
    with pytest.raises(ValueError, match=r"\(16, 18\) are not multiples of 4"):
        encode(params, np.zeros((1, 16, 18, 3), np.float32))
    with pytest.raises(ValueError, match="12 codes do not form a square"):
        run(graph, "decode_codes")(params, np.zeros((1, 12), np.int32))


def test_patches_are_exact_and_ordered():
    x = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    patches = space_to_depth(jnp.asarray(x), 2)
    assert patches.shape == (2, 2, 3, 12)
    assert np.array_equal(patches[1, 0, 2], x[1, 0:2, 4:6].reshape(-1))
    assert np.array_equal(depth_to_space(patches, 2), x)


# GFLOP of encoder and decoder as computed by hand from the published layer shapes; f16_256 has 76.1 M weights.
@pytest.mark.parametrize(
    ("name", "tokens", "encoder", "decoder", "weights"),
    [("f8_256", 1024, 173, 312, None), ("f16_512", 1024, 550, 1004, None), ("f16_256", 256, 138, 253, 76.1)],
)
def test_published_sizes(name, tokens, encoder, decoder, weights):
    config = PRESETS[name]
    graph, params = abstract(config)
    images = jax.ShapeDtypeStruct((1, config.resolution, config.resolution, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, config.grid, config.grid, config.embed_dim), jnp.float32)
    assert config.tokens == tokens
    flops = forward_flops(lambda p, x: nnx.merge(graph, p).encode(x), params, images)
    assert round(flops / 1e9) == encoder
    flops = forward_flops(lambda p, z: nnx.merge(graph, p).decode(z), params, latents)
    assert flops / 1e9 == pytest.approx(decoder, abs=0.6)
    if weights:
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6 == pytest.approx(weights, abs=0.05)


def test_attention_stands_where_the_resolution_says():
    _, params = abstract(PRESETS["f8_256"])
    with_attention = [i for i, level in params["encoder"]["down"].items() if "attn" in level]
    assert with_attention == [3]
    assert [len(params["decoder"]["up"][i].get("attn", {})) for i in range(4)] == [0, 0, 0, 3]
    _, params = abstract(PRESETS["f16_512"])
    assert not any("attn" in level for level in params["encoder"]["down"].values())


def test_scenes_preset_is_affordable():
    config = PRESETS["scenes"]
    graph, params = abstract(config)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    assert config.tokens == 64
    assert forward_flops(lambda p, x: nnx.merge(graph, p)(x), params, images) < 0.25e9


def test_recomputation_changes_no_gradient(images):
    config = dataclasses.replace(TINY, channel_multipliers=(1,))
    graph, shapes = abstract(config)
    params = random_params(shapes)
    remat_graph, _ = abstract(dataclasses.replace(config, remat=True))

    def gradient(graph):
        def objective(params):
            reconstructions, quantized = nnx.merge(graph, params)(images)
            return jnp.mean(jnp.square(reconstructions - images)) + quantized.loss

        return jax.jit(jax.grad(objective)), objective

    plain, remat = gradient(graph)[0](params), gradient(remat_graph)[0](params)
    assert "remat" in str(jax.make_jaxpr(gradient(remat_graph)[1])(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, remat)


def test_bfloat16_stays_close(tiny, images):
    graph, params = tiny
    half_graph, _ = abstract(dataclasses.replace(TINY, dtype="bfloat16"))
    latents, half = run(graph, "encode")(params, images), run(half_graph, "encode")(params, images)
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - latents).max() < 0.05 * np.abs(latents).max()


def test_sharded_equals_unsharded(images):
    config = VQGANConfig(16, 32, (1, 2), codes=16, res_blocks=1, z_channels=8, embed_dim=4, stem_patch=2)
    graph, state = nnx.split(nnx.eval_shape(lambda: VQGAN(config, nnx.Rngs(0))))
    params = random_params(nnx.to_pure_dict(state))
    reconstructions, quantized = run(graph, "__call__")(params, images)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, shardings(mesh, weight_specs(state)))
        assert "fsdp" in spread["encoder"]["mid"]["block_1"]["conv1"]["kernel"].sharding.spec
        ours, codes = jax.jit(lambda p, x: (lambda y, q: (y, q.codes))(*nnx.merge(graph, p)(x)))(spread, images)
    assert np.array_equal(codes, quantized.codes)
    np.testing.assert_allclose(ours, reconstructions, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"resolution": 18}, "resolution 18 is not a multiple"), ({"norm_groups": 3}, "8 channels do not divide into 3")],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
