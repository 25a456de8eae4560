"""Compiled programs as text: what is read from them, on a program written by hand and on real ones."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cm3jax.parallel.mesh import MeshConfig, make_mesh
from cm3jax.perf.collectives import Collective, collectives_text, find_collectives, total_bytes
from cm3jax.perf.hlo import Shape, parse
from cm3jax.perf.traffic import Traffic, Work, memory_traffic

# On a mesh of data=2, fsdp=2, tensor=2: devices 0 and 1 differ in `tensor`, 0 and 2 in `fsdp`, 0 and 4 in `data`.
TEXT = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slice_of_stack (p0: f32[10,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,256]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,256}
}

%update_of_stack (q0: f32[10,256], q1: f32[1,256], q2: s32[]) -> f32[10,256] {
  %q0 = f32[10,256]{1,0} parameter(0)
  %q1 = f32[1,256]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %put = f32[10,256]{1,0} dynamic-update-slice(%q0, %q1, %q2)
}

%product (r0: bf16[64,64], r1: bf16[64,64]) -> bf16[64,64] {
  %r0 = bf16[64,64]{1,0} parameter(0)
  %r1 = bf16[64,64]{1,0} parameter(1)
  ROOT %dot = bf16[64,64]{1,0} dot(%r0, %r1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[10,256])) -> (s32[], f32[10,256]) {
  %state = (s32[], f32[10,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[10,256]{1,0} get-tuple-element(%state), index=1
  %layer = f32[1,256]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice_of_stack
  %whole = f32[2,256]{1,0} all-gather(%layer), channel_id=1, replica_groups=[4,2]<=[4,2]T(1,0), dimensions={0}
  %part = f32[1,256]{1,0} reduce-scatter(%whole), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %next = f32[10,256]{1,0} fusion(%stack, %part, %i), kind=kLoop, calls=%update_of_stack
  ROOT %out = (s32[], f32[10,256]{1,0}) tuple(%i, %next)
}

%condition (state.1: (s32[], f32[10,256])) -> pred[] {
  %state.1 = (s32[], f32[10,256]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (x: f32[10,256], y: bf16[64,64]) -> f32[] {
  %x = f32[10,256]{1,0} parameter(0)
  %y = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %near = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy(%y)
  %zz = bf16[64,64]{1,0} fusion(%near, %y), kind=kOutput, calls=%product
  %zero = s32[] constant(0)
  %start = (s32[], f32[10,256]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[10,256]{1,0}) while(%start), condition=%condition, body=%body
  %sums = (f32[4]{0}, f32[8]{0}) all-reduce(%x, %x), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  %moved = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %alone = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %all = f32[] all-reduce(%zero), replica_groups={}, to_apply=%add
}
"""
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def test_shapes_loops_and_calls_are_read():
    module = parse(TEXT)
    assert module.entry == "main"
    assert module.computations["main"]["near"].shapes == (Shape("bf16", (64, 64), 1),)
    assert [shape.bytes for shape in module.computations["main"]["loop"].shapes] == [4, 10_240]
    assert module.runs["body"] == module.runs["slice_of_stack"] == 10
    assert (module.runs["main"], module.runs["add"]) == (1, 0)


def test_a_loop_that_says_its_rounds_is_believed_and_one_that_does_not_is_refused():
    said = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"24"}}')
    assert parse(said).runs["body"] == 24
    with pytest.raises(ValueError, match="the loop loop does not say how often it runs"):
        _ = parse(TEXT.replace("%limit = s32[] constant(10)", "%limit = s32[] negate(%j)")).runs


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("nothing")


def test_collectives_have_axes_bytes_and_counts():
    found = find_collectives(parse(TEXT), make_mesh(CUBE))
    assert found == [
        Collective("all-gather", ("fsdp",), (0, 2), 2 * 256 * 4, 10, True),
        Collective("reduce-scatter", ("tensor",), (0, 1), 2 * 256 * 4, 10, True),
        Collective("all-reduce", ("data",), (0, 4), 4 * 4 + 8 * 4, 1),
        Collective("collective-permute", ("fsdp",), (0, 2), 32, 1),
        Collective("all-reduce", ("data", "fsdp", "tensor"), tuple(range(8)), 4, 1),
    ]
    assert total_bytes(found)["all-gather", ("fsdp",)] == (10, 20_480)
    assert collectives_text(found).splitlines()[0].split() == ["all-gather", "fsdp", "10", "x", "2048", "B"]


def test_what_the_runtime_reduces_between_slices_is_a_collective():
    send = """  %sent = (bf16[32,8]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%y, %zero), channel_id=2, \
frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"}
  %near ="""
    mesh = make_mesh(CUBE)
    chips = np.empty(8, object)
    chips[:] = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    sliced = SimpleNamespace(devices=chips.reshape(2, 1, 2, 2), axis_names=mesh.axis_names, size=8)
    found = find_collectives(parse(TEXT.replace("  %near =", send)), sliced)
    assert Collective("all-reduce", ("replica",), (0, 4), 32 * 8 * 2, 1) in found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("[1,8]<=[8]", ("data", "fsdp", "tensor")),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("data", "tensor")),
        ("mesh['a'=2,'b'=2,'c'=2], device_ids=([2,2,2]T(2,1,0)) {'a'}", ("tensor",)),
        ("mesh['a'=8] {'a':(1)2}", ("data",)),
        ("mesh['a'=8] {'a':(2)2}", ("fsdp",)),
        ("mesh['a'=4,'b'=2] {'a','b'}", ("data", "fsdp", "tensor")),
        ("{{0,6},{1,7}}", ("data", "fsdp")),
    ],
)
def test_groups_in_every_notation(groups, axes):
    text = TEXT.replace("[4,2]<=[4,2]T(1,0)", groups)
    assert find_collectives(parse(text), make_mesh(CUBE))[0].axes == axes


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="whole: no replica groups in"):
        find_collectives(parse(TEXT.replace("[4,2]<=[4,2]T(1,0)", "everyone")), make_mesh(CUBE))


def test_traffic_counts_slices_updates_in_place_and_main_memory_alone():
    # The product reads %y (8 KiB) and writes 8 KiB; the copy reads 8 KiB and writes to on-chip memory.
    product = Work(2 * 8192, 2.0 * 64**3, 1)
    # Each round: a layer is read and written, gathered (1 + 2 rows), scattered (2 + 1), and put back (read, written).
    rounds = 10 * 1024 * (2 + 3 + 3 + 2) + 10 * 2 * 4
    rest = 8192 + (16 + 32 + 2 * 10_240) + (2 * 32 + 4 + 10_240) + (32 + 10_240) + 2 * 4
    found = memory_traffic(parse(TEXT))
    assert found == Traffic((product,), 0.0, rounds + rest)
    assert found.bytes == 2 * 8192 + rounds + rest


# As libtpu 0.0.42 writes products: left, right, result, attributes, FLOPs.
CONVOLUTIONS = [
    ("bf16[64,128]", "bf16[128,32]", "bf16[64,32]", "dim_labels=bf_io->bf", 2 * 64 * 32 * 128),
    (
        "bf16[4,16,128]", "bf16[128,32,1]", "bf16[4,16,32]",
        "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 64 * 32 * 128,
    ),
    (
        # A spatial dimension of the weights (heads) spread over the result: input 1, result 8.
        "bf16[1,16,64,1]", "bf16[8,32,64,1]", "bf16[1,16,8,32]",
        "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f", 2 * 16 * 8 * 32 * 64,
    ),
    (
        "bf16[4,8,16,64]", "bf16[4,8,64,32]", "f32[4,8,16,32]",
        "window={size=4x8 stride=3x7 lhs_dilate=4x8}, dim_labels=01bf_01io->01bf", 4 * 8 * 2 * 16 * 32 * 64,
    ),
    ("f32[2,8,8,3]", "f32[3,3,3,5]", "f32[2,8,8,5]", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
     2 * 2 * 5 * 3 * 22 * 22),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right", "out", "attributes", "flops"), CONVOLUTIONS)
def test_flops_of_products_written_as_convolutions(left, right, out, attributes, flops):
    text = f"""ENTRY %main (a: x, b: y) -> z {{
  %a = {left}{{3,2,1,0}} parameter(0)
  %b = {right}{{3,2,1,0}} parameter(1)
  ROOT %c = {out}{{3,2,1,0}} convolution(%a, %b), {attributes}
}}"""
    (work,) = memory_traffic(parse(text)).products
    assert work.flops == flops


def test_a_real_program_over_layers():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    layers, width, rows = 5, 64, 16

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    weights = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        text = jax.jit(loss).lower(weights, x).compile().as_text()
    sums = total_bytes(find_collectives(parse(text), mesh))
    assert sums["all-gather", ("fsdp",)] == (layers, layers * width * width * 4)
    assert sums["all-reduce", ("fsdp",)] == (1, 4)


NESTED = """%cut (c0: f32[10,256], c1: s32[]) -> f32[1,256] {
  %c0 = f32[10,256]{1,0} parameter(0)
  %c1 = s32[] parameter(1)
  ROOT %row = f32[1,256]{1,0} dynamic-slice(%c0, %c1), dynamic_slice_sizes={1,256}
}

%put (u0: f32[10,256], u1: f32[1,256], u2: s32[]) -> f32[10,256] {
  %u0 = f32[10,256]{1,0} parameter(0)
  %u1 = f32[1,256]{1,0} parameter(1)
  %u2 = s32[] parameter(2)
  ROOT %set = f32[10,256]{1,0} dynamic-update-slice(%u0, %u1, %u2)
}

%both (p0: f32[10,256], p1: f32[10,256], p2: s32[]) -> (f32[10,256], f32[1,256]) {
  %p0 = f32[10,256]{1,0} parameter(0)
  %p1 = f32[10,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %read = f32[1,256]{1,0} fusion(%p0, %p2), kind=kLoop, calls=%cut
  %written = f32[10,256]{1,0} fusion(%p1, %read, %p2), kind=kLoop, calls=%put
  ROOT %pair = (f32[10,256]{1,0}, f32[1,256]{1,0}) tuple(%written, %read)
}

ENTRY %main (x: f32[10,256], y: f32[10,256], i: s32[]) -> (f32[10,256], f32[1,256]) {
  %x = f32[10,256]{1,0} parameter(0)
  %y = f32[10,256]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %room = f32[10,256]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = (f32[10,256]{1,0}, f32[1,256]{1,0:S(1)}) fusion(%x, %y, %i), kind=kLoop, calls=%both
}
"""


def test_traffic_looks_into_fusions_within_fusions():
    # Of %x one row is read, of %y one is written; the second result stays on the chip.
    assert memory_traffic(parse(NESTED)) == Traffic((), 0.0, 1024 + 1024 + 4)


# As libtpu 0.0.42 brings an array to on-chip memory in pieces.
PIECES = """ENTRY %main (x: s8[4096]) -> s8[4096] {
  %x = s8[4096]{0:T(1024)} parameter(0)
  %a = ((s8[4096]{0:T(1024)}), s8[1024]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:1024]}
  %b = ((s8[4096]{0:T(1024)}), s8[3072]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[1024:4096]}
  %c = s8[1024]{0:T(1024)S(1)} slice-done(%a)
  %d = s8[3072]{0:T(1024)S(1)} slice-done(%b)
  ROOT %y = s8[4096]{0:T(1024)S(1)} custom-call(%c, %d), custom_call_target="ConcatBitcast"
}
"""


def test_an_array_that_is_brought_in_pieces_is_read_once():
    assert memory_traffic(parse(PIECES)) == Traffic((), 4096.0, 0.0)
