// What the CPU operators share: element types, a decoded view of a weight, scratch memory.
#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <memory>

#include "checks.h"
#include "kernels.h"

namespace qlora_engine::cpu {

inline Element element_of(ScalarType t) {
  return t == ScalarType::Float ? Element::kFloat32 : t == ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
}

// codes -> scales [first, last): dynamic_map[code] * nested_absmax[b / nested_blocksize] + offset, each step rounded.
void decode_scales(const uint8_t* codes, const float* nested_absmax, float offset, int nested_shift, int64_t first,
                   int64_t last, float* out);

// A weight with its scales in float32; double-quantized ones are decoded into memory of its own.
class Nf4Scales {
 public:
  Nf4Scales(const Nf4Pointers& weight, const Tensor& like);
  Nf4View view() const { return view_; }

 private:
  Tensor decoded_;
  Nf4View view_;
};

// Asks for 2 MiB pages behind a large new tensor. Fresh memory costs a page fault for every 4 KiB otherwise, which takes
// longer than decoding into it. Where the system declines, nothing changes.
inline void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float[], Free>;

// Uninitialised, aligned to a cache line.
inline Scratch scratch(int64_t floats) {
  const int64_t bytes = ceil_div(floats * int64_t(sizeof(float)), 64) * 64;
  float* p = static_cast<float*>(std::aligned_alloc(64, bytes > 0 ? bytes : 64));
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch for a 4-bit product");
  return Scratch(p);
}

}  // namespace qlora_engine::cpu
