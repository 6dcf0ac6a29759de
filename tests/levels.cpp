// Prints the levels that this machine runs; to be compiled with csrc/kernels/isa/dispatch.cpp.
#include <cstdio>
#include <cstring>

#include "../csrc/kernels/isa/isa.h"

int main() {
  using namespace gptfast;
  // Here every level lacks its kernels, and the generic one lacks nothing else.
  const char* no_kernels = isa_unavailable_reason(Isa::generic);
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::strcmp(isa_unavailable_reason(isa), no_kernels) == 0) std::puts(isa_name(isa));
  }
}
