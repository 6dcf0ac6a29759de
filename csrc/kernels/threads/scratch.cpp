#include "scratch.h"

#include <cstdlib>
#include <new>
#include <vector>

namespace gptfast {
namespace {

constexpr size_t alignment = 64;
constexpr size_t smallest_block = size_t{1} << 20;

struct Block {
  char* data;
  size_t size;
};

Block allocate(size_t size) {
  char* data = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (data == nullptr) throw std::bad_alloc();
  return {data, size};
}

// A stack of blocks that are filled one after the other. When all are free again, several blocks
// are replaced by one of their total size, so that the next such call needs only one block.
struct Stack {
  std::vector<Block> blocks;
  size_t block = 0;  // index of the block in use
  size_t used = 0;   // bytes used of that block

  void* alloc(size_t size) {
    size = (size + alignment - 1) / alignment * alignment;
    while (block < blocks.size() && blocks[block].size - used < size) {
      ++block;
      used = 0;
    }
    if (block == blocks.size()) {
      const size_t last = blocks.empty() ? smallest_block / 2 : blocks.back().size;
      blocks.push_back(allocate(size > 2 * last ? size : 2 * last));
    }
    void* allocated = blocks[block].data + used;
    used += size;
    return allocated;
  }

  void release(size_t to_block, size_t to_used) {
    block = to_block;
    used = to_used;
    if (block == 0 && used == 0 && blocks.size() > 1) {
      size_t total = 0;
      for (const Block& each : blocks) total += each.size;
      clear();
      // A destructor calls this, so it must not throw: if there is no memory for the single block,
      // the stack stays empty and the next call allocates again.
      if (char* data = static_cast<char*>(std::aligned_alloc(alignment, total)))
        blocks.push_back({data, total});
    }
  }

  void clear() {
    for (const Block& each : blocks) std::free(each.data);
    blocks.clear();
  }

  ~Stack() { clear(); }
};

thread_local Stack stack;

}  // namespace

ScratchFrame::ScratchFrame() : block_(stack.block), used_(stack.used) {}
ScratchFrame::~ScratchFrame() { stack.release(block_, used_); }
void* ScratchFrame::bytes(size_t size) { return stack.alloc(size); }

}  // namespace gptfast
