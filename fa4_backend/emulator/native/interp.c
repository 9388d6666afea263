// Runs one warp until it needs Python: a table-driven switch over 32-lane registers.
//
// Divergence: lanes that take different branches form groups; the group with the lowest instruction address runs and
// groups that meet at one address merge. A group that waits (parked) is skipped until it is woken or met.
#include "alu.h"
#include "ops.h"
#include "races.h"

// Pick the lanes with the lowest address among those that can run, or with a generator (`split`) those of any ready lane, since nothing
// promises an order; merge every lane that stands there. Returns 0 when every live lane is parked.
int regroup(Warp* w) {
  for (int lane = 0; lane < LANES; lane++)
    if (w->active >> lane & 1) w->lane_pc[lane] = w->pc;
  u32 ready = w->alive & ~w->parked, low = FULL, next = FULL;
  if (!ready) { w->active = 0; return 0; }
  for (int lane = 0; lane < LANES; lane++)
    if (ready >> lane & 1) low = MIN(low, w->lane_pc[lane]);
  if (w->split) {
    w->split = w->split * 1664525u + 1013904223u | 1;
    u32 left = ready;
    for (u32 skip = (w->split >> 8) % (u32)__builtin_popcount(ready); skip; skip--) left &= left - 1;
    low = w->lane_pc[__builtin_ctz(left)];
  }
  w->active = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(w->alive >> lane & 1)) continue;
    if (w->lane_pc[lane] == low) w->active |= 1u << lane;
    else if (w->lane_pc[lane] > low) next = MIN(next, w->lane_pc[lane]);
  }
  w->parked &= ~w->active;
  w->pc = low;
  w->wait_pc = next;
  w->diverged = w->active != w->alive;
  return 1;
}

int emu_regroup(Warp* w) { return regroup(w); }

// Park the running group (it stands at pc) and go on with another one.
int emu_park(Warp* w) {
  w->parked |= w->active;
  return regroup(w);
}

static AluFunction alu_table[NUM_ALU];

enum { SHFL_UP, SHFL_DOWN, SHFL_BFLY, SHFL_IDX };

// PTX ISA 9.7.9.6 shfl.sync: c holds the segment mask (bits 8-12) and the clamp (bits 0-4).
// What a lane gets of one that takes no part (not among `m`) is undefined: the bits of a NaN, as registers have at the start.
static void shuffle(u8* R, const Inst* I, u32 m) {
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
enum { REDUX_ADD, REDUX_MIN_U, REDUX_MAX_U, REDUX_MIN_S, REDUX_MAX_S, REDUX_AND, REDUX_OR, REDUX_XOR, REDUX_MIN_F, REDUX_MAX_F, REDUX_MIN_F_NAN, REDUX_MAX_F_NAN };

static u32 reduce(const u32* a, int op, u32 mask, u32 absolute) {
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
static void mma_sync(u8* R, const Inst* I, const i32* slots) {
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

// add.cc, sub.cc, mad.cc and the forms that take the carry in: e holds CC.CF, count bit 0 reads and bit 1 writes it, f: 64 bits wide.
// 9.7.2 extended-precision integer arithmetic
enum { CARRY_ADD, CARRY_SUB, CARRY_MAD_LO, CARRY_MAD_HI };
static void carry(u8* R, const Inst* I, u32 m) {
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

// Every live lane named by `need` must stand here, or the group parks until it does.
#define CONVERGE(need)                                  \
  if ((w->active & (need) & w->alive) != ((need) & w->alive)) { \
    w->counts[pc]--;                                    \
    w->steps--;                                         \
    w->pc = pc;                                         \
    w->parked |= w->active;                             \
    if (!regroup(w)) return EV_ALL_PARKED;              \
    pc = w->pc;                                         \
    continue;                                           \
  }
#define FIRST_LANE(slot) (((const u32*)SLOT(slot))[__builtin_ctz(m)])

void alu_fill_0(AluFunction*);
void alu_fill_1(AluFunction*);
void alu_fill_2(AluFunction*);
void alu_fill_3(AluFunction*);

__attribute__((constructor)) static void fill_table(void) {
  alu_fill_0(alu_table);
  alu_fill_1(alu_table);
  alu_fill_2(alu_table);
  alu_fill_3(alu_table);
}

// An instruction that all lanes must execute has a guard that only lanes `m` pass.
static int partial(Warp* w, u32 pc, u32 m) {
  w->fault = FAULT_PARTIAL;
  w->fault_lane = (u32)__builtin_ctz(w->active & ~m);
  w->pc = pc;
  return EV_FAULT;
}

// Lanes `m` name with whom they execute: each must be a member of its own mask, and members must agree. `same`: all lanes must.
// PTX ISA 9.7.9.6, 9.7.13.2, 9.7.13.9 to 9.7.13.15
static int wrong_members(Warp* w, u32 pc, u32 m, const u32* members, int same) {
  u32 first = members[__builtin_ctz(m)];
  for (u32 left = m; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    int agrees = members[lane] >> lane & 1 && !(same && members[lane] != first);
    for (u32 with = members[lane] & m; with && agrees; with &= with - 1) agrees = members[__builtin_ctz(with)] == members[lane];
    if (agrees) continue;
    w->fault = FAULT_MEMBERS;
    w->fault_lane = (u32)lane;
    w->pc = pc;
    return 1;
  }
  return 0;
}
#define MEMBERS(slot, same) if (wrong_members(w, pc, m, (const u32*)SLOT(slot), same)) return EV_FAULT

int emu_run(Warp* w, i64 max_steps) {
  u8* R = w->regs;
  if (!w->alive) return EV_EXIT;
  if (!w->active && !regroup(w)) return EV_ALL_PARKED;
  u32 pc = w->pc;
  for (; max_steps > 0; max_steps--) {
    if (w->diverged && pc >= w->wait_pc) {
      w->pc = pc;
      regroup(w);
      pc = w->pc;
    }
    const Inst* I = w->code + pc;
    u32 m = w->active;
    if (I->guard) {
      u32 bits = *(const u32*)SLOT(I->guard);
      m &= I->negated ? ~bits : bits;
      if (!m) w->skipped[pc]++;
    }
    w->counts[pc]++;
    w->steps++;
    if (I->flags & INST_WATCHED && w->num_watched) watch_registers(w, pc, m);
    if (I->op < NUM_ALU) {
      if (m) alu_table[I->op](R, I, m, w->cta_rank);
      pc++;
      continue;
    }
    switch (I->op) {
      case OP_PACK64: {  // mov.b64 d, {a, b}
        const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
        u64 t[LANES];
        for (int l = 0; l < LANES; l++) t[l] = (u64)b[l] << 32 | a[l];
        put64(SLOT(I->d), t, m);
        break;
      }
      case OP_UNPACK64: {  // mov.b64 {d, e}, a
        const u64* a = (const u64*)SLOT(I->a);
        u32 low[LANES], high[LANES];
        for (int l = 0; l < LANES; l++) { low[l] = (u32)a[l]; high[l] = (u32)(a[l] >> 32); }
        put32(SLOT(I->d), low, m);
        put32(SLOT(I->e), high, m);
        break;
      }
      case OP_MOVE128: {  // mov.b128 between a 128-bit register and two 64-bit ones: d <- a, e <- b
        u64 low[LANES], high[LANES];
        memcpy(low, SLOT(I->a), sizeof low);
        memcpy(high, SLOT(I->b), sizeof high);
        put64(SLOT(I->d), low, m);
        put64(SLOT(I->e), high, m);
        break;
      }
      case OP_CARRY: {
        carry(R, I, m);
        break;
      }
      case OP_PACK32: {
        const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
        u32 t[LANES];
        for (int l = 0; l < LANES; l++) t[l] = PAIR16(a[l], b[l]);
        put32(SLOT(I->d), t, m);
        break;
      }
      case OP_UNPACK32: {
        const u32* a = (const u32*)SLOT(I->a);
        u32 low[LANES], high[LANES];
        for (int l = 0; l < LANES; l++) { low[l] = a[l] & 0xffff; high[l] = a[l] >> 16; }
        put32(SLOT(I->d), low, m);
        put32(SLOT(I->e), high, m);
        break;
      }
      case OP_PACK16: {
        const u32 *a = (const u32*)SLOT(I->a), *b = (const u32*)SLOT(I->b);
        u32 t[LANES];
        for (int l = 0; l < LANES; l++) t[l] = (a[l] & 255) | (b[l] & 255) << 8;
        put32(SLOT(I->d), t, m);
        break;
      }
      case OP_LOAD:
      case OP_STORE:
        w->pc_now = pc;
        if (m && !memory_access(w, I, m, I->op == OP_STORE)) { w->pc = pc; return EV_FAULT; }
        if (w->strong_mask) { w->pc = pc + 1; return EV_STRONG; }
        break;
      case OP_ATOMIC:
        w->pc_now = pc;
        if (m && !atomic_access(w, I, m)) { w->pc = pc; return EV_FAULT; }
        if (w->strong_mask) { w->pc = pc + 1; return EV_STRONG; }
        break;
      case OP_BRANCH: {
        u32 stay = w->active & ~m;
        if (!m) break;
        if (!stay) {
          pc = I->target;
          if (w->diverged) { w->pc = pc; regroup(w); pc = w->pc; }
          continue;
        }
        for (int l = 0; l < LANES; l++) {
          if (m >> l & 1) w->lane_pc[l] = I->target;
          else if (stay >> l & 1) w->lane_pc[l] = pc + 1;
        }
        w->active = 0;  // lane_pc already holds the place of both groups
        regroup(w);
        pc = w->pc;
        continue;
      }
      case OP_BRANCH_TABLE: {
        const u32* index = (const u32*)SLOT(I->a);
        if (!m) break;
        for (int l = 0; l < LANES; l++) {
          if (m >> l & 1) {
            if (index[l] >= (u32)I->count) { w->fault = FAULT_TRAP; w->fault_lane = l; w->pc = pc; return EV_FAULT; }
            w->lane_pc[l] = w->aux[I->target + index[l]];
          } else if (w->active >> l & 1) w->lane_pc[l] = pc + 1;
        }
        w->active = 0;
        regroup(w);
        pc = w->pc;
        continue;
      }
      case OP_EXIT: {
        if (!m) break;
        w->pc = pc + 1;
        for (int l = 0; l < LANES; l++)
          if (w->active >> l & 1) w->lane_pc[l] = pc + 1;
        w->alive &= ~m;
        w->active = 0;
        if (!w->alive) return EV_EXIT;
        if (!regroup(w)) return EV_ALL_PARKED;
        pc = w->pc;
        continue;
      }
      case OP_SHUFFLE:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->e));
        MEMBERS(I->e, 0);
        shuffle(R, I, m);
        break;
      case OP_VOTE: {  // d result (predicate or ballot), a predicate, e member mask, imm mode, c: source negated
        if (!m) break;
        u32 members = FIRST_LANE(I->e);
        CONVERGE(members);
        MEMBERS(I->e, 1);
        u32 bits = *(const u32*)SLOT(I->a);
        if (I->c) bits = ~bits;
        members &= m;
        bits &= members;
        if (I->imm == VOTE_BALLOT) {
          u32 t[LANES];
          for (int l = 0; l < LANES; l++) t[l] = bits;
          put32(SLOT(I->d), t, m);
        } else {
          int r = I->imm == VOTE_ALL ? bits == members : I->imm == VOTE_ANY ? bits != 0 : bits == members || !bits;
          put_mask(SLOT(I->d), r ? FULL : 0, m);
        }
        break;
      }
      case OP_MATCH: {  // d mask, f optional predicate, a value, e members, imm: all, c: 64-bit value
        if (!m) break;
        u32 members = FIRST_LANE(I->e), t[LANES], all = 1;
        CONVERGE(members);
        MEMBERS(I->e, 1);
        for (int l = 0; l < LANES; l++) {
          t[l] = 0;
          for (int k = 0; k < LANES; k++) {
            if (!((members & m) >> k & 1) || !(m >> l & 1)) continue;
            u64 x = I->c ? ((const u64*)SLOT(I->a))[l] : ((const u32*)SLOT(I->a))[l];
            u64 y = I->c ? ((const u64*)SLOT(I->a))[k] : ((const u32*)SLOT(I->a))[k];
            if (x == y) t[l] |= 1u << k;
            else all = 0;
          }
        }
        if (I->imm)
          for (int l = 0; l < LANES; l++) t[l] = all ? members & m : 0;
        put32(SLOT(I->d), t, m);
        if (I->f) put_mask(SLOT(I->f), all ? FULL : 0, m);
        break;
      }
      case OP_REDUX: {
        if (!m) break;
        u32 members = FIRST_LANE(I->e), t[LANES];
        CONVERGE(members);
        MEMBERS(I->e, 1);
        u32 r = reduce((const u32*)SLOT(I->a), (int)I->imm, members & m, I->c);
        for (int l = 0; l < LANES; l++) t[l] = r;
        put32(SLOT(I->d), t, m);
        break;
      }
      case OP_ELECT: {  // d leader lane, f predicate, a members
        if (!m) break;
        u32 members = FIRST_LANE(I->a), t[LANES];
        CONVERGE(members);
        MEMBERS(I->a, 1);
        u32 leader = __builtin_ctz(members & m);
        for (int l = 0; l < LANES; l++) t[l] = leader;
        put32(SLOT(I->d), t, m);
        put_mask(SLOT(I->f), 1u << leader, m);
        break;
      }
      case OP_MMA_SYNC:
        if (!m) break;
        CONVERGE(FULL);
        if (m != w->active) return partial(w, pc, m);
        mma_sync(R, I, w->aux + I->target);
        break;
      case OP_ACTIVEMASK: {
        u32 t[LANES];
        for (int l = 0; l < LANES; l++) t[l] = w->active;
        put32(SLOT(I->d), t, m);
        break;
      }
      case OP_WARP_SYNC:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->a));
        MEMBERS(I->a, 0);
        if (w->cluster->race) { w->exec = m; w->pc = pc + 1; return EV_WARP_SYNC; }
        break;
      case OP_CLOCK: {  // count is the register width; imm 1: nanoseconds. Time is the number of executed instructions.
        u64 t[LANES];
        u32 low[LANES];
        for (int l = 0; l < LANES; l++) { t[l] = w->steps; low[l] = (u32)t[l]; }
        if (I->count == 8) put64(SLOT(I->d), t, m);
        else put32(SLOT(I->d), low, m);
        break;
      }
      case OP_TRAP:
        if (!m) break;
        w->fault = FAULT_TRAP;
        w->fault_lane = __builtin_ctz(m);
        w->pc = pc;
        return EV_FAULT;
      case OP_NOP:
        break;
      case OP_HANDLER:
        if (!m) break;
        if (I->flags & INST_ALIGNED) {
          CONVERGE(FULL);
          if (m != w->active) return partial(w, pc, m);
        }
        w->pc = pc;
        w->exec = m;
        return EV_HANDLER;
      default:
        w->fault = FAULT_CORE;
        w->pc = pc;
        return EV_FAULT;
    }
    pc++;
  }
  w->pc = pc;
  return EV_STEPS;
}
