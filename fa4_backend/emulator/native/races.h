// Happens-before detector: see races.c and races.py.
#pragma once
#include "core.h"

enum { RACE_READ, RACE_WRITE, RACE_ATOMIC };
enum { CONFLICT_READ_WRITE, CONFLICT_WRITE_WRITE, CONFLICT_WRITE_READ, CONFLICT_UNWRITTEN };  // earlier access, later access

// Who accesses: `actor` at `epoch`, knowing of others what `clock` says.
typedef struct {
  const u32* clock;  // one epoch an actor: everything up to it happened before
  u32 actor, epoch, pc, warp;
  u32 through_async;  // the access is made by the asynchronous proxy
  u32 partial;        // covers less than a cell
} Accessor;

typedef struct {
  u32 kind, cell;
  u32 old_actor, old_epoch, old_pc, old_warp;
  u32 new_actor, new_epoch, new_pc, new_warp;
} Conflict;

void race_lanes(Warp* w, int space, const u64* addresses, u32 mask, u32 bytes, int kind);
