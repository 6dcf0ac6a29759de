// The instruction-set levels that the kernels are compiled for, and the choice among them at run
// time.
#pragma once

#include "../kernels.h"

namespace gptfast {

// From low to high; each level requires all features of the levels before it.
enum class Isa { generic, avx2, avx512, avx512_bf16, amx };
inline constexpr int kIsaCount = 5;

const char* isa_name(Isa isa);

// Throws std::invalid_argument when no level has this name.
Isa isa_from_name(const char* name);

// Why this level cannot run: the feature that the machine lacks, or that the build has no kernels
// for it. Null if the level can run.
const char* isa_unavailable_reason(Isa isa);

// The level in use. The first call chooses the level that the environment variable GPTFAST_CPU_ISA
// names, or else the highest level that can run, pays off on this processor and is not above the
// limit. Throws std::invalid_argument when the variable names an unknown level or one that cannot
// run.
Isa isa_current();

// Uses this level from now on; throws std::invalid_argument when it cannot run.
void isa_set(Isa isa);

// Limits the default choice to `highest` and below; must be called before the first choice.
void isa_limit(Isa highest);

// The kernels of the level in use; throws as isa_current does.
const Kernels& kernels();

// Whether the level's kernels support Packing::int8_vnni on this machine; VNNI is not part of any
// level, as only some of a level's processors have it.
bool isa_has_vnni(Isa isa);

// levels/<level>.cpp defines each; the build defines GPTFAST_HAVE_<LEVEL> for those that exist.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

}  // namespace gptfast
