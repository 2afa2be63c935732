"""What a compiled program says: collectives and cycles, loops counted as they run."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from meanflow_jax.runtime import hlo
from meanflow_jax.runtime.hlo import Traffic
from meanflow_jax.runtime.mesh import DATA, FSDP, make_mesh

# As a TPU's compiler writes it, shortened: a loop that counts up to a constant, one that says its
# rounds, an all-reduce of a tuple, a pair of start and done, and one all-gather in two fusions.
TEXT = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%inner_body (p.0: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.0 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  %x.0 = f32[8,128]{1,0:T(8,128)S(1)} get-tuple-element(%p.0), index=1
  %send = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x.0), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %sent = f32[8,128]{1,0:T(8,128)S(1)} collective-permute-done(%send)
  %i.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %t.0 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) tuple(%i.0, %sent)
}

%inner_condition (p.1: (s32[], f32[8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) parameter(0)
  ROOT %never = pred[]{:T(512)} custom-call(%p.1), custom_call_target="Unclear"
}

%body (p.2: (s32[], f32[4,8], bf16[16,64])) -> (s32[], f32[4,8], bf16[16,64]) {
  %p.2 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, /*index=2*/bf16[16,64]{1,0:T(8,128)(2,1)}) \
parameter(0)
  %x.2 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %y.2 = bf16[16,64]{1,0:T(8,128)(2,1)} get-tuple-element(%p.2), index=2
  %total = (f32[4,8]{1,0:T(8,128)}, /*index=1*/bf16[16,64]{1,0:T(8,128)(2,1)}) \
all-reduce(%x.2, %y.2), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %loop.2 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}) while(%p.2), \
condition=%inner_condition, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
  %f.2 = f32[4,8]{1,0:T(8,128)} fusion(%x.2), kind=kLoop, calls=%add, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  ROOT %t.2 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%x.2, %f.2)
}

%condition (p.3: (s32[], f32[4,8], bf16[16,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %p.3 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.3, %limit), direction=LT
}

%start_fusion (q.0: bf16[1,64]) -> bf16[4,64] {
  %q.0 = bf16[1,64]{1,0:T(2,128)} parameter(0)
  ROOT %gather.0 = bf16[4,64]{1,0:T(4,128)} all-gather(%q.0), channel_id=7, dimensions={0}
}

%done_fusion (q.1: bf16[1,64]) -> bf16[4,64] {
  %q.1 = bf16[1,64]{1,0:T(2,128)} parameter(0)
  ROOT %gather.1 = bf16[4,64]{1,0:T(4,128)} all-gather(%q.1), channel_id=7, dimensions={0}
}

%scattered (q.2: f32[64]) -> f32[16] {
  %q.2 = f32[64]{0} parameter(0)
  ROOT %scatter = f32[16]{0} reduce-scatter(%q.2), channel_id=9, dimensions={0}, to_apply=%add
}

%unused (q.3: f32[64]) -> f32[64] {
  %q.3 = f32[64]{0} parameter(0)
  ROOT %lonely = f32[64]{0} all-to-all(%q.3), channel_id=11, dimensions={0}
}

ENTRY %main (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0)
  %row = bf16[1,64]{1,0:T(2,128)} custom-call(), custom_call_target="AllocateBuffer"
  %wide = f32[64]{0} broadcast(%arg), dimensions={0}
  %init = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) tuple(%arg)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}, bf16[16,64]{1,0:T(8,128)(2,1)}) while(%init), \
condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  %g.0 = bf16[4,64]{1,0} fusion(%row), kind=kCustom, calls=%start_fusion
  %g.1 = bf16[4,64]{1,0} fusion(%row), kind=kCustom, calls=%done_fusion, \
backend_config={"window_config":{"estimated_cycles":"50"}}
  %s.0 = ((f32[64]{0}), f32[16]{0}, u32[]) async-start(%wide), calls=%scattered
  %s.1 = f32[16]{0} async-done(%s.0), calls=%scattered
  ROOT %out = f32[8]{0} copy(%arg)
}
"""


def test_loops_and_parts_are_counted_as_they_run():
  program = hlo.read(TEXT)
  assert program.collectives == {
    "all-reduce": Traffic(12, 12 * (4 * 8 * 4 + 16 * 64 * 2)),
    "all-gather": Traffic(1, 4 * 64 * 2),  # what comes out is larger than what goes in
    "reduce-scatter": Traffic(1, 64 * 4),  # and here what goes in
    "collective-permute": Traffic(12 * 3, 12 * 3 * 8 * 128 * 4),
  }
  assert program.cycles == 12 * 1000 + 50
  assert program.uncounted_loops == 0


def test_a_loop_of_unknown_length_is_said_to_be_one():
  program = hlo.read(TEXT.replace('{"known_trip_count":{"n":"3"}}', "{}"))
  assert program.uncounted_loops == 1
  assert program.collectives["collective-permute"].count == 12
  assert program.collectives["all-reduce"].count == 12


def test_other_text_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.read("HloModule nothing\n")


def compiled_text(function, *shapes: tuple[int, ...]) -> str:
  """Of a function of arrays on each of eight devices."""
  mesh = make_mesh(8, 1)
  spread = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=PartitionSpec((DATA, FSDP)),
    out_specs=PartitionSpec((DATA, FSDP)),
    check_vma=False,
  )
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return jax.jit(spread).lower(*arguments).compile().as_text()


def test_sums_of_several_arrays_count_each():
  """Though those inside one `shard_map` share their channel."""
  body = """
ENTRY %main (a.1: f32[8], b.1: f32[4], c.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  %b.1 = f32[4]{0} parameter(1)
  %c.1 = f32[8]{0} parameter(2)
  %r.1 = f32[8]{0} all-reduce(%a.1), channel_id=1, to_apply=%add
  %r.2 = f32[4]{0} all-reduce(%b.1), channel_id=1, to_apply=%add
  ROOT %r.3 = f32[8]{0} all-reduce(%c.1), channel_id=1, to_apply=%add
}
"""
  assert hlo.read(body).collectives == {"all-reduce": Traffic(3, 4 * (8 + 4 + 8))}


def test_the_collectives_of_a_real_program():
  def five_sums(x):
    add = lambda carry, _: (jnp.tanh(jax.lax.psum(carry, DATA)), None)
    return jax.lax.scan(add, x, length=5)[0]

  program = hlo.read(compiled_text(five_sums, (8, 100)))
  assert program.collectives == {"all-reduce": Traffic(5, 5 * 100 * 4)}
  assert program.uncounted_loops == 0
  assert program.cycles == 0  # only TPUs' compilers estimate them


@pytest.mark.parametrize(
  ("kind", "collective"),
  [
    ("all-gather", functools.partial(jax.lax.all_gather, axis_name=DATA, tiled=True)),
    ("reduce-scatter", functools.partial(jax.lax.psum_scatter, axis_name=DATA, tiled=True)),
    ("all-to-all", lambda x: jax.lax.all_to_all(x, DATA, 0, 0, tiled=True)),
    ("collective-permute", lambda x: jax.lax.ppermute(x, DATA, [(i, 7 - i) for i in range(8)])),
  ],
)
def test_every_kind_is_found_in_a_real_program(kind, collective):
  """Of 64 rows of 16 numbers, 8 on each device; gathered, all 64."""
  program = hlo.read(compiled_text(collective, (64, 16)))
  rows = 64 if kind == "all-gather" else 8
  assert program.collectives == {kind: Traffic(1, rows * 16 * 4)}
