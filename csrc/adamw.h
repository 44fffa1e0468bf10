// AdamW (Loshchilov & Hutter 2019, "Decoupled weight decay regularization", algorithm 2) of one element, for every
// device, in the order of torch.optim.AdamW's operations:
//
//   p <- p (1 - lr wd)          m <- lerp(m, g, 1 - beta1)          v <- beta2 v + (1 - beta2) g g
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Which operations are fused is fixed here, so that the moments are the same bits on every device. So is nearly every
// parameter: on a GPU root and quotient are approximate instructions and a step of Newton's method, which round as the
// exact ones do but for rare last bits; the exact ones branch to subroutines, whose registers cost a third of the threads.
//
// State lies in pages. A page belongs to one parameter and holds at most kPageElements of it:
//   exp_avg [n], exp_avg_sq [n]                             float32, or codes of the signed and unsigned map (8 bits)
//   master copy [n], where the parameter keeps one          float32
//   exp_avg scales [n / 256], exp_avg_sq scales [n / 256]   float32, 8 bits only
// with n rounded up to a multiple of 256, so that all but the scales lie at multiples of 16 bytes of the page.
// qlora_engine/optim/arena.py lays the pages out.
#pragma once
#include <cmath>
#include <cstdint>

#include "nf4.h"

namespace qlora_engine {

inline constexpr int64_t kPageElements = 65536;
inline constexpr int64_t kStateBlock = 256;  // elements of 8-bit state that share a scale

// Bits of `layouts`, one number a parameter.
inline constexpr int64_t kEightBitState = 1;
inline constexpr int64_t kMasterCopy = 2;
inline constexpr int64_t kStochasticRounding = 4;

// Numbers of one parameter group in `hyper`: lr, beta1, beta2, eps, weight_decay, and -1 to maximize, else 1.
inline constexpr int64_t kHyperparameters = 6;

// A row of `pages`: whose state, which part of it, and where it lies.
struct AdamWPage {
  int64_t parameter;
  int64_t first;   // element of the parameter
  int64_t count;   // elements; the page has room for this many, rounded up to kStateBlock
  int64_t slab;    // index into `memory`
  int64_t offset;  // byte of the slab
};

// What one step does to one parameter.
struct AdamWConstants {
  float decay;  // 1 - lr * weight_decay
  float one_minus_beta1, beta2, one_minus_beta2;
  float inverse_bias_correction2_sqrt, eps;
  float negative_step_size;   // -lr / (1 - beta1^t)
  float gradient_multiplier;  // sign, and what scaling and clipping ask for
};

QLORA_HOST_DEVICE AdamWConstants adamw_constants(const double* hyper, double step, float multiplier) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2];
  AdamWConstants c;
  c.decay = float(1.0 - lr * hyper[4]);
  c.one_minus_beta1 = float(1.0 - beta1);
  c.beta2 = float(beta2);
  c.one_minus_beta2 = float(1.0 - beta2);
  c.inverse_bias_correction2_sqrt = float(1.0 / sqrt(1.0 - pow(beta2, step)));
  c.eps = float(hyper[3]);
  c.negative_step_size = float(-(lr / (1.0 - pow(beta1, step))));
  c.gradient_multiplier = float(hyper[5]) * multiplier;
  return c;
}

namespace rounded {  // one rounding each; the compiler must not fuse them
#ifdef __CUDA_ARCH__
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
#else  // the host is compiled with -ffp-contract=off
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif
}  // namespace rounded

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float approximate_reciprocal(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
__device__ __forceinline__ float root(float a) {
  float r;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(a));
  const float refined = rounded::fused(rounded::fused(-r, r, a), 0.5f * approximate_reciprocal(r), r);
  return refined == refined ? refined : r;  // of 0, infinity and NaN
}
__device__ __forceinline__ float quotient(float a, float b) {
  const float r = approximate_reciprocal(b), reciprocal = rounded::fused(rounded::fused(-b, r, 1.f), r, r);
  const float q = rounded::multiply(a, r);
  const float refined = rounded::fused(rounded::fused(-b, q, a), reciprocal, q);
  return refined == refined ? refined : q;  // of 0, infinity and NaN
}
#else
inline float root(float a) { return __builtin_sqrtf(a); }
inline float quotient(float a, float b) { return a / b; }
#endif

// One element: p, exp_avg m and exp_avg_sq v change; g is the gradient times its multiplier.
QLORA_HOST_DEVICE void adamw_update(float& p, float g, float& m, float& v, const AdamWConstants& c) {
  using namespace rounded;
  p = multiply(p, c.decay);
  m = fused(c.one_minus_beta1, add(g, -m), m);
  v = fused(multiply(c.one_minus_beta2, g), g, multiply(v, c.beta2));
  const float denominator = fused(root(v), c.inverse_bias_correction2_sqrt, c.eps);
  p = add(p, quotient(multiply(c.negative_step_size, m), denominator));
}

// 16 random bits of an element of a parameter at a step: the finalizer of MurmurHash3 (Appleby, public domain) over
// a counter, so that a resumed run draws what an uninterrupted one would have drawn.
QLORA_HOST_DEVICE uint32_t random_bits(uint32_t key, uint32_t element) {
  uint32_t h = element * 0x9e3779b9u ^ key;
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  h ^= h >> 16;
  return h >> 16;
}

QLORA_HOST_DEVICE uint32_t random_key(uint32_t seed, uint32_t step, uint32_t parameter) {
  return random_bits(seed, step) << 16 ^ random_bits(step, parameter + seed) ^ parameter * 0x27d4eb2fu;
}

// float32 bits to bfloat16 bits, up or down in proportion to the distance. NaN and infinity stay what they are.
QLORA_HOST_DEVICE uint16_t stochastic_bfloat16(uint32_t bits, uint32_t random) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return uint16_t(bits >> 16 | ((bits & 0x007fffffu) != 0 ? 0x40u : 0u));
  return uint16_t((bits + random) >> 16);
}

QLORA_HOST_DEVICE uint16_t nearest_bfloat16(uint32_t bits) {
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace qlora_engine
