// The instruction sets that the kernels are compiled for, and the choice among them at run time.
#pragma once

#include "../kernels.h"

namespace gptfast {

// From low to high; each level needs all that the levels before it need.
enum class Isa { generic, avx2, avx512, avx512_bf16, amx };
inline constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Throws std::invalid_argument when no level has this name.
Isa isa_from_name(const char* name);

// Why this level cannot run: not in this build, or what the machine lacks. Null when it can.
const char* isa_unavailable_reason(Isa isa);

// The level in use. The first call chooses: the level that GPTFAST_CPU_ISA names, else the highest
// one that can run and is not above the limit. Throws std::invalid_argument when the variable names
// an unknown level or one that cannot run.
Isa isa_current();

// Uses this level from now on; throws std::invalid_argument when it cannot run.
void isa_set(Isa isa);

// Keeps the default choice at or below `highest`; to be called before the first choice.
void isa_limit(Isa highest);

// The kernels of the level in use; throws as isa_current does.
const Kernels& kernels();

// Whether the level's kernels can take Packing::int8_vnni on this machine: of the processors of one
// level, some have VNNI.
bool isa_has_vnni(Isa isa);

// Each is defined in levels/<level>.cpp; the build says by GPTFAST_HAVE_<LEVEL> which ones exist.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

}  // namespace gptfast
