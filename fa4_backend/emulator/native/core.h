// Data shared by the parts of the native core, and with Python (mirrored in native_core.py).
#pragma once
#include <stdint.h>
#include <stddef.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
typedef float f32;
typedef double f64;

#define LANES 32
#define FULL 0xffffffffu
#define SLOT_BYTES 128  // one 32-bit register of a warp; a 64-bit register takes two slots
#define MAX_CLUSTER 16

// Why emu_run came back.
enum { EV_STEPS, EV_EXIT, EV_HANDLER, EV_FAULT, EV_ALL_PARKED, EV_STRONG, EV_WARP_SYNC };
// Faults.
enum {
  FAULT_NONE, FAULT_GLOBAL, FAULT_SHARED, FAULT_MISALIGNED, FAULT_LOCAL, FAULT_PARAM, FAULT_READ_ONLY, FAULT_REMOTE,
  FAULT_TRAP, FAULT_CORE, FAULT_PARTIAL, FAULT_MEMBERS,
};
enum { SPACE_GENERIC, SPACE_GLOBAL, SPACE_SHARED, SPACE_CLUSTER, SPACE_LOCAL, SPACE_PARAM };

typedef struct {
  u16 op;
  u8 negated;   // guard is @!p
  u8 flags;     // INST_*
  i32 guard;    // slot of the guard predicate, 0: none
  i32 d, a, b, c, e, f;
  i32 target;   // branch target, or index into aux
  i32 count;    // number of aux entries
  i64 imm;
} Inst;

enum { INST_ALIGNED = 1, INST_WATCHED = 2 };  // every live lane of the warp must take part; it touches watched registers

typedef struct {
  u32 pc, kind, reg, source;
} Watched;  // see undefined.py

typedef struct {
  u64 base, end;
  u32 read_only, pad;
} Region;

struct Race;
struct Knowledge;

typedef struct {
  u8* smem[MAX_CLUSTER];
  u32 smem_bytes, size;
  Region* regions;  // sorted by base
  u32 num_regions, num_knowledge;
  struct Race* race;  // NULL: no detector
  // Races over global memory, see global_races.c.
  struct Race* global;
  const struct Knowledge* knowledge;
  const u32* fenced_global;  // as Race.fenced, for global memory
  u32 number;                // of this cluster, in the order of their starts
  u32 first_of_launch;       // the number of the launch's first cluster
  u32 settled;               // clusters with lower numbers happened before this launch,
  u32 gap_begin, gap_end;    // but not those from gap_begin to gap_end: a launch between did not wait for them
  u32 first_start;           // actor whose epoch 1 is the start of the cluster's first CTA; the others' follow
} Cluster;

typedef struct {
  u8* regs;
  const Inst* code;
  const i32* aux;
  u32* counts;   // executions of each instruction by this warp
  u32* skipped;  // those of them in which the guard held in no lane
  Cluster* cluster;
  u8* param;
  u8* local;
  u32 param_bytes, local_bytes;  // local_bytes: of one lane
  u32 cta_rank, warp_in_cluster;
  u32 pc, active, alive, parked, diverged, exec, wait_pc;
  u32 lane_pc[LANES];
  u32 fault, fault_lane, fault_bytes, fault_space;
  u64 fault_address;
  u64 steps;
  u32 last_region;
  u32 actor;  // of lane 0's accesses, in the race detector; the other lanes follow
  u64 lane_clocks[LANES];  // pointers to what each lane knows, one clock for lanes that know the same
  u32 pc_now;
  u32 strong_mask;  // lanes that made a strong access of global memory just now (races are looked for), and where
  u64 strong_addresses[LANES];
  u32 epoch, split;  // of the lanes' accesses; split: state of the generator that picks among diverged lanes, 0: lowest address first
  // Of each other CTA of the cluster: the last access of each lane to its shared memory, and where the last was.
  u32 remote_epoch[MAX_CLUSTER][LANES], remote_pc[MAX_CLUSTER];
  u32 early_pc[MAX_CLUSTER];  // an access to a CTA that may not have started, plus 1
  const Watched* watched;
  u32* written;         // lanes, of each watched register
  u32* read_unwritten;  // lanes, of each entry of `watched`
  u32 num_watched, pad;
} Warp;

u8* resolve(Warp* w, int space, u64 address, u32 bytes, int lane, int write);
int regroup(Warp* w);
void watch_registers(Warp* w, u32 pc, u32 m);
int memory_access(Warp* w, const Inst* inst, u32 mask, int is_store);
int atomic_access(Warp* w, const Inst* inst, u32 mask);
