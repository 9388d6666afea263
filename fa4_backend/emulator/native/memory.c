// Loads, stores and atomics of one warp: addresses are checked, then bytes are copied.
// PTX ISA 9.0: 5.1 state spaces, 9.7.9.8 ld, 9.7.9.11 st, 9.7.13.5 atom, 9.7.13.6 red.
#include <math.h>
#include <string.h>

#include "core.h"
#include "floats.h"
#include "races.h"

static u8* fault(Warp* w, u32 code, int space, u64 address, u32 bytes, int lane) {
  w->fault = code;
  w->fault_space = space;
  w->fault_address = address;
  w->fault_bytes = bytes;
  w->fault_lane = lane;
  return NULL;
}

static u8* resolve_global(Warp* w, u64 address, u32 bytes, int lane, int write) {
  const Cluster* cluster = w->cluster;
  const Region* region = &cluster->regions[w->last_region];
  if (w->last_region >= cluster->num_regions || address < region->base || address + bytes > region->end) {
    u32 low = 0, high = cluster->num_regions;
    while (low < high) {
      u32 middle = (low + high) / 2;
      if (cluster->regions[middle].end <= address) low = middle + 1;
      else high = middle;
    }
    region = &cluster->regions[low];
    if (low == cluster->num_regions || address < region->base || address + bytes > region->end)
      return fault(w, FAULT_GLOBAL, SPACE_GLOBAL, address, bytes, lane);
    w->last_region = low;
  }
  if (write && region->read_only) return fault(w, FAULT_READ_ONLY, SPACE_GLOBAL, address, bytes, lane);
  return (u8*)address;
}

// Host pointer of `bytes` bytes at a device address; NULL and a fault when out of bounds or misaligned.
// Generic addresses: top byte 1 is the shared window, 2 the local window, 0 global. Shared addresses: rank << 24 | offset.
u8* resolve(Warp* w, int space, u64 address, u32 bytes, int lane, int write) {
  const Cluster* cluster = w->cluster;
  if (bytes & (bytes - 1) ? address % 4 : address % bytes) return fault(w, FAULT_MISALIGNED, space, address, bytes, lane);
  if (space == SPACE_GENERIC) {
    u64 window = address >> 56;
    space = window == 1 ? SPACE_CLUSTER : window == 2 ? SPACE_LOCAL : SPACE_GLOBAL;
    if (window) address = (u32)address;
  }
  switch (space) {
    case SPACE_GLOBAL:
      return resolve_global(w, address, bytes, lane, write);
    case SPACE_SHARED:
    case SPACE_CLUSTER: {
      u32 rank = (u32)address >> 24, offset = (u32)address & 0xffffff;
      if (space == SPACE_SHARED && rank != w->cta_rank) return fault(w, FAULT_REMOTE, space, address, bytes, lane);
      if (rank >= cluster->size || offset + bytes > cluster->smem_bytes) return fault(w, FAULT_SHARED, space, address, bytes, lane);
      return cluster->smem[rank] + offset;
    }
    case SPACE_LOCAL:
      if (address + bytes > w->local_bytes) return fault(w, FAULT_LOCAL, space, address, bytes, lane);
      return w->local + (u64)lane * w->local_bytes + address;
    default:
      if (address + bytes > w->param_bytes) return fault(w, FAULT_PARAM, space, address, bytes, lane);
      return w->param + address;
  }
}

#define SEM_STRONG 4
#define SEM_NON_COHERENT 16

static inline u64 address_of(const u8* regs, const Inst* inst, int lane) {
  u64 base = 0;
  if (inst->a) base = inst->e & 2 ? ((const u64*)(regs + (i64)inst->a * SLOT_BYTES))[lane] : ((const u32*)(regs + (i64)inst->a * SLOT_BYTES))[lane];
  return inst->e & 2 ? base + inst->imm : (u32)(base + inst->imm);
}

static void shift(u64* addresses, u32 mask, u32 bytes) {
  for (int lane = 0; lane < LANES; lane++)
    if (mask >> lane & 1) addresses[lane] += bytes;
}

// inst: b space, c element bytes, count registers listed in aux[target..] as (slot << 4 | log2 register bytes),
// d: registers of a vector load that nothing reads, as bits, e bit 0: sign-extend, bit 1: 64-bit address, f ordering (SEM_STRONG and others in native_ops.py).
int memory_access(Warp* w, const Inst* inst, u32 mask, int is_store) {
  u8* regs = w->regs;
  const u32 element = inst->c, total = element * inst->count;
  const i32* slots = w->aux + inst->target;
  u64 addresses[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    u64 address = addresses[lane] = address_of(regs, inst, lane);
    u8* p = resolve(w, inst->b, address, total, lane, is_store);
    if (!p) return 0;
    for (int i = 0; i < inst->count; i++, p += element) {
      u8* slot = regs + (i64)(slots[i] >> 4) * SLOT_BYTES;
      u32 width = 1u << (slots[i] & 15);
      u8* reg = width == 8 ? slot + lane * 8 : slot + lane * 4;
      if (is_store) {
        memcpy(p, reg, element);
      } else {
        i64 value = 0;
        memcpy(&value, p, element);
        if (inst->e & 1) value = element == 1 ? (i8)value : element == 2 ? (i16)value : element == 4 ? (i32)value : value;
        if (width == 2) value = (u16)value;
        memcpy(reg, &value, width == 8 ? 8 : 4);
      }
    }
  }
  if (w->cluster->race && inst->b != SPACE_PARAM && inst->b != SPACE_LOCAL) {
    const int kind = is_store ? RACE_WRITE : RACE_READ;
    const int flags = (inst->b <= SPACE_GLOBAL && inst->f & SEM_STRONG ? ACCESS_STRONG : 0) | (inst->f & SEM_NON_COHERENT ? ACCESS_NON_COHERENT : 0);
    if (!inst->d) race_lanes(w, inst->b, addresses, mask, total, kind, flags);
    for (int i = 0; inst->d && i < inst->count; i++, shift(addresses, mask, element))
      if (!(inst->d >> i & 1)) race_lanes(w, inst->b, addresses, mask, element, kind, flags);
  }
  return 1;
}

enum { A_ADD, A_MIN, A_MAX, A_INC, A_DEC, A_EXCH, A_CAS, A_AND, A_OR, A_XOR };
enum { T_U32, T_S32, T_U64, T_S64, T_F32, T_F64, T_B32, T_B64, T_F16X2, T_BF16X2, T_F16, T_BF16, T_B16 };

static u64 atomic_integer(int op, int type, u64 old, u64 x, u64 y) {
  int is_signed = type == T_S32 || type == T_S64, wide = type == T_U64 || type == T_S64 || type == T_B64;
  i64 so = wide ? (i64)old : (i32)old, sx = wide ? (i64)x : (i32)x;
  int less = is_signed ? so < sx : old < x;
  switch (op) {
    case A_ADD: return old + x;
    case A_MIN: return less ? old : x;
    case A_MAX: return less ? x : old;
    case A_INC: return old >= x ? 0 : old + 1;
    case A_DEC: return old == 0 || old > x ? x : old - 1;
    case A_EXCH: return x;
    case A_CAS: return old == x ? y : old;
    case A_AND: return old & x;
    case A_OR: return old | x;
    default: return old ^ x;
  }
}

static f32 half_op(int op, f32 a, f32 b) { return op == A_ADD ? a + b : op == A_MIN ? min_num(a, b) : max_num(a, b); }

static u64 atomic_value(int op, int type, u64 old, u64 x, u64 y) {
  if (op != A_EXCH && op != A_CAS) {
    if (type == T_F32) return f32_result(half_op(op, bits_f32((u32)old), bits_f32((u32)x)));
    if (type == T_F64) return f64_bits(bits_f64(old) + bits_f64(x));
    if (type == T_F16X2)
      return PAIR16(f16_of(half_op(op, f16_to((u16)old), f16_to((u16)x))), f16_of(half_op(op, f16_to((u16)(old >> 16)), f16_to((u16)(x >> 16)))));
    if (type == T_BF16X2)
      return PAIR16(bf16_of(half_op(op, bf16_to((u16)old), bf16_to((u16)x))), bf16_of(half_op(op, bf16_to((u16)(old >> 16)), bf16_to((u16)(x >> 16)))));
    if (type == T_F16) return f16_of(half_op(op, f16_to((u16)old), f16_to((u16)x)));
    if (type == T_BF16) return bf16_of(half_op(op, bf16_to((u16)old), bf16_to((u16)x)));
  }
  return atomic_integer(op, type, old, x, y);
}

// inst: d result (0: red), a address, b space, c operation, f type, e bit 1: 64-bit address, aux[target..]: source slots (value, second value),
// count: elements of a vector red; sources then are one slot an element.
int atomic_access(Warp* w, const Inst* inst, u32 mask) {
  const int type = inst->f;
  const u32 bytes = type == T_U64 || type == T_S64 || type == T_F64 || type == T_B64 ? 8 : type == T_F16 || type == T_BF16 || type == T_B16 ? 2 : 4;
  const i32* slots = w->aux + inst->target;
  u64 addresses[LANES];
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    u64 address = addresses[lane] = address_of(w->regs, inst, lane);
    u8* p = resolve(w, inst->b, address, bytes * inst->count, lane, 1);
    if (!p) return 0;
    for (int i = 0; i < inst->count; i++, p += bytes) {
      u64 old = 0, x = 0, y = 0;
      u32 lane_bytes = bytes == 8 ? 8 : 4;
      memcpy(&old, p, bytes);
      memcpy(&x, w->regs + (i64)slots[i] * SLOT_BYTES + lane * lane_bytes, lane_bytes);
      if (inst->c == A_CAS) memcpy(&y, w->regs + (i64)slots[1] * SLOT_BYTES + lane * lane_bytes, lane_bytes);
      u64 value = atomic_value(inst->c, type, old, bytes == 2 ? (u16)x : x, y);
      memcpy(p, &value, bytes);
      if (inst->d) memcpy(w->regs + (i64)inst->d * SLOT_BYTES + lane * lane_bytes, &old, lane_bytes);
    }
  }
  if (w->cluster->race) race_lanes(w, inst->b, addresses, mask, bytes * inst->count, RACE_WRITE, ACCESS_STRONG | ACCESS_MODIFIES);
  return 1;
}
