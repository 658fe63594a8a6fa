// fake_quantize_backward: dx, ds and dz (or do) from one pass over (g, x).
#include "loops.h"
#include "ops.h"

namespace fastqat::cpu {
namespace {

// kTerms: 0 for dx alone, 1 with the sum of ds, 2 with that of the shift. dx: [n]; sums: see reduce_span
template <int kTerms, bool kRounded, Path kPath, bool kOffset, class Channels, class G = float, class X = float>
FASTQAT_CLONES void loop(const G* g, const X* x, X* dx, double* const* sums, int64_t n, const Channels& given) {
  const Channels channels = given;
  auto element = [&](int64_t i) __attribute__((always_inline)) {
    Gradient d = fastqat::fake_quantize_backward<kPath, kOffset, kRounded>(to_float(g[i]), to_float(x[i]), channels[i]);
    dx[i] = exactly<X>(d.dx);  // that of g, or zero
    return terms_of(d);
  };
  auto before = [&](int64_t i) __attribute__((always_inline)) { read_last(g, x, i); };
  reduce_span<Sum, kTerms, Channels::kRow>(n, sums, element, before);
}

template <int kTerms, bool kRounded, bool kOffset, class Channels>
BackwardLoop<Channels> of_path(Path path) {
  return path == Path::fast      ? loop<kTerms, kRounded, Path::fast, kOffset, Channels>
         : path == Path::careful ? loop<kTerms, kRounded, Path::careful, kOffset, Channels>
                                 : loop<kTerms, kRounded, Path::divide, kOffset, Channels>;
}

// The fast path of a row where g, or all, are bfloat16.
template <int kTerms, class G, class X>
void convert_row(const Input& g, const Input& x, const Output& dx, int64_t offset, int64_t n, const Uniform& row,
                 bool offset_grid, bool rounded_mask, double* const* sums) {
  BackwardLoop<Uniform, G, X> run = rounded_mask
                                        ? (offset_grid ? loop<kTerms, true, Path::fast, true, Uniform, G, X>
                                                       : loop<kTerms, true, Path::fast, false, Uniform, G, X>)
                                        : (offset_grid ? loop<kTerms, false, Path::fast, true, Uniform, G, X>
                                                       : loop<kTerms, false, Path::fast, false, Uniform, G, X>);
  run(g.in_place<G>(offset), x.in_place<X>(offset), dx.in_place<X>(offset), sums, n, row);
}

}  // namespace

template <int kTerms, class Channels>
BackwardLoop<Channels> backward_loop(Path path, bool offset_grid, bool rounded_mask) {
  if (rounded_mask)
    return offset_grid ? of_path<kTerms, true, true, Channels>(path) : of_path<kTerms, true, false, Channels>(path);
  return offset_grid ? of_path<kTerms, false, true, Channels>(path) : of_path<kTerms, false, false, Channels>(path);
}

template <int kTerms, class Channels>
void backward_span(const Input& g, const Input& x, const Output& dx, int64_t offset, int64_t n,
                   const Channels& channels, bool careful, bool offset_grid, bool rounded_mask, double* const* sums) {
  if constexpr (Channels::kRow) {
    if (channels.fast && !careful && g.dtype == ScalarType::BFloat16 && x.dtype == dx.dtype) {
      if (x.dtype == ScalarType::BFloat16)
        return convert_row<kTerms, BFloat16, BFloat16>(g, x, dx, offset, n, channels, offset_grid, rounded_mask, sums);
      if (x.dtype == ScalarType::Float)
        return convert_row<kTerms, BFloat16, float>(g, x, dx, offset, n, channels, offset_grid, rounded_mask, sums);
    }
  }
  float buffer_g[kBlock], buffer_x[kBlock], buffer_dx[kBlock];
  float* to = dx.block(offset, buffer_dx);
  Path path = path_of(channels, careful);
  backward_loop<kTerms, Channels>(path, offset_grid, rounded_mask)(g.block(offset, n, buffer_g),
                                                                   x.block(offset, n, buffer_x), to, sums, n, channels);
  dx.commit(offset, n, to);
}

#define FASTQAT_INSTANTIATE(kTerms, Channels)                                                                       \
  template BackwardLoop<Channels> backward_loop<kTerms, Channels>(Path, bool, bool);                                \
  template void backward_span<kTerms>(const Input&, const Input&, const Output&, int64_t, int64_t, const Channels&, \
                                      bool, bool, bool, double* const*)
FASTQAT_INSTANTIATE(0, Uniform);
FASTQAT_INSTANTIATE(0, Columns);
FASTQAT_INSTANTIATE(1, Uniform);
FASTQAT_INSTANTIATE(1, Columns);
FASTQAT_INSTANTIATE(2, Uniform);
FASTQAT_INSTANTIATE(2, Columns);

namespace {

FASTQAT_CLONES void clip_block(const float* x, float* to, int64_t n, float clip) {
  for (int64_t i = 0; i < n; ++i) to[i] = clipped(x[i], clip);
}

// No gradient where clipping is flat.
FASTQAT_CLONES void mask_block(const float* x, float* dx, int64_t n, float clip) {
  for (int64_t i = 0; i < n; ++i) dx[i] = passes_clip(x[i], clip) ? dx[i] : 0.0f;
}

// g, x, dx: dense, the same sizes and strides. clip: see the schema
struct Backward {
  Input g, x;
  Output dx;
  bool offset_grid, rounded_mask;
  float clip = 0.0f;

  // More than a buffer holds where none is needed.
  int64_t longest_span() const {
    bool in_place = g.dtype == ScalarType::Float && x.dtype == ScalarType::Float && dx.dtype == ScalarType::Float;
    return in_place && clip == 0.0f ? kChunk : kBlock;
  }

  template <int kTerms, class Channels>
  void span(int64_t offset, int64_t n, const Channels& channels, bool careful, double* const* sums) const {
    if (clip == 0.0f)
      return backward_span<kTerms>(g, x, dx, offset, n, channels, careful, offset_grid, rounded_mask, sums);
    float buffer_g[kBlock], buffer_x[kBlock], buffer_dx[kBlock], clipped_x[kBlock];
    const float* original = x.block(offset, n, buffer_x);
    clip_block(original, clipped_x, n, clip);
    float* to = dx.block(offset, buffer_dx);
    Path path = path_of(channels, careful);
    backward_loop<kTerms, Channels>(path, offset_grid, rounded_mask)(g.block(offset, n, buffer_g), clipped_x, to, sums,
                                                                     n, channels);
    mask_block(original, to, n, clip);
    dx.commit(offset, n, to);
  }

  template <int kTerms>
  std::vector<std::array<double, kTerms>> sums(const Layout& layout, const Grid& grid) const {
    return reduce_channels<Sum, kTerms>(
        layout, grid,
        [&](int64_t offset, int64_t n, const auto& channels, bool careful, auto reduced) {
          span<kTerms>(offset, n, channels, careful, reduced);
        },
        longest_span());
  }
};

// dscale, dshift: contiguous
void run(const Tensor& g, const Tensor& x, const Grid& grid, std::optional<int64_t> axis, bool rounded_mask,
         bool lsq_grad_scale, double clip, const Tensor& dx, const Tensor& dscale, const Tensor& dshift) {
  Backward backward{Input(g), Input(x), Output(dx), grid.offset_grid(), rounded_mask, static_cast<float>(clip)};
  Layout layout = layout_of(x, axis);
  double factor = lsq_grad_scale ? lsq_factor(layout, grid) : 1.0;
  float* ds = dscale.mutable_data_ptr<float>();
  if (dshift.numel())
    finish<2>(backward.sums<2>(layout, grid), grid, factor, ds, dshift.mutable_data_ptr<float>());
  else
    finish<1>(backward.sums<1>(layout, grid), grid, factor, ds, nullptr);
}

void run_input(const Tensor& g, const Tensor& x, const Grid& grid, std::optional<int64_t> axis, bool rounded_mask,
               const Tensor& dx) {
  Backward backward{Input(g), Input(x), Output(dx), grid.offset_grid(), rounded_mask};
  Cut cut(layout_of(x, axis));
  parallel(cut, [&](int64_t p) {
    spans_of_piece(cut, grid, p, backward.longest_span(), [&](int64_t offset, int64_t n, const auto& channels) {
      backward.span<0>(offset, n, channels, false, nullptr);
    });
  });
}

}  // namespace

void fake_quantize_backward_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, bool lsq_grad_scale, double clip,
                                Tensor dx, Tensor dscale, Tensor dshift) {
  x = dense(x);
  write_into(dx, x, [&](const Tensor& to) {
    run(with_strides_of(x, g), x, Grid(scale, zero_point, offset, qrange, eps), axis, rounded_mask, lsq_grad_scale,
        clip, to, dscale, dshift);
  });
}

void fake_quantize_backward_input_out(Tensor g, Tensor x, FASTQAT_GRID, bool rounded_mask, Tensor dx) {
  x = dense(x);
  write_into(dx, x, [&](const Tensor& to) {
    run_input(with_strides_of(x, g), x, Grid(scale, zero_point, offset, qrange, eps), axis, rounded_mask, to);
  });
}

}  // namespace fastqat::cpu
