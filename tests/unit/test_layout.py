"""Checks of a layout before anything is computed, and its text."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.agreement import Flags, agreed
from cm3jax.parallel.layout import LayoutError, check_layout, layout_text, sharded_share
from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.state import TrainState


def state(**shapes):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, (), {}, {})


def specs(**params):
    return TrainState(P(), params, (), {}, {})


MESH = MeshConfig(data=1, fsdp=4, tensor=2)


def test_a_sound_layout_passes_and_is_written_down():
    mesh = make_mesh(MESH)
    abstract, layout = state(up=(8, 12), scale=(1,)), specs(up=P("fsdp", "tensor"), scale=P())
    check_layout(mesh, abstract, layout)
    assert layout_text(mesh, abstract, layout).splitlines() == [
        "mesh {'replica': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}",
        "step          int32[]        ()                  4",
        "params/scale  float32[1]     ()                  4",
        "params/up     float32[8,12]  ('fsdp', 'tensor')  48",
    ]


@pytest.mark.parametrize(
    ("shape", "spec", "message"),
    [
        ((8, 8), P("fsdp", "fsdp"), "params/w: axis fsdp twice"),
        ((8, 8), P(("fsdp", "tensor"), "tensor"), "params/w: axis tensor twice"),
        ((8, 7), P("fsdp", "tensor"), r"params/w: dimension 1 of \(8, 7\) is not divisible by 2 \(tensor\)"),
        (
            (12, 8),
            P(("fsdp", "tensor"), None),
            r"params/w: dimension 0 of \(12, 8\) is not divisible by 8 \(fsdp, tens",
        ),
        ((8,), P("fsdp", "tensor"), r"params/w: P.* for shape \(8,\)"),
    ],
)
def test_an_impossible_layout_is_named(shape, spec, message):
    with pytest.raises(LayoutError, match=message):
        check_layout(make_mesh(MESH), state(w=shape), specs(w=spec))


def test_all_problems_are_in_one_message():
    with pytest.raises(LayoutError, match=r"mesh .*params/a: .*; params/b: "):
        check_layout(make_mesh(MESH), state(a=(3, 8), b=(3, 8)), specs(a=P("fsdp"), b=P("fsdp")))


def test_weights_that_are_whole_everywhere_are_refused_where_fsdp_should_split_them():
    abstract, layout = state(big=(96, 100), small=(4, 100)), specs(big=P("fsdp"), small=P())
    assert sharded_share(abstract.params, layout.params) == (0.96, ["small"])
    with pytest.raises(LayoutError, match=r"only 96.0% of the weights' bytes are sharded, expected 98%; .*: small"):
        check_layout(make_mesh(MESH), abstract, layout)
    check_layout(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2)), abstract, layout)
    check_layout(make_mesh(MESH), state(big=(392, 100), small=(8, 100)), layout)


def test_agreement_is_the_logical_or():
    flags = Flags(make_mesh(MESH), 2)
    assert agreed(flags.raised([False, True])).tolist() == [False, True]
    assert agreed(flags.raised([False, False])).tolist() == [False, False]
