// Instructions by which lanes of a warp learn of each other's registers: shuffles, votes, matches, reductions, mma.sync.
#include "alu.h"
#include "lane_ops.h"

enum { SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX };

// PTX ISA 9.7.9.6 shfl.sync: c holds the segment mask (bits 8-12) and the clamp (bits 0-4).
// What a lane gets of one that takes no part (not among `m`) is undefined: the bits of a NaN, as registers have at the start.
void shuffle(u8* R, const Inst* I, u32 m) {
  const u32 *a = (const u32*)(R + (i64)I->a * SLOT_BYTES), *b = (const u32*)(R + (i64)I->b * SLOT_BYTES), *c = (const u32*)(R + (i64)I->c * SLOT_BYTES);
  u32 t[LANES], in_range = 0;
  for (int l = 0; l < LANES; l++) {
    u32 clamp = c[l] & 31, segment = c[l] >> 8 & 31, low = l & segment, high = low | (clamp & ~segment);
    i32 j, ok, bv = b[l] & 31;
    switch (I->imm) {
      case SHFL_UP: j = l - bv; ok = j >= (i32)high; break;
      case SHFL_DOWN: j = l + bv; ok = j <= (i32)high; break;
      case SHFL_BFLY: j = l ^ bv; ok = j <= (i32)high; break;
      default: j = low | (bv & ~segment); ok = j <= (i32)high;
    }
    t[l] = !ok ? a[l] : m >> j & 1 ? a[j] : FULL;
    in_range |= (u32)(ok != 0) << l;
  }
  put32(R + (i64)I->d * SLOT_BYTES, t, m);
  if (I->f) put_mask(R + (i64)I->f * SLOT_BYTES, in_range, m);
}

enum { VOTE_ALL, VOTE_ANY, VOTE_UNI, VOTE_BALLOT };

// vote.sync: d result (predicate or ballot), a predicate, imm mode, c: source negated.
void vote(u8* R, const Inst* I, u32 m, u32 members) {
  u32 bits = *(const u32*)SLOT(I->a);
  if (I->c) bits = ~bits;
  bits &= members;
  if (I->imm == VOTE_BALLOT) {
    u32 t[LANES];
    for (int l = 0; l < LANES; l++) t[l] = bits;
    put32(SLOT(I->d), t, m);
  } else {
    int r = I->imm == VOTE_ALL ? bits == members : I->imm == VOTE_ANY ? bits != 0 : bits == members || !bits;
    put_mask(SLOT(I->d), r ? FULL : 0, m);
  }
}

// match.sync: d mask, f optional predicate, a value, imm: all, c: 64-bit value.
void match(u8* R, const Inst* I, u32 m, u32 members) {
  u32 t[LANES], all = 1;
  for (int l = 0; l < LANES; l++) {
    t[l] = 0;
    for (int k = 0; k < LANES; k++) {
      if (!(members >> k & 1) || !(m >> l & 1)) continue;
      u64 x = I->c ? ((const u64*)SLOT(I->a))[l] : ((const u32*)SLOT(I->a))[l];
      u64 y = I->c ? ((const u64*)SLOT(I->a))[k] : ((const u32*)SLOT(I->a))[k];
      if (x == y) t[l] |= 1u << k;
      else all = 0;
    }
  }
  if (I->imm)
    for (int l = 0; l < LANES; l++) t[l] = all ? members : 0;
  put32(SLOT(I->d), t, m);
  if (I->f) put_mask(SLOT(I->f), all ? FULL : 0, m);
}

enum { REDUX_ADD, REDUX_MIN_U, REDUX_MAX_U, REDUX_MIN_S, REDUX_MAX_S, REDUX_AND, REDUX_OR, REDUX_XOR, REDUX_MIN_F, REDUX_MAX_F, REDUX_MIN_F_NAN, REDUX_MAX_F_NAN };

static u32 reduced(const u32* a, int op, u32 mask, u32 absolute) {
  int first = 1;
  u32 r = 0;
  for (int l = 0; l < LANES; l++) {
    if (!(mask >> l & 1)) continue;
    u32 x = absolute ? a[l] & 0x7fffffffu : a[l];
    if (first) { r = x; first = 0; continue; }
    f32 fr = bits_f32(r), fx = bits_f32(x);
    switch (op) {
      case REDUX_ADD: r += x; break;
      case REDUX_MIN_U: r = MIN(r, x); break;
      case REDUX_MAX_U: r = MAX(r, x); break;
      case REDUX_MIN_S: r = (u32)MIN((i32)r, (i32)x); break;
      case REDUX_MAX_S: r = (u32)MAX((i32)r, (i32)x); break;
      case REDUX_AND: r &= x; break;
      case REDUX_OR: r |= x; break;
      case REDUX_XOR: r ^= x; break;
      case REDUX_MIN_F: r = f32_bits(min_num(fr, fx)); break;
      case REDUX_MAX_F: r = f32_bits(max_num(fr, fx)); break;
      case REDUX_MIN_F_NAN: r = fr != fr || fx != fx ? 0x7fffffffu : f32_bits(min_num(fr, fx)); break;
      default: r = fr != fr || fx != fx ? 0x7fffffffu : f32_bits(max_num(fr, fx));
    }
  }
  return r;
}

// redux.sync: d result, a value, imm operation, c: of absolute values.
void reduce(u8* R, const Inst* I, u32 m, u32 members) {
  u32 r = reduced((const u32*)SLOT(I->a), (int)I->imm, members, I->c), t[LANES];
  for (int l = 0; l < LANES; l++) t[l] = r;
  put32(SLOT(I->d), t, m);
}

// elect.sync: d leader lane, f predicate.
void elect(u8* R, const Inst* I, u32 m, u32 members) {
  u32 leader = __builtin_ctz(members), t[LANES];
  for (int l = 0; l < LANES; l++) t[l] = leader;
  put32(SLOT(I->d), t, m);
  put_mask(SLOT(I->f), 1u << leader, m);
}

// mma.sync m16n8kK with float32 accumulators: aux lists the slots of D (4), A, B and C (4). PTX ISA 9.7.14.5.
// A holds rows g, g + 8 and B columns g of thread 4 g + t; products are added exactly over k, rounded once, then added to C.
enum { MMA_F16, MMA_BF16, MMA_E4M3, MMA_E5M2 };
static f32 element(const u32* reg, int lane, int index, int kind) {
  u32 word = reg[lane];
  switch (kind) {
    case MMA_F16: return f16_to((u16)(word >> 16 * index));
    case MMA_BF16: return bf16_to((u16)(word >> 16 * index));
    case MMA_E4M3: return e4m3_to((u8)(word >> 8 * index));
    default: return e5m2_to((u8)(word >> 8 * index));
  }
}
void mma_sync(u8* R, const Inst* I, const i32* slots) {
  const int k_total = I->c, per_register = I->a < MMA_E4M3 ? 2 : 4, halves = k_total / (4 * per_register);
  f32 A[16][32], B[8][32], D[16][8];
  const i32 *a = slots + 4, *b = a + 2 * halves, *c = b + halves;
  for (int lane = 0; lane < LANES; lane++) {
    int g = lane >> 2, t = lane & 3;
    for (int half = 0; half < halves; half++)
      for (int i = 0; i < per_register; i++) {
        int k = half * 4 * per_register + t * per_register + i;
        A[g][k] = element((const u32*)SLOT(a[2 * half]), lane, i, I->a);
        A[g + 8][k] = element((const u32*)SLOT(a[2 * half + 1]), lane, i, I->a);
        B[g][k] = element((const u32*)SLOT(b[half]), lane, i, I->b);
      }
  }
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++) {
      f64 sum = 0;
      for (int k = 0; k < k_total; k++) sum += (f64)A[row][k] * B[column][k];
      D[row][column] = (f32)sum;
    }
  for (int i = 0; i < 4; i++) {
    u32 t[LANES];
    for (int lane = 0; lane < LANES; lane++)
      t[lane] = f32_result(((const f32*)SLOT(c[i]))[lane] + D[(lane >> 2) + 8 * (i >> 1)][(lane & 3) * 2 + (i & 1)]);
    memcpy(SLOT(slots[i]), t, sizeof t);
  }
}
