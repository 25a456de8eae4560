import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cm3jax.config import ConfigError, build, to_dict
from cm3jax.generate.cache import KVCache
from cm3jax.kernels.cross_entropy import cross_entropy
from cm3jax.models.config import PRESETS, TransformerConfig, chameleon, cm3leon, llama, opt
from cm3jax.models.transformer import Transformer
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.parallel.specs import batch_sharding, shardings, weight_specs
from cm3jax.perf.flops import flops_per_token, param_count

VOCAB, LENGTH = 64, 24
TINY = {
    "cm3leon": cm3leon(32, 2, 4, VOCAB, LENGTH),
    "opt": opt(32, 2, 4, VOCAB, LENGTH),
    "llama": llama(32, 2, 4, 2, 48, VOCAB, LENGTH),
    "chameleon": chameleon(32, 2, 4, 4, 48, VOCAB, LENGTH),
    "chameleon-swin": chameleon(32, 2, 4, 2, 48, VOCAB, LENGTH, norm_order="swin"),
    "gelu": dataclasses.replace(cm3leon(32, 2, 4, VOCAB, LENGTH), activation="gelu", tie_embeddings=False),
}


@functools.cache
def noisy_params(config: TransformerConfig):
    """Weights large enough, residual outputs included, that every part of the model shows in the output."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(path, shape):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(rng.normal(centre, 0.2, shape.shape), jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))


def tokens_of(rows: int, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (rows, length), dtype=np.int32)


@functools.cache
def full_forward(config: TransformerConfig):
    """Jitted tokens -> (hidden, logits) of the model with noisy weights."""
    graphdef, params = noisy_params(config)

    def run(tokens):
        model = nnx.merge(graphdef, params)
        hidden = model(tokens)
        return hidden, model.logits(hidden)

    return jax.jit(run)


@pytest.fixture(params=sorted(TINY))
def config(request):
    return TINY[request.param]


def test_hidden_and_logits_have_the_stated_shapes(config):
    hidden, logits = full_forward(config)(tokens_of(2))
    assert hidden.shape == (2, LENGTH, config.d_model)
    assert logits.shape == (2, LENGTH, VOCAB) and logits.dtype == jnp.float32


def test_a_later_token_does_not_change_an_earlier_hidden_state(config):
    tokens = tokens_of(2)
    changed = tokens.copy()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    before, after = (np.asarray(full_forward(config)(t)[0]) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :10], after[:, :10])
    assert np.all(np.any(before[:, 10:] != after[:, 10:], axis=-1))


def decoder(config: TransformerConfig):
    graphdef, params = noisy_params(config)
    return jax.jit(lambda cache, tokens, positions: nnx.merge(graphdef, params).decode(tokens, cache, positions))


def test_decoding_with_a_cache_equals_the_full_forward(config):
    tokens = tokens_of(2)
    full, _ = full_forward(config)(tokens)
    decode, cache, found = decoder(config), KVCache.zeros(config, 2, LENGTH), []
    # A prefill chunk, a second chunk that attends to the first, then token by token.
    for start, end in [(0, 8), (8, 16)] + [(i, i + 1) for i in range(16, LENGTH)]:
        positions = np.tile(np.arange(start, end), (2, 1))
        hidden, cache = decode(cache, tokens[:, start:end], positions)
        found.append(np.asarray(hidden))
    np.testing.assert_allclose(np.concatenate(found, axis=1), full, atol=1e-5, rtol=1e-5)


def test_rows_of_a_cache_may_be_at_different_positions():
    config, tokens, at = TINY["llama"], tokens_of(2), np.array([5, 11])
    full, _ = full_forward(config)(tokens)
    decode = decoder(config)
    _, cache = decode(KVCache.zeros(config, 2, LENGTH), tokens[:, :12], np.tile(np.arange(12), (2, 1)))
    hidden, _ = decode(cache, tokens[[0, 1], at][:, None], at[:, None])
    np.testing.assert_allclose(hidden[:, 0], np.asarray(full)[[0, 1], at], atol=1e-5, rtol=1e-5)


def test_blocks_are_the_identity_at_the_start():
    def build_and_run(tokens):
        model = Transformer(TINY["cm3leon"], nnx.Rngs(0))
        embedded = model.embedding[...][tokens] + model.position_table[...][:LENGTH]
        return model(tokens), model.norm(embedded), model.blocks.attention.out[...], model.blocks.mlp.down[...]

    hidden, normed, attention_out, mlp_out = jax.jit(build_and_run)(tokens_of(1))
    assert not attention_out.any() and not mlp_out.any()
    np.testing.assert_allclose(hidden, normed, atol=1e-5)


def test_initial_weights_follow_the_truncated_normal():
    config = cm3leon(64, 2, 4, 256, 128)
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(0)))))()
    weights = np.asarray(params["blocks"]["mlp"]["up"])
    # Cutting a normal at three standard deviations shrinks its own to 0.98658.
    assert abs(weights.std() / (0.006 * 0.98658) - 1) < 0.02
    assert abs(weights).max() <= 3 * 0.006
    assert abs(np.asarray(params["position_table"]).std() / (0.0002 * 0.98658) - 1) < 0.03
    assert np.abs(weights[0] - weights[1]).max() > 0


def test_tied_output_matrix_is_the_embedding():
    graphdef, params = noisy_params(TINY["cm3leon"])
    assert "head" not in params
    np.testing.assert_array_equal(nnx.merge(graphdef, params).unembedding(), params["embedding"])
    graphdef, params = noisy_params(TINY["llama"])
    np.testing.assert_array_equal(nnx.merge(graphdef, params).unembedding(), params["head"])
    assert np.any(params["head"] != params["embedding"])


def loss_of(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    hidden = model(tokens[:, :-1])
    out = cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.unembedding(),
        tokens[:, 1:].reshape(-1),
        jnp.ones(tokens[:, 1:].size),
        chunk=32,
    )
    return out.loss_sum / out.weight_sum


def test_segments_are_kept_apart_and_positions_restart_in_each(config):
    graphdef, params = noisy_params(config)
    alone = tokens_of(2)
    # One behind the other, and the second within the first.
    segments = np.stack([np.repeat([4, 7], [9, 15]), np.repeat([1, 0, 1], [5, 15, 4])])
    lengths = {4: (0, 9), 7: (1, 15), 1: (0, 9), 0: (1, 15)}
    packed = np.zeros_like(alone)
    for number, (row, length) in lengths.items():
        packed[segments == number] = alone[row, :length]
    found = np.asarray(jax.jit(lambda t, s: nnx.merge(graphdef, params)(t, s))(packed, segments))
    expected, _ = full_forward(config)(alone)
    for number, (row, length) in lengths.items():
        np.testing.assert_allclose(found[segments == number], expected[row, :length], atol=1e-5, rtol=1e-5)


def test_bfloat16_follows_float32():
    tokens, losses = tokens_of(2), []
    for dtype in ("bfloat16", "float32"):
        config = dataclasses.replace(TINY["llama"], dtype=dtype)
        hidden, logits = full_forward(config)(tokens)
        assert hidden.dtype == dtype and logits.dtype == jnp.float32
        losses.append(-np.mean(jax.nn.log_softmax(logits)))
    np.testing.assert_allclose(*losses, rtol=0.02)


def abstract_specs(config: TransformerConfig):
    return weight_specs(nnx.state(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))))


@pytest.mark.parametrize("name", ["chameleon-swin", "opt"])
def test_a_mesh_of_eight_devices_gives_the_same_loss_and_gradients(name):
    graphdef, params = noisy_params(TINY[name])
    tokens = tokens_of(4)
    step = jax.jit(jax.value_and_grad(lambda params, tokens: loss_of(graphdef, params, tokens)))
    loss, grads = step(params, tokens)

    mesh = make_mesh(MeshConfig(replica=1, data=2, fsdp=2, tensor=2))
    specs = abstract_specs(TINY[name])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(mesh, specs))
        mesh_loss, mesh_grads = step(placed, jax.device_put(tokens, batch_sharding(mesh)))
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, mesh_grads)


def test_every_matrix_is_sharded_by_its_name():
    specs = abstract_specs(TINY["llama"])
    assert specs["blocks"]["attention"]["query"] == jax.P(None, "fsdp", "tensor", None)
    assert specs["blocks"]["attention"]["out"] == jax.P(None, "tensor", None, "fsdp")
    assert specs["blocks"]["mlp"]["gate"] == jax.P(None, "fsdp", "tensor")
    assert specs["blocks"]["mlp"]["down"] == jax.P(None, "tensor", "fsdp")
    assert specs["embedding"] == specs["head"] == jax.P("tensor", "fsdp")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_parameter_formula_counts_the_built_model(name):
    shapes = nnx.state(nnx.eval_shape(lambda: Transformer(PRESETS[name], nnx.Rngs(0))))
    assert param_count(PRESETS[name]) == sum(x.size for x in jax.tree.leaves(shapes))


def test_parameter_and_flop_formulas_against_hand_computed_values():
    # Published: 8,030,261,248 parameters.
    assert param_count(PRESETS["llama3-8b"]) == 8_030_261_248
    # 65,536 * 1024 + 4096 * 1024 + 24 * 12 * 1024^2
    assert param_count(PRESETS["cm3leon-350m"]) == 67_108_864 + 4_194_304 + 301_989_888
    # d 8, 2 layers, 2 heads of 4, d_ff 32, vocabulary 16: P = 16*8 + 2*(4*8*8 + 2*8*32) = 1664; 6 * 2 * 8 * 10 = 960.
    assert flops_per_token(cm3leon(8, 2, 2, 16, 12), 10) == 6 * 1664 + 960
    # An untied input table is only looked up: the same count.
    untied = dataclasses.replace(cm3leon(8, 2, 2, 16, 12), tie_embeddings=False)
    assert flops_per_token(untied, 10) == 6 * 1664 + 960


def test_config_survives_a_round_trip_and_refuses_what_cannot_be_built():
    for config in PRESETS.values():
        assert build(TransformerConfig, to_dict(config)) == config
    with pytest.raises(ConfigError, match="activation.*'tanh'"):
        build(TransformerConfig, {**to_dict(PRESETS["cm3leon-350m"]), "activation": "tanh"})
    with pytest.raises(ValueError, match="n_heads 4 is not a multiple of n_kv_heads 3"):
        dataclasses.replace(TINY["llama"], n_kv_heads=3)
    with pytest.raises(ValueError, match="even head_dim, found 7"):
        dataclasses.replace(TINY["llama"], head_dim=7)
    with pytest.raises(ValueError, match="d_model must be >= 1, found 0"):
        dataclasses.replace(TINY["cm3leon"], d_model=0)


def test_too_many_tokens_are_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit in max_len 24"):
        full_forward(TINY["cm3leon"])(tokens_of(1, LENGTH + 1))
