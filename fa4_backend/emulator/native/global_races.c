// Shadow of global memory: pages of cells, made when they are first touched, in a hash table by address.
#include "races.h"

#include <stdlib.h>
#include <string.h>

#define PAGE_CELLS 1024  // of 4 bytes
typedef struct {
  u64 number;  // address / bytes of a page
  Shadow shadow;
} Page;

typedef struct PageTable {
  Page** slots;  // open addressing; NULL: free
  u32 capacity, used;
  Page* last;
} PageTable;

static void free_pages(PageTable* table) {
  for (u32 i = 0; i < table->capacity; i++) {
    if (!table->slots[i]) continue;
    free(table->slots[i]->shadow.writes);
    free(table->slots[i]);
  }
  free(table->slots);
}

static void start(Race* race) {
  race->num_records = 1;
  *race->pages = (PageTable){calloc(256, sizeof(Page*)), 256, 0, NULL};
}

Race* emu_global_new(void) {
  Race* race = calloc(1, sizeof(Race));
  race->capacity = 4096;
  race->records = malloc(race->capacity * sizeof(Record));
  race->pages = malloc(sizeof(PageTable));
  start(race);
  return race;
}

// Everything so far happened before whatever follows.
void emu_global_forget(Race* race) {
  free_pages(race->pages);
  start(race);
}

void emu_global_free(Race* race) {
  free_pages(race->pages);
  free(race->pages);
  free(race->records);
  free(race);
}

static u32 slot_of(const PageTable* table, u64 number) {
  u32 i = (u32)((number * 0x9e3779b97f4a7c15ull) >> 32) & (table->capacity - 1);
  while (table->slots[i] && table->slots[i]->number != number) i = (i + 1) & (table->capacity - 1);
  return i;
}

static void grow(PageTable* table) {
  PageTable larger = {calloc(table->capacity * 2, sizeof(Page*)), table->capacity * 2, table->used, table->last};
  for (u32 i = 0; i < table->capacity; i++)
    if (table->slots[i]) larger.slots[slot_of(&larger, table->slots[i]->number)] = table->slots[i];
  free(table->slots);
  *table = larger;
}

static Shadow* page_at(PageTable* table, u64 number) {
  if (table->last && table->last->number == number) return &table->last->shadow;
  u32 i = slot_of(table, number);
  if (!table->slots[i]) {
    Page* page = malloc(sizeof(Page));
    u32* cells = calloc(2 * PAGE_CELLS, 4);
    *page = (Page){number, {cells, cells + PAGE_CELLS, PAGE_CELLS, 1}};
    table->slots[i] = page;
    if (++table->used * 2 > table->capacity) grow(table);
    table->last = page;
  } else {
    table->last = table->slots[i];
  }
  return &table->last->shadow;
}

static void touch_bytes(Race* race, u64 address, u32 bytes, const Accessor* who, int kind, Memo* memo) {
  for (u64 cell = address >> 2, end = ((address + bytes - 1) >> 2) + 1; cell < end;) {
    u64 number = cell / PAGE_CELLS, stop = (number + 1) * PAGE_CELLS;
    if (stop > end) stop = end;
    touch(race, page_at(race->pages, number), (u32)(cell % PAGE_CELLS), (u32)(stop - cell), who, kind, memo);
    cell = stop;
  }
}

// `count` runs of `bytes` bytes each.
void emu_global_access(Race* race, const u64* addresses, u32 count, u32 bytes, const Accessor* who, int kind) {
  Memo memo = {0};
  for (u32 i = 0; i < count; i++) touch_bytes(race, addresses[i], bytes, who, kind, &memo);
}

// A load, store or atomic of one warp. Strong ones are noted for Python, which knows what they order.
void global_lanes(Warp* w, const u64* addresses, u32 mask, u32 bytes, int kind, int flags) {
  const u32 start = w->cluster->global->num_records;
  for (u32 left = mask, lanes; left; left &= ~lanes) {
    lanes = lanes_together(w, addresses, left);
    Accessor who = accessor_of(w, lanes, bytes, flags);
    Memo memo = {start};
    touch_bytes(w->cluster->global, addresses[__builtin_ctz(lanes)], bytes, &who, kind, &memo);
  }
  if (!(flags & ACCESS_STRONG)) return;
  w->strong_mask = mask;
  memcpy(w->strong_addresses, addresses, sizeof w->strong_addresses);
}
