"""Losses of the image tokenizer, its discriminator, its perceptual weights, and FLOPs counted from a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from cm3jax.losses import adaptive_weight, generator_loss, hinge_discriminator_loss, psnr, reconstruction_loss
from cm3jax.models.discriminator import BatchNorm, Discriminator, DiscriminatorConfig
from cm3jax.models.perceptual import STAGES, load_lpips
from cm3jax.perf.traced import forward_flops


def test_reconstruction_terms():
    images = jnp.zeros((1, 2, 2, 1))
    reconstructions = jnp.asarray([0.5, -0.5, 1.0, 0.0]).reshape(1, 2, 2, 1)
    assert reconstruction_loss(reconstructions, images, 1.0, 0.0) == pytest.approx(0.5)
    assert reconstruction_loss(reconstructions, images, 2.0, 4.0) == pytest.approx(2 * 0.5 + 4 * 0.375)


def test_psnr_is_per_image_of_range_two():
    images = jnp.zeros((3, 4, 4, 3))
    reconstructions = images.at[0].set(2.0).at[1].set(0.02)
    np.testing.assert_allclose(psnr(reconstructions, images), [0, 40, 100], atol=1e-4)


def test_hinge_stops_at_the_margin():
    assert hinge_discriminator_loss(jnp.asarray([2.0, 1.0]), jnp.asarray([-1.0, -3.0])) == 0
    assert hinge_discriminator_loss(jnp.asarray([0.0, 2.0]), jnp.asarray([0.5])) == pytest.approx(0.5 * (0.5 + 1.5))
    assert generator_loss(jnp.asarray([1.0, 3.0])) == -2


def test_adaptive_weight_is_bounded_and_has_no_gradient():
    ones = jnp.ones((3, 3))
    assert adaptive_weight(6 * ones, 2 * ones) == pytest.approx(3, rel=1e-4)
    assert adaptive_weight(ones, 0 * ones) == 1e4
    assert adaptive_weight(0 * ones, ones) == 0
    assert not np.any(jax.grad(lambda g: adaptive_weight(g, ones))(ones))


def test_discriminator_judges_patches_of_70_pixels():
    def logits(x):
        return Discriminator(DiscriminatorConfig(channels=2), nnx.Rngs(0))(x)

    def one_logit(x):
        """Without normalisation, which mixes all positions."""
        model = Discriminator(DiscriminatorConfig(channels=2), nnx.Rngs(0))
        x = model.conv_in(x)
        for layer in model.convs:
            x = layer(x)
        return model.conv_out(x)[0, 5, 5, 0]

    image = jnp.zeros((1, 96, 96, 3))
    assert jax.eval_shape(logits, image).shape == (1, 10, 10, 1)
    rows = np.flatnonzero(np.abs(jax.jit(jax.grad(one_logit))(image)).sum(axis=(0, 2, 3)))
    assert rows[-1] - rows[0] + 1 == 70


def test_batch_norm_follows_the_batch_at_hand():
    norm = BatchNorm(3, nnx.Rngs(0))
    assert set(nnx.to_pure_dict(nnx.state(norm))) == {"scale", "bias"}  # no running averages
    x = 5 + 3 * jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    normalized = (norm(x) - norm.bias[...]) / norm.scale[...]
    np.testing.assert_allclose(normalized.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(normalized.std((0, 1, 2)), 1, atol=1e-5)


def write_weights(folder, **changed):
    tensors = {
        f"features.{index}.{name}": np.zeros(shape, np.float32)
        for stage in STAGES
        for index, i, o in stage
        for name, shape in (("weight", (o, i, 3, 3)), ("bias", (o,)))
    }
    tensors = {k: v for k, v in (tensors | changed).items() if v is not None}
    save_file(tensors, folder / "vgg.safetensors")
    return folder / "vgg.safetensors"


def test_the_published_heads_are_read(tmp_path, shared_data):
    weights = load_lpips(write_weights(tmp_path), shared_data / "lpips" / "v0.1" / "vgg.npz")
    assert [head.shape for head in weights.heads] == [(64,), (128,), (256,), (512,), (512,)]
    assert all(head.min() >= 0 for head in weights.heads)


def test_bad_weight_files_are_named(tmp_path):
    heads = tmp_path / "heads.npz"
    np.savez(
        heads, **{f"lin{i}.model.1.weight": np.ones((1, s[-1][2], 1, 1), np.float32) for i, s in enumerate(STAGES)}
    )
    with pytest.raises(ValueError, match=r"vgg.safetensors: no array 'features.7.bias'"):
        load_lpips(write_weights(tmp_path, **{"features.7.bias": None}), heads)
    with pytest.raises(ValueError, match=r"features.2.bias has shape \(3,\), expected \(64,\)"):
        load_lpips(write_weights(tmp_path, **{"features.2.bias": np.zeros(3, np.float32)}), heads)
    with pytest.raises(ValueError, match="heads.npz: not a readable npz"):
        heads.write_bytes(b"not a zip")
        load_lpips(write_weights(tmp_path), heads)
    with pytest.raises(ValueError, match="absent.safetensors: not a readable"):
        load_lpips(tmp_path / "absent.safetensors", heads)


def test_objects_are_not_unpickled(tmp_path):
    heads = tmp_path / "heads.npz"
    np.savez(heads, **{"lin0.model.1.weight": np.asarray([{}], object)})
    with pytest.raises(ValueError, match="heads.npz: not a readable npz"):
        load_lpips(write_weights(tmp_path), heads)


def test_traced_flops():
    a, b = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32), jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
    product = 2 * (2 * 3 * 7) * 5
    assert forward_flops(lambda a, b: a @ b, a, b) == product
    assert forward_flops(jax.jit(jax.checkpoint(lambda a, b: jnp.tanh(a @ b))), a, b) == product
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    many = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=6)[0]  # noqa: E731
    assert forward_flops(many, square) == 6 * 2 * 4**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)  # noqa: E731
    assert forward_flops(branch, square) == 2 * 2 * 4**3
    image, kernel = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32)
    conv = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert forward_flops(conv, image, kernel) == 2 * (4 * 4 * 4) * (9 * 3)
