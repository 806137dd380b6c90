// Fibers, meetings and instructions of device.h, and the launch of a grid.
#include "device.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <vector>

#include <sys/mman.h>

#ifdef MCTUNE_THREADS
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
static const unsigned unordered = 1;  // a switch says nothing of what happened before what
#endif
#ifdef MCTUNE_ADDRESSES
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void* __asan_region_is_poisoned(void*, size_t);
}
#endif

// --- switching stacks

extern "C" void mctune_switch(void** from, void* to);
#if defined(__x86_64__)
// Callee-saved registers and the stack pointer; the rest is the compiler's business at a call.
asm(R"(
.text
.type mctune_switch,@function
mctune_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mctune_switch,.-mctune_switch
)");
static void* first_frame(char* top, void (*entry)()) {
    void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15});
    *--stack = nullptr;  // the entry finds the stack as after a call
    *--stack = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--stack = nullptr;
    return stack;
}
#else
#error "kernels run on a CPU of x86-64 only"
#endif

namespace device {

Index thread_index, block_index;
unsigned char* shared_memory;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr int kFence = 64;

enum class State { ready, at_block, at_warp, done };

struct Pending {
    uint32_t offset;
    int bytes, given;
    unsigned char data[16];
};

struct Fiber {
    void* context = nullptr;
    char* stack = nullptr;
    State state = State::ready;
    int line = 0;
    const char* what = "";
    Index index{};
    std::vector<Pending> copies;           // asked for since the last commit
    std::vector<std::vector<Pending>> groups;  // committed, not waited for
#ifdef MCTUNE_THREADS
    void* shadow = nullptr;
#endif
#ifdef MCTUNE_ADDRESSES
    void* fake = nullptr;
#endif
};

struct Meeting {
    int arrived = 0, line = 0;
    const char* what = "";
    int number = 0;  // of meetings so far
    uint32_t words[kWarp][16];
    float sums[kWarp][8];
    uint32_t results[kWarp][8];
    float results_f[kWarp][8];
};

std::mutex one_at_a_time;
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
Fiber* self;
void* scheduler;
std::vector<int> ready;
std::mt19937 chance;
void** arguments;
void (*kernel)(void**);
size_t pool_bytes;
bool stopped;
char message[512];
char tokens_block[2], tokens_warp[kWarp][2];
#ifdef MCTUNE_THREADS
void* scheduler_shadow;
char token_start, token_done;
#endif
#ifdef MCTUNE_ADDRESSES
void* scheduler_fake;
const void* scheduler_stack;
size_t scheduler_size;
#endif

int number_of(const Fiber* fiber) { return static_cast<int>(fiber - fibers.data()); }

void to_scheduler(bool last) {
    Fiber* me = self;
#ifdef MCTUNE_THREADS
    __tsan_switch_to_fiber(scheduler_shadow, unordered);
#endif
#ifdef MCTUNE_ADDRESSES
    __sanitizer_start_switch_fiber(last ? nullptr : &me->fake, scheduler_stack, scheduler_size);
#endif
    mctune_switch(&me->context, scheduler);
#ifdef MCTUNE_ADDRESSES
    __sanitizer_finish_switch_fiber(me->fake, nullptr, nullptr);
#endif
    (void)last;
}

// Ends the launch; ``message`` says why. No fiber runs again.
[[noreturn]] void stop() {
    stopped = true;
    self->state = State::done;
    to_scheduler(true);
    std::abort();
}

void run(Fiber& fiber) {
    self = &fiber;
    thread_index = fiber.index;
#ifdef MCTUNE_THREADS
    __tsan_switch_to_fiber(fiber.shadow, unordered);
#endif
#ifdef MCTUNE_ADDRESSES
    __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStack);
#endif
    mctune_switch(&scheduler, fiber.context);
#ifdef MCTUNE_ADDRESSES
    __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void begin() {
#ifdef MCTUNE_ADDRESSES
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
#ifdef MCTUNE_THREADS
    __tsan_acquire(&token_start);
#endif
    kernel(arguments);
    if (!self->groups.empty() || !self->copies.empty()) fail(self->line, "a thread ends before its copies were waited for");
#ifdef MCTUNE_THREADS
    __tsan_release(&token_done);
#endif
    self->state = State::done;
    to_scheduler(true);
    std::abort();
}

// One of several that meet has come. The last one does ``act`` and lets the others go on.
template <typename Act>
void meet(Meeting& meeting, int members, int first, State state, int line, const char* what, char* token, Act act) {
    if (meeting.arrived == 0) {
        meeting.line = line;
        meeting.what = what;
    } else if (meeting.line != line || std::strcmp(meeting.what, what) != 0) {
        std::snprintf(message, sizeof message, "thread %d comes to %s of line %d, others of its %s to %s of line %d",
                      number_of(self), what, line, state == State::at_block ? "block" : "warp", meeting.what, meeting.line);
        stop();
    }
    self->line = line;
    self->what = what;
    // Two tokens by turns: with one, whoever leaves a meeting would seem to come after those who enter the next.
    char* turn = token + meeting.number % 2;
#ifdef MCTUNE_THREADS
    __tsan_release(turn);
#endif
    if (++meeting.arrived < members) {
        self->state = state;
        to_scheduler(false);
    } else {
        act();
        meeting.arrived = 0;
        ++meeting.number;
        for (int i = first; i < first + members; ++i) {
            if (&fibers[i] == self) continue;
            fibers[i].state = State::ready;
            ready.push_back(i);
        }
    }
#ifdef MCTUNE_THREADS
    __tsan_acquire(turn);
#endif
    (void)turn;
}

template <typename Act>
void meet_in_warp(int line, const char* what, Act act) {
    int warp = number_of(self) / kWarp;
    meet(warps[warp], kWarp, warp * kWarp, State::at_warp, line, what, tokens_warp[warp], act);
}

int lane_of_self() { return number_of(self) % kWarp; }

float number(Kind kind, uint32_t word, int half) {
    unsigned short bits = static_cast<unsigned short>(word >> (16 * half));
    if (kind == Kind::f16) return half_to_float(bits);
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

void check_shared(int line, uint32_t offset, int bytes, int align) {
    if (offset % align != 0) fail(line, "an address in shared memory is not aligned");
    if (offset + static_cast<size_t>(bytes) > pool_bytes) fail(line, "an address is beyond the shared memory of the block");
}

void land(const std::vector<Pending>& group) {
    for (const Pending& copy : group) {
#ifdef MCTUNE_THREADS
        __tsan_write_range(shared_memory + copy.offset, copy.bytes);
#endif
        std::memcpy(shared_memory + copy.offset, copy.data, copy.bytes);
    }
}

void run_block(int threads) {
    ready.clear();
    block.arrived = block.number = 0;
    for (Meeting& warp : warps) warp.arrived = warp.number = 0;
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = State::ready;
        fiber.index = {i, 0, 0};
        fiber.copies.clear();
        fiber.groups.clear();
        fiber.context = first_frame(fiber.stack + kStack, begin);
#ifdef MCTUNE_THREADS
        fiber.shadow = __tsan_create_fiber(0);
#endif
        ready.push_back(i);
    }
#ifdef MCTUNE_THREADS
    __tsan_release(&token_start);
#endif
    int done = 0;
    while (!ready.empty() && !stopped) {
        size_t pick = chance() % ready.size();
        int chosen = ready[pick];
        ready[pick] = ready.back();
        ready.pop_back();
        run(fibers[chosen]);
        done += fibers[chosen].state == State::done;
    }
#ifdef MCTUNE_THREADS
    __tsan_acquire(&token_done);
    for (int i = 0; i < threads; ++i) __tsan_destroy_fiber(fibers[i].shadow);
#endif
    if (done == threads || stopped) return;
    for (const Fiber& fiber : fibers) {
        if (fiber.state != State::at_block && fiber.state != State::at_warp) continue;
        std::snprintf(message, sizeof message, "thread %d waits at %s of line %d for threads that never come: %d of %d ended",
                      number_of(&fiber), fiber.what, fiber.line, done, threads);
        stopped = true;
        return;
    }
}

bool poisoned(const unsigned char* memory, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
        if (memory[i] != 0xff) return false;
    return true;
}

}  // namespace

void fail(int line, const char* what) {
    std::snprintf(message, sizeof message, "line %d, thread %d of block (%d, %d, %d): %s", line, number_of(self),
                  block_index.x, block_index.y, block_index.z, what);
    stop();
}

void block_barrier(int line) {
    meet(block, static_cast<int>(fibers.size()), 0, State::at_block, line, "__syncthreads", tokens_block, [] {});
}

void warp_barrier(int line) {
    meet_in_warp(line, "__syncwarp", [] {});
}

uint32_t exchange(int line, uint32_t mask, uint32_t value, int partner) {
    if (mask != 0xffffffffu) fail(line, "a shuffle is not of the whole warp");
    Meeting& meeting = warps[number_of(self) / kWarp];
    int lane = lane_of_self();
    meeting.words[lane][0] = value;
    meeting.words[lane][1] = static_cast<uint32_t>(partner);
    meet_in_warp(line, "a shuffle", [&] {
        for (int i = 0; i < kWarp; ++i) {
            uint32_t from = meeting.words[i][1];
            meeting.results[i][0] = meeting.words[from < kWarp ? from : i][0];
        }
    });
    return meeting.results[lane][0];
}

uint32_t shared_offset(int line, const void* address) {
    auto* at = static_cast<const unsigned char*>(address);
    if (at < shared_memory || at > shared_memory + pool_bytes) fail(line, "an address is not in shared memory");
    return static_cast<uint32_t>(at - shared_memory);
}

void load_matrices(int line, int count, bool transposed, uint32_t* words, uint32_t offset) {
    Meeting& meeting = warps[number_of(self) / kWarp];
    int lane = lane_of_self();
    // Threads 0 to 8 * count - 1 name a row of 16 bytes each.
    if (lane < 8 * count) {
        check_shared(line, offset, 16, 16);
#ifdef MCTUNE_THREADS
        __tsan_read_range(shared_memory + offset, 16);
#endif
    }
    meeting.words[lane][0] = offset;
    meet_in_warp(line, "ldmatrix", [&] {
        for (int matrix = 0; matrix < count; ++matrix) {
            unsigned short cells[8][8];
            for (int row = 0; row < 8; ++row)
                std::memcpy(cells[row], shared_memory + meeting.words[8 * matrix + row][0], 16);
            for (int i = 0; i < kWarp; ++i) {
                int row = i / 4, col = 2 * (i % 4);
                uint32_t low = transposed ? cells[col][row] : cells[row][col];
                uint32_t high = transposed ? cells[col + 1][row] : cells[row][col + 1];
                meeting.results[i][matrix] = low | high << 16;
            }
        }
    });
    for (int matrix = 0; matrix < count; ++matrix) words[matrix] = meeting.results[lane][matrix];
}

void multiply_16x8(int line, Kind kind, int depth, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    Meeting& meeting = warps[number_of(self) / kWarp];
    int lane = lane_of_self(), halves = depth / 8;
    for (int i = 0; i < 2 * halves; ++i) meeting.words[lane][i] = a[i];
    for (int i = 0; i < halves; ++i) meeting.words[lane][8 + i] = b[i];
    for (int i = 0; i < 4; ++i) meeting.sums[lane][i] = c[i];
    meet_in_warp(line, "mma", [&] {
        float left[16][16], right[16][8];
        for (int i = 0; i < kWarp; ++i) {
            int group = i / 4, pair = 2 * (i % 4);
            for (int r = 0; r < 2 * halves; ++r)
                for (int e = 0; e < 2; ++e)
                    left[group + 8 * (r % 2)][pair + 8 * (r / 2) + e] = number(kind, meeting.words[i][r], e);
            for (int r = 0; r < halves; ++r)
                for (int e = 0; e < 2; ++e) right[pair + 8 * r + e][group] = number(kind, meeting.words[i][8 + r], e);
        }
        for (int i = 0; i < kWarp; ++i)
            for (int r = 0; r < 4; ++r) {
                int row = i / 4 + 8 * (r / 2), col = 2 * (i % 4) + r % 2;
                float sum = 0;
                for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][col];
                meeting.results_f[i][r] = meeting.sums[i][r] + sum;
            }
    });
    for (int i = 0; i < 4; ++i) d[i] = meeting.results_f[lane][i];
}

void multiply_8x8(int line, bool a_columns, bool b_columns, float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    Meeting& meeting = warps[number_of(self) / kWarp];
    int lane = lane_of_self();
    for (int i = 0; i < 2; ++i) meeting.words[lane][i] = a[i], meeting.words[lane][2 + i] = b[i];
    for (int i = 0; i < 8; ++i) meeting.sums[lane][i] = c[i];
    meet_in_warp(line, "mma", [&] {
        for (int pair = 0; pair < 4; ++pair) {
            auto thread = [&](int i) { return 4 * pair + i % 4 + 16 * (i / 4); };
            float left[8][4], right[4][8];
            for (int i = 0; i < 8; ++i)
                for (int e = 0; e < 4; ++e) {
                    float x = number(Kind::f16, meeting.words[thread(i)][e / 2], e % 2);
                    float y = number(Kind::f16, meeting.words[thread(i)][2 + e / 2], e % 2);
                    // By rows of A (columns of B) a thread has all four k of one; else one k of four of them.
                    if (a_columns) left[4 * (i / 4) + e][i % 4] = x; else left[i][e] = x;
                    if (b_columns) right[e][i] = y; else right[i % 4][4 * (i / 4) + e] = y;
                }
            for (int i = 0; i < 8; ++i)
                for (int r = 0; r < 8; ++r) {
                    int at = thread(i);
                    int row = (at & 1) + (r & 2) + 4 * (at / 16), col = (r & 4) + (at & 2) + (r & 1);
                    float sum = 0;
                    for (int k = 0; k < 4; ++k) sum += left[row][k] * right[k][col];
                    meeting.results_f[at][r] = meeting.sums[at][r] + sum;
                }
        }
    });
    for (int i = 0; i < 8; ++i) d[i] = meeting.results_f[lane][i];
}

// A copy lands when it is waited for, and what it copies is read at once: whoever reads shared memory before sees what
// was there.
void copy_later(int line, uint32_t offset, const void* source, int bytes, int given) {
    check_shared(line, offset, bytes, bytes);
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0) fail(line, "cp.async reads from an address that is not aligned");
    Pending copy{offset, bytes, given, {}};
    std::memcpy(copy.data, source, given);
    self->copies.push_back(copy);
    self->line = line;
}

void commit_copies(int) {
    self->groups.push_back(self->copies);
    self->copies.clear();
}

void wait_copies(int, int left) {
    while (static_cast<int>(self->groups.size()) > left) {
        land(self->groups.front());
        self->groups.erase(self->groups.begin());
    }
}

float half_to_float(unsigned short bits) {
    unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        float value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

unsigned short float_to_half(float value) {
    unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // denormal: count units of 2^-24, ties to even
        return static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(std::ldexp(std::fabs(value), 24))));
    }
    unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<unsigned short>(sign | (rounded - 0x38000000u) >> 13);
}

unsigned short float_to_bfloat(float value) {
    unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace device

using namespace device;

// 0, or 1 and why not in ``said``.
extern "C" int mctune_launch(const Entry* entry, const int* grid, int threads, unsigned shared_bytes, void** values,
                             unsigned seed, char* said, int room) {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    message[0] = 0;
    if (threads != entry->threads) {
        std::snprintf(said, room, "%s has blocks of %d threads, not of %d", entry->name, entry->threads, threads);
        return 1;
    }
    chance.seed(seed);
    kernel = entry->call;
    arguments = values;
    pool_bytes = shared_bytes;
    fibers.resize(threads);
    warps.resize(threads / kWarp);
    for (Fiber& fiber : fibers)
        if (fiber.stack == nullptr)
            fiber.stack = static_cast<char*>(
                mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#ifdef MCTUNE_THREADS
    scheduler_shadow = __tsan_get_current_fiber();
#endif
    long blocks = static_cast<long>(grid[0]) * grid[1] * grid[2];
    std::vector<long> order(blocks);
    for (long i = 0; i < blocks; ++i) order[i] = i;
    for (long i = blocks - 1; i > 0; --i) std::swap(order[i], order[chance() % (i + 1)]);
    stopped = false;
    for (long i = 0; i < blocks && !stopped; ++i) {
#ifdef MCTUNE_ADDRESSES
        unsigned char* pool = static_cast<unsigned char*>(aligned_alloc(128, (shared_bytes + 127) / 128 * 128));
        shared_memory = pool;
        std::memset(pool, 0xff, shared_bytes);
#else
        size_t all = (shared_bytes + 2 * kFence + 127) / 128 * 128;
        auto* pool = static_cast<unsigned char*>(aligned_alloc(128, all));
        std::memset(pool, 0xff, all);
        shared_memory = pool + kFence;
#endif
        block_index = {static_cast<int>(order[i] % grid[0]), static_cast<int>(order[i] / grid[0] % grid[1]),
                       static_cast<int>(order[i] / grid[0] / grid[1])};
        run_block(threads);
#ifndef MCTUNE_ADDRESSES
        if (!stopped && (!poisoned(pool, kFence) || !poisoned(shared_memory + shared_bytes, all - kFence - shared_bytes))) {
            std::snprintf(message, sizeof message, "block (%d, %d, %d) writes beyond its %u bytes of shared memory",
                          block_index.x, block_index.y, block_index.z, shared_bytes);
            stopped = true;
        }
#endif
        std::free(pool);
    }
    if (stopped) std::snprintf(said, room, "%s: %s", entry->name, message);
    return stopped;
}
