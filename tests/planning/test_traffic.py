"""Products, bytes and messages of a compiled program, against sums by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_snippet import SNIPPET

from jaxmed.planning.program_text import Array, Computation, Instruction, parse_program
from jaxmed.planning.traffic import (
    Window,
    first_group,
    group_axis,
    measure_work,
    moved_bytes,
    product_flops,
    sent_share,
)

pytestmark = pytest.mark.core

MESH = {"data": 4, "model": 2}


def test_a_loop_of_products_is_counted_as_often_as_it_runs():
    work = measure_work(parse_program(SNIPPET), MESH)
    assert work.flops == 5 * 2 * 4 * 8 * 8
    (message,) = work.messages
    assert (message.kind, message.axis, message.dtype, message.calls) == ("all-reduce", "model", "f32", 5)
    assert message.payload == 5 * 4 * 8 * 4 and message.sent == message.payload  # 2 (n - 1) / n of two devices


def test_bytes_are_operands_and_results_and_of_slices_the_slice():
    product = (4 * 8 + 8 * 8 + 4 * 8) * 4
    sliced = 8 * 8 * 4 + 8 * 8 * 4 + 4  # the slice is read and written, and the number of the turn is read
    exchanged, counted, compared = 2 * 4 * 8 * 4, 3 * 4, 1 + 2 * 4
    expected = 5 * (product + sliced + exchanged + counted + compared)
    assert measure_work(parse_program(SNIPPET), MESH).bytes == expected


def test_an_update_in_place_moves_the_update_alone():
    whole, part = Array("f32", (5, 8)), Array("f32", (1, 8))
    instructions = {
        "whole": Instruction("whole", "parameter", (whole,), (), ""),
        "part": Instruction("part", "parameter", (part,), (), ""),
        "turn": Instruction("turn", "parameter", (Array("s32", ()),), (), ""),
        "new": Instruction("new", "dynamic-update-slice", (whole,), ("whole", "part", "turn", "turn"), ""),
        "fused": Instruction("fused", "fusion", (whole,), ("whole", "part", "turn"), "kind=kLoop, calls=%inner"),
    }
    inner = Computation({name: instructions[name] for name in ("whole", "part", "turn", "new")}, "new")
    outer = Computation(instructions, "fused")
    program = parse_program(SNIPPET)._replace(computations={"inner": inner, "outer": outer})
    assert moved_bytes(program, outer, instructions["new"]) == 2 * 8 * 4
    assert moved_bytes(program, outer, instructions["fused"]) == 2 * 8 * 4 + 4


def test_convolutions_count_their_window_channels_and_voxels():
    x, kernel, y = Array("bf16", (2, 16, 16, 8)), Array("bf16", (3, 3, 8, 32)), Array("bf16", (2, 16, 16, 32))
    convolution = Instruction(
        "y", "convolution", (y,), ("x", "k"), "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f"
    )  # noqa: E501
    known = {
        "x": Instruction("x", "parameter", (x,), (), ""), "k": Instruction("k", "parameter", (kernel,), (), ""),
        "y": convolution,
    }  # fmt: skip
    # Along an axis of 16 the window of 3 reaches two voxels at either end: padding is not multiplied.
    assert product_flops(Computation(known, "y"), convolution) == 2 * (2 * 32) * (3 * 16 - 2) ** 2 * 8


def test_zeros_between_voxels_cost_nothing():
    # A TPU writes products of a batch of 12 pairs as one convolution, whose input has 11 zeros between any two.
    x, kernel, y = Array("bf16", (12, 64, 32)), Array("bf16", (12, 32, 16)), Array("bf16", (12, 64, 16))
    window = "window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0io->0bf"
    product = Instruction("y", "convolution", (y,), ("x", "k"), window)
    known = {
        "x": Instruction("x", "parameter", (x,), (), ""), "k": Instruction("k", "parameter", (kernel,), (), ""),
        "y": product,
    }  # fmt: skip
    assert product_flops(Computation(known, "y"), product) == 2 * y.size * 32


def test_heads_that_a_window_lays_out_are_one_product_each():
    # A TPU writes tokens times the kernels of 3 x 4 heads as one convolution: each output reaches one place of it.
    x, kernel, y = Array("bf16", (20, 64, 1, 1)), Array("bf16", (3, 4, 16, 64)), Array("bf16", (20, 3, 4, 16))
    window = "window={size=3x4 pad=2_2x3_3 rhs_reversal=1x1}, dim_labels=bf01_01oi->b01f"
    product = Instruction("y", "convolution", (y,), ("x", "k"), window)
    known = {
        "x": Instruction("x", "parameter", (x,), (), ""), "k": Instruction("k", "parameter", (kernel,), (), ""),
        "y": product,
    }  # fmt: skip
    assert product_flops(Computation(known, "y"), product) == 2 * 20 * 64 * (3 * 4 * 16)


@pytest.mark.parametrize(
    ("size", "stride", "low", "high", "spread", "dilation"),
    [(3, 1, 1, 1, 1, 1), (3, 2, 0, 1, 1, 1), (4, 1, 2, 2, 2, 1), (3, 1, 2, 2, 1, 2), (5, 3, 4, 0, 3, 2)],
)
def test_a_window_reaches_what_a_convolution_of_ones_sums_up(size, stride, low, high, spread, dilation):
    ones = jnp.ones((1, 1, 7)), jnp.ones((1, 1, size))
    sums = jax.lax.conv_general_dilated(
        *ones, (stride,), [(low, high)], lhs_dilation=(spread,), rhs_dilation=(dilation,)
    )  # fmt: skip
    assert Window(size, stride, low, spread, dilation).reached(7, sums.shape[-1]) == int(sums.sum())


def test_a_sum_that_is_scattered_in_a_fused_operation_is_one_message():
    text = SNIPPET.replace("%body", "%all-reduce-scatter.1").replace("body=%body", "body=%all-reduce-scatter.1")
    (message,) = measure_work(parse_program(text), MESH).messages
    assert message.kind == "reduce-scatter" and message.sent == message.payload / 2


@pytest.mark.parametrize(
    ("attributes", "axis", "size"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true", "model", 2),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "data", 4),
        ("replica_groups=[4,2]<=[8]", "model", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", "data", 4),
        ("replica_groups=[1,8]<=[8]", "data+model", 8),
        ("replica_groups=[8,1]<=[8]", "none", 1),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}", "data", 4),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "model", 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", "data+model", 8),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", "model", 2),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_1'}", "model", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, dimensions={1}", "data", 4),
        ("replica_groups={}, to_apply=%add", "data+model", 8),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", "data", 2),
        ("source_target_pairs={{0,1},{1,0}}", "model", 2),
    ],
)
def test_groups_are_told_by_the_axes_along_which_they_differ(attributes, axis, size):
    assert group_axis(attributes, MESH) == (axis, size)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_groups_by_numbers_in_order_are_numpys_transposition(order):
    source, rows = (2, 3, 4), (6, 4)
    text = f"replica_groups=[{rows[0]},{rows[1]}]<=[2,3,4]T({','.join(map(str, order))})"
    expected = np.arange(24).reshape(source).transpose(order).reshape(rows)[0]
    assert first_group(text, {"data": 24}) == expected.tolist()


def test_rings_send_what_the_closed_forms_say():
    # Every device of n holds a shard of 1 / n of a whole: both halves of an all-reduce send (n - 1) / n of the whole.
    for size in (2, 8, 64):
        gathered = sent_share("all-gather", size) / size
        scattered = sent_share("reduce-scatter", size)
        assert gathered == pytest.approx(scattered)
        assert sent_share("all-reduce", size) == pytest.approx(gathered + scattered)
    assert sent_share("all-reduce", 1) == 0
