// Float helpers used by the instruction rows.
#pragma once
#include <math.h>
#include <string.h>

#include "core.h"

#define PAIR16(low, high) ((u32)(u16)(low) | (u32)(u16)(high) << 16)
#define MIN(x, y) ((x) < (y) ? (x) : (y))
#define MAX(x, y) ((x) > (y) ? (x) : (y))
#define QNAN bits_f32(0x7fffffffu)  // the canonical NaN of the PTX ISA

static inline f32 bits_f32(u32 x) { f32 y; memcpy(&y, &x, 4); return y; }
static inline u32 f32_bits(f32 x) { u32 y; memcpy(&y, &x, 4); return y; }
// Bits of a result: every NaN is the canonical one.
static inline u32 f32_result(f32 x) { u32 b = f32_bits(x); return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : b; }
static inline f64 bits_f64(u64 x) { f64 y; memcpy(&y, &x, 8); return y; }
static inline u64 f64_bits(f64 x) { u64 y; memcpy(&y, &x, 8); return y; }
// Flush a subnormal to a zero of the same sign.
static inline f32 FZ(f32 x) { u32 b = f32_bits(x); return bits_f32((b & 0x7f800000u) ? b : b & 0x80000000u); }
static inline f32 FLUSH(f64 exact, f32 rounded) { return fabs(exact) < 0x1p-126 ? copysignf(0.0f, rounded) : rounded; }
static inline f32 FZH(f32 x) { return fabsf(x) < 0x1p-14f ? copysignf(0.0f, x) : x; }  // the same for float16 values
static inline u32 tf32_rna(f32 x) { u32 b = f32_bits(x); return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : (b + 0x1000u) & 0xffffe000u; }
static inline f32 SAT(f32 x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// -0 counts as smaller than +0; a NaN operand gives the other one.
#define min_num(x, y) ((x) != (x) ? (y) : (y) != (y) ? (x) : (x) < (y) ? (x) : (y) < (x) ? (y) : signbit(x) ? (x) : (y))
#define max_num(x, y) ((x) != (x) ? (y) : (y) != (y) ? (x) : (x) > (y) ? (x) : (y) > (x) ? (y) : signbit(x) ? (y) : (x))
static inline f32 RELU(f32 x) { return x != x ? QNAN : x > 0 ? x : 0.0f; }
static inline f32 xorsign(f32 m, f32 x, f32 y) { return bits_f32((f32_bits(m) & 0x7fffffffu) | ((f32_bits(x) ^ f32_bits(y)) & 0x80000000u)); }

static inline f32 bf16_to(u16 x) { return bits_f32((u32)x << 16); }
static inline u16 bf16_of(f32 x) {
  u32 b = f32_bits(x);
  u32 rounded = (b + 0x7fffu + (b >> 16 & 1)) >> 16;
  return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)rounded;
}
static inline u16 bf16_rz(f32 x) { u32 b = f32_bits(x); return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (u16)(b >> 16); }
static inline f32 f16_to(u16 x) { _Float16 h; memcpy(&h, &x, 2); return (f32)h; }
static inline u16 f16_of(f32 x) {
  _Float16 h = (_Float16)x;
  u16 b;
  memcpy(&b, &h, 2);
  return x != x ? 0x7fff : b;
}
static inline u16 f16_rz(f32 x) {
  u16 b = f16_of(x);
  return x == x && fabsf(f16_to(b)) > fabsf(x) ? b - 1 : b;
}
// 8-bit floats: `m` mantissa bits, exponent bias `bias`; e4m3 has no infinity and one NaN pattern, e5m2 is IEEE-like.
static inline f32 f8_to(u8 x, int m, int bias) {
  int exponent = (x & 0x7f) >> m, mantissa = x & ((1 << m) - 1);
  f32 value = exponent ? ldexpf((f32)(mantissa | 1 << m), exponent - bias - m) : ldexpf((f32)mantissa, 1 - bias - m);
  return x & 0x80 ? -value : value;
}
static inline f32 e4m3_to(u8 x) { return (x & 0x7f) == 0x7f ? QNAN : f8_to(x, 3, 7); }
static inline f32 e5m2_to(u8 x) {
  if ((x & 0x7c) == 0x7c) return x & 3 ? QNAN : x & 0x80 ? -INFINITY : INFINITY;
  return f8_to(x, 2, 15);
}
static inline u8 f8_of(f32 x, int m, int bias, f32 largest, u8 largest_bits) {
  u8 sign = f32_bits(x) >> 24 & 0x80;
  f32 v = fabsf(x);
  if (x != x) return 0x7f;
  if (v == 0) return sign;
  if (v >= largest) return sign | largest_bits;
  int exponent;
  frexpf(v, &exponent);
  int scale = MAX(exponent - 1, 1 - bias) - m;
  f32 steps = rintf(ldexpf(v, -scale));
  // Rounding up to the next power of two carries into the exponent by itself.
  u32 bits = (u32)steps + ((u32)(scale + m + bias - 1) << m);
  return sign | (u8)bits;
}
static inline u8 e4m3_of(f32 x) { return f8_of(x, 3, 7, 448.0f, 0x7e); }
static inline u8 e5m2_of(f32 x) { return f8_of(x, 2, 15, 57344.0f, 0x7b); }
