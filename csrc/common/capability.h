// Run-time choice among the builds of a CPU kernel.
//
// Every file under */cpu/ is compiled once for each capability, in a namespace of that name. An op declares its kernel
// with LECT11EXT_CPU_KERNEL and calls it by its plain name; a table of function pointers leads to the right build.
#pragma once

#include <array>
#include <cstdint>

namespace lect11ext {

// AMX is no build of its own: that of AVX512_BF16 asks for it where it has a use for it.
enum class Capability : int { DEFAULT, AVX2, AVX512, AVX512_BF16, AMX };
inline constexpr int kCapabilities = 5;

const char* capability_name(Capability capability);
// The best one that this CPU and this build have.
Capability best_capability();
// The one in use: the best, or a lower one forced by LECT11EXT_CPU_CAPABILITY or by set_capability.
Capability capability();
void set_capability(const char* name);
bool is_intel();  // the processor
// Whether, where the arithmetic binds, bfloat16 is better multiplied as float although there are dot products of it:
// Intel's cores without AMX (or with AMX hidden from a virtual machine) do half as many multiply-adds by dot products
// as in float, AMD's twice as many.
bool prefers_float_products();

}  // namespace lect11ext

// Whether there are builds for x86's capabilities.
#if defined(__x86_64__) && !defined(LECT11EXT_DEFAULT_ALONE)
#define LECT11EXT_X86_BUILDS 1
#else
#define LECT11EXT_X86_BUILDS 0
#endif

#if LECT11EXT_X86_BUILDS
#define LECT11EXT_BUILDS(name) {DEFAULT::name, AVX2::name, AVX512::name, AVX512_BF16::name, AVX512_BF16::name}
#else
#define LECT11EXT_BUILDS(name) {DEFAULT::name, DEFAULT::name, DEFAULT::name, DEFAULT::name, DEFAULT::name}
#endif

// Kernels take their struct and a range of work items, and run on the caller's thread.
#define LECT11EXT_CPU_KERNEL(name, Args)                                                   \
  namespace DEFAULT { void name(const Args& args, int64_t begin, int64_t end); }           \
  namespace AVX2 { void name(const Args& args, int64_t begin, int64_t end); }              \
  namespace AVX512 { void name(const Args& args, int64_t begin, int64_t end); }            \
  namespace AVX512_BF16 { void name(const Args& args, int64_t begin, int64_t end); }       \
  inline void name(const Args& args, int64_t begin, int64_t end) {                         \
    using Kernel = void(const Args&, int64_t, int64_t);                                    \
    static constexpr std::array<Kernel*, kCapabilities> builds LECT11EXT_BUILDS(name);     \
    builds[static_cast<int>(capability())](args, begin, end);                              \
  }
