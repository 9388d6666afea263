// Cells of the race detector. Each remembers its last write and the reads since, as numbers of records. Behind a strong write stand strong
// ones before it that it neither follows nor races with. Vector clocks are kept by races.py;
// shared memory and TMEM have their cells in races.c, global memory in global_races.c.
#include "races.h"

#include <stdlib.h>

static u32 add_record(Race* race, Record record) {
  if (race->num_records == race->capacity) {
    race->capacity *= 2;
    race->records = realloc(race->records, race->capacity * sizeof(Record));
  }
  race->records[race->num_records] = record;
  return race->num_records++;
}

static Record record_of(const Accessor* who, u32 next) {
  return (Record){who->actor, who->epoch, who->pc, who->warp, who->cluster->number, next, who->lanes, (u16)who->strong, (u16)who->partial};
}

void conflict(Race* race, u32 kind, u32 cell, const Record* old, const Accessor* who) {
  for (u32 i = 0; i < race->num_conflicts; i++) {  // one report for a pair of instructions
    const Conflict* c = &race->conflicts[i];
    if (c->kind == kind && c->new_pc == who->pc && c->new_warp == who->warp && (!old || (c->old_pc == old->pc && c->old_cluster == old->cluster)))
      return;
  }
  if (race->num_conflicts == MAX_CONFLICTS) return;
  Conflict* c = &race->conflicts[race->num_conflicts++];
  *c = (Conflict){kind, cell, 0, 0, 0, 0, 0, who->actor, who->epoch, who->pc, who->warp, who->cluster->number};
  if (old) c->old_actor = old->actor, c->old_epoch = old->epoch, c->old_pc = old->pc, c->old_warp = old->warp, c->old_cluster = old->cluster;
}

// What `actor` of the record's cluster did up to the record's epoch happened before the access.
static int ordered_actor(const Record* old, const Accessor* who, u32 actor) {
  const Cluster* cluster = who->cluster;
  if (old->cluster == cluster->number) return who->clock[actor] >= old->epoch;
  const int in_gap = old->cluster >= cluster->gap_begin && old->cluster < cluster->gap_end;
  if (old->cluster < cluster->settled && !in_gap) return 1;
  for (u32 i = 0; i < cluster->num_knowledge; i++) {
    const Knowledge* k = &cluster->knowledge[i];
    if (who->clock[k->actor] < k->epoch) continue;
    if (k->cluster == ALL_EARLIER ? old->cluster < cluster->first_of_launch && !in_gap : k->cluster == old->cluster && k->clock[actor] >= old->epoch) return 1;
  }
  return 0;
}

// All that the record stands for happened before the access. `visible`: actor -> the actor that stands for its writes that are visible to
// the asynchronous proxy; NULL where order is enough. A lane's own accesses are in order.
static int ordered(const Record* old, const Accessor* who, const u32* visible) {
  if (!old->lanes) return ordered_actor(old, who, visible ? visible[old->actor] : old->actor);
  u32 lanes = old->lanes;
  if (!visible && old->actor == who->actor && old->cluster == who->cluster->number && !(who->lanes & (who->lanes - 1))) lanes &= ~who->lanes;
  for (; lanes; lanes &= lanes - 1) {
    u32 actor = old->actor + (u32)__builtin_ctz(lanes);
    if (!ordered_actor(old, who, visible ? visible[actor] : actor)) return 0;
  }
  return 1;
}

// The access happened after the recorded write, and the write is visible to it.
static int after_write(const Race* race, const Record* old, const Accessor* who) {
  if (who->strong && old->strong) return 1;
  if (who->partial && old->partial) return 1;
  const u32* fenced = race->fenced ? race->fenced : who->cluster->fenced_global;
  return ordered(old, who, who->through_async ? fenced : NULL);
}

static int after_read(const Record* old, const Accessor* who) {
  return (who->strong && old->strong) || (who->partial && old->partial) || ordered(old, who, NULL);
}

// Readers remembered of one cell. In global memory, what all CTAs read would have a reader a CTA: there the newest will do, because a
// write that none of them is ordered with is found all the same.
#define MOST_READERS 256
#define MOST_GLOBAL_READERS 16

// The list of readers with `who` in it; what it says of the same actor or lanes at an older epoch is dropped.
static u32 with_reader(Race* race, u32 list, const Accessor* who, u32 most) {
  const Record* head = &race->records[list];
  const u32 cluster = who->cluster->number;
  if (list && head->actor == who->actor && head->epoch == who->epoch && head->pc == who->pc && head->cluster == cluster &&
      (head->lanes & who->lanes) == who->lanes)
    return list;
  u32 rest = 0;
  u32 kept[MOST_READERS], lanes[MOST_READERS];
  u32 n = 0;
  Record added = record_of(who, 0);
  for (u32 i = list; i && n < most; i = race->records[i].next) {
    const Record* old = &race->records[i];
    u32 left = old->lanes;
    if (old->actor == who->actor && old->cluster == cluster) {
      left &= ~who->lanes;
      if (left && old->epoch == who->epoch) added.lanes |= left, left = 0;
      if (!left) continue;
    }
    lanes[n] = left;
    kept[n++] = i;
  }
  // Lists are shared by cells, so entries before a dropped one are copied.
  int same = 1;
  for (u32 i = n; i-- > 0;) {
    Record r = race->records[kept[i]];
    if (r.next == rest && same && r.lanes == lanes[i]) { rest = kept[i]; continue; }
    same = 0;
    r.next = rest;
    r.lanes = lanes[i];
    rest = add_record(race, r);
  }
  added.next = rest;
  return add_record(race, added);
}

// Of a list, the strong accesses that a strong write does not follow: they do not race with it, and may with what follows it.
static u32 unordered(Race* race, u32 list, const Accessor* who) {
  u32 kept = 0;
  for (u32 i = list, n = 0; i && n < MOST_GLOBAL_READERS; i = race->records[i].next) {
    Record old = race->records[i];
    if (!old.strong || ordered(&old, who, NULL)) continue;
    old.next = kept;
    kept = add_record(race, old);
    n++;
  }
  return kept;
}

void touch(Race* race, Shadow* shadow, u32 cell, u32 span, const Accessor* who, int kind, Memo* memo) {
  for (u32 end = cell + span; cell < end; cell++) {
    if (cell >= shadow->num_cells) return;
    u32 write = shadow->writes[cell], reads = shadow->reads[cell];
    if (write != memo->write || !memo->checked) {
      if (write && who->non_coherent && race->records[write].cluster >= who->cluster->first_of_launch)
        conflict(race, CONFLICT_NON_COHERENT, cell, &race->records[write], who);
      for (u32 i = write; i; i = race->records[i].next) {
        // Of lanes that write one cell by one instruction, one wins.
        if (!(memo->first && i >= memo->first) && !after_write(race, &race->records[i], who))
          conflict(race, kind == RACE_READ ? CONFLICT_WRITE_READ : CONFLICT_WRITE_WRITE, cell, &race->records[i], who);
      }
      if (!write && kind == RACE_READ && !shadow->is_global) {
        conflict(race, CONFLICT_UNWRITTEN, cell, NULL, who);
      }
      memo->write = write;
      memo->checked = 1;
    }
    if (kind == RACE_READ) {
      if (reads != memo->reads || !memo->extended) {
        memo->reads = reads;
        memo->extended = with_reader(race, reads, who, shadow->is_global ? MOST_GLOBAL_READERS : MOST_READERS);
      }
      shadow->reads[cell] = memo->extended;
      continue;
    }
    if (reads && reads != memo->read_by) {
      for (u32 i = reads; i; i = race->records[i].next)
        if (!after_read(&race->records[i], who)) conflict(race, CONFLICT_READ_WRITE, cell, &race->records[i], who);
      memo->read_by = reads;
    }
    // An atomic has read what the last write left, and so follows that one.
    const u32 last = who->modifies ? race->records[write].next : write;
    const u32 before = who->strong && write ? unordered(race, last, who) : 0;
    if (!memo->record || before || race->records[memo->record].next) memo->record = add_record(race, record_of(who, before));
    shadow->writes[cell] = memo->record;
    shadow->reads[cell] = who->strong ? unordered(race, reads, who) : 0;
  }
}

// Of these lanes, the first and those that access the same address and know the same.
u32 lanes_together(const Warp* w, const u64* addresses, u32 lanes) {
  int first = __builtin_ctz(lanes);
  u32 together = 1u << first;
  for (u32 left = lanes & (lanes - 1); left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    if (addresses[lane] == addresses[first] && w->lane_clocks[lane] == w->lane_clocks[first]) together |= 1u << lane;
  }
  return together;
}

Accessor accessor_of(Warp* w, u32 lanes, u32 bytes, int flags) {
  const u32* clock = (const u32*)w->lane_clocks[__builtin_ctz(lanes)];
  return (Accessor){clock, w->actor, w->epoch, w->pc_now, w->warp_in_cluster, 0, bytes < 4, flags & ACCESS_STRONG, lanes, (flags & ACCESS_NON_COHERENT) != 0,
                    (flags & ACCESS_MODIFIES) != 0, w->cluster};
}
