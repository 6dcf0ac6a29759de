// Work memory of the kernels: a stack per thread, never shared. A thread keeps the most that it
// ever needed until it ends, as the next training step needs it again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptfast {

// What is taken from a Frame lives until the Frame ends. Frames of one thread nest: a kernel's own
// frame stays valid while the tasks that it starts run on the same thread.
class ScratchFrame {
 public:
  ScratchFrame();
  ~ScratchFrame();
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;

  // `size` bytes aligned to 64, uninitialised. Throws std::bad_alloc.
  void* bytes(size_t size);

 private:
  size_t block_, used_;
};

// `count` elements. Static, as no kernel's file may share a function with another's.
template <class T>
static inline T* alloc(ScratchFrame& frame, int64_t count) {
  return static_cast<T*>(frame.bytes(static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace gptfast
