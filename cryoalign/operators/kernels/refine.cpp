// Gauss-Newton refinement of poses on a CPU: the body of pose_refinement.refine_poses.
//
// A pass over the disc gathers 21 weighted moments of particle x, moved reference y and the three
// derivatives j of y (shift x, shift y, turn); score and step follow from them alone. The pixels of
// a particle are listed once, in blocks; those of a block are interpolated one by one, as four
// numbers (value and derivatives) side by side, and summed with as many pixels to a register as fit.
// The result for a particle does not depend on the other particles.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

#include "vectors.h"

namespace {

constexpr int BLOCK = 128;          // pixels: a multiple of every LANES
constexpr double MAX_TURN = 2.0;    // degrees, as pose_refinement.MAX_TURN
constexpr double MAX_MOVE = 0.7;    // pixels, as pose_refinement.MAX_MOVE
constexpr float ROUNDING = 1e-6f;   // as pose_refinement.ROUNDING
constexpr double DEGREE = M_PI / 180;
constexpr double TINY = std::numeric_limits<float>::min();
constexpr float OUTSIDE = 1e6f;     // the place of pixels that fill up a block: none counts

typedef float Four __attribute__((vector_size(16)));

inline Four four(const float *from) {
    Four to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

struct Pose {
    float angle, x, y;  // degrees, pixels
};

// F^mirror R(angle), as in pose.py.
struct Linear {
    double xx, xy, yx, yy;

    Linear(float angle, bool mirror) {
        const double radian = angle * DEGREE, sign = mirror ? -1 : 1;
        xx = sign * std::cos(radian), xy = -sign * std::sin(radian);
        yx = std::sin(radian), yy = std::cos(radian);
    }
};

// Score, and moments with the constant projected out.
struct Fit {
    double xx, xy, yy, jx[3], jy[3], jj[3][3];
    float score;

    // The Gauss-Newton step with the amplitude projected out too, as pose_refinement._step.
    Pose step(Pose now, bool mirror) const {
        const double power = std::max(yy, TINY), amplitude = std::max(xy / power, 1e-3);
        double m[3][3], right[3], largest = 0;
        for (int p = 0; p < 3; ++p) {
            right[p] = (jx[p] - jy[p] * xy / power) / amplitude;
            for (int q = 0; q < 3; ++q) m[p][q] = jj[p][q] - jy[p] * jy[q] / power;
            largest = std::max(largest, m[p][p]);
        }
        for (int p = 0; p < 3; ++p) m[p][p] += 1e-4 * m[p][p] + 1e-6 * largest + 1e-12;
        for (int p = 0; p < 2; ++p)  // elimination; positive definite, so no pivots
            for (int q = p + 1; q < 3; ++q) {
                const double factor = m[q][p] / m[p][p];
                for (int r = p; r < 3; ++r) m[q][r] -= factor * m[p][r];
                right[q] -= factor * right[p];
            }
        const double turn = right[2] / m[2][2];
        const double y = (right[1] - m[1][2] * turn) / m[1][1];
        const double x = (right[0] - m[0][1] * y - m[0][2] * turn) / m[0][0];
        // From the reference's frame to the particle's.
        const Linear to(now.angle, mirror);
        const auto limited = [](double value, double most) {
            return float(std::min(std::max(value, -most), most));
        };
        return {now.angle + limited((mirror ? -turn : turn) / DEGREE, MAX_TURN),
                now.x + limited(to.xx * x + to.yx * y, MAX_MOVE),
                now.y + limited(to.xy * x + to.yy * y, MAX_MOVE)};
    }
};

class Refinement {
  public:
    Refinement(int height, int width, int first_ring, int last_ring, int steps)
        : height_(height), width_(width), rim_(last_ring + 1), hole_(first_ring - 1),
          steps_(steps), reach_(last_ring + 1 + std::sqrt(0.5) + steps * MAX_MOVE),
          middle_(last_ring + 2), side_(2 * middle_ + 1), values_(size_t(side_) * side_),
          taps_(4 * values_.size()), x_((2 * size_t(reach_) + 1) * (2 * size_t(reach_) + 1) + BLOCK), y_(x_.size()), image_(x_.size()) {}

    // Takes a reference and its two derivatives (3, height, width), as far as the disc reaches.
    void reference(const float *template_) {
        const size_t plane = size_t(height_) * width_;
        std::fill(values_.begin(), values_.end(), 0.0f);
        std::fill(taps_.begin(), taps_.end(), 0.0f);
        const int left = std::max(-middle_, -(width_ / 2));
        const int right = std::min(middle_, width_ - 1 - width_ / 2);
        for (int y = -middle_; y <= middle_; ++y) {
            const int row = y + height_ / 2;
            if (row < 0 || row >= height_) continue;
            const float *from = template_ + size_t(row) * width_ + width_ / 2;
            float *value = &values_[size_t(y + middle_) * side_ + middle_];
            float *tap = &taps_[4 * (size_t(y + middle_) * side_ + middle_)];
            for (int x = left; x <= right; ++x) {
                const float along_x = from[plane + x], along_y = from[2 * plane + x];
                value[x] = tap[4 * x] = from[x];
                tap[4 * x + 1] = along_x;
                tap[4 * x + 2] = along_y;
                tap[4 * x + 3] = x * along_y - y * along_x;
            }
        }
    }

    // Refines the pose of an image (height, width) in place; returns the score.
    float operator()(const float *image, Pose &pose, bool mirror) {
        if (!std::isfinite(pose.angle + pose.x + pose.y)) return NAN;
        // Shifts are counted from the nearest whole one, about which the pixels are listed.
        const float whole_x = std::nearbyint(pose.x), whole_y = std::nearbyint(pose.y);
        Pose now = {pose.angle, pose.x - whole_x, pose.y - whole_y};
        list(image, whole_x, whole_y);
        Fit fit = steps_ ? evaluate<true>(now, mirror) : evaluate<false>(now, mirror);
        for (int step = 1; step <= steps_; ++step) {
            const Pose trial = fit.step(now, mirror);
            const Fit next =
                step < steps_ ? evaluate<true>(trial, mirror) : evaluate<false>(trial, mirror);
            // A step that lowers the score is not taken, and would be the same once more.
            if (!(next.score > fit.score - ROUNDING)) break;
            now = trial;
            fit = next;
        }
        float turned = std::fmod(now.angle + 180.0f, 360.0f);
        if (turned < 0) turned += 360.0f;
        pose = {turned - 180.0f, now.x + whole_x, now.y + whole_y};
        return fit.score;
    }

  private:
    // Lists the image's pixels that the disc can cover, about the whole shift.
    void list(const float *image, float whole_x, float whole_y) {
        // So far away that no pixel is left; it also keeps the numbers within the range of int.
        const float limit = 4 * (height_ + width_ + reach_);
        const auto within = [limit](float x) { return x > -limit && x < limit ? int(x) : int(limit); };
        const int left = width_ / 2 - within(whole_x), top = height_ / 2 - within(whole_y);
        size_t count = 0;
        for (int y = -int(reach_); y <= int(reach_); ++y) {
            if (y + top < 0 || y + top >= height_) continue;
            const int span = int(std::sqrt(reach_ * reach_ - y * y));
            const int first = std::max(-span, -left), last = std::min(span, width_ - 1 - left);
            const float *row = image + int64_t(y + top) * width_ + left;
            for (int x = first; x <= last; ++x, ++count) {
                x_[count] = x;
                y_[count] = y;
                image_[count] = row[x];
            }
        }
        for (; count % BLOCK; ++count) {
            x_[count] = y_[count] = OUTSIDE;
            image_[count] = 0;
        }
        count_ = count;
    }

    // The derivatives are used only if a step follows.
    template <bool derivatives> Fit evaluate(Pose pose, bool mirror) {
        const Linear linear(pose.angle, mirror);
        Vec w{}, x{}, y{}, xx{}, xy{}, yy{}, j[3]{}, jx[3]{}, jy[3]{}, jj[6]{};
        for (size_t block = 0; block < count_; block += BLOCK) {
            places(block, pose, linear);
            if (derivatives) interpolate();
            else interpolate_values();
            for (int i = 0; i < BLOCK; i += LANES) {
                const Vec weight = load(weight_ + i), particle = load(&image_[block + i]);
                const Vec wx = weight * particle, value = load(seen_[0] + i), wy = weight * value;
                w += weight;
                x += wx;
                y += wy;
                xx += wx * particle;
                xy += wx * value;
                yy += wy * value;
                if (!derivatives) continue;
                const Vec d[3] = {load(seen_[1] + i), load(seen_[2] + i), load(seen_[3] + i)};
                for (int p = 0, pair = 0; p < 3; ++p) {
                    const Vec wd = weight * d[p];
                    j[p] += wd;
                    jx[p] += wx * d[p];
                    jy[p] += wy * d[p];
                    for (int q = p; q < 3; ++q, ++pair) jj[pair] += wd * d[q];
                }
            }
        }
        // The constant is projected out in double precision.
        const double all = sum(w), share = 1 / std::max(all, TINY), sx = sum(x), sy = sum(y);
        Fit fit;
        fit.xx = sum(xx) - share * sx * sx;
        fit.xy = sum(xy) - share * sx * sy;
        fit.yy = sum(yy) - share * sy * sy;
        fit.score = float(fit.xy / std::sqrt(std::max(fit.xx * fit.yy, TINY)));
        if (!derivatives) return fit;
        for (int p = 0, pair = 0; p < 3; ++p) {
            const double sj = sum(j[p]);
            fit.jx[p] = sum(jx[p]) - share * sj * sx;
            fit.jy[p] = sum(jy[p]) - share * sj * sy;
            for (int q = p; q < 3; ++q, ++pair)
                fit.jj[p][q] = fit.jj[q][p] = sum(jj[pair]) - share * sj * sum(j[q]);
        }
        return fit;
    }

    // Weights of a block's pixels, and where they lie on the reference.
    void places(size_t block, Pose pose, const Linear &linear) {
        const float a = linear.xx, b = linear.xy, c = linear.yx, d = linear.yy;
        const float most = middle_ - 0.5f, hole = hole_ > 0 ? hole_ : -2.0f;
        const float *px = &x_[block], *py = &y_[block];
        for (int i = 0; i < BLOCK; ++i) {
            const float x = px[i] + pose.x, y = py[i] + pose.y;
            const float radius = std::sqrt(x * x + y * y);
            const float inner = std::min(std::max(radius - hole, 0.0f), 1.0f);
            weight_[i] = std::min(std::max(rim_ - radius, 0.0f), 1.0f) * inner;
            // A place within the margin, whatever the numbers; NaN becomes 0.
            const float to_x = a * x + b * y, to_y = c * x + d * y;
            const float at_x = std::min(std::max(-most, to_x), most) + middle_;
            const float at_y = std::min(std::max(-most, to_y), most) + middle_;
            const int column = int(at_x), row = int(at_y);
            right_[i] = at_x - column;
            down_[i] = at_y - row;
            tap_[i] = row * side_ + column;
        }
    }

    void interpolate() {
        alignas(64) float found[4 * BLOCK];
        for (int i = 0; i < BLOCK; ++i) {
            const float *tap = &taps_[4 * size_t(tap_[i])], *below = tap + 4 * size_t(side_);
            const Four one = four(tap), two = four(below);
            const Four upper = one + right_[i] * (four(tap + 4) - one);
            const Four lower = two + right_[i] * (four(below + 4) - two);
            const Four value = upper + down_[i] * (lower - upper);
            std::memcpy(found + 4 * i, &value, sizeof value);
        }
        for (int i = 0; i < BLOCK; ++i)
            for (int p = 0; p < 4; ++p) seen_[p][i] = found[4 * i + p];
    }

    void interpolate_values() {
        for (int i = 0; i < BLOCK; ++i) {
            const float *tap = &values_[tap_[i]], *below = tap + side_;
            const float upper = tap[0] + right_[i] * (tap[1] - tap[0]);
            const float lower = below[0] + right_[i] * (below[1] - below[0]);
            seen_[0][i] = upper + down_[i] * (lower - upper);
        }
    }

    int height_, width_;
    float rim_, hole_;
    int steps_;
    double reach_;
    int middle_, side_;
    std::vector<float> values_, taps_;     // (side, side), (side, side, 4)
    std::vector<float> x_, y_, image_;     // of the pixels of a particle
    size_t count_ = 0;
    alignas(64) float weight_[BLOCK], right_[BLOCK], down_[BLOCK], seen_[4][BLOCK];
    alignas(64) int32_t tap_[BLOCK];
};

}  // namespace

extern "C" {

// Refines the poses of the n images whose rows `order` gives: images (., height, width), templates
// (k, 3, height, width), label (.,), angle (.,), shift (., 2), mirror (.,) and score (.,). Angles and
// shifts are changed in place. Images of one label should follow each other. 0, or 1 where memory
// runs out.
int cryoalign_refine_poses(
    const int64_t *order, int64_t n, const float *images, int height, int width,
    const float *templates, const int64_t *label, int first_ring, int last_ring, int steps,
    float *angle, float *shift, const uint8_t *mirror, float *score) try {
    Refinement refine(height, width, first_ring, last_ring, steps);
    const size_t pixels = size_t(height) * width;
    int64_t loaded = -1;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t row = order[i];
        if (label[row] != loaded) refine.reference(templates + 3 * pixels * label[row]);
        loaded = label[row];
        Pose pose = {angle[row], shift[2 * row], shift[2 * row + 1]};
        score[row] = refine(images + pixels * row, pose, mirror[row]);
        angle[row] = pose.angle, shift[2 * row] = pose.x, shift[2 * row + 1] = pose.y;
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
