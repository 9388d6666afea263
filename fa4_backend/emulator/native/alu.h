// What the generated instruction functions need: conversions, bit tricks, and writing a result under a lane mask.
#pragma once
#include <fenv.h>
#include <math.h>
#include <string.h>

#include "core.h"
#include "floats.h"

typedef void (*AluFunction)(u8* R, const Inst* I, u32 m, u32 cta_rank);
#define SLOT(x) (R + (i64)(x) * SLOT_BYTES)

#define DIV_u(T, x, y) ((y) ? (T)((x) / (y)) : (T)~(T)0)
#define REM_u(T, x, y) ((y) ? (T)((x) % (y)) : (T)(x))
#define DIV_i(T, x, y) ((y) == 0 ? (T)-1 : (y) == -1 ? (T)(0 - (u64)(x)) : (T)((x) / (y)))
#define REM_i(T, x, y) ((y) == 0 ? (T)(x) : (y) == -1 ? (T)0 : (T)((x) % (y)))
#define add_op(x, y) ((x) + (y))
#define min_op(x, y) MIN(x, y)
#define max_op(x, y) MAX(x, y)

// A source with its sign changed: lanes of scalar types are read as numbers, pairs of halves as bits.
#define NEGATED_f32(x) (-(x))
#define NEGATED_f32x2(x) (-(x))
#define NEGATED_f64(x) (-(x))
#define NEGATED_f16(x) (-(x))
#define NEGATED_bf16(x) (-(x))
#define NEGATED_f16x2(x) ((x) ^ 0x80008000u)
#define NEGATED_bf16x2(x) ((x) ^ 0x80008000u)

static inline i32 clamp_i32(i64 x) { return x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : (i32)x; }
static inline i16 clamp_i16(i32 x) { return x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : (i16)x; }
#define LIMIT_i8 (-128), 127
#define LIMIT_u8 0, 255
#define LIMIT_i16 (-32768), 32767
#define LIMIT_u16 0, 65535
#define LIMIT_i32 INT32_MIN, INT32_MAX
#define LIMIT_u32 0, UINT32_MAX
#define LIMIT_i64 INT64_MIN, INT64_MAX
#define LIMIT_u64 0, UINT64_MAX
#define CLAMP_(x, low, high) ((__int128)(x) < (__int128)(low) ? (low) : (__int128)(x) > (__int128)(high) ? (high) : (x))
#define CLAMP(...) CLAMP_(__VA_ARGS__)
#define SATURATE(TD, TS, x) ((TD)CLAMP((x), LIMIT_##TD))

// Float to integer saturates; NaN becomes 0. PTX ISA 9.7.9.21
static inline i64 to_i64(f64 x) { return x != x ? 0 : x >= 9223372036854775808.0 ? INT64_MAX : x <= -9223372036854775808.0 ? INT64_MIN : (i64)x; }
static inline u64 to_u64(f64 x) { return x != x || x <= 0 ? 0 : x >= 18446744073709551616.0 ? UINT64_MAX : (u64)x; }
static inline i32 to_i32(f64 x) { return clamp_i32(to_i64(x)); }
static inline u32 to_u32(f64 x) { return x != x || x <= 0 ? 0 : x >= 4294967295.0 ? UINT32_MAX : (u32)x; }
static inline i16 to_i16(f64 x) { return clamp_i16(to_i32(x)); }
static inline u16 to_u16(f64 x) { u32 v = to_u32(x); return v > 65535 ? 65535 : (u16)v; }

static inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
static inline u32 prmt(u32 a, u32 b, u32 selector) {
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = selector >> (4 * i), byte = bytes >> (8 * (s & 7)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * i);
  }
  return r;
}
static inline u32 prmt_f4e(u32 a, u32 b, u32 n) { return (u32)(((u64)b << 32 | a) >> 8 * n); }
static inline u32 prmt_b4e(u32 a, u32 b, u32 n) { return prmt(a, b, (n & 7) | (n + 7 & 7) << 4 | (n + 6 & 7) << 8 | (n + 5 & 7) << 12); }
static inline u32 prmt_rc8(u32 a, u32 b, u32 n) { return prmt(a, b, n * 0x1111); }
static inline u32 prmt_ecl(u32 a, u32 b, u32 n) { return prmt(a, b, n | MAX(1, n) << 4 | MAX(2, n) << 8 | 3 << 12); }
static inline u32 prmt_ecr(u32 a, u32 b, u32 n) { return prmt(a, b, 0 | MIN(1, n) << 4 | MIN(2, n) << 8 | n << 12); }
static inline u32 prmt_rc16(u32 a, u32 b, u32 n) { return n & 1 ? prmt(a, b, 0x3232) : prmt(a, b, 0x1010); }
static inline u32 brev32(u32 x) {
  x = (x >> 1 & 0x55555555) | (x & 0x55555555) << 1;
  x = (x >> 2 & 0x33333333) | (x & 0x33333333) << 2;
  x = (x >> 4 & 0x0f0f0f0f) | (x & 0x0f0f0f0f) << 4;
  return __builtin_bswap32(x);
}
static inline u32 bfind_s32(u32 x) { x = (i32)x < 0 ? ~x : x; return x ? 31 - __builtin_clz(x) : FULL; }
static inline u64 low_bits(u32 n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
static inline u32 bfe_u32(u32 a, u32 pos, u32 len) { pos &= 255; len &= 255; return pos > 31 ? 0 : (u32)((a >> pos) & low_bits(len)); }
static inline u64 bfe_u64(u64 a, u32 pos, u32 len) { pos &= 255; len &= 255; return pos > 63 ? 0 : (a >> pos) & low_bits(len); }
static inline u64 bfe_s64(u64 a, u32 pos, u32 len) {
  pos &= 255; len &= 255;
  if (!len) return 0;
  u64 sign = a >> MIN(pos + len - 1, 63u) & 1;
  u32 kept = pos > 63 ? 0 : MIN(len, 64 - pos);
  u64 field = pos > 63 ? 0 : (a >> pos) & low_bits(kept);
  return sign ? field | ~low_bits(kept) : field;
}
static inline u32 bfe_s32(u32 a, u32 pos, u32 len) {
  pos &= 255; len &= 255;
  if (!len) return 0;
  u32 sign = a >> MIN(pos + len - 1, 31u) & 1;
  u32 field = pos > 31 ? 0 : (u32)((a >> pos) & low_bits(MIN(len, 32 - pos)));
  u32 kept = pos > 31 ? 0 : MIN(len, 32 - pos);
  return sign ? field | (u32)~low_bits(kept) : field;
}
static inline u32 bfi_b32(u32 a, u32 b, u32 pos, u32 len) {
  pos &= 255; len &= 255;
  u32 field = pos > 31 ? 0 : (u32)low_bits(len) << pos;
  return pos > 31 ? b : (b & ~field) | (a << pos & field);
}
static inline u64 bfi_b64(u64 a, u64 b, u32 pos, u32 len) {
  pos &= 255; len &= 255;
  u64 field = pos > 63 ? 0 : low_bits(len) << pos;
  return pos > 63 ? b : (b & ~field) | (a << pos & field);
}

static inline void put32(u8* slot, const u32* t, u32 mask) {
  u32* d = (u32*)slot;
  if (mask == FULL) memcpy(d, t, 4 * LANES);
  else
    for (int l = 0; l < LANES; l++)
      if (mask >> l & 1) d[l] = t[l];
}
static inline void put64(u8* slot, const u64* t, u32 mask) {
  u64* d = (u64*)slot;
  if (mask == FULL) memcpy(d, t, 8 * LANES);
  else
    for (int l = 0; l < LANES; l++)
      if (mask >> l & 1) d[l] = t[l];
}
static inline void put_mask(u8* slot, u32 bits, u32 mask) {
  u32* d = (u32*)slot;
  *d = (*d & ~mask) | (bits & mask);
}


// setp writes p, optionally combined with a predicate (imm: 1 and, 2 or, 3 xor; e; count: negated), and q, the same of the complement (f).
static inline void put_compare(u8* R, const Inst* I, u32 bits, u32 m) {
  u32 rest = ~bits;
  if (I->imm) {
    u32 other = *(const u32*)SLOT(I->e);
    if (I->count) other = ~other;
    bits = I->imm == 1 ? bits & other : I->imm == 2 ? bits | other : bits ^ other;
    rest = I->imm == 1 ? rest & other : I->imm == 2 ? rest | other : rest ^ other;
  }
  if (I->f) put_mask(SLOT(I->f), rest, m);
  put_mask(SLOT(I->d), bits, m);
}
