// Runs one warp until it needs Python: a table-driven switch over 32-lane registers.
//
// Divergence: lanes that take different branches form groups; the group with the lowest instruction address runs and
// groups that meet at one address merge. A group that waits (parked) is skipped until it is woken or met.
#include "alu.h"
#include "lane_ops.h"
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
      case OP_PACK64: pack64(R, I, m); break;
      case OP_UNPACK64: unpack64(R, I, m); break;
      case OP_MOVE128: move128(R, I, m); break;
      case OP_CARRY: carry(R, I, m); break;
      case OP_PACK32: pack32(R, I, m); break;
      case OP_UNPACK32: unpack32(R, I, m); break;
      case OP_PACK16: pack16(R, I, m); break;
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
      case OP_VOTE:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->e));
        MEMBERS(I->e, 1);
        vote(R, I, m, FIRST_LANE(I->e) & m);
        break;
      case OP_MATCH:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->e));
        MEMBERS(I->e, 1);
        match(R, I, m, FIRST_LANE(I->e) & m);
        break;
      case OP_REDUX:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->e));
        MEMBERS(I->e, 1);
        reduce(R, I, m, FIRST_LANE(I->e) & m);
        break;
      case OP_ELECT:
        if (!m) break;
        CONVERGE(FIRST_LANE(I->a));
        MEMBERS(I->a, 1);
        elect(R, I, m, FIRST_LANE(I->a) & m);
        break;
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
