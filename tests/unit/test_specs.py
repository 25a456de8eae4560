"""Named shardings: the table is consistent with the mesh, and names reach the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import AXES, MeshConfig, make_mesh
from cm3jax.parallel.specs import ACTIVATIONS, BATCH, WEIGHTS, batch_sharding, constrain, shardings, weight_specs

ALL_SPECS = {f"weight {name}": spec for name, spec in WEIGHTS.items()} | {
    f"activation {name}": spec for name, spec in ACTIVATIONS.items()
}


def axes_of(spec):
    for entry in spec:
        yield from entry if isinstance(entry, tuple) else () if entry is None else (entry,)


@pytest.mark.parametrize("name", ALL_SPECS)
def test_a_spec_names_axes_of_the_mesh_and_none_twice(name):
    used = list(axes_of(ALL_SPECS[name]))
    assert set(used) <= set(AXES)
    assert len(used) == len(set(used))


def test_no_activation_shares_the_axes_of_the_batch():
    for name, spec in ACTIVATIONS.items():
        if spec and spec[0] == BATCH:
            assert not set(BATCH) & set(axes_of(spec[1:])), name


@pytest.mark.parametrize("name", sorted(set(WEIGHTS) - {"replicated"}))
def test_every_weight_can_be_placed_on_a_full_mesh(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shape = (4,) * len(WEIGHTS[name])
    array = jax.device_put(jnp.zeros(shape), NamedSharding(mesh, WEIGHTS[name]))
    parts = np.prod([mesh.shape[axis] for axis in axes_of(WEIGHTS[name])], dtype=int)
    assert np.prod(array.addressable_shards[0].data.shape) * parts == np.prod(shape)


class Tagged(nnx.Module):
    def __init__(self):
        self.up = nnx.Param(jnp.zeros((4, 8)), spec="mlp_up")
        self.bias = nnx.Param(jnp.zeros((8,)))
        self.layers = nnx.List([nnx.Param(jnp.zeros((3, 8, 4)), spec="mlp_down")])


def test_weight_specs_follow_the_tags_and_stacked_layers_stay_whole():
    module = Tagged()
    specs = weight_specs(nnx.state(module))
    assert specs["up"] == P("fsdp", "tensor")
    assert tuple(specs["bias"]) == ()
    assert specs["layers"][0] == P(None, "tensor", "fsdp")
    params = nnx.to_pure_dict(nnx.state(module))
    assert jax.tree.structure(params) == jax.tree.structure(specs, is_leaf=lambda s: isinstance(s, P))


def test_an_unknown_tag_is_an_error():
    module = nnx.Dict(w=nnx.Param(jnp.zeros(3), spec="no_such_spec"))
    with pytest.raises(KeyError, match="no_such_spec"):
        weight_specs(nnx.state(module))


def test_shardings_bind_every_spec_to_the_mesh(one_device_mesh):
    bound = shardings(one_device_mesh, {"a": P("fsdp"), "b": {"c": P()}})
    assert bound == {"a": NamedSharding(one_device_mesh, P("fsdp")), "b": {"c": NamedSharding(one_device_mesh, P())}}


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((2, 3))
    assert constrain(x, "tokens") is x


def test_constrain_lays_an_activation_out():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x * 2, "hidden"))(jnp.ones((4, 3, 6)))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, ACTIVATIONS["hidden"]), 3)
    assert out.addressable_shards[0].data.shape == (1, 3, 3)
    np.testing.assert_array_equal(out, np.full((4, 3, 6), 2.0))


def test_batch_rows_are_split_over_every_axis_but_tensor():
    mesh = make_mesh(MeshConfig(replica=2, data=1, fsdp=2, tensor=2))
    rows = jax.device_put(np.arange(8), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}
