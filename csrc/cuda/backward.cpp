// Gradients of fake_quantize, of one tensor and of many.
#include "../estimators.h"
#include "glue.h"

namespace fastqat::cuda {
namespace {

// One tensor of a call, and what of it the kernel cannot take as it is.
class Job {
 public:
  Job(const Tensor& g, const Tensor& x, DeviceGrid&& grid, std::optional<int64_t> axis, const NoisePointers& noise,
      const Tensor& dx)
      : grid_(std::move(grid)),
        axis_(axis),
        x_(of_dtype(noise.tensor_id < 0 ? dense(x) : torch::stable::contiguous(x),  // the order of random numbers
                    computed_dtype(x, g.scalar_type()))),
        g_(with_strides_of(x_, g)),
        dx_(dx, x_, x_.scalar_type()) {
    entry_ = {};
    entry_.g = g_.data_ptr();
    entry_.x = x_.data_ptr();
    entry_.dx = dx_.own.data_ptr();
    entry_.grid = grid_.pointers();
    entry_.noise = noise;
    entry_.x_dtype = dtype_of(x_);
    entry_.g_dtype = dtype_of(g_);
    entry_.rounded_mask = true;
    cut(true);
  }

  void sum(const Tensor& dscale, const Tensor& dshift, bool lsq_grad_scale) {
    if (!dscale.numel()) return;
    entry_.dscale = dscale.mutable_data_ptr<float>();
    if (dshift.numel()) entry_.dshift = dshift.mutable_data_ptr<float>();
    entry_.lsq_grad_scale = lsq_grad_scale;
  }

  void extend(int64_t estimator, const Tensor& strength, const Tensor& dampening, const Tensor& words) {
    entry_.estimator = estimator;
    if (strength.numel()) entry_.strength = strength.const_data_ptr<float>();
    if (dampening.numel()) entry_.dampening = dampening.const_data_ptr<float>();
    if (!words.numel()) return;
    words_ = with_strides_of(x_, words);
    entry_.words = words_->data_ptr();
    entry_.wide = words.scalar_type() != ScalarType::Byte;
    cut(!entry_.wide && is_aligned(*words_));
  }

  Backward& entry() { return entry_; }
  int64_t sums() const { return entry_.cut.parts > 1 ? 2 * entry_.cut.pieces() * entry_.cut.width : 0; }
  int64_t counters() const { return entry_.cut.parts > 1 ? entry_.cut.groups : 0; }

  void deliver() { dx_.deliver(); }

 private:
  void cut(bool vectors) {
    entry_.cut = make_cut(layout_of(x_, axis_), vector_of(entry_.x_dtype, entry_.g_dtype),
                          vectors && is_aligned(x_) && is_aligned(g_) && is_aligned(dx_.own));
  }

  DeviceGrid grid_;
  std::optional<int64_t> axis_;
  Tensor x_, g_;
  Result dx_;
  OptionalTensor words_;
  Backward entry_;
};

// Memory for the sums of pieces and the counters of groups, of all tensors; then the kernels, and the results.
void run(std::vector<Job>& jobs, const Device& device, const Tensor& where) {
  int64_t sums = 0, counters = 0;
  for (const Job& job : jobs) {
    sums += job.sums();
    counters += job.counters();
  }
  const Tensor partial = empty({sums}, ScalarType::Double, where), arrived = empty({counters}, ScalarType::Int, where);
  double* partial_data = static_cast<double*>(partial.data_ptr());
  unsigned int* arrived_data = static_cast<unsigned int*>(arrived.data_ptr());
  clear(arrived_data, counters * static_cast<int64_t>(sizeof(unsigned int)), device.stream());
  std::vector<Backward> entries;
  for (Job& job : jobs) {
    if (job.counters()) {
      job.entry().partial = partial_data;
      job.entry().arrived = arrived_data;
      partial_data += job.sums();
      arrived_data += job.counters();
    }
    entries.push_back(job.entry());
  }
  start_by_dtypes(entries, &Backward::g_dtype,
                  [&](const Backward* alike, int count) { fake_quantize_backward(alike, count, device.stream()); });
  for (Job& job : jobs) job.deliver();
}

}  // namespace

void fake_quantize_backward_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale, double clip,
                                Tensor dx, Tensor dscale, Tensor dshift) {
  Device device(x);
  std::vector<Job> jobs;
  jobs.emplace_back(g, x, DeviceGrid(scale, zero_point, offset, qrange, eps), axis, kNoNoise, dx);
  jobs[0].sum(dscale, dshift, lsq_grad_scale);
  jobs[0].entry().rounded_mask = rounded_mask;
  jobs[0].entry().clip = static_cast<float>(clip);
  run(jobs, device, x);
}

void fake_quantize_backward_input_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, Tensor dx) {
  Device device(x);
  std::vector<Job> jobs;
  jobs.emplace_back(g, x, DeviceGrid(scale, zero_point, offset, qrange, eps), axis, kNoNoise, dx);
  jobs[0].entry().rounded_mask = rounded_mask;
  run(jobs, device, x);
}

void multi_tensor_fake_quantize_backward(Tensors gs, Tensors xs, FASTQAT_GRIDS, FASTQAT_NOISE, Ints rounded_masks,
                                         Ints lsq_grad_scales, Ints estimators, Tensors strengths, Tensors dampenings,
                                         Tensors words, Tensors dxs, Tensors dscales, Tensors dshifts) {
  if (xs.empty()) return;
  Device device(xs[0]);
  std::vector<Job> jobs;
  jobs.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    DeviceGrid grid(scales[i], unless_empty(zero_points[i]), unless_empty(offsets[i]), qranges[i], eps[i]);
    // Only stochastic rounding draws, whatever id the tensor has.
    const int64_t tensor_id = estimators[i] == kStochastic ? tensor_ids[i] : -1;
    jobs.emplace_back(gs[i], xs[i], std::move(grid), axis_of(axes[i]), noise_of(seeds[i], steps[i], tensor_id), dxs[i]);
    jobs.back().extend(estimators[i], strengths[i], dampenings[i], words[i]);
    jobs.back().sum(dscales[i], dshifts[i], lsq_grad_scales[i] != 0);
    jobs.back().entry().rounded_mask = rounded_masks[i] != 0;
  }
  run(jobs, device, xs[0]);
}

}  // namespace fastqat::cuda
