// The search on a CPU: from images or ring spectra to the best score of every particle, reference
// and hand, without the correlation table or the spectra of more than one trial shift in memory.
//
// A vector register holds one number of each particle of a block. Samples, transforms, products and
// maxima are the same instructions for all of them, so that no lane is idle and the result for a
// particle does not depend on the other particles. The formulas are those of `polar.ring_spectra`
// and `correlation.correlation_table`. It is C++17 with vector types (GCC, Clang), called by ctypes.
//
// Letters as in Python: n particles, k references, s shifts, r rings, a angles, m frequencies.

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

// References that are multiplied at a time: each needs four sums, and all must fit the registers.
#ifndef TOGETHER
#if defined(__AVX512F__) || defined(__aarch64__)
#define TOGETHER 4
#else
#define TOGETHER 2
#endif
#endif
constexpr int PAD = 2;  // zeros about an image: a sample beyond it is zero

struct Complex {
    Vec re, im;
};

// x from 0 to `most`; NaN becomes 0, so that a sample's place is in memory whatever the numbers.
inline float within(float x, float most) { return std::min(std::max(0.0f, x), most); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline bool any(Ints mask) {
    int32_t found = 0;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane];
    return found != 0;
}

// Inverse transforms, sum_m z[m] exp(+2 pi i m t / n), of lengths 2^i 3^j 5^l (Stockham).
class Transform {
  public:
    explicit Transform(int n) : n_(n) {
        for (int left = n, radix; left > 1; left /= radix) {
            radix = left % 4 == 0 ? 4 : left % 2 == 0 ? 2 : left % 3 == 0 ? 3 : 5;
            stages_.push_back({radix, left, {}, {}});
            for (int i = 0; i < radix * radix; ++i) {
                const double phase = 2 * M_PI * (i / radix * (i % radix) % radix) / radix;
                stages_.back().roots.push_back(std::complex<float>(std::polar(1.0, phase)));
            }
            for (int q = 0; q < left / radix; ++q)
                for (int j = 0; j < radix; ++j) {
                    auto w = std::polar(1.0, 2 * M_PI * q * j / left);
                    stages_.back().twiddles.push_back(std::complex<float>(w));
                }
        }
    }

    static bool serves(int n) {
        for (int prime : {2, 3, 5})
            while (n % prime == 0) n /= prime;
        return n == 1;
    }

    // Transforms x with room for as much; returns which of the two holds the result.
    Complex *operator()(Complex *x, Complex *room) const {
        int stride = 1;
        for (const Stage &stage : stages_) {
            for (int q = 0; q < stage.length / stage.radix; ++q)
                butterflies(stage, q, stride, x, room);
            std::swap(x, room);
            stride *= stage.radix;
        }
        return x;
    }

  private:
    struct Stage {
        int radix, length;
        std::vector<std::complex<float>> twiddles;  // [q][j] exp(2 pi i q j / length)
        std::vector<std::complex<float>> roots;     // [j][i] exp(2 pi i i j / radix)
    };

    static inline Complex turned(Vec re, Vec im, std::complex<float> w) {
        return {re * w.real() - im * w.imag(), re * w.imag() + im * w.real()};
    }

    static void butterflies(const Stage &stage, int q, int stride, const Complex *x, Complex *y) {
        const int step = stride * (stage.length / stage.radix);
        const std::complex<float> *w = &stage.twiddles[q * stage.radix];
        x += stride * q;
        y += stride * q * stage.radix;
        if (stage.radix == 4)
            for (int t = 0; t < stride; ++t, ++x, ++y) four(x, step, y, stride, w);
        else if (stage.radix == 2)
            for (int t = 0; t < stride; ++t, ++x, ++y) {
                const Complex b = x[step];
                y[stride] = turned(x->re - b.re, x->im - b.im, w[1]);
                y[0] = {x->re + b.re, x->im + b.im};
            }
        else
            for (int t = 0; t < stride; ++t, ++x, ++y) odd(stage, x, step, y, stride, w);
    }

    static inline void four(
        const Complex *x, int in, Complex *y, int out, const std::complex<float> *w) {
        const Complex a = x[0], b = x[in], c = x[2 * in], d = x[3 * in];
        const Vec sum_re = a.re + c.re, sum_im = a.im + c.im;
        const Vec gap_re = a.re - c.re, gap_im = a.im - c.im;
        const Vec other_re = b.re + d.re, other_im = b.im + d.im;
        const Vec turn_re = d.im - b.im, turn_im = b.re - d.re;  // i (b - d)
        y[0] = {sum_re + other_re, sum_im + other_im};
        y[out] = turned(gap_re + turn_re, gap_im + turn_im, w[1]);
        y[2 * out] = turned(sum_re - other_re, sum_im - other_im, w[2]);
        y[3 * out] = turned(gap_re - turn_re, gap_im - turn_im, w[3]);
    }

    static void odd(
        const Stage &stage, const Complex *x, int in, Complex *y, int out, const std::complex<float> *w) {
        const int radix = stage.radix;
        const std::complex<float> *root = stage.roots.data();
        for (int j = 0; j < radix; ++j, root += radix) {
            Complex sum = x[0];
            for (int i = 1; i < radix; ++i) {
                const Complex term = turned(x[i * in].re, x[i * in].im, root[i]);
                sum = {sum.re + term.re, sum.im + term.im};
            }
            y[j * out] = turned(sum.re, sum.im, w[j]);
        }
    }

    int n_;
    std::vector<Stage> stages_;
};

// References without their zeros: of each frequency, the rings where any reference has power.
struct References {
    int k, rings, m;
    std::vector<int> low, high;   // (m,) rings low ... high - 1
    std::vector<size_t> at;       // (m,) where a frequency's rings begin
    size_t size = 0;              // rings of all frequencies
    std::vector<float> values;    // (blocks of k, size, TOGETHER, 2)

    bool has(int r, int f) const { return r >= low[f] && r < high[f]; }
    size_t place(int r, int f) const { return at[f] + r - low[f]; }

    References(const float *spectra, int k, int rings, int m) : k(k), rings(rings), m(m) {
        low.assign(m, rings);
        high.assign(m, 0);
        at.assign(m, 0);
        for (int i = 0; i < k; ++i)
            for (int r = 0; r < rings; ++r)
                for (int f = 0; f < m; ++f) {
                    const float *y = spectra + 2 * ((size_t(i) * rings + r) * m + f);
                    if (y[0] == 0 && y[1] == 0) continue;
                    low[f] = std::min(low[f], r);
                    high[f] = std::max(high[f], r + 1);
                }
        for (int f = 0; f < m; ++f) {
            at[f] = size;
            size += std::max(0, high[f] - low[f]);
        }
        const int blocks = (k + TOGETHER - 1) / TOGETHER;
        values.assign(blocks * size * TOGETHER * 2, 0.0f);
        for (int i = 0; i < k; ++i)
            for (int f = 0; f < m; ++f)
                for (int r = low[f]; r < high[f]; ++r) {
                    const float *y = spectra + 2 * ((size_t(i) * rings + r) * m + f);
                    const size_t row = (i / TOGETHER) * size + place(r, f);
                    std::copy(y, y + 2, &values[(row * TOGETHER + i % TOGETHER) * 2]);
                }
    }
};

// The best of a particle, reference and hand so far.
struct Best {
    Vec score = all(-std::numeric_limits<float>::infinity());
    Ints shift{}, angle{};
};

// Correlates the particles of a block at one shift after another with all references.
class Search {
  public:
    Search(const References &references, bool mirror)
        : references_(references), hands_(1 + mirror), a_(2 * (references.m - 1)), inverse_(a_),
          spectra(references.size), tables_((TOGETHER + 1) * size_t(a_)),
          best_(size_t(references.k) * hands_) {}

    const Transform &transform() const { return inverse_; }
    Complex *room() { return tables_.data(); }  // 2 a of it between shifts

    void begin() { std::fill(best_.begin(), best_.end(), Best()); }

    // Compares `spectra` with all references; scale (one per lane) turns the result into scores.
    void shift(int index, Vec scale) {
        for (int first = 0; first < references_.k; first += TOGETHER) {
            products(first / TOGETHER);
            Complex *room = &tables_[TOGETHER * size_t(a_)];
            for (int j = 0; j < std::min(TOGETHER, references_.k - first); ++j) {
                const Complex *table = inverse_(&tables_[j * size_t(a_)], room);
                Best *best = &best_[size_t(first + j) * hands_];
                keep<0>(table, index, scale, best[0]);
                if (hands_ == 2) keep<1>(table, index, scale, best[1]);
                if (table == room) room = &tables_[j * size_t(a_)];
            }
        }
    }

    // Writes scores and places (n, k, hands) of the block's first `count` particles. The score is
    // NaN where the input has NaN.
    void end(int count, Vec bad, float *score, int64_t *place) const {
        const size_t row = best_.size();
        for (int lane = 0; lane < count; ++lane)
            for (size_t i = 0; i < row; ++i) {
                const Best &best = best_[i];
                const bool none = bad[lane] != bad[lane] || !(best.score[lane] > -INFINITY);
                score[lane * row + i] = none ? NAN : best.score[lane];
                place[lane * row + i] =
                    (int64_t(best.shift[lane]) * hands_ + i % hands_) * a_ + best.angle[lane];
            }
    }

    const References &references() const { return references_; }

  private:
    // P + i Q of a block of references, with P the plain hand's and Q the mirrored one's product:
    // one complex transform of it makes the tables of both.
    void products(int block) {
        const float *values =
            references_.values.data() + block * references_.size * TOGETHER * 2;
        for (int f = 0; f < references_.m; ++f) {
            Vec rr[TOGETHER], ii[TOGETHER], ri[TOGETHER], ir[TOGETHER];
            for (int j = 0; j < TOGETHER; ++j) rr[j] = ii[j] = ri[j] = ir[j] = Vec{};
            const int count = std::max(0, references_.high[f] - references_.low[f]);
            const Complex *x = spectra.data() + references_.at[f];
            const float *y = values + references_.at[f] * TOGETHER * 2;
            for (int r = 0; r < count; ++r, ++x, y += 2 * TOGETHER)
                for (int j = 0; j < TOGETHER; ++j) {
                    rr[j] += x->re * y[2 * j];
                    ii[j] += x->im * y[2 * j + 1];
                    ri[j] += x->re * y[2 * j + 1];
                    ir[j] += x->im * y[2 * j];
                }
            for (int j = 0; j < TOGETHER; ++j)
                place(&tables_[j * size_t(a_)], f, rr[j], ii[j], ri[j], ir[j]);
        }
    }

    void place(Complex *z, int f, Vec rr, Vec ii, Vec ri, Vec ir) const {
        const Vec sign = all(hands_ == 1 ? 0 : f % 2 ? -1 : 1);
        const Vec plain_re = rr + ii, mirror_re = sign * (rr - ii);
        if (f == 0 || f == references_.m - 1) {  // real for real tables
            z[f] = {plain_re, mirror_re};
            return;
        }
        const Vec plain_im = ri - ir, mirror_im = -sign * (ri + ir);
        z[f] = {plain_re - mirror_im, plain_im + mirror_re};
        z[a_ - f] = {plain_re + mirror_im, mirror_re - plain_im};
    }

    template <int hand>
    void keep(const Complex *table, int shift, Vec scale, Best &best) const {
        auto entry = [table](int t) { return hand ? table[t].im : table[t].re; };
        Vec most[4] = {entry(0), entry(1), entry(0), entry(1)};
        int t = 2;
        for (; t + 4 <= a_; t += 4)
            for (int j = 0; j < 4; ++j) most[j] = larger(entry(t + j), most[j]);
        for (; t < a_; ++t) most[0] = larger(entry(t), most[0]);
        const Vec top = larger(larger(most[0], most[1]), larger(most[2], most[3]));
        const Vec score = top * scale;
        const Ints better = score > best.score;
        if (!any(better)) return;
        Ints angle{};
        for (int i = a_ - 1; i >= 0; --i) angle = entry(i) * scale == score ? Ints{} + i : angle;
        best.score = better ? score : best.score;
        best.shift = better ? Ints{} + shift : best.shift;
        best.angle = better ? angle : best.angle;
    }

    const References &references_;
    int hands_, a_;
    Transform inverse_;

  public:
    std::vector<Complex> spectra;  // of the block at one shift, as `References` are laid out

  private:
    std::vector<Complex> tables_;
    std::vector<Best> best_;
};

// Ring spectra of the images of a block at one shift.
class Features {
  public:
    Features(const float *points, const float *weights, int rings, int a, int height, int width)
        : points_(points), weights_(weights), rings_(rings), a_(a), height_(height), width_(width),
          pixels_(size_t(height + 2 * PAD) * (width + 2 * PAD)), where_(a), right_(a), down_(a),
          means_(rings) {}

    void load(const float *images, int count) {
        const int row = width_ + 2 * PAD;
        for (int y = 0; y < height_; ++y)
            for (int x = 0; x < width_; ++x) {
                Vec value{};
                for (int lane = 0; lane < count; ++lane)
                    value[lane] = images[(size_t(lane) * height_ + y) * width_ + x];
                pixels_[size_t(y + PAD) * row + x + PAD] = value;
            }
    }

    // Writes the search's spectra, all but their common scale, which it returns.
    Vec shift(float sx, float sy, Search &search) {
        Complex *z = search.room(), *room = z + a_;
        Vec variance{}, mean{};
        for (int r = 0; r < rings_; r += 2) {
            const bool two = r + 1 < rings_;
            // Two rings are one complex signal; re and im swapped make the transform forward.
            ring<1>(r, sx, sy, z);
            if (two) ring<0>(r + 1, sx, sy, z);
            else for (int t = 0; t < a_; ++t) z[t].re = Vec{};
            const Complex *both = search.transform()(z, room);
            variance += unpack(both, r, two, search);
        }
        for (int r = 0; r < rings_; ++r) mean += weights_[r] * means_[r];
        for (int r = 0; r < rings_; ++r) {
            const Vec gap = means_[r] - mean;
            variance += weights_[r] * gap * gap;
        }
        const References &refs = search.references();
        for (int r = 0; r < rings_; ++r)
            if (refs.has(r, 0))
                search.spectra[refs.place(r, 0)].re -= a_ * std::sqrt(weights_[r] / a_) * mean;
        const float limit = 16 * std::numeric_limits<float>::epsilon();
        Vec scale;
        for (int lane = 0; lane < LANES; ++lane) {  // a smaller variance is rounding
            const float v = variance[lane], power = v + mean[lane] * mean[lane];
            scale[lane] = v <= limit * power ? 0.0f : 1.0f / (std::sqrt(v) * a_);
        }
        return scale;
    }

  private:
    template <int part>
    void ring(int r, float sx, float sy, Complex *z) {
        const int row = width_ + 2 * PAD;
        const float *point = points_ + size_t(r) * a_ * 2;
        const float left = width_ / 2 + PAD - sx, top = height_ / 2 + PAD - sy;
        for (int t = 0; t < a_; ++t) {
            const float x = within(point[2 * t] + left, float(width_ + PAD));
            const float y = within(point[2 * t + 1] + top, float(height_ + PAD));
            const int column = int(x), line = int(y);
            where_[t] = line * row + column;
            right_[t] = x - column;
            down_[t] = y - line;
        }
        for (int t = 0; t < a_; ++t) {
            const Vec *p = &pixels_[where_[t]];
            const Vec upper = p[0] + right_[t] * (p[1] - p[0]);
            const Vec lower = p[row] + right_[t] * (p[row + 1] - p[row]);
            (part ? z[t].im : z[t].re) = upper + down_[t] * (lower - upper);
        }
    }

    // Takes the transform of rings r (and r + 1) apart; returns their share of the variance.
    Vec unpack(const Complex *both, int r, bool two, Search &search) {
        const References &refs = search.references();
        const int half = a_ / 2;
        const float one = std::sqrt(weights_[r] / a_);
        const float other = two ? std::sqrt(weights_[r + 1] / a_) : 0.0f;
        Vec power_one{}, power_other{};
        for (int f = 0; f <= half; ++f) {
            const Complex u = both[f], v = both[f ? a_ - f : 0];
            // With z = y + i x and W its inverse transform, X + i Y is W.im + i W.re.
            const Complex x = {0.5f * (u.im + v.im), 0.5f * (u.re - v.re)};
            const Complex y = {0.5f * (u.re + v.re), 0.5f * (v.im - u.im)};
            if (f == 0) {
                means_[r] = x.re / float(a_);
                if (two) means_[r + 1] = y.re / float(a_);
            } else {
                const float twice = f == half ? 1.0f : 2.0f;
                power_one += twice * (x.re * x.re + x.im * x.im);
                power_other += twice * (y.re * y.re + y.im * y.im);
            }
            if (refs.has(r, f)) search.spectra[refs.place(r, f)] = {one * x.re, one * x.im};
            if (two && refs.has(r + 1, f))
                search.spectra[refs.place(r + 1, f)] = {other * y.re, other * y.im};
        }
        const float area = 1.0f / (float(a_) * a_);
        Vec share = weights_[r] * area * power_one;
        if (two) share += weights_[r + 1] * area * power_other;
        return share;
    }

    const float *points_, *weights_;
    int rings_, a_, height_, width_;
    std::vector<Vec> pixels_;
    std::vector<int32_t> where_;
    std::vector<float> right_, down_;
    std::vector<Vec> means_;
};

}  // namespace

extern "C" {

// Whether rings of so many angles can be transformed.
int cryoalign_serves(int angles) { return Transform::serves(angles); }

// images (n, height, width); points (rings, a, 2) xy about the centre; weights (rings,);
// shifts (s, 2); references (k, rings, m) complex; score and place (n, k, hands).
// 0, or 1 where memory runs out.
int cryoalign_image_peaks(
    const float *images, int64_t n, int height, int width, const float *points,
    const float *weights, const float *shifts, int s, const float *references, int k, int rings,
    int m, int mirror, float *score, int64_t *place) try {
    const References refs(references, k, rings, m);
    Search search(refs, mirror);
    Features features(points, weights, rings, 2 * (m - 1), height, width);
    for (int64_t start = 0; start < n; start += LANES) {
        const int count = int(std::min<int64_t>(LANES, n - start));
        features.load(images + start * height * width, count);
        search.begin();
        Vec bad{};
        for (int i = 0; i < s; ++i) {
            const Vec scale = features.shift(shifts[2 * i], shifts[2 * i + 1], search);
            bad += scale;
            search.shift(i, scale);
        }
        const int64_t at = start * k * (1 + mirror);
        search.end(count, bad, score + at, place + at);
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// The same of ring spectra (n, s, rings, m), complex.
int cryoalign_spectra_peaks(
    const float *spectra, int64_t n, int s, const float *references, int k, int rings, int m,
    int mirror, float *score, int64_t *place) try {
    const References refs(references, k, rings, m);
    Search search(refs, mirror);
    const Vec scale = all(1.0f / (2 * (m - 1)));
    for (int64_t start = 0; start < n; start += LANES) {
        const int count = int(std::min<int64_t>(LANES, n - start));
        search.begin();
        Vec bad{};
        for (int i = 0; i < s; ++i) {
            for (int f = 0; f < m; ++f)
                for (int r = refs.low[f]; r < refs.high[f]; ++r) {
                    Complex x{};
                    for (int lane = 0; lane < count; ++lane) {
                        const float *from =
                            spectra + 2 * ((((start + lane) * s + i) * rings + r) * m + f);
                        x.re[lane] = from[0];
                        x.im[lane] = from[1];
                    }
                    bad += 0.0f * x.re + 0.0f * x.im;  // NaN where either is not finite
                    search.spectra[refs.place(r, f)] = x;
                }
            search.shift(i, scale);
        }
        const int64_t at = start * k * (1 + mirror);
        search.end(count, bad, score + at, place + at);
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
