// Detects which instruction-set levels the machine has and chooses the kernels once per process.

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gptfast {
namespace {

using Table = const Kernels* (*)();

constexpr const char* kNames[kIsaCount] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

// A static list, because a linker may drop globals that register themselves.
constexpr Table kTables[kIsaCount] = {
#ifdef GPTFAST_HAVE_GENERIC
    kernels_generic,
#else
    nullptr,
#endif
#ifdef GPTFAST_HAVE_AVX2
    kernels_avx2,
#else
    nullptr,
#endif
#ifdef GPTFAST_HAVE_AVX512
    kernels_avx512,
#else
    nullptr,
#endif
#ifdef GPTFAST_HAVE_AVX512_BF16
    kernels_avx512_bf16,
#else
    nullptr,
#endif
#ifdef GPTFAST_HAVE_AMX
    kernels_amx,
#else
    nullptr,
#endif
};

#if defined(__x86_64__)

struct Cpuid {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  Cpuid(uint32_t leaf, uint32_t subleaf) {
    __get_cpuid_count(leaf, subleaf, &eax, &ebx, &ecx, &edx);  // leaves zeros for an absent leaf
  }
};

// A feature of the processor or the operating system that levels require.
struct Need {
  Isa isa;  // the lowest level that requires it
  bool present;
  const char* name;
};

// The register files that the operating system saves: the bits of XCR0.
uint64_t saved_registers(bool osxsave) {
  if (!osxsave) return 0;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

// Requests the tile registers, which Linux grants a process only on request. Returns the reason for
// a refusal, or an empty string.
std::string amx_refusal() {
#if GPTFAST_AMX_EMULATED
  return "";
#elif defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return "";
  return std::string("the operating system refuses the AMX tile registers (") +
         std::strerror(errno) + ")";
#else
  return "the AMX tile registers are requested on Linux only";
#endif
}

// What the machine lacks for this level, as a sentence; empty if nothing.
std::string missing_features(Isa isa) {
  const Cpuid base(1, 0), features(7, 0), more(7, 1);
  const auto bit = [](uint32_t word, int index) { return (word >> index & 1) != 0; };
  const uint64_t saved = saved_registers(bit(base.ecx, 27));
  const auto saves = [saved](uint64_t mask) { return (saved & mask) == mask; };
  // Every feature that the compiler may use under the level's flags in setup.py.
  const Need needs[] = {
      {Isa::avx2, bit(base.ecx, 28), "AVX"},
      {Isa::avx2, bit(base.ecx, 23), "POPCNT"},
      {Isa::avx2, bit(features.ebx, 5), "AVX2"},
      {Isa::avx2, bit(base.ecx, 12), "FMA"},
      {Isa::avx2, bit(base.ecx, 29), "F16C"},
      {Isa::avx2, saves(0x6), "ymm registers saved by the operating system"},
      {Isa::avx512, bit(features.ebx, 16), "AVX512F"},
      {Isa::avx512, bit(features.ebx, 30), "AVX512BW"},
      {Isa::avx512, bit(features.ebx, 17), "AVX512DQ"},
      {Isa::avx512, bit(features.ebx, 31), "AVX512VL"},
      {Isa::avx512, saves(0xe6), "zmm registers saved by the operating system"},
      {Isa::avx512_bf16, bit(more.eax, 5), "AVX512_BF16"},
#if !GPTFAST_AMX_EMULATED
      {Isa::amx, bit(features.edx, 24), "AMX-TILE"},
      {Isa::amx, bit(features.edx, 22), "AMX-BF16"},
      {Isa::amx, saves(0x60000), "tile registers saved by the operating system"},
#endif
  };
  std::string missing;
  for (const Need& need : needs) {
    if (need.isa > isa || need.present) continue;
    missing += missing.empty() ? "this machine has no " : ", ";
    missing += need.name;
  }
  return missing.empty() && isa == Isa::amx ? amx_refusal() : missing;
}

#else

std::string missing_features(Isa isa) {
  return isa == Isa::generic ? "" : "this machine has no x86-64 processor";
}

#endif

// Whether the bf16 dot product is faster than float32. Intel's vdpbf16ps takes as long as four
// fused multiply-adds, so that float32 does the same work in half the time (Emerald Rapids: 160
// against 280 GFLOP/s on two cores); AMD's doubles the rate instead.
bool bf16_dot_pays() {
#if defined(__x86_64__)
  const Cpuid vendor(0, 0);
  return vendor.ebx != 0x756e6547;  // "Genu" of GenuineIntel
#else
  return true;
#endif
}

// Why each level cannot run, found out once.
struct Reasons {
  std::string text[kIsaCount];  // empty: the level can run
  Reasons() {
    for (int i = 0; i < kIsaCount; ++i) {
      text[i] = missing_features(static_cast<Isa>(i));
      if (text[i].empty() && kTables[i] == nullptr) text[i] = "this build has no kernels for it";
    }
  }
};

const Reasons& reasons() {
  static const Reasons found;
  return found;
}

std::atomic<int> highest{kIsaCount - 1};
std::atomic<int> current{-1};

void require_available(Isa isa, const char* asked_by) {
  if (const char* reason = isa_unavailable_reason(isa)) {
    throw std::invalid_argument(std::string(asked_by) + ": the instruction set '" + isa_name(isa) +
                                "' is not available: " + reason);
  }
}

Isa choose() {
  const char* name = std::getenv("GPTFAST_CPU_ISA");
  if (name != nullptr && *name != '\0') {
    Isa isa;
    try {
      isa = isa_from_name(name);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(std::string("GPTFAST_CPU_ISA: ") + error.what());
    }
    require_available(isa, "GPTFAST_CPU_ISA");
    return isa;
  }
  for (int i = highest.load(); i > 0; --i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa == Isa::avx512_bf16 && !bf16_dot_pays()) continue;
    if (isa_unavailable_reason(isa) == nullptr) return isa;
  }
  return Isa::generic;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_from_name(const char* name) {
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return static_cast<Isa>(i);
    known += i == 0 ? kNames[i] : std::string(", ") + kNames[i];
  }
  throw std::invalid_argument("the instruction set must be one of " + known + ", got '" + name +
                              "'");
}

const char* isa_unavailable_reason(Isa isa) {
  const std::string& reason = reasons().text[static_cast<int>(isa)];
  return reason.empty() ? nullptr : reason.c_str();
}

Isa isa_current() {
  int isa = current.load(std::memory_order_acquire);
  if (isa < 0) {
    int nothing_chosen = -1;
    isa = static_cast<int>(choose());
    // If another thread or isa_set has chosen in the meantime, that choice stands.
    if (!current.compare_exchange_strong(nothing_chosen, isa)) isa = nothing_chosen;
  }
  return static_cast<Isa>(isa);
}

void isa_set(Isa isa) {
  require_available(isa, "isa_set");
  current.store(static_cast<int>(isa), std::memory_order_release);
}

void isa_limit(Isa limit) { highest.store(static_cast<int>(limit)); }

const Kernels& kernels() { return *kTables[static_cast<int>(isa_current())](); }

bool isa_has_vnni(Isa isa) {
  const Table table = kTables[static_cast<int>(isa)];
#if defined(__x86_64__)
  // Static, because the engine asks in every call and cpuid is slow in a virtual machine.
  static const bool avx512_vnni = Cpuid(7, 0).ecx >> 11 & 1, avx_vnni = Cpuid(7, 1).eax >> 4 & 1;
  return table != nullptr && table()->vnni && (isa == Isa::avx2 ? avx_vnni : avx512_vnni);
#else
  return false;
#endif
}

}  // namespace gptfast
