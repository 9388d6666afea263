// Shadow memory of the race detector. Each cell remembers its last write and the reads since, as numbers of records, so that a
// tile touched by one instruction costs one comparison a cell. Vector clocks are kept by races.py.
#include "races.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
  u32 actor, epoch, pc, warp;
  u32 next;  // reads only: the rest of the list, 0 at its end
  u16 atomic, partial;
} Record;

typedef struct {
  u32 *writes, *reads;  // record numbers, 0: none
  u32 num_cells;
} Shadow;

#define MAX_CONFLICTS 64
typedef struct Race {
  Record* records;
  u32 num_records, capacity;
  const u32* fenced;  // actor -> the actor that stands for its writes made visible to the asynchronous proxy
  Shadow smem[MAX_CLUSTER], tmem[MAX_CLUSTER];
  u32 num_conflicts;
  Conflict conflicts[MAX_CONFLICTS];
} Race;

Race* emu_race_new(const u32* fenced, u32 size, u32 smem_cells, u32 tmem_cells) {
  Race* race = calloc(1, sizeof(Race));
  race->fenced = fenced;
  race->capacity = 4096;
  race->num_records = 1;  // number 0 means none
  race->records = malloc(race->capacity * sizeof(Record));
  for (u32 i = 0; i < size; i++) {
    Shadow* shadows[] = {&race->smem[i], &race->tmem[i]};
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

static u32 add_record(Race* race, const Accessor* who, u32 next, int atomic) {
  if (race->num_records == race->capacity) {
    race->capacity *= 2;
    race->records = realloc(race->records, race->capacity * sizeof(Record));
  }
  race->records[race->num_records] = (Record){who->actor, who->epoch, who->pc, who->warp, next, (u16)atomic, (u16)who->partial};
  return race->num_records++;
}

static void conflict(Race* race, u32 kind, u32 cell, const Record* old, const Accessor* who) {
  for (u32 i = 0; i < race->num_conflicts; i++) {  // one report for a pair of instructions
    const Conflict* c = &race->conflicts[i];
    if (c->kind == kind && c->new_pc == who->pc && c->new_warp == who->warp && (!old || c->old_pc == old->pc)) return;
  }
  if (race->num_conflicts == MAX_CONFLICTS) return;
  Conflict* c = &race->conflicts[race->num_conflicts++];
  *c = (Conflict){kind, cell, 0, 0, 0, 0, who->actor, who->epoch, who->pc, who->warp};
  if (old) c->old_actor = old->actor, c->old_epoch = old->epoch, c->old_pc = old->pc, c->old_warp = old->warp;
}

// The access happened after the recorded write, and the write is visible to it.
static int after_write(const Race* race, const Record* old, const Accessor* who, int kind) {
  if (kind == RACE_ATOMIC && old->atomic) return 1;
  if (who->partial && old->partial) return 1;
  u32 actor = who->through_async ? race->fenced[old->actor] : old->actor;
  return who->clock[actor] >= old->epoch;
}

// The list of readers with `who` in it; an older entry of the same actor is dropped.
static u32 with_reader(Race* race, u32 list, const Accessor* who) {
  const Record* head = &race->records[list];
  if (list && head->actor == who->actor && head->epoch == who->epoch && head->pc == who->pc) return list;
  u32 rest = 0;
  u32 kept[256];
  u32 n = 0;
  for (u32 i = list; i; i = race->records[i].next)
    if (race->records[i].actor != who->actor && n < 256) kept[n++] = i;
  // Lists are shared by cells, so entries before a dropped one are copied.
  int same = 1;
  for (u32 i = n; i-- > 0;) {
    Record r = race->records[kept[i]];
    if (r.next == rest && same) { rest = kept[i]; continue; }
    same = 0;
    Accessor copy = {who->clock, r.actor, r.epoch, r.pc, r.warp, 0, r.partial};
    rest = add_record(race, &copy, rest, r.atomic);
  }
  return add_record(race, who, rest, 0);
}

static void touch(Race* race, Shadow* shadow, u32 cell, u32 span, const Accessor* who, int kind, u32* record, u32 memo[6]) {
  // memo: last write checked, last reader list checked (by a write), last reader list extended and its result
  for (u32 end = cell + span; cell < end; cell++) {
    if (cell >= shadow->num_cells) return;
    u32 write = shadow->writes[cell], reads = shadow->reads[cell];
    if (write != memo[0] || !memo[1]) {
      if (write) {
        if (!after_write(race, &race->records[write], who, kind))
          conflict(race, kind == RACE_READ ? CONFLICT_WRITE_READ : CONFLICT_WRITE_WRITE, cell, &race->records[write], who);
      } else if (kind == RACE_READ) {
        conflict(race, CONFLICT_UNWRITTEN, cell, NULL, who);
      }
      memo[0] = write;
      memo[1] = 1;
    }
    if (kind == RACE_READ) {
      if (reads != memo[2] || !memo[3]) {
        memo[2] = reads;
        memo[3] = with_reader(race, reads, who);
      }
      shadow->reads[cell] = memo[3];
      continue;
    }
    if (reads && reads != memo[4]) {
      for (u32 i = reads; i; i = race->records[i].next) {
        const Record* old = &race->records[i];
        if (!(who->partial && old->partial) && who->clock[old->actor] < old->epoch) conflict(race, CONFLICT_READ_WRITE, cell, old, who);
      }
      memo[4] = reads;
    }
    if (!*record) *record = add_record(race, who, 0, kind == RACE_ATOMIC);
    shadow->writes[cell] = *record;
    shadow->reads[cell] = 0;
  }
}

// `count` runs of `span` cells each, starting at cells[i] * scale, in shared memory (is_tmem 0) or TMEM of CTA `rank`.
void emu_race_access(Race* race, int is_tmem, u32 rank, const i64* cells, u32 count, u32 scale, u32 span, const Accessor* who, int kind) {
  Shadow* shadow = is_tmem ? &race->tmem[rank] : &race->smem[rank];
  u32 record = 0, memo[6] = {0};
  for (u32 i = 0; i < count; i++) touch(race, shadow, (u32)(cells[i] * scale), span, who, kind, &record, memo);
}

// A rectangle of TMEM: `groups` groups of 16 lanes from `group`, `columns` columns from `column`.
void emu_race_tmem(Race* race, u32 rank, u32 group, u32 groups, u32 column, u32 columns, const Accessor* who, int kind) {
  u32 record = 0, memo[6] = {0};
  for (u32 g = group; g < group + groups; g++) touch(race, &race->tmem[rank], g * 512 + column, columns, who, kind, &record, memo);
}

// A load, store or atomic of one warp (called by the interpreter).
void race_lanes(Warp* w, int space, const u64* addresses, u32 mask, u32 bytes, int kind) {
  Race* race = w->cluster->race;
  Accessor who = {w->clock, w->actor, w->clock[w->actor], w->pc_now, w->warp_in_cluster, 0, bytes < 4};
  u32 record = 0, memo[6] = {0};
  for (int lane = 0; lane < LANES; lane++) {
    if (!(mask >> lane & 1)) continue;
    u64 address = addresses[lane];
    if (space == SPACE_GENERIC && address >> 56 != 1) continue;
    if (space == SPACE_GLOBAL) continue;
    u32 rank = (u32)address >> 24, offset = (u32)address & 0xffffff;
    u32 first = offset >> 2, last = (offset + bytes - 1) >> 2;
    touch(race, &race->smem[rank], first, last - first + 1, &who, kind, &record, memo);
  }
}
