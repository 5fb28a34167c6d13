"""What devices send each other, read from the compiler's text."""

import jax
import jax.numpy as jnp
import pytest

from lcm_jax.hlo import Collective, collectives, looped, squares
from lcm_jax.models.attention import attend

SIZES = {'data': 2, 'fsdp': 2, 'tensor': 2}
TEXT = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%until (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="lt"}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g.1 = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
}

ENTRY %main.1 (x: f32[8,4]) -> f32[8,4] {
  %r.1 = (f32[8,4]{1,0}, bf16[16]{0}) all-reduce(%x, %y), replica_groups=[2,4]<=[2,2,2]T(2,0,1), to_apply=%add
  %r.2 = f32[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %w.1 = (s32[], f32[8,4]) while(%t), condition=%until, body=%body, LOOP
  %a.1 = (f32[4,4]{1,0}, f32[8,4]{1,0}, u32[]) all-gather-start(%x), replica_groups={{0,2},{1,3},{4,6},{5,7}}
  %a.2 = f32[8,4]{1,0} all-gather-done(%a.1)
  ROOT %p.1 = s8[10]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}
"""


@pytest.mark.parametrize('loop', ['', 'backend_config={"known_trip_count":{"n":"5"}}'])
def test_collectives(loop):
    """With a loop's passes as CPUs and GPUs say them, and as TPUs do not."""
    text = TEXT.replace('LOOP', loop)
    assert looped(text) == 4 * 128  # what the gathering writes
    assert collectives(text, SIZES) == [
        Collective('all-gather', ('tensor',), 5, 5 * 128),
        Collective('all-reduce', ('data', 'fsdp'), 1, 128 + 32),
        Collective('all-gather', ('fsdp',), 1, 128),
        Collective('reduce-scatter', ('data',), 1, 2 * 32),
        Collective('collective-permute', ('tensor',), 1, 10),
    ]


@pytest.mark.parametrize(('fn', 'found'), [(jax.nn.dot_product_attention, True), (attend, False)])
def test_finds_squares_of_tokens(fn, found):
    x = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)
    text = jax.jit(fn).lower(x, x, x).compile().as_text()
    assert bool(squares(text, 2048)) == found
