#include "common/capability.h"

#include <c10/util/Exception.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace lect11ext {
namespace {

constexpr std::array<const char*, kCapabilities> kNames{"default", "avx2", "avx512", "avx512_bf16", "amx"};

// AMX has registers of 8 KiB, which Linux gives to a process that has asked for them.
[[maybe_unused]] bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // of leaf 7
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Capability detect() {
#if LECT11EXT_X86_BUILDS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && has_amx()) return Capability::AMX;
  if (bf16) return Capability::AVX512_BF16;
  if (avx512) return Capability::AVX512;
  if (avx2) return Capability::AVX2;
#endif
  return Capability::DEFAULT;
}

constexpr const char* kVariable = "LECT11EXT_CPU_CAPABILITY";

// `what`: who gave the name.
Capability parse(const char* name, const char* what) {
  for (int i = 0; i < kCapabilities; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    TORCH_CHECK_VALUE(i <= static_cast<int>(best_capability()), what, " '", name,
                      "' is beyond this machine, whose best is '", capability_name(best_capability()), "'");
    return static_cast<Capability>(i);
  }
  TORCH_CHECK_VALUE(false, what, " must be one of default, avx2, avx512, avx512_bf16, amx, but got '", name, "'");
}

std::atomic<Capability>& in_use() {
  static std::atomic<Capability> value = [] {
    const char* forced = std::getenv(kVariable);
    return forced != nullptr && *forced != '\0' ? parse(forced, kVariable) : best_capability();
  }();
  return value;
}

}  // namespace

const char* capability_name(Capability capability) { return kNames[static_cast<int>(capability)]; }

Capability best_capability() {
  static const Capability best = detect();
  return best;
}

bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

bool prefers_float_products() { return is_intel() && capability() == Capability::AVX512_BF16; }

Capability capability() { return in_use().load(std::memory_order_relaxed); }

void set_capability(const char* name) { in_use().store(parse(name, "CPU capability"), std::memory_order_relaxed); }

}  // namespace lect11ext
