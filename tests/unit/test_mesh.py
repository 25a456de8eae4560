"""The mesh: axes, sizes, Auto mode, and errors before any device is used."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import AxisType

from cm3jax.parallel.mesh import AXES, MeshConfig, arrange, make_mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=1, fsdp=-1), (1, 1, 8, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 2)),
        (MeshConfig(replica=2, data=-1, tensor=4), (2, 1, 1, 4)),
    ],
)
def test_shape(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_some_of_the_devices(one_device_mesh):
    assert one_device_mesh.devices.shape == (1, 1, 1, 1)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[2:6])
    assert mesh.devices.shape == (1, 2, 2, 1)
    assert list(mesh.devices.flat) == jax.devices()[2:6]
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "'data': 3.* does not cover 8 devices"),
        (MeshConfig(data=-1, tensor=3), "does not cover 8 devices"),
        (MeshConfig(data=-1, tensor=16), "does not cover 8 devices"),
        (MeshConfig(data=16), "does not cover 8 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one axis may be -1"),
        (MeshConfig(tensor=0), "'tensor': 0"),
        (MeshConfig(tensor=-2), "'tensor': -2"),
    ],
)
def test_sizes_that_do_not_fit(config, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(config)


def test_an_axis_may_be_a_part_of_a_side_of_a_torus():
    chips = [
        SimpleNamespace(
            id=16 * x + y, platform="tpu", device_kind="TPU v6 lite", coords=[x, y, 0], core_on_chip=0, process_index=0
        )
        for x in range(16)
        for y in range(16)
    ]
    arranged = arrange((1, 4, 64, 1), chips)
    assert arranged.shape == (1, 4, 64, 1)
    assert sorted(chip.id for chip in arranged.flat) == list(range(256))
    # The 64 chips that gather weights stand together: 16 of one side, 4 of the other.
    sides = [{chip.coords[side] for chip in arranged[0, 0, :, 0]} for side in (0, 1)]
    assert sorted(max(side) - min(side) + 1 for side in sides) == [4, 16]
