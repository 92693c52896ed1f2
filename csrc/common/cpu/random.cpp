#include "common/random.h"

#include "common/cpu/memory.h"
#include "common/cpu/normal.h"

namespace lect11ext::CPU_CAPABILITY {
namespace {

template <class Compute>
void run(const PhiloxNormal& args, int64_t begin, int64_t end) {
  alignas(64) Compute buffer[kNormalChunk + kNormalSlack];
  const uint64_t seed = static_cast<uint64_t>(args.key[0]), offset = static_cast<uint64_t>(args.key[1]);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t start = chunk * kNormalChunk;
    const int64_t n = std::min(kNormalChunk, args.numel - start);
    const Compute* values = normals(seed, offset, start, n, buffer);
    with_type(args.dtype, [&](auto* type) { convert(values, static_cast<decltype(type)>(args.out) + start, n); });
  }
}

}  // namespace

void philox_normal_kernel(const PhiloxNormal& args, int64_t begin, int64_t end) {
  args.dtype == DType::Double ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace lect11ext::CPU_CAPABILITY
