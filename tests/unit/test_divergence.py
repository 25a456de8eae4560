"""Checksums and the comparison of replicas: one changed bit anywhere is found and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.reliability.checksum import checksum, checksums
from cm3jax.reliability.divergence import DivergenceCheck, DivergenceError

MESH = MeshConfig(replica=2, data=2, fsdp=2, tensor=1)
SPECS = {"matrix": P("fsdp", None), "scale": P(), "codes": P(), "half": P(None, "fsdp")}


def values():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(8, 4)).astype(np.float32),
        "scale": rng.normal(size=5).astype(np.float32),
        "codes": rng.integers(-128, 127, 7).astype(np.int8),
        "half": jnp.asarray(rng.normal(size=(2, 6)), jnp.bfloat16),
    }


def place(mesh, tree):
    return {name: jax.device_put(array, NamedSharding(mesh, SPECS[name])) for name, array in tree.items()}


def flip(array, device, byte, bit):
    """`array` with one bit changed in the copy that `device` holds."""
    parts = []
    for shard in array.addressable_shards:
        part = np.array(shard.data)
        if shard.device == device:
            raw = part.view(np.uint8).reshape(-1)
            raw[byte % raw.size] ^= 1 << bit
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_single_bit_changes_the_checksum(name):
    array = np.asarray(values()[name])
    compute = jax.jit(checksum)
    before, seen = int(compute(array)), set()
    for byte in range(array.nbytes):
        for bit in range(8):
            changed = array.copy()
            changed.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            seen.add(int(compute(changed)))
    assert before not in seen


def test_exchanged_values_change_the_checksum():
    array = values()["matrix"]
    assert int(checksum(array)) != int(checksum(array[::-1])) != int(checksum(array[:, ::-1]))


def test_checksums_do_not_depend_on_the_mesh():
    expected = np.asarray(checksums(values()))
    for config in (MESH, MeshConfig(fsdp=2, tensor=4, data=1), MeshConfig(data=-1)):
        np.testing.assert_array_equal(checksums(place(make_mesh(config), values())), expected)


def test_bools_and_wide_numbers_have_checksums():
    assert int(checksum(jnp.array([True, False]))) != int(checksum(jnp.array([False, True])))
    with jax.enable_x64(True):
        assert int(checksum(jnp.array([1.0, 2.0], jnp.float64))) != int(checksum(jnp.array([2.0, 1.0], jnp.float64)))


def test_a_hundred_random_flips_are_found_and_named():
    mesh = make_mesh(MESH)
    state = place(mesh, values())
    check = DivergenceCheck(mesh, state)
    check(state)
    rng = np.random.default_rng(1)
    for _ in range(100):
        name, device = rng.choice(sorted(SPECS)), mesh.devices.flat[rng.integers(8)]
        broken = state | {name: flip(state[name], device, int(rng.integers(1 << 20)), int(rng.integers(8)))}
        with pytest.raises(DivergenceError, match=rf"{name}\[.*\] on device {device.id} \(process 0\)$"):
            check(broken)


def test_two_copies_that_differ_are_both_named():
    mesh = make_mesh(MeshConfig(replica=2, data=1, fsdp=4))
    state = {"matrix": jax.device_put(values()["matrix"], NamedSharding(mesh, P("fsdp", None)))}
    broken = {"matrix": flip(state["matrix"], mesh.devices.flat[5], 3, 2)}
    with pytest.raises(DivergenceError, match=r"matrix\[2:4, \] on device 1 .*, device 5"):
        DivergenceCheck(mesh, state)(broken)


def test_shards_of_one_array_need_not_be_equal():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    state = {"matrix": jax.device_put(values()["matrix"], NamedSharding(mesh, P("fsdp", None)))}
    DivergenceCheck(mesh, state)(state)
