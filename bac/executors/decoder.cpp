// One action chunk of a cached transformer decoder, from first noise to last step, with nothing decided at run time.
//
// The sizes are compile-time constants and the schedule comes as a list of integers (bac/executors/compiled.py writes
// it), so one library serves every schedule of a network. All matrix products go through one kernel, `tile`: a few rows
// of activations, a panel of weights as wide as the vector registers, all sums in registers. Panels are packed so that
// each product reads its weights once, front to back.
//
// Rows are tokens, batch after batch: [B * T, channels], row-major, padded to whole tiles. Padding rows are computed
// and never read.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kWidth = BAC_WIDTH;                          // d
constexpr int kHeads = BAC_HEADS;
constexpr int kLayers = BAC_LAYERS;
constexpr int kTokens = BAC_TOKENS;                        // T, action tokens
constexpr int kMemory = BAC_MEMORY;                        // condition tokens: the time token, then observations
constexpr int kActions = BAC_ACTIONS;                      // Da
constexpr int kHidden = 4 * kWidth;
constexpr int kHiddenStride = kHidden + 16;                // rows a page apart would crowd the same lines of the cache
constexpr int kHeadWidth = kWidth / kHeads;
constexpr float kEpsilon = 1e-5f;                          // of the layer norms, torch's default

// ---- vectors -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 32;
#endif

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef float LooseVector __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint32_t LooseWords __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<LooseVector*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

// How weights are stored. A vector of stored weights unfolds into kDeep<Weight> vectors, of consecutive inputs.
#if defined(BAC_BF16)
using Weight = uint32_t;                                   // two bfloat16, the first one low
#else
using Weight = float;
#endif
template <class Stored> constexpr int kDeep = 1;
template <> constexpr int kDeep<uint32_t> = 2;

inline Vector unfold(const float* from, int) { return load(from); }
inline Vector unfold(const uint32_t* from, int part) {
    const Words both = *reinterpret_cast<const LooseWords*>(from);
    return reinterpret_cast<Vector>(part == 0 ? both << 16 : both & 0xffff0000u);
}

inline float sum(Vector value) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
    return total;
}

inline float largest(Vector value) {
    float best = value[0];
    for (int lane = 1; lane < kLanes; ++lane) best = std::max(best, value[lane]);
    return best;
}

inline Vector absolute(Vector value) {
    return reinterpret_cast<Vector>(reinterpret_cast<Words>(value) & 0x7fffffffu);
}

// e^x for x <= 0, relative error below 2e-7; 0 for x <= -87, minus infinity included.
inline Vector exponential(Vector x) {
    const Integers far = x < -87.0f;
    x = far ? broadcast(-87.0f) : x;
    const Vector magic = broadcast(12582912.0f);           // 1.5 * 2^23: adding it rounds to a whole number
    const Vector shifted = x * 1.44269504088896341f + magic;
    const Vector whole = shifted - magic;
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector power = broadcast(1.9875691500e-4f);            // Cephes expf
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const Integers exponent = (reinterpret_cast<Integers>(shifted) << 23) + 0x3f800000;
    const Vector result = power * reinterpret_cast<Vector>(exponent);
    return far ? Vector{} : result;
}

// x * Phi(x) with erf by Abramowitz and Stegun 7.1.26, absolute error of erf below 2e-7.
inline Vector gelu(Vector x) {
    const Vector z = absolute(x) * 0.70710678118654752f;
    const Vector t = 1.0f / (1.0f + 0.3275911f * z);
    const Vector series = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const Vector tail = series * exponential(-z * z);      // 1 - erf(z)
    return 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// ---- the kernel ----------------------------------------------------------------------------------------------------

// A tile is kRows rows by kVectors vectors of output channels. Two vectors, so that a loaded activation is used twice
// (with one, loads and not products set the pace); as many rows as registers hold, none of them wasted if possible.
constexpr int kVectors = kWidth % (2 * kLanes) == 0 ? 2 : 1;
constexpr int kPanel = kVectors * kLanes;
static_assert(kWidth % kPanel == 0, "the width must be a multiple of the vector");

constexpr int tile_rows() {
    const int most = (kRegisters - kVectors - 1) / kVectors;
    int best = 1, padded = kTokens + most;
    for (int rows = 1; rows <= most && rows <= kTokens; ++rows) {
        const int total = (kTokens + rows - 1) / rows * rows;
        if (total < padded || (total == padded && rows > best)) best = rows, padded = total;
    }
    return best;
}
constexpr int kRows = tile_rows();

inline int padded_rows(int rows) { return (rows + kRows - 1) / kRows * kRows; }

// sums[row] += x[row, 0..depth) * panel[0..depth, lanes], while what lies `ahead` of the panel is fetched from memory.
template <int Vectors, class Stored>
inline __attribute__((always_inline)) void tile(
    const float* x, int stride, const Stored* panel, int panel_stride, int depth, const Stored* ahead,
    Vector (&sums)[kRows][Vectors]) {
    for (int k = 0; k < depth; k += kDeep<Stored>, panel += panel_stride) {
        if (ahead) {
            for (int v = 0; v < Vectors; ++v) __builtin_prefetch(ahead + v * kLanes);
            ahead += panel_stride;
        }
        for (int part = 0; part < kDeep<Stored>; ++part) {
            Vector weights[Vectors];
            for (int v = 0; v < Vectors; ++v) weights[v] = unfold(panel + v * kLanes, part);
            for (int row = 0; row < kRows; ++row)
                for (int v = 0; v < Vectors; ++v) sums[row][v] += weights[v] * x[row * stride + k + part];
        }
    }
}

// For every row and output channel: finish(row, channel, x[row] . weights[channel] + bias[channel]).
template <int Inputs, int Outputs, class Finish>
inline void linear(int rows, const float* x, int stride, const Weight* weights, const float* bias, Finish finish) {
    constexpr int kPanelSize = kPanel * Inputs / kDeep<Weight>;
    for (int channel = 0; channel < Outputs; channel += kPanel, weights += kPanelSize) {
        const Weight* ahead = weights + kPanelSize;        // the next panel, or the matrix that follows in memory
        for (int first = 0; first < rows; first += kRows, ahead = nullptr) {
            Vector sums[kRows][kVectors];
            for (int row = 0; row < kRows; ++row)
                for (int v = 0; v < kVectors; ++v) sums[row][v] = load(bias + channel + v * kLanes);
            tile<kVectors>(x + int64_t(first) * stride, stride, weights, kPanel, Inputs, ahead, sums);
            for (int row = 0; row < kRows; ++row)
                for (int v = 0; v < kVectors; ++v) finish(first + row, channel + v * kLanes, sums[row][v]);
        }
    }
}

// ---- weights -------------------------------------------------------------------------------------------------------

// The order of a layer's packed matrices and of its vectors; compiled.py packs in the same order.
struct Layer {
    const float *norm1_scale, *norm1_shift, *self_in_bias, *self_out_bias;
    const float *norm2_scale, *norm2_shift, *cross_in_bias, *cross_out_bias;
    const float *norm3_scale, *norm3_shift, *hidden_bias, *out_bias;
    const Weight *self_in, *self_out, *cross_in, *cross_out, *hidden, *out;

    Layer(const Weight* matrices, const float* vectors) {
        auto vector = [&](int size) { const float* at = vectors; vectors += size; return at; };
        auto matrix = [&](int size) { const Weight* at = matrices; matrices += size / kDeep<Weight>; return at; };
        norm1_scale = vector(kWidth), norm1_shift = vector(kWidth);
        self_in_bias = vector(3 * kWidth), self_out_bias = vector(kWidth);
        norm2_scale = vector(kWidth), norm2_shift = vector(kWidth);
        cross_in_bias = vector(kWidth), cross_out_bias = vector(kWidth);
        norm3_scale = vector(kWidth), norm3_shift = vector(kWidth);
        hidden_bias = vector(kHidden), out_bias = vector(kWidth);
        self_in = matrix(3 * kWidth * kWidth), self_out = matrix(kWidth * kWidth);
        cross_in = matrix(kWidth * kWidth), cross_out = matrix(kWidth * kWidth);
        hidden = matrix(kHidden * kWidth), out = matrix(kWidth * kHidden);
    }
};
constexpr int64_t kLayerMatrices = (6 * kWidth * kWidth + 2 * kHidden * kWidth) / kDeep<Weight>;
constexpr int64_t kLayerVectors = 17 * kWidth;

struct Ends {
    const float *embed, *positions, *norm_scale, *norm_shift, *head, *head_bias;

    explicit Ends(const float* vectors) {
        embed = vectors;                                   // [Da, d]
        positions = embed + kActions * kWidth;             // [T, d], the embedding's bias added
        norm_scale = positions + kTokens * kWidth;
        norm_shift = norm_scale + kWidth;
        head = norm_shift + kWidth;                        // [Da, d]
        head_bias = head + kActions * kWidth;
    }
};

// ---- parts of a block ----------------------------------------------------------------------------------------------

void layer_norm(int rows, const float* x, const float* scale, const float* shift, float* out) {
    for (int row = 0; row < rows; ++row, x += kWidth, out += kWidth) {
        Vector total{}, squares{};
        for (int c = 0; c < kWidth; c += kLanes) total += load(x + c);
        const float mean = sum(total) / kWidth;
        for (int c = 0; c < kWidth; c += kLanes) {
            const Vector centred = load(x + c) - mean;
            squares += centred * centred;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / kWidth + kEpsilon);
        for (int c = 0; c < kWidth; c += kLanes)
            store(out + c, (load(x + c) - mean) * inverse * load(scale + c) + load(shift + c));
    }
}

// Attention of one batch row: T queries against `Keys` keys, query t seeing the first visible[t] of them.
template <int Keys>
void attend(const float* queries, int query_stride, const float* keys, const float* values, int stride,
            const int32_t* visible, float* out) {
    constexpr int kKeyVectors = (Keys + kLanes - 1) / kLanes;
    constexpr int kKeyLanes = kKeyVectors * kLanes;
    constexpr int kValueVectors = kHeadWidth / kLanes;
    const float scale = 1.0f / std::sqrt(float(kHeadWidth));
    alignas(64) float turned[kHeadWidth * kKeyLanes] = {};
    alignas(64) float probabilities[kRows * kKeyLanes];
    Integers lane_number;
    for (int lane = 0; lane < kLanes; ++lane) lane_number[lane] = lane;

    for (int head = 0; head < kHeads; ++head) {
        const int offset = head * kHeadWidth;
        for (int key = 0; key < Keys; ++key)
            for (int c = 0; c < kHeadWidth; ++c) turned[c * kKeyLanes + key] = keys[key * stride + offset + c];
        for (int first = 0; first < kTokens; first += kRows) {
            const int rows = std::min(kRows, kTokens - first);
            for (int group = 0; group < kKeyVectors; ++group) {
                Vector sums[kRows][1] = {};
                tile<1>(queries + first * query_stride + offset, query_stride, turned + group * kLanes, kKeyLanes,
                        kHeadWidth, static_cast<const float*>(nullptr), sums);
                for (int row = 0; row < kRows; ++row)
                    store(probabilities + row * kKeyLanes + group * kLanes, sums[row][0] * scale);
            }
            for (int row = 0; row < rows; ++row) {
                float* p = probabilities + row * kKeyLanes;
                const int seen = visible[first + row];
                Vector top = broadcast(-INFINITY);
                for (int group = 0; group < kKeyVectors; ++group) {
                    const Vector scores = lane_number + group * kLanes < seen ? load(p + group * kLanes) : broadcast(-INFINITY);
                    store(p + group * kLanes, scores);
                    top = top > scores ? top : scores;
                }
                const float most = largest(top);
                Vector total{};
                for (int group = 0; group < kKeyVectors; ++group) {
                    const Vector weight = exponential(load(p + group * kLanes) - most);
                    store(p + group * kLanes, weight);
                    total += weight;
                }
                const float inverse = 1.0f / sum(total);
                for (int group = 0; group < kKeyVectors; ++group)
                    store(p + group * kLanes, load(p + group * kLanes) * inverse);
            }
            for (int v = 0; v < kValueVectors; ++v) {
                Vector sums[kRows][1] = {};
                tile<1>(probabilities, kKeyLanes, values + offset + v * kLanes, stride, Keys, static_cast<const float*>(nullptr), sums);
                for (int row = 0; row < rows; ++row)
                    store(out + (first + row) * kWidth + offset + v * kLanes, sums[row][0]);
            }
        }
    }
}
static_assert(kHeadWidth % kLanes == 0, "a head must fill whole vectors");

// ---- a call --------------------------------------------------------------------------------------------------------

constexpr int kAdd = 1, kFold = 2, kCombine = 3, kCombineChannels = 4;       // else: compute

}  // namespace

extern "C" {

// What Python must know of this build: kPanel for packing, floats of workspace for a batch.
int32_t bac_panel() { return kPanel; }
int64_t bac_workspace(int32_t batch, int32_t slots) {
    return int64_t(padded_rows(batch * kTokens)) * (kWidth * (3 + slots) + kHiddenStride) + kMemory * 2 * kWidth +
           int64_t(batch) * kTokens * kActions;
}

struct Call {
    const Weight* matrices;         // [layers, ...], packed
    const float* vectors;           // [layers, ...]
    const float* ends;
    const int32_t* self_visible;    // [T]
    const int32_t* cross_visible;   // [T]
    const float* tables;            // [K, layers, 2 d], keys and values of the time token
    const float* coefficients;      // [K, 7]: recover sample, estimate; to original, sample, estimate, noise, previous
    const int32_t* operations;      // per step: count, then the operations
    const float* channel_weights;   // [rows, d], of predictions that weigh each channel by itself
    const float* condition;         // [layers, B, To, 2 d], keys and values of the observation tokens
    const float* fresh;             // [K, B, T, Da]
    const float* committed;         // [K + 1, B, committed_count, Da], the given actions as each step sees them
    float* sample;                  // [B, T, Da], in and out
    float* workspace;               // bac_workspace(batch, slots)
    float clip;
    int32_t steps, batch, slots;
    int32_t committed_first, committed_count;
};

// Write the given actions into the sample, as they are before a step; after the last one, as they are.
inline void impose(const Call* call, int step) {
    const int64_t size = int64_t(call->committed_count) * kActions;
    for (int b = 0; size > 0 && b < call->batch; ++b)
        std::memcpy(call->sample + (int64_t(b) * kTokens + call->committed_first) * kActions,
                    call->committed + (int64_t(step) * call->batch + b) * size, sizeof(float) * size);
}

void bac_chunk(const Call* call) {
    const int batch = call->batch, tokens = batch * kTokens, rows = padded_rows(tokens);
    const int64_t size = int64_t(rows) * kWidth;
    float* stream = call->workspace;
    float* normed = stream + size;
    float* mixed = normed + size;
    float* wide = mixed + size;                            // [rows, 4 d + 16]: q, k, v, or the hidden layer
    float* memory = wide + int64_t(rows) * kHiddenStride;                       // [S, 2 d]
    float* originals = memory + kMemory * 2 * kWidth;      // [B, T, Da], of the step before
    float* slots = originals + tokens * kActions;          // [slots, rows, d]
    const Ends ends(call->ends);
    std::memset(call->workspace, 0, sizeof(float) * bac_workspace(batch, call->slots));

    const int32_t* op = call->operations;
    for (int step = 0; step < call->steps; ++step) {
        const float* table = call->tables + int64_t(step) * kLayers * 2 * kWidth;
        impose(call, step);
        for (int token = 0; token < tokens; ++token)
            for (int c = 0; c < kWidth; c += kLanes) {
                Vector value = load(ends.positions + token % kTokens * kWidth + c);
                for (int a = 0; a < kActions; ++a) value += load(ends.embed + a * kWidth + c) * call->sample[token * kActions + a];
                store(stream + token * kWidth + c, value);
            }

        for (int remaining = *op++; remaining > 0; --remaining) {
            const int kind = *op++;
            if (kind == kAdd) {
                const float* feature = slots + size * *op++;
                for (int64_t i = 0; i < size; i += kLanes) store(stream + i, load(stream + i) + load(feature + i));
                continue;
            }
            if (kind == kFold) {
                float* into = slots + size * *op++;
                const int count = *op++;
                for (int64_t i = 0; i < size; i += kLanes) {
                    Vector total = load(slots + size * op[0] + i);
                    for (int source = 1; source < count; ++source) total += load(slots + size * op[source] + i);
                    store(into + i, total);
                }
                op += count;
                continue;
            }
            if (kind == kCombineChannels) {
                const int count = *op++;
                for (int64_t row = 0; row < size; row += kWidth)
                    for (int c = 0; c < kWidth; c += kLanes) {
                        Vector total = load(stream + row + c);
                        for (int source = 0; source < count; ++source) {
                            const float* weights = call->channel_weights + int64_t(op[count + source]) * kWidth;
                            total += load(slots + size * op[source] + row + c) * load(weights + c);
                        }
                        store(stream + row + c, total);
                    }
                op += 2 * count;
                continue;
            }
            if (kind == kCombine) {
                const int count = *op++;
                for (int source = 0; source < count; ++source) {
                    float weight;
                    std::memcpy(&weight, op + count + source, sizeof weight);
                    const float* feature = slots + size * op[source];
                    for (int64_t i = 0; i < size; i += kLanes) store(stream + i, load(stream + i) + load(feature + i) * weight);
                }
                op += 2 * count;
                continue;
            }
            const int block = *op++, slot = *op++, number = block / 3;
            const Layer layer(call->matrices + number * kLayerMatrices, call->vectors + number * kLayerVectors);
            const auto to_wide = [&](int row, int channel, Vector value) { store(wide + int64_t(row) * 3 * kWidth + channel, value); };
            const auto to_mixed = [&](int row, int channel, Vector value) { store(mixed + int64_t(row) * kWidth + channel, value); };
            const auto to_hidden = [&](int row, int channel, Vector value) { store(wide + int64_t(row) * kHiddenStride + channel, gelu(value)); };
            const auto to_stream = [&](int row, int channel, Vector value) {
                const int64_t at = int64_t(row) * kWidth + channel;
                if (slot >= 0) store(slots + size * slot + at, value);
                store(stream + at, load(stream + at) + value);
            };
            switch (block % 3) {
                case 0:
                    layer_norm(rows, stream, layer.norm1_scale, layer.norm1_shift, normed);
                    linear<kWidth, 3 * kWidth>(rows, normed, kWidth, layer.self_in, layer.self_in_bias, to_wide);
                    for (int b = 0; b < batch; ++b) {
                        const float* q = wide + int64_t(b) * kTokens * 3 * kWidth;
                        attend<kTokens>(q, 3 * kWidth, q + kWidth, q + 2 * kWidth, 3 * kWidth, call->self_visible,
                                        normed + int64_t(b) * kTokens * kWidth);
                    }
                    linear<kWidth, kWidth>(rows, normed, kWidth, layer.self_out, layer.self_out_bias, to_stream);
                    break;
                case 1:
                    layer_norm(rows, stream, layer.norm2_scale, layer.norm2_shift, normed);
                    linear<kWidth, kWidth>(rows, normed, kWidth, layer.cross_in, layer.cross_in_bias, to_mixed);
                    std::memcpy(memory, table + number * 2 * kWidth, sizeof(float) * 2 * kWidth);
                    for (int b = 0; b < batch; ++b) {
                        constexpr int64_t kObserved = int64_t(kMemory - 1) * 2 * kWidth;
                        std::memcpy(memory + 2 * kWidth, call->condition + (int64_t(number) * batch + b) * kObserved,
                                    sizeof(float) * kObserved);
                        attend<kMemory>(mixed + int64_t(b) * kTokens * kWidth, kWidth, memory, memory + kWidth, 2 * kWidth,
                                        call->cross_visible, normed + int64_t(b) * kTokens * kWidth);
                    }
                    linear<kWidth, kWidth>(rows, normed, kWidth, layer.cross_out, layer.cross_out_bias, to_stream);
                    break;
                default:
                    layer_norm(rows, stream, layer.norm3_scale, layer.norm3_shift, normed);
                    linear<kWidth, kHidden>(rows, normed, kWidth, layer.hidden, layer.hidden_bias, to_hidden);
                    linear<kHidden, kWidth>(rows, wide, kHiddenStride, layer.out, layer.out_bias, to_stream);
            }
        }

        const float* c = call->coefficients + step * 7;
        const float* fresh = call->fresh + int64_t(step) * tokens * kActions;
        layer_norm(tokens, stream, ends.norm_scale, ends.norm_shift, normed);
        for (int token = 0; token < tokens; ++token)
            for (int a = 0; a < kActions; ++a) {
                Vector product{};
                for (int i = 0; i < kWidth; i += kLanes) product += load(normed + token * kWidth + i) * load(ends.head + a * kWidth + i);
                const float estimate = sum(product) + ends.head_bias[a];
                float& sample = call->sample[token * kActions + a];
                float& previous = originals[token * kActions + a];
                const float original = std::clamp(c[0] * sample + c[1] * estimate, -call->clip, call->clip);
                sample = c[2] * original + c[3] * sample + c[4] * estimate + c[5] * fresh[token * kActions + a] + c[6] * previous;
                previous = original;
            }
    }
    impose(call, call->steps);
}

}  // extern "C"
