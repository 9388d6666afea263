// Registers that are read before they are written, of those that `undefined.py` could not clear from the text.
#include "core.h"

enum { READ, GUARD, WRITE, COPY };

// The instruction at `pc` runs in lanes `m`.
void watch_registers(Warp* w, u32 pc, u32 m) {
  u32 low = 0, high = w->num_watched;
  while (low < high) {
    u32 middle = (low + high) / 2;
    if (w->watched[middle].pc < pc) low = middle + 1;
    else high = middle;
  }
  for (u32 i = low; i < w->num_watched && w->watched[i].pc == pc; i++) {
    const Watched* entry = &w->watched[i];
    u32* written = &w->written[entry->reg];
    switch (entry->kind) {
      case READ: w->read_unwritten[i] |= m & ~*written; break;
      case GUARD: w->read_unwritten[i] |= w->active & ~*written; break;
      case WRITE: *written |= m; break;
      default: *written = (*written & ~m) | (w->written[entry->source] & m);
    }
  }
}
