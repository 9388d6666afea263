// Happens-before detector: see races.c.
#pragma once
#include "core.h"

enum { RACE_READ, RACE_WRITE, RACE_ATOMIC };
void race_lanes(Warp* w, int space, const u64* addresses, u32 mask, u32 bytes, int kind);
