// Epilogues: work on the tiles of a product while they are in the L1 cache.
#pragma once

#include "../simd/vec.inl"

namespace gptfast::GPTFAST_LEVEL {
namespace {

// A product calls its epilogue as done(m0, rows, n0, columns) for each tile of C, of one or several
// panels, when the tile is complete and still in the L1 cache. An epilogue that accesses further
// memory is a Fetching: products may call `fetch` with the same arguments before they compute the
// tile, so that the memory is prefetched in the meantime.
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

// Calls the epilogue's `fetch`, if it has one.
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
