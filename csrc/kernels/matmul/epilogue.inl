// What is done to the tiles of a product while they are in the L1 cache.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// An epilogue is called for each tile of C, columns n0 .. of some panels, rows m0 .., when it is
// complete and still in the L1 cache: done(m0, rows, n0, columns). One that reads or writes memory
// of its own has it brought into the cache while the tile is computed, by `fetch`.
template <class Fetch, class Done>
struct Fetching {
  Fetch fetch;
  Done done;

  void operator()(int64_t m0, int64_t rows, int64_t n0, int64_t columns) const {
    done(m0, rows, n0, columns);
  }
};
template <class Fetch, class Done>
Fetching(Fetch, Done) -> Fetching<Fetch, Done>;

template <class Done>
inline void fetch_for(const Done&, int64_t, int64_t, int64_t, int64_t) {}
template <class Fetch, class Done>
inline void fetch_for(const Fetching<Fetch, Done>& epilogue, int64_t m0, int64_t rows, int64_t n0,
                      int64_t columns) {
  epilogue.fetch(m0, rows, n0, columns);
}

struct NoEpilogue {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

}  // namespace
}  // namespace gptfast::GPTFAST_LEVEL
