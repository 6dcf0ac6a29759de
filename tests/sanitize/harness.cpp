// Runs a group of cases at every instruction set of this machine. Usage: harness list | GROUP
#include "harness.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <thread>

#include "../../csrc/kernels/threads/team.h"

namespace gptfast::sanitize {
namespace {

enum class Order { forward, reversed, team };

// How a case is run: the content of scratch memory, the order of tasks, the number of threads.
struct Way {
  int fill;
  Order order;
  int threads;
};

// All others are compared with the first. The other ways on one thread show no race, so
// ThreadSanitizer runs without them.
constexpr Way ways[] = {
    {0xff, Order::forward, 1},
#if !defined(__SANITIZE_THREAD__)
    {0x00, Order::reversed, 1}, {0x3f, Order::reversed, 7}, {0xff, Order::forward, 7},
#endif
    {0xff, Order::team, 7},
};

std::vector<const Kernels*> levels;
std::string running = "the start";
int64_t cases = 0, runs = 0;
std::atomic<int64_t> failures = 0;

void forward_order(void*, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

void reversed_order(void*, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  for (int64_t task = tasks; task-- > 0;) body(context, task);
}

// Runs the case with a team of new threads, most of whose members never come.
std::vector<Result> run_in_team(const Case& run, const Kernels& level, int members) {
  Team team(members);
  std::thread others[] = {std::thread([&] { team.follow(1); }),
                          std::thread([&] { team.follow(members - 1); })};
  std::vector<Result> results;
  team.lead([&](const Parallel& parallel) { results = run(level, parallel); });
  for (std::thread& other : others) other.join();
  return results;
}

std::vector<Result> run_in(const Way& way, const Case& run, const Kernels& level) {
  if (way.order == Order::team) return run_in_team(run, level, way.threads);
  return run(level, {way.order == Order::reversed ? reversed_order : forward_order, way.threads});
}

// The root mean square of a - b; equal infinities do not differ.
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double squares = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = a[i] == b[i] ? 0.0 : static_cast<double>(a[i]) - b[i];
    squares += d * d;
  }
  return a.empty() ? 0.0 : std::sqrt(squares / static_cast<double>(a.size()));
}

// The root mean square of a, in which infinities count as 0.
double size_of(const std::vector<float>& a) {
  std::vector<float> finite = a;
  for (float& x : finite) x = std::isinf(x) ? 0.0f : x;
  return distance(finite, std::vector<float>(a.size()));
}

void expect_close_to_lowest(const Result& a, const Result& b, DType dtype) {
  const double limit = dtype == DType::f32 ? 1e-5 : 2e-2;
  const double size = std::max(size_of(b.values), b.terms), error = distance(a.values, b.values);
  expect(error <= limit * size,
         format("%s differs from the lowest level's by %.3g, its terms are of size %.3g", a.name,
                error, size));
}

void expect_numbers(const Result& result) {
  int64_t missing = 0;
  for (const float x : result.values) missing += std::isnan(x);
  expect(missing == 0, format("%s has %lld NaN or unwritten elements of %zu", result.name,
                              static_cast<long long>(missing), result.values.size()));
}

bool same_bits(const Result& a, const Result& b) {
  return a.values.size() == b.values.size() &&
         (a.values.empty() ||
          std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(float)) == 0);
}

// Runs the case at one level in every way; returns the results of the first.
std::vector<Result> check_level(const std::string& name, const Case& run, const Kernels& level) {
  std::vector<Result> first;
  for (const Way& way : ways) {
    const char* orders[] = {"", " reversed", " of a team"};
    running = format("%s, %s, %d threads%s, scratch %02x", name.c_str(), level.name, way.threads,
                     orders[static_cast<int>(way.order)], static_cast<unsigned>(way.fill));
    scratch_fill = way.fill;
    const std::vector<Result> results = run_in(way, run, level);
    ++runs;
    if (first.empty()) first = results;
    for (size_t i = 0; i < results.size(); ++i) {
      expect_numbers(results[i]);
      expect(same_bits(results[i], first[i]),
             format("%s depends on scratch memory, order of tasks or threads", results[i].name));
    }
  }
  return first;
}

const std::pair<const char*, void (*)()> groups[] = {
    {"attention", attention_cases},
    {"linear", linear_cases},
    {"ffn", ffn_cases},
    {"cross_entropy", cross_entropy_cases},
    {"embedding", embedding_cases},
    {"adamw", adamw_cases},
    {"team", team_cases},
    {"forward", forward_cases},
    {"session", session_cases},
};

// Prints the groups to stdout, and to stderr the levels that no group will run.
int list() {
  for (const auto& [group, run] : groups) std::printf("%s\n", group);
  for (int i = 0; i < kIsaCount; ++i)
    if (const char* reason = isa_unavailable_reason(static_cast<Isa>(i)))
      std::fprintf(stderr, "not run: %s: %s\n", isa_name(static_cast<Isa>(i)), reason);
  return 0;
}

int run_group(const char* group, void (*run)()) {
  std::string names;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (isa_unavailable_reason(isa) != nullptr) continue;
    isa_set(isa);
    levels.push_back(&kernels());
    names += std::string(levels.size() > 1 ? ", " : "") + kernels().name;
  }
  const auto start = std::chrono::steady_clock::now();
  run();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::printf("%s: %lld cases in %lld runs at %s: %lld failures (%.1f s)\n", group,
              static_cast<long long>(cases), static_cast<long long>(runs), names.c_str(),
              static_cast<long long>(failures.load()), seconds.count());
  return failures > 0 || cases == 0;
}

}  // namespace

void expect(bool condition, const std::string& what) {
  if (condition) return;
  ++failures;
  std::printf("FAILED %s: %s\n", running.c_str(), what.c_str());
}

void check(const std::string& name, DType dtype, const Case& run) {
  ++cases;
  std::vector<Result> lowest;
  for (const Kernels* level : levels) {
    const std::vector<Result> results = check_level(name, run, *level);
    if (lowest.empty()) lowest = results;
    for (size_t i = 0; i < results.size(); ++i)
      if (results[i].any_level) expect_close_to_lowest(results[i], lowest[i], dtype);
  }
}

std::string format(const char* pattern, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

const char* name(DType dtype) { return dtype == DType::f32 ? "f32" : "bf16"; }

int main_of(const std::string& wanted) {
  if (wanted == "list") return list();
  for (const auto& [group, run] : groups)
    if (wanted == group) return run_group(group, run);
  std::fprintf(stderr, "usage: harness list, or one of the groups that it lists\n");
  return 2;
}

void copy_rounded(const Buffer& from, Buffer& to) {
  for (int64_t i = 0; i < from.count(); ++i) {
    const float value = from.value(i);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t half = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    if (to.dtype() == DType::f32)
      std::memcpy(to.at(i), &value, sizeof value);
    else
      std::memcpy(to.at(i), &half, sizeof half);
  }
}

}  // namespace gptfast::sanitize

// Functions that the sanitizers call: before a report, and for ThreadSanitizer's options.
extern "C" void __asan_on_error() { gptfast::sanitize::expect(false, "AddressSanitizer:"); }
extern "C" const char* __tsan_default_options() { return "halt_on_error=1"; }
extern "C" void __tsan_on_report(void*) { gptfast::sanitize::expect(false, "ThreadSanitizer:"); }
extern "C" void __ubsan_on_report() { gptfast::sanitize::expect(false, "UBSan:"); }

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // keeps failures before the sanitizer's report
  return gptfast::sanitize::main_of(argc > 1 ? argv[1] : "");
}
