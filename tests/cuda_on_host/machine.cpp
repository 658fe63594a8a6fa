// The machine, what the tests set and read of it, and what the compiler's checks of undefined behaviour call.
#include "machine.h"

#include <setjmp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "block.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace fastqat::cuda_on_host {
namespace {

constexpr unsigned kResident = 3;  // blocks that take turns in a random order
constexpr size_t kMostShared = 48 * 1024;

// The one device, which runs one launch at a time.
class Machine {
 public:
  Order order = Order::ascending;
  int64_t most_blocks = std::numeric_limits<int32_t>::max();  // of a launch; it is given no more
  std::minstd_rand random;
  int64_t launches = 0;

  void run(const char* kernel, int64_t blocks, int threads, void (*call)(const void*), const void* arguments) {
    std::lock_guard<std::mutex> guard(one_launch_);
    const std::string name = std::string("fastqat: ") + kernel + ": ";
    if (blocks < 1 || blocks > std::numeric_limits<int32_t>::max() || threads < 1 || threads > int{kMostThreads})
      throw std::runtime_error(name + "launched with " + std::to_string(blocks) + " blocks of " +
                               std::to_string(threads) + " threads");
    ++launches;
    call_ = call;
    arguments_ = arguments;
    gridDim = {static_cast<unsigned>(std::min(blocks, most_blocks)), 1, 1};
    blockDim = {static_cast<unsigned>(threads), 1, 1};
    order_blocks();
    resident_ = std::vector<Block>(order == Order::random ? std::min(kResident, gridDim.x) : 1);
    for (Block& block : resident_) begin_next(block);
    favourite_ = turns_left_ = 0;
    fiber_ = nullptr;
    Faults faults(&Machine::on_fault);
    if (!_setjmp(caller_)) go_on_with_next();
    if (failure_.empty()) return;
    fibers_.clear();
    idle_.clear();
    throw std::runtime_error(name + std::exchange(failure_, {}));
  }

  [[noreturn]] void fail(const std::string& what) {
    if (!fiber_) std::abort();
    failure_ = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ": " + what;
    _longjmp(caller_, 1);
  }

  uint64_t meet(const Wait& wait) {
    Block& block = *me_->block;
    const unsigned warp = me_->number / kWarp;
    if (wait.mask && !(wait.mask >> lane() & 1)) fail(std::string(wait.what) + ": the mask does not name the thread");
    Thread* const me = me_;
    me->wait = wait;
    me->waits = true;
    if (!wait.mask) {
      if (++block.arrived == block.threads.size()) end_barrier(block);
    } else {
      block.exchanging[warp] |= 1u << lane();
      if ((block.exchanging[warp] & wait.mask) == wait.mask) end_exchange(block, warp, wait);
    }
    go_on_with_next();
    return me->wait.value;
  }

  void interrupt() {
    if (order != Order::random) return;
    if (random() % 2) favour(4096);
    me_->block->may_run(*me_);
    go_on_with_next();
  }

  void* shared(const void* type, size_t size) {
    size_t sum = size;
    for (const Shared& memory : me_->block->shared) {
      if (memory.type == type) return memory.data();
      sum += memory.size;
    }
    if (sum > kMostShared) fail(std::to_string(sum) + " bytes of shared memory");
    return me_->block->shared.emplace_back(type, size).data();
  }

  unsigned lane() const { return me_->number % kWarp; }

 private:
  void order_blocks() {
    blocks_.resize(gridDim.x);
    std::iota(blocks_.begin(), blocks_.end(), 0u);
    if (order == Order::ascending) std::reverse(blocks_.begin(), blocks_.end());
    if (order == Order::random) std::shuffle(blocks_.begin(), blocks_.end(), random);
  }

  void begin_next(Block& block) {
    if (blocks_.empty()) return;
    block.begin(blocks_.back(), blockDim.x, order == Order::random ? static_cast<Order>(random() % 3) : order);
    blocks_.pop_back();
  }

  static void work();  // what a fiber does
  static void on_fault(int);

  void end_thread() {
    Block& block = *me_->block;
    me_->ended = true;
    idle_.push_back(fiber_);
    if (++block.ended == block.threads.size()) {
      for (const Shared& memory : block.shared)
        if (!memory.is_fenced()) fail("the block has written outside of its shared memory");
      begin_next(block);
    }
    go_on_with_next();
  }

  // Stops this fiber, where there is one, until its thread is chosen, or until it may begin another.
  void go_on_with_next() {
    Fiber* const from = fiber_;
    me_ = next();
    fiber_ = me_ ? fiber_of(*me_) : nullptr;
    if (me_) {
      threadIdx.x = me_->number;
      blockIdx.x = me_->block->number;
    }
    if (fiber_ == from || (from && _setjmp(from->here))) return;
    if (!fiber_) _longjmp(caller_, 1);
    fiber_->go_on();
  }

  // Some block goes on for so many turns, if it can.
  void favour(unsigned turns) {
    favourite_ = random() % resident_.size();
    turns_left_ = turns;
  }

  Fiber* fiber_of(Thread& thread) {
    if (thread.fiber) return thread.fiber;
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Machine::work, fibers_.size()));
      idle_.push_back(fibers_.back().get());
    }
    thread.fiber = idle_.back();
    idle_.pop_back();
    return thread.fiber;
  }

  // The thread that goes on; null: all have ended. In a random order a block goes on for a while, short or long, so
  // that it overtakes others as well as it waits for them, and takes its threads in an order of its own.
  Thread* next() {
    unsigned number = 0;
    const size_t count = resident_.size();
    if (order == Order::random) {
      number = static_cast<unsigned>(random());
      if (!turns_left_--) favour(1u << random() % 11);
    }
    for (size_t k = 0; k < count; ++k) {
      Block& block = resident_[(favourite_ + k) % count];
      if (Thread* thread = block.alive() ? block.take(number) : nullptr) return thread;
    }
    for (const Block& block : resident_)
      if (block.alive()) fail(who_waits(block));
    return nullptr;
  }

  void end_barrier(Block& block) {
    for (const Thread& thread : block.threads)
      if (!same(thread.wait, me_->wait)) fail(who_waits(block));
    block.arrived = 0;
    for (Thread& thread : block.threads) block.may_run(thread);
  }

  // If all these lanes are at the same exchange, gives each the value it wants; poison from a lane outside of the mask.
  void end_exchange(Block& block, unsigned warp, const Wait& wait) {
    Thread* const lanes = &block.threads[warp * kWarp];
    std::array<uint64_t, kWarp + 1> values;
    values.fill(~uint64_t{0});
    values[kVotes] = 0;
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(wait.mask >> k & 1)) continue;
      if (!same(lanes[k].wait, wait)) return;
      values[k] = lanes[k].wait.value;
      values[kVotes] |= uint64_t{values[k] != 0} << k;
    }
    for (unsigned k = 0; k < kWarp; ++k) {
      if (!(wait.mask >> k & 1)) continue;
      lanes[k].wait.value = values[lanes[k].wait.source];
      block.may_run(lanes[k]);
    }
    block.exchanging[warp] &= ~wait.mask;
  }

  // Why a block does not go on.
  std::string who_waits(const Block& block) const {
    std::string text, last;
    for (const Thread& thread : block.threads) {
      std::string place = thread.wait.place.file_name();
      place = place.substr(place.rfind('/') + 1) + ":" + std::to_string(thread.wait.place.line()) + ":" +
              std::to_string(thread.wait.place.column());
      std::string now = thread.ended   ? "has ended"
                        : thread.waits ? std::string("waits at ") + thread.wait.what + " of " + place
                                       : "runs";
      if (now != last) text += (text.empty() ? "thread " : ", thread ") + std::to_string(thread.number) + " " + now;
      last = now;
    }
    return "its threads wait for each other in vain: from " + text;
  }

  std::mutex one_launch_;
  jmp_buf caller_;
  std::string failure_;
  void (*call_)(const void*) = nullptr;
  const void* arguments_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber* fiber_ = nullptr;  // that runs; null outside of a kernel
  Thread* me_ = nullptr;    // that runs
  std::vector<Block> resident_;
  size_t favourite_ = 0;  // of the resident blocks, goes on if it can
  unsigned turns_left_ = 0;
  std::vector<unsigned> blocks_;  // those to come, the next one last
};

Machine machine;

void Machine::on_fault(int) { machine.fail("an access to memory that is nobody's"); }

void Machine::work() {
  for (;;) {
    machine.call_(machine.arguments_);
    machine.end_thread();
  }
}

}  // namespace

void run(const char* kernel, int64_t blocks, int threads, void (*call)(const void*), const void* arguments) {
  machine.run(kernel, blocks, threads, call, arguments);
}
void fail(const std::string& what) { machine.fail(what); }
uint64_t meet(const Wait& wait) { return machine.meet(wait); }
void interrupt() { machine.interrupt(); }
void* shared(const void* type, size_t size) { return machine.shared(type, size); }
unsigned lane() { return machine.lane(); }

}  // namespace fastqat::cuda_on_host

using namespace fastqat::cuda_on_host;

#define FASTQAT_EXPORTED extern "C" __attribute__((visibility("default")))

// order: see Order; most_blocks: of a launch.
FASTQAT_EXPORTED void cuda_on_host_schedule(int order, unsigned seed, int64_t most_blocks) {
  machine.order = static_cast<Order>(order);
  machine.random.seed(seed);
  machine.most_blocks = most_blocks;
}

FASTQAT_EXPORTED int64_t cuda_on_host_launches() { return machine.launches; }

// Every record that the compiler hands over begins with a place.
struct PlaceOfCheck {
  const char* file;
  uint32_t line, column;
};

#define FASTQAT_CHECK(name, what)                                                     \
  extern "C" [[noreturn]] void __ubsan_handle_##name(const PlaceOfCheck* place) {     \
    fail(std::string(what " at ") + place->file + ":" + std::to_string(place->line)); \
  }

FASTQAT_CHECK(type_mismatch_v1_abort, "a null or misaligned pointer")
FASTQAT_CHECK(out_of_bounds_abort, "an index beyond its array")
FASTQAT_CHECK(shift_out_of_bounds_abort, "a shift by too much")
