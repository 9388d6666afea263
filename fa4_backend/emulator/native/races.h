// Happens-before detector: see shadow.c, races.c, global_races.c, races.py and global_races.py.
#pragma once
#include "core.h"

enum { RACE_READ, RACE_WRITE };
enum { CONFLICT_READ_WRITE, CONFLICT_WRITE_WRITE, CONFLICT_WRITE_READ, CONFLICT_UNWRITTEN, CONFLICT_NON_COHERENT, CONFLICT_BARRIER, CONFLICT_READ_BARRIER };  // earlier access, later access

// Who accesses: `actor` at `epoch`, knowing of its cluster's others what `clock` says.
typedef struct {
  const u32* clock;  // one epoch an actor: everything up to it happened before
  u32 actor, epoch, pc, warp;
  u32 through_async;  // the access is made by the asynchronous proxy
  u32 partial;        // covers less than a cell
  u32 strong;         // strong (atomics, relaxed, acquire, release): two of these do not race. PTX ISA 8.7
  u32 lanes;          // lanes that access, each as actor + lane; 0: the actor itself does
  u32 non_coherent;  // ld.global.nc
  u32 modifies;      // reads the old value too (atomics), and so follows the strong write that made it. PTX ISA 8.10.4, observation order
  const Cluster* cluster;
} Accessor;

// Since the epoch `epoch` of `actor`, whoever knows of that epoch knows `clock` of another cluster.
typedef struct Knowledge {
  u32 actor, epoch;
  u32 cluster, pad;  // ALL_EARLIER: of all clusters of earlier launches, whatever they did
  const u32* clock;
} Knowledge;
#define ALL_EARLIER 0xffffffffu

typedef struct {
  u32 kind, cell;
  u32 old_actor, old_epoch, old_pc, old_warp, old_cluster;
  u32 new_actor, new_epoch, new_pc, new_warp, new_cluster;
} Conflict;

typedef struct {
  u32 actor, epoch, pc, warp, cluster;
  u32 next;   // the rest of the list, 0 at its end
  u32 lanes;  // as in Accessor
  u16 strong, partial;
} Record;

typedef struct {
  u32 *writes, *reads;  // record numbers, 0: none
  u32 num_cells, is_global;
} Shadow;

struct PageTable;

#define MAX_CONFLICTS 64
typedef struct Race {
  Record* records;
  u32 num_records, capacity;
  const u32* fenced;  // actor -> the actor that stands for its writes made visible to the asynchronous proxy
  Shadow smem[MAX_CLUSTER], tmem[MAX_CLUSTER];
  u8* barriers[MAX_CLUSTER];  // cells of shared memory that hold an mbarrier
  struct PageTable* pages;  // of the global detector
  u32 num_conflicts;
  Conflict conflicts[MAX_CONFLICTS];
} Race;

// What an instruction has found so far, so that a tile touched by one instruction costs one comparison a cell: its record, the last write
// checked, the last reader list checked (by a write), the last reader list extended and its result.
typedef struct {
  u32 first;  // records from here on are of the same instruction; 0: no two cells of it are the same
  u32 record;
  u32 write, checked;
  u32 reads, extended;
  u32 read_by;
} Memo;

// shadow.c
void touch(Race* race, Shadow* shadow, u32 cell, u32 span, const Accessor* who, int kind, Memo* memo);
void conflict(Race* race, u32 kind, u32 cell, const Record* old, const Accessor* who);
u32 lanes_together(const Warp* w, const u64* addresses, u32 lanes);
enum { ACCESS_STRONG = 1, ACCESS_NON_COHERENT = 2, ACCESS_MODIFIES = 4 };
Accessor accessor_of(Warp* w, u32 lanes, u32 bytes, int flags);
// races.c
void race_lanes(Warp* w, int space, const u64* addresses, u32 mask, u32 bytes, int kind, int flags);
// global_races.c
void global_lanes(Warp* w, const u64* addresses, u32 mask, u32 bytes, int kind, int flags);
