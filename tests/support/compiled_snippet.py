"""A compiled program in the words of XLA, small enough to be counted by hand."""

# A loop of five turns around a matrix product, whose weights are sliced of a stack; then one loop that tells nothing.
SNIPPET = """
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,8]{1,0}}

FileNames
1 "step.py"

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (stack: f32[5,8,8], turn: s32[]) -> f32[8,8] {
  %stack = f32[5,8,8]{2,1,0} parameter(0)
  %turn = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,8]{2,1,0} dynamic-slice(%stack, %turn, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %view = f32[8,8]{1,0} bitcast(%one)
}

%body (state: (s32[], f32[4,8], f32[5,8,8])) -> (s32[], f32[4,8], f32[5,8,8]) {
  %state = (s32[], f32[4,8]{1,0}, f32[5,8,8]{2,1,0}) parameter(0)
  %turn.1 = s32[] get-tuple-element(%state), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %stack.1 = f32[5,8,8]{2,1,0} get-tuple-element(%state), index=2
  %weights = f32[8,8]{1,0} fusion(%stack.1, %turn.1), kind=kLoop, calls=%sliced
  %product = f32[4,8]{1,0} dot(%x, %weights), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(step)/while(body)"}
  %summed = f32[4,8]{1,0} all-reduce(%product), channel_id=1, replica_groups=[4,2]<=[8], use_global_device_ids=true, to_apply=%add
  %one.1 = s32[] constant(1)
  %next = s32[] add(%turn.1, %one.1)
  ROOT %new = (s32[], f32[4,8]{1,0}, /*index=2*/f32[5,8,8]{2,1,0}) tuple(%next, %summed, %stack.1)
}

%condition (state.1: (s32[], f32[4,8], f32[5,8,8])) -> pred[] {
  %state.1 = (s32[], f32[4,8]{1,0}, f32[5,8,8]{2,1,0}) parameter(0)
  %turn.2 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(5)
  ROOT %goes = pred[] compare(%turn.2, %limit), direction=LT
}

ENTRY %main (x.1: f32[4,8], stack.2: f32[5,8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0:T(8,128)} parameter(0), sharding={devices=[8,1]<=[8]}
  %stack.2 = f32[5,8,8]{2,1,0} parameter(1)
  %first = s32[] constant(0)
  %begin = (s32[], f32[4,8]{1,0}, f32[5,8,8]{2,1,0}) tuple(%first, %x.1, %stack.2)
  %loop = (s32[], f32[4,8]{1,0}, f32[5,8,8]{2,1,0}) while(%begin), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"5"},"known_init_step":{"init":"0","step":"1"}}
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
