// Instructions on a warp's registers that the interpreter has functions for. R: registers; m: lanes that execute; members: those of them
// that an instruction's member mask names.
#pragma once
#include "core.h"

// registers.c
void pack64(u8* R, const Inst* I, u32 m);
void unpack64(u8* R, const Inst* I, u32 m);
void move128(u8* R, const Inst* I, u32 m);
void pack32(u8* R, const Inst* I, u32 m);
void unpack32(u8* R, const Inst* I, u32 m);
void pack16(u8* R, const Inst* I, u32 m);
void carry(u8* R, const Inst* I, u32 m);
// exchange.c
void shuffle(u8* R, const Inst* I, u32 m);
void vote(u8* R, const Inst* I, u32 m, u32 members);
void match(u8* R, const Inst* I, u32 m, u32 members);
void reduce(u8* R, const Inst* I, u32 m, u32 members);
void elect(u8* R, const Inst* I, u32 m, u32 members);
void mma_sync(u8* R, const Inst* I, const i32* slots);
