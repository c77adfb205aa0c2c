"""Compiled programs as text: what is read of them, on a snippet in the words of XLA."""

import pytest
from compiled_snippet import SNIPPET

from jaxmed.planning.program_text import Array, bits_of, count_calls, parse_program

pytestmark = pytest.mark.core


def test_computations_instructions_and_roots_are_read():
    program = parse_program(SNIPPET)
    assert program.entry == "main"
    assert set(program.computations) == {"add", "sliced", "body", "condition", "main"}
    body = program.computations["body"]
    assert body.root == "new" and len(body.instructions) == 10
    product = body.instructions["product"]
    assert product.opcode == "dot" and product.operands == ("x", "weights")
    assert product.results == (Array("f32", (4, 8)),)
    assert "metadata" not in product.attributes
    assert body.instructions["new"].results[2] == Array("f32", (5, 8, 8))
    assert program.computations["main"].instructions["x.1"].results == (Array("f32", (4, 8)),)


def test_loops_are_multiplied_out_and_fused_bodies_are_known():
    calls = count_calls(parse_program(SNIPPET))
    assert calls["main"].count == 1 and calls["body"].count == 5 and calls["sliced"].count == 5
    assert calls["sliced"].is_fused and not calls["body"].is_fused
    assert "add" not in calls  # applied to single numbers


def test_a_loop_whose_count_nobody_states_runs_as_often_as_its_condition_says():
    silent = SNIPPET.replace('backend_config={"known_trip_count":{"n":"5"}', 'backend_config={"other":{"n":"7"}')
    assert count_calls(parse_program(silent))["body"].count == 5
    unknown = silent.replace("%limit = s32[] constant(5)", "%limit = s32[] get-tuple-element(%state.1), index=0")
    assert count_calls(parse_program(unknown))["body"].count == 1


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("bf16", 16), ("f32", 32), ("s4", 4), ("u64", 64), ("f8e4m3fn", 8), ("c64", 64)]
)
def test_types_have_their_bits(dtype, bits):
    assert bits_of(dtype) == bits


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse_program("%f (x: f32[]) -> f32[] {\n}\n")
