// Scratch memory of the kernels: a stack per thread, never shared. Until it ends, a thread keeps
// the largest amount that it has needed, because the next training step needs it again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptfast {

// Memory allocated from a ScratchFrame stays valid until the frame is destroyed. Frames of one
// thread nest: a kernel's own frame stays valid while the tasks that it starts run on the same
// thread.
class ScratchFrame {
 public:
  ScratchFrame();
  ~ScratchFrame();
  ScratchFrame(const ScratchFrame&) = delete;
  ScratchFrame& operator=(const ScratchFrame&) = delete;

  // Allocates `size` uninitialised bytes, aligned to 64. Throws std::bad_alloc.
  void* bytes(size_t size);

 private:
  size_t block_, used_;  // the top of the thread's stack when the frame was constructed
};

// Allocates `count` elements. Static, because the files of different levels must not share a
// function (kernels.inl).
template <class T>
static inline T* alloc(ScratchFrame& frame, int64_t count) {
  return static_cast<T*>(frame.bytes(static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace gptfast
