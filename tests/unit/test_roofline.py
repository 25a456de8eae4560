"""Predictions against numbers worked out by hand."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cm3jax.parallel.mesh import AXES
from cm3jax.perf.collectives import Collective
from cm3jax.perf.hardware import HARDWARE, device_name, find_hardware, peak_flops
from cm3jax.perf.roofline import collective_seconds, group_rate, roofline
from cm3jax.perf.traffic import Traffic, Work

V5P, V6E, H100 = (next(row for row in HARDWARE if row.name == name) for name in ("v5p", "v6e", "h100"))


def torus(sides, mesh_shape, slices=1):
    """A mesh over chips that are numbered along the last side first."""
    places = [(s, place) for s in range(slices) for place in np.ndindex(*sides)]
    devices = np.empty(len(places), object)
    devices[:] = [SimpleNamespace(coords=list(place), slice_index=s) for s, place in places]
    return SimpleNamespace(
        devices=devices.reshape(mesh_shape),
        axis_names=AXES,
        size=len(places),
        shape=dict(zip(AXES, mesh_shape, strict=True)),
    )


@pytest.mark.parametrize(
    ("kind", "name", "flops"),
    [
        ("TPU v4", "v4", 275e12),
        ("TPU v5 lite", "v5e", 197e12),
        ("TPU v5", "v5p", 459e12),
        ("TPU v5p", "v5p", 459e12),
        ("TPU v6 lite", "v6e", 918e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
    ],
)
def test_device_kinds_are_found_by_their_longest_beginning(kind, name, flops):
    assert device_name(kind) == name
    assert peak_flops(SimpleNamespace(platform="other", device_kind=kind)) == flops


def test_unknown_devices_have_no_figures():
    assert find_hardware("TPU v9") is None
    assert device_name("cpu") == "cpu"
    with pytest.raises(ValueError, match=r"no peak rate known for 'TPU v9'; known: TPU v4, "):
        peak_flops(SimpleNamespace(platform="tpu", device_kind="TPU v9"))


def test_the_table_agrees_with_itself():
    assert len({kind for row in HARDWARE for kind in row.kinds}) == sum(len(row.kinds) for row in HARDWARE)
    assert V5P.all_links_rate == 600e9 and H100.all_links_rate == 450e9
    for row in HARDWARE:
        # Memory is slower than arithmetic and faster than links, and those are faster than the network.
        assert row.flops > row.hbm_rate > row.all_links_rate > row.network_rate > 0
        assert row.hbm_bytes > 1e10


def test_links_of_a_group_follow_from_where_its_devices_stand():
    mesh = torus((4, 4, 4), (1, 1, 64, 1))
    flat = mesh.devices.ravel()
    assert group_rate(V5P, mesh, flat) == 600e9  # three rings
    assert group_rate(V5P, mesh, flat[:16]) == 400e9  # two
    assert group_rate(V5P, mesh, flat[:4]) == 200e9  # one
    assert group_rate(V5P, mesh, flat[:2]) == 100e9  # a line
    assert group_rate(V5P, mesh, flat[:4:2]) == 100e9  # half of a ring, which it shares with the other half
    small = torus((2, 2, 1), (1, 1, 4, 1))
    assert group_rate(V5P, small, small.devices.ravel()) == 200e9  # two lines
    side = torus((8, 16), (1, 1, 128, 1))
    assert group_rate(V6E, side, side.devices.ravel()) == 300e9  # a line and a ring
    assert group_rate(H100, mesh, flat[:4]) == 450e9


def test_seconds_of_collectives():
    mesh = torus((4, 4, 4), (1, 1, 64, 1))
    everyone = tuple(range(64))
    gather = Collective("all-gather", ("fsdp",), everyone, 640_000_000, 1)
    assert collective_seconds(V5P, mesh, gather) == pytest.approx(640e6 * 63 / 64 / 600e9)
    reduce = Collective("all-reduce", ("fsdp",), everyone, 640_000_000, 1)
    assert collective_seconds(V5P, mesh, reduce) == pytest.approx(2 * 640e6 * 63 / 64 / 600e9)
    exchange = Collective("all-to-all", ("fsdp",), everyone, 640_000_000, 1)
    assert collective_seconds(V5P, mesh, exchange) == pytest.approx(640e6 * 63 / 64 / 600e9 / 4)
    hop = Collective("collective-permute", ("fsdp",), (0, 1), 640_000_000, 1)
    assert collective_seconds(V5P, mesh, hop) == pytest.approx(640e6 / 100e9)


def test_between_slices_the_network_carries_what_is_left_of_the_array():
    mesh = torus((4, 4, 4), (2, 1, 64, 1), slices=2)
    across = Collective("all-reduce", ("replica",), (0, 64), 1_000_000, 1)
    assert collective_seconds(V5P, mesh, across) == pytest.approx(2 * 1e6 / 2 / 6.25e9)
    both = Collective("all-reduce", ("replica", "fsdp"), tuple(range(128)), 64_000_000, 1)
    expected = 2 * 64e6 * 63 / 64 / 600e9 + 2 * 1e6 / 2 / 6.25e9
    assert collective_seconds(V5P, mesh, both) == pytest.approx(expected)


def test_step_time_and_mfu():
    mesh = torus((4, 4, 4), (1, 1, 64, 1))
    peak = 64 * 459e12
    gather = Collective("all-gather", ("fsdp",), tuple(range(64)), 64 * 600_000_000 // 63, 500, True)
    reduce = Collective("all-reduce", ("fsdp",), tuple(range(64)), 64 * 600_000_000 // 63, 100, False)
    rate = 2765e9
    # Twice: 1 s of arithmetic beside half a second of memory; then 1 s of memory beside half a second of arithmetic.
    # The FLOPs that are left, 1 s of them, are in a kernel.
    works = (Work(0.5 * rate, 459e12, 2), Work(rate, 0.5 * 459e12, 2))
    traffic = Traffic(works, kernels=0.75 * rate, others=0.25 * rate)
    found = roofline(V5P, mesh, 3 * peak, 4 * peak, traffic, [gather, reduce])
    assert (found.arithmetic, found.products, found.kernels, found.others) == (4.0, 4.0, 1.0, 0.25)
    # 500 gathers of 1 ms hide behind 5.25 s of work; 100 reductions of 2 ms stand alone.
    assert found.links_in_loops == {"fsdp": pytest.approx(0.5)}
    assert found.links_outside == {"fsdp": pytest.approx(0.2)}
    assert found.step == pytest.approx(5.45)
    assert found.mfu == pytest.approx(3 / 5.45)
    # More than the work can hide: 10 s of gathers.
    assert roofline(V5P, mesh, 3 * peak, 4 * peak, traffic, [gather] * 20).step == pytest.approx(10.0)
    # A kernel of much traffic.
    assert roofline(V5P, mesh, 3 * peak, 4 * peak, Traffic((), 9 * rate, 0.0), []).step == pytest.approx(9.0)


def test_cpu_devices_share_what_was_measured():
    assert math.isfinite(peak_flops(jax.devices()[0])) and peak_flops(jax.devices()[0]) > 0
