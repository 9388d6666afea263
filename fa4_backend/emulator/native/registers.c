// Instructions whose operands are several registers a lane: moves that join or part them, and sums with a carry.
#include "alu.h"
#include "lane_ops.h"

// mov.b64 d, {a, b}
void pack64(u8* R, const Inst* I, u32 m) {
  const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
  u64 t[LANES];
  for (int l = 0; l < LANES; l++) t[l] = (u64)b[l] << 32 | a[l];
  put64(SLOT(I->d), t, m);
}

// mov.b64 {d, e}, a
void unpack64(u8* R, const Inst* I, u32 m) {
  const u64* a = (const u64*)SLOT(I->a);
  u32 low[LANES], high[LANES];
  for (int l = 0; l < LANES; l++) { low[l] = (u32)a[l]; high[l] = (u32)(a[l] >> 32); }
  put32(SLOT(I->d), low, m);
  put32(SLOT(I->e), high, m);
}

// mov.b128 between a 128-bit register and two 64-bit ones: d <- a, e <- b
void move128(u8* R, const Inst* I, u32 m) {
  u64 low[LANES], high[LANES];
  memcpy(low, SLOT(I->a), sizeof low);
  memcpy(high, SLOT(I->b), sizeof high);
  put64(SLOT(I->d), low, m);
  put64(SLOT(I->e), high, m);
}

// mov.b32 d, {a, b}
void pack32(u8* R, const Inst* I, u32 m) {
  const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
  u32 t[LANES];
  for (int l = 0; l < LANES; l++) t[l] = PAIR16(a[l], b[l]);
  put32(SLOT(I->d), t, m);
}

// mov.b32 {d, e}, a
void unpack32(u8* R, const Inst* I, u32 m) {
  const u32* a = (const u32*)SLOT(I->a);
  u32 low[LANES], high[LANES];
  for (int l = 0; l < LANES; l++) { low[l] = a[l] & 0xffff; high[l] = a[l] >> 16; }
  put32(SLOT(I->d), low, m);
  put32(SLOT(I->e), high, m);
}

// mov.b16 d, {a, b} of bytes
void pack16(u8* R, const Inst* I, u32 m) {
  const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
  u32 t[LANES];
  for (int l = 0; l < LANES; l++) t[l] = (a[l] & 255) | (b[l] & 255) << 8;
  put32(SLOT(I->d), t, m);
}

// add.cc, sub.cc, mad.cc and the forms that take the carry in: e holds CC.CF, count bit 0 reads and bit 1 writes it, f: 64 bits wide.
// 9.7.2 extended-precision integer arithmetic
enum { CARRY_ADD, CARRY_SUB, CARRY_MAD_LO, CARRY_MAD_HI };
void carry(u8* R, const Inst* I, u32 m) {
  const int bits = I->f ? 64 : 32;
  u32 flags = I->count & 1 ? *(const u32*)SLOT(I->e) : 0, out = 0, low[LANES];
  u64 wide[LANES];
  for (int l = 0; l < LANES; l++) {
    unsigned __int128 x = I->f ? ((const u64*)SLOT(I->a))[l] : ((const u32*)SLOT(I->a))[l];
    unsigned __int128 y = I->f ? ((const u64*)SLOT(I->b))[l] : ((const u32*)SLOT(I->b))[l];
    unsigned __int128 z = 0, in = flags >> l & 1, mask = ((unsigned __int128)1 << bits) - 1;
    if (I->imm >= CARRY_MAD_LO) {
      z = I->f ? ((const u64*)SLOT(I->c))[l] : ((const u32*)SLOT(I->c))[l];
      x = I->imm == CARRY_MAD_LO ? x * y & mask : x * y >> bits;
      y = z;
    }
    unsigned __int128 r = I->imm == CARRY_SUB ? x - y - in : x + y + in;
    out |= (u32)(r >> bits & 1) << l;
    wide[l] = (u64)r;
    low[l] = (u32)r;
  }
  if (I->f) put64(SLOT(I->d), wide, m);
  else put32(SLOT(I->d), low, m);
  if (I->count & 2) put_mask(SLOT(I->e), out, m);
}
