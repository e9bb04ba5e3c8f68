// Compiled into mlx-c, and read by bindgen, where the system lacks what mlx-c and mlx-rs take from macOS.
#if !defined(__APPLE__) && !defined(__aarch64__)
// mlx-c gives access to 16-bit floats on Arm only. Callers want their bits, for which any 16-bit type does.
#define MLX_HALF_H
#define HAS_FLOAT16
#define HAS_BFLOAT16
typedef unsigned short bfloat16_t;
#ifdef __clang__
typedef _Float16 float16_t; // mlx-rs looks into bindgen's name for it, which g++ 12 does not have
#else
typedef unsigned short float16_t;
#endif
#endif

#if defined(__cplusplus) && !defined(__APPLE__)
#include <ctime>
// mlx-rs seeds its random numbers with it.
extern "C" inline __attribute__((used)) unsigned long mach_approximate_time() { return clock(); }

#if !__has_include(<format>)
// std::format for libstdc++ 12, as far as mlx-c's messages go: each "{}" is the next argument.
#include <sstream>
#include <string_view>
namespace std {
template <class... Args>
string format(string_view text, const Args&... args) {
  ostringstream out;
  [[maybe_unused]] auto next = [&](const auto& arg) {
    auto at = text.find("{}");
    out << text.substr(0, at) << arg;
    text.remove_prefix(at + 2);
  };
  (next(args), ...);
  out << text;
  return out.str();
}
} // namespace std
#else
#include <format>
#endif
#endif
