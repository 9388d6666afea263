// Shadow of shared memory and TMEM: a row of cells a CTA, made with the cluster. What a warp accesses comes here first.
#include "races.h"

#include <stdlib.h>
#include <string.h>

Race* emu_race_new(const u32* fenced, u32 size, u32 smem_cells, u32 tmem_cells) {
  Race* race = calloc(1, sizeof(Race));
  race->fenced = fenced;
  race->capacity = 4096;
  race->num_records = 1;  // number 0 means none
  race->records = malloc(race->capacity * sizeof(Record));
  for (u32 i = 0; i < size; i++) {
    Shadow* shadows[] = {&race->smem[i], &race->tmem[i]};
    race->barriers[i] = calloc(smem_cells + 2, 1);
    for (int k = 0; k < 2; k++) {
      shadows[k]->num_cells = k ? tmem_cells : smem_cells;
      shadows[k]->writes = calloc(shadows[k]->num_cells, 4);
      shadows[k]->reads = calloc(shadows[k]->num_cells, 4);
    }
  }
  return race;
}

void emu_race_free(Race* race) {
  for (int i = 0; i < MAX_CLUSTER; i++) {
    free(race->smem[i].writes), free(race->smem[i].reads);
    free(race->tmem[i].writes), free(race->tmem[i].reads);
    free(race->barriers[i]);
  }
  free(race->records);
  free(race);
}

u32 emu_race_num_conflicts(Race* race) { return race->num_conflicts; }

u32 emu_race_take(Race* race, Conflict* out) {
  u32 count = race->num_conflicts;
  memcpy(out, race->conflicts, count * sizeof(Conflict));
  race->num_conflicts = 0;
  return count;
}

// An ordinary access of an mbarrier that is in use.
static void over_barrier(Race* race, u32 rank, u32 cell, u32 span, const Accessor* who, int kind) {
  for (u32 end = cell + span; cell < end && cell < race->smem[rank].num_cells; cell++)
    if (race->barriers[rank][cell]) conflict(race, kind == RACE_WRITE ? CONFLICT_BARRIER : CONFLICT_READ_BARRIER, cell, NULL, who);
}

void emu_race_barrier(Race* race, u32 rank, u32 offset, int live) {
  memset(race->barriers[rank] + (offset >> 2), live, 2);
}

// `count` runs of `span` cells each, starting at cells[i] * scale, in shared memory (is_tmem 0) or TMEM of CTA `rank`.
void emu_race_access(Race* race, int is_tmem, u32 rank, const i64* cells, u32 count, u32 scale, u32 span, const Accessor* who, int kind) {
  Shadow* shadow = is_tmem ? &race->tmem[rank] : &race->smem[rank];
  Memo memo = {0};
  for (u32 i = 0; i < count; i++) {
    if (!is_tmem) over_barrier(race, rank, (u32)(cells[i] * scale), span, who, kind);
    touch(race, shadow, (u32)(cells[i] * scale), span, who, kind, &memo);
  }
}

// A rectangle of TMEM: `groups` groups of 16 lanes from `group`, `columns` columns from `column`.
void emu_race_tmem(Race* race, u32 rank, u32 group, u32 groups, u32 column, u32 columns, const Accessor* who, int kind) {
  Memo memo = {0};
  for (u32 g = group; g < group + groups; g++) touch(race, &race->tmem[rank], g * 512 + column, columns, who, kind, &memo);
}

// An access to the shared memory of another CTA, which must have started and may not have exited.
static void note_remote(Warp* w, u32 rank, u32 lanes, const Accessor* who) {
  for (u32 left = lanes; left; left &= left - 1) w->remote_epoch[rank][__builtin_ctz(left)] = w->epoch;
  w->remote_pc[rank] = w->pc_now;
  if (!who->clock[w->cluster->first_start + rank]) w->early_pc[rank] = w->pc_now + 1;
}

// A load, store or atomic of one warp (called by the interpreter).
void race_lanes(Warp* w, int space, const u64* addresses, u32 mask, u32 bytes, int kind, int flags) {
  Race* race = w->cluster->race;
  u32 shared = 0, global = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    u64 window = space == SPACE_GENERIC ? addresses[lane] >> 56 : space == SPACE_GLOBAL ? 0 : 1;
    if (window == 1) shared |= 1u << lane;
    else if (!window) global |= 1u << lane;
  }
  const u32 start = race->num_records;
  for (u32 left = shared, lanes; left; left &= ~lanes) {
    lanes = lanes_together(w, addresses, left);
    Accessor who = accessor_of(w, lanes, bytes, flags);
    Memo memo = {start};
    u64 address = addresses[__builtin_ctz(lanes)];
    u32 rank = (u32)address >> 24, offset = (u32)address & 0xffffff;
    u32 first = offset >> 2, last = (offset + bytes - 1) >> 2;
    if (rank != w->cta_rank) note_remote(w, rank, lanes, &who);
    over_barrier(race, rank, first, last - first + 1, &who, kind);
    touch(race, &race->smem[rank], first, last - first + 1, &who, kind, &memo);
  }
  if (global && w->cluster->global) global_lanes(w, addresses, global, bytes, kind, flags);
}
