// fake_quantize, of one tensor and of many.
#include "glue.h"

namespace fastqat::cuda {
namespace {

// One tensor of a call, and what of it the kernel cannot take as it is.
class Job {
 public:
  Job(const Tensor& x, const Tensor& y, DeviceGrid&& grid, std::optional<int64_t> axis, const NoisePointers& noise)
      : grid_(std::move(grid)),
        x_(of_dtype(noise.tensor_id < 0 ? dense(x) : torch::stable::contiguous(x),  // the order of random numbers
                    computed_dtype(x, y.scalar_type()))),
        results_{Result(y, x_)} {
    entry_ = {};
    entry_.x = x_.data_ptr();
    entry_.y = results_[0].own.data_ptr();
    entry_.grid = grid_.pointers();
    entry_.noise = noise;
    entry_.x_dtype = dtype_of(x_);
    entry_.y_dtype = dtype_of(y);
    cut(axis, true);
  }

  void track(const Tensor& words, const Tensor& frequency, const Tensor& average, const Tensor& counts,
             const Tensor& clock, const Tensor& threshold, double momentum, bool use_average, bool advance,
             std::optional<int64_t> axis) {
    for (const Tensor* state : {&words, &frequency, &average}) {
      results_.emplace_back(*state, x_);
      if (results_.back().is_copy()) torch::stable::copy_(results_.back().own, *state);
    }
    entry_.words = results_[1].own.data_ptr();
    entry_.frequency = results_[2].own.mutable_data_ptr<float>();
    entry_.average = results_[3].own.mutable_data_ptr<float>();
    entry_.counts = counts.mutable_data_ptr<int64_t>();
    entry_.clock = clock.mutable_data_ptr<double>();
    entry_.threshold = threshold.const_data_ptr<float>();
    entry_.momentum = momentum;
    entry_.wide = words.scalar_type() != ScalarType::Byte;
    entry_.use_average = use_average;
    entry_.advance = advance;
    cut(axis, !entry_.wide && is_aligned(results_[1].own));
  }

  const Forward& entry() const { return entry_; }

  void deliver() {
    for (Result& result : results_) result.deliver();
  }

 private:
  void cut(std::optional<int64_t> axis, bool vectors) {
    entry_.cut = make_cut(layout_of(x_, axis), vector_of(entry_.x_dtype, entry_.y_dtype),
                          vectors && is_aligned(x_) && is_aligned(results_[0].own));
  }

  DeviceGrid grid_;
  Tensor x_;
  std::vector<Result> results_;  // y, words, frequency, average
  Forward entry_;
};

}  // namespace

void fake_quantize_out(Tensor x, FASTQAT_GRID, std::optional<ScalarType>, Tensor y) {
  Device device(x);
  Job job(x, y, DeviceGrid(scale, zero_point, offset, qrange, eps), axis, kNoNoise);
  fake_quantize(&job.entry(), 1, device.stream());
  job.deliver();
}

void multi_tensor_fake_quantize(Tensors xs, FASTQAT_GRIDS, FASTQAT_NOISE, Doubles momenta, Ints use_average,
                                Tensors thresholds, bool advance, Tensors words, Tensors frequencies, Tensors averages,
                                Tensors counts, Tensors clocks, Tensors ys) {
  if (xs.empty()) return;
  Device device(xs[0]);
  std::vector<Job> jobs;
  jobs.reserve(xs.size());
  int64_t tracked = 0;
  for (size_t i = 0; i < xs.size(); ++i) {
    DeviceGrid grid(scales[i], unless_empty(zero_points[i]), unless_empty(offsets[i]), qranges[i], eps[i]);
    const auto axis = axis_of(axes[i]);
    jobs.emplace_back(xs[i], ys[i], std::move(grid), axis, noise_of(seeds[i], steps[i], tensor_ids[i]));
    if (momenta[i] <= 0.0) continue;
    jobs.back().track(words[i], frequencies[i], averages[i], counts[i], clocks[i], thresholds[i], momenta[i],
                      use_average[i] != 0, advance, axis);
    ++tracked;
  }
  // What blocks tell each other: a Meeting for each tracked tensor.
  const int64_t bytes = tracked * static_cast<int64_t>(sizeof(Meeting));
  const Tensor memory = empty({bytes}, ScalarType::Byte, xs[0]);
  Meeting* meetings = static_cast<Meeting*>(memory.data_ptr());
  clear(meetings, bytes, device.stream());
  std::vector<Forward> entries;
  for (const Job& job : jobs) {
    entries.push_back(job.entry());
    if (job.entry().clock) entries.back().meeting = meetings + --tracked;
  }
  start_by_dtypes(entries, &Forward::y_dtype, [&](const Forward* alike, int count) {
    bool tracks = false;
    for (int i = 0; i < count; ++i) tracks = tracks || alike[i].clock || alike[i].noise.tensor_id >= 0;
    if (tracks)
      fake_quantize_tracking(alike, count, device.stream());
    else
      fake_quantize(alike, count, device.stream());
  });
  for (Job& job : jobs) job.deliver();
}

}  // namespace fastqat::cuda
