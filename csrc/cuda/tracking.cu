// fake_quantize with oscillation tracking and freezing, and with stochastic rounding, of many tensors in one launch.
#include "grid.cuh"
#include "table.cuh"
#include "traverse.cuh"
#include "vector.cuh"
#include "words.cuh"

namespace fastqat::cuda {
namespace {

// Weights of a piece that may have changed, by their place from its first element on. They are looked at when the
// piece is done, by all threads at once: they are few, and each is far from the others.
struct Visits {
  unsigned int count;
  unsigned int place[kPiece];
};

// Transitions, oscillations and freezes of one step.
struct Events {
  unsigned int count[3];
};

// A tensor whose weights are tracked, or rounded stochastically (kNoise). entry.clock: null where it is not tracked
template <class X, class Y, bool kNoise>
struct Tracking : Elementwise {
  static constexpr int kVector = kNoise ? 1 : kVectorOf<X, Y>, kAtOnce = sizeof(X) == 2 ? 16 : 8;
  template <int n>
  struct Operands {
    typename Array<X>::template Raw<n> x;
    WordVector<n> words;
  };

  const Forward& entry;
  const Moment& at;
  bool tracks, first, all, none;  // all or none of the weights are visited
  Array<X> x;
  Array<Y> y;
  Words words;
  int64_t origin;       // of the piece
  unsigned int offset;  // of what is placed, from there on
  Events events{};

  __device__ Tracking(const Forward& e, const Moment& at_) : entry(e), at(at_), tracks(e.clock != nullptr) {
    first = tracks && at.first;
    all = tracks && (at.sweeps || at.first);
    none = !tracks || !(at.acts || at.first);
  }
  __device__ __forceinline__ Channel channel(int64_t c) const { return channel_of(entry.grid, c); }

  __device__ __forceinline__ void begin(int64_t origin_) {
    origin = origin_;
    __syncthreads();  // the visits of the piece before have been made
    if (threadIdx.x == 0) shared<Visits>().count = 0;
    __syncthreads();
  }

  __device__ __forceinline__ void place(int64_t base) {
    offset = static_cast<unsigned int>(base - origin);
    x = array<X>(entry.x, entry.x_dtype, base);
    y = array<Y>(entry.y, entry.y_dtype, base);
    words = Words(entry.words, entry.wide, base);
  }

  template <int n>
  __device__ __forceinline__ Operands<n> load(int i) const {
    Operands<n> operands;
    operands.x = x.template load<n>(i);
    if (tracks) operands.words = words.template load<n>(i);
    return operands;
  }

  // Level of a weight without regard to its state; NaN stays NaN.
  template <bool kFast>
  __device__ __forceinline__ float own_level(float v, int64_t element, const Channel& ch) const {
    const float t = shifted<true>(v, ch);
    if (!kNoise || entry.noise.tensor_id < 0) return level<kFast>(t, ch);
    return clamp(drawn(t, ch, entry.noise, element), ch.low, ch.high);
  }

  template <int n>
  __device__ __forceinline__ void apply(int i, const Operands<n>& operands, const Channel& ch, Sums&) const {
    Vector<float, n> values;
    unsigned int visited = 0;  // a bit for each weight
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float own = own_level<(n > 1)>(to_float(operands.x.v[k]), origin + offset + i + k, ch);
      float lev = own;
      if (tracks) {
        const float last = ch.low + static_cast<float>(words.index_of(operands.words.v[k]));
        const int flags = words.flags_of(operands.words.v[k]);
        lev = (flags == kSettled) & (own == own) & !first ? last : own;
        visited |= ((flags > kSettled) | (lev != last) ? 1u : 0u) << k;
      }
      values.v[k] = value<true>(lev, ch);
    }
    y.template store<n>(i, values);
    if (all) visited = (1u << n) - 1;
    if (none || !visited) return;
    auto& visits = shared<Visits>();
    unsigned int next = atomicAdd(&visits.count, static_cast<unsigned int>(__popc(visited)));
#pragma unroll
    for (int k = 0; k < n; ++k)
      if (visited >> k & 1) visits.place[next++] = offset + i + k;
  }

  __device__ __forceinline__ void end() {
    if (none) return;
    auto& visits = shared<Visits>();
    __syncthreads();
    for (unsigned int k = threadIdx.x; k < visits.count; k += kThreads) visit(origin + visits.place[k]);
  }

  // Records what has changed of a weight, and replaces its value where it is frozen.
  __device__ __forceinline__ void visit(int64_t element) {
    const Channel ch = channel(element / entry.cut.inner % entry.cut.channels);
    const Words own_words(entry.words, entry.wide, element);
    const int word = own_words.load<1>(0).v[0];
    float own = own_level<false>(array<X>(entry.x, entry.x_dtype, element).get(0), element, ch);
    const bool number = own == own;
    own = number ? own : clamp(0.0f, ch.low, ch.high);
    Tracked weight{own_words.index_of(word), own_words.flags_of(word), entry.frequency[element],
                   entry.average[element]};
    const bool held = weight.flags >= kSettled && !first && number;
    Event event;
    const int32_t now = static_cast<int32_t>(own - ch.low);
    const float qmin = static_cast<float>(entry.grid.qrange[0]), qmax = static_cast<float>(entry.grid.qrange[1]);
    const int32_t index = record(weight, now, number, at, qmin, qmax, event);
    if (held) array<Y>(entry.y, entry.y_dtype, element).set(0, value<true>(ch.low + static_cast<float>(index), ch));
    if (!entry.advance) return;
    own_words.store(weight.index, weight.flags);
    entry.frequency[element] = weight.frequency;
    entry.average[element] = weight.average;
    events.count[0] += event.changes;
    events.count[1] += event.oscillates;
    events.count[2] += event.freezes;
  }
};

// After `done` pieces of an entry: adds what they have counted. The last block to do so writes the counts and the
// clock.
__device__ __forceinline__ void deliver(const Forward& entry, const Moment& at, const Events& mine, unsigned int done) {
  if (!entry.clock || !entry.advance || !(at.acts || at.first)) return;
  auto& sums = shared<Events>();
  __syncthreads();  // those of the entry before have been delivered
  if (threadIdx.x < 3) sums.count[threadIdx.x] = 0;
  __syncthreads();
  for (int k = 0; k < 3; ++k)
    if (mine.count[k]) atomicAdd(&sums.count[k], mine.count[k]);
  __syncthreads();
  if (threadIdx.x != 0) return;
  Meeting& meeting = *entry.meeting;
  for (int k = 0; k < 3; ++k)
    if (sums.count[k]) atomicAdd(&meeting.events[k], static_cast<unsigned long long>(sums.count[k]));
  __threadfence();
  if (atomicAdd(&meeting.arrived, done) + done != static_cast<unsigned int>(entry.cut.pieces())) return;
  __threadfence();
  const volatile unsigned long long* all = meeting.events;
  for (int k = 0; k < 3; ++k) entry.counts[k] = at.first ? 0 : entry.counts[k] + static_cast<int64_t>(all[k]);
  entry.counts[3] = static_cast<int64_t>(all[0]);
  entry.clock[0] = at.growth;
  entry.clock[1] = static_cast<double>(*entry.noise.step);
  entry.clock[2] = at.threshold;
}

// This block's pieces of one entry, which has [start, stop); returns the next piece.
template <class X, class Y, bool kNoise>
__device__ __forceinline__ int track(const Forward& entry, int piece, int start, int stop) {
  auto& at = shared<Moment>();
  __syncthreads();  // that of the entry before has been used
  if (threadIdx.x == 0 && entry.clock)
    at = moment(*entry.noise.step, entry.clock, entry.momentum, *entry.threshold, entry.use_average);
  __syncthreads();
  Tracking<X, Y, kNoise> body(entry, at);
  unsigned int done = 0;
  for (; piece < stop; piece += gridDim.x, ++done) traverse(body, entry.cut, piece - start, nullptr, nullptr);
  deliver(entry, at, body.events, done);
  return piece;
}

template <class X, class Y, bool kNoise>
__global__ void __launch_bounds__(kThreads, sizeof(X) == 2 ? 2 : 3)
    tracking_kernel(const __grid_constant__ Table<Forward, kMost> table) {
  for (int piece = blockIdx.x; piece < table.pieces;) {
    const int which = table.find(piece);
    const Forward& entry = table.entries[which];
    const int start = table.starts[which], stop = which + 1 < table.count ? table.starts[which + 1] : table.pieces;
    piece = track<X, Y, kNoise>(entry, piece, start, stop);
  }
}

template <class X, class Y, bool kNoise>
void start(const Forward* entries, int count, void* stream) {
  for_each_table<kMost>(entries, count, [&](const auto& table, int64_t blocks) {
    launch("fake_quantize with tracking", tracking_kernel<X, Y, kNoise>, blocks, kThreads, stream, table);
  });
}

}  // namespace

void fake_quantize_tracking(const Forward* entries, int count, void* stream) {
  if (!count) return;
  bool noise = false;
  for (int i = 0; i < count; ++i) noise = noise || entries[i].noise.tensor_id >= 0;
  if (noise) return start<Any, Any, true>(entries, count, stream);
  with_dtypes(entries[0].x_dtype, entries[0].y_dtype, [&](auto x, auto y) {
    start<typename decltype(x)::type, typename decltype(y)::type, false>(entries, count, stream);
  });
}

}  // namespace fastqat::cuda
