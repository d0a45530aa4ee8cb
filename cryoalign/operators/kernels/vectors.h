// Vectors of floats, as wide as the registers of the processor that is compiled for.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

inline Vec all(float x) { return Vec{} + x; }

inline Vec load(const float *from) {
    Vec to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

inline double sum(Vec x) {
    double total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
}
